"""torch.save's legacy format, a sequence of pickles (torch < 1.6, and ``_use_new_zipfile_serialization=False``).

    pickle(0x1950a86a20f9469cfc6c)  pickle(1001)  pickle({"protocol_version", "little_endian", "type_sizes"})
    pickle(tree)
    pickle([storage key, ...])
    for each key: numel (int64), raw bytes

Data are little-endian whatever ``little_endian`` is. Source: ``torch/serialization.py`` (`_legacy_load`).
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

from ckptool.core.checkpoint import Checkpoint
from ckptool.core.tensor import Derived, Storage, TensorInfo
from ckptool.core.tree import Global, PyObject, brief, path_text, walk
from ckptool.errors import CkptoolError, FormatError, LossError, UnsupportedError, listed
from ckptool.io.files import Files
from ckptool.io.probe import Probe
from ckptool.pickling import torch_calls as rebuild
from ckptool.pickling.load import with_arrays
from ckptool.pickling.streams import FIRST, MAGIC, MAGIC_NUMBER, MAGICS, PickleStream, calls

if TYPE_CHECKING:  # needed only to write, so imported by the functions that do
    from ckptool.formats.layout import Layout, MapLocation
    from ckptool.io.output import Output

VERSION = 1001


def matches(probe: Probe) -> bool:
    """Returns whether its first pickle makes the magic number, or the second the version, whatever else they do.

    torch.load runs the first pickle before it looks at what came of it.
    """
    if probe.head.startswith(MAGICS):
        return True
    begin = probe.file.begin
    stream = PickleStream(probe.file, begin, begin + min(probe.size, FIRST))
    try:
        return any(_is(stream.pickle(), number) for number in (MAGIC_NUMBER, VERSION))
    except CkptoolError:  # no pickle, or a longer one: the next formats say what is wrong with it
        return False


def _is(made: object, number: int) -> bool:
    return type(made) is int and made == number


def read(probe: Probe) -> Checkpoint:
    """Returns the checkpoint; reads the pickles and one number per storage, no tensor data.

    The tree's pickle comes before the sizes that give the storages' offsets, so it is loaded twice: once for the
    dtypes of the storages, once for the tree. Raises: FormatError, LimitError.
    """
    file = probe.file
    stream = PickleStream(file, file.begin)
    for made, number in ((stream.pickle(), MAGIC_NUMBER), (stream.pickle(), VERSION)):
        if not _is(made, number):
            what = f"torch's legacy format with {brief(made)} in place of {number:#x}"
            raise FormatError(f"{what}{calls(stream.names)}", file.path)
    stream.pickle()
    start = stream.position
    types: dict[str, str | None] = {}

    def record_dtype(pid: Any) -> Any:
        pid = rebuild.persistent(pid)
        if _is_module(pid):
            return pid[1]
        storage_type, key = _storage_pid(pid)[1:3]
        dtype = rebuild.dtype_of_storage(storage_type)
        if types.setdefault(key, dtype) != dtype:
            raise UnsupportedError(f"the storage {key!r} is used under two types: {types[key]} and {dtype}")
        return None

    stream.pickle(persistent_load=record_dtype)
    end = stream.position
    keys = stream.pickle()
    storages: dict[str, Storage] = {}
    sizes: dict[str, int] = {}
    located: set[str] = set()
    for key in keys if isinstance(keys, list) else ():
        if not isinstance(key, str) or key not in types or key in storages:
            raise FormatError(f"the storage {brief(key)} is listed, and named in no tensor or twice", file.path)
        (sizes[key],) = stream.numbers("<q")
        nbytes = rebuild.storage_nbytes(types[key], sizes[key])
        storages[key] = Storage(file.span(stream.skip(nbytes), nbytes), types[key])

    def persistent_load(pid: Any) -> Any:
        pid = rebuild.persistent(pid)
        if _is_module(pid):
            return pid[1]
        _, _, key, location, numel, *view = _storage_pid(pid)
        storage = storages.get(key)
        if storage is None:
            raise FormatError(f"the storage {key!r} is named by a tensor and absent from the file")
        if sizes[key] != numel:
            raise FormatError(f"the storage {key!r} has {sizes[key]} elements; the tree says {brief(numel)}")
        if key not in located:  # the first reference gives the device, as in torch
            located.add(key)
            storage = storages[key] = Storage(storage.span, storage.dtype, rebuild.location(location))
        if view and view[0] is not None:
            return _view(storage, view[0])
        return storage

    probe.end = stream.position - file.begin
    second = PickleStream(file, start, end)
    tree = second.pickle(rebuild.builders, persistent_load)
    tree = with_arrays(tree, stream.names, file.span(0, 0))
    return Checkpoint(tree, url=file.path, nbytes=file.size, names=tuple(stream.names))


def _is_module(pid: object) -> bool:
    """Returns whether it is the persistent id of a pickled module's class: ("module", class, file, source)."""
    return isinstance(pid, tuple) and len(pid) == 4 and pid[0] == "module" and isinstance(pid[1], (Global, PyObject))


def _storage_pid(pid: Any) -> tuple[Any, ...]:
    if isinstance(pid, tuple) and len(pid) in (5, 6) and pid[0] == "storage" and isinstance(pid[2], str):
        return pid
    raise FormatError(f"it refers to something that is no storage: {brief(pid)}")


def _view(storage: Storage, view: Any) -> rebuild.StorageView:
    """Returns a storage's view, in torch 0.1.10 to 0.4 (key, offset, size) in elements; tensor offsets start at it."""
    if not (isinstance(view, tuple) and len(view) == 3 and type(view[1]) is int and view[1] >= 0):
        raise FormatError(f"a storage is viewed as {brief(view)}")
    return rebuild.StorageView(storage, view[1])


def check(checkpoint: Checkpoint, map_location: MapLocation | None = None) -> tuple[tuple[str, ...], int]:
    """Returns what `write` would leave out (nothing) and about how many bytes it would write. Raises: as `write`."""
    from ckptool.formats.layout import Layout

    return (), _nbytes(*_pickled(checkpoint, Layout(checkpoint.tree, map_location)))


def _pickled(checkpoint: Checkpoint, layout: Layout) -> tuple[bytes, list[Storage]]:
    """Returns the pickle of the tree, and the storages in the order of first use. Raises: LossError, see `_refuse`."""
    _refuse(checkpoint, layout)
    return layout.pickled(_key, (None,))  # None: the storage is not a view


def _nbytes(pickled: bytes, used: list[Storage]) -> int:
    return len(pickled) + sum(storage.nbytes + 32 for storage in used) + 4096


def write(
    checkpoint: Checkpoint, output: Output, files: Files, map_location: MapLocation | None = None
) -> tuple[str, ...]:
    """Writes the whole tree, streaming; returns what was left out (nothing). Storages are in the order of first use.

    Raises: LossError naming every tensor whose dtype has no storage class, and every nested tensor. Torch writes
    those too, but cannot load the file again: see `_refuse`.
    """
    from ckptool.formats.layout import Layout
    from ckptool.pickling import dump as picklewriter

    layout = Layout(checkpoint.tree, map_location)
    pickled, used = _pickled(checkpoint, layout)
    system = {
        "protocol_version": VERSION,
        "little_endian": True,
        "type_sizes": {"short": 2, "int": 4, "long": 4},
    }
    output.reserve(_nbytes(pickled, used))
    output.write(MAGIC + picklewriter.dump(VERSION) + picklewriter.dump(system) + pickled)
    output.write(picklewriter.dump([_key(number) for number in range(len(used))]))
    for storage in used:
        output.write(struct.pack("<q", rebuild.persistent_id(storage, "")[-1]))
        for block in layout.blocks(storage, files):
            output.write(block)
    return ()


def _key(number: int) -> str:
    """Returns a storage's key: eight digits, so that keys in the order of first use are sorted, as torch sorts them."""
    return f"{number:08}"


def _refuse(checkpoint: Checkpoint, layout: Layout) -> None:
    """Raises LossError naming everything that torch could write in this format, but not load again.

    That is what uses an UntypedStorage, for which torch's loader has no dtype, and nested tensors: the loader needs
    their sizes while it builds the tree, before it has read the storages.
    """
    root = checkpoint.root
    refused: dict[str, None] = {}
    for path, node in walk(checkpoint.tree, inside=True):
        source = node.source if isinstance(node, TensorInfo) else node
        if isinstance(node, TensorInfo) and node.array is not None:
            continue
        if isinstance(source, (Storage, Derived)) and layout.written(source).dtype is None:
            kind = node.dtype if isinstance(node, TensorInfo) else "UntypedStorage"
        elif isinstance(node, TensorInfo) and (node.kind == "nested_strided" or node.foreign):
            kind = node.foreign or node.kind
        else:
            continue  # `walk` also yields the parts of an opaque tensor
        relative = path[len(root) :] if path[: len(root)] == root else path
        refused[f"{path_text(relative)} ({kind})"] = None
    if refused:
        raise LossError(f"torch's legacy format cannot hold {listed(refused, 20)}: no torch could load it again")
