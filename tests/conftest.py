from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import CANARY, FIXTURES, Run, content

from ckptool.cli import main

if "PYTEST_XDIST_WORKER" in os.environ:  # every worker has a core of its own: threads would only be in each other's way
    torch.set_num_threads(1)

sys.path.insert(0, str(FIXTURES))  # make.py and record.py


@pytest.fixture(autouse=True)
def nothing_ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every test runs in an empty directory, and fails if a file's code made the directory it tries to make."""
    monkeypatch.chdir(tmp_path)
    yield
    assert not (tmp_path / CANARY).exists()


@pytest.fixture(scope="session", autouse=True)
def fixtures_stay_as_they_are() -> Iterator[None]:
    def digests() -> dict[Path, str]:
        files = [path for path in FIXTURES.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
        return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    before = digests()
    yield
    assert digests() == before


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Path]:
    """Saves an object with torch.save and returns the path."""

    def save(obj: Any, name: str = "saved.pth", **options: Any) -> Path:
        torch.save(obj, tmp_path / name, **options)
        return tmp_path / name

    return save


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command line in this process: (exit code, stdout, stderr)."""

    def call(*args: object) -> tuple[int, str, str]:
        code = main([str(arg) for arg in args])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def refused(run: Run) -> Callable[..., str]:
    """Runs a command that must fail with one line and leave the directory as it is; returns the line."""

    def call(*args: object) -> str:
        before = content()
        code, out, err = run(*args)
        assert (code, out) == (2, ""), out
        assert err.startswith("ckptool: error: ")
        assert err.count("\n") == 1
        assert content() == before
        return err

    return call
