"""Lock files: what stands in them, what is read of them, and the gates that they are for."""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import FIXTURES, Run

import ckptool
from ckptool.cli import main
from ckptool.core.tensor import TensorInfo
from ckptool.errors import FormatError, UnsupportedError

Saved = Callable[..., Path]
Refused = Callable[..., str]
HEAD = "# ckptool lock 1\n"
"""Of a lock that does not say how many keys it has, as they were once written."""

ODD = [
    "",
    " ",
    "a b",
    "a\tb",
    "a\nb",
    "a\rb",
    "\r",
    "#x",
    '"quoted"',
    "\\n",
    "\x00",
    "\x1b[31m",
    "\u2028",
    "\ud800",
    "\u00e9",
    "\u65e5\u672c",
    "\U0001f600",
    "sha256:",
    "tied:a",
    "1.10",
    "<<<<<<< HEAD",
    "x" * 3000,
]


def form(tensors: dict[str, TensorInfo]) -> dict[str, Any]:
    return {key: (one.dtype, one.shape) for key, one in tensors.items()}


def truth(state: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {key: (str(one.dtype).removeprefix("torch."), tuple(one.shape)) for key, one in state.items()}


def test_a_lock_holds_every_key_with_its_shape_and_dtype(run: Run, saved: Saved) -> None:
    state = {
        "b": torch.zeros(2, 0, 3), "a": torch.tensor(1.0), "c": torch.zeros(3, dtype=torch.bfloat16),
        "d": torch.zeros(2, 2, dtype=torch.float8_e4m3fn), "e": torch.tensor([True]),
    }  # fmt: skip
    assert run("inspect", saved(state), "--lock", "x.lock")[::2] == (0, "")
    opened = ckptool.open("x.lock")
    assert (opened.format, form(opened.state_dict())) == ("lock", truth(state))
    assert {one.kind for one in opened.state_dict().values()} == {"meta"}
    assert Path("x.lock").read_text().splitlines() == [
        "# ckptool lock 1, 5 keys",
        "a\tfloat32\tscalar",
        "b\tfloat32\t2x0x3",
        "c\tbfloat16\t3",
        "d\tfloat8_e4m3fn\t2x2",
        "e\tbool\t1",
    ]


def test_any_key_comes_back_as_it_was_and_takes_one_line(run: Run, saved: Saved) -> None:
    path = saved({key: torch.zeros(number) for number, key in enumerate(ODD)})
    assert run("inspect", path, "--lock", "x.lock", "--keys")[::2] == (0, "")
    text = Path("x.lock").read_bytes()
    assert text.count(b"\n") == len(ODD) + 1
    assert text.endswith(b"\n")
    assert form(ckptool.open("x.lock").state_dict()) == {key: ("float32", (n,)) for n, key in enumerate(ODD)}
    assert run("diff", path, "x.lock")[0] == 0


def test_a_lock_is_the_same_whatever_the_order_of_keys_and_the_format(run: Run, saved: Saved) -> None:
    state = {key: torch.zeros(2) for key in ("b.10", "b.9", "a", "B")}
    one, other = saved(state), saved(dict(reversed(state.items())), "other.pth")
    assert run("convert", other, "-o", "x.safetensors")[0] == 0
    for number, path in enumerate((one, other, "x.safetensors")):
        assert run("inspect", path, "--lock", f"{number}.lock", "--hash")[0] == 0
    run("inspect", "0.lock", "--lock", "3.lock")
    assert len({Path(f"{number}.lock").read_bytes() for number in range(3)}) == 1
    assert "sha256:" not in Path("3.lock").read_text()
    assert [line.split("\t")[0] for line in Path("3.lock").read_text().splitlines()[1:]] == sorted(state)


def test_hashes_are_those_that_inspect_shows(run: Run, saved: Saved) -> None:
    path = saved({"w": torch.ones(2)})
    report = ckptool.inspect(path, hashes=True)
    run("inspect", path, "--hash", "--lock", "x.lock")
    assert Path("x.lock").read_text() == f"# ckptool lock 1, 1 keys\nw\tfloat32\t2\tsha256:{report.tensors[0].hash}\n"


def test_parameters_and_buffers_are_told_apart_where_the_file_does(run: Run) -> None:
    run("inspect", FIXTURES / "resnet_module.pth", "--lock", "x.lock")
    lines = dict(line.split("\t", 1) for line in Path("x.lock").read_text().splitlines()[1:])
    assert lines["fc.weight"].endswith("\tparameter")
    assert lines["bn1.running_mean"].endswith("\tbuffer")
    assert ckptool.open("x.lock").state_dict()["fc.weight"].is_parameter
    assert run("diff", "x.lock", FIXTURES / "resnet_module.pth")[0] == 0


def test_tied_names_stay_one_tensor(run: Run) -> None:
    run("inspect", FIXTURES / "tied.pth", "--lock", "x.lock")
    assert Path("x.lock").read_bytes() == (FIXTURES / "tied.lock").read_bytes()
    tensors = ckptool.open("x.lock").state_dict()
    assert tensors["head.weight"].source is tensors["emb.weight"].source
    run("inspect", "x.lock", "--lock", "y.lock")
    assert Path("x.lock").read_bytes() == Path("y.lock").read_bytes()


@pytest.mark.parametrize("name", ["composite.pth", "dtypes.pth", "views.pth", "sharded", "arrays.npz", "dense.gguf"])
def test_a_checkpoint_equals_its_lock(name: str, run: Run) -> None:
    assert run("inspect", FIXTURES / name, "--lock", "x.lock")[::2] == (0, "")
    assert run("diff", FIXTURES / name, "x.lock")[::2] == (0, "")
    assert run("diff", "x.lock", FIXTURES / name, "--devices")[::2] == (0, "")


def test_an_existing_file_is_kept_and_only_a_lock_is_replaced(run: Run, saved: Saved) -> None:
    path = saved({"w": torch.ones(2)})
    Path("x.lock").write_text("mine")
    for extra in ([], ["--update-lock"]):
        code, _, err = run("inspect", path, "--lock", "x.lock", *extra)
        assert (code, err.count("\n"), Path("x.lock").read_text()) == (2, 1, "mine")
    assert run("inspect", path, "--lock", path, "--update-lock")[0] == 2
    Path("x.lock").write_text(HEAD)
    assert run("inspect", path, "--lock", "x.lock", "--update-lock")[0] == 0
    assert Path("x.lock").read_text() == "# ckptool lock 1, 1 keys\nw\tfloat32\t2\n"
    assert run("inspect", path, "--update-lock")[0] == 2
    assert run("inspect", path, path, "--lock", "y.lock")[0] == 2


@pytest.mark.parametrize(
    ("lines", "number"),
    [
        ("a\tfloat32\n", 2),
        ("a float32 2\n", 2),
        ("a\tfloat31\t2\n", 2),
        ("a\tfloat32\t2x\n", 2),
        ("a\tfloat32\t-2\n", 2),
        ("a\tfloat32\t2x\u0663\n", 2),
        ("a\tfloat32\t9999999999999999999x2\n", 2),
        ("a\tfloat32\t" + "x".join("1" * 1001) + "\n", 2),
        ("a\tfloat32\t2\na\tfloat32\t2\n", 3),
        ("a\tfloat32\t2\n<<<<<<< HEAD\n", 3),
        ("a\tfloat32\t2\n\nb\tfloat32\t2\n", 3),
        ("a\tfloat32\t2\tsha256:12\n", 2),
        ("a\tfloat32\t2\tparameter\tbuffer\n", 2),
        ("a\tfloat32\t2\tcolour:red\n", 2),
        ("a\tfloat32\t2\ttied:b\n", 2),
        ("a\tfloat32\t2\nb\tfloat32\t3\ttied:a\n", 3),
        ("a\tfloat32\t2\ttied:a\n", 2),
        ('"a\tfloat32\t2\n', 2),
        ('"a"\tfloat32\t2\n', 2),
        ("a\tfloat32\tnested\n", 2),
        ("a\tfloat32\t2", 2),
        ("\tfloat32\t2\n", 2),
        ("[" * 100_000 + "\n", 2),
    ],
)
def test_a_malformed_line_is_named_by_its_number(lines: str, number: int, run: Run) -> None:
    Path("x.lock").write_text(HEAD + lines)
    with pytest.raises(FormatError, match=f"line {number}: expected|line {number}: .* (stands twice|expected)"):
        ckptool.open("x.lock")
    code, _, err = run("inspect", "x.lock")
    assert (code, err.count("\n")) == (2, 1)
    assert len(err) < 500


def test_windows_ends_of_lines_are_read(saved: Saved) -> None:
    Path("x.lock").write_bytes(b"# ckptool lock 1\r\na\tfloat32\t2\r\n")
    assert form(ckptool.open("x.lock").state_dict()) == {"a": ("float32", (2,))}


def test_a_lock_that_is_cut_at_the_end_of_any_line_is_refused(run: Run, saved: Saved) -> None:
    run("inspect", saved({key: torch.zeros(2) for key in "abcd"}), "--lock", "x.lock")
    lines = Path("x.lock").read_text().splitlines(keepends=True)
    for number in range(len(lines)):
        for less in (lines[:number], lines[:number] + lines[number + 1 :], [*lines, "e\tfloat32\t2\n"]):
            Path("x.lock").write_text("".join(less))
            with pytest.raises(ckptool.CkptoolError):
                ckptool.open("x.lock").require_whole()
    Path("x.lock").write_text("".join(lines[:3]))
    said = "line 1: expected 4 keys as it says, found 2: the lock file is cut short or edited"
    assert said in run("diff", "x.lock", "saved.pth")[2]


def test_an_older_lock_is_read_and_said_to_be_one(run: Run, saved: Saved) -> None:
    path = saved({"w": torch.ones(2)})
    Path("x.lock").write_text(f"{HEAD}w\tfloat32\t2\n")
    code, out, _ = run("diff", "x.lock", path)
    assert (code, "an older lock file, which does not say how many keys it has" in out) == (0, True)
    assert run("inspect", path, "--lock", "x.lock", "--update-lock")[0] == 0
    assert "older" not in run("diff", "x.lock", path)[1]


@pytest.mark.parametrize("version", ["2", "99", "", "one", "1 ", "1, 3", "1, -1 keys", "1,3 keys"])
def test_another_schema_is_refused_by_its_version(version: str) -> None:
    Path("x.lock").write_text(f"# ckptool lock {version}\nanything\n")
    with pytest.raises(UnsupportedError, match=f"schema {version!r}"):
        ckptool.open("x.lock")


def test_diff_is_a_gate_with_its_exit_codes(run: Run, saved: Saved) -> None:
    state = {"w": torch.ones(2, 3), "b": torch.ones(2)}
    run("inspect", saved(state), "--lock", "x.lock")
    assert run("diff", "x.lock", saved({"w": torch.zeros(2, 3), "b": torch.zeros(2)}))[0] == 0
    for other in ({**state, "w": torch.ones(3, 2)}, {**state, "w": state["w"].half()}, {"w": state["w"]}):
        assert run("diff", "x.lock", saved(other))[0] == 1
    assert run("diff", "x.lock", "absent.pth")[0] == 2


@pytest.mark.parametrize("reference", ["lock", "meta"])
def test_a_state_dict_on_meta_and_a_lock_are_alike_as_references(reference: str, run: Run, saved: Saved) -> None:
    state = {"w": torch.ones(2, 3), "b": torch.ones(2)}
    path, made = saved(state), saved({key: one.to("meta") for key, one in state.items()}, "meta.pth")
    if reference == "lock":
        run("inspect", path, "--lock", "x.lock")
        made = Path("x.lock")
    assert run("diff", made, path)[0] == run("diff", path, made)[0] == 0
    assert run("filter", path, "--match", made, "--strict", "--dry-run")[0] == 0
    assert run("load-partial", path, "--into", made, "--strict", "--dry-run")[0] == 0
    less = saved({"w": torch.ones(2, 4), "b": torch.ones(2)}, "less.pth")
    assert run("diff", made, less)[0] == 1
    assert run("filter", less, "--match", made, "--strict", "--dry-run")[0] == 1
    assert run("load-partial", less, "--into", made, "--strict", "--dry-run")[0] == 1
    for option in ("--values", "--quick"):
        code, _, err = run("diff", made, path, option)
        assert (code, err.count("\n"), "no values" in err) == (2, 1, True)


def test_what_needs_values_refuses_a_lock_in_one_line(run: Run, saved: Saved) -> None:
    path, less = saved({"w": torch.ones(2), "b": torch.ones(3)}), saved({"w": torch.ones(2)}, "less.pth")
    run("inspect", path, "--lock", "x.lock")
    for args in (
        ["inspect", "x.lock", "--hash"], ["inspect", "x.lock", "--stats"], ["inspect", "x.lock", "--check"],
        ["convert", "x.lock", "-o", "out.pth"], ["convert", "x.lock", "-o", "out.safetensors", "--dry-run"],
        ["remap", "x.lock", "--add-prefix", "a.", "-o", "out.pth"], ["filter", "x.lock", "-o", "out.pth"],
        ["filter", less, "--match", "x.lock", "-o", "out.pth"],
    ):  # fmt: skip
        code, _, err = run(*args)
        assert (code, err.count("\n"), "x.lock: is a lock file, which holds no values" in err) == (2, 1, True), args
    assert not list(Path().glob("out*"))


def test_where_the_sources_fill_all_of_a_lock_the_output_is_whole(run: Run, saved: Saved) -> None:
    state = {"w": torch.ones(2), "b": torch.ones(3)}
    path = saved(state)
    run("inspect", path, "--lock", "x.lock")
    assert run("filter", path, "--match", "x.lock", "-o", "out.pth")[0] == 0
    loaded = torch.load("out.pth", weights_only=True)
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[key], state[key]) for key in state)


@pytest.mark.parametrize("option", ["--lock", "--schema"])
def test_what_its_own_checkpoint_would_not_meet_is_not_written(option: str, refused: Refused, saved: Saved) -> None:
    empty = saved({"epoch": 3, "model": {}})
    whole = saved({"optimizer": {"state": {0: torch.ones(2)}, "param_groups": []}}, "whole.pth")
    for path, why in {
        empty: "no tensors at the top",
        whole: "no tensors at the top",
        FIXTURES / "consolidated": "--tp-rules FILE joins them",
    }.items():
        assert why in refused("inspect", path, option, "made")


def test_a_lock_is_no_source_of_values(refused: Refused, saved: Saved) -> None:
    into = saved({"a": torch.ones(2)})
    Path("x.lock").write_text(f"{HEAD}a\tfloat32\t2\n")
    for args in (
        ["filter", "x.lock", "--match", into],
        ["filter", into, "x.lock", "--match", into],
        ["load-partial", "x.lock", "--into", into],
    ):
        assert "lock file, which holds no values: it cannot be a source: a" in refused(*args, "-o", "out.pth")


def test_a_lock_of_missing_shards_is_not_written(run: Run) -> None:
    assert run("inspect", FIXTURES / "sharded_broken", "--lock", "x.lock")[0] == 2
    assert not Path("x.lock").exists()


@pytest.mark.parametrize("name", ["tied.pth", "composite.pth", "dtypes.safetensors"])
def test_what_inspect_printed_as_json_is_a_reference_too(name: str, run: Run) -> None:
    Path("x.json").write_text(run("inspect", FIXTURES / name, "--json")[1])
    run("inspect", FIXTURES / name, "--lock", "x.lock")
    assert run("diff", "x.json", FIXTURES / name)[::2] == (0, "")
    assert run("diff", "x.json", "x.lock")[::2] == (0, "")
    assert run("filter", "x.json", "-o", "out.pth")[0] == 2


def test_any_key_comes_back_from_json(run: Run, saved: Saved) -> None:
    path = saved({key: torch.zeros(number) for number, key in enumerate(ODD)})
    Path("x.json").write_text(run("inspect", path, "--json")[1])
    assert form(ckptool.open("x.json").state_dict()) == {key: ("float32", (n,)) for n, key in enumerate(ODD)}


@pytest.mark.parametrize(
    "result",
    [
        "[]",
        "[1]",
        "{}",
        "[{}]",
        '[{"tensors": 1}]',
        '[{"tensors": [{"key": 1, "dtype": "float32", "shape": []}]}]',
        "[" * 9000,
        '[{"tensors": [{"key": "a", "dtype": "float32", "shape": [true]}]}]',
        '[{"tensors": []}, {"tensors": []}]',
        '[{"tensors": [{"key": "a", "dtype": 1, "shape": []}]}]',
        '[{"tensors": [{"key": "a", "dtype": "f", "shape": []}]}]',
        '[{"tensors": []}], "errors": []',
    ],
)
def test_json_that_is_no_report_of_one_checkpoint_is_refused(result: str, run: Run) -> None:
    Path("x.json").write_text(f'{{"schema": 1, "command": "inspect", "result": {result}}}')
    code, _, err = run("diff", "x.json", FIXTURES / "tied.pth")
    assert (code, err.count("\n")) == (2, 1)


# --- hashes ----------------------------------------------------------------------------------------------------------


def hashed(run: Run, path: Path, name: str = "x.lock", *options: str) -> Path:
    assert run("inspect", path, "--hash", "--lock", name, *options)[0] == 0
    return Path(name)


@pytest.mark.parametrize("option", ["--values", "--quick"])
@pytest.mark.parametrize("name", ["resnet_122.pth", "dtypes.pth", "composite.pth", "sharded", "tied.pth", "views.pth",
                                  "dtypes.safetensors", "dense.gguf", "big_endian.pth"])  # fmt: skip
def test_a_file_has_the_hashes_of_its_lock(name: str, option: str, run: Run) -> None:
    lock = hashed(run, FIXTURES / name)
    for sides in ((lock, FIXTURES / name), (FIXTURES / name, lock), (lock, lock)):
        code, out, err = run("diff", *sides, option)
        assert (code, err) == (0, "")
        assert "values" not in out.splitlines()[0]


@pytest.mark.parametrize("option", ["--values", "--quick"])
def test_other_values_are_another_hash(option: str, run: Run, saved: Saved) -> None:
    state = {"a": torch.ones(3), "b": torch.arange(4), "c": torch.ones(2, 2), "d": torch.zeros(2)}
    lock = hashed(run, saved(state))
    other = saved({**state, "b": torch.arange(1, 5), "c": torch.ones(4), "d": -torch.zeros(2)}, "other.pth")
    code, out, _ = run("diff", lock, other, option)
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert (code, lines[0]) == (1, "differ: 1 shape, 2 tensors with other values; 1 equal")
    assert {"differs b another hash", "differs d another hash", "shape c 2x2 -> 4"} <= {*lines}
    result = json.loads(run("diff", lock, other, option, "--json")[1])["result"]
    assert [(row["key"], row["status"], row["by"]) for row in result["values"]] == [
        ("b", "differ", "hash"), ("d", "differ", "hash"),
    ]  # fmt: skip
    assert run("diff", lock, other, option, "--ignore", "[bcd]")[0] == 0
    assert run("diff", lock, other, option, "--fail-on", "shape")[0] == 1
    second = hashed(run, other, "y.lock")
    assert run("diff", lock, second, option)[0] == 1
    assert run("diff", lock, second)[1].startswith("differ: 1 shape; 3 equal (values not compared")


def test_what_has_no_hash_is_named_and_not_passed_off_as_compared(run: Run, saved: Saved) -> None:
    path = saved({"a": torch.ones(3), "b": torch.ones(4), "c": torch.ones(5).half()})
    lock = hashed(run, path)
    Path("x.lock").write_text(re.sub(r"(b.*)\tsha256:\w+", r"\1", lock.read_text()))
    code, out, _ = run("diff", lock, path, "--values")
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert (code, lines[0]) == (0, "same: 3 equal, 1 of them but for their values")
    assert "uncompared b its values, as a lock file has no hash of it" in lines
    result = json.loads(run("diff", path, lock, "--values", "--json")[1])["result"]
    assert (result["same"], result["uncompared"]) == (True, ["b"])
    assert run("diff", path, lock, "--quick", "--fail-on", "uncompared")[0] == 1
    assert run("diff", path, lock, "--values", "--fail-on", "uncompared", "--ignore", "b")[0] == 0
    assert run("diff", path, lock, "--values", "--fail-on", "values")[0] == 0
    assert ckptool.diff(path, lock, values=True, fail_on="uncompared").fails == ["uncompared"]
    assert run("diff", lock, saved({"a": torch.ones(3), "b": torch.ones(4)}, "less.pth"), "--values")[0] == 1
    meta = saved({"a": torch.ones(3, device="meta"), "b": torch.ones(4, device="meta")}, "meta.pth")
    code, _, err = run("diff", lock, meta, "--values")
    assert (code, err.count("\n"), "no values of a to compare" in err) == (2, 1, True)


def test_hashes_of_what_inspect_printed_are_compared_too(run: Run, saved: Saved) -> None:
    path = saved({"a": torch.ones(3), "b": torch.ones(4)})
    Path("x.json").write_text(run("inspect", path, "--hash", "--json")[1])
    assert run("diff", "x.json", path, "--values")[0] == 0
    assert run("diff", "x.json", saved({"a": torch.ones(3), "b": torch.zeros(4)}, "other.pth"), "--values")[0] == 1


def test_the_values_of_a_model_in_code_are_held_against_the_hashes_of_a_lock(run: Run, saved: Saved) -> None:
    lock = hashed(run, saved({"weight": torch.full((2, 3), 4.0)}))
    Path("model_of_lock.py").write_text(
        "from torch import nn\ndef build(value):\n    layer = nn.Linear(3, 2, bias=False)\n"
        "    nn.init.constant_(layer.weight, value)\n    return layer\n"
    )
    assert run("diff", lock, "model_of_lock.py:build", "--arg", "value=4.0", "--values")[0] == 0
    assert run("diff", lock, "model_of_lock.py:build", "--arg", "value=5.0", "--values")[0] == 1


def test_a_dash_prints_the_lock_and_nothing_else(run: Run, saved: Saved) -> None:
    path = saved({"b": torch.ones(2), "a": torch.zeros(3, 2, dtype=torch.float16)})
    run("inspect", path, "--hash", "--lock", "its.lock")
    assert run("inspect", path, "--hash", "--lock", "-") == (0, Path("its.lock").read_text(), "")
    for option in ("--json", "--keys"):
        code, out, err = run("inspect", path, "--lock", "-", option)
        assert (code, err.count("\n")) == (2, 1)
        assert "--lock" in err
    code, out, err = run("inspect", "absent.pth", "--lock", "-")
    assert (code, out) == (2, "")


def test_the_hook_for_pre_commit_checks_the_files_that_it_is_given(saved: Saved) -> None:
    """As pre-commit calls it: the entry, then the files that its pattern fits."""
    hooks = (FIXTURES.parent / ".pre-commit-hooks.yaml").read_text()
    entry, files = (re.search(rf"^  {name}: (.*)$", hooks, re.MULTILINE)[1] for name in ("entry", "files"))
    names = ["a.pth", "dir/b.safetensors", "c.pth.tar", "d.ckpt", "e.py", "pth", "f.pth.md", "g.bin"]
    assert [name for name in names if re.search(files, name)] == names[:4]
    sound, broken = saved({"a": torch.ones(2)}, "sound.pth"), saved({"a": torch.tensor([math.nan])}, "nan.pth")
    command, *options = shlex.split(entry)
    assert command == "ckptool"
    assert [main([*options, str(sound)]), main([*options, str(sound), str(broken)])] == [0, 1]
