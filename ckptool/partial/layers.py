"""What layer a key belongs to, read from its name, its siblings and their shapes; and how torch would initialise it.

The rules are those of torch's own ``reset_parameters`` (torch 2.13, ``torch/nn/modules``). What they are is known;
which layer a tensor is of must be read, and is read only where one reading is left:

    weight 2-D, bias of its first size      Linear            weight 2-D, no bias, named an embedding   Embedding
    weight 3-D to 5-D, bias 1-D or none     Conv, transposed  weight 2-D, no bias, any other name       Linear
    weight and bias of one shape            norm              weight 1-D, no bias, named a norm         RMSNorm
    running_mean or running_var beside it   BatchNorm         weight_ih_l0, weight_hh ...               LSTM, GRU, RNN
    in_proj_weight, q_proj_weight ...       MultiheadAttention, and its out_proj.bias
    gamma and beta of one shape             norm

Not in a file, and therefore not honoured: Embedding's ``padding_idx``, whose row torch sets to zero.
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
    """What a tensor is to its layer: ``name`` as presets call it (``conv weight``), ``rule`` torch's own init of it."""

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
_UNREAD = {"RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell", "MultiheadAttention"}
"""Classes whose keys say enough."""

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
    """Returns what the tensor at ``key`` is to its layer; None where more than one reading is left, or none.

    ``classes`` are {module path: class name}, where they are known. A class of torch.nn decides; any other is read
    like a file without classes.
    """
    module, _, name = key.rpartition(".")
    below = f"{module}." if module else ""
    shape = tensors[key].shape
    if shape is None:
        return None
    if name == COUNTER:
        return Role("counter", "zeros")
    if name in ("running_mean", "running_var"):
        return Role(name.replace("_", " "), "zeros" if name == "running_mean" else "ones")
    recurrent = _RNN.fullmatch(name)
    if recurrent:
        return _recurrent(recurrent, below, tensors)
    if name in _ATTENTION and len(shape) == 2:
        return Role("attention weight", "xavier_uniform")
    attention = any(f"{below}{one}" in tensors for one in ("in_proj_weight", "q_proj_weight"))
    if name == "in_proj_bias" and attention:
        return Role("attention bias", "zeros")
    if name in ("bias_k", "bias_v") and attention and len(shape) > 1:
        return Role("attention weight", "xavier_normal")
    pair = {"gamma": "beta", "beta": "gamma"}.get(name)  # TensorFlow's names, in BERT files of 2018
    if pair and _shape(tensors, f"{below}{pair}") == shape:
        return Role("norm weight", "ones") if name == "gamma" else Role("norm bias", "zeros")
    if name not in ("weight", "bias"):
        return None
    parent = module.removesuffix("out_proj")
    if name == "bias" and parent != module and f"{parent}in_proj_bias" in tensors:
        return Role("attention bias", "zeros")
    known = (classes or {}).get(module)
    if known in _UNREAD:
        return None
    weight = _shape(tensors, f"{below}weight")
    kind = _CLASSES.get(known or "") or _kind(module, weight, _shape(tensors, f"{below}bias"), below, tensors)
    return _role(kind, name, weight) if kind else None


def _shape(tensors: Tensors, key: str) -> Shape | None:
    tensor = tensors.get(key)
    return tensor.shape if tensor is not None else None


def _recurrent(match: re.Match[str], below: str, tensors: Tensors) -> Role | None:
    """An LSTM with a projection has its hidden size in ``weight_hr``, where the others have it in ``weight_hh``."""
    part, _, layer = match.groups()
    found = _shape(tensors, f"{below}weight_hr{layer}") or _shape(tensors, f"{below}weight_hh{layer}")
    if found is None or len(found) != 2:
        return None
    return Role(f"rnn {part}", _uniform(found[1]))


def _kind(module: str, weight: Shape | None, bias: Shape | None, below: str, tensors: Tensors) -> str | None:
    if f"{below}running_mean" in tensors or f"{below}running_var" in tensors:
        return "batchnorm"
    if weight is None or not weight:
        return None
    name = _last_name(module)
    if bias is not None and bias == weight:
        return "norm"
    if len(weight) == 1:
        return "norm" if bias is None and _NORM.search(name) else None  # or a PReLU, a scale, a gate ...
    if len(weight) == 2:
        if bias is None:
            return "embedding" if _names_embedding(name) else "linear"
        return "linear" if bias == weight[:1] else None  # (in, out): somebody's own transposed layer
    if len(weight) > 5 or (bias is not None and len(bias) != 1):
        return None
    if "bilinear" in name.lower() and len(weight) == 3:
        return "bilinear"
    fits = bias is None or bias == weight[:1] or (weight[1] and bias[0] % weight[1] == 0)  # the latter: transposed
    return "conv" if fits else None


def _role(kind: str, part: str, weight: Shape | None) -> Role | None:
    name = f"{kind} {part}"
    if kind in ("norm", "batchnorm"):
        return Role(name, "ones" if part == "weight" else "zeros")
    if kind == "transposed":
        return Role(name, "normal(0,0.02)" if part == "weight" else "zeros")
    if kind in ("embedding", "prelu"):
        return Role(name, "normal(0,1)" if kind == "embedding" else "constant(0.25)") if part == "weight" else None
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
    """Returns the name closest to the tensor that is no number: a list of embeddings numbers them."""
    segments = [one for one in unwrapped(f"{module}.x").split(".")[:-1] if not one.isdigit()]
    return segments[-1] if segments else ""


def _names_embedding(name: str) -> bool:
    """Returns whether a module is named an embedding: ``embed_tokens``, ``wte``, ``tok_embeddings``, ``tokens``.

    Not ``embed_out`` and ``token_proj``: layers behind one, or in front.
    """
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower().split("_")
    return bool(_EMBEDDING & {*words} or words[-1] in _POSITIONS) and not _NO_EMBEDDING & {*words}
