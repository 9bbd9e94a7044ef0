"""`filter`: every key accounted for, ties, dtypes, and what stands around the weights."""

from __future__ import annotations

import copy
import json
import random
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from filtering import COUNTERS, FULL, OLD, assert_equal_values, by_hand, listing, result_of
from oracles import FIXTURES, Run, Saved, State, assert_identical, load, torch_load
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import ckptool
from ckptool.errors import CollisionError, LossError, NoTensorsError

# --- every key is accounted for --------------------------------------------------------------------------------------


def test_every_key_of_every_input_has_a_row_and_every_key_of_the_target_exactly_one(saved: Saved) -> None:
    target = saved({"a": torch.zeros(2), "b": torch.zeros(3), "c": torch.zeros(1), "note": "text"}, "t.pth")
    first = saved({"a": torch.ones(2), "x": torch.ones(1), "c": torch.ones(2), "when": 3}, "s1.pth")
    second = saved({"a": torch.ones(2), "c": torch.ones(1), "y": torch.ones(4)}, "s2.pth")
    _, report = ckptool.filter(first, second, match=target)
    rows = [(row.key, row.reason, Path(row.file).name if row.file else None) for row in report.rows]
    assert rows == [
        ("a", "loaded", "s1.pth"),
        ("b", "missing", None),
        ("c", "loaded", "s2.pth"),
        ("note", "ignored", None),
        ("c", "ignored", "s1.pth"),  # its shape does not fit, and the second source's does
        ("x", "unexpected", "s1.pth"),
        ("when", "ignored", "s1.pth"),
        ("a", "ignored", "s2.pth"),
        ("y", "unexpected", "s2.pth"),
    ]
    assert report.counts == {"loaded": 2, "missing": 1, "ignored": 4, "unexpected": 2}
    assert sum(report.counts.values()) == len(report.rows)


@pytest.mark.parametrize("seed", range(12))
def test_no_key_is_ever_passed_over_in_silence(seed: int, saved: Saved) -> None:
    rng = random.Random(seed)
    names = [f"{part}.{name}" for part in "abcd" for name in ("w", "bn.num_batches_tracked", "note")]

    def tree(prefix: str) -> dict[str, Any]:
        chosen = rng.sample(names, rng.randint(5, len(names)))
        return {prefix + name: "text" if name.endswith("note") else torch.zeros(rng.choice([1, 2])) for name in chosen}

    target = tree(rng.choice(["", "module."]))
    sources = [tree(rng.choice(["", "module."])) for _ in range(rng.randint(1, 2))]
    _, report = ckptool.filter(
        *(saved(source, f"s{number}.pth") for number, source in enumerate(sources)),
        match=saved(target, "t.pth"),
        include=rng.choice([[], ["*a.*", "*b.*", "*c.*"]]),
        exclude=rng.choice([[], ["*c.*"]]),
    )
    tensors = [key for key, value in target.items() if isinstance(value, torch.Tensor)]
    assert [row.key for row in report.rows[: len(tensors)]] == tensors
    told = {row.key for row in report.rows}
    assert set(target) <= told
    for source in sources:
        assert {key.removeprefix("module.") for key in source} <= {key.removeprefix("module.") for key in told}
    assert sum(report.counts.values()) == len(report.rows)


def test_a_key_that_was_not_chosen_is_told_as_its_source_spells_it(saved: Saved) -> None:
    target = saved({"a": torch.zeros(1), "b": torch.zeros(1)}, "t.pth")
    source = saved({"module.a": torch.ones(1), "module.b": torch.ones(1)}, "s.pth")
    _, report = ckptool.filter(source, match=target, exclude=["a"])
    assert {"module.a", "module.b"} <= {row.source for row in report.rows} | {row.key for row in report.rows}


def test_a_mismatch_is_told_though_a_later_source_fits(saved: Saved) -> None:
    target = saved({"w": torch.zeros(2)}, "t.pth")
    first, second = saved({"w": torch.ones(3)}, "one.pth"), saved({"w": torch.ones(2)}, "two.pth")
    _, report = ckptool.filter(first, second, match=target)
    assert any(row.file == str(first) for row in report.rows)


@pytest.mark.parametrize("name", ["resnet_nested.pth", "lightning.ckpt", "dtypes.pth", "views.pth", "tied.pth"])
def test_a_file_filtered_into_itself_is_loaded_whole(name: str, run: Run) -> None:
    code, out, _ = run("filter", "--match", FIXTURES / name, FIXTURES / name, "-o", "out.pth", "--json", "--strict")
    result = result_of(out)
    tensors = [row for row in result["rows"] if row["shape"] is not None]
    assert code == 0
    assert {row["reason"] for row in tensors} == {"loaded"}
    assert result["loaded_fraction"] == 1
    assert_identical(torch_load(FIXTURES / name), torch_load(Path("out.pth")))


# --- nothing matches -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("theirs", "ours", "words"),
    [
        ("", "backbone.", "adding 'backbone.' would match 102 of 122 (--add-prefix backbone.)"),
        ("encoder.", "", "stripping 'encoder.' would match 102 of 122 (--strip-prefix encoder.)"),
        ("encoder.", "net.", "replacing 'encoder.' by 'net.' would match 102 of 122 "
                             "(--strip-prefix encoder. --add-prefix net.)"),
    ],
)  # fmt: skip
def test_nothing_matches_exits_1_with_a_hypothesis_that_holds(
    theirs: str, ours: str, words: str, saved: Saved, run: Run
) -> None:
    source = saved({theirs + name: tensor for name, tensor in load(OLD).items()}, "s.pth")
    target = saved({ours + name: tensor for name, tensor in load(FULL).items()}, "t.pth")
    code, out, err = run("filter", "--match", target, source, "-o", "out.pth")
    assert (code, err, listing()) == (1, "", ["s.pth", "t.pth"])
    assert words in out
    options = words[words.index("(") + 1 : -1].split()
    code, out, _ = run("filter", "--match", target, source, "-o", "out.pth", *options, "--json")
    assert (code, result_of(out)["counts"]) == (0, {"loaded": 102, "bookkeeping": COUNTERS})


@pytest.mark.parametrize(("theirs", "ours"), [("module.encoder.", ""), ("module.", "backbone.")])
def test_the_hypothesis_holds_behind_a_wrapper_too(theirs: str, ours: str, saved: Saved, run: Run) -> None:
    names = ["fc.w", "fc.b"]
    source = saved({theirs + name: torch.ones(2) for name in names}, "s.pth")
    target = saved({ours + name: torch.zeros(2) for name in names}, "t.pth")
    _, out, _ = run("filter", "--match", target, source, "-o", "out.pth")
    hint = next(line for line in out.splitlines() if line.startswith("  hint"))
    options = hint[hint.index("(") + 1 : -1].split()
    assert run("filter", "--match", target, source, "-o", "out.pth", *options)[0] == 0


def test_nothing_in_common_at_all_exits_1_without_a_hypothesis(saved: Saved, run: Run) -> None:
    target, source = saved({"x.scale": torch.zeros(1)}, "t.pth"), saved({"a.w": torch.zeros(2)}, "s.pth")
    code, out, _ = run("filter", "--match", target, source, "-o", "out.pth")
    assert (code, listing()) == (1, ["s.pth", "t.pth"])
    assert "hint" not in out
    assert "no key of the source fits" in out


def test_no_tensors_on_a_side_is_an_error(saved: Saved, run: Run) -> None:
    empty = saved({"model": {}}, "empty.pth")
    for args in (["--match", empty, OLD], ["--match", OLD, empty], [empty]):
        code, _, err = run("filter", *args, "-o", "out.pth")
        assert (code, listing()) == (2, ["empty.pth"])
        assert err.startswith(f"ckptool: error: {empty}: no tensors at ")
    with pytest.raises(NoTensorsError):
        ckptool.filter(empty)


# --- ties ------------------------------------------------------------------------------------------------------------


def tied_target(saved: Saved) -> Path:
    shared = torch.zeros(3, 2)
    return saved({"emb.weight": shared, "mid.weight": torch.zeros(2), "head.weight": shared}, "target.pth")


def is_tied(state: State, one: str, other: str) -> bool:
    return state[one].untyped_storage().data_ptr() == state[other].untyped_storage().data_ptr()


@pytest.mark.parametrize(("given", "other"), [("emb.weight", "head.weight"), ("head.weight", "emb.weight")])
def test_a_tie_in_the_target_is_satisfied_by_either_name(given: str, other: str, saved: Saved) -> None:
    values = torch.arange(6.0).view(3, 2)
    source = saved({given: values, "mid.weight": torch.ones(2)}, "source.pth")
    merged, report = ckptool.filter(source, match=tied_target(saved))
    assert {row.key: row.reason for row in report.rows} == {given: "loaded", "mid.weight": "loaded", other: "tied"}
    assert report.loaded_fraction == 1
    ckptool.save(merged, "out.pth")
    written = load("out.pth")
    assert torch.equal(written[given], values)
    assert torch.equal(written[other], values)
    assert is_tied(written, given, other)


def test_two_tied_names_with_different_values_are_refused_naming_both(saved: Saved, run: Run) -> None:
    source = saved({"emb.weight": torch.ones(3, 2), "head.weight": torch.full((3, 2), 2.0)}, "source.pth")
    target = tied_target(saved)
    code, out, err = run("filter", "--match", target, source, "-o", "out.pth", "--json")
    assert (code, listing()) == (2, ["source.pth", "target.pth"])
    assert json.loads(out)["error"]["kind"] == "collision"
    assert err.count("\n") == 1
    assert "emb.weight and head.weight" in err


def test_two_tied_names_with_different_values_from_two_sources_are_refused(saved: Saved) -> None:
    first = saved({"emb.weight": torch.ones(3, 2)}, "one.pth")
    second = saved({"head.weight": torch.full((3, 2), 2.0)}, "two.pth")
    with pytest.raises(CollisionError, match=r"emb\.weight and head\.weight"):
        ckptool.filter(first, second, match=tied_target(saved))


def test_equal_values_that_are_not_tied_in_the_source_become_tied(saved: Saved) -> None:
    values = torch.randn(3, 2)
    source = saved({"emb.weight": values, "head.weight": values.t().contiguous().t()}, "source.pth")
    merged, report = ckptool.filter(source, match=tied_target(saved))
    ckptool.save(merged, "out.pth")
    written = load("out.pth")
    assert is_tied(written, "emb.weight", "head.weight")
    assert torch.equal(written["head.weight"], values)
    assert report.counts == {"loaded": 2, "missing": 1}


def test_what_is_tied_in_the_source_only_is_written_once_per_name_of_the_target(saved: Saved) -> None:
    shared = torch.ones(3)
    merged, _ = ckptool.filter(
        saved({"a": shared, "b": shared}, "s.pth"), match=saved({"a": torch.zeros(3), "b": torch.zeros(3)}, "t.pth")
    )
    ckptool.save(merged, "out.pth")
    assert_equal_values(load("out.pth"), {"a": shared, "b": shared})


def test_a_tie_goes_through_safetensors_and_back(saved: Saved) -> None:
    values = torch.arange(6.0).view(3, 2)
    merged, _ = ckptool.filter(saved({"head.weight": values}, "source.pth"), match=tied_target(saved))
    ckptool.save(merged, "out.safetensors")
    with safe_open("out.safetensors", "pt") as file:
        assert sorted(file.keys()) == ["emb.weight", "mid.weight"]
        assert torch.equal(file.get_tensor("emb.weight"), values)
    assert ckptool.open("out.safetensors").shared() == [["emb.weight", "head.weight"]]


def test_a_tied_name_whose_own_shape_does_not_fit_is_not_passed_over(saved: Saved, run: Run) -> None:
    source = saved({"emb.weight": torch.ones(4, 2), "head.weight": torch.ones(3, 2), "mid.weight": torch.ones(2)})
    assert run("filter", "--match", tied_target(saved), source, "-o", "out.pth", "--strict")[0] != 0


# --- dtypes ----------------------------------------------------------------------------------------------------------


def test_a_dtype_that_differs_is_kept_as_the_source_has_it_and_reported(saved: Saved, run: Run) -> None:
    source = saved({"w": torch.randn(3).half(), "v": torch.randn(2)}, "s.pth")
    target = saved({"w": torch.randn(3), "v": torch.randn(2)}, "t.pth")
    code, out, _ = run("filter", "--match", target, source, "-o", "out.pth", "--json")
    assert (code, result_of(out)["counts"]) == (0, {"cast": 1, "loaded": 1})
    assert_equal_values(load("out.pth"), by_hand(load(target), load(source)))
    row = result_of(out)["rows"][0]
    assert (row["dtype"], row["detail"]) == ("float16", "float32 in the target")


PAIRS = [
    ("float32", "bfloat16"), ("float32", "float16"), ("bfloat16", "float32"), ("float64", "float32"),
    ("float32", "float8_e4m3fn"), ("float32", "float8_e5m2"), ("float8_e5m2", "float32"), ("int64", "float32"),
    ("float32", "int32"), ("uint8", "int64"), ("bool", "float16"), ("int32", "bool"), ("complex64", "complex128"),
    ("float64", "bfloat16"), ("uint16", "float32"),
]  # fmt: skip


@pytest.mark.parametrize(("theirs", "ours"), PAIRS)
def test_cast_converts_exactly_as_torch_does(theirs: str, ours: str, saved: Saved) -> None:
    torch.manual_seed(3)
    given, wanted = getattr(torch, theirs), getattr(torch, ours)
    values = (torch.randn(50, 7, dtype=torch.complex128 if given.is_complex else torch.float64) * 40).to(given)
    if given.is_floating_point and wanted.is_floating_point and given.itemsize > 1:
        values.view(-1)[:5] = torch.tensor([float("nan"), float("inf"), float("-inf"), -0.0, 1e-30]).to(given)
    source = {"dense": values, "turned": values.t(), "part": values[3:9, ::2], "empty": values[:0]}
    target = {name: torch.zeros(tensor.shape, dtype=wanted) for name, tensor in source.items()}
    merged, report = ckptool.filter(saved(source, "s.pth"), match=saved(target, "t.pth"), cast=True)
    ckptool.save(merged, "out.pth")
    assert report.counts == {"cast": 4}
    assert all((row.source_dtype, row.dtype) == (theirs, ours) for row in report.rows)
    found, expected = load("out.pth"), {name: tensor.to(wanted) for name, tensor in source.items()}
    if given.is_floating_point and wanted == torch.bfloat16:  # which NaN it is, torch leaves to the size of a vector
        assert all(torch.equal(found[name].isnan(), expected[name].isnan()) for name in expected)
        found, expected = ({name: t.nan_to_num(7.0) for name, t in state.items()} for state in (found, expected))
    assert_equal_values(found, expected)


def test_cast_of_a_tie_stays_a_tie(saved: Saved) -> None:
    source = saved({"emb.weight": torch.randn(3, 2).double(), "mid.weight": torch.ones(2).double()}, "s.pth")
    merged, _ = ckptool.filter(source, match=tied_target(saved), cast=True)
    ckptool.save(merged, "out.pth")
    written = load("out.pth")
    assert is_tied(written, "emb.weight", "head.weight")
    assert torch.equal(written["head.weight"], load(source)["emb.weight"].float())


def test_cast_goes_to_safetensors_too(saved: Saved) -> None:
    source = {"w": torch.randn(3, 4).double().t()}
    merged, _ = ckptool.filter(
        saved(source, "s.pth"), match=saved({"w": torch.zeros(4, 3).bfloat16()}, "t.pth"), cast=True
    )
    ckptool.save(merged, "out.safetensors")
    assert_equal_values(load_file("out.safetensors"), {"w": source["w"].bfloat16()})


@pytest.mark.parametrize(("theirs", "ours"), [("complex64", "float32"), ("float32", "complex64")])
def test_a_cast_that_would_lose_or_invent_a_part_is_refused_by_name(theirs: str, ours: str, saved: Saved) -> None:
    source = saved({"w": torch.ones(2, dtype=getattr(torch, theirs))}, "s.pth")
    with pytest.raises(LossError, match=f"w \\({theirs} to {ours}\\)"):
        ckptool.filter(source, match=saved({"w": torch.ones(2, dtype=getattr(torch, ours))}, "t.pth"), cast=True)


@pytest.mark.parametrize("packed_side", ["source", "target"])
def test_a_cast_that_torch_cannot_do_is_refused_in_one_line(packed_side: str, saved: Saved, run: Run) -> None:
    packed = saved({"w": torch.zeros(2, 2, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)}, "packed.pth")
    plain = saved({"w": torch.ones(2, 2)}, "plain.pth")
    source, target = (packed, plain) if packed_side == "source" else (plain, packed)
    code, _, err = run("filter", "--match", target, source, "-o", "out.pth", "--cast")
    assert (code, listing(), err.count("\n")) == (2, ["packed.pth", "plain.pth"], 1)
    assert "w" in err


def test_counters_of_shape_one_and_of_no_shape_fit_each_other(saved: Saved) -> None:
    key = "bn.num_batches_tracked"
    for ours, theirs in (((), (1,)), ((1,), ())):
        source = saved({key: torch.full(theirs, 7), "w": torch.ones(1)}, "s.pth")
        target = saved({key: torch.zeros(ours, dtype=torch.long), "w": torch.zeros(())}, "t.pth")
        merged, report = ckptool.filter(source, match=target)
        assert {row.key: row.reason for row in report.rows} == {key: "loaded", "w": "mismatched"}
        ckptool.save(merged, "out.pth", force=True)
        written = load("out.pth")[key]
        assert (tuple(written.shape), written.sum().item()) == (ours, 7)


def test_a_shape_that_is_only_transposed_is_a_mismatch_and_said(saved: Saved) -> None:
    source, target = saved({"w": torch.ones(2, 3), "v": torch.ones(1)}), saved({"w": torch.ones(3, 2)}, "t.pth")
    _, report = ckptool.filter(source, match=target)
    row = report.rows[0]
    assert (row.reason, row.shape, row.source_shape, row.detail) == ("mismatched", [3, 2], [2, 3], "transposed?")


# --- what stands around the weights ----------------------------------------------------------------------------------


def test_everything_of_the_target_but_the_weights_passes_through_unchanged(run: Run) -> None:
    target = FIXTURES / "resnet_nested.pth"
    code, out, _ = run("filter", "--match", target, FULL, "-o", "out.pth", "--json")
    assert (code, result_of(out)["counts"]) == (0, {"loaded": 102, "bookkeeping": COUNTERS})
    written, before = torch_load(Path("out.pth")), torch_load(target)
    assert list(written) == list(before)
    assert_equal_values(written["model"], by_hand(before["model"], load(FULL)))
    before["model"] = written["model"]
    assert_identical(written, before)
    assert 0 in written["optimizer"]["state"]


def test_objects_among_the_weights_keep_their_place(saved: Saved) -> None:
    target = OrderedDict(first="text", a=torch.zeros(2), middle={"x": [1, None]}, b=torch.zeros(1), last=3)
    merged, _ = ckptool.filter(saved({"b": torch.ones(1), "a": torch.ones(2)}, "s.pth"), match=saved(target, "t.pth"))
    ckptool.save(merged, "out.pth")
    expected = copy.copy(target)
    expected.update(a=torch.ones(2), b=torch.ones(1))
    assert_identical(load("out.pth"), expected)


def test_whether_a_tensor_is_a_parameter_and_wants_gradients_is_the_targets_to_say(saved: Saved) -> None:
    target = {
        "parameter": nn.Parameter(torch.zeros(2)),
        "frozen": nn.Parameter(torch.zeros(2), requires_grad=False),
        "buffer": torch.zeros(2),
        "leaf": torch.zeros(2, requires_grad=True),
    }
    source = {name: torch.ones(2) for name in target} | {"buffer": nn.Parameter(torch.ones(2))}
    merged, _ = ckptool.filter(saved(source, "s.pth"), match=saved(target, "t.pth"))
    ckptool.save(merged, "out.pth")
    written = load("out.pth")
    for name, tensor in target.items():
        assert type(written[name]) is type(tensor), name
        assert written[name].requires_grad == tensor.requires_grad, name
        assert torch.equal(written[name], torch.ones(2)), name


def test_of_two_tied_names_one_may_be_a_parameter_and_the_other_not(saved: Saved) -> None:
    parameter = nn.Parameter(torch.zeros(2))
    target = {"parameter": parameter, "plain": parameter.detach()}
    for given in target:
        merged, _ = ckptool.filter(saved({given: torch.ones(2)}, "s.pth"), match=saved(target, "t.pth"))
        ckptool.save(merged, "out.pth", force=True)
        written = load("out.pth")
        assert is_tied(written, "parameter", "plain")
        assert [type(tensor) for tensor in written.values()] == [nn.Parameter, torch.Tensor]


def test_what_shares_memory_with_the_weights_elsewhere_in_the_target_goes_along_or_is_said(saved: Saved) -> None:
    weights = {"w": torch.zeros(2)}
    target = saved({"model": weights, "best": {"w": weights["w"]}}, "t.pth")
    merged, report = ckptool.filter(saved({"w": torch.ones(2)}, "s.pth"), match=target)
    ckptool.save(merged, "out.pth")
    written = load("out.pth")
    tied = written["model"]["w"].data_ptr() == written["best"]["w"].data_ptr()
    assert tied or any("best" in note for note in report.notes)


def test_values_are_taken_through_views_big_endian_and_lazy_bits(saved: Saved) -> None:
    for name in ("views.pth", "big_endian.pth", "deflated.pth", "conj_neg.pth", "tar_2016.pth"):
        source = torch_load(FIXTURES / name)
        target = saved({key: torch.zeros(value.shape, dtype=value.dtype) for key, value in source.items()}, "t.pth")
        merged, report = ckptool.filter(FIXTURES / name, match=target)
        ckptool.save(merged, "out.pth", force=True)
        assert set(report.counts) == {"loaded"}, name
        assert_equal_values(torch.load("out.pth"), dict(source))


def test_composite_tensors_pass_through_and_never_take_a_dense_ones_place(saved: Saved) -> None:
    whole = torch_load(FIXTURES / "composite.pth")
    merged, report = ckptool.filter(FIXTURES / "composite.pth", match=FIXTURES / "composite.pth")
    ckptool.save(merged, "out.pth")
    assert set(report.counts) == {"loaded"}
    written = torch_load(Path("out.pth"))
    for tree in (written, whole):
        del tree["attributed"]  # holds another of the parameters by reference
    assert_identical(written, whole)
    _, report = ckptool.filter(FIXTURES / "composite.pth", match=saved({"coo": torch.zeros(3, 3)}, "t.pth"))
    row = report.rows[0]
    assert (row.reason, row.detail) == ("mismatched", "sparse_coo in the source, dense in the target")


def test_sharded_with_a_shard_missing_is_refused(run: Run) -> None:
    for args in (["--match", OLD, FIXTURES / "sharded_broken"], ["--match", FIXTURES / "sharded_broken", OLD]):
        code, out, err = run("filter", *args, "-o", "out.pth", "--json")
        assert (code, listing(), err.count("\n")) == (2, [], 1)
        assert json.loads(out)["error"]["kind"] == "incomplete"


def test_the_roots_of_both_sides_can_be_named(saved: Saved, run: Run) -> None:
    source = saved({"state_dict": {"w": torch.ones(2)}, "ema": {"w": torch.full((2,), 5.0)}}, "s.pth")
    target = saved({"g": {"w": torch.zeros(2)}, "d": {"w": torch.zeros(2)}}, "t.pth")
    code, _, _ = run("filter", "--match", target, source, "--root", "ema", "--match-root", "d", "-o", "out.pth")
    assert code == 0
    assert_identical(load("out.pth"), {"g": {"w": torch.zeros(2)}, "d": {"w": torch.full((2,), 5.0)}})


def test_where_the_weights_were_found_is_said(run: Run) -> None:
    _, out, err = run("filter", "--match", FULL, FIXTURES / "ema.pth", "--dry-run")
    assert "state_dict" in out + err


def test_device_tags_are_written_as_asked(run: Run) -> None:
    assert run("filter", "--match", FULL, OLD, "-o", "out.pth", "--map-location", "cuda:1")[0] == 0
    tags = set()
    torch.load("out.pth", map_location=lambda storage, tag: tags.add(tag) or storage)
    assert tags == {"cuda:1"}
    assert run("filter", "--match", "out.pth", OLD, "-o", "two.pth", "--map-location", "cuda:1=cpu,cpu=cuda:7")[0] == 0
    assert_equal_values(load("two.pth"), by_hand(load(FULL), load(OLD)))


@pytest.mark.parametrize("tag", ["no such device", "", "cpu=cuda:x", "gpu", "cuda:-1"])
def test_a_device_tag_that_torch_would_not_load_is_refused(tag: str, run: Run) -> None:
    assert run("filter", "--match", FULL, OLD, "-o", "out.pth", "--map-location", tag)[0] == 2
    assert listing() == []


def test_what_is_loaded_takes_the_device_tag_that_the_target_has(run: Run) -> None:
    run("filter", FULL, "-o", "target.pth", "--map-location", "cuda:3")
    run("filter", "--match", "target.pth", OLD, "-o", "out.pth")
    tags = set()
    torch.load("out.pth", map_location=lambda storage, tag: tags.add(tag) or storage)
    assert tags == {"cuda:3"}
