"""Names of tensors: wrapper prefixes, patterns, counters, and the folding of repeated blocks for the eye."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import translate
from functools import lru_cache

from ckptool.errors import CollisionError, UsageError, kind_of, listed

WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""Segments that torch.compile, FSDP and activation checkpointing put anywhere in a name.

``module``, which DataParallel and DistributedDataParallel put in front, counts only while it leads.
"""

ROOTS = (
    "state_dict", "model_state_dict", "model_state", "model", "module", "net", "network", "generator", "params",
    "weights",
)  # fmt: skip
"""Names under which training scripts and frameworks keep the weights, first match first."""

EMA = ("state_dict_ema", "model_ema", "ema", "params_ema", "ema_state_dict")
"""Names of an exponential moving average of the weights: another set of values, taken only when asked for."""

COUNTER = "num_batches_tracked"
"""BatchNorm's buffer since torch 0.4.1; older files lack it, and it is bookkeeping wherever it is lacking."""


def is_counter(key: str) -> bool:
    """Returns whether a key is a BatchNorm's num_batches_tracked."""
    return key.rpartition(".")[2] == COUNTER


def unwrapped(key: str) -> str:
    """Returns a key without wrapper segments, in any order and at any depth.

    >>> unwrapped("module._orig_mod.layers.0._checkpoint_wrapped_module.w"), unwrapped("encoder.module.w")
    ('layers.0.w', 'encoder.module.w')
    """
    if "module" not in key and "_orig_mod" not in key:
        return key
    kept: list[str] = []
    *path, last = key.split(".")
    for segment in path:
        if segment in WRAPPERS or (segment == "module" and not kept):
            continue
        kept.append(segment)
    return ".".join([*kept, last])


def unwrap_all(keys: Iterable[str]) -> dict[str, str]:
    """Returns {unwrapped key: key}, or the keys as they are if two of them would collide."""
    listed = list(keys)
    found = {unwrapped(key): key for key in listed}
    return found if len(found) == len(listed) else {key: key for key in listed}


def wrapper_of(keys: Sequence[str]) -> str:
    """Returns the wrapper segments these keys carry, for people: ``module.``, ``_orig_mod.``; "" for none."""
    seen: dict[str, None] = {}
    for key in keys:
        plain = unwrapped(key)
        if plain == key:
            continue
        segments = [part for part in key.split(".")[:-1] if part in WRAPPERS or part == "module"]
        for segment in segments:
            seen.setdefault(segment)
    return "".join(f"{segment}." for segment in seen)


def looked_through(keys: Sequence[str]) -> str:
    """Returns the wrapper segments that `unwrap_all` takes off these keys; "" where it leaves them alone."""
    return wrapper_of(keys) if any(plain != key for plain, key in unwrap_all(keys).items()) else ""


def common_prefix(keys: Sequence[str]) -> str:
    """Returns the leading whole segments that all keys share, with the final dot; "" for none or a single key."""
    if len(keys) < 2:
        return ""
    first, last = min(keys).split("."), max(keys).split(".")
    shared = []
    for one, other in zip(first[:-1], last[:-1], strict=False):
        if one != other:
            break
        shared.append(one)
    return "".join(f"{segment}." for segment in shared)


@lru_cache(maxsize=512)
def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        if pattern.startswith("re:"):
            return re.compile(pattern[3:])
        return re.compile(translate(pattern))
    except re.error as error:
        raise UsageError(f"the pattern {pattern!r} is no regular expression: {error}") from error


def matches(pattern: str, key: str) -> bool:
    """Returns whether a key fits a glob (``layer1.*``, whole name) or a regular expression (``re:...``, anywhere)."""
    compiled = _compiled(pattern)
    return bool(compiled.search(key) if pattern.startswith("re:") else compiled.match(key))


def fits(pattern: str, key: str) -> bool:
    """Returns whether a pattern fits a key, or the key without its wrappers: as keys are compared."""
    return matches(pattern, key) or matches(pattern, unwrapped(key))


def chooser(include: Sequence[str], exclude: Sequence[str]) -> Callable[[str], bool]:
    """Returns the test for keys that an ``include`` pattern `fits` (all, if there is none), and no ``exclude`` one."""
    for pattern in (*include, *exclude):
        _compiled(pattern)

    def chosen(key: str) -> bool:
        wanted = not include or any(fits(pattern, key) for pattern in include)
        return wanted and not any(fits(pattern, key) for pattern in exclude)

    return chosen


def unused_patterns(patterns: Iterable[str], keys: Iterable[str]) -> list[str]:
    """Returns the patterns that fit no key: each is worth a word, being most likely a slip."""
    listed = list(keys)
    return [pattern for pattern in patterns if not any(fits(pattern, key) for key in listed)]


def replace_prefix(key: str, strip: str | None, add: str | None) -> str:
    """Returns a key with one prefix taken away, where it has it, and one put in front."""
    if strip and key.startswith(strip):
        key = key[len(strip) :]
    return f"{add or ''}{key}"


def plain_keys(keys: Iterable[str], strip: str | None, add: str | None, where: str) -> dict[str, str]:
    """Returns {key as it is compared: key as it stands in the file ``where``}: without wrappers, prefixes replaced.

    Prefixes are those of the keys behind any wrapper, or else of the keys as they stand.
    Raises: UsageError if no key begins with ``strip``, CollisionError if two keys become one.
    """
    listed_keys = list(keys)
    plain = unwrap_all(listed_keys)
    if not (strip or add):
        return plain
    if strip and not any(name.startswith(strip) for name in plain):
        if not any(key.startswith(strip) for key in listed_keys):
            raise UsageError(f"no key begins with {strip!r}", where)
        plain = {key: key for key in listed_keys}
    found: dict[str, str] = {}
    twice = []
    for name, key in plain.items():
        made = replace_prefix(name, strip, add)
        if made in found:
            twice.append(made)
        found[made] = key
    if twice:
        raise CollisionError(f"with these prefixes two keys are named {listed(twice)}", where)
    return {name: found[key] for name, key in unwrap_all(found).items()}


def best_prefix(
    sources: Iterable[str], targets: Iterable[str], agree: Callable[[str, str], bool] = lambda source, target: True
) -> tuple[str, str, int] | None:
    """Returns (prefix to strip from the sources, prefix to add, keys that would match), or None if nothing would.

    Tries the pairs of a stripped and an added prefix that line most keys up with a target at a "."; a match
    counts where ``agree`` (source key, target key) says so too. Looks at each key's suffixes once, so 10,000
    keys take well under a second.
    """
    wanted = dict.fromkeys(targets)
    by_suffix: dict[str, list[str]] = {}
    for target in wanted:
        for prefix, suffix in _splits(target):
            by_suffix.setdefault(suffix, []).append(prefix)
    votes: dict[tuple[str, str], int] = {}
    listed = list(sources)
    for source in listed:
        for prefix, suffix in _splits(source):
            found = by_suffix.get(suffix)
            if found is not None and len(found) <= 4:
                for added in found:
                    pair = (prefix, added)
                    votes[pair] = votes.get(pair, 0) + 1
                break  # the longest suffix that exists says most
    ranked = sorted(votes, key=lambda pair: (-votes[pair], len(pair[0]) + len(pair[1])))[:8]
    best: tuple[str, str, int] | None = None
    for strip, add in ranked:
        made = {f"{add}{key[len(strip) :]}": key for key in listed if key.startswith(strip)}
        count = sum(name in wanted and agree(key, name) for name, key in made.items())
        if count and (best is None or count > best[2]):
            best = (strip, add, count)
    return best


def _splits(key: str) -> list[tuple[str, str]]:
    """Returns (prefix, suffix) at every dot, the whole key first."""
    found = [("", key)]
    at = key.find(".")
    while at >= 0:
        found.append((key[: at + 1], key[at + 1 :]))
        at = key.find(".", at + 1)
    return found


def number_ranges(numbers: Iterable[int]) -> str:
    """Returns numbers as people write them.

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


def fold(rows: Sequence[tuple[str, object]]) -> list[tuple[str, list[int]]]:
    """Returns the rows with numbered repetitions folded: (``layers.{0..11}.w``, positions of the rows in it).

    ``rows`` are (key, what must be equal): rows fold only where that is equal too, so nothing is said of a key
    that does not hold for it. A group stands where its first row stood.
    """
    parts = [re.split(r"(?<!\d)(0|[1-9]\d{0,8})(?!\d)", key) for key, _ in rows]
    groups: dict[tuple[tuple[str, ...], object], list[int]] = {}
    for position, (pieces, (_, equal)) in enumerate(zip(parts, rows, strict=True)):
        groups.setdefault((tuple(pieces[::2]), equal), []).append(position)
    folded: list[tuple[str, list[int]]] = []
    for (frame, _), positions in groups.items():
        if len(frame) == 1:  # no number in it: the same key more than once
            folded.append((frame[0], positions))
            continue
        columns = list(zip(*(parts[position][1::2] for position in positions), strict=True))
        distinct = [{*column} for column in columns]
        full = 1
        for values in distinct:
            full *= len(values)
        if full != len(positions):  # not every combination exists: fold the last number only
            folded.extend(_fold_last(parts, positions, frame))
            continue
        folded.append((_joined(frame, [number_ranges(map(int, values)) for values in distinct]), positions))
    folded.sort(key=lambda group: group[1][0])
    return folded


def _fold_last(parts: list[list[str]], positions: list[int], frame: tuple[str, ...]) -> list[tuple[str, list[int]]]:
    groups: dict[tuple[str, ...], list[int]] = {}
    for position in positions:
        groups.setdefault(tuple(parts[position][1:-2:2]), []).append(position)
    folded = []
    for fixed, members in groups.items():
        last = number_ranges(int(parts[position][-2]) for position in members)
        folded.append((_joined(frame, [*fixed, last]), members))
    return folded


def _joined(frame: tuple[str, ...], numbers: list[str]) -> str:
    text = frame[0]
    for number, piece in zip(numbers, frame[1:], strict=True):
        text += number + piece
    return text


# --- as arguments ------------------------------------------------------------------------------------------------


def texts(given: str | Sequence[str], name: str) -> list[str]:
    """Returns a list of texts; one text is a list of one. Raises: UsageError for anything else."""
    several = [given] if isinstance(given, str) else given
    if isinstance(several, Mapping) or not isinstance(several, Iterable):
        raise UsageError(f"{name} is a text or a list of texts, not {kind_of(given)}")
    found = list(several)
    wrong = [text for text in found if not isinstance(text, str)]
    if wrong:
        raise UsageError(f"{name} is a text or a list of texts; {kind_of(wrong[0])} is none")
    return found


def pairs(given: Mapping[str, str] | Sequence[tuple[str, str]], name: str, what: str) -> list[tuple[str, str]]:
    """Returns pairs of texts. Raises: UsageError for anything else."""
    wanted = f"{name} is a dict {{key pattern: {what}}} or a list of such pairs"
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise UsageError(f"{wanted}, not {kind_of(given)}")
    found = list(given.items() if isinstance(given, Mapping) else given)
    for pair in found:
        if not (isinstance(pair, (tuple, list)) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise UsageError(f"{wanted}; {pair!r} is none")
    return [(pattern, text) for pattern, text in found]
