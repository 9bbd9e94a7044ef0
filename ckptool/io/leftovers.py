"""What killed runs leave beside their outputs, and the locks that tell it from what living ones are writing."""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator

from ckptool.io.source import identity

PARTIAL = re.compile(r"\.(.+)\.([0-9a-f]{8})\.ckptool-(partial|old)", re.DOTALL)
"""Names of what a killed run leaves: of which file, of which run, and whether it is unfinished or was set aside."""


def leftovers(names: Iterable[str], kind: str, of: str = "") -> list[str]:
    """Returns those of a directory's names that are "partial" or "old" files of killed or living runs."""
    found = ((name, PARTIAL.fullmatch(name)) for name in names)
    return [name for name, match in found if match and match[3] == kind and of in ("", match[1])]


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

    ``last`` is the path of a set's last file. While its unfinished one is there and has no other name, what its run
    had set aside gets its name again, and what it had given names to goes; otherwise the set was complete, and what was
    set aside goes. Without ``last``, runs that left more than one file are left alone: they wrote a set.
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
    if (last is None and (old or len(partial) > 1)) or not any(meant(place) for _, place in partial + old):
        return
    if not all(_unheld(entry) for entry, _ in partial):
        return
    with contextlib.suppress(OSError):
        if any(place == last and not _linked(entry, place) for entry, place in partial):
            _take_back(partial, old, last)
        else:
            for entry, _ in old:
                os.unlink(entry)
        for entry, place in sorted(partial, key=lambda pair: pair[1] == last):
            if meant(place):
                _unheld(entry, os.unlink)


def _take_back(partial: list[tuple[str, str]], old: list[tuple[str, str]], last: str | None) -> None:
    """Gives names back to what was set aside, the last file's last, and takes them from what a run has linked there.

    Killed in between, it can be done again. Raises: OSError.
    """
    for entry, place in old:
        if place != last:
            os.replace(entry, place)
    for entry, place in partial:
        if place != last and _linked(entry, place):
            os.unlink(place)
    for entry, place in old:
        if place == last:
            os.replace(entry, place)


def _linked(entry: str, place: str) -> bool:
    """Returns whether two names are of one file: a run was killed before it took the temporary one away."""
    found = identity(entry)
    return found is not None and found == identity(place)


def held(path: str) -> bool:
    """Returns whether a living run has a file locked."""
    return os.path.isfile(path) and not _unheld(path)


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
