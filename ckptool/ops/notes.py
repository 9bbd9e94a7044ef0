"""What several operations share: where the weights are, which patterns match nothing, where the optimizers are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from ckptool.core import keys as names
from ckptool.core import modules
from ckptool.core.checkpoint import Checkpoint
from ckptool.core.optimizers import is_optimizer
from ckptool.core.roots import find_root, is_flat
from ckptool.core.tensor import TensorInfo
from ckptool.core.tree import Path, as_mapping, path_text, replaced, walk, with_content
from ckptool.errors import NoTensorsError, UsageError, listed


def require_tensors(checkpoint: Checkpoint) -> dict[str, TensorInfo]:
    """Returns the tensors at root. Raises: NoTensorsError, which says where there are some, if there is none."""
    tensors = checkpoint.state_dict()
    if tensors:
        return tensors
    parents = {path_text(path[:-1]) or "the top" for path, _ in checkpoint.tensors()}
    elsewhere = f"; there are some at {listed(sorted(parents))}" if parents else ""
    raise NoTensorsError(f"no tensors at {path_text(checkpoint.root) or 'the top'}{elsewhere}", checkpoint.url)


def root_notes(checkpoints: Sequence[Checkpoint]) -> list[str]:
    """Returns notes on each checkpoint: where its weights are, if not at the top or not all, and what reading it met.

    That is which of several sets in a directory was read, how shards and index contradict each other, and what follows
    the end of a file.
    """
    several = len({one.url for one in checkpoints}) > 1
    notes: dict[str, None] = {}
    for one in checkpoints:
        for text in (*one.problems, *one.notes):
            notes[f"{one.url}: {text}" if several else text] = None
        if one.trailing:
            notes[f"{one.url}: {one.trailing}"] = None
        found, root = find_root(one.tree), path_text(one.root)
        others = [path_text(path) or "/" for path in found.others if found.path == one.root]
        if root or others:
            more = f"; other places (--root): {listed(others)}" if others else ""
            notes[f"the weights of {one.url} are at {root or 'the top'}{more}"] = None
    return list(notes)


def pattern_notes(patterns: Sequence[str], keys: Iterable[str], option: str = "") -> list[str]:
    """Returns a note on each pattern that matches no key: most likely it is misspelled."""
    return [f"{option}{pattern} fits no key" for pattern in names.unused_patterns(patterns, keys)]


def wrapper_notes(*sides: tuple[str, Iterable[str]]) -> list[str]:
    """Returns notes on the wrapper prefixes ignored in comparing keys, where two ``sides``, (url, keys), differ."""
    prefixes = [(url, names.looked_through(list(keys))) for url, keys in sides]
    if len({prefix for _, prefix in prefixes}) == 1:
        return []
    return [f"looked through {prefix!r} in {url}" for url, prefix in prefixes if prefix]


def changed_lines(report: Any) -> list[list[str]]:
    """Returns (label, text) for each kind of value that casts changed, of a report with the fields of `Changed`."""
    lines = []
    for name, label, what in CHANGES:
        if counts := getattr(report, name):
            each, total = listed((f"{key} ({count:,})" for key, count in counts.items()), 20), sum(counts.values())
            lines.append([label, f"{total:,} value{'s' * (total != 1)} {what}: {each}"])
    return lines


CHANGES = (
    ("overflowed", "overflow", "no longer finite"),
    ("saturated", "saturated", "cut to the largest of the dtype"),
    ("underflowed", "underflow", "zero now"),
)
"""For each field of `Changed`: the label of its line, and what became of the values."""


def optimizer_notes(checkpoint: Checkpoint) -> list[str]:
    """Returns a note if keys were dropped and an optimizer's state, numbered by position, no longer matches them."""
    for path, node in optimizer_states(checkpoint):
        state = as_mapping((as_mapping(node) or {}).get("state"))
        if state and any(isinstance(key, int) for key in state):
            where = path_text(path)
            return [f"{where} goes by position: with keys dropped it no longer lines up with the weights"]
    return []


def optimizer_states(checkpoint: Checkpoint) -> Iterator[tuple[Path, Any]]:
    """Yields (path, node) of the optimizers' state_dicts in the tree."""
    tops: list[tuple[Path, Any]] = [((), checkpoint.tree)]
    weights = checkpoint.at(checkpoint.root)
    if is_flat(weights) and not is_optimizer(weights):  # for speed, 100,000 tensors are not walked over
        content = (as_mapping(weights) or {}).items()
        tops += [((*checkpoint.root, name), value) for name, value in content if not isinstance(value, TensorInfo)]
    else:
        weights = None
    for top, tree in tops:
        for path, node in walk(tree, closed=lambda node: node is weights or is_optimizer(node)):
            if is_optimizer(node):
                yield (*top, *path), node


def optimizer_paths(checkpoint: Checkpoint) -> list[Path]:
    """Returns the paths of all optimizer states outside the weights, in the file's order."""
    root = checkpoint.root
    nodes = walk(checkpoint.tree, closed=lambda node: is_optimizer(node) or modules.is_module(node))
    found = (path for path, node in nodes if path and is_optimizer(node))
    return [path for path in found if not (root and path[: len(root)] == root)]


def without_optimizers(checkpoint: Checkpoint) -> tuple[Checkpoint, list[Path]]:
    """Returns (checkpoint without any optimizer state, the paths they were at)."""
    paths = optimizer_paths(checkpoint)
    for path in reversed(paths):  # from the back, so that positions in lists stay what they are
        checkpoint = replace(checkpoint, tree=_removed(checkpoint, path))
    return checkpoint, paths


def with_optimizers(checkpoint: Checkpoint, wish: str | None) -> tuple[Checkpoint, list[str]]:
    """Returns (checkpoint, notes) with the optimizer states as ``--optimizer`` wishes; None keeps them and notes it.

    Raises: UsageError for another wish than ``keep`` and ``drop``.
    """
    if wish not in (None, "keep", "drop"):
        raise UsageError(f"optimizer is keep or drop, not {wish!r}")
    if wish == "drop":
        checkpoint, paths = without_optimizers(checkpoint)
        return checkpoint, [f"dropped: {path_text(path)}" for path in paths] or ["no optimizer state to drop"]
    notes = []
    for path, node in optimizer_states(checkpoint) if wish is None else ():
        nbytes = sum(value.nbytes for _, value in walk(node) if isinstance(value, TensorInfo))
        if nbytes and path:
            notes.append(f"{path_text(path)}: {nbytes:,} bytes of optimizer state (--optimizer drop leaves it out)")
    return checkpoint, notes


def _removed(checkpoint: Checkpoint, path: Path) -> Any:
    """Returns the tree without the node at ``path``, or with None there if removing it could break something."""
    *above, last = path
    parent = checkpoint.at(tuple(above))
    mapping = as_mapping(parent)
    made: Any
    if mapping is not None and last in mapping:
        made = with_content(parent, {name: value for name, value in mapping.items() if name != last})
    elif isinstance(parent, (list, tuple)) and tuple(above) != checkpoint.root[: len(above)]:
        made = type(parent)(value for at, value in enumerate(parent) if at != last)
    else:  # a list in which the weights would move to another position, or an attribute that its class may need
        return replaced(checkpoint.tree, path, None)
    return replaced(checkpoint.tree, tuple(above), made)
