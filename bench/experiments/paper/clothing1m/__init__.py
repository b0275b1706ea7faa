"""Training at the scale of Clothing1M, ``python -m bench.experiments.paper.clothing1m``: one process or many.

A run can be killed and resumed at any time.
"""
