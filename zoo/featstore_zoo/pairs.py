"""Which recordings are compared: where they lie, and which belong together, by key, by file name or by a list."""

from __future__ import annotations

import csv
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

import featstore as fs
from featstore import audio, storage
from featstore.errors import BadAudio, BadRequest, nearest

Array = np.ndarray

SHOWN = 5  # utterances that an error names


@dataclass(frozen=True)
class Recording:
    """A recording, and what is known of it. `store` and `feature`: a stored waveform; else `audio`, or a cut of it."""

    key: str
    audio: Path | None = None
    start_s: float = 0.0
    end_s: float | None = None
    store: storage.Place | None = None
    feature: str = ""
    speaker: str | None = None
    condition: str | None = None
    text: str | None = None
    language: str | None = None

    @property
    def sample_rate(self) -> int:
        if self.store is not None:
            return int(_store(self.store).feature(self.feature).spec.frame_rate or 0)
        return audio.probe(self._file()).sample_rate

    @property
    def duration_s(self) -> float:
        """Its length: of a cut without an end, up to that of its file."""
        if self.store is not None:
            return len(_store(self.store)[self.key, self.feature]) / self.sample_rate
        end = self.end_s if self.end_s is not None else audio.probe(self._file()).duration_s
        return end - self.start_s

    def read(self, sample_rate: int) -> Array:
        """The waveform (N,) float32 at a sample rate. BadAudio if there is none to be had."""
        if self.store is not None:
            wave, rate = _store(self.store)[self.key, self.feature].as_float(), self.sample_rate
        else:
            with audio.Reader(self._file(), self.start_s, self.end_s) as reader:
                rate, wave = reader.sample_rate, np.concatenate(list(reader))
        if rate == sample_rate:
            return wave
        resampler = audio.Resampler(rate, sample_rate)
        return resampler.push(wave, last=True)

    def _file(self) -> Path:
        if self.audio is None:
            raise BadAudio(f"{self.key}: the store has neither its waveform nor where its recording lies. "
                           "Try: featstore extract CORPUS STORE -f wave")
        return self.audio


@dataclass(frozen=True)
class Pair:
    """An utterance: the reference, and what each system made of it."""

    name: str
    reference: Recording
    converted: Mapping[str, Recording]


def recordings(where: str | storage.Place, split: str | None = None) -> dict[str, Recording]:
    """The recordings of a store, a folder or a manifest, by key.

    split: of a store, such as "main/test": only the utterances of that part.

    Raises:
        BadRequest: there are none, or a split is asked of what is no store.
        BadCorpus: a manifest cannot be read.
    """
    place = storage.place(where)
    if (place / "zarr.json").exists():
        found = _stored(fs.open(place), split)
    elif split is not None:
        raise BadRequest(f"{place} is no store: --split needs a reference that is one")
    elif not isinstance(place, Path) or not place.exists():
        raise BadRequest(f"{place} does not exist: give a store, a folder of recordings or a manifest")
    else:
        corpus = fs.corpus(place)
        found = {u.key: Recording(u.key, corpus.path(u), u.start_s, u.end_s, None, "", u.speaker, _condition(u.extra),
                                  u.text, u.language) for u in corpus}
    if not found:
        raise BadRequest(f"{place} has no recordings")
    return found


def pair(reference: Mapping[str, Recording], converted: Mapping[str, Mapping[str, Recording]],
         listed: Path | None = None, *, more: Mapping[str, Recording] | None = None) -> list[Pair]:
    """The pairs of a reference and of systems, in the order of their names.

    Keys are relative paths without extension. Where a system's keys are not those of the reference, its file names are,
    if they are unique on both sides.

    listed: a CSV with the columns reference and converted, keys or file names, and system where that matters.
    more: all of the reference, if `reference` is a part of it: what was made of the rest is passed over.

    Raises:
        BadRequest: something has no counterpart, or several; it is named.
    """
    if not converted:
        raise BadRequest("nothing to compare: give --converted [NAME=]DIR")
    if listed is not None:
        return _by_list(reference, converted, listed)
    made = {system: _matched(system, reference, found, more or {}) for system, found in converted.items()}
    return [Pair(key, reference[key], {system: found[key] for system, found in made.items()})
            for key in sorted(reference)]


def _matched(system: str, reference: Mapping[str, Recording], made: Mapping[str, Recording],
             more: Mapping[str, Recording]) -> dict[str, Recording]:
    """Reference key -> what a system made of it."""
    if reference.keys() <= made.keys():
        found, extra = dict(made), sorted(made.keys() - reference.keys() - more.keys())
    else:
        names = _unique(reference, "the reference")
        others = _unique(made, system)
        found = {names[name]: made[key] for name, key in others.items() if name in names}
        known = {_name(key) for key in more}
        extra = sorted(key for name, key in others.items() if name not in names and name not in known)
    lacking = sorted(reference.keys() - found.keys())
    if lacking or extra:
        parts = ([f"{system} lacks {_some(lacking)}"] if lacking else []) + \
                ([f"{system} has {_some(extra)}, which the reference lacks"] if extra else [])
        raise BadRequest(f"{'; '.join(parts)}. Every utterance needs its counterpart, called alike; or name the pairs: "
                         "--pairs LIST.csv with the columns reference and converted")
    return found


def _unique(found: Iterable[str], whose: str) -> dict[str, str]:
    """File name -> key."""
    keys = list(found)
    name, count = Counter(map(_name, keys)).most_common(1)[0]
    if count > 1:
        raise BadRequest(f"{whose} has {count} recordings called {name}, and the paths of reference and converted "
                         "differ: give both the same folders, or name the pairs: --pairs LIST.csv")
    return {_name(key): key for key in keys}


def _by_list(reference: Mapping[str, Recording], converted: Mapping[str, Mapping[str, Recording]],
             listed: Path) -> list[Pair]:
    with listed.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        columns = set(reader.fieldnames or ())
        if not {"reference", "converted"} <= columns:
            raise BadRequest(f"{listed} has the columns {', '.join(sorted(columns)) or 'none'}: expected reference, "
                             "converted and, where systems differ, system")
        rows = list(reader)
    found: dict[tuple[str, str], dict[str, Recording]] = defaultdict(dict)
    for number, row in enumerate(rows, start=2):
        where = f"{listed}:{number}"
        systems = [row["system"]] if row.get("system") else list(converted)
        key = _named(row["reference"], reference, f"{where}: the reference")
        for system in systems:
            if system not in converted:
                raise BadRequest(f"{where}: no system {system!r} ({nearest(system, converted)})")
            made = _named(row["converted"], converted[system], f"{where}: {system}")
            found[key, made][system] = converted[system][made]
    if not found:
        raise BadRequest(f"{listed} lists no pairs")
    several = Counter(key for key, _ in found)
    return [Pair(key if several[key] == 1 else f"{key} · {made}", reference[key], by_system)
            for (key, made), by_system in sorted(found.items())]


def _named(text: str, found: Mapping[str, Recording], whose: str) -> str:
    """The key that a list means: a key, or a file name that no other has."""
    asked = text.strip()
    if asked in found:
        return asked
    keys = [key for key in found if asked in (_name(key), f"{key}.wav", f"{key}.flac", f"{_name(key)}.wav",
                                              f"{_name(key)}.flac")]
    if len(keys) != 1:
        raise BadRequest(f"{whose} has {len(keys)} recordings {asked!r} ({nearest(asked, found)})")
    return keys[0]


def _stored(store: fs.Store, split: str | None) -> dict[str, Recording]:
    keys: Sequence[str] = list(store.utterances)
    if split is not None:
        from featstore.splits import members

        keys = members(store, split, keys)
    waves = sorted((feature for feature in store.features.values() if feature.kind == "samples"),
                   key=lambda feature: feature.spec.frame_rate or 0, reverse=True)
    found = {}
    for key in keys:
        known = store.utterances[key]
        feature = next((feature.name for feature in waves if key in feature), "")
        file = Path(known.root or "", known.audio) if known.audio else None
        found[key] = Recording(key, None if feature else file, known.start_s, known.end_s,
                               store.path if feature else None, feature, known.speaker, _condition(known.extra),
                               known.text, known.language)
    return found


@lru_cache(maxsize=8)
def _store(place: storage.Place) -> fs.Store:
    return fs.open(place)


def _condition(extra: Mapping[str, object]) -> str | None:
    value = extra.get("condition")
    return str(value) if value else None


def _name(key: str) -> str:
    return key.rpartition("/")[2]


def _some(keys: Sequence[str]) -> str:
    more = f" and {len(keys) - SHOWN:,} more" if len(keys) > SHOWN else ""
    return f"{', '.join(keys[:SHOWN])}{more}"
