"""What speaks against a pair of units, whatever else is known: roles, shapes, and words that exclude others."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from math import nan

import numpy as np

from ckptool.mapping.matching import names
from ckptool.mapping.matching.layouts import solid
from ckptool.mapping.matching.sides import Array, Pairs, Side
from ckptool.mapping.matching.units import Unit
from ckptool.mapping.pairs import Sample

NEVER = 9.0
"""More than anything that can speak for a pair."""

_FEW = 0.4
"""The share of units up to which those beside a block, by their words, are told from those in it."""


class Contradictions:
    """Judges pairs of units of two sides; ``blocks``: the units of each kind, which may become each other."""

    def __init__(self, one: Side, other: Side, blocks: Iterable[tuple[list[int], list[int]]], words: bool) -> None:
        self._one, self._other, self._words = one, other, words
        self._leaves = [{leaf for unit in side.units for leaf in unit.items} for side in (one, other)]
        self._turns = self._forced_turns(blocks)
        self._shortcuts = all(0 < side.shortcut.mean() < _FEW for side in (one, other))

    def of(self, pairs: Pairs) -> Array:
        """Returns what speaks against each pair by role and shape: 0 for nothing, down to -`NEVER`."""
        one, other = self._one.units, self._other.units
        ours, theirs = ([unit.content for unit in side] for side in (one, other))
        found = pairs.each(lambda u, v: self._by_role(one[u], other[v]), ours, theirs)
        mine, others = ([(unit.main.shape, unit.main.leaf) for unit in side] for side in (one, other))
        return found + pairs.each(lambda u, v: self._by_shape(one[u], other[v]), mine, others)

    def opposed(self, pairs: Pairs) -> Array:
        """Returns 1 for the pairs whose words exclude each other, 0 for others."""
        if not self._words:
            return np.zeros(len(pairs.ours))
        ours, theirs = (
            [
                (unit.segments[-1], said, place)
                for unit, said, place in zip(side.units, side.words, side.places, strict=True)
            ]
            for side in (self._one, self._other)
        )
        return pairs.each(self._opposed, ours, theirs)

    def unlike(self, pairs: Pairs, samples: Mapping[str, Sample]) -> Array:
        """Returns 1 for the pairs of which the first unit's values are not what the second's names say, 0 for others.

        ``samples``: of the first side's tensors. The weights of norms lie near 1, if any of its vectors do; in some
        code bases what is added to 1 is stored, and made-up weights lie anywhere.
        """
        if not self._words or not samples:
            return np.zeros(len(pairs.ours))
        has_norms = any(map(_is_near_one, samples.values()))
        denied = [_denied(unit, samples, has_norms) for unit in self._one.units]
        said = [
            frozenset("norm" if role == "weight" and names.is_norm(unit.segments[-1]) else role for role in unit.items)
            for unit in self._other.units
        ]
        return pairs.each(lambda u, v: float(bool(denied[u] & said[v])), denied, said)

    def _opposed(self, u: int, v: int) -> bool:
        one, other = self._one, self._other
        said = names.projection(one.units[u].segments[-1])
        if said != names.projection(other.units[v].segments[-1]) or names.opposed(one.words[u], other.words[v]):
            return True
        if self._shortcuts and one.shortcut[u] != other.shortcut[v]:
            return True
        places = one.places[u], other.places[v]
        return (
            None not in places
            and places[0] != places[1]
            and any(names.place(side.units[at].segments[-1]) is not None for side, at in ((one, u), (other, v)))
        )

    def _by_role(self, one: Unit, other: Unit) -> float:
        """Returns what speaks against two layers by the tensors that they hold."""
        said, heard = one.items.keys(), other.items.keys()
        known = said <= names.LAYER_ROLES and heard <= names.LAYER_ROLES
        if len(said) == len(heard) == 1 and said != heard:
            if known:
                return -NEVER
            elsewhere = said <= self._leaves[1] and heard <= self._leaves[0]
            return -1.5 if elsewhere else -0.5 * ("bias" in said | heard)
        if any(one.items[role].kind != other.items[role].kind for role in said & heard):
            return -NEVER
        if known:
            lacking = [role for role in said ^ heard if role in self._leaves[0] and role in self._leaves[1]]
            return -sum(0.7 if role == "bias" else 3.0 for role in lacking)
        return -2.0 * (len(said) != len(heard))

    def _by_shape(self, one: Unit, other: Unit) -> float:
        """Returns what speaks against two tensors by the order of their dimensions, where other tensors of the same
        leaves show whether matrices are transposed."""
        mine, theirs = (solid(unit.main.shape) for unit in (one, other))
        turns = self._turns.get((one.main.leaf, other.main.leaf))
        shapes = one.main.shape, other.main.shape
        if mine != theirs and len(shapes[0]) == len(shapes[1]) > 2 and shapes[0][2:] == shapes[1][2:]:
            return -3.0  # kernels of one layout, with channels the other way round
        if mine == theirs:
            if turns == {True} and len(set(mine)) > 1:
                return -3.0
            return -0.5 * (len(mine) < 2 and one.main.shape != other.main.shape)
        return 0.0 if turns == {True} else -3.0 if turns == {False} else -0.5

    def _forced_turns(self, blocks: Iterable[tuple[list[int], list[int]]]) -> dict[tuple[str, str], set[bool]]:
        """Returns, per pair of leaves, whether matrices are transposed, from kinds of which each side has one shape.

        One kind in five may say otherwise: its tensors may have other partners, which are missing.
        """
        found: dict[tuple[str, str], Counter[bool]] = defaultdict(Counter)
        for mine, theirs in blocks:
            ours, others = [self._one.units[u].main for u in mine], [self._other.units[v].main for v in theirs]
            shapes, other_shapes = ({solid(item.shape) for item in items} for items in (ours, others))
            if len(shapes) == len(other_shapes) == 1 and len(set(*shapes)) > 1:
                for leaf in {item.leaf for item in ours}:
                    for other in {item.leaf for item in others}:
                        found[leaf, other][shapes != other_shapes] += 1
        return {
            leaves: {turned for turned, count in votes.items() if 5 * count > votes.total()}
            for leaves, votes in found.items()
        }


def _denied(unit: Unit, samples: Mapping[str, Sample], has_norms: bool) -> frozenset[str]:
    """Returns the roles that the values of most copies of a unit deny: of a norm's weight, of a bias, of a variance."""
    votes: Counter[str] = Counter()
    for copy in unit.copies:
        for role, item in copy.items():
            mean, spread, least = sample = samples.get(item.key, (nan, nan, nan))
            votes["norm"] += role == "weight" and has_norms and least < 0 and abs(mean) < spread / 4
            votes["bias"] += role == "bias" and _is_near_one(sample)
            votes["var"] += role == "var" and least < 0
    return frozenset(role for role, count in votes.items() if 2 * count > len(unit.copies))


def _is_near_one(sample: Sample) -> bool:
    mean, spread, least = sample
    return least > 0 and 0.5 < mean < 2 and spread < mean / 4
