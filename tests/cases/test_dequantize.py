"""Weights of few bits and their scales: not parted by a cast, nor by a selection without a note; `--dequantize`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import Run, Saved, load, seed_torch
from safetensors.torch import load_file, save_file

import ckptool
from ckptool.errors import LossError
from ckptool.ops.scales import scaled_weights, with_doubtful
from ckptool.values import blocks

F8, BF16 = torch.float8_e4m3fn, torch.bfloat16
Tensor = torch.Tensor


def numbers(*shape: int, dtype: torch.dtype = F8) -> Tensor:
    seed_torch(sum(shape))
    if dtype == torch.int8:
        return torch.randint(-127, 128, shape, dtype=dtype)
    return (torch.randn(shape) * 100).clamp(-200, 200).to(dtype)


def scales(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    seed_torch(1 + sum(shape))
    return (torch.rand(shape) * 1e-3 + 1e-5).to(dtype)


def blocked(weight: Tensor, scale: Tensor, size: int) -> Tensor:
    """Multiplies by scales for square blocks of the last two dimensions, as DeepSeek's `weight_dequant` does."""
    whole = scale.float().repeat_interleave(size, -2).repeat_interleave(size, -1)
    return weight.float() * whole[..., : weight.shape[-2], : weight.shape[-1]]


@pytest.fixture
def fp8() -> dict[str, Tensor]:
    """A layer as DeepSeek writes it."""
    seed_torch(0)
    w = torch.randn(256, 256) * 0.02
    s = w.abs().max() / 448
    state = {
        "model.layers.0.q.weight": (w / s).to(F8), "model.layers.0.q.weight_scale_inv": s.reshape(1, 1).repeat(2, 2),
        "model.norm.weight": torch.ones(256, dtype=BF16),
    }  # fmt: skip
    save_file(state, "fp8.safetensors", {"format": "pt"})
    return state


Q, Q_SCALE = "model.layers.0.q.weight", "model.layers.0.q.weight_scale_inv"


def test_a_cast_does_not_part_a_weight_from_its_scale(fp8: Any, refused: Callable[..., str]) -> None:
    for dtype in ("bf16", "float32", "fp16", "fp8"):  # to its own dtype the scale alone would be cast
        line = refused("convert", "fp8.safetensors", "--dtype", dtype, "-o", "out.safetensors")
        assert Q in line
        assert Q_SCALE in line
        assert "--dequantize" in line
        assert "--keep" in line
    refused("convert", "fp8.safetensors", "--dtype", "bf16", "--keep", "*scale_inv", "-o", "out.safetensors")
    refused("convert", "fp8.safetensors", "--dtype", "bf16", "-o", "out.safetensors", "--dry-run")
    with pytest.raises(LossError, match="part weights"):
        ckptool.convert("fp8.safetensors", "out.safetensors", dtype="bf16")


def test_dequantize_multiplies_and_drops_the_scale(fp8: dict[str, Tensor], run: Run) -> None:
    code, out, err = run("convert", "fp8.safetensors", "--dtype", "bf16", "--dequantize", "-o", "out.safetensors")
    assert (code, err) == (0, "")
    assert "dequantized  1 tensor" in out
    assert Q_SCALE in out
    found = load_file("out.safetensors")
    assert set(found) == {Q, "model.norm.weight"}
    assert torch.equal(found[Q], blocked(fp8[Q], fp8[Q_SCALE], 128).to(BF16))
    assert found[Q].abs().max() < 0.1
    assert torch.equal(found["model.norm.weight"], fp8["model.norm.weight"])
    report = ckptool.convert("fp8.safetensors", "out.pth", dequantize=True)
    assert (report.dequantized, report.left_out, report.cast) == ([Q], [Q_SCALE], [])
    assert torch.equal(load("out.pth")[Q], blocked(fp8[Q], fp8[Q_SCALE], 128))  # float32, and the norm as it was
    assert load("out.pth")["model.norm.weight"].dtype == BF16


def test_keep_leaves_a_weight_with_its_scale(fp8: dict[str, Tensor], run: Run) -> None:
    for pattern in ("*q.weight", "*.q.*"):
        assert run("convert", "fp8.safetensors", "--dtype", "f32", "--keep", pattern, "-o", "o.pth", "--force")[0] == 0
        found = load("o.pth")
        assert (found[Q].dtype, found[Q_SCALE].dtype) == (F8, torch.float32)
        assert torch.equal(found[Q_SCALE], fp8[Q_SCALE])
        assert found["model.norm.weight"].dtype == torch.float32
    assert ckptool.convert("fp8.safetensors", "kept.pth", dtype="bf16", keep=Q).cast == []


# --- layouts ---------------------------------------------------------------------------------------------------------

LAYOUTS: list[tuple[tuple[int, ...], tuple[int, ...], Callable[[Tensor, Tensor], Tensor]]] = [
    ((40, 24), (), lambda w, s: w * s),
    ((40, 24), (1,), lambda w, s: w * s),
    ((40, 24), (1, 1), lambda w, s: w * s),
    ((24,), (1,), lambda w, s: w * s),
    ((40, 24), (40, 1), lambda w, s: w * s),
    ((40, 24), (40,), lambda w, s: w * s[:, None]),
    ((40, 24), (1, 24), lambda w, s: w * s),
    ((8, 3, 5, 5), (8,), lambda w, s: w * s[:, None, None, None]),
    ((8, 3, 5, 5), (8, 1, 1, 1), lambda w, s: w * s),
    ((256, 384), (2, 3), lambda w, s: blocked(w, s, 128)),
    ((200, 300), (2, 3), lambda w, s: blocked(w, s, 128)),
    ((576, 130), (5, 2), lambda w, s: blocked(w, s, 128)),
    ((64, 300), (1, 3), lambda w, s: blocked(w, s, 128)),
    ((300, 64), (3, 1), lambda w, s: blocked(w, s, 128)),
    ((64, 96), (2, 3), lambda w, s: blocked(w, s, 32)),
    ((40, 96), (40, 3), lambda w, s: w * s.repeat_interleave(32, 1)),
    ((3, 200, 260), (3, 2, 3), lambda w, s: blocked(w, s, 128)),
    ((3, 40, 24), (3,), lambda w, s: w * s[:, None, None]),
    ((3, 40, 24), (3, 40, 1), lambda w, s: w * s),
    ((3, 40, 24), (3, 1, 24), lambda w, s: w * s),
    ((3, 40, 64), (3, 40, 2), lambda w, s: w * s.repeat_interleave(32, 2)),
    ((3, 40, 24), (1, 40, 1), lambda w, s: w * s),
]


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize(("shape", "scaled", "oracle"), LAYOUTS, ids=lambda one: str(one) if type(one) is tuple else "")
def test_layouts_that_shapes_settle(
    shape: Any, scaled: Any, oracle: Any, small: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if small:  # blocks that end within rows and within blocks of scales
        plain = blocks.storage_blocks
        cut = 37

        def pieces(*args: Any) -> Any:
            for block in plain(*args):
                yield from (block[start : start + cut] for start in range(0, len(block), cut))

        monkeypatch.setattr(blocks, "storage_blocks", pieces)
    weight, scale = numbers(*shape), scales(*scaled)
    save_file({"l.weight": weight, "l.weight_scale": scale}, "in.safetensors")
    for dtype in (BF16,) if small else (torch.float32, BF16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        ckptool.convert("in.safetensors", "out.pth", dtype=name, dequantize=True, verify=False, force=True)
        found = load("out.pth")
        assert list(found) == ["l.weight"]
        assert torch.equal(found["l.weight"], oracle(weight.float(), scale).to(dtype))


@pytest.mark.parametrize(
    ("weight_dtype", "scale_dtype"),
    [
        (torch.float8_e5m2, torch.float32), (torch.float8_e4m3fnuz, torch.float32), (torch.int8, torch.float32),
        (torch.int8, torch.float16), (F8, BF16), (F8, torch.float8_e8m0fnu),
    ],
)  # fmt: skip
def test_dtypes_of_weights_and_scales(weight_dtype: torch.dtype, scale_dtype: torch.dtype) -> None:
    weight, scale = numbers(40, 64, dtype=weight_dtype), scales(40, 2, dtype=scale_dtype)
    save_file({"l.weight": weight, "l.scale": scale}, "in.safetensors")
    ckptool.convert("in.safetensors", "out.safetensors", dtype="bfloat16", dequantize=True)
    expected = weight.float() * scale.float().repeat_interleave(32, 1)
    assert torch.equal(load_file("out.safetensors")["l.weight"], expected.to(BF16))


NAMES = [
    ("q.weight", "q.weight_scale_inv"), ("q.weight", "q.weight_scale"), ("q.weight", "q.scale_weight"),
    ("q.weight", "q.scale"), ("experts.w1", "experts.w1_scale"), ("weight", "weight_scale"), ("w1", "w1_scale_inv"),
    ("mlp.experts.gate_up_proj", "mlp.experts.gate_up_proj_scale"), ("q.weight", "q.weight.scale"),
    ("q.weight", "q.weight_scales"), ("a/b.weight", "a/b.weight_scale"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "scale"), NAMES)
def test_names_of_scales_by_family(key: str, scale: str, refused: Callable[..., str]) -> None:
    state = {key: numbers(40, 24), scale: scales(40, 1), "logit_scale": torch.ones(()), "b.norm.scale": torch.ones(3)}
    save_file(state, "in.safetensors")
    assert scale in refused("convert", "in.safetensors", "--dtype", "bf16", "-o", "out.safetensors")
    report = ckptool.convert("in.safetensors", "out.safetensors", dtype="bf16", dequantize=True)
    found = load_file("out.safetensors")
    assert (report.dequantized, report.left_out) == ([key], [scale])
    assert set(found) == {key, "logit_scale", "b.norm.scale"}
    assert torch.equal(found[key], (state[key].float() * state[scale]).to(BF16))


def test_scales_of_activations_go_with_the_weight(run: Run) -> None:
    state = {
        "scaled_fp8": torch.zeros(2, dtype=F8), "q.weight": numbers(8, 4), "q.scale_weight": scales(1),
        "q.scale_input": scales(1), "q.bias": torch.ones(8), "k.weight": numbers(8, 4), "k.weight_scale": scales(),
        "k.input_scale": scales(),
    }  # fmt: skip
    save_file(state, "in.safetensors")
    out = run("convert", "in.safetensors", "--dtype", "bf16", "--dequantize", "-o", "o.safetensors", "--json")[1]
    result = json.loads(out)["result"][0]
    assert set(result["left_out"]) == {
        "scaled_fp8", "q.scale_weight", "q.scale_input", "k.weight_scale", "k.input_scale"
    }  # fmt: skip
    assert set(load_file("o.safetensors")) == {"q.weight", "q.bias", "k.weight"}
    assert run("convert", "in.safetensors", "--dtype", "bf16", "--keep", "*.weight", "-o", "kept.safetensors")[0] == 0
    kept = load_file("kept.safetensors")
    assert {key for key in state if kept[key].dtype == state[key].dtype} == {*state} - {"q.bias"}


# --- what shapes and names do not settle -----------------------------------------------------------------------------

GPTQ = {"q.qweight": torch.ones(4, 8, dtype=torch.int32), "q.qzeros": torch.ones(1, 1, dtype=torch.int32),
        "q.scales": torch.ones(1, 8), "q.g_idx": torch.ones(32, dtype=torch.int32)}  # fmt: skip
UNSETTLED: dict[str, dict[str, Tensor]] = {
    "a shape that does not fit": {"l.weight": numbers(40, 24), "l.weight_scale": scales(3)},
    "a shape turned round": {"l.weight": numbers(256, 512), "l.weight_scale_inv": scales(4, 2)},
    "rows or columns": {"l.weight": numbers(24, 24), "l.weight_scale": scales(24)},
    "columns": {"l.weight": numbers(40, 24), "l.weight_scale": scales(24)},
    "blocks of 50 or of 64": {"l.weight": numbers(100, 100), "l.weight_scale_inv": scales(2, 2)},
    "too many dimensions": {"l.weight": numbers(8, 4), "l.weight_scale": scales(2, 4, 4)},
    "two scales": {"l.weight": numbers(8, 4), "l.weight_scale": scales(8, 1), "l.weight_scale_2": scales()},
    "a zero point": {"l.weight": numbers(8, 4, dtype=torch.int8), "l.weight_scale": scales(8, 1),
                     "l.weight_zero_point": scales(8, 1)},
    "a smoothing scale": {"l.weight": numbers(8, 4), "l.weight_scale": scales(), "l.pre_quant_scale": scales(4)},
    "bitsandbytes, 8 bits": {"l.weight": numbers(8, 4, dtype=torch.int8), "l.SCB": scales(8)},
    "bitsandbytes, 4 bits": {"l.weight": torch.ones(16, 1, dtype=torch.uint8), "l.weight.absmax": scales(2),
                             "l.weight.quant_map": torch.ones(16)},
    "GPTQ": GPTQ,
    "AWQ": {"q.qweight": torch.ones(4, 8, dtype=torch.int32), "q.scales": torch.ones(1, 64, dtype=torch.float16),
            "q.qzeros": torch.ones(1, 8, dtype=torch.int32)},
    "compressed-tensors, packed": {"l.weight_packed": torch.ones(8, 4, dtype=torch.int32),
                                   "l.weight_scale": scales(8, 1), "l.weight_shape": torch.tensor([8, 32])},
    "codes in bytes": {"l.weight": numbers(8, 64), "l.weight_scale": torch.ones(8, 2, dtype=torch.uint8)},
    "quanto": {"l.weight._data": numbers(8, 4), "l.weight._scale": scales(8, 1)},
    "torchao": {"l._weight_qdata": numbers(8, 4, dtype=torch.int8), "l._weight_scale": scales(8, 1)},
    "a name of its own": {"l.weight": numbers(8, 4), "l.my_scaling_thing": scales(8, 1)},
}  # fmt: skip


@pytest.mark.parametrize("kind", UNSETTLED)
def test_what_is_not_settled_is_refused_and_kept_if_asked(kind: str, refused: Callable[..., str], run: Run) -> None:
    state = {**UNSETTLED[kind], "norm.weight": torch.ones(3)}
    save_file(state, "in.safetensors")
    key = next(iter(state))
    assert key in refused("convert", "in.safetensors", "--dtype", "bf16", "--dequantize", "-o", "out.safetensors")
    assert key in refused("convert", "in.safetensors", "--dtype", "bf16", "-o", "out.safetensors")
    code, _, err = run("convert", "in.safetensors", "--dtype", "bf16", "--keep", key, "-o", "out.safetensors")
    assert (code, err) == (0, "")
    found = load_file("out.safetensors")
    assert found.pop("norm.weight").dtype == BF16
    assert all(
        torch.equal(tensor.flatten().view(torch.uint8), state[key].flatten().view(torch.uint8))
        for key, tensor in found.items()
    )


def test_other_weights_of_the_file_settle_a_square_one() -> None:
    state = {"q.weight": numbers(24, 24), "q.weight_scale": scales(24), "up.weight": numbers(40, 24),
             "up.weight_scale": scales(40)}  # fmt: skip
    save_file(state, "in.safetensors")
    ckptool.convert("in.safetensors", "out.safetensors", dequantize=True)
    found = load_file("out.safetensors")
    assert torch.equal(found["q.weight"], state["q.weight"].float() * state["q.weight_scale"][:, None])


# --- scales that lie elsewhere ---------------------------------------------------------------------------------------

E8M0 = torch.float8_e8m0fnu
ELSEWHERE: dict[str, tuple[str, dict[str, Tensor]]] = {
    "another prefix": ("l.weight", {"s.l.weight_scale_inv": scales(1, 1)}),
    "a parallel tree": ("model.layers.0.q.weight", {"scales.layers.0.q.weight": scales(8, 1)}),
    "a tree inside": ("model.layers.0.q.weight", {"model.scales.layers.0.q.weight": scales(8, 1)}),
    "a module behind": ("l.weight", {"l.weight_scale.value": scales(8, 1)}),
    "a scale without the weight's prefix": ("model.l.weight", {"l.weight_scale": scales()}),
    "two prefixes": ("model.layers.0.q.weight", {"quant.layers.0.q.scale": scales(8, 1, dtype=BF16)}),
    "a wrapper": ("_orig_mod.l.weight", {"l.weight_scale": scales()}),
    "e8m0": ("l.weight", {"aux.l.scale": scales(8, 1, dtype=E8M0)}),
    "experts": ("experts.w1", {"quant.w1_scales": scales(8, 1)}),
    "a slash": ("a/l.weight", {"b/l.weight_scale": scales()}),
    "names that tell nothing": ("l.weight", {"x17.weight_scale_inv": scales(1, 1)}),
    "two that may be it": ("l.weight", {"s.l.weight_scale": scales(8, 1), "t.l.weight_scale": scales(8, 1)}),
}  # fmt: skip


@pytest.mark.parametrize("kind", ELSEWHERE)
def test_a_scale_elsewhere_is_not_passed_over(kind: str, refused: Callable[..., str], run: Run) -> None:
    key, others = ELSEWHERE[kind]
    state = {key: numbers(8, 4), **others, "norm.weight": torch.ones(3)}
    save_file(state, "in.safetensors")
    for more in ([], ["--dequantize"]):
        line = refused("convert", "in.safetensors", "--dtype", "bf16", "-o", "out.safetensors", *more)
        assert all(name in line for name in (key, *others))
    assert run("convert", "in.safetensors", "--dtype", "bf16", "--keep", key, "-o", "out.safetensors")[0] == 0
    found = load_file("out.safetensors")
    assert found.pop("norm.weight").dtype == BF16
    assert all(found[name].dtype == state[name].dtype for name in found)
    save_file({key: torch.zeros(8, 4)}, "target.safetensors")
    assert key in refused("filter", "in.safetensors", "--match", "target.safetensors", "--cast", "-o", "o.safetensors")
    assert key in refused("load-partial", "in.safetensors", "--into", "target.safetensors", "-o", "o.safetensors")


def test_scales_outside_of_the_weights_and_in_another_source_are_seen(
    saved: Saved, refused: Callable[..., str]
) -> None:
    tree = {"model": {"l.weight": numbers(8, 4), "b": torch.ones(2)}, "scales": {"l.weight": scales(8, 1)}}
    assert "scales/l.weight" in refused("convert", saved(tree), "--dtype", "bf16", "-o", "out.pth")
    assert "scales/l.weight" in refused("convert", saved(tree), "--dtype", "bf16", "--dequantize", "-o", "out.pth")
    average = {"model": {"l.weight": numbers(8, 4)}, "ema": {"l.weight": numbers(8, 4), "l.weight_scale": scales(8, 1)}}
    assert ckptool.convert(saved(average), "average.pth", dtype="bf16", root="model").cast == ["l.weight"]
    save_file({"l.weight": numbers(8, 4)}, "w.safetensors")
    save_file({"l.weight_scale": scales(8, 1)}, "s.safetensors")
    save_file({"l.weight": torch.zeros(8, 4)}, "t.safetensors")
    for files in (("w", "s"), ("s", "w")):
        names = [f"{name}.safetensors" for name in files]
        line = refused("filter", *names, "--match", "t.safetensors", "--cast", "-o", "o.safetensors")
        assert "l.weight_scale" in line


@pytest.mark.parametrize("prefix", ["quant.", "", "model.scales."])
def test_of_many_scales_elsewhere_each_weight_has_its_own(prefix: str) -> None:
    names = [f"layers.{at}.experts.{expert}.w1.weight" for at in range(40) for expert in range(16)]
    state = {f"model.{name}": numbers(8, 4) for name in names} | {f"{prefix}{name}_scale": scales() for name in names}
    tensors = ckptool.open(state).state_dict()
    assert scaled_weights(tensors) == {}
    found = with_doubtful({}, tensors)
    assert {key: pair.scales for key, pair in found.items()} == {
        f"model.{name}": [f"{prefix}{name}_scale"] for name in names
    }
    assert not any(pair.is_named for pair in found.values())


def test_a_scale_that_is_renamed_to_lie_beside_its_weight_is_applied() -> None:
    state = {"model.l.weight": numbers(256, 256), "s.l.weight_scale_inv": scales(2, 2)}
    save_file(state, "in.safetensors")
    with pytest.raises(LossError, match="remap") as refusal:
        ckptool.convert("in.safetensors", "out.safetensors", dtype="bf16")
    assert "--dequantize" not in str(refusal.value)
    ckptool.convert(ckptool.remap("in.safetensors", [["^s", "model"]])[0], "out.pth", dequantize=True)
    assert torch.equal(load("out.pth")["model.l.weight"], blocked(*state.values(), 128))


@pytest.mark.parametrize("other", [
    {"x.norm.scale": torch.ones(4)}, {"d.l.weight": torch.ones(8, 4), "d.l.weight_scale": torch.ones(8, 1)},
    {"x.l.input_scale": torch.ones(())}, {"x.l.weight_scale": torch.ones(8, 1), "x.l.weight": numbers(8, 4)},
    {"attn.k_scale": torch.ones(())}, {"scale.l.weight": numbers(8, 4)},
], ids=lambda one: next(iter(one)))  # fmt: skip
def test_a_scale_of_something_else_stops_no_cast(other: dict[str, Tensor]) -> None:
    save_file({"l.weight": numbers(8, 4), **other}, "in.safetensors")
    assert "l.weight" in ckptool.convert("in.safetensors", "out.pth", dtype="bf16", keep="x.*").cast


# --- selections that part a weight from its scales -------------------------------------------------------------------

U8 = torch.ones(8, 4, dtype=torch.uint8)
PAIRS: dict[str, tuple[str, dict[str, Tensor]]] = {
    "fp8 blocks": ("l.weight", {"l.weight_scale_inv": scales(1, 1)}),
    "fp8": ("l.weight", {"l.weight_scale": scales(8, 1), "l.input_scale": scales()}),
    "e8m0": ("l.weight", {"l.scale": scales(8, 1, dtype=E8M0)}),
    "MXFP4": ("mlp.gate_up_proj_blocks", {"mlp.gate_up_proj_scales": U8}),
    "MXFP4 in modules": ("mlp.gate.blocks", {"mlp.gate.scales": U8}),
    "bitsandbytes, 8 bits": ("l.weight", {"l.SCB": scales(8), "l.weight_format": torch.zeros((), dtype=torch.uint8)}),
    "bitsandbytes, 4 bits": ("l.weight", {"l.weight.absmax": scales(2), "l.weight.quant_map": torch.ones(16),
                                          "l.weight.quant_state.bitsandbytes__nf4": U8.flatten()}),
    "GPTQ": ("q.qweight", {key: value for key, value in GPTQ.items() if key != "q.qweight"}),
    "compressed-tensors": ("l.weight_packed", {"l.weight_scale": scales(8, 1), "l.weight_shape": torch.ones(2)}),
    "HQQ": ("l.W_q", {"l.scale": scales(8, 1), "l.zero": scales(8, 1)}),
    "torchao": ("l.weight:qdata", {"l.weight:scale": scales(8, 1)}),
}  # fmt: skip


def packed(key: str) -> Tensor:
    if key in GPTQ or key.endswith("_packed"):
        return GPTQ["q.qweight"]
    return U8.clone() if key.endswith(("blocks", "W_q", "qdata")) else numbers(8, 4)


def told(run: Run, *args: str) -> str:
    """Runs a command for text and for JSON, which must say the same about weights; returns that note, or ""."""
    said = []
    for more in ([], ["--json"]):
        code, out, err = run(*args, "-o", "out.safetensors", "--dry-run", *more)
        assert code == 0, err
        lines = json.loads(out)["notes"] if more else f"{out}{err}".splitlines()
        found = [re.search("weights (kept|left|whose).*", line) for line in lines]
        said.append([match[0].strip() for match in found if match])
    assert said[0] == said[1]
    return "; ".join(said[0])


@pytest.mark.parametrize("kind", PAIRS)
def test_a_selection_that_parts_a_weight_from_its_scales_says_so(kind: str, run: Run) -> None:
    key, others = PAIRS[kind]
    save_file({key: packed(key), **others, "head.weight": torch.ones(3, 2)}, "in.safetensors")
    for part in others:
        bare = f"weights kept without all of their scales (1): {key} ({part})"
        assert told(run, "filter", "in.safetensors", "--exclude", part) == bare
        assert told(run, "remap", "in.safetensors", "--drop", part) == bare
        stray = f"weights left out, and scales of them kept (1): {key} ("
        assert told(run, "filter", "in.safetensors", "--include", part) == f"{stray}{part})"
        assert told(run, "remap", "in.safetensors", "--drop", key).startswith(stray)
    assert told(run, "filter", "in.safetensors", "--include", "head.*") == ""
    assert told(run, "remap", "in.safetensors", "--drop", "head.*") == ""
    save_file({key: torch.zeros_like(packed(key)), "head.weight": torch.ones(3, 2)}, "target.safetensors")
    into = (("filter", "in.safetensors", "--match"), ("load-partial", "in.safetensors", "--into"))
    for command in into:
        assert f"without all of their scales (1): {key} (" in told(run, *command, "target.safetensors")
    save_file({**others, "head.weight": torch.ones(3, 2)}, "scales.safetensors")
    for command in into:
        assert f"left out, and scales of them kept (1): {key} (" in told(run, *command, "scales.safetensors")
        assert told(run, *command, "in.safetensors") == ""
    save_file({key: packed(key), "head.weight": torch.ones(3, 2)}, "bare.safetensors")
    for name, _, option in into:
        assert f"not both (1): {key} (" in told(run, name, "bare.safetensors", option, "in.safetensors")


def test_counts_and_three_examples_are_told(run: Run) -> None:
    state = {
        f"l.{at}.weight{end}": numbers(8, 4) if not end else scales() for at in range(1200) for end in ("", "_scale")
    }
    save_file(state, "in.safetensors")
    note = told(run, "filter", "in.safetensors", "--exclude", "*_scale")
    assert note.startswith("weights kept without all of their scales (1,200): l.")
    assert note.count("_scale") == 3
    assert note.endswith("and 1197 more")


def test_two_sources_that_complete_each_other_part_nothing(run: Run) -> None:
    save_file({"l.weight": numbers(8, 4)}, "w.safetensors")
    save_file({"l.weight_scale": scales(8, 1)}, "s.safetensors")
    save_file({"l.weight": numbers(8, 4), "l.weight_scale": 2 * scales(8, 1)}, "both.safetensors")
    save_file({"l.weight": torch.zeros(8, 4).to(F8), "l.weight_scale": torch.ones(8, 1)}, "target.safetensors")
    match = ("--match", "target.safetensors")
    for more in ((), match):
        assert told(run, "filter", "w.safetensors", "s.safetensors", *more) == ""
        assert told(run, "filter", "both.safetensors", "w.safetensors", *more) == ""
    assert "without all" in told(run, "filter", "w.safetensors", "s.safetensors", "--exclude", "*_scale")
    other = {"l.weight": torch.zeros(8, 4).to(F8), "l.weight_scale": scales(8, 1)}
    save_file(other, "other.safetensors")
    assert "left out" in told(run, "filter", "w.safetensors", "other.safetensors", "--first-wins")
    assert "left out" in told(run, "filter", "w.safetensors", "other.safetensors", *match)


def test_a_weight_that_is_reshaped_without_its_scales_is_named(run: Run) -> None:
    save_file({"l.weight": numbers(8, 8), "l.weight_scale_inv": scales(2, 2), "b": torch.ones(2, 2)}, "in.safetensors")
    for old, new in (("l.weight", "l.weight_scale_inv"), ("l.weight_scale_inv", "l.weight")):
        Path("one.json").write_text(json.dumps([{"transpose": old}]))
        Path("both.json").write_text(json.dumps([{"transpose": old}, {"transpose": new}]))
        note = told(run, "remap", "in.safetensors", "--rules", "one.json")
        assert note == "weights whose values or scales are new, and not both (1): l.weight (l.weight_scale_inv)"
        assert told(run, "remap", "in.safetensors", "--rules", "both.json") == ""
    Path("other.json").write_text(json.dumps([{"transpose": "b"}]))
    assert told(run, "remap", "in.safetensors", "--rules", "other.json") == ""


@pytest.mark.parametrize(
    ("options", "note"),
    [
        (["--rename", "l.weight=l.kernel"], "l.kernel (l.weight_scale_inv)"),
        (["--rename", "l.weight_scale_inv=s.factor"], "l.weight (s.factor)"),
        (["--rename", "l.weight=m.weight"], "m.weight (l.weight_scale_inv)"),
        (["--rename", "l=m"], ""),
        (["--add-prefix", "model."], ""),
        (["--rename", "b=c"], ""),
        (["--copy", "tied.weight=l.weight"], ""),
        (["--copy", "m.weight_scale_inv=l.weight_scale_inv"], ""),
    ],
)
def test_a_weight_whose_name_no_longer_tells_its_scale_is_named(options: list[str], note: str, run: Run) -> None:
    save_file({"l.weight": numbers(8, 8), "l.weight_scale_inv": scales(2, 2), "b": torch.ones(2, 2)}, "in.safetensors")
    assert told(run, "remap", "in.safetensors", *options) == (
        f"weights whose names no longer tell their scales (1): {note}" if note else ""
    )


def test_a_tied_weight_that_stays_needs_the_scales(saved: Saved, run: Run) -> None:
    weight = numbers(8, 4)
    path = saved({"emb.weight": weight, "emb.weight_scale": scales(8, 1), "head.weight": weight})
    assert told(run, "remap", path, "--drop", "head.weight") == ""


# --- what is no scaled weight ----------------------------------------------------------------------------------------


def test_float8_without_scales_and_scales_without_low_bits_are_cast_as_before(saved: Saved) -> None:
    plain = {
        "a.weight": numbers(8, 4),
        "a.bias": torch.ones(8),
        "b.logit_scale": torch.ones(()),
        "b.scale": torch.ones(3),
    }
    ckptool.convert(saved(plain), "out.pth", dtype="bf16")
    assert torch.equal(load("out.pth")["a.weight"], plain["a.weight"].to(BF16))
    observers = {
        "fc.weight": torch.ones(2, 2), "fc.weight_fake_quant.scale": torch.ones(1),
        "fc.weight_fake_quant.zero_point": torch.zeros(1, dtype=torch.int32),
        "fc.weight_fake_quant.fake_quant_enabled": torch.ones(1, dtype=torch.uint8),
    }  # fmt: skip
    ckptool.convert(saved(observers), "qat.pth", dtype="bf16")
    assert load("qat.pth")["fc.weight_fake_quant.scale"].dtype == BF16


def test_dequantize_of_nothing_says_so(saved: Saved) -> None:
    report = ckptool.convert(saved({"w": torch.ones(2)}), "out.pth", dequantize=True)
    assert any("no weight has a scale" in note for note in report.notes)


# --- other commands and formats --------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["filter", "load-partial"])
def test_a_cast_into_a_target_does_not_part_them_either(
    command: str, fp8: dict[str, Tensor], saved: Saved, refused: Callable[..., str], run: Run
) -> None:
    target = saved({Q: torch.zeros(256, 256, dtype=BF16), "model.norm.weight": torch.zeros(256, dtype=BF16)})
    how = ["--match", target, "--cast"] if command == "filter" else ["--into", target]
    line = refused(command, "fp8.safetensors", *how, "-o", "out.safetensors")
    assert Q_SCALE in line
    assert "--dequantize" in line
    ckptool.convert("fp8.safetensors", "plain.safetensors", dequantize=True, dtype="bf16")
    assert run(command, "plain.safetensors", *how, "-o", "out.safetensors")[0] == 0
    assert torch.equal(load_file("out.safetensors")[Q], blocked(fp8[Q], fp8[Q_SCALE], 128).to(BF16))


def test_tied_weights_share_the_product_and_values_that_overflow_are_counted(saved: Saved) -> None:
    weight = numbers(40, 24)
    state = {"emb.weight": weight, "emb.weight_scale": torch.full((40, 1), 1e4), "head.weight": weight}
    report = ckptool.convert(saved({"model": state}), "out.pth", dtype="fp16", dequantize=True)
    expected = (weight.float() * 1e4).half()
    found = load("out.pth")["model"]
    assert list(found) == ["emb.weight", "head.weight"]
    assert torch.equal(found["head.weight"], expected)
    assert found["head.weight"].data_ptr() == found["emb.weight"].data_ptr()
    assert report.overflowed["emb.weight"] == int(expected.isinf().sum()) > 0


def test_shards_and_views_are_dequantized(saved: Saved) -> None:
    weight, scale = numbers(300, 200), scales(3, 2)
    state = {"l.weight": weight.t().contiguous().t(), "l.weight_scale_inv": scale.t().contiguous().t()}
    ckptool.convert(saved(state), "out", to="sharded", dequantize=True, dtype="bf16")
    assert torch.equal(ckptool.open("out").to_torch()["l.weight"], blocked(weight, scale, 128).to(BF16))
