"""Hints are options to add to the very command, tried by adding them; gates say what is missing without values."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import Run, Saved, State, assert_identical, load
from safetensors.torch import save_file

import ckptool


def net(*names: str) -> State:
    """A tensor of a shape of its own for every name, so that no pair can be wrong unseen."""
    return {name: torch.randn(2, at + 2) for at, name in enumerate(names)}


NAMES = ("conv.weight", "conv.bias", "blocks.0.fc.weight", "blocks.1.fc.weight", "head.weight")


def under(prefix: str, state: State) -> State:
    return {f"{prefix}{key}": value for key, value in state.items()}


def inside(state: State) -> State:
    """What DataParallel around a part of the model makes of the keys."""
    return {key.replace("blocks.", "blocks.module."): value for key, value in state.items()}


def followed(run: Run, *command: object) -> dict[str, Any]:
    """Runs a command, adds its hint, runs that, and returns the result: as many are loaded as the hint promised."""
    _, out, _ = run(*command, "--json", "--force")
    hint = json.loads(out)["result"].get("hint")
    assert hint, out
    promised = re.search(r"would match (\d+) of (\d+) \((.*)\)$", hint)
    assert promised, hint
    code, out, err = run(*command, *shlex.split(promised[3]), "--json", "--force")
    assert (code, err) == (0, ""), (hint, out)
    result: dict[str, Any] = json.loads(out)["result"]
    loaded = sum(result["counts"].get(reason, 0) for reason in ("loaded", "cast", "tied", "adapted"))
    assert loaded == int(promised[1]), hint
    return {**result, "options": promised[3]}


# --- looked through --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrapped", [
    inside, lambda state: under("module.", inside(state)), lambda state: under("_orig_mod.module.", inside(state)),
    lambda state: under("module._orig_mod.", inside(state)),
])  # fmt: skip
def test_data_parallel_around_a_part_of_a_model_is_looked_through(wrapped: Any, saved: Saved, run: Run) -> None:
    plain = net(*NAMES)
    target = saved({key: torch.zeros_like(value) for key, value in plain.items()}, "target.pth")
    source = saved({"epoch": 90, "state_dict": wrapped(plain)}, "model.pth.tar")
    assert run("diff", source, target)[0] == 0
    code, out, _ = run("filter", "--match", target, source, "-o", "out.pth", "--strict")
    assert code == 0
    assert "looked through '" in out
    assert_identical(load("out.pth"), plain)
    report = ckptool.load_partial(model := Holder(plain), source)
    assert report.missing == report.unexpected == []
    assert torch.equal(dict(model.state_dict())["conv.weight"], plain["conv.weight"])
    chosen = ("--include", "blocks.0.*", "--only-matched")
    assert run("filter", source, "--match", target, *chosen, "-o", "part.pth")[0] == 0
    assert list(load("part.pth")) == ["blocks.0.fc.weight"]


class Holder(torch.nn.Module):
    """A model that has these tensors as parameters."""

    def __init__(self, state: State) -> None:
        super().__init__()
        for key, value in state.items():
            *path, last = key.split(".")
            at: torch.nn.Module = self
            for step in path:
                if step not in dict(at.named_children()):
                    at.add_module(step, torch.nn.Module())
                at = at.get_submodule(step)
            at.register_parameter(last, torch.nn.Parameter(torch.zeros_like(value)))


def test_a_submodule_that_is_called_module_is_its_own_where_both_names_exist(saved: Saved, run: Run) -> None:
    both = {"enc.module.w": torch.ones(2), "enc.w": torch.full((2,), 2.0)}
    one, other = saved(both, "one.pth"), saved({"enc.module.w": torch.zeros(2)}, "other.pth")
    for source, target in ((one, other), (other, one)):
        assert run("filter", source, "--match", target, "-o", "out.pth", "--force")[0] == 0
        assert torch.equal(load("out.pth")["enc.module.w"], load(source)["enc.module.w"])
    assert torch.equal(load("out.pth")["enc.w"], both["enc.w"])
    assert json.loads(run("diff", one, other, "--json")[1])["result"]["only_in_a"] == ["enc.w"]


# --- hints -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("key", "root"), [(0, "agents/0 (int)"), ("0", "agents/0")])
def test_roots_that_read_alike_are_told_apart(key: Any, root: str, saved: Saved, run: Run) -> None:
    agents = {0: {"x": torch.ones(2)}, "0": {"y": torch.ones(3)}}
    source, target = saved({"agents": agents}, "source.pth"), saved(agents[key], "target.pth")
    assert followed(run, "filter", "--match", target, source, "-o", "out.pth")["options"] == shlex.join(
        ["--root", root]
    )
    assert_identical(load("out.pth"), agents[key])
    assert root in run("inspect", source)[1]
    assert ckptool.open(source, root=root).root == ("agents", key)


def test_no_root_is_proposed_whose_text_means_another(saved: Saved, run: Run) -> None:
    state = net(*NAMES)
    target = saved(state, "target.pth")
    other = {"up.weight": torch.ones(3)}
    for content in ({"a/b": other, "a": {"b": state}}, {"": state, "x": other}):
        _, out, _ = run("filter", saved(content, "source.pth"), "--match", target, "--dry-run", "--json")
        assert "--root" not in (json.loads(out)["result"].get("hint") or "")
    for root in ("/m", "m/", "a/b"):
        source = saved({root: state, "x": other}, "source.pth")
        result = followed(run, "filter", source, "--match", target, "-o", "out.pth", "--root", "x")
        assert result["options"] == f"--root {root}"
        assert_identical(load("out.pth"), state)


def test_a_hint_at_another_root_is_none_where_the_options_of_the_command_do_not_apply(saved: Saved, run: Run) -> None:
    state = {"head.weight": torch.ones(4, 2), "w": torch.ones(3), "b": torch.ones(5)}
    source = saved(state, "source.pth")
    target = saved({"G": {"top.weight": torch.ones(5, 2), "x": torch.ones(2)}, "D": state}, "target.pth")
    call = ("load-partial", source, "--into", target, "--into-root", "G", "-o", "out.pth")
    assert followed(run, *call)["options"] == "--into-root D"
    _, out, _ = run(*call, "--adapt", "top.*=rows", "--force", "--json")  # which fits no key of D
    assert "--into-root" not in (json.loads(out)["result"].get("hint") or "")


def test_a_hint_counts_the_keys_that_the_adapters_of_the_command_make_fit(saved: Saved, run: Run) -> None:
    state = {"head.weight": torch.randn(4, 2), "w": torch.randn(3)}
    source = saved(under("net.", state), "source.pth")
    target = saved({"head.weight": torch.zeros(6, 2), "w": torch.zeros(3)}, "target.pth")
    result = followed(run, "load-partial", source, "--into", target, "--adapt", "head.*=rows", "-o", "out.pth")
    assert (result["options"], result["counts"]) == ("--strip-prefix net.", {"adapted": 1, "loaded": 1})
    assert torch.equal(load("out.pth")["head.weight"][:4], state["head.weight"])


def test_a_hint_is_none_where_tied_keys_would_get_two_values(saved: Saved, run: Run) -> None:
    table = torch.zeros(4, 2)
    target = saved({"embed": table, "head": table}, "target.pth")
    for head, hinted in ((1.0, True), (2.0, False)):
        source = saved(under("x.", {"embed": torch.ones(4, 2), "head": torch.full((4, 2), head)}), "source.pth")
        result = json.loads(run("filter", source, "--match", target, "--dry-run", "--json")[1])["result"]
        assert ("--strip-prefix x." in (result.get("hint") or "")) == hinted


def test_what_a_tied_key_takes_is_no_cast_of_its_own_source(saved: Saved, run: Run) -> None:
    table = torch.zeros(4, 2)
    target = saved({"embed": table, "head": table}, "target.pth")
    low = torch.ones(3, 2).to(torch.float8_e4m3fn)
    source = saved({"embed": torch.ones(4, 2), "head": low, "head_scale": torch.ones(3)}, "source.pth")
    assert run("filter", source, "--match", target, "-o", "out.pth")[0] == 0
    assert_identical(load("out.pth"), dict.fromkeys(["embed", "head"], torch.ones(4, 2)))


def test_a_hint_of_diff_judges_ignored_keys_as_the_comparison_does(saved: Saved, run: Run) -> None:
    one = saved({"G": net("up"), "D": net("a", "b", "c")}, "one.pth")
    other = saved(under("net.", net("a", "b", "c")), "other.pth")
    call = ("diff", one, other, "--root-a", "G", "--ignore", "net.a", "--json")
    (hint,) = [note for note in json.loads(run(*call)[1])["notes"] if "would match" in note]
    options, promised = hint.split(" would match ")
    result = json.loads(run(*call, *shlex.split(options))[1])["result"]
    assert result["equal"] == int(promised.split()[0])


def test_no_rename_is_proposed_where_names_do_not_tell_which_is_which(saved: Saved, run: Run) -> None:
    same = torch.ones(2, 2)
    source = saved({"attn.key": same, "attn.value": same, "norm": torch.ones(2)}, "source.pth")
    target = saved({"attn.k": same, "attn.v": same, "norm": torch.ones(2)}, "target.pth")
    _, out, _ = run("filter", "--match", target, source, "--dry-run", "--json")
    assert "--rename" not in (json.loads(out)["result"].get("hint") or "")


@pytest.mark.parametrize("command", ["filter", "load-partial"])
@pytest.mark.parametrize(
    ("source", "options"),
    [
        (lambda state: {"state_dict": under("model.", state), "epoch": 1}, "--strip-prefix model."),
        (lambda state: {"G": net("up.weight"), "D": state, "opt": [1]}, "--root D"),
        (lambda state: {"nets": {"G": net("up.weight"), "D": under("module.", state)}}, "--root nets/D"),
        (lambda state: {"G": net("up.weight"), "D": under("net.", inside(state))}, "--root D --strip-prefix net."),
        (lambda state: {"agents": [net("up.weight"), state]}, "--root agents/1"),
        (lambda state: {"generator": net("up.weight"), "discriminator": state}, "--root discriminator"),
        (
            lambda state: {key.replace("blocks.", "blk"): value for key, value in state.items()},
            "--rename 'blk{i}=blocks.{i}'",
        ),
        (
            lambda state: {"model": {key.replace(".fc.", ".mlp.dense."): value for key, value in state.items()}},
            "--rename mlp.dense=fc",
        ),
        (
            lambda state: {key.removeprefix("blocks."): value for key, value in state.items()},
            "--rename '{i}.fc=blocks.{i}.fc'",
        ),
        (
            lambda state: {"net." + key.replace("blocks.", "blk"): value for key, value in state.items()},
            "--rename 'blk{i}=blocks.{i}' --strip-prefix net.",
        ),
        (
            lambda state: {"G": net("up.weight"), "D": {key.replace("fc", "lin"): one for key, one in state.items()}},
            "--root D --rename lin=fc",
        ),
        (lambda state: {f"x{at}": torch.ones(9) for at in range(9)}, None),
    ],
)
def test_the_hint_is_the_option_to_add(command: str, source: Any, options: str | None, saved: Saved, run: Run) -> None:
    state = net(*NAMES)
    target = saved({key: torch.zeros_like(value) for key, value in state.items()}, "target.pth")
    option = "--match" if command == "filter" else "--into"
    call = (command, saved(source(state), "source.pth"), option, target, "-o", "out.pth")
    if options is None:
        assert json.loads(run(*call, "--json")[1])["result"].get("hint") is None
        return
    assert followed(run, *call)["options"] == options
    assert_identical(load("out.pth"), state)


def test_hints_go_on_from_the_prefixes_that_were_given(saved: Saved, run: Run) -> None:
    state = net(*NAMES)
    target = saved({key: torch.zeros_like(value) for key, value in state.items()}, "target.pth")
    source = saved(under("model.module.net.", state), "source.pth")
    result = followed(run, "filter", source, "--match", target, "-o", "out.pth", "--strip-prefix", "model.")
    assert result["options"] == "--strip-prefix net."
    result = followed(run, "filter", source, "--match", target, "-o", "out.pth", "--add-prefix", "wrong.")
    assert result["options"] == "--strip-prefix model.net. --add-prefix ''"
    assert_identical(load("out.pth"), state)
    into = saved(under("backbone.", state), "into.pth")
    result = followed(run, "load-partial", source, "--into", into, "-o", "out.pth", "--strip-prefix", "model.")
    assert result["options"] == "--strip-prefix net. --add-prefix backbone."


def test_the_hint_names_the_model_of_the_target_too(saved: Saved, run: Run) -> None:
    state = net(*NAMES)
    target = saved({"G": net("up.weight"), "D": under("net.", state)}, "gan.pth")
    save_file(state, "source.safetensors")
    for command, option, root in (("filter", "--match", "--match-root"), ("load-partial", "--into", "--into-root")):
        result = followed(run, command, "source.safetensors", option, target, "-o", "out.pth")
        assert result["options"] == f"{root} D --add-prefix net."


def test_the_hint_is_the_rule_that_loads_most_shapes_and_ties_counted(saved: Saved, run: Run) -> None:
    table = torch.zeros(4, 2)
    target = saved({"embed": table, "head": table, "body.w": torch.zeros(3), "body.b": torch.zeros(3)}, "target.pth")
    small = {"body.w": torch.ones(3), "body.b": torch.ones(3), "embed": torch.ones(9, 2)}
    large = {"x.embed": torch.ones(4, 2), "x.body.w": torch.ones(3), "x.body.b": torch.ones(3)}
    source = saved({"small": small, "large": large}, "source.pth")
    result = followed(run, "filter", source, "--match", target, "-o", "out.pth")
    assert result["options"] == "--root large --strip-prefix x."
    assert result["counts"] == {"loaded": 3, "tied": 1}


def test_hints_of_several_sources_hold_for_all_of_them(saved: Saved, run: Run) -> None:
    state = net(*NAMES)
    target = saved({key: torch.zeros_like(value) for key, value in state.items()}, "target.pth")
    parts = list(state)
    first = saved(under("model.", {key: state[key] for key in parts[:2]}), "one.pth")
    second = saved(under("model.", {key: state[key] for key in parts[2:]}), "two.pth")
    followed(run, "filter", first, second, "--match", target, "-o", "out.pth")
    assert_identical(load("out.pth"), state)
    other = saved({key: state[key] for key in parts[2:]}, "three.pth")  # without the prefix: it would be refused
    result = followed(run, "filter", first, other, "--match", target, "-o", "out.pth")
    assert result["options"] == "--rename model.conv=conv"
    assert_identical(load("out.pth"), state)


def test_a_hint_counts_what_the_other_options_of_the_command_leave(saved: Saved, run: Run) -> None:
    state = net("a", "b", "num")
    one, other = saved(under("model.", state), "one.pth"), saved(state, "other.pth")
    _, out, _ = run("diff", one, other, "--ignore", "*num", "--json")
    assert "--strip-prefix-a model. would match 2 of 2 keys" in json.loads(out)["notes"]
    result = json.loads(run("diff", one, other, "--ignore", "*num", "--strip-prefix-a", "model.", "--json")[1])[
        "result"
    ]
    assert (result["same"], result["equal"]) == (True, 2)
    complex_one = saved({**under("model.", state), "model.a": state["a"].to(torch.complex64)}, "complex.pth")
    followed(run, "filter", "--match", other, complex_one, "--cast", "--dry-run")  # a prefix would be refused: of a too
    parts = saved({**under("x.", net("a")), **under("net.", net("o", "p", "q", "b"))}, "parts.pth")
    into = saved({key: value * 0 for key, value in (net("a") | net("o", "p", "q", "b")).items()}, "into.pth")
    chosen = ("filter", "--match", into, parts, "--include", "a", "-o", "out.pth")
    assert followed(run, *chosen)["options"] == "--strip-prefix x."


def test_diff_hints_at_prefixes_and_roots(saved: Saved, run: Run) -> None:
    state = net(*NAMES)
    plain = saved(state, "plain.pth")
    for content, hint in (
        (under("model.", state), "--strip-prefix-a model."),
        ({"G": net("up.weight"), "D": state}, "--root-a D"),
        ({"G": net("up.weight"), "D": under("m.", state)}, "--root-a D --strip-prefix-a m."),
        ({**net("conv.weight"), **under("model.", net(*NAMES[1:]))}, "--strip-prefix-a model."),
    ):
        source = saved(content, "source.pth")
        _, out, _ = run("diff", source, plain, "--json")
        (note,) = [note for note in json.loads(out)["notes"] if "would match" in note]
        assert note == f"{hint} would match 5 of 5 keys"
        result = json.loads(run("diff", source, plain, *shlex.split(hint), "--json")[1])["result"]
        assert result["only_in_a"] == result["only_in_b"] == []


def test_prefixes_are_stripped_in_turn_and_one_without_its_dot_is_refused(saved: Saved, run: Run) -> None:
    state = net(*NAMES)
    target = saved({key: torch.zeros_like(value) for key, value in state.items()}, "target.pth")
    source = saved(under("model.student.", state), "source.pth")
    call = ("filter", source, "--match", target, "-o", "out.pth", "--force")
    assert run(*call, "--strip-prefix", "model.", "--strip-prefix", "student.", "--strict")[0] == 0
    assert_identical(load("out.pth"), state)
    assert run("diff", source, target, "--strip-prefix-a", "model.", "--strip-prefix-a", "student.")[0] == 0
    for last in (call, ("filter", source, "-o", "out.pth", "--force"), ("remap", source, "-o", "out.pth", "--force")):
        code, out, err = run(*last, "--strip-prefix", "model")
        assert (code, out) == (2, "")
        assert "'.student.conv.weight': an empty name" in err
    assert (
        run("filter", source, "-o", "out.pth", "--force", "--strip-prefix", "model.", "--strip-prefix", "student.")[0]
        == 0
    )
    assert_identical(load("out.pth"), state)
    code, _, err = run(*call, "--strip-prefix", "model.", "--strip-prefix", "teacher.")
    assert (code, "no key begins with 'teacher.'" in err) == (2, True)


@pytest.mark.usefixtures("folding")
def test_where_nothing_fits_three_examples_of_each_side_are_the_answer(saved: Saved, run: Run) -> None:
    words = [f"{one}{other}.weight" for one in "abcdefghij" for other in "klmnopqrst"]
    target = saved({f"x.{word}": torch.zeros(1) for word in words}, "target.pth")
    source = saved({f"y.z.{word}q": torch.zeros(1) for word in words}, "source.pth")
    for command, option in (("filter", "--match"), ("load-partial", "--into")):
        code, out, _ = run(command, source, option, target, "-o", "out.pth")
        assert code == 1
        lines = out.splitlines()
        assert "0 loaded" in lines[0]
        assert "100 missing" in lines[0]
        assert "100 unexpected" in lines[0]
        assert [sum(line.split()[0] == reason for line in lines) for reason in ("missing", "unexpected")] == [4, 4]
        assert sum("and 97 more keys" in line for line in lines) == 2
        code, out, _ = run(command, source, option, target, "-o", "out.pth", "--all")
        assert len(out.splitlines()) > 200
        code, out, _ = run(command, source, option, target, "-o", "out.pth", "--json")
        assert len(json.loads(out)["result"]["rows"]) == 200
    assert not Path("out.pth").exists()
