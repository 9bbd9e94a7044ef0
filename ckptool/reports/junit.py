"""JUnit's XML, as Jenkins and GitLab read it: a test suite for each outcome, a test case for each group of keys.

A problem that fails is a ``failure``, one that is allowed is skipped, any other a case that passed and says so.
An outcome without problems is a case.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from ckptool.reports.outcome import Outcome, Problem


def text(outcomes: Sequence[Outcome]) -> str:
    """Returns the document of all outcomes."""
    suites = [line for one in outcomes for line in _suite(one)]
    counts = _counts([case for one in outcomes for case in _cases(one)])
    return "\n".join(
        ['<?xml version="1.0" encoding="UTF-8"?>', f'<testsuites name="ckptool" {counts}>', *suites, "</testsuites>\n"]
    )


def _cases(one: Outcome) -> list[tuple[str, str]]:
    """Returns (name, element) of each case; the element is what is inside the case."""
    if not one.problems:
        return [(one.verdict, "")]
    return [_case(problem, one.status == "error") for problem in one.problems]


def _case(problem: Problem, error: bool) -> tuple[str, str]:
    name = f"{problem.kind}: {problem.key}" if problem.key else problem.kind
    said = escape(str(problem))
    if problem.reason is not None:
        return name, f'<skipped message="{escape(problem.reason or "allowed")}">{said}</skipped>'
    if problem.level != "error":
        return name, f"<system-out>{problem.level}: {said}</system-out>"
    tag = "error" if error else "failure"
    return name, f'<{tag} type="{escape(problem.kind)}" message="{escape(problem.text)}">{said}</{tag}>'


def _counts(cases: list[tuple[str, str]]) -> str:
    failures, errors = (sum(inside.startswith(f"<{tag} ") for _, inside in cases) for tag in ("failure", "error"))
    return f'tests="{len(cases)}" failures="{failures}" errors="{errors}"'


def _suite(one: Outcome) -> list[str]:
    cases, command = _cases(one), f"ckptool {one.command}".rstrip()
    name = escape(f"{command}: {one.title}" if one.title else command)
    skipped = sum(inside.startswith("<skipped ") for _, inside in cases)
    counts = _counts(cases) + (f' skipped="{skipped}"' if skipped else "")
    lines = [f'  <testsuite name="{name}" {counts}>']
    lines += [
        f'    <testcase classname="{escape(command.replace(" ", "."))}" name="{escape(name)}"'
        + (f">{inside}</testcase>" if inside else "/>")
        for name, inside in cases
    ]
    said = "\n".join([one.verdict, *(f"note: {note}" for note in one.notes)])
    return [*lines, f"    <system-out>{escape(said)}</system-out>", "  </testsuite>"]
