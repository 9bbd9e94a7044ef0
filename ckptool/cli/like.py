"""``ckptool remap --like``: the rules are found, rather than given."""

import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace

import typer

import ckptool
from ckptool.cli import render
from ckptool.cli.output import Outputs, heading, rules_file
from ckptool.cli.progress import bar
from ckptool.cli.screens import like as screen
from ckptool.cli.screens import plans
from ckptool.core import keys
from ckptool.core.checkpoint import Checkpoint
from ckptool.errors import UsageError
from ckptool.io import tally
from ckptool.mapping.answers import Asked, answered, left
from ckptool.mapping.like import InferReport, LikeReport, entries
from ckptool.mapping.pairs import Pair
from ckptool.ops.remap import RemapReport
from ckptool.ops.rows import FilterReport, Gate, Row, counts_of, dims
from ckptool.ops.rules import Rules
from ckptool.reports import gates


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the options of ``--like`` say."""

    min_confidence: float | None = None
    layout: Sequence[str] | None = None
    explain: str | None = None
    min_loaded: str | None = None
    require: Sequence[str] | None = None
    strict: bool = False
    allow_unused: bool = False
    values: bool = True
    interactive: bool = False

    def layouts(self) -> list[tuple[str, str]]:
        """Returns (pattern, layout) of each --layout. Raises: UsageError."""
        made = [text.rpartition("=") for text in self.layout or ()]
        if wrong := [how for glob, _, how in made if not glob]:
            raise UsageError(f"--layout takes GLOB=HOW, not {wrong[0]!r}")
        return [(glob, how) for glob, _, how in made]


def run(
    source: Checkpoint,
    target: Checkpoint,
    given: Rules,
    wanted: Wanted,
    outputs: Outputs,
    output: str | None,
    save_map: str | None,
    save_rules: str | None,
) -> int:
    """Writes a source made like a target, after the rules that were ``given``; returns the exit code."""
    least = plans.fraction(wanted.min_loaded)
    unused = wanted.allow_unused
    staged = ckptool.remap(source, given, allow_unused=unused)[0] if given.rules else source
    layout, least_confidence = wanted.layouts(), wanted.min_confidence

    def infer(settled: Iterable[Pair] = ()) -> tuple[Rules, InferReport]:
        with bar(lambda: _nbytes(staged) + _nbytes(target), "compare") as progress:
            return ckptool.infer(
                staged, target, min_confidence=least_confidence, settled=[*settled], layout=layout,
                values=wanted.values, progress=progress,
            )  # fmt: skip

    rules, found = infer()
    if wanted.interactive:
        rules, found = _asked(staged, target, rules, found, infer)
    every = given + rules
    found = replace(found, rules=every.entries())
    failed = gates.failed(_judged(found, target), least, wanted.require or (), strict=False)
    failed += _strict(found) if wanted.strict else []
    if output is None and wanted.explain is not None:  # that nothing fits is the answer then
        failed = [gate for gate in failed if gate.gate != "loaded"]
    explained = None if wanted.explain is None else screen.explained(found, wanted.explain)
    checkpoint, of_remap = source, RemapReport([], [*source.state_dict()], [])
    if found.pairs:
        checkpoint, of_remap = ckptool.remap(source, every, allow_unused=unused)
    of_all = {field.name: getattr(of_remap, field.name) for field in fields(of_remap)}
    of_all["notes"] = [*of_remap.notes, *(note for note in found.notes if note not in of_remap.notes)]
    report = LikeReport(
        **of_all, like=found, failed=failed, hint=_hint(staged, target, found, layout), explained=explained
    )
    if not failed:
        report = outputs.write(checkpoint, output, report)
        outputs.write_beside(save_map, report.saved)
        if save_rules is not None:
            made = rules_file(found.rules, save_rules, found.source, found.target, "remap --like")
            outputs.write_beside(save_rules, made)
    begin = heading(outputs.dry_run, output or save_rules, bool(failed))
    notes = [*report.notes, *(gate.text for gate in failed)]
    by_key = save_map is not None or tally.current is not None
    outputs.finish(replace(report, saved=None), notes, lambda: screen.lines(report, found, begin, by_key))
    return int(bool(failed))


def _asked(
    source: Checkpoint,
    target: Checkpoint,
    rules: Rules,
    found: InferReport,
    infer: Callable[[Iterable[Pair]], tuple[Rules, InferReport]],
) -> tuple[Rules, InferReport]:
    """Asks a person about what is left, a template at a time; returns what is found with each answer settled."""
    ours, theirs = entries(source), entries(target)
    settled: dict[str, Pair] = {}
    asked: set[Asked] = set()
    while open_ := [*left(found, asked)]:
        question, is_of_layout = open_[0]
        render.show(screen.question(question, is_of_layout, len(open_)))
        while (text := typer.prompt(screen.prompt(is_of_layout), "", show_default=False).strip()) not in ("", "s"):
            if text == "q":
                return rules, found
            try:
                answers = answered(question, is_of_layout, text, ours, theirs)
                more = settled | {pair.target: pair for pair in answers}
                rules, now = infer(more.values())
            except UsageError as error:
                render.show([f"  {render.safe(str(error))}"])
                continue
            render.show(screen.learnt(answers, found, now))
            settled, found = more, now
            break
        asked.update((doubt.target, is_of_layout) for doubt in question.doubts)
    return rules, found


def _nbytes(checkpoint: Checkpoint) -> int:
    return sum(tensor.nbytes for tensor in checkpoint.state_dict().values())


def _judged(found: InferReport, target: Checkpoint) -> FilterReport:
    """Returns the report on the target's keys that the conditions of a command judge."""
    made = {pair.target for pair in found.pairs}
    rows, sizes = [], {True: 0, False: 0}
    for key, tensor in target.state_dict().items():
        counter = keys.is_counter(key)
        rows.append(Row(key, "loaded" if key in made else "bookkeeping" if counter else "missing", dims(tensor)))
        sizes[key in made] += 0 if counter else tensor.numel
    total = sum(sizes.values())
    return FilterReport(
        rows, counts_of(rows), None, sizes[True] / total if total else 1.0, None, found.target, [found.source]
    )


def _strict(found: InferReport) -> list[Gate]:
    lacking = [*found.missing, *found.only_source]
    counts = (len(found.missing), "missing"), (len(found.only_source), "unexpected")
    text = ", ".join(f"{count} {what}" for count, what in counts if count)
    return [Gate("strict", f"--strict: {text}", lacking)] if lacking else []


def _hint(source: Checkpoint, target: Checkpoint, found: InferReport, layout: Sequence[tuple[str, str]]) -> str | None:
    """Returns the option that decides what is in doubt, or unproven."""
    if open_ := found.open_layout:
        pattern, count, layouts = open_
        return f"--layout {shlex.quote(f'{pattern}=HOW')} would match {count:,} more; HOW is {' or '.join(layouts)}"
    best = [doubt.candidates[0].confidence for doubt in found.doubts if doubt.candidates]
    least = int(max(best, default=0.0) * 100 + 1e-6) / 100
    if least > 0:
        _, more = ckptool.infer(
            source, target, min_confidence=least, settled=found.settled, layout=layout, values=False
        )
        if len(more.pairs) > len(found.pairs):
            return f"--min-confidence {least:g} would match {len(more.pairs):,} of {more.total:,}"
    return None
