"""torch.export archives (.pt2), of each layout: what `torch.export.load(f).state_dict` and `.constants` have."""

from __future__ import annotations

import functools
import io
import json
import logging
import os
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import Run, assert_identical, assert_same_tensors, cut_off
from torch import nn
from torch._export.serde.serialize import serialize
from torch.export.pt2_archive._package import load_pt2, package_pt2

from ckptool import open as open_checkpoint
from ckptool import save
from ckptool.core.checkpoint import Checkpoint
from ckptool.core.tensor import TensorInfo
from ckptool.errors import CkptoolError, FormatError, LimitError, UnsupportedError
from ckptool.limits import limited

Tensors = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """torch logs a traceback for each archive of an older layout."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


class Held(nn.Module):
    """A module of these parameters and buffers, which its forward does not use."""

    def __init__(self, parameters: Tensors, buffers: Tensors, transient: Tensors) -> None:
        super().__init__()
        for name, tensor in parameters.items():
            grad = tensor.is_floating_point() and "frozen" not in name
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=grad))
        for persistent, tensors in ((True, buffers), (False, transient)):
            for name, tensor in tensors.items():
                self.register_buffer(name, tensor, persistent)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tensor([1.0, 2.0])


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        base = torch.arange(12.0).view(3, 4)
        self.slice = nn.Parameter(base[:, 1:3])
        self.emb = nn.Embedding(6, 4)
        table = torch.arange(12.0).view(3, 4)
        self.register_buffer("rows", table[1:])
        self.register_buffer("columns", table.t())
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.emb.weight
        self.grid = torch.arange(4.0)
        self.shared = nn.Sequential(self.norm, nn.Linear(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.shared(self.emb(x) + self.grid)) + self.slice.sum() + self.rows.sum() + self.columns.sum()


DTYPES = [
    "float64", "float32", "float16", "bfloat16", "uint8", "int8", "int16", "int32", "int64", "bool", "uint16", "uint32",
    "uint64", "complex32", "complex64", "complex128", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz",
    "float8_e5m2fnuz", "float8_e8m0fnu",
]  # fmt: skip

MADE: dict[str, Callable[[], tuple[nn.Module, tuple[Any, ...]]]] = {
    "ties and views": lambda: (Tied(), (torch.tensor([1, 2]),)),
    "all dtypes": lambda: (
        Held({}, {f"of_{name}": torch.arange(4).to(getattr(torch, name)) for name in DTYPES}, {}), (torch.ones(2),)
    ),
    "parameters of few bits": lambda: (
        Held({"low": torch.ones(2, 3).to(torch.float8_e4m3fn), "frozen": torch.ones(3).bfloat16()}, {}, {}),
        (torch.ones(2),),
    ),
    "transient buffers are constants": lambda: (
        Held({"w": torch.ones(2)}, {"kept": torch.zeros(2)}, {"mask": torch.eye(3)[:, 1:]}), (torch.ones(2),)
    ),
    "a scalar and empty tensors": lambda: (
        Held({"scalar": torch.tensor(2.5)}, {"empty": torch.zeros(0, 3), "none": torch.zeros(2, 0)}, {}),
        (torch.ones(2),),
    ),
    "turned, strided and expanded": lambda: (
        Held({"turned": torch.rand(3, 4).t()}, {"last": torch.rand(1, 2, 3, 3).to(memory_format=torch.channels_last),
             "wide": torch.ones(2, 1).expand(2, 5), "steps": torch.arange(9.0)[1::3]}, {}),
        (torch.ones(2),),
    ),
    "no weights at all": lambda: (Held({}, {}, {}), (torch.ones(2),)),
}  # fmt: skip


@functools.cache
def exported(name: str) -> torch.export.ExportedProgram:
    torch.manual_seed(0)
    module, inputs = MADE[name]()
    return torch.export.export(module.eval(), inputs)


@functools.cache
def saved(name: str) -> bytes:
    buffer = io.BytesIO()
    torch.export.save(exported(name), buffer, extra_files={"labels.txt": "cat"})
    return buffer.getvalue()


def now(name: str, path: Path) -> Path:
    path.write_bytes(saved(name))
    return path


def in_2_8(name: str, path: Path) -> Path:
    """As torch 2.8 saved it: weights and constants are files of torch.save."""
    artifact = serialize(exported(name))
    files = {"weights": artifact.state_dict, "constants": artifact.constants}

    def change(record: str, data: bytes) -> bytes | None:
        return None if record.split("/", 2)[1:2] == ["data"] and "sample" not in record else data

    added = {f"archive/data/{folder}/model.pt": content for folder, content in files.items()}
    return changed(now(name, path), change, added)


def in_2_7(name: str, path: Path, end: str = ".pt") -> Path:
    artifact = serialize(exported(name))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("serialized_exported_program.json", artifact.exported_program)
        archive.writestr(f"serialized_state_dict{end}", artifact.state_dict)
        archive.writestr(f"serialized_constants{end}", artifact.constants)
        archive.writestr("serialized_example_inputs.pt", artifact.example_inputs)
        archive.writestr("version", "8.20")
        archive.writestr("extra_files/labels.txt", "cat")
    return path


def in_2_1(name: str, path: Path) -> Path:
    return in_2_7(name, path, ".json")


BOTH = ("ties and views", "transient buffers are constants")
"""What has weights and constants of every kind between them."""

LAYOUTS = {"torch 2.13": now, "torch 2.8": in_2_8, "torch 2.7": in_2_7, "torch 2.1": in_2_1}


def changed(
    path: Path, change: Callable[[str, bytes], bytes | None], added: dict[str, bytes] | None = None, how: int = 0
) -> Path:
    """The archive with other records in it; None leaves one out."""
    other = path.with_name(f"changed_{path.name}")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(other, "w", how) as new:
        for name in old.namelist():
            if (content := change(name, old.read(name))) is not None:
                new.writestr(name, content)
        for name, content in (added or {}).items():
            new.writestr(name, content)
    return other


def memory(tensors: dict[str, TensorInfo]) -> list[list[str]]:
    groups: dict[int, list[str]] = {}
    for key, tensor in tensors.items():
        if tensor.numel:
            groups.setdefault(id(tensor.source), []).append(key)
    return list(groups.values())


def memory_of(tensors: Tensors) -> list[list[str]]:
    groups: dict[int, list[str]] = {}
    for key, tensor in tensors.items():
        if tensor.numel():
            groups.setdefault(tensor.untyped_storage().data_ptr(), []).append(key)
    return list(groups.values())


def constants(opened: Checkpoint) -> Checkpoint:
    return Checkpoint(opened.tree.get("constants", {}))


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        pytest.param(name, layout, marks=[pytest.mark.slow] if layout != "torch 2.13" and name not in BOTH else [])
        for name in MADE for layout in LAYOUTS
    ],
)  # fmt: skip
def test_weights_and_constants_are_those_of_torch_export_load(name: str, layout: str, tmp_path: Path) -> None:
    path = LAYOUTS[layout](name, tmp_path / "model.pt2")
    with zipfile.ZipFile(path) as archive:  # torch reads archives of 2.1 too, but for a check of their version
        assert ("serialized_constants.json" in archive.namelist()) == (layout == "torch 2.1")
    program = torch.export.load(path)
    opened = open_checkpoint(path, "state_dict")
    assert opened.format == "pt2"
    for found, expected in ((opened, program.state_dict), (constants(opened), program.constants)):
        assert list(found.state_dict()) == list(expected)
        assert_same_tensors(found, expected)
        assert memory(found.state_dict()) == memory_of(expected)
        for key, tensor in found.state_dict().items():
            assert tensor.is_parameter == isinstance(expected[key], nn.Parameter), key
            assert tensor.requires_grad == expected[key].requires_grad, key
    save(opened, tmp_path / "out.pth")
    written = torch.load(tmp_path / "out.pth", weights_only=True)
    assert_identical(dict(program.state_dict), dict(written["state_dict"]))
    assert_identical(dict(program.constants), dict(written.get("constants", {})))


def test_of_several_programs_each_is_a_root(tmp_path: Path, run: Run) -> None:
    programs = {"small": exported("parameters of few bits"), "large": exported("ties and views")}
    package_pt2(str(tmp_path / "two.pt2"), exported_programs=programs, extra_files={"labels.txt": "cat"})
    loaded = load_pt2(tmp_path / "two.pt2").exported_programs
    for name in programs:
        opened = open_checkpoint(tmp_path / "two.pt2", f"{name}/state_dict")
        assert_same_tensors(opened, loaded[name].state_dict)
        assert_same_tensors(Checkpoint(opened.at((name, "constants"))), loaded[name].constants)
    notes = "\n".join(opened.notes)
    assert "several programs, --root NAME/state_dict chooses one: small, large" in notes
    assert "extra/labels.txt" in notes
    assert "data/sample_inputs/small.pt" in notes
    assert run("convert", "two.pt2", "--root", "small/state_dict", "-o", "out.safetensors")[0] == 0


def test_what_is_not_read_is_named(tmp_path: Path) -> None:
    for layout in LAYOUTS.values():
        notes = "\n".join(open_checkpoint(layout("ties and views", tmp_path / "m.pt2")).notes)
        assert "sample inputs" in notes
        assert "extra" not in notes or "labels.txt" in notes
    other = changed(
        now("ties and views", tmp_path / "m.pt2"), lambda _, data: data, {"archive/data/weights/weight_99": b"x"}
    )
    assert "also in the archive, and not read: data/weights/weight_99" in "\n".join(open_checkpoint(other).notes)


def pickled(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def with_pickle(path: Path, value: Any, how: int = 0, record: str = "weight_0", **fields: Any) -> Path:
    """An archive whose first weight is a file of torch.save."""

    def change(name: str, data: bytes) -> bytes:
        if name.endswith(f"weights/{record}"):
            return pickled(value)
        if name.endswith("weights_config.json"):
            config = json.loads(data)
            for entry in config["config"].values():
                if entry["path_name"] == record:
                    entry.update({"use_pickle": True, **fields})
            return json.dumps(config).encode()
        return data

    return changed(path, change, how=how)


def test_a_weight_that_is_pickled_is_read_where_it_lies(tmp_path: Path) -> None:
    path = now("transient buffers are constants", tmp_path / "m.pt2")
    weight = nn.Parameter(torch.rand(5, 3).t())
    opened = open_checkpoint(with_pickle(path, weight))
    assert_same_tensors(opened, {"w": weight, "kept": torch.zeros(2)})
    assert opened.state_dict()["w"].is_parameter
    half = torch.quantize_per_tensor(torch.rand(2, 2), 0.1, 3, torch.qint8)
    assert open_checkpoint(with_pickle(path, half)).state_dict()["w"].kind == "quantized"


def test_names_in_those_pickles_are_told(tmp_path: Path) -> None:
    opened = open_checkpoint(with_pickle(now("transient buffers are constants", tmp_path / "m.pt2"), Harmful()))
    assert list(opened.entries()) == ["w", "kept"]
    assert list(opened.state_dict()) == ["kept"]
    assert ("posix", "mkdir") in opened.names
    old = in_2_7("transient buffers are constants", tmp_path / "old.pt2")
    state = {"w": torch.ones(2), "hook": Harmful()}
    other = changed(old, lambda name, data: pickled(state) if name == "serialized_state_dict.pt" else data)
    opened = open_checkpoint(other)
    assert list(opened.state_dict()) == ["w"]
    assert ("posix", "mkdir") in opened.names


class Harmful:
    def __reduce__(self) -> Any:
        return os.mkdir, ("it_ran",)


def test_tensors_saved_without_values_are_on_meta_and_named(tmp_path: Path) -> None:
    """A fake tensor has a record of no bytes; torch reads zeros."""
    path = now("transient buffers are constants", tmp_path / "m.pt2")
    opened = open_checkpoint(changed(path, lambda name, data: b"" if name.endswith("weights/weight_0") else data))
    assert (opened.state_dict()["w"].kind, opened.state_dict()["w"].shape) == ("meta", (2,))
    assert "tensors that were saved without values (torch reads zeros): w" in opened.notes


def test_constants_that_are_objects_are_named(tmp_path: Path) -> None:
    entry = {"path_name": "custom_obj_0", "is_param": False, "use_pickle": True, "tensor_meta": None}
    path = now("transient buffers are constants", tmp_path / "m.pt2")
    change = edited(
        "constants", lambda config: config.update(packed=entry, opaque={**entry, "path_name": "opaque_obj_0"})
    )
    added = {f"archive/data/constants/{kind}_obj_0": b"\x80\x02cposix\nmkdir\n." for kind in ("custom", "opaque")}
    opened = open_checkpoint(changed(path, change, added))
    assert "constants that are objects, not tensors, are not read: packed, opaque" in opened.notes
    assert not any("also in" in note for note in opened.notes)


def edited(folder: str, edit: Callable[[dict[str, Any]], object]) -> Callable[[str, bytes], bytes]:
    """A change to the configuration of the weights or the constants."""

    def change(name: str, data: bytes) -> bytes:
        if not name.endswith(f"{folder}_config.json"):
            return data
        config = json.loads(data)
        edit(config["config"])
        return json.dumps(config).encode()

    return change


# --- AOTInductor -----------------------------------------------------------------------------------------------------


def compiled(path: Path, weights: bool, **added: bytes) -> Path:
    """What torch._inductor packages: compiled code, with the weights in it or beside it."""
    whole = torch.arange(6.0)
    rows = {"a.w": ["weight_0", [2, 3], [3, 1], 0], "a.tail": ["weight_0", [2], [1], 4]}
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data/aotinductor/model/abc.wrapper.so", b"\x7fELF")
        archive.writestr("archive/data/aotinductor/model/abc.wrapper_metadata.json", b"{}")
        if weights:
            archive.writestr("archive/data/weights/weight_0", pickled(whole))
            archive.writestr("archive/data/aotinductor/model/weights_config.json", json.dumps(rows))
        archive.writestr("archive/archive_format", b"pt2")
        archive.writestr("archive/archive_version", b"0")
        archive.writestr("archive/.data/version", b"6\n")
        for name, content in added.items():
            archive.writestr(f"archive/{name}", content)
    return path


def test_weights_beside_compiled_code_are_read_and_tied(tmp_path: Path) -> None:
    opened = open_checkpoint(compiled(tmp_path / "m.pt2", True))
    assert opened.root == ("aotinductor",)
    assert_same_tensors(opened, {"a.w": (whole := torch.arange(6.0)).view(2, 3), "a.tail": whole[4:]})
    assert memory(opened.state_dict()) == [["a.w", "a.tail"]]
    assert "compiled code, which is not read: data/aotinductor/model/abc.wrapper.so" in "\n".join(opened.notes)


def test_weights_in_compiled_code_are_refused_by_name(tmp_path: Path, run: Run) -> None:
    code, _, err = run("inspect", compiled(tmp_path / "m.pt2", False))
    assert (code, err.count("\n")) == (2, 1)
    assert "AOTInductor" in err
    assert "model" in err


# --- wrong inputs ----------------------------------------------------------------------------------------------------


def weights(**fields: Any) -> Callable[[str, bytes], bytes]:
    return edited("weights", lambda config: config["w"].update(fields))


def meta(**fields: Any) -> Callable[[str, bytes], bytes]:
    return edited("weights", lambda config: config["w"]["tensor_meta"].update(fields))


def sizes(*numbers: Any) -> list[dict[str, Any]]:
    return [{"as_int": number} for number in numbers]


def without(end: str) -> Callable[[str, bytes], bytes | None]:
    return lambda name, data: None if name.endswith(end) else data


def instead(end: str, content: bytes) -> Callable[[str, bytes], bytes | None]:
    return lambda name, data: content if name.endswith(end) else data


WRONG: dict[str, tuple[Callable[[str, bytes], bytes | None], str]] = {
    "no configuration": (without("weights_config.json"), "weights_config.json is absent"),
    "no constants": (without("constants_config.json"), "constants_config.json is absent"),
    "no record": (without("weights/weight_0"), "weight_0 is absent"),
    "no program": (without("models/model.json"), "without a program"),
    "a record cut off": (instead("weights/weight_0", b"1234"), "reaches element"),
    "JSON cut off": (lambda name, data: data[:-1] if name.endswith("weights_config.json") else data, "understood"),
    "JSON of text": (instead("weights_config.json", b"\xff\xfe"), "understood"),
    "JSON nested deep": (instead("weights_config.json", b"[" * 1_000_000), "understood"),
    "JSON list": (instead("weights_config.json", b"[]"), "no JSON object"),
    "no config in it": (instead("weights_config.json", b"{}"), "its config is None: expected dict"),
    "a name twice": (instead("weights_config.json", b'{"config": {"w": {}, "w": {}}}'), "a name twice: w"),
    "an entry that is a list": (edited("weights", lambda config: config.update(w=[])), "path_name"),
    "a path that is a number": (weights(path_name=0), "path_name is 0: expected str"),
    "a path outside": (weights(path_name="../../../../etc/passwd"), "absent"),
    "pickle that is 1": (weights(use_pickle=1), "use_pickle is 1: expected bool"),
    "no metadata": (weights(tensor_meta=None), "tensor_meta is None"),
    "an unknown dtype": (meta(dtype=99), "dtype 99"),
    "a dtype that is true": (meta(dtype=True), "a wrong type"),
    "a sparse layout": (meta(layout=1), "layout 1"),
    "a symbol": (meta(sizes=[{"as_expr": {"expr_str": "s0"}}]), "as_int"),
    "NaN": (meta(sizes=sizes(float("nan"))), "a wrong type.*nan"),
    "a float": (meta(sizes=sizes(2.0)), "a wrong type.*2.0"),
    "a negative size": (meta(sizes=sizes(-2)), "negative"),
    "a negative stride": (meta(strides=sizes(-1)), "negative"),
    "a negative offset": (meta(storage_offset={"as_int": -1}), "offset -1"),
    "an offset beyond the end": (meta(storage_offset={"as_int": 2}), "reaches element"),
    "a huge size": (meta(sizes=sizes(1 << 62)), "reaches element|can count"),
    "sizes beyond counting": (meta(sizes=sizes(1 << 40, 1 << 40), strides=sizes(1, 1)), "can count"),
    "many sizes": (meta(sizes=sizes(*[1] * 5000), strides=sizes(*[1] * 5000)), "could have"),
    "fewer strides": (meta(strides=[]), "stride"),
    "a device of no type": (meta(device={"type": 3}), "a wrong type"),
    "two types of one record": (
        edited("weights", lambda config: config.update(v={**config["w"], "tensor_meta": {
            **config["w"]["tensor_meta"], "dtype": 4}})), "cannot share memory"),
    "another version": (instead("archive_version", b"1"), "archive_version b'1'"),
    "another format": (instead("archive_format", b"pt3"), "archive_format b'pt3'"),
    "names in two cases": (lambda name, data: data, "differ in case"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said_in_one_line(name: str, tmp_path: Path, run: Run) -> None:
    change, said = WRONG[name]
    added = {"archive/Data/weights/Weight_0": b"x"} if name == "names in two cases" else None
    path = changed(now("transient buffers are constants", tmp_path / "m.pt2"), change, added)
    with pytest.raises((FormatError, UnsupportedError), match=said):
        open_checkpoint(path)
    code, _, err = run("inspect", path)
    assert (code, err.count("\n"), path.name in err) == (2, 1, True)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without("serialized_state_dict.pt"), "without serialized_state_dict.pt"),
        (instead("serialized_state_dict.pt", b"junk"), "serialized_state_dict.pt: is no file of torch.save"),
        (lambda name, data: data[:-40] if "state_dict" in name else data, "serialized_state_dict.pt: "),
        (lambda name, data: data[:200] if "constants" in name else data, "serialized_constants.pt: "),
        (instead("serialized_state_dict.pt", pickled([torch.ones(1)])), "expected a dict"),
    ],
    ids=["absent", "junk", "cut off", "constants cut off", "a list"],
)
def test_what_is_wrong_with_an_older_archive_is_said(
    change: Callable[[str, bytes], bytes | None], said: str, tmp_path: Path, run: Run
) -> None:
    path = changed(in_2_7("ties and views", tmp_path / "m.pt2"), change)
    with pytest.raises(FormatError, match=said):
        open_checkpoint(path)
    code, _, err = run("inspect", path)
    assert (code, err.count("\n"), path.name in err) == (2, 1, True)


def test_packed_again_with_compression_raw_weights_are_read_and_nested_files_refused(tmp_path: Path) -> None:
    raw = changed(now("ties and views", tmp_path / "m.pt2"), lambda _, data: data, how=zipfile.ZIP_DEFLATED)
    assert_same_tensors(open_checkpoint(raw), torch.export.load(tmp_path / "m.pt2").state_dict)
    path = changed(in_2_7("ties and views", tmp_path / "o.pt2"), lambda _, data: data, how=zipfile.ZIP_DEFLATED)
    with pytest.raises(UnsupportedError, match="without compression"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("layout", "limit", "said"),
    [
        (now, "MAX_INDEX", r"weights_config\.json has [\d,]+ bytes: over MAX_INDEX"),
        (in_2_7, "MAX_PICKLE", r"serialized_state_dict\.pt: archive/data\.pkl has [\d,]+ bytes: over MAX_PICKLE"),
    ],
)
def test_what_is_read_into_memory_has_a_limit(
    layout: Callable[[str, Path], Path], limit: str, said: str, tmp_path: Path
) -> None:
    path = layout("transient buffers are constants", tmp_path / "m.pt2")
    with limited(**{limit: 100}), pytest.raises(LimitError, match=said):
        open_checkpoint(path)


def test_a_big_endian_archive_has_its_own_values(tmp_path: Path) -> None:
    """torch reads the bytes in the order of the machine, whatever the archive says."""
    path = now("transient buffers are constants", tmp_path / "m.pt2")

    def swapped(name: str, data: bytes) -> bytes:
        if name.endswith("/byteorder"):
            return b"big"
        raw = name.rpartition("/")[2].startswith(("weight_", "tensor_"))
        return torch.frombuffer(bytearray(data), dtype=torch.float32).numpy().byteswap().tobytes() if raw else data

    opened = open_checkpoint(changed(path, swapped))
    save(opened, tmp_path / "out.pth")
    written = torch.load(tmp_path / "out.pth")["state_dict"]
    assert torch.equal(written["w"], torch.ones(2))
    with pytest.raises(FormatError, match="byteorder record reads b'odd'"):
        open_checkpoint(changed(path, instead("/byteorder", b"odd")))


def test_a_configuration_may_not_be_endless(tmp_path: Path) -> None:
    path = now("transient buffers are constants", tmp_path / "m.pt2")
    zeros = lambda name, data: data + b" " * 50_000_000 if name.endswith("weights_config.json") else data  # noqa: E731
    with pytest.raises(LimitError, match=r"weights_config\.json inflates"):
        open_checkpoint(changed(path, zeros, how=zipfile.ZIP_DEFLATED))


@pytest.mark.parametrize("layout", [now, in_2_7])
def test_an_archive_cut_off_at_any_member_is_one_error(layout: Callable[[str, Path], Path], tmp_path: Path) -> None:
    path = layout("transient buffers are constants", tmp_path / "m.pt2")
    cut = tmp_path / "cut.pt2"
    for left in cut_off(path):
        cut.write_bytes(left)
        with pytest.raises(CkptoolError, match=r"cut\.pt2"):
            open_checkpoint(cut)
