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
import shlex
import shutil
import subprocess
import sys
import tempfile
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[1]
DOCS = REPOSITORY / "docs"
FILES = [
    REPOSITORY / "README.md",
    *sorted(DOCS.rglob("*.md")),
    *sorted((REPOSITORY / "tests" / "golden").glob("*.md")),
]
BLOCK = re.compile(r"^```(\w+)(?: +([\w.]+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def ckptool(args: list[str]) -> str:
    """Returns what one command prints, and its exit code if it is not 0."""
    from ckptool.cli import main

    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        code = main(args)
    return out.getvalue() + (f"exit {code}\n" if code else "")


def run(command: str) -> str:
    """Returns what a command of a transcript prints; ckptool runs in this process, anything else in a shell.

    Alike keys are one line, as on a terminal, unless a pipe or a file gets them.
    """
    words = shlex.split(command)
    piped = {"|", ">"} & set(words)
    given = None
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CKPTOOL_FOLD", "0" if piped else "1")
        patch.setenv("GIT_CONFIG_GLOBAL", os.devnull)  # a reader may have told git no name
        patch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        if words[0] == "cd" and words[2:4] == ["&&", "ckptool"]:
            patch.chdir(words[1])
            command, words = command.partition(" && ")[2], words[3:]
        if words[0] == "ckptool" and not {">", "&&", ";"} & set(words):
            if not piped:
                return ckptool(words[1:])
            before, _, behind = command.partition(" 2>&1 | ")
            if behind and "|" not in before:
                given, command = ckptool(shlex.split(before)[1:]), behind
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, input=given)
    return done.stdout + done.stderr + (f"exit {done.returncode}\n" if done.returncode else "")


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
