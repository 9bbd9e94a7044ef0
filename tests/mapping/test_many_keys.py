"""Sides of thousands of keys are mapped in seconds, or are left with a word; in seconds of the processor."""

from __future__ import annotations

import time
from collections.abc import Callable
from random import Random

import pytest

from ckptool.mapping.infer import infer
from ckptool.mapping.pairs import Entry, Inferred

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
