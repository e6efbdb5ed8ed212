"""Which row of which segment answers for a key: sorted key hashes, the rule of which row wins, the catalogue."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from . import storage
from .errors import NotAStore
from .segment import RECORD, REMOVED, Segment, group, key_hashes, put_plain
from .storage import Place

CURRENT = Callable[[np.ndarray], np.ndarray]  # records -> whether each was made from its utterance's current audio


class Index:
    """The rows that answer for the keys of one collection (the utterances, or one identity of a feature).

    Built from a fixed list of committed segments: what is committed later is not seen. `hashes` is sorted; `records`
    has the same order, with `segment` the position in `segments` and `newest` the highest generation seen for the key.
    Tombstones stay in, so that a writer knows their generation; `live` leaves them out.
    """

    def __init__(self, segments: Sequence[Segment], hashes: np.ndarray, records: np.ndarray) -> None:
        self.segments, self.hashes, self.records = segments, hashes, records

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
        merged = base if base is not None and len(base.segments) == len(segments) else merge(segments, base)
        if not (merged.hashes[1:] == merged.hashes[:-1]).any():
            return merged
        records = _winners(merged.records, current)
        return cls(merged.segments, np.ascontiguousarray(records["hash"]), records)

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
        at = np.searchsorted(self.hashes, hashes[:, 0])
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
        live = self.records[self.live]
        for number in np.unique(live["segment"]).tolist():
            self.segments[number].key_blob  # noqa: B018  (read now)
        return (self.key(record) for record in live)

    def _scan(self, at: int, first: int, second: int) -> int:
        while at < len(self.hashes) and self.hashes.item(at) == first:
            if self._tags.item(at) == second:
                return at
            at += 1
        return -1


def hash_keys(keys: Sequence[str]) -> np.ndarray:
    """(n, 2) uint64: what `Index.positions` searches for."""
    return np.array([key_hashes(key) for key in keys], np.uint64).reshape(-1, 2)


def drop_replaced(segments: Sequence[Segment]) -> list[Segment]:
    """The segments that no other one says it replaces."""
    gone = {name for segment in segments for name in segment.facts.get("replaces", ())}
    return [segment for segment in segments if segment.id not in gone]


def merge(segments: Sequence[Segment], base: Index | None = None) -> Index:
    """Every row of `segments` that may answer for its key, whatever audio its utterance has: what a catalogue holds.

    Which one does answer depends on the utterances, so it is for `Index.build` to say. Rows of a segment that another
    replaces are out. `base`: a catalogue of some of the segments.
    """
    place = {segment.id: number for number, segment in enumerate(segments)}
    kept = {segment.id for segment in drop_replaced(segments)}
    parts, seen = [np.zeros(0, RECORD)], set()
    if base is not None:
        seen = {segment.id for segment in base.segments}
        number = np.array([place[s.id] if s.id in kept else -1 for s in base.segments] or [-1])[base.records["segment"]]
        known = base.records[number >= 0]
        known["segment"] = number[number >= 0]
        parts.append(known)
    for segment in segments:
        if segment.id in kept and segment.id not in seen:
            rows = segment.records.copy()
            rows["segment"], rows["newest"] = place[segment.id], rows["generation"]
            parts.append(rows)
    records = _candidates(np.concatenate(parts))
    return Index(segments, np.ascontiguousarray(records["hash"]), records)


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


def write_catalogue(folder: Place, index: Index) -> None:
    """Put what `merge` gave beside its segments: derived, immutable, may be deleted at any time."""
    home = folder / "catalogue" / storage.new_id()
    storage.make_folders(folder, home)
    rows = len(index.records)
    staged = storage.staging(home)
    put_plain(staged / "hashes", index.hashes, ["row"])
    put_plain(staged / "records", index.records.view(np.uint8).reshape(rows, RECORD.itemsize), ["row", "byte"])
    storage.sync_tree(home)
    storage.upload(staged, home)
    storage.commit_document(home / "zarr.json", group({"segments": [s.id for s in index.segments], "rows": rows}))
    storage.unstage(staged, home)


def read_catalogue(folder: Place, segments: Sequence[Segment]) -> Index | None:
    """What `merge` gave, mapped: the newest catalogue all of whose segments are there; None where none serves."""
    by_id = {segment.id: segment for segment in segments}
    home = folder / "catalogue"
    for name in reversed(storage.names(home)):
        try:
            facts: dict[str, Any] = storage.read_document(home / name / "zarr.json")["attributes"]["featstore"]
            if not all(segment in by_id for segment in facts["segments"]):
                continue
            hashes = _mapped(home / name / "hashes" / "c" / "0", np.dtype("<u8"), facts["rows"])
            records = _mapped(home / name / "records" / "c" / "0" / "0", RECORD, facts["rows"])
        except (OSError, ValueError, KeyError, NotAStore, json.JSONDecodeError):
            continue  # half-written or half-removed: the segments themselves are the truth
        return Index([by_id[segment] for segment in facts["segments"]], hashes, records)
    return None


def _mapped(path: Place, dtype: np.dtype, rows: int) -> np.ndarray:
    """The rows of a file, mapped; of an object, read as a whole."""
    if isinstance(path, Path):
        return np.memmap(path, dtype, "r", shape=(rows,)).view(np.ndarray)  # a memmap costs microseconds at every look
    return np.frombuffer(path.read_bytes(), dtype, rows)
