"""Tied weights in formats that store each name's bytes once: Hugging Face's record ``{dropped alias: kept name}``.

It stands in safetensors' ``__metadata__``, or in the index's metadata when sharded.
Source: ``huggingface_hub/serialization/_torch.py`` (`save_torch_state_dict`).
"""

from __future__ import annotations

from collections.abc import Mapping

from ckptool.checkpoint import TensorInfo


def record(tensors: Mapping[str, TensorInfo]) -> dict[str, str]:
    """Returns {dropped alias: kept name}: of names for the same elements the first is kept. Empty tensors never tie."""
    kept: dict[object, str] = {}
    aliases: dict[str, str] = {}
    for name, tensor in tensors.items():
        first = kept.setdefault(tensor.view, name) if tensor.numel else name
        if first != name:
            aliases[name] = first
    return aliases


def restored(tensors: dict[str, TensorInfo], metadata: Mapping[str, str]) -> dict[str, TensorInfo]:
    """Returns the tensors with each recorded alias put back behind the name that was kept, as the same tensor."""
    aliases: dict[str, list[str]] = {}
    for dropped, kept in metadata.items():
        if kept in tensors and dropped not in tensors:
            aliases.setdefault(kept, []).append(dropped)
    if not aliases:
        return tensors
    tied: dict[str, TensorInfo] = {}
    for name, tensor in tensors.items():
        tied[name] = tensor
        tied.update(dict.fromkeys(aliases.get(name, ()), tensor))
    return tied


def without(metadata: Mapping[str, str], tensors: Mapping[str, TensorInfo]) -> dict[str, str]:
    """Returns the metadata without its alias records: entries whose name or value is a tensor's name."""
    return {name: value for name, value in metadata.items() if name not in tensors and value not in tensors}
