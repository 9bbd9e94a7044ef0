"""What `filter` and `load-partial` report: a row with a reason for every key of the target and the sources."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from ckptool.core.checkpoint import Checkpoint
from ckptool.core.tensor import TensorInfo

if TYPE_CHECKING:
    from ckptool.ops.remap import RemapReport

Reason = Literal[
    "loaded", "cast", "tied", "adapted", "initialised", "mismatched", "missing", "unexpected", "bookkeeping", "ignored"
]
"""Only `ckptool.partial.plan` adapts and initialises."""

LOADED: tuple[Reason, ...] = ("loaded", "cast", "tied", "adapted")
"""The reasons of the target's keys that have a source's values."""


@dataclass(frozen=True, slots=True)
class Row:
    """One key, and what was decided about it."""

    key: str
    """The target's key; of unexpected and ignored keys of a source, that source's."""
    reason: Reason
    """What became of it."""
    shape: list[int] | None
    """The shape in the output, or of the source's tensor that is not in it; null for what is no tensor."""
    source: str | None = None
    """The source's key that it was matched with, if another."""
    source_shape: list[int] | None = None
    """The source's shape, where it differs."""
    dtype: str | None = None
    """The dtype in the output."""
    source_dtype: str | None = None
    """The source's dtype, if it was converted."""
    file: str | None = None
    """Of several sources: the path of the one."""
    detail: str | None = None
    """Why, or how."""
    confidence: float | None = None
    """With auto_remap, of a key that was renamed or made of others: from 0 to 1."""
    witnesses: list[str] | None = None
    """With auto_remap: what speaks for it, such as ``words`` and ``order``."""
    tensors: int | None = None
    """How many tensors are inside an entry that is no tensor, such as packed parameters."""


@dataclass(frozen=True, slots=True)
class Gate:
    """A condition of the command line that does not hold; then nothing is written."""

    gate: str
    """``loaded`` (any key at all), ``min-loaded``, ``require`` or ``strict``."""
    text: str
    """What is wrong."""
    keys: list[str] = field(default_factory=list)
    """The keys for which it does not hold."""


@dataclass(frozen=True, slots=True)
class FilterReport:
    """What of the sources is in the output, key by key."""

    rows: list[Row]
    """One per key of the target, then one per key of a source that was not used."""
    counts: dict[str, int]
    """{reason: rows}."""
    output: str | None = None
    """The path that was written."""
    loaded_fraction: float = 0.0
    """The share of the target's elements, counters aside, that have the sources' values."""
    hint: str | None = None
    """Options with which more keys would match."""
    target: str | None = None
    """The path of the target."""
    sources: list[str] = field(default_factory=list)
    """The paths of the sources."""
    notes: list[str] = field(default_factory=list)
    """What else was noticed."""
    overflowed: dict[str, int] | None = None
    """{key: values that a cast made infinite}, known when written."""
    saturated: dict[str, int] | None = None
    """{key: values that a cast clamped to the largest finite one}, known when written."""
    underflowed: dict[str, int] | None = None
    """{key: values that a cast made zero}, known when written."""
    failed: list[Gate] = field(default_factory=list)
    """The conditions of the command line that do not hold."""

    @property
    def loaded(self) -> int:
        """Returns how many keys have the sources' values."""
        return sum(self.counts.get(reason, 0) for reason in LOADED)


def object_row(key: str, tensors: Sized, decision: str, what: str = "no tensor", file: str | None = None) -> Row:
    """Returns the row of an entry that is no tensor; ``tensors`` are those inside it."""
    count = len(tensors)
    if count:
        what = f"an object with {count} tensor{'s' * (count > 1)}"
    return Row(key, "ignored", None, file=file, detail=f"{what}: {decision}", tensors=count or None)


def counts_of(rows: Sequence[Row]) -> dict[str, int]:
    """Returns {reason: how many rows have it}."""
    return dict(Counter(row.reason for row in rows))


def dims(tensor: TensorInfo) -> list[int] | None:
    """Returns a tensor's shape for a report."""
    return None if tensor.shape is None else list(tensor.shape)


def sourced(rows: Sequence[Row], origins: Mapping[str | None, Mapping[str, str]]) -> list[Row]:
    """Returns the rows with the sources' keys as in their files: {``Row.file``: {key after rules: keys before}}."""
    made = []
    for row in rows:
        known = origins.get(row.file, {})
        key = row.source or (row.key if row.reason == "unexpected" else None)
        origin = known.get(key, key) if key else None
        made.append(row if origin == row.key and not row.source else replace(row, source=origin))
    return made


def followed(report: FilterReport, checkpoint: Checkpoint, renamed: RemapReport) -> FilterReport:
    """Returns the report on a selection after rules gave the ``checkpoint``, as ``renamed`` reports."""
    origins = {row.new: row.old for row in renamed.map}
    chosen = {row.key: row for row in report.rows if row.reason == "loaded"}
    rows = []
    for key, tensor in checkpoint.state_dict().items():
        old = [chosen[name] for name in origins[key]]
        source = " + ".join(row.source or row.key for row in old)
        rows.append(Row(key, "loaded", dims(tensor), source, dtype=tensor.dtype, file=old[0].file))
    used = {name for names in origins.values() for name in names}
    lost = [replace(row, reason="ignored", detail="a rule drops it") for key, row in chosen.items() if key not in used]
    rows += [*lost, *(row for row in report.rows if row.reason != "loaded")]
    notes = [*report.notes, *(note for note in renamed.notes if note not in report.notes)]
    return replace(report, rows=rows, counts=counts_of(rows), notes=notes)
