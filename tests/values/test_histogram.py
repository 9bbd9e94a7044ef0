"""The histogram of `inspect --stats`: its counts against numpy.histogram's on the same edges."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from oracles import Run, Saved

import ckptool
from ckptool.core.findings import Histogram
from ckptool.io import system
from ckptool.values import histogram, scan, stats
from ckptool.values.codec import decode
from ckptool.values.stats import Moments, Workspace


def of(dtype: str, raw: bytes, sampled: bool = False) -> Histogram | None:
    return Workspace().moments(dtype, raw, sampled).stats().histogram


def assert_counts(found: Histogram | None, values: Any) -> None:
    """The counts are numpy's; the last bin of numpy has its upper edge too, which is the next one's here."""
    assert found is not None
    assert 1 <= len(found.counts) <= histogram.MOST
    edges = [found.start + number * found.width for number in range(len(found.counts) + 1)]
    assert math.frexp(found.width)[0] == 0.5, "a power of two"
    assert Fraction(found.start) % Fraction(found.width) == 0
    values = np.asarray(values)
    below, above = int((values < edges[0]).sum()), int((values >= edges[-1]).sum())
    inside = values[(values >= edges[0]) & (values < edges[-1])]
    assert found.counts == np.histogram(inside, edges)[0].tolist()
    assert (found.below, found.above) == (below, above)
    assert max(below, above) <= len(values) // 1000
    assert found.counts[0]
    assert found.counts[-1]


FLOATS = ["float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"]
SHAPES: dict[str, Any] = {
    "normal": lambda draw, size: draw.standard_normal(size),
    "small": lambda draw, size: draw.standard_normal(size) * 0.02,
    "large": lambda draw, size: draw.standard_normal(size) * 40,
    "near one": lambda draw, size: 1 + draw.standard_normal(size) * 0.01,
    "variances": lambda draw, size: np.exp(draw.standard_normal(size)),
    "one outlier": lambda draw, size: np.append(draw.standard_normal(size - 1), 60),
    "sparse": lambda draw, size: draw.standard_normal(size) * (draw.random(size) < 0.2),
    "two": lambda draw, size: np.where(draw.random(size) < 0.5, -1.0, 0.75),
    "negative": lambda draw, size: -draw.random(size),
}


@pytest.mark.parametrize("size", [2, 5000, stats.PIECE + 7])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_the_counts_of_floats_are_numpys(dtype: str, shape: str, size: int) -> None:
    tensor = torch.from_numpy(SHAPES[shape](np.random.default_rng(size), size)).to(getattr(torch, dtype))
    assert_counts(of(dtype, tensor.view(torch.uint8).numpy().tobytes()), tensor.double().numpy())


@pytest.mark.parametrize("dtype", ["int64", "int32", "int16", "int8", "uint8", "uint16", "uint32", "uint64"])
@pytest.mark.parametrize("size", [1, 50, 3000])
def test_the_counts_of_integers_are_exact(dtype: str, size: int) -> None:
    raw = np.random.default_rng(1).bytes(size * np.dtype(dtype).itemsize)
    values = np.frombuffer(raw, dtype)
    for some in (values, values // 3, values // 50, np.full(size, 7, dtype), values % 2):
        found = of(dtype, some.astype(dtype).tobytes())
        assert found is not None
        assert isinstance(found.start, int)
        ends = [found.start + number * int(found.width) for number in range(len(found.counts) + 1)]
        numbers = some.tolist()
        assert found.counts == [sum(low <= number < high for number in numbers) for low, high in pairwise(ends)]
        assert found.below + sum(found.counts) + found.above == size


def test_booleans_have_two_bins_and_complex_numbers_those_of_their_sizes() -> None:
    assert of("bool", bytes([1, 0, 1, 1])) == Histogram(0, 1, [1, 3])
    assert of("bool", bytes([0, 0])) == Histogram(0, 1, [2])
    tensor = torch.randn(4000, dtype=torch.complex64, generator=torch.Generator().manual_seed(3))
    values = decode("complex64", torch.view_as_real(tensor).numpy().tobytes())
    assert_counts(of("complex64", torch.view_as_real(tensor).numpy().tobytes()), np.abs(values))


def test_nearly_all_values_have_most_of_the_bins_and_outliers_are_counted_beside_them() -> None:
    values = np.random.default_rng(0).standard_normal(100_000).astype("f4") * 0.02
    values[:3], values[3] = 0.5, -0.4
    found = of("float32", values.tobytes())
    assert_counts(found, values)
    assert found is not None
    assert found.above >= 3
    assert found.below >= 1
    assert len(found.counts) >= 12
    assert found.width <= 0.02 / 2


@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -1.0, 0.1, 3e38, -1e-45, 5e-324])
def test_one_value_has_one_bin_of_a_width_of_its_own_size(value: float) -> None:
    dtype = "float64" if value == 5e-324 else "float32"
    values = np.full(1000, value, "f8" if dtype == "float64" else "f4")
    found = of(dtype, values.tobytes())
    assert_counts(found, values.astype("f8"))
    assert found is not None
    assert found.counts == [1000]
    assert found.width == 1 if not value else abs(value) / 256 <= found.width <= max(abs(value), 5e-324)


@pytest.mark.parametrize(
    "values",
    [
        [1e-300, -1e-300, 1.0, -1.0],
        [-5e-324, 1e308, 3.0],
        [1.0, 1.0 + 2**-52],
        [2**60 + 0.0, 2**60 + 256.0],
        [5e-324, 1e-323],
        [-1e-45, 1e30, 2e30],
        [1e308, 1.7e308],
    ],
)
def test_extreme_floats_are_in_their_bins(values: list[float]) -> None:
    assert_counts(of("float64", np.array(values).tobytes()), values)
    with np.errstate(over="ignore"):
        narrow = np.array(values, "f4")
    narrow = narrow[np.isfinite(narrow)] if np.isfinite(narrow).any() else np.zeros(2, "f4")
    assert_counts(of("float32", narrow.tobytes()), narrow.astype("f8"))


def test_where_no_value_is_finite_or_no_edge_is_there_is_none() -> None:
    top = np.finfo("f8").max
    assert of("float64", np.array([-top, top]).tobytes()) is None
    assert of("float32", np.array([np.nan, np.inf], "f4").tobytes()) is None
    assert of("float32", b"") is None
    assert_counts(of("float32", np.array([np.nan, np.inf, 2, -1], "f4").tobytes()), [2.0, -1.0])


@pytest.mark.parametrize("seed", range(20))
def test_bins_do_not_lose_a_value_where_ranges_differ_from_block_to_block(seed: int) -> None:
    draw = np.random.default_rng(seed)
    parts = [
        draw.standard_normal(draw.integers(1, 300)) * 10.0 ** draw.integers(-6, 6) + draw.integers(-9, 9)
        for _ in range(8)
    ]
    parts.insert(4, np.zeros(30))
    space, merged = Workspace(), Moments()
    for part in parts:
        merged.add(space.moments("float64", part.tobytes()))
    assert_counts(merged.stats().histogram, np.concatenate(parts))
    backwards = Moments()
    for part in reversed(parts):
        backwards.add(space.moments("float64", part.tobytes()))
    assert backwards.stats().histogram == merged.stats().histogram


def test_of_a_large_tensor_a_sample_is_counted_whatever_the_threads(
    saved: Saved, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(histogram, "MANY", 100_000)
    monkeypatch.setattr(scan, "SEGMENT", 1 << 20)
    tensor = torch.randn(700_000, generator=torch.Generator().manual_seed(2))
    path = saved({"large": tensor, "half": tensor.half(), "small": tensor[:100_000].clone()})
    found = {row.key: row.stats.histogram for row in ckptool.inspect(path, stats=True).tensors if row.stats}
    assert_counts(found["small"], tensor[:100_000].numpy())
    for key, values in (("large", tensor), ("half", tensor.half())):
        one = found[key]
        assert one is not None
        total = one.below + sum(one.counts) + one.above
        assert total == pytest.approx(700_000 / histogram.SAMPLE, rel=0.01)
        edges = [one.start + number * one.width for number in range(len(one.counts) + 1)]
        share = np.histogram(values.float().numpy(), edges)[0] / 700_000
        assert np.abs(np.array(one.counts) / total - share).max() < 0.005
    monkeypatch.setattr(system, "cores", lambda: 8)
    again = {row.key: row.stats.histogram for row in ckptool.inspect(path, stats=True).tensors if row.stats}
    assert again == found


def test_json_has_the_histogram_of_tensors_and_none_below_prefixes(saved: Saved, run: Run) -> None:
    path = saved({"a": torch.tensor([-1.0, 0.0, 0.25, 1.0]), "b": torch.tensor([math.nan])})
    [result] = json.loads(run("inspect", path, "--stats", "--json")[1])["result"]
    rows = {row["key"]: row["stats"] for row in result["tensors"]}
    found = rows["a"]["histogram"]
    assert (found["start"], found["width"], found["below"], found["above"]) == (-1.0, 0.125, 0, 0)
    assert found["counts"] == [1, *[0] * 7, 1, 0, 1, *[0] * 5, 1]
    assert "histogram" not in rows["b"]
    assert "histogram" not in result["prefixes"][0]["stats"]
