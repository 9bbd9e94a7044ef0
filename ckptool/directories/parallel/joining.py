"""The ranks of tensor and pipeline parallelism: listed, and joined to one checkpoint by rules.

A rules file is TOML. The last pattern that fits a key says how the pieces of its tensor are joined:

    base = "gpt"                       rules to begin with: a set that ships with ckptool
    layers = ["decoder.layers.{i}"]    where layers are numbered: each pipeline stage begins at 0
    stage_layers = [2, 2]              how many each stage has; by default they are counted
    vocab_size = 50257                 rows that "vocab cat" keeps: those behind them are padding

    [join]
    "decoder.layers.{i}.mlp.linear_fc2.weight" = "cat 1"

A pattern with ``{i}`` is one of whole segments, as in a rules file of remap; any other is a glob, or ``re:`` a regex.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

from ckptool.core import keys as names
from ckptool.core.checkpoint import Checkpoint, Rank
from ckptool.core.roots import is_flat
from ckptool.core.tensor import Opaque, TensorInfo, cat, narrow, whole_storage
from ckptool.core.tree import Global, Path, as_mapping, key_text, replaced, walk
from ckptool.errors import (
    FormatError,
    IncompleteError,
    UnreadableError,
    UnsupportedError,
    UsageError,
    explain,
    kind_of,
    listed,
    near,
)
from ckptool.io.files import read_given
from ckptool.io.paths import given as known
from ckptool.io.paths import relative
from ckptool.ops import segments
from ckptool.text import dims

Same = Callable[[TensorInfo, TensorInfo], bool]

SETS = os.path.dirname(__file__)
"""The directory of the rules that ship."""

WAYS = {
    "cat N": "concatenated along dimension N",
    "cat N in M parts": "each rank holds a piece of each of M parts, one behind the other along dimension N",
    "gated cat": "cat 0 in 2 parts: a gate and what it multiplies",
    "vocab cat": "cat 0, without the rows from vocab_size on",
    "replicated": "the same on all ranks: the bytes are compared",
    "first": "the first rank's, whatever the others hold",
    "drop": "left out",
}
"""How the pieces of a tensor may be joined -> what that means."""


class Join(NamedTuple):
    """A way to join pieces: ``kind`` is the first word of one of `WAYS`, or what decides it by the shape of ``by``.

    ``gated-by``: ``gated cat`` if there are twice as many rows as ``by`` has columns, ``cat 0`` if as many.
    ``width-by``: ``cat 1`` if all ranks together have as many columns as ``by`` has elements, ``cat 0`` if each has.
    """

    kind: str
    dim: int = 0
    parts: int = 1
    by: str = ""


def _way(pattern: str, given: Any) -> Join:
    """Returns what a line of ``[join]`` means. Raises: UsageError."""
    if isinstance(given, dict):
        kind, key = next(iter(given.items()), ("", None))
        if len(given) == 1 and kind in ("gated-by", "width-by") and isinstance(key, str):
            return Join(kind, by=key)
        raise UsageError(f"{pattern}: a table is {{gated-by = KEY}} or {{width-by = KEY}}, not {given!r}")
    text = " ".join(given.split()) if isinstance(given, str) else ""
    if found := re.fullmatch(r"cat (\d)(?: in ([1-9]\d{0,3}) parts)?", text):
        return Join("cat", int(found[1]), int(found[2] or 1))
    if text == "gated cat":
        return Join("cat", 0, 2)
    if text in WAYS and " N" not in text:
        return Join(text.split()[0])
    like = near(re.sub(r"\d", "N", text), WAYS)
    raise UsageError(f"{pattern}: {given!r} is no way to join{like}; there are {', '.join(WAYS)}")


class Rule(NamedTuple):
    """A line of ``[join]``."""

    pattern: str
    join: Join

    def test(self) -> Callable[[str], bool]:
        """Returns the test for keys that it is for."""
        if "{" not in self.pattern:
            return partial(names.matches, self.pattern)
        pattern = segments.compiled(self.pattern)
        literal, match = pattern.literal, pattern.regex.fullmatch
        return lambda key: literal in key and match(f"{key}.") is not None

    def filled(self, key: str) -> Join:
        """Returns how a key's pieces are joined, with what the pattern captured filled into ``by``."""
        if "{" not in self.pattern or not self.join.by:
            return self.join
        pattern = segments.compiled(self.pattern)
        by = pattern.substitute(segments.replacement(self.join.by, pattern.captures), key)
        return self.join._replace(by=by)


@dataclass(frozen=True, slots=True)
class JoinRules:
    """How the ranks of a model are joined: what a rules file says."""

    name: str
    rules: tuple[Rule, ...]
    layers: tuple[str, ...] = ()
    stage_layers: tuple[int, ...] = ()
    vocab_size: int | None = None

    @classmethod
    def of(cls, given: Any) -> JoinRules:
        """Returns the rules in a TOML file, of a set that ships, or of a dict. Raises: UsageError, UnreadableError."""
        if isinstance(given, JoinRules):
            return given
        if isinstance(given, Mapping):
            return cls._parsed("the rules", given)
        if not isinstance(given, (str, os.PathLike)):
            raise UsageError(f"tp_rules is a path, a name or a dict, not {kind_of(given)}")
        url = known(os.fspath(given))
        path = os.path.join(SETS, f"{url}.toml") if url in shipped() else url
        try:
            return cls._parsed(url, tomllib.loads(read_given(path, "a file of rules").decode()))
        except OSError as error:
            like = near(url, shipped()) if os.path.basename(url) == url else ""
            raise UnreadableError(f"{explain(error)}{like}; rules that ship: {', '.join(shipped())}", url) from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise FormatError(f"not TOML: {error}", url) from error
        except UsageError as error:
            error.path = error.path or url
            raise

    @classmethod
    def _parsed(cls, name: str, given: Mapping[str, Any]) -> JoinRules:
        for field in given:
            if field not in _FIELDS:
                raise UsageError(f"no field {field!r}{near(field, _FIELDS)}; there are {', '.join(_FIELDS)}")
        for field, (what, fits) in _FIELDS.items():
            if field in given and not fits(given[field]):
                raise UsageError(f"{field} is {what}, not {given[field]!r}")
        base = cls(name, ()) if "base" not in given else cls.of(given["base"])
        rules = tuple(Rule(pattern, _way(pattern, way)) for pattern, way in given.get("join", {}).items())
        for pattern in (*given.get("layers", ()), *(rule.pattern for rule in rules if "{" in rule.pattern)):
            segments.compiled(pattern)
        for rule in rules:
            segments.replacement(rule.join.by, segments.compiled(rule.pattern).captures)
        return replace(
            base, name=name, rules=base.rules + rules, layers=base.layers + tuple(given.get("layers", ())),
            stage_layers=tuple(given.get("stage_layers", ())) or base.stage_layers,
            vocab_size=given.get("vocab_size", base.vocab_size),
        )  # fmt: skip

    def finder(self) -> Callable[[str], Join | None]:
        """Returns the function from a key to how its pieces are joined; None if no rule covers it."""
        tests = [(rule.test(), rule) for rule in reversed(self.rules)]

        def find(key: str) -> Join | None:
            return next((rule.filled(key) for test, rule in tests if test(key)), None)

        return find

    def misspelled(self, keys: Sequence[str]) -> list[str]:
        """Returns the patterns that fit no key, where one like them would."""
        found = []
        for rule in self.rules:
            if not any(map(rule.test(), keys)):
                like = names.near_pattern(re.sub(r"\{\w+\}", "*", rule.pattern), keys)
                found += [f"{rule.pattern}{like}"] if like else []
        return found


def _is_list(value: Any, fits: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and all(map(fits, value))


_FIELDS: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "base": ("the name of rules that ship", lambda value: isinstance(value, str) and value in shipped()),
    "layers": (
        "a list of patterns that end in .{i}",
        lambda value: _is_list(value, lambda one: isinstance(one, str) and bool(re.search(r"\.\{\w+\}$", one))),
    ),
    "stage_layers": (
        "a list of whole numbers", lambda value: _is_list(value, lambda one: type(one) is int and one >= 0)
    ),
    "vocab_size": ("a whole number above 0", lambda value: type(value) is int and value > 0),
    "join": ("a table of key patterns", lambda value: isinstance(value, Mapping)),
}  # fmt: skip
"""The fields of a rules file -> what each must be, and the test for it."""


def shipped() -> list[str]:
    """Returns the names of the rules that ship."""
    return sorted(name.removesuffix(".toml") for name in os.listdir(SETS) if name.endswith(".toml"))


# --- ranks -----------------------------------------------------------------------------------------------------------


def listing(
    label: str, directory: str, ranks: Sequence[Rank], tree: Mapping[str, Any], files: Iterable[Checkpoint],
    problems: Sequence[str],
) -> Checkpoint:  # fmt: skip
    """Returns the checkpoint that lists what each rank holds; with ``problems`` it is not whole."""
    files = list(files)
    every = tuple(dict.fromkeys(name for file in files for name in file.names))
    trailing = [f"{relative(file.url, directory)}: {file.trailing}" for file in files if file.trailing]
    return Checkpoint(
        dict(tree), format=label, url=directory, nbytes=sum(file.nbytes for file in files), names=every,
        problems=tuple(problems), broken=bool(problems), trailing="; ".join(trailing), ranks=tuple(ranks),
        files=tuple(relative(file.url, directory) for file in files),
    )  # fmt: skip


def joined(checkpoint: Checkpoint, rules: Any) -> Checkpoint:
    """Returns what `join` does, by rules that `JoinRules.of` takes. Raises: what both do."""
    from ckptool.io.files import Files
    from ckptool.values.blocks import same_bytes

    with Files() as files:
        return join(checkpoint, JoinRules.of(rules), partial(same_bytes, files=files))


def join(checkpoint: Checkpoint, rules: JoinRules, same: Same) -> Checkpoint:
    """Returns the checkpoint that its ranks are parts of; ``same`` says whether two tensors have the same bytes.

    Tensors are lazy. What is no weight is taken from the first rank, but for what holds tensors (an optimizer's
    state), which is named. A checkpoint without ranks stays as it is, and that is said.
    Raises: UsageError, with all keys that no rule covers, that ranks lack, or whose pieces do not fit the rule;
    IncompleteError for a missing rank; UnsupportedError for ranks of expert parallelism.
    """
    if not checkpoint.ranks:
        return replace(checkpoint, notes=(*checkpoint.notes, f"nothing to join by {rules.name}: it has no ranks"))
    checkpoint.require_whole()
    if experts := [rank.name for rank in checkpoint.ranks if rank.expert]:
        what = f"ranks of expert parallelism hold other experts each, which is not joined: {listed(experts)}"
        raise UnsupportedError(what, checkpoint.url)
    stages: dict[int, list[Rank]] = {}
    for rank in sorted(checkpoint.ranks, key=lambda rank: (rank.stage, rank.tensor)):
        stages.setdefault(rank.stage, []).append(rank)
    width = range(len(stages[min(stages)]))
    if any([rank.tensor for rank in ranks] != [*width] for ranks in stages.values()) or len(stages) <= max(stages):
        names = listed((rank.name for rank in checkpoint.ranks), 40)
        raise IncompleteError(f"not every rank has a part of every pipeline stage: there are {names}", checkpoint.url)
    joining = _Joining(rules, same, several=len(stages) > 1)
    for number, ranks in enumerate(stages.values()):
        joining.add(number, ranks)
    joining.check(checkpoint.url)
    first, others = stages[0][0].checkpoint, [rank.checkpoint for ranks in stages.values() for rank in ranks][1:]
    tree, notes = _around(first, others, joining.node(first))
    return replace(checkpoint, tree=tree, ranks=(), notes=(*checkpoint.notes, *joining.notes(), *notes))


class _Joining:
    """Joins stage after stage, and collects everything that forbids it.

    ``tensors`` and ``objects``: {key: (path below root, value)}. ``problems`` and ``said``: {what: its keys}.
    """

    def __init__(self, rules: JoinRules, same: Same, several: bool) -> None:
        self.rules, self.same, self.several, self.find = rules, same, several, rules.finder()
        self.tensors: dict[str, tuple[Path, TensorInfo]] = {}
        self.objects: dict[str, tuple[Path, Any]] = {}
        self.problems: dict[str, list[str]] = {}
        self.said: dict[str, list[str]] = {}
        self.begun = dict.fromkeys(rules.layers, 0)
        self.counts: list[int] = []
        self.keys: dict[str, None] = {}
        self.made: dict[Any, TensorInfo] = {}
        self.where = ""
        self.vocabularies = 0

    def _problem(self, what: str, key: str) -> None:
        self.problems.setdefault(what, []).append(f"{self.where}{key}")

    def _say(self, what: str, key: str) -> None:
        self.said.setdefault(what, []).append(key)

    def add(self, stage: int, ranks: Sequence[Rank]) -> None:
        """Joins the tensors of one pipeline stage, whose layers are those behind the layers of the stages before."""
        self.where = f"{ranks[0].name}/" if self.several else ""
        every = [rank.checkpoint.entries() for rank in ranks]
        paths = {key: path for entries in every for key, (path, _) in entries.items()}
        self.keys |= dict.fromkeys(paths)
        numbered = {key: found for key in paths if (found := self._numbered(key)) is not None}
        self._count(stage, numbered.values())
        first = dict(self.begun)
        for pattern, number, _, _ in numbered.values():
            self.begun[pattern] = max(self.begun[pattern], first[pattern] + number + 1)
        for key, path in paths.items():
            absent = [rank.name for rank, entries in zip(ranks, every, strict=True) if key not in entries]
            if absent:
                self._problem(f"not on {listed(absent)}", key)
                continue
            values = [entries[key][1] for entries in every]
            name, where = key, path
            if key in numbered and self.several:
                pattern, number, start, end = numbered[key]
                text = str(first[pattern] + number)
                name, where = f"{key[:start]}{text}{key[end:]}", _renumbered(path, start, end, text)
            if all(isinstance(value, TensorInfo) for value in values):
                self._add_tensor(name, where, key, values, every[0])
            elif any(isinstance(value, TensorInfo) for value in values):
                self._problem("a tensor on some ranks only", key)
            elif any(_said(value) != _said(values[0]) for value in values) or name in self.objects:
                self._say("no tensor, and different on the ranks: left out", name)
            else:
                self.objects[name] = where, values[0]

    def _numbered(self, key: str) -> tuple[str, int, int, int] | None:
        """Returns (pattern, number of the layer in its stage, where the number begins, where it ends)."""
        for text in self.rules.layers:
            pattern = segments.compiled(text)
            match = pattern.regex.match(f"{key}.")
            if match is not None and re.fullmatch(r"\d{1,9}", match[match.lastindex or 0], re.ASCII):
                return (text, int(match[match.lastindex or 0]), *match.span(match.lastindex or 0))
        return None

    def _count(self, stage: int, numbered: Iterable[tuple[str, int, int, int]]) -> None:
        """Notes how many layers a stage has. They must be numbered from 0, and be as many as the rules say."""
        by_pattern: dict[str, set[int]] = {}
        for pattern, number, _, _ in numbered:
            by_pattern.setdefault(pattern, set()).add(number)
        for pattern, numbers in by_pattern.items():
            if self.several and numbers != set(range(len(numbers))):
                found = names.number_ranges(numbers)
                self._problem("layers that are not numbered from 0 on in their pipeline stage", f"{pattern} is {found}")
        counted = max(map(len, by_pattern.values()), default=0)
        said = self.rules.stage_layers
        if said and (stage >= len(said) or said[stage] != counted):
            meant = said[stage] if stage < len(said) else "no such stage"
            self._problem("layers of a stage, and what stage_layers of the rules says", f"{counted}, not {meant}")
        self.counts.append(counted)

    def _add_tensor(
        self, name: str, path: Path, key: str, pieces: Sequence[TensorInfo], beside: Mapping[str, tuple[Path, Any]]
    ) -> None:
        way = self.find(key)
        if way is None:
            self.problems.setdefault("no rule for", []).append(f"{name} ({dims(pieces[0].shape)})")
            return
        if way.kind == "drop":
            self._say("left out by the rules", name)
            return
        forms = {(piece.dtype, piece.form): f"{piece.dtype} {dims(piece.shape)}" for piece in pieces}
        if len(forms) > 1:
            self._problem("unequal shapes or dtypes on the ranks", f"{key} ({listed(forms.values())})")
            return
        if isinstance(pieces[0].source, Opaque) and len(pieces) > 1 and way.kind != "first":
            self._problem("tensors that are not joined", f"{key} ({pieces[0].kind})")
            return
        seen = (*(piece.view for piece in pieces), way)
        if seen not in self.made:
            made = self._joined(key, name, pieces, self._decided(key, name, pieces, way, beside))
            if made is None:
                return
            self.made[seen] = made
        tensor = self.made[seen]
        if name in self.tensors:
            if not self.same(self.tensors[name][1], tensor):
                self._problem("in two pipeline stages, with other values", key)
            self._say("in two pipeline stages, with the same values", name)
            return
        self.tensors[name] = path, tensor

    def _decided(
        self, key: str, name: str, pieces: Sequence[TensorInfo], way: Join, beside: Mapping[str, tuple[Path, Any]]
    ) -> Join | None:
        """Returns the way to join, where the shape of another tensor decides it."""
        if not way.by:
            return way
        _, other = beside.get(way.by, ((), None))
        shape, wanted = pieces[0].shape or (), other.shape or () if isinstance(other, TensorInfo) else ()
        found: Join | None = None
        if way.kind == "gated-by" and len(wanted) == 2 and shape:
            found = {2: Join("cat", 0, 2), 1: Join("cat")}.get(shape[0] // max(wanted[1], 1))
            found = None if shape[0] % max(wanted[1], 1) else found
            if found is not None and len(pieces) > 1:
                self._say(f"{'gated' if found.parts > 1 else 'not gated'}, by the shapes", name)
        elif way.kind == "width-by" and len(wanted) == 1 and len(shape) == 2:
            found = {wanted[0]: Join("cat"), -(-wanted[0] // len(pieces)): Join("cat", 1)}.get(shape[1])
            found = None if found is not None and found.dim and wanted[0] % len(pieces) else found
        if found is None:
            rest = f"{way.by} is {dims(wanted) if wanted else 'absent'}, on {len(pieces)} ranks"
            self._problem("shapes do not tell how to join", f"{key} ({dims(shape)}; {rest})")
        return found

    def _joined(self, key: str, name: str, pieces: Sequence[TensorInfo], way: Join | None) -> TensorInfo | None:
        """Returns the tensor of these pieces; None if it cannot be made."""
        if way is None:
            return None
        if way.kind == "replicated":
            if not all(self.same(pieces[0], piece) for piece in pieces[1:]):
                self._problem("replicated by the rules, and different on the ranks ('first' takes the first's)", key)
            return pieces[0]
        if way.kind == "first":
            return pieces[0]
        shape = pieces[0].shape or ()
        if way.dim >= len(shape) or shape[way.dim] % way.parts:
            how = f"cat {way.dim}" + (f" in {way.parts} parts" if way.parts > 1 else "")
            self._problem(f"shapes that {how} does not fit", f"{key} ({dims(shape)})")
            return None
        if way.kind == "vocab":
            return self._vocabulary(name, pieces)
        if self._repeats(pieces):
            self._problem("the same values on several ranks, which cat would repeat", key)
        if len(pieces) == 1:
            return pieces[0]
        size = shape[way.dim] // way.parts
        return cat([narrow(one, way.dim, part * size, size) for part in range(way.parts) for one in pieces], way.dim)

    def _vocabulary(self, name: str, pieces: Sequence[TensorInfo]) -> TensorInfo:
        """Returns the rows of all ranks, without the padding if it is known how many there are."""
        self.vocabularies += 1
        rows = [(piece.shape or ())[0] for piece in pieces]
        kept = sum(rows) if self.rules.vocab_size is None else self.rules.vocab_size
        if kept > sum(rows):
            self._problem(f"fewer rows than vocab_size, {kept}", f"{name} ({sum(rows)})")
        if self.rules.vocab_size is None:
            self._say("rows of padding, if there are any, are kept (vocab_size in the rules cuts them off)", name)
        elif kept < sum(rows):
            self._say(f"without the rows from {kept} on, which are padding", name)
        parts = []
        for piece, count in zip(pieces, rows, strict=True):
            parts += [narrow(piece, 0, 0, min(kept, count))] if kept > 0 else []
            kept -= count
        return parts[0] if len(parts) == 1 else cat(parts, 0)

    def _repeats(self, pieces: Sequence[TensorInfo]) -> bool:
        """Returns whether two ranks hold the same matrix, by recorded checksums; one of equal rows proves nothing."""
        by_sum: dict[int, TensorInfo] = {}
        for piece in pieces if len(pieces[0].shape or ()) > 1 else ():
            storage, rows = whole_storage(piece), (piece.shape or ())[0]
            if storage is None or storage.crc32 is None or rows < 2 or not piece.numel:
                continue
            other = by_sum.setdefault(storage.crc32, piece)
            if other is not piece and self.same(other, piece):
                constant = self.same(narrow(piece, 0, 0, rows - 1), narrow(piece, 0, 1, rows - 1))
                if not constant:
                    return True
        return False

    def check(self, url: str) -> None:
        """Raises UsageError with everything that forbids joining."""
        if self.rules.vocab_size is not None and not self.vocabularies:
            self.problems["vocab_size is given, and 'vocab cat' of no key"] = []
        if not self.problems:
            return
        found = [f"{what}: {_folded(keys)}" if keys else what for what, keys in self.problems.items()]
        if "no rule for" in self.problems and (wrong := self.rules.misspelled(list(self.keys)[:2000])):
            found.append(f"patterns that fit no key: {listed(wrong)}")
        raise UsageError(f"cannot be joined by {self.rules.name}: {'; '.join(found)}", url)

    def node(self, first: Checkpoint) -> Any:
        """Returns what stands at root: the keys in the order of the stages, in containers like the first rank's."""
        if is_flat(first.at(first.root)):
            tensors = {key: tensor for key, (_, tensor) in self.tensors.items()}
            objects = {key: value for key, (_, value) in self.objects.items()}
            return first.with_state_dict(tensors, objects).at(first.root)
        top: dict[Any, Any] = {}
        for path, value in (*self.tensors.values(), *self.objects.values()):
            node = top
            for step in path[:-1]:
                node = node.setdefault(step, {})
            node.setdefault(path[-1], value)
        return top

    def notes(self) -> list[str]:
        """Returns how the ranks were joined, and what was left out."""
        stages = f"; layers of the pipeline stages: {', '.join(map(str, self.counts))}" if self.several else ""
        found = [f"joined by {self.rules.name}{stages}"]
        return found + [f"{what}: {_folded(keys)}" for what, keys in self.said.items()]


def _folded(keys: Sequence[str]) -> str:
    return listed(names.ranges(dict.fromkeys(keys)), 40)


def _renumbered(path: Path, start: int, end: int, text: str) -> Path:
    """Returns a path with other characters from ``start`` to ``end`` of the key that its steps are joined to."""
    steps: list[Any] = []
    at = 0
    for step in path:
        name = key_text(step)
        inside = at <= start < at + len(name)
        steps.append(f"{name[: start - at]}{text}{name[end - at :]}" if inside else step)
        at += len(name) + 1
    return tuple(steps)


def _said(node: Any) -> list[Any]:
    """Returns what an object holds, to compare it with one of another file; tensors are never equal."""
    plain = (str, bytes, bool, int, float, type(None), TensorInfo)
    return [
        (path, type(one), one)
        if isinstance(one, plain)
        else (path, repr(one if isinstance(one, Global) else type(one)))
        for path, one in walk(node)
    ]


def _around(first: Checkpoint, others: Sequence[Checkpoint], node: Any) -> tuple[Any, list[str]]:
    """Returns (the tree of the first rank's file with ``node`` for its model, notes on what else ranks hold)."""
    if not first.root:
        return node, []
    tree: dict[Any, Any] = {}
    left, differ = [], []
    content = as_mapping(first.tree) or {}
    for name, value in content.items():
        if name == first.root[0]:
            top = node if len(first.root) == 1 else replaced(value, first.root[1:], node)
            tree["model" if is_model(name) else name] = top
        elif any(isinstance(one, TensorInfo) for _, one in walk(value)):
            left.append(name)
        elif not is_model(name):
            tree[name] = value
            held = ((as_mapping(other.tree) or {}).get(name) for other in others)
            differ += [name] if any(_said(one) != _said(value) for one in held) else []
    left += [name for other in others for name in as_mapping(other.tree) or {} if name not in content]
    left = [name for name in dict.fromkeys(left) if not is_model(name)]
    notes = [f"not joined, left out: {listed(left)}"] if left else []
    return tree, notes + ([f"different on the ranks, the first one's taken: {listed(differ)}"] if differ else [])


def is_model(name: Any) -> bool:
    """Returns whether an entry of a rank's file is a model, or a chunk of one: ``model``, ``model0``."""
    return isinstance(name, str) and re.fullmatch(r"model\d{0,4}", name, re.ASCII) is not None
