"""Init rules: how they are written, what torch would do by default, presets, and which key gets which."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import ckptool
from ckptool.core.tensor import Derived, Draw, Opaque, Span, Storage, TensorInfo, contiguous_stride
from ckptool.core.tree import PyObject
from ckptool.errors import UsageError
from ckptool.partial import layers
from ckptool.partial.init import METHODS, calculate_gain, check_dtype, parse, parse_option, usage
from ckptool.partial.initplan import Made, plan
from ckptool.partial.presets import PRESETS, described
from ckptool.values import random_init


def infos(state: Mapping[str, torch.Tensor]) -> dict[str, TensorInfo]:
    """A state_dict as ckptool would open it: names of one tensor share a storage."""
    made: dict[int, TensorInfo] = {}
    for tensor in state.values():
        dtype, shape = str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)
        source = Storage(Span("model.pth", 0, tensor.nbytes), dtype)
        made.setdefault(tensor.data_ptr(), TensorInfo(dtype, shape, contiguous_stride(shape), 0, source))
    return {key: made[tensor.data_ptr()] for key, tensor in state.items()}


def shaped(**shapes: tuple[int, ...]) -> dict[str, TensorInfo]:
    return infos({key.replace("__", "."): torch.zeros(shape) for key, shape in shapes.items()})


def values(tensor: TensorInfo) -> torch.Tensor:
    assert isinstance(tensor.source, Derived)
    assert tensor.shape is not None
    data = bytearray(b"".join(random_init.blocks(tensor.source.args, tensor.dtype)))
    return torch.frombuffer(data, dtype=getattr(torch, tensor.dtype)).reshape(tensor.shape)


def planned(tensors: dict[str, TensorInfo], *rules: str, wanted: Iterable[str] | None = None, **options: Any) -> Made:
    """The plan for rules that all fit and give no trouble."""
    options = {"presets": (), "seed": 0, **options}
    made, unused, troubles = plan(
        [parse_option(rule) for rule in rules], tensors=tensors, wanted=tensors if wanted is None else wanted, **options
    )
    assert (unused, troubles) == ([], [])
    return made


def troubles(tensors: dict[str, TensorInfo], *rules: str, **options: Any) -> list[str]:
    options = {"presets": (), "seed": 0, "wanted": tensors, **options}
    return plan([parse_option(rule) for rule in rules], tensors=tensors, **options)[2]


# --- how rules are written ---------------------------------------------------------------------------------------


def test_every_method_of_torch_is_known_with_its_arguments() -> None:
    """By name and order, from torch's own signatures; generator and tensor aside."""
    import inspect

    theirs = {name.removesuffix("_") for name in dir(nn.init) if name.endswith("_") and not name.startswith("_")}
    assert theirs == set(METHODS) - {"keep", "default"}
    for name in theirs:
        signature = inspect.signature(getattr(nn.init, f"{name}_"))
        wanted = [one for one in signature.parameters.values() if one.name not in ("tensor", "generator")]
        assert [one.name for one in wanted] == [one for one, _, _ in METHODS[name]]
        for one, (_, _, default) in zip(wanted, METHODS[name], strict=True):
            if one.default is inspect.Parameter.empty:
                assert default is None
            else:
                assert default == (one.default if isinstance(one.default, str) else f"{one.default:g}")


@pytest.mark.parametrize(
    ("text", "method", "args"),
    [
        ("zeros", "zeros", ()),
        ("zeros_", "zeros", ()),
        ("zeros()", "zeros", ()),
        (" normal( 0 , std = 1e-2 ) ", "normal", (0.0, 0.01)),
        ("uniform", "uniform", (0.0, 1.0)),
        ("uniform(-.5)", "uniform", (-0.5, 1.0)),
        ("kaiming_normal_(mode='fan_out', nonlinearity=\"relu\")", "kaiming_normal", (0.0, "fan_out", "relu")),
        ("kaiming_uniform(a=sqrt(5))", "kaiming_uniform", (math.sqrt(5), "fan_in", "leaky_relu")),
        ("kaiming_uniform(sqrt(5),FAN_OUT)", "kaiming_uniform", (math.sqrt(5), "fan_out", "leaky_relu")),
        ("xavier_uniform(gain=relu)", "xavier_uniform", (math.sqrt(2),)),
        ("xavier_normal(leaky_relu:0.2)", "xavier_normal", (math.sqrt(2 / 1.04),)),
        ("xavier_normal(leaky_relu)", "xavier_normal", (math.sqrt(2 / 1.0001),)),
        ("orthogonal(-2)", "orthogonal", (-2.0,)),
        ("sparse(0.1)", "sparse", (0.1, 0.01)),
        ("dirac(groups=4)", "dirac", (4,)),
        ("constant(val=0.3)", "constant", (0.3,)),
        ("trunc_normal(std=0.02)", "trunc_normal", (0.0, 0.02, -2.0, 2.0)),
        ("keep", "keep", ()),
        ("default", "default", ()),
    ],
)
def test_rules_are_written_as_in_torch(text: str, method: str, args: tuple[Any, ...]) -> None:
    rule = parse(text)
    assert rule.method == method
    assert rule.args == pytest.approx(args) if all(isinstance(arg, float) for arg in args) else rule.args == args
    assert rule.text == text.strip()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "there are keep, default, uniform(a=0,b=1)"),
        ("kaiming", "there are keep"),
        ("normal(0,1", "no init rule"),
        ("normal)", "no init rule"),
        ("lecun_normal(1)", "no init rule 'lecun_normal(1)'"),
        ("zeros(1)", "no arguments at most: zeros"),
        ("normal(0,1,2)", "2 arguments at most: normal(mean=0,std=1)"),
        ("normal(sigma=1)", "'sigma' is no argument: normal(mean=0,std=1)"),
        ("normal(std=1,std=2)", "'std' is given twice"),
        ("normal(0,mean=2)", "'mean' is given twice"),
        ("normal(std=1,0)", "arguments without a name come first"),
        ("normal(mean=0,1)", "arguments without a name come first"),
        ("normal(,1)", "mean is a number, not ''"),
        ("normal(x)", "mean is a number, not 'x'"),
        ("normal(nan)", "mean is a number, not 'nan'"),
        ("normal(0,inf)", "std is a number, 0 or more, not 'inf'"),
        ("normal(0,1e999)", "std is a number, 0 or more"),
        ("normal(0,1_0)", "std is a number, 0 or more"),
        ("normal(0,-1)", "std is a number, 0 or more, not '-1'"),
        ("uniform(1,0)", "a is 1, over b"),
        ("trunc_normal(std=0)", "std is a number over 0"),
        ("trunc_normal(a=2,b=2)", "b is not over it"),
        ("trunc_normal(std=0.01,a=1)", "over 37 std from the mean; uniform(1,2)?"),
        ("constant", "val is missing (a number): constant(val)"),
        ("sparse", "sparsity is missing (a number from 0 to 1): sparse(sparsity,std=0.01)"),
        ("sparse(1.5)", "a number from 0 to 1"),
        ("dirac(0)", "a whole number over 0"),
        ("dirac(1.5)", "a whole number over 0"),
        ("xavier_uniform(gain=gelu)", "tanh, relu, leaky_relu or selu, not 'gelu'"),
        ("xavier_uniform(relu:0.2)", "not 'relu:0.2'"),
        ("xavier_uniform(-1)", "a number, 0 or more"),
        ("kaiming_normal(mode=fan)", "mode is fan_in or fan_out, not 'fan'"),
        ("kaiming_normal(nonlinearity=gelu)", "leaky_relu or selu, not 'gelu'"),
        ("kaiming_normal(fan_out)", "a is a number, not 'fan_out'"),
    ],
)
def test_what_is_no_rule_is_refused_in_one_line(text: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(text)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_options_are_a_pattern_and_a_rule() -> None:
    assert parse_option("fc.*=zeros") == ("fc.*", "zeros")
    assert parse_option("*=kaiming_normal(mode=fan_out)") == ("*", "kaiming_normal(mode=fan_out)")
    assert parse_option("re:(?=fc).*=xavier_uniform(gain=relu)") == ("re:(?=fc).*", "xavier_uniform(gain=relu)")
    assert parse_option("fc=kaiming_uniform(a=sqrt(5))") == ("fc", "kaiming_uniform(a=sqrt(5))")
    for wrong in ("fc.weight", "=zeros", "fc.*=", "fc.*=normal(0,1"):
        with pytest.raises(UsageError, match="KEYGLOB=RULE"):
            parse_option(wrong)
    with pytest.raises(UsageError, match="no init rule"):
        parse_option("fc.*=zeross")


@pytest.mark.parametrize("name", ["linear", "conv2d", "sigmoid", "tanh", "relu", "leaky_relu", "selu"])
def test_gains_are_torchs(name: Any) -> None:
    assert calculate_gain(name) == pytest.approx(nn.init.calculate_gain(name), rel=1e-15)
    assert calculate_gain(name, 0.3) == pytest.approx(nn.init.calculate_gain(name, 0.3), rel=1e-15)


# --- what they mean for a shape ----------------------------------------------------------------------------------


def test_fans_are_torchs() -> None:
    assert [layers.fans((size,)) for size in (1, 3, 8)] == [None] * 3
    for shape in (shape for n in range(2, 6) for shape in itertools.product((1, 3, 8), repeat=n)):
        assert layers.fans(shape) == nn.init._calculate_fan_in_and_fan_out(torch.empty(shape)), shape


@pytest.mark.parametrize(
    ("rule", "numbers"),
    [
        ("xavier_uniform", (-math.sqrt(6 / 30), math.sqrt(6 / 30))),
        ("xavier_normal(2)", (0, 2 * math.sqrt(2 / 30))),
        ("kaiming_uniform", (-math.sqrt(6 / 18), math.sqrt(6 / 18))),
        ("kaiming_uniform(mode=fan_out,nonlinearity=linear)", (-math.sqrt(3 / 12), math.sqrt(3 / 12))),
        ("kaiming_normal(1)", (0, math.sqrt(1 / 18))),
        ("kaiming_normal(mode=fan_out,nonlinearity=tanh)", (0, 5 / 3 / math.sqrt(12))),
        ("orthogonal(relu)", (math.sqrt(2),)),
        ("normal", (0, 1)),
        ("ones", (1,)),
    ],
)
def test_bounds_and_deviations_come_from_fans_and_gain(rule: str, numbers: tuple[float, ...]) -> None:
    assert parse(rule).draw((4, 6, 3), 0, "w").numbers == pytest.approx(numbers, rel=1e-15)


@pytest.mark.parametrize(
    "rule",
    ["xavier_uniform", "xavier_normal", "kaiming_uniform", "kaiming_normal", "orthogonal", "sparse(0.5)", "eye",
     "dirac", "dirac(2)", "dirac(3)", "normal", "zeros"],
)  # fmt: skip
def test_the_shapes_refused_are_those_torch_refuses(rule: str) -> None:
    parsed = parse(rule)
    for shape in ((), (4,), (4, 2), (4, 2, 3), (4, 2, 3, 3), (4, 2, 3, 3, 3), (4, 2, 1, 1, 1, 1)):
        try:
            getattr(nn.init, f"{parsed.method}_")(torch.zeros(shape), *parsed.args)
        except ValueError:
            with pytest.raises(UsageError, match="and it is"):
                parsed.draw(shape, 0, "w")
        else:
            assert parsed.draw(shape, 0, "w").shape == shape


@pytest.mark.parametrize(
    ("rule", "dtype", "words"),
    [
        ("normal", "int64", "zeros, ones, constant(N) or keep"),
        ("eye", "bool", "zeros, ones"),
        ("constant(0.5)", "int32", "int32 has no value 0.5"),
        ("constant(300)", "uint8", "uint8 has no value 300"),
        ("constant(-1)", "uint8", "uint8 has no value -1"),
        ("constant(128)", "int8", "int8 has no value 128"),
        ("constant(2)", "bool", "bool has no value 2"),
        ("constant(1e300)", "int64", "int64 has no value"),
        ("constant(1e5)", "float16", "float16 cannot hold"),
        ("normal(0,1e4)", "float16", "float16 cannot hold"),
        ("uniform(-5e4,5e4)", "float16", "float16 cannot hold"),
        ("uniform(-1e308,1e308)", "float64", "float64 cannot hold"),
        ("trunc_normal(a=-1e39)", "float32", "float32 cannot hold"),
        ("orthogonal(1e6)", "float16", "float16 cannot hold"),
        ("normal", "float8_e4m3fn", "only float16"),
        ("zeros", "complex64", "only float16"),
    ],
)
def test_values_that_a_dtype_lacks_are_refused(rule: str, dtype: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        check_dtype(parse(rule).draw((4, 4), 0, "w"), rule, dtype)
    assert words in str(caught.value)


def test_values_that_a_dtype_has_are_taken() -> None:
    for rule, dtype in (("constant(-128)", "int8"), ("ones", "bool"), ("constant(255)", "uint8"),
                        ("normal(0,7000)", "float16"), ("constant(-3)", "int64"), ("dirac", "bfloat16")):  # fmt: skip
        check_dtype(parse(rule).draw((4, 4, 1), 0, "w"), rule, dtype)


# --- torch's own defaults ----------------------------------------------------------------------------------------

MODULES = {
    "linear": lambda: nn.Linear(300, 200),
    "linear without bias": lambda: nn.Linear(300, 200, bias=False),
    "conv1d": lambda: nn.Conv1d(32, 64, 5),
    "conv2d": lambda: nn.Conv2d(32, 64, 5, groups=4),
    "conv2d without bias": lambda: nn.Conv2d(64, 64, 5, bias=False),
    "depthwise": lambda: nn.Conv2d(512, 512, 5, groups=512),
    "conv3d": lambda: nn.Conv3d(8, 64, (2, 3, 4)),
    "transposed": lambda: nn.ConvTranspose2d(64, 32, 5),
    "transposed, groups": lambda: nn.ConvTranspose1d(64, 128, 5, groups=4),
    "batchnorm": lambda: nn.BatchNorm2d(64),
    "batchnorm, no weight": lambda: nn.BatchNorm1d(64, affine=False),
    "batchnorm, no statistics": lambda: nn.BatchNorm1d(64, track_running_stats=False),
    "instancenorm": lambda: nn.InstanceNorm2d(64, affine=True, track_running_stats=True),
    "layernorm": lambda: nn.LayerNorm(64),
    "layernorm, two sizes": lambda: nn.LayerNorm((8, 8)),
    "groupnorm": lambda: nn.GroupNorm(4, 64),
    "rms_norm": lambda: nn.ModuleDict({"rms_norm": nn.RMSNorm(64)}),
    "embedding": lambda: nn.ModuleDict({"wte": nn.Embedding(300, 200)}),
    "embeddings": lambda: nn.ModuleDict({"tok_embeddings": nn.ModuleList([nn.EmbeddingBag(300, 200)])}),
    "lstm": lambda: nn.LSTM(60, 70, num_layers=2, bidirectional=True),
    "lstm, projection": lambda: nn.LSTM(60, 100, proj_size=20),
    "gru": lambda: nn.GRU(60, 70, bias=False),
    "rnn": lambda: nn.RNN(60, 120),
    "cell": lambda: nn.LSTMCell(60, 120),
    "attention": lambda: nn.MultiheadAttention(120, 4),
    "attention, other sizes": lambda: nn.MultiheadAttention(120, 4, kdim=60, vdim=90, add_bias_kv=True),
    "attention, no bias": lambda: nn.MultiheadAttention(120, 4, bias=False),
    "transformer": lambda: nn.TransformerEncoderLayer(64, 4, 128),
    "bilinear": lambda: nn.ModuleDict({"bilinear": nn.Bilinear(20, 30, 40)}),
}


@pytest.mark.parametrize("name", MODULES)
def test_default_is_what_reset_parameters_does(name: str) -> None:
    torch.manual_seed(0)
    module = MODULES[name]()
    state = module.state_dict()
    if name == "transformer":  # its attention's out_proj.bias is 0 by the attention, not by the Linear it is
        assert planned(infos(state), "*=default")["self_attn.out_proj.bias"][1] == "default: zeros"
    made = planned(infos(state), "*=default")
    assert list(made) == list(state)
    for key, theirs in state.items():
        mine = values(made[key][0])
        assert mine.dtype == theirs.dtype
        if theirs.numel() < 2 or theirs.std() == 0:
            assert torch.equal(mine, theirs), key
            continue
        few = 4 / math.sqrt(theirs.numel())  # samples are as uneven as they are few
        assert mine.std().item() == pytest.approx(theirs.std().item(), rel=max(0.02, few)), key
        uniform = "uniform" in made[key][1]
        assert (mine.abs().max() < 2 * mine.std()) == uniform == bool(theirs.abs().max() < 2 * theirs.std()), key


def bound(rule: tuple[TensorInfo, str]) -> tuple[float, ...]:
    source = rule[0].source
    assert isinstance(source, Derived)
    assert isinstance(source.args, Draw)
    return source.args.numbers


def test_default_bounds_are_exact() -> None:
    made = planned(infos(nn.Conv2d(3, 64, 7).state_dict()), "*=default")
    assert bound(made["weight"]) == pytest.approx((-1 / math.sqrt(147), 1 / math.sqrt(147)), rel=1e-15)
    assert bound(made["bias"]) == (-1 / math.sqrt(147), 1 / math.sqrt(147))
    made = planned(infos(nn.LSTM(60, 100, proj_size=20).state_dict()), "*=default")
    assert {bound(rule) for rule in made.values()} == {(-0.1, 0.1)}


def test_what_default_says_is_a_rule_that_does_the_same() -> None:
    tensors = infos(nn.Sequential(nn.Linear(30, 20), nn.BatchNorm1d(20)).state_dict())
    made = planned(tensors, "*=default")
    again = planned(tensors, *(f"{key}={text.removeprefix('default: ')}" for key, (_, text) in made.items()))
    assert [bound(rule) for rule in again.values()] == [bound(rule) for rule in made.values()]


AMBIGUOUS: dict[str, dict[str, tuple[int, ...]]] = {
    "cls_token": {"cls_token": (1, 1, 64)},
    "blocks.0.ls1.gamma": {"blocks__0__ls1__gamma": (64,)},
    "act.weight": {"act__weight": (64,)},  # PReLU, or a norm without bias?
    "c_attn.weight": {"c_attn__weight": (64, 192), "c_attn__bias": (192,)},
    "head.bias": {"head__bias": (1000,)},
    "conv.weight_g": {"conv__weight_g": (64, 1, 1, 1), "conv__weight_v": (64, 3, 7, 7)},
    "big.weight": {"big__weight": (2, 2, 2, 2, 2, 2)},
    "scale": {"scale": ()},
}


@pytest.mark.parametrize("key", AMBIGUOUS)
def test_what_cannot_be_read_is_refused(key: str) -> None:
    (line,) = troubles(shaped(**AMBIGUOUS[key]), "*=default")
    assert key in line
    assert "no default can be read from keys and shapes for" in line
    assert f"{key}=keep" in line or "weight_g" in key or "c_attn" in key


def test_all_that_cannot_be_read_is_said_at_once_and_folded() -> None:
    tensors = shaped(pos_embed=(1, 9, 8), **{f"blocks__{n}__gamma": (8,) for n in range(12)}, fc__weight=(3, 8))
    (line,) = troubles(tensors, "*=default")
    assert "for pos_embed, blocks.{0..11}.gamma: name a rule, such as 'pos_embed=normal(0,0.02)'" in line


@pytest.mark.parametrize(
    ("module", "embedding"),
    [
        ("wte", True), ("model.embed_tokens", True), ("bert.embeddings.word_embeddings", True), ("tok_emb", True),
        ("emb.0", True), ("token_embedding_table", True), ("embed_in", True), ("wordEmbedding", True),
        ("_orig_mod.tokens._checkpoint_wrapped_module", True),
        ("embed_out", False), ("patch_embed.proj", False), ("lm_head", False), ("token_mixing", False),
        ("embed_proj", False), ("member", False), ("fc", False),
    ],
)  # fmt: skip
def test_a_matrix_without_bias_is_an_embedding_by_its_name(module: str, embedding: bool) -> None:
    role = layers.read(f"{module}.weight", infos({f"{module}.weight": torch.zeros(30, 8)}))
    assert role is not None
    assert role.name == ("embedding weight" if embedding else "linear weight")


@pytest.mark.parametrize(
    ("module", "norm"),
    [("norm", True), ("ln_f", True), ("input_layernorm", True), ("lnorm", True), ("q_norm", True), ("gate", False),
     ("act", False), ("line", False), ("alpha", False), ("attention_norm", True)],
)  # fmt: skip
def test_a_vector_without_bias_is_a_norm_by_its_name(module: str, norm: bool) -> None:
    role = layers.read(f"{module}.weight", infos({f"{module}.weight": torch.zeros(30)}))
    assert (role is not None and role.name == "norm weight") == norm


@pytest.mark.parametrize(
    ("name", "shape", "rule"),
    [
        ("PReLU", (64,), "constant(0.25)"), ("RMSNorm", (64,), "ones"), ("Embedding", (9, 4), "normal(0,1)"),
        ("Linear", (9, 4), "kaiming_uniform(a=sqrt(5))"), ("Conv1D", (4, 9), "normal(0,0.02)"),
        ("Bilinear", (5, 4, 3), "uniform(-0.5,0.5)"), ("Conv1d", (5, 4, 3), "kaiming_uniform(a=sqrt(5))"),
        ("Tailored", (9, 4), "kaiming_uniform(a=sqrt(5))"),
    ],
)  # fmt: skip
def test_a_known_class_decides(name: str, shape: tuple[int, ...], rule: str) -> None:
    made = planned(shaped(a__b__weight=shape), "*=default", classes={"a.b": name})
    assert made["a.b.weight"][1] == f"default: {rule}"


def test_gamma_and_beta_are_a_norm_together_only() -> None:
    tensors = shaped(LayerNorm__gamma=(8,), LayerNorm__beta=(8,), block__gamma=(8,))
    assert [layers.read(key, tensors) for key in tensors] == [
        layers.Role("norm weight", "ones"), layers.Role("norm bias", "zeros"), None,
    ]  # fmt: skip


def test_every_role_is_in_the_list_of_roles() -> None:
    seen = set()
    for build in MODULES.values():
        tensors = infos(build().state_dict())
        seen |= {role.name for key in tensors if (role := layers.read(key, tensors))}
    for name in ("PReLU", "Conv1D"):
        tensors = shaped(weight=(4, 9), bias=(9,))
        seen |= {role.name for key in tensors if (role := layers.read(key, tensors, {"": name}))}
    assert seen == layers.NAMES


# --- which rule each key gets ------------------------------------------------------------------------------------


def test_only_what_is_wanted_and_has_a_rule_is_made() -> None:
    tensors = shaped(a__weight=(3, 4), a__bias=(3,), b__weight=(3, 4))
    made = planned(tensors, "*.bias=zeros", "b.*=normal(0,0.01)", wanted=["b.weight", "a.bias"])
    assert {key: text for key, (_, text) in made.items()} == {"b.weight": "normal(0,0.01)", "a.bias": "zeros"}
    assert planned(tensors) == {}
    assert planned(tensors, "*=keep") == {}


def test_the_last_rule_wins_over_earlier_ones_and_over_presets() -> None:
    tensors = shaped(fc__weight=(3, 4), fc__bias=(3,), conv__weight=(3, 4, 3, 3))
    made = planned(tensors, "*=ones", "fc.*=zeros", "re:bias$=constant(2)", presets=["kaiming"])
    assert [text for _, text in made.values()] == ["zeros", "constant(2)", "ones"]
    made = planned(tensors, "fc.weight=keep", presets=["kaiming", "xavier"])
    assert {key: text for key, (_, text) in made.items()} == {
        "fc.bias": "xavier: zeros",
        "conv.weight": "xavier: xavier_uniform",
    }


def test_patterns_that_fit_nothing_wanted_are_said() -> None:
    tensors = shaped(a__weight=(3, 4), b__weight=(3, 4))
    rules = [("b.*", "zeros"), ("c.*", "zeros"), ("a.*", "ones"), ("re:^d", "ones")]
    assert plan(rules, (), tensors, ["a.weight"], 0)[1] == ["b.*", "c.*", "re:^d"]


def test_all_troubles_are_collected() -> None:
    state = {"a.bias": torch.zeros(3), "b.bias": torch.zeros(3), "n": torch.zeros(2, dtype=torch.int64),
             "c.weight": torch.zeros(3, 3, 2), "x": torch.zeros(3)}  # fmt: skip
    found = troubles(infos(state), "*.bias=xavier_uniform", "n=normal", "c.*=eye", "x=default")
    assert found == [
        "a.bias: xavier_uniform needs two dimensions or more, and it is 3",
        "b.bias: xavier_uniform needs two dimensions or more, and it is 3",
        "n: normal makes fractions, and it is int64: zeros, ones, constant(N) or keep",
        "c.weight: eye needs two dimensions, and it is 3x3x2",
        "no default can be read from keys and shapes for x: name a rule, such as 'x=normal(0,0.02)' or 'x=keep'",
    ]


def test_unknown_rules_and_presets_are_usage_errors() -> None:
    with pytest.raises(UsageError, match="no init rule"):
        plan([("*", "nonsense")], (), {}, [], 0)
    with pytest.raises(UsageError, match="no init preset 'heaven'; there are kaiming"):
        plan([], ["heaven"], {}, [], 0)


def test_a_made_tensor_is_what_the_old_one_was() -> None:
    old = replace(shaped(w=(4, 6))["w"], stride=(1, 4), storage_offset=7, is_parameter=True, requires_grad=True)
    made = planned({"w": replace(old, dtype="bfloat16")}, "w=normal", seed=3)["w"][0]
    assert (made.dtype, made.shape, made.stride, made.storage_offset) == ("bfloat16", (4, 6), (6, 1), 0)
    assert (made.is_parameter, made.requires_grad, made.is_whole, made.kind) == (True, True, True, "dense")
    assert made.source.args == Draw("normal", (0.0, 1.0), (4, 6), 3, "w")  # type: ignore[union-attr]


def test_the_report_names_the_version_of_numpy_where_random_numbers_were_drawn() -> None:
    torch.save({"w": torch.zeros(4, 4), "b": torch.zeros(4)}, "target.pth")

    def version(**init: str) -> str | None:
        return ckptool.plan_partial(None, "target.pth", init=init)[1].numpy

    assert version(w="normal") == version(w="orthogonal", b="zeros") == np.__version__
    assert version(b="zeros") is version(w="eye") is None


def test_adding_a_key_changes_no_other() -> None:
    few = planned(shaped(b__weight=(30, 4)), "*=default")
    many = planned(shaped(a__weight=(30, 4), b__weight=(30, 4), c__weight=(30, 4)), "*=default")
    assert torch.equal(values(few["b.weight"][0]), values(many["b.weight"][0]))
    assert not torch.equal(values(many["a.weight"][0]), values(many["b.weight"][0]))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lm_head = nn.Linear(8, 30, bias=False)
        self.wte = nn.Embedding(30, 8)
        self.lm_head.weight = self.wte.weight


def test_tied_names_get_one_draw_and_stay_tied() -> None:
    tensors = infos(Tied().state_dict())
    made = planned(tensors, "*=default")
    assert made["lm_head.weight"][0] is made["wte.weight"][0]
    assert {text for _, text in made.values()} == {"default: normal(0,1)"}  # the embedding's, as in the module
    assert bound(made["wte.weight"]) == (0.0, 1.0)
    made = planned(tensors, "wte.*=zeros")
    assert list(made) == ["lm_head.weight", "wte.weight"]
    assert {text for _, text in planned(tensors, presets=["kaiming"]).values()} == {"default: normal(0,1)"}
    other = replace(tensors["wte.weight"])  # two objects, the same elements
    made = planned({**tensors, "wte.weight": other}, "*=zeros")
    assert made["wte.weight"][0] is not made["lm_head.weight"][0]
    assert made["wte.weight"][0].view == made["lm_head.weight"][0].view


def test_tied_names_under_two_rules_are_refused() -> None:
    tensors = infos(Tied().state_dict())
    (line,) = troubles(tensors, "wte.*=zeros", "lm_head.*=ones")
    assert line == "one tensor under several names gets one rule: lm_head.weight=ones, wte.weight=zeros"
    assert troubles(tensors, "wte.*=normal(0,1)", "lm_head.*=normal") == []
    assert "gets one rule" in troubles(tensors, "wte.*=keep", "lm_head.*=ones")[0]
    (line,) = troubles(tensors, "wte.*=zeros", wanted=["wte.weight"])
    assert line == "wte.weight is the same tensor as lm_head.weight, which is not to be initialised"


def test_tensors_on_meta_are_initialised_and_others_without_bytes_are_refused() -> None:
    def opaque(kind: str) -> TensorInfo:
        return TensorInfo("float32", (3, 4), (4, 1), 0, Opaque(kind, PyObject.__new__(PyObject)))

    tensors = {"a": opaque("meta"), "b": opaque("sparse_coo"), "c": opaque("meta")}
    assert troubles(tensors, "a=normal", "b=normal") == ["b: a sparse_coo tensor is not initialised: keep"]
    assert planned({"a": tensors["a"]}, "a=normal")["a"][0].kind == "dense"


# --- presets -----------------------------------------------------------------------------------------------------


def small_cnn() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 16, 3, bias=False), nn.Linear(16, 4))


def test_every_preset_is_made_of_rules_and_roles_that_exist() -> None:
    for name, preset in PRESETS.items():
        for fits, rule, _ in preset.rows:
            parse(rule)
            assert fits in layers.NAMES or "*" in fits or "." in fits, (name, fits)
        assert f"{name}  {preset.source}" in described()


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_initialises_a_whole_model(name: str) -> None:
    model = nn.ModuleDict({"stem": small_cnn(), "enc": nn.TransformerEncoderLayer(8, 2, 16), "wte": nn.Embedding(9, 8)})
    tensors = infos(model.state_dict())
    made = planned(tensors, presets=[name])
    assert list(made) == list(tensors)
    assert all(torch.isfinite(values(tensor)).all() for tensor, _ in made.values())


def test_kaiming_is_the_usual_recipe() -> None:
    made = planned(infos(small_cnn().state_dict()), presets=["kaiming"])
    assert {key: text for key, (_, text) in made.items()} == {
        "0.weight": "kaiming: kaiming_normal(mode=fan_out,nonlinearity=relu)",
        "0.bias": "kaiming: zeros",
        "1.weight": "kaiming: ones",
        "1.bias": "kaiming: zeros",
        "1.running_mean": "kaiming: zeros",
        "1.running_var": "kaiming: ones",
        "1.num_batches_tracked": "kaiming: zeros",
        "2.weight": "kaiming: kaiming_normal(mode=fan_out,nonlinearity=relu)",
        "3.weight": "kaiming: normal(0,0.01)",
        "3.bias": "kaiming: zeros",
    }
    assert bound(made["2.weight"]) == (0.0, math.sqrt(2) / math.sqrt(16 * 9))


def test_resnext_goes_by_key_as_its_reference_does() -> None:
    model = nn.ModuleDict({"conv_1_3x3": nn.Conv2d(3, 8, 3, bias=False), "bn_1": nn.BatchNorm2d(8),
                           "classifier": nn.Linear(8, 4)})  # fmt: skip
    torch.manual_seed(0)
    made = planned(infos(model.state_dict()), presets=["resnext"])
    assert {key: text for key, (_, text) in made.items()} == {
        "conv_1_3x3.weight": "resnext: kaiming_normal(mode=fan_out)",
        "bn_1.weight": "resnext: ones",
        "bn_1.bias": "resnext: zeros",
        "bn_1.running_mean": "default: zeros",
        "bn_1.running_var": "default: ones",
        "bn_1.num_batches_tracked": "default: zeros",
        "classifier.weight": "resnext: kaiming_normal",
        "classifier.bias": "resnext: zeros",
    }


def test_vit_knows_its_tokens_by_name_and_gpt2_its_transposed_layers() -> None:
    tensors = shaped(cls_token=(1, 1, 8), pos_embed=(1, 5, 8), patch_embed__proj__weight=(8, 3, 4, 4),
                     patch_embed__proj__bias=(8,), head__weight=(3, 8), head__bias=(3,))  # fmt: skip
    assert [text for _, text in planned(tensors, presets=["vit"]).values()][:2] == [
        "vit: normal(std=1e-6)", "vit: trunc_normal(std=0.02)",
    ]  # fmt: skip
    tensors = shaped(wte__weight=(9, 8), h__0__attn__c_attn__weight=(8, 24), h__0__attn__c_attn__bias=(24,),
                     h__0__attn__bias=(1, 1, 5, 5), h__0__attn__masked_bias=(), h__0__ln_1__weight=(8,),
                     h__0__ln_1__bias=(8,))  # fmt: skip
    made = planned(tensors, presets=["gpt2"])
    assert set(tensors) - set(made) == {"h.0.attn.bias", "h.0.attn.masked_bias"}
    assert made["h.0.attn.c_attn.weight"][1] == "gpt2: normal(0,0.02)"


def test_presets_leave_indices_and_masks_and_default_refuses_them() -> None:
    state = {"fc.weight": torch.zeros(3, 4), "relative_position_index": torch.zeros(4, 4, dtype=torch.int64),
             "mask": torch.zeros(3, dtype=torch.bool)}  # fmt: skip
    assert list(planned(infos(state), presets=["kaiming"])) == ["fc.weight"]
    assert "for relative_position_index, mask" in troubles(infos(state), "*=default")[0]


def test_how_a_rule_is_written_is_shown_with_its_defaults() -> None:
    assert usage("trunc_normal") == "trunc_normal(mean=0,std=1,a=-2,b=2)"
    for method in METHODS:
        if not any(default is None for _, _, default in METHODS[method]):
            assert parse(usage(method)).method == method
