"""How much is said: --quiet, --verbose, and the variables of the environment that are defaults of options."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from oracles import FIXTURES, Run

from ckptool.cli.app import VARIABLES

OLD, NEW, NESTED = FIXTURES / "resnet_old.pth", FIXTURES / "resnet_new.pth", FIXTURES / "resnet_nested.pth"
ROOT = Path(__file__).parents[2]

WRITING: dict[str, list[object]] = {
    "filter": ["filter", "--match", NEW, OLD, "-o", "o.pth"],
    "remap": ["remap", OLD, "--add-prefix", "x.", "-o", "o.pth"],
    "convert": ["convert", OLD, "-o", "o.safetensors"],
    "convert several": ["convert", "a.pth", "b.pth", "--to", "safetensors"],
    "load-partial": ["load-partial", OLD, "--into", NEW, "-o", "o.pth"],
}


@pytest.fixture
def two() -> None:
    for name in ("a.pth", "b.pth"):
        Path(name).write_bytes(OLD.read_bytes())


@pytest.mark.parametrize("name", WRITING)
@pytest.mark.parametrize("option", [["-q"], ["--quiet"]], ids=" ".join)
def test_a_quiet_command_that_wrote_says_nothing(name: str, option: list[str], run: Run, two: None) -> None:
    assert run(*WRITING[name], *option) == (0, "", "")
    assert run(*option, *WRITING[name], "--force") == (0, "", "")
    assert [path for path in Path().iterdir() if path.name in ("o.pth", "o.safetensors", "a.safetensors")]


@pytest.mark.parametrize("name", WRITING)
def test_what_was_asked_for_stays(name: str, run: Run, two: None) -> None:
    loud, quiet = run(*WRITING[name], "--dry-run"), run(*WRITING[name], "--dry-run", "-q")
    assert quiet == loud
    assert quiet[1]
    assert json.loads(run(*WRITING[name], "-q", "--json")[1])["result"]


def test_a_quiet_gate_that_fails_says_why(run: Run) -> None:
    code, out, _ = run("filter", "--match", NEW, OLD, "-o", "o.pth", "--strict", "-q")
    assert (code, "failed" in out) == (1, True)


def test_errors_are_said_and_notes_are_not(run: Run) -> None:
    loud, quiet = run("inspect", OLD, "--include", "zzzz"), run("inspect", OLD, "--include", "zzzz", "-q")
    assert (quiet[0], quiet[1]) == (loud[0], loud[1])
    assert (loud[2] != "", quiet[2]) == (True, "")
    assert run("inspect", "absent.pth", "-q")[2] == "ckptool: error: absent.pth: no such file or directory\n"
    code, out, err = run("inspect", "absent.pth", OLD, "-q")
    assert (code, err.count("error: absent.pth"), "resnet_old" in out) == (2, 1, True)


def test_verbose_says_on_stderr_what_was_chosen_read_and_how_long_it_took(run: Run) -> None:
    code, out, err = run("filter", "--match", NESTED, OLD, "-o", "o.pth", "-v")
    assert (code, out) == (0, run("filter", "--match", NESTED, OLD, "-o", "o.pth", "--force")[1])
    lines = err.splitlines()
    assert all(line.startswith("ckptool: ") for line in lines)
    assert (
        f"ckptool: {NESTED}: read as torch-zip, for what it begins with; weights at model, a name that weights have"
        in lines
    )
    assert (
        f"ckptool: {OLD}: read as torch-zip, for what it begins with; weights at the top, which are all of it" in lines
    )
    assert "ckptool: o.pth: written as torch, by its name" in lines
    assert any(re.fullmatch(rf"ckptool: {re.escape(str(OLD))}: read \d.*B", line) for line in lines)
    assert re.fullmatch(r"ckptool: read [\d.]+ kB of 2 files, in \d+\.\d\d s", lines[-1])


def test_verbose_says_who_asked(run: Run) -> None:
    err = run("-v", "filter", NESTED, "--root", "model", "-o", "o.pth", "--to", "safetensors")[2]
    assert "weights at model, as was asked for" in err
    assert "written as safetensors, as was asked for" in err


def test_bytes_read_are_those_of_the_tensors_where_data_is_read(run: Run) -> None:
    def read(*args: object) -> float:
        (figure,) = re.findall(r"resnet_old.safetensors: read ([\d.]+) kB", run(*args)[2])
        return float(figure)

    path = FIXTURES / "resnet_old.safetensors"
    headers, data = read("inspect", path, "-v"), read("inspect", path, "--stats", "-v")
    assert 48.4 <= data - headers <= 60


def test_verbose_tells_of_an_error_too(run: Run) -> None:
    code, _, err = run("diff", OLD, "absent.pth", "-v")
    assert (code, "read as torch-zip" in err, "error: absent.pth" in err) == (2, True, True)


def test_json_is_the_same_with_verbose(run: Run) -> None:
    assert run("diff", OLD, NEW, "--json", "-v")[1] == run("diff", OLD, NEW, "--json")[1]


def test_quiet_and_verbose_contradict_each_other(run: Run) -> None:
    for args in (["inspect", OLD, "-q", "-v"], ["-v", "inspect", OLD, "-q"], ["-q", "inspect", OLD, "--verbose"]):
        code, out, err = run(*args)
        assert (code, out) == (2, "")
        assert "error: --quiet and --verbose contradict each other" in err


def test_one_run_is_not_quiet_because_another_was(run: Run) -> None:
    run("convert", OLD, "-o", "o.pth", "-q")
    assert run("convert", OLD, "-o", "o.pth", "--force")[1]
    run("inspect", OLD, "-v")
    assert run("inspect", OLD)[2] == ""


# --- variables of the environment ------------------------------------------------------------------------------------


def test_a_colour_of_the_environment_goes_before_others_and_behind_an_option(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CKPTOOL_COLOR", "always")
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[" in run("diff", OLD, NEW)[1]
    assert "\x1b[" not in run("diff", OLD, NEW, "--color", "never")[1]
    assert "\x1b[" not in run("--color", "auto", "diff", OLD, NEW)[1]


def test_limits_of_the_environment_hold_and_an_option_raises_them(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CKPTOOL_LIMIT", "MAX_PICKLE=100,MAX_DEPTH=50")
    code, _, err = run("inspect", OLD)
    assert (code, "MAX_PICKLE" in err) == (2, True)
    assert run("inspect", OLD, "--limit", "MAX_PICKLE=1GB")[0] == 0
    monkeypatch.delenv("CKPTOOL_LIMIT")
    assert run("inspect", OLD)[0] == 0


WRONG = {
    "CKPTOOL_COLOR": ("alway", "CKPTOOL_COLOR takes auto, always, never; not 'alway' (did you mean always?)"),
    "CKPTOOL_FOLD": ("yes", "CKPTOOL_FOLD takes 1, 0; not 'yes'"),
    "CKPTOOL_PROGRESS": ("nevr", "CKPTOOL_PROGRESS takes auto, never; not 'nevr' (did you mean never?)"),
    "CKPTOOL_LIMIT": ("MAX_PICKLE", "CKPTOOL_LIMIT takes NAME=FIGURE, such as MAX_PICKLE=2GB, not 'MAX_PICKLE'"),
}


@pytest.mark.parametrize("name", VARIABLES)
def test_a_wrong_value_is_one_line_that_names_the_variable(
    name: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    value, said = WRONG[name]
    monkeypatch.setenv(name, value)
    assert run("inspect", OLD) == (2, "", f"ckptool: error: {said}\n")
    monkeypatch.setenv(name, "")
    assert run("inspect", OLD)[0] == 0, "empty is as if it were not set"


def test_the_manual_has_every_variable() -> None:
    manual = (ROOT / "docs/reference/terminal.md").read_text()
    for name, meaning in VARIABLES.items():
        assert f"| `{name}` | {meaning} |" in manual
