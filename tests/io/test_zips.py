from __future__ import annotations

import io
import random
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from ckptool import limits
from ckptool.errors import CkptoolError, FormatError, LimitError, UnsupportedError
from ckptool.io import zip_read as zips
from ckptool.io.files import Files
from ckptool.io.source import LocalFile

FIX = struct.Struct("<4sHHHHHHIIIHHHHHII")  # a central entry


def archive(content: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as out:
        for name, data in content.items():
            out.writestr(zipfile.ZipInfo(name), data, method)
    return buffer.getvalue()


@pytest.fixture
def listed(tmp_path: Path) -> Callable[[bytes], dict[str, zips.Member]]:
    def read(data: bytes) -> dict[str, zips.Member]:
        (tmp_path / "a.zip").write_bytes(data)
        with LocalFile(str(tmp_path / "a.zip")) as file:
            return zips.read_directory(file)

    return read


Listed = Callable[[bytes], dict[str, zips.Member]]
CONTENT = {"r/data.pkl": b"pickle", "r/data/0": bytes(range(256)) * 9, "r/empty": b"", "r/é": b"\x00"}


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_names_sizes_sums_and_content_are_zipfiles(method: int, listed: Listed) -> None:
    data = archive(CONTENT, method)
    found = listed(data)
    with zipfile.ZipFile(io.BytesIO(data)) as oracle, Files() as files:
        assert list(found) == oracle.namelist()
        for info in oracle.infolist():
            assert found[info.filename].span.nbytes == info.file_size
            assert found[info.filename].crc32 == info.CRC
            assert files.read(found[info.filename].span) == oracle.read(info)


def test_any_number_of_members_and_a_zip64_directory(listed: Listed) -> None:
    content = {f"r/{i}": b"%d" % i for i in range(66_000)}
    data = archive(content)
    assert b"PK\x06\x06" in data[-2000:]
    found = listed(data)
    assert len(found) == 66_000
    with Files() as files:
        for name in ("r/0", "r/65534", "r/65535", "r/65999"):
            assert files.read(found[name].span) == content[name]


def test_zip64_sizes_come_from_the_extra_field(listed: Listed) -> None:
    for force in (("size", "packed", "offset"), ("offset",), ("size", "packed")):
        found = listed(single(b"hello", zip64=force))
        with Files() as files:
            assert files.read(found["r/x"].span) == b"hello"


def single(
    payload: bytes, *, name: bytes = b"r/x", flags: int = 0, method: int = 0, zip64: tuple[str, ...] = (),
    disk: int = 0, size: int | None = None, packed: int | None = None, offset: int = 0,
    extra: bytes | None = None, count: int = 1,
) -> bytes:  # fmt: skip
    """An archive of one member, every field as wished."""
    local = struct.pack("<4sHHHHHIIIHH", b"PK\x03\x04", 0, flags, method, 0, 0, 0, 0, 0, len(name), 0) + name + payload
    true = {"size": len(payload) if size is None else size, "packed": len(payload) if packed is None else packed,
            "offset": offset}  # fmt: skip
    wide = struct.pack(f"<{len(zip64)}Q", *(true[field] for field in ("size", "packed", "offset") if field in zip64))
    shown = {field: 0xFFFFFFFF if field in zip64 else value for field, value in true.items()}
    if extra is None:
        extra = struct.pack("<HH", 0x9999, 2) + b"zz" + (struct.pack("<HH", 1, len(wide)) + wide if wide else b"")
    entry = FIX.pack(b"PK\x01\x02", 0, 0, flags, method, 0, 0, zlib.crc32(payload), shown["packed"], shown["size"],
                     len(name), len(extra), 0, disk, 0, 0, shown["offset"]) + name + extra  # fmt: skip
    end = struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, count, count, len(entry), len(local), 0)
    return local + entry + end


def test_the_plain_hand_made_archive_is_read(listed: Listed) -> None:
    assert list(listed(single(b"hello"))) == ["r/x"]


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"flags": 1}, UnsupportedError),  # encrypted
        ({"method": 12}, UnsupportedError),
        ({"method": 93}, UnsupportedError),
        ({"disk": 3}, UnsupportedError),
        ({"size": 4}, FormatError),  # stored, and two sizes
        ({"size": 6, "packed": 6}, FormatError),  # reaches into the directory
        ({"size": 1 << 31, "packed": 1 << 31}, FormatError),
        ({"offset": 5000}, FormatError),
        ({"zip64": ("size", "packed"), "extra": b""}, FormatError),
        ({"zip64": ("size", "packed"), "extra": struct.pack("<HHQ", 1, 8, 5)}, FormatError),
        ({"zip64": ("size",), "extra": struct.pack("<HHQ", 1, 8, (1 << 64) - 1)}, FormatError),
        ({"zip64": ("offset",), "extra": struct.pack("<HHQ", 1, 8, (1 << 64) - 1)}, FormatError),
        ({"count": 2}, FormatError),
    ],
    ids=str,
)
def test_what_is_wrong_with_a_member_is_refused(options: dict[str, int], kind: type[Exception], listed: Listed) -> None:
    with pytest.raises(kind):
        listed(single(b"hello", **options))  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:Duplicate")
def test_a_name_twice_is_refused(listed: Listed) -> None:
    # torch and zipfile take the last: two readers of one file would differ.
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as out:
        out.writestr("r/x", b"1")
        out.writestr("r/x", b"2")
    with pytest.raises(FormatError, match="two zip members"):
        listed(buffer.getvalue())


def test_members_that_overlap_are_refused(listed: Listed) -> None:
    # David Fifield's "A better zip bomb" quotes one kernel of data many times.
    first, data = archive({"r/a": bytes(100), "r/b": bytes(100)}), bytearray()
    data += first
    at = data.rfind(b"PK\x01\x02")
    struct.pack_into("<I", data, at + 42, 10)
    with pytest.raises(FormatError, match="overlap"):
        listed(bytes(data))


def test_a_comment_behind_the_end_and_junk_are_no_trouble(listed: Listed) -> None:
    data = bytearray(archive(CONTENT))
    data[-2:] = struct.pack("<H", 11)
    assert list(listed(bytes(data) + b"any comment")) == list(CONTENT)
    assert list(listed(archive(CONTENT) + bytes(1000))) == list(CONTENT)  # torch.load reads it too


def test_cut_at_every_byte_it_is_an_error_of_ours(listed: Listed) -> None:
    data = archive(CONTENT)
    for end in range(len(data)):
        with pytest.raises(FormatError):
            listed(data[:end])


def test_cut_at_every_byte_a_zip64_archive_is_an_error_of_ours(listed: Listed, tmp_path: Path) -> None:
    import torch

    torch.save({"w": torch.ones(3)}, tmp_path / "t.pth")  # torch always writes the zip64 records
    data = (tmp_path / "t.pth").read_bytes()
    assert b"PK\x06\x06" in data
    for end in range(len(data)):
        with pytest.raises(FormatError):
            listed(data[:end])


def test_any_byte_changed_it_is_read_or_an_error_of_ours(listed: Listed) -> None:
    whole = archive({"r/data.pkl": b"pickle", "r/data/0": b"0123"}, zipfile.ZIP_DEFLATED)
    rng = random.Random(0)
    for at in range(len(whole)):
        for value in {0, 0xFF, rng.randrange(256)}:
            changed = whole[:at] + bytes([value]) + whole[at + 1 :]
            try:
                members = listed(changed)
                with Files() as files:
                    for member in members.values():
                        files.read(member.span)
            except CkptoolError:
                continue


def test_an_absurd_directory_is_refused_before_it_is_read(monkeypatch: pytest.MonkeyPatch, listed: Listed) -> None:
    monkeypatch.setattr(limits.MAX_DIRECTORY, "figure", 100)
    with pytest.raises(LimitError, match="MAX_DIRECTORY"):
        listed(archive(CONTENT))


def test_small_records_are_read_whole_and_large_ones_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.zip").write_bytes(archive(CONTENT, zipfile.ZIP_DEFLATED))
    with LocalFile(str(tmp_path / "a.zip")) as file:
        members = zips.read_directory(file)
        assert zips.read_small(file, members, "r/data.pkl", limits.MAX_PICKLE) == b"pickle"
        assert zips.read_small(file, members, "r/none", limits.MAX_PICKLE) is None
        monkeypatch.setattr(limits.MAX_PICKLE, "figure", 100)
        with pytest.raises(LimitError, match=r"over MAX_PICKLE, 100 "):
            zips.read_small(file, members, "r/data/0", limits.MAX_PICKLE)
