"""Files that carry a checkpoint's name and are none: each is called by its own."""

from __future__ import annotations

from typing import NoReturn

from ckptool.errors import FormatError, UnsupportedError
from ckptool.io.source import File


def refuse(file: File) -> NoReturn:
    """Raises the error that says what the file is instead of a checkpoint."""
    head = file.read(0, min(file.size, 512))
    text = head.lstrip().lower()
    if not head:
        raise FormatError("an empty file (0 bytes)", file.path)
    if head.startswith(b"version https://git-lfs"):
        raise FormatError("a Git LFS pointer, not the file itself: run `git lfs pull`", file.path)
    if text.startswith((b"<!doctype html", b"<html", b"<head", b"<?xml", b"<!--")):
        raise FormatError("an HTML or XML page, not a checkpoint: the download gave an error page", file.path)
    if head.startswith(b"PK\x05\x06"):
        raise FormatError("an empty zip archive", file.path)
    named = {
        b"GGUF": "a GGUF file",
        b"\x89HDF\r\n\x1a\n": "an HDF5 file (Keras .h5)",
        b"\x93NUMPY": "a NumPy array (.npy)",
        b"\x1f\x8b": "a gzip file: gunzip it first",
        b"BZh": "a bzip2 file: bunzip2 it first",
        b"\xfd7zXZ": "an xz file: unxz it first",
        b"\x28\xb5\x2f\xfd": "a zstd file: unzstd it first",
        b"Rar!": "a RAR archive: unpack it first",
        b"7z\xbc\xaf": "a 7-zip archive: unpack it first",
    }
    for magic, kind in named.items():
        if head.startswith(magic):
            raise UnsupportedError(f"{kind}; it is not a format ckptool reads", file.path)
    if head[4:8] in (b"ET12", b"TFL3"):
        raise UnsupportedError("an ExecuTorch or TFLite program; it is not a format ckptool reads", file.path)
    if file.size >= 8 and _is_huge_safetensors(head):
        raise FormatError("neither a torch file nor safetensors (as the latter its header would be absurdly long)")
    if text.startswith((b"{", b"[")):
        raise FormatError("a JSON file; an index must be named *.index.json and have a weight_map", file.path)
    raise FormatError("no checkpoint that ckptool knows: neither torch, safetensors nor an index", file.path)


def _is_huge_safetensors(head: bytes) -> bool:
    return int.from_bytes(head[:8], "little") > 100_000_000 and head[8:9] == b"{"
