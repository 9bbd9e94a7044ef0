"""DeepSpeed's other ways to save: pipelines, experts, universal checkpoints."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from everything import zero_to_fp32
from oracles import assert_same_tensors
from partitioned import edit, groups, optim, said, written

import ckptool
from ckptool.errors import FormatError, IncompleteError, UnsupportedError


def test_weights_split_over_tensor_parallel_ranks_are_refused(tmp_path: Path) -> None:
    place = written(tmp_path / "d")
    shutil.copy(place / "mp_rank_00_model_states.pt", place / "mp_rank_01_model_states.pt")
    with pytest.raises(UnsupportedError, match=r"2 model-parallel ranks.*ds_to_universal"):
        ckptool.open(place)
    (place / "mp_rank_01_model_states.pt").unlink()
    edit(place / "mp_rank_00_model_states.pt", lambda states: states.update(mp_world_size=4))
    with pytest.raises(UnsupportedError, match="4 model-parallel ranks"):
        ckptool.open(place)


def pipeline(directory: Path, stages: int = 2, zero: bool = False) -> dict[str, torch.Tensor]:
    """Writes three layers, the second without parameters; returns the weights, in fp32 if there are some with ZeRO."""
    directory.mkdir()
    torch.manual_seed(8)
    weights = {"0.weight": torch.randn(3, 2), "0.bias": torch.randn(3), "10.weight": torch.randn(2, 3)}
    for number in (0, 1, 10):
        layer = {key.partition(".")[2]: value for key, value in weights.items() if key.startswith(f"{number}.")}
        torch.save({key: value.bfloat16() if zero else value for key, value in layer.items()},
                   directory / f"layer_{number:02d}-model_states.pt")  # fmt: skip
    for stage in range(stages):
        mine = {key: value for key, value in weights.items() if key.startswith("10.") == bool(stage)}
        shapes = [{key: value.shape for key, value in mine.items()}] if zero else None
        states = {"module": None, "buffer_names": [], "optimizer": None if zero else {"state": {}, "param_groups": []},
                  "param_shapes": shapes, "shared_params": {}, "mp_world_size": stages, "global_steps": 4}  # fmt: skip
        torch.save(states, directory / f"mp_rank_{stage:02d}_model_states.pt")
        flat = torch.cat([value.flatten() for value in mine.values()])
        for rank in range(2 if zero else 0):
            held = {"single_partition_of_fp32_groups": [flat[rank * 5 : rank * 5 + 5].clone()], "partition_count": [2]}
            torch.save({"optimizer_state_dict": held},
                       directory / f"zero_pp_rank_{rank}_mp_rank_{stage:02d}_optim_states.pt")  # fmt: skip
    return weights


@pytest.mark.parametrize("zero", [False, True])
def test_the_layers_of_a_pipeline_are_one_model(zero: bool, tmp_path: Path) -> None:
    weights = pipeline(tmp_path / "d", zero=zero)
    found = ckptool.open(tmp_path / "d")
    assert_same_tensors(found, weights)
    assert said(found, "layer_02", "layer_09")
    assert said(found, "optimizer", "in 4 " if zero else "2 stages")
    assert found.tree["global_steps"] == 4


def test_tied_layers_of_a_pipeline_are_taken_from_their_files(tmp_path: Path) -> None:
    weights = pipeline(tmp_path / "d", zero=True)

    def tied(states: Any) -> None:
        states["param_shapes"] = [{"tied_modules.emb.weight": torch.Size([2, 3])}]

    edit(tmp_path / "d/mp_rank_01_model_states.pt", tied)
    found = ckptool.open(tmp_path / "d")
    assert torch.equal(found.to_torch()["module"]["10.weight"], weights["10.weight"].bfloat16())
    assert found.state_dict()["0.weight"].dtype == "float32"
    assert said(found, "tied_modules.emb.weight")


def test_a_pipelines_layers_in_several_pieces_are_refused(tmp_path: Path) -> None:
    pipeline(tmp_path / "d")
    for name in ("layer_00-model_states.pt", "layer_01-model_states.pt", "layer_10-model_states.pt"):
        os.rename(tmp_path / "d" / name, tmp_path / "d" / name.replace("-model", "-model_00-model"))
    assert len(ckptool.open(tmp_path / "d").state_dict()) == 3
    torch.save({"weight": torch.ones(1)}, tmp_path / "d/layer_00-model_01-model_states.pt")
    with pytest.raises(UnsupportedError, match="layer_00-model_01-model_states"):
        ckptool.open(tmp_path / "d")


def test_a_pipeline_without_its_layers_is_incomplete(tmp_path: Path) -> None:
    pipeline(tmp_path / "d", stages=1)
    for path in (tmp_path / "d").glob("layer*"):
        path.unlink()
    with pytest.raises(IncompleteError, match="layer_00"):
        ckptool.open(tmp_path / "d")


def experts(place: Path, key: str = "moe.deepspeed_moe.experts.deepspeed_experts.{}.weight") -> dict[str, torch.Tensor]:
    """Writes two experts of each of two layers; returns their weights."""
    made = {}
    for layer in range(2):
        for expert in range(2):
            name = f"{layer}.{key.format(expert)}"
            made[name] = torch.full((2, 2), float(10 * layer + expert))
            torch.save({name: made[name]}, place / f"layer_{layer}_expert_{expert}_mp_rank_00_model_states.pt")
    return made


def without_zero(place: Path) -> dict[str, torch.Tensor]:
    """Makes it a checkpoint without ZeRO; returns the weights."""
    for path in place.glob("*optim_states.pt"):
        path.unlink()
    edit(place / "mp_rank_00_model_states.pt", lambda states: states.update(param_shapes=None))
    return dict(torch.load(place / "mp_rank_00_model_states.pt", weights_only=False)["module"])


@pytest.mark.parametrize("counts", [None, [2, 2]])
def test_experts_are_joined_to_the_model(counts: Any, tmp_path: Path) -> None:
    place = written(tmp_path / "d")
    expected = without_zero(place) | experts(place)
    edit(place / "mp_rank_00_model_states.pt", lambda states: states.update(num_experts=counts))
    torch.save({"optimizer": {}}, place / "expp_rank_0_mp_rank_00_optim_states.pt")
    found = ckptool.open(tmp_path / "d")
    assert_same_tensors(found, expected)
    assert said(found, "not read", "expp_rank_0")


def test_experts_that_only_some_processes_train_are_taken_from_their_files(tmp_path: Path) -> None:
    more = {f"{layer}.moe.deepspeed_moe.experts.deepspeed_experts.0.weight": torch.ones(2, 2) for layer in range(2)}
    place = written(tmp_path / "d", groups=[*groups(), more])
    expected = zero_to_fp32(tmp_path / "d")

    def of_some(states: Any) -> None:
        states["optimizer_state_dict"]["partition_count"] = [2, 2, 1]
        states["optimizer_state_dict"]["single_partition_of_fp32_groups"][2] = torch.zeros(8)

    for rank in range(2):
        edit(optim(place, rank), of_some)
    nowhere = shutil.copytree(place, tmp_path / "nowhere")
    edit(nowhere / "mp_rank_00_model_states.pt", lambda states: [states["module"].pop(key) for key in more] and None)
    with pytest.raises(IncompleteError, match=r"deepspeed_experts\.0\.weight"):
        ckptool.open(nowhere)
    edit(place / "mp_rank_00_model_states.pt", lambda states: [states["module"].pop(key) for key in more] and None)
    dense = {key: value for key, value in expected.items() if key not in more}
    expected = {**dense, **experts(place)}
    found = ckptool.open(place)
    assert_same_tensors(found, expected)
    assert said(found, "dtype of the run, float32", "deepspeed_experts.1.weight")


@pytest.mark.parametrize("gone", [(0, 1), (1, 0), (1, 1)])
def test_a_missing_expert_is_named(gone: tuple[int, int], tmp_path: Path) -> None:
    place = written(tmp_path / "d")
    without_zero(place)
    experts(place)
    edit(place / "mp_rank_00_model_states.pt", lambda states: states.update(num_experts=[2, 2]))
    name = f"layer_{gone[0]}_expert_{gone[1]}_mp_rank_00_model_states.pt"
    (place / name).unlink()
    with pytest.raises(IncompleteError, match=name.replace(".", r"\.")):
        ckptool.open(place)


@pytest.mark.parametrize(
    "key",
    ["experts.{}.weight", "moe.experts.deepspeed_experts.7.weight", "moe.deepspeed_experts.1{}.weight", "weight"],
)
def test_experts_whose_names_leave_a_doubt_are_refused(key: str, tmp_path: Path) -> None:
    place = written(tmp_path / "d")
    without_zero(place)
    experts(place, key)
    with pytest.raises(UnsupportedError, match="no weight of expert 0 by its name"):
        ckptool.open(place)


def test_experts_of_autoep_and_of_other_ranks_are_refused(tmp_path: Path) -> None:
    place = written(tmp_path / "d")
    experts(place)
    edit(place / "mp_rank_00_model_states.pt", lambda states: states.update(ds_autoep_layers=[{}]))
    with pytest.raises(UnsupportedError, match="AutoEP"):
        ckptool.open(place)
    torch.save({}, place / "layer_0_expert_0_mp_rank_01_model_states.pt")
    with pytest.raises(UnsupportedError, match="layer_0_expert_0_mp_rank_01"):
        ckptool.open(place)


def universal(source: Path, target: Path, stage: int) -> None:
    """Writes what ds_to_universal.py makes of a checkpoint: of ZeRO-3 flat tensors, and nothing that is not trained."""
    module = zero_to_fp32(source.parent)
    for path in source.glob("*model_states.pt"):
        target.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    trained = {**groups()[0], **groups()[1]}
    for name, tensor in module.items() if stage < 3 else trained.items():
        place = target / "zero" / name
        place.mkdir(parents=True)
        value = tensor.float() * (0.5 if name == "head.weight" else 1)
        content = {"param": value, "cat_dim": 0} if name in trained else {"param": value}
        torch.save(tensor.flatten() if stage == 3 else content, place / "fp32.pt")
        torch.save(tensor * 0, place / "exp_avg.pt")
    torch.save({"param_groups": []}, target / "zero" / "optimizer_state.pt")
    (target.parent / "latest_universal").write_text(target.name)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_universal_checkpoints_are_read(stage: int, tmp_path: Path) -> None:
    source = written(tmp_path / "d", stage)
    expected = zero_to_fp32(tmp_path / "d")
    universal(source, tmp_path / "u" / "global_step3_universal", stage)
    if stage < 3:
        expected = {name: tensor.float() for name, tensor in expected.items()}
        expected["head.weight"] = expected["head.weight"] * 0.5
    for path in (tmp_path / "u", tmp_path / "u" / "global_step3_universal"):
        found = ckptool.open(path)
        assert_same_tensors(found, expected)
        assert said(found, "exp_avg", "not read")
        assert said(found, "on their own", "head.weight") == (stage < 3)
        assert bool(found.shared()) == (stage == 3)


def test_universal_checkpoints_of_several_ranks_are_whole_already(tmp_path: Path) -> None:
    target = tmp_path / "u" / "global_step3_universal"
    universal(written(tmp_path / "d", 2), target, 2)

    def sliced(states: Any) -> None:
        states["module"]["l.weight"] = torch.ones(3, 3)
        states["param_shapes"][0]["l.weight"] = torch.Size([3, 3])

    edit(target / "mp_rank_00_model_states.pt", sliced)
    shutil.copy(target / "mp_rank_00_model_states.pt", target / "mp_rank_01_model_states.pt")
    assert torch.equal(ckptool.open(target).to_torch()["module"]["l.weight"], groups()[0]["l.weight"])


@pytest.mark.parametrize("stage", [2, 3])
def test_a_universal_checkpoint_with_a_weight_missing_is_incomplete(stage: int, tmp_path: Path) -> None:
    target = tmp_path / "u" / "global_step3_universal"
    universal(written(tmp_path / "d", stage), target, stage)
    (target / "zero" / "l.weight" / "fp32.pt").unlink()
    with pytest.raises(IncompleteError, match=r"zero/l\.weight/fp32\.pt"):
        ckptool.open(target)
    shutil.rmtree(target / "zero" / "l.weight")
    with pytest.raises(IncompleteError, match=r"zero/l\.weight/fp32\.pt"):
        ckptool.open(target)


@pytest.mark.parametrize("value", [torch.ones(4), {"param": torch.ones(3, 3)}, {"x": 1}, "text", None], ids=str)
def test_a_weight_of_a_universal_checkpoint_that_does_not_fit_is_refused(value: Any, tmp_path: Path) -> None:
    target = tmp_path / "u" / "global_step3_universal"
    universal(written(tmp_path / "d", 3), target, 3)
    torch.save(value, target / "zero" / "l.weight" / "fp32.pt")
    with pytest.raises(FormatError, match=r"l\.weight"):
        ckptool.open(target)
