"""Documentation is tested like code: transcripts are run again, Python blocks executed, the lists held complete."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import json_reference
import jsonschema_rs
import pytest

from ckptool import errors, formats
from ckptool.cli.app import COMMANDS, app
from ckptool.core import findings
from ckptool.ops import diff
from ckptool.ops.rows import Reason
from ckptool.partial import adapters, init, presets
from tests.transcripts import BLOCK, DOCS, FILES, REPOSITORY, place, rerun, rerun_file, run

README = (REPOSITORY / "README.md").read_text()
MANUAL = "\n".join(path.read_text() for path in FILES if DOCS in path.parents)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_every_transcript_is_what_the_commands_print(path):
    assert rerun_file(path) == path.read_text(), "run `make golden` and review the difference"


def test_running_the_transcripts_leaves_the_fixtures_as_they_were():
    before = {path: path.read_bytes() for path in (REPOSITORY / "fixtures").rglob("*") if path.is_file()}
    rerun_file(REPOSITORY / "tests" / "golden" / "filter.md")
    assert {path: path.read_bytes() for path in (REPOSITORY / "fixtures").rglob("*") if path.is_file()} == before


def test_the_reference_of_json_is_what_the_dataclasses_say_and_describes_every_field():
    made = json_reference.made()
    assert {path: path.read_text() for path in made} == made, "run `make golden`"
    lacking = [
        f"{kind.__name__}.{name}"
        for result in json_reference.RESULTS.values()
        for kind, notes in json_reference.dataclasses_in(result)
        for name, _, _ in json_reference.contents(kind, notes)
        if not json_reference.described(kind).get(name)
    ]
    assert lacking == []


@pytest.mark.parametrize("command", COMMANDS)
def test_a_document_has_a_result_or_an_error(command):
    schema = json.loads((DOCS / "reference" / "schemas" / f"{command}.json").read_text())
    judge = jsonschema_rs.validator_for(schema)
    error = {"kind": "usage", "message": "a", "path": None}
    head = {"schema": 1, "command": command}
    assert judge.is_valid({**head, "error": error})
    assert not judge.is_valid(head)
    assert not judge.is_valid({**head, "error": {**error, "message": 1}})
    assert not judge.is_valid({**head, "command": "other", "error": error})
    assert not judge.is_valid({**head, "result": 1, "notes": []})


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


def test_no_command_of_a_page_changes_the_shell_for_the_next_one():
    """Each runs in a shell of its own here, and all in one where a reader pastes them."""
    lasting = re.compile(r"^\$ (?:cd|export|set|\w+=\S*$).*", re.MULTILINE)
    blocks = [match for path in FILES for match in BLOCK.findall(path.read_text())]
    assert [line for language, _, text in blocks if language == "console" for line in lasting.findall(text)] == []


def test_every_page_is_in_an_index_and_every_link_leads_somewhere():
    indexes = [path for path in FILES if path.name == "README.md"]
    listed = {(path.parent / link).resolve() for path in indexes for link, _ in links(path)}
    assert {path for path in FILES if DOCS in path.parents and path.name != "README.md"} <= listed
    for path in FILES:
        for link, anchor in links(path):
            if "://" not in link:
                file = path.parent / link if link else path
                assert file.exists(), f"{path.name}: {link}"
                assert not anchor or anchor in anchors(file.read_text()), f"{path.name}: {link}#{anchor}"


def links(path: Path) -> list[tuple[str, str]]:
    """Returns (file, anchor) of every link in a page's prose."""
    prose = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", prose)


def rows(text: str, heading: str) -> list[list[str]]:
    """Returns the cells of the rows of the first table below a heading, without the table's own head."""
    table = text.split(f"\n{heading}\n", 1)[1].split("\n|---", 1)[1].split("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[1:]]


def test_the_commands_of_the_readme_work_one_after_another_as_they_stand():
    jobs = rows(README, "## Jobs")
    assert len(jobs) <= 12
    with place(None):
        for _, command in jobs:
            said = run(command.strip("`"))
            assert not re.search(r"^exit \d+$", said, re.MULTILINE), f"{command}: {said}"


def test_the_speeds_in_the_readme_are_those_of_the_benchmarks():
    measured = (DOCS / "benchmarks.md").read_text().splitlines()
    quoted = rows(README, "## Speed")
    assert len(quoted) == 4
    for _, seconds, memory, _, theirs in quoted:
        figures = [f"| {seconds.split()[0]} [", f"] | {memory.split()[0]} ", f" {theirs.split()[0]} |"]
        assert any(all(figure in line for figure in figures) and "4,000 MB" in line for line in measured), figures


def anchors(text: str) -> set[str]:
    """Returns what may be linked to in a Markdown text: its headings, as GitHub names them."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands() -> dict[str, Any]:
    return {name: app.get_command(None, name) for name in COMMANDS}


def test_the_list_of_commands_says_what_each_says_of_itself():
    for name, command in commands().items():
        assert command.help.split("\n\n")[0].replace("\n", " ") == COMMANDS[name]


def test_every_command_and_option_is_in_the_manual():
    for name, command in commands().items():
        assert (DOCS / "commands" / f"{name}.md").exists()
        for parameter in command.params:
            if parameter.param_type_name == "option":
                longest = max(parameter.opts, key=len)
                assert longest in MANUAL or any(opt in MANUAL for opt in parameter.opts), f"{name} {longest}"


OTHERS = (
    "body-file create-if-none delta edit-last from git global initial-branch reflink spec unified "
    "nodes nnodes ntasks-per-node nproc-per-node rdzv-backend rdzv-id rdzv-endpoint"
)
"""Options of gh, git, cp, sft, uvx and pipx; of srun and torchrun."""


def test_no_page_names_an_option_that_no_command_has():
    known = {f"--{name}" for name in (*OTHERS.split(), "version", "install-completion", "show-completion")}
    for command in commands().values():
        known |= {name for one in command.params for name in (*one.opts, *one.secondary_opts)}
    named = re.findall(r"(?<![\w-])--[a-z][\w-]+", README + MANUAL + (REPOSITORY / "SECURITY.md").read_text())
    assert set(named) - known == set()


def test_every_error_slug_exit_code_format_and_reason_is_in_the_manual():
    classes = [value for value in vars(errors).values() if isinstance(value, type)]
    slugs = {value.slug for value in classes if issubclass(value, errors.CkptoolError)} - {"error"}
    for slug in slugs:
        assert f"| `{slug}` |" in MANUAL
    for code in (0, 1, 2, 130):
        assert f"| {code} |" in MANUAL
    for row in formats.FORMATS:
        assert f"| `{row.label}`" in MANUAL
        assert all(suffix in MANUAL for suffix in row.suffixes)
    for reason in Reason.__args__:
        assert f"| `{reason}` |" in MANUAL


@pytest.mark.parametrize(
    ("command", "kinds", "default"),
    [("diff", diff.KINDS, diff.failing(None)), ("inspect --check", findings.KINDS, findings.failing(None))],
)
def test_the_page_on_ci_says_of_every_kind_whether_it_fails_by_default(command, kinds, default):
    table = (DOCS / "ci.md").read_text().partition(f"| `{command} --fail-on` |")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| `(.+?)` \| (.+) \| (yes|no) \|$", table, re.MULTILINE)
    assert [(kind, said) for kind, _, said in rows] == [(kind, "yes" if kind in default else "no") for kind in kinds]


def test_every_adapter_init_rule_and_preset_is_in_the_manual():
    for name, options in adapters.ADAPTERS.items():
        row = next(line for line in MANUAL.splitlines() if line.startswith(f"| `{name}` |"))
        for option, (takes, _) in options.items():
            said = [f"{option}="] if option else takes.split("|")
            assert all(one in row or f"`{option}`" in row for one in said), f"{name}: {option or takes}"
    for method in init.METHODS:
        assert init.usage(method) in MANUAL or f"`{method}(...)`" in MANUAL, method
    for name in presets.PRESETS:
        assert f"`{name}`" in MANUAL


def test_no_output_of_help_is_cut_or_empty():
    for name, command in commands().items():
        with command.make_context(name, [], resilient_parsing=True) as context:
            text = command.get_help(context)
        assert "..." not in text.splitlines()[2]
        assert all(parameter.help for parameter in command.params)
        assert text.lower().count("arguments:\n") == 1
        assert all(parameter.metavar for parameter in command.params if not getattr(parameter, "is_flag", False))
