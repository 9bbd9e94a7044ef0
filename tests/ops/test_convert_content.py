"""`convert`: what stays, what is left out and what is refused; publishing; device tags."""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from converting import assert_same_state
from everything import NOT_IN_SAFETENSORS
from oracles import FIXTURES, Run, Saved, assert_identical, bits, load, torch_load
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import ckptool
from ckptool.errors import LossError, UsageError

NESTED = FIXTURES / "resnet_nested.pth"


@pytest.fixture
def refused(refused: Callable[..., str]) -> Callable[..., str]:
    """Runs a `convert` that must fail with one line and leave the directory as it is; returns the line."""
    return partial(refused, "convert")


# --- what stays and what is left out ---------------------------------------------------------------------------------


def test_to_safetensors_only_the_weights_go_and_the_rest_is_named(run: Run) -> None:
    code, out, err = run("convert", NESTED, "-o", "out.safetensors")
    assert (code, err) == (0, "")
    line = next(line for line in out.splitlines() if "left out" in line)
    assert all(name in line for name in ("epoch", "arch", "best_acc1", "optimizer", "scheduler", "args"))
    expected = torch_load(NESTED)["model"]
    found = load_file("out.safetensors")
    assert {key: bits(tensor) for key, tensor in found.items()} == {key: bits(t) for key, t in expected.items()}


def test_scalars_are_carried_into_the_metadata_when_named(run: Run, refused: Callable[..., str]) -> None:
    assert run("convert", NESTED, "-o", "out.safetensors", "--metadata", "epoch,arch,best_acc1")[0] == 0
    with safe_open("out.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "epoch": "41", "arch": "resnet18", "best_acc1": "71.25"}
    assert "nope" in refused(NESTED, "-o", "two.safetensors", "--metadata", "epoch,nope")
    for name in ("args", "optimizer", "model"):
        assert name in refused(NESTED, "-o", "two.safetensors", "--metadata", name)


def test_what_is_carried_is_not_said_to_be_left_out(convert: Callable[..., Any]) -> None:
    for extra in ([], ["--dry-run"], ["--publish"]):
        result = convert(NESTED, "-o", "out.safetensors", "--metadata", "epoch,arch", *extra)
        assert result["left_out"] == ["best_acc1", "optimizer", "scheduler", "args"]


def test_every_missing_scalar_is_named_at_once(refused: Callable[..., str]) -> None:
    err = refused(NESTED, "-o", "two.safetensors", "--metadata", "nope,epoch,args,neither")
    assert all(name in err for name in ("nope", "args", "neither"))
    assert "epoch" not in err


def test_metadata_reaches_the_shards_too(convert: Callable[..., Any]) -> None:
    convert(NESTED, "--to", "sharded", "-o", "out", "--metadata", "epoch", "--max-shard-size", "20KB")
    shards = sorted(Path("out").glob("*.safetensors"))
    assert len(shards) > 1
    with safe_open(shards[0], "pt") as file:
        assert file.metadata()["epoch"] == "41"


def test_metadata_that_reads_like_a_key_is_not_lost_and_not_a_tie(convert: Callable[..., Any], saved: Saved) -> None:
    path = saved({"arch": "w", "state_dict": {"w": torch.ones(2)}})
    convert(path, "-o", "out.safetensors", "--metadata", "arch")
    with safe_open("out.safetensors", "pt") as file:
        assert file.metadata().get("arch") == "w"
    assert list(ckptool.open("out.safetensors").state_dict()) == ["w"]


@pytest.mark.parametrize(
    "options",
    [["-o", "o.safetensors"], ["--to", "sharded", "-o", "o"], ["--to", "sharded", "-o", "o", "--max-shard-size", "8"]],
    ids=" ".join,
)
def test_metadata_that_reads_like_a_key_stays_a_text_however_often_it_is_rewritten(
    options: list[str], convert: Callable[..., Any], saved: Saved
) -> None:
    w = torch.ones(2)
    path = saved({"arch": "w", "twin": "b", "state_dict": {"w": w, "b": torch.zeros(2), "tied": w}})
    convert(path, *options, "--metadata", "arch,twin")
    for again in ("again.safetensors", "more.safetensors"):
        opened = ckptool.open(options[options.index("-o") + 1])
        assert list(opened.state_dict()) == ["w", "b", "tied"]
        assert (opened.metadata["arch"], opened.metadata["twin"]) == ("w", "b")
        convert(opened.url, "-o", again)
        options = ["-o", again]
    convert("more.safetensors", "-o", "back.pth")
    assert_same_state(load("back.pth"), load(path)["state_dict"])


def test_a_tie_that_was_dropped_leaves_no_record_behind() -> None:
    save_file({"emb.weight": torch.ones(2)}, "in.safetensors", {"head.weight": "emb.weight", "author": "someone"})
    opened = ckptool.open("in.safetensors")
    assert list(opened.state_dict()) == ["emb.weight", "head.weight"]
    ckptool.save(opened.with_state_dict({"emb.weight": opened.state_dict()["emb.weight"]}), "out.safetensors")
    with safe_open("out.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "author": "someone"}
    ckptool.save(opened.with_state_dict({"head.weight": opened.state_dict()["head.weight"]}), "head.safetensors")
    with safe_open("head.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "author": "someone"}


@pytest.mark.parametrize("text", ["", "x", "{}", "[1, null]", "[" * 100_000, '["other"]'])
def test_a_word_on_what_is_no_tie_that_makes_no_sense_is_no_harm(text: str) -> None:
    save_file({"emb.weight": torch.ones(2)}, "in.safetensors", {"head.weight": "emb.weight", "ckptool.no_alias": text})
    assert list(ckptool.open("in.safetensors").state_dict()) == ["emb.weight", "head.weight"]


def test_words_that_mean_something_in_safetensors_are_no_scalars_to_carry(
    refused: Callable[..., str], saved: Saved
) -> None:
    path = saved({"format": "mine", "total_size": 3, "state_dict": {"w": torch.ones(2)}})
    err = refused(path, "-o", "o.safetensors", "--metadata", "format,total_size")
    assert "format" in err
    assert "total_size" in err


def test_metadata_that_cannot_be_carried_is_refused_where_the_format_has_no_place(
    refused: Callable[..., str],
) -> None:
    assert "metadata" in refused(NESTED, "-o", "out.npz", "--metadata", "epoch")


def test_root_picks_what_is_converted(convert: Callable[..., Any]) -> None:
    ema = torch_load(FIXTURES / "ema.pth")
    result = convert(FIXTURES / "ema.pth", "-o", "out.safetensors", "--root", "state_dict_ema")
    assert "state_dict" in result["left_out"]
    found = load_file("out.safetensors")
    assert {key: bits(t) for key, t in found.items()} == {key: bits(t) for key, t in ema["state_dict_ema"].items()}
    convert(FIXTURES / "ema.pth", "-o", "main.safetensors")
    main_weights = load_file("main.safetensors")
    assert {key: bits(t) for key, t in main_weights.items()} == {key: bits(t) for key, t in ema["state_dict"].items()}


def test_a_root_below_several_steps_is_found(convert: Callable[..., Any], saved: Saved) -> None:
    path = saved({"runs": [{"net": {"w": torch.ones(2)}}, {"net": {"w": torch.zeros(2)}}]})
    convert(path, "-o", "out.safetensors", "--root", "runs/1/net")
    assert load_file("out.safetensors")["w"].tolist() == [0.0, 0.0]


# --- publish ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("output", ["best.pth", "best.safetensors", "best.pth.tar", "sub/best.v2.pt"])
def test_publish_writes_the_weights_with_their_digest_in_the_name(output: str, convert: Callable[..., Any]) -> None:
    Path("sub").mkdir()
    result = convert(NESTED, "-o", output, "--publish")
    path = Path(result["output"])
    suffix = ".pth.tar" if output.endswith(".pth.tar") else Path(output).suffix
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert str(path) == f"{output.removesuffix(suffix)}-{digest[:8]}{suffix}"
    assert set(result["left_out"]) == {"epoch", "arch", "best_acc1", "optimizer", "scheduler", "args"}
    assert not Path(output).exists()
    found = load_file(path) if suffix == ".safetensors" else load(path)
    expected = torch_load(NESTED)["model"]
    assert {key: bits(t) for key, t in found.items()} == {key: bits(t) for key, t in expected.items()}


def test_torchvisions_loader_takes_what_was_published(convert: Callable[..., Any], monkeypatch: Any) -> None:
    path = Path(convert(NESTED, "-o", "resnet18.pth", "--publish")["output"])
    from torch.hub import HASH_REGEX, load_state_dict_from_url

    assert HASH_REGEX.search(path.name)
    found = load_state_dict_from_url(path.absolute().as_uri(), "hub", progress=False, check_hash=True)
    assert_same_state(found, torch_load(NESTED)["model"])


def test_publish_leaves_out_averages_and_keeps_module_versions(convert: Callable[..., Any]) -> None:
    result = convert(FIXTURES / "ema.pth", "-o", "out.pth", "--publish")
    assert {"state_dict_ema", "optimizer", "epoch"} <= set(result["left_out"])
    found, expected = load(result["output"]), torch_load(FIXTURES / "ema.pth")["state_dict"]
    assert_identical(found, expected)
    assert found._metadata == expected._metadata


def test_a_whole_model_is_published_as_plain_tensors(convert: Callable[..., Any]) -> None:
    found = load(convert(FIXTURES / "resnet_module.pth", "-o", "out.pth", "--publish")["output"])
    assert len(found) == 122
    assert {(type(tensor), tensor.requires_grad) for tensor in found.values()} == {(torch.Tensor, False)}


def test_publishing_twice_gives_the_same_name_and_does_not_overwrite(run: Run) -> None:
    assert run("convert", NESTED, "-o", "m.pth", "--publish")[0] == 0
    listing = os.listdir()
    code, _, err = run("convert", NESTED, "-o", "m.pth", "--publish")
    assert (code, "exists" in err, os.listdir()) == (2, True, listing)
    assert run("convert", NESTED, "-o", "m.pth", "--publish", "--force")[0] == 0
    assert os.listdir() == listing


def test_shards_that_are_published_have_no_digest_and_it_is_said(run: Run) -> None:
    code, out, err = run("convert", NESTED, "--to", "sharded", "-o", "out", "--publish")
    assert (code, err) == (0, "")
    assert "no digest" in out
    assert sorted(os.listdir("out")) == ["model.safetensors"]
    document = json.loads(run("convert", NESTED, "--to", "sharded", "-o", "two", "--publish", "--json")[1])
    assert any("no digest" in note for note in document["notes"])
    assert document["result"][0]["left_out"] == ["epoch", "arch", "best_acc1", "optimizer", "scheduler", "args"]


def test_what_is_published_may_lie_beside_its_input(convert: Callable[..., Any], saved: Saved, run: Run) -> None:
    path = saved({"state_dict": {"w": torch.ones(3)}, "epoch": 3})
    before = path.read_bytes()
    code, _, err = run("convert", path, "--to", "torch", "--publish")
    assert (code, err) == (0, "")
    digest = hashlib.sha256(next(Path().glob("saved-*.pth")).read_bytes()).hexdigest()
    assert sorted(os.listdir()) == [f"saved-{digest[:8]}.pth", "saved.pth"]
    assert path.read_bytes() == before


def test_a_dry_run_of_publish_says_that_the_name_will_be_another(run: Run) -> None:
    code, out, _ = run("convert", NESTED, "-o", "out.pth", "--publish", "--dry-run")
    assert code == 0
    assert "sha256" in out
    assert os.listdir() == []


# --- devices ---------------------------------------------------------------------------------------------------------


def on_cuda(path: Path, name: str = "cuda.pth") -> Path:
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(name, "w") as new:
        for item in old.infolist():
            data = old.read(item)
            if item.filename.endswith("data.pkl"):
                data = data.replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:1")
            new.writestr(item.filename, data)
    return Path(name)


def tags(path: Path | str) -> set[bytes]:
    with zipfile.ZipFile(path) as archive:
        pickled = next(archive.read(name) for name in archive.namelist() if name.endswith("data.pkl"))
    return {tag for tag in (b"cpu", b"cuda:0", b"cuda:1") if tag in pickled}


@pytest.mark.parametrize(
    ("option", "expected"),
    [([], b"cuda:1"), (["--map-location", "cpu"], b"cpu"), (["--map-location", "cuda:1=cuda:0"], b"cuda:0"),
     (["--map-location", "cuda:0=cpu,cuda:1=cpu"], b"cpu"), (["--map-location", "cuda:5=cpu"], b"cuda:1")],
)  # fmt: skip
def test_device_tags_are_data_and_are_mapped_on_the_way_out(
    option: list[str], expected: bytes, convert: Callable[..., Any], saved: Saved
) -> None:
    source = on_cuda(saved({"w": torch.randn(3), "opt": {"m": torch.ones(2)}}))
    for extra in ([], ["--dtype", "bf16"]):
        convert(source, "-o", "out.pth", *option, *extra)
        assert tags("out.pth") == {expected}
    if expected == b"cpu":
        load("out.pth")


# --- what a format cannot hold ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NOT_IN_SAFETENSORS)
@pytest.mark.parametrize("options", [["-o", "o.safetensors"], ["--to", "sharded", "-o", "o"]], ids=" ".join)
def test_all_that_safetensors_cannot_hold_is_named_at_once(
    name: str, options: list[str], refused: Callable[..., str]
) -> None:
    err = refused(FIXTURES / name, *options)
    assert all(f"{key} (" in err for key in NOT_IN_SAFETENSORS[name])


def test_keys_that_are_no_text_are_refused_where_a_format_has_text_only(
    refused: Callable[..., str], convert: Callable[..., Any], saved: Saved
) -> None:
    path = saved({0: torch.ones(2), 1: torch.zeros(2), "1.w": torch.ones(1)})
    convert(path, "-o", "out.pth")
    assert list(load("out.pth")) == [0, 1, "1.w"]
    for output in ("o.safetensors", "o.npz"):
        err = refused(path, "-o", output)
        assert "0" in err
        assert "1" in err


def test_the_library_raises_what_the_command_prints(saved: Saved) -> None:
    with pytest.raises(LossError, match="complex128"):
        ckptool.convert(FIXTURES / "dtypes.pth", "o.safetensors")
    with pytest.raises(UsageError, match="int8"):
        ckptool.convert(saved({"w": torch.ones(1)}), "o.pth", dtype="int8")
    assert os.listdir() == ["saved.pth"]


def test_the_library_converts_and_reports(saved: Saved) -> None:
    path = saved({"w": torch.randn(3, 4).t()})
    report = ckptool.convert(path, "o.safetensors", dtype="bf16")
    assert (report.output, report.tensors, report.verified, report.cast) == ("o.safetensors", 1, True, ["w"])
    assert report.nbytes == os.path.getsize("o.safetensors")
    assert bits(load_file("o.safetensors")["w"]) == bits(load(path)["w"].bfloat16())
    opened = ckptool.open(path)
    assert ckptool.convert(opened, "o.pth").nbytes == os.path.getsize("o.pth")


def test_keys_that_are_no_text_are_verified(saved: Saved, run: Run) -> None:
    tree = {
        "w": torch.ones(2),
        b"by": {"w": torch.zeros(3)},
        (b"x", 1): torch.ones(1),
        2.5: torch.ones(4),
        None: [torch.ones(5)],
    }
    path = saved({"state_dict": {"a.w": torch.ones(2)}, "more": tree})
    assert run("convert", path, "-o", "out.pth")[0] == 0
    assert_identical(load("out.pth"), load(path))
