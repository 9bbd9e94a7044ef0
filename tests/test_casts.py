"""Casts without torch, held against torch's own for every value of sixteen bits and many of more."""

from __future__ import annotations

import pytest
import torch

from ckptool.casts import FLOATS, caster

PAIRS = [(old, new) for old in FLOATS for new in FLOATS if old != new]
EDGES = [
    3.3895e38, 3.39e38, 3.4028e38, 1e39, 65504.0, 65519.9, 65520.0, 1e-40, 6e-8, 2e-8, 3.0088, -0.0, 0.0,
    1.00390625, 1.01171875, float("inf"), -float("inf"), float("nan"), -float("nan"),
]  # fmt: skip


def values(name: str) -> list[torch.Tensor]:
    dtype = getattr(torch, name)
    torch.manual_seed(0)
    bits = torch.randint(0, 256, ((1 << 16) * dtype.itemsize,), dtype=torch.uint8).view(dtype)
    if dtype.itemsize == 2:
        bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)  # every one there is
    edges = torch.tensor([*EDGES, *(-edge for edge in EDGES)], dtype=torch.float64)
    return [bits, edges.to(dtype), torch.randn(5000).to(dtype), torch.zeros(0, dtype=dtype)]


@pytest.mark.parametrize(("old", "new"), PAIRS)
def test_a_cast_rounds_as_torch_does_and_counts_what_becomes_infinite(old: str, new: str) -> None:
    cast = caster(old, new)
    assert cast is not None
    for tensor in values(old):
        made, lost = cast(tensor.view(torch.uint8).numpy().tobytes())
        ours = torch.frombuffer(bytearray(made) or bytearray(8), dtype=getattr(torch, new))[: len(tensor)]
        theirs = tensor.to(getattr(torch, new))
        same = (ours == theirs) & (torch.signbit(ours) == torch.signbit(theirs)) | (ours.isnan() & theirs.isnan())
        assert same.all(), tensor[~same][:3]
        assert lost == int(tensor.isfinite().sum() - theirs.isfinite().sum())


def test_other_dtypes_are_torchs_to_cast() -> None:
    assert caster("float8_e4m3fn", "float32") is None
    assert caster("int64", "float32") is None
    assert caster("float32", "float32") is None
