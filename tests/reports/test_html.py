"""`--html`: what is in the file, and where it may be written. What a browser makes of it: `test_html_browser`."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import CANARY, FIXTURES, Run, Saved

import ckptool
from ckptool.core.tree import Global
from ckptool.reports import html
from ckptool.reports.html import data

NASTY = [
    "</script><script>document.title='owned'</script>.weight",
    "<img src=x onerror=document.title='owned'>",
    "<!--<script>.bias",
    "]]>&amp;<b>bold</b>",
    "a\u202egpj.exe",
    "half \ud83d of a pair",
    "@data@.@script@",
    "line\u2028separator\x00\x1b[31m",
]
"""Keys that would be something else where they are not only text."""


class Parts(HTMLParser):
    """The elements of a page: (tag, attributes, text) each."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[list[Any]] = []
        self.inside = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append([tag, dict(attrs), ""])
        self.inside = True

    def handle_data(self, data: str) -> None:
        if self.found and self.inside:
            self.found[-1][2] += data

    def handle_endtag(self, tag: str) -> None:
        self.inside = False

    def texts(self, tag: str, **attributes: str) -> list[str]:
        return [one[2] for one in self.found if one[0] == tag and attributes.items() <= one[1].items()]


def document(page: Path) -> Any:
    """What a page holds."""
    [text] = Parts(page.read_text("utf-8")).texts("script", id="data")
    return json.loads(text)


def listed(table: Any) -> list[dict[str, Any]]:
    """The objects that a page holds by columns."""
    rows: list[dict[str, Any]] = [{} for _ in range(table["length"])]
    for name, column in table["columns"].items():
        values = listed(column["table"]) if "table" in column else column.get("values")
        at = column.get("at", range(len(rows)))
        if values is None:
            values = [column["of"][place] for place in column.get("as", [0] * len(at))]
        for number, value in zip(at, values, strict=True):
            rows[number][name] = value
    return rows


def rows(page: Path) -> list[dict[str, Any]]:
    """The rows of a page with their keys."""
    held = document(page)
    paths: list[str | None] = []
    for one in listed(held["modules"]):
        around = paths[one["in"]] if paths else None
        paths.append((one["name"] if around is None else f"{around}.{one['name']}") if paths else None)
    found = []
    for row in listed(held["rows"]):
        path, name = paths[row.pop("in")], row.pop("name")
        found.append({"key": name if path is None else f"{path}.{name}", **row})
    return found


def sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


@pytest.mark.parametrize("extra", [[], ["--stats", "--hash", "--check"], ["--include", "layer1.*", "--sort", "nbytes"]])
def test_the_page_of_inspect_holds_what_json_prints(extra: list[str], run: Run, tmp_path: Path) -> None:
    file = FIXTURES / "resnet_nested.pth"
    assert run("inspect", file, *extra, "--html", tmp_path / "page.html")[0] == 0
    found = document(tmp_path / "page.html")
    printed = json.loads(run("inspect", file, *extra, "--json")[1])
    [result] = printed["result"]
    assert rows(tmp_path / "page.html") == result["tensors"] + result.pop("inside")
    assert found["result"] == result | {"tensors": len(result["tensors"])}
    assert (found["command"], found["paths"], found["version"]) == ("inspect", [str(file)], ckptool.__version__)
    assert [node["name"] for node in found["tree"]] == [one["path"] for one in result["beside"]]


@pytest.mark.parametrize("extra", [[], ["--values"], ["--quick"], ["--ignore", "layer*"]])
@pytest.mark.parametrize("pair", [("resnet_new", "resnet_old"), ("resnet_122", "resnet_old"), ("tied", "resnet_new")])
def test_the_page_of_diff_holds_a_row_of_each_key_with_what_json_prints_of_it(
    pair: tuple[str, str], extra: list[str], run: Run, tmp_path: Path
) -> None:
    a, b = (FIXTURES / f"{name}.pth" for name in pair)
    assert run("diff", a, b, *extra, "--html", tmp_path / "page.html")[0] in (0, 1)
    held = document(tmp_path / "page.html")
    printed = json.loads(run("diff", a, b, *extra, "--json")[1])
    result = printed["result"]
    assert held["notes"] == printed["notes"]
    assert held["headline"] == run("diff", a, b, *extra)[1].splitlines()[0]
    found = {row["key"]: row for row in rows(tmp_path / "page.html")}
    sides = []
    for path in (a, b):
        content = json.loads(run("inspect", path, "--json")[1])["result"][0]["tensors"]
        sides.append({one["key"]: one for one in content if not ("--ignore" in extra and one["key"][:5] == "layer")})
    assert list(found) == [*sides[0], *(key for key in sides[1] if key not in sides[0])]
    status = dict.fromkeys(found, "equal")
    status |= {one["key"]: {"differ": "values"}.get(one["status"], one["status"]) for one in result["values"]}
    for kind in ("dtype", "shape"):
        status |= {one["key"]: kind for one in result[kind]}
    for kind in ("only_in_a", "only_in_b", "bookkeeping"):
        status |= dict.fromkeys(result[kind], kind.replace("_", "-"))
    assert {key: row["status"] for key, row in found.items()} == status
    for one in result["values"]:
        row = found[one["key"]]
        assert {name: row[name] for name in one if name not in ("key", "status")}.items() <= one.items()
    for row in found.values():
        side = sides[row["status"] != "shape" and row["key"] not in sides[0]][row["key"]]
        assert (row["shape"], row["nbytes"]) == (side["shape"], side["nbytes"])


def test_columns_hold_whatever_rows_hold() -> None:
    some: list[dict[str, Any]] = [
        {"a": 1, "shape": [2, 3], "s": {"x": 1.5, "h": {"c": [1, 2]}}}, {"a": 1, "shape": [2, 3], "b": None},
        {"a": 1, "shape": None, "s": {"x": None}}, {"a": 1, "shape": [], "b": ""}, {"a": 1, "shape": [2, 3], "b": 0},
    ]  # fmt: skip
    for rows_of in (some, [], some[:1], [{}, {}], [{"w": number} for number in range(50)]):
        assert listed(json.loads(json.dumps(data.columns(rows_of)))) == rows_of


KEYS = ["", ".", "..", ".x", "a", "a.", "a..b", "a.b", "x.", "layers.0.w", "layers.1..w", " . "]
"""Keys of which some segments are empty, and modules that have the names of tensors."""


def test_every_key_comes_back_from_the_modules_of_a_page(saved: Saved, run: Run, tmp_path: Path) -> None:
    path = saved({key: torch.ones(number + 1) for number, key in enumerate(KEYS)}, "a.pth")
    assert run("inspect", path, "--html", tmp_path / "page.html")[0] == 0
    assert {row["key"]: row["shape"] for row in rows(tmp_path / "page.html")} == {
        key: [number + 1] for number, key in enumerate(KEYS)
    }


def test_scripts_and_styles_are_named_by_their_hashes_and_all_else_is_forbidden(run: Run, tmp_path: Path) -> None:
    run("inspect", FIXTURES / "tied.pth", "--html", tmp_path / "page.html")
    page = Parts((tmp_path / "page.html").read_text("utf-8"))
    [policy] = [found["content"] for _, found, _ in page.found if found.get("http-equiv") == "Content-Security-Policy"]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    [script] = [one[2] for one in page.found if one[0] == "script" and "type" not in one[1]]
    [style] = page.texts("style")
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
    assert rules["script-src"] == f"'sha256-{sha256(script)}'"
    assert rules["style-src"] == f"'sha256-{sha256(style)}'"
    assert rules["require-trusted-types-for"] == "'script'"
    assert "http" not in script.replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"url\(|@import", style)
    outside = {"src", "href", "srcset", "action", "style", *(f"on{name}" for name in ("click", "load", "error"))}
    assert [found for _, found, _ in page.found if outside & found.keys()] == [{"class": "skip", "href": "#table"}]


def test_the_script_makes_no_element_from_text() -> None:
    folder = Path(html.__file__).parent
    script = "".join((folder / f"{name}.js").read_text() for name in html.SCRIPTS)
    assert sorted(path.stem for path in folder.glob("*.js")) == sorted(html.SCRIPTS)
    sinks = (
        "innerHTML outerHTML insertAdjacentHTML document.write eval( Function( DOMParser fetch( "
        "createContextualFragment XMLHttpRequest import( WebSocket sendBeacon"
    )
    for sink in sinks.split():
        assert sink not in script
    assert sum(path.stat().st_size for path in folder.glob("page.*")) < 40_000
    assert len(script) < 64_000


def test_keys_and_values_with_markup_are_text_of_the_data_only(saved: Saved, run: Run, tmp_path: Path) -> None:
    weights = {key: torch.ones(2) for key in NASTY}
    path = saved({"state_dict": weights, NASTY[0]: NASTY, "args": {NASTY[1]: NASTY[0]}}, "<b>&amp;.pth")
    assert run("inspect", path, "--stats", "--html", tmp_path / "page.html")[0] == 0
    page = Parts((tmp_path / "page.html").read_text("utf-8"))
    plain = run("inspect", FIXTURES / "tied.pth", "--html", tmp_path / "plain.html")
    assert plain[0] == 0
    tags = [one[0] for one in page.found]
    assert tags == [one[0] for one in Parts((tmp_path / "plain.html").read_text("utf-8")).found]
    assert page.texts("title")[0] == "<b>&amp;.pth"
    assert [row["key"] for row in rows(tmp_path / "page.html")] == NASTY


def test_a_page_is_never_written_onto_an_input_or_what_is_there(
    saved: Saved, run: Run, refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    a, b = saved({"w": torch.ones(2)}, "a.pth"), saved({"v": torch.zeros(2)}, "b.pth")
    page = tmp_path / "page.html"
    page.write_text("mine")
    for command in (["inspect", a], ["diff", a, b]):
        assert "exists" in refused(*command, "--html", page)
        assert "is one of the inputs" in refused(*command, "--html", a, "--force")
        assert "is a directory" in refused(*command, "--html", tmp_path)
        assert "no such directory" in refused(*command, "--html", tmp_path / "none" / "page.html")
        assert "--force goes with --html" in refused(*command, "--force")
        assert run(*command, "--html", page, "--force")[0] == (command[0] == "diff")
        assert document(page)["command"] == command[0]
    assert "is one of the inputs" in refused("diff", a, b, "--html", b, "--force")
    assert "of one checkpoint" in refused("inspect", a, b, "--html", "new.html")
    assert "two outputs" in refused("inspect", a, "--html", "new", "--lock", "new")
    run("inspect", a, "--schema", "schema.toml")
    assert "--html does not go with a schema" in refused("diff", "schema.toml", a, "--html", "new.html")


def test_what_the_terminal_shows_and_the_exit_code_are_those_without_a_page(run: Run, tmp_path: Path) -> None:
    file = FIXTURES / "malicious.pt"
    plain = run("inspect", file, "--check")
    assert run("inspect", file, "--check", "--html", tmp_path / "page.html") == plain
    assert plain[0] == 1
    assert document(tmp_path / "page.html")["result"]["check"]["findings"][0]["kind"] == "acting"
    assert not Path(CANARY).exists()


@pytest.mark.parametrize("name", sorted(path.name for path in FIXTURES.iterdir() if path.suffix[:3] in (".pt", ".pk")))
def test_every_fixture_has_a_page(name: str, run: Run, tmp_path: Path) -> None:
    code, _, err = run("inspect", FIXTURES / name, "--html", tmp_path / "page.html")
    assert code == 0, err
    assert document(tmp_path / "page.html")["result"]["path"] == str(FIXTURES / name)


def test_the_tree_beside_the_weights_is_bounded() -> None:
    deep: Any = 1
    for _ in range(300):
        deep = [deep]
    circle: list[Any] = [1]
    circle.append(circle)
    shared: list[Any] = [[0] * 100]
    for _ in range(20):
        shared = [shared] * 100
    thing = Global.named("pkg", "Thing")()
    values = {"deep": deep, "circle": circle, "shared": shared, "wide": list(range(10**6)), "text": "x" * 10**6,
              "thing": thing, "none": {}}  # fmt: skip
    found = html.outline(((name,), None, value) for name, value in values.items())
    text = json.dumps(found)
    assert len(text) < 600_000
    by_name = {node["name"]: node for node in found}
    assert len(by_name["text"]["text"]) == html.TEXT
    assert len(by_name["wide"]["children"]) == html.WIDTH + 1
    assert by_name["circle"]["children"][0] == {"name": "0", "text": "1"}
    assert text.count("not shown") > 0
    assert (by_name["thing"]["text"], by_name["none"]["text"]) == ("<pkg.Thing object, not imported>", "{}")


def test_the_page_is_imported_only_where_one_is_written(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("ckptool.reports.html")]:
        monkeypatch.delitem(sys.modules, name)
    run("inspect", FIXTURES / "tied.pth")
    run("diff", FIXTURES / "tied.pth", FIXTURES / "tied.pth")
    assert "ckptool.reports.html" not in sys.modules
