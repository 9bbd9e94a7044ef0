from __future__ import annotations

import os
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import FIXTURES, assert_identical, assert_same_tensors, torch_load
from safetensors.torch import load_file

import ckptool
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


def test_everything_promised_is_there() -> None:
    promised = {"open", "save", "diff", "filter", "inspect", "Checkpoint", "TensorInfo", "CkptoolError"}
    assert promised <= set(ckptool.__all__)
    assert all(hasattr(ckptool, name) for name in ckptool.__all__)


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
    from make import ResNet

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
