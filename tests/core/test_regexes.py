"""Regular expressions of users and of files: the same answers as `re`, and none that takes for ever."""

from __future__ import annotations

import re
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from oracles import Run, Saved

from ckptool import limits
from ckptool.core import keys
from ckptool.errors import LimitError, UsageError

FOREVER = ["(a+)+$b", "(a|a)*$b", "(a|aa)+$b", "([a-z]+)*\\d$", "(?:a?){40}a{40}b", "(.*)*x$b", "((a+)b?)+$c",
           "(?:a*a*)*$b", "a*a*a*a*a*a*a*a*$b", "(?P<n>a+)+$b",
           "a?" * 40 + "[ab]{180}b", "[ab]??" * 40 + "$", "(?:a)?" * 40 + "[ab]{180}b"]  # fmt: skip


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """What ends after two seconds ends after a tenth of one: a user names whole seconds, and the alarm takes any."""
    monkeypatch.setattr(limits.MAX_MATCH, "figure", 0.1)


@pytest.mark.parametrize("text", FOREVER)
def test_a_pattern_that_would_match_for_ever_is_refused_soon(text: str, soon: None) -> None:
    begin = time.monotonic()
    with pytest.raises(LimitError, match=r"over MAX_MATCH, 0.1 \(--limit MAX_MATCH=0.2 raises it\)"):
        keys.Regex(text).search("a" * 200)
    assert time.monotonic() - begin < 10


def test_many_keys_that_each_take_a_while_take_no_longer_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits.MAX_MATCH, "figure", 0.5)
    regex = keys.Regex("(a+)+$b")
    begin = time.monotonic()
    keys_ = ("a" * 21 + f".{number}" for number in range(10_000))
    with pytest.raises(LimitError):
        list(map(regex.search, keys_))
    assert time.monotonic() - begin < 10


def test_a_long_key_is_bounded_too_where_the_pattern_is_an_ordinary_one(soon: None) -> None:
    with pytest.raises(LimitError):
        keys.Regex(".*a.*b$").search("ab" * 30_000 + "c")


ORDINARY = [
    r"^layers\.\d+\.", r"(module\.)*layer[1-4]", r"(?:\w+\.)+weight$", r"attn\.(q|k|v)_proj", r"a{2,3}b+", r"x",
    r".*bias|.*norm.*", r"(\w+)\.\1",
]  # fmt: skip
NAMES = ["layers.10.attn.q_proj.weight", "module.module.layer3.bias", "aab", "norm.norm", "", "x" * 500, "é.bias"]


@pytest.mark.parametrize("text", ORDINARY)
def test_ordinary_patterns_match_as_before(text: str) -> None:
    regex, plain = keys.Regex(text), re.compile(text)
    for name in NAMES:
        found, expected = regex.search(name), plain.search(name)
        assert (found and found.span()) == (expected and expected.span())
        assert regex.sub(r"<\g<0>>", name) == plain.sub(r"<\g<0>>", name)


def test_an_alarm_that_someone_else_has_set_still_rings() -> None:
    rung = []
    old = signal.signal(signal.SIGALRM, lambda *_: rung.append(1))
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        assert keys.Regex("(a+)+$").search("aaa")
        assert 0 < signal.getitimer(signal.ITIMER_REAL)[0] <= 0.3
        time.sleep(0.5)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    assert rung


def test_in_another_thread_what_nothing_could_end_is_refused_and_the_rest_matches() -> None:
    found: list[object] = []

    def work() -> None:
        found.append(keys.Regex(r"layers\.\d+\.(q|k)").search("layers.3.q") is not None)
        found.append(keys.Regex(r"(module\.)*x").search("module.x") is not None)
        try:
            keys.Regex("(a+)+$b").search("a" * 100)
        except UsageError as error:
            found.append(error.message)

        try:
            keys.Regex("a?" * 40 + "[ab]{40}$").search("a" * 39)
        except UsageError as error:
            found.append(error.message)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(20)
    assert found[:2] == [True, True]
    assert len(found) == 4
    assert all("repeats what may match in many ways" in str(said) for said in found[2:])


def test_where_the_alarm_belongs_to_another_language_none_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signal, "getsignal", lambda _: None)
    monkeypatch.setattr(signal, "signal", lambda *_: pytest.fail("the handler could not be put back"))
    assert keys.Regex("(module\\.)*x").search("module.x")
    with pytest.raises(UsageError, match="call from the main thread"):
        keys.Regex("(a+)+$b").search("aaa")


def test_every_way_in_is_bounded(run: Run, saved: Saved, soon: None) -> None:
    path = saved({"a" * 80 + "c": torch.ones(2), "b": torch.ones(2)})
    Path("rules.toml").write_text('[[rules]]\nsub = "(a+)+$b"\nby = "x"\n')
    Path("schema.toml").write_text('schema = 1\n[keys]\n"re:(a+)+$b" = {}\n')
    tries = [
        ["inspect", path, "--include", "re:(a+)+$b"], ["filter", path, "--exclude", "re:(a+)+$b", "-o", "o.pth"],
        ["remap", path, "--rules", "rules.toml", "-o", "o.pth"], ["diff", path, path, "--ignore", "re:(a|a)+$b"],
        ["load-partial", path, "--into", path, "--init", "re:(a|aa)+$b=zeros", "-o", "o.pth"],
    ]  # fmt: skip
    for words in tries:
        code, _, err = run(*words)
        assert (code, err.count("\n"), "over MAX_MATCH, 0.1" in err) == (2, 1, True), (words, err)
    code, _, err = run(*tries[0], "--limit", "MAX_MATCH=1")
    assert (code, "over MAX_MATCH, 1 (--limit MAX_MATCH=2 raises it)" in err) == (2, True)
