"""ckptool diff."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any

import typer

import ckptool
from ckptool import references
from ckptool.cli import options, render
from ckptool.cli.progress import bar
from ckptool.cli.screens import diff as screen
from ckptool.core import keys
from ckptool.errors import UsageError
from ckptool.ops.diff import HARMLESS, KINDS, volume
from ckptool.text import plural


def command(
    ctx: typer.Context,
    a: Annotated[
        str,
        typer.Argument(
            metavar="A",
            help="A checkpoint, a schema (.toml), or a model in code, PKG.MOD:NAME or FILE.py:NAME, which is run.",
        ),
    ],
    b: Annotated[str, typer.Argument(metavar="B", help="Another one, in any format.")],
    values: Annotated[bool, typer.Option("--values", help="Compare values too, not only keys and shapes.")] = False,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="Only whether bytes are equal, by recorded checksums if there are any."),
    ] = False,
    rtol: Annotated[
        float, typer.Option(min=0, metavar="X", help="With --values: relative tolerance for floats.")
    ] = 1e-5,
    atol: Annotated[
        float, typer.Option(min=0, metavar="X", help="With --values: absolute tolerance for floats.")
    ] = 1e-8,
    ignore: Annotated[
        list[str] | None, typer.Option(metavar="GLOB", help="Leave out keys that match (or re:REGEX).")
    ] = None,
    strip_prefix_a: Annotated[
        list[str] | None, typer.Option(metavar="P", help="Remove a prefix from A's keys.")
    ] = None,
    strip_prefix_b: Annotated[
        list[str] | None, typer.Option(metavar="P", help="Remove a prefix from B's keys.")
    ] = None,
    rename: Annotated[
        list[str] | None, typer.Option(metavar="A=B", help="Rename segments of A's keys; {i} and * match one each.")
    ] = None,
    rules: Annotated[
        list[str] | None, typer.Option(metavar="FILE", help="Change A's keys by rules from a TOML or JSON file.")
    ] = None,
    allow_unused: options.AllowUnused = False,
    root: Annotated[str | None, typer.Option(metavar="PATH", help="Where the weights are, in both.")] = None,
    root_a: Annotated[str | None, typer.Option(metavar="PATH", help="Where the weights are in A.")] = None,
    root_b: Annotated[str | None, typer.Option(metavar="PATH", help="Where the weights are in B.")] = None,
    arg: options.Arg = None,
    tp_rules: options.TpRules = None,
    devices: Annotated[bool, typer.Option("--devices", help="Compare device tags too.")] = False,
    fail_on: Annotated[
        list[str] | None,
        typer.Option(metavar="KIND", help=f"What makes the exit code 1 (comma-separated): {', '.join(KINDS)}."),
    ] = None,
    html: options.Html = None,
    force: options.Force = False,
    exit_zero: Annotated[bool, typer.Option("--exit-zero", help="Exit 0 even if they differ.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> int:
    """Show how two checkpoints differ: exit 0 if they are the same, 1 if they differ.

    $ ckptool diff model.pth new.pth
    $ ckptool diff model.pth model.safetensors --values  # another format, the same numbers?
    $ ckptool diff model.pth new.pth --ignore 'fc.*'     # but for the last layer
    """
    wanted = _kinds(fail_on)
    if "values" in wanted and fail_on and not (values or quick):
        raise UsageError("--fail-on values needs --values or --quick")
    if values and quick:
        raise UsageError("--values measures how far tensors differ, --quick only finds whether: choose one")
    if "devices" in wanted and fail_on:
        devices = True
    if math.isnan(rtol) or math.isnan(atol):
        raise UsageError("--rtol and --atol take numbers")
    if force and html is None:
        raise UsageError("--force goes with --html FILE")
    options.refuse_arguments(arg, a, b)
    if references.is_schema(a) or references.is_schema(b):
        of_data = {
            "--values": values, "--quick": quick, "--devices": devices, "--fail-on": fail_on, "--rename": rename,
            "--rules": rules, "--html": html,
        }  # fmt: skip
        return _schema(
            a, b, root_a or root, root_b or root, strip_prefix_a, strip_prefix_b, ignore or (), arg, tp_rules,
            [name for name, given in of_data.items() if given], as_json, exit_zero,
        )  # fmt: skip
    first = options.reference(a, root_a or root, arg, tp_rules, values=values or quick)
    second = options.reference(b, root_b or root, arg, tp_rules, values=values or quick)
    chosen: dict[str, Any] = {
        "ignore": ignore or (), "strip_prefix_a": strip_prefix_a or (), "strip_prefix_b": strip_prefix_b or ()
    }  # fmt: skip
    if html is not None:
        from ckptool.reports import html as pages

        pages.check(html, [first, second], force)
    if rename or rules:
        first, changed = ckptool.remap(
            first, options.in_order(ctx, rename=rename, rules=rules), allow_unused=allow_unused
        )
    with bar(lambda: volume(first, second, **chosen), "compare") as progress:
        report = ckptool.diff(
            first, second, **chosen, devices=devices, values=values, rtol=rtol, atol=atol, quick=quick,
            progress=progress,
        )  # fmt: skip
    if rename or rules:
        moved = sum(row.op != "rename" or row.old != [row.new] for row in changed.map)
        text = f"rules changed {plural(moved, 'key')} of A" + f", dropped {len(changed.dropped)}" * bool(
            changed.dropped
        )
        report = replace(report, notes=[text, *changed.notes, *changed.unused_rules, *report.notes])
    if html is not None:
        document = render.document("diff", report, report.notes)
        made = {"a": _rows(first, ignore), "b": _rows(second, ignore), "version": ckptool.__version__}
        pages.write(html, document, force, [a, b], **made)
    if as_json:
        render.print_json(render.document("diff", report, report.notes))
    else:
        render.show(screen.lines(report, b, values or quick, quick))
    found = report.found()
    return int(any(found[kind] for kind in wanted) and not exit_zero)


def _rows(side: ckptool.Checkpoint, ignore: Sequence[str] | None) -> Any:
    """Returns the rows of `inspect` of the keys that are not ignored, as JSON's own types."""
    choose = keys.chooser((), ignore or ())
    found = ckptool.inspect(side)
    return render.to_json([row for row in (*found.tensors, *found.inside) if choose(row.key)])


def _schema(
    a: str, b: str, root_a: str | None, root_b: str | None, strip_a: Sequence[str] | None,
    strip_b: Sequence[str] | None, ignore: Sequence[str], arg: list[str] | None, tp_rules: str | None,
    senseless: list[str], as_json: bool, exit_zero: bool,
) -> int:  # fmt: skip
    """Shows which rules of a schema a checkpoint does not meet."""
    if references.is_schema(a) and references.is_schema(b):
        raise UsageError("both are schemas of patterns: name a schema and a checkpoint")
    if references.is_schema(b):
        a, b, root_b, strip_a, strip_b = b, a, root_a, strip_b, strip_a
    if senseless or strip_a:
        raise UsageError(f"{', '.join(senseless) or '--strip-prefix of its side'} does not go with a schema", a)
    opened = options.reference(b, root_b, arg, tp_rules)
    report = ckptool.check_schema(opened, a, ignore=ignore, strip_prefix=strip_b)
    if as_json:
        render.print_json(render.document("diff", report, report.notes))
    else:
        render.show(screen.schema_lines(report))
    return int(not report.same and not exit_zero)


def _kinds(fail_on: list[str] | None) -> set[str]:
    if not fail_on:
        return set(KINDS).difference(HARMLESS)
    kinds = {kind.strip() for text in fail_on for kind in text.split(",")}
    unknown = kinds - set(KINDS)
    if unknown:
        raise UsageError(f"--fail-on knows {', '.join(KINDS)}; not {', '.join(sorted(unknown))}")
    return kinds
