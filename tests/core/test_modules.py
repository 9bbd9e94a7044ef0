"""A pickled model's keys, against the live model's own state_dict()."""

from __future__ import annotations

import copy
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import FIXTURES, assert_same_tensors
from torch import nn

from ckptool import limits, save
from ckptool import open as open_checkpoint
from ckptool.core import modules
from ckptool.core.tree import Global, as_mapping, ordered_dict
from ckptool.errors import LimitError

Saved = Callable[..., Path]


class Odd(nn.Module):
    """Registers everything in an order that state_dict does not keep."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("first", torch.arange(3))
        self.late = nn.Linear(2, 2)
        self.register_parameter("none", None)
        self.register_buffer("hidden", torch.ones(4), persistent=False)
        self.register_buffer("empty", None)
        self.scale = nn.Parameter(torch.randn(2))
        self.frozen = nn.Parameter(torch.randn(2), requires_grad=False)
        self.loose = torch.ones(5)
        self.gone = nn.Linear(1, 1)
        self.gone = None
        self.items = nn.ParameterList([torch.randn(1), torch.randn(2)])
        self.named = nn.ParameterDict({"b": torch.randn(1), "a": torch.randn(2)})


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(5, 3)
        self.body = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
        self.again = self.body
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.emb.weight


def models() -> dict[str, Callable[[], nn.Module]]:
    return {
        "linear": lambda: nn.Linear(2, 3),
        "odd": Odd,
        "tied": Two,
        "data_parallel": lambda: nn.DataParallel(Odd()),
        "lstm": lambda: nn.LSTM(3, 4, num_layers=2, bidirectional=True),
        "transformer": lambda: nn.TransformerEncoderLayer(8, 2, 16),
        "attention": lambda: nn.MultiheadAttention(6, 2, kdim=3, vdim=3),
        "norms": lambda: nn.Sequential(nn.BatchNorm2d(2), nn.BatchNorm1d(2, track_running_stats=False),
                                       nn.BatchNorm3d(2, affine=False), nn.GroupNorm(1, 2), nn.InstanceNorm1d(2)),
        "module_dict": lambda: nn.ModuleDict({"z": nn.Linear(1, 1), "a": nn.ModuleList([nn.Conv1d(1, 1, 1)])}),
        "weight_norm": lambda: torch.nn.utils.weight_norm(nn.Linear(3, 2)),
        "no_tensors": lambda: nn.Sequential(nn.ReLU(), nn.Dropout()),
    }  # fmt: skip


@pytest.fixture(autouse=True)
def classes_are_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The classes are pickled as members of a module; ckptool must not import even that."""
    vanishing = types.ModuleType("vanishing")
    monkeypatch.setitem(sys.modules, "vanishing", vanishing)
    for kind in (Odd, Two):
        monkeypatch.setattr(kind, "__module__", "vanishing")
        setattr(vanishing, kind.__name__, kind)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", models())
def test_keys_order_and_values_are_those_of_the_live_model(name: str, saved: Saved) -> None:
    torch.manual_seed(1)
    model = models()[name]()
    expected = dict(model.state_dict(keep_vars=True))
    opened = open_checkpoint(saved(model))
    assert list(opened.state_dict()) == list(expected)
    assert_same_tensors(opened, expected)
    assert {tuple(sorted(group)) for group in opened.shared()} == {
        tuple(sorted(key for key in expected if expected[key] is tensor))
        for tensor in expected.values()
        if sum(other is tensor for other in expected.values()) > 1
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name in models() if name != "no_tensors"])
def test_written_as_a_state_dict_it_loads_strictly_into_a_new_model(name: str, saved: Saved, tmp_path: Path) -> None:
    torch.manual_seed(2)
    model = models()[name]()
    expected = model.state_dict()
    opened = open_checkpoint(saved(model))
    save(opened.with_state_dict(opened.state_dict()), tmp_path / "out.pth")
    written = torch.load(tmp_path / "out.pth", weights_only=True)
    assert list(written) == list(expected)
    assert written._metadata == expected._metadata
    fresh = models()[name]()
    fresh.load_state_dict(written, strict=True)
    for key, tensor in fresh.state_dict().items():
        assert torch.equal(tensor, expected[key]), key


def test_a_model_pickled_in_a_dict_or_legacy_stream_is_found_too(saved: Saved) -> None:
    model = Odd()
    expected = dict(model.state_dict(keep_vars=True))
    inside = open_checkpoint(saved({"epoch": 3, "model": model, "ema": None}, "in.pt"))
    assert inside.root == ("model",)
    assert_same_tensors(inside, expected)


def test_parameters_keep_their_flags(saved: Saved) -> None:
    found = open_checkpoint(saved(Odd())).state_dict()
    assert (found["scale"].is_parameter, found["scale"].requires_grad) == (True, True)
    assert (found["frozen"].is_parameter, found["frozen"].requires_grad) == (True, False)
    assert (found["first"].is_parameter, found["first"].requires_grad) == (False, False)


def test_the_model_itself_is_rewritten_with_all_that_is_not_in_its_state_dict(saved: Saved, tmp_path: Path) -> None:
    model = Odd()
    save(open_checkpoint(saved(model)), tmp_path / "out.pt")
    again = torch.load(tmp_path / "out.pt", weights_only=False)
    assert type(again) is Odd
    assert torch.equal(again.hidden, model.hidden)
    assert torch.equal(again.loose, model.loose)
    assert again._non_persistent_buffers_set == {"hidden"}
    assert torch.equal(again.late(torch.ones(1, 2)), model.late(torch.ones(1, 2)))


def test_other_tensors_of_a_model_are_no_keys() -> None:
    opened = open_checkpoint(FIXTURES / "resnet_module.pth")
    assert "grid" not in opened.state_dict()
    assert "loose" not in opened.state_dict()
    inside = {path[-1] for path, node in opened.leaves()}
    assert "training" in inside


def test_modules_of_torch_before_2_0_and_before_1_1_are_understood(saved: Saved) -> None:
    # 1.x has OrderedDicts in the slots, 1.0 lacks _non_persistent_buffers_set.
    opened = open_checkpoint(saved(Odd()))
    module = opened.tree
    old = copy.copy(module.state)
    for slot in ("_parameters", "_buffers", "_modules"):
        old[slot] = ordered_dict(dict(as_mapping(old[slot]) or {}))
    module.state.update(old)
    assert "hidden" not in modules.state_dict(module)
    del module.state["_non_persistent_buffers_set"]
    keys = [key for key in Odd().state_dict() if key != "hidden"]
    assert [key for key in modules.state_dict(module) if key != "hidden"] == keys
    assert "hidden" in modules.state_dict(module)


def test_a_compiled_model_has_its_prefix() -> None:
    # torch.compile's own pickle drags in a compiler: its shape is made by hand.
    inner = open_checkpoint(FIXTURES / "resnet_module.pth").tree
    outer = Global.named("torch._dynamo.eval_frame", "OptimizedModule")(inner, None)
    assert modules.is_module(outer)
    assert list(modules.state_dict(outer)) == [f"_orig_mod.{key}" for key in modules.state_dict(inner)]


def test_a_module_that_contains_itself_is_stopped() -> None:
    loop: Any = Global.named("m", "Loop")()
    loop.state = {"_parameters": {}, "_buffers": {}, "_modules": {"again": loop}}
    with pytest.raises(LimitError):
        modules.state_dict(loop)


def test_a_bomb_of_shared_modules_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits.MAX_MODULES, "figure", 5_000)
    node: Any = Global.named("m", "Leaf")()
    node.state = {"_parameters": {}, "_modules": {}}
    for _ in range(40):
        outer: Any = Global.named("m", "Node")()
        outer.state = {"_parameters": {}, "_modules": {"a": node, "b": node}}
        node = outer
    with pytest.raises(LimitError, match="MAX_MODULES"):
        modules.state_dict(node)


def test_hooks_that_may_change_a_state_dict_are_named(saved: Saved) -> None:
    model = nn.Sequential(nn.Linear(1, 1), Odd())
    assert modules.state_dict_hooks(open_checkpoint(saved(model)).tree) == []
    opened = open_checkpoint(saved(model))
    child = (as_mapping(opened.tree.state["_modules"]) or {})["1"]
    child.state["_state_dict_hooks"] = {7: Global.named("m", "hook")}
    assert modules.state_dict_hooks(opened.tree) == ["1"]


def test_a_class_with_a_name_of_a_module_and_no_slots_is_none() -> None:
    fake: Any = Global.named("torch.nn.modules.linear", "Linear")()
    fake.state = {"weight": 1}
    assert not modules.is_module(fake)
    assert not modules.is_module({"_parameters": {}, "_modules": {}})


def test_every_class_of_torch_nn_has_the_version_that_torch_gives_it() -> None:
    for name, kind in vars(nn).items():
        if isinstance(kind, type) and issubclass(kind, nn.Module):
            node: Any = Global.named(kind.__module__, name)()
            node.state = {"_parameters": {}, "_modules": {}}
            versions = as_mapping(modules.metadata(node)) or {}
            assert versions[""] == {"version": kind._version}, name
