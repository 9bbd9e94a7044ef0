"""`filter`: the main job, what is chosen, gates, where the output goes and how it is shown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from filtering import COUNTERS, FULL, NEW, OLD, assert_equal_values, by_hand, listing, result_of, rows_of
from oracles import FIXTURES, Run, Saved, State, assert_identical, bits, load, torch_load
from safetensors.torch import load_file, save_file

import ckptool
from ckptool.errors import CollisionError, UsageError

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


def test_102_keys_go_into_122_and_a_real_model_takes_them_strictly(old: Path, run: Run) -> None:
    from makers.models import ResNet

    code, out, err = run("filter", "--match", FULL, old, "-o", "merged.pth", "--json")
    assert (code, err) == (0, "")
    assert result_of(out)["counts"] == {"loaded": 102, "bookkeeping": COUNTERS}
    merged, target, source = load("merged.pth"), load(FULL), load(OLD)
    assert list(merged) == list(target)
    assert_equal_values(merged, by_hand(target, source))
    assert_identical(merged._metadata, target._metadata)
    assert_equal_values(merged, torch.load("merged.pth", weights_only=True, mmap=True))
    model = ResNet(20)
    model.load_state_dict(merged, strict=True)
    loaded = model.state_dict()
    for name, tensor in source.items():
        assert torch.equal(loaded[name], tensor), name


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


# --- what is chosen --------------------------------------------------------------------------------------------------


def test_only_matched_writes_just_what_fits_in_the_targets_order(run: Run) -> None:
    assert run("filter", "--match", NEW, OLD, "-o", "part.pth", "--only-matched")[0] == 0
    part, target, source = load("part.pth"), load(NEW), load(OLD)
    fitting = [name for name in target if name in source and source[name].shape == target[name].shape]
    assert_equal_values(part, {name: source[name] for name in fitting})


def test_only_matched_of_a_training_checkpoint_is_a_bare_state_dict(run: Run) -> None:
    assert run("filter", "--match", FIXTURES / "resnet_nested.pth", FULL, "-o", "part.pth", "--only-matched")[0] == 0
    part, old = load("part.pth"), load(OLD)
    assert_equal_values(part, {name: tensor for name, tensor in load(FULL).items() if name in old})


def test_only_matched_without_counters_still_loads_strictly(run: Run) -> None:
    from makers.models import ResNet

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
    from makers.models import ResNet

    assert run("filter", FULL, "-o", "out.pth", "--exclude", "*.num_batches_tracked")[0] == 0
    written, before = load("out.pth"), load(FULL)
    assert_equal_values(written, {k: v for k, v in before.items() if not k.endswith("num_batches_tracked")})
    ResNet(20).load_state_dict(written, strict=True)
    expected = {name: entry for name, entry in before._metadata.items() if f"{name}.num_batches_tracked" not in before}
    assert dict(written._metadata) == expected
    assert 0 < len(expected) < len(before._metadata)


def test_a_selection_from_several_sources_takes_each_key_from_the_first_that_has_it_if_told_so(saved: Saved) -> None:
    first = saved({"a": torch.zeros(1), "b": torch.zeros(2)}, "one.pth")
    second = saved({"b": torch.ones(2), "c": torch.ones(3)}, "two.pth")
    chosen, report = ckptool.filter(first, second, first_wins=True)
    ckptool.save(chosen, "out.pth")
    assert_equal_values(load("out.pth"), {"a": torch.zeros(1), "b": torch.zeros(2), "c": torch.ones(3)})
    assert rows_of(report, reason="ignored") == ["b"]


def test_patterns_that_choose_nothing_are_an_error_and_never_an_empty_output(run: Run) -> None:
    code, _, err = run("filter", OLD, "-o", "out.pth", "--include", "nothing.*")
    assert code == 2
    assert err == f"ckptool: error: {OLD}: the patterns choose none of 102 tensors; nothing.* fits no key\n"
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
    for option in (["--only-matched"], ["--cast"], ["--min-loaded", "5%"], ["--strict"]):
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


def two_files() -> None:
    torch.save({"a": torch.zeros(2)}, "target.pth")
    torch.save({"a": torch.ones(2), "x": torch.ones(1)}, "source.pth")


def test_an_input_that_gave_nothing_is_still_an_input(run: Run) -> None:
    two_files()
    torch.save({"b": torch.ones(1)}, "unused.pth")
    before = Path("unused.pth").read_bytes()
    code, _, _ = run("filter", "--match", "target.pth", "source.pth", "unused.pth", "-o", "unused.pth", "--force")
    assert (code, Path("unused.pth").read_bytes()) == (2, before)


def test_a_failed_gate_still_writes_the_report(run: Run) -> None:
    code, text, _ = run("filter", "--match", NEW, OLD, "-o", "out.pth", "--report", "report.json", "--strict")
    assert (code, listing()) == (1, ["report.json"])
    assert result_of(Path("report.json").read_text())["counts"]["mismatched"] == 2
    assert text.startswith("out.pth (not written)")


def test_a_source_given_twice_is_no_crash(run: Run) -> None:
    two_files()
    assert run("filter", "--match", "target.pth", "source.pth", "source.pth", "-o", "out.pth")[0] == 0


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


@pytest.mark.usefixtures("folding")
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
