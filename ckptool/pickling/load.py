"""Reads a pickle stream into a tree with CPython's C unpickler, running no code of the pickle. Three defences:

1. `scan` reads the opcodes first. It finds the end of the pickle, refuses opcodes that reach outside the
   stream (EXT1/2/4 and the out-of-band buffers), and bounds what a few bytes can make the unpickler allocate
   (memo indices, declared lengths, digits; nested tuples, see `ckptool.pickling.guard`).
2. The unpickler resolves every name through ``find_class``, which here never imports: it returns a `Global`, a
   class whose calls are only recorded, or one of the caller's builders.
3. Every object that the unpickler can get takes BUILD, APPEND and SETITEM through methods defined in this package.

Opcodes: ``pickletools`` of CPython 3.13. `ckptool.pickling.dump` writes pickles.
"""

from __future__ import annotations

import _pickle
import codecs
import io
import re
from array import array
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

from ckptool.core.pickled_names import CALLED, is_function, kind
from ckptool.core.tensor import Span
from ckptool.core.tree import Global, PyObject, nodes, walk
from ckptool.errors import CkptoolError, FormatError, LimitError, UnsupportedError
from ckptool.limits import MAX_DIGITS, MAX_GLOBALS, MAX_MEMO, MAX_NAME, MAX_TUPLES, MAX_WIDE
from ckptool.pickling import guard as nesting

Builders = Mapping[tuple[str, str], Callable[..., Any]]
"""{(module, qualname): the function to call instead of recording the call}."""


class Builder:
    """A callable that ``find_class`` returns: a pickle can call it, but not change it."""

    __slots__ = ("function", "module", "qualname")

    def __init__(self, module: str, qualname: str, function: Callable[..., Any]) -> None:
        self.module, self.qualname, self.function = module, qualname, function

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)

    def __setstate__(self, state: object) -> None:
        raise FormatError(f"the pickle builds {self.module}.{self.qualname} with a state")

    def __reduce__(self) -> str:
        raise FormatError(f"{self.module}.{self.qualname} cannot be copied")


# --- reading -----------------------------------------------------------------------------------------------------


class CutOffError(FormatError):
    """The buffer ends before the pickle does; the rest may follow in the file."""


_LENGTHS = {
    0x55: 1, 0x54: 4, 0x58: 4, 0x8C: 1, 0x8D: 8, 0x43: 1, 0x42: 4, 0x8E: 8, 0x96: 8, 0x8A: 1, 0x8B: 4,
}  # fmt: skip
"""Opcodes with a length in front of their bytes -> size of that length."""

_LINES = {ord("c"): 2, ord("i"): 2, **dict.fromkeys(b"FILSVPgp", 1)}
"""Opcodes whose arguments end with newlines -> number of lines."""

_FIXED = {**dict.fromkeys(b"Khq\x80", 1), ord("M"): 2, **dict.fromkeys(b"Jjr", 4), **dict.fromkeys(b"G\x95", 8)}
"""Opcodes with arguments of fixed size -> that size. Nearly all of them are matched as part of a run (see `_run`)."""

_REFUSED = {
    0x82: "EXT1", 0x83: "EXT2", 0x84: "EXT4", 0x97: "NEXT_BUFFER", 0x98: "READONLY_BUFFER",
}  # fmt: skip


MANY = 10_000
"""After this many GETs and texts read one by one, the pattern of a run also matches short texts and these GETs.

Real pickles GET a handful of indices. That pattern takes 8 ms to compile, as long as reading this many one by
one, and is then 15 times as fast.
"""

MOST = 64
"""Of more different GETs than these a pattern is slow. Then the scan begins again, with the pattern for every one."""

WIDE = 8
"""Integers of this many bytes may share a hash; a shorter one is its own hash, but for -1, whose hash is that of -2."""

_MINUS_TWO = b"J\xfe\xff\xff\xff", b"G\xc0" + bytes(7)
"""``-2`` as pickled: CPython has ``hash(-1) == hash(-2)``, so `scan` searches the buffer for it."""

_NUMBER = rb"(?:K.|M..|J....|[N\x88\x89]|G.{8})"
_TUPLE = rb"[\x85-\x87t]"
_NUMBERS = rb"(?:" + _NUMBER + rb"(?:\x85|" + _NUMBER + rb"(?:\x86|" + _NUMBER + rb"\x87))|\(" + _NUMBER + rb"{1,8}t)"
_TEXT = rb"X(?:" + rb"|".join(b"\\x%02x\0\0\0.{%d}" % (length, length) for length in range(1, 97)) + rb")"
"""BINUNICODE of up to 96 bytes: the names of nearly all tensors and storages."""

_SHORT_TEXT = rb"\x8c(?:" + rb"|".join(b"\\x%02x.{%d}" % (length, length) for length in range(97)) + rb")"
_GET = rb"(?:h.|j....)"

LARGE = 1 << 16
"""A pickle of protocol 4 with this many bytes is scanned with the pattern for every GET and text at once."""


def _put(bound: int) -> bytes:
    """Returns the pattern for BINPUT, and LONG_BINPUT with an index near ``bound``."""
    high = min(bound >> 16, 0xFF)
    upper = re.escape(bytes([min(bound >> 24, 0x7F)]))
    third = re.escape(bytes([high])) if bound < 1 << 24 else rb"\xff"
    return rb"(?:q.|r..[\x00-" + third + rb"][\x00-" + upper + rb"])"


def _record(put: bytes, get: bytes, made: bytes) -> bytes:
    """Returns the pattern for a key and its tensor as torch.save writes them, with ``made`` after every tuple."""
    return (
        _TEXT + put + get + rb"\(\(" + get + get + _TEXT + put + get + _NUMBER + rb"t" + made + rb"Q" + _NUMBER
        + (_NUMBERS + made) * 2 + _NUMBER + get + rb"\)R" + put + rb"t" + made + rb"R" + put
    )  # fmt: skip


def _run(put: bytes, gets: Collection[bytes] = (), every: bool = False) -> re.Pattern[bytes]:
    """Returns the pattern for a run: opcodes that nest no tuples. With ``gets`` it matches these GETs and texts too.

    A tuple in a run has only numbers, or is the arguments of a call, a persistent id, an item or a value, and
    so it is in no other tuple unless a GET fetches it. Every PUT follows the opcode that made its object.
    ``every``: it matches all GETs and texts, also in a tuple, where they are no tuples unless a GET fetches one.
    """
    put += rb"?+"
    first, atom, last = b"", _NUMBER, b""
    if every:
        atom = rb"(?:" + _NUMBER + rb"|" + _GET + rb"|(?:" + _TEXT + rb"|" + _SHORT_TEXT + rb")" + put + rb")"
    elif gets:
        get = rb"(?:" + rb"|".join(map(re.escape, gets)) + rb")"
        first = _record(put, get, put) + rb"|"  # only faster: the other branches match each part of it
        last = rb"|" + _TEXT + put + rb"|" + get
    return re.compile(
        put + rb"(?:" + first
        + atom + rb"(?:(?:\x85|" + atom + rb"(?:\x86|" + atom + rb"\x87))" + put + rb")?"
        rb"|[}\]lRdo\x81\x8f\x92\x93]" + put
        + rb"|\((?:" + atom + rb"{1,8}t" + put + rb")?"
        rb"|" + _TUPLE + put + rb"(?:[R\x81]" + put + rb"|[Qabs])"
        rb"|[1Qabe)su0\x90]|\x80.|\x95.{8}" + last + rb")*+", re.DOTALL,
    )  # fmt: skip


def scan(buffer: bytes, start: int = 0, every: bool = False) -> int:
    """Returns the offset after the STOP of the pickle that begins at ``start``; reads opcodes, builds nothing.

    ``every`` only sets how: as is best where there are many different GETs.
    Raises: FormatError if it is cut off or has an unknown opcode, UnsupportedError for opcodes that reach
    outside the stream, LimitError if a memo index is too far beyond its length, or tuples are nested too deep.
    """
    size = len(buffer)
    bound = size - start + MAX_MEMO.now()
    framed = buffer[start : start + 2] >= b"\x80\x04"
    every = every or (framed and size - start >= LARGE)
    put = rb"\x94" if every and framed else _put(bound)
    match = _run(put, every=every).match
    runs = array("Q")
    fetched: set[bytes] = set()
    met, many, loose, loosened, wide, negative, odd = 0, MANY, 0, 0, 0, 0, False
    position = start
    while True:
        if position < size and (matched := match(buffer, position)) and (end := matched.end()) > position:
            runs.extend((position - loosened, end))
            position = end
        loosened = 0
        if position >= size:
            raise CutOffError(f"the pickle at byte {start} is cut off: no STOP in {size - start} bytes")
        opcode = buffer[position]
        if opcode == 0x58 and position + 5 <= size:  # BINUNICODE, the most frequent opcode outside runs
            position += 5 + int.from_bytes(buffer[position + 1 : position + 5], "little")
            met += 1
        elif opcode in b"hj" and position + 1 + _FIXED[opcode] <= size:
            end = position + 1 + _FIXED[opcode]
            fetched.add(buffer[position:end])
            position, met = end, met + 1
            odd = odd or buffer[end : end + 1] in (b"q", b"r")
            if met >= many:
                if len(fetched) > MOST:
                    return scan(buffer, start, every=True)
                match = _run(put, sorted(fetched)).match
                many = 8 * met
        elif opcode == 0x2E:
            break
        elif opcode in _LENGTHS:
            width = _LENGTHS[opcode]
            length = int.from_bytes(buffer[position + 1 : position + 1 + width], "little")
            if opcode == 0x8B and size > position + 5 + length > position + 5 + MAX_DIGITS.now() * 0.4153:
                raise _too_many_digits(int(length / 0.4153), position)
            position += 1 + width + length
            if opcode in b"\x8a\x8b":
                wide += length >= WIDE
                negative += buffer[position - 1 : position] >= b"\x80"
        elif opcode in _LINES:
            odd = odd or opcode in b"gp"
            begin, position = position, _after_lines(buffer, position, bound)
            if opcode in b"FIL":
                wide += position - begin > 2 * WIDE
                negative += buffer[begin + 1 : begin + 2] == b"-"
        elif opcode in _REFUSED:
            raise UnsupportedError(f"the pickle uses {_REFUSED[opcode]} (byte {position}), which reaches outside it")
        elif opcode in b"t\x85\x86\x87":
            loose += 1
            loosened = 1  # the next run begins one byte earlier, so that `_may_share` sees a PUT of this tuple
            position += 1
        elif (
            opcode == 0x72
            and position + 5 <= size
            and (index := int.from_bytes(buffer[position + 1 : position + 5], "little")) > bound
        ):
            raise _memo_beyond(index, bound, position)
        elif opcode in _FIXED:
            odd = True
            position += 1 + _FIXED[opcode]
            if position > size:
                raise CutOffError(f"the pickle at byte {start} is cut off inside an opcode")
        elif opcode in b"2\x91\x94":
            odd = True
            position += 1
        else:
            raise FormatError(f"no pickle opcode at byte {position}: 0x{opcode:02x}")
    if wide > MAX_WIDE.now():
        raise MAX_WIDE.passed(f"the pickle has {wide:,} integers of {WIDE} bytes and more", wide)
    alike = wide > 0 or negative > 0 or any(two in buffer for two in _MINUS_TWO)
    sure = not (odd or alike or loose > MAX_TUPLES.now())
    if not sure or (_brings_back(buffer, runs) if every else _may_share(buffer, runs, fetched, put)):
        nesting.check(_opcodes(buffer, start), alike)
    return position + 1


def _may_share(buffer: bytes, runs: array[int], fetched: set[bytes], put: bytes) -> bool:
    """Returns whether one of the GETs may fetch a tuple that was PUT in one of the ``runs``: begin, end, begin, ...

    First it searches for the bytes of such a PUT anywhere, even in arguments and texts, and only then parses the run.
    """
    if not (fetched and runs):
        return False
    wanted = {int.from_bytes(get[1:], "little") for get in fetched}
    puts = {b"r" + index.to_bytes(4, "little") for index in wanted} | {b"q%c" % i for i in wanted if i < 256}
    low = rb"[" + b"".join(re.escape(b"%c" % low) for low in sorted({index & 0xFF for index in wanted})) + rb"]"
    for places, length in ((rb"q(?=" + low + rb")", 2), (rb"r(?=" + low + rb")", 5)):
        read = -1
        for place in re.compile(places).finditer(buffer, runs[0] + 1, runs[-1]):
            at = place.start()
            if buffer[at : at + length] in puts and buffer[at - 1] in b"t\x85\x86\x87":
                run = bisect_right(runs, at - 1) - 1
                if run % 2 == 0 and run != read:
                    if not puts.isdisjoint(_tuple_puts(put).findall(buffer, runs[run], runs[run + 1])):
                        return True
                    read = run
    return False


def _tuple_puts(put: bytes) -> re.Pattern[bytes]:
    """Returns the pattern whose matches, from the beginning of a run on, capture the PUTs of its tuples."""
    get, bare = rb"(?:h.|j....)", rb"(?!" + put + rb")"
    return re.compile(
        put + rb"?+(?:" + _record(put + rb"?+", get, bare) + rb"|" + _NUMBER + rb"|" + get
        + rb"|(?:[}\]lRdo\x81\x8f\x91-\x93]|" + _TEXT + rb")" + put + rb"?+"
        rb"|" + _TUPLE + bare + rb"|[(1Qabe)su0\x90]|\x80.|\x95.{8})*+(?:" + _TUPLE + rb"(" + put + rb"))?",
        re.DOTALL,
    )  # fmt: skip


def _brings_back(buffer: bytes, runs: array[int]) -> bool:
    """Returns whether a GET may fetch a tuple. All GETs and PUTs are in ``runs``; MEMOIZE counts those before it."""
    find = re.compile(
        rb"(?:" + _NUMBER + rb"|" + _TEXT + rb"|" + _SHORT_TEXT + rb"|[}\]lRdo\x81\x8f\x92\x93(1Qabe)su0\x90]|q.|r...."
        rb"|" + _TUPLE + rb"(?![\x94qr])|\x80.|\x95.{8})*+"
        rb"(?:(\x94)|" + _TUPLE + rb"(?:(\x94)|q(.)|r(....))|h(.)|j(....))?", re.DOTALL,
    ).finditer  # fmt: skip
    tuples: set[int] = set()
    count = 0
    for begin, end in zip(runs[::2], runs[1::2], strict=True):
        for found in find(buffer, begin, end):
            kind = found.lastindex or 0
            if kind > 4:
                if int.from_bytes(found[kind], "little") in tuples:
                    return True
            elif kind > 1:
                tuples.add(count if kind == 2 else int.from_bytes(found[kind], "little"))
            count += kind in (1, 2)
    return False


def _opcodes(buffer: bytes, start: int) -> Iterator[tuple[int, int]]:
    """Yields (opcode, memo index of a PUT or GET, else 0) of a pickle that `scan` found well-formed. Slow."""
    position = start
    while (opcode := buffer[position]) != 0x2E:
        begin = position + 1
        if opcode in _LENGTHS:
            position = begin + _LENGTHS[opcode] + int.from_bytes(buffer[begin : begin + _LENGTHS[opcode]], "little")
        elif opcode in _LINES:
            position = begin
            for _ in range(_LINES[opcode]):
                position = buffer.index(b"\n", position) + 1
        else:
            position = begin + _FIXED.get(opcode, 0)
        if opcode in b"gp":
            line = buffer[begin : position - 1]
            yield opcode, int(line) if line.isdigit() else -1
        else:
            yield opcode, int.from_bytes(buffer[begin:position], "little") if opcode in b"hjqr" else 0


def _after_lines(buffer: bytes, position: int, bound: int) -> int:
    opcode = buffer[position]
    end = position + 1
    for _ in range(_LINES[opcode]):
        newline = buffer.find(b"\n", end)
        if newline < 0:
            raise CutOffError(f"the pickle is cut off in the line at byte {end}")
        text, end = buffer[end:newline], newline + 1
    if opcode == ord("p") and not (text.isdigit() and len(text) < 12):
        raise LimitError(f"the pickle memoises at an impossible index (byte {position}, MAX_MEMO)")
    if opcode == ord("p") and int(text) > bound:
        raise _memo_beyond(int(text), bound, position)
    if opcode in b"IL" and len(text) > MAX_DIGITS.now():
        raise _too_many_digits(len(text), position)
    return end


def _memo_beyond(index: int, bound: int, position: int) -> LimitError:
    more = index - (bound - MAX_MEMO.now())
    return MAX_MEMO.passed(f"the pickle memoises at an index {more:,} beyond its length (byte {position})", more)


def _too_many_digits(count: int, position: int) -> LimitError:
    return MAX_DIGITS.passed(f"the pickle has an integer of some {count:,} digits (byte {position})")


_PYTHON_2 = "ckptool_python_2"
"""The codec of strings that Python 2 pickled; the unpickler takes it by its name."""


def _decoded(raw: Any, errors: str = "strict") -> tuple[str, int]:
    """Returns (text, length) of a string of Python 2: UTF-8 where it decodes, as torch.load has it, else Latin-1."""
    try:
        return str(raw, "utf-8"), len(raw)
    except UnicodeDecodeError:
        return str(raw, "latin1"), len(raw)


codecs.register({_PYTHON_2: codecs.CodecInfo(codecs.latin_1_encode, _decoded, name=_PYTHON_2)}.get)


class _Watched(Global):
    """A stand-in that notes whether the pickle calls it, where it is a function, or calls what it returned."""

    is_called = False

    @classmethod
    def named(mcs, module: str, qualname: str) -> Global:
        made = super().named(module, qualname)
        type.__setattr__(made, "__call__", _call_of_result)
        if is_function(qualname):  # so that INST and OBJ without arguments call it, as they would a function
            type.__setattr__(made, "__getinitargs__", None)
        return made

    def __call__(cls, *args: Any, **kwargs: Any) -> PyObject:
        if is_function(cls.qualname) and kind(cls.module, cls.qualname) == "unknown":
            type.__setattr__(cls, "is_called", True)
        return super().__call__(*args, **kwargs)


def _call_of_result(self: PyObject, *args: Any) -> PyObject:
    function = self.state[0] if isinstance(self.state, tuple) and self.state else None
    if not (self.qualname == "partial" and isinstance(function, Global) and function.qualname.endswith(".__new__")):
        type.__setattr__(type(self), "is_called", True)
    return PyObject.__call__(self, *args)


class _Unpickling:
    """One run of the C unpickler; ``found`` has the classes and functions that the pickle names."""

    def __init__(self, builders: Builders, persistent_load: Callable[[Any], Any] | None) -> None:
        self.builders = builders
        self.persistent_load = persistent_load
        self.found: dict[tuple[str, str], Any] = {}
        self.getattr_called: set[tuple[str, str]] = set()
        self.most, self.longest = MAX_GLOBALS.now(), MAX_NAME.now()

    def find_class(self, module: str, qualname: str) -> Any:
        name = (module, qualname)
        found = self.found.get(name)
        if found is None:
            if len(self.found) >= self.most:
                raise MAX_GLOBALS.passed("the pickle names too many classes and functions")
            if (length := len(module) + len(qualname)) > self.longest:
                raise MAX_NAME.passed(f"a class or function has a name of {length:,} characters", length)
            if name in self.builders:
                found = Builder(module, qualname, self.builders[name])
            elif name in _GETATTR:
                found = Builder(module, qualname, self._getattr)
            elif name == _FROM_TYPE:
                found = Builder(module, qualname, _from_type)
            else:
                known = kind(module, qualname) in ("tensor", "acting")
                found = (Global if known else _Watched).named(module, qualname)
            self.found[name] = found
        return found

    def names(self) -> tuple[tuple[str, str], ...]:
        """Returns all names, and those that act because they are called a second time, with `CALLED` behind them."""
        called = [name for name, one in self.found.items() if isinstance(one, _Watched) and one.is_called]
        called += list(self.getattr_called)
        return (*self.found, *((module, f"{qualname}{CALLED}") for module, qualname in called))

    def _getattr(self, *args: Any) -> Any:
        """Returns a nested class, ``Outer.Inner``, which protocol 2 names by a call of getattr."""
        if len(args) == 2 and isinstance(args[0], Global) and isinstance(args[1], str):
            return self.find_class(args[0].module, f"{args[0].qualname}.{args[1]}")
        self.getattr_called |= _GETATTR & self.found.keys()
        return Global.named("builtins", "getattr")(*args)

    def run(self, buffer: bytes, start: int) -> Any:
        # The unpickler reads large blocks from a file that has peek(); from a bare BytesIO it reads each argument.
        raw = io.BytesIO(buffer)
        raw.seek(start)
        stream = io.BufferedReader(raw, 1 << 17)
        unpickler = type("_Unpickler", (_pickle.Unpickler,), {
            "find_class": staticmethod(self.find_class),
            "persistent_load": staticmethod(self.persistent_load or _no_persistent_id),
        })(stream, encoding=_PYTHON_2)  # fmt: skip
        return unpickler.load()

    def run_in_python(self, buffer: bytes, start: int) -> Any:
        """Returns what `run` does of a pickle that has classes in it, made by calls, ten times as slowly.

        The C unpickler makes objects of classes only, and forgets calls whose result is dropped.
        """
        from ckptool.pickling.classes import unpickler

        stream = io.BytesIO(buffer)
        stream.seek(start)
        return unpickler(stream, self.find_class, self.persistent_load or _no_persistent_id, _PYTHON_2).load()


_FROM_TYPE = ("torch._tensor", "_rebuild_from_type_v2")


def _from_type(*args: Any) -> PyObject:
    """Returns the stand-in of this call; a function that it would call is noted as called, where no builder does so."""
    if len(args) > 2 and callable(args[0]) and isinstance(args[2], tuple):
        args[0](*args[2])
    return Global.named(*_FROM_TYPE)(*args)


_DROPPED = re.compile(rb"R0[^\x00-\x27]")
"""REDUCE, POP, and any opcode: a call whose result is dropped. The 12,370th memo index has the same two bytes."""

_GETATTR = {("__builtin__", "getattr"), ("builtins", "getattr")}


def _no_persistent_id(pid: object) -> Any:
    raise FormatError("the pickle refers to an object outside it (persistent id)")


def load(
    buffer: bytes,
    start: int = 0,
    *,
    builders: Builders | None = None,
    persistent_load: Callable[[Any], Any] | None = None,
    closed: Callable[[Iterable[tuple[str, str]]], bool] = lambda _: False,
    walked: bool = True,
) -> tuple[Any, tuple[tuple[str, str], ...]]:
    """Returns (tree, names): the tree of the pickle at ``start``, and every (module, qualname) it names.

    `scan` the buffer first. ``persistent_load`` maps a persistent id to a leaf. ``closed`` says, by the names of
    the pickle, that no leaf can have a tree of its own to check. ``walked``: False for a caller that never walks the
    tree, but takes the parts that it knows, and counts them. Costs about 1 us per tensor.
    Raises: FormatError if unpickling fails, LimitError if the tree passes a limit of `walk`, any error of a builder.
    """
    unpickling = _Unpickling(builders or {}, persistent_load)
    try:
        try:
            made = unpickling.run(buffer, start)
            dropped = b"R0" in buffer and _DROPPED.search(buffer) is not None
            has_classes = dropped and not closed(unpickling.found)
        except _pickle.UnpicklingError as error:
            has_classes = "NEWOBJ" in str(error)
            if not has_classes:
                raise
        if has_classes:
            made = unpickling.run_in_python(buffer, start)
        if walked:
            deque(walk(made), maxlen=0)  # raises the LimitError of any later walk here, once
        if walked and not closed(unpickling.found):
            deque(nodes(made), maxlen=0)
    except CkptoolError:
        raise
    except (
        ArithmeticError, AttributeError, EOFError, LookupError, MemoryError, RecursionError, TypeError, ValueError,
        _pickle.UnpicklingError,
    ) as error:  # fmt: skip
        raise FormatError(f"the pickle does not unpickle: {type(error).__name__}: {error}") from error
    return made, unpickling.names()


def stand_in(value: Any, leaf: Callable[[Any], Any]) -> Any:
    """Returns what `load` makes of the pickle of a live object; ``leaf`` maps a tensor to its node, all else to None.

    Raises: whatever pickling the object raises, and what `load` raises.
    """
    import _pickle

    leaves: list[Any] = []

    def persistent_id(item: Any) -> int | None:
        node = leaf(item)
        if node is None:
            return None
        leaves.append(node)
        return len(leaves) - 1

    stream = io.BytesIO()
    pickler = type("_Pickler", (_pickle.Pickler,), {"persistent_id": staticmethod(persistent_id)})
    pickler(stream, 4).dump(value)
    buffer = stream.getvalue()
    scan(buffer)
    return load(buffer, persistent_load=leaves.__getitem__)[0]


def with_arrays(made: Any, names: Collection[tuple[str, str]], span: Span, *, keep: bool = True) -> Any:
    """Returns a tree of `load` with tensors in place of NumPy's arrays (see `numpy_calls`)."""
    if not any(module.startswith("numpy") for module, _ in names):
        return made
    from ckptool.pickling.numpy_calls import with_tensors

    return with_tensors(made, names, span, keep=keep)
