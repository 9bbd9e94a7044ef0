"""From a `TensorInfo` to its bytes, a block at a time; numpy and torch are imported only where a job needs them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from contextvars import copy_context
from itertools import accumulate, pairwise
from math import prod
from typing import Any

from ckptool.core.dtypes import DTYPES
from ckptool.core.tensor import Box, Derived, Opaque, Span, Storage, TensorInfo, plain_range, reach, storage_range
from ckptool.core.tree import brief
from ckptool.errors import FormatError, UnsupportedError
from ckptool.io.source import BLOCK, Bytes, Files, Source, Spool
from ckptool.limits import MAX_EXPANDED, MAX_EXPANSION

HELD = 1 << 26
"""Bytes up to which what a view looks into is read before it is gathered: a file that shrinks is then noticed, while
touching a memory map behind the end of its file ends the process (SIGBUS)."""

DENSE = 64
"""How many times a view's own bytes may be read for it: a file may have a million views that each reach far."""


def storage_blocks(storage: Storage, files: Files, start: int, nbytes: int, swap_unit: int = 1) -> Iterator[Bytes]:
    """Yields a range of a storage as it lies, in blocks; with ``swap_unit`` over 1, reversed in such units."""
    for block in files.blocks(storage.span, start, nbytes):
        yield block if swap_unit == 1 else _swapped(block, swap_unit)


def _swapped(block: Bytes, unit: int) -> Bytes:
    import numpy as np

    return np.frombuffer(block, f"u{unit}").byteswap().tobytes()


def tensor_blocks(tensor: TensorInfo, files: Files) -> Iterator[Bytes]:
    """Yields a dense tensor's elements in C order, little-endian, in blocks of whole elements (about `BLOCK` bytes).

    Conjugation and negation bits are resolved. A contiguous tensor is a plain read; any other is gathered
    through a memory map, which a 2-core machine does at about 2 GB/s.
    Raises: UnsupportedError for an `Opaque` tensor, DependencyError if a cast needs torch.
    """
    source = tensor.source
    if isinstance(source, Opaque):
        raise UnsupportedError(f"a {source.kind} tensor has no plain bytes")
    if isinstance(source, Derived):
        if tensor.is_whole:
            yield from _derived(source, tensor.dtype, files)
        elif tensor.numel:
            yield from _gathered(tensor, source, files, 1)
        return
    if found := storage_range(tensor):
        storage, start, swap = found
        yield from storage_blocks(storage, files, start, tensor.nbytes, swap)
    elif tensor.numel:
        yield from _gathered(tensor, source, files, DTYPES[tensor.dtype].swap_unit if source.byteorder == "big" else 1)


def blocks_ahead(tensor: TensorInfo, files: Files) -> Iterator[Bytes]:
    """Yields what `tensor_blocks` does; those of a large cast one block ahead, on another thread.

    Whoever writes them does so meanwhile. Nothing else may read through ``files`` until they are all there.
    """
    blocks, source = tensor_blocks(tensor, files), tensor.source
    # A cast makes new memory for every block. Others may yield a buffer that the next block is read into.
    if isinstance(source, Derived) and source.op == "cast" and tensor.is_whole and tensor.nbytes >= COMPUTED_AHEAD:
        return _ahead(blocks)
    return blocks


COMPUTED_AHEAD = 1 << 23
"""Bytes of a tensor from which a thread, and handing it blocks, is worth its time."""


def _ahead(blocks: Iterator[Bytes]) -> Iterator[Bytes]:
    from concurrent.futures import ThreadPoolExecutor

    def following() -> Bytes | None:
        return next(blocks, None)

    run = copy_context().run  # the limits that hold here
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(run, following)
        while (block := coming.result()) is not None:
            coming = thread.submit(run, following)
            yield block


def runs(tensors: Iterable[TensorInfo]) -> Iterator[Span | TensorInfo]:
    """Yields what the elements of one tensor after another are: spans of files, or tensors that must be worked on.

    Tensors that lie behind each other in a file come as one span.
    """
    run: Span | None = None
    nbytes = 0
    for tensor in tensors:
        found = plain_range(tensor)
        span = None
        if found is not None and found[0].member is None:
            span, start, size = found
            if size != span.nbytes:
                span = span._replace(offset=span.offset + start, nbytes=size)
        if run is not None:
            if span is not None and span.url == run.url and span.offset == run.offset + nbytes:
                nbytes += span.nbytes
                continue
            yield run._replace(nbytes=nbytes)
        run = span
        if span is None:
            yield tensor
        else:
            nbytes = span.nbytes
    if run is not None:
        yield run._replace(nbytes=nbytes)


def _gathered(tensor: TensorInfo, source: Storage | Derived, files: Files, swap: int) -> Iterator[Bytes]:
    """Yields the elements of a view that is not contiguous out of what it looks into: read, or mapped if it is large.

    What cannot be mapped goes into a temporary file first. Before every block from a map the file is looked at again,
    which leaves microseconds for it to shrink in.
    """
    import numpy as np

    _refuse_blow_up(tensor, source)
    itemsize = DTYPES[tensor.dtype].bits // 8
    # Dimensions of 1 move nothing: without them no stride leaves the storage, and there are fewer than numpy's 64.
    steps = [pair for pair in zip(tensor.shape or (), tensor.stride, strict=True) if pair[0] != 1]
    first = tensor.storage_offset * itemsize
    held = reach(tensor.shape or (), tensor.stride) * itemsize
    with ExitStack() as stack:
        file: Source
        if isinstance(source, Derived):
            file = stack.enter_context(Spool(_derived(source, tensor.dtype, files)))
        elif source.span.member == "deflated" or source.span.memory is not None:
            file = stack.enter_context(Spool(files.blocks(source.span)))
        else:
            span = files.locate(source.span)
            file, first, end = files.get(span), span.offset + first, span.offset + source.nbytes
            if end > file.size:
                raise FormatError(f"a storage ends at byte {end}, behind the end of the file", span.url)
        buffer: Any
        watched: Source | None = None
        if not isinstance(file, Spool) and held <= min(HELD, DENSE * tensor.nbytes):
            buffer = file.read(first, held)
        else:
            file.check()
            buffer, watched = file.map(first, held), file
            if buffer is None:
                buffer = stack.enter_context(Spool(file.blocks(first, held))).map(0, held)
        array: Any = np.ndarray(
            [count for count, _ in steps],
            np.dtype(f"V{itemsize}"),
            buffer,
            strides=[step * itemsize for _, step in steps],
        )
        for slab in _slabs(array):
            if watched is not None:
                watched.check()
            yield _resolved(np.ascontiguousarray(slab).reshape(-1).view("u1"), tensor, swap)


def _refuse_blow_up(tensor: TensorInfo, source: Storage | Derived) -> None:
    """Raises LimitError for a view of so many elements that reading it would never end: a stride of 0 is enough."""
    if not isinstance(source, Storage) or tensor.nbytes <= source.nbytes:
        return  # nearly all
    if tensor.nbytes > max(MAX_EXPANDED.now(), MAX_EXPANSION.now() * source.nbytes):
        what = (
            f"a {tensor.dtype} tensor of shape {brief(tensor.shape)} has {tensor.nbytes:,} bytes, seen in a storage of "
            f"{source.nbytes:,}, over MAX_EXPANSION, {MAX_EXPANSION.now():,} times it"
        )
        raise MAX_EXPANDED.passed(what, tensor.nbytes, source.span.url)


def _slabs(array: Any) -> Iterator[Any]:
    """Yields an array in C order as sub-arrays of about `BLOCK` bytes."""
    if array.nbytes <= BLOCK or array.ndim == 0:
        yield array
        return
    row = array.nbytes // array.shape[0]
    if row > BLOCK:
        for part in array:
            yield from _slabs(part)
        return
    step = BLOCK // row
    for start in range(0, array.shape[0], step):
        yield array[start : start + step]


def _resolved(raw: Any, tensor: TensorInfo, swap: int) -> Bytes:
    """Returns the bytes of elements with byte order, conjugation and negation made plain."""
    if swap > 1:
        raw = raw.view(f"u{swap}").byteswap().view("u1")
    extras = tensor.extras
    if extras is None or not tensor.is_lazy:
        return bytes(raw)
    row = DTYPES[tensor.dtype]
    if row.kind == "int":
        return bytes((-raw.view(f"i{row.bits // 8}")).view("u1"))
    # A float's sign is its top bit: of every component for neg, of the imaginary ones for conj.
    words = raw.view(f"u{row.swap_unit}").copy()
    sign = 1 << (8 * row.swap_unit - 1)
    if extras.neg:
        words ^= words.dtype.type(sign)
    if extras.conj:
        words[1::2] ^= words.dtype.type(sign)
    return bytes(words.view("u1"))


def _derived(source: Derived, dtype: str, files: Files) -> Iterator[Bytes]:
    """Yields computed elements in C order."""
    if source.op == "cast":
        yield from _cast(source, dtype, files)
    elif source.op == "copy":
        yield from tensor_blocks(source.inputs[0], files)
    elif source.op in ("cat", "chunks"):
        yield from _put_together(_boxes(source), DTYPES[dtype].bits, files)
    elif source.op == "draw":
        from ckptool.values import random_init

        yield from random_init.blocks(source.args, dtype)
    else:
        from ckptool.values import adapt

        yield from adapt.blocks(source, dtype, lambda tensor: tensor_blocks(tensor, files))


def _cast(source: Derived, dtype: str, files: Files) -> Iterator[Bytes]:
    """Yields values converted as `torch.Tensor.to` converts them; counts what becomes infinite or NaN on the way."""
    from ckptool.values.codec import caster

    tensor = source.inputs[0]
    cast = caster(tensor.dtype, dtype)
    for block in tensor_blocks(tensor, files):
        made, lost = cast(block)
        if lost:
            files.overflowed[id(source)] = files.overflowed.get(id(source), 0) + lost
        yield made


def _boxes(source: Derived) -> list[Box]:
    """Returns the parts of a tensor that have elements: those of ``chunks``, or of ``cat`` in a row."""
    offsets = source.args
    if source.op == "cat":
        ends = accumulate(((tensor.shape or ())[source.dim] for tensor in source.inputs), initial=0)
        before, behind = (0,) * source.dim, (0,) * (len(source.inputs[0].shape or ()) - source.dim - 1)
        offsets = [(*before, end, *behind) for end in ends][:-1]
    places = zip(offsets, source.inputs, strict=True)
    return [(place, tensor.shape or (), tensor) for place, tensor in places if tensor.numel]


def _put_together(boxes: Sequence[Box], bits: int, files: Files) -> Iterator[Bytes]:
    """Yields a tensor that lies in boxes: each is read in its own C order, as far as the whole's order is in it."""
    if len(boxes) == 1:
        yield from tensor_blocks(boxes[0][2], files)
        return
    pending = bytearray()
    parts = [(offsets, sizes, _Stream(tensor_blocks(tensor, files))) for offsets, sizes, tensor in boxes]
    for stream, nbytes in _turns(_order(parts, 0, bits)) if parts else ():
        left = nbytes
        while left:
            piece = stream.some(left)
            left -= len(piece)
            if len(piece) >= BLOCK and not pending:
                yield piece
                continue
            pending += piece
            if len(pending) >= BLOCK:
                yield bytes(pending)
                pending.clear()
    if pending:
        yield bytes(pending)


class _Stream:
    """Blocks read as a stream of bytes."""

    def __init__(self, blocks: Iterator[Bytes]) -> None:
        self.blocks = blocks
        self.rest: Bytes = b""

    def some(self, most: int) -> Bytes:
        """Returns the next bytes, one at least; valid until more are asked for."""
        self.rest = self.rest or next(self.blocks)
        piece = self.rest[:most]
        self.rest = self.rest[len(piece) :]
        return piece


_Part = tuple[tuple[int, ...], tuple[int, ...], _Stream]
_Order = list[tuple[int, "_Stream | _Order"]]
"""What is read in turn: (bytes, of a stream), or (times, an order of its own)."""


def _order(parts: Sequence[_Part], dim: int, bits: int) -> _Order:
    """Returns how parts that fill a box follow each other from one dimension on: cut where one begins or ends."""
    cuts = sorted({edge for at, sizes, _ in parts for edge in (at[dim], at[dim] + sizes[dim])})
    waiting = sorted(parts, key=lambda part: part[0][dim], reverse=True)
    begun: list[_Part] = []
    found: _Order = []
    for low, high in pairwise(cuts):
        begun = [part for part in begun if part[0][dim] + part[1][dim] > low]
        while waiting and waiting[-1][0][dim] == low:
            begun.append(waiting.pop())
        if len(begun) == 1:
            ((_, sizes, stream),) = begun
            found.append(((high - low) * prod(sizes[dim + 1 :]) * bits // 8, stream))
        else:
            found.append((high - low, _order(begun, dim + 1, bits)))
    return found


def _turns(order: _Order) -> Iterator[tuple[_Stream, int]]:
    """Yields (stream, bytes to take of it) in the order of the whole."""
    for count, what in order:
        if isinstance(what, _Stream):
            yield what, count
        else:
            for _ in range(count):
                yield from _turns(what)


def read_bytes(tensor: TensorInfo, files: Files) -> bytes:
    """Returns all of a dense tensor's bytes, C order, little-endian."""
    return b"".join(bytes(block) for block in tensor_blocks(tensor, files))


def same_bytes(first: TensorInfo, second: TensorInfo, files: Files) -> bool:
    """Returns whether two tensors of one dtype hold the same bytes; reads both, a block at a time."""
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    if first.view == second.view:
        return True
    pairs = _aligned(tensor_blocks(first, files), tensor_blocks(second, files))
    return all(_equal(one, other) for one, other in pairs)


def _equal(one: Bytes, other: Bytes) -> bool:
    """Returns whether two pieces of equal length are the same.

    Whole buffers compare as memory (10 GB/s); memoryviews by element, eight bytes of each at a time (6 GB/s).
    """
    first = one.obj if isinstance(one, memoryview) else one
    second = other.obj if isinstance(other, memoryview) else other
    if (
        isinstance(first, (bytes, bytearray))
        and isinstance(second, (bytes, bytearray))
        and len(first) == len(second) == len(one)
    ):
        return first == second
    if len(one) % 8:
        return bytes(one) == bytes(other)
    return memoryview(one).cast("B").cast("Q") == memoryview(other).cast("B").cast("Q")


def _aligned(first: Iterator[Bytes], second: Iterator[Bytes]) -> Iterator[tuple[Bytes, Bytes]]:
    """Yields pieces of equal length from two streams whose blocks may differ in size."""
    one: Bytes = b""
    other: Bytes = b""
    while True:
        one = one or next(first, b"")
        other = other or next(second, b"")
        length = min(len(one), len(other))
        if not length:
            return
        yield one[:length], other[:length]
        one, other = one[length:], other[length:]
