"""ckptool load-partial."""

import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, replace
from typing import Annotated, Any

import typer

import ckptool
from ckptool.cli import options, plans, render
from ckptool.cli.options import Texts
from ckptool.cli.output import Outputs, heading, overflow
from ckptool.core.checkpoint import Checkpoint
from ckptool.errors import UsageError, listed
from ckptool.partial import adapters, presets
from ckptool.partial import init as init_rules
from ckptool.partial.plan import LoadPartialReport, unwritable
from ckptool.saving import SaveOptions
from ckptool.text import percent, plural


def command(
    source: Annotated[str | None, typer.Argument(metavar="[SOURCE]", help="The checkpoint to load from.")] = None,
    into: Annotated[str | None, typer.Option(metavar="TARGET", help="A checkpoint of the changed model.")] = None,
    model: Annotated[
        str | None, typer.Option(metavar="PKG.MOD:NAME", help="Your class or factory of the changed model: it is run.")
    ] = None,
    arg: Annotated[Texts, typer.Option(metavar="NAME=VALUE", help="What --model is called with; TOML values.")] = None,
    output: options.Output = None,
    to: Annotated[
        str | None, typer.Option(metavar="FORMAT", help="Of OUT, if its suffix does not say: sharded.")
    ] = None,
    rules: Annotated[str | None, typer.Option(metavar="FILE", help="Rename SOURCE's keys first; see remap.")] = None,
    allow_unused: Annotated[bool, typer.Option("--allow-unused", help="Let rules fit no key.")] = False,
    adapt: Annotated[
        Texts, typer.Option(metavar="GLOB=ADAPTER", help="Where shapes differ: rows, crop, pos-embed, ...")
    ] = None,
    init: Annotated[
        Texts, typer.Option(metavar="GLOB=RULE", help="How to initialise keys that were not loaded: zeros, ...")
    ] = None,
    init_preset: Annotated[
        Texts, typer.Option(metavar="NAME", help="A recipe for all that is not loaded; list shows them.")
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="The same seed gives the same values.")] = 0,
    freeze: Annotated[
        Texts, typer.Option(metavar="WHAT", help="loaded, first:N blocks, or GLOB: not to be trained.")
    ] = None,
    groups_out: Annotated[
        str | None, typer.Option(metavar="FILE", help="Write the optimizer's parameter groups (JSON).")
    ] = None,
    new_lr_mult: Annotated[float, typer.Option(metavar="X", help="Learning rate of new parameters.")] = 10.0,
    weight_decay: Annotated[float, typer.Option(metavar="X", help="Of weights; biases and norms have none.")] = 0.0,
    optimizer: Annotated[
        str | None, typer.Option(metavar="drop|remap", help="The state of the source's optimizer.")
    ] = None,
    include: options.Include = None,
    exclude: options.Exclude = None,
    strip_prefix: options.StripPrefix = None,
    add_prefix: options.AddPrefix = None,
    min_loaded: options.MinLoaded = None,
    require: options.Require = None,
    strict: options.Strict = False,
    root: options.Root = None,
    into_root: Annotated[str | None, typer.Option(metavar="PATH", help="Where they are in TARGET.")] = None,
    map_location: options.MapLocation = None,
    verify: options.Verify = False,
    fsync: options.Fsync = True,
    force: options.Force = False,
    in_place: options.InPlace = False,
    dry_run: options.DryRun = False,
    report_file: options.Report = None,
    all_rows: options.AllRows = False,
    as_json: options.Json = False,
) -> int:
    """Load what fits of SOURCE into a changed model, adapt shapes, initialise the rest, hand over."""
    if init_preset and "list" in init_preset:
        if as_json:
            render.print_json(render.document("load-partial", {"presets": presets.PRESETS}))
        else:
            render.show([render.safe(line) for line in presets.described()])
        return 0
    _check(source, into, model, arg, output, dry_run, init, init_preset)
    least = plans.fraction(min_loaded)
    wanted = SaveOptions(to, force, in_place, options.tags(map_location), verify=verify, fsync=fsync)
    outputs = Outputs("load-partial", wanted, report_file, dry_run, as_json)
    opened = ckptool.open(source, root=root) if source is not None else None
    target: Any = ckptool.open(into, root=into_root) if into is not None else None
    inputs = [checkpoint for checkpoint in (opened, target) if checkpoint is not None]
    outputs.check([] if output is None else [output], inputs, groups_out)
    if model is not None:
        target = build(model, arg or [])
    checkpoint, report = ckptool.plan_partial(
        opened, target, rules=None if rules is None else options.read_data(rules), allow_unused=allow_unused,
        adapt=[_pair(text, adapters.parse_option) for text in adapt or ()],
        init=[_pair(text, _init_option) for text in init or ()],
        init_preset=init_preset or (), seed=seed, freeze=freeze or (), new_lr_mult=new_lr_mult,
        weight_decay=weight_decay, optimizer=optimizer, include=include or (), exclude=exclude or (),
        strip_prefix=strip_prefix, add_prefix=add_prefix,
    )  # fmt: skip
    if model is not None:
        _refuse_unwritable(checkpoint)
        report = replace(report, notes=[f"imported and ran {model}, your own code, to build the model", *report.notes])
    failed = plans.failed(report, least, require or [], strict)
    if not failed:
        report = outputs.write(checkpoint, output, report)
        outputs.write_beside(groups_out, groups_document(report))
    begin = heading(dry_run, output, failed)
    groups = bool(groups_out or freeze)
    outputs.finish(report, [*report.notes, *failed], lambda: _lines(report, begin, failed, all_rows, groups))
    return int(bool(failed))


def _check(
    source: str | None,
    into: str | None,
    model: str | None,
    arg: Texts,
    output: str | None,
    dry_run: bool,
    init: Texts,
    init_preset: Texts,
) -> None:
    """Raises UsageError for options that contradict each other."""
    if (into is None) == (model is None):
        raise UsageError("name the changed model by one of --into TARGET and --model PKG.MOD:NAME")
    if arg and model is None:
        raise UsageError("--arg goes with --model")
    if source is None and not init and not init_preset:
        raise UsageError("name a SOURCE to load from, or how to initialise with --init or --init-preset")
    options.require_output(output, dry_run)


def _init_option(text: str) -> tuple[str, str]:
    return init_rules.parse_option(text)


def _pair(text: str, parse: Any) -> tuple[str, str]:
    """Returns (pattern, what for it) of an option's text, as the library takes it."""
    pattern, made = parse(text)
    return pattern, made if isinstance(made, str) else made.text


def build(name: str, arguments: Sequence[str]) -> Any:
    """Returns the model that the user's own class or factory ``pkg.mod:name`` makes; imports and runs it.

    Raises: UsageError if it cannot be found, or fails.
    """
    module_name, colon, path = name.partition(":")
    if not (module_name and colon and path):
        raise UsageError(f"--model takes PKG.MOD:NAME, not {name!r}")
    given = dict(_argument(text) for text in arguments)
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        with redirect_stdout(sys.stderr):  # what it prints is not our answer
            found: Any = importlib.import_module(module_name)
            for step in path.split("."):
                found = getattr(found, step)
            made = found(**given)
    except (Exception, SystemExit) as error:  # whatever the user's code raises is theirs to read, in one line
        raise UsageError(f"--model {name}: {type(error).__name__}: {error}") from error
    if isinstance(made, (str, os.PathLike, Mapping, Checkpoint)):  # which the library would open
        raise UsageError(f"--model {name}: not a torch.nn.Module but a {type(made).__name__}")
    return made


def _argument(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not (equals and name.isidentifier()):
        raise UsageError(f"--arg takes NAME=VALUE, not {text!r}")
    import tomllib

    try:
        return name, tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"--arg {name}: {value} is no TOML value (a text needs quotes: '{name}=\"x\"')") from error


def _refuse_unwritable(checkpoint: Checkpoint) -> None:
    """Raises UsageError for what a live model holds that has no place in a file: sparse tensors, own classes."""
    foreign = unwritable(checkpoint)
    if foreign:
        raise UsageError(f"the model's state_dict holds what cannot be written: {listed(foreign, 20)}")


def groups_document(report: LoadPartialReport) -> dict[str, Any]:
    """Returns what --groups-out writes: disjoint groups of parameter names, those frozen, other names of tied ones."""
    groups = [asdict(group) for group in report.groups]
    return {"schema": 1, "groups": groups, "frozen": report.frozen, "tied": report.tied}


def _lines(report: LoadPartialReport, begin: str, failed: list[str], all_rows: bool, groups: bool) -> list[str]:
    counts = report.counts
    total = sum(1 for row in report.rows if row.reason != "unexpected" and row.shape is not None)
    parts = [f"{total} tensors"]
    if report.sources:
        parts = [f"{len(report.loaded)} loaded ({percent(report.loaded_fraction)} of parameters)"]
        among = [f"{counts[name]} {name}" for name in ("tied", "cast", "adapted") if counts.get(name)]
        parts += [f"of them {' and '.join(among)}"] if among else []
    parts += [f"{counts['initialised']} initialised (seed {report.seed})"] if counts.get("initialised") else []
    lacking = ("mismatched", "missing")
    kept = [f"{counts[reason]} {reason if report.sources else ''}".strip() for reason in lacking if counts.get(reason)]
    parts += [f"{' and '.join(kept)} kept from {report.target}"] if kept else []
    parts += [f"{counts[name]} {name}" for name in ("unexpected", "bookkeeping", "ignored") if counts.get(name)]
    lines = [render.safe(begin + ", ".join(parts))]
    lines += render.aligned(plans.rows_of(report, all_rows))
    lines += render.aligned([["hint", report.hint]] if report.hint else [])
    trained = sum(len(group.params) for group in report.groups)
    if report.frozen:
        lines += render.aligned([["frozen", f"{len(report.frozen)} of {len(report.frozen) + trained} parameters"]])
    if report.moving:
        text = f"{listed(report.moving)}: frozen, and their running statistics still move in train mode: eval() them"
        lines += render.aligned([["batchnorm", text]])
    if groups:
        lines += render.aligned(
            [["group", group.name, f"{plural(len(group.params), 'parameter')}, learning rate "
              f"x{group.lr_mult:g}, weight decay {group.weight_decay:g}"] for group in report.groups]
        )  # fmt: skip
    lines += render.aligned(overflow(report.overflowed))
    lines += render.aligned([["note", text] for text in report.notes])
    lines += render.aligned([["failed", text] for text in failed])
    return lines
