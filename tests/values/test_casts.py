"""Casts without torch, held against torch's own for every value of sixteen bits and many of more."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from oracles import seed_torch
from safetensors.torch import load_file

import ckptool
from ckptool.core.dtypes import COMMON_FLOATS, Changed
from ckptool.errors import FormatError
from ckptool.values import blocks
from ckptool.values.codec import caster, encode

PAIRS = [(old, new) for old in COMMON_FLOATS for new in COMMON_FLOATS if old != new]
EDGES = [
    3.3895e38, 3.39e38, 3.4028e38, 1e39, 65504.0, 65519.9, 65520.0, 1e-40, 6e-8, 2e-8, 3.0088, -0.0, 0.0,
    1.00390625, 1.01171875, float("inf"), -float("inf"), float("nan"), -float("nan"),
]  # fmt: skip


def values(name: str) -> list[torch.Tensor]:
    dtype = getattr(torch, name)
    seed_torch(0)
    bits = torch.randint(0, 256, ((1 << 16) * dtype.itemsize,), dtype=torch.uint8).view(dtype)
    if dtype.itemsize == 2:
        bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)  # every one there is
    edges = torch.tensor([*EDGES, *(-edge for edge in EDGES)], dtype=torch.float64)
    return [bits, edges.to(dtype), torch.randn(5000).to(dtype), torch.zeros(0, dtype=dtype)]


@pytest.mark.parametrize(("old", "new"), PAIRS)
def test_a_cast_rounds_as_torch_does_and_counts_what_becomes_infinite_or_zero(old: str, new: str) -> None:
    cast = caster(old, new)
    for tensor in values(old):
        made, changed = cast(tensor.view(torch.uint8).numpy().tobytes())
        ours = torch.frombuffer(bytearray(made) or bytearray(8), dtype=getattr(torch, new))[: len(tensor)]
        theirs = tensor.to(getattr(torch, new))
        same = (ours == theirs) & (torch.signbit(ours) == torch.signbit(theirs)) | (ours.isnan() & theirs.isnan())
        assert same.all(), tensor[~same][:3]
        infinite, zero = tensor.isfinite() & ~theirs.isfinite(), (tensor != 0) & (theirs == 0)
        assert changed == (int(infinite.sum()), 0, int(zero.sum()))


def test_other_dtypes_are_torchs_to_cast() -> None:
    numbers = torch.tensor([0.3, -7.0, 400.0, 0.0])
    for old, new in (("float8_e4m3fn", "float32"), ("float32", "float8_e5m2"), ("int64", "float32")):
        given = numbers.to(getattr(torch, old))
        made, changed = caster(old, new)(given.view(torch.uint8).numpy().tobytes())
        assert bytes(made) == given.to(getattr(torch, new)).view(torch.uint8).numpy().tobytes()
        assert changed == Changed()


@pytest.mark.parametrize("dtype", COMMON_FLOATS)
def test_rounding_is_torchs_for_every_kind_of_value(dtype: str) -> None:
    codes = np.arange(0, 1 << 32, 65521, dtype="u4")
    near = np.concatenate(
        [(np.arange(1 << 16, dtype="u4") << 16) + np.uint32(tail) for tail in (0x7FFF, 0x8000, 0x8001)]
    )
    values = np.concatenate([codes, near]).view("f4")
    ours = torch.frombuffer(bytearray(encode(dtype, values).tobytes()), dtype=getattr(torch, dtype))
    torch.testing.assert_close(ours, torch.from_numpy(values).to(ours.dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn"])
def test_a_large_cast_is_made_ahead_of_its_writing_and_is_the_same(
    dtype: str, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "COMPUTED_AHEAD", 1 << 16)
    seed_torch(0)
    state = {"a": torch.randn(1_300_001), "b": torch.randn(3), "c": torch.randn(600_000)}
    torch.save(state, tmp_path / "in.pth")
    out = tmp_path / f"out{suffix}"
    ckptool.convert(tmp_path / "in.pth", out, dtype=dtype)
    found = torch.load(out) if suffix == ".pth" else load_file(out)
    for key, tensor in state.items():
        expected = tensor.to(getattr(torch, dtype))
        assert torch.equal(found[key].view(torch.uint8), expected.view(torch.uint8))


def test_what_fails_while_it_is_made_ahead_fails_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "COMPUTED_AHEAD", 1 << 16)
    torch.save({"a": torch.randn(1_300_001)}, tmp_path / "in.pth")
    opened = ckptool.open(tmp_path / "in.pth")
    os.truncate(tmp_path / "in.pth", 2_000_000)
    with pytest.raises(FormatError):
        ckptool.convert(opened, tmp_path / "out.pth", dtype="bfloat16")
    assert os.listdir(tmp_path) == ["in.pth"]
