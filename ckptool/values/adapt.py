"""Computes the tensors of adapters while they are written: rows picked, means, channels mixed, grids resampled.

Values are computed in float32 (float64 stays float64) and rounded once to the output dtype, to nearest even like
torch. Rows, means and mixtures are streamed; a grid, which is a small table of positions, is read whole.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from math import prod
from typing import TYPE_CHECKING, Any

from ckptool.core.dtypes import DTYPES
from ckptool.core.tensor import Derived, Mix, Resample, Run, TensorInfo, narrow, shaped, storage_range
from ckptool.errors import FormatError, UnreadableError, explain
from ckptool.io.files import read_given
from ckptool.io.source import BLOCK, Bytes, Spool
from ckptool.limits import MAX_LIST
from ckptool.values.streams import Stream, gathered

if TYPE_CHECKING:
    import numpy as np

Blocks = Callable[[TensorInfo], Iterator[Bytes]]
"""Gives a tensor's elements in C order, little-endian, in blocks of whole elements (`tensor_blocks`)."""


def blocks(source: Derived, dtype: str, read: Blocks) -> Iterator[Bytes]:
    """Yields the elements of an adapter's tensor in C order; ``dtype`` is that of the output.

    Raises: DependencyError if a grid is resampled and torch is not installed.
    """
    if source.op == "take":
        return _take(source, dtype, read)
    if source.op == "mean":
        return _mean(source, dtype, read)
    if source.op == "mix":
        return _mix(source, dtype, read)
    return _resample(source, dtype, read)


def read_object(path: str) -> Any:
    """Returns the content of a list of rows or tokens: the value if it is JSON, else the text.

    Raises: UnreadableError, LimitError; FormatError for a file that is not text, or is named .json and is not JSON.
    """
    try:
        content = read_given(path, "a list of rows or tokens", MAX_LIST)
    except (OSError, ValueError) as error:
        reason = explain(error) if isinstance(error, OSError) else str(error)
        raise UnreadableError(f"cannot be read: {reason}", path) from error
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise FormatError(f"is not UTF-8 text: {error}", path) from error
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        if path.endswith(".json"):
            raise FormatError(f"is not JSON: {error}", path) from error
        return text


# --- rows --------------------------------------------------------------------------------------------------------


def _take(source: Derived, dtype: str, read: Blocks) -> Iterator[Bytes]:
    """Yields rows in the order of the runs; needs memory for one block, whatever the order."""
    width = DTYPES[dtype].bits * prod((source.shape or ())[1:]) // 8
    inputs: dict[int, _Rows] = {}
    try:
        yield from gathered(piece for run in source.args for piece in _run(run, source, width, inputs, read))
    finally:
        for rows in inputs.values():
            rows.close()


def _run(run: Run, source: Derived, width: int, inputs: dict[int, _Rows], read: Blocks) -> Iterator[Bytes]:
    number, first, count = run
    if number >= 0:
        if number not in inputs:
            mine = (other for other in source.args if other.source == number)
            inputs[number] = _Rows(source.inputs[number], width, read, mine)
        rows = inputs[number]
        if rows.count > 1 or count == 1:
            yield from rows.read(first, count)
            return
    row = b"".join(map(bytes, rows.read(0, 1))) if number >= 0 else bytes(width)
    most = max(1, BLOCK // max(width, 1))
    for start in range(0, count, most):
        yield row * min(most, count - start)


class _Rows:
    """The rows of a tensor in any order: by their offsets in its file, as a stream, else from a temporary file."""

    def __init__(self, tensor: TensorInfo, width: int, read: Blocks, runs: Iterator[Run]) -> None:
        self.tensor, self.width, self._blocks = tensor, width, read
        self.count = (tensor.shape or (1,))[0]
        found = storage_range(tensor)
        self._by_offset = found is not None and found[0].span.member != "deflated"
        self._stream = Stream(read(tensor)) if not self._by_offset and _ascending(runs) else None
        self._spool: Spool | None = None

    def read(self, first: int, count: int) -> Iterator[Bytes]:
        """Yields the bytes of ``count`` rows from ``first`` on, each piece valid until the next is asked for."""
        start, nbytes = first * self.width, count * self.width
        if self._by_offset:
            return self._blocks(narrow(shaped(self.tensor, self.tensor.shape or (1,)), 0, first, count))
        if self._stream is not None:
            self._stream.skip_to(start)
            return self._stream.read(nbytes)
        if self._spool is None:
            self._spool = Spool(self._blocks(self.tensor))
        return self._spool.blocks(start, nbytes)

    def close(self) -> None:
        if self._spool is not None:
            self._spool.close()


def _ascending(runs: Iterator[Run]) -> bool:
    """Returns whether each run begins at or after the end of the one before."""
    end = 0
    for run in runs:
        if run.first < end:
            return False
        end = run.first + run.length
    return True


# --- numbers -----------------------------------------------------------------------------------------------------


def _mean(source: Derived, dtype: str, read: Blocks) -> Iterator[Bytes]:
    """Yields the mean of a tensor's rows; summed in float64, so that a million rows lose no precision."""
    import numpy as np

    from ckptool.values.codec import encode

    tensor = source.inputs[0]
    shape = tensor.shape or ()
    total: Any = np.zeros(prod(shape[1:]), "f8")
    for group in _groups(tensor, prod(shape[1:]), read):
        total += group.sum(axis=0, dtype="f8")
    mean = total / shape[0]
    yield encode(dtype, mean if tensor.dtype == "float64" else mean.astype("f4")).tobytes()


def _mix(source: Derived, dtype: str, read: Blocks) -> Iterator[Bytes]:
    """Yields a tensor in which each new index of one dimension is a weighted sum of a few old ones.

    Zero weights are not listed, so infinite values affect only the channels that use them.
    """
    import numpy as np

    from ckptool.values.codec import encode

    tensor, mix = source.inputs[0], source.args
    shape, dim = tensor.shape or (), source.dim
    behind = prod(shape[dim + 1 :])
    for group in _groups(tensor, shape[dim] * behind, read):
        old = group.reshape(-1, shape[dim], behind)
        new = np.empty((len(old), len(mix.rows), behind), old.dtype)
        with np.errstate(over="ignore", invalid="ignore"):
            for index, weights in enumerate(mix.rows):
                if index and weights == mix.rows[index - 1]:
                    new[:, index] = new[:, index - 1]
                else:
                    new[:, index] = _weighted(old, weights, mix)
        yield encode(dtype, new.reshape(-1)).tobytes()


def _weighted(old: Any, weights: tuple[tuple[int, float], ...], mix: Mix) -> Any:
    """Returns the sum of weight * old[:, index], divided; every step in the values' own precision."""
    kind = old.dtype.type
    total: Any = None
    for index, weight in weights:
        term = old[:, index] * kind(weight) if weight != 1.0 else old[:, index]
        total = term if total is None else total + term
    return total / kind(mix.divisor) if mix.divisor != 1.0 else total


def _resample(source: Derived, dtype: str, read: Blocks) -> Iterator[Bytes]:
    """Yields a tensor with some dimensions interpolated by `torch.nn.functional.interpolate`, or by its inverse.

    The grid is permuted so that its dimensions are last, without a copy, as timm and others do: torch then runs the
    same kernel and the last bit agrees.
    """
    from ckptool.values.codec import import_torch

    torch = import_torch("resampling positions")
    tensor, how = source.inputs[0], source.args
    shape, size = tensor.shape or (), source.shape or ()
    raw = bytearray(b"".join(bytes(block) for block in read(tensor)))
    values = torch.frombuffer(raw, dtype=getattr(torch, tensor.dtype)).reshape(shape)
    values = values if tensor.dtype == "float64" else values.float()
    made = _interpolated(torch, values, how, size).to(getattr(torch, dtype)).contiguous().reshape(-1)
    for start in range(0, len(made), BLOCK // 8):
        yield made[start : start + BLOCK // 8].view(torch.uint8).numpy().tobytes()


def _interpolated(torch: Any, values: Any, how: Resample, size: tuple[int, ...]) -> Any:
    others = [axis for axis in range(values.dim()) if axis not in how.dims]
    order = [*others, *how.dims]
    grid = [values.shape[axis] for axis in how.dims]
    moved = values.permute(order).reshape(1, -1, *grid)

    def interpolate(images: Any) -> Any:
        return torch.nn.functional.interpolate(
            images, [size[axis] for axis in how.dims], mode=how.mode, align_corners=how.align_corners,
            antialias=how.antialias,
        )  # fmt: skip

    if how.inverse:
        count = prod(grid)
        matrix = interpolate(torch.eye(count, dtype=values.dtype).reshape(count, 1, *grid)).reshape(count, -1)
        made = moved.reshape(-1, count) @ torch.linalg.pinv(matrix.T)
    else:
        made = interpolate(moved)
    made = made.reshape([size[axis] for axis in order])
    return made.permute([order.index(axis) for axis in range(len(order))])


def _groups(tensor: TensorInfo, width: int, read: Blocks) -> Iterator[np.ndarray[Any, Any]]:
    """Yields a tensor's values as arrays of several rows of ``width`` elements, about a block each."""
    from ckptool.values.codec import decode_float

    nbytes = width * DTYPES[tensor.dtype].bits // 8
    pending = bytearray()
    for block in read(tensor):
        if pending:
            pending += block
            block = bytes(pending) if len(pending) >= nbytes else b""
            if block:
                pending.clear()
        whole = len(block) - len(block) % nbytes
        pending += block[whole:]
        if whole:
            yield decode_float(tensor.dtype, block[:whole]).reshape(-1, width)
