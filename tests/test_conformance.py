"""One suite over every format that can be written and every fixture: what torch and safetensors say of our output."""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import FIXTURES, assert_identical, assert_same_tensors, bits, loads_safely, torch_load, tree_equal
from safetensors import safe_open
from safetensors.torch import load_file

from ckptool import formats
from ckptool.api import open as open_checkpoint
from ckptool.api import save
from ckptool.checkpoint import TensorInfo
from ckptool.errors import LossError

TORCH = sorted(
    path.name for path in FIXTURES.iterdir() if path.suffix in (".pth", ".pt", ".ckpt") and path.name != "malicious.pt"
)
# torch.load gives a named part of a storage as another storage object; test_torch_tar.py looks at its memory.
SAME_MEMORY = [name for name in TORCH if name != "tar_2016.pth"]
SAFETENSORS = sorted(path.name for path in FIXTURES.glob("*.safetensors"))
SHARDED = ["sharded", "sharded_bin"]
EVERY = [*TORCH, "malicious.pt", *SAFETENSORS, *SHARDED]

# What safetensors has no place for; every other fixture must be writable.
NOT_IN_SAFETENSORS = {
    "dtypes.pth": {"complex128", "complex32", "bits8", "bits16", "bits1x8", "bits2x4", "bits4x2"},
    "composite.pth": {"quantized", "quantized_channel", "coo", "csr", "nested", "jagged", "meta"},
    "conj_neg.pth": {"conj128"},
}


def at_root(loaded: Any, root: tuple[Any, ...]) -> Any:
    for step in root:
        loaded = loaded[step]
    return loaded.state_dict() if isinstance(loaded, torch.nn.Module) else loaded


def truth(name: str) -> dict[str, torch.Tensor]:
    """The weights of a fixture as torch or safetensors reads them, without ckptool."""
    path = FIXTURES / name
    if name.endswith(".safetensors"):
        return load_file(path)
    if name in SHARDED:
        tensors: dict[str, torch.Tensor] = {}
        for shard in sorted([*path.glob("*.safetensors"), *path.glob("*.bin")]):
            tensors |= load_file(shard) if shard.suffix == ".safetensors" else torch.load(shard)
        if name == "sharded":
            tensors["lm_head.weight"] = tensors["model.embed.weight"].detach()  # its index says so
        return tensors
    if name == "resnet_module.pth":
        return module_truth()
    if name == "malicious.pt":  # torch.load would run it
        with zipfile.ZipFile(path) as archive:
            return {
                "weight": torch.frombuffer(bytearray(archive.read("archive/data/0")), dtype=torch.float32).view(2, 2)
            }
    loaded = torch_load(path)
    for step in ("state_dict", "model"):
        loaded = loaded.get(step, loaded)
    return {key: value for key, value in loaded.items() if isinstance(value, torch.Tensor)}


def module_truth() -> dict[str, torch.Tensor]:
    import make

    return make.resnet(4, 20).state_dict()


def test_every_format_is_in_this_suite() -> None:
    assert set(formats.WRITERS) == {"torch", "safetensors"}
    read = {open_checkpoint(FIXTURES / name).format for name in EVERY}
    known = {formats._module(name).NAME for name in formats.READERS} | {"hf-sharded"}
    assert read == known


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
def test_rewritten_as_torch_it_loads_as_the_same_tree(name: str, tmp_path: Path) -> None:
    source, target = FIXTURES / name, tmp_path / "out.pth"
    assert save(open_checkpoint(source), target) == ()
    assert_identical(torch_load(source), torch_load(target))


@pytest.mark.parametrize("name", SAME_MEMORY)
def test_rewritten_as_torch_it_loads_safely_where_the_source_does(name: str, tmp_path: Path) -> None:
    save(open_checkpoint(FIXTURES / name), tmp_path / "out.pth")
    if loads_safely(FIXTURES / name):
        assert loads_safely(tmp_path / "out.pth")


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


@pytest.mark.parametrize("name", EVERY)
def test_reading_back_gives_the_same_again(name: str, tmp_path: Path) -> None:
    save(open_checkpoint(FIXTURES / name), tmp_path / "once.pth")
    once = open_checkpoint(tmp_path / "once.pth")
    assert list(once.state_dict()) == list(open_checkpoint(FIXTURES / name).state_dict())
    save(once, tmp_path / "twice.pth")
    assert (tmp_path / "once.pth").read_bytes() == (tmp_path / "twice.pth").read_bytes()


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


@pytest.mark.parametrize("name", EVERY)
def test_through_safetensors_and_back_keys_values_and_ties_are_the_same(name: str, tmp_path: Path) -> None:
    opened = open_checkpoint(FIXTURES / name)
    refused = NOT_IN_SAFETENSORS.get(name, set())
    kept = {key: tensor for key, tensor in opened.state_dict().items() if key not in refused}
    opened = opened.with_state_dict(kept)
    save(opened, tmp_path / "once.safetensors")
    once = open_checkpoint(tmp_path / "once.safetensors")
    assert sorted(once.state_dict()) == sorted(opened.state_dict())
    assert sorted(map(sorted, once.shared())) == sorted(map(sorted, opened.shared()))
    tied = {key for group in opened.shared() for key in group[1:]}
    order = [key for key in opened.state_dict() if key not in tied]
    assert [key for key in once.state_dict() if key not in tied] == order
    save(once, tmp_path / "twice.safetensors")
    assert (tmp_path / "once.safetensors").read_bytes() == (tmp_path / "twice.safetensors").read_bytes()
    save(once, tmp_path / "back.pth")
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    if name != "resnet_module.pth":
        expected = {key: value for key, value in truth(name).items() if key not in refused}
        assert {key: bits(value) for key, value in back.items()} == {key: bits(v) for key, v in expected.items()}


# --- both ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("name", EVERY)
def test_two_runs_give_the_same_bytes(name: str, suffix: str, tmp_path: Path) -> None:
    opened = open_checkpoint(FIXTURES / name)
    refused = NOT_IN_SAFETENSORS.get(name, set())
    if suffix == ".safetensors" and refused:
        pytest.skip("not writable whole")
    for stem in ("a", "b"):  # the name must not matter either
        save(opened, tmp_path / f"{stem}{suffix}")
    assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()


def test_the_bytes_do_not_depend_on_the_process(tmp_path: Path, saved: Any) -> None:
    path = saved({"w": torch.ones(2), "names": {"a", "b", "c", "d"}, "f": frozenset("wxyz")}, pickle_protocol=4)
    script = "import sys; from ckptool.api import open, save; save(open(sys.argv[1]), sys.argv[2])"
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
