"""Arrays made elsewhere: import of .npy trees, Kaldi archives and Amphion's layout; export of the first two.

Nothing is unpickled and no command of an scp file is run. What cannot be used costs one entry in the list of failures.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import stat
import struct
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO, Literal, get_args

import numpy as np

from . import storage
from .audio import not_regular
from .errors import BadRequest, CorruptSegment, IdentityMismatch, MissingFeature, nearest
from .plan import Failure
from .row import Row
from .spec import NAME, Kind, Spec, canonical, plain
from .store import Feature, Store
from .upkeep import checked, chosen
from .writer import Writer

Layout = Literal["npy", "kaldi", "amphion"]
FEATURES, KEYS = "features.json", "keys.jsonl"
COMPONENT_BYTES = 200  # of a file's name; most file systems stop at 255
_BLOCK_BYTES = 8 << 20
_UNSAFE = set('%\\:*?"<>|')

_MEL = {"frame_rate": Fraction(24000, 256), "centre_s": Fraction(128, 24000), "sample_rate": 24000}
_AMPHION: dict[str, tuple[str, dict[str, Any]]] = {  # folder -> our name and what is known of it
    "mels": ("log-mel", _MEL | {"kind": "continuous", "pad": math.log(1e-5), "transposed": True}),
    "pitches": ("f0", _MEL | {"kind": "f0", "dtype": "float32"}),
    "energys": ("energy", _MEL | {"kind": "continuous"}),
    "whisper": ("whisper", {"kind": "continuous", "frame_rate": Fraction(50), "sample_rate": 16000}),
    "contentvec": ("contentvec", {"kind": "continuous", "frame_rate": Fraction(50), "sample_rate": 16000,
                                  "centre_s": Fraction(1, 80)}),   # the middle of its 400 samples
    "wenet": ("wenet", {"kind": "continuous", "frame_rate": Fraction(25), "sample_rate": 16000,
                        "centre_s": Fraction(17, 400)}),           # the fourth of its seven 25 ms windows
    "audios": ("wave", {"kind": "samples", "frame_rate": Fraction(24000), "sample_rate": 24000, "dtype": "float32"}),
}


@dataclass
class Imported:
    """What an import did. features: rows written, by name. fresh: rows that were there already."""

    features: dict[str, int] = field(default_factory=dict)
    fresh: int = 0
    failures: list[Failure] = field(default_factory=list)


@dataclass(frozen=True)
class _Item:
    """One array of a tree. digest: of its bytes where it lies. load: `(T, D)`, `(T,)` or `(D,)`; raises _Unusable."""

    key: str
    path: Path
    digest: Callable[[], str]
    load: Callable[[], np.ndarray]


@dataclass(frozen=True)
class _Found:
    """One feature of a tree, and what is known of it: frame_rate, kind, centre_s, sample_rate, pad, dtype."""

    name: str
    items: list[_Item]
    facts: Mapping[str, Any]


class _Unusable(ValueError):
    """An array that cannot be imported, and why."""


def import_tree(tree: Path, store: Store, layout: Layout, names: Sequence[str] = (), *, rate: Fraction | None = None,
                kind: str = "continuous", replace: bool = False) -> Imported:
    """Take arrays that were made elsewhere into a store, under an identity of their own: a digest of what is read.

    layout: "npy": `<tree>/<feature>/<utterance>.npy`; "kaldi": `<tree>/<feature>.scp` and the archives it names (float
        and double, binary and text); "amphion": `<tree>/{mels,pitches,energys,whisper,contentvec,wenet,audios}/`, also
        with one folder of a data set above.
    names: the features to take; none for all there are.
    rate: frames per second. A tree that `export_tree` made has it; the layout "amphion" implies it.
    kind: how the arrays may be aligned; "global" for one vector each, which needs no rate.
    replace: give names that stand for something else to these arrays.

    The same tree again does nothing. An utterance that is not in the store is added by its key alone.

    Raises:
        IdentityMismatch: a name stands for something else, or the tree changed since it was imported.
        BadRequest: no arrays are found, or a rate is missing.
        MissingFeature: the tree has none of that name.
    """
    tree = Path(tree)
    if kind not in get_args(Kind):
        raise BadRequest(f"kind {kind!r} is none of {', '.join(get_args(Kind))}")
    done = Imported()
    asked = {"frame_rate": rate, "kind": kind}
    found = {item.name: item for item in _READERS[_known_layout(layout)](tree, asked, done.failures)}
    selected = _selected(tree, found, names)
    done.failures = [failure for failure in done.failures if failure.feature in selected]
    surveyed = [_survey(found[name], tree, layout, done.failures) for name in selected]
    ready = [(name, spec, items) for name, spec, items in surveyed if spec is not None]
    store.refresh()
    if not replace:
        for name, spec, _ in ready:
            _refuse_other(store, name, spec)
    with store.writer(provenance={"imported_from": str(tree.resolve())}) as writer:
        for name, spec, items in ready:
            writer.declare(name, spec, replace=replace)
            _write_all(store, writer, name, spec, items, done)
    return done


def _known_layout(layout: str) -> str:
    if layout not in _READERS:
        raise BadRequest(f"layout {layout!r} is none of {', '.join(_READERS)}")
    return layout


def _selected(tree: Path, found: Mapping[str, _Found], names: Sequence[str]) -> list[str]:
    if not found:
        raise BadRequest(f"{tree} has no arrays in this layout. Expected: npy: {tree}/FEATURE/UTTERANCE.npy; kaldi: "
                         f"{tree}/FEATURE.scp; amphion: {tree}/mels/UTTERANCE.npy and its like")
    wanted = [_AMPHION[name][0] if name in _AMPHION and name not in found else name for name in names]
    for name in wanted:
        if name not in found:
            raise MissingFeature(f"{tree} has no {name!r} ({nearest(name, found)})")
    for name in wanted or found:
        if not NAME.fullmatch(name):
            raise BadRequest(f"{tree}: {name!r} cannot be a feature's name: expected a-z or 0-9, then up to 63 of a-z, "
                             "0-9 and -. Rename it, or say which features to import")
    return list(dict.fromkeys(wanted)) or sorted(found)


def _survey(found: _Found, tree: Path, layout: str,
            failures: list[Failure]) -> tuple[str, Spec | None, list[_Item]]:
    """Look at every array once: the spec they have in common (None if none can be used), and those to be read."""
    facts, digests, usable = found.facts, [], []
    for item in found.items:
        digest, shape = "", None
        try:
            digest = item.digest()
            shape = _shape(item.load(), facts["kind"])
        except (_Unusable, OSError) as error:
            failures.append(_failure(item, found.name, error))
        digests.append((item.key, digest))
        if shape is not None:
            usable.append((item, *shape))
    if not usable:
        return found.name, None, []
    dim = Counter(dim for _, dim, _ in usable).most_common(1)[0][0]
    dtype = facts.get("dtype") or np.result_type(*{dtype for _, own, dtype in usable if own == dim}).name
    if facts["kind"] != "global" and facts["frame_rate"] is None:
        raise BadRequest(f"{tree}: nothing tells how many frames per second {found.name} has; give the rate (such as "
                         '--rate 50 or --rate 24000/256), or --kind global for one vector per utterance')
    settings = {"layout": layout, "digest": hashlib.sha256(canonical(sorted(digests))).hexdigest()}
    spec = Spec(made_by="imported", version=1, settings=settings, kind=facts["kind"], dim=dim, dtype=dtype,
                frame_rate=None if facts["kind"] == "global" else facts["frame_rate"], pad=facts.get("pad", 0.0),
                centre_s=facts.get("centre_s", Fraction(0)), sample_rate=facts.get("sample_rate"))
    return found.name, spec, [item for item, _, _ in usable]


def _shape(array: np.ndarray, kind: str) -> tuple[int, np.dtype]:
    """The dim and dtype of an array. _Unusable if it cannot be stored under this kind."""
    axes = {"global": (0, 1), "samples": (1,)}.get(kind, (1, 2))
    if array.dtype.kind not in "fiub" or array.dtype.itemsize > 8:
        raise _Unusable(f"its dtype is {array.dtype}, expected integers or floats of at most 64 bits")
    if array.ndim not in axes:
        wanted = {"global": "(D,)", "samples": "(N,)"}.get(kind, "(T, D) or (T,)")
        raise _Unusable(f"its shape is {array.shape}, expected {wanted} for kind {kind!r}")
    if not array.size:
        raise _Unusable(f"it is empty: its shape is {array.shape}")
    dtype = np.dtype(np.uint8) if array.dtype.kind == "b" else array.dtype.newbyteorder("=")
    return (array.shape[-1] if array.ndim == (1 if kind == "global" else 2) else 0), dtype


def _refuse_other(store: Store, name: str, spec: Spec) -> None:
    held = store.features.get(name)
    if held is None or held.short == spec.identity[:16] or not held.segments:
        return
    what = f"imported ({held.label})" if held.imported else f"made by {held.spec.made_by} ({name}@{held.label})"
    why = ": the files changed since, or the rate or kind is another" if held.imported else ""
    raise IdentityMismatch(
        f"{store.path} has a {name!r} that was {what}; this tree's is imported:{spec.settings['digest'][:9]}{why}. "
        f"Nothing was changed.\n  keep both:  rename the tree's {name}, such as to {name}-2\n"
        f"  replace:    add --replace ({len(held):,} utterances are served from the old one until all is imported)")


def _write_all(store: Store, writer: Writer, name: str, spec: Spec, items: Iterable[_Item], done: Imported) -> None:
    short = spec.identity[:16]
    held: Mapping[str, Row] = Feature(store, name, short) if short in store.identities(name) else {}
    done.features[name] = 0
    for item in items:
        if item.key in held:
            done.fresh += 1
            continue
        try:
            array = item.load()
        except (_Unusable, OSError) as error:  # changed since it was surveyed
            done.failures.append(_failure(item, name, error))
            continue
        try:
            writer.write(item.key, name, [np.asarray(array)] if spec.kind == "global" else _blocks(array))
            done.features[name] += 1
        except CorruptSegment:
            raise  # of the store, while it committed
        except ValueError as error:
            done.failures.append(_failure(item, name, error))


def _blocks(array: np.ndarray) -> Iterator[np.ndarray]:
    """An array that may be mapped from a file, in pieces."""
    rows = max(1, _BLOCK_BYTES // max(1, array[:1].nbytes))
    for start in range(0, len(array), rows):
        yield np.asarray(array[start:start + rows])


def _failure(item: _Item, name: str, error: Exception) -> Failure:
    return Failure(item.key, name, str(item.path), str(error))


def _read_npy(tree: Path, asked: Mapping[str, Any], failures: list[Failure]) -> Iterator[_Found]:
    known, keys = _exported(tree)
    for home in _folders(tree):
        files = _npy_files(home)
        if files:
            yield _Found(home.name, _npy_items(home, files, home.name, keys, failures),
                         _facts(asked, known.get(home.name, {})))


def _read_amphion(tree: Path, asked: Mapping[str, Any], failures: list[Failure]) -> Iterator[_Found]:
    homes = [home for home in (tree, *_folders(tree)) if any((home / name).is_dir() for name in _AMPHION)]
    if len(homes) > 1:
        raise BadRequest(f"{tree} has several data sets: {', '.join(home.name for home in homes)}; their utterances "
                         "may share names. Import one at a time")
    for folder, (name, facts) in _AMPHION.items() if homes else ():
        files = _npy_files(homes[0] / folder)
        if files:
            transposed = facts.get("transposed", False)
            yield _Found(name, _npy_items(homes[0] / folder, files, name, {}, failures, transposed), facts)


def _facts(asked: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """What is known of a feature: what was asked for, then what `export_tree` left beside it."""
    facts = dict(known)
    for name in ("frame_rate", "centre_s"):
        facts[name] = Fraction(facts[name]) if facts.get(name) is not None else None
    if asked["kind"] != "continuous" or "kind" not in facts:
        facts["kind"] = asked["kind"]
    facts["frame_rate"] = asked["frame_rate"] if asked["frame_rate"] is not None else facts["frame_rate"]
    return {name: value for name, value in facts.items() if value is not None} | {"frame_rate": facts["frame_rate"]}


def _exported(tree: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """What `export_tree` left in a tree: facts by feature, keys by file name."""
    known: dict[str, Any] = {}
    keys: dict[str, str] = {}
    try:
        if (tree / FEATURES).exists():
            known = {name: dict(facts) for name, facts in storage.read_document(tree / FEATURES).items()}
            known = {name: {k: facts[k] for k in _FACTS if k in facts} for name, facts in known.items()}
        if (tree / KEYS).exists():
            lines = (tree / KEYS).read_text("utf-8").split("\n")
            records = [json.loads(line) for line in lines if line]
            keys = {str(record["file"]): str(record["key"]) for record in records}
        for facts in known.values():
            _facts({"frame_rate": None, "kind": "continuous"}, facts)
    except (ValueError, TypeError, KeyError) as error:
        raise BadRequest(f"{tree}: {FEATURES} or {KEYS} is not as `featstore export` writes it ({error}); "
                         "repair or remove it") from None
    return known, keys


def _folders(tree: Path) -> list[Path]:
    return sorted(p for p in tree.iterdir() if p.is_dir() and not p.name.startswith(".")) if tree.is_dir() else []


def _npy_files(home: Path) -> list[Path]:
    """The .npy files in a folder and those below; links to folders are not followed."""
    return sorted(Path(folder) / name for folder, _, names in os.walk(home) for name in names if name.endswith(".npy"))


def _npy_items(home: Path, files: Iterable[Path], name: str, keys: Mapping[str, str], failures: list[Failure],
               transposed: bool = False) -> list[_Item]:
    items: dict[str, _Item] = {}
    for path in files:
        stem = path.relative_to(home).as_posix()[:-len(".npy")]
        key = keys.get(stem) or unicodedata.normalize("NFC", stem)
        item = _Item(key, path, partial(_file_digest, path), partial(_load_npy, path, transposed))
        if key in items:
            failures.append(_failure(item, name, _Unusable(f"{items[key].path} has the same key")))
        else:
            items[key] = item
    return [items[key] for key in sorted(items)]


def _file_digest(path: Path) -> str:
    with _open(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _open(path: Path) -> BufferedReader:
    """A regular file to read; a pipe would wait for ever, a device has no end."""
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        raise _Unusable(not_regular(mode))
    return path.open("rb")


def _load_npy(path: Path, transposed: bool = False) -> np.ndarray:
    """The array in a .npy file, mapped; nothing in it is unpickled."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, SyntaxError) as error:
        said = str(error).partition(" If you trust")[0]  # NumPy goes on to offer to unpickle it
        raise _Unusable(f"not a .npy file of plain numbers: {said}") from None
    if not isinstance(array, np.ndarray):
        array.close()
        raise _Unusable("an archive (.npz) under the name of a .npy file; take the array out of it")
    return array.T if transposed else array


def _read_kaldi(tree: Path, asked: Mapping[str, Any], failures: list[Failure]) -> Iterator[_Found]:
    known, keys = _exported(tree)
    for scp in sorted(tree.glob("*.scp")):
        if scp.stem in ("wav", "segments"):
            continue  # of a corpus
        facts = _facts(asked, known.get(scp.stem, {}))
        yield _Found(scp.stem, _scp_items(scp, keys, facts.get("dtype"), failures), facts)


def _scp_items(scp: Path, keys: Mapping[str, str], dtype: str | None, failures: list[Failure]) -> list[_Item]:
    items: dict[str, _Item] = {}
    for line in scp.read_text("utf-8", "surrogateescape").split("\n"):
        name, _, place = line.strip().partition(" ")
        if not name:
            continue
        key = keys.get(name, name)
        load = partial(_load_scp, scp.parent, place.strip(), dtype)
        item = _Item(key, scp, partial(_array_digest, load), load)
        if key in items:
            failures.append(_failure(item, scp.stem, _Unusable("the scp file has this key twice; the first counts")))
        else:
            items[key] = item
    return [items[key] for key in sorted(items)]


def _array_digest(load: Callable[[], np.ndarray]) -> str:
    array = np.ascontiguousarray(load())
    return hashlib.sha256(f"{array.dtype.str}{array.shape}".encode() + array.tobytes()).hexdigest()


def _load_scp(home: Path, place: str, dtype: str | None) -> np.ndarray:
    """The array an scp line names, relative to the scp file's folder."""
    if place.endswith("|"):
        raise _Unusable(f"{place!r} is a command; commands are not run. Write an archive: copy-feats scp:IN ark:OUT")
    if place.endswith("]"):
        raise _Unusable(f"{place!r} takes a range of an array; ranges are not supported. Write the part as an archive")
    path, _, offset = place.rpartition(":")
    if not path or not offset.isdigit():
        path, offset = place, "0"
    place_here = home / path if (home / path).exists() else Path(path)  # Kaldi's own are relative to where it ran
    with _open(place_here) as file:
        file.seek(int(offset))
        try:
            array = _read_binary(file) if file.read(2) == b"\0B" else _read_text(file, int(offset))
        except (struct.error, UnicodeDecodeError) as error:
            raise _Unusable(f"{place}: not a Kaldi matrix or vector ({error})") from None
    return array if dtype is None else _exactly(array, np.dtype(dtype))


def _exactly(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """`array` as the dtype it had before it was exported, where that loses nothing."""
    with np.errstate(invalid="ignore", over="ignore"):
        cast_ = array.astype(dtype)
    return cast_ if np.array_equal(cast_, array) else array


def _read_binary(file: BinaryIO) -> np.ndarray:
    token = file.read(3)
    if token[:2] == b"CM":
        raise _Unusable("a compressed Kaldi matrix (CM); write it plain: copy-feats --compress=false IN OUT")
    if token not in _TOKENS:
        raise _Unusable(f"Kaldi object {token!r}; matrices and vectors of floats can be read (FM, DM, FV, DV)")
    dtype, axes = _TOKENS[token]
    shape = []
    for _ in range(axes):
        size, count = struct.unpack("<bi", file.read(5))
        if size != 4 or count < 0:
            raise _Unusable(f"its header says {count} rows or columns: damaged")
        shape.append(count)
    wanted = math.prod(shape) * dtype.itemsize
    left = os.fstat(file.fileno()).st_size - file.tell()
    if wanted > left:
        raise _Unusable(f"its header says {shape}, {wanted} bytes; the archive has {left} more: cut off")
    return np.frombuffer(file.read(wanted), dtype).reshape(shape)


_TOKENS: dict[bytes, tuple[np.dtype, int]] = {
    b"FM ": (np.dtype("<f4"), 2), b"DM ": (np.dtype("<f8"), 2),
    b"FV ": (np.dtype("<f4"), 1), b"DV ": (np.dtype("<f8"), 1)}


def _read_text(file: BinaryIO, offset: int) -> np.ndarray:
    """`[ 1 2 3 ]`, a vector, or `[` and lines of numbers up to `]`, a matrix; as float32, as Kaldi reads it."""
    file.seek(offset)
    data, part = bytearray(), b""
    while b"]" not in part:
        part = file.read(1 << 16)
        if not part:
            raise _Unusable("neither a binary Kaldi object nor a text one: no closing ]")
        data += part
    opening, _, body = bytes(data[:data.index(b"]")]).decode("ascii").partition("[")
    if opening.strip():
        raise _Unusable(f"a text object starts with [, not {opening.strip()[:20]!r}")
    try:
        rows = [[float(word) for word in line.split()] for line in body.split("\n") if line.split()]
    except ValueError as error:
        raise _Unusable(f"a text object with something else than numbers: {error}") from None
    if len({len(row) for row in rows}) > 1:
        raise _Unusable(f"its rows have {min(map(len, rows))} to {max(map(len, rows))} numbers")
    matrix = body.partition("\n")[0].strip() == "" and "\n" in body
    array = np.array(rows, np.float32)
    return array if matrix else array.reshape(-1)


_READERS: dict[str, Callable[[Path, Mapping[str, Any], list[Failure]], Iterator[_Found]]] = {
    "npy": _read_npy, "kaldi": _read_kaldi, "amphion": _read_amphion}


def export_tree(store: Store, out: Path, layout: Literal["npy", "kaldi"], names: Sequence[str] = ()) -> int:
    """Write features as files. Returns the number of arrays. `import_tree` reads them back as they were.

    layout: "npy": `<out>/<feature>/<utterance>.npy`; "kaldi": `<out>/<feature>.ark` and `.scp`, `utt2spk` and `text`.
    names: NAME or NAME@IDENTITY; none for all that are served.

    What a file's name cannot hold is percent-encoded; `keys.jsonl` has the keys, `features.json` rates and kinds.
    Waveforms become float32 with their scale applied; Kaldi's arrays are float32, or float64 where that is needed.

    Raises:
        BadRequest: `out` is not empty: nothing is ever written over.
        CorruptSegment: a row does not match its checksum.
    """
    out = Path(out)
    if layout not in ("npy", "kaldi"):
        raise BadRequest(f"layout {layout!r} is none of npy, kaldi")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BadRequest(f"{out} exists and is not an empty folder; nothing is written over. Choose another, or remove "
                         "it first")
    features = chosen(store, list(names) or None)
    with storage.disk_room(out):
        out.mkdir(parents=True, exist_ok=True)
        write = _export_npy if layout == "npy" else _export_kaldi
        safe = safe_path if layout == "npy" else kaldi_id
        keys: dict[str, str] = {}
        count = 0
        for feature in features:
            files = {safe(key): key for key in feature}
            write(feature, out, dict(sorted(files.items(), key=lambda item: item[0].encode())))
            keys |= files
            count += len(files)
        _put_lines(out / KEYS, (json.dumps({"file": file, "key": key}) for file, key in sorted(keys.items())))
        _put_lines(out / FEATURES, [json.dumps({f.name: _facts_of(f) for f in features}, indent=1)])
        if layout == "kaldi":
            _write_speakers(store, out, keys)
    return count


_FACTS = ("kind", "frame_rate", "centre_s", "sample_rate", "pad", "dtype")


def _facts_of(feature: Feature) -> dict[str, Any]:
    spec = feature.spec
    facts = {name: plain(getattr(spec, name)) for name in _FACTS} | {"dtype": _exported_dtype(feature).name}
    return facts | {"identity": feature.identity, "made_by": spec.made_by}


def _exported_dtype(feature: Feature) -> np.dtype:
    return np.dtype(np.float32) if feature.kind == "samples" else feature.dtype


def safe_path(key: str) -> str:
    """A relative path for a key, one for each: no `..`, nothing absolute, no names that a file system refuses."""
    *folders, last = key.split("/")
    return "/".join([*(_component(name, folder=True) for name in folders), _component(last)])


def kaldi_id(key: str) -> str:
    """A key as an id of Kaldi's tables: one word."""
    return "".join(_percent(c) if c.isspace() or c == "%" or not c.isprintable() else c for c in key)


def _component(name: str, folder: bool = False) -> str:
    if not name:
        return "%"  # of `a//b`, or a slash at either end
    text = "".join(_percent(c) if c in _UNSAFE or not c.isprintable() else c for c in name)
    if set(text) == {"."}:
        text = text.replace(".", "%2E")
    if folder and text.endswith(".npy"):
        text = text[:-4] + "%2Enpy"  # else `a.npy/b` would want a folder where `a` has its file
    if len(text.encode()) > COMPONENT_BYTES:
        start = text.encode()[:COMPONENT_BYTES - 40].decode("utf-8", "ignore")
        text = f"{start}%%{hashlib.sha256(name.encode()).hexdigest()[:32]}"
    return text


def _percent(character: str) -> str:
    return "".join(f"%{byte:02X}" for byte in character.encode())


def _values(feature: Feature, key: str) -> tuple[tuple[int, ...], Iterator[np.ndarray]]:
    """The shape of a row, and its blocks as they are exported; its checksum is compared after the last."""
    row = feature[key]
    stored = [row.read()[None]] if feature.kind == "global" else row.stored()
    blocks = (feature.decoded(block) for block in checked(stored, row.record, key, feature.name))
    if feature.kind == "samples":
        blocks = (block.astype(np.float32) * np.float32(row.scale) for block in blocks)
    return row.shape, blocks


def _export_npy(feature: Feature, out: Path, files: Mapping[str, str]) -> None:
    dtype = _exported_dtype(feature)
    for safe, key in files.items():
        path = out / feature.name / f"{safe}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        shape, blocks = _values(feature, key)
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        with path.open("xb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            for block in blocks:
                file.write(np.ascontiguousarray(block, dtype).data)


def _export_kaldi(feature: Feature, out: Path, files: Mapping[str, str]) -> None:
    stored = _exported_dtype(feature)
    wide = stored.itemsize == 8 or (stored.kind in "iu" and stored.itemsize > 2)
    dtype = np.dtype("<f8" if wide else "<f4")
    with (out / f"{feature.name}.ark").open("xb") as ark, (out / f"{feature.name}.scp").open("xb") as scp:
        for name, key in files.items():
            shape, blocks = _values(feature, key)
            ark.write(name.encode() + b" ")
            scp.write(f"{name} {feature.name}.ark:{ark.tell()}\n".encode())
            ark.write(b"\0B" + (b"D" if wide else b"F") + (b"M " if len(shape) == 2 else b"V "))
            ark.write(b"".join(struct.pack("<bi", 4, count) for count in shape or (1,)))
            for block in blocks:
                ark.write(np.ascontiguousarray(block, dtype).data)


def _write_speakers(store: Store, out: Path, keys: Mapping[str, str]) -> None:
    """utt2spk and text. As Kaldi has it, an utterance without a speaker is its own."""
    speakers, texts = [], []
    for name, key in sorted(keys.items(), key=lambda item: item[0].encode()):
        utterance = store.utterances.get(key)
        speaker = utterance.speaker if utterance is not None else None
        speakers.append(f"{name} {kaldi_id(speaker) if speaker else name}")
        if utterance is not None and utterance.text:
            texts.append(f"{name} {' '.join(utterance.text.split())}")
    _put_lines(out / "utt2spk", speakers)
    _put_lines(out / "text", texts)


def _put_lines(path: Path, lines: Iterable[str]) -> None:
    with path.open("x", encoding="utf-8", newline="\n") as file, contextlib.closing(file):
        file.writelines(f"{line}\n" for line in lines)
