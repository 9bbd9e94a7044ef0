"""Which tensors of two checkpoints are the same: names propose, and values decide where both sides have them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ckptool.core.checkpoint import Checkpoint

if TYPE_CHECKING:
    from ckptool.mapping.pairs import Inferred, Pair
    from ckptool.mapping.values import Settled


def decided_by_values(
    source: Checkpoint,
    target: Checkpoint,
    propose: Callable[[Sequence[Pair]], Inferred],
    progress: Callable[[int], None] | None = None,
) -> tuple[Inferred, Settled]:
    """Returns (the mapping, what values settled of it); ``propose`` makes it from the pairs that values settled.

    Both sides are read once, a block at a time; what is transposed or put together is read again, to prove it. Where
    most of the target is settled, the pairs that names propose are compared too (see `ckptool.mapping.values.checked`).
    A target without values, such as a lock file or a model in code, settles nothing, and no side is read.
    """
    from ckptool.io.files import Files
    from ckptool.mapping.values import checked, settle
    from ckptool.values.fingerprints.evidence import ValueEvidence

    ours, theirs = source.state_dict(), target.state_dict()
    with Files(progress) as files:
        evidence = ValueEvidence(ours, theirs, files)
        settled = settle(ours, theirs, evidence)
        return checked(propose(settled.pairs), settled, ours, theirs, evidence), settled
