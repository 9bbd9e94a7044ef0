"""`ckptool.infer` and `remap --like`: what is matched is written, what is not is named, and rules say all of it."""

from __future__ import annotations

import json
import time
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from remapping import fused
from torch import nn

import ckptool
from ckptool.errors import UsageError
from ckptool.mapping import like
from ckptool.mapping.pairs import Doubt, Entry, Inferred, Pair

Run = Callable[..., tuple[int, str, str]]
Saved = Callable[..., Path]

STRANGE = """
from torch import nn
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(3, 4)
        self.head = nn.Linear(4, 2)
"""


def fake(monkeypatch: pytest.MonkeyPatch, found: Inferred) -> list[dict[str, Any]]:
    """Has `infer` find this; returns the list of what it is asked for."""
    asked: list[dict[str, Any]] = []

    def infer(source: Sequence[Entry], target: Sequence[Entry], **options: Any) -> Inferred:
        asked.append({"source": [*source], "target": [*target], **options})
        certain = [doubt for doubt in found.doubts if doubt.candidates[0].confidence >= options["min_confidence"]]
        pairs = [*found.pairs, *(doubt.candidates[0] for doubt in certain)]
        used = {key for pair in pairs for key in pair.source}
        return Inferred(
            pairs, [doubt for doubt in found.doubts if doubt not in certain], found.only_target,
            [entry.key for entry in source if entry.key not in used],
        )  # fmt: skip

    monkeypatch.setattr(like, "infer", infer)
    return asked


def tensors(**shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    torch.manual_seed(len(shapes))
    return {key.replace("__", "."): torch.randn(shape) for key, shape in shapes.items()}


SOURCE = tensors(
    enc__0__qkv=(6, 4), enc__1__qkv=(6, 4), enc__0__ln_a=(4,), enc__0__ln_b=(4,), enc__1__ln_a=(4,),
    enc__1__ln_b=(4,), enc__0__w=(4, 4), enc__1__w=(4, 4), ema__w=(4, 4), ema__v=(4, 4),
)  # fmt: skip
TARGET = tensors(
    h__0__q=(2, 4), h__0__k=(2, 4), h__0__v=(2, 4), h__1__q=(2, 4), h__1__k=(2, 4), h__1__v=(2, 4), h__0__n1=(4,),
    h__1__n1=(4,), h__0__proj=(4, 4), h__1__proj=(4, 4), head=(3, 4),
)  # fmt: skip


def some() -> Inferred:
    """Fused q, k and v are split, two norms are in doubt, a square matrix may be transposed, a head has no source."""
    pairs = [
        Pair(f"h.{i}.{part}", [f"enc.{i}.qkv"], f"split:0:{n}/3", 0.9, ["words", "numbers"])
        for i in (0, 1)
        for n, part in enumerate("qkv")
    ]
    pairs += [
        Pair(f"h.{i}.proj", [f"enc.{i}.w"], "rename", 0.95, ["only one of its shape"], "whether it is transposed")
        for i in (0, 1)
    ]
    doubts = [
        Doubt(
            f"h.{i}.n1",
            [
                Pair(f"h.{i}.n1", [f"enc.{i}.ln_a"], "rename", 0.6, ["order"]),
                Pair(f"h.{i}.n1", [f"enc.{i}.ln_b"], "rename", 0.57),
            ],
            "both are as likely",
        )
        for i in (0, 1)
    ]
    return Inferred(pairs, doubts, ["head"], [])


@pytest.fixture
def files(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    fake(monkeypatch, some())
    return str(saved(SOURCE, "a.pth").name), str(saved(TARGET, "b.pth").name)


def test_the_rules_give_exactly_the_pairs_and_the_report_says_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch, some())
    rules, report = ckptool.infer(SOURCE, TARGET)
    made, _ = ckptool.remap(SOURCE, rules)
    values = made.to_torch()
    assert {*values} == {pair.target for pair in report.pairs}
    assert torch.equal(values["h.1.k"], SOURCE["enc.1.qkv"][2:4])
    assert report.only_target == ["head"]
    left = [f"enc.{i}.{name}" for i in (0, 1) for name in ("ln_a", "ln_b", "w")]
    assert report.only_source == sorted([*left, "ema.w", "ema.v"], key=list(SOURCE).index)
    assert (report.total, report.missing) == (11, ["h.0.n1", "h.1.n1", "h.0.proj", "h.1.proj", "head"])
    assert rules.entries() == report.rules
    assert ckptool.Rules.parse(report.rules).entries() == report.rules


def test_infer_is_asked_with_what_was_given_and_settled(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = fake(monkeypatch, some())
    person = [Pair("h.0.n1", ["enc.0.ln_b"], "rename", 1.0, ["a person"])]
    ckptool.infer(SOURCE, TARGET, min_confidence=0.7, settled=person, words=False)
    assert {name: asked[0][name] for name in ("min_confidence", "settled", "words")} == {
        "min_confidence": 0.7, "settled": person, "words": False
    }  # fmt: skip
    assert asked[0]["target"][0] == Entry("h.0.q", (2, 4), "float32")
    with pytest.raises(UsageError, match="min_confidence is a number from 0 on"):
        ckptool.infer(SOURCE, TARGET, min_confidence=-1)


def test_a_live_model_may_be_the_target_and_wrapped_keys_need_no_rule_by_hand() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    wrapped = {f"module.{key}": value for key, value in model.state_dict().items()}
    rules, report = ckptool.infer(wrapped, nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)))
    assert (len(report.pairs), report.doubts, report.only_target, report.only_source) == (4, [], [], [])
    made, _ = ckptool.remap(wrapped, rules)
    model.load_state_dict(made.to_torch())


def test_layouts_that_a_person_knows_are_settled() -> None:
    source = {"q": torch.arange(32.0).reshape(8, 4), "w": torch.arange(16.0).reshape(4, 4), "x": torch.ones(4, 4)}
    target = {key: torch.zeros_like(value) for key, value in source.items()}
    layout = {"q": "interleaved:2", "w": "transposed", "x": "as-is"}
    rules, report = ckptool.infer(source, target, layout=layout)
    values = ckptool.remap(source, rules)[0].to_torch()
    rows = source["q"].reshape(2, 2, 2, 4).transpose(1, 2).reshape(8, 4)
    assert torch.equal(values["q"], rows)
    assert torch.equal(values["w"], source["w"].T)
    assert torch.equal(values["x"], source["x"])
    assert [pair.unproven for pair in report.pairs] == [None] * 3
    back, _ = ckptool.infer(values, target, layout={"q": "halves:2", "w": "transposed"})
    again = ckptool.remap(values, back)[0].to_torch()
    assert all(torch.equal(again[key], value) for key, value in source.items())


def test_heads_woven_row_by_row_are_a_layout_of_what_is_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch, some())
    rules, _ = ckptool.infer(SOURCE, TARGET, layout={"h.*.[qkv]": "heads:2"})
    values = ckptool.remap(SOURCE, rules)[0].to_torch()
    assert torch.equal(values["h.1.v"], SOURCE["enc.1.qkv"].reshape(2, 3, 1, 4)[:, 2].reshape(2, 4))
    parts = {key: value for key, value in TARGET.items() if key[4:] in "qkv"}
    joined = [Pair(f"enc.{i}.qkv", [f"h.{i}.{part}" for part in "qkv"], "concat:0", 0.9) for i in (0, 1)]
    fake(monkeypatch, Inferred(joined, [], [], []))
    rules, _ = ckptool.infer(parts, {f"enc.{i}.qkv": torch.zeros(6, 4) for i in (0, 1)}, layout={"*": "heads:2"})
    woven = ckptool.remap(parts, rules)[0].to_torch()["enc.0.qkv"]
    apart = torch.stack([parts[f"h.0.{part}"].reshape(2, 1, 4) for part in "qkv"], 1)
    assert torch.equal(woven, apart.reshape(6, 4))


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"h.9.*": "as-is"}, "fits no key of the target"),
        ({"h.*": "nonsense"}, "takes GLOB=as-is, GLOB=transposed, GLOB=heads:N"),
        ({"h.*": "heads"}, "takes GLOB=as-is"),
        ({"h.*": "heads:0"}, "takes GLOB=as-is"),
        ({"h.*": "as-is:3"}, "takes GLOB=as-is"),
        ({"h.*.q": "heads:5"}, "does not give shape"),
        ({"h.*.proj": "heads:2"}, "^heads:2: nothing of h.0.proj, h.1.proj is fused"),
        ({"h.*.q": "transposed"}, "does not give shape"),
    ],
)
def test_a_layout_that_does_not_fit_is_refused(
    layout: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake(monkeypatch, some())
    with pytest.raises(UsageError, match=message):
        ckptool.infer(SOURCE, TARGET, layout=layout)


def test_what_is_no_tensor_stays_where_the_target_has_it_too_and_else_is_dropped() -> None:
    source: dict[str, Any] = {"module.w": torch.ones(2, 3), "x": 3, "y": "text"}
    rules, _ = ckptool.infer(source, {"w": torch.zeros(2, 3), "x": 5})
    made, report = ckptool.remap(source, rules)
    assert ({*made.entries()}, report.dropped) == ({"w", "x"}, ["y"])


# --- the command ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("folding")
def test_the_text_says_what_was_matched_what_is_left_out_and_the_next_step(files: tuple[str, str], run: Run) -> None:
    code, out, err = run("remap", files[0], "--like", files[1], "-o", "out.pth")
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        "out.pth: matched 6 of 11, 2 unproven, 2 in doubt, 1 missing, 8 dropped",
        "  enc.{i}.qkv  ->  h.{i}.q, h.{i}.k, h.{i}.v  split",
        "  unproven  h.{i}.proj  of enc.{i}.w: whether it is transposed  (2 keys)",
        "  in doubt  h.{i}.n1  could be enc.{i}.ln_a or enc.{i}.ln_b  (2 keys)",
        "  missing  head  nothing in a.pth fits",
        "  dropped  enc.{0,1}.{ln_a,ln_b,w}",
        "  dropped  ema.{w,v}",
        "  hint  --layout '*.proj=HOW' would match 2 more; HOW is as-is or transposed",
    ]
    assert {*torch.load("out.pth")} == {*TARGET} - {"h.0.n1", "h.1.n1", "h.0.proj", "h.1.proj", "head"}


def test_the_hint_is_true(files: tuple[str, str], run: Run) -> None:
    code, out, _ = run("remap", files[0], "--like", files[1], "--layout", "h.*.proj=as-is", "--dry-run")
    assert (code, out.splitlines()[0]) == (0, "(dry run): matched 8 of 11, 2 in doubt, 1 missing, 6 dropped")
    assert " ".join(out.splitlines()[-1].split()) == "hint --min-confidence 0.6 would match 10 of 11"
    code, out, _ = run("remap", *files[:1], "--like", files[1], "--min-confidence", "0.6", "--dry-run")
    assert (code, out.splitlines()[0]) == (0, "(dry run): matched 8 of 11, 2 unproven, 1 missing, 6 dropped")


def test_a_pipe_gets_a_line_for_every_key_that_is_left_out_and_with_a_map_for_those_that_are_made(
    files: tuple[str, str], run: Run
) -> None:
    _, out, _ = run("remap", files[0], "--like", files[1], "--dry-run")
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert "in doubt h.1.n1 could be enc.1.ln_a or enc.1.ln_b" in lines
    assert "enc.{i}.qkv -> h.{i}.q, h.{i}.k, h.{i}.v split" in lines
    assert not [line for line in lines if "h.0.k" in line]
    _, out, _ = run("remap", files[0], "--like", files[1], "--save-map", "map.json", "--dry-run")
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert "in doubt h.1.n1 could be enc.1.ln_a or enc.1.ln_b" in lines
    assert "unproven h.1.proj of enc.1.w: whether it is transposed" in lines
    assert "enc.0.qkv -> h.0.k split:0:1/3" in lines


def test_saved_rules_do_the_same_without_a_target(files: tuple[str, str], run: Run) -> None:
    run("remap", files[0], "--like", files[1], "-o", "out.pth", "--save-rules", "rules.toml", "--save-map", "map.json")
    assert tomllib.loads(Path("rules.toml").read_text())["rules"]
    code, _, _ = run("remap", files[0], "--rules", "rules.toml", "-o", "again.pth")
    assert code == 0
    assert Path("again.pth").read_bytes() == Path("out.pth").read_bytes()
    assert json.loads(Path("map.json").read_text())["map"]
    run("remap", files[0], "--like", files[1], "--save-rules", "rules.json")
    assert json.loads(Path("rules.json").read_text())["rules"] == tomllib.loads(Path("rules.toml").read_text())["rules"]
    assert run("remap", files[0], "--rules", "rules.json", "-o", "third.pth")[0] == 0
    assert Path("third.pth").read_bytes() == Path("out.pth").read_bytes()


def test_a_dry_run_writes_no_rules(files: tuple[str, str], run: Run) -> None:
    assert run("remap", files[0], "--like", files[1], "--save-rules", "rules.toml", "--dry-run")[0] == 0
    assert not Path("rules.toml").exists()


def test_rules_that_are_given_come_before_those_that_are_found(files: tuple[str, str], run: Run) -> None:
    run("remap", files[0], "--add-prefix", "net.", "-o", "net.pth")
    code, _, _ = run(
        "remap", "net.pth", "--strip-prefix", "net.", "--like", files[1], "-o", "out.pth", "--save-rules", "rules.toml"
    )
    assert code == 0
    assert {*torch.load("out.pth")} == {*TARGET} - {"h.0.n1", "h.1.n1", "h.0.proj", "h.1.proj", "head"}
    assert tomllib.loads(Path("rules.toml").read_text())["rules"][0] == {"strip_prefix": "net."}
    assert run("remap", "net.pth", "--rules", "rules.toml", "-o", "again.pth")[0] == 0
    assert Path("again.pth").read_bytes() == Path("out.pth").read_bytes()


def test_json_has_pairs_doubts_and_rules(files: tuple[str, str], run: Run) -> None:
    _, out, _ = run("remap", files[0], "--like", files[1], "--dry-run", "--json")
    result = json.loads(out)["result"]
    found = result["like"]
    assert found["pairs"][0] == {
        "target": "h.0.q", "source": ["enc.0.qkv"], "op": "split:0:0/3", "confidence": 0.9,
        "witnesses": ["words", "numbers"],
    }  # fmt: skip
    assert found["doubts"][2]["candidates"][0]["unproven"] == "whether it is transposed"
    assert found["doubts"][1]["candidates"][0]["source"] == ["enc.1.ln_a"]
    assert (found["only_target"], result["dropped"]) == (["head"], found["only_source"])
    assert result["hint"].startswith("--layout '*.proj=HOW' would match 2 more")
    assert {row["new"]: row["op"] for row in result["map"]}["h.1.v"] == "split:0:2/3"


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--strict"], "--strict: 5 missing, 8 unexpected"),
        (["--require", "head"], "--require head: not loaded: head"),
        (["--min-loaded", "90%"], "48.0 % of the parameters loaded, --min-loaded wants 90.0 %"),
    ],
)
def test_conditions_that_do_not_hold_are_exit_code_1_and_nothing_is_written(
    options: list[str], text: str, files: tuple[str, str], run: Run
) -> None:
    code, out, _ = run("remap", files[0], "--like", files[1], "-o", "out.pth", "--save-rules", "r.toml", *options)
    assert code == 1
    assert out.splitlines()[0].startswith("out.pth (not written): matched 6 of 11")
    assert f"  failed  {text}" in out.splitlines()
    assert not Path("out.pth").exists()
    assert not Path("r.toml").exists()


def test_conditions_that_hold_let_it_through(files: tuple[str, str], run: Run) -> None:
    options = ["--min-loaded", "40%", "--require", "h.*.q"]
    assert run("remap", files[0], "--like", files[1], "-o", "out.pth", *options)[0] == 0


def test_nothing_that_fits_is_exit_code_1(saved: Saved, run: Run) -> None:
    saved({"a": torch.ones(2)}, "a.pth")
    saved({"b": torch.ones(3)}, "b.pth")
    code, out, _ = run("remap", "a.pth", "--like", "b.pth", "-o", "out.pth")
    assert (code, Path("out.pth").exists()) == (1, False)
    assert "no key of the source fits" in out


def test_explain_is_a_sentence(files: tuple[str, str], run: Run) -> None:
    def said(key: str) -> str:
        code, out, err = run("remap", files[0], "--like", files[1], "--explain", key)
        assert (code, err) == (0, "")
        return out.strip()

    assert said("h.0.k") == (
        "h.0.k is made of enc.0.qkv, part 2 of 3 along dimension 0, because the words of their names agree and the "
        "numbers in their names agree (confidence 0.9)."
    )
    assert said("h.1.n1") == (
        "h.1.n1 is left out: it could be made of enc.1.ln_a (confidence 0.6: order), or of enc.1.ln_b (confidence "
        "0.57: no witness); none was taken, as both are as likely."
    )
    assert said("head") == "head is left out: nothing in a.pth could become it."
    assert said("h.0.proj") == (
        "h.0.proj is left out: it is made of enc.0.w, but whether it is transposed is not known. --layout says it."
    )
    assert said("ema.w") == "ema.w is dropped: no key of b.pth is made of it."
    assert said("enc.0.qkv").startswith("enc.0.qkv becomes h.0.q, h.0.k and h.0.v, or a part of it")
    assert len(said("h.0.*").splitlines()) == 5
    _, out, _ = run("remap", files[0], "--like", files[1], "--explain", "head", "--json")
    assert json.loads(out)["result"]["explained"] == ["head is left out: nothing in a.pth could become it."]


def test_a_layout_is_said_on_the_command_line(files: tuple[str, str], run: Run) -> None:
    options = ["--layout", "h.0.proj=transposed", "--layout", "h.1.proj=as-is"]
    code, out, _ = run("remap", files[0], "--like", files[1], "-o", "out.pth", *options)
    assert (code, "unproven" in out) == (0, False)
    made = torch.load("out.pth")
    assert torch.equal(made["h.0.proj"], SOURCE["enc.0.w"].T)
    assert torch.equal(made["h.1.proj"], SOURCE["enc.1.w"])


def test_a_model_in_code_and_a_lock_file_may_be_the_target(run: Run) -> None:
    Path("strange_net.py").write_text(STRANGE)
    torch.save({f"module.{key}": torch.ones(s) for key, s in [("a.weight", (4, 3)), ("a.bias", (4,))]}, "a.pth")
    code, out, _ = run("remap", "a.pth", "--like", "strange_net.py:Net", "-o", "out.pth")
    assert (code, {*torch.load("out.pth")}) == (0, {"a.weight", "a.bias"})
    assert "imported and ran strange_net.py:Net" in out
    assert run("inspect", "out.pth", "--lock", "out.lock")[0] == 0
    assert run("remap", "a.pth", "--like", "out.lock", "-o", "again.pth", "--strict")[0] == 0
    assert Path("again.pth").read_bytes() == Path("out.pth").read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--save-rules", "r.toml", "--rename", "a=b", "-o", "out.pth"], "--save-rules goes with --like TARGET"),
        (["--strict", "--explain", "x", "--rename", "a=b", "-o", "o.pth"], "--explain, --strict go with --like TARGET"),
        (["--like", "b.pth"], "name the output with -o, or ask for a --dry-run"),
        (["--like", "b.pth", "--invert", "m.json", "-o", "out.pth"], "--invert goes with no other rule"),
        (["--like", "b.pth", "--layout", "q", "--dry-run"], "--layout takes GLOB=HOW, not 'q'"),
        (["--like", "b.pth", "--explain", "h.0.Q"], "--explain h.0.Q fits no key of a.pth or b.pth"),
        (["--like", "b.pth", "--min-loaded", "x", "--dry-run"], "--min-loaded takes a share"),
        (["--like", "b.pth", "-o", "a.pth", "--force"], "a.pth"),
        (["--like", "b.pth", "-o", "b.pth", "--force"], "b.pth"),
        (["--like", "b.pth", "-o", "out.pth", "--save-rules", "out.pth"], "two outputs have the name out.pth"),
        (["--like", "absent.pth", "--dry-run"], "absent.pth"),
    ],
)
def test_what_contradicts_itself_is_refused(
    options: list[str], message: str, files: tuple[str, str], refused: Callable[..., str]
) -> None:
    assert message in refused("remap", files[0], *options)


def test_equal_values_decide_what_names_leave_in_doubt(saved: Saved, run: Run) -> None:
    torch.manual_seed(7)
    source = {f"x.{name}": torch.randn(8, 8) for name in "pqrs"}
    target = {"y.k": source["x.r"].clone(), "y.l": source["x.p"].T.contiguous(), "y.m": source["x.q"].clone()}
    rules, report = ckptool.infer(source, target)
    assert {pair.target: (pair.source, pair.witnesses) for pair in report.pairs} == {
        "y.k": (["x.r"], ["values"]), "y.l": (["x.p"], ["values"]), "y.m": (["x.q"], ["values"])
    }  # fmt: skip
    made = ckptool.remap(source, rules)[0].to_torch()
    assert all(torch.equal(made[key], value) for key, value in target.items())
    assert all("values" not in pair.witnesses for pair in ckptool.infer(source, target, values=False)[1].pairs)
    saved(source, "a.pth")
    saved(target, "b.pth")
    assert run("remap", "a.pth", "--like", "b.pth", "-o", "out.pth")[0] == 0
    assert torch.equal(torch.load("out.pth")["y.l"], target["y.l"])
    _, out, _ = run("remap", "a.pth", "--like", "b.pth", "--no-values", "--dry-run", "--json")
    assert all("values" not in pair["witnesses"] for pair in json.loads(out)["result"]["like"]["pairs"])


def test_what_is_fused_is_cut_where_its_layout_is_said(saved: Saved, run: Run) -> None:
    source, target = fused()
    saved(source, "a.pth")
    saved(target, "b.pth")
    _, out, _ = run("remap", "a.pth", "--like", "b.pth", "--dry-run")
    assert "matched 3 of 21, 18 unproven" in out
    hint = " ".join(out.splitlines()[-1].split())
    assert hint == "hint --layout 'layer.*.attention.*=HOW' would match 18 more; HOW is as-is or heads:N"
    layout = ["--layout", "layer.*.attention.*=heads:2"]
    assert run("remap", "a.pth", "--like", "b.pth", *layout, "-o", "out.pth")[0] == 0
    made = torch.load("out.pth")
    assert {*made} == {*target}
    by_head = source["h.1.attn.qkv.weight"].reshape(2, 3, 4, 8)
    assert torch.equal(made["layer.1.attention.key.weight"], by_head[:, 1].reshape(8, 8))
    assert run("remap", "a.pth", "--like", "b.pth", "--layout", "*.attention.*=as-is", "-o", "plain.pth")[0] == 0
    plain = torch.load("plain.pth")["layer.1.attention.key.weight"]
    assert torch.equal(plain, source["h.1.attn.qkv.weight"][8:16])


@pytest.mark.parametrize("command", [["filter", "--match"], ["load-partial", "--into"]])
def test_where_few_keys_match_the_hint_says_what_remap_like_would_match(
    command: list[str], saved: Saved, run: Run
) -> None:
    torch.manual_seed(5)
    source, target = {}, {}
    for i in range(3):
        for one, other, rows in (("attn.out", "self.proj", 6), ("mlp.up", "ffn.w1", 12)):
            for leaf, shape in (("weight", (rows, 6)), ("bias", (rows,))):
                source[f"enc.{i}.{one}.{leaf}"] = torch.randn(shape)
                target[f"h.{i}.{other}.{leaf}"] = torch.randn(shape)
    saved(source, "a.pth")
    saved(target, "b.pth")
    options = [command[0], "a.pth", *command[1:], "b.pth", "--dry-run", "--json"]
    hint = json.loads(run(*options)[1])["result"]["hint"]
    _, out, _ = run("remap", "a.pth", "--like", "b.pth", "--dry-run", "--json")
    matched = len(json.loads(out)["result"]["like"]["pairs"])
    assert hint == f"remap --like b.pth would match {matched} of 12"
    assert matched >= 6
    saved(target, "a.pth")
    assert "hint" not in json.loads(run(*options)[1])["result"]


def test_no_hint_takes_long_where_there_are_many_names_that_repeat_nothing(saved: Saved, run: Run) -> None:
    words = [f"{a}{b}" for a in "abcdefghijklmnop" for b in "qrstuvwxyzabcdef"]
    saved({f"{word}.x": torch.ones(2) for word in words}, "a.pth")
    saved({f"{word}.y": torch.ones(2) for word in words}, "b.pth")
    begin = time.process_time()
    _, out, _ = run("filter", "a.pth", "--match", "b.pth", "--dry-run", "--json")
    assert "remap --like" not in (json.loads(out)["result"].get("hint") or "")
    assert time.process_time() - begin < 5


def test_no_hint_is_given_where_few_keys_were_chosen(saved: Saved, run: Run) -> None:
    state = {f"{i}.{name}": torch.ones(i + 2) for i in range(9) for name in ("weight", "bias")}
    saved(state, "a.pth")
    _, out, _ = run("filter", "a.pth", "--match", "a.pth", "--include", "0.*", "--dry-run", "--json")
    assert "hint" not in json.loads(out)["result"]


def test_keys_that_rules_cannot_write_are_left_out_and_named(saved: Saved, run: Run) -> None:
    saved({"": torch.randn(2, 3), "a": torch.randn(4, 5)}, "a.pth")
    saved({"m.0": torch.zeros(2, 3), "m.1": torch.zeros(4, 5)}, "b.pth")
    code, out, err = run("remap", "a.pth", "--like", "b.pth", "--min-confidence", "0", "-o", "out.pth")
    assert (code, err) == (0, "")
    assert out.splitlines()[0] == "out.pth: matched 1 of 2, 1 in doubt, 1 dropped"
    assert [*torch.load("out.pth")] == ["m.1"]


def two_spellings(saved: Saved) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Saves a source and a target of other names; returns (the source, {key of the target: key of the source})."""
    torch.manual_seed(6)
    source, target, truth = {}, {}, {}
    for i in range(3):
        for one, other, rows in (("attn.out_proj", "self_attn.o_proj", 6), ("mlp.up", "ffn.up_proj", 12)):
            for leaf, shape in (("weight", (rows, 8)), ("bias", (rows,))):
                old, new = f"encoder.layers.{i}.{one}.{leaf}", f"model.blocks.{i}.{other}.{leaf}"
                source[old], target[new], truth[new] = torch.randn(shape), torch.randn(shape), old
    source["head.weight"], target["head.weight"] = torch.randn(5, 8), torch.randn(3, 8)
    source["extra.table"] = torch.randn(2, 2, 2)
    saved(source, "a.pth")
    saved(target, "b.pth")
    return source, truth


@pytest.mark.parametrize("command", [["filter", "--match"], ["load-partial", "--into"]])
def test_auto_remap_loads_what_is_certain_and_names_the_rest(command: list[str], saved: Saved, run: Run) -> None:
    source, truth = two_spellings(saved)
    options = [command[0], "a.pth", *command[1:], "b.pth", "--auto-remap"]
    code, out, _ = run(*options, "-o", "out.pth", "--json")
    made, rows = torch.load("out.pth"), {row["key"]: row for row in json.loads(out)["result"]["rows"]}
    loaded = {key: row for key, row in rows.items() if row["reason"] == "loaded"}
    assert code == 0
    assert {*loaded} == {*truth}
    for key, row in loaded.items():
        assert torch.equal(made[key], source[truth[key]])
        assert row["source"] == truth[key]
        assert row["confidence"] >= 0.8
        assert row["witnesses"]
    assert rows["head.weight"]["reason"] == "mismatched"
    assert rows["extra.table"]["reason"] == "unexpected"
    _, out, _ = run(*options, "--dry-run")
    assert "from encoder.layers.0.mlp.up.weight" in out
    code, _, err = run(*options, "--rename", "a=b", "--dry-run")
    assert (code, "--auto-remap finds the names" in err) == (2, True)


def test_auto_remap_of_a_model_in_two_spellings_takes_no_wrong_tensor_in_the_library_too() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True)
    source = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).state_dict()
    source = {key: torch.randn_like(value) for key, value in source.items()}
    names = {"layers.": "blocks.", "self_attn.out_proj": "attention.proj", "self_attn.in_proj_": "attention.qkv."}
    names |= {"linear1": "mlp.fc1", "linear2": "mlp.fc2", "norm1": "ln_1", "norm2": "ln_2"}
    truth = {}
    for key in source:
        new = key
        for old, text in names.items():
            new = new.replace(old, text)
        truth[new] = key
    target = {new: torch.randn_like(source[key]) for new, key in truth.items()}
    for made, report in (
        ckptool.filter(source, match=target, auto_remap=True),
        ckptool.plan_partial(source, target, auto_remap=True),
    ):
        values = made.to_torch()
        assert all(torch.equal(values[new], source[key]) for new, key in truth.items())
        assert {row.confidence is not None for row in report.rows} == {True}


def test_auto_remap_names_what_is_in_doubt_and_loses_no_key(
    files: tuple[str, str], monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    monkeypatch.setattr("ckptool.mapping.auto.infer", like.infer)
    _, out, _ = run("filter", files[0], "--match", files[1], "--auto-remap", "--dry-run", "--json")
    rows = {row["key"]: row for row in json.loads(out)["result"]["rows"]}
    assert {*rows} == {*TARGET, *(key for key in SOURCE if "qkv" not in key)}
    assert (rows["h.1.k"]["source"], rows["h.1.k"]["detail"]) == ("enc.1.qkv", "split:0:1/3")
    assert rows["h.0.n1"]["detail"].startswith("in doubt: could be enc.0.ln_a or enc.0.ln_b; ")
    assert rows["h.0.proj"]["detail"] == "in doubt: could be enc.0.w; whether it is transposed is not known"
    assert rows["enc.0.w"]["reason"] == "unexpected"
    _, out, _ = run("filter", files[0], "--match", files[1], "--auto-remap", "--dry-run")
    assert "in doubt: could be enc.0.ln_a" in out


def test_auto_remap_refuses_more_keys_than_it_maps_in_reasonable_time(
    files: tuple[str, str], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ckptool.api.writing.MOST_MAPPED", 10)
    code, _, err = run("filter", files[0], "--match", files[1], "--auto-remap", "--dry-run")
    assert (code, err.count("\n")) == (2, 1)
    assert "--auto-remap: b.pth has 11 keys, over 10: find the names by remap --like --save-rules" in err
    monkeypatch.setattr("ckptool.api.writing.MOST_MAPPED", 11)
    assert run("filter", files[0], "--match", files[1], "--auto-remap", "--dry-run")[0] < 2
