"""Inputs behind URLs: each command gives what it gives for the files of this machine, with few requests."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from oracles import FIXTURES, Run
from servers import Server, serving

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


def test_a_url_is_no_output_yet(run: Run) -> None:
    code, _, err = run("convert", FIXTURES / "resnet_old.pth", "-o", "memory://out.safetensors")
    assert (code, err.count("\n"), "a URL is read, and not written" in err) == (2, 1, True)
