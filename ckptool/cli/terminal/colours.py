"""Colour by meaning, on stdout and on stderr: a label that is coloured says the same without."""

from __future__ import annotations

import os
import sys
from typing import TextIO

from ckptool.errors import one_of

CHOICES = ("auto", "always", "never")

GOOD, CARE, BAD, NEWS, QUIET = "38;5;28", "38;5;130", "38;5;196", "38;5;30", "38;5;244"
"""Escape codes of xterm's palette. Unlike the first sixteen colours, which every theme has its own of, these are fixed:
each has a contrast of 3.9 or more (WCAG) with black and with white."""
STRONG = "1"

MEANING = {
    **dict.fromkeys(("loaded", "cast", "tied", "adapted", "equal", "allowed"), GOOD),
    **dict.fromkeys(
        ("same", "same but for bookkeeping", "differ as allowed", "check: nothing found"), f"{STRONG};{GOOD}"
    ),
    **dict.fromkeys(("missing", "unexpected", "only in A", "only in B", "dtype", "device", "close", "dropped"), CARE),
    **dict.fromkeys(("unused", "left out", "unlisted", "unchecked", "uncompared"), CARE),
    **dict.fromkeys(("mismatched", "shape", "values", "differs", "count", "forbidden", "metadata", "loadability"), BAD),
    **dict.fromkeys(("index", "offsets", "trailing", "crc", "data", "nan", "inf", "acting", "unknown", "failed"), BAD),
    **dict.fromkeys(("differ", "check", "error"), f"{STRONG};{BAD}"),
    **dict.fromkeys(("initialised", "note", "notes"), NEWS),
    **dict.fromkeys(("bookkeeping", "ignored", "ordinary"), QUIET),
    "hint": STRONG,
}
"""How a label is shown: the first cell of a line of a report, or the first words of a headline."""

_asked = "auto"


def ask(text: str, source: str = "--color") -> None:
    """Sets when colours are shown, from now on. Raises: UsageError for a word that is none of `CHOICES`."""
    global _asked
    _asked = one_of(CHOICES, text, source)


def asked_by(args: list[str]) -> str | None:
    """Returns what a command line says of colours, which errors in the command line itself are to heed; else None."""
    given = [*args[: args.index("--")]] if "--" in args else args
    found = None
    for number, arg in enumerate(given):
        name, equals, value = arg.partition("=")
        if name == "--color":
            value = value if equals else "".join(given[number + 1 : number + 2])
            found = value if value in CHOICES else found
    return found


def shown_on(stream: TextIO) -> bool:
    """Returns whether colours are shown on a stream.

    The order is that of Python itself: what was asked for, NO_COLOR, FORCE_COLOR, TERM=dumb, whether it is a terminal.
    """
    if _asked != "auto":
        return _asked == "always"
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR"):
        return True
    plain = os.name == "nt" and not {"WT_SESSION", "TERM"} & os.environ.keys()  # its old console knows no codes
    return os.environ.get("TERM") != "dumb" and not plain and stream.isatty()


def painted(text: str, style: str, stream: TextIO | None = None) -> str:
    """Returns text in a style, where colours are shown on the stream (stdout, if None)."""
    if not text or not style or not shown_on(stream or sys.stdout):
        return text
    return f"\x1b[{style}m{text}\x1b[0m"


def verdict(text: str, stream: TextIO | None = None) -> str:
    """Returns printable text with the label coloured that it begins with: all, or what is before its first colon."""
    label = text if text in MEANING else text.partition(":")[0]
    return painted(label, MEANING.get(label, ""), stream) + text[len(label) :]
