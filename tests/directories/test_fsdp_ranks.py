"""Files that each rank of FSDP saved with torch.save: what is joined, and what is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from makers.directories import files_of_ranks
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore

import ckptool
from ckptool.errors import CkptoolError, FormatError, IncompleteError, UnsupportedError

NAME = "model_world_size_{}_rank_{}.pt"
W = torch.arange(35.0).view(7, 5)


@contextmanager
def process(rank: int, world: int) -> Iterator[None]:
    """One process of a group that is not there."""
    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def saved(directory: Path, world: int, tree: Callable[[int], Any], name: str = NAME) -> Path:
    """The directory of what each rank saved: ``tree`` is called in each process."""
    directory.mkdir(exist_ok=True)
    for rank in range(world):
        with process(rank, world):
            torch.save(tree(rank), directory / name.format(world, rank))
    return directory


def local(value: torch.Tensor, mesh: Any, placements: list[Placement], shape: torch.Tensor = W) -> DTensor:
    return DTensor.from_local(value, mesh, placements, run_check=False, shape=shape.shape, stride=shape.stride())


def rows(rank: int, world: int = 2) -> DTensor:
    parts = W.chunk(world)
    part = parts[rank].clone() if rank < len(parts) else W[:0].clone()
    return local(part, init_device_mesh("cpu", (world,)), [Shard(0)])


def same(path: Path, tree: dict[str, torch.Tensor]) -> bool:
    found = ckptool.open(path).to_torch()
    return found.keys() == tree.keys() and all(torch.equal(found[key], value) for key, value in tree.items())


def noted(path: Path, *texts: str) -> bool:
    notes = "\n".join(ckptool.open(path).notes)
    return all(text in notes for text in texts)


@pytest.mark.parametrize("name", ["rank{1}.pth", "ep1-ba4-rank{1}.pt", "m_rank_{1:02}.bin", NAME])
@pytest.mark.parametrize("world", [1, 2, 5])
def test_rows_of_any_number_of_ranks_are_joined(name: str, world: int, tmp_path: Path) -> None:
    saved(tmp_path, world, lambda rank: {"w": rows(rank, world)}, name)
    assert same(tmp_path, {"w": W})
    assert not ckptool.open(tmp_path).broken


def test_what_lies_beside_the_model_is_named(tmp_path: Path) -> None:
    for kind in ("model", "optim", "extra_state"):
        saved(tmp_path, 2, lambda rank: {"w": rows(rank)}, kind + NAME.removeprefix("model"))
    (tmp_path / "fsdp_config.json").write_text("{}")
    assert same(tmp_path, {"w": W})
    assert noted(tmp_path, "optim_world_size_2_rank_0.pt", "extra_state_world_size_2_rank_1.pt")


def test_two_models_are_refused_by_name(tmp_path: Path) -> None:
    for world in (2, 4):
        saved(tmp_path, world, lambda rank, world=world: {"w": rows(rank, world)})
    with pytest.raises(UnsupportedError, match=r"world_size_2_rank_\*\.pt, model_world_size_4_rank_\*\.pt"):
        ckptool.open(tmp_path)


@pytest.mark.parametrize("gone", [0, 1, 2])
@pytest.mark.parametrize("name", ["rank{1}.pth", NAME])
def test_a_missing_rank_is_named(name: str, gone: int, tmp_path: Path) -> None:
    saved(tmp_path, 3, lambda rank: {"w": rows(rank, 3)}, name)
    (tmp_path / name.format(3, gone)).unlink()
    with pytest.raises(IncompleteError, match=rf"missing: {name.format(3, gone)}\. Name a file"):
        ckptool.open(tmp_path)


def test_a_file_that_is_named_is_that_rank_alone(tmp_path: Path) -> None:
    saved(tmp_path, 2, lambda rank: {"w": rows(rank)})
    (found,) = ckptool.open(tmp_path / NAME.format(2, 1)).state_dict().values()
    assert (found.kind, found.parts[0].shape) == ("dtensor_local_shard", (3, 5))


def test_a_copy_of_another_ranks_file_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, 2, lambda rank: {"w": rows(rank)})
    shutil.copy(tmp_path / NAME.format(2, 0), tmp_path / NAME.format(2, 1))
    with pytest.raises(FormatError, match="w: the name of its file says rank 1, and it was held by rank 0"):
        ckptool.open(tmp_path)


def test_more_files_than_ranks_are_refused(tmp_path: Path) -> None:
    saved(tmp_path, 2, lambda rank: {"w": rows(rank)})
    shutil.copy(tmp_path / NAME.format(2, 0), tmp_path / NAME.format(2, 2))
    with pytest.raises(FormatError, match=r"rank_2\.pt is of a rank that 2 processes do not have"):
        ckptool.open(tmp_path)


@pytest.mark.parametrize("placement", [Partial(), Partial("avg"), _StridedShard(0, split_factor=2)], ids=str)
def test_a_placement_that_is_no_plain_one_is_refused_by_name(placement: Placement, tmp_path: Path) -> None:
    saved(tmp_path, 2, lambda rank: {"w": local(W.clone(), init_device_mesh("cpu", (2,)), [placement])})
    with pytest.raises(UnsupportedError, match=f"w: a DTensor that is placed by {type(placement).__name__}"):
        ckptool.open(tmp_path)


def other_shape(rank: int, mesh: Any) -> DTensor:
    return local(W[:4].clone(), mesh, [Shard(0)], W if rank else W[:6])


def other_dtype(rank: int, mesh: Any) -> DTensor:
    return local(W.chunk(2)[rank].to([torch.float32, torch.float64][rank]), mesh, [Shard(0)])


def other_placement(rank: int, mesh: Any) -> DTensor:
    return local(W.chunk(2, rank)[rank].clone(), mesh, [Shard(rank)])


def other_local(rank: int, mesh: Any) -> DTensor:
    return local(W[:4].clone(), mesh, [Shard(0)])


def only_one(rank: int, mesh: Any) -> torch.Tensor:
    return W if rank else local(W[:4].clone(), mesh, [Shard(0)])


@pytest.mark.parametrize("made", [other_shape, other_dtype, other_placement, other_local, only_one])
def test_ranks_that_contradict_each_other_are_refused(made: Callable[..., Any], tmp_path: Path) -> None:
    saved(tmp_path, 2, lambda rank: {"w": made(rank, init_device_mesh("cpu", (2,)))})
    with pytest.raises(CkptoolError, match=r"w: (rank|a part of)") as raised:
        ckptool.open(tmp_path)
    assert "\n" not in str(raised.value)


def test_a_tensor_that_only_some_ranks_have_is_incomplete_unless_they_have_all_of_it(tmp_path: Path) -> None:
    saved(tmp_path, 2, lambda rank: {"w": rows(rank), **({"b": rows(rank)} if rank else {"c": torch.ones(2)})})
    with pytest.raises(IncompleteError, match="b: 20 elements"):
        ckptool.open(tmp_path)
    saved(tmp_path, 2, lambda rank: {"w": rows(rank), **({} if rank else {"c": torch.ones(2)})})
    assert same(tmp_path, {"w": W, "c": torch.ones(2)})
    assert noted(tmp_path, "not in the files of all ranks: c")


def test_what_differs_between_ranks_and_is_not_sharded_is_named(tmp_path: Path) -> None:
    saved(tmp_path, 2, lambda rank: {
        "w": rows(rank), "mean": torch.full((3,), float(rank)), "rank": rank, "same": torch.ones(2), "epoch": 3,
    })  # fmt: skip
    assert torch.equal(ckptool.open(tmp_path).to_torch()["mean"], torch.zeros(3))
    assert noted(tmp_path, "not the same on all ranks, the first one's taken: mean, rank", "first rank's taken: same")


def in_groups(values: list[torch.Tensor]) -> Callable[[int], Any]:
    """Sharded over each two of four ranks: nothing in the files says that both groups have the same."""
    return lambda rank: {
        "w": local(values[rank // 2].chunk(2)[rank % 2].clone(), DeviceMesh("cpu", torch.arange(2) + rank // 2 * 2),
                   [Shard(0)])
    }  # fmt: skip


def test_groups_of_ranks_are_joined_only_if_they_hold_the_same(tmp_path: Path) -> None:
    saved(tmp_path, 4, in_groups([W, W.clone()]))
    assert same(tmp_path, {"w": W})
    saved(tmp_path, 4, in_groups([W, W + 1]))
    with pytest.raises(UnsupportedError, match="w: it lies on 2 of 4 ranks, and a part of it on rank 2 too"):
        ckptool.open(tmp_path)


def test_hybrid_sharding_and_two_dimensions_that_are_sharded_twice_are_joined(tmp_path: Path) -> None:
    def tree(rank: int) -> Any:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("ddp", "fsdp"))
        twice = W.chunk(2)[rank // 2].chunk(2)[rank % 2].clone()
        hybrid = W.chunk(2)[rank % 2].clone()
        return {
            "twice": local(twice, mesh, [Shard(0), Shard(0)]),
            "hybrid": local(hybrid, mesh, [Replicate(), Shard(0)]),
        }

    saved(tmp_path, 4, tree)
    assert same(tmp_path, {"twice": W, "hybrid": W})
    assert noted(tmp_path, "replicated, the first rank's taken: hybrid")


@pytest.mark.parametrize("given", [list, tuple])
def test_meshes_of_torch_before_2_9_are_understood(given: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def state(mesh: Any) -> dict[str, Any]:
        return {
            "device_type": "cpu", "mesh": mesh.mesh, "mesh_dim_names": None,
            "_flatten_mesh_list": tuple(mesh.mesh.flatten().tolist()),
            "_coordinate_on_dim": given(mesh.get_coordinate()), "_hash": 1,
        }  # fmt: skip

    monkeypatch.setattr(DeviceMesh, "__getstate__", state)
    saved(tmp_path, 2, lambda rank: {"w": rows(rank)})
    assert same(tmp_path, {"w": W})


def test_files_of_ranks_without_shards_are_no_such_checkpoint(tmp_path: Path) -> None:
    for rank in range(2):
        torch.save({"w": torch.ones(2)}, tmp_path / f"rank{rank}.pth")
    with pytest.raises(UnsupportedError, match="2 files of weights and no index"):
        ckptool.open(tmp_path)


def test_a_number_of_ranks_that_no_run_has_is_one_line(tmp_path: Path) -> None:
    files_of_ranks(tmp_path, {"w": W})
    for path in tmp_path.iterdir():
        path.rename(tmp_path / path.name.replace("size_2", "size_999999"))
    with pytest.raises(IncompleteError, match=r"rank_9\.pt and 999,989 more"):
        ckptool.open(tmp_path)


def test_a_tree_that_is_nested_too_deep_to_be_joined_is_one_line(tmp_path: Path) -> None:
    deep: Any = torch.ones(2)
    for _ in range(300):
        deep = [deep]
    files_of_ranks(tmp_path, {"w": W, "deep": deep})
    with pytest.raises(CkptoolError, match="MAX_LEVELS"):
        ckptool.open(tmp_path)
