"""DeepSpeed's checkpoints, written by fixtures/makers, against its zero_to_fp32 algorithm in plain torch."""

from __future__ import annotations

import enum
import hashlib
import os
import sys
import tracemalloc
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from everything import others, zero_to_fp32
from oracles import Run, assert_same_tensors
from partitioned import edit, frozen, groups, optim, said, written

import ckptool
from ckptool.io.files import Files
from ckptool.io.source import LocalFile
from ckptool.values.blocks import read_bytes


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
    given = [{"a": torch.rand(4000, 1250), "b": torch.rand(1_000_001)}]
    written(tmp_path / "d", stage, 3, groups=given, shared={"tied": "a"})
    opened = ckptool.open(tmp_path / "d")
    tracemalloc.start()
    ckptool.save(opened, tmp_path / "out.safetensors")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12_000_000
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
