from __future__ import annotations

import copy
import json
import os
import random
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import FIXTURES, Run, Saved, assert_identical, bits, torch_load
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import ckptool
from ckptool.errors import CollisionError, LossError, NoTensorsError, UsageError

State = dict[str, torch.Tensor]

OLD, NEW, FULL = FIXTURES / "resnet_old.pth", FIXTURES / "resnet_new.pth", FIXTURES / "resnet_122.pth"
COUNTERS = 20


def result_of(text: str) -> dict[str, Any]:
    document = json.loads(text)
    assert document["schema"] == 1
    assert document["command"] == "filter"
    return document["result"]


def by_hand(target: State, *sources: State) -> State:
    """The recipe that everyone writes: what fits by name and shape, into a copy of the target."""
    merged = OrderedDict(target)
    for source in reversed(sources):
        for name, tensor in source.items():
            if name in target and target[name].shape == tensor.shape:
                merged[name] = tensor
    return merged


def assert_equal_values(one: State, other: State) -> None:
    assert list(one) == list(other)
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert tensor.shape == other[name].shape, name
        assert bits(tensor) == bits(other[name]), name


def load(path: Path | str) -> State:
    return torch.load(path, weights_only=True)


def rows_of(report: Any, **wanted: Any) -> list[str]:
    return [row.key for row in report.rows if all(getattr(row, name) == value for name, value in wanted.items())]


def listing() -> list[str]:
    return sorted(os.listdir())


# --- the main job ----------------------------------------------------------------------------------------------------


@pytest.fixture(params=["pth", "safetensors", "nested", "ddp", "legacy", "sharded", "sharded_bin"])
def old(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """resnet_old's 102 tensors in one of the ways they come."""
    kind = request.param
    if kind.startswith("sharded"):
        return in_shards(tmp_path / kind, load(OLD), ".bin" if kind.endswith("bin") else ".safetensors")
    names = {"pth": OLD.name, "safetensors": "resnet_old.safetensors"}
    return FIXTURES / names.get(kind, f"resnet_{kind}.pth")


def in_shards(folder: Path, tensors: State, suffix: str) -> Path:
    folder.mkdir()
    names = list(tensors)
    weight_map = {}
    for number, part in enumerate((names[0::2], names[1::2]), 1):
        shard = f"model-{number:05}-of-00002{suffix}"
        content = {name: tensors[name] for name in part}
        save_file(content, folder / shard) if suffix == ".safetensors" else torch.save(content, folder / shard)
        weight_map.update(dict.fromkeys(part, shard))
    name = "model.safetensors.index.json" if suffix == ".safetensors" else "pytorch_model.bin.index.json"
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def test_102_keys_go_into_122_and_the_rest_is_bookkeeping(old: Path, run: Run) -> None:
    code, out, err = run("filter", "--match", FULL, old, "-o", "merged.pth", "--json")
    assert (code, err) == (0, "")
    assert result_of(out)["counts"] == {"loaded": 102, "bookkeeping": COUNTERS}
    merged, target, source = load("merged.pth"), load(FULL), load(OLD)
    assert list(merged) == list(target)
    assert_equal_values(merged, by_hand(target, source))
    assert_identical(merged._metadata, target._metadata)
    assert_equal_values(merged, torch.load("merged.pth", weights_only=True, mmap=True))


def test_a_real_model_takes_the_merged_file_strictly_and_has_the_sources_values(old: Path, run: Run) -> None:
    from make import ResNet

    assert run("filter", "--match", FULL, old, "-o", "merged.pth")[0] == 0
    model = ResNet(20)
    model.load_state_dict(load("merged.pth"), strict=True)
    for name, tensor in load(OLD).items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_the_target_may_be_a_whole_model_whose_class_is_gone(old: Path, run: Run) -> None:
    code, out, err = run("filter", "--match", FIXTURES / "resnet_module.pth", old, "-o", "merged.pth", "--json")
    assert (code, err) == (0, "")
    assert result_of(out)["counts"] == {"loaded": 102, "bookkeeping": COUNTERS}
    assert any("whole-model pickle" in note for note in json.loads(out)["notes"])
    merged, target = load("merged.pth"), load(FULL)
    assert list(merged) == list(target)
    assert_identical(merged._metadata, target._metadata)
    counters = {name: torch.tensor(400) for name in target if name.endswith("num_batches_tracked")}
    assert_equal_values(merged, by_hand({**target, **counters}, load(OLD)))


def test_a_whole_model_becomes_the_plain_tensors_that_its_state_dict_has(run: Run) -> None:
    for args in (["--match", FIXTURES / "resnet_module.pth", OLD], [FIXTURES / "resnet_module.pth"]):
        assert run("filter", *args, "-o", "out.pth", "--force")[0] == 0
        assert {(type(tensor), tensor.requires_grad) for tensor in load("out.pth").values()} == {(torch.Tensor, False)}


def test_the_output_can_be_safetensors(old: Path, run: Run) -> None:
    assert run("filter", "--match", FULL, old, "-o", "merged.safetensors")[0] == 0
    merged, expected = load_file("merged.safetensors"), by_hand(load(FULL), load(OLD))
    assert_equal_values({name: merged[name] for name in expected}, expected)
    assert len(merged) == 122


def test_a_head_of_six_classes_stays_the_targets_and_both_shapes_are_shown(run: Run) -> None:
    code, out, err = run("filter", "--match", NEW, OLD, "-o", "merged.pth")
    assert (code, err) == (0, "")
    lines = {line.split()[1]: line for line in out.splitlines() if line.split()[0] == "mismatched"}
    assert set(lines) == {"fc.weight", "fc.bias"}
    assert "target 6x16, source 20x16" in lines["fc.weight"]
    assert "target 6, source 20" in lines["fc.bias"]
    merged, target = load("merged.pth"), load(NEW)
    assert_equal_values(merged, by_hand(target, load(OLD)))
    for name in ("fc.weight", "fc.bias"):
        assert bits(merged[name]) == bits(target[name])


def test_the_rows_of_a_mismatch_hold_both_shapes_in_json(run: Run) -> None:
    _, out, _ = run("filter", "--match", NEW, FIXTURES / "resnet_ddp.pth", "-o", "merged.pth", "--json")
    result = result_of(out)
    assert result["output"] == "merged.pth"
    rows = [row for row in result["rows"] if row["reason"] == "mismatched"]
    assert [(row["key"], row["source"], row["shape"], row["source_shape"]) for row in rows] == [
        ("fc.weight", "module.fc.weight", [6, 16], [20, 16]),
        ("fc.bias", "module.fc.bias", [6], [20]),
    ]
    assert result["counts"] == {"loaded": 100, "mismatched": 2, "bookkeeping": COUNTERS}
    target, source = load(NEW), load(OLD)
    counted = {name: tensor.numel() for name, tensor in target.items() if not name.endswith("num_batches_tracked")}
    loaded = sum(n for name, n in counted.items() if source[name].shape == target[name].shape)
    assert result["loaded_fraction"] == pytest.approx(loaded / sum(counted.values()))


def test_a_source_with_counters_gives_them_and_one_in_a_target_without_is_bookkeeping(run: Run) -> None:
    code, out, _ = run("filter", "--match", NEW, FULL, "-o", "all.pth", "--json")
    assert (code, result_of(out)["counts"]) == (0, {"loaded": 120, "mismatched": 2})
    assert load("all.pth")["bn1.num_batches_tracked"] == load(FULL)["bn1.num_batches_tracked"]
    code, out, _ = run("filter", "--match", OLD, FULL, "-o", "few.pth", "--json", "--strict")
    assert (code, result_of(out)["counts"]) == (0, {"loaded": 102, "bookkeeping": COUNTERS})
    assert_equal_values(load("few.pth"), by_hand(load(OLD), load(FULL)))


def test_a_second_run_gives_the_same_bytes_and_leaves_the_inputs_alone(run: Run) -> None:
    for name in ("one.pth", "two.pth"):
        run("filter", "--match", NEW, OLD, "-o", name)
    assert Path("one.pth").read_bytes() == Path("two.pth").read_bytes()


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


# --- what is chosen --------------------------------------------------------------------------------------------------


def test_only_matched_writes_just_what_fits_in_the_targets_order(run: Run) -> None:
    assert run("filter", "--match", NEW, OLD, "-o", "part.pth", "--only-matched")[0] == 0
    part, target, source = load("part.pth"), load(NEW), load(OLD)
    fitting = [name for name in target if name in source and source[name].shape == target[name].shape]
    assert_equal_values(part, {name: source[name] for name in fitting})


def test_only_matched_of_a_training_checkpoint_is_a_bare_state_dict(run: Run) -> None:
    assert run("filter", "--match", FIXTURES / "resnet_nested.pth", FULL, "-o", "part.pth", "--only-matched")[0] == 0
    part = load("part.pth")
    assert_equal_values(part, {name: tensor for name, tensor in load(FULL).items() if name in load(OLD)})


def test_only_matched_without_counters_still_loads_strictly(run: Run) -> None:
    from make import ResNet

    assert run("filter", "--match", FULL, OLD, "-o", "part.pth", "--only-matched")[0] == 0
    part = load("part.pth")
    assert len(part) == 102
    ResNet(20).load_state_dict(part, strict=True)


def test_include_and_exclude_narrow_what_is_taken_and_the_target_keeps_the_rest(run: Run) -> None:
    code, out, _ = run("filter", "--match", FULL, OLD, "-o", "out.pth", "--json",
                       "--include", "layer1.*", "--include", "re:^fc", "--exclude", "*.bias")  # fmt: skip
    target, source = load(FULL), load(OLD)
    chosen = {k: v for k, v in source.items() if k.startswith(("layer1.", "fc")) and not k.endswith(".bias")}
    assert code == 0
    assert_equal_values(load("out.pth"), by_hand(target, chosen))
    assert result_of(out)["counts"]["loaded"] == len(chosen)
    assert {row["key"] for row in result_of(out)["rows"] if row["reason"] == "loaded"} == set(chosen)


def test_a_selection_without_a_target_keeps_order_metadata_and_what_stands_beside(run: Run) -> None:
    code, out, _ = run("filter", FIXTURES / "resnet_nested.pth", "-o", "out.pth", "--include", "layer1.*", "--json")
    assert code == 0
    written, before = torch_load(Path("out.pth")), torch_load(FIXTURES / "resnet_nested.pth")
    chosen = {name: tensor for name, tensor in before["model"].items() if name.startswith("layer1.")}
    assert_equal_values(written["model"], chosen)
    assert result_of(out)["counts"] == {"loaded": len(chosen), "ignored": 102 - len(chosen)}
    del written["model"], before["model"]
    assert_identical(written, before)
    assert "no longer lines up" in " ".join(json.loads(out)["notes"])


def test_counters_dropped_by_a_selection_take_their_metadata_along_so_that_strict_loads_work(run: Run) -> None:
    from make import ResNet

    assert run("filter", FULL, "-o", "out.pth", "--exclude", "*.num_batches_tracked")[0] == 0
    written, before = load("out.pth"), load(FULL)
    assert_equal_values(written, {k: v for k, v in before.items() if not k.endswith("num_batches_tracked")})
    ResNet(20).load_state_dict(written, strict=True)
    expected = {name: entry for name, entry in before._metadata.items() if f"{name}.num_batches_tracked" not in before}
    assert dict(written._metadata) == expected
    assert 0 < len(expected) < len(before._metadata)


def test_a_selection_from_several_sources_takes_each_key_from_the_first_that_has_it(saved: Saved) -> None:
    first = saved({"a": torch.zeros(1), "b": torch.zeros(2)}, "one.pth")
    second = saved({"b": torch.ones(2), "c": torch.ones(3)}, "two.pth")
    chosen, report = ckptool.filter(first, second)
    ckptool.save(chosen, "out.pth")
    assert_equal_values(load("out.pth"), {"a": torch.zeros(1), "b": torch.zeros(2), "c": torch.ones(3)})
    assert rows_of(report, reason="ignored") == ["b"]


def test_patterns_that_choose_nothing_are_an_error_and_never_an_empty_output(run: Run) -> None:
    code, _, err = run("filter", OLD, "-o", "out.pth", "--include", "nothing.*")
    assert code == 2
    assert err == f"ckptool: error: {OLD}: the patterns choose none of 102 tensors\n"
    assert listing() == []


def test_a_pattern_that_fits_nothing_is_said(run: Run) -> None:
    _, out, _ = run("filter", "--match", FULL, OLD, "-o", "out.pth", "--exclude", "head.*")
    assert "head.* fits no key" in out


def test_several_sources_fill_a_target_the_first_winning_and_a_later_one_standing_in(saved: Saved) -> None:
    target = saved({name: torch.zeros(2) for name in "abcd"}, "t.pth")
    first = saved({"a": torch.ones(2), "b": torch.ones(3)}, "s1.pth")
    second = saved({"a": torch.full((2,), 2.0), "b": torch.full((2,), 2.0), "c": torch.full((2,), 2.0)}, "s2.pth")
    merged, report = ckptool.filter(first, second, match=target)
    ckptool.save(merged, "out.pth")
    assert {name: tensor[0].item() for name, tensor in load("out.pth").items()} == {"a": 1, "b": 2, "c": 2, "d": 0}
    assert rows_of(report, reason="missing") == ["d"]
    assert [row.file for row in report.rows if row.reason == "loaded"] == [str(first), str(second), str(second)]


def test_a_prefix_can_be_stripped_and_added(saved: Saved, run: Run) -> None:
    source = saved({"encoder.a.w": torch.ones(2), "head.w": torch.ones(1)}, "s.pth")
    target = saved({"net.a.w": torch.zeros(2)}, "t.pth")
    options = ("--strip-prefix", "encoder.", "--add-prefix", "net.")
    code, out, _ = run("filter", "--match", target, source, "-o", "out.pth", *options, "--json")
    assert (code, result_of(out)["counts"]) == (0, {"loaded": 1, "unexpected": 1})
    assert_equal_values(load("out.pth"), {"net.a.w": torch.ones(2)})
    assert next(row["source"] for row in result_of(out)["rows"]) == "encoder.a.w"


def test_a_prefix_that_no_key_has_is_an_error(run: Run) -> None:
    code, _, err = run("filter", "--match", FULL, OLD, "-o", "out.pth", "--strip-prefix", "encoder.")
    assert code == 2
    assert "no key begins with 'encoder.'" in err
    assert listing() == []


def test_stripping_that_makes_two_keys_one_is_refused_naming_it(saved: Saved) -> None:
    source = saved({"x.a.w": torch.ones(2), "a.w": torch.ones(2)}, "s.pth")
    with pytest.raises(CollisionError, match=r"a\.w"):
        ckptool.filter(source, match=saved({"a.w": torch.zeros(2)}, "t.pth"), strip_prefix="x.")


def test_wrapper_prefixes_are_looked_through_on_either_side_and_said(saved: Saved) -> None:
    plain = {"a.w": torch.ones(2), "b.w": torch.full((3,), 2.0)}
    wrapped = {f"_orig_mod.module.{name}": torch.zeros_like(tensor) for name, tensor in plain.items()}
    merged, report = ckptool.filter(saved(plain, "s.pth"), match=saved(wrapped, "t.pth"))
    ckptool.save(merged, "out.pth")
    assert_equal_values(load("out.pth"), {f"_orig_mod.module.{name}": tensor for name, tensor in plain.items()})
    assert any("'_orig_mod.module.'" in note for note in report.notes)


def test_the_options_of_a_match_need_one(run: Run) -> None:
    for option in (["--strip-prefix", "a."], ["--only-matched"], ["--cast"], ["--min-loaded", "5%"], ["--strict"]):
        code, _, err = run("filter", OLD, "-o", "out.pth", *option)
        assert (code, listing()) == (2, [])
        assert "need --match" in err
    with pytest.raises(UsageError):
        ckptool.filter(match=OLD)


# --- gates -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "target", "said"),
    [
        (["--min-loaded", "99.5%"], NEW, "--min-loaded wants 99.5 %"),
        (["--min-loaded", "0.999"], NEW, "--min-loaded wants 99.9 %"),
        (["--require", "fc.*"], NEW, "--require fc.*: not loaded: fc.weight, fc.bias"),
        (["--require", "head.*"], FULL, "--require head.* fits no key of the target"),
        (["--require", "conv1.*", "--require", "bn1.num*"], FULL, "not loaded: bn1.num_batches_tracked"),
        (["--strict"], NEW, "--strict: 2 mismatched"),
    ],
)
def test_a_gate_that_does_not_hold_exits_1_says_why_and_writes_nothing(
    options: list[str], target: Path, said: str, run: Run
) -> None:
    code, out, err = run("filter", "--match", target, OLD, "-o", "out.pth", *options)
    assert (code, err, listing()) == (1, "", [])
    assert said in next(line for line in out.splitlines() if line.startswith("  failed"))
    assert "(not written)" in out.splitlines()[0]
    code, out, _ = run("filter", "--match", target, OLD, "-o", "out.pth", *options, "--json")
    assert (code, listing()) == (1, [])
    assert any(said in note for note in json.loads(out)["notes"])
    assert "output" not in result_of(out)


@pytest.mark.parametrize(
    "options",
    [["--min-loaded", "100%"], ["--min-loaded", "1"], ["--require", "fc.*", "--require", "re:conv"], ["--strict"]],
)
def test_a_gate_that_holds_changes_nothing(options: list[str], run: Run) -> None:
    assert run("filter", "--match", FULL, OLD, "-o", "out.pth", *options)[0] == 0
    assert_equal_values(load("out.pth"), by_hand(load(FULL), load(OLD)))


@pytest.mark.parametrize("share", ["150%", "-1", "ninety", "nan", "", "%"])
def test_a_share_that_is_none_is_refused(share: str, run: Run) -> None:
    code, _, err = run("filter", "--match", FULL, OLD, "-o", "out.pth", f"--min-loaded={share}")
    assert (code, listing()) == (2, [])
    assert err.count("\n") == 1


def test_strict_counts_missing_and_unexpected_too(saved: Saved, run: Run) -> None:
    target = saved({"a": torch.zeros(1), "b": torch.zeros(1)}, "t.pth")
    source = saved({"a": torch.zeros(1), "c": torch.zeros(1)}, "s.pth")
    code, out, _ = run("filter", "--match", target, source, "-o", "out.pth", "--strict")
    assert code == 1
    assert "--strict: 1 missing, 1 unexpected" in out


def test_a_required_key_that_two_sources_have_counts_as_loaded(saved: Saved, run: Run) -> None:
    target, source = saved({"a": torch.zeros(1)}, "t.pth"), saved({"a": torch.ones(1)}, "s.pth")
    other = saved({"a": torch.ones(1)}, "other.pth")
    assert run("filter", "--match", target, source, other, "-o", "out.pth", "--require", "a")[0] == 0


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


# --- where it is written ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".ckpt", ".pth.tar", ".PTH", ".safetensors"])
def test_the_suffix_decides_the_format(suffix: str, run: Run) -> None:
    code, _, err = run("filter", "--match", FULL, OLD, "-o", f"out{suffix}")
    assert (code, err) == (0, "")
    read = load_file if suffix == ".safetensors" else load
    assert len(read(f"out{suffix}")) == 122


@pytest.mark.parametrize("name", ["out.onnx", "out", "out.pth.bak", "safetensors"])
def test_an_unknown_suffix_is_an_error(name: str, run: Run) -> None:
    code, _, err = run("filter", "--match", FULL, OLD, "-o", name)
    assert (code, listing()) == (2, [])
    assert "suffix" in err


def test_an_output_that_exists_needs_force(run: Run) -> None:
    Path("out.pth").write_bytes(b"precious")
    code, _, err = run("filter", "--match", FULL, OLD, "-o", "out.pth")
    assert (code, Path("out.pth").read_bytes()) == (2, b"precious")
    assert "--force" in err
    assert run("filter", "--match", FULL, OLD, "-o", "out.pth", "--force")[0] == 0
    assert_equal_values(load("out.pth"), by_hand(load(FULL), load(OLD)))
    assert listing() == ["out.pth"]


def two_files() -> None:
    torch.save({"a": torch.zeros(2)}, "target.pth")
    torch.save({"a": torch.ones(2), "x": torch.ones(1)}, "source.pth")


@pytest.mark.parametrize("onto", ["target.pth", "source.pth"])
@pytest.mark.parametrize("through", ["itself", "symlink", "hardlink"])
def test_an_output_that_is_an_input_is_refused_even_with_force(onto: str, through: str, run: Run) -> None:
    two_files()
    before = Path(onto).read_bytes()
    output = onto
    if through != "itself":
        output = "link.pth"
        os.symlink(onto, output) if through == "symlink" else os.link(onto, output)
    code, _, err = run("filter", "--match", "target.pth", "source.pth", "-o", output, "--force")
    assert (code, Path(onto).read_bytes()) == (2, before)
    assert "--in-place" in err


@pytest.mark.parametrize("onto", ["target.pth", "source.pth"])
def test_in_place_replaces_an_input_whole(onto: str, run: Run) -> None:
    two_files()
    assert run("filter", "--match", "target.pth", "source.pth", "-o", onto, "--in-place")[0] == 0
    assert_identical(load(onto), {"a": torch.ones(2)})
    assert listing() == ["source.pth", "target.pth"]


def test_an_input_that_gave_nothing_is_still_an_input(run: Run) -> None:
    two_files()
    torch.save({"b": torch.ones(1)}, "unused.pth")
    before = Path("unused.pth").read_bytes()
    code, _, _ = run("filter", "--match", "target.pth", "source.pth", "unused.pth", "-o", "unused.pth", "--force")
    assert (code, Path("unused.pth").read_bytes()) == (2, before)


def test_a_report_never_goes_onto_an_input(run: Run) -> None:
    two_files()
    before = Path("source.pth").read_bytes()
    args = ["filter", "--match", "target.pth", "source.pth", "-o", "out.pth", "--report", "source.pth", "--force"]
    assert (run(*args)[0], Path("source.pth").read_bytes()) == (2, before)


def test_a_report_that_cannot_be_written_is_known_before_the_output_is(run: Run) -> None:
    two_files()
    Path("report.json").write_text("precious")
    code, _, _ = run("filter", "--match", "target.pth", "source.pth", "-o", "out.pth", "--report", "report.json")
    assert (code, listing()) == (2, ["report.json", "source.pth", "target.pth"])


def test_a_report_and_an_output_of_one_name_are_refused(run: Run) -> None:
    two_files()
    code, _, _ = run("filter", "--match", "target.pth", "source.pth", "-o", "out.pth", "--report", "out.pth", "--force")
    assert code == 2


def test_a_source_given_twice_is_no_crash(run: Run) -> None:
    two_files()
    assert run("filter", "--match", "target.pth", "source.pth", "source.pth", "-o", "out.pth")[0] == 0


def test_a_dry_run_reports_the_same_and_writes_nothing(run: Run) -> None:
    code, dry, _ = run("filter", "--match", NEW, OLD, "-o", "out.pth", "--dry-run", "--json")
    assert (code, listing()) == (0, [])
    code, wet, _ = run("filter", "--match", NEW, OLD, "-o", "out.pth", "--json")
    assert result_of(dry) == {name: value for name, value in result_of(wet).items() if name != "output"}
    code, out, _ = run("filter", "--match", NEW, OLD, "--dry-run")
    assert code == 0
    assert out.startswith("(dry run): 100 loaded")


def test_without_an_output_or_a_dry_run_nothing_is_done(run: Run) -> None:
    code, _, err = run("filter", "--match", NEW, OLD)
    assert code == 2
    assert "-o" in err
    assert "--dry-run" in err


def test_a_report_file_is_the_json_document(run: Run) -> None:
    _, out, _ = run("filter", "--match", NEW, OLD, "-o", "out.pth", "--report", "report.json", "--json")
    assert json.loads(Path("report.json").read_text()) == json.loads(out)
    code, text, _ = run("filter", "--match", NEW, OLD, "-o", "two.pth", "--report", "second.json", "--strict")
    assert (code, listing()) == (1, ["out.pth", "report.json", "second.json"])
    assert result_of(Path("second.json").read_text())["counts"]["mismatched"] == 2
    assert text.startswith("two.pth (not written)")


def test_what_safetensors_cannot_hold_is_said_when_left_out_and_refused_when_tensors(run: Run) -> None:
    code, out, _ = run("filter", "--match", FIXTURES / "lightning.ckpt", FIXTURES / "lightning.ckpt", "-o",
                       "out.safetensors", "--json")  # fmt: skip
    assert code == 0
    note = next(note for note in json.loads(out)["notes"] if note.startswith("left out: "))
    assert {"epoch", "optimizer_states", "hyper_parameters"} <= set(note.removeprefix("left out: ").split(", "))
    composite = FIXTURES / "composite.pth"
    code, _, err = run("filter", "--match", composite, composite, "-o", "two.safetensors")
    assert (code, listing(), err.count("\n")) == (2, ["out.safetensors"], 1)
    assert all(name in err for name in ("quantized", "coo", "csr", "nested", "jagged", "meta"))


# --- how it is shown -------------------------------------------------------------------------------------------------


def test_the_first_line_is_the_answer(run: Run) -> None:
    _, out, _ = run("filter", "--match", NEW, OLD, "-o", "merged.pth")
    first = out.splitlines()[0]
    target = load(NEW)
    counted = sum(tensor.numel() for name, tensor in target.items() if not name.endswith("num_batches_tracked"))
    share = 100 * (counted - target["fc.weight"].numel() - target["fc.bias"].numel()) / counted
    assert first == (
        f"merged.pth: 100 loaded ({share:.1f} % of parameters), 2 mismatched kept from {NEW}, {COUNTERS} bookkeeping"
    )
    assert "20 x num_batches_tracked" in out
    assert "num_batches_tracked" not in out.replace("20 x num_batches_tracked", "")


def test_all_shows_loaded_keys_and_where_they_came_from(run: Run) -> None:
    _, out, _ = run("filter", "--match", FULL, FIXTURES / "resnet_ddp.pth", "-o", "out.pth", "--all")
    line = next(line for line in out.splitlines() if line.split()[:2] == ["loaded", "conv1.weight"])
    assert "from module.conv1.weight" in line


def test_escape_sequences_in_a_path_never_reach_the_terminal(saved: Saved, run: Run) -> None:
    target = saved({"a": torch.zeros(1), "b": torch.zeros(1)}, "evil\x1b[31m.pth")
    _, out, _ = run("filter", "--match", target, saved({"a": torch.ones(1)}, "s.pth"), "-o", "out.pth")
    assert "\x1b" not in out


def test_an_object_that_is_no_tensor_has_no_shape(saved: Saved, run: Run) -> None:
    path = saved({"a": torch.zeros(1), "note": "text"})
    assert "nested" not in run("filter", "--match", path, path, "--dry-run", "--all")[1]
