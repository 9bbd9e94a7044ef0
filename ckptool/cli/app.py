"""The table of commands, and the one place where errors become a line and an exit code."""

import functools
import importlib
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from enum import EnumType
from itertools import pairwise
from typing import Annotated, Any, NoReturn, get_args

import typer
from typer.core import TyperCommand, TyperGroup

import ckptool
from ckptool import reports
from ckptool.cli import progress, render
from ckptool.cli.terminal import colours
from ckptool.errors import CkptoolError, OutputError, UsageError, near, one_of
from ckptool.io import paths, system, tally
from ckptool.ranks import world as ranks

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


class Commands(TyperGroup):
    """A group that imports a command when it is looked up: typer takes some ms to build one from a function.

    The commands' files, as this one, have no ``from __future__ import annotations``: typer would evaluate the text
    annotations twice, which takes 3 ms of every start.
    """

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS:
            ctx.fail(f"no such command {cmd_name!r}{near(cmd_name, COMMANDS)}")
        if cmd_name not in self.commands:
            module = importlib.import_module(f"ckptool.cli.{cmd_name.replace('-', '_')}")
            self.add_command(_built(cmd_name, module.command), cmd_name)
        return self.commands[cmd_name]

    def get_help(self, ctx: Any) -> str:
        from ckptool.cli.terminal import help as page

        return page.page(ctx, self, COMMANDS)


class Command(TyperCommand):
    """A command that keeps the order of its options, and whose help is the same with every version of typer."""

    def make_parser(self, ctx: Any) -> Any:
        """Makes a parser that puts the names of the options in their order into ``ctx.meta``."""
        parser: Any = super().make_parser(ctx)
        parse = parser.parse_args

        def parsed(args: list[str]) -> Any:
            found = parse(args)
            ctx.meta["ckptool.order"] = [parameter.name for parameter in found[2]]
            return found

        parser.parse_args = parsed
        return parser

    def get_help(self, ctx: Any) -> str:
        from ckptool.cli.terminal import help as page

        return page.page(ctx, self)


def _print_help(ctx: typer.Context, given: bool) -> None:
    if given:
        render.write(f"{ctx.get_help()}\n")
        raise typer.Exit


def _print_version(given: bool) -> None:
    if given:
        render.write(f"ckptool {ckptool.__version__}\n")
        raise typer.Exit


def _raise_limits(ctx: typer.Context, given: list[str] | None) -> None:
    if given:
        from ckptool.cli import options

        ctx.with_resource(options.limited(given))


def _color(given: str | None) -> None:
    if given is not None:
        colours.ask(given)


def _quiet(given: bool) -> None:
    if given:
        if tally.current is not None:
            raise UsageError("--quiet and --verbose contradict each other")
        render.quiet = True


def _verbose(given: bool) -> None:
    if given:
        if render.quiet:
            raise UsageError("--quiet and --verbose contradict each other")
        tally.current = tally.Tally(render.note)


Limit = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=FIGURE", callback=_raise_limits, expose_value=False,
        help="Raise a limit that an error named, such as MAX_PICKLE=2GB.",
    ),
]  # fmt: skip
Color = Annotated[
    str | None,
    typer.Option(metavar="WHEN", callback=_color, expose_value=False, help="Colours: auto (default), always, never."),
]
Quiet = Annotated[
    bool,
    typer.Option(
        "-q", "--quiet", callback=_quiet, expose_value=False,
        help="No notes, no bar, and nothing on stdout once the output is written; errors and results stay.",
    ),
]  # fmt: skip
Verbose = Annotated[
    bool,
    typer.Option(
        "-v", "--verbose", callback=_verbose, expose_value=False,
        help="Say on stderr what was chosen and why, what was read, and how long it took.",
    ),
]  # fmt: skip
Install = Annotated[
    bool,
    typer.Option(
        "--install-completion", metavar="[SHELL]",
        help="Have a shell complete commands, options, files and keys: bash, zsh, fish. Comes first.",
    ),
]  # fmt: skip
Show = Annotated[
    bool, typer.Option("--show-completion", metavar="[SHELL]", help="Print the script that does. Comes first.")
]
Version = Annotated[
    bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
]
Help = Annotated[
    bool,
    typer.Option(
        "-h", "--help", callback=_print_help, is_eager=True, expose_value=False, help="Show this message and exit."
    ),
]


def _shared(
    limit: Limit = None, color: Color = None, quiet: Quiet = False, verbose: Verbose = False, show_help: Help = False
) -> None:
    """Has the options that every command has."""


def _group(
    color: Color = None, quiet: Quiet = False, verbose: Verbose = False, install: Install = False, show: Show = False,
    version: Version = False, show_help: Help = False,
) -> None:  # fmt: skip
    """Look into, compare, filter and rewrite checkpoints without loading them."""


TEXT = (str, str | None, list[str], list[str] | None)
"""Types of parameters whose values are used as they were given."""


def _built(name: str, function: Callable[..., Any]) -> Any:
    """Returns typer's command for a function, with the options that every command has."""
    command, shared = _typer(), _typer()
    command.command(name, cls=Command, add_help_option=False)(function)
    shared.command(name)(_shared)
    built = typer.main.get_command(command)
    built.params += typer.main.get_command(shared).params
    return _sparing(built, {**function.__annotations__, **_shared.__annotations__})


def _typer(**settings: Any) -> typer.Typer:
    return typer.Typer(add_completion=False, rich_markup_mode=None, **settings)


def _sparing(command: Any, types: dict[str, Any]) -> Any:
    """Returns the command, whose parameters leave defaults and text as they are.

    typer would import pydantic to convert them, which takes 75 ms, and pydantic refuses file names that are not UTF-8.
    """
    for parameter in command.params:
        parameter.help = types[parameter.name].__metadata__[0].help  # click 8.5 clears the help of arguments
        kind = types[parameter.name].__origin__
        words = next((one for one in get_args(kind) if isinstance(one, EnumType)), None)
        parameter.process_value = functools.partial(_value, parameter, kind in TEXT, words, parameter.process_value)
    return command


def _value(parameter: Any, is_text: bool, words: Any, convert: Callable[[Any, Any], Any], ctx: Any, value: Any) -> Any:
    """Returns the value of a parameter, which typer converts only where that changes it; ``words``: an enum of them."""
    if words is not None and isinstance(value, str):
        return words(one_of([*words], value, parameter.opts[0]))
    if is_text and isinstance(value, str | list | tuple) and value != ():
        return parameter.callback(ctx, parameter, value) if parameter.callback else value
    return value if value is parameter.default and not parameter.required else convert(ctx, value)


main = _typer(name="ckptool", cls=Commands, suggest_commands=False, add_help_option=False)
main.callback()(_group)
app: Any = _sparing(typer.main.get_command(main), _group.__annotations__)

WrongUsage: Any = typer.BadParameter.__base__
"""What typer raises for any wrong command line; it exports only this one of its subclasses."""


VARIABLES = {
    "CKPTOOL_COLOR": "what --color says: auto, always, never",
    "CKPTOOL_FOLD": "1 or 0: whether alike keys are one line",
    "CKPTOOL_LIMIT": "what --limit says, several with commas between them",
    "CKPTOOL_PROGRESS": "auto, or never: whether a terminal gets a bar",
}
"""Variables of the environment, and what each is a default of. An option goes before its variable."""


def run(args: list[str]) -> int:
    """Runs one command line. Any exception but ckptool's and typer's is a bug and keeps its traceback."""
    args = _without_secrets(args)
    command = next((arg for arg in args if arg in COMMANDS), "")
    form = _form(args)
    render.quiet, tally.current, ranks.started, ranks.current = False, None, None, None
    begun = time.perf_counter()
    try:
        with _defaults(colours.asked_by(args)), _one_rank(command) as works:
            code = _invoked(args) if works else 0
    except CkptoolError as error:
        return _fail(error, command, form)
    except WrongUsage as error:
        hint = f" (see {error.ctx.command_path} --help)" if error.ctx else ""
        return _fail(UsageError(f"{_wrong(error)}{hint}"), command, form)
    except (KeyboardInterrupt, Interrupted, typer.Abort):
        print("ckptool: interrupted", file=sys.stderr)
        return INTERRUPTED
    finally:
        if tally.current is not None:
            _tell(tally.current, time.perf_counter() - begun)
            tally.current = None
    return code if isinstance(code, int) else 0


def _without_secrets(args: list[str]) -> list[str]:
    """Returns the arguments with masks for the secrets of URLs: no message or report can show them.

    A URL begins an argument, or stands behind the ``=`` of an option or an adapter (of which a comma ends it).
    """
    made = []
    for before, arg in pairwise(["", *args]):
        option, equals, value = arg.partition("=") if arg.startswith("--") and "=" in arg else (before, "", arg)
        if option == "--adapt":
            value = re.sub(r"\w[\w+.-]+://[^,]*", lambda found: paths.given(found[0]), value)
        made.append(f"{option}={paths.given(value)}" if equals else paths.given(value))
    return made


WRITING = ("filter", "remap", "convert", "load-partial")
"""Commands that the ranks of torchrun do together, where they write a directory."""


@contextmanager
def _one_rank(command: str) -> Iterator[bool]:
    """Has the block be one of the ranks of torchrun, if it is; yields whether this one has work.

    Rank 0 alone prints. Errors in the block become what the ranks know of them. Raises: UsageError.
    """
    world = ranks.of_environment()
    if world is None or command not in WRITING:
        if world is not None and world.leads:
            render.note(f"rank 0 does this alone: {', '.join(WRITING)} are divided, where they write a directory")
        yield world is None or world.leads
        return
    ranks.started = ranks.current = world
    try:
        with open(os.devnull, "w") as nowhere, nullcontext() if world.leads else redirect_stdout(nowhere):
            yield True
    except CkptoolError as error:
        raise (error if ranks.current is None else world.told(error)) from error
    except SystemExit as end:
        raise OutputError(f"was told to end ({end.code}), as torchrun does where another rank failed") from end


COMPLETION = ("--install-completion", "--show-completion")


def _complete(name: str, shell: str | None) -> None:
    """Does what an option of `COMPLETION` asks for. Raises: UsageError, OutputError."""
    from ckptool.cli.terminal import completion

    shell = completion.shell_of(shell)
    render.write(completion.SCRIPTS[shell] if name == COMPLETION[1] else f"{completion.install(shell)}\n")


def _invoked(args: list[str]) -> Any:
    name, _, shell = (args or [""])[0].partition("=")
    if name in COMPLETION:  # before all else, since they take a word or none, which no parser of options knows
        return _complete(name, shell or "".join(args[1:2]) or None)
    try:
        # `app.main` would print a line of its own on Ctrl-C
        with app.make_context("ckptool", list(args) or ["--help"]) as context:
            return app.invoke(context)
    except typer.Exit as end:
        return end.exit_code if args else UsageError.exit_code


@contextmanager
def _defaults(color: str | None) -> Iterator[None]:
    """Sets in the block what variables of the environment say. Raises: UsageError for a wrong one."""
    colours.ask("auto")
    if color is not None:
        colours.ask(color)
    elif given := os.environ.get("CKPTOOL_COLOR"):
        colours.ask(given, "CKPTOOL_COLOR")
    progress.wanted = one_of(progress.CHOICES, os.environ.get("CKPTOOL_PROGRESS") or "auto", "CKPTOOL_PROGRESS")
    one_of(("1", "0"), os.environ.get("CKPTOOL_FOLD") or "0", "CKPTOOL_FOLD")
    figures = os.environ.get("CKPTOOL_LIMIT")
    if not figures:
        yield
        return
    from ckptool.cli import options

    with options.limited(figures.split(","), "CKPTOOL_LIMIT"):
        yield


def _tell(told: tally.Tally, seconds: float) -> None:
    """Says what a run read, the files that it read most of by name, and how long it took."""
    from ckptool.text import size

    most = sorted(told.read.items(), key=lambda item: -item[1])
    for path, nbytes in most[:20]:
        render.note(f"{path}: read {size(nbytes)}{_requests(told.requests.get(path, 0))}")
    more = f", {len(most) - 20} more than these" if len(most) > 20 else ""
    files = f"{len(most)} file{'s' * (len(most) != 1)}{_requests(sum(told.requests.values()))}"
    render.note(f"read {size(sum(told.read.values()))} of {files}{more}, in {seconds:.2f} s")


def _requests(count: int) -> str:
    return f" in {count} request{'s' * (count != 1)}" if count else ""


def _wrong(error: Any) -> str:
    """Returns what is wrong with a command line; an unknown option comes with one that is like it."""
    if not hasattr(error, "possibilities"):
        return str(error.format_message())
    names = [name for one in error.ctx.command.params for name in (*one.opts, *one.secondary_opts)]
    return f"no such option {error.option_name}{near(error.option_name, names)}"


def _form(args: list[str]) -> str:
    """Returns the form that a command line asks for, which may be a wrong one otherwise."""
    given = [after for arg, after in pairwise([*args, ""]) if arg == "--format"]
    given += [arg.partition("=")[2] for arg in args if arg.startswith("--format=")]
    return "json" if "--json" in args else given[-1] if given else "text"


def _fail(error: CkptoolError, command: str, form: str) -> int:
    if ranks.is_other():
        pass
    elif form == "json":
        from ckptool.reports import document

        render.write(document.text({"schema": 1, "command": command, "error": document.error(error)}))
    elif form in reports.FORMS and form != "text":
        from ckptool.reports.outcome import failure

        try:
            render.outcomes([failure(error, command)], form)
        except OutputError as other:  # the comment, which is not what failed first
            render.note(f"error: {other}")
    render.fail(error)
    if ranks.started is not None:
        ranks.started.leave(error)
    return error.exit_code


class Interrupted(BaseException):
    """Ctrl-C. After a KeyboardInterrupt inside exec or eval of text, as namedtuple uses them, CPython ends the process
    by the signal, although it was handled."""


@contextmanager
def terminable() -> Iterator[None]:
    """Makes SIGTERM and SIGHUP raise SystemExit inside the block, and SIGINT `Interrupted`.

    Signals that are ignored or handled stay so.
    """
    defaults = {**dict.fromkeys(system.ENDS, signal.SIG_DFL), signal.SIGINT: signal.default_int_handler}
    changed = {number: default for number, default in defaults.items() if signal.getsignal(number) == default}
    try:
        for number in changed:
            signal.signal(number, _end)
    except ValueError:  # only the main thread may set handlers: elsewhere the caller handles signals
        changed = {}
    try:
        yield
    finally:
        for number, default in changed.items():
            signal.signal(number, default)


def _end(number: int, frame: object) -> NoReturn:
    raise Interrupted if number == signal.SIGINT else SystemExit(128 + number)
