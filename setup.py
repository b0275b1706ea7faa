"""Builds ldmi_fast: Python sources, and the compiled module ldmi_fast._C through CMake and Ninja.

Environment variables:
    LDMI_FAST_NATIVE=0   pure Python, no compiler needed; =1 fail if the compiled module cannot be built.
                         Default: build it where a C++ compiler is found, and say so where none is.
    LDMI_FAST_CUDA=0     no CUDA kernels; =1 fail if they cannot be built. Default: build them where nvcc, a torch of the same major
                         CUDA version and an NVIDIA device are found (a machine without one would compile for minutes what it
                         cannot run).
    LDMI_FAST_CUDA_ARCHS architectures, such as "80 90a". Default: those of the devices here, or else 80 90a 100 120. PTX of the last
                         one goes along, for later devices.
    LDMI_FAST_SANITIZE   sanitizers for the kernels, such as address,undefined (for tests).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

sys.path.insert(0, str(Path(__file__).resolve().parent))
from build_backend import installed_torch, torch_cuda_major, torch_version, why_not_compile

ROOT = Path(__file__).resolve().parent
CHOSEN = "LDMI_FAST_NATIVE=0"


def say(message: str) -> None:
    """Print where a person sees it: pip hides what a build prints unless it fails or is asked with -v. (Where there is no terminal
    either, the name of the wheel says it, and the package at its first use.)"""
    text = f"ldmi_fast: {message}\n"
    try:
        with open("/dev/tty", "w") as terminal:
            terminal.write(text)
    except OSError:
        pass
    sys.stderr.write(text)


def version() -> str:
    text = (ROOT / "ldmi_fast" / "_version.py").read_text()
    return re.search(r'__version__ = "(.+)"', text)[1]


def why_pure() -> str:
    """Why no compiled module is built; empty if one is."""
    choice = os.environ.get("LDMI_FAST_NATIVE", "auto")
    if choice not in ("auto", "0", "1"):
        raise SystemExit(f"LDMI_FAST_NATIVE must be 0, 1 or auto, got {choice!r}")
    if choice == "0":
        return CHOSEN
    missing = why_not_compile()
    if not missing and installed_torch() is None:
        missing = "torch >= 2.10 is not installed, and its headers are needed"
    if missing and choice == "1":
        raise SystemExit(f"ldmi_fast: LDMI_FAST_NATIVE=1, but {missing}")
    return missing


def nvcc_major() -> str | None:
    """The major version of nvcc; None if there is none."""
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=f"{home}/bin" if home else None)
    if nvcc is None:
        return None
    found = re.search(r"release (\d+)\.", subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout)
    return found[1] if found else None


def device_archs() -> list[str]:
    """The architectures of the NVIDIA devices of this machine, as nvcc names them."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    found = re.findall(r"^(\d+)\.(\d+)$", subprocess.run(query, capture_output=True, text=True, check=False).stdout, re.M)
    archs = {f"{major}{minor}" + ("a" if major == "9" else "") for major, minor in found}
    return sorted(archs, key=lambda arch: int(arch.rstrip("a")))


def cuda_archs() -> list[str]:
    """What to build CUDA kernels for; nothing if none are built."""
    choice = os.environ.get("LDMI_FAST_CUDA", "auto")
    if choice not in ("auto", "0", "1"):
        raise SystemExit(f"LDMI_FAST_CUDA must be 0, 1 or auto, got {choice!r}")
    if choice == "0":
        return []
    wanted = os.environ.get("LDMI_FAST_CUDA_ARCHS", "").replace(",", " ").replace(";", " ").split()
    for arch in wanted:
        if not re.fullmatch(r"\d{2,3}a?", arch):
            raise SystemExit(f"LDMI_FAST_CUDA_ARCHS must name architectures such as 80 or 90a, got {arch!r}")
    here, nvcc, torch_cuda = device_archs(), nvcc_major(), torch_cuda_major(installed_torch())
    missing = ""
    if nvcc is None:
        missing = "nvcc is not on the PATH (nor in CUDA_HOME)"
    elif torch_cuda not in ("", nvcc):
        missing = f"nvcc is of CUDA {nvcc} and torch of CUDA {torch_cuda}"
    if missing and choice == "1":
        raise SystemExit(f"ldmi_fast: LDMI_FAST_CUDA=1, but {missing}")
    if not missing and choice == "auto":
        if torch_cuda == "":
            missing = "torch is built without CUDA"
        elif not here and not wanted:
            missing = "no NVIDIA device here; LDMI_FAST_CUDA=1 builds them all the same"
    if missing:
        say(f"building without CUDA kernels ({missing})")
        return []
    return wanted or here or ["80", "90a", "100", "120"]


def tool(name: str) -> str | None:
    """A program of the build requirements: on the PATH, or next to a Python whose environment is not activated."""
    return shutil.which(name) or shutil.which(name, path=sysconfig.get_path("scripts"))


class CMakeBuild(build_ext):
    """Configures and builds with CMake and Ninja, and puts the module where setuptools expects it."""

    def build_extension(self, ext: Extension) -> None:
        missing = [name for name in ("cmake", "ninja") if tool(name) is None]
        missing += [] if find_spec("pybind11") is not None else ["pybind11"]
        if missing:
            raise SystemExit(
                f"ldmi_fast: the compiled kernels need {', '.join(missing)} to be built, not found here. pip installs the build "
                "requirements unless it is called with --no-build-isolation; in that case install them before: pip install "
                "'setuptools>=77' 'cmake>=3.24' ninja 'pybind11>=2.12'. LDMI_FAST_NATIVE=0 builds pure Python, which needs setuptools "
                "alone"
            )
        torch = installed_torch()
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve() / "cmake"
        build.mkdir(parents=True, exist_ok=True)
        archs = cuda_archs()
        pybind11 = subprocess.check_output([sys.executable, "-m", "pybind11", "--cmakedir"], text=True).strip()
        subprocess.check_call(
            [
                tool("cmake"),
                "-S",
                str(ROOT),
                "-B",
                str(build),
                "-G",
                "Ninja",
                f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",  # not the one of an earlier isolated build
                f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
                f"-DPython_EXECUTABLE={sys.executable}",
                f"-Dpybind11_DIR={pybind11}",
                f"-DLDMI_TORCH_DIR={torch}",
                f"-DLDMI_TORCH_VERSION={torch_version(torch)}",
                f"-DLDMI_VERSION={version()}",
                f"-DLDMI_CUDA={'ON' if archs else 'OFF'}",
                *([f"-DLDMI_CUDA_ARCHS={';'.join(archs)}"] if archs else []),
                f"-DLDMI_SANITIZE={os.environ.get('LDMI_FAST_SANITIZE', '')}",
                f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={output.parent}",
            ]
        )
        output.parent.mkdir(parents=True, exist_ok=True)
        subprocess.check_call([tool("cmake"), "--build", str(build), "--target", "_C"])


class NotedBuild(build_py):
    """Writes down why there are no compiled kernels, for the warning and the report of the installed package."""

    def run(self) -> None:
        super().run()
        if reason and not self.editable_mode:
            (Path(self.build_lib) / "ldmi_fast" / "without_kernels.txt").write_text(f"{reason}\n")


class NamedWheel(bdist_wheel):
    """A wheel that had to do without compiled kernels says so in its name, as its build tag: pip shows the name of what it built, and
    nothing of what the build prints unless it is asked with -v."""

    def initialize_options(self) -> None:
        super().initialize_options()
        if reason and reason != CHOSEN:
            self.build_number = "0_without_compiled_kernels"


# Metadata and source distributions are made before torch, or on machines that build nothing: there is nothing to decide yet.
COMMANDS = {"build", "build_ext", "bdist", "bdist_wheel", "develop", "editable_wheel", "install"}
reason = why_pure() if COMMANDS & set(sys.argv[1:]) else ""
if reason:
    say(f"building WITHOUT compiled kernels ({reason}); the composite engine will run everything")
setup(
    version=version(),
    ext_modules=[] if reason else [Extension("ldmi_fast._C", [])],
    cmdclass={"build_ext": CMakeBuild, "build_py": NotedBuild, "bdist_wheel": NamedWheel},
)
