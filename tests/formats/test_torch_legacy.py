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
from oracles import FIXTURES, assert_identical, assert_same_tensors, loads_safely, thinned, tree_equal
from torch import nn

from ckptool import open as open_checkpoint
from ckptool import save
from ckptool.core.tensor import Derived, TensorInfo
from ckptool.errors import CkptoolError, FormatError, LossError
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


@thinned(4)
def test_any_byte_changed_it_is_read_or_an_error_of_ours(step: int, tmp_path: Path) -> None:
    whole = stream(tensor("1", 4, (2, 2)), [("1", 4, RAW)])
    for at in range(0, len(whole), step):
        for flipped in (0x01, 0x80, 0xFF):
            (tmp_path / "x.pth").write_bytes(whole[:at] + bytes([whole[at] ^ flipped]) + whole[at + 1 :])
            try:
                read(str(tmp_path / "x.pth"))
            except CkptoolError:
                continue


# --- writing ---------------------------------------------------------------------------------------------------------


def pickles_of(path: Path) -> list[Any]:
    """The stream's pickles but the tree, by Python's own unpickler, and how many bytes are behind them."""

    class Machine(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            return lambda *args: (name, args)

        def persistent_load(self, pid: Any) -> Any:
            return pid

    found: list[Any] = []
    with path.open("rb") as file:
        for _ in range(5):
            found.append(Machine(file).load())
        del found[3]
        found.append(len(file.read()))
    return found


def test_the_stream_is_laid_out_as_torch_lays_it_out(legacy: Saved, tmp_path: Path) -> None:
    value = {f"t{number}": torch.arange(float(number + 1)) for number in range(12)}
    ours, theirs = tmp_path / "ours.pth", legacy(value)
    save(open_checkpoint(theirs), ours, to="torch-legacy")
    one, other = pickles_of(ours), pickles_of(theirs)
    assert one[:3] == other[:3]
    assert one[3] == sorted(one[3])
    assert len(one[3]) == len(other[3]) == 12
    assert one[4] == other[4]
    lengths = struct.unpack_from("<q", ours.read_bytes(), ours.stat().st_size - one[4])
    assert lengths == (1,)  # the first storage used is the first that is written


def test_a_persistent_id_has_six_parts_the_last_none(saved: Saved, tmp_path: Path) -> None:
    save(open_checkpoint(saved({"w": torch.ones(3)})), tmp_path / "out.pth", to="torch-legacy")
    pids = []

    class Machine(pickle.Unpickler):
        def persistent_load(self, pid: Any) -> Any:
            pids.append(pid)
            return torch.FloatStorage(3)

    with (tmp_path / "out.pth").open("rb") as file:
        for _ in range(4):
            Machine(file).load()
    assert pids == [("storage", torch.FloatStorage, "00000000", "cpu", 3, None)]


def test_ties_views_and_attributes_come_back(saved: Saved, tmp_path: Path) -> None:
    base = torch.randn(4, 5)
    parameter = nn.Parameter(torch.ones(2))
    parameter.note = "kept"
    value = {
        "base": base, "tied": base, "t": base.t(), "row": base[2], "of a big one": torch.arange(100.0)[7:9],
        "conj": torch.randn(2, dtype=torch.complex64).conj(), "neg": torch._neg_view(torch.ones(2)),
        "p": parameter, "empty": torch.empty(0, 3), "scalar": torch.tensor(1), "typed": torch.ones(3).storage(),
        "meta": torch.empty(2, device="meta"), "coo": torch.eye(3).to_sparse(), "epoch": 7,
        "q": torch.quantize_per_tensor(torch.ones(3), 0.1, 2, torch.qint8),
    }  # fmt: skip
    path = saved(value)
    assert save(open_checkpoint(path), tmp_path / "out.pth", to="torch-legacy").left_out == ()
    assert not (tmp_path / "out.pth").read_bytes().startswith(b"PK")
    assert_identical(torch.load(path, weights_only=False), torch.load(tmp_path / "out.pth", weights_only=False))
    written = torch.load(tmp_path / "out.pth", weights_only=False)
    assert written["of a big one"].untyped_storage().nbytes() == 8
    assert written["p"].note == "kept"


def test_a_state_dict_written_as_a_stream_loads_safely_and_into_its_model(saved: Saved, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    save(open_checkpoint(saved(model.state_dict())), tmp_path / "out.pth", to="torch-legacy")
    assert loads_safely(tmp_path / "out.pth")
    written = torch.load(tmp_path / "out.pth", weights_only=True)
    assert written._metadata == model.state_dict()._metadata
    model.load_state_dict(written, strict=True)


def test_devices_are_written_as_asked(saved: Saved, tmp_path: Path) -> None:
    save(open_checkpoint(saved({"w": torch.ones(2)})), tmp_path / "out.pth", to="torch-legacy", map_location="cuda:1")
    assert open_checkpoint(tmp_path / "out.pth").state_dict()["w"].location == "cuda:1"
    assert torch.load(tmp_path / "out.pth", map_location="cpu")["w"].tolist() == [1.0, 1.0]


def test_dtypes_that_no_torch_could_load_again_are_named_all_at_once(saved: Saved, tmp_path: Path) -> None:
    untyped = {
        "u16": torch.ones(2, dtype=torch.uint16), "f8": torch.ones(2).to(torch.float8_e4m3fn),
        "c32": torch.ones(2, dtype=torch.complex32),
    }  # fmt: skip
    sparse = torch.sparse_coo_tensor([[0]], torch.ones(1).to(torch.float8_e5m2), (2,))
    tree = {"model": {**untyped, "w": torch.ones(2)}, "ema": {"x": untyped["u16"], "sparse": sparse}}
    path = saved(tree)
    torch.save(tree["model"], tmp_path / "torch.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(AttributeError):
        torch.load(tmp_path / "torch.pth")  # what torch itself does; should that change, so may we
    with pytest.raises(LossError) as caught:
        save(open_checkpoint(path), tmp_path / "out.pth", to="torch-legacy")
    said = str(caught.value)
    for words in ("u16 (uint16)", "f8 (float8_e4m3fn)", "c32 (complex32)", "ema/x (uint16)", "(float8_e5m2)"):
        assert words in said
    assert "w (" not in said
    assert not (tmp_path / "out.pth").exists()


def test_an_untyped_storage_is_refused_too(saved: Saved, tmp_path: Path) -> None:
    opened = open_checkpoint(saved({"w": torch.ones(1), "s": torch.UntypedStorage(4)}))
    with pytest.raises(LossError, match=r"s \(UntypedStorage\)"):
        save(opened, tmp_path / "out.pth", to="torch-legacy")


def test_several_views_of_computed_values_each_have_their_own(saved: Saved, tmp_path: Path) -> None:
    opened = open_checkpoint(saved({"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, 3)}))
    both = Derived("cat", tuple(opened.state_dict().values()))
    made = {
        "whole": TensorInfo("float32", (4, 3), (3, 1), 0, both), "t": TensorInfo("float32", (3, 4), (1, 3), 0, both),
        "row": TensorInfo("float32", (3,), (1,), 3, both), "empty": TensorInfo("float32", (0,), (1,), 0, both),
    }  # fmt: skip
    expected = torch.cat([torch.arange(6.0).reshape(2, 3), torch.ones(2, 3)])
    for to in ("torch", "torch-legacy"):
        save(opened.with_state_dict(made), tmp_path / f"{to}.pth", to=to)
        written = torch.load(tmp_path / f"{to}.pth", weights_only=True)
        assert torch.equal(written["whole"], expected)
        assert torch.equal(written["t"], expected.t())
        assert torch.equal(written["row"], expected[1])
        assert written["t"].untyped_storage().data_ptr() == written["whole"].untyped_storage().data_ptr()
        lone = opened.with_state_dict({"t": made["t"]})
        save(lone, tmp_path / "lone.pth", to=to, force=True)
        assert torch.equal(torch.load(tmp_path / "lone.pth")["t"], expected.t())
