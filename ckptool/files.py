"""Byte ranges from disk, and outputs that appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
import struct
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Literal

from ckptool.checkpoint import Span
from ckptool.errors import FormatError, OutputError, UnreadableError, explain

if TYPE_CHECKING:
    from concurrent.futures import Future, ThreadPoolExecutor

BLOCK = 1 << 20
"""Bytes moved at a time: large enough that a call costs nothing, small enough to stay in the cache."""

WRITE = 1 << 16
"""Bytes per write call. Larger ones make ext4 allocate large folios, which collapses when memory is short."""

SMALL = 1 << 12
"""Bytes below which pieces are gathered: a hundred thousand small tensors must not cost as many system calls."""

AHEAD = 1 << 26
"""Bytes after which what is written is sent to the disk, while more is written: fsync has then little to wait for."""

CLONED = 1 << 12
"""Ranges are cloned in multiples of this, from and to multiples of it: the largest block of the usual file systems."""

WORTH_CLONING = 1 << 20
"""Bytes from which a range is rather cloned than copied."""

_FICLONERANGE = 0x4020940D
"""``_IOW(0x94, 13, struct file_clone_range)`` of ``linux/fs.h``."""

EXISTS = "exists already; --force overwrites it"

PARTIAL = re.compile(r"\.(.+)\.([0-9a-f]{8})\.ckptool-(partial|old)", re.DOTALL)
"""Names of what a killed run leaves: of which file, of which run, and whether it is unfinished or was set aside."""

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
        if not os.path.isfile(path):
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

    def span(
        self, offset: int, nbytes: int, member: Literal["stored", "deflated"] | None = None, packed: int = 0
    ) -> Span:
        """Returns the span of this version of this file."""
        return Span(self.path, offset, nbytes, member, packed, self.version)

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

    def blocks(self, offset: int, nbytes: int, size: int = BLOCK) -> Iterator[memoryview]:
        """Yields the range in pieces of at most ``size`` bytes, each valid until the next is asked for."""
        buffer = memoryview(bytearray(min(size, nbytes)))
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
        header = file.read(span.offset, 30)
        if header[:4] != b"PK\x03\x04":
            raise FormatError(f"no zip member at byte {span.offset}", span.url)
        name, extra = struct.unpack_from("<HH", header, 26)
        start = span.offset + 30 + name + extra
        stored = span.packed if span.member == "deflated" else span.nbytes
        if start + stored > file.size:
            raise FormatError(f"the zip member at byte {span.offset} ends behind the end of the file", span.url)
        return span._replace(offset=start)

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
            held = span.memory()[offset : offset + nbytes]
            blocks = (held[start : start + BLOCK] for start in range(0, nbytes, BLOCK))
        elif span.member == "stored" and nbytes == span.nbytes < WRITE:
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
        guess = file.read(span.offset, min(30 + 256 + span.nbytes, file.size - span.offset))
        if len(guess) < 30 or guess[:4] != b"PK\x03\x04":
            raise FormatError(f"no zip member at byte {span.offset}", span.url)
        name, extra = struct.unpack_from("<HH", guess, 26)
        start = 30 + name + extra
        if start + span.nbytes <= len(guess):
            return guess[start : start + span.nbytes]
        return file.read(span.offset + start, span.nbytes)

    def _blocks(self, span: Span, offset: int, nbytes: int) -> Iterator[memoryview | bytes]:
        found = self.locate(span)
        file = self.get(span)
        if found.member == "deflated":
            yield from _window(_inflated(file, found), offset, nbytes)
        else:
            yield from file.blocks(found.offset + offset, nbytes, self.block)

    def read(self, span: Span) -> bytes:
        """Returns the whole span; for small ones."""
        return b"".join(bytes(block) for block in self.blocks(span))


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


class Output:
    """A file that comes to be under its name only when `commit` is called: temporary file, fsync, rename.

    As a context manager it removes the temporary file unless committed. A symlink is followed, so the link
    stays. The file gets the permissions that a new file gets from the umask and ``readers`` allows (who may not
    read the sources may not read it either), or owner and permissions of the file it replaces; until it is finished
    it is the owner's alone. ACLs and extended attributes are not carried over.

    A run holds a lock on its temporary file. One that nobody holds was left by a run that was killed: the next output
    of the same name removes it (`sweep`). Outputs of one set have one ``run``, and the first holds the lock for all.
    """

    def __init__(self, path: str, *, force: bool = False, fsync: bool = True, run: str | None = None) -> None:
        self.path = path
        self.fsync = fsync
        self.position = 0
        self.readers = 0o777
        self._identity: tuple[int, int] | None = None
        self._pending_name = True
        self._fd = -1
        self._temporary = ""
        self._finished = False
        self._old = ""
        self._pending = bytearray()
        self._sent = 0
        self._sending: Future[None] | None = None
        self._sender: ThreadPoolExecutor | None = None
        self.progress: Callable[[int], None] | None = None
        target = os.path.realpath(path)
        self._target = target
        directory, name = os.path.split(target)
        self._force = force
        replaced = None
        if os.path.isdir(target):
            raise OutputError("is a directory; name a file", path)
        try:  # one question: between two, another run may set the file aside
            replaced = os.stat(target)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR):
                raise OutputError("exists and is not a regular file", path) from error
        if replaced is not None:
            if not stat.S_ISREG(replaced.st_mode):
                raise OutputError("exists and is not a regular file", path)
            if not force:
                raise OutputError(EXISTS, path)
        if run is None:
            sweep([directory], lambda place: place == os.path.join(directory, _short(name)))
        try:
            self._create(directory, _short(name), run)
            self._mode = self._own(replaced)
        except BaseException as error:
            self._discard()
            if not isinstance(error, OSError):
                raise
            reason = "no such directory" if error.errno == errno.ENOENT else explain(error)
            raise OutputError(f"cannot be written: {reason}", path) from error

    def _create(self, directory: str, name: str, run: str | None) -> None:
        """Makes the temporary file and locks it. Raises: OSError."""
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        while True:
            self.run = run or os.urandom(4).hex()
            self._temporary = os.path.join(directory, f".{name}.{self.run}.ckptool-partial")
            try:
                self._fd = os.open(self._temporary, flags, 0o666)
            except OSError:
                self._temporary = ""  # whatever has that name is not ours to remove
                raise
            # Another run may have met it before it was locked, and have taken it for what a killed one left.
            if run is not None or (_lock(self._fd) is not False and os.path.lexists(self._temporary)):
                return
            self._discard()

    def _own(self, replaced: os.stat_result | None) -> int:
        """Gives the file to its owner alone; returns the permissions it is to have. Raises: OSError."""
        status = os.fstat(self._fd)
        self._new = replaced is None
        if not hasattr(os, "fchmod"):
            return stat.S_IMODE(status.st_mode)
        if replaced is not None and hasattr(os, "fchown"):
            for owner in ((replaced.st_uid, replaced.st_gid), (-1, replaced.st_gid)):
                if owner[1] == status.st_gid and owner[0] in (-1, status.st_uid):
                    break
                with contextlib.suppress(OSError):  # only root may give a file away
                    os.fchown(self._fd, *owner)
                    break
        with contextlib.suppress(PermissionError):  # a file system without permissions
            os.fchmod(self._fd, 0o600)
        return stat.S_IMODE(status.st_mode if replaced is None else replaced.st_mode) & 0o777

    def _permit(self) -> None:
        """Gives the finished file its permissions; its owner can always read it."""
        mode = self._mode & (self.readers | 0o400) if self._new else self._mode
        if hasattr(os, "fchmod"):
            with contextlib.suppress(PermissionError):
                os.fchmod(self._fd, mode)

    def __del__(self) -> None:
        if self._pending_name:  # a signal came before `with` had it
            self._discard()

    def _discard(self) -> None:
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)
        if self._temporary:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._temporary)

    def __enter__(self) -> Output:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, _: TracebackType | None) -> None:
        if self._sender is not None:
            self._sender.shutdown()  # whatever it met: the file goes
        if self._pending_name:
            self._discard()
            self._pending_name = False
        elif self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)

    def _failed(self, error: OSError) -> OutputError:
        return OutputError(f"writing at byte {self.position}: {explain(error)}", self.path)

    def reserve(self, nbytes: int) -> None:
        """Asks the file system for room, so that a full disk is known at once; does nothing where it cannot."""
        if not nbytes or not hasattr(os, "posix_fallocate"):
            return
        try:
            os.posix_fallocate(self._fd, 0, nbytes)
        except OverflowError as error:
            raise OutputError(f"no room for {nbytes} bytes: no file can be as large", self.path) from error
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
                raise OutputError(f"no room for {nbytes} bytes: {explain(error)}", self.path) from error

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Appends bytes: small pieces are gathered, large ones go out in writes that end on multiples of `WRITE`."""
        view = memoryview(data).cast("B") if not isinstance(data, bytes) else memoryview(data)
        if len(view) < SMALL:
            self._pending += view
            self.position += len(view)
            if len(self._pending) >= WRITE:
                self._flush()
        else:
            self._flush()
            self._put(view, self.position)
            self.position += len(view)
        if self.progress is not None:
            self.progress(len(view))

    def clones(self, file: File) -> bool:
        """Returns whether ranges of a file can be cloned here: one file system, of a kind that shares extents.

        It is tried, at the beginning of this file, so this is to be asked before anything is written.
        """
        return self.position == 0 and file.size >= WORTH_CLONING and self._clone(file, 0, CLONED, 0)

    def _clone(self, file: File, offset: int, nbytes: int, to: int) -> bool:
        """Has the file system share a range of another file (ioctl FICLONERANGE); returns whether it could."""
        try:
            import fcntl

            fcntl.ioctl(self._fd, _FICLONERANGE, struct.pack("qQQQ", file.fd, offset, nbytes, to))
        except (ImportError, OSError):
            return False
        return True

    def copy(self, files: Files, span: Span) -> None:
        """Appends the bytes of a span: shared with the file they are in where the file system can, else copied."""
        begin, end = 0, span.nbytes
        if span.member is None and span.nbytes >= WORTH_CLONING:
            ahead = -self.position % CLONED
            whole = (span.nbytes - ahead) // CLONED * CLONED
            self._flush()
            file = files.get(span)
            aligned = (span.offset + ahead) % CLONED == 0 and span.offset + span.nbytes <= file.size
            if aligned and self._clone(file, span.offset + ahead, whole, self.position + ahead):
                self._append(files.blocks(span, 0, ahead))
                self._flush()
                self.position += whole
                if self.progress is not None:
                    self.progress(whole)
                begin = ahead + whole
        self._append(files.blocks(span, begin, end - begin))

    def _append(self, blocks: Iterator[memoryview | bytes]) -> None:
        for block in blocks:
            self.write(block)

    def _flush(self) -> None:
        if self._pending:
            self._put(memoryview(bytes(self._pending)), self.position - len(self._pending))
            self._pending.clear()

    def _put(self, view: memoryview, at: int) -> None:
        done = 0
        try:
            while done < len(view):
                piece = view[done : done + WRITE - (at + done) % WRITE]
                done += os.pwrite(self._fd, piece, at + done)
            if self.fsync and at + done - self._sent >= AHEAD:
                self._send(at + done)
        except OSError as error:
            raise self._failed(error) from error

    def _send(self, end: int) -> None:
        """Has another thread send to the disk what has been written, unless it still does. Raises: OSError it met."""
        if self._sending is not None:
            if not self._sending.done():
                return
            self._sending.result()  # the kernel tells of a failed write once, and this was told
        if self._sender is None:
            from concurrent.futures import ThreadPoolExecutor

            self._sender = ThreadPoolExecutor(1)
        self._sending = self._sender.submit(os.fdatasync, self._fd)
        self._sent = end

    def _sent_all(self) -> None:
        """Waits for the other thread. Raises: OSError it met."""
        if self._sender is not None:
            self._sender.shutdown()
            self._sender = None
        if self._sending is not None:
            sending, self._sending = self._sending, None
            sending.result()

    def finished(self) -> str:
        """Returns the temporary file's path, to read it back before `commit`: all its bytes on disk, and no more."""
        if self._fd >= 0 and not self._finished:
            self._flush()
            try:
                self._sent_all()
                os.ftruncate(self._fd, self.position)
                self._permit()
                if self.fsync:
                    os.fsync(self._fd)
            except OSError as error:
                raise self._failed(error) from error
            self._finished = True
        return self._temporary

    def close(self) -> None:
        """Ends the writing, and lets go of the lock; `commit` may come later. A thousand outputs may wait like this."""
        self.finished()
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)

    def rename(self, path: str) -> None:
        """Changes the name that `commit` will give, within the directory. Raises: OutputError if it is taken."""
        target = os.path.join(os.path.dirname(self._target), os.path.basename(path))
        if os.path.lexists(target) and not self._force:
            raise OutputError(EXISTS, path)
        self.path, self._target = path, target

    def commit(self) -> None:
        """Makes the file appear under its name, with all its bytes on disk."""
        self.finished()
        try:
            self._identity = identity(self._temporary)
            self._publish()
            self._pending_name = False
            self.close()  # not before it has its name: who finds it unlocked removes it
            if self.fsync:
                _sync_directory(os.path.dirname(self._target))
        except OSError as error:
            raise self._failed(error) from error

    def keep(self, kept: bool) -> None:
        """Sets whether the temporary file stays whatever happens: the next run then takes back what was half done."""
        self._pending_name = not kept

    def set_aside(self) -> None:
        """Gives the file that is to be replaced, if there is one, another name: `undo` gives it the old one again."""
        if not os.path.lexists(self._target):
            return
        directory, name = os.path.split(self._target)
        self._old = os.path.join(directory, f".{name}.{self.run}.ckptool-old")
        try:
            os.rename(self._target, self._old)
        except OSError as error:
            raise self._failed(error) from error

    def undo(self) -> None:
        """Takes a `commit` back: the file that was set aside has its name again, or there is none. Raises: OSError."""
        if self._old and os.path.lexists(self._old):
            os.replace(self._old, self._target)
        elif self._identity is not None and identity(self._target) == self._identity:
            os.unlink(self._target)

    def forget(self) -> None:
        """Removes the file that was set aside."""
        if self._old:
            with contextlib.suppress(OSError):
                os.unlink(self._old)

    def _publish(self) -> None:
        """Gives the temporary file its name; without ``force`` not even over a file that has appeared meanwhile."""
        if self._force:
            os.replace(self._temporary, self._target)
            return
        try:
            os.link(self._temporary, self._target)
        except FileExistsError:
            raise OutputError(EXISTS, self.path) from None
        except OSError:  # a file system without hard links
            if os.path.lexists(self._target):
                raise OutputError(EXISTS, self.path) from None
            os.replace(self._temporary, self._target)
            return
        os.unlink(self._temporary)


def identity(path: str) -> tuple[int, int] | None:
    """Returns what two names of one file have in common; None if there is no file."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _short(name: str) -> str:
    """Returns as much of a name as leaves room for what is put around it."""
    return os.fsdecode(os.fsencode(name)[:200])


def _lock(fd: int) -> bool | None:
    """Locks an open file for as long as it is open; returns False if another has it, None where there are no locks."""
    try:
        import fcntl

        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        return None
    return True


@contextlib.contextmanager
def locked(directory: str) -> Iterator[None]:
    """Lets one at a time give names in a directory, waiting for others; where there are no locks, all do."""
    fd = -1
    try:
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            fd = os.open(directory, os.O_RDONLY)
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        if fd >= 0:
            os.close(fd)


def sweep(directories: Iterable[str], meant: Callable[[str], bool], last: str | None = None) -> None:
    """Removes what killed runs left of the files whose (shortened) paths are ``meant``, and nothing a live run holds.

    ``last`` is the path of a set's last file. While its unfinished one is there, what its run had set aside gets its
    name again; without it the set was complete, and what was set aside goes.
    """
    runs: dict[str, list[tuple[str, str, str]]] = {}
    for directory in directories:
        with contextlib.suppress(OSError):
            for entry in os.listdir(directory):
                if entry.startswith(".") and (match := PARTIAL.fullmatch(entry)):
                    name, run, kind = match.groups()
                    found = (os.path.join(directory, entry), os.path.join(directory, name), kind)
                    runs.setdefault(run, []).append(found)
    for found_of_run in runs.values():
        _sweep(found_of_run, meant, last)


def _sweep(found: list[tuple[str, str, str]], meant: Callable[[str], bool], last: str | None) -> None:
    partial = [(entry, place) for entry, place, kind in found if kind == "partial"]
    old = [(entry, place) for entry, place, kind in found if kind == "old"]
    if (old and last is None) or not any(meant(place) for _, place in partial + old):
        return
    if not all(_unheld(entry) for entry, _ in partial):
        return
    with contextlib.suppress(OSError):
        undone = any(place == last for _, place in partial)
        for entry, place in sorted(old, key=lambda pair: pair[1] == last):  # the index last, as ever
            if undone:
                os.replace(entry, place)
            else:
                os.unlink(entry)
        for entry, place in sorted(partial, key=lambda pair: pair[1] == last):
            if meant(place):
                _unheld(entry, os.unlink)


def _unheld(path: str, then: Callable[[str], None] | None = None) -> bool:
    """Returns whether a regular file is there that no one has locked; does something to it while it is ours."""
    flags = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        try:
            fd = os.open(path, os.O_RDWR | flags)  # NFS locks what is open for writing
        except PermissionError:
            fd = os.open(path, os.O_RDONLY | flags)
    except OSError:
        return False
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode) or not _lock(fd):
            return False
        if then is not None:
            then(path)
        return True
    except OSError:
        return False
    finally:
        os.close(fd)


def _sync_directory(directory: str) -> None:
    if os.name != "posix":
        return
    fd = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(fd)


def same_file(first: str, second: str) -> bool:
    """Returns whether two paths name one existing file, through links too."""
    try:
        return os.path.samefile(first, second)
    except OSError:
        return False
