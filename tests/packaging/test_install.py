"""The packages that a user installs: sdist, wheels with and without compiled kernels, in a clean environment."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PARTS = ["csrc", "ldmi_fast", "CMakeLists.txt", "LICENSE", "MANIFEST.in", "README.md", "CHANGELOG.md"]
PARTS += ["build_backend.py", "pyproject.toml", "setup.py"]

pytestmark = pytest.mark.slow


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The sources alone, without the files that an in-place build left there."""
    copy = tmp_path / "tree"
    copy.mkdir()
    for part in PARTS:
        source = ROOT / part
        if source.is_dir():
            shutil.copytree(source, copy / part, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            shutil.copy(source, copy / part)
    return copy


def run(*command: str | Path, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "CXX", "LDMI_FAST_NATIVE", "LDMI_FAST_ENGINE")}
    return subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment | variables, capture_output=True, text=True, check=False
    )


def wheel(tree: Path, where: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    pip = [sys.executable, "-m", "pip", "wheel", "-v", "--no-build-isolation", "--no-deps", "-w", str(where), "."]
    return run(*pip, cwd=tree, **variables)


def installed(wheel_file: Path, where: Path) -> Path:
    """A virtual environment with the wheel, which sees the torch of this one; its Python."""
    venv = where / "venv"
    assert run(sys.executable, "-m", "venv", "--without-pip", venv, cwd=where).returncode == 0
    site = next((venv / "lib").glob("python*/site-packages"))
    with zipfile.ZipFile(wheel_file) as archive:
        archive.extractall(site)
    # after the environment's own packages, those of this one; not its .pth files, which would bring the source tree
    (site / "torch_of_the_tests.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return venv / "bin" / "python"


def test_sdist_and_compiled_wheel(tree: Path, tmp_path: Path) -> None:
    built = run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", tmp_path / "dist", cwd=tree)
    assert built.returncode == 0, built.stdout + built.stderr
    (sdist,) = (tmp_path / "dist").glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (source,) = (tmp_path / "unpacked").iterdir()
    for part in ("csrc/cpu/joint.cpp", "csrc/cpu/simd.h", "csrc/torch/ops.cpp", "CMakeLists.txt", "build_backend.py", "LICENSE"):
        assert (source / part).is_file(), part
    assert (source / "csrc" / "simt" / "device.cuh").is_file()
    assert not (source / "csrc" / "simt" / "host").exists()  # the emulator is for tests
    made = wheel(source, tmp_path / "wheels", LDMI_FAST_NATIVE="1")
    assert made.returncode == 0, made.stdout + made.stderr
    (wheel_file,) = (tmp_path / "wheels").glob("*.whl")
    names = zipfile.ZipFile(wheel_file).namelist()
    assert [name for name in names if name.startswith("ldmi_fast/_C.") and name.endswith(".so")]
    assert "ldmi_fast/py.typed" in names
    assert {name.split("/")[0] for name in names} == {"ldmi_fast", wheel_file.name.split("-cp")[0] + ".dist-info"}
    report = run(installed(wheel_file, tmp_path), "-m", "ldmi_fast", cwd=tmp_path)
    assert report.returncode == 0, report.stdout + report.stderr
    assert "engine cpu        runs" in report.stdout


def test_pure_wheel(tree: Path, tmp_path: Path) -> None:
    made = wheel(tree, tmp_path / "wheels", LDMI_FAST_NATIVE="0")
    assert made.returncode == 0, made.stdout + made.stderr
    assert "WITHOUT compiled kernels (LDMI_FAST_NATIVE=0)" in made.stdout + made.stderr
    (wheel_file,) = (tmp_path / "wheels").glob("*.whl")
    assert wheel_file.name.endswith("0-py3-none-any.whl")
    report = run(installed(wheel_file, tmp_path), "-m", "ldmi_fast", cwd=tmp_path)
    assert report.returncode == 0, report.stdout + report.stderr
    assert "engine cpu        cannot run: this installation is pure Python (LDMI_FAST_NATIVE=0)" in report.stdout
    assert "engine composite  runs" in report.stdout


def test_without_a_compiler(tree: Path, tmp_path: Path) -> None:
    """A warning and a pure Python package; an error if the kernels were required."""
    empty = tmp_path / "bin"
    empty.mkdir()
    made = wheel(tree, tmp_path / "wheels", PATH=str(empty))
    assert made.returncode == 0, made.stdout + made.stderr
    assert "WITHOUT compiled kernels (no C++ compiler found" in made.stdout + made.stderr
    (wheel_file,) = (tmp_path / "wheels").glob("*.whl")
    assert wheel_file.name.endswith("-py3-none-any.whl")
    refused = wheel(tree, tmp_path / "none", PATH=str(empty), LDMI_FAST_NATIVE="1")
    assert refused.returncode != 0
    assert "LDMI_FAST_NATIVE=1, but no C++ compiler found" in refused.stdout + refused.stderr


def test_without_a_compiler_the_user_sees_it(tree: Path, tmp_path: Path) -> None:
    """Without a terminal, pip prints only the name of the wheel; then the first call warns, once."""
    empty = tmp_path / "bin"
    empty.mkdir()
    pip = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", str(tmp_path / "wheels"), "."]
    made = run(*pip, cwd=tree, PATH=str(empty))
    assert made.returncode == 0, made.stdout + made.stderr
    assert "0_without_compiled_kernels-py3-none-any.whl" in made.stdout
    (wheel_file,) = (tmp_path / "wheels").glob("*.whl")
    python = installed(wheel_file, tmp_path)
    report = run(python, "-m", "ldmi_fast", cwd=tmp_path)
    assert "pure Python (no C++ compiler found" in report.stdout
    step = "import torch, ldmi_fast\nfor _ in range(2): ldmi_fast.dmi_loss(torch.randn(8, 2), torch.arange(8) % 2)"
    report = run(python, "-c", step, cwd=tmp_path)
    assert report.stderr.count("UserWarning: ldmi_fast runs without compiled kernels") == 1, report.stderr
    assert "no C++ compiler found" in report.stderr
    silenced = run(python, "-c", step, cwd=tmp_path, LDMI_FAST_ENGINE="composite")
    assert "UserWarning" not in silenced.stderr


def test_a_compiler_that_is_too_old(tree: Path, tmp_path: Path) -> None:
    """A compiler that is too old is detected by a small program, before the build."""
    old = tmp_path / "bin" / "oldcc"
    old.parent.mkdir()
    old.write_text("#!/bin/sh\necho 'error: unknown builtin' >&2\nexit 1\n")
    old.chmod(0o755)
    made = wheel(tree, tmp_path / "wheels", CXX=str(old))
    assert made.returncode == 0, made.stdout + made.stderr
    assert "cannot compile them" in made.stdout + made.stderr
    assert "unknown builtin" in made.stdout + made.stderr
