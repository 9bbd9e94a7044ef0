"""The tree of modules that `ckptool inspect --tree` prints: alike modules as one line, with sums and bars."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from heapq import nlargest
from itertools import accumulate
from math import prod
from typing import NamedTuple

from ckptool.cli import render
from ckptool.cli.terminal import tables
from ckptool.core import keys
from ckptool.ops.inspect import Node, TensorRow, tree_of
from ckptool.text import count, percent, size

LONG = 40
"""Most lines of a tree on a terminal, unless --depth is given."""
BAR = 30
"""Most columns of a bar: those of all bytes."""
LEAST_BAR, LEAST_NAME = 6, 20
"""Columns below which neither is made narrower: the parameters go first, then the share, which the bar shows."""


class Step(NamedTuple):
    """What is one segment of a line: modules of one structure, or alike tensors, of all modules above it."""

    name: str
    times: int
    nodes: Sequence[Node]


class Line(NamedTuple):
    """A line of the tree: steps that have nothing beside them. The first is ``level`` levels below what all share."""

    steps: Sequence[Step]
    level: int
    indent: int

    def total(self, field: str) -> int:
        """Returns the sum of a field of `Node`; it is the same for every step."""
        return sum(getattr(node, field) for node in self.steps[0].nodes)


class Tree:
    """The lines of a tree without that of the top; ``sort``: key, numel or nbytes, else they are in the model's order.

    ``prefix`` is what all keys begin with, ``top`` the module of that name.
    """

    def __init__(self, rows: Sequence[TensorRow], sort: str | None) -> None:
        self.prefix, self.top = "", tree_of(rows)
        self._sort, self._folds = sort, render.folds(piped=True)
        self._rows = {row.key: row for row in rows}
        self._first = {row.tied_to or row.key: row.key for row in reversed(rows)}
        self._kinds: dict[object, int] = {}
        self._kind_of: dict[int, int] = {}
        self._number(self.top)
        while len(self.top.below) == 1 and next(iter(self.top.below.values())).key is None:
            [(name, self.top)] = self.top.below.items()
            self.prefix += name
        self.lines = [*self._lines(self._steps([self.top]), 1, 1)]

    def tie(self, line: Line) -> str:
        """Returns what the bytes of a line are counted with, if all of its tensors are tied to others above."""
        if line.total("nbytes"):
            return ""
        origins = {found for node in line.steps[-1].nodes for found in self._origins(node, "")}
        return "" if None in origins else f"= {origins.pop()}" if len(origins) == 1 else "tied"

    def _origins(self, node: Node, rest: str) -> Iterator[str | None]:
        """Yields for each tensor the key it is counted with, None for itself, without the ``rest`` both have."""
        if node.key is not None:
            first = self._counted_with(node.key)
            yield None if first == node.key else (first.removesuffix(rest).rstrip("./") or first)
        for name, one in node.below.items():
            yield from self._origins(one, rest + name)

    def _counted_with(self, key: str) -> str:
        return self._first[self._rows[key].tied_to or key]

    def _number(self, node: Node) -> int:
        """Returns a number that nodes of one structure share: of names, shapes and dtypes, and what is tied."""
        kind: object = frozenset((name, self._number(one)) for name, one in node.below.items())
        if node.key is not None:
            row = self._rows[node.key]
            kind = (tuple(row.shape or ()), row.dtype, row.kind, row.nbytes, self._counted_with(row.key) == row.key)
        self._kind_of[id(node)] = self._kinds.setdefault(kind, len(self._kinds))
        return self._kind_of[id(node)]

    def _steps(self, nodes: Sequence[Node]) -> list[Step]:
        """Returns what is directly below modules of one structure; what differs in its numbers only is one step."""
        below = nodes[0].below
        names = [*below]
        rows = [(name, self._kind_of[id(below[name])]) for name in names]
        groups = (
            keys.numbered(rows) if self._folds and len(names) > 1 else [(name, [at]) for at, name in enumerate(names)]
        )
        return [
            Step(name, len(members), [node.below[names[at]] for node in nodes for at in members])
            for name, members in groups
        ]

    def _lines(self, steps: Sequence[Step], level: int, indent: int) -> Iterator[Line]:
        """Yields a line for each step, each with the lines below it."""
        for step in self._sorted(steps):
            joined, below = [step], self._steps(step.nodes)
            while len(below) == 1 and below[0].nodes[0].key is None:
                joined += below
                below = self._steps(joined[-1].nodes)
            yield Line(joined, level, indent)
            if any(one.nodes[0].key is None for one in below):  # tensors alone are their module's line
                yield from self._lines(below, level + len(joined), indent + 1)

    def _sorted(self, steps: Sequence[Step]) -> Sequence[Step]:
        if self._sort == "key":
            return sorted(steps, key=lambda step: keys.natural(step.name))
        field = {"numel": "parameters", "nbytes": "nbytes"}.get(self._sort or "")
        return sorted(steps, key=lambda step: -Line([step], 0, 0).total(field)) if field else steps


def lines(rows: Sequence[TensorRow], sort: str | None, depth: int | None) -> list[str]:
    """Returns the tree of these tensors, if any; without a ``depth``, on a terminal as much as `LONG` lines show.

    A line has its parameters, bytes, share of all bytes, and a bar of that. Sums are of each tie group once.
    """
    if not rows:
        return []
    tree = Tree(rows, sort)
    found = Counter(line.level for line in tree.lines)
    lengths = dict(zip(sorted(found), accumulate(found[level] for level in sorted(found)), strict=True))
    whole = tables.columns() is None or len(tree.lines) <= LONG
    cut = depth or (None if whole else max((level for level, number in lengths.items() if number <= LONG), default=1))
    shown = [line for line in tree.lines if cut is None or line.level <= cut]
    room = len(shown) if whole or depth else LONG
    if len(shown) > room:
        largest = nlargest(room - 1, range(len(shown)), lambda at: shown[at].total("nbytes"))
        rest = [node for at in {*range(len(shown))} - {*largest} for node in shown[at].steps[0].nodes]
        more = Line([Step(f"and {len(shown) - len(largest):,} more", 1, rest)], 1, 1)
        shown = [*(shown[at] for at in sorted(largest)), more]
    top = Line([Step(tree.prefix or "all", 1, [tree.top])], 0, 0)
    made = _table([(_name(line, cut), line, tree.tie(line)) for line in (top, *shown)], top.total("nbytes"))
    longer = [] if whole or depth else [pair for pair in lengths.items() if pair[1] > room][:1]
    return made + [line for one in longer for line in render.aligned([["hint", f"--depth {one[0]}: {one[1]:,} lines"]])]


def _name(line: Line, cut: int | None) -> str:
    """Returns the first cell of a line: the segments down to the last level that is shown, and how many there are."""
    steps = line.steps if cut is None else line.steps[: max(cut - line.level, 0) + 1]
    text = "".join(step.name for step in steps)
    times = prod(step.times for step in steps)
    bare = text[:-1] if line.level and text[-1:] in (".", "/") else text
    margin = min(2 * line.indent, (tables.columns() or 1200) // 3)
    return " " * margin + (render.safe(bare) or "''") + (f" x {times:,}" if times > 1 else "")


def _table(entries: Sequence[tuple[str, Line, str]], nbytes: int) -> list[str]:
    """Returns the lines of a table: names, numbers below their headings, and a bar or what a line is tied to."""
    shares = [line.total("nbytes") / nbytes if nbytes else 0.0 for _, line, _ in entries]
    cells = {
        "params": [count(line.total("parameters")) for _, line, _ in entries],
        "bytes": [size(line.total("nbytes")) for _, line, _ in entries],
        "share": [*map(percent, shares)],
    }
    widths = {head: max(map(len, [head, *column])) for head, column in cells.items()}
    names, bar, limit = [name for name, _, _ in entries], BAR, tables.columns()
    if limit is not None:
        widest = max(map(tables.width, names))
        for head in ("params", "share", ""):
            room = limit - 4 - sum(widths.values()) - 2 * len(widths)
            if head and room - LEAST_BAR < min(widest, LEAST_NAME):
                del widths[head]
        bar = min(max(room - widest, LEAST_BAR, limit // 8), BAR)
        names = [_elided(name, max(room - bar, tables.LEAST)) for name in names]
    ends = [
        tie if tie and limit is None else tables.elided(tie, bar) if tie else _bar(share, bar)
        for share, (_, _, tie) in zip(shares, entries, strict=True)
    ]
    heads = [head.rjust(wide) for head, wide in widths.items()]
    numbers = [[cell.rjust(wide) for cell in cells[head]] for head, wide in widths.items()]
    return render.aligned([["", *heads, ""], *zip(names, *numbers, ends, strict=True)], keys=True)


def _elided(name: str, room: int) -> str:
    """Returns the name of a line in ``room`` columns, its indentation kept."""
    bare = name.lstrip(" ")
    margin = len(name) - len(bare)
    return " " * margin + tables.elided(bare, max(room - margin, LEAST_BAR))


def _bar(share: float, width: int) -> str:
    """Returns a bar of ``width`` columns or fewer, in eighths of one where stdout has such characters."""
    if not tables.draws():
        return "#" * max(round(width * share), share > 0)
    full, eighths = divmod(max(round(8 * width * share), share > 0), 8)
    return "█" * full + " ▏▎▍▌▋▊▉"[eighths].strip()
