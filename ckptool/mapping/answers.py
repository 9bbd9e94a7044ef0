"""What a person is asked about a mapping, and the answers as pairs that are settled."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace

from ckptool.core import keys
from ckptool.errors import UsageError
from ckptool.mapping.chains import chain
from ckptool.mapping.infer import unproven
from ckptool.mapping.like import LAYOUTS, InferReport, Question, is_layout, questions, settled_layouts
from ckptool.mapping.matching.layouts import op_of
from ckptool.mapping.pairs import Entry, Pair
from ckptool.ops import segments

Asked = tuple[str, bool]
"""A key of the target, and whether its layout was asked for, or its source."""


def left(found: InferReport, asked: Collection[Asked]) -> Iterator[tuple[Question, bool]]:
    """Yields (question, whether it is of a layout) for what is in doubt and was not asked: the sources come first.

    What has one layout, as the pieces of one tensor have, is one question.
    """
    layouts = {pair.target: pair.unproven for pair in found.unproven}
    open_ = [one for one in found.doubts if (one.target, one.target in layouts) not in asked]
    for question in questions([one for one in open_ if one.target not in layouts]):
        yield question, False
    for text in dict.fromkeys(layouts.values()):
        alike: dict[str, list[Question]] = {}
        for question in questions([one for one in open_ if layouts.get(one.target) == text]):
            alike.setdefault(question.candidates[0], []).append(question)
        for source, some in alike.items():
            names = ", ".join(question.target for question in some)
            yield Question(names, [source], [doubt for question in some for doubt in question.doubts]), True


def answered(question: Question, is_of_layout: bool, text: str, ours: list[Entry], theirs: list[Entry]) -> list[Pair]:
    """Returns the pairs that an answer settles.

    It is the number of a candidate, counted from 1, or a key of the source with ``{i}`` as in the question; or one of
    `LAYOUTS`. Raises: UsageError if it is none, or does not fit.
    """
    if is_of_layout:
        if not is_layout(text):
            raise UsageError(f"expected {', '.join(LAYOUTS)}, not {text!r}")
        best = [doubt.candidates[0] for doubt in question.doubts]
        made = settled_layouts(best, ours, theirs, [("*", text)])
    elif text.isdecimal():
        if not 0 < int(text[:9]) <= len(question.candidates):
            raise UsageError(f"there is no candidate {text}")
        made = [doubt.candidates[int(text) - 1] for doubt in question.doubts]
    else:
        made = _typed(question, text, ours, theirs)
    return [replace(pair, confidence=1.0, witnesses=["a person"]) for pair in made]


def _typed(question: Question, text: str, ours: list[Entry], theirs: list[Entry]) -> list[Pair]:
    """Returns the pairs of the source's keys that a pattern stands for."""
    sources, targets = ({entry.key: entry for entry in side} for side in (ours, theirs))
    fill = segments.renamer(question.target, text)
    made = []
    for doubt in question.doubts:
        key = fill(doubt.target)
        if key not in sources:
            raise UsageError(f"the source has no key {key}{keys.near_pattern(key, sources)}")
        one, other = sources[key], targets[doubt.target]
        op = op_of(one.shape, other.shape)
        if op is None:
            raise UsageError(f"{key} has shape {list(one.shape)}, {other.key} wants {list(other.shape)}")
        pair = Pair(other.key, [key], op or "rename", unproven=unproven(one, other, [*ours, *theirs]))
        chain(pair, {key: one.shape}, other.shape)
        made.append(pair)
    if len(made) > 1 and len({pair.source[0] for pair in made}) == 1:
        raise UsageError(f"{text} is one key for {len(made)}: write it with the numbers as in {question.target}")
    return made
