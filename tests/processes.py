"""Distributed checkpoints that several processes of torch write together, each in layouts that users have.

Each is a fork (gloo, a store in a file). A layout is a function that writes ``DIRECTORY/NAME`` and returns what is in
it; process 0 saves that as ``DIRECTORY/NAME.pth``, gathered by torch's collectives, never read from the checkpoint.
Imports that take seconds are in the few layouts that need them.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed._shard.sharded_tensor import Shard as LocalShard
from torch.distributed._shard.sharded_tensor import init_from_local_shards
from torch.distributed.checkpoint.filesystem import SerializationFormat
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

Tree = dict[str, Any]
Layout = Callable[[str], Tree]

LAYOUTS: dict[str, Layout] = {}
SLOW = ("fsdp2", "ddp", "tensor_parallel", "later", "two_threads", "lowest_rank", "ranks_of_fsdp2")
"""Layouts that take longer than others, most by what they import."""


def layout(function: Layout) -> Layout:
    LAYOUTS[function.__name__] = function
    return function


def full(tree: Any) -> Any:
    """The tree with whole tensors; all processes gather them."""
    if isinstance(tree, dict):
        return {key: full(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [full(value) for value in tree]
    if isinstance(tree, DTensor):
        return tree.full_tensor().detach().clone()
    return tree.detach().clone() if isinstance(tree, torch.Tensor) else tree


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(5, 6)
        self.norm = nn.BatchNorm1d(6)
        self.b = nn.Linear(6, 3, bias=False)
        self.scale = nn.Parameter(torch.rand(1))  # fewer rows than processes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(self.a(x))
        return self.b(hidden.relu()) * self.scale


def trained(wrap: Callable[[nn.Module], nn.Module], net: nn.Module | None = None) -> Tree:
    """The state of a model and of AdamW with two groups after a step on the same data everywhere."""
    from torch.distributed.checkpoint.state_dict import get_state_dict

    torch.manual_seed(7)
    model = wrap(net or Net())
    groups = [
        {"params": [one for one in model.parameters() if one.ndim > 1], "weight_decay": 0.1},
        {"params": [one for one in model.parameters() if one.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.01)
    model(torch.randn(4, 5)).square().mean().backward()
    optimizer.step()
    states, optim = get_state_dict(model, optimizer)
    return {"model": states, "optim": optim, "step": 1}


def sharded(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    for child in (model.a, model.b, model):
        fully_shard(child)
    return model


def meshes() -> list[Any]:
    """Meshes of one and of two dimensions over all processes."""
    world = dist.get_world_size()
    shapes = [(world,), (2, world // 2) if world > 2 else (1, world)]
    return [init_device_mesh("cpu", shape) for shape in shapes]


def placed(*sizes: int, dtype: torch.dtype = torch.float32) -> Tree:
    """A tensor in every placement on every mesh."""
    count = torch.Size(sizes).numel()
    whole = torch.arange(count).view(sizes).to(dtype)
    found = {}
    for mesh in meshes():
        single: list[Placement] = [Replicate(), *(Shard(dim) for dim in range(len(sizes)))]
        several = [[one] for one in single] if mesh.ndim == 1 else [[one, two] for one in single for two in single]
        for placements in several:
            found[str(placements) + str(mesh.ndim)] = distribute_tensor(whole.clone(), mesh, placements)
    return found


def uneven() -> Tree:
    return {
        "matrix": placed(7, 5),
        "row": placed(1, 3),  # empty parts
        "cube": placed(3, 2, 9, dtype=torch.bfloat16),
        "ids": placed(9, dtype=torch.int64),
        "none": placed(0, 4),
        "plain": torch.arange(6.0),
        "list": [torch.ones(2), {"epoch": 3}],
    }


def save(path: str, tree: Tree, planner: Any = None, **options: Any) -> None:
    dcp.save(tree, storage_writer=dcp.FileSystemWriter(path, **options), planner=planner)


@layout
def fsdp2(path: str) -> Tree:
    tree = trained(sharded)
    save(path, tree)
    return full(tree)


@layout
def ddp(path: str) -> Tree:
    torch.manual_seed(5)
    model = nn.parallel.DistributedDataParallel(Net())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.randn(4, 5)).square().mean().backward()
    optimizer.step()
    tree = {"model": model.state_dict(), "optim": optimizer.state_dict()}
    save(path, tree)
    return tree


@layout
def tensor_parallel(path: str) -> Tree:
    """FSDP2 over tensor parallelism: strided shards where there are four processes."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    tensor = min(2, dist.get_world_size())
    mesh = init_device_mesh("cpu", (dist.get_world_size() // tensor, tensor), mesh_dim_names=("dp", "tp"))

    def wrap(model: nn.Module) -> nn.Module:
        parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
        return fully_shard(model, mesh=mesh["dp"])

    tree = trained(wrap, nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)))
    save(path, tree)
    return full(tree)


@layout
def placements(path: str) -> Tree:
    save(path, tree := uneven())
    return full(tree)


@layout
def two_threads(path: str) -> Tree:
    save(path, tree := uneven(), thread_count=2)
    return full(tree)


@layout
def a_file_per_item(path: str) -> Tree:
    save(path, tree := {"matrix": placed(7, 5)}, single_file_per_rank=False)
    return full(tree)


@layout
def lowest_rank(path: str) -> Tree:
    save(path, tree := uneven(), planner=dcp.DefaultSavePlanner(dedup_save_to_lowest_rank=True))
    return full(tree)


@layout
def later(path: str) -> Tree:
    dcp.async_save(tree := uneven(), storage_writer=dcp.FileSystemWriter(path)).result(timeout=60)
    return full(tree)


@layout
def without_collectives(path: str) -> Tree:
    tree = {"matrix": placed(7, 5), "own": torch.arange(3.0), "epoch": 3}
    dcp.save(tree, storage_writer=dcp.FileSystemWriter(path), use_collectives=False)
    return full(tree)


@layout
def in_safetensors(path: str) -> Tree:
    tree = {"matrix": placed(7, 5), "plain": torch.ones(3)}
    save(path, tree, serialization_format=SerializationFormat.SAFETENSORS)
    return full(tree)


@layout
def hugging_face(path: str) -> Tree:
    tree = {f"{name}.{key}": one for name in ("matrix", "cube") for key, one in uneven()[name].items()}
    every: list[Any] = [None] * dist.get_world_size()  # the writer refuses what is not contiguous
    dist.all_gather_object(every, [key for key, one in tree.items() if one.to_local().is_contiguous()])
    tree = {key: one for key, one in tree.items() if all(key in keys for keys in every)} | {"plain": torch.ones(3)}
    files = {key: 1 + number % 3 for number, key in enumerate(tree)}
    dcp.save(tree, storage_writer=dcp.HuggingFaceStorageWriter(path, files, save_distributed=True))
    return full(tree)


@layout
def hugging_face_consolidated(path: str) -> Tree:
    mesh = meshes()[0]
    tree = {"w": distribute_tensor(torch.arange(35.0).view(7, 5), mesh, [Shard(0)]), "b": torch.ones(4)}
    writer = dcp.HuggingFaceStorageWriter(path, {"w": 1, "b": 2}, save_distributed=True, enable_consolidation=True)
    dcp.save(tree, storage_writer=writer)
    return full(tree)


def local_shards(pieces: int) -> Tree:
    """ShardedTensors, as FSDP1 has them, with several shards in each process."""
    rank, world = dist.get_rank(), dist.get_world_size()
    whole = torch.arange(8.0 * 3).view(8, 3)
    parts = whole.split(8 // (world * pieces) or 1)
    mine = [
        LocalShard.from_tensor_and_offsets(part.clone(), [number * len(part), 0], rank)
        for number, part in enumerate(parts)
        if number % world == rank
    ]
    return {"w": init_from_local_shards(mine, 8, 3), "whole": whole}


@layout
def sharded_tensors(path: str) -> Tree:
    tree = local_shards(2)
    whole = tree["whole"].clone()
    save(path, tree)
    return {"w": whole, "whole": whole}


@layout
def by_torch_save(path: str) -> Tree:
    """A file of each process, of its local shards."""
    os.makedirs(path, exist_ok=True)
    tree = {**local_shards(1), "d": distribute_tensor(torch.arange(35.0).view(7, 5), meshes()[0], [Shard(0)])}
    torch.save(tree, f"{path}/rank{dist.get_rank()}.pth")
    return {"w": tree["whole"]}


def in_files_of_ranks(path: str, tree: Tree) -> None:
    """A file of each process, named as verl names them."""
    os.makedirs(path, exist_ok=True)
    torch.save(tree, f"{path}/model_world_size_{dist.get_world_size()}_rank_{dist.get_rank()}.pt")


@layout
def files_of_ranks(path: str) -> Tree:
    sharded, tree = local_shards(2), uneven()
    in_files_of_ranks(path, {**tree, **sharded})
    return {**full(tree), "w": sharded["whole"], "whole": sharded["whole"]}


@layout
def ranks_of_fsdp2(path: str) -> Tree:
    in_files_of_ranks(path, tree := trained(sharded))
    return full(tree)


@layout
def saved_whole(path: str) -> Tree:
    planner = dcp.DefaultSavePlanner(flatten_state_dict=False)
    w = distribute_tensor(torch.arange(35.0).view(7, 5), meshes()[0], [Shard(0)])
    tree = {"model": {"w": w, "b": torch.ones(2)}}
    save(path, tree, planner)
    return full(tree)


def main(rank: int, world: int, directory: str, names: list[str]) -> None:
    warnings.simplefilter("ignore")
    store = f"file://{directory}/store"
    dist.init_process_group("gloo", store, rank=rank, world_size=world, timeout=timedelta(seconds=60))
    for name in names:
        truth = LAYOUTS[name](f"{directory}/{name}")
        if rank == 0:
            torch.save(truth, f"{directory}/{name}.pth")
        dist.barrier()
    dist.destroy_process_group()


def forked(rank: int, world: int, directory: Path, names: Iterable[str]) -> int:
    """Returns the process id of one of the processes; it has all that this one imported, which takes seconds."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        log = os.open(directory / f"said{rank}", os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.stdout, sys.stderr = (os.fdopen(fd, "w", 1, closefd=False) for fd in (1, 2))  # pytest has its own
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        torch.set_num_threads(1)
        main(rank, world, str(directory), list(names))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def spawn(world: int, directory: Path, names: Iterable[str], limit: float) -> None:
    """Runs ``world`` processes, which write these layouts. Raises: AssertionError if one fails or all take too long."""
    running = [forked(rank, world, directory, names) for rank in range(world)]
    end = time.monotonic() + limit
    try:
        while running:
            process, status = os.waitpid(running[0], os.WNOHANG)
            if process:
                del running[0]
                assert status == 0, [path.read_text()[-3000:] for path in sorted(directory.glob("said*"))]
            assert time.monotonic() < end, f"no end after {limit} s"
            time.sleep(0.01)
    finally:
        for process in running:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
