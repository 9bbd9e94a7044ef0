"""The ranks that torchrun started for one command line, and how they agree: gloo, through torch.distributed.

Every rank opens the input and plans alike. They meet (`World.together`) before anything is written, and after each
step; what fails in one of them is then raised in all, and rank 0 says it. A rank that is killed closes its
connections, by which the others notice at the next meeting.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

from ckptool.errors import CkptoolError, OutputError, UsageError, needs_torch

T = TypeVar("T")

JOIN = 300
"""Seconds in which all ranks must have come to the first meeting."""

WAIT = 3600
"""Seconds that a rank waits for the slowest one at a later meeting, or for one whose machine is gone."""


class World:
    """The ranks of a run: this is number ``rank`` of ``size``. Nothing is imported or connected before they meet."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.group: Any = None
        self._shared: CkptoolError | None = None
        self._over = False

    @property
    def leads(self) -> bool:
        """Returns whether this rank says what happens, and gives files their names."""
        return self.rank == 0

    def together(self, work: Callable[[], T], named: bool = True) -> list[T]:
        """Does work on every rank, and returns what it returned on each, in their order.

        ``named``: the error of one rank has its number.
        Raises: on every rank the error of the first rank that had one; OutputError if a rank is gone.
        """
        result, error = None, None
        try:
            result = work()
        except CkptoolError as caught:
            error = caught
        every: list[Any] = [None] * self.size
        try:
            distributed = self._joined()
            distributed.all_gather_object(every, (result, error), group=self.group)
        except (RuntimeError, ConnectionError) as lost:
            gone = self.lost(lost)
            raise error or gone from lost
        self.refuse({rank: found[1] for rank, found in enumerate(every) if found[1] is not None}, named)
        return [found[0] for found in every]

    def first(self, work: Callable[[], T]) -> T:
        """Does work on rank 0, and returns on every rank what it returned there. Raises: as `together`."""
        return self.together(lambda: work() if self.leads else None, named=False)[0]  # type: ignore[return-value]

    def refuse(self, errors: dict[int, CkptoolError], named: bool = True) -> None:
        """Raises the first of the ranks' errors, which all ranks know; if not all have one, with the rank's number."""
        if errors:
            rank = min(errors)
            error = errors[rank]
            if named and len(errors) < self.size:
                error.message = f"rank {rank}: {error.message}"
            self._shared = error
            raise error

    def lost(self, error: Exception) -> OutputError:
        """Returns what to say where the others cannot be reached; there are no further meetings."""
        self._over = True
        if self.group is None:
            given = "RANK, WORLD_SIZE and MASTER_ADDR are set, as torchrun does: unset them to run alone"
            return OutputError(f"the {self.size} ranks did not find each other ({_line(error)}); {given}")
        return OutputError(f"another rank ended, or is out of reach: the output is not finished ({_line(error)})")

    def told(self, error: CkptoolError) -> CkptoolError:
        """Returns what all ranks know, for an error of this rank, which the others meet at their next meeting."""
        if error is self._shared or self._over:
            return error

        def fail() -> None:
            raise error

        try:
            self.together(fail)
        except CkptoolError as found:
            return found if found is self._shared else error
        return error

    def leave(self, error: CkptoolError) -> None:
        """Waits until rank 0 has printed an error that all know: torchrun ends it once another rank has failed."""
        if error is self._shared and not self._over:
            with suppress(CkptoolError):
                self.together(lambda: None)

    def end(self) -> None:
        """Notes that there are no further meetings."""
        self._over = True

    def says(self, error: CkptoolError) -> str | None:
        """Returns what this rank prints of an error; None where rank 0 does."""
        if error is self._shared:
            return str(error) if self.leads else None
        where = f"{error.path}: " if error.path else ""
        return f"{where}rank {self.rank}: {error.message}"

    def _joined(self) -> Any:
        """Returns torch.distributed with the ranks connected. Raises: DependencyError, RuntimeError."""
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # torch would print its own lines of a lost connection
        try:
            import torch.distributed as distributed
        except ImportError:
            raise needs_torch("dividing work over ranks") from None
        if self.group is None:
            from datetime import timedelta

            distributed.init_process_group("gloo", timeout=timedelta(seconds=JOIN))
            self.group = distributed.new_group(backend="gloo", timeout=timedelta(seconds=WAIT))
        return distributed


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


started: World | None = None
"""The ranks among which this process is one; None: it is alone. Only the command line sets it."""

current: World | None = None
"""The ranks over which what is written is divided; None: over none, or no longer."""


def is_other() -> bool:
    """Returns whether another rank says what happens."""
    return started is not None and not started.leads


def of_environment() -> World | None:
    """Returns the ranks that torchrun's variables say, None for fewer than two. Raises: UsageError."""
    given = [os.environ.get(name) for name in ("RANK", "WORLD_SIZE")]
    if None in given or "MASTER_ADDR" not in os.environ:
        return None
    try:
        rank, size = map(int, filter(None, given))
    except ValueError:
        raise UsageError(
            f"RANK and WORLD_SIZE are numbers that torchrun sets, not {given[0]!r}, {given[1]!r}"
        ) from None
    if size < 2:
        return None
    if not 0 <= rank < size:
        raise UsageError(f"RANK is {rank} of WORLD_SIZE {size}: expected a number below it")
    return World(rank, size)
