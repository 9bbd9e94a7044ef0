"""Files by their paths, wherever they are: what there is, opening one, and the open files of a run."""

from __future__ import annotations

import os
import struct
import sys
from _thread import allocate_lock  # importing `threading` takes a millisecond, and every command imports this file
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator

from ckptool.core.tensor import Span, TensorInfo
from ckptool.errors import FormatError
from ckptool.io import paths, system
from ckptool.io.source import (
    BLOCK,
    HEADER,
    SMALL_MEMBER,
    LocalFile,
    Source,
    inflated,
    locate,
    small_member,
    window,
)
from ckptool.limits import MAX_INDEX, Limit

MAX_OPEN = 32
"""Files kept open for reading at once (a checkpoint may have hundreds of shards)."""


def opened(path: str) -> Source:
    """Returns the open file at a path or URL: the one place that chooses. Raises: UnreadableError, DependencyError."""
    if not paths.is_url(path):
        return LocalFile(path)
    from ckptool.io import remote

    return remote.opened(path)


def look_again(path: str) -> None:
    """Forgets what was found at remote paths before, if this is one."""
    if paths.is_url(path):
        from ckptool.io import remote

        remote.refresh()


def is_directory(path: str) -> bool:
    """Returns whether there is a directory at a path; over https, whether the URL ends as one."""
    if not paths.is_url(path):
        return os.path.isdir(path)
    from ckptool.io import remote

    return remote.is_directory(path)


def is_file(path: str) -> bool:
    """Returns whether there is a file at a path."""
    if not paths.is_url(path):
        return os.path.isfile(path)
    from ckptool.io import remote

    return remote.kind(path) == "file"


def exists(path: str) -> bool:
    """Returns whether there is something at a path; not for a link to nowhere."""
    return os.path.exists(path) if not paths.is_url(path) else is_file(path) or is_directory(path)


def size_of(path: str) -> int:
    """Returns the bytes of a file. Raises: UnreadableError, OSError."""
    if not paths.is_url(path):
        return os.path.getsize(path)
    with opened(path) as file:
        return file.size


def ahead(wanted: Iterable[str]) -> None:
    """Has files that will be opened soon opened at the same time, as far as that is faster: remote ones."""
    if urls := [path for path in wanted if paths.is_url(path)]:
        from ckptool.io import remote

        remote.ahead(urls)


def names_in(directory: str) -> list[str]:
    """Returns the names in a directory; empty without one. One call: another process may remove it meanwhile."""
    if paths.is_url(directory):
        from ckptool.io import remote

        return remote.names_in(directory)
    try:
        return os.listdir(directory)
    except (FileNotFoundError, NotADirectoryError):
        return []


class Files:
    """The files that spans point into, opened on first use, at most `MAX_OPEN` at once.

    Raises FormatError if a file is not the version that the span was made from, or was changed while it was open.
    ``progress`` is called with numbers of bytes read. ``changed`` counts values that a cast changed in kind, by the id
    of the `Derived` (see `core.dtypes.Changed`). ``mode``: the permissions that all files have in common. Plain bytes
    are read ``block`` at a time.
    ``opener`` opens a file by its name. One object is for one thread; `beside` makes another for the same files.
    """

    def __init__(
        self,
        progress: Callable[[int], None] | None = None,
        block: int = BLOCK,
        opener: Callable[[str], Source] = opened,
    ) -> None:
        self.progress = progress
        self.block = block
        self.opener = opener
        self.changed: dict[int, tuple[int, ...]] = {}
        self.mode = 0o777
        self._open: OrderedDict[str, Source] = OrderedDict()
        self._lock = allocate_lock()
        self._rooms: list[bytearray] = []
        self._expected: dict[str, list[tuple[int, int]]] = {}
        self._notes: dict[str, None] = {}

    def beside(self, progress: Callable[[int], None] | None = None) -> Files:
        """Returns another object with the same open files and its own counts; it need not be closed."""
        made = Files(progress, self.block, self.opener)
        made._open, made._lock, made._expected, made._notes = self._open, self._lock, self._expected, self._notes
        return made

    def __enter__(self) -> Files:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(check=kind is None)

    def close(self, *, check: bool = True) -> None:
        """Closes all files. Raises: FormatError if one was changed since it was opened."""
        try:
            if check:
                self.check()
        finally:
            for file in self._open.values():
                file.close()
            self._open.clear()

    def check(self) -> None:
        """Raises FormatError if one of the open files was changed since it was opened."""
        for file in self._open.values():
            self._check(file)

    def _check(self, file: Source) -> None:
        file.check()
        self._notes.update(dict.fromkeys(file.notes()))

    def notes(self) -> tuple[str, ...]:
        """Returns what is to be known of how files were read, as far as they were checked."""
        return tuple(self._notes)

    def expect(self, tensors: Iterable[TensorInfo]) -> None:
        """Has remote files know what will be read of them, so that it is joined to few requests, and fetched ahead."""
        if "ckptool.io.remote" not in sys.modules:  # most runs: nothing is remote
            return
        for span in dict.fromkeys(storage.span for tensor in tensors for storage in tensor.storages()):
            if paths.is_url(span.url) and span.memory is None:
                ahead = 0 if span.member is None else HEADER
                end = span.offset + ahead + (span.nbytes if span.member is None else span.packed)
                self.will_read(span.url, span.offset, end)

    def will_read(self, url: str, begin: int, end: int) -> None:
        """Takes note of a range of a file that is not open yet."""
        if paths.is_url(url):
            self._expected.setdefault(url, []).append((begin, end))

    def open(self, url: str) -> Source:
        """Returns the open file of that name. Raises: UnreadableError; FormatError if an evicted file was changed.

        An evicted file is closed by its last reference: another thread may still read it.
        """
        with self._lock:
            file = self._open.get(url)
            if file is not None:
                self._open.move_to_end(url)
                return file
            file = self._open[url] = self.opener(url)
            self.mode &= file.mode
            file.read_ahead(self._expected.get(url, ()))
            if len(self._open) > MAX_OPEN:
                self._check(self._open.popitem(last=False)[1])
        return file

    def get(self, span: Span) -> Source:
        """Returns the open file of a span. Raises: UnreadableError, FormatError."""
        file = self.open(span.url)
        if span.version is not None and span.version != file.version:
            raise FormatError("it was changed since it was opened", span.url)
        return file

    def locate(self, span: Span) -> Span:
        """Returns the span with the offset of its first byte: behind the local header, if in a zip."""
        return span if span.member is None else locate(self.get(span), span)

    def member_name(self, span: Span) -> str:
        """Returns the name in the local header of a zip member."""
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
            blocks = iter((small_member(self.get(span), span),))
        else:
            blocks = self._blocks(span, offset, nbytes)
        for block in blocks:
            if self.progress is not None:
                self.progress(len(block))
            yield block

    def _blocks(self, span: Span, offset: int, nbytes: int) -> Iterator[memoryview | bytes]:
        file = self.get(span)
        found = locate(file, span)
        if found.member == "deflated":
            yield from window(inflated(file, found), offset, nbytes)
        elif nbytes < self.block:
            yield from file.blocks(found.offset + offset, nbytes, bytearray(nbytes))
        else:  # reuses buffers: touching new memory takes longer than reading into it
            room = self._rooms.pop() if self._rooms else bytearray(self.block)
            try:
                yield from file.blocks(found.offset + offset, nbytes, room)
            finally:
                self._rooms.append(room)
        if self._open.get(span.url) is not file:  # it was evicted meanwhile, and checked then
            file.check()

    def read(self, span: Span) -> bytes:
        """Returns the whole span; for small ones."""
        return b"".join(bytes(block) for block in self.blocks(span))


def identity(path: str) -> tuple[int, int] | None:
    """Returns the file's (device, inode); None if there is no file."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def same_place(first: str, second: str) -> bool:
    """Returns whether two paths are of one file or directory, which need not exist."""
    if paths.is_url(first) or paths.is_url(second):
        return place_of(first) == place_of(second)
    return system.same_file(first, second) or system.canonical(first) == system.canonical(second)


def place_of(path: str) -> tuple[str, str]:
    """Returns what is equal for two paths of one file, which need not exist, but for hard links."""
    if not paths.is_url(path):
        return "", system.canonical(path)
    from ckptool.io.remote import stores

    return stores.place_of(path)


def read_given(path: str, what: str, limit: Limit = MAX_INDEX) -> bytes:
    """Returns all of a small file that a user names, such as rules; a pipe is read, too.

    ``what``: it is, for the error. Raises: LimitError for more bytes than the ``limit``, OSError.
    """
    if paths.is_url(path):
        with opened(path) as remote:
            content, nbytes = remote.read(0, min(remote.size, limit.now() + 1)), remote.size
    else:
        with open(path, "rb") as file:
            content = file.read(limit.now() + 1)
            nbytes = os.fstat(file.fileno()).st_size  # 0 for a pipe
    if len(content) > limit.now():
        enough = max(nbytes, len(content)) if nbytes else None
        raise limit.passed(f"{what} of {f'{enough:,} bytes' if enough else 'more bytes than are read'}", enough, path)
    return content
