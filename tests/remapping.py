"""What the tests of `remap` share: sources of every kind, rules with what torch makes of them, and a model."""

from __future__ import annotations

import io
import json
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from oracles import Run, State, bits
from safetensors.torch import save_file
from torch import nn

from ckptool.core.checkpoint import Checkpoint
from ckptool.core.tensor import Span, Storage, TensorInfo, contiguous_stride


def as_ints(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory under an integer dtype of that size: what torch has no kernel for, it has for these."""
    if tensor.is_complex():
        return torch.view_as_real(tensor.resolve_conj()).view(torch.int32).contiguous().view(torch.int64).squeeze(-1)
    return tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def assert_bits(found: State, expected: State) -> None:
    """Keys in order, shapes and values to the bit; ``expected`` may be in the integers of `as_ints`."""
    assert list(found) == list(expected)
    for key, tensor in expected.items():
        assert tuple(found[key].shape) == tuple(tensor.shape), key
        assert bits(found[key]) == bits(tensor), key


# --- sources of every kind -------------------------------------------------------------------------------------------


def big_endian(raw: bytes, tensors: State) -> bytes:
    """What torch.save wrote, as a big-endian machine would have written it: every element reversed."""
    units: list[int] = []
    seen = set()
    for tensor in tensors.values():
        if tensor.untyped_storage()._cdata not in seen:
            seen.add(tensor.untyped_storage()._cdata)
            units.append(tensor.element_size() // (2 if tensor.is_complex() else 1))
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(raw)) as old, zipfile.ZipFile(buffer, "w") as new:
        for item in old.infolist():
            data = old.read(item)
            folder, _, name = item.filename.rpartition("/")
            if item.filename.endswith("byteorder"):
                data = b"big"
            elif folder.endswith("/data"):
                unit = units[int(name)]
                data = b"".join(data[i : i + unit][::-1] for i in range(0, len(data), unit))
            new.writestr(item.filename, data)
    return buffer.getvalue()


def deflated(raw: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(raw)) as old, zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as new:
        for item in old.infolist():
            new.writestr(item.filename, old.read(item))
    return buffer.getvalue()


def in_shards(folder: Path, tensors: State) -> Path:
    folder.mkdir()
    names = list(tensors)
    half = len(names) // 2
    weight_map = {}
    for number, part in enumerate((names[:half], names[half:]), 1):
        shard = f"model-{number:05}-of-00002.safetensors"
        save_file({name: tensors[name].contiguous() for name in part}, folder / shard, {"format": "pt"})
        weight_map.update(dict.fromkeys(part, shard))
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


CONTAINERS = ["pth", "legacy", "deflated", "big", "safetensors", "sharded"]


def put(kind: str, tensors: State) -> Path:
    """Writes tensors into one kind of container, with torch's or safetensors' own writer."""
    if kind == "safetensors":
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, "in.safetensors")
        return Path("in.safetensors")
    if kind == "sharded":
        return in_shards(Path("in_shards"), tensors)
    buffer = io.BytesIO()
    torch.save(tensors, buffer, _use_new_zipfile_serialization=kind != "legacy")
    raw = buffer.getvalue()
    raw = deflated(raw) if kind == "deflated" else big_endian(raw, tensors) if kind == "big" else raw
    Path("in.pth").write_bytes(raw)
    return Path("in.pth")


# --- every operation, and what torch does -----------------------------------------------------------------------------

SHAPES = {
    "w": (4, 6), "v": (4, 6), "box": (2, 3, 4), "qkv": (12, 4), "q": (4, 3), "k": (4, 3), "scalar": (),
    "none": (0, 6), "photo": (2, 3, 4, 5),
}  # fmt: skip
DTYPES = ["float32", "bfloat16", "float8_e4m3fn", "int64", "bool", "complex64"]


def made(dtype: torch.dtype, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Random bits, NaNs and all, of one dtype; every element another where there are enough values."""
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    raw = torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).squeeze(-1) if dtype.itemsize > 1 else raw.squeeze(-1).view(dtype)


def some(dtype: str) -> State:
    generator = torch.Generator().manual_seed(DTYPES.index(dtype) if dtype in DTYPES else 99)
    return {name: made(getattr(torch, dtype), shape, generator) for name, shape in SHAPES.items()}


def chunked(tensor: torch.Tensor, heads: int, parts: int, dim: int = 0) -> list[torch.Tensor]:
    """The layout that interleaves by head, taken apart with view and select."""
    shape = tensor.shape
    rest = shape[dim] // heads // parts
    view = tensor.reshape(*shape[:dim], heads, parts, rest, *shape[dim + 1 :])
    flat = (*shape[:dim], heads * rest, *shape[dim + 1 :])
    return [view.select(dim + 1, number).reshape(flat) for number in range(parts)]


def woven(tensors: list[torch.Tensor], heads: int, dim: int = 0) -> torch.Tensor:
    shape = tensors[0].shape
    split = [t.reshape(*shape[:dim], heads, 1, shape[dim] // heads, *shape[dim + 1 :]) for t in tensors]
    return torch.cat(split, dim + 1).reshape(*shape[:dim], shape[dim] * len(tensors), *shape[dim + 1 :])


def with_keys(state: State, old: list[str], new: State) -> State:
    """The state with new keys at the place of the old one that the rule names first."""
    result: State = {}
    for key, tensor in state.items():
        if key == old[0]:
            result.update(new)
        if key not in old:
            result[key] = tensor
    return result


Case = tuple[list[dict[str, Any]], list[str], Callable[[State], State]]
CASES: dict[str, Case] = {
    "transpose": ([{"transpose": "w"}], ["w"], lambda s: {"w": s["w"].t()}),
    "transpose of all with a glob": (
        [{"transpose": "re:^[wv]$"}], ["w"], lambda s: {"w": s["w"].t()}),
    "transpose of two dims of four": (
        [{"transpose": "photo", "dims": [1, -1]}], ["photo"], lambda s: {"photo": s["photo"].transpose(1, -1)}),
    "permute of three": (
        [{"permute": "box", "dims": [2, 0, 1]}], ["box"], lambda s: {"box": s["box"].permute(2, 0, 1)}),
    "permute of four": (
        [{"permute": "photo", "dims": [3, 2, 0, 1]}], ["photo"], lambda s: {"photo": s["photo"].permute(3, 2, 0, 1)}),
    "permute of nothing": ([{"transpose": "none"}], ["none"], lambda s: {"none": s["none"].t()}),
    "reshape": ([{"reshape": "box", "shape": [6, 4]}], ["box"], lambda s: {"box": s["box"].reshape(6, 4)}),
    "reshape with -1": (
        [{"reshape": "photo", "shape": [5, -1, 2]}], ["photo"], lambda s: {"photo": s["photo"].reshape(5, -1, 2)}),
    "reshape to 1-d": ([{"reshape": "w", "shape": [-1]}], ["w"], lambda s: {"w": s["w"].reshape(-1)}),
    "reshape of a scalar": (
        [{"reshape": "scalar", "shape": [1, -1]}], ["scalar"], lambda s: {"scalar": s["scalar"].reshape(1, 1)}),
    "reshape of nothing": (
        [{"reshape": "none", "shape": [3, 0, 2]}], ["none"], lambda s: {"none": s["none"].reshape(3, 0, 2)}),
    "split in equal parts": (
        [{"split": "qkv", "into": ["a", "b", "c"]}], ["qkv"],
        lambda s: dict(zip("abc", torch.chunk(s["qkv"], 3), strict=True))),
    "split by sizes": (
        [{"split": "qkv", "into": ["a", "b", "c"], "sizes": [7, 0, 5]}], ["qkv"],
        lambda s: dict(zip("abc", torch.split(s["qkv"], [7, 0, 5]), strict=True))),
    "split along dim 1": (
        [{"split": "w", "into": ["a", "b", "c"], "sizes": [1, 3, 2], "dim": 1}], ["w"],
        lambda s: dict(zip("abc", torch.split(s["w"], [1, 3, 2], 1), strict=True))),
    "split along the last of four": (
        [{"split": "photo", "into": ["a", "b"], "sizes": [2, 3], "dim": -1}], ["photo"],
        lambda s: dict(zip("ab", torch.split(s["photo"], [2, 3], -1), strict=True))),
    "split of nothing": (
        [{"split": "none", "into": ["a", "b"]}], ["none"], lambda s: {"a": s["none"], "b": s["none"]}),
    "cat along dim 0": (
        [{"cat": ["w", "v"], "into": "m"}], ["w", "v"], lambda s: {"m": torch.cat([s["w"], s["v"]])}),
    "cat in the order of the rule, not of the file": (
        [{"cat": ["v", "w"], "into": "m"}], ["v", "w"], lambda s: {"m": torch.cat([s["v"], s["w"]])}),
    "cat along dim 1": (
        [{"cat": ["w", "q", "v"], "into": "m", "dim": 1}], ["w", "q", "v"],
        lambda s: {"m": torch.cat([s["w"], s["q"], s["v"]], 1)}),
    "cat along the last": (
        [{"cat": ["w", "k"], "into": "m", "dim": -1}], ["w", "k"], lambda s: {"m": torch.cat([s["w"], s["k"]], -1)}),
    "cat with nothing": ([{"cat": ["none", "w"], "into": "m"}], ["none", "w"], lambda s: {"m": s["w"]}),
    "chunk": (
        [{"chunk": "qkv", "into": ["a", "b", "c"], "heads": 2}], ["qkv"],
        lambda s: dict(zip("abc", chunked(s["qkv"], 2, 3), strict=True))),
    "chunk along dim 1": (
        [{"chunk": "w", "into": ["a", "b"], "heads": 3, "dim": 1}], ["w"],
        lambda s: dict(zip("ab", chunked(s["w"], 3, 2, 1), strict=True))),
    "chunk of one head": (
        [{"chunk": "qkv", "into": ["a", "b"], "heads": 1}], ["qkv"],
        lambda s: dict(zip("ab", torch.chunk(s["qkv"], 2), strict=True))),
    "weave": (
        [{"weave": ["q", "k"], "into": "m", "heads": 2}], ["q", "k"], lambda s: {"m": woven([s["q"], s["k"]], 2)}),
    "weave along dim 1": (
        [{"weave": ["q", "k"], "into": "m", "heads": 3, "dim": -1}], ["q", "k"],
        lambda s: {"m": woven([s["q"], s["k"]], 3, 1)}),
    "transpose, then split": (
        [{"transpose": "w"}, {"split": "w", "into": ["a", "b"]}], ["w"],
        lambda s: dict(zip("ab", torch.chunk(s["w"].t(), 2), strict=True))),
    "split, transpose, rename, cat": (
        [{"split": "w", "into": ["a", "b"], "dim": 1}, {"transpose": "b"}, {"rename": "b", "to": "c"},
         {"transpose": "c"}, {"cat": ["c", "a"], "into": "w", "dim": 1}], ["w"],
        lambda s: {"w": torch.cat([s["w"][:, 3:], s["w"][:, :3]], 1)}),
    "reshape, permute, reshape": (
        [{"reshape": "qkv", "shape": [2, 3, 2, 4]}, {"permute": "qkv", "dims": [1, 0, 2, 3]},
         {"reshape": "qkv", "shape": [12, -1]}], ["qkv"],
        lambda s: {"qkv": s["qkv"].reshape(2, 3, 2, 4).permute(1, 0, 2, 3).reshape(12, 4)}),
    "chunk, then weave with more heads": (
        [{"chunk": "qkv", "into": ["a", "b", "c"], "heads": 2}, {"weave": ["c", "b", "a"], "into": "m", "heads": 4}],
        ["qkv"], lambda s: {"m": woven(chunked(s["qkv"], 2, 3)[::-1], 4)}),
    "permute of a permute of a slice": (
        [{"split": "box", "into": ["a", "b"], "dim": 2}, {"permute": "a", "dims": [1, 2, 0]},
         {"permute": "a", "dims": [1, 2, 0]}, {"drop": "b"}], ["box"],
        lambda s: {"a": s["box"][:, :, :2].permute(1, 2, 0).permute(1, 2, 0)}),
}  # fmt: skip


def expected_of(name: str, state: State) -> State:
    _, old, compute = CASES[name]
    if name == "transpose of all with a glob":
        return {**state, "w": state["w"].t(), "v": state["v"].t()}
    return with_keys(state, old, compute(state))


EVERY_OPERATION = [
    {"transpose": "w"}, {"permute": "box", "dims": [2, 0, 1]}, {"reshape": "photo", "shape": [5, -1, 2]},
    {"chunk": "qkv", "into": ["h0", "h1", "h2"], "heads": 2},
    {"split": "v", "into": ["s0", "s1"], "sizes": [5, 1], "dim": 1},
    {"cat": ["q", "k"], "into": "both", "dim": 1}, {"reshape": "scalar", "shape": [1]}, {"transpose": "none"},
]  # fmt: skip


def all_at_once(state: State) -> State:
    h = chunked(state["qkv"], 2, 3)
    return {
        "w": state["w"].t(), "s0": state["v"][:, :5], "s1": state["v"][:, 5:], "box": state["box"].permute(2, 0, 1),
        "h0": h[0], "h1": h[1], "h2": h[2], "both": torch.cat([state["q"], state["k"]], 1),
        "scalar": state["scalar"].reshape(1), "none": state["none"].t(), "photo": state["photo"].reshape(5, -1, 2),
    }  # fmt: skip


class Wrapped(nn.Module):
    """As Lightning wraps a model: `_metadata` has an entry for the root, for ``model`` and for what is below."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x)


def go_and_return(remap: Callable[..., Any], run: Run, source: Path, rules: Any, suffix: str = ".pth") -> Path:
    remap(source, f"there{suffix}", rules, "--save-map", "map.json")
    code, _, err = run(
        "remap", f"there{suffix}", "-o", f"back{suffix}", "--invert", "map.json", "--force", "--no-fsync"
    )
    assert (code, err) == (0, "")
    return Path(f"back{suffix}")


def gpt2(layers: int = 2, width: int = 8) -> State:
    state: State = OrderedDict()
    for i in range(layers):
        state[f"h.{i}.attn.c_attn.weight"] = torch.randn(width, 3 * width)
        state[f"h.{i}.attn.c_attn.bias"] = torch.randn(3 * width)
        state[f"h.{i}.attn.c_proj.weight"] = torch.randn(width, width)
    return state


GPT2_APART = [
    {"transpose": "h.*.c_attn.weight"}, {"transpose": "*.c_proj.weight"},
    *[{"split": f"h.{{i}}.attn.c_attn.{leaf}", "into": [f"h.{{i}}.attn.{n}.{leaf}" for n in ("q", "k", "v")]}
      for leaf in ("weight", "bias")],
]  # fmt: skip


def in_memory(keys: list[dict[str, Any]]) -> Checkpoint:
    """A checkpoint of names and shapes only."""
    tree = {}
    for row in keys:
        shape = tuple(row["shape"])
        numel = 1
        for size in shape:
            numel *= size
        storage = Storage(Span("", 0, 4 * numel), "float32")
        tree[row["key"]] = TensorInfo("float32", shape, contiguous_stride(shape), 0, storage)
    return Checkpoint(tree)


def fused() -> tuple[State, State]:
    """Three blocks of which q, k and v are fused, and the same in other names where they are not; with other values."""
    torch.manual_seed(3)
    source: State = {}
    target: State = {}
    for i in range(3):
        for leaf, rows in (("weight", (24, 8)), ("bias", (24,))):
            source[f"h.{i}.attn.qkv.{leaf}"] = torch.randn(rows)
            for part in ("query", "key", "value"):
                target[f"layer.{i}.attention.{part}.{leaf}"] = torch.randn(8, *rows[1:])
        source[f"h.{i}.mlp.fc.weight"] = torch.randn(20, 8)
        target[f"layer.{i}.mlp.dense.weight"] = torch.randn(20, 8)
    return source, target
