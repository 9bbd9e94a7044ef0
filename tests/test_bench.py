"""The benchmark's runner, with inputs so small that its figures mean nothing: no time can fail here."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from oracles import FIXTURES

RUNNER = FIXTURES.parent / "bench" / "run.py"
TINY = ["--mb", "1", "--keys", "20", "--rounds", "1"]


def test_the_benchmark_runs_every_job_and_leaves_only_its_json(tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    command = [sys.executable, RUNNER, *TINY, "--without", "torch", "--dir", work, "--json", tmp_path / "bench.json"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert list(work.iterdir()) == []

    report = json.loads((tmp_path / "bench.json").read_text())
    rows = report["rows"]
    both = {f"{job} {suffix}" for job in ("inspect", "remap") for suffix in (".pth", ".safetensors")}
    large = {row["job"].strip() for row in rows if row["size"] == "1 MB"}
    assert large == both | {
        "diff .pth", "filter .pth", "convert .pth -> .safetensors", "the same, --no-verify",
        "convert .safetensors -> .pth, --no-verify", "inspect legacy .pth", "diff --values, equal", "the same, --quick",
        "diff --values, half differ", "inspect --stats", "inspect --hash",
    }  # fmt: skip
    assert {row["job"].strip() for row in rows if row["size"] == "20 keys"} == both | {"diff .pth", "the same, --flat"}
    assert {row["job"] for row in rows if not row["size"]} == {"--version", "--help"}
    for row in rows:
        ours, limit = row["ckptool"], row["limit"]
        assert len(ours["wall"]) == len(ours["cpu"]) == len(limit["ratios"]) == 1
        assert 0 < ours["min"] <= ours["median"] <= ours["max"]
        assert ours["peak"] > 4e6
        assert row["job"] in run.stdout
        if row["peer"]["name"] in ("safe_open", "sha256sum", "python -c pass"):
            assert row["peer"]["ratio"] > 0
        else:
            assert row["peer"]["skipped"] == "torch is not there"
    assert report["cache"] == "warm"
    assert report["machine"]["torch"] is None
    assert str(tmp_path) not in run.stdout + json.dumps(report)


def test_a_peer_that_fails_is_told_and_ckptool_failing_ends_the_benchmark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(RUNNER.parent))
    run = importlib.import_module("run")
    bench = run.Bench(tmp_path, 1, {})
    works, fails = ([sys.executable, "-c", code] for code in ("pass", "raise SystemExit('no such thing')"))
    bench.group("tiny", {"job": works}, run.Other("peer", (), fails), run.Other("limit", (), works))
    assert bench.rows[0]["peer"] == {"name": "peer", "skipped": "exit 1: no such thing"}
    assert bench.rows[0]["limit"]["ratio"] > 0
    with pytest.raises(SystemExit, match="ckptool failed at job, tiny: exit 1: no such thing"):
        bench.group("tiny", {"job": fails}, run.PASS, run.PASS)
    assert not bench.outputs.exists()
