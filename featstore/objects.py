"""Places that are no folders: objects of S3, Google, Azure and web servers, or of whatever else fsspec opens.

An `ObjectPath` has the part of pathlib's surface that the store uses. Clients are opened on first use, once per process
and bucket. Credentials come from the environment or the tools' own files, and are in no message.
"""

from __future__ import annotations

import errno
import fnmatch
import posixpath
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from . import cache
from .clients import Facts, connect
from .errors import BadRequest

_URL = re.compile(r"([a-z][a-z0-9+.-]+)://", re.I)
_IMMUTABLE = re.compile(r"/(segments|catalogue)/[0-9a-f]{16}-[0-9a-f]{12}/")  # written once: these may be cached


class Memory:
    """The bytes used last, so many of them; without locks, so that a fork finds none taken."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._kept: dict[Any, bytes] = {}

    def get(self, name: Any) -> bytes | None:
        data = self._kept.pop(name, None)
        if data is not None:
            self._kept[name] = data  # used last, so it goes last
        return data

    def put(self, name: Any, data: bytes) -> None:
        self._kept[name] = data
        while len(self._kept) > self.count:
            self._kept.pop(next(iter(self._kept)), None)

    def clear(self) -> None:
        self._kept.clear()


SMALL = 16 << 10                 # bytes of a document that stays in memory
documents = Memory(4096)
surroundings = Memory(64)        # blocks around short ranges that were read alone, by URL and number


class ObjectPath:
    """An object, or all objects whose keys begin with it and a slash. `str` gives its URL.

    base: scheme and bucket (or host), such as s3://bucket. key: what follows, without slashes at its ends.
    """

    __slots__ = ("_facts", "base", "key")

    def __init__(self, base: str, key: str = "", facts: Facts | None = None) -> None:
        self.base, self.key, self._facts = base, key, facts

    @property
    def name(self) -> str:
        return posixpath.basename(self.key)

    @property
    def parent(self) -> ObjectPath:
        return ObjectPath(self.base, posixpath.dirname(self.key))

    def with_name(self, name: str) -> ObjectPath:
        return self.parent / name

    def __truediv__(self, other: str) -> ObjectPath:
        return ObjectPath(self.base, posixpath.join(self.key, other))

    def relative_to(self, other: ObjectPath) -> PurePosixPath:
        return PurePosixPath(self.key).relative_to(other.key)

    def resolve(self) -> ObjectPath:
        return self

    def __str__(self) -> str:
        return f"{self.base}/{self.key}" if self.key else self.base

    def __repr__(self) -> str:
        return f"ObjectPath({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ObjectPath) and (self.base, self.key) == (other.base, other.key)

    def __lt__(self, other: ObjectPath) -> bool:
        return (self.base, self.key) < (other.base, other.key)

    def __hash__(self) -> int:
        return hash((self.base, self.key))

    def __reduce__(self) -> tuple[type[ObjectPath], tuple[str, str]]:
        return ObjectPath, (self.base, self.key)

    def read_bytes(self) -> bytes:
        """The whole object; from memory or the cache where it is one that never changes."""
        if not self.immutable:
            return connect(self.base).get(self.key)
        kept = documents.get(self) if cache.remembers() else None
        if kept is None:
            kept = cache.whole(self.cache_name, lambda: connect(self.base).get(self.key))
        if len(kept) <= SMALL:
            documents.put(self, kept)
        return kept

    @property
    def cache_name(self) -> str:
        """What tells the object apart from every other, wherever it lies."""
        return f"{connect(self.base).where}/{self.key}"

    @property
    def immutable(self) -> bool:
        """Whether the object belongs to a segment or a catalogue, and so has these bytes or is gone."""
        return _IMMUTABLE.search(self.key) is not None

    def lstat(self) -> Facts:
        """Size and time of the object. FileNotFoundError if there is none."""
        facts = self._facts or connect(self.base).stat(self.key)
        if facts is None:
            raise FileNotFoundError(errno.ENOENT, "no such object", str(self))
        return facts

    stat = lstat

    def put(self, data: bytes | Path) -> None:
        """Write the object, whatever was there: bytes, or those of a local file."""
        connect(self.base).put(self.key, data)

    def create(self, data: bytes, *, new: bool = False) -> bool:
        """Write the object if there is none; False if there is one of other contents. new: there hardly is one."""
        return connect(self.base).create(self.key, data, new=new)

    def remove_below(self) -> None:
        """Remove every object whose key begins with this one and a slash."""
        connect(self.base).delete([key for key, _ in connect(self.base).below(self.key)])

    def is_file(self) -> bool:
        return self._facts is not None or connect(self.base).stat(self.key) is not None

    def is_dir(self) -> bool:
        return self._facts is None and next(self.iterdir(), None) is not None

    def exists(self) -> bool:
        return self.is_file() or self.is_dir()

    def iterdir(self) -> Iterator[ObjectPath]:
        """What lies one level below, by one listing; nothing where there is nothing."""
        folders, objects = connect(self.base).children(self.key)
        for name in folders:
            yield self / name
        for name, facts in objects.items():
            yield ObjectPath(self.base, posixpath.join(self.key, name), facts)

    def rglob(self, pattern: str) -> Iterator[ObjectPath]:
        """Every object below, by one listing."""
        for key, facts in connect(self.base).below(self.key):
            if fnmatch.fnmatchcase(posixpath.basename(key), pattern):
                yield ObjectPath(self.base, key, facts)

    def glob(self, pattern: str) -> Iterator[ObjectPath]:
        first, _, rest = pattern.partition("/")
        if "*" not in first:
            yield from (self / first).glob(rest)
            return
        for child in self.iterdir():
            if fnmatch.fnmatchcase(child.name, first) and (first.startswith(".") or not child.name.startswith(".")):
                yield from child.glob(rest) if rest else (child,)

    def unlink(self, missing_ok: bool = False) -> None:
        if not missing_ok and not self.is_file():
            raise FileNotFoundError(errno.ENOENT, "no such object", str(self))
        connect(self.base).delete([self.key])


Place = Path | ObjectPath


def place(where: str | Place) -> Place:
    """The place that a path or a URL names; file:// is a local path. BadRequest for a URL that holds a password."""
    if isinstance(where, ObjectPath):
        return where
    found = _URL.match(str(where)) if isinstance(where, str) else None
    if found is None:
        return Path(where)
    url = urlsplit(str(where))
    if url.scheme == "file":
        from urllib.request import url2pathname  # 40 ms

        return Path(url2pathname(url.path))
    user, at, host = url.netloc.rpartition("@")
    if ":" in user or url.query or url.fragment:
        raise BadRequest(f"{url.scheme}://{host}{url.path}: a URL with a password, a signature or options in it would "
                         "be seen in messages and process lists. Give it without; credentials come from the "
                         "environment (AWS_ACCESS_KEY_ID ...) or the service's own files")
    key = posixpath.normpath(url.path).strip("/") if url.path.strip("/") else ""
    return ObjectPath(f"{url.scheme}://{user}{at}{host}", key)


Range = tuple[str, int, memoryview]  # a URL, the byte at which to begin, and the memory to fill from there
GAP, TOGETHER = 64 << 10, 16 << 20   # ranges of one object this near each other are one request, up to this size


def read_many(ranges: Sequence[Range]) -> None:
    """Fill the memory of every range, all requests under way at once.

    Raises:
        FileNotFoundError: an object is gone.
        EOFError: an object ends before a range does.
    """
    if len(ranges) == 1 and cache.remembers() and _near(*ranges[0]):
        return
    by_base: dict[str, list[_Request]] = {}
    for request in _requests(ranges):
        if request.stop > request.start:
            by_base.setdefault(request.path.base, []).append(request)
        else:
            request.fill(memoryview(b""))
    for base, requests in by_base.items():
        found = connect(base).ranges([(request.path.key, request.start, request.stop) for request in requests])
        for request, data in zip(requests, found, strict=True):
            request.fill(data)


def _near(url: str, offset: int, out: memoryview) -> bool:
    """Fill a short range from its surroundings, which stay in memory: the next is likely to be near. Whether it was."""
    path, (block, within) = _parsed(url), divmod(offset, cache.BLOCK)
    if within + len(out) > cache.BLOCK or len(out) > GAP or not path.immutable:
        return False
    kept = surroundings.get((url, block))
    if kept is None:
        start = block * cache.BLOCK
        kept = cache.whole(f"{path.cache_name}#{block}", lambda: bytes(
            connect(path.base).ranges([(path.key, start, start + cache.BLOCK)])[0]))
    part = memoryview(kept)[within:within + len(out)]
    if len(part) < len(out):
        raise EOFError(_ENDS.format(path, offset + len(part), len(out) - len(part)))
    surroundings.put((url, block), kept)
    out[:] = part
    return True


class _Request:
    """Bytes `[start, stop)` of an object, from which ranges are filled, with the blocks that the cache has."""

    def __init__(self, path: ObjectPath, offset: int, out: memoryview) -> None:
        self.path, self.parts = path, [(offset, out)]
        self.start, self.stop = offset, offset + len(out)
        self.cached = cache.is_on() and path.immutable
        self._kept: dict[int, bytes] = {}
        if self.cached:
            self._kept, self.start, self.stop = cache.blocks(path.cache_name, offset, len(out))

    def takes(self, other: _Request) -> bool:
        """Whether it now covers the ranges of another request, which begins no earlier, too."""
        if (self.path != other.path or self.cached or other.start - self.stop > GAP
                or max(self.stop, other.stop) - self.start > TOGETHER):
            return False
        self.parts += other.parts
        self.stop = max(self.stop, other.stop)
        return True

    def fill(self, data: memoryview) -> None:
        if self.cached:
            cache.keep(self.path.cache_name, self.start, data)
            self._fill_from_blocks(data)
            return
        for offset, out in self.parts:
            self._copy(out, 0, data[offset - self.start:][:len(out)])
            self._check(offset, out, len(data) - (offset - self.start))

    def _fill_from_blocks(self, data: memoryview) -> None:
        (offset, out), = self.parts
        done = 0
        while done < len(out):
            number, within = divmod(offset + done, cache.BLOCK)
            kept = self._kept.get(number)
            block = memoryview(kept) if kept is not None else data[number * cache.BLOCK - self.start:][:cache.BLOCK]
            part = block[within:][:len(out) - done]
            self._check(offset + done, out[done:done + 1], len(part))
            self._copy(out, done, part)
            done += len(part)

    @staticmethod
    def _copy(out: memoryview, at: int, part: memoryview) -> None:
        out[at:at + len(part)] = part

    def _check(self, offset: int, out: memoryview, there: int) -> None:
        if there < len(out):
            raise EOFError(_ENDS.format(self.path, offset + max(there, 0), len(out) - max(there, 0)))


def _requests(ranges: Sequence[Range]) -> list[_Request]:
    """What to ask for: ranges of one object that are next to each other, or nearly, together."""
    found: list[_Request] = []
    for url, offset, out in sorted(ranges, key=lambda one: one[:2]):
        request = _Request(_parsed(url), offset, out)
        if not found or not found[-1].takes(request):
            found.append(request)
    return found


_ENDS = "{} ends at byte {}; {} more were expected"


@lru_cache(4096)
def _parsed(url: str) -> ObjectPath:
    where = place(url)
    if not isinstance(where, ObjectPath):
        raise TypeError(f"{url} is no URL of an object")
    return where
