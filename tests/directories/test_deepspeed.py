"""DeepSpeed's checkpoints, written by fixtures/make.py, against its zero_to_fp32 algorithm in plain torch."""

from __future__ import annotations

import enum
import hashlib
import os
import shutil
import sys
import tracemalloc
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import make
import pytest
import torch
from everything import others, zero_to_fp32
from oracles import Run, assert_same_tensors

import ckptool
from ckptool.core.checkpoint import Checkpoint
from ckptool.errors import CkptoolError, FormatError, IncompleteError, UnsupportedError
from ckptool.io.source import Files, LocalFile
from ckptool.values.blocks import read_bytes

SHARED = {"head.weight": "emb.weight"}


def groups() -> list[dict[str, torch.Tensor]]:
    """The weights of two groups of an optimizer: odd sizes, one element, and none."""
    torch.manual_seed(5)
    return [
        {"emb.weight": torch.randn(7, 3), "l.weight": torch.randn(5, 3), "none": torch.empty(0, 2)},
        {"one": torch.randn(1), "scalar": torch.randn(()), "l.bias": torch.randn(5)},
    ]


def frozen() -> dict[str, torch.Tensor]:
    torch.manual_seed(6)
    return {"frozen.weight": torch.randn(3, 5), "frozen.bias": torch.randn(2)}


def buffers() -> dict[str, torch.Tensor]:
    return {"bn.running_mean": torch.rand(3).half(), "bn.num_batches_tracked": torch.tensor(7)}


def written(directory: Path, stage: int = 2, world: int = 2, **options: Any) -> Path:
    given = {"frozen": frozen(), "buffers": buffers(), "shared": SHARED, "dtype": torch.bfloat16, **options}
    return make.zero(directory, given.pop("groups", groups()), stage=stage, world=world, **given)


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    """Changes what torch.save wrote into a file."""
    tree = torch.load(path, weights_only=False)
    tree = change(tree) or tree
    torch.save(tree, path)


def optim(place: Path, rank: int = 0) -> Path:
    return next(place.glob(f"*zero_pp_rank_{rank}_*optim_states.pt"))


def said(checkpoint: Checkpoint, *words: str) -> bool:
    return any(all(word in note for word in words) for note in checkpoint.notes)


# --- the weights -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2, 3, 4, 11])
@pytest.mark.parametrize(
    ("stage", "options"),
    [(1, {}), (2, {}), (3, {}), (2, {"padded": True}), (2, {"gaps": 5}), (3, {"frozen": {}, "shared": {}})],
    ids=str,
)
def test_the_weights_are_those_of_zero_to_fp32(stage: int, options: Any, world: int, tmp_path: Path) -> None:
    written(tmp_path / "d", stage, world, **options)
    found, expected = ckptool.open(tmp_path / "d"), zero_to_fp32(tmp_path / "d")
    assert found.format == "deepspeed"
    assert found.root == ("module",)
    assert_same_tensors(found, expected)
    for name, tensor in {**groups()[0], **groups()[1]}.items():
        assert torch.equal(found.to_torch()["module"][name], tensor), name
    ties = [["emb.weight", "head.weight"]] if options.get("shared") != {} else []
    assert [sorted(group) for group in found.shared()] == ties
    assert found.tree["global_steps"] == 3


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_keys_are_in_the_models_order(stage: int, tmp_path: Path) -> None:
    place = written(tmp_path / "d", stage)
    model = torch.load(next(iter(sorted(place.glob("*model_states.pt")))), weights_only=False)
    assert list(ckptool.open(place).state_dict()) == list(model["module"])


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_frozen_parameters_are_there_in_the_dtype_of_the_run_and_a_note_says_so(stage: int, tmp_path: Path) -> None:
    found = ckptool.open(written(tmp_path / "d", stage))
    assert torch.equal(found.to_torch()["module"]["frozen.weight"], frozen()["frozen.weight"].bfloat16())
    assert said(found, "bfloat16", "frozen.weight", "frozen.bias")
    assert not said(found, "l.weight")


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_frozen_parameters_that_were_excluded_are_not_there(stage: int, tmp_path: Path) -> None:
    place = written(tmp_path / "d", stage)

    def excluded(states: Any) -> None:
        for name in frozen():
            del states["module"][name]
        states["frozen_param_shapes"] = states["frozen_param_fragments"] = None

    for path in place.glob("*model_states.pt"):
        edit(path, excluded)
    found = ckptool.open(place)
    assert not frozen().keys() & found.state_dict().keys()
    assert_same_tensors(found, zero_to_fp32(tmp_path / "d"))


@pytest.mark.parametrize("stage", [1, 2])
def test_ties_are_found_where_an_older_version_recorded_none(stage: int, tmp_path: Path) -> None:
    place = written(tmp_path / "d", stage)
    expected = zero_to_fp32(tmp_path / "d")
    edit(place / "mp_rank_00_model_states.pt", lambda states: states.pop("shared_params") and None)
    found = ckptool.open(place)
    assert found.shared() == [["emb.weight", "head.weight"]]
    assert_same_tensors(found, expected)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_frozen_parameters_that_are_tied_stay_so(stage: int, tmp_path: Path) -> None:
    found = ckptool.open(written(tmp_path / "d", stage, shared={"again": "frozen.weight"}))
    assert [sorted(group) for group in found.shared()] == [["again", "frozen.weight"]]
    assert found.state_dict()["again"].dtype == "bfloat16"


def test_a_parameter_without_elements_is_no_ties_victim(tmp_path: Path) -> None:
    """Its address may be that of the parameter behind it: then DeepSpeed lists the two as one."""
    place = written(tmp_path / "d", shared={})
    wrong = {"one": "none", "l.weight": "emb.weight"}
    edit(place / "mp_rank_00_model_states.pt", lambda states: states.update(shared_params=wrong))
    found = ckptool.open(place)
    assert not found.shared()
    tensors = found.to_torch()["module"]
    assert torch.equal(tensors["one"], groups()[1]["one"])
    assert torch.equal(tensors["l.weight"], groups()[0]["l.weight"])


@pytest.mark.parametrize("shared", [{"one": ["emb.weight"]}, {"new": {}}, {1: "one"}, [], None, {"one": None}], ids=str)
def test_a_list_of_ties_that_is_none_says_nothing(shared: Any, tmp_path: Path) -> None:
    place = written(tmp_path / "d", shared={})
    expected = zero_to_fp32(tmp_path / "d")
    edit(place / "mp_rank_00_model_states.pt", lambda states: states.update(shared_params=shared))
    assert_same_tensors(ckptool.open(place), expected)


def test_a_placeholder_without_values_anywhere_is_named(tmp_path: Path) -> None:
    place = written(tmp_path / "d", 3)
    for path in place.glob("*model_states.pt"):
        edit(path, lambda states: states["module"].update(lost=torch.empty(0)))
    found = ckptool.open(place)
    assert "lost" not in found.state_dict()
    assert said(found, "placeholders", "lost")


def test_narrow_buffers_are_widened_and_others_are_not(tmp_path: Path) -> None:
    given = {"half": torch.ones(2).half(), "double": torch.full((2,), 1 / 3).double(), "int": torch.tensor([5])}
    found = ckptool.open(written(tmp_path / "d", 1, buffers=given)).to_torch()["module"]
    assert [found[name].dtype for name in given] == [torch.float32, torch.float64, torch.int64]
    assert torch.equal(found["double"], given["double"])


def test_weights_in_another_dtype_than_fp32_keep_it(tmp_path: Path) -> None:
    given = [{name: tensor.bfloat16() for name, tensor in group.items()} for group in groups()]
    place = written(tmp_path / "d", 3, groups=given)
    found = ckptool.open(place)
    assert found.state_dict()["l.weight"].dtype == "bfloat16"
    assert_same_tensors(found, zero_to_fp32(tmp_path / "d"))


def stage_of_the_library(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Returns a value of an enumeration that pickles as DeepSpeed's own of the stages."""
    module = types.ModuleType("deepspeed.runtime.zero.config")
    made: Any = enum.IntEnum("ZeroStageEnum", {"gradients": 2}, module=module.__name__)
    monkeypatch.setattr(module, "ZeroStageEnum", made, raising=False)
    for name in ("deepspeed", "deepspeed.runtime", "deepspeed.runtime.zero", module.__name__):
        monkeypatch.setitem(sys.modules, name, module)
    return made.gradients


def test_objects_of_deepspeeds_classes_are_no_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = written(tmp_path / "d", stage_value=stage_of_the_library(monkeypatch))
    found = ckptool.open(place)
    assert ("deepspeed.runtime.zero.config", "ZeroStageEnum") in found.names
    assert_same_tensors(found, zero_to_fp32(tmp_path / "d"))
    report = ckptool.inspect(place, check=True).check
    assert report is not None
    assert not report.findings


def test_bf16_optimizers_without_a_stage_are_read(tmp_path: Path) -> None:
    place = written(tmp_path / "d", 1, padded=True, optims="bf16_zero_pp_rank_{}_mp_rank_00_optim_states.pt")
    for rank in range(2):
        edit(optim(place, rank), lambda states: states["optimizer_state_dict"].pop("zero_stage") and None)
    assert_same_tensors(ckptool.open(place), zero_to_fp32(tmp_path / "d"))


def test_bf16_masters_without_shapes_leave_the_module_as_it_is(tmp_path: Path) -> None:
    place = written(tmp_path / "d", 1)
    edit(place / "mp_rank_00_model_states.pt", lambda states: states.update(param_shapes=None))
    found = ckptool.open(place)
    assert found.state_dict()["l.weight"].dtype == "bfloat16"
    assert said(found, "param_shapes")


def test_without_zero_the_module_and_all_beside_are_as_they_are(tmp_path: Path) -> None:
    place = written(tmp_path / "d", 2)
    for rank in range(2):
        optim(place, rank).unlink()
    model, state = torch.nn.Linear(2, 2), {"epoch": 3}
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    saved = {"module": model.state_dict(), "buffer_names": [], "optimizer": optimizer.state_dict(),
             "param_shapes": None, "model": {"w": torch.ones(1)}, **state}  # fmt: skip
    torch.save(saved, place / "mp_rank_00_model_states.pt")
    found = ckptool.open(tmp_path / "d")
    assert_same_tensors(found, dict(model.state_dict()))
    assert found.tree["epoch"] == 3
    assert list(found.tree["optimizer"]["state"]) == [0, 1]


# --- which directory -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tag", ["global_step10", "best", "step-3", "epoch=1 (last)", "pytorch_model", "checkpoint"])
def test_the_directory_above_a_save_and_the_save_itself_are_read(tag: str, tmp_path: Path) -> None:
    place = written(tmp_path / "d", tag=tag)
    expected = zero_to_fp32(tmp_path / "d")
    for path in (tmp_path / "d", place, f"{place}/", os.path.relpath(place)):
        assert_same_tensors(ckptool.open(path), expected)
    (tmp_path / "d" / "latest").unlink()
    assert_same_tensors(ckptool.open(place), expected)


def test_latest_is_taken_and_other_saves_are_named(tmp_path: Path) -> None:
    old = written(tmp_path / "d", tag="global_step2", groups=[{"w": torch.zeros(2)}], shared={})
    written(tmp_path / "d", tag="global_step10", groups=[{"w": torch.ones(2)}], shared={})
    found = ckptool.open(tmp_path / "d")
    assert found.to_torch()["module"]["w"].sum() == 2
    assert said(found, "latest", "global_step10", "global_step2")
    assert ckptool.open(old).to_torch()["module"]["w"].sum() == 0
    (tmp_path / "d" / "latest").unlink()
    with pytest.raises(UnsupportedError, match="global_step2, global_step10"):
        ckptool.open(tmp_path / "d")
    shutil.rmtree(old)
    assert said(ckptool.open(tmp_path / "d"), "no file latest", "global_step10")
    os.rename(tmp_path / "d" / "global_step10", tmp_path / "d" / "latest")
    assert ckptool.open(tmp_path / "d").to_torch()["module"]["w"].sum() == 2


@pytest.mark.parametrize("text", ["global_step9", "empty", "x" * 255, "\ud800".encode("utf-8", "surrogatepass")])
def test_latest_that_names_nothing_is_incomplete(text: str | bytes, tmp_path: Path) -> None:
    written(tmp_path / "d")
    (tmp_path / "d" / "empty").mkdir()
    (tmp_path / "d" / "latest").write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(IncompleteError, match=r"latest.*global_step3"):
        ckptool.open(tmp_path / "d")


@pytest.mark.parametrize("text", ["", "x" * 256, "é" * 200, "x" * 2000, "..", "../x", "/etc", "a/b", "a\0b", "."])
def test_latest_that_names_a_directory_elsewhere_is_refused(text: str, tmp_path: Path) -> None:
    written(tmp_path / "d")
    (tmp_path / "d" / "latest").write_text(text)
    with pytest.raises(FormatError, match="latest"):
        ckptool.open(tmp_path / "d")


def test_latest_that_names_a_file_says_so(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(1)}, tmp_path / "best.pth")
    (tmp_path / "latest").write_text("best.pth")
    with pytest.raises(UnsupportedError, match=r"name best\.pth"):
        ckptool.open(tmp_path)


@pytest.mark.parametrize(("stage", "word"), [(2, "dtype"), (3, "placeholders")])
def test_a_file_of_it_alone_is_a_torch_file_and_tells_of_the_directory(stage: int, word: str, tmp_path: Path) -> None:
    place = written(tmp_path / "d", stage)
    path = next(iter(sorted(place.glob("*model_states.pt"))))
    found = ckptool.open(path)
    assert (found.format, found.root) == ("torch-zip", ("module",))
    assert said(found, word, "directory")
    assert ckptool.open(optim(place)).format == "torch-zip"


def test_what_a_loader_takes_comes_first_and_the_save_is_named(tmp_path: Path) -> None:
    written(tmp_path / "d")
    ckptool.save(Checkpoint({"w": ckptool.open(tmp_path / "d").state_dict()["one"]}), tmp_path / "d/model.safetensors")
    found = ckptool.open(tmp_path / "d")
    assert found.format == "safetensors"
    assert said(found, "DeepSpeed", "global_step3")


# --- what is missing or does not fit ---------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_missing_part_is_named(rank: int, stage: int, tmp_path: Path) -> None:
    place = written(tmp_path / "d", stage, 3)
    gone = optim(place, rank)
    gone.unlink()
    with pytest.raises(IncompleteError, match=gone.name.replace(".", r"\.")) as caught:
        ckptool.open(tmp_path / "d")
    assert str(place) in str(caught.value)


@pytest.mark.parametrize(
    ("stage", "name"),
    [
        (1, "mp_rank_00_model_states.pt"),
        (2, "mp_rank_00_model_states.pt"),
        (3, "zero_pp_rank_0_mp_rank_00_model_states.pt"),
        (3, "zero_pp_rank_1_mp_rank_00_model_states.pt"),
    ],
)
def test_missing_model_states_are_named(stage: int, name: str, tmp_path: Path) -> None:
    place = written(tmp_path / "d", stage)
    (place / name).unlink()
    with pytest.raises(IncompleteError, match=name.replace(".", r"\.")):
        ckptool.open(place)


@pytest.mark.parametrize("stage", [2, 3])
def test_without_any_part_it_is_incomplete_and_says_what_is_left(stage: int, tmp_path: Path) -> None:
    place = written(tmp_path / "d", stage)
    for path in place.glob("*optim_states.pt"):
        path.unlink()
    with pytest.raises(IncompleteError, match=r"_optim_states\.pt") as caught:
        ckptool.open(place)
    assert ("mp_rank_00_model_states.pt alone" in str(caught.value)) == (stage == 2)


def test_parts_of_more_processes_are_refused(tmp_path: Path) -> None:
    place = written(tmp_path / "d")
    shutil.copy(optim(place, 1), place / "zero_pp_rank_2_mp_rank_00_optim_states.pt")
    with pytest.raises(FormatError, match="zero_pp_rank_2"):
        ckptool.open(place)
    os.rename(place / "zero_pp_rank_2_mp_rank_00_optim_states.pt", place / f"bf16_{optim(place, 1).name}")
    with pytest.raises(FormatError, match="of one process"):
        ckptool.open(place)


def shorter(states: Any) -> None:
    key = (
        "fp32_flat_groups"
        if "fp32_flat_groups" in states["optimizer_state_dict"]
        else "single_partition_of_fp32_groups"
    )
    parts = states["optimizer_state_dict"][key]
    parts[0] = parts[0][:-1].clone()


def fewer(states: Any) -> None:
    for key in ("fp32_flat_groups", "single_partition_of_fp32_groups"):
        states["optimizer_state_dict"].get(key, [0]).pop()


def no_tensor(states: Any) -> None:
    for key in ("fp32_flat_groups", "single_partition_of_fp32_groups"):
        states["optimizer_state_dict"].get(key, [0])[0] = "x"


def in_half(states: Any) -> None:
    for key in ("fp32_flat_groups", "single_partition_of_fp32_groups"):
        if key in states["optimizer_state_dict"]:
            states["optimizer_state_dict"][key] = [part.half() for part in states["optimizer_state_dict"][key]]


@pytest.mark.parametrize("change", [shorter, fewer, no_tensor, in_half, lambda states: [1], lambda states: {"x": 1}])
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_part_that_contradicts_the_shapes_is_refused(stage: int, rank: int, change: Any, tmp_path: Path) -> None:
    place = written(tmp_path / "d", stage)
    edit(optim(place, rank), change)
    with pytest.raises(CkptoolError) as caught:
        ckptool.open(place)
    assert "\n" not in str(caught.value)
    assert str(place) in str(caught.value)


@pytest.mark.parametrize(
    "shape", [(7, 4), (8, 3), (3, 7), (21,), (-7, -3), (1 << 40, 1 << 40), (2**70,), ("7", 3), (7.0, 3), None, 21]
)
@pytest.mark.parametrize("stage", [2, 3])
def test_shapes_that_contradict_the_parts_are_refused(stage: int, shape: Any, tmp_path: Path) -> None:
    place = written(tmp_path / "d", stage)
    for path in place.glob("*model_states.pt"):
        edit(path, lambda states: states["param_shapes"][0].update({"emb.weight": shape}))
    if stage == 3 and shape in ((3, 7), (21,)):  # nothing else in ZeRO-3 has the shape
        assert ckptool.open(place).state_dict()["emb.weight"].shape == shape
        return
    with pytest.raises(FormatError):
        ckptool.open(place)


@pytest.mark.parametrize("count", [10**15, "2", None, 2.0, True, -1, [2, "x"], [], [[2]]])
def test_numbers_of_processes_that_cannot_be_are_bounded(count: Any, tmp_path: Path) -> None:
    place = written(tmp_path / "d", 3)
    for rank in range(2):
        edit(optim(place, rank), lambda states: states["optimizer_state_dict"].update(partition_count=count))
    if count == 10**15:
        with pytest.raises(IncompleteError, match="zero_pp_rank_2_"):
            ckptool.open(place)
    else:
        ckptool.open(place)


def twice(states: Any) -> None:
    states["param_shapes"][1]["emb.weight"] = torch.Size([7, 3])


def odd_buffers(states: Any) -> None:
    states["buffer_names"] = [["bn.running_mean"]]


def a_group_less(states: Any) -> None:
    states["param_shapes"].pop()


def no_module(states: Any) -> None:
    del states["module"]


def frozen_nowhere(states: Any) -> None:
    states["frozen_param_fragments"] = {}


def frozen_of_another_shape(states: Any) -> None:
    del states["module"]["frozen.bias"]
    states["frozen_param_fragments"]["frozen.bias"] = torch.ones(3)


def another_shape_in_module(states: Any) -> None:
    states["module"]["l.weight"] = torch.ones(3, 5)


@pytest.mark.parametrize(
    "change",
    [
        twice,
        a_group_less,
        no_module,
        frozen_nowhere,
        frozen_of_another_shape,
        another_shape_in_module,
        lambda _: "text",
    ],
)
def test_model_states_that_contradict_themselves_are_refused(change: Any, tmp_path: Path) -> None:
    place = written(tmp_path / "d")
    edit(place / "mp_rank_00_model_states.pt", change)
    with pytest.raises(FormatError):
        ckptool.open(place)


def test_a_truncated_file_is_refused_by_its_name(tmp_path: Path) -> None:
    place = written(tmp_path / "d")
    for path in sorted(place.iterdir()):
        raw = path.read_bytes()
        for size in (0, len(raw) // 2, len(raw) - 1):
            path.write_bytes(raw[:size])
            with pytest.raises(FormatError, match=path.name.replace(".", r"\.")):
                ckptool.open(place)
        path.write_bytes(raw)


@pytest.mark.parametrize("what", ["link", "directory", "loop"])
def test_a_part_that_is_no_file_is_incomplete_and_named(what: str, tmp_path: Path) -> None:
    place = written(tmp_path / "d")
    gone = optim(place, 1)
    gone.unlink()
    if what == "directory":
        gone.mkdir()
    else:
        gone.symlink_to("nowhere" if what == "link" else ".")
    with pytest.raises(IncompleteError, match=gone.name):
        ckptool.open(place)


def test_weights_in_files_of_nvme_offload_are_refused(tmp_path: Path) -> None:
    place = written(tmp_path / "d", 3)
    (place / "offloaded_tensors").mkdir()
    with pytest.raises(UnsupportedError, match="NVMe"):
        ckptool.open(place)


def test_a_nested_module_has_its_weights_by_their_dotted_names(tmp_path: Path) -> None:
    place = written(tmp_path / "d", frozen={}, buffers={}, shared={})
    expected = zero_to_fp32(tmp_path / "d")

    def nested(states: Any) -> None:
        made: dict[str, Any] = {}
        for name, tensor in states["module"].items():
            *steps, last = name.split(".")
            inner = made
            for step in steps:
                inner = inner.setdefault(step, {})
            inner[last] = tensor
        states["module"] = made

    edit(place / "mp_rank_00_model_states.pt", nested)
    found = ckptool.open(place)
    assert found.state_dict().keys() == expected.keys()
    assert_same_tensors(found, {name: expected[name] for name in found.state_dict()})


class Canary:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("CKPTOOL_CANARY_EXECUTED",)


def test_a_hostile_pickle_runs_nothing_and_is_named(tmp_path: Path) -> None:
    place = written(tmp_path / "d", 3)
    tree = torch.load(optim(place, 1), weights_only=False)
    torch.save({**tree, "x": Canary()}, optim(place, 1))
    assert any(name == "mkdir" for _, name in ckptool.open(place).names)


# --- reading and writing ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [2, 3])
def test_the_headers_of_a_hundred_parts_are_read_without_their_data(
    stage: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path / "d", stage, 100, groups=[{"w": torch.zeros(3000, 1000)}], frozen={}, shared={})
    sizes: list[int] = []
    plain = LocalFile.read
    monkeypatch.setattr(LocalFile, "read", lambda self, at, n: sizes.append(n) or plain(self, at, n))
    found = ckptool.open(tmp_path / "d")
    assert found.state_dict()["w"].shape == (3000, 1000)
    assert sum(sizes) < 8_000_000  # of 12 MB of weights and as much of the optimizer's, mostly the ends of the files


@pytest.mark.parametrize("stage", [2, 3])
def test_converting_takes_the_memory_of_a_chunk(stage: int, tmp_path: Path) -> None:
    given = [{"a": torch.rand(4000, 2500), "b": torch.rand(2_000_001)}]
    written(tmp_path / "d", stage, 3, groups=given, shared={"tied": "a"})
    opened = ckptool.open(tmp_path / "d")
    tracemalloc.start()
    ckptool.save(opened, tmp_path / "out.safetensors")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16_000_000
    assert ckptool.diff(tmp_path / "d", tmp_path / "out.safetensors", values=True).same


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_every_command_takes_it(stage: int, run: Run, tmp_path: Path) -> None:
    written(tmp_path / "d", stage)
    code, out, _ = run("inspect", "d")
    assert (code, "deepspeed" in out, "tied: emb.weight = head.weight" in out, "exp_avg" in out) == (
        0,
        True,
        True,
        True,
    )
    assert run("convert", "d", "-o", "a.safetensors", "--verify")[0] == 0
    assert run("convert", "d", "-o", "b.pth", "--verify")[0] == 0
    for name in ("a.safetensors", "b.pth"):
        assert run("diff", "d", name, "--values")[0] == 0
    assert run("filter", "--match", "a.safetensors", "d", "-o", "c.pth", "--min-loaded", "1")[0] == 0
    assert run("remap", "d", "--add-prefix", "net.", "-o", "e.pth")[0] == 0
    assert run("load-partial", "d", "--into", "b.pth", "-o", "f.pth", "--strict")[0] == 0
    loaded = torch.load("b.pth", weights_only=True)
    assert loaded["module"]["emb.weight"].data_ptr() == loaded["module"]["head.weight"].data_ptr()
    assert loaded["param_shapes"] is None
    assert_same_tensors(ckptool.open("b.pth"), zero_to_fp32(tmp_path / "d"))
    assert not ckptool.open("b.pth").notes


@pytest.mark.parametrize("where", ["d", "d/global_step3"])
def test_what_is_saved_into_its_directory_leaves_its_files_alone(where: str, tmp_path: Path) -> None:
    written(tmp_path / "d")
    expected = zero_to_fp32(tmp_path / "d")
    before = {path: path.read_bytes() for path in (tmp_path / "d").rglob("*") if path.is_file()}
    ckptool.save(ckptool.open(tmp_path / where), f"{tmp_path / where}/", in_place=True)
    assert {path: path.read_bytes() for path in before} == before
    found = ckptool.open(tmp_path / where)
    assert found.format == "safetensors"
    assert found.state_dict().keys() == expected.keys()
    assert said(found, "DeepSpeed")


def test_all_weights_are_on_the_device_of_the_first_process(tmp_path: Path) -> None:
    place = written(tmp_path / "d", 3, frozen={}, buffers={})
    for rank in range(2):
        found = ckptool.open(optim(place, rank))
        ckptool.save(found, tmp_path / "x.pt", map_location=f"cuda:{rank}", force=True)
        os.replace(tmp_path / "x.pt", optim(place, rank))
    assert {tensor.location for tensor in ckptool.open(place).state_dict().values()} == {"cuda:0"}


# --- other ways to save ----------------------------------------------------------------------------------------------


def test_weights_split_over_tensor_parallel_ranks_are_refused(tmp_path: Path) -> None:
    place = written(tmp_path / "d")
    shutil.copy(place / "mp_rank_00_model_states.pt", place / "mp_rank_01_model_states.pt")
    with pytest.raises(UnsupportedError, match=r"2 model-parallel ranks.*ds_to_universal"):
        ckptool.open(place)
    (place / "mp_rank_01_model_states.pt").unlink()
    edit(place / "mp_rank_00_model_states.pt", lambda states: states.update(mp_world_size=4))
    with pytest.raises(UnsupportedError, match="4 model-parallel ranks"):
        ckptool.open(place)


def pipeline(directory: Path, stages: int = 2, zero: bool = False) -> dict[str, torch.Tensor]:
    """Writes three layers, the second without parameters; returns the weights, in fp32 if there are some with ZeRO."""
    directory.mkdir()
    torch.manual_seed(8)
    weights = {"0.weight": torch.randn(3, 2), "0.bias": torch.randn(3), "10.weight": torch.randn(2, 3)}
    for number in (0, 1, 10):
        layer = {key.partition(".")[2]: value for key, value in weights.items() if key.startswith(f"{number}.")}
        torch.save({key: value.bfloat16() if zero else value for key, value in layer.items()},
                   directory / f"layer_{number:02d}-model_states.pt")  # fmt: skip
    for stage in range(stages):
        mine = {key: value for key, value in weights.items() if key.startswith("10.") == bool(stage)}
        shapes = [{key: value.shape for key, value in mine.items()}] if zero else None
        states = {"module": None, "buffer_names": [], "optimizer": None if zero else {"state": {}, "param_groups": []},
                  "param_shapes": shapes, "shared_params": {}, "mp_world_size": stages, "global_steps": 4}  # fmt: skip
        torch.save(states, directory / f"mp_rank_{stage:02d}_model_states.pt")
        flat = torch.cat([value.flatten() for value in mine.values()])
        for rank in range(2 if zero else 0):
            held = {"single_partition_of_fp32_groups": [flat[rank * 5 : rank * 5 + 5].clone()], "partition_count": [2]}
            torch.save({"optimizer_state_dict": held},
                       directory / f"zero_pp_rank_{rank}_mp_rank_{stage:02d}_optim_states.pt")  # fmt: skip
    return weights


@pytest.mark.parametrize("zero", [False, True])
def test_the_layers_of_a_pipeline_are_one_model(zero: bool, tmp_path: Path) -> None:
    weights = pipeline(tmp_path / "d", zero=zero)
    found = ckptool.open(tmp_path / "d")
    assert_same_tensors(found, weights)
    assert said(found, "layer_02", "layer_09")
    assert said(found, "optimizer", "in 4 " if zero else "2 stages")
    assert found.tree["global_steps"] == 4


def test_tied_layers_of_a_pipeline_are_taken_from_their_files(tmp_path: Path) -> None:
    weights = pipeline(tmp_path / "d", zero=True)

    def tied(states: Any) -> None:
        states["param_shapes"] = [{"tied_modules.emb.weight": torch.Size([2, 3])}]

    edit(tmp_path / "d/mp_rank_01_model_states.pt", tied)
    found = ckptool.open(tmp_path / "d")
    assert torch.equal(found.to_torch()["module"]["10.weight"], weights["10.weight"].bfloat16())
    assert found.state_dict()["0.weight"].dtype == "float32"
    assert said(found, "tied_modules.emb.weight")


def test_a_pipelines_layers_in_several_pieces_are_refused(tmp_path: Path) -> None:
    pipeline(tmp_path / "d")
    for name in ("layer_00-model_states.pt", "layer_01-model_states.pt", "layer_10-model_states.pt"):
        os.rename(tmp_path / "d" / name, tmp_path / "d" / name.replace("-model", "-model_00-model"))
    assert len(ckptool.open(tmp_path / "d").state_dict()) == 3
    torch.save({"weight": torch.ones(1)}, tmp_path / "d/layer_00-model_01-model_states.pt")
    with pytest.raises(UnsupportedError, match="layer_00-model_01-model_states"):
        ckptool.open(tmp_path / "d")


def test_a_pipeline_without_its_layers_is_incomplete(tmp_path: Path) -> None:
    pipeline(tmp_path / "d", stages=1)
    for path in (tmp_path / "d").glob("layer*"):
        path.unlink()
    with pytest.raises(IncompleteError, match="layer_00"):
        ckptool.open(tmp_path / "d")


def experts(place: Path, key: str = "moe.deepspeed_moe.experts.deepspeed_experts.{}.weight") -> dict[str, torch.Tensor]:
    """Writes two experts of each of two layers; returns their weights."""
    made = {}
    for layer in range(2):
        for expert in range(2):
            name = f"{layer}.{key.format(expert)}"
            made[name] = torch.full((2, 2), float(10 * layer + expert))
            torch.save({name: made[name]}, place / f"layer_{layer}_expert_{expert}_mp_rank_00_model_states.pt")
    return made


def without_zero(place: Path) -> dict[str, torch.Tensor]:
    """Makes it a checkpoint without ZeRO; returns the weights."""
    for path in place.glob("*optim_states.pt"):
        path.unlink()
    edit(place / "mp_rank_00_model_states.pt", lambda states: states.update(param_shapes=None))
    return dict(torch.load(place / "mp_rank_00_model_states.pt", weights_only=False)["module"])


@pytest.mark.parametrize("counts", [None, [2, 2]])
def test_experts_are_joined_to_the_model(counts: Any, tmp_path: Path) -> None:
    place = written(tmp_path / "d")
    expected = without_zero(place) | experts(place)
    edit(place / "mp_rank_00_model_states.pt", lambda states: states.update(num_experts=counts))
    torch.save({"optimizer": {}}, place / "expp_rank_0_mp_rank_00_optim_states.pt")
    found = ckptool.open(tmp_path / "d")
    assert_same_tensors(found, expected)
    assert said(found, "not read", "expp_rank_0")


def test_experts_that_only_some_processes_train_are_taken_from_their_files(tmp_path: Path) -> None:
    more = {f"{layer}.moe.deepspeed_moe.experts.deepspeed_experts.0.weight": torch.ones(2, 2) for layer in range(2)}
    place = written(tmp_path / "d", groups=[*groups(), more])
    expected = zero_to_fp32(tmp_path / "d")

    def of_some(states: Any) -> None:
        states["optimizer_state_dict"]["partition_count"] = [2, 2, 1]
        states["optimizer_state_dict"]["single_partition_of_fp32_groups"][2] = torch.zeros(8)

    for rank in range(2):
        edit(optim(place, rank), of_some)
    nowhere = shutil.copytree(place, tmp_path / "nowhere")
    edit(nowhere / "mp_rank_00_model_states.pt", lambda states: [states["module"].pop(key) for key in more] and None)
    with pytest.raises(IncompleteError, match=r"deepspeed_experts\.0\.weight"):
        ckptool.open(nowhere)
    edit(place / "mp_rank_00_model_states.pt", lambda states: [states["module"].pop(key) for key in more] and None)
    dense = {key: value for key, value in expected.items() if key not in more}
    expected = {**dense, **experts(place)}
    found = ckptool.open(place)
    assert_same_tensors(found, expected)
    assert said(found, "dtype of the run, float32", "deepspeed_experts.1.weight")


@pytest.mark.parametrize("gone", [(0, 1), (1, 0), (1, 1)])
def test_a_missing_expert_is_named(gone: tuple[int, int], tmp_path: Path) -> None:
    place = written(tmp_path / "d")
    without_zero(place)
    experts(place)
    edit(place / "mp_rank_00_model_states.pt", lambda states: states.update(num_experts=[2, 2]))
    name = f"layer_{gone[0]}_expert_{gone[1]}_mp_rank_00_model_states.pt"
    (place / name).unlink()
    with pytest.raises(IncompleteError, match=name.replace(".", r"\.")):
        ckptool.open(place)


@pytest.mark.parametrize(
    "key",
    ["experts.{}.weight", "moe.experts.deepspeed_experts.7.weight", "moe.deepspeed_experts.1{}.weight", "weight"],
)
def test_experts_whose_names_leave_a_doubt_are_refused(key: str, tmp_path: Path) -> None:
    place = written(tmp_path / "d")
    without_zero(place)
    experts(place, key)
    with pytest.raises(UnsupportedError, match="no weight of expert 0 by its name"):
        ckptool.open(place)


def test_experts_of_autoep_and_of_other_ranks_are_refused(tmp_path: Path) -> None:
    place = written(tmp_path / "d")
    experts(place)
    edit(place / "mp_rank_00_model_states.pt", lambda states: states.update(ds_autoep_layers=[{}]))
    with pytest.raises(UnsupportedError, match="AutoEP"):
        ckptool.open(place)
    torch.save({}, place / "layer_0_expert_0_mp_rank_01_model_states.pt")
    with pytest.raises(UnsupportedError, match="layer_0_expert_0_mp_rank_01"):
        ckptool.open(place)


def universal(source: Path, target: Path, stage: int) -> None:
    """Writes what ds_to_universal.py makes of a checkpoint: of ZeRO-3 flat tensors, and nothing that is not trained."""
    module = zero_to_fp32(source.parent)
    for path in source.glob("*model_states.pt"):
        target.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    trained = {**groups()[0], **groups()[1]}
    for name, tensor in module.items() if stage < 3 else trained.items():
        place = target / "zero" / name
        place.mkdir(parents=True)
        value = tensor.float() * (0.5 if name == "head.weight" else 1)
        content = {"param": value, "cat_dim": 0} if name in trained else {"param": value}
        torch.save(tensor.flatten() if stage == 3 else content, place / "fp32.pt")
        torch.save(tensor * 0, place / "exp_avg.pt")
    torch.save({"param_groups": []}, target / "zero" / "optimizer_state.pt")
    (target.parent / "latest_universal").write_text(target.name)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_universal_checkpoints_are_read(stage: int, tmp_path: Path) -> None:
    source = written(tmp_path / "d", stage)
    expected = zero_to_fp32(tmp_path / "d")
    universal(source, tmp_path / "u" / "global_step3_universal", stage)
    if stage < 3:
        expected = {name: tensor.float() for name, tensor in expected.items()}
        expected["head.weight"] = expected["head.weight"] * 0.5
    for path in (tmp_path / "u", tmp_path / "u" / "global_step3_universal"):
        found = ckptool.open(path)
        assert_same_tensors(found, expected)
        assert said(found, "exp_avg", "not read")
        assert said(found, "on their own", "head.weight") == (stage < 3)
        assert bool(found.shared()) == (stage == 3)


def test_universal_checkpoints_of_several_ranks_are_whole_already(tmp_path: Path) -> None:
    target = tmp_path / "u" / "global_step3_universal"
    universal(written(tmp_path / "d", 2), target, 2)

    def sliced(states: Any) -> None:
        states["module"]["l.weight"] = torch.ones(3, 3)
        states["param_shapes"][0]["l.weight"] = torch.Size([3, 3])

    edit(target / "mp_rank_00_model_states.pt", sliced)
    shutil.copy(target / "mp_rank_00_model_states.pt", target / "mp_rank_01_model_states.pt")
    assert torch.equal(ckptool.open(target).to_torch()["module"]["l.weight"], groups()[0]["l.weight"])


@pytest.mark.parametrize("stage", [2, 3])
def test_a_universal_checkpoint_with_a_weight_missing_is_incomplete(stage: int, tmp_path: Path) -> None:
    target = tmp_path / "u" / "global_step3_universal"
    universal(written(tmp_path / "d", stage), target, stage)
    (target / "zero" / "l.weight" / "fp32.pt").unlink()
    with pytest.raises(IncompleteError, match=r"zero/l\.weight/fp32\.pt"):
        ckptool.open(target)
    shutil.rmtree(target / "zero" / "l.weight")
    with pytest.raises(IncompleteError, match=r"zero/l\.weight/fp32\.pt"):
        ckptool.open(target)


@pytest.mark.parametrize("value", [torch.ones(4), {"param": torch.ones(3, 3)}, {"x": 1}, "text", None], ids=str)
def test_a_weight_of_a_universal_checkpoint_that_does_not_fit_is_refused(value: Any, tmp_path: Path) -> None:
    target = tmp_path / "u" / "global_step3_universal"
    universal(written(tmp_path / "d", 3), target, 3)
    torch.save(value, target / "zero" / "l.weight" / "fp32.pt")
    with pytest.raises(FormatError, match=r"l\.weight"):
        ckptool.open(target)


@pytest.mark.parametrize(("path", "sample"), others("deepspeed"))
def test_others_checkpoints_hold_what_the_library_reads_in_them(path: Path, sample: dict[str, Any]) -> None:
    found = ckptool.open(path).state_dict()
    lost = {*sample.get("missing_live_keys", ()), *sample.get("not_in_zero_folder", ())}
    assert found.keys() - lost == {want["key"] for want in sample["tensors"]} - lost
    shares: dict[int, set[int]] = {}
    with Files() as files:
        for want in sample["tensors"]:
            tensor = found[want["key"]]
            assert (tensor.dtype, list(tensor.shape or ())) == (want["dtype"], want["shape"])
            assert hashlib.sha256(read_bytes(tensor, files)).hexdigest() == want["sha256"]
            shares.setdefault(want["share"], set()).add(id(tensor.source))
    assert len(set().union(*shares.values())) == len(shares)
