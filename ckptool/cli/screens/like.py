"""What `ckptool remap --like` prints: what was matched and what was not, and the sentences of ``--explain``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from ckptool.cli import render
from ckptool.cli.screens import remap
from ckptool.core import keys
from ckptool.errors import UsageError
from ckptool.mapping.like import LAYOUTS, InferReport, LikeReport, Question, questions
from ckptool.mapping.pairs import Doubt, Pair

BECAUSE = {
    "words": "the words of their names agree",
    "order": "they stand in the same order",
    "numbers": "the numbers in their names agree",
    "neighbours": "what stands beside them maps alike",
    "roles": "its values look like those of its role, and the others' do not",
    "only one of its shape": "nothing else of its shape is left",
    "few of its shape": "few have its shape, and as many on both sides",
    "values": "their values are equal, or near",
    "a person": "a person said so",
}
"""What a witness says."""


def lines(report: LikeReport, found: InferReport, begin: str, by_key: bool = False) -> list[str]:
    """Returns the headline, a line per rule, then what is left out, and the next step; or the sentences.

    ``by_key``: in a pipe, a line for every key that is made, rather than for every rule.
    """
    if report.explained is not None:
        return [*map(render.safe, report.explained), *render.aligned([["failed", one.text] for one in report.failed])]
    parts = [f"matched {len(found.pairs):,} of {found.total:,}"]
    known = {pair.target for pair in found.unproven}
    unproven = [doubt for doubt in found.doubts if doubt.target in known]
    doubts = [doubt for doubt in found.doubts if doubt.target not in known]
    counts = (len(unproven), "unproven"), (len(doubts), "in doubt"), (len(found.only_target), "missing")
    for number, text in counts:
        parts += [f"{number:,} {text}"] if number else []
    parts += [f"{len(report.dropped):,} dropped"] if report.dropped else []
    made = render.headline(begin + ", ".join(parts))
    by_rule = render.folds() or not by_key
    made += render.aligned([*_rules(found.rules)], keys=True) if by_rule else remap.changed(report)
    made += render.aligned([["unproven", *row] for row in _unproven(unproven)])
    made += render.aligned([["in doubt", *row] for row in _doubts(doubts)])
    missing = [(key, None) for key in found.only_target if not keys.is_counter(key)]
    made += render.aligned([["missing", name, f"nothing in {found.source} fits"] for name, _ in render.fold(missing)])
    counters = len(found.only_target) - len(missing)
    made += render.aligned([["bookkeeping", f"{counters} x num_batches_tracked"]] if counters else [])
    made += remap.left(report)
    made += render.aligned([["hint", report.hint]] if report.hint else [])
    return made + render.aligned([["failed", gate.text] for gate in report.failed])


def _rules(rules: Iterable[dict[str, Any]]) -> Iterator[list[str]]:
    """Yields a line for each rule but those that drop, and for each line of a table."""
    for rule in rules:
        kind, given = next(iter(rule.items()))
        if kind == "table":
            yield from ([old, "->", new] for old, new in given.items())
        elif kind in ("split", "chunk"):
            yield [given, "->", ", ".join(rule["into"]), kind]
        elif kind in ("cat", "weave"):
            yield [", ".join(given), "->", rule["into"], kind]
        elif kind in ("copy", "sub"):
            yield [given, "->", str(rule.get("to", rule.get("by"))), kind]
        elif kind != "drop":
            yield [given, "", " ".join(f"{name} {value}" for name, value in rule.items() if name != kind), kind]


def _unproven(doubts: list[Doubt]) -> Iterator[list[str]]:
    groups = questions(doubts) if render.folds() else [Question(one.target, _sources(one), [one]) for one in doubts]
    for one in groups:
        yield [one.target, f"of {one.candidates[0]}: {one.doubts[0].candidates[0].unproven}{_count(one.doubts)}"]


def _sources(doubt: Doubt) -> list[str]:
    return [" + ".join(pair.source) for pair in doubt.candidates]


def _count(doubts: list[Doubt]) -> str:
    return f"  ({len(doubts)} keys)" if len(doubts) > 1 else ""


def _doubts(doubts: list[Doubt]) -> Iterator[list[str]]:
    if not render.folds():
        yield from ([doubt.target, _either(_sources(doubt))] for doubt in doubts)
        return
    for question in questions(doubts):
        yield [question.target, _either(question.candidates) + _count(question.doubts)]


def _either(names: list[str], most: int = 3) -> str:
    more = [f"{len(names) - most} others"] if len(names) > most else []
    return f"could be {' or '.join([*names[:most], *more])}" if names else "no candidate is likely enough"


# --- questions -----------------------------------------------------------------------------------------------------


def question(asked: Question, is_of_layout: bool, count: int) -> list[str]:
    """Returns what is asked, the first of ``count`` questions: a line per candidate with its witnesses."""
    what = f"of {asked.candidates[0]}: {asked.doubts[0].candidates[0].unproven}" if is_of_layout else "is made of what?"
    more = f"  [1 of {count} open]" if count > 1 else ""
    made = render.headline(f"{asked.target} {what}{_count(asked.doubts)}{more}")
    options = zip(asked.candidates, asked.doubts[0].candidates, strict=True)
    return made + render.aligned(
        [str(number), _made(replace(pair, source=[name])), _said(pair)]
        for number, (name, pair) in enumerate(() if is_of_layout else options, 1)
    )


def prompt(is_of_layout: bool) -> str:
    """Returns what an answer may be."""
    known = ", ".join(LAYOUTS) if is_of_layout else "A number, a key of the source"
    return f"{known}; Enter to skip, q to stop"


def learnt(answers: Sequence[Pair], before: InferReport, now: InferReport) -> list[str]:
    """Returns the line that says what an answer settled, of what was asked and beside it, and what it undid."""
    own = {pair.target for pair in answers}
    had, has = ({pair.target for pair in found.pairs} for found in (before, now))
    counts = [
        (len(own & has), "settled"), (len(own - has), "left with a layout that is not known"),
        (len(has - had - own), "more settled by that"), (len(had - has - own), "left out because of that"),
    ]  # fmt: skip
    return render.aligned([[", ".join(f"{count:,} {text}" for count, text in counts if count)]])


# --- sentences -----------------------------------------------------------------------------------------------------


def explained(found: InferReport, pattern: str) -> list[str]:
    """Returns a sentence for each key, of either side, that a pattern fits. Raises: UsageError if it fits none."""
    pairs = {pair.target: pair for pair in found.pairs}
    doubts = {doubt.target: doubt for doubt in found.doubts}
    used: dict[str, list[str]] = {}
    for pair in found.pairs:
        for key in pair.source:
            used.setdefault(key, []).append(pair.target)
    known = [*pairs, *doubts, *found.only_target]
    ours = [*used, *found.only_source]
    made = [_of_target(found, key, pairs.get(key), doubts.get(key)) for key in known if _fits(pattern, key)]
    made += [_of_source(found, key, used.get(key)) for key in ours if _fits(pattern, key) and key not in known]
    if not made:
        where = f"{found.source} or {found.target}"
        raise UsageError(f"--explain {pattern} fits no key of {where}{keys.near_pattern(pattern, [*known, *ours])}")
    return made


def _fits(pattern: str, key: str) -> bool:
    return pattern == key or keys.matches(pattern, key)


def _of_target(found: InferReport, key: str, pair: Pair | None, doubt: Doubt | None) -> str:
    if pair is not None:
        because = (
            _listed([BECAUSE.get(one, one) for one in pair.witnesses])
            or "every other tensor of its shape goes elsewhere"
        )
        return f"{key} is made of {_made(pair)}, because {because} (confidence {_rounded(pair.confidence)})."
    if doubt is not None and doubt.candidates and doubt.target in {one.target for one in found.unproven}:
        best = doubt.candidates[0]
        return f"{key} is left out: it is made of {_made(best)}, but {best.unproven} is not known. --layout says it."
    if doubt is not None and doubt.candidates:
        shown = [f"{_made(one)} ({_said(one)})" for one in doubt.candidates]
        return f"{key} is left out: it could be made of {', or of '.join(shown)}; none was taken, as {doubt.reason}."
    reason = f": {doubt.reason}" if doubt is not None else ""
    return f"{key} is left out: nothing in {found.source} could become it{reason}."


def _of_source(found: InferReport, key: str, targets: list[str] | None) -> str:
    if targets:
        return f"{key} becomes {_listed(targets)}, or a part of it; --explain of that says why."
    return f"{key} is dropped: no key of {found.target} is made of it."


def _said(pair: Pair) -> str:
    return f"confidence {_rounded(pair.confidence)}: {', '.join(pair.witnesses) or 'no witness'}"


def _rounded(confidence: float) -> str:
    return f"{int(confidence * 100 + 1e-6) / 100:g}"  # never up to the next


def _listed(texts: list[str]) -> str:
    return " and ".join(filter(None, (", ".join(texts[:-1]), *texts[-1:])))


STEPS = {
    "transpose": "transposed",
    "permute": "with its dimensions in the order {0}",
    "reshape": "reshaped",
    "slice": "rows {1} to {2} along dimension {0}",
    "groupslice": "rows {2} to {3} of each of {1} groups along dimension {0}",
    "rope_interleave": "with the rotary halves of {1} heads as pairs",
    "rope_deinterleave": "with the rotary pairs of {1} heads as halves",
    "shuffle": "with rows counted by {1} and {2} transposed",
    "concat": "put together along dimension {0}",
    "stack": "stacked along dimension {0}",
    "groupconcat": "put together in {1} groups along dimension {0}",
}
"""How a step of an operation is said."""


def _made(pair: Pair) -> str:
    """Returns the sources of a pair, and what is done to them."""
    said = [_step(step) for step in pair.op.split(";") if step != "rename"]
    return ", ".join([_listed(pair.source), *said])


def _step(step: str) -> str:
    name, _, inside = step.partition("<")
    name, *numbers = name.split(":")
    if name == "split":
        part, _, parts = numbers[1].partition("/")
        return f"part {int(part) + 1} of {parts} along dimension {numbers[0]}"
    each = f" after {inside.rstrip('>').replace('|', ', ')}" if inside else ""
    return STEPS[name].format(*numbers) + each if name in STEPS else step
