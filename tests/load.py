"""``make load``: what is too large for the suite, each with the seconds and the memory it may take.

    python tests/load.py [NAME ...]      prints what each command took; exits 1 if one is beyond its bounds

A command runs in a process of its own. Seconds are generous, and for a machine that does nothing else.
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]

Job = tuple[list[str], int, int, int]
"""Arguments, the exit code, the seconds and the peak MB that it may take."""

MEASURED = """
import sys
from ckptool.cli import main
code = main(sys.argv[1:])
with open("/proc/self/status") as file:
    print(next(line.split()[1] for line in file if line.startswith("VmHWM")), file=sys.stderr)
sys.exit(code)
"""


def safetensors(path: str, names: list[str]) -> None:
    """Writes one float per name."""
    header = {name: {"dtype": "F32", "shape": [1], "data_offsets": [4 * i, 4 * i + 4]} for i, name in enumerate(names)}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    Path(path).write_bytes(struct.pack("<Q", len(encoded)) + encoded + bytes(4 * len(names)))


def a_million_keys() -> Iterator[Job]:
    safetensors("a.safetensors", [f"l.{i}.w" for i in range(1_000_000)])
    yield ["inspect", "a.safetensors"], 0, 90, 3000
    yield ["inspect", "a.safetensors", "--json"], 0, 90, 4000
    yield ["inspect", "a.safetensors", "--check"], 0, 180, 4000
    yield ["remap", "a.safetensors", "--add-prefix", "m.", "-o", "b.safetensors"], 0, 180, 5000
    yield ["convert", "a.safetensors", "-o", "a.pth", "--no-verify"], 0, 240, 5000
    yield ["inspect", "a.pth"], 0, 90, 3000
    yield ["inspect", "a.pth", "--json"], 0, 90, 4000
    yield ["diff", "a.safetensors", "a.pth"], 0, 120, 5000
    yield ["remap", "a.pth", "--add-prefix", "m.", "-o", "b.pth"], 0, 180, 5000
    yield ["convert", "a.pth", "-o", "c.safetensors", "--no-verify"], 0, 240, 5000


def ten_thousand_shards() -> Iterator[Job]:
    weight_map = {}
    for number in range(10_000):
        name = f"model-{number + 1:05}-of-10000.safetensors"
        safetensors(name, [f"layers.{number}.w", f"layers.{number}.b"])
        weight_map |= {f"layers.{number}.{end}": name for end in "wb"}
    Path("model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    yield ["inspect", "."], 0, 30, 200
    yield ["inspect", ".", "--check", "--hash"], 0, 60, 300
    yield ["convert", ".", "-o", "whole.safetensors"], 0, 60, 300
    yield ["convert", "whole.safetensors", "--to", "sharded", "--max-shard-size", "8", "-o", "again"], 0, 180, 400


def two_thousand_inputs() -> Iterator[Job]:
    names = [f"{number}.safetensors" for number in range(2000)]
    for name in names:
        safetensors(name, ["w", "b"])
    yield ["inspect", *names], 0, 30, 200
    yield ["convert", *names, "--to", "torch", "--no-fsync"], 0, 120, 200
    yield ["filter", *names, "-o", "out.safetensors"], 0, 60, 400


def a_terabyte() -> Iterator[Job]:
    with open("a.safetensors", "wb") as file:
        header = json.dumps({"w": {"dtype": "F32", "shape": [1 << 38], "data_offsets": [0, 1 << 40]}}).encode()
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + (1 << 40))
    yield ["inspect", "a.safetensors"], 0, 3, 100
    yield ["diff", "a.safetensors", "a.safetensors"], 0, 3, 100
    if os.statvfs(".").f_bavail * os.statvfs(".").f_frsize < 1 << 40:
        yield ["remap", "a.safetensors", "--add-prefix", "m.", "-o", "b.safetensors"], 2, 3, 100  # no room, at once


def pickled(path: str, body: bytes) -> None:
    """Writes a torch file of one pickle, which needs no tensor to be refused."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + body + b".")


def beyond_the_limits() -> Iterator[Job]:
    """Names and nesting that no model has: the limit is said, at once."""
    safetensors("key.safetensors", ["k" * 1_000_000])
    pickled("key.pth", b"}X" + struct.pack("<I", 1_000_000) + b"k" * 1_000_000 + b"K\0s")
    pickled("lists.pth", b"]" * 10_000 + b"a" * 9_999)
    pickled("dicts.pth", b"}" + b"K\0}" * 9_999 + b"s" * 9_999)
    pickled("tuples.pth", b")" + b"\x85" * 9_999)
    for name in ("key.safetensors", "key.pth", "lists.pth", "dicts.pth", "tuples.pth"):
        yield ["inspect", name], 2, 3, 100
        yield ["convert", name, "-o", "out.safetensors"], 2, 3, 100
        yield ["diff", name, name], 2, 3, 100


JOBS: dict[str, Callable[[], Iterator[Job]]] = {
    "keys": a_million_keys,
    "shards": ten_thousand_shards,
    "inputs": two_thousand_inputs,
    "terabyte": a_terabyte,
    "limits": beyond_the_limits,
}


def measured(job: Job) -> bool:
    """Runs one command and prints what it took; returns whether that is within its bounds."""
    args, expected, seconds, megabytes = job
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *args], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    took, lines = time.monotonic() - begin, done.stderr.splitlines()
    peak = int(lines[-1]) / 1000 if lines and lines[-1].isdigit() else float("inf")
    fine = done.returncode == expected and took <= seconds and peak <= megabytes
    shown = " ".join(args[:3] + ["..."] * (len(args) > 4) + args[-2:]) if len(args) > 5 else " ".join(args)
    print(f"{'ok  ' if fine else 'FAIL'} {took:7.1f} s {peak:7.0f} MB  exit {done.returncode}  {shown}", flush=True)
    if not fine:
        print("\n".join(lines[-5:]))
    return fine


def main(names: list[str]) -> int:
    """Runs the jobs so named, or all; returns 1 if one of them is beyond its bounds."""
    fine = True
    for name in names or JOBS:
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            print(name)
            for job in JOBS[name]():
                fine = measured(job) and fine
            os.chdir(REPOSITORY)
    return int(not fine)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
