"""`convert`: values without loss, judged by torch.load, safetensors, numpy and hashlib."""

from __future__ import annotations

import json
import os
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import record
import torch
from converting import assert_same_state
from everything import GOOD, MALICIOUS, NOT_IN_SAFETENSORS, OF_EVERY_KIND, PLACES, TORCH, at_root, truth
from oracles import (
    FIXTURES,
    Run,
    Saved,
    State,
    assert_identical,
    bits,
    content,
    is_dense,
    load,
    tied_groups,
    torch_load,
)
from safetensors import safe_open
from safetensors.torch import load_file

import ckptool

NESTED = FIXTURES / "resnet_nested.pth"


@pytest.fixture
def refused(refused: Callable[..., str]) -> Callable[..., str]:
    """Runs a `convert` that must fail with one line and leave the directory as it is; returns the line."""
    return partial(refused, "convert")


# --- round trips over every fixture ----------------------------------------------------------------------------------


def holdable(name: str, saved: Saved) -> tuple[Path, State]:
    """A fixture, and its weights; where safetensors cannot hold all of them, what it can, saved by torch."""
    expected = truth(name)
    lacking = NOT_IN_SAFETENSORS.get(name, set())
    if not lacking:
        return FIXTURES / name, expected
    kept = {key: value for key, value in expected.items() if key not in lacking}
    return saved(kept), kept


ROUND = [case for case in OF_EVERY_KIND if case.values[0] not in ("resnet_module.pth", "tar_2016.pth")]


def in_file_order(name: str, expected: State) -> State:
    """safetensors' reader sorts by place in the file; ours keeps the header's order."""
    if name.endswith(".safetensors") or name == "sharded":
        return {key: expected[key] for key in ckptool.open(FIXTURES / name).state_dict()}
    return expected


@pytest.mark.parametrize("name", ROUND)
def test_there_and_back_by_way_of_safetensors(name: str, convert: Callable[..., Any], saved: Saved) -> None:
    source, expected = holdable(name, saved)
    expected = in_file_order(name, expected)
    there = convert(source, "-o", "there.safetensors")
    assert there["verified"]
    assert there["tensors"] == len(expected)
    stored = load_file("there.safetensors")
    for key, tensor in stored.items():
        assert bits(tensor) == bits(expected[key]), key
    convert("there.safetensors", "-o", "back.pth")
    assert_same_state(load("back.pth"), expected)


@pytest.mark.parametrize("name", ROUND)
def test_there_and_back_by_way_of_shards(name: str, convert: Callable[..., Any], saved: Saved) -> None:
    source, expected = holdable(name, saved)
    expected = in_file_order(name, expected)
    half = max(sum(tensor.nbytes for tensor in expected.values()) // 2, 64)
    convert(source, "--to", "sharded", "-o", "there", "--max-shard-size", half)
    convert("there", "-o", "back.pth")
    assert_same_state(load("back.pth"), expected)


NOT_LEGACY = {"dtypes.pth", "composite.pth"}  # torch's own loader reads neither UntypedStorages nor nested tensors


@pytest.mark.parametrize("name", [name for name in TORCH if name not in {*NOT_LEGACY, "tar_2016.pth"}])
def test_there_and_back_by_way_of_torchs_legacy_format_the_whole_tree_is_the_same(
    name: str, convert: Callable[..., Any]
) -> None:
    convert(FIXTURES / name, "--to", "torch-legacy", "-o", "there.pth")
    assert not zipfile.is_zipfile("there.pth")
    convert("there.pth", "-o", "back.pth", "--to", "torch")
    expected = torch_load(FIXTURES / name)
    assert_identical(expected, torch_load(Path("there.pth")))
    assert_identical(expected, torch_load(Path("back.pth")))


@pytest.mark.parametrize("name", sorted(NOT_LEGACY))
def test_what_the_legacy_format_cannot_hold_is_named(name: str, refused: Callable[..., str]) -> None:
    err = refused(FIXTURES / name, "--to", "torch-legacy", "-o", "there.pth")
    for word in ("float8_e4m3fn",) if name == "dtypes.pth" else ("nested",):
        assert word in err


@pytest.mark.parametrize("name", ["lightning.ckpt", "resnet_nested.pth", "tied.pth"])  # conformance: all of them
def test_torch_to_torch_keeps_the_whole_tree(name: str, convert: Callable[..., Any]) -> None:
    result = convert(FIXTURES / name, "-o", "out.pth")
    assert result["left_out"] == []
    assert_identical(torch_load(FIXTURES / name), torch_load(Path("out.pth")))


@pytest.mark.parametrize("name", ["sharded", "sharded_bin"])
@pytest.mark.parametrize("output", ["one.safetensors", "one.pth", "one.bin"])
def test_shards_in_one_file_out(name: str, output: str, convert: Callable[..., Any]) -> None:
    expected = in_file_order(name, truth(name))
    convert(FIXTURES / name, "-o", output)
    if output.endswith(".safetensors"):
        stored = load_file(output)
        assert {key: bits(tensor) for key, tensor in stored.items()} == {key: bits(expected[key]) for key in stored}
        assert len(stored) == len(expected) - 1
        with safe_open(output, "pt") as file:
            assert set(file.metadata().items()) & {("lm_head.weight", "model.embed.weight"),
                                                   ("model.embed.weight", "lm_head.weight")}  # fmt: skip
    else:
        assert_same_state(load(output), expected)
    index = next((FIXTURES / name).glob("*.index.json"))
    convert(index, "-o", f"again-{output}")
    assert Path(f"again-{output}").read_bytes() == Path(output).read_bytes()


@pytest.mark.parametrize("to", ["torch", "torch-legacy", "safetensors", "sharded"])
def test_every_kind_of_view_and_dtype_comes_through_by_value(
    to: str, convert: Callable[..., Any], saved: Saved
) -> None:
    base = torch.randn(6, 8)
    state = {
        "transposed": base.t(), "sliced": base[1:5, ::3], "expanded": torch.randn(3, 1).expand(3, 5),
        "last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last), "scalar": torch.tensor(-0.0),
        "nothing": torch.empty(0, 3), "bf16": torch.randn(5).bfloat16(), "c8": torch.randn(3, dtype=torch.complex64),
        "conj": torch.randn(3, dtype=torch.complex64).conj(), "flag": torch.tensor([True, False]),
        "nan": torch.tensor([float("nan"), float("inf"), -float("inf")]), "i8": torch.arange(-3, 3, dtype=torch.int8),
        "f8": torch.randn(9).to(torch.float8_e5m2), "big": torch.randn(600, 700).t(),
    }  # fmt: skip
    if to == "torch-legacy":
        del state["f8"]
    convert(saved(state), "--to", to, "-o", "there")
    convert("there", "-o", "back.pth", "--to", "torch")
    found = load("back.pth")
    assert list(found) == list(state)
    for key, tensor in state.items():
        assert (found[key].dtype, found[key].shape, bits(found[key])) == (tensor.dtype, tensor.shape, bits(tensor)), key


def test_npz_is_what_numpy_reads(convert: Callable[..., Any], saved: Saved) -> None:
    state = {"w": torch.randn(3, 4).t(), "n": torch.arange(3), "h": torch.randn(2).half(), "e": torch.empty(0, 2)}
    convert(saved(state), "--to", "npz")
    with np.load("saved.npz") as found:
        assert list(found) == list(state)
        for key, tensor in state.items():
            assert np.array_equal(found[key], tensor.numpy())
            assert found[key].dtype == tensor.numpy().dtype


# --- round trips over other people's files ---------------------------------------------------------------------------


def sample_state(name: str) -> State:
    """The weights of a sample that bare formats can hold, as torch or safetensors reads them; skips where none can."""
    path = PLACES[name]
    opened = ckptool.open(path)
    if opened.broken:
        pytest.skip("a part is missing")
    if opened.format == "safetensors":
        loaded = load_file(path)
    elif opened.format == "hf-sharded":
        parts = [*path.glob("*.safetensors"), *path.glob("*.bin")] if path.is_dir() else []
        loaded = {}
        for part in sorted(parts):
            loaded |= load_file(part) if part.suffix == ".safetensors" else load(part)
    else:
        try:
            loaded = at_root(torch_load(path, map_location="cpu"), opened.root)
        except Exception as error:
            pytest.skip(f"torch itself does not load it: {error}")
    found = {key: value for key, value in getattr(loaded, "items", dict)() if isinstance(value, torch.Tensor)}
    kept = {key: found[key] for key in opened.state_dict() if key in found and holdable_tensor(found[key])}
    if not kept or not set(found) <= set(opened.state_dict()):
        pytest.skip("its weights are no dict of tensors that torch can make and safetensors hold")
    return kept


def holdable_tensor(tensor: torch.Tensor) -> bool:
    plain = type(tensor) in (torch.Tensor, torch.nn.Parameter) and is_dense(tensor)
    return plain and tensor.dtype not in (torch.complex128, torch.complex32) and "bits" not in str(tensor.dtype)


@pytest.mark.parametrize(
    ("name", "way"),
    [
        pytest.param(name, way, marks=[pytest.mark.slow] if at % 2 == (way == "sharded") else [])
        for at, name in enumerate(name for name in GOOD if name not in MALICIOUS)
        for way in ("safetensors", "sharded")
    ],
)
def test_a_sample_goes_there_and_comes_back(name: str, way: str, convert: Callable[..., Any], saved: Saved) -> None:
    expected = sample_state(name)
    source = PLACES[name]
    if set(expected) != set(ckptool.open(source).state_dict()):
        source = saved(expected)
    half = max(sum(tensor.nbytes for tensor in expected.values()) // 2, 64)
    try:
        convert(source, "--to", way, "-o", "there", "--max-shard-size", half, "--map-location", "cpu")
    except AssertionError as error:
        if "no text" in str(error) or "an object with" in str(error):  # refused, as it must be
            return
        raise
    convert("there", "-o", "back.pth")
    assert_same_state(load("back.pth"), {key: tensor.detach() for key, tensor in expected.items()})


@pytest.mark.parametrize("tied", [True, False])
def test_what_transformers_wrote_is_read_and_laid_out_alike(
    tied: bool, convert: Callable[..., Any], saved: Saved
) -> None:
    theirs = FIXTURES / "oracles" / ("llama_tied" if tied else "llama")
    keys = json.loads((theirs / "state_dict.json").read_text())
    convert(theirs, "-o", "back.pth")
    back, shards = load("back.pth"), sorted(theirs.glob("*.safetensors"))
    expected = {key: tensor for shard in shards for key, tensor in load_file(shard).items()}
    assert {key: bits(tensor) for key, tensor in back.items()} == {key: bits(t) for key, t in expected.items()}
    assert {key: list(tensor.shape) for key, tensor in back.items()} == {key: keys[key] for key in back}
    assert set(keys) - set(back) == ({"lm_head.weight"} if tied else set())
    in_order = saved({key: expected[key] for key in keys if key in expected})
    convert(in_order, "--to", "sharded", "-o", "again", "--max-shard-size", "2KB")
    assert [path.name for path in sorted(Path("again").glob("*.safetensors"))] == [shard.name for shard in shards]
    maps = [json.loads((place / "model.safetensors.index.json").read_text()) for place in (theirs, Path("again"))]
    assert maps[0]["weight_map"] == maps[1]["weight_map"]


@pytest.mark.skipif(not record.installed("transformers"), reason="what it wrote is compared with above")
@pytest.mark.parametrize("tied", [True, False])
def test_transformers_loads_what_was_converted_to_shards(
    tied: bool, convert: Callable[..., Any], saved: Saved, capsys: pytest.CaptureFixture[str]
) -> None:
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=tied,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    expected = model.state_dict()
    convert(saved(expected), "--to", "sharded", "-o", "out", "--max-shard-size", "4KB")
    assert len(list(Path("out").glob("*.safetensors"))) > 2
    config.save_pretrained("out")
    found, told = transformers.LlamaForCausalLM.from_pretrained("out", output_loading_info=True)
    assert not any(told.values())
    assert_same_state(found.state_dict(), expected)
    assert (found.lm_head.weight is found.model.embed_tokens.weight) == tied
    found.save_pretrained("theirs", max_shard_size="4KB")  # and the other way: what it wrote, we read
    capsys.readouterr()  # its bars
    convert("theirs", "-o", "back.pth")
    back = load("back.pth")
    assert {key: bits(tensor) for key, tensor in back.items()} == {key: bits(expected[key]) for key in back}
    assert set(expected) - set(back) <= ({"lm_head.weight"} if tied else set())


# --- dtypes ----------------------------------------------------------------------------------------------------------

FLOATS = {"bf16": torch.bfloat16, "fp16": torch.float16, "float32": torch.float32, "BF16": torch.bfloat16,
          "float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2, "float64": torch.float64}  # fmt: skip


def mixed() -> State:
    generator = torch.Generator().manual_seed(5)
    hard = torch.randint(0, 256, (20_000, 4), dtype=torch.uint8, generator=generator).view(torch.float32).squeeze(-1)
    ties = torch.tensor([1.0 + k * 2.0**-9 for k in range(64)])  # halfway between neighbours: to even
    return {
        "hard": hard[hard.abs() < 60_000], "ties": ties, "half": torch.randn(9).half(),
        "double": torch.randn(3, dtype=torch.float64), "ints": torch.arange(5), "flags": torch.tensor([True]),
        "complex": torch.randn(2, dtype=torch.complex64), "f8": torch.randn(6).to(torch.float8_e4m3fn),
        "t": torch.randn(4, 6).t(), "scalar": torch.tensor(0.1), "nothing": torch.empty(0, 2),
        "nan": torch.tensor([float("nan"), float("inf"), -0.0]),
    }  # fmt: skip


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("name", FLOATS)
def test_a_cast_is_torchs_own_for_floats_and_for_nothing_else(
    name: str, suffix: str, convert: Callable[..., Any], saved: Saved
) -> None:
    state, dtype = mixed(), FLOATS[name]
    result = convert(saved(state), "-o", f"out{suffix}", "--dtype", name)
    found = load("out.pth") if suffix == ".pth" else load_file("out.safetensors")
    assert set(found) == set(state)
    for key, tensor in state.items():
        expected = tensor.to(dtype) if tensor.dtype.is_floating_point else tensor
        got = found[key]
        if tensor.is_floating_point():  # which NaN it is depends on torch's own way: by element, or by vector
            assert torch.equal(got.isnan(), expected.isnan()), key
            assert got.dtype == expected.dtype, key
            got, expected = got.double().nan_to_num(7.0), expected.double().nan_to_num(7.0)
        assert (got.dtype, bits(got)) == (expected.dtype, bits(expected)), key
    assert set(result["cast"]) == {
        key for key, tensor in state.items() if tensor.dtype.is_floating_point and tensor.dtype != dtype
    }


def test_a_cast_of_more_than_a_block_is_torchs_own(convert: Callable[..., Any], saved: Saved) -> None:
    state = {"w": torch.randn(700, 901), "t": torch.randn(600, 700).t()}
    convert(saved(state), "-o", "out.pth", "--dtype", "fp16")
    assert_same_state(load("out.pth"), {key: tensor.half().contiguous() for key, tensor in state.items()})


def test_only_the_weights_are_cast_and_not_the_optimizer(convert: Callable[..., Any]) -> None:
    convert(NESTED, "-o", "out.pth", "--dtype", "bf16")
    old, new = torch_load(NESTED), torch_load(Path("out.pth"))
    assert {tensor.dtype for tensor in new["model"].values()} == {torch.bfloat16}
    for tree in (old, new):
        tree["model"] = None
    assert_identical(old, new)


def test_what_fits_keep_stays_as_it_is(convert: Callable[..., Any]) -> None:
    source = FIXTURES / "resnet_122.pth"
    result = convert(source, "-o", "out.pth", "--dtype", "bf16", "--keep", "*bn*", "--keep", r"re:^fc\.bias$")
    old, new = load(source), load("out.pth")
    for key, tensor in old.items():
        kept = "bn" in key or key == "fc.bias" or not tensor.is_floating_point()
        assert new[key].dtype == (tensor.dtype if kept else torch.bfloat16), key
        assert bits(new[key]) == bits(tensor if kept else tensor.bfloat16()), key
    assert_identical(old._metadata, new._metadata)
    assert not any("bn" in key for key in result["cast"])


def test_a_keep_that_fits_nothing_is_said(convert: Callable[..., Any], saved: Saved) -> None:
    result = convert(saved({"w": torch.ones(2)}), "-o", "out.pth", "--dtype", "bf16", "--keep", "nrom.*")
    assert any("nrom.*" in note for note in result["notes"])


def test_values_that_become_infinite_are_counted_by_key(convert: Callable[..., Any], run: Run, saved: Saved) -> None:
    state = {
        "hot": torch.tensor([1e6, -1e6, 65504.0, 65519.0, 65520.0, 1.0]), "cool": torch.ones(5),
        "known": torch.tensor([float("inf"), float("nan"), -float("inf"), 70000.0]), "int": torch.tensor([10**9]),
    }  # fmt: skip
    path = saved(state)
    for suffix in ("pth", "safetensors"):
        result = convert(path, "-o", f"out.{suffix}", "--dtype", "fp16")
        assert result["overflowed"] == {"hot": 3, "known": 1}
    expected = {key: tensor.half() if tensor.is_floating_point() else tensor for key, tensor in state.items()}
    assert torch.isinf(expected["hot"]).sum() == 3
    assert_same_state(load("out.pth"), expected)
    out = run("convert", path, "-o", "text.pth", "--dtype", "fp16")[1]
    line = next(line for line in out.splitlines() if "overflow" in line)
    assert "4 values" in line
    assert "hot" in line
    assert convert(path, "-o", "out.pth", "--dtype", "bf16")["overflowed"] == {}


def test_overflow_is_counted_for_sharded_output_too(convert: Callable[..., Any], saved: Saved) -> None:
    path = saved({"a": torch.tensor([1e6, 1.0]), "b": torch.tensor([1e6, 1e9])})
    result = convert(path, "--to", "sharded", "-o", "out", "--dtype", "fp16", "--max-shard-size", "4")
    assert result["overflowed"] == {"a": 1, "b": 2}


def test_overflow_of_tied_names_is_counted_once_a_value(convert: Callable[..., Any], saved: Saved) -> None:
    w = torch.tensor([1e6, 1.0])
    for output in ("out.pth", "out.safetensors"):
        overflowed = convert(saved({"a": w, "b": w}), "-o", output, "--dtype", "fp16")["overflowed"]
        assert set(overflowed.values()) == {1}
        assert "a" in overflowed


def test_tied_tensors_stay_tied_through_a_cast(convert: Callable[..., Any]) -> None:
    source = FIXTURES / "tied.pth"
    old = load(source)
    for output in ("out.pth", "out.safetensors"):
        convert(source, "-o", output, "--dtype", "bf16")
        convert(output, "-o", "back.pth")
        found = load("back.pth")
        assert list(found) == list(old)
        assert tied_groups(found) == tied_groups(old)
        assert all(bits(found[key]) == bits(tensor.bfloat16()) for key, tensor in old.items())


def test_tied_names_are_kept_or_cast_together(convert: Callable[..., Any], saved: Saved) -> None:
    w = torch.randn(4)
    convert(saved({"emb": w, "head": w, "other": torch.ones(1)}), "-o", "out.pth", "--dtype", "bf16", "--keep", "head")
    found = load("out.pth")
    assert [tensor.dtype for tensor in found.values()] == [torch.float32, torch.float32, torch.bfloat16]
    assert tied_groups(found) == {frozenset(("emb", "head"))}


# --- ties ------------------------------------------------------------------------------------------------------------


def test_ties_come_back_where_they_stood(convert: Callable[..., Any], saved: Saved) -> None:
    w, v = torch.randn(3), torch.randn(2)
    state = OrderedDict([("z", w), ("y", torch.ones(1)), ("b", v), ("x", w.detach()), ("a", v), ("c", w), ("d", w)])
    expected = load(saved(state))
    for to in ("safetensors", "sharded"):
        convert("saved.pth", "--to", to, "-o", to)
        convert(to, "-o", "back.pth")
        assert_same_state(load("back.pth"), expected)
    with safe_open("safetensors", "pt") as f:
        assert len(f.keys()) == 3
        assert {name: kept for name, kept in f.metadata().items() if name in state} == {
            "x": "z", "c": "z", "d": "z", "a": "b",
        }  # fmt: skip


def test_untie_gives_every_name_memory_of_its_own(convert: Callable[..., Any]) -> None:
    source = FIXTURES / "tied.pth"
    old = load(source)
    extra = sum(len(group) - 1 for group in tied_groups(old))
    for output in ("out.pth", "out.safetensors"):
        result = convert(source, "-o", output, "--untie")
        assert len(result["untied"]) == extra
        found = load(output) if output == "out.pth" else load_file(output)
        assert tied_groups(found) == set()
        assert {key: bits(t) for key, t in found.items()} == {key: bits(t) for key, t in old.items()}
        if output == "out.pth":
            assert list(found) == list(old)
    with safe_open("out.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_untie_and_cast_go_together(convert: Callable[..., Any], saved: Saved) -> None:
    w = torch.randn(4)
    convert(saved({"a": w, "b": w}), "-o", "out.pth", "--untie", "--dtype", "bf16")
    found = load("out.pth")
    assert tied_groups(found) == set()
    assert [bits(tensor) for tensor in found.values()] == [bits(w.bfloat16())] * 2


def test_empty_tensors_never_count_as_tied(convert: Callable[..., Any], saved: Saved) -> None:
    empty = torch.empty(0, 3)
    path = saved({"a": empty, "b": empty, "c": torch.empty(0, 3), "w": torch.ones(1)})
    result = convert(path, "-o", "out.safetensors", "--untie")
    assert result["untied"] == []
    convert(path, "-o", "out.safetensors")
    with safe_open("out.safetensors", "pt") as file:
        assert set(file.keys()) == {"a", "b", "c", "w"}
        assert file.metadata() == {"format": "pt"}


def test_equal_values_are_not_tied(convert: Callable[..., Any], saved: Saved) -> None:
    w = torch.randn(4)
    convert(saved({"a": w, "b": w.clone(), "view": w.view(2, 2)}), "-o", "out.safetensors")
    with safe_open("out.safetensors", "pt") as file:
        assert set(file.keys()) == {"a", "b", "view"}


def test_bloated_views_shrink(convert: Callable[..., Any], saved: Saved) -> None:
    big = torch.randn(100_000)
    path = saved({"small": big[5:9], "far": torch.randn(300, 300)[:, 0]})
    assert path.stat().st_size > 700_000
    for output in ("out.pth", "out.safetensors", "out.npz"):
        convert(path, "-o", output)
        assert Path(output).stat().st_size < 5_000
    found = load("out.pth")
    assert found["small"].untyped_storage().nbytes() == 16
    assert found["far"].untyped_storage().nbytes() == 1200
    assert bits(found["small"]) == bits(big[5:9])


# --- shards ----------------------------------------------------------------------------------------------------------


def packed(state: State, limit: int) -> list[list[str]]:
    """The rule of huggingface_hub: in order, a new shard when the next tensor would not fit."""
    shards: list[list[str]] = [[]]
    filled = 0
    for key, tensor in state.items():
        if shards[-1] and filled + tensor.nbytes > limit:
            shards.append([])
            filled = 0
        shards[-1].append(key)
        filled += tensor.nbytes
    return shards


@pytest.mark.parametrize(("text", "limit"), [("10KB", 10_000), ("8KiB", 8192), ("0.02MB", 20_000), ("9000", 9000)])
def test_shards_are_laid_out_as_hugging_face_lays_them_out(text: str, limit: int, convert: Callable[..., Any]) -> None:
    source = FIXTURES / "resnet_old.pth"
    state = load(source)
    convert(source, "--to", "sharded", "-o", "out", "--max-shard-size", text)
    shards = packed(state, limit)
    count = len(shards)
    assert count > 2
    names = [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]
    assert sorted(os.listdir("out")) == [*names, "model.safetensors.index.json"]
    index = json.loads(Path("out/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in state.values())
    assert index["weight_map"] == {key: name for name, keys in zip(names, shards, strict=True) for key in keys}
    for name, keys in zip(names, shards, strict=True):
        stored = load_file(f"out/{name}")
        assert set(stored) == set(keys)
        assert all(bits(stored[key]) == bits(state[key]) for key in keys)
        with safe_open(f"out/{name}", "pt") as file:
            assert file.metadata()["format"] == "pt"


def test_what_fits_one_shard_is_one_file_without_an_index(convert: Callable[..., Any]) -> None:
    convert(FIXTURES / "resnet_old.pth", "--to", "sharded", "-o", "out")
    assert os.listdir("out") == ["model.safetensors"]
    assert len(load_file("out/model.safetensors")) == 102


def test_ties_across_shards_stand_in_the_index(convert: Callable[..., Any], saved: Saved) -> None:
    w = torch.randn(100)
    state = {"emb": w, "mid": torch.randn(100), "head": w}
    convert(saved(state), "--to", "sharded", "-o", "out", "--max-shard-size", "400")
    index = json.loads(Path("out/model.safetensors.index.json").read_text())
    assert index["metadata"]["head"] == "emb"
    assert index["metadata"]["total_size"] == 800
    assert set(index["weight_map"]) == {"emb", "mid"}


@pytest.mark.parametrize("text", ["", "5GBB", "-1", "0", "GB", "5 XB", "1e3", "1iB", "0.1", "nan", "inf", "5,000"])
def test_a_size_that_is_none_is_one_line(text: str, refused: Callable[..., str], saved: Saved) -> None:
    refused(saved({"w": torch.ones(1)}), "--to", "sharded", "-o", "out", f"--max-shard-size={text}")


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("5GB", 5 * 10**9), ("5gb", 5 * 10**9), ("2GiB", 2 << 30), ("500 MB", 5 * 10**8), ("1.5KB", 1500), ("7", 7),
     ("3T", 3 * 10**12), ("1KiB", 1024), ("10B", 10)],
)  # fmt: skip
def test_a_size_is_read_as_huggingface_writes_it(text: str, nbytes: int) -> None:
    from ckptool.cli.options import size

    assert size(text) == nbytes


def test_other_files_in_the_directory_are_left_alone(run: Run) -> None:
    Path("out").mkdir()
    Path("out/config.json").write_text("{}")
    Path("out/tokenizer.model").write_text("another")
    source = FIXTURES / "resnet_old.pth"
    options = ["--to", "sharded", "-o", "out", "--max-shard-size", "20KB"]
    assert run("convert", source, *options)[0] == 0
    assert Path("out/config.json").read_text() == "{}"
    assert Path("out/tokenizer.model").read_text() == "another"
    before = content()
    code, _, err = run("convert", source, *options)
    assert (code, "exists" in err) == (2, True)
    assert content() == before
    assert run("convert", source, *options, "--force")[0] == 0


def test_shards_go_beside_other_weights_or_nowhere(run: Run) -> None:
    Path("out").mkdir()
    Path("out/pytorch_model.bin").write_text("another")
    before = content()
    code = run("convert", FIXTURES / "resnet_old.pth", "--to", "sharded", "-o", "out", "--max-shard-size", "20KB")[0]
    assert code == 0 or content() == before


def test_shards_are_not_written_over_themselves(refused: Callable[..., str]) -> None:
    import shutil

    shutil.copytree(FIXTURES / "sharded", "out")
    options = ["--to", "sharded", "-o", "out", "--max-shard-size", "200"]  # three shards, as the input has
    assert "exists" in refused("out", *options)
    assert "in-place" in refused("out", *options, "--force")
