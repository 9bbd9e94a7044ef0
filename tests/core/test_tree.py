from __future__ import annotations

from typing import Any

import pytest

from ckptool import limits
from ckptool.core import tree
from ckptool.core.tree import Global, PyObject, as_mapping, attributes, children, ordered_dict, replaced, walk
from ckptool.errors import FormatError, LimitError, UnsupportedError

THING = Global.named("somewhere", "Thing")


def made(*args: Any, state: Any = None) -> PyObject:
    thing = THING(*args)
    thing.state = state
    return thing


def test_a_stand_in_class_remembers_its_name_and_nothing_else() -> None:
    assert (THING.module, THING.qualname, repr(THING)) == ("somewhere", "Thing", "somewhere.Thing")
    assert isinstance(THING(), PyObject)
    assert type(THING()) is THING


def test_calling_a_stand_in_records_the_call() -> None:
    called = THING(1, "two")
    assert (called.args, called.called) == ((1, "two"), True)
    assert THING.__new__(THING, 3).args == (3,)
    assert not THING.__new__(THING, 3).called


def test_a_stand_in_class_cannot_be_altered() -> None:
    with pytest.raises(FormatError, match="attribute"):
        THING.qualname = "Other"
    with pytest.raises(FormatError, match="attribute"):
        THING.args = ()
    assert repr(THING) == "somewhere.Thing"


def test_a_stand_in_has_no_room_for_attributes_of_its_own() -> None:
    with pytest.raises(AttributeError):
        THING().anything = 1  # type: ignore[attr-defined]


def test_an_object_is_built_once() -> None:
    thing = THING()
    thing.__setstate__({"a": 1})
    with pytest.raises(FormatError, match="twice"):
        thing.__setstate__({"a": 2})


def test_an_ordered_dict_is_a_mapping_with_its_metadata() -> None:
    node = ordered_dict({"b": 1, "a": 2}, ordered_dict({"": {"version": 1}}))
    assert list(as_mapping(node) or {}) == ["b", "a"]
    assert node["a"] == 2
    assert as_mapping(attributes(node)["_metadata"]) == {"": {"version": 1}}


@pytest.mark.parametrize(
    "args", [([["x", 1], ["y", 2]],), ([("x", 1), ("y", 2)],), ({"x": 1, "y": 2},)], ids=["lists", "tuples", "dict"]
)
def test_dict_subclasses_made_by_a_call_are_mappings_too(args: tuple[Any, ...]) -> None:
    node = Global.named("collections", "OrderedDict")(*args)
    assert as_mapping(node) == {"x": 1, "y": 2}


def test_any_class_with_items_set_by_key_is_a_mapping() -> None:
    node = THING()
    assert as_mapping(node) is None
    node["k"] = 5
    assert as_mapping(node) == {"k": 5}


def test_attributes_come_from_dict_state_and_from_slots() -> None:
    assert attributes(made(state={"a": 1})) == {"a": 1}
    assert attributes(made(state=(None, {"x": 2}))) == {"x": 2}
    assert attributes(made(state=({"a": 1}, {"x": 2}))) == {"a": 1, "x": 2}
    assert attributes(made(state=[1, 2])) == {}
    assert attributes(7) == {}


def test_children_are_all_that_hangs_on_an_object() -> None:
    thing = made("arg", state={"attribute": 1})
    thing.append("item")
    thing["key"] = "value"
    assert {child for _, child in children(thing)} == {"arg", 1, "item", "value"}
    odd = made(state=(1, 2, 3))
    assert list(children(odd)) == [("__state__", (1, 2, 3))]


def test_walking_gives_parents_first_in_order_with_keys_as_they_are() -> None:
    found = list(walk({"a": [1, (2,)], 0: {"0": None}}))
    paths = [path for path, _ in found]
    assert paths == [(), ("a",), ("a", 0), ("a", 1), ("a", 1, 0), (0,), (0, "0")]


def test_walking_ends_on_containers_that_hold_themselves() -> None:
    ring: dict[str, Any] = {"name": "ring"}
    ring["self"] = ring
    knot: list[Any] = [ring]
    ring["knot"] = knot
    assert [path for path, _ in walk(ring)] == [(), ("name",), ("self",), ("knot",), ("knot", 0)]


def test_shared_nodes_are_seen_at_each_of_their_places() -> None:
    shared = [1]
    assert [path for path, _ in walk({"a": shared, "b": shared})] == [(), ("a",), ("a", 0), ("b",), ("b", 0)]


def test_a_memoised_bomb_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits.MAX_SHARED, "figure", 10_000)
    bomb: list[Any] = []
    for _ in range(60):  # 2^60 leaves
        bomb = [bomb, bomb]
    with pytest.raises(LimitError, match="MAX_SHARED"):
        list(walk(bomb))


def test_what_is_shared_a_few_times_may_be_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits.MAX_SHARED, "figure", 100)
    shared = list(range(10_000))
    assert len(list(walk([shared] * 4))) == 1 + 4 + 4 * 10_000
    with pytest.raises(LimitError, match="MAX_SHARED"):
        list(walk([shared] * 8))


def test_inside_a_walk_gives_all_that_a_pickle_would_hold_once() -> None:
    key, value, argument, slot = [1], [2], [3], [4]
    thing = made(argument, state=({"a": value}, [slot]))
    thing.mapping = {(7, 8): value}
    found = [node for _, node in walk({"thing": thing, "again": thing}, inside=True)]
    assert sum(node is argument for node in found) == 1
    assert any(node is slot for node in found)
    assert any(node == (7, 8) for node in found)
    assert key not in found


def test_paths_of_a_walk_have_a_bounded_length_in_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits.MAX_STEPS, "figure", 1_000)
    with pytest.raises(LimitError, match="MAX_STEPS"):
        list(walk({"a": {"b": {"c": list(range(400))}}}))


@pytest.mark.parametrize("value", [(1, 2), (1,), [], [1.5, "x"], {"a": None}, "text", b"\x00", True, 1 << 70])
def test_a_small_value_is_said_as_python_says_it(value: Any) -> None:
    assert tree.brief(value) == repr(value)


def test_a_large_value_is_said_in_few_words() -> None:
    bomb: Any = ()
    for _ in range(200):
        bomb = (bomb, bomb)
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    for value in (bomb, deep, 1 << 1_000_000, "x" * 10**6, list(range(10**6)), {1: bomb}):
        assert len(tree.brief(value)) <= 100


def test_deep_trees_end_in_an_error_of_ours() -> None:
    deep: list[Any] = []
    for _ in range(limits.MAX_DEPTH.figure + 5):
        deep = [deep]
    with pytest.raises(LimitError, match="MAX_DEPTH"):
        list(walk(deep))


def test_deep_trees_do_not_exhaust_the_stack() -> None:
    deep: list[Any] = []
    for _ in range(50_000):
        deep = [deep]
    count = 0
    for _ in walk(deep):
        count += 1
        if count > 200:  # paths grow with the depth: the way down is enough
            break
    assert count == 201


def test_closed_containers_are_shown_and_not_entered() -> None:
    found = [path for path, _ in walk({"in": [1], "out": {"x": 1}}, closed=lambda node: isinstance(node, list))]
    assert found == [(), ("in",), ("out",), ("out", "x")]


def test_replacing_copies_the_way_and_keeps_all_else() -> None:
    other, old = [1, 2], {"w": 1}
    top = {"model": ordered_dict(old, "meta"), "other": other, "pair": (other, 5)}
    new = replaced(top, ("model", "w"), 9)
    assert new["model"]["w"] == 9
    assert new["model"].state == {"_metadata": "meta"}
    assert new["other"] is other
    assert new["pair"] is top["pair"]
    assert old == {"w": 1}
    assert list(new) == list(top)


def test_replacing_inside_lists_tuples_and_attributes_keeps_their_types() -> None:
    assert replaced([1, (2, 3)], (1, 0), 7) == [1, (7, 3)]
    thing = made("a", state={"x": [1]})
    new = replaced(thing, ("x", 0), 2)
    assert type(new) is THING
    assert (new.args, new.state, thing.state) == (("a",), {"x": [2]}, {"x": [1]})


def test_replacing_where_there_is_no_place_is_refused() -> None:
    with pytest.raises(UnsupportedError):
        replaced({"a": 5}, ("a", "b"), 1)


def test_replacing_deep_down_needs_no_stack() -> None:
    deep: Any = "old"
    for _ in range(1_900):
        deep = [deep]
    new = replaced(deep, (0,) * 1_900, "new")
    for _ in range(1_900):
        new = new[0]
    assert new == "new"


def test_replacing_in_one_of_several_layers_of_state_keeps_the_others() -> None:
    thing = made(state=({"a": 1}, {"b": 2}, [3]))
    assert replaced(thing, ("b",), 9).state == ({"a": 1}, {"b": 9}, [3])


def test_int_and_str_keys_are_two_keys() -> None:
    assert replaced({1: "int", "1": "str"}, ("1",), "new") == {1: "int", "1": "new"}


def test_another_mapping_in_a_dict_subclass_keeps_its_kind() -> None:
    python2 = Global.named("collections", "OrderedDict")([["x", 1]])
    new = python2.with_mapping({"y": 2}, None)
    assert as_mapping(new) == {"y": 2}
    default = Global.named("collections", "defaultdict")(THING)
    default["x"] = 1
    new = default.with_mapping({"y": 2}, None)
    assert (new.args, as_mapping(new)) == ((THING,), {"y": 2})
