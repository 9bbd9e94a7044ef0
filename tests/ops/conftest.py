from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from oracles import Run


@pytest.fixture
def remap(run: Run) -> Callable[..., Any]:
    """Runs `remap` with rules from a file, without waiting for the disk; returns the JSON document."""

    def call(source: object, output: object, rules: Any, *options: object) -> Any:
        Path("rules.json").write_text(json.dumps(rules))
        code, out, err = run(
            "remap", source, "-o", output, "--rules", "rules.json", "--force", "--no-fsync", "--json", *options
        )
        assert (code, err) == (0, ""), err
        return json.loads(out)

    return call


@pytest.fixture
def convert(run: Run) -> Callable[..., Any]:
    """Runs `convert` without waiting for the disk; returns the one result of the JSON document."""

    def call(*args: object) -> Any:
        code, out, err = run("convert", *args, "--no-fsync", "--force", "--json")
        assert (code, err) == (0, ""), err
        document = json.loads(out)
        assert (document["schema"], document["command"], len(document["result"])) == (1, "convert", 1)
        return document["result"][0]

    return call
