"""What the tests of `filter` share."""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from typing import Any

from oracles import FIXTURES, State, bits

OLD, NEW, FULL = FIXTURES / "resnet_old.pth", FIXTURES / "resnet_new.pth", FIXTURES / "resnet_122.pth"
COUNTERS = 20


def result_of(text: str) -> dict[str, Any]:
    document = json.loads(text)
    assert document["schema"] == 1
    assert document["command"] == "filter"
    return document["result"]


def by_hand(target: State, *sources: State) -> State:
    """The recipe that everyone writes: what fits by name and shape, into a copy of the target."""
    merged = OrderedDict(target)
    for source in reversed(sources):
        for name, tensor in source.items():
            if name in target and target[name].shape == tensor.shape:
                merged[name] = tensor
    return merged


def assert_equal_values(one: State, other: State) -> None:
    assert list(one) == list(other)
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert tensor.shape == other[name].shape, name
        assert bits(tensor) == bits(other[name]), name


def rows_of(report: Any, **wanted: Any) -> list[str]:
    return [row.key for row in report.rows if all(getattr(row, name) == value for name, value in wanted.items())]


def listing() -> list[str]:
    return sorted(os.listdir())
