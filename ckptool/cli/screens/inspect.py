"""The lines that `ckptool inspect` prints."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ckptool.cli import render
from ckptool.cli.terminal import tables
from ckptool.core import keys
from ckptool.ops.inspect import InspectReport, TensorRow
from ckptool.text import count, dims, plural, size

if TYPE_CHECKING:
    from ckptool.core.findings import Check, PrefixStats, Stats


def lines(
    report: InspectReport, rows: list[TensorRow], *, depth: int | None, stats: bool, hashes: bool, flat: bool,
    sort: str | None, fold: bool, tree: bool,
) -> list[str]:  # fmt: skip
    """Returns what is shown of a checkpoint, ``rows`` being the tensors that were chosen, in their order."""
    made = [*_summary(report), ""]
    prefix = keys.common_prefix([row.key for row in rows])
    heading = [render.safe(prefix)] if prefix else []
    if report.check:
        made += checked(report.check)
    begin = len(made)
    if tree:
        from ckptool.cli.screens import tree as modules

        made += [*([""] if report.check else []), *modules.lines(rows, sort, depth)]
    elif depth:
        made += heading + _summed(rows, depth, prefix, report.prefixes)
    elif stats or hashes:
        made += _valued(rows + [row for row in report.inside if row.hash], stats)
    elif flat or sort or not (fold or report.check or render.folds()):
        made += _flat(rows)
    elif not report.check:
        made += heading + _folded(rows, prefix)
    if len(made) > LONG and render.folds() and not (tree or depth or flat or hashes):
        made += _shorter(rows, prefix, len(made) - begin)
    return made if made[-1] else made[:-1]


def _summary(report: InspectReport) -> list[str]:
    """Returns the lines above the keys: the file, its weights, other content, metadata, notes."""
    foreign = [tag for tag in dict.fromkeys((*report.devices, *report.device_tags)) if tag not in ("cpu", "meta")]
    origin = f", written from {', '.join(foreign)}" if foreign else ""
    head = f"{report.path}   {_format(report)}, {size(report.nbytes)}{origin}"
    lines = [["weights", _weights(report)], *([["hash", report.hash]] if report.hash else [])]
    beside = [
        (item.path or "the top", item.text + ("" if item.nbytes is None else f", {size(item.nbytes)}"))
        for item in report.beside
    ]
    if render.folds():  # by their numbers: of names, what stands beside the weights has all
        beside = [(name, beside[members[0]][1]) for name, members in keys.numbered(beside)]
    for label, texts in (
        ("beside them", [f"{name}: {text}" for name, text in beside]),
        ("metadata", [f"{name}: {value}" for name, value in report.metadata.items()]),
        ("notes", _notes(report)),
    ):
        lines += [["" if number else label, text] for number, text in enumerate(texts)]
    return [*render.headline(head), *render.aligned(lines, indent=0)]


def _format(report: InspectReport) -> str:
    """Returns the format, and of how many files."""
    if not report.files:
        return report.format
    kind = " safetensors" * all(name.endswith(".safetensors") for name in report.files)
    return f"{report.format}{kind}, {plural(len(report.files), 'file')}"


def _weights(report: InspectReport) -> str:
    if not report.tensors:
        return f"{report.root or 'the top'}: no tensors"
    if len(report.dtypes) == 1:
        sizes = f"{size(report.tensor_nbytes)} {next(iter(report.dtypes))}"
    else:
        sizes = " + ".join(f"{size(nbytes)} {dtype} ({number})" for dtype, (number, nbytes) in report.dtypes.items())
    return (
        f"{report.root or 'the top'}: {plural(len(report.tensors), 'tensor')}, "
        f"{count(report.parameters)} parameters, {sizes}"
        + (f", every key under {report.prefix}" if report.prefix else "")
    )


def _notes(report: InspectReport) -> list[str]:
    found = [*report.problems]
    if report.wrapper and report.wrapper != report.prefix:
        found.append(f"wrapped: {report.wrapper}")
    elif report.wrapper:
        found.append(f"{report.wrapper} is a wrapper's prefix; diff and filter look through it")
    if report.other_roots:
        found.append(f"other places with weights (--root): {', '.join(report.other_roots)}")
    if report.ema:
        found.append(f"averaged copies (EMA), taken only with --root: {', '.join(report.ema)}")
    most = render.ITEMS if render.folds() else len(report.tied)
    found += [f"tied: {' = '.join(group)}" for group in report.tied[:most]]
    if len(report.tied) > most:
        found.append(f"tied: {len(report.tied) - most:,} more groups (a pipe gets all)")
    if report.stored_nbytes > report.used_nbytes:
        found.append(f"storages take {size(report.stored_nbytes)}, tensors use {size(report.used_nbytes)}")
    if len(report.devices) > 1:
        found.append("devices: " + ", ".join(f"{tag} {number}" for tag, number in report.devices.items()))
    if report.empty:
        found.append(f"empty (zero-size): {', '.join(report.empty)}")
    if any(report.counters.values()):
        present, absent = report.counters["present"], report.counters["absent"]
        text = f"num_batches_tracked: {present} present" if present else "num_batches_tracked: none"
        found.append(text + (f", absent in {plural(absent, 'BatchNorm layer')}" if absent else ""))
    if report.loose:
        found.append(f"not in the state_dict: {', '.join(report.loose)}")
    return [render.short(text) for text in (*found, *_foreign_names(report), *report.notes)]


def _foreign_names(report: InspectReport) -> list[str]:
    """Returns a line with the pickled names that tensors do not need, by kind; classes of torch.nn are only counted."""
    groups = []
    for kind in ("acting", "unknown", "ordinary"):
        names = [name for name, one in report.kinds.items() if one == kind]
        layers = [name for name in names if kind == "ordinary" and name.startswith("torch.nn.modules.")]
        names = [name for name in names if name not in layers]
        if layers:
            names.append(f"{len(layers)} class{'es' if len(layers) > 1 else ''} of torch.nn")
        groups += [f"{', '.join(names)} ({kind})"] if names else []
    return [f"names beyond tensors, none imported or run: {'; '.join(groups)}"] if groups else []


def _folded(rows: list[TensorRow], prefix: str) -> list[str]:
    """Returns one line for all keys that differ in their numbers or their last name only, without the prefix of all."""
    same = [(row.key[len(prefix) :], (tuple(row.shape or ()), row.dtype, row.kind, row.device)) for row in rows]
    lines = []
    for name, members in keys.fold(same):
        row = rows[members[0]]
        times = f"{len(members)} x " if len(members) > 1 else ""
        total = sum(rows[member].nbytes for member in members)
        lines.append([name, times + dims(row.shape), _dtype(row), size(total)])
    return render.aligned(lines, keys=True)


def _dtype(row: TensorRow) -> str:
    return f"{row.dtype} {row.kind}" if row.kind else row.dtype


def _flat(rows: list[TensorRow]) -> list[str]:
    """Returns one line per tensor."""
    return render.aligned(
        (
            [row.key, dims(row.shape), _dtype(row), size(row.nbytes), f"= {row.tied_to}" if row.tied_to else ""]
            for row in rows
        ),
        keys=True,
    )


def _valued(rows: list[TensorRow], stats: bool) -> list[str]:
    """Returns one line per tensor with its statistics and hash."""
    columns = {"key": [row.key for row in rows], "shape": [dims(row.shape) for row in rows]}
    columns["dtype"] = [_dtype(row) for row in rows]
    if stats:
        columns |= _figures([row.stats for row in rows])
        if any(row.stats and row.stats.histogram for row in rows):
            counts = [row.stats.histogram.counts if row.stats and row.stats.histogram else [] for row in rows]
            columns["histogram"] = [*map(sparkline, counts)]
    if any(row.hash for row in rows):
        columns["sha256"] = [row.hash or "" for row in rows]
    return _fitting(columns, stats)


def _fitting(columns: dict[str, list[str]], headed: bool) -> list[str]:
    """Returns the lines of a table, given as {heading: cells}; on a terminal without columns for which it has no room.

    The first to go are those that the others say, or that say that there is nothing; which they were is said below.
    """
    limit, left = tables.columns() if headed else None, []
    if limit is not None:
        nothing = [head for head in ("inf", "NaN", "zeros") if {*columns.get(head, ())} <= {"0", ""}]
        room, *wide = (max(map(tables.width, [head, *cells])) + 2 for head, cells in columns.items())
        widths = dict(zip([*columns][1:], wide, strict=True))
        for head in (
            "abs max",
            *nothing,
            "dtype",
            "elements",
            "tensors",
            "histogram",
            "shape",
            "bytes",
            "zeros",
            "std",
        ):
            if head in widths and min(room, NAME) + sum(widths.values()) > limit:
                del columns[head], widths[head]
                left.append(head)
    heads = [[head if head in _SHOWN else "" for head in columns]] if headed else []
    made = render.aligned([*heads, *zip(*columns.values(), strict=True)], keys=True, whole="sha256" in columns)
    more = f"{', '.join(left)}: in a wider terminal, or a pipe"
    return made + (render.aligned([["left out", more]]) if left else [])


NAME = 24
"""Columns that a name has before a column of a table gives way to it."""


def sparkline(counts: list[int]) -> str:
    """Returns a histogram as a character for every two bins: as high as the most, and never empty where a value is."""
    marks = " ▁▂▃▄▅▆▇█" if tables.draws() else " .:-=+*#@"
    pairs = [sum(counts[at : at + 2]) for at in range(0, len(counts), 2)]
    return "".join(marks[math.ceil(8 * number / max(pairs))] if number else marks[0] for number in pairs)


_SHOWN = ["mean", "std", "min", "max", "abs max", "zeros", "NaN", "inf", "histogram", "sha256"]
"""Headings that are shown; the other columns need none."""


def _figures(found: Sequence[Stats | None]) -> dict[str, list[str]]:
    """Returns the columns of statistics, of tensors that have them, {heading: cells}."""
    rows = [
        [*("-" if number is None else f"{number:.5g}" for number in (one.mean, one.std, one.min, one.max, one.abs_max)),
         *(f"{number:,}" for number in (one.zeros, one.nan, one.inf))] if one else [""] * 8
        for one in found
    ]  # fmt: skip
    return {head: [row[at] for row in rows] for at, head in enumerate(_SHOWN[:8])}


LONG = 50
"""Lines above which a screen on a terminal says how there would be fewer."""


def _shorter(rows: list[TensorRow], prefix: str, lines: int) -> list[str]:
    """Returns the hint for a list of so many lines: the deepest --depth with fewer, and at most `LONG`."""
    deepest = max((row.key.count(".") for row in rows), default=0) - prefix.count(".")
    depths = [(depth, len(_below(rows, depth, prefix))) for depth in range(1, deepest + 1)]
    fitting = [pair for pair in depths if pair[1] < lines and pair[1] <= LONG] or depths[:1] * (lines > LONG)
    return render.aligned([["hint", f"--depth {depth}: {plural(number, 'line')}"] for depth, number in fitting[-1:]])


def checked(check: Check) -> list[str]:
    """Returns the lines of --check: the findings, on a terminal 20 of each kind, and what could not be checked."""
    from ckptool.core.findings import KINDS

    lines = []
    most = render.ITEMS if render.folds() else len(check.findings)
    for kind in KINDS:
        found = [finding for finding in check.findings if finding.kind == kind]
        lines += [[kind, one.key or "", one.text + ", let pass" * bool(one.passes)] for one in found[:most]]
        if len(found) > most:
            lines.append([kind, "", f"{len(found) - most:,} more (--json has all)"])
    lines += [["unchecked", "", text] for text in check.unchecked]
    if not any(line[1] for line in lines):
        lines = [[line[0], line[2]] for line in lines]
    head = f"check: {plural(len(check.findings), 'finding')}" if check.findings else "check: nothing found"
    return [*render.headline(head, verdict=True), *render.aligned(lines)]


def _summed(rows: list[TensorRow], depth: int, prefix: str, below: list[PrefixStats] | None) -> list[str]:
    """Returns one line per prefix of ``depth`` levels, with the statistics of what is ``below`` it, if given."""
    groups = _below(rows, depth, prefix)
    columns = {
        "name": [*groups],
        "tensors": [plural(len(members), "tensor") for members in groups.values()],
        "elements": [f"{count(sum(row.numel() for row in members))} elements" for members in groups.values()],
        "bytes": [size(sum(row.nbytes for row in members)) for members in groups.values()],
    }
    if below is not None:
        by_prefix = {entry.prefix: entry.stats for entry in below}
        stats = [
            members[0].stats if len(members) == 1 else by_prefix.get(prefix + name.removesuffix(".*"))
            for name, members in groups.items()
        ]
        columns |= _figures(stats)
    return _fitting(columns, below is not None)


def _below(rows: list[TensorRow], depth: int, prefix: str) -> dict[str, list[TensorRow]]:
    """Returns the rows by the first ``depth`` levels of their keys, behind the prefix of all."""
    groups: dict[str, list[TensorRow]] = {}
    for row in rows:
        name = keys.cut(row.key, depth, prefix)
        groups.setdefault(name[len(prefix) :] + ".*" * (name != row.key), []).append(row)
    return groups
