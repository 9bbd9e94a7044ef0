"""Plans a partial load into a changed model: each key is loaded, adapted, initialised or kept, with a reason.

First come the matches of `filter`, then adapters for shapes that differ, ties, and init rules for what is not loaded.
Only headers are read, and nothing is computed: values are `Derived` leaves of the new checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

from ckptool.core import keys as names
from ckptool.core import modules
from ckptool.core.checkpoint import Checkpoint
from ckptool.core.tensor import TensorInfo
from ckptool.core.tree import path_text
from ckptool.errors import UnsupportedError, UsageError, as_options, listed
from ckptool.ops.filter import Merge, Same
from ckptool.ops.notes import (
    adapter_patterns,
    adapters_for,
    changed_lines,
    merge_hint,
    require_tensors,
    without_optimizers,
)
from ckptool.ops.rows import LOADED, Gate, Row, counts_of, dims, sourced
from ckptool.partial import handover, initplan, resume
from ckptool.partial.adapt import COMPUTED, Adapting
from ckptool.partial.adapters import Adapter, parse
from ckptool.partial.handover import Group
from ckptool.text import dims as dims_text


@dataclass(frozen=True, slots=True)
class LoadPartialReport:
    """What of the source is in the target, key by key, and what became of the rest."""

    rows: list[Row]
    """One per key of the target, then one per unused key of the source."""
    counts: dict[str, int]
    """{reason: rows}."""
    output: str | None = None
    """The path that was written."""
    loaded_fraction: float = 0.0
    """The share of the target's elements, counters aside, that have the source's values."""
    hint: str | None = None
    """Options with which more keys would match."""
    target: str | None = None
    """The path of the target."""
    sources: list[str] = field(default_factory=list)
    """The path of the source, if there is one."""
    notes: list[str] = field(default_factory=list)
    """What else was noticed."""
    seed: int = 0
    """The seed of what was initialised."""
    numpy: str | None = None
    """The version of numpy with which the seed gives these values, where random numbers were drawn."""
    frozen: list[str] = field(default_factory=list)
    """Parameters that are not to be trained."""
    moving: list[str] = field(default_factory=list)
    """Frozen BatchNorm layers whose running statistics are still updated in train mode."""
    groups: list[Group] = field(default_factory=list)
    """The trained parameters, loaded and new ones apart."""
    tied: dict[str, str] = field(default_factory=dict)
    """{another name of a parameter: the first, which is listed}."""
    unset: list[str] = field(default_factory=list)
    """Keys of a target on meta that have no values: such a plan is not written."""
    overflowed: dict[str, int] | None = None
    """{key: values that a cast made infinite}, known when written."""
    saturated: dict[str, int] | None = None
    """{key: values that a cast clamped to the largest finite one}, known when written."""
    underflowed: dict[str, int] | None = None
    """{key: values that a cast made zero}, known when written."""
    failed: list[Gate] = field(default_factory=list)
    """The conditions of the command line that do not hold."""

    def keys(self, *reasons: str) -> list[str]:
        """Returns the keys with one of these reasons."""
        return [row.key for row in self.rows if row.reason in reasons]

    @property
    def loaded(self) -> list[str]:
        """Returns the target's keys that have the source's values, cast, tied and adapted ones included."""
        return self.keys(*LOADED)

    @property
    def missing(self) -> list[str]:
        """Returns the target's keys that are neither in the source nor initialised by a rule."""
        return self.keys("missing")

    @property
    def unexpected(self) -> list[str]:
        """Returns the source's keys that the target lacks."""
        return self.keys("unexpected")

    @property
    def mismatched(self) -> list[str]:
        """Returns the keys whose shapes differ; they keep the target's values."""
        return self.keys("mismatched")

    @property
    def initialised(self) -> list[str]:
        """Returns the keys that a rule initialised."""
        return self.keys("initialised")

    @property
    def written(self) -> list[str]:
        """Returns the target's keys whose values were replaced."""
        return self.keys(*LOADED, "initialised")

    def not_strict(self) -> list[str]:
        """Returns the counts that ``strict`` refuses: ``2 missing``."""
        bad = ("missing", "unexpected", "mismatched")
        return [f"{self.counts[reason]} {reason}" for reason in bad if self.counts.get(reason)]

    def with_states(self, states: Mapping[str, str]) -> LoadPartialReport:
        """Returns the report with the extra states of modules that are loaded: {key: the source's key}."""
        theirs = set(states.values())
        rows: list[Row] = []
        seen: set[str] = set()
        for row in self.rows:
            if row.key in states and row.key not in seen:
                seen.add(row.key)
                row = replace(row, reason="loaded", source=states[row.key], detail="extra state")
            elif row.key in theirs and row.shape is None:
                continue  # the source's row for the same state, which says that it is not taken
            rows.append(row)
        return replace(self, rows=rows, counts=counts_of(rows))

    def summary(self) -> str:
        """Returns a line of counts, a line for each key that was not loaded as it is, then the hint and the notes."""
        counts = ", ".join(f"{count} {reason}" for reason, count in self.counts.items())
        lines = [f"{100 * self.loaded_fraction:.1f} % of parameters loaded: {counts}"] if self.sources else [counts]
        for row in self.rows:
            if row.reason not in ("loaded", "bookkeeping", "ignored"):
                differ = row.source_shape not in (None, row.shape)
                shape, theirs = (dims_text(one, none="no tensor") for one in (row.shape, row.source_shape))
                shapes = f"{shape}, source {theirs}" if differ else ""
                lines.append("  " + "  ".join(filter(None, (row.reason, row.key, shapes, row.detail))))
        lines += [f"  hint  {self.hint}"] if self.hint else []
        lines += [f"  {label}  {text}" for label, text in changed_lines(self)]
        return "\n".join([*lines, *(f"  note  {text}" for text in self.notes)])

    def freeze(self, model: Any, *specs: str) -> list[str]:
        """Sets ``requires_grad`` to False on the model's frozen parameters, and returns their names.

        ``specs`` as in `load_partial`'s ``freeze``; by default those of the plan, else ``loaded``. ``frozen`` and
        ``moving`` of the report are updated: put the layers in ``moving`` in eval mode, or their running statistics
        change in training. Raises: UsageError before touching any.
        """
        if specs or not self.frozen:
            parameters, loaded = handover.live_parameters(model), handover.names_of(model, self.loaded)
            found = handover.frozen(specs or ["loaded"], parameters, loaded, live=True)
        else:
            found = handover.names_of(model, self.frozen) or self.frozen
        self.frozen[:] = handover.freeze_model(model, found)
        self.moving[:] = handover.moving_of_model(model)
        return list(self.frozen)

    def param_groups(
        self, model: Any, lr: float, *, new_lr_mult: float = 10.0, weight_decay: float = 0.0
    ) -> list[dict[str, Any]]:
        """Returns parameter groups for an optimizer: loaded and new parameters, with and without weight decay.

        New parameters have the learning rate ``lr * new_lr_mult``. Biases and norms (parameters of under two
        dimensions) get no decay. A parameter that requires no gradient is in no group; any other is in exactly one.
        """
        loaded = handover.names_of(model, self.loaded)
        return handover.model_groups(model, loaded, lr=lr, new_lr_mult=new_lr_mult, weight_decay=weight_decay)


@dataclass(frozen=True, slots=True)
class Options:
    """Options of a partial load. Pairs are (key pattern, what to do with the keys that it fits)."""

    adapt: Sequence[tuple[str, Adapter]] = ()
    init: Sequence[tuple[str, str]] = ()
    presets: Sequence[str] = ()
    seed: int = 0
    freeze: Sequence[str] = ()
    new_lr_mult: float = 10.0
    weight_decay: float = 0.0
    optimizer: str | None = None
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    strip_prefix: Sequence[str] = ()
    add_prefix: str | None = None
    allow_unused: bool = False


class UnsetError(UsageError):
    """Keys of a target on meta would have no values. ``planned``: (checkpoint, report), for gates on the report."""

    planned: tuple[Checkpoint, LoadPartialReport]


def refuse_unset(checkpoint: Checkpoint, report: LoadPartialReport) -> None:
    """Raises UnsetError if keys on meta have no values."""
    if report.unset:
        error = UnsetError(_unset_text(report.unset), report.target)
        error.planned = checkpoint, report
        raise error


def _unset_text(keys: Sequence[str]) -> str:
    return f"{listed(names.ranges(keys))}: on meta and has no values to keep: name a rule for it (--init)"


def load_partial(
    source: Checkpoint | None,
    target: Checkpoint,
    options: Options,
    *,
    same: Same,
    read: Callable[[str], Any] | None = None,
    classes: Mapping[str, str] | None = None,
    origins: Mapping[str, str] | None = None,
) -> tuple[Checkpoint, LoadPartialReport]:
    """Returns (checkpoint, report): the target with what fits loaded from ``source``, the rest as the options say.

    ``same`` returns whether two tensors hold the same bytes, ``read`` the content of a file that an adapter names.
    ``classes`` is {module path of the target: class name}, ``origins`` {renamed key of the source: key in its file}.
    Raises: UsageError with all problems at once, NoTensorsError, CollisionError.
    """
    for checkpoint in (source, target):
        if checkpoint is not None:
            require_tensors(checkpoint)
    plan = _Plan(source, target, options, classes, same, read)
    plan.source_root = "" if origins else "--root"  # the rules that renamed the keys would have others to rename
    plan.target_root = "--into-root"
    plan.decide()
    plan.propose()
    merged, report = plan.finished(origins or {})
    return merged, replace(report, hint=merge_hint(plan, len(report.loaded)) or plan.adapter_hint)


def module_classes(checkpoint: Checkpoint) -> dict[str, str]:
    """Returns {module path: class name} of a whole-model pickle; {} of anything else."""
    node = checkpoint.at(checkpoint.root)
    if not modules.is_module(node):
        return {}
    found = {}
    for prefix, module in modules.walk_modules(node):
        known = module.module.startswith(("torch.nn.", "transformers."))
        # Other classes get their full name: they may have the same name as one of torch.
        found[prefix.removesuffix(".")] = module.qualname if known else f"{module.module}.{module.qualname}"
    return found


_HINTED = 8
"""How many adapters a hint names."""


def _adapts(adapting: Adapting, text: str, source: TensorInfo, target: TensorInfo) -> bool:
    if source.dtype != target.dtype and not {source.dtype, target.dtype} <= COMPUTED:
        return False
    try:
        adapting.adapt(parse(text), source, target, "")
    except (UsageError, UnsupportedError):
        return False
    return True


_LAZY = ("UninitializedParameter", "UninitializedBuffer")


class _Plan(Merge):
    """`filter`'s matches, then adapters, init rules, parameter groups and optimizer state."""

    def __init__(
        self,
        source: Checkpoint | None,
        target: Checkpoint,
        options: Options,
        classes: Mapping[str, str] | None,
        same: Same,
        read: Callable[[str], Any] | None,
    ) -> None:
        chosen = names.chooser(options.include, options.exclude)
        sources = [] if source is None else [source]
        super().__init__(sources, target, options.strip_prefix, options.add_prefix, chosen, True, same)
        self.source, self.options, self.classes, self.read = source, options, classes, read
        self.notes: list[str] = []
        self.problems: list[str] = []
        self.refused_keys: set[str] = set()
        self.numpy: str | None = None
        self.unset: list[str] = []
        self.needless: list[str] = []
        self.adapter_hint: str | None = None

    def decide(self) -> None:
        """Decides what each key gets. Raises: UsageError with all problems at once, CollisionError, LossError."""
        self.match()
        self.adapt()
        self.tie()
        self.initialise()
        self.check_patterns()
        if self.problems:
            raise UsageError("; ".join(self.problems), self.target.url)

    def again(self, sources: Sequence[Checkpoint], target: Checkpoint, strip: str, add: str) -> Merge:
        options = replace(self.options, strip_prefix=[*self.options.strip_prefix, strip], add_prefix=add)
        return _Plan(sources[0], target, options, self.classes, self.same, self.read)

    def may_fit(self, key: str, offered: TensorInfo, tensor: TensorInfo) -> bool:
        return bool(self.options.adapt) or self.fits(key, offered, tensor)

    def loadable(self) -> int:
        options = self.options
        if not (options.adapt or options.init or options.presets or options.freeze or options.optimizer == "remap"):
            return super().loadable()
        self.decide()
        return len(self.finished({})[1].loaded)

    def adapt(self) -> None:
        """Applies the adapters to the keys that they were named for."""
        adapting = Adapting(self.read)
        for key, row in self.rows.items():
            adapter = next((made for pattern, made in reversed(self.options.adapt) if names.fits(pattern, key)), None)
            if adapter is None or row.source is None or not self.chosen(key):
                continue
            if row.reason != "mismatched" and not adapter.rearranges:
                continue
            offered = self.offers[0].tensors[row.source]
            try:
                made, detail = adapting.adapt(adapter, offered, self.tensors[key], key)
            except (UsageError, UnsupportedError) as error:
                self.problems.append(error.message)
                self.refused_keys.add(key)
                continue
            self.taken[key] = made
            source_dtype = offered.dtype if offered.dtype != made.dtype else None
            self.rows[key] = replace(
                row, reason="adapted", source_shape=dims(offered), dtype=made.dtype, source_dtype=source_dtype,
                detail=f"{adapter.text}: {detail}",
            )  # fmt: skip

    def tie(self) -> None:
        """Ties as `filter` does; a mismatched key that is tied to an adapted one has its values now."""
        super().tie()
        adapted = {self.taken[key].view for key, row in self.rows.items() if row.reason == "adapted"}
        for key, row in self.rows.items():
            if row.reason == "mismatched" and key in self.taken and self.taken[key].view in adapted:
                detail = str(row.detail).removesuffix(", whose values it takes")
                self.rows[key] = replace(row, reason="tied", detail=detail)

    def initialise(self) -> None:
        """Applies the init rules to the keys that were not loaded; keys without a rule keep the target's values."""
        wanted = [key for key in self.tensors if key not in self.taken and key not in self.refused_keys]
        init, presets, seed = self.options.init, self.options.presets, self.options.seed
        classes = module_classes(self.target) if self.classes is None else self.classes
        made, unused, problems = initplan.plan(init, presets, self.tensors, wanted, seed, classes)
        for key, (tensor, rule) in made.items():
            row = self.rows[key]
            self.made[key] = tensor
            self.rows[key] = replace(row, reason="initialised", dtype=tensor.dtype, detail=rule)
        if any(initplan.is_random(tensor) for tensor, _ in made.values()):
            import numpy

            self.numpy = numpy.__version__
        self.unset = [key for key in wanted if self.tensors[key].kind == "meta" and key not in made]
        self.needless = unused
        self.problems += problems

    def check_patterns(self) -> None:
        """Refuses patterns that fit no key of the target, unless they may; notes those of init that were not needed."""
        entries, options = self.target.entries(), self.options
        wrong: dict[str, str] = {}
        for option, pairs in (("--adapt", options.adapt), ("--init", options.init)):
            for pattern in names.unused_patterns(dict.fromkeys(pattern for pattern, _ in pairs), entries):
                wrong[f"{option} {pattern}"] = names.near_pattern(pattern, entries)
        if options.allow_unused:
            self.notes += [f"{given} fits no key{like}" for given, like in wrong.items()]
        elif wrong:
            texts = [f"{given}{like}" for given, like in wrong.items()]
            self.problems.append(f"patterns that fit no key (--allow-unused lets them): {listed(texts)}")
        needless = [pattern for pattern in self.needless if f"--init {pattern}" not in wrong]
        self.notes += [f"--init {pattern} fits no key that was not loaded" for pattern in needless]

    def propose(self) -> None:
        """Names the adapter in each row whose mismatch it would solve, and makes the hint of them."""
        adapting = Adapting()
        tried: dict[object, bool] = {}
        found: dict[str, str] = {}
        for key, text in adapters_for(self.mismatched(), self.tensors).items():
            source, target = self.offers[0].tensors[str(self.rows[key].source)], self.tensors[key]
            identity = text, source.form, target.form, source.dtype, target.dtype
            if identity not in tried:
                tried[identity] = _adapts(adapting, text, source, target)
            if tried[identity]:
                found[key] = text
        for group in self.tied():  # one tensor takes one value
            theirs = [key for key in group if key in found]
            if len({self.offers[0].tensors[str(self.rows[key].source)].view for key in theirs}) > 1:
                for key in theirs:
                    del found[key]
        for key, text in found.items():
            self.rows[key] = replace(self.rows[key], detail=f"{text} would fit")
        differ = [key for key, row in self.rows.items() if row.source_shape not in (None, row.shape)]
        self.adapter_hint = self._adapter_hint(list(islice(adapter_patterns(found, differ), _HINTED)))

    def _adapter_hint(self, patterns: Sequence[tuple[str, str, Sequence[str]]]) -> str | None:
        """Returns the hint: options to add, and how many keys are loaded with them; None without any."""
        if not patterns:
            return None
        keys = [key for _, _, members in patterns for key in members]
        loaded = {key for key, row in self.rows.items() if row.reason in LOADED} | {*keys}
        loaded |= {key for group in self.tied() if not loaded.isdisjoint(group) for key in group}
        options = as_options(("--adapt", f"{pattern}={text}") for pattern, text, _ in patterns)
        return f"adapting {listed(keys, 3)} would match {len(loaded)} of {len(self.tensors)} ({options})"

    def _object_rows(self, fate: str) -> list[Row]:
        rows = super()._object_rows(fate)
        entries = self.target.entries()
        detail = "not initialised yet: it gets its shape in the first forward pass"
        return [
            replace(row, reason="missing", detail=detail)
            if row.reason == "ignored" and getattr(entries[row.key][1], "qualname", "") in _LAZY
            else row
            for row in rows
        ]

    def finished(self, origins: Mapping[str, str]) -> tuple[Checkpoint, LoadPartialReport]:
        """Returns (checkpoint, report) with frozen parameters, parameter groups and the optimizer state asked for."""
        options = self.options
        merged, report = self.result(False, [*options.include, *options.exclude])
        loaded = {key for key in self.tensors if self.rows[key].reason in LOADED}
        parameters = handover.parameters(self.tensors)
        live = self.target.format == "model" or modules.is_module(self.target.at(self.target.root))
        frozen = handover.frozen(options.freeze, parameters, loaded, live=live)
        groups = handover.groups(
            parameters, loaded, frozen, self.tensors, new_lr_mult=options.new_lr_mult, weight_decay=options.weight_decay
        )
        handover.check(groups, frozen, parameters)
        merged, notes = self._optimizer(merged)
        notes += [_unset_text(self.unset)] if self.unset else []
        rows = report.rows
        if self.source is None:
            rows = [replace(row, detail=None) if row.reason in ("missing", "bookkeeping") else row for row in rows]
        tied = {alias: group[0] for group in parameters for alias in group[1:]}
        adapted = [key for key in frozen if self.rows[key].reason == "adapted"]
        if adapted:
            notes.append(f"frozen, though not all of their values are the source's: {', '.join(adapted)}")
        return merged, LoadPartialReport(
            sourced(rows, {None: origins}), counts_of(rows), None, report.loaded_fraction,
            None, report.target, report.sources, [*report.notes, *self.notes, *notes],
            options.seed, self.numpy, frozen, handover.moving_batch_norms(self.tensors, frozen), groups, tied,
            self.unset,
        )  # fmt: skip

    def _optimizer(self, merged: Checkpoint) -> tuple[Checkpoint, list[str]]:
        if self.options.optimizer == "drop":
            merged, paths = without_optimizers(merged)
            return merged, [f"dropped: {path_text(path)}" for path in paths]
        if self.options.optimizer == "remap":
            if self.source is None:
                raise UsageError("--optimizer remap needs a SOURCE that has one")
            matches = {key: str(row.source) for key, row in self.rows.items() if row.reason in ("loaded", "cast")}
            renewed = {key: row.source for key, row in self.rows.items() if row.source and key not in matches}
            return resume.carried(self.source, self.target, merged, matches, renewed)
        return merged, [] if self.source is None else resume.left_behind(self.source)
