"""One side of a match: its units with their words, numbers, parents and order."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Hashable, Sequence
from itertools import pairwise
from math import log
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ckptool.mapping.matching import names
from ckptool.mapping.matching.names import Segment
from ckptool.mapping.matching.units import Unit

Array = NDArray[np.float64]
Numbers = NDArray[np.int64]
Flags = NDArray[np.bool_]

_FARTHER = 0.7
"""What a parent counts for, as a share of what the next inner one counts for."""

_NEAREST = 16
"""Most modules above a unit that are looked at: the innermost, and the root."""

_WORDS = 32
"""Most words of a name that are looked at: the last."""

_WHOLE = 0.98
"""The share of a side's units from which on a module is the whole model: that both are in it says nothing."""

_SORTED = 0.98
"""The share of neighbouring keys in alphabetical order from which a listing says nothing about order."""


class Side:
    """The units of one side. ``keys``: all its keys as they were listed.

    What a unit has in common with many others is held once, and the unit has its number: ``names`` (the words of a
    name), ``chain`` (the modules above it).
    """

    def __init__(self, units: Sequence[Unit], keys: Sequence[str]) -> None:
        self.units = units
        self._read_words()
        self._read_parents()
        self._read_segments()
        self.numbers = _numbers(units)
        self.places = _places(units)
        self.shortcut = np.array([bool(names.SHORTCUT.intersection(said)) for said in self.words])
        self.keys = ["/".join(("", *unit.main.path, unit.main.leaf)) for unit in self.units]
        self.position = np.array([unit.position for unit in units])
        listed = np.argsort(self.position, kind="stable")
        self.before, self.after = np.full((2, len(units)), -1)
        self.after[listed[:-1]], self.before[listed[1:]] = listed[1:], listed[:-1]
        rising = sum(a <= b for a, b in pairwise(keys))
        self.alphabetical = len(keys) > 8 and rising >= _SORTED * (len(keys) - 1)
        self._compared: dict[int, tuple[int, bool]] = {}

    def _read_words(self) -> None:
        """Sets the vocabulary, the words of each name as numbers in it, and their weights: rare words count more.

        ``said`` and ``weights`` have a row for each name, as long as the longest; what is behind its last word is the
        number behind those of all words, of no weight.
        """
        self.words = [names.words_of(unit.segments)[-_WORDS:] for unit in self.units]
        number = {word: at for at, word in enumerate(dict.fromkeys(word for said in self.words for word in said))}
        self.number = number
        self.vocabulary = list(number)
        known: dict[tuple[str, ...], int] = {}
        self.names = np.array([known.setdefault(said, len(known)) for said in self.words])
        self.said = padded([[number[word] for word in said] for said in known], len(number))
        frequency = Counter(word for said in self.words for word in said)
        self.frequency = np.array([frequency[word] for word in number]) / len(self.units)
        rarity = np.array([*(log(1 + len(self.units) / frequency[word]) for word in number), 0.0])
        self.weights = rarity[self.said]
        self.weights /= float(self.weights.sum(1)[self.names].mean()) or 1.0

    def _read_parents(self) -> None:
        """Sets the path of each unit as modules, and the modules above it, the innermost first.

        ``path`` has a row for each unit, with -1 behind its end. ``chains`` and ``shares`` (what each module above
        counts for) have a row for each chain; behind its end is the number behind those of all modules.
        """
        below: dict[tuple[int, str], int] = {}
        texts, numbers, template = [""], {"": 0}, [0]
        paths: list[list[int]] = []
        for unit in self.units:
            node, path = 0, []
            for text, part in zip(unit.path, unit.segments, strict=True):
                above, node = node, below.setdefault((node, text), len(texts))
                if node == len(texts):
                    texts.append(f"{texts[above]}/{part.stem}" if above else part.stem)
                    template.append(numbers.setdefault(texts[-1], len(numbers)))
                path.append(node)
            paths.append(path)
        self.nodes, self.templates = len(texts), len(numbers)
        self._template = np.array(template)  # of each module, the number of its name without numbers
        self.path, self._depth = padded(paths, -1), np.array([*map(len, paths)])
        chains: dict[tuple[int, ...], int] = {}
        above_each = ((*path[-2::-1][: _NEAREST - 1], 0) for path in paths)
        self.chain = np.array([chains.setdefault(chain, len(chains)) for chain in above_each])
        self.chains = padded(chains, self.nodes)
        self.shares = np.where(self.chains < self.nodes, _FARTHER ** np.arange(self.chains.shape[1]), 0)
        self.shares /= self.shares.sum(1, keepdims=True)
        held = np.bincount(self.chains[self.chain].ravel(), minlength=self.nodes + 1)
        self.inside = self.shares * (held < _WHOLE * len(self.units))[self.chains]

    def _read_segments(self) -> None:
        """Sets the segments of each path as numbers, and which of them are places in a list."""
        known: dict[Segment, int] = {}
        rows = [[known.setdefault(part, len(known)) for part in unit.segments] for unit in self.units]
        self._segments, self._parts = padded(rows, 0), [*known]
        self._is_index = np.array([part.stem == "" and part.number >= 0 for part in known])

    def orders(self, ours: Numbers) -> Orders:
        """Returns what puts one before the other, for every two of these units."""
        position = self.position[ours]
        listed = np.sign(position[:, None] - position)
        depth = self._parting(ours[:, None], ours)
        parts = self._segments[ours[:, None], np.maximum(depth, 0)]
        indexed = (depth >= 0) & self._is_index[parts] & self._is_index[parts.T]
        apart = np.tril(depth >= 0)
        codes, place = np.unique(parts[apart] * len(self._parts) + parts.T[apart], return_inverse=True)
        counted = np.zeros_like(listed)
        said = np.array([*map(self._counted, codes.tolist())], int).reshape(-1, 2)[place]
        counted[apart] = np.where(said[:, 1] | (said[:, 0] == listed[apart]), said[:, 0], 0)
        return Orders(listed, counted - counted.T, self._common(ours[:, None], depth), indexed)

    def _counted(self, code: int) -> tuple[int, bool]:
        """Returns what `_counted` says of two segments, from a number for both."""
        if code not in self._compared:
            one, other = divmod(code, len(self._parts))
            self._compared[code] = _counted(self._parts[one], self._parts[other])
        return self._compared[code]

    def common(self, ours: Numbers, others: Numbers) -> Numbers:
        """Returns the number of the template of the module that holds two units, for each two of them."""
        return self._common(ours, self._parting(ours, others))

    def _parting(self, ours: Numbers, others: Numbers) -> Numbers:
        """Returns where two names first differ, as a number of segments; -1 where one begins with the other."""
        one, other = self.path[ours], self.path[others]
        depth = ((one == other) & (one >= 0)).sum(-1)
        return np.where(depth < np.minimum(self._depth[ours], self._depth[others]), depth, -1)

    def _common(self, ours: Numbers, depth: Numbers) -> Numbers:
        return self._template[np.where(depth > 0, self.path[ours, np.maximum(depth, 1) - 1], 0)]


class Distinct(NamedTuple):
    """Which pairs of two numbers there are, in order, and which of them each of many pairs is."""

    ones: Numbers
    others: Numbers
    place: Numbers


def distinct(ones: Numbers, others: Numbers) -> Distinct:
    """Returns the distinct ones among pairs of numbers."""
    width = int(others.max(initial=0)) + 1
    codes, place = np.unique(ones * width + others, return_inverse=True)
    return Distinct(codes // width, codes % width, place.reshape(ones.shape))


class Pairs:
    """Pairs of units of two sides, with those of their names and of their chains."""

    def __init__(self, one: Side, other: Side, ours: Numbers, theirs: Numbers) -> None:
        self.ours, self.theirs = ours, theirs
        self.names = distinct(one.names[ours], other.names[theirs])
        self.chains = distinct(one.chain[ours], other.chain[theirs])

    def each(self, judge: Callable[[int, int], float], ours: Sequence[Hashable], theirs: Sequence[Hashable]) -> Array:
        """Returns what a function of two units says of each pair.

        ``ours``, ``theirs``: what it depends on, of each unit. Pairs that are alike in that are judged once.
        """
        first: list[dict[Hashable, int]] = [{}, {}]
        some = [
            np.array([known.setdefault(what, unit) for unit, what in enumerate(side)])
            for known, side in zip(first, (ours, theirs), strict=True)
        ]
        found = distinct(some[0][self.ours], some[1][self.theirs])
        judged = [judge(u, v) for u, v in zip(found.ones.tolist(), found.others.tolist(), strict=True)]
        return np.array(judged, float)[found.place]


class Orders(NamedTuple):
    """What puts one unit before another: for every two of some units, as matrices.

    ``listed``: the signs of their positions. ``counted``: 1 and -1 where the names first differ by a number, or by
    "pre" and "post", else 0. ``common``: the template of the module that they have in common. ``indexed``: whether they
    first differ by places in a list.
    """

    listed: Numbers
    counted: Numbers
    common: Numbers
    indexed: Flags

    def of(self, rows: Numbers) -> Orders:
        """Returns those of some of the units."""
        at = rows[:, None], rows
        return Orders(self.listed[at], self.counted[at], self.common[at], self.indexed[at])


def padded(rows: Collection[Sequence[int]], filler: int) -> Numbers:
    """Returns rows of numbers as one array, as long as the longest."""
    made = np.full((len(rows), max([1, *map(len, rows)])), filler)
    for at, row in enumerate(rows):
        made[at, : len(row)] = row
    return made


def own_words(unit: Unit) -> tuple[str, ...]:
    """Returns the words of the last segment that has any."""
    return next((names.words_of([part]) for part in reversed(unit.segments) if part.words), ())


def _counted(a: Segment, b: Segment) -> tuple[int, bool]:
    """Returns the sign of the numbers, or of the places in a block, by which two segments differ; 0 for neither.

    The second is whether that is so wherever they are listed: what a norm is named after is a place only if it is also
    listed there.
    """
    if a.number >= 0 and b.number >= 0 and (a.stem == b.stem or set(a.words) & set(b.words)):
        return (a.number > b.number) - (a.number < b.number), True
    one, other = names.place(a), names.place(b)
    if one is None or other is None or not set(a.words) & set(b.words):
        return 0, True
    return (one > other) - (one < other), {names.around(a), names.around(b)} == {0, 1}


def _places(units: Sequence[Unit]) -> list[int | None]:
    """Returns whether each unit is the first of its siblings (0) or not (1), by number or `names.place`; else None."""
    counted: dict[tuple[tuple[str, ...], str], set[int]] = defaultdict(set)
    first: Counter[tuple[str, ...]] = Counter()
    for unit in units:
        part, above = unit.segments[-1], unit.path[:-1]
        if part.number >= 0:
            counted[above, part.stem].add(part.number)
        first[above] += part.number < 0 and names.place(part) == 0
    found: list[int | None] = []
    for unit in units:
        part, above = unit.segments[-1], unit.path[:-1]
        siblings = counted.get((above, part.stem), set())
        place = names.place(part)
        if part.stem and part.number >= 0 and len(siblings) > 1:
            found.append(int(part.number != min(siblings)))
        else:
            found.append(None if place is None or part.number >= 0 or first[above] > 1 else int(place > 0))
    return found


def _numbers(units: Sequence[Unit]) -> list[list[int]]:
    """Returns the numbers in each name, as ranks among their siblings: it may be counted from 0, from 1, or from 5."""
    known: dict[tuple[tuple[str, ...], str], set[int]] = defaultdict(set)
    for unit in units:
        for depth, part in enumerate(unit.segments):
            if part.number >= 0:
                known[unit.path[:depth], part.stem].add(part.number)
    ranks = {family: {number: at for at, number in enumerate(sorted(found))} for family, found in known.items()}
    return [
        [ranks[unit.path[:at], part.stem][part.number] for at, part in enumerate(unit.segments) if part.number >= 0]
        for unit in units
    ]
