"""Matches the units of two sides, the most certain pairs first: each accepted pair speaks for others.

The confidence of a pair is what would be lost if it exchanged partners with its strongest rival. A pair that is only
decided by pairs accepted before it is at most as certain as the least certain of them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from math import inf

import numpy as np
from numpy.typing import NDArray

from ckptool.mapping.matching.assignment import assigned
from ckptool.mapping.matching.contradictions import Contradictions
from ckptool.mapping.matching.evidence import Modules, Order, Words
from ckptool.mapping.matching.sides import Array, Side
from ckptool.mapping.matching.units import Unit

_STEPS = (4, 3, 2.5, 2, 1.6, 1.3, 1, 0.8, 0.6, 0.45, 0.3, 0.2, 0.1, 0, -0.2, -inf)
"""Pairs with at least so much are accepted together; then evidence is weighed again."""

_WORDS, _MODULES, _NUMBERS, _BESIDE, _ORDER = 2.0, 2.0, 0.8, 0.8, 0.8
"""What each kind of evidence counts for."""

_TOLD_APART = 1 << 16
"""Most pairs of units that are compared in all: kinds of fewer units first. Of the others nothing is said."""

_MOST = 1 << 23
"""Most pairs of units, and of words, that are weighed in all rounds together; what is open then has no match."""

_ORDER_ALONE = 0.3
"""What the order of siblings with names is worth where nothing else speaks."""

_SPEAKS = 0.1
"""From how much on a kind of evidence is a witness."""


@dataclass(slots=True)
class Match:
    """A pair of units, with what speaks for it against its strongest rival."""

    one: int
    other: int
    margin: float
    witnesses: list[str] = field(default_factory=list)
    rivals: list[int] = field(default_factory=list)
    """Other units of the first side that could become the second unit, best first."""


class _Block:
    """The units of one kind on both sides, what never changes about them, and what was accepted."""

    def __init__(self, mine: list[int], theirs: list[int], one: Side, other: Side, against: Contradictions) -> None:
        self.mine, self.theirs = mine, theirs
        self.left = list(range(len(mine))), list(range(len(theirs)))
        self.accepted: list[tuple[int, int, float]] = []
        self.numbers = np.array([[_same_numbers(one.numbers[u], other.numbers[v]) for v in theirs] for u in mine])
        self.against, self.opposed = against.of(mine, theirs), against.opposed(mine, theirs)
        self.orders = one.orders(mine), other.orders(theirs)
        self.chains = np.array([one.chain[u] for u in mine])[:, None], np.array([other.chain[v] for v in theirs])
        self.shortcuts = one.shortcut[mine], other.shortcut[theirs]
        self.is_vector = len(one.units[mine[0]].main.kind[1]) < 2

    def accept(self, u: int, v: int, margin: float) -> None:
        i, j = self.mine.index(u), self.theirs.index(v)
        self.left[0].remove(i)
        self.left[1].remove(j)
        self.accepted.append((i, j, margin))


class Matcher:
    """Matches the units of two sides; ``words``: whether the table of field words is used."""

    def __init__(self, one: Side, other: Side, words: bool = True) -> None:
        self._one, self._other = one, other
        mine, theirs = _by_kind(one.units), _by_kind(other.units)
        blocks = {kind: (mine[kind], theirs[kind]) for kind in mine if kind in theirs}
        self.skipped: list[int] = []
        pairs = 0
        for kind in sorted(blocks, key=lambda kind: len(blocks[kind][0]) * len(blocks[kind][1])):
            pairs += len(blocks[kind][0]) * len(blocks[kind][1])
            if pairs > _TOLD_APART:
                self.skipped += blocks.pop(kind)[1]
        against = Contradictions(one, other, blocks.values(), words)
        self._blocks = {kind: _Block(*both, one, other, against) for kind, both in blocks.items()}
        self._words, self._modules, self._order = Words(one, other, words), Modules(one, other), Order(one, other)
        self._weighed = 0
        self._matches: list[Match] = []
        self._partner: dict[int, int] = {}

    def run(self, settled: Sequence[tuple[int, int]] = ()) -> list[Match]:
        """Returns a match for every unit that has one, the most certain first; ``settled`` are accepted at once."""
        for u, v in settled:
            self._accept(Match(u, v, _STEPS[0], ["neighbours"]))  # of what they hold, not all need be settled
        self._weigh()
        step, least, proposed = 0, inf, self._proposed()
        while proposed and step < len(_STEPS) and self._weighed <= _MOST:
            found = [match for match in proposed if match.margin >= _STEPS[step]]
            for match in found:
                match.margin = min(match.margin, least)
                self._accept(match)
            if found:
                least = min(match.margin for match in found)
                self._weigh()
                proposed = self._proposed()
            else:
                step += 1
        return self._matches

    def _accept(self, match: Match) -> None:
        self._matches.append(match)
        self._partner[match.one] = match.other
        self._modules.add(match.one, match.other)
        block = self._blocks.get(self._one.units[match.one].kind)
        if block and match.one in block.mine and match.other in block.theirs:
            block.accept(match.one, match.other, match.margin)

    def _weigh(self) -> None:
        """Weighs the evidence of the accepted pairs again."""
        pairs = [(match.one, match.other) for match in self._matches]
        self._words.learn(pairs)
        self._order.learn(pairs)
        self._modules.compare()
        agree = sum(self._one.numbers[u] == self._other.numbers[v] for u, v in pairs)
        self._numbers = 0.2 + 0.8 * (agree / len(pairs) if pairs else 0.5)

    def _proposed(self) -> list[Match]:
        open_ = [block for block in self._blocks.values() if all(block.left)]
        self._weighed += sum(len(block.mine) * len(block.theirs) for block in open_) + self._words.size * bool(open_)
        return [match for block in open_ for match in self._of_block(block)] if self._weighed <= _MOST else []

    def _of_block(self, block: _Block) -> list[Match]:
        """Returns the best assignment of the open units of a block, with margins against all others of the block."""
        mine, theirs = block.mine, block.theirs
        chains = block.chains
        alike, near = self._words.alike(mine, theirs), self._modules.near[chains]
        gap = self._modules.gap[chains]
        beside = _BESIDE * self._order.trust * self._beside(mine, theirs)
        kinds = {
            "words": _WORDS * alike - block.opposed,
            "numbers": _NUMBERS * self._numbers * block.numbers,
            "neighbours": _MODULES * near,
            "shape": block.against,
        }
        score = sum(kinds.values()) + beside
        rows, columns = self._assigned(block, score)
        count = len(rows)
        free = [i for i in block.left[0] if i not in rows], [j for j in block.left[1] if j not in columns]
        rows += [i for i, _, _ in block.accepted]
        columns += [j for _, j, _ in block.accepted]
        swaps = {name: _exchanged(kind, rows, columns) for name, kind in kinds.items()}
        named: Array = np.sum([*swaps.values()], axis=0)
        swaps["order"], alone_is_enough = self._ordered(block, rows, columns, near, beside)
        total = named + swaps["order"]
        total = np.where(alone_is_enough | (named > _SPEAKS), total, np.minimum(total, _ORDER_ALONE))
        total[:, count:] = np.maximum(total[:, count:], [margin for *_, margin in block.accepted])
        np.fill_diagonal(total, inf)
        broken = self._words.broken(mine, theirs) + block.opposed
        inner = _MODULES * self._modules.inner[chains]
        alone = (0.3 if block.is_vector else 1.0) + alike + beside + inner - 3 * gap + block.against - 4 * broken
        found = []
        for at, (i, j) in enumerate(zip(rows[:count], columns[:count], strict=True)):
            rival = int(total[at].argmin())
            margins = [float(total[at, rival])]
            margins += [1.5 * float((score[i, j] - score[free[0], j]).min())] if free[0] else []
            margins += [1.5 * float((score[i, j] - score[i, free[1]]).min())] if free[1] else []
            margin = min(min(margins) - gap[i, j] - 2 * broken[i, j], alone[i, j])
            witnesses = [name for name, swap in swaps.items() if swap[at, rival] > _SPEAKS and name != "shape"]
            witnesses += ["only one of its shape"] if swaps["shape"][at, rival] > 1 else []
            if len(rows) + len(free[0]) + len(free[1]) == 1:
                witnesses = _of_only_one(alike[i, j], beside[i, j], inner[i, j])
            best = [
                int(other) for other in np.argsort(-score[:, j]) if other != i and score[other, j] > score[i, j] - 1.5
            ]
            found.append(Match(mine[i], theirs[j], float(margin), witnesses, [mine[other] for other in best[:3]]))
        return found

    def _assigned(self, block: _Block, score: Array) -> tuple[list[int], list[int]]:
        """Returns the best assignment of the open units of a block, by score and place in the listing."""
        left = block.left
        places = [
            np.argsort(np.argsort(side.position[[units[at] for at in open_]])) / len(open_)
            for side, units, open_ in ((self._one, block.mine, left[0]), (self._other, block.theirs, left[1]))
        ]
        apart = np.abs(places[0][:, None] - places[1][None, :])
        rows, columns = assigned(
            score[np.array(left[0])[:, None], left[1]] + _ORDER * max(self._order.trust, 0.2) * (1 - apart)
        )
        return [left[0][i] for i in rows], [left[1][j] for j in columns]

    def _ordered(
        self, block: _Block, rows: list[int], columns: list[int], near: Array, beside: Array
    ) -> tuple[Array, NDArray[np.bool_]]:
        """Returns (what order says about exchanging pairs, whether that alone is enough).

        It is 1 where both sides count them, else as far as order is trusted; little where the modules above say much,
        and nothing beside a shortcut, see `names.SHORTCUT`. Of siblings with names, such as two projections or two
        norms, it is not enough that one is listed first: each code base lists its own first. Places in a list are.
        """
        ours, theirs = np.array(rows), np.array(columns)
        listed, counted, common, indexed = (part[ours[:, None], ours] for part in block.orders[0])
        other_listed, other_counted, other_common, other_indexed = (
            part[theirs[:, None], theirs] for part in block.orders[1]
        )
        both = (counted != 0) & (other_counted != 0)
        sign = np.where(both, counted * other_counted, listed * other_listed)
        trust = np.where(both, 1.0, self._order.between(common, other_common))
        found: Array = sign * trust * np.maximum(0, 1 - 1.5 * np.abs(_exchanged(near, rows, columns)))
        found += _exchanged(beside, rows, columns)
        around = block.shortcuts[0][ours] != block.shortcuts[1][theirs]
        found[around, :] = found[:, around] = 0
        return found, both | indexed | other_indexed

    def _beside(self, mine: list[int], theirs: list[int]) -> Array:
        """Returns how many of the units listed before and after two units are accepted pairs: 0, 1/2 or 1."""
        found = np.zeros((len(mine), len(theirs)))
        for ours, others in ((self._one.before, self._other.before), (self._one.after, self._other.after)):
            expected = np.array([self._partner.get(ours.get(u, -1), -2) for u in mine])
            there = np.array([others.get(v, -3) for v in theirs])
            found += expected[:, None] == there[None, :]
        return found / 2


def _of_only_one(alike: float, beside: float, inner: float) -> list[str]:
    """Returns what speaks for the only two units of a kind."""
    said = {"words": alike > 0.3, "order": beside > _SPEAKS, "neighbours": inner > 0.3}
    return ["only one of its shape", *(name for name, speaks in said.items() if speaks)]


def _same_numbers(one: list[int], other: list[int]) -> float:
    """Returns the share of equal numbers, from the inside or from the outside, and more where all are equal."""
    if not one and not other:
        return 0.0
    inside = sum(a == b for a, b in zip(reversed(one), reversed(other), strict=False))
    outside = sum(a == b for a, b in zip(one, other, strict=False))
    return max(inside, outside) / max(len(one), len(other)) + 0.3 * (one == other)


def _exchanged(score: Array, rows: list[int], columns: list[int]) -> Array:
    """Returns what is lost where two of the pairs exchange partners."""
    chosen = score[np.array(rows)[:, None], columns]
    own = np.diag(chosen)
    found: Array = own[:, None] + own[None, :] - chosen - chosen.T
    return found


def _by_kind(units: Sequence[Unit]) -> dict[Hashable, list[int]]:
    found: dict[Hashable, list[int]] = defaultdict(list)
    for at, unit in enumerate(units):
        found[unit.kind].append(at)
    return found
