"""The build backend: setuptools, plus torch among the build requirements when the environment has none whose headers could be used.

The compiled module needs torch's headers. An environment that has torch already lends them to the isolated build, so that no second
copy of several gigabytes is installed for it; only a bare environment pays for that.
"""

from __future__ import annotations

import os
import sysconfig
from pathlib import Path
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  the hooks that need no change


def installed_torch() -> Path | None:
    """The folder of the torch package of the environment that is being installed into, also from inside an isolated build."""
    for name in ("purelib", "platlib"):
        folder = Path(sysconfig.get_paths()[name]) / "torch"
        if (folder / "include" / "torch" / "csrc" / "stable" / "library.h").exists():
            return folder
    return None


def _requirements(found: list[str]) -> list[str]:
    pure = os.environ.get("LDMI_FAST_NATIVE", "1") == "0"
    return found if pure or installed_torch() is not None else [*found, "torch>=2.10"]


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    return _requirements(build_meta.get_requires_for_build_wheel(config_settings))


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    return _requirements(build_meta.get_requires_for_build_editable(config_settings))
