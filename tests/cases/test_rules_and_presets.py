"""Rules on `remap`, `filter` and `load-partial`: prefixes without a target, copies, presets, optimizers."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from oracles import Run, Saved, load
from torch import nn

import ckptool


class Body(nn.Module):
    """A backbone with BatchNorm, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.head = nn.Linear(4, 2)


def result(out: str) -> Any:
    return json.loads(out)["result"]


def same(one: Any, other: Any) -> bool:
    return list(one) == list(other) and all(torch.equal(one[key], other[key]) for key in one)


# --- filter: prefixes and rules without a target ---------------------------------------------------------------------


def test_filter_takes_a_backbone_out_and_its_module_loads_it_strictly(saved: Saved, run: Run) -> None:
    model = Body()
    path = saved({"epoch": 3, "state_dict": model.state_dict()})
    code, out, _ = run(
        "filter", path, "--include", "backbone.*", "--strip-prefix", "backbone.", "-o", "out.pth", "--json"
    )
    assert code == 0
    assert same(load("out.pth")["state_dict"], model.backbone.state_dict())
    model.backbone.load_state_dict(load("out.pth")["state_dict"], strict=True)
    rows = {row["key"]: row for row in result(out)["rows"]}
    assert (rows["0.weight"]["reason"], rows["0.weight"]["source"]) == ("loaded", "backbone.0.weight")
    assert rows["head.weight"]["reason"] == "ignored"
    assert load("out.pth")["state_dict"]._metadata[""] == {"version": 1}
    assert load("out.pth")["state_dict"]._metadata["1"] == {"version": 2}


def test_a_prefix_is_stripped_with_an_exclusion_and_another_is_added(saved: Saved, run: Run) -> None:
    model = Body()
    args = ["--include", "backbone.*", "--exclude", "*.bias", "--strip-prefix", "backbone.", "--add-prefix", "body."]
    assert run("filter", saved(model.state_dict()), *args, "-o", "out.safetensors")[0] == 0
    kept = ckptool.open("out.safetensors").to_torch()
    expected = {f"body.{key}": value for key, value in model.backbone.state_dict().items() if key[-4:] != "bias"}
    assert {key: value.tolist() for key, value in kept.items()} == {
        key: value.tolist() for key, value in expected.items()
    }


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "module._orig_mod."])
def test_a_prefix_behind_a_wrapper_is_stripped_with_the_wrapper(wrapper: str, saved: Saved, run: Run) -> None:
    model = Body()
    path = saved({f"{wrapper}{key}": value for key, value in model.state_dict().items()})
    args = ["--include", "backbone.*", "--strip-prefix", "backbone."]
    assert run("filter", path, *args, "-o", "out.pth")[0] == 0
    assert same(load("out.pth"), model.backbone.state_dict())


def test_a_prefix_alone_strips_the_keys_that_have_it(saved: Saved, run: Run) -> None:
    path = saved({"net.a": torch.ones(1), "b": torch.ones(2)})
    assert run("filter", path, "--strip-prefix", "net.", "-o", "out.pth")[0] == 0
    assert list(load("out.pth")) == ["a", "b"]


def test_prefixes_that_fit_no_key_collide_or_lack_their_dot_are_refused(saved: Saved, refused: Any) -> None:
    path = saved({"net.a": torch.ones(1), "a": torch.ones(2)})
    assert "fit no key" in refused("filter", path, "--strip-prefix", "nett.", "-o", "out.pth")
    assert "net.a and a would both be a" in refused("filter", path, "--strip-prefix", "net.", "-o", "out.pth")
    assert "an empty name" in refused("filter", path, "--strip-prefix", "net", "-o", "out.pth")


def test_filter_renames_before_it_matches_and_says_the_keys_of_the_file(saved: Saved, run: Run) -> None:
    model = Body()
    target = saved(Body().state_dict(), "target.pth")
    old = saved({key.replace("backbone", "features"): value for key, value in model.state_dict().items()}, "old.pth")
    args = ["--match", target, "--rename", "features=backbone", "--strict", "--json"]
    code, out, _ = run("filter", old, *args, "-o", "out.pth")
    assert (code, result(out)["counts"]) == (0, {"loaded": 9})
    assert {row["source"] for row in result(out)["rows"]} == {*load(old)}
    assert same(load("out.pth"), model.state_dict())
    merged, _ = ckptool.filter(old, match=target, rules=[{"rename": "features", "to": "backbone"}])
    assert same(merged.to_torch(), model.state_dict())


def test_options_that_are_rules_apply_in_the_order_given(saved: Saved, run: Run) -> None:
    path, (first, second) = saved({"a.w": torch.ones(1)}), ("rules.json", "more.json")
    for name, rules in ((first, [{"rename": "b", "to": "c"}]), (second, [{"rename": "d", "to": "e"}])):
        with open(name, "w") as file:
            json.dump(rules, file)
    args = ["--rename", "a=b", "--rules", first, "--rename", "c=d", "--rules", second]
    for command in (["filter", path], ["load-partial", path, "--into", saved({"e.w": torch.zeros(1)}, "target.pth")]):
        assert run(*command, *args, "-o", "out.pth", "--force")[0] == 0
        assert load("out.pth")["e.w"] == 1
    assert run("filter", path, *reversed(args), "-o", "out.pth", "--force")[0] == 2


def test_rules_of_a_selection_apply_to_what_was_chosen(saved: Saved, run: Run) -> None:
    path = saved({"enc.q.w": torch.ones(2, 3), "enc.k.w": torch.zeros(2, 3), "dec.q.w": torch.ones(1)})
    with open("rules.toml", "w") as file:
        file.write('rules = [{ cat = ["enc.q.w", "enc.k.w"], into = "enc.qk.w" }, { drop = "*.none" }]')
    args = ["--include", "enc.*", "--rules", "rules.toml", "-o", "out.pth", "--json"]
    assert run("filter", path, *args)[0] == 2  # the second rule fits no key
    code, out, _ = run("filter", path, *args, "--allow-unused")
    assert code == 0
    assert torch.equal(load("out.pth")["enc.qk.w"], torch.cat([torch.ones(2, 3), torch.zeros(2, 3)]))
    rows = [(row["key"], row["reason"], row.get("source")) for row in result(out)["rows"]]
    assert rows == [("enc.qk.w", "loaded", "enc.q.w + enc.k.w"), ("dec.q.w", "ignored", None)]


def test_a_rule_must_fit_one_of_several_sources(saved: Saved, run: Run, refused: Any) -> None:
    target = saved({"x.w": torch.zeros(1), "y.w": torch.zeros(1)}, "target.pth")
    one, two = saved({"a.w": torch.ones(1)}, "one.pth"), saved({"y.w": torch.ones(1) * 2}, "two.pth")
    assert run("filter", one, two, "--match", target, "--rename", "a=x", "-o", "out.pth")[0] == 0
    assert load("out.pth") == {"x.w": torch.ones(1), "y.w": torch.ones(1) * 2}
    line = refused("filter", one, two, "--match", target, "--rename", "b=x", "-o", "out2.pth")
    assert "rules that fit no key (--allow-unused lets them): rename b -> x" in line


# --- filter --optimizer ----------------------------------------------------------------------------------------------


def trained() -> dict[str, Any]:
    model = Body()
    optimizer = torch.optim.AdamW(model.parameters())
    model.head(model.backbone(torch.ones(1, 3, 4, 4)).mean((2, 3))).sum().backward()
    optimizer.step()
    return {"epoch": 3, "state_dict": model.state_dict(), "optimizer": optimizer.state_dict(), "lr": 0.1}


def test_the_optimizer_state_stays_and_its_size_is_said(saved: Saved, run: Run) -> None:
    whole = trained()
    nbytes = sum(value.nbytes for entry in whole["optimizer"]["state"].values() for value in entry.values())
    path = saved(whole)
    for wish in ([], ["--optimizer", "keep"]):
        code, out, _ = run("filter", path, "--include", "head.*", "-o", "out.pth", "--force", "--json", *wish)
        assert code == 0
        assert list(load("out.pth")) == ["epoch", "state_dict", "optimizer", "lr"]
        said = any(f"optimizer: {nbytes:,} bytes" in note for note in json.loads(out)["notes"])
        assert said == (not wish)


@pytest.mark.parametrize("where", ["optimizer", "optimizers", "both"])
def test_the_optimizer_state_is_dropped_with_its_tensors(where: str, saved: Saved, run: Run) -> None:
    whole = trained()
    state = whole.pop("optimizer")
    whole["training"] = {"optimizers": [state], "step": 1} if where != "optimizer" else {"step": 1}
    whole |= {"optimizer": state} if where != "optimizers" else {}
    code, out, _ = run("filter", saved(whole), "--include", "head.*", "--optimizer", "drop", "-o", "out.pth", "--json")
    assert code == 0
    made = load("out.pth")
    assert [*made["state_dict"]] == ["head.weight", "head.bias"]
    assert "optimizer" not in made
    assert not made["training"].get("optimizers")
    assert (made["epoch"], made["lr"], made["training"]["step"]) == (3, 0.1, 1)
    notes = json.loads(out)["notes"]
    assert ("dropped: optimizer" in notes) == (where != "optimizers")
    assert ("dropped: training/optimizers/0" in notes) == (where != "optimizer")
    assert not any("lines up" in note for note in notes)


def test_dropping_an_optimizer_that_is_not_there_is_said(saved: Saved, run: Run) -> None:
    target = saved(Body().state_dict())
    for args in ([target], [target, "--match", target]):
        code, out, _ = run("filter", *args, "--optimizer", "drop", "-o", "out.pth", "--force", "--json")
        assert (code, json.loads(out)["notes"]) == (0, ["no optimizer state to drop"])
    assert run("filter", target, "--optimizer", "remap", "-o", "other.pth")[0] == 2
