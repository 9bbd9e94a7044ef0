"""Patterns for whole segments of keys: ``{i}`` and ``*``, what these capture, and tables of old and new names."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import islice
from typing import Any, NamedTuple

from ckptool.errors import UsageError
from ckptool.ops.steps import Step

_CAPTURE = re.compile(r"(\*|\{\w+\})")
_FILLED = re.compile(r"((?:(?<=\.)|^)\*\*$|\*|\{\w+(?:[+-]\d{1,9})?\})")
_SHIFT = re.compile(r"\{(\w+)([+-]\d+)\}")

REST = "**"
"""A last segment that stands for all segments that follow."""


Replacement = str | Callable[[re.Match[str]], str]
"""What `re.Pattern.sub` puts in place of a match."""


class Pattern(NamedTuple):
    """The regular expression for consecutive segments of a key, each with a "." after it (the last one too).

    ``captures``: what each group of ``regex`` stands for, ``*`` or ``{name}``. ``literal``: the longest text that
    every key which matches contains; looking for it first is faster than the regular expression.
    """

    regex: re.Pattern[str]
    captures: Sequence[str]
    literal: str

    def captured(self, key: str) -> tuple[str, ...] | None:
        """Returns what each capture stands for in a key of which all segments match; None for any other key."""
        match = self.regex.fullmatch(f"{key}.") if self.literal in key else None
        return None if match is None else match.groups()

    def substitute(self, replacement: Replacement, key: str) -> str:
        """Returns a key with a `replacement` for each run of segments that matches."""
        return self.regex.sub(replacement, f"{key}.")[:-1]


@lru_cache(maxsize=512)
def compiled(text: str) -> Pattern:
    """Returns the pattern in which ``*`` and ``{name}`` each stand for one or more characters of one segment.

    A name that was captured before stands for the same text. A last segment ``**`` stands for all that follow, one or
    more. Raises: UsageError for a name twice in one segment.
    """
    captures: list[str] = []
    regex = r"(?<![^.])"
    parts = text.split(".")
    for segment in parts[:-1] if parts[-1] == REST else parts:
        first = len(captures)
        pieces = _CAPTURE.split(segment)
        # Atomic where captures meet in one segment: else the ways to match a long key would be tried one by one.
        regex += "(?>" if len(pieces) > 3 else "(?:"
        for number, piece in enumerate(pieces):
            if number % 2 == 0:
                regex += re.escape(piece)
            elif piece == "*" or piece not in captures:
                captures.append(piece)
                regex += f"(?P<c{len(captures)}>[^.]+)"
            elif piece in captures[first:]:
                raise UsageError(f"{text!r}: {piece} is in one segment twice")
            else:
                regex += f"(?P=c{captures.index(piece) + 1})"
        regex += r"\.)"
    if parts[-1] == REST:
        captures.append(REST)
        regex += rf"(?P<c{len(captures)}>.+)\."
    literals = (part for piece in _CAPTURE.split(text)[::2] for part in piece.split("."))
    return Pattern(re.compile(regex), captures, max(literals, key=len))


def replacement(new: str, captures: Sequence[str]) -> Replacement:
    """Returns what `Pattern.substitute` puts in place of a match: ``new``, with what was captured filled in.

    ``{i+1}`` and ``{i-1}`` stand for one more and one less than the number that ``{i}`` stands for.
    Raises: UsageError if ``new`` has other captures than those; the function, for what is no number of 0 or more.
    """
    stars = (number for number, capture in enumerate(captures, 1) if capture == "*")
    texts, shifts = [""], list[tuple[int, int, str]]()
    for position, piece in enumerate(_FILLED.split(new)):
        if position % 2 == 0:
            texts[-1] += piece.replace("\\", "\\\\")
            continue
        shift = _SHIFT.fullmatch(piece)
        name = f"{{{shift[1]}}}" if shift else piece
        same = (number for number, capture in enumerate(captures, 1) if capture == name)
        number = next(stars if name == "*" else same, None)
        if number is None:
            what = "more *" if name == "*" else name
            raise UsageError(f"the new name {new!r} has {what}, which the old name has not")
        if shift:
            shifts.append((number, int(shift[2]), piece))
            texts.append("")
        else:
            texts[-1] += f"\\g<{number}>"
    texts[-1] += "." if new else ""

    def filled(match: re.Match[str]) -> str:
        numbers = (_shifted(match, *shift) for shift in shifts)
        return "".join(piece for text in texts for piece in (match.expand(text), next(numbers, "")))

    return filled if shifts else texts[0]


def _shifted(match: re.Match[str], group: int, by: int, name: str) -> str:
    """Returns the number that a group captured plus ``by``; ``name`` is how the new name says that."""
    found = match[group]
    number = int(found) + by if re.fullmatch("[0-9]{1,18}", found) else -1
    if number < 0:
        raise UsageError(f"{name} is no number of 0 or more where {match[0][:-1]} has {found!r}")
    return str(number)


def renamer(old: str, new: str) -> Callable[[str], str]:
    """Returns the function from a key to the key with every run of whole segments that matches ``old`` made ``new``.

    Raises: UsageError if ``new`` has captures that ``old`` has not.
    """
    pattern = compiled(old)
    substitute, literal, filled = pattern.regex.sub, pattern.literal, replacement(new, pattern.captures)
    return lambda key: substitute(filled, f"{key}.")[:-1] if literal in key else key


class _Line(NamedTuple):
    """A line of a table with captures: its number, the pattern of the old name, `replacement` (None: drop the key)."""

    number: int
    old: Pattern
    new: Replacement | None


class Table:
    """A table of old to new names. Each key is looked up once, so names may be swapped.

    ``{}``, ``{name}`` and ``*`` stand for one segment, or part of one, a last ``**`` for all that follow; None for a
    new name drops the key. A name without captures goes before a pattern, and of patterns the first that matches. The
    cost per key does not grow with the number of lines: the segments without captures are looked up in a dict.
    Raises: UsageError for what is no such table.
    """

    def __init__(self, lines: Mapping[Any, Any]) -> None:
        self.given = dict(lines)
        self.texts: list[str] = []
        self._exact: dict[str, tuple[int, str | None]] = {}
        # (segments, whether more may follow) -> positions of those without captures -> these segments -> lines
        self._frames: dict[tuple[int, bool], dict[tuple[int, ...], dict[tuple[str, ...], list[_Line]]]] = {}
        for old, new in lines.items():
            if not isinstance(old, str) or not old or not (new is None or isinstance(new, str)):
                raise UsageError(f"the table maps {old!r} to {new!r}, which is no name")
            self._add(old.replace("{}", "*"), None if new is None else new.replace("{}", "*"))
            self.texts.append(f"drop {old}" if new is None else f"rename {old} -> {new}")

    def _add(self, old: str, new: str | None) -> None:
        number, parts = len(self.texts), old.split(".")
        positions = tuple(at for at, part in enumerate(parts) if not _CAPTURE.search(part))
        if len(positions) == len(parts):
            replacement(new or "", ())
            self._exact[old] = number, new
            return
        pattern = compiled(old)
        line = _Line(number, pattern, None if new is None else replacement(new, pattern.captures))
        rest = parts[-1] == REST
        frame = self._frames.setdefault((len(parts) - rest, rest), {}).setdefault(positions, {})
        frame.setdefault(tuple(parts[at] for at in positions), []).append(line)

    def plan(self, keys: Iterable[str]) -> tuple[list[Step], list[str]]:
        """Returns (the steps for these keys, the lines that match none of them)."""
        used: set[int] = set()
        dropped, old, new = [], [], []
        for key in keys:
            found = self._exact.get(key) or self._look_up(key)
            if found is None:
                continue
            used.add(found[0])
            if found[1] is None:
                dropped.append(key)
            elif found[1] != key:
                old.append(key)
                new.append(found[1])
        steps = [Step("drop", tuple(dropped))] if dropped else []
        steps += [Step("rename", tuple(old), tuple(new))] if old else []
        return steps, [text for number, text in enumerate(self.texts) if number not in used]

    def _look_up(self, key: str) -> tuple[int, str | None] | None:
        """Returns (number of the first line with captures that matches a key, the new name); None if none does."""
        if not self._frames:
            return None
        parts = key.split(".")
        likely: list[_Line] = []
        for (length, rest), frames in self._frames.items():
            if length < len(parts) if rest else length == len(parts):
                for positions, frame in frames.items():
                    likely += frame.get(tuple([parts[at] for at in positions]), ())
        text = f"{key}."
        for number, (regex, _, _), new in sorted(likely) if len(likely) > 1 else likely:
            if regex.fullmatch(text):
                return number, None if new is None else regex.sub(new, text)[:-1]
        return None


_MOST_RUNS = 32
"""How many runs of segments a name's own is compared with: where any may stand there, none is likely."""
MOST_KINDS = 1000
"""How many kinds of names (one: those that differ in numbers alone) of each side are compared for a rename."""


def likely_renames(sources: Iterable[str], targets: Iterable[str]) -> list[tuple[str, str]]:
    """Returns up to four (old, new) for `renamer` that would make most of the sources' names targets' names.

    One to three segments become others; numbers in them stay as they are, as ``{i}``. Likeliest first, a guess each.

    >>> likely_renames(["blk0.w", "blk1.w"], ["layer0.w", "layer1.w"])
    [('blk{i}', 'layer{i}')]
    """
    frames: dict[tuple[str, ...], list[str]] = {}
    for kind in _kinds(targets):
        for frame, run in _runs(kind):
            frames.setdefault(frame, []).append(run)
    votes: dict[tuple[str, str], int] = {}
    for kind, count in _kinds(sources).items():
        near = ((run, frames.get(frame, ())) for frame, run in _runs(kind))
        for pair in {(run, new) for run, others in near if len(others) <= _MOST_RUNS for new in others}:
            if pair[0] != pair[1] and pair[0].count("#") == pair[1].count("#") <= 4:
                votes[pair] = votes.get(pair, 0) + count
    ranked = sorted(votes, key=lambda pair: (-votes[pair], len(pair[0]) + len(pair[1])))
    return [(_numbered(old), _numbered(new)) for old, new in ranked[:4]]


def _kinds(names: Iterable[str]) -> dict[str, int]:
    """Returns {a name with # in place of numbers: how many names are like it}, of names without captures."""
    counts: dict[str, int] = {}
    for name in names:
        kind = re.sub(r"\d+", "#", name)
        counts[kind] = counts.get(kind, 0) + 1
    plain = (kind for kind in counts if not re.search(r"[*{}=]", kind) and kind.count(".") < 20)
    return {kind: counts[kind] for kind in islice(plain, MOST_KINDS)}


def _runs(kind: str) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yields (the segments before, "...", those after; the segments between) for each run of one to three segments."""
    parts = kind.split(".")
    for first in range(len(parts)):
        for end in range(first + 1, min(first + 3, len(parts)) + 1):
            yield (*parts[:first], "...", *parts[end:]), ".".join(parts[first:end])


def _numbered(text: str) -> str:
    names = iter("ijkl")
    return re.sub("#", lambda _: f"{{{next(names)}}}", text)
