"""Files that other people's tools made, with what is truly in them: those beside this repository, and the fixtures."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
from everything import BAD, EXPECTED, FOLDERS, GOOD, MALICIOUS, PLACES, SAMPLES, VERSIONS
from oracles import FIXTURES

from ckptool import open as open_checkpoint
from ckptool import save
from ckptool.core import modules
from ckptool.core.checkpoint import Checkpoint
from ckptool.core.dtypes import DTYPES
from ckptool.core.tensor import TensorInfo
from ckptool.core.tree import as_mapping, attributes, walk
from ckptool.errors import CkptoolError, FormatError
from ckptool.formats import read
from ckptool.io.files import Files
from ckptool.values import blocks as data


def opened(name: str) -> Checkpoint:
    return read(str(PLACES[name]))


def found_tensors(checkpoint: Checkpoint) -> dict[tuple[Any, ...], TensorInfo]:
    """By path; an nn.Module gives its state_dict; True and 1 are told apart as expected.json does, by their text."""
    return {tuple(map(str, path)): tensor for path, tensor in checkpoint.tensors()}


def digest(tensor: TensorInfo) -> str:
    with Files() as files:
        return hashlib.sha256(data.read_bytes(tensor, files)).hexdigest()


def assert_tensor(tensor: TensorInfo, want: dict[str, Any], ignored: tuple[str, ...] = ()) -> None:
    kind = want["kind"]
    if kind == "numpy":
        names = {">i4": "int32"}
        want = {**want, "dtype": names.get(want["dtype"], want["dtype"]), "nbytes": tensor.nbytes}
        kind = "dense"
    assert tensor.kind == kind, want["key"]
    if "st_dtype" in want:
        assert DTYPES[tensor.dtype].safetensors == want["st_dtype"]
        shape = list(tensor.shape or ())
        if want["st_dtype"] == "F4":
            shape[-1] *= 2
        assert shape == want["shape"]
    else:
        assert tensor.dtype == want["dtype"], want["key"]
        if tensor.shape is not None:
            assert list(tensor.shape) == want["shape"], want["key"]
    if kind != "dense":
        return
    assert digest(tensor) == want["sha256"], want["key"]
    assert tensor.nbytes == want["nbytes"]
    for field, value in (
        ("stride", list(tensor.stride)), ("storage_offset", tensor.storage_offset), ("location", tensor.location),
        ("requires_grad", tensor.requires_grad), ("is_param", tensor.is_parameter),
        ("storage_nbytes", tensor.storage.nbytes if tensor.storage else None),
        ("conj", bool(tensor.extras and tensor.extras.conj)), ("neg", bool(tensor.extras and tensor.extras.neg)),
    ):  # fmt: skip
        if field in want and field not in ignored:
            assert value == want[field], f"{want['key']}: {field}"


IGNORED = {
    "torch-tar": ("storage_offset", "storage_nbytes"),  # torch makes a storage of a named part; ours is the whole
    "torchscript": ("is_param",),  # of some the class is that of the module before it was a program
}


def parts(sample: dict[str, Any]) -> dict[tuple[str, ...], list[dict[str, Any]]]:
    """The tensors of each part of a file, by its path: of a program, of a package; else all."""
    if sample["format"] == "pt2":
        rows = [{name: row[name] for name in row if name != "share"} for row in sample["constants"]]
        return {("state_dict",): sample["tensors"], ("constants",): rows}
    if sample["format"] == "torch.package":
        pickled = {sample["pickle_record"]: sample["tensors"], **sample.get("pickles", {})}
        return {tuple(record.split("/")): rows for record, rows in pickled.items()}
    return {(): sample["tensors"]}


@pytest.mark.parametrize("name", GOOD)
def test_every_tensor_is_the_one_that_was_saved(name: str) -> None:
    sample = EXPECTED[name]
    checkpoint = opened(name)
    assert checkpoint.format == sample["format"]
    for prefix, rows in parts(sample).items():
        found = {
            path[len(prefix) :]: tensor
            for path, tensor in found_tensors(checkpoint).items()
            if path[: len(prefix)] == prefix
        }
        groups: dict[int, set[int]] = {}
        wanted = {}
        for want in rows:
            if want["kind"] == "storage" or want["key"].startswith("np_"):  # numpy's scalars
                continue
            # Of a whole model expected.json gives the path of its keys, dots and all.
            wanted[tuple(map(str, want["path"]))] = want
        extra = {(name,) for name in sample.get("problems", {}).get("in_shard_not_index", ())}
        assert set(found) == set(wanted) | extra
        for path, want in wanted.items():
            tensor = found[path]
            ignored = IGNORED.get(sample["format"], ())
            assert_tensor(tensor, want, ignored)
            if "share" in want and tensor.numel and tensor.kind == "dense":
                groups.setdefault(want["share"], set()).add(id(tensor.source))
        assert all(len(sources) == 1 for sources in groups.values())
        assert len({next(iter(sources)) for sources in groups.values()}) == len(groups)
        if sample["format"] != "safetensors" and sample["format"] != "hf-sharded":
            assert [path for path in found if path in wanted] == list(wanted)


@pytest.mark.parametrize("name", GOOD)
def test_rewritten_every_tensor_is_still_the_one_that_was_saved(name: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(PLACES[name])
    if checkpoint.broken or checkpoint.ranks:
        pytest.skip("a part is missing, or it is in pieces")
    before = {path: tensor for path, tensor in found_tensors(checkpoint).items() if tensor.kind == "dense"}
    save(checkpoint, tmp_path / "out.pth")
    after = found_tensors(open_checkpoint(tmp_path / "out.pth"))
    for path, tensor in before.items():
        assert (after[path].dtype, after[path].shape) == (tensor.dtype, tensor.shape)
        assert digest(after[path]) == digest(tensor)


@pytest.mark.parametrize("name", VERSIONS)
def test_the_versions_of_a_models_modules_are_torchs(name: str) -> None:
    top = next(node for _, node in walk(opened(name).tree) if modules.is_module(node))
    found = {key: dict(entry) for key, entry in (as_mapping(modules.metadata(top)) or {}).items()}
    assert found == VERSIONS[name]


@pytest.mark.parametrize("name", [name for name in GOOD if EXPECTED[name]["format"] == "safetensors"])
def test_metadata_is_there_word_for_word(name: str) -> None:
    assert dict(opened(name).metadata) == (EXPECTED[name]["metadata"] or {})


@pytest.mark.parametrize("name", [name for name in GOOD if "problems" in EXPECTED[name]])
def test_an_inconsistent_index_is_told_in_full(name: str) -> None:
    said = "\n".join(opened(name).problems)
    assert opened(name).broken
    problems = EXPECTED[name]["problems"]
    for kind in ("in_shard_not_index", "in_index_not_shard", "missing_shard"):
        assert all(part in said for part in problems[kind]), kind
    assert "total_size" in said


@pytest.mark.parametrize("name", [name for name in BAD if name not in MALICIOUS])
def test_a_bad_file_is_an_error_that_names_it(name: str) -> None:
    if not PLACES[name].exists():
        pytest.skip("too large to be kept")
    with pytest.raises(FormatError, match=Path(name).name):
        opened(name)


@pytest.mark.parametrize("name", MALICIOUS)
def test_a_malicious_file_is_read_and_its_call_is_named(name: str) -> None:
    checkpoint = opened(name)
    assert any(qualname == "mkdir" for _, qualname in checkpoint.names)
    found = found_tensors(checkpoint)
    for want in EXPECTED[name]["tensors"]:
        assert_tensor(next(tensor for path, tensor in found.items() if path[-1] == want["key"]), want)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_every_file_of_the_samples_is_read_or_refused_without_a_crash(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            try:
                checkpoint = open_checkpoint(path)
                list(checkpoint.tensors())
                list(checkpoint.leaves())
            except CkptoolError as error:
                said = str(error)
            else:
                said = str(path)
            assert str(path.parent) in said


@pytest.mark.parametrize(
    ("folder", "state_dict", "plain"),
    [(FIXTURES, "resnet_new.pth", "resnet_old.pth"), (SAMPLES, "zip/basic.pt", "zip/plain_dict.pt")][: len(FOLDERS)],
)
def test_metadata_of_a_state_dict_is_kept(folder: Path, state_dict: str, plain: str) -> None:
    assert "_metadata" in attributes(read(str(folder / state_dict)).tree)
    assert "_metadata" not in attributes(read(str(folder / plain)).tree)
