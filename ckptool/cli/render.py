"""Text on the terminal, and the one way to stdout and stderr.

Names from a file are data: `safe` escapes control characters, escape sequences and direction marks, and markup is
never interpreted.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

from ckptool.cli.terminal import colours, tables
from ckptool.errors import CkptoolError, explain
from ckptool.ranks import world as ranks
from ckptool.text import safe as safe

if TYPE_CHECKING:
    from ckptool.reports.outcome import Outcome

Line = Sequence[str]


WIDEST = 400
"""Longest cell that widens its column, in characters: one key of a megabyte must not pad all other lines."""


def aligned(lines: Iterable[Line], indent: int = 2, keys: bool = False, whole: bool = False) -> list[str]:
    """Returns lines of text with their columns aligned; the last column is not padded.

    The first column has labels, which are coloured by their meaning, or with ``keys`` names from a file. With ``whole``
    the last is to be copied, and stays one line.
    """
    rows = [line if "".join(line).isprintable() else [safe(cell) for cell in line] for line in lines]
    limit = tables.columns()
    if limit is None:
        count = max(map(len, rows), default=1) - 1
        widths = [_widest([row[column] for row in rows if column < len(row) - 1]) for column in range(count)]
        margin = " " * indent
        made = [(margin + "  ".join([*map(tables.padded, row[:-1], widths), row[-1]])).rstrip() for row in rows]
    else:
        made = tables.fitted(rows, indent, limit, whole)
    return made if keys or not colours.shown_on(sys.stdout) else [_labelled(line, indent) for line in made]


def _labelled(line: str, indent: int) -> str:
    label = line[indent:].partition("  ")[0]
    return line[:indent] + colours.painted(label, colours.MEANING.get(label, "")) + line[indent + len(label) :]


def headline(text: str, verdict: bool = False) -> list[str]:
    """Returns the lines of a sentence above a table; with ``verdict``, one that begins with a label."""
    limit = tables.columns()
    first, *more = [safe(text)] if limit is None else tables.wrapped(safe(text), limit - 4)
    return [colours.verdict(first) if verdict else first, *(f"    {line}" for line in more)]


def _widest(cells: list[str]) -> int:
    """Returns the width of a table's column."""
    places = map(len if "".join(cells).isascii() else tables.width, cells)
    return max((wide for wide, cell in zip(places, cells, strict=True) if len(cell) <= WIDEST), default=0)


class ClosedPipe(Exception):
    """The reader of stdout has closed it. Not an OSError: click would turn that into an exit code of its own."""


class Unwritable(Exception):
    """stdout cannot be written. No answer was given, so the exit code is not that of one."""


def abandon(stream: TextIO) -> None:
    """Sends what a stream still has to nowhere: Python flushes it at exit, and would fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def write(text: str) -> None:
    """Writes to stdout. Raises: ClosedPipe, Unwritable."""
    try:
        for start in range(0, len(text), 1 << 16):  # an unbuffered stdout may silently cut off a long write
            sys.stdout.write(text[start : start + (1 << 16)])
        sys.stdout.flush()
    except BrokenPipeError:
        raise ClosedPipe from None
    except OSError as error:
        raise Unwritable(f"stdout: cannot be written: {explain(error)}") from None


def show(lines: Iterable[str]) -> None:
    """Prints lines on stdout."""
    write("".join(f"{line}\n" for line in lines))


def outcomes(found: Sequence[Outcome], form: str) -> None:
    """Prints outcomes in a form of --format; as Markdown they go into the file of CKPTOOL_COMMENT besides, a new one.

    Raises: OutputError where that file cannot be written.
    """
    from ckptool.reports import rendered

    if path := os.environ.get("CKPTOOL_COMMENT"):
        from ckptool import saving

        saving.write_text(path, rendered(found, "markdown"), force=False)
    write(rendered(found, form))


ITEMS = 20
"""Most items of a list in a sentence that a terminal is shown."""


def short(text: str) -> str:
    """Returns a sentence; of one that lists over `ITEMS` things, a terminal is shown the first."""
    items = text.split(", ")
    if len(items) <= ITEMS or not folds():
        return text
    return f"{', '.join(items[:ITEMS])} and {len(items) - ITEMS:,} more (a pipe gets all)"


quiet = False
"""Whether a run says nothing but its result and errors (``--quiet``)."""


def folds(piped: bool = False) -> bool:
    """Returns whether alike keys are shown as one line: as CKPTOOL_FOLD says (0 or 1), else on a terminal.

    Elsewhere every key has a line of its own, so that grep finds it; ``piped``: not what is a sum of keys.
    """
    given = os.environ.get("CKPTOOL_FOLD")
    return given != "0" if given else piped or sys.stdout.isatty()


def fold(rows: Sequence[tuple[str, object]]) -> list[tuple[str, list[int]]]:
    """Returns (name, positions of the rows it stands for): alike keys as one, if `folds`, else every key."""
    if not folds():
        return [(key, [position]) for position, (key, _) in enumerate(rows)]
    from ckptool.core import keys

    return keys.fold(rows)


def note(text: str) -> None:
    """Prints a note or an error on stderr; when quiet, errors only. Where stderr fails, the exit code says it alone."""
    if (quiet or ranks.is_other()) and not text.startswith("error: "):
        return
    name = colours.painted("ckptool:", colours.QUIET, sys.stderr)
    try:
        print(f"{name} {colours.verdict(safe(text), sys.stderr)}", file=sys.stderr, flush=True)
    except OSError:
        abandon(sys.stderr)


def fail(error: CkptoolError) -> None:
    """Prints an error on stderr; among ranks that all have it, on rank 0."""
    said = str(error) if ranks.started is None else ranks.started.says(error)
    if said is not None:
        note(f"error: {said}")


class Failures:
    """The errors of single inputs of several: each is printed at once, and does not stop the others."""

    def __init__(self, inputs: int) -> None:
        self.several = inputs > 1
        self.errors: list[CkptoolError] = []

    @contextmanager
    def kept(self, later: bool = False) -> Iterator[None]:
        """Keeps an error raised in the block; of one input only, raises it, or with ``later`` lets `end` print it."""
        try:
            yield
        except CkptoolError as error:
            if not (self.several or later):
                raise
            self.errors.append(error)
            if self.several:
                fail(error)

    def end(self) -> int:
        """Returns 0, or the exit code of the first error; prints the error that was to be last."""
        if self.errors and not self.several:
            fail(self.errors[0])
        return self.errors[0].exit_code if self.errors else 0
