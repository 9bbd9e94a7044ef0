"""What the values of two checkpoints settle of the mapping between them: judged by plain torch."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from oracles import State

import ckptool
from ckptool.api.matching import decided_by_values
from ckptool.mapping.chains import chain
from ckptool.mapping.infer import infer
from ckptool.mapping.pairs import Entry, Inferred, Pair
from ckptool.mapping.values import Settled


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed * 1000 + sum(shape)))


def decided(source: Any, target: Any) -> tuple[Inferred, Settled]:
    """What names (those of equal keys) and values say of two checkpoints."""
    sides = [ckptool.open(one) for one in (source, target)]

    def propose(settled: Sequence[Pair], samples: object = None) -> Inferred:
        entries = [[Entry(key, one.shape or ()) for key, one in side.state_dict().items()] for side in sides]
        return infer(*entries, settled=settled)

    return decided_by_values(*sides, propose)


def settled(source: State, target: State) -> dict[str, tuple[list[str], str]]:
    """{target: (sources, operation)} of what values settle. Each pair is certain, and known to the rules."""
    found = decided(source, target)[1]
    shapes = {key: tuple(one.shape) for key, one in source.items()}
    for pair in found.pairs:
        assert (pair.confidence, pair.witnesses, pair.unproven) == (1.0, ["values"], None)
        chain(pair, shapes, tuple(target[pair.target].shape))
    return {pair.target: (pair.source, pair.op) for pair in found.pairs}


def woven(pieces: Sequence[torch.Tensor], heads: int) -> torch.Tensor:
    return torch.cat([one.unflatten(0, (heads, -1)) for one in pieces], 1).flatten(0, 1)


def paired(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of heads in rotary order: two halves become pairs."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


A, B, C = (random(48, 32, seed=seed) for seed in range(3))
SQUARE, STACK, KERNEL = random(32, 32, seed=7), random(4, 24, 16), random(3, 3, 8, 16)
K, V = random(16, 32, seed=3), random(16, 32, seed=4)
LONG = [random(48, seed=seed) for seed in range(5, 8)]
EXPERTS = {f"e{number}.{part}": random(12, 20, seed=10 + 3 * number + at)
           for number in range(3) for at, part in enumerate(("gate", "up"))}  # fmt: skip
GATED = [torch.cat([EXPERTS[f"e{number}.gate"], EXPERTS[f"e{number}.up"]]) for number in range(3)]

CASES: dict[str, tuple[State, torch.Tensor, list[str], str]] = {
    "the same": ({"a": A, "b": B}, A, ["a"], "rename"),
    "at a lower precision": ({"a": A, "b": B}, B.bfloat16(), ["b"], "rename"),
    "at another lower precision": ({"a": A.double(), "b": B.double()}, A.half(), ["a"], "rename"),
    "from a lower precision": ({"a": A.half(), "b": B.half()}, B.half().float(), ["b"], "rename"),
    "transposed": ({"a": A, "b": B}, A.T, ["a"], "transpose"),
    "a square one transposed": ({"a": SQUARE}, SQUARE.T, ["a"], "transpose"),
    "a square one not transposed": ({"a": SQUARE, "b": random(32, 32, seed=8)}, SQUARE, ["a"], "rename"),
    "transposed at a lower precision": ({"a": SQUARE}, SQUARE.T.bfloat16(), ["a"], "transpose"),
    "another order of dimensions": ({"a": KERNEL}, KERNEL.permute(3, 2, 0, 1), ["a"], "permute:3,2,0,1"),
    "height and width exchanged": ({"a": KERNEL}, KERNEL.transpose(0, 1), ["a"], "permute:1,0,2,3"),
    "flat": ({"a": KERNEL}, KERNEL.flatten(1), ["a"], "reshape"),
    "by heads, turned": ({"a": random(32, 4, 8)}, random(32, 4, 8).flatten(1).T, ["a"], "permute:1,2,0;reshape"),
    "heads behind the dimension": ({"a": random(4, 8, 32)}, random(4, 8, 32).flatten(0, 1).T, ["a"],
                                   "permute:2,0,1;reshape"),
    "in pairs, for rotary embeddings": ({"a": A}, paired(A, 6), ["a"], "rope_interleave:0:6"),
    "in halves": ({"a": paired(A, 2)}, A, ["a"], "rope_deinterleave:0:2"),
    "columns in pairs": ({"a": A}, paired(A.T, 4).T, ["a"], "rope_interleave:1:4"),
    "fused": ({"q": A, "k": B, "v": C}, torch.cat([A, B, C]), ["q", "k", "v"], "concat:0"),
    "fused in another order": ({"q": A, "k": B, "v": C}, torch.cat([C, A, B]), ["v", "q", "k"], "concat:0"),
    "biases fused": (dict(zip("qkv", LONG, strict=True)), torch.cat(LONG), ["q", "k", "v"], "concat:0"),
    "fused along columns": ({"q": A, "k": B}, torch.cat([A, B], 1), ["q", "k"], "concat:1"),
    "fused after a transposition": ({"q": A, "k": B}, torch.cat([A.T, B.T], 1), ["q", "k"], "transpose;concat:1"),
    "fused squares transposed": ({"q": SQUARE, "k": random(32, 32, seed=9)},
                                 torch.cat([SQUARE.T, random(32, 32, seed=9).T]), ["q", "k"], "transpose;concat:0"),
    "fused of unequal sizes": ({"q": A, "k": K, "v": V}, torch.cat([A, K, V]), ["q", "k", "v"], "concat:0"),
    "fused and cast": ({"q": A, "k": K}, torch.cat([A, K]).bfloat16(), ["q", "k"], "concat:0"),
    "woven by heads": ({"q": A, "k": B, "v": C}, woven([A, B, C], 6), ["q", "k", "v"],
                       "reshape:6,8,32;concat:1;reshape"),
    "biases woven by heads": (dict(zip("qkv", LONG, strict=True)), woven(LONG, 4), ["q", "k", "v"],
                              "reshape:4,12;concat:1;reshape"),
    "woven by groups of heads": ({"q": A, "k": K, "v": V}, woven([A, K, V], 2), ["q", "k", "v"],
                                 "concat:1<reshape:2,24,32|reshape:2,8,32|reshape:2,8,32>;reshape"),
    "fused of rotary parts": ({"q": A, "k": K, "v": V}, torch.cat([paired(A, 6), paired(K, 2), V]), ["q", "k", "v"],
                              "concat:0<rope_interleave:0:6|rope_interleave:0:2|rename>"),
    "a third of it": ({"qkv": torch.cat([A, B, C])}, B, ["qkv"], "split:0:1/3"),
    "a slice of it": ({"qkv": torch.cat([A, K, V])}, V, ["qkv"], "split:0:4/5"),
    "an unequal slice": ({"qkv": torch.cat([A[:40], K, V])}, K, ["qkv"], "slice:0:40:56"),
    "a third of its columns": ({"qkv": torch.cat([A.T, B.T, C.T], 1)}, C.T, ["qkv"], "split:1:2/3"),
    "a third of its columns, turned": ({"qkv": torch.cat([A.T, B.T, C.T], 1)}, C, ["qkv"], "split:1:2/3;transpose"),
    "a part of every head": ({"qkv": woven([A, B, C], 6)}, B, ["qkv"], "reshape:6,24,32;split:1:1/3;reshape"),
    "a part of a bias by heads": ({"qkv": woven(LONG, 6)}, LONG[2], ["qkv"], "reshape:6,24;split:1:2/3;reshape"),
    "a part of every group": ({"qkv": woven([A, K, V], 2)}, K, ["qkv"], "reshape:2,40,32;split:1:3/5;reshape"),
    "a rotary part of every head": ({"qkv": woven([A, B, C], 6)}, paired(B, 6), ["qkv"],
                                    "reshape:6,24,32;split:1:1/3;reshape:48,32;rope_interleave:0:6"),
    "blocks become heads": ({"qkv": torch.cat([A, B, C])}, woven([A, B, C], 6), ["qkv"],
                            "reshape:3,6,8,32;permute:1,0,2,3;reshape"),
    "an expert": ({"w": STACK}, STACK[2], ["w"], "split:0:2/4;reshape"),
    "an expert turned": ({"w": STACK}, STACK[1].T, ["w"], "permute:0,2,1;split:0:1/4;reshape"),
    "half of an expert": ({"w": STACK}, STACK[3, 12:], ["w"], "split:0:3/4;split:1:1/2;reshape"),
    "every other row of an expert": ({"w": STACK}, STACK[3, ::2], ["w"],
                                     "split:0:3/4;reshape:1,12,2,16;split:2:0/2;reshape"),
    "half of all experts": ({"w": STACK}, STACK[:, :12], ["w"], "split:1:0/2"),
    "experts stacked": (EXPERTS, torch.stack([EXPERTS[f"e{n}.up"] for n in range(3)]),
                        [f"e{n}.up" for n in range(3)], "concat:0;reshape"),
    "fused experts stacked": (EXPERTS, torch.stack(GATED), [*EXPERTS], "concat:0;reshape"),
    "fused experts stacked and turned": (EXPERTS, torch.stack([one.T for one in GATED]), [*EXPERTS],
                                         "concat:0;reshape:3,24,20;permute:0,2,1"),
    "integers": ({"a": torch.arange(100) * 7 % 101, "b": torch.arange(100)}, torch.arange(100) * 7 % 101, ["a"],
                 "rename"),
    "with NaN and infinities": ({"a": torch.where(A > 1, torch.nan, A), "b": torch.where(A > 1, torch.inf, A)},
                                torch.where(A > 1, torch.inf, A).T, ["b"], "transpose"),
    "complex": ({"a": torch.complex(A, B), "b": torch.complex(B, A)}, torch.complex(B, A).T, ["b"], "transpose"),
    "with rows of zeros": ({"q": torch.cat([A, 0 * K]), "k": torch.cat([B, 0 * K])},
                           torch.cat([A, 0 * K, B, 0 * K]), ["q", "k"], "concat:0"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_values_show_how_a_tensor_is_made(case: str) -> None:
    source, tensor, keys, op = CASES[case]
    noise = {"other": random(9, 9, seed=50), "ones": torch.ones(32)}
    target = {"t": tensor.contiguous(), "new": random(48, 32, seed=51), "ones": torch.ones(32)}
    assert settled(noise | source, target) == {"t": (keys, op)}


def test_what_is_near_is_settled_where_nothing_else_is_as_near() -> None:
    source = {f"l{number}.w": random(40, 32, seed=number) for number in range(6)}
    target = {
        f"m{number}": random(40, 32, seed=number) + 0.05 * random(40, 32, seed=90 + number) for number in range(6)
    }
    target |= {"turned": (random(40, 32, seed=2) * 1.01).T.contiguous(), "new": random(40, 32, seed=70)}
    del target["m2"], source["l5.w"]
    found = settled(source, target)
    assert found == {f"m{n}": ([f"l{n}.w"], "rename") for n in (0, 1, 3, 4)} | {"turned": (["l2.w"], "transpose")}
    apart = decided(source, target)[1].apart
    assert all(0.04 < apart[f"m{n}"] < 0.06 for n in (0, 1, 3, 4))
    assert 0.009 < apart["turned"] < 0.011


def test_two_sources_as_near_as_each_other_are_left_to_names() -> None:
    one = random(40, 32)
    source = {"w": one, "ema.w": one + 0.02 * random(40, 32, seed=1)}
    assert settled(source, {"x": one + 0.02 * random(40, 32, seed=2)}) == {}


@pytest.mark.parametrize(
    ("what", "source", "target"),
    [
        ("up to sign", A, -A),
        ("up to a factor", A, 2 * A),
        ("up to one element", A, A.index_put((torch.tensor(5), torch.tensor(6)), torch.tensor(9.0))),
        ("the same bytes as integers", A, A.view(torch.int32)),
        ("a mirror image", A, A.flip(0)),
        ("near, but for half of it", A, torch.cat([A[:24], B[24:]])),
        ("one of few values", (A > 0).float(), (A > 0).float()),
        ("two simple numbers", torch.tensor([1.0, 0.5] * 16), torch.tensor([1.0, 0.5] * 16)),
        ("one number", torch.tensor(2.6592), torch.tensor(2.6592)),
        ("an empty tensor", A[:0], A[:0]),
        ("truth values", A > 0, A > 0),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_values_that_are_alike_but_prove_nothing_settle_nothing(
    what: str, source: torch.Tensor, target: torch.Tensor
) -> None:
    found = settled({"a": source, "b": B}, {"t": target, "u": B})
    nearly = what == "up to one element"  # it is a near tensor
    assert found == {"u": (["b"], "rename")} | ({"t": (["a"], "rename")} if nearly else {})


def test_an_order_that_no_operation_gives_is_said() -> None:
    order = torch.randperm(48, generator=torch.Generator().manual_seed(1))
    found = decided({"a": A, "b": B}, {"t": A[order], "u": B})[1]
    assert [(doubt.target, doubt.candidates, doubt.reason) for doubt in found.doubts] == [
        ("t", [], "a has its elements in an order that no known operation gives")
    ]


def test_equal_sources_are_left_to_names_and_counted() -> None:
    source = {"m.w": A, "ema.w": A.clone(), "m.q": B, "ema.q": B.clone(), "m.k": C, "ema.k": C.clone()}
    target = {"w": A.clone(), "ema.w": A.clone(), "turned": A.T.contiguous(), "qk": torch.cat([B, C])}
    inferred, found = decided(source, target)
    assert {pair.target: pair.source for pair in found.pairs} == {"ema.w": ["ema.w"]}
    assert {doubt.target: doubt.reason for doubt in found.doubts} == {
        "w": "2 tensors of the source have its values",
        "turned": "2 tensors of the source have its values",
        "qk": "2 tensors of the source have the values of one of its parts",
    }
    assert [pair.source for pair in found.doubts[0].candidates] == [["m.w"], ["ema.w"]]
    assert [(pair.op, pair.source) for pair in found.doubts[2].candidates] == [
        ("concat:0", ["m.q", "m.k"]), ("concat:0", ["ema.q", "ema.k"])
    ]  # fmt: skip
    assert inferred.only_source  # nothing was guessed


def test_tied_sources_are_one_tensor_and_a_tied_target_has_it_twice() -> None:
    source = {"embed": A, "head": A, "b": B}
    assert settled(source, {"x.embed": A.clone(), "x.head": A.clone()}) == {
        "x.embed": (["embed"], "rename"), "x.head": (["embed"], "rename")
    }  # fmt: skip
    assert settled({"embed": A}, {"x.embed": A.clone(), "x.head": A.clone()}) == {
        "x.embed": (["embed"], "rename"), "x.head": (["embed"], "rename")
    }  # fmt: skip


def test_of_equal_sources_the_one_of_its_shape_is_taken() -> None:
    source = {"flat": A.flatten(), "matrix": A}
    assert settled(source, {"t": A.clone()}) == {"t": (["matrix"], "rename")}


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_every_target_has_a_fate(saved: Callable[..., Any]) -> None:
    quantized = torch.quantize_per_tensor(A, 0.1, 0, torch.qint8)
    target = {
        "pair": A.T.contiguous(), "new": B, "ones": torch.ones(4), "count": torch.tensor(3), "none": A[:0],
        "sparse": A.to_sparse(), "quantized": quantized, "meta": torch.empty(48, 32, device="meta"),
        "small": A.to(torch.float8_e4m3fn), "bits": A > 0,
    }  # fmt: skip
    source = {"a": A, "count": torch.tensor(3), "ones": torch.ones(4)}
    found = decided(source, saved(target, "target.pth"))[1]
    assert [pair.target for pair in found.pairs] == ["pair"]
    assert found.plain == ["ones", "count"]
    assert found.unread == {
        "none": "it is empty",
        "sparse": "a sparse_coo tensor is not compared by values",
        "quantized": "a quantized tensor is not compared by values",
        "meta": "a meta tensor is not compared by values",
        "small": "the other side has no float8_e4m3fn, nor what it is cast to",
        "bits": "the other side has no bool, nor what it is cast to",
    }


def test_a_target_without_values_settles_nothing_and_nothing_is_read() -> None:
    read: list[int] = []
    source, target = ckptool.open({"a": A}), ckptool.open({"a": torch.empty(48, 32, device="meta")})
    inferred, found = decided_by_values(source, target, lambda settled, _: Inferred([], [], ["a"], ["a"]), read.append)
    assert (found.pairs, found.one_model, inferred.only_target, read) == ([], False, ["a"], [])


def test_both_sides_are_read_once_where_keys_are_only_renamed(saved: Callable[..., Any]) -> None:
    tensors = {f"a{number}": random(64, 32 + number) for number in range(40)}
    paths = [saved(tensors, "a.pth"), saved({f"b.{key}": one for key, one in tensors.items()}, "b.pth")]
    read: list[int] = []
    source, target = map(ckptool.open, paths)
    decided_by_values(source, target, lambda settled, _: Inferred([*settled], [], [], []), read.append)
    assert sum(read) == 2 * sum(one.nbytes for one in tensors.values())


def test_a_proposal_is_compared_where_most_of_both_sides_is_one_model() -> None:
    source = {"big": random(200, 32), "n1.weight": torch.ones(8), "n1.bias": torch.zeros(8), "x": K, "y": V}
    target = {"BIG": random(200, 32).T.contiguous(), "n1.weight": torch.ones(8), "n1.bias": torch.ones(8)}
    target |= {"x": V.clone(), "y": random(16, 32, seed=33)}
    inferred, found = decided(source, target)
    assert found.one_model
    assert {pair.target: (pair.source, pair.witnesses[-1]) for pair in inferred.pairs} == {
        "BIG": (["big"], "values"), "n1.weight": (["n1.weight"], "values"), "x": (["y"], "values")
    }  # fmt: skip
    assert {doubt.target: doubt.reason for doubt in inferred.doubts} == {
        "n1.bias": "its values are not those of n1.bias, though most other tensors are the same",
        "y": "nothing but its shape speaks for it",
    }
    assert inferred.only_source == ["n1.bias", "x"]


def test_proposals_stand_where_two_trainings_have_nothing_in_common() -> None:
    source = {"a": A, "norm": torch.ones(8), "b": B}
    target = {"a": random(48, 32, seed=60), "norm": torch.zeros(8), "b": random(48, 32, seed=61)}
    inferred, found = decided(source, target)
    assert not found.one_model
    assert [pair.target for pair in inferred.pairs] == ["a", "norm", "b"]
    assert not any("values" in pair.witnesses for pair in inferred.pairs)


@pytest.mark.parametrize("same", [False, True], ids=["each another", "all equal"])
def test_many_tensors_take_no_time(same: bool) -> None:
    rows = torch.randn(3000, 8, 4, generator=torch.Generator().manual_seed(0))
    source = {f"a.{number}.w": rows[0 if same else number].clone() for number in range(3000)}
    target = {f"b.{number}": one for number, one in enumerate(source.values())}
    one, other = ckptool.open(dict(source)), ckptool.open(dict(target))
    began = time.process_time()
    found = decided_by_values(one, other, lambda settled, _: Inferred([*settled], [], [], []))[1]
    assert time.process_time() - began < 2  # of a shared machine: ten thousand take a second elsewhere
    assert (len(found.pairs), len(found.doubts)) == ((0, 3000) if same else (3000, 0))
    if same:
        assert found.doubts[0].reason == "3,000 tensors of the source have its values"
