"""Reads the bytes of a `TensorInfo`, a block at a time; numpy and torch are imported only where they are needed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from contextvars import copy_context
from itertools import accumulate, pairwise
from math import prod
from typing import Any

from ckptool.core.dtypes import DTYPES, Changed
from ckptool.core.tensor import Box, Derived, Opaque, Span, Storage, TensorInfo, plain_range, reach, storage_range
from ckptool.core.tree import brief
from ckptool.errors import FormatError, UnsupportedError
from ckptool.io.files import Files
from ckptool.io.source import BLOCK, Bytes, Source, Spool
from ckptool.limits import MAX_EXPANDED, MAX_EXPANSION
from ckptool.values.streams import Stream, gathered, in_step

READ_WHOLE = 1 << 26
"""Most bytes of a storage that are read into memory to gather a view of it. Above, the file is mapped, at a risk:
access behind the end of a file that was truncated meanwhile kills the process (SIGBUS)."""

DENSE = 64
"""How many times its own bytes may be read to gather a view: a million views of one storage may each reach far."""


def storage_blocks(storage: Storage, files: Files, start: int, nbytes: int, swap_unit: int = 1) -> Iterator[Bytes]:
    """Returns a byte range of a storage in blocks; each unit of ``swap_unit`` bytes is reversed, if that is over 1."""
    blocks = files.blocks(storage.span, start, nbytes)
    if swap_unit == 1:
        return blocks
    import numpy as np

    return (np.frombuffer(block, f"u{swap_unit}").byteswap().tobytes() for block in blocks)


def tensor_blocks(tensor: TensorInfo, files: Files) -> Iterator[Bytes]:
    """Yields a dense tensor's elements in C order, little-endian, in blocks of whole elements (about `BLOCK` bytes).

    Conjugation and negation bits are resolved. A contiguous tensor is a plain read; any other is gathered, through a
    memory map if it is large, at about 2 GB/s on a 2-core machine.
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
    """Yields what `tensor_blocks` does; a large cast is computed one block ahead on another thread, during the write.

    Nothing else may read through ``files`` until the iterator is exhausted.
    """
    blocks, source = tensor_blocks(tensor, files), tensor.source
    # These allocate every block anew. Other tensors may yield a buffer that the next block overwrites.
    computed = isinstance(source, Derived) and source.op in ("cast", "dequantize")
    if computed and tensor.is_whole and tensor.nbytes >= COMPUTED_AHEAD:
        return _ahead(blocks)
    return blocks


COMPUTED_AHEAD = 1 << 23
"""Bytes of a tensor from which computing ahead gains more than a thread costs."""


def _ahead(blocks: Iterator[Bytes]) -> Iterator[Bytes]:
    from concurrent.futures import ThreadPoolExecutor

    def following_block() -> Bytes | None:
        return next(blocks, None)

    run = copy_context().run  # the context holds the limits in force
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(run, following_block)
        while (block := coming.result()) is not None:
            coming = thread.submit(run, following_block)
            yield block


def runs(tensors: Iterable[TensorInfo]) -> Iterator[Span | TensorInfo]:
    """Yields the spans of files that hold the tensors' bytes as they are; tensors where they are computed.

    Tensors that follow each other in a file are merged into one span.
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
    """Yields the elements of a view that is not contiguous; the storage is read into memory, or mapped if it is large.

    What cannot be mapped is spooled to a temporary file first. A mapped file is checked for changes before every block,
    which leaves only microseconds in which truncating it is fatal.
    """
    import numpy as np

    _refuse_blow_up(tensor, source)
    itemsize = DTYPES[tensor.dtype].bits // 8
    # Dimensions of size 1 are dropped: their strides may leave the storage, and numpy allows 64 dimensions at most.
    steps = [pair for pair in zip(tensor.shape or (), tensor.stride, strict=True) if pair[0] != 1]
    first = tensor.storage_offset * itemsize
    extent = reach(tensor.shape or (), tensor.stride) * itemsize
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
        if not isinstance(file, Spool) and extent <= min(READ_WHOLE, DENSE * tensor.nbytes):
            buffer = file.read(first, extent)
        else:
            file.check()
            buffer, watched = file.map(first, extent), file
            if buffer is None:
                buffer = stack.enter_context(Spool(file.blocks(first, extent))).map(0, extent)
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
    """Raises LimitError for a view of far more elements than its storage has: strides may be 0."""
    if not isinstance(source, Storage) or tensor.nbytes <= source.nbytes:
        return  # nearly every tensor
    if tensor.nbytes > max(MAX_EXPANDED.now(), MAX_EXPANSION.now() * source.nbytes):
        what = (
            f"a {tensor.dtype} tensor of shape {brief(tensor.shape)} has {tensor.nbytes:,} bytes, a view of a storage "
            f"of {source.nbytes:,}, over MAX_EXPANSION, {MAX_EXPANSION.now():,} times it"
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
    """Returns the elements' bytes in little-endian order, with conjugation and negation bits applied."""
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
        tensor = source.inputs[0]
        yield from _cast(source, tensor.dtype, dtype, tensor_blocks(tensor, files), files)
    elif source.op == "dequantize":
        yield from _cast(source, "float64", dtype, _dequantized(source, files), files)
    elif source.op == "nibbles":
        from ckptool.values.codec import nibbles

        width = (source.inputs[0].shape or (1,))[-1]
        yield from (nibbles(rows, width) for rows in _rows(tensor_blocks(source.inputs[0], files), width))
    elif source.op == "copy":
        yield from tensor_blocks(source.inputs[0], files)
    elif source.op in ("cat", "chunks"):
        yield from _put_together(_boxes(source), DTYPES[dtype].bits, files)
    elif source.op == "draw":
        from ckptool.values import random_init

        yield from random_init.blocks(source.args, dtype)
    else:
        from ckptool.values import adapt

        exact = dtype if source.op == "take" else "float64" if source.inputs[0].dtype == "float64" else "float32"
        made = adapt.blocks(source, exact, lambda tensor: tensor_blocks(tensor, files))
        yield from made if exact == dtype else _cast(source, exact, dtype, made, files)


def _cast(source: Derived, old: str, new: str, blocks: Iterator[Bytes], files: Files) -> Iterator[Bytes]:
    """Yields values converted as `torch.Tensor.to` converts them; counts those that change in kind."""
    from ckptool.values.codec import caster

    cast, total = caster(old, new), Changed()
    for block in blocks:
        made, changed = cast(block)
        if any(changed):
            total = Changed(*map(sum, zip(total, changed, strict=True)))
            files.changed[id(source)] = total  # not added to: what is read twice is counted once
        yield made


def changed_values(tensors: Mapping[str, Any], files: Files) -> dict[str, Any]:
    """Returns {field of `Changed`: {key: number of values}} for the values that were read; no key with none."""
    found: dict[str, dict[str, int]] = {name: {} for name in Changed._fields}
    for key, tensor in tensors.items() if files.changed else ():
        if isinstance(tensor, TensorInfo) and isinstance(tensor.source, Derived):
            counts = [files.changed[number] for number in _derivations(tensor.source) if number in files.changed]
            for name, count in zip(Changed._fields, map(sum, zip(*counts, strict=True)), strict=False):
                found[name] |= {key: count} if count else {}
    return found


def _derivations(source: Derived) -> set[int]:
    """Returns the ids of a lazy value and of those it is computed from."""
    inputs = (tensor.source for tensor in source.inputs)
    return {id(source)}.union(*(_derivations(one) for one in inputs if isinstance(one, Derived)))


def _dequantized(source: Derived, files: Files) -> Iterator[Bytes]:
    """Yields a weight's values multiplied by its scales, as float64; in memory are a block, or a row, of them.

    The product of a float of eight bits, or an int8, and a float32 is exact in float64, so it is rounded once.
    """
    import numpy as np

    from ckptool.values.codec import decode

    weight, scale = source.inputs
    shape, sizes = weight.shape or (), source.args
    if scale.numel == 1 or len(shape) == 1:
        shape, sizes = ((weight.numel, 1), (weight.numel, 1)) if scale.numel == 1 else ((*shape, 1), (*sizes, 1))
    many = [-(-count // size) for count, size in zip(shape, sizes, strict=True)]  # scales along each dimension
    width, itemsize, first = shape[-1], DTYPES[scale.dtype].bits // 8, 0
    with Spool(tensor_blocks(scale, files)) as spool:
        for rows in _rows(tensor_blocks(weight, files), width):
            values = decode(weight.dtype, rows).reshape(-1, width)
            places = np.unravel_index(np.arange(first, first + len(values)), shape[:-1])
            lines: Any = np.zeros(len(values), "i8")  # for each row, the row of its scales
            for place, size, count in zip(places, sizes[:-1], many[:-1], strict=True):
                lines = lines * count + place // size
            low, high = int(lines.min()), int(lines.max()) + 1
            raw = spool.read(low * many[-1] * itemsize, (high - low) * many[-1] * itemsize)
            scales = decode(scale.dtype, raw).astype("f8", copy=False).reshape(-1, many[-1])
            if many[-1] > 1:
                scales = scales.repeat(sizes[-1], axis=1)[:, :width]
            with np.errstate(over="ignore", invalid="ignore"):
                yield (values * scales[lines - low]).reshape(-1).view("u1").data
            first += len(values)


def _rows(blocks: Iterator[Bytes], nbytes: int) -> Iterator[Bytes]:
    """Yields blocks of whole rows of ``nbytes`` bytes; one that has no part of a row is passed on uncopied."""
    pending = bytearray()
    for block in blocks:
        if not pending and not len(block) % nbytes:
            yield block
            continue
        pending += block
        whole = len(pending) - len(pending) % nbytes
        if whole:
            yield bytes(pending[:whole])
            del pending[:whole]


def _boxes(source: Derived) -> list[Box]:
    """Returns the parts of a ``chunks`` or ``cat`` tensor that have elements, each with its offset in the whole."""
    offsets = source.args
    if source.op == "cat":
        ends = accumulate(((tensor.shape or ())[source.dim] for tensor in source.inputs), initial=0)
        before, behind = (0,) * source.dim, (0,) * (len(source.inputs[0].shape or ()) - source.dim - 1)
        offsets = [(*before, end, *behind) for end in ends][:-1]
    pairs = zip(offsets, source.inputs, strict=True)
    return [(offset, tensor.shape or (), tensor) for offset, tensor in pairs if tensor.numel]


def _put_together(boxes: Sequence[Box], bits: int, files: Files) -> Iterator[Bytes]:
    """Yields a tensor that is divided into boxes; each box is read in its own C order, interleaved to the whole's."""
    if len(boxes) == 1:
        yield from tensor_blocks(boxes[0][2], files)
        return
    parts = [(offsets, sizes, Stream(tensor_blocks(tensor, files))) for offsets, sizes, tensor in boxes]
    if parts:
        yield from gathered(_in_turn(_order(parts, 0, bits)))


_Part = tuple[tuple[int, ...], tuple[int, ...], Stream]
_Order = list[tuple[int, "Stream | _Order"]]
"""What is read in turn: (number of bytes, stream), or (how many times, nested order)."""


def _order(parts: Sequence[_Part], dim: int, bits: int) -> _Order:
    """Returns the order of parts that fill a box, from dimension ``dim`` on: it changes where a part begins or ends."""
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


def _in_turn(order: _Order) -> Iterator[Bytes]:
    """Yields the bytes of the streams in the order of the whole tensor."""
    for count, what in order:
        if isinstance(what, Stream):
            yield from what.read(count)
        else:
            for _ in range(count):
                yield from _in_turn(what)


def read_bytes(tensor: TensorInfo, files: Files) -> bytes:
    """Returns all of a dense tensor's bytes, C order, little-endian."""
    return b"".join(bytes(block) for block in tensor_blocks(tensor, files))


def same_bytes(first: TensorInfo, second: TensorInfo, files: Files) -> bool:
    """Returns whether two tensors of one dtype hold the same bytes; reads both, a block at a time."""
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    if first.view == second.view:
        return True
    pairs = in_step(tensor_blocks(first, files), tensor_blocks(second, files))
    return all(_equal(one, other) for one, other in pairs)


def _equal(one: Bytes, other: Bytes) -> bool:
    """Returns whether two pieces of equal length are the same.

    Whole bytes objects compare by memcmp (10 GB/s); memoryviews by element, here of eight bytes (6 GB/s).
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
