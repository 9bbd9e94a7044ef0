"""Checkpoints of DeepSpeed of which a part is missing, or contradicts another."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from everything import zero_to_fp32
from oracles import assert_same_tensors
from partitioned import edit, optim, written

import ckptool
from ckptool.errors import CkptoolError, FormatError, IncompleteError, UnsupportedError


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_missing_part_is_named(rank: int, stage: int, tmp_path: Path) -> None:
    place = written(tmp_path / "d", stage, 3)
    gone = optim(place, rank)
    gone.unlink()
    with pytest.raises(IncompleteError, match=gone.name.replace(".", r"\.")) as caught:
        ckptool.open(tmp_path / "d")
    assert str(place) in str(caught.value)


@pytest.mark.parametrize(
    ("stage", "name"),
    [
        (1, "mp_rank_00_model_states.pt"),
        (2, "mp_rank_00_model_states.pt"),
        (3, "zero_pp_rank_0_mp_rank_00_model_states.pt"),
        (3, "zero_pp_rank_1_mp_rank_00_model_states.pt"),
    ],
)
def test_missing_model_states_are_named(stage: int, name: str, tmp_path: Path) -> None:
    place = written(tmp_path / "d", stage)
    (place / name).unlink()
    with pytest.raises(IncompleteError, match=name.replace(".", r"\.")):
        ckptool.open(place)


@pytest.mark.parametrize("stage", [2, 3])
def test_without_any_part_it_is_incomplete_and_says_what_is_left(stage: int, tmp_path: Path) -> None:
    place = written(tmp_path / "d", stage)
    for path in place.glob("*optim_states.pt"):
        path.unlink()
    with pytest.raises(IncompleteError, match=r"_optim_states\.pt") as caught:
        ckptool.open(place)
    assert ("mp_rank_00_model_states.pt alone" in str(caught.value)) == (stage == 2)


def test_parts_of_more_processes_are_refused(tmp_path: Path) -> None:
    place = written(tmp_path / "d")
    shutil.copy(optim(place, 1), place / "zero_pp_rank_2_mp_rank_00_optim_states.pt")
    with pytest.raises(FormatError, match="zero_pp_rank_2"):
        ckptool.open(place)
    os.rename(place / "zero_pp_rank_2_mp_rank_00_optim_states.pt", place / f"bf16_{optim(place, 1).name}")
    with pytest.raises(FormatError, match="of one process"):
        ckptool.open(place)


def shorter(states: Any) -> None:
    key = (
        "fp32_flat_groups"
        if "fp32_flat_groups" in states["optimizer_state_dict"]
        else "single_partition_of_fp32_groups"
    )
    parts = states["optimizer_state_dict"][key]
    parts[0] = parts[0][:-1].clone()


def fewer(states: Any) -> None:
    for key in ("fp32_flat_groups", "single_partition_of_fp32_groups"):
        states["optimizer_state_dict"].get(key, [0]).pop()


def no_tensor(states: Any) -> None:
    for key in ("fp32_flat_groups", "single_partition_of_fp32_groups"):
        states["optimizer_state_dict"].get(key, [0])[0] = "x"


def in_half(states: Any) -> None:
    for key in ("fp32_flat_groups", "single_partition_of_fp32_groups"):
        if key in states["optimizer_state_dict"]:
            states["optimizer_state_dict"][key] = [part.half() for part in states["optimizer_state_dict"][key]]


@pytest.mark.parametrize("change", [shorter, fewer, no_tensor, in_half, lambda states: [1], lambda states: {"x": 1}])
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_part_that_contradicts_the_shapes_is_refused(stage: int, rank: int, change: Any, tmp_path: Path) -> None:
    place = written(tmp_path / "d", stage)
    edit(optim(place, rank), change)
    with pytest.raises(CkptoolError) as caught:
        ckptool.open(place)
    assert "\n" not in str(caught.value)
    assert str(place) in str(caught.value)


@pytest.mark.parametrize(
    "shape", [(7, 4), (8, 3), (3, 7), (21,), (-7, -3), (1 << 40, 1 << 40), (2**70,), ("7", 3), (7.0, 3), None, 21]
)
@pytest.mark.parametrize("stage", [2, 3])
def test_shapes_that_contradict_the_parts_are_refused(stage: int, shape: Any, tmp_path: Path) -> None:
    place = written(tmp_path / "d", stage)
    for path in place.glob("*model_states.pt"):
        edit(path, lambda states: states["param_shapes"][0].update({"emb.weight": shape}))
    if stage == 3 and shape in ((3, 7), (21,)):  # nothing else in ZeRO-3 has the shape
        assert ckptool.open(place).state_dict()["emb.weight"].shape == shape
        return
    with pytest.raises(FormatError):
        ckptool.open(place)


@pytest.mark.parametrize("count", [10**15, "2", None, 2.0, True, -1, [2, "x"], [], [[2]]])
def test_numbers_of_processes_that_cannot_be_are_bounded(count: Any, tmp_path: Path) -> None:
    place = written(tmp_path / "d", 3)
    for rank in range(2):
        edit(optim(place, rank), lambda states: states["optimizer_state_dict"].update(partition_count=count))
    if count == 10**15:
        with pytest.raises(IncompleteError, match="zero_pp_rank_2_"):
            ckptool.open(place)
    else:
        ckptool.open(place)


def twice(states: Any) -> None:
    states["param_shapes"][1]["emb.weight"] = torch.Size([7, 3])


def odd_buffers(states: Any) -> None:
    states["buffer_names"] = [["bn.running_mean"]]


def a_group_less(states: Any) -> None:
    states["param_shapes"].pop()


def no_module(states: Any) -> None:
    del states["module"]


def frozen_nowhere(states: Any) -> None:
    states["frozen_param_fragments"] = {}


def frozen_of_another_shape(states: Any) -> None:
    del states["module"]["frozen.bias"]
    states["frozen_param_fragments"]["frozen.bias"] = torch.ones(3)


def another_shape_in_module(states: Any) -> None:
    states["module"]["l.weight"] = torch.ones(3, 5)


@pytest.mark.parametrize(
    "change",
    [
        twice,
        a_group_less,
        no_module,
        frozen_nowhere,
        frozen_of_another_shape,
        another_shape_in_module,
        lambda _: "text",
    ],
)
def test_model_states_that_contradict_themselves_are_refused(change: Any, tmp_path: Path) -> None:
    place = written(tmp_path / "d")
    edit(place / "mp_rank_00_model_states.pt", change)
    with pytest.raises(FormatError):
        ckptool.open(place)


def test_a_truncated_file_is_refused_by_its_name(tmp_path: Path) -> None:
    place = written(tmp_path / "d")
    for path in sorted(place.iterdir()):
        raw = path.read_bytes()
        for size in (0, len(raw) // 2, len(raw) - 1):
            path.write_bytes(raw[:size])
            with pytest.raises(FormatError, match=path.name.replace(".", r"\.")):
                ckptool.open(place)
        path.write_bytes(raw)


@pytest.mark.parametrize("what", ["link", "directory", "loop"])
def test_a_part_that_is_no_file_is_incomplete_and_named(what: str, tmp_path: Path) -> None:
    place = written(tmp_path / "d")
    gone = optim(place, 1)
    gone.unlink()
    if what == "directory":
        gone.mkdir()
    else:
        gone.symlink_to("nowhere" if what == "link" else ".")
    with pytest.raises(IncompleteError, match=gone.name):
        ckptool.open(place)


def test_weights_in_files_of_nvme_offload_are_refused(tmp_path: Path) -> None:
    place = written(tmp_path / "d", 3)
    (place / "offloaded_tensors").mkdir()
    with pytest.raises(UnsupportedError, match="NVMe"):
        ckptool.open(place)


def test_a_nested_module_has_its_weights_by_their_dotted_names(tmp_path: Path) -> None:
    place = written(tmp_path / "d", frozen={}, buffers={}, shared={})
    expected = zero_to_fp32(tmp_path / "d")

    def nested(states: Any) -> None:
        made: dict[str, Any] = {}
        for name, tensor in states["module"].items():
            *steps, last = name.split(".")
            inner = made
            for step in steps:
                inner = inner.setdefault(step, {})
            inner[last] = tensor
        states["module"] = made

    edit(place / "mp_rank_00_model_states.pt", nested)
    found = ckptool.open(place)
    assert found.state_dict().keys() == expected.keys()
    assert_same_tensors(found, {name: expected[name] for name in found.state_dict()})


class Canary:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("CKPTOOL_CANARY_EXECUTED",)


def test_a_hostile_pickle_runs_nothing_and_is_named(tmp_path: Path) -> None:
    place = written(tmp_path / "d", 3)
    tree = torch.load(optim(place, 1), weights_only=False)
    torch.save({**tree, "x": Canary()}, optim(place, 1))
    assert any(name == "mkdir" for _, name in ckptool.open(place).names)
