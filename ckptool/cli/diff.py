"""ckptool diff."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

import ckptool
from ckptool import references
from ckptool.cli import options, render
from ckptool.cli.output import bar
from ckptool.core import keys
from ckptool.errors import UsageError
from ckptool.ops.diff import KINDS, DiffReport, ValuesChanged, volume
from ckptool.text import dims, plural

if TYPE_CHECKING:
    from ckptool.references.schema import SchemaReport


def command(
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
    exit_zero: Annotated[bool, typer.Option("--exit-zero", help="Exit 0 even if they differ.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> int:
    """Show how two checkpoints differ: exit 0 if they are the same, 1 if they differ."""
    wanted = _kinds(fail_on)
    if "values" in wanted and fail_on and not (values or quick):
        raise UsageError("--fail-on values needs --values or --quick")
    if values and quick:
        raise UsageError("--values measures how far tensors differ, --quick only finds whether: choose one")
    if "devices" in wanted and fail_on:
        devices = True
    if math.isnan(rtol) or math.isnan(atol):
        raise UsageError("--rtol and --atol take numbers")
    options.refuse_arguments(arg, a, b)
    if references.is_schema(a) or references.is_schema(b):
        of_data = {"--values": values, "--quick": quick, "--devices": devices, "--fail-on": fail_on}
        return _schema(
            a, b, root_a or root, root_b or root, strip_prefix_a, strip_prefix_b, ignore or (), arg, tp_rules,
            [name for name, given in of_data.items() if given], as_json, exit_zero,
        )  # fmt: skip
    first = options.reference(a, root_a or root, arg, tp_rules, values=values or quick)
    second = options.reference(b, root_b or root, arg, tp_rules, values=values or quick)
    chosen: dict[str, Any] = {
        "ignore": ignore or (), "strip_prefix_a": strip_prefix_a or (), "strip_prefix_b": strip_prefix_b or ()
    }  # fmt: skip
    with bar(lambda: volume(first, second, **chosen)) as progress:
        report = ckptool.diff(
            first, second, **chosen, devices=devices, values=values, rtol=rtol, atol=atol, quick=quick,
            progress=progress,
        )  # fmt: skip
    if as_json:
        render.print_json(render.document("diff", report, report.notes))
    else:
        render.show(_lines(report, b, values or quick, quick))
    found = report.found()
    return int(any(found[kind] for kind in wanted) and not exit_zero)


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
        render.show(_schema_lines(report))
    return int(not report.same and not exit_zero)


def _schema_lines(report: "SchemaReport") -> list[str]:
    counts = Counter(failure.kind for failure in report.failures)
    several = {"shape", "dtype", "count"}
    found = ", ".join(f"{number:,} {kind}{'s' * (number > 1 and kind in several)}" for kind, number in counts.items())
    meet = f"{plural(report.equal, 'key')} as the schema has it"
    rows = []
    for one in report.failures:
        said = {"unlisted": one.found, "missing": "", "forbidden": one.found}
        rule = f"  rule {one.rule}" if one.rule not in ("", one.key) and one.key is not None else ""
        rows.append(
            (one.kind, one.key or one.rule, said.get(one.kind, f"expected {one.expected}, found {one.found}") + rule)
        )
    lines = [[kind, name, text.strip()] for kind, name, text in _folded(rows)]
    notes = [["bookkeeping", f"{len(report.bookkeeping)} x num_batches_tracked"]] if report.bookkeeping else []
    notes += [["sizes", ", ".join(f"{name} = {size}" for name, size in report.sizes.items())]] if report.sizes else []
    notes += [["note", text] for text in report.notes]
    head = f"same: {meet}" if report.same else f"differ: {found}; {meet}"
    return [head, *render.aligned(lines), *render.aligned(notes)]


def _kinds(fail_on: list[str] | None) -> set[str]:
    if not fail_on:
        return set(KINDS) - {"bookkeeping"}
    kinds = {kind.strip() for text in fail_on for kind in text.split(",")}
    unknown = kinds - set(KINDS)
    if unknown:
        raise UsageError(f"--fail-on knows {', '.join(KINDS)}; not {', '.join(sorted(unknown))}")
    return kinds


def _lines(report: DiffReport, b: str, compared: bool, quick: bool) -> list[str]:
    rows = [("shape", row.key, f"{dims(row.a)} -> {dims(row.b)}") for row in report.shape]
    rows += [("dtype", row.key, f"{row.a} -> {row.b}") for row in report.dtype]
    rows += [("device", row.key, f"{row.a} -> {row.b}") for row in report.devices]
    rows += [("uncompared", key, "its values, as a lock file has no hash of it") for key in report.uncompared]
    rows += [("only in A", key, _tensor(report, key)) for key in report.only_in_a]
    rows += [("only in B", key, _tensor(report, key)) for key in report.only_in_b]
    lines = [[kind, name, text] for kind, name, text in _folded(rows)]
    for values in report.values:
        status = "differs" if values.status == "differ" else values.status
        text = "another hash" if values.by else "other bytes" if quick else _distance(values)
        lines.append([status, values.key, text])
    return [_headline(report, b, compared), *render.aligned(lines), *_notes(report)]


def _folded(rows: list[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    folded = []
    for name, members in keys.fold([(key, (kind, text)) for kind, key, text in rows]):
        kind, _, text = rows[members[0]]
        folded.append((kind, name, text + (f"  ({len(members)} keys)" if len(members) > 1 else "")))
    return folded


def _headline(report: DiffReport, b: str, compared: bool) -> str:
    found = report.found()
    parts = [
        (found["shape"], "shape", "shapes"),
        (found["dtype"], "dtype", "dtypes"),
        (found["values"], "tensor with other values", "tensors with other values"),
        (found["devices"], "device tag", "device tags"),
        (found["only-in-a"], "only in A", "only in A"),
        (found["only-in-b"], "only in B", "only in B"),
    ]
    counted = [f"{number:,} {one if number == 1 else many}" for number, one, many in parts if number]
    close = sum(row.status == "close" for row in report.values)
    equal = f"{report.equal:,} equal"
    if close:
        equal += f", {close:,} close"
    if report.uncompared:
        equal += f", {len(report.uncompared):,} of them but for their values"
    if not compared:
        equal += " (values not compared, --values does)"
    if counted:
        return f"differ: {', '.join(counted)}; {equal}"
    but = " but for bookkeeping" if report.bookkeeping else ""
    return f"same{but}: {equal}"


def _notes(report: DiffReport) -> list[str]:
    sides = {"A": report.counters.get("a"), "B": report.counters.get("b")}
    lines = [["bookkeeping", f"{count} x num_batches_tracked only in {side}"] for side, count in sides.items() if count]
    lines += [["note", text] for text in report.notes]
    return render.aligned(lines)


def _tensor(report: DiffReport, key: str) -> str:
    return f"{dims(report.shapes[key])}  {report.dtypes[key]}"


def _distance(row: ValuesChanged) -> str:
    largest = "not finite" if row.max_abs is None else f"{row.max_abs:.3g}"
    undefined = "not finite" if row.max_abs is None else "undefined (A is zero)"
    relative = undefined if row.rel_l2 is None else f"{row.rel_l2:.3g}"
    return f"max abs {largest}, relative L2 {relative}"
