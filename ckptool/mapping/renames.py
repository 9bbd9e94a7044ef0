"""Which tensors another checkpoint has under other names, by their place in the model: for `diff`.

`infer` finds pairs for somebody who looks at them. Here nobody does, and most names of both sides agree: so more is
asked of a pair. A module that has another name is gone under its old one and new under its new one, and what it holds
went with it.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

from ckptool.core.checkpoint import Checkpoint
from ckptool.core.keys import moves
from ckptool.mapping.infer import infer
from ckptool.mapping.like import proven
from ckptool.mapping.matching.names import says_fused, segment
from ckptool.mapping.pairs import DEFAULT_CONFIDENCE, Entry, Pair
from ckptool.mapping.rules import Rule, rules_of


def renamed(
    source: Sequence[Entry],
    target: Sequence[Entry],
    known: Mapping[str, str],
    alone: tuple[Collection[str], Collection[str]],
    is_same: Callable[[str, str], bool],
) -> tuple[list[Pair], list[Pair], list[Pair]]:
    """Returns (pairs of keys that only one side has, what `remap --like` makes of other keys that only the target has).

    The third is what it makes where a person says how rows lie.
    ``known``: {key of the source: key of the target} of what both have. Of the others, ``alone``, two are a pair if
    that is sure and `is_same` says that they are tensors of one form. Names that differ in numbers alone are none:
    ``layers.8.up`` that is gone and ``layers.9.up`` that is new look like one too. Cost: that of `infer`.
    """
    inferred = infer(source, target)
    found, doubts = proven(inferred.pairs, inferred.doubts)
    ours, theirs = ({*side} for side in alone)
    plain = [
        pair for pair in found
        if pair.op == "rename" and pair.source[0] in ours and pair.target in theirs and pair.witnesses
        and is_same(pair.source[0], pair.target) and not _is_renumbered(pair.source[0], pair.target)
    ]  # fmt: skip
    kept = _together(_of_one_layout(plain, {entry.key: entry.shape for entry in source}), known)
    open_ = theirs - {pair.target for pair in kept}
    best = [doubt.candidates[0] for doubt in doubts if doubt.candidates]
    left = [pair for pair in best if pair.unproven and pair.confidence >= DEFAULT_CONFIDENCE]
    made, unproven = ([pair for pair in some if pair.target in open_] for some in (found, left))
    return kept, made, unproven


def _is_renumbered(old: str, new: str) -> bool:
    """Returns whether names differ in numbers alone, but for what is before all of the one."""
    frames = (re.sub("[0-9]+", "#", module) for module in next(moves(old, new), (old, new)))
    short, long = sorted(frames, key=len)
    return bool(short) and (long == short or long.endswith(f".{short}"))


def _together(pairs: Sequence[Pair], known: Mapping[str, str]) -> list[Pair]:
    """Returns the pairs whose modules went where most of what they hold went, on both sides.

    ``layers.9.up`` is no ``layers.8.up`` where ``layers.9.gate`` is still there.
    """
    went: dict[str, Counter[str]] = defaultdict(Counter)
    came: dict[str, Counter[str]] = defaultdict(Counter)
    for old, new in (*known.items(), *((pair.source[0], pair.target) for pair in pairs)):
        for before, after in _modules(old, new):
            went[before][after] += 1
            came[after][before] += 1

    def is_first(votes: Counter[str], name: str) -> bool:
        return all(count < votes[name] for other, count in votes.items() if other != name)

    def is_sure(old: str, new: str) -> bool:
        moved = [*moves(old, new)]
        if moved and _is_around(*moved[0]):  # only what is inside a module moved
            del moved[0]
        return all(is_first(went[before], after) and is_first(came[after], before) for before, after in moved)

    return [pair for pair in pairs if is_sure(pair.source[0], pair.target)]


def _modules(old: str, new: str) -> Iterator[tuple[str, str]]:
    """Yields the modules of two keys that hold them under one name."""
    if old == new:
        parts = old.split(".")
        yield from ((module, module) for at in range(1, len(parts)) for module in [".".join(parts[:at])])
    else:
        yield from moves(old, new)


def _is_around(one: str, other: str) -> bool:
    """Returns whether one module is inside the other, or all of the checkpoint."""
    short, long = sorted((one, other), key=len)
    return not short or long.startswith(f"{short}.")


def _of_one_layout(pairs: Sequence[Pair], shapes: Mapping[str, Sequence[int]]) -> list[Pair]:
    """Returns the pairs without projections to queries, keys and values in one that have another name.

    Their rows may lie one behind the other or head by head, which no name shows.
    """

    def is_fused(module: str) -> bool:
        rows, *more = shapes.get(f"{module}.weight") or (0,)
        return len(more) == 1 and rows == 3 * more[0]

    def may_differ(old: str, new: str) -> bool:
        module, other = old.rpartition(".")[0], new.rpartition(".")[0]
        one, two = module.rpartition(".")[2], other.rpartition(".")[2]
        return one != two and (is_fused(module) or says_fused(segment(one)) or says_fused(segment(two)))

    return [pair for pair in pairs if not may_differ(pair.source[0], pair.target)]


def renaming(source: Checkpoint, names: Mapping[str, str]) -> list[Rule]:
    """Returns the rules that give keys of the source other ``names``, {key: name}; all others keep theirs.

    Raises: UsageError for names that no rules can write.
    """
    tensors = source.state_dict()
    ours = [Entry(key, (tensors[key].shape if key in tensors else None) or ()) for key in source.entries()]
    pairs = [Pair(names.get(entry.key, entry.key), [entry.key], "rename") for entry in ours]
    return rules_of(pairs, ours, [Entry(pair.target, entry.shape) for pair, entry in zip(pairs, ours, strict=True)])
