"""ckptool inspect."""

import os
from collections.abc import Callable
from dataclasses import replace
from enum import StrEnum
from typing import Annotated, Any

import typer

import ckptool
from ckptool.cli import options, render
from ckptool.cli.progress import bar
from ckptool.cli.screens import inspect as screen
from ckptool.core import keys
from ckptool.errors import OutputError, UsageError
from ckptool.io.files import is_file
from ckptool.ops.inspect import InspectReport, TensorRow, tree_of, volume
from ckptool.ops.notes import pattern_notes, require_tensors


class Order(StrEnum):
    """What --sort sorts by."""

    key = "key"
    numel = "numel"
    nbytes = "nbytes"


def command(
    files: Annotated[
        list[str],
        typer.Argument(
            metavar="FILE...",
            help="Checkpoints: files, indexes, directories, URLs; PKG.MOD:NAME is a model in code, and run.",
        ),
    ],
    root: Annotated[
        str | None, typer.Option(metavar="PATH", help="Where the weights are, steps joined with /.")
    ] = None,
    tp_rules: options.TpRules = None,
    flat: Annotated[bool, typer.Option("--flat", help="One line per tensor, as in a pipe; fold nothing.")] = False,
    fold: Annotated[bool, typer.Option("--fold", help="One line for alike keys, in a pipe too.")] = False,
    keys_only: Annotated[bool, typer.Option("--keys", help="Only the keys, one per line.")] = False,
    tree: Annotated[
        bool, typer.Option("--tree", help="The modules: parameters, bytes, and their share of all as a bar.")
    ] = False,
    depth: Annotated[int | None, typer.Option(min=1, metavar="N", help="Sum up all keys below N levels.")] = None,
    sort: Annotated[
        Order | None,
        typer.Option(metavar="key|numel|nbytes", help="Sort; largest sizes first. Default: the file's order."),
    ] = None,
    include: Annotated[
        list[str] | None, typer.Option(metavar="GLOB", help="Only keys that match (re:REGEX too).")
    ] = None,
    exclude: Annotated[list[str] | None, typer.Option(metavar="GLOB", help="Leave out keys that match.")] = None,
    stats: Annotated[
        bool, typer.Option("--stats", help="Read the data: mean, std, min, max, zeros, NaN and inf of every tensor.")
    ] = False,
    hashes: Annotated[
        bool, typer.Option("--hash", help="Read the data: a hash of each tensor, and one of all together.")
    ] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Read all: exit 1 on damage, NaN, inf, or names in a pickle that act.")
    ] = False,
    fail_on: Annotated[
        list[str] | None,
        typer.Option(metavar="KIND", help="With --check: what makes the exit code 1 (acting,unknown,nan,crc,...)."),
    ] = None,
    allow: Annotated[
        list[str] | None, typer.Option(metavar="GLOB", help="With --check: names in a pickle that pass.")
    ] = None,
    lock: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="Write keys, shapes and dtypes as text that diff can read; -: print only that."
        ),
    ] = None,
    schema: Annotated[
        str | None, typer.Option(metavar="FILE", help="Write a draft of a schema of patterns, for diff, as TOML.")
    ] = None,
    html: options.Html = None,
    force: options.Force = False,
    arg: options.Arg = None,
    update_lock: Annotated[bool, typer.Option("--update-lock", help="With --lock: replace the lock file.")] = False,
    form: options.Format = None,
    as_json: options.Json = False,
) -> int:
    """Show what a checkpoint holds; runs nothing that is in it.

    $ ckptool inspect model.pth
    $ ckptool inspect shards --depth 2 --sort nbytes     # the largest modules of a directory
    $ ckptool inspect model.pth --check                  # exit 1 on damage, NaN, or names that act
    """
    shown = options.form(form, as_json)
    if keys_only and (depth or shown != "text" or stats or hashes or check):
        raise UsageError("--keys goes with none of --depth, --json, --format, --stats, --hash and --check")
    if shown in ("github", "junit", "sarif") and not check:
        raise UsageError(f"--format {shown} shows what --check finds: it goes with --check")
    if tree and (flat or keys_only or stats or hashes or shown not in ("text", "json")):
        raise UsageError("--tree goes with none of --flat, --keys, --stats, --hash and --format, but with --json")
    if depth and hashes:
        raise UsageError("--hash is of single tensors: it does not go with --depth")
    if flat and (depth or fold):
        raise UsageError(f"--flat and {'--depth' if depth else '--fold'} contradict each other")
    if (fail_on or allow) and not check:
        raise UsageError("--fail-on and --allow go with --check")
    if update_lock and lock is None:
        raise UsageError("--update-lock goes with --lock FILE")
    if force and html is None:
        raise UsageError("--force goes with --html FILE")
    for option, path in (("--lock", lock), ("--schema", schema), ("--html", html)):
        if path is not None and len(files) > 1:
            raise UsageError(f"{option} is of one checkpoint, not of {len(files)}")
    if lock == "-" and (shown != "text" or keys_only):
        raise UsageError("--lock - prints the lock alone: it does not go with --json and --keys")
    options.refuse_arguments(arg, *files)
    gate: dict[str, Any] = {}
    if check:
        from ckptool.core.findings import failing

        kinds = None if not fail_on else [kind.strip() for text in fail_on for kind in text.split(",")]
        gate = {"check": True, "fail_on": failing(kinds), "allow": allow or []}
    if html is not None or shown == "json":
        from ckptool.reports import document
    if html is not None:
        from ckptool.reports import html as pages
    reports: list[InspectReport] = []
    failed = render.Failures(len(files))
    met = []  # of each path: its report, if it has one, and its errors
    for path in files:
        before, said = len(reports), len(failed.errors)
        with failed.kept():
            opened = options.reference(path, root, arg, tp_rules, values=stats or hashes or check)
            if html is not None:
                pages.check(html, [opened], force, lock, schema)
            at = None if root is None else opened.root
            report = _inspected(opened, at, include or [], exclude or [], stats, hashes, gate)
            reports.append(replace(report, path=path))
            if report.check is None or not report.check.fails:  # a finding says it
                with failed.kept(later=True):
                    opened.require_whole()
            choose = keys.chooser(include or [], exclude or [])
            if lock is not None:
                _write_lock(opened, report, choose, lock, update_lock)
            if schema is not None:
                _write_schema(opened, choose, schema)
            if html is not None:
                page = replace(reports[-1], tensors=_chosen(report, include or [], exclude or [], sort))
                made = {"tree": pages.outline(opened.beside()), "version": ckptool.__version__}
                pages.write(html, document.of("inspect", [page]), force, [path], **made)
        met.append((path, reports[before:], failed.errors[said:]))
    notes = [
        f"{report.path}: {text}"
        for report in reports
        for text in pattern_notes([*(include or []), *(exclude or [])], _keys(report))
    ]
    names = [name for report in reports for name in report.unsafe]
    notes += [f"--allow {pattern} fits no name" for pattern in keys.unused_patterns(allow or [], names)]
    chosen = [(report, _chosen(report, include or [], exclude or [], sort)) for report in reports]
    for text in () if shown == "json" else notes:
        render.note(text)
    if shown == "json":
        documents = [
            replace(report, tensors=rows, tree=tree_of(rows, depth) if tree else None) for report, rows in chosen
        ]
        render.write(document.text(document.of("inspect", documents, notes, failed.errors)))
    elif shown != "text":
        from ckptool.reports.outcome import outcome

        judged = [replace(report, tensors=rows) for report, rows in chosen]
        render.outcomes([outcome(one, "inspect") for one in (*judged, *failed.errors)], shown)
    detailed = len(files) == 1 or keys_only or flat or fold or tree or depth or stats or hashes
    if shown == "text" and not detailed:
        from ckptool.cli.screens import table

        rest = iter(chosen)
        pairs = [(path, next(rest) if found else (None, []), errors) for path, found, errors in met]
        entries = [table.Entry(path, report, rows, errors) for path, (report, rows), errors in pairs]
        render.show(table.lines(entries, sort))
    for number, (report, rows) in enumerate(chosen if shown == "text" and detailed and lock != "-" else ()):
        if keys_only:
            for text in (*report.problems, *report.notes):
                render.note(text)
            render.show(render.safe(row.key) for row in rows)
            continue
        lines = screen.lines(
            report, rows, depth=depth, stats=stats, hashes=hashes, flat=flat, sort=sort, fold=fold, tree=tree
        )
        render.show([*([""] if number else []), *lines])
    return failed.end() or int(any(report.check and report.check.fails for report in reports))


def _inspected(
    opened: ckptool.Checkpoint, root: Any, include: list[str], exclude: list[str], stats: bool, hashes: bool,
    gate: dict[str, Any],
) -> InspectReport:  # fmt: skip
    if not (stats or hashes or gate):
        return ckptool.inspect(opened, root=root)
    # numpy's BLAS starts a thread per core, for matrix products that are not needed here.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    with bar(lambda: volume(opened, keys.chooser(include, exclude), check=bool(gate)), "read") as progress:
        return ckptool.inspect(
            opened, root=root, stats=stats, hashes=hashes, include=include, exclude=exclude, progress=progress, **gate
        )  # fmt: skip


def _write_lock(
    opened: ckptool.Checkpoint, report: InspectReport, choose: Callable[[str], bool], path: str, update: bool
) -> None:
    """Writes the lock file of the chosen tensors. Raises: OutputError if it exists, unless it is to be updated."""
    from ckptool import formats, saving

    _require_comparable(opened)
    tensors = {key: one for key, one in (opened.state_dict() | opened.inside()).items() if choose(key)}
    text = formats.lock_text(opened, tensors, {row.key: row.hash for row in (*report.tensors, *report.inside)})
    if path == "-":
        render.write(text)
        return
    if update:
        formats.refuse_no_lock(path)
    elif is_file(path):
        raise OutputError("exists already; --update-lock rewrites it", path)
    saving.check_report(path, force=update, inputs=[opened])
    saving.write_text(path, text, force=update)


def _write_schema(opened: ckptool.Checkpoint, choose: Callable[[str], bool], path: str) -> None:
    """Writes a draft of a schema of the chosen tensors. Raises: OutputError if it exists."""
    from ckptool import saving
    from ckptool.references import draft

    _require_comparable(opened)
    saving.check_report(path, inputs=[opened])
    tensors = opened.state_dict() | opened.inside()
    chosen = {key: one for key, one in tensors.items() if choose(key)}
    saving.write_text(path, draft.text(chosen, whole=len(chosen) == len(tensors)))


def _require_comparable(opened: ckptool.Checkpoint) -> None:
    """Raises what `diff` would, so that nothing is written that the checkpoint itself does not meet."""
    opened.require_whole()
    opened.require_joined()
    require_tensors(opened)


def _keys(report: InspectReport) -> list[str]:
    """Returns all keys at root, of objects that are no tensors too."""
    return [*(row.key for row in report.tensors), *(item.key for item in report.beside if item.key is not None)]


def _chosen(report: InspectReport, include: list[str], exclude: list[str], sort: Order | None) -> list[TensorRow]:
    choose = keys.chooser(include, exclude)
    rows = [row for row in report.tensors if choose(row.key)] if include or exclude else report.tensors
    orders: dict[Order, Callable[[TensorRow], tuple[int, list[Any]]]] = {
        Order.key: lambda row: (0, keys.natural(row.key)),
        Order.numel: lambda row: (-row.numel(), keys.natural(row.key)),
        Order.nbytes: lambda row: (-row.nbytes, keys.natural(row.key)),
    }
    return sorted(rows, key=orders[sort]) if sort else rows
