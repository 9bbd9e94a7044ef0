"""What a cast does to a value's kind is counted for each key, by every command and in the API."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracles import Run, Saved, load
from safetensors.torch import load_file, save_file
from torch import nn

import ckptool

KINDS = ("overflowed", "saturated", "underflowed")
HOT = torch.tensor([1e10, -1e10, 65519.0, 1.0, 1e-10, -1e-10, 0.0, -0.0, float("inf"), float("nan")])
IN_HALF = {"overflowed": {"hot": 2}, "underflowed": {"hot": 2}}
LINES = (
    "overflow   2 values no longer finite, or out of an integer's range: hot (2)",
    "underflow  2 values zero now: hot (2)",
)


def counts(result: Any) -> dict[str, dict[str, int]]:
    """Returns the counts of a report (an object or its JSON) that are not empty."""
    found = {kind: result.get(kind) if isinstance(result, dict) else getattr(result, kind) for kind in KINDS}
    return {kind: dict(each) for kind, each in found.items() if each}


def test_casts_to_float16_count_what_becomes_infinite_and_what_becomes_zero(saved: Saved, run: Run) -> None:
    path = saved({"hot": HOT, "cool": torch.ones(3)})
    for suffix in ("pth", "safetensors", "npz"):
        out = run("convert", path, "--dtype", "fp16", "-o", f"out.{suffix}", "--json")[1]
        assert counts(json.loads(out)["result"][0]) == IN_HALF
    assert torch.equal(load("out.pth")["hot"][:9], HOT.half()[:9])
    out = run("convert", path, "--dtype", "fp16", "-o", "text.pth")[1]
    assert all(line in out for line in LINES)
    report = ckptool.convert(path, "api.pth", dtype="float16")
    assert counts(report) == IN_HALF


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"])
def test_casts_to_float8_count_what_torch_really_made(name: str, saved: Saved) -> None:
    dtype = getattr(torch, name)
    values = torch.tensor([500.0, -1e6, 448.0, 449.0, 3.0, 1e-9, 0.0, float("inf"), float("nan")])
    made = values.to(dtype).float()
    top, infinite = torch.finfo(dtype).max, values.isfinite() & ~made.isfinite()
    saturated = made.isfinite() & (values.abs() > 1.1 * top)
    expected = {"overflowed": int(infinite.sum()), "saturated": int(saturated.sum()), "underflowed": 1}
    report = ckptool.convert(saved({"w": values}), "out.safetensors", dtype=name)
    assert counts(report) == {kind: {"w": count} for kind, count in expected.items() if count}
    assert torch.equal(load_file("out.safetensors")["w"].view(torch.uint8), values.to(dtype).view(torch.uint8))


def test_a_saturated_value_is_said_in_the_text(saved: Saved, run: Run) -> None:
    values = torch.tensor([1000.0, -1000.0, 448.0])
    if not values.to(torch.float8_e4m3fn).float().isfinite().all():
        pytest.skip("this torch makes NaN of them")
    out = run("convert", saved({"w": values}), "--dtype", "fp8", "-o", "out.pth")[1]
    assert "saturated  2 values cut to the largest of the dtype: w (2)" in out


def test_what_bfloat16_and_float32_cannot_hold_is_counted_too(saved: Saved) -> None:
    wide = torch.tensor([1e300, 1e-300, 1.0], dtype=torch.float64)
    small = torch.tensor([1e-45, 3.4e38, 1.0])
    report = ckptool.convert(saved({"wide": wide, "small": small}), "out.pth", dtype="bfloat16")
    assert counts(report) == {"overflowed": {"wide": 1, "small": 1}, "underflowed": {"wide": 1, "small": 1}}
    assert counts(ckptool.convert(saved({"wide": wide}), "f32.pth", dtype="float32")) == {
        "overflowed": {"wide": 1}, "underflowed": {"wide": 1},
    }  # fmt: skip
    assert counts(ckptool.convert(saved({"small": small}), "f64.pth", dtype="float64")) == {}


@pytest.mark.parametrize("command", ["filter", "load-partial"])
def test_filter_and_load_partial_count_as_convert_does(command: str, saved: Saved, run: Run) -> None:
    source = saved({"hot": HOT, "only": torch.ones(1)}, "source.pth")
    target = saved({"hot": torch.zeros(10, dtype=torch.float16), "other": torch.zeros(2)}, "target.pth")
    how = ["--match", target, "--cast"] if command == "filter" else ["--into", target]
    assert counts(json.loads(run(command, source, *how, "-o", "out.pth", "--json")[1])["result"]) == IN_HALF
    out = run(command, source, *how, "-o", "text.pth")[1]
    assert all(line in out for line in LINES)


def test_a_live_model_is_loaded_with_the_same_counts(saved: Saved) -> None:
    model = nn.ParameterDict({"hot": nn.Parameter(torch.zeros(10, dtype=torch.float16))})
    report = ckptool.load_partial(model, saved({"hot": HOT}))
    assert counts(report) == IN_HALF
    assert "underflow" in report.summary()


def test_adapters_count_what_their_casts_do(saved: Saved, run: Run) -> None:
    source = saved({"conv.weight": torch.full((2, 3, 1, 1), 4e4)}, "source.pth")
    target = saved({"conv.weight": torch.zeros(2, 1, 1, 1, dtype=torch.float16)}, "target.pth")
    adapt = ["--adapt", "conv.weight=in-chans:sum"]
    code, out, err = run("load-partial", source, "--into", target, *adapt, "-o", "out.pth", "--json")
    assert code == 0, err
    assert load("out.pth")["conv.weight"].isinf().all()
    assert counts(json.loads(out)["result"]) == {"overflowed": {"conv.weight": 2}}


def test_integers_that_a_dtype_cannot_hold_are_counted(saved: Saved, run: Run) -> None:
    source = saved({"n": torch.tensor([70_000, 5]), "i": torch.tensor([0.5, 3e9, 7.0])}, "source.pth")
    target = {"n": torch.zeros(2, dtype=torch.float16), "i": torch.zeros(3, dtype=torch.int32)}
    out = run("filter", source, "--match", saved(target, "target.pth"), "--cast", "-o", "out.pth", "--json")[1]
    assert counts(json.loads(out)["result"]) == {"overflowed": {"n": 1, "i": 1}, "underflowed": {"i": 1}}


def test_untied_copies_of_a_cast_are_counted(saved: Saved) -> None:
    w = torch.tensor([1e10, 1e-10, 1.0])
    for output in ("out.npz", "out.pth", "out.safetensors"):
        report = ckptool.convert(saved({"a": w, "b": w}), output, dtype="float16", untie=True)
        assert counts(report) == {"overflowed": {"a": 1, "b": 1}, "underflowed": {"a": 1, "b": 1}}


@pytest.mark.parametrize("command", ["convert", "filter", "load-partial"])
def test_a_dry_run_says_that_it_does_not_count(command: str, saved: Saved, run: Run) -> None:
    source, target = saved({"hot": HOT}, "a.pth"), saved({"hot": torch.zeros(10, dtype=torch.float16)}, "b.pth")
    how = {
        "convert": ["--dtype", "fp16"], "filter": ["--match", target, "--cast"], "load-partial": ["--into", target]
    }[command]  # fmt: skip
    out = run(command, source, *how, "-o", "out.pth", "--dry-run")[1]
    assert "a dry run reads no values" in out
    plain = ["--match", source] if command == "filter" else ["--into", source]
    args = [command, source, *(plain if command != "convert" else []), "-o", "out.pth", "--dry-run"]
    assert "reads no values" not in run(*args)[1]


# --- names of dtypes, empty files ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("short", "name"),
    [
        ("fp8", "float8_e4m3fn"), ("f8_e4m3", "float8_e4m3fn"), ("FP8_E5M2", "float8_e5m2"), ("e5m2", "float8_e5m2"),
        ("float8_e4m3", "float8_e4m3fn"), ("fp8_e4m3fnuz", "float8_e4m3fnuz"), ("fp16", "float16"),
        ("fp32", "float32"), ("f16", "float16"), ("F64", "float64"), ("torch.float8_e5m2", "float8_e5m2"),
    ],
)  # fmt: skip
def test_short_names_of_dtypes_are_taken(short: str, name: str, saved: Saved) -> None:
    ckptool.convert(saved({"w": torch.ones(2), "n": torch.ones(2, dtype=torch.int64)}), "out.pth", dtype=short)
    assert load("out.pth")["w"].dtype == getattr(torch, name)


def test_a_dtype_without_sign_or_zero_is_refused(saved: Saved, refused: Callable[..., str]) -> None:
    assert "float8_e8m0fnu" in refused("convert", saved({"w": torch.ones(2)}), "--dtype", "e8m0", "-o", "out.pth")


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_a_file_of_placeholders_without_elements_is_refused(suffix: str, refused: Callable[..., str]) -> None:
    state = {"a.weight": torch.zeros(0), "b.weight": torch.zeros(0, dtype=torch.bfloat16)}
    if suffix == "pth":
        torch.save({"module": state}, "in.pth")
    else:
        save_file(state, "in.safetensors")
    for more in (["-o", "out.safetensors"], ["--to", "sharded", "-o", "out"], ["-o", "o.pth", "--dtype", "bf16"]):
        assert "no tensor has an element" in refused("convert", f"in.{suffix}", *more)


def test_an_empty_tensor_beside_others_is_converted(saved: Saved) -> None:
    ckptool.convert(saved({"empty": torch.zeros(0, 4), "w": torch.ones(2)}), "out.safetensors")
    assert load_file("out.safetensors")["empty"].shape == (0, 4)
