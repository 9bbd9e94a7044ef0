"""Runs of ckptool that are killed at every call to the system, at any time, or all at once; `make soak`.

    python tests/soak.py points CASE SIGNALS STEP   one case, ended before each of its calls in turn, or some of them
    python tests/soak.py times CASE SECONDS         one case, killed after times drawn at random
    python tests/soak.py meets CASE STEP            one case, in which another run goes to its end before each call
    python tests/soak.py together CASE ROUNDS       one case, by several processes at once
    python tests/soak.py all SECONDS                everything, in about so many seconds (at least a minute)
    python tests/soak.py serve                      what the lines of stdin say, each as above, in a fork

After each: the old file or the new, whole, and beside it nothing but leftovers by their name, which the next run
removes. A signal that can be caught leaves none. torch is not imported: every run is a fork of this process.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ckptool
from ckptool.cli import main
from ckptool.directories import place, sharded
from ckptool.directories.names import DCP
from ckptool.io.leftovers import PARTIAL

CALLS = ("open", "close", "pwrite", "ftruncate", "posix_fallocate", "fchmod", "fsync", "fdatasync", "link", "rename",
         "replace", "unlink", "mkdir", "rmdir")  # fmt: skip
"""What can change the disk, or what is known of it, as far as ckptool does it."""

LOOKS = ("stat", "lstat", "readlink", "listdir", "scandir")
"""What tells of the disk: between two of them, another run may do all that it does."""

Content = dict[str, bytes]


class Case(NamedTuple):
    """A command, and what its output was before: nothing, or what the same command made of another source."""

    args: tuple[str, ...]
    output: str
    replaces: tuple[str, ...] | None = None


CASES = {
    "new": Case(("-o", "o.safetensors"), "o.safetensors"),
    "over": Case(("-o", "o.safetensors", "--force"), "o.safetensors", ("-o", "o.safetensors")),
    "torch": Case(("-o", "o.pth", "--force"), "o.pth", ("-o", "o.pth")),
    "shards": Case(("-o", "d", "--to", "sharded", "--max-shard-size", "3000"), "d"),
    "shards-over": Case(
        ("-o", "d", "--to", "sharded", "--max-shard-size", "3000", "--force"), "d",
        ("-o", "d", "--to", "sharded", "--max-shard-size", "3000"),
    ),
    "fewer-shards": Case(
        ("-o", "d", "--to", "sharded", "--max-shard-size", "5000", "--force"), "d",
        ("-o", "d", "--to", "sharded", "--max-shard-size", "3000"),
    ),
    "dcp": Case(("-o", "d", "--to", "dcp", "--max-shard-size", "3000"), "d"),
    "dcp-over": Case(
        ("-o", "d", "--to", "dcp", "--max-shard-size", "5000", "--force"), "d",
        ("-o", "d", "--to", "dcp", "--max-shard-size", "3000"),
    ),
}  # fmt: skip

INDEXES = {sharded.MODEL.index, DCP.index}
"""Without one of these a directory is not whole."""


def content(path: str) -> Content:
    """Returns {name: bytes} of a file, or of all in a directory."""
    if os.path.isdir(path):
        return {name: Path(path, name).read_bytes() for name in os.listdir(path)}
    return {os.path.basename(path): Path(path).read_bytes()} if os.path.exists(path) else {}


def child(args: tuple[str, ...], prepare: Callable[[], None] | None = None, said: str = "said") -> int:
    """Runs a command line in a fork; returns the fork's process id. What it says is in a file."""
    process = os.fork()
    if process:
        return process
    code = 99
    try:
        log = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.stdout, sys.stderr = (os.fdopen(fd, "w", 1, closefd=False) for fd in (1, 2))  # pytest has its own
        if prepare is not None:
            prepare()
        code = main(args)
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def wait(process: int) -> int:
    """Returns how a fork ended: its exit code, or minus the signal."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def run(*args: str) -> None:
    code = wait(child(("convert", *args)))
    assert code == 0, Path("said").read_text()


def ends_at(point: int, number: int) -> Callable[[], None]:
    """Returns what has a process send itself a signal before its so-manieth call to the system."""
    return before(point, CALLS, lambda: os.kill(os.getpid(), number))


def before(point: int, calls: tuple[str, ...], then: Callable[[], None]) -> Callable[[], None]:
    """Returns what has a process do something before its so-manieth of some calls to the system."""

    def prepare() -> None:
        count = 0

        def counting(call: Callable[..., Any]) -> Callable[..., Any]:
            def called(*args: Any, **options: Any) -> Any:
                nonlocal count
                count += 1
                if count == point:
                    then()
                return call(*args, **options)

            return called

        for name in calls:
            setattr(os, name, counting(getattr(os, name)))

    return prepare


class Bench:
    """A directory with two sources, and what a case makes of each."""

    def __init__(self, case: Case, nbytes: int) -> None:
        self.case = case
        for seed in (1, 2):
            noise = random.Random(seed)
            tensors = [(f"t{number}", noise.randbytes(nbytes // 4)) for number in range(4)]
            _write_safetensors(f"{seed}.safetensors", tensors)
        self.old = self.made("1.safetensors", case.replaces) if case.replaces else {}
        self.new = self.made("2.safetensors", case.args)
        self.other: Content = {}
        self.inputs = content("1.safetensors") | content("2.safetensors")

    def made(self, source: str, args: tuple[str, ...]) -> Content:
        run(source, *args)
        found = content(self.case.output)
        self.clear()
        return found

    def clear(self) -> None:
        if os.path.isdir(self.case.output):
            shutil.rmtree(self.case.output)
        elif os.path.exists(self.case.output):
            os.unlink(self.case.output)

    def begin(self) -> None:
        """Puts the old output where it was; leftovers stay."""
        self.clear()
        if self.case.output == "d" and self.old:
            os.mkdir("d")
        for name, data in self.old.items():
            Path("d" if self.case.output == "d" else ".", name).write_bytes(data)

    def start(self, prepare: Callable[[], None] | None = None) -> int:
        return child(("convert", "2.safetensors", *self.case.args), prepare)

    def leftovers(self) -> list[str]:
        names = [*os.listdir("."), *(os.listdir("d") if os.path.isdir("d") else [])]
        return [name for name in names if PARTIAL.fullmatch(name)]

    def check(self, *, clean: bool) -> str:
        """Checks all there is; returns "old", "new", or "between" for shards that nobody reads before the next run."""
        assert content("1.safetensors") | content("2.safetensors") == self.inputs
        known = {"1.safetensors", "2.safetensors", "said", "said too", self.case.output}
        assert {name for name in os.listdir(".") if not PARTIAL.fullmatch(name)} <= known
        assert not (clean and self.leftovers()), self.leftovers()
        there = {name: data for name, data in content(self.case.output).items() if not PARTIAL.fullmatch(name)}
        if there == self.new:
            return "new"
        if there == self.old:
            return "old"
        assert self.case.output == "d", "neither the old file nor the new"
        if INDEXES & there.keys():  # files of the other set may lie beside
            wholes = [whole for whole in (self.new, self.old, self.other) if whole and whole.items() <= there.items()]
            assert wholes, "old and new shards under one index"
            return "new" if wholes[0] is self.new else "old"
        assert not clean
        return "between"

    def recover(self) -> None:
        """Checks that the next run makes it whole: first what it does before it begins, then all of it."""
        if self.case.output == "d":
            place.recover("d")
            assert self.check(clean=True) in ("old", "new")
        over = ["--force"] if content(self.case.output) and "--force" not in self.case.args else []
        run("2.safetensors", *self.case.args, *over)
        assert self.check(clean=True) == "new"


def _write_safetensors(path: str, tensors: list[tuple[str, bytes]]) -> None:
    import json

    header: dict[str, Any] = {}
    end = 0
    for name, data in tensors:
        header[name] = {"dtype": "U8", "shape": [len(data)], "data_offsets": [end, end + len(data)]}
        end += len(data)
    text = json.dumps(header).encode()
    Path(path).write_bytes(len(text).to_bytes(8, "little") + text + b"".join(data for _, data in tensors))


def points(name: str, numbers: list[int], step: int = 1) -> dict[str, int]:
    """Ends a case before each of its calls to the system in turn (or every so-manieth, from one drawn at random).

    By the signals in turn, so that all must be ones that can be caught, or none.

    Returns how often it was old, new and between.
    """
    seen = {"old": 0, "new": 0, "between": 0}
    bench = Bench(CASES[name], 10_000)
    for point in range(random.randint(1, step), 2000, step):
        number = numbers[point // step % len(numbers)]
        bench.begin()
        code = wait(bench.start(ends_at(point, number)))
        if code == 0 and number == signal.SIGKILL:
            assert point > 20
            return seen
        if number == signal.SIGKILL:
            assert code == -number, Path("said").read_text()
        else:
            assert "Traceback" not in Path("said").read_text(), Path("said").read_text()
        seen[bench.check(clean=number != signal.SIGKILL)] += 1
        if code == 0:
            return seen
        ends = {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}
        assert code == ends[signal.Signals(number)], (point, code, Path("said").read_text())
        if number == signal.SIGKILL:
            bench.recover()
    raise AssertionError("no end")


def times(name: str, seconds: float, nbytes: int = 20_000_000) -> dict[str, int]:
    """Kills a case after times drawn at random, for so long; returns how often it was old, new and between."""
    seen = {"old": 0, "new": 0, "between": 0}
    bench = Bench(_large(CASES[name], nbytes), nbytes)
    bench.begin()
    before = time.monotonic()
    wait(bench.start())
    took = time.monotonic() - before
    end = before + seconds
    draw = random.Random()
    while time.monotonic() < end:
        bench.begin()
        process = bench.start()
        time.sleep(draw.random() * took)
        number = draw.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
        os.kill(process, number)
        code = wait(process)
        seen[bench.check(clean=False)] += 1
        if number == signal.SIGKILL or code < 0:  # it may not have begun to mind
            bench.recover()
        else:
            bench.check(clean=True)
    return seen


def _large(case: Case, nbytes: int) -> Case:
    def scaled(args: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(str(int(arg) * nbytes // 10_000) if arg.isdigit() else arg for arg in args)

    return Case(scaled(case.args), case.output, scaled(case.replaces) if case.replaces else None)


def together(name: str, rounds: int, writers: int = 4) -> dict[str, int]:
    """Has several runs write one output at once, some of them killed: one wins whole, and in the end nothing lies."""
    seen: dict[str, int] = {}
    bench = Bench(CASES[name], 10_000)
    bench.other = bench.made("1.safetensors", bench.case.args)
    draw = random.Random()
    for _ in range(rounds):
        bench.begin()
        processes = [
            child(("convert", f"{1 + number % 2}.safetensors", *bench.case.args), lambda: None)
            for number in range(writers)
        ]
        if draw.random() < 0.3:
            time.sleep(draw.random() * 0.05)
            os.kill(processes[0], signal.SIGKILL)
        codes = [wait(process) for process in processes]
        assert all(code in (0, 2, -signal.SIGKILL) for code in codes), (codes, Path("said").read_text())
        there = {key: data for key, data in content(bench.case.output).items() if not PARTIAL.fullmatch(key)}
        if bench.case.output == "d" and not INDEXES & there.keys():
            assert -signal.SIGKILL in codes
        elif 0 in codes:
            wholes = [whole for whole in (bench.new, bench.other) if whole.items() <= there.items()]
            assert len(wholes) == 1, codes
            if "--force" in bench.case.args and -signal.SIGKILL not in codes:
                assert codes == [0] * writers, Path("said").read_text()
        seen["".join(sorted({"won" if code == 0 else "lost" for code in codes}))] = 1
        bench.recover()
    return seen


class Meeting:
    """Two runs: the second begins when the first says so, which then waits until that ends or waits for a lock."""

    NEVER = 77
    """The exit code of a second run that was not told to begin."""

    def __init__(self) -> None:
        self.begin, self.go = os.pipe()
        self.done, self.back = os.pipe()

    def first(self) -> None:
        os.close(self.begin)
        os.close(self.back)

    def pause(self) -> None:
        os.write(self.go, b"x")
        os.read(self.done, 1)

    def second(self) -> None:
        import fcntl

        flock = fcntl.flock

        def telling(fd: int, operation: int) -> None:
            try:
                flock(fd, operation | fcntl.LOCK_NB)
            except BlockingIOError:
                if operation & fcntl.LOCK_NB:
                    raise
                os.write(self.back, b"x")
                flock(fd, operation)

        fcntl.flock = telling
        os.close(self.go)
        os.close(self.done)
        if not os.read(self.begin, 1):
            sys.exit(self.NEVER)

    def close(self) -> None:
        for fd in (self.begin, self.go, self.done, self.back):
            os.close(fd)


def meets(name: str, step: int = 1) -> dict[str, int]:
    """Has another run go to its end (or to where it waits) before each call of a first, sometimes after a killed one.

    Returns how often which of them won.
    """
    seen = {"first": 0, "second": 0}
    bench = Bench(CASES[name], 10_000)
    bench.other = bench.made("1.safetensors", bench.case.args)
    draw = random.Random()
    for point in range(draw.randint(1, step), 5000, step):
        bench.begin()
        if draw.random() < 0.3:
            wait(bench.start(ends_at(draw.randint(1, 150), signal.SIGKILL)))
            if bench.new.items() <= content(bench.case.output).items():
                bench.begin()
        meeting = Meeting()
        pausing = before(point, CALLS + LOOKS, meeting.pause)
        first = bench.start(lambda: (meeting.first(), pausing()))  # noqa: B023
        second = child(("convert", "1.safetensors", *bench.case.args), meeting.second, "said too")
        meeting.close()
        codes = [wait(first), wait(second)]
        said = (point, codes, Path("said").read_text(), Path("said too").read_text())
        if codes[1] == Meeting.NEVER:
            assert point > 20
            return seen
        assert all(code in ((0,) if "--force" in bench.case.args else (0, 2)) for code in codes), said
        assert 0 in codes, said
        assert not bench.leftovers(), said
        there = content(bench.case.output)
        wholes = [whole for whole in (bench.new, bench.other) if whole.items() <= there.items()]
        assert len(wholes) == 1, said
        seen["first" if wholes[0] is bench.new else "second"] += 1
    raise AssertionError("no end")


def everything(seconds: float) -> None:
    jobs: list[tuple[str, Callable[[], dict[str, int]]]] = []
    for name in CASES:
        for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT):
            jobs.append((f"points {name} {number.name}", lambda name=name, number=number: points(name, [number])))  # type: ignore[misc]
        jobs.append((f"meets {name}", lambda name=name: meets(name)))  # type: ignore[misc]
        jobs.append((f"together {name}", lambda name=name: together(name, 30)))  # type: ignore[misc]
    begun = time.monotonic()
    for title, job in jobs:
        print(title, isolated(job), flush=True)
    share = max(2.0, (seconds - (time.monotonic() - begun)) / len(CASES))
    for name in CASES:
        print(f"times {name}", isolated(lambda name=name: times(name, share)), flush=True)  # type: ignore[misc]


def isolated(job: Callable[[], dict[str, int]]) -> dict[str, int]:
    """Does something in an empty directory, which goes if all went well."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # fsync takes long on a disk, and changes nothing
    directory = tempfile.mkdtemp(prefix="ckptool-soak-", dir=memory)
    os.chdir(directory)
    _write_safetensors("warm.safetensors", [("t", b"\0" * 10)])
    for args in (("-o", "warm.pth"), ("-o", "warm", "--to", "sharded"), ("-o", "warm.npz")):
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            assert main(["convert", "warm.safetensors", *args]) == 0  # imports what forks would import
    for name in ("warm.safetensors", "warm.pth", "warm.npz"):
        os.unlink(name)
    shutil.rmtree("warm")
    found = job()
    os.chdir("/")
    shutil.rmtree(directory)
    return found


def main_of(args: list[str]) -> None:
    what = args[0]
    if what == "points":
        numbers = [int(signal.Signals[name]) for name in args[2].split(",")]
        print(isolated(lambda: points(args[1], numbers, int(args[3]))))
    elif what == "times":
        print(isolated(lambda: times(args[1], float(args[2]))))
    elif what == "meets":
        print(isolated(lambda: meets(args[1], int(args[2]))))
    elif what == "together":
        print(isolated(lambda: together(args[1], int(args[2]))))
    elif what == "serve":
        serve()
    else:
        everything(float(args[1]))


def serve() -> None:
    """Does what each line of stdin says, in a fork, so that Python starts once; ends each answer with its exit code."""
    isolated(dict)
    for line in sys.stdin:
        process = os.fork()
        if not process:
            signal.alarm(100)
            try:
                main_of(line.split())
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            finally:
                sys.stdout.flush()
            os._exit(0)
        print("end", wait(process), flush=True)


if __name__ == "__main__":
    ckptool.open  # noqa: B018  (imports what a command imports, once)
    main_of(sys.argv[1:])
