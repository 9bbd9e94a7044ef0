"""Pickle streams: what CPython's pickle reads from ours and we from its, and that nothing ever runs."""

from __future__ import annotations

import collections
import io
import os
import pickle
import pickletools
import struct
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from oracles import CANARY, assert_identical, thinned

import ckptool
from ckptool import limits
from ckptool.core.tree import Global, PyObject, as_mapping
from ckptool.errors import CkptoolError, FormatError, LimitError, UnsupportedError
from ckptool.pickling import dump as picklewriter
from ckptool.pickling import load as pickles


def read(data: bytes, **options: Any) -> Any:
    assert pickles.scan(data) == len(data)
    return pickles.load(data, **options)[0]


def rewritten(data: bytes) -> bytes:
    return picklewriter.dump(read(data))


def frames(*parts: bytes, protocol: int = 2) -> bytes:
    return b"\x80" + bytes([protocol]) + b"".join(parts) + b"."


class Outer:
    class Inner:
        class Core:
            pass

    def __init__(self) -> None:
        self.value = 5


PLAIN = [
    None, True, False, 0, 255, 256, 65535, 65536, -1, -(1 << 31), 1 << 31, 1 << 63, -(1 << 2000) + 3, 0.0, -0.0, 1e300,
    float("inf"), "", "a", "schön\u2028\n", "\ud800", "x" * 70_000, [], [[]], (), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4),
    {}, {"a": {"b": [1, (2, {"c": None})]}}, {1: "i", "1": "s", (1, 2): "t", None: 0, 2.5: "f"},
    list(range(3000)), dict.fromkeys(range(3000)), [None], {"one": 1},
]  # fmt: skip

OBJECTS = [
    b"", b"\x00\xff", bytearray(b"ab"), {1, 2}, frozenset({7}), complex(1, -2), range(3), slice(1, 2),
    collections.OrderedDict(b=1, a=2), collections.defaultdict(list, a=[1]), collections.Counter("aab"),
    collections.deque([1, 2], 3), types.SimpleNamespace(a=1), Outer(), Outer.Inner.Core(), Outer.Inner.Core,
    os.path.join,
    Path("a/b").parts, ValueError("x", 1),
]  # fmt: skip


@pytest.mark.parametrize("value", PLAIN, ids=lambda value: repr(value)[:20])
def test_plain_values_of_every_protocol_are_read_as_they_are(value: Any) -> None:
    for protocol in range(6):
        data = pickle.dumps(value, protocol)
        assert_identical(read(data), value)
        assert_identical(pickle.loads(rewritten(data)), value)


@pytest.mark.parametrize("value", OBJECTS, ids=lambda value: repr(value)[:20])
def test_objects_of_every_protocol_survive_being_rewritten(value: Any) -> None:
    for protocol in range(2, 6):
        again = pickle.loads(rewritten(pickle.dumps(value, protocol)))
        if isinstance(value, ValueError):
            assert (type(again), again.args) == (ValueError, value.args)
        else:
            assert_identical(again, value)


@pytest.mark.parametrize("protocol", range(2, 6))
def test_what_is_written_is_protocol_two_and_well_formed(protocol: int) -> None:
    data = rewritten(pickle.dumps({"all": PLAIN, "objects": OBJECTS}, protocol))
    assert data[:2] == b"\x80\x02"
    assert all(opcode.proto <= 2 for opcode, _, _ in pickletools.genops(data))
    pickletools.dis(data, io.StringIO())  # checks the memo and the stack


def test_writing_again_changes_nothing() -> None:
    once = rewritten(pickle.dumps({"all": PLAIN, "objects": OBJECTS}, 4))
    assert rewritten(once) == once


# --- identity --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", range(2, 6))
def test_shared_objects_stay_shared_and_equal_ones_apart(protocol: int) -> None:
    shared, pair = [1], (2, [3])
    value = {"a": shared, "b": shared, "c": [1], "d": pair, "e": pair, "f": Outer()}
    value["g"] = value["f"]
    again = pickle.loads(rewritten(pickle.dumps(value, protocol)))
    assert_identical(again, value)
    assert again["a"] is again["b"] is not again["c"]
    assert again["d"] is again["e"]
    assert again["f"] is again["g"]


@pytest.mark.parametrize("protocol", range(2, 6))
def test_cycles_stay_cycles(protocol: int) -> None:
    ring: dict[str, Any] = {}
    ring["self"] = ring
    knot: list[Any] = [ring]
    knot.append(knot)
    pair: tuple[Any, ...] = ([],)
    pair[0].append(pair)
    many: tuple[Any, ...] = ([], 1, 2, 3)
    many[0].append(many)
    thing = Outer()
    thing.parent = {"child": thing}  # type: ignore[attr-defined]
    value = {"ring": ring, "knot": knot, "pair": pair, "many": many, "thing": thing}
    again = pickle.loads(rewritten(pickle.dumps(value, protocol)))
    assert_identical(again, value)
    assert again["ring"]["self"] is again["ring"]
    assert again["pair"][0][0] is again["pair"]
    assert again["many"][0][0] is again["many"]
    assert again["thing"].parent["child"] is again["thing"]


def test_deeply_nested_containers_are_written_or_refused_and_never_crash() -> None:
    def nested(depth: int) -> bytes:
        return b"\x80\x02" + b"]" * depth + b"a" * (depth - 1) + b"."

    deepest = limits.MAX_DEPTH.figure
    assert len(rewritten(nested(deepest - 1))) > 2 * deepest
    with pytest.raises(LimitError, match="MAX_DEPTH"):
        rewritten(nested(deepest + 5))
    with pytest.raises(LimitError, match="MAX_DEPTH"):
        read(nested(200_000))


# --- what is read ----------------------------------------------------------------------------------------------------


def test_an_object_is_read_as_what_the_pickle_said_of_it() -> None:
    tree, names = pickles.load(pickle.dumps(Outer(), 2))
    assert isinstance(tree, PyObject)
    assert (tree.module, tree.qualname, tree.state) == (__name__, "Outer", {"value": 5})
    assert (__name__, "Outer") in names


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_nested_classes_have_their_whole_name(protocol: int) -> None:
    tree, names = pickles.load(pickle.dumps(Outer.Inner.Core(), protocol))
    assert tree.qualname == "Outer.Inner.Core"
    assert (__name__, "Outer.Inner.Core") in names


def test_dict_subclasses_are_mappings_in_order() -> None:
    tree = read(pickle.dumps(collections.OrderedDict(b=1, a=2), 2))
    assert list((as_mapping(tree) or {}).items()) == [("b", 1), ("a", 2)]


def test_python_2_pickles_are_read_as_text() -> None:
    old = b"\x80\x02}q\x00(U\x03keyq\x01U\x04\xe9\x00abq\x02U\x01nc__builtin__\nlong\nq\x03(K\x05tR u.".replace(
        b" ", b""
    )
    tree = read(old)
    assert tree["key"] == "\xe9\x00ab"
    assert repr(type(tree["n"])) == "__builtin__.long"


def test_persistent_ids_are_handed_over_and_refused_without_a_hand() -> None:
    data = frames(b"X\x03\x00\x00\x00pidQ")
    assert read(data, persistent_load=lambda pid: [pid]) == ["pid"]
    with pytest.raises(FormatError, match="persistent"):
        read(data)
    assert read(b"Ppid\n.", persistent_load=lambda pid: [pid]) == ["pid"]


def test_only_the_callers_builders_are_called() -> None:
    data = frames(b"cmod\nadd\nK\x01K\x02\x86R")
    assert read(data, builders={("mod", "add"): lambda a, b: a + b}) == 3
    recorded = read(data)
    assert (recorded.module, recorded.args) == ("mod", (1, 2))


def test_the_end_of_a_pickle_is_found_with_others_behind_it() -> None:
    values = [{"a": list(range(500))}, "x" * 300, Outer()]
    data = b"".join(pickle.dumps(value, protocol) for protocol, value in zip((2, 4, 5), values, strict=True))
    position, found = 0, []
    stream = io.BytesIO(data)
    while position < len(data):
        end = pickles.scan(data, position)
        found.append(end)
        pickle.Unpickler(stream).load()
        assert stream.tell() == end
        position = end
    assert len(found) == 3


def test_the_caller_may_start_anywhere() -> None:
    data = b"junk" + pickle.dumps([1, 2], 2)
    assert pickles.load(data, 4)[0] == [1, 2]


# --- nothing runs ----------------------------------------------------------------------------------------------------

MKDIR = b"cposix\nmkdir\n"
ARGUMENT = b"X" + struct.pack("<I", len(CANARY)) + CANARY.encode()

HOSTILE = {
    "GLOBAL + REDUCE": frames(MKDIR, ARGUMENT, b"\x85R"),
    "STACK_GLOBAL": frames(b"\x8c\x05posix\x8c\x05mkdir\x93", ARGUMENT, b"\x85R", protocol=4),
    "INST": b"(" + b"V" + CANARY.encode() + b"\niposix\nmkdir\n.",
    "OBJ": b"(" + MKDIR + b"V" + CANARY.encode() + b"\no.",
    "NEWOBJ": frames(MKDIR, ARGUMENT, b"\x85\x81"),
    "NEWOBJ_EX": frames(MKDIR, ARGUMENT, b"\x85}\x92", protocol=4),
    "os.system": frames(b"cos\nsystem\nX\x20\x00\x00\x00", b"mkdir CKPTOOL_CANARY_EXECUTED".ljust(32), b"\x85R"),
    "builtins.eval": frames(b"c__builtin__\neval\nX\x2c\x00\x00\x00",
                            b"__import__('os').mkdir('%s')".replace(b"%s", b"C").ljust(44), b"\x85R"),
    "getattr of a module": frames(b"c__builtin__\ngetattr\ncos\nsystem\nX\x08\x00\x00\x00__call__\x86R",
                                  ARGUMENT, b"\x85R"),
    "getattr upwards": frames(b"c__builtin__\ngetattr\ncollections\nOrderedDict\nX\x0a\x00\x00\x00__import__\x86R",
                              ARGUMENT, b"\x85R"),
    "BUILD with a function": frames(b"ccollections\nOrderedDict\n)R}X\x0c\x00\x00\x00__setstate__",
                                    MKDIR, b"sb", ARGUMENT, b"b"),
    "BUILD on a class": frames(b"cm\nC\n}X\x0c\x00\x00\x00__setstate__", MKDIR, b"sb"),
    "BUILD on a class with slots": frames(b"cm\nC\nN}X\x08\x00\x00\x00__call__", MKDIR, b"s\x86b"),
    "BUILD on a builder": frames(b"ctorch._utils\n_rebuild_tensor_v2\n}X\x08\x00\x00\x00function", MKDIR, b"sb"),
    "APPEND to a class": frames(b"cm\nC\n", ARGUMENT, b"a"),
    "APPENDS to a class": frames(b"cm\nC\n(", ARGUMENT, b"e"),
    "SETITEM on a class": frames(b"cm\nC\n", ARGUMENT, b"Ns"),
    "ADDITEMS to a class": frames(b"cm\nC\n(", ARGUMENT, b"\x90", protocol=4),
    "a call of a call": frames(b"cfunctools\npartial\n", MKDIR, ARGUMENT, b"\x86R)R"),
    "copyreg": frames(b"ccopy_reg\n_reconstructor\n", MKDIR, ARGUMENT, b"N\x87R"),
    "a class made on the way": frames(b"c__builtin__\ntype\nX\x01\x00\x00\x00X)}\x87R)R"),
    "map over it": frames(b"c__builtin__\nlist\nc__builtin__\nmap\n", MKDIR, b"]", ARGUMENT, b"a\x86R\x85R"),
}  # fmt: skip


@pytest.mark.skipif(os.name != "posix", reason="the canary is made by posix.mkdir")
def test_the_canary_sings_when_a_pickle_is_really_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Otherwise all the tests below could not fail.
    other = tmp_path / "other"
    other.mkdir()
    for name in ("GLOBAL + REDUCE", "STACK_GLOBAL", "INST", "OBJ", "os.system"):
        monkeypatch.chdir(other)
        pickle.loads(HOSTILE[name])
        assert (other / CANARY).exists(), name
        (other / CANARY).rmdir()
        monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", HOSTILE)
def test_nothing_runs_whatever_the_opcode(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before, imported = dict(vars(PyObject)), set(sys.modules)
    try:
        tree = read(HOSTILE[name])
        picklewriter.dump(tree)
    except CkptoolError:
        pass
    assert dict(vars(PyObject)) == before
    assert set(sys.modules) == imported
    assert not Path(CANARY).exists()


@pytest.mark.parametrize(
    "name", [n for n in HOSTILE if n in ("GLOBAL + REDUCE", "STACK_GLOBAL", "INST", "OBJ", "NEWOBJ")]
)
def test_what_would_have_run_is_named(name: str) -> None:
    _, names = pickles.load(HOSTILE[name])
    assert names == (("posix", "mkdir"),)


def test_no_module_of_the_file_is_imported() -> None:
    victim = "this_module_must_not_be_imported"
    Path(f"{victim}.py").write_text(f"import os; os.mkdir({CANARY!r})")
    sys.path.insert(0, os.getcwd())
    try:
        read(frames(f"c{victim}\nThing\n)R".encode()))
        read(frames(f"c{victim}\nA.B\n)R".encode(), protocol=4))
    finally:
        sys.path.remove(os.getcwd())
    assert victim not in sys.modules


@pytest.mark.parametrize(
    ("opcode", "name"),
    [(b"\x82\x01", "EXT1"), (b"\x83\x01\x00", "EXT2"), (b"\x84\x01\x00\x00\x00", "EXT4"),
     (b"\x97", "NEXT_BUFFER"), (b"N\x98", "READONLY_BUFFER")],
)  # fmt: skip
def test_opcodes_that_reach_outside_the_stream_are_refused_by_name(opcode: bytes, name: str) -> None:
    with pytest.raises(UnsupportedError, match=name):
        pickles.scan(frames(opcode, protocol=5))


# --- bombs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [frames(b"Nr\xff\xff\xff\x7f"), frames(b"Nr\xff\xff\xff\xff"), frames(b"Nr\x00\x00\x00\x10"), b"Np4294967295\n.",
     b"Np" + b"9" * 40 + b"\n.", b"Np-1\n.", b"I" + b"9" * 5000 + b"\n.", b"L" + b"9" * 5000 + b"L\n."],
)  # fmt: skip
def test_a_few_bytes_cannot_make_the_machine_allocate_much(data: bytes) -> None:
    with pytest.raises(LimitError):
        pickles.scan(data)


@pytest.mark.parametrize(
    "opcode",
    [b"X\xff\xff\xff\x7f", b"\x8d" + b"\xff" * 7 + b"\x7f", b"B\xff\xff\xff\x7f", b"\x8e" + b"\xff" * 8,
     b"T\xff\xff\xff\x7f", b"\x8b\xff\xff\xff\x7f", b"\x96" + b"\xff" * 8, b"\x95" + b"\xff" * 8,
     b"\x8a\xff", b"U\xff"],
)  # fmt: skip
def test_a_length_beyond_the_end_is_a_cut_off_pickle(opcode: bytes) -> None:
    data = frames(opcode, b"abc", protocol=4)
    with pytest.raises(FormatError):
        read(data)


@pytest.mark.parametrize("opcode", [b"\x8b\xff\xff\xff\xff", b"T\xff\xff\xff\xff"])
def test_negative_lengths_are_errors(opcode: bytes) -> None:
    with pytest.raises(FormatError):
        read(frames(opcode, b"abc"))


def test_too_many_names_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits.MAX_GLOBALS, "figure", 20)
    data = frames(b"(", *(f"cm\nC{i}\n".encode() for i in range(30)), b"l")
    with pytest.raises(LimitError, match="MAX_GLOBALS"):
        read(data)


def test_unknown_opcodes_are_refused_with_their_place() -> None:
    with pytest.raises(FormatError, match="byte 3"):
        pickles.scan(b"\x80\x02N\xff.")


@pytest.mark.parametrize(
    "opcode", [b"}]Ns", b"NR", b"K\x01b", b"h\x05", b"0", b"a", b"e", b"t", b"\x85", b"N(b", b"\x93"]
)
def test_a_stumbling_machine_is_a_damaged_file(opcode: bytes) -> None:
    with pytest.raises(FormatError):
        read(frames(opcode))


EVERYTHING = {"all": PLAIN[:20] + PLAIN[23:-4], "objects": OBJECTS, "ring": Outer()}


@thinned(4)
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_cut_at_every_byte_it_is_an_error_of_ours(protocol: int, step: int) -> None:
    data = pickle.dumps(EVERYTHING, protocol)
    for end in range(0, len(data), step):
        with pytest.raises((FormatError, UnsupportedError)):
            read(data[:end])


@thinned(17)
def test_any_byte_changed_it_is_read_or_an_error_of_ours(step: int) -> None:
    data = pickle.dumps({"objects": OBJECTS, "o": Outer(), "n": [1, 2.5, "x", (3,)]}, 2)
    for at in range(2, len(data), step):
        for value in (0x00, 0x28, 0x51, 0x52, 0x62, 0x81, 0xFF, data[at] ^ 1):
            changed = data[:at] + bytes([value]) + data[at + 1 :]
            try:
                pickles.load(changed, 0) if pickles.scan(changed) else None
            except CkptoolError:
                continue


@pytest.mark.parametrize("enabled", [True, False])
def test_the_garbage_collector_is_left_as_it_was(enabled: bool, tmp_path: Path) -> None:
    import gc

    (tmp_path / "x.pkl").write_bytes(frames(b"NR"))
    (gc.enable if enabled else gc.disable)()
    try:
        with pytest.raises(FormatError):
            ckptool.open(tmp_path / "x.pkl")
        assert gc.isenabled() == enabled
    finally:
        gc.enable()


# --- what cannot be written ------------------------------------------------------------------------------------------


def test_what_protocol_two_cannot_say_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="keyword"):
        rewritten(frames(b"cm\nC\n)}X\x01\x00\x00\x00aK\x01s\x92", protocol=4))
    with pytest.raises(UnsupportedError, match="object"):
        picklewriter.dump(object())
    with pytest.raises(UnsupportedError, match="name"):
        picklewriter.dump(Global.named("a\nb", "C"))


def test_names_with_letters_outside_ascii_are_read_back() -> None:
    made = Global.named("modül", "Klasse")
    again = read(picklewriter.dump([made, made]))
    assert repr(again[0]) == "modül.Klasse"
    assert again[0] is again[1]


def test_many_memo_indices_do_not_read_like_a_call_whose_result_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """The 12,370th begins with the opcodes REDUCE and POP: such pickles were read ten times as slowly."""
    slow: list[int] = []
    monkeypatch.setattr(pickles._Unpickling, "run_in_python", lambda *_: slow.append(1))
    data = pickle.dumps([collections.Counter({str(number): (number,)}) for number in range(5000)], protocol=2)
    assert b"rR0\0\0" in data
    assert len(read(data)) == 5000
    assert not slow
    pickles.load(frames(b"cm\nf\n)R0N"))
    assert slow
