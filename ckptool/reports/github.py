"""Workflow commands of GitHub Actions: a line for each outcome and each problem, which GitHub shows as annotations.

    ::error file=NAME,title=TITLE::MESSAGE

GitHub shows the first ten errors, warnings and notices of a step, so the verdict comes first; the log has all lines. No
other line is printed: one that begins with "::" would be a command.
"""

from __future__ import annotations

from collections.abc import Sequence

from ckptool.reports.outcome import Outcome
from ckptool.text import safe

LEVELS = {"error": "error", "warning": "warning", "note": "notice"}


def text(outcomes: Sequence[Outcome]) -> str:
    """Returns the lines of all outcomes: every verdict, then the problems, then the notes."""
    lines = []
    for one in outcomes:
        level = "notice" if one.status == "passed" else "error"
        lines.append(_line(level, one, "", f"{one.title}: {one.verdict}" if one.title else one.verdict))
    for one in outcomes:
        shown = [] if one.status == "error" else one.problems
        lines += [_line(LEVELS[problem.level], one, f": {problem.kind}", str(problem)) for problem in shown]
        lines += [_line("notice", one, "", note) for note in one.notes]
    return "".join(f"{line}\n" for line in lines)


def _line(level: str, one: Outcome, kind: str, message: str) -> str:
    title = _property(f"ckptool {one.command}".rstrip() + kind)
    properties = [*([f"file={_property(safe(one.path))}"] if one.path else []), f"title={title}"]
    return f"::{level} {','.join(properties)}::{_data(message)}"


def _data(message: str) -> str:
    """Returns a message with the escapes of @actions/core's ``escapeData``."""
    return message.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(value: str) -> str:
    return _data(value).replace(":", "%3A").replace(",", "%2C")
