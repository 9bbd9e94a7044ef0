"""Options that several commands share, and the parsers of their values."""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Annotated, Any

import typer

import ckptool
from ckptool import formats, references, reports
from ckptool.errors import FormatError, UnreadableError, UsageError, explain

if TYPE_CHECKING:
    from ckptool.core.checkpoint import Checkpoint
    from ckptool.ops.rules import Rules

Texts = list[str] | None

Output = Annotated[str | None, typer.Option("-o", "--output", metavar="OUT", help="Where to write.")]
Include = Annotated[Texts, typer.Option(metavar="GLOB", help="Only keys that match (re:REGEX too).")]
Exclude = Annotated[Texts, typer.Option(metavar="GLOB", help="Leave out keys that match.")]
StripPrefix = Annotated[Texts, typer.Option(metavar="P", help="Remove a prefix from the source's keys (repeatable).")]
AddPrefix = Annotated[str | None, typer.Option(metavar="P", help="Add a prefix to the source's keys.")]
Rename = Annotated[Texts, typer.Option(metavar="A=B", help="Rename segments; {i} and * match one each.")]
RulesFiles = Annotated[Texts, typer.Option(metavar="FILE", help="Rules from a TOML or JSON file.")]
MinConfidence = Annotated[
    float | None, typer.Option(min=0, max=1, metavar="X", help="With what confidence a key is matched, by default 0.8.")
]
SaveRules = Annotated[
    str | None, typer.Option(metavar="FILE", help="Write the rules that were found, for --rules: TOML, or .json.")
]
AutoRemap = Annotated[bool, typer.Option("--auto-remap", help="Find the target's names for SOURCE's keys first.")]
AllowUnused = Annotated[bool, typer.Option("--allow-unused", help="Allow rules and patterns that match no key.")]
MinLoaded = Annotated[
    str | None, typer.Option(metavar="90%", help="Exit 1 if fewer of the target's parameters are loaded.")
]
Require = Annotated[Texts, typer.Option(metavar="GLOB", help="Exit 1 if a key that matches is not loaded.")]
Strict = Annotated[bool, typer.Option("--strict", help="Exit 1 on missing, unexpected or mismatched keys.")]
AllRows = Annotated[bool, typer.Option("--all", help="Show loaded keys too.")]
Root = Annotated[str | None, typer.Option("--root", metavar="PATH", help="Where the weights are, steps joined with /.")]
Arg = Annotated[
    Texts, typer.Option(metavar="NAME=VALUE", help="An argument for a model in code: a Python literal, or text.")
]
TpRules = Annotated[
    str | None, typer.Option(metavar="FILE", help="How tensor-parallel ranks are joined: TOML, gpt, llama.")
]
To = Annotated[
    str | None,
    typer.Option(
        metavar="FORMAT", help=f"{', '.join(formats.names())}. Default: what OUT says (a directory: sharded)."
    ),
]
MaxShardSize = Annotated[str, typer.Option(metavar="SIZE", help="Of a directory: bytes of tensors in a file.")]
ShardName = Annotated[
    str | None, typer.Option(metavar="NAME", help="Of shards: how files' names begin. Default: as the input's.")
]
WithFiles = Annotated[
    bool, typer.Option("--with-files", help="Of a directory: copy config.json, tokenizer ... beside the input too.")
]
MapLocation = Annotated[
    str | None,
    typer.Option("--map-location", metavar="TAGS", help="Device tags to write: cpu, or cuda:1=cuda:0,cuda:2=cpu."),
]
Verify = Annotated[bool, typer.Option("--verify/--no-verify", help="Read the result back and compare every byte.")]
Fsync = Annotated[bool, typer.Option("--fsync/--no-fsync", help="Wait until the result is on disk.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite an existing output.")]
Html = Annotated[str | None, typer.Option("--html", metavar="FILE", help="Write pictures and tables as one HTML file.")]
InPlace = Annotated[bool, typer.Option("--in-place", help="Allow the output to be one of the inputs.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Report what would happen; write no output.")]
WorldSize = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="With --dry-run: plan for N ranks of torchrun, and say the largest."),
]
Report = Annotated[str | None, typer.Option("--report", metavar="FILE", help="Write the JSON report to FILE too.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Format = Annotated[
    str | None, typer.Option("--format", metavar="FORM", help=f"What to print: {', '.join(reports.FORMS)}.")
]


def form(given: str | None, as_json: bool) -> str:
    """Returns the form that --format and --json ask for. Raises: UsageError."""
    if as_json and given not in (None, "json"):
        raise UsageError(f"--json and --format {given} contradict each other")
    return "json" if as_json else reports.form_of(given or "text")


def in_order(ctx: typer.Context, **given: Texts) -> Rules:
    """Returns the rules of these options of a command, in the order of the command line."""
    from ckptool.ops.rules import Rules, parse_option

    found = Rules()
    left = {name: list(texts or ()) for name, texts in given.items()}
    for name in ctx.meta["ckptool.order"]:
        if name in left:
            text = left[name].pop(0)
            found = found + (Rules.parse(read_data(text)) if name == "rules" else parse_option(name, text))
    return found


def reference(
    text: str, root: str | None, arguments: Texts, tp_rules: str | None, *, values: bool = False
) -> Checkpoint:
    """Returns what stands where a checkpoint is asked for: a checkpoint, or a model in code, which is run.

    ``values``: of the model, too; else it is built without. Raises: what `ckptool.open` and `code.opened` raise.
    """
    if not references.is_code(text):
        return ckptool.open(text, root=root, tp_rules=tp_rules)
    from ckptool.references import code

    return code.opened(text, arguments or (), values=values).rooted(root or ())


def refuse_arguments(arguments: Texts, *sides: str | None) -> None:
    """Raises UsageError if there are arguments, and none of the sides is a model in code."""
    if arguments and not any(map(references.is_code, filter(None, sides))):
        raise UsageError("--arg goes with a model in code, PKG.MOD:NAME")


def require_output(output: str | None, dry_run: bool) -> None:
    """Raises UsageError if no output is named and it is not a dry run."""
    if output is None and not dry_run:
        raise UsageError("name the output with -o, or ask for a --dry-run")


def size(text: str) -> int:
    """Returns the bytes that ``5GB``, ``500 MB``, ``2GiB`` or a number means. Raises: UsageError.

    >>> size("5GB"), size("2GiB"), size("1000")
    (5000000000, 2147483648, 1000)
    """
    match = re.fullmatch(r"\s*(\d{1,30}(?:\.\d{1,30})?)\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE)
    if match is None or (match[3] and not match[2]):
        raise UsageError(f"{text!r} is not a size such as 5GB, 500MB or 2GiB")
    power = " KMGT".index(match[2].upper() or " ")
    unit = (1024 if match[3] else 1000) ** power
    return int(match[1]) * unit if match[1].isdecimal() else int(float(match[1]) * unit)


def entry(text: str) -> tuple[str, str]:
    """Returns the name and the text that ``NAME=TEXT`` of ``--set-metadata`` means. Raises: UsageError."""
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise UsageError(f"--set-metadata takes NAME=TEXT, not {text!r}")
    return name, value


def shard_size(text: str) -> int:
    """Returns the bytes that ``--max-shard-size`` means. Raises: UsageError."""
    nbytes = size(text)
    if nbytes < 1:
        raise UsageError(f"--max-shard-size takes at least 1 byte, not {text!r}")
    return nbytes


def limited(given: Iterable[str], what: str = "--limit") -> AbstractContextManager[None]:
    """Returns a context manager in which the limits hold that ``what`` gives. Raises: UsageError."""
    figures = {}
    for text in given:
        name, _, figure = text.partition("=")
        if not figure:
            raise UsageError(f"{what} takes NAME=FIGURE, such as MAX_PICKLE=2GB, not {text!r}")
        figures[name] = size(figure)
    return ckptool.limited(**figures)


def tags(text: str | None) -> str | dict[str, str] | None:
    """Returns what ``--map-location`` means: one tag for all, or {from: to}. Raises: UsageError."""
    if text is None or "=" not in text:
        return text
    pairs = [pair.split("=") for pair in text.split(",")]
    if any(len(pair) != 2 or not all(pair) for pair in pairs):
        raise UsageError(f"--map-location takes a device or from=to pairs, not {text!r}")
    return {pair[0]: pair[1] for pair in pairs}


def read_data(path: str) -> Any:
    """Returns the content of a JSON or TOML file, tried in this order.

    Raises: UnreadableError, FormatError, LimitError.
    """
    import json
    import tomllib

    from ckptool.io.files import read_given

    try:
        text = read_given(path, "a file of rules").decode()
    except (OSError, UnicodeDecodeError) as error:
        reason = explain(error) if isinstance(error, OSError) else "is not UTF-8 text"
        raise UnreadableError(reason, path) from error
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        if not path.endswith(".toml") and text.lstrip()[:1] in ("{", '"'):
            raise FormatError(f"not JSON: {error}", path) from error
    try:
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise FormatError(f"neither JSON nor TOML: {error}", path) from error
