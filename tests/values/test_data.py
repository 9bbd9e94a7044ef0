from __future__ import annotations

import random
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import FIXTURES, bits, seed_torch

from ckptool import open as open_checkpoint
from ckptool import save
from ckptool.core.tensor import Derived, Span, Storage, TensorInfo, contiguous_stride
from ckptool.errors import FormatError, OutputError, UnsupportedError
from ckptool.formats import read
from ckptool.io.files import Files
from ckptool.io.source import BLOCK
from ckptool.values import blocks

Saved = Callable[..., Path]


def bytes_of(tensor: TensorInfo) -> bytes:
    with Files() as files:
        return blocks.read_bytes(tensor, files)


def deflate(path: Path) -> Path:
    packed = path.with_suffix(".deflated.pth")
    with (
        zipfile.ZipFile(path) as old,
        zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name))
    return packed


@pytest.mark.parametrize("seed", range(30))
def test_any_view_gives_torchs_elements_in_c_order(seed: int, saved: Saved) -> None:
    rng = random.Random(seed)
    seed_torch(seed)
    dtype = rng.choice([torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.complex64, torch.bool])
    base = torch.randint(0, 2, (6, 7, 5)).to(dtype)
    views = {}
    for number in range(8):
        view = base.permute(rng.sample(range(3), 3))
        for dim in range(3):
            start = rng.randrange(0, view.shape[dim])
            view = view.narrow(dim, start, rng.randrange(0, view.shape[dim] - start + 1))
        view = view[:: rng.choice([1, 2]), :, :: rng.choice([1, 3])]
        if rng.random() < 0.3 and view.shape[0]:
            view = view[:1].expand(4, -1, -1)
        if rng.random() < 0.3:
            view = view.unsqueeze(rng.randrange(3))
        views[str(number)] = view
    found = open_checkpoint(saved(views)).state_dict()
    for key, view in views.items():
        assert bytes_of(found[key]) == bits(view), (key, view.shape, view.stride())


@pytest.mark.parametrize("rows", [1, 3, 700])
def test_large_views_come_in_blocks_and_are_whole(rows: int, saved: Saved) -> None:
    tensor = torch.arange(rows * 3000, dtype=torch.float64).view(rows, 3000)
    found = open_checkpoint(saved({"t": tensor.t(), "s": tensor[:, ::2], "w": tensor})).state_dict()
    for key, view in {"t": tensor.t(), "s": tensor[:, ::2], "w": tensor}.items():
        with Files() as files:
            pieces = [bytes(block) for block in blocks.tensor_blocks(found[key], files)]
        assert b"".join(pieces) == bits(view)
        assert max(map(len, pieces)) <= BLOCK
        assert all(len(block) % 8 == 0 for block in pieces)


def test_blocks_of_a_deflated_file_are_whole_elements(saved: Saved) -> None:
    seed_torch(1)
    tensor = torch.randn(300_001, dtype=torch.float64)
    found = open_checkpoint(deflate(saved({"w": tensor[1:]}))).state_dict()["w"]
    with Files() as files:
        pieces = [bytes(block) for block in blocks.tensor_blocks(found, files)]
    assert all(len(block) % 8 == 0 for block in pieces)
    assert b"".join(pieces) == bits(tensor[1:])


@pytest.mark.parametrize("name", ["conj_neg.pth", "big_endian.pth", "deflated.pth", "views.pth", "dtypes.pth"])
def test_lazy_bits_byte_order_and_compression_are_resolved(name: str) -> None:
    loaded = torch.load(FIXTURES / name)
    for key, tensor in open_checkpoint(FIXTURES / name).state_dict().items():
        assert bytes_of(tensor) == bits(loaded[key]), key


def test_a_big_endian_view_is_swapped_element_by_element(tmp_path: Path, saved: Saved) -> None:
    z = torch.randn(3, 4, dtype=torch.complex128)
    path = saved({"z": z, "t": z.t(), "c": z[1:].conj()})
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "big.pth", "w") as new:
        for name in old.namelist():
            raw = old.read(name)
            if name.endswith("byteorder"):
                raw = b"big"
            elif "/data/" in name:
                raw = b"".join(raw[i : i + 8][::-1] for i in range(0, len(raw), 8))
            new.writestr(name, raw)
    loaded = torch.load(tmp_path / "big.pth")
    assert torch.equal(loaded["z"], z)
    for key, tensor in open_checkpoint(tmp_path / "big.pth").state_dict().items():
        assert bytes_of(tensor) == bits(loaded[key]), key


@pytest.mark.parametrize(
    ("source", "target"),
    [("float32", "float16"), ("float32", "bfloat16"), ("float64", "float32"), ("bfloat16", "float32"),
     ("int64", "int32"), ("float32", "float8_e5m2"), ("float8_e4m3fn", "float32"), ("int32", "float64"),
     ("bool", "uint8")],
)  # fmt: skip
def test_a_cast_gives_what_torch_gives(source: str, target: str, saved: Saved) -> None:
    seed_torch(2)
    tensor = (torch.randn(40_000, 9) * 3).to(getattr(torch, source))
    for view in (tensor, tensor.t(), tensor[5:6, 2]):
        found = open_checkpoint(saved({"w": view}, "w.pth")).state_dict()["w"]
        shape = found.shape or ()
        cast = TensorInfo(target, shape, contiguous_stride(shape), 0, Derived("cast", (found,)))
        assert bytes_of(cast) == bits(view.to(getattr(torch, target)))


def test_a_cast_reads_a_deflated_file_too(saved: Saved) -> None:
    tensor = torch.randn(400_003, dtype=torch.float64)
    found = open_checkpoint(deflate(saved({"w": tensor}))).state_dict()["w"]
    cast = TensorInfo("float32", found.shape, found.stride, 0, Derived("cast", (found,)))
    assert bytes_of(cast) == bits(tensor.float())


def test_a_cast_checkpoint_is_written_and_its_source_is_an_input(saved: Saved, tmp_path: Path) -> None:
    tensor = torch.randn(5, 6)
    target = open_checkpoint(saved({"w": torch.zeros(5, 6).half()}, "target.pth"))
    donor = saved({"w": tensor.t().contiguous().t()}, "donor.pth")
    found = open_checkpoint(donor).state_dict()["w"]
    cast = TensorInfo("float16", found.shape, contiguous_stride((5, 6)), 0, Derived("cast", (found,)))
    merged = target.with_state_dict({"w": cast})
    for suffix in (".pth", ".safetensors"):
        save(merged, tmp_path / f"out{suffix}")
        written = open_checkpoint(tmp_path / f"out{suffix}").state_dict()["w"]
        assert bytes_of(written) == bits(tensor.half())
    with pytest.raises(OutputError, match="input"):
        save(merged, donor, force=True)


def test_tensors_that_are_not_one_view_have_no_plain_bytes() -> None:
    tree = read(str(FIXTURES / "composite.pth")).tree
    for key in ("coo", "quantized", "meta"):
        with pytest.raises(UnsupportedError):
            bytes_of(tree[key])


# --- same bytes ------------------------------------------------------------------------------------------------------


def test_same_bytes_looks_at_values_and_not_at_layout(saved: Saved) -> None:
    a = torch.randn(500, 700)
    other = a.clone()
    other[-1, -1] += 1
    tensors = {"a": a, "copy": a.clone(), "turned": a.t().contiguous().t(), "other": other, "half": a.half(),
               "flat": a.reshape(-1).clone(), "empty": torch.empty(0), "none": torch.empty(0)}  # fmt: skip
    found = open_checkpoint(saved(tensors)).state_dict()
    deflated = open_checkpoint(deflate(saved(tensors, "other.pth"))).state_dict()
    with Files() as files:
        assert blocks.same_bytes(found["a"], found["a"], files)
        assert blocks.same_bytes(found["a"], found["copy"], files)
        assert blocks.same_bytes(found["a"], found["turned"], files)
        assert blocks.same_bytes(found["a"], deflated["turned"], files)
        assert blocks.same_bytes(found["empty"], found["none"], files)
        assert not blocks.same_bytes(found["a"], found["other"], files)
        assert not blocks.same_bytes(found["a"], deflated["other"], files)
        assert not blocks.same_bytes(found["a"], found["half"], files)
        assert not blocks.same_bytes(found["a"], found["flat"], files)


def test_conjugates_of_one_memory_are_not_the_same() -> None:
    found = open_checkpoint(FIXTURES / "conj_neg.pth").state_dict()
    with Files() as files:
        assert not blocks.same_bytes(found["z"], found["conj"], files)


def test_a_span_beyond_its_file_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(bytes(10))
    beyond = Storage(Span(str(tmp_path / "f"), 4, 8), "float32")
    with pytest.raises(FormatError):
        bytes_of(TensorInfo("float32", (2,), (1,), 0, beyond))
    gathered = replace(TensorInfo("float32", (1, 2), (1, 1), 0, beyond), shape=(2,), stride=(0,))
    with pytest.raises(FormatError):
        bytes_of(gathered)


def read_all(path: Path) -> dict[str, Any]:
    return {key: bytes_of(tensor) for key, tensor in open_checkpoint(path).state_dict().items()}


def test_reading_leaves_the_file_alone() -> None:
    before = (FIXTURES / "views.pth").stat()
    read_all(FIXTURES / "views.pth")
    after = (FIXTURES / "views.pth").stat()
    assert (before.st_mtime_ns, before.st_size) == (after.st_mtime_ns, after.st_size)
