from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import pytest
import torch
from oracles import FIXTURES, assert_identical, bits, thinned, torch_load

from ckptool import open as open_checkpoint
from ckptool import save
from ckptool.cli import main
from ckptool.errors import CkptoolError, FormatError, UnsupportedError
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


@thinned(4)
@pytest.mark.parametrize("member", ["storages", "tensors", "pickle"])
def test_a_member_cut_at_any_byte_is_an_error_of_ours(member: str, step: int, tmp_path: Path) -> None:
    content = members()
    for end in range(0, len(content[member]), step):
        with pytest.raises(CkptoolError, match=r"bad\.pth"):
            read(str(packed({**content, member: content[member][:end]}, tmp_path / "bad.pth")))


@thinned(4)
@pytest.mark.parametrize("member", ["storages", "tensors", "pickle"])
def test_a_member_with_any_byte_changed_is_read_or_an_error_of_ours(member: str, step: int, tmp_path: Path) -> None:
    content = members()
    data = content[member]
    for at in range(0, len(data), step):
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
    with pytest.raises(UnsupportedError, match=r"a tar archive, and no checkpoint in it: readme\.txt"):
        read(str(packed({"readme.txt": b"hello"}, tmp_path / "x.tar")))


def header(name: str, kind: bytes, size: int) -> bytes:
    item = tarfile.TarInfo(name)
    item.type, item.size = kind, size
    return item.tobuf(tarfile.USTAR_FORMAT)


def extended(payload: bytes) -> bytes:
    """A pax header that says this of the member behind it."""
    return header("x", b"x", len(payload)) + payload + bytes(-len(payload) % 512)


def refused(data: bytes, path: Path) -> str:
    """The one line that a file is refused with."""
    path.write_bytes(data)
    with pytest.raises(CkptoolError, match=r"bad\.pth") as found:
        read(str(path))
    assert "\n" not in str(found.value)
    assert main(["inspect", str(path)]) == 2
    return str(found.value)


def test_long_names_of_long_names_are_not_followed(tmp_path: Path) -> None:
    long_name = header("././@LongLink", b"L", 512) + b"n" * 511 + b"\0"
    assert "type 'L'" in refused(long_name * 3000 + TAR.read_bytes(), tmp_path / "bad.pth")
    assert "two pax headers" in refused(extended(b"11 mtime=1\n") * 3000 + TAR.read_bytes(), tmp_path / "bad.pth")


@pytest.mark.parametrize(
    "payload",
    [b"99999999999999999999999999999 path=x\n", b"5 size=1\n", b"0 size=1\n", b"-1 size=1\n", b"10 size=1\n",
     b"9 size 1\n", b"9 size=12", b"\xb2 size=1\n", b"+9 size=1\n", b"11 path=xy\n", b"9 size=-\n",
     b"29 size=99999999999999999999\n", b"28 size=9999999999999999999\n",
     b"9 size=1\n" * 2, b"22 GNU.sparse.major=1\n"],
)  # fmt: skip
def test_a_pax_header_that_is_wrong_is_refused(payload: bytes, tmp_path: Path) -> None:
    refused(header("storages", b"0", 0) + extended(payload) + TAR.read_bytes(), tmp_path / "bad.pth")


@pytest.mark.parametrize(
    "payload", [b"0" * 100_000 + b" ", b"1 hdrcharset=" * 10_000, b"0" * 4095 + b" ", b"1 hdrcharset=" * 300]
)
def test_a_pax_header_is_not_searched_again_and_again(payload: bytes, tmp_path: Path) -> None:
    assert "pax header" in refused(extended(payload) + TAR.read_bytes(), tmp_path / "bad.pth")


def test_a_pax_header_of_gigabytes_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (tmp_path / "bad.pth").open("wb") as made:
        made.write(header("x", b"x", 2_000_000_000))
        made.truncate(2_000_010_240)
    largest = []
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, size, at: largest.append(size) or pread(fd, size, at))
    with pytest.raises(FormatError, match="a pax header of 2,000,000,000 bytes"):
        read(str(tmp_path / "bad.pth"))
    assert max(largest) <= 1 << 16


def test_members_without_end_are_not_counted(tmp_path: Path) -> None:
    assert "more than 1,000 members" in refused(header("sys_info", b"0", 0) * 1001, tmp_path / "bad.pth")
    assert "no checkpoint in it: a, a" in refused(header("a", b"0", 0) * 1001, tmp_path / "bad.pth")


@pytest.mark.parametrize("kind", [b"g", b"L", b"K", b"S", b"7", b"X", b"V", b"\xff"])
def test_members_that_torch_never_wrote_are_refused(kind: bytes, tmp_path: Path) -> None:
    assert "not made by torch" in refused(TAR.read_bytes()[:1024] + header("a", kind, 0), tmp_path / "bad.pth")


def test_names_and_sizes_that_readers_take_in_two_ways_are_refused(tmp_path: Path) -> None:
    whole = TAR.read_bytes()
    for odd in (prefixed("storages"), header("pickle/", b"0", 0),
                header("tensors", b"5", 0), header("directory", b"5", 512), header("link", b"2", 1)):  # fmt: skip
        assert "two ways" in refused(odd + whole, tmp_path / "bad.pth")


def prefixed(name: str) -> bytes:
    """A header with a prefix before its name, which GNU's readers do not look for."""
    data = bytearray(header(name, b"0", 0))
    data[345:346] = b"d"
    data[148:156] = b"%06o\0 " % (sum(data) - sum(data[148:156]) + 256)
    return bytes(data)


@pytest.mark.parametrize("at", [0, 124, 148, 156, 511])
def test_a_header_with_a_changed_byte_is_refused(at: int, tmp_path: Path) -> None:
    data = bytearray(TAR.read_bytes())
    data[1024 + at] ^= 1
    refused(bytes(data), tmp_path / "bad.pth")


@pytest.mark.parametrize(
    "size", [b"-0000000001\0", b"0o000000001\0", b"0000_000001\0", b"9" * 12, b"\x80" + b"\xff" * 11, b"\xff" * 12]
)
def test_a_size_that_is_no_number_or_outside_the_file_is_refused(size: bytes, tmp_path: Path) -> None:
    data = bytearray(header("sys_info", b"0", 0))
    data[124:136] = size
    data[148:156] = b"%06o\0 " % (sum(data) - sum(data[148:156]) + 256)
    refused(bytes(data) + TAR.read_bytes(), tmp_path / "bad.pth")


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_what_python_writes_is_read_in_each_of_its_formats(kind: int, tmp_path: Path) -> None:
    """torch added files in the pax format; Python 3 knows their times with fractions, and says so in a pax header."""
    with tarfile.open(tmp_path / "made.pth", "w", format=kind) as archive:
        for name, data in members().items():
            (tmp_path / name).write_bytes(data)
            os.utime(tmp_path / name, (1479800000.25, 1479800000.25))
            archive.add(tmp_path / name, arcname=name)
    assert (b"mtime=" in (tmp_path / "made.pth").read_bytes()) == (kind == tarfile.PAX_FORMAT)
    found, expected = open_checkpoint(tmp_path / "made.pth").to_torch(), open_checkpoint(TAR).to_torch()
    assert {key: bits(tensor) for key, tensor in found.items()} == {key: bits(t) for key, t in expected.items()}


def test_a_size_in_a_pax_header_counts(tmp_path: Path) -> None:
    """As in archives with a storage of 8 GB or more."""
    made = b""
    for name, data in members().items():
        record = b" size=%d\n" % len(data)
        made += extended(b"%d" % (len(record) + 2) + record) + header(name, b"0", 0) + data + bytes(-len(data) % 512)
    (tmp_path / "made.pth").write_bytes(made)
    assert list(open_checkpoint(tmp_path / "made.pth").to_torch()) == list(open_checkpoint(TAR).to_torch())
