"""`remap`: all that carries the names of keys follows them: module versions, indexes, optimizers, ties."""

from __future__ import annotations

import gc
import json
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import FIXTURES, Run, Saved, State, assert_identical, tied_groups, torch_load
from remapping import Wrapped, assert_bits, go_and_return
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import ckptool
from ckptool.errors import CkptoolError


def test_metadata_of_modules_follows_their_names(remap: Callable[..., Any], saved: Saved) -> None:
    model = Wrapped()
    remap(saved(model.state_dict()), "out.pth", [{"rename": "model.{i}", "to": "net.layer{i}"}])
    expected = {"": {"version": 1}, "model": {"version": 1}, "net.layer0": {"version": 1}, "net.layer1": {"version": 2},
                "net.layer2": {"version": 1}}  # fmt: skip
    assert dict(torch.load("out.pth")._metadata) == expected


def test_metadata_of_the_root_gets_the_prefix_that_the_root_gets(remap: Callable[..., Any], saved: Saved) -> None:
    inner = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    outer = nn.Module()
    outer.model = inner
    remap(saved(inner.state_dict()), "out.pth", [{"add_prefix": "model."}])
    found, expected = torch.load("out.pth"), outer.state_dict()
    assert list(found) == list(expected)
    assert {name: found._metadata[name] for name in found._metadata} == {
        name: entry for name, entry in expected._metadata.items() if name
    }
    remap("out.pth", "back.pth", [{"strip_prefix": "model."}])
    assert_identical(torch.load("back.pth"), inner.state_dict())
    outer.load_state_dict(found, strict=True)


def test_a_module_takes_what_was_stripped_and_knows_its_versions(remap: Callable[..., Any], saved: Saved) -> None:
    model = Wrapped()
    model.model[1].running_mean.fill_(3)
    remap(saved(model.state_dict()), "out.pth", [{"strip_prefix": "model."}])
    found = torch.load("out.pth")
    assert dict(found._metadata) == dict(model.model.state_dict()._metadata)
    fresh = Wrapped().model
    fresh.load_state_dict(found, strict=True)
    assert fresh[1].running_mean.tolist() == [3.0] * 4


def test_metadata_follows_names_that_a_table_spells_out(remap: Callable[..., Any], saved: Saved) -> None:
    model = nn.Sequential(OrderedDict(bn=nn.BatchNorm1d(2)))
    state = model.state_dict()
    remap(saved(state), "out.pth", {key: key.replace("bn.", "norm.") for key in state})
    assert dict(torch.load("out.pth")._metadata) == {"": {"version": 1}, "norm": {"version": 2}}


METADATA: dict[str, tuple[Any, dict[str, str]]] = {
    "a leaf of another name": ([{"sub": "weight$", "by": "kernel"}], {}),
    "all leaves of another name, in another place": (
        [{"sub": r"^head\.(weight|bias)$", "by": r"out.\1_"}], {"head": "out"}),
    "a table": ({"head.weight": "out.weight", "head.bias": "out.bias"}, {"head": "out"}),
    "a rename of whole names": (
        [{"rename": f"head.{leaf}", "to": f"out.{leaf}"} for leaf in ("weight", "bias")], {"head": "out"}),
    "a module without keys goes with the one above it": (
        [{"rename": "body", "to": "trunk.main"}],
        {"body": "trunk.main", "body.0": "trunk.main.0", "body.1": "trunk.main.1", "body.2": "trunk.main.2"}),
    "all under a prefix": (
        [{"add_prefix": "net."}],
        {"": "net", "body": "net.body", "body.0": "net.body.0", "body.1": "net.body.1", "body.2": "net.body.2",
         "head": "net.head"}),
    "a capture": ([{"rename": "body.{i}", "to": "b{i}"}], {"body.0": "b0", "body.1": "b1"}),
    "a rule that has the last word on some leaves": ([{"rename": "body.0.bias", "to": "shift"}], {}),
    "two that swap": ([{"rename": "head", "to": "t"}, {"rename": "body.0", "to": "head"},
                       {"rename": "t", "to": "body.0"}], {"head": "body.0", "body.0": "head"}),
}  # fmt: skip


@pytest.mark.parametrize("name", METADATA)
def test_metadata_goes_where_the_keys_go_and_comes_back(
    name: str, remap: Callable[..., Any], run: Run, saved: Saved
) -> None:
    model = nn.Module()
    model.body = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.ReLU())
    model.head = nn.Linear(2, 2)
    rules, expected = METADATA[name]
    source = saved(model.state_dict())
    back = go_and_return(remap, run, source, rules)
    before, after = torch.load(source)._metadata, torch.load("there.pth")._metadata
    assert list(after.items()) == [(expected.get(path, path), entry) for path, entry in before.items()]
    assert_identical(torch.load(source), torch.load(back))


def test_metadata_of_a_module_that_is_taken_apart_goes_to_every_part(
    remap: Callable[..., Any], run: Run, saved: Saved
) -> None:
    model = nn.Sequential(OrderedDict(qkv=nn.Linear(2, 6), norm=nn.BatchNorm1d(6)))
    source = saved(model.state_dict())
    rules = [{"split": f"qkv.{leaf}", "into": [f"{n}.{leaf}" for n in "qkv"]} for leaf in ("weight", "bias")]
    back = go_and_return(remap, run, source, rules)
    assert list(torch.load("there.pth")._metadata.items()) == [
        ("", {"version": 1}), *((n, {"version": 1}) for n in "qkv"), ("norm", {"version": 2})
    ]  # fmt: skip
    assert_identical(torch.load(source), torch.load(back))


def test_metadata_that_another_tool_added_stays_on_the_way_back(
    remap: Callable[..., Any], run: Run, saved: Saved
) -> None:
    remap(saved(Wrapped().state_dict()), "there.pth", [{"strip_prefix": "model."}], "--save-map", "map.json")
    state = torch.load("there.pth")
    state._metadata["1"]["version"] = 7
    state._metadata["added"] = {"version": 5}
    torch.save(state, "there.pth")
    assert run("remap", "there.pth", "-o", "back.pth", "--invert", "map.json")[0] == 0
    assert list(torch.load("back.pth")._metadata.items()) == [
        ("", {"version": 1}), ("model", {"version": 1}), ("model.0", {"version": 1}), ("model.1", {"version": 7}),
        ("model.2", {"version": 1}), ("added", {"version": 5}),
    ]  # fmt: skip


def test_a_whole_model_becomes_the_state_dict_that_torch_gives(remap: Callable[..., Any], saved: Saved) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    remap(saved(model), "out.pth", [{"rename": "0", "to": "fc"}])
    expected = model.state_dict()
    renamed = OrderedDict((key.replace("0.", "fc."), tensor) for key, tensor in expected.items())
    renamed._metadata = OrderedDict({"": {"version": 1}, "fc": {"version": 1}, "1": {"version": 2}})
    assert_identical(renamed, torch.load("out.pth"))


def test_the_garbage_collector_runs_again_whatever_happens(saved: Saved) -> None:
    path = saved({"a": torch.ones(2), "b": torch.ones(2)})
    ckptool.remap(path, [{"add_prefix": "x."}])
    assert gc.isenabled()
    with pytest.raises(CkptoolError):
        ckptool.remap(path, [{"rename": "a", "to": "b"}])
    assert gc.isenabled()


def test_dropped_counters_do_not_leave_a_promise_that_they_are_there(remap: Callable[..., Any], saved: Saved) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    remap(saved(model.state_dict()), "out.pth", [{"drop": "*.num_batches_tracked"}])
    fresh = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    fresh.load_state_dict(torch.load("out.pth"), strict=True)  # version 2 would make it miss the counter


def test_no_record_of_ties_speaks_of_old_names(remap: Callable[..., Any], saved: Saved) -> None:
    save_file({"emb.weight": torch.randn(3, 2)}, "in.safetensors", {"head.weight": "emb.weight", "author": "someone"})
    remap("in.safetensors", "out.safetensors", [{"rename": "emb", "to": "wte"}, {"rename": "head", "to": "lm_head"}])
    with safe_open("out.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "author": "someone", "lm_head.weight": "wte.weight"}
        assert list(file.keys()) == ["wte.weight"]
    remap("in.safetensors", "one.safetensors", [{"drop": "head.*"}])
    with safe_open("one.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "author": "someone"}


def test_a_tie_whose_names_swap_is_recorded_the_right_way_round(remap: Callable[..., Any], run: Run) -> None:
    save_file({"a.w": torch.ones(2)}, "in.safetensors", {"b.w": "a.w"})
    remap("in.safetensors", "out.safetensors", [{"rename": "a", "to": "z"}])
    assert run("convert", "out.safetensors", "-o", "out.pth")[0] == 0
    loaded = torch.load("out.pth")
    assert list(loaded) == ["z.w", "b.w"]
    assert loaded["z.w"].data_ptr() == loaded["b.w"].data_ptr()


def test_the_index_of_shards_follows(remap: Callable[..., Any]) -> None:
    remap(FIXTURES / "sharded", "out", [{"strip_prefix": "model."}, {"rename": "lm_head", "to": "head"}])
    index = json.loads(Path("out/model.safetensors.index.json").read_text()) if Path(
        "out/model.safetensors.index.json").exists() else None  # fmt: skip
    tensors: State = {}
    for shard in Path("out").glob("*.safetensors"):
        tensors |= load_file(shard)
        with safe_open(shard, "pt") as file:
            recorded = dict(file.metadata())
    assert {name for name in tensors if name.startswith(("model.", "lm_head"))} == set()
    record = index["metadata"] if index else recorded
    assert record["head.weight"] == "embed.weight"
    assert not {name for name in record if name.startswith(("model.", "lm_head"))}
    assert index is None or set(index["weight_map"]) == set(tensors)


def named_optimizer(model: nn.Module) -> dict[str, Any]:
    """An optimizer state keyed by names, as torch's FSDP utilities and DCP write it."""
    state = {name: {"step": torch.tensor(1.0), "exp_avg": torch.randn_like(p)} for name, p in model.named_parameters()}
    return {"state": state, "param_groups": [{"lr": 0.1, "betas": (0.9, 0.999), "params": list(state)}]}


def test_an_optimizer_that_knows_names_follows(remap: Callable[..., Any], saved: Saved) -> None:
    model = Wrapped()
    tree = {"model": model.state_dict(), "optimizer": named_optimizer(model)}
    remap(saved(tree), "out.pth", [{"rename": "model.{i}", "to": "layer{i}"}])
    found = torch.load("out.pth")
    old = {name.replace("model.", "layer"): entry for name, entry in tree["optimizer"]["state"].items()}
    assert_identical(found["optimizer"]["state"], old)
    assert found["optimizer"]["param_groups"][0]["params"] == list(old)
    assert set(old) <= set(found["model"])


def test_param_names_of_an_optimizer_by_position_follow(remap: Callable[..., Any], saved: Saved) -> None:
    model = Wrapped()
    optimizer = torch.optim.AdamW(list(model.named_parameters()), lr=0.1)
    model(torch.randn(2, 3, 6, 6)).sum().backward()
    optimizer.step()
    before = optimizer.state_dict()
    assert "param_names" in before["param_groups"][0]
    document = remap(
        saved({"state_dict": model.state_dict(), "optimizer": before}), "out.pth", [{"strip_prefix": "model."}]
    )
    found = torch.load("out.pth")["optimizer"]
    names = [name.removeprefix("model.") for name, _ in model.named_parameters()]
    assert found["param_groups"][0]["param_names"] == names
    assert_identical(found["state"], before["state"])
    assert not any("position" in note for note in document["notes"])


def test_an_optimizer_by_position_is_left_alone_and_keys_dropped_are_said(remap: Callable[..., Any]) -> None:
    source = FIXTURES / "resnet_nested.pth"
    before = torch_load(source)
    document = remap(source, "out.pth", [{"rename": "layer{i}", "to": "stage.{i}"}])
    found = torch_load(Path("out.pth"))
    assert_identical(before["optimizer"], found["optimizer"])
    assert not any("optimizer" in note for note in document["notes"])
    document = remap(source, "out.pth", [{"drop": "fc.*"}])
    assert any("optimizer" in note and "position" in note for note in document["notes"])
    assert_identical(before["optimizer"], torch_load(Path("out.pth"))["optimizer"])
    document = remap(source, "out.pth", [{"split": "fc.weight", "into": ["fc.a", "fc.b"]}])
    assert any("optimizer" in note for note in document["notes"])


def test_a_note_does_not_say_position_of_an_optimizer_by_name(remap: Callable[..., Any], saved: Saved) -> None:
    model = Wrapped()
    tree = {"model": model.state_dict(), "optimizer": named_optimizer(model)}
    document = remap(saved(tree), "out.pth", [{"drop": "model.2.*"}])
    assert not any("position" in note for note in document["notes"])


def test_everything_beside_the_weights_is_the_same(remap: Callable[..., Any]) -> None:
    source = FIXTURES / "lightning.ckpt"
    remap(source, "out.ckpt", [{"strip_prefix": "model."}])
    old, new = torch_load(source), torch_load(Path("out.ckpt"))
    assert list(new["state_dict"]) == [key.removeprefix("model.") for key in old["state_dict"]]
    for tree in (old, new):
        tree["state_dict"] = None
    assert_identical(old, new)


def test_a_whole_model_becomes_its_renamed_state_dict(remap: Callable[..., Any]) -> None:
    from makers.models import resnet

    remap(FIXTURES / "resnet_module.pth", "out.pth", [{"rename": "layer{i}", "to": "stage{i}"}])
    found = torch.load("out.pth", weights_only=True)
    expected = resnet(4, 20).state_dict()
    assert list(found) == [key.replace("layer", "stage") for key in expected]
    assert {name.replace("stage", "layer") for name in found._metadata} == set(expected._metadata)


def test_a_root_by_name_is_the_only_one_that_changes(remap: Callable[..., Any]) -> None:
    remap(FIXTURES / "ema.pth", "out.pth", [{"add_prefix": "x."}], "--root", "state_dict_ema")
    old, new = torch_load(FIXTURES / "ema.pth"), torch_load(Path("out.pth"))
    assert list(new["state_dict_ema"]) == [f"x.{key}" for key in old["state_dict_ema"]]
    assert_identical(old["state_dict"], new["state_dict"])


# --- ties ------------------------------------------------------------------------------------------------------------


def test_ties_stay_through_renames_and_operations(remap: Callable[..., Any], saved: Saved) -> None:
    w, bias = torch.randn(6, 4), torch.randn(6)
    state = {"emb.w": w, "head.w": w, "a.b": bias, "c.b": bias.detach(), "twin": w.clone()}
    remap(saved(state), "out.pth", [
        {"rename": "emb", "to": "wte"}, {"transpose": "wte.w"}, {"transpose": "head.w"},
        {"split": "{x}.b", "into": ["{x}.b0", "{x}.b1"]}, {"transpose": "twin"},
    ])  # fmt: skip
    found = torch.load("out.pth")
    assert tied_groups(found) == {frozenset(pair) for pair in (("wte.w", "head.w"), ("a.b0", "c.b0"), ("a.b1", "c.b1"))}
    assert torch.equal(found["wte.w"], w.t())
    assert not tied_groups({key: found[key] for key in ("wte.w", "twin")})


def test_a_tie_of_which_one_side_is_reshaped_becomes_two_tensors(remap: Callable[..., Any], saved: Saved) -> None:
    w = torch.randn(6, 4)
    remap(saved({"emb": w, "head": w}), "out.pth", [{"transpose": "head"}])
    found = torch.load("out.pth")
    assert_bits(found, {"emb": w, "head": w.t()})
    remap("saved.pth", "out.safetensors", [{"transpose": "head"}])
    assert_bits(load_file("out.safetensors"), {"emb": w, "head": w.t()})


def test_tied_inputs_give_tied_outputs_of_a_cat(remap: Callable[..., Any], saved: Saved) -> None:
    q, k = torch.randn(2, 4), torch.randn(2, 4)
    state = {f"{side}.{name}": tensor for side in "ab" for name, tensor in (("q", q), ("k", k))}
    remap(saved(state), "out.pth", [{"cat": ["{s}.q", "{s}.k"], "into": "{s}.qk"}])
    found = torch.load("out.pth")
    assert list(found) == ["a.qk", "b.qk"]
    assert tied_groups(found) == {frozenset(("a.qk", "b.qk"))}
    assert torch.equal(found["b.qk"], torch.cat([q, k]))


def test_tied_fixture_keeps_its_ties_under_other_names(remap: Callable[..., Any]) -> None:
    source = torch.load(FIXTURES / "tied.pth")
    for suffix in ("pth", "safetensors"):
        remap(FIXTURES / "tied.pth", f"out.{suffix}", [{"add_prefix": "x."}])
        ckptool.save(ckptool.open(f"out.{suffix}"), "back.pth", force=True)
        found = torch.load("back.pth")
        assert tied_groups(found) == {frozenset(f"x.{key}" for key in group) for group in tied_groups(source)}
        assert list(found) == [f"x.{key}" for key in source]
