"""Rules that rename keys and reshape tensors: how they are written, and what they mean for given keys.

A `Rules` object is what a user wrote, in order. `Rules.plan` turns it into `Step`s, which name every key they touch:
steps are what is applied, saved in a map file, and inverted.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from ckptool import keys as names
from ckptool.errors import UsageError

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Step:
    """One elementary change, with every key spelled out.

    ``op`` and what ``args`` then holds (sizes in elements along ``dim``):

        rename   old[i] becomes new[i]
        drop     old is left out
        permute  dims                      old[i] becomes new[i] = old[i] with its dimensions reordered
        reshape  from, to                  the same elements in C order
        split    dim, sizes                old[0] becomes the pieces new
        cat      dim, sizes                the inverse of split
        chunk    dim, heads, parts         old[0] is heads x parts x rest along dim; piece i takes part i of every head
        weave    dim, heads, parts         the inverse of chunk
    """

    op: str
    old: tuple[str, ...]
    new: tuple[str, ...] = ()
    args: Mapping[str, Any] = field(default_factory=dict)

    def inverted(self) -> Step:
        """Returns the step that undoes this one. Raises: UsageError for a drop."""
        args = dict(self.args)
        if self.op == "drop":
            raise UsageError("a map that dropped keys cannot bring them back")
        if self.op == "permute":
            args["dims"] = [args["dims"].index(axis) for axis in range(len(args["dims"]))]
        elif self.op == "reshape":
            args["from"], args["to"] = args["to"], args["from"]
        opposite = {"split": "cat", "cat": "split", "chunk": "weave", "weave": "chunk"}
        return Step(opposite.get(self.op, self.op), self.new, self.old, args)


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule as the user wrote it (``text``), and its parts: a kind, and what that kind takes."""

    kind: str
    text: str
    args: Mapping[str, Any]


KINDS = {
    "strip_prefix": ("strip_prefix",),
    "add_prefix": ("add_prefix",),
    "rename": ("rename", "to"),
    "sub": ("sub", "by"),
    "drop": ("drop",),
    "transpose": ("transpose", "dims"),
    "permute": ("permute", "dims"),
    "reshape": ("reshape", "shape"),
    "split": ("split", "into", "dim", "sizes"),
    "cat": ("cat", "into", "dim"),
    "chunk": ("chunk", "into", "heads", "dim"),
    "weave": ("weave", "into", "heads", "dim"),
}
"""What a rule in a file may be -> the fields it may have."""

PRESETS: Mapping[str, Sequence[Mapping[str, Any]]] = {
    "ddp": ({"sub": r"^(module\.)+", "by": ""},),
    "compile": ({"sub": r"(?<![^.])_orig_mod\.", "by": ""},),
    "fsdp": ({"sub": r"(?<![^.])(_fsdp_wrapped_module|_checkpoint_wrapped_module)\.", "by": ""},),
    "lightning": ({"strip_prefix": "model."},),
}
"""Rules that undo what a framework does to names, by its name."""


class Rules:
    """An ordered list of rules."""

    def __init__(self, rules: Iterable[Rule] = ()) -> None:
        self.rules = tuple(rules)

    def __add__(self, other: Rules) -> Rules:
        return Rules((*self.rules, *other.rules))

    @classmethod
    def parse(cls, source: Any) -> Rules:
        """Returns the rules that a list of dicts, a dict with ``rules``, or a shorthand says.

        Full form: ``{"rules": [{"rename": "blocks.{i}.attn", "to": "layers.{i}.attention"}, ...]}``, see `KINDS`.
        Shorthands: a list of [regex, replacement] pairs, as mmengine's ``revise_keys``; a dict of names, as
        litgpt's tables (``{}`` stands for a number). Raises: UsageError naming the rule that is wrong.
        """
        if isinstance(source, Rules):
            return source
        if isinstance(source, dict) and isinstance(source.get("rules"), list):
            unknown = set(source) - {"rules", "schema"}
            if unknown:
                raise UsageError(f"a rules file knows no {', '.join(sorted(map(str, unknown)))} beside rules")
            return cls(_rule(entry) for entry in source["rules"])
        if isinstance(source, dict):
            return cls(_table_rule(old, new) for old, new in source.items())
        if isinstance(source, (list, tuple)):
            return cls(_rule(entry) for entry in source)
        raise UsageError("rules are a list of rules, of [regex, replacement] pairs, or a table of names")

    @classmethod
    def preset(cls, name: str) -> Rules:
        """Returns a preset's rules. Raises: UsageError for an unknown name."""
        if name not in PRESETS:
            raise UsageError(f"no preset {name!r}; there are {', '.join(PRESETS)}")
        return cls(Rule(rule.kind, f"preset {name}", rule.args) for rule in cls.parse(list(PRESETS[name])).rules)

    def plan(self, shapes: Mapping[str, Shape | None]) -> tuple[list[list[Step]], list[str], list[str]]:
        """Returns (steps of each rule, unused rules, troubles) for keys and their shapes (None: no tensor).

        The steps of one rule touch different keys. Troubles are all that forbids going on: colliding and
        empty names, sizes that do not add up.
        """
        current: dict[str, Shape | None] = dict(shapes)
        batches: list[list[Step]] = []
        unused: list[str] = []
        troubles: list[str] = []
        for rule in self.rules:
            before = len(troubles)
            made = _PLANNERS[rule.kind](rule, current, troubles)
            if made:
                current, collisions = advance(made, current)
                troubles += [f"{rule.text}: {trouble}" for trouble in collisions]
                batches.append(made)
            elif len(troubles) == before:
                unused.append(rule.text)
        return batches, unused, troubles


def advance(steps: Sequence[Step], current: Mapping[str, Shape | None]) -> tuple[dict[str, Shape | None], list[str]]:
    """Returns ({key: shape} after steps over different keys, what forbids them: collisions, empty names).

    New keys stand where the first of their old keys stood. One pass, however many steps.
    """
    becomes: dict[str, dict[str, Shape | None]] = {}
    for step in steps:
        shapes = [current.get(key) for key in step.old]
        if step.op == "rename":
            becomes.update((old, {new: shape}) for old, new, shape in zip(step.old, step.new, shapes, strict=True))
        else:
            becomes.update((old, {}) for old in step.old)
            fresh = dict(zip(step.new, new_shapes(step, shapes), strict=True))
            if len(fresh) < len(step.new):
                becomes[step.old[0]] = fresh
                return dict(current), [f"{step.old[0]} would give one name twice: {', '.join(step.new)}"]
            if fresh:
                becomes[step.old[0]] = fresh
    made: dict[str, Shape | None] = {}
    origin: dict[str, str] = {}
    troubles = []
    for key, shape in current.items():
        for name, its in becomes.get(key, {key: shape}).items():
            if key in becomes and (not name or name[0] == "." or name[-1] == "." or ".." in name):
                troubles.append(f"{key} would be {name!r}: an empty name")
            elif name in made:
                troubles.append(f"{origin[name]} and {key} would both be {name}")
            made[name], origin[name] = its, key
    return made, troubles


def new_shapes(step: Step, shapes: Sequence[Shape | None]) -> list[Shape | None]:
    """Returns the shapes that a step gives its new keys."""
    args = step.args
    first = shapes[0] if shapes else None
    if step.op in ("rename", "drop"):
        return list(shapes[: len(step.new)])
    if first is None:
        return [None] * len(step.new)
    if step.op == "permute":
        return [tuple(first[axis] for axis in args["dims"])]
    if step.op == "reshape":
        return [tuple(args["to"])]
    dim = args["dim"]
    if step.op == "split":
        return [(*first[:dim], size, *first[dim + 1 :]) for size in args["sizes"]]
    if step.op == "cat":
        return [(*first[:dim], sum(args["sizes"]), *first[dim + 1 :])]
    parts = args["parts"]
    size = first[dim] // parts if step.op == "chunk" else first[dim] * parts
    return [(*first[:dim], size, *first[dim + 1 :])] * len(step.new)


# --- how rules are written ---------------------------------------------------------------------------------------


def _rule(entry: Any) -> Rule:
    if isinstance(entry, (list, tuple)) and len(entry) == 2 and all(isinstance(part, str) for part in entry):
        return _checked("sub", {"sub": entry[0], "by": entry[1]})
    if not isinstance(entry, dict):
        raise UsageError(f"{entry!r} is no rule")
    kinds = [kind for kind in KINDS if kind in entry]
    if len(kinds) != 1:
        raise UsageError(f"a rule is one of {', '.join(KINDS)}: {entry!r} is {' and '.join(kinds) or 'none'}")
    return _checked(kinds[0], entry)


def _table_rule(old: Any, new: Any) -> Rule:
    """A line of a table of names, in which ``{}`` stands for one segment; None drops the key."""
    if new is None:
        segments = re.split(r"\{\w*\}|\*", str(old))
        return _checked("drop", {"drop": f"re:^{'[^.]+'.join(map(re.escape, segments))}$"})
    if not isinstance(new, str):
        raise UsageError(f"the table maps {old!r} to {new!r}, which is no name")
    return _checked("rename", {"rename": str(old).replace("{}", "*"), "to": new.replace("{}", "*"), "whole": True})


def _checked(kind: str, entry: Mapping[str, Any]) -> Rule:
    unknown = set(entry) - set(KINDS[kind]) - {"whole"}
    if unknown:
        raise UsageError(f"a {kind} rule takes {', '.join(KINDS[kind])}, not {', '.join(sorted(unknown))}")
    args = dict(entry)
    text = f"{kind} {entry[kind]}" + (f" -> {entry['to']}" if "to" in entry else "")
    main = args[kind]
    if kind in ("cat", "weave"):
        if not (isinstance(main, list) and len(main) > 1 and all(isinstance(key, str) and key for key in main)):
            raise UsageError(f"{text}: names the keys to put together, a list of two or more")
        if not isinstance(args.get("into"), str):
            raise UsageError(f"{text}: into is one name")
    elif not isinstance(main, str) or not main:
        raise UsageError(f"{text}: {kind} is a text that is not empty")
    if kind in ("split", "chunk") and not (
        isinstance(args.get("into"), list)
        and len(args["into"]) > 1
        and all(isinstance(key, str) for key in args["into"])
    ):
        raise UsageError(f"{text}: into is a list of two or more names")
    if kind == "rename" and not isinstance(args.get("to"), str):
        raise UsageError(f"{text}: to is a name")
    if kind == "sub":
        if not isinstance(args.setdefault("by", ""), str):
            raise UsageError(f"{text}: by is a text")
        try:
            args["compiled"] = re.compile(main)
            re.sub(main, str(args.setdefault("by", "")), "")
        except (re.error, IndexError) as error:
            raise UsageError(f"{text}: {error}") from error
    for name in ("dim", "heads"):
        if name in args and type(args[name]) is not int:
            raise UsageError(f"{text}: {name} is a whole number")
    if kind in ("chunk", "weave") and args.get("heads", 0) < 1:
        raise UsageError(f"{text}: heads says how many heads there are")
    for name in ("dims", "shape", "sizes"):
        if name in args and not (isinstance(args[name], list) and all(type(number) is int for number in args[name])):
            raise UsageError(f"{text}: {name} is a list of whole numbers")
    for name, needed in (("dims", "permute"), ("shape", "reshape")):
        if kind == needed and name not in args:
            raise UsageError(f"{text}: {name} is missing")
    return Rule(kind, text, args)


def parse_option(kind: str, text: str) -> Rules:
    """Returns the rule that a command-line option says: ``--rename A=B``, ``--sub s/REGEX/REPL/`` and so on."""
    if kind == "preset":
        found = Rules()
        for name in text.split(","):
            found = found + Rules.preset(name.strip())
        return found
    if kind == "rename":
        old, equals, new = text.partition("=")
        if not equals:
            raise UsageError(f"--rename takes A=B, not {text!r}")
        return Rules.parse([{"rename": old, "to": new}])
    if kind == "sub":
        parts = re.split(rf"(?<!\\){re.escape(text[1])}", text[2:]) if len(text) > 3 and text[0] == "s" else []
        if len(parts) != 3 or parts[2] not in ("", "g"):
            raise UsageError(f"--sub takes s/REGEX/REPLACEMENT/, not {text!r}")
        regex, by = (part.replace(f"\\{text[1]}", text[1]) for part in parts[:2])
        return Rules.parse([{"sub": regex, "by": by}])
    return Rules.parse([{kind: text}])


# --- what rules mean for given keys ------------------------------------------------------------------------------

Current = dict[str, Shape | None]
Planner = Callable[[Rule, Current, list[str]], list[Step]]


def _renaming(rename: Callable[[Rule, str], str]) -> Planner:
    def plan(rule: Rule, current: Current, troubles: list[str]) -> list[Step]:
        pairs = [(key, made) for key in current if (made := rename(rule, key)) != key]
        return [Step("rename", tuple(old for old, _ in pairs), tuple(new for _, new in pairs))] if pairs else []

    return plan


def renamed(rule: Rule, key: str) -> str:
    """Returns a key under one rule that renames; any other rule leaves it."""
    if rule.kind == "strip_prefix":
        return key.removeprefix(rule.args["strip_prefix"])
    if rule.kind == "add_prefix":
        return f"{rule.args['add_prefix']}{key}"
    if rule.kind == "sub":
        return str(rule.args["compiled"].sub(rule.args["by"], key))
    if rule.kind == "rename":
        return _by_segments(rule.args["rename"], rule.args["to"], key, bool(rule.args.get("whole")))
    return key


def _by_segments(old: str, new: str, key: str, whole: bool) -> str:
    """Returns a key with every run of whole segments that fits ``old`` replaced by ``new``; once only if ``whole``."""
    pattern, literals = _pattern(old)
    if not all(part in key for part in literals):
        return key
    segments = key.split(".")
    made: list[str] = []
    position = 0
    while position < len(segments):
        found = _captures(pattern, segments[position : position + len(pattern)])
        if found is None or (whole and (position or len(segments) != len(pattern))):
            made.append(segments[position])
            position += 1
        else:
            filled = _filled(new, *found)
            made += filled.split(".") if filled else []
            position += len(pattern)
    return ".".join(made)


@lru_cache(maxsize=512)
def _pattern(text: str) -> tuple[list[re.Pattern[str]], list[str]]:
    """Returns (the pattern of each segment, texts that a key must contain to fit at all)."""
    parts = text.split(".")
    return [_segment(part) for part in parts], re.split(r"\*|\{\w+\}|\.", text)


def _segment(text: str) -> re.Pattern[str]:
    """Returns the pattern of one segment, in which ``*`` and ``{name}`` each capture one or more characters."""
    pieces = re.split(r"(\*|\{\w+\})", text)
    regex = "".join(
        "([^.]+)" if piece == "*" else f"(?P<_{piece[1:-1]}>[^.]+)" if piece.startswith("{") else re.escape(piece)
        for piece in pieces
    )
    try:
        return re.compile(regex)
    except re.error as error:
        raise UsageError(f"{text!r}: {error}") from error


def _captures(pattern: Sequence[re.Pattern[str]], segments: Sequence[str]) -> tuple[list[str], dict[str, str]] | None:
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


def _filled(template: str, stars: Sequence[str], named: Mapping[str, str]) -> str:
    left = list(stars)

    def fill(match: re.Match[str]) -> str:
        if match[0] == "*":
            if not left:
                raise UsageError(f"{template!r} has more * than what it renames")
            return left.pop(0)
        if match[0][1:-1] not in named:
            raise UsageError(f"{template!r} has {match[0]}, which what it renames has not")
        return named[match[0][1:-1]]

    return re.sub(r"\*|\{\w+\}", fill, template)


def _plan_drop(rule: Rule, current: Current, troubles: list[str]) -> list[Step]:
    gone = tuple(key for key in current if names.matches(rule.args["drop"], key))
    return [Step("drop", gone)] if gone else []


def _plan_permute(rule: Rule, current: Current, troubles: list[str]) -> list[Step]:
    steps = []
    for key, shape in current.items():
        if not names.matches(rule.args[rule.kind], key):
            continue
        rank = None if shape is None else len(shape)
        dims = rule.args.get("dims") or ([1, 0] if rank == 2 else None)
        if rule.kind == "transpose" and dims is not None and len(dims) == 2 and rank is not None and rank != 2:
            swapped = list(range(rank))
            if all(-rank <= axis < rank for axis in dims):
                swapped[dims[0]], swapped[dims[1]] = swapped[dims[1]], swapped[dims[0]]
                dims = swapped
        if rank is not None and dims is not None and all(-rank <= axis < rank for axis in dims):
            dims = [axis % rank for axis in dims]
        if rank is None or dims is None or sorted(dims) != list(range(rank)):
            troubles.append(f"{rule.text}: {key} has shape {_dims(shape)}, which dims {dims} does not fit")
        else:
            steps.append(Step("permute", (key,), (key,), {"dims": list(dims)}))
    return steps


def _plan_reshape(rule: Rule, current: Current, troubles: list[str]) -> list[Step]:
    steps = []
    for key, shape in current.items():
        if not names.matches(rule.args["reshape"], key):
            continue
        to = list(rule.args["shape"])
        total = _product(shape or ())
        if to.count(-1) == 1 and (rest := _product([size for size in to if size != -1])) and total % rest == 0:
            to[to.index(-1)] = total // rest
        if shape is None or any(size < 0 for size in to) or _product(to) != total:
            troubles.append(f"{rule.text}: {key} has shape {_dims(shape)}, which {rule.args['shape']} does not hold")
        else:
            steps.append(Step("reshape", (key,), (key,), {"from": list(shape), "to": to}))
    return steps


def _plan_split(rule: Rule, current: Current, troubles: list[str]) -> list[Step]:
    steps = []
    pattern, _ = _pattern(rule.args[rule.kind])
    for key, shape in current.items():
        found = _captures(pattern, key.split(".")) if key.count(".") == len(pattern) - 1 else None
        if found is None:
            continue
        into = tuple(_filled(name, *found) for name in rule.args["into"])
        dim, parts = rule.args.get("dim", 0), len(into)
        size = shape[dim] if shape is not None and -len(shape) <= dim < len(shape) else None
        sizes = rule.args.get("sizes")
        if rule.kind == "chunk":
            heads = rule.args["heads"]
            args = {"dim": dim, "heads": heads, "parts": parts}
            fits = size is not None and size % (heads * parts) == 0
        else:
            if sizes is None and size is not None and size % parts == 0:
                sizes = [size // parts] * parts
            args = {"dim": dim, "sizes": sizes}
            fits = sizes is not None and len(sizes) == parts and sum(sizes) == size and min(sizes) >= 0
        if not fits or shape is None:
            what = f"{rule.args['heads']} heads of {parts}" if rule.kind == "chunk" else f"{sizes or parts} pieces"
            troubles.append(f"{rule.text}: {key} has shape {_dims(shape)}, dim {dim} is not {what}")
        else:
            args["dim"] = dim % len(shape)
            steps.append(Step(rule.kind, (key,), into, args))
    return steps


def _plan_cat(rule: Rule, current: Current, troubles: list[str]) -> list[Step]:
    """Puts together the keys that share what the names in the list capture."""
    patterns = [_pattern(name)[0] for name in rule.args[rule.kind]]
    groups: dict[object, dict[int, tuple[str, Any]]] = {}
    for key in current:
        for number, pattern in enumerate(patterns):
            found = _captures(pattern, key.split(".")) if key.count(".") == len(pattern) - 1 else None
            if found is not None:
                identity = (tuple(found[0]), tuple(sorted(found[1].items())))
                groups.setdefault(identity, {})[number] = (key, found)
    steps = []
    for members in groups.values():
        keys = [members[number][0] for number in sorted(members)]
        if len(members) < len(patterns):
            troubles.append(f"{rule.text}: only {', '.join(keys)} of {len(patterns)} are there")
            continue
        if len(set(keys)) < len(keys):
            troubles.append(f"{rule.text}: {keys[0]} cannot be put together with itself")
            continue
        into = _filled(rule.args["into"], *members[0][1])
        dim = rule.args.get("dim", 0)
        shapes = [current[key] for key in keys]
        if any(shape is None or not -len(shape) <= dim < len(shape) for shape in shapes):
            troubles.append(f"{rule.text}: {', '.join(keys)} cannot be put together along dim {dim}")
            continue
        solid = [shape for shape in shapes if shape is not None]
        dim %= len(solid[0])
        if len({(*shape[:dim], *shape[dim + 1 :]) for shape in solid}) > 1:
            troubles.append(f"{rule.text}: {', '.join(keys)} have shapes {', '.join(map(_dims, shapes))}")
            continue
        args: dict[str, Any] = {"dim": dim, "sizes": [shape[dim] for shape in solid]}
        if rule.kind == "weave":
            args = {"dim": dim, "heads": rule.args["heads"], "parts": len(keys)}
            if len(set(solid)) > 1 or solid[0][dim] % rule.args["heads"]:
                troubles.append(f"{rule.text}: {', '.join(keys)} are not {rule.args['heads']} heads each")
                continue
        steps.append(Step(rule.kind, tuple(keys), (into,), args))
    return steps


def _product(sizes: Iterable[int]) -> int:
    total = 1
    for size in sizes:
        total *= size
    return total


def _dims(shape: Shape | None) -> str:
    return "none (no tensor)" if shape is None else str(list(shape))


_PLANNERS: Mapping[str, Planner] = {
    **dict.fromkeys(("strip_prefix", "add_prefix", "rename", "sub"), _renaming(renamed)),
    "drop": _plan_drop,
    "transpose": _plan_permute,
    "permute": _plan_permute,
    "reshape": _plan_reshape,
    "split": _plan_split,
    "chunk": _plan_split,
    "cat": _plan_cat,
    "weave": _plan_cat,
}
