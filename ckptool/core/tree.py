"""Trees: the content of a pickle or a header in plain Python, with a stand-in for every object of a foreign class.

A tree is made of None, bool, int, float, str, bytes, list, tuple, dict, set, frozenset, of `PyObject` for
everything else, and of leaves that other files define (tensors). Nothing here imports, calls or reads anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, ClassVar

from ckptool.errors import FormatError, UnsupportedError
from ckptool.limits import MAX_DEPTH, MAX_KEY, MAX_LEVELS, MAX_SHARED, MAX_STEPS

Path = tuple[Any, ...]
"""Steps from the top of a tree: dict keys unchanged (int keys stay int), list indices, attribute names."""

LONG = 4096
"""The most characters of a path that a message shows."""


class Global(type):
    """A stand-in for a class or function that a pickle names: only its ``module`` and ``qualname``, never imported.

    It is a class itself, as the opcodes that make objects (NEWOBJ) demand one; calling it gives a `PyObject` that
    records the call and runs nothing.
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
        made.state = made.items = made.mapping = made.maker = made.pairs = made.calls = None
        return made

    def __setattr__(cls, name: str, value: object) -> None:
        raise FormatError(f"the pickle sets an attribute on {cls}")

    def __repr__(cls) -> str:
        return f"{cls.module}.{cls.qualname}"


class PyObject(metaclass=Global):
    """A stand-in for an object of a class that was never imported: it records what the pickle does to the object.

    ``type(obj)`` is the `Global` that stands for its class. ``called``: made by calling (REDUCE), else by
    ``__new__`` (NEWOBJ), with ``args`` and ``kwargs``. ``state``: the argument of BUILD, for ``__setstate__`` or
    ``__dict__``. ``items``: the appended items. ``mapping``: the items set by key; an OrderedDict is a
    PyObject whose mapping is its content and whose state may hold ``_metadata``.
    ``maker``: the object that was called to make this one, or its class, where that is no `Global`.
    ``calls``: calls whose result the pickle dropped, and which so are only for what they do to this object: pickles
    with a class in them fill it by these.
    ``pairs``: the cache of `as_mapping` for a list of pairs: (length of the list, the dict made of it).
    """

    __slots__ = ("args", "called", "calls", "items", "kwargs", "maker", "mapping", "pairs", "state")
    __hash__ = object.__hash__

    module: ClassVar[str]
    qualname: ClassVar[str]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    called: bool
    state: Any
    items: list[Any] | None
    mapping: dict[Any, Any] | None
    maker: PyObject | None
    calls: list[PyObject] | None
    pairs: tuple[int, dict[Any, Any]] | None

    def __new__(cls, *args: Any, **kwargs: Any) -> PyObject:
        made = Global.__call__(cls, *args, **kwargs)
        made.called = False
        return made

    # Methods that the unpickler calls:

    def __call__(self, *args: Any) -> PyObject:
        """Records a call of this object.

        The result of a ``functools.partial(cls.__new__, cls, ...)`` is a stand-in of class ``cls``: so protocol 2
        makes objects of a class whose ``__new__`` takes keywords.
        """
        state = self.state if self.qualname == "partial" and isinstance(self.state, tuple) else ()
        given = state[1] if len(state) > 1 and isinstance(state[1], tuple) else ()
        made = Global.__call__(given[0] if given and isinstance(given[0], Global) else type(self), *args)
        made.maker = self
        return made

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

    # Methods for readers of the tree:

    def __getitem__(self, key: Any) -> Any:
        return (as_mapping(self) or {})[key]

    def with_mapping(self, mapping: dict[Any, Any], state: Any) -> PyObject:
        """Returns a copy of a dict's stand-in with this content and this state (``_metadata``)."""
        made = self.with_state(state)
        if self.args and as_mapping(self) is not self.mapping:
            made.args = ()
        made.mapping = mapping
        return made

    def with_state(self, state: Any) -> PyObject:
        """Returns a copy with this state."""
        made: PyObject = object.__new__(type(self))
        made.args, made.kwargs, made.called, made.maker = self.args, self.kwargs, self.called, self.maker
        made.calls = self.calls
        made.items, made.mapping, made.state, made.pairs = self.items, self.mapping, state, None
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
    if not isinstance(content, list):
        return {}
    if node.pairs is None or node.pairs[0] != len(content):  # made once, as many parts of a tree may share it
        node.pairs = len(content), _dict_of(content)
    return node.pairs[1]


def _dict_of(pairs: list[Any]) -> dict[Any, Any]:
    """Returns ``dict(pairs)``; {} if it is no list of pairs."""
    if not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in pairs):
        return {}
    return {} if any(isinstance(name, _NO_KEYS) for name, _ in pairs) else dict(pairs)


_NO_KEYS = (dict, list, set, bytearray, tuple)
"""Types that are refused as keys of such pairs: unhashable ones, and tuples, which `pickling.guard` has not counted."""


def layers(node: object) -> tuple[Any, ...]:
    """Returns the parts of an object's state: its ``__dict__`` and its slots, or whatever the state is."""
    state = node.state if isinstance(node, PyObject) else None
    if isinstance(state, tuple) and any(isinstance(layer, dict) for layer in state):
        return state
    return () if state is None else (state,)


def attributes(node: object) -> dict[str, Any]:
    """Returns the instance attributes a PyObject would have: its ``__dict__`` state and its slots."""
    found = [layer for layer in layers(node) if isinstance(layer, dict)]
    if len(found) == 1:
        return found[0]
    return {name: value for layer in found for name, value in layer.items()}


def children(node: object) -> Iterator[tuple[Any, Any]]:
    """Yields (step, child) for the nodes directly below a node, in the file's order."""
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
        if node.maker is not None and node.called:
            yield "__call__", node.maker
        for layer in layers(node):
            if isinstance(layer, dict):
                yield from layer.items()
            elif layer is not None:
                yield "__state__", layer


def parts(node: object) -> Iterator[tuple[Any, Any]]:
    """Yields (step, part) for everything that a pickle of the node holds: its children, keys and arguments."""
    if isinstance(node, dict):
        for name, value in node.items():
            if isinstance(name, _INNER):
                yield "a key", name
            yield name, value
    elif isinstance(node, PyObject):
        if node.maker is not None:
            yield "__call__", node.maker
        yield from enumerate(node.args)
        yield from node.kwargs.items()
        yield from enumerate(node.items or ())
        yield from parts(node.mapping)
        if node.state is not None:
            yield "__state__", node.state
        yield from (("__call__", call) for call in node.calls or ())
    elif isinstance(node, Leaf):
        yield from node.inside()
    else:
        yield from children(node)


class Leaf:
    """A leaf that may have a tree of its own (a tensor's attributes), which only a walk with ``inside`` enters."""

    __slots__ = ()

    @property
    def is_closed(self) -> bool:
        """Returns whether `inside` yields nothing."""
        return True

    def inside(self) -> Iterator[tuple[Any, Any]]:
        """Yields (step, child) for the top nodes of its own tree."""
        return iter(())


def walk(
    top: object, *, inside: bool = False, closed: Callable[[Any], bool] | None = None
) -> Iterator[tuple[Path, Any]]:
    """Yields (path, node) for every node of a tree, parents first, in the file's order.

    A container inside itself is not entered again; one for which ``closed`` is true is not entered. With ``inside``
    it also yields what only a pickle of the tree has (see `parts`), the trees of leaves too, and enters a shared
    container only once. Raises: LimitError past `MAX_DEPTH`, `MAX_SHARED`, `MAX_STEPS`.
    """
    yield (), top
    inner = _INNER if inside else _CONTAINERS
    below = parts if inside else children
    if not isinstance(top, inner) or (closed and closed(top)):
        return
    seen = again = steps = 0
    deepest, most_shared, most_steps = MAX_DEPTH.now(), MAX_SHARED.now(), MAX_STEPS.now()
    trail: list[tuple[Path, int, Iterator[tuple[Any, Any]], bool]] = [((), id(top), below(top), False)]
    on_trail, entered = {id(top)}, {id(top)}
    while trail:
        path, holder, rest, known = trail[-1]
        depth = len(trail)
        for step, node in rest:
            seen += 1
            again += known
            steps += depth
            if again > most_shared + 4 * (seen - again):
                raise MAX_SHARED.passed("the tree meets shared nodes again too often")
            if steps > most_steps:
                raise MAX_STEPS.passed("the paths in the tree have too many steps")
            here = (*path, step)
            yield here, node
            if isinstance(node, Leaf) and (not inside or node.is_closed):
                continue  # nearly every leaf
            if not isinstance(node, inner) or id(node) in on_trail or (closed and closed(node)):
                continue
            before = id(node) in entered
            if before and inside:
                continue
            if depth >= deepest:
                raise MAX_DEPTH.passed("its containers are nested too deep")
            entered.add(id(node))
            on_trail.add(id(node))
            trail.append((here, id(node), below(node), known or before))
            break
        else:
            trail.pop()
            on_trail.discard(holder)


_CONTAINERS = (dict, list, tuple, set, frozenset, PyObject)
_INNER = (*_CONTAINERS, Leaf)


def nodes(top: object) -> Iterator[Any]:
    """Yields the nodes of a `walk` with ``inside``, in the same order, without their paths: a fifth of the cost.

    Raises: LimitError past `MAX_DEPTH`.
    """
    yield top
    deepest = MAX_DEPTH.now()
    entered = {id(top)}
    trail = [_below(top)] if isinstance(top, _INNER) else []
    while trail:
        for part in trail[-1]:
            yield part
            if isinstance(part, Leaf):
                if part.is_closed:
                    continue  # nearly every leaf
            elif not isinstance(part, _CONTAINERS):
                continue
            if id(part) in entered:
                continue
            if len(trail) >= deepest:
                raise MAX_DEPTH.passed("its containers are nested too deep")
            entered.add(id(part))
            trail.append(_below(part))
            break
        else:
            trail.pop()


def _below(node: object) -> Iterator[Any]:
    """Returns the `parts` of a node without their steps, which for a dict of names takes a fifth of the time."""
    if type(node) is dict and set(map(type, node)) <= {str, int}:
        return iter(node.values())
    return (part for _, part in parts(node))


def replaced(top: Any, path: Path, value: Any) -> Any:
    """Returns the tree with ``value`` at ``path``: the containers above it are copied, all else is the same objects.

    Raises: UnsupportedError if one of these containers cannot be copied with one part changed.
    """
    above = []
    for step in path:
        above.append((top, step))
        top = _part(top, step)
    for holder, step in reversed(above):
        value = _with_part(holder, step, value)
    return value


def without(top: Any, paths: Sequence[Path]) -> Any:
    """Returns the tree without the values at ``paths``, and without the dicts that these leave empty.

    Raises: UnsupportedError if one of them lies in a list or an object, from which nothing can be taken.
    """
    below: dict[Any, list[Path]] = {}
    for path in paths:
        below.setdefault(path[0], []).append(path[1:])
    mapping = as_mapping(top)
    if mapping is None and any(() in rests for rests in below.values()):
        what = top.qualname if isinstance(top, PyObject) else type(top).__name__
        raise UnsupportedError(f"cannot take {brief(next(iter(below)))} out of a {what}: choose a part with --root")
    for step, rests in below.items():
        part = None if () in rests else without(_part(top, step), rests)
        if part is not None and (as_mapping(part) != {} or mapping is None):
            top = _with_part(top, step, part)
        else:
            top = with_content(top, {name: child for name, child in (as_mapping(top) or {}).items() if name != step})
    return top


def _part(node: Any, step: Any) -> Any:
    if isinstance(node, (list, tuple)) and type(step) is int and step < len(node):
        return node[step]
    for found in (as_mapping(node), attributes(node)):
        if found is not None and step in found:
            return found[step]
    what = node.qualname if isinstance(node, PyObject) else type(node).__name__
    raise UnsupportedError(f"cannot change {brief(step)} inside a {what}")


def _with_part(node: Any, step: Any, value: Any) -> Any:
    if isinstance(node, (list, tuple)):
        return type(node)(value if i == step else child for i, child in enumerate(node))
    if isinstance(node, dict):
        return {name: value if name == step else child for name, child in node.items()}
    mapping = as_mapping(node)
    if mapping is not None and step in mapping:
        return node.with_mapping(_with_part(mapping, step, value), node.state)
    if isinstance(node.state, dict):
        return node.with_state(_with_part(node.state, step, value))
    last = max(i for i, layer in enumerate(node.state) if isinstance(layer, dict) and step in layer)
    return node.with_state(_with_part(node.state, last, _with_part(node.state[last], step, value)))


def with_content(mapping: Any, content: dict[Any, Any]) -> Any:
    """Returns a dict, or the stand-in of a dict subclass, with other content."""
    return mapping.with_mapping(content, mapping.state) if isinstance(mapping, PyObject) else content


# --- values in messages ------------------------------------------------------------------------------------------


def brief(value: object, room: int = 100) -> str:
    """Returns the ``repr`` of any value, cut to ``room`` characters, at a bounded cost: for messages."""
    text = _brief(value, room, 4)
    return text if len(text) <= room else f"{text[: room - 3]}..."


def _brief(value: object, room: int, depth: int) -> str:
    if isinstance(value, int) and value.bit_length() > 256:
        return f"<int of {value.bit_length()} bits>"
    if isinstance(value, (str, bytes, bytearray)):
        return repr(value[:room])
    if isinstance(value, (int, float, type(None), Global, PyObject)):
        return repr(value)
    if not isinstance(value, (dict, list, tuple, set, frozenset)):
        return f"<{type(value).__name__}>"
    if not depth:
        return "..."
    shown = []
    for item in islice(value, 12):
        shown.append(_brief(item, room // 2, depth - 1))
        if isinstance(value, dict):
            shown[-1] += f": {_brief(value[item], room // 2, depth - 1)}"
        if sum(map(len, shown)) > room:
            break
    if len(shown) < len(value):
        shown.append("...")
    text = ", ".join(shown)
    if isinstance(value, tuple):
        return f"({text},)" if len(value) == 1 else f"({text})"
    return f"[{text}]" if isinstance(value, list) else f"{{{text}}}"


def key_text(step: object) -> str:
    """Returns the text of a dict's key: a str unchanged, else what the pickled text, bytes or integer would show.

    Protocol 2 wraps some in a call: bytes (``_codecs.encode``), NumPy's scalars, and instances of subclasses of str.
    """
    if isinstance(step, str):
        return step
    if isinstance(step, PyObject):
        if _as_bytes(step) is not None:
            return brief(_as_bytes(step), MAX_KEY.now())
        if step.qualname == "scalar" and len(step.args) == 2 and step.module.startswith("numpy."):
            return _numpy_text(*step.args) or brief(step)
        if not step.called and len(step.args) == 1 and isinstance(step.args[0], str):
            return step.args[0]
    return brief(step)


def path_text(path: Path) -> str:
    """Returns the steps of a path joined with "/", each as `key_text` gives it.

    Of a path longer than `LONG` characters only the beginning and the end.
    """
    steps = [key_text(step) for step in path]
    if sum(map(len, steps)) + len(steps) <= LONG:
        return "/".join(steps)
    text = "/".join([*(step[:LONG] for step in steps[:20]), *(step[-LONG:] for step in steps[20:][-20:])])
    return f"{text[: LONG // 2]}...{text[-LONG // 2 :]}"


def refuse_key(key: str, url: str | None = None) -> None:
    """Raises LimitError for a key over MAX_KEY characters or MAX_LEVELS dots (work per prefix is quadratic)."""
    if len(key) > MAX_KEY.now():
        raise MAX_KEY.passed(f"a key has {len(key):,} characters", len(key), url)
    levels = key.count(".")
    if levels > MAX_LEVELS.now():
        raise MAX_LEVELS.passed(f"a key has {levels:,} levels", levels, url)


def least_to_refuse() -> int:
    """Returns the length of the shortest key that `refuse_key` could refuse."""
    return min(MAX_KEY.now(), MAX_LEVELS.now()) + 1


def _as_bytes(node: object) -> bytes | None:
    if isinstance(node, bytes):
        return node
    if isinstance(node, PyObject) and (node.module, node.qualname) == ("_codecs", "encode") and len(node.args) == 2:
        text, encoding = node.args
        if isinstance(text, str) and encoding == "latin1" and all(char < "\u0100" for char in text):
            return text.encode("latin1")
    return None


def _numpy_text(dtype: object, data: object) -> str | None:
    """Returns the text of a pickled NumPy text, bytes or integer (``str_`` is UTF-32 with NULs behind), else None."""
    name = dtype.args[0] if isinstance(dtype, PyObject) and dtype.qualname == "dtype" and dtype.args else None
    state = dtype.state if isinstance(dtype, PyObject) and isinstance(dtype.state, tuple) else ()
    raw = _as_bytes(data)
    if raw is None or not isinstance(name, str):
        return None
    big = len(state) > 1 and state[1] == ">"
    if name.startswith("U"):
        return raw.decode("utf-32-be" if big else "utf-32-le", "replace").rstrip("\0")
    if name.startswith("S"):
        return brief(raw.rstrip(b"\0"), MAX_KEY.now())
    if name[:1] in ("i", "u") and len(raw) <= 8:
        return str(int.from_bytes(raw, "big" if big else "little", signed=name[0] == "i"))
    return None
