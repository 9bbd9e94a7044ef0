"""Colour by meaning: when it is shown, on which stream, that it can be read, and that nothing hangs on it alone."""

from __future__ import annotations

import io
import re
import sys

import pytest
import torch
from oracles import FIXTURES, Run, Saved
from ptys import shown

from ckptool.cli.terminal import colours

OLD, NEW = FIXTURES / "resnet_old.pth", FIXTURES / "resnet_new.pth"
CODES = re.compile(r"\x1b\[[\d;]*m")

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs pseudo-terminals")


@pytest.fixture
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")


WAYS: dict[str, tuple[list[str], dict[str, str], tuple[bool, bool]]] = {
    "as the streams are": ([], {}, (False, True)),
    "always": (["--color", "always"], {}, (True, True)),
    "always, in one word": (["--color=always"], {"NO_COLOR": "1"}, (True, True)),
    "never": (["--color", "never"], {"FORCE_COLOR": "1"}, (False, False)),
    "auto": (["--color", "auto"], {}, (False, True)),
    "the last of two": (["--color", "never", "--color", "always"], {}, (True, True)),
    "NO_COLOR": ([], {"NO_COLOR": "1"}, (False, False)),
    "NO_COLOR of no text": ([], {"NO_COLOR": ""}, (False, True)),
    "FORCE_COLOR": ([], {"FORCE_COLOR": "1"}, (True, True)),
    "NO_COLOR and FORCE_COLOR": ([], {"NO_COLOR": "1", "FORCE_COLOR": "1"}, (False, False)),
    "a dumb terminal": ([], {"TERM": "dumb"}, (False, False)),
    "always on a dumb terminal": (["--color", "always"], {"TERM": "dumb"}, (True, True)),
}
"""Options, variables; whether colours are on a stdout that is a pipe, and on a stderr that is a terminal."""


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("before", [False, True], ids=["behind the command", "before it"])
def test_colours_are_shown_as_asked_and_on_each_stream_by_itself(
    way: str, before: bool, run: Run, plain_environment: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, variables, (out_colour, err_colour) = WAYS[way]
    for name, value in variables.items():
        monkeypatch.setenv(name, value)

    def given(*words: object) -> list[object]:
        return [*options, *words] if before else [*words, *options]

    code, out, _ = run(*given("diff", OLD, NEW))
    assert (code, bool(CODES.search(out))) == (1, out_colour)
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    for wrong in ("absent.pth", "--no-such-option"):
        assert run(*given("inspect", wrong))[0] == 2
    assert terminal.getvalue().count("\n") == 2
    assert [bool(CODES.search(line)) for line in terminal.getvalue().splitlines()] == [err_colour] * 2


def test_a_terminal_has_colours_and_a_pipe_beside_it_has_none() -> None:
    both = shown("inspect", OLD, "--include", "absent.*")
    assert CODES.search(both.out)
    assert CODES.search(both.err)
    piped = shown("inspect", OLD, "--include", "absent.*", ttys="err")
    assert not CODES.search(piped.out)
    assert CODES.search(piped.err)


def test_colours_are_codes_around_the_same_text(run: Run) -> None:
    for args in (["inspect", OLD], ["inspect", OLD, "--check"], ["diff", OLD, NEW], ["remap", OLD, "--drop", "fc.*",
                 "--dry-run"], ["filter", "--match", NEW, OLD, "--dry-run"]):  # fmt: skip
        plain, coloured = run(*args, "--color", "never"), run(*args, "--color", "always")
        assert CODES.sub("", coloured[1]) == plain[1]
        assert coloured[1] != plain[1]
        assert coloured[1].count("\x1b[") == 2 * len(re.findall(r"\x1b\[0m", coloured[1])), "every colour ends"


def test_json_keys_and_files_have_no_colours(run: Run, saved: Saved) -> None:
    assert "\x1b" not in run("diff", OLD, NEW, "--json", "--color", "always")[1]
    assert "\x1b" not in run("inspect", OLD, "--keys", "--color", "always")[1]
    run("filter", OLD, "-o", "o.pth", "--report", "report.json", "--color", "always")
    with open("report.json") as file:
        assert "\\u001b" not in file.read()


def test_a_key_that_is_called_like_a_label_is_not_coloured(run: Run, saved: Saved) -> None:
    path = saved({"same": torch.ones(1), "values.0": torch.ones(2), "error": torch.ones(3), "nan": torch.ones(4)})
    for options in ([], ["--flat"], ["--keys"], ["--depth", "1"], ["--stats"]):
        out = run("inspect", path, "--color", "always", *options)[1]
        table = out.splitlines()[-4:]
        assert not CODES.search("".join(table)), options
    assert not CODES.search(run("remap", path, "--rename", "nan=inf", "--dry-run", "--color", "always")[1])


def test_a_wrong_word_is_refused_with_the_one_that_is_meant(run: Run) -> None:
    code, out, err = run("inspect", OLD, "--color", "alway")
    assert (code, out) == (2, "")
    assert err == "ckptool: error: --color takes auto, always, never; not 'alway' (did you mean always?)\n"


def test_a_value_of_another_option_is_no_wish(run: Run, plain_environment: None) -> None:
    assert "\x1b" not in run("inspect", "--color", "never", "--", "absent.pth", "--color=always")[2]


def luminance(code: str) -> float:
    """Relative luminance of a colour of xterm's palette, as WCAG has it."""
    number = int(code.rpartition(";")[2])
    if number >= 232:
        channels = [8 + 10 * (number - 232)] * 3
    else:
        channels = [[0, 95, 135, 175, 215, 255][(number - 16) // step % 6] for step in (36, 6, 1)]
    linear = [(c / 255 / 12.92) if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * one for weight, one in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("code", [colours.GOOD, colours.CARE, colours.BAD, colours.NEWS, colours.QUIET])
def test_every_colour_can_be_read_on_black_and_on_white(code: str) -> None:
    light = luminance(code)
    assert (light + 0.05) / 0.05 > 3.9
    assert 1.05 / (light + 0.05) > 3.9


def test_rich_is_not_imported_for_colours() -> None:
    import subprocess

    script = "import sys; from ckptool.cli import main; main(sys.argv[1:]); print('rich' in sys.modules)"
    command = [sys.executable, "-c", script, "diff", str(OLD), str(NEW), "--color", "always"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "False"
    assert "\x1b[" in done.stdout
