"""Where outputs go: what is at a path, the class that writes there, and sets of files that get their names together."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from ckptool.errors import CkptoolError, OutputError, explain, listed
from ckptool.io.output import LocalOutput, Output
from ckptool.io.paths import basename, is_url


def create(
    path: str, *, force: bool = False, fsync: bool = True, run: str = "", staged: bool = False, hashed: bool = False
) -> Output:
    """Returns the output for a path: the one place that chooses what writes it. Raises: OutputError.

    Outputs of one set have one ``run``. ``staged``: it must be readable before it has its name, though in a store that
    takes a copy. ``hashed``: its sha256 is asked for when it is finished.
    """
    if not is_url(path):
        return LocalOutput(path, force=force, fsync=fsync, run=run or None)
    from ckptool.io.remote.upload import Upload

    return Upload(path, force=force, run=run, staged=staged, hashed=hashed)


def found_at(path: str) -> str:
    """Returns what is where an output goes: "file" (a link to nowhere too), "directory", or "" for nothing.

    Raises: OutputError for a URL that cannot be written, and where the directory of a local path is absent.
    """
    if is_url(path):
        from ckptool.io.remote import upload

        return upload.found_at(path)
    if os.path.isdir(path):
        return "directory"
    if not os.path.isdir(os.path.dirname(os.path.realpath(path))):
        raise OutputError("cannot be written: no such directory", path)
    return "file" if os.path.lexists(path) else ""


def is_directory(path: str) -> bool:
    """Returns whether there is a directory. Raises: OutputError for a URL that cannot be written."""
    return found_at(path) == "directory" if is_url(path) else os.path.isdir(path)


def remove(path: str) -> None:
    """Removes a file. Raises: OSError, OutputError."""
    if not is_url(path):
        return os.unlink(path)
    from ckptool.io.remote import upload

    return upload.remove(path)


def is_stream(path: str) -> bool:
    """Returns whether a path is a pipe or a device, which text is written into: nothing is overwritten."""
    return os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)


def write_stream(path: str, text: str) -> None:
    """Writes text into a pipe or device. Raises: OutputError."""
    try:
        with open(path, "w", encoding="utf-8") as stream:
            stream.write(text)
    except OSError as error:
        raise OutputError(f"cannot be written: {explain(error)}", path) from error


class SetOptions(NamedTuple):
    """How the files of one checkpoint are put into a directory.

    ``kind``: that of the files, where a format has several. ``max_shard_size``: bytes of tensors in one. ``shard_name``
    begins their names instead of the input's family. ``with_files`` copies the small files beside the input.
    ``force`` replaces a set of the same names as a whole, ``in_place`` the input's. ``fsync`` waits for the disk.
    ``ranks``: over how many the work is divided, or would be.
    """

    kind: str
    max_shard_size: int
    shard_name: str | None = None
    with_files: bool = False
    force: bool = False
    in_place: bool = False
    fsync: bool = True
    ranks: int = 1


def commit_set(outputs: Sequence[Output], force: bool, check: Callable[[], None] | None = None) -> None:
    """Commits several outputs, the last one (an index) last; if one fails, all is restored as before.

    The old index loses its name first, and the new one gets its own last: no reader finds an index with a mix of old
    and new files. ``check`` is called when all have their names, and may raise. Files of a store that were replaced
    cannot be restored: there only the new ones are removed, the index first, and the error says so.
    The caller holds the directory's lock (`locked`).
    """
    *others, last = outputs
    if not others and check is None:
        last.commit()
        return
    done = False
    try:
        if others:
            last.keep(True)  # by this staging file the next run knows that this one did not finish
        if others and force:
            last.set_aside()
        for output in others:
            if force:
                output.set_aside()
            output.link()
            output.commit()
        last.commit()
        if check is not None:
            check()
        done = True
        _forget(outputs)
    except BaseException as error:
        if done:
            _forget(outputs)
        elif last.restores:
            _undo(outputs, error)
            last.keep(False)
        else:
            _take_back(outputs, error)
        raise


def _forget(outputs: Iterable[Output]) -> None:
    for output in outputs:
        output.forget()


def _undo(outputs: Iterable[Output], error: BaseException) -> None:
    """Restores backups and removes new files. Raises: OutputError."""
    try:
        for output in outputs:
            output.undo()
    except OSError as second:
        raise OutputError(
            f"{error}; and what was there cannot have its names again ({explain(second)}): "
            "it is kept beside them as .NAME.xxxxxxxx.ckptool-old"
        ) from error


def _take_back(outputs: Sequence[Output], error: BaseException) -> None:
    """Removes new files from a store, and adds to the error what became of them, and of those that they replaced."""
    left, lost = [], [basename(output.path) for output in outputs if output.lost]
    for output in reversed(outputs):
        try:
            output.undo()
        except OutputError as second:
            left.append(f"{basename(output.path)} ({second.message})")
    if isinstance(error, CkptoolError):
        error.message += "; the files that this run wrote are removed" if not left else f"; not removed: {listed(left)}"
        error.message += f"; of the checkpoint that was there these are gone: {listed(lost)}" if lost else ""
