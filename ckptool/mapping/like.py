"""A checkpoint made like another: the pairs that were found, what is left out and why, and the rules that do it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from ckptool.core import keys
from ckptool.core.checkpoint import Checkpoint
from ckptool.errors import UsageError, listed
from ckptool.mapping.chains import chain
from ckptool.mapping.infer import infer
from ckptool.mapping.pairs import DEFAULT_CONFIDENCE, Doubt, Entry, Inferred, Pair, Sample
from ckptool.mapping.rules import expressed
from ckptool.mapping.templates import covering, templates
from ckptool.ops.notes import root_notes
from ckptool.ops.remap import RemapReport
from ckptool.ops.rows import Gate
from ckptool.ops.rules import Rules

Propose = Callable[[Sequence[Pair], Mapping[str, Sample]], Inferred]
"""Returns a mapping in which some pairs are settled, from what the source's vectors look like too."""


@dataclass(frozen=True, slots=True)
class InferReport:
    """Which tensors of a source become which of a target, as far as that is certain enough."""

    source: str
    """The path of the source."""
    target: str
    """The path of the target."""
    pairs: list[Pair]
    """What each tensor of the target is made from, in the target's order."""
    doubts: list[Doubt]
    """The tensors of the target that have candidates, of which none is certain enough."""
    only_target: list[str]
    """Keys of the target that nothing of the source could become."""
    only_source: list[str]
    """Keys of the source that no pair uses."""
    min_confidence: float
    """The confidence that a pair had to have."""
    rules: list[dict[str, Any]] = field(default_factory=list)
    """The rules that make the tensors of the pairs from the source, as ``--rules`` reads them."""
    notes: list[str] = field(default_factory=list)
    """What else was noticed."""

    @property
    def total(self) -> int:
        """Returns how many tensors the target has."""
        return len(self.pairs) + len(self.doubts) + len(self.only_target)

    @property
    def missing(self) -> list[str]:
        """Returns the keys of the target that get nothing, without counters, which a model can do without."""
        left = (*(doubt.target for doubt in self.doubts), *self.only_target)
        return [key for key in left if not keys.is_counter(key)]

    @property
    def settled(self) -> list[Pair]:
        """Returns the pairs that values or a person settled."""
        return [pair for pair in self.pairs if pair.confidence == 1]

    @property
    def unproven(self) -> list[Pair]:
        """Returns the pairs that are in doubt only because names and shapes cannot show their layout."""
        best = [doubt.candidates[0] for doubt in self.doubts if doubt.candidates]
        return [pair for pair in best if pair.unproven and pair.confidence >= self.min_confidence]

    @property
    def keys(self) -> list[str]:
        """Returns the keys of the target."""
        left = (*(doubt.target for doubt in self.doubts), *self.only_target)
        return [*(pair.target for pair in self.pairs), *left]

    @property
    def open_layout(self) -> tuple[str, int, list[str]] | None:
        """Returns (a pattern of keys whose layout is not known, how many these are, the layouts that it may be)."""
        groups: dict[str, list[str]] = {}
        for pair in self.unproven:
            groups.setdefault(pair.unproven or "", []).append(pair.target)
        if not groups:
            return None
        text, chosen = max(groups.items(), key=lambda group: len(group[1]))
        fitting = {
            pattern: sum(keys.matches(pattern, key) for key in chosen) for pattern in covering(chosen, self.keys)
        }
        pattern = max(fitting, key=fitting.__getitem__)
        return pattern, fitting[pattern], fitting_layouts(text)


@dataclass(frozen=True, slots=True)
class LikeReport(RemapReport):
    """What became of every key, and how that was found."""

    like: InferReport | None = None
    """The pairs, and what is left out, with candidates and reasons."""
    failed: list[Gate] = field(default_factory=list)
    """The conditions of the command line that do not hold; then nothing is written."""
    hint: str | None = None
    """The options with which more keys would match."""
    explained: list[str] | None = None
    """With --explain: a sentence for each key that was asked for."""


class Question(NamedTuple):
    """Doubts that differ in numbers alone: the pattern of their targets, those of their candidates, the doubts."""

    target: str
    candidates: list[str]
    doubts: list[Doubt]


def questions(doubts: Sequence[Doubt]) -> list[Question]:
    """Returns doubts in groups of the same names, numbers aside, in their order."""
    rows = [(doubt.target, *(" + ".join(pair.source) for pair in doubt.candidates)) for doubt in doubts]
    found = templates(rows)
    return [Question(one.names[0], [*one.names[1:]], [doubts[row] for row in one.rows]) for one in found]


def inferred(
    source: Checkpoint,
    target: Checkpoint,
    *,
    min_confidence: float = DEFAULT_CONFIDENCE,
    settled: Sequence[Pair] = (),
    layouts: Sequence[tuple[str, str]] = (),
    words: bool = True,
    decided: Callable[[Propose], Inferred] | None = None,
) -> tuple[Rules, InferReport]:
    """Returns (the rules that make the source like the target, the report); ``layouts``: see `settled_layouts`.

    ``decided`` returns the mapping that values decide, from a function that proposes one where some pairs are settled.
    """
    ours, theirs = entries(source), entries(target)
    known = {pair.target for pair in settled}

    def propose(more: Sequence[Pair], samples: Mapping[str, Sample] | None = None) -> Inferred:
        every = [*settled, *(pair for pair in more if pair.target not in known)]
        told = [pattern for pattern, _ in layouts]
        return infer(
            ours, theirs, min_confidence=min_confidence, settled=every, layouts=told, words=words, samples=samples
        )

    found = propose(()) if decided is None else decided(propose)
    pairs, doubts = proven(settled_layouts(found.pairs, ours, theirs, layouts), found.doubts)
    used = {key for pair in pairs for key in pair.source}
    left = [entry.key for entry in ours if entry.key not in used]
    every = {entry.key: entry for entry in ours}
    objects = {key for key in source.entries() if key not in every}  # no tensors: they stay where the target has some
    kept = [Pair(key, [key], "rename") for key in target.entries() if key in objects]
    ours += [Entry(key, ()) for key in source.entries() if key in objects]
    made, beyond = expressed([*pairs, *kept], ours, [*theirs, *(Entry(pair.target, ()) for pair in kept)])
    if beyond:
        pairs, doubts, left = _without(beyond, pairs, doubts, [entry.key for entry in ours if entry.key in every])
    report = InferReport(
        source.url, target.url, pairs, doubts, found.only_target, left, min_confidence, made,
        [*root_notes([source, target]), *found.notes],
    )  # fmt: skip
    return Rules.parse(made), report


def proven(pairs: Sequence[Pair], doubts: Sequence[Doubt]) -> tuple[list[Pair], list[Doubt]]:
    """Returns the pairs that rules can make, and the doubts with the others: a wrong layout loads without a word."""
    kept, left = [], [*doubts]
    for pair in pairs:
        if pair.unproven:
            left.append(Doubt(pair.target, [pair], f"{pair.unproven} is not known"))
        elif any(map(keys.is_empty, (pair.target, *pair.source))):
            left.append(Doubt(pair.target, [pair], "rules cannot write a name without a text between its dots"))
        else:
            kept.append(pair)
    return kept, left


def _without(
    beyond: Sequence[Pair], pairs: Sequence[Pair], doubts: Sequence[Doubt], ours: Sequence[str]
) -> tuple[list[Pair], list[Doubt], list[str]]:
    """Returns pairs, doubts and unused keys of the source where no rules can express some pairs."""
    gone = {pair.target for pair in beyond}
    kept = [pair for pair in pairs if pair.target not in gone]
    said = [Doubt(pair.target, [pair], "no rules can say how it is made") for pair in pairs if pair.target in gone]
    used = {key for pair in kept for key in pair.source}
    return kept, [*doubts, *said], [key for key in ours if key not in used]


def entries(checkpoint: Checkpoint) -> list[Entry]:
    """Returns the tensors of a checkpoint's weights that have a shape."""
    found = checkpoint.state_dict().items()
    return [Entry(key, tensor.shape, tensor.dtype) for key, tensor in found if tensor.shape is not None]


LAYOUTS = ("as-is", "transposed", "heads:N", "halves:N", "interleaved:N")
"""How an unproven layout is settled: as it was found; the other way round; what is fused is woven by N heads; of N
rotary heads the target has the two halves, the source pairs of rows; the target has pairs, the source halves."""


def fitting_layouts(unproven: str) -> list[str]:
    """Returns those of `LAYOUTS` that may settle what is not shown of a pair."""
    words = {"transposed": ["transposed"], "head by head": ["heads:N"], "rotary": ["halves:N", "interleaved:N"]}
    return ["as-is", *next((found for word, found in words.items() if word in unproven), LAYOUTS[1:])]


def is_layout(text: str) -> bool:
    """Returns whether a text is one of `LAYOUTS`, with a number for N."""
    name, _, count = text.partition(":")
    known = dict(layout.partition(":")[::2] for layout in LAYOUTS)
    return known.get(name) == re.sub(r"^[1-9]\d{0,8}$", "N", count) and count != "N"


def settled_layouts(
    pairs: Sequence[Pair], source: Sequence[Entry], target: Sequence[Entry], layouts: Sequence[tuple[str, str]]
) -> list[Pair]:
    """Returns the pairs with the layouts that a person settled: (pattern of the target's keys, one of `LAYOUTS`).

    Raises: UsageError for a pattern that fits no key of the target, and a layout that does not fit its tensors.
    """
    made = {pair.target: pair for pair in pairs}
    ours, theirs = ({entry.key: entry.shape for entry in side} for side in (source, target))
    for pattern, how in layouts:
        fitting = {key: made[key].op for key in made if keys.matches(pattern, key)}
        if not any(keys.matches(pattern, key) for key in theirs):
            raise UsageError(f"--layout {pattern} fits no key of the target{keys.near_pattern(pattern, theirs)}")
        if not is_layout(how):
            raise UsageError(f"--layout takes GLOB={', GLOB='.join(LAYOUTS)}, not {how!r}")
        name, _, count = how.partition(":")
        for key in fitting:
            op = _laid_out(made[key].op, name, count, ours[made[key].source[0]])
            changed = replace(made[key], op=op, unproven=None)
            chain(changed, ours, theirs[key])
            made[key] = changed
        if name == "heads" and fitting and all(made[key].op == op for key, op in fitting.items()):
            raise UsageError(f"{how}: nothing of {listed(fitting)} is fused; as-is settles what is not")
    return list(made.values())


def _laid_out(op: str, name: str, count: str, shape: Sequence[int]) -> str:
    """Returns an operation of a source of this shape with a layout settled."""
    steps = [step for step in op.split(";") if step != "rename"]
    if name == "transposed":
        steps = steps[:-1] if steps[-1:] == ["transpose"] else [*steps, "transpose"]
    elif name == "heads":
        steps = [_woven(step, int(count), shape) for step in steps]
    elif name != "as-is":
        steps = [step for step in steps if not step.startswith("rope_")]
        steps.append(f"rope_{'deinterleave' if name == 'halves' else 'interleave'}:0:{count}")
    return ";".join(steps) or "rename"


def _woven(step: str, heads: int, shape: Sequence[int]) -> str:
    """Returns a step, which inside each head is what it was in the whole tensor if it is a split or a concat."""
    name, dim, which = f"{step}::".split(":")[:3]
    if name == "concat":
        return f"groupconcat:{dim}:{heads}"
    if name != "split":
        return step
    part, parts = map(int, which.split("/"))
    size = shape[int(dim)] // heads // parts
    return f"groupslice:{dim}:{heads}:{part * size}:{(part + 1) * size}"
