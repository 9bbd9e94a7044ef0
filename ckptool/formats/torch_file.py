"""Writes one archive as torch.save does (layout: see `formats.pytorch.zip`): a file of its own, or a part of one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ckptool.core.checkpoint import Checkpoint, remedy
from ckptool.core.tensor import Span, Storage
from ckptool.core.tree import path_text
from ckptool.errors import LossError, UnsupportedError, listed
from ckptool.formats.layout import Content, Layout, MapLocation
from ckptool.io.files import Files
from ckptool.io.output import Output
from ckptool.io.zip_write import THREADED, Record, ZipWriter


def check(tree: Any, map_location: MapLocation | None = None) -> int:
    """Returns about how many bytes `write` would write. Raises: LossError."""
    return _nbytes(*_pickled(tree, Layout(tree, map_location)))


def _pickled(tree: Any, layout: Layout) -> tuple[bytes, list[Storage]]:
    """Returns data.pkl, and the storages in the order of first use. Raises: LossError for what torch cannot hold."""
    try:
        return layout.pickled(str)
    except UnsupportedError as error:  # it names the first only; a walk over the tree finds all
        found = [*Checkpoint(tree).tensors()]
        named = [f"{path_text(path)} ({tensor.foreign})" for path, tensor in found if tensor.foreign]
        if not named:
            raise
        how = remedy(tensor for _, tensor in found)
        raise LossError(f"torch cannot hold {listed(named, 20)}{how}") from error


def _nbytes(pickled: bytes, used: list[Storage]) -> int:
    return len(pickled) + sum(storage.nbytes + 256 for storage in used) + 4096


def write(
    tree: Any, output: Output, files: Files, map_location: MapLocation | None = None, *, root: str | None = None
) -> None:
    """Writes a tree, streaming, in the layout of torch 2.13, from where the output stands. Raises: LossError.

    Storages are numbered in the order of first use. Views of one storage stay views of one storage, and the parts
    of a storage that no tensor uses are not written. ``root`` names the archive; None takes the name that allows to
    copy the most from the input in one piece.
    """
    layout = Layout(tree, map_location)
    pickled, used = _pickled(tree, layout)
    shared = bool(used) and used[0].span.member == "stored" and output.clones(files.get(used[0].span))
    if not output.position:
        output.reserve(_nbytes(pickled, used))
    archive = ZipWriter(output, _root(used, files) if root is None else root)
    archive.add("data.pkl", pickled)
    archive.add(".format_version", b"1")
    archive.add(".storage_alignment", b"64")
    archive.add("byteorder", b"little", used[0].span.offset if shared else None)
    contents = [layout.content(storage) for storage in used]
    copied = archive.copy("data/", _whole_records(contents), files)
    for number in range(copied, len(used)):
        name, crc32 = f"data/{number}", contents[number].crc32
        if (span := _span_to_copy(contents[number], used[number].nbytes, files)) is not None:
            archive.add_span(name, span, crc32, files)
        else:
            archive.add_blocks(name, used[number].nbytes, layout.blocks(used[number], files), crc32)
    archive.add("version", b"3\n")
    archive.close()


def _span_to_copy(content: Content, nbytes: int, files: Files) -> Span | None:
    """Returns the byte range of a file to copy unchanged as a record's content, None if its blocks are to be written.

    Without a known CRC-32 a storage is read twice, so a small one is written in blocks, and one of a remote file.
    """
    source = content.source
    if not isinstance(source, Storage) or content.swap_unit > 1 or source.span.memory is not None:
        return None
    if source.span.member == "deflated":
        return None
    if content.crc32 is None and (nbytes < THREADED or not files.get(source.span).again):
        return None
    found = files.locate(source.span)
    return found._replace(member=None, offset=found.offset + content.start, nbytes=nbytes)


def _whole_records(contents: Sequence[Content]) -> list[Record]:
    """Returns the leading contents that are whole records of a zip archive and keep their names."""
    found = []
    for number, content in enumerate(contents):
        old = content.source
        if not isinstance(old, Storage) or content.crc32 is None or old.key != str(number):
            break
        found.append(Record(old.key, old.span, content.crc32))
    return found


def _root(used: Sequence[Storage], files: Files) -> str:
    """Returns the archive's root name: that of the first storage's file if it can be, to copy many records at once."""
    if used and used[0].key == "0" and used[0].span.member == "stored":
        root, below, _ = files.member_name(used[0].span).partition("/data/0")
        if below and root and "/" not in root:
            return root
    return "archive"
