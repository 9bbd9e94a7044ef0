"""Decodes NumPy's arrays in a pickle into tensors whose bytes are in memory.

    _reconstruct(ndarray, (0,), b"b")    BUILD (1, shape, dtype, is_fortran, bytes)
    _frombuffer(bytes, dtype, shape, order)                                  protocol 5
    dtype("f4", False, True)             BUILD (3, "<", None, None, None, -1, -1, 0)

Below protocol 3 the bytes are ``_codecs.encode(text, "latin1")``; Python 2 wrote a string. Arrays of objects, of text,
of dates, with named fields or of a subclass stay stand-ins (`PyObject`), as do scalars.
Sources: ``array_reduce`` and ``array_setstate`` in ``numpy/_core/src/multiarray/methods.c``, ``_frombuffer`` in
``numpy/_core/numeric.py`` of numpy 2.4.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from math import prod
from typing import Any, Literal

from ckptool.core.dtypes import DTYPES
from ckptool.core.tensor import Array, Span, Storage, TensorInfo, contiguous_stride, is_countable
from ckptool.core.tree import Global, PyObject, brief, nodes
from ckptool.errors import FormatError
from ckptool.limits import MAX_DIMS

_RECONSTRUCT = {(f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")}
SCALAR = {(f"numpy.{core}.multiarray", "scalar") for core in ("core", "_core")}
_FROM_BUFFER = {(f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")}

_NAMES = {
    "f8": "float64", "f4": "float32", "f2": "float16", "c8": "complex64", "c16": "complex128", "b1": "bool",
    "i8": "int64", "i4": "int32", "i2": "int16", "i1": "int8", "u8": "uint64", "u4": "uint32", "u2": "uint16",
    "u1": "uint8",
}  # fmt: skip
"""numpy's dtype -> torch's."""

ByteOrder = Literal["little", "big"]

_PLAIN = (None, None, None, -1, -1, 0)
"""The end of the state of a dtype without fields, sub-arrays and metadata."""

_SHARED = 1000
"""Above this many bytes numpy keeps the pickle's object, so arrays made of one object share memory; else it copies."""


def with_tensors(top: Any, names: Collection[tuple[str, str]], span: Span, *, keep: bool) -> Any:
    """Returns the tree with a tensor for every array in its dicts, lists and tuples, which are changed in place.

    ``span`` has the url of their file. With ``keep`` an unchanged tensor can be written as the array it was. ``names``
    are those of the whole pickle. Raises: FormatError for an array whose shape, dtype and bytes contradict each other.
    """
    if (_RECONSTRUCT | _FROM_BUFFER | SCALAR).isdisjoint(names):
        return top
    _keep_bytes(nodes(top))
    beside = any(qualname.startswith("_rebuild_") for _, qualname in names)
    return _Replacing(span, keep, beside).all(top)


def tensor_of(node: PyObject) -> TensorInfo | None:
    """Returns the tensor of a single array's stand-in, which is to be no array any more; None for anything else."""
    _keep_bytes([node])
    return _Replacing(Span("", 0, 0), keep=False, beside=False).array(node)


def _keep_bytes(found: Iterable[Any]) -> None:
    """Makes bytes of the strings in which Python 2 pickled the data of arrays and scalars."""
    made: dict[tuple[int, int], tuple[str, bytes | str]] = {}  # one object for all that share one
    for node in found:
        if not isinstance(node, PyObject):
            continue
        name, state = (node.module, node.qualname), node.state
        if name in SCALAR and len(node.args) == 2 and isinstance(text := node.args[1], str):
            node.args = node.args[0], _as_bytes(text, itemsize(node.args[0]), made)
        elif (
            name in _RECONSTRUCT and isinstance(state, tuple) and len(state) == 5 and isinstance(text := state[4], str)
        ):
            nbytes = prod(state[1]) * itemsize(state[2]) if _is_shape(state[1]) else 0
            node.state = (*state[:4], _as_bytes(state[4], nbytes, made))


def _as_bytes(text: str, nbytes: int, made: dict[tuple[int, int], tuple[str, bytes | str]]) -> bytes | str:
    """Returns the ``nbytes`` bytes that `pickling.load` made this text of; the text itself where it has no such length.

    Text that is not ASCII is longer in UTF-8 than in Latin-1, so the length says which of the two the codec found.
    """
    if (id(text), nbytes) not in made:
        encoded = text.encode(*(("latin1", "replace") if len(text) == nbytes else ("utf-8", "surrogatepass")))
        made[id(text), nbytes] = text, encoded if len(encoded) == nbytes else text
    return made[id(text), nbytes][1]


def itemsize(kind: object) -> int:
    """Returns the bytes of an element of a pickled dtype, 0 for objects and what is no dtype."""
    name = kind.args[0] if isinstance(kind, PyObject) and kind.qualname == "dtype" and kind.args else None
    found = _ITEM.fullmatch(name) if isinstance(name, str) else None
    return int(found[2]) * (4 if found[1] == "U" else 1) if found else 0


_ITEM = re.compile(r"([bifcuSUVMm])(\d{1,9})")


class _Replacing:
    """One pass over a tree. ``made``: {id(node): (node, its replacement)}, where the node keeps the id valid."""

    def __init__(self, span: Span, keep: bool, beside: bool) -> None:
        self.span, self.keep, self.beside = span, keep, beside
        self.made: dict[int, tuple[Any, Any]] = {}
        self.decoded: dict[int, tuple[Any, bytes | bytearray]] = {}
        self.memories: dict[tuple[int, str, str], tuple[Storage, Array]] = {}
        self.left: list[Any] = []
        self.met: set[int] = set()

    def all(self, top: Any) -> Any:
        made = self.new(top)
        while self.left:
            node = self.left.pop()
            pairs = enumerate(node) if isinstance(node, list) else node.items()
            for step, value in pairs:
                found = self.new(value)
                if found is not value:
                    node[step] = found
        return made

    def new(self, node: Any) -> Any:
        """Returns a node's replacement; lists and dicts are changed in place, later."""
        kind = type(node)
        if kind is tuple:
            return self.rebuilt(node)
        if kind is dict or kind is list:
            self.enter(node)
        elif isinstance(node, PyObject):
            if id(node) not in self.made:
                self.made[id(node)] = node, self.array(node) or node
            found = self.made[id(node)][1]
            if found is node:
                node.pairs = None  # a cache of items that are replaced now
                for content in (node.mapping, *(node.args if node.module == "collections" else ())):
                    if isinstance(content, (dict, list)):
                        self.enter(content)
            return found
        return node

    def enter(self, node: Any) -> None:
        if id(node) not in self.met:
            self.met.add(id(node))
            self.left.append(node)

    def rebuilt(self, top: tuple[Any, ...]) -> Any:
        """Returns a tuple with its arrays replaced, nested tuples' too; the same object if it has none."""
        trail = [top]
        while trail:
            node = trail[-1]
            if id(node) in self.made:
                trail.pop()
            elif inner := [part for part in node if type(part) is tuple and id(part) not in self.made]:
                trail += inner
            else:
                parts = tuple(self.made[id(part)][1] if type(part) is tuple else self.new(part) for part in node)
                same = all(one is other for one, other in zip(parts, node, strict=True))
                self.made[id(node)] = node, node if same else parts
        return self.made[id(top)][1]

    def array(self, node: PyObject) -> TensorInfo | None:
        """Returns the tensor of an array's stand-in; None for anything else."""
        found = array_call(node)
        if found is None:
            return None
        raw, kind, shape, order, axes = found
        row = dtype_of(kind)
        if row is None:
            return None
        dtype, byteorder = row
        shape, stride = _view(shape, order, axes)
        data = self.data(raw, dtype)
        if prod(shape) * DTYPES[dtype].bits != 8 * len(data):
            raise FormatError(f"a {dtype} array of shape {brief(shape)} has {len(data)} bytes")
        storage, memory = self.memory(data, dtype, byteorder)
        tensor = TensorInfo(dtype, shape, stride, 0, storage)
        if self.keep:
            if node.state is not None:
                node.state = (*node.state[:4], data)  # frees the text that the bytes were decoded from
            memory.nodes[id(tensor)] = tensor, node
        return tensor

    def data(self, raw: Any, dtype: str) -> bytes | bytearray:
        if id(raw) in self.decoded:
            return self.decoded[id(raw)][1]
        data = raw_bytes(raw)
        if data is None:
            raise FormatError(f"the elements of a {dtype} array are {brief(raw)}")
        if len(data) > _SHARED:
            self.decoded[id(raw)] = raw, data
        return data

    def memory(self, data: bytes | bytearray, dtype: str, byteorder: ByteOrder) -> tuple[Storage, Array]:
        key = id(data), dtype, byteorder
        if key in self.memories:
            return self.memories[key]
        memory = Array(data, self.beside)
        span = self.span._replace(nbytes=len(data), memory=memory)
        made = Storage(span, dtype if DTYPES[dtype].storage else None, byteorder=byteorder), memory
        if len(data) > _SHARED:
            self.memories[key] = made
        return made


def array_call(node: PyObject) -> tuple[Any, Any, Any, Any, Any] | None:
    """Returns (bytes or items, dtype, shape, order, axes) of an array's stand-in; None for anything else."""
    name = node.module, node.qualname
    if not node.called or node.kwargs or node.items or node.mapping is not None or node.maker is not None:
        return None
    if name in _RECONSTRUCT and _is_plain_ndarray(node) and isinstance(node.state, tuple) and len(node.state) == 5:
        _, shape, kind, fortran, raw = node.state
        return raw, kind, shape, "F" if fortran else "C", None
    if name in _FROM_BUFFER and len(node.args) in (4, 5) and node.state is None:
        raw, kind, shape, order, axes = (*node.args, None)[:5]
        return raw, kind, shape, order, axes
    return None


def _is_plain_ndarray(node: PyObject) -> bool:
    kind = node.args[0] if len(node.args) == 3 else None
    return isinstance(kind, Global) and (kind.module, kind.qualname) == ("numpy", "ndarray")


def dtype_of(node: Any) -> tuple[str, ByteOrder] | None:
    """Returns torch's name and the byte order of a pickled dtype; None for one that torch lacks or of unknown form."""
    if not isinstance(node, PyObject) or (node.module, node.qualname) != ("numpy", "dtype") or len(node.args) != 3:
        return None
    name, state = node.args[0], node.state
    if isinstance(name, Global):  # bfloat16 and the 8-bit floats, which come from the package ml_dtypes
        dtype = name.qualname if name.module == "ml_dtypes" and name.qualname in DTYPES else None
    else:
        dtype = _NAMES.get(name) if isinstance(name, str) else None
    if dtype is None or not isinstance(state, tuple) or len(state) != 8 or state[0] != 3:
        return None
    nbytes = DTYPES[dtype].bits // 8
    if state[2:] not in (_PLAIN, (None, None, None, nbytes, nbytes, 64) if isinstance(name, Global) else _PLAIN):
        return None
    if state[1] == "|" and DTYPES[dtype].bits == 8:
        return dtype, "little"
    return (dtype, "big" if state[1] == ">" else "little") if state[1] in ("<", ">") else None


def _is_shape(shape: Any) -> bool:
    small = isinstance(shape, tuple) and len(shape) <= MAX_DIMS
    return small and all(type(size) is int and size >= 0 for size in shape) and is_countable(shape)


def _view(shape: Any, order: Any, axes: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the shape and the stride of an array, in elements. Raises: FormatError for what is no shape or order."""
    if not _is_shape(shape):
        raise FormatError(f"an array's shape is {brief(shape)}")
    if order == "C":
        return shape, contiguous_stride(shape)
    if order == "F":
        return shape, contiguous_stride(shape[::-1])[::-1]
    whole = isinstance(axes, tuple) and {*map(type, axes)} <= {int} and sorted(axes) == list(range(len(shape)))
    if order == "K" and whole:
        stride = contiguous_stride(shape)
        return tuple(shape[axis] for axis in axes), tuple(stride[axis] for axis in axes)
    raise FormatError(f"an array's order is {brief(order)}, its axes {brief(axes)}")


def raw_bytes(node: Any) -> bytes | bytearray | None:
    """Returns the bytes that a node stands for in a pickle of any protocol, or of Python 2; None if it is no bytes."""
    if isinstance(node, (bytes, bytearray)):
        return node
    if isinstance(node, PyObject):
        name = node.module, node.qualname
        if node.module in ("__builtin__", "builtins") and node.qualname in ("bytes", "bytearray"):
            raw = node.args[0] if len(node.args) == 1 else None
            if not isinstance(raw, bytes) and not (isinstance(raw, PyObject) and raw.module == "_codecs"):
                return None if node.args else b""
            return raw_bytes(raw)
        if name != ("_codecs", "encode") or len(node.args) != 2 or node.args[1] != "latin1":
            return None
        node = node.args[0]
    if not isinstance(node, str):
        return None
    try:
        return node.encode("latin1")
    except UnicodeEncodeError:
        return None
