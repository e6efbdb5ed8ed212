"""Bytes of a store, durably: atomic documents, exclusive creation, folder syncs, cached read handles.

A store lies in a local folder or, under a URL, in objects (see objects.py). What differs between the two is in here:
objects need no syncs and no folders, appear as a whole or not at all, and are written by way of a local folder.
"""

from __future__ import annotations

import contextlib
import errno
import json
import mmap
import os
import secrets
import shutil
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from . import objects
from .errors import CorruptSegment, DiskFull, NotAStore
from .objects import ObjectPath as ObjectPath
from .objects import Place as Place
from .objects import place as place

_READS = hasattr(os, "preadv")  # where it is missing (Windows) every file is read through memory
OPEN_FILES = 256  # read handles kept; well below the usual limit of 1,024 per process
REQUESTS = 32     # for documents and indexes, at one time
STAGED = "featstore-"  # how the folders begin in which what goes to objects is gathered
_T = TypeVar("_T")


def sync_folder(folder: Place) -> None:
    """Make the entries of `folder` durable; where that means nothing (objects, Windows), do nothing."""
    if isinstance(folder, ObjectPath) or os.name == "nt":
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


def append(path: Place, lines: bytes) -> None:
    """Add whole lines to a file that other processes add to: in one write, so that none falls into another's.

    An object is read and written anew: of two processes that add to it at once, one may lose its lines.
    """
    if isinstance(path, ObjectPath):
        path.put((path.read_bytes() if path.is_file() else b"") + lines)
        return
    fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        size = os.fstat(fd).st_size
        if size and os.pread(fd, 1, size - 1) != b"\n":  # a process was killed while it wrote the line before
            lines = b"\n" + lines
        os.write(fd, lines)
    finally:
        os.close(fd)


def sync_tree(folder: Place) -> None:
    """Make everything below `folder` durable, its own entry in its parent excepted; objects are.

    Called once when all is written: a journalling file system then commits a few times instead of once a file.
    """
    if isinstance(folder, ObjectPath):
        return
    for root, _, entries in os.walk(folder):
        for name in entries:
            with Path(root, name).open("r+b", buffering=0) as file:
                os.fsync(file.fileno())
    for root, _, _ in os.walk(folder, topdown=False):
        sync_folder(Path(root))


def put_document(path: Place, record: dict[str, Any]) -> None:
    """Put a JSON document in place in one step, durably: a reader sees all of it or what was there before."""
    put(path, _json(record))


def put(path: Place, data: bytes) -> None:
    """`put_document` for any bytes."""
    if isinstance(path, ObjectPath):
        path.put(data)
        return
    with _staged(path, data) as staged:
        staged.replace(path)
    sync_folder(path.parent)


def overwrite(path: Place, data: bytes) -> None:
    """Write a small file in place, and its folder if there is none: for hints, which a crash may take."""
    if isinstance(path, ObjectPath):
        path.put(data)
        return
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)


def remove_if_empty(folder: Place) -> None:
    """Remove a folder unless there is something in it."""
    if isinstance(folder, Path):
        with contextlib.suppress(OSError):
            folder.rmdir()


def commit_document(path: Place, record: dict[str, Any]) -> None:
    """`put_document` for a name that nobody else makes; CorruptSegment if it is taken all the same."""
    if isinstance(path, Path):
        put_document(path, record)
    elif not path.create(_json(record), new=True):
        raise CorruptSegment(f"{path} is there already, with other contents: something else wrote it. Nothing of this "
                             "segment was committed; run the same command again.")


def create_document(path: Place, record: dict[str, Any]) -> bool:
    """Put a JSON document in place if there is none; False if somebody else was first."""
    if isinstance(path, ObjectPath):
        return path.create(_json(record))
    if path.exists():
        return False
    with _staged(path, _json(record)) as staged:
        try:
            os.link(staged, path)  # fails where the name is taken: no race between two writers
        except FileExistsError:
            return False
    sync_folder(path.parent)
    return True


def read_document(path: Place) -> dict[str, Any]:
    """The JSON object in `path`. FileNotFoundError passes through; anything but an object is NotAStore."""
    try:
        record = json.loads(path.read_bytes())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise NotAStore(f"{path} is not a JSON document ({error}); the store it belongs to is damaged there") from None
    if not isinstance(record, dict):
        raise NotAStore(f"{path} holds {type(record).__name__}, expected a Zarr v3 document")
    return record


def make_folders(root: Place, folder: Place) -> None:
    """Make `folder` and its parents below `root`, each entry durable. Objects need none."""
    if isinstance(folder, ObjectPath) or folder == root or folder.is_dir():
        return
    make_folders(root, folder.parent)
    with disk_room(folder):
        folder.mkdir(exist_ok=True)
    sync_folder(folder.parent)


def names(folder: Place) -> list[str]:
    """The names in a folder, sorted; none where there is no folder. One request where it holds objects."""
    try:
        if isinstance(folder, Path):
            return sorted(os.listdir(folder))  # noqa: PTH208 (100,000 names: no 100,000 paths)
        return sorted(entry.name for entry in folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def staging(folder: Place) -> Path:
    """Where the files of a new folder are to be written before `upload`: in itself, or for objects in a local one."""
    if isinstance(folder, Path):
        return folder
    return Path(tempfile.mkdtemp(prefix=f"{STAGED}{folder.name}-"))


def upload(staged: Path, folder: Place) -> None:
    """Put every file that was written in `staged` beside its fellows, and hold their sizes against what is there."""
    if isinstance(folder, Path):
        return
    files = {path.relative_to(staged).as_posix(): path for path in staged.rglob("*") if path.is_file()}
    concurrently(folder, lambda name: (folder / name).put(files[name]), files)
    found = {path.relative_to(folder).as_posix(): path.lstat().st_size for path in folder.rglob("*")}
    for name, path in files.items():
        if found.get(name) != path.stat().st_size:
            raise CorruptSegment(f"{folder / name} has {found.get(name, 0)} bytes after its upload, expected "
                                 f"{path.stat().st_size}. Nothing of it was committed; run the same command again.")


def spool(store: Place) -> Path:
    """A new folder for what a run has to put aside: in the store, or for objects among the temporary files."""
    if isinstance(store, Path):
        return store / "spool" / new_id()
    return Path(tempfile.gettempdir(), f"{STAGED}{new_id()}", "spool")


def unstage(staged: Path, folder: Place) -> None:
    """Remove what `staging` made for objects."""
    if isinstance(folder, ObjectPath):
        shutil.rmtree(staged, ignore_errors=True)


def remove_tree(folder: Place) -> None:
    """Remove all that is below `folder`, and the folder; what is gone already is gone. OSError where it cannot be."""
    if isinstance(folder, ObjectPath):
        folder.remove_below()
    else:
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(folder)


def bytes_under(path: Place) -> int:
    """Bytes of a file, or of the files in a folder."""
    return sum(facts.st_size for facts in _facts_below(path, folders=False))


def touched_s(path: Place, *, deep: bool = True) -> float:
    """The time, in seconds since 1970, at which a file, or anything in a folder, was written last; 0 if it is gone."""
    return max((facts.st_mtime for facts in _facts_below(path, folders=True, deep=deep)), default=0.0)


def free_bytes(path: Place) -> int | None:
    """Room on the disk that holds `path`; None where there is no telling."""
    return shutil.disk_usage(path).free if isinstance(path, Path) else None


def concurrently(folder: Place, work: Callable[[_T], Any], items: Iterable[_T]) -> list[Any]:
    """What `work` gives for every item; where `folder` holds objects, many at a time, since each is a request.

    The first error is raised when all have ended.
    """
    todo = list(items)
    if isinstance(folder, Path) or len(todo) < 2:
        return [work(item) for item in todo]
    with ThreadPoolExecutor(min(REQUESTS, len(todo))) as threads:  # none of them is left for a fork to lose
        return list(threads.map(work, todo))


def new_id() -> str:
    """A name that nobody else makes; names sort by the time they were made."""
    return f"{time.time_ns():016x}-{secrets.token_hex(6)}"


def age_s(name: str) -> float:
    """Seconds since `new_id` made `name`."""
    return (time.time_ns() - int(name.split("-")[0], 16)) / 1e9


@contextlib.contextmanager
def disk_room(path: Place) -> Iterator[None]:
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
def _staged(path: Path, data: bytes) -> Iterator[Path]:
    staged = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
    try:
        write_synced(staged, data)
        yield staged
    finally:
        staged.unlink(missing_ok=True)


def _json(record: dict[str, Any]) -> bytes:
    return json.dumps(record, indent=1, ensure_ascii=False).encode()


def _facts_below(path: Place, *, folders: bool, deep: bool = True) -> Iterator[Any]:
    """What is known of a file and, if it is a folder, of what is in it; what somebody else removes meanwhile is not."""
    if isinstance(path, ObjectPath):
        below = [item for item in (path.rglob("*") if deep else path.iterdir()) if item.is_file()]
        yield from (item.lstat() for item in below or ([path] if path.is_file() else []))
        return
    walked = os.walk(path) if deep else iter(())  # rglob would raise where a folder goes while it is listed
    for item in (path, *(Path(root, name) for root, inside, files in walked for name in (*inside, *files))):
        with contextlib.suppress(FileNotFoundError):
            if folders or not item.is_dir():
                yield item.lstat()


class Mapped(str):
    """The path of a file that is read through memory: mapped once, then copied without a call of the system."""


class _Handle:
    """A file open for reading; closed when the last reader lets go of it."""

    def __init__(self, path: str) -> None:
        self.fd = -1
        self.path, self.fd = path, os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))

    @cached_property
    def map(self) -> np.ndarray:
        return np.frombuffer(mmap.mmap(self.fd, 0, access=mmap.ACCESS_READ), np.uint8)

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)

    def read(self, offset: int, out: memoryview) -> None:
        """Fill `out` from byte `offset`."""
        count = os.preadv(self.fd, [out], offset)
        while count < len(out):  # a single call reads at most 2 GiB
            more = os.preadv(self.fd, [out[count:]], offset + count)
            if more == 0:
                raise EOFError(f"{self.path} ends at byte {offset + count}; {len(out) - count} more were expected")
            count += more

    def copy(self, offset: int, out: memoryview) -> None:
        """Fill `out` from byte `offset` of the file's map."""
        part = self.map[offset:offset + len(out)]
        if len(part) < len(out):
            raise EOFError(f"{self.path} ends at byte {len(self.map)}; {len(out) - len(part)} more were expected")
        np.frombuffer(out, np.uint8)[:] = part  # numpy lets other threads run meanwhile


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


Range = tuple[str, int, memoryview]  # a file, URL or Mapped, the byte to begin with, and the memory to fill from there


def read_many(ranges: Sequence[Range]) -> None:
    """Fill the memory of every range. All frames are read here, those of a batch by one call.

    The whole batch is announced to the system before the first byte is asked for, so that a disk fetches all of it at
    once instead of piece by piece. Of objects every range is one request, and all are under way at once.

    Raises:
        FileNotFoundError: a file is gone.
        EOFError: a file ends before a range does.
    """
    if len(ranges) > 1:
        remote = [part for part in ranges if "://" in part[0]]
        if remote:
            objects.read_many(remote)
            ranges = [part for part in ranges if "://" not in part[0]]
    elif ranges and "://" in ranges[0][0]:
        return objects.read_many(ranges)
    for first in range(0, len(ranges), OPEN_FILES):
        some = ranges[first:first + OPEN_FILES]
        files = [handles.get(path) for path, _, _ in some]
        if len(some) > 1 and hasattr(os, "posix_fadvise"):
            for file, (_, offset, out) in zip(files, some, strict=True):
                os.posix_fadvise(file.fd, offset, len(out), os.POSIX_FADV_WILLNEED)
        for file, (path, offset, out) in zip(files, some, strict=True):
            (file.read if _READS and type(path) is not Mapped else file.copy)(offset, out)
    return None
