"""The rules by which ranks are joined: their text, and which of them decides."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from oracles import Run
from ranks import llama, refused

import ckptool
from ckptool.errors import UnreadableError, UsageError


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[join]\na = 'replicate'", "a: 'replicate' is no way to join (did you mean replicated?); there are cat N"),
        ("[join]\na = 'cat0'", "a: 'cat0' is no way to join (did you mean cat N?)"),
        ("[join]\na = 'cat 0 in 0 parts'", "is no way to join"),
        ("[join]\na = 0", "a: 0 is no way to join"),
        ("[join]\na = {gated_by = 'b'}", "a table is {gated-by = KEY} or {width-by = KEY}"),
        ("[joins]\na = 'cat 0'", "no field 'joins' (did you mean join?)"),
        ("layer = ['a.{i}']", "no field 'layer' (did you mean layers?)"),
        ("layers = ['a.i']", "layers is a list of patterns that end in .{i}"),
        ("stage_layers = [1.5]", "stage_layers is a list of whole numbers"),
        ("vocab_size = true", "vocab_size is a whole number above 0"),
        ("base = 'gtp'", "base is the name of rules that ship, not 'gtp'"),
        ("join = 3", "join is a table of key patterns"),
        ("[join]\n'a.{i}.w' = {gated-by = 'b.{j}.w'}", "{j}, which the old name has not"),
        ("join = [", "not TOML"),
    ],
)
def test_a_wrong_rule_is_one_line_that_names_it(tmp_path: Path, run: Run, text: str, says: str) -> None:
    Path("rules.toml").write_text(text)
    torch.save({"a": torch.ones(2)}, "a.pth")
    code, _, err = run("inspect", "a.pth", "--tp-rules", "rules.toml")
    assert (code, err.count("\n")) == (2, 1)
    assert says in err
    assert "rules.toml" in err


def test_rules_that_are_not_there_are_refused_with_those_that_ship(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, "a.pth")
    refused(UnreadableError, "(did you mean llama?)", "rules that ship: gpt, llama", rules="lama", path="a.pth")
    refused(UnreadableError, "no such file", rules="dir/rules.toml", path="a.pth")
    refused(UsageError, "tp_rules is a path, a name or a dict, not an int", rules=3, path="a.pth")


def test_the_last_pattern_that_fits_a_key_decides(tmp_path: Path) -> None:
    whole = llama(tmp_path / "run", 2)
    Path("rules.toml").write_text('base = "llama"\n[join]\n"*norm*" = "first"\n"re:^rope" = "drop"\n')
    found = ckptool.open("run", tp_rules=Path("rules.toml"))
    assert found.notes == ("joined by rules.toml", "left out by the rules: rope.freqs")
    assert found.state_dict().keys() == whole.keys() - {"rope.freqs"}


def test_the_rules_that_ship_are_in_the_package() -> None:
    from ckptool.directories.parallel import joining

    assert joining.shipped() == ["gpt", "llama"]
    for name in joining.shipped():
        rules = joining.JoinRules.of(name)
        assert rules.rules
        assert rules.layers
