"""Numbers: what the bytes of each dtype mean, and how far two tensors are apart."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ckptool.core.dtypes import DTYPES
from ckptool.core.tensor import Opaque, TensorInfo, plain_range, whole_storage
from ckptool.core.tree import Global, PyObject
from ckptool.errors import UnsupportedError
from ckptool.io.source import Files
from ckptool.values.blocks import same_bytes, tensor_blocks
from ckptool.values.codec import Bytes

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class Distance:
    """How far two tensors of one shape are apart.

    ``status``: ``equal`` (every element, NaN equal to NaN), ``close`` (within the tolerance) or ``differ``.
    ``max_abs`` is the largest |a - b|, ``rel_l2`` is |a - b| / |a| over all elements; None where an element is
    NaN or infinite on one side only, or where a is all zeros and b is not.
    """

    status: Literal["equal", "close", "differ"]
    max_abs: float | None = 0.0
    rel_l2: float | None = 0.0


SMALL = 1 << 14
"""Elements up to which two tensors are simply compared in float64."""


def compare_bytes(a: TensorInfo, b: TensorInfo, files: Files) -> Distance:
    """Returns whether two tensors of one shape are the same bytes: by recorded checksums, where there are any.

    Different checksums are certainly different bytes. Equal ones are equal bytes but for an accident of 1 in 2^32,
    and are no proof against somebody who wants to deceive. Where there are none, both are read.
    """
    sums = _recorded(a), _recorded(b)
    if None not in sums and a.dtype == b.dtype:
        return Distance("equal") if sums[0] == sums[1] else Distance("differ", None, None)
    if isinstance(a.source, Opaque) or isinstance(b.source, Opaque):
        return compare(a, b, files, 0.0, 0.0)
    return Distance("equal") if same_bytes(a, b, files) else Distance("differ", None, None)


def _recorded(tensor: TensorInfo) -> int | None:
    """Returns the CRC-32 that a file records of a tensor's bytes: of a storage of which it is all."""
    storage = whole_storage(tensor)
    return None if storage is None else storage.crc32


def compare(a: TensorInfo, b: TensorInfo, files: Files, rtol: float, atol: float) -> Distance:
    """Returns how far two tensors of one shape are apart; reads both once, a block at a time.

    Floating-point values are close where |a - b| <= atol + rtol * |b|, as `torch.allclose` has it; integers and
    booleans are exact. Different dtypes are compared as float64. Raises: UnsupportedError for dtypes without values.
    """
    if isinstance(a.source, Opaque) or isinstance(b.source, Opaque):
        return _compare_parts(a, b, files, rtol, atol)
    if a.dtype == b.dtype and a.view == b.view:
        return Distance("equal")
    recorded = _recorded(a), _recorded(b)
    known_to_differ = None not in recorded and recorded[0] != recorded[1]  # then nobody need read them to find out
    if a.dtype == b.dtype and not known_to_differ and same_bytes(a, b, files):
        return Distance("equal")
    if not (has_values(a.dtype) and has_values(b.dtype)):
        return Distance("differ", None, None)
    if a.numel > SMALL and is_fast(a, b):
        return measure(a, b, files, rtol, atol).distance()
    sums = Sums(rtol, atol)
    for one, other in _same_count(tensor_blocks(a, files), tensor_blocks(b, files), a.dtype, b.dtype):
        sums.add(decode(a.dtype, one), decode(b.dtype, other))
    return sums.distance()


def _compare_parts(a: TensorInfo, b: TensorInfo, files: Files, rtol: float, atol: float) -> Distance:
    """Compares sparse, quantised and nested tensors part by part, and what else rebuilds them exactly."""
    if not (isinstance(a.source, Opaque) and isinstance(b.source, Opaque)) or a.form != b.form:
        return Distance("differ", None, None)
    if len(a.parts) != len(b.parts) or _plain(a.source.node.args) != _plain(b.source.node.args):
        return Distance("differ", None, None)
    found = [compare(one, other, files, rtol, atol) for one, other in zip(a.parts, b.parts, strict=True)]
    return max(found, key=lambda part: ("equal", "close", "differ").index(part.status), default=Distance("equal"))


def _plain(node: Any) -> Any:
    """Returns what of a rebuild call is neither tensor nor storage, in a form that compares by value."""
    if isinstance(node, (list, tuple)):
        return [_plain(item) for item in node]
    if isinstance(node, dict):
        return [(_plain(key), _plain(value)) for key, value in node.items()]
    if isinstance(node, (str, int, float, bool, type(None), Global)):
        return repr(node)
    return _plain(node.args) if isinstance(node, PyObject) else None


class Norm:
    """A running L2 norm as scale * sqrt(total), so that squares of 1e200 do not overflow (LAPACK's dlassq)."""

    def __init__(self) -> None:
        self.scale = self.total = 0.0

    def add(self, values: np.ndarray[Any, Any]) -> None:
        import numpy as np

        largest = float(values.max(initial=0.0))
        if not largest:
            return
        block = float(np.square(values / largest).sum())
        if largest > self.scale:
            self.total *= (self.scale / largest) ** 2
            self.scale = largest
        self.total += block * (largest / self.scale) ** 2

    def add_squares(self, total: float, scale: float = 1.0) -> None:
        """Adds ``scale**2 * total``, a sum of squares that was made elsewhere."""
        if not total or not scale:
            return
        if scale > self.scale:
            self.total, total = total, self.total
            self.scale, scale = scale, self.scale
        self.total += total * (scale / self.scale) ** 2

    def over(self, other: Norm) -> float | None:
        """Returns this norm over another; None over zero, or where it is beyond float64."""
        if not self.scale:
            return 0.0
        if not other.scale:
            return None
        ratio = (self.scale / other.scale) * math.sqrt(self.total / other.total)
        return ratio if math.isfinite(ratio) else None


class Sums:
    """Running totals over blocks, in float64."""

    def __init__(self, rtol: float, atol: float) -> None:
        self.rtol, self.atol = rtol, atol
        self.equal = self.close = self.bounded = True
        self.largest = 0.0
        self.difference, self.norm = Norm(), Norm()

    def add(self, a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> None:
        import numpy as np

        exact = a.dtype.kind in "iu" and b.dtype.kind in "iu"
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
            self.largest = max(self.largest, float(gap[finite].max(initial=0.0)))
            self.difference.add(gap[finite])
        size = np.abs(a if a.dtype.kind == "c" else a.astype("f8"))
        self.norm.add(size[np.isfinite(size)])

    def distance(self) -> Distance:
        status: Literal["equal", "close", "differ"] = "equal" if self.equal else "close" if self.close else "differ"
        if not self.bounded:
            return Distance(status, None, None)
        return Distance(status, self.largest, self.difference.over(self.norm))


def _integer_gaps(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> tuple[Any, Any]:
    """Returns (which differ, |a - b| as float64), exact for integers of any two dtypes before the last rounding."""
    import numpy as np

    one, other = a.astype("u8"), b.astype("u8")  # modulo 2^64 the larger minus the smaller is exact
    negative, other_negative = a < 0, b < 0
    larger = np.where(negative == other_negative, one >= other, other_negative)
    gap = np.where(larger, one - other, other - one)
    return gap > 0, gap.astype("f8")


def _same_count(
    first: Iterator[Bytes], second: Iterator[Bytes], dtype: str, other_dtype: str
) -> Iterator[tuple[Bytes, Bytes]]:
    """Yields pieces with equally many elements from two streams of whole elements."""
    width, other_width = DTYPES[dtype].bits // 8, DTYPES[other_dtype].bits // 8
    one: Bytes = b""
    other: Bytes = b""
    while True:
        one = one or next(first, b"")
        other = other or next(second, b"")
        count = min(len(one) // width, len(other) // other_width)
        if not count:
            return
        yield one[: count * width], other[: count * other_width]
        one, other = one[count * width :], other[count * other_width :]


def has_values(dtype: str) -> bool:
    """Returns whether `decode` knows what the bytes of a dtype mean, one value per element."""
    row = DTYPES[dtype]
    return row.kind in ("float", "complex", "int", "bool") and row.in_torch and dtype != "float4_e2m1fn_x2"


def decode(dtype: str, data: Bytes) -> np.ndarray[Any, Any]:
    """Returns the values of little-endian elements: exact integers, or float64 / complex128."""
    import numpy as np

    plain = {"float64": "<f8", "float32": "<f4", "float16": "<f2", "complex64": "<c8", "complex128": "<c16"}
    row = DTYPES[dtype]
    if dtype in plain:
        values = np.frombuffer(data, plain[dtype])
        with np.errstate(invalid="ignore"):  # signalling NaNs
            return values.astype("c16" if row.kind == "complex" else "f8")
    if dtype == "bfloat16":
        with np.errstate(invalid="ignore"):
            return (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4").astype("f8")
    if dtype == "complex32":
        with np.errstate(invalid="ignore"):
            return np.frombuffer(data, "<f2").astype("<f4").view("<c8").astype("c16")
    if dtype in _MINIFLOATS:
        return np.take(_table(dtype), np.frombuffer(data, "u1"))
    if dtype == "float4_e2m1fn_x2":
        nibbles = np.frombuffer(data, "u1")
        return _table("float4_e2m1fn")[np.stack([nibbles & 15, nibbles >> 4], axis=-1).reshape(-1)]
    if row.kind in ("int", "bool", "bits"):
        signed = "i" if dtype.startswith("int") else "u"
        return np.frombuffer(data, f"<{signed}{row.bits // 8}")
    raise UnsupportedError(f"values of {dtype} cannot be decoded")


_MINIFLOATS = {
    # exponent bits, mantissa bits, bias, what the top codes mean
    "float8_e4m3fn": (4, 3, 7, "fn"),
    "float8_e5m2": (5, 2, 15, "ieee"),
    "float8_e4m3fnuz": (4, 3, 8, "fnuz"),
    "float8_e5m2fnuz": (5, 2, 16, "fnuz"),
    "float8_e8m0fnu": (8, 0, 127, "e8m0"),
}
"""8-bit floats: OCP 8-bit Floating Point Specification 1.0, OCP Microscaling 1.0, and arXiv 2206.02915 (fnuz)."""


def _table(dtype: str) -> np.ndarray[Any, Any]:
    """Returns the float64 value of every code of a small float."""
    import numpy as np

    exponent_bits, mantissa_bits, bias, top = _MINIFLOATS.get(dtype, (2, 1, 1, "none"))
    if top == "e8m0":
        return np.array([2.0 ** (code - 127) for code in range(255)] + [np.nan])
    values = []
    half = 1 << (exponent_bits + mantissa_bits)
    for code in range(2 * half):
        exponent = (code % half) >> mantissa_bits
        mantissa = code % (1 << mantissa_bits)
        fraction = mantissa / (1 << mantissa_bits)
        size = (1 + fraction) * 2.0 ** (exponent - bias) if exponent else fraction * 2.0 ** (1 - bias)
        if top == "ieee" and exponent == (1 << exponent_bits) - 1:
            size = np.inf if mantissa == 0 else np.nan
        elif (top == "fn" and code % half == half - 1) or (top == "fnuz" and code == half):
            size = np.nan
        values.append(-size if code >= half else size)
    return np.array(values)


# --- large tensors of one common dtype -----------------------------------------------------------------------------
#
# A difference of two 16-bit floats, or of two float32, has a relative error of 2**-24 in float32, so sums of squares
# (in runs, put together in float64) and most decisions need no more. What does need more is computed again in float64:
# the largest difference, a tolerance that is nearly met, and pieces with NaN, infinities or extreme magnitudes.

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
    return a.dtype == b.dtype and a.dtype in FAST and None not in (plain_range(a), plain_range(b))


def measure(a: TensorInfo, b: TensorInfo, files: Files, rtol: float, atol: float) -> Sums:
    """Returns the totals of two tensors that `is_fast` let pass; reads both once."""
    sums = Sums(rtol, atol)
    _Kernel(sums, a.dtype).add(tensor_blocks(a, files), tensor_blocks(b, files))
    return sums


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
