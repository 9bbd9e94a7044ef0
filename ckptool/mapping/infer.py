"""Infers the mapping from a source's tensors to a target's."""

from __future__ import annotations

from collections.abc import Sequence

from ckptool.core.keys import looking_through
from ckptool.mapping.pairs import DEFAULT_CONFIDENCE, Entry, Inferred, Pair


def infer(
    source: Sequence[Entry],
    target: Sequence[Entry],
    *,
    min_confidence: float = DEFAULT_CONFIDENCE,
    settled: Sequence[Pair] = (),
    words: bool = True,
) -> Inferred:
    """Returns what of the source becomes each tensor of the target.

    ``settled``: pairs that values or a person settled; they are kept as they are, and speak for others. ``words``:
    whether the table of field words is used.
    """
    known = {pair.target: pair for pair in settled}
    plain = looking_through([entry.key for entry in source], [entry.key for entry in target])
    sources = {plain(entry.key): entry for entry in source}
    pairs, alone = [], []
    for entry in target:
        found = sources.get(plain(entry.key))
        if entry.key in known:
            pairs.append(known[entry.key])
        elif found is not None and found.shape == entry.shape:
            pairs.append(Pair(entry.key, [found.key], "rename", 0.9, ["words", "numbers"]))
        else:
            alone.append(entry.key)
    used = {key for pair in pairs for key in pair.source}
    return Inferred(pairs, [], alone, [entry.key for entry in source if entry.key not in used])
