from __future__ import annotations

import io
import pickle
import struct
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import FIXTURES, assert_identical, assert_same_tensors, tree_equal
from torch import nn

from ckptool.api import open as open_checkpoint
from ckptool.api import save
from ckptool.errors import CkptoolError, FormatError
from ckptool.formats import read

Saved = Callable[..., Path]


@pytest.fixture
def legacy(saved: Saved) -> Saved:
    def save_(obj: Any, name: str = "legacy.pth") -> Path:
        return saved(obj, name, _use_new_zipfile_serialization=False)

    return save_


def stream(tree: bytes, storages: list[tuple[str, int, bytes]]) -> bytes:
    """A hand-made file: (key, number of elements, bytes)."""
    out = io.BytesIO()
    for head in (0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}):
        pickle.dump(head, out, 2)
    out.write(tree)
    pickle.dump([key for key, _, _ in storages], out, 2)
    for _, numel, raw in storages:
        out.write(struct.pack("<q", numel) + raw)
    return out.getvalue()


def tensor(key: str, numel: int, shape: tuple[int, ...], offset: int = 0, view: Any = None) -> bytes:
    """The pickle of one float32 tensor as torch 0.2 wrote it."""

    class Storage:
        pass

    class Tensor:
        pass

    class Pickler(pickle.Pickler):
        def persistent_id(self, item: Any) -> Any:
            return ("storage", torch.FloatStorage, key, "cpu", numel, view) if isinstance(item, Storage) else None

        def reducer_override(self, item: Any) -> Any:
            if isinstance(item, Tensor):
                stride = tuple(torch.empty(shape).stride())
                return torch._utils._rebuild_tensor, (Storage(), offset, shape, stride)
            return NotImplemented

    out = io.BytesIO()
    Pickler(out, 2).dump({"w": Tensor()})
    return out.getvalue()


def test_all_that_torch_writes_is_read(legacy: Saved) -> None:
    torch.manual_seed(1)
    base = torch.randn(4, 5)
    value = {
        "base": base, "t": base.t(), "row": base[2], "bf16": torch.randn(3).bfloat16(), "bool": torch.tensor([True]),
        "c": torch.randn(2, dtype=torch.complex64), "none": torch.empty(0), "scalar": torch.tensor(3),
        "p": nn.Parameter(torch.ones(2)), "meta": OrderedDict(a=1), "epoch": 3, "text": "x",
    }  # fmt: skip
    path = legacy(value)
    tree_equal(read(str(path)).tree, torch.load(path))


def test_a_state_dict_keeps_its_metadata_through_a_rewrite(legacy: Saved, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    save(open_checkpoint(legacy(model.state_dict())), tmp_path / "out.pth")
    written = torch.load(tmp_path / "out.pth", weights_only=True)
    assert written._metadata == model.state_dict()._metadata
    model.load_state_dict(written, strict=True)


def test_many_storages_lie_where_their_numbers_say(legacy: Saved) -> None:
    # Keys are addresses, sorted as text: the order in the file is not that of first use.
    value = {f"t{i}": torch.full((i % 7 + 1,), float(i)) for i in range(200)}
    assert_same_tensors(open_checkpoint(legacy(value)), value)


@pytest.mark.filterwarnings("ignore")
def test_a_whole_model_with_its_source_text_is_read_and_rewritten(legacy: Saved, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    opened = open_checkpoint(legacy(model))
    assert_same_tensors(opened, dict(model.state_dict(keep_vars=True)))
    save(opened, tmp_path / "out.pth")
    again = torch.load(tmp_path / "out.pth", weights_only=False)
    assert_identical(dict(again.state_dict()), dict(model.state_dict()))


def test_the_oldest_tensors_and_their_storage_views_are_read(tmp_path: Path) -> None:
    # torch 0.1.10 to 0.4: a part of a storage had a key of its own, and the offset counts from that part.
    raw = struct.pack("<8f", *range(8))
    (tmp_path / "old.pth").write_bytes(stream(tensor("7", 8, (2, 2), 1, ("70", 2, 5)), [("7", 8, raw)]))
    loaded = torch.load(tmp_path / "old.pth")
    assert loaded["w"].tolist() == [[3.0, 4.0], [5.0, 6.0]]
    opened = open_checkpoint(tmp_path / "old.pth")
    found = opened.to_torch()
    assert found["w"].tolist() == loaded["w"].tolist()


def test_the_stream_may_be_long(legacy: Saved) -> None:
    # Longer than the first piece that is looked at, so the end of the pickle comes at the second look.
    value = {f"key{i}" * 20: i for i in range(3000)} | {"w": torch.arange(5.0)}
    assert (FIXTURES / "resnet_legacy.pth").stat().st_size < 1 << 16
    opened = open_checkpoint(legacy(value))
    assert_same_tensors(opened, {"w": value["w"]})


def test_devices_are_data(legacy: Saved, tmp_path: Path) -> None:
    path = legacy({"w": torch.ones(2)})
    moved = path.read_bytes().replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:3")
    path.write_bytes(moved)
    opened = open_checkpoint(path)
    assert opened.state_dict()["w"].location == "cuda:3"
    save(opened, tmp_path / "out.pth", map_location="cpu")
    assert torch.load(tmp_path / "out.pth")["w"].tolist() == [1.0, 1.0]


RAW = struct.pack("<4f", *range(4))


@pytest.mark.parametrize(
    "data",
    [
        stream(tensor("1", 4, (4,)), []),
        stream(tensor("1", 4, (4,)), [("2", 4, RAW)]),
        stream(tensor("1", 4, (4,)), [("1", 4, RAW), ("1", 4, RAW)]),
        stream(tensor("1", 4, (4,)), [("1", 3, RAW[:12])]),
        stream(tensor("1", 4, (4,)), [("1", -4, RAW)]),
        stream(tensor("1", 4, (4,)), [("1", 1 << 60, RAW)]),
        stream(tensor("1", 4, (5,)), [("1", 4, RAW)]),
        stream(tensor("1", 4, (2,), 1, ("11", 2, 2)), [("1", 4, RAW)]),
        stream(tensor("1", 4, (2,), 0, ("11", -1, 2)), [("1", 4, RAW)]),
        stream(tensor("1", 4, (2,), 0, "view"), [("1", 4, RAW)]),
        stream(b"\x80\x02(X\x05\x00\x00\x00emptyt" + b"Q.", []),
    ],
)
def test_what_does_not_fit_together_is_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "bad.pth").write_bytes(data)
    with pytest.raises(FormatError, match=r"bad\.pth"):
        read(str(tmp_path / "bad.pth"))


def test_cut_at_every_byte_it_is_an_error_that_names_the_file(legacy: Saved, tmp_path: Path) -> None:
    whole = legacy(OrderedDict(w=torch.ones(3), v=torch.ones(2, 2))).read_bytes()
    for end in range(len(whole)):
        (tmp_path / "cut.pth").write_bytes(whole[:end])
        with pytest.raises(CkptoolError, match=r"cut\.pth"):
            read(str(tmp_path / "cut.pth"))


def test_any_byte_changed_it_is_read_or_an_error_of_ours(tmp_path: Path) -> None:
    whole = stream(tensor("1", 4, (2, 2)), [("1", 4, RAW)])
    for at in range(len(whole)):
        for flipped in (0x01, 0x80, 0xFF):
            (tmp_path / "x.pth").write_bytes(whole[:at] + bytes([whole[at] ^ flipped]) + whole[at + 1 :])
            try:
                read(str(tmp_path / "x.pth"))
            except CkptoolError:
                continue
