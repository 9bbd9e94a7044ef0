"""Reads the central directory of a zip archive, the only source of what its members are.

Torch writes zero sizes and non-standard zip64 extra fields into local headers, so a local header is read only for
the lengths of its name and extra field (`Files.locate`). Layout: PKWARE APPNOTE 4.3.12-4.3.16.

    end record      PK\\5\\6  ... entries u16 @10, size u32 @12, offset u32 @16
    zip64 locator   PK\\6\\7  ... offset of the zip64 end record u64 @8
    zip64 end       PK\\6\\6  ... entries u64 @32, size u64 @40, offset u64 @48
    central entry   PK\\1\\2  ... flags u16 @8, method u16 @10, crc u32 @16, packed u32 @20, size u32 @24,
                             name u16 @28, extra u16 @30, comment u16 @32, disk u16 @34, offset u32 @42
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from itertools import pairwise
from typing import NamedTuple

from ckptool.core.tensor import Span
from ckptool.errors import FormatError, UnsupportedError
from ckptool.io.source import Source, read_span
from ckptool.limits import MAX_DIRECTORY, MAX_RATIO, MAX_RECORDS, Limit

TAIL = 1 << 16
"""Bytes read from the end of the file at once: enough for the end records and the directory of some 700 members."""

SEARCHED = 1 << 26
"""Bytes at the end of the file in which an error looks for an earlier end."""

SMALL = 1 << 20
"""A member may inflate to this many bytes whatever its compression ratio; `MAX_RATIO` limits only the rest."""


class Member(NamedTuple):
    """A zip member: the byte range of its data (see `Span.member`) and its CRC-32, 0 if none was recorded."""

    span: Span
    crc32: int


def is_zip(file: Source) -> bool:
    """Returns whether the file begins with a zip member, as torch.load requires."""
    return file.size >= file.begin + 4 and file.read(file.begin, 4) == b"PK\x03\x04"


def read_directory(file: Source) -> dict[str, Member]:
    """Returns {name: Member} in the order of the directory; reads only the end of the file.

    Raises: FormatError if anything is truncated, overlaps, lies outside the file or has the name of another;
    UnsupportedError for encryption, split archives, and compression methods other than stored and deflate.
    """
    start, size, count = _find_directory(file)
    if size > MAX_DIRECTORY.now():
        raise MAX_DIRECTORY.passed(f"its zip directory claims {size:,} bytes", size, file.path)
    if count > MAX_RECORDS.now():
        raise MAX_RECORDS.passed(f"its zip directory claims {count:,} members", count, file.path)
    data = file.read(start, size)
    members: dict[str, Member] = {}
    position = last = 0
    in_order = True
    path, version = file.path, file.version
    unpack = struct.Struct("<4s4xHH4xIIIHHHH6xI").unpack_from
    make = tuple.__new__  # takes a third of the time of calling Span and Member; there may be a million
    for _ in range(count):
        if position + 46 > size:
            raise FormatError(f"its zip directory ends inside entry {len(members)} of {count}", path)
        signature, flags, method, crc, packed, usize, name_size, extra_size, comment, disk, offset = unpack(
            data, position
        )
        if signature != b"PK\x01\x02":
            raise FormatError(f"no zip directory entry at byte {start + position}", path)
        body = position + 46
        raw = data[body : body + name_size]
        position = body + name_size + extra_size + comment
        if usize == 0xFFFFFFFF or packed == 0xFFFFFFFF or offset == 0xFFFFFFFF:
            extra = data[body + name_size : body + name_size + extra_size]
            usize, packed, offset = _zip64(extra, usize, packed, offset, path)
        name = raw.decode("utf-8" if flags & 0x800 else "cp437", "surrogateescape")
        if method or packed != usize or flags & 0x1 or disk:
            _refuse_entry(name, flags, method, packed, usize, disk, path)
        offset += file.begin
        end = offset + 30 + name_size + packed
        if end > start:
            raise FormatError(f"the zip member {name!r} reaches beyond the archive's data", path)
        if name in members:
            raise FormatError(f"two zip members are named {name!r}", path)
        span = make(Span, (path, offset, usize, "deflated" if method else "stored", packed, version, None, name_size))
        members[name] = make(Member, (span, crc))
        in_order = in_order and offset >= last
        last = end
    if position > size:
        raise FormatError("its zip directory is cut off", path)
    if not in_order:
        _refuse_overlaps(members, path)
    return members


def _refuse_entry(name: str, flags: int, method: int, packed: int, usize: int, disk: int, path: str) -> None:
    """Raises the error for an entry that cannot be read; returns if it is only deflated."""
    if flags & 0x1 or disk not in (0, 0xFFFF):
        what = "encrypted" if flags & 0x1 else "part of a split archive"
        raise UnsupportedError(f"the zip member {name!r} is {what}", path)
    if method not in (0, 8):
        raise UnsupportedError(f"the zip member {name!r} is compressed by method {method}", path)
    if method == 0 and packed != usize:
        raise FormatError(f"the stored zip member {name!r} has two sizes: {packed} and {usize}", path)


def _refuse_overlaps(members: Mapping[str, Member], path: str) -> None:
    """Raises FormatError if two members share bytes; the directory may list members in another order than the data."""
    ranges = sorted((span.offset, span.offset + 30 + len(name) + span.packed) for name, (span, _) in members.items())
    for (_, end), (begin, _) in pairwise(ranges):
        if end > begin:
            raise FormatError(f"two zip members overlap at byte {begin}", path)


class _End(NamedTuple):
    """The last end record of a file: the file's tail, the offset of the tail, and where in it the record is."""

    start: int
    tail: bytes
    at: int


def _end_record(file: Source) -> _End:
    start = max(file.begin, file.size - TAIL - 22)
    tail = file.read(start, file.size - start)
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or at + 22 > len(tail):
        end = _earlier_end(file)
        what = f"ends at byte {end}, and {file.size - end} bytes follow: `head -c {end} FILE` gives it alone"
        what = what if end else "has no end record: a truncated download?"
        raise FormatError(f"it begins as a zip archive but {what}", file.path)
    return _End(start, tail, at)


def _earlier_end(file: Source) -> int:
    """Returns the offset behind the last end record that torch wrote, for an error; 0 if the last bytes have none."""
    for begin in range(max(0, file.size - TAIL), max(-TAIL, file.size - SEARCHED), -TAIL):
        block = file.read(max(0, begin), min(TAIL + 42, file.size - max(0, begin)))
        at = block.rfind(b"PK\x05\x06")
        if at >= 20 and block[at - 20 : at - 16] == b"PK\x06\x07":
            return max(0, begin) + at + 22
    return 0


def archive_end(file: Source) -> int:
    """Returns the offset behind the end record and its comment: what follows there is no part of the archive."""
    if file.read(max(0, file.size - 22), min(file.size, 22))[:4] == b"PK\x05\x06":  # nearly always
        return file.size
    start, tail, at = _end_record(file)
    return min(file.size, start + at + 22 + int.from_bytes(tail[at + 20 : at + 22], "little"))


def archive_start(file: Source, end: _End | None = None) -> int:
    """Returns the offset at which the archive with the last end record begins, if another archive begins there; else 0.

    Offsets in an archive count from its beginning, and its directory lies right before its end records: so it is known
    how many bytes are in front of it. Raises: FormatError without an end record.
    """
    start, tail, at = end or _end_record(file)
    size, offset = struct.unpack_from("<II", tail, at + 12)
    begins = start + at - size - offset
    if at >= 20 and tail[at - 20 : at - 16] == b"PK\x06\x07":
        begins = start + at - 76 - int.from_bytes(tail[at - 12 : at - 4], "little")
    return begins if begins > file.begin and file.read(begins, 4) in (b"PK\x03\x04", b"PK\x05\x06") else 0


def _find_directory(file: Source) -> tuple[int, int, int]:
    """Returns (offset, size, entries) of the central directory."""
    found = tail_start, tail, at = _end_record(file)
    if begins := archive_start(file, found):
        what = "more than one torch.save in one file (a .distcp has many); torch.load fails, or takes the first"
        raise FormatError(
            f"an archive begins at byte {begins}: {what}. `tail -c +{begins + 1} FILE` gives the last one", file.path
        )
    disk, _, _, count, size, start, _ = struct.unpack_from("<HHHHIIH", tail, at + 4)
    if disk not in (0, 0xFFFF):
        raise UnsupportedError("it is one part of a split zip archive", file.path)
    if at >= 20 and tail[at - 20 : at - 16] == b"PK\x06\x07":
        (record,) = struct.unpack_from("<Q", tail, at - 12)
        if file.begin + record + 56 > tail_start + at:
            raise FormatError("its zip64 end record lies outside the file", file.path)
        end = file.read(file.begin + record, 56)
        if end[:4] != b"PK\x06\x06":
            raise FormatError(f"no zip64 end record at byte {record}", file.path)
        count, size, start = struct.unpack_from("<QQQ", end, 32)
    start += file.begin
    if start + size > tail_start + at:
        raise FormatError("its zip directory lies outside the file: a truncated download?", file.path)
    return start, size, count


def _zip64(extra: bytes, usize: int, packed: int, offset: int, path: str) -> tuple[int, int, int]:
    """Returns (size, packed, offset); the zip64 extra field has, in this order, those given as 0xFFFFFFFF."""
    position = 0
    while position + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, position)
        body = extra[position + 4 : position + 4 + length]
        position += 4 + length
        if kind != 1:
            continue
        wanted = [value == 0xFFFFFFFF for value in (usize, packed, offset)]
        if len(body) < 8 * sum(wanted):
            break
        values = iter(struct.unpack_from(f"<{sum(wanted)}Q", body))
        return tuple(next(values) if want else old for want, old in zip(wanted, (usize, packed, offset), strict=True))  # type: ignore[return-value]
    raise FormatError("a zip directory entry lacks its zip64 sizes", path)


def read_small(file: Source, members: Mapping[str, Member], name: str, limit: Limit) -> bytes | None:
    """Returns the content of a small member, None if absent. Raises: LimitError if it has more bytes than ``limit``."""
    member = members.get(name)
    if member is None:
        return None
    nbytes, packed = member.span.nbytes, member.span.packed
    if nbytes > limit.now():
        raise limit.passed(f"{name} has {nbytes:,} bytes", nbytes, file.path)
    if member.span.member == "deflated" and nbytes > SMALL + MAX_RATIO.now() * packed:
        times = -((SMALL - nbytes) // max(packed, 1))
        raise MAX_RATIO.passed(f"{name} inflates to {times:,} times its size in the file", times, file.path)
    return read_span(file, member.span)
