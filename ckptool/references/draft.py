"""The draft of a schema, from a checkpoint: rules that it meets, and one with other keys, shapes or dtypes does not."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from math import prod

from ckptool.core.keys import number_ranges
from ckptool.core.tensor import TensorInfo

_NUMBER = re.compile(r"(?<![^.])(0|[1-9]\d{0,8})(?![^.])", re.ASCII)
_PLAIN = re.compile(r"[^*?\[\]{}\ud800-\udfff]*")

NAMED = 3
"""Rules that must have a size for it to get a name."""


def text(tensors: Mapping[str, TensorInfo], *, whole: bool) -> str:
    """Returns a schema of these tensors; ``whole``: they are all of the checkpoint's, which has no other keys then.

    Numbers that are whole segments become captures where the keys of all their combinations have one shape and dtype.
    The size that most shapes have, in a third of them at least, is named ``width``.
    """
    rules = [(keys, tensors[keys[0]]) for keys in _groups(tensors)]
    sizes = Counter(size for _, one in rules for size in {*(one.shape or ())} if size > 1)
    width, times = max(sizes.items(), key=lambda item: (item[1], item[0]), default=(0, 0))
    named = times >= max(NAMED, len(rules) / 3)
    lines = ["schema = 1", *([] if whole else ["unlisted = true"])]
    lines += ["", "[sizes]", f"width = {width}"] if named else []
    lines += ["", "[keys]"]
    for keys, tensor in rules:
        pattern, numbers = _pattern(keys)
        fields = []
        if tensor.shape is not None:
            shown = ('"width"' if named and size == width else str(size) for size in tensor.shape)
            fields.append(f"shape = [{', '.join(shown)}]")
        fields.append(f'dtype = "{tensor.dtype}"')
        fields += [f'{name} = "{ranges}"' for name, ranges in numbers.items()]
        fields += [f"count = {len(keys)}"] if numbers else []
        lines.append(f"{_quoted(pattern)} = {{ {', '.join(fields)} }}")
    return "\n".join(lines) + "\n"


def _groups(tensors: Mapping[str, TensorInfo]) -> list[list[str]]:
    """Returns the keys in groups that one rule can stand for, in the order of their first keys."""
    frames: dict[tuple[str, ...], dict[str, list[str]]] = {}
    order: dict[str, int] = {}
    for key in tensors:
        order[key] = len(order)
        pieces = _NUMBER.split(key)
        frames.setdefault(tuple(pieces[::2]), {})[key] = pieces[1::2]
    groups = (group for numbers in frames.values() for group in _split(numbers, 0, tensors))
    return sorted(groups, key=lambda group: order[group[0]])


def _split(numbers: Mapping[str, list[str]], fixed: int, tensors: Mapping[str, TensorInfo]) -> Iterator[list[str]]:
    """Yields groups of keys that differ in ``numbers`` from the ``fixed``-th on; all combinations are in a group."""
    keys = list(numbers)
    if len(keys) == 1:
        yield keys
        return
    columns = [{*column} for column in list(zip(*numbers.values(), strict=True))[fixed:]]
    forms = {(tensors[key].shape, tensors[key].dtype) for key in keys}
    if len(forms) == 1 and prod(map(len, columns)) == len(keys) and _PLAIN.fullmatch(keys[0]):
        yield keys
        return
    by_number: dict[str, dict[str, list[str]]] = {}
    for key, row in numbers.items():
        by_number.setdefault(row[fixed], {})[key] = row
    for group in by_number.values():
        yield from _split(group, fixed + 1, tensors)


def _pattern(keys: list[str]) -> tuple[str, dict[str, str]]:
    """Returns the pattern of a group of keys, and {capture: its numbers}."""
    if not _PLAIN.fullmatch(keys[0]) or keys[0].startswith("re:"):
        return f"re:\\A{_escaped(keys[0])}\\Z", {}
    if len(keys) == 1:
        return keys[0], {}
    pieces = _NUMBER.split(keys[0])
    columns = [sorted({*map(int, column)}) for column in zip(*(_NUMBER.split(key)[1::2] for key in keys), strict=True)]
    free = iter("ijklmnopqrstuvwxyz")
    numbers: dict[str, str] = {}
    for at, column in enumerate(columns):
        if len(column) > 1:
            name = next(free, f"n{at}")
            numbers[name] = number_ranges(column).strip("{}")
            pieces[2 * at + 1] = f"{{{name}}}"
    return "".join(pieces), numbers


def _escaped(key: str) -> str:
    """Returns the regular expression for a key; surrogates, which TOML cannot hold, are spelled out."""
    return "".join(f"\\u{ord(one):04x}" if "\ud800" <= one <= "\udfff" else re.escape(one) for one in key)


def _quoted(pattern: str) -> str:
    return json.dumps(pattern, ensure_ascii=False).replace("\x7f", "\\u007f")
