"""One report in each form, read back by a reader of that form that is not ckptool."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import jsonschema_rs
import pytest
import torch
from markdown_it import MarkdownIt
from oracles import FIXTURES

import ckptool
from ckptool.reports import FORMS

Run = Callable[..., tuple[int, str, str]]
Saved = Callable[..., Path]

NEW, OLD, FULL = (str(FIXTURES / name) for name in ("resnet_new.pth", "resnet_old.pth", "resnet_122.pth"))
OTHERS = ("github", "junit", "markdown", "sarif")
SCHEMA = jsonschema_rs.validator_for(json.loads((Path(__file__).parent / "sarif-2.1.0.json").read_text()))
"""OASIS' schema, without its descriptions and white space: 35 kB instead of 113."""

HOSTILE = [
    "a|b", "a`b", "``", "`", " pad ", "  ", "", "\\|", "a\n::error::owned", "%0A::error::owned", "x,y:z", "]]>",
    "<script>alert(1)</script>", "[link](http://example.com)", "@everyone #1", "\x1b[31mred", "\0", "\ud800",
    "{0}", "</details>", "**bold**", "重み", "\u202eabc", "a\r\nb", "&amp;", "-->", "![x](y)", "www.example.com",
]  # fmt: skip


# --- readers ---------------------------------------------------------------------------------------------------------


def annotations(text: str) -> list[tuple[str, dict[str, str], str]]:
    """Every line as the runner of GitHub Actions reads it (ActionCommand.TryParseV2): (command, properties, data)."""
    found = []
    for line in text.splitlines():
        match = re.fullmatch(r"::(error|warning|notice) ([^:]*)::(.*)", line)
        assert match, line
        pairs = (pair.partition("=") for pair in match[2].split(","))
        found.append((match[1], {name: unescaped(value, True) for name, _, value in pairs}, unescaped(match[3])))
    return found


def unescaped(text: str, prop: bool = False) -> str:
    for code, char in [("%3A", ":"), ("%2C", ",")] * prop + [("%0D", "\r"), ("%0A", "\n"), ("%25", "%")]:
        text = text.replace(code, char)
    return text


def suites(text: str) -> list[ElementTree.Element]:
    """The test suites of a JUnit document, after it was held against the XSD of Jenkins' xUnit plugin (junit-10)."""
    root = ElementTree.fromstring(text.encode())
    attributes = {
        "testsuites": ({"tests", "failures", "errors"}, {"name", "time"}),
        "testsuite": ({"name", "tests", "failures", "errors"}, {"time", "skipped", "timestamp", "id", "package"}),
        "testcase": ({"name"}, {"classname", "time"}), "failure": (set(), {"type", "message"}),
        "error": (set(), {"type", "message"}), "skipped": (set(), {"type", "message"}), "system-out": (set(), set()),
    }  # fmt: skip
    inside = {
        "testsuites": {"testsuite"}, "testsuite": {"testcase", "system-out"},
        "testcase": {"failure", "error", "skipped", "system-out"},
    }  # fmt: skip
    for element in root.iter():
        needed, known = attributes[element.tag]
        assert needed <= set(element.attrib) <= needed | known, element.tag
        assert {child.tag for child in element} <= inside.get(element.tag, set())
    for level in (root, *root):
        cases = level.findall(".//testcase")
        said = [len(cases), *(sum(case.find(tag) is not None for case in cases) for tag in ("failure", "error"))]
        assert [int(level.get(name, "")) for name in ("tests", "failures", "errors")] == said
    return list(root)


def sarif(text: str) -> dict[str, Any]:
    document = json.loads(text)
    SCHEMA.validate(document)
    (run,) = document["runs"]
    ids = [rule["id"] for rule in run["tool"]["driver"]["rules"]]
    assert len(set(ids)) == len(ids)
    assert {result["ruleId"] for result in run["results"]} == set(ids)
    return dict(run)


def tokens(text: str) -> list[Any]:
    return MarkdownIt("commonmark", {"html": True}).enable("table").parse(text)


def spans(text: str) -> list[str]:
    """What a Markdown reader shows in code spans."""
    return [part.content for token in tokens(text) for part in token.children or () if part.type == "code_inline"]


def rows(text: str) -> int:
    return sum(token.type == "tr_open" for token in tokens(text)) - sum(
        token.type == "table_open" for token in tokens(text)
    )


# --- each form -------------------------------------------------------------------------------------------------------


def test_github_gets_the_verdict_first_and_a_line_for_each_group(run: Run) -> None:
    code, out, err = run("diff", NEW, OLD, "--format", "github")
    assert (code, err) == (1, "")
    found = annotations(out)
    assert [(level, properties["title"]) for level, properties, _ in found] == [
        ("error", "ckptool diff"), ("error", "ckptool diff: shape"), ("error", "ckptool diff: shape"),
        ("notice", "ckptool diff: bookkeeping"),
    ]  # fmt: skip
    assert all(properties["file"] == OLD for _, properties, _ in found)
    assert found[0][2].endswith("differ: 2 shapes; 100 equal (values not compared, --values does)")
    assert found[1][2] == "fc.weight: 6x16 -> 20x16"


def test_what_does_not_fail_is_a_warning_and_the_verdict_a_notice(run: Run) -> None:
    code, out, _ = run("diff", NEW, OLD, "--fail-on", "dtype", "--format", "github")
    assert code == 0
    assert [level for level, _, _ in annotations(out)] == ["notice", "warning", "warning", "notice"]
    code, out, _ = run("diff", NEW, OLD, "--fail-on", "bookkeeping", "--format", "junit")
    assert code == 1
    (suite,) = suites(out)
    assert [case.get("name") for case in suite.iter("testcase") if case.find("failure") is not None] == ["bookkeeping"]


def test_junit_has_a_case_for_each_folded_key(run: Run, saved: Saved) -> None:
    stack = {f"{number}.w": torch.ones(4) for number in range(3)}
    a, b = saved({"x": torch.ones(1), **stack}, "a.pth"), saved({"x": torch.ones(1)}, "b.pth")
    code, out, _ = run("diff", a, b, "--format", "junit")
    ((case, _),) = suites(out)
    assert code == 1
    assert case.get("name") == "only-in-a: {0..2}.w"
    assert case[0].text == "{0..2}.w: 4  float32  (3 keys)"
    (same,) = suites(run("diff", FULL, FULL, "--format", "junit")[1])
    assert [len(case) for case in same.findall("testcase")] == [0]  # one case, which passed


def test_sarif_has_a_result_for_each_folded_key(run: Run) -> None:
    code, out, _ = run("diff", NEW, OLD, "--format", "sarif")
    found = sarif(out)
    assert code == 1
    assert [(result["ruleId"], result["level"]) for result in found["results"]] == [
        ("diff/shape", "error"), ("diff/shape", "error"), ("diff/bookkeeping", "note")
    ]  # fmt: skip
    (place,) = found["results"][0]["locations"]
    assert place["physicalLocation"]["artifactLocation"]["uri"] == Path(OLD).as_uri()
    assert place["logicalLocations"][0]["fullyQualifiedName"] == "fc.weight"
    assert found["invocations"][0]["executionSuccessful"] is True


def test_markdown_begins_with_the_verdict_and_folds_what_is_long(run: Run, saved: Saved) -> None:
    names = [f"{letter}.w" for letter in "abcdefghijklmno"]
    a, b = saved({name: torch.ones(2) for name in names}, "a.pth"), saved({"a.w": torch.ones(2)}, "b.pth")
    code, out, _ = run("diff", a, b, "--format", "markdown")
    assert code == 1
    assert out.startswith("**ckptool diff: failed**")
    assert rows(out) == 14
    assert "<details><summary>4 more</summary>" in out
    assert out.index("`k.w`") < out.index("<details>") < out.index("`l.w`")


def test_a_comment_stays_below_what_github_takes_and_says_what_it_lacks(run: Run, saved: Saved) -> None:
    long = {f"{chr(97 + number % 26) * 50}_{'x' * number}.w": torch.ones(1) for number in range(600)}
    code, out, _ = run("diff", saved(long, "a.pth"), saved({"w": torch.ones(1)}, "b.pth"), "--format", "markdown")
    assert code == 1
    assert len(out) < 65_536
    missing = re.search(r"^([\d,]+) more lines do not fit into a comment; --format json has all\.$", out, re.MULTILINE)
    assert missing
    assert rows(out) + int(missing[1]) == 601


@pytest.mark.parametrize("key", HOSTILE)
def test_no_key_can_break_out_of_a_form(key: str, run: Run, saved: Saved) -> None:
    a, b = saved({"w": torch.ones(1), key: torch.ones(2)}, "a.pth"), saved({"w": torch.ones(1)}, "b.pth")
    safe = key if key.isprintable() else "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in key
    )  # fmt: skip
    texts = {form: run("diff", a, b, "--format", form)[1] for form in OTHERS}
    assert [data for _, _, data in annotations(texts["github"])][1] == ": ".join(filter(None, (safe, "2  float32")))
    (suite,) = suites(texts["junit"])
    assert suite[0].get("name") == (f"only-in-a: {safe}" if safe else "only-in-a")
    (result,) = sarif(texts["sarif"])["results"]
    logical = result["locations"][0].get("logicalLocations", [{"fullyQualifiedName": ""}])
    assert logical[0]["fullyQualifiedName"] == safe
    if safe.strip():
        assert safe in spans(texts["markdown"])
    kinds = {part.type for token in tokens(texts["markdown"]) for part in token.children or ()}
    assert kinds <= {"text", "code_inline", "strong_open", "strong_close", "softbreak"}
    assert rows(texts["markdown"]) == 1


def test_a_key_that_is_a_file_of_lines_is_one_line_for_github(run: Run, saved: Saved) -> None:
    keys = {f"layer.{number}\n::set-output name=x::y": torch.ones(1) for number in range(3)}
    out = run(
        "diff", saved({**keys, "w": torch.ones(1)}, "a.pth"), saved({"w": torch.ones(1)}, "b.pth"), "--format=github"
    )[1]
    assert [data.endswith("(3 keys)") for _, _, data in annotations(out)] == [False, True]


# --- each command ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", OTHERS)
def test_gates_of_filter_and_load_partial_come_in_each_form(form: str, run: Run) -> None:
    for args in (
        ["filter", OLD, "--match", NEW, "--strict", "-o", "out.pth"],
        ["load-partial", OLD, "--into", NEW, "--strict", "-o", "out.pth"],
        ["filter", OLD, "--match", NEW, "--require", "fc.*", "--dry-run"],
        ["load-partial", OLD, "--into", NEW, "--require", "fc.*", "--dry-run"],
    ):
        code, out, _ = run(*args, "--format", form)
        assert code == 1
        assert not Path("out.pth").exists()
        assert failed_keys(form, out) == {"", "fc.weight", "fc.bias"}
        assert (
            run(
                *[arg for arg in args if arg not in ("--strict", "--require", "fc.*", "-o", "out.pth")],
                "--dry-run",
                "--format",
                form,
            )[0]
            == 0
        )


def failed_keys(form: str, text: str) -> set[str]:
    """The keys that failed, "" for what is of no key."""
    if form == "github":
        return {
            data.split(": ")[0] if "mismatched" in at["title"] else ""
            for level, at, data in annotations(text)
            if level == "error"
        }
    if form == "junit":
        (suite,) = suites(text)
        return {case.get("name", "").partition(": ")[2] for case in suite if case.find("failure") is not None}
    if form == "sarif":
        results = [result for result in sarif(text)["results"] if result["level"] == "error"]
        return {
            result["locations"][0].get("logicalLocations", [{"fullyQualifiedName": ""}])[0]["fullyQualifiedName"]
            for result in results
        }
    return {key.strip("`") for key in re.findall(r"^\| \*\*\S+\*\* \| (\S*) \|", text, re.MULTILINE)}


@pytest.mark.parametrize("form", OTHERS)
def test_check_comes_in_each_form_and_several_files_are_several_parts(form: str, run: Run, saved: Saved) -> None:
    bad = saved({"w": torch.tensor([1.0, float("nan")])}, "bad.pth")
    code, out, _ = run("inspect", bad, OLD, "--check", "--format", form)
    assert code == 1
    if form == "junit":
        assert [suite.get("failures") for suite in suites(out)] == ["1", "0"]
    if form == "markdown":
        assert out.startswith("**ckptool inspect: 1 failed, 1 passed**\n")
    if form == "sarif":
        (result,) = sarif(out)["results"]
        assert result["ruleId"] == "inspect/nan"
        assert result["message"]["text"] == "w: 1 of 2 are NaN"


def test_inspect_without_check_has_no_verdict_to_annotate_but_a_table(refused: Callable[..., str], run: Run) -> None:
    code, out, _ = run("inspect", OLD, "--format", "markdown")
    assert code == 0
    assert "| float32 | `conv1.weight` | 2x3x7x7 |" in out
    for form in ("github", "sarif", "junit"):
        code, out, err = run("inspect", OLD, "--format", form)
        assert code == 2
        assert err == f"ckptool: error: --format {form} shows what --check finds: it goes with --check\n"
        assert out  # the error, in that form


@pytest.mark.parametrize("form", OTHERS)
def test_an_error_comes_in_the_form_that_was_asked_for(form: str, run: Run) -> None:
    for args in (
        ["diff", "absent.pth", OLD],
        ["inspect", "absent.pth", "--check"],
        ["filter", "absent.pth", "--dry-run"],
    ):
        code, out, err = run(*args, f"--format={form}")
        assert code == 2
        assert err == "ckptool: error: absent.pth: no such file or directory\n"
        if form == "github":
            ((level, properties, data),) = annotations(out)
            assert (level, properties["file"], data) == (
                "error",
                "absent.pth",
                "absent.pth: error: no such file or directory",
            )
        elif form == "junit":
            (suite,) = suites(out)
            assert [case.find("error").get("type") for case in suite.findall("testcase")] == ["unreadable"]
        elif form == "sarif":
            (invocation,) = sarif(out)["invocations"]
            assert invocation["executionSuccessful"] is False
            assert invocation["toolExecutionNotifications"][0]["level"] == "error"
        else:
            assert out.startswith(f"**ckptool {args[0]}: error** `absent.pth`\n")


def test_json_is_a_form_and_an_unknown_one_is_refused(run: Run) -> None:
    assert run("diff", NEW, OLD, "--format", "json") == run("diff", NEW, OLD, "--json")
    assert run("diff", NEW, OLD, "--format", "text") == run("diff", NEW, OLD)
    code, out, err = run("diff", NEW, OLD, "--format", "junti")
    assert (code, out) == (2, "")
    assert "--format takes text, json, github, junit, sarif, markdown; not 'junti' (did you mean junit?)" in err
    code, out, err = run("diff", NEW, OLD, "--format", "junit", "--json")
    assert code == 2
    assert "--json and --format junit contradict each other" in err


def test_a_schema_is_judged_in_each_form(run: Run) -> None:
    Path("s.toml").write_text('schema = 1\nunlisted = true\n[keys]\n"fc.weight" = { shape = [7, 16] }\n"extra" = {}\n')
    for form in OTHERS:
        code, out, _ = run("diff", "s.toml", NEW, "--format", form)
        assert code == 1
        if form == "junit":
            (suite,) = suites(out)
            assert [case.get("name") for case in suite.findall("testcase")] == ["shape: fc.weight", "missing: extra"]
    assert annotations(run("diff", "s.toml", NEW, "--format", "github")[1])[0][1]["file"] == NEW


# --- many at once ----------------------------------------------------------------------------------------------------


def test_many_files_are_compared_with_one_and_an_unreadable_one_does_not_stop_the_others(run: Run) -> None:
    code, out, err = run("diff", FULL, OLD, "absent.pth", NEW)
    assert (code, err) == (2, "ckptool: error: absent.pth: no such file or directory\n")
    lines = out.splitlines()
    assert lines[0] == f"3 files compared with {FULL}"
    assert [line.split()[0] for line in lines[1:4]] == ["same", "error", "differ"]
    assert lines[5] == OLD
    assert "  shape  fc.weight  20x16 -> 6x16" in lines
    assert run("diff", FULL, OLD, NEW)[0] == 1
    assert run("diff", FULL, OLD, FULL)[0] == 0
    assert run("diff", FULL, OLD, FULL, "--fail-on", "bookkeeping")[0] == 1


def test_the_json_of_many_is_a_list_of_what_two_files_have(run: Run) -> None:
    many = json.loads(run("diff", FULL, OLD, "absent.pth", NEW, "--json")[1])
    alone = [json.loads(run("diff", FULL, path, "--json")[1]) for path in (OLD, NEW)]
    assert many["result"] == [one["result"] for one in alone]
    assert len(many["notes"]) == sum(len(one["notes"]) for one in alone)
    assert [one["b"] for one in many["result"]] == [OLD, NEW]
    assert [error["path"] for error in many["errors"]] == ["absent.pth"]


@pytest.mark.parametrize("form", OTHERS)
def test_many_files_come_in_each_form(form: str, run: Run) -> None:
    code, out, _ = run("diff", FULL, OLD, "absent.pth", NEW, "--format", form)
    assert code == 2
    if form == "github":
        assert [level for level, _, _ in annotations(out)][:3] == ["notice", "error", "error"]
    elif form == "junit":
        assert [(suite.get("failures"), suite.get("errors")) for suite in suites(out)] == [
            ("0", "0"),
            ("0", "1"),
            ("2", "0"),
        ]
    elif form == "sarif":
        assert sarif(out)["invocations"][0]["executionSuccessful"] is False
    else:
        assert out.startswith("**ckptool diff: 1 error, 1 failed, 1 passed**\n")


# --- the library -----------------------------------------------------------------------------------------------------


def test_the_library_renders_its_reports_as_the_command_line_does(run: Run) -> None:
    report = ckptool.diff(NEW, OLD)
    for form in (*OTHERS, "json"):
        assert ckptool.render(report, form) == run("diff", NEW, OLD, "--format", form)[1]
    assert (
        ckptool.render(ckptool.inspect(OLD, check=True), "junit")
        == run("inspect", OLD, "--check", "--format", "junit")[1]
    )
    assert ckptool.render(ckptool.filter(OLD, match=NEW)[1], "github").startswith("::notice ")
    with pytest.raises(ckptool.UsageError, match="is no report that has an outcome"):
        ckptool.render(3, "junit")
    with pytest.raises(ckptool.UsageError, match="not 'pdf'"):
        ckptool.render(report, "pdf")
    assert [form for form in FORMS if form not in (*OTHERS, "json")] == ["text"]


def test_fail_on_of_the_library_decides_what_fails() -> None:
    assert ckptool.diff(NEW, OLD).fails == ["shape"]
    assert ckptool.diff(NEW, OLD, fail_on=["dtype"]).fails == []
    assert ckptool.diff(NEW, OLD, fail_on="bookkeeping").fails == ["bookkeeping"]
    with pytest.raises(ckptool.UsageError, match="did you mean shape"):
        ckptool.diff(NEW, OLD, fail_on=["shap"])
