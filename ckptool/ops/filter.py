"""Select keys of checkpoints, or merge them into a target where names and shapes match; a reason for every key."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ckptool.core import keys as names
from ckptool.core import modules
from ckptool.core.checkpoint import Checkpoint
from ckptool.core.dtypes import DTYPES
from ckptool.core.tensor import Derived, Extras, Opaque, Storage, TensorInfo, contiguous_stride
from ckptool.core.tree import Path, ordered_dict, path_text
from ckptool.core.versions import versioned
from ckptool.errors import CollisionError, LossError, NoTensorsError, UsageError, listed
from ckptool.ops.notes import optimizer_notes, pattern_notes, require_tensors, root_notes, wrapper_notes
from ckptool.ops.scales import refuse_parted

Reason = Literal[
    "loaded", "cast", "tied", "adapted", "initialised", "mismatched", "missing", "unexpected", "bookkeeping", "ignored"
]
"""Only `ckptool.partial.plan` adapts and initialises."""

LOADED: tuple[Reason, ...] = ("loaded", "cast", "tied", "adapted")
"""The reasons of the target's keys that have a source's values."""

Same = Callable[[TensorInfo, TensorInfo], bool]


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
    ``hint``: the prefixes to strip and add with which more keys would match. ``output`` is set when it is saved, and
    so are ``overflowed``, ``saturated`` and ``underflowed``: {key: values that a cast changed in kind} (see
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


def filter(
    sources: Sequence[Checkpoint],
    target: Checkpoint | None,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    strip_prefix: str | None = None,
    add_prefix: str | None = None,
    only_matched: bool = False,
    cast: bool = False,
    first_wins: bool = False,
    same: Same,
) -> tuple[Checkpoint, FilterReport]:
    """Returns (checkpoint, report); ``same`` says whether two tensors have the same bytes.

    Without a target, keys stay as they are, and one in two sources must have the same bytes unless ``first_wins``.

    Raises: NoTensorsError for an empty side or an empty selection, CollisionError, UsageError.
    """
    if not sources:
        raise UsageError("no source to filter")
    for checkpoint in (*sources, *([target] if target else ())):
        require_tensors(checkpoint)
    if target is None:
        if only_matched or cast:
            raise UsageError("--only-matched and --cast need --match")
        return _select(sources, names.chooser(include, exclude), [*include, *exclude], first_wins, same)
    merge = Merge(sources, target, strip_prefix, add_prefix, names.chooser(include, exclude), cast)
    merge.match()
    merge.tie(same)
    return merge.result(only_matched, [*include, *exclude])


def sourced(rows: Sequence[Row], origins: Mapping[str | None, Mapping[str, str]]) -> list[Row]:
    """Returns the rows with the sources' keys as in their files: {``Row.file``: {key after rules: keys before}}."""
    made = []
    for row in rows:
        known = origins.get(row.file, {})
        key = row.source or (row.key if row.reason == "unexpected" else None)
        origin = known.get(key, key) if key else None
        made.append(row if origin == row.key and not row.source else replace(row, source=origin))
    return made


def followed(report: FilterReport, checkpoint: Checkpoint, origins: Mapping[str, Sequence[str]]) -> FilterReport:
    """Returns the report on a selection after rules gave the ``checkpoint``: {its key: keys of the selection}."""
    chosen = {row.key: row for row in report.rows if row.reason == "loaded"}
    rows = []
    for key, tensor in checkpoint.state_dict().items():
        old = [chosen[name] for name in origins[key]]
        source = " + ".join(row.source or row.key for row in old)
        rows.append(Row(key, "loaded", dims(tensor), source, dtype=tensor.dtype, file=old[0].file))
    used = {name for names in origins.values() for name in names}
    lost = [replace(row, reason="ignored", detail="a rule drops it") for key, row in chosen.items() if key not in used]
    rows += [*lost, *(row for row in report.rows if row.reason != "loaded")]
    return replace(report, rows=rows, counts=counts_of(rows))


# --- selection by patterns ---------------------------------------------------------------------------------------


def _select(
    sources: Sequence[Checkpoint], chosen: Callable[[str], bool], patterns: Sequence[str], first_wins: bool, same: Same
) -> tuple[Checkpoint, FilterReport]:
    kept: dict[str, TensorInfo] = {}
    origin: dict[str, int] = {}
    repeated: list[str] = []
    equals: list[str] = []
    rows: list[Row] = []
    tensors: list[str] = []
    objects: dict[str, Any] = {}
    base = sources[0]
    for number, (checkpoint, file) in enumerate(zip(sources, _files(sources), strict=True)):
        hidden = checkpoint.hidden()
        for key, (path, value) in checkpoint.entries().items():
            if not isinstance(value, TensorInfo):
                fate = "an earlier source has it" if key in objects else "kept"
                if not chosen(key):
                    fate = "not chosen" if number or not _is_item(base, path) else "kept, as part of a list"
                rows.append(_object_row(key, hidden.get(key, ()), fate, file=file))
                if fate.startswith("kept"):
                    objects[key] = value
                continue
            tensors.append(key)
            shape = dims(value)
            if not chosen(key):
                rows.append(Row(key, "ignored", shape, dtype=value.dtype, file=file))
            elif key not in kept:
                kept[key], origin[key] = value, number
                rows.append(Row(key, "loaded", shape, dtype=value.dtype, file=file))
            else:
                equal = not first_wins and _equal(kept[key], value, same)
                where = f"{key} ({sources[origin[key]].url} and {checkpoint.url})"
                (equals if equal else repeated).append(where)
                detail = f"an earlier source has {'the same' if equal else 'it'}"
                rows.append(Row(key, "ignored", shape, dtype=value.dtype, file=file, detail=detail))
    if repeated and not first_wins:
        what = f"{len(repeated)} keys are in two sources, with other values: {listed(repeated, 20)}"
        raise CollisionError(f"{what}; --first-wins takes those of the first, --match TARGET takes what fits one")
    if not kept:
        raise NoTensorsError(f"the patterns choose none of {len(tensors)} tensors", base.url)
    notes = [*root_notes(sources), *pattern_notes(patterns, [row.key for row in rows])]
    notes += [f"the same in two sources, taken once: {listed(equals)}"] if equals else []
    notes += [f"in two sources, taken from the first: {listed(repeated)}"] if repeated else []
    for checkpoint in sources[1:]:
        notes += _retied(kept, origin, checkpoint, same)
        outside = [path_text(path) for path, key, _ in checkpoint.beside() if key is None]
        notes += [f"not taken from {checkpoint.url}: {listed(outside)}"] if outside else []
    merged = base.with_state_dict(kept, objects)
    if len(kept) != len(base.state_dict()):
        notes += optimizer_notes(merged)
    notes += _module_notes(base)
    return merged, _report(rows, notes, sources)


def _equal(one: TensorInfo, other: TensorInfo, same: Same) -> bool:
    """Returns whether two tensors are one, or dense and of the same bytes."""
    return one.view == other.view or (one.kind == other.kind == "dense" and same(one, other))


def _retied(kept: dict[str, TensorInfo], origin: Mapping[str, int], source: Checkpoint, same: Same) -> list[str]:
    """Ties again the keys that a source ties and of which earlier sources gave some; returns notes on other ties."""
    notes = []
    for group in source.shared():
        present = sorted((key for key in group if key in kept), key=origin.__getitem__)
        if len({kept[key].view for key in present}) < 2:
            continue
        first = kept[present[0]]
        if all(_equal(first, kept[key], same) for key in present):
            kept.update((key, _like(first, kept[key])) for key in present)
        else:
            notes.append(f"tied in {source.url}, and no longer: {listed(present)}")
    return notes


def _is_item(checkpoint: Checkpoint, path: Path) -> bool:
    """Returns whether what is at a path below root lies in a list, from which nothing can be taken."""
    return type(path[-1]) is int and isinstance(checkpoint.at((*checkpoint.root, *path[:-1])), (list, tuple))


def _files(sources: Sequence[Checkpoint]) -> list[str | None]:
    """Returns for each source what ``Row.file`` says: its path, None if it is the only one."""
    return [source.url if len(sources) > 1 else None for source in sources]


def _object_row(key: str, tensors: Sized, decision: str, what: str = "no tensor", file: str | None = None) -> Row:
    """Returns the row of an entry that is no tensor; ``tensors`` are those inside it."""
    count = len(tensors)
    if count:
        what = f"an object with {count} tensor{'s' * (count > 1)}"
    return Row(key, "ignored", None, file=file, detail=f"{what}: {decision}", tensors=count or None)


# --- merging into a target ---------------------------------------------------------------------------------------


class Merge:
    """Matches sources with a target key by key (`match`), then ties (`tie`), then makes the output (`result`).

    ``plain``: {key of the target: key as it is compared}. ``offers``: for each source, what `_offer` returns.
    ``taken``: values from a source; ``made``: values from no source. ``used``: (number of the source, its key) of the
    keys that were looked at. ``objects``: keys, as they are compared, that are no tensors in the target.
    ``refused``: rows of sources' tensors that did not match where another source's did, or an earlier one.
    """

    def __init__(
        self,
        sources: Sequence[Checkpoint],
        target: Checkpoint,
        strip_prefix: str | None,
        add_prefix: str | None,
        chosen: Callable[[str], bool],
        cast: bool,
    ) -> None:
        self.sources, self.target, self.chosen, self.cast = sources, target, chosen, cast
        self.tensors = target.state_dict()
        self.plain = {key: plain for plain, key in names.unwrap_all(self.tensors).items()}
        self.offers = [_offer(source, strip_prefix, add_prefix) for source in sources]
        self.files = _files(sources)
        self.rows: dict[str, Row] = {}
        self.taken: dict[str, TensorInfo] = {}
        self.made: dict[str, TensorInfo] = {}
        self.used: set[tuple[int, str]] = set()
        self.uncastable: list[str] = []
        self.refused: list[Row] = []
        self.objects: set[str] = set()
        self._storages: dict[tuple[int, str], Storage] = {}
        self._casts: dict[tuple[object, str], Derived] = {}

    def match(self) -> None:
        """Decides for each key of the target which source's values it gets, if any."""
        for key, tensor in self.tensors.items():
            if self.chosen(key):
                self.rows[key] = self._match_one(key, tensor)
                continue
            plain = self.plain[key]
            matched = [(number, offer[plain]) for number, (offer, _) in enumerate(self.offers) if plain in offer]
            self.used.update(matched)
            source = matched[0][1] if matched else None
            self.rows[key] = Row(key, "ignored", dims(tensor), source, dtype=tensor.dtype, detail="not chosen")
        for number, offering in enumerate(self.sources):
            offering.refuse_alike({key for other, key in self.used if other == number})
        if self.uncastable:
            raise LossError(f"--cast cannot convert {listed(self.uncastable, 20)}", self.target.url)

    def _match_one(self, key: str, tensor: TensorInfo) -> Row:
        shape = dims(tensor)
        mismatched: list[Row] = []
        row: Row | None = None
        for number, (plain, tensors) in enumerate(self.offers):
            source = plain.get(self.plain[key])
            if source is None:
                continue
            offered, file = tensors[source], self.files[number]
            self.used.add((number, source))
            if not self.fits(key, offered, tensor):
                why, theirs = _why(offered, tensor), dims(offered)
                mismatched.append(Row(key, "mismatched", shape, source, theirs, tensor.dtype, file=file, detail=why))
                continue
            self.taken[key] = self._as_in_target(key, offered, tensor)
            written = self.taken[key].dtype
            row = Row(key, "loaded", shape, source, dims(offered), written, file=file)
            if offered.dtype != tensor.dtype:
                kept = written == offered.dtype
                source_dtype, detail = (None, f"{tensor.dtype} in the target") if kept else (offered.dtype, None)
                row = replace(row, reason="cast", source_dtype=source_dtype, detail=detail)
            break  # `_unused_rows` lists the same key of later sources
        if row is None and mismatched:
            row = mismatched.pop(0)
        self.refused += [
            Row(str(other.source), "ignored", other.source_shape, file=other.file, detail="its shape does not fit")
            for other in mismatched
        ]
        reason: Reason = "bookkeeping" if names.is_counter(key) else "missing"
        return row or Row(key, reason, shape, dtype=tensor.dtype, detail="absent in the source")

    def _as_in_target(self, key: str, offered: TensorInfo, tensor: TensorInfo) -> TensorInfo:
        """Returns the source's values with the target's device, class, shape of a counter and, if wished, dtype."""
        if isinstance(offered.source, Opaque):
            return offered
        shape = tensor.shape or ()
        stride = offered.stride if offered.shape == shape else contiguous_stride(shape)
        source: Storage | Derived = offered.source
        dtype, offset, bits = offered.dtype, offered.storage_offset, offered.extras
        if self.cast and offered.dtype != tensor.dtype:
            if not _castable(offered.dtype, tensor.dtype):
                self.uncastable.append(f"{key} ({offered.dtype} to {tensor.dtype})")
            made = self._casts.setdefault((offered.view, tensor.dtype), Derived("cast", (offered,)))
            source, dtype, offset, stride, bits = made, tensor.dtype, 0, contiguous_stride(shape), None
        elif isinstance(source, Storage) and tensor.location != source.location and tensor.kind == "dense":
            identity = (id(source), tensor.location)
            source = self._storages.setdefault(identity, replace(source, location=tensor.location))
        return _like(TensorInfo(dtype, shape, stride, offset, source, extras=bits), tensor)

    def tie(self, same: Same) -> None:
        """Gives all keys of a tied tensor the values that one of them has from a source.

        Raises: CollisionError if the sources have different values for one tensor.
        """
        conflicts: list[str] = []
        for group in self.tied():
            loaded = [key for key in group if key in self.taken]
            if not loaded:
                continue
            first = loaded[0]
            for key in loaded[1:]:
                one, other = self.taken[first], self.taken[key]
                if one.view != other.view and not same(one, other):
                    conflicts.append(f"{first} and {key}")
            made: dict[int, TensorInfo] = {}  # keys of one object in the target stay keys of one object
            for key in group:
                tensor = self.tensors[key]
                self.taken[key] = made.setdefault(id(tensor), _like(self.taken[first], tensor))
                row, detail = self.rows[key], f"tied to {first}"
                if row.reason == "mismatched":
                    self.rows[key] = replace(row, detail=f"{detail}, whose values it takes")
                elif key not in loaded:
                    self.rows[key] = replace(row, reason="tied", source=self.rows[first].source, detail=detail)
        if conflicts:
            raise CollisionError(
                f"tied in {self.target.url}, and different in the source: {listed(conflicts)}", self.sources[0].url
            )

    def fits(self, key: str, offered: TensorInfo, tensor: TensorInfo) -> bool:
        """Returns whether a source's tensor has the kind and shape of the target's; a counter's shape may differ."""
        counters = names.is_counter(key) and {offered.form, tensor.form} <= {("dense", ()), ("dense", (1,))}
        return offered.form == tensor.form or counters

    def tied(self) -> list[list[str]]:
        """Returns the groups of the target's keys that are one tensor."""
        return self.target.shared()

    def result(self, only_matched: bool, patterns: Sequence[str]) -> tuple[Checkpoint, FilterReport]:
        """Returns the merged checkpoint and the report."""
        casts = {(str(row.source), self.taken[key].dtype) for key, row in self.rows.items() if key in self.taken}
        for source, (_, tensors) in zip(self.sources, self.offers, strict=True):
            refuse_parted(tensors, casts, source.url)
        merged = {key: self.taken.get(key) or self.made.get(key, tensor) for key, tensor in self.tensors.items()}
        checkpoint = self._only_matched() if only_matched else self.target.with_state_dict(merged)
        rows = [*self.rows.values(), *self._object_rows(), *self.refused, *self._unused_rows()]
        known = [*self.tensors, *(key for plain, _ in self.offers for key in plain), *(row.key for row in rows)]
        notes = [*root_notes([*self.sources, self.target]), *pattern_notes(patterns, known)]
        for source, (_, tensors) in zip(self.sources, self.offers, strict=True):
            wrappers = wrapper_notes((source.url, tensors), (self.target.url, self.tensors))
            notes += [note for note in wrappers if note not in notes]
        notes += [] if only_matched else _module_notes(self.target)
        notes += self._memory_notes(merged)
        report = _report(rows, notes, self.sources, self.target.url, self._fraction(), self._hint())
        return checkpoint, report

    def _only_matched(self) -> Checkpoint:
        taken = {key: self.taken[key] for key in self.tensors if key in self.taken}
        node = self.target.at(self.target.root)
        whole: dict[Any, Any] = dict(self.tensors)
        bare = replace(self.target, tree=versioned(whole, node), root=(), metadata={})
        if not taken:
            return replace(bare, tree=ordered_dict({}))
        return bare.with_state_dict(taken)

    def _object_rows(self) -> list[Row]:
        """Returns a row for each entry of the target that is no tensor: it stays, whatever a source has."""
        hidden = self.target.hidden()
        rows = []
        for key, (_, value) in self.target.entries().items():
            if isinstance(value, TensorInfo):
                continue
            row = _object_row(key, hidden.get(key, ()), "the target's stays")
            for number, (plain, tensors) in enumerate(self.offers):
                source = plain.get(names.unwrapped(key), plain.get(key))
                if source is not None:
                    self.used.add((number, source))
                    self.objects.add(names.unwrapped(key))
                    theirs = dims(tensors[source])
                    detail = "no tensor in the target (uninitialised, or an object)"
                    row = replace(row, reason="mismatched", source=source, source_shape=theirs, detail=detail)
            rows.append(row)
        return rows

    def _unused_rows(self) -> list[Row]:
        """Returns a row for each entry of a source that is not in the output."""
        known = set(self.plain.values()) | self.objects
        rows = []
        for number, (source, (plain, tensors)) in enumerate(zip(self.sources, self.offers, strict=True)):
            file = self.files[number]
            for name, key in plain.items():
                reason: Reason = "ignored"
                if name in known:
                    if (number, key) in self.used:
                        continue
                    detail = "an earlier source has it"
                elif not self.chosen(name):
                    detail = "not chosen"
                else:
                    reason, detail = "bookkeeping" if names.is_counter(key) else "unexpected", "absent in the target"
                tensor = tensors[key]
                rows.append(Row(key, reason, dims(tensor), dtype=tensor.dtype, file=file, detail=detail))
            hidden = source.hidden()
            rows += [
                _object_row(key, hidden.get(key, ()), "not taken", "no tensor in the source", file)
                for key, (_, value) in source.entries().items()
                if not isinstance(value, TensorInfo)
            ]
        return rows

    def _fraction(self) -> float:
        counted = {key: tensor.numel for key, tensor in self.tensors.items() if not names.is_counter(key)}
        loaded = sum(count for key, count in counted.items() if self.rows[key].reason in LOADED)
        packed = sum(tensor.numel for inner in self.target.hidden().values() for tensor in inner.values())
        return loaded / total if (total := sum(counted.values()) + packed) else float(bool(self.taken))

    def _hint(self) -> str | None:
        if not self.offers or len(self.taken) == len(self.tensors):
            return None
        plain, tensors = self.offers[0]
        key_of = {name: key for key, name in self.plain.items()}

        def agree(source: str, target: str) -> bool:
            return self.fits(key_of[target], tensors[plain[source]], self.tensors[key_of[target]])

        best = names.best_prefix(plain, key_of, agree)
        direct = sum(agree(name, name) for name in plain if name in key_of)
        if best is None or best[2] <= direct or not (best[0] or best[1]):
            return None
        strip, add, count = best
        change = f"stripping {strip!r}" if strip else f"adding {add!r}"
        change = f"replacing {strip!r} by {add!r}" if strip and add else change
        options = " ".join(f"--{name}-prefix {value}" for name, value in (("strip", strip), ("add", add)) if value)
        return f"{change} would match {count} of {len(self.tensors)} ({options})"

    def _memory_notes(self, merged: Mapping[str, TensorInfo]) -> list[str]:
        """Returns notes on what shares memory with the target's weights and will not in the output.

        These are other views of one storage, and tensors outside of root (EMA copies, optimizer states).
        """
        tied = {key for group in self.target.shared() for key in group}
        by_storage: dict[int, list[str]] = {}
        for key, tensor in self.tensors.items():
            if tensor.numel and key not in tied and isinstance(tensor.source, Storage):
                by_storage.setdefault(id(tensor.source), []).append(key)
        split = [
            group for group in by_storage.values()
            if len(group) > 1 and len({id(merged[key].source) for key in group}) > 1
        ]  # fmt: skip
        notes = [f"shared memory in the target, and no longer: {listed(group)}" for group in split[:8]]
        replaced = {id(self.tensors[key].source) for key in self.taken}
        root = self.target.root
        elsewhere = [
            path_text(path)
            for path, tensor in self.target.tensors()
            if id(tensor.source) in replaced and path[: len(root)] != root
        ]
        if elsewhere:
            notes.append(f"shared memory with the target's weights, and keep the old values: {listed(elsewhere)}")
        return notes


def _offer(source: Checkpoint, strip: str | None, add: str | None) -> tuple[dict[str, str], dict[str, TensorInfo]]:
    """Returns ({key as it is compared: key in the source}, the source's tensors). Raises: CollisionError."""
    tensors = source.state_dict()
    return names.plain_keys(tensors, strip, add, source.url), tensors


def _like(values: TensorInfo, tensor: TensorInfo) -> TensorInfo:
    """Returns the values as what ``tensor`` is: a parameter or not, of its subclass, with its attributes."""
    extras = tensor.extras
    if values.extras is not None or extras is not None:
        conj, neg = (values.extras.conj, values.extras.neg) if values.extras else (False, False)
        extras = replace(extras or Extras(), conj=conj, neg=neg)
    return replace(values, requires_grad=tensor.requires_grad, is_parameter=tensor.is_parameter, extras=extras)


def _castable(old: str, new: str) -> bool:
    """Returns whether torch converts one dtype to the other without losing a component."""
    kinds = {DTYPES[old].kind, DTYPES[new].kind}
    packed = "float4_e2m1fn_x2" in (old, new)
    return DTYPES[old].in_torch and not packed and (kinds <= {"float", "int", "bool"} or kinds == {"complex"})


def _why(offered: TensorInfo, tensor: TensorInfo) -> str | None:
    if offered.kind != tensor.kind:
        return f"{offered.kind} in the source, {tensor.kind} in the target"
    if offered.shape and tensor.shape and offered.shape[::-1] == tensor.shape:
        return "transposed?"
    return None


def dims(tensor: TensorInfo) -> list[int] | None:
    """Returns a tensor's shape for a report."""
    return None if tensor.shape is None else list(tensor.shape)


def _module_notes(checkpoint: Checkpoint) -> list[str]:
    if not modules.is_module(checkpoint.at(checkpoint.root)):
        return []
    return [f"{checkpoint.url} is a whole-model pickle: the output holds its state_dict, without class and attributes"]


def _report(
    rows: list[Row], notes: list[str], sources: Sequence[Checkpoint], target: str | None = None,
    fraction: float = 1.0, hint: str | None = None,
) -> FilterReport:  # fmt: skip
    urls = [source.url for source in sources]
    return FilterReport(rows, counts_of(rows), None, fraction, hint, target, urls, notes)


def counts_of(rows: Sequence[Row]) -> dict[str, int]:
    """Returns {reason: how many rows have it}."""
    return dict(Counter(row.reason for row in rows))
