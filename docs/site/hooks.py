"""What mkdocs writes into the pages: tables and references made from the code, and files of the repository's top.

A line ``<!-- generated: NAME ... -->`` of a page becomes what ``GENERATED[NAME]`` returns for the words behind it;
``<!-- include: FILE -->`` or ``<!-- include: FILE # HEADING -->`` that file, or its section of that heading.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
MARK = re.compile(r"^<!-- (generated|include): (.*?) -->$", re.MULTILINE)
LINK = re.compile(r"\[([^\[\]]*)\]\(([^)#:\s]*)(#[^)\s]*)?\)")
FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
PAGES = {
    "README.md": "docs/README.md",
    "SECURITY.md": "docs/safety.md",
    "CONTRIBUTING.md": "docs/architecture.md",
    "CHANGELOG.md": "docs/changelog.md",
}
"""Files outside docs/ that have a page: links to them lead there. Links to any other file become its name."""


def command(name: str) -> str:
    """Returns the synopsis of a command and a table of its arguments and options, in the order of ``--help``."""
    from ckptool.cli.app import app

    built = app.get_command(None, name)
    arguments = [one for one in built.params if one.param_type_name == "argument"]
    head = f"```text\nckptool {name} {' '.join(['[OPTIONS]', *(one.metavar for one in arguments)])}\n```\n\n"
    return head + _table("option", "meaning", [(_spelled(one), _cell(one.help)) for one in built.params])


def _spelled(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return f"`{parameter.metavar}`"
    names = [*sorted(parameter.opts, key=len), *parameter.secondary_opts]
    takes = "" if getattr(parameter, "is_flag", False) else f" {parameter.metavar}"
    return ", ".join(f"`{_cell(name + takes)}`" for name in names) + _default(parameter)


def _default(parameter: Any) -> str:
    if parameter.secondary_opts:
        return f"<br>default: `{(parameter.opts if parameter.default else parameter.secondary_opts)[0]}`"
    return f"<br>default: `{parameter.default}`" if type(parameter.default) in (str, int, float) else ""


def formats() -> str:
    """Returns the table of formats that can be written: what selects each, and what it holds beside the tensors."""
    from ckptool.formats import FORMATS

    said = {"tree": "the whole tree", "ties": "ties", "metadata": "metadata (text)", "devices": "device tags"}
    rows = []
    for row in FORMATS:
        if row.writes:
            suffixes = ", ".join(f"`{suffix}`" for suffix in row.suffixes) or (
                "a directory" if row.is_directory else ""
            )
            holds = ", ".join(text for field, text in said.items() if getattr(row.holds, field))
            rows.append((f"`{row.name}`", f"`{row.label}`", suffixes, holds))
    return _table("`--to`", "read as", "names of outputs", "holds beside the tensors", rows)


def python() -> str:
    """Returns the marks from which mkdocstrings makes the reference of every public name."""
    import ckptool

    parts: dict[str, list[str]] = {"Functions": [], "Classes": [], "Errors": []}
    for name in ckptool.__all__:
        parts["Errors" if name.endswith("Error") else "Functions" if name.islower() else "Classes"].append(name)
    parts["Functions"].remove("__version__")
    return "\n\n".join(
        f"## {title}\n\n" + "\n\n".join(f"::: ckptool.{name}\n    options:\n      heading_level: 3" for name in names)
        for title, names in parts.items()
    )


GENERATED: dict[str, Callable[..., str]] = {"command": command, "formats": formats, "python": python}


def _table(*heads_and_rows: Any) -> str:
    *heads, rows = heads_and_rows
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def included(name: str, page: str) -> str:
    """Returns a file of the repository without its title, or its section ``FILE # HEADING`` without the heading."""
    file, _, heading = name.partition(" # ")
    text = (REPOSITORY / file).read_text()
    heading = heading or text.splitlines()[0].removeprefix("# ")
    level, text = re.split(rf"^(#+) {re.escape(heading)}$", text, maxsplit=1, flags=re.MULTILINE)[1:]
    return relinked(re.split(rf"^#{{1,{len(level)}}} ", text, maxsplit=1, flags=re.MULTILINE)[0], "", page).strip()


def filled(text: str, page: str) -> str:
    """Returns a page's Markdown with every mark replaced; ``page``: its folder in the repository.

    Raises: KeyError, OSError, ValueError for a mark that leads nowhere.
    """

    def made(mark: re.Match[str]) -> str:
        kind, words = mark.groups()
        if kind == "include":
            return included(words, page)
        name, *args = words.split()
        return GENERATED[name](*args)

    return MARK.sub(made, text)


def relinked(text: str, folder: str, page: str) -> str:
    """Returns Markdown of ``folder`` with its links as they are in a page of the folder ``page``.

    Links to files outside docs/ lead to the page that includes them, and are plain text where there is none.
    """

    def link(match: re.Match[str]) -> str:
        shown, file, anchor = match.groups(default="")
        target = posixpath.normpath(posixpath.join(folder, file))
        target = PAGES.get(target, target)
        if not file:
            return match[0]
        return f"[{shown}]({posixpath.relpath(target, page)}{anchor})" if target.startswith("docs/") else shown

    blocks = FENCED.findall(text)
    prose = [LINK.sub(link, part) for part in FENCED.split(text)]
    return "".join(part + block for part, block in zip(prose, [*blocks, ""], strict=True))


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Returns a page as the site shows it. mkdocs calls this."""
    folder = posixpath.dirname(f"docs/{page.file.src_uri}")
    named = re.sub(r"^```(\w+) ([\w.]+)$", r'```\1 title="\2"', filled(markdown, folder), flags=re.MULTILINE)
    return relinked(named, folder, folder)
