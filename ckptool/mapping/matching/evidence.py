"""What accepted pairs say about the others: which words translate which, which modules belong together, what order is
worth."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from ckptool.mapping.matching import names
from ckptool.mapping.matching.sides import Array, Side

Pairs = Sequence[tuple[int, int]]
"""Accepted pairs: the numbers of the units of both sides."""

_ROUNDS = 4

_COMPARED = 1 << 19
"""Most pairs of words that are compared letter by letter; names of more words are hardly names."""

_COMMON = 0.6
"""The share of a side's units from which on a word of their names contradicts nothing: that of the whole model."""


class Words:
    """How alike the words of two units are, by themselves and by the translations that accepted pairs show."""

    def __init__(self, one: Side, other: Side, field_words: bool) -> None:
        self._one, self._other = one, other
        shape = len(one.vocabulary), len(other.vocabulary)
        self._equal = np.array(one.vocabulary)[:, None] == np.array(other.vocabulary)[None, :]
        self._alike = self._equal.astype(float)
        if self._equal.size <= _COMPARED:
            alike = [[names.similarity(w, x, field_words) for x in other.vocabulary] for w in one.vocabulary]
            self._alike = np.array(alike, float).reshape(shape)
        self._present = [(side.weights > 0).astype(float) for side in (one, other)]
        self._rare = [said.mean(0) <= _COMMON for said in self._present]
        self.learn([])

    @property
    def size(self) -> int:
        """Returns how many pairs of words there are."""
        return int(self._equal.size)

    def learn(self, pairs: Pairs) -> None:
        """Learns from all accepted pairs."""
        self._table = self._alike
        if pairs:
            said, heard = (words[[pair[at] for pair in pairs]] for at, words in enumerate(self._present))
            chance, back = _translation(said, heard), _translation(heard, said)
            self._table = np.maximum(self._alike, np.sqrt(chance * back.T))
        self._learn_laws(pairs)

    def _learn_laws(self, pairs: Pairs) -> None:
        """Finds the words that always go together. Equal words that were not met yet count as half a law."""
        said, heard = (words[[pair[at] for pair in pairs]] for at, words in enumerate(self._present))
        count = np.array([1.0 + (len(self._one.units[u].copies) > 1) for u, _ in pairs])  # repeated blocks show a law
        ones, others = count @ said, count @ heard
        both = said.T @ (heard * count[:, None])
        laws = (both > 0) & (both >= 0.9 * ones[:, None]) & (both >= 0.9 * others[None, :])
        unmet = self._equal & (ones == 0)[:, None] & (others == 0)[None, :]
        rare = self._rare[0][:, None] & self._rare[1][None, :]
        laws, unmet = laws & rare, unmet & rare
        half = (unmet | (laws & self._equal)).any(1), (unmet | (laws & self._equal)).any(0)
        laws |= unmet
        self._laws = laws.astype(float)
        self._bound = [
            side.weights * np.maximum(law * np.maximum(1 - 1 / np.maximum(seen, 1), 0), 0.5 * least)
            for side, law, seen, least in (
                (self._one, laws.any(1), ones, half[0]), (self._other, laws.any(0), others, half[1])
            )
        ]  # fmt: skip

    def alike(self, mine: Sequence[int], theirs: Sequence[int]) -> Array:
        """Returns the words' best partners, both ways, by weight: about 1 for names as alike as they can be."""
        heard = np.stack([self._table[:, self._other.ids[v]].max(1, initial=0) for v in theirs], 1)
        said = np.stack([self._table[self._one.ids[u], :].max(0, initial=0) for u in mine], 1)
        found: Array = (self._one.weights[mine] @ heard + (self._other.weights[theirs] @ said).T) / 2
        return found

    def broken(self, mine: Sequence[int], theirs: Sequence[int]) -> Array:
        """Returns the weight of words whose partner is known, and is not in the other name."""
        there = (self._present[1][theirs] @ self._laws.T > 0).astype(float)
        here = (self._present[0][mine] @ self._laws > 0).astype(float)
        found: Array = self._bound[0][mine] @ (1 - there).T + (self._bound[1][theirs] @ (1 - here).T).T
        return found


def _translation(said: Array, heard: Array) -> Array:
    """Returns how often a word is translated as another (IBM model 1, by expectation and maximisation).

    ``said``, ``heard``: for each accepted pair a row with 1 for the words of its two names.
    """
    chance = np.ones((said.shape[1], heard.shape[1]))
    for _ in range(_ROUNDS):
        count = chance * (said.T @ (heard / np.maximum(said @ chance, 1e-12)))
        total = count.sum(1, keepdims=True)
        chance = count / np.where(total > 0, total, 1)
    return chance


class Modules:
    """How many accepted pairs the modules above two units have in common."""

    def __init__(self, one: Side, other: Side) -> None:
        self._one, self._other = one, other
        self._common = np.zeros((one.nodes, other.nodes))
        self._seen = np.zeros(one.nodes), np.zeros(other.nodes)

    def add(self, u: int, v: int) -> None:
        """Counts an accepted pair."""
        mine, theirs = self._one.parents[u], self._other.parents[v]
        self._seen[0][mine] += 1
        self._seen[1][theirs] += 1
        self._common[np.array(mine)[:, None], theirs] += 1

    def compare(self) -> None:
        """Computes ``near`` and the rest for all chains of modules, from the pairs counted so far.

        ``near``: 0 to 1, how much the modules above two units belong together. ``inner``: the same without the root.
        ``gap``: how much nearer the modules of one of them are to others.
        """
        one, other = self._one, self._other
        share = 2 * self._common / np.maximum(self._seen[0][:, None] + self._seen[1][None, :], 1)
        near = share * self._common / (self._common + 0.5)
        up = np.stack([near[:, chain].max(1) for chain in other.chains], 1)
        down = np.stack([near[chain, :].max(0) for chain in one.chains], 0)
        forth, back = one.shares @ up, down @ other.shares.T
        self.near: Array = (forth + back) / 2
        roots = (one.shares[:, one.root][:, None] + other.shares[:, other.root][None, :]) / 2
        self.inner: Array = self.near - roots * near[one.root, other.root]
        best = one.shares @ near.max(1), other.shares @ near.max(0)
        self.gap: Array = np.maximum(best[0][:, None] - forth, best[1][None, :] - back)


class Order:
    """What the order of a listing is worth: as a whole, and inside modules of two templates."""

    def __init__(self, one: Side, other: Side) -> None:
        self._one, self._other = one, other
        self.trust = 0.0
        self._votes: dict[tuple[int, int], list[int]] = {}

    def learn(self, pairs: Pairs) -> None:
        """Counts which neighbours among accepted pairs keep their order, and which do not."""
        votes: dict[tuple[int, int], list[int]] = defaultdict(lambda: [0, 0])
        kept = lost = 0
        one, other = self._one, self._other
        listings = (
            sorted(pairs, key=lambda pair: one.position[pair[0]]),
            sorted(pairs, key=lambda pair: other.position[pair[1]]),
        )
        for listing in listings:
            for (u, v), (next_u, next_v) in pairwise(listing):
                rises, other_rises = one.position[u] < one.position[next_u], other.position[v] < other.position[next_v]
                breaks = int(rises != other_rises)
                votes[one.common(u, next_u), other.common(v, next_v)][breaks] += 1
                kept, lost = kept + 1 - breaks, lost + breaks
        self._votes = dict(votes)
        self._rate = (kept + 1) / (kept + lost + 1.5)
        self.trust = 0.0 if one.alphabetical != other.alphabetical else _trust(self._rate)

    def between(self, one: np.ndarray, other: np.ndarray) -> Array:
        """Returns the trust in the order of pairs, by the numbers of the templates of what they have in common."""
        table = np.full((self._one.templates + 1, self._other.templates + 1), self.trust)
        if self._one.alphabetical == self._other.alphabetical:
            for place, (kept, lost) in self._votes.items():
                table[place] = _trust((kept + 3 * self._rate) / (kept + lost + 3))
        found: Array = table[one, other]
        return found


def _trust(rate: float) -> float:
    """Returns what a rate of kept order is worth: 0 up to 0.65, 1 where all is kept."""
    return max(0.0, (rate - 0.65) / 0.35)
