"""Several sources without `--match`: a union of disjoint files, never a silent choice between two values."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from oracles import Run, Saved, assert_identical, load, tied_groups
from safetensors.torch import load_file, save_file

import ckptool
from ckptool.errors import CollisionError

W, NORM = "layers.0.attention.wq.weight", "norm.weight"


@pytest.fixture
def pieces(saved: Saved) -> list[str]:
    """Two ranks of tensor parallelism: every key is in both, the norm is a copy, the matrix a part."""
    return [
        str(saved({W: torch.full((4, 8), float(rank)), NORM: torch.ones(8)}, f"consolidated.{rank:02}.pth"))
        for rank in range(2)
    ]


def test_pieces_of_one_tensor_are_refused_and_named(pieces: list[str], run: Run) -> None:
    code, out, err = run("filter", *pieces, "-o", "merged.pth")
    assert (code, out) == (2, "")
    assert W in err
    assert NORM not in err  # the same bytes in both
    assert all(piece in err for piece in pieces)
    assert "--first-wins" in err
    code, out, _ = run("filter", *pieces, "-o", "merged.pth", "--json", "--dry-run")
    assert (code, json.loads(out)["error"]["kind"]) == (2, "collision")


def test_the_first_wins_if_the_user_says_so_and_the_keys_are_named(pieces: list[str], run: Run) -> None:
    code, out, _ = run("filter", *pieces, "-o", "merged.pth", "--first-wins")
    assert code == 0
    assert any(W in line for line in out.splitlines() if line.startswith("  note"))
    assert_identical(load("merged.pth"), load(pieces[0]))


def test_one_piece_is_a_selection_and_pieces_apart_by_pattern_are_a_union(pieces: list[str], run: Run) -> None:
    assert run("filter", pieces[1], "-o", "one.pth")[0] == 0
    assert_identical(load("one.pth"), load(pieces[1]))
    assert run("filter", *pieces, "--include", NORM, "-o", "norm.pth")[0] == 0
    assert_identical(load("norm.pth"), {NORM: torch.ones(8)})


def test_of_three_sources_in_three_formats_all_keys_in_two_are_listed(saved: Saved) -> None:
    first = saved({"a": torch.zeros(2), "b": torch.zeros(2), "only": torch.ones(1)}, "one.pth")
    save_file({"b": torch.zeros(2), "c": torch.zeros(3)}, "two.safetensors")
    np.savez("three.npz", a=np.ones(2, np.float32), c=np.ones(3, np.float32), b=np.zeros(2, np.float32))
    with pytest.raises(CollisionError) as caught:
        ckptool.filter(first, "two.safetensors", "three.npz")
    message = str(caught.value)
    assert f"a ({first} and three.npz)" in message
    assert "c (two.safetensors and three.npz)" in message
    assert "b (" not in message
    assert "2 keys" in message


def test_disjoint_sources_in_other_formats_are_one(saved: Saved, run: Run) -> None:
    first = saved({"model": {"a": torch.zeros(2)}, "epoch": 3}, "one.pth")
    save_file({"b": torch.ones(2)}, "two.safetensors")
    third = saved({"state_dict": {"c": torch.ones(1)}, "epoch": 7, "optimizer": {"lr": 1}}, "three.pth")
    code, out, _ = run("filter", first, "two.safetensors", third, "-o", "out.pth")
    assert code == 0
    expected = {"a": torch.zeros(2), "b": torch.ones(2), "c": torch.ones(1)}
    assert_identical(load("out.pth"), {"model": expected, "epoch": 3})
    assert f"not taken from {third}: epoch, optimizer" in out


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (torch.ones(4), torch.ones(4, dtype=torch.bfloat16)),
        (torch.ones(4), torch.ones(4, dtype=torch.int32)),
        (torch.ones(4), torch.ones(2, 2)),
        (torch.zeros(2), -torch.zeros(2)),
        (torch.ones(3, 3), torch.ones(3, 3).to_sparse()),
    ],
)
def test_equal_is_equal_in_bytes_dtype_and_shape(one: torch.Tensor, other: torch.Tensor, saved: Saved) -> None:
    sources = saved({"w": one, "a": one + 1}, "one.pth"), saved({"w": other, "b": one}, "two.pth")
    with pytest.raises(CollisionError, match=r"w \("):
        ckptool.filter(*sources)
    chosen, _ = ckptool.filter(*sources, first_wins=True)
    assert_identical(chosen.to_torch(), {"w": one, "a": one + 1, "b": one.clone()})


def test_the_same_bytes_in_another_order_of_memory_are_equal(saved: Saved) -> None:
    table = torch.arange(6.0).reshape(2, 3)
    first = saved({"w": table}, "one.pth")
    second = saved({"w": table.T.contiguous().T, "v": torch.full((2,), float("nan"))}, "two.pth")
    chosen, report = ckptool.filter(first, second)
    assert list(chosen.state_dict()) == ["w", "v"]
    assert any("the same in two sources" in note for note in report.notes)


def test_names_that_a_later_source_ties_stay_tied(saved: Saved, run: Run) -> None:
    table = torch.randn(4, 2)
    first = saved({"embed": table.clone(), "wte": torch.ones(1)}, "one.pth")
    second = saved({"head": table, "embed": table, "more": table}, "two.pth")
    assert run("filter", first, second, "-o", "out.pth")[0] == 0
    made = load("out.pth")
    assert list(made) == ["embed", "wte", "head", "more"]
    assert tied_groups(made) == {frozenset({"embed", "head", "more"})}
    assert torch.equal(made["head"], table)
    assert run("filter", first, second, "-o", "out.safetensors")[0] == 0
    assert set(load_file("out.safetensors")) == {"embed", "wte"}


def test_a_tie_that_the_first_source_breaks_is_said(saved: Saved) -> None:
    table = torch.randn(4, 2)
    first = saved({"embed": torch.zeros(4, 2)}, "one.pth")
    second = saved({"embed": table, "head": table}, "two.pth")
    chosen, report = ckptool.filter(first, second, first_wins=True)
    assert_identical(chosen.to_torch(), {"embed": torch.zeros(4, 2), "head": table})
    assert f"tied in {second}, and no longer: embed, head" in report.notes


def test_an_entry_that_is_no_tensor_and_differs_in_a_later_source_is_named(saved: Saved, run: Run) -> None:
    one = saved({"a.w": torch.ones(2), "steps": 5, "same": 1, "extra": {"n": 1}}, "one.pth")
    two = saved({"b.w": torch.ones(2), "steps": 6, "same": 1}, "two.pth")
    three = saved({"c.w": torch.ones(2), "extra": {"n": 2}}, "three.pth")
    code, out, _ = run("filter", one, two, three, "-o", "o.pth")
    assert code == 0
    assert f"no tensors, and an earlier source has them: steps ({two}), extra ({three})" in out
    written = torch.load("o.pth", weights_only=True)
    assert (written["steps"], written["extra"], list(written)) == (
        5, {"n": 1}, ["a.w", "steps", "same", "extra", "b.w", "c.w"],
    )  # fmt: skip
    code, out, _ = run("filter", one, two, three, "-o", "o.pth", "--json", "--force")
    assert (code, f"steps ({two})" in out) == (0, True)
    assert "no tensors" not in run("filter", one, two, three, "--exclude", "re:steps|extra", "-o", "p.pth")[1]
