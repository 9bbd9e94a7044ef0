"""Which row of an old table each row of a new one takes: by a list of indices, or by the tokens of two vocabularies.

Works on the contents of files; reads none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from ckptool.errors import listed
from ckptool.partial.adapters import Unclear

Tokens = list[tuple[str, int]]
"""Tokens and their rows, in the file's order."""


def selected(content: Any, old: int, new: int, where: str) -> list[int]:
    """Returns the old row that a file gives each of ``new`` rows, -1 for none. Raises: Unclear.

    The file is a JSON list of integers (null and -1: none), or one integer per line. ``old`` is the source's row count.
    """
    if isinstance(content, str):
        try:
            content = [int(line) for line in content.split()]
        except ValueError:
            raise Unclear(f"{where} is neither a JSON list nor one integer per line") from None
    content = [content] if type(content) is int else content
    if not isinstance(content, list) or not all(index is None or type(index) is int for index in content):
        raise Unclear(f"{where} is not a list of integers")
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
    """Returns the tokens and rows in a vocabulary file. Raises: Unclear.

    The file may be {token: row} (vocab.json), a list of tokens or of [token, score], text with a token per line
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
        content = [line.removesuffix("\r") for line in content.removesuffix("\n").split("\n")]
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
    """Returns the old row of the same token for each of ``new_rows`` rows, -1 for none. Raises: Unclear.

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
    """Yields (input, first row, count) for each run of consecutive rows of one input.

    Input 0 is the source. ``fill`` is (the input for rows without a source, whether that input has one row per target
    row); if it has not, it has a single row, which they all take.
    """
    number, by_row = fill
    done = 0
    for _, run in groupby(enumerate(picks), lambda item: -1 if item[1] < 0 else item[1] - item[0] + len(picks)):
        count = sum(1 for _ in run)
        first = picks[done]
        yield (0, first, count) if first >= 0 else (number, done if by_row else 0, count)
        done += count
