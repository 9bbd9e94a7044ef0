"""What a run does with files, for those who ask (``--verbose``)."""

from __future__ import annotations

from collections.abc import Callable


class Tally:
    """The bytes read of each file, the requests of remote ones; ``say`` is called with a line for each choice made."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say
        self.read: dict[str, int] = {}
        self.requests: dict[str, int] = {}

    def add(self, path: str, nbytes: int, requests: int = 0) -> None:
        """Counts bytes that were read, and requests of a remote file; those of one file are told one by one."""
        self.read[path] = self.read.get(path, 0) + nbytes
        if requests:
            self.requests[path] = self.requests.get(path, 0) + requests


current: Tally | None = None
"""Where reading is counted; None: nobody asks."""
