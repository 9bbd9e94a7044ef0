"""The function of `import ckptool` that finds which tensors of a checkpoint become which of another: infer."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from ckptool.api.sources import Pairs, Source, open_whole
from ckptool.core import keys
from ckptool.ops.notes import require_tensors

if TYPE_CHECKING:
    from ckptool.mapping.like import InferReport
    from ckptool.mapping.pairs import Pair
    from ckptool.ops.rules import Rules
    from ckptool.saving import Progress


def infer(
    source: Source,
    target: Source,
    *,
    min_confidence: float | None = None,
    settled: Sequence[Pair] = (),
    layout: Pairs = (),
    words: bool = True,
    values: bool = True,
    progress: Progress | None = None,
) -> tuple[Rules, InferReport]:
    """Returns (rules for `remap`, report): which tensors of the source become which of the target, named differently.

    A pair has a confidence from 0 to 1, and witnesses; those with less than ``min_confidence`` (None: 0.8) are left
    out, and listed with their candidates. ``settled``: pairs that are known; they stay, and speak for others.
    ``layout`` {pattern of the target's keys: how} settles what names and shapes cannot show, see
    `ckptool.mapping.like.LAYOUTS`. ``words``: whether the table of field words is used. ``remap(source, rules)`` gives
    exactly the tensors of the pairs. ``values``: equal and near tensors decide, where both sides have values, which are
    read; else headers only. ``progress`` is called with the bytes as they are read.

    Raises: what `open` raises, NoTensorsError, UsageError for a layout that does not fit.
    """
    from ckptool.mapping.like import inferred
    from ckptool.mapping.pairs import DEFAULT_CONFIDENCE

    least = DEFAULT_CONFIDENCE if min_confidence is None else min_confidence
    keys.expect_numbers(0, min_confidence=least)
    ours, theirs = open_whole(source), open_whole(target)
    for side in (ours, theirs):
        require_tensors(side)
    layouts = keys.pairs(layout, "layout", "layout")
    how = partial(inferred, ours, theirs, min_confidence=least, settled=settled, layouts=layouts, words=words)
    if not values:
        return how()
    from ckptool.api.matching import decided_by_values

    return how(decided=lambda propose: decided_by_values(ours, theirs, propose, progress)[0])
