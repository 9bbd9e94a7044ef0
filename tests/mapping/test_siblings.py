"""Two of a kind side by side: known or learned words tell them apart, the order of a listing alone does not."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from ckptool.mapping.infer import infer
from ckptool.mapping.pairs import Entry


def linear(name: str, out: int, inner: int) -> list[Entry]:
    return [Entry(f"{name}.weight", (out, inner)), Entry(f"{name}.bias", (out,))]


def tower(name: str, words: Sequence[str] = ("layer", "attn.q", "attn.o", "up", "down", "norm")) -> list[Entry]:
    """An encoder of three blocks, in words of its own."""
    block, q, o, up, down, norm = words
    found = [Entry(f"{name}.embed.weight", (50, 16))]
    for at in range(3):
        for part, shape in ((q, (24, 16)), (o, (16, 24)), (up, (40, 16)), (down, (16, 40))):
            found += linear(f"{name}.{block}.{at}.{part}", *shape)
        found.append(Entry(f"{name}.{block}.{at}.{norm}.weight", (16,)))
    return found


OTHER = ("blocks", "att.query", "att.out", "fc1", "fc2", "ln")
"""The words of another code base."""


def policy(names: Sequence[str]) -> list[Entry]:
    return [Entry("embed.weight", (30, 8))] + [
        entry for name in names for at in (0, 2) for entry in linear(f"net.{name}.{at}", 16, 16)
    ]  # fmt: skip


def translator(names: Sequence[str]) -> list[Entry]:
    found = [Entry(f"{name}.weight", (90, 16)) for name in names]
    for at in range(2):
        found += [*linear(f"layers.{at}.up", 40, 16), *linear(f"layers.{at}.down", 16, 40)]
    return found


def cell(names: Sequence[str]) -> list[Entry]:
    return [Entry("embed.weight", (30, 8))] + [
        Entry(f"rnn.{at}.{name}", (32, 8)) for at in range(2) for name in names
    ]  # fmt: skip


def glu(names: Sequence[str]) -> list[Entry]:
    found = [Entry("embed.weight", (30, 16))]
    for at in range(3):
        found += [Entry(f"layers.{at}.mlp.{name}.weight", (40, 16)) for name in names]
        found.append(Entry(f"layers.{at}.mlp.down.weight", (16, 40)))
    return found


def mapped(source: Sequence[Entry], target: Sequence[Entry], **wishes: object) -> dict[str, str]:
    return {pair.target: pair.source[0] for pair in infer(source, target, **wishes).pairs}  # type: ignore[arg-type]


def towers(names: Sequence[str], words: Sequence[str] | None = None) -> list[Entry]:
    return [entry for name in names for entry in (tower(name, words) if words else tower(name))]


MAKERS = {"towers": towers, "policy": policy, "translator": translator, "cell": cell, "glu": glu}


@pytest.mark.parametrize(
    ("kind", "ours", "theirs"),
    [
        ("towers", ("question_encoder", "ctx_encoder"), ("context", "question")),
        ("towers", ("query_encoder", "passage_encoder"), ("passage_tower", "query_tower")),
        ("towers", ("net.student", "net.teacher"), ("model.teacher", "model.student")),
        ("policy", ("policy_net", "value_net"), ("value", "policy")),
        ("policy", ("actor", "critic"), ("critic_head", "actor_head")),
        ("policy", ("mu", "log_std"), ("log_std_net", "mu_net")),
        ("translator", ("src_embed", "tgt_embed"), ("tgt_tok_embed", "src_tok_embed")),
        ("translator", ("src_embed", "tgt_embed"), ("target_embedding", "source_embedding")),
        ("translator", ("embed_users", "embed_items"), ("items", "users")),
        ("cell", ("weight_ih", "weight_hh"), ("w_hh", "w_ih")),
        ("cell", ("w_ih", "w_hh"), ("kernel_hh", "kernel_ih")),
        ("cell", ("i2h", "h2h"), ("h2h_weight", "i2h_weight")),
        ("glu", ("gate_proj", "up_proj"), ("up", "gate")),
        ("glu", ("wi_gate", "wi_up"), ("up_proj", "gate_proj")),
        ("glu", ("linear", "act"), ("act_fc", "linear_fc")),
    ],
)
def test_siblings_listed_the_other_way_round_follow_their_words(
    kind: str, ours: Sequence[str], theirs: Sequence[str]
) -> None:
    made = MAKERS[kind]
    source, target = made(ours), made(theirs)
    swapped = dict(zip((entry.key for entry in made(theirs[::-1])), (entry.key for entry in source), strict=True))
    found = mapped(source, target)
    assert found.items() <= swapped.items()
    assert all(any(name in key for key in found) for name in theirs)


@pytest.mark.parametrize(
    ("kind", "ours", "theirs"),
    [
        ("towers", ("question_encoder", "ctx_encoder"), ("tower_x", "tower_y")),
        ("towers", ("question_encoder", "ctx_encoder"), ("seeker", "found")),
        ("towers", ("left", "right"), ("seeker", "found")),
        ("policy", ("pi", "vf"), ("actor", "critic")),
        ("policy", ("policy_net", "value_net"), ("deciding", "judging")),
        ("policy", ("online", "frozen"), ("first", "second")),
        ("translator", ("src_embed", "tgt_embed"), ("embed_in", "embed_de")),
        ("translator", ("users", "items"), ("left", "right")),
        ("translator", ("src_embed", "tgt_embed"), ("german", "english")),
        ("cell", ("w_ih", "w_hh"), ("recurrent", "kernel")),
        ("cell", ("w_ih", "w_hh"), ("U", "W")),
        ("cell", ("i2h", "h2h"), ("lateral", "feed")),
        ("glu", ("gate_proj", "up_proj"), ("w1", "w3")),
        ("glu", ("gate_proj", "up_proj"), ("lin", "act")),
        ("glu", ("w1", "w3"), ("val", "swish")),
    ],
)
@pytest.mark.parametrize("turned", [False, True], ids=["as_listed", "turned"])
def test_siblings_whose_words_say_nothing_are_left_to_a_person(
    kind: str, ours: Sequence[str], theirs: Sequence[str], turned: bool
) -> None:
    made = MAKERS[kind]
    source, target = made(ours), made(theirs[::-1] if turned else theirs)
    found = infer(source, target)
    told = [pair.target for pair in found.pairs if any(name in pair.target for name in theirs)]
    assert not told
    doubts = {doubt.target: doubt for doubt in found.doubts}
    open_ = [entry.key for entry in target if any(name in entry.key for name in theirs)]
    assert set(open_) <= {*doubts}
    assert any(len(doubts[key].candidates) > 1 for key in open_)


def test_siblings_of_which_values_or_a_person_settled_one_are_told_apart_by_it() -> None:
    source, target = policy(("pi", "vf")), policy(("critic", "actor"))
    first = infer(source, target)
    doubt = next(one for one in first.doubts if one.target == "net.actor.0.weight")
    said = next(one for one in doubt.candidates if one.source == ["net.pi.0.weight"])
    found = mapped(source, target, settled=[said])
    assert found["net.actor.0.bias"] == "net.pi.0.bias"
    assert found.get("net.critic.0.weight", "net.vf.0.weight") == "net.vf.0.weight"


def layers(name: str, parts: Sequence[tuple[str, tuple[int, ...]]], count: int = 3) -> list[Entry]:
    return [Entry(f"{name}.{at}.{part}.weight", shape) for at in range(count) for part, shape in parts]


ATTENTION, MLP = [("attn.q", (24, 16)), ("attn.o", (16, 24))], [("mlp.up", (40, 16)), ("mlp.down", (16, 40))]


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (("attention_norm", "ffn_norm"), ("input_layernorm", "post_attention_layernorm")),
        (("self_attn_ln", "mlp_ln"), ("pre_ln", "post_ln")),
        (("sa_norm", "mlp_norm"), ("norm1", "norm2")),
        (("self_attn_layer_norm", "final_layer_norm"), ("attn_norm", "mlp_norm")),
    ],
)
@pytest.mark.parametrize("other_way_round", [False, True])
def test_norms_of_a_block_go_by_what_they_are_named_after(
    ours: tuple[str, str], theirs: tuple[str, str], other_way_round: bool
) -> None:
    def block(norms: Sequence[str]) -> list[tuple[str, tuple[int, ...]]]:
        return [*ATTENTION, *MLP, *((norm, (16,)) for norm in norms)]

    found = mapped(layers("layers", block(ours)), layers("h", block(theirs[::-1] if other_way_round else theirs)))
    pairs = [*zip(ours, theirs, strict=True)]
    assert found | {f"h.{at}.{b}.weight": f"layers.{at}.{a}.weight" for at in range(3) for a, b in pairs} == found


@pytest.mark.parametrize("names", [("first", "last"), ("ln_x", "ln_y"), ("norm_i", "norm_ii")])
def test_a_norm_between_known_layers_has_its_place_by_them_and_norms_side_by_side_do_not(
    names: tuple[str, str],
) -> None:
    one, two = names
    ours = layers("layers", [("norm_a", (16,)), *ATTENTION, ("norm_b", (16,)), *MLP])
    found = mapped(ours, layers("h", [(one, (16,)), *ATTENTION, (two, (16,)), *MLP]))
    assert found.get(f"h.1.{two}.weight", "layers.1.norm_b.weight") == "layers.1.norm_b.weight"
    beside = [("norm_a", (16,)), ("norm_b", (16,)), *ATTENTION, *MLP]
    found = mapped(layers("layers", beside), layers("h", [(one, (16,)), (two, (16,)), *ATTENTION, *MLP]))
    assert not [key for key in found if one in key or two in key]


@pytest.mark.parametrize("words", [("weights", "shadow"), ("net", "ema_net"), ("student", "teacher")])
def test_the_copy_of_an_average_may_lie_in_a_wrapper_of_its_own(words: tuple[str, str]) -> None:
    model, average = words
    one = [entry._replace(key=entry.key.removeprefix("x.")) for entry in tower("x")]
    source = [entry._replace(key=f"{average}.module.{entry.key}") for entry in one]
    source += [entry._replace(key=f"{model}.{entry.key}") for entry in one]
    assert mapped(source, one) == {entry.key: f"{model}.{entry.key}" for entry in one}


@pytest.mark.parametrize(
    ("ours", "theirs"), [("conv3", "downsample.0"), ("mlp.up", "attn.proj"), ("expand_3x3", "expand_1x1")]
)
def test_a_lone_survivor_is_not_taken_for_another_where_tensors_are_missing_on_both_sides(
    ours: str, theirs: str
) -> None:
    def side(name: str, own: str, sizes: Sequence[int]) -> list[Entry]:
        found = [entry for size in (*sizes, 5, 7, 9, 11) for entry in linear(f"{name}.part{size}", size, size + 1)]
        return [*found, Entry(f"{name}.block.{own}.weight", (64, 32))]

    found = infer(side("net", ours, (20, 22)), side("model", theirs, (30, 32)))
    assert not [pair.target for pair in found.pairs if theirs in pair.target]
    assert len(found.pairs) == 8


def test_every_pair_that_is_taken_has_two_witnesses() -> None:
    for names in (("question_encoder", "ctx_encoder"), ("query", "passage")):
        for pair in infer(towers(names), towers([f"{name}_model" for name in names])).pairs:
            assert len(pair.witnesses) > 1, pair
