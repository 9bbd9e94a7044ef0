"""Prepares a checkpoint for another format: casts to another dtype, unties, or reduces it to the weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from ckptool.core import keys as names
from ckptool.core.aliases import RESERVED
from ckptool.core.checkpoint import Checkpoint, detached
from ckptool.core.dtypes import DTYPES
from ckptool.core.tensor import Derived, Opaque, TensorInfo, computed_as
from ckptool.core.tree import as_mapping, path_text
from ckptool.core.versions import versioned
from ckptool.errors import UsageError
from ckptool.ops.notes import pattern_notes, require_tensors, root_notes


@dataclass(frozen=True, slots=True)
class ConvertReport:
    """The result of a conversion. ``nbytes``: the size of the output, in a dry run an estimate.

    ``left_out``: the entries that are not in the output. ``cast``: the keys whose dtype changed. ``untied``: the keys
    that shared memory with another one. ``overflowed``: {key: number of values that became infinite}.
    """

    input: str
    output: str
    tensors: int
    nbytes: int
    left_out: list[str]
    verified: bool
    cast: list[str] = field(default_factory=list)
    untied: list[str] = field(default_factory=list)
    overflowed: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def convert(
    checkpoint: Checkpoint,
    *,
    dtype: str | None = None,
    keep: Sequence[str] = (),
    untie: bool = False,
    publish: bool = False,
    metadata: Sequence[str] = (),
) -> tuple[Checkpoint, ConvertReport]:
    """Returns (checkpoint, report), ready to be saved in any format. No values are read or computed.

    Raises: NoTensorsError, UsageError for a dtype that is not floating point or for metadata that is not a scalar.
    """
    tensors = require_tensors(checkpoint)
    notes = [*root_notes([checkpoint]), *pattern_notes(keep, tensors)]
    cast: list[str] = []
    untied: list[str] = []
    if dtype is not None:
        tensors, cast = _cast(tensors, dtype, keep)
    if untie:
        tensors, untied = _untied(tensors)
    changed = checkpoint
    left_out: list[str] = []
    if publish:
        changed, left_out = _weights_only(checkpoint, tensors)
    elif cast or untied:
        changed = checkpoint.with_state_dict(tensors)
    if metadata:
        changed = replace(changed, metadata={**changed.metadata, **_scalars(checkpoint, metadata)})
    return changed, ConvertReport(checkpoint.url, "", len(tensors), 0, left_out, False, cast, untied, {}, notes)


def _cast(tensors: dict[str, TensorInfo], dtype: str, keep: Sequence[str]) -> tuple[dict[str, TensorInfo], list[str]]:
    """Returns (the tensors with floats cast, the keys that were cast). Tied keys stay tied: if one is kept, all are."""
    row = DTYPES[dtype]
    if row.kind != "float" or not row.in_torch or dtype.endswith("_x2"):
        raise UsageError(f"--dtype takes a floating-point dtype, not {dtype}")
    kept = names.chooser(keep, ())
    stay = {tensor.view for key, tensor in tensors.items() if keep and kept(key)}
    made: dict[object, Derived] = {}
    changed: dict[str, TensorInfo] = {}
    cast = []
    for key, tensor in tensors.items():
        floats = DTYPES[tensor.dtype].kind == "float" and DTYPES[tensor.dtype].in_torch
        plain = not isinstance(tensor.source, Opaque) and not tensor.dtype.endswith("_x2")
        if not (floats and plain) or tensor.dtype == dtype or tensor.view in stay:
            changed[key] = tensor
            continue
        source = made.setdefault(tensor.view, Derived("cast", (tensor,)))
        changed[key] = replace(computed_as(tensor, source, dtype), extras=None)
        cast.append(key)
    return changed, cast


def _untied(tensors: dict[str, TensorInfo]) -> tuple[dict[str, TensorInfo], list[str]]:
    """Returns (the tensors, in which all but the first of tied keys are copies; the keys of the copies)."""
    seen: set[object] = set()
    changed = dict(tensors)
    untied = []
    for key, tensor in tensors.items():
        if isinstance(tensor.source, Opaque) or not tensor.numel:
            continue
        if tensor.view in seen:
            changed[key] = replace(computed_as(tensor, Derived("copy", (tensor,))), extras=None)
            untied.append(key)
        seen.add(tensor.view)
    return changed, untied


def _weights_only(checkpoint: Checkpoint, tensors: dict[str, TensorInfo]) -> tuple[Checkpoint, list[str]]:
    """Returns (the checkpoint with only the state_dict in its tree, the names of the other entries)."""
    left = [path_text(path) if key is None else key for path, key, _ in checkpoint.beside()]
    node = checkpoint.at(checkpoint.root)
    return replace(checkpoint, tree=versioned(detached(tensors), node), root=()), left


def _scalars(checkpoint: Checkpoint, wanted: Sequence[str]) -> dict[str, str]:
    """Returns {name: text} of scalars in the dicts on the path from the top of the tree to the weights."""
    reserved = [name for name in wanted if name in RESERVED]
    if reserved:
        raise UsageError(f"{', '.join(reserved)}: reserved by safetensors for another meaning", checkpoint.url)
    found: dict[str, str] = {}
    mappings = [as_mapping(checkpoint.at(checkpoint.root[:depth])) or {} for depth in range(len(checkpoint.root) + 1)]
    wrong = []
    for name in wanted:
        value = next((mapping[name] for mapping in mappings if name in mapping), None)
        if isinstance(value, (str, int, float, bool)):
            found[name] = str(value)
        else:
            wrong.append(name)
    if wrong:
        quoted = ", ".join(map(repr, wrong))
        raise UsageError(f"no text or number {quoted} beside the weights to carry as metadata", checkpoint.url)
    return found
