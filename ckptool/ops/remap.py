"""Renames keys and reshapes tensors by rules, or undoes that with the map file, which lists every change."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from ckptool.core import modules
from ckptool.core.aliases import followed
from ckptool.core.checkpoint import Checkpoint, detached
from ckptool.core.dtypes import COMMON_FLOATS
from ckptool.core.keys import is_counter, near_pattern
from ckptool.core.roots import is_flat
from ckptool.core.tensor import TensorInfo
from ckptool.core.tree import PyObject, as_mapping, replaced, with_content
from ckptool.core.versions import Moved, moved, restored, versioned, versions_of, with_versions
from ckptool.errors import CollisionError, NoTensorsError, UsageError, listed
from ckptool.ops import maps
from ckptool.ops.notes import optimizer_notes, optimizer_states, require_tensors, root_notes
from ckptool.ops.rules import Rules
from ckptool.ops.steps import Maker, Past, Shapes, Step, advance, fits, pasts


@dataclass(slots=True)  # not frozen: 100,000 of them would cost four times as much
class Mapped:
    """One key of the output: the keys it was made from, and how.

    ``op`` is ``rename``, or operations from left to right joined with ";": ``copy``, ``transpose``, ``permute:a,b,..``,
    ``reshape``, ``split:dim:i/n``, ``slice:dim:a:b``, ``concat:dim``. Operations before a ``concat`` were done to
    each of the keys; where they differ, ``concat:dim<a|b|..>`` lists them key by key, with "+" for ";".
    """

    new: str
    """The key in the output."""
    old: list[str]
    """The keys it was made from."""
    op: str
    """How it was made, in the grammar above."""


@dataclass(frozen=True, slots=True)
class RemapReport:
    """What became of every key."""

    map: list[Mapped]
    """One row per key of the output."""
    dropped: list[str]
    """Keys left out on purpose."""
    unused_rules: list[str]
    """Rules that fit no key."""
    output: str | None = None
    """The path that was written."""
    saved: Mapping[str, Any] | None = None
    """What --save-map writes; never part of the document."""
    notes: list[str] = field(default_factory=list)
    """What else was noticed."""


Same = Callable[[TensorInfo, TensorInfo], bool]
"""Returns whether two tensors of one dtype and shape have the same bytes."""


def remap(checkpoint: Checkpoint, rules: Rules, *, allow_unused: bool = False) -> tuple[Checkpoint, RemapReport]:
    """Returns (checkpoint, report) with the rules applied in order to the keys at root.

    Keys are renamed in ``_metadata``, in safetensors' metadata, in optimizer state that is keyed by name, and in
    ``param_names`` too.
    Raises: CollisionError listing all colliding and empty names and all sizes that do not add up; UsageError for
    rules that match no key (unless ``allow_unused``); NoTensorsError if no tensor would be left.
    """
    with _uncollected():
        node, values = _weights(checkpoint)
        require_tensors(checkpoint)
        plan = rules.plan(_shapes(values))
        if plan.errors:
            errors = [*plan.errors, *(f"{text} fits no key" for text in plan.unused if not allow_unused)]
            raise CollisionError(_joined(errors), checkpoint.url)
        if not allow_unused:
            _refuse_unused(plan.unused, checkpoint)
        done = _applied(values, plan.batches, plan.after, checkpoint.url)
        versions = versions_of(node)
        follow = None
        if versions is not None:
            follow = moved(versions, ((old, row.new) for row in done.rows for old in row.old))
        changed, report = _finished(checkpoint, node, values, plan.batches, done, follow)
        return changed, replace(report, unused_rules=plan.unused)


def remap_all(
    checkpoints: Sequence[Checkpoint], rules: Any, *, allow_unused: bool = False
) -> tuple[list[Checkpoint], dict[str | None, dict[str, str]]]:
    """Returns (the checkpoints after rules, {url, None for a single checkpoint: {new key: old keys}}).

    A rule must fit a key of one of them. ``rules`` and errors: see `Rules.parse` and `remap`.
    """
    rules, several = Rules.parse(rules), len(checkpoints) > 1
    done = [remap(checkpoint, rules, allow_unused=allow_unused or several) for checkpoint in checkpoints]
    if several and not allow_unused:
        unused = [set(report.unused_rules) for _, report in done]
        _refuse_unused(sorted(set.intersection(*unused)), checkpoints[0])
    origins = [{row.new: " + ".join(row.old) for row in report.map} for _, report in done]
    urls = [checkpoint.url if several else None for checkpoint in checkpoints]
    return [checkpoint for checkpoint, _ in done], dict(zip(urls, origins, strict=True))


def _refuse_unused(rules: Sequence[str], checkpoint: Checkpoint) -> None:
    """Raises UsageError if there are rules that fit no key."""
    if rules:
        known = checkpoint.state_dict()
        texts = [rule + near_pattern([*rule.split(" "), ""][1], known, part=True) for rule in rules[:8]]
        raise UsageError(
            f"rules that fit no key (--allow-unused lets them): {listed([*texts, *rules[8:]])}", checkpoint.url
        )


def invert(checkpoint: Checkpoint, saved: Any, *, same: Same | None = None) -> tuple[Checkpoint, RemapReport]:
    """Returns (checkpoint, report) with a saved map undone; the old order of keys is restored.

    Keys that an operation untied are tied again if ``same`` finds the same bytes in them; without ``same`` the map is
    trusted. Raises: UsageError if it is not a map, is of other keys or shapes, or dropped any key.
    """
    with _uncollected():
        recorded = maps.read(saved)
        batches = [[step.inverted() for step in batch] for batch in reversed(recorded.batches)]
        node, values = _weights(checkpoint)
        shapes = _shapes(values)
        absent = [key for key in recorded.shapes if key not in shapes]
        if absent:
            raise UsageError(f"keys of the map are not in the checkpoint: {listed(absent)}", checkpoint.url)
        other = [key for key, shape in recorded.shapes.items() if shapes[key] != shape]
        if other:
            raise UsageError(f"the map has other shapes for: {listed(other)}", checkpoint.url)
        after = _followed(batches, shapes, checkpoint.url)
        lost = [key for key in recorded.keys if key not in after]
        if lost:
            raise UsageError(f"the map contradicts itself: no step brings back {listed(lost)}", checkpoint.url)
        ordered = {key: after[key] for key in recorded.keys}
        done = _applied(values, batches, {**ordered, **after}, checkpoint.url, same)
        again = _retied(done.values, recorded.ties, same)
        versions = versions_of(node)
        follow = None if versions is None else restored(versions, recorded.modules, recorded.versions)
        changed, report = _finished(checkpoint, node, values, batches, done, follow)
        return changed, replace(report, notes=[*report.notes, *again])


@contextmanager
def _uncollected() -> Iterator[None]:
    """Turns the garbage collector off: with 100,000 new rows it searched them repeatedly, for most of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _weights(checkpoint: Checkpoint) -> tuple[Any, dict[str, Any]]:
    """Returns (the dict at root, or the state_dict of an nn.Module there; {key: value}).

    The dict is None if the weights are in nested containers.
    """
    node = checkpoint.at(checkpoint.root)
    if isinstance(node, TensorInfo):
        raise UsageError("holds a bare tensor, which has no key to rename", checkpoint.url)
    values = {key: value for key, (_, value) in checkpoint.entries().items()}
    if modules.is_module(node):
        values = detached(values)
        return versioned(values, node), values
    return (node if is_flat(node) else None), values


def _shapes(values: Mapping[str, Any]) -> Shapes:
    return {key: value.shape if isinstance(value, TensorInfo) else None for key, value in values.items()}


def _joined(errors: Sequence[str]) -> str:
    shown = [*errors[:100], *([f"and {len(errors) - 100:,} more like these"] if len(errors) > 100 else [])]
    return "; ".join(shown)


def _followed(batches: Sequence[Sequence[Step]], current: Shapes, url: str) -> Shapes:
    """Returns {key: shape} after the steps of a map, which may be wrong. Raises: UsageError, CollisionError."""
    for batch in batches:
        old = [key for step in batch for key in step.old]
        wrong = [step for step in batch if not all(key in current for key in step.old)]
        wrong = wrong or [step for step in batch if not fits(step, [current[key] for key in step.old])]
        if wrong or len(set(old)) < len(old):
            what = listed(f"{step.op} of {listed(step.old)}" for step in wrong) or "a key is used twice"
            raise UsageError(f"the map contradicts itself: {what}", url)
        current, errors = advance(batch, current)
        if errors:
            raise CollisionError(_joined(errors), url)
    return current


class _Done(NamedTuple):
    """The new entries at root in order, a row for each key, the dropped keys and the new shapes."""

    values: dict[str, Any]
    rows: list[Mapped]
    dropped: list[str]
    shapes: Shapes


def _applied(
    values: Mapping[str, Any], batches: Sequence[Sequence[Step]], after: Shapes, url: str, same: Same | None = None
) -> _Done:
    """Returns the values at root after steps that `fits` has checked, in the order of ``after``."""
    now: dict[str, str | _Computed] = {}  # new key -> old key, or a computed tensor; unchanged keys have no entry
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
            elif step.op == "copy":
                past, value = origins[0]
                made.update(zip(step.new, (inputs[0], _Computed(past.then("copy"), value)), strict=True))
            elif step.op == "uncopy":
                if not _is_same(origins[0].value, origins[1].value, same):
                    raise UsageError(f"{' and '.join(step.old)} were copies, and differ: one would be lost", url)
                made[step.new[0]] = inputs[0]
            elif not all(isinstance(origin.value, TensorInfo) for origin in origins):
                raise UsageError(f"{', '.join(step.old)}: not tensors, so {step.op} does not apply", url)
            else:
                tensors = maker.make(step, [origin.value for origin in origins])
                histories = pasts(step, [origin.past for origin in origins])
                made.update(zip(step.new, map(_Computed, histories, tensors), strict=True))
        now.update(made)
    origins_of = list(map(now.get, after, after))
    ordered = {
        key: values[origin] if isinstance(origin, str) else origin.value
        for key, origin in zip(after, origins_of, strict=True)
    }
    if not any(isinstance(value, TensorInfo) for value in ordered.values()):
        raise NoTensorsError("no tensor would be left", url)
    rows = [
        Mapped(key, [origin], "rename") if isinstance(origin, str) else Mapped(key, origin.past.keys, origin.past.op)
        for key, origin in zip(after, origins_of, strict=True)
    ]
    return _Done(ordered, rows, dropped, after)


class _Computed(NamedTuple):
    """A tensor that operations computed, with their keys and text."""

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
    """Returns (checkpoint, report) with the new entries, and key names changed in metadata and optimizer state too."""
    changed = _with_content(checkpoint, node, done, follow)
    # Records of ties are not among the metadata: writers derive them from the tensors again.
    same = ((old, row.new) for row in done.rows if row.op in ("rename", "copy") for old in row.old)
    computed = {old for row in done.rows if row.op not in ("rename", "copy") for old in row.old}
    metadata, told = followed(checkpoint.metadata, before, same, computed)
    changed, notes = _with_renamed_optimizers(replace(changed, metadata=metadata), done)
    tensors, after = (
        {key: value for key, value in values.items() if isinstance(value, TensorInfo)}
        for values in (before, done.values)
    )
    if not {tensor.dtype for tensor in tensors.values()} <= {*COMMON_FLOATS, "int64"}:
        from ckptool.ops.scales import mixed_notes, parted_notes, renamed_notes

        told += parted_notes([tensors], [tensors.keys() - done.dropped]) + mixed_notes(tensors, computed)
        moved = ((old, row.new) for row in done.rows if row.op in ("rename", "copy") for old in row.old)
        told += renamed_notes(tensors, after, moved)
    content = maps.Map(
        batches, list(before), done.shapes, _broken_ties(checkpoint, before, batches, done),
        follow.paths if follow else {}, follow.lost if follow else {},
    )  # fmt: skip
    saved = maps.written(content, [{"new": row.new, "old": row.old, "op": row.op} for row in done.rows], done.dropped)
    return changed, RemapReport(done.rows, done.dropped, [], None, saved, [*root_notes([checkpoint]), *told, *notes])


# --- ties --------------------------------------------------------------------------------------------------------


def _broken_ties(
    checkpoint: Checkpoint, values: Mapping[str, Any], batches: Sequence[Sequence[Step]], done: _Done
) -> list[list[list[str]]]:
    """Returns the groups of old keys that were tied and are not any more.

    Within a group, keys of one tensor object are in one list, as torch.load returns one object for them.
    """
    if all(step.op in ("rename", "drop", "copy", "uncopy") for batch in batches for step in batch):
        return []
    tied = []
    for shared in checkpoint.shared():
        objects: dict[int, list[str]] = {}
        for key in shared:
            objects.setdefault(id(values[key]), []).append(key)
        tied.append(list(objects.values()))
    became: dict[str, list[str]] = {key: [] for group in tied for keys in group for key in keys}
    for row in done.rows:
        for key in row.old:
            if key in became:
                became[key].append(row.new)
    return [group for group in tied if not _still_tied([became[key] for keys in group for key in keys], done.values)]


def _still_tied(became: Sequence[Sequence[str]], values: Mapping[str, Any]) -> bool:
    """Returns whether the new keys, a list for each of the tied old keys, are tied in the same way."""
    names = [new for members in became for new in members]
    views = {tuple(values[new].view for new in members) for members in became}
    return len(set(names)) == len(names) and len(views) == 1


def _retied(values: dict[str, Any], groups: Sequence[Sequence[Sequence[str]]], same: Same | None) -> list[str]:
    """Ties the keys of each group in ``values`` again if they `_may_be_tied`; returns notes about it."""
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
    return [f"tied again, as the map says: {', '.join(pairs)}"] if pairs else []


def _is_same(one: Any, other: Any, same: Same | None) -> bool:
    """Returns whether two copies are still equal; objects, and without ``same`` tensors too, are trusted."""
    if not (isinstance(one, TensorInfo) and isinstance(other, TensorInfo)):
        return type(one) is type(other)
    return one.view == other.view or _may_be_tied(one, other, same)


def _may_be_tied(one: TensorInfo, other: TensorInfo, same: Same | None) -> bool:
    alike = one.view != other.view and (one.dtype, one.form) == (other.dtype, other.form)
    return alike and (same is None or same(one, other))


# --- other places with key names ----------------------------------------------------------------------------------


def _with_content(checkpoint: Checkpoint, node: Any, done: _Done, follow: Moved | None) -> Checkpoint:
    """Returns the checkpoint with the new entries at root, entries that are not tensors included."""
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
        # A BatchNorm's version implies its counter, see `Checkpoint.with_state_dict`.
        for path in {key.rpartition(".")[0] for key in done.dropped if is_counter(key)}:
            for new in follow.paths.get(path, ()):
                versions.pop(new, None)
        state = with_versions(state, versions)
    return replace(checkpoint, tree=replaced(checkpoint.tree, checkpoint.root, node.with_mapping(content, state)))


def _with_own_keys(checkpoint: Checkpoint, node: Any, done: _Done) -> dict[Any, Any]:
    """Returns the new content; keys that were not renamed stay the dict's own objects, which may be numbers."""
    entries = checkpoint.entries()
    if list(entries) == list(as_mapping(node) or ()):
        return done.values
    kept = {row.new for row in done.rows if row.op == "rename" and row.old == [row.new]}
    return {entries[key][0][-1] if key in kept else key: value for key, value in done.values.items()}


def _with_renamed_optimizers(checkpoint: Checkpoint, done: _Done) -> tuple[Checkpoint, list[str]]:
    """Returns (checkpoint, notes) with the key names in optimizer states renamed.

    Names are in ``param_names`` and in states keyed by name. States keyed by position stay valid unless a parameter was
    reshaped or dropped, which a note then says.
    """
    states = list(optimizer_states(checkpoint))
    names = {row.old[0]: row.new for row in done.rows if row.op == "rename"} if states else {}
    for path, node in states:
        renamed_node = _renamed_optimizer(node, names)
        if renamed_node is not node:
            checkpoint = replace(checkpoint, tree=replaced(checkpoint.tree, path, renamed_node))
    changed = done.dropped or any(row.op not in ("rename", "copy") for row in done.rows)
    return checkpoint, optimizer_notes(checkpoint) if states and changed else []


def _renamed_optimizer(node: Any, names: Mapping[str, str]) -> Any:
    mapping = as_mapping(node) or {}
    groups, state = mapping.get("param_groups"), as_mapping(mapping.get("state"))
    changed = node
    if isinstance(groups, list):
        renamed = [_renamed_group(group, names) for group in groups]
        if renamed != groups:
            changed = replaced(changed, ("param_groups",), renamed)
    if state and any(isinstance(key, str) and key in names for key in state):
        moved = dict(zip(_renamed(state, names), state.values(), strict=True))
        kept = mapping["state"]
        changed = replaced(changed, ("state",), with_content(kept, moved))
    return changed


def _renamed_group(group: Any, names: Mapping[str, str]) -> Any:
    if not isinstance(group, dict):
        return group
    lists = {name: group.get(name) for name in ("params", "param_names")}
    return {**group, **{name: _renamed(value, names) for name, value in lists.items() if isinstance(value, list)}}


def _renamed(keys: Iterable[Any], names: Mapping[str, str]) -> list[Any]:
    return [names.get(key, key) if isinstance(key, str) else key for key in keys]
