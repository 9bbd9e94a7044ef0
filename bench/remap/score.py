"""What a predicted mapping is worth.

correct      the right sources in the right order, and the right piece of them
recall       correct by the target keys that have a source
exact        every such key correct, and nothing wrong predicted
harm         wrong, and would load without an error: the shape is the target's; but for integer counters
layout harm  correct, but in another layout of the same shape: a square matrix not transposed, rows in another order
"""

from dataclasses import dataclass
from math import prod

from .pairs import Made, Pair

Shape = tuple[int, ...]
# Steps that change where a number lies in its tensor, not which numbers there are.
_LAYOUTS = (
    "rename",
    "transpose",
    "reshape",
    "permute",
    "rope_interleave",
    "rope_deinterleave",
    "perm",
    "shuffle",
    "roll",
    "chunkperm",
)
_KEEP_SHAPE = ("rename", "rope_interleave", "rope_deinterleave", "perm", "shuffle", "roll", "chunkperm")


@dataclass(frozen=True)
class Score:
    """The figures of one pair; what is a fraction there is a count here, or a list of target keys."""

    wanted: int
    predicted: int
    found: int
    exact: bool
    wrong: list[str]
    missed: list[str]
    harm: list[str]
    layout_harm: list[str]

    @property
    def recall(self) -> float:
        return self.found / self.wanted if self.wanted else 1.0


def _steps(op: str) -> list[str]:
    return [step for step in op.split(";") if step]


def _word(step: str) -> str:
    return step.partition(":")[0]


def in_one_form(op: str, shape: Shape) -> list[str]:
    """The steps on sources of this shape in one order: what takes pieces, as slices along the source's own dimensions;
    then the order of the dimensions. What is behind a reshape stays, and where each source has steps of its own."""
    axes, sizes, found = list(range(len(shape))), list(shape), []
    steps = _steps(op)
    while steps:
        word, _, rest = steps[0].partition(":")
        numbers = rest.replace("/", ":").split(":")
        if word == "transpose" and len(axes) == 2:
            axes.reverse()
        elif word == "permute" and rest.count(",") + 1 == len(axes):
            axes = [axes[int(axis)] for axis in rest.split(",")]
        elif (
            "<" in steps[0] or word in ("reshape", "stack") or not numbers[0].isdigit() or int(numbers[0]) >= len(axes)
        ):
            break
        else:
            dim = axes[int(numbers[0])]
            if word == "split":
                part = sizes[dim] // int(numbers[2])
                word, numbers[1:] = "slice", [str(part * int(numbers[1])), str(part * (int(numbers[1]) + 1))]
            whole = word == "slice" and numbers[1:] == ["0", str(sizes[dim])]
            found += [] if whole else [":".join([word, str(dim), *numbers[1:]])]
            if word == "slice":
                sizes[dim] = int(numbers[2]) - int(numbers[1])
        steps = steps[1:]
    solid = [axis for axis in axes if sizes[axis] != 1]
    return [*found, *(["permute:" + ",".join(map(str, axes))] if solid != sorted(solid) else []), *steps]


def piece(steps: list[str]) -> list[str]:
    """The steps that say which part of which source: a stack is a concat of other shapes."""
    found = [step.partition("<")[0] for step in steps if _word(step) not in _LAYOUTS]
    return ["concat" + step[5:] if _word(step) == "stack" else step for step in found]


def layout(steps: list[str]) -> list[str]:
    """The steps that say where a number lies. A reshape is not among them: the order stays."""
    return sorted(step for step in steps if _word(step) in _LAYOUTS and step not in ("rename", "reshape"))


def loads(shapes: list[Shape], op: str, wanted: Shape) -> bool:
    """Whether sources of these shapes give the wanted one. What nobody can tell counts as yes."""
    for step in _steps(op):
        word, _, rest = step.partition(":")
        if word == "transpose":
            shapes = [shape[::-1] if len(shape) == 2 else shape for shape in shapes]
        elif word == "permute":
            axes = [int(axis) for axis in rest.split(",")]
            shapes = [tuple(shape[axis] for axis in axes) if len(axes) == len(shape) else shape for shape in shapes]
        elif word in ("reshape", "stack"):
            return sum(map(prod, shapes)) == prod(wanted)
        elif word == "split":
            dim, parts = int(rest.split(":")[0]), int(rest.split("/")[1])
            if any(dim >= len(shape) or shape[dim] % parts for shape in shapes):
                return False
            shapes = [_with(shape, dim, shape[dim] // parts) for shape in shapes]
        elif word in ("concat", "groupconcat"):
            dim = int(rest.partition("<")[0])
            if any(dim >= len(shape) for shape in shapes) or len({_with(shape, dim, 0) for shape in shapes}) != 1:
                return False
            shapes = [_with(shapes[0], dim, sum(shape[dim] for shape in shapes))]
        elif word not in _KEEP_SHAPE:
            return True
    return shapes == [wanted]


def _with(shape: Shape, dim: int, size: int) -> Shape:
    return (*shape[:dim], size, *shape[dim + 1 :])


def score(pair: Pair, predicted: dict[str, Made]) -> Score:
    """The score of a prediction; where other mappings are as right as the true one, of that which fits best."""
    scores = [_score(pair, truth, predicted) for truth in (pair.mapping, *pair.alternatives)]
    return min(scores, key=lambda one: (len(one.harm), len(one.wrong), -one.found))


def _score(pair: Pair, truth: dict[str, Made], predicted: dict[str, Made]) -> Score:
    source = {entry.key: entry for entry in pair.source}
    target = {entry.key: entry for entry in pair.target}
    first = {key: min(group) for group in pair.source_ties for key in group}
    right: set[str] = set()
    wrong: list[str] = []
    harm: list[str] = []
    layout_harm: list[str] = []
    predicted = {key: made for key, made in predicted.items() if made.sources and key not in pair.doubtful}
    for key, made in predicted.items():
        if key not in target or any(one not in source for one in made.sources):
            wrong.append(key)
            continue
        fits = loads([source[one].shape for one in made.sources], made.op, target[key].shape)
        true = truth.get(key)
        same = true and [first.get(one, one) for one in made.sources] == [first.get(one, one) for one in true.sources]
        steps, truth_steps = (in_one_form(one.op, source[made.sources[0]].shape) if one else [] for one in (made, true))
        if true and same and piece(steps) == piece(truth_steps):
            right.add(key)
            if fits and layout(steps) != layout(truth_steps):
                layout_harm.append(key)
        else:
            wrong.append(key)
            counter = not target[key].shape and target[key].dtype.startswith("int")
            if fits and not counter:
                harm.append(key)
    wanted = set(truth) - pair.doubtful
    # A tied key that was left out is no miss where its twin is right.
    for group in pair.target_ties:
        if right.intersection(group):
            wanted -= {key for key in group if key not in predicted}
    missed = sorted(wanted - right)
    return Score(
        len(wanted), len(predicted), len(right & wanted), not missed and not wrong, wrong, missed, harm, layout_harm
    )
