"""What we read and write: one file per format, and here the list of them.

A format file has ``NAME``, ``matches(file)`` (by content, never by name) and ``read(file)``; one that can be
written also has ``SUFFIXES`` and ``write(checkpoint, output, files, map_location)``.
"""

from __future__ import annotations

import importlib
import os
from types import ModuleType

from ckptool.checkpoint import Checkpoint
from ckptool.errors import CkptoolError, UsageError
from ckptool.files import File

READERS = ("torch_zip", "torch_legacy", "safetensors", "torch_tar")
"""Modules of the single-file formats, in the order their marks are looked for."""

WRITERS = {
    "torch": ("torch_zip", (".pth", ".pt", ".bin", ".ckpt", ".pyth", ".pth.tar", ".pt.tar", ".tar")),
    "safetensors": ("safetensors", (".safetensors",)),
}
"""What a user calls a format -> its module, and the suffixes that stand for it."""


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
    sharded = _module("sharded")
    if sharded.matches(file):
        return sharded.read(file, read)  # type: ignore[no-any-return]
    for name in READERS:
        module = _module(name)
        if module.matches(file):
            return module.read(file)  # type: ignore[no-any-return]
    _module("impostors").refuse(file)
    raise AssertionError("refuse always raises")


def writer(path: str) -> ModuleType:
    """Returns the format module that a path's suffix stands for. Raises: UsageError."""
    for module, suffixes in WRITERS.values():
        if path.lower().endswith(suffixes):
            return _module(module)
    known = ", ".join(suffix for _, suffixes in WRITERS.values() for suffix in suffixes)
    raise UsageError(f"no format has this suffix; known: {known}", path)
