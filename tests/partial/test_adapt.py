"""What adapters accept, decide and refuse; nothing is read and nothing computed."""

from __future__ import annotations

import re
from typing import Any

import pytest
from adapting import adapt

from ckptool.core.tensor import (
    Derived,
    Extras,
    Mix,
    Opaque,
    Resample,
    Run,
    Span,
    Storage,
    TensorInfo,
    contiguous_stride,
)
from ckptool.core.tree import PyObject
from ckptool.errors import CkptoolError, UnsupportedError, UsageError
from ckptool.partial.adapt import Adapted, Adapting
from ckptool.partial.adapters import ADAPTERS, parse, parse_option, usage


def info(*shape: int, dtype: str = "float32", location: str = "cpu", **more: Any) -> TensorInfo:
    storage = Storage(Span("x.pth", 0, 1 << 40), dtype, location)
    return TensorInfo(dtype, shape, contiguous_stride(shape), 0, storage, **more)


def made(text: str, old: TensorInfo, new: TensorInfo, files: Any = None) -> Adapted:
    found = adapt(parse(text), old, new, "some.key", files.__getitem__ if files else None)
    tensor = found.tensor
    assert (tensor.shape, tensor.dtype, tensor.location) == (new.shape, new.dtype, new.location)
    assert isinstance(tensor.source, Derived)
    assert tensor.is_whole
    return found


def detail(text: str, old: tuple[int, ...], new: tuple[int, ...], files: Any = None) -> str:
    return made(text, info(*old), info(*new), files).detail


def refusal(text: str, old: tuple[int, ...], new: tuple[int, ...], files: Any = None) -> str:
    with pytest.raises(UsageError) as caught:
        adapt(parse(text), info(*old), info(*new), "some.key", files.__getitem__ if files else None)
    message = str(caught.value)
    sizes = ["x".join(map(str, shape)) for shape in (new, old)]
    assert message.startswith(f"some.key: {text} cannot make {sizes[0]} of {sizes[1]}: ")
    assert "\n" not in message
    return message.partition(f"of {sizes[1]}: ")[2]


# --- how they are written ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("rows", {}),
        ("rows:fill=mean", {"fill": "mean"}),
        ("rows:tokens=old.json,new.json,fill=zero", {"tokens": ("old.json", "new.json"), "fill": "zero"}),
        ("rows:select=a=b.txt", {"select": "a=b.txt"}),
        ("crop:fill=zero", {"fill": "zero"}),
        ("pos-embed:prefix=0,grid=12x16,to=8x4,mode=bilinear,antialias=false",
         {"prefix": 0, "grid": (12, 16), "to": (8, 4), "mode": "bilinear", "antialias": False}),
        ("rel-pos:extra=3,window=7x7", {"extra": 3, "window": (7, 7)}),
        ("in-chans:mean", {"": "mean"}),
        ("in-chans:map=2,1,0,-,fill=mean", {"map": (2, 1, 0, -1), "fill": "mean"}),
        ("inflate:center", {"": "center"}),
    ],
)  # fmt: skip
def test_an_adapter_is_a_name_and_options(text: str, options: dict[str, Any]) -> None:
    adapter = parse(text)
    assert (adapter.text, dict(adapter.options)) == (text, options)
    assert parse(text) == adapter
    assert hash(parse(text)) == hash(adapter)


@pytest.mark.parametrize(
    "text",
    ["", "row", "rows:", "rows:fill", "rows:fill=", "rows:fill=ones", "rows:fill=zero,fill=zero", "rows:grid=2x2",
     "rows:tokens=a.json", "rows:tokens=a,b,c", "rows:select=a,b", "rows:select=", "rows:select=a,tokens=b,c",
     "crop:fill=mean", "pos-embed:prefix=-1", "pos-embed:grid=14", "pos-embed:grid=0x3", "pos-embed:mode=cubic",
     "pos-embed:antialias=yes", "pos-embed:mode=linear,grid=2x2", "pos-embed:mode=linear,antialias=true",
     "rel-pos:prefix=1", "in-chans:median", "in-chans:mean,sum", "in-chans:mean,map=0,1", "in-chans:map=0,x",
     "in-chans:map=", "in-chans:fill=zero", "inflate:3", "inflate:mean,"],
)  # fmt: skip
def test_what_is_not_understood_is_refused_and_what_is_accepted_said(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(text)
    message = str(caught.value)
    assert repr(text) in message
    assert "\n" not in message
    name = text.partition(":")[0]
    if name not in ADAPTERS:
        assert usage() in message
        assert all(name in message for name in ADAPTERS)


@pytest.mark.parametrize(
    ("text", "pattern", "adapter"),
    [
        ("fc.*=rows", "fc.*", "rows"),
        ("re:^(?=a).*embed$=pos-embed:prefix=1", "re:^(?=a).*embed$", "pos-embed:prefix=1"),
        ("a=b=rows:select=x=crop", "a=b", "rows:select=x=crop"),
        ("*=in-chans:map=0,-", "*", "in-chans:map=0,-"),
    ],
)
def test_an_option_is_a_pattern_and_an_adapter(text: str, pattern: str, adapter: str) -> None:
    assert parse_option(text) == (pattern, parse(adapter))


@pytest.mark.parametrize("text", ["rows", "=rows", "fc.weight", "fc.weight=row", "fc.weight=rowsy"])
def test_an_option_without_pattern_or_adapter_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"is not KEYGLOB=ADAPTER( .did you mean rows..)?; adapters are rows\[:fill="):
        parse_option(text)


# --- what is the same for all ------------------------------------------------------------------------------------


def test_the_result_is_what_the_target_is_and_where_it_is() -> None:
    extras = Extras(conj=True, subclass="class", state={"a": 1})
    target = info(6, 4, location="cuda:1", requires_grad=True, is_parameter=True, extras=extras)
    for text in ("rows", "rows:fill=zero", "rows:fill=mean", "crop"):
        for rows in (3, 9):
            tensor = made(text, info(rows, 4, location="cuda:0"), target).tensor
            assert (tensor.requires_grad, tensor.is_parameter) == (True, True)
            assert tensor.extras is not None
            assert (tensor.extras.conj, tensor.extras.subclass, tensor.extras.state) == (False, "class", {"a": 1})


def test_a_source_that_is_computed_is_moved_to_the_targets_device_too() -> None:
    inner = info(3, 4, location="cuda:0")
    computed = TensorInfo("float32", (3, 4), (4, 1), 0, Derived("copy", (inner,)))
    assert made("rows", computed, info(6, 4, location="cuda:1")).tensor.location == "cuda:1"
    assert computed.location == "cuda:0"


def test_tied_weights_stay_tied_and_different_places_stay_apart() -> None:
    adapting = Adapting()
    old, new, other = info(3, 4), info(6, 4), info(6, 4)
    first = adapting.adapt(parse("rows"), old, new, "embed").tensor
    assert adapting.adapt(parse("rows"), old, new, "head").tensor.view == first.view
    assert adapting.adapt(parse("rows"), old, other, "head").tensor.view != first.view
    assert adapting.adapt(parse("rows:fill=mean"), old, new, "head").tensor.view != first.view


@pytest.mark.parametrize("text", [name for name in ADAPTERS if name != "inflate"] + ["rows:fill=mean", "in-chans:mean"])
def test_shapes_that_agree_are_copied(text: str) -> None:
    adapter = parse(text)
    assert not adapter.rearranges
    old = info(2, 5, 7)
    tensor, words = made(text, old, info(2, 5, 7))
    assert words == "copied: the shapes agree"
    assert isinstance(tensor.source, Derived)
    assert (tensor.source.op, tensor.source.inputs) == ("copy", (old,))


def test_adapters_that_say_where_things_go_have_work_even_then() -> None:
    for text in ("rows:select=a", "rows:tokens=a,b", "in-chans:map=2,1,0", "pos-embed:grid=2x8,to=4x4"):
        assert parse(text).rearranges
    assert detail("in-chans:map=2,1,0", (8, 3, 3, 3), (8, 3, 3, 3)) == "channels 2,1,0"
    assert detail("pos-embed:grid=2x8,to=4x4,prefix=1", (1, 17, 4), (1, 17, 4)).startswith("2x8 to 4x4")


def test_tensors_that_are_not_plain_are_refused() -> None:
    sparse = TensorInfo("float32", (6, 4), (), 0, Opaque("sparse_coo", PyObject()))
    for old, new in ((sparse, info(3, 4)), (info(3, 4), sparse)):
        with pytest.raises(UnsupportedError, match=r"some\.key: rows cannot make .* sparse_coo tensor"):
            adapt(parse("rows"), old, new, "some.key")
    packed = info(6, 4, dtype="float4_e2m1fn_x2")
    with pytest.raises(UnsupportedError, match="float4_e2m1fn_x2"):
        adapt(parse("rows"), packed, info(3, 4, dtype="float4_e2m1fn_x2"), "some.key")


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn", "complex64", "bool", "float8_e8m0fnu"])
def test_any_dtype_is_copied_and_few_are_computed(dtype: str) -> None:
    made("rows", info(3, 4, dtype=dtype), info(6, 4, dtype=dtype))
    made("crop", info(3, 9, dtype=dtype), info(6, 4, dtype=dtype))
    made("in-chans:map=2,0", info(8, 3, 3, 3, dtype=dtype), info(8, 2, 3, 3, dtype=dtype))
    for text, old, new in [
        ("rows:fill=mean", (3, 4), (6, 4)), ("in-chans", (8, 3, 3, 3), (8, 4, 3, 3)),
        ("inflate", (8, 3, 3, 3), (8, 3, 2, 3, 3)),
        ("pos-embed", (1, 5, 4), (1, 10, 4)), ("rel-pos", (9, 4), (25, 4)),
    ]:  # fmt: skip
        with pytest.raises(UnsupportedError, match=rf"some\.key: .*{dtype} is not computed with"):
            adapt(parse(text), info(*old, dtype=dtype), info(*new, dtype=dtype), "some.key")


def test_zeros_are_zero_bytes_where_the_dtype_has_a_zero() -> None:
    made("rows:fill=zero", info(3, 4, dtype="int8"), info(6, 4, dtype="int8"))
    with pytest.raises(UnsupportedError, match="has no zero"):
        adapt(parse("rows:fill=zero"), info(3, dtype="float8_e8m0fnu"), info(6, dtype="float8_e8m0fnu"), "k")


def test_floats_are_cast_and_other_kinds_are_not() -> None:
    tensor = made("rows", info(3, 4, dtype="float64"), info(6, 4, dtype="bfloat16")).tensor
    assert isinstance(tensor.source, Derived)
    cast, kept = tensor.source.inputs
    assert (cast.dtype, kept.dtype) == ("bfloat16", "bfloat16")
    assert isinstance(cast.source, Derived)
    assert cast.source.op == "cast"
    for old, new in (("int64", "int32"), ("float32", "int8"), ("int8", "float32"), ("complex64", "float32")):
        with pytest.raises(UnsupportedError, match=f"{old} values cannot be cast to {new}"):
            adapt(parse("rows"), info(3, dtype=old), info(6, dtype=new), "k")


@pytest.mark.parametrize("text", ADAPTERS)
@pytest.mark.parametrize(
    "pair", [((), ()), ((), (3,)), ((3,), ()), ((0, 4), (3, 4)), ((3,), (4, 4)), ((2,) * 6, (3,) * 6)]
)
def test_odd_shapes_are_refused_in_one_line_or_done(text: str, pair: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    found: str | None = None
    try:
        made(text, info(*pair[0]), info(*pair[1]))
    except CkptoolError as error:
        found = str(error)
    assert found is None or re.fullmatch(rf"some\.key: {text} cannot make .* of [^\n]*: [^\n]+", found)


# --- rows and boxes ----------------------------------------------------------------------------------------------


def test_rows_say_what_they_took() -> None:
    assert detail("rows", (1000, 512), (1203, 512)) == "rows 0 to 999 from the source, 203 the target's own"
    assert detail("rows:fill=zero", (1000,), (1203,)) == "rows 0 to 999 from the source, 203 zero"
    assert detail("rows:fill=mean", (2, 3), (3, 3)) == "rows 0 to 1 from the source, 1 the mean of the source's rows"
    assert detail("rows", (1000, 512), (6, 512)) == "rows 0 to 5 from the source, 994 of its rows left out"


def test_rows_change_the_first_dimension_only() -> None:
    assert refusal("rows", (5, 4), (6, 3)) == "it changes dimension 0, and others differ too"
    assert "same number of dimensions" in refusal("rows", (5, 4), (6, 4, 1))


def test_rows_are_selected_by_index() -> None:
    files = {"rows.json": [2, None, 0, 1, -1]}
    tensor, words = made("rows:select=rows.json,fill=zero", info(3, 4), info(5, 4), files)
    assert words == "3 rows from the source as selected, 2 zero"
    assert isinstance(tensor.source, Derived)
    assert tensor.source.args == (Run(0, 2, 1), Run(-1, 0, 1), Run(0, 0, 2), Run(-1, 0, 1))
    assert detail("rows:select=f", (3, 4), (2, 4), {"f": "1\n-1\n"}).startswith("1 rows")
    assert detail("rows:select=f", (3, 4), (1, 4), {"f": 2}).startswith("1 rows")


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ([0, 1], "f lists 2 rows, the target has 3"),
        ([0, 1, 5], "f names rows 5, the source has 0 to 4"),
        ([0, 1, -2], "f names rows -2"),
        ([-1, None, -1], "f takes no row of the source"),
        ([0, True, 1], "f is not a list of integers"),
        ([0, 1.0, 1], "f is not a list of integers"),
        ({"0": 1}, "f is not a list of integers"),
        ("0\none\n2", "neither a JSON list nor one integer per line"),
    ],
)
def test_a_selection_that_does_not_fit_is_refused(content: Any, why: str) -> None:
    assert why in refusal("rows:select=f", (5, 4), (3, 4), {"f": content})


VOCABULARIES = [
    {"a": 0, "b": 1, "c": 2},
    ["a", "b", "c"],
    [["a", -1.5], ["b", -2.0], ["c", -3.0]],
    "a\nb\nc\n",
    "a\r\nb\r\nc",
    {"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": [{"id": 2, "content": "c"}, {"id": 0, "content": "a"}]},
]


@pytest.mark.parametrize("old", VOCABULARIES)
@pytest.mark.parametrize("new", [["x", "c", "a", "b"], {"b": 3, "c": 1, "a": 2}])
def test_rows_follow_their_tokens_in_any_kind_of_vocabulary(old: Any, new: Any) -> None:
    tensor, words = made("rows:tokens=o,n", info(3, 4), info(5, 4), {"o": old, "n": new})
    assert isinstance(tensor.source, Derived)
    assert tensor.source.args == (Run(1, 0, 1), Run(0, 2, 1), Run(0, 0, 2), Run(1, 4, 1))
    assert words == "3 rows from the source by token, 2 the target's own"


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        (["a", "b", "c", "d"], ["a"], "o goes up to row 3, its tensor has 3"),
        (["a"], {"a": 7}, "n goes up to row 7, its tensor has 5"),
        (["a", "b"], ["c"], "o and n have no token in common"),
        (["a", "b", "a"], ["a"], "several rows are meant by 'a'"),
        (["a", "b"], {"a": 0, "b": 0}, "several rows are meant by 'b'"),
        ([], ["a"], "o lists no token"),
        ({"a": "0"}, ["a"], "o is no vocabulary: 'a'"),
        ({"a": True}, ["a"], "o is no vocabulary: 'a'"),
        ({"model": {}}, ["a"], "o is no vocabulary"),
        ({"model": {"vocab": {"a": 0}}, "added_tokens": [1]}, ["a"], "its added_tokens are not understood"),
        (3, ["a"], "o is no vocabulary"),
    ],
)
def test_vocabularies_that_do_not_fit_are_refused(old: Any, new: Any, why: str) -> None:
    assert why in refusal("rows:tokens=o,n", (3, 4), (5, 4), {"o": old, "n": new})


def test_a_duplicate_that_no_token_asks_for_does_no_harm() -> None:
    assert detail("rows:tokens=o,n", (3, 4), (5, 4), {"o": ["a", "b", "a"], "n": ["b"]}).startswith("1 rows")


def test_each_file_is_read_once() -> None:
    asked = []

    def read(path: str) -> Any:
        asked.append(path)
        return [0, 1, 2]

    adapting = Adapting(read)
    for key in ("embed", "head", "bias"):
        adapting.adapt(parse("rows:select=f"), info(9, 4), info(3, 4), key)
    assert asked == ["f"]


def test_a_crop_is_the_common_box() -> None:
    assert detail("crop", (4, 9, 2), (6, 3, 5)) == "the box 4x3x2 from the source, 66 the target's own"
    assert detail("crop:fill=zero", (8, 9), (6, 3)) == "the box 6x3 from the source"


# --- positions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "old", "new", "words"),
    [
        ("pos-embed", (1, 197, 8), (1, 577, 8), "14x14 to 24x24, bicubic, antialias, 1 prefix token as before"),
        ("pos-embed", (197, 8), (577, 8), "14x14 to 24x24, bicubic, antialias, 1 prefix token as before"),
        ("pos-embed", (1, 198, 8), (1, 578, 8), "14x14 to 24x24, bicubic, antialias, 2 prefix tokens as before"),
        ("pos-embed:antialias=false", (1, 196, 8), (1, 576, 8), "14x14 to 24x24, bicubic"),
        ("pos-embed:prefix=5", (1, 201, 8), (1, 581, 8),
         "14x14 to 24x24, bicubic, antialias, 5 prefix tokens as before"),
        ("pos-embed:to=12x16", (1, 197, 8), (1, 193, 8),
         "14x14 to 12x16, bicubic, antialias, 1 prefix token as before"),
        ("pos-embed:grid=12x16", (1, 193, 8), (1, 197, 8),
         "12x16 to 14x14, bicubic, antialias, 1 prefix token as before"),
        ("pos-embed:mode=bilinear", (1, 14, 14, 8), (1, 16, 12, 8), "14x14 to 16x12, bilinear, antialias"),
        ("pos-embed", (1, 8, 14, 14), (1, 8, 16, 12), "14x14 to 16x12, bicubic, antialias"),
        ("pos-embed:layout=nhwc", (1, 14, 14, 8), (1, 14, 16, 8), "14x14 to 14x16, bicubic, antialias"),
        ("pos-embed:layout=nchw", (1, 14, 14, 8), (1, 14, 16, 8), "14x8 to 16x8, bicubic, antialias"),
        ("pos-embed:mode=linear", (512, 8), (1024, 8), "512 to 1024, linear"),
        ("pos-embed:mode=linear,prefix=2", (514, 8), (1026, 8), "512 to 1024, linear, 2 prefix tokens as before"),
        ("rel-pos", (169, 3), (529, 3), "13x13 to 23x23, bicubic"),
        ("rel-pos:antialias=true", (169, 3), (529, 3), "13x13 to 23x23, bicubic, antialias"),
        ("rel-pos", (732, 12), (2212, 12), "27x27 to 47x47, bicubic, 3 extra rows as before"),
        ("rel-pos:window=4x8,to=8x8", (105, 3), (225, 3), "7x15 to 15x15, bicubic"),
        ("rel-pos", (3, 13, 13), (3, 23, 15), "13x13 to 23x15, bicubic"),
        ("rel-pos:mode=linear", (27, 64), (127, 64), "27 to 127, linear"),
    ],
)  # fmt: skip
def test_grids_that_can_be_read_one_way_are_detected(
    text: str, old: tuple[int, ...], new: tuple[int, ...], words: str
) -> None:
    assert detail(text, old, new) == words


@pytest.mark.parametrize(
    ("text", "old", "new", "why"),
    [
        ("pos-embed", (1, 197, 8), (1, 576, 8),
         "with prefix 0 or 1 or 2, the source's 197 can be 1 + 14x14 and the target's 576 can be 0 + 24x24: "
         "say prefix=N, grid=HxW and to=HxW"),
        ("pos-embed", (1, 201, 8), (1, 581, 8), "the source's 201 fit no such grid"),
        ("pos-embed", (1, 193, 8), (1, 577, 8), "the source's 193 fit no such grid"),
        ("pos-embed:prefix=0", (1, 197, 8), (1, 577, 8), "with prefix 0"),
        ("pos-embed:grid=14x14", (1, 197, 8), (1, 576, 8), "the target's 576 fit no such grid"),
        ("pos-embed:grid=14x14,to=24x24", (1, 197, 8), (1, 576, 8), "with prefix 1 or 0"),
        ("pos-embed:grid=15x15", (1, 197, 8), (1, 577, 8), "fit no such grid"),
        ("pos-embed", (1, 197, 8), (1, 577, 9), "equally many channels"),
        ("pos-embed", (2, 197, 8), (2, 577, 8), "it takes tables"),
        ("pos-embed", (1, 14, 14, 8), (1, 14, 16, 8), "say layout=nhwc or layout=nchw"),
        ("pos-embed", (1, 14, 14, 8), (1, 16, 16, 9), "neither NxHxWxC nor NxCxHxW"),
        ("pos-embed:grid=13x14", (1, 14, 14, 8), (1, 16, 16, 8), "and the grids named"),
        ("pos-embed:prefix=1", (1, 14, 14, 8), (1, 16, 16, 8), "prefix are not for it"),
        ("pos-embed:layout=nhwc", (1, 197, 8), (1, 577, 8), "layout is for"),
        ("pos-embed:mode=linear,prefix=9", (9, 8), (12, 8), "no position is left"),
        ("rel-pos", (169, 3), (529, 4), "equally many heads"),
        ("rel-pos", (196, 3), (576, 3), "with extra 0 or 3"),
        ("rel-pos", (169, 3), (532, 3), "can be 0 + 13x13 and the target's 532 can be 3 + 23x23"),
        ("rel-pos", (3, 12, 13), (3, 23, 23), "odd H and W"),
        ("rel-pos:to=7x7", (3, 13, 13), (3, 23, 23), "the windows named are not"),
    ],
)  # fmt: skip
def test_what_would_be_a_guess_is_refused(text: str, old: tuple[int, ...], new: tuple[int, ...], why: str) -> None:
    assert why in refusal(text, old, new)


@pytest.mark.parametrize(("text", "extra"), [("pos-embed", (0, 1, 2)), ("rel-pos", (0, 3))])
def test_a_grid_of_every_size_is_found_with_and_without_other_positions(text: str, extra: tuple[int, ...]) -> None:
    for old in range(3, 40, 2):
        for new in range(3, 40, 2):
            for others in extra if old != new else ():
                words = detail(text, (old * old + others, 4), (new * new + others, 4))
                assert words.startswith(f"{old}x{old} to {new}x{new}, bicubic")
                assert (f", {others} " in words) == bool(others)


def test_the_grid_is_resampled_where_it_lies() -> None:
    old = info(1, 197, 8)
    tensor = made("pos-embed", old, info(1, 577, 8)).tensor
    assert isinstance(tensor.source, Derived)
    prefix, grid = tensor.source.inputs
    assert (prefix.shape, prefix.source) == ((1, 1, 8), old.source)
    assert isinstance(grid.source, Derived)
    assert (grid.source.op, grid.source.args) == ("resample", Resample((1, 2), "bicubic", True))
    assert (grid.source.inputs[0].shape, grid.source.inputs[0].storage_offset) == ((1, 14, 14, 8), 8)


# --- kernels -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "old", "new", "words"),
    [
        ("in-chans", 3, 1, "the sum of 3 channels"),
        ("in-chans", 3, 4, "channels 0 to 2 repeated, times 3/4"),
        ("in-chans", 6, 3, "channels 0 to 2 repeated, times 6/3"),
        ("in-chans:mean", 3, 4, "the sum of 3 channels / 4 in each"),
        ("in-chans:repeat", 3, 1, "channels 0 to 0 repeated, times 3/1"),
        ("in-chans:map=0,1,2,-", 3, 4, "channels 0,1,2,-; - is the target's own"),
        ("in-chans:map=0,-,fill=mean", 3, 2, "channels 0,-; - is the mean of the source's channels"),
    ],
)
def test_channels_say_what_they_are_made_of(text: str, old: int, new: int, words: str) -> None:
    assert detail(text, (8, old, 7, 7), (8, new, 7, 7)) == words


@pytest.mark.parametrize(
    ("text", "old", "new", "why"),
    [
        ("in-chans", (8, 3, 7, 7), (9, 4, 7, 7), "it changes dimension 1, and others differ too"),
        ("in-chans", (8, 3), (8, 4), "it takes convolution kernels"),
        ("in-chans:sum", (8, 3, 7, 7), (8, 4, 7, 7), "sum makes one channel"),
        ("in-chans:map=0,1", (8, 3, 7, 7), (8, 4, 7, 7), "the map has 2 channels, the target 4"),
        ("in-chans:map=0,3", (8, 3, 7, 7), (8, 2, 7, 7), "the map names channel 3, the source has 0 to 2"),
        ("in-chans:map=-,-", (8, 3, 7, 7), (8, 2, 7, 7), "takes nothing from the source"),
        ("inflate", (8, 3, 7, 7), (8, 4, 5, 7, 7), "it takes 2D kernels"),
        ("inflate", (8, 3, 7, 7), (8, 3, 5, 7), "it takes 2D kernels"),
    ],
)
def test_kernels_that_differ_elsewhere_are_refused(
    text: str, old: tuple[int, ...], new: tuple[int, ...], why: str
) -> None:
    assert why in refusal(text, old, new)


def test_kernels_are_inflated() -> None:
    tensor, words = made("inflate", info(8, 3, 7, 7), info(8, 3, 5, 7, 7))
    assert words == "repeated 5 times, / 5"
    assert isinstance(tensor.source, Derived)
    assert tensor.source.args == Mix((((0, 1.0),),) * 5, 5.0)
    for depth, middle in ((1, 0), (2, 1), (5, 2)):
        words = detail("inflate:center", (8, 3, 7, 7), (8, 3, depth, 7, 7))
        assert words == f"slice {middle} of {depth}, the others zero"
