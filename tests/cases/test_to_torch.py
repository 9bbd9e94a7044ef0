"""`Checkpoint.to_torch` gives what torch.load gives, wherever that needs no class of the file's own."""

from __future__ import annotations

import datetime
import sys
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracles import assert_identical
from pickled import mapping, text, zipped
from torch import nn

import ckptool
from ckptool.core.tensor import TensorInfo
from ckptool.core.tree import PyObject

Saved = Callable[..., Path]


def with_attributes(made: Any, **attributes: Any) -> Any:
    for name, value in attributes.items():
        setattr(made, name, value)
    return made


def listed(pairs: Any) -> defaultdict[Any, Any]:
    made: defaultdict[Any, Any] = defaultdict(list)
    for key, value in pairs:
        made[key].append(value)
    return made


RECORD = [("a", "<i4"), ("b", "<f8", (2,)), ("c", "S3")]
QUANTIZED = torch.quantize_per_channel(torch.ones(2, 3), torch.tensor([0.1, 0.2]), torch.tensor([0, 1]), 0, torch.qint8)

SAFE = {
    "bytes": b"\xc5\xbc\xff", "bytearray": bytearray(b"\xffx"), "set": {1, "a", (2, b"x")},
    "complex": 1 - 2j, "size": torch.Size([2, 3]), "device": torch.device("cuda", 1), "dtype": torch.bfloat16,
    "layout": torch.sparse_csr, "counter": Counter(a=2, b=-1), "class": OrderedDict,
    "keys": {b"\xff": 1, (1, b"t"): 2, None: 3, True: 4, 2.5: 5},
    "tensor with attributes": with_attributes(torch.ones(2), tag="x", more=[torch.zeros(1)], raw=b"\xff"),
    "parameter": nn.Parameter(torch.ones(2)),
    "parameter with attributes": with_attributes(nn.Parameter(torch.ones(2), False), note={"a": (1, b"b")}),
    "buffer": nn.Buffer(torch.ones(1)),
    "requires grad": torch.ones(2, requires_grad=True),
    "dict with attributes": with_attributes(OrderedDict(w=torch.ones(2)), _metadata={"": {"version": 1}}, extra=b"e"),
    "coo": torch.eye(3).to_sparse(), "csr": torch.eye(3).to_sparse_csr(),
    "sparse parameter": nn.Parameter(torch.eye(2).to_sparse()),
    "quantised": torch.quantize_per_tensor(torch.ones(3), 0.1, 2, torch.quint8), "per channel": QUANTIZED,
    "quantised, with attributes": with_attributes(torch.quantize_per_tensor(torch.ones(3), 1, 0, torch.qint8), tag=1),
    "meta": torch.empty(2, 3, device="meta", requires_grad=True),
    "conjugate": with_attributes(torch.ones(2, dtype=torch.complex64).conj(), tag=1),
    "uint16": torch.ones(2, dtype=torch.uint16), "float8": torch.ones(2).to(torch.float8_e4m3fn),
    "storage": torch.FloatStorage([1.5, 2.5]), "half": torch.HalfStorage([1.5]),
    "untyped": torch.UntypedStorage([1, 2]), "bool": torch.BoolStorage([True]),
    "empty": torch.LongStorage(0), "complex128": torch.ComplexDoubleStorage([1j]),
    "storage of a tensor": (lambda one: [one, one.storage(), one[1:]])(torch.arange(4)),
}  # fmt: skip
"""What torch.load(weights_only=True) gives."""

MORE = {
    "no bytes": b"",
    "frozenset": frozenset([1, "b"]), "defaultdict": listed([("k", torch.ones(1)), ("k", 2)]),
    "scheme": torch.per_channel_affine,
    "max": torch.arange(4.0).view(2, 2).max(0), "sort": torch.rand(3).sort(), "topk": torch.rand(3).topk(2),
    "svd": torch.linalg.svd(torch.eye(2)),
    "float64": np.float64(0.1), "float16": np.float16(1.5), "bool_": np.bool_(True), "complex64": np.complex64(1j),
    "int8": np.int8(-3), "uint64": np.uint64(2**64 - 1), "longdouble": np.longdouble(3), "str_": np.str_("hé"),
    "no str_": np.str_(""), "bytes_": np.bytes_(b"\xff"), "datetime64": np.datetime64("2024-01-02T03:04:05", "ns"),
    "timedelta64": np.timedelta64(3, "s"), "void": np.array([(1, [2, 3], b"x")], RECORD)[0],
    "array": np.arange(6.0).reshape(2, 3), "fortran": np.asfortranarray(np.arange(6).reshape(2, 3)),
    "big-endian": np.arange(3).astype(">i4"), "no elements": np.zeros((0, 3)), "scalar array": np.array(3.5),
    "records": np.array([(1, [2, 3], b"x"), (4, [5, 6], b"y")], RECORD), "texts": np.array(["a", "żó"]),
    "byte strings": np.array([b"a", b"bcd"]), "dates": np.array(["2024-01-02", "NaT"], "M8[25s]"),
    "nested records": np.zeros(2, [("x", [("y", "f4"), ("z", "U2")]), ("w", "f2", (2, 2))]),
    "numpy dtype": np.dtype("f4"), "record dtype": np.dtype(RECORD), "arrays as keys": {np.int64(3): np.float32(2)},
    "jagged": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
}  # fmt: skip
"""What torch.load(weights_only=False) gives without a class of the file's own."""


@pytest.mark.parametrize("name", [*SAFE, *MORE])
def test_to_torch_gives_what_torch_load_gives(name: str, saved: Saved) -> None:
    value = (SAFE | MORE)[name]
    for protocol in (2, 4, 5):
        path = saved({"value": value, "again": [value]}, pickle_protocol=protocol)
        expected = torch.load(path, weights_only=name in SAFE and protocol == 2)
        assert_identical(ckptool.open(path).to_torch(), expected)


def test_to_torch_of_a_legacy_file_gives_the_same(saved: Saved) -> None:
    without = {"uint16", "float8", "untyped", "jagged"}  # which torch cannot load from this format
    value = {name: one for name, one in (SAFE | MORE).items() if name not in without}
    path = saved(value, _use_new_zipfile_serialization=False)
    assert_identical(ckptool.open(path).to_torch(), torch.load(path, weights_only=False))


def test_arrays_of_objects_hold_real_objects(saved: Saved) -> None:
    array = np.empty((2, 2), object)
    array[:] = [["text", None], [{"w": torch.ones(2)}, np.arange(3)]]
    path = saved({"c": array, "f": np.asfortranarray(array)})
    expected, found = torch.load(path, weights_only=False), ckptool.open(path).to_torch()
    for name in expected:
        assert (found[name].shape, found[name].strides) == (expected[name].shape, expected[name].strides)
        assert_identical(found[name].tolist(), expected[name].tolist())


def test_arrays_can_be_written_to_as_those_of_torch_load_can(saved: Saved) -> None:
    found = ckptool.open(saved({"a": np.zeros(3), "w": torch.zeros(3)})).to_torch()
    found["a"][1] = 5
    assert found["a"].tolist() == [0.0, 5.0, 0.0]


def test_the_weights_alone_are_tensors_that_load_state_dict_takes(saved: Saved) -> None:
    path = saved({"w": np.ones((2, 3), "f4"), "b": np.zeros(2, "f4")})
    found = ckptool.open(path).to_torch(only_root=True)
    model = nn.ParameterDict({"w": torch.zeros(2, 3), "b": torch.ones(2)})
    model.load_state_dict(found, strict=True)
    assert model["w"].sum() == 6


def test_an_array_that_an_operation_changed_is_a_tensor(saved: Saved) -> None:
    changed, _ = ckptool.remap(saved({"w": np.ones((2, 3), "f4"), "b": np.zeros(2)}), [{"transpose": "w"}])
    found = changed.to_torch()
    assert (type(found["w"]), found["w"].shape, type(found["b"])) == (torch.Tensor, (3, 2), np.ndarray)


class Own:
    pass


def test_an_object_whose_class_would_be_imported_stays_a_stand_in(saved: Saved) -> None:
    own = with_attributes(Own(), w=1)
    value = {"own": own, "when": datetime.datetime(2024, 1, 2), "factory": defaultdict(Own), "w": torch.ones(1)}
    found = ckptool.open(saved(value)).to_torch()
    assert [type(one).__mro__[1] for name, one in found.items() if name != "w"] == [PyObject] * 3
    assert found["w"].tolist() == [1.0]


class Sub(torch.Tensor):
    pass


def test_a_tensor_of_a_class_of_the_file_is_a_plain_one_with_its_attributes(saved: Saved) -> None:
    path = saved({"w": with_attributes(torch.ones(2).as_subclass(Sub), tag="x")})
    found = ckptool.open(path).to_torch()["w"]
    assert (type(found), found.tolist(), found.tag) == (torch.Tensor, [1.0, 1.0], "x")


def test_attributes_cannot_reach_what_a_tensor_is_made_of() -> None:
    tensor = b"ctorch._tensor\n_rebuild_from_type_v2\n(ctorch._utils\n_rebuild_tensor_v2\nctorch\nTensor\n("
    tensor += b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + b"K\x01tQ"
    tensor += b"K\x00K\x01\x85K\x01\x85\x89ccollections\nOrderedDict\n)Rt"
    state = mapping(text("requires_grad"), b"\x88", text("__class__"), text("x"), text("data"), b"N")
    found = ckptool.open(zipped(b"\x80\x02" + mapping(text("w"), tensor + state + b"tR") + b".")).to_torch()["w"]
    assert (type(found), found.tolist(), found.requires_grad) == (torch.Tensor, [1.0], False)


RECORDS = b"K\x03X\x01\0\0\0|N" + text("a") + b"\x85}" + text("a")

HOSTILE = {
    "a field behind the end": RECORDS + b"h\x01K\x64\x86sK\x08K\x01K\x00",
    "a dtype in itself": RECORDS + b"h\x02K\x00\x86sK\x08K\x01K\x00",
    "a sub-array of itself": b"K\x03X\x01\0\0\0|h\x02K\x02\x85\x86NNK\x08K\x01K\x00",
    "names that are none": b"K\x03X\x01\0\0\0|N]\x85}K\x08K\x01K\x00",
    "an order that is none": b"K\x03X\x03\0\0\0f4,NNNK\x08K\x01K\x00",
    "no unit": b"K\x04X\x01\0\0\0<NNNK\x08K\x01K\x00N)\x86",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_dtypes_give_stand_ins(name: str) -> None:
    plain = b"(K\x03X\x01\0\0\0<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb"
    inner = b"cnumpy\ndtype\n" + text("f8") + b"\x89\x88\x87R" + plain + b"q\x010"
    kind = text("M8" if name == "no unit" else "V8")
    dtype = b"cnumpy\ndtype\n" + kind + b"\x89\x88\x87Rq\x02(" + HOSTILE[name] + b"tb"
    scalar = b"cnumpy.core.multiarray\nscalar\n" + dtype + b"c_codecs\nencode\n" + text("x" * 8) + text("latin1")
    pickled = b"\x80\x02" + inner + mapping(text("s"), scalar + b"\x86R\x86R", text("d"), b"h\x02") + b"."
    assert {type(one).__name__ for one in ckptool.open(zipped(pickled)).to_torch().values()} == {"Global"}


def test_deep_trees_become_real_as_they_are(saved: Saved) -> None:
    deep: Any = torch.ones(1)
    for _ in range(900):
        deep = [deep]
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(10_000)
    try:
        path = saved({"deep": deep})
    finally:
        sys.setrecursionlimit(limit)
    found = ckptool.open(path).to_torch()["deep"]
    for _ in range(900):
        (found,) = found
    assert found.tolist() == [1.0]
    assert sys.getrecursionlimit() == limit


def test_the_tree_itself_is_as_it_was(saved: Saved) -> None:
    opened = ckptool.open(saved({"a": np.arange(3), "w": torch.ones(2)}))
    opened.to_torch()
    assert {type(one) for one in opened.tree.values()} == {TensorInfo}
