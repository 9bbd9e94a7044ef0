"""Outputs: what the formats write into, which has its name when it is complete; files of this machine."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ckptool.core.tensor import Span
from ckptool.errors import OutputError, explain
from ckptool.io import system
from ckptool.io.files import Files, identity
from ckptool.io.leftovers import short, sweep
from ckptool.io.source import Source

if TYPE_CHECKING:
    from concurrent.futures import Future, ThreadPoolExecutor
    from typing import Self

WRITE = 1 << 16
"""Bytes per write call. Larger ones make ext4 allocate large folios, which collapses when memory is short."""

SMALL = 1 << 12
"""Writes below this many bytes are buffered: 100,000 small tensors must not cost as many system calls."""

AHEAD = 1 << 26
"""Bytes after which another thread calls fdatasync while writing goes on, so that the final fsync is short."""

CLONED = 1 << 12
"""Alignment of cloned ranges (reflinks): the largest block size of common file systems."""

WORTH_CLONING = 1 << 20
"""Bytes from which a range is cloned rather than copied."""

EXISTS = "exists already; --force overwrites it"


class Output:
    """A file that is written from its begin to its end, and has its name, complete, from `commit` on.

    `targets.create` makes one; where the bytes go is up to the class. ``path`` is for messages. ``position``: bytes
    written so far; ``progress`` is called with more of them. ``readers``: permissions that all sources have. As a
    context manager it removes what it wrote unless committed. ``staged``: it can be read before it has its name.
    ``sha256``: the hash of its bytes where that is taken while they are written, as hashlib has it.
    ``restores``: whether `undo` gives a replaced file its name again; ``lost``: whether one is gone for good.
    """

    staged = True
    sha256: Any = None
    restores = True
    lost = False

    def __init__(self, path: str) -> None:
        self.path = path
        self.position = 0
        self.readers = 0o777
        self.run = ""
        self.progress: Callable[[int], None] | None = None
        self._pending = bytearray()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, _: TracebackType | None) -> None:
        raise NotImplementedError

    def reserve(self, nbytes: int) -> None:
        """Says how many bytes are to come. Raises: OutputError if there is no room for them."""

    def clones(self, file: Source) -> bool:
        """Returns whether ranges of a file can be cloned into this one: both on one file system with reflinks."""
        return False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Appends bytes; small pieces are buffered."""
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

    def copy(self, files: Files, span: Span) -> None:
        """Appends the bytes of a span."""
        self._append(files.blocks(span))

    def _append(self, blocks: Iterator[memoryview | bytes]) -> None:
        for block in blocks:
            self.write(block)

    def _flush(self) -> None:
        if self._pending:
            self._put(memoryview(bytes(self._pending)), self.position - len(self._pending))
            self._pending.clear()

    def _put(self, view: memoryview, at: int) -> None:
        """Writes bytes behind those before. Raises: OutputError."""
        raise NotImplementedError

    def finished(self) -> str:
        """Finishes the file and returns its path, so that it can be read back before `commit`."""
        raise NotImplementedError

    def close(self) -> None:
        """Releases what an open file takes, so that thousands of outputs can await `commit`."""

    def rename(self, path: str) -> None:
        """Changes the name of the output, within its directory. Raises: OutputError if it exists."""
        raise NotImplementedError

    def commit(self) -> None:
        """Finishes the file, and gives it its name. Raises: OutputError."""
        raise NotImplementedError

    def set_aside(self) -> None:
        """Takes its name from the file to be replaced, if any, so that `undo` restores it if that is possible."""
        raise NotImplementedError

    def undo(self) -> None:
        """Undoes a `commit`. Raises: OSError, OutputError."""
        raise NotImplementedError

    def keep(self, kept: bool) -> None:
        """Sets whether what is unfinished stays on failure, for the next run to find."""

    def link(self) -> None:
        """Makes `commit` keep a mark that a set is unfinished, if supported, until `forget`."""

    def forget(self) -> None:
        """Removes what `set_aside` and `link` keep."""


class LocalOutput(Output):
    """A file of this machine: a staging file, which `commit` syncs and renames.

    A symlink is followed, so the link stays. A new file gets the permissions that both the umask and ``readers`` allow
    (who may not read the sources may not read it either); otherwise it gets the owner and permissions of the file it
    replaces. Until it is finished only the owner can read it. ACLs and extended attributes are not copied.

    A process locks its staging file. One without a lock was left by a killed process: the next output of the same name
    removes it (`sweep`). Outputs of one set have one ``run``, and the lock of the first covers all.
    """

    def __init__(self, path: str, *, force: bool = False, fsync: bool = True, run: str | None = None) -> None:
        self._begin(path, fsync)
        target = self._target
        directory, name = os.path.split(target)
        self._force = force
        replaced = None
        if os.path.isdir(target):
            raise OutputError("is a directory; name a file", path)
        try:  # one call: between two, another process may rename the file
            replaced = os.stat(target)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR):
                raise OutputError(f"cannot be written: {explain(error)}", path) from error
        if replaced is not None:
            if not stat.S_ISREG(replaced.st_mode):
                raise OutputError("exists and is not a regular file", path)
            if not force:
                raise OutputError(EXISTS, path)
        if run is None:
            sweep([directory], lambda path: path == os.path.join(directory, short(name)))
        try:
            self._create(directory, short(name), run)
            self._mode = self._own(replaced)
        except BaseException as error:
            self._discard()
            if not isinstance(error, OSError):
                raise
            reason = "no such directory" if error.errno == errno.ENOENT else explain(error)
            raise OutputError(f"cannot be written: {reason}", path) from error

    def _begin(self, path: str, fsync: bool) -> None:
        Output.__init__(self, path)
        self.fsync = fsync
        self._identity: tuple[int, int] | None = None
        self._pending_name = True
        self._fd = -1
        self._temporary = ""
        self._finished = False
        self._old = ""
        self._linked = False
        self._sent = 0
        self._sending: Future[None] | None = None
        self._sender: ThreadPoolExecutor | None = None
        self._target = system.reachable(os.path.realpath(path))

    def _create(self, directory: str, name: str, run: str | None) -> None:
        """Creates and locks the staging file. Raises: OSError."""
        flags = system.flags("O_RDWR", "O_CREAT", "O_EXCL")
        while True:
            self.run = run or os.urandom(4).hex()
            self._temporary = staging(os.path.join(directory, name), self.run)
            try:
                self._fd = os.open(self._temporary, flags, 0o666)
            except OSError:
                self._temporary = ""  # an existing file of that name must not be removed
                raise
            # Before it was locked, another process may have removed it as that of a killed one.
            if run is not None or (system.lock(self._fd) is not False and os.path.lexists(self._temporary)):
                return
            self._discard()

    def _own(self, replaced: os.stat_result | None) -> int:
        """Sets the owner, and permissions for the owner only; returns the final permissions. Raises: OSError."""
        status = os.fstat(self._fd)
        self._new = replaced is None
        for owner in ((replaced.st_uid, replaced.st_gid), (-1, replaced.st_gid)) if replaced else ():
            if owner[1] == status.st_gid and owner[0] in (-1, status.st_uid):
                break
            if system.give(self._fd, *owner):
                break
        system.permit(self._fd, 0o600)
        return stat.S_IMODE(status.st_mode if replaced is None else replaced.st_mode) & 0o777

    def _permit(self) -> None:
        """Sets the permissions of the finished file; its owner can always read it."""
        mode = self._mode & (self.readers | 0o400) if self._new else self._mode
        system.permit(self._fd, mode)

    def __del__(self) -> None:
        if self._pending_name:  # interrupted before `with` was entered
            self._discard()

    def _close(self) -> None:
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)

    def _discard(self) -> None:
        self._close()
        if self._temporary:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._temporary)

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, _: TracebackType | None) -> None:
        if self._sender is not None:
            self._sender.shutdown()  # its errors do not matter: the file is removed
        if self._pending_name:
            self._discard()
            self._pending_name = False
        self._close()

    def _failed(self, error: OSError) -> OutputError:
        return OutputError(f"writing at byte {self.position}: {explain(error)}", self.path)

    def reserve(self, nbytes: int) -> None:
        """Allocates disk space, so that a full disk fails at once; does nothing where this is not supported."""
        if not nbytes:
            return
        try:
            system.allocate(self._fd, nbytes)
        except OverflowError as error:
            raise OutputError(f"no room for {nbytes} bytes: no file can be as large", self.path) from error
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
                raise OutputError(f"no room for {nbytes} bytes: {explain(error)}", self.path) from error

    def clones(self, file: Source) -> bool:
        """Tries it at the beginning of this file, so call it before anything is written."""
        return self.position == 0 and file.size >= WORTH_CLONING and self._clone(file, 0, CLONED, 0)

    def _clone(self, file: Source, offset: int, nbytes: int, to: int) -> bool:
        """Clones a range of another file; returns whether it could."""
        return file.clone(self._fd, offset, nbytes, to)

    def copy(self, files: Files, span: Span) -> None:
        """Appends the bytes of a span: cloned (reflinked) if the file system supports it, else copied."""
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

    def _put(self, view: memoryview, at: int) -> None:
        """Writes in calls that end on multiples of `WRITE`."""
        done = 0
        try:
            while done < len(view):
                piece = view[done : done + WRITE - (at + done) % WRITE]
                done += system.pwrite(self._fd, piece, at + done)
            if self.fsync and at + done - self._sent >= AHEAD:
                self._send(at + done)
        except OSError as error:
            raise self._failed(error) from error

    def _send(self, end: int) -> None:
        """Starts fdatasync on another thread, unless one is running. Raises: OSError of the previous one."""
        if self._sending is not None:
            if not self._sending.done():
                return
            self._sending.result()  # the kernel reports a failed write only once: to that call
        if self._sender is None:
            from concurrent.futures import ThreadPoolExecutor

            self._sender = ThreadPoolExecutor(1)
        self._sending = self._sender.submit(system.datasync, self._fd)
        self._sent = end

    def _sent_all(self) -> None:
        """Waits for the other thread. Raises: OSError of its fdatasync."""
        if self._sender is not None:
            self._sender.shutdown()
            self._sender = None
        if self._sending is not None:
            sending, self._sending = self._sending, None
            sending.result()

    def finished(self) -> str:
        """Finishes the staging file, and returns its path, so that it can be read back before `commit`."""
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
        """Finishes the file and releases its descriptor and lock, so that thousands of outputs can await `commit`."""
        self.finished()
        self._close()

    def leave(self) -> None:
        """Leaves the writing to `Part`s, of other processes too, until `take`."""
        self._close()

    def take(self, nbytes: int) -> None:
        """Takes the file back, of which `Part`s have written ``nbytes`` bytes, to finish it. Raises: OutputError."""
        self.position = nbytes
        try:
            self._fd = os.open(self._temporary, system.flags("O_RDWR")) if self._fd < 0 else self._fd
        except OSError as error:
            raise self._failed(error) from error

    def rename(self, path: str) -> None:
        """Changes the name of the output, within its directory. Raises: OutputError if it exists."""
        target = os.path.join(os.path.dirname(self._target), os.path.basename(path))
        if os.path.lexists(target) and not self._force:
            raise OutputError(EXISTS, path)
        self.path, self._target = path, target

    def commit(self) -> None:
        """Finishes the file and renames it to its name."""
        self.finished()
        try:
            self._identity = identity(self._temporary)
            if not system.renames_open_files():
                self._close()
            self._publish()
            self._pending_name = False
            self.close()  # only after the rename: an unlocked staging file is removed by others
            if self.fsync:
                system.sync_directory(os.path.dirname(self._target))
        except OSError as error:
            raise self._failed(error) from error

    def keep(self, kept: bool) -> None:
        """Sets whether the staging file stays on failure: the next run then restores the replaced files."""
        self._pending_name = not kept

    def link(self) -> None:
        """Makes `commit` keep the staging name as a hard link, if supported, until `forget`.

        If this process is killed in between, the next one knows by it that the set is unfinished.
        """
        self._linked = True

    def set_aside(self) -> None:
        """Renames the file to be replaced, if any, to a backup name; `undo` restores it."""
        if not os.path.lexists(self._target):
            return
        directory, name = os.path.split(self._target)
        self._old = os.path.join(directory, f".{name}.{self.run}.ckptool-old")
        try:
            os.rename(self._target, self._old)
        except OSError as error:
            raise self._failed(error) from error

    def undo(self) -> None:
        """Undoes a `commit`: restores the backup, or removes the new file. Raises: OSError."""
        if self._old and os.path.lexists(self._old):
            os.replace(self._old, self._target)
        elif self._identity is not None and identity(self._target) == self._identity:
            os.unlink(self._target)
        self._pending_name = True  # removes the staging name, too

    def forget(self) -> None:
        """Removes the backup, and the staging name of the new file."""
        for path in (self._old, self._temporary if self._linked else ""):
            if path:
                with contextlib.suppress(OSError):
                    os.unlink(path)

    def _publish(self) -> None:
        """Renames the staging file; without ``force`` never over a file that was created meanwhile."""
        if self._force and not self._linked:
            os.replace(self._temporary, self._target)
            return
        try:
            os.link(self._temporary, self._target)
        except OSError as error:  # the file exists, or the file system has no hard links
            if not self._force and (isinstance(error, FileExistsError) or os.path.lexists(self._target)):
                raise OutputError(EXISTS, self.path) from None
            os.replace(self._temporary, self._target)
            return
        if not self._linked:
            os.unlink(self._temporary)


def staging(target: str, run: str) -> str:
    """Returns the path of the staging file of a run, for the real path of an output."""
    directory, name = os.path.split(target)
    return os.path.join(directory, f".{short(name)}.{run}.ckptool-partial")


class Part(LocalOutput):
    """Writes into the staging file of an `Output` of another process, from byte ``at`` on; that one commits it.

    As a context manager it removes nothing: other processes may write into the file.
    """

    def __init__(self, path: str, run: str, at: int, *, fsync: bool) -> None:
        self._begin(path, fsync)
        self._force, self.run, self.position = False, run, at
        self._temporary = staging(self._target, run)
        try:
            self._fd = os.open(self._temporary, system.flags("O_RDWR"))
        except OSError as error:
            raise self._failed(error) from error

    def reserve(self, nbytes: int) -> None:
        pass  # the other process does, for all parts

    def clones(self, file: Source) -> bool:
        return False  # what is cloned decides the length of a header, on which all processes agree before

    def finished(self) -> str:
        self._flush()
        try:
            self._sent_all()
            if self.fsync:
                os.fsync(self._fd)
        except OSError as error:
            raise self._failed(error) from error
        return self._temporary

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, _: TracebackType | None) -> None:
        self._pending_name = False
        super().__exit__(kind, value, _)

    def drop(self) -> None:
        """Removes the staging file: no process writes into it any longer."""
        self._discard()
