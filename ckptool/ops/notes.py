"""What several operations share: where the weights are, which patterns match nothing, where optimizers are, hints."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from math import isqrt
from typing import Any, NamedTuple

from ckptool.core import keys as names
from ckptool.core import modules
from ckptool.core.checkpoint import Checkpoint
from ckptool.core.optimizers import is_optimizer
from ckptool.core.roots import find_root, is_flat, root_path, root_text, said_of
from ckptool.core.tensor import TensorInfo
from ckptool.core.tree import Path, as_mapping, path_text, replaced, walk, with_content
from ckptool.errors import CkptoolError, NoTensorsError, UsageError, as_options, listed


def require_tensors(checkpoint: Checkpoint) -> dict[str, TensorInfo]:
    """Returns the tensors at root. Raises: NoTensorsError, which says where there are some, if there is none."""
    tensors = checkpoint.state_dict()
    if tensors:
        return tensors
    parents = {path_text(path[:-1]) or "the top" for path, _ in checkpoint.tensors()}
    elsewhere = f"; there are some at {listed(sorted(parents))}" if parents else ""
    why = "".join(f"; {note}" for note in checkpoint.notes)
    raise NoTensorsError(f"no tensors at {path_text(checkpoint.root) or 'the top'}{elsewhere}{why}", checkpoint.url)


def root_notes(checkpoints: Sequence[Checkpoint]) -> list[str]:
    """Returns notes on each checkpoint: where its weights are, if not at the top or not all, and what reading it met.

    That is which of several sets in a directory was read, how shards and index contradict each other, and what follows
    the end of a file.
    """
    several = len({one.url for one in checkpoints}) > 1
    notes: dict[str, None] = {}
    for one in checkpoints:
        for text in (*one.problems, *one.notes):
            notes[f"{one.url}: {text}" if several else text] = None
        if one.trailing:
            notes[f"{one.url}: {one.trailing}"] = None
        found, root = find_root(one.tree), root_text(one.tree, one.root)
        others = [root_text(one.tree, path) or "/" for path in found.others if found.path == one.root]
        if root or others:
            option = "" if several else " (--root)"  # of several files each has an option of its own
            more = f"; other places{option}: {listed(others)}" if others else ""
            notes[f"the weights of {one.url} are at {root or 'the top'}{more}"] = None
        for text in said_of(one.tree, one.root):
            notes[f"{one.url}: {text}" if several else text] = None
    return list(notes)


def pattern_notes(patterns: Sequence[str], keys: Iterable[str], option: str = "") -> list[str]:
    """Returns a note on each pattern that matches no key: most likely it is misspelled."""
    listed = list(keys)
    unused = names.unused_patterns(patterns, listed)
    return [f"{option}{pattern} fits no key{names.near_pattern(pattern, listed)}" for pattern in unused]


def none_chosen(patterns: Sequence[str], keys: Sequence[str]) -> str:
    """Returns what is wrong where patterns choose no key at all."""
    return "; ".join([f"the patterns choose none of {len(keys)} tensors", *pattern_notes(patterns, keys)])


def wrapper_notes(plain: Callable[[str], str], *sides: tuple[str, Collection[str]]) -> list[str]:
    """Returns notes on the wrappers that ``plain`` takes off, where ``sides``, (url, keys), have not the same."""
    prefixes = [(url, names.wrapper_of(keys, plain)) for url, keys in sides]
    if len({prefix for _, prefix in prefixes}) == 1:
        return []
    return [f"looked through {prefix!r} in {url}" for url, prefix in prefixes if prefix]


def not_taken(checkpoint: Checkpoint, left: Sequence[str], metadata: Mapping[str, str]) -> list[str]:
    """Returns a note on what is ``left`` of a checkpoint, and on its entries of metadata that are no others' too."""
    from ckptool.core.aliases import RESERVED  # which imports json

    theirs = {name for name, text in checkpoint.metadata.items() if metadata.get(name) != text} - RESERVED
    names = [*left, *(f"metadata {name}" for name in sorted(theirs))]
    return [f"not taken from {checkpoint.url}: {', '.join(names)}"] if names else []


def module_notes(checkpoint: Checkpoint) -> list[str]:
    """Returns a note on a whole-model pickle, whose class the output does not have."""
    if not modules.is_module(checkpoint.at(checkpoint.root)):
        return []
    return [f"{checkpoint.url} is a whole-model pickle: the output holds its state_dict, without class and attributes"]


def changed_lines(report: Any) -> list[list[str]]:
    """Returns (label, text) for each kind of value that casts changed, of a report with the fields of `Changed`."""
    lines = []
    for name, label, what in CHANGES:
        if counts := getattr(report, name):
            each, total = ", ".join(f"{key} ({count:,})" for key, count in counts.items()), sum(counts.values())
            lines.append([label, f"{total:,} value{'s' * (total != 1)} {what}: {each}"])
    return lines


CHANGES = (
    ("overflowed", "overflow", "no longer finite, or out of an integer's range"),
    ("saturated", "saturated", "cut to the largest of the dtype"),
    ("underflowed", "underflow", "zero now"),
)
"""For each field of `Changed`: the label of its line, and what became of the values."""


def optimizer_notes(checkpoint: Checkpoint) -> list[str]:
    """Returns a note if keys were dropped and an optimizer's state, numbered by position, no longer matches them."""
    for path, node in optimizer_states(checkpoint):
        state = as_mapping((as_mapping(node) or {}).get("state"))
        if state and any(isinstance(key, int) for key in state):
            where = path_text(path)
            return [f"{where} goes by position: with keys dropped it no longer lines up with the weights"]
    return []


def optimizer_states(checkpoint: Checkpoint) -> Iterator[tuple[Path, Any]]:
    """Yields (path, node) of the optimizers' state_dicts in the tree."""
    tops: list[tuple[Path, Any]] = [((), checkpoint.tree)]
    weights = checkpoint.at(checkpoint.root)
    if is_flat(weights) and not is_optimizer(weights):  # for speed, 100,000 tensors are not walked over
        content = (as_mapping(weights) or {}).items()
        tops += [((*checkpoint.root, name), value) for name, value in content if not isinstance(value, TensorInfo)]
    else:
        weights = None
    for top, tree in tops:
        for path, node in walk(tree, closed=lambda node: node is weights or is_optimizer(node)):
            if is_optimizer(node):
                yield (*top, *path), node


def optimizer_paths(checkpoint: Checkpoint) -> list[Path]:
    """Returns the paths of all optimizer states outside the weights, in the file's order."""
    root = checkpoint.root
    nodes = walk(checkpoint.tree, closed=lambda node: is_optimizer(node) or modules.is_module(node))
    found = (path for path, node in nodes if path and is_optimizer(node))
    return [path for path in found if not (root and path[: len(root)] == root)]


def without_optimizers(checkpoint: Checkpoint) -> tuple[Checkpoint, list[Path]]:
    """Returns (checkpoint without any optimizer state, the paths they were at)."""
    paths = optimizer_paths(checkpoint)
    for path in reversed(paths):  # from the back, so that positions in lists stay what they are
        checkpoint = replace(checkpoint, tree=_removed(checkpoint, path))
    return checkpoint, paths


def with_optimizers(checkpoint: Checkpoint, wish: str | None) -> tuple[Checkpoint, list[str]]:
    """Returns (checkpoint, notes) with the optimizer states as ``--optimizer`` wishes; None keeps them and notes it.

    Raises: UsageError for another wish than ``keep`` and ``drop``.
    """
    names.expect(wish in (None, "keep", "drop"), "optimizer", "keep or drop", wish)
    if wish == "drop":
        checkpoint, paths = without_optimizers(checkpoint)
        return checkpoint, [f"dropped: {path_text(path)}" for path in paths] or ["no optimizer state to drop"]
    notes = []
    for path, node in optimizer_states(checkpoint) if wish is None else ():
        nbytes = sum(value.nbytes for _, value in walk(node) if isinstance(value, TensorInfo))
        if nbytes and path:
            notes.append(f"{path_text(path)}: {nbytes:,} bytes of optimizer state (--optimizer drop leaves it out)")
    return checkpoint, notes


def _removed(checkpoint: Checkpoint, path: Path) -> Any:
    """Returns the tree without the node at ``path``, or with None there if removing it could break something."""
    *above, last = path
    parent = checkpoint.at(tuple(above))
    mapping = as_mapping(parent)
    made: Any
    if mapping is not None and last in mapping:
        made = with_content(parent, {name: value for name, value in mapping.items() if name != last})
    elif isinstance(parent, (list, tuple)) and tuple(above) != checkpoint.root[: len(above)]:
        made = type(parent)(value for at, value in enumerate(parent) if at != last)
    else:  # a list in which the weights would move to another position, or an attribute that its class may need
        return replaced(checkpoint.tree, path, None)
    return replaced(checkpoint.tree, tuple(above), made)


# --- hints: options to add to the command that was given, with which most keys would match ---------------------------

# Guesses are made from the names, on the checkpoints as they are and at the other roots of their trees; of many names
# a sample is looked at. The likeliest are tried in full, as the command would do it, since a hint promises a number of
# keys. Of equal numbers those options count that leave fewest keys on either side, then the fewest options.

_SAMPLE, _AMONG = 1000, 20_000
"""How many unmatched names of the sources, and of the target, are looked at for guesses."""
_TRIALS, _WORK = 12, 100_000
"""How many guesses are tried, and after how many keys in all no other one is."""


class _Place(NamedTuple):
    """Where the weights are with ``option root`` ("": as they are now); {plain name: tensor} of both sides."""

    one: Any
    other: Checkpoint
    option: str
    root: str
    offered: Mapping[str, TensorInfo]
    wanted: Mapping[str, TensorInfo]


class _Guess(NamedTuple):
    """Prefixes to strip and to add, and segments to rename before, with which ``likely`` keys match by the samples."""

    place: _Place
    likely: float
    strip: str = ""
    add: str = ""
    rename: str = ""


class _Trial(NamedTuple):
    """``options`` with which ``matched`` of ``total`` keys match, and ``left`` keys of both sides do not.

    ``origins``: with a rename, {key: which tensor it gets}.
    """

    matched: int
    left: int
    total: int
    options: Sequence[tuple[str, str | None]]
    origins: Mapping[str, object] = {}

    @property
    def rank(self) -> tuple[int, int, int]:
        """Returns what is higher for the better of two trials."""
        longer = ("--rename", "--strip-prefix-b")  # a rename goes before two prefixes of `diff`, and behind one
        options = sum(3 if name in longer else 1 for name, value in self.options if name and value)
        return self.matched, -self.left, -options


def merge_hint(merge: Any, now: int) -> str | None:
    """Returns the hint for a `filter.Merge` that loads ``now`` keys; None if no options load more of them."""
    if not merge.sources or now == len(merge.tensors):
        return None
    given = merge.add_prefix or ""

    def attempt(guess: _Guess) -> _Trial:
        sources, target = guess.place.one, guess.place.other
        before: Mapping[str | None, Mapping[str, str]] = {}
        if guess.rename:
            sources, before = merge.renamed(sources, guess.rename)
        if target is not merge.target:
            target.with_state_dict(target.state_dict())
        for checkpoint in (*sources, target):
            require_tensors(checkpoint)
        trial = merge.again(sources, target, guess.strip, guess.add)
        matched = trial.loadable()
        left = len(trial.tensors) + sum(len(offer.tensors) for offer in trial.offers) - len(trial.used)
        options = [
            (guess.place.option, guess.place.root), ("--rename", guess.rename or None),
            ("--strip-prefix", guess.strip or None), ("--add-prefix", None if guess.add == given else guess.add),
        ]  # fmt: skip
        pairs = trial.pairs.items() if guess.rename else ()
        origins = {key: (number, before[trial.files[number]].get(name)) for key, (number, name) in pairs}
        return _Trial(matched, left, len(trial.tensors), options, origins)

    guesses = [guess for place in _merge_places(merge) for guess in _guesses(place, merge.may_fit, given)]
    best = _best(now, guesses, attempt)
    if best is None:
        return None
    (option, root), (_, rename), (_, strip), (_, add) = best.options
    words = [f"taking the weights at {root!r}"] if option else []
    if rename:
        old, new = rename.split("=")
        words.append(f"renaming {old!r} to {new!r}")
    if strip and add:
        words.append(f"replacing {strip!r} by {add!r}")
    elif strip or add is not None:
        words.append(f"stripping {strip!r}" if strip else f"adding {add!r}")
    return f"{' and '.join(words)} would match {best.matched} of {best.total} ({as_options(best.options)})"


def hinted(hint: str | None) -> int:
    """Returns how many keys a hint says would match."""
    return max(map(int, re.findall(r" would match (\d+) of ", hint or "")), default=0)


def _merge_places(merge: Any) -> Iterator[_Place]:
    def offered(sources: Sequence[Checkpoint]) -> dict[str, TensorInfo]:
        found: dict[str, TensorInfo] = {}
        for source in reversed(sources):
            tensors = source.state_dict()
            made = names.renamed(tensors, merge.strip_prefix, None, source.url)
            found.update((names.unwrapped(name), tensors[key]) for name, key in made.items())
        return found

    def wanted(target: Checkpoint) -> dict[str, TensorInfo]:
        return {names.unwrapped(key): one for key, one in target.state_dict().items() if merge.chosen(key)}

    now = _Place(merge.sources, merge.target, "", "", {}, wanted(merge.target))
    with suppress(CkptoolError):  # the given prefixes may be for the other root
        now = now._replace(offered=offered(merge.sources))
        yield now
    for root, text in _other_roots(merge.sources[0]) if merge.source_root else ():
        with suppress(CkptoolError):
            sources = [replace(source, root=root) for source in merge.sources]
            yield now._replace(one=sources, option=merge.source_root, root=text, offered=offered(sources))
    for root, text in _other_roots(merge.target) if merge.target_root else ():
        with suppress(CkptoolError):
            target = replace(merge.target, root=root)
            yield now._replace(other=target, option=merge.target_root, root=text, wanted=wanted(target))


class Common(NamedTuple):
    """Two sides of a comparison: {name: tensor} of each; how many names both have, B has, and only one has.

    ``origins``: with a rename, {name that both have: key of A before it}.
    """

    sides: tuple[Mapping[str, TensorInfo], Mapping[str, TensorInfo]]
    matched: int
    total: int
    left: int
    origins: Mapping[str, object] = {}


def diff_hint(a: Checkpoint, b: Checkpoint, common: Callable[..., Common]) -> str | None:
    """Returns the hint for a comparison.

    ``common(a, b, strip_a, strip_b, rename)`` strips prefixes of both sides after those of the command, and renames
    segments of A's keys before.
    """

    def attempt(guess: _Guess) -> _Trial:
        found = common(guess.place.one, guess.place.other, guess.strip, guess.add, guess.rename)
        options = [
            (guess.place.option, guess.place.root), ("--rename", guess.rename or None),
            ("--strip-prefix-a", guess.strip or None), ("--strip-prefix-b", guess.add or None),
        ]  # fmt: skip
        return _Trial(found.matched, found.left, found.total, options, found.origins)

    now = common(a, b)
    places = [_Place(a, b, "", "", *now.sides)]
    others = [(replace(a, root=root), b, "--root-a", text) for root, text in _other_roots(a)]
    others += [(a, replace(b, root=root), "--root-b", text) for root, text in _other_roots(b)]
    for place in others:
        with suppress(CkptoolError):
            places.append(_Place(*place, *common(*place[:2]).sides))
    guesses = [guess for place in places for guess in _guesses(place, lambda *_: True, "")]
    best = _best(now.matched, guesses, attempt)
    return best and f"{as_options(best.options)} would match {best.matched} of {best.total} keys"


def _best(now: int, guesses: list[_Guess], attempt: Callable[[_Guess], _Trial]) -> _Trial | None:
    """Returns the best trial with which more keys match than ``now``; None if none of those that were tried does.

    Nor if renames give a key one tensor or another, and load as many: no name decides.
    """
    guesses.sort(key=lambda guess: (-guess.likely, bool(guess.rename)))
    found: list[_Trial] = []
    work = 0
    for guess in guesses[:_TRIALS]:
        keys = len(guess.place.offered) + len(guess.place.wanted)
        if work >= _WORK or not guess.likely or (keys > _SAMPLE and guess.likely <= now):
            break
        work += keys
        with suppress(CkptoolError):  # to which the options of the command do not apply
            found.append(attempt(guess))

    def is_clear(one: _Trial) -> bool:
        rivals = [other.origins for other in found if other.matched == one.matched]
        return all(other.get(key, origin) == origin for other in rivals for key, origin in one.origins.items())

    clear = (trial for trial in found if trial.matched > now and is_clear(trial))
    return max(clear, key=lambda trial: trial.rank, default=None)


def _guesses(place: _Place, agree: Callable[[str, TensorInfo, TensorInfo], bool], given: str) -> Iterator[_Guess]:
    """Yields guesses at a place: as it is, with prefixes, and with renames of segments before.

    ``agree(name, source, target)``: whether one tensor fits the other. ``given``: the prefix to add of the command.
    """
    offered, wanted = place.offered, place.wanted

    def fits(source: str, name: str) -> bool:
        return name in wanted and agree(name, offered[source], wanted[name])

    matched = {name for name in offered if fits(name, name)}
    left, open_names = ([name for name in side if name not in matched] for side in (offered, wanted))
    samples = [(len(some), _sample(some, _SAMPLE)) for some in (left, list(matched))]
    targets = _sample(open_names, _AMONG)

    def guess(strip: str, add: str, rename: str = "", change: Callable[[str], str] = str) -> _Guess:
        likely = 0.0
        for count, some in samples:
            hits = sum(fits(name, f"{add}{change(name).removeprefix(strip)}") for name in some)
            likely += count * hits / max(len(some), 1)
        return _Guess(place, likely, strip, add, rename)

    prefixes = dict.fromkeys([("", ""), ("", given), *names.likely_prefixes(samples[0][1], targets)])
    found = [guess(strip, add) for strip, add in prefixes]
    yield from found
    found.sort(key=lambda one: -one.likely)
    for _, _, strip, add, _ in found[:2]:
        from ckptool.ops.segments import likely_renames, renamer

        made = {name: f"{add}{name.removeprefix(strip)}" for name in samples[0][1]}
        lacking = [name.removeprefix(strip) for name, new in made.items() if new not in wanted]
        known = {*made.values()}
        open_names = [name.removeprefix(add) for name in targets if name not in known and name.startswith(add)]
        for old, new in likely_renames(lacking, open_names):
            yield guess(strip, add, f"{old}={new}", renamer(old, new))


def _sample(names: Sequence[str], most: int) -> Sequence[str]:
    """Returns ``most`` of the names, spread so that no period of theirs is met; all, if there are no more."""
    count = len(names)
    return names if count <= most else [names[int(at * 0.6180339887498949 % 1 * count)] for at in range(most)]


def _other_roots(checkpoint: Checkpoint) -> list[tuple[Path, str]]:
    """Returns (path, text) of each other root that has weights (16 at most): other models in the file, averages.

    None whose text ``--root`` takes for another one.
    """
    found: list[tuple[Path, str]] = []

    def closed(node: Any) -> bool:
        return not isinstance(node, TensorInfo) and (is_optimizer(node) or modules.is_module(node))

    for path, node in walk(checkpoint.tree, closed=closed) if checkpoint.format != "model" else ():
        if isinstance(node, TensorInfo) or len(found) == 16:
            continue
        weights = modules.is_module(node) or (is_flat(node) and as_mapping(node) and not is_optimizer(node))
        if weights and path != checkpoint.root:
            text = root_text(checkpoint.tree, path) or "/"
            with suppress(UsageError):
                found += [(path, text)] if repr(root_path(checkpoint.tree, text)) == repr(path) else []
    return found


# --- adapters of load-partial that would make mismatched shapes fit --------------------------------------------------

_RELATIVE = re.compile(r"rel(?:ative)?_?pos")
_POSITIONS = re.compile(r"(?:^|[^a-z])(?:pos(?:ition|emb|enc|[^a-z]|$)|pe$)")
_PATCHES = re.compile(r"patch|proj|embed")
_IMAGES = re.compile(r"vis|image|patch|vit|pixel")
_TABLES = re.compile(  # no number before: what stands in every block of a model is no table of words or classes
    r"(?:[a-z_]\w*[./])*?(?:(?:\w*emb(?:ed\w*)?|wte|\w*heads?|classifier|\w*vocab\w*)(?:[./]\w+){0,3}"
    r"|(?:\w*fc|\w*logits?|score|output|decoder|predictions|shared|last_linear)(?:[./]\d+)?(?:[./](?:weight|bias))?)"
)


def adapters_for(rows: Iterable[Any], tensors: Mapping[str, TensorInfo]) -> dict[str, str]:
    """Returns {key: adapter} of the mismatched rows whose key and shapes speak for one adapter of `load-partial`.

    Rows of a tensor fit nearly anything: they are named for a table only (an embedding, a head, its bias), known by its
    key, and where no other layer takes up what its rows give out. On meta, ``tensors`` of the target have no rows to
    keep. At most 10,000 rows are looked at.
    """
    named = (row for row in islice(rows, 10_000) if len(row.key) <= 200)  # the expressions take its length squared
    pairs = [
        (row.key, tuple(row.source_shape), tuple(row.shape))
        for row in named
        if row.shape and row.source_shape and "float" in (row.dtype or "") and 0 not in (*row.shape, *row.source_shape)
    ]
    inner = {
        sizes for _, old, new in pairs if len(old) == len(new)
        for sizes in zip(old[1:], new[1:], strict=True) if sizes[0] != sizes[1]
    }  # fmt: skip
    found = {}
    for key, old, new in pairs:
        if name := _adapter(key.lower(), old, new, inner):
            empty = name == "rows" and new[0] > old[0] and tensors[key].kind == "meta"
            found[key] = f"{name}:fill=zero" if empty else name
    return found


def _adapter(name: str, old: Sequence[int], new: Sequence[int], inner: Collection[tuple[int, int]]) -> str | None:
    """Returns the adapter that a key, in lower case, and two shapes speak for."""
    if len(old) != len(new):
        flat = len(old) == 4 and len(new) == 5 and new[2] <= 4096
        return "inflate" if flat and old == (*new[:2], *new[3:]) else None
    differ = [dim for dim, (one, other) in enumerate(zip(old, new, strict=True)) if one != other]
    if _RELATIVE.search(name):
        linear = ":mode=linear" * bool(re.search(r"rel_pos_[a-z]$", name))
        return f"rel-pos{linear}" if differ == [0] or (len(old) == 3 and 0 not in differ) else None
    if _POSITIONS.search(name):
        return "pos-embed" if _are_positions(name, old, new) else None
    if len(old) == 4 and differ and min(differ) >= 2:
        image = old[1] <= 16 and old[2] == old[3] and new[2] == new[3] and not (old[2] % 2 or new[2] % 2)
        return "patch-embed" if image or _PATCHES.search(name) else None
    if len(old) >= 3 and differ == [1] and old[0] > 1:  # of an image: between layers there are more channels
        return "in-chans" if min(old[1], new[1]) <= 16 and max(old[1], new[1]) <= 4096 else None
    table = differ == [0] and (old[0], new[0]) not in inner and _TABLES.fullmatch(name)
    return "rows" if table else None


def _are_positions(name: str, old: Sequence[int], new: Sequence[int]) -> bool:
    """Returns whether two shapes are of positions in an image: a text's, whose lengths are powers of 2, are not."""
    if len(old) != 2:
        return old[0] == new[0] == 1
    return bool(_IMAGES.search(name)) or not any(
        all(count > beside and _is_power_of_4(count - beside) for count in (old[0], new[0])) for beside in (0, 2)
    )


def _is_power_of_4(count: int) -> bool:
    return isqrt(count) ** 2 == count and count & (count - 1) == 0


def adapter_patterns(found: Mapping[str, str], differ: Collection[str]) -> Iterator[tuple[str, str, list[str]]]:
    """Yields (pattern, adapter, keys) that cover {key: adapter}: one for keys that differ in numbers alone.

    A pattern fits no other key of those whose shapes ``differ``.
    """
    groups: dict[tuple[str, str], list[str]] = {}
    for key, adapter in found.items():
        exact = re.sub(r"([*?[])", r"[\1]", key)
        groups.setdefault((re.sub(r"(?<![^.])\d+(?![^.])", "*", exact), adapter), []).append(key)
    for (pattern, adapter), keys in groups.items():
        if len(keys) > 1 and not any(names.fits(pattern, key) for key in differ if found.get(key) != adapter):
            yield pattern, adapter, keys
        else:
            yield from ((re.sub(r"([*?[])", r"[\1]", key), adapter, [key]) for key in keys)
