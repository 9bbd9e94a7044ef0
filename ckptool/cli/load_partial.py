"""ckptool load-partial."""

from dataclasses import asdict, replace
from functools import partial
from typing import Annotated, Any

import typer

import ckptool
from ckptool import references
from ckptool.cli import options, render
from ckptool.cli.options import Texts
from ckptool.cli.output import Outputs, heading
from ckptool.cli.screens import plans
from ckptool.errors import UsageError
from ckptool.partial import adapters, presets
from ckptool.partial import init as init_rules
from ckptool.partial.plan import LoadPartialReport, UnsetError, refuse_unset
from ckptool.reports import document, gates
from ckptool.saving import SaveOptions
from ckptool.text import percent, plural


def command(
    ctx: typer.Context,
    source: Annotated[str | None, typer.Argument(metavar="[SOURCE]", help="The checkpoint to load from.")] = None,
    into: Annotated[
        str | None, typer.Option(metavar="TARGET", help="The changed model: a checkpoint, or code as for --model.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="PKG.MOD:NAME", help="The changed model in code, a class or factory of yours: it is run."),
    ] = None,
    arg: options.Arg = None,
    output: options.Output = None,
    to: options.To = None,
    max_shard_size: options.MaxShardSize = "5GB",
    shard_name: options.ShardName = None,
    with_files: options.WithFiles = False,
    rename: options.Rename = None,
    rules: options.RulesFiles = None,
    auto_remap: options.AutoRemap = False,
    allow_unused: options.AllowUnused = False,
    adapt: Annotated[
        Texts, typer.Option(metavar="GLOB=ADAPTER", help="Where shapes differ: rows, crop, pos-embed, ...")
    ] = None,
    init: Annotated[
        Texts, typer.Option(metavar="GLOB=RULE", help="How to initialise keys that were not loaded: zeros, ...")
    ] = None,
    init_preset: Annotated[
        Texts, typer.Option(metavar="NAME", help="A recipe for all keys that were not loaded; 'list' shows them.")
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="For --init: the same seed gives the same values.")] = 0,
    freeze: Annotated[
        Texts, typer.Option(metavar="WHAT", help="What not to train: loaded, first:N (blocks), or GLOB.")
    ] = None,
    groups_out: Annotated[
        str | None, typer.Option(metavar="FILE", help="Write the optimizer's parameter groups (JSON).")
    ] = None,
    new_lr_mult: Annotated[float, typer.Option(metavar="X", help="Learning rate factor of new parameters.")] = 10.0,
    weight_decay: Annotated[float, typer.Option(metavar="X", help="Weight decay; not of biases and norms.")] = 0.0,
    optimizer: Annotated[
        str | None, typer.Option(metavar="drop|remap", help="Optimizer state: leave it out, or carry SOURCE's.")
    ] = None,
    include: options.Include = None,
    exclude: options.Exclude = None,
    strip_prefix: options.StripPrefix = None,
    add_prefix: options.AddPrefix = None,
    min_loaded: options.MinLoaded = None,
    require: options.Require = None,
    strict: options.Strict = False,
    root: options.Root = None,
    into_root: Annotated[str | None, typer.Option(metavar="PATH", help="Where the weights are in TARGET.")] = None,
    tp_rules: options.TpRules = None,
    map_location: options.MapLocation = None,
    verify: options.Verify = False,
    fsync: options.Fsync = True,
    force: options.Force = False,
    in_place: options.InPlace = False,
    dry_run: options.DryRun = False,
    world_size: options.WorldSize = None,
    report_file: options.Report = None,
    all_rows: options.AllRows = False,
    form: options.Format = None,
    as_json: options.Json = False,
) -> int:
    """Load what fits of SOURCE into a changed model, adapt shapes, initialise the rest.

    $ ckptool load-partial model.pth --into new.pth --init 'fc.*=normal(std=0.01)' -o start.pth
    $ ckptool load-partial model.pth --into new.pth --adapt 'fc.*=rows' --freeze loaded -o start.pth
    $ ckptool load-partial --init-preset list
    """
    if init_preset and "list" in init_preset:
        if options.form(form, as_json) == "json":
            render.write(document.text(document.of("load-partial", {"presets": presets.PRESETS})))
        else:
            render.show([render.safe(line) for line in presets.described()])
        return 0
    if (into is None) == (model is None):
        raise UsageError("name the changed model by one of --into TARGET and --model PKG.MOD:NAME")
    if into is not None and references.is_code(into):
        into, model = None, into
    if model is None:
        options.refuse_arguments(arg)
    elif into_root is not None:
        raise UsageError("--into-root is of a checkpoint: the weights of a model in code are all of its state_dict")
    if source is None and not init and not init_preset:
        raise UsageError("name a SOURCE to load from, or how to initialise with --init or --init-preset")
    options.require_output(output, dry_run)
    least = plans.fraction(min_loaded)
    save_options = SaveOptions(
        to, force, in_place, options.tags(map_location), options.shard_size(max_shard_size), verify, fsync, False,
        shard_name, with_files, world_size,
    )  # fmt: skip
    outputs = Outputs("load-partial", save_options, report_file, dry_run, options.form(form, as_json))
    opened = ckptool.open(source, root=root, tp_rules=tp_rules) if source is not None else None
    target: Any = ckptool.open(into, root=into_root, tp_rules=tp_rules) if into is not None else None
    inputs = [checkpoint for checkpoint in (opened, target) if checkpoint is not None]
    outputs.check([] if output is None else [output], inputs, groups_out)
    if model is not None:
        from ckptool.references import code

        target = code.built(model, arg or [])
    changes = options.in_order(ctx, rename=rename, rules=rules) if rename or rules else None
    try:
        checkpoint, report = ckptool.plan_partial(
            opened, target, auto_remap=auto_remap, rules=changes, allow_unused=allow_unused,
            adapt=[(pattern, adapter.text) for pattern, adapter in map(adapters.parse_option, adapt or ())],
            init=[init_rules.parse_option(text) for text in init or ()],
            init_preset=init_preset or (), seed=seed, freeze=freeze or (), new_lr_mult=new_lr_mult,
            weight_decay=weight_decay, optimizer=optimizer, include=include or (), exclude=exclude or (),
            strip_prefix=strip_prefix or (), add_prefix=add_prefix,
        )  # fmt: skip
    except UnsetError as error:  # refused after the gates were judged
        checkpoint, report = error.planned
    if model is not None:
        report = replace(report, notes=[f"imported and ran {model}, your own code, to build the model", *report.notes])
    failed = gates.failed(report, least, require or [], strict)
    report = replace(report, failed=failed)
    refused = render.Failures(1)
    if not failed:
        if output or not (least is not None or require or strict):
            with refused.kept(later=output is None):  # a dry run shows the report too
                refuse_unset(checkpoint, report)
        report = outputs.write(checkpoint, output, report)
        outputs.write_beside(groups_out, groups_document(report))
    begin = heading(dry_run, output, bool(failed))
    lines = partial(_lines, report, begin, all_rows, bool(groups_out or freeze))
    outputs.finish(report, [*report.notes, *(gate.text for gate in failed)], lines, refused.errors)
    return int(bool(failed)) or refused.end()


def groups_document(report: LoadPartialReport) -> dict[str, Any]:
    """Returns what --groups-out writes: disjoint groups of parameters, frozen ones, and other names of tied ones."""
    groups = [asdict(group) for group in report.groups]
    return {"schema": 1, "groups": groups, "frozen": report.frozen, "tied": report.tied}


def _lines(report: LoadPartialReport, begin: str, all_rows: bool, groups: bool) -> list[str]:
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
    lines = plans.head(report, begin + ", ".join(parts), all_rows)
    trained = sum(len(group.params) for group in report.groups)
    if report.frozen:
        lines += render.aligned([["frozen", f"{len(report.frozen)} of {len(report.frozen) + trained} parameters"]])
    if report.moving:
        text = "frozen, and their running statistics still move in train mode: eval() them"
        moving = ", ".join(name for name, _ in render.fold([(name, None) for name in report.moving]))
        lines += render.aligned([["batchnorm", f"{render.short(moving)}: {text}"]])
    if groups:
        lines += render.aligned(
            [["group", group.name, f"{plural(len(group.params), 'parameter')}, learning rate "
              f"x{group.lr_mult:g}, weight decay {group.weight_decay:g}"] for group in report.groups]
        )  # fmt: skip
    return [*lines, *plans.tail(report)]
