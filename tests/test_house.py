"""The floors of the house: who may import whom. Read from the source, so nothing has to be imported to be judged."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import house
from oracles import FIXTURES

import ckptool.formats

PACKAGE = Path(ckptool.formats.__file__).parents[1]

FLOORS = {room.name: room.floor for room in house.listed()} | {"__main__": 11}
"""What a room may see: itself, and all that stands on a lower floor of the list in CONTRIBUTING.md; no neighbours."""

SEES = {"ops": {"errors", "limits", "core", "ops"}, "mapping": {"errors", "limits", "core", "ops", "mapping"}}
"""Rooms that see less than their floor allows."""

HEAVY = {"numpy", "torch", "safetensors"}


def room_of(module: str) -> str:
    """The room of ``ckptool.ops.diff`` is ``ops``; that of ``ckptool`` itself ``__init__``."""
    return [*module.split(".")[1:], "__init__"][0]


def files(package: Path) -> list[Path]:
    return sorted(path.relative_to(package) for path in package.rglob("*.py"))


@cache
def text_of(package: Path, path: Path) -> str:
    return (package / path).read_text()


@cache
def parsed(package: Path, path: Path) -> ast.Module:
    return ast.parse(text_of(package, path))


def nodes(path: Path, pattern: str) -> Iterator[ast.AST]:
    """Every node of a file of ours; of one whose text has no match none, since going over all takes long."""
    return ast.walk(parsed(PACKAGE, path)) if re.search(pattern, text_of(PACKAGE, path)) else iter(())


def named(node: ast.expr) -> str:
    """Returns ``a.b`` of a name with its attributes, and nothing of another expression."""
    if isinstance(node, ast.Attribute):
        return f"{named(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


@cache
def imports(package: Path, path: Path) -> list[tuple[str, int, bool]]:
    """Every (module, line, whether only a function or the type checker imports it) of a file."""

    def visit(node: ast.AST, later: bool) -> Iterator[tuple[str, int, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((alias.name, child.lineno, later) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                module = child.module or ""
                for alias in child.names:
                    below = package.parent / Path(*module.split("."), alias.name)
                    known = below.with_suffix(".py").exists() or (below / "__init__.py").exists()
                    yield (f"{module}.{alias.name}" if known else module), child.lineno, later
            elif not isinstance(child, ast.expr):
                typing = isinstance(child, ast.If) and named(child.test).endswith("TYPE_CHECKING")
                inner = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef))
                yield from visit(child, later or inner or typing)

    return list(visit(parsed(package, path), False))


def upward_imports(package: Path) -> list[str]:
    """Every import of a file that its room may not see."""
    found = []
    for path in files(package):
        room = path.parts[0].removesuffix(".py")
        for module, line, _ in imports(package, path):
            if module.split(".")[0] != "ckptool":
                continue
            other = room_of(module)
            seen = other == room or FLOORS.get(other, 99) < FLOORS.get(room, -1)
            if not seen or other not in SEES.get(room, {other}):
                found.append(f"{path}:{line} imports {module}")
    return found


def circles(package: Path) -> list[str]:
    """Every file from which imports lead back to itself, those inside functions included."""
    names = {
        ".".join(["ckptool", *path.with_suffix("").parts]).removesuffix(".__init__"): path for path in files(package)
    }
    ways = {
        name: {module for module, _, _ in imports(package, path) if module in names} for name, path in names.items()
    }
    found = []
    for name in names:
        seen: set[str] = set()
        trail = [*ways[name]]
        while trail:
            module = trail.pop()
            if module not in seen:
                seen.add(module)
                trail.extend(ways[module])
        if name in seen:
            found.append(name)
    return found


def test_a_room_imports_lower_floors_only() -> None:
    assert upward_imports(PACKAGE) == []


def test_no_imports_lead_back_to_where_they_began() -> None:
    # `ckptool` itself gives its names when they are asked for, and the command line asks for them
    assert [name for name in circles(PACKAGE) if name != "ckptool" and not name.startswith("ckptool.cli")] == []


def test_every_room_has_a_floor_and_is_small() -> None:
    assert {path.parts[0].removesuffix(".py") for path in files(PACKAGE)} == FLOORS.keys()
    rooms = Counter(str(path.parent) for path in files(PACKAGE) if path.stem != "__init__")
    assert {name: count for name, count in rooms.items() if count > 12} == {}
    lengths = {str(path): text_of(PACKAGE, path).count("\n") for path in files(PACKAGE)}
    assert {name: lines for name, lines in lengths.items() if lines > 550} == {}


def unlisted(package: Path, rooms: list[house.Room]) -> list[str]:
    """Every folder and file that the list of the house does not name where it stands."""
    said = {room.name: {".": room.text, **room.inner} for room in rooms}
    found = []
    for path in files(package):
        room, inner, stem = path.parts[0].removesuffix(".py"), "/".join(path.parts[1:-1]) or ".", path.stem
        text = said.get(room, {}).get(inner)
        if text is None:
            found.append(str(path.parent) if stem == "__init__" else str(path))
        elif len(path.parts) > 1 and stem != "__init__" and not re.search(rf"\b{stem}\b", text):
            found.append(str(path))
    return found


def test_the_list_of_the_house_names_every_folder_and_file_and_the_picture_is_drawn_from_it() -> None:
    rooms = house.listed()
    assert unlisted(PACKAGE, [*rooms, house.Room("__main__", 11, "", {})]) == [], "name it below The house"
    for path, text in house.made().items():
        assert path.read_text() == text, "run `make golden`, and look at the picture"
        labels = re.findall(r'<text class="(?:name|chip)"[^>]*>([^<]*)<', text)
        shown = {word.removesuffix("/") for label in labels for word in label.split()}
        folders = {part for file in files(PACKAGE) for part in file.parts[:-1]}
        assert folders <= shown


def test_formats_do_not_see_each_other() -> None:
    from ckptool import formats

    others = {row.module for row in formats.FORMATS} | {"ckptool.formats", "ckptool.formats.unknown"}
    assert [
        f"{path}:{line} imports {module}"
        for path in files(PACKAGE)
        if path.parts[0] in ("formats", "directories") and path.stem != "__init__"
        for module, line, _ in imports(PACKAGE, path)
        if module in others and module != f"ckptool.{path.parts[0]}.{path.stem}"
    ] == []


def test_no_format_is_asked_for_by_name_outside_formats() -> None:
    """But ``torch`` and ``torch.package``, which are names of packages too."""
    words = {word for row in ckptool.formats.FORMATS for word in (row.name, row.label)} - {
        "torch",
        "torch.package",
        "joblib",
    }
    modules = {row.module for row in ckptool.formats.FORMATS}
    found = []
    for path in files(PACKAGE):
        if path.parts[0] in ("formats", "directories"):
            continue
        found += [f"{path}:{line} imports {module}" for module, line, _ in imports(PACKAGE, path) if module in modules]
        for node in nodes(path, rf"""["']({"|".join(map(re.escape, words))})["']"""):
            if isinstance(node, ast.Constant) and node.value in words:
                found.append(f"{path}:{node.lineno} says {node.value!r}")
    assert found == []


def test_only_values_and_partial_import_numpy_and_torch_and_only_for_those_who_need_them() -> None:
    """Inside functions; numpy at the top of files in values and mapping too, but of blocks, which copies bytes."""
    found = []
    for path in files(PACKAGE):
        for module, line, later in imports(PACKAGE, path):
            known = path.parts[0] in ("values", "partial", "ranks") or path.stem in ("safetensors_file", "npz")
            at_top = path.as_posix() == "ranks/engine.py" or (  # which subclasses torch's classes
                module in ("numpy", "numpy.typing") and path.parts[0] in ("values", "mapping") and path.stem != "blocks"
            )
            if module.split(".")[0] in HEAVY and not (known and later) and not at_top:
                found.append(f"{path}:{line} imports {module}")
    assert found == []


def test_paths_that_may_be_urls_are_joined_split_and_looked_for_in_io_only() -> None:
    """``os.path`` knows no URLs. Outputs, code and rules that ship are of this machine."""
    local = {"directories/place.py", "directories/parallel/joining.py", "formats/__init__.py", "formats/unknown.py"}
    found = []
    for path in files(PACKAGE):
        if path.parts[0] not in ("formats", "directories", "values", "api", "ops", "mapping") or str(path) in local:
            continue
        for node in ast.walk(parsed(PACKAGE, path)):
            name = named(node) if isinstance(node, ast.Attribute) else ""
            if name.startswith(("os.path.", "os.listdir", "os.scandir", "os.stat")) and name not in KNOWN_HERE:
                found.append(f"{path}:{node.lineno} calls {name}")
    assert found == []


KNOWN_HERE = {"os.path.splitext", "os.path.islink"}
"""What is right for a name alone, or asked where there is no link."""


def test_the_terminal_is_known_in_the_command_line_only_and_click_nowhere() -> None:
    terminal = {"typer", "rich"}
    assert [
        f"{path}:{line} imports {module}"
        for path in files(PACKAGE)
        for module, line, _ in imports(PACKAGE, path)
        if module.split(".")[0] == "click" or (path.parts[0] != "cli" and module.split(".")[0] in terminal)
    ] == []


def test_operations_do_no_input_or_output() -> None:
    outside = {"os", "io", "pathlib", "mmap", "json", "pickle", "shutil", *HEAVY}
    assert [
        f"{path}:{line} imports {module}"
        for path in files(PACKAGE)
        if path.parts[0] == "ops"
        for module, line, _ in imports(PACKAGE, path)
        if module.split(".")[0] in outside
    ] == []


def test_nothing_of_a_file_is_run_and_no_assertion_stands_on_user_data() -> None:
    found = []
    for path in files(PACKAGE):
        modules = {module.split(".")[0] for module, _, _ in imports(PACKAGE, path)}
        if modules & {"pickle", "_pickle", "marshal", "shelve"} and path.as_posix() not in (
            "pickling/load.py",
            "pickling/classes.py",
        ):
            found.append(f"{path} imports an unpickler of Python's own")
        for node in nodes(path, r"\bassert\b|\b(eval|exec|compile|__import__|loads?|import_module)\("):
            if isinstance(node, ast.Assert):
                found.append(f"{path}:{node.lineno} asserts")
            if isinstance(node, ast.Call):
                called = named(node.func)
                # the registries of formats and of commands import their own files; and a model in code
                importer = path in (Path("formats/__init__.py"), Path("cli/app.py"), Path("references/code.py"))
                if called in {"eval", "exec", "compile", "__import__", "pickle.loads", "pickle.load"} or (
                    called == "importlib.import_module" and not importer
                ):
                    found.append(f"{path}:{node.lineno} calls {called}")
    assert found == []


def test_the_rules_can_be_broken(tmp_path: Path) -> None:
    package = tmp_path / "ckptool"
    for name, text in {
        "core/tree.py": "def f():\n    from ckptool.values import blocks\n    import torch.nn\n",
        "values/blocks.py": "from ckptool.values import adapt\n",
        "values/adapt.py": "from ckptool.values.blocks import Bytes\n",
        "ops/diff.py": "from ckptool.io import source\n",
        "formats/npz.py": "from ckptool.ops import diff\n",
        "io/source.py": "",
    }.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text)
    assert upward_imports(package) == [
        "core/tree.py:2 imports ckptool.values.blocks",
        "formats/npz.py:1 imports ckptool.ops.diff",
        "ops/diff.py:1 imports ckptool.io.source",
    ]
    assert circles(package) == ["ckptool.values.adapt", "ckptool.values.blocks"]
    (package / "io" / "remote").mkdir()
    (package / "io" / "remote" / "__init__.py").write_text("")
    text = "\n## The house\n\n```\nckptool/\n  io/  3  BYTES\n  ops/  5  A: diff\n  core/  2  B: tree\n```\n"
    assert unlisted(package, house.rooms(text)) == [
        "formats/npz.py",
        "io/remote",
        "io/source.py",
        "values/adapt.py",
        "values/blocks.py",
    ]
    assert ("torch.nn", 3, True) in imports(package, Path("core/tree.py"))


def test_jobs_on_headers_and_plain_bytes_load_neither_torch_nor_numpy() -> None:
    jobs = [
        "ckptool.open(name).state_dict()",
        "ckptool.diff(name, name)",
        "ckptool.filter(name, include=['fc.*'])",
        "ckptool.save(ckptool.open(name), 'copy.pth')",
        "ckptool.save(ckptool.open(name), 'copy.safetensors')",
    ]
    script = f"""
import sys, ckptool
name = {str(FIXTURES / "resnet_new.pth")!r}
for job in {jobs!r}:
    exec(job)
    if {HEAVY!r} & set(sys.modules):
        print(job, {HEAVY!r} & set(sys.modules))
"""
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert (run.stdout, run.stderr) == ("", "")
