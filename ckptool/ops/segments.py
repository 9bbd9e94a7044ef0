"""Names by whole segments: patterns with ``{i}`` and ``*``, what these capture, and tables of names."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from ckptool.errors import UsageError
from ckptool.ops.steps import Step

Pattern = list[re.Pattern[str]]
"""The regular expression of each segment."""

_Line = tuple[int, Pattern, tuple[re.Pattern[str], str] | None]
"""A line of a table: its number, its pattern, and what `_simple` makes of it."""

_CAPTURE = r"\*|\{\w+\}"


def renamer(old: str, new: str) -> Callable[[str], str]:
    """Returns the function from a key to its name with every run of whole segments that fits ``old`` made ``new``."""
    literal = max(_compiled(old)[1], key=len)
    simple = _simple(old, new)
    if simple is None:
        return lambda key: _by_segments(old, new, key) if literal in key else key
    substitute, template = simple[0].sub, simple[1]
    return lambda key: substitute(template, key) if literal in key else key


class Table:
    """A table of old to new names, each key looked up once: names may be swapped, and no line sees what another made.

    ``{}``, ``{name}`` and ``*`` stand for one segment, or part of one; None for a new name drops the key. A name
    spelled out goes before a pattern, and of patterns the first that fits. Lines cost nothing per key: patterns are
    found by the segments that they spell out. Raises: UsageError for what is no such table.
    """

    def __init__(self, lines: Mapping[Any, Any]) -> None:
        self.texts: list[str] = []
        self._old: list[str] = []
        self._new: list[str | None] = []
        self._exact: dict[str, int] = {}
        # number of segments -> positions of those spelled out -> these segments -> lines
        self._frames: dict[int, dict[tuple[int, ...], dict[tuple[str, ...], list[_Line]]]] = {}
        for old, new in lines.items():
            self._add(old, new)

    def _add(self, old: Any, new: Any) -> None:
        if not isinstance(old, str) or not old or not (new is None or isinstance(new, str)):
            raise UsageError(f"the table maps {old!r} to {new!r}, which is no name")
        number = len(self.texts)
        self.texts.append(f"drop {old}" if new is None else f"rename {old} -> {new}")
        self._old.append(old.replace("{}", "*"))
        self._new.append(new and new.replace("{}", "*"))
        _refuse_unknown(self._old[-1], self._new[-1] or "")
        parts = self._old[-1].split(".")
        places = tuple(at for at, part in enumerate(parts) if not re.search(_CAPTURE, part))
        if len(places) == len(parts):
            self._exact[self._old[-1]] = number
        else:
            frame = self._frames.setdefault(len(parts), {}).setdefault(places, {})
            line = number, compiled(self._old[-1]), _simple(self._old[-1], self._new[-1] or "")
            frame.setdefault(tuple(parts[at] for at in places), []).append(line)

    def plan(self, keys: Iterable[str]) -> tuple[list[Step], list[str]]:
        """Returns (the steps for these keys, the lines that fit none of them)."""
        used: set[int] = set()
        gone, old, new = [], [], []
        for key in keys:
            number, made = self._look_up(key)
            if number is None:
                continue
            used.add(number)
            if made is None:
                gone.append(key)
            elif made != key:
                old.append(key)
                new.append(made)
        steps = [Step("drop", tuple(gone))] if gone else []
        steps += [Step("rename", tuple(old), tuple(new))] if old else []
        return steps, [text for number, text in enumerate(self.texts) if number not in used]

    def _look_up(self, key: str) -> tuple[int | None, str | None]:
        """Returns (the line that a key fits, what it makes of the key); (None, None) if it fits none."""
        exact = self._exact.get(key)
        if exact is not None:
            return exact, self._new[exact]
        if not self._frames:
            return None, None
        parts = key.split(".")
        likely: list[_Line] = []
        for places, frame in self._frames.get(len(parts), {}).items():
            likely += frame.get(tuple([parts[at] for at in places]), ())
        for number, pattern, simple in sorted(likely, key=lambda line: line[0]) if len(likely) > 1 else likely:
            new = self._new[number]
            if simple is not None and new is not None:
                if simple[0].fullmatch(key):
                    return number, simple[0].sub(simple[1], key)
                continue
            found = captured(pattern, parts)
            if found is not None:
                return number, None if new is None else filled(new, *found)
        return None, None


def _refuse_unknown(old: str, new: str) -> None:
    """Raises UsageError for a new name that has captures which the old one has not."""
    have = re.findall(_CAPTURE, old)
    filled(new, ["x"] * have.count("*"), {name[1:-1]: "x" for name in have if name != "*"})


@lru_cache(maxsize=512)
def _simple(old: str, new: str) -> tuple[re.Pattern[str], str] | None:
    """Returns (regular expression, replacement) that do what `_by_segments` does; None where none does.

    That is where a segment could be captured in more than one way, or a run of segments is taken out.
    """
    segments = old.split(".")
    captures = [re.findall(_CAPTURE, segment) for segment in segments]
    found = [capture for some in captures for capture in some]
    named = [capture for capture in found if capture != "*"]
    if not new or max(map(len, captures)) > 1 or len(set(named)) < len(named):
        return None
    numbers = {capture: number for number, capture in enumerate(found, 1) if capture != "*"}
    stars = [number for number, capture in enumerate(found, 1) if capture == "*"]
    wanted = re.findall(_CAPTURE, new)
    if wanted.count("*") > len(stars) or any(name not in numbers for name in wanted if name != "*"):
        return None  # `filled` says what is wrong, where a key fits
    upcoming = iter(stars)
    template = re.sub(
        _CAPTURE,
        lambda match: f"\\g<{next(upcoming) if match[0] == '*' else numbers[match[0]]}>",
        new.replace("\\", "\\\\"),
    )
    regex = r"\.".join(_segment(segment).pattern for segment in segments)
    return re.compile(rf"(?<![^.]){regex}(?![^.])"), template


def _by_segments(old: str, new: str, key: str) -> str:
    """Returns a key with every run of whole segments that fits ``old`` replaced by ``new``."""
    pattern, literals = _compiled(old)
    if not all(part in key for part in literals):
        return key
    segments = key.split(".")
    made: list[str] = []
    position = 0
    while position < len(segments):
        found = captured(pattern, segments[position : position + len(pattern)])
        if found is None:
            made.append(segments[position])
            position += 1
        else:
            text = filled(new, *found)
            made += text.split(".") if text else []
            position += len(pattern)
    return ".".join(made)


def compiled(text: str) -> Pattern:
    """Returns the pattern of each segment. Raises: UsageError for a name twice in one segment."""
    return [_segment(part) for part in text.split(".")]


@lru_cache(maxsize=512)
def _compiled(text: str) -> tuple[Pattern, list[str]]:
    """Returns (the pattern of each segment, texts that a key must contain to fit at all)."""
    return compiled(text), re.split(rf"{_CAPTURE}|\.", text)


def _segment(text: str) -> re.Pattern[str]:
    """Returns the pattern of one segment, in which ``*`` and ``{name}`` each capture one or more characters."""
    pieces = re.split(rf"({_CAPTURE})", text)
    regex = "".join(
        "([^.]+)" if piece == "*" else f"(?P<_{piece[1:-1]}>[^.]+)" if piece.startswith("{") else re.escape(piece)
        for piece in pieces
    )
    try:
        return re.compile(regex)
    except re.error as error:
        raise UsageError(f"{text!r}: {error}") from error


def captured(pattern: Pattern, segments: Sequence[str]) -> tuple[list[str], dict[str, str]] | None:
    """Returns (what each ``*`` stands for, what each name stands for), or None if the segments do not fit."""
    if len(segments) < len(pattern):
        return None
    stars: list[str] = []
    named: dict[str, str] = {}
    for one, segment in zip(pattern, segments, strict=True):
        match = one.fullmatch(segment)
        if match is None:
            return None
        positions = set(one.groupindex.values())
        stars += [text for number, text in enumerate(match.groups(), 1) if number not in positions]
        for name, text in match.groupdict().items():
            if named.setdefault(name[1:], text) != text:
                return None
    return stars, named


def filled(template: str, stars: Sequence[str], named: Mapping[str, str]) -> str:
    """Returns a name with what was captured in place of its ``*`` and ``{name}``. Raises: UsageError for others."""
    left = list(stars)

    def fill(match: re.Match[str]) -> str:
        if match[0] == "*":
            if not left:
                raise UsageError(f"{template!r} has more * than what it renames")
            return left.pop(0)
        if match[0][1:-1] not in named:
            raise UsageError(f"{template!r} has {match[0]}, which what it renames has not")
        return named[match[0][1:-1]]

    return re.sub(_CAPTURE, fill, template)
