"""Members of archives as files: ``zip://dir/a.pth::URL`` and ``tar://a.pth::URL``, read where they lie in the archive.

The archive is a file of this machine or behind a URL. A deflated member is inflated into a temporary file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from ckptool.core.tensor import Span
from ckptool.errors import FormatError, UnreadableError, UsageError, listed
from ckptool.io.archives import is_tar, reader, tar_entries
from ckptool.io.source import Source, Spool, inflated, locate
from ckptool.io.zip_read import is_zip, read_directory
from ckptool.limits import MAX_DOWNLOAD, MAX_RECORDS

SCHEMES = ("zip://", "tar://")

Open = Callable[[str], Source]


class Member(Source):
    """A stored member of an open archive, with offsets of its own."""

    def __init__(self, path: str, archive: Source, span: Span) -> None:
        self.path, self.archive, self.at, self.size = path, archive, span.offset, span.nbytes
        self.version, self.mode, self.again = archive.version, archive.mode, archive.again

    def read(self, offset: int, nbytes: int) -> bytes:
        if offset < 0 or nbytes < 0 or offset + nbytes > self.size:
            raise FormatError(f"bytes {offset}-{offset + nbytes} are wanted of a file of {self.size}", self.path)
        return self.archive.read(self.at + offset, nbytes)

    def read_ahead(self, ranges: Sequence[tuple[int, int]] = ()) -> None:
        self.archive.read_ahead([(self.at + begin, self.at + end) for begin, end in ranges])

    def check(self) -> None:
        self.archive.check()

    def close(self) -> None:
        self.archive.close()


class Inflated(Spool):
    """A deflated member, unpacked into a temporary file."""

    def __init__(self, path: str, archive: Source, span: Span) -> None:
        super().__init__(inflated(archive, span))
        self.path, self.version, self.archive = path, archive.version, archive

    def check(self) -> None:
        self.archive.check()

    def close(self) -> None:
        super().close()
        self.archive.close()


def _parts(url: str) -> tuple[str, str, str]:
    """Returns (scheme, name of the member, path of the archive). Raises: UsageError."""
    first, chain, archive = url.partition("::")
    scheme, _, name = first.partition("://")
    if not chain or not archive:
        raise UsageError(f"{scheme}:// takes the archive behind ::, as in {scheme}://NAME::https://HOST/ARCHIVE", url)
    return scheme, name.strip("/"), archive


def _entries(scheme: str, archive: Source) -> dict[str, Span]:
    """Returns {name: where it is} of the files in an archive. Raises: FormatError."""
    if scheme == "zip":
        if not is_zip(archive):
            raise FormatError("is no zip archive", archive.path)
        found = {name: span for name, (span, _) in read_directory(archive).items()}
    else:
        if not is_tar(archive.read(0, min(512, archive.size))):
            raise FormatError("is no tar archive, or a compressed one, in which nothing can be found", archive.path)
        every = tar_entries(reader(archive), MAX_RECORDS.now())
        found = {name: archive.span(offset, nbytes) for name, _, offset, nbytes in every}
    return {name.removeprefix("./").strip("/"): span for name, span in found.items() if not name.endswith("/")}


def opened(url: str, open_: Open) -> Source:
    """Returns the open member. Raises: UnreadableError, FormatError, LimitError."""
    scheme, name, path = _parts(url)
    archive = open_(path)
    found = _entries(scheme, archive)
    if (span := found.get(name)) is None:
        raise UnreadableError(f"there is no such member: the archive has {listed(found)}", url)
    span = locate(archive, span)
    if span.member != "deflated":
        return Member(url, archive, span)
    if span.nbytes > MAX_DOWNLOAD.now():
        what = f"a deflated member of {span.nbytes:,} bytes, which is read by unpacking all of it"
        raise MAX_DOWNLOAD.passed(what, span.nbytes, url)
    return Inflated(url, archive, span)


def kind(url: str, open_: Open) -> str:
    """Returns "file", "directory", or "" if there is nothing."""
    scheme, name, path = _parts(url)
    with open_(path) as archive:
        found = _entries(scheme, archive)
    return "file" if name in found else "directory" if not name or any(_below(name, found)) else ""


def names_in(url: str, open_: Open) -> dict[str, str]:
    """Returns {name: "file" or "directory"} of a directory in an archive."""
    scheme, name, path = _parts(url)
    with open_(path) as archive:
        found = _below(name, _entries(scheme, archive))
        return {one.partition("/")[0]: "directory" if "/" in one else "file" for one in found}


def _below(name: str, names: Iterable[str]) -> Iterator[str]:
    """Yields the paths from a directory to what is in it."""
    prefix = f"{name}/" if name else ""
    return (one[len(prefix) :] for one in names if one.startswith(prefix))
