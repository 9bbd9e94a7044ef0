"""The same tensors in every format that is read, each as its own library writes it, or as nearly as can be."""

from __future__ import annotations

import io
import json
import pickle
import struct
import tarfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from makers import arrays as numpy_files
from makers import directories, files, zero
from safetensors.torch import save as safetensors_save

import ckptool
from ckptool import formats

MASTER = (torch.float32, torch.float64)

Tree = dict[str, Any]
"""Tensors by their keys; of formats that are pickles, any objects."""


def on_disk(path: Path, tree: Tree) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(tree, path)


def halves(tree: Tree) -> tuple[Tree, Tree]:
    """All but the last, and the last."""
    last = list(tree)[-1]
    return {key: value for key, value in tree.items() if key != last}, {last: tree[last]}


def distributed_hf(path: Path, tree: Tree) -> None:
    shard = "shard-0000{}-model-00001-of-00001.safetensors"
    parts = [{key: (one, (0,) * one.ndim) for key, one in half.items()} for half in halves(tree)]
    directories.hugging_face(path, {shard.format(number): part for number, part in enumerate(parts, 1)})


def deepspeed(path: Path, tree: Tree) -> None:
    first = {id(value): key for key, value in reversed(tree.items())}
    shared = {key: first[id(value)] for key, value in tree.items() if first[id(value)] != key}
    own = {key: value for key, value in tree.items() if key not in shared}
    weights = {key: value for key, value in own.items() if getattr(value, "dtype", None) in MASTER}
    buffers = {key: value for key, value in own.items() if key not in weights}
    dtype = next(iter(weights.values())).dtype
    zero.zero(path, [weights], stage=2, world=1, dtype=dtype, buffers=buffers, shared=shared)


def tar(path: Path, tree: Tree) -> None:
    """The layout of 2016 is written by no torch of today; objects are in the pickle, each tensor has its storage."""

    def pickled(*items: Any) -> bytes:
        return b"".join(pickle.dumps(item, 2) for item in items)

    def class_of(tensor: torch.Tensor, kind: str) -> Any:
        return getattr(torch, tensor.type().rpartition(".")[2].replace("Tensor", kind))

    tensors = {key: value for key, value in tree.items() if isinstance(value, torch.Tensor)}
    memory = {value.untyped_storage()._cdata: value for value in tensors.values()}
    storages, described = pickled(len(memory)), pickled(len(tensors))
    for key, value in memory.items():
        raw = value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        storages += pickled((key, "cpu", class_of(value, "Storage"))) + struct.pack("<q", value.numel()) + raw
    for number, value in enumerate(tensors.values()):
        described += pickled((number, value.untyped_storage()._cdata, class_of(value, "Tensor")))
        described += struct.pack("<i4x", value.ndim)
        described += struct.pack(f"<{2 * value.ndim}qq", *value.shape, *value.stride(), 0)

    class Pickler(pickle.Pickler):
        def persistent_id(self, item: Any) -> Any:
            return str(list(map(id, tensors.values())).index(id(item))) if isinstance(item, torch.Tensor) else None

    buffer = io.BytesIO()
    Pickler(buffer, 2).dump(tree)
    members = {"storages": storages + pickled([]), "tensors": described, "pickle": buffer.getvalue()}
    with tarfile.open(path, "w:", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in members.items():
            item = tarfile.TarInfo(name)
            item.size = len(data)
            archive.addfile(item, io.BytesIO(data))


class Net(torch.nn.Module):
    def __init__(self, tree: Tree) -> None:
        super().__init__()
        for key, value in tree.items():
            self.register_buffer(key, value)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1


def script(path: Path, tree: Tree) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.script(Net(tree)), path)


def exported(path: Path, tree: Tree) -> None:
    torch.export.save(torch.export.export(Net(tree), (torch.ones(2),)), path)


def package(path: Path, tree: Tree) -> None:
    with torch.package.PackageExporter(path) as exporter:
        exporter.extern("**")
        exporter.save_pickle("weights", "model.pkl", tree)


def bundle(path: Path, tree: Tree) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in (("policy.pth", tree), ("policy.optimizer.pth", {})):
            archive.writestr(name, files.saved(content))


def arrays(tree: Tree) -> dict[str, Any]:
    return {key: value.numpy() if isinstance(value, torch.Tensor) else value for key, value in tree.items()}


def npy(path: Path, tree: Tree) -> None:
    (array,) = arrays(tree).values()
    with path.open("wb") as file:
        np.save(file, array)


def npz(path: Path, tree: Tree) -> None:
    with path.open("wb") as file:
        np.savez(file, **arrays(tree))


def ranks(path: Path, tree: Tree) -> None:
    for rank in ("mp_rank_00", "mp_rank_01"):
        on_disk(path / rank / "model_optim_rng.pt", {"model": tree, "iteration": 1, "checkpoint_version": 3.0})


def consolidated(path: Path, tree: Tree) -> None:
    for rank in range(2):
        on_disk(path / f"consolidated.0{rank}.pth", tree)


def sharded(path: Path, tree: Tree) -> None:
    path.mkdir()
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    parts = dict(zip(names, halves(tree), strict=True))
    for name, part in parts.items():
        (path / name).write_bytes(safetensors_save(part))
    indexed(path / "model.safetensors.index.json", {key: name for name, part in parts.items() for key in part})


def sharded_bin(path: Path, tree: Tree) -> None:
    names = [f"pytorch_model-0000{number}-of-00002.bin" for number in (1, 2)]
    parts = dict(zip(names, halves(tree), strict=True))
    for name, part in parts.items():
        on_disk(path / name, part)
    where = {key: name for name, part in parts.items() for key in part if isinstance(part[key], torch.Tensor)}
    indexed(path / "pytorch_model.bin.index.json", where)


def indexed(path: Path, where: dict[str, str]) -> None:
    path.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}))


def lock(path: Path, tree: Tree) -> None:
    on_disk(path.with_suffix(".pth"), tree)
    opened = ckptool.open(path.with_suffix(".pth"))
    path.write_text(formats.lock_text(opened, opened.state_dict(), {}))
    path.with_suffix(".pth").unlink()


WRITERS: dict[str, Callable[[Path, Tree], Any]] = {
    "dcp": lambda path, tree: directories.distributed(path, tree, {}),
    "dcp-hf": distributed_hf,
    "deepspeed": deepspeed,
    "torch": on_disk,
    "torch-legacy": lambda path, tree: path.write_bytes(files.legacy(tree)),
    "safetensors": lambda path, tree: path.write_bytes(safetensors_save(tree)),
    "torch-tar": tar,
    "torchscript": script,
    "pt2": exported,
    "torch.package": package,
    "bundle": bundle,
    "npz": npz,
    "npy": npy,
    "gguf": lambda path, tree: path.write_bytes(numpy_files.in_gguf(tree)),
    "megatron": ranks,
    "consolidated": consolidated,
    "fsdp-ranks": directories.files_of_ranks,
    "sharded": sharded,
    "sharded-bin": sharded_bin,
    "lock": lock,
    "joblib": lambda path, tree: path.write_bytes(numpy_files.in_joblib(arrays(tree))),
    "pickle": lambda path, tree: path.write_bytes(pickle.dumps(tree, 4)),
}
"""By the name of the format's row."""

ENDINGS = {"safetensors": ".safetensors", "pt2": ".pt2", "lock": ".lock"}


def written(name: str, directory: Path, tree: Tree) -> Path:
    """Where these tensors were written in the format of that name."""
    path = directory / f"{name}{ENDINGS.get(name, '')}"
    WRITERS[name](path, tree)
    return path
