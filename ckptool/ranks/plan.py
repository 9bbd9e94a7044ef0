"""Which rank writes which bytes: consecutive ones, about as many each, and every byte once. Nothing is read.

What is written is a row of units (tensors, or files), and a rank gets the units between two cuts. A cut falls inside a
unit only where the unit can be divided.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, pairwise
from math import prod
from typing import NamedTuple

from ckptool.text import plural, size


class Segment(NamedTuple):
    """Bytes ``begin`` to ``end`` of the unit of that number."""

    unit: int
    begin: int
    end: int


Snap = Callable[[int, int, int], int]
"""(unit, byte of it, by how many bytes it may be moved) -> where the unit is cut; 0 or its size: it stays whole."""


class Division:
    """The division of units of ``sizes`` bytes over ``world`` ranks.

    A cut is moved by one per cent of a share, or to where ``snap`` finds that a unit can be cut.
    """

    def __init__(self, sizes: Sequence[int], world: int, snap: Snap) -> None:
        self.sizes, self.world = sizes, world
        self._ends = [*accumulate(sizes)]
        total = self._ends[-1] if sizes else 0
        self._cuts = [(0, 0)]
        for rank in range(1, world):
            at = total * rank // world
            unit, within = bisect_right(self._ends, at), 0
            if unit < len(sizes) and (within := at - self._ends[unit] + sizes[unit]):
                within = snap(unit, within, total // world // 100)
                if within >= sizes[unit]:
                    unit, within = unit + 1, 0
            self._cuts.append(max(self._cuts[-1], (unit, within)))
        self._cuts.append((len(sizes), 0))

    def of(self, rank: int) -> Iterator[Segment]:
        """Yields what a rank writes, in order."""
        (first, begin), (last, end) = self._cuts[rank : rank + 2]
        for unit in range(first, last + bool(end)):
            low, high = begin if unit == first else 0, end if unit == last else self.sizes[unit]
            if low < high or not self.sizes[unit]:
                yield Segment(unit, low, high)

    def shares(self) -> list[int]:
        """Returns the bytes of each rank."""
        ends = [0, *self._ends]
        return [second - first for first, second in pairwise(ends[unit] + within for unit, within in self._cuts)]

    def note(self, unit: str) -> str:
        """Returns how even it is, as a line; ``unit``: the word for a unit."""
        shares = self.shares()
        even = sum(shares) / self.world
        above = f" ({max(shares) / even - 1:+.1%} of an even one)" if even else ""
        split = len({cut[0] for cut in self._cuts if cut[1]})
        text = f"divided over {self.world:,} ranks: the largest share is {size(max(shares))}{above}"
        return f"{text}, the smallest {size(min(shares))}; {plural(split, unit)} of {len(self.sizes):,} split"


def edge(within: int, nbytes: int) -> int:
    """Returns the nearer end of a unit of ``nbytes`` bytes."""
    return nbytes if 2 * within >= nbytes else 0


def row_of(shape: Sequence[int], itemsize: int, most: int) -> int:
    """Returns the bytes of the largest rows, of any number of dimensions, that have ``most`` bytes; else an element's.

    >>> row_of((8, 100, 16), 4, 1000), row_of((8, 100, 16), 4, 10)
    (64, 4)
    """
    rows = (itemsize * prod(shape[dim:]) for dim in range(1, len(shape) + 1))
    return next((nbytes for nbytes in rows if nbytes <= most), itemsize)


def boxes(shape: tuple[int, ...], begin: int, end: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Yields (first index, size) of the boxes, in order, that are the elements ``begin`` to ``end`` in C order.

    >>> [*boxes((3, 4), 2, 9)]
    [((0, 2), (1, 2)), ((1, 0), (1, 4)), ((2, 0), (1, 1))]
    """
    if begin == 0 and end == prod(shape):
        yield (0,) * len(shape), shape
        return
    row, rest = prod(shape[1:]), shape[1:]
    while begin < end:
        first, skipped = divmod(begin, row)
        whole = end // row - first
        if skipped or not whole:
            until = min(end, (first + 1) * row)
            for offsets, sizes in boxes(rest, skipped, until - first * row):
                yield (first, *offsets), (1, *sizes)
            begin = until
        else:
            yield (first, *(0 for _ in rest)), (whole, *rest)
            begin = (first + whole) * row
