"""JSON for scripts: one document per command, made from the dataclasses of its report."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

from ckptool.errors import CkptoolError


def plain(value: Any) -> Any:
    """Returns a report as JSON's own types. Fields whose default is None are left out where they are None."""
    if value is None or isinstance(value, (str, int, float)):
        return value
    if isinstance(value, (list, tuple)):
        return value if _PLAIN.issuperset(map(type, value)) else [plain(item) for item in value]
    kind: Any = type(value)
    if (fields := _fields(kind)) is not None:
        names, optional, contents = fields
        return {
            name: content if type(content) in _PLAIN else plain(content)
            for name, content in zip(names, contents(value), strict=True)
            if content is not None or name not in optional
        }
    return {str(key): plain(content) for key, content in value.items()}


_PLAIN = {str, int, float, bool}

MANY_ROWS = 5_000
"""Above so many rows, JSON is printed without indentation: ten times as fast, and too long to be read anyway."""


@functools.cache
def _fields(kind: Any) -> tuple[list[str], set[str], Callable[[Any], tuple[Any, ...]]] | None:
    """Returns a dataclass's field names, those left out when None, and a getter of all values; None for other types."""
    if not dataclasses.is_dataclass(kind):
        return None
    fields = dataclasses.fields(kind)
    names = [field.name for field in fields]
    get = operator.attrgetter(*names)
    found = get if len(names) > 1 else lambda report: (get(report),)
    return names, {field.name for field in fields if field.default is None}, found


def text(document: Any) -> str:
    """Returns a JSON document as text with a final newline; indented, unless it has over `MANY_ROWS` rows."""
    import json

    return json.dumps(document, indent=None if _has_many(document) else 1, allow_nan=False) + "\n"


def _has_many(value: Any) -> bool:
    """Returns whether a list near the top of a document has over `MANY_ROWS` items."""
    if isinstance(value, list):
        return len(value) > MANY_ROWS or (len(value) < 100 and any(map(_has_many, value)))
    return isinstance(value, dict) and len(value) < 100 and any(map(_has_many, value.values()))


def of(command: str, result: Any, notes: Sequence[str] = (), errors: Sequence[CkptoolError] = ()) -> dict[str, Any]:
    """Returns the document that every command prints with --json; ``errors``: of what the result lacks."""
    content = plain(result)
    if isinstance(content, dict):
        content.pop("notes", None)
    made = {"schema": 1, "command": command, "result": content, "notes": list(notes)}
    return {**made, "errors": [*map(error, errors)], "error": error(errors[0])} if errors else made


def error(one: CkptoolError) -> dict[str, Any]:
    """Returns an error as JSON's own types."""
    return {"kind": one.slug, "message": one.message, "path": one.path}
