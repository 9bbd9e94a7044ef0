"""Names of tensors in metadata: the records of tied weights, and entries that follow a rename.

Formats where names cannot share bytes record ties as Hugging Face does, ``{dropped alias: kept name}``, in safetensors'
``__metadata__``, or in the index's metadata when sharded. Reading restores a dropped alias right after the kept name,
several in alphabetical order, as JSON maps are written sorted. Where that is another order than the state_dict's,
ckptool's own entry `ORDER`, which other readers ignore, has the positions. An entry is a record if it was written as
one: `ORDER` lists it, or both names have a dot, or both end in the same name. ``{"base_model": "unet"}`` is text.
`PLAIN` names the entries that only look like ties.
Source: ``huggingface_hub/serialization/_torch.py`` (`save_torch_state_dict`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import islice
from typing import Any, TypeVar

from ckptool.core.tensor import TensorInfo
from ckptool.errors import listed

T = TypeVar("T", list[Any], dict[str, Any])

Fates = dict[str, list[str] | None]
"""{old key: its new keys; none if it was dropped; None if it is no more and other tensors were made of it}."""

ORDER = "ckptool.alias_order"
"""Metadata entry: JSON ``{name: position in the state_dict}`` of names that would otherwise move, or be text."""

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
    clear = all(_looks_tied(dropped, kept) for dropped, kept in aliases.items())
    if clear and _order((name for name in tensors if name not in aliases), aliases) == list(tensors):
        return dict(aliases)
    return {**aliases, **ordered(tensors, aliases)}


def ordered(tensors: Iterable[str], moved: Container[str]) -> dict[str, str]:
    """Returns the metadata entry for the positions of these names among the tensors."""
    positions = {name: position for position, name in enumerate(tensors) if name in moved}
    return {ORDER: json.dumps(positions, ensure_ascii=False, separators=(",", ":"))} if positions else {}


def restored(tensors: dict[str, TensorInfo], metadata: Mapping[str, str]) -> dict[str, TensorInfo]:
    """Returns the tensors with each recorded alias restored at its position, sharing the storage of the kept name."""
    aliases, recorded = _recorded(tensors, metadata), _parsed(metadata.get(ORDER), dict)
    if not aliases and not recorded:
        return tensors
    names = _order(tensors, aliases)
    known = {*aliases, *tensors}
    positions = {name: place for name, place in recorded.items() if name in known and type(place) is int}
    if positions:
        names = _moved(names, positions)
    return {name: tensors[name] if name in tensors else replace(tensors[aliases[name]]) for name in names}


def _recorded(stored: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> dict[str, str]:
    """Returns the entries of a file's metadata that record ties: {name that is not stored: stored name}."""
    ordered = _parsed(metadata.get(ORDER), dict)
    return {name: kept for name, kept in _alike(stored, metadata) if name in ordered or _looks_tied(name, kept)}


def _alike(stored: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Yields the entries {name that is not stored: stored name} of a file's metadata, without those of `PLAIN`."""
    plain = {name for name in _parsed(metadata.get(PLAIN), list) if isinstance(name, str)}
    for name, kept in metadata.items():
        if kept in stored and name not in stored and name not in RESERVED and name not in plain:
            yield name, kept


def _looks_tied(dropped: str, kept: str) -> bool:
    """Returns whether an entry reads like a tie that Hugging Face recorded, and not like a text."""
    return ("." in dropped and "." in kept) or dropped.rpartition(".")[2] == kept.rpartition(".")[2]


def doubts(stored: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> tuple[str, ...]:
    """Returns a note if entries whose text is a stored name are not taken for ties."""
    found = dict(_alike(stored, metadata))
    texts = [f"{name}: {found[name]}" for name in found.keys() - _recorded(stored, metadata).keys()]
    what = f"metadata whose text is a key's name, taken for text and not for a tie: {listed(sorted(texts))}"
    return (what,) if texts else ()


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


def joined(first: Mapping[str, str], other: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """Returns (metadata of two shards, names of the other one's entries left out); JSON lists are put together."""
    made, left = {**other, **first}, []
    for name in [name for name, text in other.items() if made[name] != text]:
        one, more = _json(made[name]), _json(other[name])
        if isinstance(one, list) and isinstance(more, list) and {str}.issuperset(map(type, (*one, *more))):
            made[name] = json.dumps([*dict.fromkeys((*one, *more))])
        else:
            left.append(name)
    return made, left


def clashes(metadata: Mapping[str, str], aliases: Mapping[str, str]) -> list[str]:
    """Returns the aliases that are also names of metadata entries with another value: one map holds both."""
    return [name for name, kept in aliases.items() if metadata.get(name, kept) != kept]


def _parsed(text: str | None, kind: type[T]) -> T:
    """Returns the JSON list or dict of an entry; an empty one if the entry is absent or not valid."""
    found = _json(text or "")
    return found if isinstance(found, kind) else kind()


def _json(text: str) -> Any:
    """Returns what a JSON list or object is, None for any other text."""
    try:
        return json.loads(text) if text.lstrip()[:1] in ("[", "{") else None
    except (ValueError, RecursionError):
        return None


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


# --- metadata that names keys, after these were changed ---------------------------------------------------------------


def followed(
    metadata: Mapping[str, str], before: Iterable[str], moves: Iterable[tuple[str, str]], computed: Iterable[str] = ()
) -> tuple[Mapping[str, str], list[str]]:
    """Returns (metadata, notes) with the new keys in place of those ``before``, whose entries go with dropped keys.

    ``moves``: (old key, new key) of the tensors that are what they were; ``computed``: keys that others were made of.
    What follows: an entry that has a key's name, JSON lists of keys, JSON objects whose names are keys. A name may also
    be a module's, or that of a tensor in parts (torchao: ``fc.weight`` of ``fc._weight_qdata``, ``fc._weight_scale``).
    The notes say what followed, what went, and what names an old key and stays as it is. Cost: linear.
    """
    if RESERVED.issuperset(metadata):
        return metadata, []
    new: dict[str, list[str]] = {key: [] for key in before}
    for old, name in moves:
        new[old].append(name)
    fates: Fates = {**new, **{key: None for key in computed if not new[key]}}
    if all(fate == [key] for key, fate in fates.items()):
        return metadata, []
    mentions = {name: _mentions(text) for name, text in metadata.items()}
    wholes = _of_wholes(fates, set(metadata).union(*mentions.values()))
    doubtful = {name for name in wholes if "." not in name}  # a module, or a word such as ``model``?
    fates |= wholes
    pairs = [(name, to) for name in metadata for to in ([name] if name in doubtful else _new_names(name, fates))]
    if len({to for _, to in pairs}) < len(pairs):  # another entry has the new name: none moves
        pairs = [(name, name) for name in metadata]
    texts = dict(metadata)
    moved = [name for name, to in pairs if name != to]
    stale = [name for name, to in pairs if name == to and _is_gone(name, fates)]
    for name in dict.fromkeys(name for name, _ in pairs):
        if fates.keys().isdisjoint(mentions[name]):
            continue
        left, tree = mentions[name] - doubtful, _json(texts[name])
        if tree is not None:
            changed, others = _renamed(tree, fates, doubtful)
            left = set().union(*map(_mentions, others))
            if changed:
                moved.append(name)
                texts[name] = json.dumps(tree)
        stale += [name] if any(_is_gone(one, fates) for one in left) else []
    dropped = metadata.keys() - {name for name, _ in pairs}
    notes = {"follows its tensors": moved, "went with its tensors": dropped, "names old keys and stays as it is": stale}
    made = {to: texts[name] for name, to in pairs}
    return made, [f"metadata that {what}: {listed(sorted({*names}))}" for what, names in notes.items() if names]


def _new_names(name: str, fates: Fates) -> list[str]:
    """Returns the new names of an entry: its own, unless it is a key's that was renamed or dropped."""
    fate = None if name in RESERVED else fates.get(name)
    return [name] if fate is None or not RESERVED.isdisjoint(fate) else fate


def _is_gone(name: str, fates: Fates) -> bool:
    """Returns whether a key or module has another name now, or none; what reads like a number is no name."""
    return name in fates and name not in (fates[name] or ()) and not name.replace(".", "").isdigit()


def _mentions(text: str) -> set[str]:
    """Returns what may be names in a text: itself, or the texts of JSON; and the words of several segments in it."""
    texts: Iterable[str] = (text,)
    if text.lstrip()[:1] in ("[", "{"):
        # Parsed for escapes only: torchao has such a text for each weight. Words are the same without the quotes.
        texts = _QUOTED.findall(text) if "\\" not in text else [*_texts(_json(text))] or [text]
        text = "\n".join(texts) if "\\" in text else text
    return {*texts, *(word.strip(".:") for word in _WORDS.findall(text) if "." in word)}


_QUOTED = re.compile('"([^"]*)"')
_WORDS = re.compile(r"[^\s\"',;=()\[\]{}]+")


def _texts(tree: Any) -> Iterator[str]:
    """Yields all texts of JSON, names included."""
    stack = [tree]
    while stack:
        node = stack.pop()
        if isinstance(node, str):
            yield node
        elif isinstance(node, (list, dict)):
            stack.extend(node)
            stack.extend(node.values() if isinstance(node, dict) else ())


def _of_wholes(fates: Fates, known: set[str]) -> Fates:
    """Returns the fates of the ``known`` names that are no keys, but of modules, or of tensors in parts.

    Parts must all go alike; of a module, the keys that are left.
    """
    members: dict[str, list[tuple[str, str]]] = {}
    for key in fates:
        for whole, rest in _wholes(key, known):
            members.setdefault(whole, []).append((key, rest))
    found: Fates = {}
    for whole in members.keys() - fates.keys():
        ways = [_way(whole, fates[key], rest) for key, rest in members[whole]]
        first: list[str] | None = ways[0]
        if all(rest[0] == "." for _, rest in members[whole]) and None not in ways:
            left = [way for way in ways if way]
            first = [name for name in left[0] if all(name in way for way in left)] if left else []
            ways = [first] if first or not left else [None]
        found[whole] = first if all(way == first for way in ways) else None
    return found


def _way(whole: str, fate: list[str] | None, rest: str) -> list[str] | None:
    """Returns the new names of a module or a tensor in parts, as one of its keys tells them; None if it does not."""
    if fate is None:
        return None
    names = [_unscored(to) if rest[0] == "_" else to for to in fate]
    inside = f"{whole}." if rest[0] == "." else None
    found = [
        name.removesuffix(rest) if name.endswith(rest) else whole if inside and name.startswith(inside) else ""
        for name in names
    ]
    return found if all(found) else None


def _wholes(key: str, known: set[str]) -> Iterator[tuple[str, str]]:
    """Yields (name, rest of the key) of those ``known`` modules and tensors that a key is a part of.

    Parts are ``fc.weight:scale``, and ``fc._weight_scale`` with the rest ``_scale``.
    """
    end = key.rfind(".")
    while end > 0:
        if key[:end] in known:
            yield key[:end], key[end:]
        end = key.rfind(".", 0, end)
    tensor, colon, part = key.rpartition(":")
    if colon and tensor in known:
        yield tensor, colon + part
    if plain := _unscored(key):
        start, end = key.rfind(".") + 2, len(plain)
        for _ in range(16):  # bounds the work for a hostile name
            end = plain.rfind("_", start, end)
            if end > 0 and plain[:end] in known:
                yield plain[:end], plain[end:]
            if end < 0 or plain[:end] in known:
                return


def _unscored(key: str) -> str:
    """Returns ``fc.weight_scale`` of ``fc._weight_scale``; "" of a key whose last name has no "_" in front."""
    start = key.rfind(".") + 1
    return key[:start] + key[start + 1 :] if key[start : start + 1] == "_" else ""


def _renamed(tree: Any, fates: Fates, doubtful: set[str]) -> tuple[bool, list[str]]:
    """Renames the keys in the lists and objects of JSON that hold nothing else; returns (whether any, other texts)."""
    changed, left, stack = False, [], [tree]
    while stack:
        node = stack.pop()
        if isinstance(node, str):
            left.append(node)
        if not isinstance(node, (list, dict)):
            continue
        names, values = list(node), []
        new = [fates.get(name) if isinstance(name, str) else None for name in names]
        # {"0": "cat"} are no keys, {"model": "large"} need not be.
        if None in new or all(name.isdigit() or name in doubtful for name in names):
            stack += [*names, *(node.values() if isinstance(node, dict) else ())]
        elif isinstance(node, list):
            node[:] = [to for fate in new for to in fate or ()]
        else:
            for value, fate in zip(list(node.values()), new, strict=True):
                same = fates.get(value) if isinstance(value, str) and value not in doubtful else None
                values.append(same[0] if same and len(same) == 1 else value)
                stack += [value] if fate and values[-1] is value and value else []
            node.clear()
            node.update((to, value) for fate, value in zip(new, values, strict=True) for to in fate or ())
        changed = changed or list(node) != names
    return changed, left
