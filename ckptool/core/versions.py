"""``_metadata``, the modules' versions in a state_dict: read, written, and updated as keys are renamed or dropped."""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Mapping
from typing import Any, NamedTuple

from ckptool.core import modules
from ckptool.core.keys import is_counter
from ckptool.core.tree import PyObject, as_mapping, ordered_dict
from ckptool.limits import MAX_MODULE_DEPTH

Moves = dict[str, list[str]]
"""{module's path: its new paths}; several where the module was split."""


class Moved(NamedTuple):
    """New versions, and what a map file needs to restore the old ones.

    ``paths``: {old path: the new paths that have its entry}, for all old paths in order. ``lost``: {old path: its
    entry} where no new path has it and JSON can hold it.
    """

    versions: dict[Any, Any]
    paths: Moves
    lost: dict[str, Any]


def versions_of(node: Any) -> dict[Any, Any] | None:
    """Returns the ``_metadata`` of a state_dict, {module path: {"version": n}}; None for a dict without."""
    state = node.state if isinstance(node, PyObject) else None
    return as_mapping(state.get("_metadata")) if isinstance(state, dict) else None


def with_versions(state: Any, versions: dict[Any, Any]) -> dict[Any, Any]:
    """Returns a state_dict's state with this ``_metadata`` in it."""
    return {**(state or {}), "_metadata": ordered_dict(versions)}


def versioned(mapping: dict[Any, Any], node: Any) -> PyObject:
    """Returns an OrderedDict with the ``_metadata`` of ``node``: a state_dict, or a module that would make one."""
    if modules.is_module(node):
        return ordered_dict(mapping, modules.metadata(node))
    state = getattr(node, "state", None)
    return ordered_dict(mapping, state.get("_metadata") if isinstance(state, dict) else None)


def without_lost_counters(node: Any, old: Iterable[str], new: Container[str]) -> Any:
    """Returns a state_dict's state with ``_metadata`` corrected for dropped keys.

    BatchNorm's version 2 promises a ``num_batches_tracked``; where that key was dropped the module's entry is
    dropped too, or a strict `load_state_dict` would report the key as missing.
    """
    versions = versions_of(node)
    gone = {key.rpartition(".")[0] for key in old if is_counter(key) and key not in new} if versions else set()
    if not versions or not gone & versions.keys():
        return node.state
    return with_versions(node.state, {name: entry for name, entry in versions.items() if name not in gone})


def moved(versions: Mapping[Any, Any], pairs: Iterable[tuple[str, str]]) -> Moved:
    """Returns the versions under the modules' new paths; ``pairs`` are (old key, new key) of all remaining keys.

    A module moves with its keys; one without keys moves with its parent. Where two modules become one, the entry is
    that of the one that moved with its keys. The order is the old one.
    """
    known = _moves(pairs)
    ranks: tuple[Moves, Moves, Moves] = ({}, {}, {})
    for path in versions:
        if isinstance(path, str):
            rank, found = _found(path, known)
            ranks[rank][path] = found
    winners: dict[str, str] = {}
    for moves in ranks:
        for path, found in moves.items():
            for new in found:
                winners.setdefault(new, path)
    made: dict[Any, Any] = {}
    for path in versions:
        moves = next((moves for moves in ranks if path in moves), {})
        made.update((new, versions[winners[new]]) for new in moves.get(path, ()) if new not in made)
        if not isinstance(path, str):
            made[path] = versions[path]
    return _recorded(versions, made, winners)


def restored(versions: Mapping[Any, Any], paths: Moves, lost: Mapping[str, Any]) -> Moved:
    """Returns the old versions, from the current ones and those that a map recorded (`Moved.paths`, `Moved.lost`)."""
    made: dict[Any, Any] = {}
    origin: dict[str, str] = {}
    for old, found in paths.items():
        new = next((path for path in found if path in versions), None)
        if new is not None:
            made[old], origin[old] = versions[new], new
        elif not found and old in lost:
            made[old] = lost[old]
    claimed = {path for found in paths.values() for path in found}
    for path, entry in versions.items():
        if path not in claimed and path not in made:
            made[path] = entry
            if isinstance(path, str):
                origin[path] = path
    return _recorded(versions, made, origin)


def _recorded(versions: Mapping[Any, Any], made: dict[Any, Any], origin: Mapping[str, str]) -> Moved:
    paths: Moves = {path: [] for path in versions if isinstance(path, str)}
    for new, old in origin.items():
        paths[old].append(new)
    lost = {path: versions[path] for path, found in paths.items() if not found and is_entry(versions[path])}
    return Moved(made, paths, lost)


def is_entry(entry: Any) -> bool:
    """Returns whether an entry is a dict of plain values, which JSON keeps exactly."""
    return (
        type(entry) is dict
        and all(type(name) is str for name in entry)
        and all(
            value is None or type(value) in (bool, int, str) or (type(value) is float and math.isfinite(value))
            for value in entry.values()
        )
    )


def _found(path: str, known: Mapping[str, list[str]]) -> tuple[int, list[str]]:
    """Returns (rank, new paths) of a module. Ranks: 0 by its own keys, 1 by its nearest known parent, 2 unknown."""
    if path in known:
        return 0, known[path]
    above, rest, deepest = path, "", MAX_MODULE_DEPTH.now()
    while above and rest.count(".") < deepest:
        above, _, last = above.rpartition(".")
        rest = f"{last}.{rest}" if rest else last
        if above in known:
            new = known[above]
            return (1, [f"{new[0]}.{rest}" if new[0] else rest]) if len(new) == 1 else (2, [path])
    return 2, [path]


def _moves(pairs: Iterable[tuple[str, str]]) -> Moves:
    """Returns the new paths of modules whose keys were renamed, and of their parents while the names below are equal.

    ``layers.0.fc.weight`` to ``h.0.fc.weight`` moves ``layers.0.fc``, ``layers.0`` and ``layers``; the parent of
    ``layers`` stays, as it also is the parent of ``h``. Where the last names of the keys differ too, that only moves
    their own module, and only if nothing else does.
    """
    sure: dict[tuple[str, str], None] = {}
    unsure: dict[tuple[str, str], None] = {}
    for old, new in pairs:
        above_old, _, leaf = old.rpartition(".")
        above_new, _, new_leaf = new.rpartition(".")
        (sure if leaf == new_leaf or above_old == above_new else unsure)[above_old, above_new] = None
    deepest = MAX_MODULE_DEPTH.now()
    trail = [pair for pair in sure if pair[0].count(".") < deepest]
    while trail:
        old, new = trail.pop()
        above_old, _, leaf = old.rpartition(".")
        above_new, _, new_leaf = new.rpartition(".")
        pair = above_old, above_new
        if old and new and (leaf == new_leaf or above_old == above_new) and pair not in sure:
            sure[pair] = None
            trail.append(pair)
    known: Moves = {}
    for old, new in sure:
        known.setdefault(old, []).append(new)
    guesses: Moves = {}
    for old, new in unsure:
        guesses.setdefault(old, []).append(new)
    known.update((old, found) for old, found in guesses.items() if old not in known and len(found) == 1)
    return {old: [old] if old in found else found for old, found in known.items()}
