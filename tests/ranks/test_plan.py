"""The division of work: simulated, so that every byte is written once, and by the rank whose share it is."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracles import FIXTURES, Run

import ckptool
from ckptool.core.tensor import TensorInfo
from ckptool.io.files import Files
from ckptool.ops.convert import convert
from ckptool.ranks.parts import box, is_divisible
from ckptool.ranks.plan import Division, Segment, boxes, row_of
from ckptool.values.blocks import read_bytes

SHAPES = st.lists(st.integers(1, 5), max_size=4).map(tuple)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(SHAPES, st.data())
def test_boxes_are_a_run_of_elements_in_their_order(shape: tuple[int, ...], data: st.DataObject) -> None:
    count = math.prod(shape)
    begin = data.draw(st.integers(0, count))
    end = data.draw(st.integers(begin, count))
    whole = np.arange(count).reshape(shape)
    found = [*boxes(shape, begin, end)]
    cut = [whole[tuple(slice(at, at + size) for at, size in zip(*one, strict=True))] for one in found]
    assert [int(number) for part in cut for number in part.reshape(-1)] == [*range(begin, end)]
    assert len(found) <= max(2 * len(shape) - 1, 1)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.integers(0, 10_000), max_size=40), st.integers(1, 50), st.integers(1, 64))
def test_every_byte_is_of_one_rank_wherever_units_can_be_cut(sizes: list[int], world: int, grain: int) -> None:
    division = Division(sizes, world, lambda unit, within, slack: within // grain * grain)
    every = [segment for rank in range(world) for segment in division.of(rank)]
    assert [one.begin for one in every if one.begin == one.end] == [0] * sizes.count(0)
    written = dict.fromkeys(range(len(sizes)), 0)
    for unit, begin, end in every:
        assert begin == written[unit]  # neither a gap nor twice
        written[unit] = end
    assert [*written.values()] == sizes
    assert {one.unit for one in every} == {*range(len(sizes))}
    assert division.shares() == [sum(one.end - one.begin for one in division.of(rank)) for rank in range(world)]
    assert max(map(abs, np.subtract(division.shares(), sum(sizes) / world))) <= grain + 1


def test_units_that_cannot_be_cut_go_to_the_nearer_rank_and_more_ranks_than_bytes_is_no_error() -> None:
    whole = Division([10, 10, 10], 2, lambda unit, within, slack: 0 if within < 5 else 10)
    assert [[*whole.of(rank)] for rank in range(2)] == [[Segment(0, 0, 10), Segment(1, 0, 10)], [Segment(2, 0, 10)]]
    assert sum(Division([1, 2], 9, lambda unit, within, slack: within).shares()) == 3
    assert Division([0, 0], 2, lambda unit, within, slack: within).shares() == [0, 0]
    assert Division([], 3, lambda unit, within, slack: within).shares() == [0, 0, 0]


def test_rows_of_a_tensor_are_the_largest_that_fit() -> None:
    assert [row_of((8, 100, 16), 4, most) for most in (6400, 6399, 64, 63, 1)] == [6400, 64, 64, 4, 4]


# --- parts of tensors ------------------------------------------------------------------------------------------------


def opened(tree: dict[str, torch.Tensor]) -> dict[str, TensorInfo]:
    torch.save(tree, "in.pth")
    return ckptool.open("in.pth").state_dict()


KINDS = {
    "contiguous": lambda: (torch.randn(6, 5, 4), None),
    "transposed": lambda: (torch.randn(4, 5, 6).permute(2, 1, 0), None),
    "with gaps": lambda: (torch.randn(12, 5, 8)[::2, :, ::2], None),
    "conjugate": lambda: (torch.randn(6, 5, 4, dtype=torch.complex64).conj(), None),
    "cast": lambda: (torch.randn(6, 5, 4), "bfloat16"),
    "cast of a view": lambda: (torch.randn(4, 5, 6).permute(2, 1, 0), "float16"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_part_has_the_elements_of_the_whole(kind: str) -> None:
    whole, dtype = KINDS[kind]()
    (made,) = opened({"w": whole}).values()
    if dtype is not None:
        made = convert(ckptool.open("in.pth"), dtype=dtype)[0].state_dict()["w"]
        whole = whole.to(getattr(torch, dtype))
    check(made, whole)


def check(made: TensorInfo, whole: torch.Tensor) -> None:
    assert is_divisible(made)
    count, files = whole.numel(), Files()
    for begin, end in ((low, high) for low in range(0, count, 17) for high in range(low + 1, count, 13)):
        for offsets, sizes in boxes(tuple(whole.shape), begin, end):
            expected = whole[tuple(slice(at, at + size) for at, size in zip(offsets, sizes, strict=True))]
            part = box(made, offsets, sizes)
            wanted = expected.resolve_conj().reshape(-1).repeat(1).view(torch.uint8).numpy().tobytes()
            assert read_bytes(part, files) == wanted


def test_a_part_of_joined_values_reads_only_what_it_needs() -> None:
    whole = torch.randn(6, 5, 4)
    halves = opened({"a": whole[:, :2].clone(), "b": whole[:, 2:].clone()})
    from ckptool.core.tensor import cat, chunks

    for made in (
        cat([halves["a"], halves["b"]], 1),
        chunks("float32", (6, 5, 4), [((0, 2, 0), (6, 3, 4), halves["b"]), ((0, 0, 0), (6, 2, 4), halves["a"])]),
    ):
        check(made, whole)
    assert box(made, (1, 3, 0), (2, 1, 4)).source is halves["b"].source


def test_what_is_computed_from_all_of_a_tensor_is_not_divided() -> None:
    import ckptool.core.tensor as lazy

    (made,) = opened({"w": torch.randn(6, 4)}).values()
    mixed = lazy.computed("float32", (6, 4), lazy.Derived("take", (made,), shape=(6, 4), args=(lazy.Run(0, 0, 6),)))
    assert not is_divisible(mixed)
    assert not is_divisible(lazy.computed("bfloat16", (6, 4), lazy.Derived("cast", (mixed,))))
    assert not is_divisible(lazy.copied(made, (24,)))


# --- plans for a thousand ranks --------------------------------------------------------------------------------------


def hollow(shards: int, per_shard: int, shape: tuple[int, int]) -> int:
    """Writes shards of bfloat16 tensors that take no disk, and their index; returns the bytes of the tensors."""
    nbytes = 2 * math.prod(shape)
    weight_map = {}
    for number in range(shards):
        name = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        keys = [f"layers.{number * per_shard + one}.weight" for one in range(per_shard)]
        header: dict[str, Any] = {
            key: {"dtype": "BF16", "shape": shape, "data_offsets": [at * nbytes, (at + 1) * nbytes]}
            for at, key in enumerate(keys)
        }
        encoded = json.dumps(header).encode()
        weight_map.update(dict.fromkeys(keys, name))
        with (Path("huge") / name).open("wb") as file:
            file.write(len(encoded).to_bytes(8, "little") + encoded)
            file.truncate(8 + len(encoded) + per_shard * nbytes)
    index = {"metadata": {"total_size": shards * per_shard * nbytes}, "weight_map": weight_map}
    Path("huge/model.safetensors.index.json").write_text(json.dumps(index))
    return shards * per_shard * nbytes


@pytest.mark.parametrize("kind", ["dcp", "sharded"])
@pytest.mark.parametrize("large", [False, True], ids=["many tensors", "a few huge ones"])
def test_two_terabytes_are_planned_for_a_thousand_ranks_in_seconds(kind: str, large: bool, run: Run) -> None:
    os.mkdir("huge")
    try:
        total = hollow(20, 1, (1 << 18, 200_000)) if large else hollow(100, 120, (8192, 10_240))
    except OSError:
        pytest.skip("the file system has no files that large")
    assert total > 2e12
    begun = time.process_time()
    code, out, _ = run("convert", "huge", "--to", kind, "-o", "out", "--dry-run", "--world-size", 1024)
    assert time.process_time() - begun < 5
    assert code == 0
    assert "divided over 1,024 ranks: the largest share is" in out
    assert not os.path.exists("out")


def test_the_plan_of_a_thousand_ranks_has_every_byte_once_and_is_even() -> None:
    from ckptool.directories.dcp import _Meant

    os.mkdir("huge")
    total = hollow(3, 40, (512, 1000))
    checkpoint = ckptool.open("huge")
    meant = _Meant(checkpoint, 1 << 40, 1024)
    elements = {key: np.zeros(tensor.shape, "u1") for key, tensor in checkpoint.state_dict().items()}
    shares = []
    for files in meant.files:
        pieces = [piece for run in files.values() for piece in run]
        for piece in pieces:
            assert piece.part is not None
            elements[piece.key][tuple(slice(at, at + size) for at, size in zip(*piece.part, strict=True))] += 1
        shares.append(sum(piece.nbytes for piece in pieces))
    assert all((counts == 1).all() for counts in elements.values())
    assert sum(shares) == total
    assert max(shares) < 1.1 * min(shares)


def test_a_plan_goes_with_a_dry_run_and_a_directory(run: Run) -> None:
    torch.save({"w": torch.ones(30)}, "in.pth")
    assert "--dry-run" in run("convert", "in.pth", "--to", "dcp", "-o", "out", "--world-size", 4)[2]
    for kind in ("torch", "sharded-bin", "safetensors"):
        code, _, err = run("convert", "in.pth", "--to", kind, "-o", "out.pth", "--dry-run", "--world-size", 4)
        assert (code, "--to dcp or --to sharded" in err) == (2, True)
    for command in (
        ["filter", "in.pth"],
        ["remap", "in.pth", "--rename", "w=v"],
        ["load-partial", "in.pth", "--into", "in.pth"],
    ):
        code, out, _ = run(*command, "--to", "dcp", "-o", "out", "--dry-run", "--world-size", 3)
        assert (code, "divided over 3 ranks" in out) == (0, True)
    assert (
        ckptool.convert("in.pth", "out", to="sharded", dry_run=True, world_size=2).notes[0].startswith("divided over 2")
    )


def test_no_plan_is_made_for_a_url_which_rank_0_writes_alone(run: Run) -> None:
    call = ["convert", FIXTURES / "resnet_old.pth", "--to", "dcp", "-o", "memory://plan", "--dry-run"]
    assert run(*call)[0] == 0
    code, out, err = run(*call, "--world-size", 4)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "rank 0 alone writes to a URL" in err
