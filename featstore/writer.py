"""Adding to a store: a writer gathers rows in segments of its own and commits them, beside any number of others."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from fractions import Fraction
from types import TracebackType
from typing import Any

import numpy as np

from . import storage
from .codecs import RAW, Encoding, named
from .errors import BadRequest, DiskFull, IdentityMismatch, LengthMismatch, MissingUtterance, nearest
from .index import Collection, Index, drop_catalogues, merge, write_catalogue
from .row import Row
from .segment import NO_SOURCE, SHARD_BYTES, Segment, SegmentWriter, encoding_of, group, link
from .spec import NAME, Spec, canonical
from .storage import Place
from .store import Feature, Store, claim, feature_names, make_group, mismatch, read_served, serve

COMMIT_BYTES = 256 << 20
FOLD_COUNT = 10           # a writer's own segments of one size class that are folded into one of the next
FOLD_BYTES = 64 << 20     # those below this size are folded at the end of its run, whatever their class
LINK_BYTES = SHARD_BYTES  # those that are not below it are folded by links to their shards, without copying
CATALOGUE_SEGMENTS, CATALOGUE_ROWS = 64, 50_000  # beyond these a writer leaves a catalogue behind
CATALOGUE_CHEAP = 2_000_000  # rows: up to here (300 MB) each time anew
CATALOGUE_SHARE = 16         # beyond, once one row in so many is new
SLACK_S = 0.1           # a feature may differ from its audio by this and one frame
KEY_BYTES = 500


class _Target:
    """One collection a writer adds to: its open segment, its own committed ones, the generations it has given."""

    def __init__(self, folder: Place, dtype: str, dim: int, index: Index, facts: dict[str, Any],
                 encoding: Encoding = RAW) -> None:
        self.folder, self.dtype, self.dim, self.index, self.facts = folder, dtype, dim, index, facts
        self.encoding = encoding
        self.generations: dict[str, int] = {}
        self.removed: set[str] = set()
        self.segment: SegmentWriter | None = None
        self.own: dict[str, int] = {}  # bytes of frames
        self.links = True              # until the file system refuses one

    def __contains__(self, key: str) -> bool:
        return key not in self.removed and (key in self.generations or self.index.find(key) is not None)

    @property
    def pending(self) -> int:
        """Bytes that are not committed."""
        return self.segment.size if self.segment is not None else 0

    def open(self) -> SegmentWriter:
        if self.segment is None:
            home = self.folder / "segments" / storage.new_id()
            self.segment = SegmentWriter(home, self.dtype, self.dim, self.encoding)
        return self.segment

    def append(self, key: str, blocks: Iterable[np.ndarray], **facts: Any) -> int:
        generation = self._next_generation(key)
        length = self.open().append(key, blocks, generation=generation, **facts)
        self.generations[key] = generation
        self.removed.discard(key)
        return length

    def remove(self, key: str) -> None:
        generation = self._next_generation(key)
        self.open().remove(key, generation=generation)
        self.generations[key] = generation
        self.removed.add(key)

    def commit(self, provenance: Mapping[str, str] | None) -> None:
        if self.segment is None:
            return
        segment = self.segment
        if not len(segment):
            segment.discard()
        else:
            segment.commit(self.facts | {"replaces": [], "provenance": dict(provenance or {})})
            self.own[segment.folder.name] = segment.size
        self.segment = None  # not before: a full disk leaves the rows with their writer, to be committed later

    def fold(self, provenance: Mapping[str, str] | None) -> None:
        """Fold this writer's own segments of one size class wherever there are FOLD_COUNT of them.

        The result is of the next class, so that a row is copied once a class, four times in all, and what has whole
        shards never: those are linked. A run leaves fewer than FOLD_COUNT segments a class, 72 up to a terabyte.
        """
        classes: dict[int, list[str]] = {}
        for name, size in self.own.items():
            classes.setdefault(_size_class(size), []).append(name)
        full = [number for number, names in classes.items() if len(names) >= FOLD_COUNT]
        if full and self._fold(classes[min(full)], provenance):
            self.fold(provenance)

    def fold_all(self, provenance: Mapping[str, str] | None) -> None:
        """At the end of a run: the small segments become one, those of whole shards another."""
        self._fold([name for name, size in self.own.items() if size < FOLD_BYTES], provenance)
        self._fold([name for name, size in self.own.items() if size >= LINK_BYTES], provenance)

    def _fold(self, names: list[str], provenance: Mapping[str, str] | None) -> bool:
        """Put a segment in the place of some of this writer's; every row keeps its generation."""
        home = self.folder / "segments"
        parts = [Segment(home / name) for name in names if (home / name / "zarr.json").exists()]
        if len(parts) < max(2, len(names)):
            for name in set(names) - {part.id for part in parts}:  # compacted by somebody else
                del self.own[name]
            return False
        large = min(self.own[name] for name in names) >= LINK_BYTES
        if large and not self.links:
            return False
        home /= storage.new_id()
        try:
            facts = self.facts | {"replaces": _all_replaced(parts), "provenance": dict(provenance or {})}
            size = link(home, parts, merge(parts).records, facts) if large else self._copy(home, parts, facts)
        except BaseException as error:
            with contextlib.suppress(OSError):
                storage.remove_tree(home)
            self.links &= not large
            if not isinstance(error, OSError if large else DiskFull | FileNotFoundError):
                raise
            return False  # what is to be folded is committed: it can stay as it is, or is compacted by somebody else
        self.own = {name: size for name, size in self.own.items() if name not in names} | {home.name: size}
        return True

    def _copy(self, home: Place, parts: list[Segment], facts: dict[str, Any]) -> int:
        folded, records = SegmentWriter(home, self.dtype, self.dim, self.encoding), merge(parts).records
        try:
            for number, part in enumerate(parts):
                folded.extend(part, records[records["segment"] == number])
            folded.commit(facts)
        except BaseException:
            folded.discard()
            raise
        return folded.size

    def _next_generation(self, key: str) -> int:
        known = self.generations.get(key)
        return 1 + (known if known is not None else self.index.newest(key))


class Writer:
    """Adds utterances and features. What is written becomes visible at a commit: every 256 MiB, every `commit_every_s`
    seconds, and when the `with` block ends, also by an exception. A killed writer loses at most what is not committed.
    `snapshot` is the store as the writer found it: what an array is written for stems from the audio it says.
    """

    def __init__(self, store: Store, *, commit_every_s: float,
                 provenance: Mapping[str, str] | None = None) -> None:
        self.store, self.commit_every_s, self._provenance = store, commit_every_s, provenance
        self.snapshot = Store(store.path)
        self._utterances = _Target(store.path / "utterances", "uint8", 0, self.snapshot.utterances.index, {})
        self._features: dict[str, _Target] = {}            # what each declared name is bound to
        self._identities: dict[Place, _Target] = {}        # by folder: bound, or had before, or only deleted from
        self._specs: dict[str, tuple[Spec, bool, str | None]] = {}
        self._known: dict[str, tuple[bytes, float]] = {}   # utterances of this writer: source digest, seconds
        self._moves: dict[str, str] = {}
        self._since = time.monotonic()
        self.commits = 0  # so many times all that was written until then became durable
        self._closed = False

    def declare(self, name: str, spec: Spec, *, replace: bool = False, codec: str | None = None) -> None:
        """Say what `name` is made of. IdentityMismatch if the store serves another identity under that name.

        With `replace`, rows go to the new identity beside the old one, and the name moves to it in `close`.
        codec: how rows are stored from now on: "raw", "zstd" or "pcodec"; None: as the newest of the feature's are,
            which is raw where there are none. What is read back is the same.
        """
        self._check_open()
        if not NAME.fullmatch(name):
            raise BadRequest(f"feature name {name!r}: expected a-z or 0-9, then up to 63 of a-z, 0-9 and -")
        self._specs[name] = spec, replace, codec
        if spec.dim is not None and spec.dtype is not None:
            self._open(name, spec, replace, codec)
        else:
            self._features.pop(name, None)

    def utterance(self, record: Mapping[str, Any], *, source: bytes = NO_SOURCE, stamp: int = 0,
                  seconds: float = 0.0) -> None:
        """Add or renew an utterance: its fields (see StoredUtterance), the digest of its audio and its duration."""
        self._check_open()
        key = record["key"]
        _check_key(key)
        fields = {name: value for name, value in record.items() if value not in (None, (), [], {})}
        data = np.frombuffer(canonical(fields), np.uint8)
        self._utterances.append(key, [data], source=source, stamp=stamp, seconds=seconds)
        self._known[key] = source, seconds

    def write(self, utterance: str, name: str, frames: np.ndarray | Iterable[np.ndarray], *, scale: float = 1.0) -> int:
        """Add one array `(T, D)`, `(T,)` or, for kind "global", `(D,)`; or its blocks, one after the other.

        Returns the number of frames. An utterance that is not known yet is added by its key alone. NaN, infinity, a
        negative f0, overflow of the stored dtype, a wrong dim and a duration that is not the audio's are refused with
        what was found; the store is then as it was before.
        """
        self._check_open()
        _check_key(utterance)
        blocks: Iterable[np.ndarray] = [frames] if isinstance(frames, np.ndarray) else frames
        if name not in self._features:
            blocks = self._first_use(name, blocks, utterance)
        target, spec = self._features[name], self._specs[name][0]
        known = utterance in self._utterances
        source, seconds = self._source(utterance) if known else (NO_SOURCE, 0.0)
        checked: Iterator[np.ndarray] = (_checked(block, spec, utterance, name) for block in blocks)
        if spec.kind != "global" and seconds:
            checked = _of_length(checked, spec, seconds, utterance, name)
        length = target.append(utterance, _not_empty(checked, utterance, name), source=source, scale=scale)
        if not known:
            self.utterance({"key": utterance})
        if self.due:
            self.commit()
        return length

    def derive(self, row: Row, name: str, blocks: Iterable[np.ndarray], *, stamp: int) -> None:
        """Add an array made from another row, in its blocks: it stems from that row's audio and has its scale.

        stamp: what tells from which bytes it was made.
        """
        self._check_open()
        spec = self._specs[name][0]
        checked = (_checked(block, spec, row.utterance, name) for block in blocks)
        self._features[name].append(row.utterance, _not_empty(checked, row.utterance, name),
                                    source=bytes.fromhex(row.source), stamp=stamp, scale=row.scale)
        if self.due:
            self.commit()

    def delete(self, utterance: str, name: str | None = None) -> None:
        """Remove one feature of an utterance, or (name None) the utterance with all its features, every identity's."""
        self._check_open()
        if utterance not in self._utterances:
            raise MissingUtterance(f"{self.store.path} has no utterance {utterance!r} "
                                   f"({nearest(utterance, self.snapshot.utterances)})")
        if name is not None:
            targets = [self._features.get(name) or self._target_of(self.snapshot.feature(name))]
        else:
            self._known.pop(utterance, None)
            targets = [self._utterances] + [
                self._target_of(Feature(self.snapshot, feature, identity))
                for feature in feature_names(self.store.path) for identity in self.snapshot.identities(feature)]
        for target in targets:
            if utterance in target:
                target.remove(utterance)

    @property
    def due(self) -> bool:
        """Whether the commit interval is over, in bytes or in time."""
        pending = sum(target.pending for target in self._targets())
        return pending >= COMMIT_BYTES or time.monotonic() - self._since >= self.commit_every_s

    def commit(self) -> None:
        """Make everything written so far visible and durable: utterances first, then features.

        After DiskFull the rest is still with this writer: once there is room, commit again.
        """
        self._check_open()
        for target in self._targets():
            target.commit(self._provenance)
            target.fold(self._provenance)
        self._since = time.monotonic()
        self.commits += 1

    def close(self, *, moved: bool = True) -> None:
        """Commit, fold this writer's segments, move replaced names (unless `moved` is False), leave a catalogue
        where many segments or rows have gathered."""
        if self._closed:
            return
        self.commit()
        self._closed = True
        for target in self._targets():
            target.fold_all(self._provenance)
        for name, identity in self._moves.items() if moved else ():
            serve(self.store.path, name, identity)
        for target in self._targets():
            _leave_catalogue(target)
        self.store.refresh()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close(moved=kind is None)

    def _targets(self) -> list[_Target]:
        return [self._utterances, *self._identities.values()]

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError(f"this writer of {self.store.path} is closed; store.writer() gives another")

    def _first_use(self, name: str, blocks: Iterable[np.ndarray], utterance: str) -> Iterable[np.ndarray]:
        """Bind a name that was not declared, or whose spec waits for the dim and dtype of a first array."""
        if name not in self._specs:
            self.declare(name, self.snapshot.feature(name).spec)
            return blocks
        spec, replace, codec = self._specs[name]
        rest = iter(blocks)
        first = next(rest, None)
        if first is None:
            raise LengthMismatch(_NO_FRAMES.format(utterance=utterance, name=name))
        complete = spec.completed(first)
        _checked(first, complete, utterance, name)  # an array that is refused decides nothing
        self._open(name, complete, replace, codec)
        self._specs[name] = complete, replace, codec
        return (block for part in ([first], rest) for block in part)

    def _open(self, name: str, spec: Spec, replace: bool, codec: str | None) -> None:
        """Bind a name to its identity's folder; claim the name if nobody has it."""
        encoding = named(codec, np.dtype(spec.dtype)) if codec is not None else None
        root, short = self.store.path, spec.identity[:16]
        served = read_served(root, name)
        old = Feature(self.snapshot, name, served) if served not in (None, short) else None
        held = old is not None and self._holds(old)  # a name under which nothing was ever stored is free
        if old is not None and held and not replace:
            raise IdentityMismatch(mismatch(root, old, spec))
        _make_identity(root, name, spec)
        if held:
            self._moves[name] = short
        elif not claim(root, name, short, instead_of=served):
            return self._open(name, spec, replace, codec)  # somebody else was first
        target = self._features[name] = self._target_of(Feature(self.snapshot, name, short))
        target.encoding = encoding or target.encoding

    def _holds(self, feature: Feature) -> bool:
        target = self._identities.get(feature.folder)
        return bool(feature.segments) or (target is not None and target.segment is not None)

    def _target_of(self, feature: Feature) -> _Target:
        if feature.folder not in self._identities:
            facts = {"feature": feature.name, "spec": feature.spec.to_json()}
            dtype, index = np.dtype(feature.spec.dtype), feature.index
            self._identities[feature.folder] = _Target(feature.folder, dtype.name, feature.dim, index, facts,
                                                       encoding_of(feature.segments, dtype))
        return self._identities[feature.folder]

    def _source(self, utterance: str) -> tuple[bytes, float]:
        """Digest and duration of the audio of an utterance that is there."""
        if utterance not in self._known:
            record = self._utterances.index.find(utterance)
            if record is None:
                raise MissingUtterance(f"{self.store.path} has no utterance {utterance!r}")
            self._known[utterance] = record["source"].tobytes(), float(record["seconds"])
        return self._known[utterance]


def _check_key(key: str) -> None:
    try:
        size = len(key.encode())
    except UnicodeEncodeError:
        raise BadRequest(f"key {key[:40]!a} is not Unicode text: it comes from a name that is not UTF-8; "
                         "rename the file, or give the utterance another key") from None
    if not 1 <= size <= KEY_BYTES:
        raise BadRequest(f"key {key[:40]!r} has {size} bytes, expected 1 to {KEY_BYTES}")


def _make_identity(root: Place, name: str, spec: Spec) -> None:
    folder = root / "features" / name / spec.identity[:16]
    make_group(root, folder.parent)
    storage.make_folders(root, folder)
    storage.create_document(folder / "zarr.json", group({"spec": spec.to_json(), "identity": spec.identity}))
    make_group(root, folder / "segments")


def _checked(block: np.ndarray, spec: Spec, utterance: str, name: str) -> np.ndarray:
    """The block `(n, D)` or `(n,)` in the stored dtype, or what is wrong with it."""
    block = np.asarray(block)
    if spec.kind == "global":
        block = block[None]
    dims = (spec.dim,) if spec.dim else ()
    if block.shape[1:] != dims:
        raise LengthMismatch(f"{utterance}: {name} has shape {block.shape}, expected (T, {spec.dim})" if dims else
                             f"{utterance}: {name} has shape {block.shape}, expected (T,)")
    if block.dtype.kind == "f" and not _finite(block):
        raise ValueError(f"{utterance}: {name} has {int((~np.isfinite(block)).sum())} values that are NaN or infinite "
                         f"of {block.size}; nothing of it was stored")
    if spec.kind == "f0" and block.size and block.min() < 0:
        raise ValueError(f"{utterance}: {name} has negative values; f0 is in Hz, 0 where unvoiced")
    dtype = np.dtype(spec.dtype)
    if block.dtype == dtype:
        return block
    if dtype.kind in "iu" and block.dtype.kind == "f":
        raise ValueError(f"{utterance}: {name} is {block.dtype}, its spec says {dtype}: round it before it is stored")
    with np.errstate(over="ignore"):
        cast = block.astype(dtype)
    if dtype.kind == "f" and not _finite(cast):
        raise ValueError(f"{utterance}: {name} reaches {np.abs(block).max():.4g}, more than {dtype} can hold; "
                         "ask for dtype=float32")
    if dtype.kind in "iu" and not (cast == block).all():
        raise ValueError(f"{utterance}: {name} has values that {dtype} cannot hold")
    return cast


def _finite(block: np.ndarray) -> bool:
    if block.dtype == np.float16:  # by the bits: ten times faster than numpy's isfinite, which goes through float32
        return not block.size or int((np.ascontiguousarray(block).view(np.uint16) & 0x7FFF).max()) < 0x7C00
    return bool(np.isfinite(block).all())


def _of_length(blocks: Iterable[np.ndarray], spec: Spec, seconds: float, utterance: str,
               name: str) -> Iterator[np.ndarray]:
    count = 0
    for block in blocks:
        count += len(block)
        yield block
    rate = spec.frame_rate or Fraction(1)
    found = float(count / rate)
    if abs(found - seconds) > SLACK_S + float(1 / rate):
        raise LengthMismatch(f"{utterance}: {name} lasts {found:.3f} s ({count} frames at {float(rate):g} Hz), its "
                             f"audio {seconds:.3f} s; at most {SLACK_S} s and one frame may lie between them")


_NO_FRAMES = "{utterance}: {name} has no frames; the recording is too short for it"


def _not_empty(blocks: Iterable[np.ndarray], utterance: str, name: str) -> Iterator[np.ndarray]:
    count = 0
    for block in blocks:
        count += len(block)
        yield block
    if not count:
        raise LengthMismatch(_NO_FRAMES.format(utterance=utterance, name=name))


def _all_replaced(segments: list[Segment]) -> list[str]:
    """The segments, and those they had replaced before."""
    return [name for segment in segments for name in (segment.id, *segment.facts.get("replaces", ()))]


def _size_class(size: int) -> int:
    """Each class is FOLD_COUNT times as large as the one before. Four are below 0, from which on they are linked."""
    return max(-4, math.floor(math.log(max(size, 1) / LINK_BYTES, FOLD_COUNT)))


def _leave_catalogue(target: _Target) -> None:
    """Write a catalogue where it spares readers more than it costs: all of it is written anew."""
    with contextlib.suppress(FileNotFoundError):  # segments are compacted at this moment: that leaves one as well
        _write_catalogue(target)


def _write_catalogue(target: _Target) -> None:
    collection = Collection(target.folder)
    old, new = collection.catalogue, collection.uncatalogued
    more = sum(segment.facts["rows"] for segment in new)
    rows, segments = more + (old.rows if old is not None else 0), len(collection.segments)
    worth = segments > CATALOGUE_SEGMENTS or rows > CATALOGUE_ROWS
    if rows > CATALOGUE_CHEAP:
        worth = more * CATALOGUE_SHARE > rows or len(new) > max(CATALOGUE_SEGMENTS, segments // CATALOGUE_SHARE)
    if target.own and worth:
        write_catalogue(target.folder, collection.merged())
        drop_catalogues(target.folder)
