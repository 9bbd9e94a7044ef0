"""torch.save's older streams in any pickle protocol, what follows the end of a file, and text of Python 2."""

from __future__ import annotations

import io
import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracles import CANARY, Run, assert_identical, assert_same_tensors

import ckptool
from ckptool.pickling.streams import MAGIC, MAGIC_NUMBER

STATE = {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.ones(2, dtype=torch.bfloat16)}


def written(value: Any, legacy: bool = True, protocol: int = 2) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream, pickle_protocol=protocol, _use_new_zipfile_serialization=not legacy)
    return stream.getvalue()


def put(data: bytes, name: str = "given.pth") -> Path:
    Path(name).write_bytes(data)
    return Path(name)


# --- protocols -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("legacy", [True, False], ids=["legacy", "zip"])
@pytest.mark.parametrize("protocol", [1, 2, 3, 4, 5])
def test_a_file_of_any_protocol_is_read_as_torch_reads_it(protocol: int, legacy: bool, run: Run) -> None:
    value = {"state_dict": STATE, "epoch": 3, "raw": b"\xc5\xbc", "big": 1 << 70, "set": {1, 2}}
    path = put(written(value, legacy, protocol))
    code, out, _ = run("inspect", path, "--check", "--json")
    assert (code, json.loads(out)["result"][0]["unsafe"]) == (0, [])
    opened = ckptool.open(path)
    assert_same_tensors(opened, STATE)
    assert_identical(opened.to_torch()["state_dict"], torch.load(path, weights_only=False)["state_dict"])


@pytest.mark.parametrize("legacy", [True, False], ids=["legacy", "zip"])
def test_protocol_0_is_read_too_which_has_persistent_ids_as_text(legacy: bool, run: Run) -> None:
    path = put(written(STATE, legacy, 0))
    with pytest.raises(AssertionError):  # torch writes such a file, and cannot read it
        torch.load(path, weights_only=False)
    assert_same_tensors(ckptool.open(path), STATE)
    assert run("convert", path, "-o", "out.pth")[0] == 0
    assert_identical(torch.load("out.pth"), STATE)


class Acting:
    def __reduce__(self) -> Any:
        return os.mkdir, (CANARY,)


def acting(protocol: int, then: bytes) -> bytes:
    """A pickle that makes a directory, throws the result away, and does what ``then`` does."""
    return pickle.dumps(Acting(), protocol)[:-1] + b"0" + then


STREAM = written(STATE)
REST = STREAM[len(MAGIC) :]
MAGICS = {protocol: acting(protocol, b"L%dL\n." % MAGIC_NUMBER) for protocol in range(6)}


@pytest.mark.parametrize("protocol", MAGICS)
def test_a_call_in_the_first_pickle_is_named_and_not_run(protocol: int, run: Run) -> None:
    path = put(MAGICS[protocol] + REST)
    code, out, _ = run("inspect", path, "--check", "--json")
    report = json.loads(out)["result"][0]
    assert (code, report["format"], report["unsafe"]) == (1, "torch-legacy", ["posix.mkdir"])
    assert_same_tensors(ckptool.open(path), STATE)


@pytest.mark.parametrize("place", ["magic", "version", "system"])
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_call_in_place_of_one_of_the_first_pickles_is_named_and_not_run(place: str, protocol: int, run: Run) -> None:
    stream = io.BytesIO(STREAM)
    ends = [0, *(stream.tell() for _ in range(3) if pickle.load(stream) is not None)]
    at = ["magic", "version", "system"].index(place)
    data = STREAM[: ends[at]] + pickle.dumps(Acting(), protocol) + STREAM[ends[at + 1] :]
    code, out, err = run("inspect", "--check", put(data))
    assert code == (1 if place == "system" else 2)
    assert "posix.mkdir" in out + err


# --- what follows the end --------------------------------------------------------------------------------------------

ZIP, LEGACY = written(STATE, legacy=False), written(STATE)

AFTER = {
    "a second save": (LEGACY, LEGACY, "another torch.save?"),
    "three saves": (LEGACY, LEGACY + LEGACY, "another torch.save?"),
    "a save of protocol 4": (LEGACY, written(STATE, protocol=4), "another torch.save?"),
    "a zip behind a legacy stream": (LEGACY, ZIP, "another torch.save?"),
    "a legacy stream behind a zip": (ZIP, LEGACY, "another torch.save?"),
    "a pickle": (LEGACY, pickle.dumps({"epoch": 3}), "a pickle?"),
    "a pickle behind a zip": (ZIP, pickle.dumps({"epoch": 3}), "a pickle?"),
    "zeros": (LEGACY, bytes(512), "zeros"),
    "zeros behind a zip": (ZIP, bytes(512), "zeros"),
    "text": (LEGACY, b"epoch 3\nloss 0.5\n", "text"),
    "text behind a zip": (ZIP, b"epoch 3\n", "text"),
    "one byte": (LEGACY, b"\xff", "unknown bytes"),
}


@pytest.mark.parametrize("name", AFTER)
def test_what_follows_the_end_is_said_by_every_command_and_found_by_check(name: str, run: Run) -> None:
    first, second, kind = AFTER[name]
    path = put(first + second)
    said = f"{len(second)} bytes after the end, from byte {len(first)} on, are not read: {kind}"
    code, out, _ = run("inspect", path)
    assert (code, said in out) == (0, True)
    code, out, _ = run("inspect", path, "--check", "--json")
    (finding,) = json.loads(out)["result"][0]["check"]["findings"]
    assert (code, finding["kind"], finding["text"].startswith(said)) == (1, "trailing", True)
    put(first, "alone.pth")
    for command in (
        ["convert", path, "-o", "out.pth"],
        ["convert", path, "-o", "out.safetensors"],
        ["filter", path, "--match", "alone.pth", "-o", "filtered.pth"],
        ["filter", "alone.pth", "--match", path, "-o", "filtered.pth", "--force"],
        ["remap", path, "--rename", "a.*=b.*", "-o", "renamed.pth"],
        ["diff", path, "alone.pth"],
        ["load-partial", path, "--into", "alone.pth", "-o", "loaded.pth"],
    ):
        code, out, _ = run(*command, "--json")
        assert code == 0, out
        assert any(said in note for note in [*json.loads(out)["notes"], *notes_in(out)]), command
    assert_identical(torch.load("out.pth"), STATE)
    if kind.endswith("torch.save?"):  # the hint is true
        assert f"tail -c +{len(first) + 1} " in finding["text"]
        assert_same_tensors(ckptool.open(put(path.read_bytes()[len(first) :], "second.pth")), STATE)


def notes_in(out: str) -> list[str]:
    results = json.loads(out)["result"]
    return [note for one in (results if isinstance(results, list) else [results]) for note in one.get("notes", ())]


def test_both_saves_are_there_and_torch_reads_them_one_after_the_other(run: Run) -> None:
    with open("twice.pth", "wb") as file:
        torch.save(STATE, file, _use_new_zipfile_serialization=False)
        torch.save({"epoch": 3, "more": torch.ones(2)}, file, _use_new_zipfile_serialization=False)
    with open("twice.pth", "rb") as file:
        assert (list(torch.load(file)), list(torch.load(file))) == (list(STATE), ["epoch", "more"])
    assert list(ckptool.open("twice.pth").state_dict()) == list(STATE)
    assert "another torch.save?" in ckptool.open("twice.pth").trailing


@pytest.mark.parametrize("times", [2, 3])
@pytest.mark.parametrize("other", [STATE, {"epoch": 3}, {f"k{i}": torch.ones(i) for i in range(300)}])
def test_more_than_one_archive_in_a_file_is_called_so(times: int, other: Any, run: Run, refused: Any) -> None:
    more = written(other, legacy=False)
    path = put(ZIP + more * (times - 1))
    begins = len(ZIP) + len(more) * (times - 2)
    for command in (["inspect", path], ["inspect", path, "--check"], ["convert", path, "-o", "out.pth"]):
        line = refused(*command)
        assert f"an archive begins at byte {begins}: more than one torch.save in one file" in line
    last = put(path.read_bytes()[begins:], "last.pth")
    assert f"tail -c +{begins + 1} " in line
    assert_identical(torch.load(last), other)


def test_archives_that_pythons_zipfile_wrote_are_told_apart_too(refused: Any) -> None:
    np.savez("one.npz", w=np.ones(3))
    one = Path("one.npz").read_bytes()
    assert f"an archive begins at byte {len(one)}: more than one" in refused("inspect", put(one + one, "two.npz"))


def test_bytes_before_an_archive_are_called_so(refused: Any) -> None:
    line = refused("inspect", put(b"#!/bin/sh\n" + ZIP))
    assert "a zip archive begins at byte 10: `tail -c +11 FILE`" in line
    assert_identical(torch.load(put(Path("given.pth").read_bytes()[10:], "alone.pth")), STATE)


def test_an_archive_with_much_behind_it_is_no_truncated_download(refused: Any) -> None:
    path = put(ZIP + written({"w": torch.rand(50_000)}))
    with pytest.raises(RuntimeError):
        torch.load(path)
    assert f"ends at byte {len(ZIP)}, and {path.stat().st_size - len(ZIP)} bytes follow" in refused("inspect", path)
    assert "a truncated download?" in refused("inspect", put(ZIP[:-30] + bytes(200_000)))


def test_a_shard_with_something_behind_its_end_is_named(run: Run) -> None:
    put(written({"a": torch.ones(1)}), "pytorch_model-00001-of-00002.bin")
    put(written({"b": torch.ones(1)}) + LEGACY, "pytorch_model-00002-of-00002.bin")
    shards = {"a": "pytorch_model-00001-of-00002.bin", "b": "pytorch_model-00002-of-00002.bin"}
    put(json.dumps({"metadata": {}, "weight_map": shards}).encode(), "pytorch_model.bin.index.json")
    code, out, _ = run("inspect", "pytorch_model.bin.index.json", "--check")
    assert (code, f"pytorch_model-00002-of-00002.bin: {len(LEGACY)} bytes after the end" in out) == (1, True)


# --- text of Python 2 ------------------------------------------------------------------------------------------------


def python2(raw: bytes) -> bytes:
    """A string as Python 2 pickled it in protocol 2."""
    return b"U%c%b" % (len(raw), raw) if len(raw) < 256 else b"T" + len(raw).to_bytes(4, "little") + raw


def dtype2(name: str, order: str = "<", sizes: bytes = b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00") -> bytes:
    state = b"(K\x03" + python2(order.encode()) + b"NNN" + sizes + b"tb"
    return b"cnumpy\ndtype\n" + python2(name.encode()) + b"K\x00K\x01\x87R" + state


def array2(raw: bytes, count: int, dtype: bytes) -> bytes:
    made = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + python2(b"b") + b"\x87R"
    return made + b"(K\x01K%c\x85%b\x89%b" % (count, dtype, python2(raw)) + b"tb"


def scalar2(raw: bytes, dtype: bytes) -> bytes:
    return b"cnumpy.core.multiarray\nscalar\n" + dtype + python2(raw) + b"\x86R"


def tensor2(key: bytes) -> bytes:
    pid = b"(" + python2(b"storage") + b"ctorch\nFloatStorage\n" + python2(key) + python2(b"cpu") + b"K\x02NtQ"
    return b"ctorch._utils\n_rebuild_tensor\n(" + pid + b"K\x00K\x02\x85K\x01\x85tR"


def legacy2(*pairs: bytes) -> Path:
    """A legacy file of Python 2 with these keys and values and a tensor, 1 and 2, under the key "ż"."""
    tree = b"\x80\x02}(" + b"".join(pairs) + python2("ż".encode()) + tensor2(b"7") + b"u."
    head = MAGIC + pickle.dumps(1001, 2) + pickle.dumps({}, 2)
    data = torch.tensor([1.0, 2.0]).numpy().tobytes()
    return put(head + tree + b"\x80\x02]" + python2(b"7") + b"a." + (2).to_bytes(8, "little") + data)


def test_text_of_python_2_is_utf_8_for_keys_as_for_values_as_torch_has_it(run: Run) -> None:
    long = "é" * 200
    path = legacy2(python2("größe".encode()), python2("é".encode()), python2(b"long"), python2(long.encode()))
    expected = torch.load(path, weights_only=False)
    assert list(expected) == ["größe", "long", "ż"]
    assert_identical(ckptool.open(path).to_torch(), expected)
    assert run("convert", path, "-o", "out.safetensors")[0] == 0
    assert list(ckptool.open("out.safetensors").state_dict()) == ["ż"]
    assert run("filter", path, "--include", "ż", "-o", "out.pth")[0] == 0
    assert list(torch.load("out.pth", weights_only=False)) == ["ż"]
    assert run("inspect", path, "--keys")[1] == "ż\n"


def test_text_of_python_2_that_is_not_utf_8_is_latin_1(run: Run) -> None:
    path = legacy2(python2("größe".encode("latin1")), python2(b"\xc3\xa9\xff"))
    with pytest.raises(UnicodeDecodeError):
        torch.load(path, weights_only=False)
    found = ckptool.open(path).to_torch()
    assert found["größe"] == b"\xc3\xa9\xff".decode("latin1")  # all of a text is one or the other
    assert found["ż"].tolist() == [1.0, 2.0]


@pytest.mark.parametrize("key", [b"S'\\xc5\\xbc'\np1\n", b"U\x02\xc5\xbcq\x01"], ids=["protocol 0", "protocol 1"])
def test_text_of_python_2_in_older_protocols_is_utf_8_too(key: bytes) -> None:
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR"
    dtype = b"cnumpy\ndtype\n(S'u1'\nI0\nI1\ntR(I3\nS'|'\nNNNI-1\nI-1\nI0\ntb"
    put(b"(dp0\n" + key + array + b"(I1\n(I2\nt" + dtype + b"I00\nS'\\xc3\\xa9'\ntbs.", "given.pkl")
    found = ckptool.open("given.pkl").to_torch()
    assert {name: tensor.tolist() for name, tensor in found.items()} == {"ż": [0xC3, 0xA9]}


NUMBERS = {
    "all UTF-8": "éąż€".encode()[:8],
    "all ASCII": b"abcdefgh",
    "no UTF-8": bytes(range(248, 256)),
    "some of it UTF-8": b"\xc3\xa9\xff\xfe\xc3\xa9\0\0",
}


@pytest.mark.parametrize("name", NUMBERS)
def test_bytes_inside_numpys_calls_of_python_2_stay_bytes(name: str) -> None:
    raw = NUMBERS[name]
    sizes = b"K\x04K\x01K\x00"
    path = legacy2(
        python2(b"u1"), array2(raw, 8, dtype2("u1", "|")), python2(b"i4"), array2(raw, 2, dtype2("i4")),
        python2(b"f8"), array2(raw, 1, dtype2("f8", ">")), python2(b"scalar"), scalar2(raw, dtype2("i8")),
        python2(b"text"), array2(raw, 2, dtype2("S4", "|", sizes)),
        python2(b"in an object"), b"csongbird\nThing\n)\x81}" + python2(b"x") + array2(raw, 2, dtype2("S4", "|", sizes))
        + b"sb",
    )  # fmt: skip
    opened = ckptool.open(path)
    found = opened.to_torch()
    assert found["u1"].tolist() == list(raw)
    assert found["i4"].tolist() == np.frombuffer(raw, "<i4").tolist()
    assert found["f8"].byteswap().tobytes() == raw
    assert found["scalar"] == int.from_bytes(raw, "little", signed=True)
    assert found["text"].tolist() == np.frombuffer(raw, "S4").tolist()
    assert opened.tree["in an object"].state["x"].state[4] == raw
    ckptool.save(opened, "out.pth")
    written = pickle_of("out.pth")
    assert written["i4"].tolist() == found["i4"].tolist()
    assert written["scalar"] == found["scalar"]
    assert written["text"].tolist() == found["text"].tolist()


def pickle_of(path: str) -> Any:
    """What torch.load gives, but for the object of a class that is nowhere."""
    from oracles import torch_load

    return torch_load(Path(path))


# --- tensors of devices without storages -----------------------------------------------------------------------------


class Call:
    """Pickled as a call of a function with these arguments."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


def on_device(data: Any, dtype: torch.dtype, grad: bool = False, device: str = "cpu") -> Call:
    """As `Tensor.__reduce_ex__` pickles a tensor of xla, ort or another backend without storages."""
    name = "numpy" if isinstance(data, np.ndarray) else "cpu_tensor"
    return Call(getattr(torch._utils, f"_rebuild_device_tensor_from_{name}"), data, dtype, device, grad)


@pytest.mark.parametrize("legacy", [True, False], ids=["legacy", "zip"])
def test_tensors_of_devices_kept_as_arrays_or_cpu_tensors_are_read(legacy: bool, run: Run) -> None:
    def array() -> Any:
        return np.arange(6, dtype="f4").reshape(2, 3)

    one, other = on_device(array(), torch.float32), on_device(array(), torch.float32)
    value = {
        "a": on_device(array(), torch.float32, grad=True),
        "fortran": on_device(np.asfortranarray(array()), torch.float32),
        "bf16": on_device(np.array([1.5, -2, 3e38], "f4"), torch.bfloat16),
        "to float64": on_device(array(), torch.float64),
        "long": on_device(np.arange(3), torch.int64),
        "cpu": on_device(torch.ones(3), torch.float32),
        "cpu, cast": on_device(torch.ones(3), torch.float16),
        "parameter": Call(torch._utils._rebuild_parameter, one, True, {}),
        "subclass": Call(torch._tensor._rebuild_from_type_v2, other.call[0], torch.Tensor, other.call[1], {"tag": 1}),
        "old": Call(torch._utils._rebuild_xla_tensor, array(), torch.float32, "cpu", False),
        "seed": np.arange(4),
    }  # fmt: skip
    if legacy:  # torch casts it before it has read its bytes
        del value["cpu, cast"]
    path = put(written(value, legacy))
    expected = torch.load(path, weights_only=False)
    opened = ckptool.open(path)
    assert [name for name, one in opened.state_dict().items() if not one.is_beside] == [*expected][:-1]
    assert_identical(opened.to_torch(), expected)
    assert run("convert", path, "-o", "out.pth")[0] == 0
    assert_identical(torch.load("out.pth", weights_only=False), expected)
    code, out, _ = run("inspect", path, "--check", "--hash", "--stats")
    assert (code, "are read as tensors of the CPU" in out) == (0, True)


def test_a_device_that_is_not_there_hinders_nothing(run: Run) -> None:
    path = put(written({"w": on_device(np.ones(3, "f4"), torch.float32, device="xla:0")}))
    with pytest.raises(NotImplementedError):
        torch.load(path, weights_only=False)
    assert_same_tensors(ckptool.open(path), {"w": torch.ones(3)})
    assert run("convert", path, "-o", "out.pth")[0] == 0
    assert torch.load("out.pth")["w"].tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("data", [3, "text", np.array(["text"]), np.array([None])])
def test_a_device_tensor_made_of_something_else_is_refused(data: Any, refused: Any) -> None:
    path = put(written({"w": Call(torch._utils._rebuild_device_tensor_from_numpy, data, torch.float32, "cpu", False)}))
    assert "a tensor of another device is made of something" in refused("inspect", path)


def test_an_npz_without_arrays_is_a_file_without_tensors(run: Run) -> None:
    np.savez("empty.npz")
    code, out, _ = run("inspect", "empty.npz", "--json")
    assert (code, json.loads(out)["result"][0]["tensors"]) == (0, [])
    assert run("convert", "empty.npz", "-o", "out.safetensors")[0] == 2
