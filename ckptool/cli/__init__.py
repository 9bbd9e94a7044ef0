"""How it is shown: the command line. One file per command; they speak to the library and to errors only."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence

import ckptool


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0 done, 1 an answer of "no", 2 could not, 130 interrupted."""
    args = list(sys.argv[1:] if argv is None else argv)
    if args == ["--version"]:  # the one thing that needs no parser
        print(f"ckptool {ckptool.__version__}")
        return 0
    from ckptool.cli import app, render

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name the terminal's encoding lacks is escaped, no traceback
            stream.reconfigure(errors="backslashreplace")
    try:
        return app.run(args)
    except render.ClosedPipe:
        # What is left of our output must not be flushed into the closed pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
