"""Planned changes: which differences a file allows, how each form says so, and files that are wrong."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
import torch
from oracles import Run

import ckptool
from ckptool.ops.diff import KINDS
from ckptool.references import allowed

Saved = Callable[..., Path]
SARIF = Path(__file__).parents[1] / "reports" / "sarif-2.1.0.json"


@pytest.fixture
def planned(tmp_path: Path) -> Callable[..., Path]:
    """Writes entries as TOML and returns the path."""

    def write(*entries: dict[str, str], name: str = "planned.toml") -> Path:
        tables = ["\n".join(["[[allow]]", *(f"{name} = {json.dumps(text)}" for name, text in one.items())])
                  for one in entries]  # fmt: skip
        (tmp_path / name).write_text("\n".join(tables))
        return tmp_path / name

    return write


def model(classes: int = 6, **more: Any) -> dict[str, Any]:
    head = {"head.weight": torch.ones(classes, 3), "head.bias": torch.ones(classes)}
    return {"stem.weight": torch.ones(3, 2), **head, **more}


HEAD = [
    {"kind": "shape", "key": "head.weight", "a": "6x3", "b": "2x3", "reason": "two classes instead of six"},
    {"kind": "shape", "key": "re:^head[.]bias$"},
]


def test_allowed_differences_are_shown_and_do_not_fail(saved: Saved, planned: Callable[..., Path], run: Run) -> None:
    a, b = saved(model(), "a.pth"), saved(model(2), "b.pth")
    assert run("diff", a, b)[0] == 1
    code, out, err = run("diff", a, b, "--allow", planned(*HEAD))
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        "differ as allowed: 2 shapes; 1 equal (values not compared, --values does)",
        "  allowed  shape  head.weight  6x3 -> 2x3  (two classes instead of six)",
        "  allowed  shape  head.bias    6 -> 2",
    ]


def test_what_is_not_planned_still_fails(saved: Saved, planned: Callable[..., Path], run: Run) -> None:
    a, b = saved(model(), "a.pth"), saved(model(2, extra=torch.ones(1)), "b.pth")
    code, out, _ = run("diff", a, b, "--allow", planned(*HEAD))
    assert code == 1
    assert out.startswith("differ: 2 shapes, 1 only in B, 2 of them allowed; 1 equal")
    assert "  only in B  extra  1  float32" in out.splitlines()
    report = ckptool.diff(a, b, allow=planned(*HEAD))
    assert (report.fails, report.same) == (["only-in-b"], False)


def test_a_change_to_another_shape_than_planned_fails_and_the_entry_is_unused(
    saved: Saved, planned: Callable[..., Path], run: Run
) -> None:
    a, b = saved(model(), "a.pth"), saved(model(5), "b.pth")
    code, out, _ = run("diff", a, b, "--allow", planned(*HEAD))
    assert code == 1
    assert "  shape  head.weight  6x3 -> 5x3" in out.splitlines()
    assert "  note  entry 1 of --allow is unused: shape head.weight 6x3 -> 2x3" in out.splitlines()


@pytest.mark.parametrize(
    ("kind", "other", "entry"),
    [
        ("dtype", {"stem.weight": torch.ones(3, 2).half()}, {"a": "float32", "b": "float16"}),
        ("values", {"stem.weight": torch.zeros(3, 2)}, {}),
        ("only-in-b", {"stem.bias": torch.ones(3)}, {"b": "3"}),
        ("only-in-b", {"stem.bias": torch.ones(3)}, {"b": "float32"}),
        ("only-in-b", {"stem.bias": torch.ones(3)}, {"b": "3  float32"}),
        ("bookkeeping", {"stem.num_batches_tracked": torch.tensor(1)}, {}),
        ("ties", {"tied.weight": "head.weight"}, {}),
    ],
)
def test_each_kind_can_be_allowed(
    kind: str, other: dict[str, Any], entry: dict[str, str], saved: Saved, planned: Callable[..., Path], run: Run
) -> None:
    changed = model()
    changed |= {key: changed[value] if isinstance(value, str) else value for key, value in other.items()}
    a, b = saved(model(), "a.pth"), saved(changed, "b.pth")
    (key,) = other
    failing = ["--values", "--fail-on", kind]
    assert run("diff", a, b, *failing)[0] == 1
    for pattern in (key, key[:3] + "*", f"re:{key[:4]}"):
        given = ["--allow", planned({"kind": kind, "key": pattern, "reason": "so it was meant", **entry})]
        code, out, _ = run("diff", a, b, *failing, *given, "--json")
        document = json.loads(out)
        assert (code, document["notes"]) == (0, [])
        assert document["result"]["allowed"] == [{"kind": kind, "key": key, "reason": "so it was meant", "entry": 1}]
        assert [line.split()[0] for line in run("diff", a, b, *failing, *given)[1].splitlines()[1:]] == ["allowed"]
    wrong = planned({"kind": "devices" if kind == "dtype" else "dtype", "key": key})
    assert run("diff", a, b, *failing, "--allow", wrong)[0] == 1


def test_every_difference_that_counts_can_be_named(saved: Saved) -> None:
    tied = torch.ones(2)
    one = {"a": torch.ones(1), "s": torch.ones(2), "d": torch.ones(1), "v": torch.ones(1), "t": tied, "u": tied,
           "old": torch.arange(9.0), "n.num_batches_tracked": torch.tensor(1)}  # fmt: skip
    other = {"b": torch.ones(1), "new": torch.arange(9.0), "s": torch.ones(3), "d": torch.ones(1).half(),
             "v": torch.zeros(1), "t": tied}  # fmt: skip
    report = ckptool.diff(saved(one, "a.pth"), saved(other, "b.pth"), values=True, fail_on=KINDS)
    counts = Counter(kind for kind, *_ in allowed.differences(report))
    assert {kind: counts[kind] for kind in KINDS} == report.found()
    assert set(report.fails) == set(KINDS) - {"devices", "uncompared"}


def test_keys_are_named_as_ignore_takes_them(saved: Saved, planned: Callable[..., Path], run: Run) -> None:
    a = saved({f"module.net.{key}": value for key, value in model().items()}, "a.pth")
    b = saved({f"module.net.{key}": value for key, value in model(2).items()}, "b.pth")
    for pattern, more in (
        ("module.net.head.*", []), ("net.head.*", []),
        ("head.*", ["--strip-prefix-a", "net.", "--strip-prefix-b", "net."]),
    ):  # fmt: skip
        assert run("diff", a, b, *more, "--ignore", pattern)[0] == 0
        assert run("diff", a, b, *more, "--allow", planned({"kind": "shape", "key": pattern}))[0] == 0
    assert run("diff", a, b, "--allow", planned({"kind": "shape", "key": "head.*"}))[0] == 1


def test_alike_keys_fold_only_if_they_have_one_reason(
    saved: Saved, planned: Callable[..., Path], run: Run, folding: None
) -> None:
    one, other = ({f"{n}.w": torch.ones(size) for n in range(4)} for size in (2, 3))
    a, b = saved(one, "a.pth"), saved(other, "b.pth")
    entries = [{"kind": "shape", "key": f"[{some}].w", "reason": why} for some, why in (("01", "x"), ("23", "y"))]
    assert run("diff", a, b, "--allow", planned(*entries))[1].splitlines()[1:] == [
        "  allowed  shape  {0,1}.w  2 -> 3  (x)  (2 keys)",
        "  allowed  shape  {2,3}.w  2 -> 3  (y)  (2 keys)",
    ]


def test_an_unused_entry_is_named_with_the_pattern_that_is_meant(
    saved: Saved, planned: Callable[..., Path], run: Run
) -> None:
    a, b = saved(model(), "a.pth"), saved(model(2), "b.pth")
    code, out, _ = run("diff", a, b, "--allow", planned({"kind": "shape", "key": "haed.*"}), "--json")
    assert code == 1
    assert json.loads(out)["notes"] == ["entry 1 of --allow is unused: shape haed.* (did you mean head.*?)"]
    assert json.loads(out)["result"]["allowed"] == []


def test_of_several_files_an_entry_is_unused_if_none_of_them_uses_it(
    saved: Saved, planned: Callable[..., Path], run: Run
) -> None:
    a, b, c = saved(model(), "a.pth"), saved(model(2), "b.pth"), saved(model(extra=torch.ones(1)), "c.pth")
    file = planned(*HEAD, {"kind": "only-in-b", "key": "extra"}, {"kind": "dtype", "key": "*"})
    code, out, _ = run("diff", a, b, c, "--allow", file, "--json")
    document = json.loads(out)
    assert code == 0
    assert document["notes"] == [f"{path}: entry 4 of --allow is unused: dtype *" for path in (b, c)]
    assert [[row["entry"] for row in one["allowed"]] for one in document["result"]] == [[1, 2], [3]]
    assert run("diff", a, b, c, saved(model(3), "d.pth"), "--allow", file)[0] == 1


def test_github_and_markdown_say_that_a_difference_is_allowed(
    saved: Saved, planned: Callable[..., Path], run: Run
) -> None:
    given = ["diff", saved(model(), "a.pth"), saved(model(2), "b.pth"), "--allow", planned(*HEAD), "--format"]
    code, out, _ = run(*given, "github")
    assert code == 0
    assert [line.split(" ")[0] for line in out.splitlines()] == ["::notice"] * 3
    assert out.splitlines()[1].endswith("::head.weight: 6x3 -> 2x3 (allowed: two classes instead of six)")
    assert out.splitlines()[2].endswith("::head.bias: 6 -> 2 (allowed)")
    out = run(*given, "markdown")[1]
    assert out.startswith("**ckptool diff: passed**")
    assert "| shape | `head.weight` | 6x3 -> 2x3 (allowed: two classes instead of six) |" in out


def test_junit_skips_a_case_that_is_allowed(saved: Saved, planned: Callable[..., Path], run: Run) -> None:
    from xml.etree import ElementTree

    given = ["diff", saved(model(), "a.pth"), saved(model(2), "b.pth"), "--allow", planned(*HEAD), "--format"]
    code, out, _ = run(*given, "junit")
    (suite,) = ElementTree.fromstring(out)
    assert (code, suite.get("failures"), suite.get("skipped")) == (0, "0", "2")
    assert [case.get("message") for case in suite.iter("skipped")] == ["two classes instead of six", "allowed"]


def test_sarif_suppresses_what_is_allowed_and_says_of_all_others_that_it_is_not(
    saved: Saved, planned: Callable[..., Path], run: Run
) -> None:
    a, b = saved(model(), "a.pth"), saved(model(2, extra=torch.ones(1)), "b.pth")
    document = json.loads(run("diff", a, b, "--allow", planned(*HEAD), "--format", "sarif")[1])
    jsonschema_rs.validator_for(json.loads(SARIF.read_text())).validate(document)
    assert [(one["level"], one["suppressions"]) for one in document["runs"][0]["results"]] == [
        ("error", []),
        ("note", [{"kind": "external", "justification": "two classes instead of six"}]),
        ("note", [{"kind": "external"}]),
    ]
    document = json.loads(run("diff", a, b, "--format", "sarif")[1])
    assert all("suppressions" not in one for one in document["runs"][0]["results"])


def test_names_and_reasons_do_not_break_a_form(saved: Saved, planned: Callable[..., Path], run: Run) -> None:
    reason = "a\n::error::owned | `b` <x> \x1b[31m"
    a, b = saved(model(), "a.pth"), saved(model(2), "b.pth")
    file = planned({"kind": "shape", "key": "*", "reason": reason})
    assert len(run("diff", a, b, "--allow", file)[1].splitlines()) == 3
    out = run("diff", a, b, "--allow", file, "--format", "github")[1]
    assert [line[:9] for line in out.splitlines()] == ["::notice "] * 3
    assert "\x1b" not in out + run("diff", a, b, "--allow", file)[1]


def test_the_library_takes_a_file_or_its_table(saved: Saved, planned: Callable[..., Path]) -> None:
    a, b = saved(model(), "a.pth"), saved(model(2), "b.pth")
    for given in (planned(*HEAD), str(planned(*HEAD)), {"allow": HEAD}):
        report = ckptool.diff(a, b, allow=given)
        assert (report.fails, [row.key for row in report.allowed]) == ([], ["head.weight", "head.bias"])
    assert ckptool.diff(a, b, allow={}).fails == ["shape"]
    with pytest.raises(ckptool.FormatError, match="allow 1: key: expected a text, found none"):
        ckptool.diff(a, b, allow={"allow": [{"kind": "shape"}]})


BAD = [
    ('[[allow]]\nkind = "shap"\nkey = "*"', "allow 1: kind takes ", "not 'shap' (did you mean shape?)"),
    ('[[allow]]\nkind = "shape"', "allow 1: key: expected a text, found none", ""),
    ('[[allow]]\nkey = "*"', "allow 1: kind: expected a text, found none", ""),
    ('[[allow]]\nkind = "shape"\nkey = "*"\nreson = ""', "found 'reson' (did you mean reason?)", ""),
    ('[[allow]]\nkind = "shape"\nkey = "*"\n[[allow]]\nkind = "shape"\nkey = 3', "allow 2: key: expected a text", ""),
    ('[[allow]]\nkind = "shape"\nkey = "*"\na = [1, 2]', "allow 1: a: expected a text, found ", ""),
    ('[[allow]]\nkind = "only-in-a"\nkey = "*"\nb = "1"', "allow 1: b: expected none, as only-in-a prints", ""),
    ('[[allow]]\nkind = "shape"\nkey = "re:("', "the pattern 're:(' is no regular expression", ""),
    ('[allow]\nkind = "shape"', "allow: expected [[allow]], found ", ""),
    ("allow = [1]", "allow 1: expected a table, [[allow]]", ""),
    ("[[alow]]", "the top: expected allow, found 'alow' (did you mean allow?)", ""),
    ("[[allow", "is no list of planned changes: not TOML: ", ""),
    ('{"allow": []}', "is no list of planned changes: not TOML: ", ""),
    ("a = " + "[" * 5000, "is no list of planned changes: not TOML: ", ""),
]


@pytest.mark.parametrize(("text", "begin", "end"), BAD, ids=range(len(BAD)))
def test_a_file_that_is_wrong_is_one_line(
    text: str, begin: str, end: str, saved: Saved, tmp_path: Path, refused: Callable[..., str]
) -> None:
    (tmp_path / "bad.toml").write_text(text)
    line = refused("diff", saved(model()), saved(model(), "b.pth"), "b.pth", "--allow", tmp_path / "bad.toml")
    assert f"{tmp_path / 'bad.toml'}: " in line
    assert begin in line
    assert end in line


def test_files_that_cannot_be_read_are_refused(
    saved: Saved, planned: Callable[..., Path], tmp_path: Path, refused: Callable[..., str]
) -> None:
    a = saved(model())
    assert "absent.toml: no such file" in refused("diff", a, a, "--allow", tmp_path / "absent.toml")
    assert "is a directory" in refused("diff", a, a, "--allow", tmp_path)
    (tmp_path / "bad.toml").write_bytes(b"\xff\xfe")
    assert "bad.toml: is no list of planned changes: not TOML" in refused(
        "diff", a, a, "--allow", tmp_path / "bad.toml"
    )
    large = refused("diff", a, a, "--allow", planned(*HEAD), "--limit", "MAX_INDEX=10")
    assert "a list of planned changes of " in large
    assert "over MAX_INDEX, 10" in large


def test_a_schema_has_no_planned_changes(
    saved: Saved, planned: Callable[..., Path], tmp_path: Path, refused: Callable[..., str]
) -> None:
    (tmp_path / "schema.toml").write_text("schema = 1\nunlisted = true\n")
    line = refused("diff", tmp_path / "schema.toml", saved(model()), "--allow", planned(*HEAD))
    assert "--allow does not go with a schema" in line
