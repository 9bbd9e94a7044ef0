"""A process that is told to end unwinds, so that a half-written output is removed."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

ENDS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
"""What ends a process that does not mind it: a scheduler's word, a terminal that is closed."""


@contextmanager
def terminable() -> Iterator[None]:
    """Turns SIGTERM and SIGHUP into an exit that unwinds: a half-written output is removed. Ignored ones stay so."""
    found = [number for number in ENDS if signal.getsignal(number) == signal.SIG_DFL]
    try:
        for number in found:
            signal.signal(number, _terminate)
    except ValueError:  # only the main thread may: another's signals are its caller's business
        found = []
    try:
        yield
    finally:
        for number in found:
            signal.signal(number, signal.SIG_DFL)


def _terminate(number: int, frame: object) -> NoReturn:
    raise SystemExit(128 + number)
