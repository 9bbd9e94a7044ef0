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

from typing import TYPE_CHECKING, Any

from ckptool.core.checkpoint import Checkpoint
from ckptool.core.tree import as_mapping
from ckptool.io.files import Files
from ckptool.io.probe import Probe
from ckptool.pickling.archives import is_saved, unpickled
from ckptool.pickling.load import with_arrays

# Needed only to write, so imported by the functions that do: reading does not wait for these imports.
if TYPE_CHECKING:
    from ckptool.formats.layout import MapLocation
    from ckptool.io.output import Output


def matches(probe: Probe) -> bool:
    """Returns whether torch.save wrote it."""
    return is_saved(probe)


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
    from ckptool.formats import torch_file

    return (), torch_file.check(checkpoint.tree, map_location)


def write(
    checkpoint: Checkpoint, output: Output, files: Files, map_location: MapLocation | None = None
) -> tuple[str, ...]:
    """Writes the whole tree, streaming. Returns what was left out (nothing). Raises: LossError."""
    from ckptool.formats import torch_file

    torch_file.write(checkpoint.tree, output, files, map_location)
    return ()
