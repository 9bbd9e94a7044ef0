"""``_metadata``, the modules' versions on a state_dict: read, written, and carried along when keys move or go."""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Mapping
from typing import Any, NamedTuple

from ckptool.core import modules
from ckptool.core.keys import is_counter
from ckptool.core.tree import PyObject, as_mapping, ordered_dict
from ckptool.limits import MAX_MODULE_DEPTH

Moves = dict[str, list[str]]
"""{module's path: its new paths}: more than one where a module was taken apart."""


class Moved(NamedTuple):
    """New versions, and what a map file needs to bring the old ones back.

    ``paths``: {old path: the new paths that have its entry}, all old ones in their order. ``lost``: {old path: its
    entry} where no new path has it, as far as JSON can hold it.
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
    """Returns a state_dict's state with ``_metadata`` fit for the keys that are left.

    BatchNorm's version 2 promises a ``num_batches_tracked``; where that key was dropped the module's entry
    goes too, or a strict `load_state_dict` would call it missing.
    """
    versions = versions_of(node)
    gone = {key.rpartition(".")[0] for key in old if is_counter(key) and key not in new} if versions else set()
    if not versions or not gone & versions.keys():
        return node.state
    return with_versions(node.state, {name: entry for name, entry in versions.items() if name not in gone})


def moved(versions: Mapping[Any, Any], pairs: Iterable[tuple[str, str]]) -> Moved:
    """Returns the versions under the modules' new names, where ``pairs`` are (old key, new key) of all that is left.

    A module goes where its keys went; one without keys stays below the module above it. Where two modules become
    one, the one that came with its keys gives the entry. Order is the old one.
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
    """Returns the versions that a map recorded (`Moved.paths`, `Moved.lost`), brought back from what is there now."""
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
    """Returns whether an entry is a dict of plain values, which JSON gives back as they were."""
    return (
        type(entry) is dict
        and all(type(name) is str for name in entry)
        and all(
            value is None or type(value) in (bool, int, str) or (type(value) is float and math.isfinite(value))
            for value in entry.values()
        )
    )


def _found(path: str, known: Mapping[str, list[str]]) -> tuple[int, list[str]]:
    """Returns (how sure that is: 0 by its keys, 1 by the module above, 2 not at all; the new paths of a module)."""
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
    """Returns where the keys of modules went, and of the modules above them, as far as the names below are the same.

    ``layers.0.fc.weight`` to ``h.0.fc.weight`` says it of ``layers.0.fc`` and ``layers.0``, and of ``layers``; that
    ``layers`` is ``h`` now says that the module above it has stayed. Where only the last name differs, it says so of
    its own module alone, and less surely.
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
