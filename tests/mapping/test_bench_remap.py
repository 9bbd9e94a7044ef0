"""The benchmark of mapping: its pairs, its scorer and its harder sets are what they say."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
from oracles import FIXTURES

from bench.remap import baselines, pairs, stress
from bench.remap.inverse import inverse
from bench.remap.pairs import Entry, Made, Pair
from bench.remap.score import in_one_form, layout, loads, piece, score

TOP = FIXTURES.parent


@pytest.fixture(scope="module")
def committed() -> dict[str, Pair]:
    return {pair.name: pair for pair in pairs.committed()}


@pytest.fixture(scope="module")
def some(committed: dict[str, Pair]) -> list[Pair]:
    names = [
        "openai_whisper_base__hf_whisper",
        "tf_bert_base__hf_bert_pretraining",
        "nvlabs_segformer_b0_ade__hf_segformer",
    ]
    return [committed[name] for name in names]


def small() -> Pair:
    """Two matrices and a fused one, a square one, a counter, and a key that only the source has."""
    source = [
        Entry("qkv", (12, 4), "float32"),
        Entry("fc", (4, 4), "float32"),
        Entry("n", (), "int64"),
        Entry("x", (9,), "float32"),
    ]
    target = [Entry(name, (4, 4), "float32") for name in ("q", "k", "v", "out")] + [Entry("count", (), "int64")]
    mapping = {name: Made(("qkv",), f"split:0:{at}/3") for at, name in enumerate("qkv")}
    return Pair(
        "small", "none", source, target, mapping | {"out": Made(("fc",), "transpose"), "count": Made(("n",), "rename")}
    )


def test_every_pair_is_of_keys_that_are_there_and_every_op_gives_the_target_s_shape(committed: dict[str, Pair]) -> None:
    assert len(committed) > 100
    assert {pair.part for pair in committed.values()} == set(pairs.PARTS)
    for pair in committed.values():
        source, target = ({entry.key: entry for entry in side} for side in (pair.source, pair.target))
        assert len(source) == len(pair.source), pair.name
        assert len(target) == len(pair.target), pair.name
        for key, made in pair.mapping.items():
            assert loads([source[one].shape for one in made.sources], made.op, target[key].shape), (pair.name, key)


def test_no_family_is_in_two_parts(committed: dict[str, Pair]) -> None:
    parts: dict[str, set[str]] = {}
    for pair in committed.values():
        parts.setdefault(pair.family, set()).add(pair.part)
    assert [family for family, found in parts.items() if len(found) > 1] == []


def test_what_is_packed_comes_back_and_packs_to_the_same_bytes(committed: dict[str, Pair]) -> None:
    data = pairs.PACKED.read_bytes()
    assert pairs.packed(list(committed.values())) == data
    assert len(data) < 150_000


def test_the_truth_is_exact_in_every_set(some: list[Pair]) -> None:
    for name in stress.SETS:
        for pair in some:
            harder = stress.stress(name, pair)
            if harder:
                scored = score(harder, harder.mapping)
                assert scored.exact, (name, pair.name, scored.missed[:3], scored.wrong[:3])
                assert not scored.layout_harm


def test_a_set_is_the_same_in_every_run_and_differs_from_the_pair(some: list[Pair]) -> None:
    for name in stress.SETS:
        made = [stress.stress(name, pair) for pair in some]
        assert made == [stress.stress(name, pair) for pair in some], name
        assert name == "plain" or any(one and one != pair for one, pair in zip(made, some, strict=True)), name


def test_harm_is_what_is_wrong_and_loads() -> None:
    wrong = {
        "q": Made(("qkv",), "split:0:1/3"),
        "k": Made(("qkv",), "rename"),
        "out": Made(("x",), "rename"),
        "count": Made(("qkv",), "split:0:0/3"),
    }
    scored = score(small(), wrong)
    assert scored.harm == ["q"]
    assert scored.wrong == ["q", "k", "out", "count"]
    assert (scored.found, scored.wanted, scored.exact) == (0, 5, False)


def test_a_counter_and_a_wrong_layout_are_told_apart_from_harm() -> None:
    pair = replace(small(), source=[*small().source, Entry("m", (), "int64")])
    scored = score(pair, {"out": Made(("fc",), "rename"), "count": Made(("m",), "rename")})
    assert scored.harm == []
    assert scored.wrong == ["count"]
    assert scored.layout_harm == ["out"]


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("split:0:1/3;transpose", "transpose;split:1:1/3", True),
        ("transpose;slice:1:4:8", "split:0:1/3;transpose", True),
        ("permute:1,0;split:0:0/2;permute:1,0", "split:1:0/2", True),
        ("split:0:1/3;transpose", "transpose;split:0:1/3", False),
        ("split:0:1/3", "slice:0:4:9", False),
        ("rename", "slice:0:0:12", True),
    ],
)
def test_operations_of_one_effect_are_one_operation(one: str, other: str, same: bool) -> None:
    forms = [in_one_form(op, (12, 6)) for op in (one, other)]
    assert (piece(forms[0]) == piece(forms[1])) == same
    if same:
        assert layout(forms[0]) == layout(forms[1])


def test_turned_before_or_after_they_are_put_together_is_the_same() -> None:
    assert in_one_form("transpose;concat:1", (4, 8)) == in_one_form("concat:0;transpose", (4, 8))
    assert in_one_form("permute:2,0,1;split:1:0/2", (4, 8, 6)) == in_one_form("split:0:0/2;permute:2,0,1", (4, 8, 6))
    assert in_one_form("permute:2,0,1", (4, 1, 1)) == []
    assert in_one_form("transpose;reshape;split:0:1/2", (4, 8))[-2:] == ["reshape", "split:0:1/2"]


def test_either_of_tied_sources_is_right_and_a_tied_target_may_be_left_out() -> None:
    pair = small()
    twins = replace(
        pair,
        source=[*pair.source, Entry("again", (4, 4), "float32")],
        source_ties=[["again", "fc"]],
        target_ties=[["q", "k"]],
    )
    assert score(
        twins, {key: made for key, made in pair.mapping.items() if key != "k"} | {"out": Made(("again",), "transpose")}
    ).exact
    assert not score(twins, {"v": pair.mapping["v"]}).exact


def test_of_two_copies_either_is_right_and_a_mixture_is_harm() -> None:
    pair = stress.stress("ema2", small())
    assert pair is not None
    (other,) = pair.alternatives
    assert score(pair, other).exact
    assert score(pair, pair.mapping).exact
    assert score(pair, pair.mapping | {"q": other["q"]}).harm == ["q"]
    strict = stress.stress("ema", small())
    assert strict is not None
    assert len(score(strict, other).harm) == 4


def test_a_mapping_read_backwards_joins_the_pieces_and_turns_back() -> None:
    back = inverse(small())
    assert back.mapping["qkv"] == Made(("q", "k", "v"), "concat:0")
    assert back.mapping["fc"] == Made(("out",), "transpose")
    assert "x" not in back.mapping
    again = inverse(back)
    assert again.mapping == small().mapping


def test_pieces_of_which_one_has_no_partner_make_no_whole() -> None:
    pair = small()
    less = replace(pair, mapping={key: made for key, made in pair.mapping.items() if key != "v"})
    assert set(inverse(less).mapping) == {"fc", "n"}


def test_false_friends_keep_the_order_of_the_tensors() -> None:
    listing = [Entry(f"block.{i}.{name}.weight", (4, 4), "float32") for i in range(2) for name in ("q", "k")]
    pair = Pair("friends", "none", listing, listing, {entry.key: Made((entry.key,), "rename") for entry in listing})
    swapped = stress.false_friends(pair, Random(0))
    assert swapped is not None
    assert [entry.key for entry in swapped.source][:2] == ["block.0.k.weight", "block.0.q.weight"]
    assert swapped.mapping["block.1.q.weight"].sources == ("block.1.k.weight",)
    assert score(swapped, swapped.mapping).exact
    assert score(swapped, pair.mapping).exact
    mixed = swapped.mapping | {"block.1.q.weight": pair.mapping["block.1.q.weight"]}
    assert score(swapped, mixed).harm == ["block.1.q.weight"]


def test_numbers_run_backwards_only_where_the_direction_shows() -> None:
    def listed(sizes: list[int]) -> Pair:
        listing = [Entry(f"stage.{i}.weight", (size,), "float32") for i, size in enumerate(sizes)]
        return Pair("stages", "none", listing, listing, {entry.key: Made((entry.key,), "rename") for entry in listing})

    assert stress.numbers_reversed(listed([8, 8, 8]), Random(0)) is None
    turned = stress.numbers_reversed(listed([8, 16, 32]), Random(0))
    assert turned is not None
    assert [entry.shape for entry in turned.source] == [(32,), (16,), (8,)]
    assert turned.mapping["stage.0.weight"].sources == ("stage.2.weight",)


def test_the_simple_methods_map_what_their_rule_says() -> None:
    source = [Entry("module.a.weight", (2,), "float32"), Entry("module.b.weight", (2,), "float32")]
    target = [Entry("b.weight", (2,), "float32"), Entry("a.weight", (2,), "float32")]
    for name, b in (
        ("names", "module.b.weight"),
        ("order", "module.a.weight"),
        ("shapes", "module.a.weight"),
        ("suffix", "module.b.weight"),
    ):
        assert baselines.METHODS[name](source, target)["b.weight"][1].sources == (b,), name


def test_the_runner_prints_a_table_and_writes_json(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "bench.remap.run",
        "--method",
        "core,names",
        "--pairs",
        "tv_vgg16__*",
        "--json",
        tmp_path / "x.json",
    ]
    run = subprocess.run(command, cwd=TOP, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("\n") == 3
    rows = json.loads((tmp_path / "x.json").read_text())["rows"]
    assert [(row["method"], row["at"][0]["pairs"]) for row in rows] == [("core", 2), ("names", 2)]
