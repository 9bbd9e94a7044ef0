"""Documentation is tested like code: transcripts are run again, Python blocks executed, the lists held complete."""

from __future__ import annotations

import re
import sys
from typing import Any

import pytest

from ckptool import errors, formats
from ckptool.cli.app import COMMANDS, app
from ckptool.ops.rows import Reason
from ckptool.partial import adapters, init, presets
from tests.transcripts import DOCS, FILES, REPOSITORY, rerun, rerun_file

README = (REPOSITORY / "README.md").read_text()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_every_transcript_is_what_the_commands_print(path):
    assert rerun_file(path) == path.read_text(), "run `make golden` and review the difference"


def test_running_the_transcripts_leaves_the_fixtures_as_they_were():
    before = {path: path.read_bytes() for path in (REPOSITORY / "fixtures").rglob("*") if path.is_file()}
    rerun_file(REPOSITORY / "tests" / "golden" / "filter.md")
    assert {path: path.read_bytes() for path in (REPOSITORY / "fixtures").rglob("*") if path.is_file()} == before


def test_a_value_in_a_comment_is_held_to_what_the_expression_gives():
    block = "```python\nx = [1, 2]  # a remark\nlen(x)  # {}\nx.clear()\n```\n"
    assert rerun(block.format("two")) == rerun(block.format("3")) == block.format("2")
    assert rerun(block.format("1 + 1")) == block.format("1 + 1")


def test_what_python_prints_stands_in_the_block_behind_it():
    text = "```python\nfor number in (1, 2):\n    print(number)\n```\n\n```text\n{}```\n"
    assert rerun(text.format("3\n")) == text.format("1\n2\n")
    for blocks in ("```python\nprint(1)\n```\n", "```python\nprint(1)\n```\n\n```console\n$ true\n```\n"):
        with pytest.raises(AssertionError, match="printed"):
            rerun(blocks)


def test_a_named_block_is_a_file_that_later_blocks_may_import_and_no_other_page_sees():
    page = "```python made.py\nvalue = {}\n```\n\n```python\nimport made\n\nmade.value  # {}\n```\n"
    assert [rerun(page.format(number, number)) for number in (1, 2)] == [page.format(1, 1), page.format(2, 2)]
    assert "made" not in sys.modules


def test_every_page_of_the_cookbook_is_in_its_index_and_every_link_leads_somewhere():
    index = (DOCS / "README.md").read_text()
    assert all(f"]({page.name})" in index for page in DOCS.glob("*.md") if page.name != "README.md")
    for path in FILES:
        prose = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
        for link, anchor in re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", prose):
            if "://" not in link:
                file = path.parent / link if link else path
                assert file.exists(), f"{path.name}: {link}"
                assert not anchor or anchor in anchors(file.read_text()), f"{path.name}: {link}#{anchor}"


def anchors(text: str) -> set[str]:
    """Returns what may be linked to in a Markdown text: its headings, as GitHub names them."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands() -> dict[str, Any]:
    return {name: app.get_command(None, name) for name in COMMANDS}


def test_the_list_of_commands_says_what_each_says_of_itself():
    for name, command in commands().items():
        assert command.help.split("\n\n")[0].replace("\n", " ") == COMMANDS[name]


def test_every_command_and_option_is_in_the_readme():
    for name, command in commands().items():
        assert f"ckptool {name}" in README
        for parameter in command.params:
            if parameter.param_type_name == "option":
                longest = max(parameter.opts, key=len)
                assert longest in README or any(opt in README for opt in parameter.opts), f"{name} {longest}"


def test_every_error_slug_exit_code_format_and_reason_is_in_the_readme():
    classes = [value for value in vars(errors).values() if isinstance(value, type)]
    slugs = {value.slug for value in classes if issubclass(value, errors.CkptoolError)} - {"error"}
    for slug in slugs:
        assert f"| `{slug}` |" in README
    for code in (0, 1, 2, 130):
        assert f"| {code} |" in README
    for row in formats.FORMATS:
        assert f"| `{row.label}`" in README
        assert all(suffix in README for suffix in row.suffixes)
    for reason in Reason.__args__:
        assert f"| `{reason}` |" in README


def test_every_adapter_init_rule_and_preset_is_in_the_readme():
    for name, options in adapters.ADAPTERS.items():
        row = next(line for line in README.splitlines() if line.startswith(f"| `{name}` |"))
        for option, (takes, _) in options.items():
            said = [f"{option}="] if option else takes.split("|")
            assert all(one in row or f"`{option}`" in row for one in said), f"{name}: {option or takes}"
    for method in init.METHODS:
        assert init.usage(method) in README or f"`{method}(...)`" in README, method
    for name in presets.PRESETS:
        assert f"`{name}`" in README


def test_no_output_of_help_is_cut_or_empty():
    for name, command in commands().items():
        with command.make_context(name, [], resilient_parsing=True) as context:
            text = command.get_help(context)
        assert "..." not in text.splitlines()[2]
        assert all(parameter.help for parameter in command.params)
        assert text.lower().count("arguments:\n") == 1
        assert all(parameter.metavar for parameter in command.params if not getattr(parameter, "is_flag", False))
