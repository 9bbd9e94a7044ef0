from __future__ import annotations

import hashlib
import json
import re
import struct
import time
import tracemalloc
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from everything import SAMPLES
from oracles import FIXTURES, Run, thinned

from ckptool import limits
from ckptool import open as open_checkpoint
from ckptool.core.checkpoint import Checkpoint
from ckptool.errors import FormatError, LimitError, UnsupportedError
from ckptool.io.files import Files
from ckptool.ops.scales import of_blocks
from ckptool.values.blocks import read_bytes

F32, F16, Q4_0, Q8_0, Q4_K, I8, I64, BF16 = 0, 1, 2, 8, 12, 24, 27, 30
UINT32, STRING, ARRAY = 4, 8, 9

Tensor = tuple[int, tuple[int, ...], bytes]
"""Type, sizes in GGUF's order, bytes."""


def text(value: str, order: str = "<") -> bytes:
    return struct.pack(f"{order}Q", len(value.encode())) + value.encode()


def entry(key: str, kind: int, raw: bytes, order: str = "<") -> bytes:
    return text(key, order) + struct.pack(f"{order}I", kind) + raw


def array(kind: int, *items: bytes) -> bytes:
    return struct.pack("<IQ", kind, len(items)) + b"".join(items)


def gguf(
    tensors: Mapping[str, Tensor] | Sequence[tuple[str, Tensor]] = (),
    entries: tuple[bytes, ...] = (),
    *,
    version: int = 3,
    order: str = "<",
    alignment: int = 32,
    offsets: tuple[int, ...] = (),
) -> bytes:
    named = list(tensors.items()) if isinstance(tensors, Mapping) else list(tensors)
    table = data = b""
    for number, (name, (kind, sizes, raw)) in enumerate(named):
        begin = offsets[number] if offsets else len(data)
        table += text(name, order) + struct.pack(f"{order}I{len(sizes)}QIQ", len(sizes), *sizes, kind, begin)
        data += raw + bytes(-len(raw) % alignment)
    head = b"GGUF" + struct.pack(f"{order}IQQ", version, len(named), len(entries)) + b"".join(entries) + table
    return head + bytes(-len(head) % alignment) + data


def put(path: Path, data: bytes) -> Path:
    (path / "x.gguf").write_bytes(data)
    return path / "x.gguf"


def opened(path: Path, data: bytes) -> Checkpoint:
    return open_checkpoint(put(path, data))


def raw_of(checkpoint: Checkpoint, key: str) -> bytes:
    tensor = checkpoint.state_dict()[key]
    with Files() as files:
        return read_bytes(tensor.parts[0] if tensor.parts else tensor, files)


FLOATS = np.arange(6, dtype="<f4").reshape(2, 3)
PLAIN: dict[str, Tensor] = {"w": (F32, (3, 2), FLOATS.tobytes()), "b": (I64, (2,), np.array([-1, 7], "<i8").tobytes())}
BLOCKS = bytes(range(144)) * 2


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("order", ["<", ">"])
def test_shapes_are_torchs_and_values_are_numpys_in_both_byte_orders(version: int, order: str, tmp_path: Path) -> None:
    arrays = {
        name: np.arange(-6, 18).astype(f"{order}{form}").reshape(2, 3, 4)
        for name, form in {"0": "f4", "1": "f2", "24": "i1", "25": "i2", "26": "i4", "27": "i8", "28": "f8"}.items()
    }
    tensors = {name: (int(name), (4, 3, 2), made.tobytes()) for name, made in arrays.items()}
    size = struct.pack(f"{order}I", 77)
    found = opened(tmp_path, gguf(tensors, (entry("size", UINT32, size, order),), version=version, order=order))
    assert dict(found.metadata) == {"size": "77"}
    for name, made in arrays.items():
        tensor = found.state_dict()[name]
        assert (tensor.shape, tensor.nbytes) == ((2, 3, 4), made.nbytes)
        assert raw_of(found, name) == made.astype(made.dtype.newbyteorder("<")).tobytes()
        assert found.to_torch()[name].tolist() == made.tolist()


def test_bfloat16_in_a_big_endian_file_is_refused_by_its_name(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"big-endian, with bfloat16 of unknown byte order: w;"):
        opened(tmp_path, gguf({"w": (BF16, (2,), b"\x3f\x80\x40\0")}, order=">"))
    assert opened(tmp_path, gguf({"w": (BF16, (2,), b"\x80\x3f\0\x40")})).to_torch()["w"].tolist() == [1.0, 2.0]


def test_a_quantised_tensor_is_listed_with_its_type_its_shape_and_its_bytes(tmp_path: Path) -> None:
    found = opened(tmp_path, gguf({"lm.weight": (Q4_K, (256, 2), BLOCKS), **PLAIN}))
    tensor = found.state_dict()["lm.weight"]
    assert (tensor.kind, tensor.shape, tensor.numel, tensor.nbytes) == ("Q4_K", (2, 256), 512, 288)
    assert raw_of(found, "lm.weight") == BLOCKS
    assert [path for path, _ in found.tensors()] == [("lm.weight",), ("w",), ("b",)]


def test_inspect_shows_types_bytes_and_metadata(run: Run, tmp_path: Path) -> None:
    words = [text(f"w{number}") for number in range(9)]
    entries = (
        entry("general.name", STRING, text("tiny ✓")), entry("tokens", ARRAY, array(STRING, *words)),
        entry("few", ARRAY, array(UINT32, *(struct.pack("<I", number) for number in (1, 2)))),
        entry("nested", ARRAY, array(ARRAY, array(STRING, *words), array(7, b"\1"))),
    )  # fmt: skip
    path = put(tmp_path, gguf({"lm.weight": (Q4_K, (256, 2), BLOCKS)}, entries))
    code, out, _ = run("inspect", path)
    assert code == 0
    for said in ("Q4_K", "2x256", "288 B", "general.name: tiny ✓", "tokens: 9 strings", "few: [1, 2]", "2 arrays"):
        assert said in out


@pytest.mark.parametrize("to", ["torch", "torch-legacy", "safetensors", "npz", "sharded"])
def test_every_output_refuses_quantised_tensors_by_key_and_type(to: str, run: Run, tmp_path: Path) -> None:
    path = put(tmp_path, gguf({"lm.weight": (Q4_K, (256, 2), BLOCKS), "q": (Q4_0, (32,), bytes(18)), **PLAIN}))
    for more in ((), ("--dry-run",)):
        code, _, err = run("convert", path, "--to", to, "-o", tmp_path / "out", *more)
        assert (code, err.count("\n")) == (2, 1)
        assert "lm.weight (Q4_K), q (Q4_0)" in err
        assert not (tmp_path / "out").exists()
    code, _, err = run("filter", path, "--exclude", "lm*", "--exclude", "q", "--to", to, "-o", tmp_path / "out")
    assert code == 0, err


@pytest.mark.parametrize(("dtype", "form"), [("float32", "<f4"), ("float16", "<f2"), ("float64", "<f8")])
@pytest.mark.parametrize("shape", [(3, 64), (2, 5, 32), (32,), (0, 32)])
def test_q8_0_is_dequantised_on_request_as_numpy_does(
    dtype: str, form: str, shape: tuple[int, ...], run: Run, tmp_path: Path
) -> None:
    count = int(np.prod(shape)) // 32
    rng = np.random.default_rng(3)
    scales, numbers = rng.normal(size=count).astype("<f2"), rng.integers(-128, 128, (count, 32)).astype("i1")
    raw = b"".join(scale.tobytes() + row.tobytes() for scale, row in zip(scales, numbers, strict=True))
    wanted = (scales.astype("f8")[:, None] * numbers).reshape(shape).astype(form)
    path = put(tmp_path, gguf({"b": PLAIN["b"], "w": (Q8_0, shape[::-1], raw)}))
    args = ["convert", path, "--dequantize", "--dtype", dtype, "-o"]
    for out in ("out.safetensors", "out.pth", "out.npz"):
        code, _, err = run(*args, tmp_path / out)
        assert code == 0, err
        found = open_checkpoint(tmp_path / out).state_dict()["w"]
        assert (found.dtype, found.shape) == (dtype, shape)
        assert raw_of(open_checkpoint(tmp_path / out), "w") == wanted.tobytes()


@pytest.mark.parametrize("shape", [(3, 64), (2, 5, 32), (32,), (0, 32)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_q4_0_is_dequantised_on_request_as_numpy_does(
    dtype: str, shape: tuple[int, ...], run: Run, tmp_path: Path
) -> None:
    count = int(np.prod(shape)) // 32
    rng = np.random.default_rng(4)
    scales, raw = rng.normal(size=count).astype("<f2"), rng.integers(0, 256, (count, 16), dtype="u1")
    numbers = np.stack([raw & 15, raw >> 4], 1).reshape(count, 32).astype("f4") - 8
    wanted = torch.from_numpy((scales.astype("f4")[:, None] * numbers).reshape(shape)).to(getattr(torch, dtype))
    blocks = b"".join(scale.tobytes() + row.tobytes() for scale, row in zip(scales, raw, strict=True))
    path = put(tmp_path, gguf({"b": PLAIN["b"], "w": (Q4_0, shape[::-1], blocks)}))
    code, _, err = run("convert", path, "--dequantize", "--dtype", dtype, "-o", tmp_path / "out.pth")
    assert (code, err) == (0, "")
    assert torch.equal(torch.load(tmp_path / "out.pth", weights_only=True)["w"], wanted)


def test_q4_0_is_what_the_library_dequantises(tmp_path: Path) -> None:
    """A block, and what ``gguf.quants.dequantize`` of gguf 0.19.0 gives for it."""
    block = bytes.fromhex("00be3b6273043b51de2c8d2f0f80c37a9be1")
    made = open_checkpoint(put(tmp_path, gguf({"w": (Q4_0, (32,), block)}))).state_dict()["w"]
    lazy = of_blocks(made, "float32")
    assert lazy is not None
    with Files() as files:
        assert np.frombuffer(read_bytes(lazy, files), "<f4").tolist() == [
            -4.5, 9.0, 7.5, 6.0, -4.5, 10.5, -9.0, -6.0, -7.5, -10.5, -10.5, 12.0, 7.5, -3.0, -4.5, 10.5,
            7.5, 3.0, 1.5, 12.0, 7.5, 4.5, -7.5, 9.0, -0.0, 9.0, 12.0, -0.0, -6.0, 1.5, -1.5, -9.0,
        ]  # fmt: skip


def test_what_cannot_be_dequantised_is_still_refused_by_its_type(run: Run, tmp_path: Path) -> None:
    tensors = {"q": (Q8_0, (32,), bytes(34)), "lm.weight": (Q4_K, (256, 2), BLOCKS)}
    for order, said in (("<", "hold lm.weight (Q4_K)"), (">", "hold q (Q8_0), lm.weight (Q4_K)")):
        path = put(tmp_path, gguf(tensors, order=order))
        for out in ("out.pth", "out.safetensors"):
            code, _, err = run("convert", path, "--dequantize", "-o", tmp_path / out)
            assert (code, said in err, err.count("\n")) == (2, True, 1)
    path = put(tmp_path, gguf({"q": tensors["q"]}))
    args = ["--dequantize", "--dtype", "float32", "--keep", "q"]
    assert "hold q (Q8_0)" in run("convert", path, *args, "-o", tmp_path / "out.pth")[2]


def test_to_torch_refuses_a_quantised_tensor_by_its_type(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="torch has no Q4_K"):
        opened(tmp_path, gguf({"lm.weight": (Q4_K, (256, 2), BLOCKS)})).to_torch()


def test_diff_and_hash_tell_quantised_tensors_apart_by_their_bytes(run: Run, tmp_path: Path) -> None:
    contents = {
        "a": (Q4_0, (32, 8), bytes(144)), "same": (Q4_0, (32, 8), bytes(144)), "other": (Q4_0, (32, 8), b"1" * 144),
        "type": (20, (32, 8), bytes(144)),
    }  # fmt: skip
    hashes, codes = {}, {}
    for name, tensor in contents.items():
        (tmp_path / name).write_bytes(gguf({"w": tensor}))
        hashes[name] = re.findall(r"^hash +(\w+)", run("inspect", tmp_path / name, "--hash")[1], re.M)[0]
        codes[name] = run("diff", tmp_path / "a", tmp_path / name, "--values")[0]
    assert hashes["a"] == hashes["same"]
    assert len(set(hashes.values())) == 3
    assert codes == {"a": 0, "same": 0, "other": 1, "type": 1}


def test_the_alignment_of_the_file_is_used(tmp_path: Path) -> None:
    for alignment in (1, 8, 64, 4096):
        said = entry("general.alignment", UINT32, struct.pack("<I", alignment))
        found = opened(tmp_path, gguf(PLAIN, (said,), alignment=alignment))
        assert found.to_torch()["w"].tolist() == FLOATS.tolist()
    for kind, raw in ((UINT32, struct.pack("<I", 0)), (UINT32, struct.pack("<I", 24)), (STRING, text("32"))):
        with pytest.raises(FormatError, match=r"general\.alignment is .*: expected a power of two"):
            opened(tmp_path, gguf(PLAIN, (entry("general.alignment", kind, raw),)))


def test_123_tensors_are_not_the_brace_of_a_safetensors_header(tmp_path: Path) -> None:
    found = opened(tmp_path, gguf({f"w{number}": (I8, (1,), b"\7") for number in range(123)}))
    assert (found.format, len(found.state_dict())) == ("gguf", 123)
    assert opened(tmp_path, gguf()).state_dict() == {}
    assert opened(tmp_path, gguf({"none": (F32, (0, 3), b"")})).state_dict()["none"].shape == (3, 0)


def test_what_follows_the_data_is_told(tmp_path: Path) -> None:
    assert opened(tmp_path, gguf(PLAIN)).trailing == ""
    assert "zeros" in opened(tmp_path, gguf(PLAIN) + bytes(32)).trailing


TWICE = [("w", (I8, (1,), b"\7")), ("w", (I8, (1,), b"\7"))]
ENTRY = entry("a", UINT32, bytes(4))
DAMAGED: dict[str, tuple[bytes, str]] = {
    "a name twice": (gguf(TWICE), "two tensors have the name 'w'"),
    "an entry twice": (gguf({}, (ENTRY, ENTRY)), "has the key 'a' twice"),
    "overlapping": (gguf(PLAIN, offsets=(0, 0)), "'w' overlap|'b' overlap"),
    "unaligned": (gguf(PLAIN, offsets=(4, 64)), "no multiple of 32"),
    "behind the end": (gguf(PLAIN, offsets=(0, 64)), "'b', int64 of shape .* truncated download"),
    "offset of 2^63": (gguf(PLAIN, offsets=(0, 1 << 63)), "truncated download"),
    "no whole blocks": (gguf({"w": (Q8_0, (33, 32), bytes(34 * 33))}), "rows of 33 elements: Q8_0 has blocks of 32"),
    "no rows": (gguf({"w": (Q8_0, (), bytes(34))}), "rows of 1 elements"),
    "too many elements": (gguf({"w": (I8, (1 << 32, 1 << 32), b"")}), "more than can be counted"),
    "no elements of too many": (gguf({"w": (I8, (1 << 62, 0, 1 << 62), b"")}), "more than can be counted"),
    "too many dimensions": (gguf({"w": (I8, (1,) * 1001, b"\7")}), "1001 dimensions"),
    "too many tensors": (
        b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0) + bytes(99),
        "claims 1152921504606846976 tensors",
    ),
    "too many entries": (b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 63) + bytes(99), "entries of metadata"),
    "a long string": (gguf({}, (struct.pack("<Q", 1 << 62) + bytes(40),)), "the key of an entry takes 46116"),
    "no text": (gguf({}, (struct.pack("<Q", 1) + b"\xff" + bytes(16),)), "no UTF-8"),
    "an unknown entry": (gguf({}, (entry("a", 13, bytes(16)),)), "type 13, unknown"),
    "an unknown item": (gguf({}, (entry("a", ARRAY, struct.pack("<IQ", 99, 2)),)), "array of the type 99"),
    "a long array": (gguf({}, (entry("a", ARRAY, struct.pack("<IQ", 0, 1 << 50)),)), "claims 1125899906842624 items"),
    "arrays of arrays": (gguf({}, (entry("a", ARRAY, struct.pack("<IQ", 9, 1) * 5000),)), "nested over 127"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_header_is_one_line(name: str, run: Run, tmp_path: Path) -> None:
    data, said = DAMAGED[name]
    with pytest.raises(FormatError, match=said):
        opened(tmp_path, data)
    code, _, err = run("inspect", tmp_path / "x.gguf")
    assert (code, err.count("\n")) == (2, 1)


@pytest.mark.parametrize("version", [0, 1, 4, 1 << 24])
def test_other_versions_and_types_are_refused(version: int, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="a GGUF file of version"):
        opened(tmp_path, gguf(PLAIN, version=version))
    with pytest.raises(UnsupportedError, match="'w' has the GGUF type 31, which is not known"):
        opened(tmp_path, gguf({"w": (31, (32,), bytes(18))}))


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    entries = (
        entry("name", STRING, text("tiny")), entry("tokens", ARRAY, array(STRING, *[text("ab")] * 9)),
        entry("nested", ARRAY, array(ARRAY, array(UINT32, bytes(4)), array(STRING, text("x")))),
    )  # fmt: skip
    data = gguf({"q": (Q4_0, (32,), bytes(18)), "w": (F32, (8,), b"abcd" * 8)}, entries)
    assert set(opened(tmp_path, data).state_dict()) == {"q", "w"}
    for end in range(4, len(data)):
        with pytest.raises(FormatError):
            opened(tmp_path, data[:end])


@thinned(4)
def test_any_byte_changed_gives_an_answer_or_one_error(step: int, tmp_path: Path) -> None:
    data = bytearray((FIXTURES / "dense.gguf").read_bytes()[:1024])
    whole = (FIXTURES / "dense.gguf").read_bytes()
    for position in range(4, len(data), step):
        for flip in (1, 0x80):
            changed = bytearray(whole)
            changed[position] ^= flip
            try:
                opened(tmp_path, bytes(changed))
            except (FormatError, UnsupportedError, LimitError):
                continue


def test_a_header_over_the_limit_is_refused_and_strings_are_bounded(tmp_path: Path) -> None:
    words = array(STRING, *[text("")] * 1000)
    data = gguf({}, (entry("tokens", ARRAY, words),))
    with limits.limited(MAX_GGUF=4000), pytest.raises(LimitError, match="over MAX_GGUF, 4,000"):
        opened(tmp_path, data)
    assert opened(tmp_path, data).metadata["tokens"] == "1,000 strings"


def test_the_header_of_four_gigabytes_takes_no_memory(tmp_path: Path) -> None:
    words = array(STRING, *[text("word")] * 20_000)
    count = 800
    each = 5 << 20
    table = {f"blk.{number}.weight": (Q8_0, (32 * 1024, each // 34816), b"") for number in range(count)}
    head = gguf(table, (entry("tokens", ARRAY, words),), offsets=tuple(each * number for number in range(count)))
    path = put(tmp_path, head)
    with path.open("r+b") as file:
        file.truncate(len(head) + each * count)  # sparse
    tracemalloc.start()
    begin = time.perf_counter()
    found = open_checkpoint(path)
    taken, peak = time.perf_counter() - begin, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(found.state_dict()) == count
    assert peak < 16_000_000
    assert taken < 10


# --- models in several files -----------------------------------------------------------------------------------------


def split(path: Path, count: int = 3, total: int = 3) -> list[Path]:
    """A model as llama.cpp splits it: the first file has all metadata."""
    made = []
    for number in range(count):
        counts = (("split.no", number), ("split.count", total), ("split.tensors.count", 2 * total))
        entries = [
            entry(key, 2 if number else UINT32, struct.pack("<H" if number else "<I", one)) for key, one in counts
        ]
        first = (entry("general.name", STRING, text("tiny")),) if not number else ()
        tensors = {f"{number}.{name}": (F32, (3,), np.full(3, number + 0.5, "<f4").tobytes()) for name in "ab"}
        made.append(path / f"m-{number + 1:05}-of-{total:05}.gguf")
        made[-1].write_bytes(gguf(tensors, (*first, *entries)))
    return made


def test_a_split_model_is_read_as_one_whichever_of_its_files_is_named(run: Run, tmp_path: Path) -> None:
    paths = split(tmp_path)
    for path in paths:
        found = open_checkpoint(path)
        assert list(found.state_dict()) == [f"{number}.{name}" for number in range(3) for name in "ab"]
        assert [tensor.tolist() for tensor in found.to_torch().values()] == [
            [number + 0.5] * 3 for number in range(3) for _ in "ab"
        ]
        assert (dict(found.metadata), found.broken) == ({"general.name": "tiny"}, False)
        assert found.nbytes == sum(one.stat().st_size for one in paths)
        assert "put together from 3 files" in found.notes[0]
    assert run("convert", paths[1], "-o", tmp_path / "out.pth")[0] == 0
    assert len(torch.load(tmp_path / "out.pth", weights_only=True)) == 6


def test_a_file_of_a_split_model_that_is_not_there_is_incomplete(run: Run, tmp_path: Path) -> None:
    split(tmp_path)[1].unlink()
    first = tmp_path / "m-00001-of-00003.gguf"
    code, _, err = run("convert", first, "-o", tmp_path / "out.pth")
    assert (code, "not there: m-00002-of-00003.gguf" in err, err.count("\n")) == (2, True, 1)
    assert open_checkpoint(first).broken


def test_other_names_are_read_alone_and_contradictions_refused(tmp_path: Path) -> None:
    paths = split(tmp_path)
    alone = paths[0].rename(tmp_path / "renamed.gguf")
    assert list(open_checkpoint(alone).state_dict()) == ["0.a", "0.b"]
    assert "one of 3 files of a split model, read alone" in open_checkpoint(alone).notes[0]
    paths[0].write_bytes(paths[1].read_bytes())
    with pytest.raises(FormatError, match=r"another file of the model has too: 1\.a, 1\.b"):
        open_checkpoint(paths[2])
    paths[0].write_bytes(b"raw bytes of a file cut in pieces")
    with pytest.raises(FormatError, match="does not begin as one"):
        open_checkpoint(paths[2])
    split(tmp_path, count=2, total=2)
    (tmp_path / "m-00002-of-00002.gguf").write_bytes(gguf({}, (entry("split.count", UINT32, struct.pack("<I", 2)),)))
    assert (
        "split.tensors.count says 4, its files have 2"
        in open_checkpoint(tmp_path / "m-00001-of-00002.gguf").problems[0]
    )


GENUINE = SAMPLES.parent / "genuine"


@pytest.mark.skipif(not (GENUINE / "expected.json").exists(), reason="no samples beside this repository")
def test_what_the_library_wrote_is_read_as_it_says() -> None:
    samples: dict[str, Any] = json.loads((GENUINE / "expected.json").read_text())["samples"]
    named = {name: sample for name, sample in samples.items() if sample["format"] == "gguf"}
    assert named
    for name, sample in named.items():
        found = open_checkpoint(GENUINE / name)
        assert list(found.state_dict()) == [want["key"] for want in sample["tensors"]]
        for want in sample["tensors"]:
            tensor = found.state_dict()[want["key"]]
            assert (list(tensor.shape or ()), tensor.nbytes) == (want["shape"], want["nbytes"]), want["key"]
            assert hashlib.sha256(raw_of(found, want["key"])).hexdigest() == want["sha256"], want["key"]
            assert tensor.kind in ("dense", want["ggml_type"])
            if (made := of_blocks(tensor, "float32")) is not None:
                with Files() as files:
                    assert hashlib.sha256(read_bytes(made, files)).hexdigest() == want["dequant_f32_sha256"]
        for key, value in sample.get("metadata", {}).items():
            if "ARRAY" not in value["types"]:
                assert found.metadata[key] == str(value["value"])
