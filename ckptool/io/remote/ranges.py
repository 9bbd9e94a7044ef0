"""A file of which ranges are fetched: pieces that are kept, joined and fetched ahead; retries, and what changed.

A read fetches what it asks for and a little more, since headers are read in small steps. With `RemoteFile.read_ahead`
the ranges that will be read are known: neighbours are joined, cut into cells, and fetched some cells ahead.
"""

from __future__ import annotations

import hashlib
import random
import re
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextvars import copy_context
from typing import NamedTuple, TypeVar

from ckptool.errors import CkptoolError, FormatError, UnreadableError
from ckptool.io import paths, tally
from ckptool.io.source import Source, Spool

T = TypeVar("T")

HEAD = 1 << 17
"""Bytes read from the start of a file, and from its end if a zip's directory is wanted: headers of 500 tensors."""

SMALL = 1 << 16
"""Bytes that a small read fetches."""

JOIN = 1 << 17
"""Bytes between two ranges that are fetched in one request: a request takes as long as some 128 kB."""

CELL = 1 << 22
"""Bytes of one request of a longer range."""

AHEAD = 4
"""Cells that are fetched before they are read."""

KEPT = 8
"""Pieces kept of those that were not expected."""

CELLS = 8
"""Cells kept behind a small read."""

AT_ONCE = 16
"""Requests at the same time."""

TRIES = 5
"""Requests in a row that may bring less than `SMALL` bytes."""

PAUSE, LONGEST = 0.25, 8.0
"""Seconds before the second request, doubled before each further one, up to the longest; half of it by chance."""

WHOLE = 0.9
"""The share of a file's bytes from which all are fetched if its name has a hash to compare."""

HASH = re.compile(r"-(?!(?:19|20)\d{6}\.)([0-9a-f]{8,64})\.\w+(\.tar)?")
"""The first hex digits of the sha256 in a name, as torch.hub has them; eight digits may be a date."""


class Broken(Exception):
    """A request that failed, and may be tried again after ``pause`` seconds."""

    def __init__(self, reason: str, pause: float = 0) -> None:
        super().__init__(reason)
        self.reason, self.pause = reason, pause


class Origin:
    """Where the bytes of a remote file come from. ``note``: what is to be known of that.

    ``spool``: all of it, where no ranges can be asked for, ``moved`` so many bytes of it by this object.
    """

    size = 0
    version: tuple[int, ...] | None = None
    note = ""
    moved = 0
    spool: Spool | None = None

    def begin(self, nbytes: int) -> bytes:
        """Finds the size and version, and returns the first bytes if they came along. Raises: Broken, CkptoolError."""
        raise NotImplementedError

    def fetch(self, begin: int, end: int, into: bytearray) -> None:
        """Appends the bytes of a range, as far as they come. Raises: Broken, CkptoolError."""
        raise NotImplementedError

    def check(self) -> None:
        """Raises FormatError if the file was changed, unless every `fetch` finds that."""


_places = threading.Semaphore(AT_ONCE)


def started(job: Callable[[], T]) -> Future[T]:
    """Returns the coming result of a call on another thread, which does not keep the process from ending."""
    coming: Future[T] = Future()
    context = copy_context()  # it holds the limits in force

    def run() -> None:
        with _places:
            try:
                coming.set_result(context.run(job))
            except BaseException as error:
                coming.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return coming


def _pause(failed: int, least: float) -> None:
    time.sleep(max(least, min(LONGEST, PAUSE * 2**failed) * (0.5 + random.random() / 2)))


class _Piece(NamedTuple):
    begin: int
    end: int
    data: Future[bytes]
    expected: bool


class RemoteFile(Source):
    """An open file behind a URL. Any thread may read it."""

    again = False

    def __init__(self, path: str, origin: Origin) -> None:
        self.path, self.origin = path, origin
        self._lock = threading.Lock()
        self._pieces: list[_Piece] = []
        self._cells: list[tuple[int, int]] = []
        self._asked: set[int] = set()
        self._last = -1
        named = HASH.search(paths.basename(path))
        self._named = named[1] if named else ""
        self._digest, self._digested, self._hashed = hashlib.sha256(), 0, False
        first = self._begun()
        self.size, self.version = origin.size, origin.version
        self._head = len(first)
        if first:
            self._hold(0, first)
            self._hash(0, first if origin.spool is None else b"")

    def _hold(self, begin: int, data: bytes) -> None:
        held: Future[bytes] = Future()
        held.set_result(data)
        self._pieces.append(_Piece(begin, begin + len(data), held, False))

    def look(self) -> RemoteFile:
        """Fetches the first bytes, and of a zip archive the last ones, where its directory is; returns the file."""
        if not self._pieces and self.size:
            self._hold(0, self._whole(0, min(HEAD, self.size)))
        if (end := self._pieces[0].end if self._pieces else 0) < self.size and self.read(0, 4) == b"PK\3\4":
            begin = max(end, self.size - HEAD)
            self._hold(begin, self._whole(begin, self.size))
        return self

    def _begun(self) -> bytes:
        for failed in range(TRIES):
            try:
                first = self.origin.begin(HEAD)
                self._count(len(first) if self.origin.spool is None else self.origin.moved)
                return first
            except Broken as error:
                self._count(0)
                reason, least = error.reason, error.pause
                if failed < TRIES - 1:
                    _pause(failed, least)
        raise UnreadableError(f"cannot be read: {reason} ({TRIES} requests)", self.path)

    def _count(self, nbytes: int) -> None:
        if tally.current is not None:
            tally.current.add(self.path, nbytes, 1)

    def _whole(self, begin: int, end: int) -> bytes:
        """Returns a range; a broken answer is continued where it ended. Raises: UnreadableError, FormatError."""
        got = bytearray()
        failed = 0
        while len(got) < end - begin:
            before, reason, least = len(got), "the answer ends too early", 0.0
            try:
                self.origin.fetch(begin + before, end, got)
            except Broken as error:
                reason, least = error.reason, error.pause
            except CkptoolError as error:
                error.path = error.path or self.path
                raise
            self._count(len(got) - before)
            if len(got) < end - begin:
                failed += len(got) - before < SMALL
                if failed >= TRIES:
                    what = f"bytes {begin}-{end} cannot be read: {reason} ({TRIES} requests)"
                    raise UnreadableError(what, self.path)
                _pause(failed, least)
        return bytes(got)

    def read(self, offset: int, nbytes: int) -> bytes:
        end = offset + nbytes
        if offset < 0 or nbytes < 0 or end > self.size:
            raise FormatError(f"bytes {offset}-{end} are wanted of a file of {self.size}", self.path)
        if self.origin.spool is not None:
            return self.origin.spool.read(offset, nbytes)
        parts = []
        while offset < end:
            with self._lock:
                piece = self._piece(offset, end)
            data = piece.data.result()
            if piece.expected:
                self._hash(piece.begin, data)
            parts.append(data[offset - piece.begin : end - piece.begin])
            offset += len(parts[-1])
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _piece(self, offset: int, end: int) -> _Piece:
        """Returns a piece that has the byte at ``offset``, and starts those that will be read next."""
        number = bisect_right(self._cells, (offset, self.size)) - 1
        inside = number >= 0 and offset < self._cells[number][1]
        if inside:
            in_order, self._last = number in (self._last, self._last + 1), number
            coming = self._cells[number : number + 1 + AHEAD * in_order]
            for cell in coming:
                if cell[0] not in self._asked:
                    self._asked.add(cell[0])
                    self._start(*cell, expected=True)
        behind = [one for one in self._pieces if one.expected and one.end <= offset and one.data.done()]
        for one in behind if end - offset >= SMALL else behind[:-CELLS]:  # a small read may look what follows a tensor
            self._pieces.remove(one)
        for piece in self._pieces:
            if piece.begin <= offset < piece.end:
                if not piece.expected and piece.begin:  # the head stays; of the others, those that were used last
                    self._pieces.remove(piece)
                    self._pieces.append(piece)
                return piece
        begin, stop = offset, min(max(end, offset + SMALL), offset + CELL, self.size)
        if not self._cells and self.size - offset <= HEAD:
            begin, stop = max(0, self.size - HEAD), self.size
        return self._start(begin, stop)

    def _start(self, begin: int, end: int, expected: bool = False) -> _Piece:
        piece = _Piece(begin, end, started(lambda: self._whole(begin, end)), expected)
        kept = [one for one in self._pieces if not one.expected and one.begin]
        if len(kept) >= KEPT and not expected:
            self._pieces.remove(kept[0])
        self._pieces.append(piece)
        return piece

    def read_ahead(self, ranges: Sequence[tuple[int, int]] = ()) -> None:
        """Takes note of the ranges (begin, end) that will be read: they are joined, and fetched ahead."""
        if self.origin.spool is not None:
            return
        runs: list[list[int]] = []
        nbytes = 0
        for begin, end in sorted((max(begin, self._head), end) for begin, end in ranges if end > self._head):
            nbytes += max(0, min(end, self.size) - max(begin, runs[-1][1] if runs else 0))
            if runs and begin <= runs[-1][1] + JOIN:
                runs[-1][1] = max(runs[-1][1], min(end, self.size))
            else:
                runs.append([begin, min(end, self.size)])
        self._hashed = bool(self._named) and self._head + nbytes >= WHOLE * self.size
        if self._hashed:
            runs = [[self._head, self.size]]
        with self._lock:
            self._cells = [(at, min(at + CELL, end)) for begin, end in runs for at in range(begin, end, CELL)]
            self._asked.clear()
            self._last = -1

    def _hash(self, begin: int, data: bytes) -> None:
        """Hashes bytes of a file whose name has a hash, if they follow those that were hashed."""
        if self._named and begin == self._digested:
            with self._lock:
                if begin == self._digested:
                    self._digest.update(data)
                    self._digested += len(data)

    def check(self) -> None:
        self.origin.check()
        if not self._named:
            return
        if self.origin.spool is not None and not self._digested:
            for block in self.origin.spool.blocks(0, self.size):
                self._hash(self._digested, bytes(block))
        while self._hashed and 0 < self.size - self._digested <= (1 - WHOLE) * self.size + CELL:  # what nobody read
            begin = self._digested
            held = next((one for one in self._pieces if one.begin == begin), None)
            self._hash(begin, held.data.result() if held else self._whole(begin, min(begin + CELL, self.size)))
        if self._digested == self.size and not self._digest.hexdigest().startswith(self._named):
            found = self._digest.hexdigest()[: len(self._named)]
            what = f"its sha256 begins with {found}, its name says {self._named}"
            raise FormatError(f"{what}: a damaged download, or another file under that name", self.path)

    def close(self) -> None:
        self._pieces = []

    def notes(self) -> list[str]:
        """Returns what is to be known of how it was read."""
        found = [f"{self.path}: {self.origin.note}"] if self.origin.note else []
        if self._named:
            checked = self._digested == self.size > 0
            what = "is that of the file" if checked else "was not checked: not all of the file was read"
            found.append(f"{self.path}: the sha256 in its name, {self._named}, {what}")
        return found
