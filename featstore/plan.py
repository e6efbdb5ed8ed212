"""What is to be done: which features of which utterances are missing or stale, and what that takes."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fractions import Fraction
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from . import audio, storage
from .corpus import Corpus, Utterance
from .errors import BadAudio, BadRequest, IdentityMismatch
from .index import Index, hash_keys
from .spec import NAME, Extractor, Spec
from .store import Feature, Store, mismatch
from .work import SETTLED_S, Task

PROBED = 5_000      # headers read to estimate hours; beyond, the rest is extrapolated from file sizes
LONG_S = 60.0
UTTERANCE_BYTES = 700  # metadata and index of one utterance, about


@dataclass(frozen=True)
class Failure:
    """What could not be done: of a feature, or (feature None) of the recording as a whole, and why.

    speaker: whose recording it is, so that what is remembered of it can be forgotten with the speaker.
    """

    utterance: str
    feature: str | None
    path: str
    reason: str
    speaker: str | None = None


@dataclass
class FeaturePlan:
    """How much of one feature is up to date. `moves`: the name goes to a new identity once all is done."""

    name: str
    spec: Spec
    fresh: int = 0
    stale: int = 0
    missing: int = 0
    failed: int = 0
    bytes: int = 0
    moves: bool = False
    differs: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    imported: bool = False

    @property
    def todo(self) -> int:
        return self.stale + self.missing + self.failed


@dataclass
class Plan:
    """The (utterance, feature) pairs that are missing or stale, and what they will take."""

    corpus: Corpus
    features: dict[str, FeaturePlan]
    todo: np.ndarray            # (utterances, features) bool
    renewed: dict[int, tuple[bytes, int]]  # records to renew though the audio is as it was: position -> source, stamp
    orphans: tuple[str, ...]    # in the store, not in the corpus
    seconds: np.ndarray         # of each utterance with something to do, by header or manifest; 0 for the others
    bytes_needed: int
    bytes_free: int | None      # None: there is no telling, as of object stores
    hashes: np.ndarray          # (utterances, 2) uint64 of the keys
    sources: np.ndarray         # (utterances, 4) uint64: digests of their audio now, where `known`
    known: np.ndarray           # bool
    stored: np.ndarray          # bool: the store had the utterance, of whatever audio
    seen: dict[str, frozenset[str]]  # of each feature: the segments there were

    @property
    def utterances(self) -> int:
        return len(self.corpus)

    @property
    def hours(self) -> float:
        """Duration of the utterances with something to do."""
        return float(self.seconds.sum()) / 3600

    def order(self) -> np.ndarray:
        """Positions of what is to be done: long recordings first, so that none is waited for at the end."""
        some = np.flatnonzero(self.todo.any(axis=1))
        long = self.seconds[some] > LONG_S
        return np.concatenate([some[long][np.argsort(-self.seconds[some[long]], kind="stable")], some[~long]])

    def task(self, position: int, names: tuple[str, ...]) -> Task:
        """Some features of one utterance."""
        utterance = self.corpus.utterances[position]
        return Task(utterance.key, place(self.corpus, utterance), utterance.start_s, utterance.end_s, names,
                    float(self.seconds[position]))

    def done_by(self, records: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Which of `records`, committed since and of the utterances at `positions`, are made from the audio of now."""
        same = self.known[positions] & (records["source"] == self.sources[positions]).all(axis=1)
        return same | ~(self.known | self.stored)[positions]


def plan(corpus: Corpus, store: Store | None, extractors: Mapping[str, Extractor | Spec], *, replace: bool = False,
         rehash: bool = False, failures: Sequence[Failure] = (), refuse: bool = True) -> Plan:
    """What `extract` would do. Reads sizes and times of all audio files, and the bytes of those that changed.

    extractors: what each name should be made of; a Spec will do where nothing is to be extracted.

    rehash: do not trust sizes and times, hash every file.
    failures: remembered ones, told apart from what is merely missing.
    refuse: IdentityMismatch where a name stands for other settings and `replace` is not given; else all are stale.
    """
    features = {name: _feature_plan(name, extractor) for name, extractor in extractors.items()}
    held = {name: _held(store, item, replace, refuse) for name, item in features.items()}
    hashes = hash_keys([utterance.key for utterance in corpus.utterances])
    sources, known, stored, renewed = _sources(corpus, store, hashes, rehash)
    todo = np.zeros((len(corpus), len(features)), bool)
    failed = {(failure.utterance, failure.feature) for failure in failures}
    for column, (name, item) in enumerate(features.items()):
        todo[:, column] = _count(item, held[name], hashes, sources, known)
        _set_failed(item, corpus, todo[:, column], failed)
    some = np.flatnonzero(todo.any(axis=1)).tolist()
    seconds = _durations(corpus, store, some, hashes)
    for column, item in enumerate(features.values()):
        item.bytes = int(_bytes_of(item.spec, seconds[todo[:, column]]))
    needed = sum(item.bytes for item in features.values()) + len(some) * UTTERANCE_BYTES
    free = storage.free_bytes(store.path) if store is not None else None
    seen = {name: frozenset(segment.id for segment in feature.segments) if feature is not None else frozenset()
            for name, feature in held.items()}
    return Plan(corpus, features, todo, renewed, _orphans(store, hashes), seconds, needed, free, hashes, sources, known,
                stored, seen)


def place(corpus: Corpus, utterance: Utterance) -> str:
    """Where an utterance's recording lies: text, since a Path for each of a million takes longer than looking at it."""
    return os.path.join(corpus.root, utterance.audio)  # noqa: PTH118


def stamp(utterance: Utterance, path: str, size: int, mtime_ns: int) -> int:
    """64 bits that change when the file's place, size or time or the utterance's own fields do; never 0."""
    extra = json.dumps(utterance.extra, sort_keys=True) if utterance.extra else ""
    text = (f"{path}\0{size}\0{mtime_ns}\0{utterance.start_s}\0{utterance.end_s}\0{utterance.speaker}\0"
            f"{utterance.text}\0{utterance.language}\0{utterance.kind}\0{extra}")
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "little") or 1


def source_now(corpus: Corpus, key: str) -> bytes:
    """The digest of an utterance's audio as it is on disk now. BadAudio if it cannot be read."""
    utterance = corpus[key]
    return audio.source_digest(audio.file_digest(place(corpus, utterance)), utterance.start_s, utterance.end_s)


def _feature_plan(name: str, extractor: Extractor | Spec) -> FeaturePlan:
    if not NAME.fullmatch(name):
        raise BadRequest(f"feature name {name!r}: expected a-z or 0-9, then up to 63 of a-z, 0-9 and -")
    return FeaturePlan(name, extractor if isinstance(extractor, Spec) else Spec.of(extractor))


def _held(store: Store | None, item: FeaturePlan, replace: bool, refuse: bool) -> Feature | None:
    """The stored identity to compare with: the one asked for, or (not refused) the one that stands under the name."""
    if store is None:
        return None
    asked = item.spec.identity[:16]
    served = store.features.get(item.name)
    item.imported = served is not None and served.imported
    if served is None or served.short == asked or not served.segments:
        return served if served is not None and served.short == asked else _kept(store, item.name, asked)
    item.differs = served.spec.differs(item.spec)
    if not replace and refuse:
        raise IdentityMismatch(mismatch(store.path, served, item.spec))
    item.moves = replace
    return _kept(store, item.name, asked) if replace else served


def _kept(store: Store, name: str, identity: str) -> Feature | None:
    return Feature(store, name, identity) if identity in store.identities(name) else None


def _count(item: FeaturePlan, held: Feature | None, hashes: np.ndarray, sources: np.ndarray,
           known: np.ndarray) -> np.ndarray:
    """Which utterances need the feature; fresh, stale and missing are counted."""
    if held is None:
        item.missing = len(hashes)
        return np.ones(len(hashes), bool)
    at = held.index.positions(hashes)
    there = at >= 0
    fresh = there & known
    if len(held.index.records):
        fresh &= (held.index.records["source"][at] == sources).all(axis=1)
    if item.differs and not item.moves:
        fresh[:] = False
    item.fresh, item.missing = int(fresh.sum()), int((~there).sum())
    item.stale = len(hashes) - item.fresh - item.missing
    return ~fresh


def _set_failed(item: FeaturePlan, corpus: Corpus, todo: np.ndarray, failed: set[tuple[str, str | None]]) -> None:
    if failed:
        keys = [corpus.utterances[i].key for i in np.flatnonzero(todo)]
        item.failed = sum((key, item.name) in failed or (key, None) in failed for key in keys)
        taken = min(item.failed, item.missing)
        item.missing -= taken
        item.stale -= item.failed - taken


def _sources(corpus: Corpus, store: Store | None, hashes: np.ndarray,
             rehash: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[int, tuple[bytes, int]]]:
    """Digest of each utterance's audio `(n, 4)` uint64, whether it is known, whether the store has the utterance, and
    the records to be renewed.

    New utterances are hashed when they are decoded; of known ones only those whose size, time or fields changed.
    """
    count = len(corpus)
    sources, known, stored = np.zeros((count, 4), np.uint64), np.zeros(count, bool), np.zeros(count, bool)
    renewed: dict[int, tuple[bytes, int]] = {}
    if store is None:
        return sources, known, stored, renewed
    index = store.utterances.index
    at = index.positions(hashes)
    stored = at >= 0
    there = np.flatnonzero(stored)
    if not len(there):
        return sources, known, stored, renewed
    now = np.array([_stamp_now(corpus, corpus.utterances[i]) for i in there], np.uint64)
    same = (index.records["stamp"][at[there]] == now) & (now != 0)
    if rehash:
        same[:] = False
    sources[there[same]], known[there[same]] = index.records["source"][at[there[same]]], True
    changed: list[int] = there[~same & (now != 0)].tolist()  # where a file is gone, decoding will say so
    marks = [_mark(corpus, corpus.utterances[i]) for i in changed]  # before hashing: what changes later has another
    for i, mark, digest in zip(changed, marks, _hash_all(corpus, changed), strict=True):
        if digest is not None:
            sources[i], known[i] = np.frombuffer(digest, "<u8"), True
            record = index.records[at[i]]
            if digest == record["source"].tobytes() and (mark == 0 or mark != int(record["stamp"])):
                renewed[i] = digest, mark
    return sources, known, stored, renewed


def _mark(corpus: Corpus, utterance: Utterance) -> int:
    """The stamp to keep; 0 for a file so young that its time could stay the same through another change."""
    with contextlib.suppress(OSError):  # gone meanwhile: there is nothing to hash either
        found = Path(place(corpus, utterance)).stat()
        if time.time() - found.st_mtime > SETTLED_S:
            return stamp(utterance, place(corpus, utterance), found.st_size, found.st_mtime_ns)
    return 0


def _stamp_now(corpus: Corpus, utterance: Utterance) -> int:
    """The stamp of an utterance as its file is now; 0 if there is none."""
    path = place(corpus, utterance)
    try:
        found = os.stat(path)  # noqa: PTH116
    except OSError:
        return 0
    return stamp(utterance, path, found.st_size, found.st_mtime_ns)


def _hash_all(corpus: Corpus, positions: list[int]) -> list[bytes | None]:
    """Source digests in threads (hashing lets go of the interpreter); files of several cuts are read once."""
    paths = sorted({place(corpus, corpus.utterances[i]) for i in positions})

    def digest(path: str) -> bytes | None:
        try:
            return audio.file_digest(path)
        except BadAudio:
            return None

    with ThreadPoolExecutor(4) as pool:
        digests = dict(zip(paths, pool.map(digest, paths), strict=True))
    found = []
    for i in positions:
        utterance = corpus.utterances[i]
        whole = digests[place(corpus, utterance)]
        found.append(None if whole is None else audio.source_digest(whole, utterance.start_s, utterance.end_s))
    return found


def _durations(corpus: Corpus, store: Store | None, todo: list[int], hashes: np.ndarray) -> np.ndarray:
    """Seconds of each utterance with something to do; 0 for the others."""
    seconds = np.zeros(len(corpus))
    index: Index | None = store.utterances.index if store is not None else None
    at = index.positions(hashes) if index is not None else np.full(len(corpus), -1)
    unknown = []
    for i in todo:
        told = told_s(corpus.utterances[i])
        if told is not None:
            seconds[i] = told
        elif index is not None and at[i] >= 0:
            seconds[i] = index.records["seconds"][at[i]]
        else:
            unknown.append(i)
    seconds[unknown] = estimated_s(corpus, unknown)
    return seconds


def told_s(utterance: Utterance) -> float | None:
    """How long an utterance is by what the corpus says of it."""
    if utterance.duration_s:
        return utterance.duration_s
    return utterance.end_s - utterance.start_s if utterance.end_s is not None else None


def estimated_s(corpus: Corpus, positions: list[int]) -> np.ndarray:
    """Durations from headers; of very many, from the sizes of files and the headers of an even sample of each kind."""
    seconds, step = np.zeros(len(positions)), max(1, len(positions) // PROBED)
    where = np.array(positions, int)
    with ThreadPoolExecutor(4) as pool:
        def of_each(what: Callable[[Corpus, int], float], some: np.ndarray) -> np.ndarray:
            return np.array(list(pool.map(lambda i: what(corpus, i), where[some].tolist())), float)

        if step == 1:
            return of_each(_header_s, np.arange(len(where)))
        kinds = np.array([os.path.splitext(corpus.utterances[i].audio)[1].lower() for i in positions])  # noqa: PTH122
        starts = np.array([corpus.utterances[i].start_s for i in positions])
        for kind in np.unique(kinds):
            mine = np.flatnonzero(kinds == kind)
            probed = mine[::step]
            known, sizes = of_each(_header_s, probed), of_each(_size, mine)
            rate = (known + starts[probed]).sum() / max(1.0, sizes[::step].sum())
            seconds[mine] = np.maximum(0.0, rate * sizes - starts[mine])
            seconds[probed] = known
    return seconds


def _size(corpus: Corpus, position: int) -> int:
    try:
        return os.stat(place(corpus, corpus.utterances[position])).st_size  # noqa: PTH116
    except OSError:
        return 0  # said when it is decoded


def _header_s(corpus: Corpus, position: int) -> float:
    utterance = corpus.utterances[position]
    try:
        return max(0.0, audio.probe(place(corpus, utterance)).duration_s - utterance.start_s)
    except BadAudio:
        return 0.0  # said when it is decoded


def _bytes_of(spec: Spec, seconds: np.ndarray) -> float:
    frames = len(seconds) if spec.frame_rate is None else float(spec.frame_rate or Fraction(0)) * seconds.sum()
    return float(frames * max(spec.dim or 0, 1) * np.dtype(spec.dtype).itemsize)


def _orphans(store: Store | None, hashes: np.ndarray) -> tuple[str, ...]:
    """Keys in the store that the corpus lacks."""
    if store is None:
        return ()
    index = store.utterances.index
    mine = np.zeros(len(index.records) + 1, bool)
    mine[index.positions(hashes)] = True  # -1, not there, marks the spare place at the end
    return tuple(sorted(index.key(record) for record in index.records[index.live & ~mine[:-1]]))


def record_of(corpus: Corpus, utterance: Utterance, facts: Mapping[str, Any]) -> dict[str, Any]:
    """The fields the store keeps of an utterance: the corpus' own, and what decoding found."""
    names = ("key", "audio", "start_s", "end_s", "speaker", "text", "language", "kind", "extra")
    return {name: getattr(utterance, name) for name in names} | {"root": str(corpus.root.resolve()), **facts}


__all__ = ["Failure", "FeaturePlan", "Plan", "place", "plan", "record_of", "source_now", "stamp"]
