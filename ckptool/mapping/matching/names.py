"""The words in keys: segments, numbers, and how alike two words are."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

FIELD_WORDS: tuple[tuple[str, ...], ...] = (
    ("weight", "weights", "kernel", "gamma", "scale", "w", "g", "s"),
    ("bias", "beta", "offset", "b"),
    ("mean", "rm"),
    ("var", "variance", "riv"),
    ("norm", "normalization", "ln", "bn", "gn", "layernorm", "batchnorm", "rmsnorm"),
    ("query", "q", "wq"),
    ("key", "k", "wk"),
    ("value", "v", "wv"),
    ("out", "o", "output", "wo"),
    ("proj", "projection", "dense", "fc", "linear", "lin"),
    ("conv", "convolution"),
    ("attn", "attention", "attend"),
    ("mlp", "ffn", "feedforward", "ff"),
    ("embed", "embedding", "embeddings", "emb", "embedder"),
    ("pos", "position", "positional"),
    ("cls", "class"),
    ("head", "classifier", "logits"),
    ("downsample", "shortcut", "skip", "identity"),
)
"""Words of one line mean the same in names of tensors. Of a key's last segment the first four lines say what it is."""

OPPOSED: tuple[tuple[str, ...], ...] = (
    ("query", "key", "value", "out"),
    ("up", "down", "gate"),
    ("encoder", "decoder"),
    ("embed", "head"),
    ("self", "cross"),
    ("before", "after"),
    ("image", "text"),
    ("vision", "text"),
    ("visual", "text"),
)
"""Words that exclude each other: what one side calls one of them is not what the other calls another."""

SHORTCUT = frozenset({"downsample", "shortcut", "skip", "residual", "identity"})
"""Words for the path around a block. It is listed before the block in one code base and behind it in the next."""

SUBLAYERS = {"attn": 0, "att": 0, "sa": 0, "mha": 0, "cross": 1, "encoder": 1, "mlp": 2, "final": 2}
"""What the norms of a block are named after, and its place: attention, that to another sequence, the MLP."""

ROLES = {
    word: role for role, group in zip(("weight", "bias", "mean", "var"), FIELD_WORDS, strict=False) for word in group
}
LAYER_ROLES = frozenset(ROLES.values())
"""What the tensors of a layer are."""
BEFORE, AFTER = frozenset({"pre", "before", "input"}), frozenset({"post", "after"})
_GROUP = {word: number for number, group in enumerate(FIELD_WORDS) for word in group}
_CAMEL = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_DIGITS, _LETTERS = [*"0123456789"], [*"abcdefgh"]
_KERNEL = re.compile(r"_?(?<![0-9])([0-9]{1,2}x[0-9]{1,2})(?![0-9])")
_POSITIONS = re.compile(r"pos(?:_|ition|[^a-z]|$)|wpe|rel(?:_|ative)")
_LEAF = re.compile(r"(.+)_(weights?|bias|kernel|gamma|beta)$")


_DEEPEST, _LONGEST = 100, 40
"""Most segments of a key that is taken apart, and letters of a word: what is longer is no name."""


class Segment(NamedTuple):
    """One segment of a key: its text, the text before its number, the number (-1: none), its words."""

    text: str
    stem: str
    number: int
    words: tuple[str, ...]


@lru_cache(maxsize=1 << 16)
def segment(text: str) -> Segment:
    """Returns the parts of one segment. ``branch2a``: a letter behind digits is the number; ``3x3`` is a word."""
    kernel = _KERNEL.search(text)
    plain = text if kernel is None else text[: kernel.start()] + text[kernel.end() :]
    stem, number = plain, -1
    if plain[-1:] in _LETTERS and plain[-2:-1] in _DIGITS:
        stem, number = plain[:-1], _LETTERS.index(plain[-1:])
    elif 0 < len(plain) - len(head := plain.rstrip("".join(_DIGITS))) < 10:
        stem, number = head, int(plain[len(head) :])
    found_words = [word[:_LONGEST].lower() for word in _CAMEL.findall(stem)]
    if len(found_words) > 1 and len(initials := "".join(word[0] for word in found_words)) > 1:
        found_words.append(initials)
    if kernel is not None:
        stem += f"_{kernel[1]}"
        found_words.append(kernel[1])
    return Segment(text, stem, number, tuple(dict.fromkeys(found_words)))


def separators(keys: Sequence[str]) -> str:
    """Returns the characters that separate segments in these keys."""
    plain = sum("." in key or "/" in key for key in keys)
    return "./" if 2 * plain >= len(keys) else "_./"


def split(key: str, marks: str = "./") -> tuple[str, ...]:
    """Returns the texts of a key's segments; ``in_proj_weight`` at the end is two."""
    for mark in marks[:-1]:
        key = key.replace(mark, marks[-1])
    *above, last = key.split(marks[-1])
    return (*above, *_leaf(last)) if len(above) < _DEEPEST else (key,)


@lru_cache(maxsize=1 << 16)
def _leaf(text: str) -> tuple[str, ...]:
    found = _LEAF.fullmatch(text)
    return found.groups() if found else (text,)


@lru_cache(maxsize=1 << 16)
def role(leaf: str, words: bool = True) -> str:
    """Returns what a key's last segment says the tensor is: weight, bias, mean, var, or the segment itself."""
    if not words:
        return leaf
    parts = segment(leaf).words
    if "running" in parts or "moving" in parts:
        return "mean" if "mean" in parts else "var"
    if leaf.lower() in ROLES:
        return ROLES[leaf.lower()]
    return ROLES.get(parts[0], leaf) if len(parts) == 1 and parts[0] not in ("mean", "var") else leaf


@lru_cache(maxsize=1 << 18)
def alike(one: str, other: str, field: bool = True) -> float:
    """Returns how alike two words are, from 0 to 1."""
    if one == other:
        return 1.0
    if field and one in _GROUP and _GROUP[one] == _GROUP.get(other):
        return 0.8
    short, long = sorted((one, other), key=len)
    if len(short) == 1:
        return 0.5 if long[0] == short or (len(long) == 2 and long[1] == short) else 0.0
    if long.startswith(short):
        return 0.85 if len(short) > 2 else 0.6
    if len(short) >= 3 and long.endswith(short):
        return 0.7
    if long[0] == short[0] and _is_subsequence(short, long):
        return 0.6
    if len(short) >= 4 and short in long:
        return 0.6
    pairs = [{word[at : at + 2] for at in range(len(word) - 1)} for word in (short, long)]
    dice = 2 * len(pairs[0] & pairs[1]) / (len(pairs[0]) + len(pairs[1]))
    return 0.7 * dice if dice >= 0.4 else 0.0


def _is_subsequence(short: str, long: str) -> bool:
    letters = iter(long)
    return all(letter in letters for letter in short)


def words_of(segments: Iterable[Segment]) -> tuple[str, ...]:
    """Returns the words of some segments; words beside "pre" or "post" in one segment are marked with it."""
    found: list[str] = []
    for part in segments:
        said = set(part.words)
        mark = "<" if said & BEFORE else ">" if said & AFTER else ""
        found += [word + (mark if word not in BEFORE | AFTER else "") for word in part.words]
    return tuple(dict.fromkeys(found))


def similarity(one: str, other: str, field: bool = True) -> float:
    """Returns how alike two words of `words_of` are."""
    marks = [word[-1] if word[-1:] in "<>" else "" for word in (one, other)]
    found = alike(one.rstrip("<>"), other.rstrip("<>"), field)
    return found * (0.3 if marks[0] != marks[1] and (all(marks) or ">" in marks) else 1.0)


def opposed(one: Iterable[str], other: Iterable[str]) -> bool:
    """Returns whether two keys' words name different ones of things that exclude each other."""
    mine, theirs = (set(map(_plain, words)) for words in (one, other))
    kernels = [{word for word in words if word[0].isdigit()} for words in (mine, theirs)]
    if all(kernels) and not kernels[0] & kernels[1]:
        return True
    for words in OPPOSED:
        ours, others = mine.intersection(words), theirs.intersection(words)
        if len(ours) == len(others) == 1 and ours != others:
            return True
    return False


@lru_cache(maxsize=1 << 16)
def projection(part: Segment) -> str:
    """Returns which of query, key and value a segment names; "" for none, or several."""
    said = {_plain(word) for word in part.words} & {"query", "key", "value"}
    return said.pop() if len(said) == 1 else ""


def says_fused(part: Segment) -> bool:
    """Returns whether a segment names several of query, key and value: ``query_key_value``, ``qkv``, ``kv``."""
    said = {_plain(word) for word in part.words} & {"query", "key", "value"}
    return len(said) > 1 or not {"qkv", "wqkv", "kv"}.isdisjoint(part.words)


@lru_cache(maxsize=1 << 16)
def _plain(word: str) -> str:
    """Returns the first word of a word's group."""
    group = _GROUP.get(word.rstrip("<>"))
    return word.rstrip("<>") if group is None else FIELD_WORDS[group][0]


def is_norm(part: Segment) -> bool:
    """Returns whether a segment is that of a norm, by its words."""
    return any(_plain(word) == "norm" for word in part.words)


@lru_cache(maxsize=1 << 16)
def place(part: Segment) -> int | None:
    """Returns where something stands in a block by "pre" and "post", and a norm by what it is named after; else None.

    A norm that says neither "pre" nor "post" stands before its part of the block.
    """
    said, side = {_plain(word) for word in part.words}, around(part)
    layers = [SUBLAYERS[word] for word in said & SUBLAYERS.keys()] if "norm" in said else []
    if layers:
        return 2 * max(layers) + (side or 0)
    return None if side is None else side * (2 * max(SUBLAYERS.values()) + 1)


def around(part: Segment) -> int | None:
    """Returns 0 for a segment that says "pre", 1 for "post"; None for neither."""
    said = set(part.words)
    return 0 if said & BEFORE else 1 if said & AFTER else None


def says_position(key: str) -> bool:
    """Returns whether a key is that of positions that were learned: then none are rotary."""
    return bool(_POSITIONS.search(key.lower()))


def is_in_proj(path: Sequence[str]) -> bool:
    """Returns whether a fused projection is that of torch.nn.MultiheadAttention, whose rows are those of q, k, v."""
    return bool(path) and path[-1] == "in_proj"
