"""Metadata of safetensors that names keys: which records are ties, and what follows a rename or a drop."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import Run, Saved
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import ckptool
from ckptool.core import aliases

Tensor = torch.Tensor


def metadata_of(path: str) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return dict(file.metadata() or {})


def write(path: str, *names: str, colon: bool = False) -> str:
    """Writes what torchao's `flatten_tensor_state_dict` gives: weights in parts, plain biases; returns the path."""
    tensors: dict[str, Tensor] = {}
    metadata = {"tensor_names": json.dumps(names)}
    for number, name in enumerate(names):
        module, _, last = name.rpartition(".")
        if last == "bias":
            tensors[name] = torch.full((4,), float(number))
            metadata[name] = json.dumps({"_type": "Tensor"})
            continue
        before = f"{name}:" if colon else f"{module}._{last}_"
        tensors[f"{before}qdata"] = torch.full((4, 4), number, dtype=torch.int8)
        tensors[f"{before}scale"] = torch.full((4, 1), float(number))
        data = {"block_size": [1, 4], "dtype": {"_type": "torch.dtype", "_data": "bfloat16"}, "row": number}
        metadata[name] = json.dumps({"_type": "Int8Tensor", "_data": data, "_tensor_data_names": ["qdata", "scale"]})
    save_file(tensors, path, metadata)
    return path


def unflattened(path: str) -> dict[str, tuple[Any, list[Tensor]]]:
    """Reads the way torchao does: {name: (its recipe, the tensors it is made of)}; nothing may be left over."""
    tensors, metadata = load_file(path), metadata_of(path)
    made = {}
    for name in json.loads(metadata["tensor_names"]):
        recipe = json.loads(metadata[name])
        module, _, last = name.rpartition(".")
        parts = [f"{module}._{last}_{part}" for part in recipe.get("_tensor_data_names", ())] or [name]
        made[name] = (recipe, [tensors.pop(part) for part in parts])
    assert not tensors
    return made


def same(one: tuple[Any, list[Tensor]], other: tuple[Any, list[Tensor]]) -> bool:
    return bool(one[0] == other[0] and all(map(torch.equal, one[1], other[1])))


@pytest.fixture
def quantised() -> str:
    return write("in.safetensors", "net.0.weight", "net.0.bias", "net.1.weight", "net.1.weight_v", "head.weight")


@pytest.fixture
def notes(run: Run) -> Callable[..., list[str]]:
    def notes_of(*args: str) -> list[str]:
        code, out, err = run(*args, "--json")
        assert code == 0, err
        report = json.loads(out)
        results = report["result"] if isinstance(report.get("result"), list) else [report]
        return [note for result in [report, *results] for note in result.get("notes", ())]

    return notes_of


# --- what follows a rename -------------------------------------------------------------------------------------------

RENAMES: dict[str, tuple[list[str], Callable[[str], str]]] = {
    "a prefix": (["--add-prefix", "model."], lambda name: f"model.{name}"),
    "a regex": (["--sub", r"s/^net\.(\d+)/layers.\1.fc/"],
                lambda name: name.replace("net.0", "layers.0.fc").replace("net.1", "layers.1.fc")),
    "numbers shifted": (["--rename", "net.1=net.2", "--rename", "net.0=net.1"],
                        lambda name: name.replace("net.1", "net.2").replace("net.0", "net.1")),
}  # fmt: skip


@pytest.mark.parametrize("kind", RENAMES)
def test_a_tensor_in_parts_takes_its_recipe_along(kind: str, quantised: str, notes: Callable[..., list[str]]) -> None:
    options, named = RENAMES[kind]
    said = notes("remap", quantised, *options, "-o", "out.safetensors")
    before, after = unflattened(quantised), unflattened("out.safetensors")
    assert list(after) == [named(name) for name in before]
    assert all(same(before[name], after[named(name)]) for name in before)
    assert any("follows its tensors" in note and "tensor_names" in note for note in said)
    assert not any("names old keys" in note for note in said)


def test_an_inverse_brings_the_metadata_back(quantised: str, run: Run) -> None:
    run("remap", quantised, "--add-prefix", "m.", "-o", "there.safetensors", "--save-map", "map.json")
    assert run("remap", "there.safetensors", "--invert", "map.json", "-o", "back.safetensors")[0] == 0
    assert metadata_of("back.safetensors") == {"format": "pt", **metadata_of(quantised)}


def test_a_swap_of_two_tensors_swaps_their_recipes(quantised: str, run: Run) -> None:
    Path("t.json").write_text(json.dumps({
        "net.0._weight_qdata": "net.1._weight_qdata", "net.0._weight_scale": "net.1._weight_scale",
        "net.1._weight_qdata": "net.0._weight_qdata", "net.1._weight_scale": "net.0._weight_scale",
    }))  # fmt: skip
    assert run("remap", quantised, "--rules", "t.json", "-o", "out.safetensors")[0] == 0
    before, after = unflattened(quantised), unflattened("out.safetensors")
    assert same(before["net.0.weight"], after["net.1.weight"])
    assert same(before["net.1.weight"], after["net.0.weight"])


@pytest.mark.parametrize("to", ["o.safetensors", "sharded"])
def test_filter_and_load_into_shards_rename_it_too(to: str, quantised: str, notes: Callable[..., list[str]]) -> None:
    out = ["-o", to] if to != "sharded" else ["-o", "out", "--to", "sharded"]
    said = notes("filter", quantised, "--include", "net.*", "--strip-prefix", "net.", "--add-prefix", "m.", *out)
    path = to if to != "sharded" else str(next(Path("out").glob("*.safetensors")))
    before, after = unflattened(quantised), unflattened(path)
    assert list(after) == ["m.0.weight", "m.0.bias", "m.1.weight", "m.1.weight_v"]
    assert all(same(before[name.replace("m.", "net.")], after[name]) for name in after)
    assert any("went with its tensors: head.weight" in note for note in said)


def test_a_copy_has_a_copy_of_the_recipe(quantised: str, run: Run) -> None:
    rules = [{"copy": f"head._weight_{part}", "to": f"tail._weight_{part}"} for part in ("qdata", "scale")]
    made, report = ckptool.remap(quantised, rules)
    assert made.metadata["tail.weight"] == made.metadata["head.weight"]
    assert json.loads(made.metadata["tensor_names"])[-2:] == ["head.weight", "tail.weight"]
    assert report.notes == ["metadata that follows its tensors: head.weight, tensor_names"]


def test_names_with_a_colon_follow_as_well() -> None:
    path = write("in.safetensors", "a.weight", "b.weight", colon=True)
    made, _ = ckptool.remap(path, [[r"^a\.", "x.y."]])
    assert json.loads(made.metadata["tensor_names"]) == ["x.y.weight", "b.weight"]
    assert json.loads(made.metadata["x.y.weight"])["_data"]["row"] == 0
    assert "a.weight" not in made.metadata


SHAPES: dict[str, tuple[dict[str, str], dict[str, str]]] = {
    "an entry of a key": ({"a.weight": "e4m3", "note": "x"}, {"n.a.weight": "e4m3", "note": "x"}),
    "an object": ({"bits": '{"a.weight": 8, "b.weight": 4}'}, {"bits": '{"n.a.weight": 8, "n.b.weight": 4}'}),
    "an object inside": ({"q": '{"v": 1, "bits": {"a.weight": 8}}'}, {"q": '{"v": 1, "bits": {"n.a.weight": 8}}'}),
    "lists inside": ({"g": '{"groups": [["a.weight"], ["b.weight"]]}'},
                     {"g": '{"groups": [["n.a.weight"], ["n.b.weight"]]}'}),
    "names of names": ({"t": '{"b.weight": "a.weight"}'}, {"t": '{"n.b.weight": "n.a.weight"}'}),
    "labels are no keys": ({"id2label": '{"0": "cat", "1": "dog"}'}, {"id2label": '{"0": "cat", "1": "dog"}'}),
}  # fmt: skip


@pytest.mark.parametrize("kind", SHAPES)
def test_json_of_keys_follows(kind: str, saved: Saved) -> None:
    given, expected = SHAPES[kind]
    state = {"a.weight": torch.ones(2), "b.weight": torch.zeros(2), "0": torch.ones(1), "1": torch.ones(1)}
    save_file(state, "in.safetensors", given)
    made, report = ckptool.remap("in.safetensors", [["^", "n."]])
    assert made.metadata == expected
    assert not any("names old keys" in note for note in report.notes)


STALE = {
    "a list of which one is no key": '["a.weight", "gone.weight"]',
    "an object with other names": '{"version": 1, "a.weight": 8}',
    "a text": "skip a.weight, please",
    "a key": "a.weight",
    "YAML": "layers:\n  a.weight: 8\n",
    "a value": '{"tied": "a.weight"}',
}


@pytest.mark.parametrize("text", STALE.values(), ids=STALE)
def test_what_names_an_old_key_and_cannot_follow_is_named(text: str, saved: Saved) -> None:
    save_file({"a.weight": torch.ones(2), "b.weight": torch.zeros(2)}, "in.safetensors", {"my_entry": text, "o": "x"})
    made, report = ckptool.remap("in.safetensors", [["^a", "c"]])
    assert made.metadata == {"my_entry": text, "o": "x"}
    assert "metadata that names old keys and stays as it is: my_entry" in report.notes
    unrelated = ckptool.remap("in.safetensors", [["^b", "c"]])[1]
    assert not any("names old keys" in note for note in unrelated.notes)


def test_parts_that_went_apart_are_named(quantised: str) -> None:
    made, report = ckptool.remap(quantised, [[r"head\._weight_scale", "other._weight_scale"]])
    assert made.metadata["head.weight"] == metadata_of(quantised)["head.weight"]
    stale = next(note for note in report.notes if "names old keys" in note)
    assert "head.weight" in stale
    assert "tensor_names" in stale


def test_what_a_tensor_was_computed_from_is_named(saved: Saved) -> None:
    save_file({"qkv.weight": torch.ones(6, 2), "o": torch.ones(1)}, "in.safetensors", {"qkv.weight": "8 bits"})
    rule = {"split": "qkv.weight", "into": ["q.weight", "k.weight"]}
    made, report = ckptool.remap("in.safetensors", [rule])
    assert made.metadata == {"qkv.weight": "8 bits"}
    assert any("names old keys" in note for note in report.notes)


def test_an_entry_never_takes_the_place_of_another(saved: Saved) -> None:
    save_file({"a.weight": torch.ones(2)}, "in.safetensors", {"a.weight": "one", "c.weight": "two"})
    made, report = ckptool.remap("in.safetensors", [["^a", "c"]])
    assert made.metadata == {"a.weight": "one", "c.weight": "two"}
    assert any("names old keys" in note and "a.weight" in note for note in report.notes)
    made, _ = ckptool.remap("in.safetensors", [["^a.weight", "format"]])
    assert made.metadata == {"a.weight": "one", "c.weight": "two"}


@pytest.mark.parametrize("depth", [10, 900, 950, 980, 1000, 1100, 3000, 9000, 100_000])
def test_metadata_nested_without_end_is_no_harm(depth: int, saved: Saved) -> None:
    text = "[" * depth + '"a.weight"' + "]" * depth
    save_file({"a.weight": torch.ones(2)}, "in.safetensors", {"deep": text})
    made, report = ckptool.remap("in.safetensors", [["^a", "c"]])
    assert made.metadata["deep"] in (text, text.replace("a.w", "c.w"))
    assert any("metadata that" in note for note in report.notes)


def test_a_name_of_underscores_takes_no_time(saved: Saved) -> None:
    keys = {f"m.{'_' * 20_000}{number}": torch.ones(1) for number in range(200)}
    save_file(keys, "in.safetensors", {"m.weight": "x", **dict.fromkeys(keys, "y")})
    made, _ = ckptool.remap("in.safetensors", [["^m", "n"]])
    assert len(made.metadata) == 201


# --- entries of modules -----------------------------------------------------------------------------------------------

MODULES: dict[str, tuple[dict[str, str], list[Any], dict[str, str], list[str]]] = {
    "an entry": ({"layers.0": "8 bits", "layers.1": "4 bits"}, [["^layers", "net"]],
                 {"net.0": "8 bits", "net.1": "4 bits"}, []),
    "an object": ({"bits": '{"layers.0": 8, "layers.1": 4, "head": 2}'}, [["^", "m."]],
                  {"bits": '{"m.layers.0": 8, "m.layers.1": 4, "m.head": 2}'}, []),
    "a list inside": ({"q": '{"by": "me", "skip": ["head", "layers.1.attn"]}'}, [["^", "m."]],
                      {"q": '{"by": "me", "skip": ["m.head", "m.layers.1.attn"]}'}, []),
    "keys and modules": ({"q": '{"layers.0.weight": 8, "layers.1": 4}'}, [["^layers", "net"]],
                         {"q": '{"net.0.weight": 8, "net.1": 4}'}, []),
    "a swap": ({"layers.0": "a", "layers.1.attn": "b"},
               [[r"^layers.0.weight", "x.weight"], [r"^layers.1.attn", "layers.0"], ["^x", "layers.1.attn"],
                [r"^layers.0.bias", "layers.1.attn.bias"]],
               {"layers.1.attn": "a", "layers.0": "b"}, []),
    "a key inside": ({"layers.0": "8 bits"}, [["layers.0.weight", "layers.0.w"]], {"layers.0": "8 bits"}, []),
    "keys that went apart": ({"layers.0": "8 bits", "bits": '{"layers.0": 8}'}, [["layers.0.weight", "fc.weight"]],
                             {"layers.0": "8 bits", "bits": '{"layers.0": 8}'}, ["bits", "layers.0"]),
    "a module that is no more": ({"layers.0": "8 bits"}, [[r"layers.0\.", ""]], {"layers.0": "8 bits"}, ["layers.0"]),
    "a word": ({"head": "large", "o": '{"head": "large"}'}, [["^head", "top"]],
               {"head": "large", "o": '{"head": "large"}'}, ["head", "o"]),
    "a text": ({"note": "layers.0 in 8 bits"}, [["^layers", "net"]], {"note": "layers.0 in 8 bits"}, ["note"]),
    "a text of one word": ({"note": "head"}, [["^head", "top"]], {"note": "head"}, []),
    "escapes": ({"a": '{"layers.\\u0030": 8}'}, [["^layers", "net"]], {"a": '{"net.0": 8}'}, []),
    "a copy": ({"layers.1": "b"}, [{"copy": "layers.1.attn.weight", "to": "layers.2.attn.weight"}],
               {"layers.1": "b", "layers.2": "b"}, []),
    "a copy of one key": ({"layers.0": "a"}, [{"copy": "layers.0.bias", "to": "other.bias"}], {"layers.0": "a"}, []),
    "a computed key": ({"layers.0": "a"}, [{"transpose": "layers.0.weight"}], {"layers.0": "a"}, ["layers.0"]),
    "numbers": ({"version": "0.1", "of": '["0.1"]'}, [["^0.1", "net"]], {"version": "0.1", "of": '["net"]'}, []),
}  # fmt: skip


@pytest.mark.parametrize("kind", MODULES)
def test_an_entry_of_a_module_follows_its_keys_or_is_named(kind: str, saved: Saved) -> None:
    given, rules, expected, stale = MODULES[kind]
    names = ("layers.0.weight", "layers.0.bias", "layers.1.attn.weight", "head.weight", "0.1.weight")
    save_file({name: torch.ones(2, 2) for name in names}, "in.safetensors", given)
    made, report = ckptool.remap("in.safetensors", rules)
    assert made.metadata == expected
    said = [note for note in report.notes if "names old keys" in note]
    assert said == ([f"metadata that names old keys and stays as it is: {', '.join(stale)}"] if stale else [])


def test_the_entry_of_a_module_goes_with_its_last_key(saved: Saved, notes: Callable[..., list[str]]) -> None:
    state = {"layers.0.weight": torch.ones(2), "layers.0.bias": torch.ones(2), "layers.1.weight": torch.ones(2)}
    given = {"layers.0": "8 bits", "layers.1": "4 bits", "bits": '{"layers.0": 8, "layers.1": 4}'}
    save_file(state, "in.safetensors", given)
    assert notes("remap", "in.safetensors", "--drop", "layers.0.bias", "-o", "one.safetensors") == []
    assert metadata_of("one.safetensors") == {"format": "pt", **given}
    for command, option in (("remap", "--drop"), ("filter", "--exclude")):
        said = notes(command, "in.safetensors", option, "layers.0.*", "-o", "out.safetensors", "--force")
        assert "metadata that went with its tensors: layers.0" in said
        assert metadata_of("out.safetensors") == {"format": "pt", "layers.1": "4 bits", "bits": '{"layers.1": 4}'}


def test_texts_that_name_no_key_are_not_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = ckptool.open(write("in.safetensors", *(f"net.{number}.weight" for number in range(99))))
    plain, parsed = aliases._json, []

    def parse(text: str) -> Any:
        parsed.append(text)
        return plain(text)

    monkeypatch.setattr(aliases, "_json", parse)
    made, _ = ckptool.remap(opened, [["^net", "n"]])
    assert len(made.metadata) == 100
    assert parsed == [opened.metadata["tensor_names"]]


# --- what goes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["remap", "filter"])
def test_the_metadata_of_dropped_keys_goes_and_is_named(
    command: str, quantised: str, notes: Callable[..., list[str]]
) -> None:
    how = ["--drop", "net.1.*"] if command == "remap" else ["--exclude", "net.1.*"]
    said = notes(command, quantised, *how, "-o", "out.safetensors")
    before, after = unflattened(quantised), unflattened("out.safetensors")
    assert list(after) == ["net.0.weight", "net.0.bias", "head.weight"]
    assert all(same(before[name], after[name]) for name in after)
    assert "metadata that went with its tensors: net.1.weight, net.1.weight_v" in said


def test_the_metadata_of_a_second_source_is_named(quantised: str, notes: Callable[..., list[str]]) -> None:
    write("more.safetensors", "tail.weight")
    said = notes("filter", quantised, "more.safetensors", "-o", "out.safetensors")
    assert "not taken from more.safetensors: metadata tail.weight, metadata tensor_names" in said
    torch.save({"x": torch.ones(1)}, "x.pth")
    save_file({"y": torch.ones(1)}, "y.safetensors", {"format": "pt"})
    assert notes("filter", "x.pth", "y.safetensors", "-o", "xy.safetensors") == []


def test_only_matched_names_what_of_the_target_is_left_out(saved: Saved, run: Run) -> None:
    save_file({"w": torch.ones(2), "v": torch.ones(3)}, "t.safetensors", {"format": "pt", "arch": "x", "v": "8 bits"})
    save_file({"w": torch.zeros(2)}, "s.safetensors", {"format": "pt", "step": "3"})
    tree = {"model": {"w": torch.ones(2), "_extra": [1]}, "epoch": 3}
    cases = [("t.safetensors", "metadata arch, metadata v"), (saved(tree), "epoch")]
    for path, left in cases:
        for more in ([], ["--json"]):
            code, out, err = run(
                "filter", "s.safetensors", "--match", path, "--only-matched", "-o", "o.safetensors", "--force", *more
            )
            assert code == 0, err
            assert f"not taken from {path}: {left}" in out + err
            assert "not taken from s.safetensors: metadata step" in out + err
    assert metadata_of("o.safetensors") == {"format": "pt"}
    rows = ckptool.filter("s.safetensors", match=saved(tree), only_matched=True)[1].rows
    assert [row.detail for row in rows if row.key == "_extra"] == ["no tensor: left out"]


@pytest.mark.parametrize("command", [("filter", "--match"), ("load-partial", "--into")])
def test_metadata_of_a_source_that_is_not_taken_is_named(
    command: tuple[str, str], notes: Callable[..., list[str]]
) -> None:
    save_file({"w": torch.ones(2)}, "t.safetensors", {"format": "pt", "arch": "x", "same": "1"})
    save_file({"w": torch.zeros(2)}, "s.safetensors", {"format": "pt", "arch": "y", "step": "3", "same": "1"})
    name, option = command
    said = notes(name, "s.safetensors", option, "t.safetensors", "-o", "o.safetensors")
    assert "not taken from s.safetensors: metadata arch, metadata step" in said
    assert metadata_of("o.safetensors") == {"format": "pt", "arch": "x", "same": "1"}


def test_dequantising_takes_the_entries_of_the_scales_along(saved: Saved) -> None:
    state = {"l.weight": torch.ones(8, 4).to(torch.float8_e4m3fn), "l.weight_scale": torch.ones(8, 1)}
    given = {"l.weight": "e4m3", "l.weight_scale": "rows", "names": '["l.weight_scale"]'}
    save_file(state, "in.safetensors", given)
    report = ckptool.convert("in.safetensors", "out.safetensors", dequantize=True)
    assert metadata_of("out.safetensors") == {"format": "pt", "l.weight": "e4m3", "names": "[]"}
    assert "metadata that went with its tensors: l.weight_scale" in report.notes
    assert "metadata that names old keys and stays as it is: l.weight" in report.notes


@pytest.mark.parametrize(("ending", "command"), [(".pth", "convert"), (".npz", "convert"), (".pth", "remap")])
def test_a_format_without_metadata_says_what_it_leaves_out(ending: str, command: str, run: Run) -> None:
    save_file({"w": torch.ones(2)}, "in.safetensors", {"format": "pt", "arch": "resnet", "step": "3"})
    how = ["--add-prefix", "m."] if command == "remap" else []
    for options in (["--json"], []):
        code, out, _ = run(command, "in.safetensors", *how, "-o", f"out{ending}", "--force", *options)
        assert code == 0
        assert "metadata arch" in out
        assert "metadata step" in out
    save_file({"w": torch.ones(2)}, "plain.safetensors", {"format": "pt"})
    assert ckptool.convert("plain.safetensors", f"plain{ending}").left_out == []


def test_shards_that_list_their_own_keys_are_one_list(notes: Callable[..., list[str]]) -> None:
    Path("in").mkdir()
    files = {"a.safetensors": "net.0.weight", "b.safetensors": "net.1.weight"}
    for name, key in files.items():
        write(f"in/{name}", key)
    weight_map = {key: name for name in files for key in load_file(f"in/{name}")}
    Path("in/model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    notes("remap", "in", "--strip-prefix", "net.", "-o", "out.safetensors", "--to", "safetensors")
    after = unflattened("out.safetensors")
    assert list(after) == ["0.weight", "1.weight"]
    assert all(same(after[key[4:]], unflattened(f"in/{name}")[key]) for name, key in files.items())


def test_shards_whose_metadata_differ_are_named(notes: Callable[..., list[str]]) -> None:
    Path("in").mkdir()
    for name in ("a", "b"):
        save_file({name: torch.ones(1)}, f"in/{name}.safetensors", {"format": "pt", "step": f"of {name}"})
    weight_map = {name: f"{name}.safetensors" for name in ("a", "b")}
    Path("in/model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert any("b.safetensors: step" in note for note in notes("inspect", "in"))
    assert ckptool.open("in").metadata["step"] == "of a"


# --- what is a tie ---------------------------------------------------------------------------------------------------

TEXTS = {"base_model": "unet", "arch": "unet", "ss_base.version": "unet", "trigger_word": "a.weight"}


@pytest.mark.parametrize("name", TEXTS)
def test_a_text_that_is_a_tensors_name_is_no_tie(name: str, saved: Saved, notes: Callable[..., list[str]]) -> None:
    save_file({"unet": torch.ones(2), "a.weight": torch.ones(3)}, "in.safetensors", {name: TEXTS[name]})
    opened = ckptool.open("in.safetensors")
    assert set(opened.state_dict()) == {"unet", "a.weight"}
    assert opened.metadata[name] == TEXTS[name]
    assert any(f"{name}: {TEXTS[name]}" in note for note in notes("inspect", "in.safetensors"))
    ckptool.save(opened, "out.safetensors")
    assert metadata_of("out.safetensors")[name] == TEXTS[name]
    assert set(load_file("out.safetensors")) == {"unet", "a.weight"}


@pytest.mark.parametrize(
    ("dropped", "kept"),
    [("lm_head.weight", "model.embed_tokens.weight"), ("cls.decoder.bias", "cls.bias"), ("enc.shared", "shared")],
)
def test_a_record_of_a_tie_is_one(dropped: str, kept: str, saved: Saved) -> None:
    save_file({kept: torch.ones(2)}, "in.safetensors", {dropped: kept})
    tensors = ckptool.open("in.safetensors").state_dict()
    assert tensors[dropped].view == tensors[kept].view


@pytest.mark.parametrize("names", [("emb", "head"), ("head", "emb"), ("emb", "out.weight"), ("w", "v", "u")])
@pytest.mark.parametrize("to", ["o.safetensors", "shards"])
def test_ties_without_dots_come_back(names: tuple[str, ...], to: str, saved: Saved) -> None:
    tensor = torch.ones(2)
    path = saved({**dict.fromkeys(names, tensor), "other": torch.zeros(3)})
    ckptool.convert(path, to, to="sharded" if to == "shards" else None, max_shard_size=8)
    opened = ckptool.open(to)
    assert list(opened.state_dict()) == [*names, "other"]
    assert len({opened.state_dict()[name].view for name in names}) == 1
    assert aliases.ORDER not in opened.metadata


def test_lists_in_the_metadata_of_an_index_stay_json() -> None:
    save_file({"a.w": torch.ones(2)}, "one.safetensors")
    said = {"total_size": 8, "stages": ["a", "b"], "exact": True, "by": {"name": None}, "note": "as it is"}
    Path("model.safetensors.index.json").write_text(
        json.dumps({"metadata": said, "weight_map": {"a.w": "one.safetensors"}})
    )
    metadata = ckptool.open("model.safetensors.index.json").metadata
    assert metadata["note"] == "as it is"
    assert {name: json.loads(metadata[name]) for name in ("stages", "exact", "by")} == {
        name: said[name] for name in ("stages", "exact", "by")
    }


@pytest.mark.parametrize("to", ["safetensors", "sharded"])
def test_metadata_is_set_and_unset_and_the_rest_stays(run: Run, tmp_path: Path, to: str) -> None:
    save_file({"a": torch.ones(2), "b": torch.zeros(3)}, "in.safetensors", {"format": "pt", "old": "1", "kept": "=x"})
    args = ("--set-metadata", "licence=MIT", "--set-metadata", "note=a=b", "--unset-metadata", "old")
    out = "out.safetensors" if to == "safetensors" else "out"
    code, shown, error = run("convert", "in.safetensors", "--to", to, "-o", out, *args, "--max-shard-size", "12")
    assert code == 0, shown + error
    files = [tmp_path / out] if to == "safetensors" else sorted((tmp_path / out).glob("*.safetensors"))
    assert len(files) == (1 if to == "safetensors" else 2)
    for file in files:
        assert metadata_of(str(file)) == {"format": "pt", "kept": "=x", "licence": "MIT", "note": "a=b"}


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--unset-metadata", "lisence"), "no metadata 'lisence' to unset (did you mean licence?)"),
        (("--unset-metadata", "format"), "'format' stays"),
        (("--set-metadata", "total_size=3"), "total_size: is computed"),
        (("--set-metadata", "licence=x", "--unset-metadata", "licence"), "both set and unset"),
        (("--set-metadata", "licence"), "takes NAME=TEXT, not 'licence'"),
        (("--set-metadata", "=x"), "takes NAME=TEXT, not '=x'"),
        (("--to", "torch", "--set-metadata", "a=b"), "--set-metadata goes into safetensors and shards only"),
        (("--to", "npz", "--unset-metadata", "licence"), "--unset-metadata goes into safetensors and shards only"),
    ],
)
def test_metadata_that_cannot_be_set_is_refused_in_one_line(run: Run, args: tuple[str, ...], said: str) -> None:
    save_file({"a": torch.ones(2)}, "in.safetensors", {"licence": "MIT"})
    to = () if "--to" in args else ("--to", "safetensors")
    code, shown, error = run("convert", "in.safetensors", *to, "-o", "out", *args)
    assert (code, shown, error.count("\n")) == (2, "", 1)
    assert said in error
    assert not Path("out").exists()


def test_the_library_sets_metadata_of_a_torch_file_that_becomes_safetensors() -> None:
    torch.save({"w": torch.ones(2)}, "in.pth")
    ckptool.convert("in.pth", "out.safetensors", set_metadata={"format": "np", "step": "3"})
    assert metadata_of("out.safetensors") == {"format": "np", "step": "3"}
    ckptool.convert("out.safetensors", "again.safetensors", set_metadata={"step": "4"}, unset_metadata=["step"][:0])
    assert metadata_of("again.safetensors") == {"format": "np", "step": "4"}
    with pytest.raises(ckptool.UsageError):
        ckptool.convert("in.pth", "other.safetensors", set_metadata={"step": 3})  # type: ignore[dict-item]
