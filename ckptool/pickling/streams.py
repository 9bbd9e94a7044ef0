"""Reads consecutive pickles and raw bytes from a file, as in torch's formats older than the zip archive."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from ckptool.core.pickled_names import beyond_tensors
from ckptool.errors import FormatError, listed
from ckptool.limits import MAX_PICKLE
from ckptool.pickling import load as pickles

MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
"""The first pickle of torch's legacy format."""

_NUMBER = b"\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."
MAGIC = b"\x80\x02" + _NUMBER
MAGICS = (
    MAGIC, b"\x80\x03" + _NUMBER, *(b"\x80%c\x95\x0d" % n + bytes(7) + _NUMBER for n in (4, 5)),
    b"L%dL\n." % MAGIC_NUMBER,
)  # fmt: skip
"""That pickle in the protocols 2 (torch's own), 3, 4 and 5, 0 and 1."""

CHECKPOINTS = (*MAGICS, b"PK\x03\x04")
"""How torch's files begin; a zip archive may be anything."""

FIRST = 1 << 16
"""Bytes read at first for a pickle, whose length is not in the file; doubled until the pickle is complete."""


class Readable(Protocol):
    """What a stream reads from, such as `ckptool.io.source.Source`."""

    size: int

    def read(self, offset: int, nbytes: int) -> bytes: ...


class PickleStream:
    """Reads items from a file in order. ``names`` collects the globals that the pickles read so far refer to."""

    def __init__(self, file: Readable, position: int = 0, end: int | None = None) -> None:
        self.file = file
        self.position = position
        self.end = file.size if end is None else end
        self.names: dict[tuple[str, str], None] = {}

    def raw_pickle(self) -> bytes:
        """Returns the bytes of the pickle at the position, and advances past it."""
        available = max(0, self.end - self.position)
        most = MAX_PICKLE.now()
        want = min(FIRST, most)
        while True:
            data = self.file.read(self.position, min(want, available))
            try:
                stop = pickles.scan(data)
            except pickles.CutOffError as error:
                if len(data) == available:
                    raise FormatError(f"the file ends inside the pickle at byte {self.position}") from error
                if want == most:
                    raise MAX_PICKLE.passed(f"the pickle at byte {self.position} is too long", available) from error
                want = min(2 * want, most)
                continue
            self.position += stop
            return data[:stop]

    def pickle(
        self,
        builders: pickles.Builders | None = None,
        persistent_load: Callable[[Any], Any] | None = None,
    ) -> Any:
        """Returns the tree of the pickle at the position, and advances past it."""
        tree, names = pickles.load(self.raw_pickle(), builders=builders, persistent_load=persistent_load)
        self.names.update(dict.fromkeys(names))
        return tree

    def numbers(self, layout: str) -> tuple[Any, ...]:
        """Returns numbers in a layout as `struct` has it, and advances past them."""
        size = struct.calcsize(layout)
        if self.position + size > self.end:
            raise FormatError(f"the file ends at byte {self.end}, inside a number at {self.position}")
        values = struct.unpack(layout, self.file.read(self.position, size))
        self.position += size
        return values

    def skip(self, nbytes: int) -> int:
        """Advances past ``nbytes`` raw bytes; returns their offset. Raises: FormatError if the file ends before."""
        start = self.position
        if nbytes < 0 or start + nbytes > self.end:
            raise FormatError(
                f"the file ends at byte {self.end}, but {nbytes} bytes of data begin at {start}: a truncated download?"
            )
        self.position += nbytes
        return start


def calls(names: Iterable[tuple[str, str]]) -> str:
    """Returns what a message adds on the names that tensors do not need; "" if there is none."""
    others = beyond_tensors(names)
    return f"; its pickles name {listed(list(others))}, which was not run" if others else ""
