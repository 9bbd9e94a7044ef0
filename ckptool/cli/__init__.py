"""How it is shown: the command line. One file per command; they speak to the library and to errors only."""

from __future__ import annotations

import gc
import io
import os
import sys

import ckptool

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0 done, 1 a "no", 2 could not, 130 interrupted, 143 terminated."""
    args = list(sys.argv[1:] if argv is None else argv)
    if args == ["--version"]:  # the one thing that needs no parser
        print(f"ckptool {ckptool.__version__}")
        return 0
    # A command makes a few million objects and drops them when it ends: looking for cycles among them took a third
    # of the time at 100,000 keys, and a tenth at a few hundred. There are hardly any, so memory does not grow for it.
    gc.set_threshold(500_000, 20, 1000)
    try:
        from ckptool.cli import app, render, signals
    except KeyboardInterrupt:
        print("ckptool: interrupted", file=sys.stderr)
        return 130
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name the terminal's encoding lacks is escaped, no traceback
            stream.reconfigure(errors="backslashreplace")
    try:
        with signals.terminable():
            return app.run(args)
    except render.ClosedPipe:
        # What is left of our output must not be flushed into the closed pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    finally:
        if argv is None:  # the process ends here, and would look for cycles among all there is, twice
            gc.freeze()
