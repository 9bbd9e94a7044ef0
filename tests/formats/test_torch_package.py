"""torch.package archives: the objects that `torch.package.PackageImporter` unpickles; nothing in them is run."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracles import Run, assert_same_tensors, cut_off, tree_equal
from pickled import tensor, text
from torch import nn
from torch.package import PackageExporter, PackageImporter, package_exporter

from ckptool import open as open_checkpoint
from ckptool import save
from ckptool.core.tensor import TensorInfo
from ckptool.core.tree import walk
from ckptool.errors import CkptoolError, FormatError, LimitError

pytestmark = pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")


def packaged(path: Path, resources: dict[str, Any], **others: Any) -> Path:
    """A package with a pickle at each PACKAGE/RESOURCE; bytes, text and source text as they are."""
    with PackageExporter(path) as exporter:
        exporter.extern("**")
        for name, value in {**resources, **others}.items():
            package, _, resource = name.rpartition("/")
            if resource.endswith(".py"):
                exporter.save_source_string(f"{package}.{resource[:-3]}".replace("/", "."), value)
            elif isinstance(value, bytes):
                exporter.save_binary(package.replace("/", "."), resource, value)
            elif isinstance(value, str):
                exporter.save_text(package.replace("/", "."), resource, value)
            else:
                exporter.save_pickle(package.replace("/", "."), resource, value)
    return path


def model() -> nn.Module:
    torch.manual_seed(1)
    made = nn.Sequential(nn.Embedding(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 4, bias=False))
    made[2].weight = made[0].weight
    return made


BASE = torch.arange(24.0)

TREES: dict[str, Any] = {
    "a state_dict": model().state_dict(),
    "nested": {"epoch": 3, "names": ["a", "b"], "state_dict": {"w": torch.rand(2, 3), "b": nn.Parameter(BASE[:3])}},
    "views": {"whole": BASE, "rows": BASE.view(4, 6)[1:3], "turned": BASE.view(4, 6).t(), "none": torch.zeros(0, 2)},
    "dtypes": {
        name: torch.arange(4).to(getattr(torch, name))
        for name in ("float64", "float16", "bfloat16", "uint8", "int8", "int16", "int32", "int64", "bool", "complex64",
                     "complex128")
    },
    "without storage classes": {
        name: torch.arange(4).to(getattr(torch, name)) for name in ("float8_e4m3fn", "uint16", "uint64", "complex32")
    },
    "sparse and quantised": {
        "sparse": torch.eye(3).to_sparse(),
        "quantised": torch.quantize_per_tensor(torch.rand(2, 2), 0.1, 3, torch.qint8),
    },
    "no tensors": {"lr": 0.1, "betas": (0.9, 0.99)},
}  # fmt: skip


@pytest.mark.parametrize("name", TREES)
def test_a_resource_is_the_tree_that_the_importer_gives(name: str, tmp_path: Path) -> None:
    path = packaged(tmp_path / "p.pt", {"nets/small/model.pkl": TREES[name]})
    expected = PackageImporter(path).load_pickle("nets.small", "model.pkl")
    opened = open_checkpoint(path)
    assert opened.format == "torch.package"
    tree_equal(opened.at(("nets", "small", "model.pkl")), expected)
    if any(isinstance(node, TensorInfo) for _, node in walk(opened.tree)):
        assert opened.root[:3] == ("nets", "small", "model.pkl")


def test_a_module_gives_its_state_dict_and_keeps_its_ties(tmp_path: Path) -> None:
    opened = open_checkpoint(packaged(tmp_path / "p.pt", {"m/model.pkl": model()}))
    assert_same_tensors(opened, model().state_dict(keep_vars=True))
    assert opened.shared() == [["0.weight", "2.weight"]]
    save(opened, tmp_path / "out.pth")
    assert opened.names == open_checkpoint(tmp_path / "out.pth").names


def test_resources_share_memory_and_each_is_a_root(tmp_path: Path, run: Run) -> None:
    made = model()
    half = {"low": torch.rand(2).bfloat16(), "emb": made[0].weight.detach()}
    resources = {"m/model.pkl": made, "w/sd.pkl": made.state_dict(), "w/half": half, "w/empty.pkl": {}}
    path = packaged(tmp_path / "p.pt", resources)
    for root, expected in (("w/sd.pkl", made.state_dict()), ("w/half", half), ("m/model.pkl", None)):
        opened = open_checkpoint(path, root)
        assert_same_tensors(opened, expected or made.state_dict(keep_vars=True))
    told = "several resources, --root PACKAGE/RESOURCE chooses one: m/model.pkl, w/sd.pkl, w/half, w/empty.pkl"
    assert told in opened.notes
    tensors = [tensor for path, tensor in opened.tensors() if path[-1] in ("0.weight", "2.weight", "emb")]
    assert len({id(tensor.source) for tensor in tensors}) == 1
    assert run("convert", path, "--root", "w/sd.pkl", "-o", "out.safetensors")[0] == 0
    assert run("diff", "out.safetensors", path, "--values", "--root-b", "m/model.pkl")[0] == 0


def test_numpy_arrays_are_tensors(tmp_path: Path) -> None:
    opened = open_checkpoint(packaged(tmp_path / "p.pt", {"m/a.pkl": {"a": np.arange(3.0), "w": torch.ones(1)}}))
    assert {path[-1]: tensor.shape for path, tensor in opened.tensors()} == {"a": (3,), "w": (1,)}


def test_what_is_no_pickle_is_named_and_code_is_not_run(tmp_path: Path) -> None:
    files = {"m/w.pkl": {"w": torch.ones(2)}, "m/notes.txt": "hi", "m/raw.bin": b"\0\1", "m/empty.bin": b"",
             "m/code.py": "raise SystemExit\n", "m/saved.pth": b"PK\3\4 and so on"}  # fmt: skip
    opened = open_checkpoint(packaged(tmp_path / "p.pt", files))
    assert list(opened.state_dict()) == ["w"]
    notes = "\n".join(opened.notes)
    assert "files of the user, which are not read: m/notes.txt, m/raw.bin, m/empty.bin, m/saved.pth" in notes
    assert "source text, which is not run: m/code.py" in notes
    assert "several" not in notes


def test_a_graph_module_gives_its_state_dict(tmp_path: Path) -> None:
    """It is no pickled object but a reference to one, which a function makes with the importer."""
    traced = torch.fx.symbolic_trace(model().eval())
    path = packaged(tmp_path / "p.pt", {"m/one.pkl": {"net": traced, "again": traced}, "m/two.pkl": traced})
    opened = open_checkpoint(path, "m/two.pkl")
    assert dict(opened.state_dict()).keys() == traced.state_dict().keys()
    one = opened.at(("m", "one.pkl"))
    assert one["net"] is one["again"]
    assert one["net"] is opened.at(("m", "two.pkl"))


def test_scripted_modules_inside_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package_exporter, "_gate_torchscript_serialization", False)
    path = packaged(tmp_path / "p.pt", {"m/net.pkl": {"net": torch.jit.script(nn.Linear(2, 2)), "w": torch.ones(2)}})
    opened = open_checkpoint(path)
    assert list(opened.state_dict()) == ["w"]
    assert "TorchScript modules, which are not read: .data/ts_code/0/data.pkl" in "\n".join(opened.notes)


class Harmful:
    def __reduce__(self) -> Any:
        return os.mkdir, ("it_ran",)


def test_nothing_in_a_resource_is_run_and_its_calls_are_named(tmp_path: Path, run: Run) -> None:
    path = packaged(tmp_path / "p.pt", {"m/w.pkl": {"w": torch.ones(2)}, "m/x.pkl": {"x": Harmful()}})
    assert ("posix", "mkdir") in open_checkpoint(path).names
    assert run("inspect", path, "--check")[0] == 1
    assert not Path("it_ran").exists()


# --- wrong inputs ----------------------------------------------------------------------------------------------------


def by_hand(path: Path, resources: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in {**resources, ".data/extern_modules": b"", ".data/0.storage": bytes(8)}.items():
            archive.writestr(f"p/{name}", content)
    return path


def pid(*items: bytes) -> bytes:
    return b"\x80\x03(" + b"".join(items) + b"tQ."


STORAGE = text("storage"), b"ctorch\nFloatStorage\n"


@pytest.mark.parametrize(
    ("resources", "said"),
    [
        ({"m/a.pkl": b"\x80\x03}"}, r"m/a\.pkl: the pickle at byte 0 is cut off"),
        ({"m/a.pkl": pid(*STORAGE, b"K\x01", text("cpu"), b"K\x02")}, "absent"),
        ({"m/a.pkl": pid(*STORAGE, b"G" + bytes(8), text("cpu"), b"K\x02")}, "a storage's key is 0.0"),
        ({"m/a.pkl": pid(*STORAGE, b"\x88", text("cpu"), b"K\x02")}, "a storage's key is True"),
        ({"m/a.pkl": pid(*STORAGE, b"J\xff\xff\xff\xff", text("cpu"), b"K\x02")}, "absent"),
        ({"m/a.pkl": pid(*STORAGE, b"K\x00", text("cpu"), b"K\x03")}, "has 8 bytes; a pickle says 12"),
        ({"m/a.pkl": pid(text("module"), b"K\x00", b")", b"N", b"N")}, "no storage"),
        ({"m/a.pkl": pid(text("reduce_package"), b"K\x00", text("f"), b")")}, "no storage"),
        ({"m/a.pkl": pid(text("reduce_package"), b"K\x00", b"cos\nsystem\n", b"K\x00")}, "no storage"),
        ({"m/a.pkl": pid(text("reduce_package"), b"}", b"cos\nsystem\n", b")")}, "no storage"),
        ({"m/a.pkl": pid(text("reduce_package"), b"cos\nsystem\n")}, "no storage"),
        ({"m/a": b"\x80\x03}.", "m/a/b": b"\x80\x03}."}, "m/a is a resource and a package"),
        ({"m/a/b": b"\x80\x03}.", "m/a": b"\x80\x03}."}, "m/a is a resource and a package"),
        ({"m/a.pkl": b"\x80\x03}.", "M/A.pkl": b"\x80\x03}."}, "differ in case"),
    ],
    ids=str,
)
def test_what_is_wrong_is_said_in_one_line(resources: dict[str, bytes], said: str, tmp_path: Path, run: Run) -> None:
    path = by_hand(tmp_path / "p.pt", resources)
    with pytest.raises(FormatError, match=said):
        open_checkpoint(path)
    code, _, err = run("inspect", path)
    assert (code, err.count("\n"), "p.pt" in err) == (2, 1, True)


def test_a_call_with_the_importer_is_a_stand_in(tmp_path: Path) -> None:
    """Before torch 1.11 these references had no number, and each gave an object of its own."""
    for number in (b"", b"K\x07"):
        opened = open_checkpoint(
            by_hand(tmp_path / "p.pt", {"m/a.pkl": pid(text("reduce_package"), number, b"cos\nmkdir\n", b")")})
        )
        assert opened.at(("m", "a.pkl")).qualname == "mkdir"
        assert ("os", "mkdir") in opened.names


def test_keys_of_storages_are_numbers_and_in_torch_1_8_texts(tmp_path: Path) -> None:
    views = [tensor(pid(*STORAGE, key, text("cpu"), b"K\x02")[2:-1]) for key in (b"K\x00", text("0"))]
    resources = {f"m/{number}.pkl": b"\x80\x03" + view + b"." for number, view in enumerate(views)}
    opened = open_checkpoint(by_hand(tmp_path / "p.pt", resources))
    [(_, one), (_, other)] = opened.tensors()
    assert one.source is other.source


def test_packages_of_torch_1_8_have_their_storages_elsewhere(tmp_path: Path) -> None:
    view = tensor(pid(*STORAGE, text("94851361309072"), text("cpu"), b"K\x02")[2:-1], shape=b"K\2\x85")
    with zipfile.ZipFile(tmp_path / "p.pt", "w") as archive:
        archive.writestr("p/nets/w.pkl", b"\x80\x03}(" + text("w") + view + text("v") + view + b"u.")
        archive.writestr("p/nets/code.py", "raise SystemExit\n")
        archive.writestr("p/data/94851361309072", torch.arange(2.0).numpy().tobytes())
        archive.writestr("p/extern_modules", "torch.nn\n")
        archive.writestr("p/version", "1\n")
    opened = open_checkpoint(tmp_path / "p.pt")
    assert opened.root == ("nets", "w.pkl")
    assert_same_tensors(opened, {"w": (both := torch.arange(2.0)), "v": both})
    assert opened.notes == ("source text, which is not run: nets/code.py",)


def test_packages_nested_without_end_are_refused(tmp_path: Path) -> None:
    with pytest.raises(LimitError, match="nested too deep"):
        open_checkpoint(by_hand(tmp_path / "p.pt", {"a/" * 30_000 + "b": b"\x80\x03}."}))


def test_an_archive_cut_off_at_any_member_is_one_error(tmp_path: Path) -> None:
    path = packaged(tmp_path / "p.pt", {"m/model.pkl": model(), "w/sd.pkl": model().state_dict()})
    cut = tmp_path / "cut.pt"
    for left in cut_off(path):
        cut.write_bytes(left)
        with pytest.raises(CkptoolError, match=r"cut\.pt"):
            open_checkpoint(cut)


@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: data + b"\0"])
def test_a_storage_of_another_length_is_refused(change: Callable[[bytes], bytes], tmp_path: Path) -> None:
    path = packaged(tmp_path / "p.pt", {"w/sd.pkl": {"w": torch.ones(2)}})
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "o.pt", "w") as new:
        for name in old.namelist():
            data = old.read(name)
            new.writestr(name, change(data) if name.endswith(".storage") else data)
    with pytest.raises(FormatError, match="bytes; a pickle says 8"):
        open_checkpoint(tmp_path / "o.pt")
