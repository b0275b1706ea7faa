"""The decisions of a build, and when it makes them: without torch, with an old torch, twice in one tree, in place."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.packaging.test_install import run, tree

__all__ = ["tree"]  # the fixture

pytestmark = pytest.mark.slow

#: What the build backend itself imports.
TOOLS = ("setuptools", "pkg_resources", "_distutils_hack", "packaging", "wheel", "pybind11")

REQUIREMENTS = "import build_backend; print('REQUIRES', build_backend.get_requires_for_build_wheel())"


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """The Python of an environment with the build tools and without torch, like the one in which an isolated build starts."""
    folder = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    site = next((folder / "lib").glob("python*/site-packages"))
    for name in TOOLS:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin is not None:
            package = Path(spec.origin).parent
            for part in (package, *package.parent.glob(f"{name}-*.dist-info")):
                (site / part.name).symlink_to(part)
    return folder / "bin" / "python"


def pretend_torch(python: Path, version: str) -> None:
    """A torch of some version, as much of it as a build reads."""
    site = next((python.parents[1] / "lib").glob("python*/site-packages"))
    header = site / "torch" / "include" / "torch" / "csrc" / "stable" / "library.h"
    header.parent.mkdir(parents=True)
    header.touch()
    (site / "torch" / "__init__.py").touch()
    (site / "torch" / "version.py").write_text(f"__version__ = '{version}'\n")


@pytest.mark.parametrize("native", ["auto", "1"])
def test_torch_is_required_where_there_is_none(bare: Path, tree: Path, native: str) -> None:
    """The query for requirements is not a build: it refuses and announces nothing, because torch is not installed yet."""
    done = run(bare, "-c", REQUIREMENTS, cwd=tree, LDMI_FAST_NATIVE=native)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "REQUIRES ['torch>=2.10']" in done.stdout
    assert "WITHOUT compiled kernels" not in done.stdout + done.stderr


def test_a_pure_build_requires_nothing(bare: Path, tree: Path) -> None:
    done = run(bare, "-c", REQUIREMENTS, cwd=tree, LDMI_FAST_NATIVE="0")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "REQUIRES []" in done.stdout


@pytest.mark.parametrize(("native", "torch"), [("auto", "[]"), ("1", "['torch>=2.10']")])
def test_without_a_compiler_no_torch_is_fetched(bare: Path, tree: Path, tmp_path: Path, native: str, torch: str) -> None:
    """That would download gigabytes in vain. If the kernels are required, the build continues and reports what is missing."""
    done = run(bare, "-c", REQUIREMENTS, cwd=tree, PATH=str(tmp_path), LDMI_FAST_NATIVE=native)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"REQUIRES {torch}" in done.stdout


def test_missing_build_tools_are_named(bare: Path, tree: Path) -> None:
    """As with --no-build-isolation, where pip does not install them."""
    pretend_torch(bare, "2.14.1")
    for part in next((bare.parents[1] / "lib").glob("python*/site-packages")).glob("pybind11*"):
        part.unlink()
    compiler = shutil.which("c++") or shutil.which("g++")
    assert compiler is not None
    done = run(bare, "setup.py", "build_ext", cwd=tree, CXX=compiler, PATH="/nowhere")
    assert done.returncode != 0
    said = done.stderr.strip().splitlines()[-1]
    assert "the compiled kernels need cmake, ninja, pybind11 to be built" in said
    assert "--no-build-isolation" in said
    assert "LDMI_FAST_NATIVE=0" in said
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("native", ["auto", "1"])
def test_an_sdist_needs_no_torch(bare: Path, tree: Path, tmp_path: Path, native: str) -> None:
    command = f"import build_backend; build_backend.build_sdist({str(tmp_path / 'dist')!r})"
    done = run(bare, "-c", command, cwd=tree, LDMI_FAST_NATIVE=native)
    assert done.returncode == 0, done.stdout + done.stderr
    assert list((tmp_path / "dist").glob("ldmi_fast-*.tar.gz"))
    assert "WITHOUT compiled kernels" not in done.stdout + done.stderr


@pytest.mark.parametrize(("version", "enough"), [("2.9.1+cpu", False), ("2.10.0", True), ("2.14.1+cu130", True), ("3.0.0a0", True)])
def test_an_old_torch_counts_as_none(bare: Path, tree: Path, version: str, enough: bool) -> None:
    """The headers of torch before 2.10 lack declarations that the module needs: the build requires a newer torch."""
    pretend_torch(bare, version)
    done = run(bare, "-c", REQUIREMENTS, cwd=tree)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"REQUIRES {[] if enough else ['torch>=2.10']}" in done.stdout


def test_an_old_torch_is_named(bare: Path, tree: Path, tmp_path: Path) -> None:
    pretend_torch(bare, "2.9.1+cpu")
    command = f"import build_backend; build_backend.build_wheel({str(tmp_path / 'wheels')!r})"
    done = run(bare, "-c", command, cwd=tree, LDMI_FAST_NATIVE="1")
    assert done.returncode != 0
    assert "LDMI_FAST_NATIVE=1, but torch >= 2.10" in done.stderr


def test_a_second_build_with_another_ninja(tree: Path, tmp_path: Path) -> None:
    """Each isolated build installs its own ninja and removes it afterwards; CMake must not remember the path of the first one."""
    ninja = shutil.which("ninja", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if ninja is None:
        pytest.skip("ninja is not installed")
    for environment in ("first", "second"):
        place = tmp_path / environment
        place.mkdir()
        (place / "ninja").symlink_to(ninja)
        path = os.pathsep.join([str(place), str(Path(sys.executable).parent), os.environ["PATH"]])
        # without optimisation, which would take most of the time
        done = run(sys.executable, "setup.py", "build_ext", "--debug", cwd=tree, PATH=path, LDMI_FAST_NATIVE="1")
        assert done.returncode == 0, f"the {environment} build:\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
        shutil.rmtree(place)


def test_editable_install(tree: Path, tmp_path: Path) -> None:
    """The module is built into the tree, and the tree is what is imported."""
    (tree / "setup.cfg").write_text("[build_ext]\ndebug = 1\n")
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    python = venv / "bin" / "python"
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(python),
        "install",
        "--no-build-isolation",
        "--no-deps",
        "--no-index",
        "-e",
        ".",
    ]
    site = next((venv / "lib").glob("python*/site-packages"))
    torch = importlib.util.find_spec("torch")
    assert torch is not None
    assert torch.origin is not None
    (site / "of_the_tests.pth").write_text(str(Path(torch.origin).parents[1]) + "\n")
    done = run(*pip, cwd=tree, LDMI_FAST_NATIVE="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert list((tree / "ldmi_fast").glob("_C.*.so"))
    where = run(python, "-c", "import ldmi_fast; print(ldmi_fast.__file__)", cwd=tmp_path)
    assert where.stdout.strip() == str(tree / "ldmi_fast" / "__init__.py"), where.stderr
    report = run(python, "-m", "ldmi_fast", cwd=tmp_path)
    assert report.returncode == 0, report.stdout + report.stderr
    assert "engine cpu        runs" in report.stdout
