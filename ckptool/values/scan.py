"""Bytes read once for all that is asked of them: moments, a digest, a checksum, NaN and infinities; on two threads.

A job is one tensor, or one member of a zip. numpy, hashlib and zlib all let go of Python's lock over a block, so
threads help; what is found does not depend on how many there are, nor on which of them did what.
"""

from __future__ import annotations

import hashlib
import os
import threading
import zlib
from collections.abc import Iterator, Sequence
from contextvars import copy_context
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from ckptool.core.tensor import Span, TensorInfo, storage_range
from ckptool.errors import FormatError
from ckptool.io.source import Bytes, Files
from ckptool.values.blocks import storage_blocks, tensor_blocks

if TYPE_CHECKING:
    from ckptool.values.stats import Workspace

THREADS = 4
"""Threads at most; no more than the processor has cores for us. Each takes 2 to 4 MB."""

CHUNK = 1 << 21
"""Bytes read at a time: after each numpy call a thread waits for Python's lock, so calls should not be too short."""

SEGMENT = 1 << 25
"""Bytes of a large tensor that one thread takes at a time, where blocks need not be seen in turn."""

BATCH = 1 << 22
"""Bytes of small jobs that one thread takes at a time, and `MANY` of them at most."""

MANY = 256


@dataclass(slots=True)
class Job:
    """What to read, and what to find out. ``crc32`` is that of the bytes, ``digest`` the sha256 with ``head`` first.

    ``error`` is why the bytes could not be read, where the job was told to say so instead of raising.
    """

    source: TensorInfo | Span
    moments: bool = False
    special: bool = False
    head: bytes | None = None
    checksum: bool = False
    lenient: bool = False
    found_moments: Any = None
    found_special: tuple[int, int] = (0, 0)
    digest: str | None = None
    crc32: int | None = None
    error: str | None = None
    nbytes: int = field(init=False)

    def __post_init__(self) -> None:
        self.nbytes = self.source.nbytes


Piece = tuple[Job, int, int]
"""Bytes of a job: from, and how many; all of it, if -1."""

Found = tuple[Any, tuple[int, int]]
"""What one piece gave: moments (None if not asked for), NaN and infinities."""


def read(jobs: Sequence[Job], files: Files, threads: int | None = None) -> None:
    """Reads every job's bytes once, and puts what was found into it; the progress of ``files`` is told the bytes read.

    Raises: FormatError where a file is not what it claims, but for lenient jobs; UnreadableError.
    """
    units = list(_units(jobs))
    parts: dict[int, list[Found]] = {id(job): [None] * count for job, count in _counts(units)}  # type: ignore[list-item]
    total = sum(_nbytes(piece) for unit in units for piece, _ in unit)
    threads = min(threads or min(THREADS, _cores()), len(units)) if total > BATCH else 1
    if threads <= 1:
        worker = _Worker(files)
        for unit in units:
            worker.do(unit, parts)
    else:
        _together(units, parts, files, threads)
    for job in jobs:
        _join(job, parts[id(job)])


Unit = list[tuple[Piece, int]]
"""Pieces that one thread takes at a time, each with its number among its job's."""


def _units(jobs: Sequence[Job]) -> Iterator[Unit]:
    """Yields what threads are handed, the largest first: so that at the end none waits long for another."""
    batch: Unit = []
    size = 0
    for job in sorted(jobs, key=lambda job: job.nbytes, reverse=True):
        nbytes = job.nbytes
        if nbytes > SEGMENT and _is_divisible(job):
            for number, start in enumerate(range(0, nbytes, SEGMENT)):
                yield [((job, start, min(SEGMENT, nbytes - start)), number)]
            continue
        batch.append(((job, 0, -1), 0))
        size += nbytes
        if size >= BATCH or len(batch) == MANY:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _counts(units: Sequence[Unit]) -> Iterator[tuple[Job, int]]:
    """Yields every job and how many pieces it has; the last word on a job counts."""
    for unit in units:
        for (job, _, _), number in unit:
            yield job, number + 1


def _nbytes(piece: Piece) -> int:
    job, _, nbytes = piece
    return nbytes if nbytes >= 0 else job.nbytes


def _is_divisible(job: Job) -> bool:
    """Returns whether a job's pieces may be read apart: what is found does not hang on their order, and they lie so."""
    tensor = job.source
    if job.head is not None or job.checksum or not isinstance(tensor, TensorInfo):
        return False
    found = storage_range(tensor)
    return found is not None and found[0].span.member != "deflated" and found[0].span.memory is None


def _join(job: Job, parts: Sequence[Found]) -> None:
    """Puts the pieces of a job together, in their order."""
    if job.error is not None:
        return
    job.found_special = (sum(special[0] for _, special in parts), sum(special[1] for _, special in parts))
    if job.moments:
        job.found_moments = parts[0][0]
        for moments, _ in parts[1:]:
            job.found_moments.add(moments)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Worker:
    """One thread's files and memory."""

    def __init__(self, files: Files) -> None:
        self.files = files
        self.space: Workspace | None = None

    def do(self, unit: Unit, parts: dict[int, list[Found]]) -> None:
        for (job, start, nbytes), number in unit:
            parts[id(job)][number] = self._read(job, start, nbytes)

    def _read(self, job: Job, start: int, nbytes: int) -> Found:
        spans = [job.source] if isinstance(job.source, Span) else [one.span for one in job.source.storages()]
        for span in spans:  # that a file was changed meanwhile is nothing that a lenient job may keep to itself
            if span.memory is None:
                self.files.get(span)
        if not job.lenient:
            return self._see(job, start, nbytes)
        try:
            return self._see(job, start, nbytes)
        except FormatError as error:
            job.error = error.message
            return None, (0, 0)

    def _see(self, job: Job, start: int, nbytes: int) -> Found:
        dtype = job.source.dtype if isinstance(job.source, TensorInfo) else ""
        moments = self._measured(dtype) if job.moments else None
        digest = None if job.head is None else hashlib.sha256(job.head)
        crc = nan = inf = 0
        for block in self._blocks(job.source, start, nbytes):
            if job.checksum:
                crc = zlib.crc32(block, crc)
            if digest is not None:
                digest.update(block)
            if moments is not None and self.space is not None:
                moments.add(self.space.moments(dtype, block))
            elif job.special:
                from ckptool.values.codec import count_special

                found = count_special(dtype, block)
                nan, inf = nan + found[0], inf + found[1]
        if job.checksum:
            job.crc32 = crc
        if digest is not None:
            job.digest = digest.hexdigest()
        if moments is not None and job.special:
            nan, inf = moments.nan, moments.inf
        return moments, (nan, inf)

    def _measured(self, dtype: str) -> Any:
        from ckptool.values.stats import Moments, Workspace

        self.space = self.space or Workspace()
        return Moments()

    def _blocks(self, source: TensorInfo | Span, start: int, nbytes: int) -> Iterator[Bytes]:
        if isinstance(source, Span):
            return self.files.blocks(source)
        found = storage_range(source)
        if nbytes < 0 or found is None:
            return tensor_blocks(source, self.files)
        storage, first, swap = found
        return storage_blocks(storage, self.files, first + start, nbytes, swap)


class _Stopped(Exception):
    """Ends a thread whose work nobody waits for any more."""


def _together(units: Sequence[Unit], parts: dict[int, list[Found]], files: Files, threads: int) -> None:
    """Has threads take units until there are none; raises what the first to fail raised, or an interrupt, at once."""
    events: SimpleQueue[int | BaseException | None] = SimpleQueue()
    stop = threading.Event()
    lock = threading.Lock()
    left = iter(units)
    progress = files.progress

    def tell(nbytes: int) -> None:
        if stop.is_set():
            raise _Stopped
        if progress is not None:
            events.put(nbytes)

    def work() -> None:
        try:
            worker = _Worker(files.beside(tell))
            while not stop.is_set():
                with lock:
                    unit = next(left, None)
                if unit is None:
                    break
                worker.do(unit, parts)
            events.put(None)
        except BaseException as error:  # to be raised where it was called from
            events.put(error)

    # Each in a context of its own: the limits that hold here.
    running = [threading.Thread(target=copy_context().run, args=(work,), daemon=True) for _ in range(threads)]
    try:
        for thread in running:
            thread.start()
        ended = 0
        while ended < threads:
            event = events.get()
            if isinstance(event, BaseException):
                raise event
            if event is None:
                ended += 1
            elif progress is not None:
                progress(event)
    finally:
        stop.set()
        for thread in running:
            if thread.ident is not None:
                thread.join()
