"""Where the weights are, and that all that lies beside them is named: GANs, agents, lists, files without tensors."""

from __future__ import annotations

import argparse
import io
import json
import os
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import CANARY, Run, Saved, load
from safetensors.torch import load_file
from torch import nn

import ckptool

State = dict[str, torch.Tensor]


def policy() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 2))


def trained() -> tuple[State, dict[str, Any]]:
    """A state_dict and the state of its optimizer."""
    model = nn.Linear(8, 8)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 8)).sum().backward()
    optimizer.step()
    return model.state_dict(), optimizer.state_dict()


def result_of(text: str) -> Any:
    return json.loads(text)["result"]


def inspected(run: Run, path: Path, *options: str) -> dict[str, Any]:
    code, out, err = run("inspect", path, "--json", *options)
    assert (code, err) == (0, "")
    [result] = result_of(out)
    return dict(result)


def beside(result: dict[str, Any]) -> list[str]:
    return [item["path"] for item in result["beside"]]


def converted(run: Run, path: Path, *options: str) -> tuple[State, list[str]]:
    """The tensors that `convert --to safetensors` writes, and what it says that it left out."""
    code, out, err = run("convert", path, "-o", "o.safetensors", "--json", "--force", *options)
    assert (code, err) == (0, "")
    return load_file("o.safetensors"), result_of(out)[0]["left_out"]


def assert_same(one: State, other: State) -> None:
    assert list(one) == list(other) or one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in other)


# --- a known name goes before loose tensors --------------------------------------------------------------------------

LOOSE = {
    "a random state": {"model_state_dict": policy, "optimizer": {}, "torch_rng_state": torch.get_rng_state()},
    "a memory bank": {"epoch": 3, "state_dict": policy, "memory_bank": torch.randn(1000, 16)},
    "a replay buffer": {"net": policy, "replay.obs": torch.randn(500, 4), "replay.reward": torch.randn(500), "step": 1},
    "normalisation": {"model": policy, "obs_mean": torch.randn(900), "obs_var": torch.randn(900)},
    "an unknown name": {"actor": policy, "torch_rng_state": torch.get_rng_state(), "episode": 9},
    "two levels": {"module": {"state_dict": policy, "queue": torch.randn(2000, 4)}, "rng": torch.get_rng_state()},
}


def built(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {name: built(value) for name, value in tree.items()}
    return tree().state_dict() if tree is policy else tree


@pytest.mark.parametrize("name", LOOSE)
def test_a_dict_of_weights_goes_before_a_larger_tensor_beside_it(name: str, saved: Saved, run: Run) -> None:
    tree = built(LOOSE[name])
    path, target = saved(tree, "trained.pth"), saved(policy().state_dict(), "target.pth")
    found = [key for key in tree if isinstance(tree[key], torch.Tensor)]
    tensors, left_out = converted(run, path)
    assert tensors.keys() == load(target).keys()
    assert set(found) <= set(left_out)
    assert set(found) <= set(beside(inspected(run, path)))
    code, out, _ = run("filter", path, "--match", target, "-o", "merged.pth", "--min-loaded", "100%")
    assert code == 0
    assert "4 loaded" in out
    assert run("remap", path, "--add-prefix", "net.", "-o", "renamed.pth")[0] == 0
    renamed = torch.load("renamed.pth", weights_only=True)
    assert renamed.keys() == tree.keys()  # what lies beside the weights keeps its name
    assert all(torch.equal(renamed[key], tree[key]) for key in found)


def test_publishing_takes_the_weights_and_names_the_memory_bank(saved: Saved, run: Run) -> None:
    path = saved(built(LOOSE["a memory bank"]), "bank.pth")
    code, out, _ = run("convert", path, "--publish", "--to", "safetensors", "--json")
    [result] = result_of(out)
    assert (code, result["tensors"], sorted(result["left_out"])) == (0, 4, ["epoch", "memory_bank"])
    assert load_file(result["output"]).keys() == policy().state_dict().keys()


def test_the_keys_of_a_state_dict_are_the_weights_though_one_has_a_known_name(saved: Saved) -> None:
    layers = {f"layers.{i}.w": torch.ones(2) for i in range(4)}
    for name, tree in {
        "below.pth": {"state_dict": {**layers, "model": {"a.w": torch.ones(9)}}},
        "few.pth": {"state_dict": {"a.w": torch.ones(1), "state_dict": layers}},
        "top.pth": {**layers, "state_dict": {"a.w": torch.ones(9)}},
        "metadata.pth": policy().state_dict() | {"weights": {"w": torch.ones(9)}},
    }.items():
        opened = ckptool.open(saved(tree, name))
        assert all("." in key for key in opened.state_dict())
        assert "layers.0.w" in opened.state_dict() or "a.w" in opened.state_dict() or "0.weight" in opened.state_dict()
        assert opened.root in ((), ("state_dict",))


def test_of_two_readings_it_is_said_which_was_taken_and_how_to_have_the_other(saved: Saved, run: Run) -> None:
    path = saved({"a.obs": torch.ones(3), "model": policy().state_dict()}, "two.pth")
    result = inspected(run, path)
    assert (result["root"], result["other_roots"]) == ("model", ["/"])
    code, out, _ = run("convert", path, "-o", "o.pth")
    assert (code, "other places (--root): /" in out) == (0, True)
    assert list(ckptool.open(path, root="/").state_dict()) == ["a.obs"]


# --- several models --------------------------------------------------------------------------------------------------


def gan() -> dict[str, Any]:
    (g, opt_g), (d, opt_d) = trained(), trained()
    return {"G": g, "D": d, "optG": opt_g, "optD": opt_d, "epoch": 3}


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({}, ["optG", "optD", "epoch"]),
        ({"losses": [1.0, 0.5]}, ["optG", "optD", "epoch", "losses"]),
        ({"ema": trained()[0], "history": ([1, 2], {"lr": [0.1]})}, ["optG", "optD", "epoch", "ema", "history"]),
        ({"scheduler": {"milestones": [30, 60]}, "ids": {3, 4}}, ["optG", "optD", "epoch", "scheduler", "ids"]),
    ],
)
@pytest.mark.parametrize("suffix", ["safetensors", "npz"])
def test_all_beside_the_models_of_a_gan_is_named_and_stops_nothing(
    more: dict[str, Any], named: list[str], suffix: str, saved: Saved, run: Run
) -> None:
    tree = {**gan(), **more}
    path = saved(tree, "gan.pt")
    code, out, _ = run("convert", path, "-o", f"o.{suffix}", "--json")
    [result] = result_of(out)
    assert (code, result["left_out"]) == (0, named)
    assert beside(inspected(run, path)) == named
    expected = {f"{name}/{key}": value for name in "GD" for key, value in tree[name].items()}
    written = ckptool.open(f"o.{suffix}").to_torch()
    assert_same(dict(written), expected)
    rows = {row["key"]: row["reason"] for row in result_of(run("filter", path, "--dry-run", "--json")[1])["rows"]}
    assert rows == dict.fromkeys(expected, "loaded") | dict.fromkeys(named, "ignored")


def test_an_average_beside_two_models_is_in_no_output_and_named(saved: Saved, run: Run) -> None:
    path = saved({"G": trained()[0], "D": trained()[0], "ema": trained()[0], "it": 1}, "sg3.pt")
    tensors, left_out = converted(run, path)
    assert (len(tensors), left_out) == (4, ["ema", "it"])
    assert inspected(run, path)["ema"] == ["ema"]


@pytest.mark.parametrize(
    ("tree", "keys", "named"),
    [
        (
            {"model": {"atoms": ["H"]}, "scaler": {"stats": {"mean": torch.ones(1)}}, "other": {"std": torch.ones(1)}},
            ["scaler/stats/mean", "other/std"], ["model"],
        ),
        (
            [nn.Linear(2, 2).state_dict(), nn.Linear(1, 1).state_dict(), trained()[1], [0.5]],
            ["0/weight", "0/bias", "1/weight", "1/bias"], ["2", "3"],
        ),
        (
            ((nn.Linear(2, 2).state_dict(), nn.Linear(1, 1).state_dict()), (1, 2)),
            ["0/0/weight", "0/0/bias", "0/1/weight", "0/1/bias"], ["1"],
        ),
        ((torch.ones(2), torch.zeros(3), 4), ["0", "1"], ["2"]),
        ({"weight": torch.ones(2), "aux": {"scale": torch.ones(3)}, "n": 1}, ["weight", "aux/scale"], ["n"]),
        (
            {"net_g": {"w": torch.ones(1)}, "a": torch.ones(2), "b": torch.ones(3), "step": 1},
            ["net_g/w", "a", "b"], ["step"],
        ),
        (
            {"agents": [nn.Linear(2, 2).state_dict(), nn.Linear(1, 1).state_dict()], "rng": torch.get_rng_state()},
            ["agents/0/weight", "agents/0/bias", "agents/1/weight", "agents/1/bias", "rng"], [],
        ),
        (
            {"G": nn.Linear(2, 2).state_dict(), "D": nn.Linear(1, 1).state_dict(), "log_scale": torch.ones(1)},
            ["G/weight", "G/bias", "D/weight", "D/bias", "log_scale"], [],
        ),
        (
            {"G": nn.Linear(2, 2).state_dict(), "D": nn.Linear(1, 1).state_dict(), "losses": list(torch.ones(2))},
            ["G/weight", "G/bias", "D/weight", "D/bias", "losses/0", "losses/1"], [],
        ),
    ],
    ids=[
        "matgl", "a list", "nested tuples", "bare tensors", "a parameter and a dict", "fewer in a dict",
        "agents and a state", "a tensor beside two", "tensors in a list",
    ],
)  # fmt: skip
def test_lists_and_tuples_of_models_are_read_and_the_rest_named(
    tree: Any, keys: list[str], named: list[str], saved: Saved, run: Run
) -> None:
    path = saved(tree)
    tensors, left_out = converted(run, path)
    assert (sorted(tensors), left_out) == (sorted(keys), named)
    assert (beside(inspected(run, path)), [row["key"] for row in inspected(run, path)["tensors"]]) == (named, keys)
    for key, value in tensors.items():
        node = tree
        for step in key.split("/"):
            node = node[int(step) if isinstance(node, (list, tuple)) else step]
        assert torch.equal(node, value)


ONE = {
    "a tuple": (lambda state: (state, {"lr": 0.1}, 3), "0", ["1", "2"]),
    "a list with an optimizer": (lambda state: [trained()[1], state, [0.5]], "1", ["0", "2"]),
    "a tuple with a module": (lambda state: (nn.Linear(2, 2), trained()[1]), "0", ["1"]),
    "a training state in a tuple": (lambda state: ({"model": state, "epoch": 1}, 5), "0/model", ["1", "0/epoch"]),
    "a random state": (lambda state: (state, torch.get_rng_state()), "0", ["1"]),
    "random states": (lambda state: {"actor": dict(state), "rng": [torch.get_rng_state()]}, "actor", ["rng"]),
    "a replay buffer": (lambda state: {"policy": dict(state), "replay": [(torch.ones(4), 1)]}, "policy", ["replay"]),
    "an agent": (
        lambda state: {"agents": [{"net": state, "opt": trained()[1], "wins": [1, 2]}], "round": 7},
        "agents/0/net", ["round", "agents/0/opt", "agents/0/wins"],
    ),
    "a bank": (lambda state: {"net_g": dict(state), "bank": torch.ones(1000, 16)}, "net_g", ["bank"]),
    "a bank and one weight": (
        lambda state: {"net_g": {"weight": state["weight"]}, "bank": torch.ones(1000, 16)}, "net_g", ["bank"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ONE)
def test_one_model_in_a_list_or_beside_larger_tensors_has_the_keys_of_its_state_dict(
    name: str, saved: Saved, run: Run
) -> None:
    make, root, named = ONE[name]
    state = nn.Linear(2, 2).state_dict()
    path, target = saved(make(state)), saved(state, "target.pth")
    tensors, left_out = converted(run, path)
    assert tensors.keys() <= state.keys()
    assert name == "a tuple with a module" or all(torch.equal(tensors[key], state[key]) for key in tensors)
    assert sorted(left_out) == sorted(named)
    result = inspected(run, path)
    assert (result["root"], sorted(beside(result))) == (root, sorted(named))
    for to in ("npz", "sharded"):
        code, out, _ = run("convert", path, "--to", to, "-o", f"o.{to}", "--json")
        assert (code, sorted(result_of(out)[0]["left_out"])) == (0, sorted(named))
    assert run("filter", path, "--match", target, "-o", "merged.pth")[0] == 0
    assert run("load-partial", path, "--into", target, "-o", "loaded.pth")[0] == 0
    assert_same({key: load("loaded.pth")[key] for key in tensors}, tensors)
    assert run("remap", path, "--add-prefix", "net.", "-o", "renamed.pth")[0] == 0
    opened = ckptool.open("renamed.pth")
    assert set(opened.state_dict()) == {f"net.{key}" for key in tensors}
    renamed = torch.load("renamed.pth", weights_only=False)
    assert type(renamed) is type(make(state))
    assert len(renamed) == len(make(state))


def test_keys_in_several_containers_are_renamed_where_the_refusal_says(saved: Saved, run: Run) -> None:
    agents = {"agents": [nn.Linear(2, 2).state_dict(), nn.Linear(1, 1).state_dict()]}
    for name, tree, roots in (
        ("agents.pth", agents, ["agents/0", "agents/1"]),
        ("list.pth", [torch.ones(2), torch.ones(3)], []),
    ):
        path = saved(tree, name)
        code, _, err = run("remap", path, "--add-prefix", "x.", "-o", "o.pth", "--force")
        assert (code, "convert it to safetensors" in err, "--root" in err) == (2, True, bool(roots))
        for root in roots:
            assert root in err
            assert run("remap", path, "--root", root, "--add-prefix", "x.", "-o", "o.pth", "--force")[0] == 0
        converted(run, path)
        assert run("remap", "o.safetensors", "--add-prefix", "x.", "-o", "x.safetensors", "--force")[0] == 0


def test_a_root_inside_a_list_names_its_neighbours(saved: Saved, run: Run) -> None:
    path = saved({"agents": [nn.Linear(2, 2).state_dict(), nn.Linear(1, 1).state_dict()], "round": 7})
    assert converted(run, path, "--root", "agents/1")[1] == ["round", "agents/0"]


def test_metadata_of_a_state_dict_is_no_value_and_stays_in_the_tree(saved: Saved, run: Run) -> None:
    path = saved({"G": nn.Linear(2, 2).state_dict(), "D": nn.Linear(1, 1).state_dict()})
    assert beside(inspected(run, path)) == []
    assert run("convert", path, "-o", "o.pth", "--dtype", "float16")[0] == 0
    assert torch.load("o.pth", weights_only=True)["G"]._metadata == OrderedDict({"": {"version": 1}})


def test_a_part_of_a_gan_is_what_patterns_choose(saved: Saved, run: Run) -> None:
    tree = gan()
    path = saved(tree, "gan.pt")
    assert run("filter", path, "--include", "G/*", "--include", "epoch", "-o", "g.pt")[0] == 0
    written = torch.load("g.pt", weights_only=True)
    assert written.keys() == {"G", "epoch"}
    assert_same(written["G"], tree["G"])
    assert run("filter", path, "--exclude", "opt*", "-o", "two.pt")[0] == 0
    assert torch.load("two.pt", weights_only=True).keys() == {"G", "D", "epoch"}


# --- entries that are no tensors -------------------------------------------------------------------------------------


def leaked() -> dict[str, Any]:
    state: Any = OrderedDict((f"model.diffusion_model.{i}.w", torch.randn(8, 8)) for i in range(4))
    state["state_dict"] = OrderedDict((f"cond_stage_model.{i}.w", torch.randn(8, 8)) for i in range(2))
    return {"state_dict": state}


def with_extra_state() -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save({"scale": torch.ones(2)}, buffer)
    return OrderedDict({"q.weight": torch.ones(2), "q._extra_state": buffer})


@pytest.mark.parametrize(
    ("make", "options", "kept"),
    [
        (leaked, ["--exclude", "state_dict"], [f"model.diffusion_model.{i}.w" for i in range(4)]),
        (leaked, ["--include", "model.*"], [f"model.diffusion_model.{i}.w" for i in range(4)]),
        (leaked, ["--include", "*.0.w", "--include", "state_*"], ["model.diffusion_model.0.w", "state_dict"]),
        (with_extra_state, ["--include", "*.weight"], ["q.weight"]),
        (with_extra_state, ["--exclude", "*_extra_state"], ["q.weight"]),
        (with_extra_state, ["--exclude", "re:_extra"], ["q.weight"]),
        (with_extra_state, [], ["q.weight", "q._extra_state"]),
        (lambda: {"a.w": torch.ones(1), "a.steps": 5, "b.w": torch.ones(1)}, ["--include", "a.*"], ["a.w", "a.steps"]),
    ],
)
def test_patterns_of_filter_choose_objects_as_they_choose_tensors(
    make: Any, options: list[str], kept: list[str], saved: Saved, run: Run
) -> None:
    path = saved(make(), "in.ckpt")
    code, out, _ = run("filter", path, *options, "-o", "out.ckpt")
    assert (code, "fits no key" in out) == (0, False)
    written = torch.load("out.ckpt", weights_only=False)
    assert list(written.get("state_dict", written) if make is leaked else written) == kept
    if "state_dict" not in kept and "q._extra_state" not in kept and "a.steps" not in kept:
        assert run("filter", path, *options, "-o", "out.safetensors")[0] == 0
        assert sorted(load_file("out.safetensors")) == sorted(kept)


def test_what_a_pattern_leaves_out_has_a_row_that_says_so(saved: Saved, run: Run) -> None:
    path = saved(leaked(), "nai.ckpt")
    code, out, _ = run("filter", path, "--exclude", "state_dict", "-o", "out.safetensors")
    assert code == 0
    assert "an object with 2 tensors: not chosen" in out
    code, out, _ = run("filter", saved(with_extra_state(), "te.pt"), "--include", "*.weight", "-o", "out.pt")
    assert (code, "ignored  q._extra_state  no tensor: not chosen" in out) == (0, True)


def test_objects_of_a_second_file_are_taken_like_its_tensors(saved: Saved, run: Run) -> None:
    one, two = saved({"a.w": torch.ones(1), "a.n": 1}, "one.pth"), saved({"b.w": torch.ones(1), "b.n": 2}, "two.pth")
    assert run("filter", one, two, "-o", "both.pth")[0] == 0
    assert torch.load("both.pth", weights_only=True) == {"a.w": torch.ones(1), "a.n": 1, "b.w": torch.ones(1), "b.n": 2}


@pytest.mark.parametrize("command", ["inspect", "diff", "filter", "load-partial"])
def test_a_pattern_that_fits_an_object_is_not_called_useless(command: str, saved: Saved, run: Run) -> None:
    state = {"q.weight": torch.ones(2), "q._extra_state": {"scale": torch.ones(2)}}
    path, other = saved(state, "a.pth"), saved({**state, "q._extra_state": {"scale": torch.zeros(2)}}, "b.pth")
    args = {
        "inspect": [path, "--exclude", "*_extra_state"],
        "diff": [path, other, "--values", "--ignore", "*_extra_state"],
        "filter": [path, "--match", other, "-o", "o.pth", "--exclude", "*_extra_state"],
        "load-partial": [path, "--into", other, "-o", "o.pth", "--exclude", "*_extra_state"],
    }[command]
    code, out, err = run(command, *args)
    assert (code, err) == (0, "")
    assert "fits no key" not in out


# --- files without tensors -------------------------------------------------------------------------------------------


class Exploit:
    def __reduce__(self) -> Any:
        return (os.mkdir, (CANARY,))


WITHOUT = {
    "a scheduler": ({"last_epoch": 3, "_last_lr": [0.1]}, ["last_epoch: 3", "_last_lr: [0.1]"]),
    "arguments": (argparse.Namespace(lr=1, name="x"), ["argparse.Namespace(lr=1, name='x')"]),
    "an exploit in a dict": ({"hook": Exploit()}, ["hook: posix.mkdir('CKPTOOL_CANARY_EXECUTED')"]),
    "an exploit alone": (Exploit(), ["the top: posix.mkdir('CKPTOOL_CANARY_EXECUTED')"]),
    "a list": ([1, {"a": "b"}], ["0: 1", "1: {'a': 'b'}"]),
    "a number": (5, ["the top: 5"]),
    "a raw storage": ({"buffer": torch.arange(4.0).untyped_storage()}, ["buffer: a storage of bytes, no tensor, 16 B"]),
    "an average": ({"ema": nn.Linear(2, 2).state_dict(), "n": 1}, ["ema: OrderedDict with 2 tensors, 24 B", "n: 1"]),
    "optimizers": ({"optims": {"a": trained()[1]}}, ["optims/a: Adam of 2 parameters"]),
}


@pytest.mark.parametrize("plain", [False, True], ids=["torch.save", "pickle"])
@pytest.mark.parametrize("name", WITHOUT)
def test_a_file_without_weights_is_shown_and_only_who_needs_weights_refuses(
    name: str, plain: bool, saved: Saved, run: Run
) -> None:
    tree, shown = WITHOUT[name]
    if plain and name in ("an average", "optimizers", "a raw storage"):
        pytest.skip("tensors in a plain pickle have a test of their own")
    path = saved(tree, "other.bin")
    if plain:
        path.write_bytes(pickle.dumps(tree))
    code, out, err = run("inspect", path)
    assert (code, err) == (0, "")
    assert "no tensors" in out
    assert all(text in out for text in shown), out
    assert inspected(run, path)["tensors"] == []
    for args in (["diff", path, path], ["convert", path, "-o", "o.pth"], ["filter", path, "-o", "o.pth"]):
        code, _, err = run(*args)
        assert (code, "no tensors at" in err) == (2, True)
    assert not Path("o.pth").exists()


@pytest.mark.parametrize("name", WITHOUT)
def test_a_check_of_a_file_without_weights_exits_1_just_for_names_that_act(name: str, saved: Saved, run: Run) -> None:
    path = saved(WITHOUT[name][0], "other.bin")
    code, out, err = run("inspect", path, "--check", "--hash", "--stats")
    assert err == ""
    if "exploit" in name:
        assert (code, "posix.mkdir" in out) == (1, True)
    elif name != "arguments":
        assert code == 0


def test_an_optimizers_state_alone_is_looked_at_compared_and_checked(saved: Saved, run: Run) -> None:
    state = trained()[1]
    path = saved(state, "optimizer.pt")
    result = inspected(run, path)
    tensors = {f"{number}/{name}": t for number, one in state["state"].items() for name, t in one.items()}
    assert (result["root"], [row["key"] for row in result["tensors"]]) == ("state", list(tensors))
    assert beside(result) == ["param_groups"]
    assert run("inspect", path, "--check")[0] == 0
    assert run("diff", path, path, "--values")[0] == 0
    state["state"][0]["exp_avg"] += 1
    assert run("diff", path, saved(state, "other.pt"), "--values")[0] == 1
    nested = saved({"optimizer": state, "epoch": 1}, "nested.pt")
    assert len(inspected(run, nested, "--root", "optimizer")["tensors"]) == len(tensors)


# --- keys that read alike --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tree", "keys"),
    [
        ({0: torch.ones(2), "0": torch.zeros(3)}, ["0 (int)", "0"]),
        ({"1.5": torch.ones(2), 1.5: torch.zeros(3), "x": 1}, ["1.5", "1.5 (float)"]),
        ({"G": {"0": torch.ones(2), 0: torch.zeros(3)}, "D": {"a": torch.ones(4)}}, ["G/0", "G/0 (int)", "D/a"]),
        ({"a": {"b/c": torch.ones(2)}, "a/b": {"c": torch.ones(3)}}, ["a/b/c", "a/b/c (2)"]),
        ({"model": {None: torch.ones(2), "None": torch.zeros(3)}}, ["None (NoneType)", "None"]),
    ],
)
def test_keys_that_read_alike_are_told_apart_and_refused_only_where_one_is_written(
    tree: Any, keys: list[str], saved: Saved, run: Run
) -> None:
    path = saved(tree)
    assert [row["key"] for row in inspected(run, path)["tensors"]] == keys
    shapes = {row["key"]: row["shape"] for row in inspected(run, path)["tensors"]}
    assert len({str(shape) for shape in shapes.values()}) == len(keys)
    assert run("diff", path, path, "--values")[0] == 0
    for args in (
        ["convert", path, "-o", "o.safetensors"],
        ["convert", path, "-o", "o.pth"],
        ["filter", path, "-o", "f.pth"],
    ):
        code, _, err = run(*args)
        assert (code, err.count("\n")) == (2, 1)
        assert "two keys read" in err or "no text" in err
    assert os.listdir() == [path.name]


def test_neither_of_two_keys_that_read_alike_is_in_the_way_of_the_others(saved: Saved, run: Run) -> None:
    path = saved({0: torch.ones(2), "0": torch.zeros(3), "b.w": torch.ones(4)})
    assert run("filter", path, "--include", "b.*", "-o", "b.pth")[0] == 0
    assert list(load("b.pth")) == ["b.w"]
    assert run("filter", path, "--include", "0", "-o", "zero.pth")[0] == 2
    assert run("remap", path, "--rename", "0 (int)=int.w", "--rename", "0=text.w", "-o", "named.pth")[0] == 0
    assert {key: len(t) for key, t in load("named.pth").items()} == {"int.w": 2, "text.w": 3, "b.w": 4}
    target = saved({"0": torch.ones(3)}, "target.pth")
    assert "two keys read" in run("filter", path, "--match", target, "-o", "o.pth")[2]


# --- a bare tensor ---------------------------------------------------------------------------------------------------


def test_a_bare_tensor_is_shown_and_a_rename_says_that_there_is_no_key(saved: Saved, run: Run) -> None:
    path = saved(torch.zeros(3))
    result = inspected(run, path)
    assert [(row["key"], row["shape"]) for row in result["tensors"]] == [("", [3])]
    assert "a bare tensor" in run("inspect", path)[1]
    code, _, err = run("remap", path, "--sub", "s/^$/w/", "-o", "o.pth")
    assert (code, "bare tensor" in err, "--root" in err) == (2, True, False)
    nested = saved({"age": torch.zeros(3), "n": 1}, "nested.pth")
    assert "bare tensor" in run("remap", nested, "--root", "age", "--add-prefix", "a.", "-o", "o.pth")[2]


def test_a_bare_parameter_and_an_array_are_shown_too(saved: Saved, run: Run) -> None:
    assert len(inspected(run, saved(nn.Parameter(torch.ones(2, 2))))["tensors"]) == 1
    assert run("convert", saved(torch.ones(2)), "-o", "o.pth")[0] == 0
    assert torch.equal(torch.load("o.pth", weights_only=True), torch.ones(2))


# --- several inputs --------------------------------------------------------------------------------------------------


def test_a_bad_input_of_many_takes_no_good_result_away(saved: Saved, run: Run) -> None:
    good, bad = saved({"w": torch.ones(2)}, "good.pth"), Path("bad.pth")
    bad.write_bytes(b"<!DOCTYPE html>")
    code, out, err = run("inspect", good, bad, "absent.pth", good, "--json")
    document = json.loads(out)
    assert code == 2
    assert [result["path"] for result in document["result"]] == [str(good)] * 2
    assert [error["path"] for error in document["errors"]] == ["bad.pth", "absent.pth"]
    assert err.count("\n") == 2
    code, out, _ = run("convert", bad, good, "--to", "safetensors")
    assert code == 2
    assert torch.equal(load_file("good.safetensors")["w"], torch.ones(2))
    code, out, _ = run("inspect", bad, "--json")
    assert (code, "error" in json.loads(out)) == (2, True)
