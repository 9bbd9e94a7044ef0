from __future__ import annotations

import gc
import hashlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from oracles import Run

# No import of torch here: the process that starts the workers reads this file too, and they wait for it.

ROOT = Path(__file__).resolve().parents[1]
FIXTURES = ROOT / "fixtures"
MEMORY = "/dev/shm"

if "PYTEST_XDIST_WORKER" in os.environ:  # every worker has a core of its own: threads would only be in each other's way
    os.environ["OMP_NUM_THREADS"] = "1"
if os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > 4 << 30:  # a disk takes long, and changes nothing
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", MEMORY)
# Tests run in directories of their own, where hypothesis would compute its tables of characters anew.
os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", str(ROOT / ".hypothesis"))

sys.path.insert(0, str(FIXTURES))  # makers/ and record.py

# A shell that starts `make test` in the background has it ignore these, and a process that the tests start would too.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_collection_finish() -> None:
    """Has the garbage collector leave alone what was imported: torch alone is half a million objects."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def nothing_ran(tmp_path: Path) -> Iterator[None]:
    """Every test runs in an empty directory, and fails if a file's code made the directory it tries to make."""
    from oracles import CANARY

    os.chdir(tmp_path)
    yield
    os.chdir(ROOT)
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

    import torch

    def save(obj: Any, name: str = "saved.pth", **options: Any) -> Path:
        torch.save(obj, tmp_path / name, **options)
        return tmp_path / name

    return save


@pytest.fixture
def folding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shows alike keys as one line, as on a terminal."""
    monkeypatch.setenv("CKPTOOL_FOLD", "1")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command line in this process: (exit code, stdout, stderr). JSON must be as its published schema has it."""

    from oracles import published

    from ckptool.cli import main

    def call(*args: object) -> tuple[int, str, str]:
        code = main([str(arg) for arg in args])
        captured = capsys.readouterr()
        if "--json" in args and code <= 2:
            document = json.loads(captured.out)
            if "\\ud" in captured.out:  # half a surrogate is JSON, and no text for the judge
                document = json.loads(json.dumps(document, ensure_ascii=False).encode("utf-8", "replace"))
            published(str(args[0])).validate(document)
        return code, captured.out, captured.err

    return call


@pytest.fixture
def refused(run: Run) -> Callable[..., str]:
    """Runs a command that must fail with one line and leave the directory as it is; returns the line."""

    from oracles import content

    def call(*args: object) -> str:
        before = content()
        code, out, err = run(*args)
        assert (code, out) == (2, ""), out
        assert err.startswith("ckptool: error: ")
        assert err.count("\n") == 1
        assert content() == before
        return err

    return call
