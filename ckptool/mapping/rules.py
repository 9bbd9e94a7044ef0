"""Writes a mapping as few rules that a person can read, which give exactly this mapping when they are applied."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ckptool.core.keys import is_empty
from ckptool.errors import UsageError, listed
from ckptool.mapping import chains as parsing
from ckptool.mapping.chains import CUTS, Chain, Op, histories
from ckptool.mapping.pairs import Entry, Pair
from ckptool.mapping.templates import covering, lines, spelled, templates
from ckptool.ops.rules import Rules
from ckptool.ops.steps import Shape

Rule = dict[str, Any]


def rules_of(pairs: Sequence[Pair], source: Sequence[Entry], target: Sequence[Entry]) -> list[Rule]:
    """Returns rules, as `Rules.parse` takes them, that make exactly the tensors of the pairs from the source's.

    What no pair uses is dropped. Numbers that count alike are captures, modules that move as a whole one line; where
    that would give another mapping, names are spelled out. Raises: UsageError for pairs that no rules can express.
    """
    shapes = {entry.key: entry.shape for entry in source}
    wanted = {entry.key: entry.shape for entry in target}
    chains = {pair.target: parsing.chain(pair, shapes, wanted[pair.target]) for pair in pairs}
    for prefix, compact in (("", True), (_unused(shapes), True), (_unused(shapes), False)):
        rules = _Writer(chains, shapes, prefix, compact).rules()
        wrong = _wrong(rules, chains, shapes)
        if wrong and compact:
            rules = _Writer(chains, shapes, prefix, compact, wrong).rules()
            wrong = _wrong(rules, chains, shapes)
        if not wrong:
            return rules
    raise _Inexpressible(wrong)


def expressed(pairs: Sequence[Pair], source: Sequence[Entry], target: Sequence[Entry]) -> tuple[list[Rule], list[Pair]]:
    """Returns (rules as of `rules_of`, the pairs that no rules can express, which these leave out)."""
    left: list[Pair] = []
    while True:
        try:
            return rules_of(pairs, source, target), left
        except _Inexpressible as error:
            if not pairs:
                raise
            wrong = [pair for pair in pairs if pair.target in error.keys] or pairs
            left += wrong
            gone = {pair.target for pair in wrong}
            pairs = [pair for pair in pairs if pair.target not in gone]


class _Inexpressible(UsageError):
    def __init__(self, wrong: Sequence[str]) -> None:
        super().__init__(f"no rules give exactly {listed(wrong)}")
        self.keys = frozenset(wrong)


def _unused(shapes: Mapping[str, Shape]) -> str:
    """Returns a prefix that no key has anywhere."""
    prefix = "source."
    while any(prefix in key for key in shapes):
        prefix = f"_{prefix}"
    return prefix


def _wrong(rules: list[Rule], chains: Mapping[str, Chain], shapes: Mapping[str, Shape]) -> list[str]:
    """Returns the keys of the target that rules do not make as their chains say, and other keys that they leave."""
    try:
        plan = Rules.parse(rules).plan(dict(shapes))
    except UsageError:  # ``{i+1}`` where an odd key has no number: which one is not said
        return list(chains)
    if plan.errors or plan.unused:
        return [*plan.errors, *plan.unused]
    found = histories(plan.batches, shapes)
    wrong = [key for key, one in chains.items() if found.get(key) != one.history()]
    return wrong + [key for key in plan.after if key not in chains]


@dataclass(slots=True)
class _Use:
    """A source, or a copy of it, by its name in the rules; what is done to it, and the pieces that it is cut into.

    ``cut``: the operation without the numbers of the piece; none is empty. ``size``: of the dimension that is cut.
    ``pieces``: {the numbers of a piece: its name}.
    """

    name: str
    before: tuple[Op, ...]
    cut: Op
    size: int = 0
    pieces: dict[Any, str] = field(default_factory=dict)


class _Writer:
    """Rules for chains. ``prefix`` is put before all sources first; ``compact``: whether patterns stand for many keys.

    ``exact``: keys of the target that patterns got wrong.
    """

    def __init__(
        self,
        chains: Mapping[str, Chain],
        shapes: Mapping[str, Shape],
        prefix: str,
        compact: bool,
        exact: Iterable[str] = (),
    ) -> None:
        self.shapes, self.prefix, self.compact = shapes, prefix, compact
        self.exact = {key for target in exact if target in chains for key in chains[target].sources}
        self.made: list[Rule] = []
        self.uses: dict[str, list[_Use]] = {}
        self.renames: dict[str, str] = {}
        self.posts: dict[str, tuple[Op, ...]] = {}
        self.afters: dict[str, tuple[Op, ...]] = {}
        self.joins: list[tuple[Op, list[str], str]] = []
        self.copies: list[tuple[str, str]] = []
        self.marks = _marks([*shapes, *chains])
        self.slashes = any("/" in key for key in shapes)
        self.slashes &= not any("." in key or is_empty(key.replace("/", ".")) for key in shapes)
        first: dict[Chain, str] = {}
        for key, chain in chains.items():
            name = self._safe(key)
            if chain in first:
                self.copies.append((first[chain], name))
            else:
                first[chain] = name
                self._follow(chain, name)
        self.unmarked = {mark: letter for letter, mark in self.marks.items() if any(letter in key for key in chains)}

    # --- what becomes what ----------------------------------------------------------------------------------------

    def _safe(self, key: str) -> str:
        """Returns a key without the characters that mean something in a pattern."""
        for letter, mark in self.marks.items():
            key = key.replace(letter, mark)
        return key

    def _named(self, source: str) -> str:
        """Returns the name of a source after the first rules."""
        name = self._safe(self.prefix + source)
        return name.replace("/", ".") if self.slashes else name

    def _follow(self, chain: Chain, target: str) -> None:
        """Notes what a chain does, to make ``target``."""
        inputs = []
        for source, ops in zip(chain.sources, chain.parts, strict=True):
            cuts = [at for at, op in enumerate(ops) if op[0] in CUTS]
            if len(cuts) > 1:
                raise _Inexpressible([target])  # none cut twice
            if not cuts:
                use = self._use(source, ops, (), ())
                inputs.append(use.name)
                if chain.join is None:
                    self.renames[use.name] = target
                continue
            cut = ops[cuts[0]]
            family, piece = (cut[:2], cut[2:]) if cut[0] == "slice" else (cut[:-1], cut[-1:])
            use = self._use(source, ops[: cuts[0]], family, piece)
            use.size = parsing.after(ops[: cuts[0]], self.shapes[source])[family[1]]
            name = f"{use.name}.{piece[0]}" if chain.join else target
            use.pieces[piece] = name
            inputs.append(name)
            if rest := ops[cuts[0] + 1 :]:
                self.posts[name] = rest
        if chain.join is not None:
            self.joins.append((chain.join, inputs, target))
            self.afters[target] = chain.after

    def _use(self, source: str, before: tuple[Op, ...], cut: Op, piece: tuple[int, ...]) -> _Use:
        """Returns a use of a source that has not this piece yet; a new one is of a copy, if there are others."""
        uses = self.uses.setdefault(source, [])
        for use in uses:
            if cut and (use.before, use.cut) == (before, cut) and not _overlap(piece, use.pieces):
                return use
        name = self._named(source)
        uses.append(_Use(f"{name}.copy{len(uses)}" if uses else name, before, cut))
        return uses[-1]

    # --- the rules, in their order ---------------------------------------------------------------------------------

    def rules(self) -> list[Rule]:
        """Returns the rules."""
        every = {source: self._named(source) for source in self.shapes}
        if any(source != name for source, name in every.items()):  # what is left of such names would be no name
            nameless = {source: None for source in every if is_empty(source) and source not in self.uses}
            self.made += [{"drop": [*map(spelled, nameless)]}] if nameless else []
            every = {source: name for source, name in every.items() if source not in nameless}
        if self.prefix:
            self.made.append({"add_prefix": self.prefix})
        for letter, mark in self.marks.items():
            if any(letter in key for key in every):
                self.made.append({"sub": re.escape(letter), "by": mark})
        if self.slashes:
            self.made.append({"sub": "/", "by": "."})
        uses = [use for group in self.uses.values() for use in group]
        self._copied([(every[source], use.name) for source, group in self.uses.items() for use in group[1:]])
        self.now = [*every.values(), *(use.name for group in self.uses.values() for use in group[1:])]
        self._dropped([name for source, name in every.items() if source not in self.uses])
        self._changed({use.name: use.before for use in uses})
        self._renamed({use.name: self.renames.get(use.name, use.name) for use in uses})
        self._cut([use for use in uses if use.cut])
        self._changed(self.posts)
        self._joined()
        self._copied(self.copies)
        self.made += [{"sub": re.escape(mark), "by": letter} for mark, letter in self.unmarked.items()]
        return self.made

    def _patterns(self, chosen: Sequence[str]) -> list[str]:
        return covering(chosen, self.now) if self.compact else list(map(spelled, chosen))

    def _dropped(self, names: Sequence[str]) -> None:
        patterns = self._patterns(names) if names else []
        self.made += [{"drop": patterns if len(patterns) > 1 else patterns[0]}] if patterns else []
        gone = set(names)
        self.now = [name for name in self.now if name not in gone]

    def _copied(self, rows: Sequence[tuple[str, str]]) -> None:
        for old, new in self._templates(rows):
            self.made.append({"copy": old, "to": new})

    def _templates(self, rows: Sequence[Sequence[str]], old: int = 1) -> list[tuple[str, ...]]:
        return [one.names for one in templates(rows, old)] if self.compact else [tuple(row) for row in rows]

    def _changed(self, todo: Mapping[str, tuple[Op, ...]]) -> None:
        """Adds the rules that reorder dimensions, or reshape: the first of each name, then the second, and so on."""
        for turn in range(max(map(len, todo.values()), default=0)):
            orders: dict[tuple[int, ...], list[str]] = {}
            shapes: dict[str, Shape] = {}
            for name, ops in todo.items():
                if turn < len(ops) and ops[turn][0] == "permute":
                    orders.setdefault(ops[turn][1], []).append(name)
                elif turn < len(ops):
                    shapes[name] = ops[turn][1]
            for order, chosen in orders.items():
                rule = {"dims": list(order)} if order != (1, 0) else {}
                kind = "permute" if rule else "transpose"
                self.made += [{kind: pattern, **rule} for pattern in self._patterns(chosen)]
            for form, chosen in _forms(shapes):
                self.made += [{"reshape": pattern, "shape": form} for pattern in self._patterns(chosen)]

    def _renamed(self, renames: Mapping[str, str]) -> None:
        """Adds the table of names; names that are no key of it stay as they are."""
        exact = {self._named(source) for source in self.exact}
        rows = [(old, new) for old, new in renames.items() if old not in exact]
        table = {old: renames[old] for old in renames if old in exact}
        table |= dict(lines((old, new) for old, new in self._templates(rows)))
        if table:
            self.made.append({"table": table})
        self.now = [renames[name] for name in self.now]

    def _cut(self, uses: Sequence[_Use]) -> None:
        """Adds the rules that cut; pieces that are not used are dropped."""
        groups: dict[tuple[Any, ...], list[tuple[str, ...]]] = {}
        unused = []
        for use in uses:
            dim, rest = use.cut[1], use.cut[2:3]  # the heads of a chunk
            wanted: list[Any] = [(part,) for part in range(use.cut[3])] if rest else _gapless(use)
            names = [use.pieces.get(piece, f"{use.name}.unused{n}") for n, piece in enumerate(wanted)]
            unused += [name for piece, name in zip(wanted, names, strict=True) if piece not in use.pieces]
            sizes = () if rest else tuple(end - begin for begin, end in wanted)
            key = (use.cut[0], dim, sizes if len({*sizes}) > 1 else (), rest, len(names))
            groups.setdefault(key, []).append((use.name, *names))
        for (kind, dim, sizes, rest, _), rows in groups.items():
            more = {**({"dim": dim} if dim else {}), **({"sizes": list(sizes)} if sizes else {})}
            more |= {"heads": rest[0]} if rest else {}
            for old, *new in self._starred(self._templates(rows)):
                self.made.append({"split" if kind == "slice" else "chunk": old, "into": new, **more})
        gone = {use.name for use in uses}
        self.now = [name for name in self.now if name not in gone]
        self.now += [name for rows in groups.values() for _, *names in rows for name in names]
        self._dropped(unused)

    def _joined(self) -> None:
        """Adds the rules that put tensors together, and those that change what came of it."""
        groups: dict[Op, list[tuple[str, ...]]] = {}
        for join, inputs, target in self.joins:
            groups.setdefault((*join, len(inputs)), []).append((*inputs, target))
        for (kind, dim, *heads, count), rows in groups.items():
            more = {**({"dim": dim} if dim else {}), **({"heads": heads[0]} if heads else {})}
            for names in self._starred(self._templates(rows, count)):
                self.made.append({kind: list(names[:count]), "into": names[count], **more})
        gone = {name for _, inputs, _ in self.joins for name in inputs}
        self.now = [name for name in self.now if name not in gone] + [target for _, _, target in self.joins]
        self._changed(self.afters)

    def _starred(self, rows: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
        """Returns rows of patterns in which a last segment is ``*`` where rows differ in that alone."""
        groups: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
        for row in rows:
            parts = [name.rpartition(".") for name in row]
            same = self.compact and len({last for _, _, last in parts}) == 1 and all(dot for _, dot, _ in parts)
            groups.setdefault(tuple(head for head, _, _ in parts) if same else row, []).append(row)
        made: list[tuple[str, ...]] = []
        for heads, group in groups.items():
            made += [tuple(f"{head}.*" for head in heads)] if len(group) > 1 else group
        return made


def _marks(keys: Sequence[str]) -> dict[str, str]:
    """Returns {a character of keys that means something in a pattern: what no key has, and stands for it}."""
    used = [letter for letter in "*{}" if any(letter in key for key in keys)]
    sign = "%"
    while used and any(sign in key for key in keys):
        sign += "%"
    return {letter: f"{sign}{ord(letter):x}" for letter in used}


def _overlap(piece: tuple[int, ...], pieces: Iterable[Any]) -> bool:
    if len(piece) == 1:
        return piece in pieces
    return any(piece[0] < end and begin < piece[1] for begin, end in pieces)


def _gapless(use: _Use) -> list[Any]:
    """Returns the pieces of a use, and those between them, which nothing needs."""
    made: list[tuple[int, int]] = []
    end = 0
    for begin, after in sorted(use.pieces):
        made += [(end, begin)] if begin > end else []
        made.append((begin, after))
        end = after
    return [*made, (end, use.size)] if use.size > end else made


def _forms(shapes: Mapping[str, Shape]) -> Iterator[tuple[list[int], list[str]]]:
    """Yields (a shape in which one size may be -1, the names that get theirs by it)."""
    left = dict(shapes)
    while left:
        votes: Counter[tuple[int, ...]] = Counter()
        for shape in left.values():
            votes.update([shape, *_opened(shape)])
        form = max(votes, key=lambda one: (votes[one], -one.count(-1), len(one)))
        chosen = [name for name, shape in left.items() if form in (shape, *_opened(shape))]
        for name in chosen:
            del left[name]
        yield list(form), chosen


def _opened(shape: Shape) -> list[tuple[int, ...]]:
    """Returns a shape with -1 in place of each size, where the others say which it is."""
    return [(*shape[:at], -1, *shape[at + 1 :]) for at in range(len(shape)) if 0 not in shape]


def rules_text(rules: Iterable[Rule], *comments: str) -> str:
    """Returns rules as a TOML file that ``--rules`` reads, below comments.

    Raises: UsageError for names that are no Unicode, which TOML cannot hold.
    """
    lines = [f"# {comment}" for comment in comments]
    for rule in rules:
        lines += ["", "[[rules]]"]
        for name, value in rule.items():
            if isinstance(value, dict):
                lines += ["[rules.table]", *(f"{_quoted(old)} = {_quoted(new)}" for old, new in value.items())]
            else:
                lines.append(f"{name} = {_value(value)}")
    return "\n".join([*lines, ""])


def _value(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_value, value))}]"
    return _quoted(value) if isinstance(value, str) else str(value)


def _quoted(text: str) -> str:
    if "\\" in text and text.isprintable() and "'" not in text:
        return f"'{text}'"
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise UsageError(f"{text!r} is no Unicode, which a TOML file is: name a .json file")
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
