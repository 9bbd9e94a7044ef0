"""Finds which tensors of two sides have like fingerprints. What is found is a guess, to be proven by their elements."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import permutations
from math import prod
from typing import NamedTuple

import numpy as np

from ckptool.core.dtypes import COMMON_FLOATS
from ckptool.values.codec import Array
from ckptool.values.fingerprints.layouts import Part, Steps, put_together, recognised, taken
from ckptool.values.fingerprints.prints import Print, meeting


class Guess(NamedTuple):
    """What a target may be made of: numbers of sources, and operations of which one may be right, best first."""

    target: int
    sources: list[int]
    ops: list[str]


def alike(sources: Mapping[int, Print], targets: Mapping[int, Print], in_order: bool = True) -> dict[int, list[int]]:
    """Returns {target: the sources with the same elements, in the same order or in any}, whatever their shapes."""
    index: dict[tuple[object, ...], list[int]] = defaultdict(list)
    for number, one in sources.items() if targets else ():
        for dtype, level in one.levels.items():
            index[one.dtype, dtype, prod(one.shape), level.order if in_order else 0, level.total].append(number)
    dtypes = {one.dtype for one in sources.values()}
    found: dict[int, list[int]] = {}
    for number, one in targets.items():
        for dtype in dtypes:
            common = meeting(dtype, one.dtype) or ""
            if common in one.levels:
                level = one.levels[common]
                key = dtype, common, prod(one.shape), level.order if in_order else 0, level.total
                found.setdefault(number, []).extend(index.get(key, ()))
    return {number: sorted(them) for number, them in found.items() if them}


ALIKE = 16
"""Most sources of the elements of a target, in another order, that are compared with it."""


# --- the same elements in another order --------------------------------------------------------------------------


def reordered(sources: Mapping[int, Print], targets: Mapping[int, Print]) -> Iterator[Guess]:
    """Yields guesses for targets with the elements of one source: transposed, permuted, or their rows in an order."""
    for target, them in alike(sources, targets, in_order=False).items():
        for source in them[:ALIKE]:
            one, other = sources[source], targets[target]
            ops = [*_row_orders(one, other), *_permutations(one.shape, other.shape)]
            yield Guess(target, [source], [*dict.fromkeys(ops)])


def _permutations(old: tuple[int, ...], new: tuple[int, ...]) -> Iterator[str]:
    """Yields the ways to permute dimensions that give a shape of as many elements, those that reshape nothing first."""
    if len(old) > 5 or len(new) > 5:
        return
    orders = [order for order in permutations(range(len(old))) if [*order] != sorted(order)]
    exact = [order for order in orders if tuple(old[dim] for dim in order) == new]
    for order in [*exact, *(order for order in orders if order not in exact)]:
        made = Steps(old)
        made.permute(*order)
        made.reshape(new)
        yield made.text()


def _row_orders(one: Print, other: Print) -> Iterator[str]:
    """Yields the operation that brings a source's rows and columns into the order of a target's, if they say it."""
    dtype = meeting(one.dtype, other.dtype)
    old, new = (print_.levels[dtype].lines if dtype in print_.levels else None for print_ in (one, other))
    if old is None or new is None or one.shape != other.shape or len(one.shape) > 2:
        return
    for turned in (False, True) if len({*one.shape}) == 1 < len(one.shape) else (False,):
        made = Steps(one.shape)
        if turned:
            made.permute(1, 0)
        for dim, lines in enumerate(reversed(old) if turned else old):
            place = recognised(_positions(new[dim], lines), len(lines)) if dim < len(one.shape) else None
            if place is None and dim < len(one.shape):
                break
            made.order(place.order if place else "", dim)
        else:
            if made.steps:
                yield made.text()


def _positions(lines: Array, among: Array) -> Array:
    """Returns where each line is among others; -1 for one that is not there, or more than once."""
    order = np.argsort(among, kind="stable")
    ranked = among[order]
    first, end = (np.searchsorted(ranked, lines, side) for side in ("left", "right"))
    return np.where(end - first == 1, order[np.minimum(first, len(order) - 1)], -1)


# --- parts of tensors --------------------------------------------------------------------------------------------

PROBES = 24
"""Lines of a small tensor that are looked for in all others."""

OFTEN = 64
"""Most places of a line that are looked at: a row of zeros may be everywhere."""


class _Table:
    """Which tensors have a line, as rows (axis 0) or as columns (1)."""

    def __init__(self, lines: Mapping[tuple[int, int], Array]) -> None:
        self.lines = lines
        hashes = np.concatenate([*lines.values()] or [np.empty(0, "u8")])
        order = np.argsort(hashes, kind="stable")
        self.hashes = hashes[order]
        self.owners = np.repeat(np.arange(len(lines)), [len(one) for one in lines.values()])[order]
        self.names = [*lines]

    def owning(self, lines: Array) -> list[tuple[int, int]]:
        """Returns the tensors, and the axes, that have at least half of some probes of these lines; at most `OFTEN`."""
        probes = lines[:: max(1, len(lines) // PROBES)]
        first, end = (np.searchsorted(self.hashes, probes, side) for side in ("left", "right"))
        votes: Counter[int] = Counter()
        for low, high in zip(first.tolist(), end.tolist(), strict=True):
            votes.update({*self.owners[low : min(high, low + OFTEN)].tolist()})
        found = [owner for owner, many in votes.most_common(OFTEN) if 2 * many >= len(probes)]
        return [self.names[owner] for owner in found]


class _Piece(NamedTuple):
    """A small tensor whose lines along ``axis`` are lines of a big one: their positions there, -1 where not known."""

    small: int
    axis: int
    big: int
    big_axis: int
    positions: Array


def _pieces(smalls: Mapping[int, Print], bigs: Mapping[int, Print]) -> Iterator[_Piece]:
    """Yields the smalls that lie in a bigger tensor, each with the one in which most of its lines are."""
    pairs = {(one.dtype, other.dtype) for one in smalls.values() for other in bigs.values()}
    for old, new in sorted(pairs):
        dtype = meeting(old, new)
        if dtype is None:
            continue
        table = _Table(dict(_lines(bigs, new, dtype)))
        for (number, axis), lines in _lines(smalls, old, dtype):
            for big, big_axis in table.owning(lines) if len(lines) else ():
                if prod(bigs[big].shape) > prod(smalls[number].shape):
                    positions = _positions(lines, table.lines[big, big_axis])
                    if 2 * np.count_nonzero(positions >= 0) >= len(lines):
                        yield _Piece(number, axis, big, big_axis, positions)


def _lines(prints: Mapping[int, Print], dtype: str, level: str) -> Iterator[tuple[tuple[int, int], Array]]:
    """Yields ((tensor, axis), its lines) of the tensors of a dtype, as fingerprints of another."""
    for number, one in prints.items():
        if one.dtype == dtype and level in one.levels:
            for axis, lines in enumerate(one.levels[level].lines or ()):
                yield (number, axis), lines


def parted(sources: Mapping[int, Print], targets: Mapping[int, Print]) -> Iterator[Guess]:
    """Yields guesses for targets that are a part of a source, and for those that are put together of several."""
    for piece in _pieces(targets, sources):
        small, big = targets[piece.small], sources[piece.big]
        op = taken(big.shape, piece.big_axis, small.shape, piece.axis != piece.big_axis, piece.positions)
        if op is not None:
            yield Guess(piece.small, [piece.big], [op])
    wholes: dict[tuple[int, int], list[Part]] = defaultdict(list)
    for piece in _pieces(sources, targets):
        part = Part(piece.small, sources[piece.small].shape, piece.axis != piece.big_axis, piece.positions)
        wholes[piece.big, piece.big_axis].append(part)
    for (target, axis), parts in wholes.items():
        made = put_together(targets[target].shape, axis, parts)
        if made is not None:
            yield Guess(target, made[0], [made[1]])


# --- near tensors ------------------------------------------------------------------------------------------------

MOST = 256
"""Rows, and columns, that are compared of near tensors: every n-th. Fewer where many tensors have one shape."""

FEWEST = 32
"""Rows and columns from which tensors are near by their sums, not by accident."""

WORK = 1 << 35
"""Most products of numbers to find the near tensors of one shape: some seconds."""

NEAR = 0.35
"""How far apart the sums of near tensors are at most, of their size; of unlike tensors it is 1.4."""

SECOND = 0.5
"""How far the nearest is away at most, compared with the second."""


def near(sources: Mapping[int, Print], targets: Mapping[int, Print]) -> Iterator[Guess]:
    """Yields guesses for targets that are nearest to a source which is nearest to them, and far nearer than others.

    The guess for targets of a shape that too many tensors have is of nothing.
    """
    classes: dict[tuple[int, ...], tuple[list[tuple[int, str]], list[int]]] = defaultdict(lambda: ([], []))
    for number, one in sources.items():
        if one.dtype in COMMON_FLOATS and one.sums is not None:
            classes[one.shape][0].append((number, "rename"))
            if len(one.shape) == 2:
                classes[one.shape[::-1]][0].append((number, "transpose"))
    for number, one in targets.items():
        if one.dtype in COMMON_FLOATS and one.sums is not None:
            classes[one.shape][1].append(number)
    for some, them in classes.values():
        if some and them:
            yield from _nearest(sources, targets, some, them)


def _sketch(print_: Print, turned: bool, most: int) -> Array | None:
    """Returns the sums of some rows and columns, each without their mean; None if they say too little."""
    parts = []
    for lines in (print_.sums or ())[:: -1 if turned else 1]:
        some = lines[:: max(1, len(lines) // most)].astype("f8")
        parts.append(some - some.mean() if len(some) else some)
    made = np.concatenate(parts)
    size = float(np.linalg.norm(made))
    return made / size if len(made) >= FEWEST and np.isfinite(size) and size > 0 else None


def _nearest(
    sources: Mapping[int, Print], targets: Mapping[int, Print], some: Sequence[tuple[int, str]], them: Sequence[int]
) -> Iterator[Guess]:
    most = min(MOST, WORK // (4 * len(some) * len(them)))
    if most < FEWEST:
        yield from (Guess(target, [], []) for target in them)
        return
    rows = [(one, made) for one in some if (made := _sketch(sources[one[0]], one[1] == "transpose", most)) is not None]
    columns = [(one, made) for one in them if (made := _sketch(targets[one], False, most)) is not None]
    if not rows or not columns:
        return
    nearest = _two_nearest(*(np.stack([made for _, made in side]) for side in (rows, columns)))
    for column, (row, distance, second) in enumerate(zip(*nearest[1], strict=True)):
        best, _, runner_up = (line[row] for line in nearest[0])
        if best == column and distance < NEAR and distance < SECOND * min(second, runner_up):
            source, op = rows[row][0]
            yield Guess(columns[column][0], [source], [op])


def _two_nearest(these: Array, those: Array) -> list[tuple[Array, Array, Array]]:
    """Returns for each of these the nearest of those, its distance, and that of the second; and the other way round."""
    found = []
    best, first, second = np.zeros(len(those), int), *np.full((2, len(those)), np.inf)
    step = max(1, (1 << 22) // len(those))
    for start in range(0, len(these), step):
        apart = 1 - these[start : start + step] @ those.T
        found.append(_two_least(apart))
        mine, own, more = _two_least(apart.T)
        best = np.where(own < first, mine + start, best)
        second = np.minimum(np.minimum(second, more), np.maximum(first, own))
        first = np.minimum(first, own)
    of_these = tuple(np.concatenate(column) for column in zip(*found, strict=True))
    return [
        (nearest, *(np.sqrt(np.maximum(2 * one, 0)) for one in apart))
        for nearest, *apart in (of_these, (best, first, second))
    ]


def _two_least(numbers: Array) -> tuple[Array, Array, Array]:
    """Returns for each row where its least number is, that number, and the next."""
    lines = np.arange(len(numbers))
    where = numbers.argmin(1)
    least = numbers[lines, where]
    numbers[lines, where] = np.inf
    more = numbers.min(1)
    numbers[lines, where] = least
    return where, least, more
