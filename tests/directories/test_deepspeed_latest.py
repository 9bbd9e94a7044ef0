"""Which save of a directory of DeepSpeed's is meant, and what else may lie beside it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from everything import zero_to_fp32
from oracles import assert_same_tensors
from partitioned import optim, said, written

import ckptool
from ckptool.core.checkpoint import Checkpoint
from ckptool.errors import FormatError, IncompleteError, UnsupportedError


@pytest.mark.parametrize("tag", ["global_step10", "best", "step-3", "epoch=1 (last)", "pytorch_model", "checkpoint"])
def test_the_directory_above_a_save_and_the_save_itself_are_read(tag: str, tmp_path: Path) -> None:
    place = written(tmp_path / "d", tag=tag)
    expected = zero_to_fp32(tmp_path / "d")
    for path in (tmp_path / "d", place, f"{place}/", os.path.relpath(place)):
        assert_same_tensors(ckptool.open(path), expected)
    (tmp_path / "d" / "latest").unlink()
    assert_same_tensors(ckptool.open(place), expected)


def test_latest_is_taken_and_other_saves_are_named(tmp_path: Path) -> None:
    old = written(tmp_path / "d", tag="global_step2", groups=[{"w": torch.zeros(2)}], shared={})
    written(tmp_path / "d", tag="global_step10", groups=[{"w": torch.ones(2)}], shared={})
    found = ckptool.open(tmp_path / "d")
    assert found.to_torch()["module"]["w"].sum() == 2
    assert said(found, "latest", "global_step10", "global_step2")
    assert ckptool.open(old).to_torch()["module"]["w"].sum() == 0
    (tmp_path / "d" / "latest").unlink()
    with pytest.raises(UnsupportedError, match="global_step2, global_step10"):
        ckptool.open(tmp_path / "d")
    shutil.rmtree(old)
    assert said(ckptool.open(tmp_path / "d"), "no file latest", "global_step10")
    os.rename(tmp_path / "d" / "global_step10", tmp_path / "d" / "latest")
    assert ckptool.open(tmp_path / "d").to_torch()["module"]["w"].sum() == 2


@pytest.mark.parametrize("text", ["global_step9", "empty", "x" * 255, "\ud800".encode("utf-8", "surrogatepass")])
def test_latest_that_names_nothing_is_incomplete(text: str | bytes, tmp_path: Path) -> None:
    written(tmp_path / "d")
    (tmp_path / "d" / "empty").mkdir()
    (tmp_path / "d" / "latest").write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(IncompleteError, match=r"latest.*global_step3"):
        ckptool.open(tmp_path / "d")


@pytest.mark.parametrize("text", ["", "x" * 256, "é" * 200, "x" * 2000, "..", "../x", "/etc", "a/b", "a\0b", "."])
def test_latest_that_names_a_directory_elsewhere_is_refused(text: str, tmp_path: Path) -> None:
    written(tmp_path / "d")
    (tmp_path / "d" / "latest").write_text(text)
    with pytest.raises(FormatError, match="latest"):
        ckptool.open(tmp_path / "d")


def test_latest_that_names_a_file_says_so(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(1)}, tmp_path / "best.pth")
    (tmp_path / "latest").write_text("best.pth")
    with pytest.raises(UnsupportedError, match=r"name best\.pth"):
        ckptool.open(tmp_path)


@pytest.mark.parametrize(("stage", "word"), [(2, "dtype"), (3, "placeholders")])
def test_a_file_of_it_alone_is_a_torch_file_and_tells_of_the_directory(stage: int, word: str, tmp_path: Path) -> None:
    place = written(tmp_path / "d", stage)
    path = next(iter(sorted(place.glob("*model_states.pt"))))
    found = ckptool.open(path)
    assert (found.format, found.root) == ("torch-zip", ("module",))
    assert said(found, word, "directory")
    assert ckptool.open(optim(place)).format == "torch-zip"


def test_what_a_loader_takes_comes_first_and_the_save_is_named(tmp_path: Path) -> None:
    written(tmp_path / "d")
    ckptool.save(Checkpoint({"w": ckptool.open(tmp_path / "d").state_dict()["one"]}), tmp_path / "d/model.safetensors")
    found = ckptool.open(tmp_path / "d")
    assert found.format == "safetensors"
    assert said(found, "DeepSpeed", "global_step3")
