"""What must hold for any bytes and any command: a right answer, or one line and exit 2; soon, and in little memory.

Right is what torch.load and the safetensors library give where they load the file, and a copy that reads back as the
same. Whatever else happens raises `Wrong`: a traceback, several lines, a file left behind, a word on stdout.
"""

from __future__ import annotations

import contextlib
import io
import json
import resource
import struct
import time
import traceback
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import ckptool
from ckptool.cli import main
from ckptool.core.tensor import Opaque
from ckptool.errors import CkptoolError
from ckptool.io.files import Files
from ckptool.values import blocks as data
from tests.oracles import tree_equal

SECONDS = 5
MEGABYTES = 500


class Wrong(AssertionError):
    """A command did what none may do."""


def call(*args: object) -> tuple[int, str, str]:
    """Runs a command line in this process: (exit code, stdout, stderr). Raises: Wrong for a traceback, or too much."""
    out, err = io.StringIO(), io.StringIO()
    line = " ".join(map(str, args))
    begin, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
            warnings.simplefilter("error")  # a warning would be a line on stderr
            warnings.simplefilter("ignore", DeprecationWarning)
            code = main([str(arg) for arg in args])
    except BaseException as error:
        if isinstance(error, (KeyboardInterrupt, GeneratorExit)):
            raise
        raise Wrong(f"{line}: {traceback.format_exc()}") from error
    if (took := time.process_time() - begin) > SECONDS:
        raise Wrong(f"{line}: took {took:.1f} s")
    if (more := (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1000) > MEGABYTES:
        raise Wrong(f"{line}: took {more:.0f} MB")
    return code, out.getvalue(), err.getvalue()


def answer(*args: object, yes: tuple[int, ...] = (0,)) -> tuple[int, str]:
    """Runs a command line that may succeed with one of ``yes``, or refuse; returns (exit code, stdout)."""
    here = Path().resolve()
    before = sorted(here.iterdir())
    code, out, err = call(*args)
    line = " ".join(map(str, args))
    if any(not text.startswith("ckptool: ") for text in err.splitlines()) or len(err) > 100_000:
        raise Wrong(f"{line}: stderr is {err[:2000]!r}")
    if code in yes:
        return code, out
    half = args[0] == "inspect" and any(text in err for text in ("missing shards", "in no shard", "in two shards"))
    if (
        code != 2
        or (out and "--json" not in args and not half)
        or not err.startswith("ckptool: error: ")
        or err.count("\n") != 1
    ):
        raise Wrong(f"{line}: exit {code}, stdout {out[:500]!r}, stderr {err[:2000]!r}")
    if sorted(here.iterdir()) != before:
        raise Wrong(f"{line}: refused, and left {sorted(set(here.iterdir()) - set(before))}")
    return code, out


def look(path: Path) -> bool:
    """Holds a file against the commands that only look; returns whether it was read."""
    code, half = answer("inspect", path)  # half a set is shown, and an error
    checked, out = answer("inspect", path, "--check", "--json", yes=(0, 1))
    if (code == 2 and not half) != (checked == 2):
        raise Wrong(f"inspect {path}: exit {code}, with --check {checked}")
    json.loads(out)
    return code == 0


def hold(path: Path, other: Path) -> bool:
    """Holds a file against every kind of command, ``other`` being a sound one; returns whether it was read.

    The current directory must be empty, and is so again.
    """
    if not look(path):
        answer("convert", path, "-o", "out.safetensors")
        return False
    answer("inspect", path, "--stats", "--hash", "--flat")
    answer("diff", path, path, "--values", yes=(0, 1))  # 1: bytes that read as NaN, beside none
    answer("diff", other, path, "--values", yes=(0, 1))
    answer("filter", path, "--match", other, "-o", "matched.pth", "--no-fsync", yes=(0, 1))
    found = tensors(path)
    for name in ("out.safetensors", "out.pth"):
        code, _ = answer("convert", path, "-o", name, "--no-fsync")
        if code == 0 and found is not None:
            copied(found, Path(name))
    as_torch_reads_it(path)
    for left in Path().iterdir():
        left.unlink()
    return True


def tensors(path: Path) -> dict[str, bytes] | None:
    """The bytes of all dense weights, by key; None if they cannot be read."""
    try:
        found = ckptool.open(path).state_dict()
        with Files() as files:
            return {
                key: data.read_bytes(tensor, files)
                for key, tensor in found.items()
                if not isinstance(tensor.source, Opaque) and tensor.nbytes < 1 << 24
            }
    except CkptoolError:
        return None


def copied(found: dict[str, bytes], path: Path) -> None:
    """Raises Wrong if a converted file has other tensors than its source."""
    again = tensors(path)
    if again != found:
        raise Wrong(f"{path} has other tensors than its source")
    if path.suffix == ".safetensors":
        load_file(path)  # the library must take it


def as_torch_reads_it(path: Path) -> None:
    """Raises Wrong if torch.load, held to what is safe, reads another tree than we do."""
    loaded = torch_load(path)
    if loaded is None:
        return
    try:
        opened = ckptool.open(path)
    except CkptoolError:
        return
    tree = opened.tree
    if path.suffix == ".json":  # whose ties are keys beyond those that are stored
        found = opened.state_dict()
        tree = {key: found.get(key) for key in loaded}
    try:
        tree_equal(tree, loaded)
    except CkptoolError:
        return  # its bytes cannot be read, and this is said
    except AssertionError as error:
        raise Wrong(f"{path}: torch.load gives another tree: {error}") from error


def torch_load(path: Path) -> Any:
    """What torch.load gives, running nothing, of an index the library's shards together; None if they refuse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if path.suffix == ".json":
                return shards_together(path)
            return torch.load(io.BytesIO(without_directories(path.read_bytes())), weights_only=True)
    except Exception:
        return None


def shards_together(path: Path) -> dict[str, torch.Tensor]:
    """What an index names, read by the library."""
    places = json.loads(path.read_bytes())["weight_map"]
    shards = {name: load_file(path.parent / name) for name in set(places.values())}
    return {key: shards[name][key] for key, name in places.items()}


def without_directories(data: bytes) -> bytes:
    """The archive without the mark of a directory on any member: torch gives memory for those that it never filled."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            at, count = archive.start_dir, len(archive.infolist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError):
        return data
    plain = bytearray(data)
    for _ in range(count):
        plain[at + 38] &= ~0x10
        at += 46 + sum(struct.unpack_from("<3H", plain, at + 28))
    return bytes(plain)
