"""Hints of random commands on random pairs of files are added to these commands, and give what they promised."""

from __future__ import annotations

import json
import random
import re
import shlex
from typing import Any

import pytest
import torch
from oracles import Run, Saved, State, seed_torch, thinned

SHAPES: list[tuple[int, ...]] = [
    (2,),
    (3,),
    (2, 2),
    (4, 2),
    (1, 5, 4),
    (1, 10, 4),
    (4, 3, 2, 2),
    (4, 1, 2, 2),
    (),
    (1,),
]
DTYPES = [*[torch.float32] * 8, torch.float16, torch.int64, torch.complex64, torch.float8_e4m3fn]
LEAVES = ("weight", "bias", "num_batches_tracked", "pos_embed", "weight_scale", "w")
PATHS = (
    "conv",
    "attn.q",
    "attn.k",
    "head",
    "embed",
    "blocks.0.fc",
    "blocks.1.fc",
    "layers.0.mlp",
    "layers.1.mlp",
    "a.b",
)
PREFIXES = (
    "model.",
    "module.",
    "net.",
    "_orig_mod.",
    "a.b.",
    "module.model.",
    "x/",
    "-y.",
    "q=r.",
    "{i}.",
    "blocks.0.",
)
RENAMES = (("blocks.", "blk"), ("fc", "linear"), ("weight", "kernel"), ("layers", "encoder.layer"), (".", "/"))
NAMES: list[Any] = ["G", "D", "model", "ema", "a/b", "a", 0, "0", 1, "/m", "", "-r", (1, 2), None, b"by", 1.5, "m/"]
OPTIMIZER = {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 1, "params": [0]}]}


def net(dice: random.Random) -> State:
    made: State = {}
    for path in dice.sample(PATHS, dice.randint(1, 6)):
        for leaf in dice.sample(LEAVES, dice.randint(1, 3)):
            made[f"{path}.{leaf}"] = (torch.randn(dice.choice(SHAPES)) * 9).to(dice.choice(DTYPES))
    one, other = dice.choice([*made]), dice.choice([*made])
    return {**made, one: made[other]} if dice.random() < 0.3 else made


def changed(dice: random.Random, state: State) -> State:
    """What training code makes of a state_dict: prefixes, other names, other shapes, fewer and more keys."""
    for _ in range(dice.choice([0, 1, 1, 2])):
        prefix, (old, new), key = dice.choice(PREFIXES), dice.choice(RENAMES), dice.choice([*state])
        renamed = {name.replace(old, new): value for name, value in state.items()}
        state = dice.choice([
            {prefix + name: value for name, value in state.items()},
            {prefix + name if dice.random() < 0.6 else name: value for name, value in state.items()},
            renamed if len(renamed) == len(state) else state,
            {**state, key: torch.randn(dice.choice(SHAPES))},
            {name: value for name, value in state.items() if name != key} or state,
            {**state, "extra.weight": torch.ones(2)},
            {name: value.clone() for name, value in state.items()},
        ])  # fmt: skip
    return state


def nested(dice: random.Random, state: State, other: State) -> Any:
    one, two, three = dice.sample(NAMES, 3)
    return dice.choice([
        state, state, {"state_dict": state, "epoch": 1}, {one: other, two: state, three: OPTIMIZER},
        [OPTIMIZER, other, state], {"agents": [other, state]}, {"a": {"b": state, "c": other}, "a/b": other},
        {"state_dict": other, "ema": state, "optimizer": OPTIMIZER}, {one: {two: state}, three: other},
    ])  # fmt: skip


def options(dice: random.Random, command: str, state: State) -> list[str]:
    key = dice.choice([*state])
    some = [key, key.split(".")[0] + "*", "*" + key.split(".")[-1], "*"]
    plans = [
        ("--include", dice.choice(some)), ("--exclude", dice.choice(some)), ("--add-prefix", "model."),
        ("--strip-prefix", dice.choice(PREFIXES)), ("--rename", "fc=linear", "--allow-unused"), ("--root", "0"),
    ]  # fmt: skip
    adapter, rule = dice.choice(["rows", "crop:fill=zero", "pos-embed", "in-chans"]), dice.choice(["zeros", "normal"])
    more = {
        "filter": [("--cast",), ("--only-matched",), ("--optimizer", "drop")],
        "load-partial": [
            ("--adapt", f"{dice.choice(some)}={adapter}"), ("--init", f"{dice.choice(some)}={rule}"),
            ("--optimizer", dice.choice(["drop", "remap"])), ("--freeze", dice.choice(["loaded", key])),
        ],
        "diff": [
            ("--ignore", dice.choice(some)), ("--strip-prefix-a", "model."), ("--strip-prefix-b", "net."), ("--values",)
        ],
    }[command]  # fmt: skip
    return [text for option in (more if command == "diff" else plans + more) if dice.random() < 0.12 for text in option]


def loaded(command: str, result: dict[str, Any]) -> int:
    """How many keys match: with a source's values, or on both sides of a comparison."""
    if command != "diff":
        return sum(result["counts"].get(reason, 0) for reason in ("loaded", "cast", "tied", "adapted"))
    differ = {row["key"] for kind in ("shape", "dtype", "values", "devices") for row in result[kind]}
    return len(differ) + int(result["equal"])


@thinned(80)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_every_hint_added_to_its_command_gives_the_number_that_it_promised(step: int, saved: Saved, run: Run) -> None:
    given = mapped = 0
    for seed in range(0, 4000, step):
        dice = random.Random(seed)
        seed_torch(seed)
        base, other = net(dice), net(dice)
        one, two = changed(dice, base), changed(dice, base)
        source, target = saved(nested(dice, one, other), "one.pth"), saved(nested(dice, two, other), "two.pth")
        command = dice.choice(["filter", "load-partial", "diff"])
        call: list[object] = {
            "filter": ["filter", source, "--match", target, "--dry-run"],
            "load-partial": ["load-partial", source, "--into", target, "--dry-run"],
            "diff": ["diff", source, target],
        }[command]
        call += [*options(dice, command, two), "--json"]
        found = json.loads(run(*call)[1])
        if "error" in found:
            continue
        notes = [note for note in found["notes"] if " would match " in note]
        for hint in notes if command == "diff" else filter(None, [found["result"].get("hint")]):
            match = re.search(r"would match (\d+) of \d+", hint)
            assert match, hint
            if hint.startswith("remap --like"):
                root = ["--root", "0"] if "--root" in call else []
                like = json.loads(
                    run("remap", source, "--like", target, "--no-values", "--dry-run", "--json", *root)[1]
                )
                assert "result" in like, (seed, hint, like)
                assert len(like["result"]["like"]["pairs"]) == int(match[1]), (seed, hint)
                mapped += 1
                continue
            added = hint.split(" would match ")[0] if command == "diff" else hint[hint.index("(--") + 1 : -1]
            after = json.loads(run(*call, *shlex.split(added))[1])
            told = (seed, shlex.join(map(str, call)), hint, after.get("error"))
            assert "result" in after, told
            assert loaded(command, after["result"]) == int(match[1]), told
            assert loaded(command, found["result"]) < int(match[1]), told
            given += 1
    assert given > 1000 / step
    assert mapped or step > 1
