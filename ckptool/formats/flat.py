"""Shared by the formats that hold only {name: tensor}: which tensors they refuse, and what they leave out."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ckptool.core import modules
from ckptool.core.checkpoint import Checkpoint
from ckptool.core.tensor import Opaque, TensorInfo
from ckptool.core.tree import path_text
from ckptool.errors import LossError, listed


def refuse(
    format_name: str, tensors: Mapping[str, TensorInfo], reason: Callable[[str, TensorInfo], str | None]
) -> None:
    """Raises LossError naming every tensor that is opaque, or that the format cannot hold, as ``reason`` explains."""
    refused = []
    for name, tensor in tensors.items():
        why = tensor.kind if isinstance(tensor.source, Opaque) else reason(name, tensor)
        if why:
            refused.append(f"{name if name.isprintable() else repr(name)} ({why})")
    if refused:
        raise LossError(f"{format_name} cannot hold {listed(refused, 20)}")


def has_surrogate(name: str) -> bool:
    """Returns whether a name has a surrogate, which UTF-8 cannot encode."""
    return not name.isprintable() and any("\ud800" <= char <= "\udfff" for char in name)


def left_out(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Returns the names of all that is no weight: other entries, and attributes of tensors and of a model."""
    left = [path_text(path) if key is None else key for path, key, _ in checkpoint.beside()]
    for key, tensor in checkpoint.state_dict().items():
        if (extras := tensor.extras) is not None:
            left += [f"the class of {key} ({extras.subclass!r})"] if extras.subclass is not None else []
            left += [f"the attributes of {key}"] if extras.state is not None else []
    node = checkpoint.at(checkpoint.root)
    return (*left, *(modules.loose(node) if modules.is_module(node) else ()))
