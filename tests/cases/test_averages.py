"""Averaged weights (EMA): which are taken, what is said of them, and the names of those that have only numbers."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import Run, Saved
from safetensors.torch import load_file
from torch import nn

import ckptool


class Tied(nn.Module):
    """Parameters, a tied one, and buffers of several kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("ids", torch.arange(6))
        self.out = nn.Linear(4, 4)


def shadows(model: nn.Module) -> dict[str, Any]:
    """The state_dict of torch_ema's ExponentialMovingAverage."""
    return {
        "decay": 0.995, "num_updates": 7, "collected_params": None,
        "shadow_params": [parameter.detach() * 0.5 for parameter in model.parameters()],
    }  # fmt: skip


def notes(run: Run, path: Path, *options: str) -> list[str]:
    code, out, _ = run("inspect", path, "--json", *options)
    assert code == 0
    return list(json.loads(out)["result"][0]["notes"])


# --- one copy, and no other weights -----------------------------------------------------------------------------------


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("name", ["ema", "model_ema", "ema_state_dict"])
def test_a_copy_is_taken_where_no_other_weights_are_and_that_is_said(
    name: str, whole: bool, saved: Saved, run: Run
) -> None:
    """As ultralytics saves a finished training."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).half()
    tree = {"epoch": -1, "model": None, name: model if whole else model.state_dict(), "updates": None, "train_args": {}}
    path = saved(tree, "best.pt")
    opened = ckptool.open(path)
    assert (opened.root, list(opened.state_dict())) == ((name,), list(model.state_dict()))
    said = f"{name} is an averaged copy (EMA), and the only weights there are"
    assert said in notes(run, path)
    code, out, _ = run("convert", path, "-o", "out.safetensors")
    assert (code, said in out) == (0, True)
    assert all(torch.equal(load_file("out.safetensors")[key], value) for key, value in model.state_dict().items())


def test_a_copy_is_not_taken_beside_weights_or_another_copy(saved: Saved) -> None:
    weights = {"a.w": torch.ones(2)}
    copies = {"ema": weights, "params_ema": weights}
    assert ckptool.open(saved({"model": weights, "ema": weights}, "1.pt")).root == ("model",)
    assert ckptool.open(saved({"net": {"a.w": torch.ones(2)}, "ema": weights}, "2.pt")).root == ("net",)
    assert ckptool.open(saved({**copies, "model": None}, "3.pt")).root == ()
    assert ckptool.open(saved({"ema": weights}, "5.pt")).root == ()
    assert ckptool.open(saved({"model": None, "queue": torch.ones(9), "ema": weights}, "4.pt")).root == ()


# --- weights that are averages under another name ---------------------------------------------------------------------


def test_what_lightnings_averaging_puts_into_state_dict_is_said_to_be_averaged(saved: Saved, run: Run) -> None:
    tree = {
        "state_dict": {"net.w": torch.ones(2)}, "current_model_state": {"net.w": torch.zeros(2)},
        "averaging_state": {"n_averaged": torch.tensor(3)}, "epoch": 1,
    }  # fmt: skip
    path = saved(tree, "ema.ckpt")
    [said] = [note for note in notes(run, path) if "averaged" in note]
    assert "state_dict holds averaged weights" in said
    assert "--root current_model_state" in said
    assert not [note for note in notes(run, path, "--root", "current_model_state") if "averaged" in note]
    code, out, _ = run("convert", path, "-o", "out.safetensors")
    assert (code, said in out) == (0, True)
    del tree["averaging_state"]
    assert not [note for note in notes(run, saved(tree, "plain.ckpt")) if "averaged" in note]


# --- averages in a list -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("root", ["ema", "ema/shadow_params"])
@pytest.mark.parametrize("whole", [True, False])
def test_averages_in_a_list_have_the_keys_of_the_models_parameters(
    root: str, whole: bool, saved: Saved, run: Run
) -> None:
    model = Tied()
    path = saved({"model": model if whole else model.state_dict(), "ema": shadows(model)}, "run.pt")
    names = [name for name, _ in model.named_parameters()]
    assert list(ckptool.open(path, root=root).state_dict()) == names
    assert "shadow_params have the keys of model's parameters, as many and of the same shapes" in notes(
        run, path, "--root", root
    )
    assert run("convert", path, "--root", root, "-o", "ema.safetensors")[0] == 0
    loaded = load_file("ema.safetensors")
    assert all(torch.equal(loaded[name], parameter * 0.5) for name, parameter in model.named_parameters())


def test_the_list_stays_a_list_where_the_whole_file_is_written(saved: Saved, run: Run) -> None:
    model = Tied()
    path = saved({"model": model.state_dict(), "ema": shadows(model)}, "run.pt")
    assert run("convert", path, "--root", "ema", "--dtype", "bfloat16", "-o", "out.pt")[0] == 0
    written = torch.load("out.pt", weights_only=True)
    assert [one.dtype for one in written["ema"]["shadow_params"]] == [torch.bfloat16] * 5
    assert written["ema"]["decay"] == 0.995
    code, out, _ = run("inspect", path)
    assert (code, "shadow_params have" in out) == (0, False)


def other_shape(tree: dict[str, Any]) -> None:
    tree["ema"]["shadow_params"][1] = torch.ones(5)


def one_fewer(tree: dict[str, Any]) -> None:
    del tree["ema"]["shadow_params"][0]


def a_buffer_more(tree: dict[str, Any]) -> None:
    tree["model"]["pos.table"] = torch.ones(2)


@pytest.mark.parametrize("change", [other_shape, one_fewer, a_buffer_more])
def test_in_doubt_they_keep_their_numbers_and_that_is_said(change: Any, saved: Saved, run: Run) -> None:
    model = Tied()
    tree = {"model": copy.deepcopy(model.state_dict()), "ema": shadows(model)}
    change(tree)
    path = saved(tree, "run.pt")
    assert [key for key in ckptool.open(path, root="ema").state_dict() if not key.startswith("shadow_params/")] == []
    assert any("have no keys: model has no parameters" in note for note in notes(run, path, "--root", "ema"))


def test_a_list_without_a_model_is_numbered_and_nothing_is_said(saved: Saved, run: Run) -> None:
    path = saved(shadows(Tied()), "ema.pt")
    assert next(iter(ckptool.open(path).state_dict())) == "shadow_params/0"
    assert not [note for note in notes(run, path) if "shadow_params" in note]
