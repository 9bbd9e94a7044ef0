"""A key that one side of `diff` leaves out as it is tied in the other, as Hugging Face's libraries do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import Run, Saved
from safetensors.torch import save_file

import ckptool
from ckptool import formats

EMBEDDING, NORM = torch.arange(12.0).view(4, 3), torch.ones(3)
LEFT_OUT = {"model.embed.weight": EMBEDDING, "norm.weight": NORM}
TIED = {**LEFT_OUT, "lm_head.weight": EMBEDDING}
COPY = {**LEFT_OUT, "lm_head.weight": EMBEDDING.clone()}


def test_a_tied_key_that_the_other_side_leaves_out_is_said_and_is_no_difference(run: Run, saved: Saved) -> None:
    a, b = saved(TIED, "a.pth"), saved(LEFT_OUT, "b.pth")
    assert run("diff", a, b, "--values") == (0, (
        "same but for ties: 2 equal\n"
        "  tied  lm_head.weight  tied in A to model.embed.weight, left out in B\n"
    ), "")  # fmt: skip
    _, out, _ = run("diff", b, a)
    assert "  tied  lm_head.weight  tied in B to model.embed.weight, left out in A\n" in out
    result = json.loads(run("diff", a, b, "--json")[1])["result"]
    assert (result["same"], result["only_in_a"]) == (True, [])
    assert result["tied"] == [{"key": "lm_head.weight", "only_in": "a", "tied_to": "model.embed.weight"}]
    assert result["shapes"] == {"lm_head.weight": [4, 3]}


def test_it_can_be_made_a_difference(run: Run, saved: Saved) -> None:
    a, b = saved(TIED, "a.pth"), saved(LEFT_OUT, "b.pth")
    assert [run("diff", a, b, "--fail-on", kinds)[0] for kinds in ("ties", "only-in-a,only-in-b", "shape,ties")] == [
        1,
        0,
        1,
    ]
    assert run("diff", b, b, "--fail-on", "ties")[0] == 0


def test_a_copy_or_a_tie_to_what_the_other_side_lacks_too_is_a_difference(run: Run, saved: Saved) -> None:
    code, out, _ = run("diff", saved(COPY, "a.pth"), saved(LEFT_OUT, "b.pth"))
    assert (code, "only in A  lm_head.weight" in out) == (1, True)
    report = ckptool.diff(saved(TIED, "a.pth"), saved({"norm.weight": NORM}, "b.pth"))
    assert (report.same, report.only_in_a, report.tied) == (False, ["model.embed.weight", "lm_head.weight"], [])
    other = {**TIED, "empty": torch.empty(0), "void": torch.empty(0)}
    report = ckptool.diff(saved(other, "a.pth"), saved({**LEFT_OUT, "empty": torch.empty(0)}, "b.pth"))
    assert report.only_in_a == ["void"]


def test_other_views_of_one_memory_are_no_ties(saved: Saved) -> None:
    a = {**LEFT_OUT, "turned": EMBEDDING.t(), "half": EMBEDDING[:2]}
    assert ckptool.diff(saved(a, "a.pth"), saved(LEFT_OUT, "b.pth")).only_in_a == ["turned", "half"]


def test_values_are_compared_under_the_name_that_both_have(run: Run, saved: Saved) -> None:
    other = {"model.embed.weight": EMBEDDING + 1, "norm.weight": NORM}
    report = ckptool.diff(saved(TIED, "a.pth"), saved(other, "b.pth"), values=True)
    assert (report.same, [row.key for row in report.values]) == (False, ["model.embed.weight"])
    assert [row.key for row in report.tied] == ["lm_head.weight"]


def test_a_name_that_two_sides_tie_to_other_keys_is_told_of_each(saved: Saved) -> None:
    shared = torch.ones(2, 2)
    a = {"shared": shared, "encoder.embed": shared, "lm_head": shared}
    report = ckptool.diff(saved(a, "a.pth"), saved({"decoder.embed": shared, "shared": shared}, "b.pth"))
    assert report.same
    assert [(row.key, row.only_in, row.tied_to) for row in report.tied] == [
        ("encoder.embed", "a", "shared"), ("lm_head", "a", "shared"), ("decoder.embed", "b", "shared"),
    ]  # fmt: skip


def _safetensors(saved: Saved) -> Any:
    tied = {"format": "pt", "lm_head.weight": "model.embed.weight"}
    save_file(LEFT_OUT, "a.safetensors", tied)
    return "a.safetensors"


def _wrapped(saved: Saved) -> Any:
    return saved({f"module.{key}": value for key, value in TIED.items()}, "a.pth")


def _lock(saved: Saved) -> Any:
    opened = ckptool.open(saved(TIED, "a.pth"))
    Path("a.lock").write_text(formats.lock_text(opened, opened.state_dict(), {}))
    return "a.lock"


def _code(saved: Saved) -> Any:
    Path("tying.py").write_text(
        "import torch\n"
        "class Net(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.model = torch.nn.ModuleDict({'embed': torch.nn.Embedding(4, 3)})\n"
        "        self.norm = torch.nn.RMSNorm(3)\n"
        "        self.lm_head = torch.nn.Linear(3, 4, bias=False)\n"
        "        self.lm_head.weight = self.model['embed'].weight\n"
    )
    return "tying.py:Net"


@pytest.mark.parametrize("side", [_safetensors, _wrapped, _lock, _code])
def test_whatever_says_that_they_are_tied(side: Any, run: Run, saved: Saved) -> None:
    code, out, _ = run("diff", side(saved), saved(LEFT_OUT, "b.pth"))
    assert (code, out.splitlines()[0]) == (0, "same but for ties: 2 equal (values not compared, --values does)")


def test_with_bookkeeping_both_are_said(run: Run, saved: Saved) -> None:
    counter = {"bn.num_batches_tracked": torch.tensor(3)}
    code, out, _ = run("diff", saved({**TIED, **counter}, "a.pth"), saved(LEFT_OUT, "b.pth"))
    assert (code, out.startswith("same but for bookkeeping and ties: 2 equal")) == (0, True)
