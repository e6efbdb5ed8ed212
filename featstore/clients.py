"""What speaks to object stores: obstore for S3, Google, Azure, web servers and memory; fsspec for everything else.

A client is opened on first use, once per process and bucket. Credentials come from the environment or from the tools'
own files and stay in here: what a server or a library says is never passed on as it is, for it may quote them.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import posixpath
import random
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from importlib.machinery import ExtensionFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, Protocol, TypeVar
from urllib.parse import unquote, urlsplit

from .errors import ConditionalPutIgnored, MissingPackage, RemoteError

RETRIES = 8           # of one request, 0.05 s to 2 s apart: about 7 s until a server that is down is given up
TRIES = 4             # of a request whose answer broke off
THREADS, TOGETHER = 24, 10  # so many calls at one time, each of which has so many ranges of an object under way
SETTLE_S = 1.0        # where conditional PUT is ignored: what another writer put meanwhile shows after this
_KEYED = ("AWS_ACCESS_KEY_ID", "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_SKIP_SIGNATURE",
          "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "AWS_CONTAINER_CREDENTIALS_FULL_URI")
_OBSTORE = {"s3", "s3a", "gs", "az", "adl", "azure", "abfs", "abfss", "memory"}
_T = TypeVar("_T")


class Facts(NamedTuple):
    """What a listing says of an object; the names are those of `os.stat_result`."""

    st_size: int
    st_mtime: float


class Client(Protocol):
    """One bucket, server or file system. Keys are relative to it, without slashes at their ends.

    where: what tells this bucket apart from one of the same name elsewhere.
    """

    where: str

    def get(self, key: str) -> bytes: ...

    def ranges(self, wanted: Sequence[tuple[str, int, int]]) -> list[memoryview]:
        """The bytes of (key, start, stop) each, all asked for at once; fewer where an object ends before."""
        ...

    def put(self, key: str, data: bytes | Path) -> None: ...

    def create(self, key: str, data: bytes, *, new: bool = False) -> bool:
        """Write an object if there is none; False if there is one of other contents. new: there hardly is one."""
        ...

    def stat(self, key: str) -> Facts | None: ...

    def children(self, key: str) -> tuple[list[str], dict[str, Facts | None]]:
        """The names one level below: of what has more below it, and of objects."""
        ...

    def below(self, key: str) -> Iterator[tuple[str, Facts | None]]: ...

    def delete(self, keys: Sequence[str]) -> None: ...


def connect(base: str) -> Client:
    """The client of this process for a scheme and bucket, such as s3://bucket."""
    client = _clients.get(base)
    if client is None:
        scheme = base.partition("://")[0]
        kind = _Web if scheme in ("http", "https") else _Obstore if scheme in _OBSTORE else _Fsspec
        client = _clients[base] = kind(base)
    return client


_clients: dict[str, Client] = {}
_forked = False  # whether this process has inherited an obstore whose threads it has not


def _in_child() -> None:
    global _forked
    _clients.clear()
    _forked = _forked or "obstore" in sys.modules
    _library.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
_library: list[tuple[ModuleType, ModuleType]] = []


def _obstore() -> tuple[ModuleType, ModuleType]:
    """obstore and obstore.store, in a form that works in this process.

    obstore keeps its threads in its shared library, for good. A forked process inherits the library without the threads
    and would wait for them for ever; so it loads a copy of the library under another path (70 ms), which has none yet.
    """
    if not _library:
        if importlib.util.find_spec("obstore") is None:
            raise MissingPackage("obstore is not installed, which reads and writes object stores: "
                                 "pip install 'featstore[s3]'")
        inherited = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "obstore"}
        if _forked:
            for name in inherited:
                del sys.modules[name]
            _load_copy(inherited["obstore._obstore"])
        import obstore
        import obstore.store

        _library.append((obstore, obstore.store))
        if _forked:  # whoever has imported obstore before keeps what he has
            for name in [name for name in sys.modules if name.partition(".")[0] == "obstore"]:
                del sys.modules[name]
            sys.modules.update(inherited)
    return _library[0]


def _load_copy(original: ModuleType) -> None:
    with tempfile.NamedTemporaryFile(suffix=".abi3.so") as copy:
        copy.write(Path(str(original.__file__)).read_bytes())
        copy.flush()
        loader = ExtensionFileLoader(original.__name__, copy.name)
        spec = importlib.util.spec_from_file_location(original.__name__, copy.name, loader=loader)
        if spec is None:
            raise MissingPackage("obstore cannot be loaded anew in a forked process; start processes by spawn")
        module = sys.modules[original.__name__] = importlib.util.module_from_spec(spec)
        loader.exec_module(module)


class _Obstore:
    """A bucket through obstore, which retries what fails on the way; what breaks off in the middle is retried here."""

    def __init__(self, base: str) -> None:
        self.base = self.where = base
        self._unkeyed = False  # nothing says what the keys are: a virtual machine may know
        self._obs, self._stores = _obstore()
        self._store = self._open()

    def _open(self) -> Any:
        if self.base.startswith("memory:"):
            return _memory.setdefault(self.base, self._stores.MemoryStore())
        config, endpoint = _profile() if self.base.startswith("s3") else {}, ""
        if self.base.startswith("s3"):
            endpoint = (os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
                        or config.get("endpoint", ""))
            self.where = f"{endpoint} {self.base}"
            self._unkeyed = "access_key_id" not in config and not any(name in os.environ for name in _KEYED)
        options = {"config": config} if config else {}
        return self._guard(lambda: self._stores.from_url(
            self.base, client_options=_client_options(endpoint), retry_config=_retries(), **options), "")

    def get(self, key: str) -> bytes:
        return self._guard(lambda: bytes(self._obs.get(self._store, key).bytes()), key)

    def ranges(self, wanted: Sequence[tuple[str, int, int]]) -> list[memoryview]:
        parts = _of_one_object(wanted)
        if len(parts) == 1:
            return self._several(wanted, parts[0])
        found: list[memoryview] = [memoryview(b"")] * len(wanted)
        with ThreadPoolExecutor(min(THREADS, len(parts))) as threads:  # none of them is left for a fork to lose
            for part, data in zip(parts, threads.map(lambda part: self._several(wanted, part), parts), strict=True):
                for number, one in zip(part, data, strict=True):
                    found[number] = one
        return found

    def _several(self, wanted: Sequence[tuple[str, int, int]], part: Sequence[int]) -> list[memoryview]:
        """Ranges of one object, all under way at once. (obstore's coroutines are not used: they call back into Python
        from threads of their own, which aborts the process if it ends meanwhile; one in twenty on a busy machine.)"""
        key, starts, stops = wanted[part[0]][0], [wanted[i][1] for i in part], [wanted[i][2] for i in part]
        if len(part) == 1:
            found = [self._guard(lambda: self._obs.get_range(self._store, key, start=starts[0], end=stops[0]), key)]
        else:
            found = self._guard(lambda: self._obs.get_ranges(self._store, key, starts=starts, ends=stops, coalesce=0),
                                key)
        return [memoryview(data) for data in found]

    def put(self, key: str, data: bytes | Path) -> None:
        self._guard(lambda: self._obs.put(self._store, key, data, chunk_size=16 << 20, max_concurrency=4), key)

    def create(self, key: str, data: bytes, *, new: bool = False) -> bool:
        if not new or not _honoured.get(self.base):
            with contextlib.suppress(FileNotFoundError):
                return self.get(key) == data
        if not self._put_new(key, data):
            return self.get(key) == data  # equal: an answer of ours was lost on its way, and the request repeated
        if self.base not in _honoured:
            _honoured[self.base] = not self._put_new(key, data)  # a server that takes it has the same bytes as before
            if not _honoured[self.base]:
                warnings.warn(ConditionalPutIgnored(
                    f"{self.base} ignores If-None-Match: two writers that name a feature at the same moment may both "
                    "be told that they were first. No data are lost by it: `featstore info` shows which one the name "
                    "stands for, and `featstore use` moves it"), stacklevel=2)
        if _honoured[self.base] or new:
            return True
        time.sleep(SETTLE_S)
        return self.get(key) == data

    def _put_new(self, key: str, data: bytes) -> bool:
        """Whether the server took a PUT that it must not take where there is an object."""
        try:
            self._guard(lambda: self._obs.put(self._store, key, data, mode="create"), key)
        except FileExistsError:
            return False
        return True

    def stat(self, key: str) -> Facts | None:
        if not key:
            return None
        try:
            return _facts(self._guard(lambda: self._obs.head(self._store, key), key))
        except FileNotFoundError:
            return None
        except RemoteError:
            self.get(key)  # whose refusal has a reason, which that of HEAD has not
            raise

    def children(self, key: str) -> tuple[list[str], dict[str, Facts | None]]:
        try:
            found = self._guard(lambda: self._obs.list_with_delimiter(self._store, key or None), key)
        except FileNotFoundError:
            return [], {}
        return ([posixpath.basename(path) for path in found["common_prefixes"]],
                {posixpath.basename(meta["path"]): _facts(meta) for meta in found["objects"]})

    def below(self, key: str) -> Iterator[tuple[str, Facts | None]]:
        found = self._guard(lambda: self._obs.list(self._store, key or None, chunk_size=1000).collect(), key)
        return ((meta["path"], _facts(meta)) for meta in found)

    def delete(self, keys: Sequence[str]) -> None:
        if keys:
            with contextlib.suppress(FileNotFoundError):  # another process was first
                self._guard(lambda: self._obs.delete(self._store, list(keys)), keys[0])

    def _guard(self, request: Callable[[], _T], key: str) -> _T:
        """What a request gives, tried again where its answer breaks off; errors in our words."""
        for number in range(TRIES):
            try:
                return request()
            except Exception as error:
                told = self._told(error, key)
                if number == TRIES - 1 or not _passing(error):
                    raise told from None
                time.sleep(_pause(number))
        raise AssertionError("unreachable")

    def _told(self, error: Exception, key: str) -> Exception:
        text, url = str(error), f"{self.base}/{key}" if key else self.base
        code = _word(r"<Code>(\w+)</Code>", text)
        if code == "InvalidRange" or "416 " in text:
            return EOFError(f"{url} ends before the byte that was asked for")
        if isinstance(error, FileNotFoundError) and code != "NoSuchBucket":
            return FileNotFoundError(2, "no such object", url)
        if type(error).__name__ == "AlreadyExistsError":
            return FileExistsError(17, "the object exists already", url)
        if self._unkeyed and not code:
            return RemoteError(f"{url}: no credentials were found. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or "
                               "AWS_PROFILE with ~/.aws/credentials; a public bucket is read with "
                               "AWS_SKIP_SIGNATURE=true")
        return RemoteError(_said(text, code, url, type(error).__name__))


class _Web(_Obstore):
    """A store on a web server, to be read: one that answers range requests and shows what is in a folder as a page."""

    def _open(self) -> Any:
        return self._guard(lambda: self._stores.HTTPStore(
            self.base, client_options=_client_options(self.base), retry_config=_retries()), "")

    def children(self, key: str) -> tuple[list[str], dict[str, Facts | None]]:
        try:
            page = self.get(key)
        except FileNotFoundError:
            page = b""
        links = re.findall(rb"""<a\s[^>]*?href\s*=\s*["']?(?:\./)?([^"'/?#:>\s]+/?)["'\s>]""", page, re.I)
        names = list(dict.fromkeys(unquote(link.decode("utf-8", "replace")) for link in links if link != b"../"))
        if "zarr.json" not in names and self.stat(f"{key}/zarr.json") is not None:
            raise RemoteError(f"{self.base}/{key}: the server does not show what is in this folder, so a store cannot "
                              "be read there. Let it list folders (nginx: autoindex on), or copy the store: featstore "
                              "copy SRC DST where it can be read")
        return [name[:-1] for name in names if name.endswith("/")], {
            name: None for name in names if not name.endswith("/")}

    def below(self, key: str) -> Iterator[tuple[str, Facts | None]]:
        folders, objects = self.children(key)
        yield from ((posixpath.join(key, name), facts) for name, facts in objects.items())
        for name in folders:
            yield from self.below(posixpath.join(key, name))

    def put(self, key: str, data: bytes | Path) -> None:
        raise RemoteError(f"{self.base}/{key} cannot be written: a web server is for reading")

    def create(self, key: str, data: bytes, *, new: bool = False) -> bool:
        self.put(key, data)
        return False

    def delete(self, keys: Sequence[str]) -> None:
        self.put(keys[0] if keys else "", b"")


class _Fsspec:
    """Any file system that fsspec has a driver for."""

    def __init__(self, base: str) -> None:
        self.base = self.where = base
        if importlib.util.find_spec("fsspec") is None:
            raise MissingPackage(f"{base}: fsspec is not installed, which opens such places: pip install fsspec")
        fsspec: Any = importlib.import_module("fsspec")
        try:
            self._files: Any = fsspec.filesystem(base.partition("://")[0], use_listings_cache=False,
                                                 skip_instance_cache=True, **self._options(fsspec, base))
        except (ImportError, ValueError) as error:
            raise MissingPackage(f"{base}: fsspec cannot open such places here ({error}). Schemes known without it: "
                                 "s3, gs, az, http, https, file, memory") from None

    @staticmethod
    def _options(fsspec: Any, base: str) -> dict[str, Any]:
        known = fsspec.get_filesystem_class(base.partition("://")[0])
        return dict(known._get_kwargs_from_urls(base))

    def get(self, key: str) -> bytes:
        return self._guard(lambda: bytes(self._files.cat_file(self._path(key))), key)

    def ranges(self, wanted: Sequence[tuple[str, int, int]]) -> list[memoryview]:
        keys, starts, stops = zip(*wanted, strict=True)
        paths = [self._path(key) for key in keys]
        found = self._guard(lambda: self._files.cat_ranges(paths, list(starts), list(stops), on_error="raise"), keys[0])
        return [memoryview(data) for data in found]

    def put(self, key: str, data: bytes | Path) -> None:
        def write() -> None:
            if isinstance(data, Path):
                self._files.put_file(str(data), self._path(key))
            else:
                self._files.pipe_file(self._path(key), data)

        self._guard(lambda: self._in_folder(key, write), key)

    def create(self, key: str, data: bytes, *, new: bool = False) -> bool:
        """Drivers that know of exclusive creation are asked for it; after the others, what is there is read again."""
        if self.stat(key) is not None:
            return self.get(key) == data
        try:
            self._guard(lambda: self._in_folder(key, lambda: self._files.pipe_file(self._path(key), data,
                                                                                  mode="create")), key)
        except (TypeError, ValueError, NotImplementedError):
            self.put(key, data)
            time.sleep(SETTLE_S)
        except FileExistsError:
            pass
        return self.get(key) == data

    def stat(self, key: str) -> Facts | None:
        try:
            facts = self._guard(lambda: self._files.info(self._path(key)), key)
        except FileNotFoundError:
            return None
        return _fsspec_facts(facts) if facts["type"] == "file" else None

    def children(self, key: str) -> tuple[list[str], dict[str, Facts | None]]:
        try:
            found = self._guard(lambda: self._files.ls(self._path(key), detail=True), key)
        except (FileNotFoundError, NotADirectoryError):
            return [], {}
        names = {posixpath.basename(facts["name"].rstrip("/")): facts for facts in found}
        return ([name for name, facts in names.items() if facts["type"] == "directory"],
                {name: _fsspec_facts(facts) for name, facts in names.items() if facts["type"] == "file"})

    def below(self, key: str) -> Iterator[tuple[str, Facts | None]]:
        top = self._path(key).rstrip("/")
        found = self._guard(lambda: self._files.find(top, detail=True), key)
        return ((posixpath.join(key, path[len(top):].lstrip("/")), _fsspec_facts(facts))
                for path, facts in sorted(found.items()))

    def delete(self, keys: Sequence[str]) -> None:
        for key in keys:
            try:
                self._guard(lambda key=key: self._files.rm_file(self._path(key)), key)  # type: ignore[misc]
            except FileNotFoundError:
                continue  # another process was first

    def _path(self, key: str) -> str:
        return str(self._files._strip_protocol(f"{self.base}/{key}"))

    def _in_folder(self, key: str, write: Callable[[], None]) -> None:
        """File systems that have folders want them made first."""
        try:
            write()
        except FileNotFoundError:
            self._files.makedirs(posixpath.dirname(self._path(key)), exist_ok=True)
            write()

    def _guard(self, request: Callable[[], _T], key: str) -> _T:
        url = f"{self.base}/{key}"
        for number in range(TRIES):
            try:
                return request()
            except FileNotFoundError:
                raise FileNotFoundError(2, "no such object", url) from None
            except (FileExistsError, NotADirectoryError, TypeError, ValueError, NotImplementedError):
                raise
            except PermissionError:
                raise RemoteError(f"{url}: permission was refused") from None
            except Exception as error:
                if number == TRIES - 1:
                    raise RemoteError(f"{url}: {type(error).__name__} after {TRIES} tries; the driver is fsspec's for "
                                      f"{self.base.partition(':')[0]}") from None
                time.sleep(_pause(number))
        raise AssertionError("unreachable")


_memory: dict[str, Any] = {}       # stores of this process, by their URL
_honoured: dict[str, bool] = {}    # whether a bucket's server heeds If-None-Match, as far as it was tried


def _fsspec_facts(facts: dict[str, Any]) -> Facts:
    when = next((facts[name] for name in ("mtime", "LastModified", "last_modified", "modified", "updated", "created")
                 if facts.get(name) is not None), 0.0)
    return Facts(int(facts.get("size") or 0), float(when.timestamp() if hasattr(when, "timestamp") else when or 0.0))


def _facts(meta: Any) -> Facts:
    return Facts(int(meta["size"]), meta["last_modified"].timestamp())


def _of_one_object(wanted: Sequence[tuple[str, int, int]]) -> list[list[int]]:
    """The positions of ranges, in groups of one object and of as many as obstore has under way at once."""
    by_key: dict[str, list[int]] = {}
    for number, (key, _, _) in enumerate(wanted):
        by_key.setdefault(key, []).append(number)
    return [numbers[i:i + TOGETHER] for numbers in by_key.values() for i in range(0, len(numbers), TOGETHER)]


def _pause(number: int) -> float:
    return 0.1 * 2**number * (0.5 + random.random())


def _passing(error: Exception) -> bool:
    """Whether a request that failed may succeed when it is made again: its answer broke off."""
    text = str(error)
    return type(error).__name__ == "GenericError" and "169.254" not in text and not re.search(
        r"status code: [34]\d\d|after \d+ retries", text)


def _word(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    return found[1] if found else ""


def _said(text: str, code: str, url: str, kind: str) -> str:
    """What went wrong and what to do about it, without a word of what was sent."""
    host = urlsplit(_word(r"(https?://[^/\s?]+)", text)).netloc.rpartition("@")[2]
    status = _word(r"status code: (\d\d\d)", text)
    if code == "NoSuchBucket":
        return f"{url}: there is no such bucket at {host}. Make it, or look at AWS_ENDPOINT_URL and the name"
    if code in ("InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "ExpiredToken", "TokenRefreshRequired"):
        return f"{url}: {host} does not accept the credentials ({code}): they are wrong, expired, or for another server"
    if code in ("PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException") or (
            status in ("301", "307")):
        return (f"{url}: the bucket is in another region or at another address than {host} "
                f"({code or status}). Set AWS_REGION to the bucket's region, or AWS_ENDPOINT_URL")
    if kind in ("PermissionDeniedError", "UnauthenticatedError") or code == "AccessDenied" or status in ("401", "403"):
        return f"{url}: permission was refused ({code or status or kind}): these credentials may not do this here"
    if "NotSupported" in kind:
        return f"{url}: the server does not do what is needed, such as answering with a part of an object"
    if status:
        return f"{url}: {host} answered {status} {code}".rstrip() + (
            ", after several tries" if status.startswith("5") else "")
    if re.search("dns error|Connect|tcp connect|error sending request|timed out|TimedOut", text):
        return f"{url}: {host or 'the server'} cannot be reached. Is the network up, and AWS_ENDPOINT_URL right?"
    return f"{url}: the request failed ({kind}), after several tries where it may succeed"


def _retries() -> dict[str, Any]:
    return {"max_retries": RETRIES, "retry_timeout": timedelta(seconds=60),
            "backoff": {"init_backoff": timedelta(milliseconds=50), "max_backoff": timedelta(seconds=2), "base": 2}}


def _client_options(endpoint: str) -> dict[str, Any]:
    return {"allow_http": endpoint.startswith("http://") or os.environ.get("AWS_ALLOW_HTTP", "") in ("1", "true"),
            "timeout": timedelta(minutes=5), "connect_timeout": timedelta(seconds=5)}


def _profile() -> dict[str, str]:
    """What obstore does not look for itself: the keys, region and endpoint of a profile in ~/.aws.

    Keys in the environment go before; so do roles that the environment names.
    """
    import configparser

    config: dict[str, str] = {}
    if "AWS_REGION" not in os.environ and "AWS_DEFAULT_REGION" not in os.environ:
        config["region"] = "us-east-1"
    if any(name in os.environ for name in _KEYED):
        return config
    profile = os.environ.get("AWS_PROFILE", "default")
    for variable, usual, section in (("AWS_CONFIG_FILE", "config", f"profile {profile}"),
                                     ("AWS_SHARED_CREDENTIALS_FILE", "credentials", profile)):
        parser = configparser.RawConfigParser()
        try:
            parser.read(Path(os.environ.get(variable, f"~/.aws/{usual}")).expanduser(), "utf-8")
        except (configparser.Error, UnicodeDecodeError):
            continue  # other tools' file: what cannot be read gives no credentials, and that is said
        section = section if parser.has_section(section) else profile
        for name, key in (("aws_access_key_id", "access_key_id"), ("aws_secret_access_key", "secret_access_key"),
                          ("aws_session_token", "session_token"), ("region", "region"),
                          ("endpoint_url", "endpoint")):
            if parser.has_option(section, name):
                config[key] = parser.get(section, name)
    return config
