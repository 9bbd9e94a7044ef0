"""Inputs in stores: an S3 server over HTTP, and the file system in memory of fsspec."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from oracles import FIXTURES, Run
from servers import s3

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("models")
    for name in ("resnet_new.pth", "resnet_old.safetensors", "sharded"):
        file = FIXTURES / name
        for one in [file] if file.is_file() else file.iterdir():
            there = place / one.relative_to(FIXTURES)
            there.parent.mkdir(exist_ok=True)
            there.write_bytes(one.read_bytes())
    state = {f"layer{n}.w": torch.randn(300, 100) for n in range(5)}
    dcp.save({"model": state, "step": 3}, checkpoint_id=place / "dcp")
    (place / "adapter").mkdir()
    (place / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    torch.save({"base.lora_A.weight": torch.ones(2, 3)}, place / "adapter" / "adapter_model.bin")
    (place / "big").mkdir()
    torch.save({f"l{n}": torch.full((1 << 18,), float(n)) for n in range(16)}, place / "big" / "m.pth")
    return place


@pytest.fixture(scope="module")
def store(root: Path) -> Any:
    with pytest.MonkeyPatch.context() as patch, s3(root, patch) as asked:
        import fsspec

        fsspec.config.set_conf_env(fsspec.config.conf)
        yield asked


CALLS = [
    ["inspect", "--hash", "resnet_new.pth"],
    ["inspect", "--hash", "sharded"],
    ["inspect", "--hash", "sharded/model.safetensors.index.json"],
    ["inspect", "--hash", "dcp"],
    ["inspect", "--hash", "dcp/.metadata"],
    ["inspect", "adapter"],
    ["diff", "--values", "resnet_new.pth", "resnet_old.safetensors"],
    ["diff", "dcp", "dcp"],
]


@pytest.mark.parametrize("call", CALLS, ids=" ".join)
def test_what_is_in_s3_is_read_as_what_is_here(call: list[str], store: Any, root: Path, run: Run) -> None:
    words = [word for word in call[1:] if word.startswith("--")]
    names = [word for word in call[1:] if not word.startswith("--")]
    local = run(call[0], "--json", *words, *(root / name for name in names))
    remote = run(call[0], "--json", *words, *(f"s3://models/{name}" for name in names))
    assert (remote[0], remote[2]) == (local[0], "")
    assert json.loads(remote[1].replace("s3://models", str(root))) == json.loads(local[1])


def test_a_look_at_a_file_takes_few_requests(store: Any, run: Run) -> None:
    store.clear()
    assert run("inspect", "s3://models/big/m.pth")[0] == 0
    assert len(store) <= 6, store


def test_the_shards_of_an_index_take_a_listing_and_two_requests_each(store: Any, root: Path, run: Run) -> None:
    store.clear()
    assert run("inspect", "s3://models/sharded")[0] == 0
    shards = len([*(root / "sharded").glob("*.safetensors")])
    assert len(store) <= 8 + 3 * shards, store


def test_a_layer_is_all_that_moves(store: Any, run: Run) -> None:
    store.clear()
    code, _, err = run("filter", "-v", "s3://models/big/m.pth", "--include", "l7", "-o", "l7.pth")
    assert (code, torch.load("l7.pth")["l7"].unique().tolist()) == (0, [7.0])
    ranges = [asked.removeprefix("bytes=").split("-") for _, _, asked in store if asked]
    assert sum(int(end) - int(begin) + 1 for begin, end in ranges) < (1 << 20) + 4 * (1 << 18)
    assert " requests, in " in err


def test_what_is_not_there_or_not_allowed_is_one_line(store: Any, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for url in ("s3://models/none.pth", "s3://models/none/", "s3://none/x.pth", "s3://models/big/m.pth/x"):
        code, _, err = run("inspect", url)
        assert (code, err.count("\n"), url in err) == (2, 1, True), err
        assert "s3cr3t" not in err


def test_an_object_that_is_replaced_meanwhile_is_noticed(store: Any, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    import ckptool
    from ckptool.errors import FormatError

    monkeypatch.setattr("ckptool.io.remote.ranges.PAUSE", 0.01)
    opened = ckptool.open("s3://models/resnet_new.pth")
    import boto3

    client = boto3.client("s3")
    content = (FIXTURES / "resnet_new.pth").read_bytes()
    client.put_object(Bucket="models", Key="resnet_new.pth", Body=content + b"more")
    try:
        with pytest.raises(FormatError, match=r"changed since it was opened|changed while it was read"):
            opened.to_torch()
    finally:
        client.put_object(Bucket="models", Key="resnet_new.pth", Body=content)


def test_a_store_that_answers_with_more_than_it_was_asked_for_is_refused(run: Run) -> None:
    import fsspec
    from fsspec.implementations.memory import MemoryFile

    fsspec.filesystem("memory").pipe_file("/odd/a.pth", (FIXTURES / "resnet_old.pth").read_bytes())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MemoryFile, "read", lambda self, size=-1: self.getvalue() + b"x")
        code, _, err = run("inspect", "memory://odd/a.pth")
    assert (code, err.count("\n"), "other bytes than those that it was asked for" in err) == (2, 1, True)


def test_a_file_of_a_store_that_is_replaced_meanwhile_is_noticed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    import ckptool
    from ckptool.errors import FormatError

    store = fsspec.filesystem("memory")
    content = (FIXTURES / "resnet_old.pth").read_bytes()
    store.pipe_file("/odd/b.pth", content)
    opened = ckptool.open("memory://odd/b.pth")
    store.pipe_file("/odd/b.pth", content)
    with pytest.raises(FormatError, match="it was changed since it was opened"):
        opened.to_torch()
