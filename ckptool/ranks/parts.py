"""A part of a tensor as a lazy tensor: what a rank writes of one that is divided. Pure."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate
from operator import mul

from ckptool.core.dtypes import DTYPES
from ckptool.core.tensor import Box, Derived, Storage, TensorInfo, chunks, computed_as, view

Numbers = tuple[int, ...]


def is_divisible(tensor: TensorInfo) -> bool:
    """Returns whether `box` can give any part without computing the others: stored, cast, copied, or joined values."""
    source = tensor.source
    if isinstance(source, Storage):
        return tensor.numel > 1 and DTYPES[tensor.dtype].bits % 8 == 0
    if not isinstance(source, Derived) or not tensor.is_whole or tensor.numel < 2:
        return False
    if source.op in ("cast", "copy"):
        return source.inputs[0].shape == tensor.shape and is_divisible(source.inputs[0])
    if source.op in ("chunks", "cat"):
        return tensor.shape == _joined_shape(source) and all(
            isinstance(one.source, Storage) or is_divisible(one) for one in source.inputs if one.numel
        )
    return False


def _joined_shape(source: Derived) -> Numbers:
    if source.op == "chunks":
        return source.shape or ()
    shape = source.inputs[0].shape or ()
    total = sum((one.shape or ())[source.dim] for one in source.inputs)
    return (*shape[: source.dim], total, *shape[source.dim + 1 :])


def box(tensor: TensorInfo, offsets: Numbers, sizes: Numbers) -> TensorInfo:
    """Returns the part of a divisible tensor that begins at the index ``offsets``, of ``sizes``."""
    source = tensor.source
    if sizes == tensor.shape:
        return tensor
    if not isinstance(source, Derived):
        return view(tensor, sizes, offset=sum(map(mul, offsets, tensor.stride)))
    if source.op in ("cast", "copy"):
        shape = None if source.shape is None else sizes
        made = replace(source, inputs=(box(source.inputs[0], offsets, sizes),), shape=shape)
        return computed_as(view(tensor, sizes, tensor.stride), made)
    found: list[Box] = []
    for begin, part in zip(_begins(source), source.inputs, strict=True):
        low = tuple(map(max, begin, offsets))
        high = tuple(min(at + size, first + count) for at, size, first, count in _zip(begin, part, offsets, sizes))
        if all(first < last for first, last in zip(low, high, strict=True)):
            extent = tuple(last - first for first, last in zip(low, high, strict=True))
            inner = box(part, tuple(first - at for first, at in zip(low, begin, strict=True)), extent)
            found.append((tuple(first - at for first, at in zip(low, offsets, strict=True)), extent, inner))
    return found[0][2] if len(found) == 1 else chunks(tensor.dtype, sizes, found, tensor.location)


def _zip(begin: Numbers, part: TensorInfo, offsets: Numbers, sizes: Numbers) -> zip[tuple[int, int, int, int]]:
    return zip(begin, part.shape or (), offsets, sizes, strict=True)


def _begins(source: Derived) -> list[Numbers]:
    """Returns the first index of each input of joined values."""
    if source.op == "chunks":
        return list(source.args)
    ends = accumulate(((one.shape or ())[source.dim] for one in source.inputs), initial=0)
    behind = len(source.inputs[0].shape or ()) - source.dim - 1
    return [(*(0,) * source.dim, end, *(0,) * behind) for end in ends][:-1]
