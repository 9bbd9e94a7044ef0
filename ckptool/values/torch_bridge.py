"""Builds real tensors from a tree, by the rules of `torch.load`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from ckptool.core.dtypes import DTYPES
from ckptool.core.tensor import Derived, Opaque, Storage, TensorInfo
from ckptool.core.tree import Global, PyObject, as_mapping, attributes
from ckptool.errors import UnsupportedError
from ckptool.io.source import Bytes, Files
from ckptool.values.blocks import storage_blocks, tensor_blocks
from ckptool.values.codec import import_torch

_REBUILT = {
    "_rebuild_qtensor", "_rebuild_sparse_tensor", "_rebuild_nested_tensor", "_rebuild_meta_tensor_no_storage",
}  # fmt: skip
"""Functions of torch._utils that turn an `Opaque` tensor's checked arguments into a tensor."""


def to_torch(tree: Any, files: Files, map_location: Any, module_state_dict: Callable[[Any], Any]) -> Any:
    """Returns the tree with real tensors, as torch.load would: ties and views share memory, OrderedDicts are real.

    ``map_location``: None, a string, a torch.device, a dict of tags, or a callable (storage, tag) -> storage.
    Stand-ins of classes that were not imported stay as they are; ``module_state_dict`` returns the state_dict
    tree of an nn.Module stand-in, None for anything else.
    Raises: DependencyError without torch, UnsupportedError for a tensor that only its own class can rebuild.
    """
    return _Builder(import_torch("making real tensors"), files, map_location, module_state_dict).build(tree)


class _Builder:
    def __init__(self, torch: Any, files: Files, map_location: Any, module_state_dict: Callable[[Any], Any]) -> None:
        self.torch, self.files, self.map_location = torch, files, map_location
        self.module_state_dict = module_state_dict
        self.storages: dict[int, Any] = {}
        self.made: dict[int, Any] = {}
        self.kept: list[Any] = []

    def build(self, node: Any) -> Any:
        if id(node) in self.made:
            return self.made[id(node)]
        made: Any
        if isinstance(node, TensorInfo):
            made = self.tensor(node)
        elif isinstance(node, Storage):
            made = self.storage(node, [])
        elif isinstance(node, dict):
            made = self.made[id(node)] = {}
            made.update((self.build(key), self.build(value)) for key, value in node.items())
        elif isinstance(node, list):
            made = self.made[id(node)] = []
            made.extend(self.build(item) for item in node)
        elif isinstance(node, tuple):
            made = tuple(self.build(item) for item in node)
        elif isinstance(node, PyObject):
            if (state_dict := self.module_state_dict(node)) is not None:
                made = self.build(state_dict)
            elif as_mapping(node) is not None and node.qualname == "OrderedDict":
                made = self.ordered_dict(node)
            else:
                made = self.known(node)
        elif isinstance(node, Global) and node.module == "torch" and node.qualname in DTYPES:
            made = getattr(self.torch, node.qualname)
        else:
            made = node
        self.made[id(node)] = made
        self.kept.append(node)
        return made

    def ordered_dict(self, node: Any) -> Any:
        from collections import OrderedDict

        made: Any = OrderedDict()
        self.made[id(node)] = made
        for key, value in (as_mapping(node) or {}).items():
            made[self.build(key)] = self.build(value)
        if "_metadata" in attributes(node):
            made._metadata = self.build(attributes(node)["_metadata"])
        return made

    def known(self, node: Any) -> Any:
        """Returns the real object for torch.Size, torch.device and layouts; any other stays a stand-in."""
        name, args = (node.module, node.qualname), node.args
        if name == ("torch", "Size") and len(args) == 1:
            return self.torch.Size(args[0])
        if name == ("torch", "device"):
            return self.torch.device(*args)
        if name == ("torch.serialization", "_get_layout") and len(args) == 1:
            return getattr(self.torch, str(args[0]).removeprefix("torch."))
        return node

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
        raw = bytearray(nbytes)
        position = 0
        for block in blocks:
            raw[position : position + len(block)] = block
            position += len(block)
        self.storages[id(source)] = self.restored(self.untyped(raw), location)
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
        if where is None or callable(where):
            placed = where(untyped, location) if where else None
            return restore(untyped, location) if placed is None else placed
        return restore(untyped, str(where))

    def tensor(self, info: TensorInfo) -> Any:
        torch = self.torch
        if isinstance(info.source, Opaque):
            return self.opaque(info.source)
        if not hasattr(torch, info.dtype):
            raise UnsupportedError(f"torch has no dtype {info.dtype}")
        dtype = getattr(torch, info.dtype)
        storage = self.computed(info) if isinstance(info.source, Derived) else self.storage(info.source, [info])
        made = torch.empty(0, dtype=dtype, device=storage.device)
        made.set_(storage, info.storage_offset, info.shape, info.stride)
        if info.extras is not None:
            made = made.conj() if info.extras.conj else made
            made = torch._neg_view(made) if info.extras.neg else made
        if info.is_parameter:
            return torch.nn.Parameter(made, requires_grad=info.requires_grad)
        made.requires_grad = info.requires_grad
        return made

    def opaque(self, source: Opaque) -> Any:
        name = source.node.qualname
        if name not in _REBUILT:
            raise UnsupportedError(f"a {source.kind} tensor can only be rebuilt by its own class")
        args = [self.storage_as_typed(arg) if isinstance(arg, Storage) else self.build(arg) for arg in source.node.args]
        if name == "_rebuild_qtensor":
            params = args[4]
            args[4] = (getattr(self.torch, params[0].qualname), *params[1:])
        return getattr(self.torch._utils, name)(*args)

    def storage_as_typed(self, storage: Storage) -> Any:
        untyped = self.storage(storage, [])
        dtype = getattr(self.torch, storage.dtype or "uint8")
        return self.torch.storage.TypedStorage(wrap_storage=untyped, dtype=dtype, _internal=True)
