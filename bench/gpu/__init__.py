"""The benchmark of the GPU engines, and the one command that builds, tests and measures on a machine with a GPU: ``run.sh``."""
