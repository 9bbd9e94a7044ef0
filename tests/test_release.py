"""What a release consists of: one version, what the sdist must have, what its classifiers promise."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib

import pytest

import ckptool
from tests.transcripts import REPOSITORY

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())


def test_there_is_one_version_and_all_that_name_it_agree() -> None:
    assert PROJECT["project"]["dynamic"] == ["version"]
    assert PROJECT["tool"]["hatch"]["version"]["path"] == "ckptool/__init__.py"
    citation = (REPOSITORY / "CITATION.cff").read_text()
    assert re.search(r"^version: (.*)$", citation, re.MULTILINE)[1] == ckptool.__version__
    assert ckptool.__version__ in (REPOSITORY / "CHANGELOG.md").read_text()


def test_the_console_script_and_the_module_are_one_program() -> None:
    assert PROJECT["project"]["scripts"] == {"ckptool": "ckptool.cli:main"}
    done = subprocess.run([sys.executable, "-m", "ckptool", "--version"], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == (f"ckptool {ckptool.__version__}\n", "")


def test_the_pythons_and_systems_promised_begin_with_the_oldest_that_is_required() -> None:
    promised = PROJECT["project"]["classifiers"]
    versions = [line.rpartition(" ")[2] for line in promised if re.search(r":: Python :: 3\.\d+$", line)]
    assert versions == ["3.11", "3.12", "3.13", "3.14"]
    assert PROJECT["project"]["requires-python"] == f">={versions[0]}"
    assert PROJECT["tool"]["ruff"]["target-version"] == "py311"
    assert {line.split(" :: ")[1] for line in promised if line.startswith("Operating")} == {
        "POSIX",
        "MacOS",
        "Microsoft",
    }


def test_the_sdist_has_all_that_its_tests_read() -> None:
    if not (REPOSITORY / ".git").exists():
        pytest.skip("not in a checkout")
    listed = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    tops = {line.partition("/")[0] for line in listed.splitlines()}
    included = {name.removeprefix("/") for name in PROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]}
    left = {top for top in tops if top not in included and not (top.endswith(".md") and "*.md" in included)}
    assert left - {"pyproject.toml", "PKG-INFO"} == {".ci"}  # hatchling adds the first; CI runs on checkouts only


def test_no_deprecation_that_a_later_python_turns_into_an_error_is_met_at_start() -> None:
    script = "import ckptool.cli.app as app; [app.app.get_command(None, name) for name in app.COMMANDS]"
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True)
    assert done.stderr == ""
