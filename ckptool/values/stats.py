"""Statistics of a block of elements, and their sums over blocks, tensors and modules.

Floats of 16 or 8 bits are widened to float32, which is exact. float32 is summed in runs of `RUN` elements, and the runs
in float64: the error grows with the length of a run, not of the tensor. Where the mean is not small relative to the
standard deviation, squares are of the distances from the mean.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ckptool.core.dtypes import DTYPES
from ckptool.core.findings import Stats
from ckptool.io.source import Bytes
from ckptool.values.codec import FOUR_BITS, Array, decode, decode_unordered
from ckptool.values.histogram import SAMPLE, Bins, of_floats, of_integers

PIECE = 1 << 19
"""Elements processed together: 2 MB as float32. Half as many fit the second-level cache, but then threads wait more."""

RUN = 256
"""Elements whose sum is one float32: 256 squares of an 8-bit integer have an exact one."""

LARGE, TINY = 1e15, 1e-12
"""Magnitudes between which squares, and sums of `RUN` of them, neither overflow nor underflow in float32."""

HUGE = 1e140
"""float64 numbers above this magnitude or below its inverse are scaled before they are squared."""

SCALE = 700
"""The power of two that they are scaled by."""


@dataclass(slots=True)
class Moments:
    """Counts, extremes, mean and ``spread`` (the sum of squared distances from the mean) of ``count`` finite numbers.

    ``mean`` is in units of 2 ** ``exponent`` and ``spread`` in its square, so that numbers of 1e200 have a spread.
    ``total`` is the exact sum of integers, None of anything else. ``bins`` is None in sums of several tensors.
    """

    count: int = 0
    low: int | float = 0
    high: int | float = 0
    mean: float = 0.0
    spread: float = 0.0
    zeros: int = 0
    nan: int = 0
    inf: int = 0
    total: int | None = None
    exponent: int = 0
    bins: Bins | None = None

    def add(self, other: Moments) -> None:
        """Adds other moments (Chan, Golub and LeVeque 1979, which avoids the cancellation of plain sums of squares)."""
        self.zeros += other.zeros
        self.nan += other.nan
        self.inf += other.inf
        if not other.count:
            return
        if not self.count:
            self.count, self.low, self.high, self.total = other.count, other.low, other.high, other.total
            self.mean, self.spread, self.exponent, self.bins = other.mean, other.spread, other.exponent, other.bins
            return
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)
        self.bins = self.bins + other.bins if self.bins and other.bins else None
        exponent = max(self.exponent, other.exponent)
        mean, spread = _scaled(self, exponent)
        other_mean, other_spread = _scaled(other, exponent)
        count = self.count + other.count
        if self.total is not None and other.total is not None:
            # The means of close integers near 2**62 are the same float, so the gap is computed from the exact sums.
            gap = (other.total * self.count - self.total * other.count) / (self.count * other.count)
            self.total += other.total
            self.mean = self.total / count
        else:
            gap = other_mean - mean
            self.total = None
            self.mean = mean + gap * (other.count / count)
        self.spread = spread + other_spread + gap * gap * (self.count * (other.count / count))
        self.count, self.exponent = count, exponent

    def stats(self) -> Stats:
        """Returns the `Stats` for these moments."""
        if not self.count:
            return Stats(None, None, None, None, None, self.zeros, self.nan, self.inf)
        # + 0 turns -0.0 into 0.0: which of the two is the minimum would depend on how the numbers were split.
        low, high = self.low + 0, self.high + 0
        std = None
        if self.count > 1:
            try:
                std = math.ldexp(math.sqrt(self.spread / (self.count - 1)), self.exponent)
            except OverflowError:  # half of them the largest float, half of them the smallest
                std = None
        mean = math.ldexp(self.mean, self.exponent) + 0
        bins = self.bins.shown(self.total is not None) if self.bins else None
        return Stats(mean, std, low, high, max(abs(low), abs(high)), self.zeros, self.nan, self.inf, bins)


def _scaled(one: Moments, exponent: int) -> tuple[float, float]:
    """Returns (mean, spread) in units of 2 ** ``exponent``, which is at least its own exponent."""
    down = one.exponent - exponent
    return (one.mean, one.spread) if not down else (math.ldexp(one.mean, down), math.ldexp(one.spread, 2 * down))


def dot(one: Array, other: Array | None = None, run: int = RUN) -> float:
    """Returns the sum of products of floating-point numbers, of ``run`` each in their dtype and then in float64.

    Without ``other`` it is the sum of numbers. Infinite where it overflows or is NaN.
    """
    whole = len(one) - len(one) % run
    total = 0.0
    if whole:
        # A batch of products of one row by one column: BLAS's dot, on one thread.
        columns = np.ones((run, 1), one.dtype) if other is None else other[:whole].reshape(-1, run, 1)
        total = float(np.matmul(one[:whole].reshape(-1, 1, run), columns).sum(dtype="f8"))
    if whole < len(one):
        total += float((one[whole:].astype("f8") * (1 if other is None else other[whole:])).sum())
    return total if math.isfinite(total) else math.inf


class Workspace:
    """Arrays for one thread's computations, reused for every block: allocating them costs more than the sums."""

    def __init__(self) -> None:
        self.floats = np.empty(PIECE, "f4")
        self.more = np.empty(PIECE, "f4")
        self.flags = np.empty(PIECE, "?")
        self.codes = np.empty(PIECE, "u1")
        self.sample = 1

    def moments(self, dtype: str, block: Bytes, sampled: bool = False) -> Moments:
        """Returns the moments of a block of whole elements, little-endian, of a dtype that `has_values`.

        ``sampled``: not all numbers are counted in bins, as the tensor has too many.
        """
        found = Moments()
        self.sample = SAMPLE if sampled else 1
        kind, width = DTYPES[dtype].kind, DTYPES[dtype].bits // 8
        measure: Callable[[str, Bytes], Moments] = {
            "bool": self._booleans, "int": self._integers, "complex": self._complex,
        }.get(kind, {8: self._doubles, 2: self._halves}.get(width, self._floats))  # fmt: skip
        step = PIECE * width if dtype != FOUR_BITS else PIECE // 2
        for start in range(0, len(block), step):
            found.add(measure(dtype, block[start : start + step]))
        return found

    # --- floats --------------------------------------------------------------------------------------------------

    def _doubles(self, dtype: str, block: Bytes) -> Moments:
        return self._of_floats(np.frombuffer(block, "<f8"))

    def _floats(self, dtype: str, block: Bytes) -> Moments:
        """Floats of 32, 8 or 4 bits."""
        return self._of_floats(decode_unordered(dtype, block, self.floats))

    def _halves(self, dtype: str, block: Bytes) -> Moments:
        """Floats of sixteen bits, whose minimum and maximum are found from their codes."""
        codes = np.frombuffer(block, "<u2")
        # As integers, positive codes have the order of their numbers, and negative ones the reverse order.
        signed = codes.view("<i2")
        top, bottom = int(codes.max()), int(codes.min())
        high, low = int(signed.max()), int(signed.min())
        infinity = 0x7F80 if dtype == "bfloat16" else 0x7C00
        finite = high < infinity and top < 0x8000 + infinity
        values = decode_unordered(dtype, block, self.floats, finite)
        if not finite:
            return self._of_floats(values)
        largest = high if high >= 0 else low & 0xFFFF
        smallest = top if top >= 0x8000 else bottom
        low_value, high_value = decode(dtype, struct.pack("<2H", smallest, largest)).tolist()
        zeros = self._zeros(values) if bottom == 0 or low == -0x8000 else 0
        return self._of_finite(values, low_value, high_value, zeros)

    def _of_floats(self, values: Array) -> Moments:
        """Returns the moments of float32 or float64 numbers, of which some may be NaN or infinite."""
        low, high = float(values.min()), float(values.max())  # NaN, if there is one
        if math.isfinite(low) and math.isfinite(high):
            return self._of_finite(values, low, high, self._zeros(values))
        finite = np.isfinite(values)
        nan = int(np.count_nonzero(np.isnan(values)))
        left = values[finite]
        found = self._of_floats(left) if len(left) else Moments()
        found.nan, found.inf = nan, len(values) - len(left) - nan
        return found

    def _zeros(self, values: Array) -> int:
        return int(np.count_nonzero(np.equal(values, 0, out=self.flags[: len(values)])))

    def _of_finite(self, values: Array, low: float, high: float, zeros: int) -> Moments:
        found = self._spread(values, low, high, zeros)
        found.bins = of_floats(self._some(values), low, high, self.more, self.codes)
        return found

    def _some(self, values: Array) -> Array:
        """Returns the numbers to count in bins: all, or the first of them."""
        return values[: -(-len(values) // self.sample)]

    def _spread(self, values: Array, low: float, high: float, zeros: int) -> Moments:
        count = len(values)
        if low == high:
            return Moments(count, low, high, low, 0.0, zeros)
        if values.dtype.itemsize == 8 or not TINY < max(-low, high) < LARGE:
            return self._of_doubles(values, low, high, zeros)
        total, squares = self._sums(values)
        mean = total / count
        spread = squares - total * mean
        if spread < squares / 4:  # the mean is over 1.7 times the standard deviation: the difference has lost digits
            if high - low < TINY:
                return self._of_doubles(values, low, high, zeros)
            centre = np.float32(mean)
            total, squares = self._sums(np.subtract(values, centre, out=self.more[:count]))
            mean = float(centre) + total / count
            spread = max(squares - total * total / count, 0.0)
        return Moments(count, low, high, mean, spread, zeros)

    def _sums(self, values: Array) -> tuple[float, float]:
        """Returns the sum and the sum of squares of float32 numbers."""
        return dot(values), dot(values, values)

    def _of_doubles(self, values: Array, low: float, high: float, zeros: int) -> Moments:
        """Returns the moments of finite numbers, computed in float64 and for any magnitude."""
        count, largest = len(values), max(-low, high)
        exponent = SCALE if largest > HUGE else -SCALE if largest < 1 / HUGE else 0
        wide = values.astype("f8")
        if exponent:
            wide *= 2.0**-exponent
        mean = float(wide.sum()) / count
        wide -= mean
        total = float(wide.sum())  # the rounding error of the mean
        spread = max(float(np.square(wide, out=wide).sum()) - total * total / count, 0.0)
        return Moments(count, low, high, mean + total / count, spread, zeros, exponent=exponent)

    # --- others --------------------------------------------------------------------------------------------------

    def _complex(self, dtype: str, block: Bytes) -> Moments:
        values = decode(dtype, block)
        finite = np.isfinite(values)
        nan = int(np.count_nonzero(np.isnan(values)))
        left = values[finite]
        with np.errstate(over="ignore"):  # only the magnitude of the largest complex128 overflows
            sizes = np.minimum(np.abs(left), np.finfo("f8").max)
        found = Moments()
        for start in range(0, len(sizes), PIECE):
            found.add(self._of_floats(sizes[start : start + PIECE]))
        found.nan, found.inf = nan, len(values) - len(left) - nan
        return found

    def _booleans(self, dtype: str, block: Bytes) -> Moments:
        values = np.frombuffer(block, "u1")
        count, ones = len(values), int(np.count_nonzero(values))
        spread = ones * (count - ones) / count
        low, high = int(ones == count), int(ones > 0)
        bins = of_integers(self._some(values), low, high, self.codes)
        return Moments(count, low, high, ones / count, spread, count - ones, total=ones, bins=bins)

    def _integers(self, dtype: str, block: Bytes) -> Moments:
        values: Array = decode(dtype, block)
        count = len(values)
        low, high = int(values.min()), int(values.max())
        zeros = self._zeros(values) if low <= 0 <= high else 0
        bins = of_integers(self._some(values), low, high, self.codes)
        if values.dtype.itemsize == 1:
            out = self.floats[:count]
            out[:] = values
            sums = self._sums(out)
            total, squares = int(sums[0]), int(sums[1])
            spread = (count * squares - total * total) / count
            return Moments(count, low, high, total / count, spread, zeros, total=total, bins=bins)
        unsigned = values.astype("u8") - np.uint64(low % 2**64)  # distance from the smallest: exact modulo 2**64
        above = (int((unsigned >> np.uint64(32)).sum()) << 32) + int((unsigned & np.uint64(0xFFFFFFFF)).sum())
        wide = unsigned.astype("f8")
        wide -= above / count
        rest = float(wide.sum())
        spread = max(float(np.square(wide, out=wide).sum()) - rest * rest / count, 0.0)
        total = above + count * low
        return Moments(count, low, high, total / count, spread, zeros, total=total, bins=bins)
