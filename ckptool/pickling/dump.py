"""Writes a tree as a pickle of protocol 2, the only one that `torch.load(weights_only=True)` accepts."""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from ckptool.core.tree import Global, Leaf, PyObject, brief
from ckptool.errors import UnsupportedError
from ckptool.limits import MAX_DEPTH
from ckptool.pickling.load import Builder


class Hole:
    """A placeholder in the arguments of a `Form`, for a str, an int, or a tuple of those."""


HOLE = Hole()


class Persistent(tuple[Any, ...]):
    """A persistent id among the arguments of a call, for an object outside the pickle."""


class Form(NamedTuple):
    """A call whose arguments are equal for many leaves but for the holes, so that the rest is encoded once.

    The first hole takes a str that differs for every leaf; the values of the others, which repeat, are cached.
    """

    function: Global
    args: tuple[Any, ...]


Reduced = tuple[Global, tuple[Any, ...]] | tuple[Form, str, tuple[Any, ...]] | PyObject | None
"""A leaf to write: as a call, whose arguments are used nowhere else and so not memoised; as a form and the values
of its holes; or as an object."""


def dump(
    top: Any,
    *,
    reduce: Callable[[Any], Reduced] = lambda _: None,
    persistent_id: Callable[[Any], Any] = lambda _: None,
) -> bytes:
    """Returns the protocol-2 pickle of a tree.

    ``reduce`` maps a leaf to its `Reduced`; ``persistent_id`` maps an object outside the pickle to its id.
    Both return None for anything else. Shared objects stay shared, cycles stay cycles.
    Raises: UnsupportedError for what protocol 2 cannot express, LimitError past `MAX_DEPTH`.
    """
    writer = _Writer(reduce, persistent_id)
    limit = sys.getrecursionlimit()
    frames = min(8 * MAX_DEPTH.now(), (1 << 31) - 1)  # at most five Python frames per container, and none in C
    sys.setrecursionlimit(max(limit, frames))
    try:
        writer.save(top)
    finally:
        sys.setrecursionlimit(limit)
    return b"\x80\x02" + b"".join(writer.out) + b"."


def _order(item: Any) -> str:
    return brief(item, 1 << 16)


_TUPLES = (b")", b"\x85", b"\x86", b"\x87", b"t")
"""Opcodes that make a tuple of 0, 1, 2, 3, and of all items since the mark."""

_LENGTH = struct.Struct("<I").pack

_CUT = bytes(bytearray(b"hole"))
"""Marks a hole among the bytes of a form; compared by identity."""


class _Writer:
    def __init__(self, reduce: Callable[[Any], Reduced], persistent_id: Callable[[Any], Any]) -> None:
        self.reduce = reduce
        self.persistent_id = persistent_id
        self.out: list[bytes] = []
        self.memo: dict[int, int] = {}
        self.names: dict[object, int] = {}
        self.forms: dict[int, tuple[tuple[bytes, ...], dict[tuple[Any, ...], bytes]]] = {}
        self.kept: list[Any] = []
        self.making: dict[int, list[tuple[Any, Any]]] = {}
        self.count = 0
        self.depth = 0
        self.deepest = MAX_DEPTH.now()

    def save(self, node: Any) -> None:
        kind = type(node)
        if kind is str:
            self.save_str(node)
        elif isinstance(node, Leaf):
            self.save_leaf(node)
        elif kind is int:
            self.out.append(_int(node))
        elif node is None or kind is bool:
            self.out.append(b"N" if node is None else b"\x88" if node else b"\x89")
        elif kind is float:
            self.out.append(b"G" + struct.pack(">d", node))
        elif kind is tuple and not node:
            self.out.append(b")")
        elif id(node) in self.memo:
            self.get(self.memo[id(node)])
        else:
            self.enter()
            self.save_once(node, kind)
            self.depth -= 1

    def enter(self) -> None:
        self.depth += 1
        if self.depth > self.deepest:
            raise MAX_DEPTH.passed("containers are nested too deep")

    def save_leaf(self, node: Leaf) -> None:
        index = self.memo.get(id(node))
        if index is not None:
            self.get(index)
            return
        reduced = self.reduce(node)
        if reduced is None:
            raise UnsupportedError(f"a pickle cannot hold a {type(node).__name__}")
        if isinstance(reduced, PyObject):
            self.save(reduced)
            return
        if len(reduced) == 3:
            self.save_form(*reduced)
        else:
            function, args = reduced
            self.enter()
            self.save_fresh_call(function, args)  # not (*reduced): such a call recurses in C
            self.depth -= 1
        self.memo[id(node)] = self.count  # the tree keeps it alive
        self.put_index()

    def save_once(self, node: Any, kind: type) -> None:
        if kind is dict:
            self.out.append(b"}")
            self.put(node)
            self.save_pairs(node, node)
        elif kind is list:
            self.out.append(b"]")
            self.put(node)
            self.save_items(node)
        elif kind is tuple:
            self.save_tuple(node)
        elif kind is Builder or isinstance(node, Global):
            self.save_global(node.module, node.qualname)
        elif isinstance(node, PyObject):
            self.save_object(node)
        elif kind is bytes:
            # protocol 2 has no bytes: torch too writes a str and a call of _codecs.encode
            self.save_call("_codecs", "encode", (node.decode("latin1"), "latin1"), node)
        elif kind is bytearray:
            self.save_call("__builtin__", "bytearray", (bytes(node),), node)
        elif kind is set or kind is frozenset:
            # sorted, as a set's order changes from run to run
            self.save_call("__builtin__", kind.__name__, (sorted(node, key=_order),), node)
        else:
            pid = self.persistent_id(node)
            if pid is None:
                raise UnsupportedError(f"a pickle cannot hold a {kind.__name__}")
            self.save_fresh(pid)
            self.out.append(b"Q")

    def put(self, node: Any) -> None:
        self.memo[id(node)] = self.count
        self.kept.append(node)
        self.put_index()

    def put_index(self) -> None:
        index = self.count
        self.out.append(b"q" + bytes((index,)) if index < 256 else b"r" + _LENGTH(index))
        self.count += 1

    def get(self, index: int) -> None:
        self.out.append(b"h" + bytes((index,)) if index < 256 else b"j" + _LENGTH(index))

    def save_str(self, text: str) -> None:
        index = self.names.get(text)
        if index is not None:
            self.get(index)
            return
        encoded = text.encode("utf-8", "surrogatepass")
        self.names[text] = index = self.count
        self.count += 1
        put = b"q%c" % index if index < 256 else b"r" + _LENGTH(index)
        self.out.append(b"X%b%b%b" % (_LENGTH(len(encoded)), encoded, put))

    def save_global(self, module: str, qualname: str) -> None:
        name = (module, qualname)
        index = self.names.get(name)
        if index is not None:
            self.get(index)
            return
        outer, _, inner = qualname.rpartition(".")
        if outer:
            self.save_global("__builtin__", "getattr")
            self.save_global(module, outer)
            self.save_str(inner)
            self.out.append(b"\x86R")
        else:
            if "\n" in module + qualname:
                raise UnsupportedError(f"a pickle cannot name {module!r} {qualname!r}")
            self.out.append(f"c{module}\n{qualname}\n".encode())
        self.names[name] = self.count
        self.put_index()

    def save_fresh_call(self, function: Global, args: tuple[Any, ...]) -> None:
        """Writes a call whose arguments are used nowhere else, and so not memoised."""
        self.save_global(function.module, function.qualname)
        self.save_fresh(args)
        self.out.append(b"R")

    def save_fresh(self, items: tuple[Any, ...]) -> None:
        if len(items) > 3:
            self.out.append(b"(")
        for item in items:
            if item is HOLE:
                self.out.append(_CUT)
            elif isinstance(item, Persistent):
                self.save_fresh(item)
                self.out.append(b"Q")
            elif (
                isinstance(item, PyObject)
                and item.called
                and not (item.mapping or item.items or item.state or item.maker)
            ):
                self.save_fresh_call(type(item), item.args)
            else:
                self.save(item)
        self.out.append(_TUPLES[min(len(items), 4)])

    def save_form(self, form: Form, first: str, rest: tuple[Any, ...]) -> None:
        """Writes a form's call: the first time in full, which memoises its constants, then from encoded pieces."""
        known = self.forms.get(id(form))
        if known is None:
            self.kept.append(form)
            self.save_fresh_call(form.function, _with_values(form.args, iter((first, *rest))))
            self.forms[id(form)] = self.cut(form), {}
            return
        pieces, tails = known
        tail = tails.get(rest)
        if tail is None:
            values = [*map(_plain, rest), b""]
            tail = tails[rest] = b"".join(p + value for p, value in zip(pieces[1:], values, strict=True))
        text = first.encode("utf-8", "surrogatepass")
        self.out.append(b"%bX%b%b%b" % (pieces[0], _LENGTH(len(text)), text, tail))

    def cut(self, form: Form) -> tuple[bytes, ...]:
        """Returns the bytes of a form's call before, between and after its holes."""
        whole, self.out = self.out, []
        self.save_fresh_call(form.function, form.args)
        parts, self.out = self.out, whole
        pieces = [b""]
        for part in parts:
            if part is _CUT:
                pieces.append(b"")
            else:
                pieces[-1] += part
        return tuple(pieces)

    def save_tuple(self, node: tuple[Any, ...]) -> None:
        if len(node) > 3:
            self.out.append(b"(")
        for item in node:
            self.save(item)
        if id(node) in self.memo:  # it contains itself, and was written among its items: drop this copy
            self.out.append(b"1" if len(node) > 3 else b"0" * len(node))
            self.get(self.memo[id(node)])
            return
        self.out.append(_TUPLES[min(len(node), 4)])
        if not all(type(item) is int for item in node):  # shapes are not memoised: their identity has no meaning
            self.put(node)

    def save_call(self, module: str, qualname: str, args: tuple[Any, ...], node: Any) -> None:
        self.save_global(module, qualname)
        self.save(args)
        self.out.append(b"R")
        self.put(node)

    def save_object(self, node: PyObject) -> None:
        if node.kwargs:
            raise UnsupportedError(f"protocol 2 cannot make a {type(node)!r} from keyword arguments")
        if node.maker is not None:
            self.save(node.maker)
        else:
            self.save_global(node.module, node.qualname)
        self.making[id(node)] = []
        self.save(node.args)
        self.out.append(b"R" if node.called else b"\x81")
        self.put(node)
        for holder, key in self.making.pop(id(node)):  # a function's globals, among the arguments of its class
            self.get(self.memo[id(holder)])
            self.save_pairs(holder, {key: node})
            self.out.append(b"0")
        self.save_items(node.items or [])
        self.save_pairs(node, node.mapping or {})
        if node.state is not None:
            self.save(node.state)
            self.out.append(b"b")
        for call in node.calls or ():
            self.save(call)
            self.out.append(b"0")

    def save_items(self, items: list[Any]) -> None:
        for start in range(0, len(items), 1000):
            batch = items[start : start + 1000]
            if len(batch) == 1:
                self.save(batch[0])
                self.out.append(b"a")
                continue
            self.out.append(b"(")
            for item in batch:
                self.save(item)
            self.out.append(b"e")

    def save_pairs(self, holder: Any, mapping: dict[Any, Any]) -> None:
        """Writes the items of ``holder``, which is on the stack; later those whose value is not made yet."""
        pairs = list(mapping.items())
        if self.making and (later := [pair for pair in pairs if id(pair[1]) in self.making]):
            for key, value in later:
                self.making[id(value)].append((holder, key))
            pairs = [pair for pair in pairs if id(pair[1]) not in self.making]
        for start in range(0, len(pairs), 1000):
            batch = pairs[start : start + 1000]
            if len(batch) > 1:
                self.out.append(b"(")
            for key, value in batch:
                if type(key) is str:
                    self.save_str(key)
                else:
                    self.save(key)
                if isinstance(value, Leaf):
                    self.save_leaf(value)
                else:
                    self.save(value)
            self.out.append(b"u" if len(batch) > 1 else b"s")


def _int(value: int) -> bytes:
    """Returns the opcode of an int."""
    if 0 <= value < 256:
        return b"K%c" % value
    if 0 <= value < 65536:
        return b"M" + struct.pack("<H", value)
    if -0x80000000 <= value < 0x80000000:
        return b"J" + struct.pack("<i", value)
    encoded = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    head = b"\x8a" + bytes((len(encoded),)) if len(encoded) < 256 else b"\x8b" + struct.pack("<i", len(encoded))
    return head + encoded


def _plain(value: Any) -> bytes:
    """Returns the opcodes of a value for a hole, not memoised."""
    if type(value) is int:
        return _int(value)
    if type(value) is str:
        encoded = value.encode("utf-8", "surrogatepass")
        return b"X" + _LENGTH(len(encoded)) + encoded
    return (b"(" if len(value) > 3 else b"") + b"".join(map(_plain, value)) + _TUPLES[min(len(value), 4)]


def _with_values(args: tuple[Any, ...], values: Iterator[Any]) -> tuple[Any, ...]:
    """Returns the arguments of a form with its holes filled."""
    made: list[Any] = []
    for arg in args:
        if arg is HOLE:
            made.append(next(values))
        elif isinstance(arg, Persistent):
            made.append(Persistent(_with_values(arg, values)))
        elif isinstance(arg, PyObject) and arg.args:
            made.append(type(arg)(*_with_values(arg.args, values)))
        else:
            made.append(arg)
    return tuple(made)
