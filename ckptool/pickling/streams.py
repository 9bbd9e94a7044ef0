"""Pickles and raw bytes that follow one another in a file, as in torch's formats before the zip."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any, Protocol

from ckptool.errors import FormatError
from ckptool.limits import MAX_PICKLE
from ckptool.pickling import load as pickles

FIRST = 1 << 16
"""Bytes of the first attempt at a pickle whose length nobody has written down; doubled until it is whole."""


class Readable(Protocol):
    """What a stream reads from, such as `ckptool.io.source.Source`."""

    size: int

    def read(self, offset: int, nbytes: int) -> bytes: ...


class PickleStream:
    """A position in a file between two items. ``names`` collects what all pickles so far have named."""

    def __init__(self, file: Readable, position: int = 0, end: int | None = None) -> None:
        self.file = file
        self.position = position
        self.end = file.size if end is None else end
        self.names: dict[tuple[str, str], None] = {}

    def raw_pickle(self) -> bytes:
        """Returns the bytes of the pickle that begins here, and moves behind it."""
        left = max(0, self.end - self.position)
        most = MAX_PICKLE.now()
        want = min(FIRST, most)
        while True:
            data = self.file.read(self.position, min(want, left))
            try:
                stop = pickles.scan(data)
            except pickles.CutOffError as error:
                if len(data) == left:
                    raise FormatError(f"the file ends inside the pickle at byte {self.position}") from error
                if want == most:
                    raise MAX_PICKLE.passed(f"the pickle at byte {self.position} is too long", left) from error
                want = min(2 * want, most)
                continue
            self.position += stop
            return data[:stop]

    def pickle(
        self,
        builders: pickles.Builders | None = None,
        persistent_load: Callable[[Any], Any] | None = None,
    ) -> Any:
        """Returns the tree of the pickle that begins here, and moves behind it."""
        tree, names = pickles.load(self.raw_pickle(), builders=builders, persistent_load=persistent_load)
        self.names.update(dict.fromkeys(names))
        return tree

    def numbers(self, layout: str) -> tuple[Any, ...]:
        """Returns numbers laid out as `struct` says, and moves behind them."""
        size = struct.calcsize(layout)
        if self.position + size > self.end:
            raise FormatError(f"the file ends at byte {self.end}, inside a number at {self.position}")
        values = struct.unpack(layout, self.file.read(self.position, size))
        self.position += size
        return values

    def skip(self, nbytes: int) -> int:
        """Moves behind ``nbytes`` raw bytes; returns where they began. Raises: FormatError if the file ends before."""
        start = self.position
        if nbytes < 0 or start + nbytes > self.end:
            raise FormatError(
                f"the file ends at byte {self.end}, but {nbytes} bytes of data begin at {start}: a truncated download?"
            )
        self.position += nbytes
        return start
