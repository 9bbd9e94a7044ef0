"""The core: a checkpoint is the tree `torch.load` would have returned, with a `TensorInfo` in place of every tensor.

Nothing here reads a byte. A format builds these objects from headers, an operation makes new ones from
old ones, and a format's writer moves the bytes they point at:

    Checkpoint ── tree ──> dict, list, PyObject ... ──> TensorInfo ── source ──┬─> Storage ──> Span
                                                                               ├─> Derived  (computed while writing)
                                                                               └─> Opaque   (sparse, quantised, ...)

Two tensors whose source is the same `Storage` object share memory: tied weights, and views.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from math import prod
from operator import attrgetter
from types import NoneType
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar, dataclass_transform

from ckptool import dtypes, modules
from ckptool.errors import CollisionError, FormatError, IncompleteError, UnsupportedError
from ckptool.keys import EMA, is_counter
from ckptool.limits import MAX_DIMS, MAX_KEY, MAX_KEYS, MAX_NUMEL
from ckptool.optimizers import is_optimizer
from ckptool.tree import (
    Leaf,
    Path,
    PyObject,
    as_mapping,
    children,
    key_text,
    least_to_refuse,
    ordered_dict,
    parts,
    path_text,
    refuse_key,
    replaced,
    walk,
)

T = TypeVar("T")


@dataclass_transform(frozen_default=True, eq_default=False)
def _frozen(cls: type[T]) -> type[T]:
    """Makes a dataclass that the type checker holds to be frozen: really frozen ones take 1 us more to make, each."""
    return dataclass(slots=True, eq=False)(cls)


class Span(NamedTuple):
    """A range of ``nbytes`` bytes of the file ``url``.

    ``member`` is None when ``offset`` is that of the first byte. Inside a zip it says how the member is
    stored, and ``offset`` is that of its local header: the payload begins behind a name and padding whose
    lengths only that header knows, and reading 100,000 of them to list keys would cost more than the listing.
    ``named`` is how long the name in it must be: what the archive's directory says.
    ``version`` tells the file that was opened from another that has taken its name since (see `files.File`).
    ``memory`` gives the bytes of what is in no file at all: a live model's.
    """

    url: str
    offset: int
    nbytes: int
    member: Literal["stored", "deflated"] | None = None
    packed: int = 0
    version: tuple[int, ...] | None = None
    memory: Callable[[], memoryview] | None = None
    named: int = 0


@_frozen
class Storage:
    """The memory behind one or more tensors; the same object means the same memory.

    ``dtype`` is None for torch's UntypedStorage. ``location`` is the device tag (``cpu``, ``cuda:1``).
    ``crc32`` is that of the whole span as the file records it, None where it does not. ``key`` is its name there.
    """

    span: Span
    dtype: str | None = None
    location: str = "cpu"
    byteorder: Literal["little", "big"] = "little"
    crc32: int | None = None
    key: str = ""

    @property
    def nbytes(self) -> int:
        return self.span.nbytes


@dataclass(frozen=True, slots=True, eq=False)
class Derived:
    """Values computed while writing, which lie in C order in memory of their own.

    ``cast``: the input's, converted to the tensor's dtype. ``copy``: the input's as they are (the shape may
    differ). ``cat``: the inputs', put together along the dimension ``dim``. ``draw``: no inputs; ``args`` is the
    `Draw` that says which numbers, ``shape`` theirs. Any other is an adapter's (``take``, ``mean``,
    ``mix``, ``resample``): values of ``shape`` computed from whole inputs, see `ckptool.adapted`.
    """

    op: Literal["cast", "copy", "cat", "draw", "take", "mean", "mix", "resample"]
    inputs: tuple[TensorInfo, ...]
    dim: int = 0
    shape: tuple[int, ...] | None = None
    args: Any = None
    location: str | None = None

    @property
    def numel(self) -> int:
        """Returns how many elements there are."""
        return sum(tensor.numel for tensor in self.inputs) if self.shape is None else prod(self.shape)


class Run(NamedTuple):
    """Rows of a ``take``: ``length`` rows of an input from ``first`` on (of an input of one row: that row again).

    ``source`` counts the inputs; -1 is no input but rows of zeros.
    """

    source: int
    first: int
    length: int


class Mix(NamedTuple):
    """What a ``mix`` makes of one dimension: index i is the sum of weight * old index over ``rows[i]``, / divisor."""

    rows: tuple[tuple[tuple[int, float], ...], ...]
    divisor: float = 1.0


class Resample(NamedTuple):
    """How a ``resample`` interpolates the dimensions ``dims``, as `torch.nn.functional.interpolate` does it."""

    dims: tuple[int, ...]
    mode: str
    antialias: bool


DrawKind = Literal["constant", "uniform", "normal", "trunc_normal", "orthogonal", "sparse", "dirac", "eye"]


@dataclass(frozen=True, slots=True)
class Draw:
    """The values of one tensor, said completely; ``numbers`` are resolved (gains and fans already in them):

        constant      value               uniform   a, b: from a up to but not b
        normal        mean, std           trunc_normal   mean, std, a, b
        orthogonal    gain                sparse    zeros in each column, std of the others
        dirac         groups              eye

    ``seed`` and ``key`` name the stream of random numbers: the same stream, numbers and shape give the same bytes.
    """

    kind: DrawKind
    numbers: tuple[float, ...]
    shape: tuple[int, ...]
    seed: int = 0
    key: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class Opaque:
    """A tensor that is not one strided view; it is listed, and passes through as the file built it.

    ``kind``: ``quantized``, ``sparse_coo`` (csr, csc, bsr, bsc), ``nested_strided``, ``nested_jagged``,
    ``meta`` (no bytes at all), ``dtensor_local_shard``, ``subclass``. ``parts`` are the strided tensors inside.
    """

    kind: str
    node: PyObject
    parts: tuple[TensorInfo, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Extras:
    """What few tensors carry: lazy conjugation and negation bits, a subclass, Python attributes.

    ``conj`` and ``neg`` change values without changing bytes.
    ``subclass`` and ``state`` are the class and attributes that `_rebuild_from_type_v2` would restore.
    """

    conj: bool = False
    neg: bool = False
    subclass: Any = None
    state: Any = None


@_frozen
class TensorInfo(Leaf):
    """Everything about a tensor but its values. ``stride`` and ``storage_offset`` count elements, as in torch."""

    dtype: str
    shape: tuple[int, ...] | None
    stride: tuple[int, ...]
    storage_offset: int
    source: Storage | Derived | Opaque
    requires_grad: bool = False
    is_parameter: bool = False
    extras: Extras | None = None

    @property
    def kind(self) -> str:
        """Returns ``dense``, or what kind of `Opaque` it is."""
        return self.source.kind if isinstance(self.source, Opaque) else "dense"

    @property
    def storage(self) -> Storage | None:
        """Returns the memory of a dense tensor; None where there is none, or not one."""
        return self.source if isinstance(self.source, Storage) else None

    @property
    def numel(self) -> int:
        """Returns the number of elements (of a nested tensor: of its parts)."""
        if self.shape is None:
            return max((part.numel for part in self.parts), default=0)
        return prod(self.shape)

    @property
    def parts(self) -> tuple[TensorInfo, ...]:
        """Returns the strided tensors an `Opaque` tensor is made of; () for a dense one."""
        return self.source.parts if isinstance(self.source, Opaque) else ()

    @property
    def nbytes(self) -> int:
        """Returns the bytes of its own elements (not of its storage); of an `Opaque` tensor those of its parts."""
        if isinstance(self.source, Opaque):
            return sum(part.nbytes for part in self.parts)
        return _nbytes(self.dtype, self.shape or ())

    @property
    def location(self) -> str:
        """Returns the device tag of its storage."""
        if isinstance(self.source, Storage):
            return self.source.location
        if isinstance(self.source, Derived) and self.source.location is not None:
            return self.source.location
        inputs = self.source.inputs if isinstance(self.source, Derived) else self.source.parts
        return inputs[0].location if inputs else "meta" if self.kind == "meta" else "cpu"

    def storages(self) -> Iterator[Storage]:
        """Yields the storages its values come from."""
        if isinstance(self.source, Storage):
            yield self.source
        else:
            for tensor in self.source.inputs if isinstance(self.source, Derived) else self.source.parts:
                yield from tensor.storages()

    @property
    def is_contiguous(self) -> bool:
        """Returns whether its elements lie in C order without gaps, as `torch.Tensor.is_contiguous` does."""
        return self.numel == 0 or _dense_in_c_order(self.shape or (), self.stride)

    @property
    def is_whole(self) -> bool:
        """Returns whether it is all of its source's elements in C order."""
        source = self.source
        if isinstance(source, Storage):
            return _packed_nbytes(self.dtype, self.shape or (), self.stride) == source.nbytes
        return isinstance(source, Derived) and self.is_contiguous and self.numel == source.numel

    @property
    def is_closed(self) -> bool:
        """Returns whether there is nothing `inside`."""
        return self.extras is None and type(self.source) is not Opaque

    def inside(self) -> Iterator[tuple[Any, Any]]:
        """Yields what the file built it from, where that is more than one view: parts, attributes."""
        if isinstance(self.source, Opaque):
            yield from parts(self.source.node)
        if self.extras is not None:
            yield from (("__class__", self.extras.subclass), ("__state__", self.extras.state))

    @property
    def form(self) -> tuple[str, object]:
        """Returns what must be equal for one tensor to take another's place: kind and shape."""
        shape = self.shape if self.shape is not None else tuple(part.shape for part in self.parts)
        return self.kind, shape

    @property
    def view(self) -> object:
        """Returns what is equal for two tensors that are the same elements of the same memory (see `shared`)."""
        conj = (self.extras.conj, self.extras.neg) if self.extras else (False, False)
        return id(self.source), self.dtype, self.shape, self.stride, self.storage_offset, conj


def is_countable(shape: tuple[int, ...]) -> bool:
    """Returns whether a shape is within `MAX_DIMS` and `MAX_NUMEL`; cheap for any sizes that are not negative."""
    count = 1
    for size in shape if len(shape) <= MAX_DIMS else (MAX_NUMEL + 1,):
        count *= max(size, 1)
        if count > MAX_NUMEL:
            return False
    return True


def contiguous_stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns torch's C-order stride, in elements (a dimension of size 0 counts as 1).

    >>> contiguous_stride((2, 3, 4)), contiguous_stride(())
    ((12, 4, 1), ())
    """
    stride = []
    step = 1
    for size in reversed(shape):
        stride.append(step)
        step *= max(size, 1)
    return tuple(reversed(stride))


FORMS = 256
"""Forms of tensors that are remembered. Large numbers may share a hash: then each is compared with so many others."""


@lru_cache(FORMS)
def _nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Returns the bytes of so many elements. Few shapes are met often."""
    return dtypes.nbytes_of(dtype, prod(shape))


@lru_cache(FORMS)
def _packed_nbytes(dtype: str, shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """Returns the bytes of a view that lies in C order without gaps, -1 for any other. Few forms are met often."""
    numel = prod(shape)
    return dtypes.nbytes_of(dtype, numel) if numel == 0 or _dense_in_c_order(shape, stride) else -1


def _dense_in_c_order(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    expected = 1
    for size, step in zip(reversed(shape), reversed(stride), strict=True):
        if size != 1:
            if step != expected:
                return False
            expected *= size
    return True


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint file (or directory of shards) with every tensor left where it is.

    ``root`` is the path to the weights in ``tree``. ``metadata`` is safetensors' ``__metadata__``.
    ``nbytes`` is the size of the file(s). ``names`` are all classes and functions its pickle names.
    ``problems`` says where a sharded checkpoint contradicts its own index; ``broken`` whether tensors are missing.
    """

    tree: Any
    root: Path = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    format: str = "memory"
    url: str = ""
    nbytes: int = 0
    names: tuple[tuple[str, str], ...] = ()
    problems: tuple[str, ...] = ()
    broken: bool = False
    _cache: dict[Path, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    to_torch: ClassVar[Callable[..., Any]]
    """Returns the tree with real tensors (see `ckptool.data.to_torch`, which the package binds here)."""

    def require_whole(self) -> None:
        """Raises IncompleteError if tensors are missing from a sharded checkpoint: nothing may be built on it."""
        if self.broken:
            raise IncompleteError("; ".join(self.problems), self.url)

    def at(self, path: Path) -> Any:
        """Returns the node at ``path``. Raises: FormatError if the tree has no such place."""
        node = self.tree
        for step in path:
            found = [child for name, child in children(node) if name == step and type(name) is type(step)]
            if not found:
                raise FormatError(f"no {path_text(path)!r} in the checkpoint's tree", self.url)
            node = found[0]
        return node

    def entries(self) -> dict[str, tuple[Path, Any]]:
        """Returns {key: (path below root, value)} of the dict at ``root``, objects that are no tensors included.

        An nn.Module stand-in gives its state_dict; a tree without any tensor directly at root is flattened with "/",
        optimizer states and averaged copies (EMA) left out. Made once: not to be changed.
        """
        if self.root not in self._cache:
            self._cache[self.root] = _entries(self.at(self.root), self.url)
        found: dict[str, tuple[Path, Any]] = self._cache[self.root]
        return found

    def state_dict(self) -> dict[str, TensorInfo]:
        """Returns {key: TensorInfo} at ``root``, in the file's order: the keys `model.state_dict()` would give."""
        return {key: value for key, (_, value) in self.entries().items() if isinstance(value, TensorInfo)}

    def hidden(self) -> dict[str, dict[str, TensorInfo]]:
        """Returns {key: {path inside: tensor}} of what at ``root`` is no tensor itself and holds some.

        Packed parameters of quantised modules and ``_extra_state`` are such: weights that no state_dict key names.
        """
        found: dict[str, dict[str, TensorInfo]] = {}
        for key, (_, value) in self.entries().items():
            if not isinstance(value, TensorInfo):
                inner = {
                    path_text(path): node
                    for path, node in walk(value, closed=is_optimizer)
                    if isinstance(node, TensorInfo)
                }
                if inner:
                    found[key] = inner
        return found

    def tensors(self) -> Iterator[tuple[Path, TensorInfo]]:
        """Yields (path, tensor) for all tensors of the tree, optimizer and EMA copies included.

        Below an nn.Module these are the ones of its state_dict, each under its dotted key.
        """
        for path, node in walk(self.tree, closed=modules.is_module):
            if isinstance(node, TensorInfo):
                yield path, node
            elif modules.is_module(node):
                for key, value in modules.state_dict(node).items():
                    if isinstance(value, TensorInfo):
                        yield (*path, key), value

    def leaves(self) -> Iterator[tuple[Path, Any]]:
        """Yields (path, object) for everything that is neither a tensor nor a container of others."""
        for path, node in walk(self.tree):
            if not isinstance(node, TensorInfo) and next(children(node), None) is None:
                yield path, node

    def shared(self) -> list[list[str]]:
        """Returns the groups of two or more keys at root that are the same elements of one storage: tied weights.

        Empty tensors never count as tied. Other views of one storage are not tied: see `overlapping`.
        """
        tensors = self.state_dict()
        times = Counter(map(id, map(attrgetter("source"), tensors.values())))
        if len(times) == len(tensors):  # no memory is shared at all
            return []
        groups: dict[object, list[str]] = {}
        for key, tensor in tensors.items():
            if times[id(tensor.source)] > 1 and tensor.numel and not isinstance(tensor.source, Opaque):
                groups.setdefault(tensor.view, []).append(key)
        return [keys for keys in groups.values() if len(keys) > 1]

    def with_state_dict(self, tensors: Mapping[str, TensorInfo]) -> Checkpoint:
        """Returns a checkpoint with these tensors at root; all else is the same objects.

        Keys keep the order of ``tensors``; objects at root that are no tensors keep their place among them.
        An nn.Module becomes the OrderedDict that its `state_dict()` would be. ``_metadata`` follows.
        Raises: UnsupportedError if root is a list or a nest of dicts and the keys change there.
        """
        node = self.at(self.root)
        old = self.entries()
        if modules.is_module(node):
            made: Any = ordered_dict(detached(tensors), modules.metadata(node))
            made.state = _pruned_state(made.state, {}, old, tensors)
        elif is_flat(node):
            names = {key: path[0] for key, (path, _) in old.items()}
            mapping = _merged(old, names, tensors)
            if isinstance(node, PyObject):
                made = node.with_mapping(mapping, _pruned_state(node.state, names, old, tensors))
            else:
                made = mapping
        else:
            if list(tensors) != [key for key, (_, value) in old.items() if isinstance(value, TensorInfo)]:
                raise UnsupportedError(
                    "its weights are spread over several nested containers: choose one with --root", self.url
                )
            made = node
            for key, tensor in tensors.items():
                if tensor is not old[key][1]:
                    made = _with_tensor(made, old[key][0], tensor, self.url)
        return replace(self, tree=replaced(self.tree, self.root, made))


def detached(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Returns tensors as `Module.state_dict()` gives them: no parameters, no gradients; one object stays one object."""
    made: dict[int, Any] = {}
    for value in tensors.values():
        if isinstance(value, TensorInfo) and id(value) not in made:
            plain = not (value.is_parameter or value.requires_grad)
            made[id(value)] = value if plain else replace(value, is_parameter=False, requires_grad=False)
    return {key: made.get(id(value), value) for key, value in tensors.items()}


def is_flat(node: object) -> bool:
    """Returns whether a node is a dict with tensors directly in it (an empty dict is flat too)."""
    mapping = as_mapping(node)
    return mapping is not None and (not mapping or any(isinstance(value, TensorInfo) for value in mapping.values()))


def _with_tensor(node: Any, path: Path, tensor: TensorInfo, url: str) -> Any:
    try:
        return replaced(node, path, tensor)
    except UnsupportedError as error:
        raise UnsupportedError(f"{error.message}: choose where its weights are with --root", url) from error


def _entries(node: object, url: str) -> dict[str, tuple[Path, Any]]:
    if modules.is_module(node):
        return {key: ((key,), value) for key, value in modules.state_dict(node).items()}
    found: dict[str, tuple[Path, Any]] = {}
    total = 0
    longest, most, least = MAX_KEY.now(), MAX_KEYS.now(), least_to_refuse()
    mapping = as_mapping(node) or {}
    if set(map(type, mapping)) == {str} and is_flat(node):  # nearly always
        if max(map(len, mapping)) >= least:
            for name in mapping:
                refuse_key(name, url)
        return {name: ((name,), value) for name, value in mapping.items()}
    if is_flat(node):
        pairs: Iterator[tuple[Path, Any]] = (((name,), value) for name, value in mapping.items())
    else:
        pairs = _nested_entries(node)
    times: Counter[str] = Counter()
    for path, value in pairs:
        steps = [key_text(step) for step in path]
        if len(steps) > 1 and (length := sum(map(len, steps)) + len(steps) - 1) > longest:
            what = f"a key put together from the names above it has {length:,} characters"
            raise MAX_KEY.passed(what, length, url)
        key = "/".join(steps)
        if len(key) >= least:
            refuse_key(key, url)
        if len(steps) > 1:
            total += len(key)
            if total > most:
                raise MAX_KEYS.passed("its keys have too many characters, put together", path=url)
        if key in found and all(isinstance(step, (str, int, float, NoneType)) for step in path):
            raise CollisionError(f"two keys read {key!r} (one of them is no string)", url)
        while key in found:  # objects that are shown alike
            times[key] += 1
            key = f"{key} ({times[key] + 1})"
        found[key] = path, value
    return found


def _nested_entries(top: object) -> Iterator[tuple[Path, Any]]:
    """Yields (path, value) below a nest of containers, but not of optimizer states and averaged copies."""
    for path, node in walk(top, closed=lambda node: is_optimizer(node) or modules.is_module(node)):
        if path and path[0] in EMA:
            continue
        if modules.is_module(node):
            yield from (((*path, key), value) for key, value in modules.state_dict(node).items())
        elif isinstance(node, TensorInfo) or next(children(node), None) is None:
            yield path, node


def _merged(
    old: Mapping[str, tuple[Path, Any]], names: Mapping[str, Any], tensors: Mapping[str, TensorInfo]
) -> dict[Any, Any]:
    """Returns the new content: tensors in their order, each non-tensor behind the key it stood behind."""
    others: dict[str | None, list[str]] = {}
    last: str | None = None
    for key, (_, value) in old.items():
        if not isinstance(value, TensorInfo):
            others.setdefault(last, []).append(key)
        elif key in tensors:
            last = key
    mapping: dict[Any, Any] = {}
    for anchor in (None, *tensors):
        if anchor is not None:
            mapping[names.get(anchor, anchor)] = tensors[anchor]
        for key in others.get(anchor, ()):
            mapping[names[key]] = old[key][1]
    return mapping


def _pruned_state(state: Any, names: Mapping[str, Any], old: Mapping[str, Any], new: Mapping[str, Any]) -> Any:
    """Returns a state_dict's state with ``_metadata`` fit for the keys that are left.

    BatchNorm's version 2 promises a ``num_batches_tracked``; where that key was dropped the module's entry
    goes too, or a strict `load_state_dict` would call it missing.
    """
    versions = as_mapping(state.get("_metadata")) if isinstance(state, dict) else None
    if not versions:
        return state
    gone = {key.rpartition(".")[0] for key in old if is_counter(key) and key not in new}
    if not gone & versions.keys():
        return state
    kept = {name: entry for name, entry in versions.items() if name not in gone}
    return {**state, "_metadata": ordered_dict(kept)}


def _no_build(self: object, state: object) -> None:
    """Stands between a pickle's BUILD and the field-setting ``__setstate__`` that frozen slotted dataclasses get."""
    if isinstance(self, TensorInfo) and self.is_parameter and isinstance(state, tuple) and len(state) == 3:
        return  # torch 0.2 and 0.3 repeat (requires_grad, volatile, hooks) behind a Parameter
    raise FormatError("the pickle builds a tensor or a storage with a state of its own")


def _by_fields(self: Any) -> tuple[Any, ...]:
    """Copies and pickles these classes through their constructors, which leaves ``__setstate__`` to `_no_build`."""
    return type(self), tuple(getattr(self, one.name) for one in fields(self))


for _class in (Storage, Derived, Opaque, Extras, TensorInfo):
    _class.__setstate__ = _no_build  # type: ignore[union-attr]
    _class.__reduce__ = _by_fields  # type: ignore[method-assign]
