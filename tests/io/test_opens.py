"""How often a run opens its inputs: once to read headers, once more to read or copy the data."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

from oracles import FIXTURES

from ckptool.io.files import Files

NEW, OLD = FIXTURES / "resnet_new.pth", FIXTURES / "resnet_old.pth"

EACH = """
import os, sys
import ckptool.cli.convert, ckptool.cli.diff, ckptool.cli.filter, ckptool.cli.inspect, ckptool.saving  # once
import ckptool.values.scan
from ckptool.cli import main
for number, words in enumerate(eval(sys.argv[1])):
    if not os.fork():
        opened, told = [], os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
        assert main(words) in (0, 1)
        print(opened, file=told, flush=True)
        os._exit(0)
    if os.wait()[1]:
        sys.exit(1)
"""
"""Tells what each command line opens, which runs in a fork."""

MOST: list[tuple[list[object], int]] = [
    (["filter", "--match", NEW, OLD, "-o", "out.pth"], 2),
    (["filter", "--match", NEW, OLD, "-o", "out.safetensors", "--verify"], 2),
    (["convert", NEW, "-o", "other.safetensors"], 2),
    (["convert", NEW, "-o", "out", "--to", "sharded"], 2),
    (["convert", FIXTURES / "resnet_legacy.pth", "-o", "other.pth"], 2),
    (["inspect", NEW], 1),
    (["inspect", "--stats", "--hash", "--check", NEW], 2),
    (["inspect", "--stats", "--hash", "--check", FIXTURES / "resnet_old.safetensors"], 2),
    (["diff", NEW, OLD], 1),
    (["diff", "--values", NEW, OLD], 2),
]


def test_a_file_is_opened_once_for_its_headers_and_once_for_its_data() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    words = [[str(arg) for arg in args] for args, _ in MOST]
    done = subprocess.run([sys.executable, "-c", EACH, repr(words)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for (args, most), line in zip(MOST, done.stdout.splitlines(), strict=True):
        counts = Counter(ast.literal_eval(line))
        inputs = [str(arg) for arg in args if isinstance(arg, Path)]
        assert {path: counts[path] for path in inputs} == dict.fromkeys(inputs, most), args


def test_files_that_are_shared_are_opened_once_and_counted_apart(tmp_path: Path) -> None:
    from ckptool.core.tensor import Span

    (tmp_path / "f").write_bytes(b"12345678")
    span = Span(str(tmp_path / "f"), 0, 8)
    told: list[int] = []
    with Files() as files:
        beside = files.beside(told.append)
        assert beside.get(span) is files.get(span)
        assert (beside.read(span), files.read(span), told) == (b"12345678", b"12345678", [8])
