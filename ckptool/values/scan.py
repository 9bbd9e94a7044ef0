"""Reads tensors and zip members once for moments, sha256, CRC-32 and counts of NaN and infinity; on several threads.

A job is one tensor, or one member of a zip. numpy, hashlib and zlib all release the GIL over a block, so threads help.
Results do not depend on the number of threads, nor on which of them read what.
"""

from __future__ import annotations

import hashlib
import threading
import zlib
from collections.abc import Iterator, Sequence
from contextvars import copy_context
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from ckptool.core.tensor import Span, TensorInfo, storage_range
from ckptool.errors import FormatError
from ckptool.io import system
from ckptool.io.files import Files
from ckptool.io.source import Bytes
from ckptool.values.blocks import storage_blocks, tensor_blocks

if TYPE_CHECKING:
    from ckptool.values.stats import Workspace

THREADS = 4
"""Most threads; fewer if this process may use fewer cores. Each needs 2 to 4 MB."""

CHUNK = 1 << 21
"""Bytes read at a time: after each numpy call a thread waits for the GIL, so calls should not be too short."""

SEGMENT = 1 << 25
"""Bytes of a large tensor that one thread takes at a time, where its blocks may be read in any order."""

BATCH = 1 << 22
"""Bytes of small jobs that one thread takes at a time, at most `MANY` jobs."""

MANY = 256


@dataclass(slots=True)
class Job:
    """What to read and compute, and the results. ``digest`` is the sha256 of ``head`` and the bytes.

    ``error`` says why the bytes could not be read, where the job is ``lenient``; others raise. ``sketch`` is given
    every block, in order.
    """

    source: TensorInfo | Span
    moments: bool = False
    special: bool = False
    head: bytes | None = None
    checksum: bool = False
    lenient: bool = False
    sketch: Any = None
    found_moments: Any = None
    found_special: tuple[int, int] = (0, 0)
    digest: str | None = None
    crc32: int | None = None
    error: str | None = None
    nbytes: int = field(init=False)

    def __post_init__(self) -> None:
        self.nbytes = self.source.nbytes


@dataclass(slots=True)
class _Piece:
    """A part of a job for one thread: ``nbytes`` from ``start`` on, or all of it if -1; then what was found in it."""

    job: Job
    start: int = 0
    nbytes: int = -1
    moments: Any = None
    special: tuple[int, int] = (0, 0)


def read(jobs: Sequence[Job], files: Files, threads: int | None = None) -> None:
    """Reads every job's bytes once and sets its results; reports the bytes read to the progress of ``files``.

    Raises: FormatError where a file is not what it claims, but for lenient jobs; UnreadableError.
    """
    units = list(_units(jobs))
    total = sum(job.nbytes for job in jobs)
    threads = min(threads or min(THREADS, system.cores()), len(units)) if total > BATCH else 1
    if threads <= 1:
        worker = _Worker(files)
        for unit in units:
            worker.read(unit)
    else:
        _together(units, files, threads)
    for unit in units:
        for piece in unit:
            _add(piece)


def _units(jobs: Sequence[Job]) -> Iterator[list[_Piece]]:
    """Yields the pieces that one thread takes at a time; large jobs first, so that no thread waits long at the end."""
    batch: list[_Piece] = []
    size = 0
    for job in sorted(jobs, key=lambda job: job.nbytes, reverse=True):
        nbytes = job.nbytes
        if nbytes > SEGMENT and _is_divisible(job):
            for start in range(0, nbytes, SEGMENT):
                yield [_Piece(job, start, min(SEGMENT, nbytes - start))]
            continue
        batch.append(_Piece(job))
        size += nbytes
        if size >= BATCH or len(batch) == MANY:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _is_divisible(job: Job) -> bool:
    """Returns whether a job's pieces may be read in any order: no digest or checksum, and a range of a local file."""
    tensor = job.source
    if job.head is not None or job.checksum or job.sketch is not None or not isinstance(tensor, TensorInfo):
        return False
    found = storage_range(tensor)
    return found is not None and found[0].span.member != "deflated" and found[0].span.memory is None


def _add(piece: _Piece) -> None:
    """Adds what was found in a piece to the results of its job; pieces come in the order of their bytes."""
    job = piece.job
    if job.error is not None:
        return
    job.found_special = (job.found_special[0] + piece.special[0], job.found_special[1] + piece.special[1])
    if job.found_moments is None:
        job.found_moments = piece.moments
    else:
        job.found_moments.add(piece.moments)


class _Worker:
    """One thread's open files and working memory."""

    def __init__(self, files: Files) -> None:
        self.files = files
        self.space: Workspace | None = None

    def read(self, unit: Sequence[_Piece]) -> None:
        for piece in unit:
            source = piece.job.source
            # Outside the `try`: even a lenient job must fail if a file was changed since it was opened.
            for span in [source] if isinstance(source, Span) else [one.span for one in source.storages()]:
                if span.memory is None:
                    self.files.get(span)
            try:
                self._read(piece)
            except FormatError as error:
                if not piece.job.lenient:
                    raise
                piece.job.error = error.message

    def _read(self, piece: _Piece) -> None:
        job = piece.job
        dtype = job.source.dtype if isinstance(job.source, TensorInfo) else ""
        space: Workspace | None = None
        if job.moments:
            from ckptool.values.histogram import MANY
            from ckptool.values.stats import Moments, Workspace

            sampled = isinstance(job.source, TensorInfo) and job.source.numel > MANY
            space = self.space = self.space or Workspace()
            piece.moments = Moments()
        digest = None if job.head is None else hashlib.sha256(job.head)
        crc = nan = inf = 0
        for block in self._blocks(job.source, piece.start, piece.nbytes):
            if job.checksum:
                crc = zlib.crc32(block, crc)
            if digest is not None:
                digest.update(block)
            if job.sketch is not None:
                job.sketch.add(block)
            if space is not None:
                piece.moments.add(space.moments(dtype, block, sampled))
            elif job.special:
                from ckptool.values.codec import count_special

                found = count_special(dtype, block)
                nan, inf = nan + found[0], inf + found[1]
        if job.checksum:
            job.crc32 = crc
        if digest is not None:
            job.digest = digest.hexdigest()
        piece.special = (piece.moments.nan, piece.moments.inf) if job.moments else (nan, inf)

    def _blocks(self, source: TensorInfo | Span, start: int, nbytes: int) -> Iterator[Bytes]:
        if isinstance(source, Span):
            return self.files.blocks(source)
        found = storage_range(source)
        if nbytes < 0 or found is None:
            return tensor_blocks(source, self.files)
        storage, first, swap = found
        return storage_blocks(storage, self.files, first + start, nbytes, swap)


class _Stopped(Exception):
    """Ends a thread after another one failed."""


def _together(units: Sequence[list[_Piece]], files: Files, threads: int) -> None:
    """Reads all units on several threads; raises what the first to fail raised, or an interrupt, at once."""
    events: SimpleQueue[int | BaseException | None] = SimpleQueue()
    stop = threading.Event()
    lock = threading.Lock()
    waiting = iter(units)
    progress = files.progress

    def report(nbytes: int) -> None:
        if stop.is_set():
            raise _Stopped
        if progress is not None:
            events.put(nbytes)

    def work() -> None:
        try:
            worker = _Worker(files.beside(report))
            while not stop.is_set():
                with lock:
                    unit = next(waiting, None)
                if unit is None:
                    break
                worker.read(unit)
            events.put(None)
        except BaseException as error:  # raised again in the calling thread
            events.put(error)

    # Each runs in a copy of this context, which holds the limits in force.
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
