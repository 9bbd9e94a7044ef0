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
    """One key, and what was decided about it. ``source`` is the source's key that it was matched with.

    ``key`` and ``shape`` are the target's; for unexpected and ignored keys of a source they are that source's, and
    ``file`` is its path where there are several. ``dtype`` is that of the output, ``source_dtype`` the source's if it
    was converted. ``tensors`` counts those inside an entry that is no tensor: packed parameters, extra state.
    """

    key: str
    reason: Reason
    shape: list[int] | None
    source: str | None = None
    source_shape: list[int] | None = None
    dtype: str | None = None
    source_dtype: str | None = None
    file: str | None = None
    detail: str | None = None
    tensors: int | None = None


@dataclass(frozen=True, slots=True)
class FilterReport:
    """``rows``: one per key of the target, then one per key of a source that was not used.

    ``loaded_fraction`` is the share of the target's elements (counters aside) that have the sources' values.
    ``hint``: the options with which more keys would match. ``output`` is set when it is saved, and so are
    ``overflowed``, ``saturated`` and ``underflowed``: {key: values that a cast changed in kind} (see
    `ckptool.core.dtypes.Changed`), None where there are none.
    """

    rows: list[Row]
    counts: dict[str, int]
    output: str | None = None
    loaded_fraction: float = 0.0
    hint: str | None = None
    target: str | None = None
    sources: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    overflowed: dict[str, int] | None = None
    saturated: dict[str, int] | None = None
    underflowed: dict[str, int] | None = None

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
