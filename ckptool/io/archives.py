"""What is inside tar archives and compressed files, for messages: leniently, and only as far as that is cheap."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterator
from typing import Any

from ckptool.io.source import BLOCK, Source

ReadAt = Callable[[int, int], bytes]
"""(offset, number of bytes) -> these bytes, fewer where the content ends. Offsets of successive calls only grow."""

MOST_READ, MOST_UNPACKED = 1 << 26, 1 << 28
"""Bytes of a compressed file that are read, and of its content that are unpacked: at most a second's work."""

MOST_XZ = 1 << 27
"""Bytes of memory that unpacking an xz file may take; `xz -9` needs 65 MB."""

MOST_MEMBERS = 1_000
"""Members of an archive that are looked at."""

HEAD = 16
"""Bytes from the start of each member that are looked at."""


def reader(file: Source) -> ReadAt:
    """Returns the function that reads a file as far as it goes."""
    return lambda offset, nbytes: file.read(offset, max(0, min(nbytes, file.size - offset)))


def is_tar(head: bytes) -> bool:
    """Returns whether the first bytes of a file are those of a tar archive (ustar, as all tools of today write)."""
    return head[257:262] == b"ustar"


def tar_members(read_at: ReadAt) -> Iterator[tuple[str, bytes]]:
    """Yields (name, first bytes) of the files in a tar archive; ends at the first header that makes no sense."""
    return ((name, head) for name, head, _, _ in tar_entries(read_at))


def tar_entries(read_at: ReadAt, most: int = MOST_MEMBERS) -> Iterator[tuple[str, bytes, int, int]]:
    """Yields (name, first bytes, offset, number of bytes) of the files in a tar archive, as `tar_members` does."""
    at, long = 0, b""
    for _ in range(most):
        header = read_at(at, 512)
        digits = header[124:136].strip(b"\0 ")
        kind, binary = header[156:157], digits[:1] == b"\x80"
        if len(header) < 512 or not (binary or re.fullmatch(rb"[0-7]*", digits)):
            return
        size = int.from_bytes(header[125:136], "big") if binary else int(digits or b"0", 8)
        data = read_at(at + 512, min(size, 4096 if kind in (b"L", b"x") else HEAD))
        offset = at + 512
        at += 512 + -(-size // 512) * 512
        if kind == b"L":
            long = data.partition(b"\0")[0]
        elif kind == b"x":
            path = re.search(rb"^\d+ path=(.*)$", data, re.MULTILINE)
            long = path[1] if path else b""
        elif kind in (b"0", b"\0"):
            name, prefix = (field.partition(b"\0")[0] for field in (header[:100], header[345:500]))
            name = long or (prefix + b"/" + name if prefix else name)
            long = b""
            if name:
                yield name.decode("utf-8", "backslashreplace"), data, offset, size


def unpacked(file: Source, head: bytes) -> ReadAt | None:
    """Returns the function that reads the content of a gzip, zlib, bzip2, xz or lzma file; None for any other file."""
    if head.startswith(b"\x1f\x8b") or (head[:1] == b"\x78" and int.from_bytes(head[:2], "big") % 31 == 0):
        pieces = _pieces(file, zlib.decompressobj(47), zlib.error)  # 47: either header
    elif head.startswith(b"BZh"):
        import bz2

        pieces = _pieces(file, bz2.BZ2Decompressor(), OSError)
    elif head.startswith((b"\xfd7zXZ", b"\x5d\0\0")):
        import lzma

        pieces = _pieces(file, lzma.LZMADecompressor(memlimit=MOST_XZ), lzma.LZMAError)
    else:
        return None
    start, window = 0, b""

    def read_at(offset: int, nbytes: int) -> bytes:
        nonlocal start, window
        while start + len(window) < offset + nbytes and (piece := next(pieces, None)) is not None:
            if start + len(window) <= offset:
                start, window = start + len(window), piece
            else:
                window += piece
        return window[max(0, offset - start) : max(0, offset - start + nbytes)]

    return read_at


def _pieces(file: Source, machine: Any, failure: type[Exception]) -> Iterator[bytes]:
    """Yields the content of a compressed file in pieces of up to `BLOCK` bytes; ends where it is damaged."""
    total = 0
    for block in file.blocks(0, min(file.size, MOST_READ)):
        data = bytes(block)
        more = True
        while more:
            try:
                piece = machine.decompress(data, BLOCK)
            except failure:
                return
            yield piece
            total += len(piece)
            if machine.eof or total > MOST_UNPACKED:
                return
            data = getattr(machine, "unconsumed_tail", b"")
            more = bool(data) or not getattr(machine, "needs_input", True)
