"""The smallest file of every format, and a name for bytes: what a fuzzer's input is written as.

An input is the bytes of a file, but for two kinds that would be lost on checksums or need neighbours: a bare pickle
is put into a zip archive as its data.pkl, and JSON is the index of two sound shards.
"""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures"

LEGACY = b"\x80\x02\x8a\x0a"
"""What torch's legacy format begins with; another pickle is a tree."""

INDEX = "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def tree() -> dict[str, Any]:
    """A tree with a little of everything that all versions of torch write."""
    base = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    weights = OrderedDict(weight=base, bias=base[0], turned=base.t(), count=torch.tensor(7))
    return {"epoch": 3, "state_dict": weights, "note": "ü", "lr": [0.1, (1, None)]}


def torch_zip() -> bytes:
    made = io.BytesIO()
    torch.save(tree(), made)
    return made.getvalue()


def torch_legacy() -> bytes:
    made = io.BytesIO()
    torch.save(tree(), made, _use_new_zipfile_serialization=False)
    return made.getvalue()


def deflated() -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(torch_zip())) as old, zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(zipfile.ZipInfo(name), old.read(name), zipfile.ZIP_DEFLATED)
    return made.getvalue()


def safetensors() -> bytes:
    tensors = {"a": torch.arange(4.0).reshape(2, 2), "b": torch.tensor([1, 2], dtype=torch.int16)}
    return save(tensors, {"format": "pt", "tied": "a"})


def torch_tar() -> bytes:
    """The fixture of 2016 without the padding that tar puts at its end."""
    made = io.BytesIO()
    with tarfile.open(FIXTURES / "tar_2016.pth") as old, tarfile.open(fileobj=made, mode="w") as new:
        for item in old:
            new.addfile(item, old.extractfile(item))
    return made.getvalue()[: made.tell()].rstrip(b"\0") + bytes(1024)


def index() -> bytes:
    metadata = {"total_size": 24, "lm_head": "a"}
    return json.dumps({"metadata": metadata, "weight_map": {"a": SHARDS[0], "b": SHARDS[1]}}).encode()


def pickled() -> bytes:
    with zipfile.ZipFile(io.BytesIO(torch_zip())) as archive:
        return archive.read("archive/data.pkl")


def npz() -> bytes:
    made = io.BytesIO()
    np.savez(made, a=np.arange(6.0).reshape(2, 3), b=np.array([1, 2], dtype=">i2"))
    return made.getvalue()


def npy() -> bytes:
    made = io.BytesIO()
    np.save(made, np.asfortranarray(np.arange(6, dtype="<f4").reshape(2, 3)))
    return made.getvalue()


SAMPLES = {
    "zip": torch_zip, "deflated": deflated, "legacy": torch_legacy, "tar": torch_tar, "safetensors": safetensors,
    "index": index, "pickle": pickled, "npz": npz, "npy": npy,
}  # fmt: skip
"""Kinds of input -> what makes a sound one."""


def place(data: bytes, directory: Path) -> Path:
    """Writes an input into an empty directory; returns the checkpoint's path."""
    if data.lstrip()[:1] == b"{":
        for name, key in zip(SHARDS, "ab", strict=True):
            (directory / name).write_bytes(save({key: torch.arange(3.0)}, {"format": "pt"}))
        path = directory / INDEX
    elif data[:1] == b"\x80" and not data.startswith(LEGACY):
        path = directory / "pickle.pth"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", data)
            archive.writestr("archive/byteorder", "little")
            archive.writestr("archive/data/0", torch.arange(6.0).numpy().tobytes())
            archive.writestr("archive/data/1", torch.tensor(7).numpy().tobytes())
            archive.writestr("archive/version", "3\n")
        return path
    else:
        path = directory / "input.pth"
    path.write_bytes(data)
    return path
