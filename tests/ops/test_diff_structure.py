"""Renames by structure, of `diff`: what has another name, and the same place in the model, from headers alone."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import Run, State
from torch import nn

import ckptool
from bench.remap import pairs
from ckptool.errors import UsageError

Saved = Callable[..., Path]


def net(
    stem: str = "stem",
    blocks: str = "blocks",
    norm: str = "norm",
    head: str = "head",
    seed: int = 0,
    fused: bool = False,
) -> State:
    """A small model, whose modules have these names."""
    torch.manual_seed(seed)
    found = {f"{stem}.weight": torch.randn(8, 3, 3, 3)}
    for at in range(3):
        found[f"{blocks}.{at}.conv.weight"] = torch.randn(8, 8, 3, 3)
        made = nn.BatchNorm2d(8).state_dict().items()
        found |= {f"{blocks}.{at}.{norm}.{key}": one + torch.rand(8) if one.ndim else one for key, one in made}
        parts = {"qkv": (24, 8)} if fused else dict.fromkeys("qkv", (8, 8))
        found |= {f"{blocks}.{at}.attn.{key}.weight": torch.randn(shape) for key, shape in parts.items()}
        found[f"{blocks}.{at}.mlp.weight"] = torch.randn(32, 8)
    return found | {f"{head}.weight": torch.randn(5, 8), f"{head}.bias": torch.randn(5)}


def renamed(a: Any, b: Any, **options: Any) -> dict[str, str]:
    """{key of A: key of B} of what is renamed; every key of both has one fate."""
    report = ckptool.diff(a, b, **options)
    found = {row.a: row.b for row in report.renamed}
    assert all(row.key == row.a and 0.8 <= row.confidence <= 1 and row.witnesses for row in report.renamed)
    assert len({*found.values()}) == len(found)
    if isinstance(a, dict):
        first = report.counters["a"]
        both = len(a) - len(report.only_in_a) - first - len(found)
        assert not {*report.only_in_a, *report.bookkeeping[:first]} & {*found}
        assert both == len(b) - len(report.only_in_b) - (len(report.bookkeeping) - first) - len(found)
    return found


def changed(a: State, old: str, new: str) -> dict[str, str]:
    return {key: key.replace(old, new) for key in a if old in key}


# --- what is a rename -------------------------------------------------------------------------------------------------


def test_a_layer_with_another_name_is_renamed_and_its_counters_with_it() -> None:
    a, b = net(), net(norm="bn", head="classifier", seed=1)
    assert renamed(a, b) == changed(a, ".norm.", ".bn.") | changed(a, "head.", "classifier.")
    report = ckptool.diff(a, b)
    assert {row.by for row in report.renamed} == {"structure"}
    assert (report.only_in_a, report.only_in_b, report.bookkeeping) == ([], [], [])
    assert (report.same, report.fails, report.counters) == (False, ["renamed"], {"a": 0, "b": 0})
    assert report.equal + len(report.renamed) == len(a)


def test_all_of_a_model_may_have_other_names_behind_a_wrapper() -> None:
    a, b = net(), net("entry", "stages", "bn", "classifier", 1)
    wrapped = {f"module.{key}": one for key, one in b.items()}
    assert renamed(a, wrapped) == {old: f"module.{new}" for old, new in zip(a, b, strict=True)}


def test_a_module_inside_another_one_is_renamed() -> None:
    a = net()
    b = {key.replace(".conv.", ".body.conv."): one for key, one in net(seed=1).items()}
    assert renamed(a, b) == changed(a, ".conv.", ".body.conv.")


def test_gamma_and_beta_are_weight_and_bias() -> None:
    a = {
        f"l.{n}.{k}": torch.randn(s)
        for n in range(3)
        for k, s in (("fc.weight", (8, 4)), ("ln.gamma", (8,)), ("ln.beta", (8,)))
    }
    b = {key.replace("gamma", "weight").replace("beta", "bias"): one for key, one in a.items()}
    assert renamed(a, b) == {key: new for key, new in zip(a, b, strict=True) if key != new}


def test_the_file_of_a_lock_and_a_model_on_meta_are_sides_too(saved: Saved, run: Run) -> None:
    one, other = saved(net(), "a.pth"), saved(net(norm="bn", seed=1), "b.pth")
    assert run("inspect", one, "--lock", "a.lock", "--hash")[0] == 0
    wanted = changed(net(), ".norm.", ".bn.")
    assert renamed("a.lock", other) == wanted
    report = ckptool.diff("a.lock", other, values=True)
    assert {row.key for row in report.values} == {key for key in net() if "num_batches" not in key}
    assert renamed({key: tensor.to("meta") for key, tensor in net().items()}, net(norm="bn")) == wanted
    assert renamed(one, other) == wanted


# --- what is none -----------------------------------------------------------------------------------------------------


def without(state: State, *prefixes: str) -> State:
    return {key: one for key, one in state.items() if not key.startswith(prefixes)}


@pytest.mark.parametrize(
    ("gone", "new"),
    [
        ("blocks.0.mlp", "blocks.2.mlp"),  # of two alike layers each side lacks one
        ("blocks.1", "blocks.2"),
        ("blocks.0.attn.q", "blocks.0.attn.k"),
        ("blocks.2.attn.v", "blocks.0.attn.v"),
    ],
)
@pytest.mark.parametrize("wrapper", ["", "module."])
def test_a_layer_that_is_gone_is_not_another_that_is_new(gone: str, new: str, wrapper: str) -> None:
    a, b = without(net(), new + "."), without(net(seed=1), gone + ".")
    assert renamed(a, {wrapper + key: one for key, one in b.items()}) == {}


def test_a_layer_whose_module_is_still_there_did_not_move() -> None:
    a = {f"{at}.{k}.weight": torch.randn(8, 8) for at in ("left", "right", "top") for k in ("up", "down", "gate")}
    b = without(a, "left.up") | {"other.up.weight": a["left.up.weight"]}
    assert renamed(a, without(b, "right.gate") | {"rightmost.gate.weight": torch.randn(8, 8)}) == {}


def test_another_shape_or_dtype_is_no_rename() -> None:
    a, b = net(), net(head="classifier", norm="bn")
    b["classifier.weight"], b["classifier.bias"] = torch.randn(6, 8), torch.randn(6)
    b = {key: one.half() if ".bn." in key else one for key, one in b.items()}
    assert renamed(a, b) == {}


def test_queries_keys_and_values_in_one_have_rows_that_another_name_may_mean_otherwise() -> None:
    a = net(fused=True)
    b = {key.replace("attn.qkv", "attn.query_key_value"): one for key, one in net(fused=True, seed=1).items()}
    assert renamed(a, b) == {}
    moved = {key.replace("blocks", "stages"): one for key, one in net(fused=True, seed=1).items()}
    assert renamed(a, moved) == changed(a, "blocks", "stages")
    assert renamed(a, {key.replace("qkv", "c"): one for key, one in a.items()}, values=True)  # values prove it


def test_what_needs_an_operation_stays_alone_and_a_note_says_what_remap_would_make(saved: Saved, run: Run) -> None:
    a = net()
    b = {key: one.T.contiguous() if "mlp" in key else one for key, one in net(head="classifier", seed=1).items()}
    b = {key.replace("mlp", "ffn"): one for key, one in b.items()}
    one, other = saved(a, "a.pth"), saved(b, "b.pth")
    code, out, _ = run("diff", one, other, "--json")
    found = json.loads(out)
    assert code == 1
    assert [row["b"] for row in found["result"]["renamed"]] == ["classifier.weight", "classifier.bias"]
    assert found["result"]["only_in_b"] == [f"blocks.{at}.ffn.weight" for at in range(3)]
    assert f"of the keys only in B, remap --like {other} would make 3" in found["notes"]
    assert run("remap", one, "--like", other, "-o", "c.pth", "--no-values")[0] == 0
    assert {*found["result"]["only_in_b"]} < {*torch.load("c.pth")}


def test_the_note_counts_what_a_layout_would_settle(saved: Saved, run: Run) -> None:
    one, other = saved(net(), "a.pth"), saved(net(fused=True, seed=1), "b.pth")
    notes = json.loads(run("diff", one, other, "--json")[1])["notes"]
    assert f"of the keys only in B, remap --like {other} would make 3 with --layout" in notes
    assert run("remap", one, "--like", other, "-o", "c.pth", "--no-values", "--layout", "*qkv*=as-is")[0] == 0
    assert ckptool.diff("c.pth", other).same


def test_random_tensors_under_the_names_of_real_pairs_give_no_wrong_rename() -> None:
    known = {pair.name: pair for pair in pairs.committed()}
    wrong, right = [], 0
    for name in ("timm_resnet50__hf_resnet", "hf_vit__timm_vit_base_patch16_224", "pytorchcv_vgg16__tv_vgg16",
                 "hf_bert_old_gamma_beta__hf_bert_seqcls6", "meta_llama2_7b__hf_llama2_7b"):  # fmt: skip
        pair = known[name]
        sides = (
            {key: torch.empty(shape, device="meta", dtype=getattr(torch, dtype)) for key, shape, dtype in side}
            for side in (pair.source, pair.target)
        )
        for row in ckptool.diff(*sides).renamed:
            made = pair.mapping.get(row.b)
            ok = made is not None and row.a in made.sources and made.op == "rename"
            right += ok
            wrong += [] if ok else [(name, row.a, row.b)]
    assert wrong == []
    assert right > 300


# --- how it is asked for ----------------------------------------------------------------------------------------------


def test_equal_values_go_first_and_the_others_are_compared() -> None:
    a, b = net(), net(norm="bn", head="classifier")
    b["classifier.weight"] = b["classifier.weight"] + 1
    b["blocks.1.bn.bias"] = b["blocks.1.bn.bias"] + 1e-9
    report = ckptool.diff(a, b, values=True)
    by = {row.a: row.by for row in report.renamed}
    assert (by["head.bias"], by["head.weight"]) == ("values", "structure")
    assert {row.key: row.status for row in report.values} == {"head.weight": "differ"} | (
        {"blocks.1.norm.bias": "close"} if by["blocks.1.norm.bias"] == "structure" else {}
    )
    assert report.fails == ["renamed", "values"]
    assert ckptool.diff(a, b, quick=True).found()["values"] >= 1


def test_devices_of_what_is_renamed_are_compared_too() -> None:
    a, b = net(), {key: one.to("meta") for key, one in net(norm="bn").items()}
    report = ckptool.diff(a, b, devices=True)
    assert {row.key for row in report.devices} == {*a}


def test_the_three_words() -> None:
    a, b = net(), net(norm="bn", head="classifier")
    b["classifier.weight"] = b["classifier.weight"] + 1
    assert renamed(a, b, renames="off") == renamed(a, b, renames="off", values=True) == {}
    assert ckptool.diff(a, b, renames="off").only_in_a == [
        key for key in a if (".norm." in key and "num_batches" not in key) or "head" in key
    ]
    assert "head.weight" not in renamed(a, b, renames="values", values=True)
    assert renamed(a, b, renames="structure", values=True) == renamed(a, b) == renamed(a, b, renames="structure")
    with pytest.raises(UsageError, match="--renames takes structure, values, off; not 'struct'"):
        ckptool.diff(a, b, renames="struct")
    with pytest.raises(UsageError, match="--renames values needs --values or --quick"):
        ckptool.diff(a, b, renames="values")


def test_the_command_takes_the_words_and_judges_renames(saved: Saved, run: Run) -> None:
    one, other = saved(net(), "a.pth"), saved(net(head="classifier", seed=1), "b.pth")
    code, out, _ = run("diff", one, other)
    assert code == 1
    assert "differ: 2 renamed; 31 equal" in out
    assert "is classifier.bias in B, by its place" in out
    assert "--rename head=classifier would match 33 of 33 keys" in out
    assert run("diff", one, other, "--fail-on", "only-in-a,only-in-b,shape")[0] == 0
    assert run("diff", one, other, "--fail-on", "renamed")[0] == 1
    code, out, _ = run("diff", one, other, "--renames", "off")
    assert (code, "2 only in A, 2 only in B" in out, "renamed" in out) == (1, True, False)
    code, _, err = run("diff", one, other, "--renames", "no")
    assert (code, "--renames takes structure, values, off; not 'no'" in err) == (2, True)
    Path("plan.toml").write_text('[[allow]]\nkind = "renamed"\nkey = "head.*"\nb = "classifier.weight"\n')
    code, out, _ = run("diff", one, other, "--allow", "plan.toml", "--json")
    result = json.loads(out)["result"]
    assert (code, [row["key"] for row in result["allowed"]]) == (1, ["head.weight"])
    (weight, bias) = result["renamed"]
    assert (weight["by"], bias["b"], weight["witnesses"] != []) == ("structure", "classifier.bias", True)


def test_ignored_keys_are_no_renames() -> None:
    a, b = net(), net(head="classifier", norm="bn")
    report = ckptool.diff(a, b, ignore=["head.*"])
    assert {row.a: row.b for row in report.renamed} == changed(a, ".norm.", ".bn.")
    assert report.only_in_b == ["classifier.weight", "classifier.bias"]


def test_a_hint_that_explains_all_renames_stays_and_one_that_explains_some_goes() -> None:
    a = net()
    under = {f"model.{key}": one for key, one in net(seed=1).items()}
    assert "--strip-prefix-b model. would match 33 of 33 keys" in ckptool.diff(a, under).notes
    assert len(renamed(a, under)) == 33
    notes = ckptool.diff(a, net(norm="bn", head="classifier")).notes
    assert not [note for note in notes if "would match" in note]


# --- bounds -----------------------------------------------------------------------------------------------------------


def unlike(count: int, word: str) -> State:
    """Tensors of which no two names are alike but for their end."""
    one, letters = torch.empty(3), "abcdefghij"
    return {f"{''.join(letters[int(digit)] for digit in str(at))}.{word}": one for at in range(count)}


def blocks(count: int, word: str, shapes: int = 1) -> State:
    ones = [torch.empty(at + 1) for at in range(shapes)]
    return {f"{word}.{at}.w": ones[at * 7919 % shapes] for at in range(count)}


@pytest.mark.parametrize(
    "made", [lambda w: unlike(300, w), lambda w: blocks(25_000, w), lambda w: blocks(1500, w, 300)]
)
def test_among_many_names_nothing_is_looked_for_unless_it_is_asked_for(made: Callable[[str], State]) -> None:
    a, b = made("x"), made("y")
    report = ckptool.diff(a, b)
    assert (report.renamed, len(report.only_in_a)) == ([], len(a))
    assert "renames were not looked for by structure among so many keys: --renames structure does" in report.notes
    assert not [note for note in ckptool.diff(a, a | {"z": torch.empty(1)}).notes if "not looked for" in note]


def test_many_names_are_looked_at_where_that_is_asked_for() -> None:
    report = ckptool.diff(unlike(300, "x"), unlike(300, "y"), renames="structure")
    assert not [note for note in report.notes if "not looked for" in note]


# --- rules ------------------------------------------------------------------------------------------------------------


def test_saved_rules_leave_no_rename(saved: Saved, run: Run) -> None:
    a = net() | {"only.here": torch.randn(3), "blocks.0.conv._extra_state": {"a": 1}}
    b = {f"module.{key}": one for key, one in net("entry", norm="bn", seed=1).items()}
    one, other = saved(a, "a.pth"), saved(b, "b.pth")
    assert run("diff", one, other, "--save-rules", "rules.toml")[0] == 1
    assert Path("rules.toml").read_text().startswith(f"# Makes {one} like {other}: ckptool remap --rules\n")
    assert run("remap", one, "--rules", "rules.toml", "-o", "c.pth")[0] == 0
    made = torch.load("c.pth")
    assert {*b} < {*made}
    assert {*made} - {*b} == {"only.here", "blocks.0.conv._extra_state"}
    report = ckptool.diff("c.pth", other)
    assert (report.renamed, report.only_in_a, report.only_in_b) == ([], ["only.here"], [])
    for old, new in zip(net(), b, strict=True):
        assert torch.equal(made[new], a[old])
    assert run("diff", one, other, "--save-rules", "rules.toml")[0] == 2
    assert run("diff", one, other, "--save-rules", "rules.toml", "--force")[0] == 1
    assert run("diff", one, other, "--save-rules", one, "--force")[0] == 2
    assert run("diff", one, other, "--save-rules", "rules.json", "--json")[0] == 1
    assert json.loads(Path("rules.json").read_text())["rules"] == ckptool.diff(one, other, rules=True).rules
    assert ckptool.diff(one, other).rules is None


def test_saved_rules_are_of_values_too_and_come_after_those_that_were_given(saved: Saved, run: Run) -> None:
    a = net()
    b = {key.replace("norm", "bn").replace("head", "classifier"): one for key, one in a.items()}
    one, other = saved({f"model.{key}": tensor for key, tensor in a.items()}, "a.pth"), saved(b, "b.pth")
    call = ("diff", one, other, "--values", "--renames", "values", "--rename", "head=classifier")
    code, out, _ = run(*call, "--strip-prefix-a", "model.", "--save-rules", "rules.toml", "--json")
    assert code == 1
    assert json.loads(out)["result"]["rules"][0] == {"rename": "head", "to": "classifier"}
    assert run("remap", one, "--rules", "rules.toml", "-o", "c.pth")[0] == 0
    assert {*torch.load("c.pth")} == {*b}
    assert ckptool.diff("c.pth", other, values=True).same


def test_rules_are_refused_or_not_written_where_there_are_none(saved: Saved, run: Run) -> None:
    one, other = saved(net(), "a.pth"), saved(net(seed=1), "b.pth")
    code, out, _ = run("diff", one, other, "--save-rules", "rules.toml")
    assert (code, Path("rules.toml").exists()) == (0, False)
    assert "rules.toml is not written: no key of A has another name in B" in out
    assert run("diff", one, other, "--save-rules", "rules.toml", "--renames", "off")[0] == 2
    assert run("diff", one, other, other, "--save-rules", "rules.toml")[0] == 2
    assert run("diff", one, other, "--force")[0] == 2


# --- forms ------------------------------------------------------------------------------------------------------------


def test_every_form_says_it(saved: Saved, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = saved(net(), "a.pth"), saved(net(norm="bn", seed=1), "b.pth")
    names = "{weight,bias,running_mean,running_var,num_batches_tracked}"
    said = f"is blocks.{{0..2}}.bn.{names} in B, by its place"
    assert f"blocks.{{0..2}}.norm.{names}` | `{said}` (15 keys)" in run("diff", one, other, "--format", "markdown")[1]
    assert f"blocks.{{0..2}}.norm.{names}: {said}" in run("diff", one, other, "--format", "github")[1]
    junit = ET.fromstring(run("diff", one, other, "--format", "junit")[1])
    assert [case.get("name") for case in junit.iter("testcase")] == [f"renamed: blocks.{{0..2}}.norm.{names}"]
    (result,) = json.loads(run("diff", one, other, "--format", "sarif")[1])["runs"][0]["results"]
    assert result["ruleId"].endswith("renamed")
    monkeypatch.setenv("CKPTOOL_FOLD", "1")
    assert f"{said}  (15 keys)" in run("diff", one, other)[1]
    monkeypatch.setenv("CKPTOOL_FOLD", "0")
    assert "blocks.1.norm.bias                 is blocks.1.bn.bias in B, by its place" in run("diff", one, other)[1]
    out = run("diff", one, other, one)[1]
    assert "15 renamed" in out
    assert "same" in out


def test_names_that_fold_in_another_order_are_not_folded(saved: Saved, run: Run) -> None:
    torch.manual_seed(0)
    a = {f"x.{at}.w": torch.randn(4, 4) for at in range(3)}
    one, other = saved(a, "a.pth"), saved({f"y.{at}.w": a[f"x.{2 - at}.w"] for at in range(3)}, "b.pth")
    out = run("diff", one, other, "--values", "--format", "github")[1]
    assert "x.0.w: is y.2.w in B" in out


def test_a_page_says_the_other_name_and_what_differs(saved: Saved, run: Run) -> None:
    one, other = saved(net(), "a.pth"), saved(net(head="classifier", seed=1), "b.pth")
    assert run("diff", one, other, "--values", "--html", "page.html")[0] == 1
    from ckptool.reports import document
    from ckptool.reports.html import data

    report = ckptool.diff(one, other, values=True)
    sides = {
        side: [document.plain(row) for row in ckptool.inspect(path).tensors]
        for side, path in (("a", one), ("b", other))
    }
    rows, *_ = [data._compared(document.plain(report), sides["a"], sides["b"])]
    (head,) = [row for row in rows if row["key"] == "head.weight"]
    assert (head["renamed"], head["status"], head["rel_l2"] > 0) == ("classifier.weight", "values", True)
    assert not [row for row in rows if row["key"].startswith("classifier")]
