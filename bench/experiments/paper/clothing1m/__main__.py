"""``python -m bench.experiments.paper.clothing1m train``: cross entropy, then L_DMI, at the scale of Clothing1M.

It runs on one machine or on many:

torchrun --nproc-per-node 8 -m bench.experiments.paper.clothing1m train --data FOLDER --weights resnet50.pth

``measure`` says what share of a step the loss takes, and whether loader or network bounds it. docs/clothing1m.md has the rest.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.experiments.paper.clothing1m.options import add_arguments, from_namespace
from bench.experiments.paper.clothing1m.sets import open_sets


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.experiments.paper.clothing1m", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    add_arguments(commands.add_parser("train", help="a run, or what is left of it"))
    measure = commands.add_parser("measure", help="what the parts of a step cost")
    add_arguments(measure)
    add = measure.add_argument
    add("--model-batch", type=int, default=0, help="images that the network is timed with; 0: the batch (its time is scaled)")
    add("--seconds", type=float, default=20.0, help="for each part")
    add("--json", type=Path, default=Path("clothing1m-cost.json"), help="the result; the table goes next to it, as .md")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    namespace = parse_arguments(arguments)
    options = from_namespace(namespace)
    try:
        if namespace.command == "measure":
            from bench.experiments.paper.clothing1m.measure import measure

            print(measure(options, namespace.model_batch, namespace.seconds, namespace.json))
        else:
            from bench.experiments.paper.clothing1m.train import train

            train(options, open_sets)
    except (ValueError, RuntimeError, OSError) as error:
        where = f" (rank {os.environ['RANK']})" if "RANK" in os.environ else ""
        print(f"error{where}: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
