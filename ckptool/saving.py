"""Saving a checkpoint: checks the path, streams to a staging file, verifies it, renames it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ckptool import formats
from ckptool.core import aliases
from ckptool.core.checkpoint import Checkpoint, detached
from ckptool.core.pickled_names import beyond_tensors
from ckptool.core.tensor import Derived, Opaque, Storage, TensorInfo
from ckptool.core.tree import Global, key_text, nodes, path_text
from ckptool.errors import CkptoolError, FormatError, LossError, OutputError, UsageError, listed, near
from ckptool.io import tally
from ckptool.io.files import Files, identity, look_again, names_in, opened, same_place
from ckptool.io.output import EXISTS, Output
from ckptool.io.paths import basename, dirname, given, is_url
from ckptool.io.targets import SetOptions, create, found_at, is_stream, write_stream
from ckptool.ranks import world as ranks
from ckptool.text import plural
from ckptool.values.blocks import changed_values, same_bytes

if TYPE_CHECKING:
    from ckptool.directories.names import Names

MapLocation = str | Mapping[str, str] | Callable[[str], str] | None

Progress = Callable[[int], None]
"""Called with the number of bytes just read or written."""


@dataclass(frozen=True, slots=True)
class SaveOptions:
    """How a checkpoint is written, whatever it holds.

    ``to``: the format (one of `formats.names`); None means that of the path's suffix. ``force`` overwrites.
    ``in_place`` allows the path to be one of the inputs. ``map_location`` maps device tags: one for all, a dict, or a
    callable tag -> tag. ``max_shard_size`` counts bytes of tensors, for shards. ``verify`` reads the staging
    file back, and compares every tensor's bytes with the checkpoint. ``fsync`` waits for the disk.
    ``hash_in_name`` appends the first 8 hex digits of the file's sha256 to the stem of its name. For shards,
    ``shard_name`` begins the files' names instead of the input's family (``model``), and ``with_files`` copies the
    small files beside the input (config.json, tokenizer). ``world_size``: `check` plans for that many ranks.
    """

    to: str | None = None
    force: bool = False
    in_place: bool = False
    map_location: MapLocation = None
    max_shard_size: int = formats.SHARD_SIZE
    verify: bool = False
    fsync: bool = True
    hash_in_name: bool = False
    shard_name: str | None = None
    with_files: bool = False
    world_size: int | None = None

    @property
    def overwrites(self) -> bool:
        return self.force or self.in_place

    def of_files(self, row: formats.Format) -> SetOptions:
        """Returns what a format of directories takes for `write` and `check`."""
        count = self.world_size or (ranks.current.size if ranks.current and row.by_ranks else 1)
        return SetOptions(
            row.kind, self.max_shard_size, self.shard_name, self.with_files, self.overwrites, self.in_place, self.fsync,
            count,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Saved:
    """The result of a save: the path, its bytes, what was left out, whether it was verified.

    ``overflowed``, ``saturated`` and ``underflowed`` count, per key, the values that a cast changed in kind (see
    `ckptool.core.dtypes.Changed`). ``notes`` are lines for the report.
    """

    path: str
    nbytes: int
    left_out: tuple[str, ...] = ()
    verified: bool = False
    overflowed: Mapping[str, int] = field(default_factory=dict)
    saturated: Mapping[str, int] = field(default_factory=dict)
    underflowed: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def save(
    checkpoint: Checkpoint,
    path: str | os.PathLike[str],
    options: SaveOptions = SaveOptions(),
    progress: Progress | None = None,
) -> Saved:
    """Writes a checkpoint.

    Streams: memory does not grow with the file. The write is atomic.

    Raises: OutputError if it exists (without ``force``) or is an input, LossError for tensors the format
    cannot hold, IncompleteError if shards are missing, UsageError for an unknown suffix or format.
    """
    url = given(os.fspath(path))
    try:
        row, tags = _refuse(checkpoint, url, options)
        if checkpoint.format == "model":  # as its `state_dict` has it: no parameters
            checkpoint = checkpoint.with_state_dict(detached(checkpoint.state_dict()))
        if options.world_size is not None:
            raise UsageError("--world-size goes with --dry-run: torchrun --nproc-per-node N starts N ranks")
        alone: tuple[str, ...] = ()
        if ranks.current is not None:
            from ckptool.ranks.alike import writes

            divided = row.by_ranks and not is_url(url)
            alone = () if divided else ("written by rank 0 alone: only directories of this machine are divided",)
            if not writes(checkpoint, url, divided, row.name, options.max_shard_size, options.verify):
                return Saved(url, 0)
        write = _save_directory if row.is_directory else _save_file
        _begin(progress, "copy")
        if tally.current is not None:
            by = "as was asked for" if options.to else "by its name"
            tally.current.say(f"{url}: written as {row.name}, {by}")
        with Files() as files:
            files.expect(tensor for _, tensor in checkpoint.tensors())
            saved = write(checkpoint, row, url, options, tags, files, progress)
        saved = replace(
            saved,
            left_out=saved.left_out + _lost(checkpoint, row),
            notes=(
                *saved.notes,
                *alone,
                *files.notes(),
                *_notes(checkpoint, row, url),
                *_untagged(checkpoint, row, options.map_location),
            ),
        )
        return replace(saved, verified=options.verify, **changed_values(checkpoint.state_dict(), files))
    except CkptoolError as error:
        error.path = error.path or url
        raise


def check(checkpoint: Checkpoint, path: str | os.PathLike[str], options: SaveOptions = SaveOptions()) -> Saved:
    """Returns what `save` would, its bytes roughly; writes nothing.

    Raises: as `save` does before its first byte.
    """
    url = given(os.fspath(path))
    try:
        row, tags = _refuse(checkpoint, url, options)
        if options.world_size is not None and is_url(url):
            raise UsageError("--world-size goes with a directory of this machine: rank 0 alone writes to a URL")
        if options.world_size is not None and not row.by_ranks:
            raise UsageError("--world-size goes with --to dcp or --to sharded: several ranks write no other format")
        if row.is_directory:
            left_out, nbytes, notes = row.directory_writer().check(checkpoint, url, tags, options.of_files(row))
        else:
            left_out, nbytes, notes = *row.writer().check(checkpoint, tags), ()
        left_out += _lost(checkpoint, row)
        uncounted = (UNCOUNTED,) if any(map(_is_cast, checkpoint.state_dict().values())) else ()
        return Saved(
            url,
            nbytes,
            left_out,
            notes=(
                *notes,
                *uncounted,
                *_notes(checkpoint, row, url),
                *_untagged(checkpoint, row, options.map_location),
            ),
        )
    except CkptoolError as error:
        error.path = error.path or url
        raise


UNCOUNTED = "a dry run reads no values: it does not count those that a cast makes infinite, saturated or zero"


def _is_cast(tensor: TensorInfo) -> bool:
    """Returns whether values may be rounded to a dtype with a smaller range."""
    source = tensor.source
    if not isinstance(source, Derived):
        return False
    return source.op in ("cast", "dequantize", "mean", "mix", "resample") or any(map(_is_cast, source.inputs))


def _notes(checkpoint: Checkpoint, row: formats.Format, url: str) -> list[str]:
    """Returns notes on the names of the input that act, which the output has or lacks, and on sets beside a file."""
    acting = [name for name, kind in beyond_tensors(checkpoint.names).items() if kind == "acting"]
    carried: dict[str, Any] = {}
    if acting and row.holds.tree:
        kinds = (node if isinstance(node, Global) else type(node) for node in nodes(checkpoint.tree))
        carried = beyond_tensors({(one.module, one.qualname) for one in kinds if isinstance(one, Global)})
    kept, left = [name for name in acting if name in carried], [name for name in acting if name not in carried]
    found = []
    if not row.is_directory and url.endswith((".safetensors", ".bin")):
        from ckptool.directories.sets import beside_file

        found += beside_file(url)
    if kept:
        found.append(
            f"the output carries names that act, for torch.load(weights_only=False) to call: {', '.join(kept)}"
        )
    if left:
        found.append(f"names that act are left out: {', '.join(left)}")
    return found


def _begin(progress: Progress | None, phase: str, passes: int = 1) -> None:
    """Names the phase to a progress that has phases; it reports every byte of the output ``passes`` times."""
    begin = getattr(progress, "begin", None)
    if begin is not None:
        begin(phase, passes)


def _refuse(
    checkpoint: Checkpoint, url: str, options: SaveOptions
) -> tuple[formats.Format, Callable[[str], str] | None]:
    """Makes the checks that are common to all formats; returns the format and the map of device tags."""
    checkpoint.require_whole()
    checkpoint.require_joined()
    checkpoint.require_values("it cannot be written")
    checkpoint.refuse_alike(checkpoint.state_dict())
    tags = _tag_map(options.map_location)
    check_output(url, options, [checkpoint])
    row = formats.writable(url, options.to)
    if checkpoint.format == "model" and row.holds.tree:
        from ckptool.partial.live import refuse_unwritable

        refuse_unwritable(checkpoint)
    if not row.holds.tree:
        _refuse_hidden(checkpoint, "a directory of shards" if row.is_directory else row.name)
    return row, tags


def _save_file(
    checkpoint: Checkpoint,
    row: formats.Format,
    url: str,
    options: SaveOptions,
    tags: Callable[[str], str] | None,
    files: Files,
    progress: Progress | None,
) -> Saved:
    name = _with_digest(url, PENDING) if options.hash_in_name else url
    hashed = options.hash_in_name
    staged = hashed or (options.verify and options.overwrites and bool(found_at(url)))  # nothing is lost if that fails
    with create(name, force=options.overwrites, fsync=options.fsync, staged=staged, hashed=hashed) as output:
        output.path, output.progress = url, progress
        left_out = row.writer().write(checkpoint, output, files, tags)
        files.check()
        output.readers = files.mode
        if options.verify:
            _begin(progress, "verify", 2)  # what was meant is read, and what was written
            _verify(checkpoint, row, output.finished(), files.beside(progress))
        if options.hash_in_name:
            output.rename(_with_digest(url, _sha256(output, progress)[:8]))
        files.close()  # not all systems rename a file that is open, or replace one
        output.commit()
        return Saved(output.path, output.position, left_out)


def _lost(checkpoint: Checkpoint, row: formats.Format) -> tuple[str, ...]:
    """Returns ``untied: b = a`` for each tie of the weights, ``metadata a`` for each entry, that it cannot hold."""
    ties = {} if row.holds.ties else aliases.ties(checkpoint.state_dict())
    entries = {} if row.holds.metadata else aliases.carried(checkpoint.metadata, {})
    metadata = (f"metadata {name}" for name, text in entries.items() if (name, text) != ("format", "pt"))
    return (*(f"untied: {alias} = {kept}" for alias, kept in ties.items()), *metadata)


def _save_directory(
    checkpoint: Checkpoint,
    row: formats.Format,
    url: str,
    options: SaveOptions,
    tags: Callable[[str], str] | None,
    files: Files,
    progress: Progress | None,
) -> Saved:
    def compare(meant: Mapping[Any, TensorInfo], written: Mapping[Any, TensorInfo]) -> None:
        _begin(progress, "verify", 2)
        _compare(meant, written, files.beside(progress))

    left_out, nbytes, notes = row.directory_writer().write(
        checkpoint, url, files, tags, formats.read, options.of_files(row),
        compare=compare if options.verify else None, progress=progress,
    )  # fmt: skip
    return Saved(url, nbytes, left_out, notes=notes)


def _refuse_hidden(checkpoint: Checkpoint, target: str) -> None:
    """Raises LossError for what formats of bare tensors cannot hold: packed parameters, extra state, keys not text."""
    numbers = [
        key
        for key, (path, value) in checkpoint.entries().items()
        if len(path) == 1 and not isinstance(path[0], str) and isinstance(value, TensorInfo)
    ]
    if numbers and not isinstance(checkpoint.at(checkpoint.root), (list, tuple)):
        raise LossError(f"{target} cannot hold keys that are no text: {listed(numbers, 20)} (remap gives them names)")
    if hidden := checkpoint.hidden():
        inside = [f"{key} (an object with {plural(len(inner), 'tensor')})" for key, inner in hidden.items()]
        raise LossError(f"{target} cannot hold {listed(inside, 20)}: filter --exclude leaves it out")


def _verify(checkpoint: Checkpoint, row: formats.Format, path: str, files: Files) -> None:
    """Reads a written file back and compares every tensor with the checkpoint's. Raises: FormatError."""
    look_again(path)
    found = formats.read(path)
    if row.holds.tree:
        _compare(_by_path(checkpoint), _by_path(found), files)
    else:
        _compare(checkpoint.state_dict(), found.state_dict(), files)
    row.prove(path)


def _by_path(checkpoint: Checkpoint) -> dict[Any, TensorInfo]:
    """Returns {path: tensor}. Of keys such as bytes, whose stand-ins are equal to none of another file, the text."""
    found: dict[Any, TensorInfo] = {}
    for path, tensor in checkpoint.tensors():
        at = tuple(step if isinstance(step, (str, int, float, type(None))) else key_text(step) for step in path)
        found[(*at, len(found)) if at in found else at] = tensor
    return found


def _compare(meant: Mapping[Any, TensorInfo], written: Mapping[Any, TensorInfo], files: Files) -> None:
    """Raises FormatError naming every key that is on one side only, or whose bytes differ."""
    lost = [key for key in meant if key not in written]
    wrong = []
    proven: set[tuple[object, object]] = set()  # tied names are written once, and read once
    for key, tensor in written.items():
        pair = (meant[key].view, tensor.view) if key in meant else None
        if pair in proven:
            continue
        with share(files, 2 * tensor.nbytes):
            if pair is None or not _same(meant[key], tensor, files):
                wrong.append(key)
                continue
        proven.add(pair)
    if lost or wrong:
        names = [path_text(key) if isinstance(key, tuple) else key for key in [*lost, *wrong]]
        raise FormatError(f"what was written is not what was meant, and was thrown away: {listed(names)}")


@contextmanager
def share(files: Files, nbytes: int) -> Iterator[None]:
    """Reports exactly ``nbytes`` of progress for the reads inside the block.

    A comparison may read less (a memory map, a difference found at once) or more (what a cast starts from).
    """
    tell, left = files.progress, nbytes
    if tell is None:
        yield
        return

    def part(read: int) -> None:
        nonlocal left
        step = min(read, left)
        left -= step
        tell(step)

    files.progress = part
    try:
        yield
    finally:
        files.progress = tell
    if left:
        tell(left)


def _same(meant: TensorInfo, written: TensorInfo, files: Files) -> bool:
    if isinstance(meant.source, Opaque) or isinstance(written.source, Opaque):
        pairs = zip(meant.parts, written.parts, strict=False)
        return meant.form == written.form and all(_same(one, other, files) for one, other in pairs)
    return same_bytes(meant, written, files)


def _sha256(output: Output, progress: Progress | None = None) -> str:
    """Returns the digest of the finished output, which is read unless it was taken while writing."""
    import hashlib

    _begin(progress, "hash")
    written, digest = output.finished(), output.sha256
    if digest is not None:
        return str(digest.hexdigest())
    digest = hashlib.sha256()
    with opened(written) as file:
        for block in file.blocks(0, file.size):
            digest.update(block)
            if progress is not None:
                progress(len(block))
    return digest.hexdigest()


PENDING = "########"
"""Placeholder in a name for the digest of a file that is not written yet."""


def _with_digest(path: str, digest: str) -> str:
    """Returns the path with the digest appended to the stem, as torchvision does."""
    stem, suffix = split_suffix(path)
    return f"{stem}-{digest}{suffix}"


def split_suffix(path: str) -> tuple[str, str]:
    """Returns (stem, suffix) where the suffix may be one of the known double ones, such as ``.pth.tar``.

    >>> split_suffix("runs/model.pth.tar"), split_suffix("v1.0/model")
    (('runs/model', '.pth.tar'), ('v1.0/model', ''))
    """
    lowered = path.lower()
    for suffix in sorted(formats.suffixes(), key=len, reverse=True):
        if lowered.endswith(suffix) and len(basename(path)) > len(suffix):
            return path[: -len(suffix)], path[-len(suffix) :]
    return os.path.splitext(path)


def sources(checkpoint: Checkpoint) -> set[str]:
    """Returns the paths of the files that a checkpoint's bytes come from, and the path it was opened by."""
    found = {checkpoint.url}
    for node in nodes(checkpoint.tree):
        if isinstance(node, TensorInfo):
            if isinstance(node.source, Storage):
                found.add(node.source.span.url)
            else:
                found.update(storage.span.url for storage in node.storages())
        elif isinstance(node, Storage):
            found.add(node.span.url)
    return found - {""}


def check_output(
    path: str | os.PathLike[str], options: SaveOptions = SaveOptions(), inputs: Sequence[Checkpoint] = ()
) -> None:
    """Raises as `save` would for this path: an unknown suffix, a file that exists, an input."""
    url = given(os.fspath(path))
    row = formats.writable(url, options.to)
    if not row.is_directory and (options.with_files or options.shard_name is not None):
        raise UsageError("--shard-name and --with-files go with a directory: --to sharded", url)
    if row.is_directory:
        named = row.directory_writer().names_for
        names = {named(checkpoint, options.shard_name, row.kind) for checkpoint in inputs}
        if found_at(url) == "file":
            raise OutputError("is a file; this format is a directory", url)
        if options.force and not options.in_place and _holds_input(url, inputs):
            raise OutputError("holds an input; --in-place replaces it", url)
        if options.force and not options.in_place and not is_url(url):
            _refuse_linked(url, names, inputs)
        return
    if options.hash_in_name:
        url = _with_digest(url, PENDING)
    spared = () if options.in_place else inputs
    _check_place(url, options.overwrites, spared, "is one of the inputs; --in-place replaces it")


def _holds_input(directory: str, inputs: Sequence[Checkpoint]) -> bool:
    places = {dirname(source) or "." for checkpoint in inputs for source in sources(checkpoint)}
    return any(same_place(place, directory) for place in places)


def _refuse_linked(directory: str, names: Collection[Names], inputs: Sequence[Checkpoint]) -> None:
    """Raises OutputError if the path of a shard is a link to an input, which writing would replace."""
    there = names_in(directory)
    places = [os.path.join(directory, name) for name in there if any(own.gives(name) for own in names)]
    if not places:
        return
    given = {found for checkpoint in inputs for source in sources(checkpoint) if (found := identity(source))}
    for place in places:
        if identity(place) in given:
            raise OutputError("is one of the inputs; --in-place replaces it", place)


def check_report(path: str | os.PathLike[str], *, force: bool = False, inputs: Sequence[Checkpoint] = ()) -> None:
    """Raises as `write_text` would for this path, and OutputError if it is an input."""
    url = given(os.fspath(path))
    if not is_stream(url):
        _check_place(url, force, inputs, "is one of the inputs")


def _check_place(url: str, force: bool, inputs: Sequence[Checkpoint], refusal: str) -> None:
    found = found_at(url)
    if found == "directory":
        raise OutputError("is a directory; name a file", url)
    inode = identity(url)
    for source in (
        (one for checkpoint in inputs for one in sources(checkpoint)) if found else ()
    ):  # there may be thousands
        if identity(source) == inode if inode else same_place(source, url):
            raise OutputError(refusal, url)
    if found and not force:
        raise OutputError(EXISTS, url)


def write_text(path: str | os.PathLike[str], text: str, *, force: bool = False) -> None:
    """Writes a text file atomically, or into a pipe or device. Raises: OutputError."""
    url = given(os.fspath(path))
    if is_stream(url):
        write_stream(url, text)
        return
    with create(url, force=force) as output:
        output.write(text.encode())
        output.commit()


_DEVICES = "cpu|cuda|meta|mps|xpu|xla|hpu|npu|mtia|ipu|maia|privateuseone"
_DEVICE = re.compile(rf"({_DEVICES})(:\d+)?")


def _tag_map(map_location: MapLocation) -> Callable[[str], str] | None:
    """Returns the mapping of device tags. Raises: UsageError for a tag that torch.load would not know."""
    if map_location is None:
        return None
    if isinstance(map_location, str):
        tag = _known(map_location)
        return lambda old: tag if old != "meta" else old
    if callable(map_location):
        return lambda old: _known(map_location(old))
    tags = {_known(old): _known(new) for old, new in map_location.items()}
    return lambda old: tags.get(old, old)


def _known(tag: object) -> str:
    """Returns a device tag. Raises: UsageError."""
    if not isinstance(tag, str) or not _DEVICE.fullmatch(tag):
        like = near(str(tag).partition(":")[0], _DEVICES.split("|"))
        raise UsageError(f"{tag!r} is no device tag such as cpu or cuda:1{like}")
    return tag


def _untagged(checkpoint: Checkpoint, row: formats.Format, map_location: MapLocation) -> list[str]:
    """Returns notes on device tags that the output has no place for, or that no tensor has."""
    if map_location is None:
        return []
    if not row.holds.devices:
        return [f"map_location changes nothing: {row.name} holds no device tags"]
    if not isinstance(map_location, Mapping):
        return []
    there = {node.location for node in nodes(checkpoint.tree) if isinstance(node, (TensorInfo, Storage))}
    absent = [tag for tag in map_location if tag not in there]
    return [f"no tensor has the device {listed(absent)}"] if absent else []
