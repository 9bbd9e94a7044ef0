"""Rules made of a mapping: few, readable, and exactly the mapping, by the values that plain torch arithmetic gives."""

from __future__ import annotations

import json
import tomllib
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch

import ckptool
from ckptool.errors import UsageError
from ckptool.mapping.pairs import Entry, Pair
from ckptool.mapping.rules import rules_of, rules_text

PAIRS = Path(__file__).resolve().parents[3] / "shared" / "remap" / "pairs"
GIVEN = sorted(PAIRS.glob("*.json"))

Shape = tuple[int, ...]


def arithmetic(word: str, tensor: torch.Tensor) -> torch.Tensor:
    """What one word of an operation does to a tensor."""
    name, *texts = word.split(":")
    if name == "rename":
        return tensor
    if name == "transpose":
        return tensor.transpose(0, 1)
    if name == "permute":
        return tensor.permute(*map(int, texts[0].split(",")))
    if name == "reshape" and texts:
        return tensor.reshape(*map(int, texts[0].split(",")))
    if name == "split":
        part, parts = map(int, texts[1].split("/"))
        return tensor.chunk(parts, int(texts[0]))[part]
    if name == "slice":
        dim, begin, end = map(int, texts)
        return tensor.narrow(dim, begin, end - begin)
    if name == "groupslice":
        dim, groups, begin, end = map(int, texts)
        return tensor.unflatten(dim, (groups, -1)).narrow(dim + 1, begin, end - begin).flatten(dim, dim + 1)
    if name == "shuffle":
        dim, one, other = map(int, texts)
        return tensor.unflatten(dim, (one, other, -1)).transpose(dim, dim + 1).flatten(dim, dim + 2)
    dim, heads = map(int, texts)
    half = tensor.shape[dim] // heads // 2
    apart = (heads, 2, half) if name == "rope_interleave" else (heads, half, 2)
    return tensor.unflatten(dim, apart).transpose(dim + 1, dim + 2).flatten(dim, dim + 2)


def by_torch(pair: Pair, tensors: dict[str, torch.Tensor], shape: Shape) -> torch.Tensor:
    """What a pair says, in plain torch arithmetic; a reshape that names no shape is the last word, or before a join."""
    inputs = [tensors[key] for key in pair.source]
    for word in pair.op.split(";"):
        name, _, dim = word.partition("<")[0].partition(":")
        if name == "groupconcat":
            at, groups = map(int, dim.split(":"))
            inputs = [torch.cat([one.unflatten(at, (groups, -1)) for one in inputs], at + 1).flatten(at, at + 1)]
        elif name in ("concat", "stack"):
            each = word.partition("<")[2].rstrip(">").split("|") if "<" in word else ["rename"] * len(inputs)
            for number, words in enumerate(each):
                for one in words.split("+"):
                    inputs[number] = arithmetic(one, inputs[number])
            if name == "stack":
                piece = (*shape[: int(dim)], *shape[int(dim) + 1 :])
                inputs = [torch.stack([one.reshape(piece) for one in inputs], int(dim))]
            else:
                inputs = [torch.cat(inputs, int(dim))]
        elif word == "reshape" and len(inputs) > 1:  # before a concat along 0
            piece = (shape[0] // len(inputs), *shape[1:])
            inputs = [one.reshape(piece) for one in inputs]
        else:
            inputs = [one.reshape(shape) if word == "reshape" else arithmetic(word, one) for one in inputs]
    return inputs[0]


def lines_of(rules: list[dict[str, Any]]) -> int:
    """How many lines say what becomes what: a line of a table counts as a rule."""
    return sum(len(rule["table"]) if "table" in rule else 1 for rule in rules)


def checked(pairs: list[Pair], shapes: dict[str, Shape], wanted: dict[str, Shape]) -> list[dict[str, Any]]:
    """The rules of these pairs, after a look at every value that they give, as they are and read from TOML."""
    source = [Entry(key, shape) for key, shape in shapes.items()]
    target = [Entry(key, shape) for key, shape in wanted.items()]
    rules = rules_of(pairs, source, target)
    begin, tensors = 0, {}
    for key, shape in shapes.items():
        tensors[key] = torch.arange(begin, begin + prod(shape)).reshape(shape)
        begin += prod(shape)
    made, report = ckptool.remap(tensors, rules)
    values = made.to_torch()
    assert {*values} == {pair.target for pair in pairs}
    for pair in pairs:
        assert torch.equal(values[pair.target], by_torch(pair, tensors, wanted[pair.target])), pair
    used = {key for pair in pairs for key in pair.source}
    assert {*report.dropped} >= {*shapes} - used
    text = rules_text(rules, "a comment")
    assert text.startswith("# a comment\n")
    assert tomllib.loads(text).get("rules", []) == rules
    return rules


def renames(names: dict[str, str], *left: str) -> list[dict[str, Any]]:
    """The rules for these renames, beside keys that nothing uses."""
    pairs = [Pair(new, [old], "rename") for old, new in names.items()]
    shapes = dict.fromkeys((*names, *left), (2, 3))
    return checked(pairs, shapes, dict.fromkeys(names.values(), (2, 3)))


def layers(count: int, names: dict[str, str], old: str = "encoder.layer.{}", new: str = "blocks.{}") -> dict[str, str]:
    return {
        f"{old.format(i)}.{a}": f"{new.format(i)}.{b}" for i in range(count) for a, b in names.items()
    }  # fmt: skip


def test_numbers_that_count_alike_are_one_line_and_a_module_that_moves_as_a_whole_too() -> None:
    inner = {"attention.self.query": "attn.q", "attention.self.key": "attn.k", "output.dense": "mlp.fc2"}
    names = {f"{a}.{leaf}": f"{b}.{leaf}" for a, b in inner.items() for leaf in ("weight", "bias")}
    assert renames(layers(12, names)) == [
        {
            "table": {
                "encoder.layer.{i}.attention.self.query.**": "blocks.{i}.attn.q.**",
                "encoder.layer.{i}.attention.self.key.**": "blocks.{i}.attn.k.**",
                "encoder.layer.{i}.output.dense.**": "blocks.{i}.mlp.fc2.**",
            }
        }
    ]


def test_a_prefix_for_all_is_one_line() -> None:
    assert renames({f"a.{i}.w": f"net.a.{i}.w" for i in range(5)} | {"b.w": "net.b.w"}) == [{"table": {"**": "net.**"}}]
    assert renames({f"module.a.{i}.w": f"a.{i}.w" for i in range(5)} | {"module.b": "b"}) == [
        {"table": {"module.**": "**"}}
    ]


def test_what_stays_as_it_is_needs_no_rule() -> None:
    assert renames({"a.weight": "a.weight", "b.weight": "b.weight"}) == []


def test_numbers_that_are_one_less_are_one_line() -> None:
    names = {
        f"layer{i}.{j}.conv{k}.w": f"stages.{i - 1}.{j}.c.{k - 1}.w" for i in (1, 2) for j in (0, 1) for k in (1, 2)
    }
    assert renames(names) == [{"table": {"layer{i}.{j}.conv{k}.w": "stages.{i-1}.{j}.c.{k-1}.w"}}]


def test_numbers_that_follow_no_rule_are_spelled_out() -> None:
    names = {f"features.{old}.weight": f"blocks.{new}.conv.weight" for old, new in ((0, 0), (3, 1), (4, 2), (8, 3))}
    (rule,) = renames(names)
    assert len(rule["table"]) == 4


def test_names_may_be_swapped_and_shifted() -> None:
    assert lines_of(renames({"a.w": "b.w", "b.w": "a.w", "c.0": "c.1", "c.1": "c.2", "c.2": "c.0"})) == 5


def test_one_old_pattern_of_two_kinds_of_modules_is_told_apart_by_the_number() -> None:
    names = {}
    for i in range(0, 8, 2):
        names[f"features.{i}.weight"] = f"features.conv{i // 2}.weight"
        names[f"features.{i + 1}.weight"] = f"features.norm{i // 2}.weight"
    assert lines_of(renames(names)) <= 8


def test_what_no_pair_uses_is_dropped_by_few_patterns() -> None:
    names = layers(6, {"a.w": "x.w", "b.w": "y.w"})
    left = [f"encoder.layer.{i}.{leaf}" for i in range(6, 12) for leaf in ("a.w", "b.w")]
    rules = renames(names, *left, "head.weight", "head.bias", "head.inner.weight")
    assert rules[0] == {"drop": ["head.*", r"re:^encoder\.layer\.(6|7|8|9|10|11)\."]}
    assert renames(names, *[f"encoder.layer.{i}.mask" for i in range(6)])[0] == {"drop": "*.mask"}


def test_keys_with_the_characters_of_patterns_are_taken_as_they_are() -> None:
    names = {"a*.w": "b[0].w", "x{i}.w": "re:y.w", "x{j}.w": "{z}.w", "q?.[1]": "w*.\\1", "re:k": "k%7b"}
    renames(names, "u*[", "re:v")
    renames({"a.*": "b.*", "a.{i}": "b.{i}", "a.b": "b.b"}, "a.**")


def test_a_capture_that_would_take_other_names_too_gives_way_to_names_spelled_out() -> None:
    names = {f"layer_{i}.w": f"blocks.{i}.w" for i in range(4)}
    renames(names | {"layer_norm.w": "layer_norm.w", "layer_out.w": "head.w"})
    renames({f"a.{i}.w": f"b.{i}.w" for i in range(3)} | {"a.x.w": "a.x.w", "c.a.1.w": "c.a.1.w"})


def test_names_of_a_target_that_are_other_names_of_the_source_stand_in_nobodys_way() -> None:
    pairs = [Pair("b.q", ["a.qkv"], "split:0:0/2"), Pair("b.k", ["a.qkv"], "split:0:1/2"), Pair("c", ["b.q"], "rename")]
    checked(pairs, {"a.qkv": (4, 3), "b.q": (2, 3), "b.k": (7,)}, {"b.q": (2, 3), "b.k": (2, 3), "c": (2, 3)})
    pairs = [Pair("x", ["y", "z"], "concat:0"), Pair("y", ["x"], "rename"), Pair("z", ["w"], "rename")]
    checked(pairs, dict.fromkeys("xyzw", (2, 2)), {"x": (4, 2), "y": (2, 2), "z": (2, 2)})


@pytest.mark.parametrize("dim", [0, 1])
def test_a_fused_tensor_is_split_and_pieces_are_put_together(dim: int) -> None:
    whole, piece = ((12, 4), (4, 4)) if dim == 0 else ((4, 12), (4, 4))
    split, shapes, wanted = [], {}, {}
    for i in range(3):
        shapes |= {f"h.{i}.qkv.weight": whole}
        for number, part in enumerate("qkv"):
            split.append(Pair(f"blocks.{i}.{part}.weight", [f"h.{i}.qkv.weight"], f"split:{dim}:{number}/3"))
            wanted[f"blocks.{i}.{part}.weight"] = piece
    (rule,) = checked(split, shapes, wanted)
    assert rule["into"] == [f"blocks.{{i}}.{part}.weight" for part in "qkv"]
    joined = [
        Pair(key, [f"blocks.{i}.{part}.weight" for part in "qkv"], f"concat:{dim}") for i, key in enumerate(shapes)
    ]
    (rule,) = checked(joined, wanted, shapes)
    assert rule["into"] == "h.{i}.qkv.weight"


def test_weights_and_biases_that_are_split_alike_are_one_rule() -> None:
    pairs, shapes, wanted = [], {}, {}
    for leaf, shape in (("weight", (6, 4)), ("bias", (6,))):
        for i in range(2):
            shapes[f"h.{i}.kv.{leaf}"] = shape
            for number, part in enumerate("kv"):
                pairs.append(Pair(f"h.{i}.{part}.{leaf}", [f"h.{i}.kv.{leaf}"], f"split:0:{number}/2"))
                wanted[f"h.{i}.{part}.{leaf}"] = (3, *shape[1:])
    assert checked(pairs, shapes, wanted) == [{"split": "h.{i}.kv.*", "into": ["h.{i}.k.*", "h.{i}.v.*"]}]


def test_unequal_pieces_and_pieces_that_nothing_needs_are_cut_out() -> None:
    pairs = [Pair("q", ["qkv"], "slice:0:0:8"), Pair("v", ["qkv"], "slice:0:10:12")]
    rules = checked(pairs, {"qkv": (12, 2)}, {"q": (8, 2), "v": (2, 2)})
    assert rules[0]["sizes"] == [8, 2, 2]
    checked([Pair("k", ["qkv"], "split:0:1/3")], {"qkv": (12, 2)}, {"k": (4, 2)})
    checked([Pair("all", ["qkv"], "slice:0:0:12")], {"qkv": (12, 2)}, {"all": (12, 2)})


def test_pieces_that_overlap_are_cut_of_copies() -> None:
    pairs = [Pair("a", ["w"], "slice:0:0:3"), Pair("b", ["w"], "slice:0:2:4"), Pair("c", ["w"], "transpose")]
    checked(pairs, {"w": (4, 2)}, {"a": (3, 2), "b": (2, 2), "c": (2, 4)})


def test_one_tensor_under_two_names_is_copied() -> None:
    pairs = [Pair("embed.weight", ["wte"], "rename"), Pair("head.weight", ["wte"], "rename")]
    rules = checked(pairs, {"wte": (4, 2)}, {"embed.weight": (4, 2), "head.weight": (4, 2)})
    assert rules[-1] == {"copy": "embed.weight", "to": "head.weight"}
    made, _ = ckptool.remap({"wte": torch.ones(4, 2)}, rules)
    assert made.shared() == [["embed.weight", "head.weight"]]


def test_turned_matrices_and_convolutions_are_a_rule_for_all_that_are_alike() -> None:
    pairs, shapes, wanted = [], {}, {}
    for i in range(3):
        for old, new, shape, to, op in (
            ("kernel", "weight", (3, 5), (5, 3), "transpose"),
            ("conv_kernel", "conv.weight", (3, 3, 4, 8), (8, 4, 3, 3), "permute:3,2,0,1"),
            ("bias", "bias", (5,), (5,), "rename"),
        ):
            shapes[f"dense_{i}/{old}"], wanted[f"dense.{i}.{new}"] = shape, to
            pairs.append(Pair(f"dense.{i}.{new}", [f"dense_{i}/{old}"], op))
    rules = checked(pairs, shapes, wanted)
    assert rules[:3] == [
        {"sub": "/", "by": "."}, {"transpose": "*.kernel"}, {"permute": "*.conv_kernel", "dims": [3, 2, 0, 1]},
    ]  # fmt: skip


def test_reshapes_of_many_sizes_are_one_rule() -> None:
    sizes = {f"gamma.{i}": (8 * 2**i, 1, 1) for i in range(4)}
    pairs = [Pair(key, [key], "reshape") for key in sizes]
    assert checked(pairs, sizes, {key: shape[:1] for key, shape in sizes.items()}) == [{"reshape": "*", "shape": [-1]}]
    checked(
        [Pair("a", ["a"], "reshape"), Pair("b", ["b"], "reshape"), Pair("c", ["c"], "reshape")],
        {"a": (0, 3), "b": (1,), "c": (4, 1, 2)}, {"a": (3, 0), "b": (), "c": (8,)},
    )  # fmt: skip


def test_experts_are_stacked_and_taken_apart() -> None:
    one = {f"moe.experts.{n}.w": (3, 5) for n in range(4)}
    checked([Pair("moe.w", [*one], "stack:0")], one, {"moe.w": (4, 3, 5)})
    checked([Pair("moe.w", [*one], "stack:1")], one, {"moe.w": (3, 4, 5)})
    checked([Pair("moe.w", [*one], "reshape;concat:0")], one, {"moe.w": (4, 5, 3)})
    apart = [Pair(key, ["moe.w"], f"split:0:{n}/4;reshape") for n, key in enumerate(one)]
    checked(apart, {"moe.w": (4, 3, 5)}, one)


@pytest.mark.parametrize("op", ["rope_interleave:0:4", "rope_deinterleave:0:4"])
def test_the_order_of_rotary_rows_is_reshapes_and_a_permutation(op: str) -> None:
    shapes = {f"layers.{i}.{part}.weight": (rows, 6) for i in range(3) for part, rows in (("q", 16), ("k", 16))}
    rules = checked([Pair(key, [key], op) for key in shapes], shapes, shapes)
    assert [next(iter(rule)) for rule in rules] == ["reshape", "permute", "reshape"]


def test_heads_that_are_woven_row_by_row_are_chunked_and_woven() -> None:
    pieces = {f"a.{part}.weight": (8, 3) for part in "qkv"}
    apart = [
        Pair(key, ["a.qkv.weight"], f"reshape:4,6,3;split:1:{number}/3;reshape") for number, key in enumerate(pieces)
    ]
    (rule,) = checked(apart, {"a.qkv.weight": (24, 3)}, pieces)
    assert (rule["chunk"], rule["heads"]) == ("a.qkv.weight", 4)
    together = [Pair("a.qkv.weight", [*pieces], "reshape:4,2,3;concat:1;reshape")]
    (rule,) = checked(together, pieces, {"a.qkv.weight": (24, 3)})
    assert (rule["weave"], rule["heads"]) == ([*pieces], 4)


def test_groups_of_rows_are_taken_apart_put_together_and_shuffled() -> None:
    names = {"q": (0, 4), "k": (4, 6), "v": (6, 8)}  # two heads of keys and values for four of queries
    pieces = {f"a.{part}.weight": (2 * (end - begin), 3) for part, (begin, end) in names.items()}
    apart = [
        Pair(f"a.{part}.weight", ["a.qkv.weight"], f"groupslice:0:2:{begin}:{end}")
        for part, (begin, end) in names.items()
    ]
    checked(apart, {"a.qkv.weight": (16, 3)}, pieces)
    checked([Pair("a.qkv.weight", [*pieces], "groupconcat:0:2")], pieces, {"a.qkv.weight": (16, 3)})
    alike = {f"a.{part}": (8, 3) for part in "qkv"}
    (rule,) = checked([Pair("a.qkv", [*alike], "groupconcat:0:4")], alike, {"a.qkv": (24, 3)})
    assert (rule["weave"], rule["heads"]) == ([*alike], 4)
    checked([Pair("w", ["v"], "shuffle:1:2:3")], {"v": (2, 12)}, {"w": (2, 12)})


def test_operations_of_a_join_may_differ_and_be_followed_by_others() -> None:
    shapes = {"a.q": (2, 4), "a.k": (4, 2), "b.q": (2, 4), "b.k": (4, 2)}
    pairs = [Pair(f"{x}.qk", [f"{x}.q", f"{x}.k"], "concat:0<transpose|rename>") for x in "ab"]
    checked(pairs, shapes, {"a.qk": (8, 2), "b.qk": (8, 2)})
    pairs = [Pair(f"{x}.qk", [f"{x}.q", f"{x}.k"], "concat:1<rename|transpose>;transpose") for x in "ab"]
    checked(pairs, shapes, {"a.qk": (8, 2), "b.qk": (8, 2)})
    pairs = [Pair("z", ["kv", "q"], "concat:0<split:0:1/2+transpose|rename>"), Pair("k", ["kv"], "split:0:0/2")]
    checked(pairs, {"kv": (4, 2), "q": (3, 2)}, {"z": (5, 2), "k": (2, 2)})


@pytest.mark.parametrize(
    ("op", "shape", "to"),
    [
        ("split:0:0/3", (4, 2), (1, 2)),
        ("transpose", (4, 2), (4, 2)),
        ("reshape", (4, 2), (3, 3)),
        ("slice:0:2:9", (4, 2), (7, 2)),
        ("slice:3:0:1", (4, 2), (1, 2)),
        ("rename", (4, 2), (2, 4)),
        ("concat:0", (4, 2), (4, 2)),
        ("perm:0", (4, 2), (4, 2)),
        ("permute:0,0", (4, 2), (4, 4)),
        ("reshape;slice:0:0:2", (4, 2), (2, 2)),
        ("nonsense", (4, 2), (4, 2)),
    ],
)
def test_a_pair_that_cannot_be_is_refused_in_one_line(op: str, shape: Shape, to: Shape) -> None:
    with pytest.raises(UsageError, match=r"^t: .* of s does not give shape") as caught:
        rules_of([Pair("t", ["s"], op)], [Entry("s", shape)], [Entry("t", to)])
    assert "\n" not in str(caught.value)


def test_a_name_that_toml_cannot_hold_is_refused_and_json_can_hold_it() -> None:
    rules = rules_of([Pair("\ud800", ["a"], "rename")], [Entry("a", (2,))], [Entry("\ud800", (2,))])
    with pytest.raises(UsageError, match=r"name a \.json file"):
        rules_text(rules)
    assert json.loads(json.dumps(rules)) == rules


def test_names_of_control_characters_come_back_from_toml() -> None:
    renames({'a"b\\.\x00\x7f\n': "c\t.\x1b", "d'\\": "e\\'"}, "\x85.\u2028")


def given(path: Path) -> tuple[list[Pair], dict[str, Shape], dict[str, Shape]]:
    content = json.loads(path.read_text())
    sides = [{one["key"]: tuple(one["shape"]) for one in content[side]} for side in ("source", "target")]
    return [Pair(row["target"], row["source"], row["op"]) for row in content["mapping"]], sides[0], sides[1]


@pytest.mark.parametrize("path", GIVEN, ids=[path.stem for path in GIVEN])
def test_rules_of_a_known_mapping_give_it_again(path: Path) -> None:
    pairs, shapes, wanted = given(path)
    # `rules_of` proves what it returns, or refuses
    rules = rules_of(pairs, [Entry(*one) for one in shapes.items()], [Entry(*one) for one in wanted.items()])
    made, report = ckptool.remap({key: torch.zeros(()).expand(shape) for key, shape in shapes.items()}, rules)
    assert {key: one.shape for key, one in made.state_dict().items()} == {
        pair.target: wanted[pair.target] for pair in pairs
    }
    assert {row.new: row.old for row in report.map} == {pair.target: pair.source for pair in pairs}
    assert lines_of(rules) <= len(pairs) * 0.42 + 5
