"""What one does without inference, five simple rules; and ckptool. A method gives a confidence with every key."""

from collections.abc import Callable
from difflib import SequenceMatcher

from .pairs import Entry, Made

Entries = list[Entry]
Found = dict[str, tuple[float, Made]]
Method = Callable[[Entries, Entries], Found]

WRAPPERS = ("module.", "_orig_mod.", "model.", "net.", "backbone.", "state_dict.", "ema_model.", "ema.")


def _same(pairs: list[tuple[Entry, Entry]]) -> Found:
    return {
        target.key: (1.0, Made((source.key,), "rename")) for source, target in pairs if source.shape == target.shape
    }


def _plain(key: str) -> str:
    while wrapper := next((one for one in WRAPPERS if key.startswith(one)), None):
        key = key.removeprefix(wrapper)
    return key


def names(source: Entries, target: Entries) -> Found:
    """same name and shape, the prefixes of wrappers taken off"""
    by_name = {_plain(entry.key): entry for entry in reversed(source)}
    return _same([(by_name[_plain(entry.key)], entry) for entry in target if _plain(entry.key) in by_name])


def order(source: Entries, target: Entries) -> Found:
    """the n-th of the source is the n-th of the target, where the shapes are equal"""
    return _same(list(zip(source, target, strict=False)))


def order_by_shape(source: Entries, target: Entries) -> Found:
    """the n-th of its shape"""
    queues: dict[object, list[Entry]] = {}
    for entry in source:
        queues.setdefault((entry.shape, entry.dtype), []).append(entry)
    turns = {shape: iter(entries) for shape, entries in queues.items()}
    pairs = [(next(turns.get((entry.shape, entry.dtype), iter(())), None), entry) for entry in target]
    return _same([(one, entry) for one, entry in pairs if one])


def suffix(source: Entries, target: Entries) -> Found:
    """the source key that ends the target key, or the other way round; the longest, as Detectron2 does it"""
    ends: dict[str, list[Entry]] = {}
    for entry in source:
        ends.setdefault(entry.key, []).append(entry)
    tails: dict[str, list[Entry]] = {}
    for entry in source:
        segments = entry.key.split(".")
        for at in range(1, len(segments)):
            tails.setdefault(".".join(segments[at:]), []).append(entry)
    pairs = []
    for entry in target:
        segments = entry.key.split(".")
        shorter = (ends.get(".".join(segments[at:])) for at in range(len(segments)))
        found = next((some for some in shorter if some), None) or tails.get(entry.key, [])
        if len(found) == 1:
            pairs.append((found[0], entry))
    return _same(pairs)


def strings(source: Entries, target: Entries) -> Found:
    """the assignment with the greatest similarity of strings, shape by shape (difflib and scipy)"""
    import numpy
    from scipy.optimize import linear_sum_assignment

    shapes: dict[object, tuple[Entries, Entries]] = {}
    for side, entries in enumerate((source, target)):
        for entry in entries:
            shapes.setdefault((entry.shape, entry.dtype), ([], []))[side].append(entry)
    pairs = []
    for ours, theirs in shapes.values():
        if not ours or not theirs:
            continue
        likeness = numpy.zeros((len(ours), len(theirs)))
        for column, entry in enumerate(theirs):
            matcher = SequenceMatcher(None, b=entry.key, autojunk=False)
            for row, other in enumerate(ours):
                matcher.set_seq1(other.key)
                likeness[row, column] = matcher.ratio()
        pairs += [(ours[row], theirs[column]) for row, column in zip(*linear_sum_assignment(-likeness), strict=True)]
    return _same(pairs)


def core(source: Entries, target: Entries) -> Found:
    """ckptool. Pieces whose layout names and shapes cannot show are left out unless --layout says what they are; they
    are among the guesses of "none" alone"""
    return _core(source, target, words=True, told=False)


def core_told(source: Entries, target: Entries) -> Found:
    """ckptool, told by --layout that every layout is as it was found"""
    return _core(source, target, words=True, told=True)


def core_without_words(source: Entries, target: Entries) -> Found:
    """ckptool without its table of field words"""
    return _core(source, target, words=False, told=False)


def _core(source: Entries, target: Entries, words: bool, told: bool) -> Found:
    from ckptool.mapping import infer, pairs

    ours, theirs = ([pairs.Entry(*entry) for entry in side] for side in (source, target))
    found = infer.infer(ours, theirs, min_confidence=float("-inf"), words=words)
    # Of a doubt at this confidence only the layout is unknown.
    asked = [doubt.candidates[0] for doubt in found.doubts if doubt.candidates]
    rows = [(pair.confidence, pair) for pair in found.pairs]
    rows += [(pair.confidence if told else -1.0, pair) for pair in asked]
    return {pair.target: (confidence, Made(tuple(pair.source), pair.op)) for confidence, pair in rows}


METHODS: dict[str, Method] = {
    "core": core,
    "told": core_told,
    "nowords": core_without_words,
    "names": names,
    "order": order,
    "shapes": order_by_shape,
    "suffix": suffix,
    "strings": strings,
}
