"""Tables and prose that fit the width of a terminal. Into a pipe, everything goes whole."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence

LEAST = 12
"""Columns below which no part of a table is made narrower: a terminal that is smaller breaks lines itself."""
COPIED = ("hint", "hash")
"""Labels of what is to be copied: it stays one line, which the terminal breaks."""
PROSE = ("note", "notes", "failed", "unused", "weights", "beside them", "metadata", "")
"""Labels of sentences, in which no word gives way: it may be an option's value, or a path."""


def columns() -> int | None:
    """Returns the columns of stdout: COLUMNS, or what the terminal says; None in a pipe, or if it says nothing."""
    if not sys.stdout.isatty():
        return None
    asked = os.environ.get("COLUMNS", "")
    if asked.isdecimal() and int(asked):
        return int(asked)
    try:
        return os.get_terminal_size(sys.stdout.fileno()).columns or None
    except (OSError, ValueError):
        return None


def draws() -> bool:
    """Returns whether stdout's encoding has block characters and an ellipsis."""
    return "utf" in (getattr(sys.stdout, "encoding", None) or "").lower()


def width(text: str) -> int:
    """Returns the columns that printable text takes on a terminal: two for most East Asian characters.

    >>> width("abc"), width("重み"), width("e\u0301")
    (3, 4, 1)
    """
    if text.isascii():
        return len(text)
    import unicodedata

    wide = sum(unicodedata.east_asian_width(char) in "WF" for char in text)
    return len(text) + wide - sum(unicodedata.category(char) in ("Mn", "Me") for char in text)


def padded(cell: str, places: int) -> str:
    """Returns a cell with spaces up to a width."""
    return cell.ljust(places if cell.isascii() else places + len(cell) - width(cell)) if len(cell) <= places else cell


def elided(text: str, room: int) -> str:
    """Returns text that has at most ``room`` columns: its middle gives way, whole segments of a key if possible.

    >>> elided("layers.0.attn.q_proj.weight", 22), elided("重み重み重み", 8)
    ('layers.….q_proj.weight', '重み…み')
    """
    if len(text) <= 4 * room and width(text) <= room:
        return text
    mark = "…" if draws() else ".."
    left = room - width(mark)
    parts = re.split(r"(?<!\.)\.(?!\.)", text)  # not the dots of {0..11}
    used = width(parts[0]) + width(parts[-1]) + 2
    if len(parts) < 3 or used > left:
        head = _cut(text, left - left // 2)
        return head + mark + _cut(text[::-1], left // 2)[::-1]
    first, last = 1, len(parts) - 1
    for tail in (True, False) * room:  # segments from both ends in turn, as long as one fits
        more = width(parts[last - 1 if tail else first]) + 1
        if last - first > 1 and used + more <= left:
            used, first, last = used + more, first + (not tail), last - tail
    rest = _cut(parts[last - 1][::-1], left - used)[::-1]
    return ".".join([*parts[:first], mark + rest, *parts[last:]])


def _cut(text: str, room: int) -> str:
    """Returns as much of the beginning of a text as has ``room`` columns."""
    end = 0
    for char in text[: 4 * room]:
        room -= width(char)
        if room < 0:
            break
        end += 1
    return text[:end]


def wrapped(text: str, room: int, whole: bool = True) -> list[str]:
    """Returns lines of at most ``room`` columns, broken at spaces; a longer word is elided, or stays if ``whole``."""
    lines = [""]
    for word in text.split(" "):
        joined = f"{lines[-1]} {word}" if lines[-1] else word
        if width(joined) <= room:
            lines[-1] = joined
            continue
        if lines[-1].strip():
            lines.append("")
        lines[-1] = word if whole else elided(word, room)
    return [line.rstrip() for line in lines]


def fitted(rows: Sequence[Sequence[str]], indent: int, limit: int, whole: bool = False) -> list[str]:
    """Returns the lines of a table of ``limit`` columns at most: its widest cells elided, its last wrapped or whole."""
    count = max(map(len, rows), default=1) - 1
    shown = [[cell[: limit + 1] for cell in row] for row in rows]  # a key may have a million characters
    widths = [max((width(row[at]) for row in shown if at < len(row) - 1), default=0) for at in range(count)]
    longest = max((width(row[-1]) for row in shown if len(row) == count + 1), default=0)
    excess = indent + sum(widths) + 2 * count + min(longest, max(LEAST, limit * 2 // 5)) - limit
    while excess > 0 and max(widths, default=0) > LEAST:
        widths[widths.index(max(widths))] -= 1
        excess -= 1
    lines = []
    for row in rows:
        cells = [padded(elided(cell, wide), wide) for cell, wide in zip(row[:-1], widths, strict=False)]
        before = " " * indent + "  ".join([*cells, ""])
        room = max(limit - width(before), 2 * LEAST)
        first, *more = [row[-1]] if whole or row[0] in COPIED else wrapped(row[-1], room, row[0] in PROSE)
        margin = " " * (width(before) if limit - width(before) >= room else indent + 2)
        lines += [(before + first).rstrip(), *(margin + line for line in more)]
    return lines
