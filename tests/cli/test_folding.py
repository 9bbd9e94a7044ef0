"""Alike keys are one line for a person; a pipe gets one line per key."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import Run

from ckptool.core import keys

Saved = Callable[..., Path]


class Block(torch.nn.Module):
    """A residual block: two convolutions of one shape, each with a norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = (torch.nn.Conv2d(width, width, 3, bias=False) for _ in range(2))
        self.bn1, self.bn2 = torch.nn.BatchNorm2d(width), torch.nn.BatchNorm2d(width)


class Net(torch.nn.Module):
    def __init__(self, blocks: int = 2) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(Block(4) for _ in range(blocks))
        self.norm = torch.nn.LayerNorm(4)
        self.head = torch.nn.Linear(4, 3)


def shown(lines: str) -> list[str]:
    """The first words of the indented lines: the names of the keys."""
    return [line.split()[0] for line in lines.splitlines() if line.startswith("  ")]


def in_terminal(args: Iterable[object], columns: int = 80) -> str:
    """What a person sees who runs the command in a terminal."""
    parent, child = pty.openpty()
    variables = {**os.environ, "COLUMNS": str(columns), "NO_COLOR": "1", "TERM": "xterm"}
    variables.pop("CKPTOOL_FOLD", None)
    command = [sys.executable, "-m", "ckptool", *map(str, args)]
    with subprocess.Popen(command, stdout=child, stderr=child, stdin=child, env=variables) as process:
        os.close(child)
        found = b""
        while True:
            try:
                piece = os.read(parent, 1 << 16)
            except OSError:  # the terminal's other end is closed
                break
            if not piece:
                break
            found += piece
        process.wait()
    os.close(parent)
    return found.decode().replace("\r\n", "\n")


@pytest.mark.usefixtures("folding")
def test_the_tensors_of_a_norm_layer_are_one_line_and_the_layers_with_it(run: Run, saved: Saved) -> None:
    path = saved(Net().state_dict())
    assert shown(run("inspect", path)[1]) == [
        "layers.{0,1}.conv{1,2}.weight",
        "layers.{0,1}.bn{1,2}.{weight,bias,running_mean,running_var}",
        "layers.{0,1}.bn{1,2}.num_batches_tracked",
        "norm.{weight,bias}",
        "head.weight",
        "head.bias",
    ]


@pytest.mark.usefixtures("folding")
@pytest.mark.parametrize(
    ("state", "lines"),
    [
        ({"n.weight": torch.ones(2), "n.bias": torch.ones(2).half()}, ["n.weight", "n.bias"]),
        ({"n.weight": torch.ones(2), "n.bias": torch.ones(3)}, ["n.weight", "n.bias"]),
        ({"a.q": torch.ones(2), "b.k": torch.ones(2), "a.v": torch.ones(2)}, ["a.{q,v}", "b.k"]),
        ({"weight": torch.ones(2), "bias": torch.ones(2)}, ["{weight,bias}"]),
        ({"x.w1": torch.ones(2), "x.w2": torch.ones(2), "x.b": torch.ones(2)}, ["x.w{1,2}", "x.b"]),
        ({f"x.{name}": torch.ones(2) for name in "abcdefghi"}, [f"x.{name}" for name in "abcdefghi"]),
        ({f"f.{i}.{name}": torch.ones(2) for i in (0, 1, 3, 4) for name in ("b", *"w" * (i % 3 == 1))},
         ["f.{0,3}.b", "f.{1,4}.{b,w}"]),
    ],
    ids=["dtypes", "shapes", "modules", "the root", "numbers", "many", "VGG with BatchNorm"],
)  # fmt: skip
def test_only_tensors_of_one_module_shape_and_dtype_are_one_line(
    run: Run, saved: Saved, state: dict[str, Any], lines: list[str]
) -> None:
    prefix = keys.common_prefix(list(state))
    found = shown(run("inspect", saved(state))[1].partition("\n\n")[2])
    assert found == [line.removeprefix(prefix) for line in lines]


@pytest.mark.parametrize("command", ["inspect", "diff", "filter", "load-partial", "remap", "drop"])
def test_grep_finds_every_key_where_a_pipe_gets_the_report(run: Run, saved: Saved, command: str) -> None:
    state = Net(3).state_dict()
    path = saved(state)
    names = [key for key in state if key.startswith("layers.")]
    small = saved({key: value for key, value in state.items() if key not in names}, "small.pth")
    args: dict[str, tuple[object, ...]] = {
        "inspect": ("inspect", path),
        "diff": ("diff", path, small),
        "filter": ("filter", small, "--match", path, "--dry-run"),
        "load-partial": ("load-partial", small, "--into", path, "--dry-run", "--init", "*=zeros"),
        "remap": ("remap", path, "--add-prefix", "net.", "--dry-run"),
        "drop": ("remap", path, "--drop", "layers.*", "--dry-run"),
    }
    found = run(*args[command])[1]
    words = {word for line in found.splitlines() for word in line.split()}
    assert [key for key in names if key not in words] == []
    assert "{" not in found


@pytest.mark.parametrize("case", ["ties", "empty", "left out", "changed", "not taken", "statistics", "optimizer"])
def test_a_pipe_gets_every_key_of_a_note_and_a_terminal_the_first(
    run: Run, saved: Saved, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    names = [f"{chr(97 + i // 26)}{chr(97 + i % 26)}" for i in range(50)]
    ones = torch.ones(2)
    states: dict[str, tuple[Any, list[str]]] = {
        "ties": ({f"{name}.{end}": one for name in names for one in [torch.ones(2)] for end in "xy"},
                 ["inspect", "IN"]),
        "empty": ({name: torch.ones(0, 2) for name in names} | {"w": ones}, ["inspect", "IN", "--depth", "1"]),
        "left out": ({"state_dict": {"w": ones}, **dict.fromkeys(names, 1)},
                     ["convert", "IN", "-o", "out.safetensors", "--dry-run"]),
        "changed": ({name: torch.full((2,), 1e30) for name in names},
                    ["convert", "IN", "-o", "out.pth", "--dtype", "float16"]),
        "not taken": ({"state_dict": {"v": ones}, **dict.fromkeys(names, 1)},
                      ["filter", "w.pth", "IN", "--dry-run"]),
        "statistics": ({name: ones.to_sparse() for name in names} | {"w": ones}, ["inspect", "IN", "--stats"]),
        "optimizer": ({"model": {"w": ones}, **{name: {"x": ones} for name in names}}, ["inspect", "IN"]),
    }  # fmt: skip
    state, args = states[case]
    saved({"w": ones}, "w.pth")
    saved(state, "in.pth")
    words = [arg.replace("IN", "in.pth") for arg in args]
    found = re.findall(r"[\w.]+", "".join(run(*words)[1:]))
    keys_of = [f"{name}.x" for name in names] if case == "ties" else names
    assert [name for name in keys_of if name not in found] == []
    monkeypatch.setenv("CKPTOOL_FOLD", "1")
    _, out, _ = run(*words, *(["--force"] if "out.pth" in words else []))
    if case in ("ties", "left out", "changed", "not taken"):
        assert re.search(r"3\d more", out)
        assert case == "ties" or names[-1] not in re.findall(r"\w+", out)


def test_a_terminal_gets_alike_keys_as_one_line_and_a_pipe_one_line_per_key(saved: Saved) -> None:
    path = saved(Net().state_dict())
    assert "layers.{0,1}.conv{1,2}.weight" in in_terminal(["inspect", path])
    piped = subprocess.run(
        [sys.executable, "-m", "ckptool", "inspect", path], capture_output=True, text=True, check=True
    ).stdout
    assert shown(piped) == list(Net().state_dict())


def test_fold_and_flat_and_the_variable_say_otherwise(run: Run, saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(Net().state_dict())
    assert "{0,1}" in run("inspect", path, "--fold")[1]
    assert "{0,1}" not in run("inspect", path, "--flat")[1]
    monkeypatch.setenv("CKPTOOL_FOLD", "1")
    assert "{0,1}" in run("inspect", path)[1]
    assert "{0,1}" not in run("inspect", path, "--flat")[1]
    monkeypatch.setenv("CKPTOOL_FOLD", "0")
    assert "{0,1}" not in run("inspect", path)[1]
    assert run("inspect", path, "--flat", "--fold")[0] == 2


def test_sort_by_key_is_in_the_order_of_the_numbers(run: Run, saved: Saved) -> None:
    state = {f"layers.{i}.w": torch.zeros(2) for i in (10, 9, 2, 100, 1)} | {"bias": torch.zeros(1)}
    out = run("inspect", saved(state), "--sort", "key", "--keys")[1]
    assert out.split() == ["bias", *(f"layers.{i}.w" for i in (1, 2, 9, 10, 100))]
    sizes = run("inspect", saved(state), "--sort", "nbytes", "--keys")[1]
    assert sizes.split() == [*(f"layers.{i}.w" for i in (1, 2, 9, 10, 100)), "bias"]


def test_a_long_list_says_which_depth_is_short(run: Run, saved: Saved, folding: None) -> None:
    state = {f"block.{chr(97 + i)}.{chr(97 + j)}.w": torch.zeros(i + 1, j + 1) for i in range(20) for j in range(4)}
    found = run("inspect", saved(state | {"head": torch.zeros(3)}))[1]
    assert found.splitlines()[-1].split() == ["hint", "--depth", "2:", "21", "lines"]
    depth = run("inspect", saved(state | {"head": torch.zeros(3)}), "--depth", "2")[1]
    assert len(shown(depth)) == 21
    assert "hint" not in depth
    assert "hint" not in run("inspect", saved({key: state[key] for key in list(state)[:20]}))[1]


def test_a_depth_that_is_no_shorter_is_not_offered(run: Run, saved: Saved, folding: None) -> None:
    beside = {f"an_entry_{chr(97 + i // 26)}{chr(97 + i % 26)}": i for i in range(60)}
    path = saved({"state_dict": {f"{name}.w": torch.zeros(2, at) for at, name in enumerate("abc")}, **beside})
    for options in ([], ["--check"]):
        assert "hint" not in run("inspect", path, *options)[1]


def test_alike_entries_beside_the_weights_are_one_line_on_a_terminal(
    run: Run, saved: Saved, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved({"state_dict": {"w": torch.ones(2)}, "a": {f"layers.{i}._extra_state": None for i in range(12)},
                  **{f"layer{i}_state": None for i in range(12)}, "layer12_state": 3})  # fmt: skip
    names = [f"layer{i}_state: None" for i in range(12)]
    assert all(name in run("inspect", path)[1] for name in names)
    monkeypatch.setenv("CKPTOOL_FOLD", "1")
    out = run("inspect", path)[1]
    assert "layer{0..11}_state: None" in out
    assert "layer12_state: 3" in out
    assert not any(name in out for name in names)


def test_a_pipe_gets_no_hint_of_a_depth(run: Run, saved: Saved) -> None:
    out = run("inspect", saved({f"k{i}.a.b": torch.zeros(i + 1) for i in range(90)}))[1]
    assert "--depth" not in out


def test_shards_are_counted(run: Run, saved: Saved, tmp_path: Path) -> None:
    path = saved({f"w{i}": torch.zeros(100) for i in range(3)})
    assert run("convert", path, "--to", "sharded", "-o", tmp_path / "out", "--max-shard-size", "400")[0] == 0
    found = run("inspect", tmp_path / "out")[1]
    assert re.search(r"sharded safetensors, 3 files, [\d.]+ kB", found.splitlines()[0])
    assert "files" not in run("inspect", path)[1]
