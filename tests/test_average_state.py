"""The buffers of the moving average: conversions, casts, copies, files, checkpoints of other versions."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from typing import Any

import pytest
import torch

from ldmi_fast import DMILoss, dmi_loss
from tests.support.problems import Problem, problem

STATE = ("average_joint", "average_counts", "average_weight", "average_steps")


def several(count: int, n: int = 60, classes: int = 6, **build: Any) -> list[Problem]:
    return [problem(n, classes, seed=seed, dtype=torch.float64, **build) for seed in range(count)]


@pytest.mark.parametrize("convert", ["half", "bfloat16", "float", "to-half", "type"])
def test_conversions_keep_the_precision(convert: str) -> None:
    criterion = DMILoss(6, momentum=0.9)
    batch = problem(60, 6)
    criterion(batch.logits, batch.target)
    before = copy.deepcopy(criterion.state_dict())
    model = torch.nn.ModuleDict({"head": torch.nn.Linear(2, 2), "criterion": criterion})
    if convert == "to-half":
        model.to(torch.float16)
    elif convert == "type":
        model.type(torch.float16)
    else:
        getattr(model, convert)()
    assert model["head"].weight.dtype == (torch.float32 if convert == "float" else model["head"].bias.dtype)
    for name, value in criterion.state_dict().items():
        assert value.dtype == before[name].dtype, name
        assert torch.equal(value, before[name]), name


def cast_buffers(module: torch.nn.Module, dtype: torch.dtype) -> None:
    """As FSDP and DDP do for MixedPrecision(buffer_dtype=...)."""
    for buffer in module.buffers():
        if buffer.is_floating_point():
            buffer.data = buffer.data.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("copied", [False, True], ids=["", "copy"])
def test_buffers_that_something_casts_are_restored(engine: str, device: torch.device, dtype: torch.dtype, copied: bool) -> None:
    plain, cast = (DMILoss(6, momentum=0.9, engine=engine).to(device) for _ in range(2))
    batches = [batch.to(device=device) for batch in several(6)]
    for criterion in (plain, cast):
        criterion.calibrate([(batches[0].logits, batches[0].target)], lambda x: x)
    if copied:
        cast = pickle.loads(pickle.dumps(copy.deepcopy(cast)))
    names = {name: id(buffer) for name, buffer in cast.named_buffers()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step, batch in enumerate(batches):
            if step % 2 == 0:
                cast_buffers(cast, dtype)
                assert cast.average_joint.dtype == dtype
            assert torch.equal(cast(batch.logits, batch.target), plain(batch.logits, batch.target))
    for name in STATE:
        assert torch.equal(getattr(cast, name), getattr(plain, name)), name
    assert {name: id(buffer) for name, buffer in cast.named_buffers()} == names  # a wrapper may hold them


def test_a_module_made_in_inference_mode_trains_outside(engine: str, device: torch.device) -> None:
    batch = problem(60, 6).to(device=device)
    with torch.inference_mode():
        criterion = DMILoss(6, momentum=0.9, engine=engine).to(device)
        criterion.calibrate([(batch.logits, batch.target)], lambda x: x)
    criterion(batch.leaf(), batch.target).backward()
    assert criterion.average_steps.item() == 1


def test_a_rounded_state_is_named(engine: str, device: torch.device) -> None:
    """What was saved in half precision has lost its digits: the forward says so, once, and goes on in fp64."""
    criterion = DMILoss(6, momentum=0.9, engine=engine).to(device)
    batch = problem(60, 6).to(device=device)
    criterion(batch.logits, batch.target)
    state = {name: value.bfloat16() if value.is_floating_point() else value for name, value in criterion.state_dict().items()}
    criterion = DMILoss(6, momentum=0.9, engine=engine).to(device)
    criterion.load_state_dict(state, assign=True)
    assert criterion.average_joint.dtype == torch.bfloat16
    with pytest.warns(UserWarning, match=r"rounded to half or single precision.*calibrate\(\) or reset\(\)"):
        criterion(batch.logits, batch.target)
    assert criterion.average_joint.dtype == torch.float64
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        criterion(batch.logits, batch.target)


def test_a_compiled_forward_names_the_cast(engine: str, device: torch.device) -> None:
    """A graph cannot restore the digits, so it raises an error."""
    torch._dynamo.reset()
    criterion = DMILoss(6, momentum=0.9, engine=engine).to(device)
    cast_buffers(criterion, torch.bfloat16)
    batch = problem(60, 6).to(device=device)
    with pytest.raises(Exception, match=r"something has cast the moving average of this DMILoss to torch\.bfloat16"):
        torch.compile(criterion, backend="aot_eager", fullgraph=True)(batch.logits, batch.target)


def test_a_state_in_half_precision_is_named(engine: str, device: torch.device) -> None:
    criterion = DMILoss(6, momentum=0.9, engine=engine).to(device)
    state = {name: value.bfloat16() if value.is_floating_point() else value for name, value in criterion.state_dict().items()}
    with pytest.warns(UserWarning, match="rounded to half or single precision"):
        criterion.load_state_dict(state)
    assert criterion.average_joint.dtype == torch.float64


def test_meta_device_and_back() -> None:
    with torch.device("meta"):
        criterion = DMILoss(6, momentum=0.9)
    criterion.to_empty(device="cpu")
    criterion.reset()
    batch = problem(60, 6)
    assert criterion(batch.logits, batch.target).item() == pytest.approx(dmi_loss(batch.logits, batch.target).item(), rel=1e-6)


def test_copies_states_and_files_continue_identically() -> None:
    first, second = several(2)
    criterion = DMILoss(6, momentum=0.9)
    criterion(first.logits, first.target)
    buffer = io.BytesIO()
    torch.save(criterion.state_dict(), buffer)
    buffer.seek(0)
    loaded = DMILoss(6, momentum=0.9)
    loaded.load_state_dict(torch.load(buffer, weights_only=True))
    copies = [copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion)), loaded]
    losses = [twin(second.logits, second.target) for twin in (criterion, *copies)]
    assert all(torch.equal(loss, losses[0]) for loss in losses)
    assert set(criterion.state_dict()) == set(STATE)
    copies[0].reset()
    assert criterion.average_steps.item() == 2


def test_states_of_other_versions_and_shapes() -> None:
    """A checkpoint without an average loads, and leaves the average as it is; one with another number of classes does not load."""
    criterion = DMILoss(6, momentum=0.9)
    batch = problem(60, 6)
    criterion(batch.logits, batch.target)
    old: Any = DMILoss(6).state_dict()
    old._metadata[""]["version"] = 1
    before = criterion.average_joint.clone()
    criterion.load_state_dict(old)
    assert torch.equal(criterion.average_joint, before)
    with pytest.raises(RuntimeError, match="Missing key"):
        criterion.load_state_dict(DMILoss(6).state_dict())
    with pytest.raises(RuntimeError, match="size mismatch for average_joint"):
        criterion.load_state_dict(DMILoss(5, momentum=0.9).state_dict())
    halved = {name: value.half() if value.is_floating_point() else value for name, value in criterion.state_dict().items()}
    criterion.load_state_dict(halved)
    assert criterion.average_joint.dtype == torch.float64
