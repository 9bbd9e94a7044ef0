"""Makes one input: `python bench/inputs.py PATH KIND NUMBER`, a process of its own, for it needs memory and packages.

The bytes are random and on disk when it ends: nothing is sparse, and nothing is downloaded.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path

LAYERS = 32


def llm(nbytes: int, vocabulary: int = 16) -> dict[str, tuple[int, ...]]:
    """The shapes of a language model of about ``nbytes`` bytes of bfloat16: 291 keys, most of them large matrices."""
    width = max(8, round((nbytes / 2 / (12 * LAYERS + 32)) ** 0.5) // 8 * 8)
    inner = width * 8 // 3
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (16 * width, width)}
    for layer in range(LAYERS):
        prefix = f"layers.{layer}."
        shapes |= {f"{prefix}self_attn.{name}_proj.weight": (width, width) for name in "qkvo"}
        shapes |= {f"{prefix}mlp.{name}_proj.weight": (inner, width) for name in ("gate", "up")}
        shapes[f"{prefix}mlp.down_proj.weight"] = (width, inner)
        shapes |= {f"{prefix}{name}.weight": (width,) for name in ("input_layernorm", "post_attention_layernorm")}
    return shapes | {"norm.weight": (width,), "lm_head.weight": (vocabulary * width, width)}


def small(keys: int) -> dict[str, tuple[int, ...]]:
    """Many keys with 32 bytes each."""
    return {f"blocks.{number // 8}.experts.{number % 8}.weight": (4, 4) for number in range(keys)}


def resnet() -> dict[str, tuple[int, ...]]:
    """The shapes of ResNet-50: 318 keys, 102 MB in float32 (its 53 counters of batches left out)."""

    def norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.{leaf}": (width,) for leaf in ("weight", "bias", "running_mean", "running_var")}

    shapes: dict[str, tuple[int, ...]] = {"conv1.weight": (64, 3, 7, 7)} | norm("bn1", 64)
    width = 64
    for stage, blocks in enumerate((3, 4, 6, 3)):
        inner = 64 << stage
        for block in range(blocks):
            name = f"layer{stage + 1}.{block}"
            for number, (out, into, kernel) in enumerate(
                ((inner, width, 1), (inner, inner, 3), (4 * inner, inner, 1)), start=1
            ):
                shapes[f"{name}.conv{number}.weight"] = (out, into, kernel, kernel)
                shapes |= norm(f"{name}.bn{number}", out)
            if not block:
                shapes[f"{name}.downsample.0.weight"] = (4 * inner, width, 1, 1)
                shapes |= norm(f"{name}.downsample.1", 4 * inner)
            width = 4 * inner
    return shapes | {"fc.weight": (1000, 2048), "fc.bias": (1000,)}


def write(path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str, legacy: bool, seed: int) -> None:
    """Writes tensors of random numbers in [0.5, 2) or, in float32, in [0.5, 1), of either sign.

    ``seed`` 1 gives other numbers than 0 in every second tensor.
    """
    import numpy as np

    from ckptool import saving
    from ckptool.core.checkpoint import Checkpoint
    from ckptool.core.tensor import Span, Storage, TensorInfo

    width = 4 if dtype == "float32" else 2
    kept, set_bits = (0x807FFFFF, 0x3F000000) if width == 4 else (0x80FF, 0x3F00)

    def numbers(seed: int, count: int) -> Callable[[], memoryview]:
        def made() -> memoryview:
            words = np.random.Generator(np.random.Philox(seed)).integers(0, 1 << 8 * width, count, f"u{width}")
            return memoryview(((words & kept) | set_bits).astype(f"u{width}").view(np.uint8))

        return made

    tree: dict[str, TensorInfo] = {}
    for number, (key, shape) in enumerate(shapes.items()):
        stride = tuple(prod(shape[dim + 1 :]) for dim in range(len(shape)))
        count = prod(shape)
        span = Span("", 0, width * count, memory=numbers(2 * number + seed * (number % 2), count))
        tree[key] = TensorInfo(dtype, shape, stride, 0, Storage(span, dtype))
    saving.save(Checkpoint(tree), path, saving.SaveOptions(to="torch-legacy" if legacy else None))


def write_whole(path: Path) -> None:
    """Writes a whole model, as only torch can: 217 modules, 289 parameters."""
    import torch
    from torch import nn

    def layer() -> nn.Module:
        return nn.Sequential(*(nn.Linear(256, 256) for _ in range(4)), nn.LayerNorm(256))

    torch.save(nn.Sequential(*(layer() for _ in range(36))), path)


def main() -> None:
    """Makes what the command line says."""
    path, kind, number = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    if kind == "whole":
        write_whole(path)
    elif kind in ("small", "resnet"):
        write(
            path,
            small(number) if kind == "small" else resnet(),
            "float32" if kind == "resnet" else "bfloat16",
            False,
            0,
        )
    elif kind == "llm-float32":
        write(path, llm(number // 2), "float32", False, 0)
    else:
        shapes = llm(number, 17 if kind == "llm-head" else 16)
        write(path, shapes, "bfloat16", kind == "llm-legacy", int(kind == "llm-other"))


if __name__ == "__main__":
    main()
