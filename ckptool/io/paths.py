"""Paths as text: those of this machine, and URLs as fsspec has them. Nothing is opened or looked for here.

    https://host/dir/model.pth?token    s3://bucket/dir/model.pth    hf://org/name/file    zip://a.pth::https://host/x.zip

What is secret in a URL is replaced by a mask where the URL comes in (`given`), and put back where its file is opened
(`revealed`): everything between, which prints paths, never has it.
"""

from __future__ import annotations

import os
import re

_URL = re.compile(r"[A-Za-z][\w+.-]+:(//|:[A-Za-z][\w+.-]+:)")
"""A scheme of two letters or more: one is a drive of Windows."""

WEB = ("http://", "https://")
"""What URLs begin with that have a query, and names with ``%20`` for a space."""

_USER = re.compile(r"((?:https?|ftps?|sftp|ssh|smb|webhdfs|s3a?|gs|gcs)://)([^/?#]*)@")
_QUERY = re.compile(r"(https?://(?:(?!::)[^?#])*)([?#](?:(?!::).)*)", re.DOTALL)
_PLAIN = re.compile(r"\?(download|raw|dl|ref|revision|versionId)=[\w.-]{0,64}")
"""A query that is no secret."""

_MASK = re.compile(r"\*\*\*\d*")

_secrets: dict[str, str] = {}
"""{mask: what it stands for}, of all URLs that were given."""


def is_url(path: str) -> bool:
    """Returns whether a path is a URL: it begins with a scheme and ``://``, or is a chain of them."""
    return ":" in path and _URL.match(path) is not None


def is_web(path: str) -> bool:
    """Returns whether a path is a URL of http or https: no directory can be listed there."""
    return path.startswith(WEB)


def given(text: str) -> str:
    """Returns a path that a user gave as everything else has it: without secrets; of ``file://``, the path there.

    >>> given("https://me:secret@host/a.pth?sig=abc"), given("file:///tmp/a.pth"), given("a.pth")
    ('https://***@host/a.pth?***2', '/tmp/a.pth', 'a.pth')
    """
    if not is_url(text):
        return text
    if text.startswith(("file://", "local://")) and "::" not in text:
        return text.partition("://")[2]
    text = _USER.sub(lambda found: f"{found[1]}{_mask(found[2])}@", text)
    return _QUERY.sub(lambda found: found[1] + _masked_query(found[2]), text)


def _masked_query(query: str) -> str:
    return query if _PLAIN.fullmatch(query) or len(query) < 2 else query[0] + _mask(query[1:])


def _mask(secret: str) -> str:
    if secret in _secrets:  # it is a mask
        return secret
    known = next((mask for mask, one in _secrets.items() if one == secret), None)
    mask = known or f"***{len(_secrets) + 1 if _secrets else ''}"
    _secrets[mask] = secret
    return mask


def revealed(url: str) -> str:
    """Returns a URL with its secrets, for who opens it."""
    return _MASK.sub(lambda found: _secrets.get(found[0], found[0]), url)


def scrubbed(text: str) -> str:
    """Returns a text of another library without the secrets of all URLs that were given."""
    for mask, secret in _secrets.items():
        text = text.replace(secret, mask)
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
