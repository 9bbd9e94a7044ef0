"""Recognises how the rows of one tensor lie in another: as a slice, woven by heads, in rotary order.

The operations are written as a mapping's, see `ckptool.mapping.chains`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from ckptool.values.codec import Array
from ckptool.values.fingerprints.prints import frame

PROBES = 16
"""Rows that are looked at before all are."""


class Place(NamedTuple):
    """Where ``size`` rows lie among ``whole``: in ``groups`` of equal size, each ``offset`` behind its group's begin.

    ``order`` is the operation that brings the rows, taken out of there, into the order of their own tensor; "" is none.
    """

    size: int
    whole: int
    groups: int
    offset: int
    order: str = ""


def order_of(name: str, first: int, second: int, size: int) -> Array:
    """Returns which row stands where after an operation: ``rope_interleave`` of heads, ``shuffle`` of (a, b)."""
    rows = np.arange(size)
    if name == "shuffle":
        made = rows.reshape(first, second, -1).swapaxes(0, 1)
    elif name == "rope_interleave":
        made = rows.reshape(first, 2, -1).swapaxes(1, 2)
    else:
        made = rows.reshape(first, -1, 2).swapaxes(1, 2)
    return made.reshape(-1)


def inverted(order: str) -> str:
    """Returns the operation that undoes one of an order of rows; its dimension comes last."""
    name, *numbers = order.split(":")
    if name == "shuffle":
        return f"shuffle:{numbers[1]}:{numbers[0]}"
    other = {"rope_interleave": "rope_deinterleave", "rope_deinterleave": "rope_interleave"}
    return ":".join([other[name], *numbers])


@lru_cache(256)
def _divisors(number: int) -> tuple[int, ...]:
    return tuple(one for one in range(1, number + 1) if number % one == 0)


def _orders(size: int, alone: bool) -> Iterator[tuple[str, Array]]:
    """Yields the orders that rows may have, with their names: none, rotary of any number of heads, shuffled."""
    yield "", np.arange(size)
    for heads in _divisors(size):
        if size // heads > 2 and size // heads % 2 == 0:
            for name in ("rope_interleave", "rope_deinterleave"):
                yield f"{name}:{heads}", order_of(name, heads, 0, size)
    for first in _divisors(size) if alone else ():
        for second in _divisors(size // first):
            if 1 < first < size and 1 < second < size:
                yield f"shuffle:{first}:{second}", order_of("shuffle", first, second, size)


def recognised(positions: Array, whole: int) -> Place | None:
    """Returns how rows lie among ``whole``, given the position of each (-1: not known); None for no known way."""
    size = len(positions)
    known = np.flatnonzero(positions >= 0)
    if not len(known) or 2 * len(known) < size:
        return None
    probes = known[:: max(1, len(known) // PROBES)]
    groups = [many for many in _divisors(size) if whole % many == 0]
    for name, order in _orders(size, size == whole):
        for many in groups if size < whole else [1]:
            height, step = size // many, whole // many
            place = order // height * step + order % height
            offset = int(positions[known[0]] - place[known[0]])
            fits = 0 <= offset <= step - height and (positions[probes] == place[probes] + offset).all()
            if fits and (positions[known] == place[known] + offset).all():
                return Place(size, whole, many, offset, name)
    return None


# --- as operations -----------------------------------------------------------------------------------------------

Shape = tuple[int, ...]


class Steps:
    """Operations on one tensor, and its shape after them."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.steps: list[str] = []

    def permute(self, *dims: int) -> None:
        """Adds a permutation."""
        self.steps.append("transpose" if dims == (1, 0) else f"permute:{','.join(map(str, dims))}")
        self.shape = tuple(self.shape[dim] for dim in dims)

    def reshape(self, shape: Shape) -> None:
        """Adds a reshape, unless that is its shape."""
        if shape != self.shape:
            if self.steps and self.steps[-1].startswith("reshape"):
                self.steps.pop()
            self.steps.append(f"reshape:{','.join(map(str, shape))}")
            self.shape = shape

    def split(self, dim: int, sizes: Shape) -> None:
        """Adds a reshape that splits a dimension into several."""
        self.reshape((*self.shape[:dim], *sizes, *self.shape[dim + 1 :]))

    def slice(self, dim: int, first: int, size: int) -> None:
        """Adds a slice, as one of equal parts if it is one."""
        whole = self.shape[dim]
        if size == whole:
            return
        equal = whole % size == 0 and first % size == 0
        which = f"{first // size}/{whole // size}" if equal else f"{first}:{first + size}"
        self.steps.append(f"{'split' if equal else 'slice'}:{dim}:{which}")
        self.shape = (*self.shape[:dim], size, *self.shape[dim + 1 :])

    def take(self, place: Place, dim: int) -> None:
        """Adds what takes out the rows of a place along a dimension, in their own order."""
        flat = (*self.shape[:dim], place.size, *self.shape[dim + 1 :])
        if place.groups > 1:
            self.split(dim, (place.groups, place.whole // place.groups))
            self.slice(dim + 1, place.offset, place.size // place.groups)
            self.reshape(flat)
        else:
            self.slice(dim, place.offset, place.size)
        self.order(place.order, dim)

    def order(self, order: str, dim: int) -> None:
        """Adds an order of rows; "" is none."""
        name, *numbers = order.split(":")
        if name == "shuffle":
            old, dims = self.shape, list(range(len(self.shape) + 2))
            first, second = map(int, numbers)
            self.split(dim, (first, second, old[dim] // first // second))
            dims[dim], dims[dim + 1] = dim + 1, dim
            self.permute(*dims)
            self.reshape(old)
        elif name:
            self.steps.append(":".join([name, str(dim), *numbers]))

    def text(self, end: str = ";") -> str:
        """Returns the operation; the shape of a reshape that comes last is the target's, and not written."""
        steps = list(self.steps)
        if end == ";" and steps and steps[-1].startswith("reshape"):
            steps[-1] = "reshape"
        return end.join(steps) or "rename"


def taken(big: Shape, axis: int, small: Shape, turned: bool, positions: Array) -> str | None:
    """Returns how a small tensor is taken out of a big one; None for no known way.

    ``positions``: of each line of the small one among the rows (``axis`` 0) or columns (1) of the big one. ``turned``:
    the lines are the rows of one and the columns of the other.
    """
    form, made = frame(big), Steps(big)
    if form.matrices == 1:
        place = recognised(positions, form.lines[axis])
        if place is None or (turned and len(big) != 2):
            return None
        made.take(place, axis)
    else:
        height, known = form.lines[axis] // form.matrices, positions[positions >= 0]
        if len(big) != 3 or not len(known):
            return None
        if axis:
            made.permute(0, 2, 1)
        matrix = int(known[0]) // height
        if (known // height == matrix).all():
            place = recognised(np.where(positions < 0, -1, positions - matrix * height), height)
            if place is None:
                return None
            made.slice(0, matrix, 1)
            made.take(place, 1)
            turned = turned != bool(axis)
            made.reshape(made.shape[1:])
        else:
            place = recognised(positions, form.lines[axis])
            stack = frame(small).matrices == form.matrices and len(small) == 3
            if place is None or place.order or not stack or place.groups % form.matrices:
                return None
            many = form.matrices
            made.take(Place(place.size // many, height, place.groups // many, place.offset), 1)
            if turned == (not axis):
                made.permute(0, 2, 1)
            turned = False
    if turned:
        made.permute(1, 0)
    made.reshape(small)
    return made.text()


class Part(NamedTuple):
    """A small tensor in a big one: its number and shape, whether it is ``turned``, and where its lines are."""

    number: int
    shape: Shape
    turned: bool
    positions: Array


def put_together(big: Shape, axis: int, parts: Sequence[Part]) -> tuple[list[int], str] | None:
    """Returns (numbers of the parts in order, the operation) that make a big tensor; None for no known way."""
    form = frame(big)
    whole = form.lines[axis]
    placed = [(place, part) for part in parts if (place := recognised(part.positions, whole)) is not None]
    placed.sort(key=lambda one: one[0].offset)
    ends = [0, *accumulate(place.size // place.groups for place, _ in placed)]
    groups = {place.groups for place, _ in placed}
    if len(placed) < len(parts) or len(groups) > 1 or ends[:-1] != [place.offset for place, _ in placed]:
        return None
    many = groups.pop() if groups else 1
    if ends[-1] * many != whole or (form.matrices > 1 and len(big) != 3):
        return None
    # Parts of a stack are stacks, or all are matrices, which are put together as the rows of a large one.
    stacks = form.matrices > 1 and all(frame(part.shape).matrices == form.matrices for part in parts)
    flat = form.matrices > 1 and not stacks
    dims = {len(part.shape) for part in parts}
    if dims != {2 if flat else len(big)} or (dims != {2} and any(part.turned for part in parts)):
        return None
    if stacks:
        many, rest = divmod(many, form.matrices)
        if rest:
            return None
    dim = 0 if flat else axis + stacks
    each = []
    for place, part in placed:
        steps = Steps(part.shape)
        if part.turned != (flat and bool(axis)):
            steps.permute(1, 0)
        steps.order(inverted(place.order) if place.order else "", dim)
        if many > 1:
            steps.split(dim, (many, steps.shape[dim] // many))
        each.append(steps)
    one, at = each[0].shape, dim + (many > 1)
    end = Steps((*one[:at], sum(steps.shape[at] for steps in each), *one[at + 1 :]))
    if many > 1:
        end.reshape((*one[:dim], many * end.shape[at], *one[at + 1 :]))
    if flat and axis:
        end.reshape((big[0], big[2], big[1]))
        end.permute(0, 2, 1)
    end.reshape(big)
    texts = [steps.text("+") for steps in each]
    before = [] if texts[0] == "rename" else texts[0].split("+")
    join = f"concat:{at}"
    if len({*texts}) > 1:
        before, join = [], f"{join}<{'|'.join(texts)}>"
    behind = [] if not end.steps else end.text().split(";")
    return [part.number for _, part in placed], ";".join([*before, join, *behind])
