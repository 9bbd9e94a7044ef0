"""ckptool convert."""

import os
import re
from dataclasses import replace
from typing import Annotated, Any

import typer

import ckptool
from ckptool import formats, saving
from ckptool.cli import options, render
from ckptool.cli.output import Outputs, bar
from ckptool.core.checkpoint import Checkpoint
from ckptool.errors import UsageError, listed
from ckptool.ops.convert import ConvertReport
from ckptool.ops.notes import changed_lines
from ckptool.text import plural, size


def command(
    inputs: Annotated[list[str], typer.Argument(metavar="IN...", help="Checkpoints: files, indexes, directories.")],
    to: options.To = None,
    output: Annotated[
        str | None, typer.Option("-o", "--output", metavar="OUT", help="Where to write. Default: beside the input.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(metavar="DTYPE", help="Cast floats to it: bf16, float32, ...")] = None,
    keep: Annotated[list[str] | None, typer.Option(metavar="GLOB", help="With --dtype: keys not to cast.")] = None,
    dequantize: Annotated[
        bool, typer.Option("--dequantize", help="Multiply weights by the scales beside them, or GGUF's in them.")
    ] = False,
    max_shard_size: options.MaxShardSize = "5GB",
    shard_name: options.ShardName = None,
    with_files: options.WithFiles = False,
    untie: Annotated[bool, typer.Option("--untie", help="Store tied tensors separately.")] = False,
    publish: Annotated[bool, typer.Option("--publish", help="Weights only, with the sha256 in the name.")] = False,
    metadata: Annotated[
        str | None, typer.Option(metavar="NAMES", help="Scalars to carry into safetensors: epoch,arch.")
    ] = None,
    root: options.Root = None,
    tp_rules: options.TpRules = None,
    map_location: options.MapLocation = None,
    verify: options.Verify = True,
    fsync: options.Fsync = True,
    force: options.Force = False,
    in_place: options.InPlace = False,
    dry_run: options.DryRun = False,
    report_file: options.Report = None,
    as_json: options.Json = False,
) -> int:
    """Write checkpoints in another format, and verify every tensor."""
    if to is None and output is None:
        raise UsageError("name the format with --to, or the output with -o")
    if len(inputs) > 1 and output is not None:
        raise UsageError("-o takes one input: leave it out, and each of several is written beside its input")
    if keep and dtype is None:
        raise UsageError("--keep goes with --dtype")
    if to is not None:
        formats.named(to)  # an unknown format is reported before anything else
    limit = options.shard_size(max_shard_size)
    tags = options.tags(map_location)
    paths = [output if output is not None else beside(source, str(to)) for source in inputs]
    if len({os.path.realpath(path) for path in paths}) < len(paths):
        raise UsageError("two inputs would be written to one name")
    hash_in_name = publish and not formats.writable(paths[0], to).is_directory
    save_options = saving.SaveOptions(
        to, force, in_place, tags, limit, verify, fsync, hash_in_name, shard_name, with_files
    )
    source_of = dict(zip(paths, inputs, strict=True))
    outputs = Outputs("convert", save_options, report_file, dry_run, as_json)
    failed = render.Failures(len(inputs))
    jobs: list[tuple[Checkpoint, str]] = []
    for path, source in source_of.items():
        with failed.kept():
            jobs.append((ckptool.open(source, root=root, tp_rules=tp_rules), path))
    outputs.check([path for _, path in jobs], [checkpoint for checkpoint, _ in jobs])

    def converted(checkpoint: Checkpoint, path: str, **how: Any) -> ConvertReport:
        return ckptool.convert(
            checkpoint, path, to=to, dtype=dtype, keep=keep or (), dequantize=dequantize, untie=untie, publish=publish,
            metadata=[name for name in (metadata or "").split(",") if name], max_shard_size=limit,
            shard_name=shard_name, with_files=with_files, map_location=tags, verify=verify, fsync=fsync, **how,
        )  # fmt: skip

    def total() -> int:
        sizes = [converted(*job, force=True, in_place=True, dry_run=True).nbytes for job in jobs]
        return saving.work(sum(sizes), save_options)

    if len(inputs) > 1:  # refuse before the first file is written
        planned, jobs = jobs, []
        for job in planned:
            with failed.kept():
                converted(*job, force=force, in_place=in_place, dry_run=True)
                jobs.append(job)
    reports = []
    with bar(total) as progress:
        for job in jobs:
            with failed.kept():
                report = converted(*job, force=force, in_place=in_place, progress=progress, dry_run=dry_run)
                reports.append(replace(report, input=source_of[job[1]]))
                if not as_json:
                    render.show(_lines(reports[-1], dry_run))
    notes = [note for report in reports for note in report.notes]
    outputs.finish(reports, notes, lambda: _total(reports, dry_run), failed.errors)
    return failed.end()


def beside(source: str, to: str) -> str:
    """Returns the output's default path: the input's stem with the format's suffix."""
    path = os.path.normpath(source)
    name = re.sub(r"\.index(\.[\w-]+)?\.json$", "", path)
    stem = name if os.path.isdir(path) else saving.split_suffix(name)[0]
    return stem + formats.named(to).ending


def _lines(report: ConvertReport, dry_run: bool) -> list[str]:
    state = " (dry run)" if dry_run else ""
    text = f"{report.output}{state}: {plural(report.tensors, 'tensor')}, {'about ' if dry_run else ''}"
    text += f"{size(report.nbytes)}{', verified' if report.verified else ''}"
    lines = [["cast", plural(len(report.cast), "tensor")]] if report.cast else []
    lines += [["dequantized", plural(len(report.dequantized), "tensor")]] if report.dequantized else []
    lines += changed_lines(report)
    lines += [["untied", ", ".join(report.untied)]] if report.untied else []
    lines += [["left out", listed(report.left_out, 20)]] if report.left_out else []
    lines += [["note", note] for note in report.notes]
    return [render.safe(text), *render.aligned(lines)]


def _total(reports: list[ConvertReport], dry_run: bool) -> list[str]:
    """Returns the total of several conversions, as one line; no line for a single one."""
    if len(reports) < 2:
        return []
    state = " (dry run), about" if dry_run else ","
    return [f"{len(reports)} converted{state} {size(sum(report.nbytes for report in reports))}"]
