from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open

from ckptool.core.dtypes import BY_SAFETENSORS, BY_STORAGE, DTYPES, lookup, nbytes_of
from ckptool.errors import UnsupportedError, UsageError

IN_TORCH = [name for name in DTYPES if not name.startswith("float6_")]
PACKED = {"quint4x2", "quint2x4"}  # torch counts bytes there, several elements each


def test_every_dtype_that_torch_can_save_has_a_row() -> None:
    # int1 to int7 and uint1 to uint7 exist in torch, and torch.save cannot save them.
    barebits = {f"{sign}int{bits}" for sign in ("", "u") for bits in range(1, 8)}
    named = {str(value).removeprefix("torch.") for value in vars(torch).values() if isinstance(value, torch.dtype)}
    assert named - barebits == set(IN_TORCH)


@pytest.mark.parametrize("name", [name for name in IN_TORCH if name not in PACKED])
def test_an_element_takes_the_bytes_it_takes_in_torch(name: str) -> None:
    assert DTYPES[name].bits == 8 * getattr(torch, name).itemsize
    assert nbytes_of(name, 6) == 6 * getattr(torch, name).itemsize


@pytest.mark.parametrize("name", IN_TORCH)
def test_its_kind_is_the_one_torch_says(name: str) -> None:
    dtype = getattr(torch, name)
    assert (DTYPES[name].kind == "float") == dtype.is_floating_point
    assert (DTYPES[name].kind == "complex") == dtype.is_complex


@pytest.mark.parametrize("name", IN_TORCH)
def test_its_storage_class_is_the_one_torch_pickles(name: str) -> None:
    classes = torch.storage._dtype_to_storage_type_map()
    assert DTYPES[name].storage == classes.get(getattr(torch, name))


def test_storage_classes_and_dtypes_map_one_to_one() -> None:
    assert {row.storage for row in DTYPES.values() if row.storage} == set(BY_STORAGE)
    assert set(BY_STORAGE) == set(torch.storage._storage_type_to_dtype_map()) - {"TypedStorage"}


@pytest.mark.parametrize("name", [name for name in DTYPES if DTYPES[name].safetensors and name in IN_TORCH])
def test_the_safetensors_library_gives_the_torch_dtype(name: str, tmp_path: Path) -> None:
    row = DTYPES[name]
    shape = [2] if row.safetensors == "F4" else [1]
    nbytes = 1 if row.safetensors == "F4" else row.bits // 8
    header = json.dumps({"x": {"dtype": row.safetensors, "shape": shape, "data_offsets": [0, nbytes]}}).encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(nbytes))
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert str(file.get_tensor("x").dtype) == f"torch.{name}"


def test_safetensors_names_are_those_that_the_library_knows(tmp_path: Path) -> None:
    known = set()
    for name in [*BY_SAFETENSORS, "C128", "U4", "F128", "bf16", "I4"]:
        header = json.dumps({"x": {"dtype": name, "shape": [0], "data_offsets": [0, 0]}}).encode()
        (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
        try:
            with safe_open(tmp_path / "x.safetensors", "np"):
                known.add(name)
        except SafetensorError:
            pass
    assert known == set(BY_SAFETENSORS)


@pytest.mark.parametrize(
    ("name", "unit"),
    [("float32", 4), ("bfloat16", 2), ("complex64", 4), ("complex128", 8), ("complex32", 2), ("bool", 1)],
)
def test_complex_numbers_are_swapped_by_component(name: str, unit: int) -> None:
    assert DTYPES[name].swap_unit == unit


@pytest.mark.parametrize(
    ("word", "name"),
    [("bf16", "bfloat16"), ("BF16", "bfloat16"), ("torch.bfloat16", "bfloat16"), (" FP16 ", "float16"),
     ("half", "float16"), ("long", "int64"), ("F8_E4M3", "float8_e4m3fn"), ("torch.double", "float64"),
     ("F32", "float32"), ("cfloat", "complex64"), ("u8", "uint8"), ("byte", "uint8"), ("torch.short", "int16")],
)  # fmt: skip
def test_a_dtype_is_understood_as_users_write_it(word: str, name: str) -> None:
    assert lookup(word) is DTYPES[name]
    if word.startswith("torch.") or word in ("half", "long", "cfloat"):
        assert str(getattr(torch, word.removeprefix("torch."))) == f"torch.{name}"


def test_every_row_is_found_by_each_of_its_names() -> None:
    for row in DTYPES.values():
        assert lookup(row.name) is row
        if row.safetensors:
            assert lookup(row.safetensors) is row


@pytest.mark.parametrize("word", ["", "float7", "torch.", "F", "int1"])
def test_an_unknown_dtype_is_refused_and_the_known_ones_are_listed(word: str) -> None:
    with pytest.raises(UsageError, match="bfloat16"):
        lookup(word)


def test_elements_under_a_byte_must_fill_whole_bytes() -> None:
    assert nbytes_of("quint4x2", 4) == 2
    assert nbytes_of("float6_e2m3fn", 4) == 3
    with pytest.raises(UnsupportedError, match="whole bytes"):
        nbytes_of("quint4x2", 3)
