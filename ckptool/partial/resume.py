"""The optimizer of a training checkpoint, carried over to a changed model: the state of what was kept, and no more.

torch saves an optimizer's state by position, and loads it by position without a word about names: a state that is one
off is loaded too. So positions are given names only where that leaves no doubt, and anything else is refused.
Source: ``Optimizer.state_dict`` and ``load_state_dict`` (torch 2.13).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ckptool.core import modules, optimizers
from ckptool.core.checkpoint import Checkpoint
from ckptool.core.keys import unwrap_all
from ckptool.core.tensor import Derived, Opaque, TensorInfo, copied
from ckptool.core.tree import Path, PyObject, as_mapping, children, key_text, path_text, replaced, walk
from ckptool.errors import UnsupportedError, UsageError, listed
from ckptool.partial import handover

INSTEAD = "--optimizer drop leaves it out"
"""What can be done in every case."""

NAMES = "torch 2.6 and later save names with it if the optimizer was given model.named_parameters()"
"""What would have helped."""


@dataclass(frozen=True, slots=True)
class _Slot:
    """A parameter's place in an optimizer: ``ident`` is what its group calls it, ``names`` those in the state_dict."""

    ident: Any
    group: int
    names: tuple[str, ...]


# --- finding and placing -----------------------------------------------------------------------------------------


def find(checkpoint: Checkpoint) -> list[Path]:
    """Returns the paths of all optimizer states outside the weights, in the file's order."""
    root = checkpoint.root

    def closed(node: Any) -> bool:
        return optimizers.is_optimizer(node) or modules.is_module(node)

    return [
        path
        for path, node in walk(checkpoint.tree, closed=closed)
        if path and optimizers.is_optimizer(node) and not (root and path[: len(root)] == root)
    ]


def without_optimizers(checkpoint: Checkpoint) -> tuple[Checkpoint, list[Path]]:
    """Returns (checkpoint without any optimizer state, the paths they were at)."""
    paths = find(checkpoint)
    for path in reversed(paths):  # from the back, so that positions in lists stay what they are
        checkpoint = replace(checkpoint, tree=_removed(checkpoint, path))
    return checkpoint, paths


def _removed(checkpoint: Checkpoint, path: Path) -> Any:
    *above, last = path
    holder = checkpoint.at(tuple(above))
    mapping = as_mapping(holder)
    made: Any
    if mapping is not None and last in mapping:
        kept = {name: value for name, value in mapping.items() if name != last}
        made = holder.with_mapping(kept, holder.state) if isinstance(holder, PyObject) else kept
    elif isinstance(holder, (list, tuple)) and tuple(above) != checkpoint.root[: len(above)]:
        made = type(holder)(value for at, value in enumerate(holder) if at != last)
    else:  # a list whose positions lead to the weights, or an object whose class may count on the attribute
        return replaced(checkpoint.tree, path, None)
    return replaced(checkpoint.tree, tuple(above), made)


def left_behind(source: Checkpoint, carried: Sequence[Path] = ()) -> list[str]:
    """Returns a line that names what stands beside the source's weights and is not taken; none if nothing does."""
    above = source.root[:-1]
    taken = {path[len(above)] for path in carried if path[: len(above)] == above}
    names = [
        key_text(name)
        for name, _ in (children(source.at(above)) if source.root else ())
        if name != source.root[-1] and name not in taken
    ]
    return [f"not taken from {source.url}: {listed(names, 20)}"] if names else []


def placed(merged: Checkpoint, entries: Mapping[Path, Any]) -> Checkpoint:
    """Returns the checkpoint with optimizer states beside its weights; ``entries`` are by path from that level.

    A bare state_dict becomes ``{"state_dict": ...}`` first. An entry of the same name is replaced.
    Raises: UnsupportedError if the weights do not stand in a dict.
    """
    if not merged.root:
        merged = replace(merged, tree={"state_dict": merged.tree}, root=("state_dict",))
    above = merged.root[:-1]
    beside: dict[Any, Any] = {}
    for path, node in entries.items():
        beside[path[0]] = _grown(beside.get(path[0]), path[1:], node)
    holder = merged.at(above)
    mapping = as_mapping(holder)
    if mapping is None or merged.root[-1] in beside:
        where = path_text(merged.root)
        raise UnsupportedError(
            f"no place for {listed(map(key_text, beside))} beside the weights at {where}", merged.url
        )
    content = {**mapping, **beside}
    made = holder.with_mapping(content, holder.state) if isinstance(holder, PyObject) else content
    return replace(merged, tree=replaced(merged.tree, above, made))


def _grown(node: Any, path: Path, value: Any) -> Any:
    """Returns the containers on the way to an optimizer, without what else they held: lists, or dicts."""
    if not path:
        return value
    if path[0] == len(node or ()) and not isinstance(node, dict):
        return [*(node or ()), _grown(None, path[1:], value)]
    held = dict(enumerate(node)) if isinstance(node, list) else node or {}
    return {**held, path[0]: _grown(held.get(path[0]), path[1:], value)}


# --- carrying ----------------------------------------------------------------------------------------------------


def carried(
    source: Checkpoint,
    target: Checkpoint,
    merged: Checkpoint,
    matches: Mapping[str, str],
    renewed: Mapping[str, str] | None = None,
) -> tuple[Checkpoint, list[str]]:
    """Returns (``merged`` with the source's optimizers beside its weights, notes): `carry`, then `placed`."""
    entries, notes = carry(source, target, matches, renewed)
    made = placed(merged, entries)
    level = made.root[:-1]
    new = [(*level, *path) for path in entries]
    stay = [path_text(path) for path in find(made) if path not in new]
    return made, notes + ([f"stays as it was in {target.url}: {listed(stay)}"] if stay else [])


def carry(
    source: Checkpoint, target: Checkpoint, matches: Mapping[str, str], renewed: Mapping[str, str] | None = None
) -> tuple[dict[Path, Any], list[str]]:
    """Returns ({path from the level of the weights: optimizer state for the target's parameters}, notes).

    ``matches`` are {target key: source key} of the tensors that have the source's values; where shapes differ, and for
    the keys of ``renewed`` (same parameter, other values), the place in a group is kept and the state is not.
    A parameter without state gets a fresh one in its first step, as torch does. All hyper-parameters are the same
    objects. Raises: UsageError where it is in doubt which state is whose.
    """
    paths = find(source)
    if not paths:
        raise UsageError("no optimizer state in it that --optimizer remap could carry", source.url)
    level = len(source.root[:-1])
    entries: dict[Path, Any] = {}
    notes: list[str] = []
    for path in paths:
        where = path_text(path)
        one = _Carrying(source, target, matches, renewed or {}, where, len(paths))
        inner = path[level:] if path[:level] == source.root[:level] else path
        entries[inner] = one.carry(source.at(path))
        notes += one.notes
    return entries, notes + left_behind(source, paths)


class _Carrying:
    """One optimizer on its way to the target."""

    def __init__(
        self,
        source: Checkpoint,
        target: Checkpoint,
        matches: Mapping[str, str],
        renewed: Mapping[str, str],
        where: str,
        optimizers: int,
    ) -> None:
        self.url, self.where, self.optimizers = source.url, where, optimizers
        self.old, self.new = source.state_dict(), target.state_dict()
        self.theirs = [tuple(names) for names in handover.parameters(self.old)]
        self.ours = [tuple(names) for names in handover.parameters(self.new)]
        self.matches, self.renewed = matches, renewed
        self.notes: list[str] = []

    def refuse(self, why: str) -> UsageError:
        return UsageError(f"{self.where}: {why}; {INSTEAD}", self.url)

    def carry(self, node: Any) -> Any:
        """Returns the optimizer's state for the target's parameters."""
        content = as_mapping(node) or {}
        kind, _ = optimizers.describe(content)
        state, groups = as_mapping(content["state"]), content["param_groups"]
        listed_groups = isinstance(groups, list) and all(
            isinstance(group, dict) and isinstance(group.get("params"), list) for group in groups
        )
        if state is None or not listed_groups or not groups:
            raise self.refuse("not the state of an optimizer of torch")
        if kind == "LBFGS":
            raise self.refuse("LBFGS keeps one state for all parameters together, which no other model can use")
        slots = self._slots(groups, state)
        self._check_shapes(slots, state)
        members = self._members(slots, len(groups))
        made_groups, made_state = self._made(groups, state, slots, members)
        made = replaced(node, ("param_groups",), made_groups)
        kept = content["state"]
        if isinstance(kept, PyObject):
            return replaced(made, ("state",), kept.with_mapping(made_state, kept.state))
        return replaced(made, ("state",), made_state)

    def _slots(self, groups: Sequence[Any], state: Mapping[Any, Any]) -> list[_Slot]:
        """Returns whose places they are: by the names a group has, or by counting."""
        idents = [(ident, at) for at, group in enumerate(groups) for ident in group["params"]]
        if {type(ident) for ident, _ in idents} not in ({int}, {str}):
            raise self.refuse("its parameters go neither by position nor by name")
        named: list[Any] = []
        for group in groups:
            found = group.get("param_names")
            by_key = all(isinstance(ident, str) for ident in group["params"])
            named += group["params"] if by_key else found if isinstance(found, list) else []
        if named and len(named) == len(idents) and all(isinstance(name, str) for name in named):
            return self._by_name(idents, named)
        if len(idents) != len(self.theirs):
            raise self.refuse(
                f"a state of {len(idents)} parameters by position, and the weights have {len(self.theirs)}: which is "
                f"whose cannot be told (some were frozen, or not saved). {NAMES}"
            )
        order = list(range(len(idents)))
        if len(groups) > 1:
            order = self._interleaved(groups, state)
        return [_Slot(ident, at, self.theirs[number]) for (ident, at), number in zip(idents, order, strict=True)]

    def _by_name(self, idents: Sequence[tuple[Any, int]], named: Sequence[str]) -> list[_Slot]:
        plain = unwrap_all(self.old)
        groups = {name: names for names in self.theirs for name in names}
        keys = {name: plain.get(own, own) for own, name in unwrap_all(dict.fromkeys(named)).items()}
        slots = [
            _Slot(ident, at, groups.get(keys[name], (keys[name],)))
            for (ident, at), name in zip(idents, named, strict=True)
        ]
        if not any(slot.names[0] in self.old for slot in slots):
            raise self.refuse(f"it is of other parameters than the weights: {listed(named, 3)}")
        return slots

    def _interleaved(self, groups: Sequence[Any], state: Mapping[Any, Any]) -> list[int]:
        """Returns the parameter of each place, where groups took them in turn and shapes tell them apart."""
        seen = [[state_shape(state.get(ident)) for ident in group["params"]] for group in groups]
        found = interleaved(seen, [self.old[names[0]].shape for names in self.theirs])
        if found is None:
            raise self.refuse(
                f"{len(groups)} groups of parameters by position, and shapes do not tell which is whose. {NAMES}"
            )
        return found

    def _check_shapes(self, slots: Sequence[_Slot], state: Mapping[Any, Any]) -> None:
        """Refuses a state whose tensors are not of the shapes of the parameters they would belong to."""
        for slot in slots:
            tensor = self.old.get(slot.names[0])
            shape = state_shape(state.get(slot.ident))
            if tensor is None or isinstance(tensor.source, Derived):
                continue
            if shape is not None and shape != tensor.shape:
                raise self.refuse(
                    f"the state of {slot.names[0]} would be {list(shape)}, and the parameter is "
                    f"{list(tensor.shape or ())}: its parameters are in another order, or not one by one"
                )

    def _members(self, slots: Sequence[_Slot], count: int) -> list[list[tuple[tuple[str, ...], _Slot | None]]]:
        """Returns (names in the target, its place in the source) for each parameter of each group, in order."""
        by_key = {name: slot for slot in slots for name in slot.names}
        members: list[list[tuple[tuple[str, ...], _Slot | None]]] = [[] for _ in range(count)]
        known = {name for names in self.theirs for name in names}
        fresh, outside = [], []
        for names in self.ours:
            asked = [self.matches[name] for name in names if name in self.matches]
            asked += [self.renewed[name] for name in names if name in self.renewed]
            slot = next((by_key[key] for key in asked if key in by_key), None)
            if slot is not None:
                members[slot.group].append((names, slot))
            elif any(key in known for key in asked):
                outside.append(names[0])
            else:
                fresh.append(names[0])
                members[0].append((names, None))
        if fresh and (count > 1 or self.optimizers > 1):
            some = f"{count} groups" if count > 1 else f"{self.optimizers} optimizers"
            raise self.refuse(
                f"new parameters, and {some} they could join: {listed(fresh)}. Carry it into the model without them, "
                "and let add_param_group add them in training"
            )
        if not any(slot for group in members for _, slot in group):
            raise self.refuse("no parameter of the target is among its own")
        self._check_order(slots, members, bool(fresh))
        if outside:
            self.notes.append(f"{self.where}: not among its parameters before, nor now: {listed(outside)}")
        met = {id(slot) for group in members for _, slot in group}
        gone = [slot.names[0] for slot in slots if id(slot) not in met]
        if gone:
            self.notes.append(f"{self.where}: gone with their parameters: {listed(gone)}")
        return members

    def _check_order(self, slots: Sequence[_Slot], members: list[list[Any]], fresh: bool) -> None:
        """Sees to it that positions are those that the target's training script will give.

        A script that walked through the source's model in order will do so with the target's. One that took
        parameters in an order of its own (names tell) keeps that order.
        """
        if all(isinstance(slot.ident, str) for slot in slots):
            return
        at = {names: number for number, names in enumerate(self.theirs)}
        walks = [[at[slot.names] for _, slot in held if slot is not None and slot.names in at] for held in members]
        if any(walk != sorted(walk) for walk in walks) and handover.in_name_order([names[0] for names in self.ours]):
            raise self.refuse(
                "it goes by position, and the target's keys are in alphabetical order, which is not the model's: "
                "take a target that torch saved"
            )
        for group, held in enumerate(members):
            mine = [slot for slot in slots if slot.group == group and slot.names in at]
            order = [at[slot.names] for slot in mine]
            if order == sorted(order):
                continue
            if fresh:
                raise self.refuse("its parameters are in an order of their own, in which new ones have no place")
            rank = {id(slot): number for number, slot in enumerate(mine)}
            held.sort(key=lambda member: rank[id(member[1])])

    def _made(
        self, groups: Sequence[Any], state: Mapping[Any, Any], slots: Sequence[_Slot], members: Sequence[Sequence[Any]]
    ) -> tuple[list[Any], dict[Any, Any]]:
        """Returns the groups and the state under the target's positions, or names."""
        by_key = all(isinstance(slot.ident, str) for slot in slots)
        made_groups: list[Any] = []
        made_state: dict[Any, Any] = {}
        used: set[int] = set()
        bare: list[str] = []
        count = 0
        for number, (group, held) in enumerate(zip(groups, members, strict=True)):
            idents: list[Any] = []
            for names, slot in held:
                idents.append(names[0] if by_key else count)
                count += 1
                if slot is None or not self._fits(names, slot):
                    bare.append(names[0])
                elif slot.ident in state:
                    # Weights that are tied no more need a state each: torch changes it in place.
                    found = state[slot.ident]
                    made_state[idents[-1]] = _own(found) if id(slot) in used else found
                    used.add(id(slot))
            new = {"params": idents, "param_names": [names[0] for names, _ in held]}
            made_groups.append({name: new.get(name, value) for name, value in group.items()})
            if group["params"] and not idents:
                self.notes.append(f"{self.where}: group {number} has no parameter left")
        told = [f"{self.where}: the state of {len(made_state)} of {count} parameters is carried"]
        if bare:
            told.append(f"{self.where}: begins afresh for {listed(bare)}")
        self.notes[:0] = told
        known = {slot.ident for slot in slots}
        made_state.update({key: value for key, value in state.items() if key not in known})  # of no parameter
        return made_groups, made_state

    def _fits(self, names: Sequence[str], slot: _Slot) -> bool:
        """Returns whether a parameter has the source's values, element for element where the state has them."""
        for name in names:
            key = self.matches.get(name)
            if key in slot.names and self.new[name].shape == self.old[key].shape:
                return not isinstance(self.old[key].source, Derived)  # transposed by rules, and its state is not
        return False


def _own(entry: Any) -> Any:
    """Returns a parameter's state with its tensors in memory of their own."""
    made = entry
    for name, value in (as_mapping(entry) or {}).items():
        if isinstance(value, TensorInfo) and not isinstance(value.source, Opaque):
            made = replaced(made, (name,), copied(value))
    return made


# --- whose an optimizer's states are -------------------------------------------------------------------------------

Shape = tuple[int, ...]

PER_ELEMENT = frozenset({
    "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "momentum_buffer", "square_avg", "acc_delta", "grad_avg",
    "sum", "ax", "prev", "step_size",
})  # fmt: skip
"""Names of the state tensors of torch's optimizers that have their parameter's shape, where they are tensors."""

MAX_WAYS = 2_000
"""Ways to put groups together that are followed at a time; with more of them the shapes say too little anyway."""


def state_shape(entry: Any) -> tuple[int, ...] | None:
    """Returns the shape of the parameter that a state belongs to; None where the state does not say."""
    for name, value in (as_mapping(entry) or {}).items():
        if name in PER_ELEMENT and isinstance(value, TensorInfo):
            return value.shape
    return None


def interleaved(groups: Sequence[Sequence[Shape | None]], whole: Sequence[Shape | None]) -> list[int] | None:
    """Returns the position in ``whole`` of each place of the groups; None unless there is exactly one way.

    Each group is a part of ``whole`` in its order, all of them together are ``whole``; None among a group's shapes
    stands for any. Groups by position are like that: decay and no decay, backbone and head.

    >>> interleaved([[(2, 2), (3, 2)], [(2,), (3,)]], [(2, 2), (2,), (3, 2), (3,)])
    [0, 2, 1, 3]
    """
    # For each step: how far every group has got -> (ways to get there, the group that was taken last).
    steps: list[dict[tuple[int, ...], tuple[int, int]]] = [{(0,) * len(groups): (1, -1)}]
    for shape in whole:
        after: dict[tuple[int, ...], tuple[int, int]] = {}
        for reached, (ways, _) in steps[-1].items():
            for at, group in enumerate(groups):
                if reached[at] < len(group) and group[reached[at]] in (shape, None):
                    nearer = (*reached[:at], reached[at] + 1, *reached[at + 1 :])
                    after[nearer] = (ways + after.get(nearer, (0, 0))[0], at)
        if len(after) > MAX_WAYS:
            return None
        steps.append(after)
    reached = tuple(map(len, groups))
    if steps[-1].get(reached, (0, 0))[0] != 1:
        return None
    found: list[list[int]] = [[] for _ in groups]
    for number in reversed(range(len(whole))):
        at = steps[number + 1][reached][1]
        found[at].insert(0, number)
        reached = (*reached[:at], reached[at] - 1, *reached[at + 1 :])
    return [number for group in found for number in group]
