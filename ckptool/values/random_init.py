"""Computes the bytes of a `Draw`: constants and random numbers, by the methods of torch.nn.init.

Every tensor has its own random stream, Philox4x64-10 keyed by a hash of the seed and the tensor's name, so its values
do not depend on other tensors. They may change with numpy's version (NEP 19), and the last digits of ``orthogonal``
with the processor too, since the linear algebra library picks its kernels by it.

Values are computed as float64 and rounded to the dtype as in a cast.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from hashlib import sha256
from math import erf, expm1, prod, sqrt

import numpy as np

from ckptool.core.dtypes import COMMON_FLOATS, DTYPES
from ckptool.core.tensor import Draw
from ckptool.errors import UnsupportedError
from ckptool.io.source import BLOCK
from ckptool.values.codec import Array, decode, encode

CHUNK = 1 << 14
"""Numbers computed at a time: few enough to stay in a core's cache."""


def blocks(draw: Draw, dtype: str) -> Iterator[bytes]:
    """Yields a tensor's elements in C order, little-endian, in blocks of `BLOCK` bytes.

    Memory is a few blocks whatever the size, but for ``orthogonal``, which needs three copies of the matrix in float64.
    Raises: UnsupportedError for a dtype that is neither integer, bool nor a common float.
    """
    if DTYPES[dtype].kind not in ("int", "bool") and dtype not in COMMON_FLOATS:
        raise UnsupportedError(f"values of {dtype} are not made here")
    if prod(draw.shape) == 0:
        return
    pending = bytearray()
    for values in _MAKERS[draw.kind](draw, dtype):
        pending += encode(dtype, values).data
        while len(pending) >= BLOCK:
            yield bytes(pending[:BLOCK])
            del pending[:BLOCK]
    yield bytes(pending)


def _chunks(total: int) -> Iterator[tuple[int, int]]:
    """Yields (first, count) for the numbers to compute at a time, ``total`` in sum."""
    for start in range(0, total, CHUNK):
        yield start, min(CHUNK, total - start)


# --- without random numbers --------------------------------------------------------------------------------------


def _constant(draw: Draw, dtype: str) -> Iterator[Array]:
    for _, count in _chunks(prod(draw.shape)):
        yield np.full(count, draw.numbers[0])


def _eye(draw: Draw, dtype: str) -> Iterator[Array]:
    rows, cols = draw.shape
    return _ones_at(np.arange(min(rows, cols)) * (cols + 1), rows * cols)


def _dirac(draw: Draw, dtype: str) -> Iterator[Array]:
    out, into, *field = draw.shape
    per_group = out // int(draw.numbers[0])
    ones = np.arange(out)
    inside = ones % per_group
    centre = 0
    for size in field:
        centre = centre * size + size // 2
    return _ones_at(((ones * into + inside) * prod(field) + centre)[inside < into], prod(draw.shape))


def _ones_at(positions: Array, total: int) -> Iterator[Array]:
    """Yields 1 at the given flat positions (ascending) and 0 elsewhere."""
    for start, count in _chunks(total):
        values = np.zeros(count)
        first, last = np.searchsorted(positions, (start, start + count))
        values[positions[first:last] - start] = 1.0
        yield values


# --- random numbers ----------------------------------------------------------------------------------------------


def _generator(draw: Draw, purpose: str = "values") -> np.random.Generator:
    """Returns the random generator for the draw's seed and key, and for a purpose."""
    text = f"ckptool draw 1\0{draw.seed}\0{purpose}\0{draw.key}"
    digest = sha256(text.encode("utf-8", "surrogatepass")).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))


def _uniform(draw: Draw, dtype: str) -> Iterator[Array]:
    a, b = draw.numbers
    low, high = _inside(a, b, dtype, open_end=True)
    random = _generator(draw)
    for _, count in _chunks(prod(draw.shape)):
        yield np.clip(random.random(count) * (b - a) + a, low, high)


def _normal(draw: Draw, dtype: str) -> Iterator[Array]:
    mean, std = draw.numbers
    random = _generator(draw)
    for _, count in _chunks(prod(draw.shape)):
        yield random.standard_normal(count) * std + mean


def _trunc_normal(draw: Draw, dtype: str) -> Iterator[Array]:
    mean, std, a, b = draw.numbers
    low, high = _inside(a, b, dtype, open_end=False)
    alpha, beta = (a - mean) / std, (b - mean) / std
    sign = 1.0
    if alpha + beta < 0:  # its mirror image has the same distribution
        alpha, beta, sign = -beta, -alpha, -1.0
    left = prod(draw.shape)
    for values in _truncated(draw, alpha, beta, min(4 * left, CHUNK)):
        made = values[:left]
        yield np.clip(made * (sign * std) + mean, low, high)
        left -= len(made)
        if not left:
            return


def _truncated(draw: Draw, alpha: float, beta: float, count: int) -> Iterator[Array]:
    """Yields standard normals between ``alpha`` and ``beta`` without end; ``beta`` is the farther one from 0.

    By rejection, which accepts at least a quarter of the proposals for any interval (after Robert 1995). Proposals,
    ``count`` at a time, and decisions come from two streams, so the result does not depend on ``count``.
    """
    random, judge = _generator(draw), _generator(draw, "accepted")
    if erf(beta / sqrt(2)) - erf(alpha / sqrt(2)) > 0.5:  # a quarter of all normals, or more
        while True:
            values = random.standard_normal(count)
            yield values[(values >= alpha) & (values <= beta)]
    # Above 0 proposals are exponential of rate alpha, accepted with probability exp(-(x - alpha)²/2). An interval
    # around 0 comes here only if it is narrow; there proposals are uniform.
    rate, width = max(alpha, 0.0), beta - alpha
    while True:
        values = random.random(count)
        if rate * width > 1e-9:
            values = np.log1p(values * expm1(-rate * width)) / -rate
        else:
            values *= width
        beyond = values + (alpha - rate)  # distance from alpha, or from 0 if alpha is below it
        yield alpha + values[judge.random(count) <= np.exp(beyond * beyond / -2)]


def _sparse(draw: Draw, dtype: str) -> Iterator[Array]:
    """Yields normals with the given number of zeros in each column, by selection sampling (Knuth, 3.4.2 S)."""
    zeros, std = draw.numbers
    rows, cols = draw.shape
    random, judge = _generator(draw), _generator(draw, "zeros")
    left = np.full(cols, zeros)  # zeros that each column still gets
    for row in range(rows):
        for start, count in _chunks(cols):
            # Zero with probability (zeros left) / (rows left).
            hit = judge.random(count) * (rows - row) < left[start : start + count]
            left[start : start + count] -= hit
            yield np.where(hit, 0.0, random.standard_normal(count) * std)


def _orthogonal(draw: Draw, dtype: str) -> Iterator[Array]:
    """Yields the Q of a random matrix's QR factorisation, with the signs that make R's diagonal positive, as torch."""
    rows = draw.shape[0]
    cols = prod(draw.shape) // rows
    matrix = _generator(draw).standard_normal((max(rows, cols), min(rows, cols)))
    q, r = np.linalg.qr(matrix)
    q *= np.copysign(1.0, np.diagonal(r)) * draw.numbers[0]
    flat = (q if rows >= cols else q.T).reshape(-1)
    for start, count in _chunks(len(flat)):
        yield flat[start : start + count]


_MAKERS: dict[str, Callable[[Draw, str], Iterator[Array]]] = {
    "constant": _constant, "eye": _eye, "dirac": _dirac, "uniform": _uniform, "normal": _normal,
    "trunc_normal": _trunc_normal, "sparse": _sparse, "orthogonal": _orthogonal,
}  # fmt: skip


# --- bounds that a dtype can represent ---------------------------------------------------------------------------


def _inside(a: float, b: float, dtype: str, open_end: bool) -> tuple[float, float]:
    """Returns a dtype's least and greatest values in [a, b] (``open_end``: [a, b)); the one nearest a if none is."""
    low, high = _stepped(a, dtype, 0), _stepped(b, dtype, 0)
    if low < a:
        low = _stepped(a, dtype, 1)
    if high > b or (open_end and high == b):
        high = _stepped(b, dtype, -1)
    if low > high:
        low = high = _stepped(a, dtype, 0)
    return low, high


def _stepped(value: float, dtype: str, steps: int) -> float:
    """Returns the dtype's value nearest to a number, moved by ``steps`` values of the dtype."""
    width = DTYPES[dtype].bits // 8
    sign = 1 << (8 * width - 1)
    word = int(encode(dtype, np.array([value])).view(f"<u{width}")[0])
    rank = (-(word - sign) if word & sign else word) + steps
    word = rank if rank >= 0 else sign - rank
    return float(decode(dtype, word.to_bytes(width, "little"))[0])
