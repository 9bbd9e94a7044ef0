from __future__ import annotations

import errno
import os
import random
import stat
import zlib
from pathlib import Path

import pytest

from ckptool import files
from ckptool.checkpoint import Span
from ckptool.errors import FormatError, OutputError, UnreadableError
from ckptool.files import BLOCK, File, Files, Output, same_file

posix = pytest.mark.skipif(os.name != "posix", reason="permissions and links of POSIX")


def noise(nbytes: int) -> bytes:
    return random.Random(nbytes).randbytes(nbytes)


def put(path: Path, data: bytes, **options: bool) -> None:
    with Output(str(path), **options) as output:
        output.write(data)
        output.commit()


# --- reading ---------------------------------------------------------------------------------------------------------


def test_a_range_is_read_exactly(tmp_path: Path) -> None:
    data = noise(3 * BLOCK + 17)
    (tmp_path / "f").write_bytes(data)
    with File(str(tmp_path / "f")) as file:
        assert file.size == len(data)
        assert file.read(5, 100) == data[5:105]
        assert file.read(len(data), 0) == b""
        for offset, nbytes in ((0, len(data)), (1, BLOCK), (BLOCK - 1, BLOCK + 2), (len(data) - 3, 3), (9, 0)):
            assert b"".join(map(bytes, file.blocks(offset, nbytes))) == data[offset : offset + nbytes]


def test_blocks_are_whole_until_the_last(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(bytes(2 * BLOCK + 10))
    with File(str(tmp_path / "f")) as file:
        assert [len(block) for block in file.blocks(3, 2 * BLOCK + 5)] == [BLOCK, BLOCK, 5]


@pytest.mark.parametrize(("offset", "nbytes"), [(0, 11), (11, 0), (10, 1), (-1, 2), (2, -1), (1 << 62, 1)])
def test_bytes_outside_the_file_are_a_damaged_file(offset: int, nbytes: int, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(bytes(10))
    with File(str(tmp_path / "f")) as file:
        with pytest.raises(FormatError, match="of a file of 10"):
            file.read(offset, nbytes)
        if nbytes > 0 and offset >= 0:
            with pytest.raises(FormatError):
                list(file.blocks(offset, nbytes))


def test_what_cannot_be_read_says_why(tmp_path: Path) -> None:
    with pytest.raises(UnreadableError, match="no such file"):
        File(str(tmp_path / "absent"))
    with pytest.raises(UnreadableError, match="not a regular file"):
        File(str(tmp_path))
    with pytest.raises(UnreadableError):
        File("a\0b")


@posix
def test_a_pipe_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # opening it for reading would wait for a writer
    with pytest.raises(UnreadableError, match="not a regular file"):
        File(str(tmp_path / "pipe"))


@posix
@pytest.mark.skipif(os.name == "posix" and os.geteuid() == 0, reason="root may read everything")
def test_a_forbidden_file_says_so(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"x")
    (tmp_path / "f").chmod(0)
    with pytest.raises(UnreadableError, match="denied"):
        File(str(tmp_path / "f"))


def test_a_file_that_becomes_shorter_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(bytes(2 * BLOCK))
    file = File(str(tmp_path / "f"))
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
    with File(str(path)) as file:
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
    header = b"PK\x03\x04" + bytes(22) + b"\x01\x00\x02\x00" + b"nxx"
    (tmp_path / "z").write_bytes(b"junk" + header + packed)
    nbytes = len(content) if declared is None else declared
    return Span(str(tmp_path / "z"), 4, nbytes, "deflated", len(packed))


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
    span = deflated(tmp_path, bytes(200 * BLOCK), BLOCK)
    with Files() as opened:
        first_two = zip(range(3), opened.blocks(span), strict=False)
        with pytest.raises(FormatError, match="beyond"):
            list(first_two)


def test_garbage_instead_of_deflate_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "z").write_bytes(b"PK\x03\x04" + bytes(26) + b"\xff" * 50)
    with Files() as opened, pytest.raises(FormatError, match="deflated"):
        opened.read(Span(str(tmp_path / "z"), 0, 100, "deflated", 50))


# --- writing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fsync", [True, False])
@pytest.mark.parametrize("nbytes", [0, 1, files.WRITE, files.WRITE + 1, 3 * files.WRITE - 1])
def test_what_is_written_is_there(nbytes: int, fsync: bool, tmp_path: Path) -> None:
    data = noise(nbytes)
    with Output(str(tmp_path / "out"), fsync=fsync) as output:
        output.reserve(nbytes + 100)  # more than it will be: the rest must go
        output.write(data[: nbytes // 3])
        output.write(memoryview(bytearray(data[nbytes // 3 :])))
        assert output.position == nbytes
        output.commit()
    assert (tmp_path / "out").read_bytes() == data
    assert os.listdir(tmp_path) == ["out"]


def test_nothing_is_there_before_the_end_and_nothing_is_left_after_an_error(tmp_path: Path) -> None:
    def halfway() -> None:
        with Output(str(tmp_path / "out")) as output:
            output.write(b"abc")
            assert not (tmp_path / "out").exists()
            raise RuntimeError("halfway")

    with pytest.raises(RuntimeError, match="halfway"):
        halfway()
    assert os.listdir(tmp_path) == []


def test_an_interrupt_leaves_nothing_and_the_old_file_stays(tmp_path: Path) -> None:
    (tmp_path / "out").write_bytes(b"old")

    def interrupted() -> None:
        with Output(str(tmp_path / "out"), force=True) as output:
            output.write(b"new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (tmp_path / "out").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["out"]


def test_without_a_commit_nothing_appears(tmp_path: Path) -> None:
    with Output(str(tmp_path / "out")) as output:
        output.write(b"abc")
    assert os.listdir(tmp_path) == []


def test_an_existing_file_is_replaced_only_by_force(tmp_path: Path) -> None:
    put(tmp_path / "out", b"old")
    with pytest.raises(OutputError, match="--force"):
        put(tmp_path / "out", b"new")
    assert (tmp_path / "out").read_bytes() == b"old"
    put(tmp_path / "out", b"new", force=True)
    assert (tmp_path / "out").read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["out"]


def test_a_file_that_appears_meanwhile_is_not_overwritten_without_force(tmp_path: Path) -> None:
    with Output(str(tmp_path / "out")) as output:
        output.write(b"new")
        (tmp_path / "out").write_bytes(b"of another process")
        with pytest.raises(OutputError):
            output.commit()
    assert (tmp_path / "out").read_bytes() == b"of another process"


@posix
def test_a_link_stays_a_link_and_its_target_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "real").write_bytes(b"old")
    (tmp_path / "link").symlink_to(tmp_path / "there" / "real")
    put(tmp_path / "link", b"new", force=True)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "there" / "real").read_bytes() == b"new"
    assert sorted(os.listdir(tmp_path)) == ["link", "there"]
    assert os.listdir(tmp_path / "there") == ["real"]


@posix
@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_a_new_file_has_the_permissions_of_any_new_file(umask: int, tmp_path: Path) -> None:
    old = os.umask(umask)
    try:
        put(tmp_path / "out", b"x")
        (tmp_path / "plain").write_bytes(b"x")
    finally:
        os.umask(old)
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode


@posix
@pytest.mark.parametrize("mode", [0o600, 0o640, 0o666, 0o444])
def test_a_replaced_file_keeps_its_permissions(mode: int, tmp_path: Path) -> None:
    (tmp_path / "out").write_bytes(b"old")
    (tmp_path / "out").chmod(mode)
    put(tmp_path / "out", b"new", force=True)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == mode


def test_directories_and_absent_directories_are_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="directory"):
        Output(str(tmp_path), force=True)
    with pytest.raises(OutputError, match="no such directory"):
        Output(str(tmp_path / "absent" / "out"))


@posix
def test_devices_and_pipes_are_never_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (str(tmp_path / "pipe"), "/dev/null"):
        with pytest.raises(OutputError, match="not a regular file"):
            Output(path, force=True)


def test_long_names_can_be_written(tmp_path: Path) -> None:
    put(tmp_path / ("n" * 255), b"x")
    put(tmp_path / ("ü" * 127), b"x")
    assert len(os.listdir(tmp_path)) == 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_an_output_error_and_leaves_nothing(tmp_path: Path) -> None:
    with Output(str(tmp_path / "out")) as output:
        full = os.open("/dev/full", os.O_WRONLY)
        os.dup2(full, output._fd)
        os.close(full)
        with pytest.raises(OutputError, match="no space"):
            output.write(bytes(1 << 20))
    assert os.listdir(tmp_path) == []


def test_two_names_of_one_file_are_one_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x")
    os.link(tmp_path / "a", tmp_path / "b")
    (tmp_path / "c").write_bytes(b"x")
    assert same_file(str(tmp_path / "a"), str(tmp_path / "b"))
    assert same_file(str(tmp_path / "a"), os.path.join(str(tmp_path), ".", "a"))
    assert not same_file(str(tmp_path / "a"), str(tmp_path / "c"))
    assert not same_file(str(tmp_path / "a"), str(tmp_path / "absent"))


def test_what_is_written_is_sent_to_the_disk_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[int] = []
    monkeypatch.setattr("ckptool.files.AHEAD", 1 << 16)
    monkeypatch.setattr(os, "fdatasync", sent.append)
    with Output(str(tmp_path / "a")) as output:
        for _ in range(20):
            output.write(b"x" * (1 << 16))
        output.commit()
    assert sent
    assert (tmp_path / "a").read_bytes() == b"x" * (20 << 16)
    sent.clear()
    with Output(str(tmp_path / "b"), fsync=False) as output:
        output.write(b"x" * (1 << 20))
        output.commit()
    assert sent == []


def test_a_disk_that_fails_while_more_is_written_is_an_error_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("ckptool.files.AHEAD", 1 << 16)
    monkeypatch.setattr(os, "fdatasync", fails)  # the kernel says so once; fsync afterwards says nothing
    with pytest.raises(OutputError, match="input/output error"):
        put(tmp_path / "a", b"x" * (1 << 20))
    assert os.listdir(tmp_path) == []
