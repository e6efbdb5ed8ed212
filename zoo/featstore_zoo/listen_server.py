"""A tiny server for a listening test: the page, the next listener's number, and a folder that answers are put into.

It listens on this machine alone; whoever lets others in puts a server of their own before it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from featstore import storage
from featstore.errors import BadRequest

from . import listen

LARGEST = 1 << 20  # bytes of an answer
HOSTS = ("127.0.0.1", "localhost")


class Server(ThreadingHTTPServer):
    """Serves the test in a folder on 127.0.0.1; port 0 takes a free one. `told(listener)` after each answer kept."""

    def __init__(self, folder: Path, port: int = 0, told: Callable[[int], None] | None = None) -> None:
        self.key = listen.read_key(folder)
        self.folder, self.told = folder, told
        self.page = (folder / "index.html").read_bytes()
        self.given = 0
        super().__init__((HOSTS[0], port), _Handler)

    @property
    def url(self) -> str:
        return f"http://{HOSTS[0]}:{self.server_port}/"

    def next_number(self) -> int:
        """A number that nobody answered with, and that was given to nobody since the server began."""
        used = {int(found[1]) for path in (self.folder / "answers").glob("*.json")
                if (found := re.fullmatch(r"answers-[0-9a-f]+-(\d+)(?:-\w+)?", path.stem))}
        self.given = next(number for number in range(self.given + 1, self.given + len(used) + 2) if number not in used)
        return self.given

    def keep(self, content: bytes) -> int:
        """Put checked answers into the folder, under a name of their own; whose they are."""
        listener = int(listen.answer(self.key, content, "the answer")["listener"])
        home = self.folder / "answers"
        home.mkdir(exist_ok=True)
        name = f"answers-{self.key['test']}-{listener:03d}-{storage.new_id().replace('-', '')}.json"
        storage.put(home / name, content)
        return listener


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        if not self._at_home():
            return
        if self.path in ("/", "/index.html"):
            self._reply(200, self.server.page, "text/html; charset=utf-8")
        elif self.path == "/number":
            self._reply(200, json.dumps(self.server.next_number()).encode(), "application/json")
        else:
            self._reply(404, b"not here: the test is at /")

    def do_POST(self) -> None:
        if not self._at_home():
            return
        length = int(self.headers.get("Content-Length") or 0)
        if self.path != "/answers" or self.headers.get("Content-Type") != "application/json":
            self._reply(404, b"answers are JSON and go to /answers")
        elif not 0 < length <= LARGEST:
            self._reply(413, f"an answer has 1 to {LARGEST} bytes, this one {length}".encode())
        else:
            try:
                listener = self.server.keep(self.rfile.read(length))
            except BadRequest as error:
                self._reply(400, str(error).encode())
                return
            self._reply(200, b"kept")
            if self.server.told is not None:
                self.server.told(listener)

    def log_message(self, *_: Any) -> None:
        """Nothing: what matters is told by `told`."""

    def _at_home(self) -> bool:
        """Whether it was asked for by this machine's name: a page elsewhere cannot pretend to be that."""
        if (self.headers.get("Host") or "").rpartition(":")[0] in HOSTS:
            return True
        self._reply(403, b"this server answers to 127.0.0.1 and localhost alone")
        return False

    def _reply(self, status: int, content: bytes, kind: str = "text/plain; charset=utf-8") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(content)
