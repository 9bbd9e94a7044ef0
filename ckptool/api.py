"""The functions of `import ckptool`: the one place where formats, operations and values meet."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from ckptool import formats
from ckptool.core import keys
from ckptool.core.checkpoint import Checkpoint, Module, detached, set_realise
from ckptool.core.tensor import TensorInfo
from ckptool.core.tree import Path, replaced
from ckptool.errors import StrictError, UsageError, kind_of
from ckptool.limits import limited

# Operations are imported by the functions that use them: a command needs one or two of them.
if TYPE_CHECKING:
    from ckptool.ops.convert import ConvertReport
    from ckptool.ops.diff import DiffReport
    from ckptool.ops.inspect import InspectReport
    from ckptool.ops.remap import RemapReport
    from ckptool.ops.rows import FilterReport
    from ckptool.partial.plan import LoadPartialReport
    from ckptool.references.schema import SchemaReport
    from ckptool.saving import MapLocation, Progress, Saved


Source = Checkpoint | str | os.PathLike[str] | Mapping[str, Any] | Module
"""A checkpoint, the path of one, a state_dict (a dict of torch tensors or numpy arrays, nested as in a file), or a
torch.nn.Module, whose state_dict it is."""

Patterns = str | Sequence[str]
"""Key patterns, or a single one."""

Pairs = Mapping[str, str] | Sequence[tuple[str, str]]
"""{key pattern: adapter or rule for the keys that match}, or such pairs."""


def open(source: Source, root: str | Path | None = None, *, tp_rules: Any = None) -> Checkpoint:
    """Returns the checkpoint at a path (a file, a sharded directory or its index), of a state_dict or of a live model.

    Reads headers only; runs no code of the file and imports none of its classes. ``root`` is the path of the weights
    in the tree (``"model_state_dict"``, steps separated by "/"), or a directory in it; None looks for them, see
    `find_root`. ``tp_rules`` joins the ranks of tensor parallelism: a TOML file, its content as a dict, or ``"gpt"``
    or ``"llama"``, see `JoinRules`; tensors that are replicated on the ranks are read and compared.

    Raises: UnreadableError, FormatError, UnsupportedError; UsageError if there is nothing at ``root``, or for rules
    that do not fit.
    """
    if isinstance(source, Checkpoint):
        opened = source
    elif isinstance(source, (str, os.PathLike)):
        opened, root = formats.read_at(os.fspath(source), root)
    else:
        from ckptool.partial import live

        opened = live.opened(source)
        root = () if root is None and not isinstance(source, Mapping) else root
    if tp_rules is not None:
        from ckptool.directories.parallel.joining import joined

        opened = joined(opened, tp_rules)
    kept = root is None and isinstance(source, Checkpoint) and not source.ranks
    return opened if kept else opened.rooted(root)


def _open_whole(source: Source, why: str = "") -> Checkpoint:
    """Opens a checkpoint; ``why`` it must have values. Raises: what `open` and its own ``require`` methods raise."""
    opened = open(source)
    if why:
        opened.require_values(why)
    opened.require_whole()
    opened.require_joined()
    return opened


def inspect(
    source: Source,
    *,
    root: str | Path | None = None,
    stats: bool = False,
    hashes: bool = False,
    check: bool = False,
    include: Patterns = (),
    exclude: Patterns = (),
    fail_on: Patterns | None = None,
    allow: Patterns = (),
    progress: Progress | None = None,
) -> InspectReport:
    """Returns what a checkpoint holds: its weights, the rest of its tree, metadata, notes.

    Reads headers only, unless one of these options is set. Then it reads every tensor once, in constant memory, on up
    to four threads: ``stats`` (mean, standard deviation, extremes, zeros, NaN and infinities, of every tensor and of
    every prefix; see `Stats`), ``hashes`` (sha256 of each tensor and of all; `ckptool.values.contents` defines what
    is hashed), ``check`` (damage; see `Finding`). ``include`` and ``exclude`` choose the keys to read; the report
    lists all. ``fail_on`` are the kinds of finding that fail the check (None: all but unknown and ordinary names), and
    names of the pickle that fit ``allow`` pass. ``progress`` is called with the number of bytes as they are read.

    Raises: what `open` raises; FormatError for unreadable data, which ``check`` reports instead; NoTensorsError if all
    tensors are elsewhere than at a ``root`` that was given; IncompleteError for ``hashes`` if shards are missing.
    """
    from ckptool.ops.inspect import inspect as op
    from ckptool.ops.notes import require_tensors

    opened = open(source, root)
    if root is not None and next(opened.tensors(), None):
        require_tensors(opened)
    include, exclude, allow = keys.all_texts(include=include, exclude=exclude, allow=allow)
    report = op(opened, devices=formats.has_devices(opened.format))
    if not (stats or hashes or check):
        return report
    from ckptool.core.findings import check as judge
    from ckptool.values.contents import look_into

    choose = keys.chooser(include, exclude) if include or exclude else None
    found = look_into(opened, choose, stats=stats, hashes=hashes, check=check, progress=progress)
    judged = judge(report.problems, opened.trailing, report.kinds, found.findings, found.unchecked, fail_on, allow)
    rows, inside = (
        [replace(row, stats=found.stats.get(row.key), hash=found.hashes.get(row.key)) for row in some]
        if stats or hashes else some
        for some in (report.tensors, report.inside)
    )  # fmt: skip
    return replace(
        report, tensors=rows, inside=inside, notes=[*report.notes, *found.missed], hash=found.whole,
        prefixes=found.prefixes if stats else None, check=judged if check else None,
    )  # fmt: skip


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
    tags, opened = _tags(map_location), open(checkpoint)
    how = saving.SaveOptions(to, force, in_place, tags, max_shard_size, verify, fsync, False, shard_name, with_files)
    saved = saving.save(opened, url, how, progress)
    return replace(saved, notes=(*opened.problems, *opened.notes, *saved.notes))


def _tags(map_location: MapLocation) -> MapLocation:
    """Returns ``map_location``. Raises: UsageError if it is none of what maps device tags."""
    map_location = str(map_location) if type(map_location).__module__ == "torch" else map_location  # a torch.device
    known = map_location is None or isinstance(map_location, (str, Mapping)) or callable(map_location)
    if not known or (isinstance(map_location, Mapping) and any(type(tag) is not str for tag in map_location.values())):
        raise UsageError(f"map_location is a device tag, a dict of tags or a callable, not {kind_of(map_location)}")
    return map_location


def remap(source: Source, rules: Any, *, allow_unused: bool = False) -> tuple[Checkpoint, RemapReport]:
    """Returns (checkpoint, report) with keys renamed and tensors reshaped by rules; nothing is written.

    ``rules`` is what `Rules.parse` takes: a list of rules, of [regex, replacement] pairs, or a table of names.
    Raises: what `open` raises, CollisionError, UsageError for a rule that matches no key (unless ``allow_unused``).
    """
    from ckptool.ops.remap import remap as op
    from ckptool.ops.rules import Rules

    return op(_open_whole(source), Rules.parse(rules), allow_unused=allow_unused)


def invert(source: Source, saved: Any) -> tuple[Checkpoint, RemapReport]:
    """Returns (checkpoint, report) with a remap undone; ``saved`` is from its report, or the content of a map file.

    Weights that the remap untied are tied again if their bytes are still equal; those bytes are read.
    """
    from ckptool.io.source import Files
    from ckptool.ops.remap import invert as op
    from ckptool.values.blocks import same_bytes

    with Files() as files:
        return op(_open_whole(source), saved, same=partial(same_bytes, files=files))


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
) -> ConvertReport:
    """Writes a checkpoint in another format, and returns a report.

    ``to``: one of `formats.names`; by default ``path`` decides (its suffix; a directory gets shards). Of a directory a
    directory is written, unless ``path`` ends as a file's name. ``dtype`` casts floats at root, except keys that match
    ``keep``. ``dequantize`` multiplies weights of few bits (float8, int8) by their scales, which it drops; to
    ``dtype``, by default float32. ``untie`` stores tied tensors separately. ``publish`` writes the weights alone and
    puts the first 8 hex digits of the sha256 in the name. ``metadata`` names scalars of the tree to carry into
    safetensors' metadata. ``verify`` reads the result back before it gets its name. ``dry_run`` writes nothing,
    estimates the bytes, and raises what the conversion would.

    Raises: what `open` and `save` raise.
    """
    import importlib.util

    from ckptool import saving
    from ckptool.core.dtypes import COMMON_FLOATS, Changed, lookup
    from ckptool.errors import needs_torch
    from ckptool.ops.convert import convert as op

    url = keys.file_path(path)
    keys.expect_texts(dtype=dtype, shard_name=shard_name)
    keys.expect_numbers(1, max_shard_size=max_shard_size)
    opened = _open_whole(open(source, root))
    keep, metadata = keys.texts(keep, "keep"), keys.texts(metadata, "metadata")
    prepared, report = op(
        opened, dtype=None if dtype is None else lookup(dtype).name, keep=keep, dequantize=dequantize, untie=untie,
        publish=publish, metadata=metadata,
    )  # fmt: skip
    directory = isinstance(source, (str, os.PathLike)) and os.path.isdir(source)
    row = formats.writable(url, to, opened.format if directory else "")
    if metadata and not row.holds.metadata:
        raise UsageError("--metadata goes into safetensors and shards only")
    if dtype is not None and (report.cast or report.dequantized):
        dtypes = {lookup(dtype).name, *(one.dtype for one in map(opened.state_dict().__getitem__, report.cast))}
        if not dtypes <= {*COMMON_FLOATS} and importlib.util.find_spec("torch") is None:
            raise needs_torch(f"casting to {dtype}")
    tags, digest, to = _tags(map_location), publish and not row.is_directory, row.name
    how = saving.SaveOptions(to, force, in_place, tags, max_shard_size, verify, fsync, digest, shard_name, with_files)
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


def diff(
    a: Source,
    b: Source,
    *,
    ignore: Patterns = (),
    strip_prefix_a: Patterns | None = None,
    strip_prefix_b: Patterns | None = None,
    devices: bool = False,
    values: bool = False,
    rtol: float = 1e-5,
    atol: float = 1e-8,
    quick: bool = False,
    progress: Progress | None = None,
) -> DiffReport:
    """Returns how two checkpoints' weights differ: keys, shapes and dtypes, from headers alone.

    ``values`` also compares the data, block by block, with `torch.allclose`'s tolerances; NaN equals NaN,
    integers are exact. ``quick`` only finds whether the bytes are equal, and trusts the CRC-32 that torch's archives
    record where both sides have one. A lock file's tensors are compared by their hashes, as far as it has them
    (``uncompared``). ``progress`` is called with the bytes of both sides of each compared pair.
    Raises: what `open` raises, NoTensorsError.
    """
    from ckptool.ops import diff as op

    keys.expect_numbers(0, rtol=rtol, atol=atol)
    ignore, one, other = keys.all_texts(ignore=ignore, strip_prefix_a=strip_prefix_a, strip_prefix_b=strip_prefix_b)
    both: dict[str, Any] = {"ignore": ignore, "strip_prefix_a": one, "strip_prefix_b": other, "devices": devices}
    differences = partial(op.diff, _open_whole(a), _open_whole(b), **both)
    if not (values or quick):
        return differences()
    from ckptool import saving
    from ckptool.core.findings import Distance
    from ckptool.io.source import Files
    from ckptool.values.compare import compare, compare_bytes, compare_hashes

    with Files(progress) as files:

        def compared(one: TensorInfo, other: TensorInfo) -> Distance:
            with saving.share(files, one.nbytes + other.nbytes):
                if one.described_in or other.described_in:
                    return compare_hashes(one, other, files)
                return compare_bytes(one, other, files) if quick else compare(one, other, files, rtol, atol)

        return differences(compare=compared)


def check_schema(
    source: Source,
    schema: str | os.PathLike[str] | Mapping[str, Any],
    *,
    ignore: Patterns = (),
    strip_prefix: Patterns | None = None,
) -> SchemaReport:
    """Returns which rules of a schema of patterns a checkpoint does not meet, with the keys; reads headers only.

    ``schema``: the path of a TOML file, or its table (see `ckptool.references.schema`).
    Raises: what `open` raises, NoTensorsError; FormatError for what is no schema.
    """
    from ckptool.references import schema as op

    ignore, strip_prefix = keys.all_texts(ignore=ignore, strip_prefix=strip_prefix)
    rules = op.parse(schema) if isinstance(schema, Mapping) else op.read(schema)
    return op.check(rules, _open_whole(source), ignore=ignore, strip_prefix=strip_prefix)


def filter(
    *sources: Source,
    match: Source | None = None,
    include: Patterns = (),
    exclude: Patterns = (),
    strip_prefix: Patterns | None = None,
    add_prefix: str | None = None,
    rules: Any = None,
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
    the sources' keys: before they are matched, or, without ``match``, after they are chosen. ``optimizer``: ``keep`` or
    ``drop`` the optimizer state beside the weights; None keeps it and notes its size. Nothing is written: pass the
    checkpoint to `save`. Reads headers only, except where tied names or keys in two sources must be compared.

    Raises: what `open` raises, NoTensorsError, CollisionError for tied names or one key with different values.
    """
    from ckptool.io.source import Files
    from ckptool.ops import filter as op
    from ckptool.ops import rows
    from ckptool.ops.notes import with_optimizers
    from ckptool.values.blocks import same_bytes

    keys.expect_texts(add_prefix=add_prefix)
    include, exclude, strip_prefix = keys.all_texts(include=include, exclude=exclude, strip_prefix=strip_prefix)
    opened = [_open_whole(source, "it cannot be a source") for source in sources]
    target = None if match is None else _open_whole(match)
    if target is not None:
        target, notes = with_optimizers(target, optimizer)
    elif opened:
        opened[0], notes = with_optimizers(opened[0], optimizer)
    origins: dict[str | None, dict[str, str]] = {}
    if rules is not None and target is not None:
        from ckptool.ops.remap import remap_all

        opened, origins = remap_all(opened, rules, allow_unused=allow_unused)
    with Files() as files:
        made, report = op.filter(
            opened, target, include=include, exclude=exclude, strip_prefix=strip_prefix, add_prefix=add_prefix,
            only_matched=only_matched, cast=cast, first_wins=first_wins, same=partial(same_bytes, files=files),
            roots=("" if rules is not None else "--root", "" if optimizer == "drop" else "--match-root"),
        )  # fmt: skip
    report = replace(report, rows=rows.sourced(report.rows, origins), notes=[*report.notes, *notes])
    if target is not None and target.format == "model":
        made = made.with_state_dict(detached(made.state_dict()))
    if target is None and (rules is not None or strip_prefix or add_prefix):
        from ckptool.ops.rules import Rules, prefixes

        changes = Rules.parse(rules or []) + prefixes(made.entries(), strip_prefix, add_prefix)
        made, renamed = remap(made, changes, allow_unused=allow_unused)
        report = rows.followed(report, made, renamed)
    return made, report


def plan_partial(
    source: Source | None,
    target: Any,
    *,
    rules: Any = None,
    allow_unused: bool = False,
    adapt: Pairs = (),
    init: Pairs = (),
    init_preset: Patterns = (),
    seed: int = 0,
    freeze: Patterns = (),
    new_lr_mult: float = 10.0,
    weight_decay: float = 0.0,
    optimizer: str | None = None,
    include: Patterns = (),
    exclude: Patterns = (),
    strip_prefix: Patterns | None = None,
    add_prefix: str | None = None,
    root: str | Path | None = None,
) -> tuple[Checkpoint, LoadPartialReport]:
    """Returns (checkpoint, report): the target with what fits of the source, and the rest adapted or initialised.

    ``target`` is a source too, or a live torch.nn.Module: then the checkpoint is its state_dict. Keys are matched
    as in `filter`, after ``rules`` (see `remap`); values are cast to the target's dtypes. ``adapt`` {key pattern:
    adapter} is for shapes that differ (``"rows"``, ``"pos-embed"``, see README), ``init`` {key pattern: rule} for keys
    that are not loaded (``"kaiming_normal(mode=fan_out)"``, the methods of torch.nn.init); the last pattern that
    matches a key takes precedence. ``init_preset`` names recipes for whole models. The same ``seed`` gives the same
    values on one version of numpy. ``freeze``: ``loaded``, ``first:N``, key patterns. ``optimizer``: ``drop``, or
    ``remap`` to carry the source's optimizer state. ``source`` None only initialises.

    Nothing is written: pass the checkpoint to `save`. Reads headers only, except where tied names are compared.
    Raises: what `open` raises, UsageError with everything that forbids the plan, NoTensorsError, CollisionError.
    """
    from ckptool.io.source import Files
    from ckptool.partial import adapters
    from ckptool.partial import plan as op
    from ckptool.values.adapt import read_object
    from ckptool.values.blocks import same_bytes

    keys.expect(optimizer in (None, "drop", "remap"), "optimizer", "drop or remap", optimizer)
    keys.expect(type(seed) is int, "seed", "a whole number", seed)
    keys.expect_texts(add_prefix=add_prefix)
    keys.expect_numbers(0, new_lr_mult=new_lr_mult, weight_decay=weight_decay)
    include, exclude, strip_prefix = keys.all_texts(include=include, exclude=exclude, strip_prefix=strip_prefix)
    options = op.Options(
        [(pattern, adapters.parse(text)) for pattern, text in keys.pairs(adapt, "adapt", "adapter")],
        keys.pairs(init, "init", "rule"), keys.texts(init_preset, "init_preset"), seed, keys.texts(freeze, "freeze"),
        new_lr_mult, weight_decay, optimizer, include, exclude, strip_prefix, add_prefix, allow_unused,
    )  # fmt: skip
    opened = None if source is None else _open_whole(open(source, root), "it cannot be a source")
    origins: dict[str, str] = {}
    if rules is not None and opened is not None:
        opened, renamed = remap(opened, rules, allow_unused=allow_unused)
        origins = {row.new: " + ".join(row.old) for row in renamed.map}
    classes: dict[str, str] | None = None
    if isinstance(target, (Checkpoint, str, os.PathLike, Mapping)):
        into = _open_whole(target)
    else:
        from ckptool.partial import live

        into, classes = live.checkpoint_of(target, opened, strip_prefix, add_prefix), live.classes_of(target)
    with Files() as files:
        planned, report = op.load_partial(
            opened, into, options, same=partial(same_bytes, files=files), read=read_object, classes=classes,
            origins=origins,
        )  # fmt: skip
    if classes is not None:
        planned = planned.with_state_dict(detached(planned.state_dict()))
        if opened is not None:
            states = live.extra_states(into, opened, keys.chooser(include, exclude), strip_prefix, add_prefix)
            tree = planned.tree
            for key, (_, value) in states.items():
                tree = replaced(tree, (*planned.root, key), value)
            planned = replace(planned, tree=tree)
            report = report.with_states({key: origins.get(name, name) for key, (name, _) in states.items()})
    op.refuse_unset(planned, report)
    return planned, report


def load_partial(
    model: Any,
    source: Source | None,
    *,
    map_location: Any = None,
    assign: bool = False,
    strict: bool = False,
    rules: Any = None,
    allow_unused: bool = False,
    adapt: Pairs = (),
    init: Pairs = (),
    init_preset: Patterns = (),
    seed: int = 0,
    freeze: Patterns = (),
    new_lr_mult: float = 10.0,
    weight_decay: float = 0.0,
    optimizer: str | None = None,
    include: Patterns = (),
    exclude: Patterns = (),
    strip_prefix: Patterns | None = None,
    add_prefix: str | None = None,
    root: str | Path | None = None,
) -> LoadPartialReport:
    """Loads what fits of a checkpoint into a live torch.nn.Module, in place, and returns the report.

    Everything is planned, checked and read before the first parameter is changed: an error leaves the model as it
    was, and memory holds the loaded tensors once more than the model. Values take the model's dtypes and devices.
    ``assign`` replaces the model's tensors, which a model on ``meta`` needs; ``map_location`` is then their device.
    ``strict``: any missing, unexpected or mismatched key is an error. The other arguments are `plan_partial`'s.

    Raises: what `plan_partial` raises, StrictError, DependencyError without torch.
    """
    from ckptool.partial import live
    from ckptool.partial.plan import UnsetError

    if not isinstance(map_location, live.refuse_no_module(model).device):
        _tags(map_location)
    if optimizer == "remap":
        raise UsageError("load_partial carries no optimizer state: plan_partial and save write it to a file")
    try:
        planned, report = plan_partial(
            source, model, rules=rules, allow_unused=allow_unused, adapt=adapt, init=init, init_preset=init_preset,
            seed=seed, freeze=freeze, new_lr_mult=new_lr_mult, weight_decay=weight_decay, optimizer=optimizer,
            include=include, exclude=exclude, strip_prefix=strip_prefix, add_prefix=add_prefix, root=root,
        )  # fmt: skip
    except UnsetError as error:  # what is missing is judged first
        planned, report = error.planned
    if strict and (failed := report.not_strict()):
        raise StrictError(f"{', '.join(failed)}: {report.summary()}", type(model).__name__)
    return replace(report, **live.copy_into(model, planned, report.written, map_location, assign))


def _realise(tree: Any, map_location: Any, module_state_dict: Callable[[Any], Any], arrays: bool) -> Any:
    from ckptool.io.source import Files
    from ckptool.values import torch_bridge

    with Files() as files:
        return torch_bridge.to_torch(tree, files, map_location, module_state_dict, arrays)


set_realise(_realise)


__all__ = [
    "Checkpoint", "check_schema", "convert", "diff", "filter", "inspect", "invert", "limited", "load_partial", "open",
    "plan_partial", "remap", "save",
]  # fmt: skip
