"""What adapters compute of rows, boxes and kernels, and whole files of adapted tensors."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import pytest
import record
import torch
from adapting import numbers, plan, real, resized, result, same, says_the_same
from oracles import bits
from safetensors.torch import load_file

from ckptool import open as open_checkpoint
from ckptool import save
from ckptool.core.tensor import TensorInfo
from ckptool.errors import DependencyError, FormatError, UnreadableError
from ckptool.io.files import Files
from ckptool.io.source import BLOCK
from ckptool.partial.adapt import Adapting
from ckptool.partial.adapters import parse
from ckptool.values import blocks
from ckptool.values.adapt import read_object
from ckptool.values.codec import import_torch

# --- rows --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1000, 512), (1000,), (100, 3, 5)])
@pytest.mark.parametrize("rows", [6, 1203])
def test_rows_are_copied_and_new_ones_filled(shape: tuple[int, ...], rows: int) -> None:
    source, target = numbers(*shape), numbers(rows, *shape[1:], seed=1)
    common = min(len(source), rows)
    fills = {"keep": target[common:], "zero": torch.zeros_like(target[common:])}
    fills["mean"] = source.double().mean(0).float().expand(rows - common, *shape[1:])
    for fill, rest in fills.items():
        assert same(result(f"rows:fill={fill}", source, target), torch.cat([source[:common], rest]))
    assert same(result("rows", source, target), torch.cat([source[:common], fills["keep"]]))


@pytest.mark.parametrize("fill", ["keep", "zero", "mean"])
@pytest.mark.parametrize("seed", range(6))
def test_rows_picked_by_index_are_those_rows(fill: str, seed: int) -> None:
    rng = random.Random(seed)
    source, target = numbers(40, 7), numbers(60, 7, seed=1)
    if seed % 3 == 1:
        source = numbers(7, 40).t()  # not contiguous: rows cannot be read where they lie
    if seed % 3 == 2:
        source = source.double()
    picks = sorted(rng.choices(range(-1, 40), k=60)) if seed < 3 else rng.choices(range(-1, 40), k=60)
    Path("picks.json").write_text(json.dumps([None if pick < 0 else pick for pick in picks]))
    Path("picks.txt").write_text("\n".join(map(str, picks)))
    mean = source.double().mean(0).float()
    rest = {"keep": target, "zero": torch.zeros(60, 7), "mean": mean.expand(60, 7)}[fill]
    wanted = torch.stack([source[pick].float() if pick >= 0 else rest[row] for row, pick in enumerate(picks)])
    for name in ("picks.json", "picks.txt"):
        assert same(result(f"rows:select={name},fill={fill}", source, target), wanted)


def test_rows_follow_their_tokens() -> None:
    rng = random.Random(0)
    old_words = [f"word{number}" for number in range(300)]
    new_words = [*rng.sample(old_words, 200), *(f"new{number}" for number in range(50))]
    rng.shuffle(new_words)
    Path("old.json").write_text(json.dumps({word: row for row, word in enumerate(old_words)}))
    Path("vocab.txt").write_text("".join(f"{word}\n" for word in new_words), encoding="utf-8")
    source, target = numbers(304, 9), numbers(256, 9, seed=1)  # padded tables
    wanted = target.clone()
    for row, word in enumerate(new_words):
        if word in old_words:
            wanted[row] = source[old_words.index(word)]
    assert same(result("rows:tokens=old.json,vocab.txt", source, target), wanted)


@pytest.mark.parametrize("kind", ["stored", "cast", "deflated", "transposed"])
def test_any_order_of_rows_of_a_large_table_is_taken_with_little_memory(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "READ_WHOLE", 16 * BLOCK)
    source = numbers(1000, 2560).to(torch.float64 if kind == "cast" else torch.float32)  # 10 MB, cast 20 MB
    if kind == "transposed":
        source = source.t().contiguous().t()
    picks = random.Random(1).choices(range(1000), k=1000)
    target = torch.empty(1, dtype=torch.float32).expand(1000, 2560)
    tensor = plan("rows:select=x", source, target, lambda _: picks)
    if kind == "deflated":
        with (
            zipfile.ZipFile("source.pth") as old,
            zipfile.ZipFile("packed.pth", "w", zipfile.ZIP_DEFLATED, False, 1) as new,
        ):
            for name in old.namelist():
                new.writestr(name, old.read(name))
        offered = open_checkpoint("packed.pth").state_dict()["w"]
        tensor = Adapting(lambda _: picks).adapt(parse("rows:select=x"), offered, tensor, "w").tensor
    if kind == "cast":
        import_torch("")  # not counted
    wanted = source[picks].float()
    place = 0
    tracemalloc.start()
    try:
        with Files() as files:
            for block in blocks.tensor_blocks(tensor, files):
                count = len(block) // 4
                assert bytes(block) == bits(wanted.view(-1)[place : place + count])
                place += count
        assert place == wanted.numel()
        # a view that turns is read whole, up to `READ_WHOLE` of it
        assert tracemalloc.get_traced_memory()[1] < (20 if kind == "transposed" else 8) * BLOCK
    finally:
        tracemalloc.stop()


def test_a_mean_of_very_many_rows_loses_nothing() -> None:
    source = torch.full((300_000, 3), 0.1)
    assert same(result("rows:fill=mean", source, torch.zeros(300_002, 3))[-1], source[0])


@pytest.mark.parametrize("dtype", ["int64", "bool", "float8_e4m3fn", "complex64", "uint8"])
def test_rows_of_any_dtype_are_copied(dtype: str) -> None:
    kind = getattr(torch, dtype)
    source, target = (numbers(5, 3) * 3).to(kind), (numbers(9, 3, seed=1) * 3).to(kind)
    assert same(result("rows", source, target), torch.cat([source, target[5:]]))
    assert same(result("rows:fill=zero", source, target), torch.cat([source, torch.zeros(4, 3).to(kind)]))


@pytest.mark.parametrize("old", ["float32", "float64", "bfloat16", "float16"])
@pytest.mark.parametrize("new", ["float32", "float64", "bfloat16", "float16"])
def test_values_are_computed_in_float32_and_rounded_once_as_torch_rounds(old: str, new: str) -> None:
    source = (numbers(64, 33) * 3).to(getattr(torch, old))
    target = numbers(70, 33, seed=1).to(getattr(torch, new))
    source[3, 4], source[5, 6] = math.inf, math.nan
    wide = source if old == "float64" else source.float()
    mean = (wide.double().mean(0) if old == "float64" else wide.double().mean(0).float()).to(target.dtype)
    found = result("rows:fill=mean", source, target)
    torch.testing.assert_close(
        found, torch.cat([source.to(target.dtype), mean.expand(6, 33)]), equal_nan=True, rtol=0, atol=0
    )
    kernel = source.view(64, 3, 11, 1)
    wanted = (wide.view(64, 3, 11, 1).repeat(1, 2, 1, 1)[:, :4] * 0.75).to(target.dtype)
    found = result("in-chans", kernel, torch.zeros(64, 4, 11, 1, dtype=target.dtype))
    torch.testing.assert_close(found, wanted, equal_nan=True, rtol=0, atol=0)
    table = numbers(1, 16, 5).to(source.dtype)
    wanted = resized(table.double().view(4, 4, 5), (7, 7)).view(1, 49, 5)
    found = result("pos-embed", table, torch.zeros(1, 49, 5, dtype=target.dtype))
    assert found.dtype == target.dtype
    close = 1e-12 if old == new == "float64" else 1e-5
    torch.testing.assert_close(found, wanted.to(target.dtype), rtol=torch.finfo(target.dtype).eps + close, atol=close)


# --- boxes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("fill", ["keep", "zero"])
def test_a_crop_copies_the_common_box(seed: int, fill: str) -> None:
    rng = random.Random(seed)
    rank = rng.randint(1, 5)
    old, new = ([rng.randint(1, 5) for _ in range(rank)] for _ in range(2))
    source, target = numbers(*old), numbers(*new, seed=1)
    if rank > 1 and seed % 2:
        target = numbers(*new[::-1], seed=1).permute(*range(rank - 1, -1, -1))
    wanted = target.contiguous() if fill == "keep" else torch.zeros(new)
    box = tuple(slice(min(a, b)) for a, b in zip(old, new, strict=True))
    wanted[box] = source[box]
    assert same(result(f"crop:fill={fill}", source, target), wanted)


# --- kernels -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["", ":mean", ":repeat", ":sum"])
@pytest.mark.parametrize(("old", "new"), [(3, 1), (3, 4), (3, 6), (4, 3), (1, 3), (2, 5), (6, 3)])
def test_channels_keep_the_scale_of_the_response(by: str, old: int, new: int) -> None:
    source = numbers(16, old, 3, 3)
    if by == ":sum" and new > 1:
        return
    found = result(f"in-chans{by}", source, torch.zeros(16, new, 3, 3)).double()
    whole = source.double().sum(1)
    if by == ":repeat" or (not by and new > 1):
        wanted = torch.stack([source[:, channel % old].double() * old / new for channel in range(new)], 1)
    else:
        wanted = (whole / new).unsqueeze(1).expand(16, new, 3, 3)
        torch.testing.assert_close(found.sum(1), whole, rtol=1e-6, atol=1e-6)  # to a constant image it says the same
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


def test_channels_are_mapped_without_being_rescaled() -> None:
    source, target = numbers(8, 3, 3, 3), numbers(8, 4, 3, 3, seed=1)
    assert same(result("in-chans:map=2,1,0", source, target[:, :3].contiguous()), source.flip(1))
    assert same(result("in-chans:map=0,1,2,-", source, target), torch.cat([source, target[:, 3:]], 1))
    assert same(result("in-chans:map=0,-,2,0,fill=zero", source, target)[:, 1], torch.zeros(8, 3, 3))
    mean = result("in-chans:map=-,0,1,2,fill=mean", source, target)[:, 0]
    torch.testing.assert_close(mean, source.mean(1), rtol=1e-6, atol=1e-6)


def test_an_infinite_weight_stays_in_the_channels_that_use_it() -> None:
    source = numbers(8, 3, 3, 3)
    source[:, 1] = math.inf
    found = result("in-chans", source, torch.zeros(8, 4, 3, 3))
    assert found[:, [0, 2, 3]].isfinite().all()
    assert found[:, 1].isinf().all()


@pytest.mark.parametrize("depth", [1, 2, 3, 5])
def test_kernels_are_inflated_as_i3d_does(depth: int) -> None:
    source, target = numbers(64, 3, 7, 7), torch.zeros(64, 3, depth, 7, 7)
    assert same(result("inflate", source, target), source.unsqueeze(2).repeat(1, 1, depth, 1, 1) / depth)
    wanted = torch.zeros_like(target)
    wanted[:, :, depth // 2] = source
    assert same(result("inflate:center", source, target), wanted)
    assert same(result("inflate:mean", source, target.double()), result("inflate", source, target).double())


LIVE = record.channels(64, 7)


@pytest.mark.parametrize("name", LIVE)
def test_channels_equal_timms(name: str) -> None:
    gray = LIVE[name].target[1] == 1  # torch adds three numbers in an order of its own
    says_the_same(record.small()[name], name, LIVE[name], torch.finfo(LIVE[name].dtype).eps if gray else 0.0)


# --- whole files -------------------------------------------------------------------------------------------------

REAL = {
    "vit.pos_embed": ("pos-embed", (1, 197, 768), (1, 577, 768)),
    "deit.pos_embed": ("pos-embed", (1, 198, 384), (1, 578, 384)),
    "swin.relative_position_bias_table": ("rel-pos", (169, 3), (529, 3)),
    "gray.conv1.weight": ("in-chans", (64, 3, 7, 7), (64, 1, 7, 7)),
    "rgbd.conv1.weight": ("in-chans", (64, 3, 7, 7), (64, 4, 7, 7)),
    "pair.conv1.weight": ("in-chans:map=0,1,2,-,-,-,fill=mean", (64, 3, 7, 7), (64, 6, 7, 7)),
    "video.conv1.weight": ("inflate:center", (64, 3, 7, 7), (64, 3, 5, 7, 7)),
    "few.fc.weight": ("rows", (1000, 512), (6, 512)),
    "few.fc.bias": ("rows", (1000,), (6,)),
    "many.fc.weight": ("rows:fill=mean", (1000, 512), (1203, 512)),
    "wide.fc.weight": ("crop", (1000, 512), (1203, 640)),
    "bert.embeddings": ("rows", (3052, 64), (3060, 64)),
    "moved.embeddings": ("rows:select=picks.txt,fill=zero", (3052, 64), (3060, 64)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_written_is_what_torch_and_safetensors_load(dtype: torch.dtype) -> None:
    picks = random.Random(3).choices(range(-1, 3052), k=3060)
    Path("picks.txt").write_text("\n".join(map(str, picks)))
    sources = {key: numbers(*old, seed=1) for key, (_, old, _) in REAL.items()}
    targets = {key: numbers(*new, seed=2).to(dtype) for key, (_, _, new) in REAL.items()}
    targets["head.weight"] = targets["bert.embeddings"]  # tied in the target
    torch.save(sources, "source.pth")
    torch.save(targets, "target.pth")
    source, target = open_checkpoint("source.pth"), open_checkpoint("target.pth")
    adapting = Adapting(read_object)
    new = dict(target.state_dict())
    for key, (text, _, _) in REAL.items():
        new[key] = adapting.adapt(parse(text), source.state_dict()[key], new[key], key).tensor
    new["head.weight"] = new["bert.embeddings"]
    made = target.with_state_dict(new)
    save(made, "out.pth", verify=True)
    save(made, "out.safetensors", verify=True)
    loaded, other = torch.load("out.pth"), load_file("out.safetensors")
    for path in ("out.pth", "out.safetensors"):
        again = open_checkpoint(path).state_dict()
        assert again["head.weight"].view == again["bert.embeddings"].view
    for key in REAL:
        assert same(loaded[key], real(new[key])), key
        assert same(other[key], loaded[key]), key
        assert (loaded[key].shape, loaded[key].dtype) == (targets[key].shape, dtype)
    cast = {key: tensor.to(dtype) for key, tensor in sources.items()}
    assert same(loaded["few.fc.weight"], cast["few.fc.weight"][:6])
    assert same(loaded["bert.embeddings"], torch.cat([cast["bert.embeddings"], targets["bert.embeddings"][3052:]]))
    assert same(loaded["vit.pos_embed"][:, :1], cast["vit.pos_embed"][:, :1])
    zero = torch.zeros(64, dtype=dtype)
    rows = [cast["moved.embeddings"][pick] if pick >= 0 else zero for pick in picks]
    assert same(loaded["moved.embeddings"], torch.stack(rows))


def test_views_of_what_is_computed_are_read_and_written_too() -> None:
    source, target = numbers(1, 17, 6), torch.zeros(1, 50, 6)
    tensor = plan("pos-embed", source, target)
    turned = TensorInfo(tensor.dtype, (6, 7), (1, 6), 6, tensor.source)
    whole = real(tensor)
    assert same(real(turned), whole[0, 1:8].t().contiguous())
    made = open_checkpoint("target.pth").with_state_dict({"w": tensor, "t": turned})
    save(made, "out.pth")
    loaded = torch.load("out.pth")
    assert same(loaded["w"], whole)
    assert same(loaded["t"].contiguous(), whole[0, 1:8].t().contiguous())


def test_real_tensors_are_made_without_a_file() -> None:
    target = numbers(6, 4, seed=1)
    tensor = plan("rows", numbers(3, 4), target)
    tree = open_checkpoint("target.pth").with_state_dict({"w": tensor}).to_torch()
    assert same(tree["w"], torch.cat([numbers(3, 4), target[3:]]))


WITHOUT = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in %r:
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Blocked())
import ckptool
from ckptool.partial.adapt import Adapting
from ckptool.partial.adapters import parse
source, target = (ckptool.open(name) for name in ("source.pth", "target.pth"))
made = {}
for text, new in target.state_dict().items():
    read = lambda path: list(range(new.shape[0]))
    made[text] = Adapting(read).adapt(parse(text), source.state_dict()[text], new, text).tensor
ckptool.save(target.with_state_dict(made), "out.pth")
"""


@pytest.mark.parametrize(
    ("blocked", "shapes"),
    [
        (
            ["torch", "numpy"],
            {
                "rows": ((9, 4), (12, 4)), "rows:fill=zero": ((9, 4), (12, 4)), "rows:select=x": ((12, 4), (9, 4)),
            },
        ),
        (
            ["torch"],
            {
                "rows:fill=mean": ((9, 4), (12, 4)), "crop": ((9, 8), (12, 4)),
                "in-chans": ((8, 3, 3, 3), (8, 4, 3, 3)), "inflate": ((8, 3, 3, 3), (8, 3, 5, 3, 3)),
            },
        ),
    ],
)  # fmt: skip
def test_torch_and_numpy_are_needed_only_where_numbers_are(blocked: list[str], shapes: dict[str, Any]) -> None:
    torch.save({text: numbers(*old) for text, (old, _) in shapes.items()}, "source.pth")
    torch.save({text: numbers(*new) for text, (_, new) in shapes.items()}, "target.pth")
    done = subprocess.run([sys.executable, "-c", WITHOUT % blocked], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert {text: tuple(one.shape) for text, one in torch.load("out.pth").items()} == {
        text: new for text, (_, new) in shapes.items()
    }


def test_resampling_says_that_it_needs_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = plan("pos-embed", numbers(1, 17, 6), torch.zeros(1, 50, 6))
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(DependencyError, match="resampling positions needs torch"), Files() as files:
        blocks.read_bytes(tensor, files)


# --- files that are named ----------------------------------------------------------------------------------------


def test_lists_are_json_or_text() -> None:
    for text, value in (("[1, null]", [1, None]), ("1\n2\n", "1\n2\n"), ("[PAD]\nthe\n", "[PAD]\nthe\n"), ("5", 5)):
        Path("list").write_text(text)
        assert read_object("list") == value


def test_files_that_cannot_be_read_are_one_line() -> None:
    with pytest.raises(UnreadableError, match=r"none\.json: cannot be read: no such file"):
        read_object("none.json")
    with pytest.raises(UnreadableError, match="cannot be read"):
        read_object(".")
    Path("bad.json").write_text("[1,")
    with pytest.raises(FormatError, match=r"bad\.json: is not JSON"):
        read_object("bad.json")
    Path("deep.json").write_text("[" * 200_000)
    with pytest.raises(FormatError, match=r"deep\.json: is not JSON"):
        read_object("deep.json")
    Path("bytes").write_bytes(b"\xff\xfe")
    with pytest.raises(FormatError, match="bytes: is not UTF-8 text"):
        read_object("bytes")
