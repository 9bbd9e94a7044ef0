"""Inputs in a repository of Hugging Face, through a server of this machine that answers as the hub does."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from oracles import FIXTURES


class Hub(BaseHTTPRequestHandler):
    """What huggingface.co answers of one repository, as far as its file system asks."""

    protocol_version = "HTTP/1.1"
    root: Path
    asked: list[tuple[str, str]]

    def log_message(self, *args: Any) -> None:
        pass

    def _send(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, text in {"Content-Length": str(len(body)), "Content-Type": "application/json", **headers}.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.asked.append((path, self.headers.get("Authorization", "")))
        files = {file.name: file.read_bytes() for file in sorted(self.root.iterdir())}
        if path.startswith("/api/models/org/model/tree/"):
            rows = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in files.items()
            ]
            return self._send(200, json.dumps(rows).encode())
        if re.fullmatch(r"/api/models/org/model(/revision/v1)?", path):
            return self._send(200, json.dumps({"id": "org/model", "sha": "a" * 40, "siblings": []}).encode())
        found = re.fullmatch(r"/org/model/resolve/[^/]+/(.+)", path)
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if found is None or asked is None or found[1] not in files:
            return self._send(404, b"{}")
        part = files[found[1]][int(asked[1]) : int(asked[2]) + 1]
        where = f"bytes {asked[1]}-{int(asked[1]) + len(part) - 1}/{len(files[found[1]])}"
        return self._send(206, part, Content_Range=where)


def test_a_repository_of_hugging_face_is_read_as_the_directory() -> None:
    root = FIXTURES
    Hub.root, Hub.asked = root / "sharded", []
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        settings = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_address[1]}", "HF_TOKEN": "hf_s3cr3t"}
        environment = {**os.environ, **settings, "PYTHONPATH": os.pathsep.join(sys.path)}

        def call(*args: object) -> tuple[int, str, str]:
            words = [sys.executable, "-m", "ckptool", *map(str, args)]
            done = subprocess.run(words, env=environment, capture_output=True, text=True)
            assert "s3cr3t" not in done.stdout + done.stderr
            return done.returncode, done.stdout, done.stderr

        assert call("diff", "--values", "hf://org/model", root / "sharded") == (0, "same: 9 equal\n", "")
        code, out, err = call("inspect", "--json", "hf://org/model@v1/model.safetensors.index.json")
        assert (code, json.loads(out)["result"][0]["format"], err) == (0, "hf-sharded", "")
        assert "Bearer hf_s3cr3t" in {token for _, token in Hub.asked}
        for url in ("hf://org/model/none.bin", "hf://nobody/none"):
            code, _, err = call("inspect", url)
            assert (code, err.count("\n"), url in err) == (2, 1, True)
        server.shutdown()
