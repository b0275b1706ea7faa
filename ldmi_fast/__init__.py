"""ldmi_fast: the L_DMI loss, robust to label noise, as fused kernels with an analytic backward.

>>> import ldmi_fast
>>> loss = ldmi_fast.dmi_loss(logits, noisy_labels)
"""

from __future__ import annotations

from ._version import __version__
from .diagnostics import AverageReport, JointReport, diagnose
from .explain import Plan, explain
from .functional import dmi_loss, joint_matrix
from .joint_state import JointSolution, JointState, dmi_score
from .linear import linear_dmi_loss
from .modules import DMILoss
from .rng_replay import RNGReplay

__all__ = [
    "AverageReport",
    "DMILoss",
    "JointReport",
    "JointSolution",
    "JointState",
    "Plan",
    "RNGReplay",
    "__version__",
    "diagnose",
    "dmi_loss",
    "dmi_score",
    "explain",
    "joint_matrix",
    "linear_dmi_loss",
]
