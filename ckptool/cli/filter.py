"""ckptool filter."""

from dataclasses import replace
from functools import partial
from typing import Annotated

import typer

import ckptool
from ckptool import references
from ckptool.cli import options
from ckptool.cli.output import Outputs, heading
from ckptool.cli.screens import plans
from ckptool.errors import UsageError
from ckptool.ops.rows import FilterReport
from ckptool.reports import gates
from ckptool.saving import SaveOptions
from ckptool.text import percent


def command(
    ctx: typer.Context,
    sources: Annotated[list[str], typer.Argument(metavar="SOURCE...", help="Checkpoints to take tensors from.")],
    match: Annotated[
        str | None,
        typer.Option(
            metavar="TARGET", help="Whose keys and shapes to match: a checkpoint, or PKG.MOD:NAME, which is run."
        ),
    ] = None,
    arg: options.Arg = None,
    output: options.Output = None,
    to: options.To = None,
    max_shard_size: options.MaxShardSize = "5GB",
    shard_name: options.ShardName = None,
    with_files: options.WithFiles = False,
    include: options.Include = None,
    exclude: options.Exclude = None,
    strip_prefix: options.StripPrefix = None,
    add_prefix: options.AddPrefix = None,
    rename: options.Rename = None,
    rules: options.RulesFiles = None,
    auto_remap: options.AutoRemap = False,
    allow_unused: options.AllowUnused = False,
    optimizer: Annotated[
        str | None, typer.Option(metavar="keep|drop", help="Optimizer state: keep it (the default), or leave it out.")
    ] = None,
    only_matched: Annotated[bool, typer.Option("--only-matched", help="Write only the tensors that matched.")] = False,
    cast: Annotated[bool, typer.Option("--cast", help="Convert to the target's dtypes.")] = False,
    first_wins: Annotated[
        bool, typer.Option("--first-wins", help="Without --match: a key in two sources is the first one's.")
    ] = False,
    min_loaded: options.MinLoaded = None,
    require: options.Require = None,
    strict: options.Strict = False,
    root: options.Root = None,
    match_root: Annotated[str | None, typer.Option(metavar="PATH", help="Where the weights are in TARGET.")] = None,
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
    """Keep what fits: TARGET, with every tensor that agrees in name and shape taken from SOURCE.

    $ ckptool filter --match new.pth model.pth -o merged.pth
    $ ckptool filter --match new.pth model.pth -o merged.pth --dry-run --min-loaded 90%
    $ ckptool filter model.pth --exclude 'fc.*' -o backbone.pth
    """
    options.require_output(output, dry_run)
    if match is None and (min_loaded or require or strict):
        raise UsageError("--min-loaded, --require and --strict need --match")
    least = plans.fraction(min_loaded)
    save_options = SaveOptions(
        to, force, in_place, options.tags(map_location), options.shard_size(max_shard_size), verify, fsync, False,
        shard_name, with_files, world_size,
    )  # fmt: skip
    outputs = Outputs("filter", save_options, report_file, dry_run, options.form(form, as_json))
    opened = [ckptool.open(source, root=root, tp_rules=tp_rules) for source in sources]
    options.refuse_arguments(arg, match)
    target = options.reference(match, match_root, arg, tp_rules) if match is not None else None
    outputs.check([] if output is None else [output], [*opened, *([] if target is None else [target])])
    merge = partial(
        ckptool.filter, *opened, include=include or (), exclude=exclude or (), strip_prefix=strip_prefix or (),
        add_prefix=add_prefix, only_matched=only_matched, cast=cast, first_wins=first_wins, optimizer=optimizer,
        auto_remap=auto_remap,
        rules=options.in_order(ctx, rename=rename, rules=rules) if rename or rules else None, allow_unused=allow_unused,
    )  # fmt: skip
    checkpoint, report = merge(match=target)
    failed = gates.failed(report, least, require or [], strict)
    empty = any(one.kind == "meta" for one in (*checkpoint.state_dict().values(), *checkpoint.inside().values()))
    if match is not None and references.is_code(match) and empty and not failed:  # values of the model stay
        checkpoint, report = merge(match=options.reference(match, match_root, arg, tp_rules, values=True))
    report = replace(report, failed=failed)
    if not failed:
        report = outputs.write(checkpoint, output, report)
    begin = heading(dry_run, output, bool(failed))
    outputs.finish(report, [*report.notes, *(gate.text for gate in failed)], lambda: _lines(report, begin, all_rows))
    return int(bool(failed))


def _lines(report: FilterReport, begin: str, all_rows: bool) -> list[str]:
    counts = report.counts
    total = sum(1 for row in report.rows if row.reason != "unexpected" and row.shape is not None)
    if report.target:
        parts = [f"{report.loaded} loaded ({percent(report.loaded_fraction)} of parameters)"]
        parts += [f"of them {counts[reason]} {reason}" for reason in ("tied", "cast") if counts.get(reason)]
        lacking = [f"{counts[reason]} {reason}" for reason in ("mismatched", "missing") if counts.get(reason)]
        if lacking:
            parts.append(f"{' and '.join(lacking)} kept from {report.target}")
    else:
        parts = [f"{report.loaded} of {total} tensors chosen"]
    parts += [f"{counts[reason]} {reason}" for reason in ("unexpected", "bookkeeping") if counts.get(reason)]
    if report.target and counts.get("ignored"):
        parts.append(f"{counts['ignored']} ignored")
    return [*plans.head(report, begin + ", ".join(parts), all_rows), *plans.tail(report)]
