"""`remap`: every tensor operation against torch, the way back to the last byte, and all that carries key names."""

from __future__ import annotations

import gc
import io
import json
import os
import random
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import FIXTURES, assert_identical, bits, torch_load
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import ckptool
from ckptool.core.checkpoint import Checkpoint
from ckptool.core.tensor import Span, Storage, TensorInfo, contiguous_stride
from ckptool.errors import CkptoolError, UnsupportedError
from ckptool.ops.remap import invert as op_invert

Saved = Callable[..., Path]
Run = Callable[..., tuple[int, str, str]]
State = dict[str, torch.Tensor]

PAIRS = Path(__file__).resolve().parents[3] / "shared" / "remap" / "pairs"


@pytest.fixture
def remap(run: Run) -> Callable[..., Any]:
    """Runs `remap` with rules from a file, without waiting for the disk; returns the JSON document."""

    def call(source: object, output: object, rules: Any, *options: object) -> Any:
        Path("rules.json").write_text(json.dumps(rules))
        code, out, err = run(
            "remap", source, "-o", output, "--rules", "rules.json", "--force", "--no-fsync", "--json", *options
        )
        assert (code, err) == (0, ""), err
        return json.loads(out)

    return call


def content() -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in Path().rglob("*") if path.is_file()}


def as_ints(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory under an integer dtype of that size: what torch has no kernel for, it has for these."""
    if tensor.is_complex():
        return torch.view_as_real(tensor.resolve_conj()).view(torch.int32).contiguous().view(torch.int64).squeeze(-1)
    return tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def assert_bits(found: State, expected: State) -> None:
    """Keys in order, shapes and values to the bit; ``expected`` may be in the integers of `as_ints`."""
    assert list(found) == list(expected)
    for key, tensor in expected.items():
        assert tuple(found[key].shape) == tuple(tensor.shape), key
        assert bits(found[key]) == bits(tensor), key


# --- sources of every kind -------------------------------------------------------------------------------------------


def big_endian(raw: bytes, tensors: State) -> bytes:
    """What torch.save wrote, as a big-endian machine would have written it: every element reversed."""
    units: list[int] = []
    seen = set()
    for tensor in tensors.values():
        if tensor.untyped_storage()._cdata not in seen:
            seen.add(tensor.untyped_storage()._cdata)
            units.append(tensor.element_size() // (2 if tensor.is_complex() else 1))
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(raw)) as old, zipfile.ZipFile(buffer, "w") as new:
        for item in old.infolist():
            data = old.read(item)
            folder, _, name = item.filename.rpartition("/")
            if item.filename.endswith("byteorder"):
                data = b"big"
            elif folder.endswith("/data"):
                unit = units[int(name)]
                data = b"".join(data[i : i + unit][::-1] for i in range(0, len(data), unit))
            new.writestr(item.filename, data)
    return buffer.getvalue()


def deflated(raw: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(raw)) as old, zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as new:
        for item in old.infolist():
            new.writestr(item.filename, old.read(item))
    return buffer.getvalue()


def in_shards(folder: Path, tensors: State) -> Path:
    folder.mkdir()
    names = list(tensors)
    half = len(names) // 2
    weight_map = {}
    for number, part in enumerate((names[:half], names[half:]), 1):
        shard = f"model-{number:05}-of-00002.safetensors"
        save_file({name: tensors[name].contiguous() for name in part}, folder / shard, {"format": "pt"})
        weight_map.update(dict.fromkeys(part, shard))
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


CONTAINERS = ["pth", "legacy", "deflated", "big", "safetensors", "sharded"]


def put(kind: str, tensors: State) -> Path:
    """Writes tensors into one kind of container, with torch's or safetensors' own writer."""
    if kind == "safetensors":
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, "in.safetensors")
        return Path("in.safetensors")
    if kind == "sharded":
        return in_shards(Path("in_shards"), tensors)
    buffer = io.BytesIO()
    torch.save(tensors, buffer, _use_new_zipfile_serialization=kind != "legacy")
    raw = buffer.getvalue()
    raw = deflated(raw) if kind == "deflated" else big_endian(raw, tensors) if kind == "big" else raw
    Path("in.pth").write_bytes(raw)
    return Path("in.pth")


# --- every operation against torch -----------------------------------------------------------------------------------

SHAPES = {
    "w": (4, 6), "v": (4, 6), "box": (2, 3, 4), "qkv": (12, 4), "q": (4, 3), "k": (4, 3), "scalar": (),
    "none": (0, 6), "photo": (2, 3, 4, 5),
}  # fmt: skip
DTYPES = ["float32", "bfloat16", "float8_e4m3fn", "int64", "bool", "complex64"]

RULES: list[dict[str, Any]] = [
    {"transpose": "w"},
    {"cat": ["v", "w_none_such"], "into": "never"},
    {"permute": "box", "dims": [2, 0, 1]},
    {"transpose": "photo", "dims": [1, -1]},
    {"split": "qkv", "into": ["s0", "s1", "s2"]},
    {"split": "v", "into": ["v0", "v1", "v2"], "sizes": [1, 3, 2], "dim": 1},
    {"reshape": "none", "shape": [3, 0, 2]},
    {"reshape": "scalar", "shape": [1, -1]},
]


def made(dtype: torch.dtype, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Random bits, NaNs and all, of one dtype; every element another where there are enough values."""
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    raw = torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).squeeze(-1) if dtype.itemsize > 1 else raw.squeeze(-1).view(dtype)


def some(dtype: str) -> State:
    generator = torch.Generator().manual_seed(DTYPES.index(dtype) if dtype in DTYPES else 99)
    return {name: made(getattr(torch, dtype), shape, generator) for name, shape in SHAPES.items()}


def chunked(tensor: torch.Tensor, heads: int, parts: int, dim: int = 0) -> list[torch.Tensor]:
    """The layout that interleaves by head, taken apart with view and select."""
    shape = tensor.shape
    rest = shape[dim] // heads // parts
    view = tensor.reshape(*shape[:dim], heads, parts, rest, *shape[dim + 1 :])
    flat = (*shape[:dim], heads * rest, *shape[dim + 1 :])
    return [view.select(dim + 1, number).reshape(flat) for number in range(parts)]


def woven(tensors: list[torch.Tensor], heads: int, dim: int = 0) -> torch.Tensor:
    shape = tensors[0].shape
    split = [t.reshape(*shape[:dim], heads, 1, shape[dim] // heads, *shape[dim + 1 :]) for t in tensors]
    return torch.cat(split, dim + 1).reshape(*shape[:dim], shape[dim] * len(tensors), *shape[dim + 1 :])


def with_keys(state: State, old: list[str], new: State) -> State:
    """The state with new keys at the place of the old one that the rule names first."""
    result: State = {}
    for key, tensor in state.items():
        if key == old[0]:
            result.update(new)
        if key not in old:
            result[key] = tensor
    return result


Case = tuple[list[dict[str, Any]], list[str], Callable[[State], State]]
CASES: dict[str, Case] = {
    "transpose": ([{"transpose": "w"}], ["w"], lambda s: {"w": s["w"].t()}),
    "transpose of all with a glob": (
        [{"transpose": "re:^[wv]$"}], ["w"], lambda s: {"w": s["w"].t()}),
    "transpose of two dims of four": (
        [{"transpose": "photo", "dims": [1, -1]}], ["photo"], lambda s: {"photo": s["photo"].transpose(1, -1)}),
    "permute of three": (
        [{"permute": "box", "dims": [2, 0, 1]}], ["box"], lambda s: {"box": s["box"].permute(2, 0, 1)}),
    "permute of four": (
        [{"permute": "photo", "dims": [3, 2, 0, 1]}], ["photo"], lambda s: {"photo": s["photo"].permute(3, 2, 0, 1)}),
    "permute of nothing": ([{"transpose": "none"}], ["none"], lambda s: {"none": s["none"].t()}),
    "reshape": ([{"reshape": "box", "shape": [6, 4]}], ["box"], lambda s: {"box": s["box"].reshape(6, 4)}),
    "reshape with -1": (
        [{"reshape": "photo", "shape": [5, -1, 2]}], ["photo"], lambda s: {"photo": s["photo"].reshape(5, -1, 2)}),
    "reshape to 1-d": ([{"reshape": "w", "shape": [-1]}], ["w"], lambda s: {"w": s["w"].reshape(-1)}),
    "reshape of a scalar": (
        [{"reshape": "scalar", "shape": [1, -1]}], ["scalar"], lambda s: {"scalar": s["scalar"].reshape(1, 1)}),
    "reshape of nothing": (
        [{"reshape": "none", "shape": [3, 0, 2]}], ["none"], lambda s: {"none": s["none"].reshape(3, 0, 2)}),
    "split in equal parts": (
        [{"split": "qkv", "into": ["a", "b", "c"]}], ["qkv"],
        lambda s: dict(zip("abc", torch.chunk(s["qkv"], 3), strict=True))),
    "split by sizes": (
        [{"split": "qkv", "into": ["a", "b", "c"], "sizes": [7, 0, 5]}], ["qkv"],
        lambda s: dict(zip("abc", torch.split(s["qkv"], [7, 0, 5]), strict=True))),
    "split along dim 1": (
        [{"split": "w", "into": ["a", "b", "c"], "sizes": [1, 3, 2], "dim": 1}], ["w"],
        lambda s: dict(zip("abc", torch.split(s["w"], [1, 3, 2], 1), strict=True))),
    "split along the last of four": (
        [{"split": "photo", "into": ["a", "b"], "sizes": [2, 3], "dim": -1}], ["photo"],
        lambda s: dict(zip("ab", torch.split(s["photo"], [2, 3], -1), strict=True))),
    "split of nothing": (
        [{"split": "none", "into": ["a", "b"]}], ["none"], lambda s: {"a": s["none"], "b": s["none"]}),
    "cat along dim 0": (
        [{"cat": ["w", "v"], "into": "m"}], ["w", "v"], lambda s: {"m": torch.cat([s["w"], s["v"]])}),
    "cat in the order of the rule, not of the file": (
        [{"cat": ["v", "w"], "into": "m"}], ["v", "w"], lambda s: {"m": torch.cat([s["v"], s["w"]])}),
    "cat along dim 1": (
        [{"cat": ["w", "q", "v"], "into": "m", "dim": 1}], ["w", "q", "v"],
        lambda s: {"m": torch.cat([s["w"], s["q"], s["v"]], 1)}),
    "cat along the last": (
        [{"cat": ["w", "k"], "into": "m", "dim": -1}], ["w", "k"], lambda s: {"m": torch.cat([s["w"], s["k"]], -1)}),
    "cat with nothing": ([{"cat": ["none", "w"], "into": "m"}], ["none", "w"], lambda s: {"m": s["w"]}),
    "chunk": (
        [{"chunk": "qkv", "into": ["a", "b", "c"], "heads": 2}], ["qkv"],
        lambda s: dict(zip("abc", chunked(s["qkv"], 2, 3), strict=True))),
    "chunk along dim 1": (
        [{"chunk": "w", "into": ["a", "b"], "heads": 3, "dim": 1}], ["w"],
        lambda s: dict(zip("ab", chunked(s["w"], 3, 2, 1), strict=True))),
    "chunk of one head": (
        [{"chunk": "qkv", "into": ["a", "b"], "heads": 1}], ["qkv"],
        lambda s: dict(zip("ab", torch.chunk(s["qkv"], 2), strict=True))),
    "weave": (
        [{"weave": ["q", "k"], "into": "m", "heads": 2}], ["q", "k"], lambda s: {"m": woven([s["q"], s["k"]], 2)}),
    "weave along dim 1": (
        [{"weave": ["q", "k"], "into": "m", "heads": 3, "dim": -1}], ["q", "k"],
        lambda s: {"m": woven([s["q"], s["k"]], 3, 1)}),
    "transpose, then split": (
        [{"transpose": "w"}, {"split": "w", "into": ["a", "b"]}], ["w"],
        lambda s: dict(zip("ab", torch.chunk(s["w"].t(), 2), strict=True))),
    "split, transpose, rename, cat": (
        [{"split": "w", "into": ["a", "b"], "dim": 1}, {"transpose": "b"}, {"rename": "b", "to": "c"},
         {"transpose": "c"}, {"cat": ["c", "a"], "into": "w", "dim": 1}], ["w"],
        lambda s: {"w": torch.cat([s["w"][:, 3:], s["w"][:, :3]], 1)}),
    "reshape, permute, reshape": (
        [{"reshape": "qkv", "shape": [2, 3, 2, 4]}, {"permute": "qkv", "dims": [1, 0, 2, 3]},
         {"reshape": "qkv", "shape": [12, -1]}], ["qkv"],
        lambda s: {"qkv": s["qkv"].reshape(2, 3, 2, 4).permute(1, 0, 2, 3).reshape(12, 4)}),
    "chunk, then weave with more heads": (
        [{"chunk": "qkv", "into": ["a", "b", "c"], "heads": 2}, {"weave": ["c", "b", "a"], "into": "m", "heads": 4}],
        ["qkv"], lambda s: {"m": woven(chunked(s["qkv"], 2, 3)[::-1], 4)}),
    "permute of a permute of a slice": (
        [{"split": "box", "into": ["a", "b"], "dim": 2}, {"permute": "a", "dims": [1, 2, 0]},
         {"permute": "a", "dims": [1, 2, 0]}, {"drop": "b"}], ["box"],
        lambda s: {"a": s["box"][:, :, :2].permute(1, 2, 0).permute(1, 2, 0)}),
}  # fmt: skip


def expected_of(name: str, state: State) -> State:
    _, old, compute = CASES[name]
    if name == "transpose of all with a glob":
        return {**state, "w": state["w"].t(), "v": state["v"].t()}
    return with_keys(state, old, compute(state))


@pytest.mark.parametrize("name", CASES)
def test_an_operation_gives_what_torch_gives(name: str, remap: Callable[..., Any]) -> None:
    state = some("float32")
    remap(put("pth", state), "out.pth", CASES[name][0])
    found = torch.load("out.pth", weights_only=True)
    assert_bits(found, expected_of(name, state))
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    assert all(tensor.is_contiguous() for tensor in found.values())


EVERY_OPERATION = [
    {"transpose": "w"}, {"permute": "box", "dims": [2, 0, 1]}, {"reshape": "photo", "shape": [5, -1, 2]},
    {"chunk": "qkv", "into": ["h0", "h1", "h2"], "heads": 2},
    {"split": "v", "into": ["s0", "s1"], "sizes": [5, 1], "dim": 1},
    {"cat": ["q", "k"], "into": "both", "dim": 1}, {"reshape": "scalar", "shape": [1]}, {"transpose": "none"},
]  # fmt: skip


def all_at_once(state: State) -> State:
    h = chunked(state["qkv"], 2, 3)
    return {
        "w": state["w"].t(), "s0": state["v"][:, :5], "s1": state["v"][:, 5:], "box": state["box"].permute(2, 0, 1),
        "h0": h[0], "h1": h[1], "h2": h[2], "both": torch.cat([state["q"], state["k"]], 1),
        "scalar": state["scalar"].reshape(1), "none": state["none"].t(), "photo": state["photo"].reshape(5, -1, 2),
    }  # fmt: skip


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


def gpt2(layers: int = 2, width: int = 8) -> State:
    state: State = OrderedDict()
    for i in range(layers):
        state[f"h.{i}.attn.c_attn.weight"] = torch.randn(width, 3 * width)
        state[f"h.{i}.attn.c_attn.bias"] = torch.randn(3 * width)
        state[f"h.{i}.attn.c_proj.weight"] = torch.randn(width, width)
    return state


GPT2_APART = [
    {"transpose": "h.*.c_attn.weight"}, {"transpose": "*.c_proj.weight"},
    *[{"split": f"h.{{i}}.attn.c_attn.{leaf}", "into": [f"h.{{i}}.attn.{n}.{leaf}" for n in ("q", "k", "v")]}
      for leaf in ("weight", "bias")],
]  # fmt: skip
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


# --- the grammar of op -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rules", "ops"),
    [
        ([{"rename": "w", "to": "x"}], {"x": "rename", "v": "rename"}),
        ([{"transpose": "w"}], {"w": "transpose"}),
        ([{"permute": "w", "dims": [1, 0]}], {"w": "transpose"}),
        ([{"permute": "box", "dims": [2, 0, 1]}], {"box": "permute:2,0,1"}),
        ([{"transpose": "box", "dims": [0, 2]}], {"box": "permute:2,1,0"}),
        ([{"reshape": "box", "shape": [-1]}], {"box": "reshape"}),
        ([{"split": "qkv", "into": ["s0", "s1", "s2"]}],
         {"s0": "split:0:0/3", "s1": "split:0:1/3", "s2": "split:0:2/3"}),
        ([{"split": "w", "into": ["a", "b"], "dim": 1}], {"a": "split:1:0/2", "b": "split:1:1/2"}),
        ([{"split": "w", "into": ["a", "b"], "sizes": [1, 5], "dim": -1}], {"a": "slice:1:0:1", "b": "slice:1:1:6"}),
        ([{"cat": ["w", "v"], "into": "m"}], {"m": "concat:0"}),
        ([{"cat": ["w", "v"], "into": "m", "dim": -1}], {"m": "concat:1"}),
        ([{"transpose": "w"}, {"reshape": "w", "shape": [2, -1]}], {"w": "transpose;reshape"}),
        ([{"transpose": "w"}, {"transpose": "v"}, {"cat": ["w", "v"], "into": "m"}], {"m": "transpose;concat:0"}),
        ([{"chunk": "w", "into": ["a", "b"], "heads": 3, "dim": 1}], {"a": "reshape;split:2:0/2;reshape"}),
        ([{"weave": ["w", "v"], "into": "m", "heads": 2}], {"m": "reshape;concat:1;reshape"}),
        ([{"transpose": "w"}, {"rename": "w", "to": "z"}], {"z": "transpose"}),
    ],
)  # fmt: skip
def test_an_operation_is_spelled_in_the_grammar_of_the_benchmark(rules: Any, ops: dict[str, str], saved: Saved) -> None:
    path = saved({key: torch.zeros(shape) for key, shape in SHAPES.items()})
    rows = {row.new: row.op for row in ckptool.remap(path, rules)[1].map}
    assert {key: rows[key] for key in ops} == ops


def replayed(op: str, sources: list[torch.Tensor], shape: list[int]) -> torch.Tensor:
    """What the README of the benchmark says an ``op`` does, written with torch; the last reshape is to ``shape``."""
    for step in op.split(";"):
        name, *args = step.split(":")
        if "<" in step:
            sources, step = parted(step, sources, shape)
            name, *args = step.split(":")
        if name == "transpose":
            sources = [tensor.t() for tensor in sources]
        elif name == "permute":
            sources = [tensor.permute([int(axis) for axis in args[0].split(",")]) for tensor in sources]
        elif name == "reshape":
            assert len(sources) == 1
            sources = [sources[0].reshape(shape)]
        elif name == "split":
            number, parts = map(int, args[1].split("/"))
            sources = [sources[0].chunk(parts, int(args[0]))[number]]
        elif name == "slice":
            dim, start, stop = map(int, args)
            sources = [sources[0].narrow(dim, start, stop - start)]
        elif name == "concat":
            sources = [torch.cat(sources, int(args[0]))]
        else:
            assert name == "rename"
    assert len(sources) == 1
    return sources[0]


def parted(step: str, sources: list[torch.Tensor], shape: list[int]) -> tuple[list[torch.Tensor], str]:
    """What the brackets of ``concat:dim<a|b|..>`` make of the sources one by one, and the step without them."""
    outside, _, inside = step.partition("<")
    parts, depth = [""], 0
    for char in inside.removesuffix(">"):
        depth += (char == "<") - (char == ">")
        if char == "|" and not depth:
            parts.append("")
        else:
            parts[-1] += char
    made, left = [], list(sources)
    for part in parts:
        taken = part.count("|") + 1
        made.append(replayed(part if "<" in part else part.replace("+", ";"), left[:taken], shape))
        del left[:taken]
    assert not left
    return made, outside


@pytest.mark.parametrize(
    ("rules", "op"),
    [
        ([{"transpose": "k"}, {"transpose": "q"}, {"cat": ["k", "q"], "into": "m"}], "transpose;concat:0"),
        ([{"transpose": "w"}, {"split": "w", "into": ["a", "b"]}, {"cat": ["b", "a"], "into": "m"}],
         "concat:0<transpose+split:0:1/2|transpose+split:0:0/2>"),
        ([{"transpose": "w"}, {"transpose": "w"}, {"cat": ["w", "v"], "into": "m", "dim": 1}],
         "concat:1<transpose+transpose|rename>"),
        ([{"cat": ["w", "v"], "into": "wv"}, {"transpose": "qkv"}, {"transpose": "qkv"},
          {"split": "wv", "into": ["x", "y"], "dim": 1}, {"cat": ["x", "y"], "into": "m"}],
         "concat:0<concat:0<rename|rename>+split:1:0/2|concat:0<rename|rename>+split:1:1/2>"),
    ],
)  # fmt: skip
def test_an_op_says_of_each_input_of_a_cat_what_was_done_to_it(rules: Any, op: str, saved: Saved) -> None:
    state = some("float32")
    path = saved(state)
    changed, report = ckptool.remap(path, rules)
    row = next(row for row in report.map if row.new == "m")
    assert row.op == op
    found = changed.to_torch()["m"]
    if op.count("concat") < 3:
        assert bits(found) == bits(replayed(op, [state[key] for key in row.old], list(found.shape)))
    else:
        assert row.old == ["w", "v", "w", "v"]


@pytest.mark.parametrize(
    "rules",
    [
        [{"transpose": "w"}, {"split": "w", "into": ["a", "b", "c"]}, {"reshape": "c", "shape": [-1]}],
        [{"permute": "box", "dims": [1, 2, 0]}, {"split": "box", "into": ["a", "b"], "sizes": [1, 2]}],
        [{"transpose": "q"}, {"transpose": "k"}, {"cat": ["k", "q"], "into": "kq", "dim": 1}, {"transpose": "kq"}],
        [{"split": "photo", "into": ["a", "b"], "dim": 2}, {"permute": "a", "dims": [3, 1, 0, 2]}],
    ],
)
def test_an_op_says_enough_to_do_it_again(rules: Any, remap: Callable[..., Any]) -> None:
    state = some("float32")
    document = remap(put("pth", state), "out.pth", rules)
    found = torch.load("out.pth")
    again = {
        row["new"]: replayed(row["op"], [state[key] for key in row["old"]], list(found[row["new"]].shape))
        for row in document["result"]["map"]
    }
    assert_bits(found, again)


def test_the_op_of_a_cat_whose_inputs_came_about_differently_says_so(saved: Saved) -> None:
    path = saved({"w": torch.zeros(4, 4), "v": torch.zeros(4, 4)})
    one = ckptool.remap(path, [{"transpose": "w"}, {"cat": ["w", "v"], "into": "m"}])[1].map[0]
    two = ckptool.remap(path, [{"transpose": "w"}, {"transpose": "v"}, {"cat": ["w", "v"], "into": "m"}])[1].map[0]
    assert one.op != two.op


def in_memory(keys: list[dict[str, Any]]) -> Checkpoint:
    """A checkpoint of names and shapes only."""
    tree = {}
    for row in keys:
        shape = tuple(row["shape"])
        numel = 1
        for size in shape:
            numel *= size
        storage = Storage(Span("", 0, 4 * numel), "float32")
        tree[row["key"]] = TensorInfo("float32", shape, contiguous_stride(shape), 0, storage)
    return Checkpoint(tree)


def rules_of(pair: dict[str, Any]) -> list[dict[str, Any]]:
    """Rules that do what the mapping of a pair says, written from its names: every key once."""
    shapes = {row["key"]: row["shape"] for row in pair["target"]}
    rules: list[dict[str, Any]] = []
    used = {key for row in pair["mapping"] for key in row["source"]}
    rules += [{"drop": f"re:^{re_escape(row['key'])}$"} for row in pair["source"] if row["key"] not in used]
    pieces: dict[str, dict[int, str]] = {}
    for row in pair["mapping"]:
        new, op = f"NEW.{row['target']}", row["op"]
        if op.startswith("split:"):
            number, _ = op.split(":")[2].split("/")
            pieces.setdefault(row["source"][0], {})[int(number)] = new
        elif op.startswith("concat:"):
            rules.append({"cat": row["source"], "into": new, "dim": int(op.split(":")[1])})
        else:
            rules.append({"sub": f"^{re_escape(row['source'][0])}$", "by": new.replace("\\", "\\\\")})
            if op == "transpose":
                rules.append({"transpose": new})
            elif op == "reshape":
                rules.append({"reshape": new, "shape": shapes[row["target"]]})
    rules += [{"split": old, "into": [found[i] for i in sorted(found)]} for old, found in pieces.items()]
    return [*rules, {"strip_prefix": "NEW."}]


def re_escape(text: str) -> str:
    return text.replace(".", r"\.").replace("[", r"\[")


REAL = ["hf_gpt2__nanogpt", "timm_vit_base_patch16_224__hf_vit", "hf_swin__ms_swin_tiny", "tv_vgg16_bn__timm_vgg16_bn",
        "openai_clip_vit_b32__timm_vit_clip", "tf_bert_base__hf_bert_pretraining"]  # fmt: skip


@pytest.mark.parametrize("name", REAL)
def test_a_real_pair_is_mapped_with_the_very_ops_of_the_benchmark(name: str) -> None:
    path = PAIRS / f"{name}.json"
    if not path.exists():
        pytest.skip("the benchmark is not beside this repository")
    pair = json.loads(path.read_text())
    taken: set[str] = set()  # a tied source gives two targets; a rule gives one
    pair["mapping"] = [
        row for row in pair["mapping"]
        if row["op"].startswith("split") or not (taken & set(row["source"]) or taken.update(row["source"]))
    ]  # fmt: skip
    changed, report = ckptool.remap(in_memory(pair["source"]), rules_of(pair))
    found = {row.new: (row.old, row.op) for row in report.map}
    shapes = {row["key"]: row["shape"] for row in pair["target"]}
    for row in pair["mapping"]:
        assert found[row["target"]] == (row["source"], row["op"])
        assert list(changed.state_dict()[row["target"]].shape) == shapes[row["target"]]
    assert len(found) == len(pair["mapping"])


# --- the way back ----------------------------------------------------------------------------------------------------


class Wrapped(nn.Module):
    """As Lightning wraps a model: `_metadata` has an entry for the root, for ``model`` and for what is below."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x)


def go_and_return(remap: Callable[..., Any], run: Run, source: Path, rules: Any, suffix: str = ".pth") -> Path:
    remap(source, f"there{suffix}", rules, "--save-map", "map.json")
    code, _, err = run(
        "remap", f"there{suffix}", "-o", f"back{suffix}", "--invert", "map.json", "--force", "--no-fsync"
    )
    assert (code, err) == (0, "")
    return Path(f"back{suffix}")


@pytest.mark.parametrize("name", CASES)
def test_any_operation_is_undone_by_its_map(name: str, remap: Callable[..., Any], run: Run) -> None:
    rules = [rule for rule in CASES[name][0] if "drop" not in rule]
    source = put("pth", some("float32"))
    assert_identical(torch.load(source), torch.load(go_and_return(remap, run, source, rules)))


def test_a_cat_of_a_key_with_itself_is_refused(run: Run) -> None:
    source = put("pth", some("float32"))
    Path("rules.json").write_text('[{"cat": ["w", "w"], "into": "m"}]')
    code, _, err = run("remap", source, "-o", "out.pth", "--rules", "rules.json")
    assert code == 2
    assert "with itself" in err


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_operations_on_any_dtype_are_undone(dtype: str, suffix: str, remap: Callable[..., Any], run: Run) -> None:
    state = some(dtype)
    source = put("pth" if suffix == ".pth" else "safetensors", state)
    back = go_and_return(remap, run, source, EVERY_OPERATION, suffix)
    found = torch.load(back) if suffix == ".pth" else load_file(back)
    assert {key: (t.dtype, t.shape, bits(t)) for key, t in found.items()} == {
        key: (t.dtype, t.shape, bits(t)) for key, t in state.items()
    }
    assert suffix != ".pth" or list(found) == list(state)


class Author:
    """Writes rules at random that fit a given state, and knows nothing of what they will do."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def state(self) -> State:
        torch.manual_seed(self.random.randrange(1 << 30))
        dtypes = [torch.float32, torch.bfloat16, torch.int64, torch.float8_e5m2, torch.complex64, torch.bool]
        state: State = OrderedDict()
        for i in range(self.random.randint(2, 4)):
            dtype = self.random.choice(dtypes)
            generator = torch.Generator().manual_seed(i)
            for name in ("attn.qkv.weight", "attn.proj.weight", "mlp.gate", "mlp.up", "norm.scale"):
                shape = {"attn.qkv.weight": (12, 4), "norm.scale": (4,)}.get(name, (4, 6))
                state[f"model.blocks.{i}.{name}"] = made(dtype, shape, generator)
        for name in ("attn.qkv.weight", "attn.proj.weight", "mlp.gate", "mlp.up", "norm.scale"):
            state[f"model.blocks.77.{name}"] = state[f"model.blocks.0.{name}"].detach()  # a layer used twice
        state["model.head.w"] = torch.randn(4, 4)
        state["model.alone"] = state["model.head.w"].detach()  # the same memory, another object
        state["step"] = torch.tensor(3)
        state["model.nothing"] = torch.empty(0, 4)
        return state

    def rules(self) -> list[dict[str, Any]]:
        pick = self.random
        names = ["q", "k", "v"]
        fused = pick.choice([
            {"split": "model.blocks.{i}.attn.qkv.weight", "into": [f"model.blocks.{{i}}.attn.{n}" for n in names]},
            {"chunk": "model.blocks.{i}.attn.qkv.weight", "heads": 2,
             "into": [f"model.blocks.{{i}}.attn.{n}" for n in names]},
            {"reshape": "*.qkv.weight", "shape": [3, -1]},
            {"split": "model.blocks.{i}.attn.qkv.weight", "sizes": [1, 8, 3],
             "into": [f"model.blocks.{{i}}.attn.{n}" for n in names]},
        ])  # fmt: skip
        mlp = pick.choice([
            {"cat": ["model.blocks.{i}.mlp.up", "model.blocks.{i}.mlp.gate"], "into": "model.blocks.{i}.mlp.both",
             "dim": pick.choice([0, 1, -1])},
            {"weave": ["model.blocks.{i}.mlp.gate", "model.blocks.{i}.mlp.up"], "into": "model.blocks.{i}.mlp.both",
             "heads": 2},
            {"transpose": "*.mlp.*"},
        ])  # fmt: skip
        proj = pick.choice([{"permute": "*.proj.weight", "dims": [1, 0]}, {"reshape": "*.proj.weight", "shape": [-1]}])
        both = r"re:^model\.(head\.w|alone)$"
        head = pick.choice([{"transpose": both}, {"reshape": both, "shape": [2, 2, -1]}])
        shaping = [fused, mlp, proj, head]
        pick.shuffle(shaping)
        naming = [
            {"strip_prefix": "model."}, {"rename": "blocks.{i}", "to": "h.{i}.block"},
            {"sub": r"\.(\d+)\.", "by": r".layer\1."}, {"add_prefix": "net."}, {"rename": "attn", "to": "a.b"},
        ]  # fmt: skip
        return [*shaping, *naming[: pick.randint(1, len(naming))]]


@pytest.mark.parametrize("seed", range(20))
def test_random_rules_are_undone_to_the_last_byte(seed: int, remap: Callable[..., Any], run: Run, saved: Saved) -> None:
    author = Author(seed)
    state = author.state()
    state._metadata = OrderedDict({"": {"version": 1}, "model": {"version": 1}, "model.head": {"version": 2}})
    source = saved({"epoch": seed, "state_dict": state})
    back = go_and_return(remap, run, source, author.rules())
    there, expected = torch.load("there.pth"), torch.load(source)
    assert list(there["state_dict"]) != list(expected["state_dict"])
    found = torch.load(back)
    assert_identical(expected, found)
    assert len(tied_groups(expected["state_dict"])) == 6


def test_a_tie_that_an_operation_on_one_side_broke_comes_back(
    remap: Callable[..., Any], run: Run, saved: Saved
) -> None:
    w = torch.randn(4, 4)
    source = saved({"emb": w, "head": w})
    back = go_and_return(remap, run, source, [{"transpose": "head"}])
    assert_identical(torch.load(source), torch.load(back))


def test_a_tie_comes_back_as_one_object_only_where_it_was_one(
    remap: Callable[..., Any], run: Run, saved: Saved
) -> None:
    w = torch.randn(4, 4)
    source = saved({"emb": w, "same": w, "other": w.detach(), "part": w[:2], "alone": torch.randn(4, 4)})
    rules = [{"transpose": "re:^(same|alone)$"}, {"reshape": "other", "shape": [2, 8]},
             {"cat": ["alone", "emb"], "into": "both"}]  # fmt: skip
    back = go_and_return(remap, run, source, rules)
    found = torch.load(back)
    assert found["emb"] is found["same"]
    assert found["other"] is not found["emb"]
    assert found["other"].data_ptr() == found["emb"].data_ptr()
    assert_bits(found, torch.load(source))
    assert found["alone"].data_ptr() != found["emb"].data_ptr()


def test_a_tie_that_no_operation_broke_is_not_recorded(saved: Saved) -> None:
    w = torch.randn(4, 4)
    path = saved({"emb": w, "head": w, "x": w[:2]})
    for rules in ([{"transpose": "re:emb|head"}], [{"add_prefix": "a."}], [{"transpose": "x"}]):
        assert ckptool.remap(path, rules)[1].saved["ties"] == []
    one, both = [{"transpose": "emb"}], [{"cat": ["emb", "head"], "into": "m"}]
    assert all(ckptool.remap(path, rules)[1].saved["ties"] == [[["emb", "head"]]] for rules in (one, both))


def test_a_tie_is_made_again_only_where_the_bytes_are_the_same(saved: Saved) -> None:
    w = torch.randn(4, 4)
    changed, report = ckptool.remap(saved({"emb": w, "head": w}), [{"transpose": "head"}])
    ckptool.save(changed, "there.pth")
    there = ckptool.open("there.pth")
    asked = []

    def differ(one: TensorInfo, other: TensorInfo) -> bool:
        asked.append((one.shape, other.shape))
        return False

    back, undone = op_invert(there, report.saved, same=differ)
    assert back.shared() == []
    assert asked == [((4, 4), (4, 4))]
    assert undone.notes == []
    back, undone = op_invert(there, report.saved)
    assert back.shared() == [["emb", "head"]]
    assert undone.notes == ["tied again, as the map says: head = emb"]


def test_metadata_of_modules_comes_back_too(remap: Callable[..., Any], run: Run, saved: Saved) -> None:
    source = saved(Wrapped().state_dict())
    for rules in (
        [{"add_prefix": "net."}],
        [{"rename": "model", "to": "m"}],
        [{"rename": "model.{i}", "to": "l{i}.x"}],
    ):
        back = go_and_return(remap, run, source, rules)
        assert_identical(torch.load(source), torch.load(back))


def test_metadata_comes_back_where_a_stripped_prefix_was_a_module_itself(
    remap: Callable[..., Any], run: Run, saved: Saved
) -> None:
    source = saved(Wrapped().state_dict())
    back = go_and_return(remap, run, source, [{"strip_prefix": "model."}])
    assert_identical(torch.load(source), torch.load(back))


def test_a_map_restores_order_where_operations_moved_keys(remap: Callable[..., Any], run: Run, saved: Saved) -> None:
    state = {"z": torch.ones(2, 2), "a": torch.zeros(2, 2), "m": torch.ones(1), "b": torch.zeros(2, 2)}
    source = saved(state)
    back = go_and_return(remap, run, source, [{"cat": ["b", "z"], "into": "bz"}, {"rename": "m", "to": "zz"}])
    assert list(torch.load("there.pth")) == ["a", "zz", "bz"]
    assert list(torch.load(back)) == ["z", "a", "m", "b"]


def test_keys_whose_names_are_swapped_stay_where_they_stood(remap: Callable[..., Any], saved: Saved) -> None:
    rules = [{"rename": "a", "to": "t"}, {"rename": "b", "to": "a"}, {"rename": "t", "to": "b"}]
    remap(saved({"a": torch.tensor(1), "b": torch.tensor(2)}), "out.pth", rules)
    assert {key: int(value) for key, value in torch.load("out.pth").items()} == {"b": 1, "a": 2}
    assert list(torch.load("out.pth")) == ["b", "a"]


def test_a_map_is_a_file_of_names_that_people_can_read(remap: Callable[..., Any], saved: Saved) -> None:
    document = remap(saved({"a.w": torch.ones(2, 4), "b": torch.ones(1)}), "out.pth",
                     [{"rename": "a", "to": "c"}, {"transpose": "c.w"}], "--save-map", "map.json")  # fmt: skip
    text = Path("map.json").read_text()
    saved_map = json.loads(text)
    assert saved_map["map"] == document["result"]["map"]
    assert saved_map["map"] == [{"new": "c.w", "old": ["a.w"], "op": "transpose"},
                                {"new": "b", "old": ["b"], "op": "rename"}]  # fmt: skip
    assert str(Path.cwd()) not in text


def test_a_map_undoes_what_another_tool_has_rewritten(remap: Callable[..., Any], run: Run, saved: Saved) -> None:
    state = gpt2()
    remap(saved(state), "there.pth", GPT2_APART, "--save-map", "map.json")
    trained = {key: tensor * 2 for key, tensor in torch.load("there.pth").items()}
    save_file({key: trained[key].contiguous() for key in reversed(trained)}, "trained.safetensors")
    code, _, err = run("remap", "trained.safetensors", "-o", "back.pth", "--invert", "map.json")
    assert (code, err) == (0, "")
    assert_bits(torch.load("back.pth"), {key: tensor * 2 for key, tensor in state.items()})


def test_the_library_inverts_with_its_own_report(saved: Saved) -> None:
    source = saved(gpt2())
    changed, report = ckptool.remap(source, GPT2_APART)
    back, undone = ckptool.invert(changed, json.loads(json.dumps(report.saved)))
    ckptool.save(back, "back.pth")
    assert_identical(torch.load(source), torch.load("back.pth"))
    assert {row.new for row in undone.map} == set(gpt2())


def test_a_map_with_drops_cannot_be_inverted_and_says_so(
    remap: Callable[..., Any], refused: Callable[..., str], saved: Saved
) -> None:
    remap(saved({"a": torch.ones(1), "b": torch.ones(1)}), "there.pth", [{"drop": "b"}], "--save-map", "map.json")
    assert json.loads(Path("map.json").read_text())["dropped"] == ["b"]
    err = refused("remap", "there.pth", "-o", "back.pth", "--invert", "map.json")
    assert "drop" in err


def edited(change: Callable[[Any], Any]) -> None:
    document = json.loads(Path("map.json").read_text())
    changed = change(document)
    Path("map.json").write_text(json.dumps(document if changed is None else changed))


EDITS: dict[str, Callable[[Any], Any]] = {
    "another document": lambda m: {"a": "b"},
    "a list": lambda m: [],
    "a number": lambda m: 3,
    "another schema": lambda m: m.update(schema=2),
    "no steps": lambda m: m.pop("steps") and None,
    "no keys": lambda m: m.pop("keys") and None,
    "no map": lambda m: m.pop("map") and None,
    "steps of text": lambda m: m.update(steps=["x"]),
    "steps of numbers": lambda m: m.update(steps=[[1]]),
    "a step without old": lambda m: m["steps"][0][0].pop("old") and None,
    "a step without op": lambda m: m["steps"][0][0].pop("op") and None,
    "an unknown op": lambda m: m["steps"][0][0].update(op="melt"),
    "rows without new": lambda m: m.update(map=[{"old": ["a"]}]),
    "rows of text": lambda m: m.update(map=["a"]),
    "a key that is not there": lambda m: m["steps"][0][0].update(new=["elsewhere"]),
    "args of text": lambda m: m["steps"][0][0].update(args="x"),
    "dims of another rank": lambda m: m["steps"][0][0].update(args={"dims": [2, 0, 1]}),
    "dims that are none": lambda m: m["steps"][0][0].update(args={"dims": [0, 0]}),
    "args of another op": lambda m: m["steps"][0][0].update(args={"dim": 0}),
    "a shape that does not hold": lambda m: m["steps"][1][0]["args"].update({"from": [5, 5]}),
    "no shape": lambda m: m["steps"][1][0].update(args={}),
    "sizes that do not add up": lambda m: m["steps"][2][0]["args"].update(sizes=[1, 1]),
    "a dim that is not there": lambda m: m["steps"][2][0]["args"].update(dim=7),
    "modules as a list": lambda m: m.update(modules=["x"]),
    "modules by name": lambda m: m.update(modules={"a": "b"}),
    "modules by numbers": lambda m: m.update(modules={"a": [1]}),
    "versions as a list": lambda m: m.update(versions=["x"]),
    "versions that are no dict": lambda m: m.update(versions={"a": 1}),
    "versions of lists": lambda m: m.update(versions={"a": {"version": [1]}}),
    "ties as text": lambda m: m.update(ties="wv"),
    "ties of text": lambda m: m.update(ties=["wv"]),
    "ties of numbers": lambda m: m.update(ties=[[[1]]]),
    "ties as nothing": lambda m: m.update(ties=None),
    "schema as a truth": lambda m: m.update(schema=True),
    "shapes as a list": lambda m: m.update(shapes=[]),
    "shapes of text": lambda m: m["shapes"].update(w="32"),
    "shapes of halves": lambda m: m["shapes"].update(w=[3.0, 2.0]),
    "a negative shape": lambda m: m["shapes"].update(w=[-3, -2]),
    "keys of numbers": lambda m: m.update(keys=[1, 2]),
    "a key that no step brings back": lambda m: m["keys"].append("never"),
    "a key used twice": lambda m: m["steps"][0].append(m["steps"][0][0]),
    "no names at all": lambda m: m["steps"][0][0].update(old=[], new=[]),
    "names that are a text": lambda m: m["steps"][3][0].update(new="p2"),
    "dims that are true": lambda m: m["steps"][0][0].update(args={"dims": [True, False]}),
    "dims that are large": lambda m: m["steps"][0][0].update(args={"dims": [0, 10**30]}),
    "a shape of a thousand dims": lambda m: m["steps"][1][0]["args"].update({"from": [6, *[1] * 2000]}),
    "a shape beyond any tensor": lambda m: m["steps"][1][0]["args"].update({"from": [0, 10**30]}),
    "negative sizes": lambda m: m["steps"][2][0]["args"].update(sizes=[-1, 5]),
    "sizes as a number": lambda m: m["steps"][2][0]["args"].update(sizes=2),
    "a negative dim": lambda m: m["steps"][2][0]["args"].update(dim=-1),
    "heads of none": lambda m: m["steps"][2][0].update(op="chunk", args={"dim": 0, "heads": 0, "parts": 2}),
    "parts without end": lambda m: m["steps"][2][0].update(op="chunk", args={"dim": 0, "heads": 1, "parts": 10**9}),
    "heads that do not divide": lambda m: m["steps"][2][0].update(op="chunk", args={"dim": 0, "heads": 3, "parts": 2}),
    "a drop that keeps": lambda m: m["steps"][3][0].update(op="drop"),
    "keys as a number": lambda m: m.update(keys=3),
    "steps as a dict": lambda m: m.update(steps={}),
    "a batch as a dict": lambda m: m.update(steps=[{}]),
    "renames of unequal length": lambda m: m["steps"][3][0].update(old=["p", "r"], new=["p2"]),
}
WRITTEN_BY = [{"transpose": "w"}, {"reshape": "v", "shape": [-1]}, {"split": "u", "into": ["u0", "u1"]},
              {"rename": "p", "to": "p2"}]  # fmt: skip


@pytest.mark.parametrize("name", [name for name in EDITS if name not in ("no map", "rows without new", "rows of text")])
def test_a_map_that_was_edited_is_one_line_and_writes_nothing(
    name: str, remap: Callable[..., Any], refused: Callable[..., str], saved: Saved
) -> None:
    state = {"w": torch.zeros(2, 3), "v": torch.zeros(2, 3), "u": torch.zeros(4), "p": torch.zeros(1)}
    remap(saved(state), "there.pth", WRITTEN_BY, "--save-map", "map.json")
    edited(EDITS[name])
    refused("remap", "there.pth", "-o", "back.pth", "--invert", "map.json")


def test_a_map_of_another_checkpoint_is_one_line_that_names_keys(
    remap: Callable[..., Any], refused: Callable[..., str], saved: Saved
) -> None:
    remap(
        saved({"a": torch.ones(1), "b": torch.ones(1)}), "there.pth", [{"add_prefix": "x."}], "--save-map", "map.json"
    )
    err = refused("remap", FIXTURES / "tied.pth", "-o", "back.pth", "--invert", "map.json")
    assert "x.a" in err
    assert "x.b" in err
    Path("map.txt").write_text("no map")
    refused("remap", "there.pth", "-o", "back.pth", "--invert", "map.txt")
    refused("remap", "there.pth", "-o", "back.pth", "--invert", "absent.json")


@pytest.mark.parametrize("rules", [[{"transpose": "w"}], [{"reshape": "w", "shape": [-1]}],
                                   [{"split": "w", "into": ["a", "b"]}],
                                   [{"chunk": "w", "into": ["a", "b"], "heads": 2}]])  # fmt: skip
def test_a_map_for_tensors_of_other_shapes_is_one_line(
    rules: Any, remap: Callable[..., Any], refused: Callable[..., str], saved: Saved
) -> None:
    remap(saved({"w": torch.ones(4, 6)}), "there.pth", rules, "--save-map", "map.json")
    keys = list(torch.load("there.pth"))
    other = saved({key: torch.ones(5, 7, 3) if len(keys) == 1 else torch.ones(()) for key in keys}, "other.pth")
    refused("remap", other, "-o", "back.pth", "--invert", "map.json")


def test_invert_stands_alone(remap: Callable[..., Any], refused: Callable[..., str], saved: Saved) -> None:
    remap(saved({"a": torch.ones(1)}), "there.pth", [{"rename": "a", "to": "b"}], "--save-map", "map.json")
    assert "--invert" in refused("remap", "there.pth", "-o", "o.pth", "--invert", "map.json", "--rename", "b=a")


# --- what carries names follows --------------------------------------------------------------------------------------


def test_metadata_of_modules_follows_their_names(remap: Callable[..., Any], saved: Saved) -> None:
    model = Wrapped()
    remap(saved(model.state_dict()), "out.pth", [{"rename": "model.{i}", "to": "net.layer{i}"}])
    expected = {"": {"version": 1}, "model": {"version": 1}, "net.layer0": {"version": 1}, "net.layer1": {"version": 2},
                "net.layer2": {"version": 1}}  # fmt: skip
    assert dict(torch.load("out.pth")._metadata) == expected


def test_metadata_of_the_root_gets_the_prefix_that_the_root_gets(remap: Callable[..., Any], saved: Saved) -> None:
    inner = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    outer = nn.Module()
    outer.model = inner
    remap(saved(inner.state_dict()), "out.pth", [{"add_prefix": "model."}])
    found, expected = torch.load("out.pth"), outer.state_dict()
    assert list(found) == list(expected)
    assert {name: found._metadata[name] for name in found._metadata} == {
        name: entry for name, entry in expected._metadata.items() if name
    }
    remap("out.pth", "back.pth", [{"strip_prefix": "model."}])
    assert_identical(torch.load("back.pth"), inner.state_dict())
    outer.load_state_dict(found, strict=True)


def test_a_module_takes_what_was_stripped_and_knows_its_versions(remap: Callable[..., Any], saved: Saved) -> None:
    model = Wrapped()
    model.model[1].running_mean.fill_(3)
    remap(saved(model.state_dict()), "out.pth", [{"strip_prefix": "model."}])
    found = torch.load("out.pth")
    assert dict(found._metadata) == dict(model.model.state_dict()._metadata)
    fresh = Wrapped().model
    fresh.load_state_dict(found, strict=True)
    assert fresh[1].running_mean.tolist() == [3.0] * 4


def test_metadata_follows_names_that_a_table_spells_out(remap: Callable[..., Any], saved: Saved) -> None:
    model = nn.Sequential(OrderedDict(bn=nn.BatchNorm1d(2)))
    state = model.state_dict()
    remap(saved(state), "out.pth", {key: key.replace("bn.", "norm.") for key in state})
    assert dict(torch.load("out.pth")._metadata) == {"": {"version": 1}, "norm": {"version": 2}}


METADATA: dict[str, tuple[Any, dict[str, str]]] = {
    "a leaf of another name": ([{"sub": "weight$", "by": "kernel"}], {}),
    "all leaves of another name, in another place": (
        [{"sub": r"^head\.(weight|bias)$", "by": r"out.\1_"}], {"head": "out"}),
    "a table": ({"head.weight": "out.weight", "head.bias": "out.bias"}, {"head": "out"}),
    "a rename of whole names": (
        [{"rename": f"head.{leaf}", "to": f"out.{leaf}"} for leaf in ("weight", "bias")], {"head": "out"}),
    "a module without keys goes with the one above it": (
        [{"rename": "body", "to": "trunk.main"}],
        {"body": "trunk.main", "body.0": "trunk.main.0", "body.1": "trunk.main.1", "body.2": "trunk.main.2"}),
    "all under a prefix": (
        [{"add_prefix": "net."}],
        {"": "net", "body": "net.body", "body.0": "net.body.0", "body.1": "net.body.1", "body.2": "net.body.2",
         "head": "net.head"}),
    "a capture": ([{"rename": "body.{i}", "to": "b{i}"}], {"body.0": "b0", "body.1": "b1"}),
    "a rule that has the last word on some leaves": ([{"rename": "body.0.bias", "to": "shift"}], {}),
    "two that swap": ([{"rename": "head", "to": "t"}, {"rename": "body.0", "to": "head"},
                       {"rename": "t", "to": "body.0"}], {"head": "body.0", "body.0": "head"}),
}  # fmt: skip


@pytest.mark.parametrize("name", METADATA)
def test_metadata_goes_where_the_keys_go_and_comes_back(
    name: str, remap: Callable[..., Any], run: Run, saved: Saved
) -> None:
    model = nn.Module()
    model.body = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.ReLU())
    model.head = nn.Linear(2, 2)
    rules, expected = METADATA[name]
    source = saved(model.state_dict())
    back = go_and_return(remap, run, source, rules)
    before, after = torch.load(source)._metadata, torch.load("there.pth")._metadata
    assert list(after.items()) == [(expected.get(path, path), entry) for path, entry in before.items()]
    assert_identical(torch.load(source), torch.load(back))


def test_metadata_of_a_module_that_is_taken_apart_goes_to_every_part(
    remap: Callable[..., Any], run: Run, saved: Saved
) -> None:
    model = nn.Sequential(OrderedDict(qkv=nn.Linear(2, 6), norm=nn.BatchNorm1d(6)))
    source = saved(model.state_dict())
    rules = [{"split": f"qkv.{leaf}", "into": [f"{n}.{leaf}" for n in "qkv"]} for leaf in ("weight", "bias")]
    back = go_and_return(remap, run, source, rules)
    assert list(torch.load("there.pth")._metadata.items()) == [
        ("", {"version": 1}), *((n, {"version": 1}) for n in "qkv"), ("norm", {"version": 2})
    ]  # fmt: skip
    assert_identical(torch.load(source), torch.load(back))


def test_metadata_that_another_tool_added_stays_on_the_way_back(
    remap: Callable[..., Any], run: Run, saved: Saved
) -> None:
    remap(saved(Wrapped().state_dict()), "there.pth", [{"strip_prefix": "model."}], "--save-map", "map.json")
    state = torch.load("there.pth")
    state._metadata["1"]["version"] = 7
    state._metadata["added"] = {"version": 5}
    torch.save(state, "there.pth")
    assert run("remap", "there.pth", "-o", "back.pth", "--invert", "map.json")[0] == 0
    assert list(torch.load("back.pth")._metadata.items()) == [
        ("", {"version": 1}), ("model", {"version": 1}), ("model.0", {"version": 1}), ("model.1", {"version": 7}),
        ("model.2", {"version": 1}), ("added", {"version": 5}),
    ]  # fmt: skip


def test_a_whole_model_becomes_the_state_dict_that_torch_gives(remap: Callable[..., Any], saved: Saved) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    remap(saved(model), "out.pth", [{"rename": "0", "to": "fc"}])
    expected = model.state_dict()
    renamed = OrderedDict((key.replace("0.", "fc."), tensor) for key, tensor in expected.items())
    renamed._metadata = OrderedDict({"": {"version": 1}, "fc": {"version": 1}, "1": {"version": 2}})
    assert_identical(renamed, torch.load("out.pth"))


def test_the_garbage_collector_runs_again_whatever_happens(saved: Saved) -> None:
    path = saved({"a": torch.ones(2), "b": torch.ones(2)})
    ckptool.remap(path, [{"add_prefix": "x."}])
    assert gc.isenabled()
    with pytest.raises(CkptoolError):
        ckptool.remap(path, [{"rename": "a", "to": "b"}])
    assert gc.isenabled()


def test_dropped_counters_do_not_leave_a_promise_that_they_are_there(remap: Callable[..., Any], saved: Saved) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    remap(saved(model.state_dict()), "out.pth", [{"drop": "*.num_batches_tracked"}])
    fresh = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    fresh.load_state_dict(torch.load("out.pth"), strict=True)  # version 2 would make it miss the counter


def test_no_record_of_ties_speaks_of_old_names(remap: Callable[..., Any], saved: Saved) -> None:
    save_file({"emb.weight": torch.randn(3, 2)}, "in.safetensors", {"head.weight": "emb.weight", "author": "someone"})
    remap("in.safetensors", "out.safetensors", [{"rename": "emb", "to": "wte"}, {"rename": "head", "to": "lm_head"}])
    with safe_open("out.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "author": "someone", "lm_head.weight": "wte.weight"}
        assert list(file.keys()) == ["wte.weight"]
    remap("in.safetensors", "one.safetensors", [{"drop": "head.*"}])
    with safe_open("one.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "author": "someone"}


def test_a_tie_whose_names_swap_is_recorded_the_right_way_round(remap: Callable[..., Any], run: Run) -> None:
    save_file({"a": torch.ones(2)}, "in.safetensors", {"b": "a"})
    remap("in.safetensors", "out.safetensors", [{"rename": "a", "to": "z"}])
    assert run("convert", "out.safetensors", "-o", "out.pth")[0] == 0
    loaded = torch.load("out.pth")
    assert list(loaded) == ["z", "b"]
    assert loaded["z"].data_ptr() == loaded["b"].data_ptr()


def test_the_index_of_shards_follows(remap: Callable[..., Any]) -> None:
    remap(FIXTURES / "sharded", "out", [{"strip_prefix": "model."}, {"rename": "lm_head", "to": "head"}])
    index = json.loads(Path("out/model.safetensors.index.json").read_text()) if Path(
        "out/model.safetensors.index.json").exists() else None  # fmt: skip
    tensors: State = {}
    for shard in Path("out").glob("*.safetensors"):
        tensors |= load_file(shard)
        with safe_open(shard, "pt") as file:
            recorded = dict(file.metadata())
    assert {name for name in tensors if name.startswith(("model.", "lm_head"))} == set()
    record = index["metadata"] if index else recorded
    assert record["head.weight"] == "embed.weight"
    assert not {name for name in record if name.startswith(("model.", "lm_head"))}
    assert index is None or set(index["weight_map"]) == set(tensors)


def named_optimizer(model: nn.Module) -> dict[str, Any]:
    """An optimizer state keyed by names, as torch's FSDP utilities and DCP write it."""
    state = {name: {"step": torch.tensor(1.0), "exp_avg": torch.randn_like(p)} for name, p in model.named_parameters()}
    return {"state": state, "param_groups": [{"lr": 0.1, "betas": (0.9, 0.999), "params": list(state)}]}


def test_an_optimizer_that_knows_names_follows(remap: Callable[..., Any], saved: Saved) -> None:
    model = Wrapped()
    tree = {"model": model.state_dict(), "optimizer": named_optimizer(model)}
    remap(saved(tree), "out.pth", [{"rename": "model.{i}", "to": "layer{i}"}])
    found = torch.load("out.pth")
    old = {name.replace("model.", "layer"): entry for name, entry in tree["optimizer"]["state"].items()}
    assert_identical(found["optimizer"]["state"], old)
    assert found["optimizer"]["param_groups"][0]["params"] == list(old)
    assert set(old) <= set(found["model"])


def test_param_names_of_an_optimizer_by_position_follow(remap: Callable[..., Any], saved: Saved) -> None:
    model = Wrapped()
    optimizer = torch.optim.AdamW(list(model.named_parameters()), lr=0.1)
    model(torch.randn(2, 3, 6, 6)).sum().backward()
    optimizer.step()
    before = optimizer.state_dict()
    assert "param_names" in before["param_groups"][0]
    document = remap(
        saved({"state_dict": model.state_dict(), "optimizer": before}), "out.pth", [{"strip_prefix": "model."}]
    )
    found = torch.load("out.pth")["optimizer"]
    names = [name.removeprefix("model.") for name, _ in model.named_parameters()]
    assert found["param_groups"][0]["param_names"] == names
    assert_identical(found["state"], before["state"])
    assert not any("position" in note for note in document["notes"])


def test_an_optimizer_by_position_is_left_alone_and_keys_dropped_are_said(remap: Callable[..., Any]) -> None:
    source = FIXTURES / "resnet_nested.pth"
    before = torch_load(source)
    document = remap(source, "out.pth", [{"rename": "layer{i}", "to": "stage.{i}"}])
    found = torch_load(Path("out.pth"))
    assert_identical(before["optimizer"], found["optimizer"])
    assert not any("optimizer" in note for note in document["notes"])
    document = remap(source, "out.pth", [{"drop": "fc.*"}])
    assert any("optimizer" in note and "position" in note for note in document["notes"])
    assert_identical(before["optimizer"], torch_load(Path("out.pth"))["optimizer"])
    document = remap(source, "out.pth", [{"split": "fc.weight", "into": ["fc.a", "fc.b"]}])
    assert any("optimizer" in note for note in document["notes"])


def test_a_note_does_not_say_position_of_an_optimizer_by_name(remap: Callable[..., Any], saved: Saved) -> None:
    model = Wrapped()
    tree = {"model": model.state_dict(), "optimizer": named_optimizer(model)}
    document = remap(saved(tree), "out.pth", [{"drop": "model.2.*"}])
    assert not any("position" in note for note in document["notes"])


def test_everything_beside_the_weights_is_the_same(remap: Callable[..., Any]) -> None:
    source = FIXTURES / "lightning.ckpt"
    remap(source, "out.ckpt", [{"strip_prefix": "model."}])
    old, new = torch_load(source), torch_load(Path("out.ckpt"))
    assert list(new["state_dict"]) == [key.removeprefix("model.") for key in old["state_dict"]]
    for tree in (old, new):
        tree["state_dict"] = None
    assert_identical(old, new)


def test_a_whole_model_becomes_its_renamed_state_dict(remap: Callable[..., Any]) -> None:
    from make import resnet

    remap(FIXTURES / "resnet_module.pth", "out.pth", [{"rename": "layer{i}", "to": "stage{i}"}])
    found = torch.load("out.pth", weights_only=True)
    expected = resnet(4, 20).state_dict()
    assert list(found) == [key.replace("layer", "stage") for key in expected]
    assert {name.replace("stage", "layer") for name in found._metadata} == set(expected._metadata)


def test_a_root_by_name_is_the_only_one_that_changes(remap: Callable[..., Any]) -> None:
    remap(FIXTURES / "ema.pth", "out.pth", [{"add_prefix": "x."}], "--root", "state_dict_ema")
    old, new = torch_load(FIXTURES / "ema.pth"), torch_load(Path("out.pth"))
    assert list(new["state_dict_ema"]) == [f"x.{key}" for key in old["state_dict_ema"]]
    assert_identical(old["state_dict"], new["state_dict"])


# --- ties ------------------------------------------------------------------------------------------------------------


def tied_groups(state: State) -> set[frozenset[str]]:
    groups: dict[Any, set[str]] = {}
    for key, tensor in state.items():
        if tensor.numel():
            groups.setdefault((tensor.data_ptr(), tensor.shape, tensor.stride()), set()).add(key)
    return {frozenset(keys) for keys in groups.values() if len(keys) > 1}


def test_ties_stay_through_renames_and_operations(remap: Callable[..., Any], saved: Saved) -> None:
    w, bias = torch.randn(6, 4), torch.randn(6)
    state = {"emb.w": w, "head.w": w, "a.b": bias, "c.b": bias.detach(), "twin": w.clone()}
    remap(saved(state), "out.pth", [
        {"rename": "emb", "to": "wte"}, {"transpose": "wte.w"}, {"transpose": "head.w"},
        {"split": "{x}.b", "into": ["{x}.b0", "{x}.b1"]}, {"transpose": "twin"},
    ])  # fmt: skip
    found = torch.load("out.pth")
    assert tied_groups(found) == {frozenset(pair) for pair in (("wte.w", "head.w"), ("a.b0", "c.b0"), ("a.b1", "c.b1"))}
    assert torch.equal(found["wte.w"], w.t())
    assert not tied_groups({key: found[key] for key in ("wte.w", "twin")})


def test_a_tie_of_which_one_side_is_reshaped_becomes_two_tensors(remap: Callable[..., Any], saved: Saved) -> None:
    w = torch.randn(6, 4)
    remap(saved({"emb": w, "head": w}), "out.pth", [{"transpose": "head"}])
    found = torch.load("out.pth")
    assert_bits(found, {"emb": w, "head": w.t()})
    remap("saved.pth", "out.safetensors", [{"transpose": "head"}])
    assert_bits(load_file("out.safetensors"), {"emb": w, "head": w.t()})


def test_tied_inputs_give_tied_outputs_of_a_cat(remap: Callable[..., Any], saved: Saved) -> None:
    q, k = torch.randn(2, 4), torch.randn(2, 4)
    state = {f"{side}.{name}": tensor for side in "ab" for name, tensor in (("q", q), ("k", k))}
    remap(saved(state), "out.pth", [{"cat": ["{s}.q", "{s}.k"], "into": "{s}.qk"}])
    found = torch.load("out.pth")
    assert list(found) == ["a.qk", "b.qk"]
    assert tied_groups(found) == {frozenset(("a.qk", "b.qk"))}
    assert torch.equal(found["b.qk"], torch.cat([q, k]))


def test_tied_fixture_keeps_its_ties_under_other_names(remap: Callable[..., Any]) -> None:
    source = torch.load(FIXTURES / "tied.pth")
    for suffix in ("pth", "safetensors"):
        remap(FIXTURES / "tied.pth", f"out.{suffix}", [{"add_prefix": "x."}])
        ckptool.save(ckptool.open(f"out.{suffix}"), "back.pth", force=True)
        found = torch.load("back.pth")
        assert tied_groups(found) == {frozenset(f"x.{key}" for key in group) for group in tied_groups(source)}
        assert list(found) == [f"x.{key}" for key in source]


# --- a pure rename copies bytes --------------------------------------------------------------------------------------


def records(path: Path | str) -> dict[str, tuple[int, bytes]]:
    with zipfile.ZipFile(path) as archive:
        return {item.filename.split("/", 1)[1]: (item.CRC, archive.read(item)) for item in archive.infolist()}


def test_a_pure_rename_keeps_the_records_and_their_checksums(remap: Callable[..., Any]) -> None:
    for name in ("resnet_old.pth", "resnet_nested.pth", "tied.pth"):
        remap(FIXTURES / name, "out.pth", [{"add_prefix": "x."}])
        old, new = records(FIXTURES / name), records("out.pth")
        for record in old:
            if record.startswith("data/"):
                assert new[record] == old[record], record
        with zipfile.ZipFile("out.pth") as archive:
            assert archive.testzip() is None
        assert_identical(torch_load(Path("out.pth")), torch_load(Path("out.pth"), mmap=True))


def test_a_pure_rename_reuses_the_stored_checksums(remap: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    import zlib

    lengths: list[int] = []
    crc32 = zlib.crc32

    def counting(data: Any, start: int = 0) -> int:
        lengths.append(len(data))
        return crc32(data, start)

    path = put("pth", {"w": torch.randn(100_000), "v": torch.randn(100_000)})
    monkeypatch.setattr("ckptool.io.zip_write.zlib.crc32", counting)
    remap(path, "out.pth", [{"add_prefix": "x."}], "--no-verify")
    assert lengths
    assert sum(lengths) < 10_000


def test_a_pure_rename_neither_decodes_nor_needs_torch(
    remap: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: Any) -> Any:
        raise AssertionError("a rename gathers, casts or computes")

    for name in ("_gathered", "_derived", "import_torch"):
        monkeypatch.setattr(f"ckptool.values.blocks.{name}", never)
    for source, suffix in (("resnet_old.pth", "pth"), ("resnet_old.safetensors", "safetensors"), ("tied.pth", "pth")):
        remap(FIXTURES / source, f"out.{suffix}", [{"add_prefix": "x."}])


def test_a_pure_rename_of_safetensors_is_a_new_header_and_the_same_data(remap: Callable[..., Any]) -> None:
    source = FIXTURES / "resnet_old.safetensors"
    remap(source, "out.safetensors", [{"add_prefix": "a.longer.prefix."}])
    blobs = []
    for path in (source, Path("out.safetensors")):
        raw = path.read_bytes()
        blobs.append(raw[8 + int.from_bytes(raw[:8], "little") :])
    assert blobs[0] == blobs[1]
    old, new = load_file(source), load_file("out.safetensors")
    assert {f"a.longer.prefix.{key}": bits(tensor) for key, tensor in old.items()} == {
        key: bits(tensor) for key, tensor in new.items()
    }


# --- formats and places ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "output", "expected"),
    [
        ("resnet_old.pth", "out", "torch-zip"), ("resnet_old.safetensors", "out", "safetensors"),
        ("resnet_legacy.pth", "out", "torch-legacy"), ("resnet_legacy.pth", "out.pth", "torch-legacy"),
        ("sharded", "out", "hf-sharded"), ("sharded_bin", "out", "hf-sharded"), ("tar_2016.pth", "out", "torch-zip"),
        ("resnet_old.pth", "out.safetensors", "safetensors"), ("resnet_old.safetensors", "out.pth", "torch-zip"),
        ("resnet_legacy.pth", "out.safetensors", "safetensors"), ("resnet_old.pth", "out.v2", "torch-zip"),
        ("lightning.ckpt", "out.ckpt", "torch-zip"), ("sharded", "out.safetensors", "safetensors"),
    ],
)  # fmt: skip
def test_the_format_is_the_inputs_unless_the_name_says_another(
    source: str, output: str, expected: str, remap: Callable[..., Any]
) -> None:
    document = remap(FIXTURES / source, output, [{"sub": "^", "by": "x."}])
    assert document["result"]["output"] == output
    found = ckptool.open(output)
    assert found.format == expected or (expected == "hf-sharded" and Path(output).is_dir())
    if expected == "torch-legacy":
        assert not zipfile.is_zipfile(output)
    if expected.startswith("torch"):
        assert all(key.startswith("x.") for key in ckptool.open(output).state_dict())
        torch_load(Path(output))


def test_the_output_is_never_an_input(refused: Callable[..., str], saved: Saved) -> None:
    path = saved({"a": torch.ones(2)})
    assert "in-place" in refused("remap", path, "-o", path, "--rename", "a=b")
    assert "in-place" in refused("remap", path, "-o", path, "--rename", "a=b", "--force")
    os.link(path, "link.pth")
    Path("soft.pth").symlink_to(path)
    for name in ("link.pth", "soft.pth", f"../{Path.cwd().name}/saved.pth"):
        refused("remap", path, "-o", name, "--rename", "a=b", "--force")
    refused("remap", path, "-o", "out.pth", "--rename", "a=b", "--report", path)
    refused("remap", path, "-o", "out.pth", "--rename", "a=b", "--save-map", path, "--force")
    refused("remap", path, "-o", "out.pth", "--rename", "a=b", "--save-map", "out.pth")
    refused("remap", path, "-o", "absent/out.pth", "--rename", "a=b")


def test_in_place_replaces_the_file_whole(run: Run, saved: Saved) -> None:
    path = saved({"a": torch.ones(2), "b": torch.zeros(3)})
    inode = path.stat().st_ino
    held = path.open("rb")
    before = path.read_bytes()
    assert run("remap", path, "-o", path, "--rename", "a=c", "--in-place")[0] == 0
    assert list(torch.load(path)) == ["c", "b"]
    assert path.stat().st_ino != inode
    assert held.read() == before, "a reader that has the old file open still sees all of it"
    held.close()
    assert sorted(os.listdir()) == ["saved.pth"]


def test_in_place_that_fails_leaves_the_file_as_it_was(run: Run, saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    from ckptool.io.output import Output

    path = saved({"a": torch.ones(1000)})
    before = path.read_bytes()
    write = Output.write

    def full(self: Output, data: Any) -> None:
        if len(data) > 3000:
            raise ckptool.errors.OutputError("the disk is full", self.path)
        write(self, data)

    monkeypatch.setattr(Output, "write", full)
    code, _, err = run("remap", path, "-o", path, "--rename", "a=c", "--in-place")
    assert (code, "disk is full" in err) == (2, True)
    assert path.read_bytes() == before
    assert os.listdir() == ["saved.pth"]


def test_an_existing_output_is_kept_unless_forced(run: Run, refused: Callable[..., str], saved: Saved) -> None:
    path = saved({"a": torch.ones(2)})
    for name in ("out.pth", "map.json", "report.json"):
        Path(name).write_text("mine")
    options = ["--rename", "a=b"]
    assert "--force" in refused("remap", path, "-o", "out.pth", *options)
    refused("remap", path, "-o", "new.pth", *options, "--save-map", "map.json")
    refused("remap", path, "-o", "new.pth", *options, "--report", "report.json")
    args = ["-o", "out.pth", *options, "--save-map", "map.json", "--report", "report.json", "--force"]
    assert run("remap", path, *args)[0] == 0
    assert list(torch.load("out.pth")) == ["b"]
    assert json.loads(Path("map.json").read_text())["map"][0]["new"] == "b"


def test_a_dry_run_tells_the_same_and_writes_nothing(run: Run, saved: Saved, refused: Callable[..., str]) -> None:
    path = saved({"a": torch.ones(2, 2), "b": torch.ones(1)})
    args = ["--rename", "a=c", "--drop", "b", "--json", "--save-map", "map.json", "--report", "r.json"]
    code, out, err = run("remap", path, "-o", "out.pth", *args, "--dry-run")
    assert (code, err, sorted(os.listdir())) == (0, "", ["r.json", "saved.pth"])
    os.remove("r.json")
    dry = json.loads(out)["result"]
    wet = json.loads(run("remap", path, "-o", "out.pth", *args)[1])["result"]
    assert {**dry, "output": None} == {**wet, "output": None}
    assert wet["output"] == "out.pth"
    os.remove("out.pth")
    code, out, _ = run("remap", path, "--rename", "a=c", "--dry-run")
    assert (code, "dry run" in out) == (0, True)
    refused("remap", path, "--rename", "a=b", "--dry-run")
    refused("remap", path, "--rename", "a=c")


def test_the_json_is_the_contract_and_the_report_is_the_json(run: Run, saved: Saved) -> None:
    path = saved({"module.a": torch.ones(2, 4), "module.b": torch.ones(1), "module.c": torch.ones(1)})
    args = ["--preset", "ddp", "--drop", "c", "--rename", "b=d", "--rename", "no=x", "--allow-unused"]
    code, out, err = run("remap", path, "-o", "out.pth", *args, "--report", "r.json", "--json")
    assert (code, err) == (0, "")
    document = json.loads(out)
    assert json.loads(Path("r.json").read_text()) == document
    assert document.keys() == {"schema", "command", "result", "notes"}
    assert (document["schema"], document["command"]) == (1, "remap")
    result = document["result"]
    assert result["map"] == [
        {"new": "a", "old": ["module.a"], "op": "rename"}, {"new": "d", "old": ["module.b"], "op": "rename"},
    ]  # fmt: skip
    assert result["dropped"] == ["module.c"]
    assert len(result["unused_rules"]) == 1
    assert "no" in result["unused_rules"][0]
    assert result["output"] == "out.pth"
    assert result.keys() >= {"map", "dropped", "unused_rules", "output"}
    code, out, _ = run("remap", path, "-o", "out2.pth", *args)
    for word in ("2 keys", "2 renamed", "1 dropped", "module.c", "unused", "out2.pth"):
        assert word in out


def test_names_in_the_output_cannot_reach_the_terminal(run: Run, saved: Saved) -> None:
    path = saved({"a\x1b[31m\n": torch.ones(1), "[red]b": torch.ones(1)})
    code, out, err = run("remap", path, "-o", "out.pth", "--sub", "s/31/32/", "--sub", "s/red/bold/")
    assert (code, err) == (0, "")
    assert "\x1b" not in out
    assert "[red]b" in out
    assert "[bold]b" in out


def test_left_out_is_said_where_the_format_holds_weights_only(run: Run) -> None:
    code, out, _ = run("remap", FIXTURES / "resnet_nested.pth", "-o", "out.safetensors", "--add-prefix", "x.")
    assert code == 0
    assert all(word in out for word in ("left out", "optimizer", "epoch", "args"))


@pytest.mark.parametrize("rules", [[{"add_prefix": "x."}], [{"reshape": "w", "shape": [-1]}]])
def test_a_written_file_is_compared_with_what_was_meant(
    rules: Any, run: Run, saved: Saved, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ckptool.io.output import Output

    path = saved({"w": torch.arange(1000.0).view(10, 100)})
    Path("rules.json").write_text(json.dumps(rules))
    write = Output.write

    def flipped(self: Output, data: Any) -> None:
        write(self, bytes([*data[:-1], data[-1] ^ 1]) if len(data) >= 4000 else data)

    monkeypatch.setattr(Output, "write", flipped)
    code, _, err = run("remap", path, "-o", "out.pth", "--rules", "rules.json", "--verify")
    assert (code, err.count("\n")) == (2, 1)
    assert sorted(os.listdir()) == ["rules.json", "saved.pth"]
    assert run("remap", path, "-o", "out.pth", "--rules", "rules.json", "--no-verify")[0] == 0


def test_an_interrupt_leaves_nothing(run: Run, saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    from ckptool.io.output import Output

    path = saved({"w": torch.arange(1000.0)})
    write = Output.write

    def interrupted(self: Output, data: Any) -> None:
        if len(data) >= 4000:
            raise KeyboardInterrupt
        write(self, data)

    monkeypatch.setattr(Output, "write", interrupted)
    for output in ("out.pth", "out.safetensors", "out.npz"):
        code, out, err = run("remap", path, "-o", output, "--add-prefix", "x.", "--save-map", "m.json", "--report", "r")
        assert (code, out, err.removeprefix("ckptool: interrupted\n")) == (130, "", "")
        assert os.listdir() == ["saved.pth"]


def test_map_location_rewrites_device_tags(remap: Callable[..., Any], saved: Saved) -> None:
    with zipfile.ZipFile(saved({"w": torch.ones(2)})) as old, zipfile.ZipFile("cuda.pth", "w") as new:
        for item in old.infolist():
            data = old.read(item)
            if item.filename.endswith("data.pkl"):
                data = data.replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:1")
            new.writestr(item.filename, data)
    assert ckptool.open("cuda.pth").state_dict()["w"].location == "cuda:1"
    remap("cuda.pth", "kept.pth", [{"add_prefix": "x."}])
    assert ckptool.open("kept.pth").state_dict()["x.w"].location == "cuda:1"
    remap("cuda.pth", "cpu.pth", [{"add_prefix": "x."}, {"reshape": "x.w", "shape": [2, 1]}], "--map-location", "cpu")
    assert torch.load("cpu.pth")["x.w"].device == torch.device("cpu")
    remap("cuda.pth", "other.pth", [{"add_prefix": "x."}], "--map-location", "cuda:1=cuda:0")
    assert ckptool.open("other.pth").state_dict()["x.w"].location == "cuda:0"


def test_two_runs_give_the_same_bytes(remap: Callable[..., Any], saved: Saved) -> None:
    path = saved(gpt2())
    for suffix in ("pth", "safetensors"):
        for name in ("one", "two"):
            remap(path, f"{name}.{suffix}", GPT2_APART, "--save-map", f"{name}.json")
        assert Path(f"one.{suffix}").read_bytes() == Path(f"two.{suffix}").read_bytes()
    assert Path("one.json").read_bytes() == Path("two.json").read_bytes()


def test_a_broken_set_of_shards_is_no_ground_to_build_on(refused: Callable[..., str]) -> None:
    refused("remap", FIXTURES / "sharded_broken", "-o", "out", "--add-prefix", "x.")


# --- many keys -------------------------------------------------------------------------------------------------------


def lines_run(job: Callable[[], Any]) -> int:
    """How many lines of ckptool a job runs: a measure of its steps that no busy machine changes."""
    count = 0
    package = str(Path(ckptool.__file__).parent)

    def trace(frame: Any, event: str, arg: Any) -> Any:
        nonlocal count
        if not frame.f_code.co_filename.startswith(package):
            return None
        count += event == "line"
        return trace

    old = sys.gettrace()
    sys.settrace(trace)
    try:
        job()
    finally:
        sys.settrace(old)
    return count


def many(number: int) -> Checkpoint:
    kinds = {"q": [4, 4], "gate": [4, 2], "up": [4, 2], "norm": [4]}
    return in_memory([{"key": f"module.layers.{i}.{kind}.weight", "shape": shape}
                      for i in range(number // 4) for kind, shape in kinds.items()])  # fmt: skip


MANY_RULES: list[dict[str, Any]] = [
    {"strip_prefix": "module."}, {"rename": "layers.{i}", "to": "h.{i}"}, {"sub": r"^h\.", "by": "net.h."},
    {"transpose": "*.q.weight"}, {"drop": "*.norm.weight"},
    {"cat": ["net.h.{i}.gate.weight", "net.h.{i}.up.weight"], "into": "net.h.{i}.both.weight", "dim": 1},
    {"split": "net.h.{i}.q.weight", "into": ["net.h.{i}.q0", "net.h.{i}.q1"]},
]  # fmt: skip


def test_steps_grow_with_the_keys_and_not_with_their_square() -> None:
    small, large = many(200), many(2000)
    few = lines_run(lambda: ckptool.remap(small, MANY_RULES))
    lot = lines_run(lambda: ckptool.remap(large, MANY_RULES))
    assert lot < 11 * few


def test_the_way_back_grows_with_the_keys_too() -> None:
    undo = []
    for number in (200, 2000):
        kept = [rule for rule in MANY_RULES if "drop" not in rule]
        changed, report = ckptool.remap(many(number), kept)
        undo.append(lines_run(lambda changed=changed, report=report: ckptool.invert(changed, report.saved)))
    assert undo[1] < 11 * undo[0]


def test_a_table_of_names_costs_no_more_than_the_names_and_the_keys() -> None:
    steps = []
    for number in (20, 200):
        checkpoint = many(number)
        table = {key: key.removeprefix("module.") for key in checkpoint.state_dict()}
        steps.append(lines_run(lambda checkpoint=checkpoint, table=table: ckptool.remap(checkpoint, table)))
    assert steps[1] < 20 * steps[0]


def test_many_keys_are_renamed_split_and_put_together() -> None:
    changed, report = ckptool.remap(many(5_000), MANY_RULES)
    keys = list(changed.state_dict())
    assert len(keys) == 3_750
    assert keys[:3] == ["net.h.0.q0", "net.h.0.q1", "net.h.0.both.weight"]
    assert len(report.dropped) == 1_250
