"""`remap`: every operation on tensors against torch, for every dtype, container and view."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import FIXTURES, Run, Saved, assert_identical, torch_load
from remapping import (
    CASES,
    CONTAINERS,
    DTYPES,
    EVERY_OPERATION,
    GPT2_APART,
    SHAPES,
    all_at_once,
    as_ints,
    assert_bits,
    chunked,
    expected_of,
    gpt2,
    put,
    some,
    woven,
)
from safetensors.torch import load_file
from torch import nn

import ckptool
from ckptool.errors import CkptoolError, UnsupportedError


@pytest.mark.parametrize("name", CASES)
def test_an_operation_gives_what_torch_gives(name: str, remap: Callable[..., Any]) -> None:
    state = some("float32")
    remap(put("pth", state), "out.pth", CASES[name][0])
    found = torch.load("out.pth", weights_only=True)
    assert_bits(found, expected_of(name, state))
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    assert all(tensor.is_contiguous() for tensor in found.values())


@pytest.mark.parametrize("kind", CONTAINERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_operations_hold_for_every_dtype_from_every_container(dtype: str, kind: str, remap: Callable[..., Any]) -> None:
    state = some(dtype)
    if (dtype, kind) == ("float8_e4m3fn", "legacy"):
        pytest.skip("torch writes such a file and cannot load it; we refuse to write one")
    source = put(kind, state)
    remap(source, "out.pth", EVERY_OPERATION)
    found = torch.load("out.pth", weights_only=True)
    expected = all_at_once({k: as_ints(t) for k, t in state.items()})
    if kind in ("safetensors", "sharded"):  # their order is not the dict's
        assert sorted(found) == sorted(expected)
        found = {key: found[key] for key in expected}
    assert_bits(found, expected)
    assert {tensor.dtype for tensor in found.values()} == {getattr(torch, dtype)}


VIEWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "sliced": lambda t: torch.stack([t, t + 1], -1).flatten(-2)[..., ::2] if t.dim() else torch.stack([t, t])[1],
    "offset": lambda t: torch.cat([t.flatten(), t.flatten()])[t.numel() :].view(t.shape),
    "expanded": lambda t: t[:1].expand(t.shape) if t.dim() else t,
    "channels last": lambda t: t.to(memory_format=torch.channels_last) if t.dim() == 4 else t,
}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("view", VIEWS)
def test_operations_hold_for_views_of_every_kind(view: str, suffix: str, remap: Callable[..., Any]) -> None:
    state = {key: VIEWS[view](torch.randn(shape)) for key, shape in SHAPES.items()}
    assert view == "offset" or not all(tensor.is_contiguous() for tensor in state.values())
    remap(put("pth", state), f"out{suffix}", EVERY_OPERATION)
    found = torch.load("out.pth") if suffix == ".pth" else load_file("out.safetensors")
    expected = all_at_once(state)
    assert_bits({key: found[key] for key in expected}, expected)


def test_lazy_conjugation_and_negation_are_part_of_the_value(remap: Callable[..., Any]) -> None:
    z = torch.randn(4, 6, dtype=torch.complex64)
    state = {"w": z.conj(), "v": torch._neg_view(torch.randn(4, 6)), "u": z.conj()[1:, ::2]}
    remap(put("pth", state), "out.pth", [
        {"transpose": "w"}, {"split": "v", "into": ["a", "b"], "dim": 1}, {"reshape": "u", "shape": [-1]},
        {"reshape": "w", "shape": [3, 8]},
    ])  # fmt: skip
    expected = {"w": z.conj().t().reshape(3, 8), "a": state["v"][:, :3], "b": state["v"][:, 3:]}
    assert_bits(torch.load("out.pth"), {**expected, "u": state["u"].reshape(-1)})


def test_tensors_larger_than_a_block_are_put_together_and_taken_apart(remap: Callable[..., Any]) -> None:
    from ckptool.io.source import BLOCK

    state = {
        "a": torch.randn(700, 600), "b": torch.randn(700, 301), "c": torch.randn(700, 1),
        "box": torch.randn(9, 211, 170, dtype=torch.float64), "qkv": torch.randn(6 * 64, 800),
        "row": torch.randn(2, 400_000), "col": torch.randn(2, 300_001), "t": torch.randn(900, 811),
    }  # fmt: skip
    assert all(tensor.nbytes > BLOCK for key, tensor in state.items() if key not in "abc")
    remap(put("pth", state), "out.pth", [
        {"cat": ["a", "b", "c"], "into": "abc", "dim": 1}, {"permute": "box", "dims": [2, 0, 1]},
        {"chunk": "qkv", "into": ["q", "k", "v"], "heads": 2}, {"cat": ["row", "col"], "into": "wide", "dim": 1},
        {"transpose": "t"}, {"split": "t", "into": ["t0", "t1"], "sizes": [800, 11]},
        {"transpose": "abc"}, {"weave": ["k", "q"], "into": "kq", "heads": 4, "dim": 1},
    ])  # fmt: skip
    q, k, v = chunked(state["qkv"], 2, 3)
    assert_bits(torch.load("out.pth", weights_only=True), {
        "abc": torch.cat([state["a"], state["b"], state["c"]], 1).t(), "box": state["box"].permute(2, 0, 1),
        "kq": woven([k, q], 4, 1), "v": v, "wide": torch.cat([state["row"], state["col"]], 1),
        "t0": state["t"].t()[:800], "t1": state["t"].t()[800:],
    })  # fmt: skip


def test_what_torch_calls_transpose_of_two_dims_is_a_transpose_of_a_matrix_too(remap: Callable[..., Any]) -> None:
    state = some("float32")
    for dims in ([0, 1], [1, 0], [-1, -2], [0, -1]):
        remap(put("pth", state), "out.pth", [{"transpose": "w", "dims": dims}])
        assert_bits(torch.load("out.pth"), {**state, "w": state["w"].transpose(*dims)})


def test_negative_dims_permute_as_in_torch(remap: Callable[..., Any]) -> None:
    state = some("float32")
    remap(put("pth", state), "out.pth", [{"permute": "box", "dims": [-1, 0, -2]}])
    assert_bits(torch.load("out.pth"), {**state, "box": state["box"].permute(-1, 0, -2)})


def test_tensors_that_are_no_plain_block_of_bytes_stay_whole(run: Run) -> None:
    source = FIXTURES / "composite.pth"
    for name in ("quantized", "coo", "nested", "meta", "csr", "jagged"):
        with pytest.raises(CkptoolError, match=name):
            ckptool.remap(source, [{"reshape": name, "shape": [-1]}])
    changed, _ = ckptool.remap(source, [{"rename": "coo", "to": "sparse"}, {"rename": "quantized", "to": "q8"}])
    ckptool.save(changed, "out.pth")
    old, new = torch_load(source), torch_load(Path("out.pth"))
    expected = {{"coo": "sparse", "quantized": "q8"}.get(key, key): value for key, value in old.items()}
    assert_identical(expected, new)


def test_tensors_of_two_dtypes_are_not_put_together(saved: Saved) -> None:
    path = saved({"a": torch.zeros(2), "b": torch.zeros(2).half()})
    with pytest.raises(UnsupportedError, match="a, b"):
        ckptool.remap(path, [{"cat": ["a", "b"], "into": "c"}])


# --- the layouts of real families ------------------------------------------------------------------------------------


GPT2_BACK = [
    *[{"cat": [f"h.{{i}}.attn.{n}.{leaf}" for n in ("q", "k", "v")], "into": f"h.{{i}}.attn.c_attn.{leaf}"}
      for leaf in ("weight", "bias")],
    {"transpose": "h.*.c_attn.weight"}, {"transpose": "*.c_proj.weight"},
]  # fmt: skip


def test_gpt2s_conv1d_becomes_q_k_v_linears_and_comes_back(remap: Callable[..., Any], saved: Saved) -> None:
    state = gpt2()
    document = remap(saved(state), "apart.pth", GPT2_APART)
    found = torch.load("apart.pth")
    x = torch.randn(5, 8)
    for i in range(2):
        fused = x @ state[f"h.{i}.attn.c_attn.weight"] + state[f"h.{i}.attn.c_attn.bias"]
        names = [f"h.{i}.attn.{name}" for name in ("q", "k", "v")]
        apart = [nn.functional.linear(x, found[f"{name}.weight"], found[f"{name}.bias"]) for name in names]
        torch.testing.assert_close(torch.cat(apart, -1), fused)
    rows = {row["new"]: (row["old"], row["op"]) for row in document["result"]["map"]}
    assert rows["h.0.attn.k.weight"] == (["h.0.attn.c_attn.weight"], "transpose;split:0:1/3")
    assert rows["h.1.attn.v.bias"] == (["h.1.attn.c_attn.bias"], "split:0:2/3")
    assert rows["h.1.attn.c_proj.weight"] == (["h.1.attn.c_proj.weight"], "transpose")
    remap("apart.pth", "back.pth", GPT2_BACK)
    assert_bits(torch.load("back.pth"), state)


def test_gpt_neox_heads_are_taken_apart_and_woven_again(remap: Callable[..., Any], saved: Saved) -> None:
    heads, size, width = 4, 3, 12
    state = {"l.0.query_key_value.weight": torch.randn(3 * heads * size, width),
             "l.0.query_key_value.bias": torch.randn(3 * heads * size),
             "l.0.dense.weight": torch.randn(4, 4)}  # fmt: skip
    apart = [{"chunk": f"l.{{i}}.query_key_value.{leaf}", "heads": heads,
              "into": [f"l.{{i}}.{n}.{leaf}" for n in ("q", "k", "v")]} for leaf in ("weight", "bias")]  # fmt: skip
    document = remap(saved(state), "apart.pth", apart)
    found = torch.load("apart.pth")
    # transformers' GPTNeoXAttention: (batch, heads, 3 * size) after the fused layer, cut in three per head
    x = torch.randn(5, width)
    fused = nn.functional.linear(x, state["l.0.query_key_value.weight"], state["l.0.query_key_value.bias"])
    q, k, v = fused.view(5, heads, 3 * size).chunk(3, dim=-1)
    for name, expected in (("q", q), ("k", k), ("v", v)):
        got = nn.functional.linear(x, found[f"l.0.{name}.weight"], found[f"l.0.{name}.bias"])
        torch.testing.assert_close(got.view(5, heads, size), expected)
    ops = {row["new"]: row["op"] for row in document["result"]["map"]}
    assert ops["l.0.k.weight"] == "reshape;split:1:1/3;reshape"
    back = [{"weave": [f"l.{{i}}.{n}.{leaf}" for n in ("q", "k", "v")], "heads": heads,
             "into": f"l.{{i}}.query_key_value.{leaf}"} for leaf in ("weight", "bias")]  # fmt: skip
    remap("apart.pth", "back.pth", back)
    assert_bits(torch.load("back.pth"), state)


def test_llamas_gate_and_up_become_one_and_two_again(remap: Callable[..., Any], saved: Saved) -> None:
    state = {f"layers.{i}.mlp.{n}_proj.weight": torch.randn(6, 4).bfloat16() for i in range(11) for n in ("gate", "up")}
    names = [f"layers.{{i}}.mlp.{n}_proj.weight" for n in ("gate", "up")]
    document = remap(saved(state), "one.pth", [{"cat": names, "into": "layers.{i}.mlp.gate_up.weight"}])
    found = torch.load("one.pth")
    assert list(found) == [f"layers.{i}.mlp.gate_up.weight" for i in range(11)]
    for i in range(11):
        gate, up = found[f"layers.{i}.mlp.gate_up.weight"].chunk(2)
        assert torch.equal(gate, state[f"layers.{i}.mlp.gate_proj.weight"])
        assert torch.equal(up, state[f"layers.{i}.mlp.up_proj.weight"])
    assert document["result"]["map"][10] == {
        "new": "layers.10.mlp.gate_up.weight", "op": "concat:0",
        "old": [f"layers.10.mlp.{n}_proj.weight" for n in ("gate", "up")],
    }  # fmt: skip
    remap("one.pth", "two.pth", [{"split": "layers.{i}.mlp.gate_up.weight", "into": names}])
    assert_bits(torch.load("two.pth"), state)
