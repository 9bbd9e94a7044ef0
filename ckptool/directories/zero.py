"""ZeRO's partitions: where the elements of a parameter are in the flat tensors that each process of DeepSpeed saved.

Stage 1 and 2: a group of parameters is one vector, one parameter behind the other, cut into a part for each process.

    process 0            process 1          process 2
    [a a a a a b b b b]  [b b c c c c c c]  [c]          the last parts may be shorter or empty, or padded

Stage 3: every parameter is cut into parts of equal size, and its last ones padded; each process has all groups.

    process 0        process 1        process 2
    [a a b b b c c]  [a a b b b c c]  [a . b b . c .]

Source: ``utils/zero_to_fp32.py`` of DeepSpeed 0.19.8.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from math import prod

from ckptool.core.tensor import Storage, TensorInfo, chunks, narrow, shaped
from ckptool.core.tree import brief
from ckptool.errors import FormatError

Shapes = Mapping[str, tuple[int, ...]]
"""{parameter: its shape}, in the order in which its elements are saved."""


class Flat:
    """Tensors of one dimension, one behind the other, as one vector of ``numel`` elements."""

    def __init__(self, tensors: Sequence[TensorInfo]) -> None:
        self.tensors = [tensor for tensor in tensors if tensor.numel]
        *self.starts, self.numel = accumulate((tensor.numel for tensor in self.tensors), initial=0)

    def cut(self, start: int, count: int) -> Iterator[TensorInfo]:
        """Yields views that together are ``count`` elements from ``start`` on. They must be there."""
        place = bisect_right(self.starts, start) - 1
        while count:
            tensor, first = self.tensors[place], start - self.starts[place]
            size = min(count, tensor.numel - first)
            yield narrow(tensor, 0, first, size)
            start, count, place = start + size, count - size, place + 1


def cut_in_turn(shapes: Shapes, parts: Sequence[TensorInfo], paddings: Sequence[int]) -> dict[str, TensorInfo]:
    """Returns the parameters of one group of ZeRO-1 or 2, of which ``parts`` has each process's part.

    ``paddings``: the elements that follow each parameter for its alignment. Raises: FormatError for another number of
    elements than the shapes have; as `chunks`.
    """
    flat, made = Flat(parts), {}
    starts = [*accumulate((prod(shape) + pad for shape, pad in zip(shapes.values(), paddings, strict=True)), initial=0)]
    wanted = starts[-1] - sum(paddings[-1:])
    # DeepSpeed pads to a multiple of twice the number of processes; newer versions do not save that padding.
    padded = -(-wanted // (2 * len(parts))) * 2 * len(parts)
    if not wanted <= flat.numel <= padded:
        raise FormatError(f"the parts of a group have {flat.numel:,} elements, and its parameters {wanted:,}")
    for (name, shape), start in zip(shapes.items(), starts, strict=False):
        made[name] = put_together(shape, [*flat.cut(start, prod(shape))], parts)
    return made


def cut_each(shapes: Shapes, groups: Sequence[Sequence[TensorInfo]]) -> dict[str, TensorInfo]:
    """Returns the parameters of ZeRO-3; ``groups`` has the flat tensors of each process.

    Raises: FormatError for another number of elements than the shapes have; as `chunks`.
    """
    flats, world, position = [*map(Flat, groups)], len(groups), 0
    sizes = {name: -(-prod(shape) // world) for name, shape in shapes.items()}
    for rank, flat in enumerate(flats):
        if flat.numel != sum(sizes.values()):
            what = f"the part of process {rank} has {flat.numel:,} elements, and {world} processes need"
            raise FormatError(f"{what} {sum(sizes.values()):,} each for the parameters' shapes")
    like, made = [tensor for group in groups for tensor in group], {}
    for name, size in sizes.items():
        counts = (max(0, min(size, prod(shapes[name]) - rank * size)) for rank in range(world if size else 0))
        pieces = [piece for flat, count in zip(flats, counts, strict=False) for piece in flat.cut(position, count)]
        made[name] = put_together(shapes[name], pieces, like)
        position += size
    return made


def put_together(shape: tuple[int, ...], pieces: Sequence[TensorInfo], like: Sequence[TensorInfo]) -> TensorInfo:
    """Returns the tensor whose elements are those of ``pieces`` in turn, in memory of its own.

    Its device is that of the first one ``like`` it, so that the parameters of a model are on one. Raises: as `chunks`.
    """
    starts = accumulate((piece.numel for piece in pieces), initial=0)
    boxes = [((start,), (piece.numel,), piece) for start, piece in zip(starts, pieces, strict=False)]
    return shaped(chunks(like[0].dtype, (prod(shape),), boxes, like[0].location), shape)


def flattened(tensor: object, what: str) -> TensorInfo:
    """Returns a tensor as one of one dimension. Raises: FormatError for anything else than dense elements in order."""
    dense = isinstance(tensor, TensorInfo) and isinstance(tensor.source, Storage) and not tensor.is_lazy
    if isinstance(tensor, TensorInfo) and dense and tensor.is_contiguous:
        return replace(tensor, shape=(tensor.numel,), stride=(1,), is_parameter=False, requires_grad=False)
    raise FormatError(f"{what} is {brief(tensor)}: expected a tensor of the elements in turn")
