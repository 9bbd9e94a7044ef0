"""Meta's own layout of Llama, and what follows it: the pieces of each rank in a file, ``consolidated.00.pth`` ...

A single file is read as any other. Source: ``llama/generation.py`` of Meta's repository (``Llama.build``).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

from ckptool.core.checkpoint import Checkpoint, Rank
from ckptool.core.roots import find_root
from ckptool.core.tree import as_mapping
from ckptool.directories.names import sets_in
from ckptool.directories.parallel.joining import listing
from ckptool.errors import FormatError
from ckptool.io.paths import join
from ckptool.io.probe import Probe

LABEL = "consolidated"

PIECE = re.compile(r"consolidated\.(\d{2,4})\.pth", re.ASCII)


def matches(probe: Probe) -> bool:
    """Returns whether it is a directory of two or more such files; one of a known loader's files is not."""
    if not probe.is_directory:
        return False
    pieces = sum(PIECE.fullmatch(name) is not None for name in probe.names)
    return pieces > 1 and not any(found.loader for found in sets_in(probe.names))


def read(probe: Probe, open_: Callable[..., Checkpoint]) -> Checkpoint:
    """Returns the checkpoint that lists each file's tensors. Raises: what opening one of them raises."""
    numbers = sorted((int(found[1]), name) for name in probe.names if (found := PIECE.fullmatch(name)))
    ranks, tree = [], {}
    for number, name in numbers:
        opened = open_(join(probe.path, name))
        opened = replace(opened, root=find_root(opened.tree).path)
        if as_mapping(opened.at(opened.root)) is None:
            raise FormatError("a piece of a model without a state_dict", opened.url)
        stem = name.removesuffix(".pth")
        ranks.append(Rank(stem, number, 0, opened))
        tree[stem] = opened.at(opened.root)
    absent = sorted({*range(numbers[-1][0])} - {number for number, _ in numbers})
    problems = [f"missing ranks: {', '.join(f'consolidated.{number:02d}.pth' for number in absent)}"] if absent else []
    return listing(LABEL, probe.path, ranks, tree, (rank.checkpoint for rank in ranks), problems)
