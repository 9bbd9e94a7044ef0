"""Histograms in one pass: bins are multiples of a power of two, so they widen and add up without an error.

A block's numbers are counted in at most `BINS` bins between their extremes. Two histograms are added in the finer bins
that hold both. `Bins.shown` then makes `MOST` bins or fewer of them.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np

from ckptool.core.findings import Histogram
from ckptool.values.codec import Array

BINS = 256
"""Bins kept while reading: an index is one byte, and `MOST` bins remain where a quarter of the range has nearly all."""

MOST = 32
"""Bins of a report."""

RARE = 1000
"""One value of so many may be outside of the bins at each side, if the bins become finer by that."""

SAMPLE, MANY = 8, 1 << 20
"""Of tensors over `MANY` elements one of `SAMPLE` is counted: counting takes longer than all other figures together."""

LOWEST = -1074
"""The exponent of the smallest float64."""


@dataclass(slots=True)
class Bins:
    """``counts[i]`` numbers are from ``first`` + i on, below ``first`` + i + 1, in units of 2 ** ``exponent``."""

    exponent: int
    first: int
    counts: Array

    def __add__(self, other: Bins) -> Bins:
        exponent = max(self.exponent, other.exponent)
        while True:
            one, more = self._coarse(exponent), other._coarse(exponent)
            first = min(one.first, more.first)
            length = max(one.first + len(one.counts), more.first + len(more.counts)) - first
            if length <= BINS:
                break
            exponent += max((length // BINS).bit_length() - 1, 1)
        counts = np.zeros(length, "i8")
        for part in (one, more):
            counts[part.first - first :][: len(part.counts)] += part.counts
        return Bins(exponent, first, counts)

    def _coarse(self, exponent: int) -> Bins:
        """Returns the same in bins of 2 ** ``exponent``, which is at least its own exponent."""
        shift = exponent - self.exponent
        if not shift:
            return self
        step = 1 << shift
        starts = [0, *range(-self.first % step or step, len(self.counts), step)]
        return Bins(exponent, self.first >> shift, np.add.reduceat(self.counts, starts))

    def shown(self, whole: bool) -> Histogram | None:
        """Returns the histogram for a report, ``whole`` if all numbers are; None where float64 has no such edges."""
        sums = [0, *accumulate(self.counts.tolist())]
        total, first = sums[-1], self.first
        shift, low, high = self._window(sums, 0)
        finer = self._window(sums, total // RARE)
        if finer[0] < shift:
            shift, low, high = finer
        elif low == high:  # one number, whose own exponent may be tiny: a bin of a 128th of it
            size = max(abs(first), abs(first + 1)).bit_length() + self.exponent if first else 8
            shift = max(0, max(size - 8, 0 if whole else LOWEST) - self.exponent)
        exponent, begin, end = self.exponent + shift, (first + low) >> shift, ((first + high) >> shift) + 1
        at, until, step = (begin << shift) - first, (end << shift) - first, 1 << shift
        below = [sums[max(at, 0)], *sums[at + step : until : step], sums[min(until, len(sums) - 1)]]
        width: int | float = 1 << exponent if whole else math.ldexp(1, exponent)
        try:
            start = begin * width if whole else math.ldexp(begin, exponent)
        except OverflowError:
            return None
        counts = [upper - lower for lower, upper in pairwise(below)]
        return Histogram(start, width, counts, below[0], total - below[-1])

    def _window(self, sums: list[int], rare: int) -> tuple[int, int, int]:
        """Returns (shift, low, high): bins ``low`` to ``high`` lack ``rare`` values at each side or fewer.

        Made wider by 2 ** ``shift``, they are `MOST` bins or fewer. ``sums[i]`` is how many are below bin i.
        """
        low, high = bisect_right(sums, rare) - 1, bisect_left(sums, sums[-1] - rare) - 1
        shift = 0
        while ((self.first + high) >> shift) - ((self.first + low) >> shift) >= MOST:
            shift += 1
        return shift, low, high


def of_floats(values: Array, low: float, high: float, scratch: Array, codes: Array) -> Bins:
    """Returns the bins of finite floats between ``low`` and ``high``.

    ``scratch`` and ``codes`` are as long as ``values`` at least; float32 numbers are scaled in the first, if the powers
    of two that this takes are float32 numbers too.
    """
    span = high - low if math.isfinite(high - low) else max(-low, high)
    exact = math.frexp(max(-low, high))[1] - 53  # finer edges are no float64
    exponent = max(math.frexp(span)[1] - 9 if span else exact, exact, LOWEST)
    while (index := _index(high, exponent)) - (first := _index(low, exponent)) >= BINS:
        exponent += 1
    if index == first:
        return Bins(exponent, first, np.array([len(values)]))
    if values.dtype.itemsize == 4 and -100 < exponent < 100:
        scaled = np.multiply(values, np.float32(2.0**-exponent), out=scratch[: len(values)])
    else:
        scaled = np.ldexp(values.astype("f8"), -exponent)
    np.floor(scaled, out=scaled)
    if exponent > 0 and low < 0:  # what underflowed is not below zero any more
        scaled[(values < 0) & (scaled == 0)] = -1
    np.subtract(scaled, scaled.dtype.type(first), out=scaled)
    return Bins(exponent, first, _counted(scaled, codes, index - first + 1))


def of_integers(values: Array, low: int, high: int, codes: Array) -> Bins:
    """Returns the bins of integers between ``low`` and ``high``; ``codes`` are as long as ``values`` at least."""
    exponent = max((high - low).bit_length() - 8, 0)
    exponent += (high >> exponent) - (low >> exponent) >= BINS
    first = low >> exponent
    offsets = (values >> values.dtype.type(exponent)) - values.dtype.type(first)  # modulo 2 ** bits, and then 256
    return Bins(exponent, first, _counted(offsets, codes, (high >> exponent) - first + 1))


def _counted(offsets: Array, codes: Array, count: int) -> Array:
    found = codes[: len(offsets)]
    np.copyto(found, offsets, casting="unsafe")
    return np.bincount(found, minlength=count)


def _index(value: float, exponent: int) -> int:
    """Returns the largest integer not above ``value`` / 2 ** ``exponent``."""
    scaled = math.ldexp(value, -exponent)
    return math.floor(scaled) if scaled or value >= 0 else -1
