"""A model hub on this machine: serves repositories from memory over HTTP, as the hub's client asks for them."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "5f3c" * 10


class Hub:
    """`with Hub({id: {file: bytes}}) as hub`: serves at `hub.url` and keeps `hub.log` of what was asked.

    break_after: {file: bytes after which the connection is dropped}, once. dead: files of which then nothing more
    comes. sizes: whether the listing says how large files are. gated: ids that need permission. status: answer
    everything with this.
    """

    def __init__(self, models: dict[str, dict[str, bytes]]) -> None:
        self.models, self.log = models, list[str]()
        self.break_after: dict[str, int] = {}
        self.dead: set[str] = set()
        self.gated: set[str] = set()
        self.sizes, self.status = True, 200
        self.claims: dict[str, int] = {}  # sizes that are not those of the bytes

    def __enter__(self) -> Hub:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub.answer(self, body=True)

            def do_HEAD(self) -> None:
                hub.answer(self, body=False)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def files(self) -> list[str]:
        """The files of which bytes were asked, in order."""
        return [line.rsplit("/", 1)[1] for line in self.log if line.startswith("GET") and "/resolve/" in line]

    def answer(self, request: Any, body: bool) -> None:
        path = request.path.partition("?")[0]
        self.log.append(f"{request.command} {request.path}")
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/[^/]+)?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path)
        model = (api or file or [None, ""])[1]
        if self.status != 200:
            _send(request, self.status, b"{}")
        elif model in self.gated:
            _send(request, 403, b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": "awaiting review"})
        elif model not in self.models:
            _send(request, 404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif api:
            listing = self._tree(model) if api[2] == "tree" else self._info(model)
            _send(request, 200, json.dumps(listing).encode(), {"Content-Type": "application/json"})
        elif file and file[2] in self.models[model]:
            self._file(request, file[2], self.models[model][file[2]], body)
        else:
            _send(request, 404, b"{}", {"X-Error-Code": "EntryNotFound"})

    def _info(self, model: str) -> dict[str, Any]:
        siblings = [{"rfilename": name, **({"size": self.claims.get(name, len(content))} if self.sizes else {})}
                    for name, content in self.models[model].items()]
        return {"id": model, "modelId": model, "sha": COMMIT, "private": False, "tags": [], "downloads": 0, "likes": 0,
                "siblings": siblings}

    def _tree(self, model: str) -> list[dict[str, Any]]:
        return [{"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest(),
                 "lfs": {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}}
                for name, content in self.models[model].items()]

    def _file(self, request: Any, name: str, content: bytes, body: bool) -> None:
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": COMMIT,
                   "Accept-Ranges": "bytes"}
        span = re.fullmatch(r"bytes=(\d+)-", request.headers.get("Range", ""))
        start = int(span[1]) if span else 0
        if span:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        part = content[start:]
        cut = self.break_after.pop(name, None) if body else None
        if cut is None and body and name in self.dead:
            cut = 0
        if cut is None:
            _send(request, 206 if span else 200, part, headers, body)
        else:
            if start or cut:
                _send(request, 206 if span else 200, part[:cut], headers | {"Content-Length": str(len(part))})
            request.close_connection = True


def _send(request: Any, status: int, content: bytes, headers: dict[str, str] | None = None, body: bool = True) -> None:
    request.send_response(status)
    for key, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
        request.send_header(key, value)
    request.end_headers()
    if body:
        request.wfile.write(content)
