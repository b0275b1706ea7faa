"""Benchmarks of the loss against its peers: all peers of a shape timed round-robin in one run, compared by ratios."""
