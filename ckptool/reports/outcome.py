"""What a report comes to, for those who judge it: whether it passed, and what was found, alike keys in one group.

Every renderer shows an `Outcome` and knows no command; no command knows a renderer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from ckptool.core import keys as names
from ckptool.errors import CkptoolError, UsageError, kind_of
from ckptool.reports import wording
from ckptool.reports.gates import STRICT
from ckptool.text import dims, percent, plural, safe

if TYPE_CHECKING:
    from ckptool.ops.diff import DiffReport
    from ckptool.ops.inspect import InspectReport
    from ckptool.ops.rows import FilterReport
    from ckptool.partial.plan import LoadPartialReport
    from ckptool.references.schema import SchemaReport

Level = Literal["error", "warning", "note"]
"""``error`` is what failed; ``warning`` what was found and does not fail; ``note`` what is to be known."""


@dataclass(frozen=True, slots=True)
class Problem:
    """Keys, folded into one pattern, with the same to be said of each. ``key`` is "" where no key is meant.

    ``kind`` is the word of the report and of --fail-on: ``shape``, ``crc``. ``keys``: how many. ``reason``: why it is
    allowed (--allow), maybe ""; None where it is not.
    """

    kind: str
    level: Level
    key: str
    text: str
    keys: int = 1
    reason: str | None = None

    def __str__(self) -> str:
        folded = f"  ({self.keys:,} keys)" if self.keys > 1 else ""
        return f"{': '.join(filter(None, (self.key, self.said)))}{folded}"

    @property
    def said(self) -> str:
        """Returns the text, and whether it is allowed, and why."""
        if self.reason is None:
            return self.text
        return f"{self.text} (allowed{': ' * bool(self.reason)}{self.reason})".strip()


@dataclass(frozen=True, slots=True)
class Outcome:
    """``title``: what was judged, such as ``old.pth -> new.pth``; ``path``: the file that the problems are of.

    All text is printable, but for ``path``, which is as it was given. An ``error`` could not be judged.
    """

    command: str
    title: str
    path: str
    status: Literal["passed", "failed", "error"]
    verdict: str
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def command_of(report: Any) -> str:
    """Returns the command that makes such a report; "" for an error. Raises: UsageError for what is no report."""
    return _maker(report)[0]


def outcome(report: Any, command: str = "") -> Outcome:
    """Returns what a report comes to, or an error of ``command``. Raises: UsageError for what is none of these."""
    of, made = _maker(report)
    return made(of or command, report)


def failure(error: CkptoolError, command: str) -> Outcome:
    """Returns the outcome that an error is: nothing was judged."""
    problem = Problem(error.slug, "error", "", safe(error.message))
    path = error.path or ""
    return Outcome(command, safe(path), path, "error", f"error: {safe(error.message)}", [problem])


def _maker(report: Any) -> tuple[str, Callable[[str, Any], Outcome]]:
    if isinstance(report, CkptoolError):
        return "", lambda command, error: failure(error, command)
    found = _MAKERS.get(type(report).__name__)  # by name: the classes' modules need not be imported
    if found is None:
        raise UsageError(f"{kind_of(report)} is no report that has an outcome; those are {', '.join(_MAKERS)}")
    return found


def _diff(command: str, report: DiffReport) -> Outcome:
    found: list[tuple[wording.Difference, Level]] = []
    other: Level
    for other, rows in (("warning", wording.differences(report)), ("note", wording.harmless(report))):
        for row in rows:
            level: Level = "note" if row.reason is not None else "error" if row.kind in report.fails else other
            found.append((row, level))
    title = f"{report.a} -> {report.b}"
    return _outcome(
        command, title, report.b, bool(report.fails), wording.headline(report), _folded(found), report.notes
    )


def _schema(command: str, report: SchemaReport) -> Outcome:
    problems = _folded((row, "error") for row in wording.schema_failures(report))
    title = f"{report.path} against {report.rules or 'a schema'}"
    return _outcome(
        command, title, report.path, not report.same, wording.schema_headline(report), problems, report.notes
    )


def _inspect(command: str, report: InspectReport) -> Outcome:
    check = report.check
    if check is None:
        rows = [wording.Difference(one.dtype, one.key, dims(one.shape)) for one in report.tensors]
        verdict = f"{report.format}, {plural(len(rows), 'tensor')}, {report.parameters:,} parameters"
        problems = _folded((row, "note") for row in rows)
        notes = [*report.problems, *report.notes]
        return _outcome(command, report.path, report.path, False, verdict, problems, notes)
    found: list[tuple[wording.Difference, Level]] = [
        (wording.Difference(one.kind, one.key or "", one.text), "note" if one.passes else "error")
        for one in check.findings
    ]  # fmt: skip
    found += [(wording.Difference("unchecked", "", text), "warning") for text in check.unchecked]
    verdict = plural(len(check.findings), "finding") if check.findings else "nothing found"
    return _outcome(command, report.path, report.path, check.fails, f"check: {verdict}", _folded(found), report.notes)


def _plan(command: str, report: FilterReport | LoadPartialReport) -> Outcome:
    refused = {key for gate in report.failed for key in gate.keys}
    problems = [Problem(gate.gate, "error", "", safe(gate.text), max(1, len(gate.keys))) for gate in report.failed]
    found: list[tuple[wording.Difference, Level]] = [
        (wording.Difference(row.reason, row.key, wording.row_text(row)), "error" if row.key in refused else "warning")
        for row in report.rows
        if row.reason in STRICT or row.tensors or row.key in refused
    ]  # fmt: skip
    counts = [f"{number} {reason}" for reason in STRICT if (number := report.counts.get(reason))]
    loaded = report.loaded if isinstance(report.loaded, int) else len(report.loaded)
    verdict = ", ".join([f"{loaded} loaded ({percent(report.loaded_fraction)} of parameters)", *counts])
    path = report.target or report.output or ""
    title = f"{' + '.join(report.sources) or 'nothing'} -> {path or 'a selection'}"
    notes = [*report.notes, *([f"hint: {report.hint}"] if report.hint else [])]
    return _outcome(command, title, path, bool(report.failed), verdict, [*problems, *_folded(found)], notes)


_MAKERS: dict[str, tuple[str, Callable[[str, Any], Outcome]]] = {
    "DiffReport": ("diff", _diff), "SchemaReport": ("diff", _schema), "InspectReport": ("inspect", _inspect),
    "FilterReport": ("filter", _plan), "LoadPartialReport": ("load-partial", _plan),
}  # fmt: skip
"""For each report: its command, and the function that makes its outcome."""


def _outcome(
    command: str, title: str, path: str, fails: bool, verdict: str, problems: list[Problem], notes: Iterable[str]
) -> Outcome:
    order = ("error", "warning", "note")
    ordered = sorted(problems, key=lambda one: order.index(one.level))
    status: Literal["passed", "failed"] = "failed" if fails else "passed"
    return Outcome(command, safe(title), path, status, safe(verdict), ordered, [*map(safe, notes)])


def _folded(rows: Iterable[tuple[wording.Difference, Level]]) -> list[Problem]:
    """Returns rows of alike keys as one problem each."""
    problems = []
    for row, level, count in wording.folded(list(rows), names.fold):
        reason = None if row.reason is None else safe(row.reason)
        problems.append(Problem(row.kind, level, safe(row.key), safe(row.text), count, reason))
    return problems


def counted(outcomes: Iterable[Outcome]) -> Iterator[tuple[str, int]]:
    """Yields (status, how many outcomes have it), the worst first."""
    found = Counter(one.status for one in outcomes)
    return ((status, found[status]) for status in ("error", "failed", "passed") if found[status])
