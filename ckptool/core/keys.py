"""Keys of tensors: wrapper prefixes, patterns, counters, and numbered blocks folded into one line for display."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from fnmatch import translate
from functools import lru_cache, partial
from itertools import takewhile
from math import prod
from time import monotonic
from typing import Any, TypeVar

from ckptool.errors import CollisionError, UsageError, kind_of, listed, near
from ckptool.limits import MAX_MATCH

WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""Segments that torch.compile, FSDP and activation checkpointing put anywhere in a name.

``module``, which DataParallel and DistributedDataParallel put before what they wrap, is one too: see `looking_through`.
"""

ROOTS = (
    "state_dict", "model_state_dict", "model_state", "model", "module", "net", "network", "generator", "params",
    "weights",
)  # fmt: skip
"""Names under which training scripts and frameworks keep the weights, first match first."""

EMA = ("state_dict_ema", "model_ema", "ema", "params_ema", "ema_state_dict")
"""Names of an exponential moving average of the weights: other values, used only where --root names them."""

COUNTER = "num_batches_tracked"
"""BatchNorm's buffer since torch 0.4.1, which older files lack: a model can do without it."""


def is_counter(key: str) -> bool:
    """Returns whether a key is a BatchNorm's num_batches_tracked."""
    return key.rpartition(".")[2] == COUNTER


def unwrapped(key: str, *, inside: bool = True) -> str:
    """Returns a key without wrapper segments, in any order and at any depth; not ``inside``: ``module`` in front only.

    >>> unwrapped("module._orig_mod.layers.0._checkpoint_wrapped_module.w"), unwrapped("features.module.0.w")
    ('layers.0.w', 'features.0.w')
    """
    if "module" not in key and "_orig_mod" not in key:
        return key
    kept: list[str] = []
    *path, last = key.split(".")
    for segment in path:
        if segment in WRAPPERS or (segment == "module" and (inside or not kept)):
            continue
        kept.append(segment)
    return ".".join([*kept, last])


def looking_through(*sides: Collection[str]) -> Callable[[str], str]:
    """Returns the function that takes wrappers off keys to compare them: as many as leave each side's keys unique.

    That is all, else all but a ``module`` inside a name (which may be the model's own), else none.
    """
    for plain in (unwrapped, partial(unwrapped, inside=False)):
        if all(len(set(map(plain, keys))) == len(keys) for keys in sides):
            return plain
    return str


def unwrap_all(keys: Collection[str]) -> dict[str, str]:
    """Returns {unwrapped key: key}, with as many wrappers taken off as leave the keys unique."""
    plain = looking_through(keys)
    return {plain(key): key for key in keys}


def wrapper_of(keys: Collection[str], plain: Callable[[str], str] | None = None) -> str:
    """Returns the wrapper segments that ``plain`` takes off these keys, for display: ``module.``; "" for none.

    By default ``plain`` is what `looking_through` gives for the keys themselves.
    """
    plain = plain or looking_through(keys)
    wrapped = [key for key in keys if plain(key) != key]
    segments = (part for key in wrapped for part in key.split(".")[:-1] if part in WRAPPERS or part == "module")
    return "".join(f"{segment}." for segment in dict.fromkeys(segments))


def common_prefix(keys: Sequence[str]) -> str:
    """Returns the leading whole segments that all keys share, with the final dot; "" for none or a single key."""
    if len(keys) < 2:
        return ""
    pairs = zip(min(keys).split(".")[:-1], max(keys).split(".")[:-1], strict=False)
    return "".join(f"{segment}." for segment, other in takewhile(lambda pair: pair[0] == pair[1], pairs))


def cut(key: str, depth: int, behind: str = "") -> str:
    """Returns the first ``depth`` segments of a key that follow ``behind``, with it; the key, if it has no more.

    >>> cut("model.layer1.0.conv.weight", 2, "model."), cut("fc.weight", 3)
    ('model.layer1.0', 'fc.weight')
    """
    return behind + ".".join(key[len(behind) :].split(".", depth)[:depth])


_Found = TypeVar("_Found")


class Regex:
    """A regular expression of a user, or of a file of rules: matching it takes `MAX_MATCH` seconds at most.

    The time that Python's ``re`` takes is bounded by nothing: ``(a+)+$`` takes years for 50 letters. It looks for
    signals meanwhile, so an alarm ends it. That costs 3 us, and is for patterns with a repeated group or several
    repetitions, and for long keys. Other threads have no alarm: there a repeated group that may match in many ways,
    and twenty repetitions, are refused. The seconds of slow matches add up, so that many keys do not take many times
    as long. An alarm that was set before is late by as much.
    """

    def __init__(self, text: str) -> None:
        self.text, self.spent = text, 0.0
        self._regex = re.compile(text)
        repeats = re.findall(r"[*+{|]", text)
        self._group = re.search(r"\)[*+{]", text) is not None
        optional = len(re.findall(r"(?<![(*+?}])[?]", text))  # each doubles the ways, and `(?:` and `*?` are none
        self._nested = (self._group and len(repeats) > 1) or optional + len(repeats) - repeats.count("|") > 20
        often = self._group or len(repeats) > 2 or optional > 8
        self._longest = 0 if often else 150 if repeats else None

    def search(self, key: str) -> re.Match[str] | None:
        """Returns what `re.Pattern.search` does. Raises: LimitError, UsageError."""
        if self._longest is None or len(key) < self._longest:
            return self._regex.search(key)
        return self._bounded(lambda: self._regex.search(key))

    def sub(self, by: str, key: str) -> str:
        """Returns what `re.Pattern.sub` does. Raises: LimitError, UsageError."""
        if self._longest is None or len(key) < self._longest:
            return self._regex.sub(by, key)
        return self._bounded(lambda: self._regex.sub(by, key))

    def _bounded(self, job: Callable[[], _Found]) -> _Found:
        import signal
        import threading

        here = threading.current_thread() is threading.main_thread() and hasattr(signal, "setitimer")
        if not here or signal.getsignal(signal.SIGALRM) is None:  # None: another language's, which cannot be put back
            if self._nested:
                what = "repeats what may match in many ways, and no alarm could end that here"
                raise UsageError(f"the pattern {self.text!r} {what}: repeat less in it, or call from the main thread")
            return job()
        left = MAX_MATCH.now() - self.spent

        def late(*_: object) -> None:
            self.spent = float(MAX_MATCH.now())
            what = f"matching the pattern {self.text!r} takes long: a repetition in it may match in many ways"
            raise MAX_MATCH.passed(what)

        old = signal.signal(signal.SIGALRM, late)
        begin = monotonic()
        others, interval = signal.setitimer(signal.ITIMER_REAL, max(left, 0.001))
        try:
            return job()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)  # neither handler gets the other's alarm
            took = monotonic() - begin
            signal.signal(signal.SIGALRM, old)
            signal.setitimer(signal.ITIMER_REAL, max(others - took, 0.001) if others else 0, interval)
            self.spent += took if took > 0.01 else 0


@lru_cache(maxsize=512)
def _compiled(pattern: str) -> re.Pattern[str] | Regex:
    try:
        return Regex(pattern[3:]) if pattern.startswith("re:") else re.compile(translate(pattern))
    except re.error as error:
        raise UsageError(f"the pattern {pattern!r} is no regular expression: {error}") from error


def matches(pattern: str, key: str) -> bool:
    """Returns whether a key matches a glob (``layer1.*``: all of it) or contains a match of a regex (``re:...``)."""
    compiled = _compiled(pattern)
    return bool(compiled.search(key) if isinstance(compiled, Regex) else compiled.match(key))


def fits(pattern: str, key: str) -> bool:
    """Returns whether a pattern matches a key, or the key without its wrappers."""
    return matches(pattern, key) or matches(pattern, unwrapped(key))


def chooser(include: Sequence[str], exclude: Sequence[str]) -> Callable[[str], bool]:
    """Returns the test for keys that fit an ``include`` pattern (any key, if there is none) and no ``exclude`` one."""
    for pattern in (*include, *exclude):
        _compiled(pattern)

    def chosen(key: str) -> bool:
        wanted = not include or any(fits(pattern, key) for pattern in include)
        return wanted and not any(fits(pattern, key) for pattern in exclude)

    return chosen


def unused_patterns(patterns: Iterable[str], keys: Iterable[str]) -> list[str]:
    """Returns the patterns that fit no key, to warn of: each is most likely a typing error."""
    listed = list(keys)
    return [pattern for pattern in patterns if not any(fits(pattern, key) for key in listed)]


def near_pattern(pattern: str, keys: Iterable[str], part: bool = False) -> str:
    """Returns `` (did you mean head.*?)`` for a pattern that fits no key, if one like it fits some; "" if none does.

    With ``part`` it need not fit the whole key, and ``{i}`` stands for any segment, as in rules.

    >>> near_pattern("haed.*", ["head.weight"]), near_pattern("head.*", ["net.head.weight"])
    (' (did you mean head.*?)', ' (did you mean *.head.*?)')
    """
    import difflib

    if pattern.startswith("re:"):
        return ""
    listed = list(keys)

    def any_fits(tried: str) -> bool:
        whole = "*" + re.sub(r"[{]\w*[}]", "*", tried) + "*" if part else tried
        return any(fits(whole, key) for key in listed)

    words = list(dict.fromkeys(word for key in listed for word in re.split(r"[./]", key)))[:1000]

    def like(found: re.Match[str]) -> str:
        close = difflib.get_close_matches(found[0], words, 1)
        return close[0] if close else found[0]

    likely = re.sub(r"[^./*?[\]{}]+", like, pattern[:400])
    for other in (likely, f"{likely.rstrip('.')}.*", f"*.{pattern}", pattern.partition(".")[2]):
        if other.strip("*.") and any_fits(other):
            return f" (did you mean {other}?)"
    return ""


def is_empty(name: str) -> bool:
    """Returns whether a name is empty, or has an empty segment: what a prefix without its dot would leave."""
    return not name or name[0] == "." or name[-1] == "." or ".." in name


def renamed(keys: Iterable[str], strip: Sequence[str], add: str | None, where: str) -> dict[str, str]:
    """Returns {name: key in the file ``where``}, with each prefix of ``strip`` removed in turn, and ``add`` prepended.

    A key has a prefix if it begins with it, or does so without its wrappers.
    Raises: UsageError if no key has a prefix, CollisionError if two keys become one or a name has an empty segment.
    """
    made = {key: key for key in keys}
    if not (add or any(strip)):
        return made
    plain = looking_through(made)
    for prefix in filter(None, strip):
        after = {key: _stripped(name, prefix, plain) for key, name in made.items()}
        wrapper = unwrapped(f"{prefix}_") == "_" and any(prefix in key for key in made)  # looked through already
        if after == made and not wrapper:
            raise UsageError(f"no key begins with {prefix!r}{near_pattern(prefix, made, part=True)}", where)
        made = after
    found: dict[str, str] = {}
    errors = []
    for key, name in made.items():
        name = f"{add or ''}{name}"
        if name != key and is_empty(name) and not is_empty(key):
            errors.append(f"{key} would be {name!r}: an empty name")
        elif name in found:
            errors.append(f"{found[name]} and {key} would both be {name}")
        found[name] = key
    if errors:
        raise CollisionError(f"with these prefixes {listed(errors)}", where)
    return found


def _stripped(name: str, prefix: str, plain: Callable[[str], str]) -> str:
    if not name.startswith(prefix):
        bare = plain(name)
        if not bare.startswith(prefix):
            return name
        name = bare
    return name[len(prefix) :]


def moves(old: str, new: str) -> Iterator[tuple[str, str]]:
    """Yields the prefixes that differ, from the shortest that explain two names on: each is a module's.

    >>> [*moves("net.layer1.conv.weight", "net.stage1.conv.weight")]
    [('net.layer1', 'net.stage1'), ('net.layer1.conv', 'net.stage1.conv')]
    """
    one, other = old.split("."), new.split(".")
    common = 0
    while common < min(len(one), len(other)) and one[-1 - common] == other[-1 - common]:
        common += 1
    for kept in range(common, 0, -1):
        yield ".".join(one[: len(one) - kept]), ".".join(other[: len(other) - kept])


def likely_prefixes(sources: Collection[str], targets: Collection[str]) -> list[tuple[str, str]]:
    """Returns up to eight (prefix to strip from the sources, prefix to add) that would make most of them targets.

    Of each source the longest suffix (at a "." or "/") that is one of at most four targets votes for these pairs.
    """
    ends = {suffix for source in sources for _, suffix in _splits(source)}
    by_suffix: dict[str, list[str]] = {}
    for target in targets:
        for prefix, suffix in _splits(target):
            if suffix in ends:
                by_suffix.setdefault(suffix, []).append(prefix)
    votes: dict[tuple[str, str], int] = {}
    for source in sources:
        for prefix, suffix in _splits(source):
            found = by_suffix.get(suffix, ())
            if 0 < len(found) <= 4:
                for pair in ((prefix, added) for added in found):
                    votes[pair] = votes.get(pair, 0) + 1
                break
    return sorted(votes, key=lambda pair: (-votes[pair], len(pair[0]) + len(pair[1])))[:8]


def _splits(key: str) -> list[tuple[str, str]]:
    """Returns (prefix, suffix) at every dot and slash, the whole key first."""
    return [(key[:at], key[at:]) for at in (0, *(mark.end() for mark in re.finditer(r"[./]", key)))]


def number_ranges(numbers: Iterable[int]) -> str:
    """Returns numbers as ranges, for display.

    >>> number_ranges([0, 1, 2, 3, 7])
    '{0..3,7}'
    >>> number_ranges([4])
    '4'
    """
    ordered = sorted(set(numbers))
    runs: list[list[int]] = []
    for number in ordered:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    parts = [str(a) if a == b else f"{a}..{b}" if b > a + 1 else f"{a},{b}" for a, b in runs]
    return parts[0] if len(ordered) == 1 else "{" + ",".join(parts) + "}"


def natural(name: str) -> list[Any]:
    """Returns a key for natural sorting: numbers by value, that is, by length and then by digits.

    >>> sorted(["layers.10.w", "layers.2.w", "bias"], key=natural)
    ['bias', 'layers.2.w', 'layers.10.w']
    """
    parts = re.split(r"(\d+)", name)
    digits = [part.lstrip("0") for part in parts[1::2]]
    return [
        *parts[:1],
        *(step for number, text in zip(digits, parts[2::2], strict=True) for step in ((len(number), number), text)),
    ]


def fold(rows: Sequence[tuple[str, object]]) -> list[tuple[str, list[int]]]:
    """Returns alike keys as one: (``layers.{0..11}.norm.{weight,bias}``, positions of the rows it covers).

    Alike are tensors of one module, and keys that differ only in numbers. ``rows`` are (key, value): only rows of
    equal values fold, so the folded line is true of each of its keys. The groups are in the order of their first rows.
    """
    modules = _siblings(rows)
    folded = numbered([(name, (equal, len(members))) for name, equal, members in modules])
    return [(name, sorted(member for at in positions for member in modules[at][2])) for name, positions in folded]


def ranges(keys: Iterable[str]) -> list[str]:
    """Returns keys for a message, those that differ only in numbers as one: ``layers.{0..11}.w``."""
    return [name for name, _ in numbered([(key, None) for key in keys])]


SIBLINGS = 8
"""Most tensors of one module that are shown as one: a line of more names is longer than it is clear."""


def _siblings(rows: Sequence[tuple[str, object]]) -> list[tuple[str, object, list[int]]]:
    """Returns (``norm.{weight,bias}``, their value, their positions) of the tensors of a module that have equal values.

    Names with numbers stay, to fold over the modules' numbers with their own.
    """
    groups: dict[tuple[str, object], dict[str, int]] = {}
    alone: list[tuple[str, object, list[int]]] = []
    for position, (key, equal) in enumerate(rows):
        parent, dot, leaf = key.rpartition(".")
        group = groups.setdefault((parent + dot, equal), {})
        if leaf in group or not _is_word(leaf):
            alone.append((key, equal, [position]))
        else:
            group[leaf] = position
    for (parent, equal), leaves in groups.items():
        if 1 < len(leaves) <= SIBLINGS:
            alone.append((f"{parent}{{{','.join(leaves)}}}", equal, [*leaves.values()]))
        else:
            alone += [(parent + leaf, equal, [position]) for leaf, position in leaves.items()]
    return sorted(alone, key=lambda row: row[2][0])


_is_word = re.compile("[A-Za-z_]+").fullmatch


def numbered(rows: Sequence[tuple[str, object]]) -> list[tuple[str, list[int]]]:
    """Returns keys that differ only in numbers as one: (``layers.{0..11}.w``, positions of the rows it covers)."""
    parts = [re.split(r"(?<!\d)(0|[1-9]\d{0,8})(?!\d)", key) for key, _ in rows]
    groups: dict[tuple[tuple[str, ...], object], list[int]] = {}
    for position, (pieces, (_, equal)) in enumerate(zip(parts, rows, strict=True)):
        groups.setdefault((tuple(pieces[::2]), equal), []).append(position)
    folded: list[tuple[str, list[int]]] = []
    for (frame, _), positions in groups.items():
        columns = [{*column} for column in zip(*(parts[position][1::2] for position in positions), strict=True)]
        # Where a combination of the numbers is missing only the last number folds.
        fixed = 0 if prod(map(len, columns)) == len(positions) else max(len(columns) - 1, 0)
        by_fixed: dict[tuple[str, ...], list[int]] = {}
        for position in positions:
            by_fixed.setdefault(tuple(parts[position][1 : 2 * fixed : 2]), []).append(position)
        for numbers, members in by_fixed.items():
            ends = columns if not fixed else [{parts[position][-2] for position in members}]
            shown = [*numbers, *(number_ranges(map(int, values)) for values in ends)]
            text = "".join(number + piece for number, piece in zip(shown, frame[1:], strict=True))
            folded.append((frame[0] + text, members))
    folded.sort(key=lambda group: group[1][0])
    return folded


# --- arguments of the library ------------------------------------------------------------------------------------


def texts(given: str | Sequence[str] | None, name: str) -> list[str]:
    """Returns the argument ``name`` as a list of str; one str is a list of one, None of none. Raises: UsageError."""
    several = [given] if isinstance(given, str) else () if given is None else given
    if isinstance(several, Mapping) or not isinstance(several, Iterable):
        raise UsageError(f"{name} is a text or a list of texts, not {kind_of(given)}")
    found = list(several)
    wrong = [text for text in found if not isinstance(text, str)]
    if wrong:
        raise UsageError(f"{name} is a text or a list of texts; {kind_of(wrong[0])} is none")
    return found


def all_texts(**given: str | Sequence[str] | None) -> Iterator[list[str]]:
    """Yields each of these arguments as `texts` gives it. Raises: UsageError."""
    return (texts(value, name) for name, value in given.items())


def pairs(given: Mapping[str, str] | Sequence[tuple[str, str]], name: str, what: str) -> list[tuple[str, str]]:
    """Returns the argument ``name`` as a list of pairs of str. Raises: UsageError."""
    wanted = f"{name} is a dict {{key pattern: {what}}} or a list of such pairs"
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise UsageError(f"{wanted}, not {kind_of(given)}")
    found = list(given.items() if isinstance(given, Mapping) else given)
    for pair in found:
        if not (isinstance(pair, (tuple, list)) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise UsageError(f"{wanted}; {pair!r} is none")
    return [(pattern, text) for pattern, text in found]


def expect(fits: bool, name: str, wanted: str, given: object) -> None:
    """Raises UsageError, with what is ``wanted`` and what was given, if the argument ``name`` does not fit."""
    if not fits:
        short = given is None or (isinstance(given, (int, float)) and not abs(given) > 1e9)
        listed = re.fullmatch(r"[\w-]+(, [\w-]+)* or [\w-]+", wanted)  # the very words
        like = near(given, re.split(", | or ", wanted)) if listed and isinstance(given, str) else ""
        raise UsageError(f"{name} is {wanted}, not {repr(given) if short else kind_of(given)}{like}")


def expect_texts(**given: object) -> None:
    """Raises UsageError if one of these arguments is neither a str nor None."""
    for name, value in given.items():
        expect(value is None or isinstance(value, str), name, "a text", value)


def expect_numbers(least: float, **given: Any) -> None:
    """Raises UsageError if one of these arguments is no number from ``least`` on."""
    for name, value in given.items():
        scalar = hasattr(value, "__float__") and not hasattr(value, "__len__")  # numpy's scalars, but no arrays
        expect(scalar and float(value) >= least, name, f"a number from {least:g} on", value)


def file_path(given: object) -> str:
    """Returns the path of an output as a str. Raises: UsageError if it is none, or one of bytes."""
    path = os.fspath(given) if isinstance(given, os.PathLike) else given
    expect(isinstance(path, str), "the output", "a path of text", given)
    return str(path)


def has_surrogate(name: str) -> bool:
    """Returns whether a name has a surrogate, which UTF-8 cannot encode."""
    return not name.isprintable() and any("\ud800" <= char <= "\udfff" for char in name)
