"""`remap`: the way back by a saved map, to the last byte."""

from __future__ import annotations

import json
import random
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import FIXTURES, Run, Saved, State, assert_identical, bits, seed_torch, tied_groups
from remapping import (
    CASES,
    DTYPES,
    EVERY_OPERATION,
    GPT2_APART,
    Wrapped,
    assert_bits,
    go_and_return,
    gpt2,
    made,
    put,
    some,
)
from safetensors.torch import load_file, save_file

import ckptool
from ckptool.core.tensor import TensorInfo
from ckptool.ops.remap import invert as op_invert


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
        seed_torch(self.random.randrange(1 << 30))
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


def step(document: Any, number: int) -> Any:
    """Returns one of the steps of a map, whatever batches they are in."""
    return [one for batch in document["steps"] for one in batch][number]


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
    "a shape that does not hold": lambda m: step(m, 1)["args"].update({"from": [5, 5]}),
    "no shape": lambda m: step(m, 1).update(args={}),
    "sizes that do not add up": lambda m: step(m, 2)["args"].update(sizes=[1, 1]),
    "a dim that is not there": lambda m: step(m, 2)["args"].update(dim=7),
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
    "names that are a text": lambda m: step(m, 3).update(new="p2"),
    "dims that are true": lambda m: m["steps"][0][0].update(args={"dims": [True, False]}),
    "dims that are large": lambda m: m["steps"][0][0].update(args={"dims": [0, 10**30]}),
    "a shape of a thousand dims": lambda m: step(m, 1)["args"].update({"from": [6, *[1] * 2000]}),
    "a shape beyond any tensor": lambda m: step(m, 1)["args"].update({"from": [0, 10**30]}),
    "negative sizes": lambda m: step(m, 2)["args"].update(sizes=[-1, 5]),
    "sizes as a number": lambda m: step(m, 2)["args"].update(sizes=2),
    "a negative dim": lambda m: step(m, 2)["args"].update(dim=-1),
    "heads of none": lambda m: step(m, 2).update(op="chunk", args={"dim": 0, "heads": 0, "parts": 2}),
    "parts without end": lambda m: step(m, 2).update(op="chunk", args={"dim": 0, "heads": 1, "parts": 10**9}),
    "heads that do not divide": lambda m: step(m, 2).update(op="chunk", args={"dim": 0, "heads": 3, "parts": 2}),
    "a drop that keeps": lambda m: step(m, 3).update(op="drop"),
    "keys as a number": lambda m: m.update(keys=3),
    "steps as a dict": lambda m: m.update(steps={}),
    "a batch as a dict": lambda m: m.update(steps=[{}]),
    "renames of unequal length": lambda m: step(m, 3).update(old=["p", "r"], new=["p2"]),
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
