"""What is known of two checkpoints whose keys differ, and what was found: pairs, and keys left out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

Sample = tuple[float, float, float]
"""The mean of a vector's elements, their standard deviation, and the least of them."""

WITNESSES = (
    "words", "order", "numbers", "neighbours", "roles", "only one of its shape", "few of its shape", "values",
    "a person",
)  # fmt: skip
"""What can speak for a pair. Two are enough for the default, or one of the last two; and order is not enough against a
sibling, where the siblings have names."""

DEFAULT_CONFIDENCE = 0.8
"""Pairs with less are left out and listed."""


class Entry(NamedTuple):
    """A tensor of either side. Entries come in the order in which their checkpoint lists them."""

    key: str
    shape: tuple[int, ...]
    dtype: str = "float32"


@dataclass(frozen=True, slots=True)
class Pair:
    """One tensor of the target, and what it is made from."""

    target: str
    """The key in the target."""
    source: list[str]
    """The keys of the source that it is made from: several are put together in this order."""
    op: str
    """How it is made, in the grammar of ``op``: ``rename``, ``transpose``, ``split:0:1/3``, ``concat:0`` and so on."""
    confidence: float = 1.0
    """From 0 to 1; 1 only where values or a person settled it."""
    witnesses: list[str] = field(default_factory=list)
    """What speaks for it, see WITNESSES."""
    unproven: str | None = None
    """What names and shapes cannot show of ``op``, though the sources are certain: a transposed square matrix, the row
    order of rotary heads."""


@dataclass(frozen=True, slots=True)
class Doubt:
    """A tensor of the target that was left out because what it is made from is not certain enough."""

    target: str
    """The key in the target."""
    candidates: list[Pair]
    """What it could be made from, best first."""
    reason: str
    """Why none of them was taken."""


@dataclass(frozen=True, slots=True)
class Inferred:
    """The mapping from a source to a target, as far as it was found."""

    pairs: list[Pair]
    """One per tensor of the target that is certain enough, in the target's order."""
    doubts: list[Doubt]
    """The tensors of the target that have candidates, of which none is certain enough."""
    only_target: list[str]
    """Keys of the target that nothing of the source could become."""
    only_source: list[str]
    """Keys of the source that no pair uses."""
    notes: list[str] = field(default_factory=list)
    """What else was noticed."""
