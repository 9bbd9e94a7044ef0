"""Files over http and https, through the aiohttp session of fsspec's HTTPFileSystem and its settings.

A request has a Range, and the answer must have it, too: with the size of the file (Content-Range) and its version
(ETag, else Last-Modified), which must stay the same. So the first bytes, the size and the version are one request.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from ckptool.errors import CkptoolError, FormatError, UnreadableError
from ckptool.io import paths
from ckptool.io.remote import stores
from ckptool.io.remote.ranges import SMALL, Broken, Origin
from ckptool.io.source import BLOCK, Spool
from ckptool.limits import MAX_DOWNLOAD, MAX_WAIT

T = TypeVar("T")

SLOWEST = 50_000
"""Bytes per second below which an answer is given up, and continued by another request."""

RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})")

AGAIN = (408, 425, 429, 500, 502, 503, 504)
"""Statuses after which the same request may succeed."""


_downloads: dict[str, tuple[str, int | None, Spool]] = {}
"""{URL: (version, size, content)} of the last file that was downloaded as a whole: its values are read from it, too."""


class Absent(UnreadableError):
    """There is no such file."""


class Page(Origin):
    """The file of a URL."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.real = paths.revealed(url)
        self.fs = stores.file_system(url)[0]
        from yarl import URL  # aiohttp's, so only where that is installed

        try:
            URL(self.real)
        except ValueError:  # a port that is no number
            raise UnreadableError("is no URL that can be asked for", url) from None
        self.wait = MAX_WAIT.now()
        self.known = ""

    def begin(self, nbytes: int) -> bytes:
        got = bytearray()
        answer = self._sync(lambda: self._ask(0, nbytes, got))
        if answer is not None:
            return self._all(answer, nbytes)
        return bytes(got)

    def fetch(self, begin: int, end: int, into: bytearray) -> None:
        if self._sync(lambda: self._ask(begin, end, into)) is not None:
            raise Broken("the server no longer answers with the range that it is asked for")

    def _sync(self, ask: Callable[[], Any]) -> Any:
        """Runs a coroutine on fsspec's loop. Raises: Broken, CkptoolError."""
        import aiohttp
        from fsspec.asyn import sync

        try:
            return sync(self.fs.loop, ask)
        except (CkptoolError, Broken):
            raise
        except (aiohttp.InvalidURL, aiohttp.TooManyRedirects) as error:
            many = isinstance(error, aiohttp.TooManyRedirects)
            raise UnreadableError(
                "too many redirects" if many else "is no URL that can be asked for", self.url
            ) from None
        except aiohttp.ClientSSLError as error:
            raise UnreadableError(f"no secure connection: {_said(error)}", self.url) from None
        except aiohttp.ClientConnectorDNSError:
            raise UnreadableError("no host of that name is known", self.url) from None
        except TimeoutError:
            raise Broken(f"no answer, or a slow one, within the time-out (MAX_WAIT: {self.wait} s)") from None
        except (aiohttp.ClientError, OSError) as error:
            raise Broken(_said(error)) from None

    async def _ask(self, begin: int, end: int, into: bytearray) -> Any:
        """Appends the answer to a request of a range; returns the answer, unread, if it is all of a longer file."""
        import aiohttp

        session = await self.fs.set_session()
        options = {name: value for name, value in self.fs.kwargs.items() if name != "timeout"}
        headers = {**options.pop("headers", {}), "Range": f"bytes={begin}-{end - 1}", "Accept-Encoding": "identity"}
        total = self.wait + (end - begin) / SLOWEST
        limit = aiohttp.ClientTimeout(total=total, connect=self.wait, sock_read=self.wait)
        answer = await session.get(self.fs.encode_url(self.real), headers=headers, timeout=limit, **options)
        try:
            if self._ranges(answer, begin, end):
                wanted = min(end, self.size) - begin
                before = len(into)
                async for piece in answer.content.iter_chunked(SMALL):
                    into += piece[: before + wanted - len(into)]
                    if len(into) - before >= wanted:
                        break
                if answer.content.at_eof():
                    answer.release()
                else:
                    answer.close()
                return None
            return answer
        except BaseException:
            answer.close()
            raise

    def _ranges(self, answer: Any, begin: int, end: int) -> bool:
        """Returns whether an answer is the range that was asked for, not all of the file. Raises: for any other."""
        status = answer.status
        if status in AGAIN:
            raise Broken(f"the server answers {status} {answer.reason}", self._pause(answer.headers))
        if status in (404, 410):
            raise Absent(f"no such file: the server answers {status} {answer.reason}", self.url)
        if status in (401, 403):
            what = f"the server answers {status} {answer.reason}: no permission, or credentials that are missing or old"
            raise UnreadableError(what, self.url)
        if status not in (200, 206, 416):
            raise UnreadableError(f"the server answers {status} {answer.reason}", self.url)
        if answer.headers.get("Content-Encoding", "identity") not in ("", "identity"):
            what = f"is sent compressed ({answer.headers['Content-Encoding']}), though it was asked for as it is"
            raise UnreadableError(what, self.url)
        match = RANGE.fullmatch(answer.headers.get("Content-Range", ""))
        first = not self.known
        if status == 416 and first and answer.headers.get("Content-Range", "") == "bytes */0":
            self.known, self.size, self.version = "empty", 0, (0,)
            return True
        if status == 200:
            if not first:
                self._same(answer, None)
            return False
        if status == 206 and (match is None or int(match[1]) != begin or int(match[2]) > int(match[3])):
            raise UnreadableError("the server answers with other bytes than those that it was asked for", self.url)
        self._same(answer, int(match[3]) if match else -1)
        return True

    def _same(self, answer: Any, size: int | None) -> None:
        """Takes the version of the first answer. Raises: FormatError for another one in a later answer."""
        tag = answer.headers.get("ETag") or answer.headers.get("Last-Modified") or ""
        if not self.known and size is not None:
            self.known, self.size = f"={tag}", size
            self.version = size, int.from_bytes(hashlib.sha256(tag.encode("utf-8", "replace")).digest()[:8], "big")
        elif self.known != f"={tag}" or size not in (None, self.size):
            raise FormatError("it was changed while it was read", self.url)

    def _pause(self, headers: Any) -> float:
        text = headers.get("Retry-After", "")
        return min(float(text), self.wait) if text.isascii() and text.isdecimal() else 0

    def _all(self, answer: Any, nbytes: int) -> bytes:
        """Takes a whole file from a server without ranges. Raises: LimitError for a large one, Broken."""

        limit, said = MAX_DOWNLOAD.now(), answer.content_length
        length = "of a size that it does not say" if said is None else f"of {said:,} bytes"
        what = f"its server sends no ranges, only the whole file, {length}"

        def close() -> None:
            self.fs.loop.call_soon_threadsafe(answer.close)

        tag = answer.headers.get("ETag") or answer.headers.get("Last-Modified")
        if tag and (known := _downloads.get(self.url)) is not None and known[:2] == (tag, said):
            close()
            self._same(answer, known[2].size)
            return self._spooled(known[2], nbytes)
        if said is not None and said > limit:
            close()
            raise MAX_DOWNLOAD.passed(what, said, self.url)
        taken = 0

        def blocks() -> Iterator[bytes]:
            nonlocal taken
            while block := self._sync(lambda: answer.content.read(BLOCK)):
                taken += len(block)
                if taken > limit:
                    raise MAX_DOWNLOAD.passed(what, None, self.url)
                yield block

        try:
            spool = Spool(blocks())
        finally:
            close()
        if said is not None and taken != said:
            spool.close()
            raise Broken(f"the answer ends after {taken:,} of {said:,} bytes, and there are no ranges to continue it")
        self._same(answer, taken)
        if tag:
            _downloads.clear()
            _downloads[self.url] = tag, said, spool
        self.moved = taken
        return self._spooled(spool, nbytes)

    def _spooled(self, spool: Spool, nbytes: int) -> bytes:
        if spool.size > nbytes:
            self.note = f"its server sends no ranges: all {spool.size:,} bytes were downloaded"
        self.spool = spool
        return spool.read(0, min(nbytes, spool.size))


def _said(error: Exception) -> str:
    """Returns what an error of the client says, on one line and without secrets."""
    text = " ".join(paths.scrubbed(str(error)).split()) or type(error).__name__
    return f"{text[:200]}"
