"""The floors of the house: who may import whom. Read from the source, so nothing has to be imported to be judged."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from oracles import FIXTURES

import ckptool.formats

PACKAGE = Path(ckptool.formats.__file__).parents[1]
FILES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))

FLOORS = {
    "errors": 0, "dtypes": 0, "limits": 0,
    "tree": 1, "checkpoint": 1, "modules": 1, "roots": 1, "keys": 1, "optimizers": 1, "aliases": 1, "moments": 1,
    "findings": 1, "pickled_names": 1,
    "pickles": 2, "picklewriter": 2, "rebuild": 2, "files": 2, "zips": 2, "zipwriter": 2, "layout": 2,
    "streams": 2, "data": 2, "values": 2, "real": 2, "flat": 2, "nesting": 2, "safetensors_file": 2, "casts": 2,
    "adapted": 2, "drawn": 2, "quantiles": 2, "live": 2, "kernels": 2, "readthrough": 2, "contents": 2, "gaps": 2,
    "outputs": 2, "leftovers": 2,
    "ops": 2, "formats": 3, "saving": 4, "api": 4, "__init__": 4, "cli": 5, "__main__": 5,
}  # fmt: skip

HEAVY = {"numpy", "torch", "safetensors"}
MAY_COMPUTE = {
    "adapted", "casts", "data", "drawn", "gaps", "kernels", "quantiles", "real", "saving", "values",
}  # fmt: skip


def floor_of(module: str) -> int | None:
    """The floor of ``ckptool.ops.diff`` is that of ``ops``; of ``ckptool`` itself that of ``__init__``."""
    inner = module.split(".")[1:] or ["__init__"]
    return FLOORS.get(inner[0])


def name_of(path: Path) -> str:
    parts = [*path.with_suffix("").parts]
    return ".".join(["ckptool", *(parts if parts != ["__init__"] else [])]).removesuffix(".__init__")


def imports(path: Path) -> list[tuple[str, ast.stmt, bool, bool]]:
    """Every (module, statement, inside a function, only for the type checker) that a file imports."""
    return imports_of(PACKAGE, path)


@cache
def imports_of(package: Path, path: Path) -> list[tuple[str, ast.stmt, bool, bool]]:

    def visit(node: ast.AST, inside: bool, typing: bool) -> Iterator[tuple[str, ast.stmt, bool, bool]]:
        for child in ast.iter_child_nodes(node):
            deeper = inside or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            only = typing or (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test))
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield alias.name, child, inside, typing
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path}: a relative import"
                module = child.module or ""
                for alias in child.names:
                    below = package.parent / Path(*module.split("."), alias.name)
                    known = below.with_suffix(".py").exists() or (below / "__init__.py").exists()
                    yield (f"{module}.{alias.name}" if known else module), child, inside, typing
            else:
                yield from visit(child, deeper, only)

    return list(visit(ast.parse((package / path).read_text()), False, False))


def ours(path: Path) -> list[str]:
    return [module for module, _, _, _ in imports(path) if module.split(".")[0] == "ckptool"]


@pytest.mark.parametrize("path", FILES, ids=str)
def test_every_file_has_a_floor(path: Path) -> None:
    assert floor_of(name_of(path)) is not None


@pytest.mark.parametrize("path", FILES, ids=str)
def test_a_file_imports_its_own_floor_or_lower(path: Path) -> None:
    floor = floor_of(name_of(path))
    assert floor is not None
    higher = [module for module in ours(path) if (floor_of(module) or 0) > floor]
    assert higher == []


@pytest.mark.parametrize("path", [path for path in FILES if path.parts[0] == "ops"], ids=str)
def test_operations_do_no_input_or_output(path: Path) -> None:
    banned = {
        "files", "pickles", "picklewriter", "data", "formats", "values", "real", "zips", "zipwriter", "layout",
        "streams", "api", "kernels", "readthrough", "contents", "outputs", "leftovers",
    }  # fmt: skip
    assert [module for module in ours(path) if module.split(".")[1] in banned] == []
    outside = {module.split(".")[0] for module, _, _, _ in imports(path)}
    assert not outside & {"os", "io", "pathlib", "mmap", "json", "pickle", "shutil", *HEAVY}


@pytest.mark.parametrize("path", [path for path in FILES if path.parts[0] == "formats"], ids=str)
def test_formats_know_neither_each_other_nor_the_operations(path: Path) -> None:
    if path.name != "__init__.py":
        assert [module for module in ours(path) if module.split(".")[1] in ("formats", "ops")] == []


@pytest.mark.parametrize("path", [path for path in FILES if path.parts[0] == "cli"], ids=str)
def test_the_command_line_speaks_to_the_library_its_reports_and_errors_only(path: Path) -> None:
    # And to what the library's answers are made of: checkpoints, reports (ops, findings), and how names fold (keys).
    allowed = {f"ckptool.{name}" for name in ("saving", "checkpoint", "errors", "keys", "findings")} | {"ckptool"}
    others = {m for m in ours(path) if m not in allowed and not m.startswith(("ckptool.cli", "ckptool.ops"))}
    assert others == set()


@pytest.mark.parametrize("path", FILES, ids=str)
def test_heavy_libraries_are_imported_inside_functions_of_few_files(path: Path) -> None:
    for module, _, inside, typing in imports(path):
        if module.split(".")[0] in HEAVY:
            assert path.stem in MAY_COMPUTE, f"{path} imports {module}"
            assert inside or typing, f"{path} imports {module} at the top"


@pytest.mark.parametrize("path", FILES, ids=str)
def test_the_terminal_is_known_in_the_command_line_only(path: Path) -> None:
    used = {module.split(".")[0] for module, _, _, _ in imports(path)}
    if path.parts[0] != "cli":
        assert not used & {"typer", "rich", "click"}


@pytest.mark.parametrize("path", FILES, ids=str)
def test_pythons_own_unpickler_is_used_in_one_file(path: Path) -> None:
    used = {module.split(".")[0] for module, _, _, _ in imports(path)}
    assert not used & {"pickle", "_pickle", "marshal", "shelve"} or path.stem == "pickles"


@pytest.mark.parametrize("path", FILES, ids=str)
def test_no_assertion_stands_on_user_data(path: Path) -> None:
    tree = ast.parse((PACKAGE / path).read_text())
    assert [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Assert)] == []


@pytest.mark.parametrize("path", FILES, ids=str)
def test_nothing_is_evaluated_or_imported_by_a_name_from_a_file(path: Path) -> None:
    tree = ast.parse((PACKAGE / path).read_text())
    called = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert not called & {"eval", "exec", "compile", "__import__", "pickle.loads", "pickle.load"}
    # the registries of formats and of commands import their own files; and what the user names with --model
    if path not in (Path("formats/__init__.py"), Path("cli/app.py"), Path("cli/load_partial.py")):
        assert "importlib.import_module" not in called


def test_the_rules_can_be_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ckptool").mkdir()
    (tmp_path / "ckptool" / "tree.py").write_text("def f():\n    from ckptool import data\n    import torch.nn\n")
    (tmp_path / "ckptool" / "data.py").write_text("")
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path / "ckptool")
    found = {(module, inside) for module, _, inside, _ in imports(Path("tree.py"))}
    assert found == {("ckptool.data", True), ("torch.nn", True)}
    with pytest.raises(AssertionError):
        test_a_file_imports_its_own_floor_or_lower(Path("tree.py"))
    with pytest.raises(AssertionError):
        test_heavy_libraries_are_imported_inside_functions_of_few_files(Path("tree.py"))


@pytest.mark.parametrize(
    "job",
    [
        "ckptool.open(name).state_dict()",
        "ckptool.diff(name, name)",
        "ckptool.filter(name, include=['fc.*'])",
        "ckptool.save(ckptool.open(name), 'copy.pth')",
        "ckptool.save(ckptool.open(name), 'copy.safetensors')",
    ],
)
def test_jobs_on_headers_and_plain_bytes_load_neither_torch_nor_numpy(job: str) -> None:
    script = f"""
import sys, ckptool
name = {str(FIXTURES / "resnet_new.pth")!r}
{job}
print(sorted({HEAVY!r} & set(sys.modules)))
"""
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert (run.stdout.strip(), run.stderr) == ("[]", "")
