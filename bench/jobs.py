"""The jobs of the benchmark: ckptool's command lines, what they are measured against, and what they mean to reach."""

from __future__ import annotations

import os
import subprocess
import sys

import peers
from measure import Bench, Goal, Input
from peers import PASS, copy, python, system

LOOK = Goal(peer=0.05, peak=40)
"""Of looking at headers: a twentieth of what torch takes."""


def tool(*arguments: object) -> list[str]:
    """A command line of this checkout's ckptool."""
    return [sys.executable, "-m", "ckptool", *map(str, arguments)]


def run(bench: Bench, nbytes: int, keys: int) -> None:
    """All jobs, an input removed as soon as nothing needs it."""
    bench.group("", {"--version": tool("--version")}, [], PASS, goal=Goal(limit=3))
    bench.group("", {"--help": tool("--help")}, [], PASS, goal=Goal(limit=8))
    _headers(bench, Input(bench.folder / "resnet.pth", "resnet", 0), "100 MB")
    _whole(bench)
    large = f"{nbytes / 1e6:,.0f} MB"
    source = Input(bench.folder / "source.pth", "llm", nbytes)
    again = source._replace(path=bench.folder / "again.pth")
    _headers(bench, source, large)
    _values(bench, source, again, large)
    again.path.unlink(missing_ok=True)
    _writing_torch(bench, source, large)
    source.path.unlink(missing_ok=True)
    _safetensors(bench, Input(bench.folder / "source.safetensors", "llm", nbytes), large)
    _casts(bench, nbytes)
    legacy = Input(bench.folder / "legacy.pth", "llm-legacy", nbytes)
    peer = python("torch.load", peers.LIST_LEGACY, legacy.path)
    bench.group(large, {"inspect legacy .pth": tool("inspect", legacy.path)}, [peer], PASS, [legacy], LOOK)
    legacy.path.unlink(missing_ok=True)
    _many_keys(bench, keys)


def _headers(bench: Bench, source: Input, size: str) -> None:
    """What needs only the header of a torch file, whatever its size."""
    path = source.path
    today = [python("torch.load(mmap)", peers.LIST_TORCH, path), python("torch.load(meta)", peers.LIST_META, path)]
    bench.group(size, {"inspect .pth": tool("inspect", path)}, today, PASS, [source], LOOK)
    today = [python("torch.load(mmap)", peers.DIFF_TORCH, path, path)]
    bench.group(size, {"diff .pth": tool("diff", path, path)}, today, PASS, [source], LOOK)


def _whole(bench: Bench) -> None:
    """A model with its code, as torch.save(model) leaves it: only torch can make one."""
    if "torch" in bench.missing:
        return
    whole = Input(bench.folder / "whole.pth", "whole", 0)
    peer = python("torch.load(pickle)", peers.LIST_WHOLE, whole.path)
    bench.group("38 MB", {"inspect whole model": tool("inspect", whole.path)}, [peer], PASS, [whole], LOOK)
    whole.path.unlink(missing_ok=True)


def _values(bench: Bench, source: Input, again: Input, size: str) -> None:
    """What has to read the data: equal files, files of which half the tensors differ, statistics, hashes."""
    path, both = source.path, [source, again]
    compare = tool("diff", path, again.path, "--values")
    today = [python(f"torch.{name}", script, path, again.path)
             for name, script in (("equal", peers.EQUAL_TORCH), ("allclose", peers.CLOSE_TORCH))]  # fmt: skip
    cmp = system("cmp", "cmp", path, again.path)
    bench.group(size, {"diff --values, equal": compare}, today, cmp, both, Goal(limit=0.6, peak=30))
    bench.group(size, {"diff --quick, equal": tool("diff", path, again.path, "--quick")}, today[:1], PASS, both)
    if hasattr(os, "posix_fadvise"):
        bench.group(size, {"diff --values, equal, cold": compare}, [], cmp, both, cold=True)
    again.path.unlink(missing_ok=True)

    other = again._replace(kind="llm-other")
    ours = {"diff --values, half differ": tool("diff", path, other.path, "--values", "--exit-zero")}
    today = [python("torch, a loop", peers.APART_TORCH, path, other.path)]
    cat = system("cat", "cat", path, other.path)
    bench.group(size, ours, today, cat, [source, other], Goal(peer=0.125, peak=64))
    other.path.unlink(missing_ok=True)

    floats = Input(bench.folder / "float32.pth", "llm-float32", source.number)
    for one, name in ((source, "bf16"), (floats, "fp32")):
        command = tool("inspect", one.path, "--stats")
        ours = {f"inspect --stats, {name}": command}
        if hasattr(os, "sched_setaffinity"):
            ours["  the same, one core"] = _on_one_core(command)
        today, cat = [python("torch, a loop", peers.STATS_TORCH, one.path)], system("cat", "cat", one.path)
        bench.group(size, ours, today, cat, [one], Goal(peer=0.1, peak=64))
    floats.path.unlink(missing_ok=True)
    cat = system("cat", "cat", path)
    sha = system("sha256sum", "sha256sum", path)
    bench.group(size, {"inspect --hash": tool("inspect", path, "--hash")}, [sha], cat, [source], Goal(peer=0.33))
    if hasattr(os, "posix_fadvise"):
        ours = {"inspect .pth, cold": tool("inspect", path), "inspect --stats, cold": tool("inspect", path, "--stats")}
        bench.group(size, ours, [], cat, [source], cold=True)


def _on_one_core(command: list[str]) -> list[str]:
    """The same command with one core to run on."""
    script = (
        "import os, sys; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]); os.execv(sys.argv[1], sys.argv[1:])"
    )
    return [sys.executable, "-c", script, *command]


def _writing_torch(bench: Bench, source: Input, size: str) -> None:
    """Jobs that write as much as they read, out of a torch file."""
    path, pth, safe = source.path, bench.outputs / "out.pth", bench.outputs / "out.safetensors"
    remap = tool("remap", path, "--add-prefix", "model.", "-o", pth)
    today = [python("torch.load(mmap), save", peers.RENAME_TORCH, path, pth)]
    bench.group(size, {"remap .pth": remap}, today, copy(path, pth), [source], Goal(0.25, 1, 40))
    bench.group(size, {"remap .pth, --no-fsync": [*remap, "--no-fsync"]}, [], copy(path, pth, sync=False), [source])
    if hasattr(os, "posix_fadvise"):
        bench.group(size, {"remap .pth, cold": remap}, [], copy(path, pth), [source], cold=True)
    if _clones(bench):
        bench.group(
            size, {"remap .pth, reflink": remap}, [], copy(path, pth, "--reflink=never"), [source], Goal(limit=0.5)
        )

    # The same model with a larger head: one tensor stays the target's, the others are the source's.
    target = Input(bench.folder / "target.pth", "llm-head", source.number)
    ours = {"filter .pth": tool("filter", path, "--match", target.path, "-o", pth)}
    today = [python("torch.load(mmap), save", peers.FILTER_TORCH, path, target.path, pth)]
    bench.group(size, ours, today, copy(target.path, pth), [source, target], Goal(0.25, 1, 40))
    target.path.unlink(missing_ok=True)

    convert = tool("convert", path, "-o", safe)
    ours = {"convert .pth -> .safetensors, --no-verify": [*convert, "--no-verify"], "  the same, --verify": convert}
    today = [python("torch.load, save_file", peers.CONVERT_TORCH, path, safe),
             python("torch.load(mmap), save_file", peers.CONVERT_MMAP, path, safe)]  # fmt: skip
    bench.group(size, ours, today, copy(path, safe), [source], Goal(limit=1, peak=40))


def _clones(bench: Bench) -> bool:
    """Returns whether the file system shares extents between files."""
    one, other = bench.folder / "extent", bench.folder / "extents"
    one.write_bytes(bytes(1 << 16))
    try:
        command = ["cp", "--reflink=always", one, other]
        return subprocess.run(command, stderr=subprocess.DEVNULL).returncode == 0
    finally:
        one.unlink()
        other.unlink(missing_ok=True)


def _safetensors(bench: Bench, source: Input, size: str) -> None:
    """Jobs that begin with a safetensors file."""
    path, pth, safe = source.path, bench.outputs / "out.pth", bench.outputs / "out.safetensors"
    bare = python("safe_open", peers.LIST_SAFETENSORS, path, needs=("safetensors", "numpy"))
    bench.group(size, {"inspect .safetensors": tool("inspect", path)}, [bare], PASS, [source], Goal(1, None, 40))
    remap = tool("remap", path, "--add-prefix", "model.", "-o", safe)
    today = [python("load_file, save_file", peers.RENAME_SAFETENSORS, path, safe)]
    bench.group(size, {"remap .safetensors": remap}, today, copy(path, safe), [source], Goal(0.25, 1, 40))
    ours = {"convert .safetensors -> .pth, --no-verify": tool("convert", path, "-o", pth, "--no-verify")}
    today = [python("load_file, save", peers.SAVE_TORCH, path, pth)]
    bench.group(size, ours, today, copy(path, pth), [source], Goal(limit=1.25, peak=40))
    path.unlink(missing_ok=True)


def _casts(bench: Bench, nbytes: int) -> None:
    """bfloat16 to float32 and back, of a quarter of the size, so that the larger side is half of it."""
    narrow = Input(bench.folder / "narrow.safetensors", "llm", nbytes // 4)
    wide = Input(bench.folder / "wide.safetensors", "llm-float32", nbytes // 2)
    safe = bench.outputs / "out.safetensors"
    for name, one, dtype in (("bf16 -> fp32", narrow, "float32"), ("fp32 -> bf16", wide, "bfloat16")):
        ours = {f"convert {name}, --no-verify": tool("convert", one.path, "-o", safe, "--dtype", dtype, "--no-verify")}
        today = [python("load_file, to, save_file", peers.CAST_TORCH, one.path, safe, dtype)]
        both = [one, wide] if one is narrow else [one]
        bench.group(f"{nbytes / 2e6:,.0f} MB", ours, today, copy(wide.path, safe), both, Goal(0.25, 1, 64))
    narrow.path.unlink(missing_ok=True)
    wide.path.unlink(missing_ok=True)


def _many_keys(bench: Bench, keys: int) -> None:
    """What costs by the key: many tensors of 32 bytes."""
    size, today = f"{keys:,} keys", "torch.load(mmap)"
    source = Input(bench.folder / "small.pth", "small", keys)
    path, pth, safe = source.path, bench.outputs / "out.pth", bench.outputs / "out.safetensors"
    flat = tool("inspect", path, "--flat")
    ours = {"inspect .pth --json": tool("inspect", path, "--json"), "inspect .pth --flat": flat}
    bench.group(size, ours, [python(today, peers.LIST_TORCH, path)], PASS, [source], Goal(peak=200))
    peer = python(today, peers.DIFF_TORCH, path, path)
    bench.group(size, {"diff .pth": tool("diff", path, path)}, [peer], PASS, [source], Goal(peak=200))
    ours = {"remap .pth": tool("remap", path, "--add-prefix", "model.", "-o", pth)}
    peer = python(f"{today}, save", peers.RENAME_TORCH, path, pth)
    bench.group(size, ours, [peer], copy(path, pth), [source])
    path.unlink(missing_ok=True)
    source = Input(bench.folder / "small.safetensors", "small", keys)
    path = source.path
    peer = python("safe_open", peers.LIST_SAFETENSORS, path, needs=("safetensors", "numpy"))
    ours = {"inspect .safetensors --json": tool("inspect", path, "--json")}
    bench.group(size, ours, [peer], PASS, [source], Goal(peak=200))
    ours = {"remap .safetensors": tool("remap", path, "--add-prefix", "model.", "-o", safe)}
    peer = python("load_file, save_file", peers.RENAME_SAFETENSORS, path, safe)
    bench.group(size, ours, [peer], copy(path, safe), [source])
    path.unlink(missing_ok=True)
