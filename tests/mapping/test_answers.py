"""What a person is asked about a mapping, and what an answer settles."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from oracles import State
from remapping import fused

import ckptool
from ckptool.errors import UsageError
from ckptool.mapping.answers import answered, left
from ckptool.mapping.like import Question, entries
from ckptool.mapping.pairs import Doubt, Pair
from tests.ptys import shown

Saved = Callable[..., Path]


def blocks() -> tuple[State, State]:
    """Three blocks of which q, k and v are fused, and in which two vectors have names that say nothing."""
    source, target = fused()
    for i in range(3):
        source |= {f"h.{i}.ln_{name}": torch.randn(7) for name in "ab"}
        target |= {f"layer.{i}.foo_{name}": torch.randn(7) for name in "xy"}
    return source, target


def asks(source: State, target: State, settled: list[Pair] | None = None) -> list[tuple[Question, bool]]:
    return [*left(ckptool.infer(source, target, settled=settled or ())[1], ())]


def answer(asked: tuple[Question, bool], text: str, source: State, target: State) -> list[Pair]:
    ours, theirs = (entries(ckptool.open(side)) for side in (source, target))
    return answered(*asked, text, ours, theirs)


def test_a_question_is_a_template_and_the_pieces_of_one_tensor_have_one_layout() -> None:
    source, target = blocks()
    found = [
        (question.target, question.candidates, len(question.doubts), how) for question, how in asks(source, target)
    ]
    pieces = ", ".join(f"layer.{{i}}.attention.{part}.weight" for part in ("query", "key", "value"))
    assert found == [
        ("layer.{i}.foo_x", ["h.{i}.ln_a", "h.{i}.ln_b"], 3, False),
        ("layer.{i}.foo_y", ["h.{i}.ln_b", "h.{i}.ln_a"], 3, False),
        (pieces, ["h.{i}.attn.qkv.weight"], 9, True),
        (pieces.replace("weight", "bias"), ["h.{i}.attn.qkv.bias"], 9, True),
    ]
    _, report = ckptool.infer(source, target)
    assert [question.target for question, _ in left(report, {(f"layer.{i}.foo_x", False) for i in range(3)})] == [
        target for target, *_ in found[1:]
    ]


@pytest.mark.parametrize("text", ["1", "h.{i}.ln_a"])
def test_a_number_and_a_key_settle_all_of_a_template_and_teach_the_rest(text: str) -> None:
    source, target = blocks()
    pairs = answer(asks(source, target)[0], text, source, target)
    assert pairs == [Pair(f"layer.{i}.foo_x", [f"h.{i}.ln_a"], "rename", 1.0, ["a person"]) for i in range(3)]
    _, report = ckptool.infer(source, target, settled=pairs)
    made = {pair.target: pair.source for pair in report.pairs}
    assert made["layer.2.foo_y"] == ["h.2.ln_b"]


def test_a_typed_key_may_count_from_one_and_is_turned_where_its_shape_says_so() -> None:
    source = {f"p.{i}.u": torch.randn(3, 5) for i in (1, 2)} | {f"z.{i}.w": torch.randn(5, 3) for i in (1, 2)}
    target = {f"m.{i}.w": torch.zeros(5, 3) for i in (0, 1)}
    rows = [Pair(key, ["z.1.w"], "rename", 0.1) for key in target]
    report = ckptool.infer(source, target)[1]
    question = Question("m.{i}.w", ["z.{i+1}.w"], [Doubt(row.target, [row], "") for row in rows])
    pairs = answer((question, False), "p.{i+1}.u", source, target)
    assert [(pair.target, pair.source, pair.op) for pair in pairs] == [
        ("m.0.w", ["p.1.u"], "transpose"), ("m.1.w", ["p.2.u"], "transpose")
    ]  # fmt: skip
    assert report.total == 2


def test_a_square_matrix_that_is_typed_is_asked_for_its_layout() -> None:
    source, target = {f"u.{i}.a": torch.randn(4, 4) for i in (0, 1)}, {f"m.{i}.w": torch.zeros(4, 4) for i in (0, 1)}
    doubts = [Doubt(key, [], "") for key in target]
    pairs = answer((Question("m.{i}.w", [], doubts), False), "u.{i}.a", source, target)
    assert [pair.unproven for pair in pairs] == ["whether the square matrix is transposed"] * 2
    (asked,) = asks(source, target, pairs)
    assert asked[1]
    settled = answer(asked, "transposed", source, target)
    rules, report = ckptool.infer(source, target, settled=settled)
    assert (len(report.pairs), report.settled) == (2, settled)
    made = ckptool.remap(source, rules)[0].to_torch()
    assert torch.equal(made["m.1.w"], source["u.1.a"].T)


def test_a_piece_that_is_settled_leaves_the_others_to_be_found() -> None:
    source, target = blocks()
    settled = [Pair("layer.0.attention.query.weight", ["h.0.attn.qkv.weight"], "split:0:0/3", 1.0, ["a person"])]
    _, report = ckptool.infer(source, target, settled=settled)
    assert [pair.op for pair in report.unproven if pair.target == "layer.0.attention.key.weight"] == ["split:0:1/3"]
    assert report.only_target == []


@pytest.mark.parametrize(
    ("number", "text", "message"),
    [
        (0, "0", "there is no candidate 0"),
        (0, "3", "there is no candidate 3"),
        (0, "9" * 5000, "there is no candidate 9"),
        (0, "h.{i}.ln", "the source has no key h.0.ln"),
        (0, "h.{k}.ln_a", "which the old name has not"),
        (0, "h.0.ln_a", "is one key for 3"),
        (0, "h.{i}.mlp.fc.weight", r"h.0.mlp.fc.weight has shape \[20, 8\], layer.0.foo_x wants \[7\]"),
        (2, "heads", "expected as-is, transposed, heads:N"),
        (2, "heads:N", "expected as-is"),
        (2, "1", "expected as-is"),
        (2, "heads:3", "does not give shape"),
        (3, "transposed", "permute"),
    ],
)
def test_an_answer_that_does_not_fit_says_why(number: int, text: str, message: str) -> None:
    source, target = blocks()
    with pytest.raises(UsageError, match=message):
        answer(asks(source, target)[number], text, source, target)


# --- the command ---------------------------------------------------------------------------------------------------


@pytest.fixture
def files(saved: Saved) -> tuple[str, ...]:
    source, target = blocks()
    saved(source, "a.pth")
    saved(target, "b.pth")
    return "remap", "a.pth", "--like", "b.pth", "--interactive"


def test_answers_on_a_terminal_are_written_as_what_is_found(files: tuple[str, ...]) -> None:
    typed = "7\nh.{i}.ln_b\nheads:2\nas-is\n"
    code, out, err = shown(*files, "-o", "out.pth", "--save-rules", "r.json", typed=typed, columns=160, NO_COLOR="1")
    assert code == 0, err
    lines = out.splitlines()
    assert lines[:3] == [
        "layer.{i}.foo_x is made of what?  (3 keys)  [1 of 4 open]", "  1  h.{i}.ln_a  confidence 0: no witness",
        "  2  h.{i}.ln_b  confidence 0: no witness",
    ]  # fmt: skip
    assert "there is no candidate 7" in lines[3]
    assert "3 settled, 3 more settled by that" in lines[4]
    assert "out.pth: matched 27 of 27" in out
    source, _ = blocks()
    made = torch.load("out.pth")
    assert torch.equal(made["layer.1.foo_x"], source["h.1.ln_b"])
    assert torch.equal(made["layer.1.foo_y"], source["h.1.ln_a"])
    by_head = source["h.2.attn.qkv.weight"].reshape(2, 3, 4, 8)
    assert torch.equal(made["layer.2.attention.value.weight"], by_head[:, 2].reshape(8, 8))
    assert torch.equal(made["layer.2.attention.value.bias"], source["h.2.attn.qkv.bias"][16:])
    ckptool.save(ckptool.remap("a.pth", json.loads(Path("r.json").read_text()))[0], "again.pth")
    assert Path("again.pth").read_bytes() == Path("out.pth").read_bytes()


def test_what_is_skipped_is_left_out_and_q_keeps_the_answers(files: tuple[str, ...]) -> None:
    code, out, _ = shown(*files, "-o", "out.pth", typed="\ns\nas-is\nq\n", columns=160, NO_COLOR="1")
    assert (code, "out.pth: matched 12 of 27, 9 unproven, 6 in doubt" in out) == (0, True)
    assert "9 settled" in out


def test_the_end_of_the_input_stops_and_writes_nothing(files: tuple[str, ...]) -> None:
    assert (shown(*files, "-o", "out.pth", typed="1\n\x04").code, Path("out.pth").exists()) == (130, False)


@pytest.mark.parametrize(
    ("options", "ttys", "typed", "message"),
    [
        (["--dry-run"], "out err", None, "asks on a terminal"),
        (["--dry-run"], "err", "1\n", "asks on a terminal"),
        (["--dry-run", "--json"], "out err", "1\n", "asks a person: leave out --json"),
        (["--explain", "h.*"], "out err", "1\n", "asks a person: leave out --explain"),
    ],
)
def test_nobody_that_can_be_asked_is_refused(
    options: list[str], ttys: str, typed: str | None, message: str, files: tuple[str, ...]
) -> None:
    code, out, err = shown(*files, *options, ttys=ttys, typed=typed, columns=160, NO_COLOR="1")
    assert (code, len(err.splitlines()), message in err) == (2, 1, True)
    assert "is made of" not in out


def test_questions_go_with_a_target(refused: Callable[..., str]) -> None:
    said = refused("remap", "a.pth", "--rename", "a=b", "--interactive", "-o", "out.pth")
    assert "--interactive goes with --like TARGET" in said
