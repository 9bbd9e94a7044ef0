"""The moments of a block of elements, computed where the block lies in the cache; and its NaN and infinities alone.

A float of 16 or 8 bits is widened to float32, which is exact, and float32 is summed in runs of `RUN` elements whose
sums are put together in float64: an error grows with the length of a run, not with that of the tensor. Where the mean
is not small beside the spread, the squares are those of the distances from it.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

from ckptool.core.dtypes import DTYPES
from ckptool.values.compare import decode
from ckptool.values.moments import Moments

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

Bytes = bytes | memoryview

PIECE = 1 << 19
"""Elements looked at together: 2 MB as float32. Half as many fit the second-level cache, and threads wait more."""

RUN = 256
"""Elements whose sum is one float32: 256 squares of an 8-bit integer have an exact one."""

LARGE, TINY = 1e15, 1e-12
"""Magnitudes between which squares, and sums of `RUN` of them, neither overflow nor vanish in float32."""

HUGE = 1e140
"""The magnitude from which float64 numbers are scaled before they are squared; below its inverse too."""

SCALE = 700
"""The power of two they are scaled by."""


def is_measured(dtype: str) -> bool:
    """Returns whether `Workspace.moments` knows what the bytes of a dtype mean."""
    row = DTYPES[dtype]
    return row.kind in ("float", "complex", "int", "bool") and row.in_torch


class Workspace:
    """Memory for one thread's computations, used again for every block: fresh pages cost more than the sums."""

    def __init__(self) -> None:
        import numpy as np

        self.floats = np.empty(PIECE, "f4")
        self.more = np.empty(PIECE, "f4")
        self.flags = np.empty(PIECE, "?")
        self.ones = np.ones((RUN, 1), "f4")

    def moments(self, dtype: str, block: Bytes) -> Moments:
        """Returns the moments of a block of whole elements, little-endian. See `is_measured`."""
        found = Moments()
        kind, width = DTYPES[dtype].kind, DTYPES[dtype].bits // 8
        measure: Callable[[str, Bytes], Moments] = {
            "bool": self._booleans, "int": self._integers, "complex": self._complex,
        }.get(kind, {8: self._doubles, 4: self._singles, 2: self._halves}.get(width, self._small))  # fmt: skip
        step = PIECE * width if dtype != FOUR_BITS else PIECE // 2
        for start in range(0, len(block), step):
            found.add(measure(dtype, block[start : start + step]))
        return found

    # --- floats --------------------------------------------------------------------------------------------------

    def _singles(self, dtype: str, block: Bytes) -> Moments:
        import numpy as np

        return self._of_floats(np.frombuffer(block, "<f4"))

    def _doubles(self, dtype: str, block: Bytes) -> Moments:
        import numpy as np

        return self._of_floats(np.frombuffer(block, "<f8"))

    def _small(self, dtype: str, block: Bytes) -> Moments:
        """Eight or four bits: looked up, two at a time."""
        import numpy as np

        table = _pairs(dtype)
        if dtype == FOUR_BITS:
            codes = np.frombuffer(block, "u1")
        elif len(block) % 2:
            last = np.array([decode(dtype, block[-1:])[0]], "f4")
            found = self._small(dtype, block[:-1]) if len(block) > 1 else Moments()
            found.add(self._of_floats(last))
            return found
        else:
            codes = np.frombuffer(block, "<u2")
        out = self.floats[: 2 * len(codes)]
        np.take(table, codes, out=out.view("u8"), mode="clip")
        return self._of_floats(out)

    def _halves(self, dtype: str, block: Bytes) -> Moments:
        """Two elements of 16 bits are read as one word; the order of a block's elements is of no matter here."""
        import numpy as np

        if len(block) % 4:
            found = self._halves(dtype, block[:-2]) if len(block) > 2 else Moments()
            with np.errstate(invalid="ignore"):  # signalling NaNs
                last = decode(dtype, block[-2:]).astype("f4")
            found.add(self._of_floats(last))
            return found
        codes, words = np.frombuffer(block, "<u2"), np.frombuffer(block, "<u4")
        half = len(words)
        out = self.floats[: 2 * half]
        raw = out.view("u4")
        np.left_shift(words, 16, out=raw[:half])
        if dtype == "bfloat16":
            np.bitwise_and(words, 0xFFFF0000, out=raw[half:])
        else:  # the exponent's bits moved to their place, with the sign left in its own; then its bias
            raw[half:] = words
            np.right_shift(out.view("i4"), 3, out=out.view("i4"))
            np.bitwise_and(raw, 0x8FFFE000, out=raw)
            np.multiply(out, np.float32(2.0**112), out=out)
        # As integers these order as they do as numbers: positive ones upwards, and negative ones downwards.
        signed = codes.view("<i2")
        top, bottom = int(codes.max()), int(codes.min())
        high, low = int(signed.max()), int(signed.min())
        infinity = 0x7F80 if dtype == "bfloat16" else 0x7C00
        if high >= infinity or top >= 0x8000 + infinity:
            if dtype != "bfloat16":
                with np.errstate(invalid="ignore"):  # signalling NaNs
                    out[:] = decode(dtype, block)
            return self._of_floats(out)
        largest = high if high >= 0 else low & 0xFFFF
        smallest = top if top >= 0x8000 else bottom
        zeros = self._zeros(out) if bottom == 0 or low == -0x8000 else 0
        return self._of_finite(out, _value(dtype, smallest), _value(dtype, largest), zeros)

    def _of_floats(self, values: Array) -> Moments:
        """Returns the moments of float32 or float64 numbers, of which some may be NaN or infinite."""
        import numpy as np

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
        import numpy as np

        return int(np.count_nonzero(np.equal(values, 0, out=self.flags[: len(values)])))

    def _of_finite(self, values: Array, low: float, high: float, zeros: int) -> Moments:
        import numpy as np

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
        import numpy as np

        whole = len(values) - len(values) % RUN
        total = squares = 0.0
        if whole:
            # A matrix product of one row by one column, many times over: the BLAS library's dot, on one thread.
            runs = values[:whole].reshape(-1, 1, RUN)
            total = float(np.matmul(runs, self.ones).sum(dtype="f8"))
            squares = float(np.matmul(runs, runs.reshape(-1, RUN, 1)).sum(dtype="f8"))
        if whole < len(values):
            rest = values[whole:].astype("f8")
            total += float(rest.sum())
            squares += float(np.square(rest).sum())
        return total, squares

    def _of_doubles(self, values: Array, low: float, high: float, zeros: int) -> Moments:
        """Returns the moments of finite numbers, computed in float64 and for any magnitude."""
        import numpy as np

        count, largest = len(values), max(-low, high)
        exponent = SCALE if largest > HUGE else -SCALE if largest < 1 / HUGE else 0
        wide = values.astype("f8")
        if exponent:
            wide *= 2.0**-exponent
        mean = float(wide.sum()) / count
        wide -= mean
        total = float(wide.sum())  # what rounding left of the mean
        spread = max(float(np.square(wide, out=wide).sum()) - total * total / count, 0.0)
        return Moments(count, low, high, mean + total / count, spread, zeros, exponent=exponent)

    # --- others --------------------------------------------------------------------------------------------------

    def _complex(self, dtype: str, block: Bytes) -> Moments:
        import numpy as np

        values = decode(dtype, block)
        finite = np.isfinite(values)
        nan = int(np.count_nonzero(np.isnan(values)))
        left = values[finite]
        with np.errstate(over="ignore"):  # only that of the largest complex128 is beyond float64
            sizes = np.minimum(np.abs(left), np.finfo("f8").max)
        found = Moments()
        for start in range(0, len(sizes), PIECE):
            found.add(self._of_floats(sizes[start : start + PIECE]))
        found.nan, found.inf = nan, len(values) - len(left) - nan
        return found

    def _booleans(self, dtype: str, block: Bytes) -> Moments:
        import numpy as np

        values = np.frombuffer(block, "u1")
        count, ones = len(values), int(np.count_nonzero(values))
        spread = ones * (count - ones) / count
        return Moments(count, int(ones == count), int(ones > 0), ones / count, spread, count - ones, total=ones)

    def _integers(self, dtype: str, block: Bytes) -> Moments:
        import numpy as np

        values: Array = decode(dtype, block)
        count = len(values)
        low, high = int(values.min()), int(values.max())
        zeros = self._zeros(values) if low <= 0 <= high else 0
        if values.dtype.itemsize == 1:
            out = self.floats[:count]
            out[:] = values
            sums = self._sums(out)
            total, squares = int(sums[0]), int(sums[1])
            return Moments(
                count, low, high, total / count, (count * squares - total * total) / count, zeros, 0, 0, total
            )
        unsigned = values.astype("u8") - np.uint64(low % 2**64)  # how far above the smallest: exact, modulo 2**64
        above = (int((unsigned >> np.uint64(32)).sum()) << 32) + int((unsigned & np.uint64(0xFFFFFFFF)).sum())
        wide = unsigned.astype("f8")
        wide -= above / count
        rest = float(wide.sum())
        spread = max(float(np.square(wide, out=wide).sum()) - rest * rest / count, 0.0)
        total = above + count * low
        return Moments(count, low, high, total / count, spread, zeros, 0, 0, total)


FOUR_BITS = "float4_e2m1fn_x2"
"""Two numbers per element."""


def _value(dtype: str, code: int) -> float:
    """Returns the number that 16 bits stand for."""
    if dtype == "bfloat16":
        return float(struct.unpack("<f", struct.pack("<I", code << 16))[0])
    return float(struct.unpack("<e", struct.pack("<H", code))[0])


@cache
def _pairs(dtype: str) -> Array:
    """Returns what two neighbouring codes of a small float stand for, as two float32 in eight bytes."""
    import numpy as np

    if dtype == FOUR_BITS:
        return decode(dtype, bytes(range(256))).astype("<f4").view("u8")
    one = decode(dtype, bytes(range(256))).astype("f4")
    both = np.empty((256, 256, 2), "<f4")
    both[:, :, 0], both[:, :, 1] = one, one[:, None]
    return both.view("u8").reshape(-1)


# --- NaN and infinities alone --------------------------------------------------------------------------------------

_FIRST_SPECIAL = {
    "float64": 0x7FF << 52, "float32": 0xFF << 23, "bfloat16": 0xFF << 7, "float16": 0x1F << 10,
    "float8_e5m2": 0x7C, "float8_e4m3fn": 0x7F,
}  # fmt: skip
"""The smallest code, its sign aside, that is no number: infinity, but for float8_e4m3fn, which has none."""


def count_special(dtype: str, block: Bytes) -> tuple[int, int]:
    """Returns how many of a block's floats are NaN, and how many infinite; a complex number is what a component is.

    Where there are none, that is two passes over integers.
    """
    import numpy as np

    components = 2 if DTYPES[dtype].kind == "complex" else 1
    dtype = {"complex128": "float64", "complex64": "float32", "complex32": "float16"}.get(dtype, dtype)
    if dtype in ("float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"):
        code = 0xFF if dtype == "float8_e8m0fnu" else 0x80
        return int(np.count_nonzero(np.frombuffer(block, "u1") == code)), 0
    first = _FIRST_SPECIAL.get(dtype)
    if first is None:  # the floats of six and four bits have neither
        return 0, 0
    width = DTYPES[dtype].bits
    codes = np.frombuffer(block, f"<u{width // 8}")
    sign = 1 << (width - 1)
    if int(codes.max()) < sign + first and int(codes.view(f"<i{width // 8}").max()) < first:
        return 0, 0
    sizes = (codes & codes.dtype.type(sign - 1)).reshape(-1, components)
    if dtype == "float8_e4m3fn":
        return int(np.count_nonzero(sizes >= first)), 0
    nan = (sizes > first).any(axis=1)
    return int(np.count_nonzero(nan)), int(np.count_nonzero((sizes == first).any(axis=1) & ~nan))
