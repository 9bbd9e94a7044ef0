"""What a report's rows and its headline say as text, on a screen and in every other form."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from ckptool.core import keys as names
from ckptool.text import dims, plural

if TYPE_CHECKING:
    from ckptool.core.findings import PrefixDistance
    from ckptool.ops.diff import DiffReport, TiedAway, ValuesChanged
    from ckptool.ops.rows import Row
    from ckptool.references.schema import SchemaReport


class Difference(NamedTuple):
    """What differs at one key. ``kind`` is one of `ckptool.ops.diff.KINDS`, or ``close``.

    ``reason``: why it is allowed; None where it is not. ``to``: the other name of a key, which is in the text.
    """

    kind: str
    key: str
    text: str
    reason: str | None = None
    to: str = ""


_Of = TypeVar("_Of")


def folded(
    rows: Sequence[tuple[Difference, _Of]], fold: Callable[[Sequence[tuple[str, object]]], list[tuple[str, list[int]]]]
) -> Iterator[tuple[Difference, _Of, int]]:
    """Yields (row, what it is of, how many rows it stands for): alike ones, as ``fold`` finds them, as one.

    Keys with another name are alike where both names differ in the same numbers and last names.
    """
    for key, members in fold([(row.key, (row._replace(key="", **_move(row)), of)) for row, of in rows]):
        first, of = rows[members[0]]
        to = _folded_names([rows[at][0] for at in members]) if first.to else ""
        if to is None:
            yield from ((*rows[at], 1) for at in members)
        else:
            yield first._replace(key=key, text=first.text.replace(first.to, to, 1), to=to), of, len(members)


def _move(row: Difference) -> dict[str, str]:
    """Returns the fields that rows with another name must share: what moved, numbers aside."""
    if not row.to:
        return {}
    moved = next(names.moves(row.key, row.to), (row.key, row.to))
    before, after = (re.sub("[0-9]+", "#", module) for module in moved)
    return {"text": row.text.replace(row.to, "", 1), "to": f"{before} {after}"}


def _folded_names(rows: Sequence[Difference]) -> str | None:
    """Returns the other names of rows that are one as one, in whose numbers they rise as in their keys; else None."""
    found = names.fold([(row.to, None) for row in rows]) if len(rows) > 1 else [(rows[0].to, [0])]
    olds, news = (sorted(range(len(rows)), key=lambda at: names.natural(side[at])) for side in (
        [row.key for row in rows], [row.to for row in rows]
    ))  # fmt: skip
    return found[0][0] if len(found) == 1 and olds == news else None


def differences(report: DiffReport) -> Iterator[Difference]:
    """Yields the differences by kind, those of values last, with --depth below prefixes; bookkeeping aside."""
    yield from _judged(report, _differences(report))
    yield from _below(report)


def _judged(report: DiffReport, rows: Iterator[Difference]) -> Iterator[Difference]:
    """Returns rows with the reasons of those that are allowed."""
    reasons = {(row.kind, row.key): row.reason for row in report.allowed}
    return (row._replace(reason=reasons.get(row[:2])) for row in rows) if reasons else rows


def _differences(report: DiffReport) -> Iterator[Difference]:
    for row in report.shape:
        yield Difference("shape", row.key, f"{dims(row.a)} -> {dims(row.b)}")
    for kind, changed in (("dtype", report.dtype), ("devices", report.devices)):
        yield from (Difference(kind, row.key, f"{row.a} -> {row.b}") for row in changed)
    for moved in report.renamed:
        how = "" if moved.by == "values" else ", by its place"
        yield Difference("renamed", moved.key, f"is {moved.b} in B{how}", to=moved.b)
    for key in report.uncompared:
        yield Difference("uncompared", key, "its values, as a lock file has no hash of it")
    for kind, lone in (("only-in-a", report.only_in_a), ("only-in-b", report.only_in_b)):
        yield from (Difference(kind, key, f"{dims(report.shapes[key])}  {report.dtypes[key]}") for key in lone)
    for refused in report.loadability:
        yield Difference("loadability", refused.key, refused.why)
    for values in report.values if report.prefixes is None else ():
        yield Difference(KINDS[values.status], values.key, _distance(values))


KINDS = {"differ": "values", "close": "close"}
"""The kind of a `Difference` for what became of values; none for what is equal."""


def _below(report: DiffReport) -> Iterator[Difference]:
    """Yields what differs below each prefix (--depth); it is allowed where all that differs there is."""
    for row in report.prefixes or ():
        if kind := KINDS.get(row.status):
            text = f"{row.changed or row.close:,} of {plural(row.tensors, 'tensor')}"
            if row.unmeasured:
                text += f", {row.unmeasured:,} of them without a distance"
            if row.allowed not in (None, row.changed):
                text += f", {row.allowed:,} allowed"
            if row.changed and row.close:
                text += f", {row.close:,} close"
            distance = f"{_distance(row)}; " * (row.unmeasured < row.tensors)
            yield Difference(kind, row.prefix, distance + text, "" if row.allowed == row.changed else None)


def _distance(row: ValuesChanged | PrefixDistance) -> str:
    if by := getattr(row, "by", None):  # the sum below a prefix has none
        return "another hash" if by == "hash" else "other bytes"
    largest = "not finite" if row.max_abs is None else f"{row.max_abs:.3g}"
    undefined = "not finite" if row.max_abs is None else "undefined (A is zero)"
    relative = undefined if row.rel_l2 is None else f"{row.rel_l2:.3g}"
    mean = "" if row.mean_abs is None else f", mean abs {row.mean_abs:.3g}"
    cosine = "" if row.cosine is None else f", cosine {row.cosine:.4f}"
    return f"max abs {largest}, relative L2 {relative}{mean}{cosine}"


def headline(report: DiffReport) -> str:
    """Returns whether two checkpoints differ, and the number of differences of each kind."""
    found = report.found()
    parts = [
        (found["shape"], "shape", "shapes"),
        (found["dtype"], "dtype", "dtypes"),
        (found["values"], "tensor with other values", "tensors with other values"),
        (found["devices"], "device tag", "device tags"),
        (found["renamed"], "renamed", "renamed"),
        (found["only-in-a"], "only in A", "only in A"),
        (found["only-in-b"], "only in B", "only in B"),
    ]
    counted = [f"{number:,} {one if number == 1 else many}" for number, one, many in parts if number]
    close = sum(row.status == "close" for row in report.values)
    equal = f"{report.equal:,} equal"
    if close:
        equal += f", {close:,} close"
    if unknown := len({*report.uncompared} - {row.a for row in report.renamed}):
        equal += f", {unknown:,} of them but for their values"
    if not report.compared:
        equal += " (values not compared, --values does)"
    if report.loadability:
        equal += f"; load_state_dict(strict=True) of A's model would refuse {len(report.loadability):,} keys of B"
    if counted:
        from ckptool.ops.diff import HARMLESS

        total = sum(number for number, _, _ in parts)
        planned = sum(row.kind not in HARMLESS for row in report.allowed)
        counted += [f"{planned:,} of them allowed"] if 0 < planned < total else []
        return f"differ{' as allowed' * (planned == total)}: {', '.join(counted)}; {equal}"
    harmless = ["bookkeeping"] * bool(report.bookkeeping) + ["ties"] * bool(report.tied)
    but = f" but for {' and '.join(harmless)}" if harmless else ""
    return f"same{but}: {equal}"


def judged(report: DiffReport) -> list[str]:
    """Returns what ``--fail-on`` made of a comparison, as label and text; nothing where the headline says it."""
    from ckptool.ops.diff import HARMLESS, failing

    if named := [kind for kind in report.fails if kind in HARMLESS]:
        return ["failed", f"--fail-on {','.join(named)}"]
    found, planned = report.found(), Counter(row.kind for row in report.allowed)
    passed = not report.fails and any(found[kind] > planned[kind] for kind in failing(None))
    return ["passed", "--fail-on names nothing of what differs"] if passed else []


def harmless(report: DiffReport) -> Iterator[Difference]:
    """Yields what differs and makes no difference: num_batches_tracked, all of a side in one, and ties."""
    planned = {row.key for row in report.allowed if row.kind == "bookkeeping"}
    first = report.counters.get("a", 0)
    for side, counters in (("A", report.bookkeeping[:first]), ("B", report.bookkeeping[first:])):
        if count := sum(key not in planned for key in counters):
            yield Difference("bookkeeping", "", f"{count} x num_batches_tracked only in {side}")
        rows = (Difference("bookkeeping", key, f"only in {side}") for key in counters if key in planned)
        yield from _judged(report, rows)
    yield from _judged(report, map(_tie, report.tied))


def _tie(row: TiedAway) -> Difference:
    side, other = "AB" if row.only_in == "a" else "BA"
    return Difference("ties", row.key, f"tied in {side} to {row.tied_to}, left out in {other}")


def schema_headline(report: SchemaReport) -> str:
    """Returns whether a checkpoint meets a schema, and the number of failures of each kind."""
    counts = Counter(failure.kind for failure in report.failures)
    several = {"shape", "dtype", "count"}
    found = ", ".join(f"{number:,} {kind}{'s' * (number > 1 and kind in several)}" for kind, number in counts.items())
    meet = f"{report.equal:,} key{'s' * (report.equal != 1)} as the schema has it"
    return f"same: {meet}" if report.same else f"differ: {found}; {meet}"


def schema_failures(report: SchemaReport) -> Iterator[Difference]:
    """Yields the rules that are not met, with the key of each, or the rule where no key is meant."""
    for one in report.failures:
        said = {"unlisted": one.found, "missing": "", "forbidden": one.found}
        rule = f"  rule {one.rule}" if one.rule not in ("", one.key) and one.key is not None else ""
        text = said.get(one.kind, f"expected {one.expected}, found {one.found}") + rule
        yield Difference(one.kind, one.key or one.rule, text.strip())


def row_text(row: Row) -> str:
    """Returns shapes, dtypes and details of a row of `filter` or `load-partial`."""
    if row.shape is None and row.dtype is None:
        theirs = f"source {dims(row.source_shape)}  " if row.source_shape is not None else ""
        return theirs + (row.detail or "")
    shape = dims(row.shape)
    where = f"  in {row.file}" if row.file else ""
    detail = f"  {row.detail}" if row.detail else ""
    if row.confidence is not None:
        detail += f"  {row.confidence:.2f}: {', '.join(row.witnesses or ()) or 'no witness'}"
    if row.reason == "mismatched":
        return f"target {shape}, source {dims(row.source_shape)}{detail}{where}"
    if row.reason == "adapted":
        before = f"{row.source_dtype} -> {row.dtype}  " if row.source_dtype else ""
        return f"{dims(row.source_shape)} -> {shape}  {before}{row.detail}{where}"
    if row.reason == "cast":
        before = f"{row.source_dtype} -> " if row.source_dtype else ""
        origin = f"  from {row.source}" if row.confidence is not None else ""
        return f"{shape}  {before}{row.dtype}{origin}{detail}{where}"
    if row.reason in ("missing", "unexpected", "bookkeeping"):
        known = detail if (row.detail or "").startswith("in doubt") else ""
        return f"{shape}  {row.dtype}{known}{where}"
    if row.reason == "initialised":
        return f"{shape}  {row.dtype}  {row.detail}"
    renamed = f"  from {row.source}" if row.source and row.source != row.key else ""
    return f"{shape}{renamed}{detail}{where}"
