"""torch.save's zip archive (torch >= 1.6).

    ROOT/data.pkl              the tree, protocol 2; tensors are calls that refer to a storage by persistent id
    ROOT/.format_version       "1": storages are numbered in the order of first use
    ROOT/.storage_alignment    "64"
    ROOT/byteorder             "little" | "big"
    ROOT/data/0, 1, ...        raw storages, each beginning on a multiple of 64
    ROOT/version               "3\\n"

Source: ``torch/serialization.py`` and ``caffe2/serialize/inline_container.cc`` of torch 2.13.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ckptool.core.checkpoint import Checkpoint
from ckptool.core.tensor import Span, Storage
from ckptool.core.tree import as_mapping, path_text
from ckptool.errors import LossError, UnsupportedError, listed
from ckptool.io.probe import Probe
from ckptool.io.source import Files
from ckptool.pickling.archives import unpickled
from ckptool.pickling.load import with_arrays

# Needed only to write, so imported by the functions that do: reading does not wait for these imports.
if TYPE_CHECKING:
    from ckptool.formats.layout import Content, Layout, MapLocation
    from ckptool.io.output import Output
    from ckptool.io.zip_write import Record


def matches(probe: Probe) -> bool:
    """Returns whether torch.save wrote it; an archive with constants.pkl is TorchScript, for torch.load too."""
    return f"{probe.root}/data.pkl" in probe.members and f"{probe.root}/constants.pkl" not in probe.members


def read(probe: Probe) -> Checkpoint:
    """Returns the checkpoint; reads the zip directory and data.pkl. Raises: FormatError, LimitError."""
    tree, names = unpickled(probe)
    tree = with_arrays(tree, names, probe.file.span(0, 0))
    return Checkpoint(tree, url=probe.path, nbytes=probe.size, names=names, notes=_notes(tree))


def _notes(tree: Any) -> tuple[str, ...]:
    """Returns a note if it is one of DeepSpeed's files, whose weights in fp32 are in others."""
    if not isinstance(tree, dict) or not tree.get("param_shapes") or "module" not in tree:
        return ()
    empty = [key for key, value in (as_mapping(tree["module"]) or {}).items() if getattr(value, "shape", None) == (0,)]
    held = f"{len(empty)} of its tensors are placeholders of ZeRO-3" if empty else "its weights are in the run's dtype"
    return (f"a file of DeepSpeed's: {held}; the directory that it lies in is read with the weights in fp32",)


def check(checkpoint: Checkpoint, map_location: MapLocation | None = None) -> tuple[tuple[str, ...], int]:
    """Returns what `write` would leave out (nothing) and about how many bytes it would write. Raises: as `write`."""
    from ckptool.formats.layout import Layout

    return (), _nbytes(*_pickled(checkpoint, Layout(checkpoint.tree, map_location)))


def _pickled(checkpoint: Checkpoint, layout: Layout) -> tuple[bytes, list[Storage]]:
    """Returns data.pkl, and the storages in the order of first use. Raises: LossError for what torch cannot hold."""
    try:
        return layout.pickled(str)
    except UnsupportedError as error:  # it names the first only; a walk over the tree finds all
        named = [f"{path_text(path)} ({tensor.foreign})" for path, tensor in checkpoint.tensors() if tensor.foreign]
        if not named:
            raise
        raise LossError(f"torch cannot hold {listed(named, 20)}") from error


def _nbytes(pickled: bytes, used: list[Storage]) -> int:
    return len(pickled) + sum(storage.nbytes + 256 for storage in used) + 4096


def write(
    checkpoint: Checkpoint, output: Output, files: Files, map_location: MapLocation | None = None
) -> tuple[str, ...]:
    """Writes the whole tree, streaming, in the layout of torch 2.13. Returns what was left out (nothing).

    Storages are numbered in the order of first use. Views of one storage stay views of one storage, and the parts
    of a storage that no tensor uses are not written.
    """
    from ckptool.formats.layout import Layout
    from ckptool.io.zip_write import ZipWriter

    layout = Layout(checkpoint.tree, map_location)
    pickled, used = _pickled(checkpoint, layout)
    shared = bool(used) and used[0].span.member == "stored" and output.clones(files.get(used[0].span))
    output.reserve(_nbytes(pickled, used))
    archive = ZipWriter(output, _root(used, files))
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
    return ()


def _span_to_copy(content: Content, nbytes: int, files: Files) -> Span | None:
    """Returns the byte range of a file to copy unchanged as a record's content, None if its blocks are to be written.

    A small storage without a known CRC-32 is written in blocks too.
    """
    from ckptool.io.zip_write import THREADED

    source = content.source
    if not isinstance(source, Storage) or content.swap_unit > 1 or source.span.memory is not None:
        return None
    if source.span.member == "deflated" or (content.crc32 is None and nbytes < THREADED):
        return None
    found = files.locate(source.span)
    return found._replace(member=None, offset=found.offset + content.start, nbytes=nbytes)


def _whole_records(contents: Sequence[Content]) -> list[Record]:
    """Returns the leading contents that are whole records of a zip archive and keep their names."""
    from ckptool.io.zip_write import Record

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
