"""How far two tensors are apart, against float64 arithmetic of numpy and torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from oracles import seed_torch

import ckptool
from ckptool.core.findings import Distance
from ckptool.io.files import Files
from ckptool.values import distance
from ckptool.values.compare import compare

Saved = Callable[..., Path]
INF, NAN = math.inf, math.nan


@pytest.fixture
def apart(saved: Saved) -> Callable[[torch.Tensor, torch.Tensor], Distance]:
    def found(a: torch.Tensor, b: torch.Tensor) -> Distance:
        one, other = (
            ckptool.open(saved({"w": x}, f"{name}.pth")).state_dict()["w"] for name, x in (("a", a), ("b", b))
        )
        with Files() as files:
            return compare(one, other, files, 1e-5, 1e-8)

    return found


Apart = Callable[[torch.Tensor, torch.Tensor], Distance]


def expected(a: torch.Tensor, b: torch.Tensor) -> tuple[float, float]:
    """The mean of |a - b| and the cosine, in double precision."""
    wide = torch.complex128 if a.is_complex() else torch.float64
    one, other = a.to(wide).flatten(), b.to(wide).flatten()
    cosine = torch.vdot(one, other).real / (one.abs().square().sum().sqrt() * other.abs().square().sum().sqrt())
    return (one - other).abs().mean().item(), cosine.item()


@pytest.mark.parametrize("name", ["float64", "float32", "float16", "bfloat16", "complex64", "float8_e4m3fn"])
@pytest.mark.parametrize("count", [1, 100, 40_000])
@pytest.mark.parametrize(("keep", "add"), [(1, 1e-1), (-1, 1e-1), (0, 1), (1e-3, 0), (1, 0.02), (300, 1)])
def test_mean_abs_and_cosine_of_floats_are_those_of_double_precision(
    name: str, count: int, keep: float, add: float, apart: Apart, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distance, "PIECE", 1 << 13)
    seed_torch(count)
    dtype = getattr(torch, name)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    base, noise = torch.randn(count, dtype=wide), torch.randn(count, dtype=wide)
    a, b = base.to(dtype), (keep * base + add * noise).to(dtype)
    found = apart(a, b)
    if not bool(b.to(wide).isfinite().all()):  # float8 has no 300
        assert (found.mean_abs, found.cosine) == (None, None)
        return
    mean, cosine = expected(a, b)
    if not mean:
        assert (found.status, found.mean_abs, found.cosine) == ("equal", 0.0, 1.0)
        return
    assert found.mean_abs == pytest.approx(mean, rel=1e-6)
    if not b.any():
        assert found.cosine is None
        return
    assert found.cosine == pytest.approx(cosine, abs=1e-6)
    assert -1 <= (found.cosine or 0) <= 1


@pytest.mark.parametrize("name", ["float64", "float32"])
@pytest.mark.parametrize("step", [1e-2, 1e-3, 1e-4])
def test_a_cosine_near_one_keeps_what_tells_it_from_one(name: str, step: float, apart: Apart) -> None:
    seed_torch(3)
    a = torch.randn(50_000, dtype=torch.float64)
    a, b = (part.to(getattr(torch, name)) for part in (a, a + step * torch.randn(50_000, dtype=torch.float64)))
    one, other = a.double(), b.double()
    unit = one / one.norm() - other / other.norm()
    assert 1 - (apart(a, b).cosine or 0) == pytest.approx((unit @ unit / 2).item(), rel=1e-3)


@pytest.mark.parametrize("factor", [1e-6, 1e6])
@pytest.mark.parametrize("name", ["float64", "float32", "bfloat16"])
def test_a_cosine_of_norms_of_other_magnitudes_is_not_lost(name: str, factor: float, apart: Apart) -> None:
    seed_torch(4)
    a, b = torch.randn(30_000).to(getattr(torch, name)), (torch.randn(30_000) * factor).to(getattr(torch, name))
    assert apart(a, b).cosine == pytest.approx(expected(a, b)[1], abs=1e-7)
    assert apart(a, (a.double() * factor).to(a.dtype)).cosine == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("name", ["bool", "uint8", "int8", "int16", "int32", "int64"])
@pytest.mark.parametrize("count", [7, 20_000])
def test_mean_abs_and_cosine_of_integers_and_booleans(name: str, count: int, apart: Apart) -> None:
    seed_torch(5)
    a, b = (torch.randint(0, 2 if name == "bool" else 100, (count,)).to(getattr(torch, name)) for _ in range(2))
    a[0], b[0], a[1], b[1] = 1, 1, 0, 1
    found = apart(a, b)
    assert (found.mean_abs, found.cosine) == pytest.approx(expected(a, b), rel=1e-12)


@pytest.mark.parametrize("name", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("count", [10, 20_000])
def test_not_finite_on_one_side_has_no_mean_and_no_cosine_and_on_both_sides_counts_as_equal(
    name: str, count: int, apart: Apart
) -> None:
    seed_torch(6)
    a = torch.randn(count).to(getattr(torch, name))
    for odd in (NAN, INF):
        b = a.clone()
        b[3] = odd
        found = apart(a, b)
        assert (found.max_abs, found.rel_l2, found.mean_abs, found.cosine) == (None, None, None, None)
        one, other = b.clone(), b.clone()
        other[5] += 1
        found = apart(one, other)
        gap = abs(one[5].double() - other[5].double()).item()
        one[3] = other[3] = 0
        assert found.mean_abs == pytest.approx(gap / count, rel=1e-6)
        assert found.cosine == pytest.approx(expected(one, other)[1], abs=1e-7)


@pytest.mark.parametrize("count", [4, 20_000])
def test_zeros_have_no_angle_to_anything(count: int, apart: Apart) -> None:
    zeros, ones = torch.zeros(count), torch.ones(count)
    for a, b in ((zeros, ones), (ones, zeros)):
        found = apart(a, b)
        assert (found.mean_abs, found.cosine) == (1.0, None)
    assert apart(zeros, -zeros).cosine == 1.0  # other bytes, no difference


def test_huge_and_tiny_numbers_neither_overflow_nor_vanish(apart: Apart) -> None:
    a = torch.tensor([1e200, 0.0], dtype=torch.float64)
    for size in (1e200, 1.0, 1e-300, 1e300):
        assert apart(a, torch.full_like(a, size)).cosine == pytest.approx(0.5**0.5, rel=1e-12)


def test_the_mean_counts_every_element_of_every_block(apart: Apart) -> None:
    count = 3 * 2**18 + 5
    a = torch.zeros(count)
    a[:10] = 1
    b = a.clone()
    b[-7:] = 2
    found = apart(a, b)
    assert (found.mean_abs, found.cosine) == (pytest.approx(14 / count, rel=1e-7), pytest.approx(10 / (10 * 38) ** 0.5))
