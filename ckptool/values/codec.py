"""Floating-point casts without torch: float64, float32, float16 and bfloat16 into each other, a block at a time.

Rounding is to nearest, ties to even, as `torch.Tensor.to` does it; like there, float64 becomes a half by way of
float32. A NaN stays a NaN, with the sign and payload that come of it.
numpy is imported inside functions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ckptool.errors import needs_torch

Bytes = bytes | memoryview

FLOATS = {"float64": "f8", "float32": "f4", "float16": "f2", "bfloat16": "u2"}
"""dtypes cast here -> how numpy sees their bytes."""

Cast = Callable[["bytes | memoryview"], tuple[memoryview, int]]
"""Maps a block of whole elements to their bytes as another dtype, and how many finite values became infinite."""


def caster(old: str, new: str) -> Cast | None:
    """Returns the cast from one dtype to another; None where it is not one of `FLOATS` into another."""
    if old == new or old not in FLOATS or new not in FLOATS:
        return None
    import numpy as np

    def cast(block: bytes | memoryview) -> tuple[memoryview, int]:
        values: Any = np.frombuffer(block, FLOATS[old])
        if old == "bfloat16":
            values = _widened(np, values)
        lost = 0
        with np.errstate(over="ignore", invalid="ignore"):
            # torch has float32 between float64 and the halves, and so rounds twice
            narrow = values.astype(np.float32) if FLOATS[new][-1] == "2" and values.itemsize != 4 else values
            made: Any = _rounded(np, narrow) if new == "bfloat16" else narrow.astype(FLOATS[new], copy=False)
        if _may_overflow(old, new):
            infinite = (made & 0x7FFF) == 0x7F80 if new == "bfloat16" else np.isinf(made)
            count = int(np.count_nonzero(infinite))
            lost = count - int(np.count_nonzero(np.isinf(values))) if count else 0
        return memoryview(made.view(np.uint8)), lost

    return cast


def _may_overflow(old: str, new: str) -> bool:
    """Returns whether a finite value of one dtype may be beyond the other's largest."""
    return new == "float16" or old == "float64" or (old == "float32" and new == "bfloat16")


def _widened(np: Any, words: Any) -> Any:
    """Returns bfloat16, given as 16-bit words, as float32: the same bits in front of sixteen zeros."""
    wide = words.astype(np.uint32)
    wide <<= 16
    return wide.view(np.float32)


def _rounded(np: Any, values: Any) -> Any:
    """Returns float32 as the 16-bit words of bfloat16: half of the last place is added, and a bit more to odd ones."""
    words = values.view(np.uint32)
    half = words >> 16
    half &= 1
    half += 0x7FFF
    half += words  # beyond 32 bits only for NaN, which is put right below
    half >>= 16
    made = half.astype(np.uint16)
    nan = np.isnan(values)
    if nan.any():
        made[nan] = 0x7FC0
    return made


def import_torch(what: str) -> Any:
    """Returns the torch module. Raises: DependencyError, one line that says what needs it."""
    try:
        import torch
    except ImportError:
        raise needs_torch(what) from None
    return torch
