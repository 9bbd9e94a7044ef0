"""What every format is asked for: order, ties, dtypes, cuts, pickles that would run something, and little memory."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import re
import struct
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from libraries import WRITERS, written
from oracles import CANARY, FIXTURES, bits

import ckptool
from ckptool import formats
from ckptool.core.checkpoint import Checkpoint
from ckptool.core.tensor import TensorInfo
from ckptool.io.files import Files
from ckptool.io.zip_write import ZipWriter
from ckptool.values.blocks import read_bytes
from tests.fuzz import judge

EVERY = pytest.mark.parametrize("name", WRITERS)


def test_every_format_has_a_writer_here() -> None:
    assert set(WRITERS) == {row.name for row in formats.FORMATS}


def found_in(checkpoint: Checkpoint, name: str) -> dict[str, TensorInfo]:
    """The tensors by their own names: of those that are listed per rank, the first rank's."""
    tensors = checkpoint.state_dict()
    if name in ("megatron", "consolidated"):
        first = next(iter(tensors)).partition("/")[0]
        return {key.partition("/")[2]: one for key, one in tensors.items() if key.startswith(f"{first}/")}
    return tensors


# --- order and ties --------------------------------------------------------------------------------------------------

SORTED = {"dcp-hf", "safetensors", "sharded", "lock"}
"""Whose library puts the names into an order of its own."""


@EVERY
def test_names_stand_in_the_order_of_the_file(name: str, tmp_path: Path) -> None:
    names = ["b", "a", "z10", "z9", "c"][: 1 if name == "npy" else 5]
    path = written(name, tmp_path, {key: torch.full((2,), float(at)) for at, key in enumerate(names)})
    found = [*found_in(ckptool.open(path), name)]
    if name == "npy":
        assert len(found) == 1
    else:
        assert (sorted(found) if name in SORTED else found) == (sorted(names) if name in SORTED else names)


TIED = ("torch", "torch-legacy", "torch-tar", "torchscript", "pt2", "torch.package", "bundle", "sharded-bin",
        "deepspeed", "pickle", "megatron", "consolidated", "fsdp-ranks")  # fmt: skip


def test_the_formats_that_can_hold_ties_are_listed() -> None:
    other = {"safetensors", "sharded", "joblib"}  # ties are in the metadata of ours; joblib writes an array twice
    assert {row.name for row in formats.FORMATS if row.holds.ties} == {*TIED, *other}


@pytest.mark.parametrize("name", TIED)
def test_names_of_one_tensor_are_tied(name: str, tmp_path: Path) -> None:
    memory = torch.arange(4.0)
    tree: dict[str, Any] = {"a": memory, "b": memory, "c": torch.arange(4.0)}
    path = written(name, tmp_path, tree)
    tied = [{key.rpartition("/")[2] for key in group} for group in ckptool.open(path).shared()]
    assert tied
    assert all(group == {"a", "b"} for group in tied)


# --- dtypes ----------------------------------------------------------------------------------------------------------

FLOATS = ["float64", "float32", "float16", "bfloat16"]
INTEGERS = ["int64", "int32", "int16", "int8", "uint8"]
LATE = ["uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz",
        "float8_e8m0fnu", "float4_e2m1fn_x2"]  # fmt: skip
"""Which have no class of storages in torch."""

COMPLEX = ["complex128", "complex64"]
TORCH = [*FLOATS, *INTEGERS, "bool", *COMPLEX, "complex32", *LATE]
NUMPY = ["float64", "float32", "float16", *INTEGERS, "uint16", "uint32", "uint64", "bool", *COMPLEX]
REFERENCE = [*FLOATS, *INTEGERS, "bool", "complex64", *LATE]
DTYPES = {
    **dict.fromkeys(WRITERS, TORCH),
    **dict.fromkeys(("safetensors", "sharded", "dcp-hf"), REFERENCE),
    **dict.fromkeys(("npy", "npz", "joblib"), NUMPY),
    "torch-legacy": [*FLOATS, *INTEGERS, "bool", *COMPLEX],
    "torch-tar": [*FLOATS, *INTEGERS, "bool"],
    "pt2": TORCH[:-1],
    "gguf": [*FLOATS, "int64", "int32", "int16", "int8"],
    "deepspeed": ["float32", *INTEGERS, "uint16", "uint32", "uint64", "bool"],  # floats are made float32: its script
}


def of_dtype(dtype: str) -> torch.Tensor:
    wanted = getattr(torch, dtype)
    codes = torch.arange(16, dtype=torch.uint8) % 4
    return codes.view(wanted) if dtype.startswith("float4") else codes.to(wanted)


@EVERY
def test_every_dtype_that_the_library_writes_is_read(name: str, tmp_path: Path) -> None:
    whole = {f"of_{dtype}": of_dtype(dtype) for dtype in DTYPES[name]}
    for number, tree in enumerate([{key: one} for key, one in whole.items()] if name == "npy" else [whole]):
        (tmp_path / str(number)).mkdir()
        found = found_in(ckptool.open(written(name, tmp_path / str(number), tree)), name)
        assert len(found) == len(tree)
        with Files() as files:
            for (key, value), (other, one) in zip(sorted(tree.items()), sorted(found.items()), strict=True):
                assert name == "npy" or key == other
                assert f"torch.{one.dtype}" == str(value.dtype)
                assert one.shape == tuple(value.shape)
                assert name == "lock" or read_bytes(one, files) == bits(value), key


# --- cuts ------------------------------------------------------------------------------------------------------------


def parts(data: bytes) -> set[int]:
    """Where the parts of a file begin and end: members of an archive, blocks, headers, and the tensors' elements.

    Of parts of one kind the first two, the middle one and the last: an archive may have dozens.
    """
    found = {len(data) // 2, len(data) - 1}
    for mark in (b"PK\x03\x04", b"PK\x07\x08", b"PK\x01\x02", b"PK\x05\x06", ELEMENTS, b"\x80\x02", b"\x80\x04"):
        places = [match.start() for match in re.finditer(re.escape(mark), data)]
        for at in {*places[:2], *places[len(places) // 2 :][:1], *places[-1:]}:
            found |= {at, at + len(mark), at + 30}
    return {at for at in found if 0 < at < len(data)}


ELEMENTS = torch.arange(5.0).numpy().tobytes()


@EVERY
def test_cut_where_any_of_its_parts_begins_or_ends_it_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    tree = {"w": torch.arange(5.0), "bias": torch.arange(5.0) + 1}
    path = written(name, tmp_path, tree if name != "npy" else {"w": tree["w"]})
    for file in [path] if path.is_file() else sorted(one for one in path.rglob("*") if one.is_file()):
        whole = file.read_bytes()
        for end in sorted(parts(whole.rstrip(b"\0"))):
            file.write_bytes(whole[:end])
            code, _ = judge.answer("inspect", path, "--check", yes=(0, 1))
            assert code, (file.name, end)
        file.write_bytes(whole)
    assert judge.answer("inspect", path)[0] == 0


# --- pickles that would run something --------------------------------------------------------------------------------


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, (CANARY,)


OBJECTS = ("dcp", "deepspeed", "torch", "torch-legacy", "torch-tar", "torch.package", "bundle", "sharded-bin", "joblib",
           "pickle", "megatron", "consolidated", "fsdp-ranks")  # fmt: skip
"""Formats in whose tree any object may stand."""


def looks(path: Path) -> Iterator[tuple[int, str]]:
    for words in (["inspect"], ["inspect", "--json"], ["inspect", "--check"], ["inspect", "--stats"],
                  ["convert", "--to", "safetensors", "-o", "out.safetensors"]):  # fmt: skip
        out = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            code = judge.main([words[0], str(path), *words[1:]])
        yield code, out.getvalue()
        assert not Path(CANARY).exists(), words


@pytest.mark.parametrize("name", OBJECTS)
def test_an_object_that_would_run_something_is_named_and_runs_nothing(name: str, tmp_path: Path) -> None:
    tree = {"hook": Evil(), "w": torch.ones(2), "v": torch.ones(3)}
    path = written(name, tmp_path, tree)
    for code, out in looks(path):
        assert code in (0, 1) or "--tp-rules" in out, out
    assert ("posix", "mkdir") in ckptool.open(path).names


def poisoned(data: bytes, evil: bytes) -> bytes:
    """A file in which every pickle is another one."""
    if data.startswith(b"PK"):
        made = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(data)) as archive, zipfile.ZipFile(made, "w") as other:
            for member in archive.infolist():
                other.writestr(member.filename, poisoned(archive.read(member), evil))
        return made.getvalue()
    return evil if data.startswith(b"\x80") else data


@EVERY
def test_a_pickle_in_the_place_of_any_other_runs_nothing(name: str, tmp_path: Path) -> None:
    path = written(name, tmp_path, {"w": torch.ones(2), "v": torch.ones(3)} if name != "npy" else {"w": torch.ones(2)})
    for file in [path] if path.is_file() else [one for one in path.rglob("*") if one.is_file()]:
        for evil in (pickle.dumps(Evil(), 2), pickle.dumps({"w": Evil(), "model": {"w": Evil()}}, 4)):
            whole = file.read_bytes()
            file.write_bytes(poisoned(whole, evil))
            for code, out in looks(path):
                assert code in (0, 1, 2), out
            file.write_bytes(whole)


# --- ten gigabytes ---------------------------------------------------------------------------------------------------

SMALL, BIG = 70_016, 1_250_000_000
"""Elements of a tensor of float64 that a library writes, and of the one that is made of it: 10 GB of zeros, a hole."""

FULL = torch.ones(SMALL, dtype=torch.float64).numpy().tobytes()
OTHERS = 150
"""Small tensors whose names come before its, so that they are first in every file."""

Pieces = list[bytes | int]
"""What a file is made of: bytes, and the lengths of its holes."""


def length(pieces: Pieces) -> int:
    return sum(piece if isinstance(piece, int) else len(piece) for piece in pieces)


def renumbered(data: bytes) -> bytes:
    """The bytes of a header with the big number in the place of the small one, as pickle, C, NumPy and JSON have it."""
    data = data.replace(b"(%d,), }     " % SMALL, b"(%d,), }" % BIG)  # NumPy's header ends in spaces
    for size, more in (
        (1, 0),
        (1, 3 * OTHERS),
        (8, 0),
        (8, 24 * OTHERS),
    ):  # elements and bytes, without and with others
        small, big = size * SMALL + more, size * BIG + more
        data = data.replace(struct.pack("<q", small), struct.pack("<q", big)).replace(b"%d" % small, b"%d" % big)
        if size == 1:
            data = data.replace(b"J" + struct.pack("<i", small), b"J" + struct.pack("<i", big))
    return data


class Collected:
    """Takes what an `Output` takes, and lengths of holes."""

    def __init__(self) -> None:
        self.pieces: Pieces = []
        self.position = 0

    def write(self, piece: Any) -> None:
        self.pieces.append(piece if isinstance(piece, int) else bytes(piece))
        self.position += length(self.pieces[-1:])


def grown(data: bytes) -> Pieces:
    """What is like this file, and has a hole where that has the elements of the tensor."""
    if len(data) >= len(FULL) and not any(data):  # an optimizer's
        return [len(data) + 8 * (BIG - SMALL)]
    if data.startswith(b"PK"):
        output: Any = Collected()
        writer = ZipWriter(output)
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for member in archive.infolist():
                pieces: Any = grown(archive.read(member))
                writer.add_blocks(member.filename, length(pieces), pieces, 1)
        writer.close()
        return output.pieces
    if data[257:262] == b"ustar":
        whole: Pieces = []
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            for item in archive:
                inner = grown(archive.extractfile(item).read())  # type: ignore[union-attr]
                item.size = length(inner)
                whole += [item.tobuf(tarfile.GNU_FORMAT), *inner, bytes(-item.size % 512)]
        return [*whole, bytes(1024)]
    before, found, behind = data.partition(FULL)
    return [renumbered(before), *([8 * BIG] if found else []), renumbered(behind)]


def put(path: Path, pieces: Pieces) -> None:
    with path.open("wb") as file:
        for piece in pieces:
            if isinstance(piece, int):
                file.seek(piece, 1)
            else:
                file.write(piece)
        file.truncate()


def grow(path: Path) -> None:
    """Makes a file, or those of a directory, big ones."""
    for file in [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]:
        pieces: Any = grown(data := file.read_bytes())
        if file.suffix == ".safetensors":  # its first number is the length of its header
            more = len(pieces[0]) - len(data.partition(FULL)[0])
            pieces[0] = struct.pack("<Q", struct.unpack("<Q", pieces[0][:8])[0] + more) + pieces[0][8:]
        put(file, pieces)


def grow_distributed(path: Path) -> None:
    """In whose metadata the torch file of each tensor has an offset and a length: the big one gets its own file."""
    metadata = pickle.loads((path / ".metadata").read_bytes())
    (stored,) = (stored for index, stored in metadata.storage_data.items() if index.fqn == "w")
    raw = (path / stored.relative_path).read_bytes()
    pieces = grown(raw[stored.offset : stored.offset + stored.length])
    put(path / "__0_1.distcp", pieces)
    stored.relative_path, stored.offset, stored.length = "__0_1.distcp", 0, length(pieces)
    saved = metadata.state_dict_metadata["w"]
    saved.size = saved.chunks[0].sizes = torch.Size([BIG])
    (path / ".metadata").write_bytes(pickle.dumps(metadata))


REFUSED = {"pickle": "MAX_PICKLE"}
"""Where the elements stand inside of the pickle, and reading the one is reading the other: refused before that."""

LOOK = """
import contextlib, io, json, resource, sys, time
from ckptool.cli import main
def peak():
    if not sys.platform.startswith("linux"):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with open("/proc/self/status") as file:  # getrusage has the peak of the process that started this one
        return next(1024 * int(line.split()[1]) for line in file if line.startswith("VmHWM"))
def look(path):
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        code = main(["inspect", "--json", path])
    return code, json.loads(out.getvalue())
first, *paths = sys.argv[1:]
look(first)
before = peak()
for path in paths:
    begin = time.process_time()
    code, said = look(path)
    tensors = [row for one in said.get("result", []) for row in one["tensors"]]
    biggest = max((size for row in tensors for size in row["shape"]), default=0)
    error = said.get("error", {}).get("message", "")
    print(json.dumps([code, error, len(tensors), biggest, peak() - before, time.process_time() - begin]))
"""


def test_the_headers_of_ten_gigabytes_take_little_memory_and_time(tmp_path: Path) -> None:
    big = torch.ones(SMALL, dtype=torch.float64)
    many = {f"layers.{number}.bias": torch.full((3,), number + 0.5, dtype=torch.float64) for number in range(OTHERS)}
    few = {"torchscript": {}, "pt2": {}, "npy": {}}  # a module's buffers have no dots, and an array has no name
    paths = {name: written(name, tmp_path, {**few.get(name, many), "w": big}) for name in WRITERS}
    for name, path in paths.items():
        grow_distributed(path) if name == "dcp" else grow(path)
    disk = sum(file.stat().st_blocks * 512 for file in tmp_path.rglob("*") if file.is_file())
    assert disk < 50_000_000, "holes take space here"
    script = [sys.executable, "-c", LOOK, str(FIXTURES / "tied.pth"), *map(str, paths.values())]
    out = subprocess.run(script, capture_output=True, text=True, check=True)
    wrong = []
    for name, line in zip(paths, out.stdout.splitlines(), strict=True):
        code, error, count, biggest, more, taken = json.loads(line)
        right = code == 0 and biggest == BIG and count > len(few.get(name, many))
        if name in REFUSED:
            right = code == 2 and REFUSED[name] in error
        if not right or more > 40_000_000 or taken > 5:
            wrong.append((name, line))
    assert not wrong
