"""What `filter` and `load-partial` share: the lines that show a report."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from ckptool.cli import render
from ckptool.errors import UsageError
from ckptool.ops.notes import changed_lines
from ckptool.ops.rows import FilterReport
from ckptool.reports.wording import row_text
from ckptool.text import plural

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


def head(report: FilterReport | LoadPartialReport, summary: str, all_rows: bool) -> list[str]:
    """Returns the first lines of a report: its summary, its rows, its hint."""
    hint = [["hint", report.hint]] if report.hint else []
    return [*render.headline(summary), *render.aligned(_rows(report, all_rows)), *render.aligned(hint)]


def tail(report: FilterReport | LoadPartialReport) -> list[str]:
    """Returns the last lines of a report: values that casts changed, notes, conditions that failed."""
    sections = (
        [[label, render.short(text)] for label, text in changed_lines(report)],
        [["note", render.short(text)] for text in report.notes],
        [["failed", gate.text] for gate in report.failed],
    )
    return [line for section in sections for line in render.aligned(section)]


EXAMPLES = 3
"""How many lines of each reason are shown where nothing fits: all of both sides would be shown."""


def _rows(report: FilterReport | LoadPartialReport, all_rows: bool) -> list[list[str]]:
    """Returns lines for the rows that are shown: repeated blocks folded, counters counted."""
    shown = []
    for row in report.rows:
        lost = row.tensors or (row.detail or "").endswith(": not chosen")  # an object, which no count covers
        if row.reason in ("loaded", "ignored") and not all_rows and not lost and row.confidence is None:
            continue
        shown.append((row.reason, row.key, row_text(row)))
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
