"""The table that `ckptool inspect` prints of several checkpoints: a line each."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from ckptool.cli import render
from ckptool.cli.screens.inspect import checked
from ckptool.cli.terminal import tables
from ckptool.core import keys
from ckptool.core.findings import Check
from ckptool.errors import CkptoolError
from ckptool.ops.inspect import InspectReport, TensorRow, once
from ckptool.text import count, plural, size


class Entry(NamedTuple):
    """A path as it was given; its report, None if it could not be read; the chosen rows; errors that it met."""

    path: str
    report: InspectReport | None
    rows: Sequence[TensorRow]
    errors: Sequence[CkptoolError]


HEADS = ["file", "format", "tensors", "params", "dtypes", "bytes", ""]


def lines(entries: Sequence[Entry], sort: str | None = None) -> list[str]:
    """Returns a line per checkpoint, below names of the columns; then the findings of each that has any.

    Tensors, parameters, dtypes and bytes are of the chosen rows, each tie group once but for the number of tensors. On
    a terminal the directory of all stands above the table. ``sort``: key (by path), numel or nbytes (largest first).
    """
    if sort:
        entries = sorted(entries, key=lambda entry: (-_measure(entry, sort), keys.natural(entry.path)))
    prefix = os.path.dirname(os.path.commonprefix([entry.path for entry in entries]))  # noqa: RUF071
    prefix = f"{prefix.rstrip('/')}/" if prefix and tables.columns() is not None else ""
    made = [render.safe(prefix)] if prefix else []
    made += render.aligned([HEADS, *(_cells(entry, prefix) for entry in entries)], indent=0, keys=True)
    for entry in entries:
        check = entry.report.check if entry.report else None
        if check and (check.findings or check.unchecked):
            made += ["", *render.headline(entry.path), *checked(check)]
    return made


def _measure(entry: Entry, sort: str) -> int:
    """Returns what entries are sorted by: parameters, bytes, or nothing but the path."""
    if sort == "numel":
        return sum(row.numel() for row in once(entry.rows) if not keys.is_counter(row.key))
    return sum(row.nbytes for row in once(entry.rows)) if sort == "nbytes" else 0


def _cells(entry: Entry, prefix: str) -> list[str]:
    path = entry.path[len(prefix) :]
    if entry.report is None:
        texts = [one.message if one.path in (None, entry.path) else str(one) for one in entry.errors]
        return [path, f"error: {'; '.join(texts)}"]
    slugs = [one.slug for one in entry.errors]
    verdict = [_verdict(entry.report.check)] if entry.report.check else [] if slugs else [*_notes(entry.report)]
    return [
        path, entry.report.format, f"{len(entry.rows):,}", count(_measure(entry, "numel")), _dtypes(entry.rows),
        size(_measure(entry, "nbytes")), ", ".join([*slugs, *verdict]),
    ]  # fmt: skip


def _dtypes(rows: Iterable[TensorRow]) -> str:
    """Returns the dtypes, that with the most bytes first; of more than two, how many others there are."""
    sizes: Counter[str] = Counter()
    for row in once(rows):
        sizes[row.dtype] += row.nbytes
    names = [name for name, _ in sizes.most_common()]
    return ", ".join(names if len(names) <= 2 else [names[0], f"{len(names) - 1} more"])


def _verdict(check: Check) -> str:
    """Returns what --check found: how much, of which kinds, and whether all of it passes."""
    if not check.findings:
        return "nothing found"
    kinds = ", ".join(dict.fromkeys(one.kind for one in check.findings))
    return f"{plural(len(check.findings), 'finding')}: {kinds}{'' if check.fails else ' (passes)'}"


def _notes(report: InspectReport) -> Iterable[str]:
    """Yields in a few words each what the notes of a file say, which the screen of the file alone has in full."""
    if not report.tensors:
        yield "no tensors"
    for number, noun in ((len(report.problems), "problem"), (len(report.notes), "note")):
        if number:
            yield plural(number, noun)
    for kind in ("acting", "unknown"):
        if number := list(report.kinds.values()).count(kind):
            yield f"{number:,} {kind}"
    if report.wrapper:
        yield f"wrapped: {report.wrapper}"
    if report.ema:
        yield "EMA"
    if report.other_roots:
        yield f"other weights: {', '.join(report.other_roots)}"
