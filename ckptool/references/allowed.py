"""Planned changes, for `diff`: a TOML file of the differences that are allowed.

    [[allow]]
    kind = "shape"                      # of --fail-on
    key = "head.*"                      # glob or re:REGEX, as --ignore takes
    a = "1000x512"                      # what A and B must have, as `diff` prints it; any if left out
    b = "10x512"
    reason = "ten classes instead of a thousand"

The first entry that fits a difference allows it.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from ckptool.core import keys as names
from ckptool.errors import FormatError, one_of
from ckptool.ops.diff import KINDS, Allowed, DiffReport
from ckptool.references import toml
from ckptool.text import dims

_SIDES = {"shape": "ab", "dtype": "ab", "devices": "ab", "renamed": "ab", "only-in-a": "a", "only-in-b": "b"}
"""The kinds of differences of which something is printed for a side."""


class Entry(NamedTuple):
    """What is allowed. ``number``: which entry of the file, from 1; ``a``, ``b``: None for anything."""

    number: int
    kind: str
    key: str
    a: str | None
    b: str | None
    reason: str

    def fits(self, kind: str, keys: Iterable[str], a: set[str], b: set[str]) -> bool:
        """Returns whether this is a difference of one key, which has these names."""
        sides = (self.a is None or self.a in a) and (self.b is None or self.b in b)
        return kind == self.kind and sides and any(names.fits(self.key, key) for key in keys)


Planned = str | os.PathLike[str] | Mapping[str, Any] | list[Entry]
"""The path of a file, or its table; or the entries that it has."""


def entries_of(given: Planned) -> list[Entry]:
    """Returns the entries. Raises: UnreadableError; FormatError and UsageError that say what is wrong, and where."""
    if isinstance(given, list):
        return given
    return _parsed(given) if isinstance(given, Mapping) else toml.read(given, "a list of planned changes", _parsed)


def _parsed(data: Mapping[str, Any]) -> list[Entry]:
    toml.known(data, ("allow",))
    return [_entry(number, given) for number, given in enumerate(toml.field(data, "allow", list, [], "[[allow]]"), 1)]


def _entry(number: int, given: Any) -> Entry:
    where = f"allow {number}"
    if not isinstance(given, dict):
        raise FormatError(f"{where}: expected a table, [[allow]]")
    toml.known(given, Entry._fields[1:], where)
    texts = {name: toml.field(given, name, str, None, "a text", f"{where}: ") for name in ("kind", "key", *given)}
    kind = one_of(KINDS, texts["kind"], f"{where}: kind")
    names.chooser((texts["key"],), ())
    for side in "ab":
        if side in texts and side not in _SIDES.get(kind, ""):
            raise FormatError(f"{where}: {side}: expected none, as {kind} prints nothing of {side.upper()}")
        texts.update({side: " ".join(texts[side].split())} if side in texts else {})
    return Entry(number, kind, texts["key"], texts.get("a"), texts.get("b"), texts.get("reason", ""))


def judged(report: DiffReport, entries: Sequence[Entry], spelled: Callable[[str], Iterable[str]]) -> DiffReport:
    """Returns the report with what is allowed, which does not fail, and a note for each entry that fits nothing.

    ``spelled``: the names that a key of the report has for patterns.
    """
    rows = list(differences(report)) if entries else []
    allowed = []
    for kind, key, a, b in rows:
        entry = next((one for one in entries if one.fits(kind, spelled(key), a, b)), None)
        if entry is not None:
            allowed.append(Allowed(kind, key, entry.reason, entry.number))
    counts, found = Counter(row.kind for row in allowed), report.found()
    used = {row.entry for row in allowed}
    notes = []
    for one in entries:
        if one.number not in used:
            like = [name for kind, key, *_ in rows if kind == one.kind for name in spelled(key)]
            hint = "" if any(names.fits(one.key, key) for key in like) else names.near_pattern(one.key, like)
            sides = " -> ".join(text or "any" for text in (one.a, one.b)) if one.a or one.b else ""
            notes.append(f"{_unused(one.number)}{' '.join(filter(None, (one.kind, one.key, sides)))}{hint}")
    fails = [kind for kind in report.fails if found[kind] > counts[kind]]
    return replace(report, allowed=allowed, fails=fails, notes=[*report.notes, *notes])


def _unused(number: int) -> str:
    return f"entry {number} of --allow is unused: "


def together(reports: Sequence[DiffReport]) -> None:
    """Removes the notes of entries that another of the reports, all of one file, used."""
    used = tuple({_unused(row.entry) for report in reports for row in report.allowed})
    for report in reports:
        report.notes[:] = [note for note in report.notes if not note.startswith(used)]


def differences(report: DiffReport) -> Iterator[tuple[str, str, set[str], set[str]]]:
    """Yields (kind, key, what may stand for A, for B) of everything that `DiffReport.found` counts."""
    for row in report.shape:
        yield "shape", row.key, {dims(row.a)}, {dims(row.b)}
    for kind, changed in (("dtype", report.dtype), ("devices", report.devices), ("renamed", report.renamed)):
        yield from ((kind, row.key, {str(row.a)}, {str(row.b)}) for row in changed)
    for kind, lone in (("only-in-a", report.only_in_a), ("only-in-b", report.only_in_b)):
        for key in lone:
            shape, dtype = dims(report.shapes[key]), report.dtypes[key]
            has = {shape, dtype, f"{shape} {dtype}"}
            yield kind, key, has, has
    yield from (("values", row.key, set(), set()) for row in report.values if row.status == "differ")
    yield from (("bookkeeping", key, set(), set()) for key in report.bookkeeping)
    yield from (("ties", row.key, set(), set()) for row in report.tied)
    yield from (("uncompared", key, set(), set()) for key in report.uncompared)
    yield from (("loadability", row.key, set(), set()) for row in report.loadability)
