"""The data of a run."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.paper.clothing1m.options import Options

EXPECTED = """\
Expected is the folder of Clothing1M, which its authors give on request, in one of two layouts:
  annotations: annotations/noisy_train.txt, clean_val.txt, clean_test.txt with lines `images/0/00/name.jpg 13`
  key-lists:   noisy_train_key_list.txt, clean_val_key_list.txt, clean_test_key_list.txt with paths,
               noisy_label_kv.txt, clean_label_kv.txt with lines `path label`
and the images in images/ beside them."""


@dataclass(frozen=True)
class Sets:
    """Data sets: ``len``, ``[index] -> (image [3, H, W], label)`` and ``labels`` [N] int64.

    train: noisy labels, random transforms. valid, test: clean labels. plain: the training images without random transforms, for
    held-out noisy validation and calibration; None: there is nothing random in ``train``.
    """

    train: Any
    valid: Any
    test: Any
    plain: Any = None


def open_sets(options: Options) -> Sets:
    """The sets that the options name.

    Raises:
        ValueError: no folder, not that of a data set, or a ``--sets`` that cannot be called.
    """
    if options.sets:
        module, _, function = options.sets.partition(":")
        try:
            make = getattr(importlib.import_module(module), function)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(f"--sets {options.sets}: expected module:function, got {type(error).__name__}: {error}") from None
        return make(options)
    if not options.data:
        raise ValueError(f"--data is missing.\n{EXPECTED}")
    folder = Path(options.data)
    if not folder.is_dir():
        raise ValueError(f"--data {folder}: there is no such folder.\n{EXPECTED}")
    try:
        reader = importlib.import_module("bench.paper.data.clothing1m")
    except ImportError as error:
        raise ValueError(f"the reader of Clothing1M's lists cannot be imported ({error}); --sets takes another") from None
    return reader.open_sets(options)
