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
