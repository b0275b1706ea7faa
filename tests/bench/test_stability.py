"""The stability comparison: its methods, its resumable grid, its report; and the other two studies beyond one batch."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import Tensor, nn

from bench import linear
from bench.experiments import many_classes
from bench.experiments.stability.__main__ import main, read_lines
from bench.experiments.stability.methods import METHODS, Lagged, Momentum, SignedEps, SkipNegative, TwoPass
from bench.experiments.stability.report import cell
from bench.experiments.stability.tasks import CLASSES, TASKS, read_ten
from bench.kernels.cases import Shape
from ldmi_fast import dmi_loss, joint_matrix
from tests.bench.test_demo import write_fashion
from tests.support.problems import problem


def data(classes: int = 3, n: int = 96) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Linear(4, classes).double()
    return model, torch.randn(n, 4, dtype=torch.float64), torch.arange(n) % classes


def gradients(model: nn.Module) -> list[Tensor]:
    found = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    return found


@pytest.mark.parametrize("name", METHODS)
def test_every_method_takes_a_step(name: str) -> None:
    model, x, y = data()
    method = METHODS[name]()
    method.start(model, [(x, y)], 3, 10)
    for _ in range(2):
        assert math.isfinite(method.step(model, x, y))
    # the sign of a single batch may be negative, and then there is nothing to learn
    assert any(grad.any() for grad in gradients(model)) or name == "skip-negative"


def test_two_passes_are_the_exact_gradient() -> None:
    model, x, y = data()
    method = TwoPass(4)
    method.start(model, [], 3, 1)
    loss = method.step(model, x, y)
    ours = gradients(model)
    expected = dmi_loss(model(x), y)
    expected.backward()
    assert loss == pytest.approx(expected.item())
    torch.testing.assert_close(ours, gradients(model))


def test_lagged_uses_what_was_before_the_batch() -> None:
    model, x, y = data()
    method = Lagged(0.9)
    method.start(model, [(x[:48], y[:48])], 3, 1)
    B = joint_matrix(model(x[:48]).detach(), y[:48])
    method.step(model, x[48:], y[48:])
    ours = gradients(model)
    (-(torch.linalg.inv(B).T * joint_matrix(model(x[48:]), y[48:])).sum()).backward()
    torch.testing.assert_close(ours, gradients(model))


def test_sign_aware_methods() -> None:
    batch = problem(200, 3, dtype=torch.float64)
    wrong = batch.logits[:, [1, 0, 2]].requires_grad_()
    assert SkipNegative().loss(wrong, batch.target).item() == 0
    right = batch.leaf()
    torch.testing.assert_close(SkipNegative().loss(right, batch.target), dmi_loss(right, batch.target))
    exact, ours = (
        torch.autograd.grad(loss, right)[0] for loss in (dmi_loss(right, batch.target), SignedEps().loss(right, batch.target))
    )
    torch.testing.assert_close(ours, exact, rtol=1e-3, atol=1e-9)
    # on the wrong side the gradient raises the determinant: it lowers |det|
    towards, away = (
        torch.autograd.grad(loss, wrong)[0] for loss in (SignedEps().loss(wrong, batch.target), dmi_loss(wrong, batch.target))
    )
    assert (towards * away).sum() < 0


def test_momentum_may_rise() -> None:
    model, x, y = data()
    method = Momentum(0.8, until=0.99)
    method.start(model, [], 3, 5)
    seen = []
    for _ in range(5):
        method.step(model, x, y)
        seen.append(method.criterion.momentum)
    assert seen[0] == pytest.approx(0.8)
    assert seen[-1] == pytest.approx(0.99)
    assert seen == sorted(cast("list[float]", seen))


def test_ten_classes_are_read(tmp_path: Path) -> None:
    found = read_ten(write_fashion(tmp_path))
    assert found.classes == CLASSES
    assert found.train.clean.unique().tolist() == list(range(10))
    assert [len(part) for part in (found.train, found.valid, found.test)] == [500, 100, 120]


def test_the_grid_goes_on_where_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = write_fashion(tmp_path / "data"), tmp_path / "out" / "runs.jsonl"
    common = [
        "--data",
        str(folder),
        "--out",
        str(out),
        "--epochs-ce",
        "1",
        "--epochs-dmi",
        "1",
        "--tasks",
        "ten-pair-0.4",
        "--seeds",
        "0",
    ]
    assert main([*common, "--methods", "exact,momentum-0.9"]) == 0
    first = read_lines(out)
    assert [(line["method"], line["failed"]) for line in first] == [("exact", ""), ("momentum-0.9", "")]
    assert first[0]["warm_up"] == first[1]["warm_up"]
    assert len(first[0]["checks"]) == 2
    # a machine that crashes in the middle of a line
    whole = out.read_text()
    out.write_text(whole[: len(whole) - 20])
    assert [line["method"] for line in read_lines(out)] == ["exact"]
    out.write_text(whole.splitlines(keepends=True)[0])
    capsys.readouterr()
    assert main([*common, "--methods", "exact,momentum-0.9,two-pass-4"]) == 0
    assert "1/2 ten-pair-0.4 momentum-0.9 seed 0" in capsys.readouterr().out
    lines = read_lines(out)
    assert [line["method"] for line in lines] == ["exact", "momentum-0.9", "two-pass-4"]
    assert lines[1]["checks"][-1]["test_accuracy"] == first[1]["checks"][-1]["test_accuracy"]
    assert main(["--out", str(out), "--report"]) == 0
    report = out.with_suffix(".md").read_text()
    assert f"| momentum-0.9 | {lines[1]['last']:.1f} |" in report
    assert out.with_suffix(".png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "exact,best"], "unknown best"),
        (["--seeds", "a"], "--seeds a: expected integers"),
        (["--limit", "5"], "--limit 5: expected 128 or more"),
        (["--epochs-dmi", "0"], "--epochs-dmi 0: expected 1 or more"),
    ],
)
def test_bad_options(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err


def test_what_cannot_work_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--data", str(tmp_path / "nothing"), "--out", str(tmp_path / "runs.jsonl")]) == 1
    assert "Fashion-MNIST is not available" in capsys.readouterr().err
    assert main(["--report", "--out", str(tmp_path / "runs.jsonl")]) == 1
    assert "no runs in" in capsys.readouterr().err


def test_more_classes_than_samples_in_a_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The study on a small scale: the average nearly reaches the clean run where the published form stays at its start."""
    small = many_classes.Setting(40, 32, 32, 5.0, 8000, 300, 800, noise=0.45, momenta=(0.5,))
    monkeypatch.setitem(many_classes.SETTINGS, "40x32", small)
    out = tmp_path / "many.json"
    assert many_classes.main(["--settings", "40x32", "--seeds", "0,1", "--out", str(out)]) == 0
    runs = json.loads(out.read_text())["runs"]
    assert [run["seed"] for run in runs] == [0, 1]
    for run in runs:
        end = {name: curve[-1][1] for name, curve in run["curves"].items()}
        bar = end["clean labels, cross entropy"]
        assert end["recommended"] > 0.85 * bar
        assert end["exact per batch"] < 0.7 * bar
        assert end["momentum 0.5"] < end["recommended"]
        assert end["published formula"] == end["cross entropy"]
        # the plot shows the curves of the first seed; of the other seeds only the ends are kept
        assert (len(run["curves"]["recommended"]) > 1) == (run["seed"] == 0)
    text = out.with_suffix(".md").read_text()
    assert "| recommended (0.9936) |" in text
    assert "## C = 40, batch 32, noise 45%" in text
    plot = out.with_suffix(".png").read_bytes()
    assert many_classes.main(["--report", "--out", str(out)]) == 0
    assert out.with_suffix(".md").read_text() == text
    assert out.with_suffix(".png").read_bytes() == plot
    with pytest.raises(SystemExit):
        many_classes.main(["--seeds", "one"])


def test_both_methods_of_the_head_are_the_same() -> None:
    made = linear.make(Shape(200, 20), 16)
    fused, materialised = (linear.step(method, made) for method in linear.METHODS)
    for ours, theirs in zip(fused, materialised, strict=True):
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.slow
def test_the_head_is_measured(tmp_path: Path) -> None:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("peak memory is measured through /proc/self/clear_refs, which this system does not have")
    out = tmp_path / "linear.json"
    assert linear.main(["--shapes", "30000x300", "--width", "16", "--seconds", "0.1", "--out", str(out)]) == 0
    (row,) = json.loads(out.read_text())["rows"]
    logits = 4 * 30000 * 300
    assert row["peak_bytes"]["materialised"] > 1.5 * logits
    assert row["peak_bytes"]["fused"] < row["peak_bytes"]["materialised"]
    assert "| 30000x300 |" in out.with_suffix(".md").read_text()


#: The rows of the table in docs/beyond-one-batch.md, by the beginnings of their names.
EXCERPT = {
    "cross entropy goes on": "ce",
    "exact per batch": "exact",
    "the same, gradient clipped": "exact-clip",
    "published form": "published",
    "batches with det < 0": "skip-negative",
    "softplus of": "signed-eps",
    "two passes over 4": "two-pass-4",
    "average without the batch": "lagged-0.9",
    "average, 0.9 ": "momentum-0.9",
    "average, 0.9, calibrated": "calibrated-0.9",
    "the same and `cross_entropy_weight=5`": "calibrated-0.9-ce-5",
}


def test_the_document_quotes_the_results() -> None:
    root = Path(__file__).resolve().parents[2]
    lines = read_lines(root / "bench" / "results" / "stability.jsonl")
    text = (root / "docs" / "beyond-one-batch.md").read_text(encoding="utf-8")
    for name, method in EXCERPT.items():
        (row,) = [line for line in text.splitlines() if line.startswith(f"| {name}")]
        for task, quoted in zip(TASKS, row.replace("**", "").split("|")[2:5], strict=True):
            found = [line for line in lines if (line["task"], line["method"]) == (task, method)]
            assert len(found) == 3
            assert quoted.strip().startswith(cell(found, "last")), (name, task)
