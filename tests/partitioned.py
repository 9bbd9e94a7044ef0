"""Checkpoints of DeepSpeed with every kind of weight, which a test may alter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from makers.zero import zero

from ckptool.core.checkpoint import Checkpoint

SHARED = {"head.weight": "emb.weight"}


def groups() -> list[dict[str, torch.Tensor]]:
    """The weights of two groups of an optimizer: odd sizes, one element, and none."""
    torch.manual_seed(5)
    return [
        {"emb.weight": torch.randn(7, 3), "l.weight": torch.randn(5, 3), "none": torch.empty(0, 2)},
        {"one": torch.randn(1), "scalar": torch.randn(()), "l.bias": torch.randn(5)},
    ]


def frozen() -> dict[str, torch.Tensor]:
    torch.manual_seed(6)
    return {"frozen.weight": torch.randn(3, 5), "frozen.bias": torch.randn(2)}


def buffers() -> dict[str, torch.Tensor]:
    return {"bn.running_mean": torch.rand(3).half(), "bn.num_batches_tracked": torch.tensor(7)}


def written(directory: Path, stage: int = 2, world: int = 2, **options: Any) -> Path:
    given = {"frozen": frozen(), "buffers": buffers(), "shared": SHARED, "dtype": torch.bfloat16, **options}
    return zero(directory, given.pop("groups", groups()), stage=stage, world=world, **given)


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    """Changes what torch.save wrote into a file."""
    tree = torch.load(path, weights_only=False)
    tree = change(tree) or tree
    torch.save(tree, path)


def optim(place: Path, rank: int = 0) -> Path:
    return next(place.glob(f"*zero_pp_rank_{rank}_*optim_states.pt"))


def said(checkpoint: Checkpoint, *words: str) -> bool:
    return any(all(word in note for word in words) for note in checkpoint.notes)
