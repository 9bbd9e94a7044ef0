"""Ranks that are missing, or do not fit each other or the rules, are refused by name."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import Run
from ranks import edited, file_of, megatron, refused

import ckptool
from ckptool.errors import FormatError, IncompleteError, UnsupportedError, UsageError


def test_a_missing_rank_is_named(tmp_path: Path, run: Run) -> None:
    megatron(tmp_path / "run", 4, 2)
    for name in ("mp_rank_03_000", "mp_rank_03_001", "mp_rank_01_001"):
        file_of(tmp_path / "run", name).unlink()
        if name == "mp_rank_01_001":
            continue
        file_of(tmp_path / "run", name).parent.rmdir()
    refused(IncompleteError, *(f"mp_rank_{name}/model_optim_rng.pt" for name in ("03_000", "03_001", "01_001")))
    code, out, err = run("inspect", "run")
    assert code == 2
    assert "mp_rank_02_001" in out
    assert "missing ranks" in err


def test_an_iteration_without_files_is_incomplete(tmp_path: Path) -> None:
    (tmp_path / "run" / "mp_rank_00").mkdir(parents=True)
    refused(IncompleteError, "a Megatron-LM checkpoint without a file of a rank: mp_rank_00/model_optim_rng.pt")


def test_keys_that_no_rule_covers_are_all_listed_with_the_patterns_that_are_misspelled(tmp_path: Path) -> None:
    megatron(tmp_path / "run", 2)
    edited(file_of(tmp_path / "run", "mp_rank_00"), lambda tree: tree["model"].update(a=torch.ones(2), b=torch.ones(1)))
    edited(file_of(tmp_path / "run", "mp_rank_01"), lambda tree: tree["model"].update(a=torch.ones(2), b=torch.ones(1)))
    refused(UsageError, "no rule for: a (2), b (1)")
    rules = {"layers": ["decoder.layers.{i}"], "join": {"decoder.layers.{i}.mlp.liner_fc2.weight": "cat 1"}}
    refused(
        UsageError, "decoder.layers.3.mlp.linear_fc1.weight (12x8)", "embedding.word_embeddings.weight (8x8)",
        "patterns that fit no key: decoder.layers.{i}.mlp.liner_fc2.weight (did you mean ",
        rules=rules,
    )  # fmt: skip


def test_replicated_tensors_are_compared_by_their_bytes(tmp_path: Path) -> None:
    megatron(tmp_path / "run", 2)

    def change(tree: Any) -> None:
        tree["model"]["decoder.layers.2.input_layernorm.weight"][3] += 1e-6
        tree["model"]["embedding.position_embeddings.weight"][0, 0] = -0.0

    edited(file_of(tmp_path / "run", "mp_rank_01"), change)
    refused(
        UsageError, "replicated by the rules, and different on the ranks", "decoder.layers.2.input_layernorm.weight",
        "embedding.position_embeddings.weight",
    )  # fmt: skip
    rules = {"base": "gpt", "join": {"*layernorm.weight": "first", "*position_embeddings.weight": "first"}}
    assert ckptool.open("run", tp_rules=rules).state_dict()


def test_unequal_shapes_and_dtypes_and_keys_of_some_ranks_are_all_listed(tmp_path: Path) -> None:
    megatron(tmp_path / "run", 2)

    def change(tree: Any) -> None:
        model = tree["model"]
        model["decoder.layers.0.mlp.linear_fc2.bias"] = torch.ones(7)
        model["decoder.layers.1.mlp.linear_fc2.weight"] = model["decoder.layers.1.mlp.linear_fc2.weight"].half()
        del model["decoder.final_layernorm.weight"]

    edited(file_of(tmp_path / "run", "mp_rank_01"), change)
    refused(
        UsageError, "decoder.layers.0.mlp.linear_fc2.bias (float32 8, float32 7)", "(float32 8x6, float16 8x6)",
        "not on mp_rank_01: decoder.final_layernorm.weight",
    )  # fmt: skip


def test_a_rule_that_the_shape_does_not_allow_is_refused(tmp_path: Path) -> None:
    megatron(tmp_path / "run", 2)
    refused(
        UsageError, "shapes that cat 1 does not fit: decoder.layers.{0..3}.mlp.linear_fc1.bias (12)",
        "shapes that cat 0 in 5 parts does not fit: output_layer.weight (8x8)",
        rules={"base": "gpt", "join": {"*.linear_fc1.bias": "cat 1", "output_layer.weight": "cat 0 in 5 parts"}},
    )  # fmt: skip
    for name in ("mp_rank_00", "mp_rank_01"):
        edited(file_of(tmp_path / "run", name), lambda tree: tree["model"].update(
            {"decoder.layers.3.mlp.linear_fc1.weight": torch.randn(18, 8)}))  # fmt: skip
    refused(UsageError, "shapes do not tell how to join: decoder.layers.3.mlp.linear_fc1.weight (18x8; ")


def test_the_same_matrix_on_two_ranks_is_not_repeated(tmp_path: Path) -> None:
    """Key and value heads that are fewer than the ranks are held by several: cat would give them twice."""
    megatron(tmp_path / "run", 2)
    first = torch.load(file_of(tmp_path / "run", "mp_rank_00"), weights_only=False)["model"]
    name = "decoder.layers.1.self_attention.linear_qkv.weight"
    edited(file_of(tmp_path / "run", "mp_rank_01"), lambda tree: tree["model"].update({name: first[name]}))
    refused(UsageError, f"the same values on several ranks, which cat would repeat: {name}")
    for rank in ("mp_rank_00", "mp_rank_01"):  # a matrix of zeros is the same everywhere
        edited(file_of(tmp_path / "run", rank), lambda tree: tree["model"].update({name: torch.zeros(12, 8)}))
    assert ckptool.open("run", tp_rules="gpt").state_dict()[name].shape == (24, 8)


def test_a_key_of_two_stages_must_be_the_same(tmp_path: Path) -> None:
    whole = megatron(tmp_path / "run", 2, 2)
    name = "embedding.word_embeddings.weight"
    for rank in range(2):
        edited(file_of(tmp_path / "run", f"mp_rank_0{rank}_001"), lambda tree, rank=rank: tree["model"].update(
            {name: whole[name].chunk(2)[rank].clone()}))  # fmt: skip
    found = ckptool.open("run", tp_rules="gpt")
    assert f"in two pipeline stages, with the same values: {name}" in found.notes
    edited(file_of(tmp_path / "run", "mp_rank_01_001"), lambda tree: tree["model"][name].zero_())
    refused(UsageError, f"in two pipeline stages, with other values: mp_rank_00_001/{name}")


def test_ranks_of_experts_are_known_by_their_keys_where_no_argument_tells(tmp_path: Path) -> None:
    """Else each would be a pipeline stage, and the model have its layers twice."""
    whole = megatron(tmp_path / "run", 1)
    for name in ("mp_rank_00_000", "mp_rank_00_001"):
        (tmp_path / "run" / "iter_0000010" / name).mkdir()
        torch.save({"model": whole}, file_of(tmp_path / "run", name))
    refused(
        FormatError, "ranks of two runs, whose names do not go together: mp_rank_00, mp_rank_00_000, mp_rank_00_001"
    )
    file_of(tmp_path / "run", "mp_rank_00").unlink()
    file_of(tmp_path / "run", "mp_rank_00").parent.rmdir()
    refused(UnsupportedError, "expert parallelism")


def test_a_chunk_that_a_rank_lacks_is_missed(tmp_path: Path) -> None:
    megatron(tmp_path / "run", 2, 2, 2)
    edited(file_of(tmp_path / "run", "mp_rank_01_001"), lambda tree: tree.pop("model1"))
    refused(IncompleteError, "not every rank has a part of every pipeline stage", "mp_rank_00_001/model1")
    for rank in ("00", "01"):
        for stage in ("000", "001"):
            edited(file_of(tmp_path / "run", f"mp_rank_{rank}_{stage}"), lambda tree: tree.pop("model1", None))
            edited(
                file_of(tmp_path / "run", f"mp_rank_{rank}_{stage}"), lambda tree: tree.update(model2=tree["model0"])
            )
    refused(IncompleteError, "not every rank has a part of every pipeline stage")


def test_names_and_arguments_that_promise_a_billion_ranks_cost_nothing(tmp_path: Path) -> None:
    for name in ("mp_rank_00_000_000", "mp_rank_9999_9999_9999"):
        (tmp_path / "run" / name).mkdir(parents=True)
        torch.save({"model": {"a": torch.ones(1)}}, tmp_path / "run" / name / "model_optim_rng.pt")
    refused(IncompleteError, "mp_rank_00_000_001/model_optim_rng.pt", "999,999,999,990 more")


@pytest.mark.parametrize("model", [torch.ones(2), None, [torch.ones(1)], "x"], ids=["tensor", "None", "list", "text"])
def test_a_file_whose_model_is_none_is_refused(tmp_path: Path, model: Any) -> None:
    for name in ("mp_rank_00", "mp_rank_01"):
        (tmp_path / "run" / name).mkdir(parents=True)
        torch.save({"model": model, "iteration": 3}, tmp_path / "run" / name / "model_optim_rng.pt")
    refused(FormatError, "a file of Megatron-LM without a model: it has model, iteration")


def test_ranks_of_experts_are_listed_and_refused_by_name(tmp_path: Path) -> None:
    for name in ("mp_rank_00_000", "mp_rank_00_001"):
        (tmp_path / "run" / "iter_0000010" / name).mkdir(parents=True)
        args = argparse.Namespace(
            tensor_model_parallel_size=1, pipeline_model_parallel_size=1, expert_model_parallel_size=2
        )
        torch.save({"args": args, "model": {"decoder.a.weight": torch.ones(2)}}, file_of(tmp_path / "run", name))
    found = ckptool.open("run/iter_0000010")
    assert list(found.state_dict()) == ["mp_rank_00_000/decoder.a.weight", "mp_rank_00_001/decoder.a.weight"]
    refused(UnsupportedError, "expert parallelism", "mp_rank_00_001", path="run/iter_0000010")
