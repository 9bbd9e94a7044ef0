"""TorchScript archives: the keys, order, values and ties that `torch.jit.load(f).state_dict()` has; nothing is run."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import FIXTURES, Run, assert_identical, assert_same_tensors, tree_equal
from torch import nn

from ckptool import limited, save
from ckptool import open as open_checkpoint
from ckptool.errors import CkptoolError, FormatError, LimitError, UnsupportedError


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.gain = nn.Parameter(torch.rand(2))
        self.lin = nn.Linear(2, 2)
        self.register_buffer("absent", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin(x) * self.gain + self.steps


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(4, 2)
        self.register_buffer("mask", torch.eye(2)[:, 1:], persistent=False)
        self.low = nn.Parameter(torch.ones(3, dtype=torch.bfloat16), requires_grad=False)
        self.blocks = nn.ModuleList([Inner(), Inner()])
        self.again = self.blocks[0].lin
        self.head = nn.Linear(2, 4)
        self.head.weight = self.emb.weight
        self.seq = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.BatchNorm1d(2))
        self.grid = torch.arange(2.0)
        self.sizes = [1, 2]
        self.names = {"a": torch.ones(1)}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(self.seq(self.again(x)) + self.mask.sum() + self.grid + self.low[0] + self.names["a"])


class Buffers(nn.Module):
    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


DTYPES = [
    "float64", "float32", "float16", "bfloat16", "uint8", "int8", "int16", "int32", "int64", "bool", "uint16", "uint32",
    "uint64", "complex32", "complex64", "complex128", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu",
]  # fmt: skip

MADE: dict[str, Callable[[], torch.jit.ScriptModule]] = {
    "scripted": lambda: torch.jit.script(Outer()),
    "traced": lambda: torch.jit.trace(Outer().eval(), torch.rand(3, 2)),
    "traced inside scripted": lambda: torch.jit.script(
        nn.Sequential(torch.jit.trace(Inner(), torch.rand(1, 2)), Inner())
    ),
    "all dtypes": lambda: torch.jit.script(
        Buffers({f"of_{name}": torch.arange(4).to(getattr(torch, name)) for name in DTYPES})
    ),
    "views of one storage": lambda: torch.jit.script(
        Buffers({"whole": (base := torch.arange(24.0)), "rows": base.view(4, 6)[1:3], "turned": base.view(4, 6).t()})
    ),
    "a scalar and an empty tensor": lambda: torch.jit.script(
        Buffers({"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 3)})
    ),
}


def saved(module: torch.jit.ScriptModule, path: Path, **extra: str) -> Path:
    torch.jit.save(module, path, _extra_files=extra)
    return path


def changed(path: Path, change: Callable[[str, bytes], bytes | None]) -> Path:
    """The archive with other records in it; None leaves one out."""
    other = path.with_name("changed.pt")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(other, "w") as new:
        for name in old.namelist():
            if (content := change(name, old.read(name))) is not None:
                new.writestr(name, content)
    return other


def tied(memory: dict[str, int]) -> list[list[str]]:
    """The keys of each piece of memory."""
    groups: dict[int, list[str]] = {}
    for key, piece in memory.items():
        groups.setdefault(piece, []).append(key)
    return list(groups.values())


@pytest.mark.parametrize("name", MADE)
def test_keys_order_values_and_ties_are_those_of_torch_jit_load(name: str, tmp_path: Path) -> None:
    path = saved(MADE[name](), tmp_path / "model.pt")
    expected = torch.jit.load(path).state_dict(keep_vars=True)
    opened = open_checkpoint(path)
    assert opened.format == "torchscript"
    assert list(opened.state_dict()) == list(expected)
    assert_same_tensors(opened, expected)
    assert tied({key: id(tensor.source) for key, tensor in opened.state_dict().items() if tensor.numel}) == tied(
        {key: tensor.untyped_storage().data_ptr() for key, tensor in expected.items() if tensor.numel()}
    )
    save(opened, tmp_path / "out.pth")
    written = torch.load(tmp_path / "out.pth", weights_only=True)
    assert_identical(dict(expected), written)


def test_a_sparse_buffer_is_read_and_written(tmp_path: Path) -> None:
    path = saved(torch.jit.script(Buffers({"eye": torch.eye(3).to_sparse()})), tmp_path / "model.pt")
    save(open_checkpoint(path), tmp_path / "out.pth")
    assert torch.equal(torch.load(tmp_path / "out.pth")["eye"].to_dense(), torch.eye(3))


def test_tensors_that_are_no_keys_and_files_of_the_user_are_named(tmp_path: Path) -> None:
    notes = "\n".join(open_checkpoint(saved(torch.jit.script(Outer()), tmp_path / "m.pt", **{"cfg/x.txt": "1"})).notes)
    assert "no parameters or buffers, and so no keys: grid, names/a" in notes
    assert "files of the user (extra/) are not read: cfg/x.txt" in notes


def test_packed_weights_of_a_quantised_program_are_named(tmp_path: Path) -> None:
    model = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(2, 2)), {nn.Linear})
    path = saved(torch.jit.script(model), tmp_path / "m.pt")
    assert list(open_checkpoint(path).state_dict()) == list(torch.jit.load(path).state_dict())
    assert "_packed_params/_packed_params/__state__/0" in "\n".join(open_checkpoint(path).notes)


def test_a_frozen_program_has_no_keys_and_every_command_says_why(tmp_path: Path, run: Run) -> None:
    path = saved(torch.jit.freeze(torch.jit.script(nn.Linear(2, 2).eval())), tmp_path / "frozen.pt")
    assert dict(open_checkpoint(path).state_dict()) == {} == dict(torch.jit.load(path).state_dict())
    assert run("inspect", path)[0] == 0
    code, _, err = run("convert", path, "-o", "out.pth")
    assert (code, err.count("\n")) == (2, 1)
    assert "constants of the program, and so no keys: 2 (a frozen module)" in err


def test_where_no_class_lists_its_buffers_as_before_torch_1_8_all_tensors_are_keys(tmp_path: Path) -> None:
    path = saved(torch.jit.script(nn.BatchNorm1d(2)), tmp_path / "m.pt")
    old = changed(path, lambda name, data: re.sub(rb"  __buffers__ = .*\n", b"", data) if name[-3:] == ".py" else data)
    opened = open_checkpoint(old)
    assert list(opened.state_dict()) == list(nn.BatchNorm1d(2).state_dict())
    assert "torch before 1.8" in opened.notes[0]


def test_a_program_takes_the_part_of_any_checkpoint(run: Run) -> None:
    assert run("convert", FIXTURES / "script.pt", "--to", "safetensors", "-o", "out.safetensors")[0] == 0
    assert run("diff", FIXTURES / "script.pt", "out.safetensors", "--values")[0] == 0
    assert run("convert", FIXTURES / "script.pt", "-o", "out.pth")[0] == 0
    torch.jit.load(FIXTURES / "script.pt").load_state_dict(torch.load("out.pth"))


# --- torch 1.0 to 1.2 ------------------------------------------------------------------------------------------------

DATA = {"tensors/0": torch.arange(6.0), "tensors/1": torch.arange(3), "tensors/2": torch.ones(2, dtype=torch.uint8)}


def tensor(number: int, kind: str = "FLOAT", dims: str = "6", strides: str = "1", **more: Any) -> dict[str, Any]:
    """A tensor as protobuf's JSON has it: integers of 64 bits are texts."""
    row = {"dims": dims.split(), "offset": "0", "strides": strides.split(), "requiresGrad": False, "dataType": kind}
    return {**row, "data": {"key": f"tensors/{number}"}, "device": "cpu", **more}


def parameter(name: str, number: int, is_buffer: bool = False) -> dict[str, Any]:
    return {"isBuffer": is_buffer, "tensorId": str(number), "name": name}


def model() -> dict[str, Any]:
    """What torch 1.0 wrote, where buffers are parameters, and in ``new`` what torch 1.2 did: they are attributes."""
    attributes = [("Tensor", "mean", 0), ("Tensor", "frozen", 1), ("List[str]", "__constants__", 2),
                  ("List[Tensor]", "more", 3), ("Optional[Tensor]", "absent", -1)]  # fmt: skip
    rows = [{"type": kind, "name": name, "id": str(number)} for kind, name, number in attributes]
    tensors = [tensor(0, requiresGrad=True), tensor(1, "INT64", "3"), tensor(2, "UINT8", "2"),
               tensor(0, dims="2 2", strides="1 2", offset="1"), tensor(1, "INT64", "", "", offset="2")]  # fmt: skip
    new = {"name": "new", "parameters": [parameter("weight", 3)], "attributes": rows, "optimize": True}
    old = {"name": "old", "parameters": [parameter("steps", 1, True), parameter("weight", 0)], "submodules": [new]}
    main = {"name": "m", "parameters": [parameter("p", 3), parameter("b", 2, True)], "submodules": [old, {"name": "e"}]}
    return {"protoVersion": "5", "mainModule": main, "tensors": tensors, "producerName": "pytorch"}


CALL = b"ctorch.jit._pickle\nbuild_tensor_from_id\n"
VALUES = b"\x80\x02(" + CALL + b"(K\x04tR" + CALL + b"(K\x01tR](X\1\0\0\0ae](" + CALL + b"(K\x02tRet."


def described(path: Path, change: Callable[[dict[str, Any]], object] = lambda _: None, **records: bytes | None) -> Path:
    found = model()
    change(found)
    content = {name: bytes(one.view(torch.uint8).numpy()) for name, one in DATA.items()}
    content |= {"version": b"1\n", "attributes.pkl": VALUES, "model.json": json.dumps(found).encode()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in {**content, **records}.items():
            if data is not None:
                archive.writestr(f"m/{name}", data)
    return path


def test_archives_of_torch_1_0_to_1_2_list_modules_and_tensors_in_json(tmp_path: Path) -> None:
    opened = open_checkpoint(described(tmp_path / "m.pt", **{"extra/a.txt": b"x"}))
    whole, counts, _ = DATA.values()
    turned = torch.tensor([[1.0, 3.0], [2.0, 4.0]])
    expected = {
        "p": turned, "b": DATA["tensors/2"], "old.weight": whole, "old.steps": counts, "old.new.weight": turned,
        "old.new.mean": torch.tensor(2), "old.new.frozen": counts,
    }  # fmt: skip
    assert list(opened.state_dict()) == list(expected)
    save(opened, tmp_path / "out.pth")
    written = torch.load(tmp_path / "out.pth", weights_only=True)
    assert all(torch.equal(written[key], value) for key, value in expected.items())
    assert opened.state_dict()["p"].stride == (1, 2)
    assert opened.state_dict()["old.weight"].requires_grad
    assert opened.shared() == [["p", "old.new.weight"], ["old.steps", "old.new.frozen"]]
    assert tied({key: id(one.source) for key, one in opened.state_dict().items()}) == [
        ["p", "old.weight", "old.new.weight"], ["b"], ["old.steps", "old.new.mean", "old.new.frozen"]
    ]  # fmt: skip
    assert opened.notes == (
        "tensors that are no parameters or buffers, and so no keys: old/new/more/0",
        "files of the user (extra/) are not read: a.txt",
    )


def test_a_module_of_torch_1_2_with_code_of_its_own_is_named(tmp_path: Path) -> None:
    opened = open_checkpoint(described(tmp_path / "m.pt", lambda it: it["mainModule"].update(getStateAttributeId="0")))
    assert "modules that code of their own would restore have no keys: the top" in opened.notes


def test_torch_1_0_had_no_attributes(tmp_path: Path) -> None:
    def without(found: dict[str, Any]) -> None:
        del found["mainModule"]["submodules"][0]["submodules"]

    opened = open_checkpoint(described(tmp_path / "m.pt", without, **{"attributes.pkl": None}))
    assert list(opened.state_dict()) == ["p", "b", "old.weight", "old.steps"]


def first(**fields: Any) -> Callable[[dict[str, Any]], object]:
    return lambda found: found["tensors"][3].update(fields)


def top(**fields: Any) -> Callable[[dict[str, Any]], object]:
    return lambda found: found["mainModule"].update(fields)


@pytest.mark.parametrize(
    ("change", "records", "said"),
    [
        (None, {"model.json": b"{"}, "model.json cannot be understood"),
        (None, {"model.json": b"[]"}, "no JSON object"),
        (None, {"model.json": b"[" * 1_000_000}, "cannot be understood"),
        (None, {"model.json": b'{"tensors": [], "tensors": []}'}, "name twice"),
        (None, {"model.json": b'{"tensors": {}}'}, "tensors is {}: expected list"),
        (None, {"tensors/0": None}, "'tensors/0' is named in model.json and absent"),
        (None, {"tensors/0": b"1234"}, "reaches element"),
        (None, {"attributes.pkl": VALUES[:-9]}, "cut off"),
        (None, {"attributes.pkl": b"\x80\x02K\x01."}, "attributes.pkl holds 1"),
        (None, {"attributes.pkl": None}, "attribute 0; attributes.pkl has 0"),
        (None, {"attributes.pkl": VALUES.replace(b"(K\x04t", b"(K\x09t")}, "refers to tensor 9, and lists 5"),
        (None, {"attributes.pkl": VALUES.replace(b"(K\x04t", b"(}t")}, "refers to tensor {}"),
        (first(dims=["-2", "2"]), {}, "negative"),
        (first(strides=["-1", "2"]), {}, "negative"),
        (first(offset="-1"), {}, "offset -1"),
        (first(offset="4"), {}, "reaches element"),
        (first(offset=1.5), {}, "1.5 where a number"),
        (first(offset=float("nan")), {}, "nan where a number"),
        (first(offset="9" * 40), {}, "where a number"),
        (first(dims=[str(1 << 62)] * 2), {}, "can count"),
        (first(dims=["2"]), {}, "stride"),
        (first(dims=None), {}, "dims is None"),
        (first(data={}), {}, "'' is named in model.json"),
        (first(dataType="INT32"), {}, "cannot share memory"),
        (first(device="cuda:0"), {}, "cannot share memory"),
        (top(parameters=[parameter("w", 5)]), {}, "refers to tensor 5"),
        (top(parameters=[parameter("w", -1)]), {}, "refers to tensor -1"),
        (top(parameters=[parameter("w", 0), parameter("w", 1)]), {}, "two tensors have the key 'w'"),
        (top(parameters=[parameter("w", 0, None)]), {}, "isBuffer is None"),
        (top(submodules=[1]), {}, "name is None"),
        (top(submodules={}), {}, "submodules is {}"),
    ],
)
def test_what_is_wrong_with_model_json_is_said(
    change: Any, records: dict[str, bytes | None], said: str, tmp_path: Path, run: Run
) -> None:
    path = described(tmp_path / "m.pt", change or (lambda _: None), **records)
    with pytest.raises(FormatError, match=re.escape(said)):
        open_checkpoint(path)
    code, _, err = run("inspect", path)
    assert (code, err.count("\n"), "m.pt" in err) == (2, 1, True)


@pytest.mark.parametrize("fields", [{"dataType": "UNDEFINED"}, {"isQuantized": True, "scale": 0.1}])
def test_other_tensors_of_model_json_are_refused_by_name(fields: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"tensor 3 of model\.json (is quantised|has the type 'UNDEFINED')"):
        open_checkpoint(described(tmp_path / "m.pt", first(**fields)))


def test_modules_nested_without_end_are_refused(tmp_path: Path) -> None:
    module: dict[str, Any] = {"name": "a", "parameters": [parameter("w", 0)]}
    for _ in range(300):
        module = {"name": "a", "submodules": [module]}
    with pytest.raises(LimitError):
        open_checkpoint(described(tmp_path / "m.pt", top(submodules=[module])))


# --- C++ -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [{"a": torch.ones(2), "b": torch.zeros(3)}, [torch.ones(2), torch.zeros(1)],
     {"a": [torch.ones(1)], "c": [torch.zeros(2)]}, (torch.ones(2), [1, 2], [True], [0.5])],
    ids=["dict", "list", "dict of lists", "tuple"],
)  # fmt: skip
def test_what_pickle_save_of_c_writes_is_the_tree_of_torch_load(value: Any, tmp_path: Path) -> None:
    path = tmp_path / "saved.pt"
    path.write_bytes(torch._C._pickle_save(value))
    opened = open_checkpoint(path)
    tree_equal(opened.tree, torch.load(path, weights_only=False))
    save(opened, tmp_path / "out.pth")
    assert_identical(torch.load(path, weights_only=False), torch.load(tmp_path / "out.pth", weights_only=True))


def test_a_flatbuffer_is_refused_by_name(tmp_path: Path) -> None:
    torch.jit.script(nn.Linear(2, 2))._save_for_lite_interpreter(str(tmp_path / "m.ff"), _use_flatbuffer=True)
    with pytest.raises(UnsupportedError, match="TorchScript flatbuffer"):
        open_checkpoint(tmp_path / "m.ff")


# --- wrong inputs ----------------------------------------------------------------------------------------------------

TEXT = b'class Linear(Module):\n  __parameters__ = ["weight", "bias", ]\n  __buffers__ = []\n'


def with_text(text: bytes | None) -> Callable[[str, bytes], bytes | None]:
    return lambda name, data: text if "/linear" in name and name.endswith(".py") else data


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (with_text(None), "no text of the class"),
        (with_text(b""), "no text of the class"),
        (with_text(b"\xff\xfe garbled"), "no text of the class"),
        (with_text(TEXT.replace(b"Linear", b"Linea")), "no text of the class"),
        (with_text(TEXT + TEXT), "there twice"),
        (with_text(TEXT.replace(b'"bias", ]', b'"bias", ')), "no list of names"),
        (with_text(TEXT.replace(b'"weight"', b"__import__('os').getcwd()")), "no list of names"),
        (with_text(TEXT.replace(b'["weight", "bias", ]', b"[" * 100_000)), "no list of names"),
        (with_text(TEXT.replace(b"  __buffers__ = []", b"  __parameters__ = []")), "no list of names"),
        (lambda name, data: data if not name.endswith("/data.pkl") else None, "without data.pkl"),
        (lambda name, data: data[:-9] if name.endswith("/data.pkl") else data, "cut off"),
        (lambda name, data: data[:-1] if name.endswith("/constants.pkl") else data, "cut off"),
        (lambda name, data: None if name.endswith("/data/0") else data, "absent"),
        (lambda name, data: data[:-1] if name.endswith("/data/0") else data, "bytes; data.pkl says"),
        (lambda name, data: b"\x80\x02}." if name.endswith("/data.pkl") else data, "not a module"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    change: Callable[[str, bytes], bytes | None], said: str, tmp_path: Path, run: Run
) -> None:
    path = changed(saved(torch.jit.script(nn.Linear(2, 2)), tmp_path / "m.pt"), change)
    with pytest.raises(FormatError, match=said):
        open_checkpoint(path)
    code, _, err = run("inspect", path)
    assert (code, err.count("\n"), "changed.pt" in err) == (2, 1, True)


def by_hand(path: Path, pickled: bytes) -> Path:
    """An archive of a module whose class has the parameter ``w``."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/data.pkl", b"\x80\x02" + pickled + b".")
        archive.writestr("m/constants.pkl", b"\x80\x02).")
        archive.writestr("m/code/__torch__.py", 'class M(Module):\n  __parameters__ = ["w", ]\n  __buffers__ = []\n')
    return path


MODULE = b"c__torch__\nM\n)\x81q\x01}"


@pytest.mark.parametrize(
    "pickled",
    [
        MODULE + b"X\x01\0\0\0ah\x01sb",
        MODULE + b"(X\x01\0\0\0ac__torch__\nM\n)\x81}X\x01\0\0\0bh\x01sbub",
    ],
    ids=["itself", "two levels"],
)
def test_a_module_inside_itself_is_refused(pickled: bytes, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="inside itself"):
        open_checkpoint(by_hand(tmp_path / "m.pt", pickled))


def test_submodules_shared_at_every_level_stay_bounded(tmp_path: Path) -> None:
    levels = 40
    pickled = b"c__torch__\nM\n)\x81q\x00"
    for level in range(levels):
        put = bytes([level + 1])
        pickled += (
            b"c__torch__\nM\n)\x81}(X\x01\0\0\0ah" + bytes([level]) + b"X\x01\0\0\0bh" + bytes([level]) + b"ubq" + put
        )
    with pytest.raises(LimitError), limited(MAX_STEPS=500_000, MAX_SHARED=10_000, MAX_SHARED_PARTS=500):
        open_checkpoint(by_hand(tmp_path / "m.pt", pickled))


def test_a_module_with_a_state_of_its_own_has_no_keys_and_is_named(tmp_path: Path) -> None:
    opened = open_checkpoint(by_hand(tmp_path / "m.pt", MODULE + b"X\x01\0\0\0ac__torch__\nM\n)\x81K\x01K\x02\x86bsb"))
    assert dict(opened.state_dict()) == {}
    assert opened.notes == ("modules that code of their own would restore have no keys: a",)


def test_the_text_of_a_class_may_not_be_endless(tmp_path: Path) -> None:
    path = saved(torch.jit.script(nn.Linear(2, 2)), tmp_path / "m.pt")
    with zipfile.ZipFile(tmp_path / "big.pt", "w", zipfile.ZIP_DEFLATED) as new, zipfile.ZipFile(path) as old:
        for name in old.namelist():
            new.writestr(name, old.read(name) + (b"#" * 20_000_000 if name.endswith(".py") else b""))
    with pytest.raises(LimitError, match=r"\.py (inflates|has)"):
        open_checkpoint(tmp_path / "big.pt")


@pytest.mark.parametrize("end", range(0, 100, 7))
def test_a_truncated_archive_is_one_error(end: int, tmp_path: Path) -> None:
    whole = (FIXTURES / "script.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) * end // 100])
    with pytest.raises(CkptoolError, match=r"cut\.pt"):
        open_checkpoint(tmp_path / "cut.pt")
