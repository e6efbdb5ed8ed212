"""Reading over a network: batches of crops from a server that waits 20 ms before every answer.

    python benchmarks/remote.py [--rounds 20] [--wait-ms 20]

The server is a process of its own on this machine: asyncio, keep-alive, range requests, any number at a time. What is
measured is `View.read_batch` of 32 crops of 2 s of 5 features (one request per crop and feature) with the index loaded,
first as connections are opened and then with them open. Requests are counted by the server. The same batches from the
folder itself say what of it is alignment.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import numpy as np

import featstore as fs

CROPS, SECONDS, UTTERANCES, LENGTH_S = 32, 2.0, 64, 20
FEATURES = {"whisper": (Fraction(50), 1024, "float16"), "contentvec": (Fraction(50), 768, "float16"),
            "log-mel": (Fraction(24000, 256), 100, "float32"), "f0": (Fraction(200), 0, "float32"),
            "energy": (Fraction(200), 0, "float32")}


def build(path: Path) -> None:
    rng = np.random.default_rng(0)
    with fs.create(path).writer() as w:
        for name, (rate, dim, dtype) in FEATURES.items():
            w.declare(name, fs.Spec(made_by=name, version=1, frame_rate=rate, dtype=dtype, dim=dim,
                                    kind="f0" if name == "f0" else "continuous"))
        for number in range(UTTERANCES):
            for name, (rate, dim, dtype) in FEATURES.items():
                frames = int(rate * LENGTH_S)
                w.write(f"take {number}", name, rng.random((frames, dim) if dim else frames, np.float32).astype(dtype))


def serve(root: Path, wait_s: float) -> None:
    """Files and folders below `root`, every answer after a wait. /count says how many were given."""
    given = 0

    def page(path: Path) -> bytes:
        return "".join(f'<a href="{child.name}{"/" if child.is_dir() else ""}">x</a>\n'
                       for child in path.iterdir()).encode()

    files = {f"/{path.relative_to(root)}": path.read_bytes() if path.is_file() else page(path)
             for path in root.rglob("*")}

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal given
        while head := await reader.readuntil(b"\r\n\r\n"):
            method, path = head.split(b" ", 2)[:2]
            name = urllib.request.unquote(path.decode()).rstrip("/")
            if name == "/count":
                status, extra, data = "200 OK", "", str(given).encode()
            else:
                given += 1
                await asyncio.sleep(wait_s)
                status, extra, data = answer(files, name, head)
            writer.write(f"HTTP/1.1 {status}\r\nContent-Length: {len(data)}\r\n{extra}\r\n".encode())
            if method != b"HEAD":
                writer.write(data)
            await writer.drain()

    async def safely(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await talk(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    async def run() -> None:
        server = await asyncio.start_server(safely, "127.0.0.1", 0, backlog=1024)
        print(server.sockets[0].getsockname()[1], flush=True)
        await server.serve_forever()

    asyncio.run(run())


def answer(files: dict[str, bytes], name: str, head: bytes) -> tuple[str, str, bytes | memoryview]:
    stamp = "Last-Modified: Wed, 25 Nov 2026 00:00:00 GMT\r\n"
    if name not in files:
        return "404 Not Found", "", b""
    data = files[name]
    asked = re.search(rb"\r\nrange: bytes=(\d+)-(\d+)", head, re.I)
    if asked is None:
        return "200 OK", stamp, data
    start, stop = int(asked[1]), min(int(asked[2]) + 1, len(data))
    return ("206 Partial Content", f"{stamp}Content-Range: bytes {start}-{stop - 1}/{len(data)}\r\n",
            memoryview(data)[start:stop])


@contextmanager
def server(root: Path, wait_ms: float) -> Iterator[str]:
    process = subprocess.Popen([sys.executable, __file__, "--serve", str(root), "--wait-ms", str(wait_ms)],
                               stdout=subprocess.PIPE, text=True)
    with process:
        try:
            assert process.stdout is not None
            yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.kill()


def count(url: str) -> int:
    with urllib.request.urlopen(f"{url}/count", timeout=10) as found:
        return int(found.read())


def measure(home: Path, url: str, rounds: int) -> None:
    local, _ = batches(fs.open(home / "s.zarr").view(list(FEATURES), like="log-mel"), rounds, lambda: 0)
    print(f"{CROPS} crops x {len(FEATURES)} features from the folder: {statistics.median(local[2:]):6.1f} ms")
    start = time.perf_counter()
    view = fs.open(f"{url}/s.zarr").view(list(FEATURES), like="log-mel")
    print(f"open the store, a view of {len(FEATURES)} features: {time.perf_counter() - start:6.3f} s, "
          f"{count(url)} requests")
    times, asked = batches(view, rounds, lambda: count(url))
    print(f"{CROPS} crops x {len(FEATURES)} features:")
    print(f"  first, with connections to open {times[0]:7.1f} ms   {asked[0]} requests")
    rest = sorted(times[2:])
    print(f"  then, median of {len(rest)}{'':14} {statistics.median(rest):7.1f} ms   "
          f"{statistics.median(asked[2:]):.0f} requests   ({rest[0]:.1f} to {rest[-1]:.1f} ms)")


def batches(view: fs.View, rounds: int, counted: Callable[[], int]) -> tuple[list[float], list[int]]:
    """Milliseconds and requests of each batch."""
    rng, frames = np.random.default_rng(1), int(SECONDS * Fraction(24000, 256))
    keys, out = list(view), None
    times, asked, before = [], [], counted()
    for _ in range(rounds + 2):
        items = [(keys[i], int(rng.integers(0, view.length(keys[i]) - frames)))
                 for i in rng.choice(len(keys), CROPS, replace=False)]
        start = time.perf_counter()
        out = view.read_batch(items, frames=frames, out=out)
        times.append((time.perf_counter() - start) * 1000)
        now = counted()
        asked.append(now - before)
        before = now
    return times, asked


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--wait-ms", type=float, default=20.0)
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help="where the store is made (64 MB)")
    args = parser.parse_args()
    if args.serve is not None:
        serve(args.serve, args.wait_ms / 1000)
        return
    os.environ.pop("FEATSTORE_CACHE", None)
    with tempfile.TemporaryDirectory(dir=args.folder) as home:
        build(Path(home, "s.zarr"))
        with server(Path(home), args.wait_ms) as url:
            measure(Path(home), url, args.rounds)


if __name__ == "__main__":
    main()
