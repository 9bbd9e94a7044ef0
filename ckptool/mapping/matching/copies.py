"""What must be known before units are matched: second copies of a model, and blocks that are numbered backwards."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterator, Sequence
from itertools import combinations, product

from ckptool.mapping.matching import names
from ckptool.mapping.matching.units import Unit

AVERAGES = frozenset({"ema", "avg", "average", "averaged", "shadow", "teacher", "momentum", "swa"})
"""Words for a running average of the weights. The model itself is the copy without them."""

_LEAST = 6
"""Copies of fewer units are no second model."""

_MOST = 1 << 14
"""Most pairs of modules, or of numbered families, that are compared: no model has so many copies."""


def single(units: list[Unit], others: list[Unit]) -> tuple[list[Unit], set[int]]:
    """Returns the units without second copies of a model that the other side has once.

    Where nothing tells which copy is meant, the first is kept, and its units' positions are returned as uncertain.
    """
    uncertain: set[int] = set()
    there = Counter(unit.main.kind for unit in others)
    for copies in _copies(units):
        inside = [[unit for unit in units if unit.path[: len(path)] == path] for path in copies]
        if not all(inside):  # one of them went as a copy of another
            continue
        kinds = Counter(unit.main.kind for unit in inside[0])
        here = Counter(unit.main.kind for unit in units)
        repeated = sum(here[kind] >= (len(copies) - 0.5) * there[kind] for kind in kinds)
        if repeated < 0.8 * len(kinds) or not any(there[kind] for kind in kinds):
            continue
        words = {word for unit in others for word in names.words_of(unit.segments)}
        own = [set(names.words_of(inside[at][0].segments[: len(path)])) for at, path in enumerate(copies)]
        kept = _meant(own, words)
        if kept is None:
            kept = 0
            uncertain.update(unit.position for unit in inside[0])
        gone = {id(unit) for at, some in enumerate(inside) if at != kept for unit in some}
        units = [unit for unit in units if id(unit) not in gone]
    return units, uncertain


def _meant(own: Sequence[set[str]], words: set[str]) -> int | None:
    """Returns which copy is meant by the words that only it has, if one is."""
    only = [said - set().union(*(other for other in own if other is not said)) for said in own]
    known = [at for at, said in enumerate(only) if said and said <= words]
    if len(known) == 1 and not any(said & words for at, said in enumerate(only) if at != known[0]):
        return known[0]
    plain = [at for at, said in enumerate(own) if not said & AVERAGES]
    return plain[0] if len(plain) == 1 and not known else None


def _copies(units: Sequence[Unit]) -> Iterator[list[tuple[str, ...]]]:
    """Yields prefixes that are told apart by words and hold nearly the same, the outermost first."""
    for depth in (1, 2):
        below: dict[tuple[str, ...], list[Unit]] = defaultdict(list)
        for unit in units:
            if len(unit.path) > depth:
                below[unit.path[:depth]].append(unit)
        inventories: dict[tuple[str, ...], set[Hashable]] = {}
        for path, inside in below.items():
            inner = _wrapped(inside, depth)
            inventories[path] = {(unit.path[inner:], unit.main.kind) for unit in inside}
        large = [path for path, held in inventories.items() if len(held) >= _LEAST]
        found: list[list[tuple[str, ...]]] = []
        for one, other in combinations(large, 2) if len(large) ** 2 <= _MOST else ():
            if one[:-1] != other[:-1] or names.segment(one[-1]).stem == names.segment(other[-1]).stem:
                continue
            both = len(inventories[one] & inventories[other])
            if both >= 0.8 * max(len(inventories[one]), len(inventories[other])):
                group = next((group for group in found if one in group), None)
                if group is None:
                    found.append([one, other])
                elif other not in group:
                    group.append(other)
        if found:
            yield from found
            return


def _wrapped(units: Sequence[Unit], depth: int) -> int:
    """Returns how many segments all of these units begin with: a copy may lie in a wrapper of its own."""
    while all(len(unit.path) > depth + 1 and unit.path[depth] == units[0].path[depth] for unit in units):
        depth += 1
    return depth


def turned(source: list[Unit], target: list[Unit]) -> None:
    """Numbers the target's blocks backwards where what lies in one block only, on both sides, runs backwards."""
    ours, theirs = _families(source), _families(target)
    if len(ours) * len(theirs) > _MOST:
        return
    held, there = ({name: _held(family) for name, family in side.items()} for side in (ours, theirs))
    words = [
        {(path, stem): set(names.words_of(map(names.segment, (*path, stem)))) for path, stem in side}
        for side in (ours, theirs)
    ]
    alike = {}
    for one, other in product(ours, theirs):
        mine, others, said, heard = held[one], there[other], words[0][one], words[1][other]
        shared = len(mine & others) / len(mine | others) + 0.5 * len(said & heard) / max(1, len(said | heard))
        alike[one, other] = shared - names.opposed(said, heard)
    rows = {one: max(alike[one, other] for other in theirs) for one in ours if theirs}
    columns = {other: max(alike[one, other] for one in ours) for other in theirs if ours}
    for (one, other), rate in alike.items():
        if rate >= max(rows[one], columns[other]) and _runs_backwards(ours[one], theirs[other]):
            _turn(target, *other)


Family = dict[int, Counter[Hashable]]
"""What each of numbered siblings holds, by its number."""

_NEARLY_ALL = 0.95


def _families(units: Sequence[Unit]) -> dict[tuple[tuple[str, ...], str], Family]:
    found: dict[tuple[tuple[str, ...], str], Family] = defaultdict(lambda: defaultdict(Counter))
    for unit in units:
        for depth, part in enumerate(unit.segments[:-1]):
            if part.number >= 0:
                found[unit.path[:depth], part.stem][part.number][unit.main.kind] += 1
                break
    return {key: family for key, family in found.items() if len(family) > 1}


def _held(family: Family) -> set[tuple[Hashable, int]]:
    """Returns what all siblings hold together."""
    held: Counter[Hashable] = Counter()
    for one in family.values():
        held.update(one)
    return set(held.items())


def _runs_backwards(mine: Family, theirs: Family) -> bool:
    """Returns whether what siblings hold fits nearly all of the others read backwards, and less read forwards."""
    if len(mine) != len(theirs):
        return False
    ours, others = ([family[number] for number in sorted(family)] for family in (mine, theirs))
    ahead, back = (sum(map(_shared, ours, read)) for read in (others, others[::-1]))
    return back >= _NEARLY_ALL * len(ours) and back > ahead


def _shared(one: Counter[Hashable], other: Counter[Hashable]) -> float:
    return (one & other).total() / (one | other).total()


def _turn(units: list[Unit], prefix: tuple[str, ...], stem: str) -> None:
    depth = len(prefix)
    inside = [
        unit for unit in units
        if len(unit.path) > depth and unit.path[:depth] == prefix
        and unit.segments[depth].stem == stem and unit.segments[depth].number >= 0
    ]  # fmt: skip
    numbers = {unit.segments[depth].number for unit in inside}
    for unit in inside:
        part = unit.segments[depth]
        unit.segments = (
            *unit.segments[:depth], part._replace(number=max(numbers) + min(numbers) - part.number),
            *unit.segments[depth + 1 :],
        )  # fmt: skip
