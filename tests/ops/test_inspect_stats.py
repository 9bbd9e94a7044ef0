"""`inspect --stats`: every figure against torch in float64, on every dtype, layout and extreme."""

from __future__ import annotations

import io
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracles import FIXTURES, Run, Saved

import ckptool
from ckptool.core.dtypes import DTYPES
from ckptool.core.findings import Stats
from ckptool.errors import FormatError
from ckptool.io import system
from ckptool.io.files import Files
from ckptool.values import scan, stats
from ckptool.values.codec import count_special, has_values
from ckptool.values.scan import Job, read
from ckptool.values.stats import Moments, Workspace

FLOATS = ["float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz",
          "float8_e5m2fnuz"]  # fmt: skip
INTS = ["int64", "int32", "int16", "int8", "uint8", "uint16", "uint32", "uint64"]


def of(dtype: str, raw: bytes) -> Stats:
    """The statistics of little-endian elements; the histogram has tests of its own."""
    return replace(Workspace().moments(dtype, raw).stats(), histogram=None)


def stats_of(tensor: torch.Tensor) -> Stats:
    """Ours, of a tensor's bytes."""
    name = str(tensor.dtype).removeprefix("torch.")
    return of(name, tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


def expected(tensor: torch.Tensor) -> Stats:
    """What torch says in float64; of the finite values, but for the counts."""
    if tensor.is_complex():
        parts = torch.view_as_real(tensor).double()
        nan = parts.isnan().any(-1)
        inf = parts.isinf().any(-1) & ~nan
        values = parts.square().sum(-1).sqrt()[~(nan | inf)]
        counts = int((values == 0).sum()), int(nan.sum()), int(inf.sum())
    else:
        wide = (tensor.float() if tensor.dtype.is_floating_point and tensor.dtype != torch.float64 else tensor).double()
        values = wide[wide.isfinite()]
        counts = int((wide == 0).sum()), int(wide.isnan().sum()), int(wide.isinf().sum())
    if not len(values):
        return Stats(None, None, None, None, None, *counts)
    std = values.std().item() if len(values) > 1 else None
    low, high = values.min().item(), values.max().item()
    return Stats(values.mean().item(), std, low, high, max(abs(low), abs(high)), *counts)


def assert_close(ours: Stats, theirs: Stats, rel: float = 2e-7, edge: float = 0) -> None:
    """Counts are equal, extremes within ``edge``; mean and std within ``rel`` of what the values' own spread allows."""
    assert (ours.zeros, ours.nan, ours.inf) == (theirs.zeros, theirs.nan, theirs.inf)
    extremes = [(ours.min, theirs.min), (ours.max, theirs.max), (ours.abs_max, theirs.abs_max)]
    assert all(one == other for one, other in extremes) or all(
        one == pytest.approx(other, rel=edge) for one, other in extremes
    )
    assert (ours.std is None) == (theirs.std is None)
    if theirs.std is not None:
        assert ours.std == pytest.approx(theirs.std, rel=rel, abs=4e-16 * (theirs.abs_max or 0))
    if theirs.mean is None:
        assert ours.mean is None
    else:
        assert ours.mean == pytest.approx(
            theirs.mean, rel=rel, abs=rel * (theirs.std or 0) + 4e-16 * (theirs.abs_max or 0)
        )


def drawn(dtype: str, count: int, seed: int = 0) -> torch.Tensor:
    """Normal numbers, or whole ones over the dtype's whole range."""
    generator = torch.Generator().manual_seed(seed)
    kind = getattr(torch, dtype)
    if DTYPES[dtype].kind == "int":
        return torch.randint(0, 256, (count * kind.itemsize,), dtype=torch.uint8, generator=generator).view(kind)
    return torch.randn(count, dtype=torch.float64, generator=generator).mul(0.7).to(kind)


SIZES = [1, 2, 255, 257, 1000, stats.PIECE, stats.PIECE + 1]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_the_figures_of_floats_are_torchs(dtype: str, size: int) -> None:
    tensor = drawn(dtype, size)
    assert_close(stats_of(tensor), expected(tensor))


@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        pytest.param(dtype, size, marks=[pytest.mark.slow] if size > 2000 and dtype not in ("int64", "uint8") else [])
        for dtype in INTS
        for size in (1, 2, 255, 1001, stats.PIECE + 3)
    ],
)
def test_the_figures_of_integers_are_exact(dtype: str, size: int) -> None:
    tensor = drawn(dtype, size)
    values = tensor.numpy().tolist()
    ours = stats_of(tensor)
    mean = Fraction(sum(values), size)
    assert (ours.min, ours.max, ours.abs_max) == (min(values), max(values), max(map(abs, values)))
    assert all(type(figure) is int for figure in (ours.min, ours.max, ours.abs_max))
    assert ours.mean == float(mean)
    assert ours.zeros == values.count(0)
    if size > 1:
        variance = sum((value - mean) ** 2 for value in values[:2000]) / (size - 1) if size <= 2000 else None
        theirs = math.sqrt(variance) if variance is not None else np.array(values, "f8").std(ddof=1)
        assert ours.std == pytest.approx(theirs, rel=1e-12)


@pytest.mark.parametrize("dtype", [*FLOATS, "float8_e8m0fnu", "float16", "bfloat16"])
def test_every_code_of_a_small_float_counts_as_torch_has_it(dtype: str) -> None:
    width = DTYPES[dtype].bits
    if width > 16:
        pytest.skip("too many codes")
    codes = torch.arange(1 << width, dtype=torch.int32).to(torch.uint8 if width == 8 else torch.uint16)
    tensor = codes.view(getattr(torch, dtype))
    ours, theirs = stats_of(tensor), expected(tensor)
    assert_close(ours, theirs)
    assert count_special(dtype, codes.numpy().tobytes()) == (theirs.nan, theirs.inf)


def test_four_bit_floats_are_two_to_an_element() -> None:
    ours = of("float4_e2m1fn_x2", bytes([0x10, 0x7F]))  # 0, 0.5 and -6, 6
    assert (ours.min, ours.max, ours.zeros) == (-6.0, 6.0, 1)
    assert ours.mean == 0.125


def test_booleans_are_ones_and_zeros() -> None:
    tensor = torch.tensor([True, False, True, True])
    ours = stats_of(tensor)
    assert (ours.mean, ours.zeros, ours.min, ours.max) == (0.75, 1, 0, 1)
    assert ours.std == pytest.approx(tensor.double().std().item())


@pytest.mark.parametrize("dtype", ["complex64", "complex128"])
def test_of_complex_numbers_it_is_the_absolute_values(dtype: str) -> None:
    tensor = torch.randn(5000, dtype=getattr(torch, dtype))
    tensor[3], tensor[4], tensor[5] = complex(math.nan, 1), complex(1, math.inf), 0
    assert_close(stats_of(tensor), expected(tensor), 1e-6, 1e-14)
    raw = torch.view_as_real(tensor).numpy().tobytes()
    assert count_special(dtype, raw) == (1, 1)


def test_half_complex_numbers_are_told_too() -> None:
    raw = torch.tensor([3.0, 4.0, math.inf, 0.0], dtype=torch.float16).numpy().tobytes()
    assert of("complex32", raw) == Stats(5.0, None, 5.0, 5.0, 5.0, 0, 0, 1)
    assert count_special("complex32", raw) == (0, 1)


# --- extremes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize(
    "values",
    [
        [math.nan] * 5,
        [math.inf, -math.inf, math.nan],
        [1.0, math.nan, -3.0, math.inf, 2.0],
        [0.0, -0.0, 0.0],
        [-1.0, -2.0, -4.0],
        [-1.0, -2.0, -math.inf, -math.nan],
        [5.0, 7.0, 6.0],
        [0.1] * 1001,
        [],
    ],
    ids=["nan", "none finite", "mixed", "zeros", "negative", "negative inf", "positive", "constant", "empty"],
)
def test_what_is_not_finite_is_counted_and_left_out(dtype: str, values: list[float]) -> None:
    tensor = torch.tensor(values, dtype=getattr(torch, dtype))
    assert_close(stats_of(tensor), expected(tensor))


def test_a_negative_zero_is_a_zero_and_is_not_shown_as_negative() -> None:
    ours = of("float32", np.array([-0.0, -0.0], "<f4").tobytes())
    assert ours.zeros == 2
    assert [math.copysign(1, figure) for figure in (ours.min, ours.max, ours.mean)] == [1, 1, 1]  # type: ignore[arg-type]


@pytest.mark.parametrize("scale", [1e-44, 1e-38, 1e-30, 1e-14, 1e-12, 1.0, 1e14, 1e16, 1e30, 3e37])
def test_any_magnitude_of_float32_has_a_spread(scale: float) -> None:
    tensor = (torch.randn(3000, dtype=torch.float64).clamp(-3, 3) * scale).float()
    assert_close(stats_of(tensor), expected(tensor))


@pytest.mark.parametrize("exponent", [-1060, -700, -500, -465, -460, 0, 460, 465, 500, 700, 1000, 1020])
def test_any_magnitude_of_float64_has_a_spread(exponent: int) -> None:
    plain = torch.randn(3000, dtype=torch.float64).clamp(-3, 3)
    tensor = torch.ldexp(torch.ldexp(plain, torch.tensor(exponent // 2)), torch.tensor(exponent - exponent // 2))
    ours = stats_of(tensor)
    exact = torch.ldexp(torch.ldexp(tensor, torch.tensor(-(exponent // 2))), torch.tensor(exponent // 2 - exponent))
    theirs = expected(exact)
    assert ours.std == pytest.approx(math.ldexp(theirs.std or 0, exponent), rel=1e-9)
    assert ours.mean == pytest.approx(math.ldexp(theirs.mean or 0, exponent), rel=1e-9)


def test_magnitudes_that_change_from_block_to_block_are_put_together() -> None:
    size = stats.PIECE
    big, small = np.full(size, 1e200), np.full(size, 1e-200)
    big[::2] = -1e200
    ours = of("float64", np.concatenate([small, big, small]).tobytes())
    assert ours.std == pytest.approx(1e200 * math.sqrt(size / (3 * size - 1)), rel=1e-9)
    assert ours.mean == pytest.approx(0, abs=1e190)


def test_a_spread_beyond_float64_is_none() -> None:
    top = float(np.finfo("f8").max)
    assert of("float64", np.array([top, -top]).tobytes()).std is None


@pytest.mark.parametrize("offset", [1.0, 100.0, 1e4, 1e8])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_mean_far_over_the_spread_costs_no_digits(dtype: str, offset: float) -> None:
    tensor = (torch.randn(400_000, dtype=torch.float64) * offset * 1e-5 + offset).to(getattr(torch, dtype))
    theirs = expected(tensor)
    ours = stats_of(tensor)
    assert ours.std == pytest.approx(theirs.std, rel=1e-6)
    assert ours.mean == pytest.approx(theirs.mean, rel=1e-12)


def test_integers_close_together_and_far_from_zero_keep_their_spread() -> None:
    values = (2**62 + np.arange(300_000) % 7).astype("<i8")
    ours = of("int64", values.tobytes())
    assert ours.std == pytest.approx((np.arange(300_000) % 7).std(ddof=1), rel=1e-12)
    assert ours.mean == float(Fraction(sum(values.tolist()), len(values)))
    spread = np.array([-(2**63), 2**63 - 1, 0], "<i8")
    assert of("int64", spread.tobytes()).std == pytest.approx(spread.astype("f8").std(ddof=1), rel=1e-12)


# --- no drift --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("offset", [0.0, 1e-3, 3.0])
def test_a_hundred_million_elements_do_not_drift(dtype: str, offset: float) -> None:
    block = (torch.randn(1 << 20, generator=torch.Generator().manual_seed(5)) * 0.02 + offset).to(getattr(torch, dtype))
    values = block.double()
    raw = block.view(torch.uint8).numpy().tobytes()
    one = Workspace().moments(dtype, raw)
    sums = Moments()
    for _ in range(96):
        sums.add(one)
    count = 96 * len(values)
    ours = sums.stats()
    mean = values.mean().item()
    std = math.sqrt(((values - mean) ** 2).sum().item() * 96 / (count - 1))
    assert sums.count == count > 1e8
    assert ours.mean == pytest.approx(mean, rel=1e-9, abs=1e-9 * std)
    assert ours.std == pytest.approx(std, rel=2e-8)


def test_a_constant_that_float32_cannot_sum_exactly_does_not_drift() -> None:
    value = float(np.float32(0.1))
    raw = np.full(1 << 22, value, "<f4")
    assert of("float32", raw.tobytes()) == Stats(value, 0.0, value, value, value, 0, 0, 0)
    raw[::2] = -value  # two values only: every rounding of a running sum goes the same way
    raw[0] = 0
    theirs = raw.astype("f8")
    ours = of("float32", raw.tobytes())
    assert ours.std == pytest.approx(theirs.std(ddof=1), rel=1e-7)
    assert ours.mean == pytest.approx(theirs.mean(), abs=1e-8 * value)


@pytest.mark.parametrize("seed", range(20))
def test_moments_do_not_depend_on_how_the_numbers_are_split(seed: int) -> None:
    generator = np.random.default_rng(seed)
    values = (generator.standard_normal(5000) * 10.0 ** generator.integers(-5, 5) + generator.standard_normal()).astype(
        "<f8"
    )
    space = Workspace()
    merged = Moments()
    for part in np.split(values, np.sort(generator.integers(0, 5000, 7))):
        merged.add(space.moments("float64", part.tobytes()))
    assert_close(merged.stats(), of("float64", values.tobytes()), 1e-12)


# --- files -----------------------------------------------------------------------------------------------------------


def rows(path: Path, **options: Any) -> dict[str, Stats | None]:
    found = ckptool.inspect(path, stats=True, **options).tensors
    return {row.key: row.stats and replace(row.stats, histogram=None) for row in found}


ELSEWHERE = {torch.uint64, torch.uint32, torch.uint16, torch.int64, torch.complex32, torch.float4_e2m1fn_x2}
"""Held above: torch cannot compute with them, or not exactly."""


@pytest.mark.parametrize("name", ["views.pth", "big_endian.pth", "deflated.pth", "conj_neg.pth", "dtypes.pth",
                                  "tied.pth", "resnet_legacy.pth", "protocol4.pth"])  # fmt: skip
def test_any_layout_gives_what_torch_gives(name: str) -> None:
    loaded = torch.load(FIXTURES / name, weights_only=False)
    found = rows(FIXTURES / name)
    compared = 0
    for key, tensor in loaded.items():
        plain = tensor.detach().resolve_conj().resolve_neg() if isinstance(tensor, torch.Tensor) else None
        if plain is None or found.get(key) is None or plain.dtype in ELSEWHERE:
            continue
        assert_close(found[key], expected(plain), 1e-6, 1e-14 * plain.dtype.is_complex)  # type: ignore[arg-type]
        compared += 1
    assert compared


def test_one_number_has_no_deviation_and_none_has_no_figures(saved: Saved) -> None:
    found = rows(saved({"one": torch.tensor(2.5), "none": torch.zeros(0, 3), "a": torch.zeros(3)}))
    assert found["one"] == Stats(2.5, None, 2.5, 2.5, 2.5, 0, 0, 0)
    assert found["none"] == Stats(None, None, None, None, None, 0, 0, 0)
    assert found["a"] == Stats(0.0, 0.0, 0.0, 0.0, 0.0, 3, 0, 0)


def test_what_has_no_values_is_said_and_left_out(run: Run) -> None:
    report = ckptool.inspect(FIXTURES / "composite.pth", stats=True)
    assert next(row for row in report.tensors if row.key == "quantized").stats is None
    assert any(note.startswith("no statistics of quantized tensors: quantized, ") for note in report.notes)
    assert "no statistics of quantized tensors: quantized, " in run("inspect", FIXTURES / "composite.pth", "--stats")[1]
    assert not has_values("float6_e2m3fn")


def test_tied_tensors_are_read_once(saved: Saved) -> None:
    weight = torch.randn(5000)
    path = saved({"a": weight, "b": weight, "c": torch.zeros(10)})
    told: list[int] = []
    found = rows(path, progress=told.append)
    assert found["a"] == found["b"]
    assert sum(told) == 5010 * 4


def test_only_the_chosen_keys_are_read(saved: Saved, run: Run) -> None:
    path = saved({"a.w": torch.randn(50), "b.w": torch.zeros(7)})
    told: list[int] = []
    found = rows(path, include=["b.*"], progress=told.append)
    assert (found["a.w"], sum(told)) == (None, 28)
    assert found["b.w"] is not None
    out = run("inspect", path, "--stats", "--include", "b.*")[1]
    assert "b.w" in out
    assert "a.w" not in out


def test_prefixes_sum_up_what_is_below_them_each_tie_once(saved: Saved) -> None:
    shared = torch.randn(300)
    tensors = {"m.a.w": shared, "m.a.b": torch.randn(40), "m.b.w": shared, "n.w": torch.ones(3)}
    below = {one.prefix: one for one in ckptool.inspect(saved(tensors), stats=True).prefixes or []}
    assert {name: one.tensors for name, one in below.items()} == {"": 4, "m": 3, "m.a": 2}
    assert_close(below["m"].stats, expected(torch.cat([shared, tensors["m.a.b"]])))
    assert_close(below[""].stats, expected(torch.cat([shared, tensors["m.a.b"], tensors["n.w"]])))


def test_a_prefix_of_floats_and_integers_is_summed_in_float64(saved: Saved) -> None:
    path = saved({"w": torch.tensor([0.5, 1.5]), "n": torch.tensor([2, 4])})
    [top] = ckptool.inspect(path, stats=True).prefixes or []
    assert (top.stats.mean, top.stats.min, top.stats.max) == (2.0, 0.5, 4)


def test_depth_shows_the_sums(run: Run) -> None:
    _, out, _ = run("inspect", FIXTURES / "resnet_old.pth", "--stats", "--depth", "1")
    loaded = torch.load(FIXTURES / "resnet_old.pth")
    layer = torch.cat([tensor.reshape(-1) for key, tensor in loaded.items() if key.startswith("layer1.")]).double()
    [line] = [line for line in out.splitlines() if line.startswith("  layer1.*")]
    assert f"{layer.mean().item():.5g}" in line
    assert f"{layer.std().item():.5g}" in line


def test_json_has_all_of_it_and_no_nan(saved: Saved, run: Run) -> None:
    path = saved({"a": torch.tensor([math.nan, math.inf, 1.0]), "b": torch.tensor([math.nan])})
    code, out, _ = run("inspect", path, "--stats", "--json")
    [result] = json.loads(out)["result"]
    assert code == 0
    by_key = {row["key"]: row["stats"] for row in result["tensors"]}
    assert by_key["a"] == {
        "mean": 1.0,
        "std": None,
        "min": 1.0,
        "max": 1.0,
        "abs_max": 1.0,
        "zeros": 0,
        "nan": 1,
        "inf": 1,
        "histogram": {"start": 1.0, "width": 2**-7, "counts": [1], "below": 0, "above": 0},
    }
    assert by_key["b"]["mean"] is None
    assert result["prefixes"][0]["prefix"] == ""
    plain = json.loads(run("inspect", path, "--json")[1])["result"][0]
    assert "stats" not in plain["tensors"][0]
    assert not {"prefixes", "hash", "check"} & set(plain)


# --- threads, memory, failure ----------------------------------------------------------------------------------------


def test_the_figures_do_not_depend_on_the_threads(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {f"t{number}": torch.randn(10_000 + number) for number in range(30)} | {"big": torch.randn(3_000_000)}
    path = saved(tensors)
    monkeypatch.setattr(scan, "SEGMENT", 1 << 20)
    monkeypatch.setattr(scan, "BATCH", 1 << 18)
    found = []
    for threads in (1, 2, 5):
        monkeypatch.setattr(scan, "THREADS", threads)
        monkeypatch.setattr(system, "cores", lambda: 8)
        told: list[int] = []
        report = ckptool.inspect(path, stats=True, hashes=True, progress=told.append)
        assert sum(told) == sum(tensor.nbytes for tensor in tensors.values())
        found.append((report.tensors, report.hash, report.prefixes))
        stats_only = ckptool.inspect(path, stats=True)  # in segments
        assert_close(stats_only.tensors[-1].stats, expected(tensors["big"]))  # type: ignore[arg-type]
    assert found[0] == found[1] == found[2]


def test_what_fails_in_a_thread_is_raised_where_it_was_asked_for(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved({f"t{number}": torch.randn(200_000) for number in range(10)})
    checkpoint = ckptool.open(path)
    monkeypatch.setattr(scan, "BATCH", 1 << 16)
    monkeypatch.setattr(system, "cores", lambda: 4)
    with path.open("ab") as file:
        file.write(b"x")
    with pytest.raises(FormatError, match="was changed since it was opened"):
        ckptool.inspect(checkpoint, stats=True)


def test_an_interrupt_ends_the_threads(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    path = saved({f"t{number}": torch.randn(500_000) for number in range(20)})
    monkeypatch.setattr(scan, "BATCH", 1 << 16)
    monkeypatch.setattr(system, "cores", lambda: 4)

    def impatient(nbytes: int) -> None:
        raise KeyboardInterrupt

    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        ckptool.inspect(path, stats=True, progress=impatient)
    assert threading.active_count() == before


def test_no_job_reads_nothing() -> None:
    read([], Files())
    job = Job(ckptool.open(FIXTURES / "tied.pth").state_dict()["twin"])
    with Files() as files:
        read([job], files)
    assert (job.found_moments, job.digest, job.crc32) == (None, None, None)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc")
def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    peaks = []
    for numel in (1 << 20, 1 << 27):
        path = tmp_path / f"{numel}.safetensors"
        header = json.dumps({"w": {"dtype": "BF16", "shape": [numel], "data_offsets": [0, 2 * numel]}}).encode()
        path.write_bytes(len(header).to_bytes(8, "little") + header)
        os.truncate(path, 8 + len(header) + 2 * numel)
        code = (
            "import sys, re, ckptool.cli\n"
            "ckptool.cli.main(['inspect', sys.argv[1], '--stats', '--hash', '--check'])\n"
            "print(int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) // 1024, file=sys.stderr)\n"
        )
        done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
        peaks.append(int(done.stderr.splitlines()[-1]))
    assert peaks[1] < 100
    assert peaks[1] - peaks[0] < 16


MODULES = """
import sys
from ckptool.cli import main
main(sys.argv[1:])
print(*sorted(sys.modules), file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("option", "without"),
    [
        (
            "--flat",
            {
                "numpy",
                "torch",
                "ckptool.values.contents",
                "ckptool.values.scan",
                "ckptool.values.stats",
                "ckptool.core.findings",
            },
        ),
        ("--hash", {"numpy", "torch"}),
        ("--stats", {"torch", "rich"}),
        ("--check", {"torch", "rich"}),
    ],
)
def test_each_option_imports_what_it_needs(option: str, without: set[str]) -> None:
    command = [sys.executable, "-c", MODULES, "inspect", str(FIXTURES / "resnet_old.pth"), option]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ}, check=True)
    assert not without & set(done.stderr.splitlines()[-1].split())


def test_the_environment_of_a_library_user_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
    ckptool.inspect(FIXTURES / "resnet_old.pth", stats=True)
    assert "OPENBLAS_NUM_THREADS" not in os.environ


@pytest.mark.parametrize("extra", [["--keys", "--stats"], ["--keys", "--check"], ["--depth", "1", "--hash"]])
def test_options_that_contradict_each_other_are_refused(extra: list[str], refused: Callable[..., str]) -> None:
    assert "--" in refused("inspect", FIXTURES / "tied.pth", *extra)


@pytest.mark.parametrize("option", ["--stats", "--hash", "--check"])
def test_a_bar_of_bytes_reaches_its_end_on_a_terminal(
    option: str, saved: Saved, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int]] = []

    class Bar:
        def __init__(self, total: int) -> None:
            self.total = total

        def update(self, task: int, completed: int) -> None:
            seen.append((completed, self.total))

        def stop(self) -> None:
            pass

    from ckptool.cli import progress

    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(progress, "PATIENCE", -1)
    monkeypatch.setattr(progress, "_started", lambda phase, total: (Bar(total), 0))
    weight = torch.randn(3_000_000)
    assert run("inspect", saved({"a": weight, "b": weight, "c": torch.ones(5, dtype=torch.int32)}), option)[0] == 0
    completed, total = seen[-1]
    assert completed == pytest.approx(total, rel=0.01)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_statistics_show_a_histogram_as_a_line_of_characters(
    run: Run, saved: Saved, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ckptool.cli.screens.inspect import sparkline

    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), "utf-8"))
    assert sparkline([4, 4, 0, 0, 1, 0, 2, 2]) == "█ ▁▄"
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
    assert sparkline([4, 4, 0, 0, 1, 0, 2, 2]) == "@ .="
    assert sparkline([]) == ""
