"""`inspect --tree`: the modules of a checkpoint, with what they take."""

from __future__ import annotations

import json
import math
import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import FIXTURES, Run, Saved
from ptys import shown
from torch import nn

from ckptool.cli.screens import tree as screen
from ckptool.cli.terminal import tables
from ckptool.ops.inspect import TensorRow, tree_of


def rows(text: str) -> list[list[str]]:
    """The cells of the tree's lines, the name with its indentation."""
    table = text.partition("\n\n")[2].splitlines()[1:]
    return [re.split(r"(?<=\S) {2,}", line) for line in table if not line.startswith("  hint")]


def names(text: str) -> list[str]:
    return [cells[0][2:] for cells in rows(text)]


def figures(run: Run, path: Path, *args: object) -> dict[str, Any]:
    code, out, _ = run("inspect", path, "--tree", "--json", *args)
    assert code == 0
    return dict(json.loads(out)["result"][0])


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2 = nn.LayerNorm(width), Attention(width), nn.LayerNorm(width)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})


class ViT(nn.Module):
    def __init__(self, blocks: int = 12, width: int = 8) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, 4)})
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)


class Layer(nn.Module):
    def __init__(self, width: int, experts: int) -> None:
        super().__init__()
        self.self_attn = nn.ModuleDict({name: nn.Linear(width, width, bias=False) for name in ("q_proj", "o_proj")})
        if experts:
            expert = [nn.ModuleDict({"up_proj": nn.Linear(width, 3)}) for _ in range(experts)]
            self.mlp: nn.Module = nn.ModuleDict({"gate": nn.Linear(width, 2), "experts": nn.ModuleList(expert)})
        else:
            self.mlp = nn.ModuleDict({"up_proj": nn.Linear(width, 7, bias=False)})


class Llama(nn.Module):
    def __init__(self, layers: int = 32, dense: int = 32, width: int = 4, tied: bool = False) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(50, width)
        self.model.layers = nn.ModuleList(Layer(width, 4 * (at >= dense)) for at in range(layers))
        self.lm_head = nn.Linear(width, 50, bias=False)
        if tied:
            self.lm_head.weight = self.model.embed_tokens.weight


def parameters(model: nn.Module, name: str = "") -> int:
    """Of torch itself: parameters and buffers but counters, each storage once."""
    found = {id(one): one for one in model.get_submodule(name).parameters()}
    return sum(one.numel() for one in found.values())


def test_a_vit_is_one_screen_of_modules_in_their_order(run: Run, saved: Saved) -> None:
    path = saved(ViT().state_dict())
    assert names(run("inspect", path, "--tree")[1]) == [
        "all",
        "  cls_token",
        "  patch_embed.proj",
        "  blocks.{0..11} x 12",
        "    norm{1,2} x 2",
        "    attn",
        "      qkv",
        "      proj",
        "    mlp",
        "      fc1",
        "      fc2",
        "  norm",
        "  head",
    ]


@pytest.mark.parametrize("piped", [True, False])
def test_numbers_are_those_of_torch_and_of_the_report(run: Run, saved: Saved, piped: bool) -> None:
    model = Llama()
    path = saved(model.state_dict())
    out = run("inspect", path, "--tree")[1] if piped else shown("inspect", path, "--tree", columns=200).out
    found = {cells[0].split()[0]: cells[1:4] for cells in rows(out)}
    total = parameters(model)
    for name, module in {"all": "", "model": "model", "embed_tokens": "model.embed_tokens", "lm_head": "lm_head",
                         "layers.{0..31}": "model.layers"}.items():  # fmt: skip
        number = parameters(model, module)
        assert found[name][0] == (str(number) if number < 1000 else f"{number / 1000:.3g} k")
        assert found[name][2] == ("100 %" if number == total else f"{100 * number / total:.1f} %")
    assert "layers.{0..31} x 32" in out


@pytest.mark.parametrize(
    "state",
    [ViT().state_dict(), Llama(tied=True).state_dict(), nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).state_dict(),
     {"w": torch.zeros(0, 3), "a.w": torch.zeros(2)}, {"w": torch.zeros(3)}, {"": torch.zeros(3)}, torch.zeros(2),
     {"a.b.w": torch.zeros(3).to_sparse()}, {"bn.num_batches_tracked": torch.tensor(1)},
     {"G": {"c.w": torch.zeros(3)}, "D": {"c.w": torch.zeros(4)}}],
    ids=["vit", "tied", "counters", "empty tensors", "one key", "an empty key", "a bare tensor", "sparse",
         "only a counter", "two models"],
)  # fmt: skip
def test_the_top_has_the_sums_of_the_report(run: Run, saved: Saved, state: Any) -> None:
    report = figures(run, saved(state))
    top = report["tree"]
    assert (top["tensors"], top["parameters"], top["nbytes"]) == (
        len(report["tensors"]), report["parameters"], report["tensor_nbytes"]
    )  # fmt: skip

    def check(node: dict[str, Any], name: str) -> None:
        if "key" in node:
            assert (node["key"], node["below"]) == (name, {})
            return
        for field in ("tensors", "parameters", "nbytes"):
            assert node[field] == sum(one[field] for one in node["below"].values())
        for segment, one in node["below"].items():
            check(one, name + segment)

    check(top, "")


def test_tied_weights_count_once_and_say_with_what(run: Run, saved: Saved) -> None:
    model = Llama(2, tied=True)
    out = run("inspect", saved(model.state_dict()), "--tree")[1]
    assert rows(out)[-1] == ["    lm_head", "0", "0 B", "0 %", "= model.embed_tokens"]
    shared = nn.ModuleList([nn.Linear(3, 3)] * 4)  # ALBERT's way
    lines = rows(
        run("inspect", saved(nn.ModuleDict({"layers": shared, "head": nn.Linear(3, 2)}).state_dict()), "--tree")[1]
    )
    assert [cells[0].strip() for cells in lines] == ["all", "layers", "0", "{1..3} x 3", "head"]
    assert lines[3][1:] == ["0", "0 B", "0 %", "= layers.0"]


def test_siblings_that_differ_are_lines_of_their_own(run: Run, saved: Saved) -> None:
    found = names(run("inspect", saved(Llama(8, dense=2).state_dict()), "--tree")[1])
    assert [name for name in found if "{" in name] == [
        "      {0,1} x 2", "      {2..7} x 6", "          experts.{0..3}.up_proj x 4"
    ]  # fmt: skip
    state = {f"layers.{i}.w": torch.zeros(2) for i in range(5)}
    state["layers.3.w"] = torch.zeros(2, dtype=torch.float16)
    assert names(run("inspect", saved(state), "--tree")[1]) == ["layers.", "  {0..2,4} x 4", "  3"]
    state = {f"layers.{i}.{'b' if i % 2 else 'a'}": torch.zeros(2) for i in range(4)}
    assert names(run("inspect", saved(state), "--tree")[1]) == ["layers.", "  {0,2} x 2", "  {1,3} x 2"]


def test_what_all_keys_begin_with_is_named_at_the_top(run: Run, saved: Saved) -> None:
    state = {f"module.model.{name}": torch.zeros(2) for name in ("a.w", "b.w", "c")}
    assert names(run("inspect", saved(state), "--tree")[1]) == ["module.model.", "  a", "  b", "  c"]
    assert names(run("inspect", saved({"a.b.w": torch.zeros(2)}), "--tree")[1]) == ["a.b.", "  w"]
    assert names(run("inspect", saved({"w": torch.zeros(2)}), "--tree")[1]) == ["all", "  w"]


def test_keys_without_dots_are_lines_and_fold_where_they_are_numbered(run: Run, saved: Saved) -> None:
    state = {f"w{i}": torch.zeros(2) for i in range(200)} | {"bias": torch.zeros(3)}
    assert names(run("inspect", saved(state), "--tree")[1]) == ["all", "  w{0..199} x 200", "  bias"]


def test_names_are_data_and_empty_segments_are_shown(run: Run, saved: Saved) -> None:
    state = {"": torch.zeros(1), "a..b": torch.zeros(2), "a.c": torch.zeros(2), ".": torch.zeros(3),
             "x\x1b[31m.\n.w": torch.zeros(1), "a": torch.zeros(2)}  # fmt: skip
    out = run("inspect", saved(state), "--tree")[1]
    assert names(out) == ["all", "  ''", "  a", "    ''", "    c", "  ''", "  x\\x1b[31m.\\n", "  a"]
    assert "\x1b" not in out


def test_depth_says_how_many_levels_are_shown_and_the_rest_is_in_them(run: Run, saved: Saved) -> None:
    path = saved(Llama(8, dense=2).state_dict())
    whole = {
        name.strip(): cells
        for name, cells in zip(
            names(run("inspect", path, "--tree")[1]), rows(run("inspect", path, "--tree")[1]), strict=True
        )
    }
    assert names(run("inspect", path, "--tree", "--depth", "1")[1]) == ["all", "  model", "  lm_head"]
    found = run("inspect", path, "--tree", "--depth", "2")[1]
    assert names(found) == ["all", "  model", "    embed_tokens", "    layers", "  lm_head"]
    assert all(cells[1:] == whole[cells[0].strip()][1:] for cells in rows(found))
    vit = saved(ViT(3).state_dict(), "vit.pth")
    assert names(run("inspect", vit, "--tree", "--depth", "1")[1])[2:4] == ["  patch_embed", "  blocks"]
    assert names(run("inspect", vit, "--tree", "--depth", "2")[1])[2:4] == ["  patch_embed.proj", "  blocks.{0..2} x 3"]
    assert [*figures(run, vit, "--depth", "1")["tree"]["below"]["blocks."]["below"]] == []
    assert [*figures(run, vit, "--depth", "2")["tree"]["below"]["blocks."]["below"]] == ["0.", "1.", "2."]


def wide(modules: int, below: int) -> dict[str, torch.Tensor]:
    return {f"m{chr(97 + i)}{chr(97 + j)}.{chr(97 + k)}.w": torch.zeros(i + j + k + 1)
            for i in range(modules) for j in range(5) for k in range(below)}  # fmt: skip


@pytest.mark.skipif(sys.platform != "linux", reason="needs pseudo-terminals")
def test_a_terminal_gets_one_screen_and_the_depth_that_shows_more(saved: Saved) -> None:
    out = shown("inspect", saved(wide(5, 3)), "--tree", "--color", "never").out
    assert (len(names(out)), out.splitlines()[-1]) == (26, "  hint  --depth 2: 100 lines")
    assert len(names(shown("inspect", saved(wide(5, 3)), "--tree", "--depth", "2").out)) == 101
    out = shown("inspect", saved(wide(20, 1)), "--tree", "--color", "never").out
    assert len(names(out)) == 41
    assert names(out)[-1] == "  and 61 more"
    assert out.splitlines()[-1] == "  hint  --depth 1: 100 lines"
    small = saved({f"{c}.w": torch.zeros(n + 1) for n, c in enumerate("abc")}, "small.pth")
    assert "hint" not in shown("inspect", small, "--tree").out


def test_a_pipe_gets_every_module(run: Run, saved: Saved) -> None:
    out = run("inspect", saved(wide(20, 3)), "--tree")[1]
    assert len(names(out)) == 401
    assert "hint" not in out


def test_folding_can_be_switched_off(run: Run, saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CKPTOOL_FOLD", "0")
    found = names(run("inspect", saved(ViT(3).state_dict()), "--tree", "--depth", "2")[1])
    assert [name.strip() for name in found] == [
        "all", "cls_token", "patch_embed.proj", "blocks", "0", "1", "2", "norm", "head"
    ]  # fmt: skip


def test_sort_is_of_what_stands_beside_each_other(run: Run, saved: Saved) -> None:
    path = saved(
        {
            "b.x": torch.zeros(3, dtype=torch.float64),
            "a10": torch.zeros(4),
            "a9": torch.zeros(1),
            "b.y.w": torch.zeros(9),
        }
    )
    assert names(run("inspect", path, "--tree")[1])[1:] == ["  b", "    x", "    y", "  a10", "  a9"]
    assert names(run("inspect", path, "--tree", "--sort", "key")[1])[1:] == ["  a9", "  a10", "  b", "    x", "    y"]
    assert names(run("inspect", path, "--tree", "--sort", "nbytes")[1])[1:] == [
        "  b",
        "    y",
        "    x",
        "  a10",
        "  a9",
    ]


def test_only_chosen_keys_are_in_it(run: Run, saved: Saved) -> None:
    path = saved(Llama(3, tied=True).state_dict())
    found = rows(run("inspect", path, "--tree", "--include", "lm_head.*")[1])
    assert [cells[:4] for cells in found] == [
        ["  lm_head.", "200", "800 B", "100 %"],
        ["    weight", "200", "800 B", "100 %"],
    ]


@pytest.mark.parametrize("columns", [24, 40, 60, 80, 200])
def test_lines_fit_the_terminal_and_the_longest_bar_is_the_top(
    columns: int, run: Run, saved: Saved, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "columns", lambda: columns)
    state = Llama(4, tied=True).state_dict() | {".".join(["a_long_name_of_a_module"] * 9): torch.zeros(500)}
    out = run("inspect", saved(state), "--tree")[1].partition("\n\n")[2]
    lines = [line for line in out.splitlines() if "hint" not in line]
    assert all(tables.width(line) <= max(columns, 40) for line in lines), out
    bars = [line.count("█") for line in lines]
    assert max(bars) == bars[1] >= 6
    assert ("params" in out, "share" in out) == (columns > 40, columns > 40)
    assert "layers.{0..3} x 4" in out or columns < 60


@pytest.mark.skipif(sys.platform != "linux", reason="needs pseudo-terminals")
def test_bars_are_of_the_letters_that_there_are(saved: Saved) -> None:
    path = saved(ViT(2).state_dict())
    out = shown("inspect", path, "--tree", PYTHONIOENCODING="ascii", PYTHONUTF8="0").out
    assert "##########" in out
    assert out.isascii()
    assert "#" not in out.split("cls_token")[0].split("params")[0]


def test_many_keys_and_levels_take_no_time() -> None:
    many = [TensorRow(f"layers.{i // 10}.m{i % 10}.weight", [2], "float32", 8) for i in range(20_000)]
    slashes = [TensorRow("a/" * 30_000 + end, [2], "float32", 8) for end in "xyz"]
    begin = time.process_time()
    assert len(screen.lines(many, None, None)) == 3
    assert len(screen.lines(slashes, None, None)) == 5
    assert time.process_time() - begin < 4
    assert tree_of(many).nbytes == 160_000


@pytest.mark.parametrize("others", [["--flat"], ["--keys"], ["--stats"], ["--hash"], ["--format", "markdown"]])
def test_what_has_no_tree_is_refused(run: Run, others: list[str]) -> None:
    code, out, err = run("inspect", FIXTURES / "tied.pth", "--tree", *others)
    assert code == 2
    assert err.startswith("ckptool: error: --tree goes with ") or "error: --tree goes with " in out


def test_it_goes_with_check_and_with_several_files(run: Run, saved: Saved) -> None:
    path = saved({"a.w": torch.tensor([math.nan]), "b.w": torch.zeros(1)})
    code, out, _ = run("inspect", path, "--tree", "--check")
    assert code == 1
    assert "check: 1 finding" in out
    assert out.index("check: 1") < out.index("params")
    out = run("inspect", path, path, "--tree")[1]
    assert out.count("params ") == 2
    empty = saved({"epoch": 1}, "empty.pth")
    code, out, _ = run("inspect", empty, "--tree")
    assert code == 0
    assert "no tensors" in out
    assert "params" not in out
