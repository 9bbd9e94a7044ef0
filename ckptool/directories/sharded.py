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
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from typing import Any

from ckptool.core import aliases
from ckptool.core.checkpoint import Checkpoint
from ckptool.core.tensor import TensorInfo
from ckptool.directories import deepspeed_files, sets
from ckptool.directories.sets import INDEX, Names
from ckptool.errors import (
    CkptoolError,
    FormatError,
    OutputError,
    UsageError,
    explain,
    listed,
)
from ckptool.formats import safetensors_file
from ckptool.formats.layout import MapLocation
from ckptool.io.leftovers import locked, sweep
from ckptool.io.output import EXISTS, Output, commit_set
from ckptool.io.probe import Probe
from ckptool.io.source import Files, LocalFile, Source, names_in, same_file
from ckptool.limits import MAX_INDEX

LABEL = "hf-sharded"

MODEL = Names("model")

Open = Callable[[str], Checkpoint]

prove = safetensors_file.prove


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
    choice = sets.choose(probe.path, probe.names, shards_of)
    if choice is None:
        return None
    with Probe(os.path.join(probe.path, choice.name)) as inner:
        joined = not inner.is_directory and matches(inner)
        opened, used = _joined(inner.file, open_) if joined else (open_(inner.path), ())
    notes = sets.beside(probe.path, probe.names, choice, {choice.name, *used})
    return replace(opened, notes=(*opened.notes, *notes, *deepspeed_files.beside(probe.path, probe.names)))


def shards_of(path: str) -> set[str]:
    """Returns the files that the index at a path names. Raises: FormatError, LimitError, UnreadableError."""
    with LocalFile(path) as file:
        return set(_weight_map(_index(file)).values())


def _joined(file: Source, open_: Open) -> tuple[Checkpoint, list[str]]:
    """Returns the checkpoint of an index, and the names of its shards."""
    index = _index(file)
    weight_map = _weight_map(index)
    directory = os.path.dirname(file.path)
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
    shards = sorted(set(weight_map.values()), key=_natural)
    for shard in shards:
        path = os.path.join(directory, shard)
        if not os.path.exists(path):
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
    links = [shard for shard in missing if os.path.islink(os.path.join(directory, shard))]
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


def _weight_map(index: dict[str, Any]) -> dict[str, str]:
    """Returns {tensor: shard}; accelerate's index is this map itself."""
    weight_map: dict[str, str] = index.get("weight_map", index)
    return weight_map


def _index(file: Source) -> dict[str, Any]:
    if file.size > MAX_INDEX.now():
        raise MAX_INDEX.passed(f"an index of {file.size:,} bytes", file.size, file.path)
    try:
        index = json.loads(file.read(0, file.size))
    except RecursionError as error:
        raise FormatError("an index that is nested too deep", file.path) from error
    except ValueError as error:
        raise FormatError(f"an index that is no JSON: {error}", file.path) from error
    weight_map = _weight_map(index) if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise FormatError("an index without a weight_map of tensor to file", file.path)
    if not isinstance(index.get("metadata") or {}, dict):
        raise FormatError("an index whose metadata is no object", file.path)
    for shard in sorted(set(weight_map.values())):
        if os.path.basename(shard) != shard or shard in ("", ".", "..") or "\0" in shard or "\\" in shard:
            raise FormatError(f"its index names a file outside its directory: {shard!r}", file.path)
        if INDEX.fullmatch(shard) or os.path.isdir(os.path.join(os.path.dirname(file.path), shard)):
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


def plan(tensors: Mapping[str, TensorInfo], max_shard_size: int, names: Names = MODEL) -> dict[str, Tensors]:
    """Returns {file name: its tensors}, in order: the files of weights that `write` would write.

    Shards are runs of the state_dict of at most ``max_shard_size`` bytes of tensors; a larger tensor has a shard
    of its own. Aliases of tied tensors are in none. One shard is a whole file, and has no index. Raises: UsageError.
    """
    if max_shard_size <= 0:
        raise UsageError(f"a shard cannot have {max_shard_size} bytes at most")
    dropped = aliases.record(tensors)
    shards: list[Tensors] = [{}]
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
        return {names.whole: shards[0]}
    return {names.shard(number, len(shards)): shard for number, shard in enumerate(shards, 1)}


def names_for(checkpoint: Checkpoint, shard_name: str | None) -> Names:
    """Returns the names of the files to write: of ``shard_name``, else those of the input's family.

    Raises: UsageError if ``shard_name`` cannot be the beginning of a file's name.
    """
    if shard_name is None:
        return sets.output_names(os.path.basename(checkpoint.url), checkpoint.state_dict())
    return sets.named(shard_name)


def write(
    checkpoint: Checkpoint,
    directory: str,
    files: Files,
    map_location: MapLocation | None = None,
    *,
    max_shard_size: int,
    shard_name: str | None = None,
    with_files: bool = False,
    force: bool = False,
    in_place: bool = False,
    fsync: bool = True,
    verify: Callable[[list[str]], None] | None = None,
    progress: Callable[[int], None] | None = None,
) -> tuple[tuple[str, ...], int, tuple[str, ...]]:
    """Writes the state_dict at root as shards and their index, streaming.

    Returns what was left out, the bytes of all files of weights, and notes.

    ``max_shard_size`` counts bytes of tensors. The directory is made if absent (its parent is not). All files are
    written to staging files and then renamed, the index last. On failure they are removed, with a directory made for
    them, and files replaced by ``force`` are restored. ``force`` then removes what is left of a replaced set of
    the same names, ``in_place`` what is left of the input's. ``with_files`` copies the small files beside the input.
    Other files are not touched. ``verify`` is called with the paths of the finished staging files of the shards, and
    may raise; ``progress`` with numbers of bytes written.

    If the process is killed during the renames, there is no index, and replaced files are kept as
    ``.NAME.xxxxxxxx.ckptool-old``: the next call for this directory restores them before it begins. A lock lets one
    process at a time rename or restore, so of concurrent calls the last one's set is complete.

    Raises: LossError naming every tensor safetensors cannot hold; OutputError if a file exists (without
    ``force``), or if the directory has a set that would hide the new one from loaders, or be hidden by it.
    """
    names = names_for(checkpoint, shard_name)
    shards, said = _contents(checkpoint, max_shard_size, names)
    _recover(directory)
    place = _Place(checkpoint, directory, names, shards, force=force, in_place=in_place, with_files=with_files)
    with _made(directory), ExitStack() as stack:

        def opened(name: str, run: str | None) -> Output:
            path = os.path.join(directory, name)
            return stack.enter_context(Output(path, force=force, fsync=fsync, run=run))

        index = opened(names.index, None) if names.whole not in shards else None  # its lock covers all shards
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
            text = json.dumps({"metadata": said, "weight_map": weight_map}, indent=2, sort_keys=True)
            index.write(f"{text}\n".encode())
            index.readers = files.mode
            index.finished()
        if verify is not None:
            verify(written)
        with locked(directory):  # so that sets of concurrent runs are never mixed
            place.look()
            commit_set(outputs if index is None else [*outputs, index], force)
            place.clear()
        place.copy(fsync)
    nbytes = sum(output.position for output in outputs) + (index.position if index is not None else 0)
    return checkpoint.left_out(), nbytes, place.notes()


def check(
    checkpoint: Checkpoint,
    directory: str,
    *,
    max_shard_size: int,
    shard_name: str | None = None,
    with_files: bool = False,
    force: bool = False,
    in_place: bool = False,
) -> tuple[tuple[str, ...], int, tuple[str, ...]]:
    """Returns what `write` would leave out, how many bytes of shards it would write, and its notes. Raises: as it."""
    names = names_for(checkpoint, shard_name)
    shards, _ = _contents(checkpoint, max_shard_size, names)
    place = _Place(checkpoint, directory, names, shards, force=force, in_place=in_place, with_files=with_files)
    sizes = [safetensors_file.begin(shard, metadata) for shard, metadata in shards.values()]
    return checkpoint.left_out(), sum(len(header) + nbytes for header, nbytes in sizes), place.notes()


Tensors = dict[str, TensorInfo]

Shard = tuple[Tensors, dict[str, str]]
"""The contents of one file: tensors and metadata."""


def _contents(checkpoint: Checkpoint, max_shard_size: int, names: Names) -> tuple[dict[str, Shard], dict[str, Any]]:
    """Returns {file name: contents} and the metadata of the index. Raises: LossError, UsageError."""
    tensors = checkpoint.state_dict()
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


class _Place:
    """The directory of an output: what is there, what of it is replaced, and which small files come along."""

    def __init__(
        self, checkpoint: Checkpoint, directory: str, names: Names, shards: Collection[str], *,
        force: bool, in_place: bool, with_files: bool,
    ) -> None:  # fmt: skip
        self.directory = directory
        self.names = names
        self.new = [*shards, *([] if names.whole in shards else [names.index])]
        self.force = force
        self.origin, self.source = os.path.split(checkpoint.url)
        within = same_file(self.origin or ".", directory)
        self.input = sets.parse(self.source) if in_place and within else None
        small = sets.small_files(self.origin or ".") if sets.parse(self.source) and not within else []
        self.small = small if with_files else [name for name in small if not os.path.lexists(self._path(name))]
        self.with_files = with_files
        self.look()
        if with_files:
            self._refuse_other_files()

    def _path(self, name: str) -> str:
        return os.path.join(self.directory, name)

    def look(self) -> None:
        """Finds what is to be removed. Raises: OutputError, before hours of work."""
        there = sorted(names_in(self.directory))
        known = sets.sets_in(there)
        same = [
            found for found in known if Names(found.stem, found.variant) == self.names and found.kind == "safetensors"
        ]
        taken = [name for name in there if self.names.gives(name) or any(name == found.name for found in same)]
        if taken and not self.force:
            raise OutputError(f"{listed(taken)}: {EXISTS}", self.directory)
        replaced = [*same, *([self.input] if self.input in known else [])]
        rivals = sets.rivals(self.names, [*there, *(self.small if self.with_files else ())])
        rivals = [name for name in rivals if all(name != found.name for found in replaced)]
        if rivals and not same:
            raise OutputError(
                f"holds {listed(rivals)}: loaders would read only one of that and {self.new[-1]}; "
                "remove it, or write elsewhere",
                self.directory,
            )
        gone = {name for name in there if self.force and self.names.gives(name)}
        gone.update(name for name in there for found in replaced if found.owns(name))
        named = {name for found in replaced if found.is_index for name in self._shards(found.name)}
        self.gone = sorted(gone - {*self.new}, key=lambda name: (sets.parse(name) is None, name))
        self.left = sorted(name for name in (named & {*there}) - gone - {*self.new})
        used = {*self.new, *self.gone, *self.left, self.source if sets.parse(self.source) is None else ""}
        self.others = sets.others(self.directory, there, used)

    def _shards(self, index: str) -> set[str]:
        try:
            return shards_of(self._path(index))
        except CkptoolError:  # it is removed, whatever it says
            return set()

    def clear(self) -> None:
        """Removes what is left of the replaced sets, indexes first: no index of absent shards at any time.

        The new set is complete, and has its names: being killed in between does no harm.
        """
        for name in self.gone:
            with suppress(OSError):  # then the note says that it is left
                os.unlink(self._path(name))
        self.left += [name for name in self.gone if os.path.lexists(self._path(name))]
        self.gone = [name for name in self.gone if name not in self.left]

    def _refuse_other_files(self) -> None:
        """Raises OutputError if small files of the same names, and other content, are there."""
        for name in self.small:
            if not os.access(os.path.join(self.origin, name), os.R_OK):
                raise OutputError(f"{name} cannot be copied: permission denied", self.origin)
        self.small = [name for name in self.small if not self._is_there(name)]
        other = [name for name in self.small if os.path.lexists(self._path(name))]
        if other and not self.force:
            raise OutputError(f"{listed(other)}: {EXISTS}", self.directory)

    def _is_there(self, name: str) -> bool:
        import filecmp

        try:
            return filecmp.cmp(os.path.join(self.origin, name), self._path(name), shallow=False)
        except OSError:
            return False

    def copy(self, fsync: bool) -> None:
        """Copies the small files. Raises: OutputError, UnreadableError."""
        for name in self.small if self.with_files else ():
            output = Output(self._path(name), force=self.force, fsync=fsync)
            with LocalFile(os.path.join(self.origin, name)) as file, output:
                output.readers = file.mode
                output.write(file.read(0, file.size))
                output.commit()

    def notes(self) -> tuple[str, ...]:
        """Returns what became of the files that were there, and of the small files beside the input."""
        others = [f"{name} ({sets.reader(name)})" for name in self.others]
        found = {
            f"{sets.reader(self.new[-1])}: {self.new[-1]} is read; also there": others,
            "of the checkpoint that was there, removed": self.gone,
            "of the checkpoint that was there, not replaced": self.left,
            "copied" if self.with_files else "beside the input, not copied (--with-files)": self.small,
        }
        return tuple(f"{what}: {listed(names, 20)}" for what, names in found.items() if names)


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
        written = [name for name in names_in(directory) if Names.of(name).gives(name)]
        links = {os.path.realpath(os.path.join(directory, name)): name for name in written}

        def meant(path: str) -> str:
            parent, name = os.path.split(path)
            return links.get(path) or (name if parent == real else "")

        def ours(path: str) -> bool:
            return Names.of(meant(path)).gives(meant(path))

        def last(path: str) -> bool:
            return Names.of(meant(path)).index == meant(path)

        sweep({real, *map(os.path.dirname, links)}, ours, last)
