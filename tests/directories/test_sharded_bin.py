"""Shards of torch's files (``pytorch_model-00001-of-00002.bin``), against what Hugging Face's library writes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import Run, assert_identical
from safetensors.torch import save_file

import ckptool
from ckptool.core import aliases

INDEX = "pytorch_model.bin.index.json"


def model() -> dict[str, torch.Tensor]:
    """Tensors of 40, 400 and 8 bytes; one in the middle is tied to the first, two are views of one storage."""
    first, base = torch.arange(10.0), torch.arange(6.0)
    return {
        "embed.weight": first, "a.weight": torch.ones(100), "a.half": base[:3], "head.weight": first,
        "b.weight": torch.zeros(100), "b.half": base[3:], "c.bias": torch.ones(2, dtype=torch.bfloat16),
    }  # fmt: skip


def written(tree: Any, *args: Any, **how: Any) -> Any:
    torch.save(tree, "in.pth")
    return ckptool.convert("in.pth", "out", to="sharded-bin", fsync=False, **how)


def loaded(directory: str = "out") -> dict[str, torch.Tensor]:
    """What torch.load gives of all shards."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(Path(directory).glob("*.bin")):
        found |= torch.load(path, weights_only=True)
    return found


@pytest.mark.parametrize("limit", [404, 450, 850, 10_000])
def test_the_layout_is_the_one_hugging_face_writes(limit: int) -> None:
    hub = pytest.importorskip("huggingface_hub")
    os.mkdir("theirs")
    hub.save_torch_state_dict(model(), "theirs", max_shard_size=limit, safe_serialization=False)
    written(model(), max_shard_size=limit)
    assert sorted(os.listdir("out")) == sorted(os.listdir("theirs"))
    for name in os.listdir("out"):
        if name.endswith(".bin"):
            one, other = torch.load(f"out/{name}"), torch.load(f"theirs/{name}")
            assert_identical(one, {key: other[key] for key in one if key in other})
            assert one.keys() == other.keys()
    if limit < 10_000:
        ours, theirs = (json.loads(Path(place, INDEX).read_text()) for place in ("out", "theirs"))
        assert ours["weight_map"] == theirs["weight_map"]


def test_names_that_share_memory_lie_in_one_shard_and_come_back_in_their_order() -> None:
    written(model(), max_shard_size=300)
    files = json.loads(Path("out", INDEX).read_text())["weight_map"]
    assert files["head.weight"] == files["embed.weight"]
    assert files["a.half"] == files["b.half"]
    shard = torch.load(f"out/{files['embed.weight']}", weights_only=True)
    assert shard["embed.weight"].data_ptr() == shard["head.weight"].data_ptr()
    found = ckptool.open("out")
    assert list(found.state_dict()) == list(model())
    assert found.shared() == [["embed.weight", "head.weight"]]
    assert found.problems == ()
    assert_identical(found.to_torch(), model())


def test_the_index_says_the_bytes_of_all_tensors_tied_ones_once() -> None:
    written(model(), max_shard_size=300)
    said = json.loads(Path("out", INDEX).read_text())["metadata"]
    assert said["total_size"] == 40 + 400 + 24 + 400 + 4
    assert set(said) == {"total_size", aliases.ORDER}


def test_the_order_is_not_written_where_the_shards_have_it() -> None:
    written({f"t{number}": torch.ones(10) for number in range(4)}, max_shard_size=50)
    assert json.loads(Path("out", INDEX).read_text())["metadata"] == {"total_size": 160}


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("model.safetensors", "pytorch_model"),
        ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model"),
        ("adapter_model.safetensors", "adapter_model"),
        ("diffusion_pytorch_model.non_ema.safetensors", "diffusion_pytorch_model.non_ema"),
        ("anything.safetensors", "pytorch_model"),
    ],
)
def test_names_are_those_of_the_inputs_family(source: str, names: str) -> None:
    save_file({"a": torch.ones(10), "b": torch.ones(10)}, source)
    ckptool.convert(source, "whole", to="sharded-bin")
    assert os.listdir("whole") == [f"{names}.bin"]
    ckptool.convert(source, "out", to="sharded-bin", max_shard_size=40)
    stem, _, variant = names.partition(".")
    index = f"{stem}.bin.index.{variant}.json" if variant else f"{stem}.bin.index.json"
    assert sorted(os.listdir("out")) == sorted([index, f"{names}-00001-of-00002.bin", f"{names}-00002-of-00002.bin"])
    assert_identical(ckptool.open("out").to_torch(), {"a": torch.ones(10), "b": torch.ones(10)})
    ckptool.convert(source, "named", to="sharded-bin", shard_name="mine")
    assert os.listdir("named") == ["mine.bin"]


def test_weights_alone_are_written_as_plain_tensors_and_the_rest_is_named() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    weight.note = "mine"
    weight_of = {"w": weight, "sparse": torch.eye(2).to_sparse(), "c": torch.ones(2, dtype=torch.complex64).conj()}
    report = written({"state_dict": weight_of, "epoch": 3})
    assert report.left_out == ["epoch", "the attributes of w"]
    made = loaded()
    assert type(made["w"]) is torch.Tensor
    assert made["sparse"].layout == torch.sparse_coo
    assert torch.equal(made["c"], weight_of["c"])
    save_file({"w": torch.ones(1)}, "said.safetensors", {"title": "x", "format": "pt"})
    assert ckptool.convert("said.safetensors", "said", to="sharded-bin").left_out == ["metadata title"]


def test_a_set_of_the_other_kind_is_refused_beside_it_and_replaced_in_place(run: Run) -> None:
    written(model(), max_shard_size=300)
    bins = set(os.listdir("out"))
    code, _, err = run("convert", "in.pth", "-o", "out", "--to", "sharded", "--force")
    assert (code, "loaders would read only one" in err) == (2, True)
    assert run("convert", "out", "-o", "out", "--to", "sharded", "--in-place")[0] == 0
    assert os.listdir("out") == ["model.safetensors"]
    code, _, err = run("convert", "in.pth", "-o", "out", "--to", "sharded-bin", "--force")
    assert (code, "loaders would read only one" in err) == (2, True)
    assert run("convert", "out", "-o", "out", "--to", "sharded-bin", "--in-place", "--max-shard-size", "300")[0] == 0
    assert set(os.listdir("out")) == bins
    assert ckptool.diff("out", "in.pth", values=True).same


def test_a_set_is_replaced_as_a_whole(run: Run) -> None:
    written(model(), max_shard_size=50)
    assert "exists already" in run("convert", "in.pth", "-o", "out", "--to", "sharded-bin")[2]
    assert run("convert", "in.pth", "-o", "out", "--to", "sharded-bin", "--force")[0] == 0
    assert os.listdir("out") == ["pytorch_model.bin"]


def test_device_tags_are_kept_and_mapped() -> None:
    torch.save({"a": torch.ones(1)}, "in.pth")
    ckptool.save(ckptool.open("in.pth"), "gpu", to="sharded-bin", map_location="cuda:1")
    assert ckptool.open("gpu").state_dict()["a"].location == "cuda:1"
    ckptool.save(ckptool.open("gpu"), "cpu", to="sharded-bin", map_location={"cuda:1": "cpu"})
    assert loaded("cpu")["a"].tolist() == [1.0]


def test_shards_of_bin_files_become_safetensors_unless_asked(run: Run) -> None:
    written(model(), max_shard_size=300)
    assert run("convert", "out", "-o", "st/")[0] == 0
    assert run("remap", "out", "--rename", "embed=e", "-o", "renamed")[0] == 0
    assert run("filter", "out", "--include", "a.*", "-o", "some", "--to", "sharded-bin")[0] == 0
    found = [os.listdir(name) for name in ("st", "renamed", "some")]
    assert found == [["model.safetensors"], ["model.safetensors"], ["pytorch_model.bin"]]
    assert list(loaded("some")) == ["a.weight", "a.half"]
