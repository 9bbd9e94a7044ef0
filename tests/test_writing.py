"""Outputs appear whole or not at all, whatever happens; inputs are never harmed. The long runs are in `soak`."""

from __future__ import annotations

import ast
import contextlib
import errno
import json
import os
import resource
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import soak
import torch
from oracles import FIXTURES, Run, Saved, content, thinned
from safetensors.torch import load_file, save_file

import ckptool
from ckptool.cli import main
from ckptool.directories import place, sharded
from ckptool.errors import FormatError, OutputError
from ckptool.io.files import Files
from ckptool.io.leftovers import PARTIAL
from ckptool.io.output import LocalOutput
from ckptool.values import blocks as data

pytestmark = pytest.mark.skipif(os.name != "posix", reason="permissions, links and signals of POSIX")

ROOT = Path(ckptool.__file__).parents[1]
WRITERS = [
    ["-o", "o.safetensors"],
    ["-o", "o.pth"],
    ["-o", "o.pth", "--to", "torch-legacy"],
    ["-o", "o.npz"],
    ["-o", "d", "--to", "sharded", "--max-shard-size", "300KB"],
    ["-o", "d", "--to", "sharded-bin", "--max-shard-size", "300KB"],
    ["-o", "d", "--to", "dcp", "--max-shard-size", "300KB"],
]
NOBODY = 65534
root_only = pytest.mark.skipif(os.geteuid() != 0, reason="only root may")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A checkpoint of 1 MB in the current directory."""
    generator = torch.Generator().manual_seed(0)
    save_file({f"t{number}": torch.randn(65_536, generator=generator) for number in range(4)}, "in.safetensors")
    return tmp_path / "in.safetensors"


def partials(path: str = ".") -> list[str]:
    return [name for name in os.listdir(path) if PARTIAL.fullmatch(name)]


def shards(count: int, seed: int = 0) -> None:
    """Writes a checkpoint of so many shards into d."""
    generator = torch.Generator().manual_seed(seed)
    save_file({f"t{number}": torch.randn(25, generator=generator) for number in range(count)}, f"{seed}.safetensors")
    ckptool.convert(f"{seed}.safetensors", "d", to="sharded", max_shard_size=100, force=True, fsync=False)


def one_line(err: str) -> str:
    assert err.startswith("ckptool: error: "), err
    assert err.count("\n") == 1, err
    return err


# --- killed, interrupted, terminated ---------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def soaked() -> Iterator[Callable[..., dict[str, int]]]:
    """Has a process of its own, which is small to fork, do what `soak` can do; it starts once."""
    script = [sys.executable, str(ROOT / "tests" / "soak.py"), "serve"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(script, text=True, env=environment, cwd="/", **pipes) as server:

        def ask(*args: object) -> dict[str, int]:
            print(*args, file=server.stdin, flush=True)
            said = ""
            for line in server.stdout:
                if line.startswith("end "):
                    assert line == "end 0\n", said
                    return ast.literal_eval(said)
                said += line
            raise AssertionError(said)

        yield ask
        server.stdin.close()


LIKE = ("torch", "fewer-shards", "dcp")
"""Cases that go the way of another: over, shards-over, dcp-over."""


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.slow] if case in LIKE else []) for case in soak.CASES]
)
def test_killed_before_any_call_to_the_system_it_is_the_old_or_the_new(
    case: str, soaked: Callable[..., dict[str, int]]
) -> None:
    several = soak.CASES[case].output == "d"
    seen = soaked("points", case, "SIGKILL", 6 if several else 2)
    assert seen["old"] > 5
    assert bool(seen["between"]) == several


@pytest.mark.parametrize("case", ["over", "shards", "shards-over", "dcp-over"])
def test_a_signal_before_any_call_to_the_system_leaves_nothing(
    case: str, soaked: Callable[..., dict[str, int]]
) -> None:
    seen = soaked("points", case, "SIGTERM,SIGINT", 2 if case == "over" else 5)
    assert seen["old"] > 5
    assert seen["between"] == 0


@pytest.mark.parametrize("case", ["new", "over", "shards", "shards-over", "dcp-over"])
def test_of_runs_that_write_one_output_at_once_one_wins_whole(case: str, soaked: Callable[..., dict[str, int]]) -> None:
    assert soaked("together", case, 3)


@thinned(10)
@pytest.mark.parametrize(("case", "every"), [("new", 1), ("over", 1), ("shards", 2), ("shards-over", 4)])
def test_of_two_runs_that_meet_at_any_call_to_the_system_one_wins_whole(
    case: str, every: int, step: int, soaked: Callable[..., dict[str, int]]
) -> None:
    seen = soaked("meets", case, every * step)
    assert seen["first"] + seen["second"]
    if step == 1:  # some of the calls may meet one order only
        assert seen["first"]
        assert seen["second"]


def test_a_run_does_not_look_again_at_what_another_may_be_replacing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    locked = place.locked

    @contextlib.contextmanager
    def then_replaced(directory: str) -> Iterator[None]:
        with locked(directory):
            yield
        for name in os.listdir("d"):
            if sharded.MODEL.gives(name):
                os.rename(f"d/{name}", f"d/.{name}.0123abcd.ckptool-old")

    shards(2)
    monkeypatch.setattr(place, "locked", then_replaced)
    args = ("convert", "0.safetensors", "--to", "sharded", "-o", "d", "--max-shard-size", "100", "--force")
    code, out, err = run(*args)
    assert (code, err) == (0, "")
    assert "2 tensors" in out


@pytest.mark.slow
def test_eight_processes_convert_into_one_directory(saved: Saved) -> None:
    paths = [saved({"w": torch.arange(50.0) + number}, f"{number}.pth") for number in range(16)]
    code = "import sys; from ckptool.cli import main; sys.exit(main(sys.argv[1:]))"
    args = [sys.executable, "-c", code, "convert", *map(str, paths), "--to", "safetensors", "--force", "--no-fsync"]
    path = {**os.environ, "PYTHONPATH": str(ROOT)}
    running = [subprocess.Popen(args, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=path) for _ in range(8)]
    said = [process.communicate(timeout=100)[1] for process in running]
    assert [process.returncode for process in running] == [0] * 8, said
    for number in range(16):
        assert load_file(f"{number}.safetensors")["w"].tolist() == [float(number + step) for step in range(50)]
    assert len(os.listdir()) == 32


# --- what killed runs left -------------------------------------------------------------------------------------------


def test_leftovers_of_the_same_name_are_removed_and_nothing_else() -> None:
    dead = [".o.pth.0123abcd.ckptool-partial", ".o.pth.ffffffff.ckptool-partial"]
    other = [".p.pth.0123abce.ckptool-partial", ".o.pth.0123abc.ckptool-partial", "o.pth.0123abcd.ckptool-partial",
             ".o.pth.0123abcf.ckptool-old"]  # fmt: skip
    for name in dead + other:
        Path(name).write_bytes(b"x")
    os.mkfifo(".o.pth.0000000a.ckptool-partial")
    os.mkdir(".o.pth.0000000b.ckptool-partial")
    os.symlink("mine", ".o.pth.0000000c.ckptool-partial")
    Path("mine").write_bytes(b"mine")
    with LocalOutput("o.pth") as output:
        assert not set(dead) & set(os.listdir())
        output.commit()
    kept = [f".o.pth.0000000{letter}.ckptool-partial" for letter in "abc"]
    assert sorted(os.listdir()) == sorted([*other, *kept, "mine", "o.pth"])
    assert Path("mine").read_bytes() == b"mine"


def test_what_a_living_run_writes_is_not_taken_for_a_leftover() -> None:
    with LocalOutput("o.pth", force=True) as first:
        first.write(b"first")
        with LocalOutput("o.pth", force=True) as second:
            second.write(b"second")
            assert len(partials()) == 2
            second.commit()
        first.finished()
        with LocalOutput("o.pth", force=True):
            assert len(partials()) == 2
        first.commit()
    assert (Path("o.pth").read_bytes(), partials()) == (b"first", [])


def test_the_shards_of_a_living_run_are_not_taken_for_leftovers(monkeypatch: pytest.MonkeyPatch) -> None:
    locked = place.locked
    before: list[str] = []

    def meanwhile(directory: str) -> Any:
        if not partials("d"):
            return locked(directory)
        before.extend(partials("d"))
        monkeypatch.setattr(place, "locked", locked)
        ckptool.convert("2.safetensors", "d/model-00001-of-00003.safetensors", force=True)
        shards(2, seed=3)
        assert set(before) == set(partials("d"))
        return locked(directory)

    shards(3, seed=2)
    monkeypatch.setattr(place, "locked", meanwhile)
    shards(3, seed=2)
    assert (len(before), partials("d")) == (4, [])
    assert ckptool.diff("d", "2.safetensors", values=True).same


def test_a_directory_whose_replacement_was_killed_says_how_to_get_it_back(run: Run) -> None:
    shards(2)
    os.rename("d/model.safetensors.index.json", "d/.model.safetensors.index.json.0123abcd.ckptool-old")
    Path("d/.model.safetensors.index.json.0123abcd.ckptool-partial").write_bytes(b"")
    assert "killed" in one_line(run("inspect", "d")[2])
    code, _, err = run("convert", "0.safetensors", "--to", "sharded", "-o", "d", "--max-shard-size", "100")
    assert (code, "exists already" in one_line(err)) == (2, True)  # but put right
    assert len(ckptool.open("d").state_dict()) == 2
    assert partials("d") == []


@pytest.mark.parametrize("force", [[], ["--force"]])
def test_a_new_set_that_was_killed_while_it_got_its_names_is_taken_back(force: list[str], run: Run) -> None:
    shards(3)
    whole = content()
    shutil.rmtree("d")
    args = ("convert", "0.safetensors", "--to", "sharded", "-o", "d", "--max-shard-size", "100")
    commits = 0

    def killed(output: LocalOutput) -> None:
        nonlocal commits
        commits += 1
        if commits == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        commit(output)

    commit = LocalOutput.commit
    process = soak.child((*args, *force), lambda: setattr(LocalOutput, "commit", killed), os.devnull)
    assert soak.wait(process) == -signal.SIGKILL
    assert {name for name in os.listdir("d") if name[0] != "."} == {
        "model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors",
    }  # fmt: skip
    assert "was killed; write there again" in one_line(run("inspect", "d")[2])
    assert run(*args)[0] == 0
    assert content() == whole


def test_what_has_its_name_from_someone_else_is_not_taken_back() -> None:
    os.mkdir("d")
    for name in ("model-00001-of-00002.safetensors", "model.safetensors.index.json"):
        Path(f"d/.{name}.0123abcd.ckptool-partial").write_bytes(b"partial")
    Path("d/model-00001-of-00002.safetensors").write_bytes(b"mine")
    place.recover("d")
    assert content() == {"d": None, "d/model-00001-of-00002.safetensors": b"mine"}


def test_a_directory_that_a_living_run_replaces_says_so(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    shards(2)
    before = content()
    commit = LocalOutput.commit
    said: list[str] = []

    def looked_at(self: LocalOutput) -> None:
        commit(self)
        if os.path.basename(self.path).startswith("model-00001"):
            said.append(run("inspect", "d")[2])

    monkeypatch.setattr(LocalOutput, "commit", looked_at)
    shards(2)
    assert "another run is giving its files their names; try again" in one_line(*said)
    assert content() == before


# --- no room, no permission ------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 600 KB."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "ckptool-test", place], capture_output=True)
    if mounted.returncode:
        pytest.skip("cannot mount a file system")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


@root_only
@pytest.mark.parametrize("options", WRITERS, ids=" ".join)
def test_a_full_disk_is_one_line_and_leaves_what_was_there(
    options: list[str], run: Run, source: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(small_disk)
    for reserved in (True, False):
        if not reserved:
            monkeypatch.setattr(LocalOutput, "reserve", lambda self, nbytes: None)
        code, out, err = run("convert", source, *options)
        assert (code, out, "no space left" in one_line(err)) == (2, "", True)
        assert content() == {}
    save_file({"w": torch.ones(3)}, "old.safetensors")
    assert run("convert", "old.safetensors", *options)[0] == 0
    before = content()
    code, _, err = run("convert", source, *options, "--force")
    assert (code, "no space left" in err or options[1] == "d") == (2, True)
    assert content() == before


@root_only
def test_a_file_system_that_is_read_only_is_one_line(run: Run, source: Path, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    for output, to in (("o.pth", "torch"), ("d", "sharded")):
        code, _, err = run("convert", source, "-o", small_disk / output, "--to", to)
        assert (code, "read-only file system" in one_line(err)) == (2, True)


@pytest.mark.parametrize("options", WRITERS, ids=" ".join)
def test_a_limit_on_the_size_of_files_is_one_line(options: list[str], run: Run, source: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        code, out, err = run("convert", source, *options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (code, out, "file too large" in one_line(err)) == (2, "", True)
    assert os.listdir() == ["in.safetensors"]


def as_nobody(*args: object) -> tuple[int, str]:
    """Runs a command line in a fork as one who is not root: (exit code, what it said)."""

    def give_up() -> None:
        if os.geteuid() == 0:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)

    code = soak.wait(soak.child(tuple(map(str, args)), give_up))
    return code, Path("said").read_text()


@pytest.fixture
def open_place(source: Path) -> Iterator[Path]:
    """A directory that everyone may look into, with a checkpoint in it."""
    with tempfile.TemporaryDirectory() as place:
        os.chmod(place, 0o755)
        (Path(place) / "in.safetensors").write_bytes(source.read_bytes())
        os.chmod(Path(place) / "in.safetensors", 0o644)
        yield Path(place)


@pytest.mark.parametrize("options", WRITERS, ids=" ".join)
@pytest.mark.parametrize("force", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_directory_without_permission_is_one_line(options: list[str], force: bool, open_place: Path) -> None:
    locked = open_place / "locked"
    locked.mkdir()
    locked.chmod(0o555)
    place = options[1]
    args = [*options[:1], locked / place, *options[2:], *(["--force"] if force else [])]
    code, said = as_nobody("convert", open_place / "in.safetensors", *args)
    assert (code, "permission denied" in one_line(said)) == (2, True)
    assert os.listdir(locked) == []


def test_inputs_without_permission_are_one_line(open_place: Path) -> None:
    (open_place / "in.safetensors").chmod(0)
    code, said = as_nobody("convert", open_place / "in.safetensors", "-o", open_place / "o.pth")
    assert (code, "permission denied" in one_line(said)) == (2, True)


# --- what is there already -------------------------------------------------------------------------------------------


def test_a_missing_directory_is_one_line(refused: Callable[..., str], source: Path) -> None:
    for output, to in (("a/o.pth", "torch"), ("a/d", "sharded"), ("in.safetensors/o.pth", "torch")):
        assert "no such directory" in refused("convert", source, "-o", output, "--to", to)
    os.symlink("a/b", "link.pth")
    assert "no such directory" in refused("convert", source, "-o", "link.pth", "--force")


@pytest.mark.parametrize("command", [["filter"], ["remap", "--add-prefix", "x."], ["convert"]])
def test_a_report_may_go_into_a_pipe_or_device(command: list[str], run: Run, source: Path) -> None:
    reader, writer = os.pipe()
    try:
        assert run(*command, source, "-o", "one.pth", "--report", f"/dev/fd/{writer}")[0] == 0
    finally:
        os.close(writer)
    with os.fdopen(reader, encoding="utf-8") as stream:
        assert json.loads(stream.read())["command"] == command[0]
    assert run(*command, source, "-o", "two.pth", "--report", "/dev/null")[0] == 0
    assert Path("one.pth").read_bytes() == Path("two.pth").read_bytes()
    code, _, err = run(*command, source, "-o", "three.pth", "--report", "/dev/full")
    assert (code, err) == (2, "ckptool: error: /dev/full: cannot be written: no space left on device\n")


@pytest.mark.parametrize("force", [["--force"], []])
def test_only_files_are_replaced(force: list[str], run: Run, source: Path) -> None:
    os.mkdir("dir.pth")
    os.mkfifo("pipe.pth")
    os.symlink("pipe.pth", "link.pth")
    os.symlink("loop.pth", "loop.pth")
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as server:
        server.bind("socket.pth")
    before = {name: os.lstat(name).st_ino for name in os.listdir()}
    for name in ("dir.pth", "pipe.pth", "link.pth", "loop.pth", "socket.pth", "/dev/null", "/dev/full"):
        code, _, err = run("convert", source, "-o", name, "--to", "torch", *force)
        assert code == 2
        assert one_line(err)
        if force:
            said = {"dir.pth": "directory", "loop.pth": "too many levels of symbolic links"}
            assert said.get(name, "not a regular file") in err
    assert "is a file" in run("convert", source, "-o", source, "--to", "sharded", *force)[2]
    assert "is a file" in run("convert", source, "-o", "pipe.pth", "--to", "sharded", *force)[2]
    assert {name: os.lstat(name).st_ino for name in os.listdir()} == before
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_through_a_link_its_target_is_written_and_the_link_stays(run: Run, source: Path) -> None:
    os.mkdir("there")
    Path("there/real.pth").write_bytes(b"old")
    os.symlink("there/real.pth", "link.pth")
    os.symlink("there/absent.pth", "dangling.pth")
    for name in ("link.pth", "dangling.pth"):
        assert "exists already" in one_line(run("convert", source, "-o", name)[2])
        assert run("convert", source, "-o", name, "--force")[0] == 0
        assert os.path.islink(name)
    assert sorted(os.listdir("there")) == ["absent.pth", "real.pth"]
    assert torch.load("there/absent.pth").keys() == torch.load("there/real.pth").keys() == load_file(source).keys()
    assert partials() == []


def test_shards_are_written_through_links(source: Path) -> None:
    shards(2)
    os.mkdir("blobs")
    for number, name in enumerate(sorted(os.listdir("d"))):
        os.rename(f"d/{name}", f"blobs/{number}")
        os.symlink(f"../blobs/{number}", f"d/{name}")
    shards(2, seed=1)
    assert all(os.path.islink(f"d/{name}") for name in os.listdir("d"))
    assert sorted(os.listdir("blobs")) == ["0", "1", "2"]
    again = ckptool.diff("d", "1.safetensors", values=True)
    assert again.same


def test_the_other_name_of_a_hard_link_keeps_the_old_bytes(run: Run, source: Path) -> None:
    Path("o.pth").write_bytes(b"old")
    os.link("o.pth", "other")
    assert run("convert", source, "-o", "o.pth", "--force")[0] == 0
    assert Path("other").read_bytes() == b"old"
    assert torch.load("o.pth").keys() == load_file(source).keys()


@pytest.mark.parametrize("link", [os.link, os.symlink])
def test_an_input_that_a_shard_would_replace_is_not_overwritten(
    link: Callable[[Any, str], None], refused: Callable[..., str], source: Path
) -> None:
    os.mkdir("d")
    link(source, "d/model.safetensors")
    arguments = ("convert", source, "--to", "sharded", "-o", "d")
    assert "--in-place" in refused(*arguments, "--force")
    assert "--force" in refused(*arguments)


# --- permissions -----------------------------------------------------------------------------------------------------


@pytest.fixture
def umask() -> Iterator[Callable[[int], None]]:
    before = os.umask(0o022)
    yield lambda mask: (os.umask(mask), None)[1]
    os.umask(before)


@pytest.mark.parametrize(
    ("mode", "mask"),
    [(0o644, 0o022), (0o600, 0o000), (0o640, 0o022), (0o664, 0o002), (0o666, 0o077), (0o666, 0o000), (0o444, 0o022)],
)
def test_permissions_are_those_of_cp(
    mode: int, mask: int, run: Run, umask: Callable[[int], None], saved: Saved
) -> None:
    saved({"w": torch.ones(4)}, "in.pth").chmod(mode)
    umask(mask)
    subprocess.run(["cp", "in.pth", "copy"], check=True)
    for number, options in enumerate(WRITERS):
        place = f"{number}{options[1]}"
        assert run("convert", "in.pth", "-o", place, *options[2:], "--no-fsync")[0] == 0
        written = list(Path(place).iterdir()) if os.path.isdir(place) else [Path(place)]
        assert {path.stat().st_mode for path in written} == {os.stat("copy").st_mode}, options


def test_no_one_reads_what_is_not_finished(umask: Callable[[int], None]) -> None:
    umask(0)
    with LocalOutput("o.pth") as output:
        assert stat.S_IMODE(os.stat(partials()[0]).st_mode) == 0o600
        output.commit()
    assert stat.S_IMODE(os.stat("o.pth").st_mode) == 0o666


def test_of_several_inputs_the_strictest_counts(run: Run, saved: Saved) -> None:
    saved({"a": torch.ones(4)}, "a.pth").chmod(0o640)
    saved({"a": torch.ones(4), "b": torch.ones(4)}, "b.pth").chmod(0o604)
    assert run("filter", "a.pth", "--match", "b.pth", "-o", "o.pth")[0] == 0
    assert stat.S_IMODE(os.stat("o.pth").st_mode) == 0o600


@root_only
def test_a_replaced_file_keeps_its_owner_and_permissions(run: Run, source: Path) -> None:
    Path("o.pth").write_bytes(b"old")
    os.chown("o.pth", 1234, 2345)
    os.chmod("o.pth", 0o640)
    assert run("convert", source, "-o", "o.pth", "--force")[0] == 0
    status = os.stat("o.pth")
    assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (1234, 2345, 0o640)


# --- sets of shards --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", range(4))
@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()])
def test_shards_that_cannot_all_have_their_names_leave_the_old_set(
    error: BaseException, at: int, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards(3)
    save_file({f"t{number}": torch.zeros(25) for number in range(3)}, "new.safetensors")
    before = content()
    publish = LocalOutput._publish
    given: list[LocalOutput] = []

    def fails(self: LocalOutput) -> None:
        given.append(self)
        if len(given) == at + 1:
            raise error
        publish(self)

    monkeypatch.setattr(LocalOutput, "_publish", fails)
    args = ("convert", "new.safetensors", "--to", "sharded", "-o", "d", "--max-shard-size", "100", "--force")
    assert run(*args)[0] == (130 if isinstance(error, KeyboardInterrupt) else 2)
    assert content() == before
    assert run(*args)[0] == 0
    assert ckptool.diff("d", "new.safetensors", values=True).same


def test_an_old_set_that_cannot_have_its_names_again_is_kept(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    shards(2)
    before = content()

    def fails(*args: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as broken:
        broken.setattr(LocalOutput, "_publish", fails)
        broken.setattr(LocalOutput, "undo", fails)
        args = ["convert", "0.safetensors", "--to", "sharded", "-o", "d", "--max-shard-size", "100", "--force"]
        code, _, err = run(*args)
    assert (code, ".ckptool-old" in one_line(err)) == (2, True)
    assert any(name.endswith("-old") for name in partials("d"))
    assert run(*args[:-1])[0] == 2
    assert content() == before


def test_shards_of_an_older_index_are_removed_and_named(run: Run) -> None:
    shards(3)
    code, out, err = run("convert", "0.safetensors", "--to", "sharded", "-o", "d", "--max-shard-size", "250", "--force")
    assert (code, err) == (0, "")
    assert "removed: model-00001-of-00003.safetensors, model-00002" in " ".join(out.split())
    code, out, _ = run("convert", "0.safetensors", "--to", "sharded", "-o", "d", "--force")
    assert "removed: model.safetensors.index.json, model-00001-of-00002.safetensors" in " ".join(out.split())
    assert os.listdir("d") == ["model.safetensors"]


def test_in_place_leaves_no_file_of_the_set_that_was_there(run: Run) -> None:
    shards(3)
    Path("d/config.json").write_text("{}")
    os.rename("d/model-00001-of-00003.safetensors", "d/mine.safetensors")  # no name of ours: kept, and named
    index = Path("d/model.safetensors.index.json")
    index.write_text(index.read_text().replace("model-00001-of-00003.safetensors", "mine.safetensors"))
    code, out, err = run("convert", "d", "--to", "sharded", "-o", "d", "--max-shard-size", "250", "--in-place")
    assert (code, err) == (0, "")
    two = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert sorted(os.listdir("d")) == ["config.json", "mine.safetensors", *two, index.name]
    assert "removed: model-00002-of-00003.safetensors, model-00003-of-00003.safetensors" in " ".join(out.split())
    assert "not replaced: mine.safetensors" in " ".join(out.split())
    assert run("remap", "d", "-o", "d", "--add-prefix", "x.", "--in-place")[0] == 0
    assert sorted(os.listdir("d")) == ["config.json", "mine.safetensors", "model.safetensors"]
    found = ckptool.open("d")
    assert ckptool.diff(found, "0.safetensors", strip_prefix_a="x.", values=True).same


def test_a_set_that_is_no_input_is_replaced_whole_too(run: Run) -> None:
    shards(3)
    Path("d/mine.safetensors").write_bytes(Path("0.safetensors").read_bytes())
    assert run("convert", "0.safetensors", "--to", "sharded", "-o", "d", "--in-place")[0] == 0
    assert sorted(os.listdir("d")) == ["mine.safetensors", "model.safetensors"]


def test_in_place_that_fails_removes_nothing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    shards(3)
    before = content()

    def fails(self: LocalOutput) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(LocalOutput, "_publish", fails)
    for size in ("250", "5GB"):
        args = ("convert", "d", "--to", "sharded", "-o", "d", "--max-shard-size", size, "--in-place")
        assert run(*args)[0] == 2
        assert content() == before


# --- proof before the name -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", WRITERS, ids=" ".join)
def test_what_is_wrong_on_the_disk_never_gets_its_name(
    options: list[str], run: Run, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file({f"t{number}": torch.ones(65_536) for number in range(4)}, "old.safetensors")
    assert run("convert", "old.safetensors", *options)[0] == 0
    before = content()
    finished = LocalOutput.finished

    def rots(self: LocalOutput) -> str:
        if self._fd >= 0 and not self._finished and self.position > 100_000:
            os.pwrite(self._fd, b"\xa5\x5a\xa5", 90_000)
        return finished(self)

    monkeypatch.setattr(LocalOutput, "finished", rots)
    code, _, err = run("convert", source, *options, "--force", "--verify")
    assert code == 2
    assert "thrown away" in one_line(err)
    assert content() == before


# --- inputs that change ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", ["shrinks", "grows", "is rewritten"])
@pytest.mark.parametrize("options", WRITERS, ids=" ".join)
def test_an_input_that_changes_while_it_is_read_gives_no_output(
    options: list[str], change: str, run: Run, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = LocalOutput.write
    done = []

    def meanwhile(self: LocalOutput, data: Any) -> None:
        write(self, data)
        if not done and self.position > 70_000:
            done.append(1)
            if change == "shrinks":
                os.truncate(source, 800_000)
            else:
                with open(source, "r+b") as file:
                    file.seek(-10, os.SEEK_END)
                    file.write(b"x" * (10 if change == "is rewritten" else 20))
                os.utime(source, ns=(1, 1))

    monkeypatch.setattr(LocalOutput, "write", meanwhile)
    code, _, err = run("convert", source, *options)
    assert (code, "while it was read" in one_line(err) or "changed since" in err) == (2, True)
    assert done
    assert os.listdir() == ["in.safetensors"]


@pytest.mark.parametrize("held", [data.READ_WHOLE, 0])
@pytest.mark.parametrize("when", ["opened", "begun"])
def test_a_file_that_shrinks_while_a_view_is_gathered_is_no_crash(
    held: int, when: str, saved: Saved, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "READ_WHOLE", held)
    path = saved({"w": torch.zeros(2000, 1000).t()})
    (tensor,) = ckptool.open(path).state_dict().values()
    with Files() as files:
        blocks = data.tensor_blocks(tensor, files)
        if when == "begun":
            next(blocks)
        else:
            files.locate(tensor.source.span)
        os.truncate(path, 1000)

        def rest() -> None:
            list(blocks)
            files.close()

        with pytest.raises(FormatError, match="while it was read"):
            rest()
        files.close(check=False)


@pytest.mark.parametrize("options", [["--stats"], ["--hash"], ["--check"]], ids=" ".join)
def test_looking_notices_a_change_too(
    options: list[str], run: Run, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = Files.blocks

    def meanwhile(self: Files, *args: Any, **options: Any) -> Any:
        for block in blocks(self, *args, **options):
            os.utime(source, ns=(1, 1))
            yield block

    monkeypatch.setattr(Files, "blocks", meanwhile)
    code, _, err = run("inspect", source, *options)
    assert (code, "changed while it was read" in one_line(err)) == (2, True)


def test_a_replaced_input_is_read_to_its_end(run: Run, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = load_file(source)
    write = LocalOutput.write

    def meanwhile(self: LocalOutput, data: Any) -> None:
        write(self, data)
        if os.path.exists("next"):
            os.replace("next", source)

    save_file({"w": torch.ones(3)}, "next")
    monkeypatch.setattr(LocalOutput, "write", meanwhile)
    assert run("convert", source, "-o", "o.safetensors", "--no-verify")[0] == 0
    assert all(torch.equal(tensor, before[key]) for key, tensor in load_file("o.safetensors").items())


def test_two_outputs_of_one_name_are_one_or_the_other() -> None:
    with LocalOutput("o") as first, LocalOutput("o") as second:
        first.write(b"first")
        second.write(b"second")
        first.commit()
        with pytest.raises(OutputError, match="exists already"):
            second.commit()
    assert (Path("o").read_bytes(), os.listdir()) == (b"first", ["o"])


def test_the_fixtures_can_be_forked() -> None:
    assert as_nobody("--version")[0] == 0
    assert main(["--version"]) == 0
    assert FIXTURES.is_dir()
