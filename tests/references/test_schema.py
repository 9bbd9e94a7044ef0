"""Schemas of patterns: each rule, what it says of which key, malformed ones, and drafts."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some
from oracles import FIXTURES, Run
from safetensors.torch import save_file

import ckptool
from ckptool.errors import FormatError
from ckptool.references import draft
from ckptool.references.schema import parse

Saved = Callable[..., Path]
Refused = Callable[..., str]


def model(layers: int = 3, hidden: int = 4, classes: int = 5) -> dict[str, torch.Tensor]:
    state = {"embed.weight": torch.zeros(9, hidden)}
    for layer in range(layers):
        state[f"layers.{layer}.attn.weight"] = torch.zeros(hidden, hidden)
        state[f"layers.{layer}.attn.bias"] = torch.zeros(hidden)
        state[f"layers.{layer}.mlp.weight"] = torch.zeros(16, hidden, dtype=torch.bfloat16)
    return {**state, "head.weight": torch.zeros(classes, hidden), "head.bias": torch.zeros(classes)}


SCHEMA = """
schema = 1

[keys]
"embed.weight" = { shape = ["?", "hidden"], dtype = "float32" }
"layers.{i}.attn.weight" = { shape = ["hidden", "hidden"], dtype = "float32", count = 3 }
"layers.{i}.attn.bias" = { shape = ["hidden"], i = "0..2" }
"layers.*.mlp.weight" = { shape = [16, "hidden"], dtype = ["float16", "bf16"], count = { min = 1, max = 4 } }
"head.weight" = { shape = ["classes", "hidden"] }
"re:head[.]bias" = { shape = ["classes"] }
"""


def failures(run: Run, state: Any, schema: str = SCHEMA, *options: str) -> list[tuple[str, str, str | None]]:
    """(kind, rule, key) of what fails, the same in JSON, in the text and in Python."""
    Path("schema.toml").write_text(schema)
    if isinstance(state, dict):
        torch.save(state, "checked.pth")
        state = "checked.pth"
    code, out, err = run("diff", "schema.toml", state, "--json", *options)
    found = json.loads(out)["result"]
    assert (code, err, found["same"]) == (int(bool(found["failures"])), "", not found["failures"])
    told = run("diff", state, "schema.toml", *options)
    assert (told[0], told[1].startswith("same: " if found["same"] else "differ: ")) == (code, True)
    if not options:
        assert ckptool.check_schema(state, "schema.toml").same is found["same"]
        assert ckptool.check_schema(state, tomllib.loads(schema)).same is found["same"]
    return [(one["kind"], one["rule"], one.get("key")) for one in found["failures"]]


def test_a_checkpoint_that_meets_every_rule_is_the_same(run: Run) -> None:
    for state in (model(), model(hidden=8, classes=2), {f"module.{key}": one for key, one in model().items()}):
        assert failures(run, state) == []
    code, out, _ = run("diff", "schema.toml", "checked.pth")
    assert (code, out.splitlines()[0]) == (0, "same: 12 keys as the schema has it")


def changed(**given: torch.Tensor | None) -> dict[str, torch.Tensor]:
    state = model()
    for name, one in given.items():
        key = name.replace("__", ".")
        if one is None:
            del state[key]
        else:
            state[key] = one
    return state


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"head__weight": None}, [("missing", "head.weight", "head.weight")]),
        ({"head__bias": None}, [("count", "re:head[.]bias", None)]),
        ({"layers__1__attn__weight": None}, [("count", "layers.{i}.attn.weight", None)]),
        ({"layers__1__attn__bias": None}, [("missing", "layers.{i}.attn.bias", "layers.1.attn.bias")]),
        ({"layers__3__attn__bias": torch.zeros(4)}, [("unlisted", "", "layers.3.attn.bias")]),
        ({"layers__3__attn__weight": torch.zeros(4, 4)}, [("count", "layers.{i}.attn.weight", None)]),
        ({"layers__3__mlp__weight": torch.zeros(16, 4).half()}, []),
        ({"layers__0__mlp__weight": torch.zeros(16, 4)}, [("dtype", "layers.*.mlp.weight", "layers.0.mlp.weight")]),
        ({"layers__0__mlp__weight": torch.zeros(15, 4).half()},
         [("shape", "layers.*.mlp.weight", "layers.0.mlp.weight")]),
        ({"layers__2__attn__weight": torch.zeros(4, 6)}, [("shape", "layers.{i}.attn.weight", "layers.2.attn.weight")]),
        ({"layers__2__attn__weight": torch.zeros(6, 6)}, [("shape", "layers.{i}.attn.weight", "layers.2.attn.weight")]),
        ({"layers__2__attn__weight": torch.zeros(4)}, [("shape", "layers.{i}.attn.weight", "layers.2.attn.weight")]),
        ({"embed__weight": torch.zeros(1, 4)}, []),
        ({"embed__weight": torch.zeros(9, 4, 1)}, [("shape", "embed.weight", "embed.weight")]),
        ({"head__bias": torch.zeros(6)}, [("shape", "re:head[.]bias", "head.bias")]),
        ({"extra": torch.zeros(2)}, [("unlisted", "", "extra")]),
        ({"head__weight": torch.zeros(5, 4).double()}, []),
    ],
)  # fmt: skip
def test_the_rule_that_fails_is_named_with_the_key(given: Any, said: Any, run: Run) -> None:
    assert failures(run, changed(**given)) == said


def test_the_text_says_what_was_expected_and_found(run: Run) -> None:
    state = changed(
        layers__2__attn__weight=torch.zeros(4, 6), extra=torch.zeros(2), embed__weight=torch.zeros(9, 4).half()
    )
    failures(run, state)
    code, out, _ = run("diff", "schema.toml", "checked.pth")
    assert code == 1
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert lines[0] == "differ: 1 dtype, 1 shape, 1 unlisted; 10 keys as the schema has it"
    assert "dtype embed.weight expected float32, found float16" in lines
    expected = "expected hidden x hidden (hidden = 4 of embed.weight), found 4x6 rule layers.{i}.attn.weight"
    assert f"shape layers.2.attn.weight {expected}" in lines
    assert "unlisted extra 2 float32" in lines


def test_the_one_tensor_that_disagrees_is_named_even_if_it_is_the_first(run: Run) -> None:
    said = failures(run, changed(embed__weight=torch.zeros(9, 6)))
    assert said == [("shape", "embed.weight", "embed.weight")]
    schema = 'schema = 1\n[keys]\nw = { shape = ["n", "n"] }\n'
    assert failures(run, {"w": torch.zeros(3, 3)}, schema) == []
    assert failures(run, {"w": torch.zeros(3, 4)}, schema) == [("shape", "w", "w")]


def test_sizes_that_are_given_hold_for_the_whole_file(run: Run) -> None:
    schema = SCHEMA.replace("[keys]", "[sizes]\nhidden = 4\n[keys]")
    assert failures(run, model(), schema) == []
    assert {kind for kind, _, _ in failures(run, model(hidden=8), schema)} == {"shape"}
    assert len(failures(run, model(hidden=8), schema)) == 11


def test_forbidden_keys_and_unlisted_ones_that_may_be_there(run: Run) -> None:
    allowed = SCHEMA.replace(
        "schema = 1", 'schema = 1\nunlisted = true\nforbidden = ["*.lora_*", "re:^head.bia", "extra.{i}.x"]'
    )
    state = {**model(), "a.lora_A": torch.zeros(2), "other": torch.zeros(2), "extra.0.x": torch.zeros(1)}
    assert failures(run, state, allowed) == [
        ("forbidden", "*.lora_*", "a.lora_A"), ("forbidden", "re:^head.bia", "head.bias"),
        ("forbidden", "extra.{i}.x", "extra.0.x"),
    ]  # fmt: skip
    assert failures(run, model(), 'schema = 1\nunlisted = true\nforbidden = ["lora"]') == []


def test_required_metadata(run: Run) -> None:
    save_file({"w": torch.zeros(2)}, "x.safetensors", metadata={"format": "pt", "license": "mit"})
    head = "schema = 1\nunlisted = true\n"
    for text, said in (
        ('metadata = ["format", "license"]', []), ('metadata = { format = "pt", license = "*" }', []),
        ('metadata = { format = "tf" }', ["format"]), ('metadata = ["author", "format"]', ["author"]),
        ('metadata = { license = "m?t" }', []),
    ):  # fmt: skip
        assert failures(run, "x.safetensors", head + text) == [("metadata", name, None) for name in said]
    torch.save({"state_dict": model(), "epoch": 3, "arch": "vit"}, "nested.pth")
    assert failures(run, "nested.pth", f'{head}metadata = {{ epoch = "3", arch = "v*" }}') == []
    assert failures(run, "nested.pth", f'{head}metadata = ["lr"]') == [("metadata", "lr", None)]


def test_counters_that_are_missing_or_unlisted_are_bookkeeping(run: Run) -> None:
    norm = {"n.weight": torch.ones(2), "n.num_batches_tracked": torch.tensor(1)}
    old = {"n.weight": torch.ones(2)}
    both = (
        'schema = 1\n[keys]\n"n.weight" = { shape = [2] }\n"*.num_batches_tracked" = { shape = [], dtype = "int64" }\n'
    )
    less = 'schema = 1\n[keys]\n"n.weight" = { shape = [2] }\n'
    assert failures(run, norm, both) == failures(run, old, both) == failures(run, norm, less) == []
    assert "bookkeeping" in run("diff", "schema.toml", "checked.pth")[1]
    assert failures(run, {**norm, "n.num_batches_tracked": torch.tensor([1])}, both) == []
    assert failures(run, {**norm, "n.num_batches_tracked": torch.tensor(1.0)}, both)[0][0] == "dtype"


def test_a_schema_is_held_against_code_a_lock_and_every_format(run: Run, saved: Saved) -> None:
    path = saved(model())
    Path("schema.toml").write_text(SCHEMA)
    run("inspect", path, "--lock", "x.lock")
    run("convert", path, "-o", "x.safetensors")
    run("convert", path, "-o", "sharded/", "--max-shard-size", "100B")
    Path("model_for_schema.py").write_text(
        "import torch\nfrom torch import nn\ndef build(n=9):\n    return nn.Embedding(n, 4)\n"
    )
    for side in (path, "x.lock", "x.safetensors", "sharded"):
        assert run("diff", "schema.toml", side)[0] == 0
    Path("small.toml").write_text("schema = 1\n[keys]\nweight = { shape = [9, 4] }\n")
    assert run("diff", "small.toml", "model_for_schema.py:build")[0] == 0
    assert run("diff", "small.toml", "model_for_schema.py:build", "--arg", "n=8")[0] == 1


def test_options_that_go_with_a_schema_and_those_that_do_not(run: Run, refused: Refused, saved: Saved) -> None:
    state = {**{f"net.{key}": one for key, one in model().items()}, "net.extra": torch.zeros(2)}
    path = saved({"epoch": 1, "deep": {"w": state}})
    Path("schema.toml").write_text(SCHEMA)
    given = ["--strip-prefix-b", "net.", "--ignore", "extra", "--root-b", "deep/w"]
    assert run("diff", "schema.toml", path, *given)[0] == 0
    assert run("diff", "schema.toml", path, *given[:2], *given[4:])[0] == 1
    assert run("diff", "schema.toml", path, *given[:2], *given[4:], "--exit-zero")[0] == 0
    assert run("diff", path, "schema.toml", *(one.replace("-b", "-a") for one in given))[0] == 0
    for option in (["--values"], ["--quick"], ["--devices"], ["--fail-on", "shape"], ["--strip-prefix-a", "x."]):
        assert "does not go with a schema" in refused("diff", "schema.toml", path, *option)
    assert "both are schemas" in refused("diff", "schema.toml", "schema.toml")


def test_where_tensors_are_needed_a_schema_says_in_one_line_what_it_is_for(refused: Refused, saved: Saved) -> None:
    path = saved(model())
    Path("schema.toml").write_text(SCHEMA)
    Path("other.txt").write_text(f"# of ours\n{SCHEMA}")
    for name in ("schema.toml", "other.txt"):
        for args in (
            ["filter", path, "--match", name, "--dry-run"], ["load-partial", path, "--into", name, "--dry-run"],
            ["inspect", name], ["convert", name, "-o", "x.pth"], ["filter", name, "--dry-run"],
        ):  # fmt: skip
            assert "`ckptool diff SCHEMA.toml FILE` holds a checkpoint against it" in refused(*args)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "schema: expected the version, schema = 1, found none"),
        ("schema = 2", "schema: expected the version, schema = 1, found 2"),
        ("schema = true", "schema: expected the version"),
        ("schema = 1\nforbiden = []", "the top: expected schema, unlisted, forbidden, metadata, sizes, keys, found "
         "'forbiden' (did you mean forbidden?)"),
        ("schema = 1\n[keys]\na = { shpae = [1] }",
         "keys.'a': expected shape, dtype, count, found 'shpae' (did you mean shape?)"),
        ('schema = 1\n[keys]\n"a.{i}" = { j = "0" }', "keys.'a.{i}': expected shape, dtype, count, i, found 'j'"),
        ('schema = 1\n[keys]\na = { dtype = "flaot32" }', "keys.'a'.dtype: expected a dtype, found 'flaot32' "
         "(did you mean float32?)"),
        ("schema = 1\n[keys]\na = { dtype = 3 }", "keys.'a'.dtype: expected a dtype, found 3"),
        ("schema = 1\n[keys]\na = { shape = 3 }", "keys.'a'.shape: expected a list of sizes"),
        ("schema = 1\n[keys]\na = { shape = [-1] }", "keys.'a'.shape: expected a size, a name or \"?\", found -1"),
        ("schema = 1\n[keys]\na = { shape = [true] }", "keys.'a'.shape: expected a size"),
        ('schema = 1\n[keys]\na = { shape = ["4*h"] }', "keys.'a'.shape: expected a size"),
        ("schema = 1\n[keys]\na.b = { shape = [1] }", "keys.'a': expected a pattern with dots in quotes: \"a.b\""),
        ("schema = 1\n[keys]\na = [1]", "keys.'a': expected a table"),
        ("schema = 1\n[keys]\na = { count = -1 }", "keys.'a'.count: expected numbers from 0 on"),
        ("schema = 1\n[keys]\na = { count = { min = 3, max = 2 } }", "keys.'a'.count: expected numbers from 0 on"),
        ("schema = 1\n[keys]\na = { count = { mim = 3 } }", "found 'mim' (did you mean min?)"),
        ('schema = 1\n[keys]\na = { count = "2" }', "keys.'a'.count: expected a number"),
        ('schema = 1\n[keys]\n"a.{i}" = { i = "3..1" }', "keys.'a.{i}'.i: expected numbers such as"),
        ('schema = 1\n[keys]\n"a.{i}" = { i = "0,0" }', "keys.'a.{i}'.i: expected numbers in order"),
        ('schema = 1\n[keys]\n"a.{i}" = { i = "0..999999999" }', "expected at most 1,000,000 numbers"),
        ('schema = 1\n[keys]\n"a.{i}" = { i = 3 }', "keys.'a.{i}'.i: expected numbers such as"),
        ('schema = 1\n[keys]\n"a{i}{i}" = {}', "keys.'a{i}{i}': "),
        ('schema = 1\n[keys]\n"re:(" = {}', "keys.'re:(': the pattern 're:(' is no regular expression"),
        ('schema = 1\nforbidden = "x"', "forbidden: expected a list of patterns"),
        ("schema = 1\nforbidden = [1]", "forbidden: expected a list of patterns"),
        ("schema = 1\nunlisted = 1", "unlisted: expected true or false, found 1"),
        ("schema = 1\nmetadata = { a = 1 }", "metadata: expected names"),
        ("schema = 1\nkeys = 3", "keys: expected a table of patterns, found 3"),
        ('schema = 1\n[sizes]\nhidden = "x"', "sizes.'hidden': expected a name and its size, found 'x'"),
        ('schema = 1\n[sizes]\nhiden = 3\n[keys]\na = { shape = ["hidden"] }',
         "sizes.hiden: expected a name that a shape has (did you mean hidden?)"),
        ("schema = 1\n[keys\n", "is no schema: not TOML: "),
        ('schema = 1\n[keys]\na = {}\na = {}\n', "is no schema: not TOML: "),
    ],
)  # fmt: skip
def test_a_malformed_schema_is_one_line_with_what_and_where(
    text: str, said: str, refused: Refused, saved: Saved
) -> None:
    path = saved(model())
    Path("schema.toml").write_text(text)
    line = refused("diff", "schema.toml", path)
    assert line.startswith("ckptool: error: schema.toml: ")
    assert said in line


def test_a_schema_that_is_no_text_or_not_there_is_one_line(refused: Refused, saved: Saved) -> None:
    Path("schema.toml").write_bytes(b"\xff\xfe")
    assert "is no schema: not TOML" in refused("diff", "schema.toml", saved(model()))
    assert "no such file" in refused("diff", "absent.toml", saved(model()))
    with pytest.raises(FormatError):
        parse({"schema": 1, "keys": {"a": {"shape": [10**30, 1.5]}}})


# --- drafts ----------------------------------------------------------------------------------------------------------


def test_a_draft_has_captures_counts_and_names(run: Run, saved: Saved) -> None:
    code, _, err = run("inspect", saved(model()), "--schema", "schema.toml")
    assert (code, err) == (0, "")
    assert (
        Path("schema.toml").read_text()
        == """schema = 1

[sizes]
width = 4

[keys]
"embed.weight" = { shape = [9, "width"], dtype = "float32" }
"layers.{i}.attn.weight" = { shape = ["width", "width"], dtype = "float32", i = "0..2", count = 3 }
"layers.{i}.attn.bias" = { shape = ["width"], dtype = "float32", i = "0..2", count = 3 }
"layers.{i}.mlp.weight" = { shape = [16, "width"], dtype = "bfloat16", i = "0..2", count = 3 }
"head.weight" = { shape = [5, "width"], dtype = "float32" }
"head.bias" = { shape = [5], dtype = "float32" }
"""
    )


WHOLE = ["resnet_122.pth", "tied.pth", "dtypes.pth", "views.pth", "composite.pth", "sharded", "arrays.npz", "ema.pth",
         "resnet_module.pth", "dense.gguf", "resnet_ddp.pth", "lightning.ckpt", "dtypes.safetensors"]  # fmt: skip


@pytest.mark.parametrize("name", WHOLE)
def test_a_draft_takes_its_file_and_refuses_one_with_another_key_shape_or_dtype(name: str, run: Run) -> None:
    assert run("inspect", FIXTURES / name, "--schema", "x.toml")[::2] == (0, "")
    assert run("diff", "x.toml", FIXTURES / name)[::2] == (0, "")
    state = {
        key: torch.empty(one.shape or (), dtype=getattr(torch, one.dtype), device="meta")
        for key, one in ckptool.open(FIXTURES / name).state_dict().items()
        if one.kind == "dense" and hasattr(torch, one.dtype)
    }
    chosen = [key for key in state if not key.endswith("num_batches_tracked")][:: max(1, len(state) // 3)]
    whole = len(state) == len(ckptool.open(FIXTURES / name).state_dict())
    for key in chosen if whole else ():
        one = state[key]
        wider = torch.empty((*one.shape, 2), dtype=one.dtype, device="meta")
        other = torch.empty(one.shape, dtype=torch.int16 if one.dtype != torch.int16 else torch.bool, device="meta")
        less = {name: value for name, value in state.items() if name != key}
        for made in (less, {**state, key: wider}, {**state, key: other}, {**state, f"{key}.more": one}):
            if made:
                assert not ckptool.check_schema(made, "x.toml").same, key


def test_a_draft_refuses_a_missing_layer_and_names_it(run: Run, saved: Saved) -> None:
    run("inspect", saved(model(12)), "--schema", "x.toml")
    state = {key: one for key, one in model(12).items() if not key.startswith("layers.7.")}
    code, out, _ = run("diff", "x.toml", saved(state, "less.pth"))
    assert (code, out.count("layers.7.")) == (1, 3)
    renamed = {key.replace("layers.7.", "layers.12."): one for key, one in model(12).items()}
    assert run("diff", "x.toml", saved(renamed, "renamed.pth"))[0] == 1
    assert run("diff", "x.toml", saved(model(11), "shorter.pth"))[0] == 1
    assert run("diff", "x.toml", saved(model(13), "longer.pth"))[0] == 1


def test_a_draft_of_some_keys_lets_others_be_there(run: Run, saved: Saved) -> None:
    path = saved(model())
    assert run("inspect", path, "--schema", "x.toml", "--include", "head.*")[0] == 0
    assert "unlisted = true" in Path("x.toml").read_text()
    assert run("diff", "x.toml", path)[0] == 0
    assert run("diff", "x.toml", saved(model(classes=6), "six.pth"))[0] == 1


def test_a_draft_replaces_no_file_and_is_of_one_checkpoint(run: Run, refused: Refused, saved: Saved) -> None:
    path = saved(model())
    Path("x.toml").write_text("mine")
    assert run("inspect", path, "--schema", "x.toml")[0] == 2
    assert Path("x.toml").read_text() == "mine"
    refused("inspect", path, path, "--schema", "y.toml")
    assert run("inspect", FIXTURES / "sharded_broken", "--schema", "y.toml")[0] == 2
    assert not Path("y.toml").exists()


SHAPES = some.lists(some.integers(0, 5), max_size=3).map(tuple)
SEGMENT = some.one_of(some.sampled_from(["a", "b", "0", "1", "2", "10", "01", "w", "*", "{i}", "[0]", "?", "re:a", ""]),
                      some.text(max_size=3))  # fmt: skip
KEY = some.lists(SEGMENT, min_size=1, max_size=4).map(".".join)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(some.dictionaries(KEY, some.tuples(SHAPES, some.sampled_from(["float32", "int64"])), min_size=1, max_size=12))
def test_a_draft_of_any_keys_takes_them_and_none_less(forms: dict[str, tuple[tuple[int, ...], str]]) -> None:
    state = {
        key: torch.empty(shape, dtype=getattr(torch, dtype), device="meta") for key, (shape, dtype) in forms.items()
    }
    schema = tomllib.loads(draft.text(ckptool.open(state, root=()).state_dict(), whole=True))
    opened = ckptool.open(state, root=())
    assert ckptool.check_schema(opened, schema).failures == []
    for key in state:
        less = {name: one for name, one in state.items() if name != key}
        if less:
            assert not ckptool.check_schema(ckptool.open(less, root=()), schema).same
