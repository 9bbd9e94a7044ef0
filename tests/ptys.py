"""Runs the command line with its streams on real pseudo-terminals, one each, of any width."""

from __future__ import annotations

import fcntl
import os
import struct
import subprocess
import sys
import termios
import threading
from typing import Any, NamedTuple

VARIABLES = ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES")
"""Those that say what a terminal is to show; no test has them from whoever started it."""


class Shown(NamedTuple):
    code: int
    out: str
    err: str


def shown(*args: object, columns: int = 80, ttys: str = "out err", typed: str | None = None, **variables: str) -> Shown:
    """Runs ckptool; ``ttys`` names the streams that are terminals, the others are pipes.

    With ``typed``, stdin is a terminal on which this is typed, without an echo.
    """
    environment: dict[str, Any] = {key: value for key, value in os.environ.items() if key not in VARIABLES}
    environment = environment | {"TERM": "xterm-256color"} | variables
    ends = {}
    for name in ("out", "err"):
        if name in ttys.split():
            reader, writer = os.openpty()
            fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
        else:
            reader, writer = os.pipe()
        ends[name] = reader, writer
    command = [sys.executable, "-m", "ckptool", *map(str, args)]
    keyboard, stdin = os.openpty() if typed is not None else (None, subprocess.DEVNULL)
    if typed is not None and keyboard is not None:
        modes = termios.tcgetattr(stdin)
        modes[3] &= ~termios.ECHO
        termios.tcsetattr(stdin, termios.TCSANOW, modes)
        os.write(keyboard, typed.encode())
    child = subprocess.Popen(command, stdin=stdin, stdout=ends["out"][1], stderr=ends["err"][1], env=environment)
    texts: dict[str, bytes] = {}

    def drain(name: str) -> None:
        pieces = []
        try:
            while piece := os.read(ends[name][0], 1 << 16):
                pieces.append(piece)
        except OSError:  # EIO: no process has the terminal any more
            pass
        texts[name] = b"".join(pieces)

    readers = [threading.Thread(target=drain, args=(name,)) for name in ends]
    for _, writer in ends.values():
        os.close(writer)
    for one in readers:
        one.start()
    code = child.wait(timeout=60)
    for one in readers:
        one.join()
    for reader in [*(reader for reader, _ in ends.values()), *(() if keyboard is None else (keyboard, stdin))]:
        os.close(reader)
    return Shown(code, *(texts[name].decode().replace("\r\n", "\n") for name in ("out", "err")))
