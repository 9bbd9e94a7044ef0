"""Trees: what a pickle or a header holds, in plain Python, with a stand-in for every object of a foreign class.

A tree is made of None, bool, int, float, str, bytes, list, tuple, dict, set, frozenset, of `PyObject` for
everything else, and of leaves that other files define (tensors). Nothing here imports, calls or reads anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, ClassVar, TypeGuard

from ckptool.errors import FormatError, UnsupportedError
from ckptool.limits import MAX_DEPTH, MAX_KEY, MAX_LEVELS, MAX_SHARED, MAX_STEPS

Path = tuple[Any, ...]
"""Steps from the top of a tree: dict keys as they are (int keys stay int), list positions, attribute names."""

LONG = 4096
"""Characters of a path that are shown."""


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
        made.state = made.items = made.mapping = made.maker = made.pairs = None
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
    ``maker``: the object that was called to make it, where that is no class or function by name.
    ``pairs``: what `as_mapping` has made of a list of pairs, and of how many.
    """

    __slots__ = ("args", "called", "items", "kwargs", "maker", "mapping", "pairs", "state")
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
    pairs: tuple[int, dict[Any, Any]] | None

    def __new__(cls, *args: Any, **kwargs: Any) -> PyObject:
        made = cls(*args, **kwargs)  # type(cls).__call__
        made.called = False
        return made

    # What the unpickling machine calls on an object:

    def __call__(self, *args: Any) -> PyObject:
        """Records a call of an object, which makes one of the class that protocol 2 wraps in a ``partial``.

        That is ``functools.partial(cls.__new__, cls, ...)``, for a class whose ``__new__`` takes keywords.
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

    # What a reader of the tree asks:

    def __getitem__(self, key: Any) -> Any:
        return (as_mapping(self) or {})[key]

    def with_mapping(self, mapping: dict[Any, Any], state: Any) -> PyObject:
        """Returns the same kind of dict with other content, and other state (``_metadata``)."""
        made = self.with_state(state)
        if self.args and as_mapping(self) is not self.mapping:
            made.args = ()
        made.mapping = mapping
        return made

    def with_state(self, state: Any) -> PyObject:
        """Returns the same object with another state."""
        made: PyObject = object.__new__(type(self))
        made.args, made.kwargs, made.called, made.maker = self.args, self.kwargs, self.called, self.maker
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
    if node.pairs is None or node.pairs[0] != len(content):  # made once: many places of a tree may share it
        node.pairs = len(content), _dict_of(content)
    return node.pairs[1]


def _dict_of(pairs: list[Any]) -> dict[Any, Any]:
    """Returns the dict that a list of pairs makes; an empty one if it is none."""
    if not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in pairs):
        return {}
    return {} if any(isinstance(name, _NO_KEYS) for name, _ in pairs) else dict(pairs)


_NO_KEYS = (dict, list, set, bytearray, tuple)
"""What such pairs do not begin with: not hashable, or tuples, which the machine has not hashed and counted before."""


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
        if node.maker is not None:
            yield "__call__", node.maker
        for layer in layers(node):
            if isinstance(layer, dict):
                yield from layer.items()
            elif layer is not None:
                yield "__state__", layer


def parts(node: object) -> Iterator[tuple[Any, Any]]:
    """Yields (step, part) for all that a node is made of, as a pickle names it: keys and arguments included."""
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
    elif isinstance(node, Leaf):
        yield from node.inside()
    else:
        yield from children(node)


class Leaf:
    """A leaf with a tree of its own behind it, which a walk enters only when asked to (``inside``)."""

    __slots__ = ()

    @property
    def is_closed(self) -> bool:
        """Returns whether nothing hangs on it."""
        return True

    def inside(self) -> Iterator[tuple[Any, Any]]:
        """Yields (step, child) for what hangs on it."""
        return iter(())


def walk(
    top: object, *, inside: bool = False, closed: Callable[[Any], bool] | None = None
) -> Iterator[tuple[Path, Any]]:
    """Yields (path, node) for every node of a tree, parents first, in the file's order.

    A container that holds itself is not entered again, nor is one for which ``closed`` is true. With ``inside``
    come all the `parts` that a pickle of the tree would have, of leaves too, and a shared container is entered
    only once. Raises: LimitError past `MAX_DEPTH`, `MAX_SHARED`, `MAX_STEPS`.
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
                continue  # nearly every one
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
    """Yields every node that a pickle of the tree has, as `walk` does with ``inside``, but in no order to rely on.

    A container is entered once. Without paths it costs a fifth of a walk.
    """
    yield top
    entered = {id(top)}
    trail = [top] if isinstance(top, _INNER) else []
    while trail:
        node = trail.pop()
        for part in _below(node):
            yield part
            if isinstance(part, Leaf) and part.is_closed:
                continue  # nearly every one
            if isinstance(part, _INNER) and id(part) not in entered:
                entered.add(id(part))
                trail.append(part)


def _below(node: object) -> Iterator[Any]:
    """Returns the `parts` of a node without their steps: a fifth of the cost for a dict of names."""
    return iter(node.values()) if _plain_dict(node) else (part for _, part in parts(node))


def _plain_dict(node: object) -> TypeGuard[dict[str, Any]]:
    return type(node) is dict and set(map(type, node)) <= {str, int}


def check(top: object) -> None:
    """Raises LimitError if a `walk` over the tree would: once, so that whoever walks later need not be prepared."""
    for _ in walk(top):
        pass


def check_inside(top: object) -> None:
    """Raises LimitError if what a pickle of the tree has is nested too deep: behind leaves and in keys, too.

    It enters what a `walk` with ``inside`` does, in the same order, and makes no paths.
    """
    deepest = MAX_DEPTH.now()
    entered = {id(top)}
    trail = [_below(top)]
    while trail:
        for part in trail[-1]:
            if isinstance(part, Leaf):
                if part.is_closed:
                    continue  # nearly every one
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


def replaced(top: Any, path: Path, value: Any) -> Any:
    """Returns the tree with ``value`` at ``path``: containers on the way are copied, all else is the same objects.

    Raises: UnsupportedError if the way leads through something that cannot be copied with one part changed.
    """
    way = []
    for step in path:
        way.append((top, step))
        top = _part(top, step)
    for holder, step in reversed(way):
        value = _with_part(holder, step, value)
    return value


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


# --- what is said of a value -------------------------------------------------------------------------------------


def brief(value: object, room: int = 100) -> str:
    """Returns a value as Python would write it, cut to ``room`` characters: for messages, whatever the value is."""
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
    """Returns a key of a dict as it is shown: text as it is, and text and bytes that protocol 2 wraps in a call.

    Those are bytes (``_codecs.encode``), NumPy's ``str_`` and ``bytes_``, and instances of subclasses of str.
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
    """Returns a path as it is shown: its steps joined with "/", each in few words where it is no text.

    Of a path beyond `LONG` characters it is the begin and the end.
    """
    steps = [key_text(step) for step in path]
    if sum(map(len, steps)) + len(steps) <= LONG:
        return "/".join(steps)
    text = "/".join([*(step[:LONG] for step in steps[:20]), *(step[-LONG:] for step in steps[20:][-20:])])
    return f"{text[: LONG // 2]}...{text[-LONG // 2 :]}"


def refuse_key(key: str, url: str | None = None) -> None:
    """Raises LimitError for a key that is longer, or has more levels, than any work with all of its prefixes bears."""
    if len(key) > MAX_KEY.now():
        raise MAX_KEY.passed(f"a key has {len(key):,} characters", len(key), url)
    levels = key.count(".")
    if levels > MAX_LEVELS.now():
        raise MAX_LEVELS.passed(f"a key has {levels:,} levels", levels, url)


def least_to_refuse() -> int:
    """Returns the characters that a key has at least if `refuse_key` refuses it."""
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
    """Returns the text of a pickled NumPy scalar: ``str_`` is UTF-32, padded with zeros; None for another dtype."""
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
