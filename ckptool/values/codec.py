"""The dtype codec: decodes the elements of every dtype to numbers, encodes numbers, and casts between dtypes.

Elements are little-endian. Rounding is to nearest, ties to even, as in `torch.Tensor.to`, which also converts float64
to 16-bit floats through float32. Any NaN becomes 0x7FC0 in bfloat16, and some NaN in any other dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from math import frexp
from typing import Any

import numpy as np

from ckptool.core.dtypes import COMMON_FLOATS, DTYPES, Changed
from ckptool.errors import UnsupportedError, needs_torch
from ckptool.io.source import Bytes

Array = np.ndarray[Any, Any]

FOUR_BITS = "float4_e2m1fn_x2"
"""Each element is two numbers; the one in the low bits comes first."""

_SMALL = {
    # exponent bits, mantissa bits, bias
    "float8_e4m3fn": (4, 3, 7),
    "float8_e5m2": (5, 2, 15),
    "float8_e4m3fnuz": (4, 3, 8),
    "float8_e5m2fnuz": (5, 2, 16),
    "float8_e8m0fnu": (8, 0, 127),
    FOUR_BITS: (2, 1, 1),
}
"""Floats of eight bits or fewer: OCP 8-bit Floating Point 1.0, OCP Microscaling 1.0, and arXiv 2206.02915 (fnuz)."""

_FIRST_SPECIAL = {
    "float64": 0x7FF << 52, "float32": 0xFF << 23, "bfloat16": 0xFF << 7, "float16": 0x1F << 10,
    "float8_e5m2": 0x7C, "float8_e4m3fn": 0x7F,
}  # fmt: skip
"""The smallest code without its sign bit that is not finite: infinity, or NaN for float8_e4m3fn, which has none."""

_ONLY_NAN = {"float8_e4m3fnuz": 0x80, "float8_e5m2fnuz": 0x80, "float8_e8m0fnu": 0xFF}
"""The only code that is not finite (NaN), of dtypes that have just one."""


def has_values(dtype: str) -> bool:
    """Returns whether `decode` supports a dtype: all of torch's but quantized ones and plain bits."""
    row = DTYPES[dtype]
    return row.kind in ("float", "complex", "int", "bool") and row.in_torch


# --- decoding ----------------------------------------------------------------------------------------------------


def decode(dtype: str, data: Bytes) -> Array:
    """Returns the elements as numbers: exact integers, or float64 / complex128.

    Raises: UnsupportedError for a dtype that `has_values` excludes.
    """
    row = DTYPES[dtype]
    if not has_values(dtype):
        raise UnsupportedError(f"values of {dtype} cannot be decoded")
    if row.kind == "complex":
        components = decode(f"float{row.bits // 2}", data)
        return components.view("c16")
    if row.kind != "float":
        return np.frombuffer(data, _layout(dtype))
    if dtype == FOUR_BITS:
        pairs: Array = _pairs(dtype)[np.frombuffer(data, "u1")]
        return pairs.view("f4").astype("f8")
    if dtype in _SMALL:
        return np.take(_table(dtype), np.frombuffer(data, "u1"))
    with np.errstate(invalid="ignore"):  # signalling NaNs warn
        return decode_float(dtype, data).astype("f8")


def nibbles(data: Bytes, width: int) -> memoryview:
    """Returns the int8 numbers in rows of ``width`` bytes: of each the low halves, then the high ones, minus 8."""
    rows = np.frombuffer(data, "u1").reshape(-1, width)
    made = np.concatenate([rows & 15, rows >> 4], axis=1).view("i1")
    made -= 8
    return made.reshape(-1).view("u1").data


def decode_float(dtype: str, data: Bytes) -> Array:
    """Returns the elements of one of the `COMMON_FLOATS` in order: float64 stays, all others become float32."""
    values = np.frombuffer(data, _layout(dtype))
    if dtype == "bfloat16":  # the upper half of a float32
        wide = values.astype("<u4")
        wide <<= 16
        return wide.view("<f4")
    with np.errstate(invalid="ignore"):
        return values.astype("<f4") if dtype == "float16" else values


def decode_unordered(dtype: str, data: Bytes, out: Array, finite: bool = False) -> Array:
    """Returns the elements of a float dtype of 32 bits or fewer as float32; in ``out``, unless they are already.

    For sums: several times faster than `decode_float`, but in another order. 16-bit numbers are read two at a time; the
    first of every pair come first, then the second of every pair. 8-bit numbers are looked up in pairs. ``finite``: the
    caller knows that there is no NaN and no infinity.
    """
    if dtype == "float32":
        return np.frombuffer(data, "<f4")
    width = DTYPES[dtype].bits // 8
    if dtype == FOUR_BITS:
        made = out[: 2 * len(data)]
        np.take(_pairs(dtype), np.frombuffer(data, "u1"), out=made.view("u8"), mode="clip")
        return made
    count = len(data) // width
    made = out[:count]
    if count % 2:
        with np.errstate(invalid="ignore"):
            made[-1:] = decode(dtype, data[-width:])
        data = data[:-width]
    pairs = made[: count - count % 2]
    if width == 1:
        np.take(_pairs(dtype), np.frombuffer(data, "<u2"), out=pairs.view("u8"), mode="clip")
        return made
    words, raw, half = np.frombuffer(data, "<u4"), pairs.view("<u4"), len(pairs) // 2
    if dtype == "bfloat16":
        np.left_shift(words, 16, out=raw[:half])
        np.bitwise_and(words, 0xFFFF0000, out=raw[half:])
    elif finite or _is_finite(dtype, np.frombuffer(data, "<u2")):
        # The exponent and mantissa are shifted by 3 bits, the sign is kept; then the exponent's bias is corrected.
        np.left_shift(words, 16, out=raw[:half])
        raw[half:] = words
        np.right_shift(pairs.view("<i4"), 3, out=pairs.view("<i4"))
        np.bitwise_and(raw, 0x8FFFE000, out=raw)
        np.multiply(pairs, np.float32(2.0**112), out=pairs)
    else:
        values = decode_float(dtype, data)
        pairs[:half], pairs[half:] = values[::2], values[1::2]
    return made


def _layout(dtype: str) -> str:
    """Returns numpy's dtype string for the elements; bfloat16, which numpy lacks, is a 16-bit word."""
    plain = dtype in ("float64", "float32", "float16")
    return f"<{'f' if plain else 'i' if dtype.startswith('int') else 'u'}{DTYPES[dtype].bits // 8}"


@cache
def _table(dtype: str) -> Array:
    """Returns the float64 value of every code of a small float."""
    exponent_bits, mantissa_bits, bias = _SMALL[dtype]
    codes = np.arange(1 << (exponent_bits + mantissa_bits))
    exponent, fraction = codes >> mantissa_bits, (codes % (1 << mantissa_bits)) / (1 << mantissa_bits)
    if dtype == "float8_e8m0fnu":  # exponents alone: no sign, no subnormal numbers
        values: Array = np.ldexp(1.0, exponent - bias)
    else:
        sizes = np.where(exponent > 0, np.ldexp(1 + fraction, exponent - bias), np.ldexp(fraction, 1 - bias))
        first = _FIRST_SPECIAL.get(dtype, len(codes))
        sizes[first:] = np.nan
        if dtype == "float8_e5m2":
            sizes[first] = np.inf
        values = np.concatenate([sizes, -sizes])
    if dtype in _ONLY_NAN:
        values[_ONLY_NAN[dtype]] = np.nan
    return values


@cache
def _pairs(dtype: str) -> Array:
    """Returns the values of every pair of codes of a small float, each pair as two float32 in eight bytes."""
    one = _table(dtype).astype("<f4")
    both: Array = np.empty((len(one), len(one), 2), "<f4")
    both[:, :, 0], both[:, :, 1] = one, one[:, None]
    return both.view("u8").reshape(-1)


# --- encoding and casts ------------------------------------------------------------------------------------------


def encode(dtype: str, values: Array) -> Array:
    """Returns numbers as the elements of an integer dtype, bool or one of the `COMMON_FLOATS`, rounded to nearest even.

    Values that are too large become infinite. bfloat16 is returned as 16-bit words.
    """
    row = DTYPES[dtype]
    with np.errstate(over="ignore", invalid="ignore"):
        if row.kind == "float" and row.bits == 16 and values.itemsize != 4:
            values = values.astype("<f4")
        if dtype != "bfloat16":
            return values.astype(_layout(dtype), copy=False)
    words = values.view("<u4")
    rounded = words >> 16
    rounded &= 1
    rounded += 0x7FFF  # half of the last place, and a bit more where it is odd
    rounded += words  # overflows only for NaN, which is replaced below
    rounded >>= 16
    made: Array = rounded.astype("<u2")
    nan = np.isnan(values)
    if nan.any():
        made[nan] = 0x7FC0
    return made


Cast = Callable[[Bytes], tuple[memoryview, Changed]]
"""Maps a block of whole elements to (its bytes as another dtype, how many values changed in kind)."""


def caster(old: str, new: str) -> Cast:
    """Returns the cast from one dtype to another. Raises: DependencyError if it needs torch and there is none."""
    if old not in COMMON_FLOATS or new not in COMMON_FLOATS:
        return _cast_by_torch(old, new)
    wider = {"float64": 3, "float32": 2, "bfloat16": 1, "float16": 0}
    narrows = wider[new] < wider[old]

    def cast(block: Bytes) -> tuple[memoryview, Changed]:
        values = decode_float(old, block)
        made = encode(new, values)
        return made.view("u1").data, _changed(new, values, made) if narrows and len(made) else Changed()

    return cast


def _changed(new: str, values: Array, made: Array) -> Changed:
    """Returns what became of values as one of the `COMMON_FLOATS`, none of which saturates; a few passes."""
    width, first = DTYPES[new].bits, _FIRST_SPECIAL[new]
    words = made.view(f"<u{width // 8}")
    sizes = words & words.dtype.type((1 << (width - 1)) - 1)
    overflowed = underflowed = 0
    if int(sizes.max()) >= first:
        overflowed = int(np.count_nonzero((sizes >= first) & np.isfinite(values)))
    if int(sizes.min()) == 0:
        underflowed = int(np.count_nonzero((sizes == 0) & (values != 0)))
    return Changed(overflowed, 0, underflowed)


def _cast_by_torch(old: str, new: str) -> Cast:
    torch = import_torch(f"casting to {new}")

    def cast(block: Bytes) -> tuple[memoryview, Changed]:
        values = torch.frombuffer(bytearray(block), dtype=getattr(torch, old))
        made = values.to(getattr(torch, new))
        return memoryview(made.view(torch.uint8).numpy()), _changed_by_torch(torch, values, made)

    return cast


def _changed_by_torch(torch: Any, values: Any, made: Any) -> Changed:
    """Returns what became of values as another dtype; whether float8 saturates is torch's choice, by version."""
    if made.dtype == torch.bool:
        return Changed()
    if made.is_complex():
        values, made = torch.view_as_real(values), torch.view_as_real(made)
    exact = torch.float64 if values.dtype.itemsize > 2 else torch.float32
    old, new = values.to(exact), made.to(exact)
    if made.is_floating_point():
        limits = torch.finfo(made.dtype)
        half = limits.eps * 2.0 ** (frexp(limits.max)[1] - 2)  # of the last place: what is nearer is only rounded
        overflowed = old.isfinite() & ~new.isfinite()
        saturated = (old.abs() > limits.max + half) & new.isfinite()
    else:
        range_ = torch.iinfo(made.dtype)
        overflowed, saturated = ~((old.trunc() >= range_.min) & (old.trunc() <= range_.max)), torch.tensor(0)
    underflowed = (old != 0) & (new == 0) & (old.abs() < 1)
    return Changed(int(overflowed.sum()), int(saturated.sum()), int(underflowed.sum()))


def import_torch(what: str) -> Any:
    """Returns the torch module. Raises: DependencyError, which names ``what`` needs it."""
    try:
        import torch
    except ImportError:
        raise needs_torch(what) from None
    return torch


# --- NaN and infinities ------------------------------------------------------------------------------------------


def count_special(dtype: str, data: Bytes) -> tuple[int, int]:
    """Returns (number of NaN, number of infinite) elements; a complex number counts if one of its components does.

    Costs two passes over integers if there are none.
    """
    components = 2 if DTYPES[dtype].kind == "complex" else 1
    if components == 2:
        dtype = f"float{DTYPES[dtype].bits // 2}"
    if dtype in _ONLY_NAN:
        return int(np.count_nonzero(np.frombuffer(data, "u1") == _ONLY_NAN[dtype])), 0
    if dtype not in _FIRST_SPECIAL:  # the floats of six and four bits have neither
        return 0, 0
    width, first = DTYPES[dtype].bits, _FIRST_SPECIAL[dtype]
    codes = np.frombuffer(data, f"<u{width // 8}")
    if _is_finite(dtype, codes):
        return 0, 0
    sizes = (codes & codes.dtype.type((1 << (width - 1)) - 1)).reshape(-1, components)
    if dtype == "float8_e4m3fn":
        return int(np.count_nonzero(sizes >= first)), 0
    nan = (sizes > first).any(axis=1)
    return int(np.count_nonzero(nan)), int(np.count_nonzero((sizes == first).any(axis=1) & ~nan))


def _is_finite(dtype: str, codes: Array) -> bool:
    """Returns whether no code is NaN or infinite: as unsigned and as signed integers, these have the largest codes."""
    first, width = _FIRST_SPECIAL[dtype], DTYPES[dtype].bits
    if not len(codes):
        return True
    return int(codes.max()) < (1 << (width - 1)) + first and int(codes.view(f"<i{width // 8}").max()) < first
