from __future__ import annotations

import errno
import os
import random
import stat
from pathlib import Path

import pytest

from ckptool.errors import OutputError
from ckptool.io import output as outputs
from ckptool.io.output import LocalOutput

posix = pytest.mark.skipif(os.name != "posix", reason="permissions and links of POSIX")


def noise(nbytes: int) -> bytes:
    return random.Random(nbytes).randbytes(nbytes)


def put(path: Path, data: bytes, **options: bool) -> None:
    with LocalOutput(str(path), **options) as output:
        output.write(data)
        output.commit()


@pytest.mark.parametrize("fsync", [True, False])
@pytest.mark.parametrize("nbytes", [0, 1, outputs.WRITE, outputs.WRITE + 1, 3 * outputs.WRITE - 1])
def test_what_is_written_is_there(nbytes: int, fsync: bool, tmp_path: Path) -> None:
    data = noise(nbytes)
    with LocalOutput(str(tmp_path / "out"), fsync=fsync) as output:
        output.reserve(nbytes + 100)  # more than it will be: the rest must go
        output.write(data[: nbytes // 3])
        output.write(memoryview(bytearray(data[nbytes // 3 :])))
        assert output.position == nbytes
        output.commit()
    assert (tmp_path / "out").read_bytes() == data
    assert os.listdir(tmp_path) == ["out"]


def test_nothing_is_there_before_the_end_and_nothing_is_left_after_an_error(tmp_path: Path) -> None:
    def halfway() -> None:
        with LocalOutput(str(tmp_path / "out")) as output:
            output.write(b"abc")
            assert not (tmp_path / "out").exists()
            raise RuntimeError("halfway")

    with pytest.raises(RuntimeError, match="halfway"):
        halfway()
    assert os.listdir(tmp_path) == []


def test_an_interrupt_leaves_nothing_and_the_old_file_stays(tmp_path: Path) -> None:
    (tmp_path / "out").write_bytes(b"old")

    def interrupted() -> None:
        with LocalOutput(str(tmp_path / "out"), force=True) as output:
            output.write(b"new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (tmp_path / "out").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["out"]


def test_without_a_commit_nothing_appears(tmp_path: Path) -> None:
    with LocalOutput(str(tmp_path / "out")) as output:
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
    with LocalOutput(str(tmp_path / "out")) as output:
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
        LocalOutput(str(tmp_path), force=True)
    with pytest.raises(OutputError, match="no such directory"):
        LocalOutput(str(tmp_path / "absent" / "out"))


@posix
def test_devices_and_pipes_are_never_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (str(tmp_path / "pipe"), "/dev/null"):
        with pytest.raises(OutputError, match="not a regular file"):
            LocalOutput(path, force=True)


@posix
def test_what_the_system_says_of_a_name_is_what_is_said(tmp_path: Path) -> None:
    os.symlink("loop", tmp_path / "loop")
    for name, words in (("n" * 256, "file name too long"), ("loop", "too many levels of symbolic links")):
        with pytest.raises(OutputError, match=f"cannot be written: {words}"):
            LocalOutput(str(tmp_path / name), force=True)


def test_long_names_can_be_written(tmp_path: Path) -> None:
    put(tmp_path / ("n" * 255), b"x")
    put(tmp_path / ("ü" * 127), b"x")
    assert len(os.listdir(tmp_path)) == 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_an_output_error_and_leaves_nothing(tmp_path: Path) -> None:
    with LocalOutput(str(tmp_path / "out")) as output:
        full = os.open("/dev/full", os.O_WRONLY)
        os.dup2(full, output._fd)
        os.close(full)
        with pytest.raises(OutputError, match="no space"):
            output.write(bytes(1 << 20))
    assert os.listdir(tmp_path) == []


def test_what_is_written_is_sent_to_the_disk_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[int] = []
    monkeypatch.setattr("ckptool.io.output.AHEAD", 1 << 16)
    monkeypatch.setattr(os, "fdatasync", sent.append)
    with LocalOutput(str(tmp_path / "a")) as output:
        for _ in range(20):
            output.write(b"x" * (1 << 16))
        output.commit()
    assert sent
    assert (tmp_path / "a").read_bytes() == b"x" * (20 << 16)
    sent.clear()
    with LocalOutput(str(tmp_path / "b"), fsync=False) as output:
        output.write(b"x" * (1 << 20))
        output.commit()
    assert sent == []


def test_a_disk_that_fails_while_more_is_written_is_an_error_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("ckptool.io.output.AHEAD", 1 << 16)
    monkeypatch.setattr(os, "fdatasync", fails)  # the kernel says so once; fsync afterwards says nothing
    with pytest.raises(OutputError, match="input/output error"):
        put(tmp_path / "a", b"x" * (1 << 20))
    assert os.listdir(tmp_path) == []
