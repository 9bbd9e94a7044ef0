"""`ckptool.load_partial` on live models; the judges are torch's own `load_state_dict`, and one step of training."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import bits, compiled, seed_torch
from torch import nn

import ckptool
from ckptool.errors import CollisionError, StrictError, UsageError

Saved = Callable[..., Path]


def net(classes: int = 6, seed: int = 0) -> nn.Sequential:
    seed_torch(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, classes))


def content(model: nn.Module) -> dict[str, bytes]:
    """All values of a model, buffers that are in no state_dict included."""
    tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    return {name: bits(value) for name, value in tensors.items()}


def places(model: nn.Module) -> dict[str, tuple[int, int]]:
    tensors = model.state_dict(keep_vars=True)
    return {key: (id(value), value.data_ptr()) for key, value in tensors.items()}


@pytest.fixture
def pretrained(saved: Saved) -> Path:
    """A state_dict of 1000 classes whose every value differs from a fresh model's."""
    model = net(1000, seed=7)
    model(torch.randn(8, 3, 4, 4))
    return saved(model.state_dict(), "pretrained.pth")


class Tied(nn.Module):
    def __init__(self, count: int = 10) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(count, 4), nn.Linear(4, count, bias=False)
        self.head.weight = self.embed.weight


class Extra(nn.Module):
    def __init__(self, state: Any) -> None:
        super().__init__()
        self.inner, self.state = nn.Linear(2, 2), state

    def get_extra_state(self) -> Any:
        return self.state

    def set_extra_state(self, state: Any) -> None:
        self.state = state


# --- what is loaded ----------------------------------------------------------------------------------------------


def test_what_fits_is_copied_in_place_and_the_rest_stays_as_it_was(pretrained: Path) -> None:
    model, before = net(), net()
    where = places(model)
    report = ckptool.load_partial(model, pretrained)
    fitting = {key: value for key, value in torch.load(pretrained).items() if not key.startswith("3.")}
    before.load_state_dict(fitting, strict=False)
    assert content(model) == content(before)
    assert places(model) == where
    assert report.loaded == list(fitting)
    assert report.mismatched == ["3.weight", "3.bias"]
    assert (report.missing, report.unexpected, report.initialised) == ([], [], [])
    assert "3.weight  6x16, source 1000x16" in report.summary()


def test_an_equal_model_gets_what_load_state_dict_would_give_it(saved: Saved) -> None:
    model, other, judge = net(6), net(6, seed=3), net(6)
    path = saved(other.state_dict())
    judge.load_state_dict(torch.load(path))
    report = ckptool.load_partial(model, path, strict=True)
    assert content(model) == content(judge)
    assert report.loaded_fraction == 1.0


def test_adapters_rules_and_init_work_together_on_a_live_model(saved: Saved) -> None:
    old = net(1000, seed=7)
    path = saved({f"encoder.{key}": value for key, value in old.state_dict().items()})
    model = net(6)
    report = ckptool.load_partial(
        model,
        path,
        rules=[[r"^encoder\.", ""]],
        adapt={"3.weight": "rows"},
        init={"3.bias": "ones"},
    )
    assert torch.equal(model[3].weight, old[3].weight[:6])
    assert model[3].bias.tolist() == [1.0] * 6
    rows = {row.key: row for row in report.rows}
    assert (rows["3.weight"].reason, rows["3.weight"].shape, rows["3.weight"].source_shape) == (
        "adapted", [6, 16], [1000, 16],
    )  # fmt: skip
    assert rows["3.weight"].source == "encoder.3.weight"
    assert rows["3.bias"].reason == "initialised"


def test_without_a_source_a_model_is_initialised_anew_and_the_same_seed_gives_the_same(pretrained: Path) -> None:
    models = [net(seed=seed) for seed in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        report = ckptool.load_partial(model, None, init_preset="kaiming", seed=seed)
        assert report.loaded == []
    assert content(models[0]) == content(models[1]) != content(models[2])
    assert models[0][1].weight.tolist() == [1.0] * 4
    assert models[0][1].num_batches_tracked == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_values_take_the_models_dtype(pretrained: Path, dtype: torch.dtype) -> None:
    model, judge = net().to(dtype), net().to(dtype)
    report = ckptool.load_partial(model, pretrained, adapt={"3.*": "rows"})
    theirs = torch.load(pretrained)
    judge.load_state_dict({key: value[:6] if key.startswith("3.") else value for key, value in theirs.items()})
    assert content(model) == content(judge)
    assert {value.dtype for value in model.parameters()} == {dtype}
    assert report.counts["cast"] == 6


def test_values_that_become_infinite_are_told(saved: Saved) -> None:
    path = saved({"weight": torch.tensor([[1e6, 1.0]]), "bias": torch.zeros(1)})
    report = ckptool.load_partial(nn.Linear(2, 1).half(), path)
    assert report.overflowed == {"weight": 1}
    assert "no longer finite" in report.summary()


def test_a_checkpoint_from_a_gpu_loads_on_a_machine_without_one(saved: Saved) -> None:
    path = saved(net(6, seed=5).state_dict())
    tagged = ckptool.open(path)
    ckptool.save(tagged, "gpu.pth", map_location="cuda:1")
    assert {tensor.location for tensor in ckptool.open("gpu.pth").state_dict().values()} == {"cuda:1"}
    for options in ({}, {"assign": True}, {"assign": True, "map_location": "cpu"}, {"map_location": "cpu"}):
        model = net()
        ckptool.load_partial(model, "gpu.pth", **options)
        assert content(model) == content(net(6, seed=5))


def test_map_location_takes_what_torch_load_takes(saved: Saved) -> None:
    path = saved(net(6, seed=5).state_dict())
    for where in ("meta", torch.device("meta")):
        model = net()
        ckptool.load_partial(model, path, assign=True, map_location=where)
        assert all(value.is_meta for value in model.parameters())
    for where in ({"cuda:0": "cpu"}, lambda storage, tag: storage):
        model = net()
        ckptool.load_partial(model, path, assign=True, map_location=where)
        assert content(model) == content(net(6, seed=5))


def test_requires_grad_stays_what_the_model_says(pretrained: Path) -> None:
    for assign in (False, True):
        model = net()
        model[0].weight.requires_grad = False
        ckptool.load_partial(model, pretrained, assign=assign, init={"3.*": "zeros"})
        assert [value.requires_grad for value in model.parameters()] == [False, *[True] * 5]
        assert all(value.is_leaf for value in model.parameters())


# --- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wishes",
    [
        {"adapt": {"3.weight": "crop", "0.weight": "pos-embed:to=9x9"}},
        {"init": {"3.bias": "xavier_uniform"}},
        {"init": {"3.bias": "nonsense"}},
        {"adapt": {"*": "nonsense"}},
        {"init_preset": "nonsense"},
        {"freeze": "nothing.*"},
        {"strip_prefix": "nothing."},
        {"rules": [["nothing", ""]]},
        {"optimizer": "remap"},
        {"optimizer": "nonsense"},
        {"strict": True},
    ],
)
def test_a_refusal_leaves_every_parameter_untouched(pretrained: Path, wishes: dict[str, Any]) -> None:
    model = net()
    before, where = content(model), places(model)
    with pytest.raises((UsageError, StrictError)):
        ckptool.load_partial(model, pretrained, **wishes)
    assert (content(model), places(model)) == (before, where)


def test_a_damaged_source_leaves_every_parameter_untouched(pretrained: Path) -> None:
    raw = bytearray(pretrained.read_bytes())
    Path("cut.pth").write_bytes(raw)
    opened = ckptool.open("cut.pth")
    Path("cut.pth").write_bytes(raw[: len(raw) // 2])
    model = net()
    before = content(model)
    with pytest.raises(ckptool.errors.CkptoolError):
        ckptool.load_partial(model, opened)
    assert content(model) == before


def test_strict_names_all_that_is_wrong_and_the_model(saved: Saved) -> None:
    path = saved({"0.weight": torch.zeros(1), "old": torch.zeros(2)})
    with pytest.raises(StrictError, match=r"(?s)Sequential: .*missing.*unexpected.*mismatched.*") as caught:
        ckptool.load_partial(net(), path, strict=True)
    assert "old" in str(caught.value)
    assert caught.value.exit_code == 2


def test_all_troubles_of_adapters_and_rules_are_named_at_once(pretrained: Path) -> None:
    with pytest.raises(UsageError) as caught:
        ckptool.load_partial(
            net(), pretrained, adapt={"3.weight": "inflate"}, init={"3.bias": "xavier_uniform"}, exclude=["0.*"]
        )
    assert "3.weight: inflate cannot" in str(caught.value)
    assert "3.bias: xavier_uniform needs two dimensions" in str(caught.value)


def test_only_a_module_is_loaded_into(pretrained: Path) -> None:
    with pytest.raises(UsageError, match=r"torch\.nn\.Module, not into a dict"):
        ckptool.load_partial({}, pretrained)


# --- ties, buffers, shared modules -------------------------------------------------------------------------------


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("meta", [False, True])
def test_tied_parameters_stay_one_parameter(saved: Saved, assign: bool, meta: bool) -> None:
    old = Tied(8)
    for tensors in (old.state_dict(), {"embed.weight": old.embed.weight.detach()}, {"head.weight": old.embed.weight}):
        path = saved(tensors)
        with torch.device("meta" if meta else "cpu"):
            model = Tied(8)
        if meta and not assign:
            with pytest.raises(UsageError, match="assign=True"):
                ckptool.load_partial(model, path)
            continue
        where = id(model.embed.weight)
        report = ckptool.load_partial(model, path, assign=assign, strict=True)
        assert model.head.weight is model.embed.weight
        assert (id(model.embed.weight) == where) is not assign
        assert torch.equal(model.embed.weight, old.embed.weight)
        assert report.loaded == ["embed.weight", "head.weight"]


@pytest.mark.parametrize("assign", [False, True])
def test_tied_parameters_stay_one_when_adapted_and_when_initialised(saved: Saved, assign: bool) -> None:
    old = Tied(8)
    for adapt in ({"embed.weight": "rows:fill=zero"}, {"*": "rows:fill=zero"}):
        model = Tied(10)
        report = ckptool.load_partial(model, saved(old.state_dict()), adapt=adapt, assign=assign, strict=True)
        assert model.head.weight is model.embed.weight
        assert torch.equal(model.head.weight[:8], old.embed.weight)
        assert not model.head.weight[8:].any()
        assert report.loaded == ["embed.weight", "head.weight"]
    ckptool.load_partial(model, None, init={"*": "constant(0.5)"}, assign=assign)
    assert model.head.weight is model.embed.weight
    assert set(model.embed.weight.flatten().tolist()) == {0.5}


def test_tied_names_with_two_values_are_refused(saved: Saved) -> None:
    path = saved({"embed.weight": torch.zeros(10, 4), "head.weight": torch.ones(10, 4)})
    model = Tied()
    before = content(model)
    with pytest.raises(CollisionError):
        ckptool.load_partial(model, path)
    assert content(model) == before


def test_a_module_of_two_names_is_loaded_once(saved: Saved) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(2, 2)
            self.two = self.one

    old, model = Twice(), Twice()
    for assign in (False, True):
        ckptool.load_partial(model, saved(old.state_dict()), assign=assign)
        assert model.one is model.two
        assert torch.equal(model.two.weight, old.one.weight)
        assert len(list(model.parameters())) == 2


def test_buffers_load_and_those_that_are_in_no_state_dict_stay(saved: Saved) -> None:
    class Buffers(nn.Module):
        def __init__(self, value: float) -> None:
            super().__init__()
            self.register_buffer("kept", torch.full((2,), value))
            self.register_buffer("own", torch.full((2,), value), persistent=False)

    model = Buffers(1.0)
    report = ckptool.load_partial(model, saved(Buffers(2.0).state_dict()), strict=True)
    assert (model.kept.tolist(), model.own.tolist()) == ([2.0, 2.0], [1.0, 1.0])
    assert report.loaded == ["kept"]


def test_counters_load_and_their_absence_is_bookkeeping(saved: Saved, pretrained: Path) -> None:
    model = net()
    ckptool.load_partial(model, pretrained)
    assert model[1].num_batches_tracked == 1
    tensors = {key: value for key, value in torch.load(pretrained).items() if "num_batches" not in key}
    report = ckptool.load_partial(model, saved({**net(6).state_dict(), **tensors}, "x.pth"), exclude=["3.*"])
    plain = {key: value for key, value in net(6).state_dict().items() if "num_batches" not in key}
    report = ckptool.load_partial(model, saved(plain, "y.pth"), strict=True)
    assert report.counts["bookkeeping"] == 1


def test_views_of_one_storage_in_a_model_are_filled_each_in_its_place(saved: Saved) -> None:
    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            whole = torch.zeros(4, 4)
            self.register_buffer("rows", whole[1:3])
            self.register_buffer("turned", torch.zeros(2, 3).T)

    model = Views()
    new = {"rows": torch.rand(2, 4), "turned": torch.rand(3, 2)}
    ckptool.load_partial(model, saved(new))
    assert all(torch.equal(model.state_dict()[key], value) for key, value in new.items())
    assert model.turned.stride() == (1, 3)


# --- extra state -------------------------------------------------------------------------------------------------


def test_extra_state_goes_through_set_extra_state(saved: Saved) -> None:
    states = [
        {"step": 5, "scale": torch.arange(3.0)}, [1, (2.5, "x")], None, torch.arange(5.0), torch.tensor(3), "text",
    ]  # fmt: skip
    for state in states:
        path = saved(nn.Sequential(Extra(state)).state_dict())
        for own in ({"step": 1}, torch.zeros(2), torch.zeros(5)):
            model, judge = nn.Sequential(Extra(own)), nn.Sequential(Extra(copy.deepcopy(own)))
            judge.load_state_dict(torch.load(path))
            report = ckptool.load_partial(model, path)
            assert repr(model[0].state) == repr(judge[0].state)
            assert "0._extra_state" in report.loaded
            assert [row.key for row in report.rows].count("0._extra_state") == 1


def test_extra_state_follows_rules_prefixes_and_the_choice_of_keys(saved: Saved) -> None:
    tensors = {f"encoder.{key}": value for key, value in Extra({"a": 2}).state_dict().items()}
    path = saved(tensors)
    for wishes in (
        {"rules": [[r"^encoder\.", ""]]},
        {"strip_prefix": "encoder."},
    ):
        model = Extra({"a": 1})
        ckptool.load_partial(model, path, **wishes)
        assert model.state == {"a": 2}
        assert torch.equal(model.inner.weight, tensors["encoder.inner.weight"])
    model = Extra({"a": 1})
    report = ckptool.load_partial(model, path, strip_prefix="encoder.", exclude=["_extra_state"])
    assert model.state == {"a": 1}
    assert "_extra_state" not in report.loaded


def test_an_extra_state_of_a_foreign_class_stays_the_models_own(saved: Saved) -> None:
    path = saved(Extra(Path("x")).state_dict())
    model = Extra({"a": 1})
    report = ckptool.load_partial(model, path)
    assert model.state == {"a": 1}
    assert report.loaded == ["inner.weight", "inner.bias"]


def test_a_module_that_refuses_its_extra_state_leaves_every_parameter_untouched(saved: Saved) -> None:
    class Refusing(Extra):
        def set_extra_state(self, state: Any) -> None:
            raise ValueError("not mine")

    path = saved(nn.Sequential(Extra({"a": 1}), Extra({"a": 2})).state_dict())
    model = nn.Sequential(Extra({"a": 3}), Refusing({"a": 4}))
    before = content(model)
    with pytest.raises(UsageError, match=r"1\._extra_state: set_extra_state: ValueError: not mine"):
        ckptool.load_partial(model, path)
    assert content(model) == before
    assert [part.state for part in model] == [{"a": 3}, {"a": 4}]


def test_the_plan_of_a_live_model_can_be_saved_with_its_extra_state(saved: Saved) -> None:
    path = saved(Extra({"a": 2, "t": torch.ones(2)}).state_dict(), "source.pth")
    model = Extra({"a": 1})
    before = content(model)
    planned, _ = ckptool.plan_partial(path, model)
    ckptool.save(planned, "plan.pth")
    loaded = torch.load("plan.pth")
    assert repr(dict(loaded)) == repr(dict(torch.load(path)))
    assert loaded._metadata == model.state_dict()._metadata
    assert content(model) == before
    model.load_state_dict(loaded)


# --- lazy, meta --------------------------------------------------------------------------------------------------


def test_a_lazy_layer_takes_its_shape_from_the_source(saved: Saved) -> None:
    old = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 6))
    for seed_init in ({}, {"init_preset": "kaiming"}):
        lazy = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(6))
        report = ckptool.load_partial(lazy, saved(old.state_dict()), strict=True, **seed_init)
        images = torch.randn(2, 3, 4, 4)
        assert torch.equal(lazy.eval()(images), old.eval()(images))
        assert report.loaded == list(old.state_dict())


def test_a_lazy_layer_whose_output_differs_stays_lazy(saved: Saved, pretrained: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(6))
    report = ckptool.load_partial(model, pretrained)
    assert report.mismatched == ["3.weight", "3.bias"]
    assert nn.parameter.is_lazy(model[3].weight)
    assert model(torch.zeros(2, 3, 4, 4)).shape == (2, 6)
    path = saved(nn.Sequential(nn.ConvTranspose2d(4, 8, 3), nn.Linear(2, 2)).state_dict())
    turned = nn.Sequential(nn.LazyConvTranspose2d(8, 3), nn.Linear(2, 2))
    assert len(ckptool.load_partial(turned, path).loaded) == 4
    assert turned[0].weight.shape == (4, 8, 3, 3)
    for other in (nn.LazyConvTranspose2d(7, 3), nn.LazyConvTranspose2d(8, 5), nn.LazyConv2d(8, 3)):
        report = ckptool.load_partial(nn.Sequential(other, nn.Linear(2, 2)), path)
        assert "0.weight" in report.mismatched


def test_a_lazy_parameter_that_the_source_lacks_is_missing(saved: Saved) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(3))
    path = saved(nn.Sequential(nn.Linear(2, 2)).state_dict())
    report = ckptool.load_partial(model, path, freeze="loaded")
    assert report.missing == ["1.weight", "1.bias"]
    assert model(torch.zeros(1, 2)).shape == (1, 3)
    with pytest.raises(StrictError):
        ckptool.load_partial(nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(3)), path, strict=True)


def test_a_model_on_meta_becomes_real(pretrained: Path) -> None:
    with torch.device("meta"):
        model = net()
    report = ckptool.load_partial(model, pretrained, assign=True, adapt={"3.weight": "rows"}, init={"3.bias": "zeros"})
    judge = net()
    judge.load_state_dict(
        {key: value[:6] * (key != "3.bias") if key.startswith("3.") else value
         for key, value in torch.load(pretrained).items()}
    )  # fmt: skip
    assert content(model) == content(judge)
    assert all(isinstance(value, nn.Parameter) and value.requires_grad for value in model.parameters())
    assert len(report.loaded) == 8
    model(torch.zeros(2, 3, 4, 4)).sum().backward()


def test_what_would_stay_on_meta_is_refused_by_name(saved: Saved, pretrained: Path) -> None:
    with torch.device("meta"):
        model = net()
    with pytest.raises(UsageError, match=r"3\.weight.*3\.bias"):
        ckptool.load_partial(model, pretrained, assign=True)
    with pytest.raises(UsageError, match="assign=True"):
        ckptool.load_partial(model, pretrained, init={"3.*": "zeros"})
    with pytest.raises(UsageError, match="on meta and has no values to keep: name another fill"):
        ckptool.load_partial(net(1001).to("meta"), pretrained, assign=True, adapt={"3.*": "rows"})
    assert all(value.is_meta for value in model.parameters())
    holder = nn.Linear(2, 2)
    holder.register_buffer("table", torch.zeros(2), persistent=False)
    path = saved(holder.state_dict())
    with pytest.raises(UsageError, match=r"would stay on meta.*: table; give them values first"):
        ckptool.load_partial(holder.to("meta"), path, assign=True)
    holder.table = torch.zeros(2)
    ckptool.load_partial(holder, path, assign=True, strict=True)
    assert not holder.weight.is_meta


def test_assigned_tensors_live_where_the_model_lives_and_buffers_are_no_parameters(pretrained: Path) -> None:
    model = net()
    old = dict(model.named_parameters())
    ckptool.load_partial(model, pretrained, assign=True)
    new = dict(model.named_parameters())
    assert [name for name in old if new[name] is old[name]] == ["3.weight", "3.bias"]
    assert not isinstance(model[1].running_mean, nn.Parameter)
    assert not model[1].running_mean.requires_grad


# --- models of their own mind ------------------------------------------------------------------------------------


def test_wrappers_are_looked_through_on_both_sides(saved: Saved) -> None:
    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    old = net(6, seed=3)
    wrapped = [Wrapper(net()), compiled(net()), compiled(Wrapper(net())), nn.DataParallel(net()), net()]
    for source in (old, Wrapper(old), compiled(old)):
        path = saved(source.state_dict())
        for model in wrapped:
            ckptool.load_partial(model, None, init={"*weight": "zeros"})
            report = ckptool.load_partial(model, path, strict=True)
            assert list(content(model).values()) == list(content(old).values())
            assert report.loaded == list(model.state_dict())


def test_a_module_with_a_load_of_its_own_gets_all_its_keys(saved: Saved) -> None:
    class Doubling(nn.Linear):
        def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
            state_dict[f"{prefix}weight"], state_dict[f"{prefix}bias"]  # as torch's quantised modules take them
            super()._load_from_state_dict(state_dict, prefix, *args)

    model = nn.Sequential(Doubling(2, 2))
    bias = model[0].bias.detach().clone()
    ckptool.load_partial(model, saved({"0.weight": torch.ones(2, 2)}))
    assert model[0].weight.tolist() == [[1, 1], [1, 1]]
    assert torch.equal(model[0].bias, bias)


@pytest.mark.filterwarnings("ignore")
def test_quantised_and_sparse_parameters_stay_as_they_are(saved: Saved) -> None:
    linear = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    model = torch.ao.quantization.quantize_dynamic(linear, {"0"}, dtype=torch.qint8)
    before = model(torch.ones(1, 4)), repr(model[0].weight())
    ckptool.load_partial(model, saved({"1.bias": model[1].bias.detach() + 1, "0.weight": torch.ones(4, 4)}))
    assert torch.allclose(model(torch.ones(1, 4)), before[0] + 1)
    assert repr(model[0].weight()) == before[1]
    sparse = nn.Linear(4, 4)
    sparse.weight = nn.Parameter(torch.eye(4).to_sparse())
    for assign in (False, True):
        weight = sparse.weight
        report = ckptool.load_partial(sparse, saved({"weight": torch.ones(4, 4), "bias": torch.ones(4)}), assign=assign)
        assert sparse.weight is weight
        assert torch.equal(weight.to_dense(), torch.eye(4))
        assert (report.loaded, report.mismatched) == (["bias"], ["weight"])


@pytest.mark.parametrize("assign", [False, True])
def test_hooks_that_rename_keys_are_followed(saved: Saved, assign: bool) -> None:
    def renamed(module: nn.Module, state: Any, prefix: str, metadata: Any) -> None:
        for name in ("weight", "bias"):
            state[f"{prefix}old_{name}"] = state.pop(f"{prefix}{name}")

    model = nn.Sequential(nn.Linear(2, 2))
    model[0]._register_state_dict_hook(renamed)
    path = saved({"0.old_weight": torch.ones(2, 2)})
    report = ckptool.load_partial(model, path, init={"0.old_bias": "zeros"}, assign=assign)
    assert (model[0].weight.tolist(), model[0].bias.tolist()) == ([[1, 1], [1, 1]], [0, 0])
    assert report.loaded == ["0.old_weight"]
    groups = report.param_groups(model, lr=1.0)
    firsts = [(group["name"], group["params"][0]) for group in groups]
    assert [(name, first is value) for (name, first), value in zip(firsts, model.parameters(), strict=True)] == [
        ("loaded", True), ("new_no_decay", True),
    ]  # fmt: skip
    assert report.freeze(model) == ["0.weight"]


def test_a_class_named_like_torchs_is_not_taken_for_it(saved: Saved) -> None:
    class Embedding(nn.Module):  # (in, out) and a bias: torch's has none
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(3, 5))

    class Head(nn.Linear):
        pass

    seed_torch(0)
    model = nn.ModuleDict({"stem": Embedding(), "head": Head(400, 300)})
    report = ckptool.load_partial(model, None, init={"*": "default"})
    rules = {row.key: row.detail for row in report.rows}
    assert rules["stem.weight"] == "default: kaiming_uniform(a=sqrt(5))"
    assert rules["head.bias"] == "default: uniform(-0.05,0.05)"


# --- handing over to training ------------------------------------------------------------------------------------


def test_a_step_moves_only_what_it_should(pretrained: Path) -> None:
    model = net()
    report = ckptool.load_partial(model, pretrained, init={"3.*": "default"})
    assert report.freeze(model, "0.*") == ["0.weight", "0.bias"]
    optimizer = torch.optim.AdamW(report.param_groups(model, lr=1e-3, new_lr_mult=10, weight_decay=1e-4))
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    nn.functional.cross_entropy(model(torch.randn(8, 3, 4, 4)), torch.arange(8) % 6).backward()
    optimizer.step()
    moved = [name for name, value in model.named_parameters() if not torch.equal(value, before[name])]
    assert moved == ["1.weight", "1.bias", "3.weight", "3.bias"]
    step = {name: (value.detach() - before[name]).abs().max().item() for name, value in model.named_parameters()}
    assert step["3.bias"] == pytest.approx(1e-2, rel=0.01)  # Adam's first step is the learning rate
    assert step["1.bias"] == pytest.approx(1e-3, rel=0.01)


def test_freeze_without_a_word_freezes_what_was_loaded_and_names_moving_batch_norms(pretrained: Path) -> None:
    model = net()
    report = ckptool.load_partial(model, pretrained)
    assert report.freeze(model) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert (report.frozen, report.moving) == (["0.weight", "0.bias", "1.weight", "1.bias"], ["1"])
    groups = report.param_groups(model, lr=1.0)
    assert [group["name"] for group in groups] == ["new", "new_no_decay"]
    statistics = model[1].running_mean.clone()
    model.train()(torch.randn(4, 3, 4, 4))
    assert not torch.equal(model[1].running_mean, statistics)


def test_freeze_as_planned_and_first_blocks_of_a_live_model(pretrained: Path) -> None:
    model = net()
    report = ckptool.load_partial(model, pretrained, freeze=["first:2"])
    assert (report.frozen, report.moving) == (["0.weight", "0.bias", "1.weight", "1.bias"], ["1"])
    assert all(value.requires_grad for value in model.parameters())
    assert report.freeze(model) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    # Keys of a model are in its own order even where they happen to be sorted, as those of a file may be.
    ordered = nn.ModuleDict({name: nn.Linear(2, 2, bias=False) for name in ("a1", "b1", "c", "d", "e")})
    blocks = nn.ModuleDict({"a": nn.ModuleList([ordered]), "b": nn.ModuleList([nn.Linear(2, 2, bias=False)])})
    planned = ckptool.load_partial(blocks, None, init={"*": "zeros"}, freeze="first:1")
    assert planned.frozen == [f"a.0.{name}.weight" for name in ordered]


def test_a_model_wrapped_after_loading_keeps_its_groups_and_frozen_layers(pretrained: Path) -> None:
    model = net()
    report = ckptool.load_partial(model, pretrained, freeze="0.*")
    wrapped = compiled(nn.DataParallel(model))
    groups = report.param_groups(wrapped, lr=1.0)
    assert [(group["name"], len(group["params"])) for group in groups] == [
        (group["name"], len(group["params"])) for group in report.param_groups(model, lr=1.0)
    ]
    assert report.freeze(wrapped) == ["_orig_mod.module.0.weight", "_orig_mod.module.0.bias"]
    assert not model[0].weight.requires_grad


def test_freezing_what_a_model_lacks_is_refused_before_anything_is_touched(pretrained: Path) -> None:
    report = ckptool.load_partial(net(), pretrained)
    for model, specs in ((net(), ["nothing"]), (nn.Linear(2, 2), [])):
        with pytest.raises(UsageError):
            report.freeze(model, *specs)
        assert all(value.requires_grad for value in model.parameters())
