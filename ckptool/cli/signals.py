"""SIGTERM and SIGHUP raise SystemExit, so that a half-written output is removed."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

ENDS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
"""Signals that end a process by default: from a scheduler, or from a terminal that is closed."""


@contextmanager
def terminable() -> Iterator[None]:
    """Makes SIGTERM and SIGHUP raise SystemExit inside the block. Signals that are ignored or handled stay so."""
    changed = [number for number in ENDS if signal.getsignal(number) == signal.SIG_DFL]
    try:
        for number in changed:
            signal.signal(number, _terminate)
    except ValueError:  # only the main thread may set handlers: elsewhere the caller handles signals
        changed = []
    try:
        yield
    finally:
        for number in changed:
            signal.signal(number, signal.SIG_DFL)


def _terminate(number: int, frame: object) -> NoReturn:
    raise SystemExit(128 + number)
