"""Staging files that killed processes left behind, and the locks that tell them from those still being written."""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator

from ckptool.io import system
from ckptool.io.files import identity

PARTIAL = re.compile(r"\.(.+)\.([0-9a-f]{8})\.ckptool-(partial|old)", re.DOTALL)
"""Names beside an output: (its name, the run's id, "partial" for a staging file or "old" for a replaced file)."""


def leftovers(names: Iterable[str], kind: str, of: str = "") -> list[str]:
    """Returns those of a directory's names that are "partial" or "old" files, of the output ``of`` if given."""
    found = ((name, PARTIAL.fullmatch(name)) for name in names)
    return [name for name, match in found if match and match[3] == kind and of in ("", match[1])]


def short(name: str) -> str:
    """Returns a name cut to 200 bytes, so that `PARTIAL` can be built around it."""
    return os.fsdecode(os.fsencode(name)[:200])


@contextlib.contextmanager
def locked(directory: str) -> Iterator[None]:
    """Holds the lock of a directory, waiting for it; does nothing where locks are not supported."""
    fd = system.lock_directory(directory)
    try:
        yield
    finally:
        if fd >= 0:
            os.close(fd)


Chosen = Callable[[str], bool]
"""Whether a path is one of those meant."""


def sweep(directories: Iterable[str], ours: Chosen, last: Chosen | None = None) -> None:
    """Cleans up after killed runs that wrote files whose (shortened) paths are ``ours``; never touches locked files.

    ``last`` tells the path of the last file of a set. If its staging file was not renamed yet, the replaced files are
    restored, and its new ones removed; otherwise the set was complete, and the replaced files are removed. Without
    ``last``, runs that left more than one file are left alone: they wrote a set.
    """
    runs: dict[str, list[tuple[str, str, str]]] = {}
    for directory in directories:
        with contextlib.suppress(OSError):
            for entry in os.listdir(directory):
                if entry.startswith(".") and (match := PARTIAL.fullmatch(entry)):
                    name, run, kind = match.groups()
                    file = (os.path.join(directory, entry), os.path.join(directory, name), kind)
                    runs.setdefault(run, []).append(file)
    for files in runs.values():
        _sweep(files, ours, last)


def _sweep(files: list[tuple[str, str, str]], ours: Chosen, last: Chosen | None) -> None:
    partial = [(entry, target) for entry, target, kind in files if kind == "partial"]
    old = [(entry, target) for entry, target, kind in files if kind == "old"]
    if (last is None and (old or len(partial) > 1)) or not any(ours(target) for _, target in partial + old):
        return
    if not all(_unlocked(entry) for entry, _ in partial):
        return
    with contextlib.suppress(OSError):
        if last and any(last(target) and not _linked(entry, target) for entry, target in partial):
            _restore(partial, old, last)
        else:
            for entry, _ in old:
                os.unlink(entry)
        for entry, target in sorted(partial, key=lambda pair: bool(last and last(pair[1]))):
            if ours(target):
                _unlocked(entry, os.unlink)


def _restore(partial: list[tuple[str, str]], old: list[tuple[str, str]], last: Chosen) -> None:
    """Restores replaced files, the set's last file last, and removes new ones that were linked to their targets.

    It can be repeated if it is killed in between. Raises: OSError.
    """
    for entry, target in old:
        if not last(target):
            os.replace(entry, target)
    for entry, target in partial:
        if not last(target) and _linked(entry, target):
            os.unlink(target)
    for entry, target in old:
        if last(target):
            os.replace(entry, target)


def _linked(entry: str, target: str) -> bool:
    """Returns whether both are hard links to one file: the run was killed before it removed the staging name."""
    inode = identity(entry)
    return inode is not None and inode == identity(target)


def held(path: str) -> bool:
    """Returns whether another process has a file locked."""
    return os.path.isfile(path) and not _unlocked(path)


def _unlocked(path: str, then: Callable[[str], None] | None = None) -> bool:
    """Returns whether it is a regular file that nobody has locked; if so, calls ``then`` while holding the lock."""
    try:
        try:
            fd = os.open(
                path, system.flags("O_RDWR", "O_NOFOLLOW", "O_NONBLOCK")
            )  # NFS locks only files open for writing
        except PermissionError:
            fd = os.open(path, system.flags("O_NOFOLLOW", "O_NONBLOCK"))
    except OSError:
        return False
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode) or not system.lock(fd):
            return False
        if then is not None:
            then(path)
        return True
    except OSError:
        return False
    finally:
        os.close(fd)
