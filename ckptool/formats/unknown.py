"""Names the known file types and directory layouts that ckptool cannot read, for the error message."""

from __future__ import annotations

import re

from ckptool.errors import CkptoolError, FormatError, UnsupportedError
from ckptool.io.probe import Probe
from ckptool.io.source import Source
from ckptool.io.zip_read import archive_start, is_zip
from ckptool.pickling.streams import MAGICS

LAYOUTS = {
    r"\.metadata|.*\.distcp": "a torch.distributed checkpoint (DCP)",
    r"shard-\d+-.*": "a torch.distributed checkpoint in Hugging Face's files",
    r"latest_checkpointed_iteration\.txt": "a Megatron-LM checkpoint",
    r"latest|(bf16_)?zero_pp_rank_.*": "a DeepSpeed checkpoint",
    r"mp_rank_.*": "one iteration of a Megatron-LM or DeepSpeed checkpoint",
}
"""Patterns of file names in other tools' directories, which often hold weights too; the first match decides."""


MAGIC = {
    b"GGUF": "a GGUF file",
    b"\x89HDF\r\n\x1a\n": "an HDF5 file (Keras .h5)",
    b"\x1f\x8b": "a gzip file: gunzip it first",
    b"BZh": "a bzip2 file: bunzip2 it first",
    b"\xfd7zXZ": "an xz file: unxz it first",
    b"\x28\xb5\x2f\xfd": "a zstd file: unzstd it first",
    b"Rar!": "a RAR archive: unpack it first",
    b"7z\xbc\xaf": "a 7-zip archive: unpack it first",
}
"""The first bytes of known files."""


def following(file: Source, end: int) -> str:
    """Returns what follows the end of a file's content, for a note; looks at the first bytes only."""
    head = file.read(end, min(4096, file.size - end))
    kind = next((kind.partition(":")[0] for magic, kind in MAGIC.items() if head.startswith(magic)), "unknown bytes")
    if head.startswith((*MAGICS, b"PK\x03\x04")):
        kind = "another torch.save?"
    elif head[:1] == b"\x80" and head[1:2] in b"\2\3\4\5":
        kind = "a pickle?"
    elif not any(head):
        kind = "zeros, as padding"
    elif head.isascii() and head.decode("ascii").replace("\n", "").replace("\r", "").isprintable():
        kind = "text"
    how = f" `tail -c +{end + 1} FILE` gives them as a file" if kind.endswith("?") else ""
    return f"{file.size - end} bytes after the end, from byte {end} on, are not read: {kind}{how}"


def refuse_layout(probe: Probe) -> None:
    """Raises UnsupportedError for a directory that another tool has written."""
    for mark, kind in LAYOUTS.items():
        if any(re.fullmatch(mark, name, re.DOTALL) for name in probe.names):
            raise UnsupportedError(f"{kind}, which is not supported yet", probe.path)


def refusal(probe: Probe) -> CkptoolError:
    """Returns the error for an input of no known format, saying what it is if that is recognized."""
    if probe.is_directory:
        return FormatError("a directory without an index or a file of weights", probe.path)
    file, head = probe.file, probe.head
    if is_zip(file):
        return _archive(probe)
    text = head.lstrip().lower()
    if not head:
        return FormatError("an empty file (0 bytes)", file.path)
    if head.startswith(b"version https://git-lfs"):
        return FormatError("a Git LFS pointer, not the file itself: run `git lfs pull`", file.path)
    if text.startswith((b"<!doctype html", b"<html", b"<head", b"<?xml", b"<!--")):
        return FormatError("an HTML or XML page, not a checkpoint: the download gave an error page", file.path)
    if head.startswith(b"PK\x05\x06"):
        return FormatError("an empty zip archive", file.path)
    for magic, kind in MAGIC.items():
        if head.startswith(magic):
            return UnsupportedError(f"{kind}; it is not a format ckptool reads", file.path)
    if head[4:8] in (b"ET12", b"TFL3"):
        return UnsupportedError("an ExecuTorch or TFLite program; it is not a format ckptool reads", file.path)
    if file.size >= 8 and _is_huge_safetensors(head):
        return FormatError("neither a torch file nor safetensors (as the latter its header would be absurdly long)")
    if text.startswith((b"{", b"[")):
        return FormatError("a JSON file; an index must be named *.index.json and have a weight_map", file.path)
    unknown = "no checkpoint that ckptool knows: neither torch, safetensors nor an index"
    try:
        begins = archive_start(file)
    except FormatError:  # no zip archive in it
        return FormatError(unknown, file.path)
    what = f"; a zip archive begins at byte {begins}: `tail -c +{begins + 1} FILE` gives it as a file" if begins else ""
    return FormatError(f"{unknown}{what}", file.path)


def _archive(probe: Probe) -> CkptoolError:
    root = next(iter(probe.members), "").split("/", 1)[0]
    for kind, marks in {
        "a TorchScript archive (torch.jit.save)": (f"{root}/constants.pkl", f"{root}/model.json"),
        "a torch.export archive (.pt2)": (f"{root}/archive_format", "serialized_state_dict.pt"),
        "a torch.package archive": (f"{root}/.data/extern_modules",),
    }.items():
        if any(mark in probe.members for mark in marks):
            return UnsupportedError(f"{kind}, which is not supported yet", probe.path)
    return FormatError("a zip archive without data.pkl: not made by torch.save", probe.path)


def _is_huge_safetensors(head: bytes) -> bool:
    return int.from_bytes(head[:8], "little") > 100_000_000 and head[8:9] == b"{"
