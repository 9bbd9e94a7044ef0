"""Rules that rename keys and reshape tensors: parsed from what a user wrote, and planned for given keys.

`Rules` are what a user wrote, in order. `Rules.plan` turns them into `Step`s, which name every key that changes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import prod
from operator import itemgetter
from typing import Any

from ckptool.core import keys as names
from ckptool.errors import UsageError, near
from ckptool.ops import segments
from ckptool.ops.steps import Shape, Shapes, Step, advance, fits, is_sound


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule as the user wrote it (``text``), and its parts: a kind, and what that kind takes."""

    kind: str
    text: str
    args: Mapping[str, Any]


_TESTS: Mapping[str, Callable[[Any], bool]] = {
    "a table of names": lambda value: isinstance(value, dict) and value != {},
    "a text": lambda value: isinstance(value, str),
    "a text that is not empty": lambda value: isinstance(value, str) and value != "",
    "a whole number": lambda value: type(value) is int,
    "a whole number above 0": lambda value: type(value) is int and value > 0,
    "a list of whole numbers": lambda value: isinstance(value, list) and all(type(item) is int for item in value),
    "a pattern, or a list of them": lambda value: (
        value != [] and all(isinstance(item, str) for item in (value if isinstance(value, list) else [value]))
    ),
    "a list of two or more names": lambda value: (
        isinstance(value, list) and len(value) > 1 and all(isinstance(item, str) for item in value)
    ),
}
"""What a field of a rule may have to be -> the test for it."""

_TABLE, _TEXT, _KEY, _NUMBER, _COUNT, _NUMBERS, _PATTERNS, _NAMES = _TESTS

KINDS: Mapping[str, Mapping[str, str]] = {
    "strip_prefix": {"strip_prefix": _KEY},
    "add_prefix": {"add_prefix": _KEY},
    "rename": {"rename": _KEY, "to": _TEXT},
    "sub": {"sub": _KEY, "by": _TEXT},
    "drop": {"drop": _PATTERNS},
    "copy": {"copy": _KEY, "to": _KEY},
    "preset": {"preset": _KEY},
    "transpose": {"transpose": _KEY, "dims": _NUMBERS},
    "permute": {"permute": _KEY, "dims": _NUMBERS},
    "reshape": {"reshape": _KEY, "shape": _NUMBERS},
    "split": {"split": _KEY, "into": _NAMES, "dim": _NUMBER, "sizes": _NUMBERS},
    "cat": {"cat": _NAMES, "into": _TEXT, "dim": _NUMBER},
    "chunk": {"chunk": _KEY, "into": _NAMES, "heads": _COUNT, "dim": _NUMBER},
    "weave": {"weave": _NAMES, "into": _TEXT, "heads": _COUNT, "dim": _NUMBER},
    "table": {"table": _TABLE},
}
"""The kinds of rules in a file -> {field: what it must be}."""

_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "sub": {"by": ""},
    "transpose": {"dims": None},
    "split": {"dim": 0, "sizes": None},
    **{kind: {"dim": 0} for kind in ("cat", "chunk", "weave")},
}
"""The fields of a kind that may be left out."""

_ADAPTERS = (
    r"(?:lora|vera|hada|lokr|oft|boft|ia3|hra|bone|miss|fourierft|waveft|vblora|randlora|road|shira|c3a|delora)_\w+"
    r"|ranknum|ln_tuning_layers|modules_to_save|trainable_tokens_\w+|prompt_encoder"
)
"""Names of PEFT's parameters, each a dict of adapters: ``lora_A.default`` (`BaseTunerLayer.adapter_layer_names`)."""

_LEADING = {"ddp": "module.", "peft": "base_model.model.", "lightning": "model."}
_ANYWHERE = {
    "compile": r"(?<![^.])_orig_mod\.",
    "fsdp": r"(?<![^.])(_fsdp_wrapped_module|_checkpoint_wrapped_module)\.",
    "peft": rf"(?<![^.])base_layer\.|(?<![^.])(?P<stays>{_ADAPTERS})\.default(?![^.])",
}
PRESETS = ("ddp", "compile", "fsdp", "peft", "lightning", "weight-norm")
"""Names of frameworks: what each puts before keys, or into them, is removed. For ``weight-norm`` see `_weight_norm`."""


class Rules:
    """An ordered list of rules."""

    def __init__(self, rules: Iterable[Rule] = ()) -> None:
        self.rules = tuple(rules)

    def __add__(self, other: Rules) -> Rules:
        return Rules((*self.rules, *other.rules))

    @classmethod
    def parse(cls, source: Any) -> Rules:
        """Returns the rules in a list of dicts, a dict with ``rules``, or a shorthand.

        Full form: ``{"rules": [{"rename": "blocks.{i}.attn", "to": "layers.{i}.attention"}, ...]}``, see `KINDS`.
        Shorthands: a list of [regex, replacement] pairs, as mmengine's ``revise_keys``; a dict of names, as
        litgpt's tables (``{}`` stands for one segment), applied at once. Raises: UsageError for a wrong rule.
        """
        if isinstance(source, Rules):
            return source
        if isinstance(source, dict) and isinstance(source.get("rules"), list):
            unknown = set(source) - {"rules", "schema"}
            if unknown:
                raise UsageError(f"a rules file knows no {', '.join(sorted(map(str, unknown)))} beside rules")
            return cls(_rule(entry) for entry in source["rules"])
        if isinstance(source, dict):
            return cls([_checked("table", {"table": source})] if source else [])
        if isinstance(source, (list, tuple)):
            return cls(_rule(entry) for entry in source)
        raise UsageError("rules are a list of rules, of [regex, replacement] pairs, or a table of names")

    @classmethod
    def preset(cls, name: str) -> Rules:
        """Returns a preset's rule. Raises: UsageError for an unknown name."""
        return cls([_checked("preset", {"preset": name})])

    def entries(self) -> list[dict[str, Any]]:
        """Returns the rules as a list that `parse` takes."""
        return [
            {
                name: rule.args[name]
                for name in KINDS[rule.kind]
                if rule.args[name] != _DEFAULTS.get(rule.kind, {}).get(name, ...)
            }
            if rule.kind != "table"
            else {"table": rule.args["table"].given}
            for rule in self.rules
        ]

    def plan(self, shapes: Shapes) -> Plan:
        """Returns what the rules do to keys of these shapes, with all errors rather than only the first."""
        plan = Plan([], dict(shapes), [], [])
        for group in _together(self.rules):
            plan.add(group)
        return plan


@dataclass(slots=True)
class Plan:
    """What rules do to given keys.

    ``batches``: the steps of each rule that changes something; those of one rule are of different keys. ``after``:
    the new keys and shapes. ``unused``: the rules that match no key. ``errors``: colliding and empty names, sizes
    that do not add up; with any, the plan cannot be carried out.
    """

    batches: list[list[Step]]
    after: Shapes
    unused: list[str]
    errors: list[str]

    def add(self, group: Sequence[Rule]) -> None:
        """Adds rules of which none touches another's keys; if one of several collides, each half of them."""
        rule, unused, errors, made = group[0], list[str](), list[str](), list[Step]()
        if rule.kind == "preset":
            made, unused = _plan_presets([one.args["preset"] for one in group], self.after)
        elif rule.kind == "table":
            made, unused = rule.args["table"].plan(self.after)
        elif rule.kind == "drop":
            made, unused = _plan_drop(rule, self.after)
        else:
            for one in group:
                before = len(errors)
                steps = _PLANNERS[one.kind](one, self.after, errors)
                unused += [] if steps or len(errors) > before else [one.text]
                made += steps
        if made:
            after, collisions = advance(made, self.after)
            if collisions and len(group) > 1 and rule.kind != "preset":
                middle = len(group) // 2
                self.add(group[:middle])
                self.add(group[middle:])
                return
            self.after = after
            self.batches.append(made)
            errors += [f"{', '.join(one.text for one in group)}: {error}" for error in collisions]
        self.unused += unused
        self.errors += errors


def _together(rules: Iterable[Rule]) -> Iterator[list[Rule]]:
    """Yields presets that follow each other, and rules that name whole keys, each others: one pass does for them."""
    for are_presets, some in groupby(rules, lambda rule: rule.kind == "preset"):
        group: list[Rule] = []
        touched: set[str] = set()
        for rule in some:
            names = _named(rule)
            if group and not are_presets and not (names and touched and touched.isdisjoint(names)):
                yield group
                group, touched = [], set()
            group.append(rule)
            touched |= names
        yield group


def _named(rule: Rule) -> set[str]:
    """Returns the keys that a rule takes and makes; none if it names them by patterns."""
    given = (rule.args[name] for name in (rule.kind, "into") if name in rule.args and rule.kind in _OF_KEYS)
    texts = [text for one in given for text in ([one] if isinstance(one, str) else one)]
    return set() if any(map(_IS_PATTERN.search, texts)) else {*texts}


_OF_KEYS = frozenset({"transpose", "permute", "reshape", "split", "chunk", "cat", "weave"})
_IS_PATTERN = re.compile(r"[*?[{]|^re:")


# --- how rules are written ---------------------------------------------------------------------------------------


def _rule(entry: Any) -> Rule:
    if isinstance(entry, (list, tuple)) and len(entry) == 2 and all(isinstance(part, str) for part in entry):
        return _checked("sub", {"sub": entry[0], "by": entry[1]})
    if not isinstance(entry, dict):
        raise UsageError(f"{entry!r} is no rule")
    kinds = [kind for kind in KINDS if kind in entry]
    if len(kinds) != 1:
        like = "".join(near(str(name), KINDS) for name in entry if not kinds)
        raise UsageError(f"a rule is one of {', '.join(KINDS)}: {entry!r} is {' and '.join(kinds) or 'none'}{like}")
    return _checked(kinds[0], entry)


def _checked(kind: str, entry: Mapping[str, Any]) -> Rule:
    """Returns the rule of an entry of a rules file. Raises: UsageError for the first field that is wrong."""
    unknown = set(entry) - set(KINDS[kind])
    if unknown:
        raise UsageError(f"a {kind} rule takes {', '.join(KINDS[kind])}, not {', '.join(sorted(unknown))}")
    args = {**_DEFAULTS.get(kind, {}), **entry}
    text = "a table of names" if kind == "table" else f"{kind} {args[kind]}"
    text += f" -> {args['to']}" if "to" in args else ""
    for name, what in KINDS[kind].items():
        if (name in entry or name not in args) and not _TESTS[what](args.get(name)):
            raise UsageError(f"{text}: {name} is {what}")
    if kind in ("cat", "weave") and "" in args[kind]:
        raise UsageError(f"{text}: one of the names to put together is empty")
    if kind == "preset" and args["preset"] not in PRESETS:
        name = args["preset"]
        raise UsageError(f"no preset {name!r}{near(name, PRESETS)}; there are {', '.join(PRESETS)}")
    if kind == "sub":
        try:
            args["compiled"] = names.Regex(args["sub"])
            re.sub(args["sub"], args["by"], "")
        except (re.error, IndexError) as error:
            raise UsageError(f"{text}: {error}") from error
    if kind == "table":
        args["table"] = segments.Table(args["table"])
    if kind == "transpose" and args["dims"] is not None and len(args["dims"]) != 2:
        raise UsageError(f"{text}: dims are the two to swap; permute takes all of them")
    return Rule(kind, text, args)


def parse_option(kind: str, text: str) -> Rules:
    """Returns the rules of a command-line option: ``--rename A=B``, ``--sub s/REGEX/REPL/`` and so on."""
    if kind == "preset":
        return Rules.parse([{"preset": name.strip()} for name in text.split(",")])
    if kind == "copy":
        new, equals, old = text.partition("=")
        if not (new and equals and old):
            raise UsageError(f"--copy takes NEW=OLD, not {text!r}")
        return Rules.parse([{"copy": old, "to": new}])
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


def prefixes(keys: Iterable[str], strip: Sequence[str], add: str | None) -> Rules:
    """Returns the rules of ``--strip-prefix`` (in turn) and ``--add-prefix`` for the keys of a file.

    If no key begins with a prefix but keys without their wrappers do, the wrappers are removed first.
    """
    rules: list[dict[str, str]] = []
    for prefix in filter(None, strip):
        keys = list(keys)
        plain = [names.unwrapped(key, inside=False) for key in keys]
        if any(key.startswith(prefix) for key in plain) and not any(key.startswith(prefix) for key in keys):
            rules.append({"sub": rf"^(module\.)+|(?<![^.])({'|'.join(names.WRAPPERS)})\.", "by": ""})
            keys = plain
        rules.append({"strip_prefix": prefix})
        keys = [key.removeprefix(prefix) for key in keys]
    rules += [{"add_prefix": add}] if add else []
    return Rules.parse(rules)


# --- the steps of a rule for given keys --------------------------------------------------------------------------

Planner = Callable[[Rule, Shapes, list[str]], list[Step]]
"""Returns the steps of a rule for keys of these shapes, and adds to the list what the rule cannot do."""


def _plan_rename(rule: Rule, current: Shapes, errors: list[str]) -> list[Step]:
    moved = [(key, new) for key, new in zip(current, map(_renamer(rule), current), strict=True) if new != key]
    return [Step("rename", tuple(key for key, _ in moved), tuple(new for _, new in moved))] if moved else []


def _renamer(rule: Rule) -> Callable[[str], str]:
    """Returns the function from a key to its name under one rule that renames."""
    args = rule.args
    if rule.kind == "strip_prefix":
        return lambda key: key.removeprefix(args["strip_prefix"])
    if rule.kind == "add_prefix":
        return lambda key: f"{args['add_prefix']}{key}"
    if rule.kind == "sub":
        compiled, by = args["compiled"], args["by"]
        return lambda key: str(compiled.sub(by, key))
    return segments.renamer(args["rename"], args["to"])


def _plan_copy(rule: Rule, current: Shapes, errors: list[str]) -> list[Step]:
    renamed = segments.renamer(rule.args["copy"], rule.args["to"])
    return [Step("copy", (key,), (key, new)) for key in current if (new := renamed(key)) != key]


def _plan_presets(presets: Sequence[str], current: Shapes) -> tuple[list[Step], list[str]]:
    """Returns (the steps of presets that were given one after another, those that fit no key).

    Their order makes no difference, as what one uncovers another removes. Only ``lightning`` strips once, since a
    module's own attribute may be called ``model`` too.
    """
    keys, used = list(current), set[str]()
    for name in set(presets) & _ANYWHERE.keys():
        pattern = re.compile(_ANYWHERE[name])
        by = r"\g<stays>" if "stays" in pattern.groupindex else ""
        made = [pattern.sub(by, key) for key in keys]
        if made != keys:
            used.add(name)
            keys = made

    def stripped(keys: list[str], names: set[str], times: str) -> list[str]:
        pattern = re.compile(f"(?:{'|'.join(re.escape(_LEADING[name]) for name in names)}){times}")
        ends = [match.end() if (match := pattern.match(key)) else 0 for key in keys]
        removed = {key[:end] for key, end in zip(keys, ends, strict=True)}
        used.update(name for name in names if any(_LEADING[name] in text for text in removed))
        return [key[end:] for key, end in zip(keys, ends, strict=True)]

    wrappers = set(presets) & {"ddp", "peft"}
    keys = stripped(keys, wrappers, "+") if wrappers else keys
    if "lightning" in presets:
        keys = stripped(keys, {"lightning"}, "")
        keys = stripped(keys, wrappers, "+") if wrappers else keys
    if "ddp" in presets and "ddp" not in used:  # DataParallel around a part of the model: features.module.0.weight
        made = [re.sub(r"(?<![^.])module\.", "", key) for key in keys]
        if made != keys and len({*made}) == len(made):
            keys = made
            used.add("ddp")
    if "weight-norm" in presets and (turned := _weight_norm(keys, list(current.values()))):
        keys = [turned.get(key, key) for key in keys]
        used.add("weight-norm")
    pairs = [(old, new) for old, new in zip(current, keys, strict=True) if old != new]
    steps = [Step("rename", tuple(old for old, _ in pairs), tuple(new for _, new in pairs))] if pairs else []
    return steps, [f"preset {name}" for name in dict.fromkeys(presets) if name not in used]


def _weight_norm(keys: Sequence[str], shapes: Sequence[Shape | None]) -> dict[str, str]:
    """Returns {key: its other name} of the pairs that weight normalisation made of a weight.

    `torch.nn.utils.weight_norm` calls them ``weight_g`` and ``weight_v``, `parametrizations.weight_norm`
    ``parametrizations.weight.original0`` and ``original1``. The old names become new ones; if there are none, the
    reverse. A pair is one only if the first is a norm of the second: a size along one dimension at most.
    """
    old = r"((?:.*\.)?)(\w+)_([gv])", "{0}parametrizations.{1}.original0", "{0}parametrizations.{1}.original1"
    new = r"((?:.*\.)?)parametrizations\.(\w+)\.original([01])", "{0}{1}_g", "{0}{1}_v"
    for pattern, norm, direction in (old, new):
        pairs: dict[tuple[str, str], dict[str, tuple[str, Shape]]] = {}
        for key, shape in zip(keys, shapes, strict=True):
            if shape is not None and (match := re.fullmatch(pattern, key)):
                pairs.setdefault((match[1], match[2]), {})[match[3]] = key, shape
        found: dict[str, str] = {}
        for parts, pair in pairs.items():
            if len(pair) == 2:
                (one, size), (other, whole) = (pair[part] for part in sorted(pair))
                fits_all = len(size) == len(whole) and all(a in (1, b) for a, b in zip(size, whole, strict=True))
                if not size or (fits_all and sum(a != 1 for a in size) < 2):
                    found |= {one: norm.format(*parts), other: direction.format(*parts)}
        if found:
            return found
    return {}


def _plan_drop(rule: Rule, current: Shapes) -> tuple[list[Step], list[str]]:
    """Returns (the step, the patterns that fit no key)."""
    given = rule.args["drop"]
    fits = {pattern: _matching(pattern, current) for pattern in (given if isinstance(given, list) else [given])}
    dropped = {key for keys in fits.values() for key in keys}
    steps = [Step("drop", tuple(key for key in current if key in dropped))] if dropped else []
    return steps, [f"drop {pattern}" for pattern, keys in fits.items() if not keys]


def _matching(pattern: str, current: Shapes) -> list[str]:
    """Returns the keys that fit a pattern of `keys.matches`; one without wildcards is a key."""
    if not re.search(r"[*?[]|^re:", pattern):
        return [pattern] if pattern in current else []
    return [key for key in current if names.matches(pattern, key)]


def _plan_permute(rule: Rule, current: Shapes, errors: list[str]) -> list[Step]:
    steps = []
    for key in _matching(rule.args[rule.kind], current):
        shape = current[key]
        order = list(range(len(shape or ())))
        dims = [0, 1] if rule.args["dims"] is None and len(order) == 2 else rule.args["dims"]
        chosen = [_from_front(dim, shape) for dim in dims or ()]
        if rule.kind == "permute":
            order = chosen
        elif set(chosen) <= set(order):
            order = [dict(zip(chosen, reversed(chosen), strict=True)).get(dim, dim) for dim in order]
        else:
            order = chosen
        step = Step("permute", (key,), (key,), {"dims": order})
        if dims is not None and _is_possible(step, [shape]):
            steps.append(step)
        else:
            errors.append(f"{rule.text}: {key} has shape {_dims(shape)}, which dims {dims} does not fit")
    return steps


def _plan_reshape(rule: Rule, current: Shapes, errors: list[str]) -> list[Step]:
    steps = []
    for key in _matching(rule.args["reshape"], current):
        shape = current[key]
        to, total = list(rule.args["shape"]), prod(shape or ())
        if to.count(-1) == 1 and (rest := prod(size for size in to if size != -1)) and total % rest == 0:
            to[to.index(-1)] = total // rest
        step = Step("reshape", (key,), (key,), {"from": list(shape or ()), "to": to})
        if _is_possible(step, [shape]):
            steps.append(step)
        else:
            errors.append(f"{rule.text}: {key} has shape {_dims(shape)}, which {rule.args['shape']} does not hold")
    return steps


def _plan_split(rule: Rule, current: Shapes, errors: list[str]) -> list[Step]:
    steps = []
    renamed, parts = _renamed(rule.args[rule.kind], rule.args["into"]), len(rule.args["into"])
    dim, heads, sizes = rule.args["dim"], rule.args.get("heads"), rule.args.get("sizes")
    for key, _ in _captured(rule.args[rule.kind], current):
        shape = current[key]
        args: dict[str, Any] = {"dim": _from_front(dim, shape)}
        if heads is None:
            size = sum(_sizes([shape], args["dim"]))
            even = [size // parts] * parts if size % parts == 0 else []
            args["sizes"] = even if sizes is None else sizes
        else:
            args |= {"heads": heads, "parts": parts}
        step = Step(rule.kind, (key,), renamed(key), args)
        if _is_possible(step, [shape]):
            steps.append(step)
        else:
            what = f"{sizes or parts} pieces" if heads is None else f"{heads} heads of {parts}"
            errors.append(f"{rule.text}: {key} has shape {_dims(shape)}, dim {dim} is not {what}")
    return steps


def _plan_cat(rule: Rule, current: Shapes, errors: list[str]) -> list[Step]:
    """Puts together the keys that agree in what the names in the rule's list capture."""
    patterns = rule.args[rule.kind]
    renamed = _renamed(patterns[0], [rule.args["into"]])
    dim, heads = rule.args["dim"], rule.args.get("heads")
    groups: dict[object, dict[int, str]] = {}
    for number, pattern in enumerate(patterns):
        for key, captured in _captured(pattern, current):
            groups.setdefault(captured, {})[number] = key
    steps = []
    for members in groups.values():
        keys = [members[number] for number in sorted(members)]
        shapes = [current[key] for key in keys]
        if len(keys) < len(patterns):
            errors.append(f"{rule.text}: only {', '.join(keys)} of {len(patterns)} are there")
            continue
        if len(set(keys)) < len(keys):
            errors.append(f"{rule.text}: {keys[0]} cannot be put together with itself")
            continue
        args: dict[str, Any] = {"dim": _from_front(dim, shapes[0])}
        args |= {"sizes": _sizes(shapes, args["dim"])} if heads is None else {"heads": heads, "parts": len(keys)}
        step = Step(rule.kind, tuple(keys), renamed(keys[0]), args)
        if _is_possible(step, shapes):
            steps.append(step)
        else:
            what = f"dim {dim}" if heads is None else f"dim {dim} in {heads} heads each"
            shown = ", ".join(map(_dims, shapes))
            errors.append(f"{rule.text}: {', '.join(keys)} have shapes {shown}: they do not fit along {what}")
    return steps


def _captured(text: str, current: Shapes) -> Iterator[tuple[str, object]]:
    """Yields the keys of which all segments match a pattern of `segments.compiled`, and what its captures stand for."""
    if not _IS_PATTERN.search(text):
        yield from [(text, ())] if text in current else ()
        return
    pattern = segments.compiled(text)
    for key in current:
        if (captured := pattern.captured(key)) is not None:
            yield key, tuple(sorted(zip(pattern.captures, captured, strict=True), key=itemgetter(0)))


def _renamed(old: str, new: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    """Returns the function from a key of which all segments match ``old`` to its new names."""
    if not _IS_PATTERN.search(old):
        for name in new:
            segments.replacement(name, ())  # which says what is wrong
        return lambda key: tuple(new)
    pattern = segments.compiled(old)
    into = [segments.replacement(name, pattern.captures) for name in new]
    return lambda key: tuple(pattern.substitute(name, key) for name in into)


def _from_front(dim: int, shape: Shape | None) -> int:
    """Returns a dimension counted from the front; as it is where the shape has no such dimension."""
    return dim + len(shape) if shape and -len(shape) <= dim < 0 else dim


def _sizes(shapes: Sequence[Shape | None], dim: int) -> list[int]:
    """Returns the size of each shape along ``dim``; none for a shape without that dimension."""
    return [shape[dim] for shape in shapes if shape and 0 <= dim < len(shape)]


def _is_possible(step: Step, shapes: Sequence[Shape | None]) -> bool:
    return is_sound(step) and fits(step, shapes)


def _dims(shape: Shape | None) -> str:
    return "none (no tensor)" if shape is None else str(list(shape))


_PLANNERS: Mapping[str, Planner] = {
    **dict.fromkeys(("strip_prefix", "add_prefix", "rename", "sub"), _plan_rename),
    **dict.fromkeys(("transpose", "permute"), _plan_permute),
    **dict.fromkeys(("split", "chunk"), _plan_split),
    **dict.fromkeys(("cat", "weave"), _plan_cat),
    "copy": _plan_copy,
    "reshape": _plan_reshape,
}
