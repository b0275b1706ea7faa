"""The build backend: setuptools, plus torch among the build requirements when the environment has none whose headers could be used.

The compiled module needs torch's headers. An environment that has torch already lends them to the isolated build, so that no second
copy of several gigabytes is installed for it; only a bare environment pays for that.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  the hooks that need no change


def torch_version(folder: Path) -> str:
    """The version of the torch package in ``folder``, without importing it; "0" if that is no torch."""
    file = folder / "version.py"
    found = re.search(r"__version__ = '(.+)'", file.read_text()) if file.exists() else None
    return found[1] if found else "0"


def torch_cuda_major(folder: Path) -> str:
    """The major version of the CUDA that the torch in ``folder`` is built with; empty for none."""
    found = re.search(r"^cuda\b.*= '(\d+)", (folder / "version.py").read_text(), re.M)
    return found[1] if found else ""


def installed_torch() -> Path | None:
    """The folder of a torch that is new enough: of this environment, or of the one that an isolated build is for."""
    spec = importlib.util.find_spec("torch")
    folders = [Path(spec.origin).parent] if spec is not None and spec.origin else []
    folders += [Path(sysconfig.get_paths()[name]) / "torch" for name in ("purelib", "platlib")]
    for folder in folders:
        numbers = tuple(int(number) for number in re.findall(r"\d+", torch_version(folder))[:2])
        if numbers >= (2, 10) and (folder / "include" / "torch" / "csrc" / "stable" / "library.h").exists():
            return folder
    return None


def cxx_compiler() -> str | None:
    named = os.environ.get("CXX", "").split()
    for name in [*named[:1], "c++", "g++", "clang++"]:
        if shutil.which(name):
            return name
    return None


PROBE = """
#if __cplusplus < 202002L
#error C++20
#endif
#include <Python.h>
typedef float V __attribute__((vector_size(16)));
V f(V a) { return __builtin_shufflevector(a, a, 1, 0, 3, 2); }
"""


def what_compiler_lacks(compiler: str) -> str:
    """Why the compiler cannot build the module; empty if a small program with what the kernels need compiles."""
    include = sysconfig.get_paths()["include"]
    command = [compiler, "-std=c++20", "-fsyntax-only", f"-I{include}", "-x", "c++", "-"]
    result = subprocess.run(command, input=PROBE, capture_output=True, text=True, check=False)
    if result.returncode == 0:
        return ""
    first = next((line for line in result.stderr.splitlines() if "error" in line), "it fails")
    return f"{compiler} cannot compile them (C++20 with vector extensions, so GCC 12 or clang, and Python's headers): {first}"


def why_not_compile() -> str:
    """Why this machine cannot compile the module, whatever torch there is; empty if it can."""
    if not sys.platform.startswith("linux"):
        return f"the compiled kernels are built on Linux only, and this is {sys.platform}"
    compiler = cxx_compiler()
    if compiler is None:
        return "no C++ compiler found (looked for $CXX, c++, g++, clang++)"
    return what_compiler_lacks(compiler)


def _requirements(found: list[str]) -> list[str]:
    choice = os.environ.get("LDMI_FAST_NATIVE", "auto")
    if choice == "0" or installed_torch() is not None or (choice == "auto" and why_not_compile()):
        return found
    return [*found, "torch>=2.10"]


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    return _requirements(build_meta.get_requires_for_build_wheel(config_settings))


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    return _requirements(build_meta.get_requires_for_build_editable(config_settings))
