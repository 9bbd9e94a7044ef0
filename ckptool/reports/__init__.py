"""Reports in other forms than a screen: JSON, GitHub annotations, JUnit, SARIF, Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ckptool.errors import UsageError, one_of

if TYPE_CHECKING:
    from ckptool.reports.outcome import Outcome

FORMS = ("text", "json", "github", "junit", "sarif", "markdown")
"""What ``--format`` takes. ``text`` is the command's own screen, ``json`` its report; all others show outcomes."""


def form_of(given: str) -> str:
    """Returns the name of a form. Raises: UsageError for what is none."""
    return one_of(FORMS, given, "--format")


def rendered(outcomes: Sequence[Outcome], form: str) -> str:
    """Returns the text of outcomes of one command in a form other than text and JSON."""
    from ckptool.reports import github, junit, markdown, sarif

    texts = {"github": github.text, "junit": junit.text, "markdown": markdown.text, "sarif": sarif.text}
    return texts[form](outcomes)


def render(report: Any, form: str) -> str:
    """Returns a report of the library as ``json``, ``github``, ``junit``, ``sarif`` or ``markdown``.

    ``report``: one of `diff`, `check_schema`, `inspect`, `filter`, `plan_partial`, `load_partial`, a list of them, or a
    `CkptoolError`. What fails is what the report says of itself, such as ``fail_on`` of `diff`.
    Raises: UsageError for another report or form.
    """
    from ckptool.reports import document
    from ckptool.reports.outcome import command_of, outcome

    several = report if isinstance(report, (list, tuple)) else [report]
    commands = [command_of(one) for one in several]
    if form_of(form) == "text":
        raise UsageError("text is what the command line prints; render makes json, github, junit, sarif and markdown")
    if form == "json":
        notes = [] if len(several) != 1 else getattr(several[0], "notes", [])
        return document.text(document.of(commands[0] if commands else "", report, notes))
    return rendered([outcome(one) for one in several], form)
