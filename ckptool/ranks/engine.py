"""torch.distributed.checkpoint's own way to save, with what ckptool plans and writes: a planner and a storage writer.

torch collects the plans of all ranks, checks that their boxes cover every tensor once, has each rank write, and rank 0
finish. The items are written by ckptool, a block at a time: torch's own writer holds all that a rank writes in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.distributed.checkpoint import metadata, planner, storage
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.state_dict_saver import save as save_all
from torch.futures import Future

from ckptool.errors import CkptoolError
from ckptool.ranks.world import World

Numbers = tuple[int, ...]


class Item(NamedTuple):
    """What a rank writes: a box of a tensor of ``shape``, or a Python value, whose ``dtype`` is None."""

    key: str
    dtype: str | None = None
    shape: Numbers = ()
    offsets: Numbers = ()
    sizes: Numbers = ()


Place = tuple[str, int, int]
"""Where an item was written: the name of its file, the offset, and the bytes."""


def save(
    world: World,
    items: Sequence[Item],
    paths: Mapping[str, tuple[str | int, ...]],
    write: Callable[[], Sequence[Place]],
) -> list[tuple[Item, Place]]:
    """Has all ranks write their items, and returns on rank 0 those of all ranks; elsewhere nothing.

    ``paths``: those of all keys in the tree. ``write`` writes this rank's items, and returns where each is.
    Raises: what `World.together` raises.
    """
    writer = _Writer(items, write)
    try:
        save_all({}, storage_writer=writer, planner=_Planner(items, paths), process_group=world.group)
    except CheckpointException as error:
        found = {rank: caught for rank, (caught, _) in error.failures.items()}
        world.refuse({rank: caught for rank, caught in found.items() if isinstance(caught, CkptoolError)})
        if all(isinstance(caught, SystemExit) for caught in found.values()):
            raise world.lost(RuntimeError(f"rank {min(found)} was told to end")) from error
        raise
    except (RuntimeError, ConnectionError) as lost:
        raise world.lost(lost) from lost
    return writer.written


class _Planner(DefaultSavePlanner):
    """Plans the items of a rank. torch's class makes of all ranks' plans the metadata, and checks them."""

    def __init__(self, items: Sequence[Item], paths: Mapping[str, tuple[str | int, ...]]) -> None:
        super().__init__()
        self.items, self.paths = items, paths

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        self.is_coordinator = is_coordinator

    def create_local_plan(self) -> planner.SavePlan:
        data = dict(self.paths) if self.is_coordinator else {}
        return planner.SavePlan([*map(_write_item, self.items)], planner_data=data)


def _write_item(item: Item) -> planner.WriteItem:
    if item.dtype is None:
        return planner.WriteItem(metadata.MetadataIndex(item.key), planner.WriteItemType.BYTE_IO)
    offsets = torch.Size(item.offsets)
    return planner.WriteItem(
        metadata.MetadataIndex(item.key, offsets),
        planner.WriteItemType.SHARD,
        tensor_data=planner.TensorWriteData(
            metadata.ChunkStorageMetadata(offsets, torch.Size(item.sizes)),
            metadata.TensorProperties(dtype=getattr(torch, item.dtype)),
            torch.Size(item.shape),
        ),
    )


class _Writer(storage.StorageWriter):
    """Writes items through a function; ``written``: those of all ranks, on rank 0 in the end."""

    def __init__(self, items: Sequence[Item], write: Callable[[], Sequence[Place]]) -> None:
        self.items, self.write = items, write
        self.written: list[tuple[Item, Place]] = []

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: planner.SavePlan) -> planner.SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[planner.SavePlan]) -> list[planner.SavePlan]:
        return plans

    def write_data(self, plan: planner.SavePlan, planner: Any) -> Future[list[storage.WriteResult]]:
        wrote = zip(plan.items, self.items, self.write(), strict=True)
        done: Future[list[storage.WriteResult]] = Future()
        done.set_result([storage.WriteResult(one.index, place[2], (item, place)) for one, item, place in wrote])
        return done

    def finish(self, metadata: metadata.Metadata, results: list[list[storage.WriteResult]]) -> None:
        self.written = [one.storage_data for every in results for one in every]

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return False
