"""Several features on one frame grid: whole utterances, crops, and batches of crops in one array each.

What a view gives is aligned on read (featstore_align): a crop reads the source frames it needs and equals the slice of
the whole utterance bit for bit. Lengths always agree; what cannot be aligned is refused when the view is made.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from hashlib import sha256
from typing import TYPE_CHECKING

import numpy as np

from featstore_align import Conversion, align_batch, conversion, exact
from featstore_align.conversion import Exact, Timing

from .errors import BadRequest, MissingFeature, MissingUtterance, StaleFeature, nearest
from .index import hash_keys
from .row import SAME, Row
from .segment import Segment, read_rows

if TYPE_CHECKING:
    from .store import Feature, Store

Batch = dict[str, np.ndarray]
LENGTHS = "lengths"  # in a batch: how many frames of each row are of the utterance


@dataclass(frozen=True)
class _Crops:
    """Crops of several utterances (B,): each one's number in the view, its first frame, and the frames there are."""

    number: np.ndarray
    start: np.ndarray
    frames: np.ndarray


@dataclass(frozen=True)
class _Member:
    """One feature of a view, and how it comes to the view's grid.

    segments, records, at: its rows as of when the view was made, and which is that of each of the view's utterances.
    grids: from its own frames to the view's; None for kinds samples and global.
    hop: samples of one frame of the view, for kind samples.
    """

    name: str
    feature: Feature
    segments: Sequence[Segment]
    records: np.ndarray
    at: np.ndarray
    grids: Conversion | None = None
    hop: int = 0

    def empty(self, rows: int, frames: int) -> np.ndarray:
        """An array for `frames` frames of as many utterances as there are `rows`."""
        if self.feature.kind == "global":
            return np.empty((rows, *self.feature.channels), self.feature.dtype)
        if self.hop:
            return np.empty((rows, frames * self.hop), np.float32)
        return np.empty((rows, frames, *self.feature.channels), self.feature.dtype)

    def row(self, number: int, key: str) -> Row:
        return Row(self.feature, key, self.records[self.at[number]], self.segments)

    def moved(self) -> _Member:
        """The same rows where they are now, after some were found compacted away.

        Those that the feature's new index has no longer, or in a newer version, are still read where they were.
        """
        index = self.feature.index
        if index.records is self.records:
            return self
        old = self.records[self.at]
        at = index.positions(np.stack([old["hash"], old["tag"]], axis=1))
        new = index.records[at]
        same = (at >= 0) & (new[SAME] == old[SAME]) & (new["source"] == old["source"]).all(axis=1)
        if same.all():
            return replace(self, segments=index.segments, records=index.records, at=at)
        old["segment"] += len(index.segments)
        return replace(self, segments=[*index.segments, *self.segments], records=np.concatenate([index.records, old]),
                       at=np.where(same, at, len(index.records) + np.arange(len(at))))

    def contents(self) -> bytes:
        """What tells the rows of all the view's utterances from others."""
        records = self.records[self.at]
        return b"".join(records[name].tobytes() for name in ("length", "checksum", "scale", "source"))

    def part(self, crops: _Crops, out: np.ndarray) -> _Part:
        """What a batch reads of this feature."""
        rows = self.records[self.at[crops.number]]
        there, stop = rows["length"].astype(np.int64), crops.start + crops.frames
        direct = True  # whether the frames as they are stored are the crop
        if self.grids is not None:
            first, last = self.grids.source_ranges(crops.start, stop, there, self.feature.kind)  # type: ignore[arg-type]
            direct = self.grids.is_copy and bool((last - first == crops.frames).all())
        elif self.hop:
            first, last = np.minimum(crops.start * self.hop, there), np.minimum(stop * self.hop, there)
            direct = self.feature.dtype == out.dtype and bool((rows["scale"] == 1).all())
        else:
            first, last = np.zeros_like(there), there
        count = (last - first).tolist()
        if not direct:
            end = np.cumsum(last - first).tolist()
            stored = np.empty((end[-1], *self.feature.channels), self.feature.dtype)
            places = [stored[e - n:e] for e, n in zip(end, count, strict=True)]
        elif self.grids is None and not self.hop:
            stored, places = out, [row[None] for row in out]
        else:
            stored, places = out, [row[:n] for row, n in zip(out, count, strict=True)]
        packed = self.feature.quantiser is not None
        raw = [np.empty(place.shape, np.int8) for place in places] if packed else places
        return _Part(self, crops, rows, first, last, there, stored, places, raw, out)


@dataclass(frozen=True)
class _Part:
    """What a batch reads of one feature: of every crop frames `[first, last)`, into its place in `stored`, which is
    `out` itself where nothing is left to do but to pad. there: frames of the whole row. raw: `places`, or for int8 what
    is to be decoded into them."""

    member: _Member
    crops: _Crops
    rows: np.ndarray
    first: np.ndarray
    last: np.ndarray
    there: np.ndarray
    stored: np.ndarray
    places: list[np.ndarray]
    raw: list[np.ndarray]
    out: np.ndarray

    def wanted(self) -> Iterator[tuple[Segment, int, np.ndarray]]:
        """What is to be read, for `read_rows`."""
        segments = self.member.segments
        at = (self.rows["offset"].astype(np.int64) + self.first).tolist()
        return ((segments[number], offset, place)
                for number, offset, place in zip(self.rows["segment"].tolist(), at, self.raw, strict=True))

    def finish(self) -> None:
        """Make the crops of what was read, and pad what lies beyond their ends."""
        member, crops, out = self.member, self.crops, self.out
        quantiser = member.feature.quantiser
        for raw, place in zip(self.raw, self.places, strict=True) if quantiser is not None else ():
            if raw is not place and quantiser is not None:
                quantiser.decode(raw, place)
        if member.hop:
            self._samples()
        elif self.stored is not out and member.grids is not None:
            align_batch(member.feature.kind, self.stored, member.grids, start=crops.start,  # type: ignore[arg-type]
                        stop=crops.start + crops.frames, source_length=self.there, out=out,
                        ranges=(self.first, self.last))
        if member.grids is not None or member.hop:
            filled = crops.frames * (member.hop or 1)
            for number in np.flatnonzero(filled < out.shape[1]).tolist():
                out[number, filled[number]:] = member.feature.spec.pad

    def _samples(self) -> None:
        """Samples as floats at full scale; zeros beyond the recording, whose last frame may reach over its end."""
        for row, place, scale in zip(self.out, self.places, self.rows["scale"].tolist(), strict=True):
            if self.stored is not self.out:
                np.multiply(place, np.float32(scale), out=row[:len(place)])
            row[len(place):] = 0


class View(Mapping[str, Batch]):
    """Features of a store on one frame grid. `view[utterance]` is a dict of arrays whose lengths agree.

    By kind: continuous features come through ReTrans, f0 inside voiced stretches, labels by the nearest frame; samples
    are cut, `hop` of them for each frame, as float32; a global vector stands for the whole utterance. Everything else
    has the type in which it is stored.

    rate: frames per second, exact. centre_s: the time on which frame 0 is centred.
    lengths: frames of each utterance, in the order in which the view lists them.
    """

    def __init__(self, store: Store, names: Sequence[str], *, like: str | None, rate: Exact | None, timing: Timing,
                 utterances: Sequence[str] | None) -> None:
        if isinstance(names, str) or not names:
            raise BadRequest(f"view of {names!r}: expected a list of features, such as ['f0', 'log-mel']")
        if (like is None) == (rate is None):
            raise BadRequest("a view needs one grid: like='log-mel', whose frames it takes, or rate='24000/256'")
        if LENGTHS in names:
            raise BadRequest(f"a feature called {LENGTHS!r} cannot be in a view: batches have their lengths there")
        self.timing, self._store = timing, store
        grid = store.feature(like) if like is not None else None
        self.rate, self.centre_s = _grid(grid, like, rate)
        self._keys = list(store.utterances) if utterances is None else list(utterances)
        hashes = hash_keys(self._keys)
        self._members = [self._member(name, hashes) for name in dict.fromkeys(names)]
        self._check_there()
        self._check_sources()
        self.lengths = self._lengths(grid, like, hashes)
        self._place = {key: number for number, key in enumerate(self._keys)}

    @property
    def names(self) -> list[str]:
        """The features, in the order asked for."""
        return [member.name for member in self._members]

    def length(self, utterance: str) -> int:
        """Frames of an utterance."""
        return int(self.lengths[self._number(utterance)])

    def crop(self, utterance: str, *, start: int, frames: int) -> Batch:
        """Frames `[start, start + frames)`: (frames, D) or (frames,), of samples (frames * hop,), of global kind (D,).

        What lies beyond the end is the feature's pad value (a log-mel's floor, 0 elsewhere).
        """
        found = {member.name: member.empty(1, frames) for member in self._members}
        self._fill(self._crops([(utterance, start)], frames), found)
        return {name: array[0] for name, array in found.items()}

    def read_batch(self, items: Sequence[tuple[str, int]], *, frames: int, out: Batch | None = None) -> Batch:
        """Crops of `frames` frames from (utterance, start), a row each: `{feature: (B, frames, D)}` and `lengths` (B,).

        out: arrays of an earlier batch of that size, to be written over.
        """
        found = self.room(len(items), frames) if out is None else self._checked(out, len(items), frames)
        crops = self._crops(items, frames)
        found[LENGTHS][:] = crops.frames
        if items:
            self._fill(crops, found)
        return found

    def room(self, rows: int, frames: int) -> Batch:
        """Arrays for a batch of that size, not filled: what `read_batch` takes as `out`."""
        return {member.name: member.empty(rows, frames) for member in self._members} | {
            LENGTHS: np.empty(rows, np.int64)}

    @property
    def store(self) -> Store:
        return self._store

    @property
    def snapshot(self) -> dict[str, str]:
        """What the view serves, in short texts; where they are equal, so is every number, in this store or a copy.

        "the grid", "the utterances" (how many, and a digest of keys and lengths), and by name of each feature its
        identity and a digest of the rows.
        """
        keys = hash_keys(self._keys).tobytes() + self.lengths.tobytes()
        found = {"the grid": f"{self.rate} Hz by {self.timing}, frame 0 at {self.centre_s} s",
                 "the utterances": f"{len(self._keys)} ({_short(keys)})"}
        return found | {member.name: f"{member.feature.short}, rows {_short(member.contents())}"
                        for member in self._members}

    def taps(self, utterance: str, name: str, frame: int) -> list[tuple[int, Fraction]]:
        """The stored frames that a frame of the view is made of, and their exact weights; the samples that it spans."""
        self._crops([(utterance, frame)], 1)
        member = next((member for member in self._members if member.name == name), None)
        if member is None:
            raise MissingFeature(f"the view has no feature {name!r} ({nearest(name, self.names)})")
        if member.hop:
            return [(frame * member.hop + i, Fraction(1)) for i in range(member.hop)]
        if member.grids is None:
            return []
        return member.grids.taps(frame, len(member.feature[utterance]), member.feature.kind)  # type: ignore[arg-type]

    def __getitem__(self, utterance: str) -> Batch:
        return self.crop(utterance, start=0, frames=self.length(utterance))

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, key: object) -> bool:
        return key in self._place

    def __repr__(self) -> str:
        seconds = float(self.lengths.sum() / self.rate)
        return (f"<View of {self._store.path.name}: {' '.join(self.names)} at {self.rate} Hz by {self.timing}; "
                f"{len(self):,} utterances, {seconds / 3600:.1f} h>")

    def _fill(self, crops: _Crops, out: Batch) -> None:
        """Write the crops into the rows of arrays: first all that they need is read at once, then it is aligned."""
        parts = [member.part(crops, out[member.name]) for member in self._members]
        try:
            read_rows([one for part in parts for one in part.wanted()])
        except FileNotFoundError:
            self._look_again(parts)
        for part in parts:
            part.finish()

    def _look_again(self, parts: Sequence[_Part]) -> None:
        """Read what a batch needs although segments were compacted away since the view was made."""
        numbers = parts[0].crops.number.tolist()
        for part in parts:
            for number, first, place in zip(numbers, part.first.tolist(), part.places, strict=True):
                part.member.row(number, self._keys[number]).fill(first, place)
            part.raw[:] = part.places  # these are decoded
        self._members = [member.moved() for member in self._members]

    def _crops(self, items: Sequence[tuple[str, int]], frames: int) -> _Crops:
        """The crops from (utterance, start), without the frames that lie beyond the end."""
        number = np.array([self._number(utterance) for utterance, _ in items], np.int64)
        start, length = np.array([start for _, start in items], np.int64), self.lengths[number]
        if frames < 1 or ((start < 0) | (start >= np.maximum(length, 1))).any():
            wrong = 0 if frames < 1 else int(np.argmax((start < 0) | (start >= np.maximum(length, 1))))
            raise ValueError(f"{items[wrong][0]}: {frames} frames from {start[wrong]} of {length[wrong]}: expected at "
                             "least one frame, and a start inside the utterance")
        return _Crops(number, start, np.minimum(frames, length - start))

    def _number(self, utterance: str) -> int:
        number = self._place.get(utterance)
        if number is None:
            raise MissingUtterance(f"the view has no utterance {utterance!r} ({nearest(utterance, self._keys)})")
        return number

    def _member(self, name: str, hashes: np.ndarray) -> _Member:
        feature = self._store.feature(name)
        index = feature.index
        rows = index.segments, index.records, index.positions(hashes)
        if feature.kind == "global":
            return _Member(name, feature, *rows)
        if feature.frame_rate is None:
            raise BadRequest(f"{name} has no frame rate and cannot be in a view")
        if feature.kind == "samples":
            hop = feature.frame_rate / self.rate
            if hop.denominator != 1:
                raise BadRequest(f"{name} has {feature.frame_rate} samples per second and the view {self.rate} frames: "
                                 f"a frame would be {hop} samples. Samples are cut, never resampled: take a waveform "
                                 f"whose rate is a whole multiple, as in -f wave:24k, or another grid")
            return _Member(name, feature, *rows, hop=int(hop))
        timing: Timing = "centres" if feature.kind == "f0" else self.timing
        grids = conversion(feature.frame_rate, self.rate, timing, feature.spec.centre_s, self.centre_s)
        return _Member(name, feature, *rows, grids)

    def _check_there(self) -> None:
        """MissingFeature names what is missing, for how many, before anything is read."""
        short = [member for member in self._members if (member.at < 0).any()]
        if short:
            gaps = [f"{member.name} for {int((member.at < 0).sum()):,} of {len(member.at):,} utterances, such as "
                    f"{self._keys[int(np.argmax(member.at < 0))]}" for member in short]
            names = " ".join(f"-f {member.name}" for member in short)
            raise MissingFeature(f"{self._store.path} lacks {'; '.join(gaps)}. Extract them: featstore extract CORPUS "
                                 f"{self._store.path} {names}; or give the utterances that have all (utterances=...)")

    def _check_sources(self) -> None:
        """StaleFeature where features of one utterance stem from different audio."""
        first: np.ndarray | None = None
        for member in self._members:
            sources = member.records["source"][member.at]
            if first is None:
                first, of = sources.copy(), np.full(len(sources), member.name, object)
                continue
            known = first.any(axis=1)
            apart = known & sources.any(axis=1) & (sources != first).any(axis=1)
            if apart.any():
                number = int(np.argmax(apart))
                one, other = (digests[number].tobytes().hex()[:12] for digests in (first, sources))
                raise StaleFeature(f"{self._keys[number]}: {of[number]} was made from audio {one} and {member.name} "
                                   f"from {other} ({int(apart.sum()):,} utterances are so). The recording changed in "
                                   f"between: featstore extract CORPUS {self._store.path} -f {of[number]} "
                                   f"-f {member.name} brings both up to date")
            first[~known], of[~known] = sources[~known], member.name

    def _lengths(self, grid: Feature | None, like: str | None, hashes: np.ndarray) -> np.ndarray:
        if grid is None:
            index = self._store.utterances.index
            seconds = index.records["seconds"][index.positions(hashes)]
            return np.floor(seconds * float(self.rate) + 1e-6).astype(np.int64)
        at = grid.index.positions(hashes)
        if (at < 0).any():
            raise MissingFeature(f"{self._keys[int(np.argmax(at < 0))]} has no {like}, whose frames the view takes")
        return grid.index.records["length"][at].astype(np.int64)

    def _checked(self, out: Batch, rows: int, frames: int) -> Batch:
        for name, array in self.room(rows, frames).items():
            given = out.get(name)
            if (given is None or given.shape != array.shape or given.dtype != array.dtype
                    or not given.flags.c_contiguous):
                told = "nothing" if given is None else f"{given.dtype} {given.shape}"
                gaps = " with gaps" if given is not None and not given.flags.c_contiguous else ""
                raise ValueError(f"out[{name!r}] is {told}{gaps}; expected {array.dtype} {array.shape}, contiguous")
        return out


def _short(data: bytes) -> str:
    return sha256(data).hexdigest()[:12]


def _grid(feature: Feature | None, like: str | None, rate: Exact | None) -> tuple[Fraction, Fraction]:
    """Frame rate, and centre of frame 0."""
    if feature is None:
        found = exact(rate if rate is not None else 0, "rate")
        if found <= 0:
            raise BadRequest(f"rate={rate}: expected frames per second, above 0")
        return found, 1 / (2 * found)  # frame k covers [k, k + 1) / rate, as a log-mel's
    if feature.frame_rate is None or feature.kind == "samples":
        raise BadRequest(f"like={like!r} is of kind {feature.kind}: expected one with frames, such as log-mel or f0")
    return feature.frame_rate, feature.spec.centre_s
