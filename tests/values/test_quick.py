"""diff --quick, and the kernel that says how far large tensors are apart."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import ckptool
from ckptool.io.files import Files
from ckptool.values import compare, distance

Saved = Callable[..., Path]
Run = Callable[..., tuple[int, str, str]]


def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    found: list[int] = []
    blocks = Files.blocks

    def counted(self: Files, *args: Any) -> Any:
        found.append(1)
        return blocks(self, *args)

    monkeypatch.setattr(Files, "blocks", counted)
    return found


def test_checksums_answer_for_the_data(run: Run, saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    state = {f"t{i}": torch.randn(40) for i in range(5)}
    one, same = saved(state, "one.pth"), saved(dict(state), "same.pth")
    other = saved(state | {"t3": state["t3"] + 1}, "other.pth")
    assert run("diff", one, same, "--quick")[0] == 0
    code, out, _ = run("diff", one, other, "--quick")
    assert (code, "t3" in out, "other bytes" in out, "t2" in out) == (1, True, True, False)
    found = reads(monkeypatch)
    opened = ckptool.open(one), ckptool.open(other)
    before = len(found)  # data.pkl of each
    assert not ckptool.diff(*opened, quick=True).same
    assert len(found) == before


def test_where_there_is_no_checksum_both_are_read(run: Run, saved: Saved) -> None:
    state = {"a": torch.randn(40), "b": torch.arange(3)}
    one = saved(state)
    save_file(state, "one.safetensors")
    save_file(state | {"b": torch.arange(1, 4)}, "other.safetensors")
    assert run("diff", one, "one.safetensors", "--quick")[0] == 0
    assert run("diff", one, "other.safetensors", "--quick")[0] == 1


def test_archives_that_were_written_without_checksums_are_read(saved: Saved) -> None:
    state = {"w": torch.randn(50)}
    torch.serialization.set_crc32_options(False)
    try:
        one, other = saved(state, "one.pth"), saved({"w": state["w"] + 1}, "other.pth")
        same = saved(state, "same.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    assert ckptool.diff(one, same, quick=True).same
    assert not ckptool.diff(one, other, quick=True).same


def test_a_forged_checksum_deceives_quick_and_not_values(saved: Saved) -> None:
    one, other = saved({"w": torch.zeros(50)}, "one.pth"), saved({"w": torch.ones(50)}, "other.pth")
    with zipfile.ZipFile(one) as archive:
        crc = archive.getinfo("one/data/0").CRC
    data = bytearray(other.read_bytes())
    at = data.index(b"other/data/0", data.index(b"PK\x01\x02")) - 46
    struct.pack_into("<I", data, at + 16, crc)
    other.write_bytes(data)
    assert ckptool.diff(one, other, quick=True).same
    assert not ckptool.diff(one, other, values=True).same  # equal checksums are believed nowhere else


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 1e3, 1e-3, 1e-30])
@pytest.mark.parametrize("apart", [1e-2, 1e-4, 3e-7])
def test_large_tensors_are_as_far_apart_as_float64_says(
    dtype: torch.dtype, scale: float, apart: float, saved: Saved, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distance, "PIECE", 1 << 13)  # several pieces
    torch.manual_seed(0)
    a = (torch.randn(37_001) * scale).to(dtype)
    b = (a.double() * (1 + apart * torch.randn(37_001))).to(dtype)
    files = saved({"w": a}, "a.pth"), saved({"w": b}, "b.pth")
    one, other = (ckptool.open(path).state_dict()["w"] for path in files)
    assert distance.is_fast(one, other)
    with Files() as opened:
        found = compare.compare(one, other, opened, 1e-5, 1e-8)
    gap = (a.double() - b.double()).abs()
    if not gap.max():
        assert found.status == "equal"
        return
    assert found.max_abs == gap.max()
    assert found.rel_l2 == pytest.approx(float(gap.norm() / a.double().norm()), rel=1e-6)
    assert (found.status == "close") == bool((gap <= 1e-8 + 1e-5 * b.double().abs()).all())


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf"), 3.0e38, 1e-44])
def test_odd_values_are_seen_by_the_fast_way_too(odd: float, saved: Saved) -> None:
    torch.manual_seed(0)
    a = torch.randn(100_000)
    for both in (True, False):
        one, other = a.clone(), a.clone()
        one[70_000] = odd
        if both:
            other[70_000] = odd
        other[3] += 0.5
        files = saved({"w": one}, "a.pth"), saved({"w": other}, "b.pth")
        report = ckptool.diff(*files, values=True)
        gap = (one.double() - other.double()).abs()
        gap = gap[~(one.isnan() & other.isnan()) & ~(one == other)]
        expected = None if not gap.isfinite().all() else float(gap.max())
        assert report.values[0].max_abs == expected
