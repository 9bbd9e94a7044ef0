"""Markdown that is run and compared: README.md, the pages in docs/, and tests/golden.

Blocks of one file run in their order, in a fresh directory beside a copy of fixtures/ (and, for a page in docs/, of the
Python files beside it):

    ```console             every line that begins with "$ " is a command; what follows is what it printed, stdout and
                           stderr together, then "exit N" if N is not 0
    ```python              executed; blocks of one file share their names. A comment behind an expression that stands
                           alone is its value
    ```text                directly after a python block: what that block printed
    ```python nets.py      a file of that name (of any language); a later block of the same name is the rest of it

``python -m tests.transcripts --write`` rewrites outputs and values: read the difference.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import io
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tempfile
import tokenize
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import pytest

REPOSITORY = Path(__file__).parents[1]
DOCS = REPOSITORY / "docs"
FILES = [
    REPOSITORY / "README.md",
    *sorted(DOCS.rglob("*.md")),
    *sorted((REPOSITORY / "tests" / "golden").glob("*.md")),
]
BLOCK = re.compile(r"^```(\w+)(?: +([\w.]+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def ckptool(args: list[str], out: TextIO | None = None) -> str:
    """Returns what one command prints, and its exit code if it is not 0; ``out`` gets what it prints on stdout."""
    from ckptool.cli import main

    said = io.StringIO()
    with contextlib.redirect_stdout(out or said), contextlib.redirect_stderr(said):
        code = main(args)
    return said.getvalue() + (f"exit {code}\n" if code else "")


def program(words: list[str]) -> int:
    """Runs ``ckptool ARGS`` or ``python FILE ARGS`` in this process, and returns its exit code."""
    from ckptool.cli import main

    if words[0] == "ckptool":
        return main(words[1:])
    sys.argv, sys.path[0] = words[1:], str(Path(words[1]).parent.resolve())
    try:
        runpy.run_path(words[1], run_name="__main__")
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def forked(words: list[str], directory: str = ".") -> str:
    """Returns what a program prints, run by a fork of this process: all that is imported here need not be again."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        code = 1
        try:
            os.dup2(write, 1)
            os.dup2(write, 2)
            sys.stdout, sys.stderr = (os.fdopen(fd, "w", 1, closefd=False) for fd in (1, 2))
            if "torch" in sys.modules:  # threads that computed do not come along
                sys.modules["torch"].set_num_threads(1)
            os.chdir(directory)
            code = program(words)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    os.close(write)
    with open(read) as pipe:
        said = pipe.read()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return said + (f"exit {code}\n" if code else "")


def shell(command: str, given: str | None = None) -> str:
    """Returns what bash prints that runs a command."""
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, input=given)
    return done.stdout + done.stderr + (f"exit {done.returncode}\n" if done.returncode else "")


INSIDE = re.compile(r"\((?:cd (\w+) && )(ckptool [^()|>&;]+)\)(?: 2>&1 \| (.+))?")
"""A command of ckptool that is run in another directory, and what gets its output."""


def run(command: str) -> str:
    """Returns what a command of a transcript prints; ckptool and Python run without a start, anything else in a shell.

    Alike keys are one line, as on a terminal, unless a pipe or a file gets them.
    """
    words = shlex.split(command)
    piped = {"|", ">"} & set(words)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CKPTOOL_FOLD", "0" if piped else "1")
        patch.setenv("GIT_CONFIG_GLOBAL", os.devnull)  # a reader may have told git no name
        patch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        if inside := INSIDE.fullmatch(command):
            said = forked(shlex.split(inside[2]), inside[1])
            return shell(inside[3], said) if inside[3] else said
        if words[0] == "python" and words[1].endswith(".py") and not piped:
            return forked(words)
        if words[0] == "cd" and words[2:4] == ["&&", "ckptool"]:
            patch.chdir(words[1])
            command, words = command.partition(" && ")[2], words[3:]
        if words[0] != "ckptool" or {"&&", ";"} & set(words):
            return shell(command)
        if not piped:
            return ckptool(words[1:])
        if words[-2] == ">" and "|" not in words:
            with open(words[-1], "w") as out:
                return ckptool(words[1:-2], out)
        before, _, behind = command.partition(" 2>&1 | ")
        if behind and "|" not in before:
            return shell(behind, ckptool(shlex.split(before)[1:]))
        return shell(command)


def commands(text: str) -> str:
    """Returns a console block with the output of every command as it is now."""
    made = ""
    for line in text.splitlines(keepends=True):
        if line.startswith("$ "):
            made += line + run(line[2:].strip())
    return made


def python(text: str, scope: dict[str, Any]) -> tuple[str, str]:
    """Returns (a python block with the values as they are now, what it printed)."""
    lines = text.splitlines(keepends=True)
    remarks = {
        token.start: token.string
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if token.type == tokenize.COMMENT
    }
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        for statement in ast.parse(text).body:
            end = statement.end_lineno or 0
            behind = {at: remark for at, remark in remarks.items() if at[0] == end}
            if not (isinstance(statement, ast.Expr) and behind):
                exec(compile(ast.Module([statement], []), f"line {statement.lineno}", "exec"), scope)
                continue
            value = eval(compile(ast.Expression(statement.value), f"line {statement.lineno}", "eval"), scope)
            [((_, column), remark)] = behind.items()
            if not _says(remark.removeprefix("#").strip(), value, scope):
                lines[end - 1] = f"{lines[end - 1][:column]}# {_shown(value)}\n"
    return "".join(lines), printed.getvalue()


def _says(remark: str, value: object, scope: dict[str, Any]) -> bool:
    try:
        return bool(eval(remark, dict(scope)) == value)
    except (SyntaxError, NameError):
        return False


def _shown(value: object) -> str:
    text = repr(value)
    return text if '"' in text else text.replace("'", '"')


def rerun(text: str, beside: Path | None = None) -> str:
    """Returns a Markdown text with every output and value as it is now; files of ``beside`` may be imported."""
    scope: dict[str, Any] = {"__name__": "page"}
    waiting: list[str] = []  # what python printed, until a text block shows it

    def block(match: re.Match[str]) -> str:
        language, name, content = match.groups()
        if language != "text" and waiting:
            raise AssertionError(f"no ```text block shows what was printed:\n{waiting[0]}")
        if name:
            Path(name).write_text(files_of(text[: match.end()])[name])
        elif language == "console":
            content = commands(content)
        elif language == "python":
            content, printed = python(content, scope)
            waiting.extend([printed] if printed else [])
        elif language == "text" and waiting:
            content = waiting.pop()
        return f"```{language}{f' {name}' if name else ''}\n{content}```"

    with place(beside):
        made = BLOCK.sub(block, text)
    if waiting:
        raise AssertionError(f"no ```text block shows what was printed:\n{waiting[0]}")
    return made


@contextlib.contextmanager
def place(beside: Path | None) -> Iterator[None]:
    """Makes a fresh directory with the fixtures the current one, and forgets what was imported from there."""
    with tempfile.TemporaryDirectory() as directory:
        here = Path(directory).resolve()
        shutil.copytree(REPOSITORY / "fixtures", here / "fixtures")
        for file in sorted(beside.glob("*.py")) if beside else ():
            shutil.copy(file, here)
        before, path = Path.cwd(), list(sys.path)
        os.chdir(here)
        sys.path.insert(0, str(here))
        importlib.invalidate_caches()
        try:
            yield
        finally:
            os.chdir(before)
            sys.path[:] = path
            for name, module in list(sys.modules.items()):
                if str(getattr(module, "__file__", None) or "").startswith(f"{here}{os.sep}"):
                    del sys.modules[name]


def files_of(text: str) -> dict[str, str]:
    """Returns {name: content} of the files that the named blocks of a Markdown text make."""
    made: dict[str, str] = {}
    for _, name, content in BLOCK.findall(text):
        if name:
            made[name] = made.get(name, "") + content
    return made


def rerun_file(path: Path) -> str:
    """Returns a file's text with every output and value as it is now."""
    return rerun(path.read_text(), path.parent if DOCS in path.parents else None)


if __name__ == "__main__":
    sys.path.insert(0, str(REPOSITORY))
    for path in FILES:
        old = path.read_text()
        new = rerun_file(path)
        if new != old and "--write" in sys.argv:
            path.write_text(new)
        print(f"{path.relative_to(REPOSITORY)}: {'changed' if new != old else 'as it was'}")
