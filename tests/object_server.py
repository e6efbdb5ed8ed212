"""Object stores on this machine: S3 servers, one of which misbehaves on request, and a plain web server."""

from __future__ import annotations

import http.client
import re
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import formatdate
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

_MOTO = """
import logging, sys, time
logging.disable(logging.CRITICAL)
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""


@contextmanager
def moto() -> Iterator[int]:
    """An S3 server, in a process of its own; its port."""
    process = subprocess.Popen([sys.executable, "-W", "ignore", "-c", _MOTO], stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    with process:
        try:
            assert process.stdout is not None
            yield int(process.stdout.readline())
        finally:
            process.kill()


def make_bucket(url: str, name: str) -> None:
    with urllib.request.urlopen(urllib.request.Request(f"{url}/{name}", method="PUT"), timeout=10):
        pass


class Proxy:
    """`with Proxy(port) as proxy`: an S3 server at `proxy.url`. `log` has (method, path, headers) of every request.

    port: of the S3 server to which requests are passed on; None: they are answered here, from memory.

    fail_every: this one of so many requests fails, by turns with 503, 500 and a connection that is dropped.
    cut_every: so many answers with a body end in the middle of it.
    ignores_conditions: PUT is passed on without If-None-Match.
    refuse: requests whose "METHOD path" matches are answered with `status`, from the `after`-th on.
    """

    def __init__(self, port: int | None) -> None:
        self.port, self.bucket, self._buckets = port, "", Buckets()
        self.fail_every = self.cut_every = 0
        self.ignores_conditions = False
        self.refuse, self.status, self.code, self.after = "", 403, "AccessDenied", 0
        self.log: list[tuple[str, str, dict[str, str]]] = []
        self._counted = self._cut = 0
        self._lock = threading.Lock()

    def __enter__(self) -> Proxy:
        self.server = _serve(partial(_Forward, self))
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def asked(self, method: str, pattern: str = "") -> list[str]:
        """The paths of requests by a method, in order."""
        return [path for name, path, _ in self.log if name == method and re.search(pattern, path)]

    def turn(self, method: str, path: str) -> str:
        """What is to become of a request: "", "drop", or the status of a failure."""
        with self._lock:
            self._counted += 1
            if self.refuse and re.search(self.refuse, f"{method} {path}"):
                self.after -= 1
                if self.after < 0:
                    return str(self.status)
            if self.fail_every and self._counted % self.fail_every == 0:
                return ("503", "500", "drop")[self._counted // self.fail_every % 3]
            return ""

    def answer(self, method: str, path: str, headers: dict[str, str], body: bytes) -> Answer:
        if self.port is None:
            with self._lock:
                return self._buckets.answer(method, path, headers, body)
        upstream = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        upstream.request(method, path, body, headers)
        found = upstream.getresponse()
        data = found.read()
        upstream.close()
        return found.status, dict(found.getheaders()), data

    def cuts(self) -> bool:
        with self._lock:
            self._cut += 1
            return bool(self.cut_every) and self._cut % self.cut_every == 0


Answer = tuple[int, dict[str, str], bytes]


class Buckets:
    """What the store needs of S3, from memory: objects, ranges, conditions, listings, deletion, uploads in parts."""

    def __init__(self) -> None:
        self.buckets: dict[str, dict[str, bytes]] = {}
        self.uploads: dict[str, dict[int, bytes]] = {}

    def answer(self, method: str, path: str, headers: dict[str, str], body: bytes) -> Answer:
        url = urlsplit(path)
        bucket, _, key = unquote(url.path).lstrip("/").partition("/")
        query = {name: values[0] for name, values in parse_qs(url.query, keep_blank_values=True).items()}
        if method == "PUT" and not key:
            self.buckets.setdefault(bucket, {})
            return 200, {}, b""
        if bucket not in self.buckets:
            return _error(404, "NoSuchBucket")
        objects = self.buckets[bucket]
        if not key:
            return self._delete(objects, body) if "delete" in query else self._list(objects, query)
        if method in ("GET", "HEAD"):
            return self._get(objects, key, headers)
        if method == "DELETE":
            objects.pop(key, None)
            return 204, {}, b""
        if "uploadId" in query or "uploads" in query:
            return self._upload(objects, key, query, body)
        if headers.get("if-none-match") == "*" and key in objects:
            return _error(412, "PreconditionFailed")
        objects[key] = body
        return 200, _TAG, b""

    @staticmethod
    def _get(objects: dict[str, bytes], key: str, headers: dict[str, str]) -> Answer:
        if key not in objects:
            return _error(404, "NoSuchKey")
        data = objects[key]
        facts = {**_TAG, "Last-Modified": formatdate(usegmt=True), "Content-Length": str(len(data))}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", headers.get("range", ""))
        if asked is None:
            return 200, facts, data
        start, stop = int(asked[1]), int(asked[2]) + 1 if asked[2] else len(data)
        if start >= len(data):
            return _error(416, "InvalidRange")
        part = data[start:stop]
        return 206, {**facts, "Content-Range": f"bytes {start}-{start + len(part) - 1}/{len(data)}"}, part

    @staticmethod
    def _list(objects: dict[str, bytes], query: dict[str, str]) -> Answer:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        folders, rows = dict[str, None](), []
        for key in sorted(key for key in objects if key.startswith(prefix)):
            name, more, _ = key[len(prefix):].partition(delimiter) if delimiter else (key, "", "")
            if more:
                folders[f"{prefix}{name}{delimiter}"] = None
            else:
                rows.append(f"<Contents><Key>{key}</Key><Size>{len(objects[key])}</Size><LastModified>"
                            f"{time.strftime('%Y-%m-%dT%H:%M:%S.000Z', time.gmtime())}</LastModified></Contents>")
        rows += [f"<CommonPrefixes><Prefix>{name}</Prefix></CommonPrefixes>" for name in folders]
        return 200, {}, f"<ListBucketResult>{''.join(rows)}</ListBucketResult>".encode()

    @staticmethod
    def _delete(objects: dict[str, bytes], body: bytes) -> Answer:
        keys = re.findall(r"<Key>(.*?)</Key>", body.decode())
        for key in keys:
            objects.pop(key, None)
        told = "".join(f"<Deleted><Key>{key}</Key></Deleted>" for key in keys)
        return 200, {}, f"<DeleteResult>{told}</DeleteResult>".encode()

    def _upload(self, objects: dict[str, bytes], key: str, query: dict[str, str], body: bytes) -> Answer:
        if "uploads" in query:
            name = str(len(self.uploads))
            self.uploads[name] = {}
            return 200, {}, (f"<InitiateMultipartUploadResult><UploadId>{name}</UploadId>"
                             "</InitiateMultipartUploadResult>").encode()
        parts = self.uploads[query["uploadId"]]
        if "partNumber" in query:
            parts[int(query["partNumber"])] = body
            return 200, _TAG, b""
        objects[key] = b"".join(parts[number] for number in sorted(parts))
        return 200, {}, b"<CompleteMultipartUploadResult><ETag>e</ETag></CompleteMultipartUploadResult>"


_TAG = {"ETag": '"e"'}


def _error(status: int, code: str) -> Answer:
    return status, {}, f"<Error><Code>{code}</Code></Error>".encode()


class _Forward(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize, disable_nagle_algorithm = 1 << 20, True  # else headers and body wait for each other, 40 ms a time

    def __init__(self, proxy: Proxy, *args: Any) -> None:
        self.proxy = proxy
        super().__init__(*args)

    def _answer(self) -> None:
        proxy, body = self.proxy, self.rfile.read(int(self.headers.get("Content-Length") or 0))
        headers = {name.lower(): value for name, value in self.headers.items()}
        proxy.log.append((self.command, self.path, headers))
        turn = proxy.turn(self.command, self.path)
        if turn == "drop":
            self.close_connection = True
            return
        if turn:
            self._send(int(turn), {}, f"<Error><Code>{proxy.code}</Code></Error>".encode())
            return
        if proxy.ignores_conditions:
            headers = {name: value for name, value in headers.items() if name != "if-none-match"}
        self._send(*proxy.answer(self.command, self.path, headers, body))

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _answer

    def _send(self, status: int, headers: dict[str, str], data: bytes) -> None:
        self.send_response_only(status)
        length = headers.get("Content-Length") if self.command == "HEAD" else None
        for name, value in headers.items():
            if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                self.send_header(name, value)
        self.send_header("Content-Length", length or str(len(data)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.command == "GET" and len(data) > 1 and status < 300 and self.proxy.cuts():
            self.wfile.write(data[:len(data) // 2])
            self.close_connection = True
        else:
            self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def web(folder: Path, *, lists: bool = True) -> Iterator[str]:
    """A web server that shows a folder's files, answers range requests, and may show what is in folders."""

    class Files(SimpleHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize, disable_nagle_algorithm = 1 << 20, True

        def do_GET(self) -> None:
            asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
            path = Path(self.translate_path(self.path))
            if asked is None or not path.is_file():
                super().do_GET()
                return
            data = path.read_bytes()
            part = data[int(asked[1]):int(asked[2]) + 1]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {asked[1]}-{int(asked[1]) + len(part) - 1}/{len(data)}")
            self.send_header("Content-Length", str(len(part)))
            self.end_headers()
            self.wfile.write(part)

        def list_directory(self, path: Any) -> Any:
            if lists:
                return super().list_directory(path)
            return self.send_error(404)

        def log_message(self, *_: Any) -> None:
            pass

    server = _serve(partial(Files, directory=str(folder)))
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def _serve(handler: Any) -> ThreadingHTTPServer:
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    return server
