"""Where in a checkpoint's tree the weights are."""

from __future__ import annotations

from typing import Any, NamedTuple

from ckptool import keys, modules
from ckptool.checkpoint import TensorInfo
from ckptool.optimizers import is_optimizer
from ckptool.tree import Path, as_mapping, walk

_PROBE = 10_000
"""Nodes looked at to see whether a container holds any tensor."""


class Root(NamedTuple):
    """``path`` to the weights; ``others``: further places that could be meant; ``ema``: averaged copies."""

    path: Path
    others: tuple[Path, ...]
    ema: tuple[Path, ...]


def find_root(tree: Any) -> Root:
    """Returns where the weights are: the tree itself if it is key -> tensor, else a known name, else a lone dict.

    >>> find_root({"epoch": 3}).path
    ()
    """
    path: Path = ()
    others: list[Path] = []
    ema: list[Path] = []
    node = tree
    while not modules.is_module(node):
        mapping = as_mapping(node)
        if mapping is None:
            break
        ema += [(*path, name) for name in keys.EMA if name in mapping and holds_weights(mapping[name])]
        direct = sum(isinstance(value, TensorInfo) for value in mapping.values())
        named = [name for name in keys.ROOTS if name in mapping and holds_weights(mapping[name])]
        if direct and (not named or 2 * direct > len(mapping)):
            break
        found = named or [name for name, value in mapping.items() if name not in keys.EMA and holds_weights(value)]
        if not found:
            break
        if len(found) > 1:
            others += [(*path, name) for name in (found[1:] if named else found)]
            if not named:
                break
        path = (*path, found[0])
        node = mapping[found[0]]
    return Root(path, tuple(others), tuple(ema))


def holds_weights(node: Any) -> bool:
    """Returns whether a node is a module, or a dict with tensors in it that is no optimizer's."""
    if modules.is_module(node):
        return True
    if as_mapping(node) is None or is_optimizer(node):
        return False
    for seen, (_, value) in enumerate(walk(node, closed=is_optimizer)):
        if isinstance(value, TensorInfo) or modules.is_module(value):
            return True
        if seen > _PROBE:
            break
    return False
