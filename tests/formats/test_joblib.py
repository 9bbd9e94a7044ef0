"""joblib's files: what numpy holds is what is read; written by a pickler of the tests that does as joblib's does."""

from __future__ import annotations

import pickle
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from makers.arrays import in_joblib
from oracles import Run

import ckptool
from ckptool.errors import CkptoolError, LimitError, UnsupportedError
from ckptool.limits import limited

RNG = np.random.default_rng(5)
ARRAYS: dict[str, Any] = {
    f"{order}{kind}": RNG.integers(0, 2, (2, 3)).astype(f"{order}{kind}")
    for order in "<>" for kind in ("f8", "f4", "f2", "c8", "c16", "i8", "i4", "i2", "i1", "u4", "b1")
} | {
    "F": np.asfortranarray(RNG.normal(size=(2, 3, 4))), "scalar": np.array(7), "empty": np.zeros((3, 0)),
    "large": RNG.normal(size=300_000),
}  # fmt: skip


def put(value: Any, **options: Any) -> Path:
    Path("x.joblib").write_bytes(in_joblib(value, **options))
    return Path("x.joblib")


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("alignment", [16, 64, None])
def test_every_array_is_what_numpy_holds(protocol: int, alignment: int | None, run: Run) -> None:
    """Without an alignment as before joblib 1.2."""
    path = put(
        {**ARRAYS, "list": [ARRAYS["F"], {"again": ARRAYS["F"]}], "end": "x"}, protocol=protocol, alignment=alignment
    )
    opened = ckptool.open(path)
    assert (opened.format, opened.tree["end"]) == ("joblib", "x")
    loaded = opened.to_torch()
    found = {key: loaded[key] for key in ARRAYS} | {"F": loaded["list"][0], "again": loaded["list"][1]["again"]}
    for key, tensor in found.items():
        array = ARRAYS.get(key, ARRAYS["F"])
        assert (tuple(tensor.shape), tensor.tolist()) == (array.shape, array.tolist())
        assert tensor.numpy().dtype == array.dtype.newbyteorder("=")
    assert run("convert", path, "-o", "x.pth")[0] == 0
    assert torch.equal(torch.load("x.pth")["large"], torch.from_numpy(ARRAYS["large"]))
    assert run("inspect", path, "--check")[0] == 0


@pytest.mark.parametrize("protocol", [2, 4])
def test_arrays_of_texts_objects_and_fields_stay_the_arrays_they_were(protocol: int) -> None:
    given = {
        "text": np.array(["a", "längst"]), "bytes": np.array([b"ab", b"c"]), "dates": np.array(["2020-01-02"], "M8[D]"),
        "fields": np.array([(1, 2.5)], [("left", "<i4"), ("value", "<f8")]), "w": np.ones(2, "f4"),
        "objects": np.array(["p", None, 3.5], dtype=object), "inner": np.array([{"k": np.arange(3)}], dtype=object),
    }  # fmt: skip
    ckptool.save(ckptool.open(put(given, protocol=protocol)), "out.pth")
    loaded = torch.load("out.pth", weights_only=False)
    assert torch.equal(loaded.pop("w"), torch.ones(2))
    assert {key: str(array) for key, array in loaded.items()} == {key: str(given[key]) for key in loaded}
    assert len(loaded) == 6


def test_nothing_of_it_is_run_and_what_it_names_is_shown() -> None:
    class Evil:
        def __reduce__(self) -> Any:
            import posix

            return posix.system, ("true",)

    for value in ({"w": np.ones(2), "x": Evil()}, {"w": np.ones(2), "x": np.array([Evil()], dtype=object)}):
        assert ("posix", "system") in ckptool.open(put(value)).names


def test_a_file_cut_or_changed_anywhere_is_an_answer_or_one_error() -> None:
    whole = in_joblib({"w": np.ones((2, 3), "f4"), "t": np.array(["a"]), "o": np.array([None]), "end": 1})
    for end in range(2, len(whole), 5):
        Path("x.joblib").write_bytes(whole[:end])
        with pytest.raises(CkptoolError):
            ckptool.open("x.joblib")
    for at in range(0, len(whole), 7):
        for new in (0, 0x62, 0xFF):
            Path("x.joblib").write_bytes(whole[:at] + bytes([new]) + whole[at + 1 :])
            with suppress(CkptoolError):
                list(ckptool.open("x.joblib").tensors())
    Path("x.joblib").write_bytes(whole + b"more")
    with pytest.raises(CkptoolError, match="4 bytes follow it"):
        ckptool.open("x.joblib")


def test_what_is_read_into_memory_is_bounded() -> None:
    path = put({"w": np.ones(100_000), "texts": [np.array(["x" * 50] * 100) for _ in range(5)]})
    with limited(MAX_PICKLE=90_000), pytest.raises(LimitError, match="MAX_PICKLE"):
        ckptool.open(path)
    with limited(MAX_PICKLE=110_000):
        assert ckptool.open(path).state_dict()["w"].nbytes == 800_000
    with limited(MAX_PICKLE=500), pytest.raises(LimitError, match="MAX_PICKLE"):
        ckptool.open(path)


def test_files_of_before_0_10_are_named() -> None:
    old = b"\x80\x02}U\x01wcjoblib.numpy_pickle\nNDArrayWrapper\n)\x81}U\x08filenameU\x0cx.pkl_01.npysbs."
    Path("x.pkl").write_bytes(old)
    with pytest.raises(UnsupportedError, match=re.escape("joblib file of before 0.10, whose arrays are in files")):
        ckptool.open("x.pkl")


@pytest.mark.parametrize("kind", ["float32", "f", 4])
def test_an_array_of_a_dtype_that_numpy_does_not_write_is_named(kind: Any) -> None:
    whole = in_joblib({"w": np.ones(2, "f4")}, protocol=2)
    new = pickle.dumps(kind, 2)[2:-1]
    pickled = b"X\x02\x00\x00\x00f4"
    assert whole.count(pickled) == 1
    Path("x.joblib").write_bytes(whole.replace(pickled, new.split(b"q")[0]))
    with pytest.raises(CkptoolError, match=f"the dtype {kind!r}"):
        ckptool.open("x.joblib")
