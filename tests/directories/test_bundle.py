"""Several checkpoints in one: zip archives with torch's files in them, pipelines of several models."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import Run, assert_same_tensors, tree_equal
from safetensors.torch import load_file
from safetensors.torch import save as in_safetensors
from torch import nn

import ckptool
from ckptool.errors import CkptoolError, FormatError, UnsupportedError


def torch_file(value: Any, *, legacy: bool = False) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, _use_new_zipfile_serialization=not legacy)
    return file.getvalue()


def zipped(members: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile("agent.zip", "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return Path("agent.zip")


def policy() -> dict[str, torch.Tensor]:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    return {**model.state_dict(), "view": torch.arange(12.0).reshape(3, 4).T, "half": torch.ones(2).bfloat16()}


def adam() -> dict[str, Any]:
    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.Adam([weight])
    weight.sum().backward()
    optimizer.step()
    return optimizer.state_dict()


def agent(**more: bytes) -> tuple[dict[str, Any], Path]:
    """What a zip archive of Stable-Baselines3 holds, and its path."""
    trees = {"policy.pth": policy(), "policy.optimizer.pth": adam(), "pytorch_variables.pth": {}}
    files = {name: torch_file(tree) for name, tree in trees.items()}
    return trees, zipped({"data": b'{"a": 1}' * 9, **files, **more, "_stable_baselines3_version": b"2.7.1"})


def test_an_agents_policy_is_read_and_all_that_lies_beside_it_is_named(run: Run) -> None:
    trees, path = agent()
    opened = ckptool.open(path)
    assert (opened.format, opened.root) == ("bundle", ("policy.pth",))
    assert_same_tensors(opened, trees["policy.pth"])
    tree_equal(opened.tree, trees)
    code, out, err = run("convert", path, "-o", "policy.safetensors", "--json")
    [result] = json.loads(out)["result"]
    assert (code, err) == (0, "")
    assert result["left_out"] == ["policy.optimizer.pth", "pytorch_variables.pth"]
    assert any("not read: data, _stable_baselines3_version" in note for note in json.loads(out)["notes"])
    written = load_file("policy.safetensors")
    assert all(torch.equal(written[key], value) for key, value in trees["policy.pth"].items())
    torch.save(trees["policy.pth"], "policy.pth")
    assert run("diff", path, "policy.pth", "--values")[0] == 0


def test_root_chooses_another_of_them(run: Run) -> None:
    trees, path = agent(**{"variables.pth": torch_file({"log_ent_coef": torch.ones(1)})})
    assert ckptool.open(path).root == ()
    assert list(ckptool.open(path, root="variables.pth").state_dict()) == ["log_ent_coef"]
    assert_same_tensors(ckptool.open(path, root="policy.pth"), trees["policy.pth"])
    code, _, err = run("remap", path, "--add-prefix", "net.", "-o", "x.pth")
    assert (code, "choose one with --root (policy.pth, variables.pth)" in err) == (2, True)
    assert run("convert", path, "--root", "policy.pth", "-o", "x.safetensors")[0] == 0
    assert load_file("x.safetensors").keys() == trees["policy.pth"].keys()


@pytest.mark.parametrize("form", ["legacy", "zip", "safetensors"])
@pytest.mark.parametrize("before", [0, 5, 64])
def test_the_only_one_is_read_as_it_is_in_every_format_of_torch(form: str, before: int, run: Run) -> None:
    weights = {"a.w": torch.arange(6.0).reshape(2, 3), "a.b": torch.ones(3).half()}
    made = in_safetensors(weights) if form == "safetensors" else torch_file(weights, legacy=form == "legacy")
    path = zipped({"notes.txt": b"x" * before, "weights/best": made})
    opened = ckptool.open(path)
    assert (opened.root, opened.trailing) == ((), "")
    assert_same_tensors(opened, weights)
    assert opened.notes[0] == "in it: weights/best"
    assert run("convert", path, "-o", "x.pth")[0] == 0
    assert torch.load("x.pth", weights_only=True).keys() == weights.keys()
    assert run("inspect", path, "--check")[0] == 0


def test_what_is_compressed_is_refused_with_the_command_that_extracts_it() -> None:
    path = zipped({"policy.pth": torch_file(policy())}, zipfile.ZIP_DEFLATED)
    with pytest.raises(UnsupportedError, match=r"`unzip FILE policy\.pth`"):
        ckptool.open(path)


def test_a_damaged_one_is_one_line_that_names_it_and_other_zips_are_only_named(run: Run) -> None:
    whole = torch_file(policy())
    path = zipped({"good.pth": whole, "bad.pth": whole[:-30]})
    with pytest.raises(FormatError, match=r"agent.zip: bad.pth: "):
        ckptool.open(path)
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w") as archive:
        archive.writestr("deep.pth", whole)
    path = zipped({"good.pth": whole, "more.zip": inner.getvalue(), "table.xlsx": b"PK\3\4" + bytes(99)})
    opened = ckptool.open(path)
    assert opened.state_dict().keys() == policy().keys()
    assert any("more.zip (a zip archive that holds deep.pth" in note and "table.xlsx" in note for note in opened.notes)
    for end in range(40, len(whole), 400):
        path = zipped({"bad.pth": whole[:end]})
        code, _, err = run("inspect", path)
        assert (code, err.count("\n")) == (2, 1)


def test_an_archive_in_an_archive_in_an_archive_costs_a_look() -> None:
    content = torch_file(policy())
    for _ in range(50):
        inner = io.BytesIO()
        with zipfile.ZipFile(inner, "w") as archive:
            archive.writestr("inner.zip", content)
        content = inner.getvalue()
    Path("x.zip").write_bytes(content)
    with pytest.raises(UnsupportedError, match=r"holds inner.zip: extract it first"):
        ckptool.open("x.zip")


# --- pipelines -------------------------------------------------------------------------------------------------------


def pipeline(**parts: dict[str, torch.Tensor]) -> Path:
    Path("pipe").mkdir()
    Path("pipe/model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    for name, weights in parts.items():
        Path("pipe", name).mkdir()
        stem = "model" if name == "text_encoder" else "diffusion_pytorch_model"
        Path("pipe", name, f"{stem}.safetensors").write_bytes(in_safetensors(weights, {"format": "pt"}))
    Path("pipe/scheduler").mkdir()
    Path("pipe/scheduler/scheduler_config.json").write_text("{}")
    return Path("pipe")


PARTS = {
    "unet": {"conv_in.weight": torch.ones(2, 3)}, "vae": {"decoder.w": torch.zeros(4)},
    "text_encoder": {"embed.weight": torch.full((5,), 2.0)},
}  # fmt: skip


def test_of_a_pipeline_each_model_is_below_its_name_and_root_chooses_one(run: Run) -> None:
    path = pipeline(**PARTS)
    opened = ckptool.open(path)
    assert {name: set(tree) for name, tree in opened.tree.items()} == {name: set(part) for name, part in PARTS.items()}
    assert dict(opened.metadata) == {"format": "pt"}
    assert "in it: text_encoder, unet, vae; --root chooses one" in opened.notes
    for name, weights in PARTS.items():
        assert_same_tensors(ckptool.open(path, root=name), weights)
        assert run("convert", path, "--root", name, "-o", f"{name}.safetensors")[0] == 0
        assert load_file(f"{name}.safetensors").keys() == weights.keys()
    code, out, _ = run("inspect", path)
    assert (code, "3 tensors" in out, "conv_in.weight" in out) == (0, True, True)


def test_root_names_a_directory_too_where_only_one_is_read(run: Run) -> None:
    path = pipeline(unet=PARTS["unet"])
    assert run("inspect", path, "--root", "unet")[0] == 0
    assert run("convert", path, "--root", "unet", "-o", "unet.safetensors")[0] == 0
    assert load_file("unet.safetensors").keys() == PARTS["unet"].keys()
    assert_same_tensors(ckptool.open(path, root="unet"), PARTS["unet"])
    for number in (5, 10):
        Path(f"run/checkpoint-{number}").mkdir(parents=True)
        weights = {"w": torch.full((2,), float(number))}
        Path(f"run/checkpoint-{number}/model.safetensors").write_bytes(in_safetensors(weights))
        assert_same_tensors(ckptool.open("run", root=f"checkpoint-{number}"), weights)
    code, _, err = run("inspect", path, "--root", "scheduler")
    assert (code, err.count("\n")) == (2, 1)
    code, _, err = run("inspect", path, "--root", "vae")
    assert (code, "no 'vae' at the top" in err) == (2, True)


def test_a_pipeline_of_one_model_is_that_model_and_a_broken_one_is_named() -> None:
    path = pipeline(unet=PARTS["unet"])
    assert_same_tensors(ckptool.open(path), PARTS["unet"])
    Path("pipe/vae").mkdir()
    Path("pipe/vae/diffusion_pytorch_model.safetensors").write_bytes(in_safetensors(PARTS["vae"])[:-3])
    with pytest.raises(CkptoolError, match=r"pipe/vae/diffusion_pytorch_model.safetensors: .* truncated"):
        ckptool.open(path)
    assert_same_tensors(ckptool.open(path / "unet"), PARTS["unet"])


def test_a_pipeline_inside_of_a_pipeline_is_none_of_its_models(run: Run) -> None:
    path = pipeline(unet=PARTS["unet"], vae=PARTS["vae"])
    (path / "unet" / "model_index.json").write_text("{}")
    assert_same_tensors(ckptool.open(path), PARTS["vae"])
    (path / "vae").rename(path / "unet" / "vae")
    assert run("inspect", path)[0] == 2
