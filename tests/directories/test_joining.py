"""Ranks of tensor and pipeline parallelism are joined to the model that plain torch cut."""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from everything import GENUINE
from oracles import Run
from ranks import (
    FFN,
    HIDDEN,
    VOCAB,
    State,
    alike,
    assert_same,
    column,
    edited,
    file_of,
    llama,
    megatron,
    refused,
    row,
)
from safetensors.torch import load_file

import ckptool
from ckptool.errors import IncompleteError, UnsupportedError, UsageError


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
