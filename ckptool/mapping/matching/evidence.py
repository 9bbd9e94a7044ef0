"""What accepted pairs say about the others: which words translate which, which modules belong together, what order is
worth."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptool.mapping.matching import names
from ckptool.mapping.matching.sides import Array, Distinct, Flags, Numbers, Pairs, Side, distinct, own_words

_ROUNDS = 4

_COMPARED = 1 << 19
"""Most pairs of words that are compared letter by letter; names of more words are hardly names."""

_COMMON = 0.6
"""The share of a side's units from which on a word of their names contradicts nothing: that of the whole model."""

_OFTENER = 10
"""How much oftener a word may be in the names of one side than one that means the same in those of the other."""

_TILE = 1 << 20
"""Numbers of a table of words that are looked up together."""


class Words:
    """How alike the words of two units are, by themselves and by the translations that accepted pairs show.

    Tables of words have a row and a column more, for what is behind a name's last word.
    """

    def __init__(self, one: Side, other: Side, field_words: bool) -> None:
        self._one, self._other = one, other
        self._shape = len(one.vocabulary), len(other.vocabulary)
        number = {word: at for at, word in enumerate(other.vocabulary)}
        equal = [(at, number[word]) for at, word in enumerate(one.vocabulary) if word in number]
        self._equal = np.array(equal, int).reshape(-1, 2).T
        self._alike = np.zeros((self._shape[0] + 1, self._shape[1] + 1))
        if self.size <= _COMPARED:
            alike = [[names.similarity(w, x, field_words) for x in other.vocabulary] for w in one.vocabulary]
            often = one.frequency[:, None] / other.frequency
            self._alike[:-1, :-1] = np.array(alike, float).reshape(self._shape)
            self._alike[:-1, :-1] *= np.minimum(1, _OFTENER * np.minimum(often, 1 / often))
            self._alike[*self._equal] = 1
        self._rare = one.frequency <= _COMMON, other.frequency <= _COMMON
        self._repeated = np.array([1.0 + (len(unit.copies) > 1) for unit in one.units])  # repeated blocks show a law

    @property
    def size(self) -> int:
        """Returns how many pairs of words there are."""
        return self._shape[0] * self._shape[1]

    def learn(self, pairs: Pairs) -> None:
        """Learns from all accepted pairs."""
        group = pairs.names
        said, heard = self._one.said[group.ones][:, :, None], self._other.said[group.others][:, None, :]
        at, mine, theirs = np.nonzero((said < self._shape[0]) & (heard < self._shape[1]))
        met = distinct(said[at, mine, 0], heard[at, 0, theirs])
        count = np.bincount(group.place)[at]
        chance = _translation(met, met.ones, at * heard.shape[2] + theirs, count)
        back = _translation(met, met.others, at * said.shape[1] + mine, count)
        self._table = self._alike.copy()
        self._table[met.ones, met.others] = np.maximum(self._alike[met.ones, met.others], np.sqrt(chance * back))
        self._learn_laws(group, met, at, np.bincount(group.place, self._repeated[pairs.ours]))

    def _learn_laws(self, group: Distinct, met: Distinct, at: Numbers, count: NDArray[Any]) -> None:
        """Finds the words that always go together. Equal words that were not met yet count as half a law.

        ``count``: how often each pair of names of the ``group`` was met. ``met``, ``at``: the pairs of their words.
        """
        ones, others = (
            np.bincount(side.said[its].ravel(), np.repeat(count, side.said.shape[1]), size + 1)
            for side, its, size in zip((self._one, self._other), (group.ones, group.others), self._shape, strict=True)
        )
        both = np.bincount(met.place, count[at])
        rare = self._rare[0][met.ones] & self._rare[1][met.others]
        kept = rare & (both >= 0.9 * ones[met.ones]) & (both >= 0.9 * others[met.others])
        self._laws = np.zeros(self._alike.shape, bool)
        self._laws[met.ones[kept], met.others[kept]] = True
        one, other = self._equal
        unmet = self._rare[0][one] & self._rare[1][other] & (ones[one] == 0) & (others[other] == 0)
        half = unmet | self._laws[one, other]
        self._laws[one, other] |= unmet
        self._bound = []
        for side, laws, seen, least in ((self._one, self._laws, ones, one), (self._other, self._laws.T, others, other)):
            bound = laws.any(1) * np.maximum(1 - 1 / np.maximum(seen, 1), 0)
            bound[least[half]] = np.maximum(bound[least[half]], 0.5)
            self._bound.append(side.weights * bound[side.said])

    def compare(self, pairs: Pairs) -> tuple[Array, Array]:
        """Returns, for each pair of units, how alike they are by their words, and what is broken between them.

        The first is the words' best partners, both ways, by weight: about 1 for names as alike as they can be. The
        second is the weight of words whose partner is known, and is not in the other name.
        """
        one, other, (ones, others, place) = self._one, self._other, pairs.names
        alike, broken = np.zeros((2, len(ones)))
        for mine, theirs, some, them, table, laws, bound in (
            (one, other, ones, others, self._table, self._laws, self._bound[0]),
            (other, one, others, ones, self._table.T, self._laws.T, self._bound[1]),
        ):
            alike += (mine.weights[some] * _best(table, mine.said, some, theirs.said, them)).sum(1) / 2
            broken += (bound[some] * ~_best(laws, mine.said, some, theirs.said, them)).sum(1)
        return alike[place], broken[place]

    def own(self, pairs: Pairs) -> Array:
        """Returns how alike the words are that the units of each pair do not share with their modules: the best."""
        said, heard = (
            [tuple(side.number[word] for word in own_words(unit)) for unit in side.units]
            for side in (self._one, self._other)
        )
        return pairs.each(lambda u, v: float(self._table[np.ix_(said[u], heard[v])].max(initial=0)), said, heard)


def _best(table: NDArray[Any], said: Numbers, ones: Numbers, heard: Numbers, others: Numbers) -> NDArray[Any]:
    """Returns the most that a table has for each word of the first of two names, and any of the second.

    ``said``, ``heard``: the words of each name of both sides; ``ones``, ``others``: the names of each pair.
    """
    found = np.empty((len(ones), said.shape[1]), table.dtype)
    known, place = np.unique(others, return_inverse=True)
    order = np.argsort(place, kind="stable")
    ends = np.searchsorted(place[order], np.arange(len(known) + 1))
    step = max(1, _TILE // (heard.shape[1] * len(table)))
    for begin in range(0, len(known), step):
        some = order[ends[begin] : ends[min(begin + step, len(known))]]
        best = table.T[heard[known[begin : begin + step]]].max(1)
        found[some] = best[place[some, None] - begin, said[ones[some]]]
    return found


def _translation(met: Distinct, words: Numbers, heard: Numbers, count: Numbers) -> Array:
    """Returns how often a word is translated as another (IBM model 1, by expectation and maximisation).

    ``met``: the pairs of words, as they were met; ``words``: the first words of these pairs. ``heard``: a number for
    the second word in its pair of names, of each that was met; ``count``: how often it was.
    """
    chance = np.ones(len(met.ones))
    for _ in range(_ROUNDS):
        total = np.bincount(heard, chance[met.place])
        made = chance * np.bincount(met.place, count / np.maximum(total[heard], 1e-12), len(chance))
        sums = np.bincount(words, made)
        chance = made / np.where(sums > 0, sums, 1)[words]
    return chance


class Modules:
    """How many accepted pairs the modules above two units have in common.

    ``pairs``: all pairs of units that may be accepted, or are compared. Only what they have above them is counted.
    """

    def __init__(self, one: Side, other: Side, pairs: Pairs) -> None:
        self._one, self._other = one, other
        ones, others, _ = pairs.chains
        above = np.broadcast_arrays(one.chains[ones][:, :, None], other.chains[others][:, None, :])
        self._above = distinct(*above)
        self._chains = ones * len(other.chains) + others
        self._is_real = (self._above.ones < one.nodes) & (self._above.others < other.nodes)
        self._common = np.zeros(len(self._is_real))
        self._seen = np.zeros(one.nodes + 1), np.zeros(other.nodes + 1)

    def _rows(self, ones: Numbers, others: Numbers) -> Numbers:
        """Returns where pairs of chains stand among those of all pairs."""
        return np.searchsorted(self._chains, ones * len(self._other.chains) + others)

    def add(self, u: int, v: int) -> None:
        """Counts an accepted pair."""
        mine, theirs = self._one.chain[[u]], self._other.chain[[v]]
        self._seen[0][self._one.chains[mine[0]]] += 1
        self._seen[1][self._other.chains[theirs[0]]] += 1
        self._common[self._above.place[self._rows(mine, theirs)[0]]] += 1

    def compare(self, pairs: Pairs) -> tuple[Array, Array, Array, Array]:
        """Returns for each pair of units how much the modules above them belong together, from 0 to 1; the same without
        the root; without any that holds the whole model; and how much nearer the modules of one are to others.
        """
        one, other, (ones, others, place) = self._one, self._other, pairs.chains
        above = self._above
        share = 2 * self._common / np.maximum(self._seen[0][above.ones] + self._seen[1][above.others], 1)
        every = share * self._common / (self._common + 0.5) * self._is_real
        best = np.zeros(one.nodes + 1), np.zeros(other.nodes + 1)
        np.maximum.at(best[0], above.ones, every)
        np.maximum.at(best[1], above.others, every)
        their = every[above.place[self._rows(ones, others)]]
        mine, theirs = one.shares[ones], other.shares[others]
        forth, back = (mine * their.max(2)).sum(1), (theirs * their.max(1)).sum(1)
        near = (forth + back) / 2
        roots = ((mine * (one.chains[ones] == 0)).sum(1) + (theirs * (other.chains[others] == 0)).sum(1)) / 2
        nearest = (mine * best[0][one.chains[ones]]).sum(1), (theirs * best[1][other.chains[others]]).sum(1)
        gap = np.maximum(nearest[0] - forth, nearest[1] - back)
        inside = (one.inside[ones] * their.max(2)).sum(1) + (other.inside[others] * their.max(1)).sum(1)
        return near[place], (near - roots * every[0])[place], inside[place] / 2, gap[place]


class Order:
    """What the order of a listing is worth: as a whole, and inside modules of two templates."""

    def __init__(self, one: Side, other: Side) -> None:
        self._one, self._other = one, other
        self.trust = 0.0

    def learn(self, pairs: Pairs) -> None:
        """Counts which neighbours among accepted pairs keep their order, and which do not."""
        one, other, found = self._one, self._other, []
        for position in (one.position[pairs.ours], other.position[pairs.theirs]):
            listed = np.argsort(position, kind="stable")
            u, v = pairs.ours[listed], pairs.theirs[listed]
            kept = (one.position[u[:-1]] < one.position[u[1:]]) == (other.position[v[:-1]] < other.position[v[1:]])
            common = one.common(u[:-1], u[1:]), other.common(v[:-1], v[1:])
            found.append((common[0] * other.templates + common[1], kept))
        places, kept = (np.concatenate(part) for part in zip(*found, strict=True))
        self._places, place = np.unique(places, return_inverse=True)
        count, of_these = np.bincount(place), np.bincount(place, kept)
        rate = (kept.sum() + 1) / (len(kept) + 1.5)
        self._is_alike = one.alphabetical == other.alphabetical
        self.trust = float(_trust(rate)) if self._is_alike else 0.0
        self._trusts = _trust((of_these + 3 * rate) / (count + 3))
        self._is_lost = 2 * of_these < count

    def between(self, one: Numbers, other: Numbers) -> tuple[Array, Flags]:
        """Returns (the trust in the order of pairs, whether most accepted ones break it), by the numbers of the
        templates of what they have in common."""
        if not len(self._places):
            return np.full(one.shape, self.trust), np.zeros(one.shape, bool)
        places = one * self._other.templates + other
        at = np.minimum(np.searchsorted(self._places, places), len(self._places) - 1)
        known = self._places[at] == places
        return np.where(known & self._is_alike, self._trusts[at], self.trust), known & self._is_lost[at]


def _trust(rate: NDArray[Any] | float) -> Array:
    """Returns what a rate of kept order is worth: 0 up to 0.65, 1 where all is kept."""
    return np.maximum(0.0, (np.asarray(rate) - 0.65) / 0.35)
