"""Matches the units of two sides, the most certain pairs first: each accepted pair speaks for others.

The confidence of a pair is what would be lost if it exchanged partners with its strongest rival. A pair that is only
decided by pairs accepted before it is at most as certain as the least certain of them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import NamedTuple

import numpy as np

from ckptool.mapping.matching.assignment import assigned
from ckptool.mapping.matching.contradictions import Contradictions
from ckptool.mapping.matching.evidence import Modules, Order, Words
from ckptool.mapping.matching.sides import Array, Flags, Numbers, Orders, Pairs, Side
from ckptool.mapping.matching.units import Unit
from ckptool.mapping.pairs import Sample

_STEPS = (4, 3, 2.5, 2, 1.6, 1.3, 1, 0.8, 0.6, 0.45, 0.3, 0.2, 0.1, 0, -0.2, -inf)
"""Pairs with at least so much are accepted together; then evidence is weighed again."""

_WORDS, _MODULES, _NUMBERS, _BESIDE, _ORDER = 2.0, 2.0, 0.8, 0.8, 0.8
"""What each kind of evidence counts for."""

_TOLD_APART = 1 << 16
"""Most pairs of units that are compared in all: kinds of fewer units first. Of the others nothing is said."""

_MOST = 1 << 23
"""Most pairs of units, and of words, that are weighed in all rounds together; what is open then has no match."""

_DIGITS = 12
"""What is as much up to so many digits is as much: rivals are the same on every machine."""

_ALIKE = 16
"""Most units of a kind on either side for which other kinds are looked at that are told apart in the same way."""

_ONE_WITNESS = 0.3
"""What a pair is worth at most for which one witness speaks, such as the order of siblings with names."""

_SPEAKS = 0.1
"""From how much on a kind of evidence is a witness against a rival."""

_SUPPORTS = 0.3
"""From how much on names that are alike, or modules that belong together, are a witness whatever the rivals."""

_LACKING, _MISSED = 0.05, 2.0
"""From which share of tensors that lack a partner on a pair's own words must speak for it; what that share costs."""

_REST = 0.1
"""The share of tensors without a partner on one side from which on other names are doubted where both name alike."""

_MANY, _NEARLY_ALL = 8, 0.97
"""How many accepted pairs, and which share of them, must have the same names for both sides to name alike."""

_FEW = 4
"""Up to how many tensors of a shape it speaks for their pairs that both sides have as many."""


@dataclass(slots=True)
class Match:
    """A pair of units, with what speaks for it against its strongest rival."""

    one: int
    other: int
    margin: float
    witnesses: list[str] = field(default_factory=list)
    rivals: list[int] = field(default_factory=list)
    """Other units of the first side that could become the second unit, best first."""


class _Facts(NamedTuple):
    """What is known of every pair of units, as vectors; or of those of one block, as matrices."""

    alike: Array
    broken: Array
    near: Array
    inner: Array
    inside: Array
    gap: Array
    own: Array
    beside: Array
    numbers: Array
    against: Array
    opposed: Array
    same: Array
    unlike: Array


class _Block:
    """The units of one kind on both sides, and what was accepted. ``pairs``: where their pairs are among all."""

    def __init__(self, mine: list[int], theirs: list[int], one: Side, other: Side, first: int) -> None:
        self.mine, self.theirs = mine, theirs
        self.pairs = np.arange(first, first + len(mine) * len(theirs))
        self.left = list(range(len(mine))), list(range(len(theirs)))
        self.accepted: list[tuple[int, int, float]] = []
        self.is_vector = len(one.units[mine[0]].main.kind[1]) < 2
        self._sides = (one, np.array(mine)), (other, np.array(theirs))
        some = max(_ALIKE, 4 * min(len(mine), len(theirs)))  # of more, few are asked for
        self._orders = [side.orders(units) if len(units) <= some else None for side, units in self._sides]
        self.shortcuts = one.shortcut[mine], other.shortcut[theirs]
        known = (part.tobytes() for one in (*self._orders, self.shortcuts) for part in one or ())
        self._kind = (self.is_vector, *known) if max(len(mine), len(theirs)) <= _ALIKE else id(self)

    @property
    def state(self) -> Hashable:
        """Returns what is equal for blocks of which the same is said where their pairs have the same facts."""
        return self._kind, *map(tuple, self.left), *self.accepted

    def order(self, at: int, rows: Numbers) -> Orders:
        """Returns the order of some of the units of a side."""
        (side, units), known = self._sides[at], self._orders[at]
        return known.of(rows) if known else side.orders(units[rows])

    def accept(self, u: int, v: int, margin: float) -> None:
        """Notes a pair."""
        i, j = self.mine.index(u), self.theirs.index(v)
        self.left[0].remove(i)
        self.left[1].remove(j)
        self.accepted.append((i, j, margin))


class Matcher:
    """Matches the units of two sides; ``words``: whether the table of field words is used.

    ``lacking``: the shares of tensors of both sides that surely have no partner. Where both are large, the partner of
    any tensor may be missing too. ``samples``: of the first side's vectors, as far as they are known.
    """

    def __init__(
        self,
        one: Side,
        other: Side,
        words: bool = True,
        lacking: Sequence[float] = (0.0, 0.0),
        samples: Mapping[str, Sample] | None = None,
    ) -> None:
        self._one, self._other, self._has_words = one, other, words
        self._lacking, self._has_rest = min(lacking), min(lacking) > 0 or max(lacking) > _REST
        self._samples = samples or {}
        mine, theirs = _by_kind(one.units), _by_kind(other.units)
        blocks = {kind: (mine[kind], theirs[kind]) for kind in mine if kind in theirs}
        self.skipped: list[int] = []
        count = 0
        for kind in sorted(blocks, key=lambda kind: len(blocks[kind][0]) * len(blocks[kind][1])):
            count += len(blocks[kind][0]) * len(blocks[kind][1])
            if count > _TOLD_APART:
                self.skipped += blocks.pop(kind)[1]
        self._of_kinds = blocks
        self._matches: list[Match] = []

    def run(self, settled: Sequence[tuple[int, int]] = ()) -> list[Match]:
        """Returns a match for every unit that has one, the most certain first; ``settled`` are accepted at once."""
        self._matches = [
            Match(u, v, _STEPS[0], ["neighbours"]) for u, v in settled
        ]  # of what they hold, not all need be
        if len(self._one.vocabulary) * len(self._other.vocabulary) <= _MOST and self._of_kinds:
            self._prepare()
            self._match()
            self._count_witnesses(len(settled))
        return self._matches

    def _count_witnesses(self, settled: int) -> None:
        """Takes confidence from pairs for which fewer than two witnesses speak; the others speak for them."""
        doubtful = [match for match in self._matches[settled:] if len(match.witnesses) < 2]
        if not doubtful:
            return
        ours, theirs = (np.array([getattr(match, side) for match in doubtful]) for side in ("one", "other"))
        self._partner[ours] = -2
        modules = Modules(self._one, self._other, self._every)
        for u, v in enumerate(self._partner[:-1].tolist()):
            if v >= 0:
                modules.add(u, v)
        pairs = Pairs(self._one, self._other, ours, theirs)
        listed, inside = self._order.trust * self._beside(pairs), _MODULES * modules.compare(pairs)[2]
        for at, match in enumerate(doubtful):
            speaks = {"order": listed[at] > _SPEAKS, "neighbours": inside[at] > _SUPPORTS}
            match.witnesses = [*dict.fromkeys([*match.witnesses, *(name for name, its in speaks.items() if its)])]
            if len(match.witnesses) < 2:
                match.margin = min(match.margin, _ONE_WITNESS)

    def _prepare(self) -> None:
        """Notes what never changes about the pairs of units that may be matched, and accepts what is settled."""
        one, other = self._one, self._other
        self._blocks: dict[Hashable, _Block] = {}
        first = 0
        for kind, (mine, theirs) in self._of_kinds.items():
            self._blocks[kind] = _Block(mine, theirs, one, other, first)
            first += len(mine) * len(theirs)
        ours = np.concatenate([np.repeat(mine, len(theirs)) for mine, theirs in self._of_kinds.values()])
        others = np.concatenate([np.tile(theirs, len(mine)) for mine, theirs in self._of_kinds.values()])
        self._pairs = every = Pairs(one, other, ours, others)
        numbers = [[tuple(found) for found in side.numbers] for side in (one, other)]
        against = Contradictions(one, other, self._of_kinds.values(), self._has_words)
        same = every.each(lambda u, v: _same_numbers(one.numbers[u], other.numbers[v]), *numbers)
        named = np.array([_same_name(one.keys[u], other.keys[v]) for u, v in zip(ours, others, strict=True)], float)
        unlike = against.unlike(every, self._samples) * (1 - named)
        self._known = same, against.of(every), against.opposed(every), named, unlike
        self._every = Pairs(one, other, *np.concatenate([[ours, others], self._accepted()], 1))
        self._modules, self._order = Modules(one, other, self._every), Order(one, other)
        self._words = Words(one, other, self._has_words)
        self._partner = np.full(len(one.units) + 1, -2)
        self._weighed = self._agreeing = self._same = 0
        settled, self._matches = self._matches, []
        for match in settled:
            self._accept(match)

    def _match(self) -> None:
        """Accepts one match after another, the most certain first."""
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

    def _accepted(self) -> Numbers:
        return np.array([(match.one, match.other) for match in self._matches], int).reshape(-1, 2).T

    def _accept(self, match: Match) -> None:
        self._matches.append(match)
        self._partner[match.one] = match.other
        self._agreeing += self._one.numbers[match.one] == self._other.numbers[match.other]
        self._same += _same_name(self._one.keys[match.one], self._other.keys[match.other])
        self._modules.add(match.one, match.other)
        block = self._blocks.get(self._one.units[match.one].kind)
        if block and match.one in block.mine and match.other in block.theirs:
            block.accept(match.one, match.other, match.margin)

    def _weigh(self) -> None:
        """Weighs the evidence of the accepted pairs again."""
        pairs = Pairs(self._one, self._other, *self._accepted())
        self._words.learn(pairs)
        self._order.learn(pairs)
        self._numbers = 0.2 + 0.8 * (self._agreeing / len(self._matches) if self._matches else 0.5)

    def _proposed(self) -> list[Match]:
        """Returns the best match for each open unit. Blocks of which all is alike are looked at once."""
        open_ = [block for block in self._blocks.values() if all(block.left)]
        self._weighed += sum(len(block.pairs) for block in open_) + self._words.size * bool(open_)
        if self._weighed > _MOST or not open_:
            return []
        facts = np.stack(self._facts(np.concatenate([block.pairs for block in open_])), 1).round(_DIGITS)
        known: dict[Hashable, list[Match]] = {}
        found, end = [], 0
        for block in open_:
            begin, end = end, end + len(block.pairs)
            its = facts[begin:end]
            state = block.state, its.tobytes()
            if state not in known:
                shape = len(block.mine), len(block.theirs)
                known[state] = self._of_block(block, _Facts(*its.T.reshape(-1, *shape)))
            for one in known[state]:
                rivals = [block.mine[rival] for rival in one.rivals]
                found.append(Match(block.mine[one.one], block.theirs[one.other], one.margin, one.witnesses, rivals))
        return found

    def _facts(self, which: Numbers) -> _Facts:
        """Returns what is known of some of the pairs by now."""
        pairs = Pairs(self._one, self._other, self._pairs.ours[which], self._pairs.theirs[which])
        beside = _BESIDE * self._order.trust * self._beside(pairs)
        known = (part[which] for part in self._known)
        own = self._words.own(pairs) if self._lacking > _LACKING else np.ones(len(beside))
        return _Facts(*self._words.compare(pairs), *self._modules.compare(pairs), own, beside, *known)

    def _beside(self, pairs: Pairs) -> Array:
        """Returns how many of the units listed before and after two units are accepted pairs: 0, 1/2 or 1."""
        one, other = self._one, self._other
        found = np.zeros(len(pairs.ours))
        for mine, theirs in ((one.before, other.before), (one.after, other.after)):
            found += self._partner[mine[pairs.ours]] == theirs[pairs.theirs]
        return found / 2

    def _of_block(self, block: _Block, facts: _Facts) -> list[Match]:
        """Returns the best assignment of the open units of a block, with margins against all others of the block.

        Units have their positions in the block.
        """
        alike, gap, beside = facts.alike, facts.gap, facts.beside
        kinds = {
            "words": _WORDS * alike - facts.opposed,
            "numbers": _NUMBERS * self._numbers * facts.numbers,
            "neighbours": _MODULES * facts.near,
            "roles": -facts.unlike,
            "shape": facts.against,
        }
        score = (sum(kinds.values()) + beside).round(_DIGITS)
        rows, columns = self._assigned(block, score)
        count = len(rows)
        free = [i for i in block.left[0] if i not in rows], [j for j in block.left[1] if j not in columns]
        rows += [i for i, _, _ in block.accepted]
        columns += [j for _, j, _ in block.accepted]
        swaps = {name: _exchanged(kind, rows, columns) for name, kind in kinds.items()}
        named: Array = np.sum([*swaps.values()], axis=0)
        swaps["order"], alone_is_enough = self._ordered(block, rows, columns, facts)
        total = (named + swaps["order"]).round(_DIGITS)
        if block.is_vector:  # a norm between two layers that are known has its place by them
            flanked = beside[np.array(rows), columns] > 0.9 * _BESIDE * self._order.trust
            alone_is_enough |= (flanked & (self._order.trust > 0))[:, None] & (named > -_SPEAKS)
        total = np.where(alone_is_enough | (named > _SPEAKS), total, np.minimum(total, _ONE_WITNESS))
        total[:, count:] = np.maximum(total[:, count:], [margin for *_, margin in block.accepted])
        np.fill_diagonal(total, inf)
        one_naming = self._has_rest and _MANY <= len(self._matches) * _NEARLY_ALL <= self._same
        broken = facts.broken + facts.opposed + facts.unlike + (1 - facts.same if one_naming else 0)
        inner = _MODULES * facts.inner
        alone = (0.3 if block.is_vector else 1.0) + alike + beside + inner - 3 * gap + facts.against - 4 * broken
        found = []
        for at, (i, j) in enumerate(zip(rows[:count], columns[:count], strict=True)):
            rival = int(total[at].argmin())
            lost = np.append(score[i, j] - score[free[0], j], score[i, j] - score[i, free[1]])
            by_order = np.append(beside[i, j] - beside[free[0], j], beside[i, j] - beside[i, free[1]])
            lost = np.where(lost - by_order > _SPEAKS, 1.5 * lost, np.minimum(1.5 * lost, _ONE_WITNESS))
            margin = min(total[at, rival], lost.min(initial=inf)) - gap[i, j] - 2 * broken[i, j]
            margin = min(margin, alone[i, j]) - _MISSED * self._lacking
            margin = min(margin, _ONE_WITNESS) if facts.own[i, j] < _SUPPORTS else margin
            settled = all(margin >= _STEPS[0] for *_, margin in block.accepted)
            only = settled and count + len(free[0]) + len(free[1]) == 1
            against = {name: float(swap[at, rival]) if rival != at else 0.0 for name, swap in swaps.items()}
            witnesses = _witnesses(facts, i, j, against, only)
            best = [
                int(other) for other in np.argsort(-score[:, j]) if other != i and score[other, j] > score[i, j] - 1.5
            ]
            found.append(Match(i, j, float(margin), witnesses, best[:3]))
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

    def _ordered(self, block: _Block, rows: list[int], columns: list[int], facts: _Facts) -> tuple[Array, Flags]:
        """Returns (what order says about exchanging pairs, whether that alone is enough).

        It is 1 where both sides count them and others do not run backwards, else as far as order is trusted; little
        where the modules above say much, and nothing beside a shortcut, see `names.SHORTCUT`. Of siblings with names,
        such as two projections or two norms, it is not enough that one is listed first: each code base lists its own
        first. Places in a list are, where both sides have lists.
        """
        ours, theirs = np.array(rows), np.array(columns)
        one, other = block.order(0, ours), block.order(1, theirs)
        both = (one.counted != 0) & (other.counted != 0)
        sign = np.where(both, one.counted * other.counted, one.listed * other.listed)
        listed, is_lost = self._order.between(one.common, other.common)
        trust = np.where(both, 1.0 - is_lost, listed)
        found: Array = sign * trust * np.maximum(0, 1 - 1.5 * np.abs(_exchanged(facts.near, rows, columns)))
        found += _exchanged(facts.beside, rows, columns)
        around = block.shortcuts[0][ours] != block.shortcuts[1][theirs]
        found[around, :] = found[:, around] = 0
        return found, both | (one.indexed & other.indexed)


def _witnesses(facts: _Facts, i: int, j: int, against: dict[str, float], only: bool) -> list[str]:
    """Returns what speaks for a pair of a block: by itself, or ``against`` its strongest rival, if it has one.

    ``only``: nothing else of its shape is left.
    """
    speaks = {name: swap > _SPEAKS for name, swap in against.items() if name != "shape"}
    speaks["words"] |= bool(facts.alike[i, j] > _SUPPORTS or facts.same[i, j])
    speaks["order"] |= bool(facts.beside[i, j] > _SPEAKS)
    speaks["neighbours"] |= bool(_MODULES * facts.inside[i, j] > _SUPPORTS)
    speaks["only one of its shape"] = only or against["shape"] > 1
    if any(speaks.values()):  # these say nothing by themselves
        count, other_count = facts.same.shape
        speaks["numbers"] |= bool(facts.numbers[i, j] > 1)
        speaks["few of its shape"] = 1 < count == other_count <= _FEW
    return [name for name, its in speaks.items() if its]


def _same_name(one: str, other: str) -> bool:
    """Returns whether two keys, each with a separator before it, are the same, wrappers aside."""
    return one.endswith(other) or other.endswith(one)


def _same_numbers(one: list[int], other: list[int]) -> float:
    """Returns the share of equal numbers, from the inside or from the outside, and more where all are equal."""
    if not one and not other:
        return 0.0
    inside = sum(a == b for a, b in zip(reversed(one), reversed(other), strict=False))
    outside = sum(a == b for a, b in zip(one, other, strict=False))
    least = max(1, min(len(one), len(other)))
    return max(inside, outside) / least + 0.3 * (max(inside, outside) == least)


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
