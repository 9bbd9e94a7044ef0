"""Blocks of bytes as streams: taken in any amounts, gathered into larger blocks, or read two at a time in step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ckptool.io.source import BLOCK, Bytes


class Stream:
    """Blocks read as a stream of bytes; ``position`` is how many have been taken."""

    def __init__(self, blocks: Iterator[Bytes]) -> None:
        self.blocks = blocks
        self.rest: Bytes = b""
        self.position = 0

    def take(self, most: int) -> Bytes:
        """Returns the next bytes, at least one and at most ``most``; valid until the next call."""
        self.rest = self.rest or next(self.blocks)
        piece = self.rest[:most]
        self.rest = self.rest[len(piece) :]
        self.position += len(piece)
        return piece

    def read(self, nbytes: int) -> Iterator[Bytes]:
        """Yields the next ``nbytes`` bytes in pieces, each valid until the next is asked for."""
        end = self.position + nbytes
        while self.position < end:
            yield self.take(end - self.position)

    def skip_to(self, position: int) -> None:
        while self.position < position:
            self.take(position - self.position)


def gathered(pieces: Iterable[Bytes]) -> Iterator[Bytes]:
    """Yields pieces joined into blocks of `BLOCK` bytes or more; one that is large enough is passed on uncopied."""
    pending = bytearray()
    for piece in pieces:
        if len(piece) >= BLOCK and not pending:
            yield piece
            continue
        pending += piece
        if len(pending) >= BLOCK:
            yield bytes(pending)
            pending.clear()
    if pending:
        yield bytes(pending)


def in_step(
    first: Iterator[Bytes], second: Iterator[Bytes], width: int = 1, other_width: int = 1
) -> Iterator[tuple[Bytes, Bytes]]:
    """Yields pieces with equally many elements from two streams of whole elements, whose blocks may differ in size.

    ``width`` and ``other_width`` are the bytes per element of each. Stops when either stream ends.
    """
    one: Bytes = b""
    other: Bytes = b""
    while True:
        one = one or next(first, b"")
        other = other or next(second, b"")
        count = min(len(one) // width, len(other) // other_width)
        if not count:
            return
        yield one[: count * width], other[: count * other_width]
        one, other = one[count * width :], other[count * other_width :]
