"""torch.save's stream of pickles (torch < 1.6, and ``_use_new_zipfile_serialization=False``).

    pickle(0x1950a86a20f9469cfc6c)  pickle(1001)  pickle({"protocol_version", "little_endian", "type_sizes"})
    pickle(tree)
    pickle([storage key, ...])
    for each key: numel (int64), raw bytes

Data are little-endian whatever the header says. Source: ``torch/serialization.py`` (`_legacy_load`).
"""

from __future__ import annotations

from typing import Any

from ckptool import rebuild
from ckptool.checkpoint import Checkpoint, Storage
from ckptool.errors import FormatError
from ckptool.files import File
from ckptool.streams import PickleStream

NAME = "torch-legacy"
MAGIC = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."


def matches(file: File) -> bool:
    """Returns whether it begins with the pickled magic number."""
    return file.size >= len(MAGIC) and file.read(0, len(MAGIC)) == MAGIC


def read(file: File) -> Checkpoint:
    """Returns the checkpoint; reads the pickles and one number per storage, no data.

    The tree's pickle comes before the sizes that say where its storages lie, so the machine runs over it
    twice: once for the storages' types, once for the tree. Raises: FormatError, LimitError.
    """
    stream = PickleStream(file, len(MAGIC))
    if stream.pickle() != 1001:
        raise FormatError("an unknown version of torch's legacy format (1001 is the only one)", file.path)
    stream.pickle()
    start = stream.position
    types: dict[str, str | None] = {}

    def note(pid: Any) -> Any:
        if _is_module(pid):
            return pid[1]
        storage_type, key = _storage_pid(pid)[1:3]
        types[key] = rebuild.dtype_of_storage(storage_type)
        return None

    stream.pickle(persistent_load=note)
    behind = stream.position
    keys = stream.pickle()
    storages: dict[str, Storage] = {}
    sizes: dict[str, int] = {}
    for key in keys if isinstance(keys, list) else ():
        if key not in types or key in storages:
            raise FormatError(f"the storage {key!r} is listed, and named in no tensor or twice", file.path)
        (sizes[key],) = stream.numbers("<q")
        nbytes = rebuild.storage_nbytes(types[key], sizes[key])
        storages[key] = Storage(file.span(stream.skip(nbytes), nbytes), types[key])

    def persistent_load(pid: Any) -> Any:
        if _is_module(pid):
            return pid[1]
        _, _, key, location, numel, *view = _storage_pid(pid)
        storage = storages.get(key)
        if storage is None:
            raise FormatError(f"the storage {key!r} is named by a tensor and absent from the file")
        if sizes[key] != numel:
            raise FormatError(f"the storage {key!r} has {sizes[key]} elements; the tree says {numel}")
        if storage.location != str(location):
            storage = storages[key] = Storage(storage.span, storage.dtype, str(location))
        if view and view[0] is not None:
            return _view(storage, view[0])
        return storage

    again = PickleStream(file, start, behind)
    tree = again.pickle(rebuild.builders, persistent_load)
    return Checkpoint(tree, format=NAME, url=file.path, nbytes=file.size, names=tuple(again.names))


def _is_module(pid: object) -> bool:
    """Whole models name each module class with its source text: ("module", class, file, source)."""
    return isinstance(pid, tuple) and len(pid) == 4 and pid[0] == "module"


def _storage_pid(pid: Any) -> tuple[Any, ...]:
    if isinstance(pid, tuple) and len(pid) in (5, 6) and pid[0] == "storage" and isinstance(pid[2], str):
        return pid
    raise FormatError(f"it refers to something that is no storage: {pid!r}")


def _view(storage: Storage, view: Any) -> rebuild.StorageView:
    """Torch 0.1.10 to 0.4: (key, offset, size) in elements; a tensor's offset is then relative to the view."""
    if not (isinstance(view, tuple) and len(view) == 3 and type(view[1]) is int and view[1] >= 0):
        raise FormatError(f"a storage is viewed as {view!r}")
    return rebuild.StorageView(storage, view[1])
