"""Keeping a store whole: repair, purge what no longer counts, copy, remove.

Nothing here needs the store for itself: readers and writers may be at work. What they may still use is left alone for
a grace period, a day unless another is given.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from . import cache, storage
from .codecs import Encoding
from .errors import (
    BadCorpus,
    BadRequest,
    CorruptSegment,
    DiskFull,
    FeatstoreError,
    MissingUtterance,
    NotAStore,
    nearest,
)
from .extract import forget
from .index import Index, catalogue_homes, drop_replaced, hash_keys, merge, write_catalogue
from .row import Row
from .segment import REMOVED, Segment, SegmentWriter, encoding_of, group
from .spec import Spec
from .splits import copy_splits
from .storage import Place
from .store import Collection, Feature, Store, create, make_group, read_served, serve
from .verify import (
    UTTERANCES,
    Damage,
    Examined,
    Inspection,
    catalogues,
    check_facts,
    compare,
    identities,
    read_index,
    read_spec,
    trouble,
    uncommitted,
)
from .writer import Writer

GRACE_S = 24 * 3600.0


@dataclass(frozen=True)
class Removed:
    """Rows that `remove` took out of the store, the bytes on disk that a later `purge` will free, and the lines of
    `<store>.failures.jsonl` that told of what was removed."""

    rows: int
    bytes: int
    failures: int = 0


@cache.bypassed()
def repair(store: Store, inspection: Inspection, *, grace_s: float = GRACE_S) -> int:
    """Give up what `verify` found damaged, so that extract makes it again; then `purge`. Returns the bytes freed.

    A damaged row gets a tombstone. An utterance's damaged record is renewed with its key, its duration and the digest
    of its audio: its features stay fresh, and extract fills in what the corpus tells of it. Of a segment whose index,
    keys or documents are damaged, the rows that can be read are copied to another.
    """
    by_part: dict[str, list[Damage]] = {}
    for damage in inspection.damages:
        by_part.setdefault(damage.part, []).append(damage)
    for damage in by_part.get("group", []):
        _restore_group(store.path, store.path / damage.segment)
    for damage in by_part.get("document", []):
        (damage.folder / "segments" / damage.segment / "zarr.json").unlink(missing_ok=True)  # readers stumble over it
    for damage in by_part.get("spec", []):
        _restore_spec(store.path, damage.folder)
    broken = [damage for part in ("document", "segment", "catalogue") for damage in by_part.get(part, [])]
    for folder in {damage.folder for damage in broken}:
        storage.remove_tree(folder / "catalogue")  # derived from what is no longer so
    _salvage_all(store, by_part.get("segment", []))
    if any(damage.feature == UTTERANCES for damage in broken):
        _revive(store)
    _give_up(store, by_part.get("row", []))
    return purge(store, grace_s)


def _restore_group(root: Place, path: Place) -> None:
    path.unlink(missing_ok=True)
    make_group(root, path.parent)


def _restore_spec(root: Place, folder: Place) -> None:
    """Put an identity's document back from one of its segments; where none has it, release the name and drop it."""
    path = folder / "zarr.json"
    for segment in Collection(folder).segments:
        with contextlib.suppress(FeatstoreError, OSError, ValueError, KeyError, TypeError, AttributeError):
            spec = Spec.from_json(segment.facts["spec"])
            if spec.identity[:16] == folder.name:
                storage.put_document(path, group({"spec": spec.to_json(), "identity": spec.identity}))
                return
    if read_served(root, folder.parent.name) == folder.name:
        serve(root, folder.parent.name, None)
    storage.remove_tree(folder)


def _salvage_all(store: Store, damages: Iterable[Damage]) -> None:
    utterances = Examined(store.path, store.path / UTTERANCES, None)
    for folder, name in dict.fromkeys((damage.folder, damage.segment) for damage in damages):
        segment = Segment(folder / "segments" / name)
        if (segment.folder / "zarr.json").exists():
            part = utterances if folder.name == UTTERANCES else Examined(store.path, folder, utterances)
            _salvage(part, segment)


def _salvage(part: Examined, segment: Segment) -> None:
    """Replace a segment by one with those of its rows that can be read, tombstones and generations included."""
    records: Iterable[np.void] = segment.records if trouble(segment, read_index) is None else ()
    with replacing(part.folder, [segment]) as saved:
        for record in records:
            key = part.name_in(segment, record)
            if key is None:
                continue
            if record["flags"] & REMOVED:
                saved.copy(key, record, ())
            elif trouble(segment, compare, record) is None:
                saved.copy(key, record, segment.blocks(record))
            elif part.feature != UTTERANCES:
                saved.remove(key, generation=int(record["generation"]))  # lest an older row answers in its place


def _revive(store: Store) -> None:
    """Name the utterances again whose records are lost, with the digest of the audio their features were made from.

    They are then known to extract, which need not make features again that are whole. Their duration is that of their
    longest feature.
    """
    now = Store(store.path)
    lost: dict[str, tuple[int, bytes]] = {}
    seconds: dict[str, float] = {}
    for feature in _features(now):
        records, rate = feature.index.records[feature.index.live], feature.frame_rate
        at = now.utterances.index.positions(np.stack([records["hash"], records["tag"]], axis=1))
        for record in records[at < 0]:
            key, written = feature.index.key(record), int(record["written"])
            if now.utterances.index.position(key) >= 0:
                continue  # removed
            lost[key] = max(lost.get(key, (0, b"")), (written, record["source"].tobytes()))
            seconds[key] = max(seconds.get(key, 0.0), float(int(record["length"]) / rate) if rate else 0.0)
    with now.writer() as writer:
        for key, (_, source) in sorted(lost.items()):
            _put_bare(writer, key, source, seconds[key])


def _put_bare(writer: Writer, key: str, source: bytes, seconds: float) -> None:
    """All that is left of an utterance's record."""
    writer.utterance({"key": key, "duration_s": seconds}, source=source, seconds=seconds)


def _give_up(store: Store, damages: Iterable[Damage]) -> None:
    """Tombstones for damaged rows that still answer; records of utterances are renewed."""
    now = Store(store.path)
    features = {feature.folder: feature for feature in _features(now)}
    with now.writer() as writer:
        for damage in damages:
            feature, key = features.get(damage.folder), damage.utterance
            index = feature.index if feature is not None else now.utterances.index
            record = index.find(key) if key is not None else None
            if key is None or record is None or index.segments[int(record["segment"])].id != damage.segment:
                continue  # written anew since it was looked at, or saved from its segment
            if feature is None or key not in now.utterances:
                _put_bare(writer, key, record["source"].tobytes(), float(record["seconds"]))
            if feature is not None:
                writer.delete(key, f"{feature.name}@{feature.short}")
    store.refresh()


def purge(store: Store, grace_s: float = GRACE_S) -> int:
    """Remove what no reader or writer needs and has not for `grace_s` seconds. Returns the bytes freed.

    That is: segments that others replace, or none of whose rows may answer any more; segment folders without their
    document; identities without rows that no name stands for; catalogues but the newest; what dead runs left in the
    spool. A folder without a document that is younger may belong to a writer that is alive.
    """
    freed = 0
    for folder in [store.path / UTTERANCES, *identities(store)]:
        _retire(folder)
        freed += purge_collection(folder, grace_s)
        if folder.name != UTTERANCES and _unused(store.path, folder, grace_s):
            freed += _drop_identity(folder)
    leftovers = [*store.path.glob("features/*/.*.removed"), *store.path.glob("spool/*")]
    freed += sum(_discard(path) for path in leftovers if _untouched_s(path) >= grace_s)
    store.refresh()
    return freed


def purge_collection(folder: Place, grace_s: float) -> int:
    """`purge` of the utterances or of one identity: segments and catalogues. Returns the bytes freed."""
    freed = sum(_discard(home) for home in uncommitted(folder) if _age_s(home) >= grace_s)
    removed = 0
    for segment, since in _replaced(folder):
        if since >= grace_s:
            removed += _discard(segment.folder)
    homes = catalogue_homes(folder)
    there = {segment.id for segment in Collection(folder).segments}
    usable = [home for home, facts in catalogues(folder) if set(facts["segments"]) <= there]
    if homes and not usable and removed:
        with contextlib.suppress(FeatstoreError, OSError):  # an index that is damaged: verify says so
            write_catalogue(folder, merge(Collection(folder).segments))
    freed += sum(_discard(home) for home in homes if home not in usable[:1] and _age_s(home) >= grace_s)
    return freed + removed


def _replaced(folder: Place) -> list[tuple[Segment, float]]:
    """The segments that others replace, oldest first, with the seconds since they were; all but those whose going
    would bring back what they themselves replaced."""
    segments = [s for s in Collection(folder).segments if trouble(s, check_facts) is None]
    since: dict[str, float] = {}
    for segment in segments:
        for name in segment.facts.get("replaces", ()):
            since[name] = max(since.get(name, 0.0), committed_s(segment))
    there = {segment.id for segment in segments}
    kept_back = {name for s in drop_replaced(segments) for name in s.facts.get("replaces", ())}
    return [(s, since[s.id]) for s in segments
            if s.id in kept_back and set(s.facts.get("replaces", ())) & there <= kept_back]


def _retire(folder: Place) -> int:
    """Replace the segments none of whose rows may answer any more by an empty one. Returns their bytes on disk."""
    try:
        segments = drop_replaced(Collection(folder).segments)
        index = merge(segments)
        used = set(np.unique(index.records["segment"]).tolist())
        dead = [segment for number, segment in enumerate(segments) if number not in used]
        if not any(segment.facts["rows"] for segment in dead):
            return 0
    except (FeatstoreError, OSError, KeyError, TypeError):
        return 0  # damaged, or changed by another purge: what cannot be judged stays
    with replacing(folder, dead):
        pass
    return sum(storage.bytes_under(segment.folder) for segment in dead)


def _unused(root: Place, folder: Place, grace_s: float) -> bool:
    """Whether no name stands for an identity, it has no rows, and nothing was done to it for `grace_s` seconds."""
    if read_served(root, folder.parent.name) == folder.name:
        return False
    homes = [folder / "segments" / name for name in storage.names(folder / "segments") if "-" in name]
    try:
        rows = int(merge(Collection(folder).segments).live.sum())
    except (FeatstoreError, OSError, KeyError, TypeError):
        return False  # damaged: repair first
    touched = [_age_s(home) for home in homes] + [_untouched_s(folder / "segments", deep=False)]
    return rows == 0 and min(touched) >= grace_s


def _drop_identity(folder: Place) -> int:
    homes = [folder / "segments" / name for name in storage.names(folder / "segments") if "-" in name]
    freed = sum(_discard(home) for home in homes)  # what replaces comes last
    if not isinstance(folder, Path):
        return freed + _discard(folder)  # its document first: objects cannot be renamed
    hidden = folder.with_name(f".{storage.new_id()}.removed")  # one step: no reader sees a part of it
    folder.rename(hidden)
    return freed + _discard(hidden)


def _discard(path: Place) -> int:
    """Remove a file or folder, its document first; returns its bytes."""
    freed = storage.bytes_under(path)
    storage.handles.forget(str(path))
    with storage.disk_room(path), contextlib.suppress(FileNotFoundError):  # another purge was first
        if path.is_dir():
            (path / "zarr.json").unlink(missing_ok=True)
            storage.sync_folder(path)
            storage.remove_tree(path)
        else:
            path.unlink()
    return freed


def _age_s(home: Place) -> float:
    """Seconds since a folder was begun, or since something in it was written last."""
    try:
        return min(storage.age_s(home.name), _untouched_s(home))
    except ValueError:
        return _untouched_s(home)  # not named by us


def committed_s(segment: Segment) -> float:
    """Seconds since a segment was committed."""
    return min(storage.age_s(segment.id), _untouched_s(segment.folder / "zarr.json"))


def _untouched_s(path: Place, *, deep: bool = True) -> float:
    """Seconds since a file, or anything in a folder, was written last."""
    return max(0.0, time.time() - storage.touched_s(path, deep=deep))


def copy(src: Store, dst: str | Place, names: Sequence[str] | None = None, *,
         progress: Callable[[int, int], None] | None = None) -> int:
    """Copy features (NAME or NAME@IDENTITY; None: all that are served) and all utterances into another store.

    Splits go along, but for those whose name stands for another split in `dst`.
    `dst` is made if it does not exist. What it has from the same audio under the same identity is skipped: a copy that
    was interrupted goes on, and one that is done does nothing. Rows keep their scale, source, stamp and duration.
    progress: called with the bytes of frames done and in total. Returns the rows written, of features and utterances.

    Raises:
        IdentityMismatch: `dst` serves another identity under one of the names; before any row is copied.
        BadCorpus: one key stands for two recordings, here and in `dst`; before any row is copied.
        CorruptSegment: a row does not match its checksum; damage is not copied.
        DiskFull: what is to be copied does not fit.
    """
    dst = storage.place(dst)
    if dst.resolve() == src.path.resolve():
        raise BadRequest(f"{dst} is the store that is to be copied; give another path")
    features = chosen(src, names)
    target = Store(dst) if dst.exists() else create(dst)
    _refuse_namesakes(src, target)
    todo = [_wanted(feature, target) for feature in features]
    total = sum(int(records["length"].sum()) * _row_bytes(feature)
                for feature, records in zip(features, todo, strict=True))
    _check_room(target.path, total)
    with target.writer() as writer:
        for feature in features:
            there = (feature.short in target.identities(feature.name)
                     and Feature(target, feature.name, feature.short).segments)  # then its own codec counts
            codec = encoding_of(feature.segments, feature.stored_dtype).name
            writer.declare(feature.name, feature.spec, codec=None if there else codec)
            if feature.quantiser is not None:
                feature.quantiser.save(target.path / "features" / feature.name / feature.short, feature.spec)
        rows, done = _copy_utterances(src, target, writer), 0
        for feature, records in zip(features, todo, strict=True):
            for record in records:
                _copy_row(src, feature, record, writer)
                rows, done = rows + 1, done + int(record["length"]) * _row_bytes(feature)
                if progress is not None:
                    progress(done, total)
    copy_splits(src, target)
    return rows


def chosen(src: Store, names: Sequence[str] | None) -> list[Feature]:
    """The features of some names (None or none: all that are served). BadRequest for two identities of one name."""
    chosen = {feature.folder: feature for feature in (src.feature(name) for name in (names or src.features))}
    taken: dict[str, str] = {}
    for feature in chosen.values():
        if feature.name in taken:
            raise BadRequest(f"{feature.name}@{feature.short[:9]} and @{taken[feature.name][:9]}: one name stands for "
                             "one identity elsewhere too; take them to two places")
        taken[feature.name] = feature.short
    return list(chosen.values())


def _wanted(feature: Feature, target: Store) -> np.ndarray:
    """The records of a feature's rows that `target` lacks, in the order in which they lie on disk."""
    records = feature.index.records[feature.index.live]
    records = records[np.lexsort((records["offset"], records["segment"]))]
    if feature.short not in target.identities(feature.name):
        return records
    held = Feature(target, feature.name, feature.short).index
    at = held.positions(np.stack([records["hash"], records["tag"]], axis=1))
    return records[~_same(records, held, at, ("source", "length", "checksum", "scale"))]


def _same(records: np.ndarray, held: Index, at: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """Which records are equal in these fields to those at `at` of another index."""
    same = at >= 0
    for name in names if len(held.records) else ():
        equal = held.records[name][at] == records[name]
        same &= equal.all(axis=1) if equal.ndim > 1 else equal
    return same


def _refuse_namesakes(src: Store, target: Store) -> None:
    """BadCorpus where a key has other audio from another place in `target`: its features there would become stale.

    Other audio from the same place is the same recording, changed since.
    """
    index, held = src.utterances.index, target.utterances.index
    records = index.records[index.live]
    at = held.positions(np.stack([records["hash"], records["tag"]], axis=1))
    records = records[(at >= 0) & ~_same(records, held, at, ("source",))]
    for key in (index.key(record) for record in records if record["source"].any()):
        mine, theirs = src.utterances[key], target.utterances[key]
        if theirs.audio is not None and (mine.root, mine.audio) != (theirs.root, theirs.audio):
            places = [str(Path(found.root or "", found.audio or "")) for found in (mine, theirs)]
            raise BadCorpus(f"{key} is {places[0]} in {src.path} and {places[1]} in {target.path}. Nothing was copied. "
                            "Copy to another store, or give one corpus other keys: featstore scan CORPUS --key "
                            "'{speaker}/{utterance}'")


def _copy_utterances(src: Store, target: Store, writer: Writer) -> int:
    index, held = src.utterances.index, target.utterances.index
    records = index.records[index.live]
    at = held.positions(np.stack([records["hash"], records["tag"]], axis=1))
    fields = ("source", "stamp", "seconds", "length", "checksum")
    records = records[~_same(records, held, at, fields)]
    for record in records:
        _put_utterance(index, record, writer)
        if writer.due:
            writer.commit()
    return len(records)


def _put_utterance(index: Index, record: np.void, writer: Writer) -> None:
    segment = index.segments[int(record["segment"])]
    data = b"".join(block.tobytes() for block in checked(segment.blocks(record), record, index.key(record), "record"))
    writer.utterance(json.loads(data), source=record["source"].tobytes(), stamp=int(record["stamp"]),
                     seconds=float(record["seconds"]))


def _copy_row(src: Store, feature: Feature, record: np.void, writer: Writer) -> None:
    """Write a row; one that was made from other audio than the utterance's present audio keeps its own source."""
    key = feature.index.key(record)
    row = Row(feature, key, record)
    if feature.quantiser is not None:
        writer.derive(row, feature.name, checked(row.stored(), record, key, feature.name), stamp=int(record["stamp"]))
        return
    known = src.utterances.index.find(key)
    source = record["source"].tobytes()
    stale = known is None or known["source"].tobytes() != source
    if stale:
        writer.utterance({"key": key}, source=source)  # what is written next is of this audio
    frames = [row.read()] if feature.kind == "global" else row.blocks()
    try:
        writer.write(key, feature.name, checked(frames, record, key, feature.name), scale=row.scale)
    finally:
        if stale and known is not None:
            _put_utterance(src.utterances.index, known, writer)


def checked(blocks: Iterable[np.ndarray], record: np.void, key: str, name: str) -> Iterator[np.ndarray]:
    """The blocks of a row; CorruptSegment after the last one if they do not match its checksum."""
    value = 0
    for block in blocks:
        value = google_crc32c.extend(value, np.ascontiguousarray(block).reshape(-1).view(np.uint8))
        yield block
    if value != int(record["checksum"]):
        raise CorruptSegment(f"{key}: {name} does not match its checksum: its bytes changed after they were written. "
                             "`featstore verify STORE --repair` gives it up, extract makes it again; then run this "
                             "again")


def _row_bytes(feature: Feature) -> int:
    return feature.stored_dtype.itemsize * max(1, feature.dim)


def _check_room(path: Place, needed: int) -> None:
    free = storage.free_bytes(path)
    if free is not None and needed > free:
        raise DiskFull(f"{path} needs about {needed / 1e9:.2f} GB more and {free / 1e9:.2f} GB are free. Nothing was "
                       "copied; free some room or name another disk.")


def remove(store: Store, *, feature: str | None = None, speaker: str | None = None,
           utterances: Sequence[str] = ()) -> Removed:
    """Take a feature (NAME or NAME@IDENTITY), all of a speaker, or some utterances out of the store.

    Readers see it at once; the bytes stay until `purge` finds them old enough. Where a segment also holds rows of
    others, its bytes stay until `compact` with `purge` writes it anew. What is remembered of recordings that failed is
    forgotten at once. Exactly one of the three is given.

    Raises:
        MissingFeature, MissingUtterance: there is none of that name, with the nearest that there are.
    """
    if sum((feature is not None, speaker is not None, bool(utterances))) != 1:
        raise BadRequest("say what to remove: a feature, a speaker or utterances, one of the three")
    store.refresh()
    if feature is not None:
        removed = _remove_feature(store, feature)
    else:
        keys = list(dict.fromkeys(utterances)) if speaker is None else _of_speaker(store, speaker)
        removed = _remove_utterances(store, keys)
        failures = forget(store, keys, speaker)
        removed = dataclasses.replace(removed, failures=failures)
        if not keys and not failures:
            raise MissingUtterance(f"{store.path} has no speaker {speaker!r} "
                                   f"({nearest(str(speaker), sorted(store.utterances.speakers()))})")
    store.refresh()
    return removed


def _remove_feature(store: Store, name: str) -> Removed:
    feature = store.feature(name)
    segments, rows = drop_replaced(feature.segments), len(feature)
    size = sum(storage.bytes_under(segment.folder) for segment in segments)
    if segments:
        with replacing(feature.folder, segments):
            pass
    if read_served(store.path, feature.name) == feature.short:
        serve(store.path, feature.name, None)  # after the rows: a kill in between leaves a name that can be removed
    return Removed(rows, size)


def _remove_utterances(store: Store, keys: list[str]) -> Removed:
    for key in keys:
        if key not in store.utterances:
            raise MissingUtterance(f"{store.path} has no utterance {key!r} ({nearest(key, store.utterances)}). "
                                   "Nothing was removed.")
    if not keys:
        return Removed(0, 0)
    hashes = hash_keys(keys)
    indexes = [store.utterances.index, *(feature.index for feature in _features(store))]
    rows = sum(int((index.positions(hashes) >= 0).sum()) for index in indexes)
    with store.writer() as writer:
        for key in keys:
            writer.delete(key)
    return Removed(rows, sum(_retire(folder) for folder in [store.path / UTTERANCES, *identities(store)]))


def _of_speaker(store: Store, speaker: str) -> list[str]:
    return [key for key, utterance in store.utterances.items() if utterance.speaker == speaker]


def _features(store: Store) -> list[Feature]:
    return [Feature(store, folder.parent.name, folder.name) for folder in identities(store)]


@contextlib.contextmanager
def replacing(folder: Place, segments: Sequence[Segment], encoding: Encoding | None = None) -> Iterator[SegmentWriter]:
    """A new segment of a collection, committed at the end of the block, that stands for `segments` from then on.

    encoding: of its frames; None: as in the newest of `segments`.
    """
    writer, facts = new_segment(folder, segments, encoding)
    names = [name for segment in segments for name in (segment.id, *segment.facts.get("replaces", ()))]
    try:
        yield writer
        writer.commit(facts | {"replaces": list(dict.fromkeys(names)), "provenance": {}})
    except BaseException:
        writer.discard()
        raise


def new_segment(folder: Place, segments: Sequence[Segment],
                encoding: Encoding | None = None) -> tuple[SegmentWriter, dict[str, Any]]:
    """A new segment of a collection, nothing of which can be seen yet, and what its document says in any case.

    encoding: of its frames; None: as in the newest of `segments`.
    """
    facts, dtype, dim = {}, "uint8", 0
    if folder.name != UTTERANCES:
        spec = read_spec(folder / "zarr.json")
        if spec.dtype is None:
            raise NotAStore(f"{folder}/zarr.json has a spec without dtype: it is damaged")
        facts, dtype, dim = {"feature": folder.parent.name, "spec": spec.to_json()}, spec.dtype, spec.dim or 0
    encoding = encoding or encoding_of(segments, np.dtype(dtype))
    return SegmentWriter(folder / "segments" / storage.new_id(), dtype, dim, encoding), facts
