"""The formats: one module for each, and here one row of a table for each.

A format's module has ``matches(probe)`` (by content, never by name) and ``read(probe)``. One that can be written also
has ``write``, and ``check``, which raises what `write` would and writes nothing. It may have ``prove``, which has the
reference library read a finished file. The protocols below give the types.
"""

from __future__ import annotations

import gc
import importlib
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from ckptool.core.checkpoint import Checkpoint
from ckptool.errors import CkptoolError, DependencyError, OutputError, UsageError, near
from ckptool.io import files, paths
from ckptool.io.probe import Probe
from ckptool.io.source import Source

if TYPE_CHECKING:
    from typing import Protocol

    from ckptool.core.tensor import TensorInfo
    from ckptool.io.files import Files
    from ckptool.io.output import Output
    from ckptool.io.targets import SetOptions

    class Open(Protocol):
        """What opens a file of several: its path, and what opens that if a part is meant (a `Section`)."""

        def __call__(self, path: str, opener: Callable[[str], Source] = ...) -> Checkpoint: ...

    MapLocation = Callable[[str], str]

    class Reader(Protocol):
        """The module of a format. ``read`` of a format of several files also takes what opens each of them."""

        def matches(self, probe: Probe) -> bool: ...

        read: Callable[..., Checkpoint]

    class Writer(Protocol):
        """The module of a single-file format that can be written.

        ``write`` returns what was left out; ``check`` that, and about how many bytes `write` would write.
        """

        def write(
            self, checkpoint: Checkpoint, output: Output, files: Files, map_location: MapLocation | None
        ) -> tuple[str, ...]: ...
        def check(self, checkpoint: Checkpoint, map_location: MapLocation | None) -> tuple[tuple[str, ...], int]: ...

    class DirectoryWriter(Protocol):
        """The module of a format of several files that can be written.

        ``write`` returns what was left out, the bytes of all files, and notes; ``check`` that without writing.
        ``kind`` is the row's. ``write`` calls ``compare`` with the tensors meant and those that ``open_`` reads in the
        finished staging files, before they are renamed. `names_for` returns the names that `write` gives.
        """

        def write(
            self,
            checkpoint: Checkpoint,
            directory: str,
            files: Files,
            map_location: MapLocation | None,
            open_: Open,
            options: SetOptions,
            *,
            compare: Callable[[Mapping[Any, TensorInfo], Mapping[Any, TensorInfo]], None] | None,
            progress: Callable[[int], None] | None,
        ) -> tuple[tuple[str, ...], int, tuple[str, ...]]: ...
        def check(
            self,
            checkpoint: Checkpoint,
            directory: str,
            map_location: MapLocation | None,
            options: SetOptions,
        ) -> tuple[tuple[str, ...], int, tuple[str, ...]]: ...
        def names_for(self, checkpoint: Checkpoint, shard_name: str | None, kind: str) -> Any: ...


class Holds(NamedTuple):
    """What a file can hold besides a state_dict's tensors.

    ``tree``: the whole tree; without it, everything but the tensors is left out. ``ties``: that names share memory.
    ``metadata``: a map of strings to strings. ``devices``: the device of each tensor.
    """

    tree: bool = False
    ties: bool = False
    metadata: bool = False
    devices: bool = False


class Format(NamedTuple):
    """A format. ``name`` is what ``--to`` takes, ``label`` is `Checkpoint.format` of a file in it.

    The module is asked about a file that has one of ``magic`` at byte ``at``, and one of ``named`` in its name;
    and about directories if ``is_directory`` (if it can be written, as one too). ``suffixes`` select the format when
    writing; ``ending`` is the suffix of an output whose name the user does not give (empty: it cannot be written).
    ``family`` is the format whose suffixes select this one too, and which is written where this one cannot be.
    ``extra`` is the extra of ckptool that installs a library which the module needs. ``kind`` tells the module which
    of its formats is written; ``several`` is the format of a directory of such files. ``by_ranks``: several ranks of
    torchrun can write it together. Without ``named`` the row is for
    writing only, and another one reads what it writes.
    """

    name: str
    label: str
    module: str
    magic: tuple[bytes, ...]
    at: int = 0
    named: tuple[str, ...] = ("",)
    is_directory: bool = False
    suffixes: tuple[str, ...] = ()
    ending: str = ""
    holds: Holds = Holds()
    family: str = ""
    extra: str = ""
    kind: str = ""
    several: str = ""
    by_ranks: bool = False

    @property
    def writes(self) -> bool:
        """Returns whether it can be written."""
        return bool(self.ending)

    def may_be(self, probe: Probe) -> bool:
        """Returns whether the module needs to look at it."""
        if probe.is_directory:
            return self.is_directory and bool(self.named)
        return any(part in probe.name for part in self.named) and probe.head.startswith(self.magic, self.at)

    @property
    def written_as(self) -> str:
        """Returns the name of the format that such a file is written in by default; "" if there is none."""
        return self.name if self.writes else self.family

    def read(self, probe: Probe, open_: Open) -> Checkpoint | None:
        """Returns the checkpoint, None if it is in another format. Raises: CkptoolError."""
        module = cast("Reader", self._import())
        if not module.matches(probe):
            return None
        if self.is_directory:
            return module.read(probe, open_)
        found = replace(module.read(probe), format=self.label)
        if probe.end == probe.size:
            return found
        from ckptool.formats.unknown import following

        return replace(found, trailing=following(probe.file, probe.file.begin + probe.end))

    def writer(self) -> Writer:
        """Returns the module of a single-file format."""
        return cast("Writer", self._import())

    def directory_writer(self) -> DirectoryWriter:
        """Returns the module of a format of several files."""
        return cast("DirectoryWriter", self._import())

    def prove(self, path: str) -> None:
        """Has the reference library, if the format has one, read a finished local file. Raises: FormatError."""
        prove = getattr(self._import(), "prove", None)
        if prove is not None and not paths.is_url(path):  # these libraries open no URL
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
        "dcp", "dcp", "ckptool.directories.dcp", (b"",), named=(".metadata", ".distcp"), is_directory=True,
        ending="-dcp", holds=Holds(tree=True, devices=True), by_ranks=True,
    ),
    Format(
        "dcp-hf", "dcp-hf", "ckptool.directories.dcp_hf", JSON, 8, named=("shard-",), is_directory=True,
        holds=Holds(metadata=True), family="safetensors",
    ),
    Format(
        "deepspeed", "deepspeed", "ckptool.directories.deepspeed", (), is_directory=True, holds=WHOLE, family="torch",
    ),
    Format(
        "torch", "torch-zip", "ckptool.formats.pytorch.zip", (ZIP,), ending=".pth", holds=WHOLE, several="sharded-bin",
        suffixes=(".pth", ".pt", ".bin", ".ckpt", ".pyth", ".pth.tar", ".pt.tar", ".tar"),
    ),
    Format(
        "torch-legacy", "torch-legacy", "ckptool.formats.pytorch.legacy", (b"\x80", b"L", b"c", b"("),
        ending=".legacy.pth", holds=WHOLE, family="torch",
    ),
    Format(
        "safetensors", "safetensors", "ckptool.formats.safetensors", JSON, 8, suffixes=(".safetensors",),
        ending=".safetensors", holds=Holds(ties=True, metadata=True), several="sharded",
    ),
    Format(
        "torch-tar", "torch-tar", "ckptool.formats.pytorch.tar", (b"ustar",), 257, holds=WHOLE, family="torch",
    ),
    Format("torchscript", "torchscript", "ckptool.formats.pytorch.script", (ZIP,), holds=WHOLE, family="torch"),
    Format("pt2", "pt2", "ckptool.formats.pytorch.exported", (ZIP,), holds=WHOLE, family="torch"),
    Format("torch.package", "torch.package", "ckptool.formats.pytorch.package", (ZIP,), holds=WHOLE, family="torch"),
    Format("bundle", "bundle", "ckptool.directories.bundle", (ZIP,), is_directory=True, holds=WHOLE, family="torch"),
    Format("npz", "npz", "ckptool.formats.npz", (ZIP, b"PK\x05\x06"), suffixes=(".npz",), ending=".npz"),
    Format("npy", "npy", "ckptool.formats.npz", (b"\x93NUMPY",)),
    Format("gguf", "gguf", "ckptool.formats.gguf", (b"GGUF",), holds=Holds(metadata=True)),
    Format(
        "megatron", "megatron", "ckptool.directories.parallel.megatron", (), is_directory=True, holds=WHOLE,
        family="torch",
    ),
    Format(
        "consolidated", "consolidated", "ckptool.directories.parallel.consolidated", (), is_directory=True, holds=WHOLE,
        family="torch",
    ),
    Format(
        "fsdp-ranks", "fsdp-ranks", "ckptool.directories.parallel.fsdp_ranks", (), is_directory=True, holds=WHOLE,
        family="torch",
    ),
    Format(
        "sharded", "hf-sharded", "ckptool.directories.sharded", JSON, named=(".index",), is_directory=True,
        ending="-sharded", holds=Holds(ties=True, metadata=True), kind="safetensors", by_ranks=True,
    ),
    Format(
        "sharded-bin", "hf-sharded", "ckptool.directories.sharded", (), named=(), is_directory=True,
        ending="-sharded-bin", holds=Holds(ties=True, devices=True), kind="bin",
    ),
    Format("lock", "lock", "ckptool.formats.lock", (b"# ckptool lock ", b"{")),
    Format("joblib", "joblib", "ckptool.formats.joblib", (b"\x80",), holds=WHOLE, family="torch"),
    Format("pickle", "pickle", "ckptool.formats.pytorch.plain_pickle", (b"",), holds=WHOLE, family="torch"),
)  # fmt: skip
"""The formats, in the order in which they are tried. A plain pickle has no magic number, so it is last."""

SHARD_SIZE = 5_000_000_000
"""Bytes of tensors in one shard unless another limit is given: huggingface_hub's default."""


def read(path: str, opener: Callable[[str], Source] = files.opened) -> Checkpoint:
    """Returns the checkpoint at a path: a file, an index, or a directory; headers only. Raises: CkptoolError."""
    enabled = gc.isenabled()
    gc.disable()  # the collector would visit all new containers again and again: twice the time at 100,000 keys
    try:
        with Probe(path, opener) as probe:
            try:
                return _read(probe)
            except CkptoolError as error:
                error.path = error.path or path
                raise
    finally:
        if enabled:
            gc.enable()


def read_at(path: str, root: Any) -> tuple[Checkpoint, Any]:
    """Returns (checkpoint at a path, root); of the directory in it that ``root`` names, where that is no root: None."""
    from ckptool.core.roots import steps

    opened = read(path)
    inner = paths.join(path, root) if isinstance(root, str) and root == os.path.basename(root) != "" else ""
    if inner and files.is_directory(inner) and root not in steps(opened.tree):
        return read(inner), None
    return opened, root


def _read(probe: Probe) -> Checkpoint:
    for row in FORMATS:
        if row.may_be(probe) and (found := row.read(probe, read)) is not None:
            return found
    from ckptool.formats.unknown import refusal

    raise refusal(probe)


def lock_text(checkpoint: Checkpoint, tensors: Mapping[str, TensorInfo], hashes: Mapping[str, str | None]) -> str:
    """Returns the lock file of these tensors of a checkpoint; ``hashes``: {key: sha256}, as far as they are known."""
    from ckptool.formats import lock

    return lock.text(checkpoint, tensors, hashes)


def refuse_no_lock(path: str) -> None:
    """Raises OutputError if there is a file at ``path`` that is no lock file."""
    from ckptool.formats import lock

    if files.is_file(path):
        with Probe(path) as probe:
            if not lock.matches(probe):
                raise OutputError("exists and is no lock file: --update-lock overwrites nothing else", path)


def names() -> list[str]:
    """Returns the names of the formats that can be written."""
    return [row.name for row in FORMATS if row.writes]


def suffixes() -> list[str]:
    """Returns all suffixes that select a format when writing."""
    return [suffix for row in FORMATS for suffix in row.suffixes]


def named(name: str) -> Format:
    """Returns the writable format of that name. Raises: UsageError."""
    for row in FORMATS:
        if row.name == name and row.writes:
            return row
    raise UsageError(f"no format {name!r} can be written{near(name, names())}; there are {', '.join(names())}")


def of_directory(path: str) -> Format:
    """Returns the format that is written into a directory unless another one is named: what Hugging Face loads.

    A directory that holds a distributed checkpoint keeps its format: the other one holds weights only.
    """
    distributed = named("dcp")
    if files.is_directory(path):
        with Probe(path) as probe:
            if cast("Reader", distributed.directory_writer()).matches(probe):
                return distributed
    return named("sharded")


def by_suffix(path: str) -> Format | None:
    """Returns the format that a path's suffix selects when writing."""
    return next((row for row in FORMATS if path.lower().endswith(row.suffixes)), None)


def is_directory(path: str) -> bool:
    """Returns whether an output path is that of a directory: it ends in a slash, or there is one without a suffix."""
    from ckptool.io import targets

    slashes = tuple(filter(None, (os.sep, os.altsep)))
    return path.endswith(slashes) or (by_suffix(path) is None and targets.is_directory(path))


def writable(path: str, name: str | None = None, source: str = "") -> Format:
    """Returns the format called ``name``, or without a name the one that the path says. Raises: UsageError.

    ``source`` is the format of the input if that is a directory: then a path that does not end as a file's name is one
    too, and several files of the format are written into it. But one file, if only that holds the tree of the input.
    """
    is_file = by_suffix(path) is not None or re.search(r"\.[a-zA-Z]\w*$", path) is not None
    if name is not None:
        row = named(name)
        tree = row.holds.tree and (labelled(source) or row).holds.tree
        return named(row.several) if row.several and source and not is_file and not tree else row
    found = of_directory(path) if is_directory(path) or (source and not is_file) else by_suffix(path)
    if found is None:
        raise UsageError(f"no format has this suffix; known: {', '.join(suffixes())}, and / for a directory", path)
    return found


def has_devices(label: str) -> bool:
    """Returns whether a checkpoint with this `Checkpoint.format` says on which device each tensor was."""
    rows = [row for row in FORMATS if row.label == label]
    return not rows or any(row.holds.devices for row in rows)  # none: it was made in memory


def labelled(label: str) -> Format | None:
    """Returns the format with this `Checkpoint.format`; None for a checkpoint that was made in memory."""
    return next((row for row in FORMATS if row.label == label), None)
