"""How two checkpoints' weights differ."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from ckptool.core import keys as names
from ckptool.core.checkpoint import Checkpoint, is_flat
from ckptool.core.tensor import TensorInfo
from ckptool.core.tree import path_text
from ckptool.errors import NoTensorsError, listed

KINDS = ("only-in-a", "only-in-b", "shape", "dtype", "values", "devices", "bookkeeping")
"""What a difference can be; all but bookkeeping make two checkpoints differ by default."""


class Distance(Protocol):
    """What a comparison of values answers (see `ckptool.core.findings.Distance`)."""

    @property
    def status(self) -> str: ...
    @property
    def max_abs(self) -> float | None: ...
    @property
    def rel_l2(self) -> float | None: ...


Compare = Callable[[TensorInfo, TensorInfo], Distance]


@dataclass(frozen=True, slots=True)
class Changed:
    """A key whose shape, dtype or device differs: ``a`` against ``b``."""

    key: str
    a: Any
    b: Any


@dataclass(frozen=True, slots=True)
class ValuesChanged:
    """A key whose values differ, or are ``close``: largest |a - b|, and |a - b| / |a|; None where not finite."""

    key: str
    status: str
    max_abs: float | None
    rel_l2: float | None


@dataclass(frozen=True, slots=True)
class DiffReport:
    """Keys are spelled as in A, those only in B as in B.

    ``equal`` counts keys that agree in everything that was compared. ``shape`` and ``dtype`` may name one key both.
    ``values`` holds close and differing keys; ``compared`` says whether values were compared at all.
    ``bookkeeping`` are the num_batches_tracked that one side lacks, ``counters`` how many of them A has, and B.
    ``shapes`` and ``dtypes`` describe the keys that only one side has.
    """

    same: bool
    equal: int
    only_in_a: list[str]
    only_in_b: list[str]
    shape: list[Changed]
    dtype: list[Changed]
    values: list[ValuesChanged]
    devices: list[Changed]
    bookkeeping: list[str]
    renamed: list[Changed] = field(default_factory=list)
    counters: dict[str, int] = field(default_factory=dict)
    compared: bool = False
    shapes: dict[str, list[int] | None] = field(default_factory=dict)
    dtypes: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def found(self) -> dict[str, int]:
        """Returns how many differences there are of each of `KINDS`."""
        differing = sum(row.status == "differ" for row in self.values)
        counts = (self.only_in_a, self.only_in_b, self.shape, self.dtype, differing, self.devices, self.bookkeeping)
        numbers = [count if isinstance(count, int) else len(count) for count in counts]
        return dict(zip(KINDS, numbers, strict=True))


def diff(
    a: Checkpoint,
    b: Checkpoint,
    *,
    ignore: Sequence[str] = (),
    strip_prefix_a: str | None = None,
    strip_prefix_b: str | None = None,
    devices: bool = False,
    compare: Compare | None = None,
) -> DiffReport:
    """Returns how the weights of two checkpoints differ; ``compare`` is asked about pairs of one shape.

    Raises: NoTensorsError if a side has none, CollisionError if stripping makes two keys one.
    """
    first, second = _tensors(a), _tensors(b)
    found = {side.url: path_text(side.root) for side in (a, b)}
    notes = [f"the weights of {url} are at {root}" for url, root in found.items() if root]
    plain_a, plain_b = (
        names.plain_keys(first, strip_prefix_a, None, a.url),
        names.plain_keys(second, strip_prefix_b, None, b.url),
    )
    notes += _wrapper_notes(a, first, b, second)
    chosen = names.chooser((), ignore) if ignore else lambda key: True
    for pattern in names.unused_patterns(ignore, [*plain_a, *plain_b, *first, *second]):
        notes.append(f"--ignore {pattern} fits no key")
    report = DiffReport(False, 0, [], [], [], [], [], [], [], compared=compare is not None, notes=notes)
    equal = ignored = 0
    for plain, key in plain_a.items():
        if not (chosen(plain) and chosen(key)):
            ignored += 1
        elif plain not in plain_b:
            (report.bookkeeping if names.is_counter(key) else report.only_in_a).append(key)
            _remember(report, key, first[key])
        else:
            equal += _same(report, key, first[key], second[plain_b[plain]], devices, compare)
    lone = len(report.bookkeeping)
    for plain, key in plain_b.items():
        if plain in plain_a:
            continue
        if not (chosen(plain) and chosen(key)):
            ignored += 1
            continue
        (report.bookkeeping if names.is_counter(key) else report.only_in_b).append(key)
        _remember(report, key, second[key])
    if ignored:
        notes.append(f"ignored: {ignored} keys")
    if (report.only_in_a or report.only_in_b) and not equal + len(report.shape) + len(report.dtype):
        notes += _hint(plain_a, plain_b)
    same = not any(count for kind, count in report.found().items() if kind != "bookkeeping")
    counters = {"a": lone, "b": len(report.bookkeeping) - lone}
    return replace(report, same=same, equal=equal, counters=counters)


def volume(a: Checkpoint, b: Checkpoint, **options: Any) -> int:
    """Returns the bytes, of both sides, that `diff` with these options hands to ``compare``; reads none of them."""
    found = 0

    def weigh(one: TensorInfo, other: TensorInfo) -> _Same:
        nonlocal found
        found += one.nbytes + other.nbytes
        return _Same()

    diff(a, b, **options, compare=weigh)
    return found


class _Same:
    """What `volume` answers instead of comparing."""

    status = "equal"
    max_abs = rel_l2 = 0.0


def _tensors(checkpoint: Checkpoint) -> dict[str, TensorInfo]:
    """Returns the tensors to compare, those inside packed parameters and extra state included as ``key/path``."""
    tensors = checkpoint.state_dict()
    if not tensors:
        raise NoTensorsError(no_tensors(checkpoint), checkpoint.url)
    for key, inner in checkpoint.hidden().items() if is_flat(checkpoint.at(checkpoint.root)) else ():
        tensors.update((f"{key}/{path}", tensor) for path, tensor in inner.items())
    return tensors


def no_tensors(checkpoint: Checkpoint) -> str:
    """Returns the line that says there is nothing to work on, and where there might be."""
    where = path_text(checkpoint.root)
    places = {path_text(path[:-1]) or "the top" for path, _ in checkpoint.tensors()}
    return f"no tensors at {where or 'the top'}" + (f"; there are some at {listed(sorted(places))}" if places else "")


def _wrapper_notes(
    a: Checkpoint, first: Mapping[str, TensorInfo], b: Checkpoint, second: Mapping[str, TensorInfo]
) -> list[str]:
    in_a, in_b = names.looked_through(list(first)), names.looked_through(list(second))
    if in_a == in_b:
        return []
    return [f"looked through {prefix!r} in {side.url}" for prefix, side in ((in_a, a), (in_b, b)) if prefix]


def _remember(report: DiffReport, key: str, tensor: TensorInfo) -> None:
    report.shapes[key] = None if tensor.shape is None else list(tensor.shape)
    report.dtypes[key] = tensor.dtype


def _same(
    report: DiffReport, key: str, one: TensorInfo, other: TensorInfo, devices: bool, compare: Compare | None
) -> bool:
    """Notes what differs between two tensors of one name; returns whether nothing does."""
    plain = one.storage and other.storage and one.dtype == other.dtype and one.shape == other.shape
    if plain and not devices and compare is None:
        return True  # nearly always
    same = True
    counters = names.is_counter(key) and {one.shape, other.shape} <= {(), (1,)}
    if one.form[1] != other.form[1] and not counters:
        report.shape.append(Changed(key, _shape(one), _shape(other)))
        same = False
    if (one.dtype, one.kind) != (other.dtype, other.kind):
        report.dtype.append(Changed(key, _dtype(one), _dtype(other)))
        same = False
    if devices and one.location != other.location:
        report.devices.append(Changed(key, one.location, other.location))
        same = False
    if compare is not None and (one.form == other.form or counters):
        distance = compare(one, other)
        if distance.status != "equal":
            report.values.append(ValuesChanged(key, distance.status, distance.max_abs, distance.rel_l2))
            same = False
    return same


def _dtype(tensor: TensorInfo) -> str:
    return tensor.dtype if tensor.kind == "dense" else f"{tensor.dtype} {tensor.kind}"


def _shape(tensor: TensorInfo) -> Any:
    if tensor.shape is None:
        return None
    return list(tensor.shape)


def _hint(plain_a: Mapping[str, str], plain_b: Mapping[str, str]) -> list[str]:
    best = names.best_prefix(plain_a, plain_b)
    if best is None:
        return []
    strip, add, count = best
    if strip and not add:
        return [f"--strip-prefix-a {strip} would match {count} of {len(plain_b)} keys"]
    if add and not strip:
        return [f"--strip-prefix-b {add} would match {count} of {len(plain_b)} keys"]
    return [f"--strip-prefix-a {strip} --strip-prefix-b {add} would match {count} of {len(plain_b)} keys"]
