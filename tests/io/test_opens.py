"""How often a run opens its inputs: once to read headers, once more to read or copy the data."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from oracles import FIXTURES

from ckptool.io.source import Files

NEW, OLD = FIXTURES / "resnet_new.pth", FIXTURES / "resnet_old.pth"

HOOK = """
import os, sys
from ckptool.cli import main
opened = []
sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
assert main(sys.argv[1:]) in (0, 1)
print(*opened, sep="\\n", file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("args", "most"),
    [
        pytest.param(["filter", "--match", NEW, OLD, "-o", "out.pth"], 2, marks=pytest.mark.slow),
        (["filter", "--match", NEW, OLD, "-o", "out.safetensors", "--verify"], 2),
        pytest.param(["convert", NEW, "-o", "out.safetensors"], 2, marks=pytest.mark.slow),
        (["convert", NEW, "-o", "out", "--to", "sharded"], 2),
        (["convert", FIXTURES / "resnet_legacy.pth", "-o", "out.pth"], 2),
        pytest.param(["inspect", NEW], 1, marks=pytest.mark.slow),
        (["inspect", "--stats", "--hash", "--check", NEW], 2),
        pytest.param(
            ["inspect", "--stats", "--hash", "--check", FIXTURES / "resnet_old.safetensors"], 2, marks=pytest.mark.slow
        ),
        (["diff", NEW, OLD], 1),
        (["diff", "--values", NEW, OLD], 2),
    ],
    ids=lambda value: " ".join(map(str, value)).replace(f"{FIXTURES}{os.sep}", "") if isinstance(value, list) else "",
)
def test_a_file_is_opened_once_for_its_headers_and_once_for_its_data(
    args: list[object], most: int, tmp_path: Path
) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", HOOK, *map(str, args)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    counts = Counter(done.stderr.splitlines())
    inputs = [str(arg) for arg in args if isinstance(arg, Path)]
    assert {path: counts[path] for path in inputs} == dict.fromkeys(inputs, most)


def test_files_that_are_shared_are_opened_once_and_counted_apart(tmp_path: Path) -> None:
    from ckptool.core.tensor import Span

    (tmp_path / "f").write_bytes(b"12345678")
    span = Span(str(tmp_path / "f"), 0, 8)
    told: list[int] = []
    with Files() as files:
        beside = files.beside(told.append)
        assert beside.get(span) is files.get(span)
        assert (beside.read(span), files.read(span), told) == (b"12345678", b"12345678", [8])
