"""The lines that `ckptool remap` prints."""

from __future__ import annotations

from collections import Counter

from ckptool.cli import render
from ckptool.ops.remap import RemapReport
from ckptool.text import plural


def lines(report: RemapReport, begin: str) -> list[str]:
    """Returns the headline, and what became of the keys."""
    renamed = sum(row.op == "rename" and row.old != [row.new] for row in report.map)
    copied = sum(row.op == "copy" for row in report.map)
    made = sum(row.op not in ("rename", "copy") for row in report.map)
    parts = [plural(len(report.map), "key"), f"{renamed:,} renamed"]
    parts += [f"{copied:,} copied"] if copied else []
    parts += [f"{made:,} computed"] if made else []
    parts += [f"{len(report.dropped):,} dropped"] if report.dropped else []
    return [*render.headline(begin + ", ".join(parts)), *changed(report), *left(report)]


def changed(report: RemapReport) -> list[str]:
    """Returns the lines for the keys that got another name, or were computed."""
    lines = render.aligned(_renamed(report), keys=True)
    made_rows = [(f"{', '.join(row.old)} -> {row.new}", row.op) for row in report.map if row.op != "rename"]
    rows = [[name, made_rows[members[0]][1]] for name, members in render.fold(made_rows)]
    return [*lines, *render.aligned(rows, keys=True)]


def left(report: RemapReport) -> list[str]:
    """Returns the lines for dropped keys, notes and rules that fit no key."""
    lines = render.aligned([["dropped", name] for name, _ in render.fold([(key, None) for key in report.dropped])])
    lines += render.aligned([["note", render.short(text)] for text in report.notes])
    return [*lines, *render.aligned([["unused", text] for text in report.unused_rules])]


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
