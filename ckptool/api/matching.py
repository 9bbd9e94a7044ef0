"""Which tensors of two checkpoints are the same: names propose, and values decide where both sides have them."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ckptool.core import keys
from ckptool.core.checkpoint import Checkpoint
from ckptool.core.tensor import TensorInfo
from ckptool.errors import UsageError, one_of

# Operations and mappings are imported by the functions that use them: a command needs one or two of them.
if TYPE_CHECKING:
    from ckptool.mapping.like import Propose
    from ckptool.mapping.pairs import Inferred
    from ckptool.mapping.values import Settled
    from ckptool.ops import diff as op


def decided_by_values(
    source: Checkpoint,
    target: Checkpoint,
    propose: Propose,
    progress: Callable[[int], None] | None = None,
) -> tuple[Inferred, Settled]:
    """Returns (the mapping, what values settled of it); ``propose`` makes it from the pairs that values settled.

    Both sides are read once, a block at a time; what is transposed or put together is read again, to prove it. Where
    most of the target is settled, the pairs that names propose are compared too (see `ckptool.mapping.values.checked`).
    A target without values, such as a lock file or a model in code, settles nothing; of the source only vectors are
    read, which look like what they are: the weights of norms, biases, variances.
    """
    from ckptool.io.files import Files
    from ckptool.mapping.values import checked, settle
    from ckptool.values.fingerprints.evidence import ValueEvidence
    from ckptool.values.fingerprints.samples import samples

    ours, theirs = source.state_dict(), target.state_dict()
    with Files(progress) as files:
        evidence = ValueEvidence(ours, theirs, files)
        settled = settle(ours, theirs, evidence)
        looks = samples(ours, files) if len(evidence.unread) == len(theirs) else {}
        found = checked(propose(settled.pairs, looks), settled, ours, theirs, evidence)
        return replace(found, notes=settled.notes), settled


MOST_KEYS, MOST_NAMES, MOST_SINGLE = 20_000, 200, 1_000
"""A mapping that nobody asked for is found among so many keys of a side, names without their numbers, and keys whose
names have several shapes: blocks that do not repeat take longest. That takes some seconds."""


def is_soon(*sides: op.Tensors) -> bool:
    """Returns whether the mapping between these tensors is found soon."""
    for side in sides:
        if len(side) > MOST_KEYS:
            return False
        shapes: dict[str, Counter[object]] = defaultdict(Counter)
        for key, tensor in side.items():
            shapes[re.sub("[0-9]+", "", key)][tensor.shape] += 1
        single = sum(found.total() for found in shapes.values() if len(found) > 1)
        if len(shapes) > MOST_NAMES or single > MOST_SINGLE:
            return False
    return True


def can_remap(source: Checkpoint) -> bool:
    """Returns whether `remap` writes such a checkpoint: it writes no nested containers."""
    from ckptool.core import modules
    from ckptool.core.roots import is_flat

    node = source.at(source.root)
    return modules.is_module(node) or is_flat(node)


RENAMES = ("structure", "values", "off")
"""How `diff` finds tensors under other names: by equal values and by their place, by equal values alone, or not."""


def renames(a: Checkpoint, b: Checkpoint, how: str | None, values: bool) -> op.Renames | None:
    """Returns what finds the tensors that B has under other names; None for nothing.

    ``how``: one of `RENAMES`; None is by structure, within bounds. ``values``: whether values are compared.
    Raises: UsageError.
    """
    if how is not None and one_of(RENAMES, how, "--renames") == "values" and not values:
        raise UsageError("--renames values needs --values or --quick")

    def find(
        alone_a: op.Tensors, alone_b: op.Tensors, both: Mapping[str, str]
    ) -> tuple[Sequence[op.Renamed], Sequence[str]]:
        rows = _by_values(alone_a, alone_b) if values else []
        found: Sequence[op.Renamed] = ()
        notes: Sequence[str] = ()
        if how != "values":
            known = {**both, **{row.a: row.b for row in rows}}
            found, notes = _by_structure(a, b, alone_a, alone_b, known, how is None, values)
        rows += [*found, *_counters(alone_a, alone_b, [*rows, *found])]
        order = {key: at for at, key in enumerate(a.state_dict())}
        return sorted(rows, key=lambda row: order.get(row.a, len(order))), notes

    return None if how == "off" else find


def _by_values(a: op.Tensors, b: op.Tensors) -> list[op.Renamed]:
    from ckptool.io.files import Files
    from ckptool.ops.diff import Renamed
    from ckptool.values.fingerprints.renames import renamed_by_values

    one, other = ({key: tensor for key, tensor in side.items() if not keys.is_counter(key)} for side in (a, b))
    with Files() as files:
        found = renamed_by_values(one, other, files)
    return [Renamed(old, old, new, "values", 1.0, ["values"]) for old, new in found]


def _by_structure(
    a: Checkpoint, b: Checkpoint, alone_a: op.Tensors, alone_b: op.Tensors, known: Mapping[str, str], bounded: bool,
    values: bool,
) -> tuple[list[op.Renamed], list[str]]:  # fmt: skip
    """Returns (renames by structure, notes); ``known``: {key of A: key of B} of what both have, or has another name."""
    ours, theirs = a.state_dict(), b.state_dict()
    taken = {*known.values()}
    left = (
        [key for key in alone_a if key not in known and key in ours and not keys.is_counter(key)],
        [key for key in alone_b if key not in taken and key in theirs and not keys.is_counter(key)],
    )
    if not all(left):
        return [], []
    if bounded and not is_soon(ours, theirs):
        forms = [
            {(side[key].shape, side[key].dtype) for key in some}
            for side, some in zip((ours, theirs), left, strict=True)
        ]
        said = "renames were not looked for by structure among so many keys: --renames structure does"
        return [], [said] * bool(forms[0] & forms[1])
    from ckptool.mapping.like import entries
    from ckptool.mapping.renames import renamed
    from ckptool.ops.diff import Renamed

    def is_same(old: str, new: str) -> bool:
        return _is_same(ours[old], theirs[new], values)

    pairs, made, unproven = renamed(entries(a), entries(b), known, left, is_same)
    rows = [
        Renamed(key, key, pair.target, "structure", pair.confidence, pair.witnesses)
        for pair in pairs for key in pair.source
    ]  # fmt: skip
    how = [f"{len(some):,}{text}" for some, text in ((made, ""), (unproven, " with --layout")) if some]
    said = f"of the keys only in B, remap --like {b.url} would make {' and '.join(how)}"
    return rows, [said] * bool(how and can_remap(a))


def _is_same(one: TensorInfo, other: TensorInfo, values: bool) -> bool:
    """Returns whether two tensors have one form, so that they can be one under two names."""
    described = one.described_in or other.described_in or (not values and "meta" in (one.kind, other.kind))
    return one.dtype == other.dtype and (one.shape == other.shape if described else one.form == other.form)


def _counters(a: Iterable[str], b: Collection[str], rows: Sequence[op.Renamed]) -> list[op.Renamed]:
    """Returns the renames of counters, which follow their module."""
    modules = {row.a.rpartition(".")[0]: row for row in reversed(rows)}
    found = []
    for key in a:
        module, _, name = key.rpartition(".")
        row = modules.get(module)
        if row and keys.is_counter(key) and (new := f"{row.b.rpartition('.')[0]}.{name}") in b:
            found.append(replace(row, key=key, a=key, b=new, by="structure", witnesses=["neighbours"]))
    return found


def renaming(
    a: Checkpoint, b: Checkpoint, report: op.DiffReport, strip_a: Sequence[str], strip_b: Sequence[str]
) -> list[dict[str, Any]]:
    """Returns the rules that give A's keys the names that B has for them, as `diff` with these prefixes found.

    Raises: UsageError for names that no rules can write.
    """
    from ckptool.mapping.renames import renaming
    from ckptool.ops.diff import in_both

    return renaming(a, in_both(a, b, strip_a, strip_b) | {row.a: row.b for row in report.renamed})
