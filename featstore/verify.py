"""Verify: every byte of a store held against its checksums, whatever is missing, cut off or changed named."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from . import cache, storage
from .errors import (
    CorruptSegment,
    FeatstoreError,
)
from .index import Index, catalogue_homes, merge
from .int8 import Quantiser, is_int8
from .segment import Segment
from .spec import Spec
from .storage import Place
from .store import Collection, Store, feature_names

UTTERANCES = "utterances"
_GONE = "removed by another process while it was looked at"


@dataclass(frozen=True)
class Damage:
    """Something that cannot be read as it was written.

    feature: NAME@IDENTITY (nine digits), or "utterances".
    utterance: whose row it is; None where the whole segment, a document or a catalogue is at fault.
    segment: the id of the segment, or the path of the document within the store.
    """

    feature: str
    utterance: str | None
    segment: str
    reason: str
    folder: Place = field(default=Path(), repr=False, compare=False)   # of the collection
    part: str = field(default="row", repr=False, compare=False)       # row, segment, document, spec, group, catalogue


@dataclass
class Inspection:
    """What `verify` found. rows, bytes: what was read and compared with its checksum.

    uncommitted: segment folders without a document: of writers that are at work, or were killed.
    replaced: segments that others stand for. Both are removed by `purge` once they are old enough.
    """

    damages: list[Damage] = field(default_factory=list)
    rows: int = 0
    bytes: int = 0
    uncommitted: int = 0
    uncommitted_bytes: int = 0
    replaced: int = 0
    replaced_bytes: int = 0


@cache.bypassed()
def verify(store: Store, *, progress: Callable[[int, int], None] | None = None) -> Inspection:
    """Compare every row that answers, of the utterances and of every identity kept, with its checksum.

    Goes on past whatever it finds. progress: called with the bytes done and the bytes in total.
    """
    found = Inspection()
    total = sum(part.live_bytes for part in _examine(store)) if progress is not None else 0
    for part in _examine(store):
        _count_folders(part, found)
        for record in part.live:
            reason = trouble(part.segment_of(record), compare, record)
            if reason == _GONE:
                continue
            if reason is not None:
                part.damages.append(part.damage(part.name(record), part.segment_of(record).id, reason))
            found.rows += 1
            found.bytes += part.bytes_of(record)
            if progress is not None:
                progress(found.bytes, total)
        found.damages += part.damages
    return found


def _examine(store: Store) -> Iterator[Examined]:
    """The collections of a store, one after the other: the indexes of all at once may not fit in memory."""
    utterances = Examined(store.path, store.path / UTTERANCES, None)
    yield utterances
    for folder in identities(store):
        yield Examined(store.path, folder, utterances)


class Examined:
    """One collection as far as it can be read; `damages` holds what cannot, but for the rows themselves."""

    def __init__(self, root: Place, folder: Place, utterances: Examined | None) -> None:
        self.root, self.folder, self._utterances = root, folder, utterances
        self.feature = UTTERANCES if utterances is None else f"{folder.parent.name}@{folder.name[:9]}"
        self.damages: list[Damage] = []
        self._named: dict[str, bool] = {}  # segment -> whether its keys can be read
        self._check_documents()
        self.segments = [s for s in Collection(folder).segments if self._reads(s, check_facts, "document")]
        named = {name for segment in self.segments for name in segment.facts.get("replaces", ())}
        self.replaced = {segment.id for segment in self.segments if segment.id in named}
        kept = [s for s in self.segments if s.id not in self.replaced]
        self.whole = [s for s in kept if self._reads(s, read_index, "segment")]
        for segment in self.whole:
            self._reads(segment, _check_arrays, "segment")
        self._check_catalogues(named)
        self.index = Index.build(self.whole, self._made_from_current_audio if utterances is not None else None)

    @property
    def live(self) -> np.ndarray:
        """The records of the rows that answer, in the order in which they lie on disk."""
        records = self.index.records[self.index.live]
        return records[np.lexsort((records["offset"], records["segment"]))]

    @property
    def live_bytes(self) -> int:
        return sum(self.bytes_of(record) for record in self.live)

    def segment_of(self, record: np.void) -> Segment:
        return self.whole[int(record["segment"])]

    def bytes_of(self, record: np.void) -> int:
        facts = self.segment_of(record).facts
        return int(record["length"]) * (facts["bytes"] // max(1, facts["frames"]))

    def damage(self, utterance: str | None, segment: str, reason: str, part: str = "row") -> Damage:
        return Damage(self.feature, utterance, segment, reason, self.folder, part)

    def name(self, record: np.void) -> str | None:
        """The utterance of a record of `index`; where its segment's keys are damaged, from elsewhere."""
        return self.name_in(self.segment_of(record), record)

    def name_in(self, segment: Segment, record: np.void) -> str | None:
        if segment.id not in self._named:
            self._named[segment.id] = trouble(segment, _read_keys) is None
        if self._named[segment.id]:
            return segment.key(record)
        if self._utterances is not None:
            return self._utterances.names.get((int(record["hash"]), int(record["tag"])))
        try:
            return json.loads(b"".join(block.tobytes() for block in segment.blocks(record)))["key"]
        except (FeatstoreError, OSError, ValueError, KeyError, TypeError):
            return None  # the row is damaged as well: nothing else in the store tells its name

    @cached_property
    def names(self) -> dict[tuple[int, int], str]:
        """The utterances by their keys' hashes."""
        named = ((record, self.name(record)) for record in self.live)
        return {(int(record["hash"]), int(record["tag"])): name for record, name in named if name is not None}

    def _reads(self, segment: Segment, look: Callable[[Segment], Any], part: str) -> bool:
        """Whether `look` succeeds; what it raises is noted as damage of the segment."""
        reason = trouble(segment, look)
        if reason not in (None, _GONE):
            self.damages.append(self.damage(None, segment.id, str(reason), part))
        return reason is None

    def _check_documents(self) -> None:
        groups = [self.folder / "segments"]
        groups += [self.folder] if self._utterances is None else [self.folder.parent]
        for folder in groups:
            self._check_document(folder / "zarr.json", "group", storage.read_document)
        if self._utterances is not None:
            self._check_document(self.folder / "zarr.json", "spec", read_spec)
            self._check_document(self.folder / "zarr.json", "scale", _check_scale)

    def _check_document(self, path: Any, part: str, look: Callable[[Any], Any]) -> None:
        try:
            look(path)
        except (FeatstoreError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            self.damages.append(self.damage(None, path.relative_to(self.root).as_posix(), _said(error), part))

    def _check_catalogues(self, replaced: set[str]) -> None:
        """A catalogue must say what its segments say, and none of them may have gone without another in its place."""
        there = {segment.id: segment for segment in self.segments}
        bad = {damage.segment for damage in self.damages}
        for home, facts in catalogues(self.folder):
            missing = [name for name in facts["segments"] if name not in there]
            lost = [name for name in missing if name not in replaced and name not in bad]
            if lost:
                self.damages.append(self.damage(None, lost[0], f"{len(lost)} segments that {home} lists are gone, the "
                                                "first is named here; what they held is missing", "catalogue"))
            elif not missing:
                self._compare_catalogue(home, facts, [there[name] for name in facts["segments"]])
                return  # the newest that is of use: no older one is read

    def _compare_catalogue(self, home: Place, facts: dict[str, Any], segments: list[Segment]) -> None:
        if any(trouble(segment, read_index) is not None for segment in segments):
            return  # the segment itself is at fault
        truth = merge(segments)
        for name, leaf, wanted in (("hashes", "c/0", truth.hashes), ("records", "c/0/0", truth.records)):
            path: Any = home / name / leaf
            found = path.read_bytes() if path.exists() else b""
            if found != wanted.tobytes():
                self.damages.append(self.damage(None, path.relative_to(self.root).as_posix(),
                                                "the catalogue does not say what its segments say", "catalogue"))
                return

    def _made_from_current_audio(self, records: np.ndarray) -> np.ndarray:
        index = self._utterances.index if self._utterances is not None else self.index
        if not len(index.records):
            return np.zeros(len(records), bool)
        at = index.positions(np.stack([records["hash"], records["tag"]], axis=1))
        return (at >= 0) & (index.records["source"][at] == records["source"]).all(axis=1)


def read_spec(path: Place) -> Spec:
    """The spec in an identity's document. CorruptSegment if it is not that of the folder."""
    spec = Spec.from_json(storage.read_document(path)["attributes"]["featstore"]["spec"])
    if spec.identity[:16] != path.parent.name:
        raise CorruptSegment(f"{path} has the spec of {spec.identity[:16]}, expected that of {path.parent.name}")
    return spec


def _check_scale(path: Path) -> None:
    """The arrays by which an int8 feature gives values; a spec that cannot be read is damage of its own."""
    try:
        spec = read_spec(path)
    except (FeatstoreError, OSError, ValueError, KeyError, TypeError, AttributeError):
        return
    if is_int8(spec):
        Quantiser.load(path.parent, spec)


def trouble(segment: Segment, look: Callable[..., Any], *args: Any) -> str | None:
    """What is wrong with what `look` reads of a segment, _GONE, or None."""
    try:
        look(segment, *args)
    except Exception as error:  # whatever damaged bytes make a reader raise is the finding
        return _said(error) if (segment.folder / "zarr.json").exists() else _GONE
    return None


def _said(error: Exception) -> str:
    said = str(error).split(". `featstore verify STORE`")[0]  # which is what runs
    return said if isinstance(error, FeatstoreError) else f"{type(error).__name__}: {said}"


def check_facts(segment: Segment) -> None:
    facts = segment.facts
    for name in ("rows", "frames", "bytes", "index_crc32c", "keys_crc32c"):
        if not isinstance(facts[name], int):
            raise CorruptSegment(f"{segment.folder}/zarr.json: {name} is {facts[name]!r}, expected a number")


def read_index(segment: Segment) -> np.ndarray:
    return segment.records


def _read_keys(segment: Segment) -> bytes:
    return segment.key_blob


def _check_arrays(segment: Segment) -> None:
    """The keys, and the documents that other readers of Zarr need."""
    _read_keys(segment)
    for name in ("index", "keys"):
        storage.read_document(segment.folder / name / "zarr.json")


def compare(segment: Segment, record: np.void) -> None:
    if segment.checksum(record) != int(record["checksum"]):
        raise CorruptSegment("its bytes do not match their checksum: they changed after they were written")


def _count_folders(part: Examined, found: Inspection) -> None:
    for home in uncommitted(part.folder):
        found.uncommitted += 1
        found.uncommitted_bytes += storage.bytes_under(home)
    for name in part.replaced:
        found.replaced += 1
        found.replaced_bytes += storage.bytes_under(part.folder / "segments" / name)


def uncommitted(folder: Place) -> list[Place]:
    home = folder / "segments"
    homes: list[Any] = [home / name for name in storage.names(home) if "-" in name]
    there = storage.concurrently(folder, lambda path: (path / "zarr.json").is_file() or not path.is_dir(), homes)
    return [path for path, committed in zip(homes, there, strict=True) if not committed]


def catalogues(folder: Place) -> Iterator[tuple[Place, dict[str, Any]]]:
    """The catalogues whose document can be read, newest first."""
    for home in catalogue_homes(folder):
        with contextlib.suppress(FeatstoreError, OSError, KeyError, TypeError):
            facts = storage.read_document(home / "zarr.json")["attributes"]["featstore"]
            if isinstance(facts["segments"], list):
                yield home, facts


def identities(store: Store) -> list[Place]:
    """The folders of all identities that are kept."""
    return [store.path / "features" / name / identity
            for name in feature_names(store.path) for identity in store.identities(name)]
