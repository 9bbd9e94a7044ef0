"""Which tensors moved most: --sort and --top."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from oracles import Run

import ckptool

Saved = Callable[..., Path]
A = {f"layers.{at}.w": torch.tensor([1.0, 2.0, 0.0]) for at in (0, 2, 10)} | {"zero": torch.zeros(3)}
B = {
    "layers.0.w": torch.tensor([1.5, 2.0, 0.0]),  # a small step
    "layers.2.w": torch.tensor([2.0, -1.0, 0.0]),  # a right angle
    "layers.10.w": torch.tensor([8.0, 16.0, 0.0]),  # the same direction, far away
    "zero": torch.ones(3),
}


@pytest.fixture
def both(saved: Saved) -> tuple[str, str]:
    return str(saved(A, "a.pth")), str(saved(B, "b.pth"))


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ("rel-l2", ["zero", "layers.10.w", "layers.2.w", "layers.0.w"]),
        ("max-abs", ["layers.10.w", "layers.2.w", "zero", "layers.0.w"]),
        ("mean-abs", ["layers.10.w", "layers.2.w", "zero", "layers.0.w"]),
        ("cosine", ["zero", "layers.2.w", "layers.0.w", "layers.10.w"]),
        ("key", ["layers.0.w", "layers.2.w", "layers.10.w", "zero"]),
    ],
)
def test_the_largest_change_comes_first_and_what_has_no_number_before_it(
    order: str, expected: list[str], both: tuple[str, str], run: Run
) -> None:
    code, out, _ = run("diff", *both, "--values", "--sort", order, "--json")
    assert (code, [row["key"] for row in json.loads(out)["result"]["values"]]) == (1, expected)
    code, out, _ = run("diff", *both, "--values", "--sort", order)
    assert [line.split()[1] for line in out.splitlines() if line.startswith("  differs")] == expected


def test_top_shows_the_largest_and_says_how_many_more_there_are(both: tuple[str, str], run: Run) -> None:
    code, out, _ = run("diff", *both, "--values", "--top", "3")
    lines = out.splitlines()
    assert (code, [line.split()[1] for line in lines if "differs" in line]) == (
        1,
        ["zero", "layers.10.w", "layers.2.w"],
    )
    assert lines[-1].split()[:2] == ["more", "1"]
    assert "more" not in run("diff", *both, "--values", "--top", "4")[1]
    result = json.loads(run("diff", *both, "--values", "--top", "1", "--json")[1])["result"]
    assert [row["key"] for row in result["values"]] == ["zero", "layers.10.w", "layers.2.w", "layers.0.w"]


def test_of_several_files_each_shows_its_largest(both: tuple[str, str], run: Run) -> None:
    a, b = both
    out = run("diff", a, b, b, "--values", "--top", "1")[1]
    assert [line.split()[1] for line in out.splitlines() if line.startswith("  differs")] == ["zero", "zero"]


def test_without_sort_the_order_is_the_files(both: tuple[str, str]) -> None:
    assert [row.key for row in ckptool.diff(*both, values=True).values] == list(A)


@pytest.mark.parametrize("given", [["--sort", "key"], ["--top", "1"], ["--quick", "--sort", "cosine"]])
def test_without_values_there_is_nothing_to_sort(given: list[str], both: tuple[str, str], run: Run) -> None:
    code, out, err = run("diff", *both, *given)
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert "--values" in err


def test_an_unknown_order_names_the_one_that_is_meant(both: tuple[str, str], run: Run) -> None:
    code, _, err = run("diff", *both, "--values", "--sort", "cosin")
    assert (code, len(err.splitlines())) == (2, 1)
    assert "cosine" in err


def test_the_line_and_the_json_have_the_mean_and_the_cosine(both: tuple[str, str], run: Run) -> None:
    line = next(one for one in run("diff", *both, "--values")[1].splitlines() if "layers.2.w" in one)
    assert line.endswith("max abs 3, relative L2 1.41, mean abs 1.33, cosine 0.0000")
    row = json.loads(run("diff", *both, "--values", "--json")[1])["result"]["values"][1]
    assert (row["mean_abs"], row["cosine"]) == (pytest.approx(4 / 3), pytest.approx(0, abs=1e-12))
