"""Grids of positions, resampled: against the formulas, golden numbers of timm, and timm and transformers themselves."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import record
import torch
from adapting import numbers, resized, result, same, says_the_same, weights

# --- positions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize(
    ("old", "new"), [((14, 14), (24, 24)), ((24, 24), (14, 14)), ((7, 9), (5, 12)), ((1, 1), (3, 3))]
)
def test_positions_are_resampled(mode: str, antialias: bool, old: tuple[int, int], new: tuple[int, int]) -> None:
    source, target = numbers(1, 1 + math.prod(old), 6), torch.zeros(1, 1 + math.prod(new), 6)
    grids = f"prefix=1,grid={old[0]}x{old[1]},to={new[0]}x{new[1]}"
    found = result(f"pos-embed:{grids},mode={mode},antialias={str(antialias).lower()}", source, target)
    assert same(found[:, :1], source[:, :1])
    wanted = resized(source[0, 1:].view(*old, 6), new, mode, antialias).view(1, -1, 6).float()
    torch.testing.assert_close(found[:, 1:], wanted, rtol=1e-5, atol=2e-5)  # its coordinates are float32


def test_positions_are_resampled_in_every_layout() -> None:
    grid = numbers(6, 6, 4)
    wanted = resized(grid, (9, 8)).float()
    close = {"rtol": 1e-5, "atol": 2e-5}
    torch.testing.assert_close(result("pos-embed", grid[None], torch.zeros(1, 9, 8, 4)), wanted[None], **close)
    channels_first, first = grid.permute(2, 0, 1)[None], wanted.permute(2, 0, 1)[None]
    torch.testing.assert_close(result("pos-embed", channels_first, torch.zeros(1, 4, 9, 8)), first, **close)
    flat = grid.view(36, 4)
    torch.testing.assert_close(result("pos-embed:to=9x8", flat, torch.zeros(72, 4)), wanted.view(72, 4), **close)
    line = weights(36, 50, "linear", False) @ flat.double().numpy()
    found = result("pos-embed:mode=linear", flat, torch.zeros(50, 4))
    torch.testing.assert_close(found, torch.from_numpy(line).float(), **close)


@pytest.mark.parametrize("extra", [0, 3])
@pytest.mark.parametrize("antialias", [True, False])
def test_bias_tables_are_resampled_and_their_extra_rows_stay(extra: int, antialias: bool) -> None:
    source, target = numbers(169 + extra, 3), torch.zeros(529 + extra, 3)
    found = result(f"rel-pos:antialias={str(antialias).lower()}", source, target)
    wanted = resized(source[:169].view(13, 13, 3), (23, 23), "bicubic", antialias).view(529, 3).float()
    torch.testing.assert_close(found[:529], wanted, rtol=1e-5, atol=2e-6)
    assert same(found[529:], source[169:])


def waves(*shape: int) -> torch.Tensor:
    return torch.arange(math.prod(shape), dtype=torch.float64).mul(0.37).sin().float().reshape(shape)


# What timm 1.0.31 makes of `waves` with torch 2.13: resample_abs_pos_embed(_nhwc), resize_rel_pos_bias_table_simple and
# _levit, adapt_input_conv. Six numbers from all over the result.
@pytest.mark.parametrize(
    ("text", "source", "target", "golden"),
    [
        ("pos-embed", (1, 50, 5), (1, 82, 5),
         [-0.769569, -0.758828, -0.787201, -0.393119, -0.101331, 0.50946]),
        ("pos-embed", (1, 83, 5), (1, 51, 5),
         [0.355931, 0.156614, -0.188697, -0.311479, -0.232102, -0.512003]),
        ("pos-embed:mode=bilinear,antialias=false", (1, 49, 5), (1, 81, 5),
         [-0.094883, -0.024417, -0.357842, -0.587662, -0.5487, -0.657533]),
        ("pos-embed", (1, 6, 7, 5), (1, 9, 4, 5),
         [-0.409781, -0.431942, -0.584456, -0.409615, -0.450289, -0.174989]),
        ("rel-pos", (25, 3), (81, 3),
         [-0.928573, 0.331936, 0.364431, -0.689265, 0.914508, -0.703429]),
        ("rel-pos:antialias=true", (81, 3), (25, 3),
         [-0.09049, -0.002161, 0.021012, -0.059474, -0.04149, -0.067621]),
        ("in-chans", (4, 3, 2, 2), (4, 1, 2, 2),
         [1.135596, 0.619076, 0.00805, 0.802492, -1.139928, -1.05087]),
        ("in-chans", (4, 3, 2, 2), (4, 5, 2, 2),
         [0.477939, 0.314427, -0.577879, -0.578965, -0.596732, -0.596292]),
    ],
)  # fmt: skip
def test_golden_numbers_of_timm_are_met(
    text: str, source: tuple[int, ...], target: tuple[int, ...], golden: Sequence[float]
) -> None:
    found = result(text, waves(*source), torch.zeros(target)).flatten()
    step = max(1, len(found) // 6)
    torch.testing.assert_close(found[step // 2 :: step][:6], torch.tensor(golden), rtol=2e-5, atol=2e-6)


# --- timm and transformers, as recorded, and where they are installed -------------------------------------------------

LIVE = {**record.positions(768), **record.tables()}


@pytest.mark.parametrize("name", LIVE)
def test_grids_equal_those_of_timm_and_transformers(name: str) -> None:
    says_the_same(record.small()[name], name, LIVE[name])
