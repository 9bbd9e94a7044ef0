"""Rename keys and reshape tensors by rules, with the exact list of what was done, and the way back."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from ckptool.core import modules, optimizers
from ckptool.core.checkpoint import Checkpoint, detached, is_flat
from ckptool.core.keys import is_counter
from ckptool.core.tensor import Opaque, TensorInfo
from ckptool.core.tree import Path, PyObject, as_mapping, ordered_dict, replaced, walk
from ckptool.core.versions import Moved, moved, restored, versions_of
from ckptool.errors import CollisionError, NoTensorsError, UsageError, listed
from ckptool.ops import maps
from ckptool.ops.diff import no_tensors
from ckptool.ops.filter import optimizer_notes, root_notes
from ckptool.ops.rules import Rules
from ckptool.ops.steps import Maker, Past, Shapes, Step, advance, fits, pasts


@dataclass(slots=True)  # frozen, a hundred thousand of them would cost four times as much
class Mapped:
    """One key of the output: the keys it was made from, and how.

    ``op`` is ``rename``, or operations from left to right joined with ";": ``transpose``, ``permute:a,b,..``,
    ``reshape``, ``split:dim:i/n``, ``slice:dim:a:b``, ``concat:dim``. What stands before a ``concat`` was done to
    each of the keys; ``concat:dim<a|b|..>`` says it one by one where it differs, with "+" for ";".
    """

    new: str
    old: list[str]
    op: str


@dataclass(frozen=True, slots=True)
class RemapReport:
    """``map`` has one row per key of the output, ``dropped`` the keys left out on purpose, ``saved`` the map file."""

    map: list[Mapped]
    dropped: list[str]
    unused_rules: list[str]
    output: str | None = None
    saved: Mapping[str, Any] | None = None
    notes: list[str] = field(default_factory=list)


Same = Callable[[TensorInfo, TensorInfo], bool]
"""Whether two tensors of one dtype and shape hold the same bytes."""


def remap(checkpoint: Checkpoint, rules: Rules, *, allow_unused: bool = False) -> tuple[Checkpoint, RemapReport]:
    """Returns (checkpoint, report) with the rules applied in order to the keys at root.

    Everything that carries key names follows: ``_metadata``, name-keyed optimizer state and ``param_names``.
    Raises: CollisionError listing all colliding and empty names and all sizes that do not add up; UsageError for
    rules that matched nothing (unless ``allow_unused``); NoTensorsError if nothing would be left.
    """
    with _uncollected():
        node, values = _weights(checkpoint)
        if not any(isinstance(value, TensorInfo) for value in values.values()):
            raise NoTensorsError(no_tensors(checkpoint), checkpoint.url)
        plan = rules.plan(_shapes(values))
        if plan.troubles:
            troubles = [*plan.troubles, *(f"{text} fits no key" for text in plan.unused if not allow_unused)]
            raise CollisionError(_all(troubles), checkpoint.url)
        if plan.unused and not allow_unused:
            raise UsageError(f"rules that fit no key (--allow-unused lets them): {listed(plan.unused)}", checkpoint.url)
        done = _applied(values, plan.batches, plan.after, checkpoint.url)
        versions = versions_of(node)
        follow = None
        if versions is not None:
            follow = moved(versions, ((old, row.new) for row in done.rows for old in row.old))
        changed, report = _finished(checkpoint, node, values, plan.batches, done, follow)
        return changed, replace(report, unused_rules=plan.unused)


def invert(checkpoint: Checkpoint, saved: Any, *, same: Same | None = None) -> tuple[Checkpoint, RemapReport]:
    """Returns (checkpoint, report) with what a saved map did undone, operations and the order of keys included.

    Keys that an operation untied become one tensor again where ``same`` says that they hold the same bytes;
    without it the map is believed. Raises: UsageError if the map is none, does not fit these keys, or dropped any.
    """
    with _uncollected():
        recorded = maps.read(saved)
        batches = [[step.inverted() for step in batch] for batch in reversed(recorded.batches)]
        node, values = _weights(checkpoint)
        shapes = _shapes(values)
        absent = [key for key in recorded.shapes if key not in shapes]
        if absent:
            raise UsageError(f"the map speaks of keys that are not there: {listed(absent)}", checkpoint.url)
        other = [key for key, shape in recorded.shapes.items() if shapes[key] != shape]
        if other:
            raise UsageError(f"the map is of tensors of other shapes: {listed(other)}", checkpoint.url)
        after = _followed(batches, shapes, checkpoint.url)
        lost = [key for key in recorded.keys if key not in after]
        if lost:
            raise UsageError(f"the map contradicts itself: no step brings back {listed(lost)}", checkpoint.url)
        ordered = {key: after[key] for key in recorded.keys}
        done = _applied(values, batches, {**ordered, **after}, checkpoint.url)
        again = _retied(done.values, recorded.ties, same)
        versions = versions_of(node)
        follow = None if versions is None else restored(versions, recorded.modules, recorded.versions)
        changed, report = _finished(checkpoint, node, values, batches, done, follow)
        return changed, replace(report, notes=[*report.notes, *again])


@contextmanager
def _uncollected() -> Iterator[None]:
    """Keeps the garbage collector from looking through 100,000 new rows again and again: most of the time it took."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _weights(checkpoint: Checkpoint) -> tuple[Any, dict[str, Any]]:
    """Returns (the dict at root, or the one that an nn.Module there would give; {key: value} of what is in it).

    The dict is None where there is none: the weights are spread over a nest of containers.
    """
    node = checkpoint.at(checkpoint.root)
    values = {key: value for key, (_, value) in checkpoint.entries().items()}
    if modules.is_module(node):
        values = detached(values)
        return ordered_dict(values, modules.metadata(node)), values
    return (node if is_flat(node) else None), values


def _shapes(values: Mapping[str, Any]) -> Shapes:
    return {key: value.shape if isinstance(value, TensorInfo) else None for key, value in values.items()}


def _all(troubles: Sequence[str]) -> str:
    shown = [*troubles[:100], *([f"and {len(troubles) - 100:,} more like these"] if len(troubles) > 100 else [])]
    return "; ".join(shown)


def _followed(batches: Sequence[Sequence[Step]], current: Shapes, url: str) -> Shapes:
    """Returns {key: shape} after steps that someone else wrote. Raises: UsageError, CollisionError."""
    for batch in batches:
        old = [key for step in batch for key in step.old]
        wrong = [f"{step.op} of {listed(step.old)}" for step in batch if not all(key in current for key in step.old)]
        wrong = wrong or [f"{step.op} of {listed(step.old)}" for step in batch if not _fits(step, current)]
        if wrong or len(set(old)) < len(old):
            raise UsageError(f"the map contradicts itself: {listed(wrong) or 'a key is used twice'}", url)
        current, troubles = advance(batch, current)
        if troubles:
            raise CollisionError(_all(troubles), url)
    return current


def _fits(step: Step, current: Shapes) -> bool:
    return step.op == "rename" or fits(step, [current[key] for key in step.old])


class _Done(NamedTuple):
    """The new content of the dict at root in order, a row for each of its keys, the old keys left out, the shapes."""

    values: dict[str, Any]
    rows: list[Mapped]
    dropped: list[str]
    shapes: Shapes


def _applied(values: Mapping[str, Any], batches: Sequence[Sequence[Step]], after: Shapes, url: str) -> _Done:
    """Returns what steps that fit make of the values at root, in the order of ``after``."""
    now: dict[str, str | _Computed] = {}  # what is only renamed has its old name here, or stands not here at all
    dropped: list[str] = []
    maker = Maker()
    for batch in batches:
        made: dict[str, str | _Computed] = {}
        for step in batch:
            inputs = list(map(now.pop, step.old, step.old))
            if step.op == "rename":
                made.update(zip(step.new, inputs, strict=True))
                continue
            origins = [_Computed(Past([one]), values[one]) if isinstance(one, str) else one for one in inputs]
            if step.op == "drop":
                dropped += [key for origin in origins for key in origin.past.keys]
            elif not all(isinstance(origin.value, TensorInfo) for origin in origins):
                raise UsageError(f"{', '.join(step.old)}: not tensors, {step.op} does not apply", url)
            else:
                tensors = maker.make(step, [origin.value for origin in origins])
                words = pasts(step, [origin.past for origin in origins])
                made.update(zip(step.new, map(_Computed, words, tensors), strict=True))
        now.update(made)
    found = list(map(now.get, after, after))
    ordered = {
        key: values[origin] if isinstance(origin, str) else origin.value
        for key, origin in zip(after, found, strict=True)
    }
    if not any(isinstance(value, TensorInfo) for value in ordered.values()):
        raise NoTensorsError("no tensor would be left", url)
    rows = [
        Mapped(key, [origin], "rename") if isinstance(origin, str) else Mapped(key, origin.past.keys, origin.past.op)
        for key, origin in zip(after, found, strict=True)
    ]
    return _Done(ordered, rows, dropped, after)


class _Computed(NamedTuple):
    """A tensor that operations made, and how it came about."""

    past: Past
    value: Any


def _finished(
    checkpoint: Checkpoint,
    node: Any,
    before: Mapping[str, Any],
    batches: Sequence[Sequence[Step]],
    done: _Done,
    follow: Moved | None,
) -> tuple[Checkpoint, RemapReport]:
    """Returns (checkpoint, report) with all that carries names made to follow."""
    changed = _with_content(checkpoint, node, done, follow)
    # Records of ties speak of the old names; a writer makes them anew from the tensors.
    changed, notes = _renamed_optimizers(changed, done)
    content = maps.Map(
        batches, list(before), done.shapes, _broken_ties(before, batches, done),
        follow.paths if follow else {}, follow.lost if follow else {},
    )  # fmt: skip
    saved = maps.written(content, [{"new": row.new, "old": row.old, "op": row.op} for row in done.rows], done.dropped)
    return changed, RemapReport(done.rows, done.dropped, [], None, saved, [*root_notes([checkpoint]), *notes])


# --- ties --------------------------------------------------------------------------------------------------------


def _broken_ties(values: Mapping[str, Any], batches: Sequence[Sequence[Step]], done: _Done) -> list[list[list[str]]]:
    """Returns the groups of old keys that were the same elements of one storage, and are no longer.

    Within a group, keys that were one object stand together: torch.load gives such one object too.
    """
    if all(step.op in ("rename", "drop") for batch in batches for step in batch):
        return []
    by_source: dict[int, list[str]] = {}
    for key, value in values.items():
        if isinstance(value, TensorInfo) and not isinstance(value.source, Opaque):
            by_source.setdefault(id(value.source), []).append(key)
    groups: dict[object, dict[int, list[str]]] = {}
    for key in (key for keys in by_source.values() if len(keys) > 1 for key in keys):
        if values[key].numel:
            groups.setdefault(values[key].view, {}).setdefault(id(values[key]), []).append(key)
    tied = [list(group.values()) for group in groups.values() if sum(map(len, group.values())) > 1]
    became: dict[str, list[str]] = {key: [] for group in tied for keys in group for key in keys}
    for row in done.rows:
        for key in row.old:
            if key in became:
                became[key].append(row.new)
    return [group for group in tied if not _still_tied([became[key] for keys in group for key in keys], done.values)]


def _still_tied(became: Sequence[Sequence[str]], values: Mapping[str, Any]) -> bool:
    """Returns whether what tied keys became is tied, one by one."""
    names = [new for members in became for new in members]
    views = {tuple(values[new].view for new in members) for members in became}
    return len(set(names)) == len(names) and len(views) == 1


def _retied(values: dict[str, Any], groups: Sequence[Sequence[Sequence[str]]], same: Same | None) -> list[str]:
    """Makes one tensor of keys that were one; returns the notes that say so."""
    pairs = []
    for group in groups:
        tensors = {key: values[key] for keys in group for key in keys if isinstance(values.get(key), TensorInfo)}
        first = next((key for key, value in tensors.items() if value.storage is not None), next(iter(tensors), ""))
        for keys in group:
            shared = tensors.get(first) if first in keys else None
            for key in keys:
                other = tensors.get(key)
                if other is not None and _may_be_tied(tensors[first], other, same):
                    flags = other.requires_grad, other.is_parameter
                    shared = shared or replace(tensors[first], requires_grad=flags[0], is_parameter=flags[1])
                    values[key] = shared
                    pairs.append(f"{key} = {first}")
    return [f"tied again, as the map says: {listed(pairs)}"] if pairs else []


def _may_be_tied(one: TensorInfo, other: TensorInfo, same: Same | None) -> bool:
    alike = one.view != other.view and (one.dtype, one.form) == (other.dtype, other.form)
    return alike and (same is None or same(one, other))


# --- what follows the keys ---------------------------------------------------------------------------------------


def _with_content(checkpoint: Checkpoint, node: Any, done: _Done, follow: Moved | None) -> Checkpoint:
    """Returns the checkpoint with these entries at root, objects that are no tensors renamed like any other."""
    if node is None:
        return checkpoint.with_state_dict(
            {key: value for key, value in done.values.items() if isinstance(value, TensorInfo)}
        )
    content = _with_own_keys(checkpoint, node, done)
    if not isinstance(node, PyObject):
        return replace(checkpoint, tree=replaced(checkpoint.tree, checkpoint.root, content))
    state = node.state
    if follow is not None:
        versions = follow.versions
        # a BatchNorm's version promises its counter, see `Checkpoint.with_state_dict`
        for path in {key.rpartition(".")[0] for key in done.dropped if is_counter(key)}:
            for new in follow.paths.get(path, ()):
                versions.pop(new, None)
        state = {**state, "_metadata": ordered_dict(versions)}
    return replace(checkpoint, tree=replaced(checkpoint.tree, checkpoint.root, node.with_mapping(content, state)))


def _with_own_keys(checkpoint: Checkpoint, node: Any, done: _Done) -> dict[Any, Any]:
    """Returns the new content, what kept its name under the dict key it really is: that may be a number."""
    entries = checkpoint.entries()
    if list(entries) == list(as_mapping(node) or ()):
        return done.values
    kept = {row.new for row in done.rows if row.op == "rename" and row.old == [row.new]}
    return {entries[key][0][-1] if key in kept else key: value for key, value in done.values.items()}


def _renamed_optimizers(checkpoint: Checkpoint, done: _Done) -> tuple[Checkpoint, list[str]]:
    """Returns (checkpoint, notes) with the names in optimizer states following the keys.

    ``param_names`` and states keyed by name are renamed; states keyed by position need nothing while every
    parameter stays. What was reshaped or dropped is said.
    """
    found = _optimizers(checkpoint)
    if not found:
        return checkpoint, []
    names = {row.old[0]: row.new for row in done.rows if row.op == "rename"}
    for path in found:
        node = checkpoint.at(path)
        renamed_node = _renamed_optimizer(node, names)
        if renamed_node is not node:
            checkpoint = replace(checkpoint, tree=replaced(checkpoint.tree, path, renamed_node))
    changed = done.dropped or any(row.op != "rename" for row in done.rows)
    return checkpoint, optimizer_notes(checkpoint) if changed else []


def _optimizers(checkpoint: Checkpoint) -> list[Path]:
    """Returns where in the tree the optimizer states are; of the weights only what is no tensor is looked through."""
    node = checkpoint.at(checkpoint.root)
    weights = node if is_flat(node) and not optimizers.is_optimizer(node) else None

    def closed(node: Any) -> bool:
        return node is weights or optimizers.is_optimizer(node)

    found = [path for path, node in walk(checkpoint.tree, closed=closed) if optimizers.is_optimizer(node)]
    for step, value in (as_mapping(weights) or {}).items():
        if not isinstance(value, TensorInfo):
            below = walk(value, closed=optimizers.is_optimizer)
            found += [(*checkpoint.root, step, *path) for path, node in below if optimizers.is_optimizer(node)]
    return found


def _renamed_optimizer(node: Any, names: Mapping[str, str]) -> Any:
    mapping = as_mapping(node) or {}
    groups, state = mapping.get("param_groups"), as_mapping(mapping.get("state"))
    changed = node
    if isinstance(groups, list) and any(_named(group) for group in groups):
        changed = replaced(changed, ("param_groups",), [_renamed_group(group, names) for group in groups])
    if state and any(isinstance(key, str) and key in names for key in state):
        moved = {names.get(key, key) if isinstance(key, str) else key: value for key, value in state.items()}
        kept = mapping["state"]
        made = kept.with_mapping(moved, kept.state) if isinstance(kept, PyObject) else moved
        changed = replaced(changed, ("state",), made)
    return changed


def _named(group: Any) -> bool:
    lists = [group.get("param_names"), group.get("params")] if isinstance(group, dict) else []
    return any(isinstance(name, str) for found in lists if isinstance(found, list) for name in found)


def _renamed_group(group: Any, names: Mapping[str, str]) -> Any:
    if not isinstance(group, dict):
        return group
    made = dict(group)
    for field_name in ("params", "param_names"):
        if isinstance(group.get(field_name), list):
            made[field_name] = [names.get(name, name) if isinstance(name, str) else name for name in group[field_name]]
    return made
