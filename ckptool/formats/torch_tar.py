"""torch.save's first format, a tar archive (torch 0.1.0 to 0.1.5, 2016).

    sys_info
    storages   pickle(n), n x [pickle((key, location, storage class)), numel (int64), raw bytes],
               pickle([(key, key of the base, offset, numel), ...])
    tensors    pickle(n), n x [pickle((key, storage key, tensor class)), ndim (int32), 4 bytes of padding,
               sizes (int64), strides (int64), offset (int64)]
    pickle     the tree; persistent ids are tensor keys, or (class, source file, source) of a module

Source: ``torch/serialization.py`` (`_legacy_load.legacy_load`).
"""

from __future__ import annotations

import tarfile
from typing import Any

from ckptool import rebuild
from ckptool.checkpoint import Checkpoint, Storage, TensorInfo
from ckptool.errors import FormatError
from ckptool.files import File
from ckptool.limits import MAX_DIMS, MAX_TAR_ITEMS
from ckptool.streams import PickleStream
from ckptool.tree import Global, brief

NAME = "torch-tar"

MEMBERS = ("storages", "tensors", "pickle")


def matches(file: File) -> bool:
    """Returns whether it is a tar archive."""
    return file.size >= 512 and file.read(257, 5) == b"ustar"


def read(file: File) -> Checkpoint:
    """Returns the checkpoint; reads the pickles and numbers, no data. Raises: FormatError, LimitError."""
    places = _places(file)
    names: dict[tuple[str, str], None] = {}
    storages: dict[Any, Storage | rebuild.StorageView] = {}
    stream = PickleStream(file, *places["storages"])
    for _ in range(_count(stream)):
        item = stream.pickle()
        if not isinstance(item, tuple) or len(item) != 3:
            raise FormatError(f"a storage is described as {brief(item)}")
        key, location, storage_type = item
        dtype = rebuild.dtype_of_storage(storage_type)
        (numel,) = stream.numbers("<q")
        nbytes = rebuild.storage_nbytes(dtype, numel)
        storages[_key(key)] = Storage(file.span(stream.skip(nbytes), nbytes), dtype, rebuild.location(location))
    views = stream.pickle()
    for view in views if isinstance(views, (list, tuple)) else ():
        if not isinstance(view, tuple) or len(view) != 4 or type(view[2]) is not int or view[2] < 0:
            raise FormatError(f"a view of a storage is described as {brief(view)}")
        base = storages.get(_key(view[1]))
        if not isinstance(base, Storage):
            raise FormatError(f"a view of the storage {_key(view[1])}, which is absent")
        storages[_key(view[0])] = rebuild.StorageView(base, view[2])
    names.update(stream.names)

    tensors: dict[Any, TensorInfo] = {}
    stream = PickleStream(file, *places["tensors"])
    for _ in range(_count(stream)):
        item = stream.pickle()
        if not isinstance(item, tuple) or len(item) != 3:
            raise FormatError(f"a tensor is described as {brief(item)}")
        ndim, _ = stream.numbers("<i4s")
        if not 0 <= ndim <= MAX_DIMS:
            raise FormatError(f"a tensor has {ndim} dimensions")
        shape, stride = stream.numbers(f"<{ndim}q"), stream.numbers(f"<{ndim}q")
        (offset,) = stream.numbers("<q")
        storage = storages.get(_key(item[1]))
        tensors[_key(item[0])] = rebuild.strided(storage, offset, shape, stride)
    names.update(stream.names)

    def persistent_load(pid: Any) -> Any:
        if isinstance(pid, tuple) and len(pid) == 3 and isinstance(pid[0], Global):
            return pid[0]
        if _key(pid) not in tensors:
            raise FormatError(f"the tensor {_key(pid)} is named by the tree and absent from the archive")
        return tensors[_key(pid)]

    stream = PickleStream(file, *places["pickle"])
    tree = stream.pickle(rebuild.builders, persistent_load)
    names.update(stream.names)
    return Checkpoint(tree, format=NAME, url=file.path, nbytes=file.size, names=tuple(names))


def _places(file: File) -> dict[str, tuple[int, int]]:
    """Returns {member: (begin, end)} in bytes of the file."""
    try:
        with tarfile.open(file.path, "r:") as archive:
            members = [item for item in archive if item.name in MEMBERS]
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        raise FormatError(f"a tar archive that cannot be read: {error}", file.path) from error
    found = {item.name: (item.offset_data, item.offset_data + item.size) for item in members}
    if len(found) < len(members) or not all(item.isreg() and not item.issparse() for item in members):
        raise FormatError(
            "a tar archive that readers can take in two ways: a member twice, a link, or sparse", file.path
        )
    for name in MEMBERS:
        if name not in found:
            raise FormatError(f"a tar archive without the member {name!r}: not made by torch", file.path)
        if found[name][1] > file.size:
            raise FormatError(f"the tar member {name!r} ends behind the end of the file", file.path)
    return found


def _count(stream: PickleStream) -> int:
    count = stream.pickle()
    if type(count) is not int or count < 0:
        raise FormatError(f"a count reads {brief(count)}")
    if count > MAX_TAR_ITEMS.now():
        raise MAX_TAR_ITEMS.passed(f"it counts {count:,} items", count)
    return count


def _key(key: object) -> str:
    if type(key) is not int and not isinstance(key, str):
        raise FormatError(f"a storage or tensor is named {brief(key)}")
    return str(key)
