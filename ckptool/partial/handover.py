"""Frozen parameters and optimizer parameter groups for fine-tuning after a partial load.

All names are those of `model.named_parameters()`. A parameter is a list of its names: tied weights have several, of
which the first is the one that torch gives it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from ckptool.core.dtypes import DTYPES
from ckptool.core.keys import fits as fits_key
from ckptool.core.keys import looking_through, near_pattern, unwrap_all, unwrapped
from ckptool.core.tensor import TensorInfo
from ckptool.errors import UsageError, listed, near

When = Literal["always", "a mask", "beside weight_u"]

BUFFERS: tuple[tuple[str, When, str], ...] = (
    ("running_mean running_var", "always", "BatchNorm, InstanceNorm"),
    ("num_batches_tracked", "always", "BatchNorm: an integer, but a float in files that were cast as a whole"),
    ("inv_freq", "always", "rotary positions of transformers"),
    ("freqs_cis", "always", "rotary positions of Llama's own code, complex"),
    ("cos_cached sin_cached", "always", "rotary positions of transformers up to 4.43"),
    ("position_ids", "always", "BERT and its kin up to transformers 4.30"),
    ("relative_position_index", "always", "Swin, BEiT"),
    ("relative_coords_table", "always", "Swin v2: coordinates in log space"),
    ("attn_mask", "always", "Swin: its shifted windows"),
    ("masked_bias", "always", "GPT-2 of transformers: the value of masked positions"),
    ("bias", "a mask", "GPT-2 of transformers, nanoGPT: the causal mask"),
    ("mask", "a mask", "minGPT: the causal mask"),
    ("weight_u", "always", "torch.nn.utils.spectral_norm: a singular vector"),
    ("weight_v", "beside weight_u", "the same; without weight_u it is a parameter of weight_norm"),
    ("_u _v", "always", "torch.nn.utils.parametrizations.spectral_norm"),
    ("pixel_mean pixel_std", "always", "detectron2, SAM: the input's normalisation"),
    ("anchor_grid anchors", "always", "YOLOv5"),
)
"""(last segments, when, origin) of buffers with a float dtype. A mask is 1 x 1 x n x n.

Only names that are buffers wherever they occur. A parameter mistaken for a buffer would silently never be trained; a
buffer mistaken for a parameter (``pe`` of torch's tutorial) is noticed: `named_parameters()` does not have its name.
"""

_BUFFERS = {name: when for names, when, _ in BUFFERS for name in names.split()}


# --- which tensors are parameters --------------------------------------------------------------------------------


def parameters(tensors: Mapping[str, TensorInfo]) -> list[list[str]]:
    """Returns the names of each parameter, tied ones together, in the target's order.

    A whole model says which tensors are parameters. A state_dict does not, so name and dtype decide (see `BUFFERS`).
    """
    marked = any(tensor.is_parameter or tensor.requires_grad for tensor in tensors.values())
    found: dict[object, list[str]] = {}
    for key, tensor in tensors.items():
        if (tensor.is_parameter or tensor.requires_grad) if marked else _like_a_parameter(key, tensor, tensors):
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
    """Returns whether names are sorted, as safetensors writes them: then their order is not the model's.

    safetensors sorts within each dtype, so few descents are allowed. Names that differ only in numbers prove nothing.
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


def blocks(names: Collection[str]) -> dict[str, list[str]]:
    """Returns {block: names in it}, in the order of first names; names outside any block are left out.

    A block is a name, without wrapper prefixes, up to its first segment that is a whole number: ``layers.0``,
    ``layer1.0``, ``encoder.layer.7``.
    """
    found: dict[str, list[str]] = {}
    for plain, name in unwrap_all(names).items():
        segments = plain.split(".")
        number = next((at for at, segment in enumerate(segments) if _is_number(segment)), None)
        if number is not None:
            found.setdefault(".".join(segments[: number + 1]), []).append(name)
    return found


# --- frozen parameters -------------------------------------------------------------------------------------------


def frozen(
    specs: Sequence[str], parameters: Sequence[Sequence[str]], loaded: Collection[str], *, live: bool = False
) -> list[str]:
    """Returns the names of all parameters that are frozen, in the order of ``parameters``.

    A spec is ``loaded`` (every parameter with a name in ``loaded``), ``first:N`` (the first N `blocks` and everything
    before the end of the Nth: stems, embeddings), or a pattern on names. Tied names freeze together.
    ``live``: the order is a model's, not that of a file, which may be sorted.
    Raises: UsageError for a spec that fits no parameter, for more blocks than there are, for ``first:N`` if sorted.
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
        names = [name for several in parameters for name in several]
        meant = {spec: near(spec, ["loaded"]) or near_pattern(spec, names) for spec in unused[:8] if spec != "loaded"}
        texts = [spec + meant.get(spec, "") for spec in unused[:8]]
        raise UsageError(f"--freeze {listed([*texts, *unused[8:]])} fits no parameter")
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
    """Returns the norms whose weight is frozen but whose running statistics are still updated, unless in eval mode.

    A norm without a weight counts as frozen if all parameters of the nearest enclosing module that has any are.
    """
    names = [name for names in parameters(tensors) for name in names]
    split = [key.rpartition(".") for key in tensors]
    paths = dict.fromkeys(path for path, _, last in split if last in ("running_mean", "running_var"))
    return _moving(paths, tensors, names, set(frozen))


def _moving(paths: Iterable[str], tensors: Collection[str], names: Sequence[str], frozen: Collection[str]) -> list[str]:
    """Returns the frozen ones of the norms at ``paths``; ``names`` are those of all parameters."""

    def is_frozen(path: str) -> bool:
        weight = f"{path}.weight" if path else "weight"
        if weight in tensors:
            return weight in frozen  # FrozenBatchNorm2d's weight is a buffer, so never in frozen: it updates nothing
        around: list[str] = []
        while path and not around:
            path = path.rpartition(".")[0]
            around = [name for name in names if name.startswith(f"{path}." if path else "")]
        return bool(around) and all(name in frozen for name in around)

    return [path for path in paths if is_frozen(path)]


# --- parameter groups ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Group:
    """Parameters with the same hyperparameters."""

    name: str
    """The name of the group."""
    params: list[str]
    """The keys."""
    lr_mult: float
    """The learning rate, relative to that of loaded parameters."""
    weight_decay: float
    """The weight decay."""


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

    Biases and tensors of under two dimensions (scales of norms) have no decay; embeddings, position tables and class
    tokens have. Frozen parameters are in no group; a tied one is in one group once, under its first name.
    Of ``tensors`` only the ``shape`` is used: `TensorInfo`, or live parameters.
    """
    known, skipped = set(loaded), set(frozen)
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
        if not skipped.intersection(names):
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
    """Raises RuntimeError unless each parameter is frozen or in exactly one group, which `groups` guarantees."""
    skipped = set(frozen)
    counts = Counter(name for group in groups for name in group.params)
    counts.update(names[0] for names in parameters if skipped.intersection(names))
    wrong = counts.keys() ^ {names[0] for names in parameters}
    wrong |= {name for name, times in counts.items() if times > 1}
    if wrong:
        raise RuntimeError(f"parameter groups are not disjoint and covering: {listed(sorted(wrong))}")


# --- live models ---------------------------------------------------------------------------------------------------


def live_parameters(model: Any) -> list[list[str]]:
    """Returns what `parameters` does, of a live nn.Module."""
    found: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found.setdefault(id(parameter), []).append(name)
    return list(found.values())


def freeze_model(model: Any, frozen: Collection[str]) -> list[str]:
    """Returns the names of the parameters that got ``requires_grad = False``, all names of tied ones included.

    Their gradients are dropped: the next optimizer step would use them. Raises: UsageError before touching any.
    """
    live = dict(model.named_parameters(remove_duplicate=False))
    unknown = [name for name in frozen if name not in live]
    if unknown:
        plain = {unwrapped(name) for name in live}
        hint = " (wrapped since?)" if all(unwrapped(name) in plain for name in unknown) else ""
        raise UsageError(f"the model has no parameter {listed(unknown, 20)}{hint}")
    chosen = {id(live[name]) for name in frozen}
    for parameter in live.values():
        if id(parameter) in chosen:
            parameter.requires_grad = False
            parameter.grad = None
    return [name for name, parameter in live.items() if id(parameter) in chosen]


def names_of(model: Any, keys: Collection[str]) -> list[str]:
    """Returns the `named_parameters` of keys of a state_dict, even if the model was wrapped since or a hook renames."""
    own = dict(model.named_parameters(remove_duplicate=False))
    state = model.state_dict(keep_vars=True)
    plain = looking_through(own, state, keys)
    wanted = set(map(plain, keys))
    values = {id(value) for key, value in state.items() if plain(key) in wanted}
    return [name for name, value in own.items() if id(value) in values or plain(name) in wanted]


def moving_of_model(model: Any) -> list[str]:
    """Returns what `moving_batch_norms` does, of a live nn.Module whose frozen parameters require no gradient."""
    live = dict(model.named_parameters(remove_duplicate=False))
    norms = {
        path: getattr(module, "weight", None) is not None
        for path, module in model.named_modules()
        if getattr(module, "running_mean", None) is not None
    }
    weights = {f"{path}.weight" if path else "weight" for path, has_weight in norms.items() if has_weight}
    return _moving(norms, weights, list(live), {name for name, value in live.items() if not value.requires_grad})


def model_groups(
    model: Any, loaded: Collection[str], *, lr: float, new_lr_mult: float = 10.0, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Returns `groups` as an optimizer of torch takes them: ``torch.optim.AdamW(model_groups(model, ...))``.

    Each parameter that requires a gradient is in one group once. Raises: UsageError if there is none.
    """
    live = dict(model.named_parameters(remove_duplicate=False))
    named = live_parameters(model)
    frozen = [names[0] for names in named if not live[names[0]].requires_grad]
    made = groups(named, loaded, frozen, live, new_lr_mult=new_lr_mult, weight_decay=weight_decay)
    check(made, frozen, named)
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
