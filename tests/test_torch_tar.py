from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest
import torch
from oracles import FIXTURES, assert_identical, bits, torch_load

from ckptool.api import open as open_checkpoint
from ckptool.api import save
from ckptool.errors import CkptoolError, FormatError
from ckptool.formats import read

TAR = FIXTURES / "tar_2016.pth"


def test_its_tensors_are_those_that_torch_reads() -> None:
    expected = torch_load(TAR)
    found = open_checkpoint(TAR).to_torch()
    assert list(found) == list(expected) == ["conv.weight", "part.weight", "conv.transposed", "counts"]
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype
        assert found[key].stride() == tensor.stride()
        assert bits(found[key]) == bits(tensor)


def test_a_named_part_of_a_storage_is_the_same_memory(tmp_path: Path) -> None:
    save(open_checkpoint(TAR), tmp_path / "out.pth")
    written = torch.load(tmp_path / "out.pth", weights_only=True)
    expected = torch_load(TAR)
    assert {key: bits(tensor) for key, tensor in written.items()} == {key: bits(t) for key, t in expected.items()}
    for tree in (written, expected):
        tree["conv.weight"].fill_(9.0)
        assert (tree["part.weight"] == 9.0).all()
        assert (tree["conv.transposed"] == 9.0).all()
    assert_identical(torch.load(tmp_path / "out.pth"), torch.load(tmp_path / "out.pth", mmap=True))


def members() -> dict[str, bytes]:
    with tarfile.open(TAR) as archive:
        return {item.name: archive.extractfile(item).read() for item in archive}  # type: ignore[union-attr]


def packed(content: dict[str, bytes], path: Path) -> Path:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in content.items():
            item = tarfile.TarInfo(name)
            item.size = len(data)
            archive.addfile(item, io.BytesIO(data))
    return path


@pytest.mark.parametrize("member", ["storages", "tensors", "pickle"])
def test_a_missing_member_is_named(member: str, tmp_path: Path) -> None:
    content = members()
    del content[member]
    with pytest.raises(FormatError, match=member):
        read(str(packed(content, tmp_path / "bad.pth")))


@pytest.mark.parametrize("member", ["storages", "tensors", "pickle"])
def test_a_member_cut_at_any_byte_is_an_error_of_ours(member: str, tmp_path: Path) -> None:
    content = members()
    for end in range(len(content[member])):
        with pytest.raises(CkptoolError, match=r"bad\.pth"):
            read(str(packed({**content, member: content[member][:end]}, tmp_path / "bad.pth")))


@pytest.mark.parametrize("member", ["storages", "tensors", "pickle"])
def test_a_member_with_any_byte_changed_is_read_or_an_error_of_ours(member: str, tmp_path: Path) -> None:
    content = members()
    data = content[member]
    for at in range(len(data)):
        changed = data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]
        try:
            read(str(packed({**content, member: changed}, tmp_path / "bad.pth")))
        except CkptoolError:
            continue


def test_the_file_cut_short_is_an_error_that_names_it(tmp_path: Path) -> None:
    whole = TAR.read_bytes()
    end = whole.rindex(b".") + 1  # the rest is padding
    for cut in range(0, end, 7):
        (tmp_path / "cut.pth").write_bytes(whole[:cut])
        with pytest.raises(CkptoolError, match=r"cut\.pth"):
            read(str(tmp_path / "cut.pth"))


def test_another_tar_archive_is_not_taken_for_one(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="not made by torch"):
        read(str(packed({"readme.txt": b"hello"}, tmp_path / "x.tar")))
