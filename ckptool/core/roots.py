"""Finds the weights in a checkpoint's tree."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeGuard

from ckptool.core import keys, modules
from ckptool.core.optimizers import is_optimizer
from ckptool.core.tensor import TensorInfo
from ckptool.core.tree import Path, as_mapping, walk

_DEEPEST = 20
"""The longest path to the weights. Real checkpoints have two or three steps."""

_PROBE = 10_000
"""How many nodes of a container are searched for a tensor."""


class Root(NamedTuple):
    """``path`` to the weights; ``others``: other candidates; ``ema``: averaged copies."""

    path: Path
    others: tuple[Path, ...]
    ema: tuple[Path, ...]


def find_root(tree: Any) -> Root:
    """Returns the path to the weights: the tree itself if it is key -> tensor, else a known name, else the only dict.

    >>> find_root({"epoch": 3}).path
    ()
    """
    path: Path = ()
    others: list[Path] = []
    ema: list[Path] = []
    node = tree
    while len(path) < _DEEPEST and not modules.is_module(node):
        mapping = as_mapping(node)
        if mapping is None:
            break
        ema += [(*path, name) for name in keys.EMA if name in mapping and holds_weights(mapping[name])]
        named = [name for name in keys.ROOTS if name in mapping and holds_weights(mapping[name])]
        found = named or [
            name
            for name, value in mapping.items()
            if not isinstance(value, TensorInfo) and name not in keys.EMA and holds_weights(value)
        ]
        if not found:
            break
        direct = sum(value.numel for value in mapping.values() if _is_weight(value))
        if any(_is_weight(value) for value in mapping.values()) and (
            direct >= max(_elements(mapping[name]) for name in found)
        ):
            others += [(*path, name) for name in found]  # key -> tensor, and a smaller dict of weights in it
            break
        if len(found) > 1:
            others += [(*path, name) for name in (found[1:] if named else found)]
            if not named:
                break
        path = (*path, found[0])
        node = mapping[found[0]]
    return Root(path, tuple(others), tuple(ema))


def _elements(node: Any) -> int:
    """Returns the number of elements of all tensors in a module or container, without optimizer states."""
    if modules.is_module(node):
        return sum(value.numel for value in modules.state_dict(node).values() if isinstance(value, TensorInfo))
    return sum(value.numel for _, value in walk(node, closed=is_optimizer) if isinstance(value, TensorInfo))


def _is_weight(value: Any) -> TypeGuard[TensorInfo]:
    return isinstance(value, TensorInfo) and not value.is_beside


def holds_weights(node: Any) -> bool:
    """Returns whether a node is a module, or a dict with tensors in it and no optimizer state."""
    if modules.is_module(node):
        return True
    if as_mapping(node) is None or is_optimizer(node):
        return False
    for seen, (_, value) in enumerate(walk(node, closed=is_optimizer)):
        if _is_weight(value) or modules.is_module(value):
            return True
        if seen > _PROBE:
            break
    return False
