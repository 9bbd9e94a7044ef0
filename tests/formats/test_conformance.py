"""One suite over every format that can be written and every fixture: what torch and safetensors say of our output."""

from __future__ import annotations

import functools
import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from everything import (
    EVERY,
    NOT_IN_SAFETENSORS,
    OF_EVERY_KIND,
    RANKS,
    SAFETENSORS,
    SAME_MEMORY,
    SHARDED,
    TORCH,
    from_dcp,
    tensors_of,
    truth,
)
from oracles import (
    FIXTURES,
    Run,
    assert_identical,
    assert_same_tensors,
    bits,
    is_dense,
    loads_safely,
    thinned,
    torch_load,
    tree_equal,
)
from safetensors import safe_open
from safetensors.torch import load_file

from ckptool import formats, save, saving
from ckptool import open as open_checkpoint
from ckptool.core import aliases
from ckptool.core.checkpoint import Checkpoint
from ckptool.core.tensor import Span, Storage, TensorInfo
from ckptool.errors import DependencyError, FormatError, LossError
from ckptool.io.files import Files
from ckptool.values.blocks import read_bytes
from tests.fuzz import judge
from tests.transcripts import DOCS, files_of


def of_page(name: str) -> Any:
    """A module of the page on writing a format, under its name."""
    made: Any = ModuleType(name)
    exec(files_of((DOCS / "write-a-format.md").read_text())[f"{name}.py"], made.__dict__)
    return sys.modules.setdefault(name, made)


of_page("exercise")
EXERCISE: formats.Format = of_page("with_exercise").ROW
"""The format that the page makes, a file and a row: all here is asked of it too."""

UNSAFE = ("composite.pth", "leaves.pth")  # what torch.load(weights_only=True) refuses: its classes, NumPy's arrays

ROWS = {row.name: row for row in (*formats.FORMATS, EXERCISE)}


@pytest.fixture(autouse=True)
def _exercise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "FORMATS", tuple(ROWS.values()))


def test_every_format_is_in_this_suite() -> None:
    read = {open_checkpoint(FIXTURES / name).format for name in (*EVERY, *RANKS, "tied.lock")}
    assert not [row.name for row in ROWS.values() if not row.named and row.label not in read]
    assert read == {row.label for row in ROWS.values()} - {"exercise"}
    assert set(WAYS) == {row.name for row in ROWS.values() if row.writes}


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())
def test_a_module_has_what_its_row_promises(row: formats.Format) -> None:
    module = row._import()
    assert all(callable(getattr(module, name)) for name in ("matches", "read"))
    assert all(callable(getattr(module, name)) for name in ("write", "check") if row.writes)
    assert not row.writes or row.written_as == row.name
    assert not row.suffixes or row.ending in row.suffixes
    assert row.family in ROWS or not row.family


@pytest.mark.parametrize("name", [name for name in SAME_MEMORY if name != "resnet_module.pth"])
def test_reading_gives_the_tree_that_torch_load_gives(name: str) -> None:
    tree_equal(formats.read(str(FIXTURES / name)).tree, torch_load(FIXTURES / name))


@pytest.mark.parametrize("name", [name for name in EVERY if name != "tar_2016.pth"])
def test_the_weights_are_those_of_the_oracle(name: str) -> None:
    expected = truth(name)
    found = open_checkpoint(FIXTURES / name).state_dict()
    if name.endswith(".safetensors") or name == "sharded":  # the library gives another order than the file's
        assert sorted(found) == sorted(expected)
        expected = {key: expected[key] for key in found}
    if name == "resnet_module.pth":
        assert list(found) == list(expected)
        for key, tensor in found.items():
            assert tensor.shape == tuple(expected[key].shape)
        return
    assert_same_tensors(open_checkpoint(FIXTURES / name), expected)


# --- writing torch ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SAME_MEMORY)
def test_rewritten_as_torch_it_loads_as_the_same_tree_and_safely_where_the_source_does(
    name: str, tmp_path: Path
) -> None:
    source, target = FIXTURES / name, tmp_path / "out.pth"
    assert save(open_checkpoint(source), target).left_out == ()
    assert_identical(torch_load(source), torch_load(target))
    assert loads_safely(target) or not loads_safely(source)


def test_a_safe_load_is_gained_where_only_the_protocol_was_in_the_way(tmp_path: Path) -> None:
    assert not loads_safely(FIXTURES / "protocol4.pth")
    save(open_checkpoint(FIXTURES / "protocol4.pth"), tmp_path / "out.pth")
    assert loads_safely(tmp_path / "out.pth")


@pytest.mark.parametrize("name", [*TORCH, *SAFETENSORS, *SHARDED])
def test_rewritten_as_torch_it_can_be_mapped(name: str, tmp_path: Path) -> None:
    save(open_checkpoint(FIXTURES / name), tmp_path / "out.pth")
    assert_identical(torch_load(tmp_path / "out.pth"), torch_load(tmp_path / "out.pth", mmap=True))


@pytest.mark.parametrize("name", [*SAFETENSORS, *SHARDED])
def test_rewritten_from_another_format_torch_loads_the_same_weights(name: str, tmp_path: Path) -> None:
    opened = open_checkpoint(FIXTURES / name)
    save(opened, tmp_path / "out.pth")
    written = torch.load(tmp_path / "out.pth", weights_only=True)
    assert list(written) == list(opened.state_dict())
    expected = truth(name)
    assert_identical({key: expected[key] for key in written}, dict(written))


def test_a_malicious_file_stays_as_harmful_as_it_was_and_runs_nothing_here(tmp_path: Path) -> None:
    opened = open_checkpoint(FIXTURES / "malicious.pt")
    assert ("posix", "mkdir") in opened.names
    save(opened, tmp_path / "out.pth")  # the autouse fixture looks for the directory it would have made
    assert ("posix", "mkdir") in open_checkpoint(tmp_path / "out.pth").names


# --- writing safetensors ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
def test_written_as_safetensors_the_library_reads_the_same_weights(name: str, tmp_path: Path) -> None:
    opened = open_checkpoint(FIXTURES / name)
    refused = NOT_IN_SAFETENSORS.get(name, set())
    if refused:
        with pytest.raises(LossError) as caught:
            save(opened, tmp_path / "out.safetensors")
        assert all(key in str(caught.value) for key in refused)
        assert not list(tmp_path.iterdir())
        kept = {key: tensor for key, tensor in opened.state_dict().items() if key not in refused}
        opened = opened.with_state_dict(kept)
    save(opened, tmp_path / "out.safetensors")
    written = load_file(tmp_path / "out.safetensors")
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt"
    expected = {key: value for key, value in truth(name).items() if key not in refused}
    for key in set(expected) - set(written):
        written[key] = written[metadata[key]]
    assert sorted(written) == sorted(expected)
    for key, value in expected.items():
        assert written[key].dtype == value.dtype, key
        assert written[key].shape == value.shape, key
        if name != "resnet_module.pth":
            assert bits(written[key]) == bits(value), key


# --- every way there and back ----------------------------------------------------------------------------------------

LIMIT = 4096
"""Bytes of a shard: most fixtures have several then."""

WAYS = [row.name for row in ROWS.values() if row.writes]


def holds(way: str, tensor: TensorInfo) -> bool:
    """Whether a format can hold a tensor, by what the formats' own documents say."""
    untyped = re.match(r"uint(16|32|64)|float8|float4|complex32|bits", tensor.dtype)
    if way == "npz":
        return tensor.kind == "dense" and not re.match(r"float8|float4|bfloat16|complex32|bits", tensor.dtype)
    if way == "torch-legacy":
        return not untyped and tensor.kind != "nested_strided"
    if way in ("safetensors", "sharded"):
        return tensor.kind == "dense" and not re.match(r"complex32|complex128|bits", tensor.dtype)
    if way == "exercise":
        return tensor.kind == "dense" and bool(re.fullmatch(r"b?float\d\d|int\d+|uint8|bool", tensor.dtype))
    return way in ("torch", "sharded-bin", "dcp")


def written(opened: Checkpoint, way: str, path: Path) -> Path:
    """Where a checkpoint's weights were written, as one of the `WAYS` does it."""
    target = path.with_name(path.name + ROWS[way].ending)
    saving.save(opened, target, saving.SaveOptions(way, max_shard_size=LIMIT, fsync=False))
    return target


@functools.cache
def fixture(name: str) -> Checkpoint:
    return open_checkpoint(FIXTURES / name)


def weights(name: str, way: str) -> Checkpoint:
    """A fixture's weights without the rest of its tree, as far as a format can hold them."""
    opened = fixture(name)
    kept = {key: tensor for key, tensor in opened.state_dict().items() if holds(way, tensor)}
    return Checkpoint(kept, metadata=opened.metadata)


def digests(path: Path) -> dict[str, str]:
    files = {file.name: file for file in path.iterdir()} if path.is_dir() else {"": path}
    return {name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in files.items()}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", OF_EVERY_KIND)
def test_there_and_back_all_is_equal_for_the_formats_own_library_too(name: str, way: str, tmp_path: Path) -> None:
    opened = weights(name, way)
    target = written(opened, way, tmp_path / "there")
    assert digests(target) == digests(written(opened, way, tmp_path / "other")), "two runs, two names, the same bytes"
    back = open_checkpoint(target)
    assert digests(target) == digests(written(back, way, tmp_path / "again"))

    assert list(back.state_dict()) == list(opened.state_dict())
    assert back.shared() == (opened.shared() if ROWS[way].holds.ties else [])
    assert (back.problems, back.broken) == ((), False)
    with Files() as files:
        found_back = back.state_dict()
        for key, tensor in opened.state_dict().items():
            same = found_back[key]
            assert (tensor.kind, tensor.dtype, tensor.shape) == (same.kind, same.dtype, same.shape), key
            if tensor.kind == "dense":
                assert read_bytes(tensor, files) == read_bytes(same, files), key

    expected = {} if name == "resnet_module.pth" else truth(name)
    safely = name not in UNSAFE
    loaded = tensors_of(torch.load(written(back, "torch", tmp_path / "back"), weights_only=safely))
    assert list(loaded) == list(opened.state_dict())
    found = [loaded]
    if way != "exercise":
        found.append(by_library(target, way, list(opened.state_dict()), safely))
        assert sorted(found[1]) == sorted(opened.state_dict())
    for tensors in found:
        for key, value in expected.items():
            if key in tensors and is_dense(value):
                assert (tensors[key].dtype, tensors[key].shape) == (value.dtype, value.shape), key
                assert bits(tensors[key]) == bits(value), key


def by_library(target: Path, way: str, names: list[str], safely: bool) -> dict[str, Any]:
    """What torch, NumPy or safetensors reads in a file."""
    if way == "npz":
        with np.load(target) as archive:
            assert archive.files == names
            return {key: torch.from_numpy(archive[key]) for key in archive.files}
    if way in ("torch", "torch-legacy"):
        return tensors_of(torch.load(target, weights_only=safely))
    if way == "dcp":
        return tensors_of(from_dcp(target)) if names else {}
    found: dict[str, Any] = {}
    for file in sorted(target.glob("*.bin")):
        found |= tensors_of(torch.load(file, weights_only=safely))
    for file in sorted(target.glob("*.safetensors")) if target.is_dir() else [target]:
        found |= load_file(file)
    said = said_in(target)
    return found | {key: found[said[key]] for key in names if key not in found}


@pytest.mark.parametrize("name", EVERY)
def test_a_whole_checkpoint_written_twice_has_the_same_bytes(name: str, tmp_path: Path) -> None:
    one, other = (written(open_checkpoint(FIXTURES / name), "torch", tmp_path / stem) for stem in ("a", "b"))
    assert digests(one) == digests(other)
    again = open_checkpoint(one)
    assert list(again.state_dict()) == list(open_checkpoint(FIXTURES / name).state_dict())
    assert digests(written(again, "torch", tmp_path / "c")) == digests(one)


@pytest.mark.parametrize("name", ["resnet_nested.pth", "tied.pth"])
def test_the_command_line_converts_to_the_exercise_and_back(name: str, run: Run) -> None:
    assert run("convert", FIXTURES / name, "-o", "there.exercise", "--publish", "--dry-run")[0] == 0
    assert run("convert", FIXTURES / name, "-o", "there.exercise")[::2] == (0, "")
    code, out, _ = run("inspect", "there.exercise")
    assert (code, "exercise, " in out) == (0, True)
    assert run("convert", "there.exercise", "--to", "safetensors")[::2] == (0, "")
    assert run("remap", "there.exercise", "--add-prefix", "x.", "-o", "same", "--verify")[::2] == (0, "")
    assert open_checkpoint("same").format == "exercise"
    assert run("diff", FIXTURES / name, "there.safetensors", "--values")[::2] == (0, "")


def test_a_module_and_a_row_are_all_that_the_command_line_needs(tmp_path: Path) -> None:
    package = shutil.copytree(Path(formats.__file__).parents[1], tmp_path / "ckptool")
    page = files_of((DOCS / "write-a-format.md").read_text())
    [row] = re.findall(r"^ROW = (formats\.Format\(\n.*?^\))$", page["with_exercise.py"], re.MULTILINE | re.DOTALL)
    (package / "formats" / "exercise.py").write_text(page["exercise.py"])
    table = (package / "formats" / "__init__.py").read_text()
    row = row.replace("formats.Format", "Format").replace(
        '"exercise",  # the m', '"ckptool.formats.exercise",  # the m'
    )
    (package / "formats" / "__init__.py").write_text(table.replace("\nFORMATS = (\n", f"\nFORMATS = (\n{row},\n"))
    for command in ("convert resnet_old.pth -o there.exercise", "diff --values resnet_old.pth there.exercise"):
        words = command.replace("resnet", f"{FIXTURES}/resnet").split()
        done = subprocess.run([sys.executable, "-m", "ckptool", *words], cwd=tmp_path, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")


@thinned(5)
@pytest.mark.parametrize("way", ["cut", "changed"])
def test_the_reader_of_the_page_bears_any_damage(way: str, step: int, tmp_path: Path, monkeypatch: Any) -> None:
    """Cut at any byte a file is refused; with any byte changed it is read, or refused in one line."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    tensors = {"a.weight": torch.arange(6.0).reshape(2, 3), "é": torch.tensor([1, 2], dtype=torch.int16)}
    torch.save(tensors, tmp_path / "sound.pth")
    data = written(open_checkpoint(tmp_path / "sound.pth"), "exercise", tmp_path / "there").read_bytes()
    path, read = tmp_path / "there.exercise", 0
    for at in range(8, len(data), step):
        if way == "cut":
            path.write_bytes(data[:at])
            assert judge.answer("inspect", path)[0] == 2, at
        for value in () if way == "cut" else (0, 0x2C, 0x39, 0x5D, 0xFF):
            path.write_bytes(data[:at] + bytes([value]) + data[at + 1 :])
            read += judge.hold(path, tmp_path / "sound.pth")
    assert (read == 0) == (way == "cut")


def test_a_library_that_a_format_needs_and_that_is_absent_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("there").write_bytes(b"EXERCISE")
    row = EXERCISE._replace(module="exercise_is_not_there", extra="exercises")
    monkeypatch.setattr(formats, "FORMATS", (row,))
    with pytest.raises(DependencyError, match=r"pip install 'ckptool\[exercises\]'"):
        open_checkpoint("there")


@pytest.mark.parametrize("way", WAYS)
def test_a_failure_leaves_nothing(way: str, tmp_path: Path) -> None:
    source = tmp_path / "source.pth"
    source.write_bytes((FIXTURES / "resnet_old.pth").read_bytes())
    opened = open_checkpoint(source)
    source.write_bytes(source.read_bytes()[:-1])
    with pytest.raises(FormatError, match="changed"):
        written(opened, way, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize("name", TORCH)
def test_rewritten_as_a_stream_it_loads_as_the_same_tree_or_is_refused(name: str, tmp_path: Path) -> None:
    opened = formats.read(str(FIXTURES / name))
    refused = {"dtypes.pth": r"uint16 \(uint16\)", "composite.pth": r"nested \(nested_strided\)"}.get(name)
    if refused:
        with pytest.raises(LossError, match=refused):
            written(opened, "torch-legacy", tmp_path / "out")
        return
    target = written(opened, "torch-legacy", tmp_path / "out")
    if name in SAME_MEMORY:
        assert_identical(torch_load(FIXTURES / name), torch_load(target))
    if loads_safely(FIXTURES / name):
        assert loads_safely(target)


# --- the order of tied names -----------------------------------------------------------------------------------------


def named(names: str) -> list[str]:
    return [f"{name}.w" for name in names.split()]


def tied(*names: str) -> Checkpoint:
    """Names in order; those that begin alike are tied."""
    first: dict[str, TensorInfo] = {}
    for name in names:
        storage = Storage(Span(str(FIXTURES / "tied.pth"), 0, 4), "float32")
        first.setdefault(name[0], TensorInfo("float32", (1,), (1,), 0, storage))
    return Checkpoint({name: replace(first[name[0]]) for name in names})


@pytest.mark.parametrize("way", ["safetensors", "sharded", "sharded-bin"])
@pytest.mark.parametrize(
    ("names", "recorded"),
    [
        ("a b c", False),
        ("a a1 b b1 c", False),
        ("a a1 a2 b", False),
        ("a a2 a1 b", True),
        ("a b a1", True),
        ("b a a1 b1 c a2 b2 a3", True),
        ("a b c d a1 b1 c1 d1", True),
        ("a b b1 c a1", True),
    ],
)
def test_tied_names_come_back_where_they_were(names: str, recorded: bool, way: str, tmp_path: Path) -> None:
    opened = tied(*named(names))
    target = written(opened, way, tmp_path / "x")
    back = open_checkpoint(target)
    assert list(back.state_dict()) == named(names)
    assert back.shared() == opened.shared()
    assert (aliases.ORDER in said_in(target)) == (recorded and way != "sharded-bin")  # which is one file here
    assert not {*back.metadata} - {"format", "total_size"}  # what it says of ties is in the tensors


def said_in(target: Path) -> dict[str, str]:
    """The metadata of a file, or of an index and its shards, as they stand there."""
    said: dict[str, str] = {}
    for file in sorted(target.glob("*.safetensors")) if target.is_dir() else [target]:
        with safe_open(file, "pt") as reader:
            said |= reader.metadata()
    index = target / "model.safetensors.index.json"
    return said | (json.loads(index.read_text())["metadata"] if index.is_file() else {})


@pytest.mark.parametrize(
    "record",
    ["", "x", "[]", "null", '{"a1.w": "2"}', '{"a1.w": true}', '{"a1.w": -5}', '{"a1.w": 1e9}',
     '{"a1.w": 99999999999999999999}', '{"zz": 0}', '{"a.w": 1}', "[" * 100_000],
)  # fmt: skip
def test_an_order_that_makes_no_sense_loses_no_name(record: str) -> None:
    tensors = tied(*named("a b c")).state_dict()
    found = aliases.restored(tensors, {"a1.w": "a.w", "b1.w": "b.w", aliases.ORDER: record})
    assert sorted(found) == named("a a1 b b1 c")
    assert found["a1.w"].source is found["a.w"].source


def test_the_order_of_other_names_never_travels(tmp_path: Path) -> None:
    target = written(tied(*named("a b a1")), "safetensors", tmp_path / "once")
    assert aliases.ORDER in said_in(target)
    once = open_checkpoint(target)
    fewer = {key: tensor for key, tensor in once.state_dict().items() if key != "b.w"}
    target = written(once.with_state_dict(fewer), "sharded", tmp_path / "again")
    assert (list(open_checkpoint(target).state_dict()), aliases.ORDER in said_in(target)) == (named("a a1"), False)


@pytest.mark.parametrize("few", [2000, pytest.param(20_000, marks=pytest.mark.slow)])  # both beyond the cache
def test_the_order_of_many_ties_costs_no_more_than_their_number(few: int) -> None:
    def seconds(count: int) -> float:
        half = [f"{number:06}" for number in range(count)]
        tensors = {name: TensorInfo("float32", (1,), (1,), 0, Storage(Span("", 0, 4))) for name in half}
        both = {**tensors, **{f"tied.{name}": replace(tensor) for name, tensor in tensors.items()}}
        took = []
        for _ in range(3):
            start = time.process_time()
            found = aliases.record(both)
            assert list(aliases.restored(tensors, aliases.described(both, found))) == list(both)
            took.append(time.process_time() - start)
        return min(took)

    seconds(1000)
    assert seconds(5 * few) < 15 * seconds(few)


# --- torch and safetensors -------------------------------------------------------------------------------------------


def test_the_bytes_do_not_depend_on_the_process(tmp_path: Path, saved: Any) -> None:
    path = saved({"w": torch.ones(2), "names": {"a", "b", "c", "d"}, "f": frozenset("wxyz")}, pickle_protocol=4)
    script = "import sys; from ckptool import open, save; save(open(sys.argv[1]), sys.argv[2])"
    digests = set()
    for seed in ("1", "2", "3"):
        target = tmp_path / f"{seed}.pth"
        command = [sys.executable, "-c", script, str(path), str(target)]
        root = str(Path(formats.__file__).parents[2])
        subprocess.run(command, check=True, env={"PYTHONHASHSEED": seed, "PYTHONPATH": root, "PATH": "/usr/bin:/bin"})
        digests.add(hashlib.sha256(target.read_bytes()).hexdigest())
    assert len(digests) == 1


def test_a_lone_view_with_gaps_does_not_drag_its_storage_along(tmp_path: Path) -> None:
    opened = open_checkpoint(FIXTURES / "views.pth")
    assert opened.state_dict()["tiny_of_big"].storage.nbytes == 20_000
    save(opened, tmp_path / "out.pth")
    written = torch.load(tmp_path / "out.pth", weights_only=True)
    assert written["tiny_of_big"].untyped_storage().nbytes() == 8
    assert (tmp_path / "out.pth").stat().st_size < 10_000


def test_views_of_one_storage_stay_views_of_one_storage(tmp_path: Path) -> None:
    save(open_checkpoint(FIXTURES / "views.pth"), tmp_path / "out.pth")
    written = torch.load(tmp_path / "out.pth", weights_only=True)
    written["base"].fill_(7.0)
    assert all((written[key] == 7.0).all() for key in ("transposed", "rows", "columns", "diagonal", "element", "flat"))
    written["window_0"][5] = -1.0
    assert written["window_4"][1] == -1.0


def test_a_written_file_is_as_small_as_torch_writes_it(tmp_path: Path) -> None:
    # Ours lacks .data/serialization_id, which is optional, and the memo entries that nothing asks for.
    save(open_checkpoint(FIXTURES / "resnet_old.pth"), tmp_path / "out.pth")
    buffer = io.BytesIO()
    torch.save(torch.load(FIXTURES / "resnet_old.pth"), buffer)
    assert 0.9 * len(buffer.getvalue()) <= (tmp_path / "out.pth").stat().st_size <= len(buffer.getvalue())


def test_leaves_at_root_are_the_same_objects_in_a_new_checkpoint() -> None:
    opened = open_checkpoint(FIXTURES / "leaves.pth")
    tensors = {key: value for key, (_, value) in opened.entries().items() if isinstance(value, TensorInfo)}
    renewed = opened.with_state_dict(tensors)
    assert all(renewed.tree[key] is value for key, value in opened.tree.items())
