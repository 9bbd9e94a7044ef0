"""Tables and sentences fit the terminal they are shown on, and are whole where a program reads them."""

from __future__ import annotations

import sys

import pytest
import torch
from oracles import Run, Saved
from ptys import shown

from ckptool.cli.terminal import tables

WIDTHS = [60, 80, 140]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs pseudo-terminals")

KEYS = {
    "a language model's": [
        f"model.language_model.layers.{i}.{m}.weight"
        for i in (0, 1)
        for m in ("self_attn.q_proj_with_a_long_name", "mlp.experts.0.gate_up_projection_of_all", "input_layernorm")
    ],
    "wide": [f"モデル.層.{i}.とても長い名前のモジュール.その中の名前.重み" for i in "abc"] + ["b.w"],
    "one segment": ["a" * 200, "b" * 90, "c"],
    "many segments": [".".join("abcdefghij" * 12), "x.y"],
    "with combining marks": ["e\u0301" * 70 + ".weight", "x.y"],
}


def given(saved: Saved, names: list[str]) -> tuple[str, str]:
    one = saved({key: torch.ones(3 + at, 2) for at, key in enumerate(names)}, "one.pth")
    two = saved({key: torch.ones(3, 2) for key in names[:-1]} | {f"{names[0]}.more": torch.ones(1)}, "two.pth")
    return one.name, two.name


@pytest.mark.parametrize("columns", WIDTHS)
@pytest.mark.parametrize("kind", KEYS)
def test_no_line_of_a_table_is_wider_than_the_terminal_and_a_pipe_gets_all(
    kind: str, columns: int, saved: Saved, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = given(saved, KEYS[kind])
    piped = run("diff", one, two)[1]
    assert all(key in piped for key in KEYS[kind][-1:])
    assert "…" not in piped
    monkeypatch.setattr(tables, "columns", lambda: columns)
    for args in (["inspect", one], ["inspect", one, "--flat"], ["diff", one, two], ["filter", "--match", one, two,
                 "--dry-run"], ["inspect", one, "--depth", "4"]):  # fmt: skip
        for line in run(*args)[1].splitlines():
            label = line.split("  ")[0] if line[:1] != " " else line.strip().split("  ")[0]
            whole = label in tables.PROSE or label in tables.COPIED or line.startswith("    ")
            assert tables.width(line) <= columns or whole or " " not in line.strip(), (args, line)


@pytest.mark.parametrize("columns", WIDTHS)
def test_a_key_that_is_too_long_gives_way_in_its_middle(columns: int, saved: Saved) -> None:
    key = "model.language_model.layers.0.attn.an_inner_module.another_one_in_it.and_one_more.the_last.q_proj.weight"
    path = saved({key: torch.ones(2), "x": torch.ones(1)})
    out = shown("inspect", path, "--flat", columns=columns, ttys="out").out
    row = next(line for line in out.splitlines() if ".weight" in line)
    assert ("…" in row) == (columns < 140)
    if columns < 140:
        assert row.strip().startswith("model.")
        assert ".weight  2  float32  8 B" in row
        assert columns - 2 <= tables.width(row) <= columns


def test_columns_says_how_wide_a_terminal_is_and_not_a_pipe(saved: Saved) -> None:
    key = ".".join(["segment"] * 12)
    path = saved({key: torch.ones(2), "x": torch.ones(1)})
    assert key in shown("inspect", path, "--flat", columns=60, COLUMNS="150").out
    assert key not in shown("inspect", path, "--flat", columns=150, COLUMNS="60").out
    assert key not in shown("inspect", path, "--flat", columns=60, COLUMNS="many").out
    assert key in shown("inspect", path, "--flat", ttys="", COLUMNS="60").out
    assert key in shown("inspect", path, "--flat", columns=0).out, "one that does not say is not guessed at"


def test_columns_stay_aligned_where_letters_are_wide(saved: Saved) -> None:
    path = saved({key: torch.ones(7, 1) for key in (*KEYS["wide"], *KEYS["with combining marks"])})
    lines = shown("inspect", path, "--flat", columns=60).out.splitlines()
    rows = [line for line in lines if "  7x1  " in line]
    assert len(rows) == 6
    assert len({tables.width(row[: row.index("  7x1  ")]) for row in rows}) == 1


def test_sentences_break_between_words_and_go_on_below(saved: Saved) -> None:
    w = torch.ones(2)
    path = saved({f"a_rather_long_name.{i}": w for i in range(6)}, "tied.pth")
    out = shown("inspect", path, "--color", "never", columns=60, ttys="out").out
    begin = next(at for at, line in enumerate(out.splitlines()) if "tied: " in line)
    first, second = out.splitlines()[begin : begin + 2]
    assert second.startswith(" " * first.index("tied: ") + "a_rather_long_name")
    assert "".join(out.split()).count("a_rather_long_name.5") >= 1


def test_what_is_to_be_copied_stays_one_line(saved: Saved) -> None:
    one = saved({f"layers.{i}.weight": torch.ones(2) for i in range(5)}, "one.pth")
    two = saved({f"a_model_of_a_long_name.of_which.{i}.weight": torch.ones(2) for i in range(5)}, "two.pth")
    piped = shown("filter", "--match", one, two, "--dry-run", ttys="").out
    hint = [line for line in piped.splitlines() if line.startswith("  hint")]
    seen = shown("filter", "--match", one, two, "--dry-run", "--color", "never", columns=60).out
    assert [line for line in seen.splitlines() if line.startswith("  hint")] == hint


def test_a_tiny_terminal_is_no_trouble(saved: Saved) -> None:
    one, two = given(saved, KEYS["a language model's"])
    for columns in (1, 2, 10, 20):
        assert shown("diff", one, two, columns=columns).code == 1


def test_an_ellipsis_is_of_the_letters_that_there_are(saved: Saved) -> None:
    path = saved({"segment." * 20 + "w": torch.ones(2), "x": torch.ones(1)})
    out = shown("inspect", path, columns=60, PYTHONIOENCODING="ascii", PYTHONUTF8="0").out
    assert ".." in out
    assert "\\u2026" not in out


@pytest.mark.parametrize("room", [5, 8, 13, 21, 34, 55])
def test_an_elided_text_has_the_room_and_both_ends(room: int) -> None:
    for text in (key for keys in KEYS.values() for key in keys):
        short = tables.elided(text, room)
        assert tables.width(short) <= room
        assert short == text or (short[0] == text[0] and short[-1] == text[-1] and tables.width(short) >= room - 2)


def test_a_key_of_two_hundred_thousand_letters_is_cut_at_once() -> None:
    import time

    begin = time.process_time()
    for key in ("1." * 100_000, "重" * 200_000, "9" * 200_000):
        assert all(tables.width(line) <= 80 for line in tables.fitted([[key, "2", "float32"]] * 3, 2, 80))
    assert time.process_time() - begin < 1


@pytest.mark.parametrize("columns", [60, 80, 150])
@pytest.mark.parametrize("depth", [[], ["--depth", "2"]])
def test_statistics_fit_and_columns_that_do_not_are_named(
    columns: int, depth: list[str], saved: Saved, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved({f"model.layers.{i}.attn.q_proj_{i}.weight": torch.randn(3, i + 1) for i in range(3)})
    piped = run("inspect", path, "--stats", *depth)[1]
    assert all(head in piped for head in ("abs max", "zeros", "NaN", "inf"))
    assert "left out" not in piped
    monkeypatch.setattr(tables, "columns", lambda: columns)
    out = run("inspect", path, "--stats", *depth)[1]
    table = out.partition("\n\n")[2].splitlines()
    assert all(tables.width(line) <= columns for line in table), out
    assert ("left out" in out) == (columns < 100)
    assert all(head in out for head in ("mean", "min", "max"))


def test_a_column_that_says_something_stays_and_hashes_are_whole(
    saved: Saved, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved({f"model.a_long_name_of_a_layer.{i}.weight": torch.tensor([1.5, float("nan"), i]) for i in range(3)})
    piped = run("inspect", path, "--hash")[1]
    monkeypatch.setattr(tables, "columns", lambda: 80)
    out = run("inspect", path, "--stats")[1]
    assert "NaN" in out.partition("left out")[0].partition("\n\n")[2]
    assert "inf" in out.partition("left out")[2]
    hashes = [line.split()[-1] for line in piped.splitlines() if line.startswith("  model.")]
    assert len(hashes) == 3
    assert all(one in run("inspect", path, "--hash")[1] for one in hashes)
