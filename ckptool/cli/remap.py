"""ckptool remap."""

import os
import sys
from dataclasses import replace
from typing import Annotated

import typer

import ckptool
from ckptool import formats
from ckptool.cli import options
from ckptool.cli.options import Texts
from ckptool.cli.output import Outputs, heading
from ckptool.cli.screens import remap as screen
from ckptool.core.checkpoint import Checkpoint
from ckptool.errors import UsageError
from ckptool.ops.rules import PRESETS
from ckptool.saving import SaveOptions


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
    like: Annotated[
        str | None,
        typer.Option(
            metavar="TARGET", help="Find the rules: make FILE like a checkpoint, or PKG.MOD:NAME, which is run."
        ),
    ] = None,
    arg: options.Arg = None,
    min_confidence: options.MinConfidence = None,
    values: Annotated[
        bool, typer.Option("--values/--no-values", help="With --like: equal values decide, where TARGET has some.")
    ] = True,
    layout: Annotated[
        Texts,
        typer.Option(metavar="GLOB=HOW", help="What names and shapes cannot show: as-is, transposed, heads:N, ..."),
    ] = None,
    explain: Annotated[
        str | None,
        typer.Option(metavar="KEY", help="Say why a key was matched, or was not; a GLOB says it of several."),
    ] = None,
    interactive: Annotated[
        bool, typer.Option("--interactive", help="With --like: ask about what is left, and learn from each answer.")
    ] = False,
    save_rules: options.SaveRules = None,
    min_loaded: options.MinLoaded = None,
    require: options.Require = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="With --like: exit 1 on missing or unexpected keys.")
    ] = False,
    root: options.Root = None,
    like_root: Annotated[str | None, typer.Option(metavar="PATH", help="Where the weights are in TARGET.")] = None,
    tp_rules: options.TpRules = None,
    map_location: options.MapLocation = None,
    verify: options.Verify = False,
    fsync: options.Fsync = True,
    force: options.Force = False,
    in_place: options.InPlace = False,
    dry_run: options.DryRun = False,
    world_size: options.WorldSize = None,
    report_file: options.Report = None,
    as_json: options.Json = False,
) -> int:
    """Rename keys and reshape tensors by rules, in the order given.

    $ ckptool remap model.pth --rename layer1=stage1 -o renamed.pth
    $ ckptool remap model.pth --add-prefix backbone. -o renamed.pth --save-map map.json
    $ ckptool remap renamed.pth --invert map.json -o back.pth
    $ ckptool remap model.pth --like new.pth -o renamed.pth --save-rules rules.toml
    """
    given = {
        "--arg": arg, "--min-confidence": min_confidence, "--layout": layout, "--explain": explain,
        "--save-rules": save_rules, "--min-loaded": min_loaded, "--require": require, "--strict": strict,
        "--like-root": like_root, "--no-values": not values, "--interactive": interactive,
    }  # fmt: skip
    if like is None and (senseless := [name for name, value in given.items() if value not in (None, False)]):
        raise UsageError(f"{', '.join(senseless)} {'go' if len(senseless) > 1 else 'goes'} with --like TARGET")
    if interactive:
        _require_terminal({"--json": as_json, "--explain": explain is not None})
    options.require_output(output, dry_run or bool(like and (explain or save_rules)))
    chosen = options.in_order(
        ctx, strip_prefix=strip_prefix, add_prefix=add_prefix, rename=rename, sub=sub, drop=drop, copy=copy,
        preset=preset, rules=rules,
    )  # fmt: skip
    if invert is not None and (chosen.rules or like is not None):
        raise UsageError("--invert goes with no other rule")
    if invert is None and not chosen.rules and like is None:
        raise UsageError("no rule: see --like, --rename, --strip-prefix, --sub, --rules and the others in --help")
    options.refuse_arguments(arg, like)
    opened = ckptool.open(file, root=root, tp_rules=tp_rules)
    to = _own_format(opened, output) if to is None and output is not None else to
    save_options = SaveOptions(
        to, force, in_place, options.tags(map_location), options.shard_size(max_shard_size), verify, fsync, False,
        shard_name, with_files, world_size,
    )  # fmt: skip
    outputs = Outputs("remap", save_options, report_file, dry_run, options.form(None, as_json))
    if like is not None:
        target = options.reference(like, like_root, arg, tp_rules)
        outputs.check([] if output is None else [output], [opened, target], save_map, save_rules)
        from ckptool.cli import like as finding

        wanted = finding.Wanted(
            min_confidence, layout, explain, min_loaded, require, strict, allow_unused, values, interactive
        )
        return finding.run(opened, target, chosen, wanted, outputs, output, save_map, save_rules)
    outputs.check([] if output is None else [output], [opened], save_map)
    if invert is not None:
        checkpoint, report = ckptool.invert(opened, options.read_data(invert))
    else:
        checkpoint, report = ckptool.remap(opened, chosen, allow_unused=allow_unused)
    report = outputs.write(checkpoint, output, report)
    outputs.write_beside(save_map, report.saved)
    begin = heading(dry_run, output)
    outputs.finish(replace(report, saved=None), report.notes, lambda: screen.lines(report, begin))
    return 0


def _require_terminal(others: dict[str, bool]) -> None:
    """Raises UsageError if nobody can be asked, or beside options that ask for an answer without questions."""
    if wrong := [name for name, is_given in others.items() if is_given]:
        raise UsageError(f"--interactive asks a person: leave out {' and '.join(wrong)}")
    if not all(stream and stream.isatty() for stream in (sys.stdin, sys.stdout)):
        raise UsageError("--interactive asks on a terminal: stdin or stdout is none")


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
