"""Console transcripts in Markdown, run and compared: README.md, and tests/golden/*.md.

In a ```console block every line that begins with "$ " is a command, run in a fresh directory beside a copy of
fixtures/; what follows is what it printed, stdout and stderr together, then "exit N" if N is not 0. Blocks of one
file share the directory. ``python -m tests.transcripts --write`` rewrites the outputs: read the difference.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
FILES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "tests" / "golden").glob("*.md"))]
BLOCK = re.compile(r"^```console\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def ckptool(args: list[str]) -> str:
    """Returns what one command prints, and its exit code if it is not 0."""
    from ckptool.cli import main

    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        code = main(args)
    return out.getvalue() + (f"exit {code}\n" if code else "")


def run(command: str) -> str:
    """Returns what a command of a transcript prints; ckptool runs in this process, anything else in a shell."""
    words = shlex.split(command)
    if words[0] == "ckptool" and not {"|", ">", "&&", ";"} & set(words):
        return ckptool(words[1:])
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=environment)
    return done.stdout + done.stderr + (f"exit {done.returncode}\n" if done.returncode else "")


def rerun(text: str) -> str:
    """Returns a Markdown text with the output of every command as it is now."""

    def block(match: re.Match[str]) -> str:
        made = ""
        for line in match[1].splitlines(keepends=True):
            if line.startswith("$ "):
                made += line + run(line[2:].strip())
        return f"```console\n{made}```"

    with tempfile.TemporaryDirectory() as directory:
        shutil.copytree(REPOSITORY / "fixtures", Path(directory, "fixtures"))
        before = Path.cwd()
        os.chdir(directory)
        try:
            return BLOCK.sub(block, text)
        finally:
            os.chdir(before)


if __name__ == "__main__":
    sys.path.insert(0, str(REPOSITORY))
    for path in FILES:
        old = path.read_text()
        new = rerun(old)
        if new != old and "--write" in sys.argv:
            path.write_text(new)
        print(f"{path.relative_to(REPOSITORY)}: {'changed' if new != old else 'as it was'}")
