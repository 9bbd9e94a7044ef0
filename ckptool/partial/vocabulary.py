"""Which row of an old table belongs in which row of a new one: by a list of indices, or by the tokens of two
vocabularies. Works on what the files hold, and reads none."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from ckptool.errors import listed

Tokens = list[tuple[str, int]]
"""Tokens and their rows, in the file's order."""


class Unclear(ValueError):
    """A file does not say, or says twice, which row is meant."""


def selected(content: Any, old: int, new: int, where: str) -> list[int]:
    """Returns for each of ``new`` rows the index, of ``old`` rows, that a file gives it; -1 for none. Raises: Unclear.

    The file is a JSON list of integers (null and -1: none), or one integer per line.
    """
    if isinstance(content, str):
        try:
            content = [int(line) for line in content.split()]
        except ValueError:
            raise Unclear(f"{where} is neither a JSON list nor one integer per line") from None
    content = [content] if type(content) is int else content
    if not isinstance(content, list) or not all(index is None or type(index) is int for index in content):
        raise Unclear(f"{where} is no list of integers")
    found = [-1 if index is None else index for index in content]
    if len(found) != new:
        raise Unclear(f"{where} lists {len(found)} rows, the target has {new}")
    outside = [index for index in found if not -1 <= index < old]
    if outside:
        raise Unclear(f"{where} names rows {listed(outside)}, the source has 0 to {old - 1}")
    if max(found, default=-1) < 0:
        raise Unclear(f"{where} takes no row of the source")
    return found


def tokens(content: Any, where: str) -> Tokens:
    """Returns the tokens and rows that a vocabulary file lists. Raises: Unclear.

    It may be {token: row} (vocab.json), a list of tokens or of [token, score], text with a token per line
    (vocab.txt), or a Hugging Face tokenizer.json: its model's vocabulary and its added tokens.
    """
    if isinstance(content, dict) and isinstance(content.get("model"), dict):
        added = content.get("added_tokens") or []
        try:
            extra = [(entry["content"], entry["id"]) for entry in added]
        except (TypeError, KeyError):
            raise Unclear(f"{where}: its added_tokens are not understood") from None
        found = dict.fromkeys([*tokens(content["model"].get("vocab"), where), *extra])
        return _checked(list(found), where)
    if isinstance(content, str):
        content = content.removesuffix("\n").split("\n")
        content = [line.removesuffix("\r") for line in content]
    if isinstance(content, list):
        content = [entry[0] if isinstance(entry, list) and len(entry) == 2 else entry for entry in content]
        return _checked([(token, row) for row, token in enumerate(content)], where)
    if isinstance(content, dict):
        return _checked(list(content.items()), where)
    raise Unclear(f"{where} is no vocabulary: {{token: row}}, a list of tokens, or a tokenizer.json")


def _checked(found: Tokens, where: str) -> Tokens:
    wrong = [token for token, row in found if not isinstance(token, str) or type(row) is not int or row < 0]
    if wrong or not found:
        raise Unclear(f"{where} is no vocabulary: {listed(map(repr, wrong))}" if wrong else f"{where} lists no token")
    return found


def matched(old: Tokens, new: Tokens, old_rows: int, new_rows: int, old_name: str, new_name: str) -> list[int]:
    """Returns for each of ``new_rows`` rows the old row of the same token; -1 for none. Raises: Unclear.

    Tables may have more rows than tokens (padding), never fewer.
    """
    for found, rows, where in ((old, old_rows, old_name), (new, new_rows, new_name)):
        last = max(row for _, row in found)
        if last >= rows:
            raise Unclear(f"{where} goes up to row {last}, its tensor has {rows}")
    by_token: dict[str, int] = {}
    twice = set()
    for token, row in old:
        if by_token.setdefault(token, row) != row:
            twice.add(token)
    picks = [-1] * new_rows
    clashes = []
    for token, row in new:
        if token not in by_token:
            continue
        if token in twice or picks[row] not in (-1, by_token[token]):
            clashes.append(token)
        picks[row] = by_token[token]
    if clashes:
        raise Unclear(f"several rows are meant by {listed(map(repr, clashes))}")
    if max(picks) < 0:
        raise Unclear(f"{old_name} and {new_name} have no token in common")
    return picks


def runs(picks: Sequence[int], fill: tuple[int, bool]) -> Iterator[tuple[int, int, int]]:
    """Yields (input, first row, count) for stretches of consecutive rows of one input.

    Input 0 is the source. ``fill`` is the input that rows without a source take, and whether they take its row of
    the same place; the other kind has one row only.
    """
    number, placed = fill
    start = 0
    for place in range(1, len(picks) + 1):
        first = picks[start]
        if (
            place < len(picks)
            and (first < 0) == (picks[place] < 0)
            and (first < 0 or picks[place] == first + place - start)
        ):
            continue
        if first >= 0:
            yield 0, first, place - start
        else:
            yield number, start if placed else 0, place - start
        start = place
