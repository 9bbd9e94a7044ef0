"""What a run does with files, for those who ask (``--verbose``)."""

from __future__ import annotations

from collections.abc import Callable


class Tally:
    """The bytes read of each file; ``say`` is called with a line for each choice made."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say
        self.read: dict[str, int] = {}

    def add(self, path: str, nbytes: int) -> None:
        """Counts bytes that were read."""
        self.read[path] = self.read.get(path, 0) + nbytes


current: Tally | None = None
"""Where reading is counted; None: nobody asks."""
