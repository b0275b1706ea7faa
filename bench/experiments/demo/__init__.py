"""The demo, ``python -m bench.experiments.demo``: a classifier trained on labels that lie, with cross entropy and with L_DMI."""
