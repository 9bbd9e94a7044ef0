"""How a tensor of one shape becomes one of another, as far as shapes can say."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from math import prod
from operator import mul

Shape = Sequence[int]


def op_of(shape: Shape, target: Shape, turned: bool | None = None) -> str | None:
    """Returns the op from one shape to another, "" for none, and None if there is none that keeps rows together.

    ``turned``: whether matrices that could be either are transposed.
    """
    shape, target = tuple(shape), tuple(target)
    if prod(shape) != prod(target):
        return None
    matrix, wanted = solid(shape), solid(target)
    if matrix == wanted and not (turned and len(matrix) == 2 and matrix[0] == matrix[1]):
        return "" if shape == target else "reshape"
    if len(shape) == 2 and shape[::-1] == target:
        return "transpose"
    if shape != target and len(shape) == len(target) and sorted(shape) == sorted(target):
        return "permute:" + ",".join(map(str, _axes(shape, target)))
    if len(matrix) == 2 and matrix[::-1] == wanted:
        first = [] if shape == matrix else ["reshape:" + ",".join(map(str, matrix))]
        return ";".join([*first, "transpose", *([] if target == wanted else ["reshape"])])
    return "reshape" if _nests(shape, target) else None


def _nests(shape: Shape, target: Shape) -> bool:
    """Returns whether one shape has neighbouring dimensions of the other joined, so that no element moves."""
    fewer, more = sorted(({*accumulate(one, mul)} for one in (shape, target)), key=len)
    return fewer <= more


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
