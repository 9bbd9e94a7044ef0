"""``diff --fail-on loadability``: would `load_state_dict(strict=True)` of A's model accept B? The oracle is torch."""

from __future__ import annotations

import json
import random
import re
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import Run, Saved, thinned
from safetensors.torch import save_file
from torch import nn

import ckptool


class Noted(nn.Module):
    """A module with a scalar, a buffer that is not saved, and an extra state."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.one = nn.Parameter(torch.ones(1))
        self.register_buffer("passing", torch.ones(3), persistent=False)

    def get_extra_state(self) -> Any:
        return {"steps": 3}

    def set_extra_state(self, state: Any) -> None:
        pass


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm1d(4, affine=False))
        self.norm = nn.InstanceNorm1d(4, track_running_stats=True)
        self.untracked = nn.BatchNorm1d(4, track_running_stats=False)
        self.noted = Noted()
        self.embed = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight
        self.double = nn.Linear(2, 2).double()


State = OrderedDict[str, Any]


def refused(model: nn.Module, path: Path) -> set[str]:
    """Returns the keys for which torch refuses to load a file strictly."""
    try:
        model.load_state_dict(torch.load(path, weights_only=False), strict=True)
    except RuntimeError as error:
        return {one or other for one, other in re.findall(r'"([^"]+)"|size mismatch for (\S+):', str(error))}
    return set()


def kept(state: State, keys: Any) -> State:
    made = OrderedDict((key, state[key]) for key in keys)
    if hasattr(state, "_metadata"):
        made._metadata = state._metadata
    return made


def key_of(rng: random.Random, state: State, part: str = "") -> str:
    return rng.choice([key for key in state if part in key and isinstance(state[key], torch.Tensor)] or [*state])


def dropped(rng: random.Random, state: State) -> State:
    gone = key_of(rng, state)
    return kept(state, [key for key in state if key != gone])


def added(rng: random.Random, state: State) -> State:
    key = rng.choice(["body.0.scale", "body", "more.weight", "untracked.running_mean", "head._extra_state", "body.2.x"])
    state[key] = torch.ones(2)
    return state


def recast(rng: random.Random, state: State) -> State:
    key = key_of(rng, state)
    state[key] = state[key].to(rng.choice([torch.float16, torch.int32, torch.complex64, torch.bool]))
    return state


def reshaped(rng: random.Random, state: State) -> State:
    key = rng.choice([key_of(rng, state), "noted.scale", "noted.one", "body.1.num_batches_tracked"])
    shape = rng.choice([(), (1,), (1, 1), (2,), (4, 3, 1, 1), (0,)])
    state[key] = torch.zeros(shape)
    return state


def without_counters(rng: random.Random, state: State) -> State:
    part = rng.choice(["body.1.", "body.3", "norm.", ""])
    return kept(state, [key for key in state if not (key.startswith(part) and key.endswith("num_batches_tracked"))])


def without_extra(rng: random.Random, state: State) -> State:
    return kept(state, [key for key in state if not key.endswith("_extra_state")])


def older(rng: random.Random, state: State) -> State:
    path = rng.choice(["body.1", "body.3", "norm"])
    entries = {**getattr(state, "_metadata", {})}
    entries[path] = rng.choice([{}, {"version": 1}, {"version": 2}, {"version": 3}, {"version": None}])
    state._metadata = OrderedDict(entries)
    return state


def bare(rng: random.Random, state: State) -> State:
    return OrderedDict(state)


def wrapped(rng: random.Random, state: State) -> State:
    part = rng.choice(["", "body."])
    return OrderedDict((f"module.{key}" if key.startswith(part) else key, value) for key, value in state.items())


def no_tensor(rng: random.Random, state: State) -> State:
    state[key_of(rng, state)] = rng.choice([3, None, "text", [1.0]])
    return state


def other_layout(rng: random.Random, state: State) -> State:
    key = key_of(rng, state)
    state[key] = rng.choice([state[key].float().to_sparse(), torch.empty_like(state[key], device="meta")])
    return state


MUTATIONS: list[Callable[[random.Random, State], State]] = [
    dropped, added, recast, reshaped, without_counters, without_extra, older, bare, wrapped, no_tensor, other_layout,
]  # fmt: skip


@thinned(3)
@pytest.mark.parametrize("first", MUTATIONS, ids=[one.__name__ for one in MUTATIONS])
def test_it_refuses_the_keys_that_torch_refuses(first: Any, step: int, saved: Saved) -> None:
    rng, model = random.Random(first.__name__), Net()
    a = ckptool.open(saved(model.state_dict(), "a.pth"))
    for _ in range(25 // step):
        state = model.state_dict()
        for change in (first, *rng.sample(MUTATIONS, rng.choice([0, 1, 1, 2]))):
            state = change(rng, state)
        b = saved(state, "b.pth")
        report = ckptool.diff(a, b, fail_on=["loadability"])
        assert {row.key for row in report.loadability} == refused(model, b), [*report.loadability]
        assert report.fails == ["loadability"] * bool(report.loadability)


def test_a_wrapped_file_is_the_same_and_would_not_load(run: Run, saved: Saved) -> None:
    state = {"fc.weight": torch.ones(2, 3), "fc.bias": torch.ones(2)}
    paths = saved(state, "a.pth"), saved({f"module.{key}": value for key, value in state.items()}, "b.pth")
    assert run("diff", *paths)[0] == 0
    code, out, _ = run("diff", *paths, "--fail-on", "loadability")
    assert (code, "load_state_dict(strict=True) of A's model would refuse 4 keys of B" in out) == (1, True)
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert {"loadability fc.bias missing in B", "loadability module.fc.bias unexpected: A lacks it"} <= {*lines}
    assert run("diff", *paths, "--fail-on", "loadability", "--strip-prefix-b", "module.")[0] == 0
    result = json.loads(run("diff", *paths, "--fail-on", "loadability", "--json")[1])["result"]
    assert result["loadability"][0] == {"key": "fc.weight", "why": "missing in B"}
    code, out, _ = run("diff", *paths, "--fail-on", "loadability", "--format", "github")
    assert (code, "ckptool diff%3A loadability::" in out) == (1, True)


def test_ignored_keys_are_not_judged_and_other_values_do_not_matter(run: Run, saved: Saved) -> None:
    a, b = saved({"w": torch.ones(2), "v": torch.ones(3)}, "a.pth"), saved({"w": torch.zeros(2).half()}, "b.pth")
    assert run("diff", a, b, "--fail-on", "loadability", "--ignore", "v")[0] == 0
    assert run("diff", a, b, "--fail-on", "loadability")[0] == 1
    assert run("diff", b, a, "--fail-on", "dtype,loadability", "--ignore", "v")[0] == 1


def test_safetensors_have_neither_extra_state_nor_versions(saved: Saved) -> None:
    a = saved(Net().state_dict(), "a.pth")
    tensors = {key: value.clone() for key, value in Net().state_dict().items() if isinstance(value, torch.Tensor)}
    save_file({key: value for key, value in tensors.items() if "num_batches" not in key}, "b.safetensors")
    report = ckptool.diff(a, "b.safetensors", fail_on=["loadability"])
    assert [row.key for row in report.loadability] == ["noted._extra_state"]


def test_a_lock_file_which_lists_tensors_only_is_not_blamed_for_the_rest(run: Run, saved: Saved) -> None:
    path = saved(Net().state_dict(), "a.pth")
    assert run("inspect", path, "--lock", "a.lock")[0] == 0
    for sides in ((path, "a.lock"), ("a.lock", path)):
        assert run("diff", *sides, "--fail-on", "loadability")[0] == 0
