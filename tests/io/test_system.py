"""Systems that lack what Linux has, by fakes: the commands write the same bytes, and only `io.system` knows of it."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from oracles import FIXTURES, Run

import ckptool
import ckptool.formats
from ckptool import saving
from ckptool.errors import CkptoolError, OutputError
from ckptool.io import system
from ckptool.io.output import LocalOutput
from ckptool.io.source import LocalFile

PACKAGE = Path(ckptool.formats.__file__).parents[1]

LACKING = {
    "pread", "preadv", "pwrite", "pwritev", "fdatasync", "posix_fallocate", "posix_fadvise", "fchmod", "fchown",
    "sched_getaffinity", "copy_file_range", "sendfile", "O_NONBLOCK", "O_NOFOLLOW", "O_DIRECTORY", "O_CLOEXEC",
    "getuid", "fork", "mkfifo", "statvfs",
}  # fmt: skip
"""Names of `os` that Windows does not have; of macOS fdatasync, posix_fallocate, posix_fadvise and others."""

MODULES = ("fcntl", "resource", "termios", "pwd", "grp")

SIGNALS = ("SIGHUP", "SIGPIPE", "SIGQUIT", "SIGALRM", "SIGUSR1", "SIGKILL")

BARE = """
import json, os, signal, sys
for name in json.loads(sys.argv[1]):
    if hasattr(os, name):
        delattr(os, name)
for name in json.loads(sys.argv[2]):
    sys.modules[name] = None
for name in json.loads(sys.argv[3]):
    delattr(signal, name)
if sys.argv[4] == "busy":  # as Windows: no file that is open or mapped is renamed or removed, no directory opened
    def refusing(call):
        def checked(path, *rest, **named):
            at = {os.path.realpath(one) for one in (path, *rest) if isinstance(one, str)}
            for fd in os.listdir("/proc/self/fd"):
                try:
                    held = os.readlink(f"/proc/self/fd/{fd}")
                except OSError:
                    continue
                if held in at:
                    raise PermissionError(13, f"open, and {call.__name__} wanted", held)
            with open("/proc/self/maps") as maps:
                if any(line.rstrip().endswith(tuple(at)) for line in maps):
                    raise PermissionError(13, "mapped", path)
            return call(path, *rest, **named)
        return checked
    for name in ("rename", "replace", "unlink", "remove"):
        setattr(os, name, refusing(getattr(os, name)))
    opens = os.open
    def opened(path, *rest, **named):
        if not isinstance(path, int) and os.path.isdir(path):
            raise PermissionError(13, "Permission denied", path)
        return opens(path, *rest, **named)
    os.open = opened
    from ckptool.io import system
    system.renames_open_files = lambda: False
from ckptool.cli import main
for command in json.loads(sys.argv[5]):
    code = main(command)
    if code not in (0, 1):
        sys.exit(f"{command}: {code}")
"""

OLD, NEW = str(FIXTURES / "resnet_old.pth"), str(FIXTURES / "resnet_new.pth")
COMMANDS = [
    ["inspect", OLD, "--stats", "--hash"],
    ["inspect", str(FIXTURES / "deflated.pth"), "--check"],
    ["diff", OLD, NEW, "--values"],
    ["filter", OLD, "--match", NEW, "-o", "merged.pth"],
    ["filter", OLD, "--match", NEW, "-o", "merged.pth", "--force"],
    ["convert", "merged.pth", "-o", "merged.safetensors"],
    ["convert", "merged.safetensors", "--to", "sharded", "-o", "shards", "--max-shard-size", "20kB", "--dtype", "bf16"],
    ["convert", "shards", "--to", "sharded", "-o", "shards", "--in-place", "--max-shard-size", "9kB"],
    ["convert", "merged.pth", "--to", "dcp", "-o", "distributed"],
    ["convert", "merged.pth", "--publish", "--to", "safetensors"],
    ["remap", "merged.pth", "--add-prefix", "m.", "-o", "merged.pth", "--in-place"],
    ["remap", "merged.safetensors", "--rename", "fc=head", "-o", "merged.safetensors", "--in-place"],
    ["load-partial", OLD, "--into", NEW, "--adapt", "fc.*=rows", "--init", "fc.*=zeros", "-o", "start.pth"],
    ["inspect", OLD, "--lock", "old.lock"],
    ["inspect", OLD, "--lock", "old.lock", "--update-lock"],
]  # fmt: skip


def made(directory: Path, names: list[str], modules: list[str], signals: list[str], how: str) -> dict[str, bytes]:
    """What the commands leave in a directory, run by a Python that lacks these."""
    directory.mkdir()
    words = [json.dumps(one) for one in (names, modules, signals)]
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run(
        [sys.executable, "-c", BARE, *words, how, json.dumps(COMMANDS)],
        cwd=directory, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return made(tmp_path_factory.mktemp("usual") / "out", [], [], [], "")


@pytest.mark.parametrize(
    ("names", "modules", "signals", "how"),
    [
        (["fdatasync", "posix_fallocate", "posix_fadvise", "copy_file_range", "sched_getaffinity"], [], [], ""),
        (["preadv", "pwritev"], ["fcntl"], [], ""),
        (sorted(LACKING), [*MODULES], [*SIGNALS], "busy"),
    ],
    ids=["as macOS", "without preadv and locks", "as Windows"],
)
@pytest.mark.skipif(sys.platform != "linux", reason="the fakes are of Linux")
def test_a_system_that_lacks_calls_gets_the_same_files(
    names: list[str], modules: list[str], signals: list[str], how: str, usual: dict[str, bytes], tmp_path: Path
) -> None:
    found = made(tmp_path / "out", names, modules, signals, how)
    assert found.keys() == usual.keys()
    assert {name: content == usual[name] for name, content in found.items()} == dict.fromkeys(usual, True)


def platform_calls(text: str) -> list[str]:
    """Every use in a file of what not all systems have."""
    found: list[str] = []
    if not re.search(rf"\b({'|'.join([*LACKING, *MODULES, *SIGNALS])})\b", text):  # parsing takes long
        return found
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            found += [f"{node.lineno}: {name}" for name in names if name in MODULES or name in LACKING]
        elif (
            isinstance(node, ast.Attribute)
            and node.attr in {*LACKING, *SIGNALS}
            and ast.unparse(node.value) != "system"
        ):
            found.append(f"{node.lineno}: {ast.unparse(node)}")
        elif isinstance(node, ast.Constant) and node.value in {*LACKING, *SIGNALS}:
            found.append(f"{node.lineno}: {node.value!r}")
    return found


def test_what_not_all_systems_have_is_looked_up_in_one_file() -> None:
    found = {
        path.relative_to(PACKAGE).as_posix(): lines
        for path in sorted(PACKAGE.rglob("*.py"))
        if (lines := platform_calls(path.read_text()))
    }
    assert found.pop("io/system.py")
    flags = [line for line in [*found.pop("io/leftovers.py"), *found.pop("io/source.py")] if "'O_NO" not in line]
    assert flags == []  # those are names that `system.flags` looks up
    for name in ("cli/terminal/completion.py", "core/keys.py"):  # core sees no io; both ask for what they use
        assert {line.partition(": ")[2] for line in found.pop(name)} == {"signal.SIGALRM"}
        assert 'hasattr(signal, "setitimer")' in (PACKAGE / name).read_text()
    assert found == {}


@pytest.mark.parametrize(
    "text", ["import os\nos.pread(1, 2, 3)", "from fcntl import flock", "signal.SIGHUP", "getattr(os, 'O_NOFOLLOW')"]
)
def test_the_search_finds_what_it_looks_for(text: str) -> None:
    assert platform_calls(text)


def test_without_pread_threads_that_read_one_file_get_each_their_own_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from concurrent.futures import ThreadPoolExecutor

    for name in ("pread", "preadv"):
        monkeypatch.delattr(os, name)
    content = bytes(number % 253 for number in range(1 << 20))
    (tmp_path / "f").write_bytes(content)
    with LocalFile(str(tmp_path / "f")) as file, ThreadPoolExecutor(8) as pool:
        starts = range(0, len(content) - 1000, 997)
        assert list(pool.map(lambda at: file.read(at, 1000), starts)) == [content[at : at + 1000] for at in starts]
        blocks = pool.map(lambda at: b"".join(map(bytes, file.blocks(at, 1000, bytearray(64)))), starts)
        assert list(blocks) == [content[at : at + 1000] for at in starts]


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("C:\\models\\a.pth", "C:\\models\\a.pth"),
        ("C:\\" + "d" * 300 + "\\a.pth", "\\\\?\\C:\\" + "d" * 300 + "\\a.pth"),
        ("\\\\server\\share\\" + "d" * 300, "\\\\?\\UNC\\server\\share\\" + "d" * 300),
        ("\\\\?\\C:\\" + "d" * 300, "\\\\?\\C:\\" + "d" * 300),
        ("C:/models/" + "d/" * 150 + "a", "\\\\?\\C:\\models\\" + "d\\" * 150 + "a"),
    ],
)
def test_a_long_path_of_windows_is_spelled_so_that_its_length_does_not_matter(path: str, found: str) -> None:
    assert system._unlimited(path) == found
    assert system.reachable(path) == (found if os.name == "nt" else path)


def test_names_that_differ_in_case_only_are_one_where_the_directory_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "runs"
    here.mkdir()
    first, second = str(here / "Out.json"), str(here / "out.json")
    assert not saving.same_place(first, second)
    (tmp_path / "RUNS").symlink_to(here)  # as on a file system that does not tell them apart
    assert saving.same_place(first, second)
    assert not saving.same_place(first, str(here / "other.json"))
    monkeypatch.setattr(sys, "platform", "darwin")
    assert system.canonical("/A.pth") == system.canonical("/a.pth")


def test_two_outputs_of_one_name_are_refused_where_case_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    monkeypatch.setattr(system, "_folds_case", lambda directory: True)
    code, _, err = run("filter", OLD, "--include", "fc.*", "-o", tmp_path / "A.pth", "--report", tmp_path / "a.pth")
    assert (code, "two outputs have the name" in err) == (2, True)
    assert os.listdir(tmp_path) == []
    for name in ("M.pth", "m.pt"):
        ckptool.save(ckptool.open(OLD), tmp_path / name)
    code, _, err = run("convert", tmp_path / "M.pth", tmp_path / "m.pt", "--to", "safetensors")
    assert (code, "two inputs would be written to one name" in err) == (2, True)


def test_an_output_that_cannot_be_renamed_is_one_line_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise PermissionError(13, "The process cannot access the file because it is being used by another process")

    monkeypatch.setattr(system, "renames_open_files", lambda: False)
    for name in ("replace", "link"):
        monkeypatch.setattr(os, name, fails)
    with LocalOutput(str(tmp_path / "out")) as output:
        output.write(b"x")
        with pytest.raises(OutputError, match="used by another process"):
            output.commit()
    assert os.listdir(tmp_path) == []


def test_permissions_and_owners_are_left_alone_where_there_are_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("fchmod", "fchown"):
        monkeypatch.delattr(os, name)
    for _ in range(2):  # the second replaces the first
        ckptool.save(ckptool.open(OLD), tmp_path / "copy.pth", force=True)
    assert ckptool.diff(tmp_path / "copy.pth", OLD, values=True).same
    with pytest.raises(CkptoolError):
        ckptool.save(ckptool.open(OLD), tmp_path / "copy.pth")
