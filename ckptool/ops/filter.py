"""Select keys of checkpoints, or merge them into a target where names and shapes match; a reason for every key."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain, islice
from typing import Any, NamedTuple

from ckptool.core import keys as names
from ckptool.core.aliases import followed
from ckptool.core.checkpoint import Checkpoint
from ckptool.core.dtypes import castable
from ckptool.core.tensor import Derived, Extras, Opaque, Storage, TensorInfo, contiguous_stride
from ckptool.core.tree import Path, ordered_dict, path_text
from ckptool.core.versions import versioned
from ckptool.errors import CollisionError, LossError, NoTensorsError, UsageError, as_options, listed
from ckptool.ops.notes import (
    adapter_patterns,
    adapters_for,
    merge_hint,
    module_notes,
    none_chosen,
    not_taken,
    optimizer_notes,
    pattern_notes,
    require_tensors,
    root_notes,
    wrapper_notes,
)
from ckptool.ops.rows import LOADED, FilterReport, Reason, Row, counts_of, dims, object_row
from ckptool.ops.scales import mixed_notes, outside, parted_notes, refuse_parted

Same = Callable[[TensorInfo, TensorInfo], bool]


def filter(
    sources: Sequence[Checkpoint],
    target: Checkpoint | None,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    strip_prefix: Sequence[str] = (),
    add_prefix: str | None = None,
    only_matched: bool = False,
    cast: bool = False,
    first_wins: bool = False,
    roots: tuple[str, str] = ("--root", "--match-root"),
    same: Same,
) -> tuple[Checkpoint, FilterReport]:
    """Returns (checkpoint, report); ``same`` says whether two tensors have the same bytes.

    ``roots``: the options for the roots of sources and target that a hint may name, "" for none.

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
    merge = Merge(sources, target, strip_prefix, add_prefix, names.chooser(include, exclude), cast, same)
    merge.source_root, merge.target_root = roots
    merge.match()
    merge.tie()
    made, report = merge.result(only_matched, [*include, *exclude])
    found = adapters_for(merge.mismatched(), merge.tensors)
    given = as_options(("--adapt", f"{at}={how}") for at, how, _ in islice(adapter_patterns(found, found), 8))
    report.notes.extend([f"load-partial may adapt {listed(found, 3)} ({given})"] if found else [])
    return made, replace(report, hint=merge_hint(merge, report.loaded))


_PLAIN = (str, bytes, int, float, type(None))
"""Types whose values are compared at once."""


# --- selection by patterns ---------------------------------------------------------------------------------------


def _select(
    sources: Sequence[Checkpoint], chosen: Callable[[str], bool], patterns: Sequence[str], first_wins: bool, same: Same
) -> tuple[Checkpoint, FilterReport]:
    kept: dict[str, TensorInfo] = {}
    origin: dict[str, int] = {}
    theirs: list[set[str]] = [set() for _ in sources]  # the keys whose values are those of a source
    repeated: list[str] = []
    equals: list[str] = []
    rows: list[Row] = []
    tensors: list[str] = []
    objects: dict[str, Any] = {}
    objects_lost: list[str] = []
    base = sources[0]
    for number, (checkpoint, file) in enumerate(zip(sources, _files(sources), strict=True)):
        hidden = checkpoint.hidden()
        for key, (path, value) in checkpoint.entries().items():
            if not isinstance(value, TensorInfo):
                fate = "an earlier source has it" if key in objects else "kept"
                if not chosen(key):
                    fate = "not chosen" if number or not _is_item(base, path) else "kept, as part of a list"
                rows.append(object_row(key, hidden.get(key, ()), fate, file=file))
                if fate.startswith("kept"):
                    objects[key] = value
                elif chosen(key) and not (isinstance(value, _PLAIN) and value == objects[key]):
                    objects_lost.append(f"{key} ({checkpoint.url})")
                continue
            tensors.append(key)
            shape = dims(value)
            if not chosen(key):
                rows.append(Row(key, "ignored", shape, dtype=value.dtype, file=file))
            elif key not in kept:
                kept[key], origin[key] = value, number
                theirs[number].add(key)
                rows.append(Row(key, "loaded", shape, dtype=value.dtype, file=file))
            else:
                equal = not first_wins and _equal(kept[key], value, same)
                where = f"{key} ({sources[origin[key]].url} and {checkpoint.url})"
                (equals if equal else repeated).append(where)
                theirs[number].update([key] if equal else ())
                detail = f"an earlier source has {'the same' if equal else 'it'}"
                rows.append(Row(key, "ignored", shape, dtype=value.dtype, file=file, detail=detail))
    if repeated and not first_wins:
        keys = f"{len(repeated)} key{'s' * (len(repeated) > 1)}: {listed(repeated, 20)}"
        what = f"in two sources, with other values: {keys}"
        raise CollisionError(f"{what}; --first-wins takes those of the first, --match TARGET takes what fits one")
    if not kept:
        raise NoTensorsError(none_chosen(patterns, [*tensors]), base.url)
    notes = [*root_notes(sources), *pattern_notes(patterns, [row.key for row in rows])]
    notes += [f"the same in two sources, taken once: {', '.join(equals)}"] if equals else []
    notes += [f"in two sources, taken from the first: {', '.join(repeated)}"] if repeated else []
    notes += [f"no tensors, and an earlier source has them: {', '.join(objects_lost)}"] if objects_lost else []
    notes += parted_notes([checkpoint.state_dict() for checkpoint in sources], theirs)
    for checkpoint in sources[1:]:
        notes += _retied(kept, origin, checkpoint, same)
        notes += not_taken(checkpoint, _outside(checkpoint), base.metadata)
    every = tuple(dict.fromkeys(name for checkpoint in sources for name in checkpoint.names))
    stay = ((key, key) for key in base.entries() if key in kept or key in objects)
    metadata, told = followed(base.metadata, base.entries(), stay)
    merged, notes = replace(base.with_state_dict(kept, objects), names=every, metadata=metadata), [*notes, *told]
    if len(kept) != len(base.state_dict()):
        notes += optimizer_notes(merged)
    notes += module_notes(base)
    return merged, _report(rows, notes, sources)


def _outside(checkpoint: Checkpoint) -> list[str]:
    """Returns the names of what lies outside of a checkpoint's weights."""
    return [path_text(path) for path, key, _ in checkpoint.beside() if key is None]


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
            notes.append(f"tied in {source.url}, and no longer: {', '.join(present)}")
    return notes


def _is_item(checkpoint: Checkpoint, path: Path) -> bool:
    """Returns whether what is at a path below root lies in a list, from which nothing can be taken."""
    return type(path[-1]) is int and isinstance(checkpoint.at((*checkpoint.root, *path[:-1])), (list, tuple))


def _files(sources: Sequence[Checkpoint]) -> list[str | None]:
    """Returns for each source what ``Row.file`` says: its path, None if it is the only one."""
    return [source.url if len(sources) > 1 else None for source in sources]


# --- merging into a target ---------------------------------------------------------------------------------------


class Merge:
    """Matches sources with a target key by key (`match`), then ties (`tie`), then makes the output (`result`).

    ``offers``: for each source, what `_offer` returns.
    ``pairs``: {key: (number of a source, its key)} of what fits, ``unfit``: those that do not, or are not chosen;
    ``left``: keys that are not chosen; ``used``: (number, key) of the sources' keys that were looked at.
    ``taken``: values from a source; ``made``: values from no source.
    ``refused``: rows of sources' tensors that did not match where another source's did, or an earlier one.
    """

    source_root = target_root = ""
    """The options that say where the weights are, for hints; "" if they cannot be given."""

    def __init__(
        self,
        sources: Sequence[Checkpoint],
        target: Checkpoint,
        strip_prefix: Sequence[str],
        add_prefix: str | None,
        chosen: Callable[[str], bool],
        cast: bool,
        same: Same,
    ) -> None:
        self.sources, self.target, self.chosen, self.cast, self.same = sources, target, chosen, cast, same
        self.strip_prefix, self.add_prefix = strip_prefix, add_prefix
        self.tensors = target.state_dict()
        self.offers = [_offer(source, target, strip_prefix, add_prefix) for source in sources]
        self.files = _files(sources)
        self.rows: dict[str, Row] = {}
        self.taken: dict[str, TensorInfo] = {}
        self.made: dict[str, TensorInfo] = {}
        self.pairs: dict[str, tuple[int, str]] = {}
        self.unfit: dict[str, list[tuple[int, str]]] = {}
        self.left: set[str] = set()
        self.used: set[tuple[int, str]] = set()
        self.refused: list[Row] = []
        self._storages: dict[tuple[int, str], Storage] = {}
        self._casts: dict[tuple[object, str], Derived] = {}

    def find(self) -> None:
        """Pairs the keys: ``pairs`` and ``unfit``. Raises: CollisionError, LossError for casts that lose something."""
        uncastable = []
        for key, tensor in self.tensors.items():
            if not (chosen := self.chosen(key)):
                self.left.add(key)
            for number, offer in enumerate(self.offers):
                source = offer.source(key)
                if source is None:
                    continue
                offered = offer.tensors[source]
                self.used.add((number, source))
                if chosen and self.fits(key, offered, tensor):
                    self.pairs[key] = number, source
                    same = offered.dtype == tensor.dtype or isinstance(offered.source, Opaque)
                    if self.cast and not (same or castable(offered.dtype, tensor.dtype)):
                        uncastable.append(f"{key} ({offered.dtype} to {tensor.dtype})")
                    break  # `_unused_rows` lists the same key of later sources
                self.unfit.setdefault(key, []).append((number, source))
        for number, offering in enumerate(self.sources):
            offering.refuse_alike({key for other, key in self.used if other == number})
        if uncastable:
            raise LossError(f"--cast cannot convert {listed(uncastable, 20)}", self.target.url)

    def match(self) -> None:
        """Decides for each key of the target which source's values it gets, if any."""
        self.find()
        self.take(self.pairs)
        for key, tensor in self.tensors.items():
            self.rows[key] = self._row(key, tensor)

    def take(self, keys: Iterable[str]) -> None:
        """Gives these keys the values that they are paired with."""
        for key in keys:
            number, source = self.pairs[key]
            self.taken[key] = self._as_in_target(self.offers[number].tensors[source], self.tensors[key])

    def _row(self, key: str, tensor: TensorInfo) -> Row:
        shape, pair, unfit = dims(tensor), self.pairs.get(key), self.unfit.get(key, [])
        if key in self.left:
            source = unfit[0][1] if unfit else None
            return Row(key, "ignored", shape, source, dtype=tensor.dtype, detail="not chosen")
        for number, name in unfit if pair else unfit[1:]:
            theirs, file = dims(self.offers[number].tensors[name]), self.files[number]
            self.refused.append(Row(name, "ignored", theirs, file=file, detail="its shape does not fit"))
        if not (pair or unfit):
            reason: Reason = "bookkeeping" if names.is_counter(key) else "missing"
            return Row(key, reason, shape, dtype=tensor.dtype, detail="absent in the source")
        number, name = pair or unfit[0]
        offered, file = self.offers[number].tensors[name], self.files[number]
        if not pair:
            why = _why(offered, tensor)
            return Row(key, "mismatched", shape, name, dims(offered), tensor.dtype, file=file, detail=why)
        written, before, detail = self.taken[key].dtype, None, None
        if offered.dtype != tensor.dtype:
            kept = written == offered.dtype
            before, detail = (None, f"{tensor.dtype} in the target") if kept else (offered.dtype, None)
        reason = "loaded" if offered.dtype == tensor.dtype else "cast"
        return Row(key, reason, shape, name, dims(offered), written, before, file, detail)

    def _as_in_target(self, offered: TensorInfo, tensor: TensorInfo) -> TensorInfo:
        """Returns the source's values with the target's device, class, shape of a counter and, if wished, dtype."""
        if isinstance(offered.source, Opaque):
            return offered
        shape = tensor.shape or ()
        stride = offered.stride if offered.shape == shape else contiguous_stride(shape)
        source: Storage | Derived = offered.source
        dtype, offset, bits = offered.dtype, offered.storage_offset, offered.extras
        if self.cast and offered.dtype != tensor.dtype:
            made = self._casts.setdefault((offered.view, tensor.dtype), Derived("cast", (offered,)))
            source, dtype, offset, stride, bits = made, tensor.dtype, 0, contiguous_stride(shape), None
        elif isinstance(source, Storage) and tensor.location != source.location and tensor.kind == "dense":
            identity = (id(source), tensor.location)
            source = self._storages.setdefault(identity, replace(source, location=tensor.location))
        flags = tensor.requires_grad, tensor.is_parameter
        return TensorInfo(dtype, shape, stride, offset, source, *flags, _extras(bits, tensor))

    def tie(self) -> None:
        """Gives all keys of a tied tensor the values that one of them has from a source. Raises: CollisionError."""
        for group in self._tied_loaded():
            loaded = [key for key in group if key in self.taken]
            first = loaded[0]
            made: dict[int, TensorInfo] = {}  # keys of one object in the target stay keys of one object
            for key in group:
                tensor = self.tensors[key]
                self.taken[key] = made.setdefault(id(tensor), _like(self.taken[first], tensor))
                row, detail = self.rows[key], f"tied to {first}"
                if row.reason == "mismatched":
                    self.rows[key] = replace(row, detail=f"{detail}, whose values it takes")
                elif key not in loaded:
                    self.rows[key] = replace(row, reason="tied", source=self.rows[first].source, detail=detail)

    def _tied_loaded(self) -> list[list[str]]:
        """Returns the groups of tied keys of which some have values from a source.

        Raises: CollisionError if the sources have different values for one tensor.
        """
        conflicts: list[str] = []
        found = []
        for group in self.tied():
            loaded = [key for key in group if key in self.taken]
            for key in loaded[1:]:
                one, other = self.taken[loaded[0]], self.taken[key]
                if one.view != other.view and not self.same(one, other):
                    conflicts.append(f"{loaded[0]} and {key}")
            found += [group] if loaded else []
        if conflicts:
            what = f"tied in {self.target.url}, and different in the source: {listed(conflicts)}"
            raise CollisionError(what, self.sources[0].url)
        return found

    def fits(self, key: str, offered: TensorInfo, tensor: TensorInfo) -> bool:
        """Returns whether a source's tensor has the kind and shape of the target's; a counter's shape may differ.

        A target on meta has no values, and takes a dense tensor of its shape.
        """
        if tensor.kind == "meta" and offered.form == ("dense", tensor.shape):
            return True
        counters = names.is_counter(key) and {offered.form, tensor.form} <= {("dense", ()), ("dense", (1,))}
        return offered.form == tensor.form or counters

    def mismatched(self) -> Iterator[Row]:
        """Yields the rows of the keys that have no values of a source because shapes or kinds differ."""
        return (row for key, row in self.rows.items() if row.reason == "mismatched" and key not in self.taken)

    def tied(self) -> list[list[str]]:
        """Returns the groups of the target's keys that are one tensor, on meta too, where they share no storage."""
        groups: dict[int, list[str]] = {}
        for key, tensor in self.tensors.items():
            if tensor.kind == "meta":
                groups.setdefault(id(tensor.source), []).append(key)
        return [*self.target.shared(), *(group for group in groups.values() if len(group) > 1)]

    def result(self, only_matched: bool, patterns: Sequence[str]) -> tuple[Checkpoint, FilterReport]:
        """Returns the merged checkpoint and the report."""
        own = ((str(row.source), key) for key, row in self.rows.items() if row.reason != "mismatched")
        self._refuse_parted({(source, self.taken[key].dtype) for source, key in own if key in self.taken})
        merged = {key: self.taken.get(key) or self.made.get(key, tensor) for key, tensor in self.tensors.items()}
        checkpoint = self._only_matched() if only_matched else self.target.with_state_dict(merged)
        fate = "left out" if only_matched else "the target's stays"
        rows = [*self.rows.values(), *self._object_rows(fate), *self.refused, *self._unused_rows()]
        known = [*self.tensors, *(key for offer in self.offers for key in offer.names), *(row.key for row in rows)]
        notes = [*root_notes([*self.sources, self.target]), *pattern_notes(patterns, known)]
        for source, offer in zip(self.sources, self.offers, strict=True):
            wrappers = wrapper_notes(offer.plain, (source.url, offer.tensors), (self.target.url, self.tensors))
            notes += [note for note in wrappers if note not in notes]
        notes += [] if only_matched else module_notes(self.target)
        notes += self._scale_notes(only_matched) + self._memory_notes(merged)
        for source in self.sources:
            notes += not_taken(source, (), checkpoint.metadata)
        notes += not_taken(self.target, _outside(self.target), {}) if only_matched else []
        empty = [key for key, tensor in merged.items() if tensor.kind == "meta"]
        notes += [f"without values in the output, as {self.target.url} is on meta: {', '.join(empty)}"] if empty else []
        return checkpoint, _report(rows, notes, self.sources, self.target.url, self._fraction())

    def _refuse_parted(self, casts: set[tuple[str, str]]) -> None:
        for source, offer in zip(self.sources, self.offers, strict=True):
            others = chain(outside(source), *(other.tensors.items() for other in self.offers))
            refuse_parted(offer.tensors, others, casts, source.url)

    def _only_matched(self) -> Checkpoint:
        taken = {key: self.taken[key] for key in self.tensors if key in self.taken}
        node = self.target.at(self.target.root)
        whole: dict[Any, Any] = dict(self.tensors)
        bare = replace(self.target, tree=versioned(whole, node), root=(), metadata={})
        if not taken:
            return replace(bare, tree=ordered_dict({}))
        return bare.with_state_dict(taken)

    def _object_rows(self, fate: str) -> list[Row]:
        """Returns a row for each entry of the target that is no tensor: its ``fate``, whatever a source has."""
        hidden = self.target.hidden()
        rows = []
        for key, (_, value) in self.target.entries().items():
            if isinstance(value, TensorInfo):
                continue
            row = object_row(key, hidden.get(key, ()), fate)
            for number, offer in enumerate(self.offers):
                source = offer.source(key)
                if source is not None:
                    self.used.add((number, source))
                    theirs = dims(offer.tensors[source])
                    detail = "no tensor in the target (uninitialised, or an object)"
                    row = replace(row, reason="mismatched", source=source, source_shape=theirs, detail=detail)
            rows.append(row)
        return rows

    def _unused_rows(self) -> list[Row]:
        """Returns a row for each entry of a source that is not in the output."""
        rows = []
        for number, (source, offer) in enumerate(zip(self.sources, self.offers, strict=True)):
            file = self.files[number]
            known = set(map(offer.plain, self.tensors))
            for name, key in offer.names.items():
                reason: Reason = "ignored"
                if (number, key) in self.used:
                    continue
                if name in known:
                    detail = "an earlier source has it"
                elif not self.chosen(name):
                    detail = "not chosen"
                else:
                    reason, detail = "bookkeeping" if names.is_counter(key) else "unexpected", "absent in the target"
                tensor = offer.tensors[key]
                rows.append(Row(key, reason, dims(tensor), dtype=tensor.dtype, file=file, detail=detail))
            hidden = source.hidden()
            rows += [
                object_row(key, hidden.get(key, ()), "not taken", "no tensor in the source", file)
                for key, (_, value) in source.entries().items()
                if not isinstance(value, TensorInfo)
            ]
        return rows

    def _fraction(self) -> float:
        counted = {key: tensor.numel for key, tensor in self.tensors.items() if not names.is_counter(key)}
        loaded = sum(count for key, count in counted.items() if self.rows[key].reason in LOADED)
        packed = sum(tensor.numel for inner in self.target.hidden().values() for tensor in inner.values())
        return loaded / total if (total := sum(counted.values()) + packed) else float(bool(self.taken))

    def again(self, sources: Sequence[Checkpoint], target: Checkpoint, strip: str, add: str) -> Merge:
        """Returns a merge of these with the same options, and another prefix to strip after those, and to add."""
        return Merge(sources, target, [*self.strip_prefix, strip], add, self.chosen, self.cast, self.same)

    def renamed(self, sources: Sequence[Checkpoint], rename: str) -> Any:
        """Returns what `remap_all` gives of the sources for ``--rename``."""
        from ckptool.ops.remap import remap_all
        from ckptool.ops.rules import parse_option

        return remap_all(sources, parse_option("rename", rename))

    def may_fit(self, key: str, offered: TensorInfo, tensor: TensorInfo) -> bool:
        """Returns whether a source's tensor may be loaded, for a guess."""
        return self.fits(key, offered, tensor)

    def loadable(self) -> int:
        """Returns how many keys `match`, `tie` and `result` would report as loaded. Raises: what they do."""
        self.find()
        self.take(key for group in self.tied() for key in group if key in self.pairs)
        tied = (key for group in self._tied_loaded() for key in group if key in self.left or key not in self.unfit)
        if self.cast:
            self._refuse_parted({(source, self.tensors[key].dtype) for key, (_, source) in self.pairs.items()})
        return len({*self.pairs, *tied})

    def _scale_notes(self, only_matched: bool) -> list[str]:
        """Returns notes on weights of few bits whose values and scales are not of one file."""
        rows = [row for key, row in self.rows.items() if key in self.taken]
        kept = [{str(row.source) for row in rows if row.file in (file, None)} for file in self.files]
        notes = parted_notes([offer.tensors for offer in self.offers], kept)
        return notes or ([] if only_matched else mixed_notes(self.tensors, self.taken.keys() | self.made.keys()))

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
        notes = [f"shared memory in the target, and no longer: {', '.join(group)}" for group in split]
        replaced = {id(self.tensors[key].source) for key in self.taken}
        root = self.target.root
        elsewhere = [
            path_text(path)
            for path, tensor in self.target.tensors()
            if id(tensor.source) in replaced and path[: len(root)] != root
        ]
        if elsewhere:
            notes.append(f"shared memory with the target's weights, and keep the old values: {', '.join(elsewhere)}")
        return notes


class _Offer(NamedTuple):
    """A source's ``tensors``; ``names``: {key as it is compared: key}; ``plain`` takes wrappers off, on both sides."""

    tensors: dict[str, TensorInfo]
    names: dict[str, str]
    plain: Callable[[str], str]

    def source(self, key: str) -> str | None:
        """Returns the source's key that has the name of a key of the target, None if there is none."""
        return self.names.get(self.plain(key))


def _offer(source: Checkpoint, target: Checkpoint, strip: Sequence[str], add: str | None) -> _Offer:
    """Returns what a source has for a target. Raises: UsageError, CollisionError, as `keys.renamed` does."""
    tensors = source.state_dict()
    made = names.renamed(tensors, strip, add, source.url)
    plain = names.looking_through(made, target.entries())
    return _Offer(tensors, {plain(name): key for name, key in made.items()}, plain)


def _like(values: TensorInfo, tensor: TensorInfo) -> TensorInfo:
    """Returns the values as what ``tensor`` is: a parameter or not, of its subclass, with its attributes."""
    extras = _extras(values.extras, tensor)
    return replace(values, requires_grad=tensor.requires_grad, is_parameter=tensor.is_parameter, extras=extras)


def _extras(values: Extras | None, tensor: TensorInfo) -> Extras | None:
    """Returns the attributes of ``tensor`` with the conjugation and negation of the values."""
    if values is None and tensor.extras is None:
        return None
    conj, neg = (values.conj, values.neg) if values else (False, False)
    return replace(tensor.extras or Extras(), conj=conj, neg=neg)


def _why(offered: TensorInfo, tensor: TensorInfo) -> str | None:
    if offered.kind != tensor.kind and (offered.kind, tensor.kind) != ("dense", "meta"):
        return f"{offered.kind} in the source, {tensor.kind} in the target"
    if offered.shape and tensor.shape and offered.shape[::-1] == tensor.shape:
        return "transposed?"
    return None


def _report(
    rows: list[Row], notes: list[str], sources: Sequence[Checkpoint], target: str | None = None, fraction: float = 1.0
) -> FilterReport:
    urls = [source.url for source in sources]
    return FilterReport(rows, counts_of(rows), None, fraction, None, target, urls, notes)
