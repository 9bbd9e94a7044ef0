"""Hugging Face's sharded layout: files of tensors, and an index of which file holds which.

    model.safetensors.index.json     {"metadata": {"total_size": bytes, ...}, "weight_map": {tensor: file}}
    model-00001-of-00002.safetensors ...            (or pytorch_model-*.bin; diffusers variants: *.index.fp16.json)

The shards decide what is there, the index is advisory (transformers reads it so); where they contradict each
other it is said. Source: ``huggingface_hub/serialization/_torch.py``, ``transformers/modeling_utils.py``.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, NamedTuple

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


def matches(probe: Probe) -> bool:
    """Returns whether it is an index, JSON with a weight_map; or a directory with one, or with a file of weights."""
    if probe.is_directory:
        return find(probe.path, probe.names) is not None
    return INDEX.match(probe.name) is not None and probe.head.lstrip()[:1] == b"{"


def find(directory: str, names: Sequence[str]) -> str | None:
    """Returns the index, the single file or the directory below that a directory of weights is read by, if any.

    Raises: UnsupportedError if there are several, FormatError if a set of shards is there in part.
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
        held = [name for name in parts if _holds_weights(os.path.join(directory, name))]
        if len(held) == 1:
            return os.path.join(directory, held[0])
        raise UnsupportedError(f"a pipeline of several models: name one of {listed(held)}", directory)
    weights = [name for name in names if name.endswith((".safetensors", ".bin", ".pth", ".pt", ".ckpt"))]
    if len(weights) > 1:
        raise UnsupportedError(
            f"{len(weights)} files of weights and no index: name one of {listed(weights)}", directory
        )
    return os.path.join(directory, weights[0]) if weights else None


def _holds_weights(directory: str) -> bool:
    return any(INDEX.match(name) or name.endswith((".safetensors", ".bin")) for name in os.listdir(directory))


def _refuse_unfinished(directory: str, names: Sequence[str]) -> None:
    """Raises FormatError where shards have their names and their index has not: some may be old, and some not there."""
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
    """Returns one checkpoint of all shards, whose headers ``open_`` reads; of a directory, what `find` gives.

    Keys come in the order of the shards' names, then of each shard. Missing shards and tensors do not raise:
    `Checkpoint.problems` names them and `Checkpoint.broken` is set, so that only looking is possible.
    Raises: FormatError for an index that is none, or names a file outside its directory.
    """
    if probe.is_directory:
        return open_(str(find(probe.path, probe.names)))
    file = probe.file
    index = _index(file)
    weight_map: dict[str, str] = index.get("weight_map", index)
    directory = os.path.dirname(file.path)
    problems: list[str] = []
    tree: dict[str, TensorInfo] = {}
    where: dict[str, str] = {}
    names: dict[tuple[str, str], None] = {}
    said = {str(key): str(value) for key, value in (index.get("metadata") or {}).items()}
    metadata: dict[str, str] = {}
    missing, twice = [], []
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
        for key, tensor in part.state_dict().items():
            if key in tree:
                twice.append(f"{key} ({where[key]}, {shard})")
            else:
                tree[key], where[key] = tensor, shard
    absent = [key for key, shard in weight_map.items() if key not in tree and shard not in missing]
    lost = [key for key, shard in weight_map.items() if shard in missing]
    told = {tree[key].view for key in weight_map if key in tree}
    extra = [key for key, tensor in tree.items() if key not in weight_map and tensor.view not in told]
    moved = [key for key, shard in where.items() if key in weight_map and weight_map[key] != shard]
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
    """Returns what sorts names as people do: numbers by value, which is by length and then by digits."""
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


class Written(NamedTuple):
    """What became of a directory: what is left out, bytes of all files, and what else to know."""

    left_out: tuple[str, ...]
    nbytes: int
    notes: tuple[str, ...]


def write(
    checkpoint: Checkpoint,
    directory: str,
    files: Files,
    map_location: MapLocation | None = None,
    *,
    max_shard_size: int,
    force: bool = False,
    fsync: bool = True,
    verify: Callable[[list[str]], None] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Written:
    """Writes the state_dict at root as shards and their index, streaming; returns what became of it.

    ``max_shard_size`` counts bytes of tensors. The directory is made if absent (its parent is not). The files
    get their names when all are written, the index last; if anything fails none of them is left, nor a
    directory made for them, and what ``force`` had replaced by then is there again. Other files are not touched.
    ``verify`` is handed the paths of the finished shards before they get their names, and may raise; ``progress``
    is told the bytes as they are written.

    Killed while names are given, there is no index, and what was replaced lies beside as
    ``.NAME.xxxxxxxx.ckptool-old``: the next call for this directory takes it back before it begins. Of several
    calls at once each gives its names and takes back while the others wait, so the last one's set is whole.

    Raises: LossError naming every tensor safetensors cannot hold; OutputError if a file exists (without
    ``force``), or one that loaders would prefer to the index.
    """
    shards, said = _contents(checkpoint, max_shard_size)
    _recover(directory)
    _refuse_places(directory, shards, force)
    with _made(directory), ExitStack() as stack:

        def opened(name: str, run: str | None) -> Output:
            path = os.path.join(directory, name)
            return stack.enter_context(Output(path, force=force, fsync=fsync, run=run))

        index = opened(WRITTEN_INDEX, None) if WHOLE not in shards else None  # its lock is that of all shards
        outputs: list[Output] = []
        for name, (shard, metadata) in shards.items():
            output = opened(name, None if index is None else index.run)
            output.progress = progress
            outputs.append(output)
            safetensors_file.write(shard, metadata, output, files)
            output.readers = files.mode
            if index is not None:
                output.close()  # a process may have no more than a thousand files open
        files.check()
        written = [output.finished() for output in outputs]
        if index is not None:
            weight_map = {key: name for name, (shard, _) in shards.items() for key in shard}
            index.write(_index_text({"metadata": said, "weight_map": weight_map}))
            index.readers = files.mode
            index.finished()
        if verify is not None:
            verify(written)
        with locked(directory):  # another run's set comes before or after ours, never in between
            _refuse_places(directory, shards, force)
            before = stale(directory)
            commit_set(outputs if index is None else [*outputs, index], force)
            notes = left_beside(directory, before, shards)
    nbytes = sum(output.position for output in outputs) + (index.position if index is not None else 0)
    return Written(flat.left_out(checkpoint), nbytes, notes)


def prove(path: str) -> None:
    """Opens a shard with the reference library. Raises: FormatError if it refuses the file."""
    safetensors_file.prove(path)


def check(
    checkpoint: Checkpoint, directory: str, *, max_shard_size: int, force: bool = False
) -> tuple[tuple[str, ...], int]:
    """Returns what `write` would leave out, and how many bytes of shards it would write. Raises: as it."""
    shards, _ = _contents(checkpoint, max_shard_size)
    _refuse_places(directory, shards, force)
    sizes = [safetensors_file.begin(shard, metadata) for shard, metadata in shards.values()]
    return flat.left_out(checkpoint), sum(len(header) + nbytes for header, nbytes in sizes)


Shard = tuple[dict[str, TensorInfo], dict[str, str]]
"""What one file gets: tensors and metadata."""


def _contents(checkpoint: Checkpoint, max_shard_size: int) -> tuple[dict[str, Shard], dict[str, Any]]:
    """Returns {file name: what it gets} and the metadata of the index. Raises: LossError, UsageError."""
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


def _refuse_places(directory: str, shards: Mapping[str, Shard], force: bool) -> None:
    """Raises OutputError with every file that is in the way: what exists is known before hours of work."""
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
    """Makes a directory that is not there, and takes it away again if what is done in it fails."""
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
    """Ends what runs that were killed had begun in a directory: takes it back, and removes what they left."""
    real = os.path.realpath(directory)
    with locked(directory):  # two that take back at once, and a third that begins between, would mix their sets
        links = [name for name in names_in(directory) if is_ours(name)]
        targets = {os.path.realpath(os.path.join(directory, name)) for name in links}

        def meant(place: str) -> bool:
            parent, name = os.path.split(place)
            return place in targets or (parent == real and is_ours(name))

        last = os.path.realpath(os.path.join(directory, WRITTEN_INDEX))
        sweep({real, *map(os.path.dirname, targets)}, meant, last)


def stale(directory: str) -> set[str]:
    """Returns the shards that the index of a directory names, and the index; nothing where there is none."""
    place = os.path.join(directory, WRITTEN_INDEX)
    if not os.path.isfile(place):
        return set()
    try:
        with LocalFile(place) as file:
            index = _index(file)
    except CkptoolError:
        return {WRITTEN_INDEX}
    return {WRITTEN_INDEX, *index.get("weight_map", index).values()}


def left_beside(directory: str, before: set[str], shards: Collection[str]) -> tuple[str, ...]:
    """Returns a note on the files of an older index that still lie in a directory where other shards were written."""
    written = {*shards, *([] if WHOLE in shards else [WRITTEN_INDEX])}
    left = [name for name in before if name not in written and os.path.lexists(os.path.join(directory, name))]
    return (f"of the checkpoint that was there, not replaced: {listed(sorted(left))}",) if left else ()
