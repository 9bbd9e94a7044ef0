"""Files and directories behind URLs, through fsspec: its HTTP client, its stores, its lists of names.

What is found is kept until the next `refresh`, so that looking for a file and opening it is one request.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

from ckptool.errors import UnreadableError
from ckptool.io import paths
from ckptool.io.remote import members, stores, web
from ckptool.io.remote.ranges import Origin, RemoteFile, started
from ckptool.io.source import Source

_kinds: dict[str, str] = {}
"""{URL: "file", "directory" or "" for nothing}, as far as it is known."""

_names: dict[str, list[str]] = {}
"""{URL of a directory: the names in it}."""

_asked: set[str] = set()
"""Directories of which a name was asked for."""

_ready: dict[str, RemoteFile] = {}
"""Files that were opened to see whether they are there, for who opens them next."""


def refresh() -> None:
    """Forgets what was found: the next checkpoint is looked for anew."""
    for found in (_kinds, _names, _asked, _ready):
        found.clear()
    stores.refresh()


def opened(url: str) -> Source:
    """Returns the open file of a URL. Raises: UnreadableError, DependencyError, LimitError."""
    if url.startswith(members.SCHEMES):
        return members.opened(url, _other)
    if (ready := _ready.pop(url, None)) is not None:
        return ready
    return RemoteFile(url, _origin(url))


def _origin(url: str) -> Origin:
    return web.Page(url) if paths.is_web(url) else stores.Stored(url)


def _other(path: str) -> Source:
    """Returns the open file that members are in, which may be one of this machine."""
    from ckptool.io.source import LocalFile

    path = paths.given(path)
    return opened(path) if paths.is_url(path) else LocalFile(path)


def is_directory(url: str) -> bool:
    """Returns whether there is a directory; over https, whether the URL ends as one."""
    return paths.ends_as_directory(url) if paths.is_web(url) else kind(url) == "directory"


def kind(url: str) -> str:
    """Returns "file", "directory", or "" if there is nothing. Over https a file is there if it can be opened.

    Where a second name of a directory is asked for, the directory is listed.
    """
    if url not in _kinds:
        parent = paths.dirname(url)
        if parent in _asked and not paths.is_web(url):
            with suppress(UnreadableError):  # to list may be forbidden, and to read not
                names_in(parent)
                _kinds.setdefault(url, "")
        _asked.add(parent)
    if url not in _kinds:
        _kinds[url] = _kind(url)
    return _kinds[url]


def _kind(url: str) -> str:
    if url.startswith(members.SCHEMES):
        return members.kind(url, _other)
    if not paths.is_web(url):
        return stores.kind(url)
    try:
        _ready[url] = RemoteFile(url, web.Page(url))
    except web.Absent:
        return ""
    return "file"


def names_in(url: str) -> list[str]:
    """Returns the names in a directory; empty for none, and over https, which lists none."""
    if paths.is_web(url):
        return []
    if url not in _names:
        found = members.names_in(url, _other) if url.startswith(members.SCHEMES) else stores.names_in(url)
        _kinds.update((paths.join(url, name), what) for name, what in found.items())
        _names[url] = list(found)
    return list(_names[url])


def ahead(urls: Iterable[str]) -> None:
    """Opens files at the same time; what cannot be opened is asked again by who wants it."""
    wanted = [url for url in urls if not url.startswith(members.SCHEMES) and url not in _ready]

    def one(url: str) -> Callable[[], RemoteFile]:
        return lambda: RemoteFile(url, _origin(url)).look()

    waiting: dict[str, Any] = {url: started(one(url)) for url in wanted}
    for url, coming in waiting.items():
        error = coming.exception()
        if error is None:
            _ready[url], _kinds[url] = coming.result(), "file"
        elif isinstance(error, web.Absent):
            _kinds[url] = ""
        elif not isinstance(error, UnreadableError):
            raise error
