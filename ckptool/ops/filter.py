"""What of one checkpoint fits another: the merged dictionary, and a reason for every key."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ckptool.core import keys as names
from ckptool.core import modules, optimizers
from ckptool.core.checkpoint import Checkpoint
from ckptool.core.dtypes import DTYPES
from ckptool.core.tensor import Derived, Extras, Opaque, Storage, TensorInfo, contiguous_stride
from ckptool.core.tree import as_mapping, ordered_dict, path_text, walk
from ckptool.errors import CollisionError, LossError, NoTensorsError, UsageError, listed
from ckptool.ops.diff import no_tensors

Reason = Literal[
    "loaded", "cast", "tied", "adapted", "initialised", "mismatched", "missing", "unexpected", "bookkeeping", "ignored"
]
"""`filter` itself adapts and initialises nothing: those are `ops.load_partial`'s."""

LOADED: tuple[Reason, ...] = ("loaded", "cast", "tied", "adapted")
"""The reasons under which a key of the target has the source's values."""

Same = Callable[[TensorInfo, TensorInfo], bool]


@dataclass(frozen=True, slots=True)
class Row:
    """One key and its fate. ``source`` is the key it was matched with, ``file`` the source it is about.

    ``key`` and ``shape`` are the target's, for unexpected and ignored keys of a source that source's.
    ``dtype`` is what is written, ``source_dtype`` the source's where they differ or differed. ``tensors`` counts
    those inside an entry that is no tensor itself: packed parameters, extra state.
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
    """``rows``: one per key of the target, then one per key of a source that found no place.

    ``loaded_fraction`` is the share of the target's elements (counters aside) that have the sources' values.
    ``hint`` is the best prefix hypothesis where it would match more. ``output`` is filled in when saved, and so is
    ``overflowed``: {key: finite values that a cast made infinite}, None where there are none.
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
    same: Same,
) -> tuple[Checkpoint, FilterReport]:
    """Returns (checkpoint, report); ``same`` is asked whether two tensors hold the same bytes.

    Raises: NoTensorsError for an empty side or an empty selection, CollisionError, UsageError.
    """
    if not sources:
        raise UsageError("no source to filter")
    for checkpoint in (*sources, *([target] if target else ())):
        if not checkpoint.state_dict():
            raise NoTensorsError(no_tensors(checkpoint), checkpoint.url)
    if target is None:
        if strip_prefix or add_prefix or only_matched or cast:
            raise UsageError("--strip-prefix, --add-prefix, --only-matched and --cast need --match")
        return _select(sources, names.chooser(include, exclude), [*include, *exclude])
    merge = Merge(sources, target, strip_prefix, add_prefix, names.chooser(include, exclude), cast)
    merge.match()
    merge.tie(same)
    return merge.result(only_matched, [*include, *exclude])


# --- selection by patterns ---------------------------------------------------------------------------------------


def _select(
    sources: Sequence[Checkpoint], chosen: Callable[[str], bool], patterns: Sequence[str]
) -> tuple[Checkpoint, FilterReport]:
    kept: dict[str, TensorInfo] = {}
    rows: list[Row] = []
    everything: list[str] = []
    several = len(sources) > 1
    for checkpoint in sources:
        file = checkpoint.url if several else None
        hidden = checkpoint.hidden()
        for key, (_, value) in checkpoint.entries().items():
            if not isinstance(value, TensorInfo):
                count = len(hidden[key]) if key in hidden else None
                detail = "stays where it is"
                detail = f"{_held(hidden[key])}: {detail}" if key in hidden else f"no tensor: {detail}"
                rows.append(Row(key, "ignored", None, file=file, detail=detail, tensors=count))
                continue
            everything.append(key)
            shape = dims(value)
            if not chosen(key):
                rows.append(Row(key, "ignored", shape, dtype=value.dtype, file=file))
            elif key in kept:
                rows.append(Row(key, "ignored", shape, file=file, detail="an earlier source has it"))
            else:
                kept[key] = value
                rows.append(Row(key, "loaded", shape, dtype=value.dtype, file=file))
    if not kept:
        raise NoTensorsError(f"the patterns choose none of {len(everything)} tensors", sources[0].url)
    base = sources[0]
    notes = root_notes(sources)
    notes += [f"{pattern} fits no key" for pattern in names.unused_patterns(patterns, everything)]
    if len(kept) != len(base.state_dict()):
        notes += optimizer_notes(base)
    merged = base.with_state_dict(kept)
    notes += _module_notes(base)
    return merged, _report(rows, 1.0, None, [c.url for c in sources], None, notes)


# --- merging into a target ---------------------------------------------------------------------------------------


class Merge:
    """The matching of sources with a target, key by key; then ties; then the merged checkpoint."""

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
        self.rows: dict[str, Row] = {}
        self.taken: dict[str, TensorInfo] = {}
        self.made: dict[str, TensorInfo] = {}
        """Values that come from no source, for keys that took none."""
        self.used: set[tuple[int, str]] = set()
        self.uncastable: list[str] = []
        self.refused: list[Row] = []
        self.objects: set[str] = set()
        self._storages: dict[tuple[int, str], Storage] = {}
        self._casts: dict[tuple[object, str], Derived] = {}

    def match(self) -> None:
        """Decides for each key of the target which source it takes, if any."""
        for key, tensor in self.tensors.items():
            if not self.chosen(key):
                self.rows[key] = Row(
                    key, "ignored", dims(tensor), self._mark_used(key), dtype=tensor.dtype, detail="not chosen"
                )
                continue
            self.rows[key] = self._match_one(key, tensor)
        if self.uncastable:
            raise LossError(f"--cast cannot convert {listed(self.uncastable, 20)}", self.target.url)

    def _mark_used(self, key: str) -> str | None:
        """Accounts for a key in every source that has it; returns how the first of them spells it."""
        found = [
            (number, plain[self.plain[key]])
            for number, (plain, _) in enumerate(self.offers)
            if self.plain[key] in plain
        ]
        self.used.update(found)
        return found[0][1] if found else None

    def _match_one(self, key: str, tensor: TensorInfo) -> Row:
        shape = dims(tensor)
        refused: list[Row] = []
        row: Row | None = None
        for number, (plain, tensors) in enumerate(self.offers):
            found = plain.get(self.plain[key])
            if found is None or row is not None:
                continue  # what later sources have under a name that is taken is accounted for in `_unplaced`
            offered = tensors[found]
            file = self.sources[number].url if len(self.sources) > 1 else None
            self.used.add((number, found))
            theirs = dims(offered)
            if not self.fits(key, offered, tensor):
                why = _why(offered, tensor)
                refused.append(Row(key, "mismatched", shape, found, theirs, tensor.dtype, file=file, detail=why))
                continue
            self.taken[key] = self._placed(key, offered, tensor)
            written = self.taken[key].dtype
            row = Row(key, "loaded", shape, found, theirs, written, file=file)
            if offered.dtype != tensor.dtype:
                kept = written == offered.dtype
                source_dtype, detail = (None, f"{tensor.dtype} in the target") if kept else (offered.dtype, None)
                row = replace(row, reason="cast", source_dtype=source_dtype, detail=detail)
        if row is None:
            row = refused.pop(0) if refused else None
        self.refused += [
            Row(str(other.source), "ignored", other.source_shape, file=other.file, detail="its shape does not fit")
            for other in refused
        ]
        if row is not None:
            return row
        reason: Reason = "bookkeeping" if names.is_counter(key) else "missing"
        return Row(key, reason, shape, dtype=tensor.dtype, detail="absent in the source")

    def _placed(self, key: str, offered: TensorInfo, tensor: TensorInfo) -> TensorInfo:
        """Returns the source's values in the target's place: its shape of a counter, its device, its class."""
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
        """Lets tied keys of the target share what any of them took; refuses two different values for one tensor."""
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
            made: dict[int, TensorInfo] = {}  # names for one object in the target stay names for one object
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
        """Returns whether a source's tensor can take the place of the target's at ``key``."""
        return _fits(key, offered, tensor)

    def tied(self) -> list[list[str]]:
        """Returns the groups of the target's keys that are one tensor."""
        return self.target.shared()

    def result(self, only_matched: bool, patterns: Sequence[str]) -> tuple[Checkpoint, FilterReport]:
        """Returns the merged checkpoint and the report."""
        merged = {key: self.taken.get(key) or self.made.get(key, tensor) for key, tensor in self.tensors.items()}
        checkpoint = self._only_matched() if only_matched else self.target.with_state_dict(merged)
        rows = [*self.rows.values(), *self._others(), *self.refused, *self._unplaced()]
        known = [*self.tensors, *(key for plain, _ in self.offers for key in plain)]
        notes = root_notes([*self.sources, self.target])
        notes += [f"{pattern} fits no key" for pattern in names.unused_patterns(patterns, known)]
        notes += self._wrapper_notes() + (_module_notes(self.target) if not only_matched else [])
        notes += self._separated(merged)
        report = _report(rows, self._fraction(), self._hint(), [c.url for c in self.sources], self.target.url, notes)
        return checkpoint, report

    def _only_matched(self) -> Checkpoint:
        taken = {key: self.taken[key] for key in self.tensors if key in self.taken}
        node = self.target.at(self.target.root)
        if modules.is_module(node):
            versions: Any = modules.metadata(node)
        else:
            state = getattr(node, "state", None)
            versions = state.get("_metadata") if isinstance(state, dict) else None
        whole: dict[Any, Any] = dict(self.tensors)
        bare = replace(self.target, tree=ordered_dict(whole, versions), root=(), metadata={})
        if not taken:
            return replace(bare, tree=ordered_dict({}))
        return bare.with_state_dict(taken)

    def _others(self) -> list[Row]:
        """Returns a row for each entry of the target that is no tensor: it stays, whatever a source has."""
        hidden = self.target.hidden()
        rows = []
        for key, (_, value) in self.target.entries().items():
            if isinstance(value, TensorInfo):
                continue
            row = Row(key, "ignored", None, detail="no tensor: the target's stays")
            if key in hidden:
                row = replace(row, tensors=len(hidden[key]), detail=f"{_held(hidden[key])}: the target's stays")
            for number, (plain, tensors) in enumerate(self.offers):
                found = plain.get(names.unwrapped(key), plain.get(key))
                if found is not None:
                    self.used.add((number, found))
                    self.objects.add(names.unwrapped(key))
                    theirs = dims(tensors[found])
                    detail = "no tensor in the target (uninitialised, or an object)"
                    row = replace(row, reason="mismatched", source=found, source_shape=theirs, detail=detail)
            rows.append(row)
        return rows

    def _unplaced(self) -> list[Row]:
        """Returns a row for each key of a source that went nowhere."""
        known = set(self.plain.values()) | self.objects
        rows = []
        for number, (source, (plain, tensors)) in enumerate(zip(self.sources, self.offers, strict=True)):
            file = source.url if len(self.sources) > 1 else None
            for name, key in plain.items():
                tensor = tensors[key]
                row = Row(key, "unexpected", dims(tensor), dtype=tensor.dtype, file=file)
                if name in known:
                    if (number, key) not in self.used:
                        rows.append(replace(row, reason="ignored", detail="an earlier source has it"))
                elif not self.chosen(name):
                    rows.append(replace(row, reason="ignored", detail="not chosen"))
                else:
                    reason: Reason = "bookkeeping" if names.is_counter(key) else "unexpected"
                    rows.append(replace(row, reason=reason, detail="absent in the target"))
            hidden = source.hidden()
            for key, (_, value) in source.entries().items():
                if key in hidden:
                    detail = f"{_held(hidden[key])}: not taken"
                    rows.append(Row(key, "ignored", None, file=file, detail=detail, tensors=len(hidden[key])))
                elif not isinstance(value, TensorInfo):
                    rows.append(Row(key, "ignored", None, file=file, detail="no tensor in the source: not taken"))
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
        doing = {(True, True): f"replacing {strip!r} by {add!r}", (True, False): f"stripping {strip!r}"}
        words = doing.get((bool(strip), bool(add)), f"adding {add!r}")
        options = " ".join(f"--{name}-prefix {value}" for name, value in (("strip", strip), ("add", add)) if value)
        return f"{words} would match {count} of {len(self.tensors)} ({options})"

    def _wrapper_notes(self) -> list[str]:
        own = names.looked_through(list(self.tensors))
        notes = []
        for source, (_, tensors) in zip(self.sources, self.offers, strict=True):
            theirs = names.looked_through(list(tensors))
            if theirs != own:
                sides = ((theirs, source.url), (own, self.target.url))
                notes += [f"looked through {prefix!r} in {url}" for prefix, url in sides if prefix]
        return list(dict.fromkeys(notes))

    def _separated(self, merged: Mapping[str, TensorInfo]) -> list[str]:
        """Says what shared memory with the target's weights and no longer does: other views, other places."""
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
    """Returns ({key as it is matched: key in the source}, the source's tensors). Raises: CollisionError."""
    tensors = source.state_dict()
    return names.plain_keys(tensors, strip, add, source.url), tensors


def _fits(key: str, offered: TensorInfo, tensor: TensorInfo) -> bool:
    if offered.form == tensor.form:
        return True
    return names.is_counter(key) and {offered.form, tensor.form} <= {("dense", ()), ("dense", (1,))}


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


def _held(inner: Mapping[str, TensorInfo]) -> str:
    return f"an object with {len(inner)} tensor{'s' * (len(inner) > 1)}"


def dims(tensor: TensorInfo) -> list[int] | None:
    """Returns a tensor's shape for a report."""
    return None if tensor.shape is None else list(tensor.shape)


def root_notes(checkpoints: Sequence[Checkpoint]) -> list[str]:
    """Returns where the weights were found, for each checkpoint in which that is not the top."""
    found = [(checkpoint.url, path_text(checkpoint.root)) for checkpoint in checkpoints]
    return list(dict.fromkeys(f"the weights of {url} are at {root}" for url, root in found if root))


def _module_notes(checkpoint: Checkpoint) -> list[str]:
    if not modules.is_module(checkpoint.at(checkpoint.root)):
        return []
    return [f"{checkpoint.url} is a whole-model pickle: the output holds its state_dict, without class and attributes"]


def optimizer_notes(checkpoint: Checkpoint) -> list[str]:
    """Returns a line about an optimizer state that goes by position, which dropped or reshaped keys put out of step."""
    for path, node in walk(checkpoint.tree, closed=optimizers.is_optimizer):
        state = as_mapping((as_mapping(node) or {}).get("state")) if optimizers.is_optimizer(node) else None
        if state and any(isinstance(key, int) for key in state):
            where = path_text(path)
            return [f"{where} goes by position: with keys dropped it no longer lines up with the weights"]
    return []


def _report(
    rows: list[Row], fraction: float, hint: str | None, sources: list[str], target: str | None, notes: list[str]
) -> FilterReport:
    counts: dict[str, int] = dict(Counter(row.reason for row in rows))
    return FilterReport(rows, counts, None, fraction, hint, target, sources, notes)
