"""Several features on one frame grid: whole utterances, crops, and batches of crops in one array each.

What a view gives is aligned on read (featstore_align): a crop reads the source frames it needs and equals the slice of
the whole utterance bit for bit. Lengths always agree; what cannot be aligned is refused when the view is made.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np

from featstore_align import Conversion, align, conversion, exact
from featstore_align.conversion import Exact, Timing

from .errors import BadRequest, MissingFeature, MissingUtterance, StaleFeature, nearest
from .index import hash_keys

if TYPE_CHECKING:
    from .store import Feature, Row, Store

Batch = dict[str, np.ndarray]
LENGTHS = "lengths"  # in a batch: how many frames of each row are of the utterance


@dataclass(frozen=True)
class _Member:
    """One feature of a view, and how it comes to the view's grid.

    grids: from its own frames to the view's; None for kinds samples and global.
    hop: samples of one frame of the view, for kind samples.
    """

    name: str
    feature: Feature
    grids: Conversion | None = None
    hop: int = 0

    def empty(self, frames: int, rows: int | None = None) -> np.ndarray:
        """An array for `frames` frames, of as many utterances as there are `rows`."""
        feature, leading = self.feature, () if rows is None else (rows,)
        channels = (feature.dim,) if feature.dim else ()
        if feature.kind == "global":
            return np.empty((*leading, *channels), feature.dtype)
        if self.hop:
            return np.empty((*leading, frames * self.hop), np.float32)
        return np.empty((*leading, frames, *channels), feature.dtype)

    def fill(self, key: str, out: np.ndarray, start: int, frames: int, length: int) -> None:
        """Write frames `[start, start + frames)` of an utterance of `length` frames to the beginning of `out`."""
        row = self.feature[key]
        if self.feature.kind == "global":
            out[...] = row.read()
            return
        filled = frames * (self.hop or 1)
        if self.hop:
            self._samples(row, out[:filled], start * self.hop)
        else:
            self._frames(row, out[:filled], start, length)
        out[filled:] = self.feature.spec.pad

    def _frames(self, row: Row, out: np.ndarray, start: int, length: int) -> None:
        if self.grids is None:
            raise TypeError(f"{self.name} has no frames to align")
        stop, there = start + len(out), len(row)
        if self.grids.is_copy and stop <= there:
            row.fill(start, out)
            return
        kind = self.feature.kind
        first, last = self.grids.source_range(start, stop, there, kind)  # type: ignore[arg-type]
        align(kind, row[first:last], self.grids, length=length, start=start, stop=stop,  # type: ignore[arg-type]
              source_start=first, source_length=there, out=out)

    @staticmethod
    def _samples(row: Row, out: np.ndarray, start: int) -> None:
        """Samples as floats at full scale; zeros beyond the recording, whose last frame may reach over its end."""
        stored = row[start:start + len(out)]
        np.multiply(stored, np.float32(row.scale), out=out[:len(stored)])
        out[len(stored):] = 0


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
        self._members = [self._member(name) for name in dict.fromkeys(names)]
        self._keys = list(store.utterances) if utterances is None else list(utterances)
        hashes = hash_keys(self._keys)
        at = [member.feature.index.positions(hashes) for member in self._members]
        self._check_there(at)
        self._check_sources(at)
        self.lengths = self._lengths(grid, like, hashes)
        self._place = {key: number for number, key in enumerate(self._keys)}

    @property
    def names(self) -> list[str]:
        """The features, in the order asked for."""
        return [member.name for member in self._members]

    def length(self, utterance: str) -> int:
        """Frames of an utterance."""
        place = self._place.get(utterance)
        if place is None:
            raise MissingUtterance(f"the view has no utterance {utterance!r} ({nearest(utterance, self._keys)})")
        return int(self.lengths[place])

    def crop(self, utterance: str, *, start: int, frames: int) -> Batch:
        """Frames `[start, start + frames)`: (frames, D) or (frames,), of samples (frames * hop,), of global kind (D,).

        What lies beyond the end is the feature's pad value (a log-mel's floor, 0 elsewhere).
        """
        there = self._inside(utterance, start, frames)
        found = {}
        for member in self._members:
            found[member.name] = member.empty(frames)
            member.fill(utterance, found[member.name], start, there, self.length(utterance))
        return found

    def read_batch(self, items: Sequence[tuple[str, int]], *, frames: int, out: Batch | None = None) -> Batch:
        """Crops of `frames` frames from (utterance, start), a row each: `{feature: (B, frames, D)}` and `lengths` (B,).

        out: arrays of an earlier batch of that size, to be written over.
        """
        found = self._room(len(items), frames) if out is None else self._checked(out, len(items), frames)
        for number, (utterance, start) in enumerate(items):
            there = self._inside(utterance, start, frames)
            found[LENGTHS][number] = there
            for member in self._members:
                member.fill(utterance, found[member.name][number], start, there, self.length(utterance))
        return found

    def taps(self, utterance: str, name: str, frame: int) -> list[tuple[int, Fraction]]:
        """The stored frames that a frame of the view is made of, and their exact weights; the samples that it spans."""
        self._inside(utterance, frame, 1)
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

    def _member(self, name: str) -> _Member:
        feature = self._store.feature(name)
        if feature.kind == "global":
            return _Member(name, feature)
        if feature.frame_rate is None:
            raise BadRequest(f"{name} has no frame rate and cannot be in a view")
        if feature.kind == "samples":
            hop = feature.frame_rate / self.rate
            if hop.denominator != 1:
                raise BadRequest(f"{name} has {feature.frame_rate} samples per second and the view {self.rate} frames: "
                                 f"a frame would be {hop} samples. Samples are cut, never resampled: take a waveform "
                                 f"whose rate is a whole multiple, as in -f wave:24k, or another grid")
            return _Member(name, feature, hop=int(hop))
        timing: Timing = "centres" if feature.kind == "f0" else self.timing
        return _Member(name, feature, conversion(feature.frame_rate, self.rate, timing, feature.spec.centre_s,
                                                 self.centre_s))

    def _check_there(self, at: list[np.ndarray]) -> None:
        """MissingFeature names what is missing, for how many, before anything is read."""
        gaps = [f"{member.name} for {int((found < 0).sum()):,} of {len(found):,} utterances, such as "
                f"{self._keys[int(np.argmax(found < 0))]}"
                for member, found in zip(self._members, at, strict=True) if (found < 0).any()]
        if gaps:
            names = " ".join(f"-f {m.name}" for m, found in zip(self._members, at, strict=True) if (found < 0).any())
            raise MissingFeature(f"{self._store.path} lacks {'; '.join(gaps)}. Extract them: featstore extract CORPUS "
                                 f"{self._store.path} {names}; or give the utterances that have all (utterances=...)")

    def _check_sources(self, at: list[np.ndarray]) -> None:
        """StaleFeature where features of one utterance stem from different audio."""
        first: np.ndarray | None = None
        for member, found in zip(self._members, at, strict=True):
            sources = member.feature.index.records["source"][found]
            if first is None:
                first, of = sources.copy(), np.full(len(found), member.name, object)
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

    def _inside(self, utterance: str, start: int, frames: int) -> int:
        """How many of the frames asked for are there."""
        length = self.length(utterance)
        if frames < 1 or not 0 <= start < max(length, 1):
            raise ValueError(f"{utterance}: {frames} frames from {start} of {length}: expected at least one frame, and "
                             "a start inside the utterance")
        return min(frames, length - start)

    def _room(self, rows: int, frames: int) -> Batch:
        return {member.name: member.empty(frames, rows) for member in self._members} | {
            LENGTHS: np.empty(rows, np.int64)}

    def _checked(self, out: Batch, rows: int, frames: int) -> Batch:
        for name, array in self._room(rows, frames).items():
            given = out.get(name)
            if given is None or given.shape != array.shape or given.dtype != array.dtype:
                told = "nothing" if given is None else f"{given.dtype} {given.shape}"
                raise ValueError(f"out[{name!r}] is {told}; expected {array.dtype} {array.shape}")
        return out


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
