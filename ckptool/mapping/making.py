"""Makes the tensor that a pair says, lazily."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ckptool.core.tensor import TensorInfo, cat, copied, narrow, permute, shaped, unflatten
from ckptool.errors import UsageError
from ckptool.mapping.chains import Op, chain
from ckptool.mapping.pairs import Pair


def made(pair: Pair, source: Mapping[str, TensorInfo], wanted: tuple[int, ...]) -> TensorInfo:
    """Returns what a pair makes of dense tensors, of the shape ``wanted``; reads nothing.

    Raises: UsageError for an operation that does not give that shape, and for sources of several dtypes.
    """
    how = chain(pair, {key: source[key].shape or () for key in pair.source}, wanted)
    parts = [_after(ops, source[key]) for ops, key in zip(how.parts, how.sources, strict=True)]
    if len({part.dtype for part in parts}) > 1:
        raise UsageError(f"{pair.target}: the dtypes of {', '.join(pair.source[:3])} differ")
    whole = parts[0]
    if how.join is not None:
        name, dim, *heads = how.join
        if name == "weave":
            parts = [_by_heads(part, dim, heads[0]) for part in parts]
        whole = cat([part if part.is_contiguous else copied(part) for part in parts], dim + len(heads))
        if name == "weave":
            shape = whole.shape or ()
            whole = shaped(whole, (*shape[:dim], shape[dim] * shape[dim + 1], *shape[dim + 2 :]))
    whole = _after(how.after, whole)
    return whole if whole.shape == wanted else shaped(whole, wanted)  # () and (1,) agree


def _by_heads(tensor: TensorInfo, dim: int, heads: int) -> TensorInfo:
    return unflatten(tensor, dim, (heads, (tensor.shape or ())[dim] // heads))


def _after(ops: Iterable[Op], tensor: TensorInfo) -> TensorInfo:
    """Returns a tensor after operations: a view of it as long as it can be."""
    for name, *args in ops:
        if name == "permute":
            tensor = permute(tensor, args[0])
        elif name == "reshape":
            tensor = shaped(tensor, args[0]) if tensor.is_contiguous else copied(tensor, args[0])
        elif name == "slice":
            tensor = narrow(tensor, args[0], args[1], args[2] - args[1])
        else:  # a chunk
            dim, heads, parts, part = args
            size = (tensor.shape or ())[dim] // heads // parts
            some = narrow(_by_heads(tensor, dim, heads), dim + 1, part * size, size)
            shape = some.shape or ()
            tensor = copied(some, (*shape[:dim], heads * size, *shape[dim + 2 :]))
    return tensor
