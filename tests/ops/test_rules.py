"""How rules are written, in which order they apply, and what is refused: through the command line and `Rules.parse`."""

from __future__ import annotations

import functools
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import FIXTURES, bits, compiled

import ckptool
from ckptool.errors import CkptoolError, CollisionError, UsageError

Saved = Callable[..., Path]
Run = Callable[..., tuple[int, str, str]]
Renamed = Callable[..., list[str]]


def numbered(keys: list[str]) -> dict[str, torch.Tensor]:
    """A tensor per key that says by its value which key it came from."""
    return {key: torch.full((2, 3), float(number)) for number, key in enumerate(keys)}


@pytest.fixture
def renamed(saved: Saved, run: Run) -> Renamed:
    """Runs `remap` on tensors of these keys; returns the keys torch.load finds, after a look at every value."""

    def call(keys: list[str], *options: object) -> list[str]:
        path = saved(numbered(keys))
        code, _, err = run("remap", path, "-o", "out.pth", "--force", "--no-fsync", *options)
        assert (code, err) == (0, "")
        loaded = torch.load("out.pth", weights_only=True)
        values = [int(tensor[0, 0]) for tensor in loaded.values()]
        assert values == sorted(values), "keys stand where their old ones stood"
        return list(loaded)

    return call


@pytest.fixture
def refused(saved: Saved, run: Run) -> Callable[..., str]:
    """Runs `remap`, which must refuse with one line and write nothing; returns the line."""

    def call(tensors: dict[str, Any] | list[str], *options: object) -> str:
        path = saved(tensors if isinstance(tensors, dict) else numbered(tensors))
        before = listing()
        code, out, err = run("remap", path, "-o", "out.pth", *options)
        assert (code, out) == (2, "")
        assert err.startswith("ckptool: error: ")
        assert err.count("\n") == 1
        assert listing() == before
        return err

    return call


def listing() -> list[str]:
    return sorted(path.name for path in Path().iterdir())


def in_file(content: Any, name: str = "rules.json") -> Path:
    path = Path(name)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


# --- the order of the command line -----------------------------------------------------------------------------------


def test_rules_apply_in_the_order_in_which_they_are_written(renamed: Renamed) -> None:
    keys = ["module.a.w", "module.b.w"]
    rules = ["--rename", "module=net", "--strip-prefix", "net.", "--rename", "a=net", "--add-prefix", "top."]
    assert renamed(keys, *rules) == ["top.net.w", "top.b.w"]


def test_the_same_options_in_another_order_give_other_keys(renamed: Renamed) -> None:
    before = ["--add-prefix", "x.", "--rename", "a=b", "--strip-prefix", "x.b."]
    after = ["--add-prefix", "x.", "--strip-prefix", "x.a.", "--rename", "a=b"]
    assert renamed(["a.w"], *before) == ["w"]
    assert renamed(["a.a.w"], *after) == ["b.w"]
    assert renamed(["a.w"], "--sub", "s/^/a./", "--rename", "a.a=b", "--sub", "s/b/c/") == ["c.w"]
    assert renamed(["a.w"], "--rename", "a=b", "--sub", "s/^/a./", "--sub", "s/b/c/") == ["a.c.w"]


def test_an_option_of_every_kind_keeps_its_place_among_the_others(renamed: Renamed) -> None:
    table = in_file([{"rename": "five", "to": "six"}])
    keys = ["module.one.w", "module.lost.w"]
    rules = [
        "--sub", "s/one/two/", "--preset", "ddp", "--rename", "two=three", "--add-prefix", "p.",
        "--strip-prefix=p.", "--sub", "s/three/four/", "--drop", "lost.*", "--rename=four=five",
        "--rules", table, "--rename", "six=seven",
    ]  # fmt: skip
    assert renamed(keys, *rules) == ["seven.w"]


def test_options_that_are_no_rules_may_stand_between_them(renamed: Renamed) -> None:
    rules = [
        "--rename",
        "a=b",
        "--no-verify",
        "--rename",
        "b=c",
        "--no-fsync",
        "--strip-prefix",
        "c.",
        "--allow-unused",
    ]
    assert renamed(["a.w"], *rules) == ["w"]


def test_a_rule_sees_what_the_one_before_it_made(renamed: Renamed) -> None:
    assert renamed(["a", "b"], "--rename", "b=t", "--rename", "a=b", "--rename", "t=c") == ["b", "c"]


# --- whole segments --------------------------------------------------------------------------------------------------


def test_a_name_stands_for_whole_segments_only(renamed: Renamed) -> None:
    keys = ["conv.w", "conv1.w", "preconv.w", "a.conv.w", "a.conv", "convs.conv.w"]
    assert renamed(keys, "--rename", "conv=c") == ["c.w", "conv1.w", "preconv.w", "a.c.w", "a.c", "convs.c.w"]


def test_several_segments_are_found_anywhere_and_every_time(renamed: Renamed) -> None:
    keys = ["a.b.a.b.w", "x.a.b", "a.x.b", "xa.b", "a.bx"]
    assert renamed(keys, "--rename", "a.b=c") == ["c.c.w", "x.c", "a.x.b", "xa.b", "a.bx"]


def test_dots_and_brackets_of_a_name_mean_themselves(renamed: Renamed) -> None:
    keys = ["a+b.w", "aab.w", "c[0].w", "axb"]
    assert renamed(keys, "--rename", "a+b=x", "--rename", "c[0]=y") == ["x.w", "aab.w", "y.w", "axb"]
    assert renamed(["a.b", "axb"], "--rename", "a.b=c") == ["c", "axb"]


def test_segments_may_become_fewer_more_or_none(renamed: Renamed) -> None:
    keys = ["model.layer.w"]
    assert renamed(keys, "--rename", "model.layer=m") == ["m.w"]
    assert renamed(keys, "--rename", "layer=a.b.c") == ["model.a.b.c.w"]
    assert renamed(keys, "--rename", "layer=") == ["model.w"]


def test_a_name_in_braces_captures_a_segment(renamed: Renamed) -> None:
    keys = ["blocks.0.attn.w", "blocks.11.attn.b", "blocks.0.mlp.w", "blocks.attn.w"]
    got = renamed(keys, "--rename", "blocks.{i}.attn=layers.{i}.attention")
    assert got == ["layers.0.attention.w", "layers.11.attention.b", "blocks.0.mlp.w", "blocks.attn.w"]


def test_a_capture_may_stand_inside_a_segment(renamed: Renamed) -> None:
    keys = ["layer1.0.conv2.w", "layer12.3.conv1.w", "layer.0.conv1.w"]
    got = renamed(keys, "--rename", "layer{s}.{b}.conv{n}=stages.{s}.{b}.c{n}x")
    assert got == ["stages.1.0.c2x.w", "stages.12.3.c1x.w", "layer.0.conv1.w"]


def test_captures_may_be_swapped_repeated_and_left_out(renamed: Renamed) -> None:
    assert renamed(["a.1.2.w"], "--rename", "a.{i}.{j}=b.{j}.{i}") == ["b.2.1.w"]
    assert renamed(["a.1.w"], "--rename", "a.{i}=b.{i}.{i}x{i}") == ["b.1.1x1.w"]
    assert renamed(["a.1.w"], "--rename", "a.{i}=b") == ["b.w"]


def test_a_capture_named_twice_must_be_the_same_text(renamed: Renamed) -> None:
    keys = ["h.3.n3.w", "h.3.n4.w"]
    assert renamed(keys, "--rename", "h.{i}.n{i}=g.{i}") == ["g.3.w", "h.3.n4.w"]


def test_stars_are_filled_in_from_left_to_right(renamed: Renamed) -> None:
    keys = ["blocks.0.attn.w", "blocks.1.mlp.w"]
    assert renamed(keys, "--rename", "blocks.*.*=layers.*.new_*") == ["layers.0.new_attn.w", "layers.1.new_mlp.w"]
    assert renamed(["s1b2.w"], "--rename", "s*b*=x*.y*") == ["x1.y2.w"]
    assert renamed(["s1.b2.w"], "--rename", "s*.b{i}=x{i}.y*") == ["x2.y1.w"]


def test_a_star_never_spans_a_dot_and_is_never_empty(renamed: Renamed) -> None:
    keys = ["a.b.c.w", "a.x.c", "layer.w"]
    assert renamed(keys, "--rename", "a.*.c=z.*") == ["z.b.w", "z.x", "layer.w"]
    assert renamed(["a.b.x.c", "a.c", "a.q.c"], "--rename", "a.*.c=z.*") == ["a.b.x.c", "a.c", "z.q"]
    assert renamed(["layer.w", "layer1.w"], "--rename", "layer*=l*") == ["layer.w", "l1.w"]


# --- prefixes, sub, drop, presets ------------------------------------------------------------------------------------


def test_a_prefix_is_taken_off_the_keys_that_have_it_once(renamed: Renamed) -> None:
    keys = ["model.w", "model.model.b", "other.w", "x.model.w"]
    assert renamed(keys, "--strip-prefix", "model.") == ["w", "model.b", "other.w", "x.model.w"]


def test_sub_replaces_every_occurrence_and_knows_groups(renamed: Renamed) -> None:
    keys = ["layers.0.w", "layers.10.layers.2.w"]
    assert renamed(keys, "--sub", r"s/layers\.(\d+)/h\1/") == ["h0.w", "h10.h2.w"]
    assert renamed(keys, "--sub", r"s/layers\.(?P<n>\d+)/h\g<n>_/g") == ["h0_.w", "h10_.h2_.w"]
    assert renamed(["a.w"], "--sub", "s/^/b./") == ["b.a.w"]


@pytest.mark.parametrize("text", ["s/a/b/", "s|a|b|", "s,a,b,", "s#a#b#g", "s:a:b:", "sXaXbX"])
def test_sub_takes_any_delimiter(text: str, renamed: Renamed) -> None:
    assert renamed(["a.w", "c.w"], "--sub", text) == ["b.w", "c.w"]


def test_an_escaped_delimiter_is_a_character_of_the_expression(renamed: Renamed) -> None:
    assert renamed(["a/b", "ab"], "--sub", r"s/a\/b/c/") == ["c", "ab"]
    assert renamed(["a/b"], "--sub", "s|/|.|") == ["a.b"]


def test_an_escaped_delimiter_is_a_character_of_the_replacement(renamed: Renamed) -> None:
    assert renamed(["a.w"], "--sub", r"s/a/b\/c/") == ["b/c.w"]


def test_drop_takes_globs_of_whole_names_and_expressions(renamed: Renamed) -> None:
    keys = ["a.w", "a.b", "ba.w", "head.w"]
    assert renamed(keys, "--drop", "a.*") == ["ba.w", "head.w"]
    assert renamed(keys, "--drop", r"re:^(a|head)\.w$") == ["a.b", "ba.w"]
    assert renamed(keys, "--drop", "?a.w", "--drop", "head.[vw]") == ["a.w", "a.b"]


PRESETS = {
    "ddp": (["module.a.w", "module.module.b.w", "c.module.w"], ["a.w", "b.w", "c.module.w"]),
    "compile": (["_orig_mod.a.w", "b._orig_mod.c.w", "my_orig_mod.w"], ["a.w", "b.c.w", "my_orig_mod.w"]),
    "fsdp": (
        ["_fsdp_wrapped_module.a.w", "b._fsdp_wrapped_module.c._checkpoint_wrapped_module.w", "d.w"],
        ["a.w", "b.c.w", "d.w"],
    ),
    "lightning": (["model.a.w", "model.model.w", "loss.w"], ["a.w", "model.w", "loss.w"]),
    "peft": (
        ["base_model.model.a.base_layer.w", "base_model.model.a.lora_A.default.w", "b.lora_E.default", "default.w"],
        ["a.w", "a.lora_A.w", "b.lora_E", "default.w"],
    ),
}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_undoes_what_its_framework_does_to_names(name: str, renamed: Renamed) -> None:
    keys, expected = PRESETS[name]
    assert renamed(keys, "--preset", name) == expected


def test_every_preset_is_tested_here() -> None:
    from ckptool.ops.rules import PRESETS as KNOWN

    assert set(KNOWN) == {*PRESETS, "weight-norm"}  # which needs shapes: tests/cases/test_rules_and_presets.py


def test_several_presets_apply_in_any_order(renamed: Renamed) -> None:
    assert renamed(["model.module._orig_mod.w"], "--preset", "ddp,compile,lightning") == ["w"]
    assert renamed(["model.module._orig_mod.w"], "--preset", "lightning,ddp,compile") == ["w"]
    assert renamed(["_orig_mod.module.w"], "--preset", "compile", "--preset", "ddp") == ["w"]


def test_real_wrappers_write_the_names_that_the_presets_undo(saved: Saved, run: Run) -> None:
    net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    for name, wrapped in [("ddp", torch.nn.DataParallel(net)), ("compile", compiled(net))]:
        path = saved(wrapped.state_dict())
        assert list(torch.load(path)) != list(net.state_dict())
        assert run("remap", path, "-o", "out.pth", "--force", "--preset", name)[0] == 0
        assert list(torch.load("out.pth")) == list(net.state_dict())


# --- rules in files --------------------------------------------------------------------------------------------------

RULES = [
    {"strip_prefix": "module."},
    {"rename": "blocks.{i}.attn", "to": "layers.{i}.attention"},
    {"sub": r"layers\.(\d+)", "by": r"h\1"},
    {"drop": "*.gone"},
    {"add_prefix": "net."},
]
KEYS = ["module.blocks.0.attn.w", "module.blocks.1.attn.w", "module.x.gone"]
MADE = ["net.h0.attention.w", "net.h1.attention.w"]


@pytest.mark.parametrize("content", [RULES, {"rules": RULES}, {"schema": 1, "rules": RULES}])
def test_rules_stand_in_a_json_file(content: Any, renamed: Renamed) -> None:
    assert renamed(KEYS, "--rules", in_file(content)) == MADE


@pytest.mark.parametrize("name", ["rules.toml", "rules", "rules.txt"])
def test_rules_stand_in_a_toml_file_whatever_its_name(name: str, renamed: Renamed) -> None:
    text = r"""
# comments are welcome
[[rules]]
strip_prefix = "module."
[[rules]]
rename = "blocks.{i}.attn"
to = "layers.{i}.attention"
[[rules]]
sub = 'layers\.(\d+)'
by = 'h\1'
[[rules]]
drop = "*.gone"
[[rules]]
add_prefix = "net."
"""
    assert renamed(KEYS, "--rules", in_file(text, name)) == MADE


def test_pairs_are_mmengines_revise_keys(renamed: Renamed) -> None:
    pairs = [[r"^module\.", ""], [r"blocks\.(\d+)\.attn", r"h\1.attention"], [r"^", "net."]]
    expected = [*MADE, "net.x.gone"]
    assert renamed(KEYS, "--rules", in_file(pairs)) == expected
    assert renamed(KEYS, "--rules", in_file({"rules": pairs})) == expected
    toml = "rules = [['^module\\.', ''], ['blocks\\.(\\d+)\\.attn', 'h\\1.attention'], ['^', 'net.']]"
    assert renamed(KEYS, "--rules", in_file(toml, "r.toml")) == expected


def test_a_table_is_litgpts_map_of_whole_names(renamed: Renamed) -> None:
    table = {
        "model.embed_tokens.weight": "transformer.wte.weight",
        "model.layers.{}.self_attn.o_proj.weight": "transformer.h.{}.attn.proj.weight",
        "model.layers.{}.self_attn.rotary_emb.inv_freq": None,
        "lm_head.weight": "lm_head.w",
    }
    keys = [
        "model.embed_tokens.weight", "model.layers.0.self_attn.o_proj.weight",
        "model.layers.0.self_attn.rotary_emb.inv_freq", "model.layers.10.self_attn.o_proj.weight",
        "x.lm_head.weight", "lm_head.weight", "lm_head.weight.scale",
    ]  # fmt: skip
    expected = [
        "transformer.wte.weight", "transformer.h.0.attn.proj.weight", "transformer.h.10.attn.proj.weight",
        "x.lm_head.weight", "lm_head.w", "lm_head.weight.scale",
    ]  # fmt: skip
    assert renamed(keys, "--rules", in_file(table)) == expected
    toml = "\n".join(f'"{old}" = "{new}"' for old, new in table.items() if new)
    kept = [key for key in keys if "inv_freq" not in key]
    assert renamed(kept, "--rules", in_file(toml, "t.toml")) == expected


def test_a_table_is_a_map_and_may_swap_names(renamed: Renamed) -> None:
    assert renamed(["a", "b", "c"], "--rules", in_file({"a": "b", "b": "a", "c": "c2"})) == ["b", "a", "c2"]


def test_no_line_of_a_table_sees_what_another_made(renamed: Renamed) -> None:
    table = {"a": "b", "b": "c", "c": "d", "l.{}.w": "m.{}.w", "m.{}.w": "l.{}.w", "{i}.{j}": "{j}.{i}"}
    keys = ["a", "b", "c", "l.0.w", "m.0.w", "l.1.w", "x.y"]
    assert renamed(keys, "--rules", in_file(table)) == ["b", "c", "d", "m.0.w", "l.0.w", "m.1.w", "y.x"]


def test_a_name_spelled_out_goes_before_a_pattern_and_the_first_pattern_before_others(renamed: Renamed) -> None:
    table = {"l.{}.w": "any.{}", "l.{}.{}": "rest.{}.{}", "l.0.w": "zero", "l{i}.w_{i}": "twice{i}"}
    keys = ["l.0.w", "l.1.w", "l.1.b", "l3.w_3", "l3.w_4"]
    assert renamed(keys, "--rules", in_file(table)) == ["zero", "any.1", "rest.1.b", "twice3", "l3.w_4"]


def test_every_line_of_a_table_that_fits_no_key_is_named_and_no_other(refused: Callable[..., str]) -> None:
    table = {"a": "a", "b": "x", "h.{}": "g.{}", "no.{}.w": "n.{}.w", "nope": "z", "gone.{}": None, "b.{}": None}
    err = refused(["a", "b", "h.1", "b.1"], "--rules", in_file(table))
    assert "rename no.{}.w -> n.{}.w, rename nope -> z, drop gone.{}" in err
    assert err.count("rename") == 2


def test_collisions_of_a_table_are_all_listed(refused: Callable[..., str]) -> None:
    err = refused(["a", "b", "c", "d"], "--rules", in_file({"a": "x", "b": "x", "c": "d"}))
    assert "a and b would both be x" in err
    assert "c and d would both be d" in err


@functools.cache
def of_a_segment(pattern: str, named: tuple[tuple[str, str], ...]) -> tuple[re.Pattern[str], list[str]]:
    """The expression for one segment, where some names stand for texts already, and what its groups capture."""
    pieces, texts = re.split(r"(\*|\{\w\})", pattern), dict(named)
    known = [re.escape(texts.get(piece, piece)) if i % 2 == 0 or piece in texts else "(.+)"
             for i, piece in enumerate(pieces)]  # fmt: skip
    return re.compile("".join(known), re.DOTALL), [piece for piece in pieces[1::2] if piece not in texts]


def by_segments(old: str, new: str, key: str) -> str:
    """Renames segment by segment, each with an expression of its own: what one expression for all of them must give."""
    segments, patterns = key.split("."), old.split(".")
    made: list[str] = []
    while segments:
        stars: list[str] = []
        named: dict[str, str] = {}
        for pattern, segment in zip(patterns, segments, strict=False):
            expression, captures = of_a_segment(pattern, tuple(named.items()))
            match = expression.fullmatch(segment)
            if match is None:
                break
            for piece, text in zip(captures, match.groups(), strict=True):
                if piece == "*":
                    stars.append(text)
                else:
                    named[piece] = text
        else:
            if len(segments) >= len(patterns):
                filled = iter(stars)
                text = re.sub(r"\*|\{\w\}", lambda m: next(filled) if m[0] == "*" else named[m[0]], new)  # noqa: B023
                made += text.split(".") if text else []
                segments = segments[len(patterns) :]
                continue
        made.append(segments.pop(0))
    return ".".join(made)


@pytest.mark.parametrize("seed", range(5))
def test_a_rename_does_the_same_as_one_segment_by_segment(seed: int) -> None:
    from ckptool.ops import segments

    pick = random.Random(seed)
    changed = 0
    for _ in range(400):
        words = ["a", "b", "ab", "a1", "*", "{i}", "a{i}", "{i}b", "{j}", "", "a*b", "*.", "+", "{i}{j}", "*{i}"]
        old = ".".join(pick.choices(words, k=pick.randint(1, 3)))
        captures = re.findall(r"\*|\{\w\}", old)
        new = ".".join(pick.choices(["a", "c", "x\\1", "", *captures], k=pick.randint(1, 3)))
        if not old or new.count("*") > old.count("*"):
            continue
        rename = segments.renamer(old, new)
        for _ in range(20):
            key = ".".join(pick.choices(["a", "b", "ab", "a1b", "1", "", "aab", "c+\n"], k=pick.randint(1, 6)))
            renamed = rename(key)
            assert renamed == by_segments(old, new, key), (old, new, key)
            changed += renamed != key
    assert changed > 1000


def test_a_name_captured_twice_stands_for_the_same_text(renamed: Renamed) -> None:
    assert renamed(["h.0.h0", "h.0.h1", "a_b.a_b_c"], "--rename", "h.{i}.h{i}=x.{i}") == ["x.0", "h.0.h1", "a_b.a_b_c"]
    assert renamed(["a.a_b_c", "b.a_b_c"], "--rename", "{i}.{i}_*=x.{i}.*") == ["x.a.b_c", "b.a_b_c"]


def test_a_long_key_that_almost_fits_many_captures_costs_no_time(renamed: Renamed) -> None:
    key = ".".join(["_" * 300] * 4) + ".bias"
    assert renamed([key, "a_b.c_d.e_f.g_h.weight"], "--rename", "*_*.*_*.*_*.*_*.weight=x") == [key, "x"]


def test_null_in_a_table_drops_every_key_that_fits(renamed: Renamed) -> None:
    table = {"h.{}.bias": None, "w": "x"}
    assert renamed(["h.0.bias", "h.12.bias", "h.bias", "w"], "--rules", in_file(table)) == ["h.bias", "x"]


def test_null_in_a_table_drops_only_what_the_name_stands_for(renamed: Renamed) -> None:
    table = {"h.{}.bias": None, "w": "x"}
    keys = ["h.0.bias", "h.0.attn.bias", "w"]
    assert renamed(keys, "--rules", in_file(table)) == ["h.0.attn.bias", "x"]


def test_the_api_takes_the_same_three_shapes(saved: Saved) -> None:
    path = saved(numbered(["a.0.w"]))
    for rules in ([{"rename": "a.{i}", "to": "b.{i}"}], [[r"a\.", "b."]], {"a.{}.w": "b.{}.w"}, [("^a", "b")]):
        changed, report = ckptool.remap(path, rules)
        assert list(changed.state_dict()) == ["b.0.w"]
        assert [(row.new, row.old, row.op) for row in report.map] == [("b.0.w", ["a.0.w"], "rename")]
        again = ckptool.Rules.parse(rules)
        assert ckptool.remap(path, again)[1] == report


# --- what is refused -------------------------------------------------------------------------------------------------

MALFORMED: dict[str, Any] = {
    "no rules": 5, "a text": "rename", "null": None, "rule is text": ["rename"], "rule is null": [None],
    "rule is a number": {"rules": [3]}, "three in a pair": [["a", "b", "c"]], "a pair of numbers": [[1, 2]],
    "an empty rule": [{}], "an unknown kind": [{"renam": "a", "to": "b"}],
    "two kinds": [{"rename": "a", "to": "b", "drop": "c"}], "beside rules": {"rules": [], "rule": []},
    "rename without to": [{"rename": "a"}], "rename to a number": [{"rename": "a", "to": 3}],
    "rename a number": [{"rename": 3, "to": "a"}], "rename of nothing": [{"rename": "", "to": "b"}],
    "an unknown field": [{"rename": "a", "to": "b", "dim": 0}], "sub is no expression": [{"sub": "(", "by": ""}],
    "no such group": [{"sub": "a", "by": "\\2"}], "a bad escape": [{"sub": "a", "by": "\\q"}],
    "no such named group": [{"sub": "a", "by": "\\g<x>"}], "sub is a list": [{"sub": ["a"], "by": ""}],
    "sub by a number": [{"sub": "a", "by": 3}],
    "drop a list": [{"drop": ["a"]}], "drop is no expression": [{"drop": "re:("}],
    "strip a number": [{"strip_prefix": 1}], "strip nothing": [{"strip_prefix": ""}],
    "permute without dims": [{"permute": "a"}], "dims of text": [{"permute": "a", "dims": "10"}],
    "dims of floats": [{"permute": "a", "dims": [1.0, 0.0]}],
    "dims of bools": [{"permute": "a", "dims": [True, False]}],
    "reshape without shape": [{"reshape": "a"}], "a shape that is a number": [{"reshape": "a", "shape": 6}],
    "split without into": [{"split": "a"}], "split into one": [{"split": "a", "into": ["b"]}],
    "split into a text": [{"split": "a", "into": "bc"}], "split into numbers": [{"split": "a", "into": [1, 2]}],
    "sizes of text": [{"split": "a", "into": ["b", "c"], "sizes": ["1", "1"]}],
    "dim of text": [{"split": "a", "into": ["b", "c"], "dim": "0"}],
    "dim of bool": [{"split": "a", "into": ["b", "c"], "dim": True}],
    "cat of a text": [{"cat": "a", "into": "b"}], "cat of one": [{"cat": ["a"], "into": "b"}],
    "cat without into": [{"cat": ["a", "b"]}], "cat into a list": [{"cat": ["a", "b"], "into": ["c"]}],
    "cat of an empty name": [{"cat": ["a", ""], "into": "c"}],
    "chunk without heads": [{"chunk": "a", "into": ["b", "c"]}],
    "chunk of no heads": [{"chunk": "a", "into": ["b", "c"], "heads": 0}],
    "heads of text": [{"chunk": "a", "into": ["b", "c"], "heads": "2"}],
    "weave without heads": [{"weave": ["a", "b"], "into": "c"}],
    "a capture twice in a segment": [{"rename": "{i}{i}", "to": "x"}],
    "a capture that is not there": [{"rename": "a.{i}", "to": "b.{j}"}],
    "more stars than captured": [{"rename": "a.*", "to": "b.*.*"}],
    "more captures in a table than there are": {"a.{}": "b.{}.{}"}, "a capture that a table lacks": {"a.{i}": "{j}"},
    "a table from nothing": {"": "b"}, "a table of captures twice in a segment": {"a.{i}{i}": "b"},
    "a table of numbers": {"a": 1}, "a table of lists": {"a": ["b"]},
    "negative sizes": [{"split": "a.w", "into": ["b", "c"], "sizes": [3, -1]}],
    "transpose of no dims": [{"transpose": "a.w", "dims": []}],
    "transpose of three dims": [{"transpose": "a.w", "dims": [0, 1, 2]}],
}  # fmt: skip


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_rule_in_a_file_is_one_line(name: str, refused: Callable[..., str]) -> None:
    refused(["a.w", "a.b", "c.w"], "--rules", in_file(MALFORMED[name]))


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_rule_is_an_error_of_the_library(name: str, saved: Saved) -> None:
    with pytest.raises(CkptoolError):
        ckptool.remap(saved(numbered(["a.w", "a.b", "c.w"])), MALFORMED[name])


@pytest.mark.parametrize(
    "option",
    [
        ["--rename", "a"], ["--rename", ""], ["--rename", "=b"], ["--sub", "a/b"], ["--sub", "s/a/b"], ["--sub", "s"],
        ["--sub", ""], ["--sub", "s/a/b/x"], ["--sub", "s/a/b/c/"], ["--sub", "s/(/b/"], ["--sub", "s/a/\\1/"],
        ["--drop", ""], ["--drop", "re:["], ["--strip-prefix", ""], ["--add-prefix", ""], ["--preset", "ddpp"],
        ["--preset", ""], ["--preset", "ddp,"], ["--rules", "absent.json"], ["--rules", "."],
    ],
)  # fmt: skip
def test_a_malformed_option_is_one_line(option: list[str], refused: Callable[..., str]) -> None:
    refused(["a", "module.b"], *option)


@pytest.mark.parametrize(
    ("text", "name"),
    [("{", "r.json"), ("{'a': 1}", "r.json"), ("a = ", "r.toml"), ("[", "r"), ("", "r"), ("\0", "r.toml"), ("[1", "r")],
)
def test_a_file_that_is_neither_json_nor_toml_is_one_line(text: str, name: str, refused: Callable[..., str]) -> None:
    assert name in refused(["a"], "--rules", in_file(text, name)) or text == ""


def test_rules_that_are_no_text_are_one_line(refused: Callable[..., str]) -> None:
    Path("r.json").write_bytes(b"\xff\xfe\x00")
    assert "r.json" in refused(["a"], "--rules", "r.json")


def test_deeply_nested_rules_are_one_line(refused: Callable[..., str]) -> None:
    refused(["a"], "--rules", in_file("[" * 100_000))
    refused(["a"], "--rules", in_file('{"a":' * 100_000))


def test_no_rule_at_all_is_refused(refused: Callable[..., str]) -> None:
    assert "no rule" in refused(["a"])
    assert "no rule" in refused(["a"], "--rules", in_file([]))


# --- what does not go together: all of it at once, nothing written --------------------------------------------------


def test_every_collision_is_listed_at_once(refused: Callable[..., str]) -> None:
    keys = [f"{side}.{i}" for side in "ab" for i in range(30)]
    err = refused(keys, "--rename", "a=b")
    for i in range(30):
        assert f"a.{i} and b.{i}" in err or f"b.{i} and a.{i}" in err


def test_three_keys_on_one_name_are_all_named(refused: Callable[..., str]) -> None:
    err = refused(["a.w", "b.w", "c.w"], "--sub", "s/^[abc]/x/")
    assert all(key in err for key in ("a.w", "b.w", "c.w", "x.w"))


def test_every_empty_name_is_listed_at_once(refused: Callable[..., str]) -> None:
    err = refused(["model", "model.a", "x.model", "ok"], "--sub", "s/model//")
    assert all(f"{key} would be" in err for key in ("model", "model.a", "x.model"))
    assert "ok would be" not in err
    assert "model would be ''" in refused(["model"], "--strip-prefix", "model")
    assert "'a..b'" in refused(["a.x.b"], "--sub", "s/x//")


def test_troubles_of_every_kind_are_listed_in_one_line(refused: Callable[..., str]) -> None:
    tensors = {
        "a": torch.zeros(2), "b": torch.zeros(2), "gone": torch.zeros(2), "odd": torch.zeros(5, 2),
        "box": torch.zeros(2, 3, 4), "left": torch.zeros(2, 2), "right": torch.zeros(3, 3), "flat": torch.zeros(7),
        "heads": torch.zeros(10), "q": torch.zeros(6), "k": torch.zeros(4), "lone": torch.zeros(1),
    }  # fmt: skip
    rules = [
        {"rename": "a", "to": "b"}, {"rename": "gone", "to": ""}, {"split": "odd", "into": ["o1", "o2"]},
        {"permute": "box", "dims": [0, 1]}, {"cat": ["left", "right"], "into": "both"},
        {"reshape": "flat", "shape": [2, -1]}, {"chunk": "heads", "into": ["h1", "h2"], "heads": 4},
        {"weave": ["q", "k"], "into": "qk", "heads": 2}, {"cat": ["lone", "nowhere"], "into": "pair"},
        {"rename": "absent", "to": "x"}, {"split": "lone", "into": ["l1", "l2"], "dim": 3},
    ]  # fmt: skip
    err = refused(tensors, "--rules", in_file(rules))
    for word in ("a and b", "gone would be", "odd", "[5, 2]", "box", "[2, 3, 4]", "left, right", "flat", "[7]",
                 "heads", "[10]", "q, k", "lone", "absent", "dim 3"):  # fmt: skip
        assert word in err, word


def test_a_rule_that_fits_no_key_is_refused_by_its_text(refused: Callable[..., str]) -> None:
    err = refused(["a.w"], "--rename", "a=b", "--rename", "nope=x", "--drop", "zip.*", "--strip-prefix", "pre.")
    assert all(text in err for text in ("nope", "zip.*", "pre."))
    assert "a -> b" not in err
    assert "--allow-unused" in err


def test_unused_rules_are_all_listed(refused: Callable[..., str]) -> None:
    rules = [{"rename": f"absent{i}", "to": "x"} for i in range(30)]
    err = refused(["a.w"], "--rules", in_file(rules))
    assert all(f"absent{i} " in err for i in range(30)) or "22 more" in err


@pytest.mark.parametrize(
    "rule",
    [
        {"rename": "zz", "to": "b"}, {"sub": "zz", "by": "b"}, {"drop": "zz"}, {"strip_prefix": "zz"},
        {"transpose": "zz"}, {"permute": "zz", "dims": [1, 0]}, {"reshape": "zz", "shape": [-1]},
        {"split": "zz", "into": ["x", "y"]}, {"cat": ["yy", "zz"], "into": "x"},
        {"chunk": "zz", "into": ["x", "y"], "heads": 1}, {"weave": ["yy", "zz"], "into": "x", "heads": 1},
    ],
)  # fmt: skip
def test_an_unused_rule_of_any_kind_is_refused_or_allowed(
    rule: dict[str, Any], refused: Callable[..., str], run: Run
) -> None:
    assert "fit" in refused(["a.w"], "--rules", in_file([rule]))
    code, out, _ = run("remap", "saved.pth", "-o", "out.pth", "--rules", "rules.json", "--allow-unused", "--json")
    assert code == 0
    result = json.loads(out)["result"]
    assert len(result["unused_rules"]) == 1
    assert result["map"] == [{"new": "a.w", "old": ["a.w"], "op": "rename"}]


def test_collisions_are_no_matter_of_order_within_a_rule(renamed: Renamed) -> None:
    assert renamed(["a.0", "a.1", "a.2"], "--sub", r"s/^a\.0$/a.3/") == ["a.3", "a.1", "a.2"]
    # every key moves onto a name that another has just left
    assert renamed(["x", "x.x"], "--add-prefix", "x.") == ["x.x", "x.x.x"]


def test_a_split_onto_a_taken_name_and_twice_onto_one_is_refused(refused: Callable[..., str]) -> None:
    tensors = {"w": torch.zeros(4), "b": torch.zeros(2)}
    assert "b" in refused(tensors, "--rules", in_file([{"split": "w", "into": ["a", "b"]}]))
    assert "twice" in refused(tensors, "--rules", in_file([{"split": "w", "into": ["a", "a"]}]))
    assert "''" in refused(tensors, "--rules", in_file([{"split": "w", "into": ["a", ""]}]))


def test_a_split_may_keep_the_old_name_for_a_piece(saved: Saved, run: Run) -> None:
    path = saved({"w": torch.arange(4.0), "b": torch.zeros(2)})
    assert run("remap", path, "-o", "out.pth", "--rules", in_file([{"split": "w", "into": ["w", "v"]}]))[0] == 0
    loaded = torch.load("out.pth")
    assert list(loaded) == ["w", "v", "b"]
    assert (loaded["w"].tolist(), loaded["v"].tolist()) == ([0.0, 1.0], [2.0, 3.0])


def test_all_keys_dropped_is_an_error_and_never_an_empty_output(refused: Callable[..., str]) -> None:
    assert "no tensor" in refused(["a", "b"], "--drop", "*")


def test_objects_among_the_weights_are_renamed_but_not_computed_with(
    saved: Saved, run: Run, refused: Callable[..., str]
) -> None:
    tree = {"a.w": torch.ones(2), "a._extra_state": {"scale": 3}}
    path = saved(tree)
    assert run("remap", path, "-o", "ok.pth", "--rename", "a=b")[0] == 0
    assert torch.load("ok.pth")["b._extra_state"] == {"scale": 3}
    assert "a._extra_state" in refused(tree, "--rules", in_file([{"transpose": "a._extra_state"}]))


def test_errors_are_of_the_kinds_that_the_contract_names(saved: Saved, run: Run) -> None:
    path = saved(numbered(["a", "b"]))
    for options, kind in [
        (["--rename", "a=b"], "collision"),
        (["--rename", "zz=b"], "usage"),
        (["--sub", "x"], "usage"),
    ]:
        code, out, _ = run("remap", path, "-o", "out.pth", *options, "--json")
        error = json.loads(out)
        assert (code, error["command"], error["error"]["kind"]) == (2, "remap", kind)


def test_the_library_raises_what_the_command_line_prints(saved: Saved) -> None:
    path = saved(numbered(["a", "b"]))
    with pytest.raises(CollisionError, match="a and b would both be b"):
        ckptool.remap(path, [{"rename": "a", "to": "b"}])
    with pytest.raises(UsageError, match="zz"):
        ckptool.remap(path, [{"rename": "zz", "to": "b"}])
    changed, report = ckptool.remap(path, [{"rename": "zz", "to": "b"}], allow_unused=True)
    assert (list(changed.state_dict()), len(report.unused_rules)) == (["a", "b"], 1)


def test_an_input_is_never_changed_by_planning_or_renaming(run: Run) -> None:
    source = FIXTURES / "resnet_ddp.pth"
    assert run("remap", source, "-o", "out.pth", "--preset", "ddp")[0] == 0
    old, new = torch.load(source), torch.load("out.pth")
    assert list(new) == [key.removeprefix("module.") for key in old]
    assert [bits(tensor) for tensor in new.values()] == [bits(tensor) for tensor in old.values()]


# --- numbers that shift, all that follows, and tables beside other rules -------------------------------------------


def test_a_number_may_be_one_more_or_less_in_the_new_name(renamed: Renamed) -> None:
    keys = ["layer1.0.w", "layer2.10.w", "fc.w"]
    assert renamed(keys, "--rename", "layer{i}.{j}=stages.{i-1}.{j+2}") == ["stages.0.2.w", "stages.1.12.w", "fc.w"]


def test_what_is_no_number_cannot_be_one_less(refused: Callable[..., str]) -> None:
    assert "{i-1} is no number of 0 or more where a.x has 'x'" in refused(["a.x.w"], "--rename", "a.{i}=b.{i-1}")
    assert "{i-1} is no number of 0 or more where a.0 has '0'" in refused(["a.0.w"], "--rename", "a.{i}=b.{i-1}")
    assert "has {j}, which the old name has not" in refused(["a.0.w"], "--rename", "a.{i}=b.{j-1}")


def rules_file(content: str) -> str:
    Path("rules.toml").write_text(content)
    return "rules.toml"


def test_a_table_stands_beside_other_rules_and_is_applied_at_once(renamed: Renamed) -> None:
    rules = rules_file("""
[[rules]]
strip_prefix = "net."

[[rules]]
[rules.table]
"a.1.**" = "special.**"
"a.{i}.**" = "b.{i}.**"
"b.{i}.w" = "a.{i}.w"
"c" = "d"
"**" = "rest.**"

[[rules]]
rename = "d"
to = "e"
""")
    keys = ["net.a.0.w", "net.a.1.x.y", "b.0.w", "c", "b.0.w.w", "a.2"]
    assert renamed(keys, "--rules", rules) == ["b.0.w", "special.x.y", "a.0.w", "e", "rest.b.0.w.w", "rest.a.2"]


def test_a_last_segment_of_two_stars_is_all_that_follows_and_not_nothing(renamed: Renamed) -> None:
    assert renamed(["a.b.c.d", "a.b", "x.a.b.c"], "--rename", "a.b.**=z.**") == ["z.c.d", "a.b", "x.z.c"]


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"table": {}}, "table is a table of names"),
        ({"table": "a"}, "table is a table of names"),
        ({"table": {"a": 1}}, "the table maps 'a' to 1, which is no name"),
        ({"table": {"a.*": "b.**"}}, r"the new name 'b.**' has **, which the old name has not"),
        ({"drop": []}, "drop is a pattern, or a list of them"),
        ({"drop": ["a", 3]}, "drop is a pattern, or a list of them"),
    ],
)
def test_tables_and_lists_of_patterns_are_checked(rule: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        ckptool.Rules.parse([rule])


def test_of_several_patterns_to_drop_each_must_fit_a_key() -> None:
    tensors = numbered(["a.w", "b.w", "c.w"])
    made, report = ckptool.remap(tensors, [{"drop": ["a.*", "b.w"]}])
    assert ([*made.state_dict()], report.dropped) == (["c.w"], ["a.w", "b.w"])
    with pytest.raises(UsageError, match=r"rules that fit no key .*: drop x\.\*, drop d$"):
        ckptool.remap(tensors, [{"drop": ["a.*", "x.*", "d"]}])
