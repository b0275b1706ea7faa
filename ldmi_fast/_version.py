"""The version: one place, read by the package and by setup.py."""

__version__ = "0.1.0"
