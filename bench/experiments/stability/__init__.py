"""Methods for noisy determinants of single batches: ``python -m bench.experiments.stability`` compares them on real data."""
