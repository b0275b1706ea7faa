"""The examples run, on small data, and find the true classes behind wrong labels; what they save contains the average."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.integrations import ranks

ROOT = Path(__file__).resolve().parents[2]
WHY = "{} is not installed: pip install .[integrations]"


def example(name: str, *needs: str) -> Any:
    """Import an example's module, or skip the test with the missing library as the reason."""
    for library in needs:
        pytest.importorskip(library, reason=WHY.format(library))
    return importlib.import_module(f"docs.examples.{name}")


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_lightning(tmp_path: Path) -> None:
    module, right = example("lightning_module", "lightning", "torchmetrics").main(str(tmp_path))
    assert right > 0.88  # cross entropy ends near 0.65
    assert module.criterion.average_steps.item() == 8 * 20
    saved = torch.load(tmp_path / "best.ckpt", weights_only=True)
    assert saved["state_dict"]["criterion.average_joint"].dtype == torch.float64
    assert saved["state_dict"]["criterion.average_steps"] > 0
    assert next(iter(saved["callbacks"].values()))["best_model_score"] > -9  # -8.5 is perfect


def test_trainer(tmp_path: Path) -> None:
    criterion, right = example("hf_trainer", "transformers", "accelerate").main(str(tmp_path))
    assert right > 0.88  # cross entropy ends near 0.65
    assert criterion.average_steps.item() == 8 * 20


def test_accelerate(tmp_path: Path) -> None:
    criterion, right = example("accelerate_loop", "accelerate").main(str(tmp_path))
    assert right > 0.88  # cross entropy ends near 0.65
    assert criterion.average_steps.item() == 8 * 20
    (saved,) = tmp_path.glob("custom_checkpoint_*.pkl")
    state = torch.load(saved, weights_only=True)
    assert torch.equal(state["average_joint"], criterion.average_joint)


def test_timm() -> None:
    criterion, right = example("timm_loop", "timm").main()
    assert right > 0.9
    assert criterion.average_steps.item() == 4 * 10


def test_segmentation() -> None:
    """Dense targets of uint8, ignore_index 255."""
    before, after = example("segmentation").main()
    assert after > 0.9
    assert after >= before - 0.02


def test_plain_ddp(tmp_path: Path) -> None:
    checkpoint = tmp_path / "model.pt"
    printed = ranks.run(2, "docs.examples.ddp", str(checkpoint))
    assert float(printed.split("right on ")[1].split("%")[0]) > 88
    state = torch.load(checkpoint, weights_only=True)["criterion"]
    assert state["average_steps"] == 8 * 20
