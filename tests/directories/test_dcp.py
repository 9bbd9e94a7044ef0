"""Distributed checkpoints that torch.distributed.checkpoint wrote, against what its own converter makes of them."""

from __future__ import annotations

import hashlib
import os
import pickle
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from everything import from_dcp, others, training
from makers.directories import distributed
from oracles import tree_equal
from torch.distributed.checkpoint.filesystem import SerializationFormat, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

import ckptool
from ckptool.core.checkpoint import Checkpoint
from ckptool.core.dtypes import BY_SAFETENSORS
from ckptool.core.pickled_names import beyond_tensors
from ckptool.core.tensor import Storage
from ckptool.errors import FormatError, IncompleteError, LimitError, UnsupportedError
from ckptool.formats import read
from ckptool.io.files import Files
from ckptool.io.source import LocalFile
from ckptool.pickling import guard
from ckptool.pickling import load as pickles
from ckptool.values.blocks import read_bytes

EDITS = Callable[[Any], None]


def write(directory: Path, tree: dict[str, Any], **options: Any) -> Path:
    dcp.save(tree, storage_writer=dcp.FileSystemWriter(directory, **options), no_dist=True)
    return directory


def edit(directory: Path, change: EDITS) -> Path:
    metadata = pickle.loads((directory / ".metadata").read_bytes())
    change(metadata)
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))
    return directory


def grid(directory: Path) -> tuple[Path, torch.Tensor]:
    """A tensor of six rows and five columns in four boxes of unequal size, and another that is whole."""
    whole = torch.arange(30.0).view(6, 5)
    pieces = {
        f"p{number}": (whole[top : top + rows, left : left + columns].clone(), (top, left))
        for number, (top, left, rows, columns) in enumerate([(4, 0, 2, 2), (0, 0, 4, 2), (0, 2, 4, 3), (4, 2, 2, 3)])
    }
    tree = {**{name: piece for name, (piece, _) in pieces.items()}, "other": torch.ones(2)}
    distributed(directory, tree, {"w": [(name, at) for name, (_, at) in pieces.items()]})
    return directory, whole


@pytest.mark.parametrize("options", [{}, {"single_file_per_rank": False}, {"thread_count": 2}], ids=str)
def test_a_training_checkpoint_is_the_tree_that_was_saved(options: dict[str, Any], tmp_path: Path) -> None:
    expected = training()
    found = read(str(write(tmp_path / "d", expected, **options)))
    assert found.format == "dcp"
    assert beyond_tensors(found.names) == {}  # the classes of every such checkpoint's metadata are no news
    tree_equal(found.tree, {**expected, "model": dict(expected["model"])})
    assert list(found.tree["optim"]["state"]) == [0, 1, 2, 3]
    assert list(ckptool.open(tmp_path / "d").state_dict()) == list(expected["model"])
    converted = from_dcp(tmp_path / "d")
    tree_equal(found.tree["model"], {key: converted["model"][key] for key in found.tree["model"]})


@pytest.mark.parametrize(
    "value",
    [
        torch.randn(6, 4)[::2],
        torch.empty(0, 4),
        torch.tensor(5),
        torch.randn(3).to(torch.float8_e4m3fn),
        torch.randn(3, dtype=torch.complex64),
        torch.tensor([True, False]),
        torch.randn(300, 100, dtype=torch.bfloat16),
        [torch.ones(2), {"a": torch.zeros(1)}, 5],
        (1, torch.ones(2)),
        {"1": torch.ones(1), "2": {"3": 4}},
        {7, 8},
        b"bytes",
        None,
    ],
    ids=lambda value: f"{value.dtype} {[*value.shape]}" if isinstance(value, torch.Tensor) else str(value)[:20],
)
def test_any_value_is_what_torch_makes_of_it(value: Any, tmp_path: Path) -> None:
    tree_equal(read(str(write(tmp_path / "d", {"x": value, "y": 1}))).tree, from_dcp(tmp_path / "d"))


def test_a_transposed_tensor_stays_so(tmp_path: Path) -> None:
    tree_equal(read(str(write(tmp_path / "d", tree := {"x": torch.randn(3, 4).t()}))).tree, tree)


def test_parts_in_any_order_are_one_tensor_and_no_data_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, whole = grid(tmp_path / "d")
    assert torch.equal(from_dcp(directory)["w"], whole)
    found = ckptool.open(directory)
    assert torch.equal(found.to_torch()["w"], whole)
    ckptool.save(found, tmp_path / "out.safetensors", verify=True)
    assert ckptool.diff(directory, tmp_path / "out.safetensors", values=True).same

    big = write(tmp_path / "big", {"w": torch.zeros(2_000_000)})
    sizes: list[int] = []
    plain = LocalFile.read
    monkeypatch.setattr(LocalFile, "read", lambda self, at, n: sizes.append(n) or plain(self, at, n))
    (tensor,) = ckptool.open(big).state_dict().values()
    assert isinstance(tensor.source, Storage)
    assert sum(sizes) < 200_000


def test_a_file_of_it_that_is_named_by_hand_is_the_whole(tmp_path: Path) -> None:
    directory, whole = grid(tmp_path / "d")
    for name in (".metadata", "__0_0.distcp"):
        assert torch.equal(ckptool.open(directory / name).to_torch()["w"], whole)


def test_tensors_of_one_shape_whose_pickles_are_the_same_have_each_its_values(tmp_path: Path) -> None:
    """Ties, strides and dtypes too: what differs is in the pickle, but for the bytes and their order."""
    tree: dict[str, Any] = {f"{dtype}.{i}": torch.full((2, 3), i, dtype=dtype) for i in range(3) for dtype in DTYPES}
    tree |= {f"t.{i}": torch.arange(6.0).view(3, 2).t() + i for i in range(2)}
    tree |= {f"long.{'x' * 200}.{i}": torch.full((2, 3), float(i)) for i in range(2)}
    tree |= {f"value.{i}": [i, i] for i in range(3)}
    directory = write(tmp_path / "d", tree)
    found = read(str(directory)).tree
    tree_equal(
        found, {key: value.detach() if isinstance(value, torch.Tensor) else value for key, value in tree.items()}
    )
    assert len({id(one.source) for one in found.values() if not isinstance(one, list)}) == len(tree) - 3
    items = pickle.loads((directory / ".metadata").read_bytes()).storage_data
    place = next(place for index, place in items.items() if index.fqn == "torch.float32.2")
    with open(directory / place.relative_path, "r+b") as file:
        data = file.seek(place.offset) and file.read(place.length)
        file.seek(place.offset + data.index(b"little"))
        file.write(b"BIGGER")
    with pytest.raises(FormatError, match=r"torch\.float32\.2.*byteorder"):
        read(str(directory))


DTYPES = (torch.float32, torch.bfloat16, torch.uint16, torch.float8_e5m2)


@pytest.mark.parametrize(
    ("own", "count"),
    [(False, 500), (True, 300), pytest.param(True, 3000, marks=pytest.mark.slow)],
    ids=["torch's", "ours", "ours, many"],
)
def test_many_tensors_are_read_without_following_every_opcode(
    own: bool, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = {"model": {f"layers.{i}.weight": torch.full((2,), float(i)) for i in range(count)}}
    directory = write(tmp_path / "d", tree)
    if own:
        ckptool.save(ckptool.open(directory), tmp_path / "own", to="dcp", fsync=False)
        directory = tmp_path / "own"
    monkeypatch.setattr(guard, "check", lambda *_: pytest.fail("every opcode was followed"))
    run, load = [], pickles.load
    monkeypatch.setattr(pickles, "load", lambda *given, **named: (run.append(1), load(*given, **named))[1])
    tree_equal(read(str(directory)).tree, tree)
    assert len(run) == 2  # the metadata, and one item


def nested(metadata: Any) -> None:
    """One list of chunks is that of every tensor."""
    chunks = [ChunkStorageMetadata(torch.Size([0] * 8), torch.Size([1] * 8))] * 20_000
    for number in range(2_000):
        properties = TensorProperties(dtype=torch.float32)
        metadata.state_dict_metadata[str(number)] = TensorStorageMetadata(properties, torch.Size([1] * 8), chunks)


def long_shapes(metadata: Any) -> None:
    """One shape, of many dimensions, is that of every box."""
    size = torch.Size([1] * 100_000)
    boxes = [ChunkStorageMetadata(size, size) for _ in range(2_000)]
    metadata.state_dict_metadata["w"] = TensorStorageMetadata(TensorProperties(dtype=torch.float32), size, boxes)


def long_paths(metadata: Any) -> None:
    metadata.planner_data = dict.fromkeys(map(str, range(5_000)), ("x",) * 100_000)


def long_names(metadata: Any) -> None:
    name = "x/" * 500_000
    metadata.storage_data = {MetadataIndex(str(i)): _StorageInfo(name, 0, 1) for i in range(5_000)}


@pytest.mark.parametrize("change", [nested, long_shapes, long_paths, long_names])
def test_metadata_that_share_what_is_long_are_refused_soon(change: EDITS, tmp_path: Path) -> None:
    edit(write(tmp_path / "d", {"w": torch.ones(2)}), change)
    begin = time.process_time()
    with pytest.raises((LimitError, FormatError)) as caught:
        read(str(tmp_path / "d"))
    assert time.process_time() - begin < 4
    assert len(str(caught.value)) < 600


def test_metadata_of_each_process_are_merged(tmp_path: Path) -> None:
    directory, whole = grid(tmp_path / "d")
    for rank in range(2):

        def keep(metadata: Any, rank: int = rank) -> None:
            saved = metadata.state_dict_metadata
            saved["w"].chunks = saved["w"].chunks[2 * rank : 2 * rank + 2]
            offsets = {chunk.offsets for chunk in saved["w"].chunks}
            metadata.storage_data = {
                index: item
                for index, item in metadata.storage_data.items()
                if index.fqn == "other" or index.offset in offsets
            }

        raw = (directory / ".metadata").read_bytes()
        edit(directory, keep)
        (directory / ".metadata").rename(directory / f"__{rank}.metadata")
        (directory / ".metadata").write_bytes(raw)
    (directory / ".metadata").unlink()
    found = ckptool.open(directory)
    assert torch.equal(found.to_torch()["w"], whole)
    assert any("several processes" in note and "other" in note for note in found.notes)
    (directory / "__1.metadata").unlink()
    with pytest.raises(IncompleteError, match="w: 18 elements"):
        ckptool.open(directory)


def test_a_box_that_is_listed_twice_is_one_part_and_told(tmp_path: Path) -> None:
    directory, whole = grid(tmp_path / "d")
    edit(directory, lambda metadata: metadata.state_dict_metadata["other"].chunks.append(
        metadata.state_dict_metadata["other"].chunks[0]
    ))  # fmt: skip
    found = ckptool.open(directory)
    assert torch.equal(found.to_torch()["w"], whole)
    assert torch.equal(found.to_torch()["other"], torch.ones(2))
    assert any("several processes" in note and "other" in note for note in found.notes)


def test_tensors_in_safetensors_are_read(tmp_path: Path) -> None:
    tree = {"w": torch.randn(3, 4), "half": torch.ones(2).half(), "epoch": 5}
    write(tmp_path / "d", tree, serialization_format=SerializationFormat.SAFETENSORS)
    tree_equal(read(str(tmp_path / "d")).tree, tree)


@pytest.mark.parametrize("columns", [4, 40_000])
@pytest.mark.parametrize("values", [{"epoch": 5}, {"epoch": 5, "pair": (1, torch.ones(3))}], ids=["numbers", "tensors"])
def test_safetensors_behind_python_values_are_checked_as_far_as_they_can_be(
    columns: int, values: dict[str, Any], tmp_path: Path
) -> None:
    tree = {"w": torch.ones(3, columns), **values}
    write(tmp_path / "d", tree, serialization_format=SerializationFormat.SAFETENSORS)
    tree_equal({key: read(str(tmp_path / "d")).tree[key] for key in tree}, tree)
    assert (clean := ckptool.inspect(tmp_path / "d", check=True).check) is not None
    assert not clean.findings
    assert any("__0_0.distcp" in text and "no checksums" in text for text in clean.unchecked)
    if "pair" in values:
        path = tmp_path / "d" / "__0_0.distcp"
        raw = bytearray(path.read_bytes())
        raw[raw.index(torch.ones(3).numpy().tobytes())] ^= 1
        path.write_bytes(raw)
        assert (found := ckptool.inspect(tmp_path / "d", check=True).check) is not None
        assert found.findings


def test_a_dict_that_one_process_saved_whole_is_called_so(tmp_path: Path) -> None:
    planner = dcp.DefaultSavePlanner(flatten_state_dict=False)
    dcp.save({"model": {"w": torch.ones(2)}}, checkpoint_id=tmp_path / "d", no_dist=True, planner=planner)
    found = read(str(tmp_path / "d"))
    tree_equal(found.tree, {"model": {"w": torch.ones(2)}})
    assert any("flatten_state_dict=False" in note and "model" in note for note in found.notes)


def a_hole(metadata: Any) -> None:
    del metadata.state_dict_metadata["w"].chunks[0]


def an_overlap(metadata: Any) -> None:
    saved = metadata.state_dict_metadata["w"]
    old = saved.chunks[0].offsets
    saved.chunks[0] = ChunkStorageMetadata(torch.Size((3, 0)), saved.chunks[0].sizes)
    (index,) = (index for index in metadata.storage_data if index.offset == old and index.fqn == "w")
    metadata.storage_data[MetadataIndex("w", torch.Size((3, 0)))] = metadata.storage_data.pop(index)


def a_lost_item(metadata: Any) -> None:
    metadata.storage_data = {index: item for index, item in metadata.storage_data.items() if index.fqn != "other"}


def a_box_outside(metadata: Any) -> None:
    metadata.state_dict_metadata["w"].size = torch.Size((5, 5))


def another_shape(metadata: Any) -> None:
    saved = metadata.state_dict_metadata["w"]
    saved.chunks[0] = ChunkStorageMetadata(saved.chunks[0].offsets, torch.Size((1, 4)))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (a_hole, "w: 4 elements"),
        (an_overlap, "w: two parts of a tensor overlap"),
        (a_lost_item, "other"),
        (a_box_outside, "w: a part .* outside"),
        (another_shape, "w: a part"),
    ],
)
def test_parts_that_do_not_fit_are_incomplete(change: EDITS, said: str, tmp_path: Path) -> None:
    directory = edit(grid(tmp_path / "d")[0], change)
    with pytest.raises(IncompleteError, match=said) as caught:
        ckptool.open(directory)
    assert str(directory) in str(caught.value)


def test_a_missing_file_and_a_short_one_are_incomplete_and_name_file_and_key(tmp_path: Path) -> None:
    directory, _ = grid(tmp_path / "d")
    file = directory / "__0_0.distcp"
    raw = file.read_bytes()
    for size in (0, 1, len(raw) // 2, len(raw) - 1):
        file.write_bytes(raw[:size])
        with pytest.raises(IncompleteError, match=r"__0_0\.distcp.*(w|other): ends at byte"):
            ckptool.open(directory)
    file.unlink()
    with pytest.raises(IncompleteError, match=r"__0_0\.distcp, which has .*w"):
        ckptool.open(directory)
    (directory / ".metadata").rename(directory / ".metadata.tmp")
    with pytest.raises(IncompleteError, match=r"without \.metadata"):
        ckptool.open(directory)


@pytest.mark.parametrize("at", range(0, 1600, 97))
def test_metadata_that_are_cut_off_are_refused(at: int, tmp_path: Path) -> None:
    directory, _ = grid(tmp_path / "d")
    raw = (directory / ".metadata").read_bytes()
    (directory / ".metadata").write_bytes(raw[: min(at, len(raw) - 1)])
    with pytest.raises(FormatError):
        ckptool.open(directory)


@pytest.mark.parametrize("name", ["/etc/passwd", "../x.distcp", "a/../../x", "..", "a\\b", "", "a//b", "C:x"])
def test_a_file_outside_the_directory_is_refused(name: str, tmp_path: Path) -> None:
    def change(metadata: Any) -> None:
        for item in metadata.storage_data.values():
            item.relative_path = name

    with pytest.raises(FormatError, match="outside the directory"):
        ckptool.open(edit(grid(tmp_path / "d")[0], change))


def test_transformed_items_are_refused(tmp_path: Path) -> None:
    def change(metadata: Any) -> None:
        for item in metadata.storage_data.values():
            item.transform_descriptors = ["stream.zstd/1"]

    with pytest.raises(UnsupportedError, match="zstd"):
        ckptool.open(edit(grid(tmp_path / "d")[0], change))


class Canary:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("CKPTOOL_CANARY_EXECUTED",)


def test_a_hostile_pickle_runs_nothing_and_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    item = write(tmp_path / "item", {"x": Canary(), "w": torch.ones(1)})
    outer = edit(grid(tmp_path / "d")[0], lambda metadata: setattr(metadata, "storage_meta", Canary()))
    for directory in (item, outer):
        assert any(name == "mkdir" for _, name in ckptool.open(directory).names)
    assert not (tmp_path / "CKPTOOL_CANARY_EXECUTED").exists()


def test_what_else_lies_there_is_told(tmp_path: Path) -> None:
    directory, _ = grid(tmp_path / "d")
    (directory / "__9_0.distcp").write_bytes(b"x")
    torch.save({"w": torch.ones(1)}, directory / "model.pt")
    torch.save({}, directory / "optimizer.bin")
    state, rest = ckptool.open(directory).notes
    assert "optimizer.bin" in state
    assert all(name in rest for name in ("__9_0.distcp", "model.pt"))


def test_a_set_that_a_loader_takes_comes_first(tmp_path: Path) -> None:
    directory, _ = grid(tmp_path / "d")
    ckptool.save(Checkpoint({"w": ckptool.open(directory).state_dict()["other"]}), directory / "model.safetensors")
    found = ckptool.open(directory)
    assert found.format == "safetensors"
    assert any("DCP" in note and ".metadata" in note for note in found.notes)


def test_a_flipped_bit_of_a_part_is_found_and_nothing_where_none_is(tmp_path: Path) -> None:
    directory, whole = grid(tmp_path / "d")
    assert (clean := ckptool.inspect(directory, check=True).check) is not None
    assert not clean.findings
    raw = bytearray((directory / "__0_0.distcp").read_bytes())
    raw[raw.index(whole[4:6, 0:2].numpy().tobytes())] ^= 1
    (directory / "__0_0.distcp").write_bytes(raw)
    assert (found := ckptool.inspect(directory, check=True).check) is not None
    assert found.findings


def test_what_is_saved_in_its_place_replaces_it(tmp_path: Path) -> None:
    directory, whole = grid(tmp_path / "d")
    ckptool.save(ckptool.open(directory), directory, in_place=True)
    assert sorted(path.name for path in directory.iterdir()) == [".metadata", "__0_0.distcp"]
    assert torch.equal(ckptool.open(directory).to_torch()["w"], whole)
    ckptool.save(ckptool.open(directory), directory, to="sharded", in_place=True)
    assert [path.name for path in directory.iterdir()] == ["model.safetensors"]
    assert torch.equal(ckptool.open(directory).to_torch()["w"], whole)


@pytest.mark.parametrize(("path", "sample"), others("dcp", "accelerate-fsdp", "megatron-dist"))
def test_others_checkpoints_hold_what_was_saved(path: Path, sample: dict[str, Any]) -> None:
    found = {".".join(map(str, key)): tensor for key, tensor in read(str(path)).tensors()}
    with Files() as files:
        for want in sample["tensors"]:
            tensor = found[want["key"]]
            dtype = want["dtype"] if "dtype" in want else BY_SAFETENSORS[want["st_dtype"]].name
            assert (tensor.dtype, list(tensor.shape or ())) == (dtype, want["shape"])
            assert hashlib.sha256(read_bytes(tensor, files)).hexdigest() == want["sha256"]
