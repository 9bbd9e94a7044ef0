"""A schema of patterns: the keys, shapes, dtypes and metadata that a checkpoint has to have, in TOML, for CI.

    schema = 1
    unlisted = false                    # keys that no rule names may not be there; the default
    forbidden = ["*.lora_*"]
    metadata = { format = "pt", license = "*" }

    [sizes]                             # a name that is not given here stands for any one size
    hidden = 768

    [keys]
    "layers.{i}.attn.weight" = { shape = ["hidden", "?"], dtype = "float32", i = "0..11" }
    "head.*" = { dtype = ["float32", "bfloat16"], count = { min = 1, max = 2 } }

A rule is for the keys that its pattern fits: with captures like ``{i}`` as in `remap`, else a glob or ``re:REGEX``, and
always the very key. It holds for every key that it fits, and for one at least unless ``count`` says otherwise. A field
named as a capture says which numbers that is, each of which must be there.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice, pairwise, product
from math import prod
from typing import Any, NamedTuple

from ckptool.core import keys as names
from ckptool.core.checkpoint import Checkpoint
from ckptool.core.dtypes import DTYPES, lookup
from ckptool.core.tensor import TensorInfo
from ckptool.core.tree import brief, path_text
from ckptool.errors import FormatError, UsageError, near
from ckptool.ops import segments
from ckptool.ops.notes import pattern_notes, require_tensors, root_notes
from ckptool.references import toml
from ckptool.text import dims

VERSION = 1
_TOP = ("schema", "unlisted", "forbidden", "metadata", "sizes", "keys")
_FIELDS = ("shape", "dtype", "count")
_NAME = re.compile(r"[A-Za-z_]\w{0,99}", re.ASCII)
_NUMBER = re.compile(r"0|[1-9]\d{0,8}", re.ASCII)
_CAPTURE = re.compile(r"\{(\w+)\}")
_WILD = re.compile(r"[*?\[{]|^re:")

MOST_NUMBERS = 1_000_000
"""How many numbers a capture may have."""

SHOWN = 20
"""Most missing keys of one rule that are named."""


class Rule(NamedTuple):
    """What the keys that ``pattern`` fits must have. ``shape``: sizes, names of sizes and "?"; None: any.

    ``dtypes``: () for any. ``least`` and ``most``: how many keys. ``numbers``: {capture: its ranges, first to last}.
    """

    pattern: str
    shape: tuple[int | str, ...] | None
    dtypes: tuple[str, ...]
    least: int
    most: int | None
    numbers: Mapping[str, Sequence[tuple[int, int]]]


@dataclass(frozen=True, slots=True)
class Schema:
    """A whole schema; ``metadata``: {name: glob of its value}."""

    rules: Sequence[Rule]
    sizes: Mapping[str, int]
    forbidden: Sequence[str]
    metadata: Mapping[str, str]
    unlisted: bool


@dataclass(frozen=True, slots=True)
class Failure:
    """A rule that a key does not meet."""

    kind: str
    """missing, count, shape, dtype, unlisted, forbidden or metadata."""
    rule: str
    """The rule's pattern, or the name of the metadata; empty for an unlisted key."""
    key: str | None
    """The key; null where none is meant."""
    expected: str
    """What the rule wants."""
    found: str
    """What is there."""


@dataclass(frozen=True, slots=True)
class SchemaReport:
    """Which rules of a schema are not met."""

    same: bool
    """Nothing fails."""
    equal: int
    """Keys that fail no rule."""
    failures: list[Failure]
    """The rules that are not met, with the keys."""
    sizes: dict[str, int]
    """{name of a size in the schema: what it is in this file}."""
    bookkeeping: list[str] = field(default_factory=list)
    """The num_batches_tracked that are missing or unlisted, which is no failure."""
    notes: list[str] = field(default_factory=list)
    """What else was noticed."""
    path: str = ""
    """The path of the checkpoint."""
    rules: str = ""
    """The path of the schema."""

    @property
    def fails(self) -> list[str]:
        """Returns the kinds of failures, as of `DiffReport`."""
        return list(dict.fromkeys(failure.kind for failure in self.failures))


# --- reading -----------------------------------------------------------------------------------------------------


def read(path: str | os.PathLike[str]) -> Schema:
    """Returns the schema in a TOML file. Raises: UnreadableError; FormatError that says what is wrong, and where."""
    return toml.read(path, "a schema", parse)


def parse(data: Mapping[str, Any]) -> Schema:
    """Returns the schema that a table is. Raises: FormatError that says what is wrong, and where."""
    toml.known(data, _TOP)
    if data.get("schema") != VERSION or data["schema"] is True:
        found = f"found {brief(data['schema'])}" if "schema" in data else "found none"
        raise FormatError(f"schema: expected the version, schema = {VERSION}, {found}")
    sizes = toml.field(data, "sizes", dict, {}, "a table of names and sizes")
    for name, size in sizes.items():
        if not _NAME.fullmatch(name) or not _is_size(size):
            raise FormatError(f"sizes.{brief(name)}: expected a name and its size, found {brief(size)}")
    metadata = data.get("metadata", {})
    if isinstance(metadata, list):
        metadata = dict.fromkeys(map(str, metadata), "*")
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise FormatError('metadata: expected names, or a table { name = "glob" }')
    rules = [
        _rule(pattern, given) for pattern, given in toml.field(data, "keys", dict, {}, "a table of patterns").items()
    ]
    used = {name for rule in rules for name in rule.shape or () if isinstance(name, str)}
    for name in sizes:
        if name not in used:
            raise FormatError(f"sizes.{name}: expected a name that a shape has{near(name, used)}")
    return Schema(
        rules, sizes, _patterns(data.get("forbidden", []), "forbidden"), metadata,
        toml.field(data, "unlisted", bool, False, "true or false"),
    )  # fmt: skip


def _patterns(given: Any, where: str) -> list[str]:
    if not isinstance(given, list) or not all(isinstance(text, str) for text in given):
        raise FormatError(f"{where}: expected a list of patterns, found {brief(given)}")
    for text in given:
        _test(text, {}, where)
    return given


def _is_size(value: object) -> bool:
    return type(value) is int and value >= 0


def _rule(pattern: str, given: Any) -> Rule:
    where = f"keys.{brief(pattern)}"
    captures = list(dict.fromkeys(_CAPTURE.findall(pattern)))
    if not isinstance(given, dict):
        raise FormatError(f"{where}: expected a table {{ shape = [...], dtype = ... }}, found {brief(given)}")
    for name, value in given.items():
        if isinstance(value, dict) and name not in (*_FIELDS, *captures):
            raise FormatError(f'{where}: expected a pattern with dots in quotes: "{pattern}.{name}"')
    toml.known(given, (*_FIELDS, *captures), where)
    numbers = {name: _numbers(given[name], f"{where}.{name}") for name in captures if name in given}
    if _WILD.search(pattern):
        _test(pattern, numbers, where)
    shape = given.get("shape")
    if "shape" in given and not isinstance(shape, list):
        raise FormatError(f'{where}.shape: expected a list of sizes, names and "?", found {brief(shape)}')
    for size in shape or ():
        if not (_is_size(size) or size == "?" or (isinstance(size, str) and _NAME.fullmatch(size))):
            raise FormatError(f'{where}.shape: expected a size, a name or "?", found {brief(size)}')
    wanted = given.get("dtype", [])
    dtypes = [_dtype(name, f"{where}.dtype") for name in (wanted if isinstance(wanted, list) else [wanted])]
    all_numbers = len(numbers) == len(captures) > 0
    total = prod(sum(last - first + 1 for first, last in ranges) for ranges in numbers.values()) if all_numbers else 1
    least, most = _count(given.get("count", {}), f"{where}.count", total, all_numbers)
    return Rule(pattern, None if shape is None else tuple(shape), tuple(dtypes), least, most, numbers)


def _dtype(given: Any, where: str) -> str:
    if not isinstance(given, str):
        raise FormatError(f"{where}: expected a dtype, found {brief(given)}")
    try:
        return lookup(given).name
    except UsageError as error:
        raise FormatError(f"{where}: expected a dtype, found {brief(given)}{near(given, DTYPES)}") from error


def _count(given: Any, where: str, total: int, exact: bool) -> tuple[int, int | None]:
    """Returns (least, most) of ``count``: a number, or a table; ``total`` keys are wanted where it does not say."""
    if type(given) is int:
        given = {"min": given, "max": given}
    if not isinstance(given, dict):
        raise FormatError(f"{where}: expected a number or {{ min = 1, max = 2 }}, found {brief(given)}")
    toml.known(given, ("min", "max"), where)
    least, most = given.get("min", 0 if "max" in given else total), given.get("max", total if exact else None)
    if not _is_size(least) or not (most is None or (_is_size(most) and most >= least)):
        raise FormatError(f"{where}: expected numbers from 0 on, min not above max, found {brief(given)}")
    return least, most


def _numbers(given: Any, where: str) -> list[tuple[int, int]]:
    """Returns the ranges that ``0..3,7`` means."""
    ranges = []
    for part in given.split(",") if isinstance(given, str) else [""]:
        first, _, last = part.strip().partition("..")
        if not _NUMBER.fullmatch(first) or not _NUMBER.fullmatch(last or first) or int(last or first) < int(first):
            raise FormatError(f'{where}: expected numbers such as "0..11" or "0..3,7", found {brief(given)}')
        ranges.append((int(first), int(last or first)))
    if any(one[1] >= other[0] for one, other in pairwise(ranges)):
        raise FormatError(f"{where}: expected numbers in order, each once, found {brief(given)}")
    if sum(last - first for first, last in ranges) > MOST_NUMBERS:
        raise FormatError(f"{where}: expected at most {MOST_NUMBERS:,} numbers, found {brief(given)}")
    return ranges


# --- matching ----------------------------------------------------------------------------------------------------


def _test(pattern: str, numbers: Mapping[str, Sequence[tuple[int, int]]], where: str) -> Callable[[str], bool]:
    """Returns the test whether a pattern fits a key. Raises: FormatError for what is no pattern."""
    try:
        if not re.search(r"\{\w*\}", pattern) or pattern.startswith("re:"):
            names.chooser([pattern], ())  # compiles it
            return lambda key: key == pattern or names.matches(pattern, key)
        found = segments.compiled(pattern.replace("{}", "*"))
    except UsageError as error:
        raise FormatError(f"{where}: {error.message}") from error

    def test(key: str) -> bool:
        captured = found.captured(key)
        if captured is None or not numbers:
            return captured is not None
        named = ((numbers.get(capture[1:-1]), text) for capture, text in zip(found.captures, captured, strict=True))
        return all(ranges is None or _within(text, ranges) for ranges, text in named)

    return test


def _within(text: str, ranges: Sequence[tuple[int, int]]) -> bool:
    return _NUMBER.fullmatch(text) is not None and any(first <= int(text) <= last for first, last in ranges)


def _fitting(rules: Sequence[Rule], keys: Mapping[str, str]) -> list[list[str]]:
    """Returns for each rule the keys that it fits, as they are or without wrappers: {key: key without}."""
    bare = {plain: key for key, plain in keys.items()} | {key: key for key in keys}
    fitting = []
    for rule in rules:
        if not _WILD.search(rule.pattern):
            fitting.append([bare[rule.pattern]] if rule.pattern in bare else [])
            continue
        test = _test(rule.pattern, rule.numbers, rule.pattern)
        fitting.append([key for key, plain in keys.items() if test(key) or (plain != key and test(plain))])
    return fitting


# --- checking ----------------------------------------------------------------------------------------------------


def check(
    schema: Schema, checkpoint: Checkpoint, *, ignore: Sequence[str] = (), strip_prefix: Sequence[str] = ()
) -> SchemaReport:
    """Returns which rules of a schema a checkpoint does not meet, with the keys.

    Keys that fit ``ignore`` are left out; each prefix of ``strip_prefix`` is taken off first.
    Raises: NoTensorsError, CollisionError.
    """
    tensors = {**require_tensors(checkpoint), **checkpoint.inside()}
    chosen = names.chooser((), ignore)
    renamed = names.renamed(tensors, strip_prefix, None, checkpoint.url)
    named = {name: tensors[key] for name, key in renamed.items() if not ignore or (chosen(name) and chosen(key))}
    notes = [*root_notes([checkpoint]), *pattern_notes(ignore, [*renamed, *tensors], "--ignore ")]
    notes += [f"ignored: {len(tensors) - len(named)} keys"] if len(named) < len(tensors) else []
    plain = names.looking_through(named)
    fitting = _fitting(schema.rules, {name: plain(name) for name in named})
    failures: list[Failure] = []
    sizes = _sizes(schema, fitting, named)
    for rule, keys in zip(schema.rules, fitting, strict=True):
        failures += _counted(rule, keys, list(map(plain, keys)))
        for key in keys:
            failures += _compared(rule, key, named[key], sizes)
    known = {key for keys in fitting for key in keys}
    for pattern in schema.forbidden:
        test = _test(pattern, {}, "forbidden")
        failures += [Failure("forbidden", pattern, key, "no such key", _form(one)) for key, one in named.items()
                     if test(key) or test(plain(key))]  # fmt: skip
    known |= {str(failure.key) for failure in failures if failure.kind == "forbidden"}
    if not schema.unlisted:
        failures += [Failure("unlisted", "", key, "no key beyond the rules", _form(one)) for key, one in named.items()
                     if key not in known]  # fmt: skip
    failures += _metadata(schema.metadata, checkpoint)
    lenient = [one for one in failures if one.kind in ("missing", "unlisted", "count") and
               names.is_counter(one.key or one.rule)]  # fmt: skip
    failures = [one for one in failures if one not in lenient] if lenient else failures
    failing = {failure.key for failure in failures}
    return SchemaReport(
        not failures, sum(key not in failing for key in named), failures,
        {name: size for name, (size, _) in sizes.items()}, [one.key or one.rule for one in lenient], notes,
        checkpoint.url,
    )  # fmt: skip


def _form(tensor: TensorInfo) -> str:
    return f"{dims(tensor.shape)} {tensor.dtype}"


def _counted(rule: Rule, keys: Sequence[str], plain: Sequence[str]) -> list[Failure]:
    """Returns the failures of a rule that fits too many keys, or too few: those missing, where it says their names."""
    if len(keys) >= rule.least and (rule.most is None or len(keys) <= rule.most):
        return []
    if len(keys) < rule.least and (wanted := _wanted(rule)) is not None:
        there = {*keys, *plain}
        lacking = list(islice((key for key in wanted if key not in there), SHOWN + 1))
        if len(lacking) <= SHOWN:
            return [Failure("missing", rule.pattern, key, "this key", "none") for key in lacking]
    least = str(rule.least) if rule.most == rule.least else f"{rule.least} or more"
    expected = least if rule.most in (None, rule.least) else f"{rule.least} to {rule.most}"
    return [Failure("count", rule.pattern, None, f"{expected} keys", str(len(keys)))]


def _wanted(rule: Rule) -> Iterator[str] | None:
    """Returns the keys that a rule wants, if it says them: its pattern, or that with all numbers in place."""
    if not _WILD.search(rule.pattern):
        return iter([rule.pattern])
    captures = list(dict.fromkeys(_CAPTURE.findall(rule.pattern)))
    if not captures or len(rule.numbers) < len(captures) or re.search(r"[*]|^re:", rule.pattern):
        return None
    numbers = ([one for first, last in rule.numbers[name] for one in range(first, last + 1)] for name in captures)

    def key(values: tuple[int, ...]) -> str:
        row = dict(zip(captures, values, strict=True))
        return _CAPTURE.sub(lambda match: str(row[match[1]]), rule.pattern)

    return map(key, product(*numbers))


def _sizes(
    schema: Schema, fitting: Sequence[Sequence[str]], named: Mapping[str, TensorInfo]
) -> dict[str, tuple[int, str]]:
    """Returns {name: (its size, where it is from)}: what the schema gives, else the size that most tensors have."""
    found = {name: (size, "[sizes]") for name, size in schema.sizes.items()}
    votes: dict[str, Counter[int]] = {}
    first: dict[tuple[str, int], str] = {}
    for rule, keys in zip(schema.rules, fitting, strict=True):
        names_at = [(at, one) for at, one in enumerate(rule.shape or ()) if isinstance(one, str) and one != "?"]
        for key in keys if names_at else ():
            shape = named[key].shape
            if shape is None or len(shape) != len(rule.shape or ()):
                continue
            for at, name in names_at:
                votes.setdefault(name, Counter())[shape[at]] += 1
                first.setdefault((name, shape[at]), key)
    for name, counts in votes.items():
        ((size, _),) = counts.most_common(1)
        found.setdefault(name, (size, first[name, size]))
    return found


def _compared(rule: Rule, key: str, tensor: TensorInfo, sizes: Mapping[str, tuple[int, str]]) -> list[Failure]:
    """Returns how a tensor differs from its rule."""
    failures = []
    if rule.dtypes and tensor.dtype not in rule.dtypes:
        failures.append(Failure("dtype", rule.pattern, key, " or ".join(rule.dtypes), tensor.dtype))
    shape = tensor.shape
    if rule.shape is None or (names.is_counter(key) and {rule.shape, shape} <= {(), (1,)}):
        return failures
    sized = [sizes[one][0] if isinstance(one, str) and one in sizes else one for one in rule.shape]
    if shape is not None and len(shape) == len(sized) and all(a in ("?", b) for a, b in zip(sized, shape, strict=True)):
        return failures
    wanted_names = [one for one in dict.fromkeys(rule.shape) if isinstance(one, str) and one in sizes]
    said = [f"{name} = {sizes[name][0]} of {sizes[name][1]}" for name in wanted_names]
    text = "x".join(map(str, rule.shape)) or "scalar"
    text = " x ".join(map(str, rule.shape)) if any(isinstance(one, str) for one in rule.shape) else text
    expected = f"{text} ({', '.join(said)})" if said else text
    return [*failures, Failure("shape", rule.pattern, key, expected, dims(shape))]


def _metadata(wanted: Mapping[str, str], checkpoint: Checkpoint) -> list[Failure]:
    """Returns the failures of metadata: safetensors', or values beside the weights by their paths."""
    if not wanted:
        return []
    there = {
        path_text(path): str(value)
        for path, key, value in checkpoint.beside()
        if key is None and isinstance(value, (str, int, float))
    }
    there.update(checkpoint.metadata)
    return [
        Failure("metadata", name, None, text, brief(there[name]) if name in there else "none")
        for name, text in wanted.items()
        if name not in there or not names.matches(text, there[name])
    ]
