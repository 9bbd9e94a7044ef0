"""What `filter` and `load-partial` do with ``auto_remap``: names are mapped first, and the rows say how surely."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ckptool.core import keys
from ckptool.core.checkpoint import Checkpoint
from ckptool.core.tensor import TensorInfo
from ckptool.mapping.infer import infer
from ckptool.mapping.like import entries, proven
from ckptool.mapping.pairs import DEFAULT_CONFIDENCE, Doubt, Entry, Pair
from ckptool.mapping.rules import expressed
from ckptool.ops.remap import remap
from ckptool.ops.rows import LOADED, Row, dims
from ckptool.ops.rules import Rules


@dataclass(frozen=True, slots=True)
class Mapped:
    """A source under the names of a target, by names and shapes."""

    checkpoint: Checkpoint
    """The source after the rules."""
    origins: dict[str, str]
    """{key after the rules: keys before}."""
    pairs: dict[str, Pair]
    """{key of the target: what it is made from}, where that is not the key of its own name as it is."""
    doubts: dict[str, Doubt]
    """{key of the target: why it was left out}."""
    dropped: list[Row]
    """Rows of the source's tensors that no pair uses, and whose names stand for others in the target."""

    def told(self, rows: Sequence[Row]) -> list[Row]:
        """Returns the rows with confidence and witnesses of the pairs, what is in doubt, and what was dropped."""
        return [*map(self._told, rows), *self.dropped]

    def _told(self, row: Row) -> Row:
        pair, doubt = self.pairs.get(row.key), self.doubts.get(row.key)
        if pair and row.source and row.reason in LOADED:
            how = None if pair.op == "rename" else pair.op
            said = "; ".join(filter(None, (row.detail, how)))
            return replace(row, confidence=pair.confidence, witnesses=pair.witnesses, detail=said or None)
        if doubt and row.reason in ("missing", "initialised"):
            could = " or ".join(" + ".join(one.source) for one in doubt.candidates[:3])
            said = f"in doubt: could be {could or 'nothing'}; {doubt.reason}"
            return replace(row, detail=said if row.reason == "missing" else f"{row.detail}; {said}")
        return row


def mapped(source: Checkpoint, target: Checkpoint) -> Mapped:
    """Returns a source with the keys that are surely ones of the target under their names.

    What no pair uses keeps its name, so that it is reported and may be adapted; it goes where a tensor of the target
    has that name, which it surely is not.
    """
    ours, theirs = entries(source), entries(target)
    found = infer(ours, theirs, min_confidence=DEFAULT_CONFIDENCE)
    pairs, doubts = proven(found.pairs, found.doubts)
    used = {key for pair in pairs for key in pair.source}
    made = {keys.unwrapped(pair.target) for pair in pairs}
    shapes = {keys.unwrapped(entry.key): entry.shape for entry in theirs}
    every = {entry.key for entry in ours}
    ours += [Entry(key, ()) for key in source.entries() if key not in every]
    kept, dropped = [], []
    tensors = source.state_dict()
    for entry in ours:
        name = keys.unwrapped(entry.key)
        if entry.key in used:
            continue
        if (
            not keys.is_empty(entry.key)
            and name not in made
            and (entry.key not in every or shapes.get(name) != entry.shape)
        ):
            kept.append(Pair(entry.key, [entry.key], "rename"))
        else:
            detail = "its name is another tensor's in the target" if name in made else "it is in doubt"
            dropped.append(_dropped(entry.key, tensors.get(entry.key), detail))
    names = {entry.key for entry in theirs}
    shaped = {entry.key: entry for entry in ours}
    rules, beyond = expressed([*pairs, *kept], ours, [*theirs, *(shaped[one.target] for one in kept)])
    gone = {pair.target for pair in beyond}
    doubts += [Doubt(one.target, [one], _BEYOND) for one in pairs if one.target in gone]
    pairs = [one for one in pairs if one.target not in gone]
    dropped += [_dropped(one.target, tensors.get(one.target), _BEYOND) for one in kept if one.target in gone]
    changed, report = remap(source, Rules.parse(rules))
    origins = {row.new: " + ".join(row.old) for row in report.map}
    moved = {one.target: one for one in pairs if one.source != [one.target] or one.op != "rename"}
    return Mapped(changed, origins, moved, {one.target: one for one in doubts if one.target in names}, dropped)


_BEYOND = "no rules can say how it is made"


def _dropped(key: str, tensor: TensorInfo | None, detail: str) -> Row:
    shape, dtype = (None, None) if tensor is None else (dims(tensor), tensor.dtype)
    return Row(key, "unexpected", shape, dtype=dtype, detail=detail)
