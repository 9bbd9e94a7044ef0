"""Finds the weights in a checkpoint's tree."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, TypeGuard

from ckptool.core import keys, modules
from ckptool.core.dtypes import DTYPES
from ckptool.core.optimizers import describe, is_optimizer
from ckptool.core.tensor import TensorInfo
from ckptool.core.tree import Path, as_mapping, attributes, children, key_text, path_text, walk
from ckptool.errors import UsageError, near

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
    """Returns the path to the weights: a known name, else the tree itself if it is key -> tensor, else the only dict.

    A known name goes before tensors beside it, however large: a random state, a memory bank. Keys with dots are those
    of a state_dict: they go before it below another known name, and where they are as many as it has. A list or tuple
    with weights in one of its items is like a dict with one of that name: ``(state_dict, optimizer, epoch)``.

    >>> find_root({"epoch": 3}).path
    ()
    """
    path: Path = ()
    others: list[Path] = []
    ema: list[Path] = []
    node = tree
    while len(path) < _DEEPEST and not modules.is_module(node):
        mapping = dict(enumerate(node)) if isinstance(node, (list, tuple)) else as_mapping(node)
        if mapping is None:
            break
        copies = [name for name in keys.EMA if name in mapping and holds_weights(mapping[name])]
        ema += [(*path, name) for name in copies]
        named = [name for name in keys.ROOTS if name in mapping and holds_weights(mapping[name])]
        if is_optimizer(node) and not named:  # of an optimizer alone
            return Root((*path, "state") if holds_weights(mapping["state"]) else path, (), tuple(ema))
        found = named or _models(mapping)
        if not found:
            emptied = any(name in mapping and mapping[name] is None for name in keys.ROOTS)
            if len(copies) == 1 and emptied and not any(map(_is_weight, mapping.values())):
                path = (*path, *copies)
            break
        loose = {name: value for name, value in mapping.items() if _is_weight(value)}
        if loose and _has_metadata(node):
            stay = True
        elif named:
            dotted = sum(map(_is_dotted, loose))
            stay = dotted > 0 and (path != () or dotted >= sum(1 for _ in _tensors(mapping[named[0]])))
            if dotted and not stay:
                others.append(path)
        else:
            only = mapping[found[0]]
            several = isinstance(only, (list, tuple)) and sum(map(holds_weights, only)) != 1
            stay = len(found) > 1 or several or _outweigh(loose, only)
        if loose or len(found) > 1:
            others += [(*path, name) for name in (found if stay else found[1:])]
        if stay:
            break
        path = (*path, found[0])
        node = mapping[found[0]]
    return Root(path, tuple(others), tuple(ema))


SHADOW = "shadow_params"
"""What torch_ema and diffusers call a list of averaged parameters, in the order of the model's."""


def shadow_names(tree: Any, root: Path) -> dict[Path, str] | None:
    """Returns {path below root: key} of averaged parameters there that have only numbers: the keys of the model's.

    None if there are none, or no model; {} if its parameters are not as many, in the same shapes. Parameters are what
    an optimizer gets: a tied one once, no buffers (integers, and BatchNorm's).
    """
    node = _at(tree, root)
    below = () if root[-1:] == (SHADOW,) else (SHADOW,)
    shadows = node if not below else (as_mapping(node) or {}).get(SHADOW)
    if not isinstance(shadows, (list, tuple)) or not shadows or not all(map(_is_weight, shadows)):
        return None
    path = find_root(tree).path
    model = _at(tree, path) if path != root[: len(path)] else None
    weights = modules.state_dict(model) if modules.is_module(model) else as_mapping(model) or {}
    if not weights:
        return None
    parameters = {}
    for key, tensor in weights.items():
        buffer = (
            not isinstance(key, str)
            or not _is_weight(tensor)
            or DTYPES[tensor.dtype].kind in ("int", "bool")
            or tensor.view in parameters
        )
        if not (buffer or key.rpartition(".")[2] in ("running_mean", "running_var")):
            parameters[tensor.view] = key
    shapes = [weights[key].shape for key in parameters.values()]
    if shapes != [tensor.shape for tensor in shadows]:
        return {}
    return {(*below, number): key for number, key in enumerate(parameters.values())}


def _at(node: Any, path: Path) -> Any:
    for step in path:
        node = dict(children(node))[step]
    return node


def said_of(tree: Any, root: Path) -> list[str]:
    """Returns notes on weights that are none, but an optimizer's state, or that are averages and not called so."""
    notes = []
    parent = as_mapping(_at(tree, root[:-1])) or {} if root else {}
    text = path_text(root)
    if root[-1:] == ("state",) and is_optimizer(parent):
        kind, count = describe(parent)
        notes.append(f"{text} is an optimizer's ({kind} of {count} parameters): there are no weights of a model")
    if root[-1:] == ("state_dict",) and {"current_model_state", "averaging_state"} <= parent.keys():
        notes.append(
            f"{text} holds averaged weights (Lightning's WeightAveraging); --root current_model_state: the last"
        )
    if root[-1:] and root[-1] in keys.EMA and find_root(tree).path == root:
        notes.append(f"{text} is an averaged copy (EMA), and the only weights there are")
    if (named := shadow_names(tree, root)) is not None:
        model = path_text(find_root(tree).path) or "the top"
        had = f"have the keys of {model}'s parameters, as many and of the same shapes"
        lack = f"have no keys: {model} has no parameters, as many and of the same shapes"
        notes.append(f"{SHADOW} {had if named else lack}")
    return notes


def is_flat(node: object) -> bool:
    """Returns whether a node is key -> tensor, or an empty dict.

    A dict with tensors among its values is, unless these lie beside models: then all of it is nested, but for a
    state_dict, known by its dots or ``_metadata``.
    """
    mapping = as_mapping(node)
    if not mapping:
        return mapping is not None
    loose = False
    for name, value in mapping.items():
        if _is_weight(value):
            if _is_dotted(name):
                return True  # nearly always at the first key
            loose = True
    return loose and (_has_metadata(node) or not _models(mapping))


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


def _models(mapping: Mapping[Any, Any]) -> list[Any]:
    """Returns the names of the values that hold weights: modules, dicts, and lists of these."""
    return [
        name
        for name, value in mapping.items()
        if not isinstance(value, TensorInfo)
        and name not in keys.EMA
        and not (isinstance(name, str) and name.endswith("_extra_state"))
        and (any(map(holds_weights, value)) if isinstance(value, (list, tuple)) else holds_weights(value))
    ]


def _outweigh(loose: Mapping[Any, TensorInfo], node: Any) -> bool:
    """Returns whether tensors beside a dict of unknown name are weights too: by their names, or as they are more."""
    if not loose or any(map(_is_dotted, loose)):
        return bool(loose)
    inside = [path[-1] for path, _ in _tensors(node) if path]
    if any(map(_is_dotted, inside)) or _has_metadata(node):
        return False
    return len(loose) > len(inside) or "weight" in loose or "bias" in loose


def _tensors(node: Any) -> Iterator[tuple[Path, TensorInfo]]:
    """Yields (path, tensor) of a module or container, without optimizer states."""
    if modules.is_module(node):
        yield from (((key,), value) for key, value in modules.state_dict(node).items() if isinstance(value, TensorInfo))
    else:
        yield from ((path, value) for path, value in walk(node, closed=is_optimizer) if isinstance(value, TensorInfo))


def _is_weight(value: Any) -> TypeGuard[TensorInfo]:
    return isinstance(value, TensorInfo) and not value.is_beside


def _is_dotted(name: object) -> bool:
    return isinstance(name, str) and "." in name


def _has_metadata(node: object) -> bool:
    """Returns whether a node is what `Module.state_dict()` returned."""
    return "_metadata" in attributes(node)


def steps(node: object) -> dict[str, tuple[Any, Any]]:
    """Returns {text: (key, child)} of a container. Of keys that read alike, one that is no str has its type behind it.

    >>> list(steps({0: [], "0": []}))
    ['0 (int)', '0']
    """
    known: dict[str, tuple[Any, Any]] = {}
    for key, child in children(node):
        text = key_text(key)
        if text in known:
            other = known[text] if isinstance(key, str) else (key, child)
            known[f"{text} ({type(other[0]).__name__})"] = other
            if not isinstance(key, str):
                continue
        known[text] = key, child
    return known


def root_text(tree: object, path: Path) -> str:
    """Returns the text of a path, in which `steps` tells keys apart that read alike; "" for the tree itself.

    Raises: UsageError if the tree has no such path.
    """
    texts: list[Any] = []
    for step in path:
        known = steps(tree)
        found = [(text, child) for text, (key, child) in known.items() if type(key) is type(step) and key == step]
        if not found:
            raise _no_step(step, tuple(texts), known)
        text, tree = found[0]
        texts.append(text)
    return path_text(tuple(texts))


def root_path(tree: Any, root: str | Path) -> Path:
    """Returns the path in a tree that ``root`` means: a path, or its text ``a/0/b`` as `root_text` gives it.

    A key may hold a "/" itself: of keys that fit the longest is meant. A "/" before and after all is left out where
    there is no such key. Raises: UsageError if the tree has no such path, or if ``root`` is neither.
    """
    keys.expect(
        isinstance(root, (str, tuple, list)), "root", "a text such as 'model/state_dict' or a tuple of keys", root
    )
    if not isinstance(root, str):
        root_text(tree, tuple(root))  # raises if there is no such path
        return tuple(root)
    for tried in dict.fromkeys((root, root.strip("/"))):
        path: Path = ()
        node, left = tree, tried.split("/") if tried.strip("/") else []
        while left:
            known = steps(node)
            fitting = (count for count in range(len(left), 0, -1) if "/".join(left[:count]) in known)
            if not (count := next(fitting, 0)):
                break
            step, node = known["/".join(left[:count])]
            path, left = (*path, step), left[count:]
        if not left:
            return path
    raise _no_step(left[0], path, known)


def _no_step(step: object, path: Path, known: Mapping[str, object]) -> UsageError:
    where = path_text(path) or "the top"
    there = ", ".join(list(known)[:20]) or "nothing"
    return UsageError(f"no {step!r} at {where}{near(str(step), known)}; there is: {there}")
