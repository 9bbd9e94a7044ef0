"""The map file: exactly what `remap` did, in JSON's own types, and the reading of one that anybody may have edited."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from ckptool.core.versions import Moves, is_entry
from ckptool.errors import UsageError, listed
from ckptool.ops.steps import Shapes, Step, is_sound

SCHEMA = 1
"""Version of the map file."""


class Map(NamedTuple):
    """What a map file holds beside the rows for people.

    ``batches``: the steps that were taken, those of one batch over different keys. ``keys``: the old ones in order.
    ``shapes``: the new keys and theirs. ``ties``: groups of old keys that were one tensor and are
    no more, those together that were one object.
    ``modules``, ``versions``: see `versions.Moved`.
    """

    batches: Sequence[Sequence[Step]]
    keys: Sequence[str]
    shapes: Shapes
    ties: Sequence[Sequence[Sequence[str]]]
    modules: Moves
    versions: dict[str, Any]


def written(content: Map, rows: Sequence[dict[str, Any]], dropped: Sequence[str]) -> dict[str, Any]:
    """Returns a map as the document that `read` takes: JSON's own types, tuples for lists. Copies no list of keys."""
    return {
        "schema": SCHEMA,
        "map": rows,
        "dropped": dropped,
        "keys": content.keys,
        "shapes": content.shapes,
        "ties": content.ties,
        "modules": content.modules,
        "versions": content.versions,
        "steps": [
            [{"op": step.op, "old": step.old, "new": step.new, "args": step.args} for step in batch]
            for batch in content.batches
        ],
    }


def read(document: Any) -> Map:
    """Returns the map that a document holds. Raises: UsageError, in one line, for anything that `written` never wrote.

    What is right by itself may still not fit the tensors that it is applied to: see `steps.fits`.
    """
    if not isinstance(document, dict) or type(document.get("schema")) is not int or document["schema"] != SCHEMA:
        raise UsageError(f"not a map that remap --save-map wrote: schema is not {SCHEMA}")
    wrong = [name for name, is_right in _PARTS.items() if not is_right(document.get(name, _DEFAULTS.get(name)))]
    if wrong:
        raise UsageError(f"not a map that remap --save-map wrote: {listed(wrong)} cannot be")
    batches = [[_step(entry) for entry in batch] for batch in document["steps"]]
    unsound = [step for batch in batches for step in batch if not is_sound(step)]
    if unsound:
        what = listed(f"{step.op} of {', '.join(step.old[:3])}" for step in unsound)
        raise UsageError(f"not a map that remap --save-map wrote: its steps make no sense: {what}")
    shapes = {key: shape if shape is None else tuple(shape) for key, shape in document["shapes"].items()}
    given = {**_DEFAULTS, **document}
    return Map(batches, document["keys"], shapes, given["ties"], given["modules"], given["versions"])


_DEFAULTS: dict[str, Any] = {"ties": [], "modules": {}, "versions": {}}


def _step(entry: dict[str, Any]) -> Step:
    return Step(entry["op"], tuple(entry["old"]), tuple(entry["new"]), entry.get("args", {}))


def _is_names(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(map(_is_text, value))


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_size(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_shape(value: Any) -> bool:
    return value is None or (isinstance(value, (list, tuple)) and all(map(_is_size, value)))


def _is_step(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("op"), str)
        and _is_names(value.get("old"))
        and _is_names(value.get("new"))
        and isinstance(value.get("args", {}), dict)
    )


def _all_in(kind: Any, is_right: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Returns the test for a list, or a dict by text, all of whose values are right."""

    def test(value: Any) -> bool:
        if not isinstance(value, kind):
            return False
        if isinstance(value, dict):
            return all(map(_is_text, value)) and all(map(is_right, value.values()))
        return all(is_right(item) for item in value)

    return test


_LIST = (list, tuple)
_PARTS: dict[str, Callable[[Any], bool]] = {
    "keys": _is_names,
    "shapes": _all_in(dict, _is_shape),
    "ties": _all_in(_LIST, _all_in(_LIST, _is_names)),
    "modules": _all_in(dict, _is_names),
    "versions": _all_in(dict, is_entry),
    "steps": _all_in(_LIST, _all_in(_LIST, _is_step)),
}
"""The parts of a map file that are read -> what they must be."""
