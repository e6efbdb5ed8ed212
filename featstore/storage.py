"""Bytes on a local file system, durably: atomic documents, exclusive creation, folder syncs, cached read handles."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .errors import DiskFull, NotAStore

OPEN_FILES = 256  # read handles kept; well below the usual limit of 1,024 per process


def sync_folder(folder: Path) -> None:
    """Make the entries of `folder` durable; where the platform cannot (Windows), do nothing."""
    if os.name == "nt":
        return
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write(path: Path, data: bytes | memoryview) -> None:
    """Write a new file; `sync_tree` or `sync_folder` makes it durable."""
    with disk_room(path), path.open("wb") as file:
        file.write(data)


def write_synced(path: Path, data: bytes | memoryview) -> None:
    """Write a new file and its bytes to the disk; the folder entry is the caller's to sync."""
    with disk_room(path), path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def append(path: Path, lines: bytes) -> None:
    """Add whole lines to a file that other processes add to: in one write, so that none falls into another's."""
    fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        size = os.fstat(fd).st_size
        if size and os.pread(fd, 1, size - 1) != b"\n":  # a process was killed while it wrote the line before
            lines = b"\n" + lines
        os.write(fd, lines)
    finally:
        os.close(fd)


def sync_tree(folder: Path) -> None:
    """Make everything below `folder` durable, its own entry in its parent excepted.

    Called once when all is written: a journalling file system then commits a few times instead of once a file.
    """
    for root, _, names in os.walk(folder):
        for name in names:
            with Path(root, name).open("r+b", buffering=0) as file:
                os.fsync(file.fileno())
    for root, _, _ in os.walk(folder, topdown=False):
        sync_folder(Path(root))


def put_document(path: Path, record: dict[str, Any]) -> None:
    """Put a JSON document in place in one step, durably: a reader sees all of it or what was there before."""
    with _staged(path, record) as staged:
        staged.replace(path)
    sync_folder(path.parent)


def create_document(path: Path, record: dict[str, Any]) -> bool:
    """Put a JSON document in place if there is none; False if somebody else was first."""
    if path.exists():
        return False
    with _staged(path, record) as staged:
        try:
            os.link(staged, path)  # fails where the name is taken: no race between two writers
        except FileExistsError:
            return False
    sync_folder(path.parent)
    return True


def read_document(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. FileNotFoundError passes through; anything but an object is NotAStore."""
    try:
        record = json.loads(path.read_bytes())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise NotAStore(f"{path} is not a JSON document ({error}); the store it belongs to is damaged there") from None
    if not isinstance(record, dict):
        raise NotAStore(f"{path} holds {type(record).__name__}, expected a Zarr v3 document")
    return record


def make_folders(root: Path, folder: Path) -> None:
    """Make `folder` and its parents below `root`, each entry durable."""
    if folder == root or folder.is_dir():
        return
    make_folders(root, folder.parent)
    with disk_room(folder):
        folder.mkdir(exist_ok=True)
    sync_folder(folder.parent)


def new_id() -> str:
    """A name that nobody else makes; names sort by the time they were made."""
    return f"{time.time_ns():016x}-{secrets.token_hex(6)}"


def age_s(name: str) -> float:
    """Seconds since `new_id` made `name`."""
    return (time.time_ns() - int(name.split("-")[0], 16)) / 1e9


@contextlib.contextmanager
def disk_room(path: Path) -> Iterator[None]:
    """Turn "no space left" into DiskFull, and make "permission denied" say what to do; both name the place."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT) and not isinstance(error, DiskFull):
            raise DiskFull(f"no space left for {path}: what was committed before is kept. "
                           "Free some room and run the same command again; it goes on from here.") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise PermissionError(f"{path} may not be written ({error.strerror}): it needs write permission for this "
                                  "user, or `featstore copy STORE ELSEWHERE` a place that has it") from error
        raise


@contextlib.contextmanager
def _staged(path: Path, record: dict[str, Any]) -> Iterator[Path]:
    staged = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
    try:
        write_synced(staged, json.dumps(record, indent=1, ensure_ascii=False).encode())
        yield staged
    finally:
        staged.unlink(missing_ok=True)


class _Handle:
    """A file open for reading; closed when the last reader lets go of it."""

    def __init__(self, path: str) -> None:
        self.fd = -1
        self.path, self.fd = path, os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)

    def read(self, offset: int, out: memoryview) -> None:
        count = os.preadv(self.fd, [out], offset)
        while count < len(out):  # a single call reads at most 2 GiB
            more = os.preadv(self.fd, [out[count:]], offset + count)
            if more == 0:
                raise EOFError(f"{self.path} ends at byte {offset + count}; {len(out) - count} more were expected")
            count += more


class _Handles:
    """The last OPEN_FILES files read. A file that is written anew under the same path is not noticed: none is."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._files: OrderedDict[str, _Handle] = OrderedDict()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._forked)

    def get(self, path: str) -> _Handle:
        with self._lock:
            file = self._files.get(path)
            if file is None:
                file = self._files[path] = _Handle(path)
                while len(self._files) > OPEN_FILES:
                    self._files.popitem(last=False)
            else:
                self._files.move_to_end(path)
            return file

    def forget(self, prefix: str) -> None:
        """Let go of all files below a path, before they are removed."""
        with self._lock:
            for path in [p for p in self._files if p.startswith(prefix)]:
                del self._files[path]

    def _forked(self) -> None:
        self._lock = threading.Lock()  # another thread of the parent may have held it


handles = _Handles()


Range = tuple[str, int, memoryview]  # a file, the byte at which to begin, and the memory to fill from there


def read_many(ranges: Sequence[Range]) -> None:
    """Fill the memory of every range. All frames are read here, those of a batch by one call.

    The whole batch is announced to the system before the first byte is asked for, so that a disk fetches all of it at
    once instead of piece by piece.

    Raises:
        FileNotFoundError: a file is gone.
        EOFError: a file ends before a range does.
    """
    for first in range(0, len(ranges), OPEN_FILES):
        some = ranges[first:first + OPEN_FILES]
        files = [handles.get(path) for path, _, _ in some]
        if len(some) > 1 and hasattr(os, "posix_fadvise"):
            for file, (_, offset, out) in zip(files, some, strict=True):
                os.posix_fadvise(file.fd, offset, len(out), os.POSIX_FADV_WILLNEED)
        for file, (_, offset, out) in zip(files, some, strict=True):
            file.read(offset, out)
