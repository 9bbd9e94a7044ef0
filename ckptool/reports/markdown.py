"""GitHub's Markdown, for a comment on a pull request: the verdict, then a table, of which what is long is folded.

Names from a file stand in code spans, where nothing is markup, mention or link.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from ckptool.reports.outcome import Outcome, Problem, counted

SHOWN = 10
"""Rows of a table that are not folded."""

LONGEST = 60_000
"""Characters of all tables together. GitHub refuses a comment of more than 65,536."""

_CHARS = r"""(?:[A-Za-z0-9 ,.;()%=+/'"-]|(?<=[A-Za-z0-9])_(?=[A-Za-z0-9]))*"""
_PLAIN = re.compile(rf"(?!.*(?:www\.|://)|\d+[.)]|[ =+-]){_CHARS}(?:(?: ->|:){_CHARS})*", re.ASCII)
"""Text that no Markdown means anything else by."""


def text(outcomes: Sequence[Outcome]) -> str:
    """Returns the comment; of several outcomes the first line counts, and each has a part of its own."""
    command = f"ckptool {outcomes[0].command}".rstrip() if outcomes else "ckptool"
    parts = []
    if len(outcomes) != 1:
        counts = ", ".join(f"{number} {status}" for status, number in counted(outcomes))
        parts.append(f"**{command}: {counts}**\n")
    left = LONGEST
    for one in outcomes:
        made, left = _part(one, command, left)
        parts.append(made)
    return "\n".join(parts)


def _part(one: Outcome, command: str, left: int) -> tuple[str, int]:
    """Returns the part of an outcome, and how many characters are left for others."""
    title = f" {code(one.title)}" if one.title else ""
    lines = [f"**{command}: {one.status}**{title}", "", plain(one.verdict), ""]
    rows = [_row(problem) for problem in (() if one.status == "error" else one.problems)]
    fitting = 0
    while fitting < len(rows) and len(rows[fitting]) < left:
        left -= len(rows[fitting]) + 1
        fitting += 1
    head = ["| | | |", "| --- | --- | --- |"]
    if fitting:
        lines += [*head, *rows[:SHOWN][:fitting], ""]
    if fitting > SHOWN:
        lines += _details(f"{fitting - SHOWN:,} more", [*head, *rows[SHOWN:fitting]])
    if fitting < len(rows):
        lines += [f"{len(rows) - fitting:,} more lines do not fit into a comment; --format json has all.", ""]
    if one.notes:
        notes = [f"- {plain(note)}" for note in one.notes[:SHOWN]]
        notes += [f"- {len(one.notes) - SHOWN:,} more"] if len(one.notes) > SHOWN else []
        lines += _details(f"{len(one.notes)} note{'s' * (len(one.notes) > 1)}", notes)
    return "\n".join(lines), left


def _details(summary: str, lines: Sequence[str]) -> list[str]:
    return [f"<details><summary>{summary}</summary>", "", *lines, "", "</details>", ""]


def _row(problem: Problem) -> str:
    kind = f"**{problem.kind}**" if problem.level == "error" else problem.kind
    keys = f" ({problem.keys:,} keys)" if problem.keys > 1 else ""
    cells = kind, (code(problem.key) if problem.key else ""), plain(problem.said) + keys
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def code(name: str) -> str:
    """Returns a name in a code span that shows it as it is.

    >>> print(code("a.weight"), code("a`b"), code("`"))
    `a.weight` ``a`b`` `` ` ``
    """
    fence = "`" * (max((len(run) for run in re.findall("`+", name)), default=0) + 1)
    pad = " " if name[:1] == "`" or name[-1:] == "`" or (name[:1] == name[-1:] == " " and name.strip()) else ""
    return f"{fence}{pad}{name}{pad}{fence}"


def plain(said: str) -> str:
    """Returns text as it is if it is no markup, else in a code span."""
    return said if _PLAIN.fullmatch(said) else code(said)
