"""ckptool remap."""

import os
from collections import Counter
from dataclasses import replace
from typing import Annotated

import typer

import ckptool
from ckptool import formats
from ckptool.cli import options, render
from ckptool.cli.options import Texts
from ckptool.cli.output import Outputs, heading
from ckptool.core.checkpoint import Checkpoint
from ckptool.errors import UsageError
from ckptool.ops.remap import RemapReport
from ckptool.ops.rules import PRESETS
from ckptool.saving import SaveOptions
from ckptool.text import plural


def command(
    ctx: typer.Context,
    file: Annotated[str, typer.Argument(metavar="FILE", help="A checkpoint.")],
    output: options.Output = None,
    to: options.To = None,
    max_shard_size: options.MaxShardSize = "5GB",
    shard_name: options.ShardName = None,
    with_files: options.WithFiles = False,
    strip_prefix: Annotated[Texts, typer.Option(metavar="P", help="Remove a prefix from keys that have it.")] = None,
    add_prefix: Annotated[Texts, typer.Option(metavar="P", help="Add a prefix to every key.")] = None,
    rename: options.Rename = None,
    sub: Annotated[Texts, typer.Option(metavar="s/RE/NEW/", help="Replace all matches of a regex.")] = None,
    drop: Annotated[Texts, typer.Option(metavar="GLOB", help="Leave out keys that match (re:REGEX too).")] = None,
    copy: Annotated[Texts, typer.Option(metavar="NEW=OLD", help="Give a tensor a second name, tied to it.")] = None,
    preset: Annotated[Texts, typer.Option(metavar="NAME", help=f"Rules by name: {', '.join(PRESETS)}.")] = None,
    rules: options.RulesFiles = None,
    invert: Annotated[str | None, typer.Option(metavar="MAP", help="Undo what --save-map recorded.")] = None,
    save_map: Annotated[str | None, typer.Option(metavar="MAP", help="Write what was done, for --invert.")] = None,
    allow_unused: options.AllowUnused = False,
    root: options.Root = None,
    tp_rules: options.TpRules = None,
    map_location: options.MapLocation = None,
    verify: options.Verify = False,
    fsync: options.Fsync = True,
    force: options.Force = False,
    in_place: options.InPlace = False,
    dry_run: options.DryRun = False,
    report_file: options.Report = None,
    as_json: options.Json = False,
) -> int:
    """Rename keys and reshape tensors by rules, in the order given.

    $ ckptool remap model.pth --rename layer1=stage1 -o renamed.pth
    $ ckptool remap model.pth --add-prefix backbone. -o renamed.pth --save-map map.json
    $ ckptool remap renamed.pth --invert map.json -o back.pth
    """
    options.require_output(output, dry_run)
    chosen = options.in_order(
        ctx, strip_prefix=strip_prefix, add_prefix=add_prefix, rename=rename, sub=sub, drop=drop, copy=copy,
        preset=preset, rules=rules,
    )  # fmt: skip
    if invert is not None and chosen.rules:
        raise UsageError("--invert goes with no other rule")
    if invert is None and not chosen.rules:
        raise UsageError("no rule: see --rename, --strip-prefix, --sub, --rules and the others in --help")
    opened = ckptool.open(file, root=root, tp_rules=tp_rules)
    to = _own_format(opened, output) if to is None and output is not None else to
    save_options = SaveOptions(
        to, force, in_place, options.tags(map_location), options.shard_size(max_shard_size), verify, fsync, False,
        shard_name, with_files,
    )  # fmt: skip
    outputs = Outputs("remap", save_options, report_file, dry_run, options.form(None, as_json))
    outputs.check([] if output is None else [output], [opened], save_map)
    if invert is not None:
        checkpoint, report = ckptool.invert(opened, options.read_data(invert))
    else:
        checkpoint, report = ckptool.remap(opened, chosen, allow_unused=allow_unused)
    report = outputs.write(checkpoint, output, report)
    outputs.write_beside(save_map, report.saved)
    begin = heading(dry_run, output)
    outputs.finish(replace(report, saved=None), report.notes, lambda: _lines(report, begin))
    return 0


def _own_format(opened: Checkpoint, output: str) -> str | None:
    """Returns the input's format, or None where the output's path decides, or is refused.

    It decides if it is a directory's, if its suffix stands for a format of another family, or if the input's format
    cannot be written.
    """
    own = formats.labelled(opened.format)
    by_suffix = formats.by_suffix(output)
    if own is None or formats.is_directory(output) or (by_suffix is not None and by_suffix.name != own.family):
        return None
    if own.writes or (by_suffix is None and not os.path.splitext(output)[1]):
        return own.written_as or None
    return None


def _lines(report: RemapReport, begin: str) -> list[str]:
    renamed = sum(row.op == "rename" and row.old != [row.new] for row in report.map)
    copied = sum(row.op == "copy" for row in report.map)
    made = sum(row.op not in ("rename", "copy") for row in report.map)
    parts = [plural(len(report.map), "key"), f"{renamed:,} renamed"]
    parts += [f"{copied:,} copied"] if copied else []
    parts += [f"{made:,} computed"] if made else []
    parts += [f"{len(report.dropped):,} dropped"] if report.dropped else []
    lines = render.headline(begin + ", ".join(parts))
    lines += render.aligned(_renamed(report), keys=True)
    made_rows = [(f"{', '.join(row.old)} -> {row.new}", row.op) for row in report.map if row.op != "rename"]
    lines += render.aligned([[name, made_rows[members[0]][1]] for name, members in render.fold(made_rows)], keys=True)
    lines += render.aligned([["dropped", name] for name, _ in render.fold([(key, None) for key in report.dropped])])
    lines += render.aligned([["note", render.short(text)] for text in report.notes])
    lines += render.aligned([["unused", text] for text in report.unused_rules])
    return lines


def _renamed(report: RemapReport) -> list[list[str]]:
    """Returns a line per kind of rename, ``module.layer1 -> stages.1``, without equal last segments; else per key."""
    counts: Counter[tuple[str, str]] = Counter()
    renamed = [row for row in report.map if row.op == "rename" and row.old != [row.new]]
    if not render.folds():
        return [[row.old[0], "->", row.new] for row in renamed]
    for row in renamed:
        if row.new.endswith(f".{row.old[0]}"):  # a fast path: a prefix is often added to every key
            counts["", row.new[: -len(row.old[0]) - 1]] += 1
            continue
        old, new = row.old[0].split("."), row.new.split(".")
        while old and new and old[-1] == new[-1]:
            old.pop()
            new.pop()
        counts[".".join(old), ".".join(new)] += 1
    return [
        [old or "(nothing)", "->", new or "(nothing)", plural(count, "key")] for (old, new), count in counts.items()
    ]
