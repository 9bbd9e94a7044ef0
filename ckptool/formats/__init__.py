"""What we read and write: one file per format, and here one row for each.

A format's module has ``matches(probe)`` (by content, never by name) and ``read(probe)``; one that can be written also
has ``write`` and ``check``, which raises what `write` would and writes nothing, and may have ``prove``, which asks the
reference library for its opinion of a finished file. The protocols below say it in types.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple, cast

from ckptool.core.checkpoint import Checkpoint
from ckptool.errors import CkptoolError, DependencyError, UsageError
from ckptool.io.probe import Probe

if TYPE_CHECKING:
    from typing import Protocol

    from ckptool.io.output import Output
    from ckptool.io.source import Files

    Open = Callable[[str], Checkpoint]
    MapLocation = Callable[[str], str]

    class Reader(Protocol):
        """What the module of a format that is one file has."""

        def matches(self, probe: Probe) -> bool: ...
        def read(self, probe: Probe) -> Checkpoint: ...

    class DirectoryReader(Protocol):
        """What the module of a format of several files has: ``read`` is handed what opens each of them."""

        def matches(self, probe: Probe) -> bool: ...
        def read(self, probe: Probe, open_: Open) -> Checkpoint: ...

    class Writer(Protocol):
        """What the module of a format that is one file has if it can be written.

        ``write`` returns what was left out; ``check`` that, and about how many bytes `write` would write.
        """

        def write(
            self, checkpoint: Checkpoint, output: Output, files: Files, map_location: MapLocation | None
        ) -> tuple[str, ...]: ...
        def check(self, checkpoint: Checkpoint, map_location: MapLocation | None) -> tuple[tuple[str, ...], int]: ...

    class Written(Protocol):
        """What became of a directory."""

        @property
        def left_out(self) -> tuple[str, ...]: ...
        @property
        def nbytes(self) -> int: ...
        @property
        def notes(self) -> tuple[str, ...]: ...

    class DirectoryWriter(Protocol):
        """What the module of a format of several files has if it can be written.

        ``verify`` is called with the paths of the finished files before they get their names, which `is_ours` knows.
        """

        def write(
            self,
            checkpoint: Checkpoint,
            directory: str,
            files: Files,
            map_location: MapLocation | None,
            *,
            max_shard_size: int,
            force: bool,
            fsync: bool,
            verify: Callable[[Sequence[str]], None] | None,
            progress: Callable[[int], None] | None,
        ) -> Written: ...
        def check(
            self, checkpoint: Checkpoint, directory: str, *, max_shard_size: int, force: bool
        ) -> tuple[tuple[str, ...], int]: ...
        def is_ours(self, name: str) -> bool: ...


class Holds(NamedTuple):
    """What a file can hold beside a state_dict's tensors.

    ``tree``: everything that the checkpoint holds; else what is no weight is left out. ``ties``: that names share
    memory. ``metadata``: texts under names. ``devices``: where each tensor was.
    """

    tree: bool = False
    ties: bool = False
    metadata: bool = False
    devices: bool = False


class Format(NamedTuple):
    """A format. ``name`` is what a user calls it, ``label`` what `Checkpoint.format` says of a file in it.

    A file is handed to the module if it has one of ``magic`` at byte ``at``, and ``named`` in its name; a directory if
    ``is_directory``: then it is written as one, too. ``suffixes`` stand for the format when writing; ``ending`` is what
    an output's name ends with where the user gives none (none: it cannot be written). ``family`` is the format whose
    suffixes stand for this one too, and which it is written in where it cannot be itself. ``extra`` is what to install
    of ckptool for a library that it needs.
    """

    name: str
    label: str
    module: str
    magic: tuple[bytes, ...]
    at: int = 0
    named: str = ""
    is_directory: bool = False
    suffixes: tuple[str, ...] = ()
    ending: str = ""
    holds: Holds = Holds()
    family: str = ""
    extra: str = ""

    @property
    def writes(self) -> bool:
        """Returns whether it can be written."""
        return bool(self.ending)

    def may_be(self, probe: Probe) -> bool:
        """Returns whether its module is to be asked."""
        if probe.is_directory:
            return self.is_directory
        return self.named in probe.name and probe.head.startswith(self.magic, self.at)

    @property
    def written_as(self) -> str:
        """Returns the name of the format that what is read here is written in unless the user wants another; or ""."""
        return self.name if self.writes else self.family

    def read(self, probe: Probe, open_: Open) -> Checkpoint | None:
        """Returns the checkpoint, None if it is in another format. Raises: CkptoolError."""
        if self.is_directory:
            several = cast("DirectoryReader", self._import())
            return several.read(probe, open_) if several.matches(probe) else None
        single = cast("Reader", self._import())
        return replace(single.read(probe), format=self.label) if single.matches(probe) else None

    def writer(self) -> Writer:
        """Returns the module of a format that is one file."""
        return cast("Writer", self._import())

    def directory_writer(self) -> DirectoryWriter:
        """Returns the module of a format of several files."""
        return cast("DirectoryWriter", self._import())

    def prove(self, path: str) -> None:
        """Has the reference library look at a finished file, if there is one. Raises: FormatError."""
        prove = getattr(self._import(), "prove", None)
        if prove is not None:
            prove(path)

    def _import(self) -> object:
        try:
            return importlib.import_module(self.module)
        except ModuleNotFoundError as error:
            if not self.extra:
                raise
            needs = f"{self.label} needs {error.name}, which is not installed"
            raise DependencyError(f"{needs}: pip install 'ckptool[{self.extra}]'") from error


ZIP = b"PK\x03\x04"
JSON = (b"{", b" ", b"\t", b"\r", b"\n")
WHOLE = Holds(tree=True, ties=True, devices=True)

FORMATS = (
    Format(
        "torch", "torch-zip", "ckptool.formats.torch_zip", (ZIP,), ending=".pth", holds=WHOLE,
        suffixes=(".pth", ".pt", ".bin", ".ckpt", ".pyth", ".pth.tar", ".pt.tar", ".tar"),
    ),
    Format(
        "torch-legacy", "torch-legacy", "ckptool.formats.torch_legacy", (b"\x80", b"L"),
        ending=".legacy.pth", holds=WHOLE, family="torch",
    ),
    Format(
        "safetensors", "safetensors", "ckptool.formats.safetensors", JSON, 8, suffixes=(".safetensors",),
        ending=".safetensors", holds=Holds(ties=True, metadata=True),
    ),
    Format(
        "torch-tar", "torch-tar", "ckptool.formats.torch_tar", (b"ustar",), 257, holds=WHOLE, family="torch",
    ),
    Format("npz", "npz", "ckptool.formats.npz", (ZIP,), suffixes=(".npz",), ending=".npz"),
    Format("npy", "npy", "ckptool.formats.npz", (b"\x93NUMPY",)),
    Format(
        "sharded", "hf-sharded", "ckptool.formats.sharded", JSON, named=".index", is_directory=True,
        ending="-sharded", holds=Holds(ties=True, metadata=True, devices=True),
    ),
    Format("pickle", "pickle", "ckptool.formats.plain_pickle", (b"",), holds=WHOLE, family="torch"),
)  # fmt: skip
"""The formats, in the order in which those that may be asked of one path are asked; a plain pickle has no mark."""

SHARD_SIZE = 5_000_000_000
"""Bytes of tensors in one shard unless another limit is given: huggingface_hub's default."""


def read(path: str) -> Checkpoint:
    """Returns the checkpoint at a path: a file, an index, or a directory; headers only. Raises: CkptoolError."""
    with Probe(path) as probe:
        try:
            return _read(probe)
        except CkptoolError as error:
            error.path = error.path or path
            raise


def _read(probe: Probe) -> Checkpoint:
    if probe.is_directory:  # another tool's may hold files that look like weights: its marks come first
        from ckptool.formats.unknown import refuse_layout

        refuse_layout(probe)
    for row in FORMATS:
        if row.may_be(probe) and (found := row.read(probe, read)) is not None:
            return found
    from ckptool.formats.unknown import refusal

    raise refusal(probe)


def names() -> list[str]:
    """Returns what a user calls the formats that can be written."""
    return [row.name for row in FORMATS if row.writes]


def suffixes() -> list[str]:
    """Returns all suffixes that stand for a format when writing."""
    return [suffix for row in FORMATS for suffix in row.suffixes]


def named(name: str) -> Format:
    """Returns the format that can be written under a user's name for it. Raises: UsageError."""
    for row in FORMATS:
        if row.name == name and row.writes:
            return row
    raise UsageError(f"no format {name!r} can be written; there are {', '.join(names())}")


def by_suffix(path: str) -> Format | None:
    """Returns the format that a path's suffix stands for when writing."""
    return next((row for row in FORMATS if path.lower().endswith(row.suffixes)), None)


def writable(path: str, name: str | None = None) -> Format:
    """Returns the format that a user's ``name`` for it, or else a path's suffix, means. Raises: UsageError."""
    row = by_suffix(path) if name is None else named(name)
    if row is None:
        raise UsageError(f"no format has this suffix; known: {', '.join(suffixes())}", path)
    return row


def labelled(label: str) -> Format | None:
    """Returns the format of a checkpoint by its `Checkpoint.format`; None of one that was never in a file."""
    return next((row for row in FORMATS if row.label == label), None)
