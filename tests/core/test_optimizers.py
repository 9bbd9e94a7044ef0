from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ckptool
from ckptool.core.optimizers import describe

Saved = Callable[..., Path]

KINDS = [
    "SGD", "Adam", "AdamW", "RMSprop", "NAdam", "Adamax", "Adadelta", "Adagrad", "ASGD", "Rprop", "LBFGS",
    "Adafactor", "Muon", "RAdam", "SparseAdam",
]  # fmt: skip


def made(kind: str, **options: Any) -> torch.optim.Optimizer:
    parameters = [nn.Parameter(torch.ones(2, 3)) for _ in range(3)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(torch.optim, kind)(parameters, lr=0.1, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_every_optimizer_of_torch_is_known_by_its_saved_state(kind: str) -> None:
    assert describe(made(kind).state_dict()) == (kind, 3)


def test_no_optimizer_of_torch_is_left_out_of_these_tests() -> None:
    classes = {
        name for name, value in vars(torch.optim).items()
        if isinstance(value, type) and issubclass(value, torch.optim.Optimizer) and value is not torch.optim.Optimizer
    }  # fmt: skip
    assert classes == set(KINDS)


@pytest.mark.parametrize(
    ("kind", "options"),
    [("SGD", {"momentum": 0.9}), ("Adam", {"amsgrad": True}), ("Adam", {"weight_decay": 0.01}),
     ("AdamW", {"weight_decay": 0.0}), ("RMSprop", {"centered": True, "momentum": 0.5})],
)  # fmt: skip
def test_options_do_not_change_what_an_optimizer_is(kind: str, options: dict[str, Any]) -> None:
    assert describe(made(kind, **options).state_dict())[0] == kind


def test_the_parameters_of_all_groups_are_counted() -> None:
    one, two, three = (nn.Parameter(torch.ones(1)) for _ in range(3))
    optimizer = torch.optim.SGD([{"params": [one, two]}, {"params": [three], "lr": 0.01}], lr=0.1)
    assert describe(optimizer.state_dict()) == ("SGD", 3)


def test_an_unknown_or_broken_optimizer_state_is_called_an_optimizer() -> None:
    assert describe({"state": {}, "param_groups": [{"params": [0, 1], "magic": 1}]}) == ("an optimizer", 2)
    assert describe({"state": {}, "param_groups": []}) == ("an optimizer", 0)
    assert describe({"state": {}, "param_groups": "none"}) == ("an optimizer", 0)
    assert describe({"state": {}, "param_groups": [{"params": None}, 3]}) == ("an optimizer", 0)


def test_before_torch_said_decoupled_only_the_default_decay_hints_at_adamw() -> None:
    group = {"params": [0], "lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01, "amsgrad": False}
    assert describe({"state": {}, "param_groups": [group]}) == ("AdamW", 1)
    assert describe({"state": {}, "param_groups": [group | {"weight_decay": 0}]}) == ("Adam", 1)


@pytest.mark.parametrize("kind", ["SGD", "Adam", "AdamW", "RMSprop"])
def test_inspect_names_the_optimizer_its_parameters_and_its_bytes(kind: str, saved: Saved) -> None:
    net = nn.Linear(3, 2)
    optimizer = getattr(torch.optim, kind)(net.parameters(), lr=0.1)
    net(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    path = saved({"epoch": 4, "model": net.state_dict(), "optim": optimizer.state_dict()})
    state = optimizer.state_dict()["state"].values()
    nbytes = sum(value.nbytes for entry in state for value in entry.values() if isinstance(value, torch.Tensor))
    report = ckptool.inspect(path)
    assert [(item.path, item.text, item.nbytes) for item in report.beside] == [
        ("epoch", "4", None),
        ("optim", f"{kind} of 2 parameters", nbytes),
    ]


@pytest.mark.parametrize("kind", ["AdamW", "Adagrad"])
def test_a_file_of_an_optimizer_alone_is_said_to_hold_no_weights(kind: str, saved: Saved) -> None:
    model = nn.Linear(2, 3)
    optimizer = getattr(torch.optim, kind)(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    said = f"state is an optimizer's ({kind} of 2 parameters): there are no weights of a model"
    alone = saved(optimizer.state_dict(), "optimizer.pt")
    assert said in ckptool.inspect(alone).notes
    assert f"{alone}: {said}" in ckptool.diff(alone, model.state_dict()).notes
    whole = saved({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, "train.pt")
    assert not any("optimizer's" in note for note in ckptool.inspect(whole).notes)
