"""ckptool diff."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

import ckptool
from ckptool import references
from ckptool.api.matching import RENAMES
from ckptool.cli import options, render
from ckptool.cli.progress import bar
from ckptool.cli.screens import diff as screen
from ckptool.core import keys
from ckptool.errors import CkptoolError, UsageError, one_of
from ckptool.ops.diff import KINDS, ORDERS, DiffReport, by_change, failing, volume
from ckptool.text import plural

if TYPE_CHECKING:
    from ckptool import Rules, SchemaReport


def command(
    ctx: typer.Context,
    a: Annotated[
        str,
        typer.Argument(
            metavar="A",
            help="A checkpoint, a schema (.toml), or a model in code, PKG.MOD:NAME or FILE.py:NAME, which is run.",
        ),
    ],
    b: Annotated[
        list[str], typer.Argument(metavar="B...", help="Another one, in any format; several are compared with A each.")
    ],
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
    depth: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="With --values: sum up the distances below N levels of A's keys."),
    ] = None,
    sort: Annotated[
        str | None,
        typer.Option(metavar="|".join(ORDERS), help="With --values: sort what differs, the largest change first."),
    ] = None,
    top: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="With --values: show the N largest changes, by --sort (rel-l2)."),
    ] = None,
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
    renames: Annotated[
        str | None,
        typer.Option(
            metavar="|".join(RENAMES),
            help="How keys with another name in B are found: by equal values, then by their place; by values; not.",
        ),
    ] = None,
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
    allow: Annotated[
        str | None, typer.Option(metavar="FILE", help="Planned changes, a TOML file: differences that do not fail.")
    ] = None,
    save_rules: options.SaveRules = None,
    html: options.Html = None,
    force: options.Force = False,
    exit_zero: Annotated[bool, typer.Option("--exit-zero", help="Exit 0 even if they differ.")] = False,
    form: options.Format = None,
    as_json: options.Json = False,
) -> int:
    """Show how two checkpoints differ: exit 0 if they are the same, 1 if they differ.

    $ ckptool diff model.pth new.pth
    $ ckptool diff model.pth model.safetensors --values  # another format, the same numbers?
    $ ckptool diff model.pth new.pth --values --top 5 --depth 1  # which layers moved most?
    $ ckptool diff model.pth new.pth --ignore 'fc.*'     # but for the last layer
    """
    shown = options.form(form, as_json)
    kinds = None if not fail_on else [kind.strip() for text in fail_on for kind in text.split(",")]
    failing(kinds)
    for kind in kinds or ():
        if kind in ("values", "uncompared") and not (values or quick):
            raise UsageError(f"--fail-on {kind} needs --values or --quick")
    if values and quick:
        raise UsageError("--values measures how far tensors differ, --quick only finds whether: choose one")
    if math.isnan(rtol) or math.isnan(atol):
        raise UsageError("--rtol and --atol take numbers")
    sort = sort or ("rel-l2" if top else None)
    if (sort or depth) and not values:
        raise UsageError("--sort, --top and --depth go with --values")
    if sort:
        one_of(ORDERS, sort, "--sort")
    written = {"--html": html, "--save-rules": save_rules}
    if force and not any(written.values()):
        raise UsageError("--force goes with --html FILE and --save-rules FILE")
    for name, path in written.items():
        if path is not None and len(b) > 1:
            raise UsageError(f"{name} is of two checkpoints, not of {len(b) + 1}")
    if save_rules is not None and renames == "off":
        raise UsageError("--save-rules writes the renames that are found: leave out --renames off")
    options.refuse_arguments(arg, a, *b)
    chosen: dict[str, Any] = {
        "ignore": ignore or (), "strip_prefix_a": strip_prefix_a or (), "strip_prefix_b": strip_prefix_b or ()
    }  # fmt: skip
    if allow is not None:
        from ckptool.references import allowed
    compared: Callable[[str], DiffReport | SchemaReport]
    if any(map(references.is_schema, (a, *b))):
        of_data = {
            "--values": values, "--quick": quick, "--devices": devices, "--fail-on": fail_on, "--rename": rename,
            "--rules": rules, "--renames": renames, "--save-rules": save_rules, "--html": html, "--sort": sort,
            "--top": top, "--depth": depth, "--allow": allow,
        }  # fmt: skip
        senseless = [name for name, given in of_data.items() if given]
        compared = _against_schema(a, b, root_a or root, root_b or root, chosen, arg, tp_rules, senseless)
    else:
        devices = devices or ("devices" in (kinds or ()))
        opened = first = options.reference(a, root_a or root, arg, tp_rules, values=values or quick)
        said: list[str] = []
        planned = None if allow is None else allowed.entries_of(allow)
        given = options.in_order(ctx, rename=rename, rules=rules) if rename or rules else None
        if given is not None:
            first, said = _after(given, first, allow_unused)

        def compared(path: str) -> "DiffReport":
            second = options.reference(path, root_b or root, arg, tp_rules, values=values or quick)
            if html is not None:
                from ckptool.reports import html as pages

                pages.check(html, [opened, second], force, save_rules)
            if save_rules is not None:
                from ckptool import saving

                saving.check_report(save_rules, force=force, inputs=[opened, second])
            with bar(lambda: volume(first, second, **chosen), "compare") as progress:
                report = ckptool.diff(
                    first, second, **chosen, devices=devices, values=values, rtol=rtol, atol=atol,
                    quick=quick, depth=depth, renames=renames, rules=save_rules is not None, fail_on=kinds,
                    allow=planned, progress=progress,
                )  # fmt: skip
            if sort:
                below = report.prefixes and by_change(report.prefixes, sort)
                report = replace(report, values=by_change(report.values, sort), prefixes=below)
            report = replace(report, a=a, b=path, notes=[*said, *report.notes])
            if save_rules is not None:
                report = _saved(report, given, save_rules, force)
            if html is not None:
                from ckptool.reports import document, wording

                more = {"version": ckptool.__version__, "headline": wording.headline(report)}
                sides = {"a": _rows(first, ignore), "b": _rows(second, ignore)}
                pages.write(html, document.of("diff", report, report.notes), force, [a, path], **more, **sides)
            return report

    failed = render.Failures(len(b))
    found: list[DiffReport | SchemaReport | CkptoolError] = []
    for path in b:
        before = len(found)
        with failed.kept():
            found.append(compared(path))
        found += failed.errors[-1:] if len(found) == before else []
    done = [one for one in found if not isinstance(one, CkptoolError)]
    if allow is not None:
        allowed.together([one for one in done if isinstance(one, DiffReport)])
    if shown == "json":
        render.write(_json(b, found, failed.errors))
    elif shown == "text":
        render.show(screen.table(a, [*zip(b, found, strict=True)], top) if len(b) > 1 else screen.lines(done[0], top))
    else:
        from ckptool.reports import outcome

        render.outcomes([outcome.outcome(one, "diff") for one in found], shown)
    return failed.end() or int(any(report.fails for report in done) and not exit_zero)


def _after(rules: "Rules", side: ckptool.Checkpoint, allow_unused: bool) -> tuple[ckptool.Checkpoint, list[str]]:
    """Returns A after its rules, and notes on what they changed."""
    made, changed = ckptool.remap(side, rules, allow_unused=allow_unused)
    moved = sum(row.op != "rename" or row.old != [row.new] for row in changed.map)
    dropped = f", dropped {len(changed.dropped)}" * bool(changed.dropped)
    return made, [f"rules changed {plural(moved, 'key')} of A{dropped}", *changed.notes, *changed.unused_rules]


def _saved(report: DiffReport, given: "Rules | None", path: str, force: bool) -> DiffReport:
    """Writes the rules that give A's keys B's names, after those that were ``given``; returns the report with them."""
    from ckptool import saving
    from ckptool.cli.output import rules_file

    rules = [*(given.entries() if given else ()), *(report.rules or ())]
    if not rules:
        said = f"{path} is not written: no key of A has another name in B"
        return replace(report, notes=[*report.notes, said])
    saving.write_text(path, rules_file(rules, path, report.a, report.b, "diff"), force=force)
    return replace(report, rules=rules)


def _json(
    paths: Sequence[str], found: "Sequence[DiffReport | SchemaReport | CkptoolError]", errors: Sequence[CkptoolError]
) -> str:
    """Returns the document: of one B its report, of several a list, whose notes begin with the file's name."""
    from ckptool.reports import document

    done: list[Any] = [one for one in found if not isinstance(one, CkptoolError)]
    if len(paths) == 1:
        return document.text(document.of("diff", done[0], done[0].notes))
    notes = [f"{path}: {note}" for path, one in zip(paths, found, strict=True) for note in getattr(one, "notes", ())]
    made = document.of("diff", done, notes, errors)
    for content in made["result"]:
        del content["notes"]
    return document.text(made)


def _rows(side: ckptool.Checkpoint, ignore: Sequence[str] | None) -> Any:
    """Returns the rows of `inspect` of the keys that are not ignored, as JSON's own types."""
    from ckptool.reports import document

    choose = keys.chooser((), ignore or ())
    found = ckptool.inspect(side)
    return document.plain([row for row in (*found.tensors, *found.inside) if choose(row.key)])


def _against_schema(
    a: str, b: list[str], root_a: str | None, root_b: str | None, chosen: dict[str, Any], arg: list[str] | None,
    tp_rules: str | None, senseless: list[str],
) -> "Callable[[str], SchemaReport]":  # fmt: skip
    """Returns the function that checks one of ``b`` against a schema, which is A; or it is the only B."""
    strip_a, strip_b = chosen["strip_prefix_a"], chosen["strip_prefix_b"]
    schema, *more = [path for path in (a, *b) if references.is_schema(path)]
    if more:
        raise UsageError("both are schemas of patterns: name a schema and a checkpoint")
    swapped = schema != a
    if swapped and len(b) > 1:
        raise UsageError("of several files a schema comes first", schema)
    if swapped:
        root_b, strip_a, strip_b = root_a, strip_b, strip_a
    if senseless or strip_a:
        raise UsageError(f"{', '.join(senseless) or '--strip-prefix of its side'} does not go with a schema", schema)

    def checked(path: str) -> "SchemaReport":
        path = a if swapped else path
        opened = options.reference(path, root_b, arg, tp_rules)
        report = ckptool.check_schema(opened, schema, ignore=chosen["ignore"], strip_prefix=strip_b)
        return replace(report, path=path)

    return checked
