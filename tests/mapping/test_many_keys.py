"""Sides of thousands of keys are mapped in seconds, or are left with a word; in seconds of the processor."""

from __future__ import annotations

import time
from collections.abc import Callable
from random import Random

import pytest
import torch

import ckptool
from ckptool.mapping.infer import infer
from ckptool.mapping.pairs import Entry, Inferred, Pair
from ckptool.mapping.rules import rules_of
from ckptool.ops.rules import Rules
from ckptool.values.fingerprints import search

Sides = tuple[list[Entry], list[Entry]]
VOWELS, CONSONANTS = "aeiou", "bdfgklmnprstvz"


def word(random: Random) -> str:
    return "".join(random.choice(CONSONANTS) + random.choice(VOWELS) for _ in range(4))


def listed(random: Random, shapes: list[tuple[int, ...]]) -> list[Entry]:
    return [Entry(f"{word(random)}.{word(random)}.weight", shape) for shape in shapes]


def one_of_many(random: Random) -> Sides:
    return listed(random, [(8,)] * 6000), listed(random, [(8,)])


def every_shape_once(random: Random) -> Sides:
    return listed(random, [(8, i + 1) for i in range(3000)]), listed(random, [(8, i + 1) for i in range(3000)])


def lists_of_every_width(random: Random) -> Sides:
    def side(blocks: str, inner: str) -> list[Entry]:
        return [
            Entry(f"{blocks}.{i}.{inner}.{j}.{part}", (64 + i, 32))
            for i in range(200) for j in range(4) for part in ("one.weight", "two.weight")
        ]  # fmt: skip

    return side("layers", "experts"), side("blocks", "mlps")


def small_families(random: Random) -> Sides:
    def side() -> list[Entry]:
        return [Entry(f"{name}.{j}.weight", (3, i + 1)) for i in range(500) for name in [word(random)] for j in (0, 1)]

    return side(), side()


def one_long_list(random: Random) -> Sides:
    return tuple([Entry(f"{name}.{i}.x.weight", (4, i + 1)) for i in range(1500)] for name in ("a", "b"))  # type: ignore[return-value]


def depths(random: Random) -> Sides:
    def side(name: str) -> list[Entry]:
        return [Entry(".".join([str(i), *[name, "0"] * 800, "weight"]), (4, i + 1)) for i in range(200)]

    return side("a"), side("b")


def long_numbers(random: Random) -> Sides:
    def side(name: str) -> list[Entry]:
        return [Entry(f"{name}.{str(i) * 1500}z.weight", (4, i + 1)) for i in range(200)]

    return side("a"), side("b")


CASES: dict[str, tuple[Callable[[Random], Sides], float]] = {
    "one tensor of the target has the shape of 6,000": (one_of_many, 15),
    "names of random words, and no two of one shape": (every_shape_once, 15),
    "lists of four in layers of which no two are alike": (lists_of_every_width, 10),
    "five hundred lists of two": (small_families, 12),
    "a list of 1,500 of which no two are alike": (one_long_list, 15),
    "names of 1,600 segments": (depths, 10),
    "numbers of thousands of digits": (long_numbers, 10),
}


def told(found: Inferred, source: list[Entry], target: list[Entry]) -> bool:
    """Whether every key of both sides is in the result, once."""
    ours = {key for pair in found.pairs for key in pair.source}
    theirs = [*(pair.target for pair in found.pairs), *(doubt.target for doubt in found.doubts), *found.only_target]
    return ours | {*found.only_source} == {one.key for one in source} and sorted(theirs) == sorted(
        one.key for one in target
    )


@pytest.mark.parametrize("case", CASES)
def test_many_keys_take_seconds_whatever_they_are(case: str) -> None:
    make, most = CASES[case]
    source, target = make(Random(1))
    began = time.process_time()
    found = infer(source, target)
    assert time.process_time() - began < most
    assert told(found, source, target)


def pairs_of(kind: str, count: int, random: Random) -> tuple[list[Pair], list[Entry], list[Entry]]:
    """Pairs of random names: of pieces, of what is put together, of tensors that are reshaped or transposed."""
    source, target, pairs = list[Entry](), list[Entry](), list[Pair]()
    for number in range(count):
        one, *others = (word(random) + word(random) for _ in range(4))
        if kind == "pieces":
            source.append(Entry(one, (12, 4)))
            pairs += [Pair(name, [one], f"split:0:{at}/3") for at, name in enumerate(others)]
            target += [Entry(name, (4, 4)) for name in others]
        elif kind == "wholes":
            source += [Entry(name, (4, 4)) for name in others]
            pairs.append(Pair(one, others, "concat:0"))
            target.append(Entry(one, (12, 4)))
        else:
            source.append(Entry(one, (number + 2, 3)))
            op, shape = ("transpose", (3, number + 2)) if number % 2 else ("reshape", (number + 2, 3, 1))
            pairs.append(Pair(others[0], [one], op))
            target.append(Entry(others[0], shape))
    return pairs, source, target


@pytest.mark.parametrize("kind", ["pieces", "wholes", "reshaped and transposed"])
def test_the_rules_of_thousands_of_names_that_do_not_repeat_take_seconds(kind: str) -> None:
    pairs, source, target = pairs_of(kind, 2000, Random(2))
    began = time.process_time()
    rules = rules_of(pairs, source, target)
    assert time.process_time() - began < 10
    plan = Rules.parse(rules).plan({one.key: one.shape for one in source})
    assert plan.after == {one.key: one.shape for one in target}
    assert (plan.errors, plan.unused) == ([], [])


def test_rules_that_are_planned_together_do_what_they_do_one_by_one() -> None:
    shapes = dict.fromkeys("abcdefg", (4, 4))
    rules = [
        {"split": "a", "into": ["a1", "a2"]},
        {"split": "b", "into": ["a1.x", "b2"]},
        {"cat": ["c", "d"], "into": "cd"},
        {"transpose": "a1"},  # made by the first
        {"split": "nothing", "into": ["n1", "n2"]},
        {"reshape": "e", "shape": [2, 8]},
        {"split": "f", "into": ["g", "f2"]},  # g is there
        {"split": "g", "into": ["g", "g2"]},
        {"cat": ["b2", "absent"], "into": "z"},
    ]
    together = Rules.parse(rules).plan(dict(shapes))
    after, errors, unused = dict(shapes), list[str](), list[str]()
    for rule in rules:
        plan = Rules.parse([rule]).plan(after)
        after, errors, unused = plan.after, errors + plan.errors, unused + plan.unused
    assert (together.after, together.errors, together.unused) == (after, errors, unused)
    assert unused == ["split nothing"]
    assert len(errors) == 2


def test_near_tensors_of_one_shape_are_found_in_bounded_work_or_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(3)
    source = {f"a{at}.w": torch.randn(300, 200, generator=generator) for at in range(6)}
    target = {f"b{at}.w": source[f"a{5 - at}.w"] + 0.001 for at in range(6)}
    for work, settled, notes in (
        (1 << 35, 6, []),
        (4 * 6 * 6 * 40, 6, []),  # a few rows and columns of each do
        (100, 0, ["6 keys have a shape of too many tensors to find near ones: names decide these"]),
    ):
        monkeypatch.setattr(search, "WORK", work)
        report = ckptool.infer(source, target)[1]
        by_values = {pair.target: pair.source for pair in report.pairs if "values" in pair.witnesses}
        assert by_values == {f"b{at}.w": [f"a{5 - at}.w"] for at in range(settled)}
        assert report.notes == notes
