"""Writes a zip archive in one pass, byte for byte as torch's own writer does; other formats use the same layout.

Every record is stored, begins its payload on a multiple of 64 (an ``FB`` extra field pads the local header),
has zero sizes in its local header, and is followed by a descriptor. With that layout torch can compute the
offset of each storage without reading the headers (``.format_version`` 1), and can map the file.

    local header    30 bytes, name, [zip64 extra], 'FB' u16 padding, padding x 'Z'
    payload
    descriptor      PK\\7\\8, crc, packed, size: 16 bytes, 24 where 64-bit; none behind an empty payload

Source: miniz's writer as patched in torch 2.13 (``third_party/miniz``), ``inline_container.cc``.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from ckptool.core.tensor import Span
from ckptool.io.files import Files
from ckptool.io.output import CLONED, Output
from ckptool.io.source import Source

if TYPE_CHECKING:
    from concurrent.futures import Future, ThreadPoolExecutor

ALIGNMENT = 64
_FAR = 0xFFFFFFFF

THREADED = 1 << 20
"""Bytes of a record from which its CRC is computed on another thread; handing over a block takes 0.05 ms."""

WINDOW = 1 << 14
"""Bytes of another archive read at a time to compare its headers: some 100 small records."""

_FLAGS, _EMPTY = 0x0808, 0x0800
"""Flags: UTF-8 names, and a descriptor after the payload unless that is empty."""

_LOCAL = struct.Struct("<4sHHHHHIIIHH")
_PADDING = struct.Struct("<2sH")
_DESCRIPTOR = struct.Struct("<4sIII")
_ENTRY = struct.Struct("<4sHHHHHHIIIHHHHHII")


class Record(NamedTuple):
    """A record of another archive: its name below the prefix, where it is, and its CRC-32."""

    name: str
    span: Span
    crc32: int


class ZipWriter:
    """Writes records, below ``root/`` if there is a root; `close` writes the directory.

    The archive begins where the output stands, and its offsets and alignment count from there. ``date`` is the MS-DOS
    date of every record: 0, which is no valid date, in torch's archives.
    """

    def __init__(self, output: Output, root: str = "", date: int = 0) -> None:
        self.output = output
        self.begin = output.position
        self.root = f"{root}/" if root else ""
        self.date = date
        self.entries: list[bytes] = []
        self._thread: ThreadPoolExecutor | None = None

    @property
    def position(self) -> int:
        """Returns the bytes of the archive that are written."""
        return self.output.position - self.begin

    def add(self, name: str, data: bytes, like: int | None = None) -> None:
        """Writes a small record; with ``like``, padded so that it ends at that offset modulo `CLONED`, if possible."""
        padding = 0
        if like is not None:
            end = self.position + 34 + len(f"{self.root}{name}".encode())
            end += -end % ALIGNMENT + len(data) + 16
            padding = (like - end) % CLONED if (like - end) % ALIGNMENT == 0 else 0
        self.add_blocks(name, len(data), (data,), None, padding)

    def add_span(self, name: str, span: Span, crc32: int | None, files: Files) -> None:
        """Writes a record that is a byte range of a file; a known ``crc32`` saves computing it.

        Otherwise another thread computes it during the copy, with reads of its own: these hit the page cache, and
        neither thread waits for the other before the end of the record.
        """
        full, start = self._begin(name, span.nbytes)
        summed = self._beside(_crc32, files.get(span), span) if crc32 is None else None
        self.output.copy(files, span)
        self._finish(full, span.nbytes, summed.result() if summed else crc32 or 0, start)

    def _beside(self, function: Callable[..., int], *arguments: object) -> Future[int]:
        """Calls a function on the other thread."""
        if self._thread is None:
            from concurrent.futures import ThreadPoolExecutor

            self._thread = ThreadPoolExecutor(1)
        return self._thread.submit(function, *arguments)

    def _begin(self, name: str, nbytes: int, more: int = 0) -> tuple[bytes, int]:
        """Writes a record's local header, with ``more`` padding; returns its full name and its offset."""
        start = self.position
        full = f"{self.root}{name}".encode()
        big, far = nbytes >= _FAR, start >= _FAR
        extra = b""
        if big or far:
            values = [nbytes, 0] * big + [start] * far
            extra = struct.pack(f"<HH{len(values)}Q", 1, 8 * len(values), *values)
        padding = -(start + 30 + len(full) + len(extra) + 4) % ALIGNMENT + more
        self.output.write(_local(full, nbytes, padding, self.date, extra) + b"Z" * padding)
        return full, start

    def add_blocks(
        self, name: str, nbytes: int, blocks: Iterable[bytes | memoryview], crc32: int | None, padding: int = 0
    ) -> None:
        """Writes a record of exactly ``nbytes`` bytes; a known ``crc32`` saves computing it."""
        full, start = self._begin(name, nbytes, padding)
        begin = self.position
        computed = 0
        if crc32 is None and nbytes >= THREADED:
            computed = self._write_and_sum(blocks)
        else:
            for block in blocks:
                if crc32 is None:
                    computed = zlib.crc32(block, computed)
                self.output.write(block)
        if self.position - begin != nbytes:
            raise RuntimeError(f"{name} came to {self.position - begin} bytes, not {nbytes}")
        self._finish(full, nbytes, computed if crc32 is None else crc32, start)

    def _write_and_sum(self, blocks: Iterable[bytes | memoryview]) -> int:
        """Writes blocks, and returns their CRC; another thread updates it while each block is written."""
        computed = 0
        for block in blocks:
            summed = self._beside(zlib.crc32, block, computed)
            self.output.write(block)
            computed = summed.result()  # the next block may overwrite this one
        return computed

    def _finish(self, full: bytes, nbytes: int, crc: int, start: int) -> None:
        """Writes the descriptor, and adds the record to the directory."""
        big, far = nbytes >= _FAR, start >= _FAR
        if nbytes:
            sizes = "QQ" if big or far else "II"
            self.output.write(struct.pack(f"<4sI{sizes}", b"PK\x07\x08", crc, nbytes, nbytes))
        wide = struct.pack(f"<{2 * big + far}Q", *([nbytes, nbytes] * big + [start] * far))
        if wide:
            wide = struct.pack("<HH", 1, len(wide)) + wide
        self._note(full, nbytes, crc, start, wide)

    def _note(self, full: bytes, nbytes: int, crc: int, start: int, wide: bytes = b"") -> None:
        size = min(nbytes, _FAR)
        self.entries.append(
            _ENTRY.pack(
                b"PK\x01\x02", 0, 0, _FLAGS if nbytes else _EMPTY, 0, 0, self.date, crc, size, size,
                len(full), len(wide), 0, 0, 0, 0, min(start, _FAR),
            ) + full + wide
        )  # fmt: skip

    def copy(self, prefix: str, records: Sequence[Record], files: Files) -> int:
        """Copies the first of these records in one piece from another archive; returns how many it copied.

        They must have the same names and gaps there, and lie within 4 GiB, so that headers, padding and descriptors are
        those that would be written here. Many small tensors take one read.
        """
        count, end = self._alike(prefix, records, files)
        if not count:
            return 0
        first, last = records[0].span, records[count - 1]
        start, shift = self.position, self.position - first.offset
        payload = files.locate(last.span).offset
        region = first._replace(member=None, nbytes=payload + last.span.nbytes - first.offset)
        self.output.copy(files, region)
        for record in records[: count - 1]:
            name = f"{self.root}{prefix}{record.name}".encode()
            self._note(name, record.span.nbytes, record.crc32, record.span.offset + shift)
        self._finish(f"{self.root}{prefix}{last.name}".encode(), last.span.nbytes, last.crc32, last.span.offset + shift)
        if self.position - start != end - start:
            raise RuntimeError(f"{count} records came to {self.position - start} bytes, not {end - start}")
        return count

    def _alike(self, prefix: str, records: Sequence[Record], files: Files) -> tuple[int, int]:
        """Returns how many of the first records have the same layout in their file as here, and the end of the last.

        The bytes between payloads are compared: a damaged header must not be copied.
        """
        start = position = self.position
        shift = start - records[0].span.offset if records else 1
        if shift % ALIGNMENT:
            return 0, start
        root = f"{self.root}{prefix}".encode()
        window = _Window(files.get(records[0].span))
        behind = b""
        count = 0
        for record in records:
            span = record.span
            far = max(position, span.offset) + span.nbytes + (1 << 16) >= _FAR
            if far or span.member != "stored" or span.url != records[0].span.url or span.offset + shift != position:
                break
            name = root + record.name.encode()
            padding = -(position + 34 + len(name)) % ALIGNMENT
            if not window.holds(behind + _local(name, span.nbytes, padding, self.date), span.offset - len(behind)):
                break
            behind = _DESCRIPTOR.pack(b"PK\x07\x08", record.crc32, span.nbytes, span.nbytes) if span.nbytes else b""
            position += 34 + len(name) + padding + span.nbytes + len(behind)
            count += 1
        return count, position

    def close(self) -> None:
        """Writes the central directory and the end records, always with those of zip64, as torch does."""
        if self._thread is not None:
            self._thread.shutdown()
        start = self.position
        directory = b"".join(self.entries)
        count, size = len(self.entries), len(directory)
        self.output.write(
            directory
            + struct.pack("<4sQHHIIQQQQ", b"PK\x06\x06", 44, 798, 45, 0, 0, count, count, size, start)
            + struct.pack("<4sIQI", b"PK\x06\x07", 0, start + size, 1)
            + struct.pack(
                "<4sHHHHIIH", b"PK\x05\x06", 0, 0, min(count, 0xFFFF), min(count, 0xFFFF),
                min(size, _FAR), min(start, _FAR), 0,
            )
        )  # fmt: skip


def _local(name: bytes, nbytes: int, padding: int, date: int, extra: bytes = b"") -> bytes:
    """Returns a local header without its padding bytes."""
    flags = _FLAGS if nbytes else _EMPTY
    fixed = _LOCAL.pack(b"PK\x03\x04", 0, flags, 0, 0, date, 0, 0, 0, len(name), len(extra) + 4 + padding)
    return fixed + name + extra + _PADDING.pack(b"FB", padding)


class _Window:
    """Compares bytes of a file in increasing order of offsets, with buffered reads."""

    def __init__(self, file: Source) -> None:
        self.file = file
        self.start = 0
        self.data = b""

    def holds(self, data: bytes, offset: int) -> bool:
        """Returns whether the file has these bytes at that offset."""
        at = offset - self.start
        if at < 0 or at + len(data) > len(self.data):
            self.start, at = offset, 0
            self.data = self.file.read(offset, min(WINDOW, self.file.size - offset))
        return self.data.startswith(data, at)


def _crc32(file: Source, span: Span) -> int:
    """Returns the CRC-32 of a byte range of a file."""
    computed = 0
    for block in file.blocks(span.offset, span.nbytes):
        computed = zlib.crc32(block, computed)
    return computed
