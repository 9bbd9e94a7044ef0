"""What every writing command promises of its outputs, whatever the format: one contract, over all of them.

What is promised of a file while it is written (disks that are full, permissions, kills) stands in `test_writing`.
"""

from __future__ import annotations

import functools
import json
import os
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracles import Run, content

import ckptool
from ckptool.io.output import LocalOutput

Refused = Callable[..., str]

OUT = {"torch": "out.pth", "torch-legacy": "out.pth", "safetensors": "out.safetensors", "npz": "out.npz",
       "sharded": "out", "sharded-bin": "out", "dcp": "out"}  # fmt: skip
DIRECTORIES = [name for name, out in OUT.items() if out == "out"]
BESIDE = {"remap": ["--save-map", "map.json"], "load-partial": ["--groups-out", "groups.json"]}
"""The files that a command writes beside its output, on request."""
COMMANDS = ["filter", "remap", "convert", "load-partial"]
CASES = [
    pytest.param((command, name), id=f"{command} {name}",
                 marks=[] if command == "convert" or name in ("torch", "safetensors", "sharded") else pytest.mark.slow)
    for command in COMMANDS for name in OUT
]  # fmt: skip
"""All commands go one way out: each writes a file of torch's, another one and a directory, and one all formats."""


def weights(seed: int) -> dict[str, torch.Tensor]:
    return {f"t{number}": torch.full((50, 10), seed + number / 8) for number in range(3)}


@functools.cache
def written(to: str, seed: int) -> dict[str, bytes]:
    """The files of a checkpoint in a format, by their names; of one file, by none."""
    with tempfile.TemporaryDirectory() as directory:
        made = Path(directory, "made")
        torch.save(weights(seed), f"{made}.pth")
        ckptool.convert(f"{made}.pth", made, to=to, max_shard_size=4000, fsync=False)
        files = [path for path in made.rglob("*") if path.is_file()] if made.is_dir() else [made]
        return {str(path.relative_to(made)): path.read_bytes() for path in files}


@dataclass(frozen=True)
class Case:
    """A command that writes a format."""

    command: str
    format: str

    @property
    def out(self) -> str:
        return OUT[self.format]

    def source(self, name: str, seed: int = 0) -> str:
        """Writes a checkpoint of the format that the case writes, under its suffix; torch's where that is npz."""
        path = name + self.out.removeprefix("out")
        made = written("torch" if self.format == "npz" else self.format, seed)
        for below, data in made.items():
            (Path(path) / below).parent.mkdir(exist_ok=True)
            (Path(path) / below).write_bytes(data)
        return path

    def args(self, source: str, output: str, *more: str) -> list[str]:
        """Returns the command line; ``target`` is of the same keys and shapes."""
        own = {
            "filter": ["--match", "target.pth"], "remap": ["--sub", "s/^t/x/"], "convert": [],
            "load-partial": ["--into", "target.pth"],
        }  # fmt: skip
        to = ["--to", self.format, "--max-shard-size", "4000"]
        return [self.command, source, *own[self.command], "-o", output, *to, *more]

    def values(self, path: str) -> dict[str, torch.Tensor]:
        """Returns the tensors of an output, by the keys of the source."""
        if self.format == "npz":
            made = {key: torch.from_numpy(value) for key, value in np.load(path).items()}
        else:
            made = ckptool.open(path).to_torch(only_root=True)
        return {key.replace("x", "t"): value for key, value in made.items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def told(out: str) -> Any:
    """Returns the JSON document of a run but for what only a run that writes can say."""
    document = json.loads(out)
    (result,) = document["result"] if isinstance(document["result"], list) else [document["result"]]
    return {
        **document,
        "result": {key: value for key, value in result.items() if key not in ("output", "nbytes", "verified")},
    }


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    Path("target.pth").write_bytes(written("torch", 5)["."])
    return Case(*request.param)


def test_an_output_is_the_same_bytes_twice_and_inputs_stay(case: Case, run: Run) -> None:
    source = case.source("in")
    before = content()
    assert run(*case.args(source, case.out))[::2] == (0, "")
    assert same(case.values(case.out), weights(0))
    first = content()
    assert {path: first[path] for path in before} == before
    os.mkdir("again")
    assert run(*case.args(source, f"again/{case.out}"))[0] == 0
    made = {path: data for path, data in content().items() if path not in before}
    assert {path.removeprefix("again/"): data for path, data in made.items() if path != "again"} == {
        path: data for path, data in first.items() if path not in before
    }


def test_what_is_there_is_replaced_with_force_only(case: Case, run: Run, refused: Refused) -> None:
    source, other = case.source("in"), case.source("other", seed=2)
    beside = [*BESIDE.get(case.command, ()), "--report", "report.json"]
    args = case.args(source, case.out, *beside)
    assert run(*args)[0] == 0
    whole = content()
    assert run(*case.args(other, case.out, *beside, "--force"))[0] == 0
    for name in beside[1::2]:
        Path(name).write_bytes(b"mine")
    assert same(case.values(case.out), weights(2))
    assert "exist" in refused(*args)
    assert "exist" in refused(*args, "--dry-run")
    assert run(*args, "--force")[::2] == (0, "")
    assert content() == whole


@pytest.mark.parametrize("way", ["name", "another spelling", "symlink", "hard link"])
def test_an_input_is_replaced_in_place_only(way: str, case: Case, run: Run, refused: Refused) -> None:
    source = case.source("in")
    output = source
    if way == "another spelling":
        output = f"../{Path.cwd().name}/./{source}"
    elif way == "symlink":
        output = f"link{case.out.removeprefix('out')}"
        os.symlink(source, output)
    elif way == "hard link" and case.format in DIRECTORIES:
        output = "linked"
        os.mkdir(output)
        for name in os.listdir(source):
            os.link(f"{source}/{name}", f"{output}/{name}")
    elif way == "hard link":
        output = f"link{case.out.removeprefix('out')}"
        os.link(source, output)
    args = case.args(source, output)
    for more in (["--force"], ["--force", "--dry-run"]):
        assert "--in-place" in refused(*args, *more)
    refused(*args)
    assert run(*args, "--in-place", "--dry-run")[0] == 0
    old = Path(output)
    old = (
        min(path for path in old.iterdir() if path.suffix in (".safetensors", ".bin", ".distcp"))
        if old.is_dir()
        else old
    )
    before, there = old.read_bytes(), set(os.listdir())
    with old.open("rb") as reader:
        assert run(*args, "--in-place")[::2] == (0, "")
        assert reader.read() == before, "a reader that has the old file open still sees all of it"
    assert set(os.listdir()) == there
    assert same(case.values(output), weights(0))
    assert os.path.islink(output) == (way == "symlink")


def test_no_other_input_is_overwritten_either(case: Case, run: Run, refused: Refused) -> None:
    if case.command not in ("filter", "load-partial") or not case.format.startswith("torch"):
        pytest.skip("it has one input, or none of this format")
    source = case.source("in")
    os.link("target.pth", "linked.pth")
    for name in ("target.pth", "linked.pth"):
        assert "is one of the inputs" in refused(*case.args(source, name, "--force"))
    assert run(*case.args(source, "target.pth", "--in-place"))[0] == 0
    assert same(case.values("target.pth"), weights(0))


def test_a_place_where_it_cannot_lie_is_refused(case: Case, refused: Refused) -> None:
    source = case.source("in")
    suffix = case.out.removeprefix("out")
    Path("file").write_bytes(b"x")
    os.mkdir(f"there{suffix}")
    Path(f"there{suffix}/mine").write_bytes(b"mine")
    for more in ([], ["--force"], ["--dry-run"], ["--in-place"]):
        if case.format in DIRECTORIES:
            assert "is a file" in refused(*case.args(source, "file", *more))
        else:
            assert "is a directory" in refused(*case.args(source, f"there{suffix}", *more))
        assert "no such directory" in refused(*case.args(source, f"absent/{case.out}", *more))


def test_without_an_output_it_is_a_dry_run_or_refused(case: Case, run: Run, refused: Refused) -> None:
    source = case.source("in")
    args = [word for word in case.args(source, case.out) if word not in ("-o", case.out)]
    if case.command != "convert":
        assert "--dry-run" in refused(*args)
        before = content()
        assert run(*args, "--dry-run")[::2] == (0, "")
        assert content() == before


def test_a_dry_run_writes_nothing_but_the_report(case: Case, run: Run) -> None:
    source = case.source("in")
    before = content()
    args = case.args(source, case.out, "--dry-run")
    code, out, err = run(*args, "--json")
    assert (code, err, content()) == (0, "", before)
    assert run(*args, "--report", "report.json")[::2] == (0, "")
    assert content() == {**before, "report.json": out.encode()}
    assert run(*args, *BESIDE.get(case.command, ()), "--report", "report.json", "--force")[0] == 0
    assert content() == {**before, "report.json": out.encode()}
    assert "dry run" in run(*args)[1]
    assert told(out) == told(run(*case.args(source, case.out, "--json"))[1])


def test_the_report_is_the_document_that_json_prints(case: Case, run: Run) -> None:
    source = case.source("in")
    code, out, err = run(*case.args(source, case.out, "--report", "report.json", "--json"))
    assert (code, err) == (0, "")
    assert Path("report.json").read_text() == out
    document = json.loads(out)
    assert (document["schema"], document["command"]) == (1, case.command)
    (result,) = document["result"] if case.command == "convert" else [document["result"]]
    assert result["output"] == case.out


@pytest.mark.parametrize("dry", [[], ["--dry-run"]], ids=["run", "dry run"])
def test_the_report_is_no_input_no_output_and_overwrites_nothing(case: Case, dry: list[str], refused: Refused) -> None:
    source = case.source("in")
    Path("mine.json").write_bytes(b"mine")
    os.symlink(case.out, "link")
    inputs = [f"in/{name}" for name in os.listdir("in")] if case.format in DIRECTORIES else [source]
    inputs += ["target.pth"] if case.command in ("filter", "load-partial") else []
    for option in ("--report", *BESIDE.get(case.command, ())[:1]):
        assert "exists already" in refused(*case.args(source, case.out, *dry, option, "mine.json"))
        assert "no such directory" in refused(*case.args(source, case.out, *dry, option, "absent/x.json"))
        for name in inputs:
            line = refused(*case.args(source, case.out, *dry, option, name, "--force"))
            assert "is one of the inputs" in line
        for name in (case.out, f"./{case.out}", "link"):
            assert "two outputs" in refused(*case.args(source, case.out, *dry, option, name, "--force"))
        if option != "--report":
            line = refused(*case.args(source, case.out, *dry, option, "x.json", "--report", "x.json"))
            assert "two outputs" in line


@pytest.mark.parametrize("method", ["write", "finished", "commit"])
def test_an_interrupt_on_the_way_leaves_what_was_there(
    method: str, case: Case, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, other = case.source("in"), case.source("other", seed=2)
    original = getattr(LocalOutput, method)
    calls: list[int] = []
    beside = BESIDE.get(case.command, ())

    def interrupted(self: LocalOutput, *args: Any) -> Any:
        calls.append(1)
        if len(calls) == 2 or method == "commit":
            raise KeyboardInterrupt
        return original(self, *args)

    for old in (False, True):
        if old:
            assert run(*case.args(other, case.out))[0] == 0
        before = content()
        calls.clear()
        with monkeypatch.context() as patch:
            patch.setattr(LocalOutput, method, interrupted)
            code, out, err = run(
                *case.args(source, case.out, "--force", "--verify", "--report", "report.json", *beside)
            )
        assert (code, out, err, content()) == (130, "", "ckptool: interrupted\n", before)


def test_what_a_format_does_not_hold_is_said(case: Case, run: Run) -> None:
    holds = case.format.startswith("torch") or case.format == "dcp"
    torch.save({"model": weights(0), "epoch": 3}, "nested.pth")
    torch.save({"model": weights(5), "epoch": 3}, "target.pth")
    if case.command == "remap" and case.format in ("torch-legacy", "sharded"):
        pytest.skip("remap has this format of its input, which would not hold it either")
    for more in (["--dry-run"], []):
        code, out, err = run(*case.args("nested.pth", case.out, *more))
        assert (code, err) == (0, "")
        assert bool(re.search("left out:? +epoch", out)) == (not holds)
    document = run(*case.args("nested.pth", case.out, "--force", "--json"))[1]
    assert bool(re.search(r'left out: epoch|"left_out": \[\s*"epoch"', document)) == (not holds)


def test_values_that_a_cast_makes_infinite_are_counted(case: Case, run: Run) -> None:
    if case.command == "remap":
        pytest.skip("remap casts nothing")
    torch.save({"t0": torch.tensor([1e10, -1e10, 1.0, torch.inf]), "t1": torch.ones(3)}, "hot.pth")
    torch.save({"t0": torch.zeros(4).half(), "t1": torch.zeros(3).half()}, "target.pth")
    cast = {"filter": ["--cast"], "convert": ["--dtype", "fp16"], "load-partial": []}[case.command]
    code, out, err = run(*case.args("hot.pth", case.out, *cast))
    assert (code, err) == (0, "")
    assert "overflow  2 values no longer finite, or out of an integer's range: t0" in out
    document = json.loads(run(*case.args("hot.pth", case.out, *cast, "--force", "--json"))[1])
    (result,) = document["result"] if case.command == "convert" else [document["result"]]
    assert result["overflowed"] == {"t0": 2}
    again = json.loads(run(*case.args("target.pth", "cool" + case.out, *cast, "--json"))[1])
    (result,) = again["result"] if case.command == "convert" else [again["result"]]
    assert not result.get("overflowed")
