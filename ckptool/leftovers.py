"""What killed runs leave beside their outputs, and the locks that tell it from what living ones are writing."""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator

PARTIAL = re.compile(r"\.(.+)\.([0-9a-f]{8})\.ckptool-(partial|old)", re.DOTALL)
"""Names of what a killed run leaves: of which file, of which run, and whether it is unfinished or was set aside."""


def short(name: str) -> str:
    """Returns as much of a name as leaves room for what is put around it."""
    return os.fsdecode(os.fsencode(name)[:200])


def lock(fd: int) -> bool | None:
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
        if not stat.S_ISREG(os.fstat(fd).st_mode) or not lock(fd):
            return False
        if then is not None:
            then(path)
        return True
    except OSError:
        return False
    finally:
        os.close(fd)
