"""Help: options below what they are for, examples that work, and no line wider than the terminal."""

from __future__ import annotations

import re
import shlex
import shutil

import pytest
from oracles import FIXTURES, Run

from ckptool.cli.app import COMMANDS, app
from ckptool.cli.terminal import help as page
from ckptool.cli.terminal import tables

FILES = {
    "model.pth": "resnet_old.pth",
    "model.safetensors": "resnet_old.safetensors",
    "new.pth": "resnet_new.pth",
    "shards": "sharded",
}
"""What the examples' files are, among the fixtures."""


def options(command: str) -> list[str]:
    return [max(one.opts, key=len) for one in app.get_command(None, command).params if one.param_type_name == "option"]


def examples(text: str) -> list[str]:
    """The commands below "Examples:", whole where they go on in the next line."""
    section = re.split(r"^Examples:$", text, flags=re.MULTILINE)[1].split("\n\n")[0]
    return re.findall(r"^  \$ (.*)$", re.sub(r" \\\n +", " ", section), re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_stands_below_what_it_is_for(command: str, run: Run) -> None:
    code, text, err = run(command, "--help")
    assert (code, err) == (0, "")
    assert "\nOptions:\n" not in text, "an option stands in no panel of cli/terminal/help.py"
    for option in options(command):
        assert len(re.findall(rf"^  (-\w, )?{option}( |$)", text, re.MULTILINE)) == 1, option


def test_no_option_has_two_places() -> None:
    names = [name for panel in page.PANELS.values() for name in panel.split()]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("columns", [60, 72, 80, 100])
@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_fits_the_terminal_and_loses_no_word(
    command: str, columns: int, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(*command.split(), "--help")[1]
    monkeypatch.setattr(tables, "columns", lambda: columns)
    text = run(*command.split(), "--help")[1]
    assert [line for line in text.splitlines() if len(line) > columns and not line.endswith("\\")] == []
    assert sorted(text.replace("\\", "").replace("  #", " # ").split()) == sorted(
        whole.replace("\\", "").replace("  #", " # ").split()
    )


def test_help_is_no_wider_than_can_be_read(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "columns", lambda: 240)
    assert max(map(len, run("convert", "--help")[1].splitlines())) <= page.WIDEST


@pytest.mark.parametrize("command", COMMANDS)
def test_every_example_works_as_it_stands(command: str, run: Run) -> None:
    for name, fixture in FILES.items():
        copy = shutil.copytree if (FIXTURES / fixture).is_dir() else shutil.copy
        copy(FIXTURES / fixture, name)
    found = examples(run(command, "--help")[1])
    assert 2 <= len(found) <= 4
    for number, line in enumerate(found):
        words = shlex.split(line, comments=True)
        assert words[:2] == ["ckptool", command]
        code, out, err = run(*words[1:], *(["--force"] if "-o" in words and number else []))
        assert code == 0 or (command == "diff" and code == 1), (line, out + err)
        assert err == ""


@pytest.mark.parametrize("columns", [40, 60, 80])
def test_examples_stay_commands_where_there_is_little_room(
    columns: int, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    for command in COMMANDS:
        monkeypatch.setattr(tables, "columns", lambda: 100)
        wide = [shlex.split(one, comments=True) for one in examples(run(command, "--help")[1])]
        monkeypatch.setattr(tables, "columns", lambda: columns)
        narrow = [shlex.split(one, comments=True) for one in examples(run(command, "--help")[1])]
        assert narrow == wide


def test_headings_are_bold_on_a_terminal_only(run: Run) -> None:
    assert "\x1b[1mKeys:\x1b[0m" in run("inspect", "--help", "--color", "always")[1]
    assert "\x1b" not in run("inspect", "--help")[1]
