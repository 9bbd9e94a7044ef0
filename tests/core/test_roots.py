from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import FIXTURES
from torch import nn

import ckptool
from ckptool.core import keys, roots
from ckptool.core.tensor import Span, Storage, TensorInfo
from ckptool.errors import UsageError

Saved = Callable[..., Path]


def tensor() -> TensorInfo:
    return TensorInfo("float32", (1,), (1,), 0, Storage(Span("", 0, 4), "float32"))


def weights() -> dict[str, Any]:
    return {"a.w": tensor(), "a.b": tensor()}


def optimizer() -> dict[str, Any]:
    return {"state": {0: {"exp_avg": tensor()}}, "param_groups": [{"params": [0]}]}


def test_a_plain_state_dict_is_its_own_root() -> None:
    assert roots.find_root(weights()) == ((), (), ())


@pytest.mark.parametrize("name", keys.ROOTS)
def test_every_known_name_is_found_beside_an_optimizer(name: str) -> None:
    assert roots.find_root({"epoch": 3, "optimizer": optimizer(), name: weights()}).path == (name,)


def test_of_two_known_names_the_first_of_the_list_wins_and_the_other_is_said() -> None:
    found = roots.find_root({"model": weights(), "state_dict": weights()})
    assert found.path == ("state_dict",)
    assert found.others == (("model",),)


def test_a_lone_dict_of_unknown_name_is_taken() -> None:
    assert roots.find_root({"step": 1, "weird": weights(), "optimizer": optimizer()}).path == ("weird",)


def test_two_dicts_of_unknown_names_are_a_choice_that_is_left_to_the_user() -> None:
    found = roots.find_root({"left": weights(), "right": weights()})
    assert found.path == ()
    assert found.others == (("left",), ("right",))


def test_names_are_followed_downwards() -> None:
    assert roots.find_root({"model": {"state_dict": weights(), "config": {"a": 1}}}).path == ("model", "state_dict")


def test_a_submodule_named_model_in_a_flat_dict_is_no_root() -> None:
    assert roots.find_root({**weights(), "model": tensor()}).path == ()


def test_a_stray_tensor_beside_the_weights_does_not_make_the_top_the_root() -> None:
    assert roots.find_root({"best": tensor(), "epoch": 1, "state_dict": weights()}).path == ("state_dict",)


def test_an_optimizer_is_never_the_weights() -> None:
    assert not roots.holds_weights(optimizer())
    assert roots.is_optimizer(torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1).state_dict())
    assert not roots.is_optimizer({"state": {}})


@pytest.mark.parametrize("name", keys.EMA)
def test_an_average_is_named_and_not_taken(name: str) -> None:
    found = roots.find_root({name: weights(), "model": weights()})
    assert found.path == ("model",)
    assert found.ema == ((name,),)


def test_an_average_alone_is_still_taken_only_when_asked_for(saved: Saved) -> None:
    momentum = {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"params": [0]}]}
    path = saved({"epoch": 3, "ema": {"w": torch.ones(2)}, "optimizer": momentum})
    assert list(ckptool.open(path).state_dict()) == []
    assert list(ckptool.open(path, root="ema").state_dict()) == ["w"]


@pytest.mark.parametrize(
    ("name", "root"),
    [
        ("resnet_old.pth", ()),
        ("resnet_nested.pth", ("model",)),
        ("resnet_module.pth", ()),
        ("lightning.ckpt", ("state_dict",)),
        ("ema.pth", ("state_dict",)),
        ("sharded", ()),
    ],
)
def test_real_checkpoints_have_the_root_that_people_expect(name: str, root: tuple[str, ...]) -> None:
    assert ckptool.open(FIXTURES / name).root == root


def test_a_root_can_be_given_as_text_as_a_path_and_through_int_keys_and_lists(saved: Saved) -> None:
    path = saved({"runs": [{"w": torch.zeros(1)}, {7: {"v": torch.ones(2)}}], "a/b": {"x": torch.ones(3)}})
    assert list(ckptool.open(path, root="runs/0").state_dict()) == ["w"]
    assert ckptool.open(path, root="runs/1/7").root == ("runs", 1, 7)
    assert list(ckptool.open(path, root=("runs", 1, 7)).state_dict()) == ["v"]
    assert list(ckptool.open(path, root="a/b").state_dict()) == ["x"]
    assert ckptool.open(path, root="").root == ()


def test_a_root_that_is_not_there_is_refused_with_what_is(saved: Saved) -> None:
    path = saved({"model": {"w": torch.zeros(1)}, "epoch": 1})
    with pytest.raises(UsageError, match=r"no 'wrong' at model; there is: w"):
        ckptool.open(path, root="model/wrong")
    with pytest.raises(UsageError, match=r"no 'nets' at the top; there is: model, epoch"):
        ckptool.open(path, root="nets/g")


def test_tensors_in_several_nested_dicts_are_all_listed_with_slashes(saved: Saved) -> None:
    path = saved({"left": {"a.w": torch.zeros(1)}, "right": {"a.w": torch.ones(2)}})
    opened = ckptool.open(path)
    assert {key: info.shape for key, info in opened.state_dict().items()} == {"left/a.w": (1,), "right/a.w": (2,)}
