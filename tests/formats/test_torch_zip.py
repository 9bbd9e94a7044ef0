from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import FIXTURES, assert_identical, assert_same_tensors, thinned, tree_equal
from torch.utils.serialization import config

from ckptool import open as open_checkpoint
from ckptool import save
from ckptool.core.checkpoint import Checkpoint
from ckptool.core.tensor import Span, Storage, TensorInfo
from ckptool.errors import CkptoolError, FormatError, UnsupportedError
from ckptool.formats import read

Saved = Callable[..., Path]


def records(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture
def repacked(tmp_path: Path) -> Callable[..., Path]:
    """Writes records as an archive; ``change`` replaces some, None takes one away."""

    def pack(content: dict[str, bytes], change: dict[str, bytes | None], name: str = "changed.pth") -> Path:
        merged = {**content, **change}
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            for record, data in merged.items():
                if data is not None:
                    archive.writestr(record, data)
        return tmp_path / name

    return pack


Repacked = Callable[..., Path]


@pytest.mark.parametrize("name", ["my model.ckpt", "x.tar.gz.pth", "ünïcode.pth", "a.b.c", "deep/x.pt"])
def test_the_root_folder_may_have_any_name(name: str, saved: Saved, tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    tensors = {"w": torch.arange(3.0)}
    assert_same_tensors(open_checkpoint(saved(tensors, name)), tensors)


def test_old_record_sets_are_read(saved: Saved, repacked: Repacked) -> None:
    # 1.6 wrote neither byteorder nor .format_version, and keyed storages by their address.
    tensors = {f"t{i}": torch.full((2,), float(i)) for i in range(12)}
    content = records(saved(tensors))
    for extra in (
        "saved/.format_version",
        "saved/.storage_alignment",
        "saved/byteorder",
        "saved/.data/serialization_id",
    ):
        content.pop(extra)
        path = repacked(content, {})
        assert_same_tensors(open_checkpoint(path), torch.load(path))


@pytest.mark.parametrize("setting", ["crc32", 1, 8, 100, 4096])
def test_every_setting_of_torchs_writer_is_read_and_written_again(setting: Any, saved: Saved, tmp_path: Path) -> None:
    value = {"w": torch.arange(6.0).view(2, 3), "b": torch.ones(3).bfloat16(), "e": torch.zeros(0), "n": {"x": 1}}
    torch.serialization.set_crc32_options(setting != "crc32")
    try:
        with config.patch({} if setting == "crc32" else {"save.storage_alignment": setting}):
            path = saved(value)
    finally:
        torch.serialization.set_crc32_options(True)
    if setting != "crc32":
        assert records(path)["saved/.storage_alignment"] == str(setting).encode()
    save(open_checkpoint(path), tmp_path / "out.pth")
    for file in (path, tmp_path / "out.pth"):
        tree_equal(open_checkpoint(file).tree, torch.load(path))
        assert_identical(torch.load(path), torch.load(file))


def test_a_file_of_which_torch_was_told_to_write_no_data_has_zeros(tmp_path: Path) -> None:
    with torch.serialization.skip_data():
        torch.save({"w": torch.ones(70_000), "b": torch.ones(2)}, tmp_path / "saved.pth")
    tree_equal(open_checkpoint(tmp_path / "saved.pth").tree, torch.load(tmp_path / "saved.pth"))


def test_extra_records_and_unused_storages_are_no_trouble(saved: Saved, repacked: Repacked) -> None:
    content = records(saved({"w": torch.ones(2)}))
    path = repacked(content, {"saved/data/99": b"unused", "saved/notes.txt": b"hello"})
    assert_same_tensors(open_checkpoint(path), torch.load(path))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol_is_read(protocol: int, saved: Saved) -> None:
    value = {"w": torch.ones(2), "s": {1}, "b": b"\xff", "o": OrderedDict(a=torch.zeros(1)), "t": (1, [2])}
    path = saved(value, pickle_protocol=protocol)
    tree_equal(read(str(path)).tree, torch.load(path, weights_only=False)) if protocol > 3 else None
    found = open_checkpoint(path)
    assert [key for key, _ in found.tensors()] == [("w",), ("o", "a")]


def test_a_number_too_small_or_large_for_its_storage_is_refused_before_reading(
    saved: Saved, repacked: Repacked
) -> None:
    content = records(saved({"w": torch.ones(4)}))
    for data in (b"", bytes(15), bytes(17), bytes(32)):
        with pytest.raises(FormatError, match="storage '0'"):
            read(str(repacked(content, {"saved/data/0": data})))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"saved/data/0": None}, "absent"),
        ({"saved/data.pkl": None}, "data.pkl"),
        ({"saved/byteorder": b"middle"}, "byteorder"),
        ({"other/data/0": b"x"}, "below"),
        ({"saved/data.pkl": b"\x80\x02N"}, "cut off"),
        ({"saved/data.pkl": b""}, "cut off"),
        ({"saved/data.pkl": b"\x80\x02X\x01\x00\x00\x00xQ."}, "no storage"),
    ],
    ids=str,
)
def test_what_is_wrong_with_an_archive_is_said(
    change: dict[str, bytes | None], said: str, saved: Saved, repacked: Repacked
) -> None:
    with pytest.raises(FormatError, match=said) as caught:
        read(str(repacked(records(saved({"w": torch.ones(4)})), change)))
    assert "changed.pth" in str(caught.value)


def view_of(numel: int, offset: Any, shape: Any, stride: Any) -> bytes:
    """A pickle of one tensor as torch would write it, with any numbers in it."""

    class Storage:
        pass

    class Pickler(pickle.Pickler):
        def persistent_id(self, item: Any) -> Any:
            return ("storage", torch.FloatStorage, "0", "cpu", numel) if isinstance(item, Storage) else None

        def reducer_override(self, item: Any) -> Any:
            if isinstance(item, Tensor):
                args = (Storage(), offset, shape, stride, False, OrderedDict())
                return torch._utils._rebuild_tensor_v2, args
            return NotImplemented

    class Tensor:
        pass

    buffer = io.BytesIO()
    Pickler(buffer, 2).dump({"w": Tensor()})
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("offset", "shape", "stride", "fits"),
    [
        (0, (4,), (1,), True), (0, (5,), (1,), False), (3, (1,), (1,), True), (4, (1,), (1,), False),
        (0, (2, 2), (2, 1), True), (0, (2, 2), (3, 1), False), (0, (1000,), (0,), True), (0, (4,), (-1,), False),
        (-1, (1,), (1,), False), (0, (-1,), (1,), False), (100, (0,), (1,), True), (0, (2,), (1, 1), False),
        (0, (1 << 62, 4), (0, 1), False), (0, (1 << 62, 1), (0, 1), True), (0, (2,), (1 << 63,), False),
        (0, 4, (1,), False), (0, ("4",), (1,), False),
        (0, (2.0,), (1,), False), ("0", (1,), (1,), False), (0, (True,), (1,), False), (None, (1,), (1,), False),
    ],
)  # fmt: skip
def test_a_view_must_lie_inside_its_storage(
    offset: Any, shape: Any, stride: Any, fits: bool, saved: Saved, repacked: Repacked
) -> None:
    path = repacked(records(saved({"w": torch.ones(4)})), {"saved/data.pkl": view_of(4, offset, shape, stride)})
    if not fits:
        with pytest.raises(CkptoolError):
            read(str(path))
        return
    found = read(str(path)).tree["w"]
    assert (found.shape, found.stride, found.storage_offset) == (shape, stride, offset)
    if found.numel < 10_000:
        tensor = torch.load(path)["w"]
        assert (tuple(tensor.shape), tensor.stride()) == (shape, stride)


@pytest.mark.parametrize("numel", [-1, 1 << 70, "4", None, 4.0])
def test_a_count_that_is_none_is_refused(numel: Any, saved: Saved, repacked: Repacked) -> None:
    path = repacked(records(saved({"w": torch.ones(4)})), {"saved/data.pkl": view_of(numel, 0, (4,), (1,))})
    with pytest.raises(FormatError):
        read(str(path))


@thinned(4)
def test_cut_at_every_byte_it_is_an_error_that_names_the_file(step: int, tmp_path: Path) -> None:
    whole = (FIXTURES / "tied.pth").read_bytes()
    cut = tmp_path / "cut.pth"
    for end in range(0, len(whole), step):
        cut.write_bytes(whole[:end])
        with pytest.raises(CkptoolError, match=r"cut\.pth"):
            read(str(cut))


@thinned(4)
def test_any_byte_of_the_pickle_changed_it_is_read_or_an_error_of_ours(
    step: int, saved: Saved, repacked: Repacked
) -> None:
    value = OrderedDict(w=torch.ones(3), v=torch.ones(2).bfloat16(), u=torch.ones(2, dtype=torch.uint16))
    content = records(saved(value))
    pickled = content["saved/data.pkl"]
    for at in range(0, len(pickled), step):
        for flipped in (0x01, 0x80, 0xFF):
            changed = pickled[:at] + bytes([pickled[at] ^ flipped]) + pickled[at + 1 :]
            try:
                open_checkpoint(repacked(content, {"saved/data.pkl": changed})).state_dict()
            except CkptoolError:
                continue


def test_location_tags_are_data_and_need_no_device(saved: Saved, repacked: Repacked, tmp_path: Path) -> None:
    content = records(saved({"a": torch.ones(1), "b": torch.ones(2)}))
    moved = content["saved/data.pkl"].replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:1")
    opened = open_checkpoint(repacked(content, {"saved/data.pkl": moved}))
    assert {tensor.location for tensor in opened.state_dict().values()} == {"cuda:1"}
    save(opened, tmp_path / "kept.pth")
    assert open_checkpoint(tmp_path / "kept.pth").state_dict()["a"].location == "cuda:1"
    for number, wanted in enumerate(("cpu", {"cuda:1": "cpu"}, lambda tag: tag.replace("cuda:1", "cpu"))):
        save(opened, tmp_path / f"{number}.pth", map_location=wanted)
        assert_identical(torch.load(tmp_path / f"{number}.pth"), {"a": torch.ones(1), "b": torch.ones(2)})


def test_a_storage_under_two_types_is_refused(saved: Saved, repacked: Repacked) -> None:
    content = records(saved({"a": torch.ones(2), "b": torch.ones(2, dtype=torch.int32)}))
    both = content["saved/data.pkl"].replace(b"X\x01\x00\x00\x001", b"X\x01\x00\x00\x000")
    with pytest.raises(UnsupportedError, match="two types"):
        read(str(repacked(content, {"saved/data.pkl": both, "saved/data/1": None})))


def test_a_big_endian_file_is_written_little_endian_with_the_same_values(tmp_path: Path) -> None:
    save(open_checkpoint(FIXTURES / "big_endian.pth"), tmp_path / "out.pth")
    with zipfile.ZipFile(tmp_path / "out.pth") as archive:
        assert archive.read("archive/byteorder") == b"little"
    assert_identical(torch.load(tmp_path / "out.pth"), torch.load(FIXTURES / "big_endian.pth"))


def test_a_big_endian_file_with_a_newer_dtype_is_refused(saved: Saved, repacked: Repacked) -> None:
    # torch reads such a storage as bytes, that is unswapped: whatever it means, it is not what torch says.
    content = records(saved({"w": torch.ones(2, dtype=torch.uint16)}))
    with pytest.raises(UnsupportedError, match="big-endian"):
        read(str(repacked(content, {"saved/byteorder": b"big"})))
    content = records(saved({"w": torch.ones(2).to(torch.float8_e5m2)}))
    assert read(str(repacked(content, {"saved/byteorder": b"big"}))).tree["w"].dtype == "float8_e5m2"


def test_a_truncated_source_cannot_become_an_output(saved: Saved, tmp_path: Path) -> None:
    path = saved({"w": torch.randn(100_000)})
    opened = open_checkpoint(path)
    with path.open("r+b") as file:
        file.truncate(10_000)
    with pytest.raises(CkptoolError):
        save(opened, tmp_path / "out.pth")
    assert not (tmp_path / "out.pth").exists()


def test_storages_saved_by_themselves_survive(saved: Saved, tmp_path: Path) -> None:
    tensor = torch.arange(6.0)
    value = {"storage": tensor.storage(), "untyped": torch.ones(3).untyped_storage(), "view": tensor[2:4]}
    path = saved(value)
    save(open_checkpoint(path), tmp_path / "out.pth")
    again = torch.load(tmp_path / "out.pth", weights_only=False)
    assert again["storage"].tolist() == tensor.tolist()
    assert again["untyped"].tolist() == value["untyped"].tolist()
    assert again["view"].tolist() == [2.0, 3.0]
    assert again["view"].untyped_storage().data_ptr() == again["storage"].untyped().data_ptr()


def test_a_damaged_member_is_found_out_by_its_checksum_or_read_as_torch_reads_it(saved: Saved, tmp_path: Path) -> None:
    # torch.load never looks at a checksum; ours copies the recorded one, so a flipped byte stays detectable.
    path = saved({"w": torch.arange(1000.0)})
    data = bytearray(path.read_bytes())
    at = data.index(torch.tensor(500.0).numpy().tobytes())
    data[at] ^= 1
    path.write_bytes(data)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() == "saved/data/0"
    try:
        save(open_checkpoint(path), tmp_path / "out.pth")
    except CkptoolError:
        return
    with zipfile.ZipFile(tmp_path / "out.pth") as archive:
        assert archive.testzip() == "saved/data/0"


def test_an_empty_view_keeps_its_dtype_beside_views_of_another(tmp_path: Path) -> None:
    """torch.save refuses such a tree, and torch.load reads it."""
    storage = Storage(Span("", 0, 32, memory=lambda: memoryview(bytes(32))))
    tree = {
        "a": TensorInfo("float32", (8,), (1,), 0, storage),
        "b": TensorInfo("uint16", (0,), (1,), 2, storage),
        "c": TensorInfo("float64", (0, 2), (2, 1), 0, storage),
    }
    save(Checkpoint(tree), tmp_path / "out.pth")
    loaded = torch.load(tmp_path / "out.pth", weights_only=True)
    assert {key: (str(tensor.dtype), tuple(tensor.shape)) for key, tensor in loaded.items()} == {
        key: (f"torch.{tensor.dtype}", tensor.shape) for key, tensor in tree.items()
    }
