"""The site of docs/, without mkdocs: what is generated is complete, what is included is whole, every page is in it."""

from __future__ import annotations

import importlib.util
import posixpath
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

import ckptool
from ckptool.cli.app import COMMANDS, app
from ckptool.formats import FORMATS
from tests.transcripts import DOCS, REPOSITORY

SPEC = importlib.util.spec_from_file_location("hooks", DOCS / "site" / "hooks.py")
hooks = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(hooks)
PAGES = sorted(DOCS.rglob("*.md"))


def shown(path: Path) -> str:
    """The Markdown that mkdocs renders of a page."""
    return hooks.on_page_markdown(path.read_text(), SimpleNamespace(file=SimpleNamespace(src_uri=uri(path))))


def uri(path: Path) -> str:
    return path.relative_to(DOCS).as_posix()


def test_every_page_is_in_the_navigation_once_and_the_navigation_names_no_other():
    nav = (REPOSITORY / "mkdocs.yml").read_text().partition("\nnav:\n")[2]
    assert sorted(re.findall(r"([\w/-]+\.md)$", nav, re.MULTILINE)) == sorted(map(uri, PAGES))


@pytest.mark.parametrize("path", PAGES, ids=uri)
def test_every_link_of_a_shown_page_leads_to_a_file_of_the_site(path):
    text = shown(path)
    assert "<!-- generated" not in text
    assert "<!-- include" not in text
    for _, file, _ in hooks.LINK.findall(hooks.FENCED.sub("", text)):
        target = posixpath.normpath(posixpath.join("docs", posixpath.dirname(uri(path)), file))
        assert not file or (target.startswith("docs/") and (REPOSITORY / target).is_file()), file


@pytest.mark.parametrize("name", COMMANDS)
def test_the_page_of_a_command_has_each_of_its_arguments_and_options_with_its_help(name):
    text = shown(DOCS / "commands" / f"{name}.md")
    for parameter in app.get_command(None, name).params:
        names = [*parameter.opts, *parameter.secondary_opts]
        if parameter.param_type_name == "argument":
            names = [parameter.metavar]
        said = f"| {hooks._cell(parameter.help)} |"
        [row] = [line for line in text.splitlines() if said in line and f"`{names[0]}" in line]
        assert all(f"`{one}" in row for one in names)
        if parameter.param_type_name == "option" and not getattr(parameter, "is_flag", False):
            assert hooks._cell(parameter.metavar) in row


def test_the_table_of_formats_has_each_that_can_be_written_with_the_names_that_select_it():
    rows = {line.split("`")[1]: line for line in hooks.formats().splitlines()[2:]}
    assert rows.keys() == set(ckptool.formats.names())
    for row in FORMATS:
        if row.writes:
            assert all(f"`{suffix}`" in rows[row.name] for suffix in row.suffixes)
            assert ("the whole tree" in rows[row.name]) == row.holds.tree


def test_the_reference_of_the_library_has_every_public_name_and_each_says_what_it_is():
    marks = re.findall(r"^::: ckptool\.(\w+)$", hooks.python(), re.MULTILINE)
    assert sorted(marks) == sorted(set(ckptool.__all__) - {"__version__"})
    assert all(getattr(ckptool, name).__doc__ for name in marks)


@pytest.mark.parametrize("file", ["SECURITY.md", "CHANGELOG.md", "CONTRIBUTING.md"])
def test_a_file_of_the_repository_is_on_its_page_whole_but_for_its_title_and_where_its_links_lead(file):
    page = shown(REPOSITORY / hooks.PAGES[file])
    plain = hooks.LINK.sub(r"\1", page)
    text = hooks.LINK.sub(r"\1", (REPOSITORY / file).read_text().split("\n", 1)[1]).strip()
    assert plain.strip().endswith(text)


def test_a_section_can_be_included_alone_and_links_follow_to_the_page_they_are_shown_on(tmp_path, monkeypatch):
    monkeypatch.setattr(hooks, "REPOSITORY", tmp_path)
    text = "# T\n\n## One\n\n[a](SECURITY.md#x) [b](docs/cookbook/a.md) [c](tests/t.py) [d](#e)\n\n### In it\n"
    (tmp_path / "F.md").write_text(f"{text}\n## Two\nno\n")
    made = hooks.filled("<!-- include: F.md # One -->", "docs/cookbook")
    assert made == "[a](../safety.md#x) [b](a.md) c [d](#e)\n\n### In it"
    with pytest.raises(ValueError, match="unpack"):
        hooks.filled("<!-- include: F.md # Three -->", "docs")
    with pytest.raises(KeyError):
        hooks.filled("<!-- generated: nothing -->", "docs")


def test_links_in_blocks_of_code_stay_as_they_are():
    block = "```text\n[x](../../tests/y.py)\n```"
    assert hooks.relinked(f"[x](../../tests/y.py)\n{block}\n", "docs/a", "docs/a") == f"x\n{block}\n"
