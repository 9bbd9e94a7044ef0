"""The mapping between two checkpoints of different names."""

from __future__ import annotations

from ckptool.mapping.infer import infer
from ckptool.mapping.pairs import Entry


def test_wrapped_keys_find_their_own() -> None:
    source = [Entry("module.a.weight", (3, 4)), Entry("module.a.bias", (3,)), Entry("module.b.weight", (5, 5))]
    target = [Entry("a.weight", (3, 4)), Entry("a.bias", (3,)), Entry("c.scale", (7,))]
    found = infer(source, target)
    assert {pair.target: pair.source for pair in found.pairs} == {
        "a.weight": ["module.a.weight"], "a.bias": ["module.a.bias"]
    }  # fmt: skip
    assert found.only_target == ["c.scale"]
    assert found.only_source == ["module.b.weight"]
