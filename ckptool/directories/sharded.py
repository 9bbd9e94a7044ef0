"""Hugging Face's sharded layout: files of tensors, and an index of which file holds which.

    model.safetensors.index.json     {"metadata": {"total_size": bytes, ...}, "weight_map": {tensor: file}}
    model-00001-of-00002.safetensors ...            (or pytorch_model-*.bin; diffusers variants: *.index.fp16.json)

The shards decide which tensors there are; the index is advisory, as in transformers. Contradictions are reported as
problems. Source: ``huggingface_hub/serialization/_torch.py``, ``transformers/modeling_utils.py``.
"""

from __future__ import annotations

import json
import os
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from ckptool.core import aliases
from ckptool.core.checkpoint import Checkpoint, plain
from ckptool.core.dtypes import DTYPES
from ckptool.core.keys import natural
from ckptool.core.tensor import TensorInfo
from ckptool.directories import deepspeed_files, sets
from ckptool.directories.names import INDEX, Names, named, output_names
from ckptool.errors import UsageError, listed
from ckptool.formats import safetensors_file
from ckptool.io.files import Files, ahead, exists
from ckptool.io.paths import basename, dirname, is_url, join
from ckptool.io.probe import Probe
from ckptool.io.source import Source
from ckptool.ranks import world as ranks
from ckptool.ranks.parts import box, is_divisible
from ckptool.ranks.plan import Division, Segment, boxes, edge

# Needed only to write, so imported by the functions that do.
if TYPE_CHECKING:
    from ckptool.directories.place import Place, Shared
    from ckptool.formats.layout import MapLocation
    from ckptool.io.output import Output
    from ckptool.io.targets import SetOptions

LABEL = "hf-sharded"

MODEL = Names("model")

Open = Callable[[str], Checkpoint]

Compare = Callable[[Mapping[Any, TensorInfo], Mapping[Any, TensorInfo]], None]


def matches(probe: Probe) -> bool:
    """Returns whether it is an index (a JSON object) or a directory."""
    return probe.is_directory or (INDEX.fullmatch(probe.name) is not None and probe.head.lstrip()[:1] == b"{")


def read(probe: Probe, open_: Open) -> Checkpoint | None:
    """Returns one checkpoint of all shards, whose headers ``open_`` reads; of a directory, what `sets.choose` names.

    Keys are in the order of the shards' names, then in that of each shard. Missing shards and tensors do not raise:
    `Checkpoint.problems` names them and `Checkpoint.broken` is set, so that only looking is possible.
    Raises: FormatError for a malformed index, or one that names a file outside its directory; as `sets.choose`.
    """
    if not probe.is_directory:
        return _joined(probe.file, open_)[0]
    choice = sets.choose(probe.path, probe.names)
    if choice is None:
        return None
    with Probe(join(probe.path, choice.name)) as inner:
        joined = not inner.is_directory and matches(inner)
        opened, used = _joined(inner.file, open_) if joined else (open_(inner.path), ())
    notes = sets.beside(probe.path, probe.names, choice, {choice.name, *used})
    return replace(opened, notes=(*opened.notes, *notes, *deepspeed_files.beside(probe.path, probe.names)))


def _joined(file: Source, open_: Open) -> tuple[Checkpoint, list[str]]:
    """Returns the checkpoint of an index, and the names of its shards."""
    index = sets.index_of(file)
    weight_map = sets.weight_map_of(index)
    directory = dirname(file.path)
    tree: dict[str, TensorInfo] = {}
    shard_of: dict[str, str] = {}
    names: dict[tuple[str, str], None] = {}
    said = {
        str(key): value if isinstance(value, str) else json.dumps(value)
        for key, value in (index.get("metadata") or {}).items()
    }
    metadata: dict[str, str] = {}
    differ: list[str] = []
    missing: list[str] = []
    twice: dict[str, list[str]] = {}
    trailing: list[str] = []
    nbytes = file.size
    shards = sorted(set(weight_map.values()), key=natural)
    ahead(join(directory, shard) for shard in shards)
    for shard in shards:
        path = join(directory, shard)
        if not exists(path):
            missing.append(shard)
            continue
        part = open_(path)
        nbytes += part.nbytes
        names.update(dict.fromkeys(part.names))
        metadata, other = aliases.joined(metadata, part.metadata)
        differ += [f"{shard}: {name}" for name in other]
        trailing += [f"{shard}: {part.trailing}"] if part.trailing else []
        for key, tensor in part.state_dict().items():
            if key in tree:
                twice.setdefault(key, [shard_of[key]]).append(shard)
                if weight_map.get(key) != shard:
                    continue
            tree[key], shard_of[key] = tensor, shard
    problems, broken = _contradictions(weight_map, tree, shard_of, missing, twice, directory)
    problems += _wrong_size(index, tree)
    lost = [f"metadata of which another shard's was taken: {listed(differ)}"] if differ else []
    opened = Checkpoint(
        aliases.restored(tree, said),
        format=LABEL,
        url=file.path,
        nbytes=nbytes,
        metadata={**metadata, **aliases.plain(said, tree)},
        names=tuple(names),
        problems=tuple(problems),
        broken=broken,
        trailing="; ".join(trailing),
        notes=(*aliases.doubts(tree, said), *lost),
        files=tuple(shard for shard in shards if shard not in missing),
    )
    return opened, shards


def _contradictions(
    weight_map: Mapping[str, str],
    tree: Mapping[str, TensorInfo],
    shard_of: Mapping[str, str],
    missing: Sequence[str],
    twice: Mapping[str, Sequence[str]],
    directory: str,
) -> tuple[list[str], bool]:
    """Returns (a line for each way in which shards and index contradict each other, whether tensors are missing).

    Of a tensor that is in ``twice`` several shards, the one in the shard that the index names was taken.
    """
    gone = set(missing)
    lost = [key for key, shard in weight_map.items() if shard in gone]
    absent = [key for key, shard in weight_map.items() if key not in tree and shard not in gone]
    indexed = {tree[key].view for key in weight_map if key in tree}
    extra = [key for key, tensor in tree.items() if key not in weight_map and tensor.view not in indexed]
    moved = [key for key, shard in shard_of.items() if key in weight_map and weight_map[key] != shard]
    links = [shard for shard in missing if os.path.islink(join(directory, shard))]
    settled, unsettled = [], []
    for key, shards in twice.items():
        kept = weight_map.get(key)
        if kept in shards:
            settled.append(f"{key} ({kept}, not {', '.join(shard for shard in shards if shard != kept)})")
        else:
            unsettled.append(f"{key} ({', '.join(shards)})")
    found = {
        f"missing shards: {listed(missing)}, and in them {listed(lost)}": missing,
        f"of these, links to nowhere: {listed(links)}": links,
        f"in the index and in no shard: {listed(absent)}": absent,
        f"in two shards: {listed(unsettled)}": unsettled,
        f"in two shards, taken from the one that the index names: {listed(settled)}": settled,
        f"in a shard and not in the index: {listed(extra)}": extra,
        f"in another shard than the index says: {listed(moved)}": moved,
    }
    return [text for text, keys in found.items() if keys], bool(missing or absent or unsettled)


def _wrong_size(index: dict[str, Any], tree: dict[str, TensorInfo]) -> list[str]:
    total = (index.get("metadata") or {}).get("total_size")
    if total is None:
        return []
    single = {tensor.view: tensor.nbytes for tensor in tree.values()}
    each, stored = sum(tensor.nbytes for tensor in tree.values()), sum(single.values())
    return [] if total in (each, stored) else [f"total_size says {total}, the tensors have {stored} bytes"]


def plan(tensors: Mapping[str, TensorInfo], max_shard_size: int, names: Names = MODEL) -> dict[str, Tensors]:
    """Returns {file name: its tensors}, in order: the files of weights that `write` would write.

    Shards are runs of the state_dict of at most ``max_shard_size`` bytes of tensors; a larger tensor has a shard
    of its own. Aliases of tied tensors are in none. In .bin files they are, and all tensors that share memory lie in
    the shard of the first of them. One shard is a whole file, and has no index. Raises: UsageError.
    """
    if max_shard_size <= 0:
        raise UsageError(f"a shard cannot have {max_shard_size} bytes at most")
    dropped = aliases.record(tensors) if names.kind == "safetensors" else {}
    shared: dict[int, Tensors] = {}
    shards: list[Tensors] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        if name in dropped:
            continue
        if names.kind == "bin" and (beside := shared.get(id(tensor.source))) is not None:
            beside[name] = tensor
            continue
        if shards[-1] and filled + tensor.nbytes > max_shard_size:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        shared[id(tensor.source)] = shards[-1]
        filled += tensor.nbytes
    if len(shards) == 1:
        return {names.whole: shards[0]}
    return {names.shard(number, len(shards)): shard for number, shard in enumerate(shards, 1)}


def names_for(checkpoint: Checkpoint, shard_name: str | None, kind: str) -> Names:
    """Returns the names of the files to write: of ``shard_name``, else those of the input's family.

    Raises: UsageError if ``shard_name`` cannot be the beginning of a file's name.
    """
    if shard_name is None:
        return output_names(basename(checkpoint.url), checkpoint.state_dict(), kind)
    return named(shard_name, kind)


def write(
    checkpoint: Checkpoint,
    directory: str,
    files: Files,
    map_location: MapLocation | None,
    open_: Open,
    options: SetOptions,
    *,
    compare: Compare | None = None,
    progress: Callable[[int], None] | None = None,
) -> tuple[tuple[str, ...], int, tuple[str, ...]]:
    """Writes the state_dict at root as shards and their index, streaming, as `Place.write` does.

    Returns what was left out, the bytes of all files of weights, and notes.

    ``options.kind`` is safetensors, or bin, which torch.save writes. Files of no set are not touched. ``compare`` is
    called with the tensors meant and those that ``open_`` reads in the finished staging files, and may raise;
    ``progress`` with numbers of bytes written.

    Raises: LossError naming every tensor that the files cannot hold; OutputError if a file exists (without
    ``force``), or if the directory has a set that would hide the new one from loaders, or be hidden by it.
    """
    from ckptool.directories.place import recover
    from ckptool.formats import torch_file

    names = names_for(checkpoint, options.shard_name, options.kind)
    shards, said = _contents(checkpoint, options.max_shard_size, names)
    divided = _Divided(shards, options.ranks) if options.ranks > 1 else None

    def prepare() -> Place:
        recover(directory)
        return _place(checkpoint, directory, names, shards, options)

    def written(name: str) -> Callable[[Output], None]:
        shard, metadata = shards[name]
        if options.kind == "bin":
            return lambda output: torch_file.write(shard, output, files, map_location)
        return lambda output: safetensors_file.write(shard, metadata, output, files)

    def index() -> bytes:
        weight_map = {key: name for name, (shard, _) in shards.items() for key in shard}
        return f"{json.dumps({'metadata': said, 'weight_map': weight_map}, indent=2, sort_keys=True)}\n".encode()

    def check(paths: dict[str, str]) -> None:
        if compare is None:
            return
        meant, found = checkpoint.state_dict(), Tensors()
        for name in shards:
            found |= open_(paths[name]).state_dict()
        dropped = aliases.record(meant).keys() - found.keys()  # ties are in the index
        compare({key: tensor for key, tensor in meant.items() if key not in dropped}, found)
        for name in shards if options.kind == "safetensors" and not is_url(directory) else ():
            safetensors_file.prove(paths[name])

    ends = names.whole not in shards
    if (world := ranks.current) is not None and divided is not None:
        shared = divided.shared(directory, [*shards, *([names.index] if ends else [])], ends, world.rank, files)

        def last(write: Callable[[], None]) -> bytes | None:
            world.together(write)
            return index() if ends else None

        nbytes, notes = shared.write(
            world, prepare, last, files, progress=progress, fsync=options.fsync,
            check=lambda paths: None if compare is None else compare(*divided.read_back(paths, world.rank, open_)),
        )  # fmt: skip
        return checkpoint.left_out(), nbytes, (divided.note, *notes)
    where = prepare()
    nbytes = where.write(
        {name: written(name) for name in shards}, index if ends else None, files, check=check, progress=progress
    )
    return checkpoint.left_out(), nbytes, where.notes()


class _Divided:
    """The bytes of safetensors files, divided over ranks: a cut is between files if one is near, else in a tensor."""

    def __init__(self, shards: Mapping[str, Shard], count: int) -> None:
        self.shards, self.names = shards, [*shards]
        self.headers: list[bytes] = []
        self.order: list[list[str]] = []
        """The names of each file's tensors in the order of their data."""
        self.begins: list[list[int]] = []
        """The first byte of each of these tensors, and the end of the file."""
        for shard, metadata in shards.values():
            header, _ = safetensors_file.begin(shard, metadata)
            order = safetensors_file.by_size(shard)
            self.headers.append(header)
            self.order.append(order)
            self.begins.append([*accumulate((shard[key].nbytes for key in order), initial=len(header))])
        self.division = Division([begins[-1] for begins in self.begins], count, self._cut)
        self.note = self.division.note("file")

    def _cut(self, unit: int, within: int, slack: int) -> int:
        """Returns where a file is cut (see `Snap`); if it can be, at a multiple of the pages of all systems."""
        begins, nbytes = self.begins[unit], self.begins[unit][-1]
        if min(within, nbytes - within) <= 4 * slack or within <= begins[0]:
            return edge(within, nbytes)
        at = round(within / PAGE) * PAGE if slack > PAGE else within
        number = bisect_right(begins, at) - 1
        tensor = self.shards[self.names[unit]][0][self.order[unit][number]]
        if is_divisible(tensor):
            return at - (at - begins[number]) % (DTYPES[tensor.dtype].bits // 8)
        return begins[number] + edge(at - begins[number], tensor.nbytes)

    def pieces(self, segment: Segment) -> Iterator[tuple[str, tuple[int, ...], TensorInfo]]:
        """Yields (key, its first index, tensor) of what a segment has of tensors, in order."""
        begins, order = self.begins[segment.unit], self.order[segment.unit]
        shard = self.shards[self.names[segment.unit]][0]
        for key, at, end in zip(order, begins, begins[1:], strict=False):
            tensor, low, high = shard[key], max(at, segment.begin), min(end, segment.end)
            if low < high or (at == end and segment.begin <= at < segment.end):
                if (low, high) == (at, end):
                    yield key, (), tensor
                    continue
                size = DTYPES[tensor.dtype].bits // 8
                for offsets, sizes in boxes(tensor.shape or (), (low - at) // size, (high - at) // size):
                    yield key, offsets, box(tensor, offsets, sizes)

    def shared(self, directory: str, new: list[str], ends: bool, rank: int, files: Files) -> Shared:
        """Returns what a rank writes."""
        from ckptool.directories.place import Shared
        from ckptool.values.blocks import runs

        parts: list[tuple[str, TensorInfo]] = []

        def content(segment: Segment) -> Callable[[Output], None]:
            def write(output: Output) -> None:
                mine = [(key, tensor) for key, _, tensor in self.pieces(segment)]
                parts.extend(mine)
                if segment.begin == 0:
                    output.write(self.headers[segment.unit])
                safetensors_file.put(runs(tensor for _, tensor in mine), output, files)

            return write

        segments = [*self.division.of(rank)]
        contents = {self.names[segment.unit]: content(segment) for segment in segments}
        begins = {self.names[segment.unit]: segment.begin for segment in segments}
        tensors = {key: tensor for shard, _ in self.shards.values() for key, tensor in shard.items()}
        return Shared(directory, new, ends, contents, begins, tensors, parts)

    def read_back(
        self, paths: Mapping[str, str], rank: int, open_: Open
    ) -> tuple[dict[tuple[Any, ...], TensorInfo], dict[tuple[Any, ...], TensorInfo]]:
        """Returns the tensors that a rank meant, and those that are read in the staging files, by key and index."""
        meant: dict[tuple[Any, ...], TensorInfo] = {}
        found: dict[tuple[Any, ...], TensorInfo] = {}
        for segment in self.division.of(rank):
            path = paths[self.names[segment.unit]]
            there = open_(path).state_dict()
            if segment.begin == 0:
                safetensors_file.prove(path)
            for key, offsets, tensor in self.pieces(segment):
                meant[key, *offsets] = tensor
                if key in there:
                    found[key, *offsets] = box(there[key], offsets, tensor.shape or ()) if offsets else there[key]
        return meant, found


PAGE = 1 << 16
"""Bytes of the largest page of a common system: two machines that write into one page of a file may lose bytes."""


def _place(checkpoint: Checkpoint, directory: str, names: Names, shards: Iterable[str], options: SetOptions) -> Place:
    from ckptool.directories.place import Place

    new = [*shards, *([] if names.whole in shards else [names.index])]
    return Place(checkpoint, directory, names, new, options)


def check(
    checkpoint: Checkpoint,
    directory: str,
    map_location: MapLocation | None,
    options: SetOptions,
) -> tuple[tuple[str, ...], int, tuple[str, ...]]:
    """Returns what `write` would leave out, how many bytes of shards it would write, and its notes. Raises: as it."""
    names = names_for(checkpoint, options.shard_name, options.kind)
    shards, _ = _contents(checkpoint, options.max_shard_size, names)
    notes = _place(checkpoint, directory, names, shards, options).notes()
    if options.ranks > 1:
        notes = (_Divided(shards, options.ranks).note, *notes)
    if options.kind == "bin":
        from ckptool.formats import torch_file

        return checkpoint.left_out(), sum(torch_file.check(shard, map_location) for shard, _ in shards.values()), notes
    sizes = [safetensors_file.begin(shard, metadata) for shard, metadata in shards.values()]
    return checkpoint.left_out(), sum(len(header) + nbytes for header, nbytes in sizes), notes


Tensors = dict[str, TensorInfo]

Shard = tuple[Tensors, dict[str, str]]
"""The contents of one file: tensors and metadata."""


def _contents(checkpoint: Checkpoint, max_shard_size: int, names: Names) -> tuple[dict[str, Shard], dict[str, Any]]:
    """Returns {file name: contents} and the metadata of the index. Raises: LossError, UsageError."""
    tensors = checkpoint.state_dict()
    if names.kind == "bin":
        from ckptool.formats import torch_file

        made = {id(tensor): plain(tensor) for tensor in tensors.values()}  # one object stays one
        tensors = {key: made[id(tensor)] for key, tensor in tensors.items()}
        torch_file.check(tensors)
        planned = plan(tensors, max_shard_size, names)
        stored = {tensor.view: tensor.nbytes for tensor in tensors.values()}
        in_order = aliases.ordered(tensors, _moved(tensors, planned))
        return {name: (shard, {}) for name, shard in planned.items()}, {**in_order, "total_size": sum(stored.values())}
    safetensors_file.refuse(tensors)
    dropped = aliases.record(tensors)
    planned = plan(tensors, max_shard_size, names)
    said: dict[str, Any] = dict(aliases.described(tensors, dropped))
    shards = {name: (shard, aliases.carried(checkpoint.metadata, shard)) for name, shard in planned.items()}
    if names.whole in shards:
        safetensors_file.refuse_clashes(checkpoint.metadata, dropped)
        shards[names.whole][1].update(said)
    else:
        said["total_size"] = sum(tensor.nbytes for shard in planned.values() for tensor in shard.values())
    return shards, said


def _moved(tensors: Iterable[str], planned: Mapping[str, Tensors]) -> set[str]:
    """Returns the names that lie in an earlier shard than a name before them."""
    number = {name: index for index, shard in enumerate(planned.values()) for name in shard}
    latest, moved = 0, set()
    for name in tensors:
        if number[name] < latest:
            moved.add(name)
        latest = max(latest, number[name])
    return moved
