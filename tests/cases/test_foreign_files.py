"""Files of other frameworks and archives around checkpoints are named by what they are, with the member to extract."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import pickle
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import Run
from safetensors.torch import save

import ckptool
from ckptool.errors import CkptoolError, UnsupportedError


def varint(number: int) -> bytes:
    parts = []
    while number > 0x7F:
        parts.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*parts, number])


def message(*fields: tuple[int, Any]) -> bytes:
    """A protocol buffer: (field number, int for a varint, or bytes or str)."""
    made = b""
    for number, value in fields:
        if isinstance(value, int):
            made += varint(number << 3) + varint(value)
        else:
            raw = value.encode() if isinstance(value, str) else value
            made += varint(number << 3 | 2) + varint(len(raw)) + raw
    return made


FLOATS = struct.pack("<300f", *range(300))
TENSOR = message((1, 300), (2, 1), (8, "conv.weight"), (9, FLOATS))
NODE = message((1, "conv"), (2, "Conv2D"), (3, "input"), (5, message((1, "T"), (2, message((6, 1))))))
GRAPH = message(*[(1, NODE)] * 70, (4, message((1, 1087))))
V1_LAYER = message((2, "data"), (3, "conv1"), (4, "conv1"), (5, 4), (6, message((5, FLOATS))))
LAYER = message((1, "conv1"), (2, "Convolution"), (3, "data"), (4, "conv1"), (7, message((5, FLOATS))))
FILL = message((2, "conv1_w"), (4, "GivenTensorFill"), (5, message((1, "values"), (5, FLOATS))))

FOREIGN = {
    "ONNX": [
        message(
            (1, 8),
            (2, "pytorch"),
            (3, "2.1.0"),
            (7, message((1, NODE), (2, "main"), (5, TENSOR))),
            (8, message((2, 17))),
        ),
        message((1, 3), (7, message((5, TENSOR))), (8, message((1, ""), (2, 9))), (14, message((1, "k"), (2, "v")))),
    ],
    "Core ML": [
        message((1, 4), (2, message((1, message((1, "image"))))), (500, message((1, LAYER)))),
        message((1, 8), (2, message((1, b""))), (10, 1), (502, message((1, 1)))),
    ],
    "SavedModel": [message((1, 1), (2, message((1, message((5, "2.15.0"))), (2, GRAPH))))],
    "TensorFlow graph": [GRAPH, message((1, NODE))],
    "MetaGraph": [message((1, message((1, "v"), (5, "1.15.0"))), (2, GRAPH), (3, message((1, "save/Const"))))],
    "TensorFlow checkpoint": [b"\0\1\2" * 50 + bytes(40) + bytes.fromhex("57fb808b247547db")],
    "Caffe model": [
        message((1, "CaffeNet"), (2, V1_LAYER), (2, V1_LAYER)),
        message((1, "VGG_16"), (100, LAYER), (100, LAYER)),
        message((1, "net"), (3, "data"), (4, 1), (4, 3), (100, LAYER)),
    ],
    "Caffe2": [message((1, "init"), (2, FILL), (2, FILL))],
    "Torch7": [
        struct.pack("<iii", 4, 1, 3) + b"V 1" + struct.pack("<i", 13) + b"nn.Sequential" + FLOATS,
        struct.pack("<iiiii", 3, 1, 2, 2, 5) + b"model" + FLOATS,
        b"4\n1\n3\nV 1\n13\nnn.Sequential\n3\n2\n",
    ],
    "GGUF": [b"GGUF" + struct.pack("<IQQ", 1, count, 5) + FLOATS for count in (2, 10, 123, 32)],
    "GGML": [b"tjgg" + struct.pack("<I", 3) + FLOATS],
    "Keras": [b"\x89HDF\r\n\x1a\n" + FLOATS],
    "TFLite": [b"\x1c\0\0\0TFL3" + FLOATS],
    "ExecuTorch": [b"\x1c\0\0\0ET12" + FLOATS],
    "ncnn": [b"7767517\n75 83\nInput data 0 1 data\n", b"\xdd\x85\x76\0" + bytes(30), b"\x47\x6b\x30\1" + FLOATS],
    "MXNet": [struct.pack("<QQ", 0x112, 0) + FLOATS],
    "Flax": [
        b"\x82\xa6params\x81\xa6kernel\xc7\x0c\1\x93\x91\x01\xa7float32\xc4\4" + bytes(4),
        b"\x81\xd9\x25" + b"encoder_decoder_with_a_very_long_name_"[:37] + b"\x80",
        b"\xde\0\x20\xa4step\xcd\1\2",
    ],
    "Orbax": [bytes.fromhex("0cdb20def3010000") + FLOATS, bytes.fromhex("0cdb3a2a71000000") + FLOATS],
}

TOOL = {
    "ONNX": "onnx.numpy_helper.to_array", "Flax": "flax.serialization.msgpack_restore", "Keras": "h5py.File",
    "Orbax": "StandardCheckpointer", "TensorFlow checkpoint": "tf.train.load_checkpoint", "Core ML": "coremltools",
    "MXNet": "mxnet.nd.load", "Torch7": "torchfile.load", "SavedModel": "tf.train.load_checkpoint",
}  # fmt: skip
"""What the refusal says that gives the arrays."""


def refusal(path: Path | str) -> str:
    with pytest.raises(CkptoolError) as caught:
        ckptool.open(path)
    assert isinstance(caught.value, UnsupportedError) or "no checkpoint in it" in caught.value.message
    return caught.value.message


@pytest.mark.parametrize("suffix", [".pth", ".bin", ".data"])
@pytest.mark.parametrize("name", FOREIGN)
def test_a_file_of_another_framework_is_named_whatever_its_suffix(name: str, suffix: str, run: Run) -> None:
    for number, content in enumerate(FOREIGN[name]):
        path = Path(f"{number}{suffix}")
        path.write_bytes(content)
        assert name in refusal(path)
        code, _, err = run("inspect", path)
        assert (code, err.count("\n")) == (2, 1)
        assert "not a format ckptool reads" in err
        assert TOOL.get(name, "") in err


def test_weights_without_a_magic_number_are_named_by_the_file_beside_them() -> None:
    Path("net.param").write_text("7767517\n1 1\nInput data 0 1 data\n")
    Path("net.bin").write_bytes(bytes(4) + FLOATS)
    assert "ncnn" in refusal("net.bin")
    Path("model.ckpt-9.index").write_bytes(FOREIGN["TensorFlow checkpoint"][0])
    Path("model.ckpt-9.data-00000-of-00001").write_bytes(FLOATS)
    assert "TensorFlow checkpoint" in refusal("model.ckpt-9.data-00000-of-00001")


@pytest.mark.parametrize(
    ("names", "what"),
    [
        (["saved_model.pb", "variables/variables.index"], "SavedModel"),
        (["checkpoint", "model.ckpt-9.index", "model.ckpt-9.data-00000-of-00001"], "TensorFlow checkpoint"),
        (["Manifest.json", "Data/com.apple.CoreML/model.mlmodel"], "Core ML"),
        (["net.param", "net.bin"], "ncnn"),
        (["_METADATA", "d/5cc4", "manifest.ocdbt"], "Orbax"),
        (["_METADATA", "params.kernel/.zarray", "params.kernel/0.0"], "Orbax"),
        (["10/_CHECKPOINT_METADATA", "10/default/_METADATA"], "Orbax checkpoint, in its directory 10"),
        (["target.encoder.scale/.zarray", "checkpoint"], "Zarr's format"),
        (["flax_model.msgpack", "config.json"], "Flax"),
        (["tf_model.h5", "config.json"], "Keras"),
        (["model.onnx", "config.json"], "ONNX"),
    ],
)
def test_a_directory_of_another_framework_is_named(names: list[str], what: str) -> None:
    for name in names:
        path = Path("folder", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(FLOATS)
    assert what in refusal("folder")


def test_what_is_no_such_model_is_not_called_one() -> None:
    """Random bytes, text, cut messages, a message of unknown fields."""
    onnx = FOREIGN["ONNX"][0]
    others = [
        FLOATS, b"\x08\x03" + FLOATS, b"name: 'x'\nlayer {}\n" * 9, onnx[:-3], onnx + b"\7",
        message((1, 8), (7, GRAPH), (99, "x")), message((1, "only a name")),
    ]  # fmt: skip
    for number, content in enumerate(others):
        Path(f"{number}.pb").write_bytes(content)
        with pytest.raises(CkptoolError, match="no checkpoint that ckptool knows"):
            ckptool.open(f"{number}.pb")


# --- archives around checkpoints -------------------------------------------------------------------------------------


def pth() -> bytes:
    file = io.BytesIO()
    torch.save({"w": torch.ones(3)}, file)
    return file.getvalue()


def legacy() -> bytes:
    file = io.BytesIO()
    torch.save({"w": torch.ones(3)}, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


def tar(members: dict[str, bytes], mode: str = "w", **options: Any) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode, **options) as archive:  # type: ignore[call-overload]
        for name, content in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(content)
            archive.addfile(header, io.BytesIO(content))
    return file.getvalue()


def zipped(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


MEMBERS = {"code/inference.py": b"import torch\n" * 99, "model.pth": pth(), "README": b"text"}


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_tar_archive_names_the_checkpoint_in_it_and_how_to_extract_it(mode: str, form: int, run: Run) -> None:
    long = "a" * 90 + "/" + "b" * 90 + "/model.pth"  # in a header of its own
    Path("model.tar").write_bytes(tar({**MEMBERS, long: pth()}, mode, format=form))
    said = refusal("model.tar")
    assert f"that holds model.pth, {long}: extract it first (`tar xf FILE model.pth`)" in said
    assert "tar archive" in said
    compressed = {"w": "", "w:gz": "gzip", "w:bz2": "bzip2", "w:xz": "xz"}[mode]
    assert (compressed or "a tar archive") in said
    assert run("inspect", "model.tar")[0] == 2


def test_a_compressed_zip_archive_names_the_checkpoint_in_it() -> None:
    Path("model.zip").write_bytes(zipped(MEMBERS))
    assert "that holds model.pth: extract it first (`unzip FILE model.pth`)" in refusal("model.zip")


def test_a_checkpoint_is_found_by_its_bytes_where_its_name_says_nothing() -> None:
    members = {"weights/best model": legacy(), "notes": b"text"}
    Path("a").write_bytes(zipped(members))
    assert "holds weights/best model: extract it first (`unzip FILE 'weights/best model'`)" in refusal("a")
    Path("b").write_bytes(tar(members, "w:gz"))
    assert "(`tar xf FILE 'weights/best model'`)" in refusal("b")


def test_a_reinforcement_learning_zip_names_all_of_its_checkpoints() -> None:
    """Stable-Baselines3's, packed again: policies beside JSON."""
    members = {"data": b"{}", "policy.pth": pth(), "policy.optimizer.pth": pth(), "_stable_baselines3_version": b"2.3"}
    Path("ppo.zip").write_bytes(zipped(members))
    assert "holds policy.pth, policy.optimizer.pth: extract it first" in refusal("ppo.zip")


def test_a_zip_in_a_zip_and_a_tar_in_a_zip_are_named() -> None:
    Path("outer.zip").write_bytes(zipped({"inner.zip": zipped(MEMBERS), "a.txt": b"x"}))
    assert "holds inner.zip: extract it first (`unzip FILE inner.zip`)" in refusal("outer.zip")
    Path("outer2.zip").write_bytes(zipped({"model.tar.gz": tar(MEMBERS, "w:gz")}))
    assert "holds model.tar.gz" in refusal("outer2.zip")


@pytest.mark.parametrize(
    ("squeeze", "tool"),
    [
        (gzip.compress, "gunzip -c FILE > OUT"), (bz2.compress, "bunzip2 -c FILE > OUT"),
        (lzma.compress, "unxz -c FILE > OUT"), (zlib.compress, "zlib.decompress"),
        (lambda data: lzma.compress(data, lzma.FORMAT_ALONE), "unlzma -c FILE > OUT"),
    ],
)  # fmt: skip
def test_a_compressed_file_that_is_no_tar_says_what_is_in_it(squeeze: Any, tool: str) -> None:
    contents = {
        pth(): "a checkpoint of torch", legacy(): "a checkpoint of torch", save({"a": torch.ones(1)}): "a safetensors",
        FOREIGN["GGUF"][0]: "a GGUF file", b"just text": "", pickle.dumps({"w": [1.0]}, 4): "a pickle",
        b"\x80\4\x95" + bytes(8) + b"\x8c\x13joblib.numpy_pickle": "a joblib file",
    }  # fmt: skip
    for content, what in contents.items():
        Path("x.pth").write_bytes(squeeze(content))
        said = refusal("x.pth")
        assert what in said
        assert "unpack it first (`" in said
        assert tool in said


def test_an_archive_without_a_checkpoint_says_what_is_in_it() -> None:
    Path("x.zip").write_bytes(zipped({"a.txt": b"text", "b/c.json": b"{}"}))
    assert "no checkpoint in it: a.txt, b/c.json" in refusal("x.zip")
    Path("x.tar").write_bytes(tar({"a.txt": b"text"}))
    assert "a tar archive, and no checkpoint in it: a.txt" in refusal("x.tar")
    Path("x.keras").write_bytes(zipped({"metadata.json": b"{}", "config.json": b"{}", "model.weights.h5": FLOATS}))
    assert "a Keras archive (.keras)" in refusal("x.keras")
    assert "h5py.File, after `unzip FILE model.weights.h5`, gives its arrays" in refusal("x.keras")


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz", "w"])
def test_a_damaged_archive_is_one_line_too(mode: str) -> None:
    whole = tar({**MEMBERS, "noise": torch.randn(5000).numpy().tobytes()}, mode)
    for end in (513, len(whole) // 3, len(whole) - 40):
        for content in (whole[:end], whole[: end // 2] + b"\xff" * 16 + whole[end // 2 + 16 : end]):
            Path("x.tar").write_bytes(content)
            with pytest.raises(CkptoolError):
                ckptool.open("x.tar")


def test_a_bomb_costs_no_more_than_a_look(tmp_path: Path) -> None:
    import time

    machine = gzip.GzipFile("bomb.tar.gz", "wb", compresslevel=1)
    machine.write(tar({"first.txt": b"x"})[:1024])
    for _ in range(100):
        machine.write(bytes(1 << 20))
    machine.close()
    begun = time.process_time()
    assert "first.txt" in refusal("bomb.tar.gz")
    assert time.process_time() - begun < 2
