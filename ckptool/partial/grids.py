"""Grids of positions, read from shapes: which part of a position table is a grid, and of what size.

A count of rows rarely says how many of them are a grid. What can be read in one way only is taken; anything
else is refused, with the readings and the option that decides.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import isqrt, prod
from typing import Any, NamedTuple

Shape = tuple[int, ...]

PREFIXES = (0, 1, 2)
"""Tokens before the grid: none, a class token, or one of distillation too (DeiT)."""

EXTRAS = (0, 3)
"""Rows behind a bias table's grid: none, or the three of a class token (BEiT: to it, from it, with itself)."""


class Unclear(ValueError):
    """The shapes can be read in no way, or in several; the message says what to name."""


class Grids(NamedTuple):
    """Where a position table's grid is: along ``dim``, ``before`` and ``behind`` rows aside, ``old`` becomes ``new``.

    ``dim`` is None where the dimensions ``axes`` of the tensor are the grid.
    """

    dim: int | None
    before: int
    behind: int
    old: Shape
    new: Shape
    axes: Shape = ()


def positions(old: Shape, new: Shape, options: Mapping[str, Any]) -> Grids:
    """Returns the grids of two tables of absolute positions: NxC, 1xNxC, 1xHxWxC or 1xCxHxW. Raises: Unclear."""
    if len(old) == 4:
        return _images(old, new, options)
    dim = _table(old, new)
    if options.get("layout"):
        raise Unclear("layout is for tables of four dimensions")
    prefix = options.get("prefix")
    if options.get("mode") == "linear":
        return _line(dim, prefix or 0, 0, old, new)
    grid, to = options.get("grid"), options.get("to")
    tried: list[int] = [prefix] if prefix is not None else []
    if not tried:
        named = [count - prod(size) for count, size in ((old[dim], grid), (new[dim], to)) if size]
        tried = list(dict.fromkeys(named)) or list(PREFIXES)
    readings = {number: (_rest(old[dim] - number, grid), _rest(new[dim] - number, to)) for number in tried}
    number, first, second = _only(readings, "prefix", (old[dim], new[dim]), "prefix=N, grid=HxW and to=HxW", _rest)
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
    tried = [extra] if extra is not None else []
    if not tried:
        named = [count - prod(size) for count, size in ((old[0], window), (new[0], to)) if size]
        tried = list(dict.fromkeys(named)) or list(EXTRAS)
    readings = {number: (_odd(old[0] - number, window), _odd(new[0] - number, to)) for number in tried}
    number, first, second = _only(readings, "extra", (old[0], new[0]), "extra=N, window=HxW and to=HxW", _odd)
    return Grids(0, 0, number, first, second)


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
    fitting = {"nhwc": (1, 2), "nchw": (2, 3)}
    fitting = {
        name: axes for name, axes in fitting.items()
        if options.get("layout", name) == name
        and all(old[axis] == new[axis] for axis in range(4) if axis not in axes)
        and options.get("grid", (old[axes[0]], old[axes[1]])) == (old[axes[0]], old[axes[1]])
        and options.get("to", (new[axes[0]], new[axes[1]])) == (new[axes[0]], new[axes[1]])
    }  # fmt: skip
    if old[0] != new[0] or not fitting:
        raise Unclear("neither NxHxWxC nor NxCxHxW has the other dimensions equal, and the grids named")
    if len(fitting) > 1:
        raise Unclear("it may be NxHxWxC or NxCxHxW: say layout=nhwc or layout=nchw")
    axes = next(iter(fitting.values()))
    return Grids(None, 0, 0, tuple(old[axis] for axis in axes), tuple(new[axis] for axis in axes), axes)


def _rest(count: int, size: Shape | None) -> Shape | None:
    """Returns the grid of so many positions: the named one, else a square; None if it is not one."""
    if count < 1:
        return None
    side = isqrt(count)
    found = size or (side, side)
    return found if prod(found) == count else None


def _odd(count: int, size: Shape | None) -> Shape | None:
    found = _rest(count, size)
    return found if found and all(side % 2 for side in found) else None


def _only(
    readings: Mapping[int, tuple[Shape | None, Shape | None]],
    word: str,
    counts: tuple[int, int],
    options: str,
    alone: Any,
) -> tuple[int, Shape, Shape]:
    """Returns the one reading that gives both sides a grid. Raises: Unclear with what each side could be."""
    found = [(number, one, other) for number, (one, other) in readings.items() if one and other]
    if len(found) == 1:
        return found[0]
    if found:
        raise Unclear(f"it can be read with {_or(f'{word}={number}' for number, _, _ in found)}: say {options}")
    sides = []
    for side, place in (("source", 0), ("target", 1)):
        sizes = [(number, reading[place]) for number, reading in readings.items()]
        known = [f"{number} + {size[0]}x{size[1]}" for number, size in sizes if size]
        sides.append(f"the {side}'s {counts[place]} {f'can be {_or(known)}' if known else 'fit no such grid'}")
    tried = _or(str(number) for number in readings)
    raise Unclear(f"with {word} {tried}, {' and '.join(sides)}: say {options}")


def _or(items: Iterable[str]) -> str:
    return " or ".join(items)
