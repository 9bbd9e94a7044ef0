"""Tensors of the target's shape made of the source's values: what `--adapt KEYGLOB=ADAPTER` may name.

Nothing is computed here: the result is a view, a copy or a `Derived` that `ckptool.values.adapt` works out while it is
written. Each adapter says what it decided; what it would have to guess it refuses, naming the option that tells it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import count as count_from
from math import prod
from typing import Any, NamedTuple, NoReturn

from ckptool.core.dtypes import DTYPES
from ckptool.core.tensor import (
    Derived,
    Mix,
    Opaque,
    Resample,
    Run,
    Storage,
    TensorInfo,
    cat,
    computed,
    copied,
    narrow,
    shaped,
    unflatten,
    view,
)
from ckptool.errors import UnsupportedError, UsageError
from ckptool.partial import grids, vocabulary
from ckptool.partial.adapters import Adapter
from ckptool.text import dims

Shape = tuple[int, ...]

Read = Callable[[str], Any]
"""Gives what a file named in an adapter holds: the value if it is JSON, else its text (see `adapted.read_object`)."""

COMPUTED = frozenset({"float64", "float32", "float16", "bfloat16"})
"""Dtypes that are computed with. Any other is copied, or refused."""


class Adapted(NamedTuple):
    """A tensor of the target's shape and dtype, and for people what was decided."""

    tensor: TensorInfo
    detail: str


class Adapting:
    """Adapts one tensor after another; the same adaptation of the same memory stays one memory (tied weights)."""

    def __init__(self, read: Read | None = None) -> None:
        self._read = read
        self._files: dict[str, Any] = {}
        self._made: dict[object, tuple[Adapted, TensorInfo, TensorInfo]] = {}

    def adapt(self, adapter: Adapter, source: TensorInfo, target: TensorInfo, key: str) -> Adapted:
        """Returns the source's values in the target's shape, dtype and place; reads no tensor data.

        Raises: UsageError where shapes do not fit the adapter or leave a choice, UnsupportedError for tensors
        that are not plain or not numbers it can compute with. Each names the key and both shapes.
        """
        identity = adapter, source.view, target.view
        if identity not in self._made:  # with its tensors, whose ids are in their views
            here = source if target.kind == "meta" else _located(source, target.location)
            made = _Job(adapter, here, target, key, self.file).made()
            self._made[identity] = made, source, target
        found = self._made[identity][0]
        extras = replace(target.extras, conj=False, neg=False) if target.extras else None
        mine = replace(
            found.tensor, requires_grad=target.requires_grad, is_parameter=target.is_parameter, extras=extras
        )
        return Adapted(mine, found.detail)

    def file(self, path: str) -> Any:
        """Returns what a file holds; each is read once."""
        if self._read is None:
            raise UsageError(f"{path}: there is nobody to read it")
        if path not in self._files:
            self._files[path] = self._read(path)
        return self._files[path]


def adapt(adapter: Adapter, source: TensorInfo, target: TensorInfo, key: str, read: Read | None = None) -> Adapted:
    """Returns one tensor adapted, see `Adapting.adapt`."""
    return Adapting(read).adapt(adapter, source, target, key)


class _Job:
    """One adaptation: an adapter, the tensor that is offered, and the one whose place it takes."""

    def __init__(self, adapter: Adapter, source: TensorInfo, target: TensorInfo, key: str, file: Read) -> None:
        self.adapter, self.source, self.target, self.key, self.file = adapter, source, target, key, file
        self.old, self.new = source.shape or (), target.shape or ()

    def what(self) -> str:
        new, old = (dims(tensor.shape, none="none") for tensor in (self.target, self.source))
        return f"{self.key}: {self.adapter.text} cannot make {new} of {old}"

    def refuse(self, why: str) -> NoReturn:
        raise UsageError(f"{self.what()}: {why}")

    def unsupported(self, why: str) -> NoReturn:
        raise UnsupportedError(f"{self.what()}: {why}")

    def made(self) -> Adapted:
        for side, tensor in (("source", self.source), ("target", self.target)):
            row = DTYPES[tensor.dtype]
            opaque = isinstance(tensor.source, Opaque) and not (tensor is self.target and tensor.kind == "meta")
            if opaque or row.bits % 8 or tensor.dtype.endswith("_x2"):
                self.unsupported(f"the {side} is a {tensor.dtype} {tensor.kind} tensor, which stays whole")
        if 0 in self.old or 0 in self.new:
            self.refuse("one of them is empty")
        if self.old == self.new and not self.adapter.rearranges:
            return Adapted(_own(self.cast(self.source)), "copied: the shapes agree")
        make = {
            "rows": self.rows, "crop": self.crop, "pos-embed": self.pos_embed, "rel-pos": self.rel_pos,
            "in-chans": self.in_chans, "inflate": self.inflate,
        }[self.adapter.name]  # fmt: skip
        tensor, detail = make()
        return Adapted(shaped(_own(tensor), self.new), detail)

    # pieces

    def cast(self, tensor: TensorInfo) -> TensorInfo:
        """Returns a piece of the source in the target's dtype."""
        old, new = tensor.dtype, self.target.dtype
        if old == new:
            return tensor
        if {DTYPES[old].kind, DTYPES[new].kind} not in ({"float"}, {"complex"}):
            self.unsupported(f"{old} does not become {new} on the way")
        return computed(new, tensor.shape or (), Derived("cast", (tensor,)))

    def computed(self, op: Any, tensor: TensorInfo, shape: Shape, dim: int = 0, args: Any = None) -> TensorInfo:
        """Returns values to compute of a piece of the source, in the target's dtype."""
        others = {tensor.dtype, self.target.dtype} - COMPUTED
        if others:
            self.unsupported(
                f"{', '.join(sorted(others))} is not computed with, only {', '.join(sorted(COMPUTED))} are"
            )
        return computed(self.target.dtype, shape, Derived(op, (tensor,), dim, shape, args))

    def zeros(self, shape: Shape) -> TensorInfo:
        if DTYPES[self.target.dtype].kind not in ("float", "int", "bool", "complex") or "e8m0" in self.target.dtype:
            self.unsupported(f"{self.target.dtype} has no zero")
        source = Derived("take", (self.source,), 0, shape, (Run(-1, 0, shape[0]),))  # the input says where it lives
        return computed(self.target.dtype, shape, source)

    def kept(self) -> TensorInfo:
        """Returns the target, where some of its own values stay."""
        if self.target.kind == "meta":
            self.refuse("the target is on meta and has no values to keep: name another fill")
        return self.target

    def mean_row(self) -> TensorInfo:
        return self.computed("mean", self.source, (1, *self.old[1:]))

    def inner(self, dim: int) -> None:
        """Refuses shapes that differ in another dimension than ``dim``."""
        if len(self.old) != len(self.new) or len(self.old) <= dim:
            self.refuse(f"it takes two of the same number of dimensions, {dim + 1} or more")
        if (*self.old[:dim], *self.old[dim + 1 :]) != (*self.new[:dim], *self.new[dim + 1 :]):
            self.refuse(f"it changes dimension {dim}, and others differ too")

    # adapters

    def rows(self) -> tuple[TensorInfo, str]:
        self.inner(0)
        fill, count = self.adapter.get("fill", "keep"), self.new[0]
        picks = self.picks()
        if picks is None:
            common = min(self.old[0], count)
            parts = [self.cast(narrow(self.source, 0, 0, common))]
            if common < count:
                parts.append(self.filling(fill, common, count))
            detail = f"rows 0 to {common - 1} from the source" + self.filled(fill, count - common)
            return _cat(parts, 0), detail + (f", {self.old[0] - common} of its rows left out" * (common < self.old[0]))
        inputs = [self.source]
        number = -1
        left = picks.count(-1)
        if self.source.dtype != self.target.dtype:  # picked first: a cast is then of many rows at a time
            wanted = [pick for pick in picks if pick >= 0]
            inputs = [self.cast(self.picked(inputs, wanted, (-1, False), self.source.dtype))]
            place = count_from(0)
            picks = [next(place) if pick >= 0 else -1 for pick in picks]
        if left and fill == "zero":
            self.zeros((1, *self.new[1:]))
        elif left:
            inputs.append(self.kept() if fill == "keep" else self.mean_row())
            number = 1
        tensor = self.picked(inputs, picks, (number, fill == "keep"), self.target.dtype)
        detail = f"{count - left} rows from the source {'by token' if self.adapter.get('tokens') else 'as selected'}"
        return tensor, detail + self.filled(fill, left)

    def picked(
        self, inputs: Sequence[TensorInfo], picks: Sequence[int], fill: tuple[int, bool], dtype: str
    ) -> TensorInfo:
        """Returns rows in the order of ``picks``, see `vocabulary.runs`."""
        shape = (len(picks), *self.new[1:])
        runs = tuple(Run(*run) for run in vocabulary.runs(picks, fill))
        return computed(dtype, shape, Derived("take", tuple(inputs), 0, shape, runs))

    def picks(self) -> list[int] | None:
        """Returns for each row of the target the source's row that it takes, -1 for none; None without a list."""
        try:
            if path := self.adapter.get("select"):
                return vocabulary.selected(self.file(path), self.old[0], self.new[0], path)
            if paths := self.adapter.get("tokens"):
                old, new = (vocabulary.tokens(self.file(path), path) for path in paths)
                return vocabulary.matched(old, new, self.old[0], self.new[0], *paths)
        except vocabulary.Unclear as error:
            self.refuse(str(error))
        return None

    def filling(self, fill: str, start: int, stop: int) -> TensorInfo:
        """Returns what stands in rows ``start`` to ``stop`` that no row of the source takes."""
        if fill == "keep":
            return narrow(self.kept(), 0, start, stop - start)
        shape = (stop - start, *self.new[1:])
        if fill == "zero":
            return self.zeros(shape)
        row = self.mean_row()
        return replace(row, shape=shape, stride=(0, *row.stride[1:]))

    def filled(self, fill: str, count: int) -> str:
        words = {"keep": "the target's own", "zero": "zero", "mean": "the mean of the source's rows"}[fill]
        return f", {count} {words}" if count else ""

    def crop(self) -> tuple[TensorInfo, str]:
        if len(self.old) != len(self.new) or not self.old:
            self.refuse("it takes two of the same number of dimensions")
        fill = self.adapter.get("fill", "keep")
        box = tuple(map(min, zip(self.old, self.new, strict=True)))
        made = self.cast(view(self.source, box))
        for dim in range(len(box) - 1, -1, -1):  # what is missing along each dimension, innermost first
            missing = self.new[dim] - box[dim]
            if missing:
                shape = (*box[:dim], missing, *self.new[dim + 1 :])
                kept = fill == "keep"
                rest = view(narrow(self.kept(), dim, box[dim], missing), shape) if kept else self.zeros(shape)
                made = _cat([made, rest], dim)
        return made, f"the box {dims(box)} from the source" + self.filled(fill, prod(self.new) - prod(box))

    def pos_embed(self) -> tuple[TensorInfo, str]:
        if len(self.old) != len(self.new):
            self.refuse("it takes two of the same number of dimensions")
        try:
            found = grids.positions(self.old, self.new, dict(self.adapter.options))
        except grids.Unclear as error:
            self.refuse(str(error))
        return self.resampled(found, antialias=True)

    def rel_pos(self) -> tuple[TensorInfo, str]:
        if len(self.old) != len(self.new):
            self.refuse("it takes two of the same number of dimensions")
        try:
            found = grids.biases(self.old, self.new, dict(self.adapter.options))
        except grids.Unclear as error:
            self.refuse(str(error))
        return self.resampled(found, antialias=False)

    def resampled(self, found: grids.Grids, antialias: bool) -> tuple[TensorInfo, str]:
        """Returns the grid resampled, and before or behind it the other positions as they are."""
        mode = self.adapter.get("mode", "bicubic")
        antialias = self.adapter.get("antialias", antialias) and mode != "linear"
        source = self.source
        if found.dim is None:  # the tensor's own dimensions are the grid's
            grid, size, axes = source, self.new, found.axes
        else:
            dim, count = found.dim, prod(found.old)
            grid = unflatten(narrow(source, dim, found.before, count), dim, tuple(found.old))
            size = (*self.old[:dim], *found.new, *self.old[dim + 1 :])
            axes = tuple(range(dim, dim + len(found.old)))
        if found.old == found.new:
            made = _own(self.cast(grid))
        else:
            made = self.computed("resample", grid, size, 0, Resample(axes, mode, antialias))
        detail = f"{dims(found.old)} to {dims(found.new)}, {mode}" + ", antialias" * antialias
        if found.dim is None:
            return made, detail
        dim = found.dim
        parts = [shaped(made, (*self.old[:dim], prod(found.new), *self.old[dim + 1 :]))]
        if found.before:
            parts.insert(0, self.cast(narrow(source, dim, 0, found.before)))
        if found.behind:
            parts.append(self.cast(narrow(source, dim, self.old[dim] - found.behind, found.behind)))
        others = found.before + found.behind
        word = "prefix token" if found.before else "extra row"
        return _cat(parts, dim), detail + (f", {others} {word}{'s' * (others > 1)} as before" if others else "")

    def in_chans(self) -> tuple[TensorInfo, str]:
        if len(self.old) < 3:
            self.refuse("it takes convolution kernels: output channels x input channels x size")
        self.inner(1)
        old, new = self.old[1], self.new[1]
        if (chosen := self.adapter.get("map")) is not None:
            return self.mapped(chosen)
        by = self.adapter.get("") or ("sum" if new == 1 else "repeat")
        if by == "sum" and new > 1:
            self.refuse("sum makes one channel; mean spreads it over more")
        if by == "repeat":
            scale = old / new
            mix = Mix(tuple(((channel % old, scale),) for channel in range(new)))
            detail = f"channels 0 to {min(old, new) - 1} repeated, times {old}/{new}"
        else:  # each the sum / new: the mean times old / new
            mix = Mix((tuple((channel, 1.0) for channel in range(old)),) * new, float(new))
            detail = f"the sum of {old} channels" + (f" / {new} in each" if new > 1 else "")
        return self.computed("mix", self.source, self.new, 1, mix), detail

    def mapped(self, chosen: Sequence[int]) -> tuple[TensorInfo, str]:
        """Returns a kernel with each channel the one that the map names; nothing is rescaled."""
        if len(chosen) != self.new[1]:
            self.refuse(f"the map has {len(chosen)} channels, the target {self.new[1]}")
        if max(chosen) >= self.old[1]:
            self.refuse(f"the map names channel {max(chosen)}, the source has 0 to {self.old[1] - 1}")
        if max(chosen) < 0:
            self.refuse("the map takes nothing from the source")
        fill = self.adapter.get("fill", "keep")
        one = (self.old[0], 1, *self.old[2:])
        parts = []
        for place, channel in enumerate(chosen):
            if channel >= 0:
                parts.append(self.cast(narrow(self.source, 1, channel, 1)))
            elif fill == "keep":
                parts.append(narrow(self.kept(), 1, place, 1))
            elif fill == "zero":
                parts.append(self.zeros(one))
            else:
                mix = Mix((tuple((old, 1.0) for old in range(self.old[1])),), float(self.old[1]))
                parts.append(self.computed("mix", self.source, one, 1, mix))
        words = ",".join("-" if channel < 0 else str(channel) for channel in chosen)
        what = {"keep": "the target's own", "zero": "zero", "mean": "the mean of the source's channels"}[fill]
        return _cat(parts, 1), f"channels {words}" + (f"; - is {what}" if -1 in chosen else "")

    def inflate(self) -> tuple[TensorInfo, str]:
        if len(self.old) != 4 or len(self.new) != 5 or self.old != (*self.new[:2], *self.new[3:]):
            self.refuse("it takes 2D kernels OxIxHxW to OxIxTxHxW of the same sizes")
        depth = self.new[2]
        stride = (*self.source.stride[:2], 0, *self.source.stride[2:])
        flat = view(self.source, (*self.old[:2], 1, *self.old[2:]), stride)
        if self.adapter.get("", "mean") == "mean":
            mix = Mix((((0, 1.0),),) * depth, float(depth))
            return self.computed("mix", flat, self.new, 2, mix), f"repeated {depth} times, / {depth}"
        middle = depth // 2
        parts = [self.cast(flat)]
        for count, where in ((middle, 0), (depth - 1 - middle, len(parts) + bool(middle))):
            if count:
                parts.insert(where, self.zeros((*self.old[:2], count, *self.old[2:])))
        return _cat(parts, 2), f"slice {middle} of {depth}, the others zero"


# --- views -------------------------------------------------------------------------------------------------------


def _own(tensor: TensorInfo) -> TensorInfo:
    """Returns a tensor's elements in C order in memory of their own."""
    return tensor if isinstance(tensor.source, Derived) and tensor.is_whole else copied(tensor)


def _cat(parts: Sequence[TensorInfo], dim: int) -> TensorInfo:
    """Returns tensors put together along a dimension; a single one as it is."""
    return _own(parts[0]) if len(parts) == 1 else cat(parts, dim)


def _located(tensor: TensorInfo, location: str) -> TensorInfo:
    """Returns a tensor whose memory, or the first it is computed from, is tagged with another device."""
    source = tensor.source
    if tensor.location == location:
        return tensor
    if isinstance(source, Storage):
        return replace(tensor, source=replace(source, location=location))
    if isinstance(source, Derived) and source.inputs:
        first, *others = source.inputs
        return replace(tensor, source=replace(source, inputs=(_located(first, location), *others)))
    return tensor
