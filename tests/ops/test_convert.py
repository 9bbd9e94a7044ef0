"""`convert`: other formats, dtypes and layouts without loss, judged by torch.load, safetensors, numpy and hashlib."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracles import FIXTURES, Run, Saved, assert_identical, bits, content, is_dense, torch_load
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_conformance import EVERY, NOT_IN_SAFETENSORS, TORCH, at_root, truth
from test_samples import GOOD, SAMPLES

import ckptool
from ckptool.errors import LossError, UsageError
from ckptool.io.output import Output

State = dict[str, torch.Tensor]

NESTED = FIXTURES / "resnet_nested.pth"


@pytest.fixture
def convert(run: Run) -> Callable[..., Any]:
    """Runs `convert` without waiting for the disk; returns the one result of the JSON document."""

    def call(*args: object) -> Any:
        code, out, err = run("convert", *args, "--no-fsync", "--force", "--json")
        assert (code, err) == (0, ""), err
        document = json.loads(out)
        assert (document["schema"], document["command"], len(document["result"])) == (1, "convert", 1)
        return document["result"][0]

    return call


@pytest.fixture
def refused(refused: Callable[..., str]) -> Callable[..., str]:
    """Runs a `convert` that must fail with one line and leave the directory as it is; returns the line."""
    return partial(refused, "convert")


def load(path: Path | str) -> State:
    return torch.load(path, weights_only=True)


def tied_groups(state: State) -> set[frozenset[str]]:
    """Keys that are the same elements of the same memory."""
    groups: dict[Any, set[str]] = {}
    for key, tensor in state.items():
        if tensor.layout == torch.strided and not tensor.is_quantized and not tensor.is_nested and tensor.numel():
            lazy = tensor.is_conj(), tensor.is_neg()
            view = tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), lazy
            groups.setdefault(view, set()).add(key)
    return {frozenset(keys) for keys in groups.values() if len(keys) > 1}


def assert_same_state(found: State, expected: State) -> None:
    """Equal keys, order, shapes, dtypes, values to the bit, and ties."""
    assert list(found) == list(expected)
    for key, tensor in expected.items():
        assert (found[key].dtype, found[key].shape) == (tensor.dtype, tensor.shape), key
        assert bits(found[key]) == bits(tensor), key
    assert tied_groups(found) == tied_groups(expected)


def damaged(monkeypatch: pytest.MonkeyPatch, nbytes: int) -> None:
    """From now on one byte of what is written goes to the file another than it was given: in every block as large."""
    write = Output.write

    def flip(self: Output, data: Any) -> None:
        wrong = bytearray(data)
        if len(data) >= nbytes:
            wrong[nbytes // 2] ^= 1
        write(self, bytes(wrong))

    monkeypatch.setattr(Output, "write", flip)


# --- round trips over every fixture ----------------------------------------------------------------------------------


def holdable(name: str, saved: Saved) -> tuple[Path, State]:
    """A fixture, and its weights; where safetensors cannot hold all of them, what it can, saved by torch."""
    expected = truth(name)
    lacking = NOT_IN_SAFETENSORS.get(name, set())
    if not lacking:
        return FIXTURES / name, expected
    kept = {key: value for key, value in expected.items() if key not in lacking}
    return saved(kept), kept


ROUND = [name for name in EVERY if name not in ("resnet_module.pth", "tar_2016.pth")]


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


@pytest.mark.parametrize("name", [name for name in TORCH if name != "tar_2016.pth"])
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
    path = SAMPLES / name
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


@pytest.mark.skipif(not GOOD, reason="the samples are not beside this repository")
@pytest.mark.parametrize("way", ["safetensors", "sharded"])
@pytest.mark.parametrize("name", [name for name in GOOD if not name.startswith("bad/")])  # torch.load would run them
def test_a_sample_goes_there_and_comes_back(name: str, way: str, convert: Callable[..., Any], saved: Saved) -> None:
    expected = sample_state(name)
    source: Path = SAMPLES / name
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
def test_transformers_loads_what_was_converted_to_shards(
    tied: bool, convert: Callable[..., Any], saved: Saved, capsys: pytest.CaptureFixture[str]
) -> None:
    transformers = pytest.importorskip("transformers")
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


# --- which format, and where -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("to", "name", "expected"),
    [
        ("safetensors", "m.pth", "m.safetensors"), ("torch", "m.safetensors", "m.pth"), ("npz", "m.pth", "m.npz"),
        ("torch-legacy", "m.pth", "m.legacy.pth"), ("sharded", "m.pth", "m-sharded"),
        ("safetensors", "m.pth.tar", "m.safetensors"), ("safetensors", "m.v1.5.pth", "m.v1.5.safetensors"),
        ("safetensors", "model", "model.safetensors"), ("safetensors", "sub/m.bin", "sub/m.safetensors"),
    ],
)  # fmt: skip
def test_without_a_name_the_output_lies_beside_the_input(
    to: str, name: str, expected: str, convert: Callable[..., Any]
) -> None:
    state = {"w": torch.randn(3), "b": torch.ones(1)}
    Path(name).parent.mkdir(exist_ok=True)
    save_file(state, name) if name.endswith(".safetensors") else torch.save(state, name)
    result = convert(name, "--to", to)
    assert (result["input"], result["output"]) == (name, expected)
    assert Path(expected).is_dir() == (to == "sharded")
    assert Path(name).exists()


def test_without_a_name_shards_become_a_file_beside_their_directory(convert: Callable[..., Any]) -> None:
    import shutil

    shutil.copytree(FIXTURES / "sharded", "run/llm")
    assert convert("run/llm", "--to", "safetensors")["output"] == "run/llm.safetensors"
    assert convert("run/llm/", "--to", "torch")["output"] == "run/llm.pth"
    index = "run/llm/model.safetensors.index.json"
    assert convert(index, "--to", "torch")["output"].startswith("run/llm/model")


@pytest.mark.parametrize(
    ("output", "magic"),
    [("o.pth", b"PK\x03\x04"), ("o.pt", b"PK\x03\x04"), ("o.bin", b"PK\x03\x04"), ("o.ckpt", b"PK\x03\x04"),
     ("o.pth.tar", b"PK\x03\x04"), ("O.PTH", b"PK\x03\x04"), ("o.npz", b"PK\x03\x04"), ("o.safetensors", None)],
)  # fmt: skip
def test_the_suffix_says_the_format(output: str, magic: bytes | None, convert: Callable[..., Any]) -> None:
    convert(FIXTURES / "resnet_old.safetensors", "-o", output)
    assert magic is None or Path(output).read_bytes()[:4] == magic
    expected = load_file(FIXTURES / "resnet_old.safetensors")
    if output == "o.npz":
        found = {key: torch.from_numpy(array) for key, array in np.load(output).items()}
    else:
        found = load_file(output) if output.endswith(".safetensors") else load(output)
    assert {key: bits(tensor) for key, tensor in found.items()} == {key: bits(t) for key, t in expected.items()}


def test_a_format_by_name_beats_the_suffix(convert: Callable[..., Any]) -> None:
    convert(FIXTURES / "resnet_old.pth", "--to", "safetensors", "-o", "odd.pth")
    assert len(load_file("odd.pth")) == 102


def test_a_command_line_that_says_too_little_or_too_much_is_refused(refused: Callable[..., str], saved: Saved) -> None:
    one, two = saved({"w": torch.ones(1)}, "one.pth"), saved({"w": torch.ones(1)}, "two.pth")
    assert "--to" in refused(one)
    assert "gguf" in refused(one, "--to", "gguf")
    assert "suffix" in refused(one, "-o", "out.xyz")
    assert "several" in refused(one, two, "-o", "out.pth")
    assert "several" in refused(one, two, "--to", "safetensors", "-o", "out.safetensors")
    assert "--dtype" in refused(one, "--to", "safetensors", "--keep", "*")
    for dtype in ("int8", "float33", "bool", "complex64", "float4_e2m1fn_x2"):
        assert dtype in refused(one, "--to", "safetensors", "--dtype", dtype)
    refused(one, "--to", "safetensors", "--map-location", "gpu7")
    refused(one, "--to", "safetensors", "--root", "nowhere")
    refused("absent.pth", "--to", "safetensors")
    refused(FIXTURES / "bad" / "html.pth", "--to", "safetensors", "-o", "o.safetensors")
    refused(FIXTURES / "sharded_broken", "-o", "o.safetensors")


def test_no_weights_are_an_error_and_never_an_empty_file(refused: Callable[..., str], saved: Saved) -> None:
    assert "no tensor" in refused(saved({"epoch": 3, "names": ["a"]}), "-o", "o.safetensors")


def test_an_input_and_what_exists_are_not_overwritten(refused: Callable[..., str], run: Run, saved: Saved) -> None:
    path = saved({"w": torch.ones(3)})
    assert "in-place" in refused(path, "--to", "torch")
    assert "in-place" in refused(path, "-o", path, "--force")
    Path("saved.safetensors").write_text("mine")
    assert "--force" in refused(path, "--to", "safetensors")
    refused(path, "--to", "npz", "--report", path, "--force")
    assert run("convert", path, "--to", "safetensors", "--force")[0] == 0
    assert load_file("saved.safetensors")["w"].tolist() == [1.0] * 3


def test_in_place_replaces_the_input_whole(convert: Callable[..., Any], saved: Saved) -> None:
    path = saved({"w": torch.randn(1000), "n": torch.arange(3)})
    expected = {key: tensor.bfloat16() if tensor.is_floating_point() else tensor for key, tensor in load(path).items()}
    held, before = path.open("rb"), path.read_bytes()
    convert(path, "--to", "torch", "--in-place", "--dtype", "bf16")
    assert_same_state(load(path), expected)
    assert held.read() == before
    held.close()
    assert os.listdir() == ["saved.pth"]


def test_several_inputs_are_converted_beside_themselves_with_a_summary(run: Run, saved: Saved) -> None:
    states = {name: {"w": torch.randn(3), name: torch.ones(1)} for name in ("one", "two", "three")}
    paths = [saved(state, f"{name}.pth") for name, state in states.items()]
    code, out, err = run("convert", *paths, "--to", "safetensors")
    assert (code, err) == (0, "")
    assert all(f"{name}.safetensors" in out for name in states)
    assert "3 converted" in out.splitlines()[-1]
    for name, state in states.items():
        assert {key: bits(t) for key, t in load_file(f"{name}.safetensors").items()} == {
            key: bits(t) for key, t in state.items()
        }
    code, out, _ = run("convert", *paths, "--to", "safetensors", "--force", "--json", "--report", "r.json")
    document = json.loads(out)
    assert [row["input"] for row in document["result"]] == [str(path) for path in paths]
    assert json.loads(Path("r.json").read_text()) == document


def test_two_inputs_with_one_output_are_refused(refused: Callable[..., str], saved: Saved) -> None:
    one = saved({"w": torch.ones(1)}, "m.pth")
    two = saved({"w": torch.ones(2)}, "m.pt")
    assert "one name" in refused(one, two, "--to", "safetensors")
    assert "one name" in refused(one, one, "--to", "safetensors")


def test_an_output_that_exists_stops_all_before_the_first(refused: Callable[..., str], saved: Saved) -> None:
    one, two = saved({"w": torch.ones(1)}, "one.pth"), saved({"w": torch.ones(2)}, "two.pth")
    Path("two.safetensors").write_text("mine")
    refused(one, two, "--to", "safetensors")


def test_a_dry_run_tells_and_writes_nothing(run: Run, saved: Saved) -> None:
    path = saved({"state_dict": {"w": torch.ones(3)}, "epoch": 3})
    code, out, err = run("convert", path, "--to", "safetensors", "--dtype", "bf16", "--dry-run", "--report", "r.json")
    assert (code, err) == (0, "")
    assert "dry run" in out
    assert "saved.safetensors" in out
    assert sorted(os.listdir()) == ["r.json", "saved.pth"]


def test_a_dry_run_tells_what_would_be_left_out(run: Run, saved: Saved) -> None:
    path = saved({"state_dict": {"w": torch.ones(3)}, "epoch": 3})
    document = json.loads(run("convert", path, "--to", "safetensors", "--dry-run", "--json")[1])
    assert document["result"][0]["left_out"] == ["epoch"]


REFUSALS: dict[str, list[Any]] = {
    "a dtype that safetensors lacks": ["dtypes.pth", "-o", "o.safetensors"],
    "a dtype that shards lack": ["dtypes.pth", "--to", "sharded", "-o", "o"],
    "a dtype that npz lacks": ["dtypes.pth", "-o", "o.npz"],
    "a dtype that the stream lacks": ["dtypes.pth", "--to", "torch-legacy", "-o", "o.pth"],
    "quantised and sparse in safetensors": ["composite.pth", "-o", "o.safetensors"],
    "quantised and sparse in npz": ["composite.pth", "-o", "o.npz"],
    "nested in the stream": ["composite.pth", "--to", "torch-legacy", "-o", "o.pth"],
    "a dtype that npz lacks after a cast": ["resnet_old.pth", "-o", "o.npz", "--dtype", "bf16"],
    "a directory for a file": ["resnet_old.pth", "-o", "taken"],
    "a file for a directory": ["resnet_old.pth", "--to", "sharded", "-o", "taken.safetensors"],
    "a file that exists": ["resnet_old.pth", "-o", "taken.safetensors"],
    "shards that exist": ["resnet_old.pth", "--to", "sharded", "-o", "taken", "--max-shard-size", "30KB"],
    "a whole file where shards would go": ["tied.pth", "--to", "sharded", "-o", "whole", "--max-shard-size", "90"],
    "no such directory": ["resnet_old.pth", "-o", "absent/o.pth"],
    "no such directory for shards": ["resnet_old.pth", "--to", "sharded", "-o", "absent/o"],
    "a tag that is no device": ["resnet_old.pth", "-o", "o.pth", "--map-location", "gpu"],
    "a name that is another's member": ["npy.pth", "-o", "o.npz"],
    "keys that are no text": ["numbers.pth", "-o", "o.safetensors"],
    "keys that are no text, in shards": ["numbers.pth", "--to", "sharded", "-o", "o"],
    "an object with tensors": ["hidden.pth", "-o", "o.safetensors"],
    "a dtype that torch lacks": ["six.safetensors", "-o", "o.pth"],
    "a dtype that torch lacks, in the stream": ["six.safetensors", "--to", "torch-legacy", "-o", "o.pth"],
    "metadata with the name of a tie": ["clash.pth", "-o", "o.safetensors", "--metadata", "head"],
    "a digest that is taken": ["clash.pth", "-o", "absent/o.pth", "--publish"],
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_a_dry_run_refuses_what_the_run_would_refuse_in_the_same_words(
    name: str, refused: Callable[..., str], saved: Saved
) -> None:
    source, *options = REFUSALS[name]
    Path("taken").mkdir()
    Path("whole").mkdir()
    for path in ("taken.safetensors", "taken/model-00002-of-00002.safetensors", "whole/model.safetensors"):
        Path(path).write_text("mine")
    w = torch.ones(2)
    saved({"a": w, "a.npy": torch.zeros(1)}, "npy.pth")
    saved({0: w, "b": w, 2: torch.ones(1)}, "numbers.pth")
    saved({"state_dict": {"b": w, "_extra_state": (torch.ones(1), 3)}}, "hidden.pth")
    saved({"head": "text", "state_dict": {"emb": w, "head": w}}, "clash.pth")
    Path("six.safetensors").write_bytes(six_bits())
    path = FIXTURES / source if (FIXTURES / source).exists() else source
    err = refused(path, *options)
    assert refused(path, *options, "--dry-run") == err


def six_bits() -> bytes:
    """A file of two tensors of 6-bit floats, which safetensors has and torch has not."""
    entries = {"e2": "F6_E2M3", "e3": "F6_E3M2"}
    header = {
        name: {"dtype": dtype, "shape": [4], "data_offsets": [3 * number, 3 * number + 3]}
        for number, (name, dtype) in enumerate(entries.items())
    }
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + b"abcdef"


def test_all_that_torch_has_no_dtype_for_is_named_at_once(refused: Callable[..., str]) -> None:
    Path("six.safetensors").write_bytes(six_bits())
    for options in (["-o", "o.pth"], ["-o", "o.pth", "--to", "torch-legacy"]):
        err = refused("six.safetensors", *options)
        assert "e2 (float6_e2m3fn), e3 (float6_e3m2fn)" in err


@pytest.mark.parametrize(
    "options",
    [["-o", "o.pth"], ["-o", "o.pth", "--to", "torch-legacy"], ["-o", "o.safetensors"], ["-o", "o.npz"],
     ["-o", "o", "--to", "sharded", "--max-shard-size", "1MB"], ["-o", "o.safetensors", "--dtype", "bf16"],
     ["-o", "o.pth", "--untie"], ["-o", "o.pth", "--publish"]],
    ids=" ".join,
)  # fmt: skip
def test_a_dry_run_knows_about_how_large_it_will_be(
    options: list[str], convert: Callable[..., Any], saved: Saved
) -> None:
    w = torch.randn(300, 700)
    state = {"state_dict": {"a": w, "b": w, "c": torch.randn(700, 300).t()}, "epoch": 3, "optimizer": {"m": w * 2}}
    path = saved(state)
    planned = convert(path, *options, "--dry-run")
    done = convert(path, *options)
    assert planned["nbytes"] == pytest.approx(done["nbytes"], rel=0.01)
    assert planned["left_out"] == done["left_out"]
    assert (planned["verified"], done["verified"]) == (False, True)


def test_nothing_is_written_where_a_later_input_will_be_refused(refused: Callable[..., str], saved: Saved) -> None:
    paths = [saved({"w": torch.ones(2)}, "one.pth"), saved({"w": torch.ones(2, dtype=torch.complex128)}, "two.pth")]
    assert "w (complex128)" in refused(*paths, "--to", "safetensors")


def test_one_inputs_output_is_not_written_over_another_input(refused: Callable[..., str], saved: Saved) -> None:
    paths = [saved({"w": torch.ones(2)}, "a.pth"), saved({"w": torch.zeros(2)}, "a.legacy.pth")]
    assert "in-place" in refused(*paths, "--to", "torch-legacy", "--force")


# --- what stays and what is left out ---------------------------------------------------------------------------------


def test_to_safetensors_only_the_weights_go_and_the_rest_is_named(run: Run) -> None:
    code, out, err = run("convert", NESTED, "-o", "out.safetensors")
    assert (code, err) == (0, "")
    line = next(line for line in out.splitlines() if "left out" in line)
    assert all(name in line for name in ("epoch", "arch", "best_acc1", "optimizer", "scheduler", "args"))
    expected = torch_load(NESTED)["model"]
    found = load_file("out.safetensors")
    assert {key: bits(tensor) for key, tensor in found.items()} == {key: bits(t) for key, t in expected.items()}


def test_scalars_are_carried_into_the_metadata_when_named(run: Run, refused: Callable[..., str]) -> None:
    assert run("convert", NESTED, "-o", "out.safetensors", "--metadata", "epoch,arch,best_acc1")[0] == 0
    with safe_open("out.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "epoch": "41", "arch": "resnet18", "best_acc1": "71.25"}
    assert "nope" in refused(NESTED, "-o", "two.safetensors", "--metadata", "epoch,nope")
    for name in ("args", "optimizer", "model"):
        assert name in refused(NESTED, "-o", "two.safetensors", "--metadata", name)


def test_what_is_carried_is_not_said_to_be_left_out(convert: Callable[..., Any]) -> None:
    for extra in ([], ["--dry-run"], ["--publish"]):
        result = convert(NESTED, "-o", "out.safetensors", "--metadata", "epoch,arch", *extra)
        assert result["left_out"] == ["best_acc1", "optimizer", "scheduler", "args"]


def test_every_missing_scalar_is_named_at_once(refused: Callable[..., str]) -> None:
    err = refused(NESTED, "-o", "two.safetensors", "--metadata", "nope,epoch,args,neither")
    assert all(name in err for name in ("nope", "args", "neither"))
    assert "epoch" not in err


def test_metadata_reaches_the_shards_too(convert: Callable[..., Any]) -> None:
    convert(NESTED, "--to", "sharded", "-o", "out", "--metadata", "epoch", "--max-shard-size", "20KB")
    shards = sorted(Path("out").glob("*.safetensors"))
    assert len(shards) > 1
    with safe_open(shards[0], "pt") as file:
        assert file.metadata()["epoch"] == "41"


def test_metadata_that_reads_like_a_key_is_not_lost_and_not_a_tie(convert: Callable[..., Any], saved: Saved) -> None:
    path = saved({"arch": "w", "state_dict": {"w": torch.ones(2)}})
    convert(path, "-o", "out.safetensors", "--metadata", "arch")
    with safe_open("out.safetensors", "pt") as file:
        assert file.metadata().get("arch") == "w"
    assert list(ckptool.open("out.safetensors").state_dict()) == ["w"]


@pytest.mark.parametrize(
    "options",
    [["-o", "o.safetensors"], ["--to", "sharded", "-o", "o"], ["--to", "sharded", "-o", "o", "--max-shard-size", "8"]],
    ids=" ".join,
)
def test_metadata_that_reads_like_a_key_stays_a_text_however_often_it_is_rewritten(
    options: list[str], convert: Callable[..., Any], saved: Saved
) -> None:
    w = torch.ones(2)
    path = saved({"arch": "w", "twin": "b", "state_dict": {"w": w, "b": torch.zeros(2), "tied": w}})
    convert(path, *options, "--metadata", "arch,twin")
    for again in ("again.safetensors", "more.safetensors"):
        opened = ckptool.open(options[options.index("-o") + 1])
        assert list(opened.state_dict()) == ["w", "b", "tied"]
        assert (opened.metadata["arch"], opened.metadata["twin"]) == ("w", "b")
        convert(opened.url, "-o", again)
        options = ["-o", again]
    convert("more.safetensors", "-o", "back.pth")
    assert_same_state(load("back.pth"), load(path)["state_dict"])


def test_a_tie_that_was_dropped_leaves_no_record_behind() -> None:
    save_file({"emb": torch.ones(2)}, "in.safetensors", {"head": "emb", "author": "someone"})
    opened = ckptool.open("in.safetensors")
    assert list(opened.state_dict()) == ["emb", "head"]
    ckptool.save(opened.with_state_dict({"emb": opened.state_dict()["emb"]}), "out.safetensors")
    with safe_open("out.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "author": "someone"}
    ckptool.save(opened.with_state_dict({"head": opened.state_dict()["head"]}), "head.safetensors")
    with safe_open("head.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "author": "someone"}


@pytest.mark.parametrize("text", ["", "x", "{}", "[1, null]", "[" * 100_000, '["other"]'])
def test_a_word_on_what_is_no_tie_that_makes_no_sense_is_no_harm(text: str) -> None:
    save_file({"emb": torch.ones(2)}, "in.safetensors", {"head": "emb", "ckptool.no_alias": text})
    assert list(ckptool.open("in.safetensors").state_dict()) == ["emb", "head"]


def test_words_that_mean_something_in_safetensors_are_no_scalars_to_carry(
    refused: Callable[..., str], saved: Saved
) -> None:
    path = saved({"format": "mine", "total_size": 3, "state_dict": {"w": torch.ones(2)}})
    err = refused(path, "-o", "o.safetensors", "--metadata", "format,total_size")
    assert "format" in err
    assert "total_size" in err


def test_metadata_that_cannot_be_carried_is_refused_where_the_format_has_no_place(
    refused: Callable[..., str],
) -> None:
    assert "metadata" in refused(NESTED, "-o", "out.npz", "--metadata", "epoch")


def test_root_picks_what_is_converted(convert: Callable[..., Any]) -> None:
    ema = torch_load(FIXTURES / "ema.pth")
    result = convert(FIXTURES / "ema.pth", "-o", "out.safetensors", "--root", "state_dict_ema")
    assert "state_dict" in result["left_out"]
    found = load_file("out.safetensors")
    assert {key: bits(t) for key, t in found.items()} == {key: bits(t) for key, t in ema["state_dict_ema"].items()}
    convert(FIXTURES / "ema.pth", "-o", "main.safetensors")
    main_weights = load_file("main.safetensors")
    assert {key: bits(t) for key, t in main_weights.items()} == {key: bits(t) for key, t in ema["state_dict"].items()}


def test_a_root_below_several_steps_is_found(convert: Callable[..., Any], saved: Saved) -> None:
    path = saved({"runs": [{"net": {"w": torch.ones(2)}}, {"net": {"w": torch.zeros(2)}}]})
    convert(path, "-o", "out.safetensors", "--root", "runs/1/net")
    assert load_file("out.safetensors")["w"].tolist() == [0.0, 0.0]


# --- publish ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("output", ["best.pth", "best.safetensors", "best.pth.tar", "sub/best.v2.pt"])
def test_publish_writes_the_weights_with_their_digest_in_the_name(output: str, convert: Callable[..., Any]) -> None:
    Path("sub").mkdir()
    result = convert(NESTED, "-o", output, "--publish")
    path = Path(result["output"])
    suffix = ".pth.tar" if output.endswith(".pth.tar") else Path(output).suffix
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert str(path) == f"{output.removesuffix(suffix)}-{digest[:8]}{suffix}"
    assert set(result["left_out"]) == {"epoch", "arch", "best_acc1", "optimizer", "scheduler", "args"}
    assert not Path(output).exists()
    found = load_file(path) if suffix == ".safetensors" else load(path)
    expected = torch_load(NESTED)["model"]
    assert {key: bits(t) for key, t in found.items()} == {key: bits(t) for key, t in expected.items()}


def test_torchvisions_loader_takes_what_was_published(convert: Callable[..., Any], monkeypatch: Any) -> None:
    path = Path(convert(NESTED, "-o", "resnet18.pth", "--publish")["output"])
    from torch.hub import HASH_REGEX, load_state_dict_from_url

    assert HASH_REGEX.search(path.name)
    found = load_state_dict_from_url(path.absolute().as_uri(), "hub", progress=False, check_hash=True)
    assert_same_state(found, torch_load(NESTED)["model"])


def test_publish_leaves_out_averages_and_keeps_module_versions(convert: Callable[..., Any]) -> None:
    result = convert(FIXTURES / "ema.pth", "-o", "out.pth", "--publish")
    assert {"state_dict_ema", "optimizer", "epoch"} <= set(result["left_out"])
    found, expected = load(result["output"]), torch_load(FIXTURES / "ema.pth")["state_dict"]
    assert_identical(found, expected)
    assert found._metadata == expected._metadata


def test_a_whole_model_is_published_as_plain_tensors(convert: Callable[..., Any]) -> None:
    found = load(convert(FIXTURES / "resnet_module.pth", "-o", "out.pth", "--publish")["output"])
    assert len(found) == 122
    assert {(type(tensor), tensor.requires_grad) for tensor in found.values()} == {(torch.Tensor, False)}


def test_publishing_twice_gives_the_same_name_and_does_not_overwrite(run: Run) -> None:
    assert run("convert", NESTED, "-o", "m.pth", "--publish")[0] == 0
    listing = os.listdir()
    code, _, err = run("convert", NESTED, "-o", "m.pth", "--publish")
    assert (code, "exists" in err, os.listdir()) == (2, True, listing)
    assert run("convert", NESTED, "-o", "m.pth", "--publish", "--force")[0] == 0
    assert os.listdir() == listing


def test_shards_that_are_published_have_no_digest_and_it_is_said(run: Run) -> None:
    code, out, err = run("convert", NESTED, "--to", "sharded", "-o", "out", "--publish")
    assert (code, err) == (0, "")
    assert "no digest" in out
    assert sorted(os.listdir("out")) == ["model.safetensors"]
    document = json.loads(run("convert", NESTED, "--to", "sharded", "-o", "two", "--publish", "--json")[1])
    assert any("no digest" in note for note in document["notes"])
    assert document["result"][0]["left_out"] == ["epoch", "arch", "best_acc1", "optimizer", "scheduler", "args"]


def test_what_is_published_may_lie_beside_its_input(convert: Callable[..., Any], saved: Saved, run: Run) -> None:
    path = saved({"state_dict": {"w": torch.ones(3)}, "epoch": 3})
    before = path.read_bytes()
    code, _, err = run("convert", path, "--to", "torch", "--publish")
    assert (code, err) == (0, "")
    digest = hashlib.sha256(next(Path().glob("saved-*.pth")).read_bytes()).hexdigest()
    assert sorted(os.listdir()) == [f"saved-{digest[:8]}.pth", "saved.pth"]
    assert path.read_bytes() == before


def test_a_dry_run_of_publish_says_that_the_name_will_be_another(run: Run) -> None:
    code, out, _ = run("convert", NESTED, "-o", "out.pth", "--publish", "--dry-run")
    assert code == 0
    assert "sha256" in out
    assert os.listdir() == []


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


# --- devices ---------------------------------------------------------------------------------------------------------


def on_cuda(path: Path, name: str = "cuda.pth") -> Path:
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(name, "w") as new:
        for item in old.infolist():
            data = old.read(item)
            if item.filename.endswith("data.pkl"):
                data = data.replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:1")
            new.writestr(item.filename, data)
    return Path(name)


def tags(path: Path | str) -> set[bytes]:
    with zipfile.ZipFile(path) as archive:
        pickled = next(archive.read(name) for name in archive.namelist() if name.endswith("data.pkl"))
    return {tag for tag in (b"cpu", b"cuda:0", b"cuda:1") if tag in pickled}


@pytest.mark.parametrize(
    ("option", "expected"),
    [([], b"cuda:1"), (["--map-location", "cpu"], b"cpu"), (["--map-location", "cuda:1=cuda:0"], b"cuda:0"),
     (["--map-location", "cuda:0=cpu,cuda:1=cpu"], b"cpu"), (["--map-location", "cuda:5=cpu"], b"cuda:1")],
)  # fmt: skip
def test_device_tags_are_data_and_are_mapped_on_the_way_out(
    option: list[str], expected: bytes, convert: Callable[..., Any], saved: Saved
) -> None:
    source = on_cuda(saved({"w": torch.randn(3), "opt": {"m": torch.ones(2)}}))
    for extra in ([], ["--dtype", "bf16"]):
        convert(source, "-o", "out.pth", *option, *extra)
        assert tags("out.pth") == {expected}
    if expected == b"cpu":
        load("out.pth")


# --- proof -----------------------------------------------------------------------------------------------------------

OUTPUTS = [["-o", "o.pth"], ["-o", "o.pth", "--to", "torch-legacy"], ["-o", "o.safetensors"], ["-o", "o.npz"],
           ["-o", "o", "--to", "sharded"], ["-o", "o", "--to", "sharded", "--max-shard-size", "4000"]]  # fmt: skip


@pytest.mark.parametrize("options", OUTPUTS, ids=" ".join)
@pytest.mark.parametrize("extra", [[], ["--dtype", "bf16"], ["--untie"], ["--publish"]], ids=" ".join)
def test_a_byte_that_was_written_wrong_is_found_and_nothing_is_left(
    options: list[str],
    extra: list[str],
    refused: Callable[..., str],
    saved: Saved,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if "o.npz" in options and "bf16" in extra:
        pytest.skip("NumPy has no bfloat16")
    path = saved({"a": torch.arange(1000.0), "b": torch.arange(1000.0) + 1})
    damaged(monkeypatch, 2000 if "bf16" in extra else 4000)
    err = refused(path, *options, *extra)
    assert "a" in err


def test_a_broken_header_is_found(refused: Callable[..., str], saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved({"w": torch.ones(4)})
    write = Output.write

    def cut(self: Output, data: Any) -> None:
        write(self, bytes(data).replace(b'"F32"', b'"F64"'))

    monkeypatch.setattr(Output, "write", cut)
    refused(path, "-o", "o.safetensors")


def test_a_tensor_that_went_missing_is_found(
    refused: Callable[..., str], saved: Saved, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ckptool.formats import safetensors

    path = saved({"w": torch.ones(4), "gone": torch.ones(2)})
    write = safetensors.safetensors_file.write

    def lose(tensors: Any, *rest: Any) -> None:
        write({key: tensor for key, tensor in tensors.items() if key != "gone"}, *rest)

    monkeypatch.setattr(safetensors.safetensors_file, "write", lose)
    assert "gone" in refused(path, "-o", "o.safetensors")


def test_no_verify_skips_the_proof(run: Run, saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved({"w": torch.arange(1000.0)})
    damaged(monkeypatch, 4000)
    code, out, _ = run("convert", path, "-o", "o.safetensors", "--no-verify", "--json")
    assert (code, json.loads(out)["result"][0]["verified"]) == (0, False)
    assert bits(load_file("o.safetensors")["w"]) != bits(torch.arange(1000.0))


def test_proof_is_the_default_and_says_so(run: Run, saved: Saved) -> None:
    path = saved({"w": torch.tensor([float("nan"), 1.0])})
    code, out, _ = run("convert", path, "-o", "o.safetensors")
    assert (code, "verified" in out) == (0, True)
    assert "verified" not in run("convert", path, "-o", "o.pth", "--no-verify")[1]


def test_a_failed_proof_of_a_replacement_leaves_the_old_file(
    refused: Callable[..., str], saved: Saved, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved({"w": torch.arange(1000.0)})
    damaged(monkeypatch, 4000)
    refused(path, "-o", path, "--in-place")
    Path("old.safetensors").write_text("precious")
    refused(path, "-o", "old.safetensors", "--force")


# --- what a format cannot hold ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NOT_IN_SAFETENSORS)
@pytest.mark.parametrize("options", [["-o", "o.safetensors"], ["--to", "sharded", "-o", "o"]], ids=" ".join)
def test_all_that_safetensors_cannot_hold_is_named_at_once(
    name: str, options: list[str], refused: Callable[..., str]
) -> None:
    err = refused(FIXTURES / name, *options)
    assert all(f"{key} (" in err for key in NOT_IN_SAFETENSORS[name])


def test_keys_that_are_no_text_are_refused_where_a_format_has_text_only(
    refused: Callable[..., str], convert: Callable[..., Any], saved: Saved
) -> None:
    path = saved({0: torch.ones(2), 1: torch.zeros(2), "1.w": torch.ones(1)})
    convert(path, "-o", "out.pth")
    assert list(load("out.pth")) == [0, 1, "1.w"]
    for output in ("o.safetensors", "o.npz"):
        err = refused(path, "-o", output)
        assert "0" in err
        assert "1" in err


def test_the_library_raises_what_the_command_prints(saved: Saved) -> None:
    with pytest.raises(LossError, match="complex128"):
        ckptool.convert(FIXTURES / "dtypes.pth", "o.safetensors")
    with pytest.raises(UsageError, match="int8"):
        ckptool.convert(saved({"w": torch.ones(1)}), "o.pth", dtype="int8")
    assert os.listdir() == ["saved.pth"]


def test_the_library_converts_and_reports(saved: Saved) -> None:
    path = saved({"w": torch.randn(3, 4).t()})
    report = ckptool.convert(path, "o.safetensors", dtype="bf16")
    assert (report.output, report.tensors, report.verified, report.cast) == ("o.safetensors", 1, True, ["w"])
    assert report.nbytes == os.path.getsize("o.safetensors")
    assert bits(load_file("o.safetensors")["w"]) == bits(load(path)["w"].bfloat16())
    opened = ckptool.open(path)
    assert ckptool.convert(opened, "o.pth").nbytes == os.path.getsize("o.pth")


# --- interrupts and damage -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OUTPUTS, ids=" ".join)
def test_an_interrupt_leaves_nothing(
    options: list[str], run: Run, saved: Saved, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved({"a": torch.arange(1000.0), "b": torch.arange(1000.0) + 1})
    write = Output.write
    seen = []

    def interrupted(self: Output, data: Any) -> None:
        seen.extend([len(data)] if len(data) >= 4000 else [])
        if sum(seen) >= 8000:
            raise KeyboardInterrupt
        write(self, data)

    monkeypatch.setattr(Output, "write", interrupted)
    code, out, err = run("convert", path, *options, "--report", "r.json")
    assert (code, out, err) == (130, "", "ckptool: interrupted\n")
    assert os.listdir() == ["saved.pth"]


SLOW = """
import os, sys, time
from ckptool.cli import main
from ckptool.io.output import Output
write, told = Output.write, []
def slow(self, data):
    write(self, data)
    if self.position > 100_000 and not told:
        told.append(1)
        print("writing", flush=True)
        time.sleep(60)
Output.write = slow
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("options", OUTPUTS, ids=" ".join)
@pytest.mark.parametrize(
    ("number", "code", "said"),
    [(signal.SIGINT, 130, "ckptool: interrupted\n"), (signal.SIGTERM, 143, ""), (signal.SIGHUP, 129, "")],
)
def test_a_signal_in_the_middle_leaves_nothing(
    number: int, code: int, said: str, options: list[str], saved: Saved
) -> None:
    path = saved({"a": torch.randn(50_000), "b": torch.randn(50_000)})
    root = str(Path(ckptool.__file__).parents[1])
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, "convert", str(path), *options], text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": root},
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    assert len(os.listdir()) == 2
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (code, "", said)
    assert os.listdir() == ["saved.pth"]


def test_an_interrupt_of_the_second_leaves_the_first_whole(
    run: Run, saved: Saved, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [saved({"w": torch.arange(1000.0) + number}, f"{number}.pth") for number in range(3)]
    finished = Output.commit

    def commit(self: Output) -> None:
        if self.path.startswith(str(Path("1.safetensors").absolute())) or self.path.endswith("1.safetensors"):
            raise KeyboardInterrupt
        finished(self)

    monkeypatch.setattr(Output, "commit", commit)
    assert run("convert", *paths, "--to", "safetensors")[0] == 130
    assert sorted(os.listdir()) == ["0.pth", "0.safetensors", "1.pth", "2.pth"]
    assert load_file("0.safetensors")["w"].tolist() == list(range(1000))


def test_an_interrupt_while_proving_leaves_nothing(run: Run, saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ckptool.saving.same_bytes", interrupted)
    path = saved({"a": torch.arange(1000.0)})
    for options in OUTPUTS[:3] + OUTPUTS[4:]:
        assert run("convert", path, *options)[0] == 130
        assert os.listdir() == ["saved.pth"]


def test_an_input_that_is_cut_short_meanwhile_leaves_nothing(refused: Callable[..., str], saved: Saved) -> None:
    path = saved({"a": torch.arange(1000.0)})
    opened = ckptool.open(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ckptool.errors.CkptoolError):
        ckptool.convert(opened, "o.safetensors")
    assert os.listdir() == ["saved.pth"]


@pytest.mark.parametrize("to", ["torch", "torch-legacy", "safetensors", "npz"])
def test_two_runs_give_the_same_bytes(to: str, convert: Callable[..., Any]) -> None:
    source = FIXTURES / "tied.pth"
    for name in ("one", "two"):
        convert(source, "--to", to, "-o", name)
    assert Path("one").read_bytes() == Path("two").read_bytes()


def test_names_in_the_output_cannot_reach_the_terminal(run: Run, saved: Saved) -> None:
    path = saved({"state_dict": {"w": torch.tensor([1e6])}, "\x1b[31m": 3})
    code, out, _ = run("convert", path, "-o", "o.safetensors", "--dtype", "fp16")
    assert (code, "\x1b" in out) == (0, False)
