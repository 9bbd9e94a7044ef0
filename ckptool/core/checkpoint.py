"""The core: a checkpoint is the tree `torch.load` would have returned, with a `TensorInfo` in place of every tensor.

Nothing here reads a byte. A format builds these objects from headers, an operation makes new ones from
old ones, and a format's writer moves the bytes they point at:

    Checkpoint ── tree ──> dict, list, PyObject ... ──> TensorInfo ── source ──┬─> Storage ──> Span
                                                                               ├─> Derived  (computed while writing)
                                                                               └─> Opaque   (sparse, quantised, ...)

Two tensors whose source is the same `Storage` object share memory: tied weights, and views.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from operator import attrgetter
from types import NoneType
from typing import Any

from ckptool.core import modules
from ckptool.core.keys import EMA
from ckptool.core.optimizers import is_optimizer
from ckptool.core.tensor import Opaque, TensorInfo
from ckptool.core.tree import (
    Path,
    PyObject,
    as_mapping,
    children,
    key_text,
    least_to_refuse,
    path_text,
    refuse_key,
    replaced,
    walk,
)
from ckptool.core.versions import versioned, without_lost_counters
from ckptool.errors import CollisionError, FormatError, IncompleteError, UnsupportedError
from ckptool.limits import MAX_KEY, MAX_KEYS


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint file (or directory of shards), its tensors not read.

    ``root`` is the path to the weights in ``tree``. ``metadata`` is safetensors' ``__metadata__``.
    ``nbytes`` is the size of the file(s). ``names`` are all classes and functions that its pickle names.
    ``problems`` are the contradictions of shards and index; ``broken``: tensors are missing. ``trailing`` says what
    follows the end of the content in the file, if anything does.
    """

    tree: Any
    root: Path = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    format: str = "memory"
    url: str = ""
    nbytes: int = 0
    names: tuple[tuple[str, str], ...] = ()
    problems: tuple[str, ...] = ()
    broken: bool = False
    trailing: str = ""
    _cache: dict[Path, dict[str, tuple[Path, Any]]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def require_whole(self) -> None:
        """Raises IncompleteError if tensors are missing from a sharded checkpoint."""
        if self.broken:
            raise IncompleteError("; ".join(self.problems), self.url)

    def at(self, path: Path) -> Any:
        """Returns the node at ``path``. Raises: FormatError if the tree has no such path."""
        node = self.tree
        for step in path:
            found = [child for name, child in children(node) if name == step and type(name) is type(step)]
            if not found:
                raise FormatError(f"no {path_text(path)!r} in the checkpoint's tree", self.url)
            node = found[0]
        return node

    def entries(self) -> dict[str, tuple[Path, Any]]:
        """Returns {key: (path below root, value)} of the dict at ``root``, objects that are no tensors included.

        An nn.Module stand-in gives its state_dict; a tree without any tensor directly at root is flattened with "/",
        without optimizer states and averaged copies (EMA). Cached: do not change the result.
        """
        if self.root not in self._cache:
            self._cache[self.root] = _entries(self.at(self.root), self.url)
        return self._cache[self.root]

    def state_dict(self) -> dict[str, TensorInfo]:
        """Returns {key: TensorInfo} at ``root``, in the file's order: the keys `model.state_dict()` would give."""
        return {key: value for key, (_, value) in self.entries().items() if isinstance(value, TensorInfo)}

    def hidden(self) -> dict[str, dict[str, TensorInfo]]:
        """Returns {key: {path inside: tensor}} of the objects at ``root`` that are no tensors and contain some.

        Examples are the packed parameters of quantised modules and ``_extra_state``.
        """
        found: dict[str, dict[str, TensorInfo]] = {}
        for key, (_, value) in self.entries().items():
            if not isinstance(value, TensorInfo):
                inner = {
                    path_text(path): node
                    for path, node in walk(value, closed=is_optimizer)
                    if isinstance(node, TensorInfo) and not node.is_beside
                }
                if inner:
                    found[key] = inner
        return found

    def tensors(self) -> Iterator[tuple[Path, TensorInfo]]:
        """Yields (path, tensor) for all tensors of the tree, optimizer and EMA copies included.

        Of an nn.Module it yields those of its state_dict, each under its dotted key.
        """
        for path, node in walk(self.tree, closed=modules.is_module):
            if isinstance(node, TensorInfo):
                yield path, node
            elif modules.is_module(node):
                for key, value in modules.state_dict(node).items():
                    if isinstance(value, TensorInfo):
                        yield (*path, key), value

    def leaves(self) -> Iterator[tuple[Path, Any]]:
        """Yields (path, object) for every object without children that is no tensor."""
        for path, node in walk(self.tree):
            if not isinstance(node, TensorInfo) and next(children(node), None) is None:
                yield path, node

    def shared(self) -> list[list[str]]:
        """Returns the groups of two or more keys at root that are the same elements of one storage: tied weights.

        Empty tensors never count as tied. Other views of one storage are not tied: see `overlapping`.
        """
        tensors = self.state_dict()
        times = Counter(map(id, map(attrgetter("source"), tensors.values())))
        if len(times) == len(tensors):  # no memory is shared at all
            return []
        groups: dict[object, list[str]] = {}
        for key, tensor in tensors.items():
            if times[id(tensor.source)] > 1 and tensor.numel and not isinstance(tensor.source, Opaque):
                groups.setdefault(tensor.view, []).append(key)
        return [keys for keys in groups.values() if len(keys) > 1]

    def to_torch(self, map_location: Any = None, *, only_root: bool = False) -> Any:
        """Returns the tree with real tensors, as torch.load would; with ``only_root``, {key: tensor} of the weights.

        ``map_location`` is what `torch.load` takes: a string, a torch.device, a dict or a callable. Tied tensors
        and views share memory. An nn.Module whose class was not imported becomes its state_dict.
        Raises: DependencyError without torch; UnsupportedError for a tensor only its own class can rebuild.
        """
        if _realise is None:
            raise UnsupportedError("no function that makes real tensors is set; `import ckptool` sets it")
        self.require_whole()
        tree = self.tree
        if only_root:
            entries = {key: value for key, (_, value) in self.entries().items()}
            tree = detached(entries) if modules.is_module(self.at(self.root)) else entries
        return _realise(tree, map_location, _module_state_dict)

    def with_state_dict(self, tensors: Mapping[str, TensorInfo]) -> Checkpoint:
        """Returns a checkpoint with these tensors at root; all else is the same objects.

        Keys are in the order of ``tensors``; an object at root that is no tensor stays behind the same key.
        An nn.Module becomes the OrderedDict that its `state_dict()` would be. ``_metadata`` follows.
        Raises: UnsupportedError if root is a list or a nest of dicts and the keys change there.
        """
        node = self.at(self.root)
        old = self.entries()
        if modules.is_module(node):
            made: Any = versioned(detached(tensors), node)
            made.state = without_lost_counters(made, old, tensors)
        elif is_flat(node):
            names = {key: path[0] for key, (path, _) in old.items()}
            mapping = _merged(old, names, tensors)
            if isinstance(node, PyObject):
                made = node.with_mapping(mapping, without_lost_counters(node, old, tensors))
            else:
                made = mapping
        else:
            if list(tensors) != [key for key, (_, value) in old.items() if isinstance(value, TensorInfo)]:
                raise UnsupportedError(
                    "its weights are spread over several nested containers: choose one with --root", self.url
                )
            made = node
            for key, tensor in tensors.items():
                path, unchanged = old[key]
                if tensor is unchanged:
                    continue
                try:
                    made = replaced(made, path, tensor)
                except UnsupportedError as error:
                    what = f"{error.message}: choose where its weights are with --root"
                    raise UnsupportedError(what, self.url) from error
        return replace(self, tree=replaced(self.tree, self.root, made))


Realise = Callable[[Any, Any, Callable[[Any], Any]], Any]
"""(tree, map_location, function from a module stand-in to its state_dict) -> the tree with real tensors."""


_realise: Realise | None = None


def set_realise(realise: Realise) -> None:
    """Sets the function that `Checkpoint.to_torch` calls: core reads no bytes, so `ckptool.api` provides it."""
    global _realise
    _realise = realise


def _module_state_dict(node: Any) -> Any:
    """Returns the state_dict of an nn.Module stand-in, None for anything else."""
    return versioned(detached(modules.state_dict(node)), node) if modules.is_module(node) else None


def detached(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the tensors as `Module.state_dict()` gives them, no parameters; shared objects stay shared."""
    made: dict[int, Any] = {}
    for value in tensors.values():
        if isinstance(value, TensorInfo) and id(value) not in made:
            plain = not (value.is_parameter or value.requires_grad)
            made[id(value)] = value if plain else replace(value, is_parameter=False, requires_grad=False)
    return {key: made.get(id(value), value) for key, value in tensors.items()}


def is_flat(node: object) -> bool:
    """Returns whether a node is a dict with tensors among its values, or an empty dict."""
    mapping = as_mapping(node)
    return mapping is not None and (
        not mapping or any(isinstance(value, TensorInfo) and not value.is_beside for value in mapping.values())
    )


def _entries(node: object, url: str) -> dict[str, tuple[Path, Any]]:
    if modules.is_module(node):
        return {key: ((key,), value) for key, value in modules.state_dict(node).items()}
    found: dict[str, tuple[Path, Any]] = {}
    total = 0
    longest, most, least = MAX_KEY.now(), MAX_KEYS.now(), least_to_refuse()
    mapping = as_mapping(node) or {}
    if set(map(type, mapping)) == {str} and is_flat(node):  # nearly always
        if max(map(len, mapping)) >= least:
            for name in mapping:
                refuse_key(name, url)
        return {name: ((name,), value) for name, value in mapping.items()}
    if is_flat(node):
        pairs: Iterator[tuple[Path, Any]] = (((name,), value) for name, value in mapping.items())
    else:
        pairs = _nested_entries(node)
    times: Counter[str] = Counter()
    for path, value in pairs:
        steps = [key_text(step) for step in path]
        if len(steps) > 1 and (length := sum(map(len, steps)) + len(steps) - 1) > longest:
            what = f"a key joined from the names above it has {length:,} characters"
            raise MAX_KEY.passed(what, length, url)
        key = "/".join(steps)
        if len(key) >= least:
            refuse_key(key, url)
        if len(steps) > 1:
            total += len(key)
            if total > most:
                raise MAX_KEYS.passed("its keys have too many characters in all", path=url)
        if key in found and all(isinstance(step, (str, int, float, NoneType)) for step in path):
            raise CollisionError(f"two keys read {key!r} (one of them is no string)", url)
        while key in found:  # different objects of the same text
            times[key] += 1
            key = f"{key} ({times[key] + 1})"
        found[key] = path, value
    return found


def _nested_entries(top: object) -> Iterator[tuple[Path, Any]]:
    """Yields (path, value) for the leaves of nested containers, without optimizer states and averaged copies."""
    for path, node in walk(top, closed=lambda node: is_optimizer(node) or modules.is_module(node)):
        if path and path[0] in EMA:
            continue
        if modules.is_module(node):
            yield from (((*path, key), value) for key, value in modules.state_dict(node).items())
        elif isinstance(node, TensorInfo) or next(children(node), None) is None:
            yield path, node


def _merged(
    old: Mapping[str, tuple[Path, Any]], names: Mapping[str, Any], tensors: Mapping[str, TensorInfo]
) -> dict[Any, Any]:
    """Returns the new content: tensors in their order, every other object behind the same key as before."""
    others: dict[str | None, list[str]] = {}
    last: str | None = None
    for key, (_, value) in old.items():
        if not isinstance(value, TensorInfo):
            others.setdefault(last, []).append(key)
        elif key in tensors:
            last = key
    mapping: dict[Any, Any] = {}
    for anchor in (None, *tensors):
        if anchor is not None:
            mapping[names.get(anchor, anchor)] = tensors[anchor]
        for key in others.get(anchor, ()):
            mapping[names[key]] = old[key][1]
    return mapping
