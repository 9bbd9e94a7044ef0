"""GGUF, the format of llama.cpp: typed metadata, named tensors, and for most weights blocks of quantised values.

    "GGUF" | version u32 | number of tensors u64 | number of entries u64 | entries | tensors | padding | data
    entry     key | type u32 | value             a string is its length (u64) and UTF-8 bytes
    tensor    name | number of dimensions u32 | sizes u64 ... | type u32 | offset in the data u64

Sizes are in the reverse of torch's order. The data and each tensor in them begin on a multiple of the entry
``general.alignment``. A big-endian file has the same magic; its version's bytes are reversed, as all numbers are.
A quantised row consists of blocks of some bytes, and no element has bytes of its own: such a tensor is an `Opaque` of
its type's name, which has all of its bytes as one part.
Source: ``ggml/docs/gguf.md``, and ``gguf/constants.py`` of gguf 0.19.
"""

from __future__ import annotations

import re
import struct
from dataclasses import replace
from itertools import islice, pairwise
from math import prod
from typing import Any, Literal

from ckptool.core.checkpoint import Checkpoint
from ckptool.core.dtypes import DTYPES
from ckptool.core.tensor import Opaque, Storage, TensorInfo, contiguous_stride, is_countable
from ckptool.core.tree import Global, brief
from ckptool.errors import FormatError, UnsupportedError, listed
from ckptool.io.files import names_in
from ckptool.io.paths import dirname, join
from ckptool.io.probe import Probe
from ckptool.io.source import Source
from ckptool.limits import MAX_DIMS, MAX_GGUF, MAX_NESTING
from ckptool.text import plural

PLAIN = {
    0: "float32", 1: "float16", 24: "int8", 25: "int16", 26: "int32", 27: "int64", 28: "float64", 30: "bfloat16",
}  # fmt: skip
"""Types with an element of torch's each."""

QUANTISED = {
    2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292), 16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136), 29: ("IQ1_M", 256, 56), 34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36),
}  # fmt: skip
"""Types of blocks: name, elements and bytes of a block."""

NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Types of metadata that are numbers: how `struct` reads them."""

NAMES = {
    0: "uint8", 1: "int8", 2: "uint16", 3: "int16", 4: "uint32", 5: "int32", 6: "float32", 7: "bool", 8: "string",
    9: "array", 10: "uint64", 11: "int64", 12: "float64",
}  # fmt: skip
UINT32, STRING, ARRAY = 4, 8, 9

SHOWN = 8
"""Items of an array whose values are shown; of longer ones the number is."""

BLOCK = 1 << 18
"""Bytes of the header that are read at once."""


def matches(probe: Probe) -> bool:
    """Returns True: nothing else begins with the magic."""
    return True


SPLIT = re.compile(r"(.+)-(\d{5,9})-of-(\d{5,9})\.gguf")
"""How llama.cpp names the files of one model; each says ``split.count`` in its metadata."""


def read(probe: Probe) -> Checkpoint:
    """Returns the checkpoint, of all files of a split model whichever is named; reads the headers only.

    A file that is not there is a problem, and sets `Checkpoint.broken`. Raises: FormatError, LimitError,
    UnsupportedError.
    """
    found = _read(probe)
    count = found.metadata.get("split.count", "")
    if not count.isdecimal() or int(count) < 2:
        return found
    own, directory = SPLIT.fullmatch(probe.name), dirname(probe.path)
    if own is None or int(own[3]) != int(count):
        note = (
            f"one of {count} files of a split model, read alone as its name is not NAME-00001-of-{int(count):05}.gguf"
        )
        return replace(found, notes=(note,))
    named = (match for name in names_in(directory or ".") if (match := SPLIT.fullmatch(name)))
    files = {int(match[2]): match[0] for match in named if (match[1], match[3]) == (own[1], own[3])}
    tree: dict[str, TensorInfo] = {}
    metadata: dict[str, str] = {}
    nbytes = 0
    for _, name in sorted(files.items()):
        part = found
        if name != probe.name:
            with Probe(join(directory, name)) as other:
                if not other.head.startswith(b"GGUF"):
                    raise FormatError("a file of a split GGUF model that does not begin as one", other.path)
                part = _read(other)
        if twice := [key for key in part.tree if key in tree]:
            raise FormatError(f"tensors that another file of the model has too: {listed(twice)}", part.url)
        tree |= part.tree
        metadata, nbytes = {**part.metadata, **metadata}, nbytes + part.nbytes
    gone = [
        f"{own[1]}-{n:05}-of-{own[3]}.gguf" for n in islice((n for n in range(1, int(count) + 1) if n not in files), 6)
    ]
    problems = [f"files of the split model are not there: {listed(gone, 5)}"] if gone else []
    if not gone and metadata.get("split.tensors.count", str(len(tree))) != str(len(tree)):
        problems.append(
            f"split.tensors.count says {metadata['split.tensors.count']}, its files have {len(tree)} tensors"
        )
    metadata = {
        key: text for key, text in metadata.items() if key not in ("split.no", "split.count", "split.tensors.count")
    }
    return replace(
        found, tree=tree, metadata=metadata, nbytes=nbytes, problems=tuple(problems), broken=bool(problems),
        notes=(f"put together from {plural(len(files), 'file')}: {listed(map(files.__getitem__, sorted(files)), 3)}",),
    )  # fmt: skip


def _read(probe: Probe) -> Checkpoint:
    """Returns the checkpoint of one file."""
    file = probe.file
    header = _Header(file)
    version = header.version()
    if version not in (2, 3):
        raise UnsupportedError(
            f"a GGUF file of version {version}; it is not a format ckptool reads: versions 2 and 3 are", file.path
        )
    count, entries = header.number("Q"), header.number("Q")
    header.expect(count, 24, "tensors")
    header.expect(entries, 13, "entries of metadata")
    metadata: dict[str, str] = {}
    alignment = 32
    for _ in range(entries):
        key, kind = header.string("the key of an entry"), header.number("I")
        if key in metadata:
            raise FormatError(f"its metadata has the key {key!r} twice", file.path)
        value = header.value(kind, key)
        metadata[key] = value if isinstance(value, str) else str(value)
        if key == "general.alignment":
            if kind != UINT32 or value < 1 or value & (value - 1):
                raise FormatError(f"general.alignment is {brief(value)}: expected a power of two, as uint32", file.path)
            alignment = value
    found = dict[str, tuple[tuple[int, ...], int, int]]()
    for _ in range(count):
        name = header.string("the name of a tensor")
        if name in found:
            raise FormatError(f"two tensors have the name {name!r}", file.path)
        found[name] = header.shape(name), header.number("I"), header.number("Q")
    start = -(-header.position // alignment) * alignment
    _refuse_swapped([name for name, (_, kind, _) in found.items() if PLAIN.get(kind) == "bfloat16"], header)
    tree: dict[str, TensorInfo] = {}
    ranges: list[tuple[int, int, str]] = []
    for name, (shape, kind, offset) in found.items():
        if offset % alignment:
            raise FormatError(f"{name!r} begins at byte {offset} of the data: no multiple of {alignment}", file.path)
        tree[name] = tensor = _tensor(name, shape, kind, start + offset, header)
        if tensor.nbytes:
            ranges.append((start + offset, start + offset + tensor.nbytes, name))
    ranges.sort()
    for (_, end, first), (begin, _, second) in pairwise(ranges):
        if begin < end:
            raise FormatError(f"{first!r} and {second!r} overlap in the data", file.path)
    end = ranges[-1][1] if ranges else header.position
    probe.end = min(-(-end // alignment) * alignment, file.size)
    return Checkpoint(tree, url=file.path, nbytes=file.size, metadata=metadata)


def _refuse_swapped(names: list[str], header: _Header) -> None:
    """Raises UnsupportedError for bfloat16 in a big-endian file: the writers do not agree on the order of its bytes."""
    if header.order == ">" and names:
        raise UnsupportedError(
            f"big-endian, with bfloat16 of unknown byte order: {listed(names)}; convert it to little-endian first",
            header.file.path,
        )


def _tensor(name: str, shape: tuple[int, ...], kind: int, begin: int, header: _Header) -> TensorInfo:
    """Returns a tensor that begins at a byte of the file. Raises: FormatError, UnsupportedError."""
    file = header.file
    if kind in PLAIN:
        dtype, block, size = PLAIN[kind], 1, DTYPES[PLAIN[kind]].bits // 8
    elif kind in QUANTISED:
        dtype, block, size = QUANTISED[kind]
    else:
        raise UnsupportedError(f"{name!r} has the GGUF type {kind}, which is not known", file.path)
    row = shape[-1] if shape else 1
    if row % block:
        raise FormatError(f"{name!r} has rows of {row} elements: {dtype} has blocks of {block}", file.path)
    nbytes = prod(shape) // block * size
    if begin + nbytes > file.size:
        what = f"{name!r}, {dtype} of shape {brief(list(shape))}, ends at byte {begin + nbytes}"
        raise FormatError(f"{what} of a file of {file.size}: a truncated download?", file.path)
    span = file.span(begin, nbytes)
    stride = contiguous_stride(shape)
    byteorder: Literal["little", "big"] = "big" if header.order == ">" else "little"
    if kind in PLAIN:
        return TensorInfo(dtype, shape, stride, 0, Storage(span, dtype, byteorder=byteorder))
    raw = TensorInfo("uint8", (nbytes,), (1,), 0, Storage(span, "uint8", byteorder=byteorder))
    return TensorInfo("uint8", shape, stride, 0, Opaque(dtype, Global.named("gguf", dtype)(), (raw,), in_torch=False))


class _Header:
    """A header that is read in order, a block at a time. ``order`` is the byte order of its numbers."""

    def __init__(self, file: Source) -> None:
        self.file = file
        self.order = "<"
        self.position = 4
        self._block, self._begin = b"", 0
        self._most = MAX_GGUF.now()

    def version(self) -> int:
        """Returns the version, from which the byte order follows."""
        version: int = self.number("I")
        if version & 0xFFFF == 0:
            self.order, self.position = ">", 4
            version = self.number("I")
        return version

    def take(self, nbytes: int, what: str) -> bytes:
        """Returns the next bytes. Raises: FormatError if the file ends before, LimitError."""
        begin = self._skip(nbytes, what)
        if begin < self._begin or self.position > self._begin + len(self._block):
            self._begin = begin
            self._block = self.file.read(begin, min(max(nbytes, BLOCK), self.file.size - begin))
        return self._block[begin - self._begin : self.position - self._begin]

    def _skip(self, nbytes: int, what: str) -> int:
        begin = self.position
        if nbytes > self.file.size - begin:
            where = f"from byte {begin} on, in a file of {self.file.size}"
            raise FormatError(f"{what} takes {nbytes} bytes {where}: a truncated download?", self.file.path)
        if begin + nbytes > self._most:
            enough = max(begin + nbytes, 2 * self._most)
            raise MAX_GGUF.passed(f"{what} ends at byte {begin + nbytes:,} of its header", enough)
        self.position += nbytes
        return begin

    def number(self, form: str, what: str = "a number of its header") -> Any:
        """Returns the next number."""
        return struct.unpack(self.order + form, self.take(struct.calcsize("<" + form), what))[0]

    def expect(self, count: int, least: int, what: str) -> None:
        """Raises FormatError unless the file has room for so many items of at least so many bytes each."""
        if count * least > self.file.size - self.position:
            raise FormatError(
                f"its header claims {count} {what}, at byte {self.position} of {self.file.size}: a truncated download?",
                self.file.path,
            )

    def string(self, what: str) -> str:
        """Returns the next string."""
        raw = self.take(self.number("Q", what), what)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise FormatError(
                f"{what} before byte {self.position} is no UTF-8: {brief(raw)}", self.file.path
            ) from error

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a tensor, in torch's order."""
        dims = self.number("I")
        if dims > MAX_DIMS:
            raise FormatError(f"{name!r} has {dims} dimensions, more than {MAX_DIMS} (MAX_DIMS)", self.file.path)
        raw = self.take(8 * dims, f"the shape of {name!r}")
        shape: tuple[int, ...] = struct.unpack(f"{self.order}{dims}Q", raw)[::-1]
        if not is_countable(shape):
            raise FormatError(f"{name!r} has shape {brief(list(shape))}: more than can be counted", self.file.path)
        return shape

    def value(self, kind: int, key: str) -> Any:
        """Returns a number or a string; of an array a text: its items if they are few and no arrays, else how many."""
        what = f"the value of {key!r}"
        if kind in NUMBERS:
            return self.number(NUMBERS[kind], what)
        if kind == STRING:
            return self.string(what)
        if kind != ARRAY:
            raise FormatError(f"{what} has the type {kind}, unknown to GGUF", self.file.path)
        kind, count = self._array(what)
        if kind != ARRAY and count <= SHOWN:
            return brief([self.value(kind, key) for _ in range(count)])
        self._pass(kind, count, what)
        return plural(count, NAMES[kind])

    def _array(self, what: str) -> tuple[int, int]:
        """Returns the type and the number of the items of the array that begins here."""
        kind, count = self.number("I", what), self.number("Q", what)
        if kind not in NAMES:
            raise FormatError(f"{what} is an array of the type {kind}, unknown to GGUF", self.file.path)
        self.expect(count, {STRING: 8, ARRAY: 12}.get(kind) or struct.calcsize(f"<{NUMBERS[kind]}"), f"items of {what}")
        return kind, count

    def _pass(self, kind: int, count: int, what: str) -> None:
        """Passes over the items of an array, and of the arrays in it."""
        left = [[kind, count]]
        while left:
            kind, count = left[-1]
            if kind == ARRAY and count:
                left[-1][1] -= 1
                left.append(list(self._array(what)))
                if len(left) > MAX_NESTING:
                    raise FormatError(f"{what} is nested over {MAX_NESTING} deep (MAX_NESTING)", self.file.path)
                continue
            if kind == STRING:
                for _ in range(count):
                    self._skip(self.number("Q", what), what)
            elif kind in NUMBERS:
                self._skip(count * struct.calcsize(f"<{NUMBERS[kind]}"), what)
            left.pop()
