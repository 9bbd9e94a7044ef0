from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import FIXTURES, assert_same_tensors, torch_load
from torch import nn

from ckptool import open as open_checkpoint
from ckptool import save
from ckptool.core.checkpoint import Checkpoint
from ckptool.core.tensor import Span, Storage, TensorInfo, contiguous_stride
from ckptool.core.tree import as_mapping, attributes
from ckptool.errors import CollisionError, FormatError, UnsupportedError, UsageError

Saved = Callable[..., Path]


def info(*shape: int, dtype: str = "float32") -> TensorInfo:
    """A tensor of a file that does not exist: nothing here may read it."""
    storage = Storage(Span("nowhere.pth", 0, 4096), dtype)
    return TensorInfo(dtype, shape, contiguous_stride(shape), 0, storage)


# --- where the weights are -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "root", "count"),
    [
        ("resnet_old.pth", (), 102),
        ("resnet_new.pth", (), 122),
        ("resnet_nested.pth", ("model",), 102),
        ("resnet_module.pth", (), 122),
        ("lightning.ckpt", ("state_dict",), 7),
        ("ema.pth", ("state_dict",), 7),
        ("resnet_old.safetensors", (), 102),
        ("sharded_bin", (), 9),
    ],
)
def test_the_weights_are_found_where_each_tool_keeps_them(name: str, root: tuple[Any, ...], count: int) -> None:
    opened = open_checkpoint(FIXTURES / name)
    assert opened.root == root
    assert len(opened.state_dict()) == count


def test_an_average_is_taken_only_when_it_is_named() -> None:
    plain, averaged = open_checkpoint(FIXTURES / "ema.pth"), open_checkpoint(FIXTURES / "ema.pth", "state_dict_ema")
    loaded = torch.load(FIXTURES / "ema.pth", weights_only=True)
    assert_same_tensors(plain, loaded["state_dict"])
    assert_same_tensors(averaged, loaded["state_dict_ema"])
    assert not torch.equal(loaded["state_dict"]["0.weight"], loaded["state_dict_ema"]["0.weight"])


@pytest.mark.parametrize("root", ["optimizer/state/0", ("optimizer", "state", 0)])
def test_a_root_is_named_by_steps_and_numbers_are_keys(root: Any) -> None:
    opened = open_checkpoint(FIXTURES / "resnet_nested.pth", root)
    assert list(opened.state_dict()) == ["step", "exp_avg", "exp_avg_sq"]
    loaded = torch_load(FIXTURES / "resnet_nested.pth")
    assert_same_tensors(opened, loaded["optimizer"]["state"][0])


def test_a_root_that_is_not_there_is_refused_with_what_is() -> None:
    with pytest.raises(UsageError, match="optimizer"):
        open_checkpoint(FIXTURES / "resnet_nested.pth", "modle")


def test_a_key_with_a_slash_in_it_can_be_a_root(saved: Saved) -> None:
    path = saved({"a/b": {"w": torch.ones(2)}, "a": {"c": {"v": torch.ones(3)}}})
    assert list(open_checkpoint(path, "a/b").state_dict()) == ["w"]
    assert list(open_checkpoint(path, "a/c").state_dict()) == ["v"]


def test_a_bare_tensor_and_a_list_have_no_names_but_are_there(saved: Saved) -> None:
    assert [path for path, _ in open_checkpoint(saved(torch.ones(2))).tensors()] == [()]
    opened = open_checkpoint(saved([torch.ones(2), (torch.ones(3),)], "list.pth"))
    assert [path for path, _ in opened.tensors()] == [(0,), (1, 0)]
    assert list(opened.state_dict()) == ["0", "1/0"]


# --- what is in it ---------------------------------------------------------------------------------------------------


def test_every_tensor_of_the_tree_is_listed_with_its_path() -> None:
    opened = open_checkpoint(FIXTURES / "resnet_nested.pth")
    loaded = torch_load(FIXTURES / "resnet_nested.pth")
    expected = {("model", key): tensor for key, tensor in loaded["model"].items()}
    for number, state in loaded["optimizer"]["state"].items():
        expected |= {("optimizer", "state", number, key): tensor for key, tensor in state.items()}
    found = dict(opened.tensors())
    assert list(found) == list(expected)
    assert all(found[path].shape == tuple(tensor.shape) for path, tensor in expected.items())


def test_leaves_are_all_that_is_no_tensor() -> None:
    found = dict(open_checkpoint(FIXTURES / "resnet_nested.pth").leaves())
    assert found["epoch",] == 41
    assert found["args", "lr"] == 0.001
    assert found["optimizer", "param_groups", 0, "weight_decay"] == 0.05
    assert not any(isinstance(value, TensorInfo) for value in found.values())


def test_objects_at_root_are_entries_and_not_in_the_state_dict() -> None:
    opened = open_checkpoint(FIXTURES / "leaves.pth")
    assert list(opened.state_dict()) == ["weight", "np_array", "np_fortran", "np_big"]
    assert {"weight", "none", "huge", "cycle"} <= set(opened.entries())


def test_two_keys_that_read_alike_are_told_apart_and_not_written(saved: Saved) -> None:
    opened = open_checkpoint(saved({1: torch.ones(1), "1": torch.ones(1)}))
    assert list(opened.state_dict()) == ["1 (int)", "1"]
    with pytest.raises(CollisionError, match="'1'"):
        opened.with_state_dict(opened.state_dict())


def test_tied_weights_are_one_group_and_equal_values_are_none() -> None:
    opened = open_checkpoint(FIXTURES / "tied.pth")
    groups = [
        ["emb.weight", "head.weight"],
        ["block.0.weight", "alias.0.weight"], ["block.0.bias", "alias.0.bias"],
        ["block.1.weight", "alias.1.weight"], ["block.1.bias", "alias.1.bias"],
    ]  # fmt: skip
    assert sorted(opened.shared()) == sorted(groups)


def test_other_views_of_one_storage_are_not_tied() -> None:
    opened = open_checkpoint(FIXTURES / "views.pth")
    assert opened.shared() == []
    assert opened.state_dict()["base"].storage is opened.state_dict()["transposed"].storage


def test_empty_tensors_are_never_tied(saved: Saved) -> None:
    empty = torch.empty(0)
    assert open_checkpoint(saved({"a": empty, "b": empty})).shared() == []


def test_a_path_leads_to_its_node_and_a_wrong_one_is_an_error() -> None:
    opened = open_checkpoint(FIXTURES / "resnet_nested.pth")
    assert opened.at(("optimizer", "param_groups", 0, "lr")) == opened.tree["optimizer"]["param_groups"][0]["lr"]
    with pytest.raises(FormatError, match="optimizer/0"):
        opened.at(("optimizer", 0))
    with pytest.raises(FormatError):
        opened.at(("optimizer", "state", True))  # True == 1, and is another key


@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 4), (2, 0, 5), (1, 3, 1), (4, 1, 1)])
def test_c_order_strides_are_torchs(shape: tuple[int, ...]) -> None:
    assert contiguous_stride(shape) == torch.empty(shape).stride()


# --- with other tensors ----------------------------------------------------------------------------------------------


def test_other_tensors_at_root_leave_everything_else_the_same_objects() -> None:
    opened = open_checkpoint(FIXTURES / "resnet_nested.pth")
    new = opened.with_state_dict({"only": info(2, 3)})
    assert list(new.state_dict()) == ["only"]
    assert list(new.tree) == list(opened.tree)
    assert all(new.tree[key] is value for key, value in opened.tree.items() if key != "model")
    assert len(opened.state_dict()) == 102


def test_the_order_given_is_the_order_kept() -> None:
    opened = open_checkpoint(FIXTURES / "tied.pth")
    turned = dict(reversed(opened.state_dict().items()))
    assert list(opened.with_state_dict(turned).state_dict()) == list(turned)


def test_what_is_no_tensor_stays_behind_the_key_it_stood_behind(saved: Saved) -> None:
    opened = open_checkpoint(saved({"first": 1, "a": torch.ones(1), "note": "x", "b": torch.ones(1), "last": None}))
    new = opened.with_state_dict({"b": info(1), "new": info(1), "a": info(1)})
    assert list(new.tree) == ["first", "b", "last", "new", "a", "note"]
    assert list(opened.with_state_dict({}).tree) == ["first", "note", "last"]


def test_keys_that_are_no_strings_keep_their_type(saved: Saved) -> None:
    opened = open_checkpoint(saved({0: torch.ones(1), "w": torch.ones(2)}))
    new = opened.with_state_dict(opened.state_dict())
    assert list(new.tree) == [0, "w"]


def test_metadata_of_a_batchnorm_goes_with_its_counter(tmp_path: Path) -> None:
    # Otherwise load_state_dict would call the counter missing: the versions promise it.
    opened = open_checkpoint(FIXTURES / "resnet_new.pth")
    kept = {key: t for key, t in opened.state_dict().items() if not key.endswith("num_batches_tracked")}
    new = opened.with_state_dict(kept)
    versions = as_mapping(attributes(new.tree)["_metadata"])
    before = as_mapping(attributes(opened.tree)["_metadata"])
    assert versions is not None
    assert before is not None
    dropped = set(before) - set(versions)
    assert dropped == {
        key.removesuffix(".weight") for key in kept if f"{key.removesuffix('.weight')}.running_var" in kept
    }
    save(new, tmp_path / "out.pth")
    from makers.models import resnet

    resnet(9, 6).load_state_dict(torch.load(tmp_path / "out.pth", weights_only=True), strict=True)


def test_metadata_is_untouched_while_its_counters_are_there() -> None:
    opened = open_checkpoint(FIXTURES / "resnet_new.pth")
    new = opened.with_state_dict({**opened.state_dict(), "extra": info(2)})
    assert new.tree.state is opened.tree.state


def test_a_batchnorm_at_the_top_loses_its_version_with_its_counter_too(saved: Saved) -> None:
    layer = nn.BatchNorm1d(3)
    opened = open_checkpoint(saved(layer.state_dict()))
    kept = {key: tensor for key, tensor in opened.state_dict().items() if key != "num_batches_tracked"}
    new = opened.with_state_dict(kept)
    assert "" not in (as_mapping(attributes(new.tree)["_metadata"]) or {})


def test_a_module_becomes_the_state_dict_it_would_give(tmp_path: Path) -> None:
    opened = open_checkpoint(FIXTURES / "resnet_module.pth")
    save(opened.with_state_dict(opened.state_dict()), tmp_path / "out.pth")
    written = torch.load(tmp_path / "out.pth", weights_only=True)
    from makers.models import resnet

    live = resnet(4, 20)
    assert type(written) is OrderedDict
    assert list(written) == list(live.state_dict())
    assert written._metadata == live.state_dict()._metadata
    live.load_state_dict(written, strict=True)


def test_weights_spread_over_containers_can_be_cast_and_not_renamed(saved: Saved) -> None:
    opened = open_checkpoint(saved({"a": {"w": torch.ones(2)}, "b": {"w": torch.ones(3)}, "epoch": 1}))
    assert list(opened.state_dict()) == ["a/w", "b/w"]
    new = opened.with_state_dict({"a/w": info(2), "b/w": info(3)})
    assert new.tree["epoch"] == 1
    with pytest.raises(UnsupportedError, match="--root"):
        opened.with_state_dict({"c/w": info(2)})


def test_a_checkpoint_and_its_tensors_cannot_be_altered() -> None:
    opened = Checkpoint({"w": info(2)})
    with pytest.raises(AttributeError):
        opened.root = ("x",)  # type: ignore[misc]
    with pytest.raises(AttributeError):
        opened.tree["w"].source.span.offset = 0
    with pytest.raises(AttributeError):
        opened.tree["w"].colour = "red"  # of its own fields the type checker holds it to be frozen
    with pytest.raises(FormatError):
        opened.tree["w"].__setstate__(("int8",))


def test_tensors_can_be_sent_to_another_process() -> None:
    tensor = info(2, 3)
    copy = pickle.loads(pickle.dumps(tensor))
    assert (copy.dtype, copy.shape, copy.stride) == (tensor.dtype, tensor.shape, tensor.stride)
    assert copy.source.span == tensor.source.span
