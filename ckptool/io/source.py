"""Byte ranges from disk."""

from __future__ import annotations

import os
import stat
import struct
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator

from ckptool.core.tensor import Span
from ckptool.errors import FormatError, UnreadableError, explain

BLOCK = 1 << 20
"""Bytes moved at a time: large enough that a call costs nothing, small enough to stay in the cache."""

SMALL_MEMBER = 1 << 16
"""Bytes below which a stored zip member is read together with its local header."""

HEADER = 30 + 256
"""Bytes that a zip member's local header and what stands behind its payload are hoped to take."""

MAX_OPEN = 32
"""Files kept open for reading at once (a checkpoint may have hundreds of shards)."""


class File:
    """A file open for reading at any offset; its size is that at opening."""

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            self.fd = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0))
        except FileNotFoundError:
            raise UnreadableError("no such file or directory", path) from None
        except (OSError, ValueError) as error:
            reason = explain(error) if isinstance(error, OSError) else str(error)
            raise UnreadableError(f"cannot be opened: {reason}", path) from error
        status = os.fstat(self.fd)
        if not stat.S_ISREG(status.st_mode):
            os.close(self.fd)
            raise UnreadableError("is not a regular file", path)
        self.size = status.st_size
        self.mode = stat.S_IMODE(status.st_mode)
        self.version = (status.st_ino, status.st_size, status.st_mtime_ns)

    def close(self) -> None:
        os.close(self.fd)

    def check(self) -> None:
        """Raises FormatError if the file has another size or time than at opening: what was read may be of both."""
        status = os.fstat(self.fd)
        if (status.st_ino, status.st_size, status.st_mtime_ns) != self.version:
            raise FormatError("it was changed while it was read", self.path)

    def __enter__(self) -> File:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.check()
        finally:
            self.close()

    def span(self, offset: int, nbytes: int) -> Span:
        """Returns the span of this version of this file."""
        return Span(self.path, offset, nbytes, version=self.version)

    def read(self, offset: int, nbytes: int) -> bytes:
        """Returns exactly ``nbytes`` bytes. Raises: FormatError if the file ends before, UnreadableError."""
        if offset < 0 or nbytes < 0 or offset + nbytes > self.size:
            raise FormatError(f"bytes {offset}-{offset + nbytes} are wanted of a file of {self.size}", self.path)
        try:
            data = os.pread(self.fd, nbytes, offset)
            while len(data) < nbytes:
                more = os.pread(self.fd, nbytes - len(data), offset + len(data))
                if not more:
                    raise FormatError(f"it became shorter while it was read (at byte {offset + len(data)})", self.path)
                data += more
        except OSError as error:
            raise UnreadableError(f"reading at byte {offset}: {explain(error)}", self.path) from error
        return data

    def blocks(self, offset: int, nbytes: int, room: bytearray | None = None) -> Iterator[memoryview]:
        """Yields the range in pieces as large as ``room`` (else `BLOCK`), each valid until the next is asked for."""
        buffer = memoryview(room if room is not None else bytearray(min(BLOCK, nbytes)))
        size = len(buffer)
        end = offset + nbytes
        if end > self.size:
            raise FormatError(f"bytes {offset}-{end} are wanted of a file of {self.size}", self.path)
        while offset < end:
            piece = buffer[: min(size, end - offset)]
            filled = 0
            while filled < len(piece):
                try:
                    got = os.preadv(self.fd, [piece[filled:]], offset + filled)
                except OSError as error:
                    raise UnreadableError(f"reading at byte {offset + filled}: {explain(error)}", self.path) from error
                if not got:
                    raise FormatError(f"it became shorter while it was read (at byte {offset + filled})", self.path)
                filled += got
            yield piece
            offset += filled


class Files:
    """The files that spans point into, opened when first needed, at most `MAX_OPEN` at once.

    Raises FormatError when a file is no longer the one that the span was made from, or when it is closed if it was
    changed while it was read. ``progress`` is told the bytes as they are read; ``overflowed`` counts, by the id of
    what was computed, values that a cast made infinite. ``mode`` holds the permissions that all of the files have.
    Plain bytes are read ``block`` at a time.
    """

    def __init__(self, progress: Callable[[int], None] | None = None, block: int = BLOCK) -> None:
        self.progress = progress
        self.block = block
        self.overflowed: dict[int, int] = {}
        self.mode = 0o777
        self._open: OrderedDict[str, File] = OrderedDict()
        self._rooms: list[bytearray] = []

    def __enter__(self) -> Files:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(check=kind is None)

    def close(self, *, check: bool = True) -> None:
        """Closes all files. Raises: FormatError if one was changed since it was opened."""
        try:
            for file in self._open.values():
                if check:
                    file.check()
        finally:
            for file in self._open.values():
                file.close()
            self._open.clear()

    def get(self, span: Span) -> File:
        """Returns the open file of a span. Raises: UnreadableError, FormatError."""
        url = span.url
        file = self._open.get(url)
        if file is not None:
            self._open.move_to_end(url)
        else:
            file = self._open[url] = File(url)
            self.mode &= file.mode
            if hasattr(os, "posix_fadvise"):  # doubles the speed of a cold read
                os.posix_fadvise(file.fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        if span.version is not None and span.version != file.version:
            raise FormatError("it was changed since it was opened", url)
        if len(self._open) > MAX_OPEN:
            with self._open.popitem(last=False)[1]:  # leaving it checks it
                pass
        return file

    def locate(self, span: Span) -> Span:
        """Returns the span with the offset of its first byte: behind the local header, if in a zip."""
        if span.member is None:
            return span
        file = self.get(span)
        start = _payload(file, span, file.read(span.offset, min(HEADER, file.size - span.offset)))
        return span._replace(offset=span.offset + start)

    def member_name(self, span: Span) -> str:
        """Returns the name that stands in the local header of a zip member's span."""
        file = self.get(span)
        length, _ = struct.unpack("<HH", file.read(span.offset + 26, 4))
        return file.read(span.offset + 30, length).decode("utf-8", "replace")

    def blocks(self, span: Span, offset: int = 0, nbytes: int | None = None) -> Iterator[memoryview | bytes]:
        """Yields bytes ``offset`` to ``offset + nbytes`` of a span in blocks, inflated if it is deflated."""
        nbytes = span.nbytes - offset if nbytes is None else nbytes
        if not nbytes:
            return
        blocks: Iterator[memoryview | bytes]
        if span.memory is not None:
            if span.url:  # an array in a pickle: the file's permissions, and whether it is still that file
                self.get(span)
            held = span.memory()[offset : offset + nbytes]
            blocks = (held[start : start + BLOCK] for start in range(0, nbytes, BLOCK))
        elif span.member == "stored" and nbytes == span.nbytes < SMALL_MEMBER:
            blocks = iter((self._small_member(span),))
        else:
            blocks = self._blocks(span, offset, nbytes)
        for block in blocks:
            if self.progress is not None:
                self.progress(len(block))
            yield block

    def _small_member(self, span: Span) -> bytes:
        """Returns a small zip member with one read of its local header and what follows."""
        file = self.get(span)
        guess = file.read(span.offset, min(HEADER + span.nbytes, file.size - span.offset))
        start = _payload(file, span, guess)
        if start + span.nbytes <= len(guess):
            return guess[start : start + span.nbytes]
        return file.read(span.offset + start, span.nbytes)

    def _blocks(self, span: Span, offset: int, nbytes: int) -> Iterator[memoryview | bytes]:
        found = self.locate(span)
        file = self.get(span)
        if found.member == "deflated":
            yield from _window(_inflated(file, found), offset, nbytes)
        elif nbytes < self.block:
            yield from file.blocks(found.offset + offset, nbytes, bytearray(nbytes))
        else:  # the room is used again: touching new memory takes longer than reading into it
            room = self._rooms.pop() if self._rooms else bytearray(self.block)
            try:
                yield from file.blocks(found.offset + offset, nbytes, room)
            finally:
                self._rooms.append(room)

    def read(self, span: Span) -> bytes:
        """Returns the whole span; for small ones."""
        return b"".join(bytes(block) for block in self.blocks(span))


_LOCAL = struct.Struct("<6xH18xHH").unpack_from


def _payload(file: File, span: Span, data: bytes) -> int:
    """Returns where a zip member's payload begins, in bytes behind its local header's first; ``data`` begins there.

    The header has no checksum, and one wrong bit in a length would give other bytes for the tensor's. So the name
    must be as long as the directory says, the extra field be made of whole fields, and behind the payload must stand
    what the header's flags promise: its descriptor (with a signature, as all write it), else the next member or the
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
    """Returns whether the fields of an extra field come to just its length; up to three zeros may pad it."""
    while begin + 4 <= end:
        begin += 4 + data[begin + 2] + (data[begin + 3] << 8)
    return begin == end or (begin < end and not any(data[begin:end]))


def _inflated(file: File, span: Span) -> Iterator[bytes]:
    """Yields a deflated member's content in pieces of `BLOCK` bytes; it must come to exactly its declared size."""
    machine = zlib.decompressobj(-15)
    left = span.nbytes
    pending = bytearray()
    try:
        for block in file.blocks(span.offset, span.packed):
            data: bytes | memoryview = block
            while data and not machine.eof:
                piece = machine.decompress(data, BLOCK)
                data = machine.unconsumed_tail
                left -= len(piece)
                if left < 0:
                    raise FormatError(f"a zip member inflates beyond its declared {span.nbytes} bytes", span.url)
                pending += piece
                while len(pending) >= BLOCK:
                    yield bytes(pending[:BLOCK])
                    del pending[:BLOCK]
        tail = machine.flush()
    except zlib.error as error:
        raise FormatError(f"the deflated zip member at byte {span.offset}: {error}", span.url) from error
    if left != len(tail):
        raise FormatError(f"a zip member inflates to other than its declared {span.nbytes} bytes", span.url)
    yield bytes(pending) + tail


def _window(pieces: Iterator[bytes], offset: int, nbytes: int) -> Iterator[bytes]:
    position = 0
    for piece in pieces:
        begin, end = max(offset - position, 0), min(offset + nbytes - position, len(piece))
        if begin < end:
            yield piece[begin:end]
        position += len(piece)


def identity(path: str) -> tuple[int, int] | None:
    """Returns what two names of one file have in common; None if there is no file."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def names_in(directory: str) -> list[str]:
    """Returns the names in a directory; nothing where there is none (asked once: another run may take it away)."""
    try:
        return os.listdir(directory)
    except (FileNotFoundError, NotADirectoryError):
        return []


def same_file(first: str, second: str) -> bool:
    """Returns whether two paths name one existing file, through links too."""
    try:
        return os.path.samefile(first, second)
    except OSError:
        return False
