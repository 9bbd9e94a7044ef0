"""What a refusal proposes is done, and gives what it promised; a lock file has the sizes of its tensors."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from oracles import Run, Saved

import ckptool

Refused = Callable[..., str]


def gguf(kinds: dict[str, tuple[int, int]], order: str = "<") -> str:
    """Writes tensors of 256 elements: {name: (type, bytes)}."""
    table, data = b"", b""
    for name, (kind, nbytes) in kinds.items():
        table += struct.pack(f"{order}Q", len(name)) + name.encode()
        table += struct.pack(f"{order}IQIQ", 1, 256, kind, len(data))
        data += bytes(nbytes) + bytes(-nbytes % 32)
    head = b"GGUF" + struct.pack(f"{order}IQQ", 3, len(kinds), 0) + table
    Path("x.gguf").write_bytes(head + bytes(-len(head) % 32) + data)
    return "x.gguf"


Q8_0, Q4_0, Q4_K = (8, 272), (2, 144), (12, 144)


@pytest.mark.parametrize("ending", [".pth", ".safetensors", ".npz"])
def test_blocks_that_can_be_dequantized_say_so(ending: str, run: Run, refused: Refused) -> None:
    path = gguf({"a": Q8_0, "b": Q4_0})
    line = refused("convert", path, "-o", f"out{ending}")
    assert "; `convert --dequantize` gives the values of Q4_0 and Q8_0" in line
    assert run("convert", path, "-o", f"out{ending}", "--dequantize")[0] == 0
    assert ckptool.open(f"out{ending}").state_dict()["a"].dtype == "float32"


def test_blocks_that_cannot_be_do_not(refused: Refused) -> None:
    assert "--dequantize" not in refused("convert", gguf({"a": Q4_K}), "-o", "out.pth")
    assert "--dequantize" not in refused("convert", gguf({"a": Q8_0}, ">"), "-o", "out.pth")
    assert "the values of Q8_0\n" in refused("convert", gguf({"a": Q8_0, "b": Q4_K}), "-o", "out.safetensors")


@pytest.mark.parametrize("words", [["convert", "code.py:build"], ["remap", "nets.small:Net", "--add-prefix", "x."],
                                   ["filter", "code.py:build"]])  # fmt: skip
def test_a_model_in_code_where_only_a_file_can_be_is_told_where_it_can(words: list[str], refused: Refused) -> None:
    line = refused(*words, "-o", "x.pth")
    assert "no such file, and a model in code is a reference" in line
    assert "load-partial --into" in line


def test_a_path_that_is_no_model_in_code_is_only_absent(refused: Refused) -> None:
    for path in ("code.py", "a b:c", "x.pth"):
        assert "reference" not in refused("convert", path, "-o", "out.pth")


def test_two_values_of_one_name_are_told_how_one_is_renamed(run: Run, refused: Refused, saved: Saved) -> None:
    value = torch.ones(2)
    path = saved({"model": {"a": value}, "model.a": value + 1})
    line = refused("convert", path, "--to", "dcp", "-o", "out")
    assert "`remap --root model --rename a=NAME --to dcp` renames one" in line
    assert run("remap", path, "--root", "model", "--rename", "a=NAME", "--to", "dcp", "-o", "out")[0] == 0
    assert {"/".join(map(str, steps)) for steps, _ in ckptool.open("out").tensors()} == {"model/NAME", "model.a"}


def test_a_lock_file_shows_what_its_tensors_would_take(run: Run, saved: Saved) -> None:
    path = saved({"w": torch.ones(2, 3), "h": torch.ones(5).half(), "s": torch.tensor(1)})
    run("inspect", path, "--lock", "a.lock")
    found = json.loads(run("inspect", "a.lock", "--json")[1])["result"][0]
    of_file = json.loads(run("inspect", path, "--json")[1])["result"][0]
    sizes = {row["key"]: row["nbytes"] for row in of_file["tensors"]}
    assert {row["key"]: row["nbytes"] for row in found["tensors"]} == sizes == {"w": 24, "h": 10, "s": 8}
    assert found["tensor_nbytes"] == of_file["tensor_nbytes"]
    assert " 0 B" not in run("inspect", "a.lock")[1]
    Path("odd.lock").write_text("# ckptool lock 1, 1 keys\nx\tfloat6_e2m3fn\t3\n")
    assert run("inspect", "odd.lock", "--json")[0] == 0
