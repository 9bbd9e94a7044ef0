"""The progress bar, on stderr, where that is a terminal."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from ckptool.cli import render
from ckptool.cli.terminal import colours
from ckptool.ranks import world as ranks

PATIENCE = 1.0
"""Seconds before a bar is shown: most jobs are done by then."""


CHOICES = ("auto", "never")
wanted = "auto"
"""Whether there may be a bar: one of `CHOICES`."""


class Bar:
    """A bar of bytes with a phase, such as copy or verify. Called with the number of bytes just done.

    Every phase goes through the same ``total``: the bytes of the output, or of what is read. It is asked for when a
    bar is first shown.
    """

    def __init__(self, total: Callable[[], int], phase: str) -> None:
        self.ask = total
        self.total: int | None = None
        self.begun = time.monotonic()
        self.done: dict[str, int] = {}
        self.shown: Any = None
        self.due = 0
        self.begin(phase)

    def begin(self, phase: str, passes: int = 1) -> None:
        """Goes on with another phase, which reports every byte of the total ``passes`` times."""
        self.stop()
        self.phase, self.passes = phase, passes
        self.done.setdefault(phase, 0)
        if self.total is not None:
            self._show()

    def __call__(self, nbytes: int) -> None:
        done = self.done[self.phase] = self.done[self.phase] + nbytes
        if self.shown is not None and done >= self.due:  # an update by rich takes longer than a small tensor
            self._update()
        elif self.total is None and time.monotonic() - self.begun > PATIENCE:
            self.total = self.ask()
            self._show()

    def _show(self) -> None:
        self.shown = _started(self.phase, max(self.total or 0, 1))
        self._update()

    def _update(self) -> None:
        progress, task = self.shown
        done, total = self.done[self.phase], self.total or 0
        progress.update(task, completed=min(done // self.passes, total))
        self.due = done + total * self.passes // 1000

    def stop(self) -> None:
        """Takes the bar from the terminal."""
        if self.shown is not None:
            self._update()
            self.shown[0].stop()
            self.shown = None


@contextlib.contextmanager
def bar(total: Callable[[], int], phase: str) -> Iterator[Bar | None]:
    """Yields a `Bar`, which is gone after the block; None if stderr is not a terminal that can draw one."""
    if (
        render.quiet
        or ranks.is_other()
        or wanted == "never"
        or not sys.stderr.isatty()
        or os.environ.get("TERM") == "dumb"
    ):
        yield None
        return
    count = ranks.current.size if ranks.current is not None else 1
    made = Bar(lambda: total() // count, phase)
    try:
        yield made
    finally:
        made.stop()


def _started(phase: str, total: int) -> tuple[Any, Any]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True, no_color=not colours.shown_on(sys.stderr))
    drawn = BarColumn(max(min(console.width - 50, 40), 5))
    columns = (TextColumn("{task.description}"), drawn, DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    progress = Progress(*columns, console=console, transient=True, redirect_stdout=False, redirect_stderr=False)
    progress.start()
    return progress, progress.add_task(f"{phase:7}", total=total)
