"""Distributed checkpoints in Hugging Face's files: what torch's HuggingFaceStorageWriter wrote with save_distributed.

    shard-00001-model-00002-of-00003.safetensors      what process 1 had of the tensors of file 2, of 3

Each is a safetensors file whose ``__metadata__`` says where its parts of tensors begin (`safetensors_file.sharding`).
The size of a whole tensor is nowhere: it reaches as far as its parts. A process without anything to save has no file.
Source: ``hf_storage.py`` and ``_hf_utils.py`` of ``torch/distributed/checkpoint``, torch 2.13.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from itertools import islice
from typing import NamedTuple

from ckptool.core import aliases
from ckptool.core.checkpoint import Checkpoint
from ckptool.core.tensor import TensorInfo, chunks, is_countable
from ckptool.core.tree import brief
from ckptool.directories import sets
from ckptool.directories.names import SHARDED, sets_in
from ckptool.errors import CkptoolError, FormatError, IncompleteError, UnsupportedError, listed
from ckptool.formats.safetensors_file import OWN, sharding
from ckptool.io.files import Files, ahead, names_in
from ckptool.io.paths import dirname, join
from ckptool.io.probe import Probe
from ckptool.io.source import Section

LABEL = "dcp-hf"

Offsets = tuple[int, ...]


def matches(probe: Probe) -> bool:
    """Returns whether it is such a directory, or one of its files; a directory of a known loader's files is not."""
    if not probe.is_directory:
        return SHARDED.fullmatch(probe.name) is not None and not isinstance(probe.file, Section)
    return any(map(SHARDED.fullmatch, probe.names)) and not any(found.loader for found in sets_in(probe.names))


class _File(NamedTuple):
    """A file and the numbers in its name, in the order of reading."""

    number: int
    process: int
    of: int
    name: str


def read(probe: Probe, open_: Callable[..., Checkpoint]) -> Checkpoint:
    """Returns the checkpoint of all files in the directory; the header of each is read.

    If all files of a number are missing, `Checkpoint.broken` is set. Raises: IncompleteError if the parts of a tensor
    do not cover it; FormatError for files of several saves, or what is no shard; LimitError.
    """
    directory = probe.path if probe.is_directory else dirname(probe.path) or "."
    names = names_in(directory)
    matched = [one for one in map(SHARDED.fullmatch, names) if one]
    found = sorted(_File(int(one[2]), int(one[1]), int(one[3]), one[0]) for one in matched)
    if len(counts := {file.of for file in found}) > 1:
        raise FormatError(f"holds files of several saves, of {listed(sorted(counts))} files each: keep one", directory)
    parts: dict[str, dict[Offsets, TensorInfo]] = {}
    metadata: dict[str, str] = {}
    twice: dict[str, None] = {}
    differ: dict[str, None] = {}
    nbytes = 0
    ahead(join(directory, file.name) for file in found)
    with Files() as files:
        for file in found:
            path = join(directory, file.name)
            source = files.open(path)
            nbytes += source.size
            shard = open_(path, lambda _, source=source: Section(source, 0, source.size))
            metadata, left = aliases.joined(
                metadata, {name: text for name, text in shard.metadata.items() if name not in OWN}
            )
            differ.update(dict.fromkeys(left))
            for key, offsets in _offsets(shard, path).items():
                boxes = parts.setdefault(key, {})
                twice.update(dict.fromkeys([key] if offsets in boxes else []))
                boxes.setdefault(offsets, shard.tree[key])
    absent = [f"model-{number:05}-of-{file.of:05}" for number in _gaps({file.number for file in found}, file.of)]
    processes = {file.process for file in found}
    gaps = _gaps(processes, max(processes))
    tree = {}
    for key, boxes in parts.items():
        try:
            tree[key] = _joined(boxes)
        except CkptoolError as error:
            lost = f"; there is no file of process {listed(gaps, 5)}" if gaps else ""
            raise IncompleteError(f"{key}: {error.message}{lost}", directory) from error
    rest = sets.others(directory, names, {file.name for file in found})
    said = {
        f"put together from the files of {len(processes)} processes; the size of a tensor is in none of them, so "
        "nothing would say that those of the last processes are missing": found,
        f"no file of process {listed(gaps, 5)}: it had nothing to save, or its files are missing": gaps,
        f"saved by several processes, the first one's taken: {listed(twice)}": twice,
        f"metadata of which another file's was taken: {listed(differ)}": differ,
        f"also here, and not read: {listed(rest)}": rest,
    }
    return Checkpoint(
        tree,
        format=LABEL,
        url=join(directory, found[0].name),
        nbytes=nbytes,
        metadata=metadata,
        problems=(f"there is no file of {listed(absent, 5)}: what was in them is missing",) if absent else (),
        broken=bool(absent),
        notes=tuple(text for text, some in said.items() if some),
        files=tuple(file.name for file in found),
    )


def _offsets(shard: Checkpoint, path: str) -> dict[str, Offsets]:
    """Returns {tensor: the first index of its part} of a file; without DCP's entry all are whole, as in torch."""
    if shard.format != "safetensors":
        what = (
            "Python values before the tensors, as torch.save writes them"
            if shard.format == "torch-zip"
            else shard.format
        )
        raise UnsupportedError(f"holds {what}: torch reads no such file either; save tensors only", path)
    try:
        known = sharding(shard.metadata)
    except FormatError as error:
        error.path = path
        raise
    found = {key: (0,) * len(tensor.shape or ()) for key, tensor in shard.tree.items()} if known is None else known
    for key, tensor in shard.tree.items():
        if len(found.get(key, (-1,) * 99)) != len(tensor.shape or ()):
            raise FormatError(
                f"{key}: its DCP_SHARDING_INFO says {brief(found.get(key))} of a part of {brief(tensor.shape)}", path
            )
    return {key: found[key] for key in shard.tree}


def _gaps(there: Collection[int], last: int) -> list[int]:
    """Returns the first six of the numbers from 1 to ``last`` that are not there."""
    return list(islice((number for number in range(1, last + 1) if number not in there), 6))


def _joined(boxes: dict[Offsets, TensorInfo]) -> TensorInfo:
    """Returns the tensor that reaches as far as its parts. Raises: FormatError, IncompleteError."""
    first = next(iter(boxes.values()))
    ends = [[at + size for at, size in zip(offsets, part.shape or (), strict=False)] for offsets, part in boxes.items()]
    shape = tuple(map(max, zip(*ends, strict=False))) if first.shape else ()
    if len(boxes) == 1 and shape == first.shape:
        return first
    if not is_countable(shape):
        raise FormatError(f"its parts reach as far as {brief(shape)}: more elements than can be counted")
    return chunks(first.dtype, shape, [(offsets, part.shape or (), part) for offsets, part in boxes.items()])
