"""Runs commands in turn, as processes of their own, and keeps what they took.

Nothing heavy is imported here: Linux counts the peak memory of the process that spawns into that of the child
(the high-water mark of the old image survives exec), so this one has to stay smaller than all it measures.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from peers import Other

ROOT = Path(__file__).resolve().parents[1]
# That of the user, with this checkout first on the path and compiled files kept.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
ENVIRONMENT["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


class Run(NamedTuple):
    """One process: seconds by the clock, seconds of processor (user + system), peak bytes resident."""

    wall: float
    cpu: float
    peak: int


class Input(NamedTuple):
    """A file that commands read: where it is to be, and what `inputs.py` is told to make it."""

    path: Path
    kind: str
    number: int


class Goal(NamedTuple):
    """What ckptool means to reach at most: its time by that of today's way and of the limit, and peak megabytes."""

    peer: float | None = None
    limit: float | None = None
    peak: int | None = None


NO_GOAL = Goal()


class Bench:
    """Runs groups of commands in turn, in ``folder``, and keeps the rows of the table.

    Of the jobs only those run whose name matches ``only``. A package in ``missing`` is not there, and why.
    """

    def __init__(self, folder: Path, rounds: int, missing: Mapping[str, str], only: str = "") -> None:
        self.folder = folder
        self.rounds = rounds
        self.missing = missing
        self.only = re.compile(only)
        self.rows: list[dict[str, Any]] = []
        self.outputs = folder / "out"

    def make(self, input: Input) -> None:
        """Makes an input, unless it is there. Raises: OSError, CalledProcessError."""
        if not input.path.exists():
            command = [sys.executable, str(ROOT / "bench" / "inputs.py"), *map(str, input)]
            subprocess.run(command, env=ENVIRONMENT, check=True)

    def settle(self, inputs: Sequence[Path], cold: bool, writes: bool) -> None:
        """Waits for the disk, and puts the inputs into the cache, or takes them out of it.

        Of what ``writes``, the memory that takes the output is touched: a virtual machine hands freed memory back to
        its host, and to get it again costs more than the copying (2 us for each page, by chance or not).
        """
        os.sync()
        if writes:
            room = max(path.stat().st_size for path in inputs) * 5 // 4
            subprocess.run([sys.executable, "-c", f"bytearray(b'x') * {room}"], check=True)
        for path in inputs:
            with path.open("rb", buffering=0) as file:
                if cold:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                    continue
                buffer = bytearray(1 << 20)
                while file.readinto(buffer):
                    pass

    def measure(self, command: Sequence[str]) -> Run | str:
        """One process from start to end, into an empty folder; the end of what it said where it failed."""
        self.outputs.mkdir()
        log = self.folder / "stderr"
        redirect = [
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
            (os.POSIX_SPAWN_OPEN, 2, str(log), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600),
        ]
        start = time.perf_counter()
        # A group of its own, so that an interrupt ends the shell's children too.
        pid = os.posix_spawnp(command[0], list(command), ENVIRONMENT, file_actions=redirect, setpgroup=0)
        try:
            _, status, usage = os.wait4(pid, 0)
            wall = time.perf_counter() - start
        except BaseException:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise
        finally:
            # The next run starts without this one's output, and without its dirty pages.
            shutil.rmtree(self.outputs)
        if code := os.waitstatus_to_exitcode(status):
            lines = log.read_text(errors="replace").strip().splitlines() or ["nothing said"]
            return f"exit {code}: {lines[-1]}"
        peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return Run(wall, usage.ru_utime + usage.ru_stime, peak)

    def group(
        self,
        size: str,
        ours: Mapping[str, list[str]],
        peers: Sequence[Other],
        limit: Other,
        inputs: Sequence[Input] = (),
        goal: Goal = NO_GOAL,
        cold: bool = False,
    ) -> None:
        """Runs ckptool's ways to do a job, those of today, and the limit in turn; a row for each of the first.

        ``goal`` is that of the first; the others show how much of it is due to what.
        """
        if not any(self.only.search(f"{name} {size}") for name in ours):
            return
        print(f"{', '.join(map(str.strip, ours))}: {size}{' (cold)' * cold}", file=sys.stderr, flush=True)
        others = {**{f"peer {number}": peer for number, peer in enumerate(peers)}, "limit": limit}
        skipped = {role: self.missing[name] for role, o in others.items() for name in o.needs if name in self.missing}
        commands = dict(ours) | {role: other.command for role, other in others.items()}
        runs: dict[str, list[Run]] = {name: [] for name in commands}
        for input in inputs:
            self.make(input)
        # Round -1 is not counted, and ckptool's alone: what it imports is compiled and in the cache from then on.
        for number in range(-1, self.rounds):
            for name, command in commands.items():
                if name in skipped or (number < 0 and name not in ours):
                    continue
                self.settle([input.path for input in inputs], cold, limit.writes)
                run = self.measure(command)
                if isinstance(run, Run):
                    runs[name] += [run] if number >= 0 else []
                elif name in ours:
                    raise SystemExit(f"ckptool failed at {name.strip()}, {size}: {run}")
                else:
                    skipped[name] = run
        first = next(iter(ours))
        for name in ours:
            found: dict[str, Any] = {}
            for role, other in others.items():
                found[role] = {"name": other.name}
                if role in skipped:
                    found[role]["skipped"] = skipped[role]
                    continue
                # Pair by pair, so that what slows the machine for a while slows both sides of a ratio.
                ratios = [ours.wall / theirs.wall for ours, theirs in zip(runs[name], runs[role], strict=True)]
                found[role] |= {**summary(runs[role]), "ratio": statistics.median(ratios), "ratios": ratios}
            row: dict[str, Any] = {"job": name, "size": size, "cache": "cold" if cold else "warm"}
            row |= {"ckptool": summary(runs[name]), "goal": (goal if name == first else NO_GOAL)._asdict()}
            self.rows.append({**row, "limit": found.pop("limit"), "peers": list(found.values())})


def summary(runs: Sequence[Run]) -> dict[str, Any]:
    """The figures of one command."""
    wall, cpu, peak = (list(column) for column in zip(*runs, strict=True))
    median = statistics.median(wall)
    return {"median": median, "min": min(wall), "max": max(wall), "peak": max(peak), "wall": wall, "cpu": cpu}
