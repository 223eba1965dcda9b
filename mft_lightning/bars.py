"""A bar for work before a run, on standard error, so that what a command prints stays whole."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from mft_lightning.screen import duration

PLAIN_EVERY = 30  # seconds between lines where there is no terminal
_PATIENCE = 1  # seconds before there is anything to say of the time left


class WorkBar:
    """How far a piece of work is, how fast it goes, and the time it has left.

    On a terminal a bar that goes when it is done; elsewhere a line every half minute.

    Args:
        label: what is being done.
        total: bytes to work through.
        noun: what is counted, in the plural.
    """

    def __init__(self, label: str, total: int, noun: str) -> None:
        self.label, self.total, self.noun = label, total, noun
        self.count = 0
        self._start = self._told = time.perf_counter()
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(24),
            TextColumn("{task.percentage:3.0f}%  {task.fields[said]}"),
            console=Console(stderr=True, markup=False, highlight=False, emoji=False),
            transient=True,
            disable=not sys.stderr.isatty(),
        )
        self._task = self._progress.add_task(label, total=max(1, total), said="")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()

    def reach(self, done: int, more: int) -> None:
        """Tell that ``done`` bytes of all are worked through, and that ``more`` came of the last of them."""
        self.count += more
        now = time.perf_counter()
        said = self._said(done, now - self._start)
        self._progress.update(self._task, completed=done, said=said)
        if self._progress.disable and now - self._told > PLAIN_EVERY:
            self._told = now
            print(f"{self.label}: {done / max(1, self.total):.0%}  {said}", file=sys.stderr, flush=True)

    def _said(self, done: int, seconds: float) -> str:
        said = f"{self.count:,} {self.noun}"
        if seconds > _PATIENCE and done:
            left = seconds * (self.total - done) / done
            said += f"  {self.count / seconds:,.0f}/s  {duration(max(0.0, left))} left"
        return said
