"""Decides which storages a torch file is written with, and the offset of each tensor in them.

Tensors that share memory still share it. Memory that no tensor uses is not written: a storage shrinks to the byte
range that its views use, and a single view with gaps is written as its own elements in C order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from ckptool.core.dtypes import DTYPES
from ckptool.core.tensor import Derived, Opaque, Span, Storage, TensorInfo, contiguous_stride, reach
from ckptool.core.tree import PyObject, nodes
from ckptool.errors import UnsupportedError
from ckptool.io.files import Files
from ckptool.io.source import Bytes
from ckptool.pickling import dump as picklewriter
from ckptool.pickling import torch_calls as rebuild
from ckptool.values.blocks import blocks_ahead, storage_blocks

MapLocation = Callable[[str], str]
"""Maps a storage's device tag to the device tag that is written."""


class Content(NamedTuple):
    """What a written storage holds: bytes of an input storage from ``start`` on, or a tensor's elements in C order."""

    source: Storage | TensorInfo
    start: int = 0
    swap_unit: int = 1
    crc32: int | None = None


class Layout:
    """The storages that a tree will be written with."""

    def __init__(self, tree: Any, map_location: MapLocation | None = None) -> None:
        self.map_location = map_location or (lambda tag: tag)
        self._moves = map_location is not None
        self._tree = tree
        self._views: dict[int, list[TensorInfo]] = {}
        self._old: dict[int, Storage] = {}
        self._new: dict[int, tuple[Storage, int]] = {}
        self._contents: dict[int, Content] = {}
        self._arrays: dict[int, PyObject] = {}
        lone: dict[int, TensorInfo] = {}
        whole: set[int] = set()
        for node in nodes(tree):
            if isinstance(node, TensorInfo):
                if type(node.source) is Storage and node.source.span.memory is not None and (array := node.array):
                    self._arrays[id(node)] = array
                    continue
                identity = id(node.source)
                first = lone.setdefault(identity, node)
                if first is not node and type(node.source) is not Opaque:
                    self._views.setdefault(identity, [first]).append(node)
            elif isinstance(node, Storage):
                self._old[id(node)] = node
                whole.add(id(node))
        for identity, tensor in lone.items():
            source = tensor.source
            if type(source) is Opaque:
                continue
            if identity not in self._views and identity not in whole and self._stays(tensor, source):
                continue
            self._views.setdefault(identity, [tensor])
            if isinstance(source, Storage):
                self._old[identity] = source
        for identity in {**self._views, **self._old}:
            self._place(identity, identity in whole)

    def _stays(self, tensor: TensorInfo, old: Storage | Derived | Opaque) -> bool:
        """Returns whether a storage is written unchanged, as most are: its only tensor uses all of it."""
        if not isinstance(old, Storage) or old.byteorder == "big" or not tensor.is_whole:
            return False
        if old.dtype != _typed(tensor.dtype) or (self._moves and self.map_location(old.location) != old.location):
            return False
        self._new[id(old)] = old, 0
        return True

    def _place(self, identity: int, whole: bool) -> None:
        """Decides the written storage for one source, and how far its tensors' offsets shift."""
        views = self._views.get(identity, [])
        old = self._old.get(identity)
        if old is not None and len(views) == 1 and not whole and old.byteorder == "little" and views[0].is_whole:
            content = Content(old, 0, 1, old.crc32)
            self._add(identity, content, _typed(views[0].dtype), old.nbytes, old.location, 0)
            return
        if old is None:
            self._place_derived(identity, [view for view in views if view.numel] or views)
            return
        kinds = {view.dtype for view in views}
        low, high = 0, old.nbytes
        if not whole:
            ranges = [_reach(view) for view in views if view.numel]
            low, high = min((begin for begin, _ in ranges), default=0), max((end for _, end in ranges), default=0)
            if low % 16 and len(kinds) > 1:
                low -= low % 16  # views of several dtypes: keep each of them aligned
            lone = next((view for view in views if view.numel), None)
            if lone and all(view.view == lone.view for view in views if view.numel) and lone.nbytes < high - low:
                content = Content(lone if not lone.extras else replace(lone, extras=None))
                self._add(identity, content, _typed(lone.dtype), lone.nbytes, old.location, -1)
                return
        dtype = old.dtype if whole else _typed(next(iter(kinds))) if len(kinds) == 1 else None
        unit = 1
        if old.byteorder == "big":
            filled = {view.dtype for view in views if view.numel}
            units = {DTYPES[kind].swap_unit for kind in filled or {old.dtype or "uint8"}}
            if len(units) > 1:
                raise UnsupportedError("a big-endian storage is viewed under dtypes of several sizes")
            unit = units.pop()
        entire = low == 0 and high == old.nbytes and unit == 1
        content = Content(old, low, unit, old.crc32 if entire else None)
        self._add(identity, content, dtype, high - low, old.location, low)

    def _place_derived(self, identity: int, views: list[TensorInfo]) -> None:
        """Decides the written storage for computed values: of one view its elements, of several views all values."""
        first = views[0]
        if isinstance(first.source, Derived) and any(view.view != first.view for view in views):
            whole = TensorInfo(first.dtype, (first.source.numel,), (1,), 0, first.source)
            self._add(identity, Content(whole), _typed(first.dtype), whole.nbytes, first.location, 0)
        else:
            self._add(identity, Content(first), _typed(first.dtype), first.nbytes, first.location, -1)

    def _add(self, identity: int, content: Content, dtype: str | None, nbytes: int, location: str, shift: int) -> None:
        storage = Storage(Span("", 0, nbytes), dtype, self.map_location(location))
        self._new[identity] = storage, shift
        self._contents[id(storage)] = content

    def written(self, storage: Storage | Derived) -> Storage:
        """Returns the storage written for an input storage or computed values; returns a written storage unchanged."""
        if id(storage) in self._contents and isinstance(storage, Storage):
            return storage
        return self._new[id(storage)][0]

    def content(self, storage: Storage) -> Content:
        """Returns what a written storage holds."""
        return self._contents.get(id(storage)) or Content(storage, 0, 1, storage.crc32)

    def blocks(self, storage: Storage, files: Files) -> Iterator[Bytes]:
        """Yields the bytes of a written storage, little-endian."""
        content = self.content(storage)
        if isinstance(content.source, TensorInfo):
            return blocks_ahead(content.source, files)
        return storage_blocks(content.source, files, content.start, storage.nbytes, content.swap_unit)

    def pickled(self, key: Callable[[int], str], tail: tuple[Any, ...] = ()) -> tuple[bytes, list[Storage]]:
        """Returns the pickle of the tree, and the storages it refers to in the order of first use.

        ``key`` makes a storage's key from its number in that order; ``tail`` is appended to every persistent id.
        """
        numbers: dict[int, int] = {}
        used: list[Storage] = []
        forms: dict[tuple[Any, ...], picklewriter.Form] = {}

        def key_of(storage: Storage) -> str:
            number = numbers.get(id(storage))
            if number is None:
                number = numbers[id(storage)] = len(used)
                used.append(storage)
            return key(number)

        def reduce(tensor: Any) -> picklewriter.Reduced:
            if not isinstance(tensor, TensorInfo):
                return None
            source = tensor.source
            if isinstance(source, Opaque):
                if not source.in_torch:
                    raise UnsupportedError(f"torch has no {source.kind}")
                return source.node
            if id(tensor) in self._arrays:
                return self._arrays[id(tensor)]
            storage, offset, stride = self._placed(tensor)
            if tensor.extras is not None or storage.dtype != tensor.dtype:
                return rebuild.call(tensor, storage, offset, stride)
            kind = tensor.dtype, storage.location, tensor.requires_grad, tensor.is_parameter
            form = forms.get(kind)
            if form is None:
                form = forms[kind] = rebuild.form(*kind, tail)
            return form, key_of(storage), (rebuild.storage_numel(storage), offset, tensor.shape, stride)

        def id_of(node: Any) -> Any:
            if not isinstance(node, Storage):
                return None
            storage = self.written(node)
            return (*rebuild.persistent_id(storage, key_of(storage)), *tail)

        return picklewriter.dump(self._tree, reduce=reduce, persistent_id=id_of), used

    def _placed(self, tensor: TensorInfo) -> tuple[Storage, int, tuple[int, ...]]:
        """Returns (written storage, offset, stride) of a dense tensor."""
        if not DTYPES[tensor.dtype].in_torch:
            raise UnsupportedError(f"torch has no dtype {tensor.dtype}")
        storage, shift = self._new[id(tensor.source)]
        if shift == 0 and 0 not in (tensor.shape or ()):
            return storage, tensor.storage_offset, tensor.stride
        if shift < 0 or not tensor.numel:
            return storage, 0, contiguous_stride(tensor.shape or ())
        return storage, tensor.storage_offset - shift * 8 // DTYPES[tensor.dtype].bits, tensor.stride


def _typed(dtype: str) -> str | None:
    return dtype if DTYPES[dtype].storage else None


def _reach(view: TensorInfo) -> tuple[int, int]:
    """Returns the byte range (begin, end) of its storage that a view with elements uses."""
    bits = DTYPES[view.dtype].bits
    end = view.storage_offset + reach(view.shape or (), view.stride)
    return view.storage_offset * bits // 8, -(-end * bits // 8)
