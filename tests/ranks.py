"""Ranks of tensor and pipeline parallelism, cut by plain torch as the parallel layers cut them."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import ckptool
from ckptool.errors import CkptoolError

HIDDEN, HEADS, GROUPS, SIZE, FFN, VOCAB = 8, 4, 4, 2, 12, 16

State = dict[str, torch.Tensor]


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


def refused(error: type[CkptoolError], *says: str, rules: Any = "gpt", path: str = "run") -> None:
    with pytest.raises(error) as caught:
        ckptool.open(path, tp_rules=rules)
    assert all(text in str(caught.value) for text in says), str(caught.value)
    assert "\n" not in str(caught.value)


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
