"""Output of the writing commands: paths checked, checkpoint and report written, result shown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from ckptool.cli import render
from ckptool.cli.progress import bar
from ckptool.core.dtypes import Changed
from ckptool.errors import CkptoolError, UsageError
from ckptool.ranks import world as ranks
from ckptool.reports import document

if TYPE_CHECKING:  # `inspect` and `diff` need the bar only, and must not import what writes
    from ckptool.core.checkpoint import Checkpoint
    from ckptool.mapping.like import LikeReport
    from ckptool.ops.remap import RemapReport
    from ckptool.ops.rows import FilterReport
    from ckptool.partial.plan import LoadPartialReport
    from ckptool.saving import Saved, SaveOptions

    Report = TypeVar("Report", FilterReport, RemapReport, LikeReport, LoadPartialReport)


@dataclass(frozen=True, slots=True)
class Outputs:
    """How a command writes: checkpoints by ``options``, and its JSON document to the path ``report``, if given.

    A dry run writes the report only. ``form`` is what it prints: one of `reports.FORMS`.
    """

    command: str
    options: SaveOptions
    report: str | None
    dry_run: bool
    form: str

    def check(self, paths: Sequence[str], inputs: Sequence[Checkpoint], *beside: str | None) -> None:
        """Checks the paths of the checkpoints, of other files ``beside`` them, and of the report.

        Raises: OutputError for one that exists (without ``--force``) or is an input, UsageError for two of one name.
        """
        from ckptool import saving
        from ckptool.io.files import same_place

        for path in paths:
            saving.check_output(path, self.options, inputs)
        taken = [] if self.options.hash_in_name else list(paths)
        for side in (*beside, self.report):
            if side is None:
                continue
            if any(same_place(side, other) for other in taken):
                raise UsageError(f"two outputs have the name {side}")
            saving.check_report(side, force=self.options.force, inputs=inputs)
            taken.append(side)

    def write(self, checkpoint: Checkpoint, path: str | None, report: Report) -> Report:
        """Writes a checkpoint, or checks it in a dry run; returns the report with the outcome."""
        if path is None:
            return report
        saved: Saved = self._save(checkpoint, path)
        left_out: list[str] = [f"left out: {', '.join(saved.left_out)}"] if saved.left_out else []
        changes: dict[str, Any] = {"output": None if self.dry_run else saved.path}
        changes["notes"] = [*report.notes, *left_out, *saved.notes]
        changes |= {name: dict(counts) for name in Changed._fields if (counts := getattr(saved, name))}
        return replace(report, **changes)

    def _save(self, checkpoint: Checkpoint, path: str) -> Saved:
        from ckptool import saving

        if self.dry_run:
            return saving.check(checkpoint, path, self.options)

        def total() -> int:
            anywhere = replace(self.options, force=True, in_place=True)
            return saving.check(checkpoint, path, anywhere).nbytes

        with bar(total, "copy") as progress:
            return saving.save(checkpoint, path, self.options, progress)

    def write_beside(self, path: str | None, content: Any) -> None:
        """Writes another JSON document, or a text, if a path is given and it is not a dry run."""
        if ranks.is_other():
            return
        if path is not None and not self.dry_run:
            self._write_text(path, content if isinstance(content, str) else document.text(content))

    def finish(
        self, result: Any, notes: Sequence[str], lines: Callable[[], Iterable[str]], errors: Sequence[CkptoolError] = ()
    ) -> None:
        """Writes the report if --report names a path; prints the JSON document, the outcome or the lines."""
        if ranks.started is not None:
            ranks.started.end()
        if ranks.is_other():
            return
        if self.report is not None or self.form == "json":
            made = document.text(document.of(self.command, result, notes, errors))
            if self.report is not None:
                self._write_text(self.report, made)
        if self.form == "json":
            render.write(made)
        elif self.form == "text" and not self.said_enough(result):
            render.show(lines())
        elif self.form != "text":
            from ckptool.reports.outcome import outcome

            render.outcomes([outcome(one, self.command) for one in (result, *errors)], self.form)

    def said_enough(self, result: Any) -> bool:
        """Returns whether nothing is to be shown: the run is quiet, and the output is there (``result``: a report)."""
        written = all(getattr(one, "output", None) for one in (result if isinstance(result, list) else [result]))
        return render.quiet and written and not self.dry_run

    def _write_text(self, path: str, text: str) -> None:
        from ckptool import saving

        saving.write_text(path, text, force=self.options.force)


def rules_file(rules: Sequence[dict[str, Any]], path: str, source: str, target: str, found_by: str) -> str:
    """Returns the content of a file of rules that were found: TOML, or JSON if the path says so. Raises: UsageError."""
    if path.lower().endswith(".json"):
        return document.text({"rules": rules})
    from ckptool.mapping.rules import rules_text

    said = f"Makes {source} like {target}: ckptool remap --rules", f"Found by ckptool {found_by}"
    return rules_text(rules, *said)


def heading(dry_run: bool, path: str | None, failed: bool = False) -> str:
    """Returns the start of the first line: the output's path, and whether it was not written."""
    state = " (dry run)" if dry_run and path else " (not written)" if failed else ""
    return f"{path or '(dry run)'}{state}: "
