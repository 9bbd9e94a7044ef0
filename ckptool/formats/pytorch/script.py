"""TorchScript archives (`torch.jit.save`, torch >= 1.3): the parameters and buffers of the program, which is not read.

    ROOT/data.pkl              the modules as objects of classes ``__torch__.PACKAGE CLASS``
    ROOT/data/0, 1, ...        raw storages
    ROOT/code/**.py            the text of the classes, ``__torch__/PACKAGE.py``, compressed
    ROOT/constants.pkl         the constants in that text; of a frozen module the weights are here, without names
    ROOT/constants/0, 1, ...   their storages
    ROOT/extra/**              files of the user

The text of a class says which attributes are parameters and buffers, and so keys. Two lines of it are searched.
Source: ``torch/csrc/jit/serialization/{pickler,unpickler,import_source,python_print}.cpp`` of torch 2.13.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from ckptool.core.checkpoint import Checkpoint
from ckptool.core.tensor import TensorInfo
from ckptool.core.tree import Global, Path, PyObject, brief, path_text, refuse_key, walk
from ckptool.errors import FormatError, listed
from ckptool.io.probe import Probe
from ckptool.limits import MAX_HEADER, MAX_KEYS
from ckptool.pickling import torch_calls as rebuild
from ckptool.pickling.archives import unpickled
from ckptool.pickling.load import Builders


class Class(NamedTuple):
    """The attributes of a module's class that are keys. ``buffers``: None if the text does not tell (torch < 1.8)."""

    parameters: frozenset[str]
    buffers: frozenset[str] | None


def matches(probe: Probe) -> bool:
    """Returns whether torch.jit.save wrote it."""
    return f"{probe.root}/constants.pkl" in probe.members


def read(probe: Probe) -> Checkpoint:
    """Returns the state_dict as `torch.jit.load` gives it; reads data.pkl, constants.pkl and the text of the classes.

    Raises: FormatError, LimitError.
    """
    if f"{probe.root}/data.pkl" not in probe.members:
        raise FormatError("a TorchScript archive without data.pkl", probe.path)
    top, names = unpickled(probe, "data", _BUILDERS)
    constants, more = unpickled(probe, "constants", _BUILDERS)
    classes = _Classes(probe)
    found = _state_dict(top, classes)
    others = [path for path, node in walk(top) if isinstance(node, TensorInfo) and path not in found]
    inside = sum(isinstance(node, TensorInfo) for _, node in walk(constants))
    extra = [name.removeprefix(f"{probe.root}/extra/") for name in probe.members if f"{probe.root}/extra/" in name]
    named = listed([path_text(path) for path in others])
    notes = [
        f"tensors that are no parameters or buffers, and so no keys: {named}"
        if others else "",
        f"tensors that are constants of the program, and so no keys: {inside}" + " (a frozen module)" * (not found)
        if inside else "",
        "some classes do not say which tensors are buffers (torch before 1.8): all of them are taken as buffers"
        if classes.untold else "",
        f"modules that code of their own would restore have no keys: {listed(classes.own)}" if classes.own else "",
        f"files of the user (extra/) are not read: {listed(extra)}" if extra else "",
    ]  # fmt: skip
    return Checkpoint(
        {".".join(path): tensor for path, tensor in found.items()}, url=probe.path, nbytes=probe.size,
        names=tuple(dict.fromkeys(name for name in (*names, *more) if name[0].split(".")[0] != "__torch__")),
        notes=tuple(filter(None, notes)),
    )  # fmt: skip


# --- the pickle ------------------------------------------------------------------------------------------------------


def _value(value: Any, type_name: object = None) -> Any:
    """Returns the value that a call only adds a type to."""
    return value


def _sparse(layout: object, size: object, *rest: object) -> Any:
    """Returns a sparse tensor; TorchScript pickles (layout's number, size, requires_grad, parts ..., hooks)."""
    name = {1: "torch.sparse_coo", 2: "torch.sparse_csr"}.get(layout if type(layout) is int else 0)
    if name is None:
        raise FormatError(f"a sparse tensor of layout {brief(layout)} cannot be understood")
    node = Global.named("torch.serialization", "_get_layout")(name)
    return rebuild.builders["torch._utils", "_rebuild_sparse_tensor"](node, (*rest[1:-1], size))


_BUILDERS: Builders = {
    **rebuild.builders,
    ("torch._utils", "_rebuild_sparse_tensor"): _sparse,
    **{("torch.jit._pickle", f"build_{kind}list"): _value for kind in ("int", "double", "bool", "tensor")},
    ("torch.jit._pickle", "restore_type_tag"): _value,
}


# --- the classes -----------------------------------------------------------------------------------------------------

_CLASS = re.compile(r"^class (\w+)(?=\W)", re.MULTILINE)
_LIST = re.compile(r"^  __(parameters|buffers)__ = ?(.*)$", re.MULTILINE)
_NAMES = re.compile(r'\[(?:"[^"\\\n]*",? ?)*+\]')
_NAME = re.compile(r'"([^"]*)"')


class _Classes:
    """The classes of an archive by their names; a file of text is read once, when the first of its classes is asked.

    ``untold``: whether a class of a module that was asked does not list its buffers. ``own``: the paths of modules
    whose state is no dict of attributes.
    """

    def __init__(self, probe: Probe) -> None:
        self.probe, self.untold = probe, False
        self.own: list[str] = []
        self.read: dict[str, dict[str, Class | None]] = {}

    def of(self, node: object) -> Class | None:
        """Returns the class of a module, None for any other object. Raises: FormatError if its text is not there."""
        cls: object = type(node)
        if not isinstance(cls, Global) or cls.module.split(".")[0] != "__torch__":
            return None
        if f"{cls.module}.".startswith("__torch__.torch.classes."):  # of C++, without a text
            return None
        name = f"code/{cls.module.replace('.', '/')}.py"
        if name not in self.read:
            self.read[name] = self._classes(name)
        if cls.qualname not in self.read[name]:
            raise FormatError(f"{name}: no text of the class {brief(cls.qualname)}, of which data.pkl has an object")
        found = self.read[name][cls.qualname]
        self.untold = self.untold or (found is not None and found.buffers is None)
        return found

    def _classes(self, name: str) -> dict[str, Class | None]:
        text = (self.probe.record(name, MAX_HEADER) or b"").decode("utf-8", "replace")
        starts = list(_CLASS.finditer(text))
        ends = [*(start.start() for start in starts), len(text)][1:]
        found: dict[str, Class | None] = {}
        for start, end in zip(starts, ends, strict=True):
            lists: dict[str, frozenset[str]] = {}
            for line in _LIST.finditer(text, start.end(), end):
                if not _NAMES.fullmatch(line[2]) or line[1] in lists:
                    raise FormatError(f"{name}: class {start[1]} has no list of names: {brief(line[0].strip())}")
                lists[line[1]] = frozenset(_NAME.findall(line[2]))
            if start[1] in found:
                raise FormatError(f"{name}: the class {start[1]} is there twice")
            known = "parameters" in lists
            found[start[1]] = Class(lists["parameters"], lists.get("buffers")) if known else None
        return found


def _state_dict(top: object, classes: _Classes) -> dict[Path, TensorInfo]:
    """Returns {path: tensor} in the order of `state_dict()`: a module's parameters, its buffers, its submodules."""
    if classes.of(top) is None:
        raise FormatError(f"data.pkl holds {brief(top)}, not a module of TorchScript")
    found: dict[Path, TensorInfo] = {}
    keys: set[str] = set()
    total, most = 0, MAX_KEYS.now()
    trail: list[Iterator[tuple[Path, Any]]] = [iter([((), top)])]
    holders: list[int] = []
    while trail:
        step = next(trail[-1], None)
        if step is None:
            trail.pop()
            del holders[-1:]
            continue
        path, module = step
        kind = classes.of(module)
        if kind is None:
            continue
        if id(module) in holders:
            raise FormatError(f"the module {path_text(path)!r} is inside itself")
        if not isinstance(module.state, dict):  # of its __getstate__, for its __setstate__
            classes.own.append(path_text(path) or "the top")
            continue
        for name, tensor in _own(module.state, kind):
            key = ".".join((*path, name))
            refuse_key(key)
            total += len(key)
            if total > most:
                raise MAX_KEYS.passed("its keys have too many characters in all")
            if key in keys:
                raise FormatError(f"two tensors have the key {brief(key)}")
            keys.add(key)
            found[*path, name] = tensor
        holders.append(id(module))
        below = [(name, child) for name, child in module.state.items() if isinstance(child, PyObject)]
        trail.append(iter([((*path, name), child) for name, child in below if type(name) is str]))
    return found


def _own(state: dict[Any, Any], kind: Class) -> Iterator[tuple[str, TensorInfo]]:
    """Yields (name, tensor) of a module's own parameters, then of its buffers, each in the order of the attributes."""
    tensors = {name: value for name, value in state.items() if isinstance(value, TensorInfo) and type(name) is str}
    yield from ((name, tensor) for name, tensor in tensors.items() if name in kind.parameters)
    others = ((name, tensor) for name, tensor in tensors.items() if name not in kind.parameters)
    yield from ((name, tensor) for name, tensor in others if kind.buffers is None or name in kind.buffers)
