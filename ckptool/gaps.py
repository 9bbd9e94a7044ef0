"""How far two large tensors of one common dtype are apart, fast: in float32 and in the cache.

A difference of two 16-bit floats, or of two float32, has a relative error of 2**-24 in float32, so sums of squares
(in runs, put together in float64) and most decisions need no more. What does need more is computed again in float64:
the largest difference, a tolerance that is nearly met, and pieces with NaN, infinities or extreme magnitudes.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ckptool.checkpoint import Storage, TensorInfo
from ckptool.data import Bytes, storage_blocks
from ckptool.dtypes import DTYPES
from ckptool.files import Files
from ckptool.values import Sums, decode

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

FAST = ("bfloat16", "float16", "float32")
"""dtypes that are exact in float32."""

PIECE = 1 << 17
"""Elements looked at together. A second thread gains little: after each of these calls it waits for Python's lock."""

RUN = 256
"""Elements whose sum of squares is one float32."""

LARGE, TINY = 1e15, 1e-12
"""Magnitudes between which squares neither overflow nor vanish in float32."""

NEAR = 1e-5
"""How near to the tolerance, relative to it, float32 may err."""


_HELD = threading.local()
"""The memory of a thread's kernels: touching 2 MB of new memory for every tensor takes a tenth of the time."""


def is_fast(a: TensorInfo, b: TensorInfo) -> bool:
    """Returns whether `measure` can compare two tensors: plain ranges of their files, of one of the `FAST` dtypes."""
    return a.dtype == b.dtype and a.dtype in FAST and all(_is_range(tensor) for tensor in (a, b))


def _is_range(tensor: TensorInfo) -> bool:
    source = tensor.source
    plain = isinstance(source, Storage) and source.byteorder == "little" and source.span.member != "deflated"
    return plain and tensor.extras is None and tensor.is_contiguous


def measure(a: TensorInfo, b: TensorInfo, files: Files, rtol: float, atol: float) -> Sums:
    """Returns the totals of two tensors that `is_fast` let pass; reads both once."""
    sums = Sums(rtol, atol)
    _Kernel(sums, a.dtype).add(_range(a, files), _range(b, files))
    return sums


def _range(tensor: TensorInfo, files: Files) -> Iterator[Bytes]:
    storage: Any = tensor.source
    return storage_blocks(storage, files, tensor.storage_offset * DTYPES[tensor.dtype].bits // 8, tensor.nbytes)


class _Kernel:
    """Memory that is used again for every piece of every tensor, and the totals it adds to."""

    def __init__(self, sums: Sums, dtype: str) -> None:
        import numpy as np

        self.sums, self.dtype = sums, dtype
        self.width = DTYPES[dtype].bits // 8
        if getattr(_HELD, "count", 0) != PIECE:
            _HELD.count, _HELD.arrays = PIECE, [np.empty(PIECE, "f4") for _ in range(4)]
        self.a, self.b, self.gap, self.room = _HELD.arrays

    def add(self, first: Iterator[Bytes], second: Iterator[Bytes]) -> None:
        """Adds two streams of blocks of equal sizes: both tensors are read from ranges of the same length."""
        step = PIECE * self.width
        for one, other in zip(first, second, strict=True):
            for start in range(0, len(one), step):
                self.piece(one[start : start + step], other[start : start + step])

    def piece(self, one: Bytes, other: Bytes) -> None:
        import numpy as np

        a, b = self.floats(one, self.a), self.floats(other, self.b)
        gap, room = self.gap[: len(a)], self.room[: len(a)]
        with np.errstate(invalid="ignore", over="ignore"):
            np.subtract(a, b, out=gap)
            np.abs(gap, out=gap)
            largest = float(gap.max())
            squares = _squares(a)
        fits = TINY**2 < squares < LARGE**2 or squares == 0
        if not (fits and (largest == 0 or TINY < largest < LARGE)):
            self.sums.add(decode(self.dtype, one), decode(self.dtype, other))
            return
        sums = self.sums
        sums.norm.add_squares(squares)
        if largest == 0:
            return
        sums.equal = False
        sums.difference.add_squares(_squares(gap))
        if largest > sums.largest * (1 - NEAR):
            at = gap >= largest * (1 - NEAR)
            sums.largest = max(sums.largest, float(np.abs(a[at].astype("f8") - b[at].astype("f8")).max()))
        if sums.close and largest > sums.atol * (1 - NEAR):
            sums.close = self.is_close(a, b, gap, room)

    def is_close(self, a: Array, b: Array, gap: Array, room: Array) -> bool:
        """Returns whether every gap is within the tolerance; where float32 cannot tell, float64 does."""
        import numpy as np

        np.abs(b, out=room)
        room *= np.float32(self.sums.rtol)
        room += np.float32(self.sums.atol)
        if (gap > room * np.float32(1 + NEAR)).any():
            return False
        doubtful = gap > room * np.float32(1 - NEAR)
        if not doubtful.any():
            return True
        one, other = a[doubtful].astype("f8"), b[doubtful].astype("f8")
        return bool((np.abs(one - other) <= self.sums.atol + self.sums.rtol * np.abs(other)).all())

    def floats(self, data: Bytes, out: Array) -> Array:
        """Returns elements as float32, those of 16 bits by pairs: even ones first, so in an order of their own."""
        import numpy as np

        if self.width == 4:
            return np.frombuffer(data, "<f4")
        if self.dtype == "float16" or len(data) % 4:
            made: Array = decode(self.dtype, data).astype("f4")
            return made
        words = np.frombuffer(data, "<u4")
        half = len(words)
        raw = out.view("u4")
        np.left_shift(words, 16, out=raw[:half])
        np.bitwise_and(words, 0xFFFF0000, out=raw[half : 2 * half])
        return out[: 2 * half]


def _squares(values: Array) -> float:
    """Returns the sum of squares of float32 numbers."""
    import numpy as np

    whole = len(values) - len(values) % RUN
    total = 0.0
    if whole:
        runs = values[:whole].reshape(-1, 1, RUN)
        total = float(np.matmul(runs, runs.reshape(-1, RUN, 1)).sum(dtype="f8"))
    if whole < len(values):
        total += float(np.square(values[whole:].astype("f8")).sum())
    return total if math.isfinite(total) else math.inf
