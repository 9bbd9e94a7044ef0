"""What training gets after a partial load: parameters, blocks, what is frozen, groups; on files and on live models."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ckptool
from ckptool.cli.load_partial import groups_document
from ckptool.core.tensor import Span, Storage, TensorInfo, contiguous_stride
from ckptool.errors import UsageError
from ckptool.partial import handover
from ckptool.partial.handover import Group

Saved = Callable[..., Path]


def infos(state: Mapping[str, torch.Tensor]) -> dict[str, TensorInfo]:
    """A state_dict as ckptool would open it: names of one tensor share a storage."""
    made: dict[int, TensorInfo] = {}
    for tensor in state.values():
        dtype, shape = str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)
        source = Storage(Span("model.pth", 0, tensor.nbytes), dtype)
        made.setdefault(id(tensor), TensorInfo(dtype, shape, contiguous_stride(shape), 0, source))
    return {key: made[id(tensor)] for key, tensor in state.items()}


def shaped(**shapes: tuple[int, ...]) -> dict[str, TensorInfo]:
    return infos({key.replace("__", "."): torch.zeros(shape) for key, shape in shapes.items()})


class Net(nn.Module):
    """A stem, four blocks with BatchNorm, a norm without weights, an embedding tied to an output, a head."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.embed = nn.Embedding(7, 4)
        self.stem = nn.Linear(4, 4)
        self.layer1 = nn.Sequential(self.block(), self.block())
        self.layer2 = nn.Sequential(self.block(), self.block())
        self.norm = nn.BatchNorm1d(4, affine=False)
        self.out = nn.Linear(4, 7, bias=False)
        self.out.weight = self.embed.weight
        self.head = nn.Linear(7, classes)

    @staticmethod
    def block() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(self.embed(x).mean(1)) * self.scale
        answer: torch.Tensor = self.head(self.out(self.norm(self.layer2(self.layer1(x)))))
        return answer


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


def opened(net: nn.Module, saved: Saved, **options: Any) -> dict[str, TensorInfo]:
    return ckptool.open(saved(net if options.get("whole") else net.state_dict())).state_dict()


# --- parameters --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("whole", [False, True])
def test_parameters_are_those_of_the_live_model_in_its_order_and_tied_ones_together(
    net: Net, saved: Saved, whole: bool
) -> None:
    tensors = opened(net, saved, whole=whole)
    found = handover.parameters(tensors)
    assert [names[0] for names in found] == [name for name, _ in net.named_parameters()]
    assert ["embed.weight", "out.weight"] in found
    assert found == handover.live_parameters(net)


def test_a_whole_model_says_itself_what_is_a_parameter(saved: Saved) -> None:
    odd = nn.Module()
    odd.register_buffer("weight", torch.zeros(3, 3))
    odd.register_parameter("inv_freq", nn.Parameter(torch.zeros(3)))
    odd.register_parameter("still", nn.Parameter(torch.zeros(3), requires_grad=False))
    assert handover.parameters(opened(odd, saved, whole=True)) == [["inv_freq"], ["still"]]
    assert handover.parameters(opened(odd, saved)) == [["still"], ["weight"]]


def test_buffers_are_told_by_name_shape_and_dtype() -> None:
    weights = shaped(
        attn__bias=(9,), attn__c__weight=(3, 9), norm__weight_v=(3, 3), norm__weight_g=(3, 1),
        conv__bias=(1, 4, 1, 1), relative_position_bias_table=(9, 2), pos_embed=(1, 4, 3), logit_scale=(),
    )  # fmt: skip
    buffers = shaped(
        h__attn__bias=(1, 1, 8, 8), h__attn__masked_bias=(), rotary__inv_freq=(4,), bn__running_mean=(3,),
        bn__running_var=(3,), spectral__weight_u=(3,), spectral__weight_v=(3,), swin__attn_mask=(4, 9, 9),
    )  # fmt: skip
    counters = infos({
        "bn.num_batches_tracked": torch.tensor(3), "position_ids": torch.arange(4),
        "mask": torch.zeros(4, dtype=torch.bool),
    })  # fmt: skip
    found = handover.parameters({**buffers, **weights, **counters})
    assert [name for names in found for name in names] == list(weights)


def test_empty_parameters_are_never_tied() -> None:
    one = shaped(a=(0, 3))["a"]
    assert handover.parameters({"a": one, "b": one}) == [["a"], ["b"]]


# --- blocks and freezing -----------------------------------------------------------------------------------------


def test_a_block_is_a_name_up_to_its_first_whole_number() -> None:
    names = [
        "embed.weight", "encoder.layer.0.attn.2.weight", "encoder.layer.0.bias", "encoder.layer.10.bias",
        "layer1.0.conv1.weight", "head.weight", "7.weight",
    ]  # fmt: skip
    assert handover.blocks(names) == {
        "encoder.layer.0": ["encoder.layer.0.attn.2.weight", "encoder.layer.0.bias"],
        "encoder.layer.10": ["encoder.layer.10.bias"],
        "layer1.0": ["layer1.0.conv1.weight"],
        "7": ["7.weight"],
    }
    assert handover.blocks(["module.h.0._orig_mod.w", "module.h.0.b"]) == {
        "h.0": ["module.h.0._orig_mod.w", "module.h.0.b"]
    }


def frozen(net: nn.Module, *specs: str, loaded: tuple[str, ...] = ()) -> list[str]:
    made = handover.frozen(specs, handover.parameters(infos_of(net)), loaded)
    assert made == handover.frozen(specs, handover.live_parameters(net), loaded, live=True)
    return made


def infos_of(net: nn.Module) -> dict[str, TensorInfo]:
    """The state_dict of a live model; `state_dict()` gives every name its own detached tensor."""
    return infos(net.state_dict(keep_vars=True))


def test_first_n_freezes_the_blocks_and_all_that_stands_before_them(net: Net) -> None:
    names = frozen(net, "first:3")
    assert names[:5] == ["scale", "embed.weight", "out.weight", "stem.weight", "stem.bias"]
    assert {name.rsplit(".", 2)[0] for name in names[5:]} == {"layer1.0", "layer1.1", "layer2.0"}
    assert len(names) == 5 + 3 * 4


def test_loaded_freezes_a_tensor_of_which_any_name_was_loaded(net: Net) -> None:
    assert frozen(net, "loaded", loaded=("out.weight", "stem.bias", "norm.running_mean")) == [
        "embed.weight", "out.weight", "stem.bias",
    ]  # fmt: skip


def test_patterns_freeze_and_add_up_and_tied_names_go_together(net: Net) -> None:
    assert frozen(net, "out.*", "re:^stem") == ["embed.weight", "out.weight", "stem.weight", "stem.bias"]


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("first:5", r"of the 5 blocks the target has 4: layer1.0, layer1.1, layer2.0, layer2.1"),
        ("first:0", "how many blocks"),
        ("first:two", "how many blocks"),
        ("first:²", "how many blocks"),
        ("norm.running_mean", "norm.running_mean fits no parameter"),
        ("loaded", "loaded fits no parameter"),
    ],
)
def test_what_cannot_be_frozen_is_refused(net: Net, spec: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        frozen(net, spec)


def test_without_blocks_first_n_is_refused() -> None:
    with pytest.raises(UsageError, match="has none: no name has a number"):
        handover.frozen(["first:1"], [["a.weight"], ["a.bias"]], ())


def test_first_n_is_refused_where_keys_are_sorted_by_name_as_safetensors_does(net: Net) -> None:
    names = sorted(name for name, _ in net.named_parameters())
    with pytest.raises(UsageError, match="alphabetical order"):
        handover.frozen(["first:1"], [[name] for name in names], ())
    assert handover.frozen(["first:1"], [[name] for name in names], (), live=True)[0] == "embed.weight"


def test_name_order_is_told_from_a_models_order() -> None:
    def of(text: str) -> bool:
        return handover.in_name_order(text.split())

    assert of("fc.bias fc.weight layer.0.bias layer.0.weight")
    assert of("h.0.b h.0.w h.1.b h.1.w h.10.b h.10.w h.2.b h.2.w ln.b ln.w wte.w")
    assert not of("embed.w layers.0.q layers.0.k layers.0.v layers.1.q layers.1.k layers.1.v head.w")
    assert not of("0.weight 1.weight 2.weight 3.weight 4.weight")
    assert not of("0.weight 0.bias")
    mixed = [f"a.{n}.norm" for n in range(9)] + [f"a.{n}.{m}" for n in range(9) for m in ("k", "o", "q")]
    assert handover.in_name_order(mixed)


# --- running statistics ------------------------------------------------------------------------------------------


def test_batch_norms_that_would_still_move_are_exactly_those_that_do(net: Net) -> None:
    still = frozen(net, "first:3")
    told = handover.moving_batch_norms(infos_of(net), still)
    assert told == ["layer1.0.1", "layer1.1.1", "layer2.0.1"]
    handover.freeze_model(net, still)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    net.train()(torch.randint(7, (5, 2)))
    after = net.state_dict()
    assert all(not torch.equal(before[f"{path}.running_mean"], after[f"{path}.running_mean"]) for path in told)


def test_a_norm_without_a_weight_is_frozen_with_what_is_around_it(net: Net) -> None:
    everything = [name for name, _ in net.named_parameters(remove_duplicate=False)]
    assert "norm" in handover.moving_batch_norms(infos_of(net), everything)
    assert "norm" not in handover.moving_batch_norms(infos_of(net), everything[:-1])
    inner = shaped(a__w=(2, 2), a__norm__bn__running_mean=(2,), b__w=(2, 2))
    assert handover.moving_batch_norms(inner, ["a.w"]) == ["a.norm.bn"]
    assert handover.moving_batch_norms(shaped(running_mean=(2,)), []) == []


def test_a_batch_norm_whose_weight_is_a_buffer_never_moves() -> None:
    tensors = shaped(bn__weight=(2,), bn__running_mean=(2,), conv__weight=(2, 2, 1, 1))
    tensors["conv.weight"] = replace(tensors["conv.weight"], is_parameter=True)
    assert handover.moving_batch_norms(tensors, ["conv.weight"]) == []


# --- groups ------------------------------------------------------------------------------------------------------


def test_groups_part_loaded_from_new_and_decay_from_no_decay(net: Net) -> None:
    tensors = infos_of(net)
    parameters = handover.parameters(tensors)
    loaded = [key for key in tensors if not key.startswith("head")]
    still = handover.frozen(["first:3"], parameters, loaded)
    made = handover.groups(parameters, loaded, still, tensors, new_lr_mult=10, weight_decay=0.05)
    assert made == [
        Group("loaded", ["layer2.1.0.weight"], 1.0, 0.05),
        Group("loaded_no_decay", ["layer2.1.0.bias", "layer2.1.1.weight", "layer2.1.1.bias"], 1.0, 0.0),
        Group("new", ["head.weight"], 10.0, 0.05),
        Group("new_no_decay", ["head.bias"], 10.0, 0.0),
    ]
    handover.check(made, still, parameters)


def test_biases_and_scalars_never_decay_and_embeddings_do() -> None:
    tensors = shaped(scale=(), emb__weight=(9, 3), cls_token=(1, 1, 3), conv__bias=(1, 4, 1, 1), attn__bias_k=(1, 1, 4),
                     norm__weight=(4,))  # fmt: skip
    names = handover.parameters(tensors)
    plain, bare = handover.groups(names, tensors, (), tensors, weight_decay=0.1)
    assert plain.params == ["emb.weight", "cls_token"]
    assert bare.params == ["scale", "conv.bias", "attn.bias_k", "norm.weight"]


def test_a_tied_parameter_is_in_one_group_once_and_loaded_if_any_name_is(net: Net) -> None:
    tensors = infos_of(net)
    parameters = handover.parameters(tensors)
    made = handover.groups(parameters, ["out.weight"], (), tensors)
    assert made[0].params == ["embed.weight"]
    handover.check(made, (), parameters)


def test_groups_that_overlap_or_leave_something_out_are_our_own_mistake() -> None:
    parameters = [["a"], ["b", "c"]]
    for groups, still in (
        ([Group("x", ["a"], 1, 0)], []),
        ([Group("x", ["a"], 1, 0), Group("y", ["a", "b"], 1, 0)], []),
        ([Group("x", ["a", "b"], 1, 0)], ["c"]),
        ([Group("x", ["a", "b", "d"], 1, 0)], []),
    ):
        with pytest.raises(RuntimeError, match="disjoint and covering"):
            handover.check(groups, still, parameters)


def test_a_report_in_json_builds_an_optimizer_by_hand(net: Net, saved: Saved) -> None:
    target = ckptool.open(saved(net.state_dict(), "target.pth"))
    source = ckptool.open(saved({"layer1.0.0.weight": torch.ones(4, 4)}, "source.pth"))
    _, report = ckptool.plan_partial(source, target, freeze=["stem.*", "out.weight"], weight_decay=0.1)
    read = json.loads(json.dumps(groups_document(report)))
    assert list(read) == ["schema", "groups", "frozen", "tied"]
    assert read["schema"] == 1
    assert read["frozen"] == ["embed.weight", "out.weight", "stem.weight", "stem.bias"]
    assert read["tied"] == {"out.weight": "embed.weight"}
    live = dict(net.named_parameters())
    given = [
        {"params": [live[name] for name in row["params"]], "lr": 0.1 * row["lr_mult"],
         "weight_decay": row["weight_decay"]}
        for row in read["groups"]
    ]  # fmt: skip
    optimizer = torch.optim.SGD(given, lr=0.1)
    held = {id(one) for group in optimizer.param_groups for one in group["params"]}
    assert {name for name, one in live.items() if id(one) not in held} == set(read["frozen"]) - {"out.weight"}


# --- a live model ------------------------------------------------------------------------------------------------


def step(net: nn.Module, optimizer: torch.optim.Optimizer) -> set[str]:
    """Trains one step; returns the names of parameters that moved."""
    before = {name: one.detach().clone() for name, one in net.named_parameters(remove_duplicate=False)}
    optimizer.zero_grad()
    net.train()(torch.randint(7, (16, 3))).square().sum().backward()
    optimizer.step()
    return {
        name for name, one in net.named_parameters(remove_duplicate=False) if not torch.equal(before[name], one)
    }  # fmt: skip


def test_after_one_step_only_what_should_move_has_moved(net: Net) -> None:
    loaded = [key for key in net.state_dict() if not key.startswith("head")]
    still = handover.freeze_model(net, handover.frozen(["loaded"], handover.live_parameters(net), loaded, live=True))
    assert set(still) == {name for name, _ in net.named_parameters(remove_duplicate=False)} - {
        "head.weight", "head.bias",
    }  # fmt: skip
    groups = handover.model_groups(net, loaded, lr=1e-3, weight_decay=0.1)
    assert [(group["name"], group["lr"], group["weight_decay"]) for group in groups] == [
        ("new", pytest.approx(1e-2), 0.1), ("new_no_decay", pytest.approx(1e-2), 0.0),
    ]  # fmt: skip
    assert step(net, torch.optim.AdamW(groups)) == {"head.weight", "head.bias"}


def test_without_freezing_everything_is_in_a_group_once_and_moves(net: Net) -> None:
    loaded = [key for key in net.state_dict() if not key.startswith("head")]
    groups = handover.model_groups(net, loaded, lr=1e-2, new_lr_mult=3)
    held = [id(one) for group in groups for one in group["params"]]
    assert sorted(held) == sorted(id(one) for one in net.parameters())
    assert {group["name"]: group["lr"] for group in groups}["new"] == pytest.approx(3e-2)
    moved = step(net, torch.optim.AdamW(groups))
    assert moved >= {"head.weight", "embed.weight", "out.weight", "stem.weight", "layer1.0.0.weight"}


def test_groups_leave_out_what_was_frozen_and_what_requires_no_gradient(net: Net) -> None:
    net.stem.requires_grad_(False)
    handover.freeze_model(net, ["out.weight"])
    groups = handover.model_groups(net, (), lr=0.1)
    held = {id(one) for group in groups for one in group["params"]}
    assert not held & {id(net.stem.weight), id(net.stem.bias), id(net.embed.weight)}
    assert len(held) == len(list(net.parameters())) - 3


def test_a_gradient_from_before_freezing_moves_nothing(net: Net) -> None:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    net(torch.randint(7, (4, 2))).sum().backward()
    handover.freeze_model(net, ["stem.weight"])
    before = net.stem.weight.clone()
    optimizer.step()
    assert torch.equal(before, net.stem.weight)


def test_names_the_model_lacks_are_all_named_and_nothing_is_touched(net: Net) -> None:
    with pytest.raises(UsageError, match=r"no parameter fc.weight, fc.bias$"):
        handover.freeze_model(net, ["stem.weight", "fc.weight", "fc.bias"])
    with pytest.raises(UsageError, match=r"module.stem.weight \(wrapped since\?\)"):
        handover.freeze_model(net, ["module.stem.weight"])
    assert all(one.requires_grad for one in net.parameters())


def test_nothing_left_to_train_is_said(net: Net) -> None:
    handover.freeze_model(net, [name for name, _ in net.named_parameters()])
    with pytest.raises(UsageError, match="nothing is left to train"):
        handover.model_groups(net, (), lr=0.1)


def test_lazy_parameters_are_frozen_and_grouped_like_any_other() -> None:
    net = nn.Sequential(nn.LazyLinear(3), nn.LazyLinear(2))
    handover.freeze_model(net, ["0.weight"])
    groups = handover.model_groups(net, (), lr=0.1, weight_decay=0.1)
    assert [len(group["params"]) for group in groups] == [1, 2]
    assert groups[0]["params"][0] is net[1].weight
