"""Whole models whose state is not in `_parameters`, and classes that stand in the pickle."""

from __future__ import annotations

import pickle
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import Run, Saved
from torch import fx, nn
from torch.ao import quantization
from torch.ao.nn import quantized as nnq
from torch.ao.quantization import quantize_fx

import ckptool
from ckptool.core.tensor import TensorInfo
from ckptool.errors import FormatError, LossError

pytestmark = pytest.mark.filterwarnings("ignore")


class Added(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.quant, self.dequant = quantization.QuantStub(), quantization.DeQuantStub()
        self.fc = nn.Linear(4, 4)
        self.add = nnq.FloatFunctional()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.quant(x)
        return self.dequant(self.add.add(self.fc(x), x))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 3, 2, bidirectional=True)
        self.cell = nn.GRUCell(4, 3)
        self.head = nn.Linear(3, 2)


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(2, 2)
        self.w = nn.Parameter(torch.ones(2))
        self.register_buffer("b", torch.ones(2))

    def forward(self, x):  # type: ignore[no-untyped-def]  # fx pickles no annotation that is a text
        return self.a(x) * self.w + self.b


def static(net: nn.Module, *shape: int) -> nn.Module:
    net.eval().qconfig = quantization.get_default_qconfig("fbgemm")
    ready = quantization.prepare(net)
    ready(torch.randn(*shape))
    return quantization.convert(ready)


def static_convolutions() -> nn.Module:
    layers = (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1, bias=False))
    return static(nn.Sequential(quantization.QuantStub(), *layers, quantization.DeQuantStub()), 1, 3, 8, 8)


def embeddings() -> nn.Module:
    net = nn.ModuleDict({"emb": nn.Embedding(6, 4), "bag": nn.EmbeddingBag(5, 4, mode="sum")}).eval()
    net["emb"].qconfig = quantization.float_qparams_weight_only_qconfig
    net["bag"].qconfig = quantization.float_qparams_weight_only_qconfig_4bit
    return quantization.convert(quantization.prepare(net))


def quantised_graph(reference: bool = False) -> nn.Module:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).eval()
    example = (torch.randn(1, 3, 8, 8),)
    ready = quantize_fx.prepare_fx(net, quantization.get_default_qconfig_mapping("fbgemm"), example)
    ready(*example)
    return quantize_fx.convert_to_reference_fx(ready) if reference else quantize_fx.convert_fx(ready)


def dynamic(net: nn.Module, dtype: torch.dtype = torch.qint8) -> nn.Module:
    kinds = {nn.Linear, nn.LSTM, nn.GRU, nn.GRUCell}
    return quantization.quantize_dynamic(net, kinds, dtype=dtype)


GRAPHS = ("compiled graph", "reference graph")
"""What takes long to make, and is as other graphs are."""

MODELS: dict[str, Callable[[], nn.Module]] = {
    "static linear": lambda: static(Added(), 2, 4),
    "static convolutions": static_convolutions,
    "one quantised layer": lambda: static_convolutions()[1],
    "dynamic": lambda: dynamic(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.LayerNorm(3))),
    "dynamic recurrent": lambda: dynamic(Recurrent()),
    "dynamic recurrent float16": lambda: dynamic(Recurrent(), torch.float16),
    "embeddings": embeddings,
    "graph": lambda: fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())),
    "graph in a model": lambda: nn.Sequential(fx.symbolic_trace(Inner()), nn.Linear(2, 2)),
    "compiled graph": lambda: torch.compile(fx.symbolic_trace(Inner())),
    "graph in DataParallel": lambda: nn.DataParallel(fx.symbolic_trace(Inner())),
    "quantised graph": quantised_graph,
    "reference graph": lambda: quantised_graph(reference=True),
    "lazy": lambda: nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d()),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in GRAPHS else []) for name in MODELS]
)
def test_the_keys_are_exactly_those_of_the_live_state_dict(name: str, saved: Saved) -> None:
    torch.manual_seed(0)
    model = MODELS[name]()
    live = model.state_dict()
    state = ckptool.open(saved(live, "state.pth"))
    for content in (model, {"epoch": 3, "model": model}):
        opened = ckptool.open(saved(content))
        assert list(opened.entries()) == list(live)
        if opened.state_dict():
            ours, theirs = (ckptool.inspect(one, hashes=True) for one in (opened, state))
            assert ours.hash == theirs.hash is not None
            assert [row.key for row in ours.inside] or not any(map(state.hidden().get, live))


def test_a_quantised_model_written_as_its_state_dict_loads_strictly(saved: Saved, run: Run) -> None:
    for model, fresh in (
        (dynamic(nn.Sequential(nn.Linear(4, 3))), dynamic(nn.Sequential(nn.Linear(4, 3)))),
        (static(Added(), 2, 4), static(Added(), 2, 4)),
        (static_convolutions(), static_convolutions()),
    ):
        saved(model)
        assert run("filter", "saved.pth", "-o", "out.pth", "--force")[0] == 0
        written = torch.load("out.pth", weights_only=False)
        assert list(written) == list(model.state_dict())
        assert written._metadata == model.state_dict()._metadata
        fresh.load_state_dict(written, strict=True)
        example = torch.randn(1, 3, 8, 8) if isinstance(model, nn.Sequential) and len(model) > 1 else torch.randn(2, 4)
        assert torch.equal(fresh(example), model(example))


def test_formats_of_bare_tensors_refuse_packed_parameters_of_a_whole_model(saved: Saved, run: Run) -> None:
    saved(MODELS["static linear"]())
    code, _, err = run("convert", "saved.pth", "-o", "out.safetensors")
    assert (code, "fc._packed_params._packed_params (an object with 2 tensors)" in err) == (2, True)


def test_a_traced_model_converts_and_matches_its_original(saved: Saved, run: Run) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    saved(net.state_dict(), "target.pth")
    saved(fx.symbolic_trace(net), "graph.pth")
    assert run("diff", "graph.pth", "target.pth", "--values")[0] == 0
    code, out, _ = run("filter", "graph.pth", "--match", "target.pth", "-o", "out.pth")
    assert (code, "7 loaded" in out) == (0, True)


class Packs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(3))

    def __getstate__(self) -> Any:
        return {"packed": [self.w.detach()], "bits": 8}

    def __setstate__(self, state: Any) -> None:
        nn.Module.__init__(self)
        self.w = nn.Parameter(state["packed"][0])


def test_a_submodule_with_a_state_of_its_own_is_an_entry_that_names_it(saved: Saved, run: Run) -> None:
    saved(nn.Sequential(nn.Linear(2, 2), Packs()))
    entry = f"1.<state of {Packs.__module__}.Packs>"
    opened = ckptool.open("saved.pth")
    assert list(opened.entries()) == [entry, "0.weight", "0.bias"]
    assert entry in run("inspect", "saved.pth")[1]
    with pytest.raises(LossError, match="state of"):
        ckptool.convert("saved.pth", "out.safetensors")
    assert run("filter", "saved.pth", "-o", "out.pth")[0] == 0
    assert entry in torch.load("out.pth", weights_only=False)


def test_tensors_in_attributes_of_a_model_are_named_as_left_out(saved: Saved) -> None:
    net = nn.Linear(2, 2)
    net.history = [torch.ones(2), {"deep": torch.zeros(3)}]
    net.same = [net.weight]
    saved(net)
    assert ckptool.inspect("saved.pth").loose == ["history"]
    assert "history" in ckptool.convert("saved.pth", "out.safetensors").left_out


def test_what_differs_only_inside_packed_parameters_is_told(saved: Saved, run: Run) -> None:
    for name, seed in (("a.pth", 0), ("b.pth", 1)):
        torch.manual_seed(0)
        conv = nn.Conv2d(3, 4, 3)
        torch.manual_seed(seed)
        saved(dynamic(nn.Sequential(conv, nn.Linear(4, 4))).state_dict(), name)
    report = ckptool.diff("a.pth", "b.pth", values=True)
    a, b = (torch.load(name, weights_only=False)["1._packed_params._packed_params"][0] for name in ("a.pth", "b.pth"))
    assert report.values[0].max_abs == pytest.approx((a.dequantize() - b.dequantize()).abs().max().item())
    for options in ((), ("--values",), ("--quick",)):
        code, out, _ = run("diff", "a.pth", "b.pth", *options)
        assert (code, "1._packed_params._packed_params/0" in out) == (1, True)
    hashes = {run("inspect", name, "--hash")[1].split("hash")[1].split()[0] for name in ("a.pth", "b.pth")}
    assert len(hashes) == 2


def per_channel(x: torch.Tensor, axis: int, dtype: torch.dtype, zero: torch.Tensor | None = None) -> torch.Tensor:
    count = x.shape[axis]
    zeros = torch.arange(count) if zero is None else zero
    return torch.quantize_per_channel(x, torch.rand(count) * 0.1 + 0.05, zeros, axis, dtype)


@pytest.mark.parametrize(
    "made",
    [
        lambda x: torch.quantize_per_tensor(x, 0.1, 3, torch.quint8),
        lambda x: torch.quantize_per_tensor(x, 1e-6, -5, torch.qint32),
        lambda x: per_channel(x, 0, torch.qint8),
        lambda x: per_channel(x, 1, torch.quint8),
        lambda x: per_channel(x[None].contiguous(memory_format=torch.channels_last), 1, torch.qint8),
        lambda x: per_channel(x[:, :, 0].contiguous(), 0, torch.quint8, torch.rand(4) * 9),
        lambda x: per_channel(x[:, :, 0].contiguous(), 0, torch.quint4x2, torch.rand(4) * 9),
    ],
)
def test_quantised_values_are_those_that_torch_dequantises(
    made: Callable[[torch.Tensor], torch.Tensor], saved: Saved
) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 5)
    one = made(x)
    saved({"w": one}, "a.pth")
    saved({"w": one.dequantize()}, "same.pth")
    saved({"w": one.dequantize() * 2}, "twice.pth")
    assert not ckptool.diff("a.pth", "same.pth", values=True, rtol=1e-6, atol=1e-6).found()["values"]
    [row] = ckptool.diff("a.pth", "twice.pth", values=True).values
    assert row.max_abs == pytest.approx(one.dequantize().abs().max().item(), rel=1e-6)


# --- classes inside the pickle -----------------------------------------------------------------------------------


def make_class(maker: type, name: str, bases: tuple[type, ...], attributes: dict[str, Any]) -> type:
    return maker(name, bases, attributes)


def fill_class(made: type, attributes: dict[str, Any]) -> None:
    for name, value in attributes.items():
        setattr(made, name, value)


class ByValue(pickle.Pickler):
    """Pickles the classes of a module that is gone by value, as cloudpickle does: a call, and one that fills it."""

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, type) or obj.__module__ != "gone":
            return NotImplemented
        args = type(obj), obj.__name__, obj.__bases__, {"__module__": "gone"}
        state = {"tag": obj.tag, "table": obj.table}
        return make_class, args, state, None, None, fill_class


def by_value() -> types.ModuleType:
    module = types.ModuleType("by_value")
    module.__dict__.update({name: value for name, value in vars(pickle).items() if not name.startswith("__")})
    module.Pickler = ByValue  # type: ignore[attr-defined]
    return module


def gone_net() -> type:
    return type("Net", (nn.Sequential,), {"__module__": "gone", "tag": "net", "table": [1, 2]})


def gone_config(base: type = object) -> type:
    return type("Config", (base,), {"__module__": "gone", "tag": "config", "table": {"lr": 0.1}})


@pytest.mark.parametrize("options", [{}, {"pickle_protocol": 4}, {"_use_new_zipfile_serialization": False}])
def test_a_model_whose_class_is_in_the_pickle_is_read(options: dict[str, Any], saved: Saved, run: Run) -> None:
    net = gone_net()(nn.Linear(4, 3), nn.BatchNorm1d(3))
    saved(net, pickle_module=by_value(), **options)
    opened = ckptool.open("saved.pth")
    assert list(opened.state_dict()) == list(net.state_dict())
    assert run("inspect", "saved.pth")[0] == 0
    assert run("convert", "saved.pth", "-o", "out.safetensors")[0] == 0


def test_a_config_of_such_a_class_stays_beside_the_weights_and_is_written_whole(saved: Saved, run: Run) -> None:
    base = gone_config()
    config = type("Child", (base,), {"__module__": "gone", "tag": "child", "table": [base]})()
    config.lr = 0.5
    saved({"state_dict": nn.Linear(2, 2).state_dict(), "config": config, "kind": base}, pickle_module=by_value())
    code, out, _ = run("inspect", "saved.pth")
    assert (code, "config: gone.Child(lr=0.5)" in out) == (0, True)
    assert run("remap", "saved.pth", "--rename", "weight=w", "-o", "out.pth")[0] == 0
    again = torch.load("out.pth", weights_only=False)
    made = type(again["config"])
    assert (again["config"].lr, made.__name__, made.tag, made.table) == (0.5, "Child", "child", [again["kind"]])
    assert made.__bases__ == (again["kind"],)
    assert list(again["state_dict"]) == ["w", "bias"]


def test_a_class_that_nothing_is_made_of_keeps_what_fills_it(saved: Saved) -> None:
    saved({"model": {"w": torch.ones(2)}, "kind": gone_config()}, pickle_module=by_value())
    ckptool.save("saved.pth", "out.pth")
    assert torch.load("out.pth", weights_only=False)["kind"].table == {"lr": 0.1}


def test_an_object_of_what_is_no_class_is_refused(tmp_path: Path) -> None:
    for raw in (b"\x80\x02X\x01\x00\x00\x00x)\x81.", b"\x80\x02K\x05)\x81.", b"\x80\x02]q\x00)\x81."):
        (tmp_path / "bad.pkl").write_bytes(raw)
        with pytest.raises(FormatError):
            ckptool.open(tmp_path / "bad.pkl")


def test_no_class_of_the_pickle_is_made(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    saved({"model": {"w": torch.ones(2)}, "config": gone_config()()}, pickle_module=by_value())
    for name in ("make_class", "fill_class"):
        monkeypatch.setattr(sys.modules[__name__], name, lambda *_: called.append("called"))
    with warnings.catch_warnings():
        opened = ckptool.open("saved.pth")
        assert all(isinstance(tensor, TensorInfo) for tensor in opened.state_dict().values())
    assert called == []
