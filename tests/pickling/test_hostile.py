"""Small files made to harm: each ends within seconds, in one clear line, and nothing honest is refused for it."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import itertools
import json
import os
import random
import struct
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracles import FIXTURES, Run, assert_identical, thinned, torch_load
from pickled import archive, mapping, number, pid, tensor, text

import ckptool
from ckptool import limits
from ckptool.core import modules
from ckptool.errors import CkptoolError, CollisionError, FormatError, LimitError, OutputError, UnsupportedError
from ckptool.io.output import LocalOutput
from ckptool.pickling import guard as nesting
from ckptool.pickling import load as pickles

Saved = Callable[..., Path]

SECONDS = 4
"""That any of these files may take: twice what the worst does on a slow machine."""


Aside = Callable[[], contextlib.AbstractContextManager[None]]


@pytest.fixture(autouse=True)
def soon() -> Iterator[Aside]:
    """Holds a test to `SECONDS`, without the time of its own work: what it does within ``with soon():``."""
    own = 0.0

    @contextlib.contextmanager
    def aside() -> Iterator[None]:
        nonlocal own
        begun = time.process_time()
        yield
        own += time.process_time() - begun

    begin = time.process_time()
    yield aside
    assert time.process_time() - begin - own < SECONDS


# --- what is done with them ------------------------------------------------------------------------------------------


def beside(value: bytes) -> str:
    return archive(mapping(text("w"), tensor(), text("b"), value))


def use(path: str) -> None:
    """All that a command would do with it."""
    opened = ckptool.open(path)
    ckptool.inspect(opened)
    list(opened.tensors())
    list(opened.leaves())
    ckptool.diff(opened, opened)
    ckptool.save(ckptool.filter(opened)[0], "out.pth", force=True, fsync=False)
    ckptool.save(opened, "out.safetensors", force=True, fsync=False)


TUPLES = b")" + b"2\x86" * 64
LISTS = b"]q\x00" + b"".join(b"0](h%ch%ceq%c" % (i, i, i + 1) for i in range(64))
MODULE = b"cm\nM\n)\x81"


def module(*below: bytes) -> bytes:
    slots = text("_parameters") + b"}" + text("_buffers") + b"}" + text("_modules") + mapping(*below)
    return MODULE + b"}(" + slots + b"ub"


BOMBS = {
    "tuples": TUPLES,
    "lists": LISTS,
    "a key": mapping(TUPLES, b"N"),
    "a frozenset": b"(" + TUPLES + b"\x91",
    "the names of buffers": MODULE + b"}" + text("_non_persistent_buffers_set") + TUPLES + b"sb",
    "a state": MODULE + LISTS + b"b",
    "metadata": b"ccollections\nOrderedDict\n)R}" + text("_metadata") + LISTS + b"sb",
    "a subclass": b"ctorch._tensor\n_rebuild_from_type_v2\n(ctorch\nload\ncm\nC\n)" + TUPLES + b"tR",
    "modules": b"N" + b"".join(
        b"0" + (module(text("x"), b"h%c" % i, text("y"), b"h%c" % i) if i else module()) + b"q%c" % (i + 1)
        for i in range(40)
    ),
    "one list at many places": b"(" + b"N" * 3000 + b"lq\x010(" + b"h\x01" * 3000 + b"l",
    "lists that hold each other": b"".join(b"]q%c" % i for i in range(12)) + b"".join(
        b"h%c(" % i + b"".join(b"h%c" % j for j in range(12)) + b"e" for i in range(12)) + b"t",
}  # fmt: skip


LOW = {"MAX_STEPS": 500_000, "MAX_SHARED": 10_000, "MAX_SHARED_PARTS": 500, "MAX_TUPLE_ITEMS": 100_000}


@pytest.mark.parametrize("limits", [LOW, pytest.param({}, marks=pytest.mark.slow)], ids=["low", "as they are"])
@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_of_shared_parts_is_an_error_soon(name: str, limits: dict[str, int]) -> None:
    value = BOMBS[name] if name != "lists that hold each other" else b"(" + BOMBS[name]
    with pytest.raises(CkptoolError), ckptool.limited(**limits):
        use(beside(value))


ARGUMENTS = {
    "shape": lambda value: tensor(shape=value),
    "stride": lambda value: tensor(stride=value),
    "offset": lambda value: tensor(offset=value),
    "location": lambda value: tensor(pid(location=value)),
    "key": lambda value: tensor(pid(key=value)),
    "elements": lambda value: tensor(pid(numel=value)),
    "persistent id": lambda value: value + b"Q",
    "storage class": lambda value: b"(" + text("storage") + value + text("0") + text("cpu") + b"K\x01tQ",
    "dtype": lambda value: b"ctorch._utils\n_rebuild_meta_tensor_no_storage\n(" + value + b"))\x89tR",
    "layout": lambda value: b"ctorch._utils\n_rebuild_sparse_tensor\n" + value + b")\x86R",
    "function": lambda value: b"ctorch._tensor\n_rebuild_from_type_v2\n(" + value + b"N)NtR",
}  # fmt: skip


@pytest.mark.parametrize("value", [TUPLES, LISTS, b"]" * 2000 + b"a" * 1999, number(1 << 14000)], ids=range(4))
@pytest.mark.parametrize("name", ARGUMENTS)
def test_an_argument_that_is_a_bomb_is_refused_in_few_words(name: str, value: bytes) -> None:
    with pytest.raises(FormatError) as caught:
        use(archive(mapping(text("w"), ARGUMENTS[name](value))))
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("depth", [3_000, pytest.param(100_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "deep",
    [
        lambda n: b"]" * n + b"a" * (n - 1),
        lambda n: b")" + b"\x85" * n,
        lambda n: (b"}" + text("k")) * n + b"N" + b"s" * n,
        lambda n: b"cm\nC\n" + b")R" * n,
        lambda n: b"cm\nC\n)\x81" * n + b"b" * (n - 1),
        lambda n: b"(" * n + b"\x91" * n,
    ],
    ids=["lists", "tuples", "dicts", "calls of calls", "states", "frozensets"],
)  # fmt: skip
def test_deep_nesting_is_an_error_soon(deep: Callable[[int], bytes], depth: int) -> None:
    with pytest.raises(LimitError, match="deep"):
        use(beside(deep(depth)))


def test_deeper_than_the_stack_of_c_it_is_an_error_too() -> None:
    """Where containers are let go again, one inside the other."""
    with pytest.raises(LimitError, match="deep"):
        use(beside(b"]" * 100_000 + b"a" * 99_999))


@pytest.mark.parametrize(
    "key",
    [b")" + b"\x85" * 20_000, b"(" * 20_000 + b"t" * 20_000, b")" + b"\x85N0" * 15_000,
     b")q\x010" + b"h\x01\x85q\x010" * 10_000 + b"h\x01", b")p1\n0" + b"g1\n\x85p1\n0" * 10_000 + b"g1\n",
     b")q\x010" + b"cm\nn\n(h\x01tq\x01R0" * 5_000 + b"h\x01"],
    ids=["in a row", "by marks", "with others between", "through the memo", "by lines", "as arguments"],
)  # fmt: skip
def test_a_key_of_tuples_nested_without_end_never_reaches_the_machine(key: bytes) -> None:
    with pytest.raises(LimitError, match="MAX_TUPLES"):
        pickles.scan(b"\x80\x02" + mapping(key, b"N") + b".")


@pytest.mark.parametrize(
    "key",
    [TUPLES, b")q\x010" + b"h\x01h\x01\x86q\x010" * 64 + b"h\x01",
     b")\x94" + b"".join(b"h%ch%c\x86\x94" % (i, i) for i in range(64)),
     b"(" + b"N" * 200_000 + b"tq\x01N" + b"h\x01N" * 1000],
    ids=["doubled", "brought back", "protocol 4", "a long one often"],
)  # fmt: skip
def test_keys_that_take_years_to_hash_never_reach_the_machine(key: bytes) -> None:
    with pytest.raises(LimitError, match="MAX_TUPLE_ITEMS"):
        pickles.scan(b"\x80\x04" + b"}(" + key + b"Nu.")


@pytest.mark.parametrize(
    "keys",
    [b"}(" + b"h\x00N" * 4 + b"u", b"(" + b"h\x00N" * 4 + b"d", b"}" + b"h\x00Ns" * 4, b"(" + b"h\x00" * 4 + b"\x91",
     b"\x8f(" + b"h\x00" * 4 + b"\x90"],
    ids=["setitems", "a dict from marks", "setitem", "a frozenset", "a set"],
)  # fmt: skip
def test_whatever_opcode_hashes_keys_their_items_are_counted(keys: bytes) -> None:
    large = b")" + b"2\x86" * 22 + b"q\x000"  # 4 million items: four are too many
    with pytest.raises(LimitError, match="MAX_TUPLE_ITEMS"):
        pickles.scan(b"\x80\x04" + large + keys + b".")


@thinned(10)
@pytest.mark.parametrize(
    ("protocol", "constants"), [(2, {}), (2, {"MANY": 1}), (2, {"MANY": 1, "MOST": 0}), (4, {"LARGE": 0})], ids=str
)
def test_what_is_scanned_fast_nests_no_tuples_whatever_the_opcodes(
    protocol: int, constants: dict[str, int], step: int, soon: Aside, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Programs at random, run by Python's own machine: only where all was followed may a tuple have come back."""
    import io
    import pickle

    seen: dict[str, Any] = {}

    class Machine(pickle._Unpickler):  # type: ignore[name-defined,misc]
        dispatch = dict(pickle._Unpickler.dispatch)  # type: ignore[attr-defined]

        def find_class(self, module: str, name: str) -> Any:
            return lambda *_: object()

        def persistent_load(self, pid: Any) -> Any:
            return object()

    def watched(opcode: int, watch: Callable[[Any], None]) -> None:
        plain = Machine.dispatch[opcode]

        def load(self: Any) -> None:
            plain(self)
            watch(self.stack[-1])

        Machine.dispatch[opcode] = load

    def depth(value: Any) -> int:
        return 1 + max(map(depth, value), default=0) if isinstance(value, tuple) else 0

    for opcode in b"hj2":
        watched(opcode, lambda value: seen.update(back=seen["back"] or bool(isinstance(value, tuple) and value)))
    for opcode in b"t\x85\x86\x87":
        watched(opcode, lambda value: seen.update(depth=max(seen["depth"], depth(value))))
    followed = nesting.check
    monkeypatch.setattr(nesting, "check", lambda opcodes, _: (seen.update(followed=True), followed(opcodes)))
    monkeypatch.setattr(limits.MAX_TUPLES, "figure", 4)
    for name, figure in constants.items():
        monkeypatch.setattr(pickles, name, figure)
    chance, counts = random.Random(1), collections.Counter[str]()
    for _ in range(4000 // step):
        with soon():
            data = b"\x80%c" % protocol + program(chance, protocol) + b"."
        seen.update(back=False, depth=0, followed=False)
        try:
            pickles.scan(data)
        except LimitError:
            counts["refused"] += 1
            continue
        with soon():
            try:
                Machine(io.BytesIO(data)).load()
            except (pickle.UnpicklingError, IndexError, KeyError, AttributeError, TypeError):
                counts["stumbled"] += 1
        if not seen["followed"]:
            assert not seen["back"], data
            counts["fast"] += 1
        assert seen["depth"] <= 4 + 3, data
    assert min(counts["refused"], counts["fast"]) > 10


def program(chance: random.Random, protocol: int) -> bytes:
    """Opcodes at random that leave the stack well-formed more often than not."""
    out, heights = [b"N"], [1]
    atoms = (b"N", b"K\x01", b"Kt", b")", text("t"), b"]", b"J\x85q\x01t", b"M\x85q", b"\x8c\x02hj")
    for _ in range(chance.randint(3, 40)):
        dice, put = chance.random(), chance.choice((b"", b"q%c", b"r%c\0\0\0", b"q%c"))
        put = put and (put % chance.randint(0, 3) if protocol == 2 else b"\x94")
        if dice < 0.05:  # a key and its tensor, as torch.save writes them
            get, made = b"h%c" % chance.randint(0, 3), chance.choice((b"", put))
            out += [text("k"), put, get, b"((", get * 2, text("0"), put, get, b"K\x01t", made, b"Q", b"K\x00"]
            out += [b"K\x01\x85", made, b"(K\x01t", made, b"\x89", get, b")R", put, b"t", made, b"R", put]
            heights[-1] += 2
        elif dice < 0.25:
            out.append(chance.choice(atoms))
            heights[-1] += 1
        elif dice < 0.5 and heights[-1]:
            count = chance.randint(1, min(3, heights[-1]))
            out.append(bytes([0x84 + count]) + put)
            heights[-1] -= count - 1
        elif dice < 0.6:
            out.append(b"(")
            heights.append(0)
        elif dice < 0.7 and len(heights) > 1:
            out.append(b"t" + put)
            heights.pop()
            heights[-1] += 1
        elif dice < 0.8:
            out.append(chance.choice((b"h%c", b"j%c\0\0\0")) % chance.randint(0, 3))
            heights[-1] += 1
        elif dice < 0.9:
            out.append(b"cm\nn\n)R" + put)
            heights[-1] += 1
        elif heights[-1]:
            out.append(chance.choice((b"0", b"Q" + put, put)))
            heights[-1] -= out[-1] == b"0"
    return b"".join(out)


def test_tuples_as_people_use_them_are_read() -> None:
    shared = (1, ("a", (2.5, None)))
    value = {shared: shared, "again": [shared] * 1000, ("k", 1): {(i, str(i)): (str(i),) for i in range(2000)}}
    import pickle

    for protocol in range(2, 6):
        data = pickle.dumps(value, protocol)
        assert pickles.scan(data) == len(data)
        assert_identical(pickles.load(data)[0], value)


# --- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "part",
    [tensor(shape=b"(" + number(1 << 62) * 100_000 + b"t", stride=b"(" + b"K\x00" * 100_000 + b"t"),
     tensor(shape=b"(" + b"K\x01" * 2000 + b"t", stride=b"(" + b"K\x00" * 2000 + b"t"),
     tensor(shape=number(1 << 62) * 3 + b"\x87", stride=b"K\x00" * 3 + b"\x87"),
     tensor(shape=number(1 << 100_000) + b"\x85", stride=b"K\x00\x85"),
     tensor(shape=b"K\x00" + number(1 << 10_000) + b"\x86", stride=b"K\x00K\x00\x86"),
     tensor(shape=number(1 << 63) + b"\x85", stride=b"K\x00\x85"),
     tensor(offset=number(1 << 63), shape=b"K\x00\x85"), tensor(pid(numel=number(1 << 63)))],
    ids=["many dims", "2000 dims", "2^186", "2^100000", "an empty one", "2^63", "the offset", "the storage"],
)  # fmt: skip
def test_sizes_that_torch_cannot_count_are_refused(part: bytes) -> None:
    with pytest.raises(FormatError):
        use(archive(mapping(text("w"), part)))


def test_a_huge_expanded_view_can_be_looked_at_and_not_written_out() -> None:
    path = archive(mapping(text("w"), tensor(shape=number(1 << 62) + b"\x85", stride=b"K\x00\x85")))
    assert ckptool.inspect(path).parameters == 1 << 62
    with pytest.raises(OutputError, match="no room"):
        ckptool.save(ckptool.open(path), "out.safetensors")
    ckptool.save(ckptool.open(path), "out.pth")
    assert torch.load("out.pth")["w"].shape == (1 << 62,)


@pytest.mark.parametrize("value", [number(1 << 100_000), b"L" + b"9" * 5000 + b"L\n"])
def test_integers_that_python_will_not_print_are_refused(value: bytes) -> None:
    for pickled in (mapping(text("w"), tensor(), value, b"N"), mapping(text("w"), tensor(), text("x"), value)):
        with pytest.raises(LimitError, match="digits"):
            use(archive(pickled))


def safetensors(header: Any, data: bytes = b"\0\0\0\0", path: str = "hostile.safetensors") -> str:
    encoded = json.dumps(header).encode()
    Path(path).write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)
    return path


@pytest.mark.parametrize("shape", [[1 << 62] * 20, [1 << 62] * 200_000, [1] * 1001, [1 << 62, 4]], ids=len)
def test_a_header_with_sizes_beyond_counting_is_refused_in_few_words(shape: list[int]) -> None:
    with pytest.raises(FormatError) as caught:
        use(safetensors({"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, 4]}}))
    assert len(str(caught.value)) < 500


def test_many_dimensions_of_one_are_read() -> None:
    shape = [1] * limits.MAX_DIMS
    path = safetensors({"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, 4]}})
    assert ckptool.open(path).state_dict()["a"].shape == tuple(shape)


def test_a_header_of_aliases_takes_time_as_its_size() -> None:
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    path = safetensors({"__metadata__": {f"x_{i}.w": "a.w" for i in range(20_000)}, "a.w": entry})
    assert len(ckptool.open(path).state_dict()) == 20_001


def test_a_shard_numbered_beyond_counting_is_only_missing() -> None:
    Path("model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "m" + "9" * 5000 + ".safetensors"}})
    )
    assert ckptool.open(".").broken


def test_shards_are_read_in_the_order_of_their_numbers(saved: Saved) -> None:
    names = [f"m-{number}.bin" for number in ("9", "10", "010", "100")]
    for i, name in enumerate(names):
        saved({f"k{i}": torch.ones(1)}, name)
    weight_map = {f"k{i}": name for i, name in reversed(list(enumerate(names)))}
    Path("x.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert list(ckptool.open("x.index.json").state_dict())[::3] == ["k0", "k3"]


# --- zips ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("filling", [b"N0", b"]"])
def test_a_pickle_deflated_beyond_belief_is_not_inflated(filling: bytes) -> None:
    path = archive(filling * 20_000_000, method=zipfile.ZIP_DEFLATED)
    with pytest.raises(LimitError, match="MAX_RATIO"):
        use(path)


def test_a_checkpoint_zipped_again_is_read(saved: Saved) -> None:
    path = saved({f"layer.{i}.weight": torch.full((1,), i) for i in range(1000)})
    with zipfile.ZipFile(path) as old, zipfile.ZipFile("again.pth", "w", zipfile.ZIP_DEFLATED, compresslevel=9) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    assert len(ckptool.open("again.pth").state_dict()) == 1000


# --- modules ---------------------------------------------------------------------------------------------------------


def test_a_model_that_shares_its_parts_2_to_the_n_fold_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from ckptool.core.tree import Global

    node = Global.named("m", "M")()
    node.state = {"_parameters": {"w": 1}, "_buffers": {}, "_modules": {}}
    for _ in range(40):
        above = Global.named("m", "M")()
        above.state = {"_parameters": {}, "_buffers": {}, "_modules": {"x": node, "y": node}}
        node = above
    with pytest.raises(LimitError, match="MAX_SHARED_PARTS"):
        modules.state_dict(node)


# --- objects that are written back -----------------------------------------------------------------------------------


class TwoParts:
    def __init__(self) -> None:
        self.given: Any = None

    def __getstate__(self) -> Any:
        return {"a": torch.ones(2)}, torch.zeros(4)

    def __setstate__(self, state: Any) -> None:
        self.given = state


class Keywords:
    def __new__(cls, *, value: Any = None) -> Keywords:
        made = object.__new__(cls)
        made.value = value  # type: ignore[attr-defined]
        return made

    def __getnewargs_ex__(self) -> Any:
        return (), {"value": self.value}  # type: ignore[attr-defined]


class KeywordTuple(tuple[Any, ...]):
    def __new__(cls, *, first: Any) -> KeywordTuple:
        return tuple.__new__(cls, (first,))

    def __getnewargs_ex__(self) -> Any:
        return (), {"first": self[0]}


@dataclasses.dataclass(frozen=True)
class Point:
    x: Any


class Slotted:
    __slots__ = ("__dict__", "a")

    def __init__(self) -> None:
        self.a, self.b = torch.ones(5), torch.zeros(2)


class Text(str):
    pass


ODD = {
    "a state of two parts": TwoParts,
    "slots and a dict": Slotted,
    "keywords": lambda: [Keywords(value=torch.ones(3)), Keywords(value=1)],
    "a tuple made with a keyword": lambda: KeywordTuple(first=torch.ones(3)),
    "an object as a key": lambda: {Point("x"): torch.ones(1), ("t", Point(2)): 1},
    "a partial": lambda: functools.partial(print, torch.ones(4)),
    "a defaultdict": lambda: collections.defaultdict(list, {1: [torch.ones(2)]}),
    "a set": lambda: {("a", 1), "b", frozenset({2, (3,)})},
}


@pytest.mark.parametrize("name", ODD)
def test_what_a_writer_meets_has_been_looked_for(name: str, saved: Saved) -> None:
    path = saved({"w": torch.ones(2), "odd": ODD[name]()})
    ckptool.save(ckptool.filter(ckptool.open(path))[0], "out.pth")
    for one, other in zip(*(flattened(torch_load(Path(file))) for file in (path, "out.pth")), strict=True):
        assert type(one) is type(other)
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def flattened(value: Any) -> Iterator[Any]:
    if isinstance(value, torch.Tensor) or not (inner := insides(value)):
        yield value if isinstance(value, (torch.Tensor, int, str)) else type(value).__name__
        return
    for item in inner:
        yield from flattened(item)


def insides(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [part for pair in value.items() for part in pair]
    if isinstance(value, functools.partial):
        return [*value.args, *value.keywords.values()]
    if isinstance(value, (set, frozenset)):
        return sorted(value, key=repr)
    slots = [value.a] if isinstance(value, Slotted) else []
    return [*slots, *(value if isinstance(value, (list, tuple)) else ()), *getattr(value, "__dict__", {}).values()]


def test_tensors_in_keys_come_through(saved: Saved) -> None:
    path = saved({"w": torch.ones(2), "odd": {torch.ones(2): 1, ("a", torch.arange(3)): 2}})
    ckptool.save(ckptool.open(path), "out.pth")
    one, (text, other) = torch.load("out.pth", weights_only=False)["odd"]
    assert one.tolist() == [1, 1]
    assert (text, other.tolist()) == ("a", [0, 1, 2])


def test_a_dict_made_of_a_tensor_or_of_lists_comes_through() -> None:
    for argument in (tensor(), pid(), b"]](]Ne" + b"a"):
        value = b"ccollections\nOrderedDict\n" + argument + b"\x85R"
        path = beside(value)
        ckptool.inspect(path)
        ckptool.save(ckptool.open(path), "out.pth", force=True)
        again = ckptool.open("out.pth").tree["b"]
        assert (again.qualname, type(again.args[0])) == ("OrderedDict", type(ckptool.open(path).tree["b"].args[0]))


def test_keys_that_are_no_str_are_shown_as_what_they_say(saved: Saved) -> None:
    one = torch.ones(1)
    keys = [np.str_("ab"), np.str_("é∂"), b"x\xff", Text("sub"), np.int64(-3), np.bytes_(b"yz"), Point(1), Point(2), 5]
    path = saved(dict.fromkeys(keys, one))
    assert [key for key in ckptool.open(path).state_dict() if "Point" not in key] == [
        "ab", "é∂", r"b'x\xff'", "sub", "-3", "b'yz'", "5",
    ]  # fmt: skip
    assert len(ckptool.open(path).state_dict()) == len(keys)
    kept, _ = ckptool.filter(path, include=["ab", "b*", "*(2)"])
    ckptool.save(kept, "out.pth")
    assert list(torch.load("out.pth", weights_only=False)) == [keys[0], keys[2], keys[5], keys[7]]


def test_plain_keys_that_read_alike_are_told_apart_and_refused_where_they_are_written(saved: Saved) -> None:
    checkpoint = ckptool.open(saved({1: torch.ones(1), "1": torch.ones(1)}))
    assert len(checkpoint.state_dict()) == 2
    for name in ("out.pth", "out.safetensors"):
        with pytest.raises(CollisionError, match="1"):
            ckptool.save(checkpoint, name)


def test_a_key_put_together_from_one_long_name_is_bounded() -> None:
    long = b"X" + struct.pack("<I", 100_000) + b"x" * 100_000 + b"q\x01"
    deep = b"}" + long + b"}h\x01" * 100 + b"](" + tensor() + b"e" + b"s" * 101
    with pytest.raises(LimitError, match="MAX_KEY"):
        use(archive(deep))


LONG_CHAIN = 20_000


def in_a_state(depth: int) -> bytes:
    return (
        b"ctorch._utils\n_rebuild_parameter_with_state\nq\x050" + tensor() + b"q\x060"
        + mapping(text("w"), b"h\x05(h\x06\x89}" * depth + b"N" + b"tR" * depth)
    )  # fmt: skip


IN_A_STATE = in_a_state(5_000)
IN_A_KEY = mapping(text("w"), tensor(), MODULE + b"]" * LONG_CHAIN + b"a" * (LONG_CHAIN - 1) + b"b", b"N")


@pytest.mark.parametrize("pickled", [IN_A_STATE, IN_A_KEY], ids=["a tensor's state", "a key"])
def test_what_lies_deep_behind_a_leaf_is_refused_by_every_command_in_one_line(
    pickled: bytes, refused: Callable[..., str]
) -> None:
    path = archive(pickled)
    said = {
        refused(*call).strip()
        for call in (
            ["inspect", path],
            ["inspect", "--check", path],
            ["diff", path, path],
            ["convert", path, "-o", "out.pth"],
            ["convert", path, "-o", "out.safetensors"],
            ["filter", "--match", path, path, "-o", "out.pth"],
        )
    }
    assert len(said) == 1
    assert f"{path}: its containers are nested too deep: over MAX_DEPTH, 2,000" in said.pop()


def test_a_raised_depth_is_written_or_refused_and_never_a_traceback(refused: Callable[..., str], run: Run) -> None:
    nested = b"]" * LONG_CHAIN + b"a" * (LONG_CHAIN - 1)
    raised = ["--limit", "MAX_DEPTH=100000", "--limit", "MAX_STEPS=1000000000"]
    path = archive(mapping(text("w"), tensor(), text("deep"), nested))
    assert "over MAX_STEPS" in refused("convert", path, "-o", "out.pth", *raised[:2])
    path = archive(in_a_state(3_000), "state.pth")
    assert run("convert", path, "-o", "out.pth", *raised)[0] == 0
    assert run("diff", path, "out.pth", *raised)[0] == 0


def test_whole_models_in_a_list_pass_through_unchanged(saved: Saved) -> None:
    path = saved([torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)])
    same, _ = ckptool.filter(path)
    ckptool.save(same, "out.pth")
    assert_identical(torch.load("out.pth", weights_only=False), torch.load(path, weights_only=False))
    opened = ckptool.open(path)
    changed = {key: dataclasses.replace(value, requires_grad=False) for key, value in opened.state_dict().items()}
    with pytest.raises(UnsupportedError, match=r"saved\.pth: cannot change 'weight' inside a Linear: .*--root"):
        opened.with_state_dict(changed)


# --- hashes and names ------------------------------------------------------------------------------------------------

MODULUS = sys.hash_info.modulus


def tuples_of(one: bytes, other: bytes) -> bytes:
    return b"".join(b"(" + b"".join(items) + b"tN" for items in itertools.product((one, other), repeat=13))


def strides_of_one_hash() -> bytes:
    steps = [number(1 + times * MODULUS) for times in range(4)]
    puts = b"".join(step + b"q%c0" % (16 + at) for at, step in enumerate(steps))
    gets = itertools.islice(itertools.product([b"h%c" % (16 + at) for at in range(4)], repeat=7), 4_000)
    ones = b"(" + b"K\x01" * 7 + b"t"
    views = (
        text(f"w{at}") + tensor(shape=ones, stride=b"(" + b"".join(stride) + b"t") for at, stride in enumerate(gets)
    )
    return puts + mapping(*views)


ALIKE = {
    "integers": mapping(text("w"), tensor(), *(number(at * MODULUS) + b"N" for at in range(1, 8_001))),
    "a set of integers": (
        b"\x8f(" + b"".join(number(at * MODULUS) for at in range(1, 8_001)) + b"\x900" + mapping(text("w"), tensor())
    ),
    "tuples of -1 and -2": mapping(text("w"), tensor(), tuples_of(b"J\xff\xff\xff\xff", b"J\xfe\xff\xff\xff")),
    "tuples of -1 and -2 out of the memo": (
        b"J\xff\xff\xff\xffq\x050J\xfe\xff\xff\xffq\x060" + mapping(text("w"), tensor(), tuples_of(b"h\x05", b"h\x06"))
    ),
    "tuples of -1 and a longer -2": (
        b"J\xff\xff\xff\xffq\x050\x8a\x01\xfeq\x060" + mapping(text("w"), tensor(), tuples_of(b"h\x05", b"h\x06"))
    ),
    "tuples of 1 and 2**61": (
        b"K\x01q\x050" + number(1 << 61) + b"q\x060" + mapping(text("w"), tensor(), tuples_of(b"h\x05", b"h\x06"))
    ),
    "names of names": (
        b"c__builtin__\ngetattr\nq\x00" + b"h\x00" * 3000 + b"cA\nB\n" + text("a" * 2000) + b"q\x01\x86R"
        + b"h\x01\x86R" * 3000 + b"q\x020" + mapping(text("w"), tensor())
    ),
    "modules of long names": (
        text("m" * 1_000_000) + b"q\x000" + b"".join(b"h\x00" + text(f"q{at}") + b"\x930" for at in range(1500))
        + mapping(text("w"), tensor())
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ALIKE)
def test_what_would_all_be_compared_with_each_other_is_refused(name: str) -> None:
    with pytest.raises(LimitError, match=r"over MAX_(WIDE|TUPLE_KEYS|NAME), "):
        ckptool.inspect(archive(ALIKE[name]))


def test_strides_of_one_hash_are_looked_at_one_by_one() -> None:
    assert len(ckptool.inspect(archive(strides_of_one_hash())).tensors) == 4_000


def test_a_list_of_pairs_that_many_places_share_is_made_a_dict_of_once() -> None:
    pairs = b"ccollections\nOrderedDict\n](](K\x01Neq\x01" + b"h\x01" * 10_000 + b"e\x85Rq\x020"
    shared = mapping(text("w"), tensor(), text("l"), b"](" + b"h\x02" * 3_000 + b"e")
    assert len(ckptool.inspect(archive(pairs + shared)).tensors) == 1


# --- interrupted -----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_a_write_that_is_terminated_leaves_nothing_behind() -> None:
    script = """
import os, signal, sys
from ckptool.io import output as outputs
from ckptool.cli import main
write = outputs.LocalOutput.write
def killed(self, data):
    write(self, data)
    os.kill(os.getpid(), signal.SIGTERM)
outputs.LocalOutput.write = killed
sys.exit(main(["filter", sys.argv[1], "-o", "out.pth"]))
"""
    run = subprocess.run(
        [sys.executable, "-c", script, str(FIXTURES / "resnet_new.pth")], capture_output=True, text=True
    )
    assert (run.returncode, run.stderr) == (143, "")
    assert os.listdir() == []


def test_room_beyond_any_file_is_refused() -> None:
    with pytest.raises(OutputError, match="no room"), LocalOutput("out") as output:
        output.reserve(1 << 70)
