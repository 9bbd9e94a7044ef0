"""A path that is opened once for all formats: a directory's names, or an open file and its first bytes."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from functools import cached_property
from typing import Any

from ckptool.errors import FormatError, UnreadableError, UnsupportedError, explain, listed
from ckptool.io import files, paths
from ckptool.io.source import Source
from ckptool.io.zip_read import Member, archive_end, read_directory, read_small
from ckptool.limits import Limit

HEAD = 512
"""Bytes read from the start of every file: a tar archive's magic is at byte 257."""


class Probe:
    """A directory, or an open file. ``head``: the first `HEAD` bytes of the file.

    ``end``: where the content ends; a reader sets it if more bytes may follow.
    """

    def __init__(self, path: str, opener: Callable[[str], Source] = files.opened) -> None:
        self.path = path
        self.name = paths.basename(path)
        self.is_directory = opener is files.opened and files.is_directory(path)
        self._file = None if self.is_directory else opener(path)
        begin, end = (self._file.begin, self._file.size) if self._file else (0, 0)
        self.size = self.end = end - begin
        self.head = self._file.read(begin, min(HEAD, self.size)) if self._file else b""

    def __enter__(self) -> Probe:
        return self

    def __exit__(self, kind: type[BaseException] | None, *more: object) -> None:
        if self._file:
            self._file.__exit__(kind, *more)

    @property
    def file(self) -> Source:
        """Returns the open file. Raises: UnreadableError for a directory."""
        if self._file is None:
            raise UnreadableError("is a directory", self.path)
        return self._file

    @cached_property
    def names(self) -> list[str]:
        """Returns the names in the directory, sorted. Raises: UnreadableError."""
        if paths.is_web(self.path):
            what = "a directory over https, which lists no names: name a file, such as model.safetensors.index.json"
            raise UnsupportedError(what, self.path)
        if paths.is_url(self.path):
            return sorted(files.names_in(self.path))
        try:
            return sorted(os.listdir(self.path))
        except OSError as error:
            raise UnreadableError(f"cannot be read: {explain(error)}", self.path) from error

    @cached_property
    def members(self) -> dict[str, Member]:
        """Returns the members of a zip archive, in the order of its directory. Raises: as `read_directory`."""
        found = read_directory(self.file)
        self.end = archive_end(self.file) - self.file.begin
        return found

    @cached_property
    def root(self) -> str:
        """Returns the folder of a zip archive's first member: all records of torch's archives are below it."""
        return next(iter(self.members), "").split("/", 1)[0]

    def record(self, name: str, limit: Limit) -> bytes | None:
        """Returns the content of a small record below `root`, None if absent. Raises: as `read_small`."""
        return read_small(self.file, self.members, f"{self.root}/{name}", limit)

    def json(self, name: str, limit: Limit) -> dict[str, Any]:
        """Returns the JSON object in a small record below `root`.

        Raises: FormatError if it is absent, is no JSON object, or has a name twice; else as `read_small`.
        """
        import json

        if (text := self.record(name, limit)) is None:
            raise FormatError(f"{name} is absent from the archive: was its save or its download cut off?")
        try:
            found = json.loads(text, object_pairs_hook=_unique)
        except (RecursionError, ValueError) as error:
            raise FormatError(f"{name} cannot be understood: {error}") from error
        if not isinstance(found, dict):
            raise FormatError(f"{name} is no JSON object")
        return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
        raise ValueError(f"an object has a name twice: {listed(twice)}")
    return found
