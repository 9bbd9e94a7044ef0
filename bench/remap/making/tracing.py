"""The true mapping of a conversion, read off from its output.

Every number of every source tensor gets a code of its own. What a library's own conversion makes of them shows where each came
from: the sources of every target tensor, their order, the piece and the layout. Every op found is applied to the codes again and
compared, so none is a guess.
"""

from collections.abc import Iterator, Mapping
from itertools import pairwise, permutations
from math import prod

import numpy as np
import torch

Array = np.ndarray
State = Mapping[str, torch.Tensor]


def coded(state: State) -> dict[str, torch.Tensor]:
    """The state with a code for each number, from 1 on. Tied tensors have the same codes."""
    codes: dict[str, torch.Tensor] = {}
    seen: dict[object, str] = {}
    begin = 1
    for key, tensor in state.items():
        place = (tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape, tensor.stride())
        if tensor.numel() and place in seen:
            codes[key] = codes[seen[place]]
            continue
        seen[place] = key
        codes[key] = torch.arange(begin, begin + tensor.numel(), dtype=torch.float64).reshape(tensor.shape)
        begin += tensor.numel()
    return codes


def ties(state: State) -> list[list[str]]:
    """Groups of keys that hold the same tensor."""
    groups: dict[object, list[str]] = {}
    for key, tensor in state.items():
        if tensor.numel():
            place = (tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape, tensor.stride())
            groups.setdefault(place, []).append(key)
    return [group for group in groups.values() if len(group) > 1]


def read_off(codes: State, converted: State) -> tuple[dict[str, tuple[tuple[str, ...], str]], list[str], list[str]]:
    """The sources and the op of each converted tensor; those that are new; those that no op describes."""
    keys, begins, last = [], [], 0
    for key, tensor in codes.items():
        begin = int(tensor.flatten()[0]) if tensor.numel() else -1
        if begin > last:
            keys.append(key)
            begins.append(begin)
            last = begin + tensor.numel() - 1
    shapes = {key: tuple(codes[key].shape) for key in keys}
    starts = np.array(begins)
    found, new, strange = {}, [], []
    for key, tensor in converted.items():
        values = (
            tensor.detach().to(torch.float64).numpy()
            if isinstance(tensor, torch.Tensor)
            else np.asarray(tensor, np.float64)
        )
        ours = (values >= 1) & (values <= last) & (values == np.floor(values))
        if not values.size or not ours.any() or (values.size > 1 and len(np.unique(values)) == 1):
            new.append(key)
            continue
        if not ours.all():
            strange.append(key)
            continue
        values = values.astype(np.int64)
        ids = np.searchsorted(starts, values, side="right") - 1
        offsets = values - starts[ids]
        made = _made(ids, offsets, [shapes[one] for one in keys])
        if made is None:
            strange.append(key)
            continue
        numbers, op = made
        sources = tuple(keys[number] for number in numbers)
        again = applied(op, [codes[one].numpy().astype(np.int64) for one in sources], values.shape)
        assert again is None or np.array_equal(again, values), (key, sources, op)
        found[key] = (sources, op)
    return _slices(found, shapes), new, strange


def _slices(
    found: dict[str, tuple[tuple[str, ...], str]], shapes: dict[str, tuple[int, ...]]
) -> dict[str, tuple[tuple[str, ...], str]]:
    """Pieces of one tensor that are not all of one size are slices, also where one of them would be an equal part."""
    uneven = {sources for sources, op in found.values() if "slice:" in op and "groupslice" not in op}
    for key, (sources, op) in found.items():
        steps = op.split(";")
        if sources in uneven and len(sources) == 1 and steps[0].startswith("split:"):
            dim, number, many = map(int, steps[0][6:].replace("/", ":").split(":"))
            size = shapes[sources[0]][dim] // many
            found[key] = (sources, ";".join([f"slice:{dim}:{number * size}:{(number + 1) * size}", *steps[1:]]))
    return found


Made = tuple[list[int], str]


def _made(ids: Array, offsets: Array, shapes: list[tuple[int, ...]]) -> Made | None:
    order = list(dict.fromkeys(ids.flatten().tolist()))
    if len(order) == 1:
        shape = shapes[order[0]]
        op = _whole(offsets, shape) if offsets.size == prod(shape) else _part(offsets, shape)
        return ([order[0]], op) if op else None
    return _several(ids, offsets, shapes)


def _turned(shape: tuple[int, ...]) -> Iterator[tuple[str, Array]]:
    plain = np.arange(prod(shape)).reshape(shape)
    yield "", plain
    if 1 < len(shape) < 6:
        for axes in permutations(range(len(shape))):
            if axes != tuple(range(len(shape))):
                name = "transpose" if len(shape) == 2 else "permute:" + ",".join(map(str, axes))
                yield name, plain.transpose(axes)


def _joined(*steps: str) -> str:
    return ";".join(step for step in steps if step) or "rename"


def _whole(offsets: Array, shape: tuple[int, ...]) -> str | None:
    """What was done to a whole tensor."""
    for name, turned in _turned(shape):
        if turned.shape == offsets.shape and np.array_equal(turned, offsets):
            return _joined(name)
    for name, turned in _turned(shape):
        if np.array_equal(turned.flatten(), offsets.flatten()):
            return _joined(name, "reshape")
    for name, turned in _turned(shape):
        if offsets.shape == turned.shape:
            for dim, size in enumerate(turned.shape):
                rows = np.moveaxis(offsets, dim, 0).reshape(size, -1)
                base = np.moveaxis(turned, dim, 0).reshape(size, -1)
                places = {first: number for number, first in enumerate(base[:, 0].tolist())}
                index = np.array([places.get(first, 0) for first in rows[:, 0].tolist()])
                if np.array_equal(base[index], rows):
                    return _joined(name, _rows(index, dim))
    return None


def _rows(index: Array, dim: int) -> str:
    many = len(index)
    for heads in range(1, many // 2 + 1):
        if many % (2 * heads) == 0:
            grid = np.arange(many)
            if np.array_equal(grid.reshape(heads, many // heads // 2, 2).transpose(0, 2, 1).flatten(), index):
                return f"rope_deinterleave:{dim}:{heads}"
            if np.array_equal(grid.reshape(heads, 2, many // heads // 2).transpose(0, 2, 1).flatten(), index):
                return f"rope_interleave:{dim}:{heads}"
    return f"perm:{dim}"


def _part(offsets: Array, shape: tuple[int, ...]) -> str | None:
    """Which piece of a tensor it is."""
    for name, turned in _turned(shape):
        for dim, size in enumerate(turned.shape):
            length, rest = divmod(offsets.size * size, turned.size)
            if rest or not length:
                continue
            begin = int(np.argwhere(turned == offsets.flatten()[0])[0][dim])
            piece = turned.take(range(begin, min(begin + length, size)), dim)
            if piece.size == offsets.size and np.array_equal(piece.flatten(), offsets.flatten()):
                equal = size % length == 0 and begin % length == 0
                cut = (
                    f"split:{dim}:{begin // length}/{size // length}"
                    if equal
                    else f"slice:{dim}:{begin}:{begin + length}"
                )
                return _joined(name, cut, "" if piece.shape == offsets.shape else "reshape")
    row = prod(shape[1:])
    if offsets.shape[1:] == shape[1:]:
        index = offsets.reshape(len(offsets), -1)[:, 0] // max(row, 1)
        base = np.arange(prod(shape)).reshape(shape)
        if np.array_equal(base[index], offsets):
            return _groups(index, shape[0])
    return None


def _groups(index: Array, many: int) -> str:
    for groups in range(2, many + 1):
        if many % groups == 0 and len(index) % groups == 0:
            inside, length = many // groups, len(index) // groups
            first = int(index[0])
            expected = (np.arange(groups)[:, None] * inside + first + np.arange(length)).flatten()
            if first + length <= inside and np.array_equal(expected, index):
                if inside % length == 0 and first % length == 0:
                    return f"groupslice:0:{first // length}/{inside // length}:{groups}"
                return f"groupslice:0:{first}:{first + length}:{groups}"
    return "gather:0"


def _several(ids: Array, offsets: Array, shapes: list[tuple[int, ...]]) -> Made | None:
    """How several tensors were put together."""
    for dim in range(ids.ndim):
        line = np.moveaxis(ids, dim, 0).reshape(ids.shape[dim], -1)
        if not (line == line[:, :1]).all():
            continue
        edges = [0, *(np.flatnonzero(np.diff(line[:, 0])) + 1).tolist(), len(line)]
        numbers, befores = [], []
        for begin, end in pairwise(edges):
            number = int(line[begin, 0])
            block = offsets.take(range(begin, end), dim)
            if block.size != prod(shapes[number]):
                return None
            stacked = end - begin == 1 and len(edges) - 1 == len(line)
            op = (_whole(block.squeeze(dim), shapes[number]) if stacked else None) or _whole(block, shapes[number])
            if op is None:
                return None
            numbers.append(number)
            befores.append(op)
        stacked = len(edges) - 1 == len(line) and all(len(shapes[number]) < ids.ndim for number in numbers)
        join = f"stack:{dim}" if stacked else f"concat:{dim}"
        if len(set(befores)) == 1:
            return numbers, _joined("" if befores[0] == "rename" else befores[0], join)
        inside = "|".join(op.replace(";", "+") for op in befores)
        return numbers, f"{join}<{inside}>"
    if ids.ndim > 2:
        blocks = [_made(ids[at], offsets[at], shapes) for at in range(len(ids))]
        if (
            all(blocks)
            and len({one[1] for one in blocks if one}) == 1
            and blocks[0]
            and blocks[0][1].endswith("concat:0")
        ):
            return [number for one in blocks if one for number in one[0]], blocks[0][1] + ";reshape"
    return None


def applied(op: str, arrays: list[Array], shape: tuple[int, ...]) -> Array | None:
    """What the op makes of arrays; None for steps that it does not describe in full."""
    for step in op.split(";"):
        word, _, rest = step.partition(":")
        if word in ("perm", "gather", "groupslice") or "<" in step:
            return None
        if word == "transpose":
            arrays = [array.T for array in arrays]
        elif word == "permute":
            arrays = [array.transpose([int(axis) for axis in rest.split(",")]) for array in arrays]
        elif word == "reshape":
            arrays = [arrays[0].reshape(shape)] if len(arrays) == 1 else [array.flatten() for array in arrays]
            if len(arrays) > 1:
                return None
        elif word == "split":
            dim, number, many = map(int, rest.replace("/", ":").split(":"))
            arrays = [np.split(array, many, dim)[number] for array in arrays]
        elif word == "slice":
            dim, begin, end = map(int, rest.split(":"))
            arrays = [array.take(range(begin, end), dim) for array in arrays]
        elif word == "concat":
            arrays = [np.concatenate(arrays, int(rest))]
        elif word == "stack":
            arrays = [np.stack(arrays, int(rest))]
        elif word.startswith("rope"):
            dim, heads = map(int, rest.split(":"))
            array = np.moveaxis(arrays[0], dim, 0)
            grid = (heads, -1, 2) if word == "rope_deinterleave" else (heads, 2, len(array) // heads // 2)
            index = np.arange(len(array)).reshape(grid).transpose(0, 2, 1).flatten()
            arrays = [np.moveaxis(array[index], 0, dim)]
    return arrays[0]
