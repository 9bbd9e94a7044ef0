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
from ckptool.core.roots import find_root, is_flat, root_text
from ckptool.core.tensor import TensorInfo
from ckptool.core.tree import Path, as_mapping, path_text, replaced, walk, with_content
from ckptool.errors import (
    CollisionError,
    FormatError,
    LossError,
    NoTensorsError,
    UnsupportedError,
    UsageError,
    as_options,
    listed,
)


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
    return list(notes)


def pattern_notes(patterns: Sequence[str], keys: Iterable[str], option: str = "") -> list[str]:
    """Returns a note on each pattern that matches no key: most likely it is misspelled."""
    return [f"{option}{pattern} fits no key" for pattern in names.unused_patterns(patterns, keys)]


def wrapper_notes(plain: Callable[[str], str], *sides: tuple[str, Collection[str]]) -> list[str]:
    """Returns notes on the wrappers that ``plain`` takes off, where ``sides``, (url, keys), have not the same."""
    prefixes = [(url, names.wrapper_of(keys, plain)) for url, keys in sides]
    if len({prefix for _, prefix in prefixes}) == 1:
        return []
    return [f"looked through {prefix!r} in {url}" for url, prefix in prefixes if prefix]


def changed_lines(report: Any) -> list[list[str]]:
    """Returns (label, text) for each kind of value that casts changed, of a report with the fields of `Changed`."""
    lines = []
    for name, label, what in CHANGES:
        if counts := getattr(report, name):
            each, total = listed((f"{key} ({count:,})" for key, count in counts.items()), 20), sum(counts.values())
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
    if wish not in (None, "keep", "drop"):
        raise UsageError(f"optimizer is keep or drop, not {wish!r}")
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

# Each is tried before it is given: with the prefixes of the command, on the checkpoints as they are and at the other
# roots of their trees. Of equal numbers of keys those options count that leave fewest keys on either side, then the
# fewest options, prefixes before a rename. Only keys and shapes are looked at.


class _Trial(NamedTuple):
    """``options`` with which ``matched`` of ``total`` keys match, and ``left`` keys of both sides do not."""

    matched: int
    left: int
    total: int
    options: Sequence[tuple[str, str | None]]

    @property
    def rank(self) -> tuple[int, int, int]:
        """Returns what is higher for the better of two trials."""
        options = sum(3 if name == "--rename" else bool(name and value is not None) for name, value in self.options)
        return self.matched, -self.left, -options


_UNFIT = (UsageError, CollisionError, FormatError, LossError, NoTensorsError)
"""What a trial raises to which the options of the command do not apply: it is no hint."""


def merge_hint(merge: Any) -> str | None:
    """Returns the hint for a `filter.Merge` that has matched its keys; None if no options load more of them."""
    now = sum(merge.rows[key].reason in ("loaded", "cast", "tied", "adapted") for key in merge.tensors)
    if not merge.sources or now == len(merge.tensors):
        return None
    best = _best(now, _merge_trials(merge))
    if best is None:
        return None
    (option, root), *rest = best.options
    if option == "--rename":
        old, new = str(root).split("=")
        return f"renaming {old!r} to {new!r} would match {best.matched} of {best.total} ({as_options(best.options)})"
    (_, strip), (_, add) = rest
    words = [f"taking the weights at {root!r}"] if option else []
    if strip and add:
        words.append(f"replacing {strip!r} by {add!r}")
    elif strip or add is not None:
        words.append(f"stripping {strip!r}" if strip else f"adding {add!r}")
    return f"{' and '.join(words)} would match {best.matched} of {best.total} ({as_options(best.options)})"


def diff_hint(
    a: Checkpoint,
    b: Checkpoint,
    strip_a: Sequence[str],
    strip_b: Sequence[str],
    compared: Callable[..., Any],
    chosen: Callable[[str, str], bool] | None,
) -> str | None:
    """Returns the hint for a comparison; ``compared`` gives {key as it is compared: key} of two checkpoints.

    Only keys count that ``chosen(key as it is compared, key)`` accepts; None: all.
    """

    def common(one: Checkpoint, other: Checkpoint, strip: str = "", add: str = "") -> tuple[Any, Any, int]:
        plain_a, plain_b, _ = compared(one, other, [*strip_a, strip], [*strip_b, add])
        if chosen is not None:
            plain_a, plain_b = (
                {plain: key for plain, key in side.items() if chosen(plain, key)} for side in (plain_a, plain_b)
            )
        return plain_a, plain_b, len(plain_a.keys() & plain_b.keys())

    def trials() -> Iterator[_Trial]:
        roots = [(a, b, "", a), *((one, b, "--root-a", one) for one in _other_roots(a))]
        for one, other, option, at in [*roots, *((a, one, "--root-b", one) for one in _other_roots(b))]:
            with suppress(*_UNFIT):
                plain_a, plain_b, _ = common(one, other)
                strip, add, _ = names.best_prefix(plain_a, plain_b)
                plain_a, plain_b, count = common(one, other, strip, add)
                prefixes = ("--strip-prefix-a", strip or None), ("--strip-prefix-b", add or None)
                left = len(plain_a) + len(plain_b) - 2 * count
                yield _Trial(count, left, len(plain_b), [(option, _root(at)), *prefixes])

    best = _best(common(a, b)[2], trials())
    return best and f"{as_options(best.options)} would match {best.matched} of {best.total} keys"


def _best(now: int, trials: Iterable[_Trial]) -> _Trial | None:
    """Returns the best trial with which more keys match than ``now``; the first of equal ones."""
    return max((trial for trial in trials if trial.matched > now), key=lambda trial: trial.rank, default=None)


def _merge_trials(merge: Any) -> Iterator[_Trial]:
    first, target = merge.sources[0], merge.target
    at = [(merge.sources, target, "", first)]
    for other in _other_roots(first) if merge.source_root else ():
        at.append(([replace(source, root=other.root) for source in merge.sources], target, merge.source_root, other))
    for other in _other_roots(target) if target.format != "model" else ():
        at.append((merge.sources, other, merge.target_root, other))
    for sources, into, option, changed in at:
        with suppress(*_UNFIT):
            for checkpoint in (*sources, into):
                require_tensors(checkpoint)
            strip, add = _best_prefix(merge.again(sources, into, None, None))
            trial = merge.again(sources, into, strip, add)
            count = trial.loadable()
            left = len(trial.tensors) + sum(len(offer.tensors) for offer in trial.offers) - len(trial.used)
            added = None if add == (merge.add_prefix or "") else add
            options = [(option, _root(changed)), ("--strip-prefix", strip or None), ("--add-prefix", added)]
            yield _Trial(count, left, len(trial.tensors), options)
    if merge.source_root and len(merge.sources) == 1:
        yield from _rename_trials(merge)


def _rename_trials(merge: Any) -> Iterator[_Trial]:
    """Yields a trial for each likely rename of segments of the only source's keys.

    None for renames of which one gives a key another tensor than another does, and loads as many: no name decides.
    """
    from ckptool.ops.segments import likely_renames, renamer

    (source,), (offer,) = merge.sources, merge.offers
    wanted = {offer.plain(key) for key in merge.tensors if merge.chosen(key)}
    open_names = [name for name, key in offer.names.items() if name not in wanted]
    found: list[tuple[_Trial, dict[str, str]]] = []
    for old, new in likely_renames(open_names, wanted - offer.names.keys()):
        change = renamer(old, new)
        origin = {change(key): key for key in offer.tensors}
        if len(origin) < len(offer.tensors):
            continue
        with suppress(*_UNFIT, UnsupportedError):  # of nested containers, which a rename cannot change
            made = source.with_state_dict({name: offer.tensors[key] for name, key in origin.items()})
            trial = merge.again([made], merge.target, None, merge.add_prefix)
            count = trial.loadable()
            left = len(trial.tensors) + len(trial.offers[0].tensors) - len(trial.used)
            pairs = {key: origin[str(row.source)] for key, row in trial.rows.items() if row.source is not None}
            found.append((_Trial(count, left, len(trial.tensors), [("--rename", f"{old}={new}")]), pairs))
    for one, pairs in found:
        rivals = [other for trial, other in found if trial.matched == one.matched]
        if not any(other.get(key, name) != name for other in rivals for key, name in pairs.items()):
            yield one


def _best_prefix(merge: Any) -> tuple[str, str]:
    """Returns the prefixes to strip from the sources' keys and to add with which most tensors fit the target."""
    offered: dict[str, TensorInfo] = {}
    wanted: Mapping[str, str] = {}
    for offer in merge.offers:
        wanted = {offer.plain(key): key for key in merge.tensors if merge.chosen(key)}
        offered = {**{name: offer.tensors[key] for name, key in offer.names.items()}, **offered}

    def agree(source: str, key: str) -> bool:
        return bool(merge.fits(wanted[key], offered[source], merge.tensors[wanted[key]]))

    strip, add, _ = names.best_prefix(offered, wanted, agree)
    return strip, add


def _root(checkpoint: Checkpoint) -> str:
    return root_text(checkpoint.tree, checkpoint.root) or "/"


def _other_roots(checkpoint: Checkpoint) -> list[Checkpoint]:
    """Returns the checkpoint with each other root that has weights (16 at most): other models in the file, averages."""
    found: list[Checkpoint] = []
    for path, node in walk(checkpoint.tree, closed=lambda node: is_optimizer(node) or modules.is_module(node)):
        weights = modules.is_module(node) or (is_flat(node) and as_mapping(node) and not is_optimizer(node))
        if weights and path != checkpoint.root and len(found) < 16:
            found.append(replace(checkpoint, root=path))
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
