"""Distributed checkpoints that several processes of torch wrote, read by one that has no process group."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from processes import LAYOUTS, SLOW

import ckptool

FAST = [name for name in LAYOUTS if name not in SLOW]
BY_TORCH = ("by_torch_save", "saved_whole")  # one process's own shards
CASES = [pytest.param((2, name), id=f"2-{name}") for name in FAST]
CASES += [pytest.param((2, name), id=f"2-{name}", marks=pytest.mark.slow) for name in SLOW]
CASES += [
    pytest.param((world, name), id=f"{world}-{name}", marks=pytest.mark.slow) for world in (1, 4) for name in LAYOUTS
]

Written = tuple[int, Path, Any]


@pytest.fixture(scope="module")
def spawned(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, bool], Path]:
    """Returns the directory in which so many processes wrote layouts; they run once for all tests."""
    made: dict[tuple[int, bool], Path] = {}

    def get(world: int, slow: bool) -> Path:
        if (world, slow) not in made:
            made[world, slow] = tmp_path_factory.mktemp("processes")
            names = FAST if world == 2 and not slow else SLOW if world == 2 else LAYOUTS
            processes.spawn(world, made[world, slow], names, limit=240)
        return made[world, slow]

    return get


def written(spawned: Callable[[int, bool], Path], world: int, name: str) -> Written:
    directory = spawned(world, name in SLOW if world == 2 else False)
    return world, directory / name, torch.load(directory / f"{name}.pth", weights_only=False)


def leaves(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(tree, (dict, list)) and tree:
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from leaves(value, (*path, str(key)))
    else:
        yield path, tree


@pytest.mark.parametrize("case", [case for case in CASES if case.values[0][1] not in BY_TORCH])
def test_what_processes_saved_is_what_they_held(
    case: tuple[int, str], spawned: Callable[[int, bool], Path], tmp_path: Path
) -> None:
    _, directory, truth = written(spawned, *case)
    found = ckptool.open(directory)
    assert not found.problems
    expected = dict(leaves(truth))
    values = dict(leaves(found.to_torch()))
    assert values.keys() == expected.keys()
    for key, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert values[key].dtype == value.dtype, key
            assert torch.equal(values[key], value), key
        else:
            assert values[key] == value, key
    ckptool.save(found, tmp_path / "whole.pth", verify=True)
    named = [path for path in sorted(directory.iterdir()) if path.name.endswith((".metadata", ".distcp"))]
    for path in [*named[:1], *named[-1:], *sorted(directory.glob("shard-*"))[-1:]]:
        assert dict(leaves(ckptool.open(path).to_torch())).keys() == expected.keys()


@pytest.mark.parametrize("case", [case for case in CASES if case.values[0][1] == "by_torch_save"])
def test_local_shards_in_files_of_torch_save_are_told_apart(
    case: tuple[int, str], spawned: Callable[[int, bool], Path], tmp_path: Path
) -> None:
    world, directory, _ = written(spawned, *case)
    first, last = directory / "rank0.pth", directory / f"rank{world - 1}.pth"
    tensors = ckptool.open(first).state_dict()
    assert (tensors["w"].kind, tensors["w"].shape, tensors["d"].kind) == (
        "sharded_tensor_local_shards", (8, 3), "dtensor_local_shard",
    )  # fmt: skip
    assert sum(part.numel for part in tensors["w"].parts) == 24 // world
    assert ckptool.diff(first, last, values=True).same == (world == 1)
    ckptool.save(ckptool.open(first), tmp_path / "same.pth", verify=True)
    assert ckptool.diff(first, tmp_path / "same.pth", values=True).same
    with pytest.raises(ckptool.CkptoolError, match=r"w .sharded_tensor_local_shards"):
        ckptool.save(ckptool.open(first), tmp_path / "out.safetensors")


@pytest.mark.parametrize("case", [case for case in CASES if case.values[0][1] == "saved_whole"])
def test_what_one_process_saved_whole_is_called_so(case: tuple[int, str], spawned: Callable[[int, bool], Path]) -> None:
    _, directory, truth = written(spawned, *case)
    found = ckptool.open(directory)
    assert any("flatten_state_dict=False" in note and "model" in note for note in found.notes)
    assert found.tree["model"]["w"].kind == "dtensor_local_shard"
    assert found.tree["model"]["b"].shape == truth["model"]["b"].shape
