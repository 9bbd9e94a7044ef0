"""torch.save's first format, a tar archive (torch 0.1.0 to 0.1.5, 2016).

    sys_info
    storages   pickle(n), n x [pickle((key, location, storage class)), numel (int64), raw bytes],
               pickle([(key, key of the base, offset, numel), ...])
    tensors    pickle(n), n x [pickle((key, storage key, tensor class)), ndim (int32), 4 bytes of padding,
               sizes (int64), strides (int64), offset (int64)]
    pickle     the tree; persistent ids are tensor keys, or (class, source file, source) of a module

Source: ``torch/serialization.py`` (`_legacy_load.legacy_load`). The archive is ustar, with pax headers where Python 3
wrote a time with fractions or a storage of 8 GB. Its headers are not read by ``tarfile``, which reads
a header of any length into memory, parses it in quadratic time, and handles a header after a header by recursion.
"""

from __future__ import annotations

from itertools import islice
from typing import Any, NamedTuple

from ckptool.core.checkpoint import Checkpoint
from ckptool.core.tensor import Storage, TensorInfo
from ckptool.core.tree import Global, brief
from ckptool.errors import FormatError
from ckptool.io.archives import is_tar, reader, tar_members
from ckptool.io.probe import Probe
from ckptool.io.source import Source
from ckptool.limits import MAX_DIMS, MAX_PAX, MAX_TAR_ITEMS, MAX_TAR_MEMBERS
from ckptool.pickling import torch_calls as rebuild
from ckptool.pickling.streams import PickleStream

MEMBERS = ("storages", "tensors", "pickle")

BLOCK = 512
"""Bytes of a header; members begin at multiples of it."""

FILES, WITHOUT_DATA, PAX = b"0\0", b"123456", b"x"
"""Type flags: files; links, devices, directories and pipes; a pax header, which describes the next member."""

IGNORED = {b"mtime", b"atime", b"ctime", b"uid", b"gid", b"uname", b"gname", b"comment", b"hdrcharset"}
"""Keys that a pax header may have besides the size; none of them changes which bytes belong to a member."""


class Header(NamedTuple):
    """The fields of a member's header that are used here."""

    name: bytes
    prefix: bytes
    kind: bytes
    size: int


def matches(probe: Probe) -> bool:
    """Returns whether it is a tar archive, and not one whose first members are none of torch's."""
    if not is_tar(probe.head):
        return False
    first = [name for name, _ in islice(tar_members(reader(probe.file)), 2 * len(MEMBERS))]
    return not first or not {*MEMBERS, "sys_info"}.isdisjoint(first)


def read(probe: Probe) -> Checkpoint:
    """Returns the checkpoint; reads the pickles and numbers, no tensor data. Raises: FormatError, LimitError."""
    file = probe.file
    ranges = _member_ranges(file)
    names: dict[tuple[str, str], None] = {}
    storages: dict[Any, Storage | rebuild.StorageView] = {}
    stream = PickleStream(file, *ranges["storages"])
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
    stream = PickleStream(file, *ranges["tensors"])
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

    stream = PickleStream(file, *ranges["pickle"])
    tree = stream.pickle(rebuild.builders, persistent_load)
    names.update(stream.names)
    return Checkpoint(tree, url=file.path, nbytes=file.size, names=tuple(names))


def _member_ranges(file: Source) -> dict[str, tuple[int, int]]:
    """Returns {member: (begin, end)}, the byte range of each member's data. Raises: FormatError."""
    found: dict[str, tuple[int, int]] = {}
    at, members = 0, 0
    pax: dict[bytes, bytes] | None = None
    while at < file.size:
        header = _header(file, at)
        if header is None:
            break
        members += 1
        if members > MAX_TAR_MEMBERS:
            raise FormatError(f"a tar archive of more than {MAX_TAR_MEMBERS:,} members: not made by torch")
        size = _size(header, pax)
        begin, end = at + BLOCK, at + BLOCK + size
        if end > file.size:
            raise FormatError(f"the tar member {brief(_text(header.name))} ends behind the end of the file")
        at = begin + -(-size // BLOCK) * BLOCK
        if header.kind == PAX:
            if pax is not None:
                raise FormatError(f"a tar archive with two pax headers for one member, at byte {begin - BLOCK}")
            if size > MAX_PAX:
                raise FormatError(f"a tar archive with a pax header of {size:,} bytes: not made by torch")
            pax = _pax(file.read(begin, size))
            continue
        pax = None
        name = _text(header.name.rstrip(b"/"))
        if name not in MEMBERS:
            continue
        if name in found or header.prefix or header.kind not in FILES or header.name.endswith(b"/"):
            raise FormatError("a tar archive that readers can take in two ways: a member twice, a link, or sparse")
        found[name] = begin, end
    if pax is not None:
        raise FormatError("a tar archive that ends behind a pax header")
    for name in MEMBERS:
        if name not in found:
            raise FormatError(f"a tar archive without the member {name!r}: not made by torch")
    return found


def _header(file: Source, at: int) -> Header | None:
    """Returns the header at a byte offset, None at the end of the archive. Raises: FormatError."""
    data = file.read(at, BLOCK)
    if not any(data):
        return None
    if _number(data[148:156], at) != sum(data) - sum(data[148:156]) + 8 * ord(" "):
        raise FormatError(f"a tar archive whose header at byte {at} has a wrong checksum")
    kind = data[156:157]
    if kind not in FILES + WITHOUT_DATA + PAX:
        raise FormatError(f"a tar archive with a member of the type {_text(kind)!r}: not made by torch")
    return Header(_until_zero(data[:100]), _until_zero(data[345:500]), kind, _number(data[124:136], at))


def _size(header: Header, pax: dict[bytes, bytes] | None) -> int:
    """Returns the number of bytes of a member's data; a size in the pax header before it takes precedence."""
    size = header.size
    if pax is not None and header.kind != PAX and b"size" in pax:
        digits = pax[b"size"]
        if not digits.isdigit() or len(digits) > 19:  # 2^63 has 19 digits
            raise FormatError(f"a tar archive whose pax header gives the size {brief(_text(digits))}")
        size = int(digits)
    if size and header.kind in WITHOUT_DATA:
        raise FormatError("a tar archive that readers can take in two ways: a link or directory with data")
    return size


def _pax(data: bytes) -> dict[bytes, bytes]:
    """Returns {key: value} of a pax header: records ``LENGTH KEY=VALUE\\n``, where LENGTH counts the whole record."""
    records: dict[bytes, bytes] = {}
    at = 0
    while at < len(data):
        length, space, _ = data[at : at + len(str(MAX_PAX)) + 1].partition(b" ")
        end = at + int(length) if space and length.isdigit() else at
        record = data[at + len(length) + 1 : end]
        key, equals, value = record[:-1].partition(b"=")
        if end > len(data) or not equals or not record.endswith(b"\n"):
            raise FormatError("a tar archive with a pax header that cannot be understood")
        if key in records or key not in IGNORED | {b"size"}:
            raise FormatError(f"a tar archive whose pax header says {brief(_text(key))}: not made by torch")
        records[key] = value
        at = end
    return records


def _number(field: bytes, at: int) -> int:
    """Returns the number in a field: octal digits, or (GNU) the byte 0x80 and a big-endian binary number."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = _until_zero(field).strip(b" ")
    if digits.strip(b"01234567"):
        raise FormatError(f"a tar archive whose header at byte {at} has {brief(_text(digits))} for a number")
    return int(digits or b"0", 8)


def _until_zero(field: bytes) -> bytes:
    return field.partition(b"\0")[0]


def _text(field: bytes) -> str:
    return field.decode("utf-8", "backslashreplace")


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
