"""The GitHub Action and the recipe for pull requests, run as GitHub's runner would, without a network."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from oracles import FIXTURES

from ckptool.cli import main

ACTION = yaml.safe_load((FIXTURES.parent / "action.yml").read_text())
STEP = next(step for step in ACTION["runs"]["steps"] if step.get("id") == "run")


def run_step(command: str, **inputs: str) -> tuple[int, str, dict[str, str], str]:
    """Returns (exit code, log, outputs, summary) of the action's second step, its scripts run by bash."""
    given = {name: one.get("default", "") for name, one in ACTION["inputs"].items()} | {"run": command, **inputs}
    variables = {name: given[text[len("${{ inputs.") : -len(" }}")]] for name, text in STEP["env"].items()}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    for name in ("GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY"):
        Path(name).write_text("")
        variables[name] = str(Path(name).absolute())
    environment = {**os.environ, **variables, "RUNNER_TEMP": str(Path.cwd()), "PATH": path}
    done = subprocess.run(
        ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", STEP["run"]],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    outputs = dict(line.split("=", 1) for line in Path("GITHUB_OUTPUT").read_text().splitlines())
    return done.returncode, done.stdout + done.stderr, outputs, Path("GITHUB_STEP_SUMMARY").read_text()


@pytest.fixture
def pair(saved: Any) -> tuple[Path, Path]:
    state = {"layer1.weight": torch.ones(2, 3), "fc.bias": torch.zeros(6)}
    return saved(state, "a b.pth"), saved({"layer1.weight": torch.ones(2, 3), "fc.bias": torch.zeros(7)}, "new.pth")


def test_a_difference_fails_the_step_and_is_said_in_the_log_and_in_the_comment(pair: tuple[Path, Path]) -> None:
    code, log, outputs, summary = run_step("diff 'a b.pth'\nnew.pth")
    assert (code, outputs["exit-code"]) == (1, "1")
    assert "::error file=new.pth,title=ckptool diff%3A shape::fc.bias: 6 -> 7" in log
    assert "| **shape** | `fc.bias` | 6 -> 7 |" in summary
    assert Path(outputs["comment"]).read_text() == summary


def test_what_is_found_may_be_let_pass_but_an_error_may_not(pair: tuple[Path, Path]) -> None:
    code, _, outputs, _ = run_step("diff 'a b.pth' new.pth", **{"allow-failure": "true"})
    assert (code, outputs["exit-code"]) == (0, "1")
    assert run_step("diff 'a b.pth' new.pth --ignore fc.bias")[0] == 0
    code, log, outputs, summary = run_step("diff 'a b.pth' absent.pth", **{"allow-failure": "true"})
    assert (code, outputs["exit-code"]) == (2, "2")
    assert "absent.pth" in log
    assert "no such file" in summary


@pytest.mark.parametrize(
    "output",
    [
        "filter new.pth --match 'a b.pth' -o out.pth",
        "diff 'a b.pth' new.pth --html out.html",
        "load-partial new.pth --into 'a b.pth' -o out.pth",
        "inspect --check new.pth --lock out.lock",
    ],
)
def test_a_command_that_writes_is_run_once_and_its_comment_says_what_the_log_says(
    output: str, pair: tuple[Path, Path]
) -> None:
    code, log, outputs, summary = run_step(output)
    assert code == int(output.startswith("diff"))
    assert outputs["exit-code"] == str(code)
    assert list(Path.cwd().glob("out.*"))
    assert "exists already" not in log + summary
    assert summary.startswith(f"**ckptool {output.split()[0]}: ")
    code, log, _, summary = run_step(output)
    assert code == 2
    assert "exists already" in log
    assert "exists already" in summary


@pytest.mark.parametrize(
    "command", ["diff 'a b.pth new.pth", "diff 'a b.pth' new.pth --json", "convert new.pth -o x.npz"]
)
def test_a_command_line_that_is_wrong_fails_the_step_and_has_a_comment_or_none(
    command: str, pair: tuple[Path, Path]
) -> None:
    code, log, outputs, summary = run_step(command)
    assert code == 2
    assert summary == (Path(outputs["comment"]).read_text() if outputs else "")
    assert "passed" not in summary
    assert log


def test_a_comment_that_cannot_be_written_is_an_error(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CKPTOOL_COMMENT", "absent/comment.md")
    assert main(["diff", "new.pth", "new.pth", "--format", "github"]) == 2
    assert "absent/comment.md" in capsys.readouterr().err


def test_words_of_a_pull_request_are_data(pair: tuple[Path, Path]) -> None:
    for text in ("$(touch ran)", "`touch ran`", "; touch ran", '"x" && touch ran', "*.pth"):
        assert run_step(f"diff new.pth {text}")[0] == 2
    assert not Path("ran").exists()


def test_every_input_and_output_of_the_action_is_described_and_used() -> None:
    text = (FIXTURES.parent / "action.yml").read_text()
    for name, one in ACTION["inputs"].items():
        assert one["description"]
        assert f"${{{{ inputs.{name} }}}}" in text
    for name, one in ACTION["outputs"].items():
        assert one["value"] == f"${{{{ steps.run.outputs.{name} }}}}"
        assert f'echo "{name}=' in STEP["run"]
