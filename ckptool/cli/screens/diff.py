"""The lines that `ckptool diff` prints."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from ckptool.cli import render
from ckptool.errors import CkptoolError
from ckptool.ops.diff import DiffReport
from ckptool.reports import wording
from ckptool.text import plural

if TYPE_CHECKING:
    from ckptool.core.findings import PrefixDistance
    from ckptool.references.schema import SchemaReport

LABELS = {"devices": "device", "only-in-a": "only in A", "only-in-b": "only in B", "ties": "tied", "values": "differs"}
"""How a kind of difference is named in a line, if not by its own name."""


def lines(report: DiffReport | SchemaReport, top: int | None = None) -> list[str]:
    """Returns the headline, a line per difference (alike keys folded; of values the first ``top``), and the notes."""
    return [*render.headline(_headline(report), verdict=True), *_details(report, top)]


def table(
    a: str, found: Sequence[tuple[str, DiffReport | SchemaReport | CkptoolError]], top: int | None = None
) -> list[str]:
    """Returns a line for each (path, what came of it) that was compared with ``a``, then the details of each."""
    rows, details = [], []
    for path, one in found:
        if isinstance(one, CkptoolError):
            rows.append(["error", path, one.message])
            continue
        verdict, _, counts = _headline(one).partition(": ")
        rows.append([verdict, path, counts])
        if below := _details(one, top):
            details += ["", render.safe(path), *below]
    return [*render.headline(f"{plural(len(found), 'file')} compared with {a}"), *render.aligned(rows), *details]


def _headline(report: DiffReport | SchemaReport) -> str:
    return wording.headline(report) if isinstance(report, DiffReport) else wording.schema_headline(report)


def _details(report: DiffReport | SchemaReport, top: int | None) -> list[str]:
    if isinstance(report, DiffReport):
        rows, planned = _parted(wording.differences(report))
        values = [row for row in rows if row.kind in ("values", "close")]  # never folded: each has a distance
        lines = [*_folded(rows[: len(rows) - len(values)]), *map(_line, values[:top])]
        left = len(values[top:]) if top else 0
        of = "tensor" if report.prefixes is None else "prefix"
        notes = [["more", f"{plural(left, of)} with other or close values: leave out --top"]] if left else []
        notes += _unmoved(report.prefixes or ())
        first = report.counters.get("a", 0)
        sides = {"A": report.bookkeeping[:first], "B": report.bookkeeping[first:]}
        harmless, more = _parted(wording.harmless(report))
        for row in harmless:
            notes.append([cell for cell in _line(row) if cell])
            if row.kind == "bookkeeping" and not render.folds():
                keys = [key for key in sides[row.text[-1]] if key not in {one.key for one in more}]
                notes += [[row.kind, key, f"only in {row.text[-1]}"] for key in keys]
        allowed = [["allowed", *line] for line in _folded([*planned, *more])]
    else:
        lines = [*_folded([*wording.schema_failures(report)])]
        counters, sizes = len(report.bookkeeping), ", ".join(f"{name} = {size}" for name, size in report.sizes.items())
        allowed = []
        notes = [["bookkeeping", f"{counters} x num_batches_tracked"]] if counters else []
        notes += [["sizes", sizes]] if sizes else []
    notes += [["note", render.short(text)] for text in report.notes]
    notes += [judged] if isinstance(report, DiffReport) and (judged := wording.judged(report)) else []
    return [*render.aligned(lines), *render.aligned(allowed), *render.aligned(notes)]


def _unmoved(rows: Iterable[PrefixDistance]) -> list[list[str]]:
    """Returns how many prefixes have equal values, and those of which that is not known of all tensors."""
    equal = [row for row in rows if row.status == "equal"]
    unknown = [row for row in equal if row.unmeasured]
    counted = len(equal) - len(unknown)
    return [["equal", plural(counted, "prefix")]] * bool(counted) + [
        ["unmeasured", f"{row.prefix}: {row.unmeasured:,} of {plural(row.tensors, 'tensor')} without a distance"]
        for row in unknown
    ]


def _parted(rows: Iterable[wording.Difference]) -> tuple[list[wording.Difference], list[wording.Difference]]:
    """Returns (the differences that are not allowed, those that are, with the reason in the text)."""
    parts: tuple[list[wording.Difference], list[wording.Difference]] = [], []
    for row in rows:
        said = f"{row.text}  ({row.reason})".strip() if row.reason else row.text
        parts[row.reason is not None].append(row._replace(text=said))
    return parts


def _line(row: wording.Difference, count: int = 1) -> list[str]:
    return [LABELS.get(row.kind, row.kind), row.key, row.text + (f"  ({count} keys)" if count > 1 else "")]


def _folded(rows: Sequence[wording.Difference]) -> Iterable[list[str]]:
    for row, _, count in wording.folded([(row, None) for row in rows], render.fold):
        yield _line(row, count)
