"""The lines that `ckptool diff` prints."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from ckptool.cli import render
from ckptool.ops.diff import DiffReport, ValuesChanged
from ckptool.text import dims, plural

if TYPE_CHECKING:
    from ckptool.references.schema import SchemaReport


def schema_lines(report: SchemaReport) -> list[str]:
    """Returns which rules of a schema are not met, and on which keys."""
    counts = Counter(failure.kind for failure in report.failures)
    several = {"shape", "dtype", "count"}
    found = ", ".join(f"{number:,} {kind}{'s' * (number > 1 and kind in several)}" for kind, number in counts.items())
    meet = f"{plural(report.equal, 'key')} as the schema has it"
    rows = []
    for one in report.failures:
        said = {"unlisted": one.found, "missing": "", "forbidden": one.found}
        rule = f"  rule {one.rule}" if one.rule not in ("", one.key) and one.key is not None else ""
        rows.append(
            (one.kind, one.key or one.rule, said.get(one.kind, f"expected {one.expected}, found {one.found}") + rule)
        )
    lines = [[kind, name, text.strip()] for kind, name, text in _folded(rows)]
    notes = [["bookkeeping", f"{len(report.bookkeeping)} x num_batches_tracked"]] if report.bookkeeping else []
    notes += [["sizes", ", ".join(f"{name} = {size}" for name, size in report.sizes.items())]] if report.sizes else []
    notes += [["note", text] for text in report.notes]
    head = f"same: {meet}" if report.same else f"differ: {found}; {meet}"
    return [*render.headline(head, verdict=True), *render.aligned(lines), *render.aligned(notes)]


def lines(report: DiffReport, b: str, compared: bool, quick: bool) -> list[str]:
    """Returns the headline, a line per difference (alike keys folded), and the notes; ``b`` is the path of B."""
    rows = [("shape", row.key, f"{dims(row.a)} -> {dims(row.b)}") for row in report.shape]
    rows += [("dtype", row.key, f"{row.a} -> {row.b}") for row in report.dtype]
    rows += [("device", row.key, f"{row.a} -> {row.b}") for row in report.devices]
    rows += [("uncompared", key, "its values, as a lock file has no hash of it") for key in report.uncompared]
    rows += [("only in A", key, _tensor(report, key)) for key in report.only_in_a]
    rows += [("only in B", key, _tensor(report, key)) for key in report.only_in_b]
    lines = [[kind, name, text] for kind, name, text in _folded(rows)]
    for values in report.values:
        status = "differs" if values.status == "differ" else values.status
        text = "another hash" if values.by else "other bytes" if quick else _distance(values)
        lines.append([status, values.key, text])
    return [*render.headline(_headline(report, b, compared), verdict=True), *render.aligned(lines), *_notes(report)]


def _folded(rows: list[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    folded = []
    for name, members in render.fold([(key, (kind, text)) for kind, key, text in rows]):
        kind, _, text = rows[members[0]]
        folded.append((kind, name, text + (f"  ({len(members)} keys)" if len(members) > 1 else "")))
    return folded


def _headline(report: DiffReport, b: str, compared: bool) -> str:
    found = report.found()
    parts = [
        (found["shape"], "shape", "shapes"),
        (found["dtype"], "dtype", "dtypes"),
        (found["values"], "tensor with other values", "tensors with other values"),
        (found["devices"], "device tag", "device tags"),
        (found["only-in-a"], "only in A", "only in A"),
        (found["only-in-b"], "only in B", "only in B"),
    ]
    counted = [f"{number:,} {one if number == 1 else many}" for number, one, many in parts if number]
    close = sum(row.status == "close" for row in report.values)
    equal = f"{report.equal:,} equal"
    if close:
        equal += f", {close:,} close"
    if report.uncompared:
        equal += f", {len(report.uncompared):,} of them but for their values"
    if not compared:
        equal += " (values not compared, --values does)"
    if counted:
        return f"differ: {', '.join(counted)}; {equal}"
    harmless = ["bookkeeping"] * bool(report.bookkeeping) + ["ties"] * bool(report.tied)
    but = f" but for {' and '.join(harmless)}" if harmless else ""
    return f"same{but}: {equal}"


def _notes(report: DiffReport) -> list[str]:
    lines = []
    first = report.counters.get("a", 0)
    for side, counters in (("A", report.bookkeeping[:first]), ("B", report.bookkeeping[first:])):
        lines += [["bookkeeping", f"{len(counters)} x num_batches_tracked only in {side}"]] if counters else []
        lines += [["bookkeeping", key, f"only in {side}"] for key in ([] if render.folds() else counters)]
    for row in report.tied:
        side, other = "AB" if row.only_in == "a" else "BA"
        lines.append(["tied", row.key, f"tied in {side} to {row.tied_to}, left out in {other}"])
    lines += [["note", text] for text in report.notes]
    return render.aligned(lines)


def _tensor(report: DiffReport, key: str) -> str:
    return f"{dims(report.shapes[key])}  {report.dtypes[key]}"


def _distance(row: ValuesChanged) -> str:
    largest = "not finite" if row.max_abs is None else f"{row.max_abs:.3g}"
    undefined = "not finite" if row.max_abs is None else "undefined (A is zero)"
    relative = undefined if row.rel_l2 is None else f"{row.rel_l2:.3g}"
    return f"max abs {largest}, relative L2 {relative}"
