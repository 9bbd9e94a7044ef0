"""The command line: one file per command. Commands call the library and print its reports."""

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
    """Runs one command; returns the exit code: 0 done, 1 found something, 2 failed, 130 interrupted, 143 terminated."""
    args = list(sys.argv[1:] if argv is None else argv)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started this: what is said is not wanted
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    if args == ["--version"]:  # the only command line that needs no parser
        try:
            print(f"ckptool {ckptool.__version__}", flush=True)
            return 0
        except OSError:
            pass  # said below, as of every command
    # A command creates up to a few million objects with hardly any reference cycles. Searching them for cycles took
    # a third of the time at 100,000 keys and a tenth at a few hundred; searching rarely does not cost memory.
    gc.set_threshold(500_000, 20, 1000)
    try:
        from ckptool.cli import app, render
    except KeyboardInterrupt:
        print("ckptool: interrupted", file=sys.stderr)
        return 130
    if "_CKPTOOL_COMPLETE" in os.environ:  # a shell wants a word completed
        from ckptool.cli.terminal import completion

        completion.answer(app.app, list(app.COMMANDS))
        return 0
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # escape characters that the encoding lacks: no traceback
            stream.reconfigure(errors="backslashreplace")
    try:
        with app.terminable():
            return app.run(args)
    except render.ClosedPipe:
        render.abandon(sys.stdout)
        return 141
    except render.Unwritable as error:
        render.abandon(sys.stdout)
        render.note(f"error: {error}")
        return 2
    finally:
        if argv is None:  # the process ends now: skip the two full collections of the interpreter's exit
            gc.freeze()
