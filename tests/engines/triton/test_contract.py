"""The contract suite on the Triton engine without a GPU: its kernels are interpreted, in a separate process.

Triton reads TRITON_INTERPRET when it is imported, so an engine is either interpreted or compiled for a whole process. The interpreter
runs about a thousandth as fast as one core, so this is the part of the suite that fits: every regime, every option, every edge case.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

ROOT = Path(__file__).resolve().parents[3]
HERE = Path(__file__).resolve().parent.relative_to(ROOT)

#: Which tests of other files run: the file, and an expression for pytest's -k.
CONTRACT = {
    "tests/test_functional.py": (
        "(shape and (empty-batch or one-sample or one-class or three-classes or 16-lanes or just-over-16 or a-warp-of-classes or"
        " just-over-64)) or (every_option and logits-dtype0) or (edge_cases and dtype0) or (every_float_dtype and hard)"
        " or (another_dtype and target_dtype1) or memory_layouts or expanded or negated or dimensions_of_size_zero"
        " or (extra_dimensions and soft and contiguous)"
    ),
    "tests/test_validation.py": "(labels_out_of_range_at_every_engine and small) or bad_weights or does_not_count or no_error",
    "tests/test_numerics.py": (
        "rare_class or denormals or confident or heavy_weights or upstream or (no_worse_than_eager and binary) or underflows"
        " or (ill_conditioned_joint and (binary or ten-classes) and not double) or (shifted_logits and plain and 14)"
    ),
    "tests/test_autograd.py": (
        "two_backwards or through_one_tensor or stride_zero or (gradgradcheck and hard) or (activation_checkpointing and stages)"
        " or accumulate or (difference_of_gradients and dtype0)"
    ),
    "tests/test_properties.py": (
        "(trace_identity and 14 and dtype0) or (theorem and 10 and dtype0) or scale_of_the_weights or repetitions"
    ),
    "tests/engines/test_logdet_accuracy.py": "cpu-2] or cpu-10] or cpu-17] or cpu-33] or cpu-64] or cpu-100] or cpu-171]",
    "tests/engines/test_presence.py": "triton",
    "tests/test_smoothing.py": (
        "(hard_labels and 64-5) or (is_the_definition and dtype2 and not eps) or one_sample or state_and_linear"
    ),
    "tests/test_sample_weight.py": "zero_has or other_forms or (is_the_definition and 80 and dtype0)",
    "tests/test_few_rows.py": "(is_the_definition and 20-60 and dtype0) or do_not_count",
    "tests/test_momentum.py": "leaves_the_data or no_gradient_can",
    "tests/test_average_state.py": "casts_are",
    "tests/test_linear.py": "may_hold_anything and nan and ignored",
    "tests/engines/test_guard.py": "never_refused or what_runs_here",
    "tests/test_joint_matrix.py": "joint_matrix_derivatives or joint_matrix_edge",
    "tests/test_explain.py": "test_plans",
    "tests/test_transforms.py": "(test_grad and hard) or (vmap_and_vmap_of_grad and hard)",
}


def run(*arguments: str) -> None:
    """pytest with the kernels interpreted; a failure shows its whole output."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment.pop("LDMI_FAST_ENGINE", None)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "tests.engines.triton.interpreter", "-p", "no:cacheprovider"]
    result = subprocess.run(
        [*command, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    assert result.returncode == 0, f"{' '.join(arguments)}\n{result.stdout[-6000:]}\n{result.stderr[-2000:]}"
    assert " passed" in result.stdout


@pytest.mark.parametrize("file", CONTRACT)
def test_contract(file: str) -> None:
    run(file, "-k", f"triton-cpu and ({CONTRACT[file]})")


def test_regimes() -> None:
    """The edges of every regime, against the composite definition."""
    run(str(HERE / "interpreted.py"))
