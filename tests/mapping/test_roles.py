"""What the values of a source alone say: a witness against a pair, or one of two, and never a proof."""

from __future__ import annotations

import pytest
import torch
from oracles import State

import ckptool
from ckptool.mapping.infer import infer
from ckptool.mapping.pairs import Entry, Sample

NORM, SPREAD = (1.02, 0.1, 0.7), (0.01, 0.5, -1.2)


def model(block: str, norm: str, other: str) -> list[Entry]:
    found = [Entry(f"{block}.{at}.up.weight", (24, 16)) for at in range(3)]
    return found + [Entry(f"{block}.{at}.{name}.weight", (16,)) for at in range(3) for name in (norm, other)]


def kept(looks: dict[str, Sample]) -> set[str]:
    pairs = infer(model("layers", "norm_in", "ls"), model("h", "ln_in", "ls"), samples=looks).pairs
    return {pair.target.split(".", 2)[2] for pair in pairs}


def test_the_weight_of_a_norm_that_is_spread_around_zero_is_left_out_where_others_lie_near_one() -> None:
    assert "ln_in.weight" in kept({})
    looks = {f"layers.{at}.norm_in.weight": SPREAD for at in range(3)}
    assert "ln_in.weight" in kept(looks)  # made-up weights, or 1 is added to them
    assert "ln_in.weight" not in kept(looks | {f"layers.{at}.ls.weight": NORM for at in range(3)})
    assert "ln_in.weight" in kept({f"layers.{at}.norm_in.weight": NORM for at in range(3)})


@pytest.mark.parametrize(("leaf", "look"), [("bias", NORM), ("running_var", SPREAD)])
def test_a_bias_near_one_and_a_negative_variance_are_left_out(leaf: str, look: Sample) -> None:
    def side(name: str) -> list[Entry]:
        return [Entry(f"{name}.conv.weight", (16, 3, 3, 3)), Entry(f"{name}.{name}_bn.{leaf}", (16,))]

    looks = {f"stem.stem_bn.{leaf}": look}
    assert len(infer(side("stem"), side("entry")).pairs) == 2
    assert len(infer(side("stem"), side("entry"), samples=looks).pairs) == 1
    assert len(infer(side("stem"), side("entry"), samples={f"stem.stem_bn.{leaf}": (0.0, 0.0, 0.0)}).pairs) == 2


def test_a_name_that_is_the_same_is_not_doubted_for_its_values() -> None:
    looks = {f"layers.{at}.{name}.weight": NORM for at in range(3) for name in ("norm_in", "ls")}
    looks["layers.1.norm_in.weight"] = SPREAD
    source = model("layers", "norm_in", "ls")
    assert len(infer(source, source, samples=looks).pairs) == len(source)


def test_a_source_is_looked_at_where_the_target_has_no_values_and_no_values_turns_it_off() -> None:
    def state(block: str, norm: str) -> State:
        found: State = {f"{block}.{at}.up.weight": torch.randn(24, 16) for at in range(3)}
        found |= {f"{block}.{at}.ls.weight": 1 + 0.01 * torch.randn(16) for at in range(3)}
        return found | {f"{block}.{at}.{norm}.weight": torch.linspace(-1, 1, 16) for at in range(3)}

    with torch.device("meta"):
        target = {key: torch.empty(tensor.shape) for key, tensor in state("h", "ln_in").items()}
    source = state("layers", "norm_in")
    with_values, without = (ckptool.infer(source, target, values=values)[1].pairs for values in (True, False))
    assert {pair.target for pair in without} - {pair.target for pair in with_values} == {
        f"h.{at}.ln_in.weight" for at in range(3)
    }
