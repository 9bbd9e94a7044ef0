"""Faults of servers: each gives the same answer after another request, or one line and exit 2."""

from __future__ import annotations

import base64
import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import Run
from servers import serving

import ckptool
from ckptool.io.remote import ranges

SIZE = 3 << 20


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "PAUSE", 0.01)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    place = tmp_path / "served"
    place.mkdir()
    torch.save({"a": torch.arange(SIZE // 8).float(), "b": torch.ones(SIZE // 8)}, place / "m.pth")
    return place


ONCE: dict[str, dict[int, Any]] = {
    "503": {0: 503, 2: 503},
    "429": {0: 429, 1: 429, 3: 429},
    "500 and 502": {0: 500, 1: 502, 2: 504},
    "a connection that is closed": {0: "drop", 1: "drop", 3: "drop"},
    "an answer that ends too early": {1: "cut", 2: "cut", 3: "cut", 4: "cut"},
    "an answer without a body": {0: "empty", 2: "empty"},
    "a slow answer": {0: 0.3, 1: 0.3},
    "no answer": {0: "hang", 2: "hang"},
}
"""What passes: {number of the request: what happens to it}."""


@pytest.mark.parametrize("name", ONCE)
def test_what_passes_is_asked_again_and_the_answer_is_the_same(name: str, root: Path, run: Run) -> None:
    call = ["inspect", "--json", "--hash", "--limit", "MAX_WAIT=1"]
    wanted = run(*call, root / "m.pth")
    with serving(root, faults=ONCE[name]) as server:
        found = run(*call, f"{server.url}/m.pth")
        assert len(server.asked) > len(ONCE[name])
    assert (found[0], found[2], found[1].replace(server.url, str(root))) == (0, "", wanted[1])


def test_an_answer_that_broke_is_continued_where_it_ended(root: Path, run: Run) -> None:
    with serving(root, faults={1: "cut", 2: "cut", 3: "cut"}) as server:
        assert run("inspect", "--hash", f"{server.url}/m.pth")[0] == 0
        assert server.sent < 1.35 * SIZE


STAYS: dict[str, tuple[Any, str]] = {
    "503": (503, "m.pth: cannot be read: the server answers 503 Service Unavailable (5 requests)"),
    "404": (404, "m.pth: no such file: the server answers 404 Not Found"),
    "410": (410, "m.pth: no such file: the server answers 410 Gone"),
    "403": (403, "m.pth: the server answers 403 Forbidden: no permission, or credentials that are missing or old"),
    "401": (401, "m.pth: the server answers 401 Unauthorized: no permission, or credentials that are missing or old"),
    "418": (418, "m.pth: the server answers 418 I'm a Teapot"),
    "a closed connection": ("drop", "m.pth: cannot be read: Server disconnected (5 requests)"),
    "no answer": ("hang", "no answer, or a slow one, within the time-out (MAX_WAIT: 1 s) (5 requests)"),
    "other bytes": ("elsewhere", "m.pth: the server answers with other bytes than those that it was asked for"),
    "compressed": ("gzip", "m.pth: is sent compressed (gzip), though it was asked for as it is"),
}
"""What does not pass: what happens to every request, and what is said."""


@pytest.mark.parametrize("name", STAYS)
def test_what_does_not_pass_is_one_line(name: str, root: Path, run: Run) -> None:
    fault, said = STAYS[name]
    with serving(root, faults={"/m.pth": fault}) as server:
        code, _, err = run("inspect", "--limit", "MAX_WAIT=1", f"{server.url}/m.pth")
        assert len(server.asked) in (1, 5, 10)  # a request on a connection that was kept may be made twice
    assert (code, err.count("\n")) == (2, 1)
    assert said in err


def test_a_server_that_always_breaks_is_given_up_in_the_end(root: Path, run: Run) -> None:
    with serving(root, faults=dict.fromkeys(range(1, 100), "empty")) as server:
        code, _, err = run("inspect", "--hash", f"{server.url}/m.pth")
        assert len(server.asked) < 40
    assert (code, err.count("\n")) == (2, 1)
    assert "cannot be read: " in err


def test_nobody_listens_or_no_such_host(root: Path, run: Run) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        code, _, err = run("inspect", f"http://127.0.0.1:{taken.getsockname()[1]}/m.pth")
    assert (code, err.count("\n"), "cannot be read: " in err) == (2, 1, True)
    code, _, err = run("inspect", "https://no-such-host.invalid/m.pth")
    assert (code, err.count("\n")) == (2, 1)
    with serving(root) as server:
        code, _, err = run("inspect", f"{server.url.replace('http', 'https')}/m.pth")
    assert (code, err.count("\n"), "secure connection" in err or "SSL" in err) == (2, 1, True)


def renewed(path: Path) -> Any:
    def fault() -> None:
        made = path.with_suffix(".new")
        made.write_bytes(path.read_bytes())
        os.replace(made, path)
        os.utime(path, ns=(10**18, 10**18 + renewed.count))
        renewed.count += 10**9

    return fault


renewed.count = 1  # type: ignore[attr-defined]


@pytest.mark.parametrize("request_", [1, 2, 3])
@pytest.mark.parametrize("tags", [True, False], ids=["ETag", "Last-Modified"])
def test_a_file_that_is_replaced_meanwhile_is_noticed(request_: int, tags: bool, root: Path, run: Run) -> None:
    with serving(root, tags=tags, faults={request_: renewed(root / "m.pth")}) as server:
        code, _, err = run("convert", f"{server.url}/m.pth", "-o", "out.safetensors")
    assert (code, err.count("\n")) == (2, 1)
    assert "m.pth: it was changed " in err
    assert not Path("out.safetensors").exists()


def test_a_server_without_ranges_sends_a_small_file_once_for_each_reading(root: Path, run: Run) -> None:
    wanted = run("inspect", "--json", "--hash", root / "m.pth")
    with serving(root, ranges=False) as server:
        found = run("inspect", "-v", "--json", "--hash", f"{server.url}/m.pth")
    assert "/m.pth: read 3.15 MB in 2 requests" in found[2]
    assert (found[0], json.loads(found[1])["result"][0]["hash"]) == (0, json.loads(wanted[1])["result"][0]["hash"])


def test_a_download_of_all_is_said(root: Path, run: Run) -> None:
    with serving(root, ranges=False) as server:
        code, out, _ = run("filter", f"{server.url}/m.pth", "--include", "a", "-o", "out.pth")
    assert code == 0
    assert f"its server sends no ranges: all {(root / 'm.pth').stat().st_size:,} bytes were downloaded" in out


@pytest.mark.parametrize("fault", [None, "unsized"])
def test_a_large_file_of_a_server_without_ranges_is_refused(fault: str | None, root: Path, run: Run) -> None:
    with serving(root, ranges=False, faults={"/m.pth": fault}) as server:
        code, _, err = run("inspect", f"{server.url}/m.pth", "--limit", "MAX_DOWNLOAD=1MB")
        assert "its server sends no ranges, only the whole file, of " in err
        assert (code, err.count("\n"), "over MAX_DOWNLOAD, 1,000,000 (--limit MAX_DOWNLOAD=" in err) == (2, 1, True)
        assert run("inspect", f"{server.url}/m.pth")[0] == 0


def test_a_whole_download_that_breaks_is_begun_anew(root: Path, run: Run) -> None:
    with serving(root, ranges=False, faults={0: "cut", 1: "cut"}) as server:
        assert run("inspect", f"{server.url}/m.pth")[0] == 0
        assert len(server.asked) == 3


def test_redirects_are_followed_and_carry_no_credentials_to_another_host(root: Path, run: Run) -> None:
    with serving(root) as other, serving(root, faults={"/m.pth": f"{other.url}/m.pth"}) as server:
        url = server.url.replace("http://", "http://me:secret@") + "/m.pth"
        code, out, err = run("inspect", "--json", url)
        assert code == 0, err
        basic = "Basic " + base64.b64encode(b"me:secret").decode()
        assert server.asked[0][2]["Authorization"] == basic
        assert "Authorization" not in other.asked[0][2]
        assert "secret" not in out
        assert json.loads(out)["result"][0]["path"] == f"{server.url.replace('http://', 'http://***@')}/m.pth"
    with serving(root) as loop:
        loop.faults["/m.pth"] = f"{loop.url}/m.pth"
        code, _, err = run("inspect", f"{loop.url}/m.pth")
    assert (code, err) == (2, f"ckptool: error: {loop.url}/m.pth: too many redirects\n")


SECRETS = ["me:s3cr3t@", "tok3n@", "?X-Amz-Signature=s3cr3t&X-Amz-Credential=tok3n", "?sig=s3cr3t%2Btok3n", "#tok3n"]


@pytest.mark.parametrize("secret", SECRETS)
@pytest.mark.parametrize("fault", [None, 404, 503, "drop", "elsewhere", "http://127.0.0.1:1/x"])
def test_no_secret_of_a_url_is_printed_or_reported(secret: str, fault: Any, root: Path, run: Run) -> None:
    with serving(root, faults={"/m.pth": fault}) as server:
        url = f"{server.url}/m.pth{secret}"
        if secret.endswith("@"):
            url = f"{server.url.replace('://', f'://{secret}')}/m.pth"
        calls: list[list[str]] = [
            ["-v", "inspect", url], ["inspect", "--json", url], ["inspect", url, url], ["diff", "-v", url, url],
            ["filter", "--match", url, url, "-o", "out.pth", "--force", "--report", "r.json"],
            ["filter", f"--match={url}", url, "--dry-run", "--json"], ["convert", url, "--to", "safetensors"],
            ["inspect", "--format", "sarif", "--check", url], ["diff", "--format", "markdown", url, url],
            ["inspect", "--root", "no", url], ["remap", url, "--rules", url, "-o", "x.pth"],
            ["diff", url, f"{url}.toml"],
        ]  # fmt: skip
        for call in calls:
            _, out, err = run(*call)
            written = Path("r.json").read_text() if Path("r.json").exists() else ""
            assert "s3cr3t" not in out + err + written, call
            assert "tok3n" not in out + err + written, call
        if fault is None:
            opened = ckptool.open(url)
            assert "s3cr3t" not in repr(opened)
            assert "tok3n" not in opened.url
            assert set(opened.to_torch()) == {"a", "b"}
            asked = server.asked[-1]
            assert "s3cr3t" in asked[0] or "Authorization" in asked[2] or secret.startswith("#")


def test_the_hash_in_a_name_is_compared_where_all_of_the_file_is_read(root: Path, run: Run) -> None:
    import hashlib

    content = (root / "m.pth").read_bytes()
    tag = hashlib.sha256(content).hexdigest()[:8]
    (root / f"m-{tag}.pth").write_bytes(content)
    (root / "m-0123abcd.pth").write_bytes(content)
    (root / "m-20240131.pth").write_bytes(content)
    call = ["filter", "--match", root / "m.pth"]
    for ranges_ in (True, False):
        with serving(root, ranges=ranges_) as server:
            code, out, _ = run(*call, f"{server.url}/m-{tag}.pth", "-o", "a.pth", "--force")
            assert (code, f"the sha256 in its name, {tag}, is that of the file" in out) == (0, True), out
            code, out, err = run("convert", f"{server.url}/m-0123abcd.pth", "-o", "b.safetensors")
            assert (code, err.count("\n")) == (2, 1)
            assert f"m-0123abcd.pth: its sha256 begins with {tag}, its name says 0123abcd: a damaged download" in err
            assert not Path("b.safetensors").exists()
            code, out, _ = run("convert", f"{server.url}/m-20240131.pth", "-o", "c.safetensors", "--force")
            assert (code, "sha256" in out) == (0, False)
    with serving(root) as server:
        code, out, _ = run("filter", f"{server.url}/m-{tag}.pth", "--include", "a", "-o", "d.pth")
        assert (code, f"{tag}, was not checked: not all of the file was read" in out) == (0, True)


def test_a_secret_in_the_url_of_a_list_of_rows_is_printed_nowhere(root: Path, run: Run) -> None:
    torch.save({"w": torch.rand(4, 2)}, root / "old.pth")
    torch.save({"w": torch.zeros(2, 2)}, root / "new.pth")
    (root / "rows.txt").write_text("1\n0\n")
    with serving(root) as server:
        for name in ("rows.txt", "none.txt"):
            rows = f"w=rows:select={server.url}/{name}?sig=s3cr3t"
            call = ["load-partial", root / "old.pth", "--into", root / "new.pth", "--adapt", rows, "--dry-run"]
            for form in ([], ["--json"]):
                code, out, err = run(*call, *form)
                assert (code, "s3cr3t" in out + err) == (0 if name == "rows.txt" else 2, False), out + err


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:port/a", "http://me:hunt/er2@127.0.0.1:9/a", "http://me:hunter2@[::1/a"]
)
def test_what_is_no_url_is_one_line_without_its_password(url: str, run: Run) -> None:
    code, out, err = run("inspect", url)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "is no URL that can be asked for" in err
    assert not any(part in err for part in ("hunt", "er2"))


def test_a_store_that_cannot_be_connected_to_is_one_line(run: Run) -> None:
    code, out, err = run("inspect", "ftp://me:hunter2@127.0.0.1:9/a.pth")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "ConnectionRefusedError" in err
    assert "hunter2" not in err
