"""The bar of bytes: on stderr, on a terminal, on jobs that take a while, and nowhere else."""

from __future__ import annotations

import io
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import FIXTURES, Run, Saved

from ckptool.cli import progress
from ckptool.io.output import LocalOutput

SHOW = "\x1b[?25h"
"""What gives a terminal its cursor back."""


class Terminal(io.StringIO):
    """What keeps all that a terminal was sent. Put in stderr's place by the test: pytest sets that after setup."""

    def isatty(self) -> bool:
        return True

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.plug_in = lambda: monkeypatch.setattr(sys, "stderr", self)


@pytest.fixture
def run(run: Run, request: pytest.FixtureRequest) -> Run:
    """Runs a command; with stderr on the terminal, where the test has one and no other file."""
    terminal = request.getfixturevalue("terminal") if "terminal" in request.fixturenames else None

    def call(*args: object) -> tuple[int, str, str]:
        if terminal is not None and not isinstance(sys.stderr, io.StringIO):
            terminal.plug_in()
        return run(*args)

    return call


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """stderr as a terminal that keeps what it was sent."""
    made = Terminal(monkeypatch)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return made


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "PATIENCE", 0)


class Recorded:
    """Stands in for rich's bars, one for each phase: what each was told, of how much."""

    def __init__(self) -> None:
        self.bars: list[dict[str, Any]] = []

    def ended(self, *phases: str) -> bool:
        """Whether these phases each ran to the end of one total, never back, and were taken away."""
        assert [bar["phase"] for bar in self.bars] == [*phases]
        assert len({bar["total"] for bar in self.bars}) == 1
        for bar in self.bars:
            assert bar["stopped"]
            assert bar["done"] == sorted(bar["done"])
            assert 0.97 < bar["done"][-1] / bar["total"] <= 1, bar
        return True

    def started(self, phase: str, total: int) -> tuple[Any, Any]:
        bar: dict[str, Any] = {"phase": phase, "total": total, "done": [], "stopped": False}
        self.bars.append(bar)

        class Bar:
            def update(self, task: Any, completed: int) -> None:
                bar["done"].append(completed)

            def stop(self) -> None:
                bar["stopped"] = True

        return Bar(), 0


@pytest.fixture
def recorded(terminal: Terminal, impatient: None, monkeypatch: pytest.MonkeyPatch) -> Recorded:
    made = Recorded()
    monkeypatch.setattr(progress, "_started", made.started)
    return made


def large(saved: Saved) -> Path:
    return saved({"a": torch.randn(500, 900), "b": torch.randn(700, 800)}, "large.pth")


COMMANDS: dict[str, list[str]] = {
    "convert to safetensors": ["convert", "large.pth", "-o", "o.safetensors"],
    "convert to torch": ["convert", "large.pth", "-o", "o.pth"],
    "convert to legacy": ["convert", "large.pth", "--to", "torch-legacy"],
    "convert to npz": ["convert", "large.pth", "-o", "o.npz"],
    "convert to shards": ["convert", "large.pth", "--to", "sharded", "-o", "o", "--max-shard-size", "2MB"],
    "convert without proof": ["convert", "large.pth", "-o", "o.safetensors", "--no-verify"],
    "remap": ["remap", "large.pth", "-o", "o.pth", "--add-prefix", "x."],
    "remap with proof": ["remap", "large.pth", "-o", "o.safetensors", "--add-prefix", "x.", "--verify"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_nothing_goes_to_stderr_that_is_no_terminal(name: str, run: Run, saved: Saved, impatient: None) -> None:
    large(saved)
    code, out, err = run(*COMMANDS[name])
    assert (code, err) == (0, "")
    assert "\x1b" not in out


@pytest.mark.parametrize("name", COMMANDS)
def test_on_a_terminal_a_bar_is_drawn_and_stdout_is_the_same(
    name: str, run: Run, saved: Saved, terminal: Terminal, impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    large(saved)
    code, shown, _ = run(*COMMANDS[name])
    assert code == 0
    drawn = terminal.getvalue()
    assert re.search(r"[━╸╺]", drawn)
    assert re.search(r"\d.*[kM]?B", drawn)
    assert drawn.rfind(SHOW) > drawn.rfind("\x1b[?25l"), "the cursor is back"
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    _, plain, _ = run(*COMMANDS[name], "--force")
    assert shown == plain


def test_json_on_stdout_is_the_same_with_a_bar(run: Run, saved: Saved, terminal: Terminal, impatient: None) -> None:
    large(saved)
    code, out, _ = run("convert", "large.pth", "-o", "o.safetensors", "--json")
    assert (code, json.loads(out)["command"]) == (0, "convert")
    assert "━" in terminal.getvalue()


def test_a_job_that_is_soon_done_shows_no_bar(run: Run, terminal: Terminal) -> None:
    assert run("convert", FIXTURES / "resnet_old.pth", "-o", "o.safetensors")[0] == 0
    assert terminal.getvalue() == ""


def test_patience_is_about_a_second() -> None:
    assert 0.5 <= progress.PATIENCE <= 2


def phases(args: list[str]) -> list[str]:
    """The phases of a command that writes one checkpoint."""
    verified = "--no-verify" not in args if args[0] == "convert" else "--verify" in args
    return ["copy", *["verify"] * verified, *["hash"] * ("--publish" in args)]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_phase_goes_through_the_bytes_of_the_output(
    name: str, run: Run, saved: Saved, recorded: Recorded
) -> None:
    large(saved)
    assert run(*COMMANDS[name])[0] == 0
    assert recorded.ended(*phases(COMMANDS[name]))
    assert len(recorded.bars[0]["done"]) > 3
    output = Path(next((one for one in COMMANDS[name] if one in ("o", "o.pth", "o.safetensors", "o.npz")), "large.pth"))
    files = [*output.iterdir()] if output.is_dir() else [output]
    written = sum(file.stat().st_size for file in files if not file.name.endswith(".json"))
    assert 0.97 < recorded.bars[0]["total"] / written < 1.03


def test_the_bar_runs_to_its_end_where_much_is_left_out(run: Run, saved: Saved, recorded: Recorded) -> None:
    w = torch.randn(500, 900)
    saved({"state_dict": {"w": w}, "optimizer": {"state": {0: {"m": w * 2, "v": w * 3}}, "param_groups": []}}, "in.pth")
    assert run("convert", "in.pth", "-o", "o.safetensors")[0] == 0
    assert recorded.ended("copy", "verify")


def test_the_bar_runs_to_its_end_where_tensors_are_tied(run: Run, saved: Saved, recorded: Recorded) -> None:
    w = torch.randn(500, 900)
    saved({"a": w, "b": w, "c": w}, "in.pth")
    assert run("convert", "in.pth", "-o", "o.pth", "--no-verify")[0] == 0
    assert recorded.ended("copy")


@pytest.mark.parametrize(
    ("options", "extra"),
    [
        pytest.param(options, extra, id=" ".join([*extra, *options]), marks=[pytest.mark.slow] if at and extra else [])
        for at, options in enumerate([
            ["-o", "o.pth"], ["-o", "o.pth", "--to", "torch-legacy"], ["-o", "o.safetensors"], ["-o", "o.npz"],
            ["--to", "sharded", "-o", "o", "--max-shard-size", "1MB"],
        ])
        for extra in ([], ["--dtype", "fp16"], ["--untie"], ["--publish"], ["--no-verify"])
    ],
)  # fmt: skip
def test_the_bar_runs_to_its_end_whatever_is_done(
    options: list[str], extra: list[str], run: Run, saved: Saved, recorded: Recorded
) -> None:
    w = torch.randn(500, 900)
    state = {
        "a": w,
        "b": w,
        "part": torch.randn(900, 900)[:, ::2],
        "t": torch.randn(700, 500).t(),
        "n": torch.arange(9),
    }
    saved({"state_dict": state, "optimizer": {"m": w * 2}, "epoch": 3}, "in.pth")
    assert run("convert", "in.pth", *options, *extra)[0] == 0
    expected = phases(["convert", *extra])
    assert recorded.ended(*(expected[:2] if "sharded" in options else expected))


def test_a_bar_names_its_phase_and_its_bytes(run: Run, saved: Saved, terminal: Terminal, impatient: None) -> None:
    large(saved)
    assert run("convert", "large.pth", "-o", "o.safetensors")[0] == 0
    drawn = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", terminal.getvalue())
    for phase in ("copy", "verify"):
        assert re.search(rf"{phase} +[━╸╺]+ 4.0/4.0 MB", drawn), drawn[-300:]


@pytest.mark.parametrize("variables", [{"TERM": "dumb"}])
def test_a_terminal_that_draws_nothing_gets_no_bar(
    variables: dict[str, str], run: Run, saved: Saved, terminal: Terminal, impatient: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    large(saved)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert run("convert", "large.pth", "-o", "o.safetensors")[0] == 0
    assert terminal.getvalue() == ""


@pytest.mark.parametrize("columns", ["40", "60", "80", "140"])
def test_a_bar_takes_one_line_whatever_the_width(
    columns: str, run: Run, saved: Saved, terminal: Terminal, impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    large(saved)
    monkeypatch.setenv("COLUMNS", columns)
    assert run("convert", "large.pth", "-o", "o.safetensors")[0] == 0
    for line in re.split(r"\r|\n", re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", terminal.getvalue())):
        assert len(line) <= int(columns)


def test_many_small_tensors_do_not_draw_as_many_bars(run: Run, saved: Saved, recorded: Recorded) -> None:
    saved({f"t{number}": torch.ones(3) for number in range(2000)}, "in.pth")
    assert run("convert", "in.pth", "-o", "o.safetensors")[0] == 0
    assert all(3 < len(bar["done"]) < 1100 for bar in recorded.bars)


def test_several_inputs_count_on_in_each_phase(run: Run, saved: Saved, recorded: Recorded) -> None:
    for number in range(3):
        saved({"w": torch.randn(300, 1000)}, f"{number}.pth")
    assert run("convert", "0.pth", "1.pth", "2.pth", "--to", "safetensors")[0] == 0
    assert [bar["phase"] for bar in recorded.bars] == ["copy", "verify"] * 3
    for number in (0, 1):
        done = [figure for bar in recorded.bars[number::2] for figure in bar["done"]]
        assert done == sorted(done)
        assert 0.97 < done[-1] / recorded.bars[0]["total"] <= 1


@pytest.mark.parametrize("command", [["filter", "--exclude", "a"], ["filter", "--match", "large.pth"]], ids=" ".join)
def test_filter_has_a_bar_too(command: list[str], run: Run, saved: Saved, recorded: Recorded) -> None:
    large(saved)
    assert run(*command, "large.pth", "-o", "o.pth")[0] == 0
    assert len(recorded.bars) == 1


def test_diff_of_values_has_a_bar_too(run: Run, saved: Saved, recorded: Recorded) -> None:
    large(saved)
    assert run("diff", "--values", "large.pth", "large.pth")[0] == 0
    assert len(recorded.bars) == 1


@pytest.mark.parametrize("options", [[], ["--ignore", "b"], ["--strip-prefix-a", "x."]], ids=" ".join)
def test_the_bar_of_diff_runs_to_its_end(options: list[str], run: Run, saved: Saved, recorded: Recorded) -> None:
    large = {"a": torch.randn(500, 900), "b": torch.randn(700, 800).t(), "c": torch.randn(3), "d": torch.ones(9, 9)}
    other = {"a": large["a"].clone(), "b": large["b"] + 1, "c": torch.ones(4), "e": torch.ones(5)}
    prefix = "x." if "--strip-prefix-a" in options else ""
    saved({prefix + key: tensor for key, tensor in large.items()}, "one.pth")
    saved({**other, "d": torch.ones(9, 9).half()}, "two.pth")
    assert run("diff", "--values", "one.pth", "two.pth", *options)[0] == 1
    (bar,) = recorded.bars
    assert bar["stopped"]
    assert bar["done"] == sorted(bar["done"])
    assert bar["done"][-1] == bar["total"]


def test_diff_without_values_has_no_bar(run: Run, saved: Saved, recorded: Recorded) -> None:
    large(saved)
    assert run("diff", "large.pth", "large.pth")[0] == 0
    assert recorded.bars == []


@pytest.mark.parametrize("raised", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_a_job_that_stops_takes_its_bar_away_and_leaves_nothing(
    raised: Any, run: Run, saved: Saved, terminal: Terminal, impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    large(saved)
    written = [0]
    pwrite = os.pwrite

    def stops(fd: int, data: Any, offset: int) -> int:
        written[0] += len(data)
        if written[0] > 1_500_000:
            raise raised
        return pwrite(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", stops)
    code, out, _ = run("convert", "large.pth", "-o", "o.safetensors")
    assert (code, out) == (130 if raised is KeyboardInterrupt else 2, "")
    drawn = terminal.getvalue()
    assert drawn.rfind(SHOW) > drawn.rfind("\x1b[?25l") > -1
    assert os.listdir() == ["large.pth"]
    if code == 2:
        assert drawn.rstrip().splitlines()[-1].endswith("no space left on device")


def test_an_interrupt_during_a_remap_leaves_nothing(
    run: Run, saved: Saved, terminal: Terminal, impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    large(saved)
    write = LocalOutput.write

    def interrupted(self: LocalOutput, data: Any) -> None:
        write(self, data)
        if self.position > 2_000_000:
            raise KeyboardInterrupt

    monkeypatch.setattr(LocalOutput, "write", interrupted)
    assert run("remap", "large.pth", "-o", "o.pth", "--add-prefix", "x.")[0] == 130
    assert os.listdir() == ["large.pth"]
    assert SHOW in terminal.getvalue()


def test_the_total_is_asked_for_only_when_a_bar_is_shown(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    terminal.plug_in()

    def total() -> int:
        asked.append(1)
        return 100

    with progress.bar(total, "copy") as advance:
        assert advance is not None
        advance(50)
    assert asked == []
    monkeypatch.setattr(progress, "PATIENCE", 0)
    with progress.bar(total, "copy") as advance:
        assert advance is not None
        advance(30)
        advance(30)
        advance(40)
    assert asked == [1]
    assert "━" in terminal.getvalue()


def test_without_a_terminal_nobody_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())

    def never() -> int:
        raise AssertionError("asked for")

    with progress.bar(never, "copy") as advance:
        assert advance is None


def test_a_bar_is_gone_when_an_error_passes(terminal: Terminal, impatient: None) -> None:
    def fails() -> None:
        with progress.bar(lambda: 10, "copy") as advance:
            assert advance is not None
            advance(5)
            raise ZeroDivisionError

    terminal.plug_in()
    with pytest.raises(ZeroDivisionError):
        fails()
    drawn = terminal.getvalue()
    assert drawn.rfind(SHOW) > drawn.rfind("\x1b[?25l") > -1


def test_rich_is_not_imported_where_no_bar_is_shown() -> None:
    import subprocess

    script = (
        "import sys; from ckptool.cli.progress import bar\n"
        "with bar(lambda: 1, 'read') as advance: assert advance is None\n"
        "print('rich.progress' in sys.modules)"
    )
    root = str(Path(progress.__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": root}
    )
    assert (done.stdout.strip(), done.stderr) == ("False", "")
