"""to_torch, against torch.load of the same file."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import FIXTURES, assert_identical
from safetensors.torch import load_file

from ckptool import open as open_checkpoint
from ckptool.core.tree import PyObject
from ckptool.errors import UnsupportedError

Saved = Callable[..., Path]

WHOLE = ["resnet_old.pth", "resnet_new.pth", "resnet_legacy.pth", "dtypes.pth", "views.pth", "tied.pth", "conj_neg.pth",
         "big_endian.pth", "deflated.pth", "lightning.ckpt", "ema.pth"]  # fmt: skip


@pytest.mark.parametrize("name", WHOLE)
def test_the_tree_is_what_torch_load_gives(name: str) -> None:
    assert_identical(open_checkpoint(FIXTURES / name).to_torch(), torch.load(FIXTURES / name), strides=True)


def test_safetensors_and_shards_become_tensors_too() -> None:
    found = open_checkpoint(FIXTURES / "dtypes.safetensors").to_torch()
    expected = load_file(FIXTURES / "dtypes.safetensors")
    assert_identical(found, {key: expected[key] for key in found})
    assert next(iter(open_checkpoint(FIXTURES / "sharded_bin").to_torch())) == "lm_head.weight"


@pytest.mark.parametrize(
    "key", ["quantized", "quantized_channel", "coo", "csr", "nested", "meta", "parameter", "plain"]
)
def test_composite_tensors_are_rebuilt(key: str) -> None:
    opened = open_checkpoint(FIXTURES / "composite.pth")
    found = opened.with_state_dict({key: opened.state_dict()[key]}).to_torch()
    expected = torch.load(FIXTURES / "composite.pth", weights_only=False)[key]
    assert_identical(found, {key: expected})


def test_one_parameter_under_two_names_is_one_object() -> None:
    opened = open_checkpoint(FIXTURES / "composite.pth")
    kept = {key: opened.state_dict()[key] for key in ("parameter", "same_parameter")}
    found = opened.with_state_dict(kept).to_torch()
    assert type(found["parameter"]) is torch.nn.Parameter
    assert found["parameter"] is found["same_parameter"]


def test_a_tensor_of_a_class_of_its_own_is_refused() -> None:
    opened = open_checkpoint(FIXTURES / "composite.pth")
    jagged = opened.state_dict()["jagged"]
    with pytest.raises(UnsupportedError, match="own class"):
        opened.with_state_dict({"own": replace(jagged, source=replace(jagged.source, kind="subclass"))}).to_torch()


def test_memory_is_shared_as_in_the_file() -> None:
    found = open_checkpoint(FIXTURES / "tied.pth").to_torch()
    found["emb.weight"].fill_(3.0)
    assert (found["head.weight"] == 3.0).all()
    assert not (found["twin"] == 3.0).any()


def test_objects_of_unknown_classes_stay_stand_ins_and_the_rest_is_real() -> None:
    found = open_checkpoint(FIXTURES / "resnet_nested.pth").to_torch()
    expected = torch.load(FIXTURES / "resnet_nested.pth", weights_only=False)
    assert isinstance(found["args"], PyObject)
    for key in ("epoch", "arch", "model", "optimizer", "scheduler"):
        assert_identical(found[key], expected[key])


def test_plain_things_are_real_and_a_cycle_is_a_cycle() -> None:
    found = open_checkpoint(FIXTURES / "leaves.pth").to_torch()
    assert type(found["ordered"]) is OrderedDict
    assert found["size"] == torch.Size([2, 3])
    assert type(found["size"]) is torch.Size
    assert (found["dtype"], found["device"]) == (torch.bfloat16, torch.device("cuda", 1))
    assert found["cycle"]["self"] is found["cycle"]
    assert found["cycle"]["items"][2] is found["cycle"]["items"]
    assert found["shared"][0] is found["shared"][1]


def test_a_model_becomes_its_state_dict_and_loads_strictly() -> None:
    from makers.models import resnet

    live = resnet(4, 20)
    found = open_checkpoint(FIXTURES / "resnet_module.pth").to_torch()
    assert list(found) == list(live.state_dict())
    assert found._metadata == live.state_dict()._metadata
    live.load_state_dict(found, strict=True)


def test_only_the_weights_can_be_asked_for() -> None:
    found = open_checkpoint(FIXTURES / "resnet_nested.pth").to_torch(only_root=True)
    expected = torch.load(FIXTURES / "resnet_nested.pth", weights_only=False)["model"]
    assert_identical(dict(found), dict(expected))


# --- map_location ----------------------------------------------------------------------------------------------------


@pytest.fixture
def on_cuda(saved: Saved) -> Path:
    path = saved({"a": torch.arange(3.0), "b": torch.ones(2)})
    data = path.read_bytes()
    path.write_bytes(data.replace(b"X\x03\x00\x00\x00cpu", b"X\x03\x00\x00\x00xla"))  # a tag; sizes stay
    return path


LOCATIONS: dict[str, Any] = {
    "string": "cpu",
    "device": torch.device("cpu"),
    "meta": "meta",
    "dict": {"xla": "cpu"},
    "function": lambda storage, tag: storage,
    "function that looks": lambda storage, tag: storage if tag == "xla" else None,
}


@pytest.mark.parametrize("name", LOCATIONS)
def test_map_location_is_torch_loads(name: str, on_cuda: Path) -> None:
    where = LOCATIONS[name]
    expected = torch.load(on_cuda, map_location=where)
    found = open_checkpoint(on_cuda).to_torch(map_location=where)
    assert {key: tensor.device for key, tensor in found.items()} == {key: t.device for key, t in expected.items()}
    if name != "meta":
        assert_identical(found, expected)


def test_a_function_is_asked_once_per_storage_with_its_tag(on_cuda: Path) -> None:
    asked: list[tuple[int, str]] = []

    def where(storage: Any, tag: str) -> Any:
        asked.append((storage.nbytes(), tag))
        return storage

    open_checkpoint(on_cuda).to_torch(map_location=where)
    ours, asked[:] = list(asked), []
    torch.load(on_cuda, map_location=where)
    assert ours == asked == [(12, "xla"), (8, "xla")]


def test_a_function_that_answers_none_leaves_it_to_torch(saved: Saved) -> None:
    path = saved({"a": torch.arange(3.0)})
    found = open_checkpoint(path).to_torch(map_location=lambda storage, tag: None)
    assert_identical(found, torch.load(path, map_location=lambda storage, tag: None))


def test_a_device_that_is_not_there_is_an_error_as_with_torch_load(saved: Saved) -> None:
    path = saved({"a": torch.ones(2)})
    path.write_bytes(path.read_bytes().replace(b"X\x03\x00\x00\x00cpu", b"X\x03\x00\x00\x00abc"))
    with pytest.raises(RuntimeError):
        torch.load(path)
    with pytest.raises(Exception, match="abc"):
        open_checkpoint(path).to_torch()


def test_a_tensor_that_wants_a_gradient_still_does(saved: Saved) -> None:
    path = saved({"a": torch.ones(2, requires_grad=True), "i": torch.ones(2, dtype=torch.int8)})
    assert_identical(open_checkpoint(path).to_torch(), torch.load(path))
