"""The distance of two tensors' values: computed in float64, or in float32 where that is enough.

A quantised tensor's values are ``(integer - zero point) * scale``, computed in float32 as `torch.dequantize` does.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import numpy as np

from ckptool.core.dtypes import DTYPES
from ckptool.core.findings import Distance
from ckptool.core.tensor import Opaque, TensorInfo, plain_range
from ckptool.core.tree import Global
from ckptool.errors import UnsupportedError
from ckptool.io.files import Files
from ckptool.io.source import Bytes
from ckptool.values.blocks import tensor_blocks
from ckptool.values.codec import FOUR_BITS, Array, decode, decode_unordered, has_values
from ckptool.values.stats import HUGE, LARGE, TINY, dot
from ckptool.values.streams import in_step

SMALL = 1 << 14
"""Elements up to which two tensors are always compared in float64."""


def distance(a: TensorInfo, b: TensorInfo, files: Files, rtol: float, atol: float) -> Distance:
    """Returns how far two tensors of one shape are apart; reads both once. Both must have numbers (`has_numbers`)."""
    return measured(a, b, files, rtol, atol).distance()


def measured(a: TensorInfo, b: TensorInfo, files: Files, rtol: float, atol: float, equal: bool = False) -> Sums:
    """Returns the sums of two tensors, which `distance` is made of; of ``equal`` ones reads one, unless `is_fast`."""
    sums = Sums(rtol, atol)
    if is_fast(a, b):
        _Kernel(sums, a.dtype).add(tensor_blocks(a, files), tensor_blocks(b, files))
    else:
        (blocks, dtype), (others, other_dtype) = (
            (_dequantized(tensor, files), "float32")
            if tensor.kind == "quantized"
            else (tensor_blocks(tensor, files), tensor.dtype)
            for tensor in (a, b)
        )
        if equal:
            for one in blocks:
                sums.add_equal(decode(dtype, one))
            return sums
        for one, other in in_step(blocks, others, DTYPES[dtype].bits // 8, DTYPES[other_dtype].bits // 8):
            sums.add(decode(dtype, one), decode(other_dtype, other))
    return sums


def has_numbers(tensor: TensorInfo) -> bool:
    """Returns whether a tensor has a number per element that can be read."""
    if tensor.kind == "quantized":
        return _scheme(tensor) is not None
    return tensor.kind == "dense" and has_values(tensor.dtype) and tensor.dtype != FOUR_BITS


class _Scheme(NamedTuple):
    """A quantised tensor's integers and how they become values: one scale and zero point, or one per channel.

    ``step`` is how many successive elements have one of the ``channels``.
    """

    integers: TensorInfo
    scale: float | TensorInfo
    zero_point: int | TensorInfo
    step: int = 1
    channels: int = 1


_INTEGERS = {"qint8": "i1", "quint8": "u1", "qint32": "<i4", "quint4x2": "u1"}
"""How each quantised dtype's integers are stored; a byte of quint4x2 has two, that in the low bits first."""


def _scheme(tensor: TensorInfo) -> _Scheme | None:
    """Returns how a quantised tensor is dequantised; None for a dtype or parameters of an unknown form."""
    source, shape = tensor.source, tensor.shape or ()
    arguments = source.node.args if isinstance(source, Opaque) else ()
    if tensor.dtype not in _INTEGERS or len(arguments) < 5 or not isinstance(arguments[4], tuple):
        return None
    integers = tensor.parts[0]
    match arguments[4]:
        case (Global(), float(scale), int(zero_point)) if abs(zero_point) < 1 << 31:
            return _Scheme(integers, scale, zero_point)
        case (Global(), TensorInfo() as scales, TensorInfo() as zero_points, int(axis)) if 0 <= axis < len(shape):
            if scales.shape == zero_points.shape == (shape[axis],) and has_numbers(scales) and has_numbers(zero_points):
                return _Scheme(integers, scales, zero_points, math.prod(shape[axis + 1 :]), shape[axis])
    return None


def _dequantized(tensor: TensorInfo, files: Files) -> Iterator[Bytes]:
    """Yields the values of a quantised tensor in C order, as float32 in blocks of whole elements."""
    scheme = _scheme(tensor)
    if scheme is None:
        raise UnsupportedError(f"a {tensor.dtype} tensor cannot be dequantised")
    numbers: list[Any] = [scheme.scale, scheme.zero_point]
    for index, one in enumerate(numbers):
        if isinstance(one, TensorInfo):
            numbers[index] = np.concatenate(
                [decode(one.dtype, block) for block in tensor_blocks(one, files)] or [np.empty(0)]
            )
    scale, zero_point = np.asarray(numbers[0], "f4"), np.asarray(numbers[1], "f8")
    start = 0
    for block in tensor_blocks(scheme.integers, files):
        stored = np.frombuffer(block, _INTEGERS[tensor.dtype])
        if tensor.dtype == "quint4x2":
            stored = np.stack((stored & 15, stored >> 4), 1).reshape(-1)[: tensor.numel - start]
        values = stored.astype("f8")
        if scale.ndim:
            channels = np.arange(start, start + len(values)) // scheme.step % scheme.channels
            made = (values - zero_point[channels]).astype("f4") * scale[channels]
        else:
            made = (values - zero_point).astype("f4") * scale
        start += len(values)
        yield made.astype("<f4").tobytes()


class Products:
    """A running sum of products as scale**2 * total, so that squares of 1e200 do not overflow (LAPACK's dlassq)."""

    __slots__ = ("scale", "total")

    def __init__(self) -> None:
        self.scale = self.total = 0.0

    def add(self, total: float, scale: float = 1.0) -> None:
        """Adds ``scale**2 * total``, computed by the caller."""
        if not total or not scale:
            return
        if scale > self.scale:
            self.total, total = total, self.total
            self.scale, scale = scale, self.scale
        self.total += total * (scale / self.scale) ** 2

    def over(self, other: Products) -> float | None:
        """Returns the root of this sum over that of another; None if that is zero, or the ratio overflows float64."""
        if not self.scale:
            return 0.0
        if not other.scale:
            return None
        ratio = (self.scale / other.scale) * math.sqrt(self.total / other.total)
        return ratio if math.isfinite(ratio) else None


class Sums:
    """Running totals over blocks, in float64: of |a - b|, and of the products of a - b, a, b, and of a and b."""

    __slots__ = (
        "a", "apart", "atol", "b", "bounded", "close", "count", "dot", "equal", "gap", "largest", "rtol"
    )  # fmt: skip

    def __init__(self, rtol: float, atol: float) -> None:
        self.rtol, self.atol = rtol, atol
        self.equal = self.close = self.bounded = True
        self.count = 0
        self.largest = self.apart = 0.0
        self.gap, self.a, self.b, self.dot = Products(), Products(), Products(), Products()

    def add(self, a: Array, b: Array) -> None:
        exact = a.dtype.kind in "iu" and b.dtype.kind in "iu"
        self.count += len(a)
        if exact:
            apart, gap = _integer_gaps(a, b)
        else:
            with np.errstate(invalid="ignore", over="ignore"):
                a, b = (part if part.dtype.kind == "c" else part.astype("f8") for part in (a, b))
                apart = ~((a == b) | (np.isnan(a) & np.isnan(b)))
                gap = np.where(apart, np.abs(a - b), 0.0)
        self.equal &= not apart.any()
        if apart.any():
            finite = np.isfinite(gap)
            with np.errstate(invalid="ignore", over="ignore"):
                near = finite & (gap <= (0 if exact else self.atol + self.rtol * np.abs(b)))
            self.close &= bool(near[apart].all())
            self.bounded &= bool(finite.all())
            gap = gap if self.bounded else gap[finite]
            self.largest = max(self.largest, float(gap.max(initial=0.0)))
            with np.errstate(over="ignore"):
                self.apart += float(gap.sum())
            gap, scale = _scaled(gap)
            self.gap.add(dot(gap, gap), scale)
        wide = "c16" if "c" in (a.dtype.kind, b.dtype.kind) else "f8"
        a, b = (part.astype(wide, copy=False) for part in (a, b))
        finite = np.isfinite(a) & np.isfinite(b)
        (a, scale), (b, other) = (
            _scaled((part if finite.all() else part[finite]).view("f8")) for part in (a, b)
        )  # of complex numbers the real and imaginary parts
        self.a.add(dot(a, a), scale)
        self.b.add(dot(b, b), other)
        self.dot.add(dot(a, b), math.sqrt(scale) * math.sqrt(other))

    def add_equal(self, values: Array) -> None:
        """Adds elements that are the same in both."""
        self.count += len(values)
        values = values.astype("c16" if values.dtype.kind == "c" else "f8", copy=False)
        values, scale = _scaled(values[np.isfinite(values)].view("f8"))
        total = dot(values, values)
        for products in (self.a, self.b, self.dot):
            products.add(total, scale)

    def merge(self, other: Sums) -> None:
        """Adds the sums of other tensors."""
        self.equal &= other.equal
        self.close &= other.close
        self.bounded &= other.bounded
        self.count += other.count
        self.largest = max(self.largest, other.largest)
        self.apart += other.apart
        for name in ("gap", "a", "b", "dot"):
            one: Products = getattr(other, name)
            getattr(self, name).add(one.total, one.scale)

    def distance(self) -> Distance:
        if self.equal:
            return Distance("equal")
        status: Literal["close", "differ"] = "close" if self.close else "differ"
        if not self.bounded:
            return Distance(status, None, None, None, None)
        mean = self.apart / max(self.count, 1) if math.isfinite(self.apart) else None
        return Distance(status, self.largest, self.gap.over(self.a), mean, self.cosine())

    def cosine(self) -> float | None:
        """Returns a.b / (|a| |b|), between -1 and 1; None where either is zero.

        Near 1 that quotient has lost what tells it from 1, so where the norms are alike it is computed as
        1 - (|a - b|^2 - (|a| - |b|)^2) / (2 |a| |b|).
        """
        ratio, gap = self.b.over(self.a), self.gap.over(self.a)
        if not (self.a.scale and self.b.scale):
            return None
        if ratio is not None and gap is not None and 1 / ALIKE < ratio < ALIKE:
            found = 1 - (gap - 1 + ratio) * (gap + 1 - ratio) / (2 * ratio)
        else:
            found = self.dot.scale / self.a.scale * (self.dot.scale / self.b.scale) * self.dot.total
            found /= math.sqrt(self.a.total) * math.sqrt(self.b.total)
        return min(max(found, -1.0), 1.0)


def _scaled(values: Array) -> tuple[Array, float]:
    """Returns finite numbers whose squares neither overflow nor vanish, and what they were divided by."""
    largest = max(float(values.max(initial=0.0)), -float(values.min(initial=0.0)))
    return (values, 1.0) if 1 / HUGE < largest < HUGE or not largest else (values / largest, largest)


def _integer_gaps(a: Array, b: Array) -> tuple[Any, Any]:
    """Returns (mask of differing elements, |a - b| as float64); exact but for that rounding."""
    one, other = a.astype("u8"), b.astype("u8")  # modulo 2^64 the larger minus the smaller is exact
    negative, other_negative = a < 0, b < 0
    larger = np.where(negative == other_negative, one >= other, other_negative)
    gap = np.where(larger, one - other, other - one)
    return gap > 0, gap.astype("f8")


# --- large tensors of one common dtype -----------------------------------------------------------------------------
#
# A difference of two 16-bit floats, or of two float32, has a relative error of 2**-24 in float32, so sums of squares
# (in runs that are added in float64) and most decisions need no more. These do, and are computed again in float64:
# the largest difference, a tolerance that is nearly met, and pieces with NaN, infinities or extreme magnitudes.

FAST = ("bfloat16", "float16", "float32")
"""dtypes that are exact in float32."""

PIECE = 1 << 17
"""Elements processed together. A second thread gains little: after each of these calls it waits for the GIL."""

LONG = 1 << 11
"""Elements whose products are added in float32: with fewer, the calls cost more than the sums."""

ALIKE = 8.0
"""Ratio of two norms up to which a.b is (|a|^2 + |b|^2 - |a - b|^2) / 2; beyond it that loses too many digits."""

NEAR = 1e-5
"""Relative distance from the tolerance within which a float32 result is recomputed in float64."""

_ARRAYS = threading.local()
"""Arrays that a thread's kernels share: allocating 2 MB anew for every tensor takes a tenth of the time."""


def is_fast(a: TensorInfo, b: TensorInfo) -> bool:
    """Returns whether `_Kernel` can compare two tensors: large, plain ranges of their files, of one `FAST` dtype."""
    return a.numel > SMALL and a.dtype == b.dtype and a.dtype in FAST and None not in (plain_range(a), plain_range(b))


class _Kernel:
    """Adds blocks of two tensors to totals, in float32 arrays that are reused for every piece of every tensor."""

    def __init__(self, sums: Sums, dtype: str) -> None:
        self.sums, self.dtype = sums, dtype
        self.width = DTYPES[dtype].bits // 8
        if getattr(_ARRAYS, "count", 0) != PIECE:
            _ARRAYS.count, _ARRAYS.arrays = PIECE, [np.empty(PIECE, "f4") for _ in range(4)]
        self.a, self.b, self.gap, self.room = _ARRAYS.arrays

    def add(self, first: Iterator[Bytes], second: Iterator[Bytes]) -> None:
        """Adds two streams of blocks of equal sizes: both tensors are read from ranges of the same length."""
        step = PIECE * self.width
        for one, other in zip(first, second, strict=True):
            for start in range(0, len(one), step):
                self.piece(one[start : start + step], other[start : start + step])

    def piece(self, one: Bytes, other: Bytes) -> None:
        a, b = decode_unordered(self.dtype, one, self.a), decode_unordered(self.dtype, other, self.b)
        gap, room = self.gap[: len(a)], self.room[: len(a)]
        with np.errstate(invalid="ignore", over="ignore"):
            np.subtract(a, b, out=gap)
            np.abs(gap, out=gap)
            largest = float(gap.max())
            total = dot(a, a, LONG)
            other_total = dot(b, b, LONG) if largest else total
        fits = all(TINY**2 < one < LARGE**2 or one == 0 for one in (total, other_total))
        if not (fits and (largest == 0 or TINY < largest < LARGE)):
            self.sums.add(decode(self.dtype, one), decode(self.dtype, other))
            return
        sums = self.sums
        sums.count += len(a)
        sums.a.add(total)
        sums.b.add(other_total)
        if largest == 0:
            sums.dot.add(total)
            return
        sums.equal = False
        apart = dot(gap, gap, LONG)
        sums.gap.add(apart)
        sums.apart += dot(gap, run=LONG)
        alike = total < ALIKE**2 * other_total < ALIKE**4 * total
        sums.dot.add((total + other_total - apart) / 2 if alike else dot(a, b, LONG))
        if largest > sums.largest * (1 - NEAR):
            at = gap >= largest * (1 - NEAR)
            sums.largest = max(sums.largest, float(np.abs(a[at].astype("f8") - b[at].astype("f8")).max()))
        if sums.close and largest > sums.atol * (1 - NEAR):
            sums.close = self.is_close(a, b, gap, room)

    def is_close(self, a: Array, b: Array, gap: Array, room: Array) -> bool:
        """Returns whether every gap is within the tolerance; decided in float64 where float32 is not enough."""
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
