"""Splits: which utterances train a model and which judge it. Made once, kept in the store, never changed.

    splits/<name>/zarr.json     written LAST, if there is none: that is the commit; attributes say how it was made
    splits/<name>/<id>/hashes   (n, 2) uint64: 128 bits of blake2b of each utterance's key, in their order
    splits/<name>/<id>/parts    (n,) uint8: 0 train, 1 valid, 2 test

Keys themselves are not kept: what is removed from a store leaves no name behind in its splits.
"""

from __future__ import annotations

import math
import struct
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from hashlib import blake2b
from typing import Any, Literal, get_args

import google_crc32c
import numpy as np

from . import storage
from .errors import BadRequest, CorruptSegment, nearest
from .index import hash_keys
from .segment import group, put_plain
from .spec import NAME
from .storage import Place
from .store import Store, StoredUtterance, make_group

By = Literal["song", "speaker", "utterance"]
PARTS = ("train", "valid", "test")
_PAIR = np.dtype([("hash", "<u8"), ("tag", "<u8")])  # compares as the pair of numbers it is


@dataclass(frozen=True)
class Part:
    """What a part had when its split was made. groups: songs, speakers or utterances, by what was split."""

    utterances: int
    hours: float
    groups: int


@dataclass(frozen=True, repr=False)
class Split:
    """A division of a store's utterances into train, valid and test. Utterances that came later are in no part.

    percent: of the duration, as asked for; `parts` has what came out.
    """

    name: str
    by: str
    seed: int
    percent: Mapping[str, str]
    parts: Mapping[str, Part]
    folder: Place
    checksum: int

    @property
    def shares(self) -> dict[str, float]:
        """What fraction of the duration each part has; of the utterances where no duration is known."""
        sizes = {name: part.hours for name, part in self.parts.items()}
        if not any(sizes.values()):
            sizes = {name: part.utterances for name, part in self.parts.items()}
        return {name: size / math.fsum(sizes.values()) for name, size in sizes.items()}

    def places(self, keys: Sequence[str]) -> np.ndarray:
        """(n,) the number of the part in PARTS that each of `keys` is in; -1 for those in none."""
        hashes, parts = self._arrays
        wanted = np.ascontiguousarray(hash_keys(keys)).view(_PAIR).reshape(-1)
        if not len(parts):
            return np.full(len(wanted), -1)
        at = np.minimum(np.searchsorted(hashes, wanted), len(parts) - 1)
        return np.where(hashes[at] == wanted, parts[at].astype(np.int64), -1)

    def __repr__(self) -> str:
        parts = ", ".join(f"{name} {part.utterances:,} ({self.shares[name]:.1%})" for name, part in self.parts.items())
        return f"<Split {self.name} by {self.by}: {parts}>"

    @cached_property
    def _arrays(self) -> tuple[np.ndarray, np.ndarray]:
        count = sum(part.utterances for part in self.parts.values())
        hashes, parts = np.empty(count, _PAIR), np.empty(count, np.uint8)
        for name, array in (("hashes/c/0/0", hashes), ("parts/c/0", parts)):
            try:
                storage.read_many([(str(self.folder / name), 0, array.view(np.uint8).data)])
            except (EOFError, FileNotFoundError):
                raise self._damaged(f"{name} is missing or cut off") from None
        if _checksum(hashes, parts) != self.checksum:
            raise self._damaged("its bytes changed since they were written")
        return hashes, parts

    def _damaged(self, what: str) -> CorruptSegment:
        return CorruptSegment(f"{self.folder}: {what}. Remove the folder {self.folder.parent} and make the split "
                              f"again: the same utterances, percents and seed ({self.seed}) give the same parts")


def split(store: Store, name: str, *, by: By, valid: float | str | Fraction = 0, test: float | str | Fraction = 0,
          seed: int = 0) -> Split:
    """Divide the utterances of a store into train, valid and test, and keep that in the store under `name`.

    by: what is never divided. "speaker"; "song": the field `song`, or for cuts of one recording the recording (speech
        is no song: each recording counts for itself); "utterance". Utterances of identical audio stay together always.
    valid, test: percent of the duration, such as 5 or "2.5%"; parts come as near to it as whole groups allow, and have
        at least one group each. What is left trains.
    seed: same utterances, same seed: same parts, in whatever order the utterances came into the store.

    Raises:
        BadRequest: there is a split of that name; songs or speakers are not known; there are too few groups.
    """
    percent = {"valid": _percent("valid", valid), "test": _percent("test", test)}
    _check(store, name, by, percent, seed)
    utterances = list(store.utterances.read_all())
    members = _groups(store, utterances, by)
    wanted = [part for part in PARTS[1:] if percent[part]]
    if len(members) <= len(wanted):
        raise BadRequest(f"{store.path} has {len(members)} group{'s' * (len(members) != 1)} by {by}, too few for train"
                         f"{''.join(f', {part}' for part in wanted)}: each part needs one. Split by something finer "
                         "(song, utterance), or ask for fewer parts")
    known = [u.duration_s for u in utterances if u.duration_s > 0]
    typical = math.fsum(known) / len(known) if known else 1.0  # of arrays that came without audio
    seconds = [math.fsum(utterances[i].duration_s or typical for i in group) for group in members]
    order = _shuffled([min(utterances[i].key for i in group) for group in members], seed)
    part_of = _assign([seconds[i] for i in order], {PARTS.index(part): float(percent[part]) / 100 for part in wanted})
    places = dict(zip(order, part_of, strict=True))
    return _store(store, name, by, percent, seed, [(utterances[i], places[number]) for number, group in
                                                   enumerate(members) for i in group], Counter(part_of))


def members(store: Store, which: str, keys: Iterable[str]) -> list[str]:
    """Those of `keys` that are in a part, named as SPLIT/PART: "main/train"."""
    name, _, part = which.partition("/")
    found = store.splits.get(name)
    if found is None:
        raise BadRequest(f"{store.path} has no split {name!r} ({nearest(name, store.splits)}). Make one: featstore "
                         f"split {store.path} main --by song --valid 5% --test 5%")
    if part not in PARTS:
        raise BadRequest(f"split={which!r}: expected a split and one of its parts, such as {name}/train ({name} has: "
                         + ", ".join(PARTS) + ")")
    keys = list(keys)
    chosen = [keys[i] for i in np.flatnonzero(found.places(keys) == PARTS.index(part))]
    if not chosen:
        raise BadRequest(f"{which} has none of the {len(keys):,} utterances: it was made with "
                         f"{found.parts[part].utterances:,}. What was removed is gone from it, what was added since is "
                         "in no part; featstore split makes another under a new name")
    return chosen


def read_splits(root: Place) -> dict[str, Split]:
    """The splits of a store by name."""
    home = root / "splits"
    names = [name for name in storage.names(home) if NAME.fullmatch(name)]
    return {name: _read(home / name) for name in names if (home / name / "zarr.json").exists()}


def copy_splits(source: Store, target: Store) -> list[str]:
    """Take the splits of a store along to another. Returns the names that stand for other splits there, and stay so."""
    other = []
    for name, found in source.splits.items():
        there = target.splits.get(name)
        if there is None:
            facts = storage.read_document(found.folder.parent / "zarr.json")["attributes"]["featstore"]
            hashes, parts = found._arrays
            _put(target, name, facts, hashes, parts)
        elif there.checksum != found.checksum:
            other.append(name)
    return other


def _percent(part: str, asked: float | str | Fraction) -> Fraction:
    try:
        found = Fraction(str(asked).strip().removesuffix("%"))
    except (ValueError, ZeroDivisionError):
        raise BadRequest(f"{part}={asked!r}: expected percent of the duration, such as 5%") from None
    if not 0 <= found < 100:
        raise BadRequest(f"{part}={asked!r}: expected percent of the duration, from 0 to below 100")
    return found


def _check(store: Store, name: str, by: str, percent: Mapping[str, Fraction], seed: int) -> None:
    if by not in get_args(By):
        raise BadRequest(f"by={by!r}: expected one of {', '.join(get_args(By))}")
    if not NAME.fullmatch(name):
        raise BadRequest(f"{name!r} cannot be a split's name: expected a-z or 0-9, then up to 63 of a-z, 0-9 and -")
    if not 0 < sum(percent.values()) < 100:
        asked = ", ".join(f"{part} {float(value):g}%" for part, value in percent.items())
        raise BadRequest(f"{asked}: expected something for valid or test, and something left to train on")
    if not 0 <= seed < 1 << 64:
        raise BadRequest(f"seed={seed}: expected 0 or more, below 2^64")
    if name in store.splits:
        _refuse_taken(store, name)
    if not len(store.utterances):
        raise BadRequest(f"{store.path} has no utterances to split: extract some first")


def _refuse_taken(store: Store, name: str) -> None:
    number = 2
    while f"{name[:60]}-{number}" in store.splits:
        number += 1
    raise BadRequest(f"{store.path} has a split {name!r} already; splits do not change, since runs were trained on "
                     f"them. Take another name, such as {name[:60]}-{number}")


def _groups(store: Store, utterances: Sequence[StoredUtterance], by: str) -> list[list[int]]:
    """The utterances that may not be divided, as positions: those that share a label, directly or through others."""
    first: dict[Any, int] = {}
    above = list(range(len(utterances)))

    def top(number: int) -> int:
        while above[number] != number:
            above[number] = number = above[above[number]]
        return number

    for number, labels in enumerate(_labels(store, utterances, by)):
        for label in labels:
            one, other = top(first.setdefault(label, number)), top(number)
            above[max(one, other)] = min(one, other)
    found: dict[int, list[int]] = {}
    for number in range(len(utterances)):
        found.setdefault(top(number), []).append(number)
    return list(found.values())


def _labels(store: Store, utterances: Sequence[StoredUtterance], by: str) -> list[list[Any]]:
    """What each utterance shares with those it may not be divided from."""
    unknown: list[str] = []
    labels: list[list[Any]] = []
    songless = {(u.root, u.audio) for u in utterances if by == "song" and not u.extra.get("song")}
    for u in utterances:
        own: list[Any] = [("audio", u.source)] if u.source.strip("0") else []
        recording = ("recording", u.root, u.audio)
        if by == "speaker":
            known = u.speaker is not None
            own.append(("speaker", u.speaker))
        elif by == "song":
            song, cut = u.extra.get("song"), u.audio is not None and (u.start_s > 0 or u.end_s is not None)
            known = bool(song) or cut or u.kind == "speech"
            if song:
                own.append(("song", str(song)))
            if (u.root, u.audio) in songless and u.audio is not None:
                own.append(recording)
        else:
            known = True
        if not known:
            unknown.append(u.key)
        labels.append(own)
    if unknown:
        told = _UNKNOWN[by].format(count=len(unknown), all=len(utterances), key=min(unknown))
        raise BadRequest(f"{store.path}: {told}")
    return labels


_UNKNOWN = {
    "speaker": "{count:,} of {all:,} utterances have no speaker, such as {key}. Name them when the corpus is scanned "
               "(featstore scan CORPUS --pattern '{{speaker}}/{{utterance}}', or --speaker NAME) and extract again, or "
               "split --by utterance",
    "song": "{count:,} of {all:,} utterances have no field song and are no cuts of a longer recording, such as {key}: "
            "nothing tells which of them are of one song. Name songs when the corpus is scanned (featstore scan CORPUS "
            "--pattern '{{speaker}}/{{song}}_*') and extract again; or split --by speaker; or, if no two files are of "
            "one song, --by utterance",
}


def _shuffled(labels: Sequence[str], seed: int) -> list[int]:
    """The positions of `labels` in an order that depends on them and on `seed`, and on nothing else."""
    key = struct.pack("<Q", seed)
    return sorted(range(len(labels)), key=lambda i: blake2b(labels[i].encode(), digest_size=16, key=key).digest())


def _assign(seconds: Sequence[float], shares: Mapping[int, float]) -> list[int]:
    """The part of each group. The last part comes first; part 0 has what is left, at least one group."""
    total, parts = math.fsum(seconds), [0] * len(seconds)
    free = list(range(len(seconds)))
    for number, (part, share) in enumerate(sorted(shares.items(), reverse=True)):
        most = len(free) - (len(shares) - number)  # each part still to come, and part 0, needs a group
        taken = _fill([seconds[i] for i in free], share * total, most)
        for i in taken:
            parts[free[i]] = part
        free = [group for i, group in enumerate(free) if i not in taken]
    return parts


def _fill(seconds: Sequence[float], target: float, most: int) -> set[int]:
    """Groups that come near to `target` together: those that fit, in their order, then one more if that is nearer."""
    taken: set[int] = set()
    have = 0.0
    for number, length in enumerate(seconds):
        if len(taken) < most and have + length <= target * (1 + 1e-9):
            taken.add(number)
            have += length
    left = [number for number in range(len(seconds)) if number not in taken]
    best = min(left, key=lambda number: abs(target - have - seconds[number]))
    if not taken or (len(taken) < most and abs(target - have - seconds[best]) < target - have):
        taken.add(best)
    return taken


def _store(store: Store, name: str, by: str, percent: Mapping[str, Fraction], seed: int,
           placed: Sequence[tuple[StoredUtterance, int]], groups: Mapping[int, int]) -> Split:
    pairs = hash_keys([utterance.key for utterance, _ in placed]).view(_PAIR).reshape(-1)
    parts = np.array([part for _, part in placed], np.uint8)
    order = np.argsort(pairs)
    pairs, parts = pairs[order], parts[order]
    facts = {"by": by, "seed": seed, "percent": {part: str(value) for part, value in percent.items()}, "parts": {
        part: {"utterances": int((parts == number).sum()), "groups": groups.get(number, 0),
               "hours": math.fsum(u.duration_s for u, own in placed if own == number) / 3600}
        for number, part in enumerate(PARTS)}}
    _put(store, name, facts | {"crc32c": _checksum(pairs, parts)}, pairs, parts)
    return store.splits[name]


def _put(store: Store, name: str, facts: Mapping[str, Any], hashes: np.ndarray, parts: np.ndarray) -> None:
    """Data first, under a name that nobody else has; the document last, if there is none yet."""
    home = store.path / "splits" / name
    data = home / storage.new_id()
    make_group(store.path, home.parent)
    storage.make_folders(store.path, data)
    staged = storage.staging(data)
    put_plain(staged / "hashes", hashes.view("<u8").reshape(-1, 2), ["utterance", "half"])
    put_plain(staged / "parts", parts, ["utterance"])
    storage.sync_tree(data)
    storage.upload(staged, data)
    storage.unstage(staged, data)
    make_group(store.path, data)
    made = storage.create_document(home / "zarr.json", group({**facts, "data": data.name}))
    store.forget_splits()
    if not made:
        _refuse_taken(store, name)  # somebody else was first


def _read(folder: Place) -> Split:
    facts = storage.read_document(folder / "zarr.json").get("attributes", {}).get("featstore", {})
    try:
        parts = {name: Part(**facts["parts"][name]) for name in PARTS}
        return Split(folder.name, facts["by"], facts["seed"], facts["percent"], parts, folder / facts["data"],
                     facts["crc32c"])
    except (KeyError, TypeError):
        raise CorruptSegment(f"{folder}/zarr.json is not the document of a split. Remove the folder {folder} and make "
                             "the split again") from None


def _checksum(hashes: np.ndarray, parts: np.ndarray) -> int:
    return google_crc32c.value(hashes.tobytes() + parts.tobytes())
