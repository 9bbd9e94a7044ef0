"""Which pairs the values of two checkpoints settle, and what they say of the pairs that names propose.

A pair is settled only where its elements were compared, or have fingerprints that no other tensor has by accident. What
several sources could be is left to their names, and tensors of one value to their neighbours.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from ckptool.core.keys import looking_through
from ckptool.core.tensor import TensorInfo
from ckptool.errors import UsageError
from ckptool.mapping.making import made
from ckptool.mapping.pairs import Doubt, Inferred, Pair

NEAR = 0.3
"""The L2 norm of a difference, divided by that of a tensor, up to which two tensors are near."""

ONE_MODEL = 0.5
"""The share of a target's elements that values settle, from which both sides are versions of one model."""

LISTED = 5
"""Most candidates of a doubt."""


class Guess(Protocol):
    """What a target may be made of: numbers of sources, and operations of which one may be right."""

    @property
    def target(self) -> int:
        """Returns the number of the target."""
        ...

    @property
    def sources(self) -> list[int]:
        """Returns the numbers of what it is made of, in order."""
        ...

    @property
    def ops(self) -> list[str]:
        """Returns the operations that may make it, best first."""
        ...


class Evidence(Protocol):
    """What the values of two sides say; tensors are numbered in the order of their state_dicts."""

    @property
    def unread(self) -> Mapping[int, str]:
        """Returns why values were not compared, of the targets of which they were not."""
        ...

    @property
    def plain(self) -> tuple[set[int], set[int]]:
        """Returns the sources and targets of one value, or of few: an equal tensor may be another one by accident."""
        ...

    @property
    def twins(self) -> Sequence[int]:
        """Returns for every source the first source with its elements in its order."""
        ...

    def equal(self) -> Mapping[int, list[int]]:
        """Returns {target: sources of the same elements in the same order}; of twins the first."""
        ...

    def reordered(self, sources: Iterable[int], targets: Iterable[int]) -> Iterable[Guess]:
        """Yields guesses for targets that have the elements of one source in another order."""
        ...

    def parted(self, sources: Iterable[int], targets: Iterable[int]) -> Iterable[Guess]:
        """Yields guesses for targets that are a part of a source, or made of several."""
        ...

    def near(self, sources: Iterable[int], targets: Iterable[int]) -> Iterable[Guess]:
        """Yields guesses for targets that lie near one source and far from all others; of nothing if too many may."""
        ...

    def same(self, one: TensorInfo, other: TensorInfo) -> bool:
        """Returns whether two tensors have the same elements, at the lower precision of both; reads them."""
        ...

    def apart(self, one: TensorInfo, other: TensorInfo) -> float | None:
        """Returns the L2 norm of the difference, divided by that of the first; None where there is none. Reads both."""
        ...


@dataclass(frozen=True, slots=True)
class Settled:
    """What values settle."""

    pairs: list[Pair]
    """The pairs whose elements are equal, or near, in the target's order."""
    doubts: list[Doubt]
    """The targets that values say something about, but not what they are made of."""
    plain: list[str]
    """Keys of the target that hold one value, or few: alike by accident, so that values alone prove nothing."""
    unread: dict[str, str]
    """Keys of the target whose values were not compared, and why."""
    one_model: bool = False
    """Whether most elements of the target are settled: both sides are versions of one model."""
    apart: dict[str, float] = field(default_factory=dict)
    """The distance of the pairs that are near and not equal, by key of the target: see NEAR."""
    crowded: int = 0
    """How many targets have a shape of which there are too many tensors to find the near ones."""

    @property
    def notes(self) -> list[str]:
        """Returns what a report says of it."""
        text = f"{self.crowded:,} keys have a shape of too many tensors to find near ones: names decide these"
        return [text] if self.crowded else []


def settle(source: Mapping[str, TensorInfo], target: Mapping[str, TensorInfo], evidence: Evidence) -> Settled:
    """Returns what the values of two state_dicts settle."""
    return _Settling(source, target, evidence).done()


class _Group:
    """Sources of the same elements: which of them a target may be."""

    def __init__(self, keys: list[str], source: Mapping[str, TensorInfo], plain: Callable[[str], str]) -> None:
        self.keys, self.source = keys, source
        self.tied: dict[object, bool] = {}
        self.shaped: dict[object, list[str]] = {None: keys}
        self.named: dict[object, list[str]] = {}
        for key in keys if len(keys) > 1 else ():
            self.shaped.setdefault(source[key].shape, []).append(key)
            for shape in (None, source[key].shape):
                self.named.setdefault((shape, plain(key)), []).append(key)

    def members(self, name: str, shape: tuple[int, ...] | None) -> list[str]:
        """Returns the sources that a target of that name may be: one of its shape and name, or one if they are tied."""
        if len(self.keys) == 1:
            return self.keys
        shape = shape if shape in self.shaped else None
        named = self.named.get((shape, name), [])
        if len(named) == 1:
            return named
        them = self.shaped[shape]
        if shape not in self.tied:
            self.tied[shape] = len({self.source[key].view for key in them}) == 1
        return them[:1] if self.tied[shape] else them


class _Settling:
    """The state while one stage of the evidence after another is judged."""

    def __init__(self, source: Mapping[str, TensorInfo], target: Mapping[str, TensorInfo], evidence: Evidence) -> None:
        self.evidence = evidence
        self.source, self.target = source, target
        self.sources, self.targets = list(source), list(target)
        self.plain = looking_through(self.sources, self.targets)
        classes: dict[int, list[str]] = defaultdict(list)
        for key, first in zip(self.sources, evidence.twins, strict=True):
            classes[first].append(key)
        self.groups = {first: _Group(keys, source, self.plain) for first, keys in classes.items()}
        self.pairs: dict[int, Pair] = {}
        self.doubts: dict[int, Doubt] = {}
        self.apart: dict[str, float] = {}
        self.crowded = 0
        self.proven: Counter[str] = Counter()
        self.tried: set[tuple[int, ...]] = set()
        self.mixed: dict[int, str] = {}

    def done(self) -> Settled:
        evidence = self.evidence
        for target, them in evidence.equal().items():
            if target not in evidence.plain[1]:
                self._take(target, [self._group(them)], "rename")
        for guess in evidence.reordered(self.groups, self._open()):
            self._prove(guess)
            self.mixed.setdefault(guess.target, self.sources[guess.sources[0]])
        for guess in evidence.parted(self.groups, self._open()):
            self._prove(guess)
        for guess in evidence.near(self._free(), self._open()):
            self._measure(guess)
        for target in self._open():
            if target in self.mixed:
                what = f"{self.mixed[target]} has its elements in an order that no known operation gives"
                self.doubts[target] = Doubt(self.targets[target], [], what)
        counted = {
            number: (one.numel) for number, one in enumerate(self.target.values()) if number not in evidence.plain[1]
        }
        settled = sum(counted.get(number, 0) for number in self.pairs)
        return Settled(
            [self.pairs[number] for number in sorted(self.pairs)],
            [self.doubts[number] for number in sorted(self.doubts)],
            [self.targets[number] for number in sorted(evidence.plain[1])],
            {self.targets[number]: why for number, why in evidence.unread.items()},
            settled >= ONE_MODEL * sum(counted.values()) > 0,
            self.apart,
            self.crowded,
        )

    def _open(self) -> list[int]:
        """Returns the targets that may still be settled."""
        closed = {*self.pairs, *self.doubts, *self.evidence.unread, *self.evidence.plain[1]}
        return [number for number in range(len(self.targets)) if number not in closed]

    def _free(self) -> list[int]:
        """Returns the first of each group of equal sources that no pair uses."""
        numbers = {key: number for number, key in enumerate(self.sources)}
        used = {self.evidence.twins[numbers[key]] for pair in self.pairs.values() for key in pair.source}
        return [number for number in self.groups if number not in used]

    def _group(self, firsts: Sequence[int]) -> _Group:
        """Returns the group of equal sources; where values meet at a lower precision it may be several groups."""
        if len(firsts) == 1:
            return self.groups[firsts[0]]
        return _Group([key for first in firsts for key in self.groups[first].keys], self.source, self.plain)

    def _take(self, target: int, groups: Sequence[_Group], op: str) -> None:
        """Settles a target, of which each part is one of a group of equal sources, or leaves it to names."""
        key = self.targets[target]
        shape = self.target[key].shape if op == "rename" else None
        chosen = [group.members(self.plain(key), shape) for group in groups]
        self.proven[op] += 1
        if all(len(them) == 1 for them in chosen):
            self.pairs[target] = self._pair(key, [them[0] for them in chosen], op)
            return
        many = max(map(len, chosen))
        some = range(min(many, LISTED))
        options = [self._pair(key, [them[min(number, len(them) - 1)] for them in chosen], op) for number in some]
        what = "its values" if len(chosen) == 1 else "the values of one of its parts"
        self.doubts[target] = Doubt(key, options, f"{many:,} tensors of the source have {what}")

    def _pair(self, key: str, sources: list[str], op: str) -> Pair:
        if op == "rename" and self.source[sources[0]].shape != self.target[key].shape:
            op = "reshape"
        return Pair(key, sources, op, 1.0, ["values"])

    def _made(self, guess: Guess, op: str) -> TensorInfo | None:
        key = self.targets[guess.target]
        pair = Pair(key, [self.sources[number] for number in guess.sources], op)
        try:
            return made(pair, self.source, self.target[key].shape or ())
        except UsageError:
            return None

    def _groups(self, guess: Guess) -> list[_Group]:
        return [self.groups[self.evidence.twins[number]] for number in guess.sources]

    def _prove(self, guess: Guess) -> None:
        """Settles a target with the first operation that makes exactly its elements."""
        target = guess.target
        sign = (target, *(self.evidence.twins[number] for number in guess.sources))
        if target in self.pairs or target in self.doubts or (sign in self.tried and len(guess.ops) > 1):
            return
        self.tried.add(sign)
        for op in sorted(guess.ops, key=lambda op: -self.proven[op]):
            found = self._made(guess, op)
            if found is not None and self.evidence.same(found, self.target[self.targets[target]]):
                self._take(target, self._groups(guess), op)
                return

    def _measure(self, guess: Guess) -> None:
        """Settles a target whose elements lie near those of a source."""
        key = self.targets[guess.target]
        if not guess.sources:
            self.crowded += 1
            return
        found = self._made(guess, guess.ops[0])
        apart = None if found is None else self.evidence.apart(found, self.target[key])
        if apart is not None and apart <= NEAR:
            self._take(guess.target, self._groups(guess), guess.ops[0])
            if guess.target in self.pairs:
                self.apart[key] = apart


def checked(
    inferred: Inferred,
    settled: Settled,
    source: Mapping[str, TensorInfo],
    target: Mapping[str, TensorInfo],
    evidence: Evidence,
) -> Inferred:
    """Returns a mapping whose other pairs were compared too, where both sides are versions of one model.

    What has the same elements is certain. What has not is a doubt, if one side is of one value (so that nothing but the
    names speaks for it) or if the source is another target's by its values; else it is a tensor that was trained.
    """
    if not settled.one_model:
        return inferred
    numbers = {key: number for number, key in enumerate(source)}
    flat = {key for key, number in numbers.items() if number in evidence.plain[0]} | {*settled.plain}
    taken = {key for pair in settled.pairs for key in pair.source}
    pairs, doubts = [], list(inferred.doubts)
    for pair in inferred.pairs:
        tensor = target[pair.target]
        if "values" in pair.witnesses or pair.target in settled.unread:
            pairs.append(pair)
            continue
        try:
            same = evidence.same(made(pair, source, tensor.shape or ()), tensor)
        except UsageError:
            pairs.append(pair)
            continue
        if same:
            pairs.append(replace(pair, confidence=1.0, witnesses=[*pair.witnesses, "values"], unproven=None))
        elif not {*pair.source}.isdisjoint(taken) or (
            not settled.apart and not {pair.target, *pair.source}.isdisjoint(flat)
        ):
            what = f"its values are not those of {', '.join(pair.source)}, though most other tensors are the same"
            doubts.append(Doubt(pair.target, [pair], what))
        else:
            pairs.append(pair)
    used = {key for pair in pairs for key in pair.source}
    lone = {*inferred.only_source} | {key for pair in inferred.pairs for key in pair.source} - used
    return replace(inferred, pairs=pairs, doubts=doubts, only_source=[key for key in source if key in lone])
