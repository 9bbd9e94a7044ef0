from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import FIXTURES
from sparse import write_sparse

import ckptool
from ckptool.cli import main

Saved = Callable[..., Path]
Run = Callable[..., tuple[int, str, str]]

OLD, FULL = FIXTURES / "resnet_old.pth", FIXTURES / "resnet_122.pth"
COMMANDS = ["inspect", "diff", "filter"]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*args: object) -> tuple[int, str, str]:
        code = main([str(arg) for arg in args])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def process(*args: object, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ckptool", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **options)


# --- wrong inputs ----------------------------------------------------------------------------------------------------

BAD = {
    "empty.pth": ("damaged", "empty file"),
    "gguf.pth": ("unsupported", "GGUF"),
    "html.pth": ("damaged", "HTML"),
    "json.pth": ("damaged", "JSON"),
    "lfs.pth": ("damaged", "git lfs pull"),
    "text.pth": ("damaged", "no checkpoint that ckptool knows"),
    "truncated.pth": ("damaged", "truncated"),
    "truncated.safetensors": ("damaged", "truncated"),
    "absent.pth": ("unreadable", "no such file"),
    "folder": ("unreadable", ""),
    "objects.npz": ("unsupported", "names ('|O': Python objects, which need pickle)"),
    "no-tensors.pth": ("no-tensors", "no tensors"),
}


def test_every_bad_fixture_is_in_these_tests() -> None:
    assert {path.name for path in (FIXTURES / "bad").iterdir()} <= set(BAD)


@pytest.fixture(params=list(BAD))
def bad(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    name = request.param
    if (FIXTURES / "bad" / name).is_file():
        return str(FIXTURES / "bad" / name)
    folder = tmp_path / "given"
    folder.mkdir()
    if name == "folder":
        (folder / name).mkdir()
    if name == "no-tensors.pth":
        torch.save({"model": {}, "epoch": 3}, folder / name)
    return str(folder / name)


def ways(path: str) -> Iterator[list[str]]:
    if not path.endswith("no-tensors.pth"):  # that is shown
        yield ["inspect", path]
    yield ["diff", path, str(OLD)]
    yield ["diff", str(OLD), path, "--values"]
    yield ["filter", path, "-o", "out.pth"]
    yield ["filter", "--match", str(FULL), path, "-o", "out.pth", "--report", "report.json"]
    yield ["filter", "--match", path, str(OLD), "-o", "out.safetensors"]
    yield ["filter", "--match", str(FULL), str(OLD), path, "-o", "out.pth", "--dry-run"]


def test_a_wrong_input_is_one_line_exit_2_and_nothing_left_behind(bad: str, run: Run, tmp_path: Path) -> None:
    _, words = BAD[Path(bad).name]
    before = sorted(tmp_path.rglob("*"))
    for args in ways(bad):
        code, out, err = run(*args)
        assert (code, out) == (2, ""), args
        assert err.startswith(f"ckptool: error: {bad}"), args
        assert words in err, args
        assert (err.count("\n"), "Traceback" in err) == (1, False), args
        assert sorted(tmp_path.rglob("*")) == before, args


def test_a_wrong_input_is_an_error_document_with_json(bad: str, run: Run) -> None:
    slug, words = BAD[Path(bad).name]
    for args in ways(bad):
        code, out, err = run(*args, "--json")
        document = json.loads(out)
        assert code == 2
        assert set(document) == {"schema", "command", "error"}
        assert (document["schema"], document["command"]) == (1, args[0])
        if Path(bad).name != "folder":
            assert document["error"]["kind"] == slug
        assert document["error"]["path"] == bad
        assert words in document["error"]["message"]
        assert err.count("\n") == 1


@pytest.mark.parametrize("name", ["tied.pth", "resnet_old.safetensors", "resnet_legacy.pth", "tar_2016.pth"])
def test_every_cut_of_a_file_is_refused(name: str, tmp_path: Path, run: Run) -> None:
    whole = (FIXTURES / name).read_bytes()
    if name.startswith("tar"):
        whole = whole.rstrip(b"\0")  # the padding behind the last member may be cut, for tarfile too
    cut = tmp_path / f"cut-{name}"
    for length in range(0, len(whole), max(1, len(whole) // 41)):
        cut.write_bytes(whole[:length])
        code, out, err = run("filter", cut, "-o", "out.pth")
        assert (code, out, err.count("\n"), Path("out.pth").exists()) == (2, "", 1, False), length


def test_an_empty_name_is_no_file_and_never_no_option(run: Run) -> None:
    for args in (["filter", "--match", "", OLD, "-o", "out.pth"], ["filter", "--match", FULL, "", "-o", "out.pth"],
                 ["inspect", ""], ["diff", "", OLD]):  # fmt: skip
        code, out, err = run(*args)
        assert (code, out, err.count("\n"), os.listdir()) == (2, "", 1, []), args


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_said(saved: Saved, run: Run) -> None:
    path = saved({"w": torch.ones(1)})
    path.chmod(0)
    assert run("inspect", path)[2] == f"ckptool: error: {path}: cannot be opened: permission denied\n"


def test_a_device_or_a_pipe_is_no_checkpoint_and_never_waited_for(tmp_path: Path, run: Run) -> None:
    os.mkfifo(tmp_path / "pipe.pth")
    for path in (tmp_path / "pipe.pth", Path("/dev/zero")):
        code, _, err = run("inspect", path)
        assert (code, err.count("\n")) == (2, 1)


# --- outputs that cannot be ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("output", "words"),
    [("nowhere/out.pth", "no such directory"), ("folder.pth", "is a directory"), ("out.zzz", "suffix"), ("", "suffix")],
)
def test_an_output_that_cannot_be_is_one_line_and_exit_2(output: str, words: str, run: Run) -> None:
    os.mkdir("folder.pth")
    code, out, err = run("filter", "--match", FULL, OLD, "-o", output)
    assert (code, out, os.listdir()) == (2, "", ["folder.pth"])
    assert words in err
    assert err.count("\n") == 1


def test_a_report_to_a_place_that_is_not_there_is_exit_2(run: Run) -> None:
    code, _, err = run("filter", "--match", FULL, OLD, "--dry-run", "--report", "nowhere/report.json")
    assert (code, err.count("\n"), os.listdir()) == (2, 1, [])


# --- usage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "args",
    [["inspect"], ["diff", "one"], ["filter"], ["inspect", "x", "--nope"], ["nope"],
     ["inspect", "x", "--sort", "colour"], ["diff", "a", "b", "--rtol", "much"], ["diff", "a", "b", "--atol", "-1"],
     ["inspect", "x", "--depth", "few"], ["--nope"]],
)  # fmt: skip
def test_wrong_usage_is_one_line_and_exit_2(args: list[str], run: Run) -> None:
    code, out, err = run(*args)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("ckptool: error: ")
    code, out, _ = run(*args, "--json")
    assert (code, json.loads(out)["error"]["kind"]) == (2, "usage")


@pytest.mark.parametrize("pattern", ["re:(", "re:*", "re:[a"])
def test_a_broken_pattern_is_wrong_usage(pattern: str, run: Run) -> None:
    for args in (["inspect", OLD, "--include", pattern], ["diff", OLD, OLD, "--ignore", pattern],
                 ["filter", OLD, "-o", "out.pth", "--exclude", pattern],
                 ["filter", "--match", FULL, OLD, "-o", "out.pth", "--require", pattern]):  # fmt: skip
        code, _, err = run(*args)
        assert (code, err.count("\n"), os.listdir()) == (2, 1, [])
        assert "regular expression" in err


def test_without_arguments_the_commands_are_shown(run: Run) -> None:
    code, out, err = run()
    assert (code, err) == (2, "")
    assert all(command in out for command in COMMANDS)


@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help_is_exit_0_and_names_every_option_that_the_command_takes(option: str, run: Run) -> None:
    code, out, _ = run(option)
    assert code == 0
    assert all(re.search(rf"^  {command} ", out, re.M) for command in COMMANDS)
    for command in COMMANDS:
        code, out, err = run(command, option)
        assert (code, err) == (0, "")
        assert "--json" in out
        assert "\x1b" not in out


def test_the_version_is_the_packages(run: Run) -> None:
    assert run("--version") == (0, f"ckptool {ckptool.__version__}\n", "")


# --- the process -----------------------------------------------------------------------------------------------------


def test_the_module_and_the_script_are_the_same_command() -> None:
    script = shutil.which("ckptool", path=str(Path(sys.executable).parent))
    by_module = process("diff", OLD, FULL)
    assert (by_module.returncode, by_module.stderr) == (0, "")
    if script:
        by_script = subprocess.run([script, "diff", OLD, FULL], capture_output=True, text=True, timeout=60)
        assert (by_script.returncode, by_script.stdout) == (0, by_module.stdout)


def test_exit_codes_are_those_of_the_process() -> None:
    assert process("diff", OLD, FIXTURES / "resnet_new.pth").returncode == 1
    failed = process("inspect", FIXTURES / "bad" / "html.pth")
    assert (failed.returncode, failed.stdout) == (2, "")
    assert re.fullmatch(r"ckptool: error: .*html\.pth: .*\n", failed.stderr)


def listing_into_a_closed_pipe(saved: Saved) -> tuple[int, bytes]:
    shared = torch.zeros(1)
    path = saved({f"{'x' * 60}.{i:05}": shared for i in range(20_000)})
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-m", "ckptool", "inspect", "--keys", str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        child.stdout.readline()
        child.stdout.close()
        err = child.stderr.read()
    return child.returncode, err


def test_a_pipe_that_is_closed_early_is_quiet(saved: Saved) -> None:
    code, err = listing_into_a_closed_pipe(saved)
    assert code != 0
    assert err == b""


def test_a_closed_pipe_is_not_the_exit_code_of_an_answer(saved: Saved) -> None:
    assert listing_into_a_closed_pipe(saved)[0] == 141


ASKED = [
    ["inspect", OLD], ["inspect", OLD, "--json"], ["diff", OLD, FIXTURES / "resnet_new.pth"],
    ["diff", OLD, OLD, "--format", "github"], ["inspect", OLD, "--lock", "-"], ["inspect", "absent.pth", "--json"],
    ["--help"], ["diff", "--help"], ["--version"], ["--show-completion", "bash"],
]  # fmt: skip


EACH = """
import os, sys
import ckptool.cli.diff, ckptool.cli.filter, ckptool.cli.inspect, ckptool.saving  # once, not in each fork
from ckptool.cli import main
kept, codes = 2 if sys.argv[1] == "1" else 1, []
for number, line in enumerate(sys.stdin.read().splitlines()):
    if not os.fork():
        said = os.open(f"said{number}", os.O_WRONLY | os.O_CREAT)
        os.dup2(said, kept)
        os.close(said)
        sys.argv[1:] = eval(line)
        sys.exit(main())
    codes.append(os.waitstatus_to_exitcode(os.wait()[1]))
with open("codes", "w") as file:
    print(codes, file=file)
"""
"""An interpreter of which a stream is redirected from its start on: each command line runs and ends in a fork of it."""


def redirected(commands: list[list[Any]], stream: str) -> list[tuple[int, str]]:
    """Returns (exit code, what came out of the other stream) of command lines that have a stream such as 1>&-."""
    command = ["sh", "-c", f'exec "$0" -c "$@" {stream}', sys.executable, EACH, stream[0]]
    lines = "".join(f"{[str(word) for word in words]}\n" for words in commands)
    subprocess.run(command, input=lines, text=True, check=True)
    codes: list[int] = json.loads(Path("codes").read_text())
    return [(code, Path(f"said{number}").read_text()) for number, code in enumerate(codes)]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_an_answer_that_cannot_be_written_is_an_error_and_no_answer() -> None:
    for arguments, (code, err) in zip(ASKED, redirected(ASKED, "1> /dev/full"), strict=True):
        assert code == 2, arguments
        said = "ckptool: error: stdout: cannot be written: no space left on device"
        assert err.splitlines()[-1] == said, arguments
        assert "Traceback" not in err, arguments


@pytest.mark.parametrize("stream", ["1>&-", "2>&-", "2> /dev/full"])
def test_the_exit_code_is_the_same_where_a_stream_is_closed_or_nothing_can_be_said(stream: str) -> None:
    if "full" in stream and not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    new = FIXTURES / "resnet_new.pth"
    commands = {
        ("inspect", OLD): 0, ("diff", OLD, new): 1, ("diff", OLD, new, "-v"): 1, ("inspect", "absent.pth"): 2,
        ("filter", OLD, "--match", new, "-o", "out.pth"): 0, ("--help",): 0, ("inspect", OLD, "--no"): 2,
    }  # fmt: skip
    found = redirected([[*words] for words in commands], stream)
    assert [code for code, _ in found] == [*commands.values()]
    if stream[0] == "2":
        assert not any("error: " in out for _, out in found), "an error is not printed as an answer"


def test_names_that_the_terminals_encoding_lacks_are_no_traceback(saved: Saved) -> None:
    path = saved({"größe.重み": torch.zeros(1)})
    done = process("inspect", path, "--flat", env={**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"})
    assert "Traceback" not in done.stderr
    assert done.returncode == 0


@pytest.mark.skipif(sys.platform != "linux", reason="needs pseudo-terminals")
@pytest.mark.parametrize("no_color", [False, True])
def test_on_a_terminal_colours_come_from_us_and_never_from_names(no_color: bool, saved: Saved) -> None:
    import pty

    path, other = saved({"\x1b[31m[red]x": torch.zeros(1)}, "a.pth"), saved({"y": torch.zeros(1)}, "b.pth")
    reader, writer = pty.openpty()
    env = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR")}
    env |= {"TERM": "xterm"} | ({"NO_COLOR": "1"} if no_color else {})
    child = subprocess.Popen(
        [sys.executable, "-m", "ckptool", "diff", str(path), str(other)], stdout=writer, stderr=writer, env=env
    )
    assert child.wait(timeout=60) == 1
    os.close(writer)
    text = b""
    while True:
        try:
            piece = os.read(reader, 1 << 16)
        except OSError:
            break
        if not piece:
            break
        text += piece
    os.close(reader)
    shown = text.decode()
    assert r"\x1b[31m[red]x" in shown
    assert "\x1b[31m[red]" not in shown
    assert ("\x1b[" in shown) == (not no_color)


def test_an_interrupt_is_130_and_leaves_no_partial_file(sparse_dir: Path) -> None:
    source = write_sparse(sparse_dir / "source.pth", {f"w{i}": 1 << 27 for i in range(16)})
    child = subprocess.Popen(
        [sys.executable, "-m", "ckptool", "filter", str(source), "-o", str(sparse_dir / "out.pth")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while child.poll() is None and not any("partial" in name for name in os.listdir(sparse_dir)):
        time.sleep(0.002)  # a busy machine takes its time
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=60)
    assert (child.returncode, err) == (130, "ckptool: interrupted\n")
    assert os.listdir(sparse_dir) == ["source.pth"]


# --- every version of typer ------------------------------------------------------------------------------------------


def test_a_command_that_is_misspelt_names_the_one_that_is_meant(run: Run) -> None:
    assert "'inspct' (did you mean inspect?)" in run("inspct", OLD)[2]
    assert "(did you mean diff?)" in run("dif", OLD)[2]
    assert run("xyz")[2].startswith("ckptool: error: no such command 'xyz' (")


def test_a_file_name_need_not_be_utf_8(tmp_path: Path) -> None:
    shutil.copy(OLD, name := os.fsencode(tmp_path) + b"/\xff.pth")
    done = subprocess.run([sys.executable, "-m", "ckptool", "diff", name, os.fsencode(OLD)], capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")


# --- what it costs: resources, never seconds -------------------------------------------------------------------------

MEASURED = """
import os, resource, sys
def counted():
    with open("/proc/self/io") as file:
        return int(file.readline().split()[1])
import ckptool.cli.app, rich.console
before = counted()
from ckptool.cli import main
code = main(sys.argv[1:])
read = counted() - before
with open("/proc/self/status") as file:
    peak = next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))
print(code, read, peak * 1024, file=sys.stderr)
"""
# The peak is the process's own, from /proc: getrusage would count what pytest held before it forked.

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def measured(*args: object) -> tuple[int, int, int, str]:
    """(exit code, bytes read by read calls, peak resident bytes, stdout) of one command."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *map(str, args)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    code, read, peak = map(int, done.stderr.splitlines()[-1].split())
    return code, read, peak, done.stdout


@pytest.fixture
def sparse_dir() -> Iterator[Path]:
    """A directory on a disk, emptied at once: the tests' own is in memory, and what is reserved here is large."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def eight_gigabytes(last: int) -> dict[str, int]:
    sizes = {f"layers.{i}.weight": 1 << 27 for i in range(6)}
    return {"embed.weight": 5 << 28, **sizes, "head.weight": last}


@on_linux
@pytest.mark.parametrize("suffix", [".pth", pytest.param(".safetensors", marks=pytest.mark.slow)])
def test_inspect_and_diff_of_eight_gigabytes_read_under_4_mb_and_peak_under_60_mb(
    suffix: str, sparse_dir: Path
) -> None:
    one = write_sparse(sparse_dir / f"a{suffix}", eight_gigabytes(1000))
    other = write_sparse(sparse_dir / f"b{suffix}", eight_gigabytes(1001))
    assert one.stat().st_size > 8e9
    assert one.stat().st_blocks * 512 < 1e8, "the file system has no holes"
    for args, expected in (
        (["inspect", one, "--flat"], 0), (["diff", one, other], 1), (["diff", one, one], 0),
        (["filter", "--match", one, other, "-o", sparse_dir / "out.pth", "--dry-run"], 0),
    ):  # fmt: skip
        code, read, peak, out = measured(*args)
        assert code == expected
        assert out
        assert read < 4e6, f"{args[0]} read {read:,} bytes"
        assert peak < 60e6, f"{args[0]} took {peak:,} bytes"


@on_linux
@pytest.mark.parametrize(
    ("suffix", "unit"),
    [(".pth", 2_000_000), (".safetensors", 2_000_000), pytest.param(".pth", 6_000_000, marks=pytest.mark.slow)],
)
def test_filter_of_far_more_than_that_peaks_under_150_mb(suffix: str, unit: int, sparse_dir: Path) -> None:
    sizes = {"embed.weight": 15 * unit, "a.weight": 5 * unit, "b.weight": 3 * unit, "head.weight": 2 * unit}
    wanted = {**sizes, "head.weight": 2 * unit + 1}
    source, target = (
        write_sparse(sparse_dir / name, numbers)
        for name, numbers in ((f"source{suffix}", sizes), ("target.pth", wanted))
    )
    code, _, peak, _ = measured("filter", "--match", target, source, "-o", sparse_dir / f"out{suffix}")
    assert code == 0
    assert peak < 150e6, f"{peak:,} bytes"
    written = ckptool.open(sparse_dir / f"out{suffix}").state_dict()
    assert {key: info.shape for key, info in written.items()} == {key: (numel,) for key, numel in wanted.items()}
    assert (sparse_dir / f"out{suffix}").stat().st_size > 100 * unit


@on_linux
def test_comparing_values_of_160_mb_peaks_under_150_mb(sparse_dir: Path) -> None:
    one = write_sparse(sparse_dir / "a.pth", {"w": 40_000_000})
    other = write_sparse(sparse_dir / "b.safetensors", {"w": 40_000_000})
    with other.open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\x00\x00\x80\x3f")
    code, _, peak, out = measured("diff", one, other, "--values", "--json")
    assert (code, json.loads(out)["result"]["values"][0]["max_abs"]) == (1, 1.0)
    assert peak < 150e6, f"{peak:,} bytes"


def test_the_sparse_files_of_these_tests_are_what_torch_and_safetensors_read(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    sizes = {"a": 5 << 22, "b": 7}
    for name, load in (("s.pth", lambda path: torch.load(path, mmap=True)), ("s.safetensors", load_file)):
        loaded = load(write_sparse(tmp_path / name, sizes))
        assert {key: tensor.numel() for key, tensor in loaded.items()} == sizes
        assert not any(tensor.any() for tensor in loaded.values())
