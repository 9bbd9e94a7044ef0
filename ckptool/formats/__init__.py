"""What we read and write: one file per format, and here the list of them.

A format file has ``NAME``, ``matches(file)`` (by content, never by name) and ``read(file)``; one that can be
written also has ``SUFFIXES``, ``write(checkpoint, output, files, map_location)`` and ``check(checkpoint,
map_location)``, which raises what `write` would and writes nothing; ``npz`` has only those. A directory of shards is
read through `read`, and written by `sharded.write_directory`.
"""

from __future__ import annotations

import importlib
import os
from types import ModuleType

from ckptool.core.checkpoint import Checkpoint
from ckptool.errors import CkptoolError, UsageError
from ckptool.io.source import File

READERS = ("torch_zip", "torch_legacy", "safetensors", "torch_tar", "plain_pickle")
"""Modules of the single-file formats, in the order their marks are looked for."""

WRITERS = {
    "torch": ("torch_zip", (".pth", ".pt", ".bin", ".ckpt", ".pyth", ".pth.tar", ".pt.tar", ".tar")),
    "torch-legacy": ("torch_legacy", ()),
    "safetensors": ("safetensors", (".safetensors",)),
    "npz": ("npz", (".npz",)),
}
"""What a user calls a single-file format -> its module, and the suffixes that stand for it (none: only its name)."""

SHARDED = "sharded"
"""What a user calls the directory that `sharded.write_directory` writes."""

SHARD_SIZE = 5_000_000_000
"""Bytes of tensors in one shard unless another limit is given: huggingface_hub's default."""

SUFFIXES = tuple(suffix for _, suffixes in WRITERS.values() for suffix in suffixes)
"""All suffixes that stand for a format when writing."""


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"ckptool.formats.{name}")


def read(path: str) -> Checkpoint:
    """Returns the checkpoint at a path: a file, an index, or a directory; headers only. Raises: CkptoolError."""
    if os.path.isdir(path):
        found = _module("sharded").find(path)
        return read(str(found))
    with File(path) as file:
        try:
            return _read_file(file)
        except CkptoolError as error:
            error.path = error.path or path
            raise


def _read_file(file: File) -> Checkpoint:
    if ".index" in os.path.basename(file.path):  # all that may match have it in their names: saves the import
        sharded = _module("sharded")
        if sharded.matches(file):
            return sharded.read(file, read)  # type: ignore[no-any-return]
    for name in READERS:
        module = _module(name)
        if module.matches(file):
            return module.read(file)  # type: ignore[no-any-return]
    _module("unknown").refuse(file)
    raise AssertionError("refuse always raises")


def is_sharded(name: str | None) -> bool:
    """Returns whether a user's name for a format means a directory of shards. Raises: UsageError if unknown."""
    if name is not None and name != SHARDED and name not in WRITERS:
        raise UsageError(f"no format {name!r} can be written; there are {', '.join([*WRITERS, SHARDED])}")
    return name == SHARDED


def writer(path: str, name: str | None = None) -> ModuleType:
    """Returns the format module that a user's ``name`` for it, or else a path's suffix, means. Raises: UsageError."""
    if name is not None:
        if name not in WRITERS:
            raise UsageError(f"no format {name!r} can be written; known: {', '.join(WRITERS)}")
        return _module(WRITERS[name][0])
    for module, suffixes in WRITERS.values():
        if path.lower().endswith(suffixes):
            return _module(module)
    known = ", ".join(suffix for _, suffixes in WRITERS.values() for suffix in suffixes)
    raise UsageError(f"no format has this suffix; known: {known}", path)
