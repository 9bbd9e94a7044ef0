"""Trees: what a pickle or a header holds, in plain Python, with a stand-in for every object of a foreign class.

A tree is made of None, bool, int, float, str, bytes, list, tuple, dict, set, frozenset, of `PyObject` for
everything else, and of leaves that other files define (tensors). Nothing here imports, calls or reads anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

from ckptool.errors import FormatError, LimitError, UnsupportedError

Path = tuple[Any, ...]
"""Steps from the top of a tree: dict keys as they are (int keys stay int), list positions, attribute names."""

MAX_NODES = 20_000_000
"""Nodes one walk may visit. Memoised pickles can share subtrees 2^n-fold; a million keys with Adam are under 10^7."""


class Global(type):
    """A class or function that a pickle names, never imported: ``module`` and ``qualname`` are all there is.

    It is a class, so that every opcode which makes an object has something harmless to make it from;
    calling it gives a `PyObject` that only remembers the call.
    """

    module: str
    qualname: str

    @classmethod
    def named(mcs, module: str, qualname: str) -> Global:
        """Returns a new stand-in for ``module.qualname``."""
        made: Global = type.__new__(mcs, "Global", (PyObject,), {"__slots__": ()})
        type.__setattr__(made, "module", module)
        type.__setattr__(made, "qualname", qualname)
        return made

    def __call__(cls, *args: Any, **kwargs: Any) -> PyObject:
        made: PyObject = object.__new__(cls)  # type: ignore[arg-type]
        made.args, made.kwargs, made.called = args, kwargs, True
        made.state = made.items = made.mapping = None
        return made

    def __setattr__(cls, name: str, value: object) -> None:
        raise FormatError(f"the pickle sets an attribute on {cls}")

    def __repr__(cls) -> str:
        return f"{cls.module}.{cls.qualname}"


class PyObject(metaclass=Global):
    """A stand-in for an object of a class that was never imported; it holds what the pickle said and runs nothing.

    ``type(obj)`` is the `Global` that stands for its class. ``called``: made by calling (REDUCE), else by
    ``__new__`` (NEWOBJ), with ``args`` and ``kwargs``. ``state``: what BUILD would have given
    ``__setstate__`` or ``__dict__``. ``items``: what was appended. ``mapping``: what was set by key, so an
    OrderedDict is a PyObject whose mapping is its content and whose state may hold ``_metadata``.
    """

    __slots__ = ("args", "called", "items", "kwargs", "mapping", "state")
    __hash__ = object.__hash__

    module: ClassVar[str]
    qualname: ClassVar[str]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    called: bool
    state: Any
    items: list[Any] | None
    mapping: dict[Any, Any] | None

    def __new__(cls, *args: Any, **kwargs: Any) -> PyObject:
        made = cls(*args, **kwargs)  # type(cls).__call__
        made.called = False
        return made

    # What the unpickling machine calls on an object:

    def __setstate__(self, state: Any) -> None:
        if self.state is not None:
            raise FormatError(f"the pickle builds one {type(self)} twice")
        self.state = state

    def append(self, item: Any) -> None:
        self.items = self.items or []
        self.items.append(item)

    add = append

    def extend(self, items: list[Any]) -> None:
        self.items = self.items or []
        self.items.extend(items)

    def __setitem__(self, key: Any, value: Any) -> None:
        if self.mapping is None:
            self.mapping = {}
        self.mapping[key] = value

    # What a reader of the tree asks:

    def __getitem__(self, key: Any) -> Any:
        return (as_mapping(self) or {})[key]

    def with_mapping(self, mapping: dict[Any, Any], state: Any) -> PyObject:
        """Returns the same kind of dict with other content, and other state (``_metadata``)."""
        made: PyObject = object.__new__(type(self))
        made.args = () if self.args and as_mapping(self) is not self.mapping else self.args
        made.kwargs, made.called, made.items = self.kwargs, self.called, self.items
        made.mapping, made.state = mapping, state
        return made

    def __repr__(self) -> str:
        return f"<{type(self)!r} object, not imported>"


_DICT_CLASSES = {("collections", "OrderedDict"), ("collections", "defaultdict"), ("collections", "Counter")}


_ORDERED_DICT = Global.named("collections", "OrderedDict")


def ordered_dict(mapping: dict[Any, Any], metadata: Any = None) -> PyObject:
    """Returns a `collections.OrderedDict` of the tree, with ``_metadata`` as `Module.state_dict` sets it."""
    made = _ORDERED_DICT()
    made.mapping = mapping
    made.state = None if metadata is None else {"_metadata": metadata}
    return made


def as_mapping(node: object) -> dict[Any, Any] | None:
    """Returns the content of a dict, or of the stand-in of a dict subclass; None for anything else."""
    if isinstance(node, dict):
        return node
    if not isinstance(node, PyObject):
        return None
    if node.mapping is not None:
        return node.mapping
    if (node.module, node.qualname) not in _DICT_CLASSES:
        return None
    # Python 2 pickled OrderedDict([[key, value], ...]); Counter pickles as Counter({...}).
    content = node.args[-1] if node.args else {}
    if isinstance(content, dict):
        return content
    if isinstance(content, list) and all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in content):
        return dict(content)
    return {}


def attributes(node: object) -> dict[str, Any]:
    """Returns the instance attributes a PyObject would have: its ``__dict__`` state and its slots."""
    state = node.state if isinstance(node, PyObject) else None
    layers = state if isinstance(state, tuple) else (state,)
    merged: dict[str, Any] = {}
    for layer in layers:
        if isinstance(layer, dict):
            merged.update(layer)
    return merged


def children(node: object) -> Iterator[tuple[Any, Any]]:
    """Yields (step, child) for what lies directly below a node, in the file's order."""
    if isinstance(node, dict):
        yield from node.items()
    elif isinstance(node, (list, tuple, set, frozenset)):
        yield from enumerate(node)
    elif isinstance(node, PyObject):
        mapping = as_mapping(node)
        if mapping is not None:
            yield from mapping.items()
        if mapping is None or mapping is node.mapping:
            yield from enumerate(node.args)
        yield from node.kwargs.items()
        yield from enumerate(node.items or ())
        named = attributes(node)
        yield from named.items()
        if node.state is not None and not named:
            yield "__state__", node.state


class Leaf:
    """A leaf with a tree of its own behind it, which a walk enters only when asked to (``inside``)."""

    __slots__ = ()

    def inside(self) -> Iterator[tuple[Any, Any]]:
        """Yields (step, child) for what hangs on it."""
        return iter(())


def walk(
    top: object, *, inside: bool = False, closed: Callable[[Any], bool] | None = None
) -> Iterator[tuple[Path, Any]]:
    """Yields (path, node) for every node of a tree, parents first, in the file's order.

    A container that holds itself is not entered again, nor is one for which ``closed`` is true; leaves with
    something behind them are entered only with ``inside``. Raises: LimitError past `MAX_NODES`.
    """
    yield (), top
    visited = 0
    trail: list[tuple[Path, int, Iterator[tuple[Any, Any]]]] = [
        ((), id(top), _below(top, inside) if not (closed and closed(top)) else iter(()))
    ]
    open_ids = {id(top)}
    while trail:
        path, holder, below = trail[-1]
        for step, node in below:
            visited += 1
            if visited > MAX_NODES:
                raise LimitError(f"the tree has over {MAX_NODES:,} nodes (MAX_NODES), shared ones counted each time")
            here = (*path, step)
            yield here, node
            if isinstance(node, _INNER) and id(node) not in open_ids and not (closed and closed(node)):
                open_ids.add(id(node))
                trail.append((here, id(node), _below(node, inside)))
                break
        else:
            trail.pop()
            open_ids.discard(holder)


def _below(node: object, inside: bool) -> Iterator[tuple[Any, Any]]:
    if isinstance(node, Leaf):
        return node.inside() if inside else iter(())
    return children(node)


_INNER = (dict, list, tuple, set, frozenset, PyObject, Leaf)


def replaced(top: Any, path: Path, value: Any) -> Any:
    """Returns the tree with ``value`` at ``path``: containers on the way are copied, all else is the same objects.

    Raises: UnsupportedError if the way leads through something that cannot be copied with one part changed.
    """
    if not path:
        return value
    step, rest = path[0], path[1:]
    if isinstance(top, dict):
        return {name: replaced(child, rest, value) if name == step else child for name, child in top.items()}
    if isinstance(top, (list, tuple)):
        return type(top)(replaced(child, rest, value) if i == step else child for i, child in enumerate(top))
    mapping = as_mapping(top)
    if isinstance(top, PyObject) and mapping is not None and step in mapping:
        changed = {name: replaced(child, rest, value) if name == step else child for name, child in mapping.items()}
        return top.with_mapping(changed, top.state)
    if isinstance(top, PyObject) and isinstance(top.state, dict) and step in top.state:
        copy: PyObject = object.__new__(type(top))
        copy.args, copy.kwargs, copy.called = top.args, top.kwargs, top.called
        copy.items, copy.mapping = top.items, top.mapping
        copy.state = replaced(top.state, path, value)
        return copy
    raise UnsupportedError(f"cannot change {step!r} inside {type(top).__name__}")
