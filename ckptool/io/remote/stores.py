"""Files in stores that fsspec knows: s3, gs, hf, memory and others. Retries and credentials are theirs."""

from __future__ import annotations

import hashlib
import threading
import time
from typing import Any

from ckptool.errors import DependencyError, FormatError, UnreadableError, UnsupportedError
from ckptool.io import paths
from ckptool.io.remote.ranges import Broken, Origin

EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "hf": "hf"}
"""{scheme: the extra of ckptool that installs its library}, where that is not ``remote``."""

REFUSED = ("reference", "generic", "dask", "jupyter", "jlab", "async_wrapper")
"""File systems of fsspec that are not read: what they are asked for says which other files are, by templates too."""

MARKS = ("ETag", "etag", "md5Hash", "generation", "xet_hash", "blob_id", "mtime", "LastModified", "modified", "created")
"""Fields that say which version of a file it is; the first that is there does."""

_used: dict[int, Any] = {}
"""The file systems, by their ids: fsspec keeps them, too."""

_looked: dict[int, float] = {}
"""When a file system last forgot what it knew of its directories."""


def refresh() -> None:
    """Forgets what the file systems remember of their directories."""
    for fs in _used.values():
        fs.invalidate_cache()


def file_system(url: str) -> tuple[Any, str]:
    """Returns fsspec's file system of a URL, and the path in it. Raises: DependencyError, UnsupportedError."""
    scheme = url.partition(":")[0].lower()
    extra = EXTRAS.get(scheme, "remote")
    refused = [one for one in (link.partition("://")[0] for link in url.split("::")) if one in REFUSED]
    if refused:
        raise UnsupportedError(f"{refused[0]}:// is not read: name the file itself", url)
    try:
        from fsspec.core import url_to_fs

        found: tuple[Any, str] = url_to_fs(paths.revealed(url))
    except ImportError as error:
        missing = getattr(error, "name", None) or "a library"
        what = f"{scheme}:// needs {missing}, which is not installed: pip install 'ckptool[{extra}]'"
        raise DependencyError(what, url) from None
    except ValueError as error:
        raise UnsupportedError(f"no URL that can be read: {said(error)}", url) from None
    except Exception as error:  # some connect here
        raise final(error, url) from None
    _used[id(found[0])] = found[0]
    return found


def said(error: Exception) -> str:
    """Returns what an error says, on one line and without the secrets of URLs."""
    text = " ".join(paths.scrubbed(str(error)).split())
    return f"{type(error).__name__}: {text}"[:300] if text else type(error).__name__


def translated(error: Exception, url: str) -> Exception:
    """Returns what an error of a store's library means: an error of ours, or `Broken` if it may pass."""
    if isinstance(error, FileNotFoundError):
        return UnreadableError("no such file or directory", url)
    if isinstance(error, IsADirectoryError):
        return UnreadableError("is a directory", url)
    if "Expired" in type(error).__name__ and "Token" not in str(error):
        return FormatError("it was changed while it was read", url)
    if isinstance(error, PermissionError) or "Credential" in type(error).__name__:
        return UnreadableError(f"no permission, or no credentials: {said(error)}", url)
    return Broken(said(error))


def final(error: Exception, url: str) -> Exception:
    """Returns what `translated` does, for who does not try again."""
    found = translated(error, url)
    return UnreadableError(found.reason, url) if isinstance(found, Broken) else found


def place_of(url: str) -> tuple[str, str]:
    """Returns what is equal for two URLs of one file."""
    if "::" in url or paths.is_web(url):
        return "", url
    fs, path = file_system(url)
    return type(fs).__name__, path.rstrip("/")


def kind(url: str) -> str:
    """Returns "file", "directory", or "" if there is nothing."""
    fs, path = file_system(url)
    try:
        return "directory" if fs.info(path)["type"] == "directory" else "file"
    except FileNotFoundError:
        return ""
    except Exception as error:
        raise final(error, url) from None


def names_in(url: str) -> dict[str, str]:
    """Returns {name: "file" or "directory"} of a directory; nothing without one."""
    fs, path = file_system(url)
    try:
        found = fs.ls(path, detail=True)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except Exception as error:
        raise final(error, url) from None
    top = path.rstrip("/")
    names = {one["name"].rstrip("/"): one["type"] for one in found}
    named = {name.rpartition("/")[2]: kind for name, kind in names.items() if name != top and name.strip("/") != top}
    return {name: "directory" if kind == "directory" else "file" for name, kind in named.items() if name}


class Stored(Origin):
    """A file of a store."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.fs, self.path = file_system(url)
        self._lock = threading.Lock()
        self._fetched = 0.0

    def begin(self, nbytes: int) -> bytes:
        try:
            self.file = self.fs.open(self.path, "rb", cache_type="none", block_size=1 << 20)
            info = getattr(self.file, "details", None) or self.fs.info(self.path)
        except Exception as error:
            raise translated(error, self.url) from None
        if info["type"] == "directory":
            raise UnreadableError("is a directory", self.url)
        if info.get("size") is None:
            raise UnreadableError("its store does not say how large it is", self.url)
        self.size, self.version = info["size"], version_of(info)
        return b""

    def fetch(self, begin: int, end: int, into: bytearray) -> None:
        try:
            if hasattr(self.file, "_fetch_range"):
                data = self.file._fetch_range(begin, end)
            else:
                with self._lock:
                    self.file.seek(begin)
                    data = self.file.read(end - begin)
        except Exception as error:
            raise translated(error, self.url) from None
        if len(data) > end - begin:
            raise UnreadableError("its store answers with other bytes than those that it was asked for", self.url)
        into += data
        self._fetched = time.monotonic()

    def check(self) -> None:
        if "IfMatch" in getattr(self.file, "read_kw", {}):  # every request says which version is meant
            return
        try:
            if _looked.get(id(self.fs), 0) <= self._fetched:  # else what is known of its directory is newer
                self.fs.invalidate_cache()
                _looked[id(self.fs)] = time.monotonic()
            now = version_of(self.fs.info(self.path))
        except FileNotFoundError:
            now = None
        except Exception as error:
            raise final(error, self.url) from None
        if now != self.version:
            raise FormatError("it was changed while it was read", self.url)


def version_of(info: dict[str, Any]) -> tuple[int, ...]:
    """Returns the size and a number that another version of the file would not have."""
    mark = next((str(info[name]) for name in MARKS if info.get(name) is not None), "")
    return info["size"], int.from_bytes(hashlib.sha256(mark.encode("utf-8", "replace")).digest()[:8], "big")
