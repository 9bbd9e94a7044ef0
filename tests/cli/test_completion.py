"""Completion: what a shell is answered, and what real shells make of it."""

from __future__ import annotations

import json
import os
import pickle
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from oracles import FIXTURES, Run, Saved

import ckptool
from ckptool import formats
from ckptool.cli.app import COMMANDS, app
from ckptool.cli.terminal import completion

Complete = Callable[..., list[str]]

AT_MOST = completion.SECONDS

PATIENT = """
import sys
from ckptool.cli import main
from ckptool.cli.terminal import completion
completion.SECONDS = 120
sys.exit(main(sys.argv[1:]))
"""
"""A command that a busy machine does not keep from answering."""


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What is answered is tested whatever else the machine does; that time is bounded, by a test of its own."""
    monkeypatch.setattr(completion, "SECONDS", 120)
    (tmp_path / "patient.py").write_text(PATIENT)


@pytest.fixture
def complete(run: Run, monkeypatch: pytest.MonkeyPatch) -> Complete:
    """What is offered for the last of some words."""

    def call(*words: object, shell: str = "zsh") -> list[str]:
        monkeypatch.setenv("_CKPTOOL_COMPLETE", f"complete_{shell}")
        monkeypatch.setenv("COMP_WORDS", "\n".join(["ckptool", *map(str, words)]))
        monkeypatch.setenv("COMP_CWORD", str(len(words)))
        if shell == "bash":
            monkeypatch.setenv("COMP_LINE", " ".join(["ckptool", *map(str, words)]))
        code, out, err = run()
        assert (code, err) == (0, "")
        for name in ("_CKPTOOL_COMPLETE", "COMP_WORDS", "COMP_CWORD", "COMP_LINE"):
            monkeypatch.delenv(name, raising=False)
        return out.splitlines()

    return call


@pytest.fixture
def files(saved: Saved) -> None:
    saved({"layer1.weight": torch.ones(2), "layer1.bias": torch.ones(2), "head.weight": torch.ones(3)}, "old.pth")
    saved({"model": {"layer1.weight": torch.ones(2), "top.weight": torch.ones(3)}, "epoch": 3}, "new.pth")


@pytest.mark.parametrize("shell", completion.SCRIPTS)
def test_commands_options_and_words_are_completed(shell: str, complete: Complete) -> None:
    for words, expected in {
        ("",): sorted(COMMANDS),
        ("in",): ["inspect"],
        ("--ver",): ["--verbose", "--version"],
        ("--color", "never", "fil"): ["filter"],
        ("-q", "con"): ["convert"],
        ("inspect", "--inc"): ["--include"],
        ("inspect", "a.pth", "--sort", "n"): ["nbytes", "numel"],
        ("convert", "a.pth", "--to", ""): sorted(formats.names()),
        ("convert", "a.pth", "--no-"): ["--no-fsync", "--no-verify"],
        ("convert", "a.pth", "--dtype", "bf"): ["bfloat16"],
        ("filter", "a.pth", "--optimizer", ""): ["drop", "keep"],
        ("remap", "a.pth", "--preset", "li"): ["lightning"],
        ("load-partial", "a.pth", "--init-preset", "re"): ["resnext"],
        ("diff", "a.pth", "b.pth", "--color", "a"): ["always", "auto"],
        ("inspect", "a.pth", "--limit", "MAX_PICKL"): ["MAX_PICKLE="],
        ("inspect", "a.pth", "--check", "--fail-on", "crc"): ["crc"],
        ("inspect", "a.pth", "--check", "--fail-on", "crc,na"): ["crc,nan"],
    }.items():
        assert complete(*words, shell=shell) == expected, words


def test_every_option_of_every_command_is_offered(complete: Complete) -> None:
    for command in COMMANDS:
        known = [name for one in app.get_command(None, command).params if one.param_type_name == "option"
                 for name in (*one.opts, *one.secondary_opts)]  # fmt: skip
        assert complete(command, "-") == sorted(known)


@pytest.mark.parametrize("option", ["--include", "--exclude"])
@pytest.mark.parametrize("command", ["inspect", "filter", "load-partial"])
def test_keys_are_those_of_the_file_that_is_named(command: str, option: str, complete: Complete, files: None) -> None:
    assert complete(command, "old.pth", option, "") == ["head.weight", "layer1.bias", "layer1.weight"]
    assert complete(command, "old.pth", option, "layer1.w") == ["layer1.weight"]
    assert complete(command, "new.pth", option, "t") == ["top.weight"]
    assert complete(command, "--root", "model", "new.pth", option, "t") == ["top.weight"]


def test_keys_of_the_target_where_an_option_is_about_it(complete: Complete, files: None) -> None:
    assert complete("filter", "--match", "new.pth", "old.pth", "--require", "") == ["layer1.weight", "top.weight"]
    into = ("load-partial", "old.pth", "--into", "new.pth")
    assert complete(*into, "--freeze", "") == ["first:", "layer1.weight", "loaded", "top.weight"]
    assert complete(*into, "--init", "t") == ["top.weight"]
    assert complete(*into, "--init", "top.*=zer") == ["top.*=zeros"]
    assert complete(*into, "--adapt", "top.*=ro") == ["top.*=rows"]
    assert complete("diff", "old.pth", "new.pth", "--ignore", "") == [
        "head.weight", "layer1.bias", "layer1.weight", "top.weight",
    ]  # fmt: skip
    assert complete("convert", "old.pth", "--keep", "h") == ["head.weight"]
    assert complete("remap", "old.pth", "--drop", "h") == ["head.weight"]
    assert complete("remap", "old.pth", "--strip-prefix", "") == ["head.", "layer1."]


def test_roots_are_places_with_weights(complete: Complete, saved: Saved) -> None:
    w = {"a.weight": torch.ones(2)}
    saved({"state_dict": w, "ema": w, "epoch": 3}, "x.pth")
    assert complete("inspect", "x.pth", "--root", "") == ["ema", "state_dict"]


def test_an_option_and_its_value_may_be_one_word(complete: Complete, files: None) -> None:
    assert complete("inspect", "old.pth", "--include=h") == ["--include=head.weight"]
    assert complete("inspect", "old.pth", "--include=h", shell="bash") == ["head.weight"]
    assert complete("load-partial", "--init", "top.*=zer", shell="bash") == ["zeros"]


def test_of_very_many_keys_the_next_segment_is_offered(complete: Complete, saved: Saved) -> None:
    saved({f"layers.{i}.{part}": torch.ones(1) for i in range(80) for part in ("w", "b")}, "big.pth")
    assert complete("inspect", "big.pth", "--include", "la") == ["layers."]
    assert len(complete("inspect", "big.pth", "--include", "layers.")) == 80
    assert complete("inspect", "big.pth", "--include", "layers.7.") == ["layers.7.b", "layers.7.w"]


def test_the_protocol_takes_the_words_as_a_shell_has_them_too(
    run: Run, files: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"_CKPTOOL_COMPLETE": "complete_bash", "COMP_CWORD": "4"}.items():
        monkeypatch.setenv(name, value)
    for words, at in {"ckptool inspect old.pth --include he": "4", "ckptool inspect old.pth --include ": "4",
                      "ckptool  inspect 'old.pth' --include 'he": "4"}.items():  # fmt: skip
        monkeypatch.setenv("COMP_WORDS", words)
        monkeypatch.setenv("COMP_CWORD", at)
        assert "head.weight" in run()[1].splitlines()


def test_where_files_are_wanted_the_shell_is_left_to_it(complete: Complete, files: None) -> None:
    for words in (["inspect", "ol"], ["inspect", ""], ["convert", "old.pth", "-o", "x"], ["remap", "x", "--rules", ""]):
        assert complete(*words) == []


class Runs:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("ran",)


def test_whatever_is_wrong_there_is_no_answer_and_nothing_runs(complete: Complete, tmp_path: Path) -> None:
    Path("bad.pth").write_bytes(b"\x80\x04no checkpoint")
    Path("acts.pth").write_bytes(pickle.dumps({"w": Runs()}))
    Path("code.py").write_text("import os\nos.mkdir('ran')\ndef build(): pass\n")
    os.mkfifo("pipe.pth")
    for path in ("absent.pth", "bad.pth", "acts.pth", "code.py:build", ".", "pipe.pth", ""):
        assert complete("inspect", path, "--include", "") == [], path
    assert complete("nonsense", "--include", "") == []
    assert complete("inspect", "--", "--inc") == []
    assert not Path("ran").exists()


def test_an_answer_that_takes_too_long_is_none(
    complete: Complete, files: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(*_: object) -> None:
        end = time.monotonic() + 60
        while time.monotonic() < end:
            time.sleep(0.01)

    assert AT_MOST == 3, "as docs/reference/terminal.md says"
    assert complete("inspect", "old.pth", "--include", "he") == ["head.weight"]
    monkeypatch.setattr(completion, "SECONDS", 0.2)
    monkeypatch.setattr(ckptool, "open", slow)
    begin = time.monotonic()
    assert complete("inspect", "old.pth", "--include", "he") == []
    assert time.monotonic() - begin < 50


def test_keys_that_a_line_cannot_hold_are_not_offered(complete: Complete, saved: Saved) -> None:
    saved({"a\nb": torch.ones(1), "a\x1b[31m": torch.ones(1), "a b": torch.ones(1), "ab": torch.ones(1)}, "x.pth")
    assert complete("inspect", "x.pth", "--include", "a") == ["a b", "ab"]
    assert complete("inspect", "x.pth", "--include", "a", shell="bash") == ["'a b'", "ab"]


def test_only_headers_are_read(complete: Complete, tmp_path: Path) -> None:
    header = json.dumps({"layer.w": {"dtype": "F32", "shape": [1 << 33], "data_offsets": [0, 1 << 35]}}).encode()
    with open("big.safetensors", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + (1 << 35))
    begin = time.process_time()
    assert complete("inspect", "big.safetensors", "--include", "l") == ["layer.w"]
    assert time.process_time() - begin < 2


# --- scripts and shells ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shell", completion.SCRIPTS)
def test_a_script_is_printed_and_installed_once(shell: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", os.getcwd())
    for args in (["--show-completion", shell], [f"--show-completion={shell}"]):
        assert run(*args) == (0, completion.SCRIPTS[shell], "")
    monkeypatch.setenv("SHELL", f"/usr/bin/{shell}")
    assert run("--show-completion")[1] == completion.SCRIPTS[shell]
    place, start, line = completion.PLACES[shell]
    if start:
        Path(start).write_text("alias ll='ls -l'")
    for _ in range(2):
        code, out, _ = run("--install-completion")
        assert (code, place in out) == (0, True)
    assert Path(place).read_text() == completion.SCRIPTS[shell]
    assert not start or Path(start).read_text().splitlines() == ["alias ll='ls -l'", line]


def test_a_shell_that_has_no_script_is_refused(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, err = run("--install-completion", "zhs")
    assert (code, out) == (2, "")
    assert err == "ckptool: error: completion takes bash, zsh, fish; not 'zhs' (did you mean zsh?)\n"


def typed(shell: list[str], keys: list[str], environment: dict[str, str]) -> str:
    """What a shell on a terminal shows when this is typed: what makes its prompt READY>, then a line and a tab."""
    import pty

    pid, fd = pty.fork()
    if not pid:
        os.execvpe(shell[0], shell, environment)
    shown = b""

    def until(seconds: float, mark: bytes = b"\0") -> None:
        nonlocal shown
        end = time.monotonic() + seconds
        while time.monotonic() < end and mark not in shown:
            if select.select([fd], [], [], 0.1)[0]:
                try:
                    shown += os.read(fd, 1 << 16)
                except OSError:
                    return

    try:
        until(5, b"\x1b[?2004h")  # what most shells say when they listen
        for text, answer in zip(keys, (b"READY>", b"head.weight"), strict=True):
            os.write(fd, text.encode())
            until(120, answer)
    finally:
        os.kill(pid, 9)
        os.waitpid(pid, 0)
        os.close(fd)
    return shown.decode(errors="replace")


START = {
    "bash": (["bash", "--norc", "-i"], "source script.bash; PS1='REA''DY>'\n"),
    "zsh": (["zsh", "-f", "-i"], "autoload -Uz compinit; compinit -u -D; source ./script.zsh; PS1='REA''DY>'\n"),
    "fish": (["fish", "--no-config", "-i"], "source script.fish; function fish_prompt; echo 'REA''DY>'; end\n"),
}


@pytest.mark.skipif(sys.platform != "linux", reason="needs pseudo-terminals")
@pytest.mark.parametrize("shell", START)
def test_a_real_shell_completes_a_key_on_a_terminal(shell: str, files: None) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} here")
    Path(f"script.{shell}").write_text(completion.SCRIPTS[shell])
    Path("bin").mkdir()
    Path("bin/ckptool").write_text(f'#!/bin/sh\nexec {sys.executable} {os.getcwd()}/patient.py "$@"\n')
    Path("bin/ckptool").chmod(0o755)
    root = str(FIXTURES.parent)
    environment = {**os.environ, "PATH": f"{os.getcwd()}/bin:{os.environ['PATH']}", "PYTHONPATH": root, "TERM": "xterm",
                   "HOME": os.getcwd()}  # fmt: skip
    command, start = START[shell]
    shown = typed(command, [start, "ckptool inspect old.pth --include he\t"], environment)
    assert "head.weight" in shown, shown


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
def test_bash_gets_what_stands_behind_an_equals_sign(files: None) -> None:
    script = completion.SCRIPTS["bash"].replace('"$1" 2>/dev/null', f"{sys.executable} patient.py")
    for line, expected in {"ckptool inspect old.pth --include=he": ["head.weight"], "ckptool insp": ["inspect"],
                           "ckptool inspect 'old.pth' --include 'he": ["head.weight"]}.items():  # fmt: skip
        call = f"{script}\nCOMP_LINE={line!r}" if "'" not in line else f'{script}\nCOMP_LINE="{line}"'
        call += "; COMP_POINT=${#COMP_LINE}; _ckptool_completion ckptool; printf '%s\\n' \"${COMPREPLY[@]}\""
        environment = {**os.environ, "PYTHONPATH": str(FIXTURES.parent)}
        done = subprocess.run(["bash", "--norc", "-c", call], capture_output=True, text=True, env=environment)
        assert done.stdout.splitlines() == expected, done.stderr
