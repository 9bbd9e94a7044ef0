"""Which storages a written torch file has, and where in them each tensor lies.

Memory that is shared stays shared. Memory that no tensor uses is not written: a storage shrinks to the range
its views reach, and a lone view with gaps becomes its own elements in C order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from ckptool import pickles, rebuild
from ckptool.checkpoint import Derived, Opaque, Span, Storage, TensorInfo, contiguous_stride
from ckptool.data import Bytes, storage_blocks, tensor_blocks
from ckptool.dtypes import DTYPES
from ckptool.errors import UnsupportedError
from ckptool.files import Files
from ckptool.tree import Global, PyObject, walk

MapLocation = Callable[[str], str]
"""Maps a device tag to the one that is written."""


class Content(NamedTuple):
    """What a written storage holds: bytes of an old storage from ``start`` on, or a tensor's elements in C order."""

    source: Storage | TensorInfo
    start: int = 0
    swap_unit: int = 1
    crc32: int | None = None


class Layout:
    """The storages that a tree will be written with."""

    def __init__(self, tree: Any, map_location: MapLocation | None = None) -> None:
        self.map_location = map_location or (lambda tag: tag)
        self._tree = tree
        self._views: dict[int, list[TensorInfo]] = {}
        self._old: dict[int, Storage] = {}
        self._new: dict[int, tuple[Storage, int]] = {}
        self._contents: dict[int, Content] = {}
        whole: set[int] = set()
        for _, node in walk(tree, inside=True):
            if isinstance(node, TensorInfo) and not isinstance(node.source, Opaque):
                self._views.setdefault(id(node.source), []).append(node)
                if isinstance(node.source, Storage):
                    self._old[id(node.source)] = node.source
            elif isinstance(node, Storage):
                self._old[id(node)] = node
                whole.add(id(node))
        for identity in {**self._views, **self._old}:
            self._place(identity, identity in whole)

    def _place(self, identity: int, whole: bool) -> None:
        """Decides the written storage for one source, and how far its tensors' offsets move."""
        views = self._views.get(identity, [])
        old = self._old.get(identity)
        if old is not None and len(views) == 1 and not whole and old.byteorder == "little" and views[0].is_whole:
            content = Content(old, 0, 1, old.crc32)  # nearly every storage: one tensor, all of it
            self._add(identity, content, _typed(views[0].dtype), old.nbytes, old.location, 0)
            return
        if old is None:
            self._place_derived(identity, [view for view in views if view.numel] or views)
            return
        kinds = {view.dtype for view in views if view.numel}
        low, high = 0, old.nbytes
        if not whole:
            reach = [_reach(view) for view in views if view.numel]
            low, high = min((a for a, _ in reach), default=0), max((b for _, b in reach), default=0)
            if low % 16 and len(kinds) > 1:
                low -= low % 16  # views of several dtypes: keep every one of them aligned
            lone = next((view for view in views if view.numel), None)
            if lone and all(view.view == lone.view for view in views if view.numel) and lone.nbytes < high - low:
                content = Content(lone if not lone.extras else replace(lone, extras=None))
                self._add(identity, content, _typed(lone.dtype), lone.nbytes, old.location, -1)
                return
        dtype = _typed(next(iter(kinds))) if len(kinds) == 1 else old.dtype if not kinds else None
        if whole:
            dtype = old.dtype
        unit = 1
        if old.byteorder == "big":
            units = {DTYPES[kind].swap_unit for kind in kinds or {old.dtype or "uint8"}}
            if len(units) > 1:
                raise UnsupportedError("a big-endian storage is viewed under dtypes of several sizes")
            unit = units.pop()
        entire = low == 0 and high == old.nbytes and unit == 1
        content = Content(old, low, unit, old.crc32 if entire else None)
        self._add(identity, content, dtype, high - low, old.location, low)

    def _place_derived(self, identity: int, views: list[TensorInfo]) -> None:
        """Decides the written storage for computed values: of one view its elements, of several all there are."""
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
        """Returns the storage that is written for an old one or for values to compute (a written one: itself)."""
        if isinstance(storage, Storage) and id(storage) in self._contents:
            return storage
        return self._new[id(storage)][0]

    def content(self, storage: Storage) -> Content:
        """Returns what a written storage holds."""
        return self._contents[id(storage)]

    def blocks(self, storage: Storage, files: Files) -> Iterator[Bytes]:
        """Yields the bytes of a written storage, little-endian."""
        piece = self.content(storage)
        if isinstance(piece.source, TensorInfo):
            return tensor_blocks(piece.source, files)
        return storage_blocks(piece.source, files, piece.start, storage.nbytes, piece.swap_unit)

    def pickled(self, persistent_id: Callable[[Storage, int], Any]) -> tuple[bytes, list[Storage]]:
        """Returns the tree's pickle, and the storages it names in the order of first use.

        ``persistent_id`` is asked for the id of a written storage and its number in that order.
        """
        order: dict[int, int] = {}
        used: list[Storage] = []

        def reduce(node: Any) -> pickles.Reduced:
            return self.call(node) if isinstance(node, TensorInfo) else None

        def id_of(node: Any) -> Any:
            if not isinstance(node, Storage):
                return None
            storage = self.written(node)
            if id(storage) not in order:
                order[id(storage)] = len(used)
                used.append(storage)
            return persistent_id(storage, order[id(storage)])

        return pickles.dump(self._tree, reduce=reduce, persistent_id=id_of), used

    def call(self, tensor: TensorInfo) -> tuple[Global, tuple[Any, ...]] | PyObject:
        """Returns (function, args) that rebuild a tensor on its written storage; an opaque one's call as it was."""
        if isinstance(tensor.source, Opaque):
            return tensor.source.node
        if not DTYPES[tensor.dtype].in_torch:
            raise UnsupportedError(f"torch has no dtype {tensor.dtype}")
        storage, shift = self._new[id(tensor.source)]
        if shift < 0 or not tensor.numel:
            return rebuild.call(tensor, storage, 0, contiguous_stride(tensor.shape or ()))
        moved = tensor.storage_offset - shift * 8 // DTYPES[tensor.dtype].bits
        return rebuild.call(tensor, storage, moved, tensor.stride)


def _typed(dtype: str) -> str | None:
    return dtype if DTYPES[dtype].storage else None


def _reach(view: TensorInfo) -> tuple[int, int]:
    """Returns the bytes (first, behind the last) of its storage that a view with elements touches."""
    bits = DTYPES[view.dtype].bits
    last = view.storage_offset + sum(
        (size - 1) * step for size, step in zip(view.shape or (), view.stride, strict=True)
    )
    return view.storage_offset * bits // 8, -(-(last + 1) * bits // 8)
