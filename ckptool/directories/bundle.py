"""Several checkpoints in one: a zip archive of torch's files, or a diffusers pipeline.

    ppo.zip     policy.pth, policy.optimizer.pth, data, ...         (Stable-Baselines3; not compressed)
    DIR         model_index.json, unet/, vae/, text_encoder/, ...   (each a directory of weights)

The tree has each of them below its name, so that ``--root policy.pth`` or ``--root unet`` chooses one.
Sources: ``common/save_util.py`` of stable-baselines3 2.7; ``pipelines/pipeline_utils.py`` of diffusers 0.42.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from ckptool.core import aliases
from ckptool.core.checkpoint import Checkpoint
from ckptool.directories import sets
from ckptool.directories.names import WEIGHTS, sets_in
from ckptool.errors import CkptoolError, listed
from ckptool.io.archives import HEAD, MOST_MEMBERS
from ckptool.io.paths import join
from ckptool.io.probe import Probe
from ckptool.io.source import Section, locate
from ckptool.pickling.streams import CHECKPOINTS

LABEL = "bundle"

Open = Callable[..., Checkpoint]


def matches(probe: Probe) -> bool:
    """Returns whether it is a pipeline of several models, or a zip archive with stored checkpoints in it."""
    if probe.is_directory:
        return len(sets.components(probe.path, probe.names)) > 1 and not sets_in(probe.names)
    return not isinstance(probe.file, Section) and next(_sections(probe), None) is not None


def read(probe: Probe, open_: Open) -> Checkpoint | None:
    """Returns the checkpoint of all of them, the headers of each read; None of a zip archive if none can be read.

    Raises: as what opens each of them; for a zip, of a member whose name is that of weights.
    """
    if probe.is_directory:
        names = sets.components(probe.path, probe.names)
        parts = {name: open_(join(probe.path, name)) for name in names}
        return _joined(probe, parts, [name for name in probe.names if name.endswith(WEIGHTS)])
    parts, left = {}, dict.fromkeys(probe.members, "")
    for name, section in _sections(probe):
        try:
            parts[name] = open_(probe.path, lambda _, section=section: section)
            del left[name]
        except CkptoolError as error:
            left[name] = f" ({error.message})"
            if name.lower().endswith(WEIGHTS):
                error.message = f"{name}: {error.message}"
                raise
    return _joined(probe, parts, [f"{name}{why}" for name, why in left.items()]) if parts else None


def _sections(probe: Probe) -> Iterator[tuple[str, Section]]:
    """Yields (name, content) of the stored members of a zip archive that may be checkpoints, by their first bytes."""
    for name, member in islice(probe.members.items(), MOST_MEMBERS):
        if member.span.member == "stored" and member.span.nbytes > HEAD:
            span = locate(probe.file, member.span)
            head = probe.file.read(span.offset, HEAD)
            if head.startswith(CHECKPOINTS) or (head[8:9] == b"{" and not any(head[5:8])):
                yield name, Section(probe.file, span.offset, span.nbytes)


def _joined(probe: Probe, parts: dict[str, Checkpoint], left: list[str]) -> Checkpoint:
    """Returns the checkpoint with each part below its name, a single one as it is; ``left``: what was not read."""
    metadata: dict[str, str] = {}
    differ: list[str] = []
    for name, part in parts.items():
        metadata, other = aliases.joined(metadata, part.metadata)
        differ += [f"{name}: {key}" for key in other]

    def said(what: str) -> tuple[str, ...]:
        found = {name: getattr(part, what) for name, part in parts.items()}
        every = {name: (text,) if isinstance(text, str) else text for name, text in found.items()}
        return tuple(f"{name}: {text}" for name, texts in every.items() for text in texts if text)

    notes = [*said("notes"), f"in it: {listed(parts, 20)}" + "; --root chooses one" * (len(parts) > 1)]
    notes += [f"metadata of which another one's was taken: {listed(differ)}"] if differ else []
    notes += [f"also in it, and not read: {listed(left, 20)}"] if left else []
    trees: dict[str, Any] = {name: part.tree for name, part in parts.items()}
    return Checkpoint(
        trees if len(trees) > 1 else next(iter(trees.values())),
        format=LABEL,
        url=probe.path,
        nbytes=probe.size or sum(part.nbytes for part in parts.values()),
        metadata=metadata,
        names=tuple(dict.fromkeys(name for part in parts.values() for name in part.names)),
        problems=said("problems"),
        broken=any(part.broken for part in parts.values()),
        trailing="; ".join(said("trailing")),
        notes=tuple(notes),
    )
