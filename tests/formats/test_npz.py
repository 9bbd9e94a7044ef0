from __future__ import annotations

import re
import struct
import time
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracles import FIXTURES, bits
from sparse import SparseOutput, ZeroFiles

from ckptool import open as open_checkpoint
from ckptool import save
from ckptool.core.checkpoint import Checkpoint
from ckptool.core.dtypes import DTYPES
from ckptool.core.tensor import Span, Storage, TensorInfo
from ckptool.errors import CkptoolError, FormatError, LossError, UnsupportedError
from ckptool.formats import npz, read
from ckptool.io.files import Files
from ckptool.values.blocks import read_bytes

Saved = Callable[..., Path]


def arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def info(dtype: str, shape: tuple[int, ...]) -> TensorInfo:
    numel = 1
    for size in shape:
        numel *= size
    storage = Storage(Span("", 0, numel * DTYPES[dtype].bits // 8), dtype)
    stride = tuple(torch.empty(shape, device="meta").stride()) if len(shape) < 60 else (1,) * len(shape)
    return TensorInfo(dtype, shape, stride, 0, storage)


def test_numpy_reads_what_torch_holds_in_every_dtype_it_has(saved: Saved, tmp_path: Path) -> None:
    tensors = {name: torch.arange(6).reshape(2, 3).to(getattr(torch, name)) for name in npz.DESCR if name != "bool"} | {
        "bool": torch.tensor([True, False])
    }
    save(open_checkpoint(saved(tensors)), tmp_path / "out.npz")
    found = arrays(tmp_path / "out.npz")
    assert list(found) == list(tensors)
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.numpy().dtype, name
        assert found[name].dtype.isnative
        assert found[name].flags["C_CONTIGUOUS"]
        assert found[name].shape == tensor.shape
        assert found[name].tobytes() == bits(tensor), name


def test_every_shape_and_view_comes_out_by_value(saved: Saved, tmp_path: Path) -> None:
    base = torch.randn(4, 6)
    z = torch.randn(2, 3, dtype=torch.complex64)
    tensors = {
        "t": base.t(), "columns": base[:, ::2], "expanded": torch.ones(1).expand(3, 2), "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 3), "last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "conj": z.conj(), "neg": torch._neg_view(torch.arange(4.0)), "one": torch.ones(7),
        "many": torch.ones((1,) * 20),
    }  # fmt: skip
    save(open_checkpoint(saved(tensors)), tmp_path / "out.npz")
    found = arrays(tmp_path / "out.npz")
    for name, tensor in tensors.items():
        assert found[name].shape == tuple(tensor.shape), name
        assert found[name].tobytes() == bits(tensor), name


@pytest.mark.parametrize("name", ["resnet_old.pth", "resnet_legacy.pth", "views.pth", "big_endian.pth", "deflated.pth"])
def test_a_fixture_comes_out_by_value(name: str, tmp_path: Path) -> None:
    opened = open_checkpoint(FIXTURES / name)
    kept = {key: tensor for key, tensor in opened.state_dict().items() if tensor.dtype in npz.DESCR}
    save(opened.with_state_dict(kept), tmp_path / "out.npz")
    loaded = torch.load(FIXTURES / name, weights_only=True)
    expected = {key: loaded[key] for key in kept}
    found = arrays(tmp_path / "out.npz")
    assert list(found) == list(expected)
    assert {key: value.tobytes() for key, value in found.items()} == {key: bits(v) for key, v in expected.items()}


def test_an_archive_is_sound_for_other_readers_of_zips(tmp_path: Path) -> None:
    save(open_checkpoint(FIXTURES / "resnet_old.pth"), tmp_path / "out.npz")
    with zipfile.ZipFile(tmp_path / "out.npz") as archive:
        assert archive.testzip() is None  # checksums
        for member in archive.infolist():
            assert member.compress_type == zipfile.ZIP_STORED
            assert member.date_time == (1980, 1, 1, 0, 0, 0)
            head = archive.read(member)
            version, (size,) = head[6:8], struct.unpack_from("<H", head, 8)
            assert (version, (10 + size) % 64, head[10 + size - 1]) == (b"\x01\x00", 0, ord("\n"))


def test_all_that_numpy_has_no_dtype_for_is_named_at_once(tmp_path: Path) -> None:
    opened = open_checkpoint(FIXTURES / "dtypes.pth")
    lacking = [key for key, tensor in opened.state_dict().items() if tensor.dtype not in npz.DESCR]
    assert {"bfloat16", "float8_e4m3fn", "complex32", "bits8"} <= set(lacking)
    with pytest.raises(LossError) as caught:
        save(opened, tmp_path / "out.npz")
    assert all(f"{key} (" in str(caught.value) for key in lacking[:20])
    with pytest.raises(LossError, match=r"quantized \(quantized\).*coo \(sparse_coo\)"):
        save(open_checkpoint(FIXTURES / "composite.pth"), tmp_path / "out.npz")
    assert list(tmp_path.iterdir()) == []
    kept = {key: tensor for key, tensor in opened.state_dict().items() if key not in lacking}
    save(opened.with_state_dict(kept), tmp_path / "out.npz")
    expected = torch.load(FIXTURES / "dtypes.pth")
    assert {key: a.tobytes() for key, a in arrays(tmp_path / "out.npz").items()} == {
        key: bits(expected[key]) for key in kept
    }


def test_lost_ties_are_told_and_what_stands_beside_the_weights_too(tmp_path: Path) -> None:
    opened = open_checkpoint(FIXTURES / "tied.pth")
    told = save(opened, tmp_path / "out.npz").left_out
    lost = {f"untied: {alias} = {group[0]}" for group in opened.shared() for alias in group[1:]}
    assert lost
    assert {line for line in told if line.startswith("untied")} == lost
    found = arrays(tmp_path / "out.npz")
    assert all(found[alias].tobytes() == found[group[0]].tobytes() for group in opened.shared() for alias in group)
    told = save(open_checkpoint(FIXTURES / "resnet_nested.pth"), tmp_path / "two.npz").left_out
    assert set(told) == {"epoch", "arch", "best_acc1", "optimizer", "scheduler", "args"}


@pytest.mark.parametrize("name", ["", "a/b", "../up", "/abs", "ü", "new\nline", '"', "\\", "x" * 5000, "w.npy", "a b"])
def test_any_name_is_written_so_that_numpy_finds_it(name: str, saved: Saved, tmp_path: Path) -> None:
    tensors = {name: torch.arange(3.0), "z": torch.ones(1)}
    save(open_checkpoint(saved(tensors)), tmp_path / "out.npz")
    found = arrays(tmp_path / "out.npz")
    assert {key: value.tolist() for key, value in found.items()} == {name: [0.0, 1.0, 2.0], "z": [1.0]}


@pytest.mark.parametrize("name", ["a\0b", "\ud800", "x" * 65_533, "é" * 32_766, "z.npy"])
def test_names_that_a_zip_or_numpy_cannot_tell_are_refused(name: str, saved: Saved, tmp_path: Path) -> None:
    opened = open_checkpoint(saved({"z": torch.ones(2)}))
    w = opened.state_dict()["z"]
    with pytest.raises(LossError, match="as a name"):
        save(opened.with_state_dict({name: w, "z": w}), tmp_path / "out.npz")
    assert not (tmp_path / "out.npz").exists()


def test_more_dimensions_than_an_array_can_have_are_refused(tmp_path: Path) -> None:
    with SparseOutputAt(tmp_path / "x.npz") as output:
        npz.write(Checkpoint({"w": info("float32", (1,) * 64)}), output, ZeroFiles())
    assert arrays(tmp_path / "x.npz")["w"].ndim == 64
    with pytest.raises(LossError, match="65 dimensions"):
        npz.write(Checkpoint({"w": info("float32", (1,) * 65)}), output, ZeroFiles())


class SparseOutputAt(SparseOutput):
    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def test_members_and_archives_over_four_gigabytes_are_read_by_numpy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (zlib, zipfile):  # 5 GB of zeros: their checksum is not the point
        monkeypatch.setattr(module, "crc32", lambda data, crc=0: 0)
    sizes = {"small": (3,), "huge": (5 << 28,), "behind": (2, 2)}
    tree = {name: info("float32", shape) for name, shape in sizes.items()}
    with SparseOutputAt(tmp_path / "huge.npz") as output:
        npz.write(Checkpoint(tree), output, ZeroFiles())
    with zipfile.ZipFile(tmp_path / "huge.npz") as archive:
        members = {member.filename: member for member in archive.infolist()}
        assert members["huge.npy"].file_size == (5 << 30) + 128
        assert members["behind.npy"].header_offset > 5 << 30
        for name, shape in sizes.items():
            with archive.open(f"{name}.npy") as member:
                assert np.lib.format.read_magic(member) == (1, 0)
                assert np.lib.format.read_array_header_1_0(member) == (shape, False, np.dtype("<f4"))


def test_two_runs_give_the_same_bytes_and_a_failure_leaves_nothing(tmp_path: Path) -> None:
    opened = open_checkpoint(FIXTURES / "resnet_old.pth")
    for name in ("a.npz", "b.npz"):
        save(opened, tmp_path / name)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    copy = tmp_path / "cut.pth"
    copy.write_bytes((FIXTURES / "resnet_old.pth").read_bytes())
    opened = open_checkpoint(copy)
    copy.write_bytes(copy.read_bytes()[:-1])
    with pytest.raises(CkptoolError, match="changed"):
        save(opened, tmp_path / "c.npz")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npz", "b.npz", "cut.pth"]


# --- reading: numpy.load is the oracle -------------------------------------------------------------------------------


def assert_as_numpy(path: Path) -> None:
    loaded = np.load(path, allow_pickle=False)
    expected = {path.stem: loaded} if isinstance(loaded, np.ndarray) else dict(loaded)
    found = read(str(path)).state_dict()
    assert list(found) == list(expected)
    with Files() as files:
        for name, array in expected.items():
            tensor = found[name]
            assert (tensor.shape, npz.DESCR[tensor.dtype][1:]) == (array.shape, array.dtype.str[1:]), name
            native = array.astype(array.dtype.newbyteorder("="))
            assert read_bytes(tensor, files) == native.tobytes(), name


ARRAYS = {
    f"{order}{kind}{fortran}": np.arange(24).reshape(2, 3, 4).astype(f"{order}{kind}", order=fortran)
    for order in "<>" for kind in npz.BY_DESCR for fortran in "CF"
} | {
    "scalar": np.array(2.5, ">f8"), "empty": np.zeros((0, 3), "<f4"), "arr_0": np.ones(1), "a/b": np.ones((1, 2), "i1"),
    "many": np.ones((1,) * 32), "ü": np.arange(3), "": np.arange(2), "one": np.ones((5, 1), order="F"),
}  # fmt: skip


@pytest.mark.parametrize("save_", [np.savez, np.savez_compressed])
def test_every_dtype_and_order_is_read_as_numpy_reads_it(save_: Callable[..., None], tmp_path: Path) -> None:
    save_(tmp_path / "all.npz", **ARRAYS)
    assert_as_numpy(tmp_path / "all.npz")
    opened = open_checkpoint(tmp_path / "all.npz")
    assert opened.format == "npz"
    save(opened, tmp_path / "out.pth")
    loaded = torch.load(tmp_path / "out.pth", weights_only=True)
    assert {key: bits(tensor) for key, tensor in loaded.items()} == {
        key: array.astype(array.dtype.newbyteorder("=")).tobytes() for key, array in ARRAYS.items()
    }
    save(opened, tmp_path / "back.npz")
    assert {key: a.tolist() for key, a in arrays(tmp_path / "back.npz").items()} == {
        key: a.tolist() for key, a in ARRAYS.items()
    }


@pytest.mark.parametrize("save_", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("kind", npz.BY_DESCR)
def test_an_array_keeps_its_dtype_and_shape_in_a_torch_file(
    kind: str, save_: Callable[..., None], tmp_path: Path
) -> None:
    """Also without elements: torch.load then has only the pickle's word for the dtype."""
    given = {
        f"{order}{fortran}{shape}": np.ones(shape, f"{order}{kind}", order=fortran)
        for order in "<>" for fortran in "CF" for shape in [(), (0,), (0, 3), (3, 0), (2, 3)]
    }  # fmt: skip
    save_(tmp_path / "given.npz", **given)
    save(open_checkpoint(tmp_path / "given.npz"), tmp_path / "out.pth")
    loaded = torch.load(tmp_path / "out.pth", weights_only=True)
    assert {key: (str(tensor.dtype), tuple(tensor.shape), bits(tensor)) for key, tensor in loaded.items()} == {
        key: (f"torch.{npz.BY_DESCR[kind]}", array.shape, array.astype(f"<{kind}").tobytes())
        for key, array in given.items()
    }


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_an_array_alone_is_a_checkpoint_of_one_tensor(version: tuple[int, int], tmp_path: Path) -> None:
    with (tmp_path / "kernel.npy").open("wb") as file:
        np.lib.format.write_array(file, np.asfortranarray(np.arange(6.0).reshape(2, 3)), version)
    assert_as_numpy(tmp_path / "kernel.npy")
    opened = open_checkpoint(tmp_path / "kernel.npy")
    assert (opened.format, list(opened.state_dict())) == ("npy", ["kernel"])
    assert open_checkpoint(tmp_path / "kernel.npy").to_torch()["kernel"].tolist() == [[0, 1, 2], [3, 4, 5]]


def npy(text: str, data: bytes = bytes(24), version: bytes = b"\x01\x00") -> bytes:
    size = struct.pack("<H" if version[0] == 1 else "<I", len(text))
    return b"\x93NUMPY" + version + size + text.encode("latin-1") + data


PLAIN = "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }"

TAKEN = {
    "as numpy writes it": npy(PLAIN),
    "another order": npy("{'shape': (2, 3), 'descr': '<f4', 'fortran_order': False}"),
    "no spaces, other quotes": npy('{"descr":"<f4","fortran_order":True,"shape":(2,3)}'),
    "python 2": npy("{'descr': '<f4', 'fortran_order': False, 'shape': (2L, 3L), }"),
    "one size": npy("{'descr': '<f8', 'fortran_order': False, 'shape': (3,)}   \n"),
    "long": npy(PLAIN + " " * 9000 + "\n"),
    "the machine's order": npy(PLAIN.replace("<f4", "=f4")),
    "no order": npy(PLAIN.replace("<f4", "f4")),
    "a name": npy(PLAIN.replace("<f4", "float32")),
}

REFUSED = {
    "an empty header": (npy(""), FormatError),
    "no dict": (npy("[]"), FormatError),
    "a key too many": (npy(PLAIN[:-1] + "'more': 1}"), FormatError),
    "a key twice": (npy(PLAIN[:-1] + "'shape': (2, 3)}"), FormatError),
    "a key absent": (npy("{'descr': '<f4', 'shape': (6,)}"), FormatError),
    "a number for sizes": (npy(PLAIN.replace("(2, 3)", "6")), FormatError),
    "no tuple": (npy(PLAIN.replace("(2, 3)", "(6)")), FormatError),
    "a negative size": (npy(PLAIN.replace("(2, 3)", "(-2, -3)")), FormatError),
    "a size too large": (npy(PLAIN.replace("2", str(1 << 62))), FormatError),
    "digits without end": (npy(PLAIN.replace("2", "2" * 5000)), FormatError),
    "code": (npy(PLAIN.replace("False", "print(1)")), FormatError),
    "nested without end": (npy("(" * 9999), FormatError),
    "data cut off": (npy(PLAIN, bytes(23)), FormatError),
    "bytes behind": (npy(PLAIN, bytes(25)), FormatError),
    "a header cut off": (npy(PLAIN)[:40], FormatError),
    "nothing behind the mark": (b"\x93NUMPY", FormatError),
    "an unknown version": (npy(PLAIN, version=b"\x04\x00"), FormatError),
    "a header too long": (npy(PLAIN + " " * 11_000 + "\n"), FormatError),
    "objects": (npy(PLAIN.replace("<f4", "|O")), UnsupportedError),
    "text": (npy(PLAIN.replace("<f4", "<U1")), UnsupportedError),
    "bytes": (npy(PLAIN.replace("<f4", "|S4")), UnsupportedError),
    "dates": (npy(PLAIN.replace("<f4", "<M8[s]")), UnsupportedError),
    "raw bytes": (npy(PLAIN.replace("<f4", "|V4")), UnsupportedError),
    "raw bytes of two": (npy(PLAIN.replace("<f4", "|V2"), bytes(12)), UnsupportedError),
    "three bytes in an order": (npy(PLAIN.replace("<f4", "<V3"), bytes(18)), UnsupportedError),
    "two bytes in the other order": (npy(PLAIN.replace("<f4", ">V2"), bytes(12)), UnsupportedError),
    "a longer float": (npy(PLAIN.replace("<f4", "<f16")), UnsupportedError),
    "fields": (npy(PLAIN.replace("'<f4'", "[('a', '<f4')]")), UnsupportedError),
    "no byte order": (npy(PLAIN.replace("<f4", "|f4")), UnsupportedError),
}


@pytest.mark.parametrize(
    ("descr", "reason"),
    [
        ("<f16", "torch lacks it"), ("<c32", "torch lacks it"), ("|f4", "an unusual description"), ("S4", "bytes"),
        ("<float32", "an unusual description"), ("", "an unusual description"), ("double", "an unusual description"),
    ],
)  # fmt: skip
def test_what_is_said_of_a_dtype_is_true(descr: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "w.npy").write_bytes(npy(PLAIN.replace("<f4", descr)))
    with pytest.raises(UnsupportedError, match=re.escape(f"{descr!r}: {reason}")):
        read(str(tmp_path / "w.npy"))


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize(
    ("descr", "dtype"), [("<V2", torch.bfloat16), ("<f1", torch.float8_e5m2)]
)  # what numpy.save writes of ml_dtypes' bfloat16 and float8_e5m2
def test_types_of_ml_dtypes_that_have_a_description_of_their_own_are_read(
    descr: str, dtype: torch.dtype, method: int, tmp_path: Path
) -> None:
    values = torch.linspace(-3, 3, 6).to(dtype)
    for form in ("False", "True"):
        header = PLAIN.replace("<f4", descr).replace("False", form)
        with zipfile.ZipFile(tmp_path / "w.npz", "w", method) as archive:
            archive.writestr("w.npy", npy(header + " " * (-(10 + len(header)) % 64), bits(values)))
        opened = open_checkpoint(tmp_path / "w.npz")
        expected = values.reshape(2, 3) if form == "False" else values.reshape(3, 2).T
        assert torch.equal(opened.to_torch()["w"].float(), expected.float())
        assert opened.notes == (f"read as {str(dtype)[6:]}, by {descr!r}: w",)
        save(opened, tmp_path / "out.pth", force=True)
        assert torch.load(tmp_path / "out.pth", weights_only=True)["w"].dtype is dtype


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_type_of_one_byte_that_numpy_does_not_name_is_listed_and_in_no_output(method: int, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "w.npz", "w", method) as archive:
        archive.writestr("f8.npy", npy(PLAIN.replace("<f4", "<V1"), bytes(range(6))))
        archive.writestr("w.npy", npy(PLAIN + " " * (-(10 + len(PLAIN)) % 64)))
    opened = open_checkpoint(tmp_path / "w.npz")
    found = opened.state_dict()["f8"]
    assert (found.kind, found.shape, found.nbytes) == ("V1", (2, 3), 6)
    with Files() as files:
        assert read_bytes(found.parts[0], files) == bytes(range(6))
    assert "does not say which: f8" in opened.notes[0]
    for out in ("out.pth", "out.npz", "out.safetensors"):
        with pytest.raises(LossError, match=r"f8 \(V1\)"):
            save(opened, tmp_path / out)


@pytest.mark.parametrize("name", TAKEN)
def test_headers_that_numpy_takes_are_taken(name: str, tmp_path: Path) -> None:
    (tmp_path / "w.npy").write_bytes(TAKEN[name])
    assert_as_numpy(tmp_path / "w.npy")


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_wrong_with_an_array_is_one_line_that_names_it(name: str, tmp_path: Path) -> None:
    data, kind = REFUSED[name]
    (tmp_path / "weight.npy").write_bytes(data)
    with zipfile.ZipFile(tmp_path / "all.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("good.npy", npy(PLAIN + " " * (-(10 + len(PLAIN)) % 64)))
        archive.writestr("weight.npy", data)
    for path in sorted(tmp_path.iterdir()):
        with pytest.raises(kind, match="weight") as caught:
            read(str(path))
        assert str(caught.value).count("\n") == 0
        assert "good" not in str(caught.value)


def test_nothing_of_an_array_of_objects_is_unpickled(tmp_path: Path) -> None:
    class Touch:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "touched",)

    np.save(tmp_path / "weight.npy", np.array([Touch()], dtype=object), allow_pickle=True)
    with pytest.raises(UnsupportedError, match="need pickle"):
        read(str(tmp_path / "weight.npy"))
    assert not (tmp_path / "touched").exists()


def test_all_members_that_are_no_tensors_are_named_at_once(tmp_path: Path) -> None:
    np.savez(tmp_path / "all.npz", w=np.ones(2), text=np.array("csr"), who=np.array([None]))
    with zipfile.ZipFile(tmp_path / "all.npz", "a") as archive:
        archive.writestr("config.json", "{}")
    with pytest.raises(UnsupportedError, match=r"config\.json \(no array\), text \('<U3': text\), who \('\|O'"):
        read(str(tmp_path / "all.npz"))


def test_a_compressed_array_is_inflated_only_as_far_as_its_header(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "all.npz", **{f"zeros{n}": np.zeros(25_000_000, "u1") for n in range(4)})
    start = time.process_time()
    assert len(read(str(tmp_path / "all.npz")).state_dict()) == 4
    assert time.process_time() - start < 0.5
