"""More classes than the compiled kernels factor themselves, of which a CPU would take too long for what it would tell."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests import matrices
from tests.engines.test_logdet_accuracy import backward_error, factor


@pytest.mark.parametrize("classes", [2049, 4096, 4100])
def test_regular(engine: str, device: torch.device, classes: int) -> None:
    """The last of a grid's, where there are clusters, and the first of a library's."""
    rng = np.random.default_rng(classes)
    for hard in (matrices.hardly_learned(classes, 1e-4, rng), matrices.shifted(classes, rng)):
        log_abs_det, sign, kept, V = factor(engine, device, hard.S, hard.n)
        want_sign, want = np.linalg.slogdet(hard.S)
        assert (int(kept), float(sign)) == (classes, want_sign), hard.name
        assert abs(float(log_abs_det) - want) <= 1e-10 * abs(want) + 1e-6, hard.name
        assert backward_error(hard, V, precise=False) <= 10, hard.name
