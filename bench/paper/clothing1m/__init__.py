"""Training at the scale of Clothing1M, ``python -m bench.paper.clothing1m``: one process or many, killed and resumed at will."""
