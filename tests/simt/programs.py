"""Builds the cases of the CUDA kernels for the CPU, with CMake and Ninja, and runs them."""

from __future__ import annotations

import os
from pathlib import Path

from tests.csrc.programs import execute, run, tool

FOLDER = Path(__file__).resolve().parent

__all__ = ["BUILDS", "FOLDER", "build", "cases", "execute", "run", "tool"]

#: Compiling is most of the time that the tests take. The shim itself is always optimised.
BUILDS = {
    "release": {"CMAKE_CXX_FLAGS": "-O1"},
    "sanitized": {"CMAKE_CXX_FLAGS": "-O0", "LDMI_SANITIZE": "address,undefined"},
}


def cases() -> list[str]:
    """The programs that there are: one for each .cu file here."""
    return sorted(path.stem for path in FOLDER.glob("*.cu"))


def build(folder: Path, definitions: dict[str, str], targets: list[str]) -> Path:
    """Configure in ``folder`` and build ``targets`` there; returns the folder, where the programs are."""
    cmake, ninja = tool("cmake"), tool("ninja")
    settings = {"CMAKE_MAKE_PROGRAM": ninja, "CMAKE_BUILD_TYPE": "None", **definitions}
    run([cmake, "-S", str(FOLDER), "-B", str(folder), "-G", "Ninja", *(f"-D{name}={value}" for name, value in settings.items())])
    run([cmake, "--build", str(folder), "-j", str(min(os.cpu_count() or 1, 4)), "--target", *targets])
    return folder
