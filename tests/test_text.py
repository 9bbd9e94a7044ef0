from __future__ import annotations

import pytest

from ckptool.text import count, dims, percent, plural, size


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (37_600, "37.6 kB"), (999_499, "999 kB"), (999_500, "1 MB"),
     (4_320_000_000, "4.32 GB"), (5 * 10**18, "5000 PB")],
)  # fmt: skip
def test_sizes_have_decimal_units_and_three_digits(nbytes: int, text: str) -> None:
    assert size(nbytes) == text


def test_counts_shapes_and_shares() -> None:
    assert (count(512), count(11_689_512), plural(1, "tensor"), plural(1200, "key")) == (
        "512", "11.7 M", "1 tensor", "1,200 keys",
    )  # fmt: skip
    assert (dims((64, 3, 7)), dims(()), dims(None)) == ("64x3x7", "scalar", "nested")
    assert (dims((), "a scalar"), dims(None, none="none")) == ("a scalar", "none")
    assert [percent(one) for one in (0, 0.5, 0.99999, 1)] == ["0 %", "50.0 %", "99.9 %", "100 %"]
