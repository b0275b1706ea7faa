"""The processes that the distributed tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch.distributed

from tests.distributed.pool import Pool


@pytest.fixture(scope="session")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    """A pool of four processes with a gloo group."""
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        pytest.skip("torch was built without gloo")
    pool = Pool(tmp_path_factory.mktemp("pool"))
    yield pool
    pool.close()
