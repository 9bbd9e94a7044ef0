from __future__ import annotations

import itertools
import random
import re
from fnmatch import fnmatchcase

import pytest

from ckptool.core import keys
from ckptool.errors import CollisionError, UsageError

# --- counters and wrappers -------------------------------------------------------------------------------------------


def test_a_counter_is_known_by_its_last_segment_only() -> None:
    assert keys.is_counter("layer1.0.bn1.num_batches_tracked")
    assert keys.is_counter("num_batches_tracked")
    assert not keys.is_counter("num_batches_tracked.weight")
    assert not keys.is_counter("bn.old_num_batches_tracked")


def test_wrappers_go_in_any_order_repeated_and_at_any_depth() -> None:
    for front in itertools.permutations(["module", "_orig_mod", "_fsdp_wrapped_module"]):
        assert keys.unwrapped(".".join([*front, "a", "_checkpoint_wrapped_module", "w"])) == "a.w"
    assert keys.unwrapped("module.module._orig_mod._orig_mod.w") == "w"
    assert keys.unwrapped("a._orig_mod.b._fsdp_wrapped_module._checkpoint_wrapped_module.w") == "a.b.w"


@pytest.mark.parametrize("key", ["modules.w", "my_module.w", "module", "_orig_mod", "a._orig_modx.w", "w", ""])
def test_what_only_looks_like_a_wrapper_stays(key: str) -> None:
    assert keys.unwrapped(key) == key


def test_module_inside_a_name_is_looked_through_where_both_sides_stay_unique() -> None:
    inner, plain = ["module.a.module.w", "module.b"], ["a.w", "b"]
    assert list(map(keys.looking_through(inner, plain), inner)) == plain
    assert list(map(keys.looking_through(inner, [*plain, "a.module.w"]), inner)) == ["a.module.w", "b"]
    assert list(map(keys.looking_through(inner, ["w", "module.w"]), inner)) == inner


def test_wrappers_that_would_make_two_keys_one_are_left_alone_altogether() -> None:
    listed = ["module.w", "w", "module.b"]
    assert keys.unwrap_all(listed) == {key: key for key in listed}
    assert keys.unwrap_all(["module.w", "module.b"]) == {"w": "module.w", "b": "module.b"}


def test_the_wrapper_that_keys_carry_is_named_in_the_order_it_stands() -> None:
    assert keys.wrapper_of(["module._orig_mod.w", "module._orig_mod.b"]) == "module._orig_mod."
    assert keys.wrapper_of(["a._checkpoint_wrapped_module.w"]) == "_checkpoint_wrapped_module."
    assert keys.wrapper_of(["encoder.module.w", "w"]) == "module."
    assert keys.wrapper_of(["encoder.module.w", "encoder.w"]) == ""


# --- prefixes --------------------------------------------------------------------------------------------------------


def test_a_common_prefix_is_made_of_whole_segments() -> None:
    assert keys.common_prefix(["model.a.w", "model.b.w"]) == "model."
    assert keys.common_prefix(["model.layer1.w", "model.layer10.w"]) == "model."
    assert keys.common_prefix(["model1.w", "model2.w"]) == ""
    assert keys.common_prefix(["a.b.c.w", "a.b.c.x", "a.b.d"]) == "a.b."
    assert keys.common_prefix(["a.w", "a"]) == ""
    assert keys.common_prefix(["model.w"]) == ""
    assert keys.common_prefix([]) == ""


def test_a_prefix_is_replaced_only_where_it_stands_in_front() -> None:
    assert keys.renamed(["module.a.w", "b.module.w"], ["module."], None, "") == {
        "a.w": "module.a.w", "b.module.w": "b.module.w"
    }  # fmt: skip
    assert keys.renamed(["module.w"], ["module."], "net.", "") == {"net.w": "module.w"}
    assert keys.renamed(["w"], [], "net.", "") == {"net.w": "w"}
    assert keys.renamed(["w"], [], None, "") == {"w": "w"}


def test_prefixes_are_stripped_in_turn_seen_through_wrappers_and_never_leave_an_empty_name() -> None:
    for order in (["module.", "model."], ["model.", "module."]):
        for key in ("module.model.w", "model.module.w"):
            (name,) = keys.renamed([key], order, None, "")
            assert keys.unwrapped(name) == "w"
    assert keys.renamed(["a.b.a.w", "v"], ["a.", "b.", "a."], None, "") == {"w": "a.b.a.w", "v": "v"}
    with pytest.raises(UsageError, match=r"no key begins with 'b\.'"):
        keys.renamed(["a.w"], ["a.", "b."], None, "")
    with pytest.raises(CollisionError, match=r"a\.w would be '\.w': an empty name"):
        keys.renamed(["a.w"], ["a"], None, "")
    with pytest.raises(CollisionError, match=r"a\.w and w would both be w"):
        keys.renamed(["a.w", "w"], ["a."], None, "")


BASE = [f"layer{i}.{j}.{name}" for i in range(4) for j in range(2) for name in ("conv.weight", "bn.weight", "bn.bias")]


@pytest.mark.parametrize(
    ("theirs", "ours"), [("", "backbone."), ("encoder.", ""), ("student.model.", "net.backbone."), ("", "")]
)
def test_the_likeliest_prefix_is_the_one_that_makes_all_keys_match(theirs: str, ours: str) -> None:
    sources = [theirs + key for key in BASE] + [theirs + "head.old"]
    targets = [ours + key for key in BASE] + [ours + "fc.new"]
    assert keys.likely_prefixes(sources, targets)[0] == (theirs, ours)


def test_no_prefix_is_guessed_where_no_suffix_is_common() -> None:
    assert keys.likely_prefixes(["a.w", "a.b"], ["x.scale", "x.shift"]) == []
    assert keys.likely_prefixes([], ["x"]) == []
    assert keys.likely_prefixes([f"a{n}.w" for n in range(9)], [f"b{n}.w" for n in range(9)]) == []


# --- patterns --------------------------------------------------------------------------------------------------------


def test_a_glob_means_the_whole_name_as_fnmatch_has_it() -> None:
    names = ["layer1.0.conv.weight", "layer1", "layer10.0.w", "fc.weight", "FC.weight", "a[0].w", "line\nbreak.w"]
    patterns = ["layer1.*", "layer?", "*", "fc.*", "*.weight", "layer[12].*", "a[[]0].w", "", "line*"]
    for pattern, name in itertools.product(patterns, names):
        assert keys.matches(pattern, name) == fnmatchcase(name, pattern), (pattern, name)


def test_a_regular_expression_fits_anywhere() -> None:
    assert keys.matches(r"re:\.bn\d\.", "layer1.0.bn1.weight")
    assert keys.matches("re:^fc", "fc.weight")
    assert not keys.matches("re:^weight", "fc.weight")


def test_a_broken_regular_expression_is_refused_before_any_key_is_looked_at() -> None:
    with pytest.raises(UsageError, match="regular expression"):
        keys.chooser(["re:("], [])
    with pytest.raises(UsageError, match="regular expression"):
        keys.chooser([], ["re:["])


def test_include_widens_exclude_wins_and_no_include_means_all() -> None:
    listed = ["a.w", "a.b", "b.w"]

    def chosen(include: list[str], exclude: list[str]) -> list[str]:
        return [key for key in listed if keys.chooser(include, exclude)(key)]

    assert chosen([], []) == listed
    assert chosen(["a.*", "b.*"], ["*.b"]) == ["a.w", "b.w"]
    assert chosen(["a.*"], ["a.*"]) == []


def test_patterns_that_fit_nothing_are_listed() -> None:
    assert keys.unused_patterns(["a.*", "c.*", "re:^b", "re:^z"], iter(["a.w", "b.w"])) == ["c.*", "re:^z"]


# --- folding ---------------------------------------------------------------------------------------------------------


def test_number_ranges_read_as_people_write_them() -> None:
    assert keys.number_ranges([3, 1, 2, 0]) == "{0..3}"
    assert keys.number_ranges([0, 1]) == "{0,1}"
    assert keys.number_ranges([0, 2, 4]) == "{0,2,4}"
    assert keys.number_ranges([5, 5]) == "5"
    assert keys.number_ranges([0, 1, 2, 9, 11, 12]) == "{0..2,9,11,12}"


def expanded(folded: str) -> list[str]:
    """Brace expansion, by the rules of a shell."""
    pieces = []
    for part in re.split(r"(\{[\w.,]+\})", folded):
        if not part.startswith("{"):
            pieces.append([part])
            continue
        if not part[1].isdigit():
            pieces.append(part[1:-1].split(","))
            continue
        numbers: list[str] = []
        for run in part[1:-1].split(","):
            first, _, last = run.partition("..")
            numbers += [str(number) for number in range(int(first), int(last or first) + 1)]
        pieces.append(numbers)
    return ["".join(choice) for choice in itertools.product(*pieces)]


@pytest.mark.parametrize("seed", range(20))
def test_a_folded_name_expands_to_exactly_the_keys_it_stands_for(seed: int) -> None:
    rng = random.Random(seed)
    everything = [
        f"{top}{i}.{j}.{name}"
        for top in ("layer", "stage") for i in range(12) for j in range(4) for name in ("w", "b", "norm2.w")
    ] + ["fc", "pos", "007.w", "a01.w", "v2"]  # fmt: skip
    chosen = rng.sample(everything, rng.randint(1, len(everything)))
    rows = [(key, rng.choice(["64", "128"])) for key in chosen]
    folded = keys.fold(rows)
    seen: list[int] = []
    for name, members in folded:
        assert sorted(expanded(name)) == sorted(rows[member][0] for member in members)
        assert len({rows[member][1] for member in members}) == 1
        seen += members
    assert sorted(seen) == list(range(len(rows)))
    assert [members[0] for _, members in folded] == sorted(members[0] for _, members in folded)


def test_a_whole_grid_folds_into_one_line_and_a_torn_one_by_its_last_number() -> None:
    grid = [(f"l.{i}.{j}.w", 0) for i in range(3) for j in range(2)]
    assert [name for name, _ in keys.fold(grid)] == ["l.{0..2}.{0,1}.w"]
    assert [name for name, _ in keys.fold(grid[:-1])] == ["l.0.{0,1}.w", "l.1.{0,1}.w", "l.2.0.w"]


def test_numbers_with_leading_zeros_never_fold() -> None:
    assert [name for name, _ in keys.fold([("a.01", 0), ("a.02", 0)])] == ["a.01", "a.02"]


def test_the_same_key_twice_is_two_rows_or_one_and_no_crash() -> None:
    folded = keys.fold([("head.weight", "1"), ("head.weight", "1")])
    assert sorted(member for _, members in folded for member in members) == [0, 1]
