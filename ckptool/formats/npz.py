"""NumPy's archive of arrays, as `numpy.savez` writes it: a zip with one ``.npy`` per tensor; and one ``.npy`` alone.

    NAME.npy    "\\x93NUMPY" 1 0 | header size (u16 little-endian) | header | elements
                {'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), } spaces "\\n"

The elements begin on a multiple of 64 of the member. Versions 2.0 and 3.0 have four bytes for the header's size, which
only arrays with named fields can need; Python 2 wrote sizes as ``2L``. Arrays are written in C order, little-endian, in
members that are not compressed. Two members cannot share bytes, so tied tensors are written once each.
Source: ``numpy/lib/_format_impl.py`` and ``numpy/lib/_npyio_impl.py`` (`NpzFile`) of numpy 2.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Mapping
from dataclasses import replace
from itertools import chain
from math import prod
from typing import TYPE_CHECKING, Literal, NamedTuple

from ckptool.core.checkpoint import Checkpoint, refuse_tensors
from ckptool.core.dtypes import DTYPES
from ckptool.core.keys import has_surrogate
from ckptool.core.tensor import Opaque, Span, Storage, TensorInfo, contiguous_stride, is_countable
from ckptool.core.tree import Global, brief
from ckptool.errors import FormatError, UnsupportedError, listed
from ckptool.io.files import Files
from ckptool.io.probe import Probe
from ckptool.io.source import Source, locate, read_span

if TYPE_CHECKING:  # what only an output needs is imported by the functions that write one
    from ckptool.formats.layout import MapLocation
    from ckptool.io.output import Output

MAGIC = b"\x93NUMPY"

MAX_TEXT = 10_000
"""Bytes of a header: numpy's own limit."""

FIELD = re.compile(
    r"""\s*(?:
        ["']descr["']\s*:\s*(?:["'](?P<descr>[^"'\\]*)["']|(?P<fields>\[.*\]))
        |["']fortran_order["']\s*:\s*(?P<fortran>True|False)
        |["']shape["']\s*:\s*\(\s*(?P<shape>(?:\d{1,19}L?\s*,\s*)+(?:\d{1,19}L?\s*)?)?\)
    )\s*(?:,\s*|$)""",
    re.ASCII | re.DOTALL | re.VERBOSE,
)
"""One of the three fields of a header."""

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

BY_DESCR = {descr[1:]: dtype for dtype, descr in DESCR.items()}

ML_DTYPES = {"<V2": "bfloat16", "<f1": "float8_e5m2"}
"""How numpy describes types of ml_dtypes (0.6) and MLX: as raw bytes with an order, which its own (``|V2``) lack."""

ONE_BYTE = "<V1"
"""How it describes all their other types of one byte: four float8, float4, float6, integers of up to four bits."""

NOT_READ = {
    "O": "Python objects, which need pickle",
    "U": "text",
    "S": "bytes",
    "M": "dates",
    "m": "time spans",
    "V": "raw bytes",
}
"""Kinds of numpy dtypes that tensors lack, by their letter."""

FIRST_DAY = (1 << 5) + 1
"""Every member's date, 1 January 1980, the earliest in a zip: the bytes must not depend on the time of writing."""


class _Form(NamedTuple):
    """A parsed header. ``descr``: what stands there for the dtype, if it is ml_dtypes'."""

    dtype: str
    descr: str
    byteorder: Literal["little", "big"]
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    nbytes: int


def matches(probe: Probe) -> bool:
    """Returns whether it is a ``.npy`` file, or a zip archive with one."""
    if probe.head.startswith(b"PK\x05\x06"):  # np.savez without arrays
        return probe.size == 22 and probe.name.endswith(".npz")
    return probe.head.startswith(MAGIC) or any(name.endswith(".npy") for name in probe.members)


def read(probe: Probe) -> Checkpoint:
    """Returns the checkpoint: a tensor for every array, or one with the file's name; reads the arrays' headers.

    Raises: FormatError; UnsupportedError naming every array that cannot be a tensor.
    """
    file = probe.file
    tree: dict[str, TensorInfo] = {}
    refused: list[str] = []
    forms: dict[bytes, _Form] = {}
    named: dict[str, list[str]] = {}
    if probe.head.startswith(MAGIC):
        spans = {os.path.splitext(probe.name)[0]: file.span(0, file.size)}
    else:
        refused = [f"{name} (no array)" for name in probe.members if not name.endswith(".npy")]
        spans = {name[:-4]: member.span for name, member in probe.members.items() if name.endswith(".npy")}
    for name, span in spans.items():
        try:
            tree[name], descr = _tensor(name, span, file, forms)
            named.setdefault(descr, []).append(name)
        except UnsupportedError as error:
            refused.append(f"{name} ({error.message})")
    if refused:
        raise UnsupportedError(f"it holds what cannot be read as a tensor: {listed(refused, 20)}", file.path)
    notes = [f"read as {ML_DTYPES[one]}, by {one!r}: {listed(named[one])}" for one in ML_DTYPES if one in named]
    if ONE_BYTE in named:
        what = f"a type of ml_dtypes of one byte (a float8, float4, int4, ...), {ONE_BYTE!r} does not say which"
        notes.append(f"{what}: {listed(named[ONE_BYTE])}")
    return Checkpoint(tree, url=file.path, nbytes=file.size, notes=tuple(notes))


def _tensor(name: str, span: Span, file: Source, forms: dict[bytes, _Form]) -> tuple[TensorInfo, str]:
    """Returns the tensor of an array, and the description of ml_dtypes' type; ``forms`` caches parsed headers.

    Raises: FormatError, UnsupportedError.
    """
    if span.member == "stored":  # a plain byte range, which can be copied or cloned
        span = locate(file, span)._replace(member=None, packed=0, named=0)

    head = read_span(file, span, 256)
    begin, size = (12, 4) if head[6:7] in b"\2\3" else (10, 2)
    if head[:6] != MAGIC or head[6:8] not in (b"\1\0", b"\2\0", b"\3\0") or len(head) < begin:
        raise FormatError(f"the array {brief(name)} does not begin as numpy's do", span.url)
    end = begin + int.from_bytes(head[begin - size : begin], "little")
    if end - begin > MAX_TEXT:
        raise FormatError(
            f"the array {brief(name)} has a header of {end - begin:,} bytes, more than numpy reads", span.url
        )
    if end > len(head):
        head = read_span(file, span, end)
    text = head[begin:end]
    if (form := forms.get(text)) is None:
        form = forms[text] = _form(name, text, span.url)
    if end + form.nbytes != span.nbytes:
        what = f"{form.dtype} of shape {brief(list(form.shape))}, takes {form.nbytes} bytes"
        raise FormatError(f"the array {brief(name)}, {what}; it has {span.nbytes - end}", span.url)
    if span.member is None:
        span, end = span._replace(offset=span.offset + end, nbytes=form.nbytes), 0
    itemsize = DTYPES[form.dtype].bits // 8
    if end % itemsize:
        raise UnsupportedError(f"compressed, and its elements begin at byte {end}, between two of them")
    storage = Storage(span, form.dtype if DTYPES[form.dtype].storage else None, byteorder=form.byteorder)
    tensor = TensorInfo(form.dtype, form.shape, form.stride, end // itemsize, storage)
    if form.descr == ONE_BYTE:
        raw = TensorInfo("uint8", (form.nbytes,), (1,), end, storage)
        tensor = replace(tensor, source=Opaque("V1", Global.named("numpy", "V1")(), (raw,), in_torch=False))
    return tensor, form.descr


def _form(name: str, text: bytes, path: str) -> _Form:
    """Parses a header. Raises: FormatError; UnsupportedError if torch lacks the dtype."""
    said: dict[str, str] = {}
    literal = text.decode("latin-1").strip(" \n")
    at, last = 1, len(literal) - 1
    while (field := FIELD.match(literal, at, last)) is not None and field.lastgroup not in said:
        said[field.lastgroup or "shape"] = field[field.lastgroup] if field.lastgroup else ""
        at = field.end()
    if literal[:1] != "{" or literal[-1:] != "}" or at != last or len(said) != 3:
        raise FormatError(f"the array {brief(name)} has no header as numpy writes it", path)
    descr = said.get("descr") or ""
    known = {**ML_DTYPES, ONE_BYTE: "uint8"}.get(descr)
    dtype, byteorder = _dtype(f"|{DESCR['uint8'][1:]}" if known else said.get("descr"))
    dtype = known or dtype
    shape = tuple(int(size.strip().rstrip("L")) for size in said["shape"].split(",") if size.strip())
    if not is_countable(shape):
        raise FormatError(f"the array {brief(name)} has shape {brief(shape)}: more elements than can be counted", path)
    stride = contiguous_stride(shape[::-1])[::-1] if said["fortran"] == "True" else contiguous_stride(shape)
    return _Form(dtype, descr if known else "", byteorder, shape, stride, prod(shape) * DTYPES[dtype].bits // 8)


def _dtype(descr: str | None) -> tuple[str, Literal["little", "big"]]:
    """Returns torch's name of numpy's dtype (None: one with fields), and its byte order. Raises: UnsupportedError.

    numpy writes ``<f4``. It also reads ``=f4``, ``f4`` and ``float32``, in the byte order of the machine, which is
    taken to be little-endian.
    """
    if descr is None:
        raise UnsupportedError("named fields")
    order, kind = (descr[0], descr[1:]) if descr[:1] in ("<", ">", "=", "|") else ("", descr)
    dtype = BY_DESCR.get(kind) or (kind if not order and kind in DESCR else None)
    if dtype is None or (order == "|" and DTYPES[dtype].bits > 8):
        reason = "torch lacks it" if kind in ("f12", "f16", "c24", "c32") else "an unusual description"
        raise UnsupportedError(f"{brief(descr)}: {NOT_READ.get(kind[:1], reason)}")
    return dtype, "big" if order == ">" else "little"


def prove(path: str) -> None:
    """Has numpy read every array, one at a time, which checks the CRCs. Raises: FormatError if it cannot."""
    import zipfile
    import zlib

    import numpy as np

    try:
        with np.load(path) as archive:
            for name in archive.files:
                archive[name]
    except (zipfile.BadZipFile, zlib.error, OSError, ValueError, EOFError, KeyError) as error:
        raise FormatError(f"numpy cannot read what was written, and it was thrown away: {error}") from error


def write(
    checkpoint: Checkpoint, output: Output, files: Files, map_location: MapLocation | None = None
) -> tuple[str, ...]:
    """Writes the state_dict at root, streaming; returns what is left out.

    Raises: LossError naming every tensor numpy has no dtype for, and every name an archive cannot have.
    """
    from ckptool.io.zip_write import ZipWriter
    from ckptool.values.blocks import tensor_blocks

    tensors, heads = _headed(checkpoint)
    output.reserve(_nbytes(tensors, heads))
    archive = ZipWriter(output, date=FIRST_DAY)
    for name, tensor in tensors.items():
        blocks = chain((heads[name],), tensor_blocks(tensor, files))
        archive.add_blocks(f"{name}.npy", len(heads[name]) + tensor.nbytes, blocks, None)
    archive.close()
    return checkpoint.left_out()


def check(checkpoint: Checkpoint, map_location: MapLocation | None = None) -> tuple[tuple[str, ...], int]:
    """Returns what `write` would leave out, and about how many bytes it would write. Raises: as `write`."""
    tensors, heads = _headed(checkpoint)
    return checkpoint.left_out(), _nbytes(tensors, heads)


def _headed(checkpoint: Checkpoint) -> tuple[dict[str, TensorInfo], dict[str, bytes]]:
    """Returns the tensors and their headers. Raises: LossError."""
    tensors = checkpoint.state_dict()
    _refuse(tensors)
    return tensors, {name: _npy_header(tensor) for name, tensor in tensors.items()}


def _nbytes(tensors: Mapping[str, TensorInfo], heads: Mapping[str, bytes]) -> int:
    return sum(len(heads[name]) + tensor.nbytes + 3 * len(name) + 256 for name, tensor in tensors.items())


def _npy_header(tensor: TensorInfo) -> bytes:
    """Returns the magic and header, padded to a multiple of 64 bytes."""
    text = f"{{'descr': '{DESCR[tensor.dtype]}', 'fortran_order': False, 'shape': {tensor.shape!r}, }}"
    text += " " * (-(10 + len(text) + 1) % 64) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode("ascii")


def _refuse(tensors: Mapping[str, TensorInfo]) -> None:
    def reason(name: str, tensor: TensorInfo) -> str | None:
        if tensor.dtype not in DESCR:
            return tensor.dtype
        if len(tensor.shape or ()) > MAX_DIMS:
            return f"{len(tensor.shape or ())} dimensions"
        if "\0" in name or has_surrogate(name) or len(name.encode()) + 4 > MAX_NAME:
            return "as a name"
        if name.endswith(".npy") and name[:-4] in tensors:
            return "as a name: numpy would take it for its neighbour's member"
        return None

    refuse_tensors("npz", tensors, reason)
