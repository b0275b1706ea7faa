"""The data of a run."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.experiments.paper.clothing1m.options import Options

EXPECTED = """\
Expected is the folder of Clothing1M, which its authors give on request, in one of two layouts:
  annotations: annotations/noisy_train.txt, clean_val.txt, clean_test.txt with lines `images/0/00/name.jpg 13`
  keys:        noisy_train_key_list.txt, clean_val_key_list.txt, clean_test_key_list.txt with paths,
               noisy_label_kv.txt, clean_label_kv.txt with lines `path label`
and the images in images/ next to them."""


@dataclass(frozen=True)
class Sets:
    """Data sets: ``len``, ``[index] -> (image [3, H, W], label)`` and ``labels`` [N] int64.

    train: noisy labels, random transforms. valid, test: clean labels. plain: the training images without random transforms, for
    held-out noisy validation and calibration; None: there is nothing random in ``train``. A label below 0 is that of an image that
    cannot be read: it counts nowhere. problems: lines of the lists that were left out, by reason.
    """

    train: Any
    valid: Any
    test: Any
    plain: Any = None
    problems: dict[str, int] = field(default_factory=dict)


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
    return _from_folder(folder, options)


def _from_folder(folder: Path, options: Options) -> Sets:
    try:
        from bench.experiments.paper.data.clothing1m import Images, eval_transform, read_lists, train_transform
    except ImportError as error:
        raise ValueError(f"reading images needs pip install .[paper] ({error}); --sets takes another source") from None
    lists = read_lists(folder)
    if options.layout not in ("auto", lists.layout):
        raise ValueError(f"--layout {options.layout}: {folder} has the lists of layout {lists.layout}")

    def images(split: str, transform: Any) -> Any:
        return Images(lists.folder, lists.splits[split], transform, cache=options.cache or None, cache_pixels=options.resize)

    plain = eval_transform(options.crop)
    return Sets(
        images("train", train_transform(options.crop, options.resize)),
        images("valid", plain),
        images("test", plain),
        images("train", plain),
        lists.problems,
    )
