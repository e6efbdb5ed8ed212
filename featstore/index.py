"""Which row of which segment answers for a key: sorted key hashes, the rule of which row wins, the catalogue."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any, overload

import numpy as np

from . import storage
from .errors import FeatstoreError, NotAStore
from .segment import RECORD, REMOVED, Segment, group, key_hashes, put_plain
from .storage import Place

CURRENT = Callable[[np.ndarray], np.ndarray]  # records -> whether each was made from its utterance's current audio
_AT_ONCE = 1 << 16                            # records
_LISTINGS = 8                                 # of a collection whose segments are removed meanwhile
_CATALOGUES = 2                               # kept: a reader may have chosen the last but one and not mapped it yet


class Segments(Sequence[Segment]):
    """Segments by number, each made when it is asked for: 100,000 names cost no 100,000 objects (0.5 s).

    `made` is shared by lists of one collection, so that a segment is opened once whatever its number.
    """

    def __init__(self, home: Place, names: Sequence[str], made: dict[str, Segment] | None = None, *,
                 mapped: bool = False) -> None:
        self.home, self.names, self.mapped = home, names, mapped
        self.made: dict[str, Segment] = {} if made is None else made

    def __len__(self) -> int:
        return len(self.names)

    @overload
    def __getitem__(self, item: int) -> Segment: ...
    @overload
    def __getitem__(self, item: slice) -> Segments: ...
    def __getitem__(self, item: int | slice) -> Segment | Segments:
        if isinstance(item, slice):
            return self.of(self.names[item])
        name = self.names[item]
        found = self.made.get(name)
        return found if found is not None else self.made.setdefault(name, Segment(self.home / name, mapped=self.mapped))

    def of(self, names: Sequence[str]) -> Segments:
        """Some of the collection's segments, in that order."""
        return Segments(self.home, names, self.made, mapped=self.mapped)


class Index:
    """The rows that answer for the keys of one collection (the utterances, or one identity of a feature).

    Built from a fixed list of committed segments: what is committed later is not seen. `hashes` is sorted; `records`
    has the same order, with `segment` the position in `segments` and `newest` the highest generation seen for the key.
    Tombstones stay in, so that a writer knows their generation; `live` leaves them out. `replaced`: the segments that
    were left out because others stand for them.
    """

    def __init__(self, segments: Sequence[Segment], hashes: np.ndarray, records: np.ndarray,
                 replaced: frozenset[str] = frozenset()) -> None:
        self.segments, self.hashes, self.records, self.replaced = segments, hashes, records, replaced

    @cached_property
    def live(self) -> np.ndarray:
        """Which records are rows, not tombstones."""
        return (self.records["flags"] & REMOVED) == 0

    @cached_property
    def _tags(self) -> np.ndarray:
        return self.records["tag"]

    @cached_property
    def _flags(self) -> np.ndarray:
        return self.records["flags"]

    @classmethod
    def build(cls, segments: Sequence[Segment], current: CURRENT | None = None, base: Index | None = None) -> Index:
        """The rows of `segments`, sorted by id, that answer: one for each key. `base`: a catalogue of some of them."""
        merged = merge(segments, base)
        again = merged.hashes[1:] == merged.hashes[:-1]
        if not again.any():
            return merged
        several = np.append(again, False) | np.append(False, again)
        chosen = _winners(merged.records[several], current)
        records = _placed(merged.hashes, merged.records, several, chosen)
        return cls(merged.segments, np.ascontiguousarray(records["hash"]), records, merged.replaced)

    def __len__(self) -> int:
        return int(self.live.sum())

    def position(self, key: str) -> int:
        """Where the key's record stands in `records`, or -1; a tombstone counts as a record."""
        first, second = key_hashes(key)
        return self._scan(int(self.hashes.searchsorted(np.uint64(first))), first, second)

    def positions(self, hashes: np.ndarray) -> np.ndarray:
        """Where each of `hashes` (n, 2) uint64 stands in `records`; -1 where there is no live row."""
        if not len(self.records):
            return np.full(len(hashes), -1)
        order = np.argsort(hashes[:, 0])  # one way through the index: four times faster for a million keys
        at = np.empty(len(hashes), np.int64)
        at[order] = np.searchsorted(self.hashes, hashes[order, 0])
        inside = np.minimum(at, len(self.records) - 1)
        found = (self.hashes[inside] == hashes[:, 0]) & (self.records["tag"][inside] == hashes[:, 1])
        out = np.where(found, inside, -1)
        for i in np.flatnonzero(~found & (at < len(self.records)) & (self.hashes[inside] == hashes[:, 0])):
            out[i] = self._scan(int(at[i]), int(hashes[i, 0]), int(hashes[i, 1]))  # another key of the same hash
        return np.where((out >= 0) & ((self.records["flags"][out] & REMOVED) == 0), out, -1)

    def find(self, key: str) -> np.void | None:
        """The live record of a key."""
        at = self.position(key)
        return self.records[at] if at >= 0 and not self._flags.item(at) & REMOVED else None

    def newest(self, key: str) -> int:
        """The highest generation seen for a key; 0 if it was never written."""
        at = self.position(key)
        return int(self.records[at]["newest"]) if at >= 0 else 0

    def key(self, record: np.void) -> str:
        return self.segments[int(record["segment"])].key(record)

    def live_keys(self) -> Iterator[str]:
        """The keys that have a live row, in the order of their hashes. FileNotFoundError if a segment is gone, at once:
        not after some of the keys."""
        segments = np.unique(self.records["segment"][self.live]).tolist()
        return self._named({number: self.segments[number].key_blob for number in segments})

    def _named(self, blobs: dict[int, bytes]) -> Iterator[str]:
        for start in range(0, len(self.records), _AT_ONCE):
            part = self.records[start:start + _AT_ONCE][self.live[start:start + _AT_ONCE]]
            columns = (part[name].tolist() for name in ("segment", "key_offset", "key_length"))
            for segment, offset, length in zip(*columns, strict=True):
                yield blobs[segment][offset:offset + length].decode()

    def _scan(self, at: int, first: int, second: int) -> int:
        while at < len(self.hashes) and self.hashes.item(at) == first:
            if self._tags.item(at) == second:
                return at
            at += 1
        return -1


def hash_keys(keys: Sequence[str]) -> np.ndarray:
    """(n, 2) uint64: what `Index.positions` searches for."""
    digests = b"".join([blake2b(key.encode(), digest_size=16).digest() for key in keys])  # as `key_hashes`, at once
    return np.frombuffer(digests, "<u8").reshape(-1, 2)


def drop_replaced(segments: Sequence[Segment]) -> list[Segment]:
    """The segments that no other one says it replaces."""
    gone = {name for segment in segments for name in segment.facts.get("replaces", ())}
    return [segment for segment in segments if segment.id not in gone]


def merge(segments: Sequence[Segment], base: Index | None = None) -> Index:
    """Every row of `segments` that may answer for its key, whatever audio its utterance has: what a catalogue holds.

    Which one does answer depends on the utterances, so it is for `Index.build` to say. Rows of a segment that another
    replaces are out, and so is the segment. `base`: a catalogue of some of the segments. Nothing of those is read, and
    it is returned as it is where it names all of them.
    """
    known, settled = (_names(base.segments), base.replaced) if base is not None else ([], frozenset[str]())
    seen = settled | set(known)
    new = [segments[number] for number, name in enumerate(_names(segments)) if name not in seen]
    if base is not None and not new:
        return base
    gone = {name for segment in new for name in segment.facts.get("replaces", ())}
    added = [segment for segment in new if segment.id not in gone]
    kept = [name for name in known if name not in gone]
    rows = [np.zeros(0, RECORD)]
    for number, segment in enumerate(added, len(kept)):
        records = segment.taken().copy()
        records["segment"], records["newest"] = number, records["generation"]
        rows.append(records)
    listed = _chosen(segments, [*kept, *(segment.id for segment in added)])
    records = np.concatenate(rows)
    if base is None or not len(base.records):
        records = _candidates(records)
    else:
        records = _joined(*_without(base, gone), records)
    return Index(listed, np.ascontiguousarray(records["hash"]), records, settled | gone)


def _names(segments: Sequence[Segment]) -> Sequence[str]:
    return segments.names if isinstance(segments, Segments) else [segment.id for segment in segments]


def _chosen(segments: Sequence[Segment], names: Sequence[str]) -> Sequence[Segment]:
    if isinstance(segments, Segments):
        return segments.of(names)
    by_id = {segment.id: segment for segment in segments}
    return [by_id[name] for name in names]


def _without(base: Index, gone: set[str]) -> tuple[np.ndarray, np.ndarray]:
    """Hashes and records of an index but for the rows of some segments, the others numbered anew."""
    stays = np.array([name not in gone for name in _names(base.segments)], bool)
    if stays.all():
        return base.hashes, base.records
    segment = base.records["segment"]
    alive = stays[segment]
    records = base.records[alive]
    records["segment"] = (np.cumsum(stays) - 1)[segment[alive]]
    return base.hashes[alive], records


def _joined(hashes: np.ndarray, records: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The candidates among sorted ones and some more rows. Only the keys that both have are weighed again."""
    more = np.unique(rows["hash"])
    bounds = np.zeros(len(hashes) + 1, np.int64)
    np.add.at(bounds, np.searchsorted(hashes, more, "left"), 1)
    np.add.at(bounds, np.searchsorted(hashes, more, "right"), -1)
    touched = np.cumsum(bounds[:-1]) > 0
    return _placed(hashes, records, touched, _candidates(np.concatenate([records[touched], rows])))


def _placed(hashes: np.ndarray, records: np.ndarray, out: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The sorted records but for those of the mask `out`, with sorted `rows` in their places."""
    place = np.searchsorted(hashes[~out], rows["hash"]) + np.arange(len(rows))
    found = np.empty(len(records) - int(out.sum()) + len(rows), RECORD)
    old = np.ones(len(found), bool)
    old[place], found[place] = False, rows
    where, done = np.flatnonzero(old), 0
    for start in range(0, len(records), _AT_ONCE):  # at once, it would take the memory twice
        part = records[start:start + _AT_ONCE][~out[start:start + _AT_ONCE]]
        found[where[done:done + len(part)]] = part
        done += len(part)
    return found


def key_order(records: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The records by hash, key, generation, time and segment, and a number for each one's key, counted from 0."""
    order = ("segment", "written", "generation", "tag", "hash")
    records = records[np.lexsort([records[name] for name in order])]
    same = (records["hash"][1:] == records["hash"][:-1]) & (records["tag"][1:] == records["tag"][:-1])
    return records, np.cumsum(np.append(0, ~same))[:len(records)]


def _candidates(records: np.ndarray) -> np.ndarray:
    """For each key the latest row of each audio and the latest tombstone, without what that tombstone covers.

    Latest: of the highest generation; among equal ones the one whose segment was begun last.
    """
    records, key = key_order(records)
    if not len(records) or key[-1] == len(records) - 1:
        return records
    newest = np.zeros(key[-1] + 1, np.uint64)
    np.maximum.at(newest, key, records["newest"])
    records["newest"] = newest[key]
    removed, position = (records["flags"] & REMOVED) != 0, np.arange(len(records))
    tombstone = np.full(key[-1] + 1, -1)
    np.maximum.at(tombstone, key[removed], position[removed])
    alive = position >= tombstone[key]
    records, key, removed = records[alive], key[alive], removed[alive]
    kinds = np.column_stack([key.astype(np.uint64), removed, records["source"]])
    order = np.lexsort(kinds.T[::-1])  # stable: the latest of a kind comes last
    last = np.append((kinds[order[1:]] != kinds[order[:-1]]).any(axis=1), True)
    return records[np.sort(order[last])]


def _winners(records: np.ndarray, current: CURRENT | None) -> np.ndarray:
    """One of the candidates for each key: one made from its utterance's current audio, else the latest."""
    records, key = key_order(records)
    several = np.bincount(key)[key] > 1
    matching = np.zeros(len(records), bool)
    if current is not None and several.any():
        matching[several] = current(records[several])
    matching &= (records["flags"] & REMOVED) == 0
    best = np.full(key[-1] + 1, -1)
    np.maximum.at(best, key, np.arange(len(records)) + np.where(matching, len(records), 0))
    return records[best % len(records)]


@dataclass(frozen=True)
class Catalogue:
    """What the document of a catalogue says: the segments it merges, and those that these replace."""

    home: Place
    rows: int
    segments: list[str]
    replaced: frozenset[str]

    def serves(self, names: set[str], replaced: set[str] | frozenset[str] = frozenset()) -> bool:
        """Whether each of its segments is among `names`, or among those that others `replaced` since."""
        return names.union(replaced).issuperset(self.segments)

    def load(self, segments: Sequence[Segment]) -> Index | None:
        """What `merge` gave, mapped; None if it was removed since its document was read."""
        try:
            hashes = _mapped(self.home / "hashes" / "c" / "0", np.dtype("<u8"), self.rows)
            records = _mapped(self.home / "records" / "c" / "0" / "0", RECORD, self.rows)
        except (OSError, ValueError):
            return None
        return Index(segments, hashes, records, self.replaced)


def write_catalogue(folder: Place, index: Index) -> None:
    """Put what `merge` gave beside its segments: derived, immutable, may be deleted at any time."""
    home = folder / "catalogue" / storage.new_id()
    storage.make_folders(folder, home)
    storage.create_document(home.parent / "zarr.json", group({}))
    rows = len(index.records)
    staged = storage.staging(home)
    put_plain(staged / "hashes", index.hashes, ["row"])
    put_plain(staged / "records", index.records.view(np.uint8).reshape(rows, RECORD.itemsize), ["row", "byte"])
    storage.sync_tree(home)
    storage.upload(staged, home)
    facts: dict[str, Any] = {"segments": list(_names(index.segments)), "rows": rows}
    if index.replaced:
        facts["replaced"] = sorted(index.replaced)
    storage.commit_document(home / "zarr.json", group(facts))
    storage.unstage(staged, home)


def drop_catalogues(folder: Place) -> None:
    """Remove all but the newest few. Who has mapped one keeps its bytes; who has not reads the segments instead."""
    for catalogue in list(catalogues(folder))[_CATALOGUES:]:
        with contextlib.suppress(OSError):  # removed by somebody else, or held by a reader where that forbids it
            (catalogue.home / "zarr.json").unlink()
            storage.remove_tree(catalogue.home)


def catalogue_homes(folder: Place) -> list[Place]:
    """The folders of a collection's catalogues, newest first, whole or not."""
    return [folder / "catalogue" / name for name in reversed(storage.names(folder / "catalogue")) if "-" in name]


def catalogues(folder: Place) -> Iterator[Catalogue]:
    """The catalogues of a collection that are whole, newest first. The segments themselves are the truth."""
    for home in catalogue_homes(folder):
        try:
            facts = storage.read_document(home / "zarr.json")["attributes"]["featstore"]
            rows, replaced = int(facts["rows"]), frozenset(facts.get("replaced", ()))
            if _sizes(home) in (None, [8 * rows, RECORD.itemsize * rows]):
                yield Catalogue(home, rows, list(facts["segments"]), replaced)
        except (OSError, ValueError, KeyError, TypeError, NotAStore):
            continue  # half-written or half-removed


def _sizes(home: Place) -> list[int] | None:
    """Of hashes and records; None for objects, which are there as a whole or not at all."""
    if not isinstance(home, Path):
        return None
    return [(home / leaf).stat().st_size for leaf in ("hashes/c/0", "records/c/0/0")]


def read_catalogue(folder: Place, segments: Sequence[Segment]) -> Index | None:
    """What `merge` gave, mapped: the newest catalogue all of whose segments are there; None where none serves."""
    names = set(_names(segments))
    for catalogue in catalogues(folder):
        if catalogue.serves(names):
            return catalogue.load(_chosen(segments, catalogue.segments))
    return None


def _mapped(path: Place, dtype: np.dtype, rows: int) -> np.ndarray:
    """The rows of a file, mapped; of an object, read as a whole."""
    if isinstance(path, Path):
        return np.memmap(path, dtype, "r", shape=(rows,)).view(np.ndarray)  # a memmap costs microseconds at every look
    return np.frombuffer(path.read_bytes(), dtype, rows)


class Collection:
    """The segments of one kind of row: the utterances, or one identity of a feature.

    `catalogue`: the newest that serves, or None. The segments it merges were committed before it; whether the others
    were, `uncatalogued` and those that are replaced, is looked up one by one.
    """

    def __init__(self, folder: Place, *, mapped: bool = False) -> None:
        self.folder, self.mapped = folder, mapped
        listed = [name for name in storage.names(folder / "segments") if _SEGMENT.fullmatch(name)]
        there = set(listed)
        self._all = Segments(folder / "segments", listed, mapped=mapped)
        self.catalogue = next((found for found in catalogues(folder) if self._serves(found, there)), None)
        merged = set(self.catalogue.segments) if self.catalogue is not None else set()
        replaced = self.catalogue.replaced if self.catalogue is not None else frozenset()
        committed = self._committed(there - merged)
        self.uncatalogued = self._all.of(sorted(committed - replaced))
        self.segments = self._all.of([name for name in listed if name in merged or name in committed])

    def indexed(self, current: CURRENT | None = None) -> tuple[Collection, Index]:
        """This collection and its `index`; where a segment is gone, one that was listed anew, as often as it takes."""
        found = self
        for _ in range(_LISTINGS):
            try:
                return found, found.index(current)
            except FileNotFoundError:
                found = found.again()
        return found, found.index(current)

    def again(self) -> Collection:
        """As it is now."""
        return Collection(self.folder, mapped=self.mapped)

    def index(self, current: CURRENT | None = None) -> Index:
        """The rows that answer, as of when this collection was listed; FileNotFoundError if a segment is gone since."""
        base = self._base()
        if not isinstance(self.folder, Path):
            new = self.uncatalogued if base is not None else self.segments
            storage.concurrently(self.folder, lambda segment: segment.records, drop_replaced(new))
        return Index.build(self.segments, current, base)

    def merged(self) -> Index:
        """All rows that may answer: what a catalogue of it holds."""
        return merge(self.segments, self._base())

    def _base(self) -> Index | None:
        found = self.catalogue
        return found.load(self._all.of(found.segments)) if found is not None else None

    def _serves(self, catalogue: Catalogue, there: set[str]) -> bool:
        """Whether what a catalogue merges is there, or replaced by what has come since."""
        missing = set(catalogue.segments) - there
        if not missing:
            return True
        newer = self._committed(there.difference(catalogue.segments, catalogue.replaced))
        try:
            return missing <= {name for segment in self._all.of(sorted(newer)) for name in segment.facts["replaces"]}
        except (FeatstoreError, OSError, KeyError, TypeError):
            return False  # a document that is damaged

    def _committed(self, names: set[str]) -> set[str]:
        if isinstance(self.folder, Path):
            home = str(self.folder / "segments")
            return {name for name in names if os.path.exists(f"{home}/{name}/zarr.json")}  # noqa: PTH110 (faster)
        listed = list(self._all.of(sorted(names)))
        there = storage.concurrently(self.folder, lambda segment: segment.committed, listed)
        return {segment.id for segment, committed in zip(listed, there, strict=True) if committed}


_SEGMENT = re.compile(r"[0-9a-f]{16}-[0-9a-f]{12}")
