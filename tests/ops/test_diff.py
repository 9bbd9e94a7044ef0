from __future__ import annotations

import json
import math
import shlex
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import FIXTURES, seed_torch, torch_load
from safetensors.torch import save_file

import ckptool
from ckptool.cli import main
from ckptool.errors import CollisionError, IncompleteError, NoTensorsError, UsageError

Saved = Callable[..., Path]
Run = Callable[..., tuple[int, str, str]]

OLD, NEW, FULL = FIXTURES / "resnet_old.pth", FIXTURES / "resnet_new.pth", FIXTURES / "resnet_122.pth"
INF, NAN = math.inf, math.nan


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*args: object) -> tuple[int, str, str]:
        code = main([str(arg) for arg in args])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def result_of(text: str) -> dict[str, Any]:
    document = json.loads(text)
    assert (document["schema"], document["command"]) == (1, "diff")
    return document["result"]


def pair(saved: Saved, a: Any, b: Any) -> tuple[Path, Path]:
    return saved(a, "a.pth"), saved(b, "b.pth")


# --- keys, shapes, dtypes --------------------------------------------------------------------------------------------


def test_every_class_of_difference_is_told_apart(saved: Saved, run: Run) -> None:
    one = {"same": torch.zeros(1), "shape": torch.zeros(2, 3), "dtype": torch.zeros(4), "both": torch.zeros(5),
           "a.only": torch.zeros(6), "bn.num_batches_tracked": torch.tensor(0)}  # fmt: skip
    other = {"same": torch.ones(1), "shape": torch.zeros(3, 2), "dtype": torch.zeros(4).half(),
             "both": torch.zeros(6).double(), "b.only": torch.zeros(7, dtype=torch.int8)}  # fmt: skip
    code, out, err = run("diff", *pair(saved, one, other), "--json")
    assert (code, err) == (1, "")
    result = result_of(out)
    assert result["same"] is False
    assert result["equal"] == 1
    assert (result["only_in_a"], result["only_in_b"]) == (["a.only"], ["b.only"])
    assert result["shape"] == [{"key": "shape", "a": [2, 3], "b": [3, 2]}, {"key": "both", "a": [5], "b": [6]}]
    assert result["dtype"] == [
        {"key": "dtype", "a": "float32", "b": "float16"},
        {"key": "both", "a": "float32", "b": "float64"},
    ]
    assert (result["values"], result["renamed"]) == ([], [])
    assert result["bookkeeping"] == ["bn.num_batches_tracked"]


def test_the_counts_come_first_and_then_the_rows(saved: Saved, run: Run) -> None:
    code, out, _ = run("diff", NEW, OLD)
    lines = out.splitlines()
    assert code == 1
    assert lines[0] == "differ: 2 shapes; 100 equal (values not compared, --values does)"
    assert [line.split() for line in lines[1:3]] == [
        ["shape", "fc.weight", "6x16", "->", "20x16"],
        ["shape", "fc.bias", "6", "->", "20"],
    ]


@pytest.mark.parametrize("name", ["resnet_old.pth", "dtypes.pth", "composite.pth", "tied.pth", "sharded", "leaves.pth"])
def test_a_file_is_the_same_as_itself(name: str, run: Run) -> None:
    code, out, _ = run("diff", FIXTURES / name, FIXTURES / name, "--values", "--devices", "--json")
    result = result_of(out)
    assert (code, result["same"]) == (0, True)
    assert result["equal"] == len(ckptool.open(FIXTURES / name).state_dict())


@pytest.mark.parametrize(
    "other",
    ["resnet_old.safetensors", "resnet_legacy.pth", "resnet_nested.pth", "resnet_ddp.pth"],
)
def test_the_same_weights_are_the_same_across_formats_containers_and_wrappers(other: str, run: Run) -> None:
    for a, b in ((OLD, FIXTURES / other), (FIXTURES / other, OLD)):
        code, out, err = run("diff", a, b, "--values")
        assert (code, err) == (0, "")
        assert out.splitlines()[0] == "same: 102 equal"


def test_shards_are_the_same_as_the_whole(tmp_path: Path, run: Run) -> None:
    tensors = torch.load(OLD)
    (tmp_path / "shards").mkdir()
    weight_map = {}
    for number, names in enumerate((list(tensors)[:50], list(tensors)[50:])):
        save_file({name: tensors[name] for name in names}, tmp_path / "shards" / f"{number}.safetensors")
        weight_map |= dict.fromkeys(names, f"{number}.safetensors")
    index = tmp_path / "shards" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert run("diff", OLD, tmp_path / "shards", "--values")[0] == 0
    assert run("diff", index, OLD, "--values")[0] == 0


def test_a_shard_missing_never_reads_as_a_difference(run: Run) -> None:
    code, out, err = run("diff", OLD, FIXTURES / "sharded_broken")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "model-00003-of-00003.safetensors" in err
    with pytest.raises(IncompleteError):
        ckptool.diff(FIXTURES / "sharded_broken", OLD)


def test_no_tensors_on_a_side_is_neither_same_nor_different(saved: Saved, run: Run) -> None:
    empty = saved({"model": {}}, "empty.pth")
    for args in ((empty, OLD), (OLD, empty), (empty, empty)):
        code, out, err = run("diff", *args)
        assert (code, out) == (2, "")
        assert "no tensors" in err
    with pytest.raises(NoTensorsError):
        ckptool.diff(empty, empty)


@pytest.mark.usefixtures("folding")
def test_equal_rows_fold_only_where_kind_and_text_are_equal(saved: Saved, run: Run) -> None:
    one = {f"layers.{i}.w": torch.zeros(4) for i in range(6)}
    other = {f"layers.{i}.w": torch.zeros(5 if i < 4 else 6) for i in range(6)}
    _, out, _ = run("diff", *pair(saved, one, other))
    assert [line.split() for line in out.splitlines()[1:]] == [
        ["shape", "layers.{0..3}.w", "4", "->", "5", "(4", "keys)"],
        ["shape", "layers.{4,5}.w", "4", "->", "6", "(2", "keys)"],
    ]


def test_a_sparse_tensor_is_not_the_dense_one_of_its_shape(saved: Saved) -> None:
    report = ckptool.diff(*pair(saved, {"w": torch.eye(3)}, {"w": torch.eye(3).to_sparse()}), values=True)
    assert not report.same
    assert report.equal == 0


def test_a_difference_in_kind_can_be_seen_in_its_row(saved: Saved, run: Run) -> None:
    _, out, _ = run("diff", *pair(saved, {"w": torch.eye(3)}, {"w": torch.eye(3).to_sparse()}))
    assert "sparse" in out


# --- bookkeeping -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("folding")
def test_102_against_122_keys_is_bookkeeping_on_one_line_and_exit_0(run: Run) -> None:
    for a, b, side in ((OLD, FULL, "B"), (FULL, OLD, "A")):
        code, out, err = run("diff", a, b)
        assert (code, err) == (0, "")
        assert out.splitlines() == [
            "same but for bookkeeping: 102 equal (values not compared, --values does)",
            f"  bookkeeping  20 x num_batches_tracked only in {side}",
        ]
        assert run("diff", a, b, "--fail-on", "bookkeeping")[0] == 1
    code, out, _ = run("diff", OLD, FULL, "--json")
    counters = [name for name in torch.load(FULL) if name.endswith("num_batches_tracked")]
    assert (code, result_of(out)["same"], result_of(out)["bookkeeping"]) == (0, True, counters)


def test_a_plain_dict_and_one_with_metadata_get_the_same_answer(saved: Saved, run: Run) -> None:
    with_metadata = torch.load(FULL)
    plain = saved(dict(with_metadata), "plain.pth")
    assert hasattr(with_metadata, "_metadata")
    assert not hasattr(torch.load(plain), "_metadata")
    assert run("diff", FULL, OLD) == run("diff", plain, OLD)
    assert run("diff", plain, FULL)[0] == 0


def test_counters_that_both_sides_have_are_compared_like_any_key(saved: Saved, run: Run) -> None:
    key = "bn.num_batches_tracked"
    paths = pair(saved, {key: torch.tensor(3)}, {key: torch.tensor([4])})
    assert run("diff", *paths)[0] == 0
    code, out, _ = run("diff", *paths, "--values", "--json")
    assert code == 1
    row = {"key": key, "status": "differ", "max_abs": 1.0, "rel_l2": 1 / 3, "mean_abs": 1.0, "cosine": 1.0}
    assert result_of(out)["values"] == [row]


# --- wrapper and other prefixes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("front", "back"),
    [("module.", ""), ("_orig_mod.module.", "module._orig_mod."), ("module.module.", "_fsdp_wrapped_module.")],
)
def test_wrappers_are_looked_through_in_any_order(front: str, back: str, saved: Saved, run: Run) -> None:
    names = ["a.w", "b.c.w"]
    one = {front + name: torch.ones(2) for name in names}
    other = {back + name.replace("b.", "b._checkpoint_wrapped_module."): torch.ones(2) for name in names}
    code, out, _ = run("diff", *pair(saved, one, other), "--values", "--json")
    assert (code, result_of(out)["equal"]) == (0, 2)
    assert any("_checkpoint_wrapped_module." in note for note in json.loads(out)["notes"])


def test_wrappers_that_would_make_two_keys_one_are_left_alone(saved: Saved, run: Run) -> None:
    paths = pair(saved, {"module.w": torch.ones(1), "w": torch.ones(1)}, {"w": torch.ones(1)})
    code, out, _ = run("diff", *paths, "--json")
    assert (code, result_of(out)["only_in_a"], result_of(out)["equal"]) == (1, ["module.w"], 1)


def test_wrappers_left_alone_are_not_said_to_be_looked_through(saved: Saved) -> None:
    report = ckptool.diff(*pair(saved, {"module.w": torch.ones(1), "w": torch.ones(1)}, {"w": torch.ones(1)}))
    assert not any("looked through" in note for note in report.notes)


def test_a_prefix_can_be_stripped_on_either_side(saved: Saved, run: Run) -> None:
    x = {"x": torch.ones(1)}
    one, other = pair(saved, {"enc.w": torch.ones(1), **x}, {"net.w": torch.ones(1), **x})
    assert run("diff", one, other)[0] == 1
    assert run("diff", one, other, "--strip-prefix-a", "enc.", "--strip-prefix-b", "net.")[0] == 0
    code, _, err = run("diff", one, other, "--strip-prefix-a", "net.")
    assert (code, err) == (2, f"ckptool: error: {one}: no key begins with 'net.'\n")
    with pytest.raises(UsageError):
        ckptool.diff(one, other, strip_prefix_b="enc.")


def test_stripping_that_makes_two_keys_one_is_refused(saved: Saved) -> None:
    with pytest.raises(CollisionError, match="w"):
        ckptool.diff(saved({"p.w": torch.ones(1), "w": torch.ones(1)}), FULL, strip_prefix_a="p.")


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("enc.", ""),
        ("", "net."),
        ("enc.", "net."),
        ("module.enc.", ""),
    ],
)
def test_when_nothing_matches_the_prefix_that_is_proposed_works(a: str, b: str, saved: Saved, run: Run) -> None:
    one, other = pair(saved, {f"{a}fc.{n}": torch.ones(1) for n in "wb"}, {f"{b}fc.{n}": torch.ones(1) for n in "wb"})
    code, out, _ = run("diff", one, other)
    hint = next(line for line in out.splitlines() if "would match 2 of 2" in line)
    options = hint.split("note")[1].split("would")[0].split()
    assert code == 1
    assert run("diff", one, other, *options)[0] == 0


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ("head.{}.w", "classifier.{}.w", "--rename head=classifier"),  # not two prefixes
        ("body.{}.attn.w", "body.{}.attention.w", "--rename attn=attention"),  # no prefix does it
        ("blk{}.w", "layer{}.w", "--rename 'blk{i}=layer{i}'"),
        ("net.{}.w", "{}.w", "--strip-prefix-a net."),  # one prefix does it
        ("{}.w", "net.{}.w", "--strip-prefix-b net."),
    ],
)
def test_a_rename_is_proposed_where_no_single_prefix_does_it(
    a: str, b: str, expected: str, saved: Saved, run: Run
) -> None:
    tensors = {str(at): torch.full((2,), float(at)) for at in range(4)}
    paths = pair(
        saved,
        {"stem.w": torch.ones(1)} | {a.format(at): one for at, one in tensors.items()},
        {"stem.w": torch.ones(1)} | {b.format(at): one for at, one in tensors.items()},
    )
    code, out, _ = run("diff", *paths, "--values", "--json")
    assert (code, json.loads(out)["notes"][-1]) == (1, f"{expected} would match 5 of 5 keys")
    assert run("diff", *paths, "--values", *shlex.split(expected))[0] == 0


def test_no_rename_is_proposed_where_two_would_give_a_key_another_tensor(saved: Saved, run: Run) -> None:
    a = {f"{name}.{at}.w": torch.ones(2) for name in ("left", "right") for at in range(3)}
    b = {f"trunk.{at}.w": torch.ones(2) for at in range(3)}
    assert "--rename" not in run("diff", *pair(saved, a, b))[1]


# --- what counts -----------------------------------------------------------------------------------------------------


def test_ignored_keys_do_not_count_and_an_ignore_that_fits_nothing_is_said(run: Run) -> None:
    code, out, _ = run("diff", NEW, OLD, "--ignore", "fc.*", "--ignore", "head.*", "--json")
    assert (code, result_of(out)["shape"], result_of(out)["equal"]) == (0, [], 100)
    notes = json.loads(out)["notes"]
    assert "--ignore head.* fits no key" in notes
    assert not any("fc.*" in note for note in notes)
    code, out, _ = run("diff", NEW, OLD, "--ignore", r"re:^fc\.(weight|bias)$", "--ignore", "*num_batches_tracked")
    assert code == 0
    assert "bookkeeping" not in out


def test_an_ignore_pattern_may_be_the_plain_or_the_wrapped_name(saved: Saved) -> None:
    paths = pair(saved, {"module.fc.w": torch.ones(1), "module.a": torch.ones(1)}, {"a": torch.ones(1)})
    for pattern in ("fc.*", "module.fc.*"):
        report = ckptool.diff(*paths, ignore=[pattern])
        assert (report.same, report.equal) == (True, 1)
        assert not any("fits no key" in note for note in report.notes)


DIFFERING = [
    ("shape", {"w": torch.zeros(1)}, {"w": torch.zeros(2)}),
    ("dtype", {"w": torch.zeros(1)}, {"w": torch.zeros(1).half()}),
    ("only-in-a", {"w": torch.zeros(1), "x": torch.zeros(1)}, {"w": torch.zeros(1)}),
    ("only-in-b", {"w": torch.zeros(1)}, {"w": torch.zeros(1), "x": torch.zeros(1)}),
    ("values", {"w": torch.zeros(1)}, {"w": torch.ones(1)}),
    ("bookkeeping", {"w": torch.zeros(1), "b.num_batches_tracked": torch.tensor(1)}, {"w": torch.zeros(1)}),
]


@pytest.mark.parametrize(("kind", "one", "other"), DIFFERING, ids=[kind for kind, _, _ in DIFFERING])
def test_fail_on_narrows_what_makes_exit_1(kind: str, one: Any, other: Any, saved: Saved, run: Run) -> None:
    paths = pair(saved, one, other)
    assert run("diff", *paths, "--values")[0] == (kind != "bookkeeping")
    for asked, _, _ in DIFFERING:
        assert run("diff", *paths, "--values", "--fail-on", asked)[0] == (asked == kind), asked
    assert run("diff", *paths, "--values", "--fail-on", f"devices, {kind}")[0] == 1
    assert run("diff", *paths, "--values", "--fail-on", "devices", "--fail-on", kind)[0] == 1
    assert run("diff", *paths, "--values", "--fail-on", kind, "--exit-zero")[0] == 0


@pytest.mark.parametrize(
    ("a", "b", "given", "code", "last"),
    [
        (FULL, OLD, ["--fail-on", "bookkeeping"], 1, "failed --fail-on bookkeeping"),
        (NEW, OLD, ["--fail-on", "dtype"], 0, "passed --fail-on names nothing of what differs"),
        (NEW, OLD, ["--fail-on", "shape,bookkeeping"], 1, "failed --fail-on bookkeeping"),
        (
            NEW,
            OLD,
            ["--values", "--fail-on", "devices", "--depth", "1"],
            0,
            "passed --fail-on names nothing of what differs",
        ),
        (NEW, OLD, ["--fail-on", "shape"], 1, ""),  # differ, and that fails
        (FULL, OLD, ["--fail-on", "shape"], 0, ""),
    ],
)
def test_the_text_says_what_fail_on_made_of_it_where_the_verdict_alone_would_mislead(
    a: str, b: str, given: list[str], code: int, last: str, run: Run
) -> None:
    found, out, _ = run("diff", a, b, *given)
    said = " ".join(out.splitlines()[-1].split())
    assert (found, said if said.startswith(("failed", "passed")) else "") == (code, last)


def test_exit_zero_changes_the_code_and_not_the_answer(run: Run) -> None:
    code, out, _ = run("diff", NEW, OLD)
    assert (code, (0, out)) == (1, run("diff", NEW, OLD, "--exit-zero")[:2])


def test_trouble_is_exit_2_with_exit_zero_too(run: Run) -> None:
    assert run("diff", NEW, "absent.pth", "--exit-zero")[0] == 2


def test_an_unknown_kind_is_refused_with_those_known(run: Run) -> None:
    code, _, err = run("diff", NEW, OLD, "--fail-on", "shapes")
    assert (code, err.count("\n")) == (2, 1)
    assert "only-in-a, only-in-b, renamed, shape, dtype, values, devices, bookkeeping" in err


@pytest.mark.parametrize("kind", ["values", "uncompared"])
def test_fail_on_values_without_comparing_them_is_refused(kind: str, run: Run) -> None:
    code, _, err = run("diff", NEW, OLD, "--fail-on", kind)
    assert (code, f"--fail-on {kind} needs --values or --quick" in err) == (2, True)


def test_device_tags_are_compared_only_when_asked_for(monkeypatch: pytest.MonkeyPatch, saved: Saved, run: Run) -> None:
    tensors = {"w": torch.ones(2), "v": torch.ones(1)}
    one = saved(tensors, "a.pth")
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:1")
    other = saved(tensors, "b.pth")
    assert run("diff", one, other, "--values")[0] == 0
    code, out, _ = run("diff", one, other, "--devices", "--json")
    assert code == 1
    assert result_of(out)["devices"] == [{"key": key, "a": "cpu", "b": "cuda:1"} for key in ("w", "v")]
    assert run("diff", one, other, "--fail-on", "devices")[0] == 1


def test_the_roots_of_both_sides_can_be_named(saved: Saved, run: Run) -> None:
    path = saved({"g": {"w": torch.zeros(1)}, "d": {"w": torch.ones(1)}, "state_dict": {"v": torch.zeros(1)}})
    assert run("diff", path, path, "--root", "g", "--values")[0] == 0
    assert run("diff", path, path, "--root-a", "g", "--root-b", "d")[0] == 0
    assert run("diff", path, path, "--root-a", "g", "--root-b", "d", "--values")[0] == 1
    assert run("diff", path, path, "--root-a", "g")[0] == 1


def test_where_the_weights_were_found_is_said(run: Run) -> None:
    _, out, err = run("diff", FIXTURES / "ema.pth", FIXTURES / "ema.pth")
    assert "state_dict" in out + err


# --- values ----------------------------------------------------------------------------------------------------------


def distances(a: torch.Tensor, b: torch.Tensor) -> tuple[float, float]:
    """max |a - b| and |a - b| / |a|, in torch's double precision."""
    wide = torch.complex128 if a.is_complex() else torch.float64
    one, other = a.detach().to(wide), b.detach().to(wide)
    gap = (one - other).abs()
    return gap.max().item(), (gap.square().sum().sqrt() / one.abs().square().sum().sqrt()).item()


FLOATS = ["float64", "float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz",
          "float8_e5m2fnuz", "float8_e8m0fnu", "complex64", "complex128", "complex32"]  # fmt: skip


@pytest.mark.parametrize("name", FLOATS)
def test_max_abs_and_relative_l2_are_those_that_torch_computes(name: str, saved: Saved) -> None:
    dtype = getattr(torch, name)
    seed_torch(5)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    base, other = torch.randn(41, 13, dtype=wide), torch.randn(41, 13, dtype=wide)
    a, b = base.to(dtype), (base + 0.5 * other).to(dtype)
    report = ckptool.diff(*pair(saved, {"w": a, "same": b}, {"w": b, "same": b}), values=True)
    row = report.values[0]
    largest, relative = distances(a, b)
    assert ([row.key for row in report.values], row.status, report.equal) == (["w"], "differ", 1)
    assert row.max_abs == pytest.approx(largest, rel=1e-12)
    assert row.rel_l2 == pytest.approx(relative, rel=1e-12)


@pytest.mark.parametrize("name", ["bool", "uint8", "int8", "int16", "uint16", "int32", "uint32", "int64", "uint64"])
def test_integers_and_booleans_are_compared_exactly_and_never_close(name: str, saved: Saved, run: Run) -> None:
    dtype = getattr(torch, name)
    seed_torch(6)
    a = torch.randint(0, 2 if name == "bool" else 100, (7, 5)).to(dtype)
    b = a.clone()
    b.view(-1)[11] = 1 - int(a.view(-1)[11])
    paths = pair(saved, {"w": a}, {"w": b})
    code, out, _ = run("diff", *paths, "--values", "--rtol", "100", "--atol", "1000", "--json")
    largest, relative = distances(a, b)
    row = result_of(out)["values"][0]
    assert (code, row["status"], row["max_abs"]) == (1, "differ", largest)
    assert row["rel_l2"] == pytest.approx(relative)


@pytest.mark.parametrize(
    ("one", "other", "dtype"),
    [
        (2**53, 2**53 + 1, torch.int64),
        (-(2**63), -(2**63) + 1, torch.int64),
        (2**64 - 1, 2**64 - 2, torch.uint64),
    ],
)
def test_integers_that_a_float_cannot_tell_apart_differ_by_one(
    one: int, other: int, dtype: torch.dtype, saved: Saved
) -> None:
    a, b = torch.tensor([one], dtype=dtype), torch.tensor([other], dtype=dtype)
    row = ckptool.diff(*pair(saved, {"w": a}, {"w": b}), values=True).values[0]
    assert (row.status, row.max_abs) == ("differ", 1)


@pytest.mark.parametrize(
    ("low", "high", "dtype"),
    [(-(2**63), 2**63 - 1, torch.int64), (0, 255, torch.uint8), (-128, 127, torch.int8), (0, 2**64 - 1, torch.uint64)],
)
def test_the_distance_of_the_two_ends_of_a_dtype_does_not_overflow(
    low: int, high: int, dtype: torch.dtype, saved: Saved
) -> None:
    a, b = torch.tensor([low, 1], dtype=dtype), torch.tensor([high, 1], dtype=dtype)
    for paths in (pair(saved, {"w": a}, {"w": b}), pair(saved, {"w": b}, {"w": a})):
        row = ckptool.diff(*paths, values=True).values[0]
        assert (row.status, row.max_abs) == ("differ", float(high - low))


def test_integers_of_two_dtypes_are_exact_too(saved: Saved) -> None:
    a, b = torch.tensor([2**53 + 1]), torch.tensor([2**53], dtype=torch.uint64)
    rows = ckptool.diff(*pair(saved, {"w": a}, {"w": b}), values=True).values
    assert [row.status for row in rows] == ["differ"]


@pytest.mark.parametrize("rtol", [0.0, 1e-5, 1e-2])
@pytest.mark.parametrize("atol", [0.0, 1e-8, 1e-3])
@pytest.mark.parametrize("name", ["float64", "float32", "bfloat16", "complex64"])
def test_close_is_what_torch_allclose_calls_close(rtol: float, atol: float, name: str, saved: Saved) -> None:
    seed_torch(7)
    dtype = getattr(torch, name)
    base = torch.randn(30, dtype=torch.float64)
    for step in (1e-9, 1e-6, 1e-3, 1e-1):
        a, b = base.to(dtype), (base * (1 + step)).to(dtype)
        wide = torch.complex128 if dtype.is_complex else torch.float64
        close = torch.allclose(a.to(wide), b.to(wide), rtol=rtol, atol=atol, equal_nan=True)
        expected = [] if torch.equal(a, b) else ["close" if close else "differ"]
        report = ckptool.diff(*pair(saved, {"w": a}, {"w": b}), values=True, rtol=rtol, atol=atol)
        assert [row.status for row in report.values] == expected
        assert report.same == (expected != ["differ"])


@pytest.mark.parametrize("option", ["--rtol", "--atol"])
def test_a_tolerance_that_is_no_number_is_refused(option: str, run: Run) -> None:
    assert run("diff", OLD, FULL, "--values", option, "nan")[0] == 2


def test_close_is_shown_counted_and_no_difference(saved: Saved, run: Run) -> None:
    paths = pair(saved, {"w": torch.ones(2)}, {"w": torch.ones(2) + 1e-6})
    code, out, _ = run("diff", *paths, "--values")
    assert code == 0
    assert out.splitlines()[0] == "same: 0 equal, 1 close"
    assert out.splitlines()[1].split()[:2] == ["close", "w"]
    assert run("diff", *paths, "--values", "--rtol", "0", "--atol", "0")[0] == 1


@pytest.mark.parametrize("name", ["float64", "float32", "bfloat16", "float16", "float8_e5m2", "complex64"])
def test_nan_equals_nan_infinity_equals_itself_and_minus_zero_is_zero(name: str, saved: Saved) -> None:
    a = torch.tensor([NAN, INF, -INF, 0.0, -0.0, 1.5]).to(getattr(torch, name))
    b = torch.tensor([NAN, INF, -INF, -0.0, 0.0, 1.5]).to(getattr(torch, name))
    assert ckptool.diff(*pair(saved, {"w": a}, {"w": b}), values=True).equal == 1


def test_nans_of_other_bits_are_equal(saved: Saved) -> None:
    a = torch.tensor([0x7FC00000, 0x3F800000], dtype=torch.int32).view(torch.float32)
    b = torch.tensor([0x7FC00123, 0x3F800000], dtype=torch.int32).view(torch.float32)
    assert ckptool.diff(*pair(saved, {"w": a}, {"w": b}), values=True).equal == 1


@pytest.mark.parametrize(
    ("one", "other"),
    [(1.0, NAN), (NAN, 1.0), (INF, 1.0), (INF, NAN), (1.0, INF), (INF, -INF)],
)
def test_not_finite_on_one_side_only_differs_whatever_the_tolerance(one: float, other: float, saved: Saved) -> None:
    a, b = torch.tensor([2.0, one]), torch.tensor([2.0, other])
    report = ckptool.diff(*pair(saved, {"w": a}, {"w": b}), values=True)
    assert not torch.allclose(a, b, equal_nan=True)
    assert [(row.status, row.max_abs, row.rel_l2) for row in report.values] == [("differ", None, None)]


def test_distances_of_huge_numbers_are_finite(saved: Saved, run: Run) -> None:
    a, b = torch.tensor([1e200], dtype=torch.float64), torch.tensor([3e200], dtype=torch.float64)
    code, out, _ = run("diff", *pair(saved, {"w": a}, {"w": b}), "--values", "--json")
    row = {"key": "w", "status": "differ", "max_abs": 2e200, "rel_l2": 2.0, "mean_abs": 2e200, "cosine": 1.0}
    assert (code, result_of(out)["values"]) == (1, [row])


def test_a_tensor_of_zeros_has_no_relative_distance(saved: Saved, run: Run) -> None:
    paths = pair(saved, {"w": torch.zeros(2)}, {"w": torch.ones(2)})
    row = ckptool.diff(*paths, values=True).values[0]
    assert (row.max_abs, row.rel_l2) == (1.0, None)


def test_a_relative_distance_from_zeros_is_not_called_not_finite(saved: Saved, run: Run) -> None:
    _, out, _ = run("diff", *pair(saved, {"w": torch.zeros(2)}, {"w": torch.ones(2)}), "--values")
    assert "not finite" not in out


@pytest.mark.parametrize(
    ("one", "other"),
    [("float32", "bfloat16"), ("float16", "bfloat16"), ("float32", "float8_e4m3fn"), ("float64", "int32"),
     ("int64", "int8"), ("bool", "float32"), ("complex64", "float32")],
)  # fmt: skip
def test_two_dtypes_are_compared_after_upcasting_and_differ_as_dtypes(one: str, other: str, saved: Saved) -> None:
    small = torch.tensor([0, 1, 1, 0, 1])
    a, b = small.to(getattr(torch, one)), small.to(getattr(torch, other))
    report = ckptool.diff(*pair(saved, {"w": a}, {"w": b}), values=True)
    assert ([row.key for row in report.dtype], report.values, report.equal) == (["w"], [], 0)
    b[2] = 0
    row = ckptool.diff(*pair(saved, {"w": a}, {"w": b}), values=True).values[0]
    assert (row.status, row.max_abs) == ("differ", 1)


def test_rounding_to_a_smaller_dtype_is_measured(saved: Saved) -> None:
    seed_torch(8)
    a = torch.randn(1000)
    b = a.bfloat16()
    row = ckptool.diff(*pair(saved, {"w": a}, {"w": b}), values=True).values[0]
    largest, relative = distances(a, b)
    assert row.max_abs == pytest.approx(largest, rel=1e-12)
    assert row.rel_l2 == pytest.approx(relative, rel=1e-12)


def test_views_are_compared_by_their_own_elements(saved: Saved) -> None:
    base = torch.randn(6, 8)
    views = {
        "turned": base.t(), "slice": base[1:4, ::3], "expanded": torch.ones(2, 1).expand(2, 4),
        "last": torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last), "conj": (base + 1j).conj(),
        "empty": base[:0], "scalar": base[3, 3],
    }  # fmt: skip
    plain = {name: view.resolve_conj().contiguous().clone() for name, view in views.items()}
    assert ckptool.diff(*pair(saved, views, plain), values=True).equal == len(views)
    changed = {name: tensor + 1 for name, tensor in plain.items()}
    report = ckptool.diff(*pair(saved, views, changed), values=True)
    assert {row.key for row in report.values} == set(views) - {"empty"}
    for row in report.values:
        assert row.max_abs == pytest.approx(distances(views[row.key], changed[row.key])[0])
        assert row.rel_l2 == pytest.approx(distances(views[row.key], changed[row.key])[1])


@pytest.mark.parametrize("count", [2**18, 2**18 + 1, 3 * 2**18 - 7])
def test_large_tensors_are_compared_across_blocks(count: int, saved: Saved) -> None:
    seed_torch(9)
    a = torch.randn(count)
    for position in (0, 2**18 - 1, count - 1):
        b = a.clone()
        b[position] += 2
        rows = ckptool.diff(*pair(saved, {"w": a}, {"w": b}), values=True).values
        largest, relative = distances(a, b)
        assert [(row.status, row.max_abs) for row in rows] == [("differ", pytest.approx(largest))]
        assert rows[0].rel_l2 == pytest.approx(relative)
    turned = torch.randn(700, 900)
    paths = pair(saved, {"w": turned, "v": a}, {"w": turned.t().contiguous().t(), "v": a.double()})
    report = ckptool.diff(*paths, values=True)
    assert (report.values, [row.key for row in report.dtype]) == ([], ["v"])


def quantised(scale: float, value: float = 1.0) -> torch.Tensor:
    return torch.quantize_per_tensor(torch.tensor([value, 2.0]), scale, 3, torch.quint8)


def test_quantised_tensors_are_compared_by_their_dequantised_values(saved: Saved) -> None:
    one = quantised(0.1)
    for other in (quantised(0.1), quantised(0.2), quantised(0.1, 1.5), one.dequantize() + 0.25):
        report = ckptool.diff(*pair(saved, {"w": one}, {"w": other}), values=True)
        gap = (one.dequantize() - other.dequantize()).abs().max().item()
        assert [row.max_abs for row in report.values] == pytest.approx([gap] if gap else [])


def test_without_values_quantised_tensors_differ_where_their_headers_do(saved: Saved) -> None:
    for other, count in ((quantised(0.1), 0), (quantised(0.1, 1.5), 0), (quantised(0.2), 1)):
        report = ckptool.diff(*pair(saved, {"w": quantised(0.1)}, {"w": other}))
        assert [row.b for row in report.dtype] == ["quint8 quantized per_tensor_affine 0.2 3"][:count]
        assert report.same is not bool(count)


@pytest.mark.parametrize("layout", ["coo", "csr"])
def test_sparse_tensors_are_compared_by_indices_and_values(layout: str, saved: Saved) -> None:
    def made(value: float, column: int = 2) -> torch.Tensor:
        dense = torch.zeros(3, 3)
        dense[1, column] = value
        return dense.to_sparse().coalesce() if layout == "coo" else dense.to_sparse_csr()

    assert ckptool.diff(*pair(saved, {"w": made(1)}, {"w": made(1)}), values=True).equal == 1
    for other in (made(3), made(1, column=0)):
        report = ckptool.diff(*pair(saved, {"w": made(1)}, {"w": other}), values=True)
        assert [row.status for row in report.values] == ["differ"]


def test_values_are_compared_only_where_shapes_agree(run: Run) -> None:
    code, out, _ = run("diff", NEW, OLD, "--values", "--json")
    new, old = torch.load(NEW), torch.load(OLD)
    common = [name for name in new if name in old and new[name].shape == old[name].shape]
    rows = result_of(out)["values"]
    assert (code, [row["key"] for row in rows]) == (1, common)
    for row in rows:
        largest, relative = distances(new[row["key"]], old[row["key"]])
        assert (row["max_abs"], row["rel_l2"]) == (pytest.approx(largest), pytest.approx(relative))


def test_values_through_every_way_of_storing_them(saved: Saved) -> None:
    for name in ("big_endian.pth", "deflated.pth", "conj_neg.pth", "views.pth", "protocol4.pth"):
        loaded = {key: value for key, value in torch_load(FIXTURES / name).items() if isinstance(value, torch.Tensor)}
        plain = saved(OrderedDict((key, value.resolve_conj().resolve_neg().clone()) for key, value in loaded.items()))
        report = ckptool.diff(FIXTURES / name, plain, values=True)
        assert (report.equal, report.same) == (len(loaded), True), name


def test_rules_change_the_keys_of_a_before_they_are_compared(run: Run, tmp_path: Path) -> None:
    moved = {key.replace("layer1", "stage1"): value for key, value in torch_load(NEW).items() if key != "fc.bias"}
    torch.save(moved, tmp_path / "moved.pth")
    rules = tmp_path / "rules.toml"
    rules.write_text('[[rules]]\nrename = "layer1"\nto = "stage1"\n\n[[rules]]\ndrop = "fc.bias"\n')
    assert run("inspect", NEW, "--lock", tmp_path / "new.lock")[0] == 0
    for a in (NEW, tmp_path / "new.lock"):
        assert run("diff", a, "moved.pth")[0] == 1
        code, out, err = run("diff", a, "moved.pth", "--rules", rules)
        assert (code, err) == (0, "")
        assert "rules changed 24 keys of A, dropped 1" in out
    code, out, _ = run("diff", NEW, "moved.pth", "--rename", "layer1=stage1", "--values", "--json")
    assert (code, result_of(out)["only_in_a"], result_of(out)["equal"]) == (1, ["fc.bias"], len(moved))
    code, out, err = run("diff", NEW, "moved.pth", "--rename", "layer9=stage9")
    assert (code, out) == (2, "")
    assert "fit no key" in err
    code, out, _ = run("diff", NEW, NEW, "--rename", "layer9=stage9", "--allow-unused")
    assert code == 0
    assert "layer9" in out
