"""How a tensor is made from others, as operations: parsed from the text of a pair, for tensors of given shapes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

from ckptool.errors import UsageError
from ckptool.mapping.pairs import Pair
from ckptool.ops.steps import Shape, Step

Op = tuple[Any, ...]
"""An operation: ``("permute", dims)``, ``("reshape", shape)``, ``("slice", dim, begin, end)``, ``("cat", dim)``,
``("chunk", dim, heads, parts, part)`` or ``("weave", dim, heads)``, as in `ckptool.ops.steps`."""

CUTS, JOINS = ("slice", "chunk"), ("cat", "weave")
"""What takes a piece of a tensor, and what puts several together; other operations are of one whole tensor."""


class Chain(NamedTuple):
    """What is done to each source (``parts``, a list of operations for each), how they are joined, and what follows."""

    sources: tuple[str, ...]
    parts: tuple[tuple[Op, ...], ...]
    join: Op | None
    after: tuple[Op, ...]

    def history(self) -> Any:
        """Returns the chain as `histories` writes what was done to a tensor."""
        made = [applied(ops, source) for source, ops in zip(self.sources, self.parts, strict=True)]
        return applied(self.after, made[0] if self.join is None else (self.join, *made))


def applied(ops: Iterable[Op], history: Any) -> Any:
    """Returns a history with operations after it."""
    for op in ops:
        history = (op, history)
    return history


def chain(pair: Pair, shapes: Mapping[str, Shape], wanted: Shape) -> Chain:
    """Returns what a pair says, for sources of these shapes. Raises: UsageError if that gives no tensor of ``wanted``.

    Beside the words of ``Mapped.op`` these are known: ``reshape:a,b,..`` with a shape; ``stack:dim``;
    ``groupslice:dim:groups:a:b``, rows a to b of each of equal groups, and its inverse ``groupconcat:dim:groups``;
    ``shuffle:dim:a:b``, rows counted by a and b transposed; ``rope_interleave:dim:heads`` and
    ``rope_deinterleave:dim:heads``, the two orders of rotary rows.
    """
    if pair.op == "rename" and len(pair.source) == 1 and shapes[pair.source[0]] == wanted:
        return Chain(tuple(pair.source), ((),), None, ())
    words = [word for word in pair.op.split(";") if word != "rename"]
    joins = [at for at, word in enumerate(words) if word.startswith(("concat", "stack", "groupconcat"))]
    many = len(pair.source)
    at = joins[0] if joins else len(words)
    try:
        if len(joins) > 1 or bool(joins) != (many > 1) or not many:
            raise ValueError("joins and sources")
        each, join = _joined(words[: at + 1], many)
        rest = [*join, *words[at + 1 :]]
        parts, last = [], [shapes[key] for key in pair.source]
        for number, own in enumerate(each):
            ops, last[number] = _parsed(own, last[number], [*own, *rest], wanted, many)
            parts.append(ops)
        grouped: tuple[Op, ...] = ()
        if join:
            dim, *groups = map(int, join[0].split(":")[1:])
            for number, shape in enumerate(last if groups else ()):
                apart = (*shape[:dim], groups[0], shape[dim] // groups[0], *shape[dim + 1 :])
                parts[number], last[number] = (*parts[number], ("reshape", apart)), after([("reshape", apart)], shape)
            dim += len(groups)
            if len({(*shape[:dim], *shape[dim + 1 :]) for shape in last}) > 1 or dim >= len(last[0]):
                raise ValueError("shapes that do not fit together")
            last[0] = (*last[0][:dim], sum(shape[dim] for shape in last), *last[0][dim + 1 :])
            if groups:
                flat = (*last[0][: dim - 1], last[0][dim - 1] * last[0][dim], *last[0][dim + 1 :])
                grouped, last[0] = (("reshape", flat),), flat
        rear, made = _parsed(words[at + 1 :], last[0], words[at + 1 :], wanted, 1)
        if made != wanted and {made, wanted} != {(), (1,)}:
            raise ValueError(f"shape {list(made)}")
    except (ValueError, IndexError, ZeroDivisionError) as error:
        what = f"{pair.op!r} of {', '.join(pair.source[:3])}"
        raise UsageError(f"{pair.target}: {what} does not give shape {list(wanted)}: {error}") from error
    return _by_heads(Chain(tuple(pair.source), tuple(parts), ("cat", dim) if join else None, grouped + rear), shapes)


def _joined(words: Sequence[str], many: int) -> tuple[list[list[str]], list[str]]:
    """Returns (the words for each source, the concat) of the words up to a join, if there is one."""
    if many == 1:
        return [list(words)], []
    *before, join = words
    match = re.fullmatch(r"(concat|stack|groupconcat):(\d+(?::\d+)?)(?:<(.*)>)?", join)
    if match is None:
        raise ValueError(join)
    each = match[3].split("|") if match[3] else [""] * many
    if len(each) != many:
        raise ValueError("an operation for each source")
    flat = ["reshape"] if match[1] == "stack" else []
    own = [[*before, *(word for word in text.split("+") if word not in ("", "rename")), *flat] for text in each]
    return own, [join.partition("<")[0].replace("stack", "concat")]


def _parsed(
    words: Sequence[str], shape: Shape, follow: Sequence[str], wanted: Shape, many: int
) -> tuple[tuple[Op, ...], Shape]:
    """Returns (the operations of these words, the shape after them); ``follow``: all up to the shape ``wanted``."""
    ops: list[Op] = []
    for number, word in enumerate(words):
        name, *texts = word.split(":")
        if name == "reshape" and not texts:
            to = _before(follow[number + 1 :], wanted, many)
            made: list[Op] = [("reshape", to)]
        elif name == "reshape":
            made = [("reshape", _numbers(texts[0]))]
        elif name in ("transpose", "permute"):
            made = [("permute", _numbers(texts[0]) if texts else (1, 0))]
        elif name == "split":
            (part, parts), dim = map(int, texts[1].split("/")), int(texts[0])
            size = shape[dim] // parts
            if size * parts != shape[dim] or not 0 <= part < parts:
                raise ValueError(word)
            made = [("slice", dim, part * size, part * size + size)]
        elif name == "slice":
            made = [("slice", *map(int, texts))]
        elif name == "groupslice":
            dim, groups, begin, end = map(int, texts)
            rest = shape[dim + 1 :]
            made = [("reshape", (*shape[:dim], groups, shape[dim] // groups, *rest)), ("slice", dim + 1, begin, end)]
            made.append(("reshape", (*shape[:dim], groups * (end - begin), *rest)))
        elif name in ("rope_interleave", "rope_deinterleave", "shuffle"):
            dim, *sizes = map(int, texts)
            size = shape[dim] // prod(sizes) // (1 if name == "shuffle" else 2)
            sizes += [2, size] if name == "rope_interleave" else [size, 2] if name == "rope_deinterleave" else [size]
            order, first = [*range(len(shape) + 2)], dim + (name != "shuffle")
            order[first : first + 2] = first + 1, first
            made = [
                ("reshape", (*shape[:dim], *sizes, *shape[dim + 1 :])),
                ("permute", tuple(order)),
                ("reshape", shape),
            ]
        else:
            raise ValueError(f"{word!r} is no operation")
        for op in made:
            nothing = ("permute", (*range(len(shape)),)), *(("slice", dim, 0, size) for dim, size in enumerate(shape))
            ops += [] if op in nothing else [op]
            shape = after([op], shape)
    return tuple(ops), shape


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


def after(ops: Iterable[Op], shape: Shape) -> Shape:
    """Returns the shape after operations of one tensor. Raises: ValueError if one does not fit."""
    for name, *args in ops:
        if name == "permute" and sorted(args[0]) == [*range(len(shape))]:
            shape = tuple(shape[dim] for dim in args[0])
        elif name == "reshape" and prod(args[0]) == prod(shape) and all(size >= 0 for size in args[0]):
            shape = args[0]
        elif name == "slice" and 0 <= args[1] <= args[2] <= shape[args[0]]:
            shape = (*shape[: args[0]], args[2] - args[1], *shape[args[0] + 1 :])
        else:
            raise ValueError(f"{name} of {list(shape)}")
    return shape


def _before(words: Sequence[str], shape: Shape, many: int) -> Shape:
    """Returns the shape that a tensor had before operations that gave ``shape``. Raises: ValueError if none says."""
    for word in reversed(words):
        name, *texts = word.split(":")
        if name == "transpose":
            shape = shape[::-1]
        elif name == "permute":
            order = _numbers(texts[0])
            shape = tuple(shape[order.index(dim)] for dim in range(len(shape)))
        elif name in ("split", "concat"):
            dim = int(texts[0])
            size, left = divmod(shape[dim], many) if name == "concat" else (shape[dim] * int(texts[1].split("/")[1]), 0)
            if left:
                raise ValueError(word)
            shape = (*shape[:dim], size, *shape[dim + 1 :])
        elif not name.startswith(("rope_", "shuffle")):
            raise ValueError("a reshape before it does not say to which shape")
    return shape


def _by_heads(made: Chain, shapes: Mapping[str, Shape]) -> Chain:
    """Returns a chain in which a split or join inside each head, between reshapes, is one operation."""
    if [op[0] for op in made.parts[0]] == ["reshape", "slice", "reshape"] and made.join is None and not made.after:
        (_, by_head), (_, dim, begin, end), (_, flat) = made.parts[0]
        whole, at, size = shapes[made.sources[0]], dim - 1, end - begin
        if dim and size and begin % size == 0 and by_head[dim] % size == 0:
            heads, parts, rest = by_head[at], by_head[dim] // size, whole[dim:]
            if by_head == (*whole[:at], heads, parts * size, *rest) and flat == (*whole[:at], heads * size, *rest):
                return made._replace(parts=((("chunk", at, heads, parts, begin // size),),))
    if made.join is not None and made.join[1] and len({*made.parts}) == 1 and len(made.parts[0]) == 1:
        (op,), at = made.parts[0], made.join[1] - 1
        whole = shapes[made.sources[0]]
        if op[0] == "reshape" and len(made.after) == 1 and len({shapes[key] for key in made.sources}) == 1:
            heads, size = op[1][at], op[1][at + 1]
            flat = (*whole[:at], heads * size * len(made.sources), *whole[at + 1 :])
            if op[1] == (*whole[:at], heads, size, *whole[at + 1 :]) and made.after == (("reshape", flat),):
                return Chain(made.sources, ((),) * len(made.sources), ("weave", at, heads), ())
    return made


def histories(batches: Iterable[Sequence[Step]], keys: Iterable[str]) -> dict[str, Any]:
    """Returns {key: what was done to which of ``keys`` to make it} after steps, see `Chain.history`."""
    now: dict[str, Any] = {key: key for key in keys}
    for batch in batches:
        made: dict[str, Any] = {}
        for step in batch:
            made.update(zip(step.new, _made(step, [now.pop(key) for key in step.old]), strict=True))
        now.update(made)
    return now


def _made(step: Step, inputs: list[Any]) -> list[Any]:
    args = step.args
    if step.op in ("rename", "drop"):
        return inputs[: len(step.new)]
    if step.op == "copy":
        return inputs * 2
    if step.op == "permute":
        return [(("permute", tuple(args["dims"])), *inputs)]
    if step.op == "reshape":
        return [(("reshape", tuple(args["to"])), *inputs)]
    if step.op == "split":
        ends = [sum(args["sizes"][: number + 1]) for number in range(len(args["sizes"]))]
        return [
            (("slice", args["dim"], end - size, end), *inputs) for end, size in zip(ends, args["sizes"], strict=True)
        ]
    if step.op == "chunk":
        parts = args["parts"]
        return [(("chunk", args["dim"], args["heads"], parts, number), *inputs) for number in range(parts)]
    heads = () if step.op == "cat" else (args["heads"],)
    return [((step.op, args["dim"], *heads), *inputs)]
