"""Distributed checkpoints that we write, as torch.distributed.checkpoint reads them, and against what it writes."""

from __future__ import annotations

import json
import os
import pickle
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from everything import from_dcp, training
from oracles import Run, assert_identical, content, tree_equal
from safetensors.torch import save_file
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

import ckptool
from ckptool.core.checkpoint import Checkpoint
from ckptool.directories import place
from ckptool.errors import CollisionError, LossError, OutputError, UsageError
from ckptool.formats import read


def ours(tree: Any, **how: Any) -> Path:
    """The directory that a file of torch.save is converted into."""
    torch.save(tree, "in.pth")
    ckptool.convert("in.pth", "ours", to="dcp", fsync=False, **how)
    return Path("ours")


def theirs(tree: Any) -> Path:
    dcp.save(tree, storage_writer=dcp.FileSystemWriter("theirs"), no_dist=True)
    return Path("theirs")


VALUES = {
    "nested": {"a": {"b": {"c": torch.ones(2)}}, "d": 5},
    "list of tensors": [torch.ones(2), {"a": torch.zeros(1)}, 5, [torch.tensor(1)], [1, 2], "text"],
    "list of numbers": [1, [2, [3]], None],
    "list in which a dict lies deep": [[[1], [{"a": 2}]], 3],
    "tuple with a tensor": (1, torch.ones(2)),
    "0-dim": torch.tensor(5),
    "empty": torch.empty(0, 4),
    "transposed": torch.randn(3, 4).t(),
    "view with gaps": torch.randn(6, 4)[::2],
    "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "float8": torch.randn(3).to(torch.float8_e4m3fn),
    "bfloat16": torch.randn(300, 10, dtype=torch.bfloat16),
    "complex": torch.randn(3, dtype=torch.complex64),
    "conjugate": torch.randn(3, dtype=torch.complex64).conj(),
    "bool": torch.tensor([True, False]),
    "uint16": torch.tensor([1, 2], dtype=torch.uint16),
    "parameter": torch.nn.Parameter(torch.ones(2)),
    "array": np.arange(3),
    "set": {7, 8},
    "bytes": b"bytes",
    "none": None,
    "dtype": torch.float16,
    "ordered": OrderedDict(x=torch.ones(1), y="text"),
    "numbers as keys": {6: torch.ones(1), 2.5: "x", None: 1, True: 2},
    "dots in keys": {"a.b": {"c": torch.ones(1)}, "a": {"d": torch.zeros(1)}},
}


@pytest.mark.parametrize("name", VALUES)
def test_torch_and_ckptool_read_what_they_read_of_torchs_own(name: str) -> None:
    tree = {"x": VALUES[name], "y": 1, "w": torch.ones(1)}
    wrote, wanted = ours(tree), theirs(tree)
    assert_identical(from_dcp(wrote), from_dcp(wanted))
    tree_equal(read(str(wrote)).tree, ckptool.open(wanted).to_torch())


@pytest.mark.parametrize("name", VALUES)
def test_the_metadata_say_what_torchs_own_say(name: str) -> None:
    tree = {"x": VALUES[name], "y": 1, "w": torch.ones(1)}
    one, other = (pickle.loads((made / ".metadata").read_bytes()) for made in (ours(tree), theirs(tree)))
    assert one.planner_data == other.planner_data
    assert list(one.planner_data) == list(other.planner_data)
    for entry in other.state_dict_metadata.values():
        if hasattr(entry, "properties"):
            entry.properties.requires_grad = False
    assert one.state_dict_metadata == other.state_dict_metadata
    assert one.storage_data.keys() == other.storage_data.keys()
    assert {index.index for index in one.storage_data} == {index.index for index in other.storage_data}


def test_a_training_state_loads_into_empty_tensors_and_into_an_optimizer() -> None:
    tree = training()
    wrote = ours(tree, max_shard_size=50)
    empty = {key: torch.zeros_like(value) for key, value in tree["model"].items()}
    state: dict[str, Any] = {"model": empty, "epoch": 0}
    dcp.load(state, checkpoint_id=wrote, no_dist=True)
    tree_equal(read(str(wrote)).tree["model"], state["model"])
    assert (state["epoch"], torch.equal(state["model"]["0.weight"], tree["model"]["0.weight"])) == (3, True)
    made = ckptool.open(wrote).to_torch()
    named = (tree["model"][key] for key in ("0.weight", "0.bias", "1.weight", "1.bias"))
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros_like(value)) for value in named])
    optimizer.load_state_dict(made["optim"])
    assert len(optimizer.state) == 4
    tree_equal(read(str(wrote)).tree, {**tree, "model": dict(tree["model"])})


@pytest.fixture
def alone() -> Iterator[Any]:
    """A group of this process alone, and its mesh."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_it_loads_into_sharded_tensors(alone: Any) -> None:
    tree = training()
    wrote = ours(tree)
    empty = {
        key: distribute_tensor(torch.zeros_like(value), alone, [Shard(0)]) if value.dim() else value
        for key, value in tree["model"].items()
    }
    dcp.load({"model": empty}, checkpoint_id=wrote)
    for key, value in tree["model"].items():
        found = empty[key]
        assert torch.equal(found.full_tensor() if hasattr(found, "full_tensor") else found, value), key


@pytest.mark.parametrize(
    "value",
    [
        torch.eye(3).to_sparse(),
        torch.quantize_per_tensor(torch.ones(3), 0.5, 1, torch.qint8),
        torch.ones(2, device="meta"),
    ],
    ids=["sparse", "quantised", "meta"],
)
def test_a_tensor_that_has_no_box_is_an_item_that_torch_loads(value: torch.Tensor) -> None:
    wrote = ours({"w": torch.ones(2), "odd": value})
    made = from_dcp(wrote)["odd"]
    assert (made.layout, made.dtype, made.device, made.shape) == (value.layout, value.dtype, value.device, value.shape)
    assert ckptool.open(wrote).state_dict()["odd"].kind == ckptool.open("in.pth").state_dict()["odd"].kind


def test_tied_names_are_stored_twice_and_said() -> None:
    shared = torch.ones(100)
    torch.save({"a": shared, "b": shared, "c": torch.zeros(1)}, "in.pth")
    report = ckptool.convert("in.pth", "ours", to="dcp")
    assert report.left_out == ["untied: b = a"]
    assert ckptool.convert("in.pth", "other", to="dcp", dry_run=True).left_out == ["untied: b = a"]
    assert ckptool.open("ours").shared() == []
    tree_equal(read("ours").tree, from_dcp(Path("ours")))


def test_what_has_no_place_is_left_out_by_name() -> None:
    tree: dict[str, Any] = {"w": torch.ones(1), "none": {}, "in": [torch.ones(1), {}], 6: 7, "optim": {"state": {}}}
    tree["p"] = torch.nn.Parameter(torch.ones(1))
    tree["p"].note = "mine"
    torch.save(tree, "in.pth")
    for dry_run in (True, False):
        report = ckptool.convert("in.pth", "ours", to="dcp", dry_run=dry_run)
        assert report.left_out == [
            "none (an empty dict)", "in/1 (an empty dict)", "optim/state (an empty dict)", "the attributes of p"
        ]  # fmt: skip
        assert "keys that are no text are text in it: 6" in report.notes
    assert ckptool.open("ours").tree["6"] == 7


def test_two_values_of_one_name_are_refused_with_both_paths() -> None:
    torch.save({"a.b": torch.ones(1), "a": {"b": torch.zeros(1)}}, "in.pth")
    with pytest.raises(CollisionError, match=r"'a\.b' in it, those at \('a\.b',\) and \('a', 'b'\)"):
        ckptool.convert("in.pth", "ours", to="dcp")
    torch.save({"x": {6: 1, "6": 2}, "w": torch.ones(1)}, "in.pth")
    with pytest.raises(CollisionError, match=r"\('x', 6\) and \('x', '6'\)"):
        ckptool.save("in.pth", "ours", to="dcp")
    assert not os.path.exists("ours")


def test_a_container_inside_itself_is_refused() -> None:
    inner: dict[str, Any] = {"w": torch.ones(1)}
    inner["again"] = inner
    with pytest.raises(LossError, match="x/again"):
        ours({"x": inner})
    several: list[Any] = [torch.ones(1)]
    several.append([several])
    with pytest.raises(LossError, match="x/1/0"):
        ours({"x": several})


def test_a_tree_that_is_no_dict_is_written_as_its_weights() -> None:
    ckptool.save(Checkpoint([*read_list()]), "ours", to="dcp")
    assert list(from_dcp(Path("ours"))) == ["0", "1"]


def read_list() -> list[Any]:
    torch.save([torch.ones(1), torch.zeros(2)], "in.pth")
    made: list[Any] = ckptool.open("in.pth").tree
    return made


def test_files_are_split_by_size_and_a_large_tensor_stands_alone() -> None:
    tensors = {f"t{number}": torch.full((10,), float(number)) for number in range(5)}
    wrote = ours({**tensors, "big": torch.ones(100), "epoch": 3}, max_shard_size=80)
    assert sorted(os.listdir(wrote)) == [".metadata", *(f"__0_{number}.distcp" for number in range(5))]
    tree_equal(read(str(wrote)).tree, from_dcp(wrote))
    with pytest.raises(UsageError, match="shard-name"):
        ckptool.save("in.pth", "other", to="dcp", shard_name="model")


def test_the_device_of_a_tensor_stays_and_is_mapped() -> None:
    torch.save({"w": torch.ones(2), "pair": (torch.ones(1),)}, "in.pth")
    ckptool.save(ckptool.open("in.pth"), "gpu.pth", map_location="cuda:1")
    ckptool.save(ckptool.open("gpu.pth"), "gpu", to="dcp")
    state = {"w": torch.zeros(2)}
    dcp.load(state, checkpoint_id="gpu", no_dist=True)
    assert state["w"].tolist() == [1.0, 1.0]
    ckptool.save(ckptool.open("gpu.pth"), "cpu", to="dcp", map_location="cpu")
    assert from_dcp(Path("cpu"))["pair"] == (torch.ones(1),)


@pytest.mark.parametrize("command", ["filter", "remap", "load-partial"])
def test_every_command_writes_one(command: str, run: Run) -> None:
    torch.save({"model": {"a.w": torch.ones(2), "b.w": torch.zeros(2)}, "epoch": 3}, "in.pth")
    own = {"filter": ["--exclude", "b.*"], "remap": ["--rename", "a=x"], "load-partial": ["--into", "in.pth"]}[command]
    assert run(command, "in.pth", *own, "-o", "out", "--to", "dcp")[0] == 0
    made = from_dcp(Path("out"))
    keys = {"filter": ["a.w"], "remap": ["x.w", "b.w"], "load-partial": ["a.w", "b.w"]}[command]
    assert (list(made["model"]), made["epoch"]) == (keys, 3)


def test_a_remap_keeps_the_format_unless_the_name_says_another(run: Run) -> None:
    ours({"a": torch.ones(1)})
    assert run("remap", "ours", "--rename", "a=b", "-o", "same")[0] == 0
    assert run("remap", "ours", "--rename", "a=b", "-o", "whole.pth")[0] == 0
    assert run("remap", "ours", "--rename", "a=b", "-o", "shards/")[0] == 0
    assert [ckptool.open(name).format for name in ("same", "whole.pth", "shards")] == [
        "dcp",
        "torch-zip",
        "safetensors",
    ]


IN_PLACE = {
    "remap": ["--rename", "a=b"],
    "filter": ["--include", "a*"],
    "load-partial": ["--into", "ours"],
    "convert": [],
}


@pytest.mark.parametrize("output", ["ours", "ours/"])
@pytest.mark.parametrize("command", IN_PLACE)
def test_in_place_it_keeps_its_format_and_all_beside_the_weights(command: str, output: str, run: Run) -> None:
    ours({"model": {"a.w": torch.ones(2), "c.w": torch.zeros(3)}, "epoch": 3})
    code, out, _ = run(command, "ours", *IN_PLACE[command], "-o", output, "--in-place")
    assert (code, sorted(os.listdir("ours"))) == (0, [".metadata", "__0_0.distcp"]), out
    made = from_dcp(Path("ours"))
    keys = {"remap": ["b.w", "c.w"], "filter": ["a.w"]}.get(command, ["a.w", "c.w"])
    assert (list(made["model"]), made["epoch"]) == (keys, 3)


def test_a_directory_with_one_gets_another_one_with_force_and_an_empty_one_shards(run: Run) -> None:
    ours({"a": torch.ones(1)})
    torch.save({"b": torch.zeros(2)}, "other.pth")
    assert run("convert", "other.pth", "-o", "ours")[0] == 2
    assert run("convert", "other.pth", "-o", "ours", "--force")[0] == 0
    assert list(from_dcp(Path("ours"))) == ["b"]
    os.mkdir("empty")
    assert run("convert", "ours", "-o", "empty")[0] == 0
    assert os.listdir("empty") == ["model.safetensors"]


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "model.pth"])
def test_a_file_that_takes_its_place_in_the_directory_is_said(name: str, run: Run) -> None:
    ours({"a": torch.ones(1)})
    code, out, _ = run("remap", "ours", "--rename", "a=b", "-o", f"ours/{name}")
    taken = ckptool.open("ours").format != "dcp"
    said = f"beside a distributed checkpoint: of the directory, {name} is read; name .metadata for that"
    assert (code, said in " ".join(out.split()), taken) == (0, name != "model.pth", name != "model.pth")
    assert list(ckptool.open("ours/.metadata").state_dict()) == ["a"]


# --- where another checkpoint lies -----------------------------------------------------------------------------------


def sets_in(directory: str) -> set[str]:
    return {Path(name).suffix or name for name in os.listdir(directory)}


@pytest.mark.parametrize("to", ["sharded", "sharded-bin"])
def test_converted_in_place_one_checkpoint_is_left(to: str, run: Run) -> None:
    wrote = ours({f"t{number}": torch.ones(10) for number in range(4)}, max_shard_size=50)
    (wrote / "config.json").write_text("{}")
    (wrote / "notes.txt").write_text("mine")
    before = content()
    assert run("convert", "ours", "-o", "ours", "--to", to)[0] == 2
    assert "--in-place" in run("convert", "ours", "-o", "ours", "--to", to, "--force")[2]
    assert content() == before
    code, out, _ = run("convert", "ours", "-o", "ours", "--to", to, "--in-place", "--max-shard-size", "90")
    assert (code, "removed: .metadata, __0_0.distcp" in " ".join(out.split())) == (0, True)
    assert sets_in("ours") == {".json", ".txt", ".safetensors" if to == "sharded" else ".bin"}
    assert ckptool.diff("ours", "in.pth", values=True).same
    assert run("convert", "ours", "-o", "ours", "--to", "dcp", "--in-place")[0] == 0
    assert sorted(os.listdir("ours")) == [".metadata", "__0_0.distcp", "config.json", "notes.txt"]
    assert ckptool.diff("ours", "in.pth", values=True).same


def test_beside_another_checkpoint_it_is_refused_even_with_force(run: Run) -> None:
    ours({"a": torch.ones(1)})
    ckptool.save("in.pth", "shards", to="sharded")
    torch.save({"a": torch.zeros(1)}, "other.pth")
    before = content()
    for args in (["ours", "sharded"], ["ours", "sharded-bin"], ["shards", "dcp"]):
        code, _, err = run("convert", "other.pth", "-o", args[0], "--to", args[1], "--force")
        assert (code, "loaders would read only one" in err) == (2, True)
    assert content() == before


def test_one_in_hugging_faces_files_is_replaced_in_place_too(run: Run) -> None:
    os.mkdir("d")
    said = json.dumps({"a": {"saved_offsets": [0]}})
    name = "d/shard-00001-model-00001-of-00001.safetensors"
    save_file({"a": torch.ones(4)}, name, {"DCP_SHARDING_INFO": said, "DCP_VERSION": "1.0", "format": "pt"})
    torch.save({"a": torch.ones(4)}, "in.pth")
    for to in ("dcp", "sharded"):
        code, _, err = run("convert", "in.pth", "-o", "d", "--to", to, "--force")
        assert (code, "loaders would read only one" in err) == (2, True)
    assert run("convert", "d", "-o", "d", "--to", "dcp", "--in-place")[0] == 0
    assert sorted(os.listdir("d")) == [".metadata", "__0_0.distcp"]
    assert ckptool.diff("d", "in.pth", values=True).same


def test_fewer_files_than_before_leave_none_of_the_old(run: Run) -> None:
    ours({f"t{number}": torch.ones(10) for number in range(4)}, max_shard_size=50)
    Path("ours/__0.metadata").write_bytes(b"")
    assert run("convert", "in.pth", "-o", "ours", "--to", "dcp", "--force")[0] == 0
    assert sorted(os.listdir("ours")) == [".metadata", "__0_0.distcp"]


def test_a_failure_while_names_are_given_leaves_the_old_one(monkeypatch: pytest.MonkeyPatch) -> None:
    ours({f"t{number}": torch.ones(10) for number in range(4)}, max_shard_size=50)
    torch.save({"t0": torch.zeros(1)}, "other.pth")
    before = content()

    def fails(*_: object) -> None:
        raise OutputError("no")

    monkeypatch.setattr(place, "commit_set", fails)
    with pytest.raises(OutputError):
        ckptool.save("other.pth", "ours", to="dcp", force=True)
    assert content() == before


def test_one_whose_replacement_was_killed_is_incomplete_and_comes_back(run: Run) -> None:
    ours({"a": torch.ones(1)})
    os.rename("ours/.metadata", "ours/..metadata.0123abcd.ckptool-old")
    Path("ours/..metadata.0123abcd.ckptool-partial").write_bytes(b"")
    code, _, err = run("inspect", "ours")
    assert (code, "killed" in err) == (2, True)
    code, _, err = run("convert", "in.pth", "--to", "dcp", "-o", "ours")
    assert (code, "exists already" in err) == (2, True)  # but put right
    assert ckptool.diff("ours", "in.pth", values=True).same
