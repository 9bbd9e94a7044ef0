"""A mapping read backwards: from the target to the source."""

from .pairs import Entry, Made, Pair
from .score import loads

_OTHER = {"rope_interleave": "rope_deinterleave", "rope_deinterleave": "rope_interleave"}


def _undo(steps: list[str]) -> list[str]:
    """The layout steps that undo these."""
    undone = []
    for step in reversed(steps):
        word, _, rest = step.partition(":")
        if word == "permute":
            axes = [int(axis) for axis in rest.split(",")]
            step = "permute:" + ",".join(str(axes.index(axis)) for axis in range(len(axes)))
        elif word in _OTHER:
            step = f"{_OTHER[word]}:{rest}"
        undone.append(step)
    return [step for step in undone if step != "rename"]


def _shape(entry: Entry, steps: list[str], whole: Entry) -> tuple[int, ...]:
    """The shape of a source before it is joined. A reshape is to what the others have: the target's, but for a dim."""
    shape = entry.shape
    for step in steps:
        word, _, rest = step.partition(":")
        if word == "transpose":
            shape = shape[::-1]
        elif word == "permute":
            shape = tuple(shape[int(axis)] for axis in rest.split(","))
        elif word == "reshape":
            size = 1
            for one in shape:
                size *= one
            rest_of = 1
            for one in whole.shape[1:]:
                rest_of *= one
            shape = (size // rest_of, *whole.shape[1:])
    return shape


def _op(steps: list[str]) -> str:
    return ";".join(steps) or "rename"


def inverse(pair: Pair) -> Pair:
    """The pair from its target to its source. A source of which not all pieces are used has no partner."""
    source = {entry.key: entry for entry in pair.source}
    target = {entry.key: entry for entry in pair.target}
    made: dict[str, Made] = {}
    alike: dict[str, list[str]] = {}
    pieces: dict[tuple[str, int, str], dict[tuple[int, int], tuple[str, list[str], list[str]]]] = {}
    for key, true in pair.mapping.items():
        steps = true.op.split(";")
        if any(step.startswith(("groupslice", "gather")) or "<" in step for step in steps):
            continue  # rows of heads in turn: what puts them together again has no word
        at = next(
            (i for i, step in enumerate(steps) if step.partition(":")[0] in ("split", "slice", "concat", "stack")), None
        )
        if at is None:
            (one,) = true.sources
            made.setdefault(one, Made((key,), _op(_undo(steps))))
            alike.setdefault(one, []).append(key)
            continue
        before, (word, _, rest), after = _undo(steps[:at]), steps[at].partition(":"), _undo(steps[at + 1 :])
        if word in ("split", "slice"):
            (one,) = true.sources
            numbers = rest.replace("/", ":").split(":")
            dim = int(numbers[0])
            if word == "split":
                size = _shape(source[one], steps[:at], source[one])[dim] // int(numbers[2])
                span = (int(numbers[1]) * size, (int(numbers[1]) + 1) * size)
            else:
                span = (int(numbers[1]), int(numbers[2]))
            pieces.setdefault((one, dim, _op(before)), {}).setdefault(span, (key, before, after))
        elif word == "stack":
            for number, one in enumerate(true.sources):
                made.setdefault(
                    one, Made((key,), _op([*after, f"split:{rest}:{number}/{len(true.sources)}", "reshape"]))
                )
        else:
            dim, begin = int(rest), 0
            sizes = [_shape(source[one], steps[:at], target[key])[dim] for one in true.sources]
            for number, (one, size) in enumerate(zip(true.sources, sizes, strict=True)):
                equal = len(set(sizes)) == 1
                cut = f"split:{dim}:{number}/{len(sizes)}" if equal else f"slice:{dim}:{begin}:{begin + size}"
                made.setdefault(one, Made((key,), _op([*after, cut, *before])))
                begin += size
    for (one, dim, before), spans in pieces.items():
        ends = [0]
        for begin, end in sorted(spans):
            if begin == ends[-1]:
                ends.append(end)
        if len(ends) - 1 != len(spans) or ends[-1] != _shape(source[one], _undo(before.split(";")), source[one])[dim]:
            continue
        ordered = [spans[span] for span in sorted(spans)]
        op = _op([*ordered[0][2], f"concat:{dim}", *(step for step in before.split(";") if step != "rename")])
        made.setdefault(one, Made(tuple(key for key, _, _ in ordered), op))
    # A tied source is made of what its twin is made of.
    for group in pair.source_ties:
        twin = next((key for key in group if key in made), None)
        if twin:
            for key in group:
                made.setdefault(key, made[twin])
    ties = [group for group in alike.values() if len(group) > 1]
    ties += [group for group in pair.target_ties if not any(set(group) <= set(other) for other in ties)]
    for key, one in made.items():
        assert loads([target[other].shape for other in one.sources], one.op, source[key].shape), (key, one)
    return Pair(
        f"{pair.name}_reversed",
        pair.family,
        pair.target,
        pair.source,
        {entry.key: made[entry.key] for entry in pair.source if entry.key in made},
        ties,
        pair.source_ties,
        mismatched=[(other, one) for one, other in pair.mismatched],
        provenance=pair.provenance,
        part=pair.part,
    )
