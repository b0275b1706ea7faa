"""The Clothing1M program without child processes: options, order, checkpoints, log, losses; and complete runs in this process."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

pytest.importorskip("lightning", reason="lightning is not installed: pip install .[integrations]")

from bench.experiments.paper.clothing1m import checkpoint
from bench.experiments.paper.clothing1m.__main__ import main, parse_arguments
from bench.experiments.paper.clothing1m.checkpoint import BadCheckpoint
from bench.experiments.paper.clothing1m.log import Log, read_log
from bench.experiments.paper.clothing1m.model import build, load_weights
from bench.experiments.paper.clothing1m.options import Options, check, from_namespace, to_arguments
from bench.experiments.paper.clothing1m.sampler import Batches, Order, Seeded
from bench.experiments.paper.clothing1m.sets import open_sets
from bench.experiments.paper.clothing1m.train import Trainer, make_criterion, train
from bench.kernels.peers import published
from tests.bench.paper.clothing1m_runs import SMALL, last_state, same_end, steps
from tests.bench.paper.clothing1m_sets import make


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# -------------------------------------------------------------------------------------------------------------- options


def test_the_defaults_are_the_papers() -> None:
    options = from_namespace(parse_arguments(["train"]))
    assert options == Options()
    assert (options.batch_size, options.epochs, options.rates) == (256, (10, 10), ((1e-2, 1e-3), (1e-6, 5e-7)))
    assert (options.drop_at, options.weight_decay, options.sgd_momentum, options.model) == (5, 1e-3, 0.9, "resnet50")


def test_options_survive_a_command_line() -> None:
    assert from_namespace(parse_arguments(["train", *to_arguments(SMALL)])) == SMALL


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 250}, r"--batch-size 250 .* not divisible by 4 of them: take 248 or 252"),
        ({"batch_size": 2}, "take 4"),
        ({"momentum": "1.5"}, "--momentum 1.5: expected auto, none, or a number"),
        ({"momentum": "some"}, "--momentum some: expected"),
        ({"lr_dmi": 0.0}, "--lr-dmi 0.0: expected more than 0"),
        ({"epochs_ce": -1}, "--epochs-ce -1: expected 0 or more"),
        ({"crop": 300}, "--crop 300: expected no more than --resize 256"),
        ({"classes": 1}, "--classes 1: expected 2 or more"),
        ({"method": "gce"}, "--method gce: expected one of ce, dmi, published"),
        ({"sync_batchnorm": True, "device": "cpu"}, "GPUs only"),
    ],
)
def test_bad_options(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(replace(Options(), **change), 4)


def test_missing_data_says_what_to_put_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--data", str(tmp_path / "nothing"), "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert "nothing: there is no such folder" in error
    assert "annotations/noisy_train.txt" in error
    assert "noisy_train_key_list.txt" in error
    assert main(["train"]) == 1
    assert "--data is missing" in capsys.readouterr().err
    with pytest.raises(ValueError, match="expected module:function"):
        open_sets(replace(Options(), sets="nowhere:make"))


# ---------------------------------------------------------------------------------------------------------------- order


def noisy_labels() -> Tensor:
    """Five classes, one of them rare."""
    return torch.cat((torch.arange(97) % 4, torch.full((3,), 4)))


@pytest.mark.parametrize("balanced", [True, False])
def test_every_number_of_processes_sees_the_same_batches(balanced: bool) -> None:
    order = Order(noisy_labels(), 5, 8, balanced=balanced, seed=3)
    whole = Batches(order, 0, 1)
    whole.set(2, 0)
    expected = list(whole)
    for size in (2, 4, 8):
        parts = [Batches(order, rank, size) for rank in range(size)]
        for part in parts:
            part.set(2, 0)
        assert [list(chain.from_iterable(batch)) for batch in zip(*parts, strict=True)] == expected
    whole.set(2, 5)
    assert list(whole) == expected[5:]
    assert len(whole) == order.steps - 5
    whole.set(3, 0)
    assert list(whole) != expected


def test_a_balanced_batch_has_each_class_equally_often() -> None:
    labels = noisy_labels()
    order = Order(labels, 5, 8, seed=1)
    for batch in order.epoch(0):
        counts = labels[batch].bincount(minlength=5)
        assert counts.min() == 1
        assert counts.max() == 2
    q = order.per_class
    for c, members in enumerate(order.members):  # before any sample comes again, every one of its class has come
        taken = torch.cat([order._of_class(c, epoch * q, q) for epoch in range(6)])
        for turn in range(len(taken) // len(members)):
            assert taken[turn * len(members) : (turn + 1) * len(members)].sort().values.equal(members)


def test_a_shuffled_epoch_has_no_sample_twice() -> None:
    order = Order(noisy_labels(), 5, 8, balanced=False, seed=1).epoch(4).flatten()
    assert len(order) == 96
    assert len(order.unique()) == 96


def test_orders_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="no training sample is labelled 5, 6"):
        Order(noisy_labels(), 7, 8)
    with pytest.raises(ValueError, match="expected 0 to 2"):
        Order(noisy_labels(), 3, 8)
    with pytest.raises(ValueError, match="does not fill one batch of 128"):
        Order(noisy_labels(), 5, 128)


def test_random_transforms_depend_on_the_samples_place_alone() -> None:
    data = Seeded(make(SMALL).train)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first, _ = data[7, 3]
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(data[7, 3][0], first)
    assert not torch.equal(data[8, 3][0], first)


# ---------------------------------------------------------------------------------------------------------- checkpoints


def write_two(folder: Path) -> tuple[Path, Path]:
    paths = folder / checkpoint.name_of(10), folder / checkpoint.name_of(20)
    for step, path in zip((10, 20), paths, strict=True):
        checkpoint.write(path, {"step": step, "x": torch.arange(1000.0)})
    return paths


@pytest.mark.parametrize("kind", ["half", "empty", "flipped", "other"])
def test_a_bad_checkpoint_is_refused_and_the_one_before_is_used(tmp_path: Path, kind: str) -> None:
    old, new = write_two(tmp_path)
    content = bytearray(new.read_bytes())
    if kind == "flipped":
        content[content.index(torch.tensor([500.0]).numpy().tobytes())] ^= 1  # one bit of the tensor
    if kind == "other":
        torch.save({"weights": 1}, new)
    else:
        new.write_bytes(bytes({"half": content[: len(content) // 2], "empty": b"", "flipped": content}[kind]))
    with pytest.raises(BadCheckpoint, match={"flipped": "checksum", "other": "format"}.get(kind, "not a complete checkpoint")):
        checkpoint.read(new)
    told: list[str] = []
    found = checkpoint.newest(tmp_path, told.append)
    assert found is not None
    path, state = found
    assert (path, state["step"]) == (old, 10)
    assert str(new) in told[0]
    assert f"going on from {old.name} instead" in told[0]
    with pytest.raises(BadCheckpoint, match=f"newest good one next to it: {old}"):
        checkpoint.read_or_name_another(new)
    old.write_bytes(b"nothing")
    with pytest.raises(BadCheckpoint, match=r"no checkpoint in .* is good"):
        checkpoint.newest(tmp_path, told.append)


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, new = write_two(tmp_path)

    def full(*_: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        checkpoint.write(new, {"step": 21})
    assert checkpoint.read(new)["step"] == 20
    assert len(list(tmp_path.iterdir())) == 2


def test_only_the_newest_stay(tmp_path: Path) -> None:
    _, new = write_two(tmp_path)
    (tmp_path / f"{checkpoint.name_of(5)}.0123456789abcdef.tmp").write_bytes(b"half")
    (tmp_path / "best-ce.pt").write_bytes(b"best")
    checkpoint.tidy(tmp_path, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best-ce.pt", new.name]


def test_a_log_forgets_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    log = Log(path)
    log.write("train", 1, loss=float("inf"))
    size = log.sync()
    log.write("train", 2, loss=1.0)
    log.close()
    with path.open("a") as stream:
        stream.write('{"event": "tr')  # killed within a line, by a system that does not write complete lines
    assert [line["step"] for line in read_log(path)] == [1, 2]
    log = Log(path, size)
    log.write("resume", 1)
    log.close()
    assert [(line["event"], line["step"]) for line in read_log(path)] == [("train", 1), ("resume", 1)]
    assert read_log(path)[0]["loss"] == "inf"


# ---------------------------------------------------------------------------------------------------- losses and models


def test_the_published_method_is_the_published_formula() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(64, 4, requires_grad=True), torch.arange(64) % 4
    ours = make_criterion(replace(SMALL, method="published"), 1, None)(logits, labels)
    theirs = published(logits, labels, normalize=False)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    gradients = [torch.autograd.grad(loss, logits)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)


def test_cross_entropy_leaves_out_images_that_cannot_be_read() -> None:
    criterion = make_criterion(SMALL, 0, None)
    logits, labels = torch.randn(8, 4), torch.tensor([0, 1, 2, 3, -100, 1, -100, 2])
    used = labels >= 0
    torch.testing.assert_close(criterion(logits, labels), torch.nn.functional.cross_entropy(logits[used], labels[used]))
    assert criterion(logits, torch.full((8,), -100)) == 0


def test_weights_from_a_file(tmp_path: Path) -> None:
    ten = build(replace(SMALL, classes=10))
    torch.save(ten.state_dict(), tmp_path / "weights.pt")
    model = build(replace(SMALL, weights=str(tmp_path / "weights.pt")))
    assert torch.equal(cast("Any", model)[0].weight, cast("Any", ten)[0].weight)
    assert load_weights(model, tmp_path / "weights.pt") == ["9.bias", "9.weight"]
    with pytest.raises(ValueError, match="of another network"):
        load_weights(build(replace(SMALL, model="resnet18")), tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=r"no such file: expected a state dict, such as torchvision"):
        load_weights(model, tmp_path / "nothing.pt")


# ----------------------------------------------------------------------------------------------------------- whole runs


class Stopped(Exception):
    """The exception that ends a run."""


def stop_at(step: int, monkeypatch: pytest.MonkeyPatch, options: Options) -> None:
    """Run until a step is done, and no further."""
    with monkeypatch.context() as patch:
        whole = Trainer._to_device

        def limited(trainer: Trainer, x: Tensor) -> Tensor:
            if trainer.steps_done >= step and trainer.net.training:
                raise Stopped
            return whole(trainer, x)

        patch.setattr(Trainer, "_to_device", limited)
        with pytest.raises(Stopped):
            train(options, make)


@pytest.mark.parametrize(
    "change",
    [{}, {"workers": 1}, {"method": "published"}, {"select": "dmi", "sampler": "shuffle", "holdout": 0.2}],
    ids=["dmi", "workers", "published", "select-by-dmi"],
)
def test_a_run_that_was_stopped_in_either_stage_ends_as_one_that_was_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    """With batch norm and dropout, whose state is more than weights; stops at, before and after a checkpoint."""
    options = replace(SMALL, model="tiny-bn", dropout=0.3, save_every=4, **change)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(replace(options, out=str(whole)), make)
    middle = len(steps(whole)) // 2  # of all steps: where the second stage begins
    for stop in (7, 14, middle, middle + 5, middle + 13):
        stop_at(stop, monkeypatch, replace(options, out=str(parts)))
    result = train(replace(options, out=str(parts)), make)
    assert same_end(whole, parts) == []
    assert steps(whole) == steps(parts)
    assert {line["stage"] for line in read_log(parts / "log.jsonl") if line["event"] == "resume"} == {"ce", "dmi"}
    assert json.loads((whole / "result.json").read_text())["best"] == result["best"]


def test_a_run_learns_and_its_checkpoint_holds_everything(tmp_path: Path) -> None:
    result = train(replace(SMALL, out=str(tmp_path)), make)
    accuracies = [line["valid_accuracy"] for line in read_log(tmp_path / "log.jsonl") if line["event"] == "valid"]
    assert accuracies[0] < accuracies[-1]
    assert result["test_last"] > 90
    state = last_state(tmp_path)
    assert state["place"] == {"stage": 1, "epoch": 3, "step": 0}
    assert state["criterion"]["average_steps"] == 30
    assert state["optimizer"]["state"]
    assert state["schedule"]["last_epoch"] == 3
    assert state["sampler"] == {"epoch": 6, "step": 0}
    rates = [line["rate"] for line in read_log(tmp_path / "log.jsonl") if line["event"] == "train"]
    assert rates == 20 * [0.1] + 10 * [pytest.approx(0.05)] + 20 * [5e-3] + 10 * [pytest.approx(2e-3)]


def test_a_run_that_ended_does_nothing_more(tmp_path: Path) -> None:
    options = replace(SMALL, out=str(tmp_path), epochs_ce=1, epochs_dmi=1)
    first = train(options, make)
    second = train(options, make)
    assert first == second
    with pytest.raises(ValueError, match="--seed was 0, is 1"):
        train(replace(options, seed=1), make)
    with pytest.raises(ValueError, match="--resume never"):
        train(replace(options, resume="never"), make)


def test_bf16_has_the_loss_in_full_precision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[torch.dtype, bool]] = []
    criterion = make_criterion(SMALL, 1, None)

    def forward(self: Any, logits: Tensor, labels: Tensor) -> Tensor:
        seen.append((logits.dtype, torch.is_autocast_enabled("cpu")))
        return logits.square().mean()

    monkeypatch.setattr(type(criterion), "forward", forward)
    train(replace(SMALL, out=str(tmp_path), precision="bf16", epochs_ce=0, epochs_dmi=1), make)
    assert set(seen) == {(torch.float32, False)}


# -------------------------------------------------------------------------------------------------------------- measure


def test_measure_says_what_the_loss_costs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torchvision", reason="torchvision is not installed: pip install .[demo]")
    path = tmp_path / "cost.json"
    sizes = ["--crop=16", "--resize=20", "--batch-size=28", "--workers=0", "--model-batch=14", "--device=cpu"]
    assert main(["measure", "--model=tiny", "--precision=fp32", *sizes, "--seconds=0.2", f"--json={path}"]) == 0
    result = json.loads(path.read_text())
    for name, seconds in result["loss_s"].items():
        assert result["loss_share"][name] == pytest.approx(seconds / (seconds + result["network_s"]))
    slower = result["loader_images_per_s"] < result["network_images_per_s"]
    assert result["bound"] == ("loader" if slower else "network")
    assert result["network_images_per_s"] == pytest.approx(28 / (result["network_s"] + result["loss_s"]["ours"]))
    table = path.with_suffix(".md").read_text()
    assert table.strip() == capsys.readouterr().out.strip()
    assert table.count("\n| ") == 5
    assert "timed on 14 and scaled" in table
