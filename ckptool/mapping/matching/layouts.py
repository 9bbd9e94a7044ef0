"""How a tensor of one shape becomes one of another, as far as shapes can say."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

Shape = Sequence[int]


def op_of(shape: Shape, target: Shape, turned: bool | None = None) -> str | None:
    """Returns the op from one shape to another, "" for none, and None if the numbers of elements differ.

    ``turned``: whether matrices that could be either are transposed.
    """
    shape, target = tuple(shape), tuple(target)
    if shape == target:
        return "transpose" if turned and len(shape) == 2 and shape[0] == shape[1] and shape[0] > 1 else ""
    if prod(shape) != prod(target):
        return None
    if len(shape) == 2 and shape[::-1] == target:
        return "transpose"
    if solid(shape) == solid(target):
        return "reshape"
    if len(shape) == len(target) and sorted(shape) == sorted(target):
        return "permute:" + ",".join(map(str, _axes(shape, target)))
    return "reshape"


def solid(shape: Shape) -> tuple[int, ...]:
    """Returns a shape without its dimensions of 1, which change nothing."""
    return tuple(size for size in shape if size != 1)


def _axes(shape: Shape, target: Shape) -> list[int]:
    """Returns the order of dimensions; channels-last kernels (h, w, in, out) become (out, in, h, w)."""
    backwards = (len(shape) - 1, len(shape) - 2, *range(len(shape) - 2))
    if [shape[axis] for axis in backwards] == list(target):
        return list(backwards)
    axes: list[int] = []
    for size in target:
        axes.append(next(axis for axis, one in enumerate(shape) if one == size and axis not in axes))
    return axes
