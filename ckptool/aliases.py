"""Tied weights in formats that store each name's bytes once: Hugging Face's record ``{dropped alias: kept name}``.

It stands in safetensors' ``__metadata__``, or in the index's metadata when sharded.
Source: ``huggingface_hub/serialization/_torch.py`` (`save_torch_state_dict`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ckptool.checkpoint import TensorInfo

RESERVED = frozenset({"format"})
"""Names in the metadata that mean something else: a tensor of such a name is stored, tied or not."""


def record(tensors: Mapping[str, TensorInfo]) -> dict[str, str]:
    """Returns {dropped alias: kept name}: of names for the same elements the first is kept. Empty tensors never tie."""
    kept: dict[object, str] = {}
    aliases: dict[str, str] = {}
    for name, tensor in tensors.items():
        first = kept.setdefault(tensor.view, name) if tensor.numel and name not in RESERVED else name
        if first != name:
            aliases[name] = first
    return aliases


def restored(tensors: dict[str, TensorInfo], metadata: Mapping[str, str]) -> dict[str, TensorInfo]:
    """Returns the tensors with each recorded alias put back behind the name that was kept, on the same storage."""
    aliases: dict[str, list[str]] = {}
    for dropped, kept in metadata.items():
        if kept in tensors and dropped not in tensors and dropped not in RESERVED:
            aliases.setdefault(kept, []).append(dropped)
    if not aliases:
        return tensors
    tied: dict[str, TensorInfo] = {}
    for name, tensor in tensors.items():
        tied[name] = tensor
        tied.update((alias, replace(tensor)) for alias in aliases.get(name, ()))
    return tied


def without(metadata: Mapping[str, str], tensors: Mapping[str, TensorInfo]) -> dict[str, str]:
    """Returns the metadata without its alias records: entries whose name or value is a tensor's name."""
    return {name: value for name, value in metadata.items() if name not in tensors and value not in tensors}
