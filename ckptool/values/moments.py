"""Statistics that can be put together: of one block of numbers, of a tensor's blocks, of the tensors of a module."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ckptool.core.findings import Stats


@dataclass(slots=True)
class Moments:
    """Counts, extremes, mean and ``spread`` (the sum of squared distances from the mean) of ``count`` finite numbers.

    ``mean`` is in units of 2 ** ``exponent`` and ``spread`` in its square, so that numbers of 1e200 have a spread.
    ``total`` is the exact sum of integers, None of anything else.
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

    def add(self, other: Moments) -> None:
        """Makes these the moments of both (Chan, Golub and LeVeque 1979: nothing cancels, as in sums of squares)."""
        self.zeros += other.zeros
        self.nan += other.nan
        self.inf += other.inf
        if not other.count:
            return
        if not self.count:
            self.count, self.low, self.high, self.total = other.count, other.low, other.high, other.total
            self.mean, self.spread, self.exponent = other.mean, other.spread, other.exponent
            return
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)
        exponent = max(self.exponent, other.exponent)
        mean, spread = _scaled(self, exponent)
        other_mean, other_spread = _scaled(other, exponent)
        count = self.count + other.count
        if self.total is not None and other.total is not None:
            # Integers of 2**62 that lie close together have the same float for a mean: their sums are exact.
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
        """Returns what is told of them."""
        if not self.count:
            return Stats(None, None, None, None, None, self.zeros, self.nan, self.inf)
        # + 0 makes a 0.0 of a -0.0: which of them is the smallest would depend on how the numbers were split.
        low, high = self.low + 0, self.high + 0
        std = None
        if self.count > 1:
            try:
                std = math.ldexp(math.sqrt(self.spread / (self.count - 1)), self.exponent)
            except OverflowError:  # half of them the largest float, half of them the smallest
                std = None
        mean = math.ldexp(self.mean, self.exponent) + 0
        return Stats(mean, std, low, high, max(abs(low), abs(high)), self.zeros, self.nan, self.inf)


def _scaled(one: Moments, exponent: int) -> tuple[float, float]:
    """Returns (mean, spread) in units of 2 ** ``exponent``, which is no smaller than its own."""
    down = one.exponent - exponent
    return (one.mean, one.spread) if not down else (math.ldexp(one.mean, down), math.ldexp(one.spread, 2 * down))
