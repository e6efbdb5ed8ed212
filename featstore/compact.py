"""Compact: the many segments of a collection merged into few, beside readers and writers; with `purge`, erasure.

Merged segments hold the rows that may still answer, sorted by key, with their own generations and times. Tombstones go
to a segment of their own, without the key: what is left of a removed utterance is a hash, for as long as any segment on
disk, replaced or not yet committed, may hold a row that the tombstone covers.

Two rules keep what others do meanwhile. A folder for the new segment is made before its inputs are looked at, so that
nobody drops a tombstone while rows it covers are on their way to another segment. And whatever replaced an input since
it was listed is looked for before the commit, and once more after it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from . import storage
from .codecs import Encoding
from .errors import CorruptSegment, DiskFull, FeatstoreError
from .index import drop_replaced, key_order, write_catalogue
from .segment import REMOVED, Segment
from .storage import Place
from .store import Collection, Store
from .upkeep import GRACE_S, checked, committed_s, new_segment, purge_collection, replacing
from .upkeep import purge as purge_store
from .verify import UTTERANCES, Damage, catalogues, identities

SEGMENT_BYTES = 4 << 30   # of frames in a merged segment: 32 shards
SEGMENT_ROWS = 1 << 20    # and rows: their records are held in memory until the commit, 136 bytes each and the key
_UNREADABLE = (FeatstoreError, ValueError, KeyError, TypeError)  # what damaged bytes and documents make readers raise
ATTEMPTS = 20             # to be the one who compacts a collection that others change meanwhile
WASTE = 0.2               # a share of rows that cannot answer for which a segment is written anew without `purge`


@dataclass
class Compacted:
    """What `compact` did.

    segments_before, segments_after: those that answer, replaced ones not counted; bytes: of the frames in them.
    copied: bytes of frames written to new segments.
    freed: bytes on disk that were removed. waiting: of replaced segments that are too young to be.
    tombstones: forgotten, since nothing is left that they hold back.
    damages: what cannot be read was left as it is; `verify --repair` gives it up.
    """

    segments_before: int = 0
    segments_after: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    copied: int = 0
    freed: int = 0
    waiting: int = 0
    tombstones: int = 0
    damages: list[Damage] = field(default_factory=list)


def compact(store: Store, *, purge: bool = False, grace_s: float = GRACE_S,
            progress: Callable[[int, int], None] | None = None) -> Compacted:
    """Merge the small segments of the utterances and of every identity; leave a catalogue of each.

    Readers and writers may be at work, and other calls of this. What is interrupted goes on with the next call; every
    merged segment is committed for itself.

    purge: write anew whatever holds rows that cannot answer or keys that were removed, and remove what was replaced or
        left behind more than `grace_s` seconds ago. With a grace of 0, which only a store that nobody else uses can
        bear, nothing is left of what was removed.
    progress: called with the bytes of frames copied and those to be copied in all.

    Raises:
        DiskFull: a merged segment does not fit beside the old ones. What was committed before is kept.
    """
    done = Compacted()
    folders = [store.path / UTTERANCES, *identities(store)]
    total = sum(_to_copy(folder, grace_s if purge else None) for folder in folders) if progress is not None else 0
    for folder in folders:
        _count(folder, done, before=True)
        for _ in steps(folder, done, purge=purge, grace_s=grace_s):
            if progress is not None:
                progress(min(done.copied, total), total)
        _count(folder, done, before=False)
    if purge:
        done.freed += purge_store(store, grace_s)
    if progress is not None:
        progress(total, total)
    store.refresh()
    return done


def steps(folder: Place, done: Compacted, *, purge: bool, grace_s: float,
          encoding: Encoding | None = None) -> Iterator[str]:
    """Compact one collection; yields after each thing others can see or interfere with: list, read (for every row that
    was copied), commit, catalogue, purge.

    encoding: instead, write what is encoded in another way, and that alone.
    """
    spoilt: set[str] = set()
    for attempt in range(ATTEMPTS):
        try:
            plan = _Plan(folder, grace_s if purge else None, spoilt, encoding)
        except FileNotFoundError as error:
            if attempt < ATTEMPTS - 1:
                continue  # a segment was removed by another process while it was listed
            raise CorruptSegment(f"{folder}: {error}, again and again") from error
        except (*_UNREADABLE, OSError) as error:
            done.damages.append(_damage(folder, None, "", f"not compacted: {error}"))
            return
        yield "list"
        if not (yield from plan.carry_out(done)):
            break
    _leave_catalogue(folder)
    yield "catalogue"
    if purge:
        done.freed += purge_collection(folder, grace_s)
        yield "purge"
        if _forget_tombstones(folder, done, grace_s):
            yield "commit"
            done.freed += purge_collection(folder, grace_s)
            yield "purge"


class _Plan:
    """The segments of a collection as they are now, and which of them are to be written anew, together.

    groups: each becomes one segment with the rows of all. bare: those without a row that answers, which become one with
    what tombstones there are. grace_s: None where what cannot answer may stay if it is little. encoding: see `steps`.
    """

    def __init__(self, folder: Place, grace_s: float | None, spoilt: set[str] | None = None,
                 encoding: Encoding | None = None) -> None:
        self.folder, self.grace_s, self.spoilt = folder, grace_s, spoilt if spoilt is not None else set()
        self.encoding = encoding
        thorough = grace_s is not None
        collection = Collection(folder)
        # of utterances the latest row answers, whatever others there are; of features the audio decides
        self.index = collection.index() if folder.name == UTTERANCES else collection.merged()
        self.segments = self.index.segments  # none that another replaces
        self._listed = {segment.id for segment in collection.segments}
        kept = [s for s in self.segments if s.id not in self.spoilt]
        self._weigh()
        place = {segment.id: number for number, segment in enumerate(self.segments)}
        full = [segment for segment in kept if self.rows[place[segment.id]]
                and (encoding is None or segment.codec != encoding.name)]
        self.groups = self._packed([place[segment.id] for segment in full], thorough)
        self.bare = [place[s.id] for s in kept if not self.rows[place[s.id]]]
        moved = sum(int(self.tombstones[number]) for group in self.groups for number in group)
        dirty = any(self.dead[number] or self.lost[number] for number in self.bare)
        dirty |= thorough and self._keys_of_tombstones()
        if not moved and len(self.bare) < 2 and not dirty:
            self.bare = []
        self.write_bare = bool(moved or self.bare)

    @property
    def bytes(self) -> int:
        """Of the frames that will be copied."""
        return int(sum(self.live_bytes[number] for group in self.groups for number in group))

    def carry_out(self, done: Compacted) -> Generator[str, None, bool]:
        """Write the new segments, one after the other; returns whether something came between and all is to be listed
        again."""
        if self.write_bare:
            moved = [*self.bare, *(number for group in self.groups for number in group)]
            tombstones = (("", record, ()) for record in self._records(moved, removed=True))
            merged = yield from self._write(self.bare, tombstones)
            if merged is None or self._outrun(merged):
                return True
        changed = False
        for group in self.groups:
            while group:  # without those that cannot be read
                self._make_room(group, done)
                try:
                    merged = yield from self._write(group, self._rows(group, done))
                except _Spoilt as found:
                    done.damages.append(found.damage)
                    self.spoilt.add(found.damage.segment)
                    group = [number for number in group if self.segments[number].id not in self.spoilt]
                    continue
                if merged is not None:
                    self._give_way(merged, group, done)
                changed |= merged is None
                break
        return changed

    def _weigh(self) -> None:
        count, records = len(self.segments), self.index.records
        where, live = records["segment"], self.index.live
        self.rows = np.bincount(where[live], minlength=count)
        self.tombstones = np.bincount(where[~live], minlength=count)
        frames = np.bincount(where[live], records["length"][live], minlength=count)
        facts = [segment.facts for segment in self.segments]
        self.dead = np.array([f["rows"] for f in facts], int) - self.rows - self.tombstones
        self.lost = np.array([f["frames"] for f in facts], int) - frames.astype(int)  # of dead rows, or of none
        self.bytes_held = np.array([f["bytes"] for f in facts], float)
        self.live_bytes = frames * np.array([f["bytes"] / max(1, f["frames"]) for f in facts])

    def _packed(self, numbers: list[int], thorough: bool) -> list[list[int]]:
        """Groups of segments, the oldest first, that together make one of the target size, or one that needs it."""
        groups: list[list[int]] = []
        room = -1.0
        for number in numbers:
            fill = max(self.live_bytes[number] / SEGMENT_BYTES, self.rows[number] / SEGMENT_ROWS)
            if fill >= 0.5 and not self._wasteful(number, thorough):
                continue
            if fill > room + 1e-9:  # sixths add up to a little more than one
                groups.append([])
                room = 1.0
            groups[-1].append(number)
            room -= fill
        return [group for group in groups if len(group) > 1 or self._wasteful(group[0], thorough)]

    def _wasteful(self, number: int, thorough: bool) -> bool:
        if self.encoding is not None:
            return True
        if thorough:
            return bool(self.dead[number] or self.tombstones[number] or self.lost[number])
        held = self.bytes_held[number]
        rows = self.rows[number] + self.dead[number]
        return bool(held - self.live_bytes[number] >= WASTE * held > 0 or self.dead[number] >= WASTE * rows > 0)

    def _keys_of_tombstones(self) -> bool:
        return any((self.segments[number].records["key_length"] > 0).any() for number in self.bare)

    def _records(self, numbers: list[int], *, removed: bool) -> np.ndarray:
        records = self.index.records
        chosen = np.isin(records["segment"], numbers) & (self.index.live != removed)
        return records[chosen]

    def _rows(self, group: list[int], done: Compacted) -> Iterator[tuple[str, np.void, Iterable[np.ndarray]]]:
        """The rows of some segments, by key: all features of a store lie in one order, that of its utterances."""
        records = self._records(group, removed=False)
        named = [(self._key(record), int(record["generation"]), at) for at, record in enumerate(records)]
        for key, _, at in sorted(named):
            record = records[at]
            segment = self.segments[int(record["segment"])]
            yield key, record, self._blocks(segment, record, key, done)

    def _key(self, record: np.void) -> str:
        segment = self.segments[int(record["segment"])]
        try:
            return segment.key(record)
        except _UNREADABLE as error:
            raise _Spoilt(_damage(self.folder, None, segment.id, str(error))) from error

    def _blocks(self, segment: Segment, record: np.void, key: str, done: Compacted) -> Iterator[np.ndarray]:
        """The frames of a row, held against their checksum: damage is not made to look whole."""
        try:
            for block in checked(segment.blocks(record), record, key, self.folder.parent.name):
                done.copied += block.nbytes
                yield block
        except FileNotFoundError:
            raise
        except (*_UNREADABLE, OSError) as error:
            raise _Spoilt(_damage(self.folder, key, segment.id, str(error))) from error

    def _write(self, numbers: list[int],
               rows: Iterable[tuple[str, np.void, Iterable[np.ndarray]]]) -> Generator[str, None, Segment | None]:
        """A segment of these rows in place of `numbers`; None if another process was quicker with one of them."""
        inputs = [self.segments[number] for number in numbers]
        try:
            writer, facts = new_segment(self.folder, drop_replaced(self.segments), self.encoding)
        except FileNotFoundError:
            return None  # the identity was removed
        try:
            changed = self._changed(inputs)
            for key, record, blocks in () if changed else rows:
                writer.copy(key, record, blocks)
                yield "read"
            if changed or self._changed(inputs):
                writer.discard()
                return None
            writer.commit(facts | {"replaces": self._names(inputs), "provenance": _provenance(inputs)})
        except BaseException as error:
            purged = isinstance(self.folder, Path) and not writer.folder.exists()  # by one without grace
            writer.discard()
            if isinstance(error, FileNotFoundError) or (purged and isinstance(error, CorruptSegment)):
                return None
            raise
        yield "commit"
        return Segment(writer.folder)

    def _changed(self, inputs: list[Segment]) -> bool:
        """Whether an input is gone, or another segment has taken its place since it was listed."""
        now, names = Collection(self.folder).segments, {segment.id for segment in inputs}
        return not names <= {s.id for s in now} or any(names & _replaced(s) for s in self._new(now))

    def _new(self, now: Sequence[Segment]) -> Iterator[Segment]:
        return (segment for segment in now if segment.id not in self._listed)

    def _outrun(self, merged: Segment) -> bool:
        """Whether another compaction did the same with tombstones between the last look and the commit. It may have
        forgotten some: what was merged here is emptied."""
        names = {self.segments[number].id for number in self.bare}
        if not any(names & _replaced(s) for s in self._new(Collection(self.folder).segments) if s.id != merged.id):
            return False
        with contextlib.suppress(FileNotFoundError), replacing(self.folder, [merged]):
            pass  # unless that one has replaced it already, and a purge removed it
        return True

    def _give_way(self, merged: Segment, numbers: list[int], done: Compacted) -> None:
        """Take back rows of inputs that were emptied (`rm` of a feature) between the last look and the commit.

        Inputs that another compaction merged in that moment lie in two segments now, which is no harm.
        """
        inputs, emptied = {self.segments[number].id: self.segments[number] for number in numbers}, set()
        for segment in self._new(Collection(self.folder).segments):
            if segment.id != merged.id and not segment.facts["rows"]:
                emptied |= _replaced(segment) & inputs.keys()
        if not emptied:
            return
        gone = {row for name in emptied for row in _rows_of(inputs[name].records)}
        with contextlib.suppress(FileNotFoundError), replacing(self.folder, [merged]) as writer:
            for record, row in zip(merged.records, _rows_of(merged.records), strict=True):
                if row not in gone:
                    key = merged.key(record)
                    writer.copy(key, record, self._blocks(merged, record, key, done))

    def _names(self, inputs: list[Segment]) -> list[str]:
        """What a segment in place of `inputs` replaces: them, and what they had replaced as far as anything still
        knows of it."""
        known = self._listed | {segment.id for segment in self.segments}
        known |= {name for _, facts in catalogues(self.folder) for name in facts["segments"]}
        names = [name for s in inputs for name in (s.id, *s.facts.get("replaces", ()))]
        return [name for name in dict.fromkeys(names) if name in known]

    def _make_room(self, group: list[int], done: Compacted) -> None:
        needed = sum(self.live_bytes[number] for number in group)
        free = storage.free_bytes(self.folder)
        if free is not None and needed > free and self.grace_s is not None:
            done.freed += purge_collection(self.folder, self.grace_s)
            free = storage.free_bytes(self.folder)
        if free is not None and needed > free:
            raise DiskFull(f"{self.folder} needs about {needed / 1e9:.2f} GB beside what it has, and {free / 1e9:.2f} "
                           "GB are free. What was compacted before is kept: free some room and run the same command "
                           "again; `compact --purge` removes what was replaced more than a day ago.")


class _Spoilt(CorruptSegment):
    """A row that cannot be copied; its segment stays as it is."""

    def __init__(self, damage: Damage) -> None:
        super().__init__(damage.reason)
        self.damage = damage


def _forget_tombstones(folder: Place, done: Compacted, grace_s: float) -> bool:
    """Drop the tombstones that hold nothing back on the disk. Returns whether there were any."""
    found = _forgettable(folder, grace_s)
    if found is None:
        return False
    writer, facts = new_segment(folder, found[0])
    try:
        found = _forgettable(folder, grace_s, but=writer.folder.name)  # again: who comes now finds this folder
        if found is None:
            writer.discard()
            return False
        bare, kept = found
        for record in kept:
            writer.copy("", record, ())
        replaces = list(dict.fromkeys(name for s in bare for name in (s.id, *s.facts.get("replaces", ()))))
        writer.commit(facts | {"replaces": replaces, "provenance": {}})
    except BaseException:
        writer.discard()
        raise
    done.tombstones += sum(s.facts["rows"] for s in bare) - len(kept)
    return True


def _forgettable(folder: Place, grace_s: float, but: str = "") -> tuple[list[Segment], list[np.void]] | None:
    """The segments that hold nothing but tombstones, and those of them that must stay; None if all must.

    A tombstone stays as long as another segment, replaced or not, has a row that it covers, or the tombstone itself;
    and all stay while there is a folder that is not committed. Names are listed before it is asked which of them are
    committed, so that one that is being committed at this moment counts. Objects have no folders before they are
    committed: there tombstones stay for the grace period.
    """
    names = {name for name in storage.names(folder / "segments") if "-" in name} - {but}
    try:
        segments = Collection(folder).segments
        bare = [s for s in drop_replaced(segments) if s.facts["rows"] and (s.records["flags"] & REMOVED).all()]
        if not bare or names - {segment.id for segment in segments}:
            return None
        if not isinstance(folder, Path) and min(committed_s(segment) for segment in bare) < grace_s:
            return None
        mine = {segment.id for segment in bare}
        others = [s.records for s in segments if s.id not in mine]
        tombstones = np.concatenate([s.records for s in bare])
    except (*_UNREADABLE, FileNotFoundError):
        return None  # damaged, or being purged by another
    tombstones["segment"] = 1
    records, key = key_order(np.concatenate([*(_with(r, "segment", 0) for r in others), tombstones]))
    position, own = np.arange(len(records)), records["segment"] == 1
    first = np.full(key[-1] + 1, len(records))
    np.minimum.at(first, key[~own], position[~own])
    kept = list(records[own & (first[key] < position)])
    return None if len(kept) == len(tombstones) else (bare, kept)


def _with(records: np.ndarray, name: str, value: int) -> np.ndarray:
    out = records.copy()
    out[name] = value
    return out


def _rows_of(records: np.ndarray) -> list[tuple[Any, ...]]:
    """What tells a row from any other, wherever it was copied to."""
    return records[["hash", "tag", "generation", "written"]].tolist()


def _leave_catalogue(folder: Place) -> None:
    with contextlib.suppress(FileNotFoundError):  # segments are removed at this moment, by another compaction
        collection = Collection(folder)
        if collection.segments and (collection.catalogue is None or collection.uncatalogued):
            write_catalogue(folder, collection.merged())


def _count(folder: Place, done: Compacted, *, before: bool) -> None:
    try:
        segments = Collection(folder).segments
        kept = drop_replaced(segments)
        size = sum(segment.stored for segment in kept)
    except (*_UNREADABLE, OSError):
        return  # said by `steps`, or removed meanwhile
    if before:
        done.segments_before += len(kept)
        done.bytes_before += size
    else:
        names = {segment.id for segment in kept}
        done.segments_after += len(kept)
        done.bytes_after += size
        done.waiting += sum(storage.bytes_under(s.folder) for s in segments if s.id not in names)


def _to_copy(folder: Place, grace_s: float | None) -> int:
    try:
        return _Plan(folder, grace_s).bytes
    except (*_UNREADABLE, OSError):
        return 0


def _replaced(segment: Segment) -> set[str]:
    return set(segment.facts.get("replaces", ()))


def _provenance(inputs: list[Segment]) -> dict[str, str]:
    """What the inputs say they were made with; where they differ, all of it."""
    said: dict[str, list[str]] = {}
    for segment in inputs:
        for name, value in segment.facts.get("provenance", {}).items():
            said.setdefault(name, []).append(str(value))
    return {name: ", ".join(sorted(set(values))) for name, values in said.items()}


def _damage(folder: Place, utterance: str | None, segment: str, reason: str) -> Damage:
    feature = UTTERANCES if folder.name == UTTERANCES else f"{folder.parent.name}@{folder.name[:9]}"
    return Damage(feature, utterance, segment, reason.split(". `featstore verify STORE")[0], folder)
