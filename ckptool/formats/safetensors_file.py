"""Writes one safetensors file: what it can hold, its header, its data (layout: see `formats.safetensors`).

And reads what torch.distributed.checkpoint puts into the header of its files.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from ckptool.core import aliases
from ckptool.core.checkpoint import refuse_tensors
from ckptool.core.dtypes import DTYPES
from ckptool.core.keys import has_surrogate
from ckptool.core.tensor import Span, TensorInfo
from ckptool.core.tree import brief
from ckptool.errors import FormatError, LossError, listed
from ckptool.io.files import Files
from ckptool.limits import MAX_HEADER

if TYPE_CHECKING:
    from ckptool.io.output import Output

OWN = ("DCP_SHARDING_INFO", "DCP_VERSION")
"""Entries of torch.distributed.checkpoint: which parts of tensors are in a file. Untrue of what is made of it."""


def refuse(tensors: Mapping[str, TensorInfo]) -> None:
    """Raises LossError naming every tensor that safetensors cannot hold."""
    refuse_tensors("safetensors", tensors, _reason)


def _reason(name: str, tensor: TensorInfo) -> str | None:
    if DTYPES[tensor.dtype].safetensors is None:
        return tensor.dtype
    if tensor.dtype == "float4_e2m1fn_x2" and not tensor.shape:
        return f"a 0-dim {tensor.dtype}"
    if name == "__metadata__" or has_surrogate(name):
        return "as a name"
    return None


def refuse_clashes(metadata: Mapping[str, str], ties: Mapping[str, str]) -> None:
    """Raises LossError naming every metadata key that is also the name of a tie to record in the metadata."""
    clashes = aliases.clashes(metadata, ties)
    if clashes:
        raise LossError(
            f"safetensors has one place for the metadata {listed(clashes, 20)} and for the ties of the tensors so "
            "called: --untie writes them out"
        )


def begin(tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str], like: int | None = None) -> tuple[bytes, int]:
    """Returns the header with its length prefix, and the number of bytes of data after it. Raises: LimitError.

    The header is padded with spaces so that the data begin at a multiple of 8 or, with ``like``, at an offset that
    differs from ``like`` by a multiple of `CLONED`: data at offset ``like`` of an input can then be reflinked.
    """
    from ckptool.io.output import CLONED

    ranges: dict[str, list[int]] = {}
    position = 0
    for name in by_size(tensors):
        end = position + tensors[name].nbytes
        ranges[name] = [position, end]
        position = end
    header: dict[str, Any] = {"__metadata__": dict(sorted({"format": "pt", **metadata}.items()))}
    for name, tensor in tensors.items():
        kind, shape = DTYPES[tensor.dtype].safetensors, tensor.shape or ()
        if kind == "F4":
            shape = (*shape[:-1], 2 * shape[-1])
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": ranges[name]}
    encoded = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8 if like is None else (like - 8 - len(encoded)) % CLONED)
    if len(encoded) > MAX_HEADER.now():
        raise MAX_HEADER.passed(f"the header would have {len(encoded):,} bytes, more than safetensors itself reads")
    return len(encoded).to_bytes(8, "little") + encoded, position


def by_size(tensors: Mapping[str, TensorInfo]) -> list[str]:
    """Returns the names in the order of their data."""
    return sorted(tensors, key=lambda name: -DTYPES[tensors[name].dtype].bits)


def write(tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str], output: Output, files: Files) -> None:
    """Writes tensors that `refuse` accepts, streaming; no two share bytes.

    The header keeps the order of the names. The data are sorted by decreasing element size, as the safetensors
    library does, so that each tensor is aligned. ``format`` is ``pt`` unless the metadata have another: accelerate
    requires it. Raises: LimitError if the header would exceed `MAX_HEADER`.
    """
    from ckptool.values.blocks import runs  # needed only to write, so opening does not import it

    pieces = list(runs(tensors[name] for name in by_size(tensors)))
    first = next((piece for piece in pieces if isinstance(piece, Span)), None)
    shared = first is not None and first is pieces[0] and first.offset % 8 == 0 and output.clones(files.get(first))
    header, nbytes = begin(tensors, metadata, first.offset if first is not None and shared else None)
    output.reserve(len(header) + nbytes)
    output.write(header)
    put(pieces, output, files)


def put(pieces: Iterable[Span | TensorInfo], output: Output, files: Files) -> None:
    """Writes data, streaming: bytes of files, and tensors."""
    from ckptool.values.blocks import blocks_ahead

    for piece in pieces:
        if isinstance(piece, Span):
            output.copy(files, piece)
        else:
            for block in blocks_ahead(piece, files):
                output.write(block)


def prove(path: str) -> None:
    """Opens a written file with the safetensors library, which checks the whole header. Raises: FormatError."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as opened:
            opened.keys()
    except (SafetensorError, OSError) as error:
        raise FormatError(f"the reference library refuses what was written: {error}") from error


def sharding(metadata: Mapping[str, str]) -> dict[str, tuple[int, ...]] | None:
    """Returns {tensor: the first index of the part that is here} of a file that DCP wrote, else None.

    The entry is JSON: {tensor: {"saved_offsets": [...]}}. Raises: FormatError.
    """
    if (text := metadata.get("DCP_SHARDING_INFO")) is None:
        return None
    try:
        info = {key: entry["saved_offsets"] for key, entry in json.loads(text).items()}
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise FormatError(f"its DCP_SHARDING_INFO cannot be understood: {brief(str(error))}") from error
    for key, at in info.items():
        if type(at) is not list or any(type(number) is not int or number < 0 for number in at):
            raise FormatError(f"its DCP_SHARDING_INFO has {brief(at)} where the offsets of {brief(key)} belong")
    return {key: tuple(at) for key, at in info.items()}
