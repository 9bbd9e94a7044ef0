"""Files behind URLs that are written: parts are sent while more is made, and the file is there when it is complete.

s3              a multipart upload, some parts at the same time; it is completed last, or aborted
gs, abfs, hf    the file that fsspec's library of the store writes, which is there when it is closed
others          a staging file, which is renamed
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import threading
from collections import deque
from concurrent.futures import Future, wait
from types import TracebackType
from typing import Any

from ckptool.errors import CkptoolError, OutputError
from ckptool.io import paths
from ckptool.io.leftovers import short
from ckptool.io.output import EXISTS, Output
from ckptool.io.remote import stores
from ckptool.io.remote.ranges import started
from ckptool.limits import MAX_WAIT

PART = 1 << 23
"""Bytes of a part. S3 takes 5 MiB to 5 GiB, all but the last."""

PARTS = 9_000
"""Parts that a file of a known size is cut into at most; S3 takes 10,000."""

AT_ONCE = 4
"""Parts that are sent at the same time."""

S3 = ("s3", "s3a")

CLOSED_LAST = ("gs", "gcs", "abfs", "abfss", "az", "hf")
"""Schemes of stores where nothing is there before a file is closed."""

READ_ONLY = ("http", "https", "zip", "tar", "git", "github", "data", "libarchive")


def place(url: str) -> tuple[Any, str]:
    """Returns fsspec's file system of a URL to write to, and the path in it. Raises: OutputError, DependencyError."""
    scheme = url.partition(":")[0].lower()
    if "::" in url or scheme in READ_ONLY:
        what = "a file in another one" if "::" in url or scheme in ("zip", "tar") else f"{scheme}://"
        raise OutputError(f"{what} is read, and cannot be written: write to a path, or a store such as s3://", url)
    return stores.file_system(url)


def found_at(url: str) -> str:
    """Returns "file", "directory", or "" if there is nothing, as it is now. Raises: OutputError, UnreadableError."""
    place(url)[0].invalidate_cache()
    return stores.kind(url)


def remove(url: str) -> None:
    """Removes a file. Raises: OutputError."""
    fs, path = place(url)
    try:
        fs.rm_file(path)
    except Exception as error:
        raise OutputError(f"cannot be removed: {_reason(error, url)}", url) from None


def _reason(error: Exception, url: str) -> str:
    found = stores.translated(error, url)
    return found.message if isinstance(found, CkptoolError) and not isinstance(error, OSError) else stores.said(error)


class Parts:
    """A multipart upload to S3; a file of one part is sent as a whole."""

    at_once = AT_ONCE

    def __init__(self, fs: Any, path: str, exclusive: bool) -> None:
        self.fs = fs
        self.bucket, self.key, _ = fs.split_path(path)
        self.condition = {"IfNoneMatch": "*"} if exclusive else {}
        self.upload: dict[str, Any] = {}
        self.sent: dict[int, dict[str, Any]] = {}
        self._lock = threading.Lock()

    def _call(self, method: str, **more: Any) -> dict[str, Any]:
        found: dict[str, Any] = self.fs.call_s3(method, Bucket=self.bucket, Key=self.key, **more)
        return found

    def put(self, number: int, data: bytearray) -> None:
        with self._lock:
            self.upload = self.upload or self._call("create_multipart_upload")
        which = {"UploadId": self.upload["UploadId"], "PartNumber": number + 1}
        answer = self._call("upload_part", **which, Body=data)
        summed = {name: text for name, text in answer.items() if name.startswith("ChecksumSHA")}
        self.sent[number] = {"PartNumber": number + 1, "ETag": answer["ETag"], **summed}

    def complete(self) -> None:
        parts = [self.sent[number] for number in sorted(self.sent)]
        sums = [part["ETag"].strip('"') for part in parts]
        with contextlib.suppress(ValueError):  # other sums than MD5: of stores that encrypt
            sums = [f"{hashlib.md5(bytes.fromhex(''.join(sums)), usedforsecurity=False).hexdigest()}-{len(sums)}"]
        which = {"UploadId": self.upload["UploadId"], "MultipartUpload": {"Parts": parts}}
        self._last("complete_multipart_upload", sums, **which)
        self.upload = {}

    def whole(self, data: bytearray) -> None:
        self._last("put_object", [hashlib.md5(data, usedforsecurity=False).hexdigest()], Body=data)

    def _last(self, method: str, sums: list[str], **more: Any) -> None:
        """Makes the call after which the file is there. If its answer is lost, the file may be there all the same."""
        try:
            self._call(method, **more, **self.condition)
        except Exception:
            found = ""
            with contextlib.suppress(Exception):  # the first error is the one to tell
                found = self._call("head_object")["ETag"].strip('"')
            if [found] != sums:
                raise

    def discard(self) -> None:
        if self.upload:
            self._call("abort_multipart_upload", UploadId=self.upload["UploadId"])


class Stream:
    """A file of fsspec; ``appears``: whether what was written of it is seen before it is closed."""

    at_once = 1

    def __init__(self, fs: Any, path: str, exclusive: bool, appears: bool) -> None:
        self.fs, self.path, self.exclusive, self.appears = fs, path, exclusive, appears
        self.file: Any = None

    def _open(self) -> Any:
        if self.file is None and self.exclusive:
            with contextlib.suppress(NotImplementedError, ValueError):  # of a library without this mode
                self.file = self.fs.open(self.path, "xb", block_size=PART // 2)
        if self.file is None:
            self.file = self.fs.open(self.path, "wb", block_size=PART // 2)
        return self.file

    def put(self, number: int, data: bytearray) -> None:
        self._open().write(data)

    def complete(self) -> None:
        self._open().close()

    def whole(self, data: bytearray) -> None:
        self.put(0, data)
        self.complete()

    def discard(self) -> None:
        if self.file is None:
            return
        if self.appears:
            with contextlib.suppress(Exception):  # what counts is that it is removed
                self.file.close()
            self.fs.rm_file(self.path)
            return
        try:
            self.file.discard()
        finally:
            self.file.closed = True  # its finalizer would close it, and so complete it
            if local := getattr(self.file, "temp_file", None):  # of huggingface_hub
                local.close()
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(local.name)


class Upload(Output):
    """A file that is sent in parts; memory holds some parts only.

    One that is not ``staged`` is there from `finished` on, and is removed unless committed. Without ``force`` it is
    never put over another file: by a condition where the store has one (s3, gs, abfs), else by looking.
    """

    restores = False

    def __init__(self, path: str, *, force: bool, run: str, staged: bool, hashed: bool) -> None:
        super().__init__(path)
        self.run = run or os.urandom(4).hex()
        self.sha256 = hashlib.sha256() if hashed else None
        self._force = force
        self._fs, self._target = place(path)
        found = found_at(path)
        if found == "directory":
            raise OutputError("is a directory; name a file", path)
        if found and not force:
            raise OutputError(EXISTS, path)
        scheme = path.partition(":")[0].lower()
        closed_last = scheme in (*S3, *CLOSED_LAST)
        self.staged = staged or not closed_last
        parent, name = paths.split(path)
        self._url = paths.join(parent, f".{short(name)}.{self.run}.ckptool-partial") if self.staged else path
        self._at = place(self._url)[1]
        exclusive = not self.staged and not force
        self._way: Parts | Stream
        if scheme in S3:
            self._way = Parts(self._fs, self._at, exclusive)
        else:
            self._way = Stream(self._fs, self._at, exclusive, appears=not closed_last)
        self._part, self._size = bytearray(), PART
        self._sent = self._reserved = 0
        self._coming: deque[Future[None]] = deque()
        self._state = "open"
        self._version: tuple[int, ...] = ()

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, _: TracebackType | None) -> None:
        if self._state == "named" or self._state == "gone":
            return
        try:
            self._discard()
        except Exception as error:
            if isinstance(value, CkptoolError):
                value.message += f"; what was uploaded could not be removed: {_reason(error, self.path)}"

    def _discard(self) -> None:
        """Removes what was sent. Raises: what the store's library does."""
        state, self._state = self._state, "gone"
        wait(self._coming, MAX_WAIT.now())  # a part that comes after an abort would stay
        if state == "open":
            self._way.discard()
        elif stores.version_of(self._fs.info(self._at)) == self._version:  # nobody else has replaced it
            self._fs.rm_file(self._at)
        stores.refresh()

    def _failed(self, error: Exception) -> OutputError:
        text = str(error)
        if isinstance(error, FileExistsError) or (getattr(error, "errno", 0) == errno.EINVAL and "condition" in text):
            return OutputError(EXISTS, self.path)
        return OutputError(f"writing at byte {self.position}: {_reason(error, self.path)}", self.path)

    def reserve(self, nbytes: int) -> None:
        self._reserved = max(self._reserved, nbytes)

    def _put(self, view: memoryview, at: int) -> None:
        if self.sha256 is not None:
            self.sha256.update(view)
        while view:
            if not self._part:  # parts grow where more comes than was said
                more = self.position // 1000 if self.position > self._reserved else 0
                self._size = max(PART, -(-self._reserved // PARTS), more)
            room = self._size - len(self._part)
            self._part += view[:room]
            view = view[room:]
            if len(self._part) == self._size:
                self._send()

    def _send(self) -> None:
        """Sends the part on another thread. Raises: OutputError of this one or an earlier one."""
        number, data, self._part = self._sent, self._part, bytearray()
        self._wait(self._way.at_once - 1)
        self._coming.append(started(lambda: self._way.put(number, data)))
        self._sent += 1

    def _wait(self, left: int) -> None:
        try:
            while len(self._coming) > left:
                self._coming[0].result()
                self._coming.popleft()
        except Exception as error:
            raise self._failed(error) from None

    def close(self) -> None:
        """Sends what there is, so that the memory is free; the file is complete later."""
        self._flush()
        if self._part:
            self._send()
        self._wait(0)

    def finished(self) -> str:
        if self._state == "open":
            try:
                if self._sent:
                    self.close()
                    self._way.complete()
                else:
                    self._flush()
                    self._way.whole(self._part)
                self._state = "complete"
                self._part = bytearray()
                stores.refresh()
                self._version = stores.version_of(self._fs.info(self._at))
            except Exception as error:
                raise error if isinstance(error, CkptoolError) else self._failed(error) from None
        return self._url

    def rename(self, path: str) -> None:
        found = found_at(path)
        if found == "directory" or (found and not self._force):
            raise OutputError(EXISTS, path)
        self.path, self._target = path, place(path)[1]

    def commit(self) -> None:
        self.finished()
        if self.staged and self._state == "complete":
            try:
                if not self._force and self._fs.exists(self._target):
                    raise FileExistsError
                if isinstance(self._way, Stream) and self._way.appears:
                    self._fs.mv(self._at, self._target)
                else:
                    self._fs.cp_file(self._at, self._target)
                    self._fs.rm_file(self._at)
                self._at = self._target
                self._version = stores.version_of(self._fs.info(self._at))
            except Exception as error:
                raise self._failed(error) from None
        self._state = "named"
        stores.refresh()

    def set_aside(self) -> None:
        """Removes the file to be replaced: in a store nothing can be put aside without copying it."""
        try:
            if self._fs.exists(self._target):
                self._fs.rm_file(self._target)
                self.lost = True
        except Exception as error:
            raise OutputError(f"cannot be replaced: {_reason(error, self.path)}", self.path) from None

    def undo(self) -> None:
        if self._state == "named":
            self._state = "complete"
        if self._state == "complete":
            try:
                self._discard()
            except Exception as error:
                raise OutputError(_reason(error, self.path), self.path) from None
