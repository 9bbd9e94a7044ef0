"""How it is shown: the command line. One file per command; they speak to the library and to errors only."""

from __future__ import annotations

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
    from ckptool.cli.app import run

    try:
        return run(args)
    except BrokenPipeError:
        # Whoever read our output has gone: what is left of it must not be flushed into the closed pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
