"""Several checkpoints are one table: a line each, of those that cannot be read too."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from oracles import FIXTURES, Run, Saved
from ptys import shown
from safetensors.torch import save_file

from ckptool.cli.terminal import tables


def cells(out: str) -> dict[str, list[str]]:
    """The words between two spaces or more, of each line by its first."""
    rows = [[word.strip() for word in line.split("  ") if word.strip()] for line in out.splitlines()]
    return {Path(row[0]).name: row[1:] for row in rows if row}


def test_each_file_is_a_line_with_what_it_holds(run: Run, saved: Saved, tmp_path: Path) -> None:
    one = saved({"w": torch.zeros(100, 20), "b": torch.zeros(20)}, "one.pth")
    two = saved({"w": torch.zeros(3, dtype=torch.float16), "n": torch.zeros(5, dtype=torch.int64)}, "two.pth")
    save_file({"x": torch.zeros(7, dtype=torch.bfloat16)}, tmp_path / "three.safetensors")
    code, out, err = run("inspect", one, two, tmp_path / "three.safetensors")
    assert (code, err, len(out.splitlines())) == (0, "", 4)
    assert out.splitlines()[0].split() == ["file", "format", "tensors", "params", "dtypes", "bytes"]
    found = cells(out)
    assert found["one.pth"] == ["torch-zip", "2", "2.02 k", "float32", "8.08 kB"]
    assert found["two.pth"] == ["torch-zip", "2", "8", "int64, float16", "46 B"]
    assert found["three.safetensors"] == ["safetensors", "1", "7", "bfloat16", "14 B"]


def test_the_sums_are_those_of_torch_ties_once_and_counters_no_parameters(run: Run, saved: Saved) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
    state = model.state_dict()
    tied = state | {"head.weight": state["0.weight"]}
    nested = {"n": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "w": torch.ones(4)}
    files = [saved(state, "plain.pth"), saved(tied, "tied.pth"), saved(nested, "nested.pth")]
    found = cells(run("inspect", *files)[1])
    number = sum(one.numel() for key, one in state.items() if "batches" not in key)
    size = sum(one.nbytes for one in state.values())
    assert found["plain.pth"][1:] == [str(len(state)), str(number), "float32, int64", f"{size} B"]
    assert found["tied.pth"][1:] == [str(len(tied)), str(number), "float32, int64", f"{size} B"]
    assert found["nested.pth"][2] == "9"
    for path in files:
        [report] = json.loads(run("inspect", path, "--json")[1])["result"]
        assert found[path.name][2] == str(report["parameters"])


def test_a_file_that_cannot_be_read_has_its_line_where_it_was_named(run: Run, saved: Saved) -> None:
    first, last = saved({"a": torch.zeros(1)}, "a.pth"), saved({"b": torch.zeros(1)}, "b.pth")
    bad = FIXTURES / "bad" / "html.pth"
    code, out, err = run("inspect", first, bad, "absent.pth", last)
    lines = out.splitlines()[1:]
    assert [Path(line.split()[0]).name for line in lines] == ["a.pth", "html.pth", "absent.pth", "b.pth"]
    assert lines[1].split(None, 1)[1].startswith("error: an HTML or XML page, not a checkpoint")
    assert lines[2].split(None, 1)[1] == "error: no such file or directory"
    assert (code, len(err.splitlines())) == (2, 2), "stderr has them too, as of a single file"


def test_a_directory_without_a_shard_is_incomplete_and_keeps_its_line(run: Run, tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / "sharded", tmp_path / "lacking")
    next((tmp_path / "lacking").glob("*-00002-*")).unlink()
    code, out, _ = run("inspect", tmp_path / "lacking", FIXTURES / "sharded")
    found = cells(out)
    assert code == 2
    assert found["lacking"][-1].startswith("incomplete")
    assert "incomplete" not in found["sharded"][-1]


def test_with_check_a_line_has_the_verdict_and_findings_follow_by_file(run: Run, saved: Saved) -> None:
    good = saved({"a": torch.zeros(1)}, "good.pth")
    bad = saved({"a": torch.tensor([float("nan")]), "b": torch.tensor([float("inf")])}, "bad.pth")
    code, out, _ = run("inspect", good, bad, FIXTURES / "malicious.pt", FIXTURES / "leaves.pth", "--check")
    table, *below = out.split("\n\n")
    found = cells(table)
    assert code == 1
    assert found["good.pth"][-1] == "nothing found"
    assert found["bad.pth"][-1] == "2 findings: nan, inf"
    assert found["malicious.pt"][-1] == "1 finding: acting"
    assert [Path(one.splitlines()[0]).name for one in below] == ["bad.pth", "malicious.pt", "leaves.pth"]
    assert "nan  a  1 of 1 are NaN" in below[0]
    code, out, _ = run("inspect", good, bad, "--check", "--fail-on", "acting")
    assert (code, cells(out.partition("\n\n")[0])["bad.pth"][-1]) == (0, "2 findings: nan, inf (passes)")


def test_what_could_not_be_checked_is_said_below(run: Run, saved: Saved) -> None:
    old = saved({"a": torch.zeros(1)}, "old.pth", _use_new_zipfile_serialization=False)
    out = run("inspect", old, FIXTURES / "tied.pth", "--check")[1]
    assert "unchecked  changed bytes in old.pth: the format has no checksums" in out


@pytest.mark.parametrize("option", [["--flat"], ["--fold"], ["--depth", "1"], ["--stats"], ["--hash"], ["--keys"]])
def test_what_asks_for_keys_shows_every_file_in_full(option: list[str], run: Run, saved: Saved) -> None:
    one, two = saved({"layer.a": torch.zeros(1)}, "one.pth"), saved({"other.b": torch.zeros(1)}, "two.pth")
    out = run("inspect", one, two, *option)[1]
    assert "layer." in out
    assert "other." in out
    assert "params" not in out


def test_chosen_keys_are_what_is_summed(run: Run, saved: Saved) -> None:
    one = saved({"head.w": torch.zeros(3), "body.w": torch.zeros(50)}, "one.pth")
    two = saved({"head.w": torch.zeros(4), "body.w": torch.zeros(50)}, "two.pth")
    found = cells(run("inspect", one, two, "--include", "head.*")[1])
    assert (found["one.pth"][1:3], found["two.pth"][1:3]) == (["1", "3"], ["1", "4"])


def test_sort_sorts_the_files(run: Run, saved: Saved) -> None:
    sizes = {"e10.pth": (3, torch.int8), "e9.pth": (2, torch.float64), "e1.pth": (1, torch.float32)}
    files = [saved({"w": torch.zeros(size, dtype=dtype)}, name) for name, (size, dtype) in sizes.items()]
    for sort, expected in {
        "key": ["e1.pth", "e9.pth", "e10.pth"],
        "numel": ["e10.pth", "e9.pth", "e1.pth"],
        "nbytes": ["e9.pth", "e1.pth", "e10.pth"],
    }.items():
        assert [*cells(run("inspect", *files, "--sort", sort)[1])][1:] == expected


def test_hostile_paths_and_kinds_are_escaped(run: Run, saved: Saved) -> None:
    nasty = saved({"w": torch.zeros(1)}, "a\x1b[31m\nb.pth")
    out = run("inspect", nasty, FIXTURES / "tied.pth", "absent\x1b[2J.pth")[1]
    assert "\x1b" not in out
    assert len(out.splitlines()) == 4


@pytest.mark.skipif(sys.platform != "linux", reason="needs pseudo-terminals")
@pytest.mark.parametrize("columns", [80, 140])
def test_the_table_fits_a_terminal_with_the_directory_above_it(columns: int, saved: Saved, tmp_path: Path) -> None:
    state = {"w": torch.zeros(1000, 20), "n": torch.zeros(3, dtype=torch.int64), "h": torch.zeros(3).half()}
    files = [saved(state, f"checkpoint_of_epoch_{number}.pth") for number in range(3)]
    seen = shown("inspect", *files, "absent.pth", columns=columns)
    lines = seen.out.splitlines()
    assert max(map(tables.width, lines)) <= columns
    seen = shown("inspect", *files, columns=columns)
    lines = seen.out.splitlines()
    assert (lines[0], len(lines)) == (f"{files[0].parent}/", 5)
    assert max(map(tables.width, lines[1:])) <= columns
    assert files[1].name in seen.out
    piped = shown("inspect", *files, columns=columns, ttys="").out.splitlines()
    assert [line.split()[0] for line in piped] == ["file", *map(str, files)]
