"""Lazy tensors: where the bytes of a tensor are, which view of them it is, or how its values are to be computed.

`Span` (bytes of a file) <- `Storage` (the memory of one or more tensors) <- `TensorInfo` (a view of it). Two tensors
whose source is the same `Storage` object share memory: tied weights, and views. A `Derived` source is computed while
it is written, by one of a fixed set of operations; an `Opaque` one is a tensor that is not one strided view.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from math import prod
from typing import Any, Literal, NamedTuple, TypeVar, dataclass_transform

from ckptool.core import dtypes
from ckptool.core.tree import Global, Leaf, PyObject, brief, parts
from ckptool.errors import FormatError, IncompleteError
from ckptool.limits import MAX_DIMS, MAX_NUMEL

T = TypeVar("T")


@dataclass_transform(frozen_default=True, eq_default=False)
def _frozen(cls: type[T]) -> type[T]:
    """Returns a dataclass that is frozen for the type checker only: really frozen ones take 1 us more each to make."""
    return dataclass(slots=True, eq=False)(cls)


class Span(NamedTuple):
    """A byte range of the file ``url``: ``nbytes`` bytes from ``offset``.

    ``member`` is None when ``offset`` is that of the first byte. Inside a zip it is the member's compression,
    and ``offset`` is that of its local header: the data begin behind a name and an extra field whose
    lengths only that header has, and reading 100,000 of them to list keys would cost more than the listing.
    ``packed`` is the member's compressed size, ``named`` the length of its name in the central directory.
    ``version`` identifies the opened file, should another replace it at its path (see `io.source.Source`).
    ``memory`` returns the bytes of a tensor that is in memory: a live model's, or a NumPy array's in a pickle.
    """

    url: str
    offset: int
    nbytes: int
    member: Literal["stored", "deflated"] | None = None
    packed: int = 0
    version: tuple[int, ...] | None = None
    memory: Callable[[], memoryview] | None = None
    named: int = 0


class Array:
    """The bytes of a pickled NumPy array: the ``memory`` of its span.

    ``nodes``: {id(tensor): (the tensor it was read as, the array's stand-in)}, so that a tensor that no operation
    changed is written as the array it was. ``beside``: the pickle has tensors of torch too.
    """

    __slots__ = ("beside", "data", "nodes")

    def __init__(self, data: bytes | bytearray | memoryview, beside: bool = False) -> None:
        self.data, self.beside = data, beside
        self.nodes: dict[int, tuple[TensorInfo, PyObject]] = {}

    def __call__(self) -> memoryview:
        return memoryview(self.data)


@_frozen
class Storage:
    """The memory of one or more tensors; the same object means the same memory.

    ``dtype`` is None for torch's UntypedStorage. ``location`` is the device tag (``cpu``, ``cuda:1``).
    ``crc32`` is the checksum of the whole span that the file records, if it does. ``key`` is its name in the file.
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
    """Values computed while they are written, in C order, in memory shared with no other tensor.

    ``cast``: the input's, converted to the tensor's dtype. ``copy``: the input's, unchanged (the shape may
    differ). ``dequantize``: a weight's, multiplied by its scales; ``args`` has how many elements share a scale along
    each dimension. ``nibbles``: rows of bytes as int8: their low halves, then the high ones, minus 8 each.
    ``cat``: the inputs', concatenated along ``dim``. ``chunks``: the inputs are boxes of the tensor, which begin at the
    indices ``args`` (see `chunks`). ``draw``: new numbers of ``shape``, specified by ``args``, a `Draw`. The others are
    an adapter's (``take``, ``mean``, ...): values of ``shape`` computed from whole inputs, see `ckptool.values.adapt`.
    """

    op: Literal["cast", "dequantize", "nibbles", "copy", "cat", "chunks", "draw", "take", "mean", "mix", "resample"]
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

    ``source`` is the index of the input; -1 means rows of zeros.
    """

    source: int
    first: int
    length: int


class Mix(NamedTuple):
    """A ``mix`` of one dimension: new index i is the sum of weight * old index over ``rows[i]``, / divisor."""

    rows: tuple[tuple[tuple[int, float], ...], ...]
    divisor: float = 1.0


class Resample(NamedTuple):
    """How a ``resample`` interpolates the dimensions ``dims``, as `torch.nn.functional.interpolate` does it.

    ``inverse``: the tensor is multiplied by the pseudoinverse of that interpolation instead (a patch embedding).
    """

    dims: tuple[int, ...]
    mode: str
    antialias: bool
    align_corners: bool = False
    inverse: bool = False


DrawKind = Literal["constant", "uniform", "normal", "trunc_normal", "orthogonal", "sparse", "dirac", "eye"]


@dataclass(frozen=True, slots=True)
class Draw:
    """The distribution of a new tensor's values; ``numbers`` are its parameters, gains and fans included:

        constant      value               uniform   a, b: from a up to but not b
        normal        mean, std           trunc_normal   mean, std, a, b
        orthogonal    gain                sparse    zeros in each column, std of the others
        dirac         groups              eye

    ``seed`` and ``key`` name the stream of random numbers: the same stream, numbers and shape give the same bytes
    with one version of numpy.
    """

    kind: DrawKind
    numbers: tuple[float, ...]
    shape: tuple[int, ...]
    seed: int = 0
    key: str = ""


class Described(NamedTuple):
    """A source that only describes a tensor: its path, and ``what`` it is, for messages. ``hash``: a sha256, or ""."""

    url: str
    what: str
    hash: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class Opaque:
    """A tensor that is not one strided view; it is listed, and written back unchanged.

    ``kind``: ``quantized``, ``sparse_coo`` (csr, csc, bsr, bsc), ``nested_strided``, ``nested_jagged``,
    ``meta`` (no bytes at all), ``dtensor_local_shard``, ``sharded_tensor_local_shards``, ``subclass``, or a type of
    GGUF's: ``Q4_K``. ``node`` is the pickled call that makes it, ``parts`` the strided tensors inside. A type that
    torch lacks is not ``in_torch``: its one part is all its bytes. ``described_in``: what describes it without values.
    """

    kind: str
    node: PyObject
    parts: tuple[TensorInfo, ...] = ()
    in_torch: bool = True
    described_in: Described | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Extras:
    """Attributes that few tensors have: lazy conjugation and negation bits, a subclass, Python attributes.

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
        """Returns the memory of a dense tensor that is stored; None for a computed or an `Opaque` one."""
        return self.source if isinstance(self.source, Storage) else None

    @property
    def foreign(self) -> str:
        """Returns the dtype or the kind that torch lacks; "" if torch can hold the tensor."""
        if isinstance(self.source, Opaque):
            return "" if self.source.in_torch else self.source.kind
        return "" if dtypes.DTYPES[self.dtype].in_torch else self.dtype

    @property
    def numel(self) -> int:
        """Returns the number of elements (of a nested tensor: of its parts)."""
        return max((part.numel for part in self.parts), default=0) if self.shape is None else prod(self.shape)

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
    def array(self) -> PyObject | None:
        """Returns the stand-in of the NumPy array that it was read from, unless an operation made this tensor."""
        memory = self.source.span.memory if isinstance(self.source, Storage) else None
        return memory.nodes.get(id(self), (None, None))[1] if isinstance(memory, Array) else None

    @property
    def is_beside(self) -> bool:
        """Returns whether it is a NumPy array in a file of torch's tensors: a random state, a mean, but no weight."""
        memory = self.source.span.memory if isinstance(self.source, Storage) else None
        return isinstance(memory, Array) and memory.beside

    @property
    def is_contiguous(self) -> bool:
        """Returns whether its elements are in C order without gaps, as `torch.Tensor.is_contiguous` does."""
        return _packed_nbytes(self.dtype, self.shape or (), self.stride) >= 0

    @property
    def is_lazy(self) -> bool:
        """Returns whether its values differ from its bytes by a conjugation or negation bit."""
        return self.extras is not None and (self.extras.conj or self.extras.neg)

    @property
    def is_whole(self) -> bool:
        """Returns whether it is all of its source's elements in C order."""
        source = self.source
        if isinstance(source, Storage):
            return _packed_nbytes(self.dtype, self.shape or (), self.stride) == source.nbytes
        return isinstance(source, Derived) and self.is_contiguous and self.numel == source.numel

    @property
    def is_closed(self) -> bool:
        """Returns whether `inside` yields nothing."""
        return self.extras is None and type(self.source) is not Opaque

    def inside(self) -> Iterator[tuple[Any, Any]]:
        """Yields the arguments of the call that makes an `Opaque` tensor, and a tensor's class and attributes."""
        if isinstance(self.source, Opaque):
            yield from parts(self.source.node)
        if self.extras is not None:
            yield from (("__class__", self.extras.subclass), ("__state__", self.extras.state))

    @property
    def described_in(self) -> Described | None:
        """Returns what only describes it; None for a tensor of a file with values."""
        return self.source.described_in if isinstance(self.source, Opaque) else None

    @property
    def form(self) -> tuple[str, object]:
        """Returns (kind, shape), which must be equal for one tensor to replace another."""
        shape = self.shape if self.shape is not None else tuple(part.shape for part in self.parts)
        return self.kind, shape

    @property
    def view(self) -> object:
        """Returns a value that is equal for tensors of the same elements of the same memory (see `shared`)."""
        conj = (self.extras.conj, self.extras.neg) if self.extras else (False, False)
        return id(self.source), self.dtype, self.shape, self.stride, self.storage_offset, conj


def quantization(tensor: TensorInfo) -> str:
    """Returns the parameters of a quantised tensor as text: its scheme, and its scale and zero point or its axis.

    The scales and zero points of channels are tensors among its ``parts``. Of any other tensor: "".
    """
    node = tensor.source.node if isinstance(tensor.source, Opaque) and tensor.kind == "quantized" else None
    given = node.args[4] if node is not None and len(node.args) > 4 else ()
    plain = [one for one in given if not isinstance(one, TensorInfo)] if isinstance(given, tuple) else []
    return " ".join(one.qualname if isinstance(one, Global) else brief(one) for one in plain)


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


# --- views: sizes, strides and offsets in elements, as in torch -----------------------------------------------------


def reach(shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """Returns the number of elements of memory from a view's first to its last inclusive, if it is not empty.

    >>> reach((2, 3), (10, 2)), reach((), ())
    (15, 1)
    """
    last = 1
    for size, step in zip(shape, stride, strict=True):
        last += (size - 1) * step
    return last


def view(tensor: TensorInfo, shape: Iterable[int], stride: Iterable[int] | None = None, offset: int = 0) -> TensorInfo:
    """Returns a view of the same memory, ``offset`` elements further on; without ``stride``, of the same stride."""
    steps = tensor.stride if stride is None else tuple(stride)
    return replace(tensor, shape=tuple(shape), stride=steps, storage_offset=tensor.storage_offset + offset)


def narrow(tensor: TensorInfo, dim: int, start: int, count: int) -> TensorInfo:
    """Returns the view of ``count`` indices from ``start`` on along a dimension."""
    shape = tensor.shape or ()
    return view(tensor, (*shape[:dim], count, *shape[dim + 1 :]), offset=start * tensor.stride[dim])


def permute(tensor: TensorInfo, dims: Sequence[int]) -> TensorInfo:
    """Returns the view with its dimensions in the order ``dims``."""
    shape = tensor.shape or ()
    return view(tensor, [shape[dim] for dim in dims], [tensor.stride[dim] for dim in dims])


def unflatten(tensor: TensorInfo, dim: int, sizes: tuple[int, ...]) -> TensorInfo:
    """Returns the view with the dimension ``dim`` split into several of ``sizes``, as `torch.unflatten` does."""
    shape, stride = tensor.shape or (), tensor.stride
    steps = [stride[dim] * step for step in contiguous_stride(sizes)]
    return view(tensor, (*shape[:dim], *sizes, *shape[dim + 1 :]), (*stride[:dim], *steps, *stride[dim + 1 :]))


def shaped(tensor: TensorInfo, shape: tuple[int, ...]) -> TensorInfo:
    """Returns a contiguous tensor reshaped to a shape of as many elements."""
    return replace(tensor, shape=shape, stride=contiguous_stride(shape))


def computed_as(tensor: TensorInfo, source: Derived, dtype: str | None = None) -> TensorInfo:
    """Returns the tensor (its shape, class and attributes) with computed values and no lazy bits."""
    extras = tensor.extras and replace(tensor.extras, conj=False, neg=False)
    stride = contiguous_stride(tensor.shape or ())
    return replace(tensor, dtype=dtype or tensor.dtype, stride=stride, storage_offset=0, source=source, extras=extras)


def computed(dtype: str, shape: tuple[int, ...], source: Derived) -> TensorInfo:
    """Returns a plain tensor of computed values."""
    return TensorInfo(dtype, shape, contiguous_stride(shape), 0, source)


def copied(tensor: TensorInfo, shape: tuple[int, ...] | None = None) -> TensorInfo:
    """Returns a copy of a tensor in memory of its own, reshaped if ``shape`` is given."""
    return computed(tensor.dtype, (tensor.shape or ()) if shape is None else shape, Derived("copy", (tensor,)))


def cat(tensors: Sequence[TensorInfo], dim: int) -> TensorInfo:
    """Returns tensors of one dtype concatenated along a dimension."""
    shape = tensors[0].shape or ()
    total = sum((tensor.shape or ())[dim] for tensor in tensors)
    return computed(tensors[0].dtype, (*shape[:dim], total, *shape[dim + 1 :]), Derived("cat", tuple(tensors), dim))


Box = tuple[tuple[int, ...], tuple[int, ...], "TensorInfo"]
"""A part of a tensor: its first index and its size along every dimension, and the tensor of its elements."""


def chunks(dtype: str, shape: tuple[int, ...], boxes: Sequence[Box], location: str | None = None) -> TensorInfo:
    """Returns one tensor made of boxes, in any order, which together cover it; ``location`` None: where the first is.

    Raises: FormatError for boxes that overlap, reach outside, or have another dtype or shape than declared;
    IncompleteError where a part of the tensor is in none of them.
    """
    for offsets, sizes, tensor in boxes:
        if (tensor.dtype, tensor.shape) != (dtype, sizes) or isinstance(tensor.source, Opaque):
            raise FormatError(
                f"a part of {brief(sizes)} of a {dtype} tensor is held by a {tensor.kind} {tensor.dtype} tensor of "
                f"shape {brief(tensor.shape)}"
            )
        if not len(offsets) == len(sizes) == len(shape) or any(
            not 0 <= at <= at + size <= whole for at, size, whole in zip(offsets, sizes, shape, strict=True)
        ):
            raise FormatError(
                f"a part of {brief(sizes)} at {brief(offsets)} reaches outside a tensor of shape {brief(shape)}"
            )
    filled = [box for box in boxes if box[2].numel]
    _refuse_overlaps(filled, len(shape))
    missing = prod(shape) - sum(tensor.numel for _, _, tensor in filled)
    if missing:
        raise IncompleteError(f"{missing:,} elements of a tensor of shape {brief(shape)} are in none of its parts")
    inputs = tuple(tensor for _, _, tensor in filled)
    return computed(dtype, shape, Derived("chunks", inputs, 0, shape, tuple(box[0] for box in filled), location))


def _refuse_overlaps(boxes: Sequence[Box], dims: int) -> None:
    """Raises FormatError if two boxes share elements.

    Sorts them along the dimension with the most distinct first indices, and compares each with those that have not
    ended there: few, as sharding splits tensors along one or two dimensions.
    """
    if len(boxes) > 1 and not dims:
        raise FormatError("a scalar has several parts")
    along = max(range(dims), key=lambda dim: len({offsets[dim] for offsets, _, _ in boxes}), default=0)
    begun: list[Box] = []
    for box in sorted(boxes, key=lambda box: box[0][along : along + 1]):
        offsets, sizes, _ = box
        begun = [old for old in begun if old[0][along] + old[1][along] > offsets[along]]
        for other, extent, _ in begun:
            if all(
                at < start + count and start < at + size
                for at, size, start, count in zip(offsets, sizes, other, extent, strict=True)
            ):
                one, two = f"{brief(sizes)} at {brief(offsets)}", f"{brief(extent)} at {brief(other)}"
                raise FormatError(f"two parts of a tensor overlap: {one}, {two}")
        begun.append(box)


def storage_range(tensor: TensorInfo) -> tuple[Storage, int, int] | None:
    """Returns (storage, offset in bytes, unit of the byte swap; 1: none) of a tensor that is one range of a storage.

    None for one that is not contiguous, has lazy bits, or no storage.
    """
    source = tensor.source
    if not isinstance(source, Storage) or tensor.is_lazy or not tensor.is_contiguous:
        return None
    row = dtypes.DTYPES[tensor.dtype]
    return source, tensor.storage_offset * row.bits // 8, row.swap_unit if source.byteorder == "big" else 1


def plain_range(tensor: TensorInfo) -> tuple[Span, int, int] | None:
    """Returns (span, offset in it, nbytes) of a tensor whose bytes in its file are the bytes to write; else None."""
    found = storage_range(tensor)
    if found is None or found[2] > 1 or found[0].span.member == "deflated" or found[0].span.memory is not None:
        return None
    return found[0].span, found[1], tensor.nbytes


def whole_storage(tensor: TensorInfo) -> Storage | None:
    """Returns the storage whose bytes are exactly the tensor's bytes to write; None if there is none."""
    found = storage_range(tensor)
    return found[0] if found is not None and found[2] == 1 and tensor.is_whole else None


FORMS = 256
"""Size of the caches by shape. Hostile shapes may share a hash: then each look-up compares that many keys."""


@lru_cache(FORMS)
def _nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Returns the bytes of a tensor. Cached, as the tensors of a file have few distinct shapes."""
    return dtypes.nbytes_of(dtype, prod(shape))


@lru_cache(FORMS)
def _packed_nbytes(dtype: str, shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """Returns the bytes of a contiguous view, -1 for any other. Cached as `_nbytes` is."""
    numel = prod(shape)
    dense = zip(shape, stride, contiguous_stride(shape), strict=True)
    if numel and any(size != 1 and step != expected for size, step, expected in dense):
        return -1
    return dtypes.nbytes_of(dtype, numel)


def _no_build(self: object, state: object) -> None:
    """Refuses a pickle's BUILD, in place of the ``__setstate__`` of slotted dataclasses, which sets any field."""
    if isinstance(self, TensorInfo) and self.is_parameter and isinstance(state, tuple) and len(state) == 3:
        return  # torch 0.2 and 0.3 repeat (requires_grad, volatile, hooks) behind a Parameter
    raise FormatError("the pickle builds a tensor or a storage with a state of its own")


def _by_fields(self: Any) -> tuple[Any, ...]:
    """Copies and pickles these classes through their constructors, without ``__setstate__``."""
    return type(self), tuple(getattr(self, one.name) for one in fields(self))


for _class in (Storage, Derived, Opaque, Extras, TensorInfo):
    _class.__setstate__ = _no_build  # type: ignore[union-attr]
    _class.__reduce__ = _by_fields  # type: ignore[method-assign]
