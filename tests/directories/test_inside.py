"""Directories whose weights are in a directory of theirs: accelerate's, transformers', Megatron-LM's, NeMo's."""

from __future__ import annotations

import json
import os
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

import ckptool
from ckptool.errors import FormatError, IncompleteError, UnreadableError, UnsupportedError


def distributed(directory: Path, tree: dict[str, Any]) -> Path:
    dcp.save(tree, storage_writer=dcp.FileSystemWriter(directory), no_dist=True)
    return directory


def accelerate_fsdp(directory: Path, models: int = 1) -> tuple[Path, torch.Tensor]:
    """What ``Accelerator.save_state`` writes of FSDP models with SHARDED_STATE_DICT."""
    weight = torch.randn(3, 4)
    for model in range(models):
        distributed(directory / f"pytorch_model_fsdp_{model}", {"model": {"a.weight": weight + model}})
        distributed(directory / f"optimizer_{model}", {"optimizer": {"state": {"a.weight": {"step": torch.ones(())}}}})
    for name in ("scheduler.bin", "sampler.bin", "dl_state_dict.bin", "scaler.pt"):
        torch.save({"last_epoch": 1}, directory / name)
    for name in ("random_states_0.pkl", "random_states_1.pkl", "custom_checkpoint_0.pkl"):
        (directory / name).write_bytes(pickle.dumps({"step": 1}))
    return directory, weight


def said(path: Path, *words: str) -> bool:
    notes = ckptool.open(path).notes
    return all(any(word in note for note in notes) for word in words)


def same(path: Path, expected: dict[str, torch.Tensor]) -> bool:
    found = ckptool.open(path)
    tensors = found.to_torch()
    for step in found.root:
        tensors = tensors[step]
    tensors = {key: value for key, value in tensors.items() if isinstance(value, torch.Tensor)}
    return tensors.keys() == expected.keys() and all(torch.equal(tensors[key], expected[key]) for key in expected)


def test_the_model_of_accelerate_with_fsdp_is_read_and_all_else_named(tmp_path: Path) -> None:
    directory, weight = accelerate_fsdp(tmp_path / "d")
    assert same(directory, {"a.weight": weight})
    assert said(directory, "pytorch_model_fsdp_0 was read, as accelerate does", "a trainer's state")
    left = [path.name for path in directory.iterdir() if path.name != "pytorch_model_fsdp_0"]
    assert said(directory, *left)
    assert list(ckptool.open(directory / "optimizer_0").tree) == ["optimizer"]


def test_several_models_of_accelerate_with_fsdp_are_refused_by_name(tmp_path: Path) -> None:
    directory, weight = accelerate_fsdp(tmp_path / "d", models=2)
    with pytest.raises(UnsupportedError, match="pytorch_model_fsdp_0, pytorch_model_fsdp_1"):
        ckptool.open(directory)
    assert same(directory / "pytorch_model_fsdp_1", {"a.weight": weight + 1})


def test_a_full_state_dict_of_fsdp_is_read(tmp_path: Path) -> None:
    torch.save({"a.weight": torch.ones(2)}, tmp_path / "pytorch_model_fsdp.bin")
    torch.save({"state": {}}, tmp_path / "optimizer.bin")
    assert same(tmp_path, {"a.weight": torch.ones(2)})
    assert said(tmp_path, "optimizer.bin")
    torch.save({"b.weight": torch.ones(2)}, tmp_path / "pytorch_model_fsdp_1.bin")
    with pytest.raises(UnsupportedError, match=r"pytorch_model_fsdp\.bin, pytorch_model_fsdp_1\.bin"):
        ckptool.open(tmp_path)


@pytest.mark.parametrize("names", [("_rank0", "_rank1"), ("_rank0",), ("_0_rank0", "_0_rank1")], ids=str)
def test_local_state_dicts_of_fsdp_are_refused_by_name(names: tuple[str, ...], tmp_path: Path) -> None:
    for name in names:
        torch.save({"_flat_param": torch.ones(2)}, tmp_path / f"pytorch_model_fsdp{name}.bin")
    with pytest.raises(UnsupportedError, match="LOCAL_STATE_DICT"):
        ckptool.open(tmp_path)


def test_of_several_whole_models_of_accelerate_the_first_is_read_and_the_others_named(tmp_path: Path) -> None:
    for number, name in enumerate(("model.safetensors", "model_1.safetensors")):
        save_file({"w": torch.full((2,), float(number))}, tmp_path / name)
    for name in ("optimizer.bin", "optimizer_1.bin", "scheduler.bin"):
        torch.save({}, tmp_path / name)
    assert same(tmp_path, {"w": torch.zeros(2)})
    assert said(tmp_path, "model_1.safetensors", "optimizer.bin, optimizer_1.bin, scheduler.bin")


def test_merged_weights_come_before_the_distributed_ones_beside_them(tmp_path: Path) -> None:
    directory, _ = accelerate_fsdp(tmp_path / "d")
    save_file({"w": torch.ones(2)}, directory / "model.safetensors")
    assert same(directory, {"w": torch.ones(2)})
    assert said(directory, "model.safetensors was read, as transformers does; also here, and not read: pytorch_model_f")


def test_the_last_checkpoint_of_a_trainer_is_read(tmp_path: Path) -> None:
    _, weight = accelerate_fsdp(tmp_path / "checkpoint-10")
    (tmp_path / "checkpoint-9").mkdir()
    save_file({"w": torch.ones(2)}, tmp_path / "checkpoint-9" / "model.safetensors")
    torch.save({}, tmp_path / "training_args.bin")
    assert same(tmp_path, {"a.weight": weight})
    assert said(
        tmp_path, "checkpoint-10 was read", "checkpoint-9", "pytorch_model_fsdp_0 was read", "training_args.bin"
    )
    save_file({"w": torch.zeros(2)}, tmp_path / "model.safetensors")
    assert same(tmp_path, {"w": torch.zeros(2)})


@pytest.mark.parametrize("names", [["checkpoint-1"] * 300, ["checkpoint-1", "iter_0000001"] * 150], ids=["one", "two"])
def test_directories_inside_each_other_a_hundred_times_end_in_a_line(names: list[str], tmp_path: Path) -> None:
    here = os.open(tmp_path, os.O_RDONLY)
    for name in names:
        os.mkdir(name, dir_fd=here)
        if name.startswith("iter"):
            with open(os.open("latest_checkpointed_iteration.txt", os.O_CREAT | os.O_WRONLY, dir_fd=here), "w") as file:
                file.write("1")
        here, above = os.open(name, os.O_RDONLY, dir_fd=here), here
        os.close(above)
    os.close(here)
    for directory in (tmp_path, tmp_path / names[0]):
        with pytest.raises(FormatError):
            ckptool.open(directory)


def test_a_file_of_weights_comes_before_directories_of_any_name(tmp_path: Path) -> None:
    distributed(tmp_path / "weights", {"w": torch.ones(1)})
    torch.save({"v": torch.ones(1)}, tmp_path / "mine.pt")
    assert same(tmp_path, {"v": torch.ones(1)})
    assert said(tmp_path, "not read: weights")


def test_weights_of_nemo_and_shards_without_consolidated_files_are_found(tmp_path: Path) -> None:
    distributed(tmp_path / "nemo" / "weights", {"module.w": torch.ones(1)})
    (tmp_path / "nemo" / "context").mkdir()
    assert same(tmp_path / "nemo", {"module.w": torch.ones(1)})
    writer = dcp.HuggingFaceStorageWriter(str(tmp_path / "hf" / "sharded"), save_distributed=True)
    dcp.save({"w": torch.ones(1)}, storage_writer=writer, no_dist=True)
    assert same(tmp_path / "hf", {"w": torch.ones(1)})
    assert said(tmp_path / "hf", "sharded was read")


def test_directories_in_it_that_hold_weights_are_named(tmp_path: Path) -> None:
    for name in ("step-1", "step-2"):
        distributed(tmp_path / name, {"w": torch.ones(1)})
    (tmp_path / "logs").mkdir()
    with pytest.raises(FormatError, match=r"name one of .*: step-1, step-2$"):
        ckptool.open(tmp_path)


# --- Megatron-core ----------------------------------------------------------------------------------------------------


def megatron(directory: Path, iteration: int, weight: torch.Tensor, **common: Any) -> Path:
    inner = distributed(directory / f"iter_{iteration:07}", {"decoder.w": weight, "w._extra_state/shard_0_1": [None]})
    torch.save({"iteration": iteration, "checkpoint_version": 3.0, **common}, inner / "common.pt")
    (inner / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
    (directory / "latest_checkpointed_iteration.txt").write_text(f"{iteration}\n")
    return inner


def test_the_iteration_that_megatron_would_load_is_read_with_its_common_values(tmp_path: Path) -> None:
    old, new = torch.randn(2, 3), torch.randn(2, 3)
    megatron(tmp_path, 5, old)
    inner = megatron(tmp_path, 10, new, args={"tp": 2})
    for path in (tmp_path, inner, inner / ".metadata"):
        assert same(path, {"decoder.w": new})
        assert (ckptool.open(path).tree["iteration"], ckptool.open(path).tree["args"]) == (10, {"tp": 2})
        assert said(path, "from common.pt: iteration, checkpoint_version, args")
    assert said(tmp_path, "iter_0000010 was read, as Megatron-LM does; also here, and not read: iter_0000005")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("5")
    assert same(tmp_path, {"decoder.w": old})
    (tmp_path / "iter_0000010").rename(tmp_path / "release")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("release")
    assert same(tmp_path, {"decoder.w": new})


@pytest.mark.parametrize("kind", ["directory", "pipe", "link"])
def test_a_tracker_that_is_no_file_is_refused_in_a_line(kind: str, tmp_path: Path) -> None:
    (tmp_path / "iter_0000001").mkdir()
    tracker = tmp_path / "latest_checkpointed_iteration.txt"
    {"directory": tracker.mkdir, "pipe": partial(os.mkfifo, tracker), "link": partial(tracker.symlink_to, "x")}[kind]()
    with pytest.raises(UnreadableError, match=r"latest_checkpointed_iteration\.txt"):
        ckptool.open(tmp_path)


def test_stacked_layers_are_unstacked_by_two_rules(tmp_path: Path) -> None:
    layers = torch.randn(3, 4, 5)
    megatron(tmp_path, 10, layers)
    rules = [
        {"reshape": "decoder.w", "shape": [12, 5]},
        {"split": "decoder.w", "into": [f"decoder.layers.{number}.w" for number in range(3)]},
    ]
    found, _ = ckptool.remap(tmp_path, rules)
    tensors = found.to_torch()
    for number in range(3):
        assert torch.equal(tensors[f"decoder.layers.{number}.w"], layers[number])


@pytest.mark.parametrize("text", ["7", "", "../x", "x" * 100, "-5", "٣", "metadata"])
def test_an_iteration_that_is_not_there_is_incomplete(text: str, tmp_path: Path) -> None:
    megatron(tmp_path, 10, torch.ones(1))
    (tmp_path / "latest_checkpointed_iteration.txt").write_text(text)
    with pytest.raises(IncompleteError, match=r"latest_checkpointed_iteration.*iter_0000010"):
        ckptool.open(tmp_path)


def test_what_is_in_two_files_is_taken_from_the_items(tmp_path: Path) -> None:
    inner = megatron(tmp_path, 1, torch.ones(1), **{"decoder.w": 5})
    assert same(inner, {"decoder.w": torch.ones(1)})
    assert said(inner, "not decoder.w, which the items have too")


def test_old_backends_of_megatron_are_refused_by_name(tmp_path: Path) -> None:
    inner = tmp_path / "iter_0000003"
    (inner / "decoder.w").mkdir(parents=True)
    (inner / "decoder.w" / ".zarray").write_text("{}")
    torch.save({"iteration": 3}, inner / "common.pt")
    (inner / "metadata.json").write_text(json.dumps({"sharded_backend": "zarr", "sharded_backend_version": 1}))
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("3")
    for path in (tmp_path, inner):
        with pytest.raises(UnsupportedError, match=r"'zarr'.*torch_dist"):
            ckptool.open(path)
    (inner / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist"}))
    with pytest.raises(IncompleteError, match=r"without \.metadata"):
        ckptool.open(inner)
    (inner / "metadata.json").unlink()  # written last
    with pytest.raises(IncompleteError, match=r"without \.metadata"):
        ckptool.open(inner)
    assert ckptool.open(inner / "common.pt").tree == {"iteration": 3}


def test_tensors_that_megatron_reshaped_are_named(tmp_path: Path) -> None:
    inner = megatron(tmp_path, 1, torch.ones(2, 12))
    metadata = pickle.loads((inner / ".metadata").read_bytes())
    metadata.mcore_data = {"decoder.w": {"nd_reformulated_orig_global_shape": (4, 6)}, "b": {}}
    (inner / ".metadata").write_bytes(pickle.dumps(metadata))
    assert said(inner, "not their own (mcore_data), and shown so: decoder.w")


class Canary:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("CKPTOOL_CANARY_EXECUTED",)


@pytest.mark.parametrize("name", ["common.pt", "meta.pt"])
def test_files_beside_the_items_run_nothing_and_are_named(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    directory = distributed(tmp_path / "d", {"w": torch.ones(1)})
    torch.save({"x": Canary(), "epoch": 3}, directory / name)
    found = ckptool.open(directory)
    assert found.tree["epoch"] == 3
    assert any(function == "mkdir" for _, function in found.names)
    assert not (tmp_path / "CKPTOOL_CANARY_EXECUTED").exists()
    (directory / name).write_bytes(b"PK\3\4 cut off")
    with pytest.raises(FormatError, match=name):
        ckptool.open(directory)


def test_a_lightning_directory_is_whole(tmp_path: Path) -> None:
    tree = {
        "state_dict": {"layer.weight": torch.randn(2, 2)},
        "optimizer_0": {"state": {"layer.weight": {"m": torch.ones(2)}}},
    }
    directory = distributed(tmp_path / "epoch=0-step=10.ckpt", tree)
    torch.save({"epoch": 0, "pytorch-lightning_version": "2.5", "hyper_parameters": {"lr": 0.1}}, directory / "meta.pt")
    assert same(directory, tree["state_dict"])
    found = ckptool.open(directory)
    assert found.root == ("state_dict",)
    assert found.tree["hyper_parameters"] == {"lr": 0.1}
    ckptool.save(found, tmp_path / "whole.ckpt", verify=True)
    assert torch.load(tmp_path / "whole.ckpt")["epoch"] == 0
