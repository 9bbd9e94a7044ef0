"""Which part of a position table is a grid, and of what size, read from shapes alone.

A number of rows rarely says how many of them are a grid. If there is exactly one possibility it is taken; otherwise the
table is refused, with the possibilities and the option that decides.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import isqrt, prod
from typing import Any, NamedTuple

from ckptool.core.tensor import Mix
from ckptool.partial.adapters import Unclear

Shape = tuple[int, ...]

PREFIXES = (0, 1, 2)
"""Tokens before the grid: none, a class token, or a distillation token too (DeiT)."""

EXTRAS = (0, 3)
"""Rows behind a bias table's grid: none, or the three of a class token (BEiT: to it, from it, with itself)."""


class Grids(NamedTuple):
    """The grids of two tables: along ``dim``, without ``before`` and ``behind`` rows, ``old`` becomes ``new``.

    ``dim`` is None if the dimensions ``axes`` of the tensor are the grid.
    """

    dim: int | None
    before: int
    behind: int
    old: Shape
    new: Shape
    axes: Shape = ()


def positions(old: Shape, new: Shape, options: Mapping[str, Any]) -> Grids:
    """Returns the grids of two tables of absolute positions: NxC, 1xNxC, 1xHxWxC or 1xCxHxW. Raises: Unclear."""
    if len(old) == 4 and not old[0] == new[0] == 1:
        raise Unclear(
            "positions of four dimensions are 1xHxWxC or 1xCxHxW; for a patch embedding's kernel, patch-embed"
        )
    if len(old) == 4:
        return _images(old, new, options)
    dim = _table(old, new)
    if options.get("layout"):
        raise Unclear("layout is for tables of four dimensions")
    prefix = options.get("prefix")
    if options.get("mode") == "linear":
        return _line(dim, prefix or 0, 0, old, new)
    sizes = options.get("grid"), options.get("to")
    counts = old[dim], new[dim]
    number, first, second = _only(counts, sizes, prefix, PREFIXES, _grid, "prefix", "prefix=N, grid=HxW and to=HxW")
    return Grids(dim, number, 0, first, second)


def biases(old: Shape, new: Shape, options: Mapping[str, Any]) -> Grids:
    """Returns the grids of two tables of relative position biases: Nxheads, headsxHxW. Raises: Unclear.

    A window of H x W has (2H-1) x (2W-1) relative positions.
    """
    window, to = (
        tuple(2 * side - 1 for side in options[name]) if name in options else None for name in ("window", "to")
    )
    if len(old) == 3 and old[0] == new[0]:
        if not all(side % 2 for side in (*old[1:], *new[1:])) or options.get("mode") == "linear":
            raise Unclear("a table of heads x H x W has odd H and W")
        if window not in (None, old[1:]) or to not in (None, new[1:]):
            raise Unclear("the windows named are not the tables'")
        return Grids(None, 0, 0, old[1:], new[1:], (1, 2))
    if len(old) != 2 or old[1] != new[1]:
        raise Unclear("it takes tables of positions x heads with equally many heads")
    extra = options.get("extra")
    if options.get("mode") == "linear":
        return _line(0, 0, extra or 0, old, new)
    counts = old[0], new[0]
    number, first, second = _only(counts, (window, to), extra, EXTRAS, _odd, "extra", "extra=N, window=HxW and to=HxW")
    return Grids(0, 0, number, first, second)


def geometric(old: int, new: int) -> Mix:
    """Returns the weights that interpolate one side of a bias table from old to new relative positions.

    The old positions are spaced in a geometric progression, densest at the middle, whose ratio (found by bisection
    between 1.01 and 1.5, to 1e-6) makes them span the new ones; between them it is linear. It is what BEiT's
    fine-tuning does, and ``resize_rel_pos_bias_table`` of timm 1.0 by default.
    """
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        ratio = (low + high) / 2
        if (1 - ratio ** (old // 2)) / (1 - ratio) > new // 2:
            high = ratio
        else:
            low = ratio
    distances, reached = [], 1.0
    for step in range(old // 2):
        distances.append(reached)
        reached += ratio ** (step + 1)
    points = [*(-distance for distance in reversed(distances)), 0.0, *distances]
    return Mix(tuple(_between(points, position) for position in range(-(new // 2), new // 2 + 1)))


def _between(points: Sequence[float], position: int) -> tuple[tuple[int, float], ...]:
    """Returns the (index, weight) of the points around a position; outside all of them, of the outermost."""
    right = bisect_left(points, position)
    if right == len(points):
        return ((right - 1, 1.0),)
    if right == 0 or points[right] == position:
        return ((right, 1.0),)
    share = (position - points[right - 1]) / (points[right] - points[right - 1])
    return (right - 1, 1 - share), (right, share)


def _table(old: Shape, new: Shape) -> int:
    """Returns which dimension counts the positions."""
    if old[-1] == new[-1] and (len(old) == 2 or (len(old) == 3 and old[0] == new[0] == 1)):
        return len(old) - 2
    raise Unclear("it takes tables NxC, 1xNxC, 1xHxWxC or 1xCxHxW of equally many channels C")


def _line(dim: int, before: int, behind: int, old: Shape, new: Shape) -> Grids:
    counts = [shape[dim] - before - behind for shape in (old, new)]
    if min(counts) < 1:
        raise Unclear("no position is left to interpolate")
    return Grids(dim, before, behind, (counts[0],), (counts[1],))


def _images(old: Shape, new: Shape, options: Mapping[str, Any]) -> Grids:
    if options.get("mode") == "linear" or options.get("prefix"):
        raise Unclear("a table of four dimensions is a grid: mode=linear and prefix are not for it")
    fitting = [
        axes for name, axes in (("nhwc", (1, 2)), ("nchw", (2, 3)))
        if options.get("layout", name) == name
        and all(old[axis] == new[axis] for axis in range(4) if axis not in axes)
        and options.get("grid", _sizes(old, axes)) == _sizes(old, axes)
        and options.get("to", _sizes(new, axes)) == _sizes(new, axes)
    ]  # fmt: skip
    if old[0] != new[0] or not fitting:
        raise Unclear("neither NxHxWxC nor NxCxHxW has the other dimensions equal, and the grids named")
    if len(fitting) > 1:
        raise Unclear("it may be NxHxWxC or NxCxHxW: say layout=nhwc or layout=nchw")
    return Grids(None, 0, 0, _sizes(old, fitting[0]), _sizes(new, fitting[0]), fitting[0])


def _sizes(shape: Shape, axes: Shape) -> Shape:
    return tuple(shape[axis] for axis in axes)


def _grid(count: int, size: Shape | None) -> Shape | None:
    """Returns the grid of this many positions: the given size, else a square; None if they are not a grid."""
    if count < 1:
        return None
    side = isqrt(count)
    found = size or (side, side)
    return found if prod(found) == count else None


def _odd(count: int, size: Shape | None) -> Shape | None:
    found = _grid(count, size)
    return found if found and all(side % 2 for side in found) else None


def _only(
    counts: Sequence[int],
    sizes: Sequence[Shape | None],
    given: int | None,
    usual: Sequence[int],
    grid: Callable[[int, Shape | None], Shape | None],
    name: str,
    options: str,
) -> tuple[int, Shape, Shape]:
    """Returns (rows that are no grid, grid of the source, grid of the target). Raises: Unclear with all possibilities.

    The number of other rows is the ``given`` one; else what the given ``sizes`` leave; else one of the ``usual``.
    """
    left = [count - prod(size) for count, size in zip(counts, sizes, strict=True) if size]
    tried = [given] if given is not None else list(dict.fromkeys(left)) or usual
    pairs = [[grid(count - number, size) for count, size in zip(counts, sizes, strict=True)] for number in tried]
    found = [(number, old, new) for number, (old, new) in zip(tried, pairs, strict=True) if old and new]
    if len(found) == 1:
        return found[0]
    if found:
        raise Unclear(f"it can be read with {_or(f'{name}={number}' for number, _, _ in found)}: say {options}")
    sides = []
    for side, count, grids in zip(("source", "target"), counts, zip(*pairs, strict=True), strict=True):
        known = [f"{number} + {size[0]}x{size[1]}" for number, size in zip(tried, grids, strict=True) if size]
        sides.append(f"the {side}'s {count} {f'can be {_or(known)}' if known else 'fit no such grid'}")
    raise Unclear(f"with {name} {_or(map(str, tried))}, {' and '.join(sides)}: say {options}")


def _or(items: Iterable[str]) -> str:
    return " or ".join(items)
