from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import FIXTURES, assert_identical, assert_same_tensors
from safetensors.torch import load_file, save_file

from ckptool.api import open as open_checkpoint
from ckptool.api import save
from ckptool.errors import CkptoolError, FormatError, IncompleteError, UnreadableError, UnsupportedError
from ckptool.formats import read

INDEX = "model.safetensors.index.json"


@pytest.fixture
def made(tmp_path: Path) -> Callable[..., Path]:
    """A sharded directory of what each shard holds, and any index."""

    def make(
        shards: dict[str, dict[str, torch.Tensor]], weight_map: Any = None, metadata: Any = None, name: str = INDEX
    ) -> Path:
        directory = tmp_path / "made"
        directory.mkdir(exist_ok=True)
        for shard, tensors in shards.items():
            save_file(tensors, directory / shard)
        if weight_map is None:
            weight_map = {key: shard for shard, tensors in shards.items() for key in tensors}
        index = {"weight_map": weight_map} if metadata is None else {"metadata": metadata, "weight_map": weight_map}
        (directory / name).write_text(json.dumps(index))
        return directory

    return make


Made = Callable[..., Path]


def test_the_directory_and_its_index_are_one_checkpoint() -> None:
    one, other = read(str(FIXTURES / "sharded")), read(str(FIXTURES / "sharded" / INDEX))
    assert list(one.tree) == list(other.tree)
    assert one.problems == other.problems == ()


def test_all_shards_are_there_with_the_tie_that_only_the_index_knows() -> None:
    expected: dict[str, torch.Tensor] = {}
    for shard in sorted((FIXTURES / "sharded").glob("*.safetensors")):
        expected |= load_file(shard)
    expected["lm_head.weight"] = expected["model.embed.weight"]
    opened = open_checkpoint(FIXTURES / "sharded")
    assert sorted(opened.state_dict()) == sorted(expected)
    assert_same_tensors(opened, {key: expected[key] for key in opened.state_dict()})
    assert opened.shared() == [["model.embed.weight", "lm_head.weight"]]


def test_bin_shards_are_read_and_ties_inside_one_stay() -> None:
    opened = open_checkpoint(FIXTURES / "sharded_bin")
    assert opened.shared() == [["lm_head.weight", "model.embed.weight"]]
    assert opened.problems == ()
    assert ("collections", "OrderedDict") in opened.names


def test_the_size_of_all_files_is_counted() -> None:
    total = sum(path.stat().st_size for path in (FIXTURES / "sharded").iterdir() if path.name != "config.json")
    assert open_checkpoint(FIXTURES / "sharded").nbytes == total


def test_shards_follow_one_another_by_number(made: Made) -> None:
    shards = {f"model-{number}-of-12.safetensors": {f"t{number}": torch.ones(1)} for number in range(1, 13)}
    assert list(open_checkpoint(made(shards)).state_dict()) == [f"t{number}" for number in range(1, 13)]


def test_names_of_shards_need_not_have_numbers_alike(made: Made) -> None:
    shards = {
        name: {name: torch.ones(1)} for name in ("a1.safetensors", "1a.safetensors", "b.safetensors", "a.safetensors")
    }
    assert sorted(open_checkpoint(made(shards)).state_dict()) == sorted(shards)


def test_merged_into_one_file_it_is_the_same(tmp_path: Path) -> None:
    for name in ("out.pth", "out.safetensors"):
        save(open_checkpoint(FIXTURES / "sharded_bin"), tmp_path / name)
    expected: dict[str, torch.Tensor] = {}
    for shard in sorted((FIXTURES / "sharded_bin").glob("*.bin")):
        expected |= torch.load(shard)
    assert_identical(torch.load(tmp_path / "out.pth"), expected)


def test_every_contradiction_is_said_and_only_looking_is_possible(tmp_path: Path) -> None:
    opened = open_checkpoint(FIXTURES / "sharded_broken")
    said = "\n".join(opened.problems)
    assert opened.broken
    for words in (
        "missing shards: model-00003-of-00003.safetensors", "model.norm.weight", "no shard: absent.weight",
        "in two shards: model.layers.0.k.weight", "not in the index: not.in.index", "total_size says 12345",
    ):  # fmt: skip
        assert words in said
    assert set(opened.state_dict()) == set(
        load_file(FIXTURES / "sharded_broken/model-00001-of-00003.safetensors")
    ) | set(load_file(FIXTURES / "sharded_broken/model-00002-of-00003.safetensors"))
    with pytest.raises(IncompleteError, match=r"absent\.weight"):
        save(opened, tmp_path / "out.pth")
    with pytest.raises(IncompleteError):
        opened.to_torch()
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_size_or_an_extra_tensor_alone_is_said_and_harmless(made: Made, tmp_path: Path) -> None:
    tensors = {"a": torch.ones(2), "extra": torch.ones(1)}
    opened = open_checkpoint(made({"model-1.safetensors": tensors}, {"a": "model-1.safetensors"}, {"total_size": 1}))
    assert len(opened.problems) == 2
    assert not opened.broken
    save(opened, tmp_path / "out.pth")
    assert_identical(torch.load(tmp_path / "out.pth"), tensors)


@pytest.mark.parametrize("metadata", [None, {}, {"total_size": 12}, {"total_size": 12, "total_parameters": 3}])
def test_metadata_may_be_there_or_not(metadata: Any, made: Made) -> None:
    opened = open_checkpoint(made({"model-1.safetensors": {"a": torch.ones(3)}}, None, metadata))
    assert opened.problems == ()


def test_a_flat_index_is_understood(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "model-1.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"a": "model-1.safetensors"}))  # accelerate takes it too
    assert list(open_checkpoint(tmp_path).state_dict()) == ["a"]


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/etc/passwd", "sub/x.safetensors", "", "..", ".", "a\\..\\b/c", "x\0y"]
)
def test_an_index_cannot_name_files_elsewhere(name: str, made: Made) -> None:
    directory = made({}, {"a": name})
    save_file({"a": torch.ones(1)}, directory.parent / "outside.safetensors")
    with pytest.raises(CkptoolError):
        save(open_checkpoint(directory), directory.parent / "out.pth")  # a name no file can have is a missing shard


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", "null", '{"weight_map": []}', '{"weight_map": {"a": 1}}', '{"weight_map": {"a": null}}',
     '{"metadata": [1], "weight_map": {"a": "x"}}', '{"metadata": {"total_size": []}, "weight_map": {}}',
     "{" * 100_000],
)  # fmt: skip
def test_an_index_that_is_none_is_an_error_of_ours(text: str, tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(text)
    try:
        read(str(tmp_path / INDEX))
    except CkptoolError:
        return
    assert "total_size" in text  # only that one is an index with a problem


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / "sharded", tmp_path / "copy")
    shard = tmp_path / "copy" / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-3])
    with pytest.raises(FormatError, match="model-00002-of-00003"):
        read(str(tmp_path / "copy"))


@pytest.mark.parametrize("name", [INDEX, ".", "sub"])
def test_an_index_cannot_name_itself_or_a_directory(name: str, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    save_file({"a": torch.ones(1)}, tmp_path / "sub" / "model.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CkptoolError) as caught:
        save(open_checkpoint(tmp_path), tmp_path / "out.pth")
    assert "recursion" not in str(caught.value)


# --- which file of a directory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["model.safetensors", "pytorch_model.bin"], "model.safetensors"),
        (["pytorch_model.bin", "config.json"], "pytorch_model.bin"),
        (["only.pth", "readme.txt"], "only.pth"),
        (["adapter_model.safetensors", "adapter_config.json"], "adapter_model.safetensors"),
        (["diffusion_pytorch_model.safetensors"], "diffusion_pytorch_model.safetensors"),
    ],
)
def test_a_directory_is_read_by_the_file_that_hugging_face_would_take(
    names: list[str], found: str, tmp_path: Path
) -> None:
    for name in names:
        if name.endswith(".safetensors"):
            save_file({name: torch.ones(1)}, tmp_path / name)
        elif name.endswith((".bin", ".pth")):
            torch.save({name: torch.ones(1)}, tmp_path / name)
        else:
            (tmp_path / name).write_text("{}")
    assert list(open_checkpoint(tmp_path).state_dict()) == [found]


def test_safetensors_shards_come_before_bin_shards(tmp_path: Path) -> None:
    save_file({"st": torch.ones(1)}, tmp_path / "model-1.safetensors")
    torch.save({"bin": torch.ones(1)}, tmp_path / "pytorch_model-1.bin")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"st": "model-1.safetensors"}}))
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"bin": "pytorch_model-1.bin"}}))
    assert list(open_checkpoint(tmp_path).state_dict()) == ["st"]


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ([".metadata", "__0_0.distcp"], "DCP"),
        (["latest", "global_step5"], "DeepSpeed"),
        (["latest_checkpointed_iteration.txt"], "Megatron"),
        (["shard-00001-model-00001-of-00001.safetensors"], "distributed"),
        (["a.pth", "b.pth"], "no index"),
    ],
)
def test_other_layouts_are_called_by_their_names(names: list[str], said: str, tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(UnsupportedError, match=said):
        read(str(tmp_path))


def test_an_empty_directory_and_an_absent_one_say_so(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="directory"):
        read(str(tmp_path))
    with pytest.raises(UnreadableError, match="no such file"):
        read(str(tmp_path / "absent"))


def test_a_variant_of_diffusers_is_found_inside_its_pipeline(tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    (tmp_path / "model_index.json").write_text('{"_class_name": "Pipeline", "unet": ["diffusers", "UNet"]}')
    save_file({"w": torch.ones(2)}, tmp_path / "unet" / "diffusion_pytorch_model.fp16-00001-of-00001.safetensors")
    weight_map = {"w": "diffusion_pytorch_model.fp16-00001-of-00001.safetensors"}
    name = "diffusion_pytorch_model.safetensors.index.fp16.json"
    (tmp_path / "unet" / name).write_text(json.dumps({"metadata": {"total_size": 8}, "weight_map": weight_map}))
    opened = open_checkpoint(tmp_path)
    assert (list(opened.state_dict()), opened.problems) == (["w"], ())
