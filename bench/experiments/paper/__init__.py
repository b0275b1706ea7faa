"""The paper's experiments, ``python -m bench.experiments.paper``: real data under label noise, L_DMI next to its counterparts."""
