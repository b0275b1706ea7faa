"""Named launch configurations of the hot kernels, and the option to measure which is fastest.

By default each kernel takes the first configuration of its table: results are then bitwise the same from process to process and
from machine to machine, and no first call is slow. With ``LDMI_FAST_AUTOTUNE=1`` the first call of a regime measures its table on the
device (a few dozen milliseconds and the compilations) and remembers the fastest in ``$LDMI_FAST_CACHE``, else
``$XDG_CACHE_HOME/ldmi_fast``, else ``~/.cache/ldmi_fast``. A configuration decides in what order partial sums are added, so the last
bits of results then depend on what was measured; they stay the same as long as that folder does.

Nothing is measured while a CUDA graph is captured, while a graph is traced, or on a CPU.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..._version import __version__
from .plan import TILE_CLASSES, tile_width

VARIABLE = "LDMI_FAST_AUTOTUNE"
CACHE_VARIABLE = "LDMI_FAST_CACHE"
_FORMAT = 1


@dataclass(frozen=True)
class Config:
    """How many logits a tile holds, and in how many warps."""

    elements: int
    warps: int

    def rows(self, width: int) -> int:
        """Rows of a tile of padded width."""
        return max(1, self.elements // width)


#: Kernel and padded width -> its configurations by name, the default first.
TABLE: dict[str, dict[str, Config]] = {
    "joint-tile-16": {"32-rows": Config(512, 4), "64-rows": Config(1024, 8), "64-rows-4-warps": Config(1024, 4)},
    "joint-tile-32": {"32-rows": Config(1024, 4), "16-rows": Config(512, 2), "32-rows-8-warps": Config(1024, 8)},
    "joint-tile-64": {"16-rows": Config(1024, 8), "32-rows": Config(2048, 8), "16-rows-4-warps": Config(1024, 4)},
    "joint-label": {"2k": Config(2048, 8), "1k": Config(1024, 4), "4k": Config(4096, 8)},
    "grad-narrow": {"2k": Config(2048, 4), "1k": Config(1024, 4), "4k": Config(4096, 8)},
    "grad-soft": {"1k": Config(1024, 8), "2k": Config(2048, 8)},
    "grad-broad": {"2k": Config(2048, 4), "4k": Config(4096, 8), "1k": Config(1024, 2)},
}


def default(regime: str) -> Config:
    """The configuration that a regime takes when nothing was measured."""
    return next(iter(TABLE[regime].values()))


def tile_rows(classes: int) -> int:
    """Rows of a tile of ``joint`` by default."""
    width = min(tile_width(classes), TILE_CLASSES)
    return max(16, default(f"joint-tile-{width}").rows(width))


def enabled() -> bool:
    """Whether LDMI_FAST_AUTOTUNE asks for measurements.

    Raises:
        ValueError: it is neither 0 nor 1.
    """
    value = os.environ.get(VARIABLE, "") or "0"
    if value not in ("0", "1"):
        raise ValueError(f"the environment variable {VARIABLE} must be 0 or 1, got {value!r}")
    return value == "1"


def folder() -> Path:
    """Where measurements are remembered."""
    named = os.environ.get(CACHE_VARIABLE)
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ldmi_fast"


_remembered: dict[tuple[Path, str], str] = {}


def choose(regime: str, logits: Tensor, run: Callable[[Config], Any]) -> Config:
    """The configuration for a regime: the default, or with autotuning the one remembered or measured for this device.

    Args:
        regime: a key of TABLE.
        logits: [N, C]; their device, dtype and size (rounded to a power of two) are part of what is remembered.
        run: launches the kernel with a configuration.
    """
    if not enabled() or not logits.is_cuda:
        return default(regime)
    key = describe(regime, logits)
    where = (folder(), key)
    if where not in _remembered:
        name = load(regime, key)
        if name is None:
            if not _may_measure(logits):
                return default(regime)
            times = {name: measure(partial(run, config)) for name, config in TABLE[regime].items()}
            name = min(times, key=times.__getitem__)
            save(key, name, times)
        _remembered[where] = name
    return TABLE[regime][_remembered[where]]


def _may_measure(logits: Tensor) -> bool:
    from .launch import has_data  # not above: this module must load without triton

    return has_data(logits) and not torch.cuda.is_current_stream_capturing()


def measure(run: Callable[[], Any]) -> float:
    """Median milliseconds of a launch."""
    from triton.testing import do_bench

    return float(do_bench(run, warmup=5, rep=20, quantiles=[0.5]))


def describe(regime: str, logits: Tensor) -> str:
    """What a measurement is good for: this device, these versions, this kind of problem."""
    import triton

    rows, classes = logits.shape
    device = torch.cuda.get_device_properties(logits.device)
    return (
        f"format {_FORMAT}, ldmi_fast {__version__}, torch {torch.__version__}, triton {triton.__version__}, {device.name}, "
        f"{device.multi_processor_count} multiprocessors, {regime}, {logits.dtype}, C = {int(classes)}, "
        f"N <= {1 << max(int(rows) - 1, 0).bit_length()}"
    )


def path_of(key: str) -> Path:
    """One file a key, so that processes that tune different things do not write over each other."""
    return folder() / "triton" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"


def load(regime: str, key: str) -> str | None:
    """The name remembered on disk; None if there is none that can be used (it is then measured again)."""
    path = path_of(key)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        warnings.warn(f"cannot read the tuning result {path} ({error}); measuring again", stacklevel=2)
        return None
    if not isinstance(found, dict) or found.get("key") != key or found.get("config") not in TABLE[regime]:
        warnings.warn(f"the tuning result {path} is not of this version or is damaged; measuring again", stacklevel=2)
        return None
    return str(found["config"])


def save(key: str, name: str, times: dict[str, float]) -> None:
    """Remember a measurement: a temporary file renamed, so that a reader sees all of it or nothing."""
    path = path_of(key)
    text = json.dumps({"key": key, "config": name, "milliseconds": times}, indent=1)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".tuning-")
        try:
            with open(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        warnings.warn(f"cannot write the tuning result {path} ({error}); it lasts for this process only", stacklevel=2)
