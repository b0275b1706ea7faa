"""Shapes in, an algorithm out: which regime each kernel of this engine takes, its grid and its scratch memory, and why.

The ops call these functions, and so does ``ldmi_fast.explain``, so what it explains is what runs. Free of triton: it must
answer where triton is not installed. A plan depends on the shape alone, never on the device, so that partial sums are added in
the same order everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass

# The joint of at most this many labels and classes is a product of one-hot rows and predictions, kept in registers: 64 x 64 doubles
# in 256 threads are 32 registers each. Above, the product would cost more arithmetic than the logits cost bandwidth.
TILE_CLASSES = 64

# Gauss-Jordan elimination in the registers of one program up to this number of classes (no spills, checked by the tests); torch's LU
# above.
GAUSS_JORDAN_CLASSES = 64

# One program, one launch, up to here: it reads at the speed of one multiprocessor, some 50 GB/s, so 64 KB cost about a microsecond.
FUSED_ELEMENTS = 16384  # N * C
FUSED_CLASSES = 32

# A row is one block of registers up to here, and goes block by block (online softmax) above: 16 KB in the precision of the softmax.
ROW_BYTES = 16384

# V is read as fp64 as long as it stays in the first-level cache (128 KiB); above, a table in the precision of the logits halves the
# traffic to the second-level cache.
DIRECT_ENTRIES = 16384  # K * C

# The gradient visits rows in the order of their labels when the table of V outgrows the second-level cache (some 50 MB on current
# data-centre GPUs, 32 MB to be safe), and enough rows share one of its rows to pay for the sort.
ORDERED_TABLE_BYTES = 32 * 2**20

# Programs of the first stage of the joint: some eight for each of about 130 multiprocessors.
PROGRAMS = 1024
# Their partial sums stay within this, or within 1/25 of the logits if that is more.
PARTIAL_BYTES = 4 * 2**20

# Soft targets of many classes: predictions and targets of a block of rows in fp64 stay within this.
SOFT_BLOCK_BYTES = 64 * 2**20


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def tile_width(n: int) -> int:
    """The padded size of a dimension that goes into a matrix product: a power of two, at least 16."""
    return max(16, power_of_two(n))


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def row_classes(value_bytes: int) -> int:
    """The longest row that is one block of registers."""
    return ROW_BYTES // max(value_bytes, 4)


def is_fused(rows: int, classes: int, soft: bool, value_bytes: int) -> bool:
    """Whether one program computes everything: small, hard labels, and fp32.

    In half precision the upstream gradient (a loss scale of 65536, say) must come in before the gradient is rounded. fp64 would need
    twice the registers, and it is rarely used for training.
    """
    return not soft and value_bytes == 4 and classes <= FUSED_CLASSES and rows * classes <= FUSED_ELEMENTS


@dataclass(frozen=True)
class Joint:
    """How ``joint`` runs.

    Attributes:
        regime: ``"tile"``: one-hot product in registers; ``"label"``: rows in the order of their labels; ``"soft"``: a library's
            matrix product, a block of rows at a time.
        programs: programs of the first stage, each of which leaves partial sums.
        rows: rows of one program (of one block, for ``"soft"``).
        long: the softmax of a row is computed block by block, in a separate pass.
        workspace_bytes: scratch memory, without the outputs.
    """

    regime: str
    programs: int
    rows: int
    long: bool
    workspace_bytes: int


def joint(rows: int, classes: int, labels: int, soft: bool, value_bytes: int, block_rows: int) -> Joint:
    """The plan of ``joint`` for N x C logits and K labels; ``block_rows``: the rows of a tile."""
    if labels <= TILE_CLASSES and classes <= TILE_CLASSES:
        entry_bytes = 8 * (labels * classes + labels + 1)
        # at least two tiles per program, so that its sums are paid for
        programs = max(1, min(ceil_div(rows, 2 * block_rows), PROGRAMS, PARTIAL_BYTES // entry_bytes))
        # whole tiles a program
        per_program = ceil_div(max(rows, 1), programs * block_rows) * block_rows
        return Joint("tile", programs, per_program, False, programs * entry_bytes)
    if soft:
        block = soft_rows(classes, labels)
        return Joint("soft", 1, block, False, min(block, max(rows, 1)) * (classes + labels) * 8 + labels * classes * 8)
    long = classes > row_classes(value_bytes)
    # a side row a program, for the label that the program before began
    most = max(PARTIAL_BYTES, rows * classes * value_bytes // 25) // (8 * (classes + 2))
    programs = max(1, min(ceil_div(rows, 8), PROGRAMS, most))
    wide = 8 if value_bytes == 8 else 4
    sort_bytes = rows * (8 + 2 * key_bytes(labels)) * 2  # keys, sorted keys, their order, and the sort's own copy
    workspace = programs * 8 * (classes + 2) + sort_bytes + (2 * wide * rows if long else 0)
    return Joint("label", programs, ceil_div(max(rows, 1), programs), long, workspace)


def soft_rows(classes: int, labels: int) -> int:
    """Rows of a block of soft targets with many classes."""
    return max(64, SOFT_BLOCK_BYTES // (8 * (classes + labels)))


def key_bytes(labels: int) -> int:
    """Width of a sort key: the labels, and two more for rows that do not count and rows out of range. A radix sort is done in half
    the passes for 16 bits."""
    return 2 if labels + 2 < 2**15 else 4


@dataclass(frozen=True)
class LogitsGrad:
    """How ``logits_grad`` runs.

    Attributes:
        regime: ``"rows"``: a kernel over tiles of whole rows; ``"long"``: one program per row, block by block; ``"soft"``: a library's
            matrix product, a block of rows at a time.
        table: V enters as a table in the precision of the logits, made by a kernel before.
        ordered: rows are visited in the order of their labels.
        workspace_bytes: scratch memory, without the output.
    """

    regime: str
    table: bool
    ordered: bool
    workspace_bytes: int


def logits_grad(rows: int, classes: int, labels: int, soft: bool, value_bytes: int) -> LogitsGrad:
    """The plan of ``logits_grad``."""
    if soft and (labels > TILE_CLASSES or classes > TILE_CLASSES):
        block = min(soft_rows(classes, labels), max(rows, 1))
        return LogitsGrad("soft", False, False, 3 * block * (classes + labels) * 8)
    compute_bytes = 8 if value_bytes == 8 else 4
    long = classes > row_classes(value_bytes)
    table = not soft and (labels * classes > DIRECT_ENTRIES or long)
    table_bytes = labels * classes * compute_bytes
    ordered = table and table_bytes > ORDERED_TABLE_BYTES and rows > 2 * labels
    workspace = (table_bytes + 8 * labels if table else 0) + (rows * (8 + 2 * key_bytes(labels)) * 2 if ordered else 0)
    return LogitsGrad("long" if long else "rows", table, ordered, workspace)


@dataclass(frozen=True)
class Explanation:
    """What ``ldmi_fast.explain`` shows."""

    kernels: tuple[str, ...]
    regime: str
    workspace_bytes: int
    reason: str


def explain(rows: int, classes: int, soft: bool, value_bytes: int, block_rows: int) -> Explanation:
    """The whole loss of N x C logits."""
    factor_bytes = 2 * 8 * classes * classes  # S, which becomes V, and the solutions
    own = classes <= GAUSS_JORDAN_CLASSES
    factor = f"logdet_inverse ({'Gauss-Jordan' if own else 'library LU'})"
    if is_fused(rows, classes, soft, value_bytes):
        return Explanation(
            (f"fused (joint, {factor}, logits_grad)",),
            "small: one launch leaves the loss and its gradient",
            0,
            f"N * C <= {FUSED_ELEMENTS} and C <= {FUSED_CLASSES}: several launches would cost more than the work",
        )
    first, second = (
        joint(rows, classes, classes, soft, value_bytes, block_rows),
        logits_grad(rows, classes, classes, soft, value_bytes),
    )
    names = {"tile": "one-hot product", "label": "label order", "soft": "library product", "rows": "whole rows", "long": "long rows"}
    how = names[first.regime] if not (soft and first.regime == "tile") else "product in registers"
    back = "label order" if second.ordered else names[second.regime]
    if first.regime == "tile":
        regime = f"staged, {first.programs} programs of {first.rows} rows"
        reason = f"C <= {TILE_CLASSES}: S stays in the registers of each program"
    elif first.regime == "soft":
        regime = f"soft targets, {first.rows} rows at a time"
        reason = f"C > {TILE_CLASSES}: the joint is a matrix product of targets and predictions, left to the library, in fp64"
    else:
        regime = f"staged, {first.programs} programs of {first.rows} rows in the order of their labels"
        reason = f"C > {TILE_CLASSES}: rows are sorted by label, so that each program sums one row of S at a time in registers"
        if first.long:
            reason += f"; C > {row_classes(value_bytes)}: rows go block by block"
    workspace = max(first.workspace_bytes, second.workspace_bytes, 0 if own else factor_bytes)
    return Explanation((f"joint ({how})", factor, f"logits_grad ({back})"), regime, workspace, reason)
