"""TorchScript archives (`torch.jit.save`): the parameters and buffers of the program, which is not read.

    ROOT/data.pkl              the modules as objects of classes ``__torch__.PACKAGE CLASS``
    ROOT/data/0, 1, ...        raw storages
    ROOT/code/**.py            the text of the classes, ``__torch__/PACKAGE.py``, compressed
    ROOT/constants.pkl         the constants in that text; of a frozen module the weights are here, without names
    ROOT/constants/0, 1, ...   their storages
    ROOT/extra/**              files of the user

torch 1.0 to 1.2 wrote ROOT/model.json, the modules with their parameters and all tensors, and ROOT/tensors/0, 1, ...
The text of a class says which attributes are parameters and buffers, and so keys. Two lines of it are searched.
Source: ``torch/csrc/jit/serialization/{pickler,unpickler,import_source,python_print}.cpp`` of torch 2.13,
``import_legacy.cpp`` of torch 1.5 and ``caffe2/proto/torch.proto`` of torch 1.2.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

from ckptool.core.checkpoint import Checkpoint
from ckptool.core.tensor import Storage, TensorInfo
from ckptool.core.tree import Global, Path, PyObject, brief, path_text, refuse_key, walk
from ckptool.errors import FormatError, UnsupportedError, listed
from ckptool.io.probe import Probe
from ckptool.limits import MAX_HEADER, MAX_INDEX, MAX_KEYS, MAX_PICKLE
from ckptool.pickling import load as pickles
from ckptool.pickling import torch_calls as rebuild
from ckptool.pickling.archives import unpickled

T = TypeVar("T")


class Class(NamedTuple):
    """The attributes of a module's class that are keys. ``buffers``: None if the text does not tell (torch < 1.8)."""

    parameters: frozenset[str]
    buffers: frozenset[str] | None


def matches(probe: Probe) -> bool:
    """Returns whether torch.jit.save wrote it."""
    return not {f"{probe.root}/constants.pkl", f"{probe.root}/model.json"}.isdisjoint(probe.members)


def read(probe: Probe) -> Checkpoint:
    """Returns the state_dict as `torch.jit.load` gives it; reads data.pkl, constants.pkl and the text of the classes.

    Raises: FormatError, LimitError, UnsupportedError.
    """
    found, names, notes = _described(probe) if f"{probe.root}/model.json" in probe.members else _pickled(probe)
    if extra := [name.removeprefix(f"{probe.root}/extra/") for name in probe.members if f"{probe.root}/extra/" in name]:
        notes.append(f"files of the user (extra/) are not read: {listed(extra)}")
    tree = {".".join(path): tensor for path, tensor in found.items()}
    return Checkpoint(tree, url=probe.path, nbytes=probe.size, names=names, notes=tuple(filter(None, notes)))


Names = tuple[tuple[str, str], ...]


def _pickled(probe: Probe) -> tuple[dict[Path, TensorInfo], Names, list[str]]:
    """Returns ({path: tensor}, names, notes) of an archive with pickles."""
    if f"{probe.root}/data.pkl" not in probe.members:
        raise FormatError("a TorchScript archive without data.pkl", probe.path)
    top, names = unpickled(probe, "data", _BUILDERS)
    constants, more = unpickled(probe, "constants", _BUILDERS)
    classes = _Classes(probe)
    found = _state_dict(top, classes)
    others = [path for path, node in walk(top) if isinstance(node, TensorInfo) and path not in found]
    inside = sum(isinstance(node, TensorInfo) for _, node in walk(constants))
    named = listed([path_text(path) for path in others])
    own = tuple(dict.fromkeys(name for name in (*names, *more) if name[0].split(".")[0] != "__torch__"))
    return found, own, [
        f"{OTHERS}: {named}" if others else "",
        f"tensors that are constants of the program, and so no keys: {inside}" + " (a frozen module)" * (not found)
        if inside else "",
        "some classes do not say which tensors are buffers (torch before 1.8): all of them are taken as buffers"
        if classes.untold else "",
        f"{OWN}: {listed(classes.own)}" if classes.own else "",
    ]  # fmt: skip


OTHERS = "tensors that are no parameters or buffers, and so no keys"
OWN = "modules that code of their own would restore have no keys"


# --- the pickle ------------------------------------------------------------------------------------------------------


def _sparse(layout: object, size: object, *rest: object) -> Any:
    """Returns a sparse tensor; TorchScript pickles (layout's number, size, requires_grad, parts ..., hooks)."""
    name = {1: "torch.sparse_coo", 2: "torch.sparse_csr"}.get(layout if type(layout) is int else 0)
    if name is None:
        raise FormatError(f"a sparse tensor of layout {brief(layout)} cannot be understood")
    node = Global.named("torch.serialization", "_get_layout")(name)
    return rebuild.builders["torch._utils", "_rebuild_sparse_tensor"](node, (*rest[1:-1], size))


_BUILDERS: pickles.Builders = {
    **rebuild.builders,
    ("torch._utils", "_rebuild_sparse_tensor"): _sparse,
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
    found = _Found()
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
            found.add((*path, name), tensor)
        holders.append(id(module))
        below = [(name, child) for name, child in module.state.items() if isinstance(child, PyObject)]
        trail.append(iter([((*path, name), child) for name, child in below if type(name) is str]))
    return found


class _Found(dict[Path, TensorInfo]):
    """{path: tensor}."""

    def __init__(self) -> None:
        self.keys_met: set[str] = set()
        self.total, self.most = 0, MAX_KEYS.now()

    def add(self, path: Path, tensor: TensorInfo) -> None:
        """Adds a tensor. Raises: LimitError for a key that is too long, FormatError for one that is there."""
        key = ".".join(path)
        refuse_key(key)
        self.total += len(key)
        if self.total > self.most:
            raise MAX_KEYS.passed("its keys have too many characters in all")
        if key in self.keys_met:
            raise FormatError(f"two tensors have the key {brief(key)}")
        self.keys_met.add(key)
        self[path] = tensor


def _own(state: dict[Any, Any], kind: Class) -> Iterator[tuple[str, TensorInfo]]:
    """Yields (name, tensor) of a module's own parameters, then of its buffers, each in the order of the attributes."""
    tensors = {name: value for name, value in state.items() if isinstance(value, TensorInfo) and type(name) is str}
    yield from ((name, tensor) for name, tensor in tensors.items() if name in kind.parameters)
    others = ((name, tensor) for name, tensor in tensors.items() if name not in kind.parameters)
    yield from ((name, tensor) for name, tensor in others if kind.buffers is None or name in kind.buffers)


# --- torch 1.0 to 1.2 ------------------------------------------------------------------------------------------------

_NAMED = {
    "FLOAT": "float32", "DOUBLE": "float64", "FLOAT16": "float16", "INT64": "int64", "INT32": "int32",
    "INT16": "int16", "INT8": "int8", "UINT8": "uint8", "BYTE": "uint8", "BOOL": "bool",
}  # fmt: skip
"""The dtypes by the names that they have in caffe2's protobuf."""


_NONE: list[Any] = []


def _described(probe: Probe) -> tuple[dict[Path, TensorInfo], Names, list[str]]:
    """Returns ({path: tensor}, names, notes) of an archive with model.json, in the order of `_state_dict`.

    Buffers are parameters that are marked so, or since torch 1.1 attributes of the type Tensor.
    """
    model = probe.json("model.json", MAX_INDEX)
    tensors = _Tensors(probe, _field(model, "tensors", _NONE))
    values, names = tensors.attributes()
    found = _Found()
    others: list[str] = []
    own: list[str] = []
    trail: list[tuple[Path, Any]] = [((), _field(model, "mainModule", {}))]
    while trail:
        path, module = trail.pop()
        refuse_key(".".join(path))
        rows = [(_field(row, "name", ""), row) for row in _field(module, "parameters", _NONE)]
        for is_buffer in (False, True):
            for name, row in rows:
                if _field(row, "isBuffer", False) is is_buffer:
                    found.add((*path, name), tensors.at(_number(row, "tensorId")))
        held = {name for name, _ in rows}
        for row in _field(module, "attributes", _NONE):
            name, number = _field(row, "name", ""), _number(row, "id")
            if name in held or number < 0:
                continue
            if number >= len(values):
                raise FormatError(f"model.json refers to attribute {number}; attributes.pkl has {len(values)}")
            if isinstance(tensor := values[number], TensorInfo) and row.get("type") == "Tensor":
                found.add((*path, name), tensor)
            else:
                inside = walk(values[number])
                others += [path_text((*path, name, *step)) for step, one in inside if isinstance(one, TensorInfo)]
        own += [path_text(path) or "the top"] if "getStateAttributeId" in module else []
        below = [((*path, _field(child, "name", "")), child) for child in _field(module, "submodules", _NONE)]
        trail.extend(reversed(below))
    return found, names, [f"{OTHERS}: {listed(others)}" if others else "", f"{OWN}: {listed(own)}" if own else ""]


class _Tensors:
    """The tensors that model.json lists; those with the same number or record share memory."""

    def __init__(self, probe: Probe, rows: list[Any]) -> None:
        self.probe, self.rows = probe, rows
        self.made: dict[int, TensorInfo] = {}
        self.storages: dict[str, Storage] = {}

    def attributes(self) -> tuple[Sequence[Any], Names]:
        """Returns (values, names) of attributes.pkl; () if there is none, as in torch 1.0."""
        pickled = self.probe.record("attributes.pkl", MAX_PICKLE)
        if pickled is None:
            return (), ()
        pickles.scan(pickled)
        builders = {**rebuild.builders, ("torch.jit._pickle", "build_tensor_from_id"): self.at}
        values, names = pickles.load(pickled, builders=builders)
        if not isinstance(values, (list, tuple)):
            raise FormatError(f"attributes.pkl holds {brief(values)}: expected a list")
        return values, names

    def at(self, number: Any) -> TensorInfo:
        """Returns a tensor by its number. Raises: FormatError, UnsupportedError."""
        if type(number) is not int or not 0 <= number < len(self.rows):
            raise FormatError(f"model.json refers to tensor {brief(number)}, and lists {len(self.rows)}")
        if number not in self.made:
            row = self.rows[number]
            kind = _field(row, "dataType", "")
            if kind not in _NAMED or row.get("isQuantized"):
                what = "is quantised" if kind in _NAMED else f"has the type {brief(kind)}"
                raise UnsupportedError(f"tensor {number} of model.json {what}, which is not supported")
            storage = self._storage(
                _field(_field(row, "data", {}), "key", ""), _NAMED[kind], _field(row, "device", "cpu")
            )
            shape, stride = (tuple(map(_int, _field(row, name, []))) for name in ("dims", "strides"))
            grad = _field(row, "requiresGrad", False)
            self.made[number] = rebuild.strided(storage, _number(row, "offset"), shape, stride, grad)
        return self.made[number]

    def _storage(self, record: str, dtype: str, location: str) -> Storage:
        storage = self.storages.get(record)
        if storage is None:
            if (member := self.probe.members.get(f"{self.probe.root}/{record}")) is None:
                raise FormatError(f"{record!r} is named in model.json and absent from the archive")
            storage = Storage(member.span, dtype, location, crc32=member.crc32 or None, key=record)
            self.storages[record] = storage
        if (storage.dtype, storage.location) != (dtype, location):
            what = f"{storage.dtype} on {storage.location} and {dtype} on {location}"
            raise FormatError(f"{record} is used as two tensors that cannot share memory: {what}")
        return storage


def _field(row: Any, name: str, default: T) -> T:
    """Returns a field of a JSON object; ``default``, which has its type, if it is absent."""
    found = row.get(name, default) if isinstance(row, dict) else None
    if type(found) is not type(default):
        raise FormatError(f"model.json: {name} is {brief(found)}: expected {type(default).__name__}")
    return found


def _number(row: dict[str, Any], name: str) -> int:
    return _int(row.get(name, 0))


def _int(value: Any) -> int:
    """Returns an integer; protobuf's JSON has those of 64 bits as text."""
    if type(value) is str and re.fullmatch(r"-?\d{1,19}", value, re.ASCII):
        return int(value)
    if type(value) is not int:
        raise FormatError(f"model.json has {brief(value)} where a number belongs")
    return value
