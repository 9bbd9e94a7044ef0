"""The main job as a user of the wheel runs it, where torch cannot be imported. Run by `make smoke`."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path

fixtures = Path(sys.argv[1]).resolve()
ckptool = Path(sys.executable).with_name("ckptool")


def run(*args: str | Path, code: int = 0) -> str:
    """Returns what ckptool prints; stops the smoke test if the exit code is another."""
    done = subprocess.run([ckptool, *map(str, args)], capture_output=True, text=True)
    if done.returncode != code or "Traceback" in done.stderr:
        sys.exit(f"ckptool {' '.join(map(str, args))}: exit {done.returncode}, not {code}\n{done.stdout}{done.stderr}")
    return done.stdout


if importlib.util.find_spec("torch") is not None:
    sys.exit("torch can be imported here: this is no smoke test")
with tempfile.TemporaryDirectory() as directory:
    merged = Path(directory, "merged.pth")
    old, new = fixtures / "resnet_old.pth", fixtures / "resnet_new.pth"
    version = run("--version")
    print(version.strip())
    module = subprocess.run([sys.executable, "-m", "ckptool", "--version"], capture_output=True, text=True)
    assert module.stdout == version == f"ckptool {importlib.metadata.version('ckptool')}\n", module
    run("--help")
    assert json.loads(run("inspect", "--json", old))["result"][0]["tensors"]
    run("diff", old, new, code=1)
    run("filter", "--match", new, old, "-o", merged)
    run("diff", "--values", merged, new, code=1)
    report = json.loads(run("filter", "--json", "--match", new, old, "-o", merged.with_suffix(".safetensors")))
    assert report["result"]["counts"] == {"loaded": 100, "mismatched": 2, "bookkeeping": 20}, report
    run("inspect", fixtures / "bad" / "html.pth", code=2)
    run("inspect", fixtures / "megatron", "--tp-rules", "gpt")  # a file of the wheel that is no Python
    run("inspect", old, "--stats", "--html", Path(directory, "page.html"))
    assert 'id="data"' in Path(directory, "page.html").read_text()
    for wrong in (
        ["inspct"],
        ["inspect"],
        ["inspect", "--depth", "0", old],
        ["diff", "--rtol", "x", old, new],
        ["diff", "--no"],
    ):
        run(*wrong, code=2)
    for command in ("inspect", "diff", "filter", "remap", "convert", "load-partial"):
        assert "  -h, --help" in run(command, "--help")
    run("diff", "--values", "--rtol", "1e-3", "--ignore", "*", old, old)
    run("inspect", "--depth", "1", "--sort", "numel", "--limit", "MAX_PICKLE=1GB", old)
    run("inspect", "--limit", "MAX_PICKLE=10", old, code=2)
    order = run("remap", old, "--add-prefix", "a.", "--sub", "s/^a/b/", "--add-prefix", "c.", "--dry-run", "--json")
    assert all(row["new"].startswith("c.b.") for row in json.loads(order)["result"]["map"]), order
print(f"smoke: the wheel works without torch, with typer {importlib.metadata.version('typer')}")
