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

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

from ckptool.core.checkpoint import Checkpoint, detached, plain
from ckptool.core.dtypes import DTYPES
from ckptool.core.tensor import Opaque, TensorInfo
from ckptool.core.tree import Path, as_mapping, brief, key_text, nodes, path_text
from ckptool.directories import sets
from ckptool.directories.dcp_items import Items, nested
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
from ckptool.io.files import Files, names_in, size_of
from ckptool.io.leftovers import leftovers
from ckptool.io.paths import basename, dirname, join
from ckptool.io.probe import Probe
from ckptool.io.source import Section
from ckptool.limits import MAX_LEVELS
from ckptool.ranks import world as ranks
from ckptool.ranks.parts import box, is_divisible
from ckptool.ranks.plan import Division, boxes, edge, row_of

# Needed only to write, so imported by the functions that do.
if TYPE_CHECKING:
    from ckptool.directories.place import Place
    from ckptool.formats.layout import MapLocation
    from ckptool.io.output import Output
    from ckptool.io.targets import SetOptions

LABEL = "dcp"


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
    saved = Saved()
    for name in files:
        path = join(directory, name)
        try:
            saved.add(path)
        except CkptoolError as error:
            error.path = error.path or path
            raise
    reader = Items(directory, saved, open_, {})
    with reader.files:
        try:
            tree = nested({key: reader.value(key) for key in saved.order()}, saved.paths)
        except CkptoolError as error:
            error.path = error.path or directory
            raise
        nbytes = sum(reader.files.open(path).size for path in reader.used)
        merged = list(_merge(tree, directory, names, open_))
    used = {*files, *map(basename, [*reader.used, *(one.url for one, _ in merged)])}
    notes = (*reader.notes(), *(note for _, note in merged), *_beside(directory, names, used))
    nbytes += sum(one.nbytes for one, _ in merged)
    nbytes += sum(size_of(join(directory, name)) for name in files)
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


# --- writing ---------------------------------------------------------------------------------------------------------


class _Piece(NamedTuple):
    """An item of a file: a Python value, or a box of a tensor, and its bytes."""

    key: str
    part: Part | None
    nbytes: int


class _Meant:
    """What is written of a checkpoint: items, and in which files of which rank.

    ``values``: {name: a plain tensor, or a Python value}. ``paths``: those of the names. ``left``: what is not written.
    ``notes``: what is written otherwise than it was. ``nbytes``: of the tensors. ``files``: {name: items} of each rank.
    """

    def __init__(self, checkpoint: Checkpoint, max_shard_size: int, ranks: int) -> None:
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
                longer = max(steps[key], path, key=len)
                how = f"`remap --root {path_text(longer[:-1])} --rename {longer[-1]}=NAME --to dcp` renames one"
                raise CollisionError(f"{what}: rename or leave out one{f'; {how}' if len(longer) > 1 else ''}")
            steps[key], self.paths[key] = path, name
            self.values[key] = self._item(key, value)
        tree = nested(self.values, self.paths)
        changed = [path_text(path) for path in steps.values() if not _has(tree, path)]
        self.notes = [f"keys that are no text are text in it: {listed(changed)}"] if changed else []
        self.keys = [*self.values]
        self.sizes = [_nbytes(value) for value in self.values.values()]
        self.nbytes = sum(self.sizes)
        division = Division([nbytes + ITEM for nbytes in self.sizes], ranks, self._cut)
        self.notes += [division.note("item")] if ranks > 1 else []
        self.files = [self._files(division, rank, max_shard_size) for rank in range(ranks)]

    def _item(self, key: str, value: Any) -> Any:
        """Returns a value as it is written: a dense tensor as torch has it detached, without class and attributes."""
        if not _is_box(value):
            return value
        if (extras := value.extras) is not None:
            self.left += [f"the class of {key} ({extras.subclass!r})"] if extras.subclass is not None else []
            self.left += [f"the attributes of {key}"] if extras.state is not None else []
        return plain(value)

    def _cut(self, unit: int, within: int, slack: int) -> int:
        """Returns where an item is cut (see `Snap`): between rows of a tensor, if it is large and can be divided."""
        value, nbytes = self.values[self.keys[unit]], self.sizes[unit]
        if nbytes + ITEM <= 2 * slack or not (_is_box(value) and is_divisible(value)):
            return edge(within, nbytes + ITEM)
        row = row_of(value.shape or (), DTYPES[value.dtype].bits // 8, slack)
        at = round(within / row) * row
        return at if at < nbytes else nbytes + ITEM

    def _pieces(self, division: Division, rank: int) -> Iterator[_Piece]:
        for unit, begin, end in division.of(rank):
            key, nbytes = self.keys[unit], self.sizes[unit]
            value = self.values[key]
            if not _is_box(value):
                yield _Piece(key, None, nbytes)
            elif begin == 0 and end > nbytes:
                yield _Piece(key, Part((0,) * len(value.shape or ()), value.shape or ()), nbytes)
            else:
                size = DTYPES[value.dtype].bits // 8
                for offsets, sizes in boxes(value.shape or (), begin // size, min(end, nbytes) // size):
                    yield _Piece(key, Part(offsets, sizes), prod(sizes) * size)

    def _files(self, division: Division, rank: int, max_shard_size: int) -> dict[str, list[_Piece]]:
        """Returns {file: its items}: runs of at most that many bytes of tensors; a larger item has its own file."""
        runs: list[list[_Piece]] = [[]]
        filled = 0
        for piece in self._pieces(division, rank):
            if runs[-1] and filled + piece.nbytes > max_shard_size:
                runs.append([])
                filled = 0
            runs[-1].append(piece)
            filled += piece.nbytes
        return {f"__{rank}_{number}.distcp": run for number, run in enumerate(runs) if run}

    def new(self) -> list[str]:
        """Returns the names of all files of items."""
        return [name for files in self.files for name in files]

    def value(self, piece: _Piece) -> Any:
        """Returns what is written as an item."""
        return self.values[piece.key] if piece.part is None else box(self.values[piece.key], *piece.part)

    def row(self, key: str, part: Part | None, item: Item) -> Row:
        """Returns what the metadata say of an item."""
        path, value = self.paths[key], self.values[key]
        return (
            Row(key, path, None, (), WHOLE, item)
            if part is None
            else Row(key, path, value.dtype, value.shape, part, item)
        )


WHOLE = Part((), ())
"""The box of a Python value."""

ITEM = 1200
"""Bytes of an item beside those of its tensor: an archive of torch, and its entry in the metadata."""


def _nbytes(value: Any) -> int:
    return sum(node.nbytes for node in nodes(value) if isinstance(node, TensorInfo))


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
    from ckptool.directories.place import Place, Shared, recover
    from ckptool.formats import torch_file

    meant = _Meant(checkpoint, options.max_shard_size, options.ranks)
    torch_file.check(meant.values, map_location)
    names = names_for(checkpoint, options.shard_name, options.kind)
    new, world = [*meant.new(), names.index], ranks.current
    parts: list[tuple[str, TensorInfo]] = []
    written: list[tuple[_Piece, Item]] = []

    def prepare() -> Place:
        recover(directory)
        return Place(checkpoint, directory, names, new, options)

    def content(name: str, pieces: list[_Piece]) -> Callable[[Output], None]:
        def items(output: Output) -> None:
            for piece in pieces:
                begin, value = output.position, meant.value(piece)
                if piece.part is not None:
                    parts.append((piece.key, value))
                torch_file.write(value, output, files, map_location, root="archive")
                written.append((piece, Item(name, begin, output.position - begin)))

        return items

    def check(paths: dict[str, str]) -> None:
        if compare is not None:
            compare(*_read_back(meant, directory, written, names.index, open_, paths))

    mine = meant.files[0 if world is None else world.rank]
    contents = {name: content(name, pieces) for name, pieces in mine.items()}
    if world is None:
        place = prepare()
        nbytes = place.write(
            contents,
            lambda: pickled(meant.row(one.key, one.part, at) for one, at in written),
            files,
            check=check,
            progress=progress,
        )
        return tuple(meant.left), nbytes, (*meant.notes, *place.notes())

    def last(write: Callable[[], None]) -> bytes:
        from ckptool.ranks import engine

        def wrote() -> list[Item]:
            write()
            return [item for _, item in written]

        items = []
        for key, part, _ in (piece for run in mine.values() for piece in run):
            tensor = meant.values[key]
            items.append(engine.Item(key) if part is None else engine.Item(key, tensor.dtype, tensor.shape, *part))
        every = engine.save(world, items, meant.paths, wrote)
        rows = [(one.key, None if one.dtype is None else Part(one.offsets, one.sizes), Item(*at)) for one, at in every]
        return pickled(itertools.starmap(meant.row, rows))

    shared = Shared(directory, new, True, contents, {}, meant.values, parts)
    nbytes, notes = shared.write(world, prepare, last, files, check=check, progress=progress, fsync=options.fsync)
    return tuple(meant.left), nbytes, (*meant.notes, *notes)


def _read_back(
    meant: _Meant, directory: str, written: Sequence[tuple[_Piece, Item]], index: str, open_: Callable[..., Checkpoint],
    staged: Mapping[str, str],
) -> tuple[dict[Path, TensorInfo], dict[Path, TensorInfo]]:  # fmt: skip
    """Returns the tensors that were meant in the items ``written``, and those that are read in them, by their paths.

    Raises: FormatError if the metadata have other keys, or paths.
    """
    saved = Saved()
    saved.add(staged[index])
    if saved.paths != meant.paths or saved.entries.keys() != meant.paths.keys():
        raise FormatError("what was written has other keys than what was meant, and was thrown away")
    one: dict[Path, TensorInfo] = {}
    other: dict[Path, TensorInfo] = {}
    reader = Items(directory, saved, open_, staged)
    with reader.files:
        found = {key: reader.value(key) for key in dict.fromkeys(piece.key for piece, _ in written)}
    for piece, _ in written:
        value, begin = found[piece.key], meant.paths[piece.key]
        if piece.part is not None and isinstance(value, TensorInfo) and piece.part.sizes != value.shape:
            value, begin = box(value, *piece.part), (*begin, *piece.part.offsets)
        for tensors, node in ((one, meant.value(piece)), (other, value)):
            tensors.update(((*begin, *path[1:]), tensor) for path, tensor in Checkpoint({"": node}).tensors())
    return one, other


def check(
    checkpoint: Checkpoint,
    directory: str,
    map_location: MapLocation | None,
    options: SetOptions,
) -> tuple[tuple[str, ...], int, tuple[str, ...]]:
    """Returns what `write` would leave out, about how many bytes it would write, and its notes. Raises: as it."""
    from ckptool.directories.place import Place
    from ckptool.formats import torch_file

    meant = _Meant(checkpoint, options.max_shard_size, options.ranks)
    names = names_for(checkpoint, options.shard_name, options.kind)
    new = [*meant.new(), names.index]
    place = Place(checkpoint, directory, names, new, options)
    nbytes = max(torch_file.check(meant.values, map_location), meant.nbytes) + 1500 * len(meant.values)
    return tuple(meant.left), nbytes, (*meant.notes, *place.notes())
