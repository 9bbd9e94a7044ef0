"""Optimizer state of a training checkpoint, carried over to a changed model (`--optimizer remap`, `drop`).

torch saves and loads an optimizer's state by position and does not check names: a state that is off by one is loaded
too. Positions are therefore mapped to names only where there is one possibility; else the state is refused.
Source: ``Optimizer.state_dict`` and ``load_state_dict`` (torch 2.13).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ckptool.core import optimizers
from ckptool.core.checkpoint import Checkpoint
from ckptool.core.keys import looking_through
from ckptool.core.tensor import Derived, Opaque, TensorInfo, copied
from ckptool.core.tree import Path, as_mapping, children, key_text, path_text, replaced, with_content
from ckptool.errors import UnsupportedError, UsageError, listed
from ckptool.ops.notes import optimizer_paths
from ckptool.partial import handover

INSTEAD = "--optimizer drop leaves it out"
"""The way out of every refusal."""

NAMES = "torch 2.6 and later save names with it if the optimizer was given model.named_parameters()"
"""How to avoid the refusal in future checkpoints."""


@dataclass(frozen=True, slots=True)
class _Slot:
    """A parameter of an optimizer: ``ident`` is its position or name in the group, ``names`` its state_dict keys."""

    ident: Any
    group: int
    names: tuple[str, ...]


# --- in the checkpoint's tree ------------------------------------------------------------------------------------


def left_behind(source: Checkpoint, carried: Sequence[Path] = ()) -> list[str]:
    """Returns a note that lists the entries beside the source's weights that are not taken; [] if there are none."""
    above = source.root[:-1]
    taken = {path[len(above)] for path in carried if path[: len(above)] == above}
    names = [
        key_text(name)
        for name, _ in (children(source.at(above)) if source.root else ())
        if name != source.root[-1] and name not in taken
    ]
    return [f"not taken from {source.url}: {', '.join(names)}"] if names else []


def placed(merged: Checkpoint, entries: Mapping[Path, Any]) -> Checkpoint:
    """Returns the checkpoint with optimizer states beside its weights: {path from that level: state}.

    A bare state_dict becomes ``{"state_dict": ...}`` first. An entry of the same name is replaced.
    Raises: UnsupportedError if the weights are not in a dict.
    """
    if not merged.root:
        merged = replace(merged, tree={"state_dict": merged.tree}, root=("state_dict",))
    above = merged.root[:-1]
    beside: dict[Any, Any] = {}
    for path, node in entries.items():
        beside[path[0]] = _grown(beside.get(path[0]), path[1:], node)
    parent = merged.at(above)
    mapping = as_mapping(parent)
    if mapping is None or merged.root[-1] in beside:
        where = path_text(merged.root)
        raise UnsupportedError(
            f"cannot add {listed(map(key_text, beside))} beside the weights at {where}: not a dict, or the same name",
            merged.url,
        )
    return replace(merged, tree=replaced(merged.tree, above, with_content(parent, {**mapping, **beside})))


def _grown(node: Any, path: Path, value: Any) -> Any:
    """Returns ``node`` (None: nothing yet) with ``value`` at ``path``; new containers are lists or dicts."""
    if not path:
        return value
    if path[0] == len(node or ()) and not isinstance(node, dict):
        return [*(node or ()), _grown(None, path[1:], value)]
    known = dict(enumerate(node)) if isinstance(node, list) else node or {}
    return {**known, path[0]: _grown(known.get(path[0]), path[1:], value)}


# --- carrying ----------------------------------------------------------------------------------------------------


def carried(
    source: Checkpoint,
    target: Checkpoint,
    merged: Checkpoint,
    matches: Mapping[str, str],
    renewed: Mapping[str, str] | None = None,
) -> tuple[Checkpoint, list[str]]:
    """Returns (``merged`` with the source's optimizers, for the target's parameters, beside its weights; notes).

    ``matches`` is {target key: source key} of the tensors that have the source's values. A parameter of another shape,
    or whose key is in ``renewed`` (same parameter, other values), stays in its group without state; torch makes a new
    state in its first step. Hyperparameters are the same objects. Raises: UsageError if it is unclear which state
    belongs to which parameter.
    """
    paths = optimizer_paths(source)
    if not paths:
        raise UsageError("no optimizer state in it that --optimizer remap could carry", source.url)
    above = source.root[:-1]
    remapping = _Remapping(source, target, matches, renewed or {}, len(paths))
    entries = {path[len(above) :] if path[: len(above)] == above else path: remapping.remapped(path) for path in paths}
    made = placed(merged, entries)
    new = [(*made.root[:-1], *path) for path in entries]
    stay = [path_text(path) for path in optimizer_paths(made) if path not in new]
    notes = remapping.notes + left_behind(source, paths)
    return made, notes + ([f"unchanged from {target.url}: {', '.join(stay)}"] if stay else [])


Member = tuple[tuple[str, ...], _Slot | None]
"""A parameter of the target in a group: its names, and its slot in the source's optimizer if it has one."""


class _Remapping:
    """Maps optimizers from the source's parameters (``old``) to the target's (``new``), one by one."""

    def __init__(
        self,
        source: Checkpoint,
        target: Checkpoint,
        matches: Mapping[str, str],
        renewed: Mapping[str, str],
        optimizers: int,
    ) -> None:
        self.source, self.matches, self.renewed, self.optimizers = source, matches, renewed, optimizers
        self.old, self.new = source.state_dict(), target.state_dict()
        self.old_names = [tuple(names) for names in handover.parameters(self.old)]
        self.new_names = [tuple(names) for names in handover.parameters(self.new)]
        self.where = ""
        self.notes: list[str] = []

    def refuse(self, why: str) -> UsageError:
        return UsageError(f"{self.where}: {why}; {INSTEAD}", self.source.url)

    def note(self, text: str, at: int | None = None) -> None:
        self.notes.insert(len(self.notes) if at is None else at, f"{self.where}: {text}")

    def remapped(self, path: Path) -> Any:
        """Returns the state_dict of the source's optimizer at ``path`` for the target's parameters."""
        self.where, first = path_text(path), len(self.notes)
        node = self.source.at(path)
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
        made_groups, made_state = self._made(groups, state, slots, members, first)
        made = replaced(node, ("param_groups",), made_groups)
        return replaced(made, ("state",), with_content(content["state"], made_state))

    def _slots(self, groups: Sequence[Any], state: Mapping[Any, Any]) -> list[_Slot]:
        """Returns the optimizer's parameters in its order: by the names that its groups give, else by position."""
        idents = [(ident, at) for at, group in enumerate(groups) for ident in group["params"]]
        if {type(ident) for ident, _ in idents} not in ({int}, {str}):
            raise self.refuse("its parameters go neither by position nor by name")
        named: list[Any] = []
        for group in groups:
            given = group.get("param_names")
            by_key = all(isinstance(ident, str) for ident in group["params"])
            named += group["params"] if by_key else given if isinstance(given, list) else []
        if named and len(named) == len(idents) and all(isinstance(name, str) for name in named):
            return self._by_name(idents, named)
        if len(idents) != len(self.old_names):
            raise self.refuse(
                f"a state of {len(idents)} parameters by position, and the weights have {len(self.old_names)}: it is "
                f"unclear which state is whose (some were frozen, or not saved). {NAMES}"
            )
        order: list[int] | None = list(range(len(idents)))
        if len(groups) > 1:
            shapes = [[state_shape(state.get(ident)) for ident in group["params"]] for group in groups]
            order = interleaved(shapes, [self.old[names[0]].shape for names in self.old_names])
        if order is None:
            raise self.refuse(
                f"{len(groups)} groups of parameters by position, and shapes do not tell which is whose. {NAMES}"
            )
        return [_Slot(ident, at, self.old_names[number]) for (ident, at), number in zip(idents, order, strict=True)]

    def _by_name(self, idents: Sequence[tuple[Any, int]], named: Sequence[str]) -> list[_Slot]:
        plain = looking_through(self.old, set(named))
        own = {plain(key): key for key in self.old}
        groups = {name: names for names in self.old_names for name in names}
        keys = {name: own.get(plain(name), plain(name)) for name in named}
        slots = [
            _Slot(ident, at, groups.get(keys[name], (keys[name],)))
            for (ident, at), name in zip(idents, named, strict=True)
        ]
        if not any(slot.names[0] in self.old for slot in slots):
            raise self.refuse(f"it is of other parameters than the weights: {listed(named, 3)}")
        return slots

    def _check_shapes(self, slots: Sequence[_Slot], state: Mapping[Any, Any]) -> None:
        """Refuses a state whose tensors do not have the shapes of their parameters."""
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

    def _members(self, slots: Sequence[_Slot], count: int) -> list[list[Member]]:
        """Returns the target's parameters in each group, in order."""
        by_key = {name: slot for slot in slots for name in slot.names}
        members: list[list[Member]] = [[] for _ in range(count)]
        known = {name for names in self.old_names for name in names}
        fresh, outside = [], []
        for names in self.new_names:
            keys = [sources[name] for sources in (self.matches, self.renewed) for name in names if name in sources]
            slot = next((by_key[key] for key in keys if key in by_key), None)
            if slot is not None:
                members[slot.group].append((names, slot))
            elif any(key in known for key in keys):
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
        used = {id(slot) for group in members for _, slot in group if slot}
        if not used:
            raise self.refuse("none of its parameters is in the target")
        self._check_order(slots, members, bool(fresh))
        if outside:
            self.note(f"not in the source's optimizer, so not in this one: {', '.join(outside)}")
        dropped = [slot.names[0] for slot in slots if id(slot) not in used]
        if dropped:
            self.note(f"state dropped, no such parameter in the target: {', '.join(dropped)}")
        return members

    def _check_order(self, slots: Sequence[_Slot], members: list[list[Member]], fresh: bool) -> None:
        """Sorts positions into the order in which the target's training script will list the parameters.

        A script that listed the source model's parameters in the model's order will do the same with the target's.
        One that had its own order, which names reveal, is expected to keep that order.
        """
        if all(isinstance(slot.ident, str) for slot in slots):
            return
        at = {names: number for number, names in enumerate(self.old_names)}
        orders = [[at[slot.names] for _, slot in group if slot is not None and slot.names in at] for group in members]
        if any(order != sorted(order) for order in orders) and handover.in_name_order(
            [names[0] for names in self.new_names]
        ):
            raise self.refuse(
                "it goes by position, and the target's keys are in alphabetical order, which is not the model's: "
                "take a target that torch saved"
            )
        for number, group in enumerate(members):
            mine = [slot for slot in slots if slot.group == number and slot.names in at]
            order = [at[slot.names] for slot in mine]
            if order == sorted(order):
                continue
            if fresh:
                raise self.refuse("its parameters are in a custom order, which does not say where new ones go")
            rank = {id(slot): number for number, slot in enumerate(mine)}
            group.sort(key=lambda member: rank[id(member[1])])

    def _made(
        self,
        groups: Sequence[Any],
        state: Mapping[Any, Any],
        slots: Sequence[_Slot],
        members: list[list[Member]],
        first: int,
    ) -> tuple[list[Any], dict[Any, Any]]:
        """Returns the groups and the state under the target's positions, or names."""
        by_key = all(isinstance(slot.ident, str) for slot in slots)
        made_groups: list[Any] = []
        made_state: dict[Any, Any] = {}
        used: set[int] = set()
        fresh: list[str] = []
        count = 0
        for number, (group, kept) in enumerate(zip(groups, members, strict=True)):
            idents: list[Any] = []
            for names, slot in kept:
                idents.append(names[0] if by_key else count)
                count += 1
                if slot is None or not self._fits(names, slot):
                    fresh.append(names[0])
                elif slot.ident in state:
                    # Weights that are no longer tied need a state each: torch updates it in place.
                    entry = state[slot.ident]
                    made_state[idents[-1]] = _copied(entry) if id(slot) in used else entry
                    used.add(id(slot))
            new = {"params": idents, "param_names": [names[0] for names, _ in kept]}
            made_groups.append({name: new.get(name, value) for name, value in group.items()})
            if group["params"] and not idents:
                self.note(f"group {number} has no parameter left")
        self.note(f"the state of {len(made_state)} of {count} parameters is carried", first)
        if fresh:
            self.note(f"starts without state: {', '.join(fresh)}", first + 1)
        known = {slot.ident for slot in slots}
        made_state.update({key: value for key, value in state.items() if key not in known})  # of no parameter
        return made_groups, made_state

    def _fits(self, names: Sequence[str], slot: _Slot) -> bool:
        """Returns whether the state of a slot fits a parameter: same shape, and the values were not rearranged."""
        for name in names:
            key = self.matches.get(name)
            if key in slot.names and self.new[name].shape == self.old[key].shape:
                return not isinstance(self.old[key].source, Derived)  # rules transposed it, but not its state
        return False


def _copied(entry: Any) -> Any:
    """Returns a parameter's state with its tensors in storage of their own."""
    for name, value in (as_mapping(entry) or {}).items():
        if isinstance(value, TensorInfo) and not isinstance(value.source, Opaque):
            entry = replaced(entry, (name,), copied(value))
    return entry


# --- which state belongs to which parameter ------------------------------------------------------------------------

Shape = tuple[int, ...]

PER_ELEMENT = frozenset({
    "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "momentum_buffer", "square_avg", "acc_delta", "grad_avg",
    "sum", "ax", "prev", "step_size",
})  # fmt: skip
"""Names of the state tensors of torch's optimizers that have their parameter's shape, where they are tensors."""

MAX_WAYS = 2_000
"""Most states of `interleaved` at a time: with more, the shapes are too alike to decide anything."""


def state_shape(entry: Any) -> Shape | None:
    """Returns the shape of the parameter that a state belongs to; None if no tensor in it has that shape."""
    for name, value in (as_mapping(entry) or {}).items():
        if name in PER_ELEMENT and isinstance(value, TensorInfo):
            return value.shape
    return None


def interleaved(groups: Sequence[Sequence[Shape | None]], whole: Sequence[Shape | None]) -> list[int] | None:
    """Returns the position in ``whole`` of each member of the groups, or None unless exactly one assignment fits.

    Each group is a subsequence of ``whole``, and together they are all of it; a shape of None in a group fits any.
    Groups by position are like that: decay and no decay, backbone and head.

    >>> interleaved([[(2, 2), (3, 2)], [(2,), (3,)]], [(2, 2), (2,), (3, 2), (3,)])
    [0, 2, 1, 3]
    """
    # {members used of each group: (number of ways to get here, the groups taken from in the last of them, as a chain)}
    reached: dict[Shape, tuple[int, Any]] = {(0,) * len(groups): (1, None)}
    for shape in whole:
        after: dict[Shape, tuple[int, Any]] = {}
        for counts, (ways, chain) in reached.items():
            for at, group in enumerate(groups):
                if counts[at] < len(group) and group[counts[at]] in (shape, None):
                    more = (*counts[:at], counts[at] + 1, *counts[at + 1 :])
                    after[more] = (ways + after.get(more, (0, None))[0], (at, chain))
        if len(after) > MAX_WAYS:
            return None
        reached = after
    ways, chain = reached.get(tuple(map(len, groups)), (0, None))
    if ways != 1:
        return None
    positions: list[list[int]] = [[] for _ in groups]
    for number in reversed(range(len(whole))):
        at, chain = chain
        positions[at].insert(0, number)
    return [number for group in positions for number in group]
