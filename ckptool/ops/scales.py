"""Weights of few bits whose scales are tensors of their own: which scale is whose, and how it applies.

A weight of a float8, an int8 or a packed integer dtype means nothing without its scale. Names pair them:

    q.weight_scale_inv  q.weight_scale  q.scale_weight  q.scale  q.SCB  q.weight.absmax  q.scales (of q.qweight)
    experts.w1_scale (of experts.w1)  experts.w1_scales (of experts.w1_blocks)

Scales under another prefix are paired with nothing: where names say that they may be a weight's, it is not cast.
Shapes settle how scales apply: one scale for all, one per row, one per block. What they do not settle is refused.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import islice
from math import prod
from typing import NamedTuple

from ckptool.core.checkpoint import BLOCKS, Checkpoint
from ckptool.core.dtypes import DTYPES
from ckptool.core.optimizers import is_optimizer
from ckptool.core.tensor import Derived, Opaque, Storage, TensorInfo, computed, computed_as
from ckptool.core.tree import brief, path_text, walk
from ckptool.errors import LossError, listed

Shape = tuple[int, ...]
Elsewhere = Iterable[tuple[str, TensorInfo]]

BLOCK = 128
"""Rows and columns of a block in which DeepSeek and its followers scale; only theirs may end in a smaller one."""

_SCALE = re.compile(
    r"(?:(?P<base>.*?)_)?(?:global_|block_|channel_|group_)?(?:scales?|scaling(?:_factor)?|absmax|scb)(?:_inv|_\d)*",
    re.IGNORECASE,
)
_MARK = re.compile(r"scale|scaling|absmax|scb|zero|(^|_)zp($|_)|g_idx|quant_|weight_(format|shape)|bitsandbytes", re.I)
_SURE = re.compile(r"weights?_.*scal|scale_weight|scale_inv|^scales$|absmax|scb", re.IGNORECASE)
_OF_ACTIVATIONS = re.compile(r"input|output|act_|activation")
_QUANTISED = re.compile(
    r"input|output|act_|activation|zero|zp|g_idx|quant|smooth|weight_|absmax|scb|bitsandbytes", re.IGNORECASE
)
_UNRELATED = re.compile(r"logit|layer_scale|(^|_)[qkv]_scale|temperature|skip|residual")
_PACKED = ("_packed", "_blocks", "_qdata", "_data", "_quantized")
_GENERIC = ("weight", "qweight", "W_q", "blocks", *_PACKED)
_SCALES = re.compile("scal|absmax|scb", re.IGNORECASE)


class Scaled(NamedTuple):
    """``scales``: the keys of a weight's scales. ``beside``: of activations' scales, zero points and the like.

    ``is_named``: the names say that they are the weight's; else they only lie beside it, or may be its.
    """

    scales: list[str]
    beside: list[str]
    is_named: bool = True

    @property
    def parts(self) -> list[str]:
        """Returns all that belongs to the weight."""
        return [*self.scales, *self.beside]

    @property
    def told(self) -> str:
        """Returns the scales for a message."""
        return listed(self.scales) + ", which may scale it" * (not self.is_named)


def scaled_weights(tensors: Mapping[str, TensorInfo]) -> dict[str, Scaled]:
    """Returns {key of a weight of few bits: its scales}."""
    low = _of_few_bits(tensors)
    if not low:
        return {}
    found: dict[str, Scaled] = {}
    others: dict[str, list[str]] = {}
    for key in tensors:
        module, leaf = _split(key)
        if not _is_marked(leaf):
            continue
        of = next((name for name in _weights_of(module, leaf) if name in low and name != key), None)
        if of is not None:
            found.setdefault(of, Scaled([], [])).scales.append(key)
        else:
            others.setdefault(module.removesuffix("quant_state."), []).append(key)
    for key in low if others else ():
        module, leaf = _split(key)
        beside = [other for inside in (module, f"{key}.") for other in others.get(inside, ()) if other != key]
        quantised = [other for other in beside if _QUANTISED.search(_split(other)[1])]
        if key in found:
            found[key].beside.extend(quantised)
        elif DTYPES[tensors[key].dtype].kind == "float" and not _is_marked(leaf):
            scales = [other for other in beside if _may_scale(_split(other)[1])]
            if scales:
                found[key] = Scaled(scales, [other for other in quantised if other not in scales], False)
    lone = [key for key in low if key not in found and not _is_marked(_split(key)[1])]
    views = {tensors[key].view: pair for key, pair in found.items()} if lone else {}
    return found | {key: views[tensors[key].view] for key in lone if tensors[key].view in views}


def refuse_parted(
    tensors: Mapping[str, TensorInfo], elsewhere: Elsewhere, casts: set[tuple[str, str]], url: str
) -> None:
    """Raises LossError for weights of few bits that ``casts``, (key, new dtype), would part from their scales.

    The scales may be ``elsewhere``: outside of the weights, or in another file.
    """
    cast = {key for key, dtype in casts if key in tensors and tensors[key].dtype != dtype}
    pairs = with_doubtful(scaled_weights(tensors), tensors, elsewhere) if cast else {}
    parted = [f"{key} ({pair.told})" for key, pair in pairs.items() if key in cast]
    if parted:
        what = f"a cast would part weights from their scales: {listed(parted)}"
        named = all(pair.is_named for key, pair in pairs.items() if key in cast)
        raise LossError(what + "; `ckptool convert --dequantize` multiplies by them" * named, url)


def parted_notes(sources: Sequence[Mapping[str, TensorInfo]], kept: Sequence[Collection[str]]) -> list[str]:
    """Returns notes on what a selection takes apart: weights of few bits, and what scales them.

    ``kept``: the keys that are taken, of each source.
    """
    bare: dict[str, None] = {}
    stray: dict[str, None] = {}
    sides = [(scaled_weights(tensors), taken) for tensors, taken in zip(sources, kept, strict=True)]
    if len(sources) > 1:  # a weight in one, its scales in another
        known = {key for pairs, _ in sides for key, pair in pairs.items() for key in (key, *pair.scales)}
        rest = {key: one for tensors in sources for key, one in tensors.items() if key not in known}
        sides.append((scaled_weights(rest), set().union(*kept)))
    for pairs, taken in sides:
        parts = {key: pair.parts for key, pair in pairs.items()}
        needed = {part for key in parts if key in taken for part in parts[key]}  # by a tied weight
        for key, names in parts.items():
            lost = [name for name in names if name not in taken]
            if key in taken and lost:
                bare[f"{key} ({listed(lost, 3)})"] = None
            elif key not in taken and (left := [name for name in names if name in taken and name not in needed]):
                stray[f"{key} ({listed(left, 3)})"] = None
    return _counted("kept without all of their scales", bare) + _counted("left out, and scales of them kept", stray)


def _counted(what: str, found: Collection[str]) -> list[str]:
    return [f"weights {what} ({len(found):,}): {listed(found, 3)}"] if found else []


def mixed_notes(target: Mapping[str, TensorInfo], new: Collection[str]) -> list[str]:
    """Returns a note on weights of few bits in a target of which only the values, or only the scales, are ``new``."""
    pairs = ((key, pair.parts) for key, pair in scaled_weights(target).items())
    mixed = [f"{key} ({listed(parts, 3)})" for key, parts in pairs if len({name in new for name in (key, *parts)}) > 1]
    return _counted("whose values or scales are new, and not both", mixed)


def renamed_notes(
    old: Mapping[str, TensorInfo], new: Mapping[str, TensorInfo], renamed: Iterable[tuple[str, str]]
) -> list[str]:
    """Returns a note on weights of few bits whose names no longer tell their scales; ``renamed``: (old key, new)."""
    pairs, became = scaled_weights(old), dict[str, list[str]]()
    for key, name in renamed if pairs else ():
        became.setdefault(key, []).append(name)
    now, apart = scaled_weights(new) if pairs else {}, dict[str, None]()
    for key, pair in pairs.items():
        for name in became.get(key, ()):
            its = now.get(name)
            scales = its.scales if its and its.is_named >= pair.is_named else []
            lost = [kept[0] for scale in pair.scales if (kept := became.get(scale)) and not {*kept} & {*scales}]
            apart |= {f"{name} ({listed(lost, 3)})": None} if lost else {}
    return _counted("whose names no longer tell their scales", apart)


def outside(checkpoint: Checkpoint) -> Iterator[tuple[str, TensorInfo]]:
    """Yields (path as text, tensor) of what is not among a checkpoint's weights, optimizer states aside."""
    for path, _, value in checkpoint.beside():
        for steps, node in walk(value, closed=is_optimizer):
            if isinstance(node, TensorInfo):
                yield path_text((*path, *steps)), node


def _split(key: str) -> tuple[str, str]:
    """Returns (the module with its dot or slash, the last name)."""
    end = max(key.rfind("."), key.rfind("/")) + 1
    return key[:end], key[end:]


def _of_few_bits(tensors: Mapping[str, TensorInfo]) -> dict[str, None]:
    """Returns the keys of tensors of at most 8 bits, and of integers that are packed weights by their names."""
    rows = [DTYPES[dtype] for dtype in {tensor.dtype for tensor in tensors.values()}]
    small = {row.name for row in rows if row.kind in ("float", "int") and row.bits <= 8}
    ints = {row.name for row in rows if row.kind == "int"} - small
    packed = ("qweight", "_packed")
    return {
        key: None for key, tensor in tensors.items()
        if tensor.dtype in small or (tensor.dtype in ints and key.endswith(packed))
    }  # fmt: skip


def _weights_of(module: str, leaf: str) -> list[str]:
    """Returns the keys of weights that a tensor of this name may scale; the nearest name first."""
    return [module + name if name else module[:-1] for name in _scaled_by(leaf)]


@lru_cache(256)  # a file has few last names
def _scaled_by(leaf: str) -> tuple[str, ...]:
    """Returns the last names of weights that a tensor of this one may scale, "" for its module."""
    tensor, colon, part = leaf.rpartition(":")
    match = _SCALE.fullmatch(part)
    if colon and match:
        return (f"{tensor}:qdata",)  # torchao
    base = match["base"] if match else leaf.removeprefix("scale_") if leaf.startswith("scale_") else None
    if base:
        return tuple(f"{base}{ending}" for ending in ("", *_PACKED))
    return (*_GENERIC, "") if match else ()


@lru_cache(256)
def _is_marked(leaf: str) -> bool:
    return _MARK.search(leaf) is not None


def with_doubtful(
    pairs: dict[str, Scaled], tensors: Mapping[str, TensorInfo], elsewhere: Elsewhere = ()
) -> dict[str, Scaled]:
    """Returns the pairs, and for each other weight of few bits the scales that may be its: it is not to be cast then.

    Those are unused scales under another prefix whose names end alike, or that can be nothing else. ``elsewhere``:
    (key, tensor) of what is not among the weights.
    """
    views = {tensors[key].view for key in pairs}
    low = (key for key in _of_few_bits(tensors) if key not in pairs and tensors[key].view not in views)
    lone = {key: tensors[key] for key in low if not _is_marked(_split(key)[1])}
    if not lone:
        return pairs
    every = {**dict(elsewhere), **tensors}
    used = {scale for pair in pairs.values() for scale in pair.parts}
    leaves = {_reversed(key)[0] for key in lone}
    sure: dict[str, None] = {}
    named: list[tuple[list[str], str]] = []
    for key in every:
        names = _named_elsewhere(key) if key not in used else ()
        if names and not any(name in every and name not in lone for name in names):
            sure |= {key: None} if _SURE.search(_split(key)[1]) else {}
            named += [(steps, key) for steps in map(_reversed, names) if steps[0] in leaves]
    named.sort()
    found = {}
    for key, weight in lone.items():
        scales = [scale for scale in _nearest(key, named) if _can_scale(every[scale], weight)]
        if scales:
            found[key] = Scaled(scales, [], False)
    for scale in {scale for pair in found.values() for scale in pair.scales}:
        sure.pop(scale, None)
    for key, weight in lone.items() if sure else ():
        if key not in found and DTYPES[weight.dtype].kind == "float":
            found[key] = Scaled([*islice(sure, 9)], [], False)
    return pairs | found


def _reversed(key: str) -> list[str]:
    return re.split("[./]", key)[::-1]


def _nearest(key: str, named: Sequence[tuple[list[str], str]]) -> list[str]:
    """Returns the scales (16 at most) whose weights' names have most of the last segments of ``key``.

    ``named``: (segments of the name, the last one first; scale), sorted. They must have a module in common that is no
    number, or a last name that not every module has.
    """
    steps = _reversed(key)
    place = bisect_left(named, (steps, ""))
    around = [(_common(steps, other), scale) for other, scale in named[max(place - 8, 0) : place + 8]]
    most = max((count for count, _ in around), default=0)
    tells = any(not step.isdigit() for step in steps[1:most]) or (most and steps[0] not in _GENERIC)
    return [*dict.fromkeys(scale for count, scale in around if count == most)] if tells else []


def _common(one: Sequence[str], other: Sequence[str]) -> int:
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))


def _named_elsewhere(key: str) -> set[str]:
    """Returns the weights that a tensor may scale by its name, or by that of a module: ``l.weight`` of `scales.l`."""
    module, leaf = _split(key)
    if not _SCALES.search(key) or _OF_ACTIVATIONS.search(leaf) or _UNRELATED.search(leaf):
        return set()
    names = set(_weights_of(module, leaf)) if _may_scale(leaf) else set()
    for found in re.finditer(r"([^./]+)[./]", module if not names else ""):
        match = _SCALE.fullmatch(found[1])
        if match and match["base"] in (None, "weight"):
            rest = key[: found.start()] + key[found.end() :]
            names |= {rest, f"{rest}.weight", *_weights_of(key[: found.start()], found[1])}
    return names


def _can_scale(scale: TensorInfo, weight: TensorInfo) -> bool:
    """Returns whether one tensor may be the scales of another, which has dimensions: of another dtype, and smaller."""
    other = scale.dtype != weight.dtype or DTYPES[scale.dtype].kind == "int"
    return other and scale.numel <= weight.numel and len(weight.shape or ()) > 1


def _may_scale(leaf: str) -> bool:
    return _SCALES.search(leaf) is not None and not (_OF_ACTIVATIONS.search(leaf) or _UNRELATED.search(leaf))


def dequantized(
    tensors: Mapping[str, TensorInfo], scaled: Mapping[str, Scaled], dtype: str
) -> tuple[dict[str, TensorInfo], list[str]]:
    """Returns ({weight: its values times its scales, lazy}, what is not settled: a line for each weight)."""
    settled = {key: _sizes(tensors, key, pair) for key, pair in scaled.items()}
    by_rows = {_split(scaled[key].scales[0])[1] for key, sizes in settled.items() if _is_by_rows(sizes)}
    made: dict[object, Derived] = {}
    found, refused = {}, []
    for key, sizes in settled.items():
        if sizes == AMBIGUOUS and _split(scaled[key].scales[0])[1] in by_rows:
            sizes = (1, *(tensors[key].shape or ())[1:])
        if isinstance(sizes, str):
            refused.append(f"{key} ({listed(scaled[key].scales)}: {sizes})")
            continue
        weight, scale = tensors[key], tensors[scaled[key].scales[0]]
        lazy = Derived("dequantize", (weight, scale), shape=weight.shape, args=sizes)
        source = made.setdefault((weight.view, scale.view), lazy)
        found[key] = replace(computed_as(weight, source, dtype), extras=None)
    return found, refused


def of_blocks(tensor: TensorInfo, dtype: str) -> TensorInfo | None:
    """Returns the values of a tensor of GGUF's type Q8_0 or Q4_0, lazy; None for any other, and for a big-endian one.

    A block is a scale (float16) and the 32 integers that it multiplies: of eight bits, or of four, in 16 bytes.
    """
    memory = tensor.parts[0].source if tensor.kind in BLOCKS else None
    if not isinstance(memory, Storage) or memory.byteorder == "big":
        return None
    width = 32 if tensor.kind == "Q8_0" else 16
    raw, count, block = tensor.parts[0], tensor.nbytes // (2 + width), 2 + width
    scale = replace(raw, dtype="float16", shape=(count, 1), stride=(block // 2, 1))
    weight = replace(raw, dtype="int8", shape=(count, width), stride=(block, 1), storage_offset=2)
    if tensor.kind == "Q4_0":
        weight = computed("int8", (count, 32), Derived("nibbles", (replace(weight, dtype="uint8"),), shape=(count, 32)))
    return computed(dtype, tensor.shape or (), Derived("dequantize", (weight, scale), shape=weight.shape, args=(1, 32)))


def _sizes(tensors: Mapping[str, TensorInfo], key: str, pair: Scaled) -> Shape | str:
    """Returns how many elements share a scale along each dimension of a weight, or why that is not known."""
    if not pair.is_named:
        return "not known as scales of this weight"
    weight, scale = tensors[key], tensors[pair.scales[0]]
    points = [other for other in pair.beside if not _OF_ACTIVATIONS.search(_split(other)[1])]
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
