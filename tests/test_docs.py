"""Documentation is tested like code: transcripts are run again, Python blocks executed, the lists held complete."""

from __future__ import annotations

import re
import shutil

import click
import pytest
import typer

from ckptool import errors, formats
from ckptool.cli.app import app
from ckptool.ops.filter import Reason
from tests.transcripts import FILES, REPOSITORY, rerun

README = (REPOSITORY / "README.md").read_text()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_transcript_is_what_the_commands_print(path):
    text = path.read_text()
    assert rerun(text) == text, "run `make golden` and review the difference"


def test_running_the_transcripts_leaves_the_fixtures_as_they_were(tmp_path):
    before = {path: path.read_bytes() for path in (REPOSITORY / "fixtures").rglob("*") if path.is_file()}
    rerun((REPOSITORY / "tests" / "golden" / "filter.md").read_text())
    assert {path: path.read_bytes() for path in (REPOSITORY / "fixtures").rglob("*") if path.is_file()} == before


def test_the_python_of_the_readme_runs_and_gives_what_its_comments_say(tmp_path, monkeypatch):
    shutil.copytree(REPOSITORY / "fixtures", tmp_path / "fixtures")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    assert blocks
    scope: dict[str, object] = {}
    checked = 0
    for block in blocks:
        exec(block, scope)
        for expression, said in re.findall(r"^(\w[^=#\n]*?)\s+# (.+)$", block, re.MULTILINE):
            try:
                expected = eval(said, scope)
            except (SyntaxError, NameError):
                continue  # a remark, not a value
            assert eval(expression, scope) == expected, expression
            checked += 1
    assert checked >= 4


def commands() -> dict[str, click.Command]:
    return typer.main.get_command(app).commands


def test_every_command_and_option_is_in_the_readme():
    for name, command in commands().items():
        assert f"ckptool {name}" in README
        for parameter in command.params:
            if isinstance(parameter, click.Option) and parameter.name != "help":
                longest = max(parameter.opts, key=len)
                assert longest in README or any(opt in README for opt in parameter.opts), f"{name} {longest}"


def test_every_error_slug_exit_code_format_and_reason_is_in_the_readme():
    classes = [value for value in vars(errors).values() if isinstance(value, type)]
    slugs = {value.slug for value in classes if issubclass(value, errors.CkptoolError)} - {"error"}
    for slug in slugs:
        assert f"| `{slug}` |" in README
    for code in (0, 1, 2, 130):
        assert f"| {code} |" in README
    for name in (*formats.READERS, "sharded"):
        assert f"`{formats._module(name).NAME}`" in README
    for reason in Reason.__args__:
        assert f"| `{reason}` |" in README
    for _, suffixes in formats.WRITERS.values():
        assert all(suffix in README for suffix in suffixes)


def test_no_output_of_help_is_cut_or_empty():
    for command in commands().values():
        text = command.get_help(click.Context(command))
        assert "..." not in text.splitlines()[2]
        assert all(option.help for option in command.params if isinstance(option, click.Option))
