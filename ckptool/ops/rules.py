"""Rules that rename keys and reshape tensors: how they are written, and what they mean for given keys.

A `Rules` object is what a user wrote, in order. `Rules.plan` turns it into `Step`s, which name every key they touch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from ckptool.core import keys as names
from ckptool.errors import UsageError
from ckptool.ops import segments
from ckptool.ops.segments import Table, captured, filled
from ckptool.ops.steps import Shape, Shapes, Step, advance, fits


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
"""What a rule in a file may be -> the fields it may have. A table of names is a rule of the kind ``table``."""

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
        litgpt's tables (``{}`` stands for one segment), applied at once. Raises: UsageError naming the rule that
        is wrong.
        """
        if isinstance(source, Rules):
            return source
        if isinstance(source, dict) and isinstance(source.get("rules"), list):
            unknown = set(source) - {"rules", "schema"}
            if unknown:
                raise UsageError(f"a rules file knows no {', '.join(sorted(map(str, unknown)))} beside rules")
            return cls(_rule(entry) for entry in source["rules"])
        if isinstance(source, dict):
            return cls([Rule("table", "a table of names", {"table": Table(source)})] if source else [])
        if isinstance(source, (list, tuple)):
            return cls(_rule(entry) for entry in source)
        raise UsageError("rules are a list of rules, of [regex, replacement] pairs, or a table of names")

    @classmethod
    def preset(cls, name: str) -> Rules:
        """Returns a preset's rules. Raises: UsageError for an unknown name."""
        if name not in PRESETS:
            raise UsageError(f"no preset {name!r}; there are {', '.join(PRESETS)}")
        return cls(Rule(rule.kind, f"preset {name}", rule.args) for rule in cls.parse(list(PRESETS[name])).rules)

    def plan(self, shapes: Shapes) -> Plan:
        """Returns what the rules do to keys of these shapes; as much as can be told where something forbids it."""
        plan = Plan([], dict(shapes), [], [])
        for rule in self.rules:
            before = len(plan.troubles)
            if rule.kind == "table":
                made, idle = rule.args["table"].plan(plan.after)
                plan.unused += idle
            else:
                made = _PLANNERS[rule.kind](rule, plan.after, plan.troubles)
                if not made and len(plan.troubles) == before:
                    plan.unused.append(rule.text)
            if made:
                plan.after, collisions = advance(made, plan.after)
                plan.troubles += [f"{rule.text}: {trouble}" for trouble in collisions]
                plan.batches.append(made)
        return plan


@dataclass(slots=True)
class Plan:
    """What rules do to given keys.

    ``batches``: the steps of each rule that does something; those of one rule touch different keys. ``after``: the
    keys and shapes in the end. ``unused``: the rules that fit no key. ``troubles``: all that forbids going on:
    colliding and empty names, sizes that do not add up.
    """

    batches: list[list[Step]]
    after: Shapes
    unused: list[str]
    troubles: list[str]


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


def _checked(kind: str, entry: Mapping[str, Any]) -> Rule:
    unknown = set(entry) - set(KINDS[kind])
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
    if kind == "transpose" and len(args.get("dims", (0, 1))) != 2:
        raise UsageError(f"{text}: dims are the two to swap; permute takes all of them")
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

Planner = Callable[[Rule, Shapes, list[str]], list[Step]]


def _plan_rename(rule: Rule, current: Shapes, troubles: list[str]) -> list[Step]:
    names_now = list(map(_renamer(rule), current))
    old = [key for key, new in zip(current, names_now, strict=True) if new != key]
    new = [new for key, new in zip(current, names_now, strict=True) if new != key]
    return [Step("rename", tuple(old), tuple(new))] if old else []


def _renamer(rule: Rule) -> Callable[[str], str]:
    """Returns the function from a key to its name under one rule that renames."""
    args = rule.args
    if rule.kind == "strip_prefix":
        prefix = args["strip_prefix"]
        return lambda key: key.removeprefix(prefix)
    if rule.kind == "add_prefix":
        return lambda key: f"{args['add_prefix']}{key}"
    if rule.kind == "sub":
        compiled, by = args["compiled"], args["by"]
        return lambda key: str(compiled.sub(by, key))
    return segments.renamer(args["rename"], args["to"])


def _plan_drop(rule: Rule, current: Shapes, troubles: list[str]) -> list[Step]:
    gone = tuple(key for key in current if names.matches(rule.args["drop"], key))
    return [Step("drop", gone)] if gone else []


def _plan_permute(rule: Rule, current: Shapes, troubles: list[str]) -> list[Step]:
    steps = []
    for key, shape in current.items():
        if not names.matches(rule.args[rule.kind], key):
            continue
        rank = None if shape is None else len(shape)
        dims = rule.args.get("dims", [0, 1] if rank == 2 else None)
        order = None
        if rank is not None and dims is not None and all(-rank <= axis < rank for axis in dims):
            order = [axis % rank for axis in dims]
            if rule.kind == "transpose":
                order = _swapped(rank, *order)
        if rank is None or order is None or sorted(order) != list(range(rank)):
            troubles.append(f"{rule.text}: {key} has shape {_dims(shape)}, which dims {dims} does not fit")
        else:
            steps.append(Step("permute", (key,), (key,), {"dims": order}))
    return steps


def _swapped(rank: int, one: int, other: int) -> list[int]:
    """Returns the order of dimensions that `torch.transpose` of these two gives."""
    order = list(range(rank))
    order[one], order[other] = order[other], order[one]
    return order


def _plan_reshape(rule: Rule, current: Shapes, troubles: list[str]) -> list[Step]:
    steps = []
    for key, shape in current.items():
        if not names.matches(rule.args["reshape"], key):
            continue
        to = list(rule.args["shape"])
        total = prod(shape or ())
        if to.count(-1) == 1 and (rest := prod(size for size in to if size != -1)) and total % rest == 0:
            to[to.index(-1)] = total // rest
        step = Step("reshape", (key,), (key,), {"from": list(shape or ()), "to": to})
        if any(size < 0 for size in to) or not fits(step, [shape]):
            troubles.append(f"{rule.text}: {key} has shape {_dims(shape)}, which {rule.args['shape']} does not hold")
        else:
            steps.append(step)
    return steps


def _plan_split(rule: Rule, current: Shapes, troubles: list[str]) -> list[Step]:
    steps = []
    pattern = segments.compiled(rule.args[rule.kind])
    for key, shape in current.items():
        found = captured(pattern, key.split(".")) if key.count(".") == len(pattern) - 1 else None
        if found is None:
            continue
        into = tuple(filled(name, *found) for name in rule.args["into"])
        dim, parts = rule.args.get("dim", 0), len(into)
        size = shape[dim] if shape is not None and -len(shape) <= dim < len(shape) else None
        sizes = rule.args.get("sizes")
        if rule.kind == "chunk":
            heads = rule.args["heads"]
            args = {"dim": dim, "heads": heads, "parts": parts}
            even = size is not None and size % (heads * parts) == 0
        else:
            if sizes is None and size is not None and size % parts == 0:
                sizes = [size // parts] * parts
            args = {"dim": dim, "sizes": sizes}
            even = sizes is not None and len(sizes) == parts and sum(sizes) == size and min(sizes) >= 0
        if not even or shape is None:
            what = f"{rule.args['heads']} heads of {parts}" if rule.kind == "chunk" else f"{sizes or parts} pieces"
            troubles.append(f"{rule.text}: {key} has shape {_dims(shape)}, dim {dim} is not {what}")
        else:
            args["dim"] = dim % len(shape)
            steps.append(Step(rule.kind, (key,), into, args))
    return steps


def _plan_cat(rule: Rule, current: Shapes, troubles: list[str]) -> list[Step]:
    """Puts together the keys that share what the names in the list capture."""
    patterns = [segments.compiled(name) for name in rule.args[rule.kind]]
    groups: dict[object, dict[int, tuple[str, Any]]] = {}
    for key in current:
        for number, pattern in enumerate(patterns):
            found = captured(pattern, key.split(".")) if key.count(".") == len(pattern) - 1 else None
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
        into = filled(rule.args["into"], *members[0][1])
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


def _dims(shape: Shape | None) -> str:
    return "none (no tensor)" if shape is None else str(list(shape))


_PLANNERS: Mapping[str, Planner] = {
    **dict.fromkeys(("strip_prefix", "add_prefix", "rename", "sub"), _plan_rename),
    "drop": _plan_drop,
    "transpose": _plan_permute,
    "permute": _plan_permute,
    "reshape": _plan_reshape,
    "split": _plan_split,
    "chunk": _plan_split,
    "cat": _plan_cat,
    "weave": _plan_cat,
}
