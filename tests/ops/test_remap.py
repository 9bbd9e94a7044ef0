"""`remap`: the file that it writes: bytes of a pure rename, formats and places, and time that grows with the keys."""

from __future__ import annotations

import json
import os
import pickle
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracles import FIXTURES, Run, Saved, assert_identical, bits, torch_load
from remapping import GPT2_APART, gpt2, in_memory, put
from safetensors.torch import load_file, save_file

import ckptool
from ckptool.core.checkpoint import Checkpoint

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

    for name in ("blocks._gathered", "blocks._derived", "codec.import_torch"):
        monkeypatch.setattr(f"ckptool.values.{name}", never)
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


def test_a_directory_of_one_file_goes_into_a_directory(run: Run, refused: Callable[..., str]) -> None:
    for name in ("one", "other"):
        os.mkdir(name)
    save_file({"a": torch.ones(2)}, "one/model.safetensors")
    args = ("remap", "one", "--rename", "a=b", "-o")
    assert run(*args, "other")[0] == 0
    assert os.listdir("other") == ["model.safetensors"]
    assert list(load_file("other/model.safetensors")) == ["b"]
    assert "--in-place" in refused(*args, "one", "--force")
    assert run(*args, "one", "--in-place")[0] == 0
    assert list(load_file("one/model.safetensors")) == ["b"]


def test_a_suffix_that_says_no_format_is_refused_if_the_inputs_format_cannot_be_written(
    refused: Callable[..., str], remap: Callable[..., Any]
) -> None:
    Path("in.pkl").write_bytes(pickle.dumps({"a": np.ones(2, "f4")}))
    assert "no format has this suffix" in refused("remap", "in.pkl", "-o", "x.pkl", "--add-prefix", "x.")
    remap("in.pkl", "x", [{"add_prefix": "x."}])
    assert sorted(os.listdir()) == ["in.pkl", "rules.json", "x"]


def test_in_place_that_fails_leaves_the_file_as_it_was(run: Run, saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    from ckptool.io.output import LocalOutput

    path = saved({"a": torch.ones(1000)})
    before = path.read_bytes()
    write = LocalOutput.write

    def full(self: LocalOutput, data: Any) -> None:
        if len(data) > 3000:
            raise ckptool.errors.OutputError("the disk is full", self.path)
        write(self, data)

    monkeypatch.setattr(LocalOutput, "write", full)
    code, _, err = run("remap", path, "-o", path, "--rename", "a=c", "--in-place")
    assert (code, "disk is full" in err) == (2, True)
    assert path.read_bytes() == before
    assert os.listdir() == ["saved.pth"]


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
    from ckptool.io.output import LocalOutput

    path = saved({"w": torch.arange(1000.0).view(10, 100)})
    Path("rules.json").write_text(json.dumps(rules))
    write = LocalOutput.write

    def flipped(self: LocalOutput, data: Any) -> None:
        write(self, bytes([*data[:-1], data[-1] ^ 1]) if len(data) >= 4000 else data)

    monkeypatch.setattr(LocalOutput, "write", flipped)
    code, _, err = run("remap", path, "-o", "out.pth", "--rules", "rules.json", "--verify")
    assert (code, err.count("\n")) == (2, 1)
    assert sorted(os.listdir()) == ["rules.json", "saved.pth"]
    assert run("remap", path, "-o", "out.pth", "--rules", "rules.json", "--no-verify")[0] == 0


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
    small, large = many(100), many(1000)
    few = lines_run(lambda: ckptool.remap(small, MANY_RULES))
    lot = lines_run(lambda: ckptool.remap(large, MANY_RULES))
    assert lot < 11 * few


def test_the_way_back_grows_with_the_keys_too() -> None:
    undo = []
    for number in (100, 1000):
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
