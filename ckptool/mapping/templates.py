"""Many names as few patterns: numbers become captures, equal tails of old and new names become ``**``."""

from __future__ import annotations

import glob
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import translate
from typing import NamedTuple

from ckptool.ops.segments import REST

DEEPEST = 100
"""Names of more segments are not taken apart."""

_LETTERS = "ijklmn"
_NUMBER = re.compile(r"(\d+)")


class Template(NamedTuple):
    """Patterns, one for each name of a row, and the rows whose names they stand for."""

    names: tuple[str, ...]
    rows: list[int]


Frame = tuple[tuple[str, ...], ...]
"""The text between numbers, of each name of a row."""
Numbers = Sequence[tuple[list[str], ...]]
"""The numbers of each name, for every row."""
Link = tuple[int, int] | None
"""What a number of another name is: (the number of the first name it follows, what is added); None: always the same."""


def templates(rows: Sequence[Sequence[str]], old: int = 1) -> list[Template]:
    """Returns patterns for rows of names: the first ``old`` of a row are old names, the others what they become.

    Rows of one template differ in numbers alone, and those of the other names follow from those of the first name.
    All old names have the same captures. In order of the first row of each.
    """
    frames: dict[Frame, list[int]] = {}
    numbers: list[tuple[list[str], ...]] = []
    for row in rows:
        pieces = [_NUMBER.split(name) for name in row]
        frames.setdefault(tuple(tuple(piece[::2]) for piece in pieces), []).append(len(numbers))
        numbers.append(tuple(piece[1::2] for piece in pieces))
    solved = [
        (frame, found)
        for frame, members in frames.items()
        for found in _Frame([len(piece) - 1 for piece in frame], old).solved(numbers, members)
    ]
    known: dict[tuple[object, object], Counter[int]] = {}
    for frame, found in solved:
        for _, _, end, link in found.linked(frame):
            if link is not None:
                known.setdefault((frame[0][: link[0] + 1], end), Counter())[link[1]] += 1
    alike: dict[tuple[str, ...], list[tuple[Template, _Found, Frame]]] = {}
    for frame, found in solved:
        template = Template(found.named(frame, numbers, known), found.rows)
        alike.setdefault(template.names[:old], []).append((template, found, frame))
    made = []
    for group in alike.values():
        group.sort(key=lambda one: -len(one[1].rows))
        made.append(group[0][0])
        if len(group) > 1:  # one old pattern, several new ones: all but the first say for which numbers
            made += _told_apart([(found, frame) for _, found, frame in group], numbers)
    return sorted(made, key=lambda one: one.rows[0])


def _told_apart(group: Sequence[tuple[_Found, Frame]], numbers: Numbers) -> Iterator[Template]:
    """Yields templates for all but the first of a group, with one number spelled out that tells all apart, or all."""
    values = [
        [{*column} for column in zip(*(numbers[row][0] for row in found.rows), strict=True)] for found, _ in group
    ]
    apart = (
        at for at in range(len(values[0]))
        if sum(len(one[at]) for one in values) == len(set().union(*(one[at] for one in values)))
    )  # fmt: skip
    at = next(apart, None)
    for found, frame in group[1:]:
        parts: dict[object, list[int]] = {}
        for row in found.rows:
            parts.setdefault(row if at is None else numbers[row][0][at], []).append(row)
        for rows in parts.values():
            for one in _Frame(found.sizes, found.old).solved(numbers, rows):
                yield Template(one.named(frame, numbers, {}), one.rows)


class _Found(NamedTuple):
    """Rows of one frame, and for each number of the names after the first what it follows."""

    sizes: Sequence[int]
    old: int
    rows: list[int]
    links: list[list[Link]]

    def linked(self, frame: Frame) -> Iterator[tuple[int, int, tuple[str, ...], Link]]:
        """Yields for each number of the other names (which name, which number, the text up to it, its link)."""
        for which, links in enumerate(self.links):
            for at, link in enumerate(links):
                yield which, at, frame[which + 1][: at + 1], link

    def named(
        self, frame: Frame, numbers: Numbers, known: Mapping[tuple[object, object], Counter[int]]
    ) -> tuple[str, ...]:
        """Returns the patterns. A number that is always the same is a capture where it is one in the same place."""
        first = numbers[self.rows[0]]
        links = [list(column) for column in self.links]
        if self.old == 1:
            for which, at, end, link in self.linked(frame):
                own = first[which + 1][at]
                for base, text in enumerate(first[0]) if link is None else ():
                    shifts = known.get((frame[0][: base + 1], end))
                    if shifts and _plain(text) and _plain(own) and int(own) - int(text) in shifts:
                        links[which][at] = base, int(own) - int(text)
                        break
        captured = sorted({link[0] for column in links for link in column if link is not None})
        names = {number: _LETTERS[n] if n < len(_LETTERS) else f"n{n}" for n, number in enumerate(captured)}
        texts = [f"{{{names[at]}}}" if at in names else text for at, text in enumerate(first[0])]
        made = [_filled(frame[0], texts)]
        for which, column in enumerate(links):
            texts = []
            for at, link in enumerate(column):
                shift = f"{link[1]:+d}" if link is not None and link[1] else ""
                texts.append(first[which + 1][at] if link is None else f"{{{names[link[0]]}{shift}}}")
            made.append(_filled(frame[which + 1], texts))
        return tuple(made)


def _filled(pieces: Sequence[str], texts: Sequence[str]) -> str:
    return "".join(part for pair in zip(pieces, [*texts, ""], strict=True) for part in pair)


def _plain(text: str) -> bool:
    """Returns whether a number can be counted with, and written again as it was."""
    return text.isascii() and len(text) < 10 and (text[0] != "0" or text == "0")


class _Frame(NamedTuple):
    """Names that differ in numbers alone: how many numbers each has, and how many of them are old names."""

    sizes: Sequence[int]
    old: int

    def solved(self, numbers: Numbers, members: list[int]) -> list[_Found]:
        """Returns the members in groups for which one template stands."""
        columns = [[*zip(*(numbers[row][which] for row in members), strict=True)] for which in range(len(self.sizes))]
        base, others = columns[0], columns[1:]
        varied = [at for at, column in enumerate(base) if len(set(column)) > 1]
        links: list[list[Link]] = []
        for which, name in enumerate(others, 1):
            exact, own = which < self.old, list[Link]()
            for at, column in enumerate(name):
                if len(set(column)) == 1:
                    own.append(None)
                    continue
                link = next((one for one in _links(column, base, varied, at) if not (exact and one[1])), None)
                if link is None:
                    return self._parted(numbers, members, base, varied, column)
                own.append(link)
            links.append(own)
        used = {link[0] for own in links for link in own if link is not None}
        for own in links[: self.old - 1]:  # all old names have the same captures
            used &= {link[0] for link in own if link is not None}
        loose = [at for at in varied if at not in used]
        if loose:
            return self._parted(numbers, members, base, loose[:1], None)
        return [_Found(self.sizes, self.old, members, links)]

    def _parted(
        self,
        numbers: Numbers,
        members: list[int],
        base: Sequence[Sequence[str]],
        varied: Sequence[int],
        column: Sequence[str] | None,
    ) -> list[_Found]:
        """Returns the members in groups with less variety: by a number of the first name that ``column`` follows."""
        follows = (at for at in varied if column and len({*zip(base[at], column, strict=True)}) == len({*base[at]}))
        chosen = next(follows, None)
        groups: dict[object, list[int]] = {}
        if chosen is None and column is not None:
            return [one for row in members for one in self.solved(numbers, [row])]
        at = varied[0] if chosen is None else chosen
        shifts = {}
        if column is not None and all(map(_plain, (*base[at], *column))):
            shifts = {text: int(to) - int(text) for text, to in zip(base[at], column, strict=True)}
        common, count = Counter(shifts.values()).most_common(1)[0] if shifts else (0, 0)
        for row, text in zip(members, base[at], strict=True):
            alike = count > 2 and shifts.get(text) == common
            groups.setdefault("alike" if alike else (text,), []).append(row)
        return [one for group in groups.values() for one in self.solved(numbers, group)]


def _links(
    column: Sequence[str], base: Sequence[Sequence[str]], varied: Iterable[int], at: int
) -> list[tuple[int, int]]:
    """Returns what a column of numbers may follow: unshifted first, then what stands at the same place."""
    found = []
    for number in varied:
        if base[number] == column:
            found.append((number, 0))
        elif all(map(_plain, (*base[number], *column))):
            shifts = {int(to) - int(text) for text, to in zip(base[number], column, strict=True)}
            if len(shifts) == 1:
                found.append((number, shifts.pop()))
    return sorted(found, key=lambda link: (link[1] != 0, abs(link[0] - at)))


# --- lines of a table ---------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Node:
    """A segment of old names: what follows it, the new name of the old name that ends here, and votes.

    ``votes``: {what the path to here may become: how many names below would then have their new name}.
    """

    below: dict[str, _Node] = field(default_factory=dict)
    new: tuple[str, ...] | None = None
    votes: Counter[tuple[str, ...]] = field(default_factory=Counter)
    best: dict[tuple[str, ...] | None, tuple[int, tuple[str, ...] | None]] = field(default_factory=dict)


def lines(names: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Returns the fewest lines of a table that make old names new ones, special before general.

    A line ``a.**`` -> ``b.**`` stands for all names below ``a`` that no other line stands for. Names that stay as they
    are get no line, unless one that stands for others would change them.
    """
    root = _Node()
    for old, new in names:
        path, to = _segments(old), _segments(new)
        node = root
        trail = [root]
        for segment in path:
            node = node.below.setdefault(segment, _Node())
            trail.append(node)
        node.new = to
        for depth in range(len(path) - 1, -1, -1):
            tail = len(path) - depth
            if len(to) < tail or to[len(to) - tail] != path[depth]:
                break
            trail[depth].votes[to[: len(to) - tail]] += 1
    _cost(root, ())
    return list(_written(root, (), ()))


def _segments(name: str) -> tuple[str, ...]:
    parts = tuple(name.split("."))
    return parts if len(parts) <= DEEPEST else (name,)


def _cost(node: _Node, becomes: tuple[str, ...] | None) -> int:
    """Returns how many lines are needed at and below a node whose path ``becomes`` that without any."""
    own = int(node.new is not None and node.new != becomes)
    if not node.below:
        return own
    if becomes not in node.votes:
        becomes = None
    if becomes not in node.best:
        costs: list[tuple[int, tuple[str, ...] | None]] = [(_below(node, becomes), None)]
        likely = [(to, votes) for to, votes in node.votes.most_common(3) if votes > 1 and to != becomes]
        costs += [(1 + _below(node, to), to) for to, _ in likely]
        node.best[becomes] = min(costs, key=lambda cost: (cost[0], cost[1] is None))
    return own + node.best[becomes][0]


def _below(node: _Node, becomes: tuple[str, ...] | None) -> int:
    return sum(_cost(child, None if becomes is None else (*becomes, segment)) for segment, child in node.below.items())


def _written(node: _Node, path: tuple[str, ...], becomes: tuple[str, ...] | None) -> Iterator[tuple[str, str]]:
    if node.new is not None and node.new != becomes:
        yield ".".join(path), ".".join(node.new)
    if not node.below:
        return
    to = node.best[becomes if becomes in node.votes else None][1]
    after = becomes if to is None else to
    for captures in (False, True):
        for segment, child in node.below.items():
            if ("{" in segment) == captures:
                yield from _written(child, (*path, segment), None if after is None else (*after, segment))
    if to is not None:
        yield ".".join([*path, REST]), ".".join([*to, REST])


# --- patterns for some of many names -------------------------------------------------------------------------------


def covering(chosen: Collection[str], names: Iterable[str]) -> list[str]:
    """Returns few glob patterns that match the ``chosen`` of all ``names``, and no other."""
    wanted = set(chosen)
    others = [name for name in names if name not in wanted]
    if not others:
        return ["*"]
    frames = {name: _NUMBER.sub("#", name) for name in (*chosen, *others)}
    mixed = {frames[name] for name in chosen} & {frames[name] for name in others}
    taken = {form for frame in {frames[name] for name in others} for form in _forms(_loose(frame))}
    taken |= {form for name in others if frames[name] in mixed for form in _forms(spelled(name))}
    groups: dict[str, list[str]] = {}
    for name in chosen:
        text = spelled(name) if frames[name] in mixed else _loose(frames[name])
        groups.setdefault(text, []).append(name)
    offers: dict[str, list[str]] = {}
    for text, members in groups.items():
        for form in _forms(text) - taken:
            offers.setdefault(form, []).extend(members)
    left, found = dict.fromkeys(chosen), list[str]()
    for pattern, fitting in sorted(offers.items(), key=lambda item: (-len(item[1]), len(item[0]), item[0])):
        fresh = [name for name in fitting if name in left]
        if len(fresh) > 1 and not any(map(re.compile(translate(pattern)).match, others)):
            found.append(pattern)
            for name in fresh:
                del left[name]
    return _ranged([*found, *map(spelled, left)])


def spelled(name: str) -> str:
    """Returns the glob pattern that matches a name alone."""
    text = glob.escape(name)
    return f"[r]{text[1:]}" if text.startswith("re:") else text


def _loose(frame: str) -> str:
    return spelled(frame).replace("#", "*")


def _forms(text: str) -> set[str]:
    """Returns the patterns that may stand for a name, as a pattern, and others like it."""
    parts = text.split(".")
    made = {text}
    for at in range(1, min(len(parts), 12)):
        made.add(".".join([*parts[:at], "*"]))
        made.add(".".join(["*", *parts[-at:]]))
    return made


def _ranged(patterns: Sequence[str]) -> list[str]:
    """Returns patterns of which those that differ in one number alone are one regular expression."""
    groups: dict[tuple[int, tuple[str | None, ...]], list[str]] = {}
    for pattern in patterns:
        pieces = _NUMBER.split(pattern)
        for at in range(1, len(pieces), 2):
            groups.setdefault((at, (*pieces[:at], None, *pieces[at + 1 :])), []).append(pattern)
    made: dict[str, str] = {}
    for (at, _), group in sorted(groups.items(), key=lambda item: -len(item[1])):
        rest = [pattern for pattern in group if pattern not in made]
        if len(rest) > 1:
            numbers = [_NUMBER.split(pattern)[at] for pattern in rest]
            pieces = _NUMBER.split(rest[0])
            head, tail = ("".join(part) for part in (pieces[:at], pieces[at + 1 :]))
            text = f"re:^{_as_regex(head)}({'|'.join(numbers)}){_as_regex(tail)}$".removesuffix(".*$")
            made.update(dict.fromkeys(rest, text))
    return list(dict.fromkeys(made.get(pattern, pattern) for pattern in patterns))


def _as_regex(text: str) -> str:
    return translate(text).removeprefix("(?s:").removesuffix(r")\Z")
