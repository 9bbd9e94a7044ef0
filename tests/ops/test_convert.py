"""`convert`: formats and places, the proof that what was written is what was meant, and interrupts."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from converting import assert_same_state, damaged
from oracles import FIXTURES, Run, Saved, bits, load
from safetensors.torch import load_file, save_file

import ckptool
from ckptool.io.output import LocalOutput

NESTED = FIXTURES / "resnet_nested.pth"


@pytest.fixture
def refused(refused: Callable[..., str]) -> Callable[..., str]:
    """Runs a `convert` that must fail with one line and leave the directory as it is; returns the line."""
    return partial(refused, "convert")


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


def test_without_a_name_a_directory_becomes_a_directory_beside_it(convert: Callable[..., Any]) -> None:
    shutil.copytree(FIXTURES / "sharded", "run/llm")
    assert convert("run/llm", "--to", "safetensors")["output"] == "run/llm-sharded"
    assert convert("run/llm/", "--to", "torch")["output"] == "run/llm-sharded-bin"
    assert convert("run/llm", "--to", "dcp")["output"] == "run/llm-dcp"
    convert("run/llm", "--to", "npz", "--dtype", "float32")  # which has no directory
    assert Path("run/llm.npz").is_file()
    index = "run/llm/model.safetensors.index.json"
    assert convert(index, "--to", "torch")["output"].startswith("run/llm/model")
    found = [ckptool.open(f"run/{name}") for name in ("llm-sharded", "llm-sharded-bin", "llm-dcp")]
    assert all(ckptool.diff("run/llm", one, values=True).same for one in found)


@pytest.mark.parametrize("to", [[], ["--to", "safetensors"], ["--to", "torch"]], ids=" ".join)
@pytest.mark.parametrize("output", ["out", "out/", "Llama-3.1-8B", "v1.0", "there"])
def test_of_a_directory_a_directory_is_written_unless_the_output_ends_as_a_file(
    output: str, to: list[str], convert: Callable[..., Any]
) -> None:
    os.mkdir("there")
    convert(FIXTURES / "sharded", "-o", output, *to)
    assert os.listdir(output) == ["pytorch_model.bin" if "torch" in to else "model.safetensors"]


@pytest.mark.parametrize("output", ["out.pth", "out.safetensors", "out.pth.tar"])
def test_of_a_directory_a_file_is_written_where_the_output_says_one(
    output: str, convert: Callable[..., Any], refused: Callable[..., str]
) -> None:
    convert(FIXTURES / "sharded", "-o", output)
    assert Path(output).is_file()
    assert "no format has this suffix" in refused(FIXTURES / "sharded", "-o", "out.safetensor")
    assert "no format has this suffix" in refused(FIXTURES / "resnet_old.pth", "-o", "out")


def test_what_only_a_file_of_torch_holds_is_one_file(convert: Callable[..., Any]) -> None:
    result = convert(FIXTURES / "dcp", "--to", "torch", "-o", "whole")
    assert (Path("whole").is_file(), result["left_out"]) == (True, [])
    assert Path(convert(FIXTURES / "dcp", "--to", "safetensors", "-o", "weights")["output"]).is_dir()
    assert Path(convert(FIXTURES / "dcp", "-o", "shards")["output"]).is_dir()


def test_the_library_writes_a_directory_of_a_directory_too() -> None:
    assert Path(ckptool.convert(FIXTURES / "sharded", "out").output).is_dir()
    assert Path(ckptool.convert(FIXTURES / "sharded", "bins", to="torch").output).is_dir()
    assert Path(ckptool.convert(FIXTURES / "sharded", "out.pth").output).is_file()


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


def test_a_default_name_that_is_the_input_needs_in_place(
    refused: Callable[..., str], convert: Callable[..., Any], saved: Saved
) -> None:
    path = saved({"w": torch.randn(1000), "n": torch.arange(3)})
    expected = {key: tensor.bfloat16() if tensor.is_floating_point() else tensor for key, tensor in load(path).items()}
    assert "in-place" in refused(path, "--to", "torch")
    convert(path, "--to", "torch", "--in-place", "--dtype", "bf16")
    assert_same_state(load(path), expected)
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
    "a directory for a file": ["resnet_old.pth", "--to", "torch", "-o", "taken"],
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


def test_an_input_that_will_be_refused_is_said_first_and_the_others_are_converted(run: Run, saved: Saved) -> None:
    wrong = saved({"w": torch.ones(2, dtype=torch.complex128)}, "wrong.pth")
    code, out, err = run("convert", wrong, saved({"w": torch.ones(2)}, "right.pth"), "--to", "safetensors", "--json")
    document = json.loads(out)
    assert (code, [row["input"] for row in document["result"]]) == (2, [str(Path("right.pth").resolve())])
    assert [error["kind"] for error in document["errors"]] == ["loss"]
    assert "w (complex128)" in err
    assert sorted(os.listdir()) == ["right.pth", "right.safetensors", "wrong.pth"]


def test_one_inputs_output_is_not_written_over_another_input(refused: Callable[..., str], saved: Saved) -> None:
    paths = [saved({"w": torch.ones(2)}, "a.pth"), saved({"w": torch.zeros(2)}, "a.legacy.pth")]
    assert "in-place" in refused(*paths, "--to", "torch-legacy", "--force")


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
    write = LocalOutput.write

    def cut(self: LocalOutput, data: Any) -> None:
        write(self, bytes(data).replace(b'"F32"', b'"F64"'))

    monkeypatch.setattr(LocalOutput, "write", cut)
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


# --- interrupts and damage -------------------------------------------------------------------------------------------


SLOW = """
import os, sys, time
from ckptool.cli import main
from ckptool.io.output import LocalOutput
write, told = LocalOutput.write, []
def slow(self, data):
    write(self, data)
    if self.position > 100_000 and not told:
        told.append(1)
        print("writing", flush=True)
        time.sleep(60)
LocalOutput.write = slow
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("number", "code", "said", "options"),
    [
        *((signal.SIGINT, 130, "ckptool: interrupted\n", options) for options in (OUTPUTS[0], OUTPUTS[-1])),
        (signal.SIGTERM, 143, "", OUTPUTS[1]),
        (signal.SIGHUP, 129, "", OUTPUTS[3]),
    ],
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
    finished = LocalOutput.commit

    def commit(self: LocalOutput) -> None:
        if self.path.startswith(str(Path("1.safetensors").absolute())) or self.path.endswith("1.safetensors"):
            raise KeyboardInterrupt
        finished(self)

    monkeypatch.setattr(LocalOutput, "commit", commit)
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
