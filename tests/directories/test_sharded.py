from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import FIXTURES, Run, assert_identical, assert_same_tensors, bits
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import ckptool
from ckptool import open as open_checkpoint
from ckptool import save
from ckptool.core.checkpoint import Checkpoint
from ckptool.directories import sharded
from ckptool.errors import (
    CkptoolError,
    FormatError,
    IncompleteError,
    LossError,
    OutputError,
    UnreadableError,
    UnsupportedError,
    UsageError,
)
from ckptool.formats import read
from ckptool.io.files import Files
from ckptool.io.output import LocalOutput
from ckptool.io.targets import SetOptions

INDEX = "model.safetensors.index.json"


@pytest.fixture
def made(tmp_path: Path) -> Callable[..., Path]:
    """A sharded directory of what each shard holds, and any index."""

    def make(
        shards: dict[str, dict[str, torch.Tensor]], weight_map: Any = None, metadata: Any = None, name: str = INDEX
    ) -> Path:
        directory = tmp_path / "made"
        directory.mkdir(exist_ok=True)
        for shard, tensors in shards.items():
            save_file(tensors, directory / shard)
        if weight_map is None:
            weight_map = {key: shard for shard, tensors in shards.items() for key in tensors}
        index = {"weight_map": weight_map} if metadata is None else {"metadata": metadata, "weight_map": weight_map}
        (directory / name).write_text(json.dumps(index))
        return directory

    return make


Made = Callable[..., Path]


def test_the_directory_and_its_index_are_one_checkpoint() -> None:
    one, other = read(str(FIXTURES / "sharded")), read(str(FIXTURES / "sharded" / INDEX))
    assert list(one.tree) == list(other.tree)
    assert one.problems == other.problems == ()


def test_all_shards_are_there_with_the_tie_that_only_the_index_knows() -> None:
    expected: dict[str, torch.Tensor] = {}
    for shard in sorted((FIXTURES / "sharded").glob("*.safetensors")):
        expected |= load_file(shard)
    expected["lm_head.weight"] = expected["model.embed.weight"]
    opened = open_checkpoint(FIXTURES / "sharded")
    assert sorted(opened.state_dict()) == sorted(expected)
    assert_same_tensors(opened, {key: expected[key] for key in opened.state_dict()})
    assert opened.shared() == [["model.embed.weight", "lm_head.weight"]]


def test_bin_shards_are_read_and_ties_inside_one_stay() -> None:
    opened = open_checkpoint(FIXTURES / "sharded_bin")
    assert opened.shared() == [["lm_head.weight", "model.embed.weight"]]
    assert opened.problems == ()
    assert ("collections", "OrderedDict") in opened.names


def test_the_size_of_all_files_is_counted() -> None:
    total = sum(path.stat().st_size for path in (FIXTURES / "sharded").iterdir() if path.name != "config.json")
    assert open_checkpoint(FIXTURES / "sharded").nbytes == total


def test_shards_follow_one_another_by_number(made: Made) -> None:
    shards = {f"model-{number}-of-12.safetensors": {f"t{number}": torch.ones(1)} for number in range(1, 13)}
    assert list(open_checkpoint(made(shards)).state_dict()) == [f"t{number}" for number in range(1, 13)]


def test_names_of_shards_need_not_have_numbers_alike(made: Made) -> None:
    shards = {
        name: {name: torch.ones(1)} for name in ("a1.safetensors", "1a.safetensors", "b.safetensors", "a.safetensors")
    }
    assert sorted(open_checkpoint(made(shards)).state_dict()) == sorted(shards)


def test_merged_into_one_file_it_is_the_same(tmp_path: Path) -> None:
    for name in ("out.pth", "out.safetensors"):
        save(open_checkpoint(FIXTURES / "sharded_bin"), tmp_path / name)
    expected: dict[str, torch.Tensor] = {}
    for shard in sorted((FIXTURES / "sharded_bin").glob("*.bin")):
        expected |= torch.load(shard)
    assert_identical(torch.load(tmp_path / "out.pth"), expected)


def test_an_index_of_absent_shards_alone_is_incomplete_and_names_them(run: Run, tmp_path: Path) -> None:
    index = tmp_path / INDEX
    index.write_text(json.dumps({"weight_map": {"w": "nope"}}))
    code, out, err = run("inspect", "--json", index)
    assert (code, json.loads(out)["error"]["kind"]) == (2, "incomplete")
    assert err == f"ckptool: error: {index}: missing shards: nope, and in them w\n"


def test_every_contradiction_is_said_and_only_looking_is_possible(tmp_path: Path) -> None:
    opened = open_checkpoint(FIXTURES / "sharded_broken")
    said = "\n".join(opened.problems)
    assert opened.broken
    for words in (
        "missing shards: model-00003-of-00003.safetensors", "model.norm.weight", "no shard: absent.weight",
        "the one that the index names: model.layers.0.k.weight (", "not in the index: not.in.index",
        "total_size says 12345",
    ):  # fmt: skip
        assert words in said
    assert set(opened.state_dict()) == set(
        load_file(FIXTURES / "sharded_broken/model-00001-of-00003.safetensors")
    ) | set(load_file(FIXTURES / "sharded_broken/model-00002-of-00003.safetensors"))
    with pytest.raises(IncompleteError, match=r"absent\.weight"):
        save(opened, tmp_path / "out.pth")
    with pytest.raises(IncompleteError):
        opened.to_torch()
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_size_or_an_extra_tensor_alone_is_said_and_harmless(made: Made, tmp_path: Path) -> None:
    tensors = {"a": torch.ones(2), "extra": torch.ones(1)}
    opened = open_checkpoint(made({"model-1.safetensors": tensors}, {"a": "model-1.safetensors"}, {"total_size": 1}))
    assert len(opened.problems) == 2
    assert not opened.broken
    save(opened, tmp_path / "out.pth")
    assert_identical(torch.load(tmp_path / "out.pth"), tensors)


@pytest.mark.parametrize("metadata", [None, {}, {"total_size": 12}, {"total_size": 12, "total_parameters": 3}])
def test_metadata_may_be_there_or_not(metadata: Any, made: Made) -> None:
    opened = open_checkpoint(made({"model-1.safetensors": {"a": torch.ones(3)}}, None, metadata))
    assert opened.problems == ()


def test_a_flat_index_is_understood(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "model-1.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"a": "model-1.safetensors"}))  # accelerate takes it too
    assert list(open_checkpoint(tmp_path).state_dict()) == ["a"]


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/etc/passwd", "sub/x.safetensors", "", "..", ".", "a\\..\\b/c", "x\0y"]
)
def test_an_index_cannot_name_files_elsewhere(name: str, made: Made) -> None:
    directory = made({}, {"a": name})
    save_file({"a": torch.ones(1)}, directory.parent / "outside.safetensors")
    with pytest.raises(CkptoolError):
        save(open_checkpoint(directory), directory.parent / "out.pth")  # a name no file can have is a missing shard


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", "null", '{"weight_map": []}', '{"weight_map": {"a": 1}}', '{"weight_map": {"a": null}}',
     '{"metadata": [1], "weight_map": {"a": "x"}}', '{"metadata": {"total_size": []}, "weight_map": {}}',
     "{" * 100_000],
)  # fmt: skip
def test_an_index_that_is_none_is_an_error_of_ours(text: str, tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(text)
    try:
        read(str(tmp_path / INDEX))
    except CkptoolError:
        return
    assert "total_size" in text  # only that one is an index with a problem


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / "sharded", tmp_path / "copy")
    shard = tmp_path / "copy" / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-3])
    with pytest.raises(FormatError, match="model-00002-of-00003"):
        read(str(tmp_path / "copy"))


@pytest.mark.parametrize("name", [INDEX, ".", "sub"])
def test_an_index_cannot_name_itself_or_a_directory(name: str, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    save_file({"a": torch.ones(1)}, tmp_path / "sub" / "model.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CkptoolError) as caught:
        save(open_checkpoint(tmp_path), tmp_path / "out.pth")
    assert "recursion" not in str(caught.value)


# --- which file of a directory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["model.safetensors", "pytorch_model.bin"], "model.safetensors"),
        (["pytorch_model.bin", "config.json"], "pytorch_model.bin"),
        (["only.pth", "readme.txt"], "only.pth"),
        (["adapter_model.safetensors", "adapter_config.json"], "adapter_model.safetensors"),
        (["diffusion_pytorch_model.safetensors"], "diffusion_pytorch_model.safetensors"),
    ],
)
def test_a_directory_is_read_by_the_file_that_hugging_face_would_take(
    names: list[str], found: str, tmp_path: Path
) -> None:
    for name in names:
        if name.endswith(".safetensors"):
            save_file({name: torch.ones(1)}, tmp_path / name)
        elif name.endswith((".bin", ".pth")):
            torch.save({name: torch.ones(1)}, tmp_path / name)
        else:
            (tmp_path / name).write_text("{}")
    assert list(open_checkpoint(tmp_path).state_dict()) == [found]


def test_safetensors_shards_come_before_bin_shards(tmp_path: Path) -> None:
    save_file({"st": torch.ones(1)}, tmp_path / "model-1.safetensors")
    torch.save({"bin": torch.ones(1)}, tmp_path / "pytorch_model-1.bin")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"st": "model-1.safetensors"}}))
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"bin": "pytorch_model-1.bin"}}))
    assert list(open_checkpoint(tmp_path).state_dict()) == ["st"]


def test_of_several_files_without_an_index_none_is_taken(tmp_path: Path) -> None:
    for name in ("a.pth", "b.pth"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(UnsupportedError, match="no index"):
        read(str(tmp_path))


def test_an_empty_directory_and_an_absent_one_say_so(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="directory"):
        read(str(tmp_path))
    with pytest.raises(UnreadableError, match="no such file"):
        read(str(tmp_path / "absent"))


def test_a_variant_of_diffusers_is_found_inside_its_pipeline(tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    (tmp_path / "model_index.json").write_text('{"_class_name": "Pipeline", "unet": ["diffusers", "UNet"]}')
    save_file({"w": torch.ones(2)}, tmp_path / "unet" / "diffusion_pytorch_model.fp16-00001-of-00001.safetensors")
    weight_map = {"w": "diffusion_pytorch_model.fp16-00001-of-00001.safetensors"}
    name = "diffusion_pytorch_model.safetensors.index.fp16.json"
    (tmp_path / "unet" / name).write_text(json.dumps({"metadata": {"total_size": 8}, "weight_map": weight_map}))
    opened = open_checkpoint(tmp_path)
    assert (list(opened.state_dict()), opened.problems) == (["w"], ())


# --- writing ---------------------------------------------------------------------------------------------------------


def write(checkpoint: Checkpoint, directory: Path, limit: int, compare: Any = None, **options: Any) -> tuple[str, ...]:
    with Files() as files:
        how = SetOptions("safetensors", limit, **options)
        return sharded.write(checkpoint, str(directory), files, None, read, how, compare=compare, progress=None)[0]


def digests(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir() if path.is_file()}


Saved = Callable[..., Path]


@pytest.fixture
def four(saved: Saved) -> Checkpoint:
    """Tensors of 40, 40, 400 and 8 bytes, the last tied to the first; an epoch beside them."""
    a = torch.arange(10.0)
    tensors = {"a": a, "b": torch.ones(10), "big": torch.arange(100.0), "c": torch.zeros(2), "head": a.detach()}
    return open_checkpoint(saved({"state_dict": tensors, "epoch": 3}))


def test_shards_are_filled_in_order_and_a_large_tensor_stands_alone(four: Checkpoint, tmp_path: Path) -> None:
    assert write(four, tmp_path / "out", 80) == ("epoch",)
    names = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [*names, INDEX]
    assert [list(load_file(tmp_path / "out" / name)) for name in names] == [["a", "b"], ["big"], ["c"]]
    text = (tmp_path / "out" / INDEX).read_text()
    index = {
        "metadata": {"total_size": 488, "head": "a", "ckptool.alias_order": '{"head":4}'},
        "weight_map": {"a": names[0], "b": names[0], "big": names[1], "c": names[2]},
    }
    assert text == json.dumps(index, indent=2, sort_keys=True) + "\n"
    for name in names:
        with safe_open(tmp_path / "out" / name, "pt") as file:
            assert file.metadata() == {"format": "pt"}


def test_read_back_it_is_the_same_with_its_ties_and_order(four: Checkpoint, tmp_path: Path) -> None:
    write(four, tmp_path / "out", 50)
    opened = open_checkpoint(tmp_path / "out")
    assert (opened.problems, opened.broken) == ((), False)
    assert list(opened.state_dict()) == list(four.state_dict())
    assert opened.shared() == [["a", "head"]]
    save(opened, tmp_path / "back.pth")
    save(four, tmp_path / "four.pth")
    assert_identical(torch.load(tmp_path / "back.pth"), dict(torch.load(tmp_path / "four.pth")["state_dict"]))


@pytest.mark.parametrize("limit", [488, 10**12])
def test_what_fits_one_shard_is_one_plain_file(limit: int, four: Checkpoint, tmp_path: Path) -> None:
    write(four, tmp_path / "out", limit)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.safetensors"]
    save(four, tmp_path / "one.safetensors")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (tmp_path / "one.safetensors").read_bytes()


@pytest.mark.parametrize(("limit", "shards"), [(1, 4), (40, 4), (79, 4), (80, 3), (407, 3), (408, 2), (487, 2)])
def test_a_limit_is_of_bytes_and_may_be_reached(limit: int, shards: int, four: Checkpoint) -> None:
    planned = sharded.plan(four.state_dict(), limit)
    assert len(planned) == shards
    assert [key for shard in planned.values() for key in shard] == ["a", "b", "big", "c"]
    for shard in planned.values():
        assert len(shard) == 1 or sum(tensor.nbytes for tensor in shard.values()) <= limit


def test_a_limit_of_nothing_is_refused(four: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        write(four, tmp_path / "out", 0)
    assert not (tmp_path / "out").exists()


def test_more_shards_than_are_read_at_once_come_back_in_order(saved: Saved, tmp_path: Path) -> None:
    value = {f"t{number}": torch.full((3,), float(number)) for number in range(120)}
    write(open_checkpoint(saved(value)), tmp_path / "out", 12)
    assert len(list((tmp_path / "out").iterdir())) == 121
    assert_same_tensors(open_checkpoint(tmp_path / "out"), value)


def test_more_shards_than_a_process_may_have_files_are_written_and_proven(saved: Saved, tmp_path: Path) -> None:
    value = {f"t{number}": torch.tensor([number, -number]) for number in range(400)}
    script = f"""
import resource, ckptool
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
report = ckptool.convert({str(saved(value))!r}, {str(tmp_path / "out")!r}, to="sharded", max_shard_size=16, fsync=False)
print(report.tensors, report.verified)
"""
    root = str(Path(ckptool.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": root}
    )
    assert (done.stdout, done.stderr) == ("400 True\n", "")
    assert len(os.listdir(tmp_path / "out")) == 401
    assert_same_tensors(open_checkpoint(tmp_path / "out"), value)


def test_a_tensor_that_went_missing_in_a_shard_is_found(
    saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_file = sharded.safetensors_file.write

    def lose(tensors: Any, *rest: Any) -> None:
        write_file({key: tensor for key, tensor in tensors.items() if key != "gone"}, *rest)

    monkeypatch.setattr(sharded.safetensors_file, "write", lose)
    path = saved({"a": torch.ones(4), "gone": torch.ones(1), "b": torch.ones(4)})
    with pytest.raises(FormatError, match="gone"):
        ckptool.convert(path, tmp_path / "out", to="sharded", max_shard_size=20)
    assert os.listdir(tmp_path) == [path.name]


def test_metadata_of_the_source_stands_in_every_shard_and_no_stale_word_of_an_index(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(4), "b": torch.zeros(4)}
    save_file(tensors, tmp_path / "in.safetensors", {"modelspec.title": "x", "format": "pt"})
    write(open_checkpoint(tmp_path / "in.safetensors"), tmp_path / "one", 16)
    write(open_checkpoint(tmp_path / "one"), tmp_path / "two", 16)
    assert digests(tmp_path / "one") == digests(tmp_path / "two")
    for name in sharded.plan(open_checkpoint(tmp_path / "in.safetensors").state_dict(), 16):
        with safe_open(tmp_path / "two" / name, "pt") as file:
            assert file.metadata() == {"modelspec.title": "x", "format": "pt"}
    merged = open_checkpoint(tmp_path / "two")
    assert merged.metadata["total_size"] == "32"
    save(merged.with_state_dict({"a": merged.state_dict()["a"]}), tmp_path / "less.safetensors")
    with safe_open(tmp_path / "less.safetensors", "pt") as file:
        assert "total_size" not in file.metadata()


@pytest.mark.parametrize("name", ["total_size", "total_parameters", "format", "ckptool.alias_order"])
def test_a_tied_tensor_may_have_a_name_that_the_index_needs(name: str, saved: Saved, tmp_path: Path) -> None:
    shared = torch.ones(4)
    value = {"w": shared, name: shared, "z": torch.zeros(1)}
    write(open_checkpoint(saved(value)), tmp_path / "out", 16)
    opened = open_checkpoint(tmp_path / "out")
    assert opened.problems == ()
    assert {key: tensor.shape for key, tensor in opened.state_dict().items()} == {"w": (4,), name: (4,), "z": (1,)}


def test_existing_files_stay_and_others_are_never_touched(four: Checkpoint, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(four, out, 80)
    (out / "config.json").write_text("{}")
    before = digests(out)
    with pytest.raises(OutputError, match="exists"):
        write(four, out, 80)
    other = four.with_state_dict({"a": four.state_dict()["b"], "c": four.state_dict()["c"]})
    with pytest.raises(OutputError, match="exists"):
        write(other, out, 20)  # other shards, the same index
    assert digests(out) == before
    write(four, out, 80, force=True)
    assert digests(out) == before
    write(other, out, 40, force=True)
    two = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    assert sorted(digests(out)) == ["config.json", *two, INDEX]
    assert digests(out)["config.json"] == before["config.json"]
    assert list(open_checkpoint(out).state_dict()) == ["a", "c"]


def test_an_index_replaces_the_file_that_would_hide_it_and_the_other_way_round(
    four: Checkpoint, tmp_path: Path
) -> None:
    write(four, tmp_path / "out", 10**6)
    with pytest.raises(OutputError, match=r"model\.safetensors"):
        write(four, tmp_path / "out", 80)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.safetensors"]
    write(four, tmp_path / "out", 80, force=True)
    shards = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    assert sorted(digests(tmp_path / "out")) == [*shards, INDEX]
    with pytest.raises(OutputError, match=r"model\.safetensors\.index\.json"):
        write(four, tmp_path / "out", 10**6)
    write(four, tmp_path / "out", 10**6, force=True)
    assert sorted(digests(tmp_path / "out")) == ["model.safetensors"]


def test_what_safetensors_cannot_hold_is_named_and_no_directory_is_made(saved: Saved, tmp_path: Path) -> None:
    value = {"w": torch.ones(2), "c": torch.ones(1, dtype=torch.complex128), "coo": torch.eye(2).to_sparse()}
    with pytest.raises(LossError, match=r"c \(complex128\).*coo \(sparse_coo\)"):
        write(open_checkpoint(saved(value)), tmp_path / "out", 4)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("existing", [False, True])
def test_a_failure_while_writing_leaves_nothing(existing: bool, saved: Saved, tmp_path: Path) -> None:
    path = saved({f"t{number}": torch.ones(4) for number in range(5)})
    opened = open_checkpoint(path)
    path.write_bytes(path.read_bytes() + b"x")
    if existing:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine.txt").write_text("x")
    with pytest.raises(FormatError, match="changed"):
        write(opened, tmp_path / "out", 16)
    assert (tmp_path / "out").exists() == existing
    assert not existing or list((tmp_path / "out").iterdir()) == [tmp_path / "out" / "mine.txt"]


@pytest.mark.parametrize("error", [OutputError("no"), KeyboardInterrupt()])
def test_a_failure_while_names_are_given_leaves_nothing(
    error: BaseException, four: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = LocalOutput.commit
    given: list[str] = []

    def failing(self: LocalOutput) -> None:
        given.append(os.path.basename(self.path))
        inodes = {path.stat().st_ino for path in (tmp_path / "out").iterdir()}
        assert len(inodes) == 4  # everything was written before the first has its name
        if self.path.endswith("00003-of-00003.safetensors"):
            raise error
        commit(self)

    monkeypatch.setattr(LocalOutput, "commit", failing)
    with pytest.raises(type(error)):
        write(four, tmp_path / "out", 80)
    assert len(given) == 3
    assert not (tmp_path / "out").exists()


def test_the_index_gets_its_name_last(four: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = LocalOutput.commit
    given: list[str] = []
    monkeypatch.setattr(LocalOutput, "commit", lambda self: (given.append(os.path.basename(self.path)), commit(self)))
    write(four, tmp_path / "out", 80)
    assert given == [*sorted(given[:-1]), INDEX]


def test_shards_are_checked_before_they_get_their_names(four: Checkpoint, tmp_path: Path) -> None:
    seen: list[list[list[str]]] = []

    def compare(meant: Any, written: Any) -> None:
        seen.append([list(meant), list(written)])
        raise FormatError("not what was meant")

    with pytest.raises(FormatError, match="not what was meant"):
        write(four, tmp_path / "out", 80, compare=compare)
    assert seen == [[["a", "b", "big", "c"]] * 2]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["file", "absent/out"])
def test_a_place_for_no_directory_is_said(name: str, four: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError):
        write(four, tmp_path / name, 80)


def test_a_sharded_checkpoint_can_be_written_onto_itself(four: Checkpoint, tmp_path: Path) -> None:
    write(four, tmp_path / "out", 80)
    before = digests(tmp_path / "out")
    write(open_checkpoint(tmp_path / "out"), tmp_path / "out", 80, force=True)
    assert digests(tmp_path / "out") == before


def test_hugging_faces_own_loader_loads_what_was_written(saved: Saved, tmp_path: Path) -> None:
    hub = pytest.importorskip("huggingface_hub")

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb = nn.Embedding(50, 8)
            self.norm = nn.BatchNorm1d(8)
            self.head = nn.Linear(8, 50, bias=False)
            self.head.weight = self.emb.weight

    torch.manual_seed(3)
    source, target = Net(), Net()
    write(open_checkpoint(saved(source.state_dict())), tmp_path / "out", 1000)
    result = hub.load_torch_model(target, tmp_path / "out", strict=False)  # the tied name is in no shard
    assert (result.missing_keys, result.unexpected_keys) == (["head.weight"], [])
    assert {key: bits(value) for key, value in target.state_dict().items()} == {
        key: bits(value) for key, value in source.state_dict().items()
    }


def test_the_layout_is_the_one_hugging_face_writes(saved: Saved, tmp_path: Path) -> None:
    hub = pytest.importorskip("huggingface_hub")
    shared = torch.arange(10.0)
    value = {"a": shared, "b": torch.ones(10), "c": torch.zeros(20), "tied": shared}
    (tmp_path / "theirs").mkdir()
    hub.save_torch_state_dict(dict(value), tmp_path / "theirs", max_shard_size=100, shared_tensors_to_discard=["tied"])
    write(open_checkpoint(saved(value)), tmp_path / "ours", 100)
    assert sorted(digests(tmp_path / "ours")) == sorted(digests(tmp_path / "theirs"))
    ours, theirs = (json.loads((tmp_path / name / INDEX).read_text()) for name in ("ours", "theirs"))
    assert ours["weight_map"] == theirs["weight_map"]
    del ours["metadata"]["ckptool.alias_order"]
    assert ours["metadata"] == theirs["metadata"]
    for name in set(ours["weight_map"].values()):
        one, other = load_file(tmp_path / "ours" / name), load_file(tmp_path / "theirs" / name)
        assert {key: bits(tensor) for key, tensor in one.items()} == {key: bits(t) for key, t in other.items()}
