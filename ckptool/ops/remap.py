"""Rename keys and reshape tensors by rules, with the exact list of what was done, and the way back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

from ckptool import optimizers
from ckptool.checkpoint import Checkpoint, Derived, Opaque, TensorInfo, contiguous_stride
from ckptool.dtypes import DTYPES
from ckptool.errors import CollisionError, NoTensorsError, UnsupportedError, UsageError, listed
from ckptool.keys import is_counter
from ckptool.ops.diff import no_tensors
from ckptool.ops.filter import optimizer_notes, root_notes
from ckptool.ops.rules import Rules, Step, advance, renamed
from ckptool.tree import Path, PyObject, as_mapping, ordered_dict, replaced, walk

SCHEMA = 1
"""Version of the map file."""


@dataclass(frozen=True, slots=True)
class Mapped:
    """One key of the output: the keys it was made from, and how.

    ``op`` is ``rename``, or operations from left to right joined with ";": ``transpose``, ``permute:a,b,..``,
    ``reshape``, ``split:dim:i/n``, ``slice:dim:a:b``, ``concat:dim``.
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
    saved: Mapping[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def remap(checkpoint: Checkpoint, rules: Rules, *, allow_unused: bool = False) -> tuple[Checkpoint, RemapReport]:
    """Returns (checkpoint, report) with the rules applied in order to the keys at root.

    Everything that carries key names follows: ``_metadata``, name-keyed optimizer state and ``param_names``.
    Raises: CollisionError listing all colliding and empty names and all sizes that do not add up; UsageError for
    rules that matched nothing (unless ``allow_unused``); NoTensorsError if nothing would be left.
    """
    entries = checkpoint.entries()
    shapes = {key: value.shape if isinstance(value, TensorInfo) else None for key, (_, value) in entries.items()}
    if not checkpoint.state_dict():
        raise NoTensorsError(no_tensors(checkpoint), checkpoint.url)
    batches, unused, troubles = rules.plan(shapes)
    if troubles:
        troubles += [f"{text} fits no key" for text in unused if not allow_unused]
        raise CollisionError(_all(troubles), checkpoint.url)
    if unused and not allow_unused:
        raise UsageError(f"rules that fit no key (--allow-unused lets them): {listed(unused)}", checkpoint.url)
    modules = {path: _module_under(rules, path) for path in _module_paths(checkpoint)}
    changed, report = _applied(checkpoint, batches, modules, None)
    return changed, replace(report, unused_rules=unused)


def invert(checkpoint: Checkpoint, saved: Any) -> tuple[Checkpoint, RemapReport]:
    """Returns (checkpoint, report) with what a saved map did undone, operations and the order of keys included.

    Raises: UsageError if the map is none or does not fit these keys, or dropped any.
    """
    if not isinstance(saved, dict) or saved.get("schema") != SCHEMA or not isinstance(saved.get("steps"), list):
        raise UsageError("not a map that remap --save-map wrote")
    try:
        batches = [[_step(entry).inverted() for entry in batch] for batch in reversed(saved["steps"])]
        order = [str(key) for key in saved["keys"]]
        modules = {str(new): str(old) for old, new in saved.get("modules", {}).items()}
        shapes = dict(saved["shapes"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"not a map that remap --save-map wrote: {error}") from error
    entries = checkpoint.entries()
    absent = [key for key in shapes if key not in entries]
    if absent:
        raise UsageError(f"the map speaks of keys that are not there: {listed(absent)}", checkpoint.url)
    other = [key for key, shape in shapes.items() if _shape(entries[key][1]) != shape]
    if other:
        raise UsageError(f"the map is of tensors of other shapes: {listed(other)}", checkpoint.url)
    try:
        return _applied(checkpoint, batches, modules, order)
    except (KeyError, IndexError, TypeError, ValueError) as error:  # steps that contradict each other: an edited map
        raise UsageError(f"the map contradicts itself: {type(error).__name__}: {error}", checkpoint.url) from error


def _shape(value: Any) -> list[int] | None:
    return list(value.shape) if isinstance(value, TensorInfo) and value.shape is not None else None


def _all(troubles: Sequence[str]) -> str:
    shown = [*troubles[:100], *([f"and {len(troubles) - 100:,} more like these"] if len(troubles) > 100 else [])]
    return "; ".join(shown)


def _step(entry: Mapping[str, Any]) -> Step:
    return Step(str(entry["op"]), tuple(entry["old"]), tuple(entry["new"]), dict(entry.get("args", {})))


def _applied(
    checkpoint: Checkpoint, batches: Sequence[Sequence[Step]], modules: Mapping[str, str], order: Sequence[str] | None
) -> tuple[Checkpoint, RemapReport]:
    entries = checkpoint.entries()
    values: dict[str, Any] = {key: value for key, (_, value) in entries.items()}
    current = {key: value.shape if isinstance(value, TensorInfo) else None for key, value in values.items()}
    history = {key: ([key], []) for key in values}  # type: dict[str, tuple[list[str], list[str]]]
    dropped: list[str] = []
    maker = _Maker()
    for batch in batches:
        current, troubles = advance(batch, current)
        if troubles:
            raise CollisionError(_all(troubles), checkpoint.url)
        made: dict[str, Any] = {}
        past: dict[str, tuple[list[str], list[str]]] = {}
        touched: set[str] = set()
        for step in batch:
            touched.update(step.old)
            if step.op == "rename":
                for old, new in zip(step.old, step.new, strict=True):
                    made[new], past[new] = values[old], history[old]
                continue
            if step.op == "drop":
                dropped += [origin for key in step.old for origin in history[key][0]]
                continue
            inputs = [values[key] for key in step.old]
            if not all(isinstance(value, TensorInfo) for value in inputs):
                raise UsageError(f"{', '.join(step.old)}: not tensors, {step.op} does not apply", checkpoint.url)
            for number, (new, value) in enumerate(zip(step.new, maker.make(step, inputs), strict=True)):
                made[new] = value
                origins = [origin for key in step.old for origin in history[key][0]]
                past[new] = origins, [*history[step.old[0]][1], _op(step, number)]
        for key in values.keys() - touched:
            made[key], past[key] = values[key], history[key]
        values = {key: made[key] for key in current}
        history = past
    if order is not None:  # the way back: the order is known
        rank = {key: number for number, key in enumerate(order)}
        values = dict(sorted(values.items(), key=lambda item: rank.get(item[0], len(rank))))
    if not any(isinstance(value, TensorInfo) for value in values.values()):
        raise NoTensorsError("no tensor would be left", checkpoint.url)
    rows = [Mapped(key, history[key][0], ";".join(history[key][1]) or "rename") for key in values]
    names = {row.old[0]: row.new for row in rows if row.op == "rename"}
    # Records of ties speak of the old names; a writer makes them anew from the tensors.
    metadata = {name: text for name, text in checkpoint.metadata.items() if name not in entries and text not in entries}
    changed = _with_entries(
        replace(checkpoint, metadata=metadata), values, modules, _same_steps(entries, rows), dropped
    )
    changed, notes = _renamed_optimizers(
        changed, names, {key for row in rows for key in row.old} - names.keys(), dropped
    )
    saved = {
        "schema": SCHEMA,
        "map": [{"new": row.new, "old": row.old, "op": row.op} for row in rows],
        "dropped": dropped,
        "keys": list(entries),
        "shapes": {key: _shape(value) for key, value in values.items()},
        "modules": {old: new for old, new in modules.items() if old != new},
        "steps": [
            [{"op": step.op, "old": step.old, "new": step.new, "args": dict(step.args)} for step in batch]
            for batch in batches
        ],
    }
    report = RemapReport(rows, dropped, [], None, saved, [*root_notes([checkpoint]), *notes])
    return changed, report


def _op(step: Step, number: int) -> str:
    """Returns a step in the grammar of `Mapped.op`, for its new key of that number."""
    args = step.args
    if step.op == "permute":
        return "transpose" if args["dims"] == [1, 0] else f"permute:{','.join(map(str, args['dims']))}"
    if step.op == "reshape":
        return "reshape"
    dim = args["dim"]
    if step.op == "split":
        sizes = args["sizes"]
        if len(set(sizes)) == 1:
            return f"split:{dim}:{number}/{len(sizes)}"
        start = sum(sizes[:number])
        return f"slice:{dim}:{start}:{start + sizes[number]}"
    if step.op == "cat":
        return f"concat:{dim}"
    if step.op == "chunk":
        return f"reshape;split:{dim + 1}:{number}/{args['parts']};reshape"
    return f"reshape;concat:{dim + 1};reshape"


class _Maker:
    """Makes tensors of tensors; tied inputs give tied outputs."""

    def __init__(self) -> None:
        self._made: dict[object, list[TensorInfo]] = {}

    def make(self, step: Step, inputs: Sequence[TensorInfo]) -> list[TensorInfo]:
        """Returns the new tensors of a step. Raises: UnsupportedError for tensors that are not plain."""
        for tensor in inputs:
            if isinstance(tensor.source, Opaque) or DTYPES[tensor.dtype].bits % 8 or tensor.dtype.endswith("_x2"):
                raise UnsupportedError(f"{step.op} of {step.old[0]}: a {tensor.dtype} {tensor.kind} tensor stays whole")
            if len({tensor.dtype for tensor in inputs}) > 1:
                raise UnsupportedError(f"{step.op} of {', '.join(step.old)}: their dtypes differ")
        identity = (step.op, repr(sorted(step.args.items())), *(tensor.view for tensor in inputs))
        if identity not in self._made:
            self._made[identity] = self._views(step, inputs)
        first = inputs[0]
        return [
            replace(made, requires_grad=first.requires_grad, is_parameter=first.is_parameter)
            for made in self._made[identity]
        ]

    def _views(self, step: Step, inputs: Sequence[TensorInfo]) -> list[TensorInfo]:
        first, args = inputs[0], step.args
        shape = first.shape or ()
        if step.op == "permute":
            return [_own(_view(first, [shape[a] for a in args["dims"]], [first.stride[a] for a in args["dims"]]))]
        if step.op == "reshape":
            if prod(args["to"]) != first.numel:
                raise ValueError(f"{step.old[0]} does not hold {args['to']}")
            return [_own(first, tuple(args["to"]))]
        dim = args["dim"]
        if step.op == "split":
            if sum(args["sizes"]) != shape[dim] or min(args["sizes"]) < 0:
                raise ValueError(f"{step.old[0]} does not split into {args['sizes']}")
            pieces, start = [], 0
            for size in args["sizes"]:
                cut = [*shape[:dim], size, *shape[dim + 1 :]]
                pieces.append(_own(_view(first, cut, first.stride, start * first.stride[dim])))
                start += size
            return pieces
        if step.op == "cat":
            if [(tensor.shape or ())[dim] for tensor in inputs] != list(args["sizes"]):
                raise ValueError(f"{', '.join(step.old)} are not {args['sizes']} along {dim}")
            return [_cat(inputs, dim)]
        heads, parts = args["heads"], args["parts"]
        if step.op == "chunk":
            rest = shape[dim] // (heads * parts)
            step_rest = first.stride[dim]
            pieces = []
            for number in range(parts):
                cut = [*shape[:dim], heads, rest, *shape[dim + 1 :]]
                stride = [*first.stride[:dim], parts * rest * step_rest, step_rest, *first.stride[dim + 1 :]]
                flat = (*shape[:dim], heads * rest, *shape[dim + 1 :])
                pieces.append(_own(_view(first, cut, stride, number * rest * step_rest), flat))
            return pieces
        by_head = (*shape[:dim], heads, shape[dim] // heads, *shape[dim + 1 :])
        woven = _cat([_own(tensor, by_head) for tensor in inputs], dim + 1)
        return [_own(woven, (*shape[:dim], shape[dim] * parts, *shape[dim + 1 :]))]


def _view(tensor: TensorInfo, shape: Sequence[int], stride: Sequence[int], offset: int = 0) -> TensorInfo:
    return replace(tensor, shape=tuple(shape), stride=tuple(stride), storage_offset=tensor.storage_offset + offset)


def _own(tensor: TensorInfo, shape: tuple[int, ...] | None = None) -> TensorInfo:
    """Returns a tensor's elements in C order in memory of their own, under another shape if one is given."""
    shape = shape if shape is not None else tensor.shape or ()
    return TensorInfo(tensor.dtype, shape, contiguous_stride(shape), 0, Derived("copy", (tensor,)))


def _cat(inputs: Sequence[TensorInfo], dim: int) -> TensorInfo:
    shape = inputs[0].shape or ()
    total = sum((tensor.shape or ())[dim] for tensor in inputs)
    whole = (*shape[:dim], total, *shape[dim + 1 :])
    source = Derived("cat", tuple(inputs), dim)
    return TensorInfo(inputs[0].dtype, whole, contiguous_stride(whole), 0, source)


# --- what follows the keys ---------------------------------------------------------------------------------------


def _module_paths(checkpoint: Checkpoint) -> list[str]:
    node = checkpoint.with_state_dict(checkpoint.state_dict()).at(checkpoint.root)
    versions = _versions(node)
    return [path for path in versions if isinstance(path, str)] if versions else []


def _versions(node: Any) -> dict[Any, Any] | None:
    state = node.state if isinstance(node, PyObject) else None
    return as_mapping(state.get("_metadata")) if isinstance(state, dict) else None


_LEAF = "\0"


def _module_under(rules: Rules, path: str) -> str:
    """Returns what becomes of a module's path: what the rules make of a key below it."""
    key = f"{path}.{_LEAF}" if path else _LEAF
    for rule in rules.rules:
        key = renamed(rule, key)
    return key.removesuffix(_LEAF).removesuffix(".")


def _same_steps(entries: Mapping[str, tuple[Path, Any]], rows: Sequence[Mapped]) -> dict[str, Any]:
    """Returns {key: the dict key it really is} of what kept its name: a key may be a number."""
    return {row.new: entries[row.new][0][-1] for row in rows if row.op == "rename" and row.old == [row.new]}


def _with_entries(
    checkpoint: Checkpoint,
    values: Mapping[str, Any],
    modules: Mapping[str, str],
    steps: Mapping[str, Any],
    dropped: Sequence[str],
) -> Checkpoint:
    """Returns the checkpoint with these entries at root, objects that are no tensors renamed like any other."""
    tensors = {key: value for key, value in values.items() if isinstance(value, TensorInfo)}
    plain = checkpoint.with_state_dict(checkpoint.state_dict())
    node = plain.at(plain.root)
    mapping = as_mapping(node)
    if mapping is None or not all(len(path) == 1 for path, _ in checkpoint.entries().values()):
        return checkpoint.with_state_dict(tensors)
    content = {steps.get(key, key): value for key, value in values.items()}
    if not isinstance(node, PyObject):
        return replace(plain, tree=replaced(plain.tree, plain.root, content))
    state, versions = node.state, _versions(node)
    if versions is not None:
        moved = {modules.get(path, path) if isinstance(path, str) else path: entry for path, entry in versions.items()}
        for key in dropped:  # a BatchNorm's version promises its counter, see `Checkpoint.with_state_dict`
            if is_counter(key):
                path = key.rpartition(".")[0]
                moved.pop(modules.get(path, path), None)
        state = {**state, "_metadata": ordered_dict(moved)}
    return replace(plain, tree=replaced(plain.tree, plain.root, node.with_mapping(content, state)))


def _renamed_optimizers(
    checkpoint: Checkpoint, names: Mapping[str, str], reshaped: set[str], dropped: Sequence[str]
) -> tuple[Checkpoint, list[str]]:
    """Returns (checkpoint, notes) with the names in optimizer states following the keys.

    ``param_names`` and states keyed by name are renamed; states keyed by position need nothing while every
    parameter stays. What was reshaped or dropped is said.
    """
    found = [
        path for path, node in walk(checkpoint.tree, closed=optimizers.is_optimizer) if optimizers.is_optimizer(node)
    ]
    for path in found:
        node = checkpoint.at(path)
        renamed_node = _renamed_optimizer(node, names)
        if renamed_node is not node:
            checkpoint = replace(checkpoint, tree=replaced(checkpoint.tree, path, renamed_node))
    notes = []
    if found and (reshaped or dropped):
        notes += optimizer_notes(checkpoint)
    return checkpoint, notes


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
