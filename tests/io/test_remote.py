"""Inputs behind URLs: each command gives what it gives for the files of this machine, with few requests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from oracles import FIXTURES, Run
from servers import Server, serving
from sparse import write_sparse

FILES = [
    "resnet_new.pth", "resnet_legacy.pth", "resnet_old.safetensors", "dense.gguf", "views.pth", "deflated.pth",
    "sharded/model.safetensors.index.json",
]  # fmt: skip


@pytest.fixture(scope="module")
def fixtures() -> Iterator[Server]:
    with serving(FIXTURES) as server:
        yield server


def same(run: Run, local: list[object], remote: list[object], *places: tuple[object, object]) -> None:
    """Checks that two calls differ in nothing but the places of their files."""
    code, wanted, err = run(*local)
    found = run(*remote)
    assert found[0] == code, found[2]
    out = found[1]
    for here, there in places:
        out = out.replace(str(there), str(here))
    assert json.loads(out) == json.loads(wanted)
    assert err == ""


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("options", [[], ["--hash", "--check", "--stats"]], ids=["headers", "values"])
def test_inspect_of_a_url_is_inspect_of_the_file(name: str, options: list[str], fixtures: Server, run: Run) -> None:
    call = ["inspect", "--json", *options]
    same(run, [*call, FIXTURES / name], [*call, f"{fixtures.url}/{name}"], (FIXTURES, fixtures.url))


def test_diff_of_two_urls_is_diff_of_the_files(fixtures: Server, run: Run) -> None:
    names = ("resnet_new.pth", "resnet_old.pth")
    call = ["diff", "--json", "--values"]
    here, there = [[*call, *(f"{root}/{name}" for name in names)] for root in (FIXTURES, fixtures.url)]
    same(run, [*here], [*there], (FIXTURES, fixtures.url))


def test_a_whole_file_is_one_request(fixtures: Server, run: Run) -> None:
    before = len(fixtures.asked)
    assert run("inspect", f"{fixtures.url}/resnet_new.pth")[0] == 0
    assert len(fixtures.asked) - before == 1


def test_a_directory_over_https_says_that_it_has_no_listing(fixtures: Server, run: Run) -> None:
    code, _, err = run("inspect", f"{fixtures.url}/sharded/")
    assert (code, err.count("\n"), "lists no names: name a file" in err) == (2, 1, True)


def test_a_missing_shard_over_https_is_named(tmp_path: Path, run: Run) -> None:
    for file in (FIXTURES / "sharded").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    gone = sorted(tmp_path.glob("*.safetensors"))[0]
    gone.unlink()
    with serving(tmp_path) as server:
        name = "model.safetensors.index.json"
        local, remote = run("inspect", tmp_path / name), run("inspect", f"{server.url}/{name}")
    assert f"missing shards: {gone.name}" in remote[1]
    assert remote[1].replace(server.url, str(tmp_path)) == local[1]


def test_a_member_of_an_archive_is_read_where_it_lies(run: Run, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as made:
        made.write(FIXTURES / "resnet_old.pth", "deep/a.pth")
        for file in (FIXTURES / "sharded").iterdir():
            made.write(file, f"sharded/{file.name}")
    with serving(tmp_path) as server:
        for archive in (f"{server.url}/all.zip", f"{tmp_path}/all.zip", f"file://{tmp_path}/all.zip"):
            for name in ("deep/a.pth", "sharded"):
                here = FIXTURES / ("resnet_old.pth" if name == "deep/a.pth" else name)
                call = ["inspect", "--json", "--hash"]
                there = f"zip://{name}::{archive}"
                shown = there.replace("file://", "")
                places = ((here, there), (here, shown), (FIXTURES / "sharded", there.replace("::", "/::")))
                code, out, err = run(*call, there)
                assert (code, err) == (0, "")
                wanted = json.loads(run(*call, here)[1])["result"][0]
                found = json.loads(out)["result"][0]
                assert found["hash"] == wanted["hash"]
                assert [row["key"] for row in found["tensors"]] == [row["key"] for row in wanted["tensors"]]
                assert places


def test_file_urls_are_paths_of_this_machine(run: Run) -> None:
    path = FIXTURES / "resnet_old.pth"
    assert run("inspect", "--json", f"file://{path}") == run("inspect", "--json", path)


def test_a_store_of_fsspec_is_listed_and_read(run: Run) -> None:
    import fsspec

    store = fsspec.filesystem("memory")
    for file in (FIXTURES / "sharded").iterdir():
        store.pipe_file(f"/models/m/{file.name}", file.read_bytes())
    call = ["inspect", "--json", "--hash"]
    same(run, [*call, FIXTURES / "sharded"], [*call, "memory://models/m"], (FIXTURES / "sharded", "memory://models/m"))
    code, _, err = run("inspect", "memory://models/none")
    assert (code, err) == (2, "ckptool: error: memory://models/none: no such file or directory\n")


def test_a_filter_of_one_layer_moves_that_layer(tmp_path: Path, run: Run) -> None:
    torch.save({f"layer{n}.w": torch.full((1 << 19,), float(n)) for n in range(24)}, tmp_path / "big.pth")
    with serving(tmp_path) as server:
        assert run("filter", f"{server.url}/big.pth", "--include", "layer7.*", "-o", "one.pth")[0] == 0
        assert server.sent < (1 << 21) + 3 * (1 << 18)
    assert torch.equal(torch.load("one.pth")["layer7.w"], torch.full((1 << 19,), 7.0))


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_a_look_at_ten_gigabytes_moves_some_hundred_kilobytes(suffix: str, tmp_path: Path, run: Run) -> None:
    sizes = {f"model.layers.{n}.mlp.up_proj.weight": 1 << 22 for n in range(600)}
    file = write_sparse(tmp_path / f"big.{suffix}", sizes)
    assert file.stat().st_size > 10_000_000_000
    with serving(tmp_path) as server:
        code, _, err = run("inspect", "-v", f"{server.url}/big.{suffix}")
        asked, sent = len(server.asked), server.sent
        assert (code, asked <= 6, sent < 4_000_000) == (0, True, True)
        requests = "1 request" if asked == 1 else f"{asked} requests"
        assert f"big.{suffix}: read {sent // 1000} kB in {requests}" in err
        assert run("diff", f"{server.url}/big.{suffix}", f"{server.url}/big.{suffix}")[0] == 0
        assert len(server.asked) == 3 * asked
        sent = server.sent
        server.asked.clear()
        chosen = f"{server.url}/big.{suffix}", "--include", "*.500.*", "-o", "one.pth"
        assert run("filter", *chosen)[0] == 0
        assert server.sent - sent < (1 << 24) + 1_000_000
        assert len(server.asked) <= 8  # cells of 4 MB, and the headers twice
    assert torch.load("one.pth")["model.layers.500.mlp.up_proj.weight"].shape == (1 << 22,)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_shards_are_opened_in_one_wave(suffix: str, tmp_path: Path, run: Run) -> None:
    weight_map = {}
    for n in range(12):
        name = f"model-{n + 1:05}-of-00012.{suffix}"
        file = write_sparse(tmp_path / f"{n}.{'pth' if suffix == 'bin' else suffix}", {f"l{n}.w": 1_000_000})
        file.rename(tmp_path / name)
        weight_map[f"l{n}.w"] = name
    index = f"{'pytorch_model' if suffix == 'bin' else 'model'}.{suffix}.index.json"
    (tmp_path / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    each = 2 if suffix == "bin" else 1  # the directory of a zip is at its end
    with serving(tmp_path, faults={f"/{name}": 0.3 for name in weight_map.values()}) as server:
        assert run("inspect", f"{server.url}/{index}")[0] == 0
        assert len(server.asked) == 1 + each * 12
        assert server.most >= 8


def test_neighbours_are_joined_and_order_does_not_matter(tmp_path: Path, run: Run) -> None:
    state = {f"layer{n:03}.w": torch.full((2000 + n,), float(n)) for n in range(500)}
    torch.save(state, tmp_path / "many.pth")
    turned = {key: torch.zeros_like(state[key]) for key in reversed(state)}
    torch.save(turned, "turned.pth")
    size = (tmp_path / "many.pth").stat().st_size
    with serving(tmp_path) as server:
        for number, target in enumerate((tmp_path / "many.pth", "turned.pth")):
            server.asked.clear()
            before = server.sent
            assert run("filter", "--match", target, f"{server.url}/many.pth", "-o", f"out{number}.pth")[0] == 0
            assert len(server.asked) < 10
            assert server.sent - before < 1.2 * size
            made = torch.load(f"out{number}.pth")
            assert all(torch.equal(made[key], state[key]) for key in state)
            assert list(made) == list(torch.load(target))


def test_every_command_takes_urls_for_everything_that_it_reads(tmp_path: Path, run: Run) -> None:
    torch.save({"a.w": torch.ones(2, 3), "b.w": torch.rand(4, 2)}, tmp_path / "m.pth")
    (tmp_path / "rules.json").write_text('[{"rename": "a", "to": "c"}]')
    (tmp_path / "s.toml").write_text('schema = 1\n[keys]\n"a.*" = { shape = [2, "?"] }\n"none" = {}\n')
    (tmp_path / "rows.txt").write_text("1\n0\n")
    torch.save({"a.w": torch.zeros(2, 3), "b.w": torch.zeros(2, 2)}, tmp_path / "n.pth")
    assert run("inspect", "--lock", tmp_path / "m.lock", tmp_path / "m.pth")[0] == 0
    calls: list[list[str]] = [
        ["remap", "m.pth", "--rules", "rules.json", "-o", "OUT"],
        ["load-partial", "m.pth", "--into", "n.pth", "--adapt", "b.w=rows:select=rows.txt", "-o", "OUT"],
        ["filter", "--match", "n.pth", "m.pth", "-o", "OUT"],
        ["convert", "m.pth", "-o", "OUT", "--dtype", "bf16"],
        ["diff", "m.lock", "m.pth"],
        ["diff", "s.toml", "m.pth"],
    ]
    with serving(tmp_path) as server:
        for call in calls:
            outs = []
            for root in (str(tmp_path), server.url):
                words = [word.replace("rows.txt", f"{root}/rows.txt") for word in call]
                words = [f"{root}/{word}" if (tmp_path / word).is_file() else word for word in words]
                out = f"out{len(outs)}.pth"
                done = run(*(out if word == "OUT" else word for word in words), *["--force"] * ("OUT" in call))
                outs.append((done[0], done[1].replace(root, "ROOT").replace(out, "OUT")))
                if "OUT" in call:
                    outs[-1] += (Path(out).read_bytes(),)
            assert outs[0] == outs[1], call
            assert outs[0][0] == int(call[1] == "s.toml"), call


def test_names_with_spaces_and_queries_are_found_beside_an_index(tmp_path: Path, run: Run) -> None:
    for name in ("model 1#a%.safetensors", "model-é+.safetensors"):
        write_sparse(tmp_path / "x.safetensors", {name: 3}).rename(tmp_path / name)
    weight_map = {file.name: file.name for file in tmp_path.glob("*.safetensors")}
    (tmp_path / "my index.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with serving(tmp_path) as server:
        code, out, err = run("inspect", "--keys", f"{server.url}/my%20index.safetensors.index.json?download=true")
        assert (code, sorted(out.splitlines()), err) == (0, sorted(weight_map), "")
        assert all(path.endswith("?download=true") for path, _, _ in server.asked)


@pytest.mark.parametrize(
    ("url", "missing", "extra"),
    [
        ("https://host/a.pth", "fsspec", "remote"), ("s3://b/a.pth", "fsspec", "s3"), ("s3://b/a.pth", "s3fs", "s3"),
        ("hf://o/m/a.pth", "huggingface_hub", "hf"), ("gs://b/a.pth", "gcsfs", "gcs"),
        ("https://host/a.pth", "aiohttp", "remote"),
    ],
)  # fmt: skip
def test_a_library_that_is_not_installed_is_named_with_its_extra(url: str, missing: str, extra: str) -> None:
    code = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == sys.argv[1]:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
from ckptool.cli import main
sys.exit(main(sys.argv[2:]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, missing, "inspect", url], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert f"is not installed: pip install 'ckptool[{extra}]'" in done.stderr


def test_schemes_that_nobody_knows_or_that_read_other_files_are_refused(run: Run) -> None:
    for url, said in {
        "nonsense://a.pth": "no URL that can be read",
        "reference://a.json": "reference:// is not read",
        "simplecache::reference://x::memory://y": "reference:// is not read",
        "zip://a.pth": "takes the archive behind ::",
        "tar://a.pth::": "takes the archive behind ::",
    }.items():
        code, _, err = run("inspect", url)
        assert (code, err.count("\n"), said in err) == (2, 1, True), err


def test_a_member_of_a_tar_is_read_where_it_lies(tmp_path: Path, run: Run) -> None:
    with tarfile.open(tmp_path / "all.tar", "w") as made:
        made.add(FIXTURES / "resnet_old.pth", "./deep/" + "long" * 30 + "/a.pth")
    url = f"tar://deep/{'long' * 30}/a.pth::"
    with serving(tmp_path) as server:
        for archive in (f"{server.url}/all.tar", f"{tmp_path}/all.tar"):
            code, out, err = run("diff", "--values", f"{url}{archive}", FIXTURES / "resnet_old.pth")
            assert (code, err) == (0, ""), out
            assert run("inspect", f"tar://no::{archive}")[0] == 2


def test_a_url_is_no_model_in_code(run: Run) -> None:
    with serving(FIXTURES) as server:
        code, _, err = run("inspect", f"{server.url}/train.py:Net")
    assert (code, err.count("\n"), "404" in err) == (2, 1, True)
