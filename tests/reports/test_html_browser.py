"""`--html` in headless Chromium: what the page does, by mouse and by keyboard, and what it never does."""

from __future__ import annotations

import contextlib
import io
import json
import math
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
import torch
from oracles import FIXTURES
from test_html import KEYS, NASTY
from test_html import rows as rows_of

from ckptool.cli import main
from tests.browser import MISSING, Browser, browser

pytestmark = pytest.mark.skipif(MISSING is not None, reason=MISSING or "")

Pages = dict[str, Path]


def network(layers: int = 3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.02

    made = {"embed.weight": drawn(50, 8)}
    for number in range(layers):
        for name, shape in (("attn.q", (8, 8)), ("attn.out", (8, 8)), ("mlp.up", (32, 8))):
            made[f"h.{number}.{name}.weight"] = drawn(*shape)
            made[f"h.{number}.{name}.bias"] = torch.zeros(shape[0])
        made[f"h.{number}.norm.weight"] = torch.ones(8)
    return made | {"head.weight": made["embed.weight"]}


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Pages:
    """{name: page} of some checkpoints and pairs of them."""
    folder = tmp_path_factory.mktemp("pages")
    first = network()
    second = {key: tensor.clone() for key, tensor in first.items()}
    second["h.2.mlp.up.weight"] *= 1.5
    second["h.1.attn.q.weight"] += 1e-4
    second["h.0.attn.q.bias"][0] = math.nan
    second["h.2.mlp.up.bias"][0] = 0.5
    second["embed.weight"] = torch.zeros(60, 8)
    second["extra.weight"] = second.pop("h.0.norm.weight")
    strange = network()
    strange["h.1.mlp.up.weight"][0, 0], strange["h.0.mlp.up.weight"][0, 0] = 9.0, math.nan
    files = {
        "a": {"model": first, "optimizer": {"lr": 0.1, "betas": [0.9, 0.95]}, "epoch": 3}, "b": {"model": second},
        "strange": strange, "nasty": {"state_dict": dict.fromkeys(NASTY, torch.ones(3)), "x": {NASTY[1]: NASTY[0]}},
    }  # fmt: skip
    for name, content in files.items():
        torch.save(content, folder / f"{name}.pth")
    jobs = {
        "plain": ["inspect", "a.pth"], "stats": ["inspect", "strange.pth", "--stats", "--check", "--hash"],
        "nasty": ["inspect", "nasty.pth", "--stats", "--check"], "diff": ["diff", "a.pth", "b.pth"],
        "values": ["diff", "a.pth", "b.pth", "--values"],
    }  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        for name, words in jobs.items():
            files_of = [str(folder / word) if word.endswith(".pth") else word for word in words]
            assert main([*files_of, "--html", str(folder / f"{name}.html")]) in (0, 1)
    return {name: folder / f"{name}.html" for name in jobs}


@pytest.fixture(scope="module")
def session() -> Iterator[Browser]:
    with browser() as made:
        yield made


@pytest.fixture
def chromium(session: Browser) -> Iterator[Browser]:
    """The browser; fails if the page wrote to the console, broke its policy, or asked for anything but itself."""
    session.size(1200, 900)
    session.requests()
    yield session
    assert [entry["message"] for entry in session.log("browser")] == []
    assert {url.split("?")[0].rpartition(".")[2] for url in session.requests()} <= {"html"}


def keys(chromium: Browser) -> list[str]:
    return chromium.texts(".tensors tbody th .key")


def tiles(chromium: Browser) -> list[str]:
    return chromium.texts(".map > button > .name")


def crumbs(chromium: Browser) -> list[str]:
    return chromium.texts("nav li")


def fragment(chromium: Browser) -> str:
    text: str = chromium.run("return location.hash")
    return text


@pytest.mark.parametrize("name", ["plain", "stats", "nasty", "diff", "values"])
def test_a_page_is_drawn_and_fits_its_window(name: str, chromium: Browser, pages: Pages) -> None:
    for width in (400, 1440):
        chromium.size(width, 900, dark=width == 400)
        if name in ("nasty", "values") or width == 400:  # the others are made wider
            chromium.open(pages[name])
        assert tiles(chromium)
        assert keys(chromium)
        assert chromium.run("return document.documentElement.scrollWidth") <= width
        assert chromium.run("return [...document.querySelectorAll('.map > button')].every((tile) => tile.ariaLabel)")


def test_colours_follow_the_system_and_can_be_turned(chromium: Browser, pages: Pages) -> None:
    ground = "return getComputedStyle(document.body).backgroundColor"
    found = []
    for dark in (False, True):
        chromium.size(1200, 900, dark)
        chromium.open(pages["plain"])
        found.append(chromium.run(ground))
    assert found[0] != found[1]
    chromium.click("#theme")
    assert chromium.run(ground) == found[0]


def test_search_filters_the_table_and_says_how_many_are_left(chromium: Browser, pages: Pages) -> None:
    chromium.open(pages["plain"])
    everything = keys(chromium)
    assert len(everything) == len(network())
    for typed, wanted in {
        "norm": [key for key in everything if "norm" in key],
        "ATTN bias": [key for key in everything if "attn" in key and "bias" in key],
        "h.*.weight": [key for key in everything if key.startswith("h.") and key.endswith(".weight")],
        "h.?.norm.weight": [key for key in everything if "norm" in key],
        "32x8": [key for key in everything if key.endswith("mlp.up.weight")],
        "[nothing] (": [],
    }.items():
        chromium.run("const box = document.getElementById('search'); box.value = ''; box.focus()")
        chromium.press(typed)
        assert keys(chromium) == wanted
        assert chromium.texts("#status") == [f"{len(wanted)} of {len(everything)} tensors"]
    assert "No tensor matches" in chromium.texts(".tensors")[0]
    chromium.press("Escape")
    assert keys(chromium) == everything


def test_columns_sort_down_up_and_not_at_all(chromium: Browser, pages: Pages) -> None:
    chromium.open(pages["plain"])
    before = keys(chromium)
    sizes = {key: tensor.numel() for key, tensor in network().items()}
    chromium.click("thead button", "Parameters")
    falling = keys(chromium)
    assert [sizes[key] for key in falling] == sorted(sizes.values(), reverse=True)
    assert chromium.run("return document.querySelector('[aria-sort]').ariaSort") == "descending"
    chromium.click("thead button", "Parameters")
    assert [sizes[key] for key in keys(chromium)] == sorted(sizes.values())
    chromium.click("thead button", "Parameters")
    assert keys(chromium) == before
    chromium.click("thead button", "Key")
    assert keys(chromium) == sorted(before)
    chromium.open(pages["stats"])
    chromium.click("thead button", "NaN, inf")
    assert keys(chromium)[0] == "h.0.mlp.up.weight"


def test_a_module_is_entered_by_a_click_and_left_by_its_crumbs_and_by_going_back(
    chromium: Browser, pages: Pages
) -> None:
    chromium.open(pages["plain"])
    top = tiles(chromium)
    chromium.click(".map > button > .name", "h")
    assert crumbs(chromium) == ["all", "h"]
    assert sorted(tiles(chromium)) == ["0", "1", "2"]
    assert {key[:2] for key in keys(chromium)} == {"h."}
    chromium.click(".list button", "1.")
    assert crumbs(chromium) == ["all", "h", "1"]
    assert {key[:4] for key in keys(chromium)} == {"h.1."}
    chromium.click("nav button", "h")
    assert crumbs(chromium) == ["all", "h"]
    chromium.run("history.back()")
    time.sleep(0.2)
    assert crumbs(chromium) == ["all", "h", "1"]
    chromium.click("nav button", "all")
    assert tiles(chromium) == top


def test_the_table_beside_the_map_says_the_same_as_the_map(chromium: Browser, pages: Pages) -> None:
    chromium.open(pages["plain"])
    names = [name.rstrip(".") for name in chromium.texts(".list tbody button")]
    assert set(tiles(chromium)) <= set(names)
    assert names == ["h", "embed", "head"]
    assert chromium.texts(".list tbody tr")[2] == "head.tied"
    sums = {name: sum(one.numel() for key, one in network().items() if key.split(".")[0] == name) for name in names}
    total = sums["h"] + sums["embed"]
    shares = chromium.texts(".list tbody td.share")
    assert shares[:2] == [f"{round(100 * sums[name] / total)} %" for name in names[:2]]
    chromium.run(
        "const one = document.getElementById('size'); one.value = 'nbytes'; one.dispatchEvent(new Event('change'))"
    )
    assert chromium.texts(".list thead th")[1] == "Bytes"


def test_a_fragment_brings_a_view_back(chromium: Browser, pages: Pages) -> None:
    chromium.open(pages["plain"])
    chromium.click(".map > button > .name", "h")
    chromium.run("document.getElementById('search').focus()")
    chromium.press("weight")
    chromium.click("thead button", "Bytes")
    chromium.click(".tensors tbody button", "h.1.mlp.up.weight")
    view = fragment(chromium)
    seen = keys(chromium), crumbs(chromium), chromium.texts(".detail h3")
    assert seen[1:] == (["all", "h"], ["h.1.mlp.up.weight"])
    chromium.open(pages["plain"], view)
    assert (keys(chromium), crumbs(chromium), chromium.texts(".detail h3")) == seen
    assert chromium.run("return document.getElementById('search').value") == "weight"
    assert chromium.run("return document.querySelector('[aria-sort]').textContent") == "Bytes"
    chromium.run("location.hash = '#m=h.2&colour=dtype'")
    time.sleep(0.2)
    assert crumbs(chromium) == ["all", "h", "2"]
    for broken in ("#m=nowhere&t=none&colour=x&sort=-x&size=7", "#%%%", "#m=" + "a." * 5000):
        chromium.open(pages["plain"], broken)
        assert crumbs(chromium) == ["all"]
        assert len(keys(chromium)) == len(network())


def test_the_keyboard_does_what_the_mouse_does(chromium: Browser, pages: Pages) -> None:
    chromium.open(pages["plain"])
    focus = "return document.activeElement.textContent"
    chromium.run("document.querySelector('.map > button').focus()")
    first = chromium.run(focus)
    chromium.press("ArrowRight")
    assert chromium.run(focus) != first
    chromium.press("ArrowLeft")
    assert chromium.run(focus) == first
    chromium.press("Enter")
    assert crumbs(chromium) == ["all", "h"]
    assert chromium.run("return document.activeElement.matches('.map > button')")
    chromium.press("Backspace")
    assert crumbs(chromium) == ["all"]
    chromium.press("/", "norm")
    assert len(keys(chromium)) == 3
    chromium.run("document.querySelector('.tensors tbody button').focus()")
    chromium.press("ArrowDown", "End", "Enter")
    assert chromium.texts(".detail h3") == ["h.2.norm.weight"]
    assert chromium.run(focus) == "h.2.norm.weight"
    chromium.press("Escape")
    assert chromium.texts(".detail h3") == []
    assert chromium.run("return document.querySelectorAll('.map > button[tabindex=\"0\"]').length") == 1


def test_what_a_screen_reader_is_told(chromium: Browser, pages: Pages) -> None:
    for name in ("stats", "values"):
        chromium.open(pages[name], "#t=h.1.attn.q.weight")
        nodes = chromium.command("Accessibility.getFullAXTree", {})["nodes"]
        named = [
            (node["role"]["value"], node.get("name", {}).get("value", "")) for node in nodes if not node["ignored"]
        ]
        for role in (
            "button",
            "link",
            "searchbox",
            "combobox",
            "columnheader",
            "rowheader",
            "region",
            "table",
            "group",
        ):
            some = [text for kind, text in named if kind == role]
            assert some, role
            assert all(some), role
        roles = [role for role, _ in named]
        assert {"banner", "main", "contentinfo", "navigation", "complementary", "status"} <= set(roles)
        assert roles.count("heading") >= 4
        if name == "stats":
            assert any(role == "image" and text.startswith("Histogram of 64 values") for role, text in named)
        cells = chromium.run("return [...document.querySelectorAll('.matrix td button')].map((one) => one.ariaLabel)")
        assert all(": " in cell for cell in cells)
        assert chromium.run("return document.querySelectorAll('.matrix button[tabindex=\"0\"]').length") == 1


CONTRAST = """
    const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
    const over = (colour, ground) => {
        for (const one of [`rgb(${ground})`, colour]) { canvas.fillStyle = one; canvas.fillRect(0, 0, 1, 1); }
        return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
    };
    const part = (byte) => (byte / 255 <= 0.03928 ? byte / 255 / 12.92 : ((byte / 255 + 0.055) / 1.055) ** 2.4);
    const light = ([red, green, blue]) => 0.2126 * part(red) + 0.7152 * part(green) + 0.0722 * part(blue) + 0.05;
    const walk = document.createTreeWalker(document.getElementById('main'), NodeFilter.SHOW_TEXT);
    const faint = [];
    while (walk.nextNode()) {
        const inside = walk.currentNode.parentElement;
        if (inside.closest('.unseen, option') || !inside.getClientRects().length) continue;
        const grounds = [];
        for (let at = inside; at; at = at.parentElement) grounds.unshift(getComputedStyle(at).backgroundColor);
        const ground = grounds.reduce((under, colour) => over(colour, under), [255, 255, 255]);
        const [one, other] = [light(over(getComputedStyle(inside).color, ground)), light(ground)];
        const ratio = Math.max(one, other) / Math.min(one, other);
        if (ratio < 4.5) faint.push(`${ratio.toFixed(2)} ${inside.className} ${walk.currentNode.textContent}`);
    }
    return faint;
"""
"""Texts whose contrast is below the 4.5 of WCAG 2 (AA)."""


@pytest.mark.parametrize(("name", "view"), [("values", "#t=h.0.attn.q.bias"), ("values", "#colour=status"),
                                            ("stats", "#colour=std"), ("plain", "#colour=dtype")])  # fmt: skip
def test_all_text_can_be_read_on_its_ground(name: str, view: str, chromium: Browser, pages: Pages) -> None:
    chromium.open(pages[name], view)
    grounds = set()
    for dark in (False, True):
        chromium.size(1200, 900, dark)
        assert chromium.run(CONTRAST) == []
        grounds.add(chromium.run("return getComputedStyle(document.body).backgroundColor"))
    assert len(grounds) == 2


def test_a_weight_that_is_tied_in_a_alone_has_its_place_in_the_map(chromium: Browser, tmp_path: Path) -> None:
    a = {"embed.w": torch.ones(20, 4), "h.w": torch.ones(40)}
    b = a | {"head.w": torch.ones(10, 4)}
    paths = saved_pair(tmp_path, a | {"head.w": a["embed.w"]}, b)
    chromium.open(written(tmp_path, "diff", *paths))
    assert sorted(tiles(chromium)) == ["embed", "h", "head"]


def test_what_stands_out_among_the_values_is_listed(chromium: Browser, pages: Pages) -> None:
    chromium.open(pages["stats"])
    lines = chromium.texts("#outliers li")
    assert lines[0].startswith("h.0.mlp.up.weight 1 NaN")
    assert lines[1].startswith("h.1.mlp.up.weight 9 is ")
    assert "standard deviations" in lines[1]
    assert any("all are 0; so are 8 more of this name" in line for line in lines)
    assert chromium.texts("#findings tbody tr") == ["nanh.0.mlp.up.weight1 of 256 are NaN"]
    chromium.click("#findings button", "h.0.mlp.up.weight")
    assert "NaN1" in chromium.texts(".detail dl")[0]
    assert chromium.run("return document.querySelectorAll('.detail svg path').length") == 1
    assert chromium.texts("#ties li") == ["embed.weight = head.weight"]


def test_the_tree_beside_the_weights_opens(chromium: Browser, pages: Pages) -> None:
    chromium.open(pages["plain"])
    assert [text.split(" ")[0] for text in chromium.texts("#beside > .tree > li")] == ["optimizer", "epoch"]
    chromium.click("#beside summary", "optimizer")
    time.sleep(0.1)
    assert any(text.startswith("betas ") for text in chromium.texts("#beside .tree .tree > li"))


def test_the_matrix_has_layers_by_kinds_and_leads_to_the_keys(chromium: Browser, pages: Pages) -> None:
    chromium.open(pages["values"])
    assert chromium.texts(".matrix tbody th") == ["embed", "h.0", "h.1", "h.2", "head", "extra"]
    said = chromium.run("return [...document.querySelectorAll('.matrix td button')].map((one) => one.ariaLabel)")
    by_cell = dict(one.split(": ") for one in said)
    assert by_cell["h.2 mlp.up.weight"] == "0.5"
    assert by_cell["h.0 attn.q.bias"] == "not finite"
    assert by_cell["h.2 mlp.up.bias"] == "A is zero"
    assert by_cell["h.2 "] == "0.5, the largest of 7"  # a bias that was zero has no relative change, and hides none
    assert by_cell["h.1 mlp.up.weight"] == "0"
    assert by_cell["embed weight"] == "shape differs"
    assert by_cell["extra weight"] == "only in B"
    chromium.click(".matrix tbody tr:nth-child(4) td:nth-child(2) button")
    assert {key[:4] for key in keys(chromium)} == {"h.2."}
    chromium.open(pages["values"])
    chromium.run("document.querySelector('.matrix [aria-label^=\"h.2 mlp.up.weight\"]').click()")
    assert keys(chromium) == ["h.2.mlp.up.weight"]


def test_a_difference_is_shown_by_kind_the_gravest_first(chromium: Browser, pages: Pages) -> None:
    chromium.open(pages["values"])
    rows = chromium.texts(".tensors tbody:not(.space) tr")
    assert rows[0].startswith("embed.weightshape differs")
    assert rows[1].startswith("h.0.norm.weightonly in A")
    assert rows[2].startswith("extra.weightonly in B")
    assert rows[3].startswith("h.0.attn.q.biasvalues differnot finite")
    assert rows[4].startswith("h.2.mlp.up.biasvalues differA is zero0.5")
    assert rows[5].startswith("h.2.mlp.up.weightvalues differ0.5")
    counts = dict(zip(chromium.texts(".figure .label"), chromium.texts(".figure .value"), strict=True))
    status = Counter(row["status"] for row in rows_of(pages["values"]))
    assert counts["Result"] == "differ"
    assert int(counts["equal"]) == status["equal"]
    assert int(counts["values differ"]) == status["values"]


def test_names_with_markup_are_text(chromium: Browser, pages: Pages) -> None:
    chromium.open(pages["nasty"])
    title = chromium.run("return document.title")
    assert title == "nasty.pth"
    assert chromium.run("return document.querySelectorAll('img, main b:not(.key), main script').length") == 0
    shown = "\n".join(keys(chromium))
    assert "<img src=x onerror=document.title='owned'>" in shown
    assert "\\u{202e}" in shown
    assert not {"\u202e", "\x1b", "\u2028"} & set(shown)
    for number in range(len(NASTY)):
        chromium.run("document.querySelectorAll('.tensors tbody button')[arguments[0]].click()", number)
        assert len(chromium.texts(".detail h3")) == 1
        view = fragment(chromium)
        chromium.open(pages["nasty"], view)
        assert len(chromium.texts(".detail h3")) == 1, view
    chromium.run("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    time.sleep(0.1)
    assert chromium.run("return document.title") == title
    assert chromium.run("return document.querySelectorAll('img, iframe, object').length") == 0


def test_a_long_name_leaves_the_matrix_in_sight_and_no_tensor_is_open_because_its_name_is_empty(
    chromium: Browser, tmp_path: Path
) -> None:
    shapes = {f"{'L' * 3000}.weight": 3, "short.weight": 3, "": 3}
    for name, extra in (("a", 0), ("b", 1)):
        torch.save({key: torch.ones(number + extra) for key, number in shapes.items()}, tmp_path / f"{name}.pth")
    page = tmp_path / "page.html"
    with contextlib.redirect_stdout(io.StringIO()):
        assert main(["diff", str(tmp_path / "a.pth"), str(tmp_path / "b.pth"), "--html", str(page)]) == 1
    for width in (400, 1440):
        chromium.size(width, 900)
        chromium.open(page)
        place = "return document.querySelector('.matrix td button').getBoundingClientRect().right"
        assert chromium.run(place) < width
    assert chromium.run("return document.querySelector('.matrix tbody th').title").startswith("LLL")
    assert "All modules" in chromium.run("return document.body.innerText")


def written(folder: Path, *words: Any) -> Path:
    """The page of a command."""
    page = folder / "page.html"
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        assert main([*map(str, words), "--html", str(page), "--force"]) in (0, 1)
    return page


def saved_pair(folder: Path, a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> list[Path]:
    paths = [folder / "a.pth", folder / "b.pth"]
    for path, content in zip(paths, (a, b), strict=True):
        torch.save(content, path)
    return paths


def test_a_key_with_empty_segments_opens_from_the_table_the_map_and_a_link(chromium: Browser, tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    torch.save({one: torch.ones(number + 2) for number, one in enumerate(KEYS)}, path)
    page = written(tmp_path, "inspect", path)
    chromium.open(page)
    views = {}
    for number, key in enumerate(KEYS):
        chromium.run("document.querySelectorAll('.tensors tbody th button')[arguments[0]].click()", number)
        assert chromium.texts(".detail h3") == [key or '""']
        assert f"Parameters{number + 2}" in chromium.texts(".detail dl")[0]
        views[key] = fragment(chromium)
    for key, view in views.items():
        chromium.open(page, view)
        assert chromium.texts(".detail h3") == chromium.texts(".tensors tr.selected th") == [key or '""']
    modules = {key: key.rpartition(".")[0] if "." in key else None for key in KEYS}
    for module in dict.fromkeys(modules.values()):
        chromium.open(page, "" if module is None else f"#{urlencode({'m': module})}")
        assert crumbs(chromium)[1:] or module is None
        titles = chromium.run("return [...document.querySelectorAll('.map > button')].map((one) => one.ariaLabel)")
        for shown in [key or '""' for key in KEYS if modules[key] == module]:
            [tile] = [number for number, title in enumerate(titles) if title.startswith(f"{shown}: tensor")]
            chromium.run("document.querySelectorAll('.map > button')[arguments[0]].click()", tile)
            assert chromium.texts(".detail h3") == [shown]


def test_a_module_without_a_name_is_entered_and_left(chromium: Browser, tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    torch.save({".x": torch.ones(3), ".y": torch.ones(2), "a.b": torch.ones(9), "": torch.ones(4)}, path)
    page = written(tmp_path, "inspect", path)
    chromium.open(page)
    chromium.click(".map > button > .name", '""')
    assert (crumbs(chromium), keys(chromium)) == (["all", '""'], [".x", ".y"])
    assert fragment(chromium) == "#m="
    chromium.open(page, "#m=")
    assert (crumbs(chromium), keys(chromium)) == (["all", '""'], [".x", ".y"])
    chromium.run("document.querySelector('.map > button').focus()")
    chromium.press("Backspace")
    assert (crumbs(chromium), len(keys(chromium))) == (["all"], 4)


ALLOWED = """
[[allow]]
kind = "shape"
key = "head.*"
reason = "ten classes"
[[allow]]
kind = "only-in-b"
key = "new.*"
[[allow]]
kind = "values"
key = "h.0.*"
reason = "<b>tuned</b>"
[[allow]]
kind = "dtype"
key = "both.w"
"""


@pytest.mark.parametrize("everything", [True, False])
def test_what_is_allowed_has_a_word_and_a_colour_of_its_own_and_the_verdict_of_the_text(
    everything: bool, chromium: Browser, tmp_path: Path
) -> None:
    a = {"h.0.w": torch.ones(4), "h.1.w": torch.ones(4), "head.w": torch.ones(5, 4), "both.w": torch.ones(3)}
    a["same.w"] = torch.ones(2)
    b = a | {"h.0.w": torch.ones(4) * 2, "head.w": torch.ones(6, 4), "new.w": torch.ones(2)}
    if not everything:
        b |= {"h.1.w": torch.ones(4) * 3, "both.w": torch.ones(3).half() * 2}
    paths = saved_pair(tmp_path, a, b)
    (tmp_path / "allowed.toml").write_text(ALLOWED)
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        code = main(["diff", *map(str, paths), "--values", "--allow", str(tmp_path / "allowed.toml"),
                     "--html", str(tmp_path / "page.html")])  # fmt: skip
    assert code == (not everything)
    chromium.open(tmp_path / "page.html")
    counts = dict(zip(chromium.texts(".figure .label"), chromium.texts(".figure .value"), strict=True))
    assert out.getvalue().startswith(f"{counts['Result']}: ")
    assert counts["Result"] == ("differ as allowed" if everything else "differ")
    assert counts["allowed"] == "3"
    badges = chromium.run("""return [...document.querySelectorAll('.tensors .badge')].map(
        (one) => [one.closest('tr').querySelector('th').textContent, one.textContent, one.className, one.title])""")
    of = {key: (text, name, title) for key, text, name, title in badges}
    assert of["head.w"] == ("shape differs, allowed", "badge is-allowed", "shape: ten classes")
    assert of["new.w"] == ("only in B, allowed", "badge is-allowed", "only-in-b")
    assert of["h.0.w"] == ("values differ, allowed", "badge is-allowed", "values: <b>tuned</b>")
    if not everything:
        assert of["h.1.w"] == ("values differ", "badge is-values", "")
        assert of["both.w"] == ("values differ", "badge is-values", "dtype")  # of two differences, one is allowed
        assert keys(chromium)[:2] == ["h.1.w", "both.w"]  # what is not allowed comes first
    choice = """const one = document.getElementById('grade');
        one.value = arguments[0]; one.dispatchEvent(new Event('change'))"""
    chromium.run(choice, "allowed")
    assert set(keys(chromium)) == {"head.w", "new.w", "h.0.w"}
    assert chromium.texts("#status") == [f"3 of {len(b)} tensors"]
    chromium.open(tmp_path / "page.html", fragment(chromium))
    assert set(keys(chromium)) == {"head.w", "new.w", "h.0.w"}
    chromium.run(choice, "")
    chromium.run("const box = document.getElementById('search'); box.focus()")
    chromium.press("allowed tuned")
    assert keys(chromium) == ["h.0.w"]
    chromium.click(".tensors tbody button", "h.0.w")
    assert "Allowedvalues: <b>tuned</b>" in chromium.texts(".detail dl")[0]
    ground = "return getComputedStyle(document.querySelector(`.stack .is-${arguments[0]}`)).backgroundColor"
    assert chromium.run(ground, "allowed") != chromium.run(ground, "equal")


def test_the_matrix_shows_the_layers_that_moved_most_in_the_order_of_the_model(
    chromium: Browser, tmp_path: Path
) -> None:
    a = {f"h.{number}.w": torch.ones(2) for number in range(400)}
    moved = {f"h.{number}.w": torch.ones(2) * (1 + 0.01 * number) for number in range(250, 400, 3)}
    lost = [f"h.{number}.w" for number in range(10, 15)]
    b = {key: moved.get(key, tensor) for key, tensor in a.items() if key not in lost}
    chromium.open(written(tmp_path, "diff", *saved_pair(tmp_path, a, b), "--values"))
    layers = chromium.texts(".matrix tbody th")
    assert len(layers) == 160
    wanted = {key.removesuffix(".w") for key in [*moved, *lost]}
    assert wanted < set(layers)
    assert layers == sorted(layers, key=lambda layer: int(layer[2:]))
    assert "160 of 400 layers are shown, those that moved most" in chromium.texts("#matrix .legend")[0]
    chromium.open(written(tmp_path, "diff", *saved_pair(tmp_path, a, b)))
    assert set(lost) < {f"{layer}.w" for layer in chromium.texts(".matrix tbody th")}
    assert "those that differ most" in chromium.texts("#matrix .legend")[0]


def test_the_matrix_shows_the_kinds_of_weight_that_moved_most(chromium: Browser, tmp_path: Path) -> None:
    names = [f"{chr(97 + number // 26)}{chr(97 + number % 26)}" for number in range(100)]
    a = {f"h.{layer}.{name}": torch.ones(2) for layer in range(2) for name in names}
    b = {key: tensor * (2 if key.endswith("du") else 1) for key, tensor in a.items()}
    chromium.open(written(tmp_path, "diff", *saved_pair(tmp_path, a, b), "--values"))
    kinds = chromium.texts(".matrix thead th")[1:]
    assert (len(kinds), kinds[-1], kinds[:2]) == (48, "du", ["aa", "ab"])
    assert "48 of 100 kinds of weight are shown" in chromium.texts("#matrix .legend")[0]
    assert "layers are shown" not in chromium.texts("#matrix .legend")[0]


def test_a_cell_of_one_key_opens_it_whatever_its_name(chromium: Browser, tmp_path: Path) -> None:
    names = ["", "a b.0.c d", "x..y", "*.0.?", "w"]
    a = {key: torch.ones(2) for key in names}
    page = written(tmp_path, "diff", *saved_pair(tmp_path, a, {key: tensor * 2 for key, tensor in a.items()}))
    chromium.open(page)
    cells = chromium.run("return [...document.querySelectorAll('.matrix td:nth-child(2) button')].length")
    opened = set()
    for number in range(cells):
        chromium.run("document.querySelectorAll('.matrix td:nth-child(2) button')[arguments[0]].click()", number)
        shown = set(chromium.texts(".detail h3"))
        assert shown <= set(keys(chromium))
        opened |= shown
    assert opened == {key or '""' for key in names}


def test_values_that_were_only_compared_by_their_bytes_have_no_distance(chromium: Browser, tmp_path: Path) -> None:
    a = {"h.0.w": torch.ones(2), "h.1.w": torch.ones(2)}
    paths = saved_pair(tmp_path, a, a | {"h.1.w": torch.zeros(2)})
    chromium.open(written(tmp_path, "diff", *paths, "--quick"))
    assert "not finite" not in chromium.run("return document.body.innerText")
    said = chromium.run("return [...document.querySelectorAll('.matrix td button')].map((one) => one.ariaLabel)")
    assert "h.1 w: values differ" in said
    assert chromium.texts(".tensors .badge") == ["values differ", "equal"]


def test_why_a_model_would_refuse_is_said(chromium: Browser, tmp_path: Path) -> None:
    a = {"h.0.w": torch.ones(2), "h.1.w": torch.ones(2)}
    paths = saved_pair(tmp_path, a, {"h.0.w": torch.ones(3)})
    (tmp_path / "allowed.toml").write_text('[[allow]]\nkind = "loadability"\nkey = "h.1.*"\nreason = "unused"\n')
    page = written(tmp_path, "diff", *paths, "--fail-on", "loadability", "--allow", tmp_path / "allowed.toml")
    chromium.open(page)
    assert chromium.texts("#loadability li") == ["h.0.w: shape [2], in B [3]", "h.1.w: missing in B (allowed: unused)"]


def test_the_policy_stops_what_is_no_part_of_the_page(session: Browser, pages: Pages) -> None:
    session.open(pages["plain"])
    session.requests()
    broken = session.run("""
        const found = [];
        addEventListener("securitypolicyviolation", (event) => found.push(event.effectiveDirective));
        const script = document.createElement("script");
        try { script.text = "document.title = 'owned'"; } catch (error) { found.push(error.name); }
        document.body.append(script);
        try { document.body.innerHTML = "<b>owned</b>"; } catch (error) { found.push(error.name); }
        const image = document.createElement("img");
        image.src = "http://127.0.0.1:9/x.png";
        document.body.append(image);
        document.body.setAttribute("style", "color: red");
        return fetch("http://127.0.0.1:9/").catch((error) => found.push(error.name))
            .then(() => new Promise((done) => setTimeout(() => done(found), 200)));
    """)
    assert {"img-src", "connect-src", "TypeError"} <= set(broken)
    assert broken.count("TypeError") >= 3
    assert session.run("return document.title") == "a.pth"
    assert [url for url in session.requests() if not url.startswith("file:")] == []
    session.log("browser")


def test_all_rows_are_printed(chromium: Browser, pages: Pages) -> None:
    chromium.size(800, 300)
    chromium.open(pages["plain"])
    pdf = chromium.command("Page.printToPDF", {"printBackground": True})["data"]
    assert len(pdf) > 10_000
    chromium.run("dispatchEvent(new Event('beforeprint'))")
    assert keys(chromium) == list(network())


@pytest.mark.slow
def test_a_hundred_thousand_keys_open_and_scroll(chromium: Browser, tmp_path: Path) -> None:
    count = 100_000
    header: dict[str, Any] = {
        f"model.layers.{number // 12}.{'attn' if number % 2 else 'mlp'}.w{number % 12}.weight": {
            "dtype": "F32", "shape": [2], "data_offsets": [8 * number, 8 * number + 8],
        }
        for number in range(count)
    }  # fmt: skip
    text = json.dumps(header).encode()
    path = tmp_path / "many.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8 * count))
    with contextlib.redirect_stdout(io.StringIO()):
        assert main(["inspect", str(path), "--stats", "--html", str(tmp_path / "many.html")]) == 0
    begun = time.monotonic()
    chromium.open(tmp_path / "many.html")
    opened = time.monotonic() - begun
    assert chromium.texts("#found") == ["100,000 tensors"]
    assert chromium.run("return document.querySelectorAll('*').length") < 10_000
    chromium.run("document.getElementById('table').scrollTop = 1e9")
    time.sleep(0.2)
    assert keys(chromium)[-1] == list(header)[-1]
    chromium.run("document.getElementById('search').focus()")
    chromium.press("layers.777.")
    assert len(keys(chromium)) == 12
    print(f"opened in {opened:.2f} s")
    assert opened < 60, "2 s where nothing else runs"


def test_the_fixtures_of_a_whole_model_are_drawn(chromium: Browser, tmp_path: Path) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        main(["inspect", str(FIXTURES / "resnet_nested.pth"), "--stats", "--html", str(tmp_path / "page.html")])
    chromium.open(tmp_path / "page.html", "#m=layer1&colour=std")
    assert crumbs(chromium) == ["all", "layer1"]
    assert chromium.texts("#beside > .tree > li")[3].startswith("optimizer AdamW of ")
