"""Ranks of tensor and pipeline parallelism, cut by plain torch as the parallel layers cut them, and joined again."""

from __future__ import annotations

import argparse
import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from everything import GENUINE
from oracles import Run
from safetensors.torch import load_file

import ckptool
from ckptool.errors import CkptoolError, FormatError, IncompleteError, UnreadableError, UnsupportedError, UsageError

HIDDEN, HEADS, GROUPS, SIZE, FFN, VOCAB = 8, 4, 4, 2, 12, 16

State = dict[str, torch.Tensor]


# --- Megatron-LM: every parameter is made in the parts that its layer gives to the ranks -----------------------------


def column(*parts: torch.Tensor) -> list[torch.Tensor]:
    """What ColumnParallelLinear gives each of four ranks of each part, and that whole: first."""
    whole = torch.cat(parts)
    pieces = [torch.cat([part.chunk(4)[rank] for part in parts]) for rank in range(4)]
    return [whole, *pieces]


def row(whole: torch.Tensor) -> list[torch.Tensor]:
    return [whole, *whole.chunk(4, 1)]


def alike(whole: torch.Tensor) -> list[torch.Tensor]:
    return [whole] * 5


def layer(gated: bool) -> dict[str, list[torch.Tensor]]:
    heads = HEADS // GROUPS
    qkv = [torch.randn((heads + 2) * SIZE, HIDDEN) for _ in range(GROUPS)]  # of a group: its queries, a key, a value
    return {
        "input_layernorm.weight": alike(torch.randn(HIDDEN)),
        "self_attention.linear_proj.weight": row(torch.randn(HIDDEN, HEADS * SIZE)),
        "self_attention.linear_proj.bias": alike(torch.randn(HIDDEN)),
        "self_attention.linear_qkv.weight": [torch.cat(qkv), *qkv],
        "self_attention.linear_qkv.bias": column(torch.randn(GROUPS * (heads + 2) * SIZE)),
        "pre_mlp_layernorm.weight": alike(torch.randn(HIDDEN)),
        "mlp.linear_fc1.weight": column(*(torch.randn(FFN, HIDDEN) for _ in range(1 + gated))),
        "mlp.linear_fc1.bias": column(*(torch.randn(FFN) for _ in range(1 + gated))),
        "mlp.linear_fc2.weight": row(torch.randn(HIDDEN, FFN)),
        "mlp.linear_fc2.bias": alike(torch.randn(HIDDEN)),
    }


def regrouped(pieces: list[torch.Tensor], name: str, width: int, gated: bool) -> list[torch.Tensor]:
    """Of parts for four ranks, those for fewer: several neighbours are one rank."""
    whole, *quarters = pieces
    if width == 1:
        return [whole]
    size = 4 // width
    runs = [quarters[rank * size : (rank + 1) * size] for rank in range(width)]
    if name.endswith(("bias", "weight")) and all(one is whole for one in quarters):
        return [whole] * width
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        return [torch.cat(run, 1) for run in runs]
    if "linear_fc1" in name and gated:
        halves = [[one.chunk(2) for one in run] for run in runs]
        return [torch.cat([*(gate for gate, _ in half), *(up for _, up in half)]) for half in halves]
    return [torch.cat(run) for run in runs]


def megatron(
    directory: Path, width: int, stages: int = 1, chunks: int = 1, layers: int = 4, gated: bool = True,
    dtype: torch.dtype = torch.float32, **args: Any,
) -> State:  # fmt: skip
    """Writes a checkpoint, and returns the whole model."""
    torch.manual_seed(width * 10 + stages)
    named: dict[str, list[torch.Tensor]] = {"embedding.word_embeddings.weight": column(torch.randn(VOCAB, HIDDEN))}
    named["embedding.position_embeddings.weight"] = alike(torch.randn(6, HIDDEN))
    for number in range(layers):
        named |= {f"decoder.layers.{number}.{name}": parts for name, parts in layer(gated).items()}
    named["decoder.final_layernorm.weight"] = alike(torch.randn(HIDDEN))
    named["output_layer.weight"] = column(torch.randn(VOCAB, HIDDEN))
    named = {name: [part.to(dtype) for part in parts] for name, parts in named.items()}
    runs = stages * chunks
    per_run = layers // runs
    for stage in range(stages):
        held: list[dict[str, State]] = [{} for _ in range(width)]
        for chunk in range(chunks):
            run = chunk * stages + stage
            for name, parts in named.items():
                pieces = regrouped(parts, name, width, gated)
                local = name
                if name.startswith("decoder.layers."):
                    number = int(name.split(".")[2])
                    if number // per_run != run:
                        continue
                    local = name.replace(f".{number}.", f".{number - run * per_run}.", 1)
                elif run != (0 if name.startswith("embedding") else runs - 1):
                    continue
                for rank in range(width):
                    models = held[rank].setdefault("model" if chunks == 1 else f"model{chunk}", {})
                    models[local] = pieces[rank].clone()
                    if name.endswith("weight") and "linear" in name:
                        models[local.replace("weight", "_extra_state")] = None  # type: ignore[assignment]
        for rank in range(width):
            name = f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if stages > 1 else "")
            (directory / "iter_0000010" / name).mkdir(parents=True)
            sizes = {"tensor_model_parallel_size": width, "pipeline_model_parallel_size": stages, **args}
            torch.save(
                {
                    "args": argparse.Namespace(**sizes, rank=rank), "checkpoint_version": 3.0, "iteration": 10,
                    **held[rank],
                    "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"params": [0]}]},
                    "rng_state": [{"torch_rng_state": torch.zeros(4, dtype=torch.uint8)}],
                },
                directory / "iter_0000010" / name / "model_optim_rng.pt",
            )  # fmt: skip
    (directory / "latest_checkpointed_iteration.txt").write_text("10")
    return {name: parts[0] for name, parts in named.items()}


def file_of(directory: Path, name: str) -> Path:
    return directory / "iter_0000010" / name / "model_optim_rng.pt"


def edited(path: Path, change: Any) -> None:
    tree = torch.load(path, weights_only=False)
    change(tree)
    torch.save(tree, path)


def assert_same(found: Any, whole: State) -> None:
    """``found``: a state_dict; Megatron's ``_extra_state`` is None in it."""
    found = {name: value for name, value in found.items() if value is not None}
    assert found.keys() == whole.keys()
    for name, tensor in whole.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize(
    ("width", "stages", "chunks"),
    [(2, 1, 1), (4, 1, 1), (1, 2, 1), (2, 2, 1), (4, 2, 1), (2, 4, 1), (1, 2, 2), (2, 2, 2)],
)
def test_ranks_are_joined_to_the_whole_model(tmp_path: Path, width: int, stages: int, chunks: int, gated: bool) -> None:
    whole = megatron(tmp_path / "run", width, stages, chunks, gated=gated)
    ckptool.convert(ckptool.open(tmp_path / "run", tp_rules="gpt"), tmp_path / "whole.safetensors")
    assert_same(load_file(tmp_path / "whole.safetensors"), whole)
    ckptool.save(ckptool.open(tmp_path / "run", tp_rules="gpt"), tmp_path / "whole.pth", verify=True)
    tree = torch.load(tmp_path / "whole.pth", weights_only=False)
    assert_same(tree["model"], whole)
    assert set(tree) == {"args", "checkpoint_version", "iteration", "model"}
    assert None in tree["model"].values()  # of _extra_state


def test_a_single_rank_is_the_whole_model_and_needs_no_rules(tmp_path: Path) -> None:
    whole = megatron(tmp_path / "run", 1)
    found = ckptool.open(tmp_path / "run")
    assert found.format == "megatron"
    assert_same(found.to_torch()["model"], whole)
    assert "optimizer" in found.tree
    assert ckptool.open(tmp_path / "run", tp_rules="gpt").notes[-1] == "nothing to join by gpt: it has no ranks"


def test_what_the_joined_layers_compute_is_the_sum_of_what_the_ranks_compute(tmp_path: Path) -> None:
    """Megatron's own arithmetic: a column-parallel layer, SwiGLU on each rank, a row-parallel layer, all-reduce."""
    megatron(tmp_path / "run", 4, dtype=torch.float64)
    name = "decoder.layers.1.mlp.linear_fc{}.{}"
    x = torch.randn(3, HIDDEN, dtype=torch.float64)

    def mlp(state: State, bias: bool) -> torch.Tensor:
        gate, up = (x @ state[name.format(1, "weight")].T + state[name.format(1, "bias")]).chunk(2, 1)
        out = (torch.nn.functional.silu(gate) * up) @ state[name.format(2, "weight")].T
        return out + state[name.format(2, "bias")] if bias else out

    joined = ckptool.open(tmp_path / "run", tp_rules="gpt").to_torch(only_root=True)
    ranks = [
        torch.load(file_of(tmp_path / "run", f"mp_rank_{rank:02d}"), weights_only=False)["model"] for rank in range(4)
    ]
    summed = sum(mlp(state, False) for state in ranks) + ranks[0][name.format(2, "bias")]
    assert torch.allclose(mlp(joined, True), summed)


@pytest.mark.skipif(not GENUINE.exists(), reason="samples of other tools are not beside this repository")
def test_a_checkpoint_of_megatron_core_is_joined_to_its_distributed_checkpoint() -> None:
    joined = ckptool.open(GENUINE / "megatron_legacy_gpt_tp2pp1", tp_rules="gpt").to_torch(only_root=True)
    stacked = ckptool.open(GENUINE / "megatron_dist_gpt_tp2pp1" / "iter_0000010").to_torch(only_root=True)
    whole: State = {}
    for name, tensor in stacked.items():
        name = name.replace("self_attention.linear_qkv.layer_norm_", "input_layernorm.")
        name = name.replace("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm.")
        if not isinstance(tensor, torch.Tensor):
            continue
        if ".layers." in name:
            whole |= {name.replace(".layers.", f".layers.{number}."): one for number, one in enumerate(tensor)}
        else:
            whole[name] = tensor
    assert_same(joined, whole)


def test_each_rank_is_listed_and_nothing_is_written_without_rules(tmp_path: Path, run: Run) -> None:
    megatron(tmp_path / "run", 2, 2)
    found = ckptool.open("run")
    assert (found.format, found.root, len(found.ranks)) == ("megatron", (), 4)
    ranks = {key.split("/")[0] for key in found.state_dict()}
    assert ranks == {"mp_rank_00_000", "mp_rank_00_001", "mp_rank_01_000", "mp_rank_01_001"}
    loaded = torch.load(file_of(tmp_path / "run", "mp_rank_01_001"), weights_only=False)["model"]
    key = "mp_rank_01_001/decoder.layers.1.mlp.linear_fc1.weight"
    assert torch.equal(found.to_torch(only_root=True)[key], loaded[key.split("/")[1]])
    assert torch.equal(found.to_torch()["mp_rank_01_001"][key.split("/")[1]], loaded[key.split("/")[1]])
    code, out, _ = run("inspect", "run", "--json", "--hash")
    assert code == 0
    (document,) = json.loads(out)["result"]
    beside = {row["path"] for row in document["beside"]}
    assert {"mp_rank_00_001/optimizer", "mp_rank_01_000/rng_state", "mp_rank_01_000/args"} <= beside
    assert any("--tp-rules" in note for note in document["notes"])
    for args in (
        ["convert", "run", "-o", "x.safetensors"], ["filter", "run", "-o", "x.pth"], ["diff", "run", "run"],
        ["remap", "run", "--drop", "*", "-o", "x.pth"], ["load-partial", "run", "--into", "run", "-o", "x.pth"],
    ):  # fmt: skip
        code, _, err = run(*args)
        assert (code, err.count("\n")) == (2, 1)
        assert "--tp-rules FILE" in err
        assert "mp_rank_00_000" in err
    with pytest.raises(UnsupportedError, match="--tp-rules"):
        ckptool.save("run", "x.pth")


def test_every_command_joins_by_rules(tmp_path: Path, run: Run) -> None:
    whole = megatron(tmp_path / "run", 2, 2)
    torch.save(whole, "whole.pth")
    for args in (
        ["inspect", "run"], ["diff", "run", "whole.pth", "--values"], ["filter", "run", "-o", "a.pth"],
        ["filter", "run", "--match", "whole.pth", "--strict", "-o", "b.pth"],
        ["remap", "run", "--add-prefix", "x.", "-o", "c.safetensors"],
        ["convert", "run", "--to", "safetensors", "-o", "d.safetensors"],
        ["load-partial", "run", "--into", "whole.pth", "--strict", "-o", "e.pth"],
    ):  # fmt: skip
        code, out, err = run(*args, "--tp-rules", "gpt")
        assert (code, err) == (0, ""), args
        assert "joined by gpt; layers of the pipeline stages: 2, 2" in out
    assert_same(torch.load("b.pth"), whole)
    assert_same(torch.load("e.pth"), whole)
    assert_same(load_file("c.safetensors"), {f"x.{name}": tensor for name, tensor in whole.items()})


def test_what_is_not_joined_and_what_differs_is_named(tmp_path: Path) -> None:
    megatron(tmp_path / "run", 2)
    notes = "\n".join(ckptool.open("run", tp_rules="gpt").notes)
    assert "not joined, left out: optimizer, rng_state" in notes
    assert "different on the ranks, the first one's taken: args" in notes
    assert "gated, by the shapes: decoder.layers.{0..3}.mlp.linear_fc1.weight" in notes


def test_a_checkpoint_without_ranks_stays_as_it_is_and_that_is_said(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, "a.pth")
    found = ckptool.open("a.pth", tp_rules="gpt")
    assert found.notes == ("nothing to join by gpt: it has no ranks",)
    assert list(found.state_dict()) == ["a"]
    assert ckptool.open(found, tp_rules="gpt").state_dict().keys() == {"a"}


# --- what does not fit ------------------------------------------------------------------------------------------------


def refused(error: type[CkptoolError], *says: str, rules: Any = "gpt", path: str = "run") -> None:
    with pytest.raises(error) as caught:
        ckptool.open(path, tp_rules=rules)
    assert all(text in str(caught.value) for text in says), str(caught.value)
    assert "\n" not in str(caught.value)


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


def test_padding_of_the_vocabulary_is_cut_off_where_its_size_is_known(tmp_path: Path) -> None:
    whole = megatron(tmp_path / "run", 4)
    for size in (3, 4, 13, 16):
        rules = {"base": "gpt", "vocab_size": size}
        found = ckptool.open("run", tp_rules=rules).to_torch(only_root=True)
        assert torch.equal(found["output_layer.weight"], whole["output_layer.weight"][:size])
    refused(
        UsageError,
        "vocab_size is given, and 'vocab cat' of no key",
        rules={
            "base": "gpt",
            "vocab_size": 3,
            "join": {"output_layer.weight": "cat 0", "*word_embeddings.weight": "cat 0"},
        },
    )
    refused(UsageError, "fewer rows than vocab_size, 17", rules={"base": "gpt", "vocab_size": 17})


def test_layers_are_those_that_the_stages_have_and_may_be_stated(tmp_path: Path) -> None:
    megatron(tmp_path / "run", 1, 2, layers=4)
    assert ckptool.open("run", tp_rules={"base": "gpt", "stage_layers": [2, 2]}).state_dict()
    refused(UsageError, "mp_rank_00_001/2, not 3", rules={"base": "gpt", "stage_layers": [2, 3]})
    refused(UsageError, "mp_rank_00_001/2, not no such stage", rules={"base": "gpt", "stage_layers": [2]})

    def change(tree: Any) -> None:
        tree["model"] = {name.replace("layers.1", "layers.3"): one for name, one in tree["model"].items()}

    edited(file_of(tmp_path / "run", "mp_rank_00_001"), change)
    refused(UsageError, "not numbered from 0 on in their pipeline stage: mp_rank_00_001/decoder.layers.{i} is {0,3}")


def test_uneven_stages_are_counted(tmp_path: Path) -> None:
    whole = megatron(tmp_path / "run", 2, 2)
    moved: State = {}

    def take(tree: Any) -> None:
        for name in [name for name in tree["model"] if name.startswith("decoder.layers.1.")]:
            moved[name] = tree["model"].pop(name)

    def give(tree: Any) -> None:
        old = tree["model"]
        shifted = {
            name.replace("layers.1.", "layers.2.").replace("layers.0.", "layers.1."): one for name, one in old.items()
        }
        tree["model"] = {name.replace("layers.1.", "layers.0."): one for name, one in moved.items()} | shifted

    for rank in ("00", "01"):
        moved.clear()
        edited(file_of(tmp_path / "run", f"mp_rank_{rank}_000"), take)
        edited(file_of(tmp_path / "run", f"mp_rank_{rank}_001"), give)
    found = ckptool.open("run", tp_rules="gpt")
    assert "joined by gpt; layers of the pipeline stages: 1, 3" in found.notes
    assert_same(found.to_torch(only_root=True), whole)


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


@pytest.mark.parametrize("gated", [True, False])
def test_experts_that_tensor_parallelism_cuts_are_joined(tmp_path: Path, gated: bool) -> None:
    torch.manual_seed(4)
    parts = {"mlp.router.weight": alike(torch.randn(2, HIDDEN))}
    for name in ("local_experts.0.{}.weight", "local_experts.1.{}.weight", "{}.weight0", "{}.weight11"):
        fc1 = column(*(torch.randn(FFN, HIDDEN) for _ in range(1 + gated)))
        parts |= {f"mlp.experts.{name.format('linear_fc1')}": fc1}
        parts |= {f"mlp.experts.{name.format('linear_fc2')}": row(torch.randn(HIDDEN, FFN))}
    parts["mlp.shared_experts.linear_fc1.weight"] = column(*(torch.randn(FFN, HIDDEN) for _ in range(1 + gated)))
    parts["mlp.shared_experts.linear_fc2.weight"] = row(torch.randn(HIDDEN, FFN))
    for rank in range(4):
        (tmp_path / "run" / f"mp_rank_{rank:02d}").mkdir(parents=True)
        model = {f"decoder.layers.0.{name}": pieces[1 + rank].clone() for name, pieces in parts.items()}
        torch.save({"model": model}, tmp_path / "run" / f"mp_rank_{rank:02d}" / "model_optim_rng.pt")
    whole = {f"decoder.layers.0.{name}": pieces[0] for name, pieces in parts.items()}
    assert_same(ckptool.open("run", tp_rules="gpt").to_torch(only_root=True), whole)
    first = torch.load(tmp_path / "run" / "mp_rank_00" / "model_optim_rng.pt")
    for rank in range(1, 4):  # experts that tensor parallelism leaves whole: each rank has all of them
        torch.save(first, tmp_path / "run" / f"mp_rank_{rank:02d}" / "model_optim_rng.pt")
    refused(
        UsageError,
        "the same values on several ranks, which cat would repeat",
        "local_experts.{0,1}.linear_fc{1,2}.weight",
    )


def test_other_files_of_the_ranks_and_objects_that_differ_are_named(tmp_path: Path) -> None:
    megatron(tmp_path / "run", 2)
    file_of(tmp_path / "run", "mp_rank_01").with_name("distrib_optim.pt").write_bytes(b"x")
    (tmp_path / "run" / "iter_0000010" / "notes.txt").write_text("x")
    name, other = (f"decoder.layers.{number}.mlp.linear_fc1._extra_state" for number in (0, 1))
    for rank, state in (("mp_rank_00", b"a"), ("mp_rank_01", b"b")):
        edited(
            file_of(tmp_path / "run", rank), lambda tree, state=state: tree["model"].update({name: state, other: b"c"})
        )
    found = ckptool.open("run", tp_rules="gpt")
    assert "also here, and not read: mp_rank_01/distrib_optim.pt, notes.txt" in found.notes
    assert f"no tensor, and different on the ranks: left out: {name}" in found.notes
    model = found.to_torch()["model"]
    assert name not in model
    assert model[other] == b"c"


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


def test_tied_tensors_stay_tied(tmp_path: Path) -> None:
    megatron(tmp_path / "run", 2)
    for rank in ("mp_rank_00", "mp_rank_01"):
        edited(file_of(tmp_path / "run", rank), lambda tree: tree["model"].update(
            {"output_layer.weight": tree["model"]["embedding.word_embeddings.weight"]}))  # fmt: skip
    found = ckptool.open("run", tp_rules="gpt")
    assert found.shared() == [["embedding.word_embeddings.weight", "output_layer.weight"]]


def test_the_iteration_is_the_one_that_the_file_beside_it_names(tmp_path: Path) -> None:
    megatron(tmp_path / "run", 2)
    (tmp_path / "run" / "iter_0000010").rename(tmp_path / "run" / "release")
    refused(IncompleteError, "there is no 'iter_0000010', but release")
    (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text("release\n")
    assert ckptool.open("run").url == "run/release"
    (tmp_path / "run" / "release").rename(tmp_path / "run" / "iter_10000000")
    (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text("10000000")
    assert ckptool.open("run").url == "run/iter_10000000"


def test_the_older_model_in_nested_containers_is_joined(tmp_path: Path) -> None:
    torch.manual_seed(0)
    parts = {
        ("language_model", "embedding", "word_embeddings", "weight"): column(torch.randn(VOCAB, HIDDEN)),
        ("language_model", "encoder", "layers.0.self_attention.query_key_value.weight"): column(
            torch.randn(24, HIDDEN)
        ),
        ("language_model", "encoder", "layers.0.self_attention.dense.weight"): row(torch.randn(HIDDEN, HIDDEN)),
        ("language_model", "encoder", "layers.0.mlp.dense_h_to_4h.weight"): column(*torch.randn(2, FFN, HIDDEN)),
        ("language_model", "encoder", "layers.0.mlp.dense_4h_to_h.weight"): row(torch.randn(HIDDEN, FFN)),
        ("language_model", "encoder", "layers.0.post_attention_layernorm.bias"): alike(torch.randn(HIDDEN)),
    }
    for stage in range(2):
        for rank in range(4):
            model: dict[str, Any] = {}
            for path, pieces in parts.items():
                node = model
                for step in path[:-1]:
                    node = node.setdefault(step, OrderedDict())
                if stage == 0 or "encoder" in path:
                    node[path[-1]] = pieces[1 + rank] * (1 + stage)
            (tmp_path / "run" / "iter_0000010" / f"mp_rank_{rank:02d}_{stage:03d}").mkdir(parents=True)
            torch.save(
                {"model": model, "checkpoint_version": 3.0},
                file_of(tmp_path / "run", f"mp_rank_{rank:02d}_{stage:03d}"),
            )
    tree = ckptool.open("run/iter_0000010", tp_rules="gpt").to_torch()["model"]
    for path, pieces in parts.items():
        node = tree
        for step in path[:-1]:
            node = node[step]
        assert torch.equal(node[path[-1]], pieces[0])
        if "encoder" in path:
            assert torch.equal(node[path[-1].replace("layers.0", "layers.1")], 2 * pieces[0])


# --- Meta's Llama -----------------------------------------------------------------------------------------------------


def llama(directory: Path, width: int, rows: bool = False, dtype: torch.dtype = torch.bfloat16) -> State:
    torch.manual_seed(width)
    heads, kv, dim, hidden, vocab = 4, 4, 16, 24, 32
    whole = {"tok_embeddings.weight": torch.randn(vocab, dim), "norm.weight": torch.randn(dim)}
    whole["output.weight"] = torch.randn(vocab, dim)
    cut: dict[str, int | None] = {"tok_embeddings.weight": 0 if rows else 1, "norm.weight": None, "output.weight": 0}
    for number in range(2):
        for name, shape, along in (
            ("attention.wq", (heads * 4, dim), 0), ("attention.wk", (kv * 4, dim), 0),
            ("attention.wv", (kv * 4, dim), 0),
            ("attention.wo", (dim, heads * 4), 1), ("feed_forward.w1", (hidden, dim), 0),
            ("feed_forward.w2", (dim, hidden), 1), ("feed_forward.w3", (hidden, dim), 0),
            ("attention_norm", (dim,), None), ("ffn_norm", (dim,), None),
        ):  # fmt: skip
            key = f"layers.{number}.{name}.weight"
            whole[key], cut[key] = torch.randn(shape), along
    whole = {name: tensor.to(dtype) for name, tensor in whole.items()}
    whole["rope.freqs"], cut["rope.freqs"] = torch.randn(2), None
    directory.mkdir()
    for rank in range(width):
        pieces = {
            name: tensor if cut[name] is None else tensor.chunk(width, cut[name] or 0)[rank].clone()
            for name, tensor in whole.items()
        }
        torch.save(pieces, directory / f"consolidated.{rank:02d}.pth")
    (directory / "params.json").write_text(json.dumps({"dim": dim, "n_heads": heads, "n_layers": 2}))
    return whole


@pytest.mark.parametrize("rows", [False, True], ids=["columns", "rows"])
@pytest.mark.parametrize("width", [2, 4])
def test_llama_is_joined_whichever_way_its_embeddings_are_cut(tmp_path: Path, width: int, rows: bool) -> None:
    whole = llama(tmp_path / "run", width, rows)
    found = ckptool.open("run", tp_rules="llama")
    assert (found.format, found.root) == ("consolidated", ())
    ckptool.convert(found, "whole.safetensors")
    assert_same(load_file("whole.safetensors"), whole)


def test_a_single_file_of_llama_is_read_as_any_other(tmp_path: Path) -> None:
    whole = llama(tmp_path / "run", 1)
    assert_same(ckptool.open("run").to_torch(), whole)
    assert_same(ckptool.open("run", tp_rules="llama").to_torch(), whole)


def test_pieces_of_llama_are_listed_and_a_missing_one_is_named(tmp_path: Path, run: Run) -> None:
    llama(tmp_path / "run", 4)
    code, out, _ = run("inspect", "run", "--keys")
    assert code == 0
    assert "consolidated.03/layers.1.feed_forward.w2.weight\n" in out
    assert "--tp-rules FILE" in run("convert", "run", "-o", "x.safetensors")[2]
    (tmp_path / "run" / "consolidated.01.pth").unlink()
    refused(IncompleteError, "consolidated.01.pth", rules="llama")
    (tmp_path / "run" / "consolidated.03.pth").unlink()
    (tmp_path / "run" / "consolidated.02.pth").rename(tmp_path / "run" / "consolidated.01.pth")
    refused(  # nothing says how many there were, but the width of the embeddings does
        UsageError, "shapes do not tell how to join: tok_embeddings.weight (32x4; norm.weight is 16, on 2 ranks)",
        rules="llama",
    )  # fmt: skip


# --- rules ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[join]\na = 'replicate'", "a: 'replicate' is no way to join (did you mean replicated?); there are cat N"),
        ("[join]\na = 'cat0'", "a: 'cat0' is no way to join (did you mean cat N?)"),
        ("[join]\na = 'cat 0 in 0 parts'", "is no way to join"),
        ("[join]\na = 0", "a: 0 is no way to join"),
        ("[join]\na = {gated_by = 'b'}", "a table is {gated-by = KEY} or {width-by = KEY}"),
        ("[joins]\na = 'cat 0'", "no field 'joins' (did you mean join?)"),
        ("layer = ['a.{i}']", "no field 'layer' (did you mean layers?)"),
        ("layers = ['a.i']", "layers is a list of patterns that end in .{i}"),
        ("stage_layers = [1.5]", "stage_layers is a list of whole numbers"),
        ("vocab_size = true", "vocab_size is a whole number above 0"),
        ("base = 'gtp'", "base is the name of rules that ship, not 'gtp'"),
        ("join = 3", "join is a table of key patterns"),
        ("[join]\n'a.{i}.w' = {gated-by = 'b.{j}.w'}", "{j}, which the old name has not"),
        ("join = [", "not TOML"),
    ],
)
def test_a_wrong_rule_is_one_line_that_names_it(tmp_path: Path, run: Run, text: str, says: str) -> None:
    Path("rules.toml").write_text(text)
    torch.save({"a": torch.ones(2)}, "a.pth")
    code, _, err = run("inspect", "a.pth", "--tp-rules", "rules.toml")
    assert (code, err.count("\n")) == (2, 1)
    assert says in err
    assert "rules.toml" in err


def test_rules_that_are_not_there_are_refused_with_those_that_ship(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, "a.pth")
    refused(UnreadableError, "(did you mean llama?)", "rules that ship: gpt, llama", rules="lama", path="a.pth")
    refused(UnreadableError, "no such file", rules="dir/rules.toml", path="a.pth")
    refused(UsageError, "tp_rules is a path, a name or a dict, not an int", rules=3, path="a.pth")


def test_the_last_pattern_that_fits_a_key_decides(tmp_path: Path) -> None:
    whole = llama(tmp_path / "run", 2)
    Path("rules.toml").write_text('base = "llama"\n[join]\n"*norm*" = "first"\n"re:^rope" = "drop"\n')
    found = ckptool.open("run", tp_rules=Path("rules.toml"))
    assert found.notes == ("joined by rules.toml", "left out by the rules: rope.freqs")
    assert found.state_dict().keys() == whole.keys() - {"rope.freqs"}


def test_the_rules_that_ship_are_in_the_package() -> None:
    from ckptool.directories.parallel import joining

    assert joining.shipped() == ["gpt", "llama"]
    for name in joining.shipped():
        rules = joining.JoinRules.of(name)
        assert rules.rules
        assert rules.layers
