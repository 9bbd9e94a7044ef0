"""What several ranks write together is what one process writes, and about as much each."""

from __future__ import annotations

import json
import os
import pickle
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from everything import from_dcp
from oracles import Run
from safetensors.torch import load_file
from torchrun import Ended, ranks

import ckptool
from ckptool.io.output import LocalOutput, Part
from ckptool.ranks import world


def tree() -> dict[str, Any]:
    """Tensors of all kinds of memory, one of them larger than the share of any rank."""
    torch.manual_seed(3)
    weights = {f"layers.{number}.weight": torch.randn(40, 33) for number in range(12)}
    weights |= {"embed": torch.randn(900, 64), "turned": torch.randn(50, 70).t(), "half": torch.randn(999).half()}
    weights |= {
        "one": torch.tensor(3.0),
        "none": torch.empty(0, 4),
        "row": torch.randn(1, 3, 700),
        "ids": torch.arange(7),
    }
    weights["tied"] = weights["embed"]
    return {"model": weights, "epoch": 3, "optim": {"state": [{"exp_avg": torch.randn(40, 33)}], "lr": 0.1}}


@pytest.fixture
def source() -> dict[str, Any]:
    made = tree()
    torch.save(made, "in.pth")
    return made


def only_the_first_says(ended: list[Ended], code: int = 0) -> str:
    """Returns what rank 0 printed."""
    assert [(one.code, one.err) for one in ended] == [(code, "")] * len(ended)
    assert [one.out for one in ended[1:]] == [""] * (len(ended) - 1)
    return ended[0].out


def evenly(nbytes: list[int]) -> None:
    assert max(nbytes) < 1.1 * min(nbytes), nbytes


WORLDS = [2, pytest.param(4, marks=pytest.mark.slow), pytest.param(7, marks=pytest.mark.slow)]


@pytest.mark.parametrize("count", WORLDS)
def test_torch_loads_a_distributed_checkpoint_of_any_number_of_ranks(count: int, source: dict[str, Any]) -> None:
    said = only_the_first_says(ranks(count, "convert", "in.pth", "--to", "dcp", "-o", "out"))
    assert "verified" in said
    assert f"divided over {count} ranks" in said
    equal(read("out"), from_dcp(Path("out")))
    ckptool.convert("in.pth", "alone", to="dcp")
    assert json_of(from_dcp(Path("out"))) == json_of(from_dcp(Path("alone")))
    assert sorted(os.listdir("out")) == [".metadata", *(f"__{rank}_0.distcp" for rank in range(count))]
    evenly([os.path.getsize(f"out/__{rank}_0.distcp") for rank in range(count)])
    found = pickle.loads(Path("out/.metadata").read_bytes())
    assert len(found.state_dict_metadata["model.embed"].chunks) > 1
    assert list(found.planner_data) == list(pickle.loads(Path("alone/.metadata").read_bytes()).planner_data)
    state = {"model": {"embed": torch.zeros(900, 64), "turned": torch.zeros(70, 50)}}
    dcp.load(state, checkpoint_id="out", no_dist=True)
    equal(state["model"]["embed"], source["model"]["embed"])


def read(path: str) -> Any:
    return ckptool.open(path).to_torch()


def equal(found: Any, expected: Any) -> None:
    assert json_of(found) == json_of(expected)


def json_of(made: Any) -> str:
    """A tree as text, with every value of its tensors."""
    return json.dumps(made, default=lambda one: [str(one.dtype), one.tolist()], sort_keys=True)


@pytest.mark.parametrize("count", WORLDS)
@pytest.mark.parametrize("limit", ["1GB", "70kB"], ids=["one file", "shards"])
def test_shards_of_any_number_of_ranks_are_the_files_of_one(count: int, limit: str, source: dict[str, Any]) -> None:
    order = ["convert", "in.pth", "--to", "sharded", "--max-shard-size", limit]
    only_the_first_says(ranks(count, *order, "-o", "out"))
    ckptool.convert(
        "in.pth", "alone", to="sharded", max_shard_size=int(limit.replace("GB", "0" * 9).replace("kB", "000"))
    )
    assert same_files("alone", "out")
    found = {name: one for path in Path("out").glob("*.safetensors") for name, one in load_file(path).items()}
    equal(found, {name: one for name, one in source["model"].items() if name != "tied"})


def same_files(one: str, other: str) -> bool:
    names = sorted(os.listdir(one))
    return names == sorted(os.listdir(other)) and all(
        (Path(one) / name).read_bytes() == (Path(other) / name).read_bytes() for name in names
    )


def test_a_distributed_checkpoint_becomes_shards_of_another_number_of_ranks_and_dtype(source: dict[str, Any]) -> None:
    source["model"]["embed"][5, 5] = 1e30  # infinite as float16
    torch.save(source, "in.pth")
    only_the_first_says(ranks(3, "convert", "in.pth", "--to", "dcp", "-o", "three"))
    order = ["--to", "sharded", "--dtype", "float16", "--root", "model", "--json"]
    report = json.loads(only_the_first_says(ranks(2, "convert", "three", *order, "-o", "out")))["result"][0]
    alone = ckptool.convert("three", "alone", to="sharded", dtype="float16", root="model")
    assert same_files("alone", "out")
    assert report["overflowed"] == alone.overflowed == {"embed": 1, "tied": 1}
    assert report["underflowed"] == alone.underflowed
    equal(load_file("out/model.safetensors")["embed"], source["model"]["embed"].half())


@pytest.mark.parametrize("command", ["filter", "remap", "load-partial"])
def test_every_command_that_writes_is_divided(command: str, source: dict[str, Any]) -> None:
    own = {
        "filter": ["--match", "in.pth", "--exclude", "layers.1.*"],
        "remap": ["--rename", "layers=blocks", "--save-map", "map.json"],
        "load-partial": ["--into", "in.pth"],
    }[command]
    order = [command, "in.pth", *own, "--to", "dcp", "--verify", "--report"]
    only_the_first_says(ranks(2, *order, "report.json", "-o", "out"))
    assert json.loads(Path("report.json").read_text())["result"]["output"] == "out"
    if command == "remap":
        own = ["--rename", "layers=blocks"]
    assert ckptool.cli.main([command, "in.pth", *own, "--to", "dcp", "-o", "alone"]) == 0
    assert json_of(from_dcp(Path("out"))) == json_of(from_dcp(Path("alone")))


def test_one_file_is_written_by_rank_0_alone_as_are_other_commands(source: dict[str, Any]) -> None:
    assert only_the_first_says(ranks(2, "convert", "in.pth", "-o", "out.safetensors")).startswith("out.safetensors")
    assert load_file("out.safetensors").keys() == source["model"].keys() - {"tied"}
    first, second = ranks(2, "inspect", "in.pth", "--keys")
    assert (first.code, second) == (0, Ended(0, "", ""))
    assert "rank 0 does this alone" in first.err
    assert "layers.0.weight" in first.out


# --- errors and deaths -----------------------------------------------------------------------------------------------


def test_what_all_ranks_find_wrong_is_said_once_and_what_one_finds_with_its_number(source: dict[str, Any]) -> None:
    def away(rank: int) -> None:
        if rank == 1:
            os.chdir("elsewhere")

    os.mkdir("elsewhere")
    for order in (
        ["nowhere.pth", "--to", "dcp", "-o", "out"],
        ["in.pth", "--to", "dcp", "-o", "out", "--dtype", "odd"],
    ):
        first, second = ranks(2, "convert", *order)
        assert (first.code, second) == (2, Ended(2, "", ""))
        assert first.err.count("\n") == 1
        assert "rank" not in first.err
    first, second = ranks(2, "convert", "in.pth", "--to", "dcp", "-o", "out", patch=away)
    assert first == Ended(2, "", "ckptool: error: in.pth: rank 1: no such file or directory\n")
    assert second == Ended(2, "", "")
    torch.save({"other": torch.ones(3)}, "elsewhere/in.pth")
    first, _ = ranks(2, "convert", "in.pth", "--to", "dcp", "-o", "out", patch=away)
    assert "rank 1: would write other keys" in first.err
    assert not os.path.exists("out")


def test_a_full_disk_of_one_rank_is_said_with_its_number_and_nothing_is_left(source: dict[str, Any]) -> None:
    def full(rank: int) -> None:
        def write(self: Part, view: memoryview, at: int) -> None:
            raise self._failed(OSError(28, "No space left on device"))

        if rank == 1:
            Part._put = write  # type: ignore[method-assign]

    for kind in ("dcp", "sharded"):
        first, second = ranks(2, "convert", "in.pth", "--to", kind, "-o", "out", patch=full)
        assert (first.code, second) == (2, Ended(2, "", ""))
        assert first.err.startswith("ckptool: error: out/")
        assert "rank 1: writing at byte" in first.err
        assert first.err.count("\n") == 1
        assert not os.path.exists("out")


def killed_at(victim: int, owner: Any, name: str, call: int = 1) -> Callable[[int], None]:
    """A patch: one rank is killed when it calls a method the n-th time."""

    def patch(rank: int) -> None:
        calls = 0
        old = getattr(owner, name)

        def instead(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return old(*args, **kwargs)

        world.JOIN = 20
        if rank == victim:
            setattr(owner, name, instead)

    return patch


MOMENTS = {
    "before it meets the others": (1, world.World, "together", 1),
    "before it writes": (1, Part, "__init__", 1),
    "while it writes": (1, Part, "_flush", 1),
    "when it has written": (1, Part, "finished", 1),
    "when it verifies": (1, world.World, "together", 5),
    "as the first, before the others write": (0, LocalOutput, "leave", 1),
    "as the first, while it writes": (0, Part, "_flush", 1),
    "as the first, when it finishes files": (0, LocalOutput, "take", 1),
    "as the first, when it gives names": (0, LocalOutput, "_publish", 1),
    "as the first, before the index": (0, LocalOutput, "_publish", 3),
}
FAST = ("while it writes", "as the first, before the index")


@pytest.mark.parametrize("kind", ["dcp", "sharded"])
@pytest.mark.parametrize(
    "moment", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in MOMENTS]
)
def test_a_rank_that_is_killed_leaves_nothing_that_looks_finished(
    moment: str, kind: str, source: dict[str, Any], run: Run
) -> None:
    victim, owner, name, call = MOMENTS[moment]
    order = ["convert", "in.pth", "--to", kind, "--max-shard-size", "170kB", "-o", "out"]
    ended = ranks(3, *order, patch=killed_at(victim, owner, name, call), limit=60)
    assert ended.pop(victim).code == -signal.SIGKILL
    for one in ended:
        assert (one.code, one.out) == (2, "")
        assert re.fullmatch("ckptool: error: .*rank .*\n", one.err), one.err
    there = os.listdir("out") if os.path.exists("out") else []
    assert not any(name in (".metadata", "model.safetensors.index.json") for name in there)
    assert run(*order, "--force")[0] == 0  # also sweeps what was left
    assert not any(name.endswith(("partial", "old")) for name in os.listdir("out"))
    expected = {name: one for name, one in source["model"].items() if kind == "dcp" or name != "tied"}
    found = read("out")["model"] if kind == "dcp" else read("out")
    equal({name: found[name] for name in expected}, expected)
