"""Ranges shared with their source where the file system can: played, and on XFS where one can be mounted (root)."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ckptool import open as open_checkpoint
from ckptool import remap, save
from ckptool.io import output as outputs
from ckptool.io import system
from ckptool.io.output import CLONED, LocalOutput
from ckptool.io.source import LocalFile

State = dict[str, torch.Tensor]


@pytest.fixture
def cloned(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many bytes were shared, a number for each time."""
    shared: list[int] = []

    def clone(self: LocalOutput, file: LocalFile, offset: int, nbytes: int, to: int) -> bool:
        assert offset % CLONED == nbytes % CLONED == to % CLONED == 0, "no file system takes these"
        os.pwrite(self._fd, os.pread(file.fd, nbytes, offset), to)
        shared.append(nbytes)
        return True

    monkeypatch.setattr(LocalOutput, "_clone", clone)
    monkeypatch.setattr(outputs, "WORTH_CLONING", CLONED)
    return shared


def states() -> dict[str, State]:
    torch.manual_seed(1)
    return {
        "one large": {"w": torch.randn(300_000)},
        "many small": {f"layers.{i}.w": torch.randn(i % 50) for i in range(800)},
        "large and small": {f"t{i}": torch.randn(7 + 50_000 * (i % 3 == 0)) for i in range(20)},
        "of two sizes": {"a": torch.randn(70_000).half(), "b": torch.randn(70_001), "c": torch.arange(9)},
        "tiny": {"w": torch.ones(3)},
    }


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("name", states())
@pytest.mark.parametrize("prefix", ["x.", "a.much.longer.prefix." * 9])
def test_a_rename_shares_its_data_and_is_what_it_would_be(
    prefix: str, name: str, suffix: str, cloned: list[int], tmp_path: Path
) -> None:
    state = states()[name]
    source, out = tmp_path / f"in{suffix}", tmp_path / f"out{suffix}"
    torch.save(state, source) if suffix == ".pth" else save_file(state, source)
    renamed, _ = remap(open_checkpoint(source), [{"add_prefix": prefix}])
    save(renamed, out)
    found = torch.load(out) if suffix == ".pth" else load_file(out)
    assert list(found) == [f"{prefix}{key}" for key in state] or suffix == ".safetensors"
    assert all(torch.equal(found[f"{prefix}{key}"], tensor) for key, tensor in state.items())
    if suffix == ".pth":
        with zipfile.ZipFile(out) as archive:
            assert archive.testzip() is None
        assert torch.load(out, mmap=True).keys() == found.keys()
    nbytes = sum(tensor.nbytes for tensor in state.values())
    if nbytes > 20 * CLONED:
        assert sum(cloned) > nbytes - 4 * CLONED


def test_what_was_made_by_cloning_can_be_cloned_again(cloned: list[int], tmp_path: Path) -> None:
    state = states()["large and small"]
    torch.save(state, tmp_path / "0.pth")
    for number in range(3):
        renamed, _ = remap(open_checkpoint(tmp_path / f"{number}.pth"), [{"add_prefix": "x."}])
        save(renamed, tmp_path / f"{number + 1}.pth")
    found = torch.load(tmp_path / "3.pth")
    assert all(torch.equal(found[f"x.x.x.{key}"], tensor) for key, tensor in state.items())


def test_where_it_cannot_be_done_the_bytes_are_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saved: Callable[..., Path]
) -> None:
    monkeypatch.setattr(outputs, "WORTH_CLONING", CLONED)
    monkeypatch.setattr(system, "_FICLONERANGE", 0)  # no file system knows this request
    state = states()["one large"]
    save(open_checkpoint(saved(state)), tmp_path / "out.pth")
    assert torch.equal(torch.load(tmp_path / "out.pth")["w"], state["w"])


@pytest.fixture
def xfs(tmp_path: Path) -> Iterator[Path]:
    """A file system that shares extents, in a file; where the machine lets one be made and mounted."""
    image, place = tmp_path / "image", tmp_path / "xfs"
    place.mkdir()
    with image.open("wb") as file:
        file.truncate(400 << 20)
    try:
        subprocess.run(["mkfs.xfs", "-q", "-m", "reflink=1", image], check=True, capture_output=True)
        subprocess.run(["mount", "-o", "loop", image, place], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no XFS can be mounted here: {error}")
    yield place
    subprocess.run(["umount", place], check=True)


def used(place: Path) -> int:
    os.sync()
    found = os.statvfs(place)
    return (found.f_blocks - found.f_bfree) * found.f_frsize


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_on_xfs_a_rename_takes_no_room_for_its_data(suffix: str, xfs: Path) -> None:
    state = {f"layers.{number}.weight": torch.randn(1 << 20) for number in range(16)}
    source, out = xfs / f"in{suffix}", xfs / f"out{suffix}"
    torch.save(state, source) if suffix == ".pth" else save_file(state, source)
    before = used(xfs)
    run = subprocess.run(
        [sys.executable, "-m", "ckptool", "remap", source, "--add-prefix", "model.", "-o", out],
        capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert used(xfs) - before < 4 << 20  # of 64 MiB
    found = torch.load(out) if suffix == ".pth" else load_file(out)
    assert found.keys() == {f"model.{key}" for key in state}
    assert all(torch.equal(found[f"model.{key}"], tensor) for key, tensor in state.items())
