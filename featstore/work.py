"""One utterance through every extractor that needs it: decoded once, resampled once per rate, cut into pieces if long.

Runs in worker processes, which know neither the store nor the plan.
"""

from __future__ import annotations

import os
import secrets
import sys
import time
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from . import audio, storage
from .errors import BadAudio, CannotLoad, DiskFull, FeatstoreError
from .spec import Extractor, longest_piece

SPOOL_BYTES = 16 << 20  # frames of one utterance beyond this go to a file, so that memory stays bounded
BLOCK_S = 20.0          # decoded at a time
SETTLED_S = 2.0         # a file younger than this when it is read is hashed again the next time

ManyRun = Any  # run(waves) -> one list of arrays per extractor


@dataclass(frozen=True)
class Task:
    """An utterance and the features to make of it."""

    key: str
    path: str
    start_s: float
    end_s: float | None
    names: tuple[str, ...]
    seconds: float = 0.0  # about how long it is


@dataclass
class Frames:
    """Frames of one feature, in memory or in a spool file that is removed when they have been read."""

    dtype: np.dtype
    tail: tuple[int, ...]
    arrays: list[np.ndarray] = field(default_factory=list)
    path: str | None = None
    peak: float = 0.0
    rows: int = 0

    def add(self, frames: np.ndarray, spool: Path) -> None:
        """Take a piece; too many bytes move to the disk."""
        self.rows += len(frames)
        if frames.size:
            self.peak = max(self.peak, float(frames.max()), -float(frames.min()))
        self.arrays.append(frames)
        if sum(array.nbytes for array in self.arrays) > SPOOL_BYTES:
            self.path = self.path or str(spool / secrets.token_hex(8))
            with storage.disk_room(spool):
                spool.mkdir(parents=True, exist_ok=True)
                with Path(self.path).open("ab") as file:
                    for array in self.arrays:
                        file.write(np.ascontiguousarray(array).data)
            self.arrays = []

    def blocks(self, keep: bool = False) -> Iterator[np.ndarray]:
        """All frames in order; unless `keep`, once: the spool file goes."""
        if self.path is not None:
            row = int(self.dtype.itemsize * np.prod(self.tail, dtype=np.int64))
            with Path(self.path).open("rb") as file:
                while data := file.read(max(1, (1 << 22) // row) * row):
                    yield np.frombuffer(data, self.dtype).reshape(-1, *self.tail)
            if not keep:
                self.drop()
        yield from self.arrays

    def drop(self) -> None:
        """Remove the spool file, if there is one."""
        if self.path is not None:
            Path(self.path).unlink(missing_ok=True)


@dataclass
class Made:
    """What came of a task. `failures`: feature (None: the recording itself) -> reason."""

    task: Task
    source: bytes = b""
    size: int = 0
    mtime_ns: int = 0
    settled: bool = False     # the file is old enough for its time to tell whether it changed
    facts: dict[str, Any] = field(default_factory=dict)
    frames: dict[str, Frames] = field(default_factory=dict)
    waves: dict[int, Frames] = field(default_factory=dict)  # for extractors that run elsewhere, by sample rate
    failures: dict[str | None, str] = field(default_factory=dict)

    def drop(self) -> None:
        for frames in (*self.frames.values(), *self.waves.values()):
            frames.drop()


class Workbench:
    """Extractors, each loaded when first needed, applied to one utterance after the other.

    deferred: names whose waveforms are handed back in `Made.waves` instead (for a device that only one process has).
    """

    def __init__(self, extractors: Mapping[str, Extractor], device: str, spool: Path,
                 deferred: Sequence[str] = ()) -> None:
        self.extractors, self.device, self.spool, self.deferred = extractors, device, spool, frozenset(deferred)
        self._runs: dict[tuple[str, ...], ManyRun] = {}

    def make(self, task: Task) -> Made:
        """Decode, resample and extract; whatever is wrong with the audio or an extractor comes back as a reason."""
        made = Made(task)
        try:
            before = Path(task.path).stat()
            made.source = audio.source_digest(_digest(task.path, before.st_size, before.st_mtime_ns),
                                              task.start_s, task.end_s)
            self._extract(task, made)
            after = Path(task.path).stat()
            if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
                raise BadAudio("changed while it was being read; run the same command again")
            made.size, made.mtime_ns = after.st_size, after.st_mtime_ns
            made.settled = time.time() - after.st_mtime > SETTLED_S
        except (CannotLoad, DiskFull):
            raise  # the run cannot go on
        except FeatstoreError as error:
            made.failures[None] = str(error)
        except FileNotFoundError:
            made.failures[None] = "the file does not exist"
        except OSError as error:
            made.failures[None] = f"cannot be read: {error.strerror or error}"
        if None in made.failures:
            made.drop()
            made.frames, made.waves = {}, {}
        return made

    def run(self, names: tuple[str, ...], waves: list[np.ndarray]) -> list[list[np.ndarray]]:
        """One forward pass over `waves`: one list of arrays per name."""
        if names not in self._runs:
            self._runs[names] = self._load(names)
        outputs: list[list[np.ndarray]] = self._runs[names](waves)
        return outputs

    def _load(self, names: tuple[str, ...]) -> ManyRun:
        extractors: list[Any] = [self.extractors[name] for name in names]
        try:
            if _together(extractors[0]) is not None:
                run = type(extractors[0]).load_together(extractors, self.device)
            else:
                single = extractors[0].load(self.device)

                def run(batch: list[np.ndarray]) -> list[list[np.ndarray]]:
                    return [single(batch)]
        except (ImportError, OSError, ValueError, RuntimeError) as error:
            raise CannotLoad(f"{', '.join(names)} cannot be loaded: {error}") from error
        if "torch" in sys.modules and self.device == "cpu" and os.environ.get("OMP_NUM_THREADS") == "1":
            sys.modules["torch"].set_num_threads(1)  # one core per worker process
        return run

    def passes(self, names: Iterable[str]) -> list[tuple[str, ...]]:
        """The names in groups that share a forward pass."""
        groups: dict[Hashable, list[str]] = {}
        for name in names:
            extractor = self.extractors[name]
            shared = _together(extractor)
            key = (type(extractor), shared) if shared is not None else name
            groups.setdefault(key, []).append(name)
        return [tuple(group) for group in groups.values()]

    def _extract(self, task: Task, made: Made) -> None:
        here = [name for name in task.names if name not in self.deferred]
        rates = {self.extractors[name].sample_rate for name in task.names}
        with audio.Reader(task.path, task.start_s, task.end_s, block_s=BLOCK_S) as reader:
            resamplers = {rate: audio.Resampler(reader.sample_rate, rate) for rate in rates}
            cutters = {names: Cutter(self.extractors[names[0]]) for names in self.passes(here)}
            collected: dict[tuple[str, ...], _Collected] = {names: _Collected(self, names, made) for names in cutters}
            waves = {self.extractors[name].sample_rate: Frames(np.dtype(np.float32), ())
                     for name in task.names if name in self.deferred}
            for block, last in _with_last(reader):
                for rate, resampler in resamplers.items():
                    wave = resampler.push(block, last)
                    if rate in waves:
                        waves[rate].add(wave, self.spool)
                    for names, cutter in cutters.items():
                        if self.extractors[names[0]].sample_rate == rate:
                            for piece in cutter.push(wave, last):
                                collected[names].add(piece)
            for done in collected.values():
                done.finish()
            made.waves = waves
            made.facts = {"sample_rate": reader.sample_rate, "channels": reader.channels, "flags": list(reader.flags),
                          "duration_s": reader.samples / reader.sample_rate}


@dataclass(frozen=True)
class Piece:
    """A stretch of waveform and which of its frames count: `[skip, skip + count)`, to the end if count is None."""

    wave: np.ndarray
    skip: int
    count: int | None
    samples: int  # of the stretch, without context


class Cutter:
    """Cuts a waveform that arrives in blocks into the pieces that an extractor's `window` asks for.

    Piece k stands for samples [k core, (k + 1) core) and carries `context` more on either side. It is the last, and
    takes all that is left, if that fits in `longest` together with its left context; audio of at most `longest` samples
    is one piece. None is longer.
    """

    def __init__(self, extractor: Extractor) -> None:
        window: Sequence[int] | None = getattr(extractor, "window", None)
        self.core, self.context = window[:2] if window else (0, 0)
        self.longest = longest_piece(window) if window else 0
        self._rate = extractor.frame_rate / extractor.sample_rate if extractor.frame_rate is not None else 0
        self._held: list[np.ndarray] = []
        self._first = self._seen = self._number = 0  # sample that _held begins with; samples so far; next piece

    def push(self, wave: np.ndarray, last: bool) -> Iterator[Piece]:
        """The pieces that are complete now."""
        self._held.append(wave)
        self._seen += len(wave)
        while self.core and self._seen > self._begin() + self.longest:  # it is certain that another follows
            yield self._cut(self._number * self.core, (self._number + 1) * self.core)
            self._number += 1
        if last:
            yield self._cut(self._number * self.core, None)

    def _begin(self) -> int:
        """The sample with which the left context of the next piece begins."""
        return max(self._number * self.core - self.context, 0)

    def _cut(self, start: int, stop: int | None) -> Piece:
        held = self._held[0] if len(self._held) == 1 else np.concatenate(self._held)
        begin = self._begin()
        wave = held[begin - self._first:None if stop is None else stop + self.context - self._first]
        if stop is not None:
            keep = max(stop - self.context, 0)
            self._held, self._first = [held[keep - self._first:]], keep
        skip = int((start - begin) * self._rate)
        count = None if stop is None else int((stop - start) * self._rate)
        return Piece(wave, skip, count, (self._seen if stop is None else stop) - start)


class _Collected:
    """The frames of one forward pass, piece after piece."""

    def __init__(self, bench: Workbench, names: tuple[str, ...], made: Made) -> None:
        self.bench, self.names, self.made = bench, names, made
        self._parts: dict[str, list[np.ndarray]] = {name: [] for name in names}  # of kind "global"
        self._samples: list[int] = []
        self._failed = False

    def add(self, piece: Piece) -> None:
        if self._failed:
            return
        try:
            outputs = self.bench.run(self.names, [piece.wave])
        except CannotLoad:
            raise
        except Exception as error:  # whatever an extractor does wrong costs this feature of this utterance
            return self._fail(_reason(error))
        self._take(piece, [arrays[0] for arrays in outputs])

    def take_or_fail(self, piece: Piece, found: Sequence[np.ndarray] | str) -> None:
        """The arrays of a piece, one per name, or why there are none."""
        if isinstance(found, str):
            self._fail(found)
        elif not self._failed:
            self._take(piece, found)

    def _take(self, piece: Piece, arrays: Sequence[np.ndarray]) -> None:
        self._samples.append(piece.samples)
        for name, array in zip(self.names, arrays, strict=True):
            if self.bench.extractors[name].kind == "global":
                self._parts[name].append(array)
                continue
            stop = None if piece.count is None else piece.skip + piece.count
            kept = array[piece.skip:stop]
            if piece.count is not None and len(kept) != piece.count:
                self._fail(f"{name} gave {len(array)} frames for {len(piece.wave)} samples, too few for its window")
                return
            if name not in self.made.frames:
                self.made.frames[name] = Frames(kept.dtype, kept.shape[1:])
            self.made.frames[name].add(kept, self.bench.spool)

    def finish(self) -> None:
        """Put together what comes one per utterance."""
        for name, parts in self._parts.items():
            if not parts or self._failed:
                continue
            extractor: Any = self.bench.extractors[name]
            try:
                whole = extractor.combine(parts, self._samples) if hasattr(extractor, "combine") else parts[0]
            except Exception as error:
                self._fail(_reason(error))
                return
            self.made.frames[name] = Frames(whole.dtype, whole.shape, [whole[None]], rows=1)

    def _fail(self, reason: str) -> None:
        self._failed = True
        for name in self.names:
            self.made.failures[name] = reason
            frames = self.made.frames.pop(name, None)
            if frames is not None:
                frames.drop()


class Batcher:
    """Runs what a device does for many utterances at once: pieces of like length in one batch, budgeted with padding.

    `add` hands back the utterances that are complete; `flush` the rest.
    """

    def __init__(self, bench: Workbench, budget_s: float = 240.0, most: int = 32) -> None:
        self.bench, self.budget_s, self.most = bench, budget_s, most
        self._queues: dict[tuple[str, ...], list[tuple[_Collected, Piece]]] = {}
        self._waiting: list[tuple[Made, list[_Collected]]] = []
        self._held_s = 0.0

    def add(self, made: Made) -> list[Made]:
        """Take an utterance's waveforms; run what has gathered when it is enough."""
        collected = []
        for names in self.bench.passes(name for name in made.task.names if name in self.bench.deferred):
            extractor = self.bench.extractors[names[0]]
            if extractor.sample_rate not in made.waves:
                continue
            taken, cutter = _Collected(self.bench, names, made), Cutter(extractor)
            collected.append(taken)
            for block, last in _with_last(made.waves[extractor.sample_rate].blocks(keep=True)):
                for piece in cutter.push(block, last):
                    self._queues.setdefault(names, []).append((taken, piece))
                    self._held_s += len(piece.wave) / extractor.sample_rate
                if self._held_s >= self.budget_s * 4:
                    self._run_all()
        made_waves, made.waves = made.waves, {}
        for wave in made_waves.values():
            wave.drop()
        self._waiting.append((made, collected))
        return self.flush() if self._held_s >= self.budget_s * 4 else []

    def flush(self) -> list[Made]:
        """Run everything that waits."""
        self._run_all()
        done, self._waiting = self._waiting, []
        for _, collected in done:
            for taken in collected:
                taken.finish()
        return [made for made, _ in done]

    def _run_all(self) -> None:
        queues, self._queues, self._held_s = self._queues, {}, 0.0
        for names, queue in queues.items():
            outputs: dict[int, list[np.ndarray] | str] = {}
            for batch in self._batches(names, queue):
                outputs |= self._outputs(names, queue, batch)
            for i, (taken, piece) in enumerate(queue):  # in the order they came: pieces of one utterance follow
                taken.take_or_fail(piece, outputs[i])

    def _batches(self, names: tuple[str, ...], queue: list[tuple[_Collected, Piece]]) -> Iterator[list[int]]:
        """Positions in the queue, shortest first, as many as the padded budget takes."""
        rate = self.bench.extractors[names[0]].sample_rate
        batch: list[int] = []
        for i in sorted(range(len(queue)), key=lambda i: len(queue[i][1].wave)):
            longest_s = len(queue[i][1].wave) / rate
            if batch and (longest_s * (len(batch) + 1) > self.budget_s or len(batch) == self.most):
                yield batch
                batch = []
            batch.append(i)
        if batch:
            yield batch

    def _outputs(self, names: tuple[str, ...], queue: list[tuple[_Collected, Piece]],
                 batch: list[int]) -> dict[int, list[np.ndarray] | str]:
        """Arrays per name, or the reason why not, for each position; a batch that fails is run one by one."""
        try:
            arrays = self.bench.run(names, [queue[i][1].wave for i in batch])
        except CannotLoad:
            raise
        except Exception as error:
            if len(batch) == 1:
                return {batch[0]: _reason(error)}
            return {i: found for one in batch for i, found in self._outputs(names, queue, [one]).items()}
        return {i: [per_name[j] for per_name in arrays] for j, i in enumerate(batch)}


def start(extractors: Mapping[str, Extractor], device: str, spool: Path, deferred: Sequence[str]) -> None:
    """Begin a worker process."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that commits
    global _bench
    _bench = Workbench(extractors, device, spool, deferred)


def work(tasks: Sequence[Task]) -> list[Made]:
    """`Workbench.make` in a worker process."""
    if _bench is None:
        raise RuntimeError("a worker process got a task before it was started")
    return [_bench.make(task) for task in tasks]


_bench: Workbench | None = None


def _reason(error: Exception) -> str:
    """ValueError is the protocol's word for a waveform that cannot be used; others name themselves."""
    return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"


def _together(extractor: Extractor) -> Hashable:
    return getattr(extractor, "together", None)


@lru_cache(maxsize=256)
def _digest(path: str, size: int, mtime_ns: int) -> bytes:
    """Many cuts of one recording hash it once."""
    return audio.file_digest(path)


def _with_last(blocks: Iterable[np.ndarray]) -> Iterator[tuple[np.ndarray, bool]]:
    held: np.ndarray | None = None
    for block in blocks:
        if held is not None:
            yield held, False
        held = block
    if held is not None:
        yield held, True
