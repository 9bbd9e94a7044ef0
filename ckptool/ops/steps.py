"""Steps: elementary changes with every key spelled out, and their effects on names, shapes and tensors.

Rules are planned into steps, and a map file lists them; the inverse steps in reverse order undo them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, NamedTuple

from ckptool.core.dtypes import DTYPES
from ckptool.core.keys import is_empty
from ckptool.core.tensor import Opaque, TensorInfo, cat, copied, is_countable, narrow, permute, unflatten
from ckptool.errors import UnsupportedError, UsageError

Shape = tuple[int, ...]
Shapes = dict[str, Shape | None]
"""{key: shape} in the order of the keys; None for an entry that is not a tensor."""


@dataclass(frozen=True, slots=True)
class Step:
    """One elementary change. ``op``, its ``args`` (sizes in elements along ``dim``), and its effect:

    rename   old[i] becomes new[i]
    drop     old is left out
    copy     old[0] stays, as new[0], and the same entry is new[1] too
    uncopy   the inverse of copy: of two equal entries new[0], which is old[0], stays
    permute  dims                      old[0] becomes new[0] = old[0] with its dimensions reordered
    reshape  from, to                  the same elements in C order
    split    dim, sizes                old[0] becomes the pieces new
    cat      dim, sizes                the inverse of split
    chunk    dim, heads, parts         old[0] is heads x parts x rest along dim; piece i takes part i of every head
    weave    dim, heads, parts         the inverse of chunk
    """

    op: str
    old: tuple[str, ...]
    new: tuple[str, ...] = ()
    args: Mapping[str, Any] = field(default_factory=dict)

    def inverted(self) -> Step:
        """Returns the step that undoes this one. Raises: UsageError for a drop."""
        args = dict(self.args)
        if self.op == "drop":
            raise UsageError("a map that dropped keys cannot bring them back")
        if self.op == "permute":
            args["dims"] = [args["dims"].index(axis) for axis in range(len(args["dims"]))]
        elif self.op == "reshape":
            args["from"], args["to"] = args["to"], args["from"]
        opposite = {
            "split": "cat",
            "cat": "split",
            "chunk": "weave",
            "weave": "chunk",
            "copy": "uncopy",
            "uncopy": "copy",
        }
        return Step(opposite.get(self.op, self.op), self.new, self.old, args)


ARGS: Mapping[str, Mapping[str, type]] = {
    "rename": {},
    "drop": {},
    "copy": {},
    "uncopy": {},
    "permute": {"dims": list},
    "reshape": {"from": list, "to": list},
    "split": {"dim": int, "sizes": list},
    "cat": {"dim": int, "sizes": list},
    "chunk": {"dim": int, "heads": int, "parts": int},
    "weave": {"dim": int, "heads": int, "parts": int},
}
"""The ``args`` of each op and their types; every number in them is a whole number of 0 or more."""


def is_sound(step: Step) -> bool:
    """Returns whether a step read from a file is valid in itself, whatever it is applied to."""
    types, args = ARGS.get(step.op), step.args
    if types is None or set(args) != set(types):
        return False
    for name, kind in types.items():
        numbers = args[name] if isinstance(args[name], list) else [args[name]]
        if type(args[name]) is not kind or not all(type(number) is int and number >= 0 for number in numbers):
            return False
    if args.get("heads") == 0 or args.get("parts") == 0:
        return False
    if step.op == "permute" and sorted(args["dims"]) != list(range(len(args["dims"]))):
        return False
    if step.op in ("copy", "uncopy") and step.old[:1] != step.new[:1]:
        return False
    many = len(args.get("sizes", ())) or args.get("parts", 1)
    counts = {"rename": (len(step.old), len(step.old)), "drop": (len(step.old), 0), "copy": (1, 2), "uncopy": (2, 1),
              "split": (1, many), "chunk": (1, many), "cat": (many, 1), "weave": (many, 1)}  # fmt: skip
    return (len(step.old), len(step.new)) == counts.get(step.op, (1, 1))


def fits(step: Step, shapes: Sequence[Shape | None]) -> bool:
    """Returns whether a sound step can be applied to entries of these shapes (None: not a tensor)."""
    solid = [shape for shape in shapes if shape is not None]
    if step.op in ("rename", "drop", "copy", "uncopy"):
        return step.op != "uncopy" or shapes[0] == shapes[1]
    if len(solid) < len(shapes):
        return False
    args, first = step.args, solid[0]
    if step.op == "permute":
        return len(args["dims"]) == len(first)
    if step.op == "reshape":
        to = tuple(args["to"])
        return bool(tuple(args["from"]) == first and is_countable(to) and prod(to) == prod(first))
    dim = args["dim"]
    if any(len(shape) != len(first) or dim >= len(shape) for shape in solid):
        return False
    if step.op == "split":
        return bool(sum(args["sizes"]) == first[dim])
    if any((*shape[:dim], *shape[dim + 1 :]) != (*first[:dim], *first[dim + 1 :]) for shape in solid):
        return False
    if step.op == "cat":
        return bool([shape[dim] for shape in solid] == args["sizes"])
    if step.op == "chunk":
        return bool(first[dim] % (args["heads"] * args["parts"]) == 0)
    return len(set(solid)) == 1 and bool(first[dim] % args["heads"] == 0)


# --- names and shapes --------------------------------------------------------------------------------------------


def advance(steps: Sequence[Step], current: Shapes) -> tuple[Shapes, list[str]]:
    """Returns ({key: shape} after steps over different keys, errors: collisions and empty names).

    New keys come at the position of their first old key. Takes one pass over the keys, however many steps there are.
    """
    if all(step.op == "rename" for step in steps):
        moves: dict[str, str] = {}
        for step in steps:
            moves.update(zip(step.old, step.new, strict=True))
        made = dict(zip(map(moves.get, current, current), current.values(), strict=True))
        if len(made) == len(current) and not _may_be_empty(moves.values()):
            return made, []
    return _advance_slowly(steps, current)


def _advance_slowly(steps: Sequence[Step], current: Shapes) -> tuple[Shapes, list[str]]:
    """Returns what `advance` does, for steps of every kind, with a message for each error."""
    becomes: dict[str, Shapes] = {}
    for step in steps:
        if step.op == "rename":
            becomes.update((old, {new: current.get(old)}) for old, new in zip(step.old, step.new, strict=True))
            continue
        becomes.update((old, {}) for old in step.old)
        fresh = dict(zip(step.new, new_shapes(step, [current.get(key) for key in step.old]), strict=True))
        if len(fresh) < len(step.new):
            return dict(current), [f"{step.old[0]} would give one name twice: {', '.join(step.new)}"]
        if fresh:
            becomes[step.old[0]] = fresh
    made: Shapes = {}
    origin: dict[str, str] = {}
    errors = []
    for key, shape in current.items():
        for name, its in becomes.get(key, {key: shape}).items():
            if name != key and is_empty(name):
                errors.append(f"{key} would be {name!r}: an empty name")
            elif name in made:
                errors.append(f"{origin[name]} and {key} would both be {name}")
            made[name], origin[name] = its, key
    return made, errors


def _may_be_empty(names: Iterable[str]) -> bool:
    """Returns whether one of the names `is_empty`; may be a false alarm if a name has a line break in it."""
    text = "\n".join(["", *names, ""])
    return any(mark in text for mark in ("\n\n", "\n.", ".\n", ".."))


def new_shapes(step: Step, shapes: Sequence[Shape | None]) -> list[Shape | None]:
    """Returns the shapes of a step's new keys; the step `fits` the old shapes."""
    args = step.args
    first = shapes[0] if shapes else None
    if step.op in ("copy", "uncopy"):
        return [first] * len(step.new)
    if first is None or step.op in ("rename", "drop"):
        return list(shapes[: len(step.new)])
    if step.op == "permute":
        return [tuple(first[axis] for axis in args["dims"])]
    if step.op == "reshape":
        return [tuple(args["to"])]
    dim = args["dim"]
    if step.op == "split":
        return [(*first[:dim], size, *first[dim + 1 :]) for size in args["sizes"]]
    if step.op == "cat":
        return [(*first[:dim], sum(args["sizes"]), *first[dim + 1 :])]
    parts = args["parts"]
    size = first[dim] // parts if step.op == "chunk" else first[dim] * parts
    return [(*first[:dim], size, *first[dim + 1 :])] * len(step.new)


# --- the operations behind a key, as text ------------------------------------------------------------------------


class Past(NamedTuple):
    """The keys that a key was computed from, and the operations as `Mapped.op` writes them.

    ``nested`` is the same for use inside the angle brackets of a ``concat``.
    """

    keys: list[str]
    op: str = ""
    nested: str = ""

    def then(self, op: str) -> Past:
        """Returns this past with one more operation."""
        joined = (f"{past}{mark}{op}" if past else op for past, mark in ((self.op, ";"), (self.nested, "+")))
        return Past(self.keys, *joined)


def pasts(step: Step, inputs: Sequence[Past]) -> list[Past]:
    """Returns the pasts of the new keys of a step that computes, given those of its old keys."""
    args, first = step.args, inputs[0]
    if step.op == "permute":
        return [first.then("transpose" if args["dims"] == [1, 0] else f"permute:{','.join(map(str, args['dims']))}")]
    if step.op == "reshape":
        return [first.then("reshape")]
    dim = args["dim"]
    if step.op == "split":
        return [first.then(piece) for piece in _pieces(dim, args["sizes"])]
    if step.op == "chunk":
        apart = first.then("reshape")
        return [apart.then(f"split:{dim + 1}:{n}/{args['parts']}").then("reshape") for n in range(args["parts"])]
    if step.op == "cat":
        return [_joined(dim, inputs)]
    return [_joined(dim + 1, [past.then("reshape") for past in inputs]).then("reshape")]


def _pieces(dim: int, sizes: Sequence[int]) -> list[str]:
    if len(set(sizes)) == 1:
        return [f"split:{dim}:{number}/{len(sizes)}" for number in range(len(sizes))]
    found, start = [], 0
    for size in sizes:
        found.append(f"slice:{dim}:{start}:{start + size}")
        start += size
    return found


def _joined(dim: int, inputs: Sequence[Past]) -> Past:
    """Returns the past of concatenated tensors: their operations once if all the same, else one by one."""
    keys = [key for past in inputs for key in past.keys]
    one_by_one = f"concat:{dim}<{'|'.join(past.nested or 'rename' for past in inputs)}>"
    alike = len({past.nested for past in inputs}) == 1 and len(keys) == len(inputs)
    return Past(keys, inputs[0].then(f"concat:{dim}").op if alike else one_by_one, one_by_one)


# --- tensors -----------------------------------------------------------------------------------------------------


class Maker:
    """Applies steps to tensors; tied inputs give tied outputs, identical ones identical ones."""

    def __init__(self) -> None:
        self._made: dict[object, list[TensorInfo]] = {}
        self._same: dict[object, tuple[Sequence[TensorInfo], list[TensorInfo]]] = {}

    def make(self, step: Step, inputs: Sequence[TensorInfo]) -> list[TensorInfo]:
        """Returns the new tensors of a step that `fits`. Raises: UnsupportedError if one is sparse or quantised."""
        first = inputs[0]
        for tensor in inputs:
            if isinstance(tensor.source, Opaque) or DTYPES[tensor.dtype].bits % 8 or tensor.dtype.endswith("_x2"):
                raise UnsupportedError(
                    f"{step.op} of {step.old[0]}: a {tensor.dtype} {tensor.kind} tensor cannot be divided"
                )
            if tensor.dtype != first.dtype:
                raise UnsupportedError(f"{step.op} of {', '.join(step.old)}: their dtypes differ")
        what = step.op, repr(step.args)
        objects = (*what, *map(id, inputs))
        if objects not in self._same:
            views = (*what, *(tensor.view for tensor in inputs))
            made = self._made.get(views) or _views(step, inputs)
            if views in self._made or first.requires_grad or first.is_parameter:
                flags = first.requires_grad, first.is_parameter
                made = [replace(tensor, requires_grad=flags[0], is_parameter=flags[1]) for tensor in made]
            self._made[views] = made
            self._same[objects] = inputs, made  # keeps the inputs alive, since the key has their ids in it
        return self._same[objects][1]


def _views(step: Step, inputs: Sequence[TensorInfo]) -> list[TensorInfo]:
    first, args = inputs[0], step.args
    shape = first.shape or ()
    if step.op == "permute":
        return [copied(permute(first, args["dims"]))]
    if step.op == "reshape":
        return [copied(first, tuple(args["to"]))]
    dim = args["dim"]
    if step.op == "split":
        pieces, start = [], 0
        for size in args["sizes"]:
            pieces.append(copied(narrow(first, dim, start, size)))
            start += size
        return pieces
    if step.op == "cat":
        return [cat(inputs, dim)]
    if step.op == "chunk":
        return _chunks(first, dim, args["heads"], args["parts"])
    by_head = (*shape[:dim], args["heads"], shape[dim] // args["heads"], *shape[dim + 1 :])
    woven = cat([copied(tensor, by_head) for tensor in inputs], dim + 1)
    return [copied(woven, (*shape[:dim], shape[dim] * args["parts"], *shape[dim + 1 :]))]


def _chunks(tensor: TensorInfo, dim: int, heads: int, parts: int) -> list[TensorInfo]:
    shape = tensor.shape or ()
    rest = shape[dim] // (heads * parts)
    flat = (*shape[:dim], heads * rest, *shape[dim + 1 :])
    by_head = unflatten(tensor, dim, (heads, parts * rest))
    return [copied(narrow(by_head, dim + 1, number * rest, rest), flat) for number in range(parts)]
