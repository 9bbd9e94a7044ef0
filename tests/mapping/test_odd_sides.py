"""Sides with the oddest keys and shapes: never an exception, every key has a fate, the rules give exactly the pairs."""

from __future__ import annotations

from random import Random

import pytest
import torch

import ckptool
from ckptool.mapping.infer import infer
from ckptool.mapping.like import proven
from ckptool.mapping.pairs import Entry
from ckptool.mapping.rules import rules_of, rules_text
from ckptool.ops.rules import Rules

WORDS = (
    *["*", "{i}", "[0]", "?", "re:", "**", "%2a", "/", "\\", "'", '"', "é", "٣", "²", "{}", "{a", "#", "_", "a/b"],
    *[
        "a",
        "weight",
        "bias",
        "qkv",
        "q_proj",
        "layers",
        "experts",
        "norm",
        "in_proj_weight",
        "running_mean",
        "ema",
        "module",
        "source",
        "copy1",
    ],
    *["0", "1", "00", "01", "-1", "h0", "h01", "b2a"],
    *("", "sp ace", "\n", "\ud800", "x" * 300, "9" * 40),
)
SHAPES = ((), (1,), (0,), (4,), (4, 4), (12, 4), (4, 12), (4, 0), (4, 1), (12,), (2, 2, 4), (16,), (3, 4, 4), (8, 4))
DTYPES = ("float32", "float32", "bfloat16", "int64", "bool", "float8_e4m3fn")


def a_key(random: Random) -> str:
    parts = [random.choice(WORDS) for _ in range(random.choice((1, 1, 2, 3, 3, 4)))]
    if random.random() < 0.5:
        parts.insert(random.randrange(len(parts) + 1), str(random.randrange(3)))
    return random.choice((".", ".", ".", "/", "_")).join(parts)


def a_side(random: Random, other: list[Entry]) -> list[Entry]:
    """Entries of random keys; some with the keys, or the shapes, of another side, or of blocks that repeat."""
    made: dict[str, Entry] = {}
    for _ in range(random.choice((1, 3, 8, 20))):
        key, shape = a_key(random), random.choice(SHAPES)
        if other and random.random() < 0.5:
            one = random.choice(other)
            key, shape = random.choice((key, one.key, f"model.{one.key}", one.key.replace("a", "b"))), one.shape
        dtype = random.choice(DTYPES) if random.random() < 0.3 else "float32"
        for number in range(random.choice((1, 1, 1, 3))):
            name = key.replace("0", str(number), 1) if number else key
            made[name] = Entry(name, shape, dtype)
    return [*made.values()]


def check(seed: int) -> None:
    random = Random(seed)
    source = a_side(random, [])
    target = a_side(random, source)
    found = infer(source, target, min_confidence=random.choice((0.8, 0.0, -1.0)), layouts=random.choice(((), ("*",))))
    pairs, doubts = proven(found.pairs, found.doubts)
    made = [pair.target for pair in pairs]
    fates = [*made, *(doubt.target for doubt in doubts), *found.only_target]
    assert sorted(fates) == sorted(one.key for one in target)
    used = {key for pair in found.pairs for key in pair.source}
    assert used | {*found.only_source} == {one.key for one in source}
    rules = rules_of(pairs, source, target)
    plan = Rules.parse(rules).plan({one.key: one.shape for one in source})
    shapes = {one.key: one.shape for one in target}
    assert plan.after == {key: shapes[key] for key in made}
    assert (plan.errors, plan.unused) == ([], [])
    if not any("\ud800" in one.key for one in (*source, *target)):
        rules_text(rules)


@pytest.mark.parametrize("seed", range(0, 120, 20))
def test_odd_sides_are_mapped(seed: int) -> None:
    for one in range(seed, seed + 20):
        check(one)


def tensors(side: list[Entry], random: Random) -> dict[str, torch.Tensor]:
    """The tensors of a side: of numbers, with ties, in the dtypes that it says."""
    made: dict[str, torch.Tensor] = {}
    for one in side:
        same = [tensor for tensor in made.values() if tensor.shape == one.shape]
        if same and random.random() < 0.2:
            made[one.key] = random.choice(same)
        else:
            made[one.key] = torch.randint(-9, 9, one.shape).to(getattr(torch, one.dtype))
    return made


@pytest.mark.parametrize("seed", range(1000, 1030, 10))
def test_what_is_made_of_odd_sides_has_the_values_that_the_pairs_say(seed: int) -> None:
    for each in range(seed, seed + 10):
        random = Random(each)
        listing = a_side(random, [])
        source, target = tensors(listing, random), tensors(a_side(random, listing), random)
        rules, report = ckptool.infer(source, target, min_confidence=random.choice((0.8, 0.0)))
        assert report.total == len(target)
        if not report.pairs:
            continue
        made, _ = ckptool.remap(source, rules)
        values = made.to_torch()
        assert {*values} == {pair.target for pair in report.pairs}
        for pair in report.pairs:
            one = source[pair.source[0]]
            if pair.op == "rename":
                assert torch.equal(values[pair.target].float(), one.float())
            assert values[pair.target].shape == target[pair.target].shape


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(200, 3200, 200))
def test_many_odd_sides_are_mapped(seed: int) -> None:
    for one in range(seed, seed + 200):
        check(one)
