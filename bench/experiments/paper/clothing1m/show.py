"""What the terminal shows: on the first process a progress bar, on the others nothing."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Display:
    """A bar over all steps of the run, with lines above it.

    Args:
        total: steps. shown: whether this process shows anything.
    """

    def __init__(self, total: int, shown: bool) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        self._console = Console(quiet=not shown)
        # without a terminal lines are enough
        self._progress = Progress(*columns, console=self._console, disable=not shown or not self._console.is_terminal)
        self._task = self._progress.add_task("", total=total)

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._progress.stop()

    def at(self, step: int) -> None:
        """Show the number of steps that are done."""
        self._progress.update(self._task, completed=step)

    def note(self, text: str) -> None:
        """Show a text next to the bar."""
        self._progress.update(self._task, description=text)

    def line(self, text: str) -> None:
        """Print a line above the bar."""
        self._console.print(text, highlight=False, soft_wrap=True)

    @staticmethod
    def warn(text: str) -> None:
        """Print a warning to stderr."""
        print(f"warning: {text}", file=sys.stderr, flush=True)
