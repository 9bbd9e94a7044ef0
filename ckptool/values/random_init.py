"""From a `Draw` to its bytes: random numbers that are the same on every machine and in every version of numpy.

Three things make them so. The bits are Philox4x64-10, a counter-based generator whose stream numpy guarantees
(NEP 19), keyed by a hash of the seed and the tensor's name. They become numbers only through operations that
IEEE 754 defines to the last bit: +, -, *, /, sqrt and conversions; logarithms are `quantiles`' own, since those
of a C library or of numpy's SIMD loops differ between machines. And every sum is in an order fixed here, never in
one that a BLAS or the width of a vector register chooses.

    uniform         53 bits per number, a + u * (b - a), held inside the interval after rounding to the dtype
    normal          the inverse of the distribution function (Wichura 1988, AS 241, PPND16: 16 digits), 53 bits each,
                    so up to 8.3 standard deviations
    trunc_normal    the same, of a uniform between the probabilities of both ends
    orthogonal      random Householder reflections: the distribution of torch's QR with its sign fix (Stewart 1980)
    sparse          which elements of a column are zero by selection sampling, exactly as many in each (Knuth, 3.4.2 S)

The values are computed as float64 and rounded to the nearest, ties to even; bfloat16 by way of float32, as torch does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from hashlib import sha256
from math import prod, sqrt
from typing import TYPE_CHECKING, Any

from ckptool.core.dtypes import DTYPES
from ckptool.errors import UnsupportedError
from ckptool.io.source import BLOCK
from ckptool.values.quantiles import probability, quantiles

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ckptool.core.tensor import Draw

    Floats = NDArray[np.float64]
    Words = NDArray[np.uint64]

CHUNK = 1 << 14
"""Numbers that are computed at a time: the four arrays this takes stay in a core's cache."""

PANEL = 32
"""Columns of an orthogonal matrix that are computed at a time."""


def blocks(draw: Draw, dtype: str) -> Iterator[bytes]:
    """Yields a tensor's elements in C order, little-endian, in blocks of about `BLOCK` bytes.

    Memory is a few blocks whatever the size, but for ``orthogonal`` (the matrix, and as float64 its smaller factor).
    About 40 M normals or 100 M uniforms a second on one core; ``orthogonal`` takes rows * columns² steps, a second
    for 512 x 4608 and two minutes for 4096 x 4096. Raises: UnsupportedError for a dtype that has no such numbers.
    """
    row = DTYPES[dtype]
    if row.kind not in ("int", "bool") and (row.kind != "float" or row.bits < 16):
        raise UnsupportedError(f"values of {dtype} are not made here")
    if prod(draw.shape) == 0:
        return
    yield from _MAKERS[draw.kind](draw, dtype)


# --- values of every kind ----------------------------------------------------------------------------------------


def _constant(draw: Draw, dtype: str) -> Iterator[bytes]:
    yield from _spotted(draw, dtype, draw.numbers[0], None)


def _eye(draw: Draw, dtype: str) -> Iterator[bytes]:
    import numpy as np

    rows, cols = draw.shape
    yield from _spotted(draw, dtype, 0.0, np.arange(min(rows, cols), dtype=np.int64) * (cols + 1))


def _dirac(draw: Draw, dtype: str) -> Iterator[bytes]:
    import numpy as np

    out, into, *field = draw.shape
    per_group = out // int(draw.numbers[0])
    ones = np.arange(out, dtype=np.int64)
    inside = ones % per_group
    centre = 0
    for size in field:
        centre = centre * size + size // 2
    yield from _spotted(draw, dtype, 0.0, ((ones * into + inside) * prod(field) + centre)[inside < into])


def _spotted(draw: Draw, dtype: str, fill: float, ones: Any) -> Iterator[bytes]:
    """Yields one value everywhere, and 1 at the flat positions ``ones``, which ascend."""
    import numpy as np

    pack = _packer(dtype)
    unit = DTYPES[dtype].bits // 8
    total, size = prod(draw.shape), BLOCK // unit
    plain = pack(np.full(min(size, total), fill)).tobytes()
    one = pack(np.ones(1)).tobytes()
    for start in range(0, total, size):
        count = min(size, total - start)
        if ones is None:
            yield plain[: count * unit]
            continue
        block = np.frombuffer(bytearray(plain[: count * unit]), f"V{unit}")
        first, last = np.searchsorted(ones, (start, start + count))
        block[ones[first:last] - start] = np.frombuffer(one, f"V{unit}")[0]
        yield block.tobytes()


def _uniform(draw: Draw, dtype: str) -> Iterator[bytes]:
    import numpy as np

    a, b = draw.numbers
    low, high = _inside(a, b, dtype, open_end=True)
    raw = _stream(draw)

    def fill(out: Floats) -> None:
        words = raw(len(out))
        words >>= np.uint64(11)
        np.copyto(out, words.view(np.int64))  # below 2^53; signed, since that converts faster
        out *= 2.0**-53
        out *= b - a
        out += a
        np.clip(out, low, high, out=out)

    yield from _filled(draw, dtype, fill)


def _normal(draw: Draw, dtype: str) -> Iterator[bytes]:
    mean, std = draw.numbers
    normals = _Normals(_stream(draw))

    def fill(out: Floats) -> None:
        normals.fill(out)
        out *= std
        out += mean

    yield from _filled(draw, dtype, fill)


def _trunc_normal(draw: Draw, dtype: str) -> Iterator[bytes]:
    import numpy as np

    mean, std, a, b = draw.numbers
    low, high = _inside(a, b, dtype, open_end=False)
    alpha, beta = (a - mean) / std, (b - mean) / std
    # Above the mean probabilities are close to 1 and lose their digits: the mirror image is drawn instead.
    mirrored = alpha > 0
    if mirrored:
        alpha, beta = -beta, -alpha
    first, last = probability(alpha), probability(beta)
    width = last - first
    raw = _stream(draw)
    normals = _Normals(raw)

    def fill(out: Floats) -> None:
        centred = normals.centred(len(out))
        if beta <= 0:  # one tail: probabilities, which are small and have all their digits
            centred += 0.5
            centred *= width
            centred += first
            least = centred.copy()
            centred -= 0.5
        else:  # around the mean: distances from 1/2, which have all theirs there
            centred *= width
            centred += (first - 0.5) + width / 2
            least = 0.5 - np.abs(centred)
        np.maximum(least, 1e-300 if beta <= 0 else 2.0**-54, out=least)
        quantiles(centred, least, out)
        if mirrored:
            np.negative(out, out=out)
        out *= std
        out += mean
        np.clip(out, low, high, out=out)

    yield from _filled(draw, dtype, fill)


def _sparse(draw: Draw, dtype: str) -> Iterator[bytes]:
    import numpy as np

    zeros, std = draw.numbers
    rows, cols = draw.shape
    normals, raw = _Normals(_stream(draw)), _stream(draw, "zeros")
    left = np.full(cols, zeros)  # zeros that each column still gets
    row = at = 0

    def fill(out: Floats) -> None:
        nonlocal row, at
        normals.fill(out)
        out *= std
        done = 0
        while done < len(out):
            count = min(cols - at, len(out) - done)
            chance = (raw(count) >> np.uint64(11)).astype(np.float64)
            chance *= 2.0**-53 * (rows - row)
            # Zero with probability (zeros left) / (rows left): surely if all are, and never if none is.
            hit = chance < left[at : at + count]
            left[at : at + count] -= hit
            out[done : done + count][hit] = 0.0
            done, at = done + count, at + count
            if at == cols:
                row, at = row + 1, 0

    yield from _filled(draw, dtype, fill)


def _orthogonal(draw: Draw, dtype: str) -> Iterator[bytes]:
    """A product of reflections, each of a random vector one shorter than the last, applied to the identity's columns.

    With signs as torch has them this is the Q of a random matrix's QR factorisation, never having the matrix.
    """
    import numpy as np

    rows = draw.shape[0]
    cols = prod(draw.shape) // rows
    length, count = max(rows, cols), min(rows, cols)
    normals = _Normals(_stream(draw))
    vectors, signs = [], np.empty(count)
    for position in range(count):
        vector = np.empty(length - position)
        normals.fill(vector)
        norm = sqrt(_sums((vector * vector)[None], np.empty((1, len(vector))))[0])
        first = float(vector[0])
        signs[position] = -1.0 if first > 0 else 1.0  # of R's diagonal, which torch makes positive
        vector[0] = first + (norm if first > 0 else -norm)
        vector /= sqrt(norm * (norm + abs(first)))  # so that the reflection is 1 - v vᵀ
        vectors.append(vector)
    pack = _packer(dtype)
    unit = DTYPES[dtype].bits // 8
    made = np.empty((rows, cols), f"V{unit}")
    across = made if rows < cols else made.T
    work, spare = np.empty((2, min(PANEL, count), length))
    for start in range(0, count, PANEL):
        size = min(PANEL, count - start)
        panel = np.zeros((size, length))  # a row of it is a column of Q
        panel[np.arange(size), np.arange(start, start + size)] = signs[start : start + size]
        for position in reversed(range(start + size)):
            vector, part = vectors[position], panel[max(0, position - start) :, position:]
            product = work[: len(part), : len(vector)]
            np.multiply(part, vector, out=product)
            along = _sums(product, spare[: len(part)])
            np.multiply(along[:, None], vector, out=product)
            part -= product
        panel *= draw.numbers[0]
        across[start : start + size] = pack(panel.reshape(-1)).view(f"V{unit}").reshape(size, length)
    flat = made.reshape(-1)
    for begin in range(0, flat.size, BLOCK // unit):
        yield flat[begin : begin + BLOCK // unit].tobytes()


def _sums(rows: Floats, spare: Floats) -> Floats:
    """Returns the sum of each row, halves added to halves: an order that no library chooses. Overwrites both."""
    import numpy as np

    count = rows.shape[1]
    while count > 1:
        half = count // 2
        np.add(rows[:, :half], rows[:, count - half : count], out=spare[:, :half])  # in place numpy would copy first
        if count % 2:
            spare[:, half] = rows[:, half]
        count -= half
        rows, spare = spare, rows
    return rows[:, 0].copy()


_MAKERS: dict[str, Callable[[Draw, str], Iterator[bytes]]] = {
    "constant": _constant, "eye": _eye, "dirac": _dirac, "uniform": _uniform, "normal": _normal,
    "trunc_normal": _trunc_normal, "sparse": _sparse, "orthogonal": _orthogonal,
}  # fmt: skip


# --- random bits, and numbers from them --------------------------------------------------------------------------


def _stream(draw: Draw, purpose: str = "values") -> Callable[[int], Words]:
    """Returns the function that gives the next n words of 64 random bits of a seed, a key and a purpose."""
    import numpy as np

    text = f"ckptool draw 1\0{draw.seed}\0{purpose}\0{draw.key}"
    digest = sha256(text.encode("utf-8", "surrogatepass")).digest()
    key = np.array([int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:16], "little")], np.uint64)
    generator = np.random.Philox(key=key, counter=0)

    def following(count: int) -> NDArray[np.uint64]:
        words: Words = generator.random_raw(count)
        return words

    return following


def _filled(draw: Draw, dtype: str, fill: Callable[[Floats], None]) -> Iterator[bytes]:
    """Yields what ``fill`` makes, a chunk at a time, in blocks of the dtype."""
    import numpy as np

    pack = _packer(dtype)
    total, size = prod(draw.shape), BLOCK // (DTYPES[dtype].bits // 8)
    chunk = np.empty(min(CHUNK, total))
    for start in range(0, total, size):
        end = min(start + size, total)
        pieces = []
        for at in range(start, end, CHUNK):
            values = chunk[: min(CHUNK, end - at)]
            fill(values)
            pieces.append(pack(values).tobytes())
        yield b"".join(pieces)


class _Normals:
    """Standard normals from a stream of random bits, in arrays that are used again."""

    def __init__(self, raw: Callable[[int], Words]) -> None:
        self.raw = raw

    def centred(self, count: int) -> Floats:
        """Returns uniform numbers between -1/2 and 1/2, odd multiples of 2^-54: symmetric, never 0, exact."""
        import numpy as np

        words = self.raw(count).view(np.int64)
        words >>= 11
        made = words.astype(np.float64)
        made += 0.5
        made *= 2.0**-53
        return made

    def fill(self, out: Floats) -> None:
        """Fills a one-dimensional array."""
        import numpy as np

        for start in range(0, len(out), CHUNK):
            part = out[start : start + CHUNK]
            centred = self.centred(len(part))
            least = np.abs(centred)
            np.subtract(0.5, least, out=least)
            quantiles(centred, least, part)


# --- what a dtype can hold ---------------------------------------------------------------------------------------


def _packer(dtype: str) -> Callable[[Floats], NDArray[Any]]:
    """Returns the function that rounds float64 to a dtype's little-endian elements (bfloat16: as 16-bit words)."""
    import numpy as np

    if dtype != "bfloat16":
        kind = np.dtype(dtype).newbyteorder("<")
        return lambda values: values.astype(kind)

    def pack(values: Floats) -> NDArray[Any]:
        words = values.astype("<f4").view("<u4")
        words += ((words >> 16) & 1) + 0x7FFF  # to the nearest, ties to even
        words >>= 16
        return words.astype("<u2")

    return pack


def _inside(a: float, b: float, dtype: str, open_end: bool) -> tuple[float, float]:
    """Returns the least and the greatest value of a dtype from a to b (``open_end``: below b); a's twice if none is."""
    low, high = _stepped(a, dtype, 0), _stepped(b, dtype, 0)
    if low < a:
        low = _stepped(a, dtype, 1)
    if high > b or (open_end and high == b):
        high = _stepped(b, dtype, -1)
    if low > high:
        low = high = _stepped(a, dtype, 0)
    return low, high


def _stepped(value: float, dtype: str, steps: int) -> float:
    """Returns the dtype's value nearest to a number, or one that many steps above it."""
    import numpy as np

    bits = DTYPES[dtype].bits
    sign = 1 << (bits - 1)
    word = int(_packer(dtype)(np.array([value])).view(f"<u{bits // 8}")[0])
    place = (-(word - sign) if word & sign else word) + steps
    word = place if place >= 0 else sign - place
    if dtype == "bfloat16":
        return float(np.array([word << 16], "<u4").view("<f4")[0])
    return float(np.array([word], f"<u{bits // 8}").view(np.dtype(dtype).newbyteorder("<"))[0])
