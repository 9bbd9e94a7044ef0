"""One tensor that lies in several places, as distributed checkpoints have them."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import bits
from safetensors.torch import load_file

import ckptool
from ckptool.core.checkpoint import Checkpoint
from ckptool.core.tensor import Box, TensorInfo, chunks, narrow, view
from ckptool.errors import FormatError, IncompleteError
from ckptool.io.files import Files
from ckptool.io.source import BLOCK
from ckptool.values.blocks import read_bytes, same_bytes, tensor_blocks

Saved = Callable[..., Path]
Cut = tuple[tuple[int, ...], tuple[int, ...]]


def grid(rng: random.Random, shape: tuple[int, ...]) -> list[Cut]:
    """Cuts of every dimension at random places."""
    edges = [sorted({0, size, *(rng.randrange(size + 1) for _ in range(rng.randrange(3)))}) for size in shape]
    ranges = [list(pairwise(one)) for one in edges]
    return [(tuple(a for a, _ in box), tuple(b - a for a, b in box)) for box in product(*ranges)]


def bricks(rng: random.Random, shape: tuple[int, ...]) -> list[Cut]:
    """Boxes that are cut again and again, each along a dimension and at a place of its own."""
    boxes: list[Cut] = [((0,) * len(shape), shape)]
    for _ in range(rng.randrange(8)):
        offsets, sizes = boxes.pop(rng.randrange(len(boxes)))
        dim = rng.randrange(len(shape))
        at = rng.randrange(sizes[dim] + 1)
        for start, size in ((0, at), (at, sizes[dim] - at)):
            place = (*offsets[:dim], offsets[dim] + start, *offsets[dim + 1 :])
            boxes.append((place, (*sizes[:dim], size, *sizes[dim + 1 :])))
    rng.shuffle(boxes)
    return boxes


def part(tensor: torch.Tensor, cut: Cut) -> torch.Tensor:
    for dim, (start, size) in enumerate(zip(*cut, strict=True)):
        tensor = tensor.narrow(dim, start, size)
    return tensor


def opened(saved: Saved, whole: torch.Tensor, cuts: list[Cut], layout: str, name: str = "in.pth") -> TensorInfo:
    """A tensor of chunks, each of them saved by itself: on a storage of its own, transposed, or seen in the whole."""
    pieces = {str(number): part(whole, cut) for number, cut in enumerate(cuts)}
    if layout == "apart":
        pieces = {key: piece.clone() for key, piece in pieces.items()}
    elif layout == "transposed":
        pieces = {key: piece.t().contiguous().t() if piece.dim() == 2 else piece for key, piece in pieces.items()}
    found = ckptool.open(saved(pieces, name)).state_dict()
    boxes = [(*cut, found[str(number)]) for number, cut in enumerate(cuts)]
    return chunks(str(whole.dtype).removeprefix("torch."), tuple(whole.shape), boxes)


@pytest.mark.parametrize("make", [grid, bricks])
@pytest.mark.parametrize("layout", ["apart", "transposed", "seen in the whole"])
@pytest.mark.parametrize("seed", range(8))
def test_any_parts_are_the_whole(seed: int, layout: str, make: Any, saved: Saved) -> None:
    rng = random.Random(seed)
    shape = tuple(rng.randrange(1, 9) for _ in range(rng.randrange(1, 5)))
    dtype = rng.choice([torch.float32, torch.bfloat16, torch.int64, torch.bool])
    whole = torch.randint(0, 2, shape).to(dtype)
    made = opened(saved, whole, make(rng, shape), layout)
    with Files() as files:
        assert read_bytes(made, files) == bits(whole)


def test_a_view_of_chunks_is_a_view_of_the_whole(saved: Saved) -> None:
    whole = torch.arange(42.0).view(6, 7)
    made = opened(saved, whole, [((0, 0), (6, 3)), ((0, 3), (2, 4)), ((2, 3), (4, 4))], "apart")
    with Files() as files:
        assert read_bytes(narrow(made, 0, 1, 4), files) == bits(whole[1:5])
        assert read_bytes(narrow(made, 1, 2, 3), files) == bits(whole[:, 2:5])
        assert read_bytes(view(made, (7, 6), (1, 7)), files) == bits(whole.t())


@pytest.mark.parametrize("suffix", ["out.pth", "out.safetensors"])
def test_chunks_are_written_as_one_tensor(suffix: str, saved: Saved, tmp_path: Path) -> None:
    whole = torch.randn(300, 500)
    cuts = [((0, 0), (100, 250)), ((0, 250), (100, 250)), ((100, 0), (200, 500))]
    made = opened(saved, whole, cuts, "apart")
    ckptool.save(Checkpoint({"w": made, "tied": made}), tmp_path / suffix, verify=True)
    read = torch.load(tmp_path / suffix) if suffix.endswith(".pth") else load_file(tmp_path / suffix)
    assert torch.equal(read["w"], whole)


def test_chunks_are_looked_into_and_compared_like_any_tensor(saved: Saved) -> None:
    whole = torch.randn(20, 30)
    plain = ckptool.open(saved({"w": whole}, "whole.pth"))
    made = opened(saved, whole, [((0, 0), (20, 11)), ((0, 11), (20, 19))], "apart", "parts.pth")
    parts = Checkpoint({"w": made})
    first, second = (ckptool.inspect(one, stats=True, hashes=True) for one in (plain, parts))
    assert [(row.hash, row.stats) for row in first.tensors] == [(row.hash, row.stats) for row in second.tensors]
    assert ckptool.diff(plain, parts, values=True).same
    assert (made.nbytes, made.location, len(list(made.storages()))) == (2400, "cpu", 2)
    with Files() as files:
        assert same_bytes(plain.state_dict()["w"], made, files)
    assert torch.equal(parts.to_torch()["w"], whole)


def test_blocks_stay_small_and_whole(saved: Saved) -> None:
    whole = torch.randn(1000, 1500, dtype=torch.float64)
    made = opened(saved, whole, [((0, 0), (1000, 700)), ((0, 700), (1000, 800))], "apart")
    with Files() as files:
        blocks = [bytes(block) for block in tensor_blocks(made, files)]
    assert b"".join(blocks) == bits(whole)
    assert all(len(block) % 8 == 0 for block in blocks)
    assert max(map(len, blocks)) < 2 * BLOCK


def test_a_scalar_and_nothing_at_all_are_tensors_too(saved: Saved) -> None:
    made = opened(saved, torch.tensor(3.0), [((), ())], "apart")
    empty = opened(saved, torch.zeros(0, 4), [((0, 0), (0, 4))], "apart", "empty.pth")
    with Files() as files:
        assert read_bytes(made, files) == bits(torch.tensor(3.0))
        assert read_bytes(empty, files) == b""
    assert chunks("float32", (0, 3), []).location == "cpu"


@pytest.mark.parametrize(
    ("cuts", "error", "said"),
    [
        ([((0, 0), (2, 3))], IncompleteError, "3 elements of a tensor of shape"),
        ([], IncompleteError, "9 elements"),
        ([((0, 0), (2, 3)), ((1, 0), (2, 3))], FormatError, "overlap"),
        ([((0, 0), (3, 2)), ((0, 1), (3, 2))], FormatError, "overlap"),
        ([((0, 0), (3, 3)), ((0, 0), (3, 3))], FormatError, "overlap"),
        ([((0, 0), (2, 3)), ((2, 0), (2, 3))], FormatError, "outside"),
        ([((-1, 0), (2, 3)), ((1, 0), (2, 3))], FormatError, "outside"),
        ([((0,), (3,))], FormatError, "outside"),
    ],
)
def test_parts_that_are_no_whole_are_refused(cuts: list[Cut], error: type[FormatError], said: str) -> None:
    boxes: list[Box] = [(*cut, chunks("float32", cut[1], []) if 0 in cut[1] else _filled(cut[1])) for cut in cuts]
    with pytest.raises(error, match=said):
        chunks("float32", (3, 3), boxes)


def test_parts_of_another_shape_or_dtype_are_refused() -> None:
    for dtype, sizes in (("float32", (3,)), ("float64", (4,))):
        with pytest.raises(FormatError, match="held by a dense float32 tensor"):
            chunks(dtype, (4,), [((0,), sizes, _filled((4,)))])
    with pytest.raises(FormatError, match="scalar"):
        chunks("float32", (), [((), (), _filled(())), ((), (), _filled(()))])


def _filled(shape: tuple[int, ...]) -> TensorInfo:
    from ckptool.core.tensor import Derived, Draw, computed

    return computed("float32", shape, Derived("draw", (), shape=shape, args=Draw("constant", (0.0,), shape)))
