"""The CUDA kernels as nvcc makes them for every architecture of a release: no warning, no spill, wide accesses; and the module loads.

Needs nvcc and minutes, no GPU.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.packaging.test_install import PARTS, ROOT, run

ARCHS = ("80", "90a", "100", "120")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed"),
    pytest.mark.skipif(
        "CI" not in os.environ and os.environ.get("LDMI_TEST_NVCC") != "1",
        reason="nvcc takes minutes; LDMI_TEST_NVCC=1 runs it",
    ),
]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tree with the module built in place for all architectures."""
    tree = tmp_path_factory.mktemp("cuda") / "tree"
    tree.mkdir()
    for part in PARTS:
        copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
        copy(ROOT / part, tree / part)
    for old in (tree / "ldmi_fast").glob("_C*.so"):
        old.unlink()
    variables = {"LDMI_FAST_CUDA": "1", "LDMI_FAST_CUDA_ARCHS": " ".join(ARCHS), "LDMI_FAST_NATIVE": "1"}
    done = run(sys.executable, "setup.py", "build_ext", "--inplace", cwd=tree, **variables)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    return tree


@pytest.fixture(scope="module")
def module(built: Path) -> Path:
    return next((built / "ldmi_fast").glob("_C*.so"))


def cuobjdump(module: Path, *arguments: str) -> str:
    """The output of cuobjdump (triton's package contains one) for the module."""
    spec = importlib.util.find_spec("triton")
    near = Path(spec.origin).parent / "backends" / "nvidia" / "bin" if spec is not None and spec.origin else Path()
    tool = shutil.which("cuobjdump", path=os.pathsep.join([str(near), os.environ["PATH"]]))
    if tool is None:
        pytest.skip("cuobjdump is not installed")
    return subprocess.run([tool, *arguments, str(module)], capture_output=True, text=True, check=True).stdout


def test_it_loads_and_says_what_it_is(built: Path) -> None:
    """Also on a machine without a GPU. A torch with CUDA provides the streams; one without CUDA is detected."""
    code = "import ldmi_fast.ops as o; print(o.compiled.build_info()['cuda_archs'], '|', o.compiled.cuda_torch(), '|', o.__file__)"
    done = run(sys.executable, "-c", code, cwd=built)
    assert done.returncode == 0, done.stderr
    archs, cuda, file = (word.strip() for word in done.stdout.split("|"))
    assert archs.split() == list(ARCHS)
    assert cuda == str(torch.version.cuda is not None)
    assert Path(file).is_relative_to(built)
    report = run(sys.executable, "-m", "ldmi_fast", cwd=built)
    assert report.returncode == 0, report.stdout + report.stderr
    assert "engine cpu        runs" in report.stdout


def test_no_kernel_spills(module: Path) -> None:
    """Neither stack nor local memory, in any kernel for any architecture."""
    report = cuobjdump(module, "-res-usage")
    kernels = re.findall(r"Function (\S+?):\s*\n\s*(REG:\d+.*)", report)
    assert len(kernels) >= 4 * 100, "the report does not list all kernels"
    bad = [f"{name}: {usage}" for name, usage in kernels if "STACK:0 " not in usage or "LOCAL:0 " not in usage]
    assert not bad, "\n".join(bad)


@pytest.mark.parametrize("kernel", ["joint_onehot_tf32", "joint_by_label", "loss_cooperative_tf32", "grad_tile", "grad_by_row"])
def test_streaming_loops_move_16_bytes(module: Path, kernel: str) -> None:
    """In the machine code for sm_90a of the fp32 kernels: logits are read, and gradients written, 16 bytes at a time."""
    code = cuobjdump(module, "-sass", "-arch", "sm_90a")
    functions = re.split(r"\n\s*Function : ", code)[1:]
    ours = [text for text in functions if re.match(rf"\S*{len(kernel)}{kernel}If", text)]
    assert ours, f"no {kernel} for fp32 among " + ", ".join(sorted({text.split(chr(10))[0][:60] for text in functions})[:40])
    assert any(re.search(r"(LDG\.E\.[A-Z.]*128|LDGSTS\.E\.[A-Z.]*128)", text) for text in ours), "no 16-byte read"
    if kernel.startswith("grad"):
        assert any(re.search(r"STG\.E\.[A-Z.]*128", text) for text in ours), "no 16-byte write"
