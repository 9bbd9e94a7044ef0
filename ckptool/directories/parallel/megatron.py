"""Megatron-LM's legacy checkpoints: a file of each rank of tensor, pipeline and expert parallelism.

    iter_0000010/mp_rank_TT/model_optim_rng.pt             TT: tensor parallel rank
    iter_0000010/mp_rank_TT_PPP/model_optim_rng.pt         PPP: pipeline stage, if there are several
    iter_0000010/mp_rank_TT_PPP_EEE/model_optim_rng.pt     EEE: expert parallel rank, if there are several (PPP or not)

A file holds ``model``, or ``model0``, ``model1`` ... for the chunks of interleaved pipeline stages: all stages' first
chunks come before their second ones. Source: ``megatron/training/checkpointing.py`` of Megatron-LM (core 0.16).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import islice, product
from typing import Any, NamedTuple

from ckptool.core.checkpoint import Checkpoint, Rank
from ckptool.core.modules import is_module
from ckptool.core.tree import as_mapping, attributes
from ckptool.directories.names import sets_in
from ckptool.directories.parallel.joining import is_model, listing
from ckptool.errors import FormatError, IncompleteError, listed
from ckptool.io.files import is_file, names_in
from ckptool.io.paths import basename, join
from ckptool.io.probe import Probe

LABEL = "megatron"

RANK = re.compile(r"mp_rank_(\d{2,4})(?:_(\d{3,4}))?(?:_(\d{3,4}))?", re.ASCII)
FILES = ("model_optim_rng.pt", "model_rng.pt")
"""Names of a rank's file: the second is of versions whose optimizer had a file of its own."""


def matches(probe: Probe) -> bool:
    """Returns whether it is the directory of an iteration; one of a known loader's files is not."""
    if not probe.is_directory or not any(map(RANK.fullmatch, probe.names)):
        return False
    return not any(found.loader for found in sets_in(probe.names))


def read(probe: Probe, open_: Callable[..., Checkpoint]) -> Checkpoint:
    """Returns the checkpoint that lists each rank's model; of a single rank, its file.

    Raises: IncompleteError if no rank has a file; FormatError, and what opening one raises.
    """
    found = sorted((match[0], match.groups()) for name in probe.names if (match := RANK.fullmatch(name)))
    absent, left = [], []
    ranks: list[_File] = []
    for name, numbers in found:
        path = next((path for path in (join(probe.path, name, one) for one in FILES) if is_file(path)), "")
        if path:
            ranks.append(_File(name, tuple(int(number) for number in numbers if number), open_(path)))
            other = sorted({*names_in(join(probe.path, name))} - {basename(path)})
            left += [f"{name}/{file}" for file in other]
        else:
            absent.append(f"{name}/{FILES[0]}")
    if not ranks:
        raise IncompleteError(f"a Megatron-LM checkpoint without a file of a rank: {listed(absent)}", probe.path)
    left += [name for name in probe.names if not RANK.fullmatch(name)]
    opened = _listed(probe.path, ranks, absent)
    return replace(opened, notes=(*opened.notes, f"also here, and not read: {listed(left)}")) if left else opened


class _File(NamedTuple):
    """A rank's directory, the numbers in its name, and its file."""

    name: str
    numbers: tuple[int, ...]
    checkpoint: Checkpoint

    @property
    def models(self) -> dict[str, Any]:
        """Returns {name: model}, of chunks in their order. Raises: FormatError if there is none."""
        content = as_mapping(self.checkpoint.tree) or {}
        models = {name: content[name] for name in sorted(filter(is_model, content), key=lambda name: (len(name), name))}
        if not models or any(as_mapping(model) is None and not is_module(model) for model in models.values()):
            raise FormatError(f"a file of Megatron-LM without a model: it has {listed(content)}", self.checkpoint.url)
        return models

    @property
    def parts(self) -> dict[str, Checkpoint]:
        """Returns {name: the file with that model at root}."""
        return {name: replace(self.checkpoint, root=(name,)) for name in self.models}

    def size(self, name: str) -> int:
        """Returns a number of the arguments of the run; 0 if it is not there."""
        args = (as_mapping(self.checkpoint.tree) or {}).get("args")
        found = (args if isinstance(args, Mapping) else attributes(args)).get(name)
        return found if type(found) is int and 0 < found < 100_000 else 0


def _listed(directory: str, files: Sequence[_File], absent: list[str]) -> Checkpoint:
    first = files[0]
    sizes = [first.size(f"{kind}_model_parallel_size") for kind in ("tensor", "pipeline", "expert")]
    width = max(len(file.numbers) for file in files)
    kinds = [0, 2] if width == 2 and _are_experts(files, sizes[1], sizes[2]) else [0, 1, 2][:width]
    at = {tuple(dict(zip(kinds, file.numbers, strict=False)).get(kind, 0) for kind in range(3)): file for file in files}
    if len(at) < len(files) or any(len(file.numbers) < width for file in files):
        names = listed(file.name for file in files)
        raise FormatError(f"ranks of two runs, whose names do not go together: {names}", directory)
    counts = [max(max(place[kind] for place in at) + 1, sizes[kind] if kind in kinds else 0) for kind in range(3)]
    missing = counts[0] * counts[1] * counts[2] - len(at)
    if missing:  # of names such as mp_rank_9999_9999 only a few are looked for
        places = (place for place in product(*map(range, counts)) if place not in at)
        gone = [f"{_name([place[kind] for kind in kinds])}/{FILES[0]}" for place in islice(places, 8)]
        absent = [*gone, *(f"{missing - len(gone):,} more" for _ in range(missing > len(gone)))]
    problems = [f"missing ranks: {', '.join(absent)}"] if absent else []
    ranks: list[Rank] = []
    tree: dict[str, Any] = {}
    for (tensor, stage, expert), file in at.items():
        models, parts = file.models, file.parts
        for name, part in parts.items():
            called = file.name if len(models) == 1 else f"{file.name}/{name}"
            chunk = int(name.removeprefix("model") or 0)
            ranks.append(Rank(called, tensor, chunk * counts[1] + stage, part, expert))
        tree[file.name] = next(iter(models.values())) if len(models) == 1 else models
    if len(ranks) == 1 and not problems:
        return replace(first.checkpoint, format=LABEL)
    return listing(LABEL, directory, ranks, tree, (file.checkpoint for file in files), problems)


def _are_experts(files: Sequence[_File], stages: int, experts: int) -> bool:
    """Returns whether the second number of a name is that of experts: by the arguments of the run, else by the keys.

    The first stage has embeddings and the last one what follows the layers; ranks of experts have the same keys.
    """
    if stages or experts:
        return stages == 1 or (not stages and experts > 1)
    first, last = (list(file.parts.values()) for file in (files[0], files[-1]))
    return len(files) > 1 and [one.entries().keys() for one in first] == [one.entries().keys() for one in last]


def _name(numbers: Sequence[int]) -> str:
    return "_".join([f"mp_rank_{numbers[0]:02d}", *(f"{number:03d}" for number in numbers[1:])])
