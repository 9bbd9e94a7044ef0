"""Adapted tensors made real, and judges of what adapters compute: formulas by hand, functions of other packages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import record
import torch
from oracles import bits

from ckptool import open as open_checkpoint
from ckptool.core.tensor import TensorInfo
from ckptool.io.files import Files
from ckptool.partial.adapt import Adapted, Adapting
from ckptool.partial.adapters import Adapter, parse
from ckptool.values import adapt as adapted
from ckptool.values import blocks as data

RECORDED = record.recorded()


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def adapt(adapter: Adapter, source: TensorInfo, target: TensorInfo, key: str, read: Any = None) -> Adapted:
    return Adapting(read).adapt(adapter, source, target, key)


def plan(text: str, source: torch.Tensor, target: torch.Tensor, read: Any = adapted.read_object) -> TensorInfo:
    """An adapted tensor of two files that hold these."""
    torch.save({"w": source}, "source.pth")
    torch.save({"w": target}, "target.pth")
    old, new = (open_checkpoint(name).state_dict()["w"] for name in ("source.pth", "target.pth"))
    return adapt(parse(text), old, new, "w", read).tensor


def real(tensor: TensorInfo) -> torch.Tensor:
    with Files() as files:
        raw = bytearray(data.read_bytes(tensor, files))
    return torch.frombuffer(raw, dtype=getattr(torch, tensor.dtype)).reshape(tensor.shape)


def result(text: str, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return real(plan(text, source, target))


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return (one.dtype, one.shape) == (other.dtype, other.shape) and bits(one) == bits(other)


# --- other people's code -------------------------------------------------------------------------------------------


def says_the_same(case: record.Case, name: str, live: record.Case, rtol: float = 0.0) -> None:
    """Compares with what the case's library said when it was recorded, and where it is installed with itself.

    torch may round the last bit otherwise on another processor; the library itself is met to the last bit, but for
    ``rtol``.
    """
    source, target = case.tensors()
    atol = max(rtol, {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}[case.dtype])
    close = {"rtol": max(rtol, 4 * torch.finfo(case.dtype).eps), "atol": atol}
    torch.testing.assert_close(result(case.text, source, target), RECORDED[name], **close)
    if not record.installed(case.function[0]):
        return
    source, target = live.tensors(numbers)
    found, wanted = result(live.text, source, target), live.said(source, target)
    if rtol:
        torch.testing.assert_close(found, wanted, rtol=rtol, atol=1e-6)
    else:
        assert same(found, wanted)


# --- references by hand ------------------------------------------------------------------------------------------


def cubic(x: float, a: float) -> float:
    x = abs(x)
    if x < 1:
        return ((a + 2) * x - (a + 3)) * x * x + 1
    return (((x - 5) * x + 8) * x - 4) * a if x < 2 else 0.0


def weights(old: int, new: int, mode: str, antialias: bool) -> np.ndarray[Any, Any]:
    """The matrix that resamples a line, corners not aligned: Keys' cubic with a = -0.75, antialiased -0.5."""
    made = np.zeros((new, old))
    scale = old / new
    for i in range(new):
        center = (i + 0.5) * scale
        if antialias:
            stretch = max(scale, 1.0)
            reach = (2 if mode == "bicubic" else 1) * stretch
            for j in range(max(int(center - reach + 0.5), 0), min(int(center + reach + 0.5), old)):
                x = (j - center + 0.5) / stretch
                made[i, j] = cubic(x, -0.5) if mode == "bicubic" else max(0.0, 1 - abs(x))
            made[i] /= made[i].sum()
        elif mode == "bicubic":
            for j in range(math.floor(center - 0.5) - 1, math.floor(center - 0.5) + 3):
                made[i, min(max(j, 0), old - 1)] += cubic(center - 0.5 - j, -0.75)
        else:
            at = max(center - 0.5, 0.0)
            j = min(math.floor(at), old - 1)
            made[i, j] += 1 - (at - j)
            made[i, min(j + 1, old - 1)] += at - j
    return made


def resized(grid: torch.Tensor, new: Sequence[int], mode: str = "bicubic", antialias: bool = True) -> torch.Tensor:
    """A grid HxWxC at another size, in float64."""
    rows, columns = (weights(a, b, mode, antialias) for a, b in zip(grid.shape, new, strict=False))
    return torch.from_numpy(np.einsum("ih,jw,hwc->ijc", rows, columns, grid.double().numpy()))
