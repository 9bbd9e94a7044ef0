"""The rows of a plan, as `filter` and `load-partial` show them."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from ckptool import keys
from ckptool.cli import render

if TYPE_CHECKING:
    from ckptool.ops.filter import FilterReport, Row
    from ckptool.ops.load_partial import LoadPartialReport


def rows_of(report: FilterReport | LoadPartialReport, all_rows: bool) -> list[list[str]]:
    """Returns a line for each row that is worth one: repeated blocks folded, counters in one."""
    shown = []
    for row in report.rows:
        if row.reason in ("loaded", "ignored") and not all_rows and not row.tensors:
            continue
        shown.append((row.reason, row.key, _text(row)))
    lines = []
    plain = [row for row in shown if all_rows or row[0] != "bookkeeping"]
    for name, members in keys.fold([(key, (reason, text)) for reason, key, text in plain]):
        reason, _, text = plain[members[0]]
        lines.append([reason, name, text + (f"  ({len(members)} keys)" if len(members) > 1 else "")])
    if not all_rows:
        sides = Counter(row.detail for row in report.rows if row.reason == "bookkeeping")
        stay = f": the values of {report.target} stay"
        for side, number in sides.items():
            text = f"{side}{stay if side == 'absent in the source' else ''}" if side else f"kept from {report.target}"
            lines.append(["bookkeeping", f"{number} x num_batches_tracked", text])
    return lines


def _text(row: Row) -> str:
    if row.shape is None and row.dtype is None:
        theirs = f"source {render.dims(row.source_shape)}  " if row.source_shape is not None else ""
        return theirs + (row.detail or "")
    shape = render.dims(row.shape)
    where = f"  in {row.file}" if row.file else ""
    detail = f"  {row.detail}" if row.detail else ""
    if row.reason == "mismatched":
        return f"target {shape}, source {render.dims(row.source_shape)}{detail}{where}"
    if row.reason == "adapted":
        before = f"{row.source_dtype} -> {row.dtype}  " if row.source_dtype else ""
        return f"{render.dims(row.source_shape)} -> {shape}  {before}{row.detail}{where}"
    if row.reason == "cast":
        before = f"{row.source_dtype} -> " if row.source_dtype else ""
        return f"{shape}  {before}{row.dtype}{detail}{where}"
    if row.reason in ("missing", "unexpected", "bookkeeping"):
        return f"{shape}  {row.dtype}{where}"
    if row.reason == "initialised":
        return f"{shape}  {row.dtype}  {row.detail}"
    renamed = f"  from {row.source}" if row.source and row.source != row.key else ""
    return f"{shape}{renamed}{detail}{where}"
