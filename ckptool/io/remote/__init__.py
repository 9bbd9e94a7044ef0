"""Files and directories behind URLs, through fsspec: its HTTP client, its stores, its lists of names.

What is found is kept until the next `refresh`, so that looking for a file and opening it is one request.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from ckptool.errors import UnreadableError
from ckptool.io import paths
from ckptool.io.remote import members, stores, web
from ckptool.io.remote.ranges import Origin, RemoteFile, started
from ckptool.io.source import Source

WAVE = 1 << 17
"""Bytes read at once of each of many files that are opened together: the header of a shard of 500 tensors."""

_kinds: dict[str, str] = {}
"""{URL: "file", "directory" or "" for nothing}, as far as it is known."""

_ready: dict[str, RemoteFile] = {}
"""Files that were opened to see whether they are there, for who opens them next."""


def refresh() -> None:
    """Forgets what was found: the next checkpoint is looked for anew."""
    _kinds.clear()
    _ready.clear()
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


def kind(url: str) -> str:
    """Returns "file", "directory", or "" if there is nothing. Over https a file is there if it can be opened."""
    if (known := _kinds.get(url)) is None:
        known = _kinds[url] = _kind(url)
    return known


def _kind(url: str) -> str:
    if url.startswith(members.SCHEMES):
        return members.kind(url, _other)
    if not paths.is_web(url):
        return stores.kind(url)
    if url.split("?")[0].endswith("/"):
        return "directory"
    try:
        _ready[url] = RemoteFile(url, web.Page(url))
    except web.Absent:
        return ""
    return "file"


def names_in(url: str) -> list[str]:
    """Returns the names in a directory; empty for none, and over https, which lists none."""
    if paths.is_web(url):
        return []
    in_archive = url.startswith(members.SCHEMES)
    found = members.names_in(url, _other) if in_archive else stores.names_in(url)
    _kinds.update((paths.join(url, name), what) for name, what in found.items())
    return list(found)


def ahead(urls: Iterable[str]) -> None:
    """Opens files at the same time; what cannot be opened is asked again by who wants it."""
    wanted = [url for url in urls if not url.startswith(members.SCHEMES) and url not in _ready]

    def one(url: str) -> Callable[[], RemoteFile]:
        return lambda: RemoteFile(url, _origin(url), WAVE, tail=True)

    waiting: dict[str, Any] = {url: started(one(url)) for url in wanted}
    for url, coming in waiting.items():
        error = coming.exception()
        if error is None:
            _ready[url], _kinds[url] = coming.result(), "file"
        elif isinstance(error, web.Absent):
            _kinds[url] = ""
        elif not isinstance(error, UnreadableError):
            raise error
