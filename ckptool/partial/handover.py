"""What training gets after a partial load: which parameters stand still, and who learns at which rate.

Everything is said with the names of `model.named_parameters()`. A parameter of several names (tied weights) is a list
of them, the first of which is the one that torch gives it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from ckptool.core.dtypes import DTYPES
from ckptool.core.keys import fits as fits_key
from ckptool.core.keys import unwrap_all, unwrapped
from ckptool.core.tensor import TensorInfo
from ckptool.errors import UsageError, listed

SCHEMA = 1
"""Version of the document that `document` makes."""

When = Literal["always", "a mask", "beside weight_u"]

BUFFERS: tuple[tuple[str, When, str], ...] = (
    ("running_mean", "always", "BatchNorm, InstanceNorm"),
    ("running_var", "always", "BatchNorm, InstanceNorm"),
    ("num_batches_tracked", "always", "BatchNorm: an integer, but a float in files that were cast as a whole"),
    ("inv_freq", "always", "rotary positions of transformers"),
    ("freqs_cis", "always", "rotary positions of Llama's own code, complex"),
    ("cos_cached", "always", "rotary positions of transformers up to 4.43"),
    ("sin_cached", "always", "rotary positions of transformers up to 4.43"),
    ("position_ids", "always", "BERT and its kin up to transformers 4.30"),
    ("relative_position_index", "always", "Swin, BEiT"),
    ("relative_coords_table", "always", "Swin v2: coordinates in log space"),
    ("attn_mask", "always", "Swin: its shifted windows"),
    ("masked_bias", "always", "GPT-2 of transformers: the number that masks"),
    ("bias", "a mask", "GPT-2 of transformers, nanoGPT: what is in the past"),
    ("mask", "a mask", "minGPT: what is in the past"),
    ("weight_u", "always", "torch.nn.utils.spectral_norm: a singular vector"),
    ("weight_v", "beside weight_u", "the same; without it a parameter of weight_norm"),
    ("_u", "always", "torch.nn.utils.parametrizations.spectral_norm"),
    ("_v", "always", "torch.nn.utils.parametrizations.spectral_norm"),
    ("pixel_mean", "always", "detectron2, SAM: the input's normalisation"),
    ("pixel_std", "always", "detectron2, SAM: the input's normalisation"),
    ("anchor_grid", "always", "YOLOv5"),
    ("anchors", "always", "YOLOv5"),
)
"""(last segment, when, where it is from): floats in a state_dict that nobody trains. A mask is 1 x 1 x n x n.

Only what is a buffer wherever it occurs. A parameter held for a buffer would silently never be trained; a buffer held
for a parameter (``pe`` of torch's tutorial) is a name that `named_parameters()` does not have, and so is noticed.
"""

_BUFFERS = {name: when for name, when, _ in BUFFERS}


# --- which tensors are parameters --------------------------------------------------------------------------------


def by_name(tensors: Mapping[str, TensorInfo]) -> bool:
    """Returns whether parameters must be told from buffers by name: nothing in the file says which are."""
    return not any(tensor.is_parameter or tensor.requires_grad for tensor in tensors.values())


def parameters(tensors: Mapping[str, TensorInfo]) -> list[list[str]]:
    """Returns the names of each parameter, tied ones together, in the target's order.

    Whole models say what is a parameter; of a state_dict it is told by name and dtype (see `by_name`, `BUFFERS`).
    """
    told = by_name(tensors)
    found: dict[object, list[str]] = {}
    for key, tensor in tensors.items():
        if _like_a_parameter(key, tensor, tensors) if told else tensor.is_parameter or tensor.requires_grad:
            found.setdefault(tensor.view if tensor.numel else key, []).append(key)
    return list(found.values())


def _like_a_parameter(key: str, tensor: TensorInfo, tensors: Mapping[str, TensorInfo]) -> bool:
    if DTYPES[tensor.dtype].kind not in ("float", "complex"):
        return False
    path, dot, last = key.rpartition(".")
    when = _BUFFERS.get(last)
    if when == "a mask":
        shape = tensor.shape or ()
        return not (len(shape) == 4 and shape[:2] == (1, 1) and shape[2] == shape[3] > 1)
    return when is None or (when == "beside weight_u" and f"{path}{dot}weight_u" not in tensors)


def in_name_order(names: Sequence[str]) -> bool:
    """Returns whether names stand sorted, as safetensors writes them: then their order is not the model's.

    Runs are sorted one by one where dtypes are mixed. Names that differ in numbers only are in order either way.
    """
    descents = sum(one > other for one, other in pairwise(names))
    if len(names) < 4 or descents * 16 > len(names):
        return False
    return not all(_numbers_decide(one, other) for one, other in pairwise(names))


def _numbers_decide(one: str, other: str) -> bool:
    pairs = zip(one.split("."), other.split("."), strict=False)
    first = next(((a, b) for a, b in pairs if a != b), ("", ""))
    return all(map(_is_number, first))


def _is_number(segment: str) -> bool:
    return segment.isascii() and segment.isdigit()


def blocks(names: Iterable[str]) -> dict[str, list[str]]:
    """Returns {block: names in it}, in the order of first names; what stands in no block is left out.

    A block is a name up to its first segment that is a whole number, wrapper prefixes looked through:
    ``layers.0``, ``layer1.0``, ``encoder.layer.7``.
    """
    found: dict[str, list[str]] = {}
    for plain, name in unwrap_all(names).items():
        segments = plain.split(".")
        number = next((at for at, segment in enumerate(segments) if _is_number(segment)), None)
        if number is not None:
            found.setdefault(".".join(segments[: number + 1]), []).append(name)
    return found


# --- what stands still -------------------------------------------------------------------------------------------


def frozen(
    specs: Sequence[str], parameters: Sequence[Sequence[str]], loaded: Collection[str], *, live: bool = False
) -> list[str]:
    """Returns the names of all parameters that are frozen, in the order of ``parameters``.

    A spec is ``loaded`` (every parameter of which a name is in ``loaded``), ``first:N`` (the first N `blocks` and all
    that stands before the end of the Nth: stems, embeddings), or a pattern on names. Tied names freeze together.
    ``live``: the order is a model's, and not a file's that may be sorted.
    Raises: UsageError for a spec that fits no parameter, for blocks the model does not have or a file does not order.
    """
    chosen: set[int] = set()
    unused = []
    known = set(loaded)
    for spec in specs:
        if spec == "loaded":
            fits = {at for at, names in enumerate(parameters) if known.intersection(names)}
        elif spec.startswith("first:"):
            fits = _first(spec, [names[0] for names in parameters], live)
        else:
            fits = {at for at, names in enumerate(parameters) if any(fits_key(spec, name) for name in names)}
        chosen |= fits
        if not fits:
            unused.append(spec)
    if unused:
        raise UsageError(f"--freeze {listed(unused)} fits no parameter")
    return [name for at, names in enumerate(parameters) if at in chosen for name in names]


def _first(spec: str, names: Sequence[str], live: bool) -> set[int]:
    text = spec.removeprefix("first:")
    wanted = int(text) if _is_number(text) and len(text) < 10 else 0
    if wanted < 1:
        raise UsageError(f"--freeze {spec}: how many blocks? first:1 is the first one and all before it")
    if not live and in_name_order(names):
        raise UsageError(
            f"--freeze {spec}: the target's keys are in alphabetical order ({listed(names, 3)}), which does not tell "
            "what comes first in the model; name what to freeze with patterns, or take a target that torch saved"
        )
    found = blocks(names)
    if wanted > len(found):
        has = f"{len(found)}: {listed(found, 20)}" if found else "none: no name has a number between its dots"
        raise UsageError(f"--freeze {spec}: of the {wanted} blocks the target has {has}")
    inside = {name for block in list(found)[:wanted] for name in found[block]}
    end = max(at for at, name in enumerate(names) if name in inside)
    return set(range(end + 1))


def moving_batch_norms(tensors: Mapping[str, TensorInfo], frozen: Collection[str]) -> list[str]:
    """Returns the modules whose weight stands still while their running statistics move, unless put in eval mode.

    A norm without a weight counts as frozen where all parameters of the nearest module around it that has any are.
    """
    still = set(frozen)
    names = [name for names in parameters(tensors) for name in names]
    paths = dict.fromkeys(
        key.rpartition(".")[0] for key in tensors if key.rpartition(".")[2] in ("running_mean", "running_var")
    )
    return [path for path in paths if _stands_still(path, tensors, names, still)]


def _stands_still(path: str, tensors: Mapping[str, TensorInfo], names: Sequence[str], still: Collection[str]) -> bool:
    weight = f"{path}.weight" if path else "weight"
    if weight in tensors:
        return weight in still  # a buffer of that name (FrozenBatchNorm2d) is not among the frozen, nor does it move
    around: list[str] = []
    while path and not around:
        path = path.rpartition(".")[0]
        around = [name for name in names if name.startswith(f"{path}." if path else "")]
    return bool(around) and all(name in still for name in around)


# --- who learns at which rate ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Group:
    """Parameters that an optimizer treats alike. ``lr_mult`` is relative to the learning rate of what was loaded."""

    name: str
    params: list[str]
    lr_mult: float
    weight_decay: float


def groups(
    parameters: Sequence[Sequence[str]],
    loaded: Collection[str],
    frozen: Collection[str],
    tensors: Mapping[str, Any],
    *,
    new_lr_mult: float = 10.0,
    weight_decay: float = 0.0,
) -> list[Group]:
    """Returns the parameter groups: loaded and new, each with and without weight decay; empty ones are left out.

    No decay for biases and whatever has one dimension or none (the scales of norms); embeddings, position tables and
    class tokens keep it. Frozen parameters are in no group; a tied one is there once, under its first name.
    ``tensors`` are asked for their ``shape`` only: `TensorInfo`, or live parameters.
    """
    known, still = set(loaded), set(frozen)
    made = {
        (old, decays): Group(
            ("loaded" if old else "new") + ("" if decays else "_no_decay"),
            [],
            1.0 if old else float(new_lr_mult),
            float(weight_decay) if decays else 0.0,
        )
        for old in (True, False)
        for decays in (True, False)
    }
    for names in parameters:
        if not still.intersection(names):
            made[bool(known.intersection(names)), _decays(names[0], _shape(tensors[names[0]]))].params.append(names[0])
    return [group for group in made.values() if group.params]


def _decays(name: str, shape: Sequence[int] | None) -> bool:
    last = name.rpartition(".")[2]
    bias = last == "bias" or last.startswith("bias_") or last.endswith("_bias")
    return not bias and (shape is None or len(shape) > 1)  # a lazy parameter has no shape yet, and is a weight


def _shape(tensor: Any) -> Sequence[int] | None:
    try:
        return None if tensor.shape is None else tuple(tensor.shape)
    except RuntimeError:  # an UninitializedParameter, until the first forward pass
        return None


def check(groups: Sequence[Group], frozen: Collection[str], parameters: Sequence[Sequence[str]]) -> None:
    """Raises RuntimeError unless each parameter is frozen or in exactly one group: our own promise, not the user's."""
    still = set(frozen)
    placed = Counter(name for group in groups for name in group.params)
    placed.update(names[0] for names in parameters if still.intersection(names))
    wrong = placed.keys() ^ {names[0] for names in parameters}
    wrong |= {name for name, times in placed.items() if times > 1}
    if wrong:
        raise RuntimeError(f"parameter groups are not disjoint and covering: {listed(sorted(wrong))}")


def document(groups: Sequence[Group], frozen: Sequence[str], parameters: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Returns what ``--groups-out`` writes: groups, every frozen name, and {other name: first name} of tied ones."""
    rows = [
        {"name": group.name, "params": group.params, "lr_mult": group.lr_mult, "weight_decay": group.weight_decay}
        for group in groups
    ]
    tied = {name: names[0] for names in parameters for name in names[1:]}
    return {"schema": SCHEMA, "groups": rows, "frozen": list(frozen), "tied": tied}


# --- the same for a live model, of which only `named_parameters` is known ------------------------------------------


def live_parameters(model: Any) -> list[list[str]]:
    """Returns what `parameters` does, of a live nn.Module."""
    found: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found.setdefault(id(parameter), []).append(name)
    return list(found.values())


def freeze_of_model(model: Any, specs: Sequence[str], loaded: Collection[str]) -> list[str]:
    """Returns what `frozen` does, of a live nn.Module: nothing is changed yet."""
    return frozen(specs, live_parameters(model), loaded, live=True)


def freeze_model(model: Any, frozen: Collection[str]) -> list[str]:
    """Returns the names of the parameters that got ``requires_grad = False``, other names of tied ones included.

    Gradients they had are dropped, or the next step would still move them. Raises: UsageError before touching any.
    """
    live = dict(model.named_parameters(remove_duplicate=False))
    wanted = _known(frozen, live)
    still = {id(live[name]) for name in wanted}
    for parameter in live.values():
        if id(parameter) in still:
            parameter.requires_grad = False
            parameter.grad = None
    return [name for name, parameter in live.items() if id(parameter) in still]


def names_of(model: Any, keys: Collection[str]) -> list[str]:
    """Returns what `named_parameters` calls the keys of a state_dict: wrapped since, or renamed by its hooks."""
    own = dict(model.named_parameters(remove_duplicate=False))
    wanted = {unwrapped(key) for key in keys}
    state = model.state_dict(keep_vars=True)
    meant = {id(value) for key, value in state.items() if unwrapped(key) in wanted}
    return [name for name, value in own.items() if id(value) in meant or unwrapped(name) in wanted]


def moving_of_model(model: Any) -> list[str]:
    """Returns what `moving_batch_norms` does, of a live nn.Module and what of it needs no gradient."""
    modules = dict(model.named_modules())
    return [
        path
        for path, module in modules.items()
        if getattr(module, "running_mean", None) is not None and _is_still(path, modules)
    ]


def _is_still(path: str, modules: Mapping[str, Any]) -> bool:
    weight = getattr(modules[path], "weight", None)
    if weight is not None:
        return _has_weight(modules[path]) and not weight.requires_grad
    around: list[Any] = []
    while path and not around:
        path = path.rpartition(".")[0]
        around = list(modules[path].parameters())
    return bool(around) and not any(parameter.requires_grad for parameter in around)


def _has_weight(module: Any) -> bool:
    """Returns whether a module's weight is a parameter: that of FrozenBatchNorm2d is a buffer, and it does not move."""
    return any(name == "weight" for name, _ in module.named_parameters(recurse=False))


def _known(names: Collection[str], live: Mapping[str, Any]) -> list[str]:
    unknown = [name for name in names if name not in live]
    if unknown:
        plain = {unwrapped(name) for name in live}
        hint = " (wrapped since?)" if all(unwrapped(name) in plain for name in unknown) else ""
        raise UsageError(f"the model has no parameter {listed(unknown, 20)}{hint}")
    return list(names)


def model_groups(
    model: Any,
    loaded: Collection[str],
    frozen: Collection[str] = (),
    *,
    lr: float,
    new_lr_mult: float = 10.0,
    weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """Returns `groups` as an optimizer of torch takes them: ``torch.optim.AdamW(model_groups(model, ...))``.

    Each parameter is there once. Left out are the ``frozen`` and all that need no gradient.
    Raises: UsageError for unknown names, and if nothing is left to train.
    """
    live = dict(model.named_parameters(remove_duplicate=False))
    named = live_parameters(model)
    still = [*_known(frozen, live), *(names[0] for names in named if not live[names[0]].requires_grad)]
    made = groups(named, loaded, still, live, new_lr_mult=new_lr_mult, weight_decay=weight_decay)
    check(made, still, named)
    if not made:
        raise UsageError(f"nothing is left to train: all {len(named)} parameters are frozen")
    return [
        {
            "params": [live[name] for name in group.params],
            "lr": lr * group.lr_mult,
            "weight_decay": group.weight_decay,
            "name": group.name,
        }
        for group in made
    ]
