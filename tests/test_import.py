"""Importing the package: which torch it needs, and what it reports about torch and compiled kernels."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import ldmi_fast
from ldmi_fast import ops

ROOT = Path(ldmi_fast.__file__).parents[1]


def last_line_of_import(torch_package: Path | None) -> str:
    """The error of ``import ldmi_fast`` in a Python that sees this torch package, or none."""
    path = os.pathsep.join([*([str(torch_package)] if torch_package is not None else []), str(ROOT)])
    # -S: without the packages of this environment
    done = subprocess.run(
        [sys.executable, "-S", "-c", "import ldmi_fast"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": path},
        cwd="/",
    )
    assert done.returncode == 1
    return done.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize("version", ["2.4.1", "2.9.1+cpu", "1.13.0a0+git", "2.9.0.dev20251001"])
def test_an_old_torch_is_named(tmp_path: Path, version: str) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(f"__version__ = {version!r}\n")
    said = last_line_of_import(tmp_path)
    assert said.startswith("ImportError: ldmi_fast needs torch >= 2.10")
    assert f"found {version}" in said


def test_a_folder_of_the_name_torch_is_named(tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    assert "ldmi_fast needs torch >= 2.10, found none" in last_line_of_import(tmp_path)


def test_a_missing_torch_is_named() -> None:
    said = last_line_of_import(None)
    assert said.startswith("ModuleNotFoundError: ldmi_fast needs torch >= 2.10, and this Python has no torch: pip install")


def test_a_broken_torch_is_not_called_missing(tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("import a_module_that_is_not_there\n")
    assert "No module named 'a_module_that_is_not_there'" in last_line_of_import(tmp_path)


@pytest.fixture
def pure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "compiled", None)
    monkeypatch.setattr(ops, "why_not_compiled", "this installation is pure Python (no C++ compiler found)")
    monkeypatch.setattr(ops, "_told", False)


def test_missing_kernels_are_reported_once(pure: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    with pytest.warns(UserWarning, match=r"without compiled kernels, 10 to 20 times slower.*no C\+\+ compiler found") as caught:
        ops.warn_if_slow()
    (warning,) = caught
    for part in ("GCC 12 or clang", "pip install --force-reinstall", "LDMI_FAST_ENGINE=composite", 'engine="composite"'):
        assert part in str(warning.message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ops.warn_if_slow()


def test_where_no_kernels_can_exist_no_reinstall_is_suggested(pure: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.warns(UserWarning, match="There are kernels for Linux only") as caught:
        ops.warn_if_slow()
    assert "reinstall" not in str(caught[0].message)


def test_with_kernels_nothing_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "compiled", object())
    monkeypatch.setattr(ops, "_told", False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ops.warn_if_slow()


def test_a_graph_reports_nothing(pure: None) -> None:
    """A warning would break it."""

    @torch.compile(backend="eager", fullgraph=True)
    def step(x: torch.Tensor) -> torch.Tensor:
        ops.warn_if_slow()
        return x + 1

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(torch.zeros(2))
    assert not ops._told
