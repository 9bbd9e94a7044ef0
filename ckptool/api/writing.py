"""The functions of `import ckptool` that make a checkpoint or write one: save, remap, invert, convert, filter."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from ckptool import formats
from ckptool.api.sources import Patterns, Source, open, open_whole, tags_of
from ckptool.core import keys
from ckptool.core.checkpoint import Checkpoint, detached
from ckptool.core.tree import Path
from ckptool.errors import UsageError
from ckptool.io import paths
from ckptool.io.files import is_directory

# Operations are imported by the functions that use them: a command needs one or two of them.
if TYPE_CHECKING:
    from ckptool.mapping.auto import Mapped
    from ckptool.ops.convert import ConvertReport
    from ckptool.ops.remap import RemapReport
    from ckptool.ops.rows import FilterReport
    from ckptool.saving import MapLocation, Progress, Saved


def save(
    checkpoint: Source,
    path: str | os.PathLike[str],
    *,
    to: str | None = None,
    force: bool = False,
    in_place: bool = False,
    map_location: MapLocation = None,
    max_shard_size: int = formats.SHARD_SIZE,
    shard_name: str | None = None,
    with_files: bool = False,
    verify: bool = False,
    fsync: bool = True,
    progress: Progress | None = None,
) -> Saved:
    """Writes a checkpoint in the format ``to``, by default the one that ``path`` says; returns the outcome.

    `Saved` has what the format left out (``left_out``) and, per key, how many values a cast changed in kind
    (`Changed`). `ckptool.saving.SaveOptions` explains the arguments. ``progress`` gets the bytes just written.

    Raises: OutputError, LossError, UsageError; see `ckptool.saving.save`.
    """
    from ckptool import saving

    url = keys.file_path(path)
    keys.expect_numbers(1, max_shard_size=max_shard_size)
    keys.expect_texts(shard_name=shard_name)
    tags, opened = tags_of(map_location), open(checkpoint)
    how = saving.SaveOptions(to, force, in_place, tags, max_shard_size, verify, fsync, False, shard_name, with_files)
    saved = saving.save(opened, url, how, progress)
    return replace(saved, notes=(*opened.problems, *opened.notes, *saved.notes))


def remap(source: Source, rules: Any, *, allow_unused: bool = False) -> tuple[Checkpoint, RemapReport]:
    """Returns (checkpoint, report) with keys renamed and tensors reshaped by rules; nothing is written.

    ``rules`` is what `Rules.parse` takes: a list of rules, of [regex, replacement] pairs, or a table of names.
    Raises: what `open` raises, CollisionError, UsageError for a rule that matches no key (unless ``allow_unused``).
    """
    from ckptool.ops.remap import remap as op
    from ckptool.ops.rules import Rules

    return op(open_whole(source), Rules.parse(rules), allow_unused=allow_unused)


def invert(source: Source, saved: Any) -> tuple[Checkpoint, RemapReport]:
    """Returns (checkpoint, report) with a remap undone; ``saved`` is from its report, or the content of a map file.

    Weights that the remap untied are tied again if their bytes are still equal; those bytes are read.
    """
    from ckptool.io.files import Files
    from ckptool.ops.remap import invert as op
    from ckptool.values.blocks import same_bytes

    with Files() as files:
        return op(open_whole(source), saved, same=partial(same_bytes, files=files))


def convert(
    source: Source,
    path: str | os.PathLike[str],
    *,
    to: str | None = None,
    root: str | Path | None = None,
    dtype: str | None = None,
    keep: Patterns = (),
    dequantize: bool = False,
    untie: bool = False,
    publish: bool = False,
    metadata: Patterns = (),
    set_metadata: Mapping[str, str] | None = None,
    unset_metadata: Patterns = (),
    max_shard_size: int = formats.SHARD_SIZE,
    shard_name: str | None = None,
    with_files: bool = False,
    map_location: MapLocation = None,
    force: bool = False,
    in_place: bool = False,
    verify: bool = True,
    fsync: bool = True,
    progress: Progress | None = None,
    dry_run: bool = False,
    world_size: int | None = None,
) -> ConvertReport:
    """Writes a checkpoint in another format, and returns a report.

    ``to``: one of `formats.names`; by default ``path`` decides (its suffix; a directory gets shards). Of a directory a
    directory is written, unless ``path`` ends as a file's name. ``dtype`` casts floats at root, except keys that match
    ``keep``. ``dequantize`` multiplies weights of few bits (float8, int8) by their scales, which it drops; to
    ``dtype``, by default float32. ``untie`` stores tied tensors separately. ``publish`` writes the weights alone and
    puts the first 8 hex digits of the sha256 in the name. ``metadata`` names scalars of the tree to carry into
    safetensors' metadata; ``set_metadata`` sets entries of it, ``unset_metadata`` leaves some out. ``verify`` reads the
    result back before it gets its name. ``dry_run`` writes nothing, estimates the bytes, and raises what the conversion
    would; with ``world_size`` it says how the work would be divided over that many ranks of torchrun.

    Raises: what `open` and `save` raise.
    """
    import importlib.util

    from ckptool import saving
    from ckptool.core.dtypes import COMMON_FLOATS, Changed, lookup
    from ckptool.errors import needs_torch
    from ckptool.ops.convert import convert as op
    from ckptool.ops.convert import edited

    url = paths.given(keys.file_path(path))
    keys.expect_texts(dtype=dtype, shard_name=shard_name)
    keys.expect_numbers(1, max_shard_size=max_shard_size, world_size=1 if world_size is None else world_size)
    opened = open_whole(open(source, root))
    keep, metadata = keys.texts(keep, "keep"), keys.texts(metadata, "metadata")
    prepared, report = op(
        opened, dtype=None if dtype is None else lookup(dtype).name, keep=keep, dequantize=dequantize, untie=untie,
        publish=publish, metadata=metadata,
    )  # fmt: skip
    directory = isinstance(source, (str, os.PathLike)) and is_directory(paths.given(os.fspath(source)))
    row = formats.writable(url, to, opened.format if directory else "")
    given, gone = keys.pairs(set_metadata or {}, "set_metadata", "text"), keys.texts(unset_metadata, "unset_metadata")
    if (metadata or given or gone) and not row.holds.metadata:
        option = "--metadata" if metadata else "--set-metadata" if given else "--unset-metadata"
        raise UsageError(f"{option} goes into safetensors and shards only, not into {row.name}", url)
    prepared = edited(prepared, dict(given), gone)
    if dtype is not None and (report.cast or report.dequantized):
        dtypes = {lookup(dtype).name, *(one.dtype for one in map(opened.state_dict().__getitem__, report.cast))}
        if not dtypes <= {*COMMON_FLOATS} and importlib.util.find_spec("torch") is None:
            raise needs_torch(f"casting to {dtype}")
    tags, digest, to = tags_of(map_location), publish and not row.is_directory, row.name
    how = saving.SaveOptions(
        to, force, in_place, tags, max_shard_size, verify, fsync, digest, shard_name, with_files, world_size
    )
    if publish and row.is_directory:
        report.notes.append("a directory has no digest in its name")
    elif publish and dry_run:
        report.notes.append("8 hex digits of its sha256 will be in its name")
    saved = saving.check(prepared, url, how) if dry_run else saving.save(prepared, url, how, progress)
    changed: dict[str, Any] = {name: dict(getattr(saved, name)) for name in Changed._fields}
    return replace(
        report, output=saved.path, nbytes=saved.nbytes, verified=saved.verified, **changed,
        left_out=[name for name in (*report.left_out, *saved.left_out) if name not in metadata],
        notes=[*report.notes, *saved.notes],
    )  # fmt: skip


def filter(
    *sources: Source,
    match: Source | None = None,
    include: Patterns = (),
    exclude: Patterns = (),
    strip_prefix: Patterns | None = None,
    add_prefix: str | None = None,
    rules: Any = None,
    auto_remap: bool = False,
    allow_unused: bool = False,
    optimizer: str | None = None,
    only_matched: bool = False,
    cast: bool = False,
    first_wins: bool = False,
) -> tuple[Checkpoint, FilterReport]:
    """Returns (checkpoint, report): the target with every tensor that fits taken from the sources.

    A tensor fits when its key (without wrapper prefixes such as ``module.``) and its shape agree. Without
    ``match``, the result is the first source with the keys of all sources that ``include`` and ``exclude`` choose; a
    key in two of them must have the same bytes, unless ``first_wins``. ``rules`` (see `remap`) and the prefixes change
    the sources' keys: before they are matched, or, without ``match``, after they are chosen.
    ``auto_remap`` maps the source's names to the target's first, by names and shapes (see `infer`): rows of these keys
    have a confidence and witnesses, and those in doubt say so. ``optimizer``: ``keep`` or
    ``drop`` the optimizer state beside the weights; None keeps it and notes its size. Nothing is written: pass the
    checkpoint to `save`. Reads headers only, except where tied names or keys in two sources must be compared.

    Raises: what `open` raises, NoTensorsError, CollisionError for tied names or one key with different values.
    """
    from ckptool.io.files import Files
    from ckptool.ops import filter as op
    from ckptool.ops import rows
    from ckptool.ops.notes import with_optimizers
    from ckptool.values.blocks import same_bytes

    keys.expect_texts(add_prefix=add_prefix)
    include, exclude, strip_prefix = keys.all_texts(include=include, exclude=exclude, strip_prefix=strip_prefix)
    opened = [open_whole(source, "it cannot be a source") for source in sources]
    target = None if match is None else open_whole(match)
    if target is not None:
        target, notes = with_optimizers(target, optimizer)
    elif opened:
        opened[0], notes = with_optimizers(opened[0], optimizer)
    origins: dict[str | None, dict[str, str]] = {}
    mapped = None
    if auto_remap:
        refuse_auto_remap(len(opened), target is not None, rules, strip_prefix, add_prefix)
    if auto_remap and target is not None:
        mapped = auto_mapped(opened[0], target)
        opened, origins = [mapped.checkpoint], {None: mapped.origins}
    if rules is not None and target is not None:
        from ckptool.ops.remap import remap_all

        opened, origins = remap_all(opened, rules, allow_unused=allow_unused)
    with Files() as files:
        made, report = op.filter(
            opened, target, include=include, exclude=exclude, strip_prefix=strip_prefix, add_prefix=add_prefix,
            only_matched=only_matched, cast=cast, first_wins=first_wins, same=partial(same_bytes, files=files),
            roots=("" if rules is not None or auto_remap else "--root", "" if optimizer == "drop" else "--match-root"),
        )  # fmt: skip
    report = replace(report, rows=rows.sourced(report.rows, origins), notes=[*report.notes, *notes])
    if mapped is not None:
        told = mapped.told(report.rows)
        report = replace(report, rows=told, counts=rows.counts_of(told), hint=None)
    if target is not None and len(opened) == 1 and rules is None and not (auto_remap or include or exclude):
        report = replace(report, hint=better_hint(report.hint, opened[0], target, report.loaded))
    if target is not None and target.format == "model":
        made = made.with_state_dict(detached(made.state_dict()))
    if target is None and (rules is not None or strip_prefix or add_prefix):
        from ckptool.ops.rules import Rules, prefixes

        changes = Rules.parse(rules or []) + prefixes(made.entries(), strip_prefix, add_prefix)
        made, renamed = remap(made, changes, allow_unused=allow_unused)
        report = rows.followed(report, made, renamed)
    return made, report


def refuse_auto_remap(sources: int, target: bool, rules: Any, strip_prefix: Patterns | None, add_prefix: Any) -> None:
    """Raises UsageError for what does not go with ``auto_remap``."""
    if rules is not None or strip_prefix or add_prefix:
        raise UsageError("--auto-remap finds the names: leave out --rename, --rules, --strip-prefix and --add-prefix")
    if sources != 1 or not target:
        raise UsageError("--auto-remap needs one SOURCE and the target whose names it takes (--match or --into)")


def auto_mapped(source: Checkpoint, target: Checkpoint) -> Mapped:
    """Returns the source under the target's names. Raises: NoTensorsError."""
    from ckptool.mapping.auto import mapped
    from ckptool.ops.notes import require_tensors

    for side in (source, target):
        require_tensors(side)
        if (count := len(side.state_dict())) > MOST_MAPPED:
            what = f"--auto-remap: {side.url} has {count:,} keys, over {MOST_MAPPED:,}"
            raise UsageError(f"{what}: find the names by remap --like --save-rules, and give them by --rules")
    return mapped(source, target)


MOST_MAPPED = 100_000
"""Most keys of a side whose names ``auto_remap`` finds: half a minute. `remap --like` finds those of more."""


def better_hint(hint: str | None, source: Checkpoint, target: Checkpoint, loaded: int) -> str | None:
    """Returns the hint on ``remap --like`` where few keys match and it would match clearly more; else ``hint``.

    Few is less than half of the target's keys, by what ``hint`` says; clearly more is over twice as many and two.
    """
    from ckptool.ops.notes import hinted

    known, total = max(loaded, hinted(hint)), len(target.state_dict())
    if 2 * known >= total:
        return hint
    from ckptool.api.matching import can_remap, is_soon

    if not can_remap(source) or not is_soon(source.state_dict(), target.state_dict()):
        return hint
    from ckptool.mapping.infer import infer
    from ckptool.mapping.like import entries, proven

    found = len(proven(infer(entries(source), entries(target)).pairs, ())[0])
    clear = found > max(2 * known + 2, total // 10)
    return f"remap --like {target.url} would match {found} of {total}" if clear else hint
