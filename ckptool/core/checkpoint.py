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
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import Any, NamedTuple, Protocol

from ckptool.core import modules
from ckptool.core.keys import EMA
from ckptool.core.optimizers import is_optimizer
from ckptool.core.roots import find_root, is_flat, root_path, shadow_names
from ckptool.core.tensor import Extras, Opaque, TensorInfo
from ckptool.core.tree import (
    Path,
    PyObject,
    as_mapping,
    attributes,
    children,
    key_text,
    least_to_refuse,
    path_text,
    refuse_key,
    replaced,
    walk,
    without,
)
from ckptool.core.versions import versioned, without_lost_counters
from ckptool.errors import (
    CkptoolError,
    CollisionError,
    FormatError,
    IncompleteError,
    LossError,
    UnsupportedError,
    listed,
)
from ckptool.limits import MAX_KEY, MAX_KEYS


class Module(Protocol):
    """A torch.nn.Module."""

    def state_dict(self, *, keep_vars: bool) -> Any: ...
    def named_modules(self) -> Any: ...


class Rank(NamedTuple):
    """A part of a model that was split over processes: the pieces of tensors that one rank holds.

    ``tensor``: the rank among those that share tensors; ``stage``: that among runs of layers; ``expert``: that among
    those that share experts; all from 0. ``checkpoint``: its file, with the weights at root.
    """

    name: str
    tensor: int
    stage: int
    checkpoint: Checkpoint
    expert: int = 0


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint file (or directory of shards), its tensors not read.

    ``root`` is the path to the weights in ``tree``. ``metadata`` is safetensors' ``__metadata__``.
    ``nbytes`` is the size of the file(s). ``names`` are all classes and functions that its pickle names, again with
    ``()`` behind the second where it calls one that is on no list (see `ckptool.core.pickled_names`).
    ``problems`` are the contradictions of shards and index; ``broken``: tensors are missing. ``trailing`` says what
    follows the end of the content in the file, if anything does. ``notes`` say by which rule one of several sets in a
    directory was read, and what else lies there. ``ranks``: the parts that a tree of several ranks lists, not joined.
    ``files``: the names of the files that its tensors were found in, where the format has several.
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
    notes: tuple[str, ...] = ()
    ranks: tuple[Rank, ...] = ()
    files: tuple[str, ...] = ()
    _cache: dict[Path, dict[str, tuple[Path, Any]]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def rooted(self, root: str | Path | None) -> Checkpoint:
        """Returns the checkpoint with its weights at ``root`` (see `root_path`).

        None: where the format says that they are, else where `find_root` finds them.
        """
        try:
            found = self.root or find_root(self.tree).path if root is None else root_path(self.tree, root)
            return replace(self, root=found)
        except CkptoolError as error:
            error.path = error.path or self.url
            raise

    def require_whole(self) -> None:
        """Raises IncompleteError if tensors are missing from a sharded checkpoint."""
        if self.broken:
            raise IncompleteError("; ".join((*self.problems, *self.notes)), self.url)

    @property
    def split(self) -> str:
        """Returns over which ranks its tensors are split, and what joins them; "" if they are whole."""
        names = listed(dict.fromkeys(rank.name for rank in self.ranks))
        return f"tensors are split over {names}: --tp-rules FILE joins them (or gpt, llama)" if names else ""

    def require_joined(self) -> None:
        """Raises UnsupportedError if its tensors are split over ranks."""
        if self.ranks:
            raise UnsupportedError(self.split, self.url)

    def require_values(self, what: str) -> None:
        """Raises UnsupportedError if tensors at root are only described; ``what`` needs their values."""
        lacking = {key: one.described_in for key, one in self.state_dict().items() if one.described_in is not None}
        if lacking:
            source = next(iter(lacking.values()))
            raise UnsupportedError(f"is {source.what}: {what}: {listed(lacking)}", source.url)

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
        an optimizer's state and an averaged copy (EMA) being one value each. Of keys that read alike, the one that is
        no str has its type behind it: ``0 (int)``. Averaged parameters in a list have the keys of the model's where
        counts and shapes leave no doubt (`shadow_names`). Cached: do not change the result.
        """
        if self.root not in self._cache:
            found = _entries(self.at(self.root), self.url)
            names = shadow_names(self.tree, self.root) or {}
            if names and set(found).isdisjoint(names.values()):
                found = {names.get(path, key): (path, value) for key, (path, value) in found.items()}
            self._cache[self.root] = found
        return self._cache[self.root]

    def state_dict(self) -> dict[str, TensorInfo]:
        """Returns {key: TensorInfo} at ``root``, in the file's order: the keys `model.state_dict()` would give."""
        return {key: value for key, (_, value) in self.entries().items() if isinstance(value, TensorInfo)}

    def hidden(self) -> dict[str, dict[str, TensorInfo]]:
        """Returns {key: {path inside: tensor}} of the entries at ``root`` that are no tensors and contain some.

        Examples are the packed parameters of quantised modules and ``_extra_state``.
        """
        found: dict[str, dict[str, TensorInfo]] = {}
        node = self.at(self.root)
        if not (is_flat(node) or modules.is_module(node)):  # beside nested models are optimizers and copies
            return found
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

    def beside(self) -> Iterator[tuple[Path, str | None, Any]]:
        """Yields (path, key, value) of all that is no weight: what lies beside the path to root, and objects at root.

        ``key`` is None for what is outside of root. Of ranks, that is also what their files hold besides the models.
        """
        node = self.tree
        for depth, step in enumerate(self.root):
            siblings = as_mapping(node)
            for name, value in children(node) if siblings is None else siblings.items():
                if name != step or type(name) is not type(step):
                    yield (*self.root[:depth], name), None, value
            node = self.at(self.root[: depth + 1])
        for key, (_, value) in self.entries().items():
            if not isinstance(value, TensorInfo):
                yield (*self.root, key), key, value
        models = {id(rank.checkpoint.at(rank.checkpoint.root)) for rank in self.ranks}
        for name, one in {rank.name.partition("/")[0]: rank.checkpoint for rank in self.ranks}.items():
            outside = ((path, value) for path, key, value in one.beside() if key is None and id(value) not in models)
            yield from (((name, *path), None, value) for path, value in outside)

    def refuse_alike(self, keys: Container[str]) -> None:
        """Raises CollisionError if one of ``keys`` reads like another one, as 0 does like "0"."""
        entries = self.entries()
        if all(key[-1:] != ")" for key in entries):
            return  # nearly always: no key has its type behind it
        by_text: dict[str, list[str]] = {}
        for key, (path, _) in entries.items():
            by_text.setdefault("/".join(map(key_text, path)), []).append(key)
        for text, alike in by_text.items():
            plain = any(not any(isinstance(step, PyObject) for step in entries[key][0]) for key in alike)
            if len(alike) > 1 and plain and any(key in keys for key in alike):
                what = f"two keys read {text!r} ({listed(alike)}): rename or drop one with remap"
                raise CollisionError(what, self.url)

    def inside(self) -> dict[str, TensorInfo]:
        """Returns {key/path: tensor} of the tensors that `hidden` finds."""
        return {f"{key}/{path}": tensor for key, inner in self.hidden().items() for path, tensor in inner.items()}

    def left_out(self) -> tuple[str, ...]:
        """Returns the names of all that is no weight: other entries, and attributes of tensors and of a model."""
        left = [path_text(path) if key is None else key for path, key, _ in self.beside()]
        for key, tensor in self.state_dict().items():
            if (extras := tensor.extras) is not None:
                left += [f"the class of {key} ({extras.subclass!r})"] if extras.subclass is not None else []
                left += [f"the attributes of {key}"] if extras.state is not None else []
        node = self.at(self.root)
        return (*left, *(modules.loose(node) if modules.is_module(node) else ()))

    def tensors(self) -> Iterator[tuple[Path, TensorInfo]]:
        """Yields (path, tensor) for all tensors of the tree, optimizer and EMA copies included.

        Of an nn.Module it yields those of its state_dict, under its dotted keys, and those inside of its entries.
        """
        for path, node in walk(self.tree, closed=modules.is_module):
            if isinstance(node, TensorInfo):
                yield path, node
            elif modules.is_module(node):
                for key, value in modules.state_dict(node).items():
                    inner = walk(value, closed=modules.is_module)
                    yield from (((*path, key, *step), one) for step, one in inner if isinstance(one, TensorInfo))

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
        and views share memory. What ``torch.load(weights_only=True)`` gives is the same here: typed storages, bytes,
        sets, attributes of tensors; and so are NumPy's arrays and scalars, torch's named tuples and defaultdicts. With
        ``only_root`` arrays are tensors. An nn.Module becomes its state_dict; any other object whose class would have
        to be imported stays a stand-in (`PyObject`), a tensor of such a class is a plain one with its attributes.
        Raises: DependencyError without torch; UnsupportedError for a tensor only its own class can rebuild.
        """
        if _realise is None:
            raise UnsupportedError("no function that makes real tensors is set; `import ckptool` sets it")
        self.require_whole()
        tree = self.tree
        if only_root:
            entries = {key: value for key, (_, value) in self.entries().items()}
            tree = detached(entries) if modules.is_module(self.at(self.root)) else entries
        return _realise(tree, map_location, _module_state_dict, not only_root)

    def with_state_dict(
        self, tensors: Mapping[str, TensorInfo], objects: Mapping[str, Any] | None = None
    ) -> Checkpoint:
        """Returns a checkpoint with these tensors at root; all else is the same objects.

        Keys are in the order of ``tensors``; an object at root that is no tensor stays behind the same key, unless
        ``objects`` lacks it; what only ``objects`` has comes last. An nn.Module becomes the OrderedDict that its
        `state_dict()` would be. ``_metadata`` follows.
        Raises: UnsupportedError if root is a list or a nest of containers, and keys are new there or in another order.
        """
        node = self.at(self.root)
        old = self.entries()
        self.refuse_alike(tensors)
        if modules.is_module(node):
            made: Any = versioned(detached(_merged(old, {key: key for key in old}, tensors, objects)), node)
            made.state = without_lost_counters(made, old, tensors)
        elif is_flat(node):
            names = {key: path[0] for key, (path, _) in old.items()}
            mapping = _merged(old, names, tensors, objects)
            if isinstance(node, PyObject):
                made = node.with_mapping(mapping, without_lost_counters(node, old, tensors))
            else:
                made = mapping
        else:
            kept = {key for key, (_, value) in old.items() if objects is None and not isinstance(value, TensorInfo)}
            kept.update(tensors, objects or ())
            if list(tensors) != [key for key in old if key in tensors] or not kept <= old.keys():
                paths = [path for path, value in old.values() if isinstance(value, TensorInfo) and len(path) > 1]
                parts = dict.fromkeys(path_text((*self.root, *path[:-1])) for path in paths)
                what = f"choose one with --root ({listed(parts)}), or " if parts else ""
                what = f"its weights are in several nested containers: {what}convert it to safetensors, which has none"
                raise UnsupportedError(what, self.url)
            made = node
            if len(kept) < len(old):
                made = without(node, [path for key, (path, _) in old.items() if key not in kept])
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


Realise = Callable[[Any, Any, Callable[[Any], Any], bool], Any]
"""(tree, map_location, function from a module stand-in to its state_dict, whether NumPy's arrays are to be arrays)
-> the tree with real tensors."""


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


def plain(tensor: TensorInfo) -> TensorInfo:
    """Returns a tensor of the same values without class, attributes and gradient; of a NumPy array a tensor."""
    extras = Extras(tensor.extras.conj, tensor.extras.neg) if tensor.extras and tensor.is_lazy else None
    return replace(tensor, requires_grad=False, is_parameter=False, extras=extras)


def _entries(node: object, url: str) -> dict[str, tuple[Path, Any]]:
    if modules.is_module(node):
        return {key: ((key,), value) for key, value in modules.state_dict(node).items()}
    longest, most, least = MAX_KEY.now(), MAX_KEYS.now(), least_to_refuse()
    mapping = as_mapping(node) or {}
    flat = is_flat(node)
    if flat and set(map(type, mapping)) == {str}:  # nearly always
        if max(map(len, mapping)) >= least:
            for name in mapping:
                refuse_key(name, url)
        return {name: ((name,), value) for name, value in mapping.items()}
    total = 0
    read: list[tuple[str, Path, Any]] = []
    for path, value in (((name,), value) for name, value in mapping.items()) if flat else _nested_entries(node):
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
        read.append((key, path, value))
    texts = Counter(key for key, _, _ in read)
    times: Counter[str] = Counter()
    found: dict[str, tuple[Path, Any]] = {}
    for text, path, value in read:
        key = text
        other = next((step for step in path if not isinstance(step, (str, PyObject))), "")
        if texts[text] > 1 and other != "":
            key = f"{text} ({type(other).__name__})"
        while key in found or (key != text and key in texts):
            times[text] += 1
            key = f"{text} ({times[text] + 1})"
        found[key] = path, value
    return found


def _nested_entries(top: object) -> Iterator[tuple[Path, Any]]:
    """Yields (path, value) of the tensors in nested containers, and of what lies beside them.

    A container without tensors is one value, and so are an optimizer's state and an averaged copy (EMA). A
    state_dict's ``_metadata`` is none.
    """
    if isinstance(top, TensorInfo):
        yield (), top
    nodes: list[tuple[Path, Any]] = []
    entered: set[Path] = {()}
    skipped: set[Path] = set()
    below: Path = ()
    for path, node in walk(
        top, closed=lambda node: modules.is_module(node) or (node is not top and is_optimizer(node))
    ):
        if below and path[: len(below)] == below:
            continue
        below = path if path in skipped else ()
        if below:
            continue
        mapping = as_mapping(node)
        if mapping is not None and "_metadata" not in mapping and "_metadata" in attributes(node):
            skipped.add((*path, "_metadata"))
        nodes.append((path, node))
        if len(path) == 1 and path[0] in EMA and mapping is not None:
            below = path
        elif path and (isinstance(node, TensorInfo) or modules.is_module(node) or is_optimizer(node)):
            above = path[:-1]
            while above not in entered:
                entered.add(above)
                above = above[:-1]
    for path, node in nodes:
        if path in entered or path[:-1] not in entered:
            continue
        if modules.is_module(node):
            yield from (((*path, key), value) for key, value in modules.state_dict(node).items())
        else:
            yield path, node


def _merged(
    old: Mapping[str, tuple[Path, Any]],
    names: Mapping[str, Any],
    tensors: Mapping[str, TensorInfo],
    objects: Mapping[str, Any] | None,
) -> dict[Any, Any]:
    """Returns the new content: tensors in their order, every other object behind the same key as before."""
    others: dict[str | None, list[str]] = {}
    last: str | None = None
    for key, (_, value) in old.items():
        if not isinstance(value, TensorInfo):
            if objects is None or key in objects:
                others.setdefault(last, []).append(key)
        elif key in tensors:
            last = key
    mapping: dict[Any, Any] = {}
    for anchor in (None, *tensors):
        if anchor is not None:
            mapping[names.get(anchor, anchor)] = tensors[anchor]
        for key in others.get(anchor, ()):
            mapping[names[key]] = old[key][1]
    mapping.update((key, value) for key, value in (objects or {}).items() if key not in old)
    return mapping


def refuse_tensors(
    format_name: str, tensors: Mapping[str, TensorInfo], reason: Callable[[str, TensorInfo], str | None]
) -> None:
    """Raises LossError naming every tensor that is opaque, or that the format cannot hold, as ``reason`` explains."""
    refused = []
    for name, tensor in tensors.items():
        why = tensor.kind if isinstance(tensor.source, Opaque) else reason(name, tensor)
        if why:
            refused.append(f"{name if name.isprintable() else repr(name)} ({why})")
    if refused:
        raise LossError(f"{format_name} cannot hold {listed(refused, 20)}{remedy(tensors.values())}")


BLOCKS = ("Q8_0", "Q4_0")
"""GGUF's types whose values `convert --dequantize` computes, where they are little-endian."""


def remedy(tensors: Iterable[TensorInfo]) -> str:
    """Returns what to do about types that torch lacks, with a semicolon before it; "" where nothing is to be done."""
    blocks = (tensor for tensor in tensors if tensor.kind in BLOCKS)
    kinds = {one.kind for one in blocks if all(storage.byteorder == "little" for storage in one.storages())}
    return f"; `convert --dequantize` gives the values of {' and '.join(sorted(kinds))}" if kinds else ""
