"""The table of commands, and the one place where errors become a line and an exit code."""

from __future__ import annotations

import importlib
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import click

import ckptool
from ckptool.cli import render
from ckptool.errors import CkptoolError, UsageError

INTERRUPTED = 130
"""The exit code after Ctrl-C. No command returns it."""

COMMANDS = {
    "inspect": "Show what a checkpoint holds; runs nothing that is in it.",
    "diff": "Show how two checkpoints differ: exit 0 if they are the same, 1 if they differ.",
    "filter": "Keep what fits: TARGET, with every tensor that agrees in name and shape taken from SOURCE.",
    "remap": "Rename keys and reshape tensors by rules, in the order given.",
    "convert": "Write checkpoints in another format, and verify every tensor.",
    "load-partial": "Load what fits of SOURCE into a changed model, adapt shapes, initialise the rest.",
}
"""Names of the commands and the first lines of their help, so that listing them imports none."""


class Commands(click.Group):
    """A group that imports a command when it is looked up: typer takes some ms to build one from a function.

    The commands' files have no ``from __future__ import annotations``: typer would evaluate the text annotations
    twice, which takes 3 ms of every start.
    """

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS or cmd_name in self.commands:
            return self.commands.get(cmd_name)
        import typer

        module = importlib.import_module(f"ckptool.cli.{cmd_name.replace('-', '_')}")
        single = typer.Typer(
            add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False,
            context_settings={"help_option_names": ["-h", "--help"]},
        )  # fmt: skip
        single.command(cmd_name, cls=getattr(module, "COMMAND", None))(module.command)
        command = typer.main.get_command(single)
        for parameter in command.params:
            if isinstance(parameter, click.Argument):  # click 8.5 clears the help that typer gave it
                parameter.help = module.command.__annotations__[parameter.name].__metadata__[0].help
        command.format_arguments = lambda *_: None  # type: ignore[method-assign]  # typer shows the arguments already
        command.params.append(_limit())
        self.add_command(command, cmd_name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


def _limit() -> click.Option:
    """Returns the ``--limit`` option, which every command has: they all read checkpoints."""

    def limit(ctx: click.Context, param: click.Parameter, given: tuple[str, ...]) -> None:
        if given:
            from ckptool.cli import options

            ctx.with_resource(options.limited(given))

    return click.Option(
        ["--limit"], multiple=True, expose_value=False, callback=limit, metavar="NAME=FIGURE",
        help="Raise a limit that an error named, such as MAX_PICKLE=2GB.",
    )  # fmt: skip


@click.group(
    name="ckptool",
    cls=Commands,
    help="Look into, compare, filter and rewrite checkpoints without loading them.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(ckptool.__version__, message="ckptool %(version)s", help="Print the version and exit.")
def app() -> None:
    """The command line; its commands do the work."""


def run(args: list[str]) -> int:
    """Runs one command line. Any exception but ckptool's and click's is a bug and keeps its traceback."""
    command = next((arg for arg in args if arg in COMMANDS), "")
    as_json = "--json" in args
    try:
        with app.make_context("ckptool", list(args)) as context:  # `app.main` prints a line of its own on Ctrl-C
            code = app.invoke(context)
    except click.exceptions.Exit as end:
        code = end.exit_code
    except CkptoolError as error:
        return _fail(error, command, as_json)
    except click.exceptions.NoArgsIsHelpError as error:
        render.write(f"{error.format_message()}\n")
        return 2
    except click.ClickException as error:
        where = getattr(error, "ctx", None)
        hint = f" (see {where.command_path} --help)" if where else ""
        return _fail(UsageError(f"{error.format_message()}{hint}"), command, as_json)
    except (KeyboardInterrupt, click.Abort):
        print("ckptool: interrupted", file=sys.stderr)
        return INTERRUPTED
    return code if isinstance(code, int) else 0


def _fail(error: CkptoolError, command: str, as_json: bool) -> int:
    if as_json:
        render.print_json({"schema": 1, "command": command, "error": render.error_json(error)})
    print(f"ckptool: error: {render.safe(str(error))}", file=sys.stderr)
    return error.exit_code


ENDS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
"""Signals that end a process by default: from a scheduler, or from a terminal that is closed."""


@contextmanager
def terminable() -> Iterator[None]:
    """Makes SIGTERM and SIGHUP raise SystemExit inside the block. Signals that are ignored or handled stay so."""
    changed = [number for number in ENDS if signal.getsignal(number) == signal.SIG_DFL]
    try:
        for number in changed:
            signal.signal(number, _terminate)
    except ValueError:  # only the main thread may set handlers: elsewhere the caller handles signals
        changed = []
    try:
        yield
    finally:
        for number in changed:
            signal.signal(number, signal.SIG_DFL)


def _terminate(number: int, frame: object) -> NoReturn:
    raise SystemExit(128 + number)
