"""How it is shown: the command line. One file per command; they speak to the library and to errors only."""

from __future__ import annotations

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
    from ckptool.cli import app, render

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


@contextmanager
def _terminable() -> Iterator[None]:
    """Turns SIGTERM into an exit that unwinds: a half-written output is removed. One that is ignored stays so."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _terminate(number: int, frame: object) -> NoReturn:
    raise SystemExit(128 + number)
