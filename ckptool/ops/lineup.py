"""Whose an optimizer's states are, read from their shapes: torch saves them by position, group after group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ckptool.checkpoint import TensorInfo
from ckptool.tree import as_mapping

Shape = tuple[int, ...]

PER_ELEMENT = frozenset({
    "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "momentum_buffer", "square_avg", "acc_delta", "grad_avg",
    "sum", "ax", "prev", "step_size",
})  # fmt: skip
"""Names of the state tensors of torch's optimizers that have their parameter's shape, where they are tensors."""

MAX_WAYS = 2_000
"""Ways to put groups together that are followed at a time; with more of them the shapes say too little anyway."""


def state_shape(entry: Any) -> tuple[int, ...] | None:
    """Returns the shape of the parameter that a state belongs to; None where the state does not say."""
    for name, value in (as_mapping(entry) or {}).items():
        if name in PER_ELEMENT and isinstance(value, TensorInfo):
            return value.shape
    return None


def interleaved(groups: Sequence[Sequence[Shape | None]], whole: Sequence[Shape | None]) -> list[int] | None:
    """Returns the position in ``whole`` of each place of the groups; None unless there is exactly one way.

    Each group is a part of ``whole`` in its order, all of them together are ``whole``; None among a group's shapes
    stands for any. Groups by position are like that: decay and no decay, backbone and head.

    >>> interleaved([[(2, 2), (3, 2)], [(2,), (3,)]], [(2, 2), (2,), (3, 2), (3,)])
    [0, 2, 1, 3]
    """
    # For each step: how far every group has got -> (ways to get there, the group that was taken last).
    steps: list[dict[tuple[int, ...], tuple[int, int]]] = [{(0,) * len(groups): (1, -1)}]
    for shape in whole:
        after: dict[tuple[int, ...], tuple[int, int]] = {}
        for reached, (ways, _) in steps[-1].items():
            for at, group in enumerate(groups):
                if reached[at] < len(group) and group[reached[at]] in (shape, None):
                    nearer = (*reached[:at], reached[at] + 1, *reached[at + 1 :])
                    after[nearer] = (ways + after.get(nearer, (0, 0))[0], at)
        if len(after) > MAX_WAYS:
            return None
        steps.append(after)
    reached = tuple(map(len, groups))
    if steps[-1].get(reached, (0, 0))[0] != 1:
        return None
    found: list[list[int]] = [[] for _ in groups]
    for number in reversed(range(len(whole))):
        at = steps[number + 1][reached][1]
        found[at].insert(0, number)
        reached = (*reached[:at], reached[at] - 1, *reached[at + 1 :])
    return [number for group in found for number in group]
