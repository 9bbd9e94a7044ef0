"""joblib's files: a pickle between whose opcodes the elements of its arrays lie.

    NumpyArrayWrapper {subclass, shape, order, dtype, allow_mmap, numpy_array_alignment_bytes} BUILD
    n (1 byte) | n bytes 0xFF | elements, at a multiple of 16 bytes        joblib before 1.2: the elements at once
    pickle                                                                 of an array with objects in it

So the end of an array is known only from the wrapper before it. A first pass follows the opcodes with numbers, texts
and tuples alone, and finds where elements lie; then the pickle without them is read as any other is. Its wrappers are
persistent ids there: BUILD is followed by the opcodes for ``(wrapper, number)`` and BINPERSID.
Source: ``joblib/numpy_pickle.py`` of joblib 1.6.
"""

from __future__ import annotations

import pickletools
import re
from math import prod
from typing import IO, Any, NamedTuple, cast

from ckptool.core.checkpoint import Checkpoint
from ckptool.core.dtypes import DTYPES
from ckptool.core.tensor import Storage, TensorInfo, contiguous_stride, is_countable
from ckptool.core.tree import Global, PyObject, brief
from ckptool.errors import FormatError
from ckptool.io.probe import Probe
from ckptool.io.source import Source
from ckptool.limits import MAX_PICKLE
from ckptool.pickling import load as pickles
from ckptool.pickling.numpy_calls import dtype_of
from ckptool.pickling.streams import PickleStream
from ckptool.pickling.torch_calls import builders

WRAPPER = "joblib.numpy_pickle", "NumpyArrayWrapper"

FIRST = 1 << 16
"""Bytes in which the name of the first array's class is looked for."""


def matches(probe: Probe) -> bool:
    """Returns whether it is a pickle of protocol 2 to 5 that names joblib's wrapper of arrays early."""
    begins = probe.head[:1] == b"\x80" and probe.head[1:2] in (b"\2", b"\3", b"\4", b"\5")
    head = probe.file.read(probe.file.begin, min(FIRST, probe.size)) if begins else b""
    return all(name.encode() in head for name in WRAPPER)


def read(probe: Probe) -> Checkpoint:
    """Returns the checkpoint; reads all but the elements of arrays. Raises: FormatError, LimitError, UnsupportedError.

    An array of text, dates or fields is what a pickle of it would be, with its elements in memory.
    """
    file = probe.file
    pickled, places = _without_elements(file)
    pickles.scan(pickled)
    inner: dict[tuple[str, str], None] = {}
    held: list[int] = []

    def array(pid: Any) -> Any:
        if not (isinstance(pid, tuple) and len(pid) == 2 and isinstance(pid[0], PyObject) and pid[1] < len(places)):
            raise FormatError(f"it refers to something that is no array: {brief(pid)}")
        place, state = places[pid[1]], pid[0].state
        fortran, found = state["order"] == "F", dtype_of(state["dtype"])
        held.append(place.nbytes if place.is_pickle or found is None else 0)
        if sum(held) > MAX_PICKLE.now():
            raise MAX_PICKLE.passed("its arrays of texts and objects are too long together", sum(held))
        if place.is_pickle:
            tree, names = pickles.load(file.read(place.begin, place.nbytes), builders=builders)
            inner.update(dict.fromkeys(names))
            return tree
        if found is None:
            made: Any = Global.named("numpy.core.multiarray", "_reconstruct")(
                Global.named("numpy", "ndarray"), (0,), b"b"
            )
            made.state = 1, place.shape, state["dtype"], fortran, file.read(place.begin, place.nbytes)
            return made
        dtype, byteorder = found
        stride = contiguous_stride(place.shape[::-1])[::-1] if fortran else contiguous_stride(place.shape)
        storage = Storage(
            file.span(place.begin, place.nbytes), dtype if DTYPES[dtype].storage else None, byteorder=byteorder
        )
        return TensorInfo(dtype, place.shape, stride, 0, storage)

    tree, names = pickles.load(pickled, builders=builders, persistent_load=array)
    every = tuple(name for name in dict.fromkeys((*names, *inner)) if name != WRAPPER)  # its arrays were read
    tree = pickles.with_arrays(tree, every, file.span(0, 0), keep=False)
    return Checkpoint(tree, url=file.path, nbytes=file.size, names=every)


class _Place(NamedTuple):
    """Where the elements of an array lie, or the pickle of one with objects in it."""

    begin: int
    nbytes: int
    shape: tuple[int, ...]
    is_pickle: bool


class _Made:
    """A class (its name in ``of``), or an object: what it was made ``of``, its arguments and its state."""

    def __init__(self, of: Any, args: Any = None) -> None:
        self.of, self.args, self.state = of, args, None


class _Reader:
    """What `pickletools` reads from; a block at a time."""

    def __init__(self, file: Source) -> None:
        self.file, self.position, self.most = file, file.begin, MAX_PICKLE.now()
        self._begin, self._block = 0, b""

    def tell(self) -> int:
        return self.position

    def read(self, nbytes: int = -1) -> bytes:
        if nbytes > self.most:
            raise MAX_PICKLE.passed(f"its pickle has an item of {nbytes:,} bytes", nbytes, self.file.path)
        nbytes = min(nbytes, self.file.size - self.position)
        if self.position < self._begin or self.position + nbytes > self._begin + len(self._block):
            self._begin = self.position
            self._block = self.file.read(self._begin, min(max(nbytes, FIRST), self.file.size - self._begin))
        begin = self.position - self._begin
        self.position += nbytes
        return self._block[begin : begin + nbytes]

    def readline(self, size: int | None = -1) -> bytes:
        begin = self.position
        line = self.read(min(4096, self.file.size - begin))
        end = line.find(b"\n") + 1 or len(line)
        self.position = begin + end
        return line[:end]


def _without_elements(file: Source) -> tuple[bytes, list[_Place]]:
    """Returns the pickle without the elements of its arrays, and where these lie. Raises: FormatError, LimitError."""
    stream, pickled, places = _Reader(file), bytearray(), list[_Place]()
    cut, machine, most = file.begin, _Machine(), MAX_PICKLE.now()
    try:
        for opcode, arg, _ in pickletools.genops(cast("IO[bytes]", stream)):
            machine.step(opcode.name, arg)
            wrapper = machine.stack[-1] if opcode.name == "BUILD" else None
            if not isinstance(wrapper, _Made) or not isinstance(wrapper.of, _Made) or wrapper.of.of != WRAPPER:
                continue
            pickled += file.read(cut, stream.position - cut)
            pickled += b"J%b\x86Q" % len(places).to_bytes(4, "little")
            if len(pickled) > most:
                break
            places.append(_place(wrapper.state, stream))
            cut = stream.position = places[-1].begin + places[-1].nbytes
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise FormatError(f"its pickle makes no sense at byte {stream.position}: {error}", file.path) from error
    if len(pickled) + stream.position - cut > most:
        raise MAX_PICKLE.passed("the pickle is too long", len(pickled) + stream.position - cut, file.path)
    if stream.position != file.size:
        what = f"its pickle ends at byte {stream.position}, and {file.size - stream.position} bytes follow it"
        raise FormatError(what, file.path)
    return bytes(pickled + file.read(cut, stream.position - cut)), places


def _place(state: Any, stream: _Reader) -> _Place:
    """Returns where the array of a wrapper in this state lies, which begins at the stream's position."""
    file, shape, kind = stream.file, state["shape"], state["dtype"].args[0]
    size, _, flags = state["dtype"].state[-3:]
    if not isinstance(shape, tuple) or any(type(size) is not int or size < 0 for size in shape):
        raise FormatError(f"an array has the shape {brief(shape)}", file.path)
    if not is_countable(shape):
        raise FormatError(f"an array has the shape {brief(shape)}: more than can be counted", file.path)
    begin = stream.position
    if (isinstance(flags, int) and flags & 1) or (isinstance(kind, str) and kind[:1] == "O"):
        return _Place(begin, len(PickleStream(file, begin).raw_pickle()), shape, True)
    if state.get("numpy_array_alignment_bytes") is not None:
        begin += 1 + file.read(begin, 1)[0]
    if size > 0:  # a type of ml_dtypes, or one with fields
        itemsize: int = size
    elif isinstance(kind, str) and (found := re.fullmatch(r"[a-zA-Z](\d{1,9})", kind)):
        itemsize = int(found[1]) * (4 if kind[0] == "U" else 1)
    else:
        raise FormatError(f"an array has the dtype {brief(kind)}", file.path)
    nbytes = prod(shape) * itemsize
    if begin + nbytes > file.size:
        what = f"an array of {nbytes} bytes begins at byte {begin} of a file of {file.size}"
        raise FormatError(f"{what}: a truncated download?", file.path)
    return _Place(begin, nbytes, shape, False)


class _Machine:
    """Follows the opcodes of a pickle: the stack has numbers, texts, tuples, dicts of texts, `_Made`; all else is None.

    Nothing is hashed but texts and memo indices. Raises: LookupError and others where the opcodes make no sense.
    """

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def step(self, name: str, arg: Any) -> None:
        """Does what an opcode does; ``arg`` as `pickletools` gives it."""
        stack = self.stack
        match name:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case "MARK":
                self.marked.append(stack)
                self.stack = []
            case "TUPLE" | "LIST" | "DICT" | "FROZENSET" | "OBJ" | "INST" | "POP_MARK" | "APPENDS" | "ADDITEMS":
                self.stack = self.marked.pop()
                if name not in ("POP_MARK", "APPENDS", "ADDITEMS"):
                    self.stack.append(tuple(stack) if name == "TUPLE" else _set({}, stack) if name == "DICT" else None)
            case "SETITEMS":
                self.stack = self.marked.pop()
                _set(self.stack[-1], stack)
            case "SETITEM":
                _set(stack[-3], stack[-2:])
                del stack[-2:]
            case "EMPTY_TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = len(stack) - (0 if name == "EMPTY_TUPLE" else int(name[-1]))
                stack[count:] = [tuple(stack[count:])]
            case "EMPTY_DICT":
                stack.append({})
            case "POP" if not stack:
                self.stack = self.marked.pop()
            case "POP" | "APPEND":
                stack.pop()
            case "DUP":
                stack.append(stack[-1])
            case "GLOBAL":
                stack.append(_Made(tuple(arg.split(" ", 1))))
            case "STACK_GLOBAL":
                stack[-2:] = [_Made(tuple(stack[-2:]))]
            case "REDUCE" | "NEWOBJ":
                stack[-2:] = [_Made(*stack[-2:])]
            case "NEWOBJ_EX":
                stack[-3:] = [_Made(*stack[-3:-1])]
            case "BUILD":
                state = stack.pop()
                if isinstance(stack[-1], _Made):
                    stack[-1].state = state
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                self.memo[arg] = stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(self.memo[arg])
            case "BINPERSID":
                stack[-1] = None
            case _:  # numbers and texts
                stack.append(arg)


def _set(made: Any, items: list[Any]) -> Any:
    """Puts the items of a dict, as they lie on the stack, whose keys are texts."""
    if isinstance(made, dict):
        made.update((key, value) for key, value in zip(items[::2], items[1::2], strict=True) if isinstance(key, str))
    return made
