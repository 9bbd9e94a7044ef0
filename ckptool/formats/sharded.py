"""Hugging Face's sharded layout: files of tensors, and an index of which file holds which.

    model.safetensors.index.json     {"metadata": {"total_size": bytes, ...}, "weight_map": {tensor: file}}
    model-00001-of-00002.safetensors ...            (or pytorch_model-*.bin; diffusers variants: *.index.fp16.json)

The shards decide which tensors there are; the index is advisory, as in transformers. Contradictions are reported as
problems. Source: ``huggingface_hub/serialization/_torch.py``, ``transformers/modeling_utils.py``.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from ckptool.core import aliases
from ckptool.core.checkpoint import Checkpoint
from ckptool.core.tensor import TensorInfo
from ckptool.errors import (
    CkptoolError,
    FormatError,
    OutputError,
    UnsupportedError,
    UsageError,
    explain,
    listed,
)
from ckptool.formats import flat, safetensors_file
from ckptool.formats.layout import MapLocation
from ckptool.io.leftovers import held, leftovers, locked, sweep
from ckptool.io.output import EXISTS, Output, commit_set
from ckptool.io.probe import Probe
from ckptool.io.source import Files, LocalFile, Source, names_in
from ckptool.limits import MAX_INDEX

LABEL = "hf-sharded"

INDEX = re.compile(r".+\.index(\.[\w-]+)?\.json$")

SINGLE = ("model.safetensors", "pytorch_model.bin", "diffusion_pytorch_model.safetensors",
          "diffusion_pytorch_model.bin", "adapter_model.safetensors", "adapter_model.bin")  # fmt: skip
"""Names of an unsharded checkpoint, in the order Hugging Face's loaders try them."""

WHOLE = "model.safetensors"
SHARD = "model-{:05d}-of-{:05d}.safetensors"
WRITTEN_INDEX = "model.safetensors.index.json"
WRITTEN = re.compile(r"model(-\d{5,}-of-\d{5,})?\.safetensors(\.index\.json)?")
"""All names that `write` gives."""

Open = Callable[[str], Checkpoint]

prove = safetensors_file.prove


def matches(probe: Probe) -> bool:
    """Returns whether it is an index (a JSON object), or a directory with an index or a file of weights."""
    if probe.is_directory:
        return find(probe.path, probe.names) is not None
    return INDEX.match(probe.name) is not None and probe.head.lstrip()[:1] == b"{"


def find(directory: str, names: Sequence[str]) -> str | None:
    """Returns the path to open instead of a directory: an index, a file of weights or a subdirectory; None if none.

    Raises: UnsupportedError if there are several, FormatError if a set of shards is incomplete.
    """
    _refuse_unfinished(directory, names)
    indexes = [name for name in names if INDEX.match(name) and name != "model_index.json"]
    singles = [name for name in SINGLE if name in names]
    found = singles[:1] or [name for name in indexes if "safetensors" in name][:1] or indexes[:1]
    if singles and indexes and singles[0].split(".")[0] not in indexes[0]:
        raise UnsupportedError(f"holds {listed([*singles, *indexes])}: name one of them", directory)
    if found:
        return os.path.join(directory, found[0])
    if "model_index.json" in names:  # a diffusers pipeline: one directory per component
        parts = [name for name in names if os.path.isdir(os.path.join(directory, name))]
        parts = [name for name in parts if _holds_weights(os.path.join(directory, name))]
        if len(parts) == 1:
            return os.path.join(directory, parts[0])
        raise UnsupportedError(f"a pipeline of several models: name one of {listed(parts)}", directory)
    weights = [name for name in names if name.endswith((".safetensors", ".bin", ".pth", ".pt", ".ckpt"))]
    if len(weights) > 1:
        raise UnsupportedError(
            f"{len(weights)} files of weights and no index: name one of {listed(weights)}", directory
        )
    return os.path.join(directory, weights[0]) if weights else None


def _holds_weights(directory: str) -> bool:
    return any(INDEX.match(name) or name.endswith((".safetensors", ".bin")) for name in os.listdir(directory))


def _refuse_unfinished(directory: str, names: Sequence[str]) -> None:
    """Raises FormatError if shards were renamed but their index not yet: old and new shards may be mixed."""
    if WRITTEN_INDEX in names or WHOLE in names:
        return
    aside = leftovers(names, "old")
    begun = leftovers(names, "partial", of=WRITTEN_INDEX)
    if any(held(os.path.join(directory, name)) for name in begun):
        if aside or any(is_ours(name) for name in names):
            raise FormatError("another run is giving its files their names; try again", directory)
    elif aside:
        raise FormatError(
            f"a run that was replacing its files was killed; rename what was there back to its names "
            f"({listed(aside, 3)}), or write there again with --force",
            directory,
        )
    elif begun and any(is_ours(name) for name in names):
        raise FormatError("a run that was writing its files was killed; write there again", directory)


def read(probe: Probe, open_: Open) -> Checkpoint:
    """Returns one checkpoint of all shards, whose headers ``open_`` reads; for a directory, opens the path of `find`.

    Keys are in the order of the shards' names, then in that of each shard. Missing shards and tensors do not raise:
    `Checkpoint.problems` names them and `Checkpoint.broken` is set, so that only looking is possible.
    Raises: FormatError for a malformed index, or one that names a file outside its directory.
    """
    if probe.is_directory:
        return open_(str(find(probe.path, probe.names)))
    file = probe.file
    index = _index(file)
    weight_map: dict[str, str] = index.get("weight_map", index)
    directory = os.path.dirname(file.path)
    problems: list[str] = []
    tree: dict[str, TensorInfo] = {}
    shard_of: dict[str, str] = {}
    names: dict[tuple[str, str], None] = {}
    said = {str(key): str(value) for key, value in (index.get("metadata") or {}).items()}
    metadata: dict[str, str] = {}
    missing, twice, trailing = [], [], []
    nbytes = file.size
    for shard in sorted(set(weight_map.values()), key=_natural):
        path = os.path.join(directory, shard)
        if not os.path.lexists(path):
            missing.append(shard)
            continue
        part = open_(path)
        nbytes += part.nbytes
        names.update(dict.fromkeys(part.names))
        metadata = {**part.metadata, **metadata}
        trailing += [f"{shard}: {part.trailing}"] if part.trailing else []
        for key, tensor in part.state_dict().items():
            if key in tree:
                twice.append(f"{key} ({shard_of[key]}, {shard})")
            else:
                tree[key], shard_of[key] = tensor, shard
    absent = [key for key, shard in weight_map.items() if key not in tree and shard not in missing]
    lost = [key for key, shard in weight_map.items() if shard in missing]
    indexed = {tree[key].view for key in weight_map if key in tree}
    extra = [key for key, tensor in tree.items() if key not in weight_map and tensor.view not in indexed]
    moved = [key for key, shard in shard_of.items() if key in weight_map and weight_map[key] != shard]
    if missing:
        problems.append(f"missing shards: {listed(missing)}, and in them {listed(lost)}")
    if absent:
        problems.append(f"in the index and in no shard: {listed(absent)}")
    if twice:
        problems.append(f"in two shards: {listed(twice)}")
    if extra:
        problems.append(f"in a shard and not in the index: {listed(extra)}")
    if moved:
        problems.append(f"in another shard than the index says: {listed(moved)}")
    problems += _wrong_size(index, tree)
    return Checkpoint(
        aliases.restored(tree, said),
        format=LABEL,
        url=file.path,
        nbytes=nbytes,
        metadata={**metadata, **aliases.plain(said, tree)},
        names=tuple(names),
        problems=tuple(problems),
        broken=bool(missing or absent or twice),
        trailing="; ".join(trailing),
    )


def _index(file: Source) -> dict[str, Any]:
    if file.size > MAX_INDEX.now():
        raise MAX_INDEX.passed(f"an index of {file.size:,} bytes", file.size, file.path)
    try:
        index = json.loads(file.read(0, file.size))
    except RecursionError as error:
        raise FormatError("an index that is nested too deep", file.path) from error
    except ValueError as error:
        raise FormatError(f"an index that is no JSON: {error}", file.path) from error
    weight_map = index.get("weight_map", index) if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise FormatError("an index without a weight_map of tensor to file", file.path)
    if not isinstance(index.get("metadata") or {}, dict):
        raise FormatError("an index whose metadata is no object", file.path)
    for shard in sorted(set(weight_map.values())):
        if os.path.basename(shard) != shard or shard in ("", ".", "..") or "\0" in shard or "\\" in shard:
            raise FormatError(f"its index names a file outside its directory: {shard!r}", file.path)
        if INDEX.match(shard) or os.path.isdir(os.path.join(os.path.dirname(file.path), shard)):
            raise FormatError(f"its index names something that is no shard: {shard!r}", file.path)
    return dict(index)


def _wrong_size(index: dict[str, Any], tree: dict[str, TensorInfo]) -> list[str]:
    total = (index.get("metadata") or {}).get("total_size")
    if total is None:
        return []
    single = {tensor.view: tensor.nbytes for tensor in tree.values()}
    each, stored = sum(tensor.nbytes for tensor in tree.values()), sum(single.values())
    return [] if total in (each, stored) else [f"total_size says {total}, the tensors have {stored} bytes"]


def _natural(name: str) -> list[Any]:
    """Returns a key for natural sorting: numbers by value, that is, by length and then by digits."""
    parts = re.split(r"(\d+)", name)
    digits = [part.lstrip("0") for part in parts[1::2]]
    return [
        *parts[:1],
        *(step for number, text in zip(digits, parts[2::2], strict=True) for step in ((len(number), number), text)),
    ]


def plan(tensors: Mapping[str, TensorInfo], max_shard_size: int) -> dict[str, dict[str, TensorInfo]]:
    """Returns {file name: its tensors}, in order: the files of weights that `write` would write.

    Shards are runs of the state_dict of at most ``max_shard_size`` bytes of tensors; a larger tensor has a shard
    of its own. Aliases of tied tensors are in none. One shard is `WHOLE`, and has no index. Raises: UsageError.
    """
    if max_shard_size <= 0:
        raise UsageError(f"a shard cannot have {max_shard_size} bytes at most")
    dropped = aliases.record(tensors)
    shards: list[dict[str, TensorInfo]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        if name in dropped:
            continue
        if shards[-1] and filled + tensor.nbytes > max_shard_size:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += tensor.nbytes
    if len(shards) == 1:
        return {WHOLE: shards[0]}
    return {SHARD.format(number, len(shards)): shard for number, shard in enumerate(shards, 1)}


def is_ours(name: str) -> bool:
    """Returns whether it is one of the names that `write` gives."""
    return WRITTEN.fullmatch(name) is not None


def write(
    checkpoint: Checkpoint,
    directory: str,
    files: Files,
    map_location: MapLocation | None = None,
    *,
    max_shard_size: int,
    force: bool = False,
    remove_stale: bool = False,
    fsync: bool = True,
    verify: Callable[[list[str]], None] | None = None,
    progress: Callable[[int], None] | None = None,
) -> tuple[tuple[str, ...], int, tuple[str, ...]]:
    """Writes the state_dict at root as shards and their index, streaming.

    Returns what was left out, the bytes of all files, and notes.

    ``max_shard_size`` counts bytes of tensors. The directory is made if absent (its parent is not). All files are
    written to staging files and then renamed, the index last. On failure they are removed, with a directory made for
    them, and files replaced by ``force`` are restored. ``remove_stale`` then removes the old index and the shards in it
    that have none of the new names. Other files are not touched. ``verify`` is called with the paths of the finished
    staging files of the shards, and may raise; ``progress`` with numbers of bytes written.

    If the process is killed during the renames, there is no index, and replaced files are kept as
    ``.NAME.xxxxxxxx.ckptool-old``: the next call for this directory restores them before it begins. A lock lets one
    process at a time rename or restore, so of concurrent calls the last one's set is complete.

    Raises: LossError naming every tensor safetensors cannot hold; OutputError if a file exists (without
    ``force``), or if the directory has a file that loaders prefer to the index.
    """
    shards, said = _contents(checkpoint, max_shard_size)
    _recover(directory)
    _refuse_existing(directory, shards, force)
    with _made(directory), ExitStack() as stack:

        def opened(name: str, run: str | None) -> Output:
            path = os.path.join(directory, name)
            return stack.enter_context(Output(path, force=force, fsync=fsync, run=run))

        index = opened(WRITTEN_INDEX, None) if WHOLE not in shards else None  # its lock covers all shards
        outputs: list[Output] = []
        for name, (shard, metadata) in shards.items():
            output = opened(name, None if index is None else index.run)
            output.progress = progress
            outputs.append(output)
            safetensors_file.write(shard, metadata, output, files)
            output.readers = files.mode
            if index is not None:
                output.close()  # a process may have only some 1,000 files open
        files.check()
        written = [output.finished() for output in outputs]
        if index is not None:
            weight_map = {key: name for name, (shard, _) in shards.items() for key in shard}
            index.write(_index_text({"metadata": said, "weight_map": weight_map}))
            index.readers = files.mode
            index.finished()
        if verify is not None:
            verify(written)
        with locked(directory):  # so that sets of concurrent runs are never mixed
            _refuse_existing(directory, shards, force)
            before = stale(directory) - {*shards, *([] if index is None else [WRITTEN_INDEX])}
            commit_set(outputs if index is None else [*outputs, index], force)
            notes = _without(directory, before, remove_stale)
    nbytes = sum(output.position for output in outputs) + (index.position if index is not None else 0)
    return flat.left_out(checkpoint), nbytes, notes


def check(
    checkpoint: Checkpoint, directory: str, *, max_shard_size: int, force: bool = False
) -> tuple[tuple[str, ...], int]:
    """Returns what `write` would leave out, and how many bytes of shards it would write. Raises: as it."""
    shards, _ = _contents(checkpoint, max_shard_size)
    _refuse_existing(directory, shards, force)
    sizes = [safetensors_file.begin(shard, metadata) for shard, metadata in shards.values()]
    return flat.left_out(checkpoint), sum(len(header) + nbytes for header, nbytes in sizes)


Shard = tuple[dict[str, TensorInfo], dict[str, str]]
"""The contents of one file: tensors and metadata."""


def _contents(checkpoint: Checkpoint, max_shard_size: int) -> tuple[dict[str, Shard], dict[str, Any]]:
    """Returns {file name: contents} and the metadata of the index. Raises: LossError, UsageError."""
    tensors = checkpoint.state_dict()
    safetensors_file.refuse(tensors)
    dropped = aliases.record(tensors)
    planned = plan(tensors, max_shard_size)
    said: dict[str, Any] = dict(aliases.described(tensors, dropped))
    shards = {name: (shard, aliases.carried(checkpoint.metadata, shard)) for name, shard in planned.items()}
    if WHOLE in shards:
        safetensors_file.refuse_clashes(checkpoint.metadata, dropped)
        shards[WHOLE][1].update(said)
    else:
        said["total_size"] = sum(tensor.nbytes for shard in planned.values() for tensor in shard.values())
    return shards, said


def _refuse_existing(directory: str, shards: Mapping[str, Shard], force: bool) -> None:
    """Raises OutputError naming every file that exists already, before hours of work."""
    if WHOLE not in shards and os.path.lexists(os.path.join(directory, WHOLE)):
        raise OutputError(f"it holds {WHOLE}, which loaders prefer to an index: remove it first", directory)
    names = [*shards, *([] if WHOLE in shards else [WRITTEN_INDEX])]
    there = [name for name in names if os.path.lexists(os.path.join(directory, name))]
    if there and not force:
        raise OutputError(f"{listed(there)}: {EXISTS}", directory)


def _index_text(index: Mapping[str, Any]) -> bytes:
    return (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()


@contextmanager
def _made(directory: str) -> Iterator[None]:
    """Makes a directory if absent, and removes it again if the block fails."""
    try:
        os.mkdir(directory)
        made = True
    except FileExistsError:
        if not os.path.isdir(directory):
            raise OutputError("exists and is not a directory", directory) from None
        made = False
    except OSError as error:
        raise OutputError(f"cannot be made: {explain(error)}", directory) from error
    try:
        yield
    except BaseException:
        if made:
            with suppress(OSError):
                os.rmdir(directory)
        raise


def _recover(directory: str) -> None:
    """Undoes unfinished renames of killed runs in a directory, and removes their staging files."""
    real = os.path.realpath(directory)
    with locked(directory):  # concurrent recoveries, with a run beginning in between, would mix their sets
        links = [name for name in names_in(directory) if is_ours(name)]
        targets = {os.path.realpath(os.path.join(directory, name)) for name in links}

        def ours(path: str) -> bool:
            parent, name = os.path.split(path)
            return path in targets or (parent == real and is_ours(name))

        last = os.path.realpath(os.path.join(directory, WRITTEN_INDEX))
        sweep({real, *map(os.path.dirname, targets)}, ours, last)


def stale(directory: str) -> set[str]:
    """Returns the names of a directory's index and of the shards in it; empty without an index."""
    path = os.path.join(directory, WRITTEN_INDEX)
    if not os.path.isfile(path):
        return set()
    try:
        with LocalFile(path) as file:
            index = _index(file)
    except CkptoolError:
        return {WRITTEN_INDEX}
    return {WRITTEN_INDEX, *index.get("weight_map", index).values()}


def _without(directory: str, before: set[str], remove: bool) -> tuple[str, ...]:
    """Removes the files ``before`` of a replaced checkpoint if asked to; returns notes: what went and what is left.

    The new checkpoint is complete, and loaders prefer it to the old index: being killed in between does no harm.
    """
    there = sorted(name for name in before if os.path.lexists(os.path.join(directory, name)))
    for name in sorted(there, key=lambda name: name != WRITTEN_INDEX):  # no index of absent shards at any time
        if remove and is_ours(name):
            with suppress(OSError):  # then the note says that it is left
                os.unlink(os.path.join(directory, name))
    left = [name for name in there if os.path.lexists(os.path.join(directory, name))]
    gone = [name for name in there if name not in left]
    notes = {"removed": gone, "not replaced": left}
    return tuple(f"of the checkpoint that was there, {what}: {listed(names)}" for what, names in notes.items() if names)
