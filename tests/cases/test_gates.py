"""Gates without values, patterns that fit nothing, and adapters that a mismatch speaks for."""

from __future__ import annotations

import json
import re
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import Run, Saved, State, load
from safetensors.torch import save_file
from torch import nn

import ckptool
from ckptool.errors import StrictError, UsageError


def document(run: Run, *command: object) -> tuple[int, dict[str, Any]]:
    code, out, err = run(*command, "--json")
    found = json.loads(out)
    assert bool(err) == ("errors" in found), err
    return code, found


def on_meta(state: State) -> State:
    return {key: value.to("meta") for key, value in state.items()}


def zeros(**shapes: tuple[int, ...]) -> State:
    """Zeros under these keys; ``__`` stands for a dot."""
    return {key.replace("__", "."): torch.zeros(shape) for key, shape in shapes.items()}


def filled(state: State) -> State:
    torch.manual_seed(5)
    return {key: torch.randn(value.shape) for key, value in state.items()}


FULL = zeros(body__weight=(4, 4), body__bias=(4,), head__weight=(3, 4), head__bias=(3,))
PART = filled({**zeros(body__weight=(4, 4), body__bias=(4,), head__weight=(5, 4))})
"""Of FULL, ``head.bias`` is missing and ``head.weight`` has another shape."""

GATES = [
    (("--strict",), "--strict: 1 missing, 1 mismatched"),
    (("--min-loaded", "90%"), "--min-loaded wants 90.0 %"),
    (("--require", "head.*"), "--require head.*: not loaded: head.weight, head.bias"),
    (("--require", "body.*", "--require", "head.bias"), "--require head.bias: not loaded: head.bias"),
]


# --- gates without values --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("gate", "words"), GATES)
@pytest.mark.parametrize("written", [False, True])
@pytest.mark.parametrize("command", ["filter", "load-partial"])
def test_gates_are_judged_on_a_target_without_values(
    command: str, gate: tuple[str, ...], words: str, written: bool, saved: Saved, run: Run
) -> None:
    source, target = saved(PART, "source.pth"), saved(on_meta(FULL), "meta.pth")
    option = "--match" if command == "filter" else "--into"
    output = ("-o", "out.pth") if written else ("--dry-run",)
    code, found = document(run, command, source, option, target, *output, *gate)
    assert code == 1
    assert any(words in note for note in found["notes"])
    reasons = {row["key"]: row["reason"] for row in found["result"]["rows"]}
    assert reasons == {
        "body.weight": "loaded", "body.bias": "loaded", "head.weight": "mismatched", "head.bias": "missing",
    }  # fmt: skip
    code, out, _ = run(command, source, option, target, *output, *gate)
    assert code == 1
    assert re.search(r"missing +head\.bias", out)
    assert re.search(r"mismatched +head\.weight +target 3x4, source 5x4", out)
    assert "in the target" not in out  # that the target is on meta is no reason: the shapes are
    assert not Path("out.pth").exists()


NETS = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

def meta():
    with torch.device("meta"):
        return Net()
"""


@pytest.fixture
def nets(run: Run, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a model that is built on meta."""
    Path("nets_on_meta.py").write_text(NETS)
    monkeypatch.syspath_prepend(".")
    monkeypatch.delitem(sys.modules, "nets_on_meta", raising=False)
    return "nets_on_meta:meta"


@pytest.mark.parametrize(("gate", "words"), GATES)
def test_gates_are_judged_on_a_model_that_is_built_on_meta(
    gate: tuple[str, ...], words: str, nets: str, saved: Saved, run: Run
) -> None:
    source = saved(PART, "source.pth")
    for output in (("--dry-run",), ("--dry-run", "-o", "out.pth"), ("-o", "out.pth")):
        code, out, _ = run("load-partial", source, "--model", nets, *output, *gate)
        assert (code, words in out) == (1, True), out
        assert re.search(r"missing +head\.bias", out)
    assert not Path("out.pth").exists()


def test_what_would_have_no_values_is_refused_where_it_would_be_written(saved: Saved, run: Run) -> None:
    source, target = saved(PART, "source.pth"), saved(on_meta(FULL), "meta.pth")
    call = ("load-partial", source, "--into", target)
    for output in (("-o", "out.pth"), ("-o", "out.pth", "--dry-run"), ("-o", "out.pth", "--min-loaded", "10%")):
        code, out, err = run(*call, *output)
        assert (code, out) == (2, "")
        assert "head.weight, head.bias: on meta and has no values to keep: name a rule for it" in err
        assert not Path("out.pth").exists()
    code, found = document(run, *call, "--dry-run", "--require", "body.*")
    assert code == 0
    assert found["result"]["unset"] == ["head.weight", "head.bias"]
    assert any("no values to keep" in note for note in found["notes"])
    rules = ("--adapt", "head.weight=rows", "--init", "head.bias=zeros", "-o", "out.pth", "--strict")
    code, found = document(run, *call, *rules)
    assert (code, found["result"]["unset"]) == (0, [])
    assert torch.equal(load("out.pth")["head.weight"], PART["head.weight"][:3])
    with pytest.raises(UsageError, match="no values to keep"):
        ckptool.plan_partial(source, target)
    with pytest.raises(UsageError, match=r"head\.weight.*head\.bias.*no values to keep"):
        ckptool.plan_partial(source, target, init={"head.*": "keep"})


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (("--model", "nets_on_meta:meta"), "head.weight, head.bias"),
        (("--into", "meta.pth"), "head.weight, head.bias"),
        (("--into", "meta.pth", "--init", "head.bias=zeros"), "head.weight"),
        (("--into", "meta.pth", "--exclude", "body.bias"), "body.bias, head.weight, head.bias"),
    ],
)
def test_a_dry_run_without_gates_says_what_the_run_would(
    target: tuple[str, ...], words: str, nets: str, saved: Saved, run: Run
) -> None:
    call = ("load-partial", saved(PART, "source.pth"), *target)
    saved(on_meta(FULL), "meta.pth")
    code, out, refusal = run(*call, "-o", "out.pth")
    assert (code, out, refusal.count("\n")) == (2, "", 1)
    assert f"{words}: on meta and has no values to keep" in refusal
    code, out, err = run(*call, "--dry-run", "--report", "report.json")
    assert (code, err) == (2, refusal)
    assert re.search(r"mismatched +head\.weight +target 3x4, source 5x4", out)
    code, found = document(run, *call, "--dry-run")
    assert code == 2
    assert [error["kind"] for error in found["errors"]] == ["usage"]
    assert ", ".join(found["result"]["unset"]) == words
    assert json.loads(Path("report.json").read_text()) == found
    for gate in (("--require", "body.weight"), ("--min-loaded", "0")):  # a condition is judged without values
        assert run(*call, "--dry-run", *gate)[0] == 0
    assert not Path("out.pth").exists()


def test_a_dry_run_that_would_write_all_values_passes(saved: Saved, run: Run) -> None:
    source, target = saved(PART, "source.pth"), saved(on_meta(FULL), "meta.pth")
    assert run("load-partial", source, "--into", target, "--dry-run", "--init", "head.*=zeros")[0] == 0
    code, _, err = run("load-partial", "--into", target, "--init", "head.*=zeros", "--dry-run")
    assert (code, "body.weight, body.bias: on meta" in err) == (2, True)


def test_strict_says_what_a_model_on_meta_lacks_before_its_values_are_asked_for(saved: Saved) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    with torch.device("meta"):
        model = Net()
    path = saved(PART, "source.pth")
    for assign in (False, True):
        with pytest.raises(StrictError, match="1 missing, 1 mismatched") as caught:
            ckptool.load_partial(model, path, assign=assign, strict=True)
        assert "missing  head.bias" in str(caught.value)
        assert "mismatched  head.weight" in str(caught.value)
    with pytest.raises(UsageError, match=r"would stay on meta.*head\.weight, head\.bias"):
        ckptool.load_partial(model, path, assign=True)
    assert all(value.is_meta for value in model.parameters())
    ckptool.load_partial(model, path, assign=True, strict=False, init={"head.*": "zeros"})
    assert torch.equal(model.body.weight, PART["body.weight"])


def test_a_target_on_meta_that_all_fits_passes_every_gate(saved: Saved, run: Run) -> None:
    whole = filled(FULL)
    source, target = saved(whole, "source.pth"), saved(on_meta(FULL), "meta.pth")
    gates = ("--strict", "--min-loaded", "100%", "--require", "*")
    for command, option in (("filter", "--match"), ("load-partial", "--into")):
        assert run(command, source, option, target, "--dry-run", *gates)[0] == 0
        assert run(command, source, option, target, "-o", "out.safetensors", "--force", *gates)[0] == 0
        assert all(torch.equal(value, whole[key]) for key, value in load("out.safetensors").items())


# --- patterns that fit nothing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (("--adapt", "haed.*=rows"), "--adapt haed.* (did you mean head.*?)"),
        (("--adapt", "head.weigth=rows"), "--adapt head.weigth (did you mean head.weight?)"),
        (("--init", "heda.bias=zeros"), "--init heda.bias (did you mean head.bias?)"),
        (("--init", "model.head.*=zeros"), "--init model.head.* (did you mean head.*?)"),
        (("--init", "bias=zeros"), "--init bias (did you mean *.bias?)"),
        (("--init", "re:^tail=zeros"), "--init re:^tail"),
        (("--adapt", "tail.*=rows", "--init", "nose=zeros"), "--adapt tail.*, --init nose"),
    ],
)
def test_a_pattern_that_fits_no_key_is_refused(rule: tuple[str, ...], words: str, saved: Saved, run: Run) -> None:
    source, target = saved(PART, "source.pth"), saved(FULL, "target.pth")
    call = ("load-partial", source, "--into", target, "-o", "out.pth")
    code, out, err = run(*call, *rule)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert f"patterns that fit no key (--allow-unused lets them): {words}" in err
    assert not Path("out.pth").exists()
    code, found = document(run, *call, *rule, "--allow-unused")
    assert code == 0
    for option, text in zip(rule[::2], rule[1::2], strict=True):
        begin = f"{option} {text.rpartition('=')[0]} fits no key"
        assert any(note.startswith(begin) for note in found["notes"])


def test_a_pattern_that_fits_only_what_was_loaded_is_noted(saved: Saved, run: Run) -> None:
    source, target = saved(PART, "source.pth"), saved(FULL, "target.pth")
    code, found = document(run, "load-partial", source, "--into", target, "--dry-run", "--init", "body.*=zeros")
    assert code == 0
    assert "--init body.* fits no key that was not loaded" in found["notes"]
    report = ckptool.load_partial(Net(), source, init={"head.bias": "zeros", "body.*": "ones"})
    assert report.initialised == ["head.bias"]
    for wrong in ({"init": {"nose.*": "zeros"}}, {"adapt": {"nose.*": "rows"}}):
        with pytest.raises(UsageError, match=r"patterns that fit no key .*nose\.\*"):
            ckptool.load_partial(Net(), source, **wrong)
        assert any("nose.* fits no key" in note for note in ckptool.load_partial(
            Net(), source, allow_unused=True, **wrong).notes)  # fmt: skip


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 3)


def test_a_pattern_may_name_a_parameter_that_is_not_initialised_yet(saved: Saved) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(3))
    report = ckptool.load_partial(model, saved(nn.Sequential(nn.Linear(2, 2)).state_dict()), init={"1.*": "zeros"})
    assert "--init 1.* fits no key that was not loaded" in report.notes


# --- adapters that a mismatch speaks for -----------------------------------------------------------------------------

SOLVED = [
    ("pos_embed", (1, 5, 8), (1, 10, 8), "pos-embed"),
    ("encoder.pos_embedding", (1, 17, 8), (1, 37, 8), "pos-embed"),
    ("visual.positional_embedding", (50, 8), (197, 8), "pos-embed"),
    ("image_encoder.pos_embed", (1, 4, 4, 8), (1, 6, 6, 8), "pos-embed"),
    ("vision_model.embeddings.position_embedding.weight", (16, 8), (64, 8), "pos-embed"),
    ("layers.0.attn.relative_position_bias_table", (9, 4), (25, 4), "rel-pos"),
    ("blocks.0.attn.relative_position_bias_table", (12, 4), (28, 4), "rel-pos"),
    ("blocks.0.attn.rel_pos_h", (27, 8), (63, 8), "rel-pos:mode=linear"),
    ("conv1.weight", (8, 3, 7, 7), (8, 1, 7, 7), "in-chans"),
    ("conv_in.weight", (8, 4, 3, 3), (8, 9, 3, 3), "in-chans"),
    ("encoder.0.weight", (8, 1, 5), (8, 2, 5), "in-chans"),
    ("patch_embed.proj.weight", (8, 3, 16, 16), (8, 3, 8, 8), "patch-embed"),
    ("visual.conv1.weight", (8, 3, 14, 14), (8, 3, 16, 16), "patch-embed"),
    ("conv1.weight", (8, 3, 3, 3), (8, 3, 5, 3, 3), "inflate"),
    ("head.weight", (10, 4), (3, 4), "rows"),
    ("fc.bias", (1000,), (5,), "rows"),
    ("classifier.6.weight", (10, 4), (12, 4), "rows"),
    ("model.embed_tokens.weight", (100, 4), (104, 4), "rows"),
    ("cls.predictions.bias", (100,), (104,), "rows"),
    ("module.heads.head.weight", (10, 4), (12, 4), "rows"),
]


FIRST = {adapter: case for *case, adapter in reversed(SOLVED)}
ON_META = [(*case, adapter, True) for *case, adapter in SOLVED if adapter == "rows" or FIRST[adapter] == case]
"""A target on meta, for each adapter; rows leave there what the file of a target has."""


@pytest.mark.parametrize(("key", "old", "new", "adapter", "meta"), [*((*case, False) for case in SOLVED), *ON_META])
def test_the_hint_names_the_adapter_and_loads_what_it_says(
    key: str, old: tuple[int, ...], new: tuple[int, ...], adapter: str, meta: bool, saved: Saved, run: Run
) -> None:
    source = saved(filled({key: torch.zeros(old), "other": torch.zeros(2)}), "source.pth")
    state = {key: torch.full(new, 7.0), "other": torch.zeros(2)}
    target = saved(on_meta(state) if meta else state, "target.pth")
    call = ("load-partial", source, "--into", target)
    code, found = document(run, *call, "--dry-run")
    assert code == 2 * meta  # without the adapter the key has no values on meta
    options = followed(run, found["result"]["hint"], *call, "-o", "out.pth")
    grows = meta and adapter == "rows" and new[0] > old[0]
    assert options == ["--adapt", f"{key}={adapter}{':fill=zero' * grows}"]
    assert f"{options[1].removeprefix(f'{key}=')} would fit" in run(*call, "--dry-run")[1]
    made, given = load("out.pth")[key], load(source)[key]
    assert made.shape == new
    if adapter == "rows":
        rest = torch.full(new, 0.0 if meta else 7.0)[len(given) :]
        assert torch.equal(made, torch.cat([given[: new[0]], rest]))
    if adapter == "inflate":
        torch.testing.assert_close(made.sum(2), given)
    code, found = document(run, "filter", source, "--match", target, "--dry-run")
    assert code == 0
    assert f"load-partial may adapt {key} (--adapt {shlex.quote(options[1])})" in found["notes"]


def followed(run: Run, hint: str, *command: object) -> list[str]:
    """Adds the options of a hint to a command: as many keys are loaded as it says; returns the options."""
    promised = re.search(r"would match (\d+) of (\d+) \((.*)\)$", hint)
    assert promised, hint
    options = shlex.split(promised[3])
    code, found = document(run, *command, *options, "--force")
    counts = found["result"]["counts"]
    assert (code, sum(counts.get(name, 0) for name in ("loaded", "cast", "tied", "adapted"))) == (0, int(promised[1]))
    assert sum(counts.values()) == int(promised[2])
    return options


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (zeros(mlp__fc1__w=(8, 4), mlp__fc2__w=(4, 8)), zeros(mlp__fc1__w=(9, 4), mlp__fc2__w=(4, 9))),
        (zeros(head__0__weight=(8, 4), head__2__weight=(4, 8)), zeros(head__0__weight=(9, 4), head__2__weight=(4, 9))),
        (zeros(attn__k_proj__weight=(8, 4)), zeros(attn__k_proj__weight=(4, 4))),
        (zeros(layers__0__fc__weight=(8, 4)), zeros(layers__0__fc__weight=(9, 4))),
        (zeros(conv3__weight=(8, 64, 1, 1)), zeros(conv3__weight=(8, 128, 1, 1))),
        (zeros(conv__weight=(8, 16, 3, 3)), zeros(conv__weight=(8, 16, 5, 5))),
        (zeros(linear__weight=(8, 3)), zeros(linear__weight=(8, 4))),
        (zeros(wpe__weight=(1024, 4)), zeros(wpe__weight=(2048, 4))),
        (zeros(embed__position_embeddings__weight=(1024, 4)), zeros(embed__position_embeddings__weight=(4096, 4))),
        (zeros(pos_embed=(1, 7, 8)), zeros(pos_embed=(1, 12, 8))),
        (zeros(pos_embed=(1, 5, 8)), zeros(pos_embed=(1, 10, 9))),
        (zeros(head__weight=(8, 4)), zeros(head__weight=(9, 5))),
        (zeros(head__weight=(8, 0)), zeros(head__weight=(9, 0))),
        ({"rel_pos_index": torch.zeros(9, 9).long()}, {"rel_pos_index": torch.zeros(25, 25).long()}),
        ({"embed.weight": torch.zeros(8, 4).to(torch.float8_e4m3fn)}, {"embed.weight": torch.zeros(9, 4)}),
    ],
)  # fmt: skip
def test_what_no_adapter_is_for_in_earnest_has_no_hint(old: State, new: State, saved: Saved, run: Run) -> None:
    source, target = (
        saved({**old, "other": torch.zeros(2)}, "source.pth"),
        saved({**new, "other": torch.ones(2)}, "t.pth"),
    )
    code, found = document(run, "load-partial", source, "--into", target, "--dry-run")
    assert (code, found["result"].get("hint")) == (0, None)
    assert not any("would fit" in row.get("detail", "") for row in found["result"]["rows"])


@pytest.mark.usefixtures("folding")
def test_one_hint_covers_all_that_adapters_solve_and_like_keys_share_a_pattern(saved: Saved, run: Run) -> None:
    table = "layers.{}.blocks.{}.attn.relative_position_bias_table"
    tables = [table.format(one, other) for one in range(3) for other in range(2)]
    old = {
        **{key: torch.zeros(9, 4) for key in tables},
        **zeros(patch_embed__proj__weight=(8, 3, 4, 4), head__weight=(9, 8)),
    }
    new = {
        **{key: torch.zeros(25, 4) for key in tables},
        **zeros(patch_embed__proj__weight=(8, 1, 4, 4), head__weight=(4, 8)),
    }
    save_file(filled({**old, "norm": torch.zeros(8)}), "source.safetensors")
    target = saved({**new, "norm": torch.zeros(8)}, "target.pth")
    call = ("load-partial", "source.safetensors", "--into", target, "-o", "out.pth")
    code, out, _ = run(*call)
    assert code == 0
    assert re.search(
        r"layers\.\{0\.\.2\}\.blocks\.\{0,1\}\S+ +target 25x4, source 9x4  rel-pos would fit  \(6 keys\)", out
    )
    hint = document(run, *call, "--force")[1]["result"]["hint"]
    assert followed(run, hint, *call)[1::2] == [
        "layers.*.blocks.*.attn.relative_position_bias_table=rel-pos", "patch_embed.proj.weight=in-chans",
        "head.weight=rows",
    ]  # fmt: skip
    assert load("out.pth")[tables[3]].shape == (25, 4)


def test_a_shared_pattern_leaves_the_adapters_that_were_given_alone(saved: Saved, run: Run) -> None:
    keys = [f"stages.{number}.pos_embed" for number in range(3)]
    source = saved(filled({key: torch.zeros(1, 4, 8) for key in keys}), "source.pth")
    target = saved({key: torch.zeros(1, 9, 8) for key in keys}, "target.pth")
    call = ("load-partial", source, "--into", target, "-o", "out.pth", "--adapt", f"{keys[1]}=crop:fill=zero")
    hint = document(run, *call)[1]["result"]["hint"]
    assert followed(run, hint, *call)[1::2] == [f"{keys[0]}=pos-embed", f"{keys[2]}=pos-embed"]
    assert torch.equal(load("out.pth")[keys[1]][:, :4], load(source)[keys[1]])


def test_tied_tables_are_adapted_once_and_never_with_two_values(saved: Saved, run: Run) -> None:
    table = torch.zeros(12, 4)
    target = saved({"embed.weight": table, "lm_head.weight": table, "norm": torch.zeros(4)}, "target.pth")
    one = torch.randn(9, 4)
    for content in ({"embed.weight": one}, {"embed.weight": one, "lm_head.weight": one}):
        source = saved({**content, "norm": torch.ones(4)}, "source.pth")
        call = ("load-partial", source, "--into", target, "-o", "out.pth")
        hint = document(run, *call, "--force")[1]["result"]["hint"]
        followed(run, hint, *call)
        made = load("out.pth")
        assert torch.equal(made["embed.weight"][:9], one)
        assert torch.equal(made["lm_head.weight"], made["embed.weight"])
    source = saved({"embed.weight": one, "lm_head.weight": one + 1, "norm": torch.ones(4)}, "source.pth")
    code, found = document(run, "load-partial", source, "--into", target, "--dry-run")
    assert (code, found["result"].get("hint")) == (0, None)


def test_a_key_that_reads_as_a_pattern_is_named_exactly(saved: Saved, run: Run) -> None:
    key = "towers[0].pos_embed"
    source = saved(filled({key: torch.zeros(1, 5, 2), "x": torch.zeros(1)}), "source.pth")
    target = saved({key: torch.zeros(1, 10, 2), "x": torch.zeros(1)}, "target.pth")
    call = ("load-partial", source, "--into", target, "-o", "out.pth")
    hint = document(run, *call, "--force")[1]["result"]["hint"]
    assert followed(run, hint, *call) == ["--adapt", "towers[[]0].pos_embed=pos-embed"]


def test_hints_of_hundreds_of_mismatches_are_few_and_quick(saved: Saved, run: Run) -> None:
    names = [f"{chr(97 + at % 26)}{chr(97 + at // 26 % 26)}{chr(97 + at // 676)}.embed.weight" for at in range(700)]
    source = saved({name: torch.zeros(at % 50 + 1, 2) for at, name in enumerate(names)}, "source.pth")
    target = saved({name: torch.zeros(at % 50 + 2, 2) for at, name in enumerate(names)}, "target.pth")
    begun = time.perf_counter()
    _, found = document(run, "load-partial", source, "--into", target, "--dry-run")
    assert time.perf_counter() - begun < 10
    hint = found["result"]["hint"]
    assert hint.count("--adapt") == 8
    followed(run, hint, "load-partial", source, "--into", target, "-o", "out.pth")


def test_a_hostile_key_costs_nothing(saved: Saved, run: Run) -> None:
    key = "embed" * 12_000 + "!"
    source, target = saved({key: torch.zeros(3, 2)}, "source.pth"), saved({key: torch.zeros(4, 2)}, "target.pth")
    begun = time.perf_counter()
    document(run, "load-partial", source, "--into", target, "--dry-run")
    assert time.perf_counter() - begun < 5


def test_a_hostile_shape_costs_nothing(saved: Saved, run: Run) -> None:
    wide = {"conv.weight": torch.zeros(1).expand(2, 10**9, 3), "x": torch.zeros(1)}
    source, target = saved(zeros(conv__weight=(2, 3, 3), x=(1,)), "source.pth"), saved(wide, "wide.pth")
    begun = time.perf_counter()
    code, found = document(run, "load-partial", source, "--into", target, "--dry-run")
    assert time.perf_counter() - begun < 10
    assert (code, found["result"].get("hint")) == (0, None)


def test_what_a_filter_leaves_without_values_is_named(saved: Saved, run: Run) -> None:
    source, target = saved(PART, "source.pth"), saved(on_meta(FULL), "meta.pth")
    code, out, _ = run("filter", source, "--match", target, "-o", "out.pth")
    assert code == 0
    assert re.search(r"without values in the output, as \S*meta.pth is on meta: head.weight, head.bias", out)
