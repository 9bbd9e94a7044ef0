from __future__ import annotations

import itertools
import math
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracles import FIXTURES, bits, seed_torch

from ckptool.core.dtypes import DTYPES
from ckptool.errors import UnsupportedError
from ckptool.formats import read
from ckptool.io.files import Files
from ckptool.values.codec import decode, decode_unordered, has_values
from ckptool.values.compare import compare

Compare = Callable[..., Any]

EIGHT_BITS = [name for name, row in DTYPES.items() if name.startswith("float8")]


def same(ours: np.ndarray[Any, Any], theirs: torch.Tensor) -> None:
    np.testing.assert_array_equal(ours, theirs.numpy())


@pytest.mark.parametrize("name", EIGHT_BITS)
def test_every_code_of_an_eight_bit_float_means_what_it_means_in_torch(name: str) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    theirs = codes.view(getattr(torch, name)).to(torch.float32).double()
    ours = decode(name, bytes(range(256)))
    same(ours, theirs)
    assert not ((ours == 0) & (np.signbit(ours) != np.signbit(theirs.numpy()))).any()  # -0.0


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_every_code_of_a_sixteen_bit_float_means_what_it_means_in_torch(name: str) -> None:
    codes = np.arange(65536, dtype="<u2")
    theirs = torch.from_numpy(codes.view("<i2")).view(getattr(torch, name)).double()
    same(decode(name, codes.tobytes()), theirs)


def test_every_byte_of_packed_four_bit_floats_is_two_values_low_nibble_first() -> None:
    # OCP Microscaling 1.0, table 5 (E2M1); torch cannot unpack them on a CPU
    magnitudes = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    table = magnitudes + [-value for value in magnitudes]
    expected = list(itertools.chain.from_iterable((table[code & 15], table[code >> 4]) for code in range(256)))
    ours = decode("float4_e2m1fn_x2", bytes(range(256)))
    assert ours.tolist() == expected
    assert math.copysign(1, ours[0]) == 1
    assert math.copysign(1, ours[2 * 0x08]) == -1


@pytest.mark.parametrize(
    "name",
    ["float64", "float32", "int64", "int32", "int16", "int8", "uint8", "uint16", "uint32", "uint64", "bool",
     "complex64", "complex128"],
)  # fmt: skip
def test_the_wide_dtypes_decode_to_torchs_values(name: str) -> None:
    seed_torch(1)
    raw = torch.randint(0, 2 if name == "bool" else 256, (40 * getattr(torch, name).itemsize,), dtype=torch.uint8)
    theirs = raw.view(getattr(torch, name))
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(decode(name, raw.numpy().tobytes()), theirs.numpy())


def test_half_complex_numbers_decode() -> None:
    pair = torch.tensor([1.5, -2.0, 0.25, 8.0], dtype=torch.float16)
    assert decode("complex32", bits(pair)).tolist() == [1.5 - 2j, 0.25 + 8j]


def test_quantised_bytes_have_no_values_of_their_own() -> None:
    with pytest.raises(UnsupportedError):
        decode("qint8", b"\x00")
    assert not has_values("qint8")
    assert not has_values("float6_e2m3fn")
    assert has_values("float8_e5m2")


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16", *EIGHT_BITS, "float4_e2m1fn_x2"])
@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("count", [1, 3, 1001])
def test_in_any_order_the_values_are_the_same(name: str, special: bool, count: int) -> None:
    """And two tensors come in the same order, whether they hold NaN and infinities or not."""
    codes = np.random.default_rng(count).integers(0, 256, count * max(DTYPES[name].bits // 8, 1), "u1")
    if not special and name in ("float16", "bfloat16"):
        codes[1::2] &= 0xBF  # no exponent is all ones
    out, order = np.empty(2 * count, "f4"), np.empty(2 * count, "f4")
    ours = decode_unordered(name, codes.tobytes(), out)
    np.testing.assert_array_equal(np.sort(ours), np.sort(decode(name, codes.tobytes()).astype("f4")))
    if name == "float16":
        numbered = np.arange(1, count + 1, dtype="<f2")
        plain = decode_unordered(name, numbered.tobytes(), order).copy()
        numbered[0] = np.inf
        mixed = decode_unordered(name, numbered.tobytes(), out)
        np.testing.assert_array_equal(plain[1:], mixed[1:])


def test_packed_four_bit_floats_are_equal_or_not(compared: Compare) -> None:
    one = torch.arange(8, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    other = torch.arange(8, dtype=torch.uint8).flip(0).view(torch.float4_e2m1fn_x2)
    assert compared(one, one.clone()).status == "equal"
    assert (compared(one, other).status, compared(one, other).max_abs) == ("differ", None)


# --- compare ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def compared(saved: Callable[..., Path]) -> Compare:
    def run(a: torch.Tensor, b: torch.Tensor, rtol: float = 1e-5, atol: float = 1e-8) -> Any:
        one, other = read(str(saved({"x": a}, "a.pth"))), read(str(saved({"x": b}, "b.pth")))
        with Files() as files:
            return compare(one.tree["x"], other.tree["x"], files, rtol, atol)

    return run


@pytest.mark.parametrize("seed", range(25))
def test_close_is_what_torch_allclose_says(seed: int, compared: Compare) -> None:
    seed_torch(seed)
    a = torch.randn(50, dtype=torch.float64)
    b = a + torch.randn(50, dtype=torch.float64) * 10.0 ** -(3 + seed % 9)
    if seed % 5 == 0:
        a[3] = b[3] = math.nan
    if seed % 7 == 0:
        a[4] = math.inf
    expected = torch.allclose(a, b, rtol=1e-5, atol=1e-8, equal_nan=True)
    assert (compared(a, b).status != "differ") == expected


def test_distances_are_numpys(compared: Compare) -> None:
    seed_torch(2)
    a, b = torch.randn(7, 5), torch.randn(7, 5)
    found = compared(a, b)
    one, other = a.double().numpy(), b.double().numpy()
    assert found.status == "differ"
    assert found.max_abs == pytest.approx(np.abs(one - other).max())
    assert found.rel_l2 == pytest.approx(np.linalg.norm(one - other) / np.linalg.norm(one))


def test_equal_values_are_equal_over_strides_and_dtypes(compared: Compare) -> None:
    a = torch.arange(12.0).view(3, 4)
    assert compared(a, a.t().contiguous().t()).status == "equal"
    assert compared(a, a.bfloat16()).status == "equal"
    assert compared(a, a.to(torch.int16)).status == "equal"
    assert compared(a, a.to(torch.complex64)).status == "equal"


def test_nan_equals_nan_and_zero_equals_minus_zero(compared: Compare) -> None:
    assert compared(torch.tensor([math.nan, 0.0]), torch.tensor([math.nan, -0.0])).status == "equal"
    found = compared(torch.tensor([1.0, math.nan]), torch.tensor([1.0, 2.0]))
    assert (found.status, found.max_abs) == ("differ", None)


def test_a_nan_in_bfloat16_is_never_healthy(compared: Compare) -> None:
    one = torch.tensor([1.0, math.nan], dtype=torch.bfloat16)
    assert compared(one, torch.ones(2, dtype=torch.bfloat16)).status == "differ"


def test_integers_are_exact_where_floats_would_round(compared: Compare) -> None:
    big = torch.tensor([(1 << 62) + 1, -(1 << 63)])
    found = compared(big, torch.tensor([1 << 62, -(1 << 63)]))
    assert (found.status, found.max_abs) == ("differ", 1.0)
    found = compared(torch.tensor([-(1 << 63)]), torch.tensor([(1 << 63) - 1]))
    assert found.max_abs == float((1 << 64) - 1)


def test_integers_of_two_widths_are_still_exact(compared: Compare) -> None:
    near = torch.tensor([1_000_000])
    assert compared(near, torch.tensor([1_000_001], dtype=torch.int32)).status == "differ"


def test_booleans_compare_as_booleans(compared: Compare) -> None:
    assert compared(torch.tensor([True, False]), torch.tensor([True, True])).status == "differ"


def test_scalars_and_empty_tensors_compare(compared: Compare) -> None:
    assert compared(torch.tensor(2.0), torch.tensor(2.0)).status == "equal"
    assert compared(torch.tensor(2.0), torch.tensor(3.0)).max_abs == 1.0
    assert compared(torch.empty(0, 3), torch.empty(0, 3, dtype=torch.int8)).status == "equal"


def test_lazy_conjugation_counts(compared: Compare) -> None:
    z = torch.tensor([1 + 2j, 3 - 1j])
    assert compared(z.conj(), z.conj().resolve_conj()).status == "equal"
    assert compared(z.conj(), z).status == "differ"


def test_sparse_and_quantised_tensors_compare_by_their_parts() -> None:
    once, again = read(str(FIXTURES / "composite.pth")), read(str(FIXTURES / "composite.pth"))
    with Files() as files:
        for key in ("quantized", "quantized_channel", "coo", "csr", "nested", "meta"):
            assert compare(once.tree[key], again.tree[key], files, 0, 0).status == "equal", key
        assert compare(once.tree["coo"], once.tree["csr"], files, 0, 0).status == "differ"


def test_large_tensors_in_a_deflated_file_are_compared_to_the_last_element(tmp_path: Path) -> None:
    # Inflating gives pieces of any size; none of them may end the comparison.
    seed_torch(3)
    a = torch.randn(300_001, dtype=torch.float64)
    b = a.clone()
    b[-1] += 1
    for name, tensor in (("a", a), ("b", b.float().double())):
        torch.save({"x": tensor}, tmp_path / f"{name}.stored")
        with (
            zipfile.ZipFile(tmp_path / f"{name}.stored") as old,
            zipfile.ZipFile(tmp_path / f"{name}.pth", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as new,
        ):
            for item in old.namelist():
                new.writestr(item, old.read(item))
    one, other = read(str(tmp_path / "a.pth")).tree["x"], read(str(tmp_path / "b.pth")).tree["x"]
    with Files() as files:
        found = compare(one, other, files, 1e-5, 1e-8)
    assert found.status == "differ"
    assert found.max_abs == pytest.approx(1.0, abs=1e-5)
