"""Tied weights in formats where names cannot share bytes: Hugging Face's metadata ``{dropped alias: kept name}``.

They are entries of safetensors' ``__metadata__``, or of the index's metadata when sharded. Reading restores a dropped
alias right after the kept name, several in alphabetical order, as JSON maps are written sorted. Where that is another
order than the state_dict's, ckptool's own entry `ORDER`, which other readers ignore, has the positions; another,
`PLAIN`, names the entries that only look like ties: ``{"arch": "conv"}`` beside a tensor ``conv``.
Source: ``huggingface_hub/serialization/_torch.py`` (`save_torch_state_dict`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import islice
from typing import Any, TypeVar

from ckptool.core.tensor import TensorInfo

T = TypeVar("T", list[Any], dict[str, Any])

ORDER = "ckptool.alias_order"
"""Metadata entry: JSON ``{alias: position in the state_dict}``, written only if an alias would otherwise move."""

PLAIN = "ckptool.no_alias"
"""Metadata entry: JSON list of the entries that look like ties and are none."""

RESERVED = frozenset({"format", "total_size", "total_parameters", ORDER, PLAIN})
"""Metadata entries with a meaning of their own: a tensor of such a name is always stored, tied or not."""


def ties(tensors: Mapping[str, TensorInfo]) -> dict[str, str]:
    """Returns {alias: first name} of names for the same elements. Empty tensors never tie."""
    kept: dict[object, str] = {}
    firsts = {name: kept.setdefault(tensor.view, name) for name, tensor in tensors.items() if tensor.numel}
    return {name: first for name, first in firsts.items() if first != name}


def record(tensors: Mapping[str, TensorInfo]) -> dict[str, str]:
    """Returns {dropped alias: kept name} of the ties that metadata can record; the first name of each is kept."""
    return ties({name: tensor for name, tensor in tensors.items() if name not in RESERVED})


def described(tensors: Mapping[str, TensorInfo], aliases: Mapping[str, str]) -> dict[str, str]:
    """Returns the metadata entries for the aliases of `record`: one for each, and `ORDER` where needed."""
    if not aliases or _order((name for name in tensors if name not in aliases), aliases) == list(tensors):
        return dict(aliases)
    positions = {name: position for position, name in enumerate(tensors) if name in aliases}
    return {**aliases, ORDER: json.dumps(positions, ensure_ascii=False, separators=(",", ":"))}


def restored(tensors: dict[str, TensorInfo], metadata: Mapping[str, str]) -> dict[str, TensorInfo]:
    """Returns the tensors with each recorded alias restored at its position, sharing the storage of the kept name."""
    aliases = _recorded(tensors, metadata)
    if not aliases:
        return tensors
    names = _order(tensors, aliases)
    recorded = _parsed(metadata.get(ORDER), dict)
    positions = {alias: place for alias, place in recorded.items() if alias in aliases and type(place) is int}
    if positions:
        names = _moved(names, positions)
    return {name: tensors[name] if name in tensors else replace(tensors[aliases[name]]) for name in names}


def _recorded(stored: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> dict[str, str]:
    """Returns the entries of a file's metadata that record ties: {name that is not stored: stored name}."""
    listed = _parsed(metadata.get(PLAIN), list)
    plain = {name for name in listed if isinstance(name, str)}
    return {
        dropped: kept
        for dropped, kept in metadata.items()
        if kept in stored and dropped not in stored and dropped not in RESERVED and dropped not in plain
    }


def plain(metadata: Mapping[str, str], stored: Mapping[str, TensorInfo]) -> dict[str, str]:
    """Returns a file's metadata without the entries that record ties, which `restored` has applied."""
    records = _recorded(stored, metadata)
    return {name: text for name, text in metadata.items() if name not in records and name not in (ORDER, PLAIN)}


def carried(metadata: Mapping[str, str], stored: Mapping[str, TensorInfo]) -> dict[str, str]:
    """Returns a checkpoint's metadata to be written to a file, with `PLAIN` if entries look like ties.

    Without an index's totals, which are computed for each file.
    """
    found = {name: text for name, text in metadata.items() if name not in RESERVED or name == "format"}
    like = list(_recorded(stored, found))
    return {**found, PLAIN: json.dumps(like, ensure_ascii=False)} if like else found


def clashes(metadata: Mapping[str, str], aliases: Mapping[str, str]) -> list[str]:
    """Returns the aliases that are also names of metadata entries with another value: one map holds both."""
    return [name for name, kept in aliases.items() if metadata.get(name, kept) != kept]


def _parsed(text: str | None, kind: type[T]) -> T:
    """Returns the JSON list or dict of an entry; an empty one if the entry is absent or not valid."""
    try:
        found = json.loads(text or "null")
    except (ValueError, RecursionError):
        return kind()
    return found if isinstance(found, kind) else kind()


def _order(stored: Iterable[str], aliases: Mapping[str, str]) -> list[str]:
    """Returns all names, every alias right after its kept name."""
    behind: dict[str, list[str]] = {}
    for alias in sorted(aliases):
        behind.setdefault(aliases[alias], []).append(alias)
    return [name for kept in stored for name in (kept, *behind.get(kept, ()))]


def _moved(names: list[str], positions: Mapping[str, int]) -> list[str]:
    """Returns the names with those of ``positions`` at these indices, and the others around them in their order."""
    others = iter([name for name in names if name not in positions])
    moved: list[str] = []
    for name in sorted(positions, key=positions.__getitem__):
        moved.extend(islice(others, min(max(positions[name] - len(moved), 0), len(names))))
        moved.append(name)
    return [*moved, *others]
