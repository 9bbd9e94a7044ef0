"""Which tensors of two checkpoints are the same: names propose, and values decide where both sides have them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ckptool.core.checkpoint import Checkpoint

if TYPE_CHECKING:
    from ckptool.mapping.like import Propose
    from ckptool.mapping.pairs import Inferred
    from ckptool.mapping.values import Settled


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
        return checked(propose(settled.pairs, looks), settled, ours, theirs, evidence), settled
