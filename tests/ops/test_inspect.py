from __future__ import annotations

import json
import zipfile
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import FIXTURES, tensors_of, torch_load
from torch import nn

import ckptool
from ckptool.cli import main
from ckptool.errors import NoTensorsError

Saved = Callable[..., Path]
Run = Callable[..., tuple[int, str, str]]

READABLE = ["resnet_old.pth", "resnet_nested.pth", "resnet_ddp.pth", "resnet_legacy.pth", "resnet_old.safetensors",
            "tied.pth", "views.pth", "dtypes.pth", "lightning.ckpt", "ema.pth", "conj_neg.pth"]  # fmt: skip


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*args: object) -> tuple[int, str, str]:
        code = main([str(arg) for arg in args])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def result_of(text: str) -> list[dict[str, Any]]:
    document = json.loads(text)
    assert (document["schema"], document["command"]) == (1, "inspect")
    return document["result"]


def weights_of(name: str) -> dict[str, torch.Tensor]:
    if name.endswith(".safetensors"):
        return torch.load(FIXTURES / name.replace(".safetensors", ".pth"))
    loaded = torch_load(FIXTURES / name)
    for step in ("state_dict", "model"):
        loaded = loaded.get(step, loaded)
    return loaded


# --- what is said of a file ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", READABLE)
def test_json_lists_every_tensor_as_torch_loads_it(name: str, run: Run) -> None:
    code, out, err = run("inspect", FIXTURES / name, "--json")
    assert (code, err) == (0, "")
    [result] = result_of(out)
    expected = weights_of(name)
    listed = {row["key"]: row for row in result["tensors"]}
    if not name.endswith(".safetensors"):  # that library has an order of its own
        assert list(listed) == list(expected)
    assert set(listed) == set(expected)
    for key, tensor in expected.items():
        row = listed[key]
        assert row["shape"] == list(tensor.shape)
        assert row["dtype"] == str(tensor.dtype).removeprefix("torch.")
        assert row["nbytes"] == tensor.nbytes
    assert result["nbytes"] == (FIXTURES / name).stat().st_size
    assert result["path"] == str(FIXTURES / name)


@pytest.mark.parametrize(
    ("name", "form", "root"),
    [
        ("resnet_old.pth", "torch-zip", ""),
        ("resnet_nested.pth", "torch-zip", "model"),
        ("resnet_legacy.pth", "torch-legacy", ""),
        ("tar_2016.pth", "torch-tar", ""),
        ("resnet_old.safetensors", "safetensors", ""),
        ("sharded", "hf-sharded", ""),
        ("lightning.ckpt", "torch-zip", "state_dict"),
    ],
)
def test_the_format_and_the_root_are_named(name: str, form: str, root: str, run: Run) -> None:
    [result] = result_of(run("inspect", FIXTURES / name, "--json")[1])
    assert (result["format"], result["root"]) == (form, root)
    lines = run("inspect", FIXTURES / name)[1].splitlines()
    assert form in lines[0]
    assert lines[1].split(None, 1)[1].startswith(f"{root or 'the top'}: ")


def test_parameters_and_bytes_per_dtype_leave_counters_and_second_names_aside(saved: Saved, run: Run) -> None:
    shared = torch.zeros(3, 4)
    path = saved({"a": shared, "b": shared, "h": torch.zeros(5).half(), "bn.num_batches_tracked": torch.tensor(2)})
    report = ckptool.inspect(path)
    assert report.parameters == 12 + 5
    assert report.tensor_nbytes == 48 + 10 + 8
    assert report.dtypes == {"float32": [1, 48], "float16": [1, 10], "int64": [1, 8]}
    assert "4 tensors, 17 parameters, 48 B float32 (1) + 10 B float16 (1) + 8 B int64 (1)" in run("inspect", path)[1]


def test_the_container_is_told_in_a_few_words(saved: Saved, run: Run) -> None:
    net = nn.Linear(2, 3)
    path = saved({
        "epoch": 41, "arch": "resnet18", "acc": 71.25, "nothing": None, "flags": [True, False],
        "model": net.state_dict(), "optimizer": torch.optim.AdamW(net.parameters()).state_dict(),
        "args": Namespace(lr=0.1, data="imagenet"), "rng": torch.zeros(4, dtype=torch.uint8),
        "teacher": {"w": torch.zeros(2, 2)}, "long": "x" * 500,
    })  # fmt: skip
    beside = {item.path: item.text for item in ckptool.inspect(path).beside}
    expected = {
        "epoch": "41", "arch": "'resnet18'", "acc": "71.25", "nothing": "None", "flags": "[True, False]",
        "optimizer": "AdamW of 2 parameters", "args": "argparse.Namespace(lr=0.1, data='imagenet')",
        "teacher": "dict with 1 tensor", "rng": "tensor 4 uint8",
    }  # fmt: skip
    assert list(beside) == ["epoch", "arch", "acc", "nothing", "flags", "optimizer", "args", "rng", "teacher", "long"]
    assert {name: beside[name] for name in expected} == expected
    assert len(beside["long"]) <= 120
    out = run("inspect", path)[1]
    assert all(f"{name}: {text}" in out for name, text in expected.items())


def test_lightnings_optimizers_and_hyper_parameters_are_told() -> None:
    beside = {item.path: item.text for item in ckptool.inspect(FIXTURES / "lightning.ckpt").beside}
    assert beside["optimizer_states"] == "SGD of 4 parameters"
    assert beside["hyper_parameters"] == "{'lr': 0.1, 'arch': 'mlp'}"
    assert beside["global_step"] == "1200"


def test_containers_that_hold_themselves_are_told_and_end(run: Run) -> None:
    code, out, _ = run("inspect", FIXTURES / "leaves.pth")
    assert code == 0
    assert "cycle: {'name': 'ring', 'items': [1, 2, [" in out


def test_the_wrapper_and_the_common_prefix_are_named(saved: Saved, run: Run) -> None:
    report = ckptool.inspect(FIXTURES / "resnet_ddp.pth")
    assert (report.wrapper, report.prefix) == ("module.", "module.")
    assert "module. is a wrapper's prefix" in run("inspect", FIXTURES / "resnet_ddp.pth")[1]
    assert "every key under model." in run("inspect", FIXTURES / "lightning.ckpt")[1]
    path = saved({"a._checkpoint_wrapped_module.w": torch.zeros(1), "b": torch.zeros(1)})
    assert "wrapped: _checkpoint_wrapped_module." in run("inspect", path)[1]


def test_averaged_copies_are_named_and_taken_with_root_only(run: Run) -> None:
    report = ckptool.inspect(FIXTURES / "ema.pth")
    assert (report.root, report.ema) == ("state_dict", ["state_dict_ema"])
    assert "taken only with --root: state_dict_ema" in run("inspect", FIXTURES / "ema.pth")[1]
    [result] = result_of(run("inspect", FIXTURES / "ema.pth", "--root", "state_dict_ema", "--json")[1])
    assert result["root"] == "state_dict_ema"


def test_other_places_with_weights_are_named(saved: Saved, run: Run) -> None:
    path = saved({"net": {"w": torch.zeros(1)}, "model": {"w": torch.zeros(1)}})
    assert "other places with weights (--root): net" in run("inspect", path)[1]


def test_tie_groups_are_those_that_share_memory_in_torch(run: Run) -> None:
    loaded = torch.load(FIXTURES / "tied.pth")
    groups: dict[int, list[str]] = {}
    for key, tensor in loaded.items():
        groups.setdefault(tensor.data_ptr(), []).append(key)
    expected = [group for group in groups.values() if len(group) > 1]
    [result] = result_of(run("inspect", FIXTURES / "tied.pth", "--json")[1])
    assert result["tied"] == expected
    tied_to = {row["key"]: row["tied_to"] for row in result["tensors"] if "tied_to" in row}
    assert tied_to == {key: group[0] for group in expected for key in group[1:]}
    out = run("inspect", FIXTURES / "tied.pth", "--flat")[1]
    assert "tied: emb.weight = head.weight" in out
    assert next(line for line in out.splitlines() if line.startswith("  head.weight")).endswith("= emb.weight")


@pytest.mark.parametrize("name", ["views.pth", "resnet_nested.pth", "ema.pth"])
def test_stored_bytes_are_those_of_the_storages(name: str) -> None:
    storages = {}
    for _, tensor in tensors_of(torch_load(FIXTURES / name)):
        if tensor.numel():
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    assert ckptool.inspect(FIXTURES / name).stored_nbytes == sum(storages.values())


def test_a_small_view_of_a_large_storage_is_worth_a_note(saved: Saved, run: Run) -> None:
    path = saved({"w": torch.zeros(1000)[:10]})
    report = ckptool.inspect(path)
    assert (report.stored_nbytes, report.used_nbytes) == (4000, 40)
    assert "storages take 4 kB, tensors use 40 B" in run("inspect", path)[1]
    assert "storages take" not in run("inspect", FIXTURES / "resnet_old.pth")[1]


def test_device_tags_are_counted_and_need_no_device(monkeypatch: pytest.MonkeyPatch, saved: Saved, run: Run) -> None:
    tags = iter(["cuda:1", "cuda:1", "cpu"])
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: next(tags))
    path = saved({"a": torch.zeros(1), "b": torch.zeros(1), "c": torch.zeros(1)})
    [result] = result_of(run("inspect", path, "--json")[1])
    assert result["devices"] == {"cuda:1": 2, "cpu": 1}
    assert [row["device"] for row in result["tensors"]] == ["cuda:1", "cuda:1", "cpu"]
    assert "written from cuda:1" in run("inspect", path)[1].splitlines()[0]


def test_a_safetensors_file_has_no_device_tags(run: Run) -> None:
    [result] = result_of(run("inspect", FIXTURES / "resnet_old.safetensors", "--json")[1])
    assert not any("device" in row for row in result["tensors"])


def test_empty_tensors_are_named(run: Run) -> None:
    assert ckptool.inspect(FIXTURES / "views.pth").empty == ["no_elements"]
    assert "empty (zero-size): no_elements" in run("inspect", FIXTURES / "views.pth")[1]


@pytest.mark.parametrize(
    ("name", "counters", "said"),
    [
        ("resnet_122.pth", {"present": 20, "absent": 0}, "num_batches_tracked: 20 present"),
        ("resnet_old.pth", {"present": 0, "absent": 20}, "num_batches_tracked: none, absent in 20 BatchNorm layers"),
        ("tied.pth", {"present": 0, "absent": 0}, None),
    ],
)
def test_counters_present_and_absent_are_told(name: str, counters: dict[str, int], said: str | None, run: Run) -> None:
    assert ckptool.inspect(FIXTURES / name).counters == counters
    out = run("inspect", FIXTURES / name)[1]
    assert said in out if said else "num_batches_tracked" not in out


def test_names_the_pickle_would_have_called_are_listed_and_nothing_ran(run: Run) -> None:
    code, out, _ = run("inspect", FIXTURES / "malicious.pt", "--json")
    assert (code, result_of(out)[0]["unsafe"]) == (0, ["posix.mkdir"])  # the fixture `nothing_ran` looks for its trace
    assert "none imported or run: posix.mkdir" in run("inspect", FIXTURES / "malicious.pt")[1]
    for name in ("resnet_122.pth", "dtypes.pth", "tied.pth"):
        assert ckptool.inspect(FIXTURES / name).unsafe == []


def test_a_whole_model_is_its_state_dict_and_what_that_leaves_out_is_named(run: Run) -> None:
    report = ckptool.inspect(FIXTURES / "resnet_module.pth")
    assert [row.key for row in report.tensors] == list(torch.load(FIXTURES / "resnet_122.pth"))
    assert report.loose == ["grid", "loose"]
    assert {"shapeworld.nets.ResNet", "shapeworld.nets.BasicBlock"} <= set(report.unsafe)
    said = "a whole model, pickled, a shapeworld.nets.ResNet: torch.load needs its classes"
    assert said in report.notes
    assert said not in ckptool.inspect(FIXTURES / "resnet_122.pth").notes
    assert "not in the state_dict: grid, loose" in run("inspect", FIXTURES / "resnet_module.pth")[1]


def test_composite_tensors_are_listed_with_their_kind(run: Run) -> None:
    rows = {row["key"]: row for row in result_of(run("inspect", FIXTURES / "composite.pth", "--json")[1])[0]["tensors"]}
    assert rows["coo"]["kind"] == "sparse_coo"
    assert rows["quantized"]["kind"] == "quantized"
    assert "shape" not in rows["nested"] or rows["nested"]["shape"] is None
    assert "kind" not in rows["plain"]


def test_shards_missing_are_told_and_the_rest_is_listed(run: Run) -> None:
    code, out, err = run("inspect", FIXTURES / "sharded_broken")
    assert (code, err.count("missing shards")) == (2, 1)
    assert "missing shards: model-00003-of-00003.safetensors" in out
    assert "model.embed.weight" in out


def test_safetensors_metadata_is_shown(tmp_path: Path, run: Run) -> None:
    from safetensors.torch import save_file

    save_file({"w": torch.zeros(1)}, tmp_path / "m.safetensors", {"format": "pt", "author": "some\x1b[1mone"})
    out = run("inspect", tmp_path / "m.safetensors")[1]
    assert r"author: some\x1b[1mone" in out
    [result] = result_of(run("inspect", tmp_path / "m.safetensors", "--json")[1])
    assert result["metadata"]["author"] == "some\x1b[1mone"


# --- how keys are shown ----------------------------------------------------------------------------------------------


def test_keys_gives_the_bare_keys_in_the_files_order(run: Run) -> None:
    code, out, err = run("inspect", FIXTURES / "resnet_nested.pth", "--keys")
    assert (code, err) == (0, "")
    assert out.splitlines() == list(torch.load(FIXTURES / "resnet_old.pth"))


def test_flat_has_one_line_per_tensor(run: Run) -> None:
    out = run("inspect", FIXTURES / "resnet_old.pth", "--flat")[1]
    rows = [line.split() for line in out[out.index("\n\n") :].splitlines() if line]
    expected = torch.load(FIXTURES / "resnet_old.pth")
    assert [row[0] for row in rows] == list(expected)
    assert [row[1] for row in rows] == ["x".join(map(str, tensor.shape)) for tensor in expected.values()]
    assert {row[2] for row in rows} == {"float32"}


@pytest.mark.usefixtures("folding")
def test_the_tree_folds_only_what_is_equal(saved: Saved, run: Run) -> None:
    tensors = {f"layers.{i}.{n}.w": torch.zeros(4 if i < 3 else 5) for i in range(4) for n in "ab"}
    out = run("inspect", saved({**tensors, "layers.0.c.w": torch.zeros(4).half()}))[1]
    rows = [line.split() for line in out[out.index("\n\n") :].splitlines() if line]
    assert rows[0] == ["layers."]
    assert [row[0] for row in rows[1:]] == ["{0..2}.a.w", "{0..2}.b.w", "3.a.w", "3.b.w", "0.c.w"]


def test_depth_sums_up_below(saved: Saved, run: Run) -> None:
    path = saved({"a.x.w": torch.zeros(2), "a.x.b": torch.zeros(3), "a.y.w": torch.zeros(5), "b": torch.zeros(7)})
    out = run("inspect", path, "--depth", "1")[1]
    assert [line.split() for line in out.splitlines()[-2:]] == [
        ["a.*", "3", "tensors", "10", "elements", "40", "B"],
        ["b", "1", "tensor", "7", "elements", "28", "B"],
    ]
    out = run("inspect", path, "--depth", "2")[1]
    assert [line.split()[0] for line in out.splitlines()[-3:]] == ["a.x.*", "a.y.*", "b"]


@pytest.mark.parametrize(
    ("order", "keys"),
    [("key", ["a", "b", "c", "d"]), ("numel", ["b", "c", "a", "d"]), ("nbytes", ["c", "b", "d", "a"])],
)
def test_sort_orders_by_name_or_from_the_largest(order: str, keys: list[str], saved: Saved, run: Run) -> None:
    path = saved({
        "c": torch.zeros(5, dtype=torch.float64), "b": torch.zeros(9), "a": torch.zeros(4, dtype=torch.int8),
        "d": torch.zeros(3),
    })  # fmt: skip
    assert run("inspect", path, "--keys", "--sort", order)[1].split() == keys
    [result] = result_of(run("inspect", path, "--json", "--sort", order)[1])
    assert [row["key"] for row in result["tensors"]] == keys


def test_include_and_exclude_choose_rows_and_say_what_fits_nothing(run: Run) -> None:
    path = FIXTURES / "resnet_old.pth"
    patterns = ["--include", "layer1.*", "--include", "re:^fc", "--exclude", "*.bias", "--exclude", "head.*"]
    code, out, err = run("inspect", path, "--keys", *patterns)
    expected = [k for k in torch.load(path) if k.startswith(("layer1.", "fc")) and not k.endswith(".bias")]
    assert (code, out.splitlines()) == (0, expected)
    assert err == f"ckptool: {path}: head.* fits no key\n"


def test_a_pattern_that_fits_nothing_is_a_note_in_json(run: Run) -> None:
    _, out, _ = run("inspect", FIXTURES / "resnet_old.pth", "--json", "--include", "head.*")
    assert any("head.*" in note for note in json.loads(out)["notes"])


def test_several_files_are_shown_one_after_the_other(run: Run) -> None:
    code, out, _ = run("inspect", FIXTURES / "resnet_old.pth", FIXTURES / "tied.pth", "--json")
    assert (code, [len(result["tensors"]) for result in result_of(out)]) == (0, [102, 11])
    code, out, _ = run("inspect", FIXTURES / "resnet_old.pth", FIXTURES / "tied.pth")
    heads = [line.split()[0] for line in out.splitlines() if "torch-zip" in line]
    assert (code, heads) == (0, [str(FIXTURES / "resnet_old.pth"), str(FIXTURES / "tied.pth")])


def test_one_bad_file_among_several_is_said_and_the_others_are_shown(run: Run) -> None:
    files = [FIXTURES / "tied.pth", FIXTURES / "bad" / "html.pth", FIXTURES / "views.pth"]
    code, out, err = run("inspect", *files, "--keys")
    assert code == 2
    assert out.splitlines() == [*torch.load(FIXTURES / "tied.pth"), *torch_load(FIXTURES / "views.pth")]
    assert err.startswith(f"ckptool: error: {FIXTURES / 'bad' / 'html.pth'}: ")
    assert err.count("\n") == 1


def test_options_that_contradict_each_other_are_refused(run: Run) -> None:
    for options in (["--keys", "--json"], ["--keys", "--depth", "2"], ["--flat", "--depth", "1"], ["--depth", "0"]):
        code, _, err = run("inspect", FIXTURES / "tied.pth", *options)
        assert (code, err.count("\n")) == (2, 1)


# --- nothing there ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tree", [{}, {"model": {}}, {"epoch": 1}, [], 5, None, {"state": {}, "param_groups": []}])
def test_no_tensors_is_said_by_inspect_and_an_error_where_weights_are_needed(tree: Any, saved: Saved, run: Run) -> None:
    path = saved(tree)
    code, out, err = run("inspect", path)
    assert (code, err) == (0, "")
    assert "the top: no tensors" in out or "model: no tensors" in out
    assert ckptool.inspect(path).tensors == []
    code, out, err = run("diff", path, path, "--json")
    assert (code, json.loads(out)["error"]["kind"]) == (2, "no-tensors")
    assert err.startswith(f"ckptool: error: {path}: no tensors at ")
    with pytest.raises(NoTensorsError):
        ckptool.diff(path, path)


def test_no_tensors_at_the_root_asked_for_says_where_there_are_some(saved: Saved, run: Run) -> None:
    path = saved({"model": {"w": torch.zeros(1)}, "extra": {"x": 1}})
    code, _, err = run("inspect", path, "--root", "extra")
    assert code == 2
    assert err == f"ckptool: error: {path}: no tensors at extra; there are some at model\n"


# --- names are data --------------------------------------------------------------------------------------------------

NAMES = {
    "\x1b[31mred\x1b[0m": r"\x1b[31mred\x1b[0m",
    "bell\x07": r"bell\x07",
    "two\nlines": r"two\nlines",
    "return\rover": r"return\rover",
    "c1\x9b31m": r"c1\x9b31m",
    "\u202ertl": r"\u202ertl",
    "zero\u200bwidth": r"zero\u200bwidth",
    "lone\ud800": r"lone\ud800",
    "[bold]markup[/bold]": "[bold]markup[/bold]",
    "größe.重み": "größe.重み",
}


def test_names_that_would_act_on_a_terminal_are_shown_escaped(saved: Saved, run: Run) -> None:
    path = saved({name: torch.zeros(1) for name in NAMES})
    assert run("inspect", path, "--keys")[1].splitlines() == list(NAMES.values())
    for options in ([], ["--flat"], ["--sort", "key"], ["--depth", "2"]):
        out = run("inspect", path, *options)[1]
        assert all(shown in out for shown in NAMES.values()), options
        assert all(char.isprintable() or char == "\n" for char in out), options


def test_names_are_exact_in_json(saved: Saved, run: Run) -> None:
    path = saved({name: torch.zeros(1) for name in NAMES})
    out = run("inspect", path, "--json")[1]
    assert [row["key"] for row in result_of(out)[0]["tensors"]] == list(NAMES)
    assert out.isascii()


@pytest.mark.parametrize("command", ["diff", "filter"])
def test_names_are_escaped_by_the_other_commands_too(command: str, saved: Saved, run: Run) -> None:
    bad, plain = saved({name: torch.zeros(1) for name in NAMES}, "bad.pth"), saved({"w": torch.zeros(1)}, "plain.pth")
    options = ["--match", plain, bad, "--dry-run", "--all"] if command == "filter" else [plain, bad]
    code, out, _ = run(command, *options)
    assert code == 1
    assert all(shown in out for shown in NAMES.values())
    assert all(char.isprintable() or char == "\n" for char in out)


def test_values_and_paths_beside_the_weights_are_escaped_too(saved: Saved, run: Run) -> None:
    path = saved({"model": {"w": torch.zeros(1)}, "no\x1b[2Jte": "te\x1b[2Jxt\n"}, "na\x1b[1mme.pth")
    out = run("inspect", path)[1]
    assert all(char.isprintable() or char == "\n" for char in out)
    err = run("inspect", path, "--root", "x\x1b[1m")[2]
    assert err.count("\n") == 1
    assert "\x1b" not in err


def test_two_thousand_keys_are_all_listed_when_piped(saved: Saved, run: Run) -> None:
    names = [f"{'abcdefghijklmnopqrst'[i % 20]}.{'lmnopqrst'[i // 625]}.{i % 625:04}" for i in range(2000)]
    shared = torch.zeros(2000)
    path = saved({name: shared[i] for i, name in enumerate(names)})
    assert run("inspect", path, "--keys")[1].splitlines() == names
    for options in ([], ["--flat"], ["--sort", "key"]):
        out = run("inspect", path, *options)[1]
        names = sorted(names) if "--sort" in options else names
        assert [line.split()[0] for line in out[out.index("\n\n") :].splitlines() if line] == names
    assert len(result_of(run("inspect", path, "--json")[1])[0]["tensors"]) == 2000


def test_a_name_of_ten_thousand_characters_is_not_cut(saved: Saved, run: Run) -> None:
    name = "x" * 10_000
    assert name in run("inspect", saved({name: torch.zeros(1)}))[1]


def test_a_repacked_archive_reads_the_same(tmp_path: Path, run: Run) -> None:
    with zipfile.ZipFile(FIXTURES / "tied.pth") as archive, zipfile.ZipFile(tmp_path / "z.pth", "w") as packed:
        for item in archive.infolist():
            packed.writestr(item.filename, archive.read(item), zipfile.ZIP_DEFLATED)
    one, other = (run("inspect", path, "--flat")[1].splitlines()[1:] for path in (FIXTURES / "tied.pth", "z.pth"))
    assert one == other
