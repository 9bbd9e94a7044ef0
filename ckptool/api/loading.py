"""The functions of `import ckptool` that load what fits into a changed model: plan_partial, load_partial."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from ckptool.api.sources import Pairs, Patterns, Source, open, open_whole, tags_of
from ckptool.api.writing import auto_mapped, better_hint, refuse_auto_remap, remap
from ckptool.core import keys
from ckptool.core.checkpoint import Checkpoint, detached
from ckptool.core.tree import Path, replaced
from ckptool.errors import StrictError, UsageError

# Operations are imported by the functions that use them: a command needs one or two of them.
if TYPE_CHECKING:
    from ckptool.partial.plan import LoadPartialReport


def plan_partial(
    source: Source | None,
    target: Any,
    *,
    rules: Any = None,
    auto_remap: bool = False,
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

    ``target`` is a source too, or a live torch.nn.Module: then the checkpoint is its state_dict. Keys are matched as in
    `filter`, after ``rules`` (see `remap`) or ``auto_remap`` (see `filter`); values are cast to the target's dtypes.
    ``adapt`` {key pattern: adapter} is for shapes that differ (``"rows"``, ``"pos-embed"``, ...), ``init`` {key
    pattern: rule} for keys that are not loaded (``"kaiming_normal(mode=fan_out)"``, the methods of torch.nn.init); the
    last pattern that matches a key takes precedence. ``init_preset`` names recipes for whole models. The same ``seed``
    gives the same values on one version of numpy. ``freeze``: ``loaded``, ``first:N``, key patterns. ``optimizer``:
    ``drop``, or ``remap`` to carry the source's optimizer state. ``source`` None only initialises.

    Nothing is written: pass the checkpoint to `save`. Reads headers only, except where tied names are compared.
    Raises: what `open` raises, UsageError with everything that forbids the plan, NoTensorsError, CollisionError.
    """
    from ckptool.io.files import Files
    from ckptool.ops.rows import counts_of
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
    opened = None if source is None else open_whole(open(source, root), "it cannot be a source")
    if auto_remap:
        refuse_auto_remap(int(opened is not None), True, rules, strip_prefix, add_prefix)
    origins: dict[str, str] = {}
    if rules is not None and opened is not None:
        opened, renamed = remap(opened, rules, allow_unused=allow_unused)
        origins = {row.new: " + ".join(row.old) for row in renamed.map}
    classes: dict[str, str] | None = None
    if isinstance(target, (Checkpoint, str, os.PathLike, Mapping)):
        into = open_whole(target)
    else:
        from ckptool.partial import live

        into, classes = live.checkpoint_of(target, opened, strip_prefix, add_prefix), live.classes_of(target)
    mapped = None
    if auto_remap and opened is not None:
        mapped = auto_mapped(opened, into)
        opened, origins = mapped.checkpoint, mapped.origins
    with Files() as files:
        planned, report = op.load_partial(
            opened, into, options, same=partial(same_bytes, files=files), read=read_object, classes=classes,
            origins=origins,
        )  # fmt: skip
    if opened is not None and rules is None and not (auto_remap or include or exclude):
        report = replace(report, hint=better_hint(report.hint, opened, into, len(report.loaded)))
    if mapped is not None:
        told = mapped.told(report.rows)
        hint = report.hint if "(--adapt " in (report.hint or "") else None  # other names do not go with these
        report = replace(report, rows=told, counts=counts_of(told), hint=hint)
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
    auto_remap: bool = False,
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
        tags_of(map_location)
    if optimizer == "remap":
        raise UsageError("load_partial carries no optimizer state: plan_partial and save write it to a file")
    try:
        planned, report = plan_partial(
            source, model, rules=rules, auto_remap=auto_remap, allow_unused=allow_unused, adapt=adapt, init=init,
            init_preset=init_preset, seed=seed, freeze=freeze, new_lr_mult=new_lr_mult,
            weight_decay=weight_decay, optimizer=optimizer, include=include, exclude=exclude,
            strip_prefix=strip_prefix, add_prefix=add_prefix, root=root,
        )  # fmt: skip
    except UnsetError as error:  # what is missing is judged first
        planned, report = error.planned
    if strict and (failed := report.not_strict()):
        raise StrictError(f"{', '.join(failed)}: {report.summary()}", type(model).__name__)
    return replace(report, **live.copy_into(model, planned, report.written, map_location, assign))
