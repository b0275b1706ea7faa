"""Memory: labels out of range, tensors of more than 2^31 elements, and how much a step needs."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from bench.gpu.measure import peak_bytes
from ldmi_fast import dmi_loss
from ldmi_fast.engines import composite
from tests.support.compare import GRADIENT_ROUNDING, Result, assert_matches
from tests.support.problems import problem

LABELS = [-1, -(2**31), 2**31, 2**40, -(2**62)]


@pytest.mark.parametrize(("n", "classes"), [(256, 14), (20000, 14), (3000, 100), (2000, 300)])
def test_labels_out_of_range_touch_no_memory(engine: str, device: torch.device, n: int, classes: int) -> None:
    """The loss is NaN, all memory around the arguments is unchanged, and the GPU still works."""
    batch = problem(n, classes)
    guard = 4096
    arena = torch.full((n * classes + 2 * guard,), 7.0, device=device)
    logits = arena[guard:-guard].view(n, classes)
    logits.copy_(batch.logits)
    before = arena.clone()
    for label in [classes, *LABELS]:
        target = batch.target.to(device)
        target[n // 2] = label
        leaf = logits.detach().requires_grad_()
        loss = dmi_loss(leaf, target, cross_entropy_weight=0.5, engine=engine)
        assert loss.isnan()
        (grad,) = torch.autograd.grad(loss, leaf)
        assert grad.shape == leaf.shape
        torch.cuda.synchronize()
        assert torch.equal(arena, before)
    good = dmi_loss(logits, batch.target.to(device), engine=engine)
    assert good.isfinite()


def test_labels_are_read_where_that_is_asked_for(engine: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """LDMI_FAST_CHECK=1, for debugging, raises the same error as on the CPU."""
    batch = problem(256, 14)
    here = batch.to(device=device)
    target = here.target.clone()
    target[17] = 14
    assert dmi_loss(here.logits, target, engine=engine).isnan()
    monkeypatch.setenv("LDMI_FAST_CHECK", "1")
    with pytest.raises(IndexError, match=r"target 14 of sample 17 .*0 <= target < 14"):
        dmi_loss(here.logits, target, engine=engine)
    with pytest.raises(IndexError, match="target 14 of sample 17"):
        dmi_loss(here.logits, target)  # also on the path that skips the checks of the usual small step
    assert dmi_loss(here.logits, here.target, engine=engine).isfinite()
    weight = torch.ones(256, device=device)
    weight[3] = -1
    with pytest.raises(ValueError, match=r"sample_weight must be finite and >= 0"):
        dmi_loss(here.logits, here.target, sample_weight=weight, engine=engine)


def require_memory(size: int) -> None:
    """Skip unless this many bytes are free on the GPU."""
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    if free < size:
        pytest.skip(f"needs {size / 1e9:.1f} GB of free GPU memory, {free / 1e9:.1f} are")


@pytest.mark.parametrize(("n", "classes"), [(500, 14), (400, 64), (2000, 300)])
@pytest.mark.parametrize("transposed", [False, True], ids=["rows-apart", "columns-apart"])
def test_strides_beyond_32_bits(engine: str, device: torch.device, n: int, classes: int, transposed: bool) -> None:
    """A few rows (or columns) so far apart that their offsets need 64 bits, in a tensor whose other elements are not read."""
    apart = (2**31 // (classes if transposed else n) + 4096) & ~7
    shape = (classes, apart) if transposed else (n, apart)
    require_memory(2 * shape[0] * shape[1] + 2**30)
    batch = problem(n, classes, dtype=torch.bfloat16)
    wide = torch.empty(shape, dtype=torch.bfloat16, device=device)
    logits = wide[:, :n].t() if transposed else wide[:, :classes]
    logits.copy_(batch.logits)
    assert (n - 1) * logits.stride(0) + (classes - 1) * logits.stride(1) > 2**31 - apart
    leaf = logits.detach().requires_grad_()
    loss = dmi_loss(leaf, batch.target.to(device), engine=engine)
    (grad,) = torch.autograd.grad(loss, leaf)
    assert_matches(Result(loss.detach(), grad, None), batch.answer(), torch.bfloat16)
    del wide, logits, leaf, grad
    torch.cuda.empty_cache()


@pytest.mark.slow
@pytest.mark.parametrize("classes", [14, 100, 1000])
def test_more_than_2_to_the_31_elements(engine: str, device: torch.device, classes: int) -> None:
    """Compared with the composite engine in blocks of rows: the joint as a sum, the gradient where 32 bits would overflow."""
    n = 2**31 // classes + 70_000
    require_memory(6 * n * classes + 20 * n + 2**31)
    generator = torch.Generator(device).manual_seed(0)
    target = torch.arange(n, device=device) % classes
    logits = torch.empty(n, classes, dtype=torch.bfloat16, device=device)
    block = 2**27 // classes
    for start in range(0, n, block):
        part = logits[start : start + block]
        part.normal_(generator=generator)
        part.scatter_add_(1, target[start : start + block, None], torch.full_like(part[:, :1], 2 + math.log(classes)))
    S = torch.zeros(classes, classes, dtype=torch.float64, device=device)
    counts = torch.zeros(classes, dtype=torch.float64, device=device)
    for start in range(0, n, block // 8):
        rows = slice(start, start + block // 8)
        of_block = composite.joint(logits[rows], target[rows], None, classes, -100, "logits", need_ce=False)
        S += of_block[0]
        counts += of_block[1]
    log_abs_det, _, _, V = composite.logdet_inverse(S, counts, "present")
    expected = -(log_abs_det - classes * math.log(n)).item()

    leaf = logits.requires_grad_()
    loss = dmi_loss(leaf, target, engine=engine)
    (grad,) = torch.autograd.grad(loss, leaf)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    one, zero = torch.ones((), dtype=torch.float64, device=device), torch.zeros((), dtype=torch.float64, device=device)
    edge = 2**31 // classes
    for start in (0, edge // 2 - 500, edge - 500, n - 1000):
        rows = slice(start, start + 1000)
        x, y = logits.detach()[rows], target[rows]
        want = composite.logits_grad(x.float(), y, None, x.new_zeros(1000), V, one, zero, -100, "logits")
        error = (grad[rows].float() - want).abs().max() / want.abs().max()
        assert error <= 2.0**-8 + 1e3 * GRADIENT_ROUNDING[torch.float32], f"rows from {start}"


MEMORY_SHAPES = [
    pytest.param(256, 14, id="small"),
    pytest.param(65536, 14, id="many-rows"),
    pytest.param(65536, 100, id="one-block-factor"),
    pytest.param(65536, 1000, id="many-classes"),
    pytest.param(512, 2048, id="mostly-matrix"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("n", "classes"), MEMORY_SHAPES)
def test_peak_memory(engine: str, device: torch.device, n: int, classes: int, dtype: torch.dtype) -> None:
    """At most 1.05 (dZ + 16 C^2 + 16 N) + 4 MB beyond the inputs: no second N x C tensor."""
    generator = torch.Generator(device).manual_seed(0)
    target = torch.arange(n, device=device) % classes
    logits = torch.randn(n, classes, device=device, generator=generator).to(dtype).requires_grad_()

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(dmi_loss(logits, target, engine=engine), logits)

    allowed = 1.05 * (logits.numel() * dtype.itemsize + 16 * classes**2 + 16 * n) + 4e6
    extra = peak_bytes(step)
    assert extra <= allowed, f"{extra / 1e6:.1f} MB, allowed {allowed / 1e6:.1f}"
