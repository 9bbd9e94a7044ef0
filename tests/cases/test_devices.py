"""Files whose tensors were on devices that this machine lacks: their tags are read, listed, mapped and written."""

from __future__ import annotations

import json
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from oracles import FIXTURES, Run, assert_identical

import ckptool
from ckptool.errors import UsageError
from ckptool.io.source import LocalFile

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")


@contextmanager
def saved_on(tag: Callable[[Any], str]) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", tag)
        yield


def by_size(storage: Any) -> str:
    """The tag of a storage of that size."""
    return {16: "cuda:0", 32: "cuda:1", 4: "mps", 0: "xpu:1"}.get(storage.nbytes(), "cpu")


def write(path: str, tag: Callable[[Any], str] = by_size, zipped: bool = True) -> str:
    base = torch.arange(8.0)
    tree = {
        "a": torch.ones(4), "b": base[:3], "c": base[4:], "0": torch.tensor(1.0),
        "p": torch.nn.Parameter(torch.ones(2)),
        "sparse": torch.eye(2).to_sparse(), "q": torch.quantize_per_tensor(torch.ones(4), 0.5, 1, torch.qint8),
        "m": torch.ones(2, device="meta"), "empty": torch.empty(0),
    }  # fmt: skip
    with saved_on(tag):
        torch.save(tree, path, _use_new_zipfile_serialization=zipped)
    return path


def outcome(load: Callable[[], Any]) -> Any:
    """The devices and values that were loaded, or the error."""
    try:
        return {
            key: (type(one), one.dtype, str(one.device), one.layout, one.stride() if one.layout == torch.strided else 0,
                  None if one.is_meta else (one.int_repr() if one.is_quantized else one.to_dense()).tolist())
            for key, one in load().items()
        }  # fmt: skip
    except Exception as error:
        return type(error).__name__, str(error)


TAGS = ("several", "cpu", "cuda:0", "cuda", "mps", "xpu:1", "meta", "hpu:0", "abc")

CPU = {"cuda:0": "cpu", "cuda:1": "cpu", "mps": "cpu", "xpu:1": "cpu"}
PLACES: dict[str, Any] = {
    "none": None, "cpu": "cpu", "meta": "meta", "cuda": "cuda", "cuda:0": "cuda:0", "mps": "mps", "no device": "gpu",
    "a device": torch.device("cpu"), "meta device": torch.device("meta"), "cuda device": torch.device("cuda", 7),
    "xpu device": torch.device("xpu:0"), "dict": CPU, "no dict": {}, "half a dict": {"cuda:0": "cpu"},
    "dict to meta": OrderedDict(CPU, mps="meta"), "dict to cuda": {"cuda:0": "cuda:1"},
    "defaultdict": defaultdict(lambda: "cpu"),
    "function": lambda storage, tag: storage, "function of none": lambda storage, tag: None,
    "function of some": lambda storage, tag: storage if tag.startswith("cuda") else None,
    "function of copies": lambda storage, tag: storage.clone(), "method": lambda storage, tag: storage.cpu(),
}  # fmt: skip


@pytest.mark.parametrize("tag", TAGS)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_to_torch_does_what_torch_load_does_errors_included(zipped: bool, tag: str) -> None:
    path = write("in.pth", by_size if tag == "several" else lambda storage: tag, zipped)
    opened = ckptool.open(path)
    assert isinstance(outcome(lambda: torch.load(path, map_location="cpu", weights_only=False)), dict)
    for name, where in PLACES.items():
        wanted = outcome(lambda: torch.load(path, map_location=where, weights_only=False))  # noqa: B023
        assert outcome(lambda: opened.to_torch(map_location=where)) == wanted, name  # noqa: B023


@pytest.mark.parametrize("where", [3, b"cpu", ("cpu",), MappingProxyType({"cuda:0": "cpu"})], ids=str)
def test_what_torch_load_cannot_take_is_refused_before_anything_is_read(where: Any) -> None:
    path = write("in.pth")
    with pytest.raises(TypeError):
        torch.load(path, map_location=where)
    with pytest.raises(UsageError, match="map_location is a device, its name, a dict of names or a callable"):
        ckptool.open(path).to_torch(map_location=where)
    with pytest.raises(UsageError, match="map_location returned 'cpu': expected a storage"):
        ckptool.open(path).to_torch(map_location=lambda storage, tag: "cpu")


def test_on_meta_no_byte_of_a_tensor_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"w": torch.ones(1_000_000)}, "in.pth")
    opened = ckptool.open("in.pth")
    sizes: list[int] = []
    plain = LocalFile.read
    monkeypatch.setattr(LocalFile, "read", lambda self, at, n: sizes.append(n) or plain(self, at, n))
    monkeypatch.setattr(LocalFile, "blocks", lambda *_: pytest.fail("read"))
    for where in ("meta", torch.device("meta")):
        assert opened.to_torch(map_location=where)["w"].is_meta
    assert sum(sizes) < 1000


@pytest.fixture
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A machine with cuda:0 and mps, as far as loading goes: what is put there is noted, and stays where it is."""
    put: list[str] = []

    def deserialize(storage: Any, location: str) -> Any:
        if location.startswith("cuda:") and location != "cuda:0":
            raise RuntimeError(f"Attempting to deserialize object on CUDA device {location[5:]} but there is 1")
        if location.startswith(("cuda", "mps")):
            put.append(location)
            return storage
        return None

    registry = torch.serialization._package_registry
    monkeypatch.setattr(torch.serialization, "_package_registry", [(0, None, deserialize), *registry])
    return put


@pytest.mark.parametrize(
    "where",
    [None, "cuda", "cuda:0", "cuda:3", {"cuda:1": "cuda:0"}, {"cuda:1": "cuda:0", "xpu:1": "cpu"}, {"cuda:0": "mps"}],
    ids=str,
)  # fmt: skip
def test_on_a_machine_with_one_gpu_tensors_go_where_torch_load_puts_them(where: Any, one_gpu: list[str]) -> None:
    path = write("in.pth")
    wanted = outcome(lambda: torch.load(path, map_location=where, weights_only=False))
    theirs, one_gpu[:] = list(one_gpu), []
    assert outcome(lambda: ckptool.open(path).to_torch(map_location=where)) == wanted
    assert one_gpu == theirs


def test_a_device_that_is_lacking_is_an_error_only_where_tensors_are_put(one_gpu: list[str]) -> None:
    with saved_on(by_size):
        torch.save({"model": {"w": torch.ones(4)}, "optim": {"state": torch.ones(8)}}, "in.pth")
    opened = ckptool.open("in.pth")
    assert opened.to_torch(only_root=True)["w"].tolist() == [1.0] * 4
    assert one_gpu == ["cuda:0"]
    assert opened.to_torch({"cuda:1": "cpu", "cuda:7": "cuda:7"})["optim"]["state"].tolist() == [1.0] * 8
    with pytest.raises(RuntimeError, match="CUDA device 1"):
        opened.to_torch()
    ckptool.save(opened, "out.pth", map_location="cuda:9")  # a word in the file
    model = torch.nn.ParameterDict({"w": torch.nn.Parameter(torch.zeros(4))})
    ckptool.load_partial(model, "out.pth")
    assert model["w"].tolist() == [1.0] * 4


@pytest.mark.parametrize("to", ["torch", "torch-legacy", "dcp", "sharded-bin"])
def test_tags_of_every_format_that_has_them_are_listed_and_mapped(to: str, run: Run) -> None:
    with saved_on(by_size):
        torch.save({"model": {"w": torch.ones(4), "v": torch.ones(8)}, "optim": {"step": torch.tensor(1.0)}}, "in.pth")
    ckptool.save(ckptool.open("in.pth"), "out", to=to)
    (result,) = json.loads(run("inspect", "out", "--json")[1])["result"]
    beside = [] if to == "sharded-bin" else ["mps"]
    assert (result["devices"], result["device_tags"]) == ({"cuda:0": 1, "cuda:1": 1}, ["cuda:0", "cuda:1", *beside])
    assert f"written from {', '.join(['cuda:0', 'cuda:1', *beside])}\n" in run("inspect", "out")[1]
    args = ("convert", "out", "-o", "cpu", "--to", to, "--map-location")
    assert run(*args, "cuda:1=cuda:0,mps=cpu")[0] == 0
    assert ckptool.inspect("cpu").devices == {"cuda:0": 2}
    assert run(*args, "cpu", "--force")[0] == 0
    assert ckptool.inspect("cpu").device_tags == ["cpu"]
    assert_identical(ckptool.open("cpu").to_torch(only_root=True), {"w": torch.ones(4), "v": torch.ones(8)})


def test_tags_that_change_nothing_are_named(run: Run) -> None:
    write("in.pth", lambda storage: "cuda:0")
    for dry in (["--dry-run"], []):
        out = run(
            "remap", "in.pth", "--drop", "m", "-o", "out.pth", "--map-location", "cuda:1=cuda:0,cuda:0=cpu", *dry
        )[1]
        assert "no tensor has the device cuda:1" in out
        out = run("filter", "in.pth", "--include", "[abc]", "-o", "o.safetensors", "--map-location", "cpu", *dry)[1]
        assert "map_location changes nothing: safetensors holds no device tags" in out
    assert "note" not in run("convert", "in.pth", "-o", "quiet.pth", "--map-location", "cuda:0=cpu")[1]


@pytest.mark.parametrize("tags", ["gpu", "cuda:x", "gpu=cpu", "cuda:0=gpu", "cuda:0", "cuda:0=", "=cpu", "cuda:0=cpu,"])
def test_what_is_no_device_is_refused(tags: str, run: Run) -> None:
    write("in.pth")
    code, _, err = run("convert", "in.pth", "-o", "out.pth", "--map-location", tags)
    assert (code, err.count("\n"), Path("out.pth").exists()) == ((0, 0, True) if tags == "cuda:0" else (2, 1, False))


def test_the_library_takes_devices_for_saving_and_checks_what_a_function_returns() -> None:
    path = write("in.pth", lambda storage: "cuda:0")
    ckptool.save(path, "out.pth", map_location=torch.device("cuda", 1))
    assert ckptool.inspect("out.pth").device_tags == ["cuda:1"]
    with pytest.raises(UsageError, match="'gpu' is no device tag"):
        ckptool.save(path, "other.pth", map_location=lambda tag: "gpu")
    assert not Path("other.pth").exists()


def test_a_format_without_devices_lists_none() -> None:
    assert ckptool.inspect(FIXTURES / "resnet_old.safetensors").device_tags == []
