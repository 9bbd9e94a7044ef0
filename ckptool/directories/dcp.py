"""Distributed checkpoints (DCP): a directory that torch.distributed.checkpoint wrote.

    .metadata                         a pickle of Metadata: the boxes of every tensor, and where each item is
    __0.metadata, __1.metadata ...    instead of it, one of each process, if it was saved without collectives
    __0_0.distcp, __1_0.distcp ...    items, one behind the other

An item is one box of a tensor or one Python value, as torch.save writes it. With SAFETENSORS the tensors of a file are
one safetensors file behind the other items.
Nested containers were flattened when saving: ``planner_data`` maps each name to its path. Names of mappings are strings
there, so the ids in an optimizer's state are made integers again. Source: ``metadata.py``, ``filesystem.py`` and
``_nested_dict.py`` of ``torch/distributed/checkpoint``, torch 2.13.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

from ckptool.core.checkpoint import Checkpoint, detached, plain
from ckptool.core.tensor import Box, Opaque, TensorInfo, chunks
from ckptool.core.tree import Path, as_mapping, brief, key_text, nodes, path_text, walk
from ckptool.directories import sets
from ckptool.directories.dcp_metadata import Item, Part, Row, Saved, pickled
from ckptool.directories.names import DCP, MERGED, METADATA, Distributed, sets_in
from ckptool.errors import (
    CkptoolError,
    CollisionError,
    FormatError,
    IncompleteError,
    LossError,
    UsageError,
    listed,
)
from ckptool.formats.safetensors_file import sharding
from ckptool.io.files import Files, ahead, exists, names_in, size_of
from ckptool.io.leftovers import leftovers
from ckptool.io.paths import basename, dirname, join
from ckptool.io.probe import Probe
from ckptool.io.source import SMALL_MEMBER, Section
from ckptool.io.zip_read import TAIL
from ckptool.limits import MAX_LEVELS, MAX_PICKLE
from ckptool.pickling.archives import Single, is_saved, unpickled
from ckptool.pickling.load import with_arrays

# Needed only to write, so imported by the functions that do.
if TYPE_CHECKING:
    from ckptool.formats.layout import MapLocation
    from ckptool.io.output import Output, SetOptions

LABEL = "dcp"

GAPS = 1000
"""List positions that may be empty: a list of torch has None where an element held nothing to save."""


def matches(probe: Probe) -> bool:
    """Returns whether it is such a directory, or one of its files; a directory of a known loader's files is not."""
    if not probe.is_directory:
        if isinstance(probe.file, Section):  # an item
            return False
        if METADATA.fullmatch(probe.name):
            return probe.head[:1] == b"\x80"
        return probe.name.endswith(".distcp") and bool(_metadata_files(names_in(dirname(probe.path) or ".")))
    ours = any(METADATA.fullmatch(name) or name.endswith((".distcp", ".metadata.tmp")) for name in probe.names)
    return ours and not any(found.loader for found in sets_in(probe.names))


def _metadata_files(names: Sequence[str]) -> list[str]:
    found = sorted((name for name in names if METADATA.fullmatch(name)), key=lambda name: (len(name), name))
    return [".metadata"] if ".metadata" in found else found


def read(probe: Probe, open_: Callable[..., Checkpoint]) -> Checkpoint:
    """Returns the checkpoint: the metadata is read, and the header of every item.

    Raises: IncompleteError for files, items or parts of tensors that are missing; UnsupportedError for transformed
    (compressed) items; FormatError, LimitError.
    """
    directory = probe.path if probe.is_directory else dirname(probe.path) or "."
    names = sorted({*names_in(directory), *([] if probe.is_directory else [probe.name])})
    files = _metadata_files(names)
    if not files:
        why = "was its save cut off?"
        if any(leftovers(names, "old", name) for name in (DCP.index, "__0.metadata")):
            why = "a run that was replacing its files was killed; write there again with --force"
        raise IncompleteError(f"a torch.distributed checkpoint (DCP) without .metadata: {why}", directory)
    return _opened(directory, names, files, open_, {})


def _opened(
    directory: str, names: Sequence[str], files: Sequence[str], open_: Callable[..., Checkpoint],
    staged: Mapping[str, str],
) -> Checkpoint:  # fmt: skip
    """Returns the checkpoint that these files of metadata describe. ``staged``: {name: where it is instead}."""
    saved = Saved()
    for name in files:
        path = staged.get(name) or join(directory, name)
        try:
            saved.add(path)
        except CkptoolError as error:
            error.path = error.path or path
            raise
    reader = _Items(directory, saved, open_, staged)
    with reader.files:
        try:
            tree = _nested({key: reader.value(key) for key in saved.order()}, saved.paths)
        except CkptoolError as error:
            error.path = error.path or directory
            raise
        nbytes = sum(reader.files.open(path).size for path in reader.used)
        merged = list(_merge(tree, directory, names, open_))
    used = {*files, *map(basename, [*reader.used, *(one.url for one, _ in merged)])}
    notes = (*reader.notes(), *(note for _, note in merged), *_beside(directory, names, used))
    nbytes += sum(one.nbytes for one, _ in merged)
    nbytes += sum(size_of(staged.get(name) or join(directory, name)) for name in files)
    url = join(directory, files[0])
    every = tuple(dict.fromkeys((*saved.names, *reader.names, *(name for one, _ in merged for name in one.names))))
    held = tuple(sorted(map(basename, reader.used)))
    return Checkpoint(tree, format=LABEL, url=url, nbytes=nbytes, names=every, notes=notes, files=held)


def _merge(
    tree: Any, directory: str, names: Sequence[str], open_: Callable[..., Checkpoint]
) -> Iterator[tuple[Checkpoint, str]]:
    """Adds to the tree what lies in a file beside the items, as its loader does; yields the file and a note."""
    for name in MERGED:
        if name in names and isinstance(tree, dict):
            found = open_(join(directory, name))
            if isinstance(found.tree, dict):
                twice = [key for key in found.tree if key in tree]
                tree.update((key, value) for key, value in found.tree.items() if key not in tree)
                less = f"; not {listed(twice)}, which the items have too" if twice else ""
                yield found, f"from {name}: {listed(key for key in found.tree if key not in twice)}{less}"


def _beside(directory: str, names: Sequence[str], used: set[str]) -> list[str]:
    """Returns notes on what else lies in the directory."""
    unnamed = [name for name in names if name.endswith(".distcp") and name not in used]
    rest = [*unnamed, *sets.others(directory, names, used)]
    notes = sets.trainers_state(names, used)
    notes += [f"also here, and not read: {listed(rest)}"] if rest else []
    if ".metadata.tmp" in names:
        notes.append(".metadata.tmp is left of a save that was cut off: the files may be newer than .metadata")
    return notes


# --- items -----------------------------------------------------------------------------------------------------------


class _Items:
    """Reads items. ``used``: the files that have some of them. ``names``: what their pickles name."""

    def __init__(
        self, directory: str, saved: Saved, open_: Callable[..., Checkpoint], staged: Mapping[str, str]
    ) -> None:
        self.open_ = open_
        self.directory = directory
        self.staged = staged
        self.saved = saved
        self.files = Files()
        self.names: dict[tuple[str, str], None] = {}
        self.used: dict[str, None] = {}
        self.blobs: dict[tuple[str, int], Checkpoint] = {}
        self.single: Single = {}
        self.left = set(saved.items)
        self.raw: list[str] = []
        self.whole: list[str] = []
        there = {*names_in(directory), *staged}
        ahead(join(directory, name) for name in sorted(saved.files) if name not in staged)
        for item in saved.items.values():  # its first bytes, and its last, where a zip's directory is
            begin, end = item.offset, item.offset + item.nbytes
            self.files.will_read(join(directory, item.file), begin, min(begin + SMALL_MEMBER // 8, end))
            self.files.will_read(join(directory, item.file), max(begin, end - TAIL - 22), end)
        gone: dict[str, list[str]] = {}
        for (key, _), item in saved.items.items():
            if item.file not in there and not exists(join(directory, item.file)):
                gone.setdefault(item.file, []).append(key)
        if gone:
            what = "; ".join(f"{name}, which has {listed(dict.fromkeys(keys), 4)}" for name, keys in gone.items())
            raise IncompleteError(f"a file is missing: {what}", directory)

    def value(self, key: str) -> Any:
        """Returns the tensor or the Python value of that key."""
        entry = self.saved.entries[key]
        if entry.dtype is None:
            found = self._read(key, None)
            if self.saved.flat and any(isinstance(node, TensorInfo) for _, node in walk(found)):
                self.whole.append(key)
            return found
        boxes: list[Box] = [(*part, self._tensor(key, part)) for part in entry.parts]
        if len(boxes) == 1 and boxes[0][1] == entry.shape and not any(boxes[0][0]):
            tensor = boxes[0][2]
            if tensor.dtype == entry.dtype and (tensor.shape == entry.shape or isinstance(tensor.source, Opaque)):
                return tensor
        try:
            return chunks(entry.dtype, entry.shape, boxes)
        except FormatError as error:
            raise IncompleteError(f"{key}: {error.message}", self.directory) from error

    def _tensor(self, key: str, part: Part) -> TensorInfo:
        found = self._read(key, part.offsets)
        if not isinstance(found, TensorInfo):
            raise FormatError(f"{key}: the item at {brief(part.offsets)} is no tensor: {brief(found)}", self.directory)
        return found

    def _read(self, key: str, offset: tuple[int, ...] | None) -> Any:
        item = self.saved.items.get((key, offset))
        if item is None:
            where = "" if offset is None else f" the part at {brief(offset)} of"
            raise IncompleteError(f"the metadata say of no file that it has{where} {key}", self.directory)
        self.left.discard((key, offset))
        path = self.staged.get(item.file) or join(self.directory, item.file)
        self.used[path] = None
        file = self.files.open(path)
        if item.offset + item.nbytes > file.size:
            end = item.offset + item.nbytes
            raise IncompleteError(f"{key}: ends at byte {end} of a file of {file.size}: a truncated download?", path)
        try:
            if file.read(item.offset, min(2, item.nbytes)) == b"PK":
                return self._saved_by_torch(path, Section(file, item.offset, item.nbytes))
            if self.saved.entries[key].dtype is not None:
                return self._in_safetensors(key, offset, path, item.offset)
            if item.nbytes > MAX_PICKLE.now():
                raise MAX_PICKLE.passed("is too long", item.nbytes)
            self.raw.append(key)
            return file.read(item.offset, item.nbytes)
        except CkptoolError as error:
            error.message = f"{key}, at byte {item.offset}: {error.message}"
            error.path = error.path or path
            raise

    def _saved_by_torch(self, path: str, section: Section) -> Any:
        with Probe(path, lambda _: section) as probe:
            if not is_saved(probe):
                other = self.open_(path, lambda _: section).format
                raise FormatError(f"is a file of {other}, which torch.save did not write")
            tree, names = unpickled(probe, single=self.single)
        self.names.update(dict.fromkeys(names))
        return with_arrays(tree, names, section.span(0, 0))

    def _in_safetensors(self, key: str, offset: tuple[int, ...] | None, path: str, begin: int) -> TensorInfo:
        """Returns a tensor of the safetensors file that is the rest of a file: all its tensors have that offset.

        Of several parts of one tensor torch writes the last one only, so it must be the one that is looked for.
        """
        found = self.blobs.get((path, begin))
        if found is None:
            file = self.files.open(path)
            found = self.open_(path, lambda _: Section(file, begin, file.size - begin))
            if found.format != "safetensors":
                raise FormatError(f"is a file of {found.format}, neither a torch.save nor a safetensors file")
            self.blobs[path, begin] = found
        if key not in found.tree:
            raise IncompleteError(f"is a safetensors file of {listed(found.tree)}")
        if (held := (sharding(found.metadata) or {}).get(key)) != offset:
            raise IncompleteError(f"holds the part at {brief(held)}, not that at {brief(offset)}, which torch lost")
        tensor: TensorInfo = found.tree[key]
        return tensor

    def notes(self) -> Iterator[str]:
        """Yields what else is to be known of the items."""
        absent = [key for key in self.saved.paths if key not in self.saved.entries]
        for what, keys in {
            "saved whole by one process, not flattened (flatten_state_dict=False): what other processes held of "
            "sharded tensors is not in the checkpoint": self.whole,
            "saved by several processes, the first one's taken": self.saved.twice,
            "stored by Megatron-core in a shape that is not their own (mcore_data), and shown so": self.saved.reshaped,
            "no torch.save inside, kept as bytes": self.raw,
            "in planner_data only": absent,
            "items that belong to no key, not read": dict.fromkeys(key for key, _ in sorted(self.left, key=str)),
        }.items():
            if keys:
                yield f"{what}: {listed(keys)}"


# --- the tree --------------------------------------------------------------------------------------------------------


class _Branch(dict[Any, Any]):
    """A container that was flattened, unlike a dict that is a value."""


def _nested(values: Mapping[str, Any], paths: Mapping[str, tuple[Any, ...]]) -> Any:
    """Returns the tree of which the values are leaves; without a path, the key is the only step."""
    top = _Branch()
    for key, value in values.items():
        *steps, last = paths.get(key, (key,))
        if len(steps) > MAX_LEVELS.now():
            raise MAX_LEVELS.passed(f"{brief(key)} is nested too deep", len(steps))
        node = top
        for step in steps:
            node = node.setdefault(step, _Branch())
            if type(node) is not _Branch:
                raise FormatError(f"{brief(key)} lies below another value: {brief(paths[key])}")
        if last in node:
            raise FormatError(f"two values have the path of {brief(key)}: {brief(paths.get(key))}")
        node[last] = value
    return _container(top)


def _container(branch: _Branch) -> Any:
    """Returns the dict or list that a branch stands for."""
    found = {step: _container(node) if type(node) is _Branch else node for step, node in branch.items()}
    if found and all(type(step) is int for step in found):
        size = max(found) + 1
        if min(found) < 0 or size > len(found) + GAPS:
            raise FormatError(f"a list has {len(found)} elements, one of them at {brief(max(found, key=abs))}")
        return [found.get(index) for index in range(size)]
    if "param_groups" in found and type(branch.get("state")) is _Branch and all(map(_is_number, branch["state"])):
        found["state"] = {int(step): value for step, value in found["state"].items()}
    return found


def _is_number(step: Any) -> bool:
    return type(step) is str and step.isascii() and step.isdecimal() and len(step) < 19 and str(int(step)) == step


# --- writing ---------------------------------------------------------------------------------------------------------


class _Meant:
    """What is written of a checkpoint: items, and in which files.

    ``values``: {name: a plain tensor, or a Python value}. ``paths``: those of the names. ``left``: what is not written.
    ``notes``: what is written otherwise than it was.
    """

    def __init__(self, checkpoint: Checkpoint, max_shard_size: int) -> None:
        if max_shard_size <= 0:
            raise UsageError(f"a file cannot have {max_shard_size} bytes at most")
        self.values: dict[str, Any] = {}
        self.paths: dict[str, tuple[str | int, ...]] = {}
        self.left: list[str] = []
        top = checkpoint.tree
        if as_mapping(top) is None:  # torch takes dicts only
            self.left += checkpoint.left_out()
            top = detached(checkpoint.state_dict())
        steps: dict[str, Path] = {}
        for path, name, value in flattened(top):
            key = ".".join(map(str, name))
            if value is EMPTY:
                self.left.append(f"{path_text(path)} (an empty dict)")
                continue
            if key in steps:
                what = f"two values have the name {brief(key)} in it, those at {brief(steps[key])} and {brief(path)}"
                nested = max(steps[key], path, key=len)
                how = f"`remap --root {path_text(nested[:-1])} --rename {nested[-1]}=NAME --to dcp` renames one"
                raise CollisionError(f"{what}: rename or leave out one{f'; {how}' if len(nested) > 1 else ''}")
            steps[key], self.paths[key] = path, name
            self.values[key] = self._item(key, value)
        self.tree = _nested(self.values, self.paths)
        changed = [path_text(path) for path in steps.values() if not _has(self.tree, path)]
        self.notes = [f"keys that are no text are text in it: {listed(changed)}"] if changed else []
        self.files = self._files(max_shard_size)

    def _item(self, key: str, value: Any) -> Any:
        """Returns a value as it is written: a dense tensor as torch has it detached, without class and attributes."""
        if not _is_box(value):
            return value
        if (extras := value.extras) is not None:
            self.left += [f"the class of {key} ({extras.subclass!r})"] if extras.subclass is not None else []
            self.left += [f"the attributes of {key}"] if extras.state is not None else []
        return plain(value)

    def _files(self, max_shard_size: int) -> dict[str, list[str]]:
        """Returns {file: its items}: runs of at most that many bytes of tensors; a larger item has its own file."""
        runs: list[list[str]] = [[]]
        filled = self.nbytes = 0
        for key, value in self.values.items():
            nbytes = sum(node.nbytes for node in nodes(value) if isinstance(node, TensorInfo))
            if runs[-1] and filled + nbytes > max_shard_size:
                runs.append([])
                filled = 0
            runs[-1].append(key)
            filled += nbytes
            self.nbytes += nbytes
        return {f"__0_{number}.distcp": run for number, run in enumerate(runs) if run}


EMPTY = object()
"""Stands for an empty dict, which has no place among the names."""


def flattened(top: Any) -> Iterator[tuple[Path, tuple[str | int, ...], Any]]:
    """Yields (path, path in planner_data, value), as torch flattens: dicts, and lists that hold dicts or tensors.

    Raises: LossError for a container inside itself, LimitError past `MAX_LEVELS`.
    """
    lists: dict[int, bool] = {}
    trail: list[tuple[Path, tuple[str | int, ...], Any, Iterator[tuple[Any, Any]]]]
    trail = [((), (), top, iter((as_mapping(top) or {}).items()))]
    on_trail = {id(top)}
    while trail:
        path, above, holder, rest = trail[-1]
        for step, value in rest:
            here, name = (*path, step), (*above, step if type(holder) is list else key_text(step))
            if len(here) > MAX_LEVELS.now():
                raise MAX_LEVELS.passed(f"{brief('.'.join(map(str, name)))} is nested too deep", len(here))
            content = as_mapping(value)
            if not content and not (type(value) is list and _is_entered(value, lists)):
                yield here, name, value if content is None else EMPTY
                continue
            if id(value) in on_trail:
                raise LossError(f"{LABEL} cannot hold {path_text(here)}, a container inside itself")
            on_trail.add(id(value))
            trail.append((here, name, value, iter(content.items()) if content else enumerate(value)))
            break
        else:
            trail.pop()
            on_trail.discard(id(holder))


def _is_entered(top: list[Any], known: dict[int, bool]) -> bool:
    """Returns whether a list, or a list in it, holds a dict or a tensor; ``known`` has this for lists seen before."""
    trail = [] if id(top) in known else [iter(top)]
    ids = [id(top)]
    known.setdefault(id(top), False)
    while trail:
        for value in trail[-1]:
            if type(value) is list and id(value) not in known:
                known[id(value)] = False
                trail.append(iter(value))
                ids.append(id(value))
                break
            if known.get(id(value)) or _is_tensor(value) or as_mapping(value) is not None:
                known.update(dict.fromkeys(ids, True))
                return True
        else:
            trail.pop()
            ids.pop()
    return known[id(top)]


def _is_tensor(value: object) -> TypeGuard[TensorInfo]:
    """Returns whether torch has a tensor there, and no array of NumPy."""
    return isinstance(value, TensorInfo) and value.array is None


def _is_box(value: object) -> TypeGuard[TensorInfo]:
    """Returns whether it is written as a tensor: a box has a shape and a dtype, but is neither sparse nor quantised."""
    return _is_tensor(value) and not isinstance(value.source, Opaque)


def _has(tree: Any, path: Path) -> bool:
    """Returns whether a tree of dicts and lists has a value at this path."""
    for step in path:
        if isinstance(tree, list) or (isinstance(tree, dict) and step in tree):
            tree = tree[step]
        else:
            return False
    return True


def names_for(checkpoint: Checkpoint, shard_name: str | None, kind: str) -> Distributed:
    """Returns the names of the files to write. Raises: UsageError for a ``shard_name``."""
    if shard_name is not None:
        raise UsageError("--shard-name goes with shards: the files of a distributed checkpoint have fixed names")
    return DCP


def write(
    checkpoint: Checkpoint,
    directory: str,
    files: Files,
    map_location: MapLocation | None,
    open_: Callable[..., Checkpoint],
    options: SetOptions,
    *,
    compare: Callable[[Mapping[Any, TensorInfo], Mapping[Any, TensorInfo]], None] | None,
    progress: Callable[[int], None] | None,
) -> tuple[tuple[str, ...], int, tuple[str, ...]]:
    """Writes the whole tree as one process would save it, streaming; ``.metadata`` gets its name last.

    Returns what was left out, the bytes of all files, and notes. Each tensor is one item, tied ones too. What torch has
    no box for (a sparse or quantised tensor) is an item as a Python value is. The other arguments are as in
    `sharded.write`.

    Raises: LossError for what torch cannot hold, CollisionError for two values of one flattened name, OutputError.
    """
    from ckptool.directories.place import Place, recover
    from ckptool.formats import torch_file

    meant = _Meant(checkpoint, options.max_shard_size)
    torch_file.check(meant.values, map_location)
    names = names_for(checkpoint, options.shard_name, options.kind)
    recover(directory)
    new = [*meant.files, names.index]
    place = Place(checkpoint, directory, names, new, options)
    rows: list[Row] = []

    def written(name: str) -> Callable[[Output], None]:
        def items(output: Output) -> None:
            for key in meant.files[name]:
                begin, value = output.position, meant.values[key]
                torch_file.write(value, output, files, map_location, root="archive")
                item = Item(name, begin, output.position - begin)
                rows.append(Row(key, meant.paths[key], value if _is_box(value) else None, item))

        return items

    def check(paths: dict[str, str]) -> None:
        if compare is not None:
            found = _opened(directory, list(paths), [names.index], open_, paths)
            compare(dict(Checkpoint(meant.tree).tensors()), dict(found.tensors()))

    nbytes = place.write(
        {name: written(name) for name in meant.files}, lambda: pickled(rows), files, check=check, progress=progress
    )
    return tuple(meant.left), nbytes, (*meant.notes, *place.notes())


def check(
    checkpoint: Checkpoint,
    directory: str,
    map_location: MapLocation | None,
    options: SetOptions,
) -> tuple[tuple[str, ...], int, tuple[str, ...]]:
    """Returns what `write` would leave out, about how many bytes it would write, and its notes. Raises: as it."""
    from ckptool.directories.place import Place
    from ckptool.formats import torch_file

    meant = _Meant(checkpoint, options.max_shard_size)
    names = names_for(checkpoint, options.shard_name, options.kind)
    new = [*meant.files, names.index]
    place = Place(checkpoint, directory, names, new, options)
    nbytes = max(torch_file.check(meant.values, map_location), meant.nbytes) + 1500 * len(meant.values)
    return tuple(meant.left), nbytes, (*meant.notes, *place.notes())
