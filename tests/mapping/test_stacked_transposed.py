"""Matrices of experts that the other side stacks transposed: each is turned before they are joined, never reshaped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from oracles import Run

from ckptool.mapping.matching.layouts import op_of

Saved = Callable[..., Path]


def apart_and_stacked(rows: int, columns: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Returns (a tensor for each of 4 experts, a tensor for all of them, in which each is transposed)."""
    torch.manual_seed(0)
    apart, stacked = {}, {}
    for layer in range(2):
        apart[f"l.{layer}.norm.weight"] = stacked[f"h.{layer}.norm.weight"] = torch.rand(7)
        for name, size in {"up": (columns, rows), "down": (rows, columns)}.items():
            each = [torch.randn(size) for _ in range(4)]
            apart |= {f"l.{layer}.experts.{n}.{name}.weight": one for n, one in enumerate(each)}
            stacked[f"h.{layer}.experts.{name}"] = torch.stack([one.T for one in each])
    return apart, stacked


@pytest.mark.parametrize("back", [False, True], ids=["stacked", "apart"])
def test_experts_that_are_stacked_transposed_are_turned_and_back(back: bool, saved: Saved, run: Run) -> None:
    apart, stacked = apart_and_stacked(16, 24)
    true = apart if back else stacked
    one, other = (stacked, apart) if back else (apart, stacked)
    shapes = {key: torch.zeros_like(tensor) for key, tensor in other.items()}
    paths = saved(one, "one.pth"), saved(shapes, "other.pth")
    code, out, err = run("remap", paths[0], "--like", paths[1], "--no-values", "-o", "o.pth", "--save-rules", "r.toml")
    assert code == 0, out + err
    assert run("remap", paths[0], "--rules", "r.toml", "-o", "again.pth")[0] == 0
    for made in (torch.load("o.pth"), torch.load("again.pth")):
        assert made.keys() == true.keys()
        assert all(torch.equal(made[key], true[key]) for key in true)


def test_of_square_experts_it_is_left_open_whether_they_are_turned(saved: Saved, run: Run) -> None:
    apart, stacked = apart_and_stacked(16, 16)
    shapes = {key: torch.zeros_like(tensor) for key, tensor in stacked.items()}
    _, out, _ = run("remap", saved(apart, "one.pth"), "--like", saved(shapes, "other.pth"), "--no-values", "--dry-run")
    assert "unproven  h.0.experts.up" in out
    assert "whether the square matrix is transposed" in out


@pytest.mark.parametrize(
    ("shape", "target", "op"),
    [
        ((16, 24), (24, 16), "transpose"),
        ((16, 24), (1, 24, 16), "transpose;reshape"),
        ((1, 16, 24), (24, 16), "reshape:16,24;transpose"),
        ((16, 24), (1, 16, 24), "reshape"),
        ((8, 3, 4, 4), (8, 48), "reshape"),
        ((8, 48), (8, 3, 4, 4), "reshape"),
        ((3, 3, 8, 16), (16, 8, 3, 3), "permute:3,2,0,1"),
        ((6, 4), (8, 3), None),
        ((3, 8, 4), (8, 12), None),
        ((6, 4), (5, 5), None),
    ],
)
def test_a_reshape_never_moves_elements_between_dimensions(
    shape: tuple[int, ...], target: tuple[int, ...], op: str | None
) -> None:
    assert op_of(shape, target) == op
