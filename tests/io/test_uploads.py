"""Outputs behind URLs: the bytes of a local output, there when they are complete, or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from oracles import FIXTURES, Run
from safetensors.torch import save_file
from stores import SECRETS, Store, serving_s3

import ckptool
from ckptool.errors import FormatError, OutputError
from ckptool.io.files import Files
from ckptool.io.output import LocalOutput
from ckptool.io.remote.upload import Parts, Stream, Upload

SOURCE = FIXTURES / "resnet_old.pth"
FORMATS = {
    "torch": "out.pth", "torch-legacy": "out.pth", "safetensors": "out.safetensors", "npz": "out.npz",
    "sharded": "out/", "sharded-bin": "out/", "dcp": "out/",
}  # fmt: skip


@pytest.fixture(scope="module")
def server() -> Iterator[Store]:
    with serving_s3() as store:
        yield store


@pytest.fixture
def s3(server: Store) -> Store:
    """An empty bucket."""
    server.clear()
    return server


@pytest.fixture(params=["memory", pytest.param("s3", marks=pytest.mark.slow)])
def place(request: pytest.FixtureRequest) -> Iterator[Any]:
    """A store: its URL, and what returns its objects."""
    if request.param == "s3":
        store = request.getfixturevalue("s3")
        yield store.url, store.objects
        assert store.uploads() == []
        return
    memory = fsspec.filesystem("memory")
    yield (
        "memory://bucket",
        lambda: {name.removeprefix("/bucket/"): memory.cat(name) for name in memory.find("/bucket")},
    )
    memory.store.clear()
    memory.pseudo_dirs[:] = [""]


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ckptool.io.remote.upload.PART", 5 << 20)
    monkeypatch.setattr(LocalOutput, "clones", lambda self, file: False)  # which pads a header


def big(path: str, mb: int = 12) -> str:
    save_file({"a": torch.arange(mb << 18, dtype=torch.int32), "b": torch.ones(3)}, path)
    return path


def below(directory: str) -> dict[str, bytes]:
    """The files of a local output, by what is behind its name."""
    top = Path(directory)
    if top.is_file():
        return {top.name: top.read_bytes()}
    return {f"{top.name}/{file.name}": file.read_bytes() for file in top.iterdir()}


def refused(found: tuple[int, str, str]) -> str:
    code, out, err = found
    assert (code, out, err.count("\n")) == (2, "", 1), (out, err)
    return err


@pytest.mark.parametrize("to", FORMATS)
def test_what_is_uploaded_is_what_a_local_output_has(to: str, place: Any, run: Run) -> None:
    url, objects = place
    call = ["convert", SOURCE, "--to", to, "--max-shard-size", "20kB", "--json", "-o"]
    code, said, err = run(*call, f"{url}/{FORMATS[to]}")
    assert (code, err) == (0, "")
    wanted = run(*call, FORMATS[to])
    assert said.replace(f"{url}/", "") == wanted[1]
    assert objects() == below(FORMATS[to])


def test_every_writing_command_writes_to_a_url_and_reports_there(place: Any, run: Run) -> None:
    url, objects = place
    for number, (command, *more) in enumerate((
        ("filter", "--match", SOURCE), ("remap", "--add-prefix", "x.", "--save-map", "{}/map.json"),
        ("load-partial", "--into", SOURCE),
    )):  # fmt: skip
        for there in (url, "here"):
            os.makedirs("here", exist_ok=True)
            args = [str(one).format(there) for one in more]
            call = [command, SOURCE, *args, "-o", f"{there}/{number}.pth", "--report", f"{there}/{number}.json"]
            assert run(*call)[::2] == (0, "")
    found = {name: data.replace(url.encode(), b"here") for name, data in objects().items()}
    assert found == {name.removeprefix("here/"): data for name, data in below("here").items()}
    assert ckptool.open(f"{url}/0.pth").state_dict().keys() == ckptool.open(SOURCE).state_dict().keys()


def test_pages_locks_and_schemas_are_written_to_a_url(place: Any, run: Run) -> None:
    url, objects = place
    call = ["inspect", SOURCE, "--hash", "--html", f"{url}/a.html", "--lock", f"{url}/a.lock", "--schema"]
    assert run(*call, f"{url}/a.toml")[::2] == (0, "")
    assert [*objects()] == ["a.html", "a.lock", "a.toml"]
    assert run("diff", SOURCE, f"{url}/a.lock")[0] == 0
    assert "exists already" in refused(run("diff", SOURCE, SOURCE, "--html", f"{url}/a.html"))


@pytest.mark.usefixtures("small_parts")
def test_a_large_tensor_goes_in_parts(place: Any, run: Run, request: pytest.FixtureRequest) -> None:
    url, objects = place
    big("in.safetensors")
    assert run("convert", "in.safetensors", "--to", "torch", "-o", f"{url}/out.pth")[::2] == (0, "")
    assert run("convert", "in.safetensors", "--to", "torch", "-o", "out.pth")[0] == 0
    assert objects() == below("out.pth")
    if url.startswith("s3"):
        assert request.getfixturevalue("s3").parts_of("out.pth") == 3


def test_what_is_there_is_kept_without_force(place: Any, run: Run) -> None:
    url, objects = place
    for name, to in (("a.pth", "torch"), ("set/", "sharded")):
        call = ["convert", SOURCE, "--to", to, "-o", f"{url}/{name}"]
        assert run(*call)[0] == 0
        before = objects()
        for more in ([], ["--dry-run"]):
            assert "exists already; --force overwrites it" in refused(run(*call, "--dtype", "bf16", *more))
        assert objects() == before
        assert run(*call, "--dtype", "bf16", "--force")[::2] == (0, "")
        assert objects() != before
    call = ["convert", SOURCE, "-o", f"{url}/new.pth", "--report"]
    assert "two outputs" in refused(run(*call, f"{url}/new.pth"))
    assert "exists already" in refused(run(*call, f"{url}/a.pth"))


def test_inputs_are_replaced_in_place_only(place: Any, run: Run) -> None:
    url, objects = place
    assert run("convert", SOURCE, "-o", f"{url}/a.pth")[0] == 0
    assert run("convert", SOURCE, "--to", "sharded", "--max-shard-size", "20kB", "-o", f"{url}/set/")[0] == 0
    before = objects()
    for name in ("a.pth", "set/"):
        call = ["convert", f"{url}/{name}", "--dtype", "bf16", "-o", f"{url}/{name}"]
        call += ["--to", "sharded"] if name == "set/" else []
        assert "--in-place replaces it" in refused(run(*call, "--force"))
        assert objects() == before
        assert run(*call, "--in-place")[::2] == (0, "")
        dtypes = {one.dtype for one in ckptool.open(f"{url}/{name}").state_dict().values()}
        assert dtypes == {"bfloat16"}
        before = objects()
    assert sorted(before) == ["a.pth", "set/model.safetensors"]


def test_what_comes_to_be_there_meanwhile_is_kept(
    s3: Store, run: Run, monkeypatch: pytest.MonkeyPatch, small_parts: None
) -> None:
    last = Parts._last

    def late(self: Parts, *args: Any, **more: Any) -> None:
        s3.put(self.key, b"theirs")
        last(self, *args, **more)

    monkeypatch.setattr(Parts, "_last", late)
    for source in (str(SOURCE), big("in.safetensors")):
        s3.clear()
        assert "exists already" in refused(run("convert", source, "--to", "torch", "-o", f"{s3.url}/a.pth"))
        assert s3.objects() == {"a.pth": b"theirs"}
    assert s3.uploads() == []


def failing(files: Files, *args: Any) -> Iterator[bytes]:
    yield bytes(6 << 20)
    raise FormatError("the source is damaged", "source")


def test_a_source_that_fails_leaves_nothing(
    place: Any, run: Run, monkeypatch: pytest.MonkeyPatch, small_parts: None
) -> None:
    url, objects = place
    big("in.safetensors")
    monkeypatch.setattr(Files, "blocks", failing)
    for name, to in (("a.safetensors", "safetensors"), ("set/", "sharded"), ("dcp/", "dcp")):
        call = ["convert", "in.safetensors", "--to", to, "--max-shard-size", "1MB", "-o", f"{url}/{name}"]
        assert "the source is damaged" in refused(run(*call))
        assert objects() == {}


@pytest.mark.parametrize("method", ["create_multipart_upload", "upload_part", "complete_multipart_upload"])
def test_an_upload_that_fails_is_one_line_and_leaves_nothing(
    method: str, s3: Store, run: Run, monkeypatch: pytest.MonkeyPatch, small_parts: None
) -> None:
    call = Parts._call

    def fails(self: Parts, name: str, **more: Any) -> Any:
        if name == method and more.get("PartNumber", 2) == 2:
            raise PermissionError("Access Denied")
        return call(self, name, **more)

    monkeypatch.setattr(Parts, "_call", fails)
    err = refused(run("convert", big("in.safetensors"), "--to", "torch", "-o", f"{s3.url}/a.pth"))
    assert "s3://models/a.pth: writing at byte" in err
    assert "Access Denied" in err
    assert (s3.objects(), s3.uploads()) == ({}, [])


def test_an_upload_that_cannot_be_taken_back_is_said(
    s3: Store, run: Run, monkeypatch: pytest.MonkeyPatch, small_parts: None
) -> None:
    call = Parts._call

    def gone(self: Parts, name: str, **more: Any) -> Any:
        if name in ("complete_multipart_upload", "abort_multipart_upload"):
            raise OSError("the network is gone")
        return call(self, name, **more)

    monkeypatch.setattr(Parts, "_call", gone)
    err = refused(run("convert", big("in.safetensors"), "--to", "torch", "-o", f"{s3.url}/a.pth"))
    assert "what was uploaded could not be removed: OSError: the network is gone" in err
    (upload,) = s3.client.list_multipart_uploads(Bucket="models")["Uploads"]
    s3.client.abort_multipart_upload(Bucket="models", Key=upload["Key"], UploadId=upload["UploadId"])


def test_a_completion_whose_answer_is_lost_is_a_success(
    s3: Store, run: Run, monkeypatch: pytest.MonkeyPatch, small_parts: None
) -> None:
    call = Parts._call

    def lost(self: Parts, name: str, **more: Any) -> Any:
        answer = call(self, name, **more)
        if name in ("complete_multipart_upload", "put_object"):
            raise TimeoutError("no answer")
        return answer

    monkeypatch.setattr(Parts, "_call", lost)
    for source in (str(SOURCE), big("in.safetensors")):
        s3.clear()
        assert run("convert", source, "--to", "torch", "-o", f"{s3.url}/a.pth")[::2] == (0, "")
        assert [*s3.objects()] == ["a.pth"]


def test_what_is_not_what_was_meant_is_removed(place: Any, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    url, objects = place
    assert run("convert", SOURCE, "-o", f"{url}/old.pth")[0] == 0
    assert run("convert", SOURCE, "--to", "sharded", "--max-shard-size", "20kB", "-o", f"{url}/old/")[0] == 0
    before = objects()
    put = Upload._put

    def flipped(self: Upload, view: memoryview, at: int) -> None:
        data = bytearray(view)
        if b".json" not in self.path.encode():
            data[-(len(data) // 3)] ^= 1
        put(self, memoryview(data), at)

    monkeypatch.setattr(Upload, "_put", flipped)
    for name in ("new.safetensors", "old.pth", "new/", "old/"):
        to = ["--to", "sharded", "--max-shard-size", "20kB"] if name.endswith("/") else []
        refused(run("convert", SOURCE, *to, "--force", "-o", f"{url}/{name}"))
        assert objects() == before


def test_an_index_comes_last(s3: Store, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    last, events = Parts._last, []

    def told(self: Parts, *args: Any, **more: Any) -> None:
        last(self, *args, **more)
        events.append(self.key)

    monkeypatch.setattr(Parts, "_last", told)
    for to, count, final in (("sharded", 4, "model.safetensors.index.json"), ("dcp", 2, ".metadata")):
        events.clear()
        call = ["convert", SOURCE, "--to", to, "-o", f"{s3.url}/{to}/", "--max-shard-size", "20kB"]
        assert run(*call)[0] == 0
        assert len(events) >= count
        assert events[-1] == f"{to}/{final}"


def test_no_index_of_a_mix_is_ever_there(place: Any, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    url, objects = place
    call = ["filter", "--match", SOURCE, SOURCE, "--to", "sharded", "--max-shard-size", "20kB", "-o", f"{url}/set/"]
    assert run(*call)[0] == 0
    commit, moments = Upload.commit, []

    def looked(self: Upload) -> None:
        moments.append("set/model.safetensors.index.json" in objects())
        commit(self)
        if len(moments) == 3:
            raise OutputError("the store is gone")

    monkeypatch.setattr(Upload, "commit", looked)
    err = refused(run(*call, "--force"))
    assert moments == [False, False, False]
    assert "the store is gone; the files that this run wrote are removed; of the checkpoint that was there" in err
    assert "model.safetensors.index.json" in err
    assert objects() == {}


def test_the_hash_is_in_the_name(place: Any, run: Run) -> None:
    url, objects = place
    code, out, err = run("convert", SOURCE, "--publish", "-o", f"{url}/a.pth")
    assert (code, err) == (0, "")
    ((name, data),) = objects().items()
    assert name == f"a-{hashlib.sha256(data).hexdigest()[:8]}.pth"
    assert out.startswith(f"{url}/{name}: ")
    assert "exists already" in refused(run("convert", SOURCE, "--publish", "-o", f"{url}/a.pth"))
    assert [*objects()] == [name]


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("https://host/a.pth", "https:// is read, and cannot be written"),
        ("https://me:hidden@host/a.pth?token=hidden", "https:// is read, and cannot be written"),
        ("zip://a.pth::s3://models/all.zip", "a file in another one is read, and cannot be written"),
        ("simplecache::s3://models/a.pth", "a file in another one is read, and cannot be written"),
        ("reference://a.pth", "reference:// is not read"),
        ("nonsense://a.pth", "no URL"),
        ("s3://absent/a.pth", "bucket does not exist"),
        ("s3://models/dir.pth", "is a directory; name a file"),
        ("s3://models/dir.pth/one/", "is a file; this format is a directory"),
    ],
)
def test_where_nothing_can_be_written_is_one_line(url: str, said: str, s3: Store, run: Run) -> None:
    s3.put("dir.pth/one", b"x")
    err = refused(run("convert", SOURCE, "-o", url))
    assert said in err
    assert "hidden" not in err
    if not url.endswith("/"):
        assert "hidden" not in refused(run("inspect", SOURCE, "--html", url))
    assert s3.objects() == {"dir.pth/one": b"x"}


def test_no_credential_is_printed(s3: Store, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    out = run("convert", SOURCE, "-o", f"{s3.url}/a.pth", "-v", "--report", f"{s3.url}/a.json")
    assert out[0] == 0
    monkeypatch.setattr(Parts, "_call", lambda self, *args, **more: self.fs.call_s3("head_bucket", Bucket="absent"))
    failed = run("convert", SOURCE, "-o", f"{s3.url}/b.pth")
    assert failed[0] == 2
    for text in (*out[1:], *failed[1:], s3.objects()["a.json"].decode()):
        assert not any(secret in text for secret in SECRETS)


def test_a_library_that_is_absent_is_named(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("s3fs", "gcsfs"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    for scheme, extra in (("s3", "s3"), ("gs", "gcs")):
        err = refused(run("convert", SOURCE, "-o", f"{scheme}://absent-library/a.pth"))
        assert f"{scheme}:// needs" in err
        assert f"pip install 'ckptool[{extra}]'" in err


def test_a_file_url_is_a_path(run: Run, tmp_path: Path) -> None:
    assert run("convert", SOURCE, "-o", f"file://{tmp_path}/a.safetensors")[::2] == (0, "")
    ckptool.convert(SOURCE, f"file://{tmp_path}/b.safetensors")
    ckptool.save(SOURCE, f"file://{tmp_path}/c.pth")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert (tmp_path / "c.pth").exists()


def test_the_library_writes_to_a_url(place: Any) -> None:
    url, objects = place
    saved = ckptool.save(SOURCE, f"{url}/a.safetensors", verify=True)
    assert (saved.path, saved.nbytes, saved.verified) == (f"{url}/a.safetensors", len(objects()["a.safetensors"]), True)
    with pytest.raises(OutputError, match="exists already"):
        ckptool.save(SOURCE, f"{url}/a.safetensors")


SLOW = """
import sys, time
from ckptool.io.remote import upload
upload.PART = 5 << 20
put = upload.Parts.put
def slow(self, number, data):
    put(self, number, data)
    print("part", number, flush=True)
    time.sleep(0.3 if number else 0)
upload.Parts.put = slow
from ckptool.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_leaves_no_object_and_no_parts(number: int, code: int, s3: Store) -> None:
    big("in.safetensors", 60)
    call = [sys.executable, "-c", SLOW, "convert", "in.safetensors", "--to", "torch", "-o", f"{s3.url}/a.pth"]
    with subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith(b"part")
        assert s3.uploads() == ["a.pth"]
        process.send_signal(number)
        process.communicate(timeout=60)
    assert process.returncode in (code, -number)
    assert (s3.objects(), s3.uploads()) == ({}, [])


def test_a_file_that_is_closed_last_is_not_completed_by_its_finalizer(tmp_path: Path) -> None:
    """As gcsfs, adlfs and huggingface_hub have them: `AbstractBufferedFile`, which its finalizer closes."""
    from fsspec.spec import AbstractBufferedFile, AbstractFileSystem

    there: dict[str, bytes] = {}

    class File(AbstractBufferedFile):
        def _initiate_upload(self) -> None:
            self.all = b""

        def _upload_chunk(self, final: bool = False) -> bool:
            self.all += self.buffer.getvalue()
            if final:
                there[self.path] = self.all
            return True

    class System(AbstractFileSystem):
        def open(self, path: str, mode: str = "rb", block_size: Any = None, **more: Any) -> Any:
            return File(self, path, mode, block_size or 1 << 20, **more)

    for done in (False, True):
        way = Stream(System(), "a", True, appears=False)
        for number in range(3):
            way.put(number, bytearray(6 << 20))
        assert there == {}
        (way.complete if done else way.discard)()
        del way
        assert {name: len(data) for name, data in there.items()} == ({"a": 18 << 20} if done else {})


MEASURED = """
import resource, sys
from ckptool.cli import main
import s3fs, ckptool.io.remote.upload, ckptool.formats.pytorch.zip
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
code = main(sys.argv[1:])
print("grown", (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
sys.exit(code)
"""


@pytest.mark.slow
@pytest.mark.parametrize("to", ["safetensors"])
def test_a_file_streams_from_one_object_to_another(to: str, s3: Store) -> None:
    mb = 96
    big("in.safetensors", mb)
    s3.put("in.safetensors", Path("in.safetensors").read_bytes())
    out = {"safetensors": "out.safetensors", "torch": "out.pth", "sharded": "out/"}[to]
    call = ["convert", f"{s3.url}/in.safetensors", "--to", to, "--max-shard-size", "40MB", "-o", f"{s3.url}/{out}"]
    begin = time.monotonic()
    done = subprocess.run([sys.executable, "-c", MEASURED, *call], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    grown = int(done.stdout.split("grown")[1])
    assert grown < 90, f"{grown} MB, in {time.monotonic() - begin:.1f} s"


def test_a_document_of_a_run_names_the_url(s3: Store, run: Run) -> None:
    code, out, _ = run("convert", SOURCE, "-o", f"{s3.url}/a.safetensors", "--json")
    (result,) = json.loads(out)["result"]
    assert (code, result["output"], result["verified"]) == (0, f"{s3.url}/a.safetensors", True)
