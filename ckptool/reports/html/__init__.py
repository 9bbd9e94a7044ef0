"""One HTML file that shows a report as pictures: a treemap, a matrix, histograms and a table. It needs no network.

What it shows is in it as JSON that nothing runs (see `data`); scripts and styles are named by their hashes in the
page's own policy, and no element is made from the text of a name.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from itertools import islice
from typing import Any

from ckptool import saving
from ckptool.core.checkpoint import Checkpoint
from ckptool.core.tensor import TensorInfo
from ckptool.core.tree import Path, PyObject, brief, children, key_text, path_text
from ckptool.errors import UsageError
from ckptool.io.files import same_place
from ckptool.io.paths import basename, is_url
from ckptool.reports.html import data

SCRIPTS = ("data", "map", "charts", "table", "panels", "page")
"""The parts of the script, in the order of use."""

NODES, DEPTH, WIDTH = 5_000, 12, 200
"""Of the tree beside the weights: most nodes, an equal part below each entry; levels; and nodes below one."""

TEXT = 200
"""Most characters of a value in this tree."""


def check(path: str, inputs: Sequence[Checkpoint], force: bool, *others: str | None) -> None:
    """Raises OutputError if a page cannot be written there, UsageError if it has the name of another output."""
    for other in filter(None, others):
        if same_place(path, other):
            raise UsageError(f"two outputs have the name {path}")
    saving.check_report(path, force=force, inputs=inputs)


def write(path: str, document: Mapping[str, Any], force: bool, paths: Sequence[str], **more: Any) -> None:
    """Writes the page for a document of `inspect` or `diff` of these paths. Raises: OutputError."""
    saving.write_text(path, page(document, paths, **more), force=force)


def page(document: Mapping[str, Any], paths: Sequence[str], **more: Any) -> str:
    """Returns the page for a document of `inspect` (of one checkpoint) or `diff`, as ``--json`` prints it.

    ``more`` is added to it: ``version``; for `inspect` ``tree`` (see `outline`); for `diff` ``headline``, and ``a`` and
    ``b``, the rows of both sides.
    """
    whole = data.of({**document, "paths": list(paths), **more})
    held = json.dumps(whole, allow_nan=False, separators=(",", ":"))
    script = "\n".join(_part(f"{name}.js") for name in SCRIPTS)
    style = _part("page.css")
    names = " and ".join(basename(path.rstrip("/") if is_url(path) else os.path.normpath(path)) for path in paths)
    names = names.encode("utf-8", "replace").decode()
    parts = {
        "title": names.replace("&", "&amp;").replace("<", "&lt;"), "data": held.replace("<", "\\u003c"),
        "style": style, "script": script, "style-hash": _hash(style), "script-hash": _hash(script),
    }  # fmt: skip
    return re.sub("@([a-z-]+)@", lambda match: parts[match[1]], _part("page.html"))


def outline(beside: Iterable[tuple[Path, str | None, Any]]) -> list[dict[str, Any]]:
    """Returns what `Checkpoint.beside` yields as a bounded tree of {name, text, nbytes, children}."""
    entries = [*islice(beside, WIDTH)]
    return [_node(path_text(path), value, [NODES // len(entries)], 1, set()) for path, _, value in entries]


def _node(name: str, value: Any, left: list[int], depth: int, above: set[int]) -> dict[str, Any]:
    if isinstance(value, TensorInfo):
        shape = "?" if value.shape is None else "×".join(map(str, value.shape)) or "scalar"
        return {"name": name, "text": f"tensor {shape} {value.dtype}", "nbytes": value.nbytes}
    below = [] if id(value) in above else list(islice(children(value), WIDTH + 1))
    if not below or isinstance(value, (str, bytes)):
        return {"name": name, "text": brief(value, TEXT)}
    what = value.qualname if isinstance(value, PyObject) else type(value).__name__
    if depth == DEPTH or left[0] < len(below):
        return {"name": name, "text": f"{what}, not shown"}
    left[0] -= len(below)
    here = above | {id(value)}
    shown = [_node(key_text(step), child, left, depth + 1, here) for step, child in below[:WIDTH]]
    more = len(below) > WIDTH
    if more:
        shown.append({"name": "…", "text": "more"})
    return {"name": name, "text": f"{what} of {f'over {WIDTH}' if more else len(below)}", "children": shown}


def _part(name: str) -> str:
    return files(__package__).joinpath(name).read_text("utf-8").rstrip("\n")


def _hash(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
