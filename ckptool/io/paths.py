"""Paths as text: those of this machine, and URLs as fsspec has them. Nothing is opened or looked for here.

    https://host/dir/model.pth?token    s3://bucket/dir/model.pth    hf://org/name/file    zip://a.pth::https://host/x.zip

What is secret in a URL is replaced by a mask where the URL comes in (`given`), and put back where its file is opened
(`revealed`): everything between, which prints paths, never has it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable

_URL = re.compile(r"[A-Za-z][\w+.-]+:(//|:[A-Za-z][\w+.-]+:)")
"""A scheme of two letters or more: one is a drive of Windows."""

_SCHEME = re.compile(r"(?:^|(?<=::))[A-Za-z][\w+.-]+://")
"""Schemes of a URL and of what it is in; upper case is as good as lower."""

WEB = ("http://", "https://")
"""What URLs begin with that have a query, and names with ``%20`` for a space."""

_LINK = re.compile(
    r"((?!(?:file|local|memory|hf|zip|tar)://)[A-Za-z][\w+.-]+://)(?:([^/?#]*|[^/?#:\[]*:(?!\d*(?:[/?#]|$)).*?)@)?"
    r"([^/?#]*)([^?#]*)(?:([?#])(.*))?",
    re.DOTALL,
)
"""What may have secrets: (scheme, user and password, host, path, mark, query or fragment).

A password may hold ``/``, which it should not: it ends at the first ``@``, where what precedes it is no port.
"""

_NO_QUERY = ("s3", "gs", "gcs", "ftp", "sftp", "ssh", "smb")
"""What schemes begin with where ``?`` is a character of names."""

_PLAIN = re.compile(r"(download|raw|dl|ref|revision|versionId)=[\w.-]{0,64}")
"""A query that is no secret."""

MASK = "***"

_secrets: dict[tuple[str, str, str], str] = {}
"""{(host, mark, mask): what it stands for}, of all URLs that were given; ``@`` marks a user, ``?`` a query."""


def is_url(path: str) -> bool:
    """Returns whether a path is a URL: it begins with a scheme and ``://``, or is a chain of them."""
    return ":" in path and _URL.match(path) is not None


def is_web(path: str) -> bool:
    """Returns whether a path is a URL of http or https: no directory can be listed there."""
    return path.startswith(WEB)


def given(text: str) -> str:
    """Returns a path that a user gave as everything else has it: without secrets; of ``file://``, the path there.

    >>> given("https://me:secret@host/a.pth?sig=abc"), given("file:///tmp/a.pth"), given("a.pth")
    ('https://***@host/a.pth?***', '/tmp/a.pth', 'a.pth')
    """
    if not is_url(text):
        return text
    text = _SCHEME.sub(lambda found: found[0].lower(), text)
    if text.startswith(("file://", "local://")) and "::" not in text:
        return text.partition("://")[2]
    return _each_link(text, _mask)


def revealed(url: str) -> str:
    """Returns a URL with its secrets, for who opens it."""
    return _each_link(url, lambda host, mark, mask: _secrets.get((host, mark, mask), mask))


def _each_link(url: str, change: Callable[[str, str, str], str]) -> str:
    """Returns a URL with what may be secret in it changed by a function of the host, the mark and that."""
    links = []
    for link in url.split("::"):
        if found := _LINK.fullmatch(link):
            scheme, user, host, path, mark, query = found.groups()
            user = f"{change(host, '@', user)}@" if user else "" if user is None else "@"
            query = "" if mark is None or scheme.startswith(_NO_QUERY) else mark + change(host, mark, query)
            path = link[found.start(4) :] if mark and not query else path
            link = f"{scheme}{user}{host}{path}{query}"
        links.append(link)
    return "::".join(links)


def _mask(host: str, mark: str, secret: str) -> str:
    """Returns what stands for a secret of a host: three stars, and a number behind them from the second one on."""
    if not secret or (host, mark, secret) in _secrets or (mark == "?" and _PLAIN.fullmatch(secret)):
        return secret
    known = [mask for (one, kind, mask), text in _secrets.items() if (one, kind, text) == (host, mark, secret)]
    count = sum(key[:2] == (host, mark) for key in _secrets)
    mask = known[0] if known else f"{MASK}{count + 1 if count else ''}"
    _secrets[host, mark, mask] = secret
    return mask


def scrubbed(text: str) -> str:
    """Returns a text of another library without the secrets of all URLs that were given."""
    for (_, mark, _), secret in _secrets.items():
        for part in (secret, *(secret.split(":") if mark == "@" else ())):
            text = text.replace(part, MASK) if len(part) > 2 else text
    return text


def _cut(url: str) -> tuple[str, str]:
    """Returns (scheme and path of the innermost file of a URL, its query and what it is in)."""
    end = url.find("::")
    end = len(url) if end < 0 else end
    if is_web(url):
        end = min(end, *(at if at >= 0 else end for at in (url.find("?"), url.find("#"))))
    return url[:end], url[end:]


def split(path: str) -> tuple[str, str]:
    """Returns (directory, name) of a path. The directory of a URL has its query: `join` gives it to what is beside it.

    >>> split("https://host/dir/a%20b.pth?download=true")
    ('https://host/dir?download=true', 'a b.pth')
    """
    if not is_url(path):
        return os.path.split(path)
    head, tail = _cut(path)
    scheme, _, rest = head.partition("://")
    directory, _, name = rest.rpartition("/")
    if is_web(path) and "%" in name:
        from urllib.parse import unquote

        name = unquote(name)
    return f"{scheme}://{directory}{tail}", name


def dirname(path: str) -> str:
    """Returns the directory of a path; "" for a name alone."""
    return split(path)[0]


def basename(path: str) -> str:
    """Returns the name in a path."""
    return split(path)[1]


def join(directory: str, *names: str) -> str:
    """Returns the path of a name in a directory.

    >>> join("zip://sub::s3://bucket/all.zip", "a.pth"), join("memory://", "a.pth")
    ('zip://sub/a.pth::s3://bucket/all.zip', 'memory://a.pth')
    """
    if not is_url(directory):
        return os.path.join(directory, *names)
    head, tail = _cut(directory)
    if is_web(directory):
        from urllib.parse import quote

        names = tuple(map(quote, names))
    return f"{head}{'' if head.endswith('/') else '/'}{'/'.join(names)}{tail}"


def ends_as_directory(url: str) -> bool:
    """Returns whether a URL ends with a slash."""
    return _cut(url)[0].endswith("/")


def absolute(path: str) -> str:
    """Returns a directory's path from the top."""
    return path.rstrip("/") if is_url(path) else os.path.abspath(path)


def relative(path: str, directory: str) -> str:
    """Returns the path from a directory to a path in it."""
    if not is_url(directory):
        return os.path.relpath(path, directory)
    return _cut(path)[0].removeprefix(_cut(directory)[0]).lstrip("/")
