"""Measures ckptool beside what a user would pick today and beside what the machine allows; prints one table.

Every run is a process of its own. README.md next to this file says what is measured, and how to read it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jobs
from measure import ENVIRONMENT, Bench, Run


def versions(names: Sequence[str], without: Sequence[str]) -> dict[str, str | None]:
    """The version of each package, None where it cannot be imported or is not wanted."""
    found: dict[str, str | None] = dict.fromkeys(names)
    for name in names:
        if name not in without:
            command = [sys.executable, "-c", f"import {name}; print({name}.__version__)"]
            run = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
            found[name] = run.stdout.strip() if run.returncode == 0 else None
    return found


def file_system(folder: Path) -> str:
    """The type of the file system a folder is on, where the system lists its mounts."""
    try:
        mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    except OSError:
        return "unknown"
    fits = [(len(where), kind) for where, kind in mounts if folder.resolve().is_relative_to(where)]
    return max(fits, default=(0, "unknown"))[1]


HEAD = ("job", "size", "ckptool s", "peak MB", "today", "s", "ratio", "limit", "s", "ratio")


def lines(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """The cells of the table. A ratio is ckptool's time by the other's: below 1 ckptool is the faster one.

    Behind a figure stands its goal, where it has one: 0.04 (0.05) is reached, 0.06 (0.05) is not.
    """

    def of(other: Mapping[str, Any], goal: float | None) -> list[str]:
        if "skipped" in other:
            return [f"{other['name']}: {other['skipped']}", "-", "-"]
        seconds, ratio = other["median"], other["ratio"]
        return [
            other["name"],
            f"{seconds:.{2 if seconds >= 0.1 else 3}f}",
            _with(f"{ratio:.{2 + (ratio < 0.1)}f}", goal),
        ]

    found: list[tuple[str, ...]] = []
    for row in rows:
        ours, goal = row["ckptool"], row["goal"]
        spread = f"{ours['median']:.3f} [{ours['min']:.3f}-{ours['max']:.3f}]"
        peers = [of(peer, goal["peer"]) for peer in row["peers"]] or [["", "", ""]]
        limit, peak = of(row["limit"], goal["limit"]), _with(f"{ours['peak'] / 1e6:.0f}", goal["peak"])
        found.append((row["job"], row["size"], spread, peak, *peers[0], *limit))
        found += [("", "", "", "", *peer, "", "", "") for peer in peers[1:]]
    return found


def _with(figure: str, goal: float | None) -> str:
    return figure if goal is None else f"{figure} ({goal:g})"


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Plain aligned text."""
    cells = [HEAD, *lines(rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    left = (0, 1, 4, 7)
    return "\n".join(
        "  ".join(
            f"{cell:<{width}}" if column in left else f"{cell:>{width}}"
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    )


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The same for a README."""
    marked = [HEAD, ("---",) * len(HEAD), *lines(rows)]
    return "\n".join(f"| {' | '.join(cell.strip() for cell in line)} |" for line in marked)


def main() -> None:
    """Makes the inputs, measures, prints the table, and removes everything but the JSON."""
    parser = argparse.ArgumentParser(description="ckptool beside today's tools and the limits of the machine.")
    parser.add_argument("--full", action="store_true", help="4 GB, 100,000 keys, 5 rounds; needs 13 GB of disk")
    parser.add_argument("--mb", type=int, help="megabytes of the large model (256)")
    parser.add_argument("--keys", type=int, help="keys of the many small tensors (20,000)")
    parser.add_argument("--rounds", type=int, help="how often everything runs (1)")
    parser.add_argument("--dir", help="where the files go: on the disk that matters (the system's temporary one)")
    parser.add_argument("--without", action="append", default=[], metavar="NAME", help="do without a package")
    parser.add_argument("--only", default="", metavar="REGEX", help="only jobs whose name or size it is found in")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures too")
    parser.add_argument("--markdown", action="store_true", help="print the table for a README")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    nbytes = (arguments.mb or (4000 if arguments.full else 256)) * 10**6
    keys = arguments.keys or (100_000 if arguments.full else 20_000)
    rounds = arguments.rounds or (5 if arguments.full else 1)
    packages = versions(["ckptool", "torch", "safetensors", "numpy"], arguments.without)
    missing = {name: f"{name} is not there" for name, version in packages.items() if version is None}
    affinity = getattr(os, "sched_getaffinity", None)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with tempfile.TemporaryDirectory(prefix="ckptool-bench-", dir=arguments.dir) as name:
        folder = Path(name)
        if shutil.disk_usage(folder).free < (need := 3.2 * nbytes + 4000 * keys):
            raise SystemExit(f"needs {need / 1e9:.1f} GB of free disk: name another place with --dir")
        bench = Bench(folder, rounds, missing, arguments.only)
        floor = bench.measure(["true"])
        machine = {
            "system": f"{os.uname().sysname} {os.uname().machine}",
            "cores": len(affinity(0)) if affinity else os.cpu_count(),
            "memory": memory,
            "file system": file_system(folder),
            "python": ".".join(map(str, sys.version_info[:3])),
            **packages,
        }
        jobs.run(bench, nbytes, keys)
    lowest = floor.peak if isinstance(floor, Run) else 0
    report = {"machine": machine, "rounds": rounds, "lowest peak": lowest, "rows": bench.rows}
    shown = {**machine, "memory": f"{memory / 1e9:.0f} GB"}
    print(markdown(bench.rows) if arguments.markdown else table(bench.rows))
    print()
    print("; ".join(f"{key} {value or 'not there'}" for key, value in shown.items()))
    print(f"Whole processes, in turn, {rounds} times: median [min-max]. The inputs are read before every run, so that")
    print("they are in the cache; before a cold one they are taken out of it (POSIX_FADV_DONTNEED).")
    print("A ratio is the median of ckptool's time by the other's, pair by pair: below 1, ckptool is the faster one.")
    print("Behind a figure stands the goal, where it has one.")
    print(f"A peak below {lowest / 1e6:.0f} MB cannot be told: that much is the runner's own.")
    if memory < 3 * nbytes:
        print("The files do not all fit into memory: the cache was not warm all the time.")
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
