"""What is not the same on every system, in one place: each call that some lack, and what is done there instead.

Linux has all of it. macOS has no fdatasync, posix_fallocate, posix_fadvise and clones of ranges. Windows has none of
what is looked up here, opens no directories, and renames and removes no file that is open.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
from _thread import allocate_lock  # importing `threading` takes a millisecond, and every command imports this file

_SEEKING = allocate_lock()
"""Held between a seek and what is read or written there, where there is no pread."""

_FICLONERANGE = 0x4020940D
"""``_IOW(0x94, 13, struct file_clone_range)`` of ``linux/fs.h``."""

ENDS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
"""Signals that end a process by default: from a scheduler, or from a terminal that is closed."""

LONG = 248
"""Characters from which Windows refuses a path of a directory that is not spelled with ``\\\\?\\``."""


def flags(*names: str) -> int:
    """Returns these flags of `os.open` together, with 0 for those that the system lacks, and that files hold bytes."""
    found = 0
    for name in ("O_BINARY", *names):
        found |= getattr(os, name, 0)
    return found


def reachable(path: str) -> str:
    """Returns a path by which a file can be opened: on Windows one whose length does not matter."""
    return _unlimited(path) if os.name == "nt" else path


def _unlimited(path: str) -> str:
    """Returns a path of Windows, if it is long as an absolute one in the form that has no limit."""
    import ntpath

    whole = ntpath.abspath(path)
    if len(whole) < LONG or whole.startswith("\\\\?\\"):
        return path
    return f"\\\\?\\UNC{whole[1:]}" if whole.startswith("\\\\") else f"\\\\?\\{whole}"


def pread(fd: int, nbytes: int, offset: int) -> bytes:
    """Returns up to ``nbytes`` bytes at an offset. Raises: OSError."""
    if hasattr(os, "pread"):
        return os.pread(fd, nbytes, offset)
    with _SEEKING:
        os.lseek(fd, offset, os.SEEK_SET)
        return os.read(fd, nbytes)


def pread_into(fd: int, room: memoryview, offset: int) -> int:
    """Reads up to as many bytes as there is room for, and returns their number. Raises: OSError."""
    if hasattr(os, "preadv"):
        return os.preadv(fd, [room], offset)
    data = pread(fd, len(room), offset)
    room[: len(data)] = data
    return len(data)


def pwrite(fd: int, data: memoryview, offset: int) -> int:
    """Writes bytes at an offset, and returns how many. Raises: OSError."""
    if hasattr(os, "pwrite"):
        return os.pwrite(fd, data, offset)
    with _SEEKING:
        os.lseek(fd, offset, os.SEEK_SET)
        return os.write(fd, data)


def datasync(fd: int) -> None:
    """Waits until what was written is on disk. Raises: OSError."""
    (os.fdatasync if hasattr(os, "fdatasync") else os.fsync)(fd)


def sync_directory(directory: str) -> None:
    """Waits until a directory's names are on disk, where a directory can be opened for that. Raises: OSError."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    fd = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(fd)


def allocate(fd: int, nbytes: int) -> None:
    """Takes disk space for a file. Raises: OSError, OverflowError for more than a file can have."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(fd, 0, nbytes)


def read_ahead(fd: int) -> None:
    """Hints that a file will be read from its begin to its end, which doubles the speed of a cold read."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)


def clone(fd: int, offset: int, nbytes: int, into: int, to: int) -> bool:
    """Clones a range of a file (reflink) to byte ``to`` of the file ``into``; returns whether it could."""
    try:
        import fcntl
        import struct

        fcntl.ioctl(into, _FICLONERANGE, struct.pack("qQQQ", fd, offset, nbytes, to))
    except (ImportError, OSError):
        return False
    return True


def permit(fd: int, mode: int) -> None:
    """Sets the permissions of a file, on file systems that have them. Raises: OSError."""
    if hasattr(os, "fchmod"):
        with contextlib.suppress(PermissionError):
            os.fchmod(fd, mode)


def give(fd: int, user: int, group: int) -> bool:
    """Sets the owner of a file (-1: stays); returns whether it could: only root can set any."""
    try:
        os.fchown(fd, user, group)
    except (AttributeError, OSError):
        return False
    return True


def lock(fd: int) -> bool | None:
    """Locks a file until it is closed; returns False if another process has it locked, None without lock support."""
    try:
        import fcntl

        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        return None
    return True


def lock_directory(directory: str) -> int:
    """Waits for the lock of a directory, and returns the descriptor that holds it; -1 where there are no such locks."""
    fd = -1
    try:
        import fcntl

        fd = os.open(directory, os.O_RDONLY)
        fcntl.flock(fd, fcntl.LOCK_EX)
    except (ImportError, OSError):
        pass
    except BaseException:
        if fd >= 0:
            os.close(fd)
        raise
    return fd


def renames_open_files() -> bool:
    """Returns whether a file may be renamed and removed while it is open."""
    return os.name != "nt"


def cores() -> int:
    """Returns on how many processors this process may run."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def canonical(path: str) -> str:
    """Returns the path without links, or case that does not count: equal for two paths of one file, existing or not."""
    whole = os.path.realpath(path)
    return whole.casefold() if _folds_case(os.path.dirname(whole)) else whole


def _folds_case(directory: str) -> bool:
    """Returns whether names that differ in case only are one, as far as the directory's own name tells."""
    other = os.path.join(os.path.dirname(directory), os.path.basename(directory).swapcase())
    return sys.platform in ("win32", "darwin") if other == directory else same_file(directory, other)


def same_file(first: str, second: str) -> bool:
    """Returns whether two paths name one existing file, through links too."""
    try:
        return os.path.samefile(first, second)
    except OSError:
        return False
