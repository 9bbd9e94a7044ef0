"""Prepares a checkpoint for another format: casts to another dtype, unties, or reduces it to the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from ckptool.core import aliases
from ckptool.core import keys as names
from ckptool.core.checkpoint import Checkpoint, detached
from ckptool.core.dtypes import DTYPES
from ckptool.core.tensor import Derived, Opaque, TensorInfo, computed_as
from ckptool.core.tree import as_mapping, path_text
from ckptool.core.versions import versioned
from ckptool.errors import LossError, NoTensorsError, UsageError, listed, near
from ckptool.ops.notes import pattern_notes, require_tensors, root_notes
from ckptool.ops.scales import dequantized, of_blocks, outside, scaled_weights, with_doubtful


@dataclass(frozen=True, slots=True)
class ConvertReport:
    """The result of a conversion."""

    input: str
    """The path that was read."""
    output: str
    """The path that was written, or would be."""
    tensors: int
    """How many tensors it holds."""
    nbytes: int
    """The size of the output; in a dry run an estimate."""
    left_out: list[str]
    """Entries of the input that are not in the output."""
    verified: bool
    """Whether the output was read back and compared."""
    cast: list[str] = field(default_factory=list)
    """Keys whose dtype changed."""
    dequantized: list[str] = field(default_factory=list)
    """Keys multiplied by their scales."""
    untied: list[str] = field(default_factory=list)
    """Keys that shared memory with another one, and no longer do."""
    overflowed: dict[str, int] = field(default_factory=dict)
    """{key: values that a cast made infinite}, known when written."""
    saturated: dict[str, int] = field(default_factory=dict)
    """{key: values that a cast clamped to the largest finite one}, known when written."""
    underflowed: dict[str, int] = field(default_factory=dict)
    """{key: values that a cast made zero}, known when written."""
    notes: list[str] = field(default_factory=list)
    """What else was noticed."""


def convert(
    checkpoint: Checkpoint,
    *,
    dtype: str | None = None,
    keep: Sequence[str] = (),
    dequantize: bool = False,
    untie: bool = False,
    publish: bool = False,
    metadata: Sequence[str] = (),
) -> tuple[Checkpoint, ConvertReport]:
    """Returns (checkpoint, report), ready to be saved in any format. No values are read or computed.

    Raises: NoTensorsError, also if no tensor has an element; LossError for weights with scales that a cast would
    part, or that ``dequantize`` cannot resolve; UsageError for a dtype that is not floating point or for metadata that
    is not a scalar.
    """
    tensors = require_tensors(checkpoint)
    if not any(tensor.numel for tensor in tensors.values()) and not checkpoint.hidden():
        what = (
            "no tensor has an element: placeholders of DeepSpeed ZeRO-3? name the directory of its save, global_step..."
        )
        raise NoTensorsError(what, checkpoint.url)
    notes = [*root_notes([checkpoint]), *pattern_notes(keep, tensors)]
    cast: list[str] = []
    untied: list[str] = []
    left_out: list[str] = []
    if dtype is not None and (not _is_castable(dtype) or dtype == "float8_e8m0fnu"):  # which has no sign and no zero
        raise UsageError(f"--dtype takes a floating-point dtype, not {dtype}")
    made: dict[str, TensorInfo] = {}
    if dtype is not None or dequantize:
        chosen = names.chooser(keep, ())
        stay = {tensor.view for key, tensor in tensors.items() if keep and chosen(key)}
        made, left_out = _dequantized(checkpoint, tensors, stay, dtype, dequantize)
        notes += [_STALE] if left_out else []
        notes += ["no weight has a scale to multiply by"] if dequantize and not made else []
        tensors = {key: made.get(key, tensor) for key, tensor in tensors.items() if key not in left_out}
        kept = ((key, key) for key in tensors if key not in made)
        followed, told = aliases.followed(checkpoint.metadata, checkpoint.entries(), kept, made)
        checkpoint, notes = replace(checkpoint, metadata=followed), [*notes, *told]
        if dtype is not None:
            tensors, cast = _cast(tensors, dtype, stay)
    if untie:
        tensors, untied = _untied(tensors)
    changed = checkpoint
    if publish:
        changed, others = _weights_only(checkpoint, tensors)
        left_out += others
    elif cast or untied or made:
        changed = checkpoint.with_state_dict(tensors)
    if metadata:
        changed = replace(changed, metadata={**changed.metadata, **_scalars(checkpoint, metadata)})
    report = ConvertReport(
        checkpoint.url, "", len(tensors), 0, left_out, False, cast, list(made), untied, notes=notes
    )  # fmt: skip
    return changed, report


_STALE = "a config.json with quantization_config still says that these weights are quantised: take that entry out"


def _is_castable(dtype: str) -> bool:
    row = DTYPES[dtype]
    return row.kind == "float" and row.in_torch and not dtype.endswith("_x2")


def _is_cast(tensor: TensorInfo, dtype: str | None, stay: set[object]) -> bool:
    """Returns whether a cast to ``dtype`` concerns a tensor, if those of the views ``stay`` are kept."""
    other = dtype not in (None, tensor.dtype) and _is_castable(tensor.dtype)
    return other and not isinstance(tensor.source, Opaque) and tensor.view not in stay


def _dequantized(
    checkpoint: Checkpoint, tensors: dict[str, TensorInfo], stay: set[object], dtype: str | None, dequantize: bool
) -> tuple[dict[str, TensorInfo], list[str]]:
    """Returns ({weight: its values times its scales}, the keys that go with the scales).

    What belongs to a weight of the views ``stay`` is added to them. Raises: LossError.
    """
    pairs, url = with_doubtful(scaled_weights(tensors), tensors, outside(checkpoint)), checkpoint.url
    kept = {key: pair for key, pair in pairs.items() if tensors[key].view in stay}
    theirs = (name for pair in kept.values() for name in pair.parts if name in tensors)
    stay |= {tensors[name].view for name in theirs}
    markers = [key for key in tensors if key.rpartition(".")[2] == "scaled_fp8"] if pairs else []  # ComfyUI's
    if kept:
        stay |= {tensors[key].view for key in markers}
    left = {key: pair for key, pair in pairs.items() if key not in kept}
    if not dequantize:
        parted = [
            f"{key} ({tensors[key].dtype}; {pair.told})" for key, pair in left.items()
            if any(_is_cast(tensors[name], dtype, stay) for name in (key, *pair.scales) if name in tensors)
        ]  # fmt: skip
        if parted:
            known = any(pair.is_named for pair in left.values())
            how = "--dequantize multiplies by them" if known else "remap can rename a scale to lie beside its weight"
            what = f"a cast to {dtype} would part weights from their scales: {listed(parted)}"
            raise LossError(f"{what}; {how}, --keep leaves a weight and its scales as they are", url)
        return {}, []
    made, refused = dequantized(tensors, left, dtype or "float32")
    if refused:
        raise LossError(
            f"--dequantize finds no way to apply the scales of {listed(refused)}; --keep leaves a weight and its "
            "scales as they are",
            url,
        )
    gone = {name for key in made for name in (*left[key].scales, *left[key].beside)}
    left_out = [key for key in tensors if key in gone or (made and not kept and key in markers)]
    blocks = {key: of_blocks(tensor, dtype or "float32") for key, tensor in tensors.items() if tensor.view not in stay}
    return made | {key: tensor for key, tensor in blocks.items() if tensor is not None}, left_out


def _cast(tensors: dict[str, TensorInfo], dtype: str, stay: set[object]) -> tuple[dict[str, TensorInfo], list[str]]:
    """Returns (the tensors with floats cast, the keys that were cast). Tied keys stay tied: if one is kept, all are."""
    made: dict[object, Derived] = {}
    changed: dict[str, TensorInfo] = {}
    cast = []
    for key, tensor in tensors.items():
        if not _is_cast(tensor, dtype, stay):
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


def edited(checkpoint: Checkpoint, given: Mapping[str, str], gone: Sequence[str]) -> Checkpoint:
    """Returns the checkpoint with metadata entries set, and others left out.

    Raises: UsageError for an entry that is not there, that has a meaning of its own, or that is both set and left out.
    """
    reserved = sorted(aliases.RESERVED & {*given, *gone} - {"format"})
    if reserved:
        raise UsageError(
            f"metadata {', '.join(reserved)}: is computed for each file, and cannot be set", checkpoint.url
        )
    for name in gone:
        if name in given:
            raise UsageError(f"metadata {name!r} is both set and unset", checkpoint.url)
        if name == "format":
            raise UsageError("metadata 'format' stays: transformers loads no file without it", checkpoint.url)
        if name not in checkpoint.metadata:
            raise UsageError(f"no metadata {name!r} to unset{near(name, checkpoint.metadata)}", checkpoint.url)
    kept = {name: text for name, text in checkpoint.metadata.items() if name not in gone}
    return replace(checkpoint, metadata={**kept, **given})


def _scalars(checkpoint: Checkpoint, wanted: Sequence[str]) -> dict[str, str]:
    """Returns {name: text} of scalars in the dicts on the path from the top of the tree to the weights."""
    reserved = [name for name in wanted if name in aliases.RESERVED]
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
        known = [name for mapping in mappings for name in mapping if isinstance(name, str)]
        quoted = ", ".join(f"{name!r}{near(name, known)}" for name in wrong)
        raise UsageError(f"no text or number {quoted} beside the weights to carry as metadata", checkpoint.url)
    return found
