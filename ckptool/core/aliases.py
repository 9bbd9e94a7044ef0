"""Tied weights in formats that store each name's bytes once: Hugging Face's record ``{dropped alias: kept name}``.

It stands in safetensors' ``__metadata__``, or in the index's metadata when sharded. A dropped alias comes back
behind the name that was kept, several of one name in alphabetical order, as JSON maps are written sorted. Where
that is not where they stood, a record of ours that other readers ignore, `ORDER`, has their positions; another,
`PLAIN`, names the entries that only read like records of ties: ``{"arch": "conv"}`` beside a tensor ``conv``.
Source: ``huggingface_hub/serialization/_torch.py`` (`save_torch_state_dict`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import islice

from ckptool.core.tensor import TensorInfo

ORDER = "ckptool.alias_order"
"""Name in the metadata of JSON ``{alias: position in the state_dict}``; there only if an alias would else move."""

PLAIN = "ckptool.no_alias"
"""Name in the metadata of a JSON list of entries that read like a record of a tie and are none."""

RESERVED = frozenset({"format", "total_size", "total_parameters", ORDER, PLAIN})
"""Names in the metadata that mean something else: a tensor of such a name is stored, tied or not."""


def ties(tensors: Mapping[str, TensorInfo]) -> dict[str, str]:
    """Returns {alias: first name} of names for the same elements. Empty tensors never tie."""
    kept: dict[object, str] = {}
    firsts = {name: kept.setdefault(tensor.view, name) for name, tensor in tensors.items() if tensor.numel}
    return {name: first for name, first in firsts.items() if first != name}


def record(tensors: Mapping[str, TensorInfo]) -> dict[str, str]:
    """Returns {dropped alias: kept name} of what can be recorded: of names for the same elements the first is kept."""
    return ties({name: tensor for name, tensor in tensors.items() if name not in RESERVED})


def described(tensors: Mapping[str, TensorInfo], aliases: Mapping[str, str]) -> dict[str, str]:
    """Returns what the metadata says of the aliases that `record` found: each of them, and `ORDER` where needed."""
    if not aliases or _order((name for name in tensors if name not in aliases), aliases) == list(tensors):
        return dict(aliases)
    positions = {name: position for position, name in enumerate(tensors) if name in aliases}
    return {**aliases, ORDER: json.dumps(positions, ensure_ascii=False, separators=(",", ":"))}


def restored(tensors: dict[str, TensorInfo], metadata: Mapping[str, str]) -> dict[str, TensorInfo]:
    """Returns the tensors with each recorded alias put back where it stood, on the storage of the kept name."""
    aliases = _recorded(tensors, metadata)
    if not aliases:
        return tensors
    names = _order(tensors, aliases)
    positions = _positions(metadata.get(ORDER), aliases)
    if positions:
        names = _moved(names, positions)
    return {name: tensors[name] if name in tensors else replace(tensors[aliases[name]]) for name in names}


def _recorded(stored: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> dict[str, str]:
    """Returns the entries of a file's metadata that are records of ties: {name that is not stored: stored name}."""
    plain = _names(metadata.get(PLAIN))
    return {
        dropped: kept
        for dropped, kept in metadata.items()
        if kept in stored and dropped not in stored and dropped not in RESERVED and dropped not in plain
    }


def plain(metadata: Mapping[str, str], stored: Mapping[str, TensorInfo]) -> dict[str, str]:
    """Returns a file's metadata without the records of ties: what they said, `restored` has put into the tensors."""
    records = _recorded(stored, metadata)
    return {name: text for name, text in metadata.items() if name not in records and name not in (ORDER, PLAIN)}


def carried(metadata: Mapping[str, str], stored: Mapping[str, TensorInfo]) -> dict[str, str]:
    """Returns what a file gets of a checkpoint's metadata; where an entry reads like a tie, `PLAIN` says it is none.

    An index's totals stay behind: they are made anew.
    """
    found = {name: text for name, text in metadata.items() if name not in RESERVED or name == "format"}
    like = list(_recorded(stored, found))
    return {**found, PLAIN: json.dumps(like, ensure_ascii=False)} if like else found


def clashes(metadata: Mapping[str, str], aliases: Mapping[str, str]) -> list[str]:
    """Returns the names for which the metadata and a record of a tie say different things: one map holds the two."""
    return [name for name, kept in aliases.items() if metadata.get(name, kept) != kept]


def _names(record: str | None) -> set[str]:
    """Returns the names that `PLAIN` lists; none where it says nothing that can be understood."""
    try:
        found = json.loads(record or "[]")
    except (ValueError, RecursionError):
        return set()
    return {name for name in found if isinstance(name, str)} if isinstance(found, list) else set()


def _order(stored: Iterable[str], aliases: Mapping[str, str]) -> list[str]:
    """Returns all names, every alias behind the name that was kept for it."""
    behind: dict[str, list[str]] = {}
    for alias in sorted(aliases):
        behind.setdefault(aliases[alias], []).append(alias)
    return [name for kept in stored for name in (kept, *behind.get(kept, ()))]


def _positions(record: str | None, aliases: Mapping[str, str]) -> dict[str, int]:
    """Returns {alias: position} as `ORDER` says; {} where it says nothing that can be understood: it is order only."""
    try:
        found = json.loads(record or "{}")
    except (ValueError, RecursionError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {alias: position for alias, position in found.items() if alias in aliases and type(position) is int}


def _moved(names: list[str], positions: Mapping[str, int]) -> list[str]:
    """Returns the names with those of ``positions`` at their places, the others in their order around them."""
    others = iter([name for name in names if name not in positions])
    moved: list[str] = []
    for name in sorted(positions, key=positions.__getitem__):
        moved.extend(islice(others, min(max(positions[name] - len(moved), 0), len(names))))
        moved.append(name)
    return [*moved, *others]
