"""Sharded state dicts that every process saved with torch.save (FSDP): a file of each rank, joined.

    model_world_size_2_rank_0.pt, model_world_size_2_rank_1.pt      as verl names them; rank0.pth, rank1.pth ...

A file has the shards of one rank, and where they lie: a DTensor by its mesh, its coordinate there and its placements,
a ShardedTensor by the offsets of its shards. What is not sharded is taken from the first rank. Only a directory is
joined: who names a file means that rank. Source: ``tensor/_dtensor_spec.py``, ``device_mesh.py`` and
``_shard/sharded_tensor/api.py`` of ``torch/distributed``, torch 2.2 to 2.13.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from math import prod
from typing import Any, NamedTuple

from ckptool.core.checkpoint import Checkpoint
from ckptool.core.tensor import Box, Opaque, TensorInfo, chunks, whole_storage
from ckptool.core.tree import Path, PyObject, as_mapping, attributes, brief, nodes, path_text, with_content
from ckptool.directories import sets
from ckptool.directories.names import sets_in
from ckptool.errors import CkptoolError, FormatError, IncompleteError, UnsupportedError, listed
from ckptool.io.files import is_file
from ckptool.io.paths import join
from ckptool.io.probe import Probe
from ckptool.limits import MAX_LEVELS

LABEL = "fsdp-ranks"

RANK = re.compile(r"((?:.*[^a-zA-Z0-9])?rank[._-]?)(\d{1,6})((?:[^0-9].*)?\.(?:pt|pth|bin|ckpt))", re.ASCII)
WORLD = re.compile(r"world[._-]?size[._-]?(\d{1,6})", re.ASCII)
BESIDE = re.compile(r"(optim|extra_state)")
"""How names of files of ranks begin that are not a model's."""

SHARDS = ("dtensor_local_shard", "sharded_tensor_local_shards")
MOST_SETS = 8
"""Sets of files of ranks in a directory of which the first file is opened."""

MOST_MESH_DIMS = 16


@dataclass(frozen=True, slots=True, eq=False)
class _Set:
    """Files whose names differ in the rank only: what stands before and behind it; ``files``: {rank: name}."""

    directory: str
    head: str
    tail: str
    files: dict[int, str] = field(default_factory=dict)

    def name(self, rank: int | str) -> str:
        """Returns the name of a rank's file, with as many digits as the others have."""
        width = min(len(name) - len(self.head) - len(self.tail) for name in self.files.values())
        return f"{self.head}{rank if isinstance(rank, str) else f'{rank:0{width}d}'}{self.tail}"

    def path(self, rank: int) -> str:
        """Returns the path of a rank's file, which is there."""
        return join(self.directory, self.files[rank])

    @property
    def world(self) -> int:
        """Returns the number of ranks that the names say; 0 if they say none."""
        found = WORLD.search(self.head) or WORLD.search(self.tail)
        return int(found[1]) if found else 0


def matches(probe: Probe) -> bool:
    """Returns whether it is a directory with files of ranks; one of a known loader's files is not."""
    if not probe.is_directory or not any(map(RANK.fullmatch, probe.names)):
        return False
    return not any(found.loader for found in sets_in(probe.names))


def read(probe: Probe, open_: Callable[..., Checkpoint]) -> Checkpoint | None:
    """Returns the checkpoint of all ranks, tensors joined lazily; None if the files have no shards.

    Raises: IncompleteError for ranks without a file; UnsupportedError for several sets, and for placements that are not
    understood; FormatError for files that contradict each other; what opening one raises.
    """
    opened = {found: open_(found.path(min(found.files))) for found in _sets(probe.path, probe.names)}
    there = [found for found, file in opened.items() if any(map(_is_shard, nodes(file.tree)))]
    if not there:
        return None
    if len(there) > 1:
        names = listed(found.name("*") for found in there)
        what = f"holds several sets of files of ranks: {names}: move one to a directory of its own"
        raise UnsupportedError(what, probe.path)
    found, first = there[0], opened[there[0]]
    _require_all(found, first)
    ranks = sorted(found.files)
    files = {rank: first if rank == ranks[0] else open_(found.path(rank)) for rank in ranks}
    joining = _Joining(len(files))
    try:
        tree = joining.node((), {rank: file.tree for rank, file in files.items()})
    except CkptoolError as error:
        error.path = error.path or probe.path
        raise
    used = set(found.files.values())
    rest = sets.others(probe.path, probe.names, used)
    notes = [f"joined from {len(files)} files: {found.name('*')}", *joining.notes()]
    notes += sets.trainers_state(probe.names, used)
    notes += [f"also here, and not read: {listed(rest)}"] if rest else []
    return Checkpoint(
        tree, format=LABEL, url=probe.path, nbytes=sum(file.nbytes for file in files.values()),
        names=tuple(dict.fromkeys(name for file in files.values() for name in file.names)),
        trailing="; ".join(f"{found.files[rank]}: {one.trailing}" for rank, one in files.items() if one.trailing),
        notes=tuple(notes), files=tuple(found.files[rank] for rank in files),
    )  # fmt: skip


def _sets(directory: str, names: Sequence[str]) -> list[_Set]:
    """Returns the sets of files of ranks, without those of an optimizer if others are there. Raises: FormatError."""
    found: dict[tuple[str, str], _Set] = {}
    for name in names:
        match = RANK.fullmatch(name)
        if match and is_file(join(directory, name)):
            one = found.setdefault((match[1], match[3]), _Set(directory, match[1], match[3]))
            if (other := one.files.setdefault(int(match[2]), name)) != name:
                raise FormatError(f"two files of rank {int(match[2])}: {other} and {name}", directory)
    models = [one for one in found.values() if not BESIDE.match(one.head) and not sets.STATE.fullmatch(one.name("0"))]
    there = models or list(found.values())
    return there if len(there) <= MOST_SETS else []


def _require_all(found: _Set, first: Checkpoint) -> None:
    """Raises IncompleteError for ranks that have no file, FormatError for more files than there are ranks."""
    rank = min(found.files)
    shard = next(filter(_is_shard, nodes(first.tree)))
    try:
        world = found.world or max(_piece(shard, rank).world, max(found.files) + 1)
    except CkptoolError as error:
        error.path = error.path or first.url
        raise
    if max(found.files) >= world:
        what = f"{found.files[max(found.files)]} is of a rank that {world} processes do not have"
        raise FormatError(what, found.directory)
    if absent := list(islice((rank for rank in range(world) if rank not in found.files), 8)):
        more = world - len(found.files) - len(absent)
        gone = f"{listed(map(found.name, absent), 8)}{f' and {more:,} more' * bool(more)}"
        what = f"{len(found.files)} of the files of {world} ranks, which hold a part of each tensor; missing: {gone}"
        raise IncompleteError(f"{what}. Name a file to see what it holds", found.directory)


# --- what a rank holds of a tensor -----------------------------------------------------------------------------------


class _Piece(NamedTuple):
    """What a rank holds of a tensor. ``form`` is the same on all ranks: what they must agree on, as text.

    ``ranks``: over how many the tensor is laid out; ``world``: how many there are at least.
    """

    form: str
    boxes: list[Box]
    ranks: int
    world: int


def _is_shard(node: object) -> bool:
    return isinstance(node, TensorInfo) and node.kind in SHARDS


def _piece(tensor: TensorInfo, rank: int) -> _Piece:
    """Returns what the file of a rank has of a tensor. Raises: UnsupportedError, FormatError."""
    state = tensor.source.node.args[3] if isinstance(tensor.source, Opaque) else ()
    layers = state if isinstance(state, tuple) else (state,)
    return (_of_dtensor if tensor.kind == SHARDS[0] else _of_sharded_tensor)(tensor, layers, rank)


def _of_sharded_tensor(tensor: TensorInfo, state: tuple[Any, ...], rank: int) -> _Piece:
    """``state``: the local shards, the metadata, the process group, the sharding spec, whether it has references."""
    if len(state) < 3 or not isinstance(state[0], list):
        raise FormatError(f"a ShardedTensor whose state is {brief(state)}")
    group = attributes(state[2])
    own, ranks, world = (group.get(name) for name in ("global_rank", "local_world_size", "global_world_size"))
    if not (type(own) is type(ranks) is type(world) is int):
        raise FormatError(f"a ShardedTensor without the sizes of its process group: {brief(group)}")
    _refuse_other(own, rank)
    boxes: list[Box] = []
    for shard in state[0]:
        part = attributes(shard).get("tensor")
        where = attributes(attributes(shard).get("metadata"))
        offsets, sizes = (_numbers(where.get(f"shard_{name}"), name) for name in ("offsets", "sizes"))
        if not isinstance(part, TensorInfo):
            raise FormatError(f"a shard without a tensor: {brief(part)}")
        boxes.append((offsets, sizes, part))
    return _Piece(f"a ShardedTensor of {tensor.dtype} {brief(tensor.shape)}", boxes, ranks, world)


def _of_dtensor(tensor: TensorInfo, state: tuple[Any, ...], rank: int) -> _Piece:
    fields = {name: value for layer in state if isinstance(layer, dict) for name, value in layer.items()}
    spec, local = attributes(fields.get("_spec")), fields.get("_local_tensor")
    mesh, placements = attributes(spec.get("mesh")), spec.get("placements")
    shape = tensor.shape or ()
    if not mesh or not isinstance(placements, (tuple, list)) or not isinstance(local, TensorInfo):
        raise FormatError(f"a DTensor without a mesh, placements and a local tensor: {brief(fields)}")
    if len(placements) > MOST_MESH_DIMS:
        raise UnsupportedError(f"a DTensor on a mesh of {len(placements)} dimensions, of which 16 are supported")
    dims = [_dim(one, len(shape)) for one in placements]
    axes = _axes(mesh)
    over = [prod(sizes) for sizes, _ in axes]
    if len(over) != len(dims):
        raise FormatError(f"a DTensor with {len(dims)} placements on a mesh of {brief(tuple(over))}")
    _refuse_order(spec, dims, over)
    ranks = mesh.get("_flatten_rank_map", mesh.get("_flatten_mesh_list"))
    ranks = ranks if isinstance(ranks, tuple) else ()
    form = f"a DTensor of {tensor.dtype} {brief(shape)}, {listed(map(_said, placements))} on a mesh of {brief(over)}"
    world = max(prod(over), len(ranks))
    given = mesh.get("_coordinate_on_dim")
    if given is None:  # the rank is not in the mesh
        if local.numel:
            raise FormatError("a DTensor with a local tensor, and no coordinate in its mesh")
        return _Piece(form, [], prod(over), world)
    at = _numbers(given, "a coordinate")
    if len(at) != len(over) or any(one >= size for one, size in zip(at, over, strict=True)):
        raise FormatError(f"a DTensor at {brief(at)} of a mesh of {brief(over)}")
    if len(ranks) == prod(over):
        place = sum(_offset(one, *axis) for one, axis in zip(at, axes, strict=True))
        _refuse_other(ranks[place] if place < len(ranks) else None, rank)
    offsets, sizes = _box(shape, dims, over, at)
    empty = not local.numel and not prod(sizes)  # whose other sizes differ with versions
    return _Piece(form, [] if empty else [(offsets, sizes, local)], prod(over), world)


def _box(
    shape: Sequence[int], dims: Sequence[int | None], over: Sequence[int], at: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the first index and the sizes of the shard at a coordinate: as `torch.chunk` gives them."""
    offsets, sizes = [0] * len(shape), list(shape)
    for dim, count, number in zip(dims, over, at, strict=True):
        if dim is not None:
            step = -(-sizes[dim] // count)
            begin = min(number * step, sizes[dim])
            offsets[dim] += begin
            sizes[dim] = min(step, sizes[dim] - begin)
    return tuple(offsets), tuple(sizes)


def _said(placement: Any) -> str:
    """Returns a placement as text, such as ``Shard(0)``."""
    name = getattr(placement, "qualname", None) or brief(placement)
    return f"{name}({attributes(placement).get('dim', '')})".removesuffix("()")


def _dim(placement: Any, ndim: int) -> int | None:
    """Returns the dimension that a placement shards; None for Replicate. Raises: UnsupportedError, FormatError."""
    kind = getattr(placement, "qualname", "")
    if kind == "Replicate":
        return None
    if kind != "Shard":
        what = f"a DTensor that is placed by {_said(placement)}: only Shard and Replicate are supported"
        raise UnsupportedError(f"{what}; save it with torch.distributed.checkpoint, or whole (full_tensor())")
    dim = attributes(placement).get("dim")
    if type(dim) is not int or not -ndim <= dim < ndim:
        raise FormatError(f"a DTensor of {ndim} dimensions that is sharded along {brief(dim)}")
    return dim % ndim


def _refuse_order(spec: Mapping[str, Any], dims: Sequence[int | None], over: Sequence[int]) -> None:
    """Raises UnsupportedError if a dimension is sharded over several of the mesh, and not over the first one first.

    Before torch 2.10 a DTensor did not say in which order, and FSDP with tensor parallelism had another one.
    """
    split = [dim for dim, size in zip(dims, over, strict=True) if dim is not None and size > 1]
    order = spec.get("shard_order")
    said = [one.args for one in order[:64] if isinstance(one, PyObject)] if isinstance(order, tuple) else []
    for dim in split:
        plain = dim, tuple(at for at, one in enumerate(dims) if one == dim)
        if split.count(dim) > 1 and plain not in said:
            what = f"a DTensor whose dimension {dim} is sharded over several dimensions of its mesh"
            raise UnsupportedError(f"{what}, not known in which order: {brief(order)}")


def _axes(mesh: Mapping[str, Any]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Returns the sizes and strides of each dimension of a mesh, which may be several flattened into one."""
    layout = attributes(mesh.get("_layout"))
    shape: tuple[Any, ...]
    stride: tuple[Any, ...]
    if isinstance(tensor := mesh.get("mesh"), TensorInfo):  # before torch 2.9
        shape, stride = tensor.shape or (), tensor.stride
    elif isinstance(axes := layout.get("axes"), tuple):
        shape, stride = (tuple(attributes(one).get(name) for one in axes) for name in ("shape", "stride"))
    else:
        said = layout.get("shape"), layout.get("stride")
        shape, stride = (one if isinstance(one, tuple) else (one,) for one in said)
    if not len(shape) == len(stride) <= MOST_MESH_DIMS:
        raise FormatError(f"a DTensor on a mesh of {brief(shape)} with stride {brief(stride)}")
    found = [(_numbers(size, "a mesh"), _numbers(step, "a mesh")) for size, step in zip(shape, stride, strict=True)]
    if any(len(size) != len(step) or 0 in size for size, step in found):
        raise FormatError(f"a DTensor on a mesh of {brief(shape)} with stride {brief(stride)}")
    return found


def _offset(at: int, sizes: Sequence[int], strides: Sequence[int]) -> int:
    """Returns how far an index of a dimension of a mesh is from its first, in its list of ranks."""
    found = 0
    for size, step in zip(reversed(sizes), reversed(strides), strict=True):
        at, rest = divmod(at, size)
        found += rest * step
    return found


def _numbers(value: Any, what: str) -> tuple[int, ...]:
    """Returns a number, or a tuple or list of a few, as a tuple. Raises: FormatError."""
    found = (value,) if type(value) is int else value
    if isinstance(found, (tuple, list)) and len(found) <= 64 and all(type(one) is int and one >= 0 for one in found):
        return tuple(found)
    raise FormatError(f"a sharded tensor with {brief(value)} for {what}")


def _refuse_other(found: Any, rank: int) -> None:
    if found != rank:
        raise FormatError(f"the name of its file says rank {rank}, and it was held by rank {brief(found)}")


# --- joining ---------------------------------------------------------------------------------------------------------


class _Joining:
    """Joins the trees of the ranks. ``said``: {what is to be known: of which keys}."""

    def __init__(self, world: int) -> None:
        self.world = world
        self.said: dict[str, list[str]] = {}
        self.made: dict[Any, TensorInfo] = {}

    def notes(self) -> Iterator[str]:
        """Yields what is to be known of the keys."""
        yield from (f"{what}: {listed(keys)}" for what, keys in self.said.items())

    def _note(self, what: str, path: Path) -> None:
        self.said.setdefault(what, []).append(path_text(path))

    def node(self, path: Path, held: Mapping[int, Any]) -> Any:
        """Returns the node at a path that these ranks hold there."""
        if len(path) > MAX_LEVELS.now():
            raise MAX_LEVELS.passed("is nested too deep to be joined", len(path))
        first = next(iter(held.values()))
        if all(map(_is_shard, held.values())):
            try:
                return self.tensor(path, held)
            except CkptoolError as error:
                error.message = f"{path_text(path)}: {error.message}"
                raise
        mappings = {rank: as_mapping(one) for rank, one in held.items()}
        if all(one is not None for one in mappings.values()):
            there: dict[Any, dict[int, Any]] = {}
            for rank, mapping in mappings.items():
                for key, value in (mapping or {}).items():
                    there.setdefault(key, {})[rank] = value
            for key, values in there.items():
                if len(values) < len(held):
                    self._note("not in the files of all ranks", (*path, key))
            return with_content(first, {key: self.node((*path, key), values) for key, values in there.items()})
        if type(first) in (list, tuple) and all(
            type(one) is type(first) and len(one) == len(first) for one in held.values()
        ):
            items = (self.node((*path, at), {rank: one[at] for rank, one in held.items()}) for at in range(len(first)))
            return type(first)(items)
        return self.other(path, held)

    def other(self, path: Path, held: Mapping[int, Any]) -> Any:
        """Returns what is not sharded: the first rank's. Raises: FormatError, UnsupportedError for shards inside."""
        rank, first = next(iter(held.items()))
        for number, one in held.items():
            if any(map(_is_shard, nodes(one))):
                if type(one) is type(first) and not isinstance(one, (list, TensorInfo)):
                    raise UnsupportedError(f"{path_text(path)}: holds sharded tensors inside of {brief(first)}")
                what = f"{path_text(path)}: rank {number} holds sharded tensors there, and another rank none, or others"
                raise FormatError(what)
            alike = type(one) is type(first)
            if isinstance(first, TensorInfo) and not (alike and (one.dtype, one.form) == (first.dtype, first.form)):
                what = f"rank {rank} has {brief(first.form)} {first.dtype}, rank {number} another tensor or none"
                raise FormatError(f"{path_text(path)}: {what}")
        if isinstance(first, TensorInfo):
            self._first_of(path, [_same(first, one) for one in list(held.values())[1:]])
        elif type(first) in (int, float, str, bool, bytes) and any(one != first for one in held.values()):
            self._first_of(path, [False])
        return first

    def _first_of(self, path: Path, same: Sequence[bool | None]) -> None:
        if False in same:
            self._note("not the same on all ranks, the first one's taken", path)
        elif same:
            self._note("replicated, the first rank's taken", path)

    def tensor(self, path: Path, held: Mapping[int, TensorInfo]) -> TensorInfo:
        """Returns the whole tensor. Raises: IncompleteError, FormatError, UnsupportedError."""
        pieces = {rank: _piece(one, rank) for rank, one in held.items()}
        (first, piece), *others = pieces.items()
        for rank, other in others:
            if (piece.form, piece.ranks) != (other.form, other.ranks):
                raise FormatError(f"rank {first} has {piece.form}, rank {rank} has {other.form}")
        if max(one.world for one in pieces.values()) > self.world or piece.ranks < 1:
            raise FormatError(f"it is of {max(piece.world, piece.ranks)} ranks, and there are files of {self.world}")
        boxes: dict[tuple[Any, Any], Box] = {}
        same: list[bool | None] = []
        for rank, other in pieces.items():
            for box in other.boxes:
                kept = boxes.setdefault(box[:2], box)
                if kept is not box and box[2].numel:
                    same.append(_same(kept[2], box[2]))
                    if piece.ranks < self.world and not same[-1]:
                        what = f"it lies on {piece.ranks} of {self.world} ranks, and a part of it on rank {rank} too"
                        raise UnsupportedError(f"{what}, not known to be the same")
        self._first_of(path, same)
        key = piece.form, tuple((offsets, part.view) for (offsets, _), (_, _, part) in boxes.items())
        if key not in self.made:
            self.made[key] = _whole(held[first], list(boxes.values()))
        return self.made[key]


def _whole(tensor: TensorInfo, boxes: list[Box]) -> TensorInfo:
    shape = tensor.shape or ()
    whole = chunks(tensor.dtype, shape, boxes)
    filled = [part for _, _, part in boxes if part.numel]
    return filled[0] if len(filled) == 1 and filled[0].shape == shape else whole


def _same(one: TensorInfo, other: TensorInfo) -> bool | None:
    """Returns whether two tensors have the same bytes, by the checksums of their storages; None if those do not say."""
    left, right = one.storage, other.storage
    if left is None or right is None or left.crc32 is None or right.crc32 is None:
        return None
    if (left.crc32, left.nbytes, left.byteorder) == (right.crc32, right.nbytes, right.byteorder):
        alike = (one.dtype, one.shape, one.stride, one.storage_offset) == (
            other.dtype, other.shape, other.stride, other.storage_offset,
        )  # fmt: skip
        return alike or None
    return False if whole_storage(one) is left and whole_storage(other) is right else None
