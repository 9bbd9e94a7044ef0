"""A word that is misspelt is refused with the one that is meant, wherever a word of a known list is wanted."""

from __future__ import annotations

import pytest
from oracles import FIXTURES, Run

from ckptool.core import keys
from ckptool.errors import near

OLD, NEW, NESTED = FIXTURES / "resnet_old.pth", FIXTURES / "resnet_new.pth", FIXTURES / "resnet_nested.pth"
INTO = ["load-partial", OLD, "--into", NEW, "--dry-run"]

WORDS: dict[str, tuple[list[object], str]] = {
    "a command": (["isnpect"], "inspect"),
    "a command in capitals": (["DIFF"], "diff"),
    "an option": (["inspect", OLD, "--incldue", "x"], "--include"),
    "an option with another dash": (["convert", OLD, "--max_shard_size", "1GB"], "--max-shard-size"),
    "a switch": (["convert", OLD, "--no-verfy"], "--no-verify"),
    "an option before the command": (["--colour", "never", "inspect", OLD], "--color"),
    "an order": (["inspect", OLD, "--sort", "numl"], "numel"),
    "a kind of finding": (["inspect", OLD, "--check", "--fail-on", "nam"], "nan"),
    "a root": (["inspect", NESTED, "--root", "modle"], "model"),
    "a root below another": (["inspect", NESTED, "--root", "optimizer/stat"], "state"),
    "a format": (["filter", OLD, "-o", "x.pth", "--to", "SafeTensor"], "safetensors"),
    "a dtype": (["convert", OLD, "-o", "x.pth", "--dtype", "bflot16"], "bfloat16"),
    "a wish for the optimizer": (["filter", OLD, "--dry-run", "--optimizer", "dorp"], "drop"),
    "another one": ([*INTO, "--optimizer", "remp"], "remap"),
    "a limit": (["inspect", OLD, "--limit", "MAX_PICKEL=3"], "MAX_PICKLE"),
    "rules that ship": (["inspect", OLD, "--tp-rules", "lama"], "llama"),
    "a preset": (["remap", OLD, "--dry-run", "--preset", "lightnig"], "lightning"),
    "an init preset": ([*INTO, "--init-preset", "kaimng"], "kaiming"),
    "an init rule": ([*INTO, "--init", "fc.*=kaiming_norml"], "kaiming_normal"),
    "an argument of an init rule": ([*INTO, "--init", "fc.*=normal(sdt=2)"], "std"),
    "an adapter": ([*INTO, "--adapt", "fc.*=row"], "rows"),
    "what to freeze": ([*INTO, "--freeze", "lodaed"], "loaded"),
    "a device": (["convert", OLD, "-o", "x.pth", "--map-location", "cdua:0"], "cuda"),
    "a scalar beside the weights": (["convert", NESTED, "-o", "x.safetensors", "--metadata", "epch"], "epoch"),
    "a colour": (["inspect", OLD, "--color", "alwys"], "always"),
}

PATTERNS: dict[str, tuple[list[object], str]] = {
    "include": (["inspect", OLD, "--include", "layr1.*"], "layer1.*"),
    "exclude": (["inspect", OLD, "--exclude", "fc.wieght"], "fc.weight"),
    "without what follows": (["inspect", OLD, "--include", "fc"], "fc.*"),
    "include that chooses nothing": (["filter", OLD, "--dry-run", "--include", "layr1.*"], "layer1.*"),
    "include of a merge": (["filter", "--match", NEW, OLD, "--dry-run", "--include", "layr1.*"], "layer1.*"),
    "require": (
        ["filter", "--match", NEW, OLD, "--dry-run", "--require", "layr1.*.conv1.weight"],
        "layer1.*.conv1.weight",
    ),
    "ignore": (["diff", OLD, NEW, "--ignore", "*.runing_mean"], "*.running_mean"),
    "keep": (["convert", OLD, "-o", "x.pth", "--dry-run", "--dtype", "bf16", "--keep", "layr1.*"], "layer1.*"),
    "freeze": ([*INTO, "--freeze", "layr1.*"], "layer1.*"),
    "init": ([*INTO, "--init", "fcc.*=zeros"], "fc.*"),
    "adapt that may be unused": ([*INTO, "--adapt", "fcc.*=rows", "--allow-unused"], "fc.*"),
    "rename": (["remap", OLD, "--dry-run", "--rename", "layr1=stage"], "layer1"),
    "rename of any number": (["remap", OLD, "--dry-run", "--rename", "layer1.{i}.cnv1=x.{i}"], "layer1.{i}.conv1"),
    "drop": (["remap", OLD, "--dry-run", "--drop", "layr1.*"], "layer1.*"),
    "copy": (["remap", OLD, "--dry-run", "--copy", "x=fc.wieght"], "fc.weight"),
    "a prefix": (["diff", OLD, NEW, "--strip-prefix-a", "layr1."], "layer1."),
}


@pytest.mark.parametrize("name", WORDS)
def test_a_misspelt_word_is_one_line_with_the_word_that_is_meant(name: str, run: Run) -> None:
    args, meant = WORDS[name]
    code, out, err = run(*args)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert f"(did you mean {meant}?)" in err


@pytest.mark.parametrize("name", PATTERNS)
def test_a_pattern_that_fits_nothing_comes_with_one_that_would(name: str, run: Run) -> None:
    args, meant = PATTERNS[name]
    _, out, err = run(*args)
    assert f"(did you mean {meant}?)" in out + err


def test_nothing_is_suggested_where_nothing_is_like_it(run: Run) -> None:
    for args in (["zzzz"], ["inspect", OLD, "--zzzz"], ["inspect", OLD, "--include", "zzzz.*"],
                 ["inspect", OLD, "--sort", "zzzz"], ["inspect", NESTED, "--root", "zzzz"],
                 ["inspect", OLD, "--include", "re:zzzz"], ["inspect", OLD, "-z"]):  # fmt: skip
        _, out, err = run(*args)
        assert "did you mean" not in out + err
        assert "zz" in err or "-z" in err


def test_an_option_without_its_value_is_known(run: Run) -> None:
    code, _, err = run("inspect", OLD, "--root")
    assert (code, "no such option" in err, "--root" in err) == (2, False, True)


def test_a_word_of_two_hundred_thousand_letters_is_answered_at_once() -> None:
    import time

    begin = time.process_time()
    assert near("x" * 200_000, ["inspect", "diff"]) == ""
    assert keys.near_pattern("x" * 200_000, [f"layers.{i}.w" for i in range(20_000)]) == ""
    assert time.process_time() - begin < 2
