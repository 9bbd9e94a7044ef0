"""Turns a live model or a dict in memory into a checkpoint, and copies a planned checkpoint into a model."""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

from ckptool.core import keys as names
from ckptool.core.checkpoint import Checkpoint
from ckptool.core.dtypes import DTYPES, nbytes_of
from ckptool.core.tensor import Described, Extras, Opaque, Span, Storage, TensorInfo, contiguous_stride
from ckptool.core.tree import Global, PyObject, nodes, ordered_dict
from ckptool.errors import CkptoolError, UnsupportedError, UsageError, kind_of, listed
from ckptool.io.files import Files
from ckptool.pickling.load import stand_in
from ckptool.pickling.torch_calls import builders
from ckptool.values.blocks import changed_values
from ckptool.values.codec import import_torch
from ckptool.values.torch_bridge import to_torch

_PLAIN = (type(None), bool, int, float, str, bytes)

EXTRA_STATE = "_extra_state"
"""Last segment of the state_dict key with the result of `Module.get_extra_state`."""


def opened(source: Any) -> Checkpoint:
    """Returns the checkpoint of a state_dict or of a torch.nn.Module. Raises: UsageError for anything else."""
    if isinstance(source, Mapping):
        return state_dict_of(source)
    if not is_module(source):
        what = f"a source is a checkpoint, a path or a state_dict, not {kind_of(source)}"
        raise UsageError(f"{what}; a torch.nn.Module stands for its state_dict")
    return checkpoint_of(source)


def is_module(model: object) -> bool:
    """Returns whether it is a torch.nn.Module."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(model, torch.nn.Module)


def refuse_no_module(model: Any) -> Any:
    """Returns the torch module. Raises: UsageError if it is not a torch.nn.Module, DependencyError without torch."""
    torch = import_torch("loading into a model")
    if not is_module(model):
        raise UsageError(f"load_partial loads into a torch.nn.Module, not into a {type(model).__name__}")
    return torch


def checkpoint_of(
    model: Any, source: Checkpoint | None = None, strip: Sequence[str] = (), add: str | None = None, url: str = ""
) -> Checkpoint:
    """Returns a model's state_dict as a checkpoint; the tensors are not copied and stay on their devices.

    ``url``: what messages call it, by default its class. An uninitialised parameter (`torch.nn.LazyLinear`) takes its
    shape from what the source has for it. Raises: UsageError for anything but a torch.nn.Module, and what
    `keys.renamed` raises.
    """
    torch = refuse_no_module(model)
    state = model.state_dict(keep_vars=True)
    modules = dict(model.named_modules(remove_duplicate=False))
    url = url or type(model).__name__
    made = _Reading(torch, url)
    given = {} if source is None else offered(source, state, strip, add)
    tree: dict[Any, Any] = {}
    for key, value in state.items():
        if isinstance(value, torch.Tensor) and torch.nn.parameter.is_lazy(value):
            path, _, name = key.rpartition(".")
            _, theirs = given.get(key, ("", None))
            tree[key] = made.lazy(value, theirs, modules.get(path), name)
        else:
            tree[key] = made.node(value)
    versions = {path: dict(entry) for path, entry in getattr(state, "_metadata", {}).items()}
    return Checkpoint(ordered_dict(tree, ordered_dict(versions)), format="model", url=url)


def state_dict_of(state: Mapping[Any, Any]) -> Checkpoint:
    """Returns a (nested) dict of torch tensors or numpy arrays as the checkpoint that opening a file of it would give.

    Values stay where they are until they are written. Objects of other classes become the stand-ins that reading
    their pickles gives.
    Raises: UsageError for what cannot be pickled, UnsupportedError for sparse, quantised, nested and subclass tensors.
    """
    made = _Whole(sys.modules.get("torch"), sys.modules.get("numpy"))  # None: not imported, so it has no values
    try:
        tree = made.node(state if isinstance(state, dict) else dict(state))
    except RecursionError:
        raise UsageError("the state_dict is nested too deep, or contains itself") from None
    if made.refused:
        raise UnsupportedError(f"cannot be taken from memory, only from a file: {listed(made.refused)}", MEMORY)
    return Checkpoint(tree, url=MEMORY, nbytes=sum(storage.nbytes for storage in made.storages.values()))


MEMORY = "<state_dict>"
"""The path reported for a checkpoint that is a dict in memory."""


def classes_of(model: Any) -> dict[str, str]:
    """Returns {module path: class name}; a class derived from one of torch.nn or transformers has that one's name.

    Any other class has its full name, so it is never mistaken for a class of torch with the same name.
    """
    found = {}
    for path, module in model.named_modules():
        kinds = [kind for kind in type(module).__mro__ if kind.__module__.startswith(("torch.nn.", "transformers."))]
        kind = next((kind for kind in kinds if kind.__name__ != "Module"), None)
        found[path] = kind.__name__ if kind else f"{type(module).__module__}.{type(module).__qualname__}"
    return found


class _Reading:
    """Turns live values into the nodes of a tree; shared objects and shared memory stay shared."""

    def __init__(self, torch: Any, url: str) -> None:
        self.torch, self.url = torch, url
        self.storages: dict[Any, Storage] = {}
        self.made: dict[int, Any] = {}

    def node(self, value: Any) -> Any:
        """Returns a `TensorInfo` for a tensor, a tree for plain extra state, a stand-in for any other object."""
        if id(value) not in self.made:
            self.made[id(value)] = self._node(value)
        return self.made[id(value)]

    def _node(self, value: Any) -> Any:
        if isinstance(value, self.torch.Tensor):
            return self.tensor(value)
        if type(value) in _PLAIN:
            return value
        if type(value) in (list, tuple):
            return type(value)(self.node(item) for item in value)
        if type(value) in (dict, OrderedDict) and all(type(key) in _PLAIN for key in value):
            content = {key: self.node(item) for key, item in value.items()}
            return content if type(value) is dict else ordered_dict(content)
        return Global.named(type(value).__module__, type(value).__qualname__)()

    def lazy(self, value: Any, offered: Any, module: Any, name: str) -> Any:
        """Returns an uninitialised parameter with the shape of an offered tensor, if its layer allows that shape."""
        if not isinstance(offered, TensorInfo) or offered.shape is None or not _allows(module, name, offered.shape):
            return Global.named("torch.nn.parameter", type(value).__name__)()
        dtype = _name(value.dtype)
        span = Span("", 0, nbytes_of(dtype, offered.numel), memory=_uninitialised)
        storage = Storage(span, dtype, str(value.device))
        return self._info(value, offered.shape, contiguous_stride(offered.shape), 0, storage)

    def tensor(self, value: Any) -> TensorInfo:
        """Returns the `TensorInfo` of a live tensor, whose bytes are copied only when they are read."""
        kind = _kind(self.torch, value)
        if kind != "dense":
            shape = None if value.is_nested else tuple(value.shape)
            stride = value.stride() if kind == "meta" else ()
            described = Described(self.url, "a model on meta, which has no values") if kind == "meta" else None
            opaque = Opaque(kind, Global.named("torch", "Tensor")(), described_in=described)
            return self._info(value, shape, stride, 0, opaque)
        untyped = value.untyped_storage()
        address = str(untyped.device), untyped.data_ptr() or id(value)
        if address not in self.storages:
            dtype = _name(value.dtype)
            span = Span("", 0, untyped.nbytes(), memory=partial(_bytes_of, self.torch, untyped))
            self.storages[address] = Storage(span, dtype if DTYPES[dtype].storage else None, str(untyped.device))
        made = self._info(value, tuple(value.shape), value.stride(), value.storage_offset(), self.storages[address])
        conj, neg = bool(value.is_conj()), bool(value.is_neg())
        return replace(made, extras=Extras(conj, neg)) if conj or neg else made

    def _info(self, value: Any, shape: Any, stride: Any, offset: int, source: Storage | Opaque) -> TensorInfo:
        parameter = isinstance(value, self.torch.nn.Parameter)
        return TensorInfo(_name(value.dtype), shape, tuple(stride), offset, source, value.requires_grad, parameter)


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


class _Whole(_Reading):
    """Turns a dict in memory into a tree that can be written: no value may be left out."""

    def __init__(self, torch: Any, numpy: Any) -> None:
        super().__init__(torch, MEMORY)
        self.numpy = numpy
        self.refused: list[str] = []
        self.kept: list[Any] = []  # `made` is keyed by id, which a freed object would leave to another

    def _node(self, value: Any) -> Any:
        self.kept.append(value)
        kind = type(value)
        if (tensor := self.leaf(value)) is not None:
            return tensor
        if kind in _PLAIN or kind is bytearray:
            return value
        if kind in (list, tuple, set, frozenset):
            return kind(self.node(item) for item in value)
        if kind is dict:
            return {self.node(key): self.node(item) for key, item in value.items()}
        if kind is OrderedDict:
            versions = getattr(value, "_metadata", None)
            content = {self.node(key): self.node(item) for key, item in value.items()}
            return ordered_dict(content, None if versions is None else self.node(versions))
        return self.object(value)

    def tensor(self, value: Any) -> TensorInfo:
        kind = "subclass" if self.torch.nn.parameter.is_lazy(value) else _kind(self.torch, value)
        if kind == "meta":
            rebuild = builders["torch._utils", "_rebuild_meta_tensor_no_storage"]
            dtype = Global.named("torch", _name(value.dtype))
            made: TensorInfo = rebuild(dtype, tuple(value.shape), tuple(value.stride()), value.requires_grad)
            return made
        if kind != "dense":
            self.refused.append(f"a {kind} tensor" if kind != "subclass" else f"a {type(value).__name__}")
            return self.tensor(self.torch.empty(0))
        return super().tensor(value)

    def array(self, value: Any) -> TensorInfo:
        """Returns a numpy array as a tensor; arrays that view the same elements are tied."""
        interface = value.__array_interface__
        memory_key = (interface["data"][0], value.shape, value.strides, value.dtype.str)
        dtype, shape = value.dtype.name, tuple(value.shape)
        if memory_key not in self.storages:
            little = value.dtype.newbyteorder("<")

            def memory() -> memoryview:
                flat = self.numpy.ascontiguousarray(value, little).reshape(-1)
                return memoryview(flat.view("u1"))

            span = Span("", 0, nbytes_of(dtype, value.size), memory=memory)
            self.storages[memory_key] = Storage(span, dtype if DTYPES[dtype].storage else None)
        return TensorInfo(dtype, shape, contiguous_stride(shape), 0, self.storages[memory_key])

    def object(self, value: Any) -> Any:
        """Returns the stand-in that reading the object's pickle gives."""
        try:
            return stand_in(value, self.leaf)
        except (CkptoolError, RecursionError):
            raise
        except Exception as error:  # whatever the object's own code raises
            raise UsageError(
                f"the state_dict holds a {type(value).__name__}, which cannot be saved: {error}"
            ) from error

    def leaf(self, value: Any) -> TensorInfo | None:
        """Returns the `TensorInfo` of a tensor or numpy array, None for anything else."""
        if self.torch is not None and isinstance(value, self.torch.Tensor):
            return self.tensor(value)
        if self.numpy is not None and isinstance(value, self.numpy.ndarray) and value.dtype.name in DTYPES:
            return None if hasattr(value, "mask") else self.array(value)  # a masked array is an object of two arrays
        return None


def _kind(torch: Any, value: Any) -> str:
    """Returns ``dense``, or the kind of `Opaque` that a tensor is."""
    if value.is_quantized:
        return "quantized"
    if value.is_nested:
        return "nested_strided" if value.layout == torch.strided else "nested_jagged"
    if torch.utils._python_dispatch.is_traceable_wrapper_subclass(value):  # DTensor is one
        return "subclass"
    if value.layout != torch.strided:
        return _name(value.layout)
    return "meta" if value.is_meta else "dense"


def _allows(module: Any, name: str, shape: tuple[int, ...]) -> bool:
    """Returns whether a lazy layer, whose output size and kernel are fixed, can take a parameter of this shape."""
    outputs = getattr(module, "out_features", None) or getattr(module, "out_channels", None)
    if not isinstance(outputs, int) or name not in ("weight", "bias"):
        return True
    if name == "bias":
        return shape == (outputs,)
    kernel = tuple(getattr(module, "kernel_size", ()))
    if len(shape) != 2 + len(kernel) or shape[2:] != kernel:
        return False
    return (shape[1] * module.groups if getattr(module, "transposed", False) else shape[0]) == outputs


def _bytes_of(torch: Any, untyped: Any) -> memoryview:
    """Returns the bytes of a storage, copied from its device if that is not the CPU."""
    return memoryview(torch.empty(0, dtype=torch.uint8).set_(untyped.cpu()).numpy())


def _uninitialised() -> memoryview:
    raise UnsupportedError("a parameter that is not yet initialised has no values")


def offered(
    source: Checkpoint, keys: Collection[str], strip: Sequence[str], add: str | None
) -> dict[str, tuple[str, Any]]:
    """Returns {key: (the source's key, value)} of those of a model's keys that a source has, matched as in `filter`."""
    entries = source.entries()
    made = names.renamed(entries, strip, add, source.url)
    plain = names.looking_through(made, keys)
    theirs = {plain(name): key for name, key in made.items()}
    found = ((key, theirs.get(plain(key))) for key in keys)
    return {key: (name, entries[name][1]) for key, name in found if name is not None}


def refuse_unwritable(checkpoint: Checkpoint) -> None:
    """Raises UsageError if a model's state_dict has entries that no file can hold: of them only a type was read."""
    found: dict[str, None] = {}
    for key, (_, value) in checkpoint.entries().items():
        for node in nodes(value):
            if isinstance(node, TensorInfo) and node.kind != "dense":
                found[f"{key} ({node.kind})"] = None
            elif isinstance(node, PyObject) and node.qualname != "OrderedDict":
                found[f"{key} ({node.qualname})"] = None
    if found:
        raise UsageError(f"the model's state_dict holds what cannot be written: {listed(found, 20)}", checkpoint.url)


def extra_states(
    target: Checkpoint, source: Checkpoint, chosen: Callable[[str], bool], strip: Sequence[str], add: str | None
) -> dict[str, tuple[str, Any]]:
    """Returns {key: (the source's key, tree)} of a source's extra states for the modules of a model.

    States that need a class of the file are left out, so the model keeps its own; so are tensors of the same shape and
    dtype, which are loaded like any other.
    """
    entries = target.entries()
    found = {}
    for key, (name, value) in offered(source, entries, strip, add).items():
        own = entries[key][1]
        if not _is_extra(key) or not chosen(key):
            continue
        both = isinstance(own, TensorInfo) and isinstance(value, TensorInfo)
        if both and (own.form, own.dtype) == (value.form, value.dtype):
            continue
        if not any(_is_foreign(node) for node in nodes(value)):
            found[key] = name, value
    return found


def _is_extra(key: str) -> bool:
    return key.rpartition(".")[2] == EXTRA_STATE


def _is_foreign(node: object) -> bool:
    return isinstance(node, (PyObject, Global)) and node.qualname != "OrderedDict" and node.module != "torch"


# --- into the model ----------------------------------------------------------------------------------------------


def copy_into(model: Any, planned: Checkpoint, keys: Iterable[str], map_location: Any, assign: bool) -> dict[str, Any]:
    """Copies the planned values of ``keys`` into a model in place, or with ``assign`` makes the tensors the model's.

    Everything is read and computed before the first parameter changes, so the loaded tensors are in memory once more.
    Returns what `changed_values` does, None for no count. Raises: what reading raises; UsageError for tensors that
    stay, or cannot be filled, on meta, and for an extra state that its module refuses.
    """
    torch = import_torch("loading into a model")
    own = model.state_dict(keep_vars=True)
    entries = planned.entries()
    wanted = {key: entries[key][1] for key in keys}
    _refuse_meta(model, own, wanted, assign)
    with Files() as files:
        where = map_location if assign and map_location is not None else "cpu"
        values = to_torch(dict(wanted), files, where, lambda _: None)
        changed = {name: counts or None for name, counts in changed_values(wanted, files).items()}
    states = {key: values.pop(key) for key in list(values) if _is_extra(key)}
    _set_states(model, own, states)
    made: dict[int, Any] = {}
    for key, value in values.items():
        old = own[key]
        if assign and id(old) not in made:  # tied names get the same object
            moved = value.detach() if map_location is not None or old.is_meta else value.detach().to(old.device)
            parameter = isinstance(old, torch.nn.Parameter)
            made[id(old)] = torch.nn.Parameter(moved, requires_grad=old.requires_grad) if parameter else moved
        values[key] = made[id(old)] if assign else value.detach()
    state: Any = OrderedDict()
    for key, old in own.items():
        # The model's own values are passed too, which copies nothing: hooks and quantised modules need all keys.
        if key in values:
            state[key] = values[key]
        elif not _is_extra(key) and not torch.nn.parameter.is_lazy(old):
            state[key] = made.get(id(old), old)
    state._metadata = getattr(own, "_metadata", {})
    result = model.load_state_dict(state, strict=False, assign=assign)
    lost = [key for key in getattr(result, "unexpected_keys", ()) if key in values]
    _put(torch, model, {key: (own[key], values[key]) for key in lost}, assign)
    return changed


def _refuse_meta(model: Any, own: Mapping[str, Any], wanted: Mapping[str, Any], assign: bool) -> None:
    """Raises UsageError for tensors on meta, which have no storage, that cannot be filled or would stay there."""
    if not assign:
        lacking = [key for key in wanted if getattr(own[key], "is_meta", False)]
        if lacking:
            raise UsageError(
                f"on meta, which has no storage to copy into: {listed(lacking)}; assign=True replaces them"
            )
    filled = {id(own[key]) for key in wanted}
    tensors = [*model.named_parameters(), *model.named_buffers()]
    stay = [name for name, value in tensors if value.is_meta and id(value) not in filled and name not in wanted]
    if stay:
        what = f"would stay on meta, since no checkpoint holds them: {listed(stay)}"
        raise UsageError(f"{what}; give them values first, or name a rule for them in init")


def _set_states(model: Any, own: Mapping[str, Any], states: dict[str, Any]) -> None:
    """Calls `set_extra_state` of the modules; if one raises, those called before get their old state back."""
    modules = dict(model.named_modules(remove_duplicate=False))
    done: list[tuple[Any, Any]] = []
    for key, value in states.items():
        module = modules.get(key.rpartition(".")[0])
        if module is None:
            raise UsageError(f"{key}: the model has no such module")
        done.append((module, own[key]))
        try:
            module.set_extra_state(value)
        except Exception as error:  # the module's own code may raise anything
            for other, old in reversed(done):
                with suppress(Exception):
                    other.set_extra_state(old)
            raise UsageError(f"{key}: set_extra_state: {type(error).__name__}: {error}") from error


def _put(torch: Any, model: Any, pairs: Mapping[str, tuple[Any, Any]], assign: bool) -> None:
    """Fills tensors that `load_state_dict` does not know, since a hook renames them in the state_dict."""
    owners: dict[int, list[tuple[dict[str, Any], str]]] = {}
    for module in model.modules():
        for slots in (module._parameters, module._buffers):
            for name, value in slots.items():
                owners.setdefault(id(value), []).append((slots, name))
    for old, value in pairs.values():
        if assign:
            for slots, name in owners.get(id(old), ()):
                slots[name] = value
        elif id(old) in owners:
            with torch.no_grad():
                old.copy_(value)
    lost = [key for key, (old, _) in pairs.items() if id(old) not in owners]
    if lost:
        raise UnsupportedError(f"in the model's state_dict, but it cannot load them: {listed(lost)}")
