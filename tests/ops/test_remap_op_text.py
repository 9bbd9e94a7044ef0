"""`remap`: the text that says in a report what was done to a tensor, read back and against published pairs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import FIXTURES, Saved, bits
from remapping import SHAPES, assert_bits, in_memory, put, some

import ckptool

PAIRS = Path(__file__).resolve().parents[3] / "shared" / "remap" / "pairs"


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


SMALL = json.loads((FIXTURES / "pairs.json").read_text())


@pytest.mark.parametrize("name", [*SMALL, *(name for name in REAL if (PAIRS / f"{name}.json").exists())])
def test_a_real_pair_is_mapped_with_the_very_ops_of_the_benchmark(name: str) -> None:
    path = PAIRS / f"{name}.json"
    pair = json.loads(path.read_text()) if path.exists() else SMALL[name]
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
