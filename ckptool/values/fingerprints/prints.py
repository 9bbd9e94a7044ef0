"""Fingerprints of a tensor's values, made in one pass: of all elements, and of every row and column.

Every element's bits are hashed to 64 bits. The *order* of a tensor is the sum of these hashes, each multiplied by a
random weight of its position; the *total* is their plain sum, which does not depend on positions. Sums are modulo
2^64, so those of rows and columns add up, and do not depend on how the tensor is divided into blocks. The weights are
drawn anew in every process: nobody can make two tensors of one order, and two others have one by accident once in
about 2^60.

Two dtypes are compared at the lower precision of both (`meeting`), so a print has a `Level` for each that is needed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from math import prod
from typing import Any, NamedTuple

import numpy as np

from ckptool.core.dtypes import COMMON_FLOATS, DTYPES
from ckptool.core.tensor import Opaque, TensorInfo
from ckptool.io.files import Files
from ckptool.io.source import Bytes
from ckptool.values.blocks import tensor_blocks
from ckptool.values.codec import Array, decode_float, encode
from ckptool.values.scan import Job, read

TILE = 1 << 16
"""Elements hashed at a time: their hashes fit into the cache."""

TENSOR_LINES = 1 << 20
"""Most rows and columns of one tensor that are hashed one by one; of others only the whole is."""

ALL_LINES = 1 << 24
"""Most rows and columns of one side: 12 bytes each. The tensors with fewest come first."""

MANY = 8
"""Distinct values from which a tensor is not like another by accident. Two of full precision are as good."""

SMALL = 1 << 12
"""Elements up to which tensors of one shape are hashed together."""

_FACTOR = 0x9E3779B97F4A7C15
_STEP = 0xD1342543DE82EF95
_MASK = (1 << 64) - 1


def meeting(one: str, other: str) -> str | None:
    """Returns the dtype at which values of two dtypes can be equal; None where there is none.

    >>> meeting("float32", "bfloat16"), meeting("bfloat16", "float16"), meeting("int8", "int8")
    ('bfloat16', None, 'int8')
    """
    if one == other:
        return one
    if {one, other} <= {*COMMON_FLOATS} and {one, other} != {"bfloat16", "float16"}:
        return max(one, other, key=COMMON_FLOATS.index)
    return None


class Frame(NamedTuple):
    """A tensor as ``matrices`` of ``rows`` x ``columns`` elements; ``folded``: columns that count as one."""

    matrices: int
    rows: int
    columns: int
    folded: int = 1

    @property
    def lines(self) -> tuple[int, int]:
        """Returns how many rows and columns there are in all; a vector has no columns."""
        return self.matrices * self.rows, 0 if self.columns == 1 else self.matrices * self.columns // self.folded


def frame(shape: tuple[int, ...]) -> Frame:
    """Returns the matrices in a tensor: a stack of them (experts), or a kernel, whose rows are its first dimension.

    >>> frame((3, 4)), frame((8, 512, 64)), frame((64, 32, 3, 3)), frame((5,))
    (Frame(matrices=1, rows=3, columns=4, folded=1), Frame(matrices=8, rows=512, columns=64, folded=1), \
Frame(matrices=1, rows=64, columns=288, folded=9), Frame(matrices=1, rows=5, columns=1, folded=1))
    """
    if len(shape) < 2:
        return Frame(1, prod(shape), 1)
    if len(shape) == 2:
        return Frame(1, *shape)
    if min(shape[-2:]) >= MANY:
        return Frame(prod(shape[:-2]), *shape[-2:])
    return Frame(1, shape[0], prod(shape[1:]), prod(shape[2:]))


class Lines(NamedTuple):
    """A number for every row and for every column of a `Frame`."""

    rows: Array
    columns: Array


class Level(NamedTuple):
    """The fingerprints of a tensor's values in one dtype. ``lines`` is None where there are too many."""

    order: int
    total: int
    lines: Lines | None


@dataclass(slots=True)
class Print:
    """The fingerprints of a tensor. ``sums``: of the values of every row and column, which are near for near tensors.

    ``constant``: all elements are one value. ``telling``: the values are so many that an equal tensor is the same one.
    ``error`` says why there are none.
    """

    shape: tuple[int, ...]
    dtype: str
    levels: dict[str, Level] = field(default_factory=dict)
    sums: Lines | None = None
    constant: bool = True
    telling: bool = False
    error: str | None = None


def take(tensors: Sequence[TensorInfo], others: Iterable[str], files: Files, lines: bool = True) -> list[Print]:
    """Returns the prints of tensors, at the precisions at which they meet the dtypes ``others``; reads each once.

    A tensor that meets none is not read. Without ``lines`` there are none of large tensors. Raises: FormatError,
    UnreadableError.
    """
    dtypes = {*others}
    meets = {
        own: sorted({met for other in dtypes if (met := meeting(own, other))}) for own in {t.dtype for t in tensors}
    }
    prints = [Print(tensor.shape or (), tensor.dtype, error=_unreadable(tensor, meets) or None) for tensor in tensors]
    many = [sum(frame(one.shape).lines) for one in prints]
    kept = 0
    views: dict[object, int] = {}
    sketches: dict[int, Sketch] = {}
    small: dict[tuple[object, ...], list[int]] = defaultdict(list)
    for number in sorted(range(len(tensors)), key=many.__getitem__):
        tensor, one = tensors[number], prints[number]
        if one.error or views.setdefault(tensor.view, number) != number:
            continue
        kept += many[number]
        if tensor.numel <= SMALL:
            small[one.dtype, one.shape].append(number)
        else:
            few = lines and many[number] <= TENSOR_LINES and kept <= ALL_LINES
            sketches[number] = Sketch(one.dtype, one.shape, meets[one.dtype], few)
    read([Job(tensors[number], sketch=sketch) for number, sketch in sketches.items()], files)
    for number, sketch in sketches.items():
        sketch.finish(prints[number])
    for numbers in small.values():
        step = max(1, TILE // tensors[numbers[0]].numel)
        for start in range(0, len(numbers), step):
            some = numbers[start : start + step]
            _pile([prints[n] for n in some], [tensors[n] for n in some], meets[prints[some[0]].dtype], files)
    for number, tensor in enumerate(tensors):
        first = prints[views.get(tensor.view, number)]
        if first is not prints[number]:
            prints[number] = replace(first)
    return prints


def _pile(prints: Sequence[Print], tensors: Sequence[TensorInfo], meets: Sequence[str], files: Files) -> None:
    """Makes the prints of small tensors of one dtype and shape together: one by one they would take far longer."""
    dtype, form, count = prints[0].dtype, frame(prints[0].shape), len(prints)
    raw = b"".join(bytes(block) for tensor in tensors for block in tensor_blocks(tensor, files))
    codes = _codes(dtype, raw).reshape(count, -1)
    values = decode_float(dtype, raw) if dtype in COMMON_FLOATS else None
    for name in meets:
        hashes = _hashes(_codes_as(name, dtype, codes, values)).reshape(count, -1)
        orders, totals = (hashes * _weights()[: hashes.shape[1]]).sum(1).tolist(), hashes.sum(1).tolist()
        for one, order, total, lines in zip(prints, orders, totals, _piled(form, hashes), strict=True):
            one.levels[name] = Level(order, total, lines)
    constant, telling = (codes == codes[:, :1]).all(1).tolist(), _telling(dtype, codes).tolist()
    with np.errstate(invalid="ignore", over="ignore"):
        sums = [None] * count if values is None else [*_piled(form, values.reshape(count, -1))]
    for one, same, enough, its in zip(prints, constant, telling, sums, strict=True):
        one.constant, one.telling, one.sums = same, enough, its


def _piled(form: Frame, values: Array) -> Iterator[Lines]:
    """Yields the sums of the rows and columns of tensors, each of which is a row of ``values``."""
    many = len(values)
    matrices = values.reshape(many * form.matrices, form.rows, form.columns)
    rows = matrices.sum(2).reshape(many, -1)
    columns = matrices.sum(1) if form.columns > 1 else values[:, :0]
    columns = columns.reshape(many, -1, form.folded).sum(2) if form.folded > 1 else columns.reshape(many, -1)
    return map(Lines, rows, columns)


def _telling(dtype: str, codes: Array) -> Array:
    """Returns for each row of codes whether they are `MANY`, or two with all the digits of their dtype."""
    ranked = np.sort(codes[:, :: max(1, codes.shape[1] // 256)], axis=1)
    new = np.ones(ranked.shape, bool)
    new[:, 1:] = ranked[:, 1:] != ranked[:, :-1]
    found: Array = new.sum(1) >= MANY
    if dtype in ("float32", "float64"):
        found |= (new & (ranked & ranked.dtype.type(0xFFF) != 0)).sum(1) > 1
    return found


def _unreadable(tensor: TensorInfo, meets: Mapping[str, Sequence[str]]) -> str:
    """Returns why a tensor has no values to compare; "" if it has."""
    if isinstance(tensor.source, Opaque):
        described = tensor.described_in
        return f"{described.what} has no values" if described else f"a {tensor.kind} tensor is not compared by values"
    if DTYPES[tensor.dtype].bits % 8 or tensor.shape is None:
        return f"values of {tensor.dtype} cannot be compared"
    if not tensor.numel:
        return "it is empty"
    return "" if meets[tensor.dtype] else f"the other side has no {tensor.dtype}, nor what it is cast to"


@cache
def _weights() -> Array:
    """Returns the weights of the positions in a tile: random odd numbers, others in every process."""
    return np.random.default_rng().integers(0, 1 << 64, TILE, "u8") | np.uint64(1)


def _codes(dtype: str, data: Bytes) -> Array:
    """Returns a number for every element that says all its bits; of complex128 one that nearly does."""
    width = DTYPES[dtype].bits // 8
    codes = np.frombuffer(data, f"<u{min(width, 8)}")
    return codes if width <= 8 else codes[::2] * np.uint64(_FACTOR) + codes[1::2]


def _codes_as(name: str, dtype: str, codes: Array, values: Array | None) -> Array:
    """Returns the codes of the same elements as another dtype."""
    if name == dtype or values is None:
        return codes
    made = encode(name, values)
    return made.view(f"<u{made.itemsize}")


def _hashes(codes: Array) -> Array:
    hashes = codes.astype("u8")
    hashes *= np.uint64(_FACTOR)
    hashes ^= hashes >> np.uint64(32)
    hashes *= np.uint64(_STEP)
    hashes ^= hashes >> np.uint64(29)
    return hashes


class Sketch:
    """What is added up while a large tensor is read: see `Print`."""

    def __init__(self, dtype: str, shape: tuple[int, ...], levels: Iterable[str], lines: bool) -> None:
        self.dtype, self.frame = dtype, frame(shape)
        self.width = DTYPES[dtype].bits // 8
        self.levels = [_Sums(name, self.frame, lines) for name in levels]
        self.near = _Lines(self.frame, "f8") if lines and dtype in COMMON_FLOATS else None
        self.position = 0
        self.first: Any = None
        self.constant, self.telling = True, False

    def add(self, block: Bytes) -> None:
        """Adds the next elements of the tensor in C order."""
        for start in range(0, len(block), TILE * self.width):
            self._add(block[start : start + TILE * self.width])

    def _add(self, piece: Bytes) -> None:
        codes = _codes(self.dtype, piece)
        if self.constant:
            self.first = codes[0] if self.first is None else self.first
            self.constant = bool((codes == self.first).all())
        if not self.telling and not self.constant:
            self.telling = bool(_telling(self.dtype, codes[None])[0])
        values = decode_float(self.dtype, piece) if self.dtype in COMMON_FLOATS else None
        for level in self.levels:
            level.add(_codes_as(level.dtype, self.dtype, codes, values), self.position)
        if self.near is not None and values is not None:
            with np.errstate(invalid="ignore", over="ignore"):
                self.near.add(values, self.position)
        self.position += len(codes)

    def finish(self, print_: Print) -> None:
        """Puts what was found into a print."""
        print_.levels = {level.dtype: level.level() for level in self.levels}
        print_.constant, print_.telling = self.constant, self.telling
        if self.near is not None and not self.constant:
            print_.sums = Lines(*(line.astype("f4") for line in self.near.found()))


class _Sums:
    """The sums of hashes of one dtype's codes."""

    def __init__(self, dtype: str, form: Frame, lines: bool) -> None:
        self.dtype = dtype
        self.order = self.total = 0
        self.lines = _Lines(form, "u8") if lines else None

    def add(self, codes: Array, position: int) -> None:
        hashes = _hashes(codes)
        at, done = position % TILE, 0
        while done < len(hashes):  # at most two pieces: the weights begin anew after every tile
            piece = hashes[done : done + TILE - at]
            turn = pow(_STEP, (position + done) // TILE, 1 << 64)
            self.order += int((piece * _weights()[at : at + len(piece)]).sum()) * turn
            at, done = 0, done + len(piece)
        self.order &= _MASK
        self.total = (self.total + int(hashes.sum())) & _MASK
        if self.lines is not None:
            self.lines.add(hashes, position)

    def level(self) -> Level:
        return Level(self.order, self.total, self.lines.found() if self.lines is not None else None)


class _Lines:
    """The sums of every row and column."""

    def __init__(self, form: Frame, kind: str) -> None:
        self.frame = form
        self.rows = np.zeros(form.matrices * form.rows, kind)
        self.columns = np.zeros((form.matrices, form.columns if form.columns > 1 else 0), kind)

    def add(self, values: Array, start: int) -> None:
        """Adds elements from the flat index ``start`` on: a part of a row, whole rows, a part of a row."""
        width = self.frame.columns
        if width == 1:
            self.rows[start : start + len(values)] = values
            return
        row, inside = divmod(start, width)
        if inside:
            self._part(values[: width - inside], row, inside)
            values, row = values[width - inside :], row + 1
        whole = len(values) // width
        if whole:
            self._whole(values[: whole * width].reshape(whole, width), row)
        if len(values) > whole * width:
            self._part(values[whole * width :], row + whole, 0)

    def _part(self, values: Array, row: int, inside: int) -> None:
        self.rows[row : row + 1] += values.sum()
        self.columns[row // self.frame.rows, inside : inside + len(values)] += values

    def _whole(self, values: Array, row: int) -> None:
        self.rows[row : row + len(values)] += values.sum(1)
        height = self.frame.rows
        done = -row % height if len(values) >= 2 * height else 0
        many = (len(values) - done) // height
        if done or many > 1:  # a piece of a matrix, several whole ones, a piece
            first, behind = (row + done) // height, done + many * height
            self.columns[first : first + many] += values[done:behind].reshape(many, height, -1).sum(1)
            for rest, at in ((values[:done], row), (values[behind:], row + behind)):
                if len(rest):
                    self.columns[at // height] += rest.sum(0)
            return
        done = 0
        while done < len(values):  # the columns of one matrix after another
            matrix, inside = divmod(row + done, height)
            piece = values[done : done + height - inside]
            self.columns[matrix] += piece.sum(0)
            done += len(piece)

    def found(self) -> Lines:
        columns = self.columns.reshape(-1)
        if self.frame.folded > 1:
            columns = columns.reshape(-1, self.frame.folded).sum(1)
        return Lines(self.rows, columns)
