"""The demo, ``python -m bench.experiments.demo``: a classifier trained on wrong labels, with cross entropy and with L_DMI."""
