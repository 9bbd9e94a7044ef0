"""Rules on `remap`, `filter` and `load-partial`: prefixes without a target, copies, presets, optimizers."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from oracles import Run, Saved, load
from torch import nn

import ckptool
from ckptool.errors import UsageError


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


# --- copies ----------------------------------------------------------------------------------------------------------


class Language(nn.Module):
    """A language model whose head is tied to its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.ModuleDict({"embed_tokens": nn.Embedding(5, 3)})
        self.lm_head = nn.Linear(3, 5, bias=False)
        self.lm_head.weight = self.model["embed_tokens"].weight


@pytest.fixture
def headless(saved: Saved) -> Any:
    """A language model's file as transformers writes it: without the tied head."""
    state = Language().state_dict()
    del state["lm_head.weight"]
    return saved(state, "headless.pth")


COPY = ["--copy", "lm_head.weight=model.embed_tokens.weight"]


def test_a_copy_is_tied_to_its_original_and_the_model_takes_both(headless: Any, run: Run) -> None:
    code, out, _ = run("remap", headless, *COPY, "-o", "out.pth", "--json")
    rows = [(row["new"], row["old"], row["op"]) for row in result(out)["map"]]
    embed = "model.embed_tokens.weight"
    assert (code, rows) == (0, [(embed, [embed], "rename"), ("lm_head.weight", [embed], "copy")])
    made = load("out.pth")
    assert made["lm_head.weight"].data_ptr() == made[embed].data_ptr()
    assert torch.equal(made["lm_head.weight"], load(headless)[embed])
    Language().load_state_dict(made, strict=True)
    assert run("remap", headless, *COPY, "-o", "text.pth")[1].startswith("text.pth: 2 keys, 0 renamed, 1 copied\n")


def test_a_copy_is_recorded_as_a_tie_in_safetensors_and_stored_once(headless: Any, run: Run) -> None:
    from safetensors import safe_open

    assert run("remap", headless, *COPY, "-o", "out.safetensors")[0] == 0
    with safe_open("out.safetensors", "pt") as file:
        assert list(file.keys()) == ["model.embed_tokens.weight"]
        assert file.metadata()["lm_head.weight"] == "model.embed_tokens.weight"
    assert ckptool.open("out.safetensors").shared() == [["model.embed_tokens.weight", "lm_head.weight"]]


def test_a_copy_in_a_rules_file_works_in_filter_and_load_partial(headless: Any, saved: Saved, run: Run) -> None:
    with open("rules.toml", "w") as file:
        file.write('[[rules]]\ncopy = "model.embed_tokens.weight"\nto = "lm_head.weight"\n')
    target = saved(Language().state_dict(), "target.pth")
    for command in (["filter", headless, "--match", target], ["load-partial", headless, "--into", target]):
        assert run(*command, "--rules", "rules.toml", "--strict", "-o", "out.pth", "--force")[0] == 0
        assert torch.equal(load("out.pth")["lm_head.weight"], load(headless)["model.embed_tokens.weight"])
    assert run("filter", headless, "--rules", "rules.toml", "-o", "out.pth", "--force")[0] == 0
    assert list(load("out.pth")) == ["model.embed_tokens.weight", "lm_head.weight"]


def test_a_copy_with_a_pattern_takes_every_layer_or_a_whole_module(saved: Saved, run: Run) -> None:
    state = {"enc.0.w": torch.ones(1), "enc.1.w": torch.zeros(2), "head.w": torch.ones(3)}
    path = saved(state)
    assert run("remap", path, "--copy", "ema.{i}.w=enc.{i}.w", "-o", "one.pth")[0] == 0
    assert run("remap", path, "--copy", "ema=enc", "-o", "two.pth")[0] == 0
    for name in ("one.pth", "two.pth"):
        made = load(name)
        assert list(made) == ["enc.0.w", "ema.0.w", "enc.1.w", "ema.1.w", "head.w"]
        assert all(torch.equal(made[f"ema.{i}.w"], state[f"enc.{i}.w"]) for i in range(2))


def test_a_copy_onto_an_existing_key_of_nothing_or_the_wrong_way_round_is_refused(
    headless: Any, saved: Saved, refused: Any
) -> None:
    path = saved({"a": torch.ones(1), "b": torch.zeros(1)})
    assert "would both be b" in refused("remap", path, "--copy", "b=a", "-o", "out.pth")
    assert "fit no key" in refused(
        "remap", headless, "--copy", "model.embed_tokens.weight=lm_head.weight", "-o", "o.pth"
    )
    for text in ("a", "=a", "b=", ""):
        assert "--copy takes NEW=OLD" in refused("remap", path, "--copy", text, "-o", "out.pth")


def test_copies_can_be_computed_on_and_a_map_undoes_them(saved: Saved, run: Run) -> None:
    path = saved({"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(1)})
    rules = [{"copy": "a", "to": "c"}, {"transpose": "c"}, {"rename": "b", "to": "d"}]
    made, report = ckptool.remap(path, rules)
    assert {key: value.tolist() for key, value in made.to_torch().items()} == {
        "a": [[0, 1, 2], [3, 4, 5]], "c": [[0, 3], [1, 4], [2, 5]], "d": [1],
    }  # fmt: skip
    assert [row.op for row in report.map] == ["rename", "copy;transpose", "rename"]
    ckptool.save(made, "made.pth")
    back, _ = ckptool.invert("made.pth", report.saved)
    assert same(back.to_torch(), load(path))


def test_a_map_is_not_undone_over_a_copy_that_was_changed_since(saved: Saved, run: Run, refused: Any) -> None:
    path = saved({"a": torch.ones(2)})
    assert run("remap", path, "--copy", "b=a", "-o", "copied.pth", "--save-map", "map.json")[0] == 0
    assert run("remap", "copied.pth", "--invert", "map.json", "-o", "back.pth")[0] == 0
    assert list(load("back.pth")) == ["a"]
    equal, other = (saved({"a": torch.ones(2), "b": value}, name) for value, name in ((torch.ones(2), "equal.pth"),
                    (torch.zeros(2), "other.pth")))  # fmt: skip
    assert run("remap", equal, "--invert", "map.json", "-o", "back.pth", "--force")[0] == 0
    line = refused("remap", other, "--invert", "map.json", "-o", "lost.pth")
    assert "a and b were copies, and differ" in line


def test_a_copy_keeps_an_optimizer_that_goes_by_position(run: Run, saved: Saved) -> None:
    code, out, _ = run("remap", saved(trained()), "--copy", "head2=head", "-o", "out.pth", "--json")
    assert code == 0
    assert not any("lines up" in note for note in json.loads(out)["notes"])


def test_a_copy_becomes_two_arrays_where_names_cannot_share_them(headless: Any, run: Run) -> None:
    import numpy as np

    code, _, err = run("remap", headless, *COPY, "-o", "out.npz")
    if code:  # refused with the way out, as for any tie
        assert "untie" in err
    else:
        arrays = np.load("out.npz")
        assert np.array_equal(arrays["lm_head.weight"], arrays["model.embed_tokens.weight"])


# --- presets ---------------------------------------------------------------------------------------------------------

BASE = ["q.weight", "q.bias", "q.lora_A.weight", "q.lora_B.weight", "norm.weight"]


def peft_name(key: str) -> str:
    """The name that PEFT gives a key: the adapted layer is inside, with its adapters beside it."""
    layer, _, rest = key.partition(".")
    if rest.startswith("lora"):
        return f"base_model.model.{layer}.{rest.replace('.', '.default.')}"
    return f"base_model.model.{layer}.{'base_layer.' if layer == 'q' else ''}{rest}"


@pytest.mark.parametrize(
    ("wrapped", "presets"),
    [
        ("{}", ["peft"]),
        ("module.{}", ["peft,ddp"]),
        ("module.{}", ["ddp,peft"]),
        ("module.{}", ["peft", "ddp"]),
        ("_orig_mod.module.{}", ["peft,ddp,compile"]),
        ("module._orig_mod.{}", ["peft", "compile", "ddp"]),
        ("module._orig_mod.module.{}", ["ddp,compile,peft"]),
        ("model.{}", ["peft,lightning"]),
        ("model.module._orig_mod.{}", ["peft,compile,lightning,ddp"]),
        ("module.model._orig_mod.{}", ["lightning", "peft", "compile", "ddp"]),
    ],
)
def test_presets_undo_each_other_in_any_order(wrapped: str, presets: list[str], saved: Saved, run: Run) -> None:
    path = saved({wrapped.format(peft_name(key)): torch.full((2,), float(at)) for at, key in enumerate(BASE)})
    args = [arg for names in presets for arg in ("--preset", names)]
    assert run("remap", path, *args, "-o", "out.pth")[0] == 0
    assert {key: value[0].item() for key, value in load("out.pth").items()} == {key: at for at, key in enumerate(BASE)}


def test_presets_stand_in_a_rules_file_too(saved: Saved) -> None:
    path = saved({f"module.{peft_name(key)}": torch.ones(1) for key in BASE})
    made, _ = ckptool.remap(path, [{"preset": "peft"}, {"preset": "ddp"}, {"add_prefix": "x."}])
    assert list(made.state_dict()) == [f"x.{key}" for key in BASE]


def test_an_adapters_name_is_removed_behind_adapters_only(saved: Saved) -> None:
    keys = {
        "base_model.model.heads.default.weight": "heads.default.weight",
        "base_model.model.cls.modules_to_save.default.weight": "cls.modules_to_save.weight",
        "base_model.model.e.lora_embedding_A.default": "e.lora_embedding_A",
        "base_model.model.k.ia3_l.default": "k.ia3_l",
        "base_model.model.v.hada_w1_a.default": "v.hada_w1_a",
    }
    made, _ = ckptool.remap(saved({key: torch.ones(1) for key in keys}), [{"preset": "peft"}])
    assert list(made.state_dict()) == list(keys.values())


def test_a_preset_that_fits_no_key_is_named_even_beside_one_that_does(saved: Saved, refused: Any) -> None:
    path = saved({"module.a": torch.ones(1)})
    line = refused("remap", path, "--preset", "ddp,fsdp", "-o", "out.pth")
    assert line.endswith("rules that fit no key (--allow-unused lets them): preset fsdp\n")


def test_a_data_parallel_part_of_a_model_is_unwrapped_where_names_stay_apart(
    saved: Saved, run: Run, refused: Any
) -> None:
    path = saved({"features.module.0.weight": torch.ones(1), "classifier.1.weight": torch.ones(2)})
    assert run("remap", path, "--preset", "ddp", "-o", "out.pth")[0] == 0
    assert list(load("out.pth")) == ["features.0.weight", "classifier.1.weight"]
    both = saved({"features.module.0.weight": torch.ones(1), "features.0.weight": torch.ones(2)}, "both.pth")
    assert "preset ddp" in refused("remap", both, "--preset", "ddp", "-o", "out2.pth")


class Normed(nn.Module):
    """Weight-normalised layers of several kinds, some inside others."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.conv = norm(nn.Conv1d(3, 4, 2))
        self.blocks = nn.Sequential(nn.Sequential(norm(nn.Linear(4, 2, bias=False)), nn.BatchNorm1d(2)))
        self.up = norm(nn.ConvTranspose2d(3, 5, 2), dim=1)
        self.whole = norm(nn.Linear(2, 2), dim=None)
        self.lstm = norm(nn.LSTM(2, 3), name="weight_hh_l0")
        self.plain = nn.Linear(2, 2)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("back", [False, True])
def test_weight_normalised_models_change_between_old_and_parametrised_names(back: bool, saved: Saved, run: Run) -> None:
    old = Normed(nn.utils.weight_norm)
    new = Normed(nn.utils.parametrizations.weight_norm)
    one, other = (new, old) if back else (old, new)
    path = saved({"model": one.state_dict()})
    assert run("remap", path, "--preset", "weight-norm", "-o", "out.pth")[0] == 0
    made = load("out.pth")["model"]
    if back:
        assert set(made) == set(old.state_dict())
    other.load_state_dict(made, strict=True)
    for layer in ("conv", "up", "whole"):
        getattr(one, layer).eval(), getattr(other, layer).eval()
    sample = torch.randn(1, 3, 5)
    assert torch.allclose(one.conv(sample), other.conv(sample))
    sample = torch.randn(1, 3, 4, 4)
    assert torch.allclose(one.up(sample), other.up(sample))
    assert torch.allclose(one.whole(torch.ones(1, 2)), other.whole(torch.ones(1, 2)))
    assert run("remap", "out.pth", "--preset", "weight-norm", "-o", "again.pth")[0] == 0
    assert set(load("again.pth")["model"]) == set(one.state_dict())


def test_what_is_no_pair_of_weight_norm_keeps_its_name(saved: Saved, refused: Any) -> None:
    spectral = nn.utils.spectral_norm(nn.Linear(3, 2)).state_dict()
    low_rank = {"a.parametrizations.weight.original0": torch.ones(4, 2), "a.parametrizations.weight.original1":
                torch.ones(2, 4)}  # fmt: skip
    attention = {"k_g": torch.ones(4, 4), "k_v": torch.ones(4, 4)}
    for state in (spectral, low_rank, attention):
        line = refused("remap", saved(state), "--preset", "weight-norm", "-o", "out.pth")
        assert "preset weight-norm" in line


def test_weight_norm_under_ddp_and_compile_in_any_order(saved: Saved, run: Run) -> None:
    state = {"module._orig_mod.c.weight_g": torch.ones(4, 1), "module._orig_mod.c.weight_v": torch.ones(4, 3)}
    for presets in ("weight-norm,ddp,compile", "compile,weight-norm,ddp"):
        assert run("remap", saved(state), "--preset", presets, "-o", "out.pth", "--force")[0] == 0
        assert list(load("out.pth")) == [f"c.parametrizations.weight.original{n}" for n in (0, 1)]


def test_a_wrong_preset_suggests_the_right_one(saved: Saved, refused: Any) -> None:
    path = saved({"module.a": torch.ones(1)})
    assert "no preset 'pft' (did you mean peft?); there are ddp" in refused(
        "remap", path, "--preset", "pft", "-o", "o.pth"
    )
    with pytest.raises(UsageError, match="did you mean weight-norm"):
        ckptool.remap(path, [{"preset": "weight_norm"}])


# --- names that are nearly right -------------------------------------------------------------------------------------


def test_a_misspelled_name_is_told_the_right_one(saved: Saved, refused: Any) -> None:
    path = saved({"a": torch.ones(2, 2)})
    for args, right in (
        (["load-partial", "--into", path, path, "--init", "*=kaiming_norml"], "kaiming_normal"),
        (["load-partial", "--into", path, path, "--init-preset", "xaviar"], "xavier"),
        (["load-partial", "--into", path, path, "--adapt", "*=pos_embed"], "pos-embed"),
        (["load-partial", "--into", path, path, "--adapt", "a=b=rel_pos:spacing=geometric"], "rel-pos"),
        (["convert", path, "--to", "safetensor"], "safetensors"),
        (["convert", path, "--limit", "MAX_PICKEL=2GB"], "MAX_PICKLE"),
    ):
        assert f"(did you mean {right}?)" in refused(*args, "-o", "out.pth")
    with pytest.raises(UsageError, match=r"did you mean strip_prefix\?"):
        ckptool.remap(path, [{"strip_prefx": "a."}])


def test_a_root_of_absent_keys_is_refused_when_it_is_opened(saved: Saved) -> None:
    path = saved({"a": {"b": torch.ones(1)}, 0: {"c": torch.ones(1)}})
    assert list(ckptool.open(path, root=(0,)).state_dict()) == ["c"]
    for root in (("x",), ("a", "x"), ("0",), [True], ("a", "b", "c")):
        with pytest.raises(UsageError, match="; there is: "):
            ckptool.open(path, root=root)
