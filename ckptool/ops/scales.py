"""Weights of few bits whose scales are tensors of their own: which scale is whose, and how it applies.

A weight of a float8, an int8 or a packed integer dtype means nothing without its scale. Names pair them:

    q.weight_scale_inv  q.weight_scale  q.scale_weight  q.scale  q.SCB  q.weight.absmax  q.scales (of q.qweight)
    experts.w1_scale (of experts.w1)  experts.w1_scales (of experts.w1_blocks)

Shapes settle how they apply: one scale for all, one per row, one per block. What they do not settle is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import prod
from typing import NamedTuple

from ckptool.core.dtypes import DTYPES
from ckptool.core.tensor import Derived, Opaque, TensorInfo, computed_as
from ckptool.core.tree import brief
from ckptool.errors import LossError, listed

Shape = tuple[int, ...]

BLOCK = 128
"""Rows and columns of a block in which DeepSeek and its followers scale; only theirs may end in a smaller one."""

_SCALE = re.compile(
    r"(?:(?P<base>.*?)_)?(?:global_|block_|channel_|group_)?(?:scales?|scaling(?:_factor)?|absmax|scb)(?:_inv|_\d)*",
    re.IGNORECASE,
)
_MARK = re.compile(r"scale|scaling|absmax|scb|zero|(^|_)zp($|_)|g_idx|quant_|weight_format", re.IGNORECASE)
_OF_ACTIVATIONS = re.compile(r"input|output|act_|activation")
_QUANTISED = re.compile(r"input|output|act_|activation|zero|zp|g_idx|quant|smooth|weight_|absmax|scb", re.IGNORECASE)
_UNRELATED = re.compile(r"logit|layer_scale|(^|_)[qkv]_scale|temperature|skip|residual")
_PACKED = ("_packed", "_blocks", "_qdata", "_data", "_quantized")


class Scaled(NamedTuple):
    """``scales``: the keys of a weight's scales. ``beside``: of activations' scales, zero points and the like.

    ``is_named``: the names say that they are the weight's; else they only lie beside it.
    """

    scales: list[str]
    beside: list[str]
    is_named: bool = True


def scaled_weights(tensors: Mapping[str, TensorInfo]) -> dict[str, Scaled]:
    """Returns {key of a weight of few bits: its scales}."""
    low = {key: None for key, tensor in tensors.items() if _has_few_bits(key, tensor)}
    if not low:
        return {}
    found: dict[str, Scaled] = {}
    others: dict[str, list[str]] = {}
    for key in tensors:
        module, leaf = _split(key)
        if not _MARK.search(leaf):
            continue
        of = next((name for name in _weights_of(module, leaf) if name in low and name != key), None)
        if of is not None:
            found.setdefault(of, Scaled([], [])).scales.append(key)
        else:
            others.setdefault(module, []).append(key)
    for key in low:
        module, leaf = _split(key)
        beside = [other for inside in (module, f"{key}.") for other in others.get(inside, ()) if other != key]
        quantised = [other for other in beside if _QUANTISED.search(_split(other)[1])]
        if key in found:
            found[key].beside.extend(quantised)
        elif DTYPES[tensors[key].dtype].kind == "float" and not _MARK.search(leaf):
            scales = [other for other in beside if _may_scale(_split(other)[1])]
            if scales:
                found[key] = Scaled(scales, [other for other in quantised if other not in scales], False)
    views = {tensors[key].view: pair for key, pair in found.items()}
    tied = {key: views[tensors[key].view] for key in low if key not in found and tensors[key].view in views}
    return found | tied


def refuse_parted(tensors: Mapping[str, TensorInfo], casts: set[tuple[str, str]], url: str) -> None:
    """Raises LossError for weights of few bits that ``casts``, (key, new dtype), would part from their scales."""
    cast = {key for key, dtype in casts if key in tensors and tensors[key].dtype != dtype}
    pairs = scaled_weights(tensors) if cast else {}
    parted = [f"{key} ({', '.join(pair.scales)})" for key, pair in pairs.items() if key in cast]
    if parted:
        what = f"a cast would part weights from their scales: {listed(parted)}"
        raise LossError(f"{what}; `ckptool convert --dequantize` multiplies by them", url)


def _split(key: str) -> tuple[str, str]:
    """Returns (the module with its dot or slash, the last name)."""
    end = max(key.rfind("."), key.rfind("/")) + 1
    return key[:end], key[end:]


def _has_few_bits(key: str, tensor: TensorInfo) -> bool:
    row = DTYPES[tensor.dtype]
    packed = row.kind == "int" and key.endswith(("qweight", "_packed"))
    return (row.kind in ("float", "int") and row.bits <= 8) or packed


def _weights_of(module: str, leaf: str) -> Iterator[str]:
    """Yields the keys of weights that a tensor of this name may scale; the nearest name first."""
    match = _SCALE.fullmatch(leaf)
    base = match["base"] if match else leaf.removeprefix("scale_") if leaf.startswith("scale_") else None
    if base:
        yield from (f"{module}{base}{ending}" for ending in ("", *_PACKED))
    elif match:
        yield from (f"{module}{name}" for name in ("weight", "qweight", "W_q", *_PACKED))
        yield module[:-1]


def _may_scale(leaf: str) -> bool:
    return re.search("scal|absmax", leaf) is not None and not (_OF_ACTIVATIONS.search(leaf) or _UNRELATED.search(leaf))


def dequantized(
    tensors: Mapping[str, TensorInfo], scaled: Mapping[str, Scaled], dtype: str
) -> tuple[dict[str, TensorInfo], list[str]]:
    """Returns ({weight: its values times its scales, lazy}, what is not settled: a line for each weight)."""
    settled = {key: _sizes(tensors, key, pair) for key, pair in scaled.items()}
    by_rows = {_split(scaled[key].scales[0])[1] for key, sizes in settled.items() if _is_by_rows(sizes)}
    made: dict[object, Derived] = {}
    found, refused = {}, []
    for key, sizes in settled.items():
        weight, scale = tensors[key], tensors[scaled[key].scales[0]]
        if sizes == AMBIGUOUS and _split(scaled[key].scales[0])[1] in by_rows:
            sizes = (1, *(weight.shape or ())[1:])
        if isinstance(sizes, str):
            refused.append(f"{key} ({', '.join(scaled[key].scales)}: {sizes})")
            continue
        lazy = Derived("dequantize", (weight, scale), shape=weight.shape, args=sizes)
        source = made.setdefault((weight.view, scale.view), lazy)
        found[key] = replace(computed_as(weight, source, dtype), extras=None)
    return found, refused


def _sizes(tensors: Mapping[str, TensorInfo], key: str, pair: Scaled) -> Shape | str:
    """Returns how many elements share a scale along each dimension of a weight, or why that is not known."""
    weight, scale = tensors[key], tensors[pair.scales[0]]
    points = [other for other in pair.beside if not _OF_ACTIVATIONS.search(_split(other)[1])]
    if not pair.is_named:
        return "not known as scales of this weight"
    if points:
        return f"with {', '.join(points)}"
    if len(pair.scales) > 1:
        return "more than one"
    if key.endswith((*_PACKED, "qweight", "W_q")) or not _is_plain(weight):
        return f"a {weight.kind} {weight.dtype} weight in a form of its own"
    if re.search("absmax|SCB", pair.scales[0]) or not _is_plain(scale) or DTYPES[scale.dtype].kind != "float":
        return f"{scale.dtype}, not a plain factor"
    return block_sizes(weight.shape or (), scale.shape or ())


def _is_plain(tensor: TensorInfo) -> bool:
    """Returns whether each element is a number: a float of any size, or an int8."""
    row = DTYPES[tensor.dtype]
    floats = row.kind == "float" and row.in_torch and not tensor.dtype.endswith("_x2")
    return not isinstance(tensor.source, Opaque) and (floats or tensor.dtype == "int8")


AMBIGUOUS = "one for each row, or for each column?"


def _is_by_rows(sizes: Shape | str) -> bool:
    return isinstance(sizes, tuple) and len(sizes) == 2 and sizes[0] == 1 < sizes[1]


def block_sizes(shape: Shape, scales: Shape) -> Shape | str:
    """Returns how many elements share a scale along each dimension, or why that is not known.

    Fewer dimensions are those in front. Along one, there is a scale for each element, one for all, or one for each
    block: of `BLOCK` elements, the last one smaller; or of a power of two that divides it. Blocks are square, or
    they are runs along one dimension.

    >>> block_sizes((256, 512), (256,)), block_sizes((200, 300), (2, 3)), block_sizes((64, 128), (64, 4))
    ((1, 512), (128, 128), (1, 32))
    """
    if prod(scales) == 1:
        return tuple(max(count, 1) for count in shape)
    unfit = f"shape {brief(scales)} fits no layout of {brief(shape)}"
    depth = len(scales)
    if depth < len(shape) and shape[:depth] == scales == shape[-depth:]:
        return AMBIGUOUS
    if depth > len(shape) or (depth < len(shape) and shape[:depth] != scales):
        return unfit
    scales = (*scales, *(1,) * (len(shape) - depth))
    sizes = [1 if count == many else max(count, 1) for count, many in zip(shape, scales, strict=True)]
    blocked = [dim for dim, many in enumerate(scales) if many not in (1, shape[dim])]
    if not blocked:
        return tuple(sizes)
    size = _block_size([(shape[dim], scales[dim]) for dim in blocked])
    others = [dim for dim in range(max(len(shape) - 2, 0), len(shape)) if dim not in blocked and scales[dim] == 1]
    if size is None or blocked[0] < len(shape) - 2 or any(shape[dim] > size for dim in others):
        return unfit
    return tuple(size if dim in blocked else one for dim, one in enumerate(sizes))


def _block_size(pairs: list[tuple[int, int]]) -> int | None:
    """Returns the size of the blocks along dimensions of (elements, scales) each."""
    if all(-(-count // BLOCK) == many for count, many in pairs):
        return BLOCK
    count, many = pairs[0]
    size = count // many if many else 0
    even = size > 1 and not size & (size - 1) and all(count == size * many for count, many in pairs)
    return size if even else None
