"""The progress bar, on stderr, where that is a terminal."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

PATIENCE = 1.0
"""Seconds before a bar is shown: most jobs are done by then."""


@contextlib.contextmanager
def bar(total: Callable[[], int]) -> Iterator[Callable[[int], None] | None]:
    """Yields a function that takes the number of bytes just done; None if stderr is not a terminal.

    ``total`` returns the expected bytes, and is called only when the bar is shown.
    """
    if not sys.stderr.isatty():
        yield None
        return
    shown: list[Any] = []
    begun = time.monotonic()
    done = due = step = 0

    def advance(nbytes: int) -> None:
        nonlocal done, due, step
        done += nbytes
        if not shown and time.monotonic() - begun > PATIENCE:
            expected = total()
            shown.extend(_started(expected, done))
            step = expected // 1000
            due = done + step
        elif shown and done >= due:  # an update by rich takes longer than a small tensor
            shown[0].update(shown[1], completed=done)
            due = done + step

    try:
        yield advance
    finally:
        if shown:
            shown[0].update(shown[1], completed=done)
            shown[0].stop()


def _started(total: int, done: int) -> tuple[Any, Any]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    progress = Progress(
        *columns, console=Console(stderr=True), transient=True, redirect_stdout=False, redirect_stderr=False
    )
    progress.start()
    return progress, progress.add_task("", total=total, completed=done)
