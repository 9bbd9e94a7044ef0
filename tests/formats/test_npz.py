from __future__ import annotations

import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracles import FIXTURES, bits
from sparse import SparseOutput, ZeroFiles

from ckptool.api import open as open_checkpoint
from ckptool.api import save
from ckptool.core.checkpoint import Checkpoint
from ckptool.core.dtypes import DTYPES
from ckptool.core.tensor import Span, Storage, TensorInfo
from ckptool.errors import CkptoolError, LossError
from ckptool.formats import npz, read

Saved = Callable[..., Path]


def arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def info(dtype: str, shape: tuple[int, ...]) -> TensorInfo:
    numel = 1
    for size in shape:
        numel *= size
    storage = Storage(Span("", 0, numel * DTYPES[dtype].bits // 8), dtype)
    stride = tuple(torch.empty(shape, device="meta").stride()) if len(shape) < 60 else (1,) * len(shape)
    return TensorInfo(dtype, shape, stride, 0, storage)


def test_numpy_reads_what_torch_holds_in_every_dtype_it_has(saved: Saved, tmp_path: Path) -> None:
    tensors = {name: torch.arange(6).reshape(2, 3).to(getattr(torch, name)) for name in npz.DESCR if name != "bool"} | {
        "bool": torch.tensor([True, False])
    }
    save(open_checkpoint(saved(tensors)), tmp_path / "out.npz")
    found = arrays(tmp_path / "out.npz")
    assert list(found) == list(tensors)
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.numpy().dtype, name
        assert found[name].dtype.isnative
        assert found[name].flags["C_CONTIGUOUS"]
        assert found[name].shape == tensor.shape
        assert found[name].tobytes() == bits(tensor), name


def test_every_shape_and_view_comes_out_by_value(saved: Saved, tmp_path: Path) -> None:
    base = torch.randn(4, 6)
    z = torch.randn(2, 3, dtype=torch.complex64)
    tensors = {
        "t": base.t(), "columns": base[:, ::2], "expanded": torch.ones(1).expand(3, 2), "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 3), "last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "conj": z.conj(), "neg": torch._neg_view(torch.arange(4.0)), "one": torch.ones(7),
        "many": torch.ones((1,) * 20),
    }  # fmt: skip
    save(open_checkpoint(saved(tensors)), tmp_path / "out.npz")
    found = arrays(tmp_path / "out.npz")
    for name, tensor in tensors.items():
        assert found[name].shape == tuple(tensor.shape), name
        assert found[name].tobytes() == bits(tensor), name


@pytest.mark.parametrize("name", ["resnet_old.pth", "resnet_legacy.pth", "views.pth", "big_endian.pth", "deflated.pth"])
def test_a_fixture_comes_out_by_value(name: str, tmp_path: Path) -> None:
    opened = open_checkpoint(FIXTURES / name)
    kept = {key: tensor for key, tensor in opened.state_dict().items() if tensor.dtype in npz.DESCR}
    save(opened.with_state_dict(kept), tmp_path / "out.npz")
    loaded = torch.load(FIXTURES / name, weights_only=True)
    expected = {key: loaded[key] for key in kept}
    found = arrays(tmp_path / "out.npz")
    assert list(found) == list(expected)
    assert {key: value.tobytes() for key, value in found.items()} == {key: bits(v) for key, v in expected.items()}


def test_an_archive_is_sound_for_other_readers_of_zips(tmp_path: Path) -> None:
    save(open_checkpoint(FIXTURES / "resnet_old.pth"), tmp_path / "out.npz")
    with zipfile.ZipFile(tmp_path / "out.npz") as archive:
        assert archive.testzip() is None  # checksums
        for member in archive.infolist():
            assert member.compress_type == zipfile.ZIP_STORED
            assert member.date_time == npz.EPOCH
            head = archive.read(member)
            version, (size,) = head[6:8], struct.unpack_from("<H", head, 8)
            assert (version, (10 + size) % 64, head[10 + size - 1]) == (b"\x01\x00", 0, ord("\n"))


def test_all_that_numpy_has_no_dtype_for_is_named_at_once(tmp_path: Path) -> None:
    opened = open_checkpoint(FIXTURES / "dtypes.pth")
    lacking = [key for key, tensor in opened.state_dict().items() if tensor.dtype not in npz.DESCR]
    assert {"bfloat16", "float8_e4m3fn", "complex32", "bits8"} <= set(lacking)
    with pytest.raises(LossError) as caught:
        save(opened, tmp_path / "out.npz")
    assert all(f"{key} (" in str(caught.value) for key in lacking[:20])
    with pytest.raises(LossError, match=r"quantized \(quantized\).*coo \(sparse_coo\)"):
        save(open_checkpoint(FIXTURES / "composite.pth"), tmp_path / "out.npz")
    assert list(tmp_path.iterdir()) == []
    kept = {key: tensor for key, tensor in opened.state_dict().items() if key not in lacking}
    save(opened.with_state_dict(kept), tmp_path / "out.npz")
    expected = torch.load(FIXTURES / "dtypes.pth")
    assert {key: a.tobytes() for key, a in arrays(tmp_path / "out.npz").items()} == {
        key: bits(expected[key]) for key in kept
    }


def test_lost_ties_are_told_and_what_stands_beside_the_weights_too(tmp_path: Path) -> None:
    opened = open_checkpoint(FIXTURES / "tied.pth")
    told = save(opened, tmp_path / "out.npz").left_out
    lost = {f"untied: {alias} = {group[0]}" for group in opened.shared() for alias in group[1:]}
    assert lost
    assert {line for line in told if line.startswith("untied")} == lost
    found = arrays(tmp_path / "out.npz")
    assert all(found[alias].tobytes() == found[group[0]].tobytes() for group in opened.shared() for alias in group)
    told = save(open_checkpoint(FIXTURES / "resnet_nested.pth"), tmp_path / "two.npz").left_out
    assert set(told) == {"epoch", "arch", "best_acc1", "optimizer", "scheduler", "args"}


@pytest.mark.parametrize("name", ["", "a/b", "../up", "/abs", "ü", "new\nline", '"', "\\", "x" * 5000, "w.npy", "a b"])
def test_any_name_is_written_so_that_numpy_finds_it(name: str, saved: Saved, tmp_path: Path) -> None:
    tensors = {name: torch.arange(3.0), "z": torch.ones(1)}
    save(open_checkpoint(saved(tensors)), tmp_path / "out.npz")
    found = arrays(tmp_path / "out.npz")
    assert {key: value.tolist() for key, value in found.items()} == {name: [0.0, 1.0, 2.0], "z": [1.0]}


@pytest.mark.parametrize("name", ["a\0b", "\ud800", "x" * 65_533, "é" * 32_766, "z.npy"])
def test_names_that_a_zip_or_numpy_cannot_tell_are_refused(name: str, saved: Saved, tmp_path: Path) -> None:
    opened = open_checkpoint(saved({"z": torch.ones(2)}))
    w = opened.state_dict()["z"]
    with pytest.raises(LossError, match="as a name"):
        save(opened.with_state_dict({name: w, "z": w}), tmp_path / "out.npz")
    assert not (tmp_path / "out.npz").exists()


def test_more_dimensions_than_an_array_can_have_are_refused(tmp_path: Path) -> None:
    with SparseOutputAt(tmp_path / "x.npz") as output:
        npz.write(Checkpoint({"w": info("float32", (1,) * 64)}), output, ZeroFiles())
    assert arrays(tmp_path / "x.npz")["w"].ndim == 64
    with pytest.raises(LossError, match="65 dimensions"):
        npz.write(Checkpoint({"w": info("float32", (1,) * 65)}), output, ZeroFiles())


class SparseOutputAt(SparseOutput):
    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def test_members_and_archives_over_four_gigabytes_are_read_by_numpy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zipfile, "crc32", lambda data, crc=0: 0)  # 5 GB of zeros: their checksum is not the point
    sizes = {"small": (3,), "huge": (5 << 28,), "behind": (2, 2)}
    tree = {name: info("float32", shape) for name, shape in sizes.items()}
    with SparseOutputAt(tmp_path / "huge.npz") as output:
        npz.write(Checkpoint(tree), output, ZeroFiles())
    with zipfile.ZipFile(tmp_path / "huge.npz") as archive:
        members = {member.filename: member for member in archive.infolist()}
        assert members["huge.npy"].file_size == (5 << 30) + 128
        assert members["behind.npy"].header_offset > 5 << 30
        for name, shape in sizes.items():
            with archive.open(f"{name}.npy") as member:
                assert np.lib.format.read_magic(member) == (1, 0)
                assert np.lib.format.read_array_header_1_0(member) == (shape, False, np.dtype("<f4"))


def test_two_runs_give_the_same_bytes_and_a_failure_leaves_nothing(tmp_path: Path) -> None:
    opened = open_checkpoint(FIXTURES / "resnet_old.pth")
    for name in ("a.npz", "b.npz"):
        save(opened, tmp_path / name)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    copy = tmp_path / "cut.pth"
    copy.write_bytes((FIXTURES / "resnet_old.pth").read_bytes())
    opened = open_checkpoint(copy)
    copy.write_bytes(copy.read_bytes()[:-1])
    with pytest.raises(CkptoolError, match="changed"):
        save(opened, tmp_path / "c.npz")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npz", "b.npz", "cut.pth"]


def test_reading_one_says_what_it_is(tmp_path: Path) -> None:
    save(open_checkpoint(FIXTURES / "resnet_old.pth"), tmp_path / "out.npz")
    with pytest.raises(CkptoolError, match="NumPy archive"):
        read(str(tmp_path / "out.npz"))
