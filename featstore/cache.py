"""A local copy of what was read from object stores: whole small objects, and blocks of frames, up to a size.

Off unless $FEATSTORE_CACHE names a folder; $FEATSTORE_CACHE_BYTES is its limit (20 GB unless given). Only objects that
never change are kept. Any number of processes may share the folder: a file appears as a whole and carries its own
checksum, and where that does not match it is fetched again. What was used least recently goes first.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Callable, Iterator
from hashlib import blake2b
from pathlib import Path

from .errors import BadRequest

LIMIT = 20_000_000_000
BLOCK = 256 * 1024    # bytes of an object that are kept together: two inner chunks of frames
USED_S = 60.0         # a file read again within this is not marked as used again
_TRAILER = 4 + 8      # CRC-32C and length of what comes before
_bypassed = 0         # how many that read what the server has, whatever is kept, are at work


@contextlib.contextmanager
def bypassed() -> Iterator[None]:
    """In this process: read what the server has, whatever is kept here."""
    global _bypassed
    _bypassed += 1
    try:
        yield
    finally:
        _bypassed -= 1


def is_on() -> bool:
    return not _bypassed and bool(os.environ.get("FEATSTORE_CACHE"))


def remembers() -> bool:
    """Whether what was read a moment ago may be taken from memory."""
    return not _bypassed


def whole(name: str, fetch: Callable[[], bytes]) -> bytes:
    """An object's bytes: those kept, else what `fetch` gives, which is then kept."""
    if not is_on():
        return fetch()
    kept = _folder()
    data = kept.get(name)
    if data is None:
        data = fetch()
        kept.put(name, data)
    return data


def blocks(name: str, offset: int, length: int) -> tuple[dict[int, bytes], int, int]:
    """The blocks of an object that `[offset, offset + length)` lies in, as far as they are kept, by their number.

    Also the first byte and the one behind the last of what covers the missing ones; equal where none is.
    """
    kept = _folder()
    numbers = range(offset // BLOCK, (offset + max(length, 1) - 1) // BLOCK + 1)
    found = {number: data for number in numbers if (data := kept.get(f"{name}#{number}")) is not None}
    missing = [number for number in numbers if number not in found]
    return found, missing[0] * BLOCK if missing else 0, (missing[-1] + 1) * BLOCK if missing else 0


def keep(name: str, start: int, data: memoryview) -> None:
    """Keep what was fetched of an object from byte `start`, which begins a block."""
    kept = _folder()
    for at in range(0, len(data), BLOCK):
        kept.put(f"{name}#{(start + at) // BLOCK}", data[at:at + BLOCK])


class Folder:
    """The cache's folder as one process sees it."""

    def __init__(self, path: Path, limit: int) -> None:
        self.path, self.limit = path, limit
        self._unseen = limit  # bytes written here since the folder was looked through; at first it never was

    def get(self, name: str) -> bytes | None:
        """What is kept under a name, whole and unchanged; None otherwise."""
        import google_crc32c

        path = self._place(name)
        try:
            data = path.read_bytes()
        except OSError:
            return None
        body, trailer = data[:-_TRAILER], data[-_TRAILER:]
        if len(trailer) < _TRAILER or trailer != _trailer(google_crc32c.value(body), len(body)):
            path.unlink(missing_ok=True)
            return None
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > USED_S:
                os.utime(path)
        return body

    def put(self, name: str, data: bytes | memoryview) -> None:
        """Keep `data`; where the disk has no room for it, do not."""
        import google_crc32c

        if len(data) > self.limit // 4:
            return
        body = bytes(data)
        path = self._place(name)
        staged = path.with_name(f".{secrets.token_hex(8)}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            staged.write_bytes(body + _trailer(google_crc32c.value(body), len(body)))
            staged.replace(path)
        except OSError:  # full, or read-only: the data are at hand all the same
            with contextlib.suppress(OSError):
                staged.unlink(missing_ok=True)
            return
        self._unseen += len(body)  # without a lock, which a fork might find taken: a byte miscounted is no harm
        if self._unseen > self.limit // 20:
            self._unseen = 0
            self.trim()

    def trim(self) -> None:
        """Where the folder comes within a twentieth of its limit, remove what was used least recently, down to 0.9."""
        files = []
        for path in self.path.glob("*/*"):
            with contextlib.suppress(OSError):  # another process removed it
                facts = path.stat()
                files.append((facts.st_mtime, facts.st_size, path))
        total = sum(size for _, size, _ in files)
        if total <= self.limit - self.limit // 20:
            return
        for _, size, path in sorted(files):
            if total <= self.limit - self.limit // 10:
                return
            with contextlib.suppress(OSError):
                path.unlink()
            total -= size

    def _place(self, name: str) -> Path:
        digest = blake2b(name.encode(), digest_size=20).hexdigest()
        return self.path / digest[:2] / digest[2:]


_folders: dict[tuple[str, int], Folder] = {}


def _folder() -> Folder:
    """The folder that the environment names now."""
    text = os.environ.get("FEATSTORE_CACHE_BYTES", str(LIMIT))
    try:
        limit = int(float(text))
    except ValueError:
        raise BadRequest(f"FEATSTORE_CACHE_BYTES={text!r}: expected a number of bytes, such as 20e9") from None
    key = str(Path(os.environ["FEATSTORE_CACHE"]).expanduser()), limit
    if key not in _folders:
        _folders[key] = Folder(Path(key[0]), limit)
    return _folders[key]


def _trailer(checksum: int, length: int) -> bytes:
    return checksum.to_bytes(4, "little") + length.to_bytes(8, "little")

