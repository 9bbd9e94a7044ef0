"""NumPy's archive of arrays, as `numpy.savez` writes it: a zip of stored members, one ``.npy`` per tensor.

    NAME.npy    "\\x93NUMPY" 1 0 | header size (u16 little-endian) | header | elements, C order, little-endian
                {'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), } spaces "\\n"

The elements begin on a multiple of 64 of the member. A header of version 2.0 is for more than 65,535 bytes, which
only arrays with named fields can need. Two members cannot share bytes, so tied tensors are written once each.
Source: ``numpy/lib/_format_impl.py`` and ``numpy/lib/_npyio_impl.py`` (`NpzFile`) of numpy 2.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from itertools import chain

from ckptool.core import aliases
from ckptool.core.checkpoint import Checkpoint
from ckptool.core.tensor import TensorInfo
from ckptool.formats import flat
from ckptool.formats.layout import MapLocation
from ckptool.io.output import Output
from ckptool.io.source import Files
from ckptool.io.zip_write import ZipWriter
from ckptool.values.blocks import tensor_blocks

NAME = "npz"
SUFFIXES = (".npz",)

MAX_DIMS = 64
"""Dimensions an array may have (numpy 2; 32 before)."""

MAX_NAME = 0xFFFF
"""Bytes of a member's name: the zip has 16 bits for its length."""

DESCR = {
    "float64": "<f8", "float32": "<f4", "float16": "<f2", "complex64": "<c8", "complex128": "<c16",
    "int64": "<i8", "int32": "<i4", "int16": "<i2", "int8": "|i1",
    "uint64": "<u8", "uint32": "<u4", "uint16": "<u2", "uint8": "|u1", "bool": "|b1",
}  # fmt: skip
"""torch's dtype -> numpy's; numpy lacks all others."""

FIRST_DAY = (1 << 5) + 1
"""Every member's date, 1 January 1980, the earliest a zip can say: the bytes must not depend on the time of writing."""


def write(
    checkpoint: Checkpoint, output: Output, files: Files, map_location: MapLocation | None = None
) -> tuple[str, ...]:
    """Writes the state_dict at root, streaming; returns what is left out, and ``untied: b = a`` for each lost tie.

    Raises: LossError naming every tensor numpy has no dtype for, and every name an archive cannot have.
    """
    tensors, heads = _headed(checkpoint)
    output.reserve(_nbytes(tensors, heads))
    archive = ZipWriter(output, date=FIRST_DAY)
    for name, tensor in tensors.items():
        head = heads[name]
        blocks = chain((head,), tensor_blocks(tensor, files))
        archive.add_blocks(f"{name}.npy", len(head) + tensor.nbytes, blocks, None)
    archive.close()
    return _left_out(checkpoint, tensors)


def check(checkpoint: Checkpoint, map_location: MapLocation | None = None) -> tuple[tuple[str, ...], int]:
    """Returns what `write` would leave out, and about how many bytes it would write. Raises: as `write`."""
    tensors, heads = _headed(checkpoint)
    return _left_out(checkpoint, tensors), _nbytes(tensors, heads)


def _headed(checkpoint: Checkpoint) -> tuple[dict[str, TensorInfo], dict[str, bytes]]:
    """Returns the tensors, and what stands in front of each one's elements. Raises: LossError."""
    tensors = checkpoint.state_dict()
    _refuse(tensors)
    return tensors, {name: _npy_header(tensor) for name, tensor in tensors.items()}


def _nbytes(tensors: Mapping[str, TensorInfo], heads: Mapping[str, bytes]) -> int:
    return sum(len(heads[name]) + tensor.nbytes + 3 * len(name) + 256 for name, tensor in tensors.items())


def _left_out(checkpoint: Checkpoint, tensors: Mapping[str, TensorInfo]) -> tuple[str, ...]:
    untied = (f"untied: {alias} = {kept}" for alias, kept in aliases.ties(tensors).items())
    return (*flat.left_out(checkpoint), *untied)


def _npy_header(tensor: TensorInfo) -> bytes:
    """Returns what stands in front of the elements, padded to a multiple of 64 bytes."""
    text = f"{{'descr': '{DESCR[tensor.dtype]}', 'fortran_order': False, 'shape': {tensor.shape!r}, }}"
    text += " " * (-(10 + len(text) + 1) % 64) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode("ascii")


def _refuse(tensors: Mapping[str, TensorInfo]) -> None:
    def reason(name: str, tensor: TensorInfo) -> str | None:
        if tensor.dtype not in DESCR:
            return tensor.dtype
        if len(tensor.shape or ()) > MAX_DIMS:
            return f"{len(tensor.shape or ())} dimensions"
        if "\0" in name or flat.has_surrogate(name) or len(name.encode()) + 4 > MAX_NAME:
            return "as a name"
        if name.endswith(".npy") and name[:-4] in tensors:
            return "as a name: numpy would take it for its neighbour's member"
        return None

    flat.refuse("npz", tensors, reason)
