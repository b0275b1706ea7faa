"""The paper's experiments, ``python -m bench.paper``: real data under label noise, L_DMI beside its counterparts."""
