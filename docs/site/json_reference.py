"""The JSON that every command prints, described from the dataclasses it is made of.

``python docs/site/json_reference.py`` rewrites ``docs/reference/json.md`` and ``docs/reference/schemas``, a JSON Schema
(2020-12) for each command.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import itertools
import json
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ckptool import errors
from ckptool.core import findings, pickled_names
from ckptool.mapping import like
from ckptool.ops import convert, diff, remap, rows
from ckptool.ops.inspect import InspectReport
from ckptool.partial import handover, plan, presets
from ckptool.references import schema

HERE = Path(__file__).parents[1] / "reference"

RESULTS: dict[str, Any] = {
    "inspect": list[InspectReport],
    "diff": diff.DiffReport | schema.SchemaReport | list[diff.DiffReport | schema.SchemaReport],
    "filter": rows.FilterReport,
    "remap": remap.RemapReport | like.LikeReport,
    "convert": list[convert.ConvertReport],
    "load-partial": plan.LoadPartialReport | dict[Literal["presets"], dict[str, presets.Preset]],
}
"""What stands under ``result``, by command."""

NAMES: dict[str, Any] = {}
"""What annotations of reports may name that only type checkers import."""
for _module in (findings, pickled_names, handover, remap, rows):
    NAMES |= {name: value for name, value in vars(_module).items() if not name.startswith("_")}

KINDS = {one.slug for one in vars(errors).values() if isinstance(one, type) and issubclass(one, errors.CkptoolError)}

ERROR = {
    "kind": "What kind of error it is: " + ", ".join(f"``{name}``" for name in sorted(KINDS)) + ".",
    "message": "What was found, and what to do.",
    "path": "The file that it is about, or null.",
}
DOCUMENT = {
    "schema": "The version of this contract: 1. Fields are added under one version; none is renamed or removed.",
    "command": "The command's name.",
    "result": "What the command found or did; absent where an error stopped it.",
    "notes": "What it noticed beside that, a sentence each.",
    "errors": "All errors, where one of several inputs failed, or where something lacks of what is shown.",
    "error": "The first of them, whose kind decides the exit code, which is 2.",
}


@functools.cache
def described(kind: Any) -> dict[str, str]:
    """Returns {field: the text below it} of a dataclass."""
    bases = [base for base in reversed(kind.__mro__) if dataclasses.is_dataclass(base)]
    body = [line for base in bases for line in ast.parse(inspect.getsource(base)).body[0].body]
    return {
        field.target.id: " ".join(below.value.value.split())
        for field, below in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr)
    }


def contents(kind: Any, notes: bool = True) -> list[tuple[str, Any, bool]]:
    """Returns (field, type, whether it is always there) of a dataclass, as `ckptool.reports.document` writes it.

    The ``notes`` of a result that is one report stand beside it; what a remap saves is a file of its own.
    """
    types_of = get_type_hints(kind, localns=NAMES)
    return [
        (field.name, types_of[field.name], field.default is not None)
        for field in dataclasses.fields(kind)
        if field.name != "saved" and (notes or field.name != "notes")
    ]


def schema_of(command: str) -> dict[str, Any]:
    """Returns the JSON Schema of what a command prints with --json."""
    kinds: dict[str, Any] = {}
    result = _typed(RESULTS[command], kinds, get_origin(RESULTS[command]) is list)
    error = _object({name: _typed(str | None if name == "path" else str, kinds) for name in ERROR}, ERROR, list(ERROR))
    texts = {"type": "array", "items": {"type": "string"}}
    error_at = {"$ref": "#/$defs/Error"}
    fields = {
        "schema": {"const": 1}, "command": {"const": command}, "result": result, "notes": texts,
        "errors": {"type": "array", "items": error_at}, "error": error_at,
    }  # fmt: skip
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"What `ckptool {command} --json` prints",
        **_object(fields, DOCUMENT, ["schema", "command"]),
        "anyOf": [{"required": ["result", "notes"]}, {"required": ["error"]}],
        "$defs": {"Error": error, **kinds},
    }


def _object(fields: Mapping[str, Any], said: Mapping[str, str], required: list[str]) -> dict[str, Any]:
    properties = {
        name: {**one, **({"description": said[name].replace("``", "`")} if said.get(name) else {})}
        for name, one in fields.items()
    }
    return {"type": "object", "properties": properties, "required": required}


PLAIN = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}


def _typed(kind: Any, kinds: dict[str, Any], notes: bool = True) -> dict[str, Any]:
    """Returns the schema of a type, and puts those of the dataclasses it names into ``kinds``."""
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return {}
    if kind in PLAIN:
        return {"type": PLAIN[kind]}
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin in (Union, types.UnionType):
        if all(one in PLAIN for one in arguments):
            return {"type": [PLAIN[one] for one in arguments]}
        return {"anyOf": [_typed(one, kinds, notes) for one in arguments]}
    if origin in (list, tuple):
        return {"type": "array", "items": _typed(arguments[0], kinds)}
    if origin is not None and issubclass(origin, Mapping):
        names = {"propertyNames": {"enum": list(get_args(arguments[0]))}} if get_origin(arguments[0]) is Literal else {}
        return {"type": "object", "additionalProperties": _typed(arguments[1], kinds), **names}
    if kind.__name__ not in kinds:
        kinds[kind.__name__] = {}
        fields = contents(kind, notes)
        said = (inspect.getdoc(kind) or "").replace("``", "`")
        kinds[kind.__name__] = {"description": said} | _object(
            {name: _typed(one, kinds) for name, one, _ in fields},
            described(kind),
            [name for name, _, always in fields if always],
        )
    return {"$ref": f"#/$defs/{kind.__name__}"}


def dataclasses_in(kind: Any, notes: bool = True, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, bool]]:
    """Yields the dataclasses that a type names, outermost first, and whether their notes are theirs."""
    if dataclasses.is_dataclass(kind):
        yield kind, notes
        above = (*above, kind)
        kind = [one for _, one, _ in contents(kind, notes) if kind not in above[:-1]]
        notes = True
    for one in kind if isinstance(kind, list) else get_args(kind):
        yield from dataclasses_in(one, notes, above)


def page() -> str:
    """Returns the reference of all fields, in Markdown."""
    lines = [
        "# JSON", "",
        "Every command prints one JSON document with `--json`; those that write put it into a file with `--report`.",
        "Fields that are marked *optional* are left out where they say nothing. Numbers are finite. Fields may be",
        "added: ignore those that you do not know.", "",
        "JSON Schemas (2020-12): " + ", ".join(f"[{name}](schemas/{name}.json)" for name in RESULTS) + ".", "",
        "## The document", "",
        *_table([(name, "", said) for name, said in DOCUMENT.items()]),
        "", "An error:", "",
        *_table([(name, "", said) for name, said in ERROR.items()]),
    ]  # fmt: skip
    shown: set[Any] = set()
    for command, result in RESULTS.items():
        lines += ["", f"## {command}", "", f"`result`: {_name(result)}"]
        for kind, notes in dict(dataclasses_in(result, get_origin(result) is list)).items():
            if kind in shown:
                continue
            shown.add(kind)
            said = described(kind)
            lines += ["", f"### {kind.__name__}", "", _prose(inspect.getdoc(kind) or ""), ""]
            lines += _table(
                [
                    (name, _name(one) + ("" if always else ", optional"), said[name])
                    for name, one, always in contents(kind, notes)
                ]
            )
    return "\n".join(lines) + "\n"


def _prose(text: str) -> str:
    return text.replace("``", "`").replace("|", "\\|")


def _table(entries: list[tuple[str, str, str]]) -> list[str]:
    typed = any(kind for _, kind, _ in entries)
    head = ["| field | type | |", "|---|---|---|"] if typed else ["| field | |", "|---|---|"]
    rows_of = [
        " | ".join([f"`{name}`", *([_prose(kind)] if typed else []), _prose(said)]) for name, kind, said in entries
    ]
    return [*head, *(f"| {row} |" for row in rows_of)]


def _name(kind: Any) -> str:
    """Returns a type in words: ``list of TensorRow``."""
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is type(None):
        return "null"
    if kind in PLAIN or kind is Any:
        return PLAIN.get(kind, "any")
    if origin is Literal:
        return ", ".join(f"`{one}`" for one in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(map(_name, arguments))
    if origin in (list, tuple):
        return f"list of {_name(arguments[0])}"
    if origin is not None:
        return f"object of {_name(arguments[1])}"
    return f"[{kind.__name__}](#{kind.__name__.lower()})"


def made() -> dict[Path, str]:
    """Returns {file: its content} of all that this writes."""
    texts = {HERE / "schemas" / f"{name}.json": json.dumps(schema_of(name), indent=1) + "\n" for name in RESULTS}
    return {HERE / "json.md": page(), **texts}


if __name__ == "__main__":
    for path, text in made().items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
