"""Builds real tensors, arrays and containers from a tree, by the rules of `torch.load`.

The classes and functions that a file may name here are a fixed list: those of ``torch.load(weights_only=True)``,
``collections.defaultdict``, ``torch.return_types``, and NumPy's arrays, scalars and dtypes. Nothing else is imported.
"""

from __future__ import annotations

import re
import sys
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from math import prod
from typing import Any

from ckptool.core.dtypes import DTYPES
from ckptool.core.tensor import Derived, Opaque, Storage, TensorInfo, is_countable
from ckptool.core.tree import Global, PyObject, as_mapping
from ckptool.errors import FormatError, UnsupportedError, UsageError, kind_of
from ckptool.io.files import Files
from ckptool.io.source import Bytes
from ckptool.limits import MAX_DEPTH
from ckptool.pickling.numpy_calls import SCALAR, array_call, itemsize, raw_bytes
from ckptool.values.blocks import storage_blocks, tensor_blocks
from ckptool.values.codec import import_torch

_REBUILT = {
    "_rebuild_qtensor", "_rebuild_sparse_tensor", "_rebuild_nested_tensor", "_rebuild_meta_tensor_no_storage",
}  # fmt: skip
"""Functions of torch._utils that turn an `Opaque` tensor's checked arguments into a tensor."""


_CLASSES: dict[tuple[str, str], Any] = {
    **{
        ("builtins", kind.__name__): kind
        for kind in (set, frozenset, complex, bytearray, bytes, list, dict, tuple, int, float, str, bool)
    },
    ("collections", "OrderedDict"): OrderedDict,
    ("collections", "Counter"): Counter,
}
"""Classes that a tree may name as values, and as what a defaultdict makes."""

_TORCH = {
    *DTYPES, "Size", "Tensor", "device", "per_tensor_affine", "per_tensor_symmetric", "per_channel_affine",
    "per_channel_symmetric", "per_channel_affine_float_qparams",
}  # fmt: skip
"""Names in the module torch that a tree may have as values."""

_MOST_DIMS = 64
"""Dimensions that an array of NumPy may have."""


def to_torch(
    tree: Any, files: Files, map_location: Any, module_state_dict: Callable[[Any], Any], arrays: bool = False
) -> Any:
    """Returns the tree with real tensors, as torch.load would: ties and views share memory, OrderedDicts are real.

    ``map_location``: None, a string, a torch.device, a dict of tags, or a callable (storage, tag) -> storage.
    Stand-ins of classes that were not imported stay as they are; ``module_state_dict`` returns the state_dict
    tree of an nn.Module stand-in, None for anything else. ``arrays``: NumPy's arrays that no operation touched are
    arrays again, not tensors.
    Raises: DependencyError without torch, UnsupportedError for a tensor that only its own class can rebuild.
    """
    torch = import_torch("making real tensors")
    if not (map_location is None or isinstance(map_location, (str, torch.device, dict)) or callable(map_location)):
        taken = "a device, its name, a dict of names or a callable, as torch.load takes it"
        raise UsageError(f"map_location is {taken}, not {kind_of(map_location)}")
    builder = _Builder(torch, files, map_location, module_state_dict, arrays)
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(max(limit, min(8 * MAX_DEPTH.now(), (1 << 31) - 1)))
    try:
        return builder.build(tree)
    finally:
        sys.setrecursionlimit(limit)


class _Builder:
    def __init__(
        self, torch: Any, files: Files, map_location: Any, module_state_dict: Callable[[Any], Any], arrays: bool
    ) -> None:
        self.torch, self.files, self.map_location = torch, files, map_location
        self.module_state_dict = module_state_dict
        self.arrays = arrays
        self.storages: dict[int, Any] = {}
        self.made: dict[int, Any] = {}
        self.dtypes: dict[int, Any] = {}
        self.kept: list[Any] = []

    def build(self, node: Any) -> Any:
        if id(node) in self.made:
            return self.made[id(node)]
        made: Any
        if isinstance(node, TensorInfo):
            made = self.array(node.array) if self.arrays and node.array is not None else None
            made = self.tensor(node) if made is None else made
        elif isinstance(node, Storage):
            made = self.typed(node)
        elif isinstance(node, dict):
            made = self.made[id(node)] = {}
            made.update((self.build(key), self.build(value)) for key, value in node.items())
        elif isinstance(node, list):
            made = self.made[id(node)] = []
            made.extend(self.build(item) for item in node)
        elif isinstance(node, (tuple, set, frozenset)):
            made = type(node)(self.build(item) for item in node)
        elif isinstance(node, PyObject):
            state_dict = self.module_state_dict(node)
            found = self.object(node) if state_dict is None else self.build(state_dict)
            made = node if found is None else found
        elif isinstance(node, Global):
            made = self.named(node)
        else:
            made = node
        self.made[id(node)] = made
        self.kept.append(node)
        return made

    def named(self, node: Global) -> Any:
        """Returns the class or constant that is named, the stand-in itself for one that is not on the lists."""
        if node.module == "torch" and node.qualname in _TORCH:
            return getattr(self.torch, node.qualname, node)
        return _CLASSES.get((_module(node), node.qualname), node)

    def object(self, node: PyObject) -> Any:
        """Returns the real object of a stand-in; None for one that needs a class that is not on the lists."""
        name, args = (_module(node), node.qualname), node.args
        if node.maker is not None or node.kwargs:
            return None
        if name in (("_codecs", "encode"), ("builtins", "bytes"), ("builtins", "bytearray")):
            raw = raw_bytes(node)
            return raw if raw is None else (bytearray if name[1] == "bytearray" else bytes)(raw)
        if name in (("builtins", "set"), ("builtins", "frozenset")) and len(args) == 1 and isinstance(args[0], list):
            return self.set_of(_CLASSES[name], args[0])
        if name == ("builtins", "complex") and {*map(type, args)} <= {int, float}:
            return complex(*args[:2])
        if name[0] == "collections":
            return self.mapping(node)
        if name[0].startswith("numpy"):
            return self.scalar(node) if name in SCALAR else self.array(node)
        return self.of_torch(name, args)

    def set_of(self, kind: Any, items: list[Any]) -> Any:
        try:
            return kind(self.build(item) for item in items)
        except TypeError as error:
            raise FormatError(f"a set that cannot be made: {error}") from error

    def mapping(self, node: PyObject) -> Any:
        """Returns an OrderedDict with its attributes, a Counter, or a defaultdict of one of `_CLASSES`."""
        content, made = as_mapping(node) or {}, None
        if node.qualname in ("OrderedDict", "Counter"):
            made = _CLASSES["collections", node.qualname]()
        elif node.qualname == "defaultdict":
            factory = self.build(node.args[0]) if node.args else None
            made = defaultdict(factory) if factory is None or factory in _CLASSES.values() else None
        if made is not None:
            self.made[id(node)] = made
            for key, value in content.items():
                made[self.build(key)] = self.build(value)
            if not isinstance(made, defaultdict):
                self.attributes(made, node.state)
        return made

    def attributes(self, made: Any, state: Any) -> None:
        """Sets the attributes in the state of a pickled object: its ``__dict__``, or a pair of that and its slots."""
        for layer in state if isinstance(state, tuple) else (state,):
            if isinstance(layer, dict):
                vars(made).update((key, self.build(value)) for key, value in layer.items() if isinstance(key, str))

    def of_torch(self, name: tuple[str, str], args: tuple[Any, ...]) -> Any:
        """Returns torch's sizes, devices, layouts and named tuples."""
        if name == ("torch", "Size") and len(args) == 1:
            return self.torch.Size(self.build(args[0]))
        if name == ("torch", "device"):
            return self.torch.device(*args)
        if name == ("torch.serialization", "_get_layout") and len(args) == 1:
            return getattr(self.torch, str(args[0]).removeprefix("torch."))
        if name[0] == "torch.return_types" and args and isinstance(args[0], tuple):
            kind = vars(self.torch.return_types).get(name[1])
            if isinstance(kind, type) and issubclass(kind, tuple) and len(args[0]) == getattr(kind, "n_fields", -1):
                return kind(self.build(args[0]))
        return None

    def dtype(self, node: Any) -> Any:
        """Returns NumPy's dtype of a pickled one; None for one of another form, in itself, or that NumPy refuses."""
        if id(node) not in self.dtypes:
            self.dtypes[id(node)] = None
            self.dtypes[id(node)] = self.new_dtype(node)
            self.kept.append(node)
        return self.dtypes[id(node)]

    def new_dtype(self, node: Any) -> Any:
        from numpy import dtype

        make: Any = dtype
        state = node.state if isinstance(node, PyObject) and node.qualname == "dtype" and node.args else None
        if not isinstance(state, tuple) or len(state) < 8 or not isinstance(node.args[0], str):
            return None
        _, order, part, names, fields, nbytes = state[:6]
        if order not in ("<", ">", "|", "="):
            return None
        try:
            if isinstance(part, tuple) and len(part) == 2 and isinstance(part[1], tuple):
                base = self.dtype(part[0])
                return None if base is None else make((base, part[1]))
            if isinstance(names, tuple) and isinstance(fields, dict):
                formats = [self.dtype(fields[name][0]) for name in names]
                offsets = [fields[name][1] for name in names]
                made = {"names": [*names], "formats": formats, "offsets": offsets, "itemsize": nbytes}
                return None if any(one is None for one in formats) else make(made)
            if node.args[0][0] in "Mm" and len(state) == 9 and isinstance(state[8], tuple):
                unit, count = state[8][-1][:2]
                text = (raw_bytes(unit) or b"").decode("ascii")
                known = re.fullmatch("[A-Za-z]{1,2}", text) and type(count) is int
                return make(f"{order}{node.args[0]}[{count}{text}]") if known else None
            plain = itemsize(node) or node.args[0] in ("O", "O8", "U0", "S0")
            return make(f"{order}{node.args[0]}") if plain else None
        except (KeyError, IndexError, OverflowError, TypeError, ValueError):
            return None

    def array(self, node: PyObject) -> Any:
        """Returns the array, or dtype, of a stand-in; None for anything else."""
        import numpy as np

        if (node.module, node.qualname) == ("numpy", "dtype"):
            return self.dtype(node)
        found = array_call(node)
        dtype = self.dtype(found[1]) if found else None
        if found is None or dtype is None:
            return None
        raw, _, shape, order, axes = found
        if not isinstance(shape, tuple) or len(shape) > _MOST_DIMS or not all(type(n) is int and n >= 0 for n in shape):
            return None
        if not is_countable(shape) or order not in ("C", "F", "K"):
            return None
        if dtype.kind == "O" and isinstance(raw, list) and len(raw) == prod(shape) and order != "K":
            made = self.made[id(node)] = np.empty(shape, object, order)
            for index, item in enumerate(raw):
                made.flat[index] = self.build(item)
            return made
        data = None if dtype.hasobject or not dtype.itemsize else raw_bytes(raw)
        if data is None or len(data) != prod(shape) * dtype.itemsize:
            return None
        flat = np.frombuffer(bytearray(data), dtype) if data else np.empty(0, dtype)
        if node.qualname == "_reconstruct" and not dtype.isnative and not dtype.names:  # as NumPy's __setstate__ does
            flat = flat.astype(dtype.newbyteorder("="))
        return flat.reshape(shape).transpose(axes) if order == "K" else flat.reshape(shape, order=order)

    def scalar(self, node: PyObject) -> Any:
        """Returns one of NumPy's scalars; None for anything else."""
        import numpy as np

        dtype = self.dtype(node.args[0]) if len(node.args) == 2 else None
        if dtype is None or dtype.hasobject or (data := raw_bytes(node.args[1])) is None or len(data) != dtype.itemsize:
            return None
        return np.frombuffer(data, dtype)[0] if data else np.zeros((), dtype)[()]

    def storage(self, storage: Storage, views: list[TensorInfo]) -> Any:
        if id(storage) not in self.storages:
            unit = 1
            if storage.byteorder == "big":
                dtype = storage.dtype or (views[0].dtype if views else "uint8")
                unit = DTYPES[dtype].swap_unit
            blocks = storage_blocks(storage, self.files, 0, storage.nbytes, unit)
            self.fill(storage, storage.nbytes, blocks, storage.location)
        return self.storages[id(storage)]

    def computed(self, info: TensorInfo) -> Any:
        """Returns the storage of computed values that a tensor is a view of."""
        source = info.source
        if id(source) not in self.storages:
            count = source.numel if isinstance(source, Derived) else 0
            whole = replace(info, shape=(count,), stride=(1,), storage_offset=0, extras=None)
            self.fill(source, whole.nbytes, tensor_blocks(whole, self.files), info.location)
        return self.storages[id(source)]

    def fill(self, source: Any, nbytes: int, blocks: Iterator[Bytes], location: str) -> None:
        """Makes the real storage for a `Storage` or `Derived` source, and copies its bytes there."""
        if str(self.map_location) == "meta":  # nothing is read, as in torch.load
            made = self.torch.UntypedStorage(nbytes, device="meta")
        else:
            raw = bytearray(nbytes)
            position = 0
            for block in blocks:
                raw[position : position + len(block)] = block
                position += len(block)
            made = self.untyped(raw)
        self.storages[id(source)] = self.restored(made, location)
        self.kept.append(source)

    def untyped(self, raw: bytearray) -> Any:
        torch = self.torch
        return torch.frombuffer(raw, dtype=torch.uint8).untyped_storage() if raw else torch.UntypedStorage(0)

    def restored(self, untyped: Any, location: str) -> Any:
        """Returns the storage on the device that ``map_location`` names, by the rules of torch.load."""
        restore = self.torch.serialization.default_restore_location
        where = self.map_location
        if isinstance(where, dict):
            return restore(untyped, where.get(location, location))
        if where is None or isinstance(where, (str, self.torch.device)):
            return restore(untyped, location if where is None else str(where))
        placed = where(untyped, location)
        if placed is not None and not hasattr(placed, "device"):
            raise UsageError(f"map_location returned {kind_of(placed)}: expected a storage, or None for torch's choice")
        return restore(untyped, location) if placed is None else placed

    def tensor(self, info: TensorInfo) -> Any:
        made = self.opaque(info.source) if isinstance(info.source, Opaque) else self.dense(info)
        if info.is_parameter:
            made = self.torch.nn.Parameter(made, requires_grad=info.requires_grad)
        elif info.requires_grad:
            made.requires_grad = True
        if info.extras is not None:
            self.made[id(info)] = made
            self.attributes(made, info.extras.state)
        return made

    def dense(self, info: TensorInfo) -> Any:
        torch = self.torch
        if not hasattr(torch, info.dtype):
            raise UnsupportedError(f"torch has no dtype {info.dtype}")
        dtype = getattr(torch, info.dtype)
        source: Any = info.source
        storage = self.computed(info) if isinstance(source, Derived) else self.storage(source, [info])
        made = torch.empty(0, dtype=dtype, device=storage.device)
        made.set_(storage, info.storage_offset, info.shape, info.stride)
        if info.extras is not None:
            made = made.conj() if info.extras.conj else made
            made = torch._neg_view(made) if info.extras.neg else made
        return made

    def opaque(self, source: Opaque) -> Any:
        name, args = source.node.qualname, source.node.args
        if not source.in_torch:
            raise UnsupportedError(f"torch has no {source.kind}")
        if source.kind == "nested_jagged":
            from torch.nested._internal.nested_tensor import _rebuild_njt

            made = _rebuild_njt(*self.build(args[2]))  # type: ignore[no-untyped-call]
            self.attributes(made, args[3])
            return made
        if name not in _REBUILT:
            raise UnsupportedError(f"a {source.kind} tensor can only be rebuilt by its own class")
        return getattr(self.torch._utils, name)(*map(self.build, args))

    def typed(self, storage: Storage) -> Any:
        """Returns the storage as torch.load gives it, with a dtype: that of an UntypedStorage is uint8."""
        untyped = self.storage(storage, [])
        dtype = getattr(self.torch, storage.dtype or "uint8")
        return self.torch.storage.TypedStorage(wrap_storage=untyped, dtype=dtype, _internal=True)


def _module(node: PyObject | Global) -> str:
    return "builtins" if node.module == "__builtin__" else node.module
