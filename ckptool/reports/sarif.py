"""SARIF 2.1.0, the Static Analysis Results Interchange Format: one run, a result for each problem.

The specification is https://docs.oasis-open.org/sarif/sarif/v2.1.0/sarif-v2.1.0.html. A result's place is the file, and
its keys are the logical location. GitHub's code scanning also asks for a line, which a checkpoint does not have: 1.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

from ckptool.io.paths import is_url
from ckptool.reports.outcome import Outcome, Problem

HOME = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"


def text(outcomes: Sequence[Outcome]) -> str:
    """Returns the document of all outcomes."""
    judged = [(one, problem) for one in outcomes for problem in one.problems if one.status != "error"]
    ids = dict.fromkeys(_rule(one, problem) for one, problem in judged)
    rules = [{"id": name, "shortDescription": {"text": f"ckptool {name.replace('/', ': ')}"}} for name in ids]
    driver = {"name": "ckptool", "rules": rules}
    results = [_result(one, problem) for one, problem in judged]
    if any(problem.reason is not None for _, problem in judged):  # all results have suppressions, or none (3.27.23)
        for (_, problem), result in zip(judged, results, strict=True):
            result["suppressions"] = _suppressions(problem)
    run = {
        "tool": {"driver": driver},
        "invocations": [_invocation(outcomes)],
        "results": results,
    }
    return json.dumps({"$schema": HOME, "version": "2.1.0", "runs": [run]}, indent=1) + "\n"


def _rule(one: Outcome, problem: Problem) -> str:
    return f"{one.command}/{problem.kind}"


def _result(one: Outcome, problem: Problem) -> dict[str, Any]:
    physical = {"artifactLocation": {"uri": _uri(one.path)}, "region": {"startLine": 1}}
    location: dict[str, Any] = {"physicalLocation": physical} if one.path else {}
    if problem.key:
        location["logicalLocations"] = [{"fullyQualifiedName": problem.key, "kind": "member"}]
    identity = "\0".join((one.path, problem.kind, problem.key)).encode("utf-8", "surrogatepass")
    return {
        "ruleId": _rule(one, problem), "level": problem.level, "message": _message(str(problem)),
        "locations": [location] if location else [],
        "partialFingerprints": {"keys/v1": hashlib.sha256(identity).hexdigest()[:32]},
    }  # fmt: skip


def _suppressions(problem: Problem) -> list[dict[str, str]]:
    if problem.reason is None:
        return []
    return [{"kind": "external", **({"justification": problem.reason} if problem.reason else {})}]


def _invocation(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Returns whether all was judged, with errors, verdicts and notes as notifications."""
    said = []
    for one in outcomes:
        level = "error" if one.status == "error" else "note"
        lines = [": ".join(filter(None, (one.title, one.verdict))), *one.notes]
        places = [{"physicalLocation": {"artifactLocation": {"uri": _uri(one.path)}}}] if one.path else []
        said += [{"level": level, "message": _message(line), "locations": places} for line in lines]
    judged = all(one.status != "error" for one in outcomes)
    return {"executionSuccessful": judged, "toolExecutionNotifications": said}


def _message(said: str) -> dict[str, str]:
    """Returns a message; braces would be placeholders (3.11.5), brackets links (3.11.6)."""
    for mark, escaped in (("\\", "\\\\"), ("[", "\\["), ("]", "\\]"), ("{", "{{"), ("}", "}}")):
        said = said.replace(mark, escaped)
    return {"text": said}


def _uri(path: str) -> str:
    """Returns a path as a relative reference, or as a URI if it is absolute or one already."""
    if is_url(path):
        return quote(path, safe="/:?&=%*@+")
    quoted = quote(os.fsencode(path.replace(os.sep, "/")))
    return f"file://{quoted}" if os.path.isabs(path) else quoted
