"""More classes than a CPU factors in the time of a test: the last of the CUDA engine's own kernels, and the first of the LU path."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.support import matrices
from tests.support.factoring import assert_regular


@pytest.mark.parametrize("classes", [2049, 4096, 4100])
def test_regular(engine: str, device: torch.device, classes: int) -> None:
    rng = np.random.default_rng(classes)
    for hard in (matrices.hardly_learned(classes, 1e-4, rng), matrices.shifted(classes, rng)):
        assert_regular(engine, device, hard)
