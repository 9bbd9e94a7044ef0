"""A bar of bytes and rate on stderr, for jobs that take over a second on a terminal."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

PATIENCE = 1.0
"""Seconds before a bar is shown: most jobs are done by then, and a bar that flashes up is noise."""


@contextlib.contextmanager
def bar(total: Callable[[], int]) -> Iterator[Callable[[int], None] | None]:
    """Yields a function to be told of bytes as they are done; None where stderr is no terminal.

    ``total`` gives the bytes there will be, and is asked only when the bar is shown.
    """
    if not sys.stderr.isatty():
        yield None
        return
    shown: list[Any] = []
    begun = time.monotonic()
    done = 0

    def advance(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if not shown and time.monotonic() - begun > PATIENCE:
            shown.extend(_started(total(), done))
        elif shown:
            progress, task = shown
            progress.update(task, completed=done)

    try:
        yield advance
    finally:
        if shown:
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
