"""What to do when determinants of single batches are noisy: ``python -m bench.experiments.stability`` compares ways on real data."""
