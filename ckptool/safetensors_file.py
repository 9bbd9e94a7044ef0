"""One safetensors file on its way out: what it can hold, its header, its data (drawn in `formats.safetensors`)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ckptool import flat
from ckptool.checkpoint import TensorInfo
from ckptool.data import tensor_blocks
from ckptool.dtypes import DTYPES
from ckptool.errors import LimitError
from ckptool.files import Files, Output

MAX_HEADER = 100_000_000
"""Bytes of JSON: the reference library's own limit."""


def refuse(tensors: Mapping[str, TensorInfo]) -> None:
    """Raises LossError with every tensor that safetensors cannot hold."""
    flat.refuse("safetensors", tensors, _reason)


def _reason(name: str, tensor: TensorInfo) -> str | None:
    if DTYPES[tensor.dtype].safetensors is None:
        return tensor.dtype
    if tensor.dtype == "float4_e2m1fn_x2" and not tensor.shape:
        return f"a 0-dim {tensor.dtype}"
    if name == "__metadata__" or flat.has_surrogate(name):
        return "as a name"
    return None


def write(tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str], output: Output, files: Files) -> None:
    """Writes tensors that `refuse` has let pass, each with bytes of its own, streaming.

    Names keep their order in the header; the data are laid out by falling size of element, so that each is
    aligned, as the library does. ``format`` is ``pt`` unless the metadata say otherwise: accelerate wants it.
    Raises: LimitError if the header would pass `MAX_HEADER`.
    """
    by_size = sorted(tensors, key=lambda name: -DTYPES[tensors[name].dtype].bits)
    offsets: dict[str, tuple[int, int]] = {}
    position = 0
    for name in by_size:
        offsets[name] = (position, position + tensors[name].nbytes)
        position += tensors[name].nbytes
    header: dict[str, Any] = {"__metadata__": dict(sorted({"format": "pt", **metadata}.items()))}
    for name, tensor in tensors.items():
        row, shape = DTYPES[tensor.dtype], list(tensor.shape or ())
        if row.safetensors == "F4":
            shape[-1] *= 2
        header[name] = {"dtype": row.safetensors, "shape": shape, "data_offsets": list(offsets[name])}
    encoded = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    if len(encoded) > MAX_HEADER:
        raise LimitError(f"the header would have {len(encoded):,} bytes, over safetensors' limit of {MAX_HEADER:,}")
    output.reserve(8 + len(encoded) + position)
    output.write(len(encoded).to_bytes(8, "little") + encoded)
    for name in by_size:
        for block in tensor_blocks(tensors[name], files):
            output.write(block)
