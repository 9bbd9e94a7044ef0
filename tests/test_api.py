"""What `import ckptool` offers: its names, its sources, what it says of wrong arguments, and its errors."""

from __future__ import annotations

import inspect
import math
import os
import subprocess
import sys
from argparse import Namespace
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracles import FIXTURES, assert_identical, assert_same_tensors, torch_load
from safetensors.torch import load_file
from torch import nn

import ckptool
from ckptool import errors
from ckptool.errors import CkptoolError, IncompleteError, OutputError, UsageError

Saved = Callable[..., Path]

PLAIN = ["resnet_old.pth", "resnet_122.pth", "resnet_ddp.pth", "resnet_legacy.pth", "dtypes.pth", "views.pth",
         "tied.pth", "conj_neg.pth", "lightning.ckpt", "ema.pth", "protocol4.pth", "big_endian.pth",
         "deflated.pth"]  # fmt: skip


def test_the_library_does_what_its_page_says(tmp_path: Path) -> None:
    target, source = FIXTURES / "resnet_new.pth", FIXTURES / "resnet_old.pth"
    opened = ckptool.open(source)
    assert opened.state_dict()["fc.weight"].shape == (20, 16)
    assert not ckptool.diff(target, source).same
    merged, report = ckptool.filter(source, match=target)
    assert report.counts == {"loaded": 100, "mismatched": 2, "bookkeeping": 20}
    written = ckptool.save(merged, tmp_path / "merged.pth")
    assert (written.left_out, written.nbytes) == ((), (tmp_path / "merged.pth").stat().st_size)
    assert ckptool.inspect(tmp_path / "merged.pth").parameters == ckptool.inspect(target).parameters
    assert ckptool.diff(tmp_path / "merged.pth", target).same


PUBLIC = """
Beside Changed Check Checkpoint CkptoolError CollisionError ConvertReport DependencyError DiffReport Doubt
FilterReport Finding FormatError Group Histogram IncompleteError InferReport InspectReport LimitError
LoadPartialReport LossError Mapped NoTensorsError OutputError Pair PrefixStats RemapReport Row Rules Saved
SchemaReport Stats StrictError TensorInfo TensorRow TiedAway UnreadableError UnsupportedError UsageError ValuesChanged
__version__ check_schema convert diff filter infer inspect invert limited load_partial open plan_partial remap render
save
"""


def test_the_public_names_are_these_and_each_says_what_it_is() -> None:
    assert ckptool.__all__ == PUBLIC.split()
    assert {*ckptool.__all__} <= {*dir(ckptool)}
    for name in ckptool.__all__:
        found = getattr(ckptool, name)
        assert name == "__version__" or (found.__name__ == name and found.__doc__)
    raised = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)}
    assert raised <= {*ckptool.__all__}


def test_every_keyword_of_plan_partial_is_one_of_load_partial() -> None:
    plan, load = (inspect.signature(function).parameters for function in (ckptool.plan_partial, ckptool.load_partial))
    own = {"map_location", "assign", "strict", "model"}
    assert {*load} - own == {*plan} - {"target"}
    assert all(load[name] == plan[name] for name in load if name not in own)


# --- a state_dict as a source ----------------------------------------------------------------------------------------


def trained() -> tuple[dict[str, Any], nn.Module]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    whole = {"epoch": 3, "args": Namespace(lr=0.1, sizes=[1, 2]), "model": model.state_dict(), "dtype": torch.float16,
             "optimizer": optimizer.state_dict(), "size": torch.Size((2, 3)), "best": np.float64(0.5),
             "seen": {1, 2}, "where": torch.device("cpu"), "counts": Counter("aab"), "path": Path("x")}  # fmt: skip
    return whole, model


def test_a_dict_in_memory_is_written_as_torch_would_save_it(saved: Saved) -> None:
    whole, _ = trained()
    whole["tied"], whole["views"] = (
        whole["model"],
        {"t": torch.arange(6.0).view(2, 3).t(), "p": nn.Parameter(torch.ones(2))},
    )
    ckptool.save(whole, "ours.pth")
    assert_identical(torch_load(Path("ours.pth")), torch_load(saved(whole, "theirs.pth")))
    assert ckptool.diff("ours.pth", whole, values=True).same


def test_every_function_takes_a_state_dict(saved: Saved) -> None:
    whole, model = trained()
    state = model.state_dict()
    path = saved(state)
    assert [row.key for row in ckptool.inspect(whole).tensors] == list(state)
    assert ckptool.inspect(whole).root == "model"
    assert ckptool.inspect(state, hashes=True).hash == ckptool.inspect(path, hashes=True).hash
    assert ckptool.diff(state, path, values=True).same
    half = {key: torch.zeros_like(value) for key, value in list(state.items())[:3]}
    merged, report = ckptool.filter(half, match=state)
    assert (report.target, report.counts["loaded"]) == ("<state_dict>", 3)
    ckptool.save(merged, "merged.safetensors")
    assert all(torch.equal(value, half.get(key, state[key])) for key, value in load_file("merged.safetensors").items())
    renamed, _ = ckptool.remap(state, [["^0", "first"]])
    assert "first.weight" in renamed.to_torch()
    assert ckptool.convert(state, "out.npz").verified
    assert ckptool.convert(whole, "out", to="sharded", root="model").tensors == len(state)
    other = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    assert ckptool.load_partial(other, whole).counts == {"loaded": len(state)}
    assert all(torch.equal(value, state[key]) for key, value in other.state_dict().items())
    planned, _ = ckptool.plan_partial(path, half)
    assert list(planned.state_dict()) == list(half)
    assert ckptool.open(whole, root="model").state_dict().keys() == state.keys()


def test_arrays_of_numpy_are_tensors_too_and_need_no_torch() -> None:
    script = """
import numpy as np, sys, ckptool
a = np.arange(12, dtype=np.float32).reshape(3, 4)
arrays = {"a": a, "t": a.T, "back": a[::-1], "big": a.astype(">f4"), "tied": a, "n": np.zeros((0, 2), np.int64)}
arrays["s"] = np.array(True)
ckptool.save(arrays, "out.safetensors")
ckptool.save({"model": arrays, "epoch": 3}, "out.pth")
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    a = torch.arange(12.0).view(3, 4)
    expected = {
        "a": a,
        "t": a.T,
        "back": a.flip(0),
        "big": a,
        "tied": a,
        "n": torch.zeros(0, 2).long(),
        "s": torch.tensor(True),
    }
    made = torch.load("out.pth")
    assert made["epoch"] == 3
    assert all(torch.equal(made["model"][key], value) for key, value in expected.items())
    assert made["model"]["a"].data_ptr() == made["model"]["tied"].data_ptr()
    assert torch.equal(load_file("out.safetensors")["back"], a.flip(0))


def test_values_are_read_when_they_are_written() -> None:
    state = {"w": torch.zeros(3)}
    opened = ckptool.open(state)
    state["w"].fill_(2)
    ckptool.save(opened, "out.pth")
    assert torch.load("out.pth")["w"].tolist() == [2, 2, 2]


def test_a_meta_tensor_in_memory_is_one_in_the_file() -> None:
    ckptool.save({"m": torch.ones(2, 3, device="meta"), "w": torch.ones(1)}, "out.pth")
    made = torch.load("out.pth")["m"]
    assert (made.is_meta, made.shape) == (True, (2, 3))


def test_what_cannot_be_taken_from_memory_is_one_line() -> None:
    with pytest.raises(CkptoolError, match="sparse_coo"):
        ckptool.save({"w": torch.eye(3).to_sparse()}, "out.pth")
    with pytest.raises(CkptoolError, match="generator, which cannot be saved"):
        ckptool.save({"w": torch.ones(1), "g": (i for i in ())}, "out.pth")
    endless: dict[str, Any] = {"w": torch.ones(1)}
    endless["again"] = endless
    with pytest.raises(CkptoolError, match="contains itself"):
        ckptool.inspect(endless)
    with pytest.raises(CkptoolError, match="tensor"):
        ckptool.convert({"epoch": 3}, "out.pth")
    assert not Path("out.pth").exists()


# --- wrong arguments -------------------------------------------------------------------------------------------------


def test_a_masked_array_in_memory_keeps_its_mask() -> None:
    ckptool.save({"w": torch.ones(1), "m": np.ma.MaskedArray([1.0, 2.0], mask=[False, True])}, "out.pth")
    assert torch.load("out.pth", weights_only=False)["m"].mask.tolist() == [False, True]


NEW, OLD = FIXTURES / "resnet_new.pth", FIXTURES / "resnet_old.pth"


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: ckptool.open(3), "a source is a checkpoint, a path or a state_dict, not an int"),
        (lambda: ckptool.diff(OLD, None), "not a NoneType"),
        (lambda: ckptool.filter(OLD, match=3.5), "not a float"),
        (lambda: ckptool.save([torch.ones(1)], "out.pth"), "not a list"),
        (lambda: ckptool.plan_partial(OLD, NEW, init="zeros"), r"init is a dict \{key pattern: rule\}.*not 'zeros'"),
        (lambda: ckptool.plan_partial(OLD, NEW, init=["zeros"]), "'zeros' is none"),
        (lambda: ckptool.plan_partial(OLD, NEW, adapt={"fc.*": 3}), r"adapt is a dict .*\('fc.\*', 3\) is none"),
        (lambda: ckptool.plan_partial(OLD, NEW, adapt=3), "not an int"),
        (lambda: ckptool.plan_partial(OLD, NEW, adapt={"fc.*": "stretch"}), "no adapter 'stretch'"),
        (lambda: ckptool.plan_partial(OLD, NEW, optimizer="adam"), "optimizer is drop or remap, not 'adam'"),
        (lambda: ckptool.plan_partial(OLD, NEW, seed="1"), "seed is a whole number"),
        (lambda: ckptool.plan_partial(OLD, NEW, freeze=3), "freeze is a text or a list of texts, not an int"),
        (lambda: ckptool.plan_partial(OLD, NEW, rules=3), "rules are a list"),
        (lambda: ckptool.plan_partial(OLD, 3), "into a torch.nn.Module, not into a int"),
        (lambda: ckptool.load_partial(nn.Linear(1, 1), 3), "not an int"),
        (lambda: ckptool.load_partial(nn.Linear(1, 1), OLD, init="zeros"), "init is a dict"),
        (lambda: ckptool.remap(OLD, 3), "rules are a list"),
        (lambda: ckptool.filter(OLD, include=[3]), "include is a text or a list of texts; an int is none"),
        (lambda: ckptool.save(OLD, "out.pth", map_location=3), "map_location is a device tag, .* not an int"),
        (lambda: ckptool.save(OLD, "out.pth", map_location={"cpu": 0}), "map_location is a device tag"),
        (lambda: ckptool.convert(OLD, "out.pth", keep=3), "keep is a text"),
        (lambda: ckptool.open(OLD, root=3), "root is a text such as .* or a tuple of keys, not 3"),
        (lambda: ckptool.open({"w": torch.ones(1)}, root={1}), "root is a text .* not a set"),
        (lambda: ckptool.inspect(OLD, root=b"x"), "root is a text .* not a bytes"),
        (lambda: ckptool.inspect(ckptool.open(OLD), root=3), "root is a text"),
        (lambda: ckptool.convert(OLD, "out.pth", root=3), "root is a text"),
        (lambda: ckptool.plan_partial(OLD, NEW, root=3), "root is a text"),
        (lambda: ckptool.load_partial(nn.Linear(1, 1), OLD, root={1}), "root is a text"),
        (lambda: ckptool.diff(OLD, OLD, strip_prefix_a=3), "strip_prefix_a is a text or a list of texts, not an int"),
        (lambda: ckptool.diff(OLD, OLD, strip_prefix_b=b"x"), "a text or a list of texts; an int is none"),
        (lambda: ckptool.diff(OLD, OLD, rtol="x"), "rtol is a number from 0 on, not 'x'"),
        (lambda: ckptool.filter(OLD, strip_prefix=3), "strip_prefix is a text or a list of texts, not an int"),
        (lambda: ckptool.filter(OLD, add_prefix=[1]), "add_prefix is a text, not a list"),
        (lambda: ckptool.plan_partial(OLD, NEW, strip_prefix=3), "is a text or a list of texts, not an int"),
        (lambda: ckptool.plan_partial(OLD, NEW, add_prefix=object()), "add_prefix is a text, not an object"),
        (lambda: ckptool.convert(OLD, "out.pth", dtype=3), "dtype is a text, not 3"),
        (lambda: ckptool.convert(OLD, "out.pth", dtype=torch.float16), "dtype is a text, not a dtype"),
        (lambda: ckptool.convert(OLD, "out.pth", max_shard_size="x"), "max_shard_size is a number from 1 on, not 'x'"),
        (lambda: ckptool.convert(OLD, "out", to="sharded", max_shard_size=None), "max_shard_size .* not None"),
        (lambda: ckptool.save(OLD, "out.pth", max_shard_size=0), "max_shard_size is a number from 1 on, not 0"),
        (lambda: ckptool.plan_partial(OLD, NEW, new_lr_mult="x"), "new_lr_mult is a number from 0 on, not 'x'"),
        (lambda: ckptool.plan_partial(OLD, NEW, new_lr_mult=math.nan), "new_lr_mult is a number from 0 on, not nan"),
        (lambda: ckptool.plan_partial(OLD, NEW, weight_decay=None), "weight_decay is a number from 0 on, not None"),
        (lambda: ckptool.load_partial(nn.Linear(1, 1), OLD, weight_decay=-1), "weight_decay .* not -1"),
        (lambda: ckptool.save(OLD, 3), "the output is a path of text, not 3"),
        (lambda: ckptool.save(OLD, b"x"), "the output is a path of text, not a bytes"),
        (lambda: ckptool.convert({"w": torch.ones(1)}, None), "the output is a path of text, not None"),
        (lambda: ckptool.load_partial(nn.Linear(1, 1), OLD, map_location=4), "map_location is a device tag, .* an int"),
    ],
)  # fmt: skip
def test_a_wrong_argument_is_a_sentence(call: Callable[[], object], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        call()
    assert os.listdir() == []


def test_one_pattern_needs_no_list() -> None:
    assert ckptool.filter(OLD, include="fc.*")[1] == ckptool.filter(OLD, include=["fc.*"])[1]


def test_functions_take_paths_text_and_opened_checkpoints_alike() -> None:
    path = FIXTURES / "resnet_old.pth"
    expected = ckptool.diff(path, FIXTURES / "resnet_new.pth")
    assert ckptool.diff(str(path), ckptool.open(FIXTURES / "resnet_new.pth")) == expected
    assert ckptool.inspect(ckptool.open(path)) == ckptool.inspect(str(path))
    _, one = ckptool.filter(path, match=path)
    _, other = ckptool.filter(ckptool.open(path), match=str(path))
    assert one.rows == other.rows


def test_nothing_is_written_until_save(tmp_path: Path) -> None:
    ckptool.filter(FIXTURES / "resnet_old.pth", match=FIXTURES / "resnet_new.pth")
    assert os.listdir(tmp_path) == []


# --- to_torch --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PLAIN)
def test_to_torch_gives_the_tree_that_torch_load_gives(name: str) -> None:
    made = ckptool.open(FIXTURES / name).to_torch()
    assert_identical(made, torch_load(FIXTURES / name), strides=True)


def test_to_torch_gives_composite_tensors_too(saved: Saved) -> None:
    whole = torch_load(FIXTURES / "composite.pth")
    names = ("quantized", "quantized_channel", "coo", "csr", "meta", "parameter", "plain")
    path = saved({name: whole[name] for name in names})
    assert_identical(ckptool.open(path).to_torch(), torch_load(path))


def test_to_torch_of_the_root_is_key_to_tensor() -> None:
    made = ckptool.open(FIXTURES / "resnet_nested.pth").to_torch(only_root=True)
    assert_same_tensors(ckptool.open(FIXTURES / "resnet_old.pth"), made)


def test_to_torch_of_a_whole_model_is_its_state_dict() -> None:
    from makers.models import ResNet

    made = ckptool.open(FIXTURES / "resnet_module.pth").to_torch()
    assert list(made) == list(torch.load(FIXTURES / "resnet_122.pth"))
    model = ResNet(20)
    model.load_state_dict(made, strict=True)
    assert model.state_dict()["bn1.num_batches_tracked"] == 400
    assert_identical(made._metadata, torch.load(FIXTURES / "resnet_122.pth")._metadata)


def test_to_torch_of_safetensors_and_shards_is_what_the_library_loads() -> None:
    made = ckptool.open(FIXTURES / "resnet_old.safetensors").to_torch()
    loaded = load_file(FIXTURES / "resnet_old.safetensors")
    assert_identical(dict(made), {name: loaded[name] for name in made})
    sharded = ckptool.open(FIXTURES / "sharded").to_torch()
    assert sharded["lm_head.weight"].data_ptr() == sharded["model.embed.weight"].data_ptr()
    shards = [load_file(path) for path in sorted((FIXTURES / "sharded").glob("*.safetensors"))]
    for name, tensor in {key: value for shard in shards for key, value in shard.items()}.items():
        assert torch.equal(sharded[name], tensor)


def test_to_torch_of_a_filtered_checkpoint_needs_no_file_between() -> None:
    source, target = torch.load(FIXTURES / "resnet_old.pth"), torch.load(FIXTURES / "resnet_122.pth")
    merged, _ = ckptool.filter(FIXTURES / "resnet_old.pth", match=FIXTURES / "resnet_122.pth")
    made = merged.to_torch()
    assert list(made) == list(target)
    for name, tensor in made.items():
        assert torch.equal(tensor, source.get(name, target[name]))


def test_to_torch_of_a_cast_casts(saved: Saved) -> None:
    source, target = saved({"w": torch.randn(3, 4).t()}, "s.pth"), saved({"w": torch.zeros(4, 3).half()}, "t.pth")
    merged, _ = ckptool.filter(source, match=target, cast=True)
    assert_identical(merged.to_torch(), {"w": torch.load(source)["w"].half()})


def test_to_torch_of_shards_with_one_missing_is_refused() -> None:
    with pytest.raises(IncompleteError):
        ckptool.open(FIXTURES / "sharded_broken").to_torch()


@pytest.fixture
def on_gpus(monkeypatch: pytest.MonkeyPatch, saved: Saved) -> Path:
    """A file as two GPUs would have written it."""
    shared = torch.arange(4.0)
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: f"cuda:{storage.nbytes() // 16}")
        return saved(OrderedDict(a=shared, b=shared[1:3], c=torch.ones(8), epoch=3), "gpus.pth")


@pytest.mark.parametrize(
    "where",
    [
        "cpu",
        "meta",
        torch.device("cpu"),
        torch.device("meta"),
        {"cuda:1": "cpu", "cuda:2": "cpu"},
        {"cuda:1": "cpu", "cuda:2": "meta", "cuda:7": "nowhere"},
        lambda storage, tag: storage,
        lambda storage, tag: storage.cpu(),
    ],
    ids=["cpu", "meta", "device cpu", "device meta", "all on cpu", "a dict", "as it is", "storage.cpu()"],
)
def test_map_location_takes_what_torch_load_takes(where: Any, on_gpus: Path) -> None:
    made = ckptool.open(on_gpus).to_torch(map_location=where)
    assert_identical(made, torch.load(on_gpus, map_location=where))


def test_a_callable_sees_the_storages_and_tags_that_torch_load_shows_it(on_gpus: Path) -> None:
    def seen_by(load: Callable[[Any], Any]) -> list[tuple[str, list[int]]]:
        seen = []
        load(lambda storage, tag: seen.append((tag, storage.tolist())))
        return seen

    class Stop(Exception):
        pass

    def first(storage: Any, tag: str) -> Any:
        raise Stop(tag)

    ours = seen_by(lambda where: ckptool.open(on_gpus).to_torch(lambda s, tag: where(s, tag) or s))
    theirs = seen_by(lambda where: torch.load(on_gpus, map_location=lambda s, tag: where(s, tag) or s))
    assert [tag for tag, _ in ours] == [tag for tag, _ in theirs] == ["cuda:1", "cuda:2"]
    with pytest.raises(Stop):
        ckptool.open(on_gpus).to_torch(first)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without the device")
def test_a_device_that_is_not_there_is_torchs_own_complaint(on_gpus: Path) -> None:
    messages = []
    for load in (ckptool.open(on_gpus).to_torch, lambda: torch.load(on_gpus)):
        with pytest.raises(RuntimeError, match="CUDA") as caught:
            load()
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


# --- save ------------------------------------------------------------------------------------------------------------


def tags_of(path: Path | str) -> set[str]:
    tags = set()
    torch.load(path, map_location=lambda storage, tag: tags.add(tag) or storage)
    return tags


@pytest.mark.parametrize(
    ("where", "tags"),
    [(None, {"cuda:1", "cuda:2"}), ("cpu", {"cpu"}), ({"cuda:1": "cuda:5"}, {"cuda:5", "cuda:2"}),
     (lambda tag: tag.replace("cuda", "xpu"), {"xpu:1", "xpu:2"})],
)  # fmt: skip
def test_save_rewrites_device_tags_as_asked(where: Any, tags: set[str], on_gpus: Path) -> None:
    ckptool.save(ckptool.open(on_gpus), "out.pth", map_location=where)
    assert tags_of("out.pth") == tags


def test_save_returns_what_a_format_left_out(tmp_path: Path) -> None:
    saved = ckptool.save(ckptool.open(FIXTURES / "resnet_nested.pth"), tmp_path / "out.safetensors", verify=True)
    assert saved.verified
    assert saved.left_out == ("epoch", "arch", "best_acc1", "optimizer", "scheduler", "args")


def test_save_returns_how_many_values_a_cast_made_infinite(saved: Saved) -> None:
    source, target = saved({"w": torch.tensor([1e10, 1.0])}, "s.pth"), saved({"w": torch.zeros(2).half()}, "t.pth")
    merged, report = ckptool.filter(source, match=target, cast=True)
    assert report.overflowed is None  # nothing is computed yet
    assert ckptool.save(merged, "out.pth").overflowed == {"w": 1}
    assert ckptool.save(merged, "out.safetensors", to="safetensors").overflowed == {"w": 1}


def test_save_refuses_what_exists_what_is_an_input_and_what_has_no_format(saved: Saved) -> None:
    path = saved({"w": torch.ones(1)})
    before = path.read_bytes()
    opened = ckptool.open(path)
    with pytest.raises(OutputError, match="in-place"):
        ckptool.save(opened, path, force=True)
    other = saved({"v": torch.ones(1)}, "other.pth")
    with pytest.raises(OutputError, match="force"):
        ckptool.save(opened, other)
    with pytest.raises(UsageError, match="suffix"):
        ckptool.save(opened, "out.xyz")
    assert path.read_bytes() == before
    ckptool.save(opened, path, in_place=True)
    assert torch.load(path)["w"] == 1
    ckptool.save(ckptool.open(path), other, force=True)
    assert list(torch.load(other)) == ["w"]


def test_an_input_changed_after_it_was_opened_is_noticed(saved: Saved) -> None:
    path = saved({"w": torch.ones(100)})
    opened = ckptool.open(path)
    saved({"w": torch.ones(2), "v": torch.ones(7)})
    with pytest.raises(CkptoolError):
        ckptool.save(opened, "out.pth")
    assert not Path("out.pth").exists()


def test_an_input_replaced_by_one_of_equal_size_is_noticed(saved: Saved) -> None:
    path = saved({"w": torch.ones(100)})
    opened = ckptool.open(path)
    saved({"w": torch.zeros(100)})
    with pytest.raises(CkptoolError):
        ckptool.save(opened, "out.pth")


def test_an_opened_checkpoint_can_be_changed_by_hand(saved: Saved) -> None:
    weights = {"a": torch.ones(1), "b": torch.ones(2)}
    opened = ckptool.open(saved({"epoch": 1, "args": Namespace(lr=0.1), "model": weights}))
    tensors = opened.state_dict()
    changed = opened.with_state_dict({"renamed": tensors["b"], "a": tensors["a"]})
    ckptool.save(changed, "out.pth")
    expected = {"epoch": 1, "args": Namespace(lr=0.1), "model": {"renamed": torch.ones(2), "a": torch.ones(1)}}
    assert_identical(torch.load("out.pth", weights_only=False), expected)


# --- errors ----------------------------------------------------------------------------------------------------------


def test_every_error_of_open_is_one_class_and_names_the_file(tmp_path: Path) -> None:
    bad = [*(FIXTURES / "bad").iterdir(), tmp_path / "absent.pth", tmp_path]
    for path in bad:
        with pytest.raises(CkptoolError) as caught:
            ckptool.open(path)
        assert caught.value.path is not None, path
        assert str(caught.value).startswith(str(path)), path
