from __future__ import annotations

import os
import random
import zlib
from pathlib import Path

import pytest

from ckptool.core.tensor import Span
from ckptool.errors import FormatError, UnreadableError
from ckptool.io import files
from ckptool.io.files import Files
from ckptool.io.source import BLOCK, LocalFile
from ckptool.io.system import same_file

posix = pytest.mark.skipif(os.name != "posix", reason="permissions and links of POSIX")


def noise(nbytes: int) -> bytes:
    return random.Random(nbytes).randbytes(nbytes)


def test_a_range_is_read_exactly(tmp_path: Path) -> None:
    data = noise(3 * BLOCK + 17)
    (tmp_path / "f").write_bytes(data)
    with LocalFile(str(tmp_path / "f")) as file:
        assert file.size == len(data)
        assert file.read(5, 100) == data[5:105]
        assert file.read(len(data), 0) == b""
        for offset, nbytes in ((0, len(data)), (1, BLOCK), (BLOCK - 1, BLOCK + 2), (len(data) - 3, 3), (9, 0)):
            assert b"".join(map(bytes, file.blocks(offset, nbytes))) == data[offset : offset + nbytes]


def test_blocks_are_whole_until_the_last(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(bytes(2 * BLOCK + 10))
    with LocalFile(str(tmp_path / "f")) as file:
        assert [len(block) for block in file.blocks(3, 2 * BLOCK + 5)] == [BLOCK, BLOCK, 5]


@pytest.mark.parametrize(("offset", "nbytes"), [(0, 11), (11, 0), (10, 1), (-1, 2), (2, -1), (1 << 62, 1)])
def test_bytes_outside_the_file_are_a_damaged_file(offset: int, nbytes: int, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(bytes(10))
    with LocalFile(str(tmp_path / "f")) as file:
        with pytest.raises(FormatError, match="of a file of 10"):
            file.read(offset, nbytes)
        if nbytes > 0 and offset >= 0:
            with pytest.raises(FormatError):
                list(file.blocks(offset, nbytes))


def test_what_cannot_be_read_says_why(tmp_path: Path) -> None:
    with pytest.raises(UnreadableError, match="no such file"):
        LocalFile(str(tmp_path / "absent"))
    (tmp_path / "link").symlink_to("../blobs/abc")
    with pytest.raises(UnreadableError, match=r"link: is a link to \.\./blobs/abc, which does not exist"):
        LocalFile(str(tmp_path / "link"))
    with pytest.raises(UnreadableError, match="not a regular file"):
        LocalFile(str(tmp_path))
    with pytest.raises(UnreadableError):
        LocalFile("a\0b")


@posix
def test_a_pipe_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # opening it for reading would wait for a writer
    with pytest.raises(UnreadableError, match="not a regular file"):
        LocalFile(str(tmp_path / "pipe"))


@posix
@pytest.mark.skipif(os.name == "posix" and os.geteuid() == 0, reason="root may read everything")
def test_a_forbidden_file_says_so(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"x")
    (tmp_path / "f").chmod(0)
    with pytest.raises(UnreadableError, match="denied"):
        LocalFile(str(tmp_path / "f"))


def test_a_file_that_becomes_shorter_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(bytes(2 * BLOCK))
    file = LocalFile(str(tmp_path / "f"))
    blocks = file.blocks(0, 2 * BLOCK)
    next(blocks)
    os.truncate(tmp_path / "f", BLOCK + 5)
    with pytest.raises(FormatError, match="shorter"):
        list(blocks)
    with pytest.raises(FormatError, match="shorter"):
        file.read(BLOCK, 10)
    with pytest.raises(FormatError, match="changed while it was read"):
        file.check()
    file.close()


@pytest.mark.parametrize("change", ["longer", "rewritten", "replaced"])
def test_a_file_that_is_no_longer_the_one_that_was_opened_is_noticed(change: str, tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"12345678")
    with LocalFile(str(path)) as file:
        span = Span(str(path), 0, 8, version=file.version)
    with Files() as opened:
        assert opened.read(span) == b"12345678"
    before = path.stat()
    if change == "replaced":  # as an atomic writer does, even with the old size and time
        (tmp_path / "b").write_bytes(b"87654321")
        os.utime(tmp_path / "b", ns=(before.st_atime_ns, before.st_mtime_ns))
        (tmp_path / "b").replace(path)
    else:
        path.write_bytes(b"123456789" if change == "longer" else b"87654321")
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    with Files() as opened, pytest.raises(FormatError, match="changed"):
        opened.read(span)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files by /proc")
def test_only_so_many_files_are_open_at_once_and_none_in_the_end(tmp_path: Path) -> None:
    def count() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = count()
    for number in range(files.MAX_OPEN + 20):
        (tmp_path / str(number)).write_bytes(bytes([number]))
    with Files() as opened:
        for _ in range(2):
            for number in range(files.MAX_OPEN + 20):
                assert opened.read(Span(str(tmp_path / str(number)), 0, 1)) == bytes([number])
        assert count() <= before + files.MAX_OPEN + 1
    assert count() == before


def deflated(tmp_path: Path, content: bytes, declared: int | None = None) -> Span:
    machine = zlib.compressobj(6, zlib.DEFLATED, -15)
    packed = machine.compress(content) + machine.flush()
    header = b"PK\x03\x04" + bytes(22) + b"\x01\x00\x02\x00" + b"n\0\0"
    (tmp_path / "z").write_bytes(b"junk" + header + packed + b"PK\x01\x02")
    nbytes = len(content) if declared is None else declared
    return Span(str(tmp_path / "z"), 4, nbytes, "deflated", len(packed), named=1)


@pytest.mark.parametrize("kind", ["noise", "zeros", "mixed"])
def test_a_deflated_member_is_inflated_in_whole_blocks(kind: str, tmp_path: Path) -> None:
    content = {
        "noise": noise(2 * BLOCK + 3),
        "zeros": bytes(5 * BLOCK + 3),
        "mixed": noise(BLOCK) + bytes(BLOCK) + b"x",
    }[kind]
    span = deflated(tmp_path, content)
    with Files() as opened:
        blocks = [bytes(block) for block in opened.blocks(span)]
        assert b"".join(blocks) == content
        assert all(len(block) == BLOCK for block in blocks[:-1])
        for offset, nbytes in ((0, 10), (BLOCK - 3, 10), (len(content) - 1, 1), (7, BLOCK * 2 - 7)):
            assert b"".join(map(bytes, opened.blocks(span, offset, nbytes))) == content[offset : offset + nbytes]


@pytest.mark.parametrize("declared", [0, 10, 99_999, 100_001, 10_000_000])
def test_a_member_that_inflates_to_another_size_is_damaged(declared: int, tmp_path: Path) -> None:
    span = deflated(tmp_path, bytes(100_000), declared)
    with Files() as opened:
        if not declared:  # nothing is asked for, so nothing is read
            assert opened.read(span) == b""
            return
        with pytest.raises(FormatError, match="declared"):
            opened.read(span)


def test_a_bomb_stops_at_its_declared_size(tmp_path: Path) -> None:
    span = deflated(tmp_path, bytes(40 * BLOCK), BLOCK)
    with Files() as opened:
        first_two = zip(range(3), opened.blocks(span), strict=False)
        with pytest.raises(FormatError, match="beyond"):
            list(first_two)


def test_garbage_instead_of_deflate_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "z").write_bytes(b"PK\x03\x04" + bytes(26) + b"\xff" * 50 + b"PK\x01\x02")
    with Files() as opened, pytest.raises(FormatError, match="deflated"):
        opened.read(Span(str(tmp_path / "z"), 0, 100, "deflated", 50))


def test_two_names_of_one_file_are_one_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x")
    os.link(tmp_path / "a", tmp_path / "b")
    (tmp_path / "c").write_bytes(b"x")
    assert same_file(str(tmp_path / "a"), str(tmp_path / "b"))
    assert same_file(str(tmp_path / "a"), os.path.join(str(tmp_path), ".", "a"))
    assert not same_file(str(tmp_path / "a"), str(tmp_path / "c"))
    assert not same_file(str(tmp_path / "a"), str(tmp_path / "absent"))
