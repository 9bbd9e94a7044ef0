"""The map file, which says exactly what `remap` did, in JSON's types. It may have been edited, so all is checked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from ckptool.core.versions import Moves, is_entry
from ckptool.errors import UsageError, listed
from ckptool.ops.steps import Shapes, Step, is_sound

SCHEMA = 1
"""Version of the map file."""


class Map(NamedTuple):
    """The parts of a map file that are read; its rows and dropped keys are for people only.

    ``batches``: the steps in order; those of one batch are of different keys. ``keys``: the old keys in order.
    ``shapes``: {new key: shape}. ``ties``: groups of old keys that were tied before and are not any more; within a
    group, keys of one object are in one list. ``modules``, ``versions``: `versions.Moved.paths` and ``lost``.
    """

    batches: Sequence[Sequence[Step]]
    keys: Sequence[str]
    shapes: Shapes
    ties: Sequence[Sequence[Sequence[str]]]
    modules: Moves
    versions: dict[str, Any]


def written(content: Map, rows: Sequence[dict[str, Any]], dropped: Sequence[str]) -> dict[str, Any]:
    """Returns a map as the document that `read` takes, with tuples for lists. Copies no list of keys, for speed."""
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
    """Returns the map in a document. Raises: UsageError for anything that `written` cannot have written.

    A correct map may still not fit the tensors that it is applied to: see `steps.fits`.
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


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _all_in(kind: Any, is_right: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Returns the test for a list, or a dict with texts for keys, all of whose values pass ``is_right``."""

    def test(value: Any) -> bool:
        if not isinstance(value, kind):
            return False
        items = value.values() if isinstance(value, dict) else value
        return all(map(is_right, items)) and (items is value or all(map(_is_text, value)))

    return test


_LIST = (list, tuple)
_is_names = _all_in(_LIST, _is_text)
_is_sizes = _all_in(_LIST, lambda value: type(value) is int and value >= 0)


def _is_step(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("op"), str)
        and _is_names(value.get("old"))
        and _is_names(value.get("new"))
        and isinstance(value.get("args", {}), dict)
    )


_PARTS: dict[str, Callable[[Any], bool]] = {
    "keys": _is_names,
    "shapes": _all_in(dict, lambda value: value is None or _is_sizes(value)),
    "ties": _all_in(_LIST, _all_in(_LIST, _is_names)),
    "modules": _all_in(dict, _is_names),
    "versions": _all_in(dict, is_entry),
    "steps": _all_in(_LIST, _all_in(_LIST, _is_step)),
}
"""The parts of a map file -> the test for each."""
