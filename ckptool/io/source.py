"""Reading byte ranges: a protocol for anything that can be read at an offset, and local files."""

from __future__ import annotations

import os
import stat
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

from ckptool.core.tensor import Span
from ckptool.errors import FormatError, OutputError, UnreadableError, explain
from ckptool.io import system, tally

Bytes = bytes | memoryview

BLOCK = 1 << 20
"""Bytes moved at a time: large enough that a call costs nothing, small enough to stay in the cache."""

SMALL_MEMBER = 1 << 16
"""Bytes below which a stored zip member is read together with its local header."""

HEADER = 30 + 256
"""Bytes read for a zip member's local header and what follows its payload; longer ones take another read."""


class Source(Protocol):
    """Bytes that can be read at any offset. An implementation defines `read`; the other methods have defaults.

    ``size`` is that at opening. ``version`` changes when the bytes of a path do; None if this cannot be detected.
    ``mode`` is the permissions that a copy may have. Content that is a part of a file (`Section`) is from ``begin``
    up to ``size``. ``again``: whether what was read can be read again at no cost, as from a page cache.
    """

    path: str
    size: int
    version: tuple[int, ...] | None
    mode: int = 0o777
    begin: int = 0
    again: bool = True

    def read(self, offset: int, nbytes: int) -> bytes:
        """Returns exactly ``nbytes`` bytes. Raises: FormatError if there are not as many, UnreadableError."""
        ...

    def blocks(self, offset: int, nbytes: int, room: bytearray | None = None) -> Iterator[memoryview]:
        """Yields the range in pieces as large as ``room`` (else `BLOCK`), each valid until the next is asked for."""
        size = BLOCK if room is None else len(room)
        for start in range(offset, offset + nbytes, size):
            yield memoryview(self.read(start, min(size, offset + nbytes - start)))

    def map(self, offset: int, nbytes: int) -> memoryview | None:
        """Returns the range as a memory map; None where that is not supported."""
        return None

    def read_ahead(self, ranges: Sequence[tuple[int, int]] = ()) -> None:
        """Hints that it will be read, mostly in order: these ranges (begin, end), if they are known."""

    def clone(self, fd: int, offset: int, nbytes: int, to: int) -> bool:
        """Clones a range (reflink) to byte ``to`` of another file; returns whether it could."""
        return False

    def check(self) -> None:
        """Raises FormatError if the file changed since opening: reads may have mixed old and new bytes."""

    def close(self) -> None:
        """Closes the file."""

    def notes(self) -> list[str]:
        """Returns what is to be known of how it was read."""
        return []

    def span(self, offset: int, nbytes: int) -> Span:
        """Returns the span of this version of these bytes."""
        return Span(self.path, offset, nbytes, version=self.version)

    def __enter__(self) -> Source:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.check()
        finally:
            self.close()


class LocalFile(Source):
    """A local file open for reading."""

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            self.fd = os.open(system.reachable(path), system.flags("O_NONBLOCK"))
        except FileNotFoundError:
            what = "no such file or directory"
            if os.path.islink(path):
                what = f"is a link to {os.readlink(path)}, which does not exist: fetch that file"
            raise UnreadableError(what, path) from None
        except (OSError, ValueError) as error:
            reason = explain(error) if isinstance(error, OSError) else str(error)
            raise UnreadableError(f"cannot be opened: {reason}", path) from error
        status = os.fstat(self.fd)
        if not stat.S_ISREG(status.st_mode):
            self.close()
            raise UnreadableError("is not a regular file", path)
        self.size = status.st_size
        self.mode = stat.S_IMODE(status.st_mode)
        self.version: tuple[int, ...] | None = (status.st_ino, status.st_size, status.st_mtime_ns)
        if tally.current is not None:
            tally.current.add(path, 0)

    def close(self) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:
        if getattr(self, "fd", -1) >= 0:
            self.close()

    def check(self) -> None:
        status = os.fstat(self.fd)
        if (status.st_ino, status.st_size, status.st_mtime_ns) != self.version:
            raise FormatError("it was changed while it was read", self.path)

    def read(self, offset: int, nbytes: int) -> bytes:
        if offset < 0 or nbytes < 0 or offset + nbytes > self.size:
            raise FormatError(f"bytes {offset}-{offset + nbytes} are wanted of a file of {self.size}", self.path)
        try:
            data = system.pread(self.fd, nbytes, offset)
            while len(data) < nbytes:
                more = system.pread(self.fd, nbytes - len(data), offset + len(data))
                if not more:
                    raise FormatError(f"it became shorter while it was read (at byte {offset + len(data)})", self.path)
                data += more
        except OSError as error:
            raise UnreadableError(f"reading at byte {offset}: {explain(error)}", self.path) from error
        if tally.current is not None:
            tally.current.add(self.path, nbytes)
        return data

    def blocks(self, offset: int, nbytes: int, room: bytearray | None = None) -> Iterator[memoryview]:
        buffer = memoryview(room if room is not None else bytearray(min(BLOCK, nbytes)))
        size = len(buffer)
        end = offset + nbytes
        if tally.current is not None:
            tally.current.add(self.path, nbytes)
        if end > self.size:
            raise FormatError(f"bytes {offset}-{end} are wanted of a file of {self.size}", self.path)
        while offset < end:
            piece = buffer[: min(size, end - offset)]
            filled = 0
            while filled < len(piece):
                try:
                    got = system.pread_into(self.fd, piece[filled:], offset + filled)
                except OSError as error:
                    raise UnreadableError(f"reading at byte {offset + filled}: {explain(error)}", self.path) from error
                if not got:
                    raise FormatError(f"it became shorter while it was read (at byte {offset + filled})", self.path)
                filled += got
            yield piece
            offset += filled

    def map(self, offset: int, nbytes: int) -> memoryview | None:
        from mmap import ACCESS_READ, ALLOCATIONGRANULARITY, mmap

        if tally.current is not None:
            tally.current.add(self.path, nbytes)
        ahead = offset % ALLOCATIONGRANULARITY
        return memoryview(mmap(self.fd, ahead + nbytes, access=ACCESS_READ, offset=offset - ahead))[ahead:]

    def read_ahead(self, ranges: Sequence[tuple[int, int]] = ()) -> None:
        system.read_ahead(self.fd)

    def clone(self, fd: int, offset: int, nbytes: int, to: int) -> bool:
        return system.clone(self.fd, offset, nbytes, fd, to)


class Section(Source):
    """Bytes ``begin`` to ``begin + nbytes`` of an open file, with the file's own offsets. Closing it closes nothing.

    A small one is read at once.
    """

    def __init__(self, file: Source, begin: int, nbytes: int) -> None:
        self.file, self.begin, self.size = file, begin, begin + nbytes
        self.path, self.version, self.mode = file.path, file.version, file.mode
        self._held = file.read(begin, nbytes) if nbytes < SMALL_MEMBER else b""

    def read(self, offset: int, nbytes: int) -> bytes:
        if offset < self.begin or nbytes < 0 or offset + nbytes > self.size:
            what = f"bytes {offset}-{offset + nbytes} are wanted of what is at {self.begin}-{self.size}"
            raise FormatError(what, self.path)
        if self._held:
            return self._held[offset - self.begin : offset - self.begin + nbytes]
        return self.file.read(offset, nbytes)

    def read_ahead(self, ranges: Sequence[tuple[int, int]] = ()) -> None:
        self.file.read_ahead(ranges)

    def check(self) -> None:
        self.file.check()

    def close(self) -> None:
        pass


class Spool(LocalFile):
    """A temporary file of some blocks, to be read in another order. Raises: OutputError if the disk is full."""

    def __init__(self, blocks: Iterable[bytes | memoryview]) -> None:
        import tempfile

        self.path, self.version = "a temporary file", None
        try:
            self._file = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `close`
            try:
                for block in blocks:
                    self._file.write(block)
                self._file.flush()
            except BaseException:
                self._file.close()
                raise
            self.fd = self._file.fileno()
        except OSError as error:
            raise OutputError(f"a temporary file: {explain(error)}; TMPDIR says where they go") from error
        self.size = self._file.tell()

    def check(self) -> None:
        pass  # the file has no name: nobody else can change it

    def close(self) -> None:
        self.fd = -1
        self._file.close()


def read_span(file: Source, span: Span, nbytes: int | None = None) -> bytes:
    """Returns the first ``nbytes`` bytes, by default all, of a span of an open file. Raises: FormatError."""
    nbytes = span.nbytes if nbytes is None else min(nbytes, span.nbytes)
    if span.member == "stored" and nbytes == span.nbytes < SMALL_MEMBER:
        return small_member(file, span)
    found = locate(file, span)
    if found.member == "deflated":
        return b"".join(window(inflated(file, found), 0, nbytes))
    return file.read(found.offset, nbytes)


def locate(file: Source, span: Span) -> Span:
    """Returns the span with the offset of its first byte: behind the local header, if in a zip."""
    if span.member is None:
        return span
    start = _payload(file, span, file.read(span.offset, min(HEADER, file.size - span.offset)))
    return span._replace(offset=span.offset + start)


def small_member(file: Source, span: Span) -> bytes:
    """Returns a small zip member with one read of its local header and what follows."""
    guess = file.read(span.offset, min(HEADER + span.nbytes, file.size - span.offset))
    start = _payload(file, span, guess)
    if start + span.nbytes <= len(guess):
        return guess[start : start + span.nbytes]
    return file.read(span.offset + start, span.nbytes)


_LOCAL = struct.Struct("<6xH18xHH").unpack_from


def _payload(file: Source, span: Span, data: bytes) -> int:
    """Returns the offset of a zip member's payload from its local header; ``data`` begins with the header.

    The header has no checksum, and one wrong bit in a length would shift the tensor's bytes. So the name must be as
    long as in the directory, the extra field must consist of whole fields, and the payload must be followed by what
    the header's flags say: a descriptor (with a signature, which all tools write), else the next member or the
    directory. Raises: FormatError.
    """
    if len(data) < 30 or data[:4] != b"PK\x03\x04":
        raise FormatError(f"no zip member at byte {span.offset}", span.url)
    flags, name, extra = _LOCAL(data)
    begin = 30 + name
    start: int = begin + extra
    end = start + span.packed
    if span.offset + end + 4 > file.size:  # the directory is behind it
        raise FormatError(f"the zip member at byte {span.offset} ends behind the end of the file", span.url)
    if span.packed:
        follows = data[end : end + 4] if end + 4 <= len(data) else file.read(span.offset + end, 4)
        fits = follows == b"PK\x07\x08" if flags & 8 else follows in (b"PK\x03\x04", b"PK\x01\x02")
        header = data if start <= len(data) else file.read(span.offset, start)
        if not fits or name != span.named or not _is_whole(header, begin, start):
            raise FormatError(f"the local header of the zip member at byte {span.offset} is damaged", span.url)
    return start


def _is_whole(data: bytes, begin: int, end: int) -> bool:
    """Returns whether an extra field consists of whole fields; up to three zeros may pad it."""
    while begin + 4 <= end:
        begin += 4 + data[begin + 2] + (data[begin + 3] << 8)
    return begin == end or (begin < end and not any(data[begin:end]))


def inflated(file: Source, span: Span) -> Iterator[bytes]:
    """Yields a deflated member in pieces of `BLOCK` bytes. Raises: FormatError unless it has the declared size."""
    inflater = zlib.decompressobj(-15)
    left = span.nbytes
    pending = bytearray()
    try:
        for block in file.blocks(span.offset, span.packed):
            data: bytes | memoryview = block
            while data and not inflater.eof:
                piece = inflater.decompress(data, BLOCK)
                data = inflater.unconsumed_tail
                left -= len(piece)
                if left < 0:
                    raise FormatError(f"a zip member inflates beyond its declared {span.nbytes} bytes", span.url)
                pending += piece
                while len(pending) >= BLOCK:
                    yield bytes(pending[:BLOCK])
                    del pending[:BLOCK]
        tail = inflater.flush()
    except zlib.error as error:
        raise FormatError(f"the deflated zip member at byte {span.offset}: {error}", span.url) from error
    if left != len(tail):
        raise FormatError(f"a zip member inflates to other than its declared {span.nbytes} bytes", span.url)
    yield bytes(pending) + tail


def window(pieces: Iterator[bytes], offset: int, nbytes: int) -> Iterator[bytes]:
    """Yields a range of what some pieces are, one behind the other."""
    position = 0
    for piece in pieces:
        begin, end = max(offset - position, 0), min(offset + nbytes - position, len(piece))
        if begin < end:
            yield piece[begin:end]
        position += len(piece)
        if position > offset + nbytes:  # not at the exact end: `_inflated` then checks the size
            return
