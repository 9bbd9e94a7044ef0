"""The mapping between two checkpoints whose keys differ, from names, shapes and order alone."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence

import pytest

from ckptool.mapping.infer import infer
from ckptool.mapping.pairs import DEFAULT_CONFIDENCE, Entry, Pair


def linear(name: str, out: int, inner: int) -> list[Entry]:
    return [Entry(f"{name}.weight", (out, inner)), Entry(f"{name}.bias", (out,))]


def norm(name: str, size: int) -> list[Entry]:
    return [Entry(f"{name}.weight", (size,)), Entry(f"{name}.bias", (size,))]


def batch_norm(name: str, size: int) -> list[Entry]:
    return [
        *norm(name, size), Entry(f"{name}.running_mean", (size,)), Entry(f"{name}.running_var", (size,)),
        Entry(f"{name}.num_batches_tracked", (), "int64"),
    ]  # fmt: skip


def encoder(layers: int = 3) -> list[Entry]:
    """A transformer in the one spelling."""
    found = [Entry("embeddings.word.weight", (100, 16)), Entry("embeddings.position.weight", (40, 16))]
    for at in range(layers):
        name = f"encoder.layer.{at}"
        for part in ("query", "key", "value"):
            found += linear(f"{name}.attention.self.{part}", 16, 16)
        found += linear(f"{name}.attention.output.dense", 16, 16)
        found += [*norm(f"{name}.layernorm_before", 16), *norm(f"{name}.layernorm_after", 16)]
        found += [*linear(f"{name}.intermediate.dense", 64, 16), *linear(f"{name}.output.dense", 16, 64)]
    return [*found, *norm("layernorm", 16), *linear("classifier", 7, 16)]


def blocks(layers: int = 3, prefix: str = "") -> list[Entry]:
    """The same transformer in another spelling and order."""
    found = [Entry(f"{prefix}tok_embed.weight", (100, 16)), Entry(f"{prefix}pos_embed", (40, 16))]
    for at in range(layers):
        name = f"{prefix}blocks.{at}"
        found += norm(f"{name}.norm1", 16)
        for part in "qkv":
            found += linear(f"{name}.attn.{part}_proj", 16, 16)
        found += [*linear(f"{name}.attn.proj", 16, 16), *norm(f"{name}.norm2", 16)]
        found += [*linear(f"{name}.mlp.fc1", 64, 16), *linear(f"{name}.mlp.fc2", 16, 64)]
    return [*found, *norm(f"{prefix}norm", 16), *linear(f"{prefix}head", 7, 16)]


TRUTH = {
    "encoder.layer.{}.attention.self.query": "blocks.{}.attn.q_proj",
    "encoder.layer.{}.attention.self.key": "blocks.{}.attn.k_proj",
    "encoder.layer.{}.attention.self.value": "blocks.{}.attn.v_proj",
    "encoder.layer.{}.attention.output.dense": "blocks.{}.attn.proj",
    "encoder.layer.{}.layernorm_before": "blocks.{}.norm1",
    "encoder.layer.{}.layernorm_after": "blocks.{}.norm2",
    "encoder.layer.{}.intermediate.dense": "blocks.{}.mlp.fc1",
    "encoder.layer.{}.output.dense": "blocks.{}.mlp.fc2",
}


def truth(layers: int = 3, prefix: str = "") -> dict[str, str]:
    """{target: source} for `blocks` made from `encoder`."""
    found = {
        f"{prefix}{new.format(at)}.{leaf}": f"{old.format(at)}.{leaf}"
        for old, new in TRUTH.items() for at in range(layers) for leaf in ("weight", "bias")
    }  # fmt: skip
    found |= {f"{prefix}tok_embed.weight": "embeddings.word.weight", f"{prefix}pos_embed": "embeddings.position.weight"}
    for leaf in ("weight", "bias"):
        found |= {f"{prefix}norm.{leaf}": f"layernorm.{leaf}", f"{prefix}head.{leaf}": f"classifier.{leaf}"}
    return found


def mapped(source: Sequence[Entry], target: Sequence[Entry], **wishes: object) -> dict[str, str]:
    pairs = infer(source, target, **wishes).pairs  # type: ignore[arg-type]
    return {pair.target: " + ".join(pair.source) for pair in pairs}


def fate_is_told(source: Sequence[Entry], target: Sequence[Entry]) -> None:
    """Every key of both sides is in the result."""
    found = infer(source, target)
    told = [pair.target for pair in found.pairs] + [doubt.target for doubt in found.doubts] + found.only_target
    assert sorted(told) == sorted(entry.key for entry in target)
    used = {key for pair in found.pairs for key in pair.source}
    assert used | {*found.only_source} == {entry.key for entry in source}


def test_wrapped_keys_find_their_own() -> None:
    source = [*linear("module.a", 3, 4), Entry("module.b.weight", (5, 5))]
    target = [*linear("a", 3, 4), Entry("c.scale", (7,))]
    found = infer(source, target)
    assert {pair.target: pair.source for pair in found.pairs} == {
        "a.weight": ["module.a.weight"], "a.bias": ["module.a.bias"]
    }  # fmt: skip
    assert found.only_target == ["c.scale"]
    assert found.only_source == ["module.b.weight"]


def test_two_spellings_of_a_transformer_are_mapped_whole() -> None:
    assert mapped(encoder(), blocks()) == truth()


@pytest.mark.parametrize(
    "change",
    [
        lambda keys: sorted(keys, key=lambda entry: entry.key),
        lambda keys: list(reversed(keys)),
        lambda keys: [entry._replace(key=f"model.net.{entry.key}") for entry in keys],
    ],
    ids=["alphabetical", "reversed", "wrapped"],
)
def test_what_another_listing_leaves_open_is_left_out_and_nothing_is_wrong(
    change: Callable[[list[Entry]], list[Entry]],
) -> None:
    changed = change(encoder())
    names = {new.key: old.key for new, old in zip(sorted(changed), sorted(encoder()), strict=True)}
    found = {target: names[source] for target, source in mapped(changed, blocks()).items()}
    assert found.items() <= truth().items()
    assert len(found) > len(truth()) / 2


def test_a_model_of_fewer_layers_takes_the_first_ones() -> None:
    found = mapped(encoder(5), blocks(3))
    assert found == truth(3)


def test_a_head_of_another_size_is_left_and_named() -> None:
    target = [entry for entry in blocks() if not entry.key.startswith("head")] + linear("head", 1000, 16)
    found = infer(encoder(), target)
    assert found.only_target == ["head.weight", "head.bias"]
    assert found.only_source == ["classifier.weight", "classifier.bias"]
    assert len(found.pairs) == len(target) - 2


@pytest.mark.parametrize("gone", list(TRUTH))
def test_a_lone_survivor_of_the_right_shape_is_not_taken_for_a_layer_that_is_missing(gone: str) -> None:
    missing = {gone.format(at) for at in range(3)}
    source = [entry for entry in encoder() if entry.key.rpartition(".")[0] not in missing]
    found = mapped(source, blocks())
    assert found.items() <= truth().items()
    assert len(found) > len(truth()) / 2
    fate_is_told(source, blocks())


def test_counters_follow_their_module() -> None:
    source = [Entry("conv.weight", (8, 3, 3, 3)), *batch_norm("bn", 8)]
    target = [Entry("stem.convolution.weight", (8, 3, 3, 3)), *batch_norm("stem.normalization", 8)]
    found = mapped(source, target)
    assert found["stem.normalization.num_batches_tracked"] == "bn.num_batches_tracked"
    assert len(found) == 6
    older = [entry for entry in source if not entry.key.endswith("tracked")]
    assert infer(older, target).only_target == ["stem.normalization.num_batches_tracked"]


def test_transposed_matrices_are_told_by_those_that_are_not_square() -> None:
    source = [
        Entry(f"h.{at}.{name}.kernel", shape)
        for at in range(2) for name, shape in (("up", (16, 64)), ("down", (64, 16)), ("out", (16, 16)))
    ]  # fmt: skip
    target = [
        Entry(f"h.{at}.{name}.weight", shape)
        for at in range(2) for name, shape in (("up", (64, 16)), ("down", (16, 64)), ("out", (16, 16)))
    ]  # fmt: skip
    ops = {pair.target: (pair.op, pair.unproven) for pair in infer(source, target).pairs}
    assert ops["h.0.up.weight"] == ("transpose", None)
    assert ops["h.1.out.weight"] == (
        "transpose",
        "whether the square matrix is transposed, as others of these names are",
    )


def fused(name: str) -> list[Entry]:
    return [
        entry._replace(key=entry.key.replace("q_proj", name), shape=(48, *entry.shape[1:]))
        if ".q_proj" in entry.key else entry
        for entry in blocks() if ".k_proj" not in entry.key and ".v_proj" not in entry.key
    ]  # fmt: skip


def test_pieces_of_torchs_own_attention_are_q_then_k_then_v() -> None:
    source = [entry._replace(key=entry.key.replace("in_proj.", "in_proj_")) for entry in fused("in_proj")]
    ops = {pair.target: (pair.source, pair.op) for pair in infer(source, encoder()).pairs}
    assert ops["encoder.layer.1.attention.self.key.weight"] == (["blocks.1.attn.in_proj_weight"], "split:0:1/3")
    assert ops["encoder.layer.2.attention.self.value.bias"] == (["blocks.2.attn.in_proj_bias"], "split:0:2/3")


@pytest.mark.parametrize("name", ["qkv", "query_key_value", "c_attn"])
def test_other_fused_projections_are_found_and_not_cut_until_their_layout_is_settled(name: str) -> None:
    found = infer(fused(name), encoder())
    doubts = {doubt.target: doubt for doubt in found.doubts}
    doubt = doubts["encoder.layer.1.attention.self.key.weight"]
    assert doubt.candidates[0].source == [f"blocks.1.attn.{name}.weight"]
    assert doubt.reason == "whether the rows of q, k and v lie one behind the other or head by head is not known"
    settled = infer(fused(name), encoder(), layouts=["*.attention.self.*"])
    assert {pair.op for pair in settled.pairs if ".self." in pair.target} == {
        "split:0:0/3",
        "split:0:1/3",
        "split:0:2/3",
    }
    assert not any(".self." in doubt.target for doubt in settled.doubts)


def test_the_running_average_of_a_model_is_no_second_source() -> None:
    ema = [entry._replace(key=f"ema.{entry.key}") for entry in encoder()]
    model = [entry._replace(key=f"model.{entry.key}") for entry in encoder()]
    found = mapped([*ema, *model], blocks())
    assert found == {target: f"model.{source}" for target, source in truth().items()}


def test_of_two_copies_that_nothing_tells_apart_none_is_taken() -> None:
    copies = [entry._replace(key=f"{name}.{entry.key}") for name in ("first", "other") for entry in encoder()]
    found = infer(copies, blocks())
    assert found.pairs == []
    assert len(found.doubts) == len(blocks())
    fate_is_told(copies, blocks())


def test_experts_that_are_stacked_on_one_side_are_cut_on_the_other() -> None:
    source = [Entry(f"layers.{at}.experts.w1", (8, 32, 16)) for at in range(2)] + [Entry("norm.weight", (16,))]
    target = [Entry(f"layers.{at}.experts.{n}.w1.weight", (32, 16)) for at in range(2) for n in range(8)]
    found = {
        pair.target: (pair.source, pair.op) for pair in infer(source, [*target, Entry("norm.weight", (16,))]).pairs
    }
    assert found["layers.1.experts.5.w1.weight"] == (["layers.1.experts.w1"], "split:0:5/8;reshape")


def test_blocks_that_are_numbered_backwards_are_matched_by_what_they_hold() -> None:
    sizes = [8, 16, 32, 64]
    source = [entry for at, size in enumerate(sizes) for entry in linear(f"up.{at}.conv", size, 3)]
    target = [entry for at, size in enumerate(reversed(sizes)) for entry in linear(f"up_blocks.{at}.conv", size, 3)]
    found = mapped(source, target, min_confidence=0)
    assert found == {
        f"up_blocks.{at}.conv.{leaf}": f"up.{3 - at}.conv.{leaf}" for at in range(4) for leaf in ("weight", "bias")
    }


def test_what_a_person_settled_stays_and_speaks_for_the_rest_of_its_layer() -> None:
    source = [*linear("a.0", 8, 8), *linear("a.1", 8, 8)]
    target = [*linear("x.one", 8, 8), *linear("y.two", 8, 8)]
    assert not mapped(sorted(source), sorted(target), min_confidence=0.99)
    said = Pair("y.two.weight", ["a.0.weight"], "rename", 1.0, ["a person"])
    found = {pair.target: pair for pair in infer(source, target, settled=[said]).pairs}
    assert found["y.two.weight"] is said
    assert found["y.two.bias"].source == ["a.0.bias"]
    assert found["y.two.bias"].witnesses == ["neighbours"]
    assert found["y.two.bias"].confidence < 1
    assert "x.one.weight" not in found or found["x.one.weight"].source == ["a.1.weight"]


def test_the_result_does_not_depend_on_the_table_of_field_words_alone() -> None:
    found = mapped(encoder(), blocks(), words=False)
    assert found.items() <= truth().items()
    assert len(found) > len(truth()) / 2


def test_confidence_moves_the_line_between_pairs_and_doubts() -> None:
    every = infer(encoder(), blocks(), min_confidence=0).pairs
    assert {0 <= pair.confidence <= 1 for pair in every} == {True}
    least = min(pair.confidence for pair in every)
    assert least >= DEFAULT_CONFIDENCE
    strict = infer(encoder(), blocks(), min_confidence=1.01)
    assert strict.pairs == []
    assert len(strict.doubts) == len(every)
    assert all(doubt.candidates and doubt.reason for doubt in strict.doubts)


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ([], []), ([], blocks()), (encoder(), []), ([Entry("", (2, 3))], [Entry("", (2, 3))]),
        ([Entry("a", ())], [Entry("b", ())]), ([Entry("a", (0, 4))], [Entry("b", (4, 0))]),
        ([Entry("a..b", (2, 3))], [Entry(".a.b.", (2, 3))]), ([Entry("1", (2,)), Entry("2", (2,))], [Entry("0", (2,))]),
        ([Entry("n" * 5000, (3, 3))], [Entry("m" * 5000, (3, 3))]),
        ([Entry("c", (), "int64")], [Entry("c", (), "int64")]),
    ],
)  # fmt: skip
def test_odd_sides_are_told_too(source: list[Entry], target: list[Entry]) -> None:
    fate_is_told(source, target)


def test_a_first_block_with_one_more_tensor_is_still_one_of_the_blocks() -> None:
    source = encoder(4)
    target = blocks(4)
    target.insert(2, Entry("blocks.0.attn.relative_position", (9, 4)))
    assert mapped(source, target) == truth(4)
    assert infer(source, target).only_target == ["blocks.0.attn.relative_position"]


def test_experts_that_lie_behind_each_other_in_a_matrix_are_cut() -> None:
    source = [Entry(f"layers.{at}.moe.w1", (8 * 32, 16)) for at in range(2)] + [Entry("norm.weight", (16,))]
    target = [Entry(f"layers.{at}.moe.experts.{n}.w1.weight", (32, 16)) for at in range(2) for n in range(8)]
    found = {
        pair.target: (pair.source, pair.op) for pair in infer(source, [*target, Entry("norm.weight", (16,))]).pairs
    }
    assert found["layers.1.moe.experts.5.w1.weight"] == (["layers.1.moe.w1"], "split:0:5/8")


def test_ten_thousand_experts_are_a_few_units() -> None:
    def model(layer: str, expert: str, names: Sequence[str]) -> list[Entry]:
        return [
            Entry(f"{layer.format(at)}.{expert.format(n)}.{name}.weight", (32, 16) if name != names[1] else (16, 32))
            for at in range(20) for n in range(60) for name in names
        ]  # fmt: skip

    source = model("layers.{}.ffn", "experts.{}", ("w1", "w2", "w3"))
    target = model("model.layers.{}.mlp", "experts.{}", ("w1", "w2", "w3"))
    found = mapped(source, target)
    assert found == {two.key: one.key for one, two in zip(source, target, strict=True)}


def rotary(layer: str, attention: str, names: Sequence[str]) -> list[Entry]:
    return [
        Entry(f"{layer}.{at}.{attention}.{name}.weight", (16, 16)) for at in range(2) for name in names
    ] + [Entry("norm.weight", (16,))]  # fmt: skip


def test_the_row_order_of_rotary_heads_is_said_to_be_unproven_where_there_are_no_learned_positions() -> None:
    source = rotary("layers", "attention", ("wq", "wk", "wv", "wo"))
    target = rotary("model.layers", "self_attn", ("q_proj", "k_proj", "v_proj", "o_proj"))
    unproven = {pair.target for pair in infer(source, target).pairs if pair.unproven}
    assert unproven == {f"model.layers.{at}.self_attn.{name}_proj.weight" for at in range(2) for name in "qk"}
    known = infer([*source, Entry("pos_embed", (9, 16))], [*target, Entry("model.pos_embed", (9, 16))])
    assert not any(pair.unproven for pair in known.pairs)
    wrapped = infer(source, [entry._replace(key=f"model.{entry.key}") for entry in source])
    assert not any(pair.unproven for pair in wrapped.pairs)


@pytest.mark.parametrize("order", [("w1", "w2"), ("w2", "w1"), ("x", "y")])
def test_of_two_projections_with_names_the_order_alone_does_not_say_which_is_the_gate(order: tuple[str, str]) -> None:
    def layers(name: str, shapes: Sequence[tuple[str, tuple[int, ...]]]) -> list[Entry]:
        return [Entry(f"{name}.{at}.{part}.weight", shape) for at in range(3) for part, shape in shapes]

    source = layers("enc", [("attn.q_proj", (40, 32)), ("attn.o_proj", (32, 40)), ("gate", (64, 32)), ("up", (64, 32))])
    target = layers("blocks", [("att.query", (40, 32)), ("att.out", (32, 40)), *((name, (64, 32)) for name in order)])
    found = infer(source, target)
    assert {pair.target.split(".")[2] for pair in found.pairs} == {"att"}
    assert {doubt.target.split(".")[2] for doubt in found.doubts} >= {*order}


def test_a_decoder_whose_blocks_are_numbered_from_the_other_end_is_not_matched_by_number() -> None:
    def block(name: str, upsamples: bool) -> list[Entry]:
        found = [*linear(f"{name}.res.0.conv", 16, 16), *norm(f"{name}.res.0.norm", 16)]
        return found + (linear(f"{name}.upsample.conv", 16, 32) if upsamples else [])

    source = [entry for at in range(4) for entry in block(f"decoder.up.{at}", at != 0)]
    target = [entry for at in range(4) for entry in block(f"decoder.up_blocks.{at}", at != 3)]
    found = mapped(source, target)
    assert found
    assert all(int(key.split(".")[2]) == 3 - int(made.split(".")[2]) for key, made in found.items())


def test_names_that_say_nothing_are_left_in_bounded_time() -> None:
    def names(seed: int) -> list[Entry]:
        chosen = random.Random(seed)
        return [Entry("".join(chosen.choices("abcdefghijklm", k=12)) + ".w", (5, at % 2 + 2)) for at in range(1500)]

    began = time.process_time()
    found = infer(names(1), names(2))
    assert time.process_time() - began < 15  # of a shared machine
    assert {doubt.reason for doubt in found.doubts} == {"too many tensors have its shape"}
    assert len(found.doubts) == 1500


def test_a_pair_that_is_certain_has_a_witness() -> None:
    assert all(pair.witnesses for pair in infer(encoder(), blocks()).pairs)


def test_copies_of_copies_go_with_those_that_went() -> None:
    """Of two modules each is alike to a third, which goes as a copy of the first before the second is looked at."""
    parts = {"a": range(10), "b": range(4, 14), "c": range(2, 12), "rest": range(10, 14)}
    source = [Entry(f"{name}.p{at}.w", (at + 3, 5)) for name, some in parts.items() for at in some]
    target = [Entry(f"x.p{at}.w", (at + 3, 5)) for at in range(14)]
    for one, other in ((source, target), (target, source)):
        found = infer(one, other)
        assert len(found.pairs) + len(found.doubts) + len(found.only_target) == len(other)
