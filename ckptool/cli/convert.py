"""ckptool convert."""

import os
import re
from dataclasses import replace
from typing import Annotated, Any, NamedTuple

import typer

import ckptool
from ckptool import formats, saving
from ckptool.cli import options, render
from ckptool.cli.output import Outputs
from ckptool.cli.progress import bar
from ckptool.core.checkpoint import Checkpoint
from ckptool.errors import UsageError
from ckptool.io.files import is_directory, place_of
from ckptool.io.paths import is_url
from ckptool.ops.convert import ConvertReport
from ckptool.ops.notes import changed_lines
from ckptool.text import plural, size


def command(
    inputs: Annotated[
        list[str], typer.Argument(metavar="IN...", help="Checkpoints: files, indexes, directories, URLs.")
    ],
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
    set_metadata: Annotated[
        list[str] | None, typer.Option(metavar="NAME=TEXT", help="Set an entry of safetensors' metadata (repeatable).")
    ] = None,
    unset_metadata: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Leave out an entry of its metadata (repeatable).")
    ] = None,
    root: options.Root = None,
    tp_rules: options.TpRules = None,
    map_location: options.MapLocation = None,
    verify: options.Verify = True,
    fsync: options.Fsync = True,
    force: options.Force = False,
    in_place: options.InPlace = False,
    dry_run: options.DryRun = False,
    world_size: options.WorldSize = None,
    report_file: options.Report = None,
    as_json: options.Json = False,
) -> int:
    """Write checkpoints in another format, and verify every tensor.

    $ ckptool convert model.pth -o weights.safetensors
    $ ckptool convert model.pth --to safetensors --dtype bf16 -o half.safetensors
    $ ckptool convert model.pth --to sharded --max-shard-size 5GB -o shards-of-model
    """
    if to is None and output is None:
        raise UsageError("name the format with --to, or the output with -o")
    if len(inputs) > 1 and output is not None:
        raise UsageError("-o takes one input: leave it out, and each of several is written beside its input")
    if keep and dtype is None:
        raise UsageError("--keep goes with --dtype")
    if to is not None:
        formats.named(to)  # an unknown format is reported before anything else
    entries = dict(options.entry(text) for text in set_metadata or ())
    limit = options.shard_size(max_shard_size)
    tags = options.tags(map_location)
    save_options = saving.SaveOptions(
        to, force, in_place, tags, limit, verify, fsync, False, shard_name, with_files, world_size
    )
    outputs = Outputs("convert", save_options, report_file, dry_run, options.form(None, as_json))
    failed = render.Failures(len(inputs))
    jobs: list[Job] = []
    for source in inputs:
        with failed.kept():
            jobs.append(Job.of(source, ckptool.open(source, root=root, tp_rules=tp_rules), to, output))
    if len({place_of(job.path) for job in jobs}) < len(jobs):
        raise UsageError("two inputs would be written to one name")

    def options_of(job: Job) -> saving.SaveOptions:
        return replace(save_options, to=job.to.name, hash_in_name=publish and not job.to.is_directory)

    for job in jobs:
        replace(outputs, options=options_of(job)).check([job.path], [one.checkpoint for one in jobs])

    def converted(job: Job, **how: Any) -> ConvertReport:
        return ckptool.convert(
            job.checkpoint, job.path, to=job.to.name, dtype=dtype, keep=keep or (), dequantize=dequantize, untie=untie,
            publish=publish, metadata=[name for name in (metadata or "").split(",") if name],
            set_metadata=entries, unset_metadata=unset_metadata or (), max_shard_size=limit,
            shard_name=shard_name, with_files=with_files, map_location=tags, verify=verify, fsync=fsync,
            world_size=world_size, **how,
        )  # fmt: skip

    def total() -> int:
        return sum(converted(job, force=True, in_place=True, dry_run=True).nbytes for job in jobs)

    if len(inputs) > 1:  # refuse before the first file is written
        planned, jobs = jobs, []
        for job in planned:
            with failed.kept():
                converted(job, force=force, in_place=in_place, dry_run=True)
                jobs.append(job)
    reports = []
    with bar(total, "copy") as progress:
        for job in jobs:
            with failed.kept():
                report = converted(job, force=force, in_place=in_place, progress=progress, dry_run=dry_run)
                reports.append(replace(report, input=job.source))
                if not as_json and not outputs.said_enough(reports):
                    render.show(_lines(reports[-1], dry_run))
    notes = [note for report in reports for note in report.notes]
    outputs.finish(reports, notes, lambda: _total(reports, dry_run), failed.errors)
    return failed.end()


class Job(NamedTuple):
    """A conversion: an input, and where and as what it is written."""

    source: str
    checkpoint: Checkpoint
    path: str
    to: formats.Format

    @classmethod
    def of(cls, source: str, checkpoint: Checkpoint, to: str | None, output: str | None) -> "Job":
        """Returns the job; without an ``output`` its path is the input's stem with the format's suffix."""
        if output is None and is_url(source):
            raise UsageError("name the output with -o: it cannot be beside an input that is read from a URL", source)
        path = source if is_url(source) else os.path.normpath(source)
        name = re.sub(r"\.index(\.[\w-]+)?\.json$", "", path)
        stem = name if is_directory(path) else saving.split_suffix(name)[0]
        row = formats.writable(output or "", to, checkpoint.format if is_directory(path) else "")
        return cls(source, checkpoint, stem + row.ending if output is None else output, row)


def _lines(report: ConvertReport, dry_run: bool) -> list[str]:
    state = " (dry run)" if dry_run else ""
    text = f"{report.output}{state}: {plural(report.tensors, 'tensor')}, {'about ' if dry_run else ''}"
    text += f"{size(report.nbytes)}{', verified' if report.verified else ''}"
    lines = [["cast", plural(len(report.cast), "tensor")]] if report.cast else []
    lines += [["dequantized", plural(len(report.dequantized), "tensor")]] if report.dequantized else []
    lines += changed_lines(report)
    lines += [["untied", ", ".join(report.untied)]] if report.untied else []
    lines += [["left out", ", ".join(report.left_out)]] if report.left_out else []
    lines += [["note", note] for note in report.notes]
    return [*render.headline(text), *render.aligned([label, render.short(text)] for label, text in lines)]


def _total(reports: list[ConvertReport], dry_run: bool) -> list[str]:
    """Returns the total of several conversions, as one line; no line for a single one."""
    if len(reports) < 2:
        return []
    state = " (dry run), about" if dry_run else ","
    return [f"{len(reports)} converted{state} {size(sum(report.nbytes for report in reports))}"]
