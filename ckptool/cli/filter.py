"""ckptool filter."""

from dataclasses import replace
from typing import Annotated

import typer

import ckptool
from ckptool import saving
from ckptool.cli import options, plans, render
from ckptool.errors import UsageError
from ckptool.ops.filter import FilterReport
from ckptool.text import percent


def command(
    sources: Annotated[list[str], typer.Argument(metavar="SOURCE...", help="Checkpoints to take tensors from.")],
    match: Annotated[
        str | None, typer.Option(metavar="TARGET", help="The checkpoint whose keys and shapes count.")
    ] = None,
    output: Annotated[str | None, typer.Option("-o", "--output", metavar="OUT", help="Where to write.")] = None,
    include: Annotated[
        list[str] | None, typer.Option(metavar="GLOB", help="Only keys that fit (re:REGEX too).")
    ] = None,
    exclude: Annotated[list[str] | None, typer.Option(metavar="GLOB", help="No keys that fit.")] = None,
    strip_prefix: Annotated[str | None, typer.Option(metavar="P", help="Take a prefix off the sources' keys.")] = None,
    add_prefix: Annotated[str | None, typer.Option(metavar="P", help="Put a prefix before the sources' keys.")] = None,
    only_matched: Annotated[bool, typer.Option("--only-matched", help="Write only what was matched.")] = False,
    cast: Annotated[bool, typer.Option("--cast", help="Convert to the target's dtypes (needs torch).")] = False,
    min_loaded: Annotated[
        str | None, typer.Option(metavar="90%", help="Exit 1 if fewer of the target's parameters are loaded.")
    ] = None,
    require: Annotated[
        list[str] | None, typer.Option(metavar="GLOB", help="Exit 1 if such a key is not loaded.")
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit 1 on missing, unexpected or mismatched keys.")] = False,
    root: options.Root = None,
    match_root: Annotated[str | None, typer.Option(metavar="PATH", help="Where they are in TARGET.")] = None,
    map_location: options.MapLocation = None,
    verify: options.Verify = False,
    fsync: options.Fsync = True,
    force: options.Force = False,
    in_place: options.InPlace = False,
    dry_run: options.DryRun = False,
    report_file: options.Report = None,
    all_rows: Annotated[bool, typer.Option("--all", help="Show loaded keys too.")] = False,
    as_json: options.Json = False,
) -> int:
    """Keep what fits: TARGET with every tensor that agrees in name and shape taken from SOURCE."""
    if output is None and not dry_run:
        raise UsageError("name the output with -o, or ask for a --dry-run")
    if match is None and (min_loaded or require or strict):
        raise UsageError("--min-loaded, --require and --strict need --match")
    least = plans.fraction(min_loaded)
    tags = options.tags(map_location)
    opened = [ckptool.open(source, root=root) for source in sources]
    target = ckptool.open(match, root=match_root) if match is not None else None
    inputs = [*opened, *([] if target is None else [target])]
    if output is not None:
        saving.check_output(output, saving.SaveOptions(force=True, in_place=True))
    options.check_places(output, report_file, force=force, in_place=in_place, inputs=inputs)
    checkpoint, report = ckptool.filter(
        *opened, match=target, include=include or (), exclude=exclude or (), strip_prefix=strip_prefix,
        add_prefix=add_prefix, only_matched=only_matched, cast=cast,
    )  # fmt: skip
    failed = plans.failed(report, least, require or [], strict)
    if not failed and output is not None:
        written = options.written(
            checkpoint, output, dry_run=dry_run, force=force, in_place=in_place, map_location=tags, verify=verify,
            fsync=fsync,
        )  # fmt: skip
        notes = [*report.notes, *([f"left out: {', '.join(written.left_out)}"] if written.left_out else [])]
        report = replace(report, output=None if dry_run else output, notes=notes)
    document = render.document("filter", report, [*report.notes, *failed])
    if report_file is not None:
        saving.write_text(report_file, render.json_text(document), force=force)
    if as_json:
        render.print_json(document)
    else:
        render.show(_lines(report, output, dry_run, failed, all_rows))
    return int(bool(failed))


def _lines(report: FilterReport, output: str | None, dry_run: bool, failed: list[str], all_rows: bool) -> list[str]:
    counts = report.counts
    total = sum(1 for row in report.rows if row.reason != "unexpected" and row.shape is not None)
    parts = []
    if report.target:
        loaded = f"{report.loaded} loaded ({percent(report.loaded_fraction)} of parameters)"
        parts.append(loaded)
        parts += [f"of them {counts[reason]} {reason}" for reason in ("tied", "cast") if counts.get(reason)]
        lacking = [f"{counts[reason]} {reason}" for reason in ("mismatched", "missing") if counts.get(reason)]
        if lacking:
            parts.append(f"{' and '.join(lacking)} kept from {report.target}")
    else:
        parts.append(f"{report.loaded} of {total} tensors chosen")
    parts += [f"{counts[reason]} {reason}" for reason in ("unexpected", "bookkeeping") if counts.get(reason)]
    if report.target and counts.get("ignored"):
        parts.append(f"{counts['ignored']} ignored")
    name = output or "(dry run)"
    state = " (dry run)" if dry_run and output else " (not written)" if failed else ""
    lines = [render.safe(f"{name}{state}: {', '.join(parts)}")]
    lines += render.aligned(plans.rows_of(report, all_rows))
    if report.hint:
        lines += render.aligned([["hint", report.hint]])
    lines += render.aligned([["note", text] for text in report.notes])
    lines += render.aligned([["failed", text] for text in failed])
    return lines
