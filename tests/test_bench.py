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


@pytest.mark.slow
def test_the_benchmark_runs_every_job_and_leaves_only_its_json(tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    command = [sys.executable, RUNNER, *TINY, "--without", "torch", "--dir", work, "--json", tmp_path / "bench.json"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert list(work.iterdir()) == []

    report = json.loads((tmp_path / "bench.json").read_text())
    rows = report["rows"]

    def jobs(size: str) -> set[str]:
        return {row["job"].strip() for row in rows if row["size"] == size and row["cache"] == "warm"}

    torch = {"inspect .pth", "diff .pth"}
    both = {"remap .pth", "remap .safetensors"}
    assert jobs("") == {"--version", "--help"}
    assert jobs("100 MB") == torch
    assert jobs("1 MB") - {"remap .pth, reflink", "the same, one core"} == torch | both | {
        "inspect .safetensors", "inspect legacy .pth", "remap .pth, --no-fsync", "filter .pth",
        "convert .pth -> .safetensors, --no-verify", "the same, --verify", "convert .safetensors -> .pth, --no-verify",
        "diff --values, equal", "diff --quick, equal", "diff --values, half differ",
        "inspect --stats, bf16", "inspect --stats, fp32", "inspect --hash",
    }  # fmt: skip
    assert jobs("20 keys") == both | {
        "inspect .pth --json", "inspect .pth --flat", "diff .pth", "inspect .safetensors --json",
    }  # fmt: skip
    for row in rows:
        ours, limit = row["ckptool"], row["limit"]
        assert len(ours["wall"]) == len(ours["cpu"]) == len(limit["ratios"]) == 1
        assert 0 < ours["min"] <= ours["median"] <= ours["max"]
        assert ours["peak"] > 4e6
        assert row["job"] in run.stdout
        for peer in row["peers"]:
            if peer["name"] in ("safe_open", "sha256sum"):
                assert peer["ratio"] > 0
            else:
                assert peer["skipped"] == "torch is not there"
    assert report["machine"]["torch"] is None
    assert str(tmp_path) not in run.stdout + json.dumps(report)


def test_a_peer_that_fails_is_told_and_ckptool_failing_ends_the_benchmark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(RUNNER.parent))
    measure, peers = importlib.import_module("measure"), importlib.import_module("peers")
    bench = measure.Bench(tmp_path, 1, {})
    works, fails = ([sys.executable, "-c", code] for code in ("pass", "raise SystemExit('no such thing')"))
    fails_too, limit = peers.Other("peer", (), fails), peers.Other("limit", (), works)
    bench.group("tiny", {"job": works}, [fails_too], limit)
    assert bench.rows[0]["peers"] == [{"name": "peer", "skipped": "exit 1: no such thing"}]
    assert bench.rows[0]["limit"]["ratio"] > 0
    with pytest.raises(SystemExit, match="ckptool failed at job, tiny: exit 1: no such thing"):
        bench.group("tiny", {"job": fails}, [], peers.PASS)
    assert not bench.outputs.exists()


def test_only_the_jobs_asked_for_run(tmp_path: Path) -> None:
    command = [sys.executable, RUNNER, *TINY, "--dir", tmp_path, "--only", "^inspect .safetensors .*keys", "--markdown"]
    run = subprocess.run([*command, "--without", "torch"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    rows = [line for line in run.stdout.splitlines() if line.startswith("| ")]
    assert len(rows) == 3
    assert rows[2].startswith("| inspect .safetensors --json | 20 keys | ")
