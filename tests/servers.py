"""An HTTP server on loopback that serves a directory as it is told: with ranges or without, and with faults."""

from __future__ import annotations

import email.utils
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit


class Server(ThreadingHTTPServer):
    """Serves the files of ``root``. ``asked``: (path, Range, headers) of each request; ``sent``: bytes of bodies.

    ``ranges``: whether it knows them. ``tags``: whether it sends an ETag. ``faults``: {number of a request: what
    happens to it}, the first is 0; or {path: what happens to all of it}; see `Handler`.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self, root: Path, *, ranges: bool = True, tags: bool = True, **more: Any) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.root, self.ranges, self.tags = root, ranges, tags
        self.faults: dict[int | str, Any] = more.get("faults", {})
        self.asked: list[tuple[str, str, dict[str, str]]] = []
        self.sent = 0
        self.most = self.now = 0
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        server = self.server
        path = unquote(urlsplit(self.path).path)
        with server.lock:
            number = len(server.asked)
            server.asked.append((self.path, self.headers.get("Range", ""), dict(self.headers)))
            server.now += 1
            server.most = max(server.most, server.now)
        try:
            self._answer(server, path, server.faults.get(number, server.faults.get(path)))
        finally:
            with server.lock:
                server.now -= 1

    def _error(self, status: int, **headers: str) -> None:
        self.send_response(status)
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), text)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _answer(self, server: Server, path: str, fault: Any) -> None:
        if isinstance(fault, int):
            return self._error(fault, Retry_After="0")
        if isinstance(fault, str) and fault.startswith("http"):
            return self._error(302, Location=fault)
        if fault == "drop":
            self.close_connection = True
            return None
        if fault == "hang":
            time.sleep(30)
            return None
        if isinstance(fault, float):
            time.sleep(fault)
        if callable(fault):
            fault()
        file = server.root / path.lstrip("/")
        if not file.is_file():
            return self._error(404)
        size, stamp = file.stat().st_size, file.stat().st_mtime_ns
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        begin, end = 0, size
        if asked and server.ranges:
            begin, end = int(asked[1]), min(int(asked[2]) + 1, size)
            if begin >= size:
                return self._error(416, Content_Range=f"bytes */{size}")
            self.send_response(206)
            at = begin + 5 if fault == "elsewhere" else begin
            self.send_header("Content-Range", f"bytes {at}-{end - 1}/{size}")
        else:
            self.send_response(200)
        if fault == "gzip":
            self.send_header("Content-Encoding", "gzip")
        if server.tags:
            self.send_header("ETag", f'"{stamp:x}-{size:x}"')
        self.send_header("Last-Modified", email.utils.formatdate(stamp // 10**9, usegmt=True))
        if fault != "unsized":
            self.send_header("Content-Length", str(end - begin))
        else:
            self.close_connection = True
        self.end_headers()
        left = end - begin
        cut = left // 2 if fault == "cut" else 0 if fault == "empty" else left
        with file.open("rb") as stream:
            stream.seek(begin)
            while left and cut:
                block = stream.read(min(1 << 16, left, cut))
                if fault == "slow":
                    time.sleep(0.5)
                self.wfile.write(block)
                left, cut = left - len(block), cut - len(block)
                with server.lock:
                    server.sent += len(block)
        if left:
            self.close_connection = True
        return None


@contextmanager
def serving(root: Path, **how: Any) -> Iterator[Server]:
    """Serves a directory in the block."""
    with Server(root, **how) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()


@contextmanager
def s3(root: Path, monkeypatch: Any) -> Iterator[Any]:
    """An S3 server (moto) over HTTP, whose bucket ``models`` has the files below a directory.

    Yields a list with the method, path and Range of each request.
    """
    import boto3
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    asked: list[tuple[str, str, str]] = []
    application = DomainDispatcherApplication(create_backend_app)

    def counted(environ: dict[str, Any], start: Any) -> Any:
        where = f"{environ['PATH_INFO']}?{environ.get('QUERY_STRING', '')}"
        asked.append((environ["REQUEST_METHOD"], where, environ.get("HTTP_RANGE", "")))
        return application(environ, start)

    for name, text in (
        ("AWS_ACCESS_KEY_ID", "AKIATEST"), ("AWS_SECRET_ACCESS_KEY", "s3cr3t"), ("AWS_DEFAULT_REGION", "us-east-1"),
    ):  # fmt: skip
        monkeypatch.setenv(name, text)
    server = make_server("127.0.0.1", 0, counted, threaded=True)
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("AWS_ENDPOINT_URL", url)
    settings = {"endpoint_url": url, "config_kwargs": {"read_timeout": 5}}  # a busy machine has lost an answer
    monkeypatch.setenv("FSSPEC_S3", json.dumps(settings))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        client = boto3.client("s3", endpoint_url=url)
        client.create_bucket(Bucket="models")
        for file in sorted(path for path in root.rglob("*") if path.is_file()):
            client.upload_file(str(file), "models", file.relative_to(root).as_posix())
        asked.clear()
        yield asked
    finally:
        server.shutdown()
