"""Experiments: what the loss does for training, and where the published formula fails."""
