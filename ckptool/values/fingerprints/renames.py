"""Which tensors of two checkpoints are the same under another name, for `diff`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from ckptool.core.keys import moves
from ckptool.core.tensor import TensorInfo
from ckptool.io.files import Files
from ckptool.values.fingerprints.prints import Print, take


def renamed_by_values(a: Mapping[str, TensorInfo], b: Mapping[str, TensorInfo], files: Files) -> list[tuple[str, str]]:
    """Returns (key of A, key of B) of tensors of one dtype and shape with the same elements, in A's order.

    Reads, once, what has the dtype and shape of a tensor of the other side. Where several are equal, or all elements
    are, two are the same only if their names differ as those of others do that are certain: ``layer1.0.bn.bias`` is
    ``stage1.0.bn.bias`` where ``layer1.0.conv.weight`` is ``stage1.0.conv.weight``.
    Raises: FormatError, UnreadableError.
    """
    forms = {(one.dtype, one.shape) for one in a.values()} & {(one.dtype, one.shape) for one in b.values()}
    sides = [
        [(key, one) for key, one in side.items() if one.kind == "dense" and (one.dtype, one.shape) in forms]
        for side in (a, b)
    ]
    dtypes = {dtype for dtype, _ in forms}
    groups: dict[object, tuple[list[str], list[str]]] = defaultdict(lambda: ([], []))
    telling: dict[object, bool] = {}
    for number, side in enumerate(sides):
        for (key, _), one in zip(side, take([tensor for _, tensor in side], dtypes, files, lines=False), strict=True):
            if not one.error:
                sign = _sign(one)
                groups[sign][number].append(key)
                telling[sign] = one.telling
    found = {olds[0]: news[0] for sign, (olds, news) in groups.items() if len(olds) == len(news) == 1 and telling[sign]}
    changes: dict[str, set[str]] = defaultdict(set)
    for old, new in found.items():
        for prefix, other in moves(old, new):
            changes[prefix].add(other)
    taken = {*found.values()}
    for olds, news in groups.values():
        there = {*news} - taken
        for key in olds if there else ():
            fitting = [name for name in _candidates(key, changes) if name in there]
            if key not in found and len(fitting) == 1:
                found[key] = fitting[0]
                there.discard(fitting[0])
    return [(key, found[key]) for key in a if key in found]


def _sign(one: Print) -> object:
    level = one.levels[one.dtype]
    return one.dtype, one.shape, level.order, level.total


def _candidates(key: str, changes: Mapping[str, set[str]]) -> list[str]:
    """Returns the names that a key would have after the changes of its longest prefix that has any."""
    parts = key.split(".")
    for count in range(len(parts) - 1, -1, -1):
        if others := changes.get(".".join(parts[:count])):
            rest = parts[count:]
            return [".".join([*([other] if other else []), *rest]) for other in others]
    return []
