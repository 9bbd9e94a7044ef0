"""ckptool convert."""

import os
import re
from dataclasses import replace
from typing import Annotated, Any

import typer

import ckptool
from ckptool import formats, saving
from ckptool.cli import options, render
from ckptool.cli.output import Outputs, bar, overflow
from ckptool.core.checkpoint import Checkpoint
from ckptool.errors import UsageError
from ckptool.ops.convert import ConvertReport
from ckptool.text import plural, size


def command(
    inputs: Annotated[list[str], typer.Argument(metavar="IN...", help="Checkpoints: files, indexes, directories.")],
    to: Annotated[str | None, typer.Option(metavar="FORMAT", help=f"{', '.join(formats.names())}.")] = None,
    output: Annotated[
        str | None, typer.Option("-o", "--output", metavar="OUT", help="Where to write; else beside the input.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(metavar="DTYPE", help="Cast floats to it (needs torch).")] = None,
    keep: Annotated[list[str] | None, typer.Option(metavar="GLOB", help="With --dtype: keys that stay.")] = None,
    max_shard_size: Annotated[str, typer.Option(metavar="SIZE", help="With --to sharded: bytes per shard.")] = "5GB",
    untie: Annotated[bool, typer.Option("--untie", help="Give tied names memory of their own.")] = False,
    publish: Annotated[bool, typer.Option("--publish", help="Weights only, and the sha256 in the name.")] = False,
    metadata: Annotated[
        str | None, typer.Option(metavar="NAMES", help="Scalars to carry into safetensors: epoch,arch.")
    ] = None,
    root: options.Root = None,
    map_location: options.MapLocation = None,
    verify: options.Verify = True,
    fsync: options.Fsync = True,
    force: options.Force = False,
    in_place: options.InPlace = False,
    dry_run: options.DryRun = False,
    report_file: options.Report = None,
    as_json: options.Json = False,
) -> int:
    """Write checkpoints in another format, every tensor proven."""
    if to is None and output is None:
        raise UsageError("name the format with --to, or the output with -o")
    if len(inputs) > 1 and output is not None:
        raise UsageError("several inputs have no one output: leave out -o, each is written beside its input")
    if keep and dtype is None:
        raise UsageError("--keep goes with --dtype")
    if to is not None:
        formats.named(to)  # the first thing to say of one that there is not
    limit = options.size(max_shard_size)
    if limit < 1:
        raise UsageError(f"{max_shard_size!r} leaves no room for a tensor")
    tags = options.tags(map_location)
    places = [(source, output if output is not None else beside(source, str(to))) for source in inputs]
    if len({os.path.realpath(place) for _, place in places}) < len(places):
        raise UsageError("two inputs would be written to one name")
    wanted = saving.SaveOptions(to, force, in_place, tags, limit, verify, fsync, publish)
    outputs = Outputs("convert", wanted, report_file, dry_run, as_json)
    opened = [(ckptool.open(source, root=root), place) for source, place in places]
    outputs.check([place for _, place in places], [checkpoint for checkpoint, _ in opened])

    def converted(checkpoint: Checkpoint, place: str, **how: Any) -> ConvertReport:
        return ckptool.convert(
            checkpoint, place, to=to, dtype=dtype, keep=keep or (), untie=untie, publish=publish,
            metadata=[name for name in (metadata or "").split(",") if name], max_shard_size=limit, map_location=tags,
            verify=verify, fsync=fsync, **how,
        )  # fmt: skip

    def total() -> int:
        sizes = [converted(*pair, force=True, in_place=True, dry_run=True).nbytes for pair in opened]
        return saving.work(sum(sizes), wanted)

    if len(opened) > 1:  # what will be refused is refused before the first is written
        for pair in opened:
            converted(*pair, force=force, in_place=in_place, dry_run=True)
    reports = []
    with bar(total) as progress:
        for (checkpoint, place), (source, _) in zip(opened, places, strict=True):
            report = converted(
                checkpoint, place, force=force, in_place=in_place, progress=progress, dry_run=dry_run
            )  # fmt: skip
            reports.append(replace(report, input=source))
            if not as_json:
                render.show(_lines(reports[-1], dry_run))
    outputs.finish(reports, [note for report in reports for note in report.notes], lambda: _total(reports, dry_run))
    return 0


def beside(source: str, to: str) -> str:
    """Returns the output's name beside the input: its stem with the format's ending."""
    path = os.path.normpath(source)
    name = re.sub(r"\.index(\.[\w-]+)?\.json$", "", path)
    stem = name if os.path.isdir(path) else saving.split_suffix(name)[0]
    return stem + formats.named(to).ending


def _lines(report: ConvertReport, dry_run: bool) -> list[str]:
    state = " (dry run)" if dry_run else ""
    text = f"{report.output}{state}: {plural(report.tensors, 'tensor')}, {'about ' if dry_run else ''}"
    text += f"{size(report.nbytes)}{', verified' if report.verified else ''}"
    lines = [["cast", plural(len(report.cast), "tensor")]] if report.cast else []
    lines += overflow(report.overflowed)
    lines += [["untied", ", ".join(report.untied)]] if report.untied else []
    lines += [["left out", ", ".join(report.left_out)]] if report.left_out else []
    lines += [["note", note] for note in report.notes]
    return [render.safe(text), *render.aligned(lines)]


def _total(reports: list[ConvertReport], dry_run: bool) -> list[str]:
    """Returns a line about several conversions; none about one, whose own lines say it."""
    if len(reports) == 1:
        return []
    state = " (dry run), about" if dry_run else ","
    return [f"{len(reports)} converted{state} {size(sum(report.nbytes for report in reports))}"]
