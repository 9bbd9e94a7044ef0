"""Adapters on shapes that people meet: patch embeddings, tables of positions and of biases, and what is neither."""

from __future__ import annotations

from typing import Any

import pytest
import record
import torch
from adapting import numbers, result, says_the_same
from oracles import Run, Saved
from torch.nn import functional

from ckptool.errors import CkptoolError

PATCHES, SPACED = record.patches(), record.spaced()


def near(dtype: torch.dtype) -> float:
    return max(1e-5, torch.finfo(dtype).eps)


@pytest.mark.parametrize("name", PATCHES)
def test_a_patch_embedding_is_resized_as_timm_does_it(name: str) -> None:
    says_the_same(record.small()[name], name, PATCHES[name], near(PATCHES[name].dtype))


@pytest.mark.parametrize("name", SPACED)
def test_bias_tables_are_spaced_as_timm_does_it_for_swin_and_beit(name: str) -> None:
    says_the_same(record.small()[name], name, SPACED[name], near(SPACED[name].dtype))


@pytest.mark.parametrize(("old", "new"), [(8, 16), (14, 16), (16, 32)])
def test_a_larger_patch_embedding_answers_a_resized_patch_as_the_old_one_did(old: int, new: int) -> None:
    kernel, patches = numbers(6, 3, old, old), numbers(5, 3, old, old)
    made = result("patch-embed", kernel, torch.zeros(6, 3, new, new))
    resized = functional.interpolate(patches, (new, new), mode="bicubic", antialias=True)
    before = torch.einsum("oihw,nihw->no", kernel, patches)
    torch.testing.assert_close(torch.einsum("oihw,nihw->no", made, resized), before, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("prefix", "old", "new"), [(1, 14, 24), (0, 7, 5), (2, 6, 9)])
def test_corners_are_aligned_as_torchvision_does_it(prefix: int, old: int, new: int) -> None:
    """Its `interpolate_embeddings` calls interpolate(..., mode="bicubic", align_corners=True), without antialias."""
    table = numbers(1, prefix + old * old, 8)
    made = result(f"pos-embed:align_corners=true,prefix={prefix}", table, torch.zeros(1, prefix + new * new, 8))
    grid = table[:, prefix:].permute(0, 2, 1).reshape(1, 8, old, old)
    grid = functional.interpolate(grid, size=new, mode="bicubic", align_corners=True)
    wanted = torch.cat([table[:, :prefix], grid.reshape(1, 8, -1).permute(0, 2, 1)], dim=1)
    assert torch.equal(made, wanted)


def test_a_table_by_head_keeps_its_extra_rows_and_its_middle_when_spaced() -> None:
    table = numbers(172, 4)
    made = result("rel-pos:spacing=geometric", table, torch.zeros(532, 4))
    assert torch.equal(made[-3:], table[-3:])
    assert torch.equal(made[529 // 2], table[169 // 2])  # no distance at all


KERNELS = {"a patch embedding": (48, 3, 16, 16), "a convolution": (16, 8, 7, 7), "two tables": (2, 8, 14, 14)}


@pytest.mark.parametrize("name", KERNELS)
def test_positions_have_a_leading_dimension_of_one(name: str, saved: Saved, run: Run) -> None:
    shape = KERNELS[name]
    source = saved({"k": torch.randn(shape)}, "a.pth")
    target = saved({"k": torch.zeros(*shape[:2], 8, 8)}, "b.pth")
    code, _, err = run("load-partial", source, "--into", target, "--adapt", "k=pos-embed", "-o", "o.pth")
    assert (code, err.count("\n")) == (2, 1)
    assert "1xHxWxC or 1xCxHxW; for a patch embedding's kernel, patch-embed" in err
    code, out, err = run("load-partial", source, "--into", target, "--adapt", "k=patch-embed", "-o", "o.pth")
    assert code == 0, err
    assert "patch-embed" in out


REFUSED = {
    "patch-embed": [((4, 3, 8, 8), (4, 1, 4, 4)), ((4, 192), (4, 48)), ((4, 3, 2, 8, 8), (4, 3, 2, 4, 4))],
    "rel-pos:spacing=geometric": [((169, 3), (529, 4))],
    "pos-embed:align_corners=true": [((2, 17, 4), (2, 26, 4))],
}


@pytest.mark.parametrize(("text", "old", "new"), [(text, *pair) for text, pairs in REFUSED.items() for pair in pairs])
def test_what_an_adapter_cannot_divide_it_refuses_with_both_shapes(text: str, old: Any, new: Any) -> None:
    with pytest.raises(CkptoolError, match="cannot make") as refused:
        result(text, torch.zeros(old), torch.zeros(new))
    assert "x".join(map(str, old)) in str(refused.value)


@pytest.mark.parametrize(
    "text", ["rel-pos:spacing=geometric,mode=bicubic", "rel-pos:spacing=log", "patch-embed:to=8x8"]
)
def test_options_that_contradict_are_refused(text: str, saved: Saved, run: Run) -> None:
    path = saved({"k": torch.zeros(9, 2)})
    code, _, err = run("load-partial", path, "--into", path, "--adapt", f"k={text}", "-o", "o.pth")
    assert (code, err.count("\n")) == (2, 1)
