"""The ops of the namespace ``ldmi_fast``, which every engine implements. Schemas, fake kernels, stacked problems, edge cases.

Each op has two implementations here: the kernel that the dispatcher finds for the device, and the composite definition, which
runs on every device that has no kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from ldmi_fast import ops
from ldmi_fast.engines import composite
from tests.conftest import DEVICES
from tests.support.compare import DERIVATIVE, EXACT, UNIT_ROUNDOFF
from tests.support.problems import problem

OPS = torch.ops.ldmi_fast
NAMES = ("joint", "logdet_inverse", "logits_grad", "loss_forward", "fused")
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]

#: The documented schemas of the ops, as the dispatcher prints them.
SCHEMAS = {
    "joint": "ldmi_fast::joint(Tensor logits, Tensor target, Tensor? sample_weight, SymInt num_labels, int ignore_index, "
    "str input) -> (Tensor S, Tensor n, Tensor lse, Tensor ce)",
    "logdet_inverse": "ldmi_fast::logdet_inverse(Tensor S, Tensor n, str absent) -> "
    "(Tensor log_abs_det, Tensor sign, Tensor kept, Tensor V)",
    "logits_grad": "ldmi_fast::logits_grad(Tensor logits, Tensor target, Tensor? sample_weight, Tensor lse, Tensor V, "
    "Tensor scale, Tensor ce_scale, int ignore_index, str input) -> Tensor",
    "loss_forward": "ldmi_fast::loss_forward(Tensor logits, Tensor target, Tensor? sample_weight, int ignore_index, "
    "str absent, float eps, bool normalize, float cross_entropy_weight, str input, bool gradient) -> "
    "(Tensor loss, Tensor lse, Tensor V, Tensor scale, Tensor ce_scale)",
    "fused": "ldmi_fast::fused(Tensor logits, Tensor target, Tensor? sample_weight, int ignore_index, str absent, float eps, "
    "bool normalize, float cross_entropy_weight, str input) -> (Tensor loss, Tensor grad)",
}

#: Kinds of batches: soft targets, sample weights, input.
KINDS = {
    "hard": (False, False, "logits"),
    "weighted": (False, True, "logits"),
    "soft": (True, False, "logits"),
    "soft-weighted": (True, True, "logits"),
    "probs": (False, False, "probs"),
    "probs-soft-weighted": (True, True, "probs"),
}
#: Each op with the kinds that it takes.
OPS_AND_KINDS = [
    pytest.param(name, *kind, id=f"{name}-{label}")
    for name in NAMES
    for label, kind in KINDS.items()
    if not (name == "fused" and kind[0])
]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each kind of device, once: the dispatcher chooses the kernel, not ``engine=``."""
    return torch.device(request.param)


def arguments(
    name: str,
    device: torch.device,
    *,
    n: int = 37,
    classes: int = 5,
    dtype: torch.dtype = torch.float32,
    soft: bool = False,
    weighted: bool = False,
    input: str = "logits",
) -> tuple[Any, ...]:
    """Arguments of an op for one batch; those of the later ops come from the earlier ones."""
    batch = problem(n, classes, soft=soft, weighted=weighted).to(device=device)
    logits = (batch.logits.softmax(-1) if input == "probs" else batch.logits).to(dtype)
    target, weight = batch.target, batch.sample_weight
    if name in ("fused", "loss_forward"):
        options = (logits, target, weight, -100, "present", 1e-3, True, 0.5, input)
        return options if name == "fused" else (*options, True)
    joint = (logits, target, weight, classes, -100, input)
    if name == "joint":
        return joint
    S, counts, lse, _ = OPS.joint(*joint)
    if name == "logdet_inverse":
        return S, counts, "present"
    V = OPS.logdet_inverse(S, counts, "present")[3]
    scale, ce_scale = (torch.tensor(value, dtype=torch.float64, device=device) for value in (0.75, 0.5 / n if n else torch.inf))
    return logits, target, weight, lse, V, scale, ce_scale, -100, input


def outputs(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def implementations(name: str) -> Iterator[Callable[..., Any]]:
    yield getattr(OPS, name)
    yield getattr(composite, name)


def description(tensors: tuple[Tensor, ...]) -> list[tuple[Any, ...]]:
    """The properties that a fake kernel must predict. The stride of a dimension of size 1 or of an empty tensor means nothing."""
    return [
        (
            tuple(t.shape),
            t.dtype,
            t.device.type,
            t.storage_offset(),
            tuple(s for s, size in zip(t.stride(), t.shape, strict=True) if size != 1) if t.numel() else None,
        )
        for t in tensors
    ]


@pytest.mark.parametrize("name", NAMES)
def test_schema(name: str) -> None:
    assert str(getattr(OPS, name).default._schema) == SCHEMAS[name]


def test_no_other_ops() -> None:
    assert sorted(op for op in torch._C._dispatch_get_all_op_names() if op.startswith("ldmi_fast::")) == sorted(
        f"ldmi_fast::{name}" for name in (*NAMES, "in_backward", "in_function_forward")
    )


@pytest.mark.skipif(ops.compiled is None, reason=ops.why_not_compiled)
@pytest.mark.parametrize("name", NAMES)
def test_the_cpu_has_its_own_kernel(name: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"ldmi_fast::{name}", "CPU")


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize(("name", "soft", "weighted", "input"), OPS_AND_KINDS)
def test_opcheck(device: torch.device, name: str, soft: bool, weighted: bool, input: str, dtype: torch.dtype) -> None:
    """Schema (nothing aliased or written), fake kernel, and compilation with dynamic shapes."""
    args = arguments(name, device, dtype=dtype, soft=soft, weighted=weighted, input=input)
    torch.library.opcheck(getattr(OPS, name).default, args)


@pytest.mark.parametrize("classes", [65, 1])
@pytest.mark.parametrize("name", NAMES)
def test_opcheck_sizes(device: torch.device, name: str, classes: int) -> None:
    """Many classes, and a single one."""
    torch.library.opcheck(getattr(OPS, name).default, arguments(name, device, n=80, classes=classes))


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "padded", "expanded", "empty"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=["bfloat16", "float64"])
@pytest.mark.parametrize(("name", "soft", "weighted", "input"), OPS_AND_KINDS)
def test_fake_kernel(device: torch.device, name: str, soft: bool, weighted: bool, input: str, dtype: torch.dtype, layout: str) -> None:
    """Shapes, dtypes and strides of the fake outputs are those of the real ones, of both implementations, for all strides."""
    args = list(arguments(name, device, n=0 if layout == "empty" else 12, dtype=dtype, soft=soft, weighted=weighted, input=input))
    for i, arg in enumerate(args):
        if not isinstance(arg, Tensor) or arg.dim() == 0:
            continue
        if layout == "transposed":
            args[i] = arg.movedim(0, -1).contiguous().movedim(-1, 0)
        elif layout == "padded":
            args[i] = torch.cat([arg, arg], -1)[..., : arg.shape[-1]]
        elif layout == "expanded" and name != "logdet_inverse":
            args[i] = arg[:1].expand(arg.shape)
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(arg) if isinstance(arg, Tensor) else arg for arg in args]
        foretold = description(outputs(getattr(OPS, name)(*fake)))
    for implementation in implementations(name):
        assert description(outputs(implementation(*args))) == foretold, implementation


@pytest.mark.parametrize("batch", [(), (1,), (3,), (2, 3), (0,), (2, 0)])
@pytest.mark.parametrize("classes", [4, 70])
def test_logdet_inverse_batched(device: torch.device, classes: int, batch: tuple[int, ...]) -> None:
    """Leading dimensions are separate problems, and the fake kernel predicts their shapes."""
    generator = torch.Generator().manual_seed(3)
    S = torch.rand(*batch, classes, classes, generator=generator, dtype=torch.float64) + classes * torch.eye(classes)
    S[..., 1, :] = S[..., 0, :].clone() if batch == (3,) else S[..., 1, :]  # singular in one of the cases
    S = S.to(device)
    n = S.sum(-1)
    n[..., 2] = 0
    real = OPS.logdet_inverse(S, n, "present")
    assert [tuple(t.shape) for t in real] == [batch, batch, batch, (*batch, classes, classes)]
    with FakeTensorMode() as mode:
        fake = OPS.logdet_inverse(mode.from_tensor(S), mode.from_tensor(n), "present")
    assert description(fake) == description(real)
    flat = [t.reshape(-1, *t.shape[len(batch) :]) for t in (S, n, *real)]
    for s, weights, *together in zip(*flat, strict=True):
        for one, among_others in zip(OPS.logdet_inverse(s, weights, "present"), together, strict=True):
            torch.testing.assert_close(one, among_others, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", NAMES)
def test_symbolic_shapes(device: torch.device, name: str) -> None:
    """A graph traced with symbolic shapes runs at other sizes."""
    op = getattr(OPS, name)
    args = arguments(name, device, n=11, classes=4, weighted=True)
    tensors = [i for i, arg in enumerate(args) if isinstance(arg, Tensor)]

    def call(*given: Tensor) -> tuple[Tensor, ...]:
        full = list(args)
        for i, tensor in zip(tensors, given, strict=True):
            full[i] = tensor
        if name == "joint":
            full[3] = given[0].shape[1]
        return outputs(op(*full))

    graph = make_fx(call, tracing_mode="symbolic")(*(args[i] for i in tensors))
    other = arguments(name, device, n=29, classes=7, weighted=True)
    given = [other[i] for i in tensors]
    for got, want in zip(graph(*given), call(*given), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize(("name", "soft", "weighted", "input"), OPS_AND_KINDS)
def test_inputs_are_left_alone(device: torch.device, name: str, soft: bool, weighted: bool, input: str, layout: str) -> None:
    for classes in (5, 70):
        args = arguments(name, device, n=90, classes=classes, soft=soft, weighted=weighted, input=input)
        if layout == "transposed":
            args = tuple(arg.mT.contiguous().mT if isinstance(arg, Tensor) and arg.dim() == 2 else arg for arg in args)
        before = [arg.clone() if isinstance(arg, Tensor) else arg for arg in args]
        versions = [arg._version for arg in args if isinstance(arg, Tensor)]
        for implementation in implementations(name):
            results = outputs(implementation(*args))
            storages = {arg.untyped_storage().data_ptr() for arg in args if isinstance(arg, Tensor)}
            assert not storages & {result.untyped_storage().data_ptr() for result in results}, "an output aliases an input"
        assert versions == [arg._version for arg in args if isinstance(arg, Tensor)]
        for old, new in zip(before, args, strict=True):
            if isinstance(new, Tensor):
                torch.testing.assert_close(new, old, rtol=0, atol=0)


# --- several problems in one joint -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("input", ["logits", "probs"])
@pytest.mark.parametrize(("problems", "classes", "rows"), [(1, 4, 30), (3, 4, 30), (7, 33, 60), (40, 30, 50), (5, 70, 40)])
def test_stacked_problems(device: torch.device, problems: int, classes: int, rows: int, input: str, dtype: torch.dtype) -> None:
    """B problems with labels y + b C are B separate ones: joint (K = B C), logdet_inverse (batched), logits_grad."""
    separate = [problem(rows, classes, seed=b, weighted=b % 2 == 1, dtype=dtype).to(device=device) for b in range(problems)]
    logits = torch.cat([p.logits.softmax(-1) if input == "probs" else p.logits for p in separate])
    target = torch.cat([p.target + b * classes for b, p in enumerate(separate)])
    weight = torch.cat([torch.ones(rows, device=device) if p.sample_weight is None else p.sample_weight for p in separate])
    target[3] = -100
    S, n, lse, ce = OPS.joint(logits, target, weight, problems * classes, -100, input)
    log_abs_det, _, _, V = OPS.logdet_inverse(S.view(problems, classes, classes), n.view(problems, classes), "present")
    scale, ce_scale = (torch.tensor(value, dtype=torch.float64, device=device) for value in (1.25, 0.5))
    grad = OPS.logits_grad(logits, target, weight, lse, V.flatten(0, 1), scale, ce_scale, -100, input)
    tolerance: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": DERIVATIVE, "atol": DERIVATIVE}
    total_ce = torch.zeros((), dtype=torch.float64, device=device)
    for b in range(problems):
        rows_of = slice(b * rows, (b + 1) * rows)
        mine = target[rows_of]
        y = torch.where(mine == -100, mine, mine - b * classes)
        own = (logits[rows_of], y, weight[rows_of])
        S_b, n_b, lse_b, ce_b = OPS.joint(*own, classes, -100, input)
        total_ce += ce_b
        torch.testing.assert_close(S[b * classes : (b + 1) * classes], S_b, **tolerance)
        torch.testing.assert_close(n[b * classes : (b + 1) * classes], n_b, rtol=EXACT, atol=0)
        torch.testing.assert_close(lse[rows_of], lse_b, **tolerance)
        l_b, _, _, V_b = OPS.logdet_inverse(S_b, n_b, "present")
        torch.testing.assert_close(log_abs_det[b], l_b, **tolerance)
        grad_b = OPS.logits_grad(*own, lse_b, V_b, scale, ce_scale, -100, input)
        torch.testing.assert_close(grad[rows_of], grad_b, **tolerance)
    torch.testing.assert_close(ce, total_ce, **tolerance)


# --- what is out of range ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("classes", "dtype"),
    [(5, torch.int8), *((c, dtype) for c in (5, 150) for dtype in (torch.uint8, torch.int32, torch.int64, torch.uint64))],
)
def test_labels_out_of_range(device: torch.device, classes: int, dtype: torch.dtype) -> None:
    """One label out of range makes S, n and ce NaN; nothing is read or written out of bounds; ignored ones do not count."""
    logits = torch.randn(60, classes, device=device)
    good = (torch.arange(60) % min(classes, 100)).to(dtype)
    for label in [classes, torch.iinfo(dtype).max] + ([-1, torch.iinfo(dtype).min] if torch.iinfo(dtype).min < 0 else []):
        values = good.tolist()
        values[17] = label
        bad = torch.tensor(values, dtype=dtype, device=device)
        for joint in implementations("joint"):
            S, n, _, ce = joint(logits, bad, None, classes, -100, "logits")
            assert S.isnan().all(), joint
            assert n.isnan().all()
            assert ce.isnan()
            weight = torch.ones(60, device=device)
            weight[17] = 0
            S, n, _, ce = joint(logits, bad, weight, classes, -100, "logits")
            assert S.isfinite().all(), "a label of a row of weight 0 does not count"
            assert n.sum() == 59
            if label <= torch.iinfo(torch.int64).max:
                S, n, _, ce = joint(logits, bad, None, classes, label, "logits")
                assert S.isfinite().all(), "a label that is ignored is not out of range"
                assert n.sum() == 59


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("soft", [False, True])
def test_weights_out_of_range(device: torch.device, weight: float, soft: bool) -> None:
    batch = problem(20, 4, soft=soft).to(device=device)
    weights = torch.ones(20, device=device)
    weights[7] = weight
    for joint in implementations("joint"):
        S, n, _, ce = joint(batch.logits, batch.target, weights, 4, -100, "logits")
        # the loss, which needs S and n finite, is NaN either way
        assert not (S.isfinite().all() and n.isfinite().all()), joint
        assert not ce.isfinite()


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_the_weight_of_an_ignored_row_does_not_count(device: torch.device, weight: float) -> None:
    batch = problem(20, 4).to(device=device)
    target, weights = batch.target.clone(), torch.ones(20, device=device)
    target[7], weights[7] = -100, weight
    for joint in implementations("joint"):
        S, n, _, ce = joint(batch.logits, target, weights, 4, -100, "logits")
        assert S.isfinite().all(), joint
        assert n.sum() == 19
        assert ce.isfinite()


@pytest.mark.parametrize("wild", [float("nan"), float("inf"), -float("inf")])
def test_logdet_inverse_of_what_is_not_finite(device: torch.device, wild: float) -> None:
    for classes in (4, 70):
        S = torch.eye(classes, dtype=torch.float64, device=device)
        S[1, 2] = wild
        for n in (torch.ones_like(S[0]), torch.full_like(S[0], torch.nan)):
            for absent in ("present", "strict"):
                results = [implementation(S, n, absent) for implementation in implementations("logdet_inverse")]
                for log_abs_det, sign, _, V in results:
                    assert log_abs_det.isnan()
                    assert sign.isnan()
                    assert V.isnan().all()
                assert results[0][2] == results[1][2], "kept"


@pytest.mark.parametrize("absent", ["present", "strict"])
@pytest.mark.parametrize("classes", [1, 2, 5, 64, 65, 80])
def test_logdet_inverse_of_absent_and_singular(device: torch.device, classes: int, absent: str) -> None:
    generator = torch.Generator().manual_seed(classes)
    regular = torch.rand(classes, classes, generator=generator, dtype=torch.float64) + classes * torch.eye(classes)
    regular = regular.to(device)
    counts = regular.sum(-1)
    none = torch.zeros_like(counts)
    some = counts.clone()
    some[0] = 0
    never = regular.clone()
    never[:, -1] = 0  # a class that is never predicted: singular, if any class is present
    for S, n in [(regular, counts), (regular, some), (regular, none), (never, counts), (never, none)]:
        ours, definition = (implementation(S, n, absent) for implementation in implementations("logdet_inverse"))
        for got, want in zip(ours, definition, strict=True):
            torch.testing.assert_close(got, want, rtol=DERIVATIVE, atol=EXACT)
        if n is none:
            assert [t.item() for t in ours[:3]] == [0, 1, 0]
            assert not ours[3].any()
        if S is never and n is counts:
            assert ours[0] == -torch.inf
            assert ours[1] == 0
            assert not ours[3].any()


# --- accuracy ---------------------------------------------------------------------------------------------------------------------


def with_condition(classes: int, cond: float, kind: str, seed: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """S [C, C] and n [C] with cond(R) = ``cond``; ``kind``: how the singular values of R are distributed."""
    generator = np.random.default_rng(seed)
    left, _ = np.linalg.qr(generator.normal(size=(classes, classes)))
    right, _ = np.linalg.qr(generator.normal(size=(classes, classes)))
    values = np.geomspace(1, 1 / cond, classes) if kind == "even" else np.r_[np.ones(classes - 1), 1 / cond]
    n = generator.uniform(1, 100, classes)
    return (left * values) @ right * n[:, None], n


def exact_inverse(S: np.ndarray[Any, Any], n: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """V = S^{-T} of exactly these numbers, by elimination in numpy's longdouble."""
    classes = len(S)
    scale = n.astype(np.longdouble)[:, None]
    work = np.concatenate([S.astype(np.longdouble) / scale, np.eye(classes, dtype=np.longdouble)], 1)
    for k in range(classes):
        pivot = k + int(np.argmax(np.abs(work[k:, k])))
        work[[k, pivot]] = work[[pivot, k]]
        work[k] /= work[k, k]
        factor = work[:, k].copy()
        factor[k] = 0
        work -= factor[:, None] * work[k]
    return work[:, classes:].T / scale


def error_of_V(device: torch.device, classes: int, cond: float, kind: str, seed: int) -> float:
    """Largest error of V over its largest entry."""
    S, n = with_condition(classes, cond, kind, seed)
    V = OPS.logdet_inverse(torch.from_numpy(S).to(device), torch.from_numpy(n).to(device), "present")[3].cpu().numpy()
    exact = exact_inverse(S, n)
    return float(np.abs(V - exact).max() / np.abs(exact).max())


@pytest.mark.skipif(np.finfo(np.longdouble).nmant < 60, reason="numpy's longdouble is no longer than a double here")
@pytest.mark.parametrize("cond", [1e2, 1e6])
@pytest.mark.parametrize("kind", ["even", "one"])
@pytest.mark.parametrize("classes", [2, 3, 5, 10, 14, 32, 64, 65, 100, 200, 300])
def test_accuracy_of_V(device: torch.device, classes: int, kind: str, cond: float) -> None:
    """Every elimination, for few classes and in panels for many, is as good as fp64 allows.

    The division of S by n alone, one rounding per entry, moves V by up to cond(R) roundoffs. Measured: 1.8.
    """
    worst = max(error_of_V(device, classes, cond, kind, seed) for seed in range(4 if classes <= 100 else 1))
    assert worst <= 4 * cond * UNIT_ROUNDOFF[torch.float64]
