"""The commands put together, and the one place where errors become a line and an exit code."""

from __future__ import annotations

import sys
from typing import Annotated

import click
import typer

from ckptool.cli import convert, diff, filter, inspect, load_partial, remap, render
from ckptool.errors import CkptoolError, UsageError

INTERRUPTED = 130
"""The exit code of Ctrl-C: no command returns it."""

app = typer.Typer(
    name="ckptool",
    help="Look into, compare, filter and rewrite checkpoints without loading them.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("inspect")(inspect.command)
app.command("diff")(diff.command)
app.command("filter")(filter.command)
app.command("remap", cls=remap.Ordered)(remap.command)
app.command("convert")(convert.command)
app.command("load-partial")(load_partial.command)


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        import ckptool

        print(f"ckptool {ckptool.__version__}")
        raise typer.Exit


def run(args: list[str]) -> int:
    """Runs one command line. Any exception but ours and the parser's is a bug and keeps its traceback."""
    known = {command.name for command in app.registered_commands}
    command = next((arg for arg in args if arg in known), "")
    as_json = "--json" in args
    try:
        code = app(args, standalone_mode=False, prog_name="ckptool")
    except CkptoolError as error:
        return _fail(error, command, as_json)
    except click.exceptions.NoArgsIsHelpError as error:
        render.write(f"{error.format_message()}\n")
        return 2
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        hint = f" (see {context.command_path} --help)" if context else ""
        return _fail(UsageError(f"{error.format_message()}{hint}"), command, as_json)
    except (KeyboardInterrupt, click.Abort):
        code = INTERRUPTED
    if code == INTERRUPTED:  # typer makes an exit code of a KeyboardInterrupt, and says nothing
        print("ckptool: interrupted", file=sys.stderr)
    return code if isinstance(code, int) else 0


def _fail(error: CkptoolError, command: str, as_json: bool) -> int:
    if as_json:
        render.print_json(
            {"schema": 1, "command": command,
             "error": {"kind": error.slug, "message": error.message, "path": error.path}}
        )  # fmt: skip
    print(f"ckptool: error: {render.safe(str(error))}", file=sys.stderr)
    return error.exit_code
