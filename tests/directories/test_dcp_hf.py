"""Distributed checkpoints in Hugging Face's files, against torch's own HuggingFaceStorageReader."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from everything import from_dcp
from makers.directories import hugging_face
from safetensors.torch import load_file, save_file

import ckptool
from ckptool.errors import FormatError, IncompleteError, UnsupportedError
from ckptool.formats import read
from ckptool.io.source import LocalFile

SHARD = "shard-{:05}-model-{:05}-of-{:05}.safetensors"

Parts = dict[str, dict[str, tuple[torch.Tensor, tuple[int, ...]]]]


def same(found: Any, expected: Any) -> None:
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype
        assert torch.equal(found[key], tensor), key


def mesh(directory: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """Four processes: a tensor in four unequal boxes, one in rows, one that a single process holds; in two files."""
    grid, rows, bias = torch.arange(35.0).view(7, 5), torch.randn(3, 2).bfloat16(), torch.tensor([1, 2])
    boxes = [(0, 0, 4, 3), (0, 3, 4, 2), (4, 0, 3, 3), (4, 3, 3, 2)]
    parts: Parts = {
        SHARD.format(process, 1, 2): {"grid": (grid[top : top + high, left : left + wide].clone(), (top, left))}
        for process, (top, left, high, wide) in enumerate(boxes, 1)
    }
    parts[SHARD.format(1, 2, 2)] = {"rows": (rows[:2].clone(), (0, 0)), "bias": (bias, (0,))}
    parts[SHARD.format(3, 2, 2)] = {"rows": (rows[2:].clone(), (2, 0))}
    parts[SHARD.format(4, 2, 2)] = {"rows": (rows[3:].clone(), (3, 0))}  # empty
    hugging_face(directory, parts)
    return directory, {"grid": grid, "rows": rows, "bias": bias}


def test_the_parts_of_all_processes_are_the_tensors_that_torch_reads(tmp_path: Path) -> None:
    directory, whole = mesh(tmp_path / "d")
    same(from_dcp(directory), whole)
    found = ckptool.open(directory)
    assert found.format == "dcp-hf"
    same(found.to_torch(), whole)
    assert found.metadata == {"format": "pt"}
    for name in (SHARD.format(1, 1, 2), SHARD.format(4, 2, 2)):
        same(ckptool.open(directory / name).to_torch(), whole)
    for output in ("out.safetensors", "out.pth"):
        ckptool.save(found, tmp_path / output, verify=True)
        assert ckptool.diff(directory, tmp_path / output, values=True).same
    same(load_file(tmp_path / "out.safetensors"), whole)


def test_headers_are_read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    half = torch.zeros(1_000_000)
    parts: Parts = {SHARD.format(one, 1, 1): {"w": (half, ((one - 1) * 1_000_000,))} for one in (1, 2)}
    hugging_face(tmp_path / "d", parts)
    sizes: list[int] = []
    plain = LocalFile.read
    monkeypatch.setattr(LocalFile, "read", lambda self, at, n: sizes.append(n) or plain(self, at, n))
    (tensor,) = ckptool.open(tmp_path / "d").state_dict().values()
    assert tensor.shape == (2_000_000,)
    assert sum(sizes) < 10_000


@pytest.mark.parametrize(
    ("process", "said"),
    [
        (1, r"grid: 12 elements .* no file of process 1"),
        (2, "grid: 8 elements .* no file of process 2"),
        (4, "grid: 6 elements"),
    ],
)
def test_a_missing_process_is_named(process: int, said: str, tmp_path: Path) -> None:
    directory, _ = mesh(tmp_path / "d")
    for path in directory.glob(f"shard-{process:05}-*"):
        path.unlink()
    with pytest.raises(IncompleteError, match=said):
        ckptool.open(directory)


def test_what_is_there_is_shown_if_a_file_of_all_processes_is_missing(tmp_path: Path) -> None:
    directory, whole = mesh(tmp_path / "d")
    for path in directory.glob("*-model-00002-*"):
        path.unlink()
    found = ckptool.open(directory)
    assert list(found.state_dict()) == ["grid"]
    assert any("model-00002-of-00002" in problem for problem in found.problems)
    with pytest.raises(IncompleteError, match="model-00002-of-00002"):
        ckptool.save(found, tmp_path / "out.pth")
    assert list(whole) != ["grid"]


def test_a_process_that_saved_nothing_is_told(tmp_path: Path) -> None:
    w = torch.randn(2, 3)
    hugging_face(
        tmp_path / "d", {SHARD.format(1, 1, 1): {"w": (w[:1], (0, 0))}, SHARD.format(3, 1, 1): {"w": (w[1:], (1, 0))}}
    )
    found = ckptool.open(tmp_path / "d")
    same(found.to_torch(), {"w": w})
    assert any("no file of process 2" in note for note in found.notes)
    assert any("size of a tensor is in none" in note for note in found.notes)


def test_the_same_part_twice_is_told_and_overlaps_are_refused(tmp_path: Path) -> None:
    one = torch.ones(2, 3)
    name, other = SHARD.format(1, 1, 1), SHARD.format(2, 1, 1)
    hugging_face(tmp_path / "d", {name: {"w": (one, (0, 0))}, other: {"w": (one * 2, (0, 0))}})
    found = ckptool.open(tmp_path / "d")
    same(found.to_torch(), {"w": one})
    assert any("first one's taken: w" in note for note in found.notes)
    hugging_face(tmp_path / "d", {other: {"w": (one, (1, 0))}})
    with pytest.raises(IncompleteError, match=r"w: two parts of a tensor overlap"):
        ckptool.open(tmp_path / "d")
    hugging_face(tmp_path / "d", {other: {"w": (one.half(), (2, 0))}})
    with pytest.raises(IncompleteError, match=r"w: .*float16"):
        ckptool.open(tmp_path / "d")


def test_files_of_two_saves_are_refused(tmp_path: Path) -> None:
    directory, _ = mesh(tmp_path / "d")
    hugging_face(directory, {SHARD.format(1, 1, 3): {"w": (torch.ones(1), (0,))}})
    with pytest.raises(FormatError, match="several saves"):
        ckptool.open(directory)


@pytest.mark.parametrize(
    "info",
    [
        "[]",
        "{",
        '{"w": {}}',
        '{"w": {"saved_offsets": [-1]}}',
        '{"w": {"saved_offsets": [0, 0]}}',
        '{"w": {"saved_offsets": 5}}',
        '{"v": {"saved_offsets": [0]}}',
        '{"w": {"saved_offsets": [9223372036854775807]}}',
        "[" * 100_000,
    ],
    ids=lambda text: str(text)[:30],
)
def test_offsets_that_make_no_sense_are_refused(info: str, tmp_path: Path) -> None:
    name = SHARD.format(1, 1, 1)
    save_file({"w": torch.ones(2)}, tmp_path / name, {"DCP_SHARDING_INFO": info})
    with pytest.raises((FormatError, IncompleteError)) as caught:
        ckptool.open(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_shards_without_offsets_are_whole(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / SHARD.format(1, 1, 1))
    save_file({"v": torch.ones(2, 1)}, tmp_path / SHARD.format(2, 1, 1))
    same(ckptool.open(tmp_path).to_torch(), from_dcp(tmp_path))


def test_python_values_before_the_tensors_are_refused_by_name(tmp_path: Path) -> None:
    writer = dcp.HuggingFaceStorageWriter(str(tmp_path / "d"), save_distributed=True)
    dcp.save({"w": torch.ones(2), "epoch": 3}, storage_writer=writer, no_dist=True)
    with pytest.raises(UnsupportedError, match="Python values"):
        ckptool.open(tmp_path / "d")


@pytest.mark.parametrize("options", [{}, {"fqn_to_index_mapping": {"w": 1, "b": 2}}, {"save_distributed": True}])
def test_what_one_process_wrote_is_whole(options: dict[str, Any], tmp_path: Path) -> None:
    tree = {"w": torch.randn(3, 4), "b": torch.ones(4).bfloat16()}
    writer = dcp.HuggingFaceStorageWriter(str(tmp_path / "d"), **options)
    dcp.save(tree, storage_writer=writer, no_dist=True)
    found = ckptool.open(tmp_path / "d")
    assert found.format == ("dcp-hf" if "save_distributed" in options else "hf-sharded")
    same(found.to_torch(), tree)
    assert not [name for name in found.metadata if name.startswith("DCP")]
    if "save_distributed" not in options:
        assert found.notes == ()


def test_consolidated_files_come_first_and_the_shards_are_read_by_their_directory(tmp_path: Path) -> None:
    tree = {"w": torch.randn(3, 4), "b": torch.ones(4)}
    writer = dcp.HuggingFaceStorageWriter(str(tmp_path / "d"), save_distributed=True, enable_consolidation=True)
    dcp.save(tree, storage_writer=writer, no_dist=True)
    for path, label in ((tmp_path / "d", "hf-sharded"), (tmp_path / "d" / "sharded", "dcp-hf")):
        found = ckptool.open(path)
        assert found.format == label
        same(found.to_torch(), tree)
    for path in (tmp_path / "d" / "sharded").iterdir():
        path.rename(tmp_path / "d" / path.name)
    found = ckptool.open(tmp_path / "d")
    assert found.format == "hf-sharded"
    assert any("shard-00001-model" in note for note in found.notes)


def test_a_part_under_another_name_is_incomplete(tmp_path: Path) -> None:
    directory, _ = mesh(tmp_path / "d")
    part = tmp_path / "part.safetensors"
    part.write_bytes((directory / SHARD.format(4, 1, 2)).read_bytes())
    with pytest.raises(IncompleteError, match="parts of a distributed checkpoint, of grid"):
        ckptool.open(part)
    part.write_bytes((directory / SHARD.format(1, 1, 2)).read_bytes())  # nothing in it says that it is a part
    assert any("torch.distributed.checkpoint wrote it" in note for note in ckptool.open(part).notes)


def test_a_short_or_damaged_file_is_named(tmp_path: Path) -> None:
    directory, _ = mesh(tmp_path / "d")
    path = directory / SHARD.format(3, 1, 2)
    raw = path.read_bytes()
    size = 8 + int.from_bytes(raw[:8], "little")
    for end in (0, 1, 8, size // 2, size, len(raw) - 1):
        path.write_bytes(raw[:end])
        with pytest.raises(FormatError, match=path.name):
            read(str(directory))
    path.write_bytes(raw[:8] + json.dumps({"w": 1}).encode().ljust(size - 8) + raw[size:])
    with pytest.raises(FormatError, match=path.name):
        read(str(directory))
