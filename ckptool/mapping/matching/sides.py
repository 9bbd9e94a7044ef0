"""One side of a match: its units with their words, numbers, parents and order."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import pairwise
from math import log

import numpy as np
from numpy.typing import NDArray

from ckptool.mapping.matching import names
from ckptool.mapping.matching.names import Segment
from ckptool.mapping.matching.units import Unit

Array = NDArray[np.float64]

_FARTHER = 0.7
"""What a parent counts for, as a share of what the next inner one counts for."""

_SORTED = 0.98
"""The share of neighbouring keys in alphabetical order from which a listing says nothing about order."""


class Side:
    """The units of one side. ``keys``: all its keys as they were listed."""

    def __init__(self, units: Sequence[Unit], keys: Sequence[str]) -> None:
        self.units = units
        self._read_words()
        self._read_parents()
        self.numbers = _numbers(units)
        self.places = _places(units)
        self.shortcut = np.array([bool(names.SHORTCUT.intersection(said)) for said in self.words])
        self.position = np.array([unit.position for unit in units])
        listed = [int(at) for at in np.argsort(self.position, kind="stable")]
        self.after = dict(pairwise(listed))
        self.before = {after: before for before, after in self.after.items()}
        rising = sum(a <= b for a, b in pairwise(keys))
        self.alphabetical = len(keys) > 8 and rising >= _SORTED * (len(keys) - 1)
        self._templates: dict[str, int] = {}

    def _read_words(self) -> None:
        """Sets the vocabulary, the words of each unit as numbers in it, and their weights: rare words count more."""
        self.words = [names.words_of(unit.segments) for unit in self.units]
        number = {word: at for at, word in enumerate(dict.fromkeys(word for said in self.words for word in said))}
        self.vocabulary = list(number)
        self.ids = [[number[word] for word in said] for said in self.words]
        frequency = Counter(word for said in self.words for word in said)
        rarity = np.array([log(1 + len(self.units) / frequency[word]) for word in self.vocabulary])
        self.weights = np.zeros((len(self.units), len(self.vocabulary)))
        for at, said in enumerate(self.ids):
            self.weights[at, said] = rarity[said]
        self.weights /= float(self.weights.sum(1).mean()) or 1.0

    def _read_parents(self) -> None:
        """Sets the modules above each unit, the innermost first; units with the same ones share a chain."""
        nodes: dict[tuple[str, ...], int] = {}
        self.parents = [
            [nodes.setdefault(unit.path[:depth], len(nodes)) for depth in range(len(unit.path) - 1, -1, -1)]
            for unit in self.units
        ]
        self.nodes, self.root = len(nodes), nodes[()]
        chains: dict[tuple[int, ...], int] = {}
        self.chain = [chains.setdefault(tuple(above), len(chains)) for above in self.parents]
        self.chains = [list(chain) for chain in chains]
        self.shares = np.zeros((len(self.chains), self.nodes))
        for at, above in enumerate(self.chains):
            self.shares[at, above] = _FARTHER ** np.arange(len(above))
        self.shares /= self.shares.sum(1, keepdims=True)

    def orders(self, units: Sequence[int]) -> tuple[Array, Array, NDArray[np.int64], NDArray[np.bool_]]:
        """Returns, for every two of these units, what puts one before the other, and where both are.

        The signs of their positions; 1 and -1 where the names first differ by a number, else 0; the number of the
        template of the module that they have in common; whether they first differ by places in a list.
        """
        position = self.position[list(units)]
        listed = np.sign(position[:, None] - position[None, :]).astype(float)
        counted = np.zeros_like(listed)
        common = np.zeros(listed.shape, np.int64)
        indexed = np.zeros(listed.shape, bool)
        for i, u in enumerate(units):
            for j, v in enumerate(units[:i]):
                depth = self._parting(u, v)
                common[i, j] = common[j, i] = self._template(u, depth)
                if depth is not None:
                    one, other = (self.units[at].segments[depth] for at in (u, v))
                    counted[i, j] = _counted(one, other)
                    counted[j, i] = -counted[i, j]
                    indexed[i, j] = indexed[j, i] = one.stem == other.stem == "" and min(one.number, other.number) >= 0
        return listed, counted, common, indexed

    def common(self, u: int, v: int) -> int:
        """Returns the number of the template of the module that holds both units."""
        return self._template(u, self._parting(u, v))

    def _parting(self, u: int, v: int) -> int | None:
        """Returns where two names first differ, as a number of segments; None where one begins with the other."""
        both = zip(self.units[u].path, self.units[v].path, strict=False)
        return next((at for at, (a, b) in enumerate(both) if a != b), None)

    def _template(self, u: int, depth: int | None) -> int:
        text = "/".join(part.stem for part in self.units[u].segments[: depth or 0])
        return self._templates.setdefault(text, len(self._templates))

    @property
    def templates(self) -> int:
        """Returns how many templates `common` has numbered."""
        return len(self._templates)


def _counted(a: Segment, b: Segment) -> int:
    """Returns the sign of the numbers, or of "pre" and "post", by which two segments differ; 0 for neither."""
    if a.stem == b.stem and a.number >= 0 and b.number >= 0:
        return 1 if a.number > b.number else -1
    one, other = names.ordinal(a), names.ordinal(b)
    if one is None or other is None or not set(a.words) & set(b.words):
        return 0
    return (one > other) - (one < other)


def _places(units: Sequence[Unit]) -> list[int | None]:
    """Returns whether each unit is the first or second of two siblings, by number or by "pre" and "post"; else None.

    Of siblings that say "pre" or "post", one or the other may be missing.
    """
    counted: dict[tuple[tuple[str, ...], str], set[int]] = defaultdict(set)
    said: Counter[tuple[tuple[str, ...], int]] = Counter()
    for unit in units:
        part, above = unit.segments[-1], unit.path[:-1]
        if part.number >= 0:
            counted[above, part.stem].add(part.number)
        elif (place := names.around(part)) is not None:
            said[above, place] += 1
    found: list[int | None] = []
    for unit in units:
        part, above = unit.segments[-1], unit.path[:-1]
        siblings = counted.get((above, part.stem), set())
        if part.stem and part.number >= 0 and len(siblings) == 2:
            found.append(int(part.number == max(siblings)))
        else:
            alone = said[above, 0] <= 1 and said[above, 1] <= 1
            found.append(names.around(part) if alone and part.number < 0 else None)
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
