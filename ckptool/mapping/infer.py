"""Infers the mapping from a source's tensors to a target's, from names, shapes and order."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import exp

from ckptool.core.keys import matches
from ckptool.mapping.matching import copies, layouts, names
from ckptool.mapping.matching.match import Match, Matcher
from ckptool.mapping.matching.sides import Side
from ckptool.mapping.matching.units import QKV, Item, Unit, cut, fold, is_counting, items_of, join_classes, units_of
from ckptool.mapping.pairs import DEFAULT_CONFIDENCE, Doubt, Entry, Inferred, Pair, Sample

_SURE = 0.5
"""The margin of a match that is the default confidence."""

_UNSURE_COPY = 0.1
"""The confidence of a pair from one of two copies that nothing tells apart."""


def infer(
    source: Sequence[Entry],
    target: Sequence[Entry],
    *,
    min_confidence: float = DEFAULT_CONFIDENCE,
    settled: Sequence[Pair] = (),
    layouts: Sequence[str] = (),
    words: bool = True,
    samples: Mapping[str, Sample] | None = None,
) -> Inferred:
    """Returns what of the source becomes each tensor of the target.

    ``settled``: pairs that values or a person settled; they are kept as they are, and speak for others. ``layouts``:
    patterns of the target's keys whose layout is known to be as it was found, see `Pair.unproven`. ``words``: whether
    the table of field words is used. ``samples``: what the source's vectors look like, by key; None: not known. Cost:
    about linear in the keys where blocks repeat; quadratic in the tensors of one shape that do not.
    """
    found = _Proposal(source, target, settled, words, samples)
    kept, doubts = [], []
    for pair in found.pairs():
        known = pair.unproven is None or any(matches(pattern, pair.target) for pattern in layouts)
        if pair.confidence >= min_confidence and (known or pair.unproven != _WOVEN):
            kept.append(pair)
        elif pair.confidence < min_confidence:
            doubts.append(Doubt(pair.target, [pair, *found.others(pair)], _reason(pair)))
        else:
            doubts.append(Doubt(pair.target, [pair], f"{pair.unproven} is not known"))
    met = {pair.target for pair in kept} | {doubt.target for doubt in doubts}
    doubts += [Doubt(key, [], "too many tensors have its shape") for key in found.skipped() if key not in met]
    order = {entry.key: at for at, entry in enumerate(target)}
    kept.sort(key=lambda pair: order[pair.target])
    doubts.sort(key=lambda doubt: order[doubt.target])
    used = {key for pair in kept for key in pair.source}
    met = {pair.target for pair in kept} | {doubt.target for doubt in doubts}
    return Inferred(
        kept, doubts, [entry.key for entry in target if entry.key not in met],
        [entry.key for entry in source if entry.key not in used],
    )  # fmt: skip


def unproven(one: Entry, other: Entry, every: Iterable[Entry]) -> str | None:
    """Returns what names and shapes do not show of a pair of which only a person says that it is one.

    ``every``: the tensors of both sides.
    """
    for item, made in zip(items_of([one]), items_of([other]), strict=False):
        is_rotary = not any(names.says_position(entry.key) for entry in every)
        open_ = _unproven(item, made, {(item.leaf, made.leaf): None})
        return open_ or (_ROTARY if is_rotary and _may_rotate(item, made) else None)
    return None


def _reason(pair: Pair) -> str:
    if said := [name for name in pair.witnesses if not name.endswith("of its shape")]:
        return f"{' and '.join(said)} speak{'s' * (len(said) == 1)} for it, not clearly enough"
    return "nothing but its shape speaks for it"


@dataclass(slots=True)
class _Part:
    """A piece of a target, or all of it, with what it is made of, and the match of their units."""

    item: Item
    made: Item
    match: Match


class _Proposal:
    """All pairs that were found, however uncertain."""

    def __init__(
        self,
        source: Sequence[Entry],
        target: Sequence[Entry],
        settled: Sequence[Pair],
        words: bool,
        samples: Mapping[str, Sample] | None,
    ) -> None:
        self._source, self._target = source, target
        self._settled = {pair.target: pair for pair in settled}
        self._shapes = {entry.key: entry.shape for entry in target}
        self._is_rotary = not any(names.says_position(entry.key) for side in (source, target) for entry in side)
        ours, theirs = items_of(source), items_of(target)
        join_classes(ours, theirs)
        ours, theirs = cut(ours, theirs, words), cut(theirs, ours, words)
        have, want = Counter(item.kind for item in ours), Counter(item.kind for item in theirs)
        lacking = [1 - (have & want).total() / max(1, side.total()) for side in (have, want)]
        kinds = have.keys() & want.keys()
        one, other = (units_of([item for item in side if item.kind in kinds], words) for side in (ours, theirs))
        one, self._unsure = copies.single(one, other)
        other, self._open = copies.single(other, one)
        copies.turned(one, other)
        self._one, self._other = fold(one, other)
        self._matches: list[Match] = []
        self._skipped: list[int] = []
        self._turned: Mapping[tuple[str, str], bool | None] = {}
        if self._one and self._other:
            ours_listed, theirs_listed = ([entry.key for entry in side] for side in (source, target))
            matcher = Matcher(Side(self._one, ours_listed), Side(self._other, theirs_listed), words, lacking, samples)
            self._matches = matcher.run(self._settled_units())
            self._skipped = matcher.skipped

    def skipped(self) -> list[str]:
        """Returns the targets of which there are too many of one shape to tell them apart."""
        units = (self._other[at] for at in self._skipped)
        return list(dict.fromkeys(item.key for unit in units for copy in unit.copies for item in copy.values()))

    def _settled_units(self) -> list[tuple[int, int]]:
        """Returns the pairs of units of which settled pairs speak, where those of their copies agree."""
        ours, theirs = _places(self._one), _places(self._other)
        votes: dict[int, Counter[int]] = defaultdict(Counter)
        for pair in self._settled.values():
            for key in pair.source:
                for v, copy in theirs.get(pair.target, ()):
                    votes[v].update(u for u, place in ours.get(key, ()) if place == copy)
        found: dict[int, int] = {}
        for v, counted in votes.items():
            u, count = counted.most_common(1)[0] if counted else (-1, 0)
            if u >= 0 and u not in found and 2 * count > sum(counted.values()):
                found[u] = v
        return list(found.items())

    def pairs(self) -> list[Pair]:
        """Returns a pair for every target that has one, the settled ones as they are."""
        parts: dict[str, list[_Part]] = defaultdict(list)
        for match in self._matches:
            one, other = self._one[match.one], self._other[match.other]
            if one.position in self._unsure or other.position in self._open:
                match.margin = min(match.margin, _SURE * _UNSURE_COPY)
            for copy, twin in zip(one.copies, other.copies, strict=False):
                for item, made in _paired(copy, twin):
                    parts[made.key].append(_Part(item, made, match))
        self._turned = _turned(part for some in parts.values() for part in some)
        found = [pair for key, some in parts.items() if (pair := self._composed(key, some))]
        taken = defaultdict[str, set[str]](set)
        for pair in self._settled.values():
            for key in pair.source:
                taken[key].add(pair.op)
        known = [
            pair for pair in found
            if pair.target not in self._settled and all(_is_free(pair.op, taken.get(key)) for key in pair.source)
        ]  # fmt: skip
        known += self._settled.values()
        return known + self._counters(known)

    def others(self, pair: Pair) -> list[Pair]:
        """Returns what else a pair's target could be made of, best first: single tensors only."""
        if pair.target not in self._whole:
            return []
        match, at, role, made = self._whole[pair.target]
        found = [self._rival(self._one[rival], at, role, made) for rival in match.rivals]
        return [rival for rival in found if rival is not None]

    @cached_property
    def _whole(self) -> dict[str, tuple[Match, int, str, Item]]:
        """Returns {target that is not made of pieces: its match, the copy and the role that it has there}."""
        return {
            made.key: (match, at, role, made)
            for match in self._matches for at, twin in enumerate(self._other[match.other].copies)
            for role, made in twin.items() if not made.piece
        }  # fmt: skip

    def _rival(self, unit: Unit, at: int, role: str, made: Item) -> Pair | None:
        copy = unit.copies[at] if at < len(unit.copies) else {}
        item = next(iter(copy.values())) if len(copy) == 1 else copy.get(role)
        if item is None or item.piece:
            return None
        op = self._op(item, self._shapes[made.key], made.leaf) or "rename"
        return Pair(made.key, [item.key], op, 0.0, unproven=self._unproven(item, made))

    def _composed(self, key: str, parts: list[_Part]) -> Pair | None:
        """Returns the pair of a target that is made of these parts, if they make all of it in one way."""
        matches = [part.match for part in parts]
        confidence = _scaled(min(match.margin for match in matches))
        witnesses = [name for name in matches[0].witnesses if all(name in match.witnesses for match in matches[1:])]
        unproven = next((text for part in parts if (text := self._unproven(part.item, part.made))), None)
        if len(parts) == 1 and not parts[0].made.piece:
            item = parts[0].item
            if (op := self._op(item, self._shapes[key], parts[0].made.leaf)) is None:
                return None
            whole = ";".join(step for step in (item.piece, op) if step) or "rename"
            return Pair(key, [item.key], whole, confidence, witnesses, unproven)
        parts.sort(key=lambda part: part.made.number)
        if [part.made.number for part in parts] != list(range(parts[0].made.count)):
            return None
        each = [(part.item.piece, self._op(part.item, part.made.shape, part.made.leaf)) for part in parts]
        ops = {";".join(filter(None, steps)) for steps in each}
        if len(ops) > 1 or any(op is None for _, op in each):
            return None
        op = ";".join(step for step in (ops.pop(), f"concat:{parts[0].made.dim}") if step)
        return Pair(key, [part.item.key for part in parts], op, confidence, witnesses, unproven)

    def _unproven(self, item: Item, made: Item) -> str | None:
        """Returns what names and shapes do not show of what is made of an item."""
        return _unproven(item, made, self._turned) or (_ROTARY if self._is_rotary and _may_rotate(item, made) else None)

    def _op(self, item: Item, shape: Sequence[int], leaf: str) -> str | None:
        return layouts.op_of(item.shape, shape, self._turned.get((item.leaf, leaf)))

    def _counters(self, pairs: Sequence[Pair]) -> list[Pair]:
        """Returns pairs of counters, which follow the other tensors of their module."""
        known = {pair.target for pair in pairs}
        modules: dict[str, Pair] = {}
        for pair in pairs:
            modules.setdefault(pair.target.rpartition(".")[0], pair)
        counters: dict[str, list[str]] = defaultdict(list)
        for entry in self._source:
            if is_counting(entry):
                counters[entry.key.rpartition(".")[0]].append(entry.key)
        found = []
        for entry in self._target:
            moved = modules.get(entry.key.rpartition(".")[0])
            if is_counting(entry) and moved and entry.key not in known:
                here = counters.get(moved.source[0].rpartition(".")[0], [])
                if len(here) == 1:
                    found.append(replace(moved, target=entry.key, source=here, op="rename", unproven=None))
        return found


def _is_free(op: str, taken: set[str] | None) -> bool:
    """Returns whether nothing of a source is taken by these operations, or other pieces of it than ``op`` takes."""
    return not taken or (op not in taken and all("split:" in one or "slice:" in one for one in (op, *taken)))


def _places(units: Sequence[Unit]) -> dict[str, list[tuple[int, int]]]:
    """Returns {key: the unit and the copy in it that hold it}."""
    found: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for at, unit in enumerate(units):
        for copy, items in enumerate(unit.copies):
            for item in items.values():
                found[item.key].append((at, copy))
    return found


def _paired(copy: Mapping[str, Item], twin: Mapping[str, Item]) -> list[tuple[Item, Item]]:
    """Returns the tensors of two layers that correspond: of one role, or the only ones of their kind that are left."""
    if len(copy) == len(twin) == 1:
        return list(zip(copy.values(), twin.values(), strict=True))
    found = [(copy[role], twin[role]) for role in twin if role in copy and copy[role].kind == twin[role].kind]
    ours = [item for role, item in copy.items() if role not in twin]
    theirs = [item for role, item in twin.items() if role not in copy]
    for made in theirs:
        fitting = [item for item in ours if item.kind == made.kind]
        if len(fitting) == 1 and sum(other.kind == made.kind for other in theirs) == 1:
            found.append((fitting[0], made))
    return found


def _turned(parts: Iterable[_Part]) -> dict[tuple[str, str], bool | None]:
    """Returns, per pair of leaves, whether those of their matrices that are not square are transposed; None: some."""
    votes: dict[tuple[str, str], set[bool]] = defaultdict(set)
    for part in parts:
        one, other = layouts.solid(part.item.shape), layouts.solid(part.made.shape)
        if len(one) == len(other) == 2 and one[0] != one[1]:
            votes[part.item.leaf, part.made.leaf].add(one != other)
    return {leaves: found == {True} if len(found) == 1 else None for leaves, found in votes.items()}


_WOVEN = "whether the rows of q, k and v lie one behind the other or head by head"

_ROTARY = "whether rotary heads lie in two halves or in pairs of rows"


def _may_rotate(item: Item, made: Item) -> bool:
    """Returns whether this is a projection to queries or keys, in a module that another code base names otherwise."""
    if names.projection(names.segment(made.path[-1] if made.path else "")) not in ("query", "key"):
        return False
    ours, theirs = ([text.lower() for text in one.path[-3:]] for one in (item, made))
    return ours != theirs


def _unproven(item: Item, made: Item, turned: Mapping[tuple[str, str], bool | None]) -> str | None:
    """Returns what names and shapes do not show of what is made of an item, positions aside."""
    for one in (item, made):
        if one.piece and one.path[-1] in QKV and not names.is_in_proj(one.path[:-1]):
            return _WOVEN
    shape = layouts.solid(item.shape)
    is_square = len(shape) == 2 and shape[0] == shape[1] and layouts.solid(made.shape) == shape
    leaves = item.leaf, made.leaf
    if is_square and turned.get(leaves) is None and (leaves in turned or leaves[0] != leaves[1]):
        return "whether the square matrix is transposed"
    if is_square and turned.get(leaves):
        return "whether the square matrix is transposed, as others of these names are"
    return None


def _scaled(margin: float) -> float:
    """Returns a margin as a confidence from 0 to 1."""
    if margin < _SURE:
        return max(0.0, margin / _SURE * DEFAULT_CONFIDENCE)
    return 1 - (1 - DEFAULT_CONFIDENCE) * exp((_SURE - margin) / _SURE)
