"""What --help shows, the same with every version of typer: purpose, examples, arguments, options by their use."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ckptool.cli.terminal import colours, tables

PANELS = {
    "Inputs": "match into model like arg root root-a root-b match-root into-root like-root tp-rules",
    "Keys": "include exclude ignore strip-prefix strip-prefix-a strip-prefix-b add-prefix rename sub drop copy preset "
    "rules renames auto-remap min-confidence interactive invert allow-unused only-matched first-wins",
    "Values": "stats hash values quick rtol atol devices cast dtype keep layout dequantize untie adapt init "
    "init-preset seed optimizer map-location metadata set-metadata unset-metadata",
    "Training": "freeze new-lr-mult weight-decay groups-out",
    "Gates": "check min-loaded require strict fail-on allow exit-zero",
    "Output": "output to max-shard-size shard-name with-files publish save-map save-rules lock update-lock schema "
    "verify fsync force in-place dry-run world-size",
    "Report": "flat fold keys tree depth sort top all explain json format html report",
    "Every command": "limit color quiet verbose install-completion show-completion version help",
}
"""Headings, and the options below each, in this order. Those that stand nowhere are below "Options"."""

WIDEST = 100
"""Columns of help on a terminal that has more; in a pipe it has 80."""
NAMES = 30
"""Columns for the names of options; where they take more, the text begins on the next line."""


def page(ctx: Any, command: Any, commands: dict[str, str] | None = None) -> str:
    """Returns the help of a command; or of a group, with a line for each of its ``commands``."""
    limit = max(min(tables.columns() or 80, WIDEST), 40)
    pieces = "COMMAND [ARGS]..." if commands else " ".join(one.metavar for one in _of(command, "argument"))
    said, *examples = (command.help or "").split("\n\n")
    lines = [f"Usage: {ctx.command_path} [OPTIONS] {pieces}", ""]
    lines += [f"  {line}" for line in tables.wrapped(said.replace("\n", " "), limit - 2)]
    if examples:
        lines += ["", _title("Examples"), *_examples(examples, limit)]
    parts = [("Commands", [*commands.items()])] if commands else []
    parts += [("Arguments", [*map(_argument, _of(command, "argument"))])]
    options = {max(one.opts, key=len).removeprefix("--"): one for one in _of(command, "option")}
    for title, names in PANELS.items():
        parts.append((title, [_option(options.pop(name)) for name in names.split() if name in options]))
    parts.insert(-1, ("Options", [*map(_option, options.values())]))
    for title, rows in parts:
        lines += ["", _title(title), *_rows(rows, limit)] if rows else []
    return "\n".join(lines)


def _of(command: Any, kind: str) -> list[Any]:
    return [one for one in command.params if one.param_type_name == kind]


def _title(text: str) -> str:
    return colours.painted(f"{text}:", colours.STRONG)


def _examples(texts: list[str], limit: int) -> Iterable[str]:
    """Returns lines that a shell takes: a remark without room stands above its command, which goes on behind a \\."""
    for line in "\n".join(texts).splitlines():
        command, mark, remark = line.partition("  #")
        if mark and len(line) > limit - 2:
            yield f"  #{remark}"
            line = command.rstrip()
        first, *more = tables.wrapped(line, limit - 6) if len(line) > limit - 2 else [line]
        yield " \\\n      ".join([f"  {first}", *more])


def _rows(rows: list[tuple[str, str]], limit: int) -> Iterable[str]:
    """Returns a line or more for each name and its text."""
    widest = min(NAMES, limit // 2)
    column = max([len(name) for name, _ in rows if len(name) <= widest], default=widest)
    for name, text in rows:
        lines = tables.wrapped(text, limit - column - 4)
        if len(name) > widest:
            lines = ["", *lines]
        yield from (f"  {name if not at else '':{column}}  {line}".rstrip() for at, line in enumerate(lines))


def _argument(parameter: Any) -> tuple[str, str]:
    return parameter.metavar, parameter.help + ("  [required]" if parameter.required else "")


def _option(parameter: Any) -> tuple[str, str]:
    """Returns the names of an option and what it takes; and its help and its default."""
    default = parameter.default
    if parameter.secondary_opts:
        default = (parameter.opts if default else parameter.secondary_opts)[0].removeprefix("--")
    shown = f"  [default: {default}]" if type(default) in (str, int, float) else ""
    names = " / ".join(
        ", ".join(sorted(group, key=len)) for group in (parameter.opts, parameter.secondary_opts) if group
    )
    return " ".join(filter(None, (names, parameter.metavar))), parameter.help + shown
