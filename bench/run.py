"""Measures ckptool beside what a user would pick today and beside what the machine allows; prints one table.

Every run is a process of its own. README.md next to this file says what is measured, and how to read it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

# Nothing heavy is imported here: Linux counts the peak memory of the process that spawns into that of the child
# (the high-water mark of the old image survives exec), so this one has to stay smaller than all it measures.

ROOT = Path(__file__).resolve().parents[1]
# That of the user, with this checkout first on the path and compiled files kept.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
ENVIRONMENT["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
LAYERS = 32


class Run(NamedTuple):
    """One process: seconds by the clock, seconds of processor (user + system), peak bytes resident."""

    wall: float
    cpu: float
    peak: int


class Other(NamedTuple):
    """Something to measure against: its name in the table, the packages it needs, and its command."""

    name: str
    needs: tuple[str, ...]
    command: list[str]


def python(name: str, code: str, *arguments: Path | str, needs: Sequence[str] = ("torch",)) -> Other:
    """A script as a process of its own; the arguments are the sources and then the output."""
    return Other(name, tuple(needs), [sys.executable, "-c", code, *map(str, arguments)])


def system(name: str, *command: object) -> Other:
    """A program that every system has."""
    return Other(name, (), [str(part) for part in command])


def copy(source: Path, output: Path) -> Other:
    """The limit of a job that writes: a copy that is on disk when it ends, as ckptool's is."""
    return Other("cp + sync", (), ["sh", "-c", 'cp "$0" "$1" && sync "$1"', str(source), str(output)])


PASS = python("python -c pass", "pass", needs=())

LIST_TORCH = """
import sys, torch
for key, tensor in torch.load(sys.argv[1], mmap=True, weights_only=True).items():
    print(key, tensor.dtype, tuple(tensor.shape))
"""
LIST_SAFETENSORS = """
import sys
from safetensors import safe_open
with safe_open(sys.argv[1], "numpy") as file:
    for key in file.keys():
        view = file.get_slice(key)
        print(key, view.get_dtype(), view.get_shape())
"""
DIFF_TORCH = """
import sys, torch
a, b = (torch.load(name, mmap=True, weights_only=True) for name in sys.argv[1:3])
print(a.keys() == b.keys(), [key for key in a if a[key].shape != b[key].shape or a[key].dtype != b[key].dtype])
"""
EQUAL_TORCH = """
import sys, torch
a, b = (torch.load(name, mmap=True, weights_only=True) for name in sys.argv[1:3])
print(all(torch.equal(a[key], b[key]) for key in a))
"""
APART_TORCH = """
import sys, torch
a, b = (torch.load(name, mmap=True, weights_only=True) for name in sys.argv[1:3])
for key in a:
    one, gap = a[key].float(), a[key].float() - b[key].float()
    print(key, gap.abs().max().item(), (gap.norm() / one.norm()).item())
"""
STATS_TORCH = """
import sys, torch
for key, tensor in torch.load(sys.argv[1], mmap=True, weights_only=True).items():
    x = tensor.float()
    print(key, x.mean(), x.std(), x.min(), x.max(), (x == 0).sum(), x.isnan().sum(), x.isinf().sum())
"""
CAST_TORCH = """
import sys, torch
from safetensors.torch import load_file, save_file
dtype = getattr(torch, sys.argv[3])
save_file({key: tensor.to(dtype) for key, tensor in load_file(sys.argv[1]).items()}, sys.argv[2])
"""
SAVE_TORCH = """
import sys, torch
from safetensors.torch import load_file
torch.save(load_file(sys.argv[1]), sys.argv[2])
"""
RENAME_TORCH = """
import sys, torch
state = torch.load(sys.argv[1], mmap=True, weights_only=True)
torch.save({"model." + key: tensor for key, tensor in state.items()}, sys.argv[2])
"""
RENAME_SAFETENSORS = """
import sys
from safetensors.torch import load_file, save_file
save_file({"model." + key: tensor for key, tensor in load_file(sys.argv[1]).items()}, sys.argv[2])
"""
FILTER_TORCH = """
import sys, torch
source, target = (torch.load(name, mmap=True, weights_only=True) for name in sys.argv[1:3])
target.update({k: v for k, v in source.items() if k in target and v.shape == target[k].shape})
torch.save(target, sys.argv[3])
"""
CONVERT_TORCH = """
import sys, torch
from safetensors.torch import save_file
save_file(torch.load(sys.argv[1], weights_only=True), sys.argv[2])
"""


# Inputs. They are made in a process of their own, for the same reason.


def llm(nbytes: int, vocabulary: int = 16) -> dict[str, tuple[int, ...]]:
    """The shapes of a language model of about ``nbytes`` bytes of bfloat16: 291 keys, most of them large matrices."""
    width = max(8, round((nbytes / 2 / (12 * LAYERS + 32)) ** 0.5) // 8 * 8)
    inner = width * 8 // 3
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (16 * width, width)}
    for layer in range(LAYERS):
        prefix = f"layers.{layer}."
        shapes |= {f"{prefix}self_attn.{name}_proj.weight": (width, width) for name in "qkvo"}
        shapes |= {f"{prefix}mlp.{name}_proj.weight": (inner, width) for name in ("gate", "up")}
        shapes[f"{prefix}mlp.down_proj.weight"] = (width, inner)
        shapes |= {f"{prefix}{name}.weight": (width,) for name in ("input_layernorm", "post_attention_layernorm")}
    return shapes | {"norm.weight": (width,), "lm_head.weight": (vocabulary * width, width)}


def small(keys: int) -> dict[str, tuple[int, ...]]:
    """Many keys with 32 bytes each."""
    return {f"blocks.{number // 8}.experts.{number % 8}.weight": (4, 4) for number in range(keys)}


def write(path: Path, shapes: Mapping[str, tuple[int, ...]], legacy: bool = False, seed: int = 0) -> None:
    """Writes tensors of random numbers in [0.5, 2), of either sign; the bytes are on disk when it returns.

    ``seed`` 1 gives other numbers than 0 in every second tensor.
    """
    import numpy as np

    from ckptool import saving
    from ckptool.checkpoint import Checkpoint, Span, Storage, TensorInfo

    def numbers(seed: int, nbytes: int) -> Callable[[], memoryview]:
        def made() -> memoryview:
            words = np.random.Generator(np.random.Philox(seed)).integers(0, 1 << 16, nbytes // 2, np.uint16)
            return memoryview(((words & 0x80FF) | 0x3F00).view(np.uint8))

        return made

    tree: dict[str, TensorInfo] = {}
    for number, (key, shape) in enumerate(shapes.items()):
        stride = (*shape[1:], 1)
        nbytes = 2 * shape[0] * stride[0]
        span = Span("", 0, nbytes, memory=numbers(2 * number + seed * (number % 2), nbytes))
        tree[key] = TensorInfo("bfloat16", shape, stride, 0, Storage(span, "bfloat16"))
    saving.save(Checkpoint(tree), path, to="torch-legacy" if legacy else None)


# Measuring.


class Bench:
    """Runs groups of commands in turn, in ``folder``, and keeps the rows of the table."""

    def __init__(self, folder: Path, rounds: int, missing: Mapping[str, str]) -> None:
        self.folder = folder
        self.rounds = rounds
        self.missing = missing
        self.rows: list[dict[str, Any]] = []
        self.outputs = folder / "out"

    def make(self, name: str, kind: str, number: int) -> Path:
        """A new input whose pages are in the cache."""
        path = self.folder / name
        command = [sys.executable, __file__, "--make", str(path), kind, str(number)]
        subprocess.run(command, env=ENVIRONMENT, check=True)
        with path.open("rb", buffering=0) as file:
            buffer = bytearray(1 << 20)
            while file.readinto(buffer):
                pass
        return path

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

    def group(self, size: str, ours: Mapping[str, list[str]], peer: Other, limit: Other) -> None:
        """Runs ckptool's ways to do a job, the user's of today, and the limit in turn; a row for each of the first."""
        print(f"{', '.join(map(str.strip, ours))}: {size}", file=sys.stderr, flush=True)
        others = {"peer": peer, "limit": limit}
        skipped = {role: self.missing[name] for role, o in others.items() for name in o.needs if name in self.missing}
        commands = dict(ours) | {role: other.command for role, other in others.items()}
        runs: dict[str, list[Run]] = {name: [] for name in commands}
        # Round -1 is not counted, and ckptool's alone: what it imports is compiled and in the cache from then on.
        for number in range(-1, self.rounds):
            for name, command in commands.items():
                if name in skipped or (number < 0 and name not in ours):
                    continue
                run = self.measure(command)
                if isinstance(run, Run):
                    runs[name] += [run] if number >= 0 else []
                elif name in ours:
                    raise SystemExit(f"ckptool failed at {name.strip()}, {size}: {run}")
                else:
                    skipped[name] = run
        for name in ours:
            row: dict[str, Any] = {"job": name, "size": size, "ckptool": summary(runs[name])}
            for role, other in others.items():
                row[role] = {"name": other.name}
                if role in skipped:
                    row[role]["skipped"] = skipped[role]
                    continue
                # Pair by pair, so that what slows the machine for a while slows both sides of a ratio.
                ratios = [ours.wall / theirs.wall for ours, theirs in zip(runs[name], runs[role], strict=True)]
                row[role] |= {**summary(runs[role]), "ratio": statistics.median(ratios), "ratios": ratios}
            self.rows.append(row)

    def run(self, nbytes: int, keys: int) -> None:
        """All jobs, an input removed as soon as nothing needs it."""
        pth, safe = self.outputs / "out.pth", self.outputs / "out.safetensors"

        def tool(*arguments: object) -> list[str]:
            return [sys.executable, "-m", "ckptool", *map(str, arguments)]

        large = f"{nbytes / 1e6:,.0f} MB"
        self.group("", {"--version": tool("--version")}, PASS, PASS)
        self.group("", {"--help": tool("--help")}, PASS, PASS)
        for size, kind, number in ((large, "llm", nbytes), (f"{keys:,} keys", "small", keys)):
            flags = ["--json"] if kind == "small" else []
            source = self.make("source.pth", kind, number)
            again = self.make("again.pth", kind, number)
            peer = python("torch.load(mmap)", LIST_TORCH, source)
            ours = {"inspect .pth": tool("inspect", source, *flags)}
            if kind == "small":
                ours["  the same, --flat"] = tool("inspect", source, "--flat")
            self.group(size, ours, peer, PASS)
            peer = python("torch.load(mmap)", DIFF_TORCH, source, again)
            self.group(size, {"diff .pth": tool("diff", source, again)}, peer, PASS)
            ours = {"remap .pth": tool("remap", source, "--add-prefix", "model.", "-o", pth)}
            peer = python("torch.load(mmap), save", RENAME_TORCH, source, pth)
            self.group(size, ours, peer, copy(source, pth))
            if kind == "llm":
                self.of_values(size, source, again, number, tool)
                again.unlink()
                convert = tool("convert", source, "-o", safe)
                ours = {"convert .pth -> .safetensors": convert, "  the same, --no-verify": [*convert, "--no-verify"]}
                peer = python("torch.load, save_file", CONVERT_TORCH, source, safe)
                self.group(size, ours, peer, copy(source, safe))
                # The same model with a larger head: one tensor stays the target's, the others are the source's.
                target = self.make("target.pth", "llm-head", number)
                ours = {"filter .pth": tool("filter", source, "--match", target, "-o", pth)}
                peer = python("torch.load(mmap), save", FILTER_TORCH, source, target, pth)
                self.group(size, ours, peer, copy(target, pth))
                target.unlink()
            again.unlink(missing_ok=True)
            source.unlink()
            source = self.make("source.safetensors", kind, number)
            peer = python("safe_open", LIST_SAFETENSORS, source, needs=("safetensors", "numpy"))
            self.group(size, {"inspect .safetensors": tool("inspect", source, *flags)}, peer, PASS)
            ours = {"remap .safetensors": tool("remap", source, "--add-prefix", "model.", "-o", safe)}
            peer = python("load_file, save_file", RENAME_SAFETENSORS, source, safe)
            self.group(size, ours, peer, copy(source, safe))
            if kind == "llm":
                ours = {"convert .safetensors -> .pth, --no-verify": tool("convert", source, "-o", pth, "--no-verify")}
                self.group(size, ours, python("load_file, save", SAVE_TORCH, source, pth), copy(source, pth))
                self.casts(source, number, tool)
            source.unlink()
            if kind == "llm":
                source = self.make("legacy.pth", "llm-legacy", number)
                ours = {"inspect legacy .pth": tool("inspect", source)}
                self.group(size, ours, python("torch.load", LIST_TORCH.replace("mmap=True, ", ""), source), PASS)
                source.unlink()

    def of_values(self, size: str, source: Path, same: Path, number: int, tool: Callable[..., list[str]]) -> None:
        """What has to read the data: equal files, files of which half the tensors differ, statistics, hashes."""
        cmp = system("cmp", "cmp", source, same)
        ours = {"diff --values, equal": tool("diff", source, same, "--values")}
        self.group(size, ours, python("torch.equal", EQUAL_TORCH, source, same), cmp)
        ours = {"  the same, --quick": tool("diff", source, same, "--quick")}
        self.group(size, ours, python("torch.equal", EQUAL_TORCH, source, same), PASS)
        same.unlink()
        other = self.make("again.pth", "llm-other", number)
        ours = {"diff --values, half differ": tool("diff", source, other, "--values", "--exit-zero")}
        self.group(size, ours, python("torch, a loop", APART_TORCH, source, other), system("cat", "cat", source, other))
        ours = {"inspect --stats": tool("inspect", source, "--stats")}
        self.group(size, ours, python("torch, a loop", STATS_TORCH, source), system("cat", "cat", source))
        ours = {"inspect --hash": tool("inspect", source, "--hash")}
        self.group(size, ours, system("sha256sum", "sha256sum", source), system("cat", "cat", source))

    def casts(self, source: Path, number: int, tool: Callable[..., list[str]]) -> None:
        """bfloat16 to float32 and back, of a quarter of the size, so that the larger side is half of it."""
        quarter = self.make("quarter.safetensors", "llm", number // 4)
        safe, wide = self.outputs / "out.safetensors", self.folder / "wide.safetensors"
        subprocess.run(tool("convert", quarter, "-o", wide, "--dtype", "float32"), env=ENVIRONMENT, check=True,
                       stdout=subprocess.DEVNULL)  # fmt: skip
        for name, one, dtype in (("bf16 -> fp32", quarter, "float32"), ("fp32 -> bf16", wide, "bfloat16")):
            ours = {f"convert {name}, --no-verify": tool("convert", one, "-o", safe, "--dtype", dtype, "--no-verify")}
            peer = python("load_file, to, save_file", CAST_TORCH, one, safe, dtype)
            self.group(f"{number / 2e6:,.0f} MB", ours, peer, copy(wide, safe))
        quarter.unlink()
        wide.unlink()


def summary(runs: Sequence[Run]) -> dict[str, Any]:
    """The figures of one command."""
    wall, cpu, peak = (list(column) for column in zip(*runs, strict=True))
    median = statistics.median(wall)
    return {"median": median, "min": min(wall), "max": max(wall), "peak": max(peak), "wall": wall, "cpu": cpu}


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


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Plain aligned text; a ratio is ckptool's time by the other's, so below 1 ckptool is the faster one."""
    lines = [("job", "size", "ckptool s", "peak MB", "today", "s", "ratio", "limit", "s", "ratio")]
    for row in rows:
        ours = row["ckptool"]
        cells = [row["job"], row["size"], f"{ours['median']:.3f} [{ours['min']:.3f}-{ours['max']:.3f}]"]
        cells.append(f"{ours['peak'] / 1e6:.0f}")
        for other in (row["peer"], row["limit"]):
            if "skipped" in other:
                cells += [f"{other['name']}: {other['skipped']}", "-", "-"]
            else:
                cells += [other["name"], f"{other['median']:.3f}", f"{other['ratio']:.{2 + (other['ratio'] < 0.1)}f}"]
        lines.append(tuple(cells))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = [
        [
            f"{cell:<{width}}" if column in (0, 4, 7) else f"{cell:>{width}}"
            for column, (cell, width) in enumerate(pairs)
        ]
        for pairs in (list(zip(line, widths, strict=True)) for line in lines)
    ]
    return "\n".join("  ".join(cells) for cells in aligned)


def main() -> None:
    """Makes the inputs, measures, prints the table, and removes everything but the JSON."""
    parser = argparse.ArgumentParser(description="ckptool beside today's tools and the limits of the machine.")
    parser.add_argument("--full", action="store_true", help="4 GB, 100,000 keys, 5 rounds; needs 13 GB of disk")
    parser.add_argument("--mb", type=int, help="megabytes of the large model (256)")
    parser.add_argument("--keys", type=int, help="keys of the many small tensors (20,000)")
    parser.add_argument("--rounds", type=int, help="how often everything runs (3)")
    parser.add_argument("--dir", help="where the files go: on the disk that matters (the system's temporary one)")
    parser.add_argument("--without", action="append", default=[], metavar="NAME", help="do without a package")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures too")
    parser.add_argument("--make", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.make:
        path, kind, number = arguments.make
        shapes = small(int(number)) if kind == "small" else llm(int(number), 17 if kind == "llm-head" else 16)
        write(Path(path), shapes, kind == "llm-legacy", int(kind == "llm-other"))
        return

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    nbytes = (arguments.mb or (4000 if arguments.full else 256)) * 10**6
    keys = arguments.keys or (100_000 if arguments.full else 20_000)
    rounds = arguments.rounds or (5 if arguments.full else 3)
    packages = versions(["ckptool", "torch", "safetensors", "numpy"], arguments.without)
    missing = {name: f"{name} is not there" for name, version in packages.items() if version is None}
    affinity = getattr(os, "sched_getaffinity", None)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with tempfile.TemporaryDirectory(prefix="ckptool-bench-", dir=arguments.dir) as name:
        folder = Path(name)
        if shutil.disk_usage(folder).free < (need := 3.2 * nbytes + 4000 * keys):
            raise SystemExit(f"needs {need / 1e9:.1f} GB of free disk: name another place with --dir")
        bench = Bench(folder, rounds, missing)
        floor = bench.measure(["true"])
        machine = {
            "system": f"{os.uname().sysname} {os.uname().machine}",
            "cores": len(affinity(0)) if affinity else os.cpu_count(),
            "memory": memory,
            "file system": file_system(folder),
            "python": ".".join(map(str, sys.version_info[:3])),
            **packages,
        }
        bench.run(nbytes, keys)
    lowest = floor.peak if isinstance(floor, Run) else 0
    report = {"machine": machine, "cache": "warm", "rounds": rounds, "lowest peak": lowest, "rows": bench.rows}
    shown = {**machine, "memory": f"{memory / 1e9:.0f} GB"}
    print(table(bench.rows))
    print()
    print("; ".join(f"{key} {value or 'not there'}" for key, value in shown.items()))
    print(f"Warm cache: every input was read once before. Whole processes, in turn, {rounds} times: median [min-max].")
    print("A ratio is the median of ckptool's time by the other's, pair by pair: below 1, ckptool is the faster one.")
    print(f"A peak below {lowest / 1e6:.0f} MB cannot be told: that much is the runner's own.")
    if memory < 3 * nbytes:
        print("The files do not all fit into memory: the cache was not warm all the time.")
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
