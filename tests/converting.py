"""What the tests of `convert` share."""

from __future__ import annotations

from typing import Any

import pytest
from oracles import State, bits, tied_groups

from ckptool.io.output import LocalOutput


def assert_same_state(found: State, expected: State) -> None:
    """Equal keys, order, shapes, dtypes, values to the bit, and ties."""
    assert list(found) == list(expected)
    for key, tensor in expected.items():
        assert (found[key].dtype, found[key].shape) == (tensor.dtype, tensor.shape), key
        assert bits(found[key]) == bits(tensor), key
    assert tied_groups(found) == tied_groups(expected)


def damaged(monkeypatch: pytest.MonkeyPatch, nbytes: int) -> None:
    """From now on one byte of what is written goes to the file another than it was given: in every block as large."""
    write = LocalOutput.write

    def flip(self: LocalOutput, data: Any) -> None:
        wrong = bytearray(data)
        if len(data) >= nbytes:
            wrong[nbytes // 2] ^= 1
        write(self, bytes(wrong))

    monkeypatch.setattr(LocalOutput, "write", flip)
