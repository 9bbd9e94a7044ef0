from __future__ import annotations

import inspect

import pytest

from ckptool import errors
from ckptool.errors import CkptoolError, FormatError, LimitError, UsageError, listed, needs_torch

EVERY = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, CkptoolError)]


def test_the_drawn_tree_is_the_tree() -> None:
    drawn = {}
    for line in (errors.__doc__ or "").splitlines():
        words = line.split()
        if len(words) >= 3 and words[0].endswith("Error") and words[1].isdigit():
            drawn[words[0]] = (len(line) - len(line.lstrip()), int(words[1]), words[2])
    assert {kind.__name__: (kind.exit_code, kind.slug) for kind in EVERY} == {
        name: (code, slug) for name, (_, code, slug) in drawn.items()
    }
    parent: dict[int, str] = {}
    for name, (indent, _, _) in drawn.items():
        parent[indent] = name
        if indent > 4:
            assert getattr(errors, name).__base__.__name__ == parent[indent - 2]


def test_every_kind_has_a_slug_of_its_own() -> None:
    slugs = [kind.slug for kind in EVERY]
    assert len(set(slugs)) == len(slugs)


def test_no_error_can_be_mistaken_for_an_answer() -> None:
    assert all(kind.exit_code == 2 for kind in EVERY)


@pytest.mark.parametrize("kind", EVERY)
def test_an_error_names_its_file_first(kind: type[CkptoolError]) -> None:
    assert str(kind("is cut off", "a.pth")) == "a.pth: is cut off"
    assert str(kind("is cut off")) == "is cut off"


def test_a_limit_is_a_damaged_file_and_usage_is_not() -> None:
    assert issubclass(LimitError, FormatError)
    assert not issubclass(UsageError, FormatError)


def test_long_lists_are_counted_and_short_ones_are_whole() -> None:
    assert listed(["a", "b"]) == "a, b"
    assert listed(range(8)) == "0, 1, 2, 3, 4, 5, 6, 7"
    assert listed(range(12), 3) == "0, 1, 2 and 9 more"


def test_a_missing_torch_says_what_needs_it_and_how_to_get_it() -> None:
    said = str(needs_torch("casting"))
    assert said.startswith("casting needs torch")
    assert "pip install" in said
