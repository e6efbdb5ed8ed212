"""One utterance's feature, read on demand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import CorruptSegment, StaleFeature
from .segment import BLOCK_BYTES, Segment

if TYPE_CHECKING:
    from .store import Feature

SAME = ["generation", "length", "checksum"]  # of two records of one key: they hold the same array


class Row:
    """One utterance's feature, read on demand: `row[100:200]` touches only those frames.

    Arrays come as stored: `(T, D)`, `(T,)` where the spec's dim is 0, `(D,)` for kind "global"; those of a feature that
    `pack` made int8 come as values of the type that it was made from. `scale` is 1 but for waveforms that exceed full
    scale: stored x scale = value.

    segments: those that the record counts, where they are not the ones of the feature's index.
    """

    def __init__(self, feature: Feature, key: str, record: np.void, segments: Sequence[Segment] | None = None) -> None:
        self.feature, self.utterance, self.record = feature, key, record
        self._segment = (feature.index.segments if segments is None else segments)[int(record["segment"])]
        self._offset = int(record["offset"])
        self.dtype = feature.dtype
        self.scale = float(record["scale"])
        channels = feature.channels
        self.shape: tuple[int, ...] = channels if feature.kind == "global" else (int(record["length"]), *channels)

    @property
    def source(self) -> str:
        """SHA-256 that names the audio it was made from; zeros if it was not made from audio."""
        return self.record["source"].tobytes().hex()

    def read(self, *, check: bool = False) -> np.ndarray:
        """The whole array. With `check`, its checksum too: CorruptSegment names the utterance if it does not match."""
        if check and self._checksum() != int(self.record["checksum"]):
            raise CorruptSegment(f"{self.utterance}: {self.feature.name} does not match its checksum: its bytes in "
                                 f"{self._segment.folder} changed after they were written. "
                                 "featstore verify STORE --repair gives it up; extract makes it again.")
        frames = self._frames(0, int(self.record["length"]))
        return frames[0] if self.feature.kind == "global" else frames

    def as_float(self) -> np.ndarray:
        """The whole array as float32, `scale` applied."""
        return self.read().astype(np.float32) * np.float32(self.scale)

    def blocks(self, frames: int | None = None) -> Iterator[np.ndarray]:
        """The frames in pieces of at most `frames` (None: of about 8 MiB), for what does not fit in memory."""
        return (self.feature.decoded(block) for block in self.stored(frames))

    def stored(self, frames: int | None = None) -> Iterator[np.ndarray]:
        """The pieces as they are on disk: of an int8 feature its int8."""
        feature, length = self.feature, int(self.record["length"])
        frames = frames or max(1, BLOCK_BYTES // (feature.stored_dtype.itemsize * max(1, feature.dim)))
        for start in range(0, length, frames):
            out = np.empty((min(frames, length - start), *feature.channels), feature.stored_dtype)
            self._read(start, out)
            yield out

    def __len__(self) -> int:
        return self.shape[0] if self.shape else 1

    def __getitem__(self, item: Any) -> Any:
        if type(item) is slice and item.step is None and self.feature.kind != "global":  # what a crop asks for
            start, stop, _ = item.indices(self.shape[0])
            return self._frames(start, max(start, stop))
        first, rest = (item[0], item[1:]) if isinstance(item, tuple) and item else (item, ())
        if self.feature.kind == "global" or not isinstance(first, slice):
            return self.read()[item]
        start, stop, step = first.indices(len(self))
        if step < 0:
            return self.read()[item]
        frames = self._frames(start, max(start, stop))
        return frames[(slice(None, None, step), *rest)]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self.read().astype(dtype, copy=False) if dtype is not None else self.read()

    def __repr__(self) -> str:
        return f"<{self.feature.name} of {self.utterance}: {self.shape} {self.dtype}>"

    def fill(self, start: int, out: np.ndarray) -> None:
        """Read frames `[start, start + len(out))` into a contiguous array of the row's type."""
        quantiser = self.feature.quantiser
        if quantiser is None:
            self._read(start, out)
        else:
            stored = np.empty(out.shape, np.int8)
            self._read(start, stored)
            quantiser.decode(stored, out)

    def _read(self, start: int, out: np.ndarray) -> None:
        """As `fill`, of what is on disk."""
        try:
            self._segment.read(self._offset + start, out)
        except FileNotFoundError:  # compacted away since the snapshot was taken: look once more
            self._look_again()
            self._segment.read(self._offset + start, out)

    def _checksum(self) -> int:
        try:
            return self._segment.checksum(self.record)
        except FileNotFoundError:
            self._look_again()
            return self._segment.checksum(self.record)

    def _look_again(self) -> None:
        now = self.feature.look_again(self.utterance, self._segment)
        if now.record[SAME] != self.record[SAME] or now.source != self.source:
            raise StaleFeature(f"{self.utterance}: {self.feature.name} was written anew since the store was "
                               "opened, and the old one removed; open the store again")
        self.record, self._segment, self._offset = now.record, now._segment, now._offset

    def _frames(self, start: int, stop: int) -> np.ndarray:
        out = np.empty((stop - start, *self.feature.channels), self.dtype)
        self.fill(start, out)
        return out
