"""How it is shown: the command line. One file per command; they speak to the library and to errors only."""

from __future__ import annotations

import gc
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

import ckptool


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0 done, 1 a "no", 2 could not, 130 interrupted, 143 terminated."""
    args = list(sys.argv[1:] if argv is None else argv)
    if args == ["--version"]:  # the one thing that needs no parser
        print(f"ckptool {ckptool.__version__}")
        return 0
    try:
        from ckptool.cli import app, render
    except KeyboardInterrupt:
        print("ckptool: interrupted", file=sys.stderr)
        return 130
    # A command makes a few million objects and drops them when it ends: looking for cycles among them took a third
    # of the time at 100,000 keys. There are hardly any, so memory does not grow for it.
    gc.set_threshold(500_000, 20, 1000)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name the terminal's encoding lacks is escaped, no traceback
            stream.reconfigure(errors="backslashreplace")
    try:
        with _terminable():
            return app.run(args)
    except render.ClosedPipe:
        # What is left of our output must not be flushed into the closed pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


ENDS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
"""What ends a process that does not mind it: a scheduler's word, a terminal that is closed."""


@contextmanager
def _terminable() -> Iterator[None]:
    """Turns SIGTERM and SIGHUP into an exit that unwinds: a half-written output is removed. Ignored ones stay so."""
    found = []
    if threading.current_thread() is threading.main_thread():
        found = [number for number in ENDS if signal.getsignal(number) == signal.SIG_DFL]
    for number in found:
        signal.signal(number, _terminate)
    try:
        yield
    finally:
        for number in found:
            signal.signal(number, signal.SIG_DFL)


def _terminate(number: int, frame: object) -> NoReturn:
    raise SystemExit(128 + number)
