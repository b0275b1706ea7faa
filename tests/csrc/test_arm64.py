"""The portable kernels on arm64 (16-byte vectors, NEON): cross-compiled, linked statically, run under QEMU."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.csrc import programs

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64-static"

pytestmark = [
    pytest.mark.slow,
    *(
        pytest.mark.skipif(shutil.which(name) is None, reason=f"{name} is not installed (Debian package {package})")
        for name, package in [(COMPILER, "g++-aarch64-linux-gnu"), (EMULATOR, "qemu-user-static")]
    ),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    definitions = {
        "CMAKE_SYSTEM_NAME": "Linux",
        "CMAKE_SYSTEM_PROCESSOR": "aarch64",
        "CMAKE_CXX_COMPILER": COMPILER,
        "CMAKE_EXE_LINKER_FLAGS": "-static",
    }
    return programs.build(tmp_path_factory.mktemp("arm64"), definitions, ("fuzz", "logdet", "half", "simd_baseline"))


def emulate(program: Path, *arguments: str) -> str:
    return programs.run([EMULATOR, str(program), *arguments])


def test_fuzz(folder: Path) -> None:
    output = emulate(folder / "fuzz", "20190903", "150")
    assert output.startswith("baseline: 150 cases agree")
    seen = programs.counts(output)
    assert all(seen.values()), f"a regime was not reached: {seen}"


def test_logdet_inverse(folder: Path) -> None:
    assert emulate(folder / "logdet", "7", "150") == "baseline: 150 matrices agree\n"


def test_half(folder: Path) -> None:
    assert emulate(folder / "half") == "half: all patterns agree\n"


def test_simd(folder: Path) -> None:
    output = emulate(folder / "simd_baseline")
    assert output.count("baseline: exp of") == output.count("baseline: log of") == 2
