"""Pretrained weights: where they are, and what their digest is.

A request names them (`weights=`) by a file, a folder, a hub id or `sha256:` and a digest. What enters an identity is
the digest of the bytes, never the name. Digests are remembered by path, size and time of change, and downloads with
revision and digest, in `~/.cache/featstore/weights.json` (below XDG_CACHE_HOME where that is set), which can be deleted
at any time.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import importlib
import json
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from functools import lru_cache
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from . import hub
from .hub import HUB

__all__ = ["HUB", "Preset", "absent", "asked", "changed", "digest", "file_digest", "json_of", "local", "locate",
           "packaged", "presets", "recorded", "rehash", "remembered", "tensor_files", "without_downloads"]

SETTLED_S = 2.0  # a file changed later than this before it was hashed may change again without a change of its time
LAYOUTS = (("model.safetensors.index.json", "model.safetensors"), ("pytorch_model.bin.index.json", "pytorch_model.bin"))
CHECKPOINTS = {".pt", ".pth", ".bin", ".safetensors", ".ckpt"}
MODEL = ("config.json", "train.yaml")  # what makes a folder more than the files in it

_forbidden: ContextVar[bool] = ContextVar("_forbidden", default=False)  # see `without_downloads`
_digests: dict[str, tuple[int, int, int, str]] = {}  # of this process: path -> size, mtime and ctime in ns, sha256
_places: dict[str, tuple[Path, list[Path]]] = {}  # of this process: digest -> where it was found, its files
_downloads: dict[str, dict[str, str]] = {}      # of this process: hub id -> revision -> sha256


class Preset(NamedTuple):
    """A request that stands for certain weights.

    wanted: what it names, a hub id or a path, or the hub id that stands for nothing named; "" where there is none.
    named: whether it names it, so that it may be downloaded.
    expected: what must be put there.
    """

    request: str
    extractor: str
    wanted: str
    named: bool
    expected: str


def packaged(distribution: str, file: str, extra: str) -> Path:
    """The path of `file` as installed with `distribution`, found without importing it.

    Raises:
        ImportError: if the distribution is not installed; names the extra that brings it.
        FileNotFoundError: if it is installed without the file.
    """
    try:
        path = Path(str(metadata.distribution(distribution).locate_file(file)))
    except metadata.PackageNotFoundError:
        raise ImportError(f"{file} ships with the package {distribution}, which is not installed: "
                          f"pip install 'featstore[{extra}]'") from None
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing from the installed {distribution} "
                                f"{metadata.version(distribution)}: pip install --force-reinstall {distribution}")
    return path


def presets(extractor: str = "") -> list[Preset]:
    """The requests that stand for weights which do not ship in a package; those of one extractor, or of all."""
    from . import TABLE, parse

    found = []
    for name in [extractor] if extractor in TABLE else [] if extractor else TABLE:
        try:
            cls = getattr(importlib.import_module(TABLE[name].module), TABLE[name].class_name)
            requests = [name, *(f"{name}:{preset}" for preset in getattr(cls, "PRESETS", ()))]
            found += [asked(request, next(iter(parse(request).values()))) for request in requests]
        except ImportError:  # of an extra that is not installed
            continue
    return [preset for preset in found if preset is not None]


def asked(request: str, extractor: Any) -> Preset | None:
    """The weights that a request stands for, by the extractor it makes; None if these ship in a package or are none."""
    if not hasattr(extractor, "DEFAULT"):
        return None
    named = str(getattr(extractor, "weights", "") or getattr(extractor, "model", "") or "")
    return Preset(request, extractor.name, named or extractor.DEFAULT, bool(named),
                  getattr(extractor, "EXPECTED", "a folder with config.json and model.safetensors"))


def locate(wanted: str, *, extractor: str, fetch: bool, expected: str) -> Path:
    """The file or folder that `wanted` names: a path, a path below $FEATSTORE_WEIGHTS, a digest, or a hub id.

    fetch: whether the user has named `wanted`, so that a hub id may be downloaded where the hub's cache lacks it. What
        stands for nothing named is looked for at $FEATSTORE_WEIGHTS/EXTRACTOR and in the cache only.
    expected: what must be put there, for the message.

    Raises:
        FileNotFoundError: if it is nowhere and could not be fetched; says which file to put where.
        ValueError: for a digest that is none or names several files, and for what is neither file nor folder.
    """
    found = local(wanted, extractor=extractor, named=fetch)
    if found is not None:
        return found
    if fetch and hub.is_id(wanted) and not _forbidden.get():
        try:
            folder = hub.download(wanted)
        except hub.Unavailable as reason:
            raise FileNotFoundError(f"{extractor}: {_missing(wanted, named=True)}, and {reason}.\n"
                                    f"{_ways_out(extractor, wanted, expected, named=True)}") from reason
        _record(wanted, folder)
        return folder
    raise absent(wanted, extractor=extractor, named=fetch, expected=expected)


@contextlib.contextmanager
def without_downloads() -> Iterator[None]:
    """While this lasts `locate` downloads nothing: for commands that only tell what is or would be done."""
    before = _forbidden.set(True)
    try:
        yield
    finally:
        _forbidden.reset(before)


def absent(wanted: str, *, extractor: str, named: bool, expected: str) -> FileNotFoundError:
    """The error that says why weights were not found on this machine and what can be done."""
    ways = _ways_out(extractor, wanted, expected, named)
    if named and hub.is_id(wanted):  # nobody has tried yet
        ways += f"\n  or download:  featstore extract does, for {extractor},weights={wanted} ({_published(wanted)})"
    return FileNotFoundError(f"{extractor}: {_missing(wanted, named)}.\n{ways}")


def local(wanted: str, *, extractor: str, named: bool) -> Path | None:
    """What `locate` finds without network; None for nothing. `named`: see its `fetch`."""
    if wanted.startswith("sha256:"):
        return _by_digest(wanted)
    if wanted in HUB and (box := HUB[wanted].box) is not None:
        return _boxed(*box)
    root = _root()
    places = [_path(wanted)] if named and wanted else []
    if root is not None and not named:
        places += [root / f"{extractor}{suffix}" for suffix in ("", ".pt", ".safetensors")]
    if root is not None and wanted:
        places.append(root / wanted)
    for path in places:
        if _exists(path):
            return _opened(path)
    if not hub.is_id(wanted):
        return None
    folder = hub.snapshot(wanted)
    return folder if folder is not None and not _lacking(folder, wanted) else None


def tensor_files(path: Path) -> list[Path]:
    """The files that hold the tensors of a checkpoint: `path` itself, or those of a folder.

    A folder is one that transformers wrote (in one file or in shards), one of WeNet's (final.pt), or holds a single
    checkpoint of any name.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: for an index that is broken, leads out of the folder, or names shards that are not there.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"{path} does not exist")
    for index, single in LAYOUTS:
        if (path / index).is_file():
            return _shards(path / index)
        if (path / single).is_file():
            return [path / single]
    if (path / "final.pt").is_file():
        return [path / "final.pt"]
    names = sorted(file.name for file in path.iterdir())
    checkpoints = [path / name for name in names if Path(name).suffix in CHECKPOINTS and (path / name).is_file()]
    if len(checkpoints) == 1:
        return checkpoints
    if checkpoints:
        raise FileNotFoundError(f"{path} holds several checkpoints: give the one you mean, as in "
                                f"weights={checkpoints[0]} (there are {hub.some([p.name for p in checkpoints])})")
    raise FileNotFoundError(f"{path} holds no weights: expected model.safetensors or pytorch_model.bin, "
                            f"found {hub.some(names)}")


def file_digest(path: Path) -> str:
    """`sha256:` and the hexadecimal SHA-256 of a file's bytes; remembered by path, size and time of change."""
    return remembered(path) or rehash(path)


def digest(files: Sequence[Path]) -> str:
    """The digest of a file, as `sha256sum` prints it; of several, that of their digests in order."""
    return _combined([file_digest(file) for file in files])


def remembered(path: Path, surely: bool = True) -> str | None:
    """The digest of a file if it has been hashed before and has not changed by its size and time.

    surely: by the time of its inode too, which tells what was put in its place with the time of the old one (rsync -t,
        archives whose files all have one time).
    """
    name, state = os.path.realpath(path), path.stat()
    for known in (_digests, _read_memory()["digests"]) if name not in _digests else (_digests,):
        *times, ctime_ns, found = known.get(name, (-1, -1, -1, ""))
        if times == [state.st_size, state.st_mtime_ns] and (ctime_ns == state.st_ctime_ns or not surely):
            _digests[name] = (state.st_size, state.st_mtime_ns, ctime_ns, found)
            return str(found)
    return None


def rehash(path: Path, settled: bool = False) -> str:
    """The digest of a file's bytes as they are now, remembered if the file is older than `SETTLED_S` (or `settled`)."""
    before, now = path.stat(), time.time()
    with path.open("rb") as file:
        found = "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()
    after = path.stat()
    quiet = (before.st_size, before.st_mtime_ns) == (after.st_size, after.st_mtime_ns)
    if quiet and (settled or now - before.st_mtime >= SETTLED_S):
        entry = (after.st_size, after.st_mtime_ns, after.st_ctime_ns, found)
        _digests[os.path.realpath(path)] = entry
        _remember({"digests": {os.path.realpath(path): list(entry)}})
    return found


def recorded(hub_id: str) -> dict[str, str]:
    """{revision: digest} of the downloads of a model that were made here, each as it was when it came."""
    found: dict[str, str] = {**_read_memory()["downloads"].get(hub_id, {}), **_downloads.get(hub_id, {})}
    return found


def changed(path: Path, hub_id: str = "") -> tuple[str, str]:
    """(digest, what is wrong) of a checkpoint, all of its bytes read again; "" for nothing wrong.

    Compared are what was remembered for the same size and time, the names that the hub gives to large files, and what
    was recorded when `hub_id` was downloaded.
    """
    files, wrong = tensor_files(path), []
    for file in files:
        before = _known(file)
        if before is not None and rehash(file) != before:
            wrong.append(f"{file} does not have the bytes it had ({before}), with the same size and time or in the "
                         "hub's cache, where files do not change: get it again")
    now, told = digest(files), recorded(hub_id).get(path.name) if hub_id else None
    if told not in (None, now) and not wrong:
        wrong.append(f"{path} is not what was downloaded ({told})")
    return now, "; ".join(wrong)


def json_of(path: Path) -> dict[str, Any]:
    """A JSON file beside weights (config.json, preprocessor_config.json); ValueError if it is none."""
    try:
        record = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(record, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(record).__name__}")
    return record


# Looking.


def _root() -> Path | None:
    root = os.environ.get("FEATSTORE_WEIGHTS")
    return _path(root) if root else None


def _path(text: str) -> Path:
    return Path(os.path.expanduser(text))  # noqa: PTH111 - leaves ~ of nobody here as it is, where Path raises


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError) as error:
        if isinstance(error, ValueError) or error.errno == errno.ENAMETOOLONG:  # a name that no file can have
            return False
        raise


def _boxed(file: str, pinned: str) -> Path:
    """The path of weights that ship with this package. ValueError where their bytes are others."""
    path = Path(__file__).with_name(file)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing from the installed featstore: install it again")
    found = file_digest(path)
    if found != pinned:
        raise ValueError(f"{path} has digest {found}, not {pinned}, with which it ships: install featstore again")
    return path


def _opened(path: Path) -> Path:
    """`path`, or the only checkpoint in it where it is a folder that says nothing of how it is used."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise ValueError(f"{path} is neither a file nor a folder")
    if not any((path / name).exists() for name in MODEL):
        with contextlib.suppress(FileNotFoundError, ValueError):  # which whoever reads it tells with its own words
            files = tensor_files(path)
            if len(files) == 1 and files[0].name not in [name for layout in LAYOUTS for name in layout]:
                return files[0]
    return path


def _lacking(folder: Path, hub_id: str) -> str:
    """What a snapshot in the hub's cache lacks to be used; "" for nothing. Other programs fetch only what they need."""
    try:
        tensor_files(folder)
    except (FileNotFoundError, ValueError) as error:
        return str(error)
    if folder.name in recorded(hub_id):  # all that the repository had
        return ""
    beside = HUB[hub_id].beside if hub_id in HUB else ()
    return ", ".join(name for name in beside if not (folder / name).is_file())


def _missing(wanted: str, named: bool) -> str:
    """Why `wanted` was not found without network."""
    if wanted.startswith("sha256:"):
        return f"no weights with digest {wanted} in $FEATSTORE_WEIGHTS or the hub's cache {hub.cache()}"
    if named and not hub.is_id(wanted):
        if os.path.lexists(_path(wanted)):
            return f"{wanted} is a link to something that does not exist"
        return f"no file or folder {wanted}{'' if '/' in wanted else ', and no hub id, which has the form OWNER/NAME'}"
    why = "" if named else "no weights were named, and "
    folder = hub.snapshot(wanted) if wanted else None
    if folder is not None:
        return f"{why}{wanted} is not complete in the hub's cache ({_lacking(folder, wanted)})"
    if not wanted:
        return f"{why}there are none that everybody uses"
    here = "on this machine, nor " if named else ""
    return f"{why}{wanted} is not {here}in the hub's cache {hub.cache()}"


def _ways_out(extractor: str, wanted: str, expected: str, named: bool) -> str:
    """What can be done, one way a line."""
    root = os.environ.get("FEATSTORE_WEIGHTS")
    lines = [f"  give it:      weights=PATH, where PATH is {expected}"]
    if not named or hub.is_id(wanted):
        lines.append(f"  or put it at: {root or '$FEATSTORE_WEIGHTS'}/{wanted if named else extractor}"
                     f"{'' if root else ' (the variable is not set)'}, where it is found "
                     f"{'by that name' if named else 'without being named'}")
    offered = [preset.request for preset in presets(extractor) if preset.named]
    if hub.is_id(wanted):
        if not named:
            request = next((preset.request for preset in presets(extractor) if preset.named and
                            preset.wanted == wanted), f"{extractor},weights={wanted}")
            lines.append(f"  or download:  -f {request} ({_published(wanted)})")
    elif offered:
        lines.append(f"  or download:  one of {', '.join(offered)}")
    return "\n".join(lines)


def _published(hub_id: str) -> str:
    known = HUB.get(hub_id)
    return hub_id if known is None else (f"{hub_id}, {known.parameters} million parameters, licence: "
                                         f"{known.licence or 'not stated'}")


def _shards(index: Path) -> list[Path]:
    """The files that an index names."""
    named = json_of(index).get("weight_map")
    if not isinstance(named, Mapping) or not named or not all(isinstance(name, str) for name in named.values()):
        raise ValueError(f"{index} has no weight_map that names the file of each tensor: it is damaged")
    names = sorted(set(named.values()))
    outside = [name for name in names if PurePosixPath(name).is_absolute() or ".." in re.split(r"[/\\]", name)]
    if outside:
        raise ValueError(f"{index} names {outside[0]!r}, which leads out of its folder: refused")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise ValueError(f"{index.parent} lacks {len(missing)} of the {len(names)} files that {index.name} names: "
                         f"{hub.some(missing)}")
    return [index.parent / name for name in names]


def _by_digest(wanted: str) -> Path | None:
    """The checkpoint of which the digest begins so, below $FEATSTORE_WEIGHTS or in the hub's cache.

    What is known without reading goes first: digests remembered, and the names that the hub gives to large files.
    """
    if not re.fullmatch("sha256:[0-9a-f]{8,64}", wanted):
        raise ValueError(f"{wanted}: expected sha256: and at least 8 hexadecimal digits")
    before = _places.get(wanted)  # encoders ask for their place again and again
    if before is not None and all(file.is_file() for file in before[1]) and digest(before[1]).startswith(wanted):
        return before[0]
    places = list(_checkpoints())
    for known in (_known, file_digest):
        found: dict[str, tuple[Path, list[Path]]] = {}
        for place, files in places:
            digests = [known(file) for file in files]
            if None not in digests and _combined(list(filter(None, digests))).startswith(wanted):
                sure = digest(files)
                if sure.startswith(wanted):
                    found.setdefault(sure, (place, files))
        if len(found) > 1:
            raise ValueError(f"{wanted} is the beginning of {len(found)} digests here: {hub.some(found)}")
        if found:
            _places[wanted] = next(iter(found.values()))
            return _places[wanted][0]
    return None


def _checkpoints() -> Iterator[tuple[Path, list[Path]]]:
    """(path to name it by, its files) of every checkpoint below $FEATSTORE_WEIGHTS and in the hub's cache."""
    root = _root()
    roots = ([root] if root is not None and root.is_dir() else []) + [folder for _, folder in hub.snapshots()]
    for folder, names in (pair for root in roots for pair in hub.below(root)):
        if any(name in MODEL for name in names):
            try:
                files = tensor_files(folder)
            except (FileNotFoundError, ValueError):
                continue
            yield folder, files
            if files[0].name == "final.pt" and "global_cmvn" in names:  # which of the two WeNet's file may leave out
                yield folder, [*files, folder / "global_cmvn"]
        else:
            yield from ((folder / name, [folder / name]) for name in names
                        if Path(name).suffix in CHECKPOINTS and (folder / name).is_file())


def _known(path: Path) -> str | None:
    """The digest of a file as far as it is known without reading it."""
    real = Path(os.path.realpath(path))
    if real.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", real.name):
        return f"sha256:{real.name}"
    return remembered(path, surely=False)


def _combined(digests: Sequence[str]) -> str:
    return digests[0] if len(digests) == 1 else "sha256:" + hashlib.sha256(" ".join(digests).encode()).hexdigest()


# Remembering.


def _memory() -> Path:
    return _path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "featstore" / "weights.json"


def _read_memory() -> dict[str, dict[str, Any]]:
    """What is remembered; nothing where the file is absent or damaged."""
    file = _memory()
    try:
        state = file.stat()
        found = _parsed(file, state.st_ino, state.st_size, state.st_mtime_ns)
    except (OSError, ValueError):
        found = {}
    parts = found if isinstance(found, dict) else {}
    digests = {name: tuple(entry) for name, entry in _dict(parts.get("digests")).items()
               if isinstance(entry, list) and [type(value) for value in entry] == [int, int, int, str]}
    downloads = {name: {key: value for key, value in entry.items() if isinstance(value, str)}
                 for name, entry in _dict(parts.get("downloads")).items() if isinstance(entry, dict)}
    return {"digests": digests, "downloads": downloads}


@lru_cache(maxsize=1)
def _parsed(file: Path, *_state: int) -> Any:
    return json.loads(file.read_text("utf-8"))


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _remember(news: Mapping[str, Mapping[str, Any]]) -> None:
    """Add to what is remembered on disk: one process at a time, all or nothing, and not at all where it cannot be."""
    file = _memory()
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with (file.parent / "weights.lock").open("w") as lock:
            with contextlib.suppress(OSError):  # file systems without locks: the last writer wins
                fcntl.flock(lock, fcntl.LOCK_EX)
            memory = _read_memory()
            for part, entries in news.items():
                memory[part] |= entries
            memory["digests"] = {name: entry for name, entry in memory["digests"].items() if Path(name).exists()}
            _replace(file, json.dumps(memory, indent=1, sort_keys=True))


def _replace(file: Path, text: str) -> None:
    new = file.with_name(f"weights.{os.getpid()}.{time.monotonic_ns()}.tmp")
    try:
        new.write_text(text, "utf-8")
        new.replace(file)
    except OSError:
        new.unlink(missing_ok=True)
        raise


def _record(hub_id: str, folder: Path) -> None:
    """Keep the revision and the digest of what has just been downloaded; the first word on a revision stands."""
    files = tensor_files(folder)
    for file in files:
        rehash(file, settled=True)  # the client has put it in place whole, and nobody writes to it again
    revisions = {folder.name: digest(files), **recorded(hub_id)}
    _downloads[hub_id] = revisions
    _remember({"downloads": {hub_id: revisions}})
