"""What `filter` and `load-partial` share: the conditions for writing, and the lines that show a report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ckptool.cli import render
from ckptool.core import keys
from ckptool.errors import UsageError
from ckptool.ops.notes import changed_lines
from ckptool.ops.rows import LOADED, FilterReport, Row
from ckptool.text import dims, percent, plural

if TYPE_CHECKING:
    from ckptool.partial.plan import LoadPartialReport


def fraction(text: str | None) -> float | None:
    """Returns the share that ``90%`` or ``0.9`` means. Raises: UsageError."""
    if text is None:
        return None
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise UsageError(f"--min-loaded takes a share such as 90% or 0.9, not {text!r}")
    return value


def failed(
    report: FilterReport | LoadPartialReport, least: float | None, require: Sequence[str], strict: bool
) -> list[str]:
    """Returns the conditions that do not hold, a line each; nothing is written if there are any."""
    found = []
    if report.target and report.sources and not report.loaded:
        found.append("no key of the source fits")
    if least is not None and report.loaded_fraction < least:
        share, wanted = percent(report.loaded_fraction), percent(least)
        found.append(f"{share} of the parameters loaded, --min-loaded wants {wanted}")
    rows: dict[str, Row] = {}
    for row in report.rows:  # rows of the target come first and take precedence
        if row.reason != "unexpected":
            rows.setdefault(row.key, row)
    for pattern in require:
        fitting = [key for key in rows if keys.fits(pattern, key)]
        lacking = [key for key in fitting if rows[key].reason not in LOADED]
        if not fitting:
            found.append(f"--require {pattern} fits no key of the target{keys.near_pattern(pattern, rows)}")
        elif lacking:
            found.append(f"--require {pattern}: not loaded: {', '.join(lacking[:8])}" + (" ..." * (len(lacking) > 8)))
    if strict:
        bad = [f"{report.counts[reason]} {reason}" for reason in ("missing", "unexpected", "mismatched")
               if report.counts.get(reason)]  # fmt: skip
        packed = sum(row.reason == "ignored" and bool(row.tensors) for row in report.rows)
        if packed:
            bad.append(f"{packed} objects that hold tensors")
        if bad:
            found.append(f"--strict: {', '.join(bad)}")
    return found


def head(report: FilterReport | LoadPartialReport, summary: str, all_rows: bool) -> list[str]:
    """Returns the first lines of a report: its summary, its rows, its hint."""
    hint = [["hint", report.hint]] if report.hint else []
    return [*render.headline(summary), *render.aligned(_rows(report, all_rows)), *render.aligned(hint)]


def tail(report: FilterReport | LoadPartialReport, failed: list[str]) -> list[str]:
    """Returns the last lines of a report: values that casts changed, notes, conditions that failed."""
    sections = (
        changed_lines(report),
        [["note", text] for text in report.notes],
        [["failed", text] for text in failed],
    )
    return [line for section in sections for line in render.aligned(section)]


EXAMPLES = 3
"""How many lines of each reason are shown where nothing fits: all of both sides would be shown."""


def _rows(report: FilterReport | LoadPartialReport, all_rows: bool) -> list[list[str]]:
    """Returns lines for the rows that are shown: repeated blocks folded, counters counted."""
    shown = []
    for row in report.rows:
        lost = row.tensors or (row.detail or "").endswith(": not chosen")  # an object, which no count covers
        if row.reason in ("loaded", "ignored") and not all_rows and not lost:
            continue
        shown.append((row.reason, row.key, _text(row)))
    lines: list[list[str]] = []
    every = all_rows or not render.folds()
    plain = [row for row in shown if every or row[0] != "bookkeeping"]
    few = bool(report.target and report.sources and not report.loaded and not every)
    count: Counter[str] = Counter()
    more: Counter[str] = Counter()
    for name, members in render.fold([(key, (reason, text)) for reason, key, text in plain]):
        reason, _, text = plain[members[0]]
        count[reason] += 1
        if few and count[reason] > EXAMPLES:
            more[reason] += len(members)
            continue
        lines.append([reason, name, text + (f"  ({len(members)} keys)" if len(members) > 1 else "")])
    lines += [[reason, f"and {plural(number, 'more key')}", "--all shows them"] for reason, number in more.items()]
    if not all_rows:
        sides = Counter(row.detail for row in report.rows if row.reason == "bookkeeping")
        stay = f": the values of {report.target} stay"
        for side, number in sides.items():
            text = f"{side}{stay if side == 'absent in the source' else ''}" if side else f"kept from {report.target}"
            lines.append(["bookkeeping", f"{number} x num_batches_tracked", text])
    return lines


def _text(row: Row) -> str:
    if row.shape is None and row.dtype is None:
        theirs = f"source {dims(row.source_shape)}  " if row.source_shape is not None else ""
        return theirs + (row.detail or "")
    shape = dims(row.shape)
    where = f"  in {row.file}" if row.file else ""
    detail = f"  {row.detail}" if row.detail else ""
    if row.reason == "mismatched":
        return f"target {shape}, source {dims(row.source_shape)}{detail}{where}"
    if row.reason == "adapted":
        before = f"{row.source_dtype} -> {row.dtype}  " if row.source_dtype else ""
        return f"{dims(row.source_shape)} -> {shape}  {before}{row.detail}{where}"
    if row.reason == "cast":
        before = f"{row.source_dtype} -> " if row.source_dtype else ""
        return f"{shape}  {before}{row.dtype}{detail}{where}"
    if row.reason in ("missing", "unexpected", "bookkeeping"):
        return f"{shape}  {row.dtype}{where}"
    if row.reason == "initialised":
        return f"{shape}  {row.dtype}  {row.detail}"
    renamed = f"  from {row.source}" if row.source and row.source != row.key else ""
    return f"{shape}{renamed}{detail}{where}"
