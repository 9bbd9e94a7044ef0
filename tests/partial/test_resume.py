"""`--optimizer remap`: the state of what was kept goes on in a real optimizer of torch, and doubt is refused."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ckptool
from ckptool.core.checkpoint import Checkpoint
from ckptool.errors import UnsupportedError, UsageError
from ckptool.ops.notes import without_optimizers
from ckptool.partial import resume
from ckptool.partial.resume import MAX_WAYS, interleaved

Saved = Callable[..., Path]
Make = Callable[[nn.Module], torch.optim.Optimizer]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


class Net(nn.Module):
    """A backbone with a BatchNorm between two layers, and a head."""

    def __init__(self, classes: int = 3, extra: bool = False) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 5)
        self.norm = nn.BatchNorm1d(5)
        if extra:
            self.adapter = nn.Linear(5, 5)
        self.body = nn.Linear(5, 6)
        self.head = nn.Linear(6, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.stem(x))
        x = x + self.adapter(x) if hasattr(self, "adapter") else x
        answer: torch.Tensor = self.head(self.body(x))
        return answer


def adamw(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(net.parameters(), lr=0.01, weight_decay=0.02)


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    torch.manual_seed(1)
    for _ in range(steps):
        optimizer.zero_grad()
        net.train()(torch.randn(8, 4)).square().sum().backward()
        optimizer.step()


def trained(
    saved: Saved, net: nn.Module, make: Make = adamw, **beside: Any
) -> tuple[Checkpoint, torch.optim.Optimizer]:
    """A checkpoint of a net that was trained for three steps, and its live optimizer."""
    optimizer = make(net)
    train(net, optimizer)
    whole = {"model": net.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3, **beside}
    return ckptool.open(saved(whole, "source.pth")), optimizer


def opened(saved: Saved, net: nn.Module) -> Checkpoint:
    return ckptool.open(saved(net.state_dict(), "target.pth"))


def fitting(source: Checkpoint, target: Checkpoint) -> tuple[dict[str, str], dict[str, str]]:
    """The keys that both have: of the same shape, and of others."""
    old, new = source.state_dict(), target.state_dict()
    both = {key: key for key in new if key in old}
    same = {key: key for key in both if new[key].shape == old[key].shape}
    return same, {key: key for key in both if key not in same}


def resumed(source: Checkpoint, target: Checkpoint, **options: Any) -> tuple[dict[str, Any], list[str]]:
    """What torch loads from the file that comes of it, and the notes."""
    matches, renewed = fitting(source, target)
    matches = options.pop("matches", matches)
    old = source.state_dict()
    values = {key: old[matches[key]] if key in matches else own for key, own in target.state_dict().items()}
    merged = target.with_state_dict(values)
    made, notes = resume.carried(source, target, merged, matches, options.pop("renewed", renewed))
    ckptool.save(made, "out.pth", force=True, fsync=False)
    loaded: dict[str, Any] = torch.load("out.pth", weights_only=True)
    return loaded, notes


def goes_on(loaded: dict[str, Any], net: nn.Module, make: Make, before: dict[str, Any], kept: set[str]) -> None:
    """Checks that a real optimizer takes the state, that it is the old one name by name, and that it steps."""
    net.load_state_dict(loaded["state_dict"] if "state_dict" in loaded else loaded["model"])
    optimizer = make(net)
    optimizer.load_state_dict(loaded["optimizer"])
    names = {id(one): name for name, one in net.named_parameters()}
    after = {names[id(one)]: state for one, state in optimizer.state.items()}
    assert after.keys() == kept
    for name, state in after.items():
        assert state.keys() == before[name].keys()
        for field, value in state.items():
            assert torch.equal(value, before[name][field]) if torch.is_tensor(value) else value == before[name][field]
    params = {name: one.detach().clone() for name, one in net.named_parameters()}
    train(net, optimizer, 1)
    # A bias before a BatchNorm has no gradient but rounding.
    assert all(name == "stem.bias" or not torch.equal(params[name], one) for name, one in net.named_parameters())


def states(net: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer's state by name, as it is now."""
    named = net.named_parameters()
    return {name: {k: v.clone() if torch.is_tensor(v) else v for k, v in optimizer.state[one].items()}
            for name, one in named}  # fmt: skip


BODY = {"stem.weight", "stem.bias", "norm.weight", "norm.bias", "body.weight", "body.bias"}

MAKERS: dict[str, Make] = {
    "AdamW": adamw,
    "Adam": lambda net: torch.optim.Adam(net.parameters(), amsgrad=True),
    "SGD": lambda net: torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9),
    "RMSprop": lambda net: torch.optim.RMSprop(net.parameters(), momentum=0.9),
    "Adagrad": lambda net: torch.optim.Adagrad(net.parameters()),
    "Adadelta": lambda net: torch.optim.Adadelta(net.parameters()),
    "Adamax": lambda net: torch.optim.Adamax(net.parameters()),
    "NAdam": lambda net: torch.optim.NAdam(net.parameters()),
    "RAdam": lambda net: torch.optim.RAdam(net.parameters(), lr=0.01),
    "ASGD": lambda net: torch.optim.ASGD(net.parameters()),
    "Rprop": lambda net: torch.optim.Rprop(net.parameters()),
}


@pytest.mark.parametrize("kind", MAKERS)
def test_with_a_new_head_the_state_of_the_rest_goes_on(kind: str, saved: Saved) -> None:
    net = Net()
    source, optimizer = trained(saved, net, MAKERS[kind])
    fresh = Net(classes=7)
    loaded, notes = resumed(source, opened(saved, fresh))
    goes_on(loaded, fresh, MAKERS[kind], states(net, optimizer), BODY)
    assert list(loaded) == ["state_dict", "optimizer"]
    assert notes == [
        "optimizer: the state of 6 of 8 parameters is carried",
        "optimizer: starts without state: head.weight, head.bias",
        f"not taken from {source.url}: epoch",
    ]


def test_a_step_after_resuming_is_the_step_that_would_have_followed(saved: Saved) -> None:
    net = Net()
    source, optimizer = trained(saved, net)
    again = Net()
    loaded, _ = resumed(source, opened(saved, again))
    again.load_state_dict(loaded["state_dict"])
    other = adamw(again)
    other.load_state_dict(loaded["optimizer"])
    train(net, optimizer, 1)
    train(again, other, 1)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters(), strict=True))


def test_new_parameters_in_the_middle_move_the_positions_behind_them(saved: Saved) -> None:
    net = Net()
    source, optimizer = trained(saved, net)
    fresh = Net(extra=True)
    loaded, _ = resumed(source, opened(saved, fresh))
    assert list(loaded["optimizer"]["state"]) == [0, 1, 2, 3, 6, 7, 8, 9]
    goes_on(loaded, fresh, adamw, states(net, optimizer), BODY | {"head.weight", "head.bias"})


def test_parameters_that_are_gone_take_their_state_with_them(saved: Saved) -> None:
    net = Net(extra=True)
    source, optimizer = trained(saved, net)
    fresh = Net()
    loaded, notes = resumed(source, opened(saved, fresh))
    goes_on(loaded, fresh, adamw, states(net, optimizer), BODY | {"head.weight", "head.bias"})
    assert "optimizer: state dropped, no such parameter in the target: adapter.weight, adapter.bias" in notes


def test_hyper_parameters_pass_through_as_the_same_objects(saved: Saved) -> None:
    source, _ = trained(saved, Net())
    target = opened(saved, Net(classes=7))
    made, _ = resume.carried(source, target, target, *fitting(source, target))
    old, new = source.tree["optimizer"], made.tree["optimizer"]
    assert list(new) == list(old)
    (before,), (after,) = old["param_groups"], new["param_groups"]
    assert list(after) == list(before)
    assert all(after[name] is value for name, value in before.items() if name != "params")
    assert after["params"] == list(range(8))
    assert new["state"][0] is old["state"][0]


def test_weights_of_the_same_name_that_were_not_loaded_get_no_state(saved: Saved) -> None:
    net = Net()
    source, optimizer = trained(saved, net)
    fresh = Net()
    matches = {key: key for key in source.state_dict() if not key.startswith("head")}
    loaded, _ = resumed(source, opened(saved, fresh), matches=matches)
    goes_on(loaded, fresh, adamw, states(net, optimizer), BODY)


def test_an_adapted_parameter_has_another_shape_and_gets_no_state(saved: Saved) -> None:
    source, _ = trained(saved, Net())
    target = opened(saved, Net(classes=7))
    made, notes = resume.carried(source, target, target, {key: key for key in target.state_dict()})
    assert list(made.tree["optimizer"]["state"]) == [0, 1, 2, 3, 4, 5]
    assert "optimizer: starts without state: head.weight, head.bias" in notes


def test_renamed_and_wrapped_keys_carry_their_state(saved: Saved) -> None:
    net = Net()
    source, _ = trained(saved, net)
    wrapped = nn.Module()
    wrapped.add_module("module", Net())
    target = opened(saved, wrapped)
    matches = {key: key.removeprefix("module.") for key in target.state_dict()}
    made, _ = resume.carried(source, target, target, matches)
    assert made.tree["optimizer"]["state"] == source.tree["optimizer"]["state"]


@pytest.mark.parametrize("key", ["a.weight", "stem.weight"])
def test_what_rules_transposed_gets_no_state_square_or_not(key: str, saved: Saved) -> None:
    net: nn.Module = Same() if key == "a.weight" else Net()
    source, _ = trained(saved, net)
    turned, _ = ckptool.remap(source, [{"transpose": key}])
    made, notes = resume.carried(turned, turned, turned, {name: name for name in turned.state_dict()})
    assert 0 not in made.tree["optimizer"]["state"]
    assert f"optimizer: starts without state: {key}" in notes


# --- several groups ----------------------------------------------------------------------------------------------


def by_layer(net: nn.Module) -> torch.optim.Optimizer:
    head = [one for name, one in net.named_parameters() if name.startswith("head")]
    rest = [one for name, one in net.named_parameters() if not name.startswith("head")]
    return torch.optim.AdamW([{"params": rest, "lr": 0.001}, {"params": head}], lr=0.01)


def by_decay(net: nn.Module) -> torch.optim.Optimizer:
    plain = [one for one in net.parameters() if one.ndim > 1]
    bare = [one for one in net.parameters() if one.ndim < 2]
    return torch.optim.SGD(
        [{"params": plain, "weight_decay": 0.1}, {"params": bare, "weight_decay": 0.0}], lr=0.01, momentum=0.9
    )


@pytest.mark.parametrize("make", [by_layer, by_decay])
def test_parameters_stay_in_their_groups_and_a_head_of_another_size_in_its_own(make: Make, saved: Saved) -> None:
    net = Net()
    source, optimizer = trained(saved, net, make)
    fresh = Net(classes=7)
    loaded, _ = resumed(source, opened(saved, fresh))
    goes_on(loaded, fresh, make, states(net, optimizer), BODY)
    before = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    assert [
        {k: v for k, v in group.items() if k != "params"} for group in loaded["optimizer"]["param_groups"]
    ] == before


def test_with_several_groups_new_parameters_have_no_place_and_are_named(saved: Saved) -> None:
    source, _ = trained(saved, Net(), by_layer)
    with pytest.raises(UsageError, match=r"2 groups they could join: adapter.weight, adapter.bias.*add_param_group"):
        resumed(source, opened(saved, Net(extra=True)))


def test_a_group_with_nothing_left_stays_and_is_said(saved: Saved) -> None:
    source, _ = trained(saved, Net(), by_layer)
    fresh = Net()
    fresh.head = nn.Identity()  # type: ignore[assignment]
    loaded, notes = resumed(source, opened(saved, fresh))
    assert [group["params"] for group in loaded["optimizer"]["param_groups"]] == [[0, 1, 2, 3, 4, 5], []]
    assert "optimizer: group 1 has no parameter left" in notes


class Same(nn.Module):
    """Two layers of one shape: by position nobody can say whose group is which."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        answer: torch.Tensor = self.b(self.a(x))
        return answer


def apart(net: nn.Module) -> torch.optim.Optimizer:
    named = list(net.named_parameters())
    late = [pair for pair in named if pair[0].startswith("b.")]
    early = [pair for pair in named if not pair[0].startswith("b.")]
    return torch.optim.AdamW([{"params": late}, {"params": early, "lr": 0.1}], lr=0.01)


def test_groups_that_shapes_do_not_tell_apart_are_refused_and_names_tell_them(saved: Saved) -> None:
    net = Same()

    def unnamed(net: nn.Module) -> torch.optim.Optimizer:
        groups = [{"params": list(net.b.parameters())}, {"params": list(net.a.parameters()), "lr": 0.1}]  # type: ignore
        return torch.optim.AdamW(groups, lr=0.01)

    source, _ = trained(saved, net, unnamed)
    with pytest.raises(UsageError, match=r"2 groups of parameters by position, and shapes do not tell.*named_parame"):
        resumed(source, opened(saved, Same()))
    source, optimizer = trained(saved, net, apart)
    fresh = Same()
    loaded, _ = resumed(source, opened(saved, fresh))
    assert [group["param_names"] for group in loaded["optimizer"]["param_groups"]] == [
        ["b.weight", "b.bias"], ["a.weight", "a.bias"],
    ]  # fmt: skip
    goes_on(loaded, fresh, apart, states(net, optimizer), {"a.weight", "a.bias", "b.weight", "b.bias"})


def test_interleaving_finds_the_one_way_and_only_if_there_is_one() -> None:
    for shapes in (["w", "b", "n", "w", "b"], ["w", "b", "w", "b"], ["x", "y", "z"], ["w", "w", "b"]):
        whole = [(ord(one),) for one in shapes]
        for chosen in itertools.product((0, 1), repeat=len(whole)):
            groups = [[shape for shape, at in zip(whole, chosen, strict=True) if at == number] for number in (0, 1)]
            ways = [
                picks for picks in itertools.product((0, 1), repeat=len(whole))
                if [[s for s, at in zip(whole, picks, strict=True) if at == n] for n in (0, 1)] == groups
            ]  # fmt: skip
            expected = [at for n in (0, 1) for at, pick in enumerate(ways[0]) if pick == n] if len(ways) == 1 else None
            assert interleaved(groups, whole) == expected
    assert interleaved([[None], [(2,)]], [(1,), (2,)]) == [0, 1]
    assert interleaved([[None], [None]], [(1,), (2,)]) is None
    assert interleaved([[(1,)], [(3,)]], [(1,), (2,)]) is None
    many: Sequence[Any] = [[None] * 200] * 4
    assert MAX_WAYS < 200**3
    assert interleaved(many, [(1,)] * 800) is None


# --- ties --------------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 4, bias=False)
        self.body = nn.Linear(4, 4)
        self.out = nn.Linear(4, 4, bias=False)
        if tied:
            self.out.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        answer: torch.Tensor = self.out(self.body(self.embed(x)))
        return answer


def test_tied_weights_have_one_place(saved: Saved) -> None:
    net, fresh = Tied(), Tied()
    source, optimizer = trained(saved, net)
    loaded, _ = resumed(source, opened(saved, fresh))
    assert loaded["optimizer"]["param_groups"][0]["params"] == [0, 1, 2]
    goes_on(loaded, fresh, adamw, states(net, optimizer), {"embed.weight", "body.weight", "body.bias"})


def test_weights_tied_no_more_get_a_state_each_in_memory_of_its_own(saved: Saved) -> None:
    net, fresh = Tied(), Tied(tied=False)
    source, optimizer = trained(saved, net)
    loaded, _ = resumed(source, opened(saved, fresh))
    before = states(net, optimizer)
    before["out.weight"] = before["embed.weight"]
    state = loaded["optimizer"]["state"]
    assert state[0]["exp_avg"].data_ptr() != state[3]["exp_avg"].data_ptr()
    goes_on(loaded, fresh, adamw, before, {"embed.weight", "body.weight", "body.bias", "out.weight"})


def test_weights_tied_since_take_the_state_of_the_first_name(saved: Saved) -> None:
    net, fresh = Tied(tied=False), Tied()
    source, optimizer = trained(saved, net)
    loaded, notes = resumed(source, opened(saved, fresh))
    goes_on(loaded, fresh, adamw, states(net, optimizer), {"embed.weight", "body.weight", "body.bias"})
    assert "optimizer: state dropped, no such parameter in the target: out.weight" in notes


# --- which parameters an optimizer has ---------------------------------------------------------------------------


def without_stem(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([one for name, one in net.named_parameters() if not name.startswith("stem")])


def test_an_optimizer_of_a_part_is_refused_with_both_counts(saved: Saved) -> None:
    source, _ = trained(saved, Net(), without_stem)
    with pytest.raises(
        UsageError, match=r"optimizer: a state of 6 parameters by position, and the weights have 8.*drop"
    ):
        resumed(source, opened(saved, Net()))


def test_an_optimizer_of_a_part_with_names_stays_one_of_that_part(saved: Saved) -> None:
    def make(net: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW([pair for pair in net.named_parameters() if not pair[0].startswith("stem")])

    net, fresh = Net(), Net(classes=7, extra=True)
    source, optimizer = trained(saved, net, make)
    loaded, notes = resumed(source, opened(saved, fresh))
    assert loaded["optimizer"]["param_groups"][0]["param_names"] == [
        "norm.weight", "norm.bias", "adapter.weight", "adapter.bias", "body.weight", "body.bias",
        "head.weight", "head.bias",
    ]  # fmt: skip
    assert "optimizer: not in the source's optimizer, so not in this one: stem.weight, stem.bias" in notes
    fresh.load_state_dict(loaded["state_dict"])
    after = make(fresh)
    after.load_state_dict(loaded["optimizer"])
    names = {id(one): name for name, one in fresh.named_parameters()}
    assert {names[id(one)] for one in after.state} == BODY - {"stem.weight", "stem.bias"}
    for one, state in after.state.items():
        assert torch.equal(state["exp_avg"], states(net, optimizer)[names[id(one)]]["exp_avg"])


def test_parameters_in_another_order_are_found_out_by_their_shapes(saved: Saved) -> None:
    def backwards(net: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(list(net.parameters())[::-1])

    source, _ = trained(saved, Net(), backwards)
    with pytest.raises(UsageError, match=r"the state of stem.weight would be \[3\], and the parameter is \[5, 4\]"):
        resumed(source, opened(saved, Net()))


def test_parameters_in_an_order_of_their_own_keep_it_if_names_tell_and_nothing_is_new(saved: Saved) -> None:
    def backwards(net: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(list(net.named_parameters())[::-1])

    net, fresh = Net(), Net(classes=7)
    source, optimizer = trained(saved, net, backwards)
    loaded, _ = resumed(source, opened(saved, fresh))
    goes_on(loaded, fresh, backwards, states(net, optimizer), BODY)
    with pytest.raises(UsageError, match="in a custom order"):
        resumed(source, opened(saved, Net(extra=True)))


def test_states_by_name_need_no_counting(saved: Saved) -> None:
    net = Net()
    optimizer = without_stem(net)
    train(net, optimizer)
    names = [name for name, _ in net.named_parameters() if not name.startswith("stem")]
    found = optimizer.state_dict()
    found["state"] = {names[at]: state for at, state in found["state"].items()}
    found["param_groups"][0]["params"] = names
    source = ckptool.open(saved({"model": net.state_dict(), "optimizer": found}))
    target = opened(saved, Net(classes=7, extra=True))
    whole, _ = resume.carried(source, target, target, *fitting(source, target))
    made = whole.tree["optimizer"]
    assert made["param_groups"][0]["params"] == [
        "norm.weight", "norm.bias", "adapter.weight", "adapter.bias", "body.weight", "body.bias",
        "head.weight", "head.bias",
    ]  # fmt: skip
    assert list(made["state"]) == ["norm.weight", "norm.bias", "body.weight", "body.bias"]
    assert all(made["state"][name] is source.tree["optimizer"]["state"][name] for name in made["state"])


def test_a_target_sorted_by_name_is_refused_for_positions(saved: Saved) -> None:
    source, _ = trained(saved, Net())
    ordered = OrderedDict(sorted(Net().state_dict().items()))
    with pytest.raises(UsageError, match="the target's keys are in alphabetical order"):
        resumed(source, ckptool.open(saved(ordered, "sorted.pth")))


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ({"param_groups": []}, "not the state of an optimizer"),
        ({"param_groups": {"params": [0]}}, "not the state of an optimizer"),
        ({"param_groups": [{"params": 3}]}, "not the state of an optimizer"),
        ({"state": [1]}, "not the state of an optimizer"),
        ({"param_groups": [{"params": [0, "a", 2, 3, 4, 5, 6, 7]}]}, "neither by position nor by name"),
        ({"param_groups": [{"params": [[0]]}]}, "neither by position nor by name"),
        ({"param_groups": [{"params": [0], "history_size": 9, "line_search_fn": None}]}, "LBFGS keeps one state"),
        ({"param_groups": [{"params": [0], "param_names": ["x"]}]}, "of other parameters than the weights: x"),
    ],
)
def test_what_is_no_optimizer_of_these_weights_is_refused(broken: dict[str, Any], said: str, saved: Saved) -> None:
    net = Net()
    state = {**adamw(net).state_dict(), **broken}
    source = ckptool.open(saved({"model": net.state_dict(), "optimizer": state}))
    with pytest.raises(UsageError, match=said):
        resumed(source, opened(saved, Net()))


def test_without_an_optimizer_there_is_nothing_to_carry(saved: Saved) -> None:
    source = ckptool.open(saved({"model": Net().state_dict(), "epoch": 3}))
    with pytest.raises(UsageError, match="no optimizer state in it"):
        resumed(source, opened(saved, Net()))


# --- where it is put ---------------------------------------------------------------------------------------------


def test_a_nested_target_gets_it_beside_its_weights_and_keeps_the_rest(saved: Saved) -> None:
    net = Net()
    source, optimizer = trained(saved, net, scheduler={"last_epoch": 3})
    fresh = Net(classes=7)
    whole = {"epoch": 0, "model": fresh.state_dict(), "optimizer": adamw(fresh).state_dict(), "optim": None}
    loaded, notes = resumed(source, ckptool.open(saved(whole, "target.pth")))
    assert list(loaded) == ["epoch", "model", "optimizer", "optim"]
    assert loaded["epoch"] == 0
    goes_on(loaded, fresh, adamw, states(net, optimizer), BODY)
    assert notes[-1] == f"not taken from {source.url}: epoch, scheduler"


def test_an_optimizer_of_the_target_under_another_name_is_said_to_stay(saved: Saved) -> None:
    source, _ = trained(saved, Net())
    fresh = Net()
    target = ckptool.open(saved({"model": fresh.state_dict(), "optim": adamw(fresh).state_dict()}, "target.pth"))
    loaded, notes = resumed(source, target)
    assert list(loaded) == ["model", "optim", "optimizer"]
    assert notes[-1] == f"unchanged from {target.url}: optim"


def test_lists_and_deeper_places_are_kept(saved: Saved) -> None:
    net = Net()
    optimizer = adamw(net)
    train(net, optimizer)
    state = optimizer.state_dict()
    lightning = {"state_dict": net.state_dict(), "optimizer_states": [state], "global_step": 3}
    deep = {"run": {"model": net.state_dict(), "training": {"optim": state, "lr": 0.1}}, "version": 1}
    target = opened(saved, Net(classes=7))
    for whole, path in ((lightning, ("optimizer_states", 0)), (deep, ("training", "optim"))):
        source = ckptool.open(saved(whole, "source.pth"))
        made, _ = resume.carried(source, target, target, *fitting(source, target))
        assert list(made.tree) == ["state_dict", path[0]]
        assert made.root == ("state_dict",)
        assert made.state_dict() == target.state_dict()
        assert made.at(path)["state"][0] is source.at((*source.root[:-1], *path))["state"][0]
    assert resume.left_behind(ckptool.open(saved(lightning))) == [
        f"not taken from {saved(lightning)}: optimizer_states, global_step"
    ]
    assert resume.left_behind(target) == []


def test_two_optimizers_of_one_model_are_carried_by_name_but_take_nothing_new(saved: Saved) -> None:
    def make(net: nn.Module) -> list[torch.optim.Optimizer]:
        named = list(net.named_parameters())
        return [torch.optim.SGD(named[:4], lr=0.1, momentum=0.9), torch.optim.AdamW(named[4:])]

    net, fresh = Net(), Net(classes=7)
    optimizers = make(net)
    for optimizer in optimizers:
        train(net, optimizer)
    whole = {"state_dict": net.state_dict(), "optimizers": [one.state_dict() for one in optimizers]}
    source = ckptool.open(saved(whole, "source.pth"))
    loaded, _ = resumed(source, opened(saved, fresh))
    for optimizer, state, count in zip(make(fresh), loaded["optimizers"], (4, 2), strict=True):
        optimizer.load_state_dict(state)
        assert len(optimizer.state) == count
        train(fresh, optimizer, 1)
    with pytest.raises(UsageError, match="2 optimizers they could join"):
        resumed(source, opened(saved, Net(extra=True)))


def test_weights_in_a_list_have_no_beside(saved: Saved) -> None:
    source, _ = trained(saved, Net())
    target = ckptool.open(saved([Net().state_dict()], "target.pth"), root=(0,))
    with pytest.raises(UnsupportedError, match="cannot add optimizer beside the weights at 0"):
        resumed(source, target)


# --- leaving it out ----------------------------------------------------------------------------------------------


def test_dropping_takes_out_every_optimizer_and_nothing_else(saved: Saved) -> None:
    net = Net()
    state = adamw(net).state_dict()
    whole = {
        "model": net.state_dict(), "optimizer": state, "epoch": 3, "states": [state, {"lr": 1}, state],
        "gan": OrderedDict(d=state, keep=torch.ones(2)),
    }  # fmt: skip
    source = ckptool.open(saved(whole))
    made, paths = without_optimizers(source)
    assert paths == [("optimizer",), ("states", 0), ("states", 2), ("gan", "d")]
    ckptool.save(made, "out.pth", fsync=False)
    loaded = torch.load("out.pth", weights_only=True)
    assert list(loaded) == ["model", "epoch", "states", "gan"]
    assert (loaded["epoch"], loaded["states"], list(loaded["gan"])) == (3, [{"lr": 1}], ["keep"])
    assert isinstance(loaded["gan"], OrderedDict)
    assert all(torch.equal(value, loaded["model"][key]) for key, value in net.state_dict().items())


def test_dropping_from_a_list_that_holds_the_weights_moves_nothing(saved: Saved) -> None:
    net = Net()
    source = ckptool.open(saved([adamw(net).state_dict(), net.state_dict()]), root=(1,))
    made, paths = without_optimizers(source)
    assert paths == [(0,)]
    assert made.tree[0] is None
    assert made.state_dict() == source.state_dict()


def test_dropping_where_there_is_none_changes_nothing(saved: Saved) -> None:
    source = opened(saved, Net())
    made, paths = without_optimizers(source)
    assert (made.tree, paths) == (source.tree, [])
