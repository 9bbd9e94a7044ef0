"""Ranks of one command line, as torchrun starts them: forks of this process, which has imported what takes seconds."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

import ckptool.ranks.engine  # noqa: F401 - so that no fork has to
from ckptool.cli import main

Patch = Callable[[int], None]
"""Called in every rank with its number, before the command."""


class Ended(NamedTuple):
    """How a rank ended: its exit code, or the number of a signal, negative; and what it printed."""

    code: int
    out: str
    err: str


def nothing(rank: int) -> None:
    """Changes nothing in a rank."""


def ranks(world: int, *args: object, patch: Patch = nothing, limit: float = 120) -> list[Ended]:
    """Runs a command line in ``world`` processes in the current directory. Raises: AssertionError after the limit."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    logs = Path(f".said-{port}")
    logs.mkdir()
    running = {_forked(rank, world, port, [*map(str, args)], logs, patch): rank for rank in range(world)}
    codes: dict[int, int] = {}
    end = time.monotonic() + limit
    try:
        while running and time.monotonic() < end:
            for process in [*running]:
                done, status = os.waitpid(process, os.WNOHANG)
                if done:
                    codes[running.pop(process)] = os.waitstatus_to_exitcode(status)
            time.sleep(0.01)
        said = {rank: (logs / f"err{rank}").read_text() for rank in range(world)}
        assert not running, f"ranks {[*running.values()]} still run after {limit} s: {said}"
    finally:
        for process in running:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
    return [Ended(codes[rank], *(_text(logs / f"{of}{rank}") for of in ("out", "err"))) for rank in range(world)]


def _text(log: Path) -> str:
    """Returns what a rank printed, but for torch's own warnings: a command silences them before it imports torch."""
    return "".join(line for line in log.read_text().splitlines(True) if not line.startswith("[W"))


def _forked(rank: int, world: int, port: int, args: Sequence[str], logs: Path, patch: Patch) -> int:
    process = os.fork()
    if process:
        return process
    code = 99
    try:
        for fd, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(logs / f"{name}{rank}", os.O_WRONLY | os.O_CREAT), fd)
        sys.stdout, sys.stderr = (os.fdopen(fd, "w", 1, closefd=False) for fd in (1, 2))  # pytest has its own
        os.environ |= {
            "RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            "GLOO_SOCKET_IFNAME": "lo",
        }  # fmt: skip
        torch.set_num_threads(1)
        patch(rank)
        code = main(list(args))
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 98
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
