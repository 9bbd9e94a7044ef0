"""Which kind of layer a tensor belongs to, by its name, its siblings and their shapes; and torch's default init of it.

The init rules are those of ``reset_parameters`` (torch 2.13, ``torch/nn/modules``). The kind of layer must be inferred,
and is used only if there is one possibility:

    weight 2-D, bias of its first size      Linear            weight 2-D, no bias, named an embedding   Embedding
    weight 3-D to 5-D, bias 1-D or none     Conv, transposed  weight 2-D, no bias, any other name       Linear
    weight and bias of one shape            norm              weight 1-D, no bias, named a norm         RMSNorm
    running_mean or running_var beside it   BatchNorm         weight_ih_l0, weight_hh ...               LSTM, GRU, RNN
    in_proj_weight, q_proj_weight ...       MultiheadAttention, and its out_proj.bias
    gamma and beta of one shape             norm

Embedding's ``padding_idx``, whose row torch sets to zero, is not in a file and is therefore ignored.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod, sqrt

from ckptool.core.keys import COUNTER, unwrapped
from ckptool.core.tensor import TensorInfo

Shape = tuple[int, ...]
Tensors = Mapping[str, TensorInfo]


@dataclass(frozen=True, slots=True)
class Role:
    """The role of a tensor in its layer, as presets name it (``conv weight``); ``rule`` is torch's default init."""

    name: str
    rule: str


NAMES = {
    "linear weight", "linear bias", "conv weight", "conv bias", "bilinear weight", "bilinear bias",
    "batchnorm weight", "batchnorm bias", "running mean", "running var", "counter", "norm weight", "norm bias",
    "embedding weight", "rnn weight", "rnn bias", "attention weight", "attention bias", "prelu weight",
    "transposed weight", "transposed bias",
}  # fmt: skip
"""Every `Role.name`. ``transposed`` is transformers' ``Conv1D``: a Linear whose weight is (in, out)."""

_KINDS = {
    "linear": "Linear LazyLinear NonDynamicallyQuantizableLinear",
    "conv": "Conv1d Conv2d Conv3d ConvTranspose1d ConvTranspose2d ConvTranspose3d LazyConv1d LazyConv2d LazyConv3d",
    "bilinear": "Bilinear",
    "norm": "LayerNorm GroupNorm RMSNorm",
    "batchnorm": "BatchNorm1d BatchNorm2d BatchNorm3d SyncBatchNorm InstanceNorm1d InstanceNorm2d InstanceNorm3d",
    "embedding": "Embedding EmbeddingBag",
    "prelu": "PReLU",
    "transposed": "Conv1D",
}
_CLASSES = {name: kind for kind, names in _KINDS.items() for name in names.split()}
_FIXED = {
    "norm": ("ones", "zeros"),
    "batchnorm": ("ones", "zeros"),
    "transposed": ("normal(0,0.02)", "zeros"),
    "embedding": ("normal(0,1)", ""),
    "prelu": ("constant(0.25)", ""),
}
"""{kind: init of (weight, bias)} where it does not depend on the shape; "" where there is no such parameter."""

_KEYS_ONLY = {"RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell", "MultiheadAttention"}
"""Classes whose roles follow from the keys alone."""

_RNN = re.compile(r"(weight|bias)_(ih|hh|hr)((?:_l\d+(?:_reverse)?)?)")
_ATTENTION = {"in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"}
_EMBEDDING = {"embed", "embeds", "embedding", "embeddings", "emb", "embs", "wte", "wpe"}
_POSITIONS = {"tok", "token", "tokens", "pos", "position", "positions"}
_NO_EMBEDDING = {"out", "proj", "projection", "linear", "fc", "head", "mlp", "dense"}
_NORM = re.compile(r"(?i)norm|^(ln|rms|bn|gn|q_?ln|k_?ln)(?![a-z])|_(ln|rms)(?![a-z])")


def fans(shape: Shape) -> tuple[int, int] | None:
    """Returns (fan_in, fan_out) as `torch.nn.init._calculate_fan_in_and_fan_out` does; None below two dimensions.

    >>> fans((64, 3, 7, 7))
    (147, 3136)
    """
    if len(shape) < 2:
        return None
    field = prod(shape[2:])
    return shape[1] * field, shape[0] * field


def read(key: str, tensors: Tensors, classes: Mapping[str, str] | None = None) -> Role | None:
    """Returns the role of the tensor at ``key`` in its layer; None if it is ambiguous or unknown.

    ``classes`` is {module path: class name}, if known. A class of torch.nn decides; any other class is ignored.
    """
    module, dot, name = key.rpartition(".")

    def beside(name: str) -> Shape | None:
        tensor = tensors.get(f"{module}{dot}{name}")
        return None if tensor is None else tensor.shape

    shape = tensors[key].shape
    if shape is None:
        return None
    if name == COUNTER:
        return Role("counter", "zeros")
    if name in ("running_mean", "running_var"):
        return Role(name.replace("_", " "), "zeros" if name == "running_mean" else "ones")
    recurrent = _RNN.fullmatch(name)
    if recurrent:
        part, _, layer = recurrent.groups()
        # An LSTM with a projection has its hidden size in weight_hr, all others in weight_hh.
        hidden = beside(f"weight_hr{layer}") or beside(f"weight_hh{layer}")
        return Role(f"rnn {part}", _uniform(hidden[1])) if hidden and len(hidden) == 2 else None
    if name in _ATTENTION and len(shape) == 2:
        return Role("attention weight", "xavier_uniform")
    attention = any(f"{module}{dot}{one}" in tensors for one in ("in_proj_weight", "q_proj_weight"))
    if name == "in_proj_bias" and attention:
        return Role("attention bias", "zeros")
    if name in ("bias_k", "bias_v") and attention and len(shape) > 1:
        return Role("attention weight", "xavier_normal")
    pair = {"gamma": "beta", "beta": "gamma"}.get(name)  # TensorFlow's names, in BERT files of 2018
    if pair and beside(pair) == shape:
        return Role("norm weight", "ones") if name == "gamma" else Role("norm bias", "zeros")
    if name not in ("weight", "bias"):
        return None
    parent = module.removesuffix("out_proj")
    if name == "bias" and parent != module and f"{parent}in_proj_bias" in tensors:
        return Role("attention bias", "zeros")
    known = (classes or {}).get(module)
    if known in _KEYS_ONLY:
        return None
    weight = beside("weight")
    kind = _CLASSES.get(known or "")
    if not kind and any(f"{module}{dot}running_{one}" in tensors for one in ("mean", "var")):
        kind = "batchnorm"
    kind = kind or _kind(_last_name(module), weight, beside("bias"))
    return _role(kind, name, weight) if kind else None


def _kind(name: str, weight: Shape | None, bias: Shape | None) -> str | None:
    """Returns the kind of layer that a weight and a bias of these shapes belong to; ``name`` is the module's."""
    if not weight:
        return None
    if bias is not None and bias == weight:
        return "norm"
    if len(weight) == 1:
        return "norm" if bias is None and _NORM.search(name) else None  # else a PReLU, a scale, a gate ...
    if len(weight) == 2:
        if bias is None:
            return "embedding" if _names_embedding(name) else "linear"
        return "linear" if bias == weight[:1] else None  # else a custom layer with a transposed weight (in, out)
    if len(weight) > 5 or (bias is not None and len(bias) != 1):
        return None
    if "bilinear" in name.lower() and len(weight) == 3:
        return "bilinear"
    transposed = bias is not None and weight[1] and bias[0] % weight[1] == 0
    fits = bias is None or bias == weight[:1] or transposed
    return "conv" if fits else None


def _role(kind: str, part: str, weight: Shape | None) -> Role | None:
    name = f"{kind} {part}"
    if kind in _FIXED:
        rule = _FIXED[kind][part == "bias"]
        return Role(name, rule) if rule else None
    found = fans(weight) if weight else None
    if weight is None or found is None:
        return None
    if kind == "bilinear":
        return Role(name, _uniform(weight[1]))
    return Role(name, "kaiming_uniform(a=sqrt(5))" if part == "weight" else _uniform(found[0]))


def _uniform(size: int) -> str:
    """Returns the rule ``uniform`` between plus and minus 1 / sqrt(size)."""
    bound = 1 / sqrt(size) if size > 0 else 0.0
    return f"uniform({-bound!r},{bound!r})"


def _last_name(module: str) -> str:
    """Returns the last segment of a module's path that is not a number, such as an index in a ModuleList."""
    segments = [one for one in unwrapped(f"{module}.x").split(".")[:-1] if not one.isdigit()]
    return segments[-1] if segments else ""


def _names_embedding(name: str) -> bool:
    """Returns whether a module is named like an embedding: ``embed_tokens``, ``wte``, ``tok_embeddings``, ``tokens``.

    Not ``embed_out`` and ``token_proj``, which are layers after or before an embedding.
    """
    parts = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower().split("_")
    return bool(_EMBEDDING & {*parts} or parts[-1] in _POSITIONS) and not _NO_EMBEDDING & {*parts}
