"""All fixtures, and what torch and safetensors read in them; and the samples of other people's tools."""

from __future__ import annotations

import functools
import io
import json
import math
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracles import FIXTURES, numbers, torch_load
from safetensors.torch import load_file

TORCH = sorted(path.name for path in FIXTURES.iterdir() if path.suffix in (".pth", ".ckpt"))
# torch.load gives a named part of a storage as another storage object; test_torch_tar.py looks at its memory.
SAME_MEMORY = [name for name in TORCH if name != "tar_2016.pth"]
SAFETENSORS = sorted(path.name for path in FIXTURES.glob("*.safetensors"))
DISTRIBUTED = ["dcp", "dcp_hf"]
PARTITIONED = ["deepspeed"]
JOINED = ["fsdp_ranks"]
SHARDED = ["sharded", "sharded_bin"]
RANKS = ["megatron", "consolidated"]  # listed only: without rules nothing is written
NUMPY = ["array.npy", "arrays.npz"]
EVERY = [
    *TORCH,
    "malicious.pt",
    "script.pt",
    "exported.pt2",
    "package.pt",
    *SAFETENSORS,
    *SHARDED,
    *DISTRIBUTED,
    *PARTITIONED,
    *JOINED,
    *NUMPY,
    "dense.gguf",
    "detectron2.pkl",
    "agent.zip",
    "arrays.joblib",
]

LIKE_OTHERS = (
    "resnet_122.pth", "resnet_ddp.pth", "resnet_new.pth", "resnet_nested.pth", "ema.pth", "leaves.pth",
    "lightning.ckpt", "protocol4.pth", "malicious.pt", "resnet_old.safetensors", "dtypes.safetensors", "sharded_bin",
    "array.npy",
)  # fmt: skip
"""Fixtures whose weights are of the same kinds as another's, from a container of which another is here too."""

OF_EVERY_KIND = [pytest.param(name, marks=[pytest.mark.slow] if name in LIKE_OTHERS else []) for name in EVERY]

# What safetensors has no place for; every other fixture must be writable.
NOT_IN_SAFETENSORS = {
    "dtypes.pth": {"complex128", "complex32", "bits8", "bits16", "bits1x8", "bits2x4", "bits4x2"},
    "composite.pth": {"quantized", "quantized_channel", "coo", "csr", "nested", "jagged", "meta"},
    "conj_neg.pth": {"conj128"},
}


def others(*formats: str) -> list[Any]:
    """Returns the (path, expected content) of the samples of tools other than torch.save in formats that begin so."""
    places = [folder for folder in (SAMPLES, GENUINE) if (folder / "expected.json").exists()]
    return [
        pytest.param(folder / name, sample, id=name)
        for folder in places
        for name, sample in json.loads((folder / "expected.json").read_text())["samples"].items()
        if sample["format"].startswith(formats)
    ]


def training() -> dict[str, Any]:
    """Returns a model's state_dict, that of an optimizer after a step, and a number."""
    torch.manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.25)
    model(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    return {"model": model.state_dict(), "optim": optimizer.state_dict(), "epoch": 3}


def at_root(loaded: Any, root: tuple[Any, ...]) -> Any:
    for step in root:
        loaded = loaded[step]
    return loaded.state_dict() if isinstance(loaded, torch.nn.Module) else loaded


def truth(name: str) -> dict[str, torch.Tensor]:
    """The weights of a fixture as torch or safetensors reads them, without ckptool; its tensors are read once."""
    return dict(_truth(name))


@functools.cache
def _truth(name: str) -> dict[str, torch.Tensor]:
    path = FIXTURES / name
    if name.endswith(".safetensors"):
        return load_file(path)
    if name in DISTRIBUTED:
        return dict(from_dcp(path))
    if name in PARTITIONED:
        return zero_to_fp32(path)
    if name in JOINED:
        from makers.directories import fsdp_tensors

        return fsdp_tensors()
    if name in SHARDED:
        tensors: dict[str, torch.Tensor] = {}
        for shard in sorted([*path.glob("*.safetensors"), *path.glob("*.bin")]):
            tensors |= load_file(shard) if shard.suffix == ".safetensors" else torch.load(shard)
        if name == "sharded":
            tensors["lm_head.weight"] = tensors["model.embed.weight"].detach()  # its index says so
        return tensors
    if name == "resnet_module.pth":
        return module_truth()
    if name == "dense.gguf":
        return gguf_truth()
    if name == "script.pt":
        return dict(torch.jit.load(path).state_dict(keep_vars=True))
    if name == "exported.pt2":
        return dict(torch.export.load(path).state_dict)
    if name == "arrays.joblib":
        from makers.arrays import joblib_arrays

        return {key: numbers(one) for key, one in joblib_arrays().items()}
    if name == "agent.zip":
        with zipfile.ZipFile(path) as archive:
            return dict(torch.load(io.BytesIO(archive.read("policy.pth"))))
    if name == "package.pt":
        return torch.package.PackageImporter(path).load_pickle("weights", "model.pkl")["state_dict"]
    if name == "malicious.pt":  # torch.load would run it
        with zipfile.ZipFile(path) as archive:
            return {
                "weight": torch.frombuffer(bytearray(archive.read("archive/data/0")), dtype=torch.float32).view(2, 2)
            }
    if name in NUMPY:
        loaded = np.load(path)
        arrays = dict(loaded) if name.endswith(".npz") else {path.stem: loaded}
        native = {
            key: one if one.dtype.isnative else one.astype(one.dtype.newbyteorder()) for key, one in arrays.items()
        }
        return {key: torch.from_numpy(one) for key, one in native.items()}
    loaded = pickle.loads(path.read_bytes()) if name == "detectron2.pkl" else torch_load(path)
    for step in ("state_dict", "model"):
        loaded = loaded.get(step, loaded)
    return {key: made for key, made in tensors_of(loaded).items() if isinstance(made, torch.Tensor)}


def from_dcp(path: Path) -> Any:
    """The tree that torch makes of a distributed checkpoint, in its own files or in Hugging Face's."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    shards = sorted(path.glob("*.safetensors"))
    reader = dcp.HuggingFaceStorageReader(str(path)) if shards else dcp.FileSystemReader(path)
    tree: dict[str, Any] = {}
    _load_state_dict(tree, storage_reader=reader, planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    shards.sort(key=lambda shard: shard.name.partition("-model-")[2])  # torch takes them as the directory lists them
    keys = dict.fromkeys(key for shard in shards for key in load_file(shard))
    return {key: tree[key] for key in keys} if shards else tree


def zero_to_fp32(directory: Path) -> dict[str, torch.Tensor]:
    """What DeepSpeed's script of that name makes of a checkpoint, by its documented algorithm; in the model's order.

    And the parameters that it loses, frozen ones under ZeRO-1, which ``module`` has.
    """

    def loaded(pattern: str) -> list[Any]:
        paths = sorted(place.glob(pattern), key=lambda path: [int(n) for n in re.findall(r"\d+", path.name)])
        return [torch.load(path, weights_only=False) for path in paths]

    place = directory / (directory / "latest").read_text().strip()
    models, optims = loaded("*_model_states.pt"), [one["optimizer_state_dict"] for one in loaded("*_optim_states.pt")]
    first, world = models[0], len(optims)
    module, groups = first["module"], first["param_shapes"]
    found = {name: module[name] for name in first["buffer_names"]}
    found = {name: value.float() if value.is_floating_point() else value for name, value in found.items()}
    frozen = first["frozen_param_shapes"] or {}
    if "fp32_flat_groups" in optims[0]:
        for name, shape in frozen.items():
            whole = torch.cat([model["frozen_param_fragments"][name] for model in models])
            found[name] = whole[: shape.numel()].view(shape).clone()
        flats, offset = [torch.cat(optim["fp32_flat_groups"]) for optim in optims], 0
        for name, shape in ((name, shape) for group in groups for name, shape in group.items()):
            size = math.ceil(shape.numel() / world)
            whole = torch.cat([flat[offset : offset + size] for flat in flats])
            found[name], offset = whole[: shape.numel()].view(shape).clone(), offset + size
    else:
        found |= {name: first["frozen_param_fragments"][name] for name in frozen}
        for number, group in enumerate(groups):
            flat = torch.cat([optim["single_partition_of_fp32_groups"][number] for optim in optims])
            paddings, offset = optims[0].get("param_alignment_paddings"), 0
            for index, (name, shape) in enumerate(group.items()):
                found[name] = flat[offset : offset + shape.numel()].view(shape).clone()
                offset += shape.numel() + (paddings[number][index] if paddings else 0)
    found |= {alias: found[name] for alias, name in first["shared_params"].items() if name in found}
    return {name: found.get(name, value) for name, value in module.items()}


def tensors_of(loaded: dict[str, Any]) -> dict[str, Any]:
    """What was loaded, with a tensor for every array of numbers."""
    return {key: numbers(value) if isinstance(value, np.ndarray) else value for key, value in loaded.items()}


def module_truth() -> dict[str, torch.Tensor]:
    from makers.models import resnet

    return resnet(4, 20).state_dict()


def gguf_truth() -> dict[str, torch.Tensor]:
    from makers.arrays import gguf_tensors

    return gguf_tensors()


# --- other people's files ---------------------------------------------------------------------------------------------

SAMPLES = Path(__file__).resolve().parents[2] / "shared" / "samples"
GENUINE = SAMPLES.parent / "genuine"
FOLDERS = [folder for folder in (FIXTURES, SAMPLES) if (folder / "expected.json").exists()]
"""Where files lie of which `expected.json` says what is in them: ours, and many more where they are beside us."""

EXPECTED: dict[str, Any] = {}
PLACES: dict[str, Path] = {}
for folder in FOLDERS:
    listed = json.loads((folder / "expected.json").read_text())["samples"]
    EXPECTED |= listed
    PLACES |= {name: folder / name for name in listed}

READ = (
    "torch-zip", "torch-legacy", "torch-tar", "safetensors", "hf-sharded", "pickle", "torchscript", "pt2",
    "torch.package", "megatron",
)  # fmt: skip
GOOD = [name for name, sample in EXPECTED.items() if sample["format"] in READ and not sample.get("invalid")]
BAD = [name for name, sample in EXPECTED.items() if sample["format"] == "bad" or sample.get("invalid")]
MALICIOUS = [name for name in EXPECTED if name.endswith("malicious.pt")]  # torch.load would run them
VERSIONS = {
    name: sample["metadata"] for name, sample in EXPECTED.items() if name.startswith("module") and "metadata" in sample
}
listed = json.loads((FIXTURES / "expected.json").read_text())["versions"]
VERSIONS |= listed
PLACES |= {name: FIXTURES / name for name in listed}
