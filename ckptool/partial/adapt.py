"""Tensors of the target's shape, made from the source's values: the adapters of `--adapt KEYGLOB=ADAPTER`.

Nothing is computed here. The result is a `Derived` tensor, which `ckptool.values.adapt` computes while it is written.
Each adapter reports what it decided, and refuses an ambiguous case with the option that resolves it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
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
from ckptool.partial.adapters import Adapter, Unclear
from ckptool.text import dims

Shape = tuple[int, ...]

Read = Callable[[str], Any]
"""Returns the content of a file that an adapter names: the value if it is JSON, else the text."""

COMPUTED = frozenset({"float64", "float32", "float16", "bfloat16"})
"""Dtypes that adapters can calculate with. Values of any other dtype can only be copied."""


class Adapted(NamedTuple):
    """A tensor of the target's shape and dtype, and a description of what was decided."""

    tensor: TensorInfo
    detail: str


def _no_reader(path: str) -> NoReturn:
    raise UsageError(f"{path}: it cannot be read without a function `read`")


class Adapting:
    """Adapts tensors one by one; the same adapter on the same source and target gives the same storage (tied weights).

    ``read`` returns the content of a file that an adapter names; each file is read once.
    """

    def __init__(self, read: Read | None = None) -> None:
        self._file = cache(read or _no_reader)
        self._made: dict[object, tuple[Adapted, TensorInfo, TensorInfo]] = {}

    def adapt(self, adapter: Adapter, source: TensorInfo, target: TensorInfo, key: str) -> Adapted:
        """Returns the source's values with the target's shape, dtype and device; reads no tensor data.

        Raises: UsageError if the shapes do not fit the adapter or are ambiguous, UnsupportedError for tensors that
        are not dense or have a dtype it cannot calculate with. Each message names the key and both shapes.
        """
        identity = adapter, source.view, target.view
        if identity not in self._made:
            here = source if target.kind == "meta" else _located(source, target.location)
            made = _Adaptation(adapter, here, target, key, self._file).made()
            self._made[identity] = made, source, target  # `view` has ids in it: keeps both tensors alive
        tensor, detail = self._made[identity][0]
        extras = replace(target.extras, conj=False, neg=False) if target.extras else None
        tensor = replace(tensor, requires_grad=target.requires_grad, is_parameter=target.is_parameter, extras=extras)
        return Adapted(tensor, detail)


class _Adaptation:
    """One adapter applied to one pair of tensors: ``old`` and ``new`` are the shapes of source and target."""

    def __init__(self, adapter: Adapter, source: TensorInfo, target: TensorInfo, key: str, file: Read) -> None:
        self.adapter, self.source, self.target, self.key, self.file = adapter, source, target, key, file
        self.old, self.new = source.shape or (), target.shape or ()
        self.fill = adapter.get("fill", "keep")

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
                self.unsupported(f"the {side} is a {tensor.dtype} {tensor.kind} tensor, which cannot be divided")
        if 0 in self.old or 0 in self.new:
            self.refuse("one of them is empty")
        if self.old == self.new and not self.adapter.rearranges:
            return Adapted(_contiguous(self.cast(self.source)), "copied: the shapes agree")
        make = {
            "rows": self.rows, "crop": self.crop, "pos-embed": self.pos_embed, "rel-pos": self.rel_pos,
            "patch-embed": self.patch_embed, "in-chans": self.in_chans, "inflate": self.inflate,
        }[self.adapter.name]  # fmt: skip
        try:
            tensor, detail = make()
        except Unclear as error:
            self.refuse(str(error))
        return Adapted(shaped(_contiguous(tensor), self.new), detail)

    # parts of the result

    def cast(self, tensor: TensorInfo) -> TensorInfo:
        """Returns a part of the source, cast to the target's dtype."""
        old, new = tensor.dtype, self.target.dtype
        if old == new:
            return tensor
        if {DTYPES[old].kind, DTYPES[new].kind} not in ({"float"}, {"complex"}):
            self.unsupported(f"{old} values cannot be cast to {new}")
        return computed(new, tensor.shape or (), Derived("cast", (tensor,)))

    def computed(
        self, op: Any, tensor: TensorInfo, shape: Shape, dim: int = 0, args: Any = None, dtype: str | None = None
    ) -> TensorInfo:
        """Returns what an operation makes of a part of the source; ``dtype`` is the target's unless given."""
        others = {tensor.dtype, self.target.dtype} - COMPUTED
        if others:
            self.unsupported(
                f"{', '.join(sorted(others))} is not computed with, only {', '.join(sorted(COMPUTED))} are"
            )
        return computed(dtype or self.target.dtype, shape, Derived(op, (tensor,), dim, shape, args))

    def zeros(self, shape: Shape) -> TensorInfo:
        if DTYPES[self.target.dtype].kind not in ("float", "int", "bool", "complex") or "e8m0" in self.target.dtype:
            self.unsupported(f"{self.target.dtype} has no zero")
        source = Derived("take", (self.source,), 0, shape, (Run(-1, 0, shape[0]),))  # the input gives the device
        return computed(self.target.dtype, shape, source)

    def kept(self) -> TensorInfo:
        """Returns the target, of which some values are kept."""
        if self.target.kind == "meta":
            self.refuse("the target is on meta and has no values to keep: name another fill")
        return self.target

    def mean(self, dim: int) -> TensorInfo:
        """Returns the mean of the source along a dimension, which then has size 1."""
        shape = (*self.old[:dim], 1, *self.old[dim + 1 :])
        if dim == 0:
            return self.computed("mean", self.source, shape)
        mix = Mix((tuple((index, 1.0) for index in range(self.old[dim])),), float(self.old[dim]))
        return self.computed("mix", self.source, shape, dim, mix)

    def filling(self, dim: int, start: int, count: int) -> TensorInfo:
        """Returns the values for ``count`` indices of a dimension from ``start``, for which the source has none."""
        if self.fill == "keep":
            return narrow(self.kept(), dim, start, count)
        shape = (*self.new[:dim], count, *self.new[dim + 1 :])
        if self.fill == "zero":
            return self.zeros(shape)
        mean = self.mean(dim)
        return view(mean, shape, (*mean.stride[:dim], 0, *mean.stride[dim + 1 :]))

    def same_rank(self, least: int = 0) -> None:
        """Refuses shapes of different numbers of dimensions, or of fewer than ``least``."""
        if len(self.old) != len(self.new) or len(self.old) < least:
            more = f", {least} or more" if least > 1 else ""
            self.refuse(f"source and target must have the same number of dimensions{more}")

    def only_changes(self, dim: int) -> None:
        """Refuses shapes that differ in another dimension than ``dim``."""
        self.same_rank(dim + 1)
        if (*self.old[:dim], *self.old[dim + 1 :]) != (*self.new[:dim], *self.new[dim + 1 :]):
            self.refuse(f"it changes dimension {dim}, and others differ too")

    def filler(self, unit: str) -> str:
        """Returns a description of the values that do not come from the source."""
        return {"keep": "the target's own", "zero": "zero", "mean": f"the mean of the source's {unit}"}[self.fill]

    # adapters

    def rows(self) -> tuple[TensorInfo, str]:
        self.only_changes(0)
        count = self.new[0]
        picks = self.picks()
        if picks is None:
            common = min(self.old[0], count)
            parts = [self.cast(narrow(self.source, 0, 0, common))]
            if common < count:
                parts.append(self.filling(0, common, count - common))
            detail = f"rows 0 to {common - 1} from the source" + self.filled(count - common)
            return _joined(parts, 0), detail + (
                f", {self.old[0] - common} of its rows left out" * (common < self.old[0])
            )
        inputs = [self.source]
        filler = -1
        left = picks.count(-1)
        if self.source.dtype != self.target.dtype:  # rows are picked before the cast, which is then of many at a time
            wanted = [pick for pick in picks if pick >= 0]
            inputs = [self.cast(self.picked(inputs, wanted, (-1, False), self.source.dtype))]
            numbers = count_from(0)
            picks = [next(numbers) if pick >= 0 else -1 for pick in picks]
        if left and self.fill == "zero":
            self.zeros((1, *self.new[1:]))
        elif left:
            inputs.append(self.kept() if self.fill == "keep" else self.mean(0))
            filler = 1
        tensor = self.picked(inputs, picks, (filler, self.fill == "keep"), self.target.dtype)
        detail = f"{count - left} rows from the source {'by token' if self.adapter.get('tokens') else 'as selected'}"
        return tensor, detail + self.filled(left)

    def picked(
        self, inputs: Sequence[TensorInfo], picks: Sequence[int], fill: tuple[int, bool], dtype: str
    ) -> TensorInfo:
        """Returns rows in the order of ``picks``, see `vocabulary.runs`."""
        shape = (len(picks), *self.new[1:])
        runs = tuple(Run(*run) for run in vocabulary.runs(picks, fill))
        return computed(dtype, shape, Derived("take", tuple(inputs), 0, shape, runs))

    def picks(self) -> list[int] | None:
        """Returns the source's row for each row of the target, -1 for none; None without select or tokens."""
        if path := self.adapter.get("select"):
            return vocabulary.selected(self.file(path), self.old[0], self.new[0], path)
        if paths := self.adapter.get("tokens"):
            old, new = (vocabulary.tokens(self.file(path), path) for path in paths)
            return vocabulary.matched(old, new, self.old[0], self.new[0], *paths)
        return None

    def filled(self, count: int) -> str:
        return f", {count} {self.filler('rows')}" if count else ""

    def crop(self) -> tuple[TensorInfo, str]:
        self.same_rank(1)
        box = tuple(map(min, zip(self.old, self.new, strict=True)))
        made = self.cast(view(self.source, box))
        for dim in range(len(box) - 1, -1, -1):  # what is missing along each dimension, innermost first
            missing = self.new[dim] - box[dim]
            if missing:
                shape = (*box[:dim], missing, *self.new[dim + 1 :])
                if self.fill == "keep":
                    rest = view(narrow(self.kept(), dim, box[dim], missing), shape)
                else:
                    rest = self.zeros(shape)
                made = cat([made, rest], dim)
        return made, f"the box {dims(box)} from the source" + self.filled(prod(self.new) - prod(box))

    def pos_embed(self) -> tuple[TensorInfo, str]:
        self.same_rank()
        return self.resampled(grids.positions(self.old, self.new, dict(self.adapter.options)), antialias=True)

    def rel_pos(self) -> tuple[TensorInfo, str]:
        self.same_rank()
        return self.resampled(grids.biases(self.old, self.new, dict(self.adapter.options)), antialias=False)

    def patch_embed(self) -> tuple[TensorInfo, str]:
        """Makes a kernel that answers a resized patch as the old one answers the patch (PI-resize of FlexiViT)."""
        if len(self.old) != 4 or len(self.new) != 4 or self.old[:2] != self.new[:2]:
            self.refuse("it takes kernels OxIxHxW with equally many output and input channels")
        how = Resample((2, 3), self.adapter.get("mode", "bicubic"), self.adapter.get("antialias", True), inverse=True)
        made = self.computed("resample", self.source, self.new, 0, how)
        return made, f"{dims(self.old[2:])} to {dims(self.new[2:])}, {how.mode}" + ", antialias" * how.antialias

    def spaced(self, grid: TensorInfo, axes: Shape, new: Shape) -> TensorInfo:
        """Returns a bias table interpolated along one of its two sides after the other."""
        between = "float64" if self.source.dtype == "float64" else "float32"  # rounded to the target's dtype once
        for axis, count, dtype in zip(axes, new, (between, self.target.dtype), strict=True):
            shape = grid.shape or ()
            size = *shape[:axis], count, *shape[axis + 1 :]
            grid = self.computed("mix", grid, size, axis, grids.geometric(shape[axis], count), dtype)
        return grid

    def resampled(self, found: grids.Grids, antialias: bool) -> tuple[TensorInfo, str]:
        """Returns the table with its grid resampled and the positions before and behind the grid unchanged."""
        mode = self.adapter.get("mode", "bicubic")
        corners = self.adapter.get("align_corners", False)
        antialias = self.adapter.get("antialias", antialias and not corners) and mode != "linear"
        geometric = self.adapter.get("spacing") == "geometric"
        source = self.source
        if found.dim is None:  # the tensor's own dimensions are the grid's
            grid, size, axes = source, self.new, found.axes
        else:
            dim, count = found.dim, prod(found.old)
            grid = unflatten(narrow(source, dim, found.before, count), dim, tuple(found.old))
            size = (*self.old[:dim], *found.new, *self.old[dim + 1 :])
            axes = tuple(range(dim, dim + len(found.old)))
        if found.old == found.new:
            made = _contiguous(self.cast(grid))
        elif geometric:
            made = self.spaced(grid, axes, tuple(found.new))
        else:
            made = self.computed("resample", grid, size, 0, Resample(axes, mode, antialias, corners))
        detail = f"{dims(found.old)} to {dims(found.new)}, " + ("spaced geometrically" if geometric else mode)
        detail += ", antialias" * antialias + ", corners aligned" * corners
        if found.dim is None:
            return made, detail
        dim = found.dim
        parts = [shaped(made, (*self.old[:dim], prod(found.new), *self.old[dim + 1 :]))]
        if found.before:
            parts.insert(0, self.cast(narrow(source, dim, 0, found.before)))
        if found.behind:
            parts.append(self.cast(narrow(source, dim, self.old[dim] - found.behind, found.behind)))
        others = found.before + found.behind
        noun = "prefix token" if found.before else "extra row"
        return _joined(parts, dim), detail + (f", {others} {noun}{'s' * (others > 1)} as before" if others else "")

    def in_chans(self) -> tuple[TensorInfo, str]:
        if len(self.old) < 3:
            self.refuse("it takes convolution kernels: output channels x input channels x size")
        self.only_changes(1)
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
        else:  # mean: each new channel is the sum of the old ones / new, so activations keep their scale
            mix = Mix((tuple((channel, 1.0) for channel in range(old)),) * new, float(new))
            detail = f"the sum of {old} channels" + (f" / {new} in each" if new > 1 else "")
        return self.computed("mix", self.source, self.new, 1, mix), detail

    def mapped(self, chosen: Sequence[int]) -> tuple[TensorInfo, str]:
        """Returns a kernel whose channels are those that ``map`` lists; nothing is rescaled."""
        if len(chosen) != self.new[1]:
            self.refuse(f"the map has {len(chosen)} channels, the target {self.new[1]}")
        if max(chosen) >= self.old[1]:
            self.refuse(f"the map names channel {max(chosen)}, the source has 0 to {self.old[1] - 1}")
        if max(chosen) < 0:
            self.refuse("the map takes nothing from the source")
        parts = [
            self.cast(narrow(self.source, 1, channel, 1)) if channel >= 0 else self.filling(1, number, 1)
            for number, channel in enumerate(chosen)
        ]
        channels = ",".join("-" if channel < 0 else str(channel) for channel in chosen)
        return _joined(parts, 1), f"channels {channels}" + (f"; - is {self.filler('channels')}" if -1 in chosen else "")

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
        zeros = [self.zeros((*self.old[:2], n, *self.old[2:])) if n else None for n in (middle, depth - 1 - middle)]
        parts = [part for part in (zeros[0], self.cast(flat), zeros[1]) if part is not None]
        return _joined(parts, 2), f"slice {middle} of {depth}, the others zero"


def _contiguous(tensor: TensorInfo) -> TensorInfo:
    """Returns a tensor's elements in C order in storage of their own."""
    return tensor if isinstance(tensor.source, Derived) and tensor.is_whole else copied(tensor)


def _joined(parts: Sequence[TensorInfo], dim: int) -> TensorInfo:
    """Returns tensors joined along a dimension; a single one as it is."""
    return cat(parts, dim) if len(parts) > 1 else parts[0]


def _located(tensor: TensorInfo, location: str) -> TensorInfo:
    """Returns a tensor with another device tag on its storage, or on that of the first input it is computed from."""
    source = tensor.source
    if tensor.location == location:
        return tensor
    if isinstance(source, Storage):
        return replace(tensor, source=replace(source, location=location))
    if isinstance(source, Derived) and source.inputs:
        first, *others = source.inputs
        return replace(tensor, source=replace(source, inputs=(_located(first, location), *others)))
    return tensor
