"""Smaller features: segments written anew with a lossless codec, or a feature NAME-int8 made of another.

Readers and writers may be at work. What is interrupted goes on with the next call, which does what is left.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .codecs import Encoding, named
from .compact import Compacted, steps
from .errors import BadRequest, CorruptSegment, IdentityMismatch
from .index import Collection, drop_replaced
from .int8 import SUFFIX, Outside, Quantiser, check, is_int8
from .row import Row
from .segment import Segment
from .spec import NAME
from .storage import Place
from .store import Feature, Store
from .upkeep import GRACE_S, checked
from .writer import Writer

_PIECE_BYTES = 256 << 10  # of frames at a time: what is worked out of them stays in the processor's caches


@dataclass(frozen=True)
class Loss:
    """How far int8 is from what it was made of, in dB below the signal: what varies about each channel's mean.

    snr_db: over all values. worst_db: of the channel that fares worst, `worst_channel`.
    """

    snr_db: float
    worst_db: float
    worst_channel: int


@dataclass(frozen=True)
class Refused:
    """An utterance with a value outside the frozen range, and which: nothing of it was stored."""

    utterance: str
    channel: int
    value: float
    low: float
    high: float


@dataclass
class Packed:
    """What `pack` did.

    feature: the one that was packed, or NAME-int8.
    done: utterances, or (lossless) segments, that were written. fresh: that were there already.
    read: bytes of frames gone through, as they are when decoded.
    before, after: bytes on disk, of NAME before and of what `feature` has now.
    loss: of what was written by this call; None for lossless codecs, or if nothing was.
    """

    feature: str
    codec: str
    done: int = 0
    fresh: int = 0
    read: int = 0
    before: int = 0
    after: int = 0
    elapsed_s: float = 0.0
    loss: Loss | None = None
    refused: list[Refused] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        """Of the size now to the size before."""
        return self.after / self.before if self.before else 1.0

    @property
    def rate(self) -> float:
        """Bytes of frames per second."""
        return self.read / self.elapsed_s if self.elapsed_s else 0.0


def pack(store: Store, name: str, codec: str, *, replace: bool = False,
         progress: Callable[[int, int], None] | None = None) -> Packed:
    """Store a feature (NAME or NAME@IDENTITY) with a codec: "zstd", "pcodec", "raw" or "int8".

    The first three lose nothing: name, identity and all rows stay as they are, and what is written later takes the
    same codec. The old segments go a day later, with `compact --purge`.
    "int8" makes NAME-int8, or brings it up to date: its scale and offset are those of the first call, for a range that
    is an eighth wider than that of the values that NAME had then.

    replace: with "int8", choose scale and offset anew for all that NAME has now. The old NAME-int8 is served until
        the new one is complete.
    progress: called with the bytes of frames done and in total.

    Raises:
        BadRequest: no such codec, or one that the feature's numbers or kind do not take.
        IdentityMismatch: NAME-int8 was made of another identity of NAME, or of something else.
        CorruptSegment: a row does not match its checksum; damage is not packed.
    """
    began = time.monotonic()
    store.refresh()
    feature = store.feature(name)
    if codec == "int8":
        done = _Int8(store, feature, replace, progress).go()
    elif replace:
        raise BadRequest(f"replace chooses another range for int8; {codec} loses nothing and has none")
    else:
        done = _losslessly(feature, named(codec, feature.stored_dtype), progress)
    done.elapsed_s = time.monotonic() - began
    store.refresh()
    return done


def _losslessly(feature: Feature, encoding: Encoding, progress: Callable[[int, int], None] | None) -> Packed:
    """As `compact` does it, by its rules for what others do meanwhile: small segments are merged on the way."""
    segments, copied = _standing(feature.folder), Compacted()
    todo = [segment for segment in segments if segment.codec != encoding.name]
    total = sum(segment.facts["bytes"] for segment in todo)
    for _ in steps(feature.folder, copied, purge=False, grace_s=GRACE_S, encoding=encoding) if todo else ():
        if progress is not None:
            progress(min(copied.copied, total), total)
    if copied.damages:
        damage = copied.damages[0]
        raise CorruptSegment(f"{damage.utterance or damage.segment}: {damage.reason}. The segments without damage are "
                             "packed")
    now = _standing(feature.folder)
    return Packed(feature.name, encoding.name, done=len(todo), fresh=len(segments) - len(todo), read=copied.copied,
                  before=_stored(segments), after=_stored(now))


def _standing(folder: Place) -> list[Segment]:
    """The segments with frames that no other replaces."""
    return [segment for segment in drop_replaced(Collection(folder).segments) if segment.facts["frames"]]


def _stored(segments: list[Segment]) -> int:
    return sum(segment.stored for segment in segments)


class _Int8:
    """One feature made into another of int8."""

    def __init__(self, store: Store, source: Feature, replace: bool,
                 progress: Callable[[int, int], None] | None) -> None:
        check(source.name, source.spec)
        self.name = source.name + SUFFIX
        if not NAME.fullmatch(self.name):
            raise BadRequest(f"{self.name} has {len(self.name)} characters, a feature's name at most 64: int8 needs a "
                             "shorter one")
        if not len(source):
            raise BadRequest(f"{source.name} has no utterances in {store.path}: there is nothing to pack")
        self.store, self.source, self.replace, self.progress = store, source, replace, progress
        records = source.index.records[source.index.live]
        self.records = records[np.lexsort((records["offset"], records["segment"]))]
        self.piece = max(1, _PIECE_BYTES // (source.stored_dtype.itemsize * max(1, source.dim)))
        self.done, self.total = 0, 0

    def go(self) -> Packed:
        held = self._held()
        self.total = 2 * self._bytes(self.records)  # once for the range, once for the values
        quantiser = self._range() if held is None else held.quantiser
        if quantiser is None:
            raise IdentityMismatch(f"{self.store.path}: {self.name} is no int8 feature")
        spec = quantiser.spec(self.source.spec)
        todo = self._todo(spec.identity[:16])
        self.total = self.done + self._bytes(todo)
        packed = Packed(self.name, "int8", fresh=len(self.records) - len(todo),
                        before=_stored(_standing(self.source.folder)))
        error = _Error(len(quantiser.scale))
        with self.store.writer() as writer:
            writer.declare(self.name, spec, replace=self.replace)
            folder = self.source.folder.parent.parent / self.name / spec.identity[:16]
            quantiser.save(folder, spec)
            for record in todo:
                self._put(writer, quantiser, Row(self.source, self.source.index.key(record), record), packed, error)
        packed.after = _stored(_standing(folder))
        packed.loss = error.loss()
        return packed

    def _held(self) -> Feature | None:
        """NAME-int8 if its range is to be kept; None where one is to be chosen."""
        held = self.store.features.get(self.name)
        if held is None or not held.segments or self.replace:
            return None
        if not is_int8(held.spec):
            raise IdentityMismatch(f"{self.store.path} has a {self.name} that is no int8 of {self.source.name}, but "
                                   f"{held.spec.made_by}. Nothing was changed; give it another name, or remove it")
        if held.spec.source != self.source.identity:
            raise IdentityMismatch(
                f"{self.store.path} has {self.name} of {self.source.name}@{str(held.spec.source)[:9]}; "
                f"{self.source.name} is now @{self.source.label}. Nothing was changed.\n"
                f"  replace:    add --replace (the old one is served until the new one is complete)")
        return held

    def _range(self) -> Quantiser:
        """From the least and the highest value of every channel."""
        dim = max(1, self.source.dim)
        low, high = np.full(dim, np.inf, np.float32), np.full(dim, -np.inf, np.float32)
        for record in self.records:
            for block in Row(self.source, self.source.index.key(record), record).blocks(self.piece):
                values = block.reshape(-1, dim).astype(np.float32)
                np.minimum(low, values.min(axis=0), out=low)
                np.maximum(high, values.max(axis=0), out=high)
            self._step(record)
        return Quantiser.covering(low, high, self.source.dtype)

    def _todo(self, short: str) -> np.ndarray:
        """The rows that NAME-int8 lacks, or has from other bytes."""
        if short not in self.store.identities(self.name):
            return self.records
        index = Feature(self.store, self.name, short).index
        at = index.positions(np.stack([self.records["hash"], self.records["tag"]], axis=1))
        if not len(index.records):
            return self.records
        found = index.records[at]
        same = (at >= 0) & (found["stamp"] == _stamp(self.records["checksum"].astype(np.uint64)))
        same &= found["scale"] == self.records["scale"]
        return self.records[~(same & (found["source"] == self.records["source"]).all(axis=1))]

    def _put(self, writer: Writer, quantiser: Quantiser, row: Row, packed: Packed, error: _Error) -> None:
        record = row.record
        part = error.fresh()

        def blocks() -> Iterator[np.ndarray]:
            for block in checked(row.blocks(self.piece), record, row.utterance, self.source.name):
                values = block.astype(np.float32)
                stored = quantiser.encode(values)
                part.add(values, stored, quantiser)
                yield stored

        try:
            writer.derive(row, self.name, blocks(), stamp=_stamp(int(record["checksum"])))
        except Outside as found:
            packed.refused.append(Refused(row.utterance, found.channel, found.value, found.low, found.high))
        else:
            packed.done += 1
            error.merge(part)
        packed.read += self._step(record)

    def _step(self, record: np.void) -> int:
        size = int(record["length"]) * self.source.stored_dtype.itemsize * max(1, self.source.dim)
        self.done += size
        if self.progress is not None and self.total:
            self.progress(min(self.done, self.total), self.total)
        return size

    def _bytes(self, records: np.ndarray) -> int:
        return int(records["length"].sum()) * self.source.stored_dtype.itemsize * max(1, self.source.dim)


class _Error:
    """Sums over all frames, per channel: of the values and of their squares about the offset, of squared errors."""

    def __init__(self, dim: int) -> None:
        self.count, self.sums = 0, np.zeros((3, dim))

    def fresh(self) -> _Error:
        return _Error(self.sums.shape[1])

    def merge(self, other: _Error) -> None:
        self.count += other.count
        self.sums += other.sums

    def add(self, values: np.ndarray, stored: np.ndarray, quantiser: Quantiser) -> None:
        """Count float32 values and the int8 that stands for them."""
        decoded = np.empty(stored.shape, quantiser.dtype)
        quantiser.decode(stored, decoded)
        dim = len(quantiser.scale)
        error = (decoded - values).reshape(-1, dim)
        about = values.reshape(-1, dim) - quantiser.offset
        self.count += len(about)
        for place, terms in enumerate((about, np.square(about), np.square(error))):
            self.sums[place] += terms.sum(axis=0, dtype=np.float64)

    def loss(self) -> Loss | None:
        if not self.count:
            return None
        total, squares, errors = self.sums
        signal = np.maximum(squares - total**2 / self.count, 0)
        varied = signal > 0
        if not varied.any():
            return None
        ratios = np.where(varied, _db(signal, errors), np.inf)
        return Loss(float(_db(signal.sum(), errors.sum())), float(ratios.min()), int(ratios.argmin()))


def _db(signal: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """Ratio of powers in dB; that of no noise is what 64-bit sums can tell, 300 dB."""
    least = np.maximum(np.asarray(noise), np.asarray(signal) * 1e-30)
    return 10 * np.log10(np.divide(signal, least, where=least > 0, out=np.ones_like(least)))


def _stamp(checksum: Any) -> Any:
    """What NAME-int8's rows keep of those they were made of: the checksum, and one bit more so that it is never 0."""
    return checksum | (1 << 32)
