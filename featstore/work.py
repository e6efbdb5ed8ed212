"""One utterance through every extractor that needs it: decoded once, resampled once per rate, cut into pieces if long.

Runs in worker processes, which know neither the store nor the plan; where devices compute, see `devices`.
"""

from __future__ import annotations

import multiprocessing
import os
import secrets
import sys
import threading
import time
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from multiprocessing import connection
from pathlib import Path
from typing import Any

import numpy as np

from . import audio, storage
from .errors import BadAudio, CannotLoad, DiskFull, FeatstoreError
from .spec import Extractor, Spec, longest_piece

SPOOL_BYTES = 16 << 20  # frames of one utterance beyond this go to a file, so that memory stays bounded
BLOCK_S = 20.0          # decoded at a time
SETTLED_S = 2.0         # a file younger than this when it is read is hashed again the next time

ManyRun = Any  # run(waves) -> one list of arrays per extractor
Pass = tuple[str, ...]  # names that share a forward pass


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

    deferred: names whose waveforms are handed back in `Made.waves` instead (they run on a device, see `devices`).
    threads: of torch in this process; None leaves them as they are.
    specs: what extractors with weights are stored as: weights that are others by the time they are loaded are refused.
    """

    def __init__(self, extractors: Mapping[str, Extractor], device: str, spool: Path, deferred: Sequence[str] = (),
                 threads: int | None = None, specs: Mapping[str, Spec] | None = None) -> None:
        self.extractors, self.device, self.spool, self.deferred = extractors, device, spool, frozenset(deferred)
        self.threads, self.specs = threads, specs or {}
        here = {name: extractor for name, extractor in extractors.items() if name not in self.deferred}
        self._passes = {name: names for names in passes(here) for name in names}
        self._runs: dict[Pass, ManyRun] = {}

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

    def run(self, names: Pass, waves: list[np.ndarray]) -> list[list[np.ndarray]]:
        """One forward pass over `waves`: one list of arrays per name."""
        self.load(names)
        outputs: list[list[np.ndarray]] = self._runs[names](waves)
        return outputs

    def load(self, names: Pass) -> None:
        """Make a pass ready. CannotLoad says what is missing."""
        if names in self._runs:
            return
        try:
            run = self._loaded(names)
            self._unchanged(names)
        except Exception as error:  # whatever it is, it would be the same for every utterance
            plain = isinstance(error, ImportError | OSError | ValueError | RuntimeError) and str(error)
            raise CannotLoad(f"{', '.join(names)} cannot be loaded: {error if plain else reason(error)}") from error
        self._runs[names] = run
        if "torch" in sys.modules and self.threads is not None:
            sys.modules["torch"].set_num_threads(self.threads)

    def unload(self, but: Pass = ()) -> bool:
        """Let go of all passes that are loaded, except one; whether there were any."""
        others = self._runs.keys() - {but}
        for names in others:
            del self._runs[names]
        return bool(others)

    def _unchanged(self, names: Pass) -> None:
        """ValueError if what has just been loaded is not what the run's plan saw: it would be stored under its name."""
        for name in self.specs.keys() & set(names):
            if differs := self.specs[name].differs(Spec.of(self.extractors[name])):
                raise ValueError(f"its weights were replaced after the run began (other {', '.join(differs)}). What "
                                 "was stored before is right; run the same command again")

    def _loaded(self, names: Pass) -> ManyRun:
        extractors: list[Any] = [self.extractors[name] for name in names]
        if _together(extractors[0]) is not None:
            return type(extractors[0]).load_together(extractors, self.device)
        single = extractors[0].load(self.device)
        return lambda waves: [single(waves)]

    def passes(self, names: Iterable[str]) -> list[Pass]:
        """The passes that give `names`: always those of all extractors, so that none is loaded in two forms."""
        return list(dict.fromkeys(self._passes[name] for name in names))

    def _extract(self, task: Task, made: Made) -> None:
        here = [name for name in task.names if name not in self.deferred]
        rates = {self.extractors[name].sample_rate for name in task.names}
        with audio.Reader(task.path, task.start_s, task.end_s, block_s=BLOCK_S) as reader:
            resamplers = {rate: audio.Resampler(reader.sample_rate, rate) for rate in rates}
            cutters = {names: Cutter(self.extractors[names[0]]) for names in self.passes(here)}
            collected = {names: Collected(self, names, made) for names in cutters}
            waves = {self.extractors[name].sample_rate: Frames(np.dtype(np.float32), ())
                     for name in task.names if name in self.deferred}
            for block, last in with_last(reader):
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


class Collected:
    """The frames of one forward pass, piece after piece: those of the features that the task asks for."""

    def __init__(self, bench: Workbench, names: Pass, made: Made) -> None:
        self.bench, self.names, self.made = bench, names, made
        self._wanted = [name for name in names if name in made.task.names]
        self._parts: dict[str, list[np.ndarray]] = {name: [] for name in self._wanted}  # of kind "global"
        self._samples: list[int] = []
        self._failed = False

    def add(self, piece: Piece) -> None:
        """Run the pass over the next piece."""
        if self._failed:
            return
        try:
            arrays = [found for found, in self.bench.run(self.names, [piece.wave])]
        except CannotLoad:
            raise
        except Exception as error:  # whatever an extractor does wrong costs this feature of this utterance
            seconds = len(piece.wave) / self.bench.extractors[self.names[0]].sample_rate
            return self._fail(too_large("cpu", seconds) if out_of_memory(error) else reason(error))
        self.take(piece, arrays)

    def take(self, piece: Piece, found: Sequence[np.ndarray] | str) -> None:
        """The arrays of the next piece, one per name of the pass, or why there are none."""
        if self._failed:
            return
        if isinstance(found, str):
            self._fail(found)
            return
        self._samples.append(piece.samples)
        for name, array in zip(self.names, found, strict=True):
            if name not in self._wanted:
                continue
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
                self._fail(reason(error))
                return
            self.made.frames[name] = Frames(whole.dtype, whole.shape, [whole[None]], rows=1)

    def _fail(self, why: str) -> None:
        self._failed = True
        for name in self._wanted:
            self.made.failures[name] = why
            frames = self.made.frames.pop(name, None)
            if frames is not None:
                frames.drop()


def start(extractors: Mapping[str, Extractor], spool: Path, deferred: Sequence[str], specs: Mapping[str, Spec],
          threads: int) -> None:
    """Begin a worker process. It ends with the process that started it, even if that is killed."""
    import signal

    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that commits
    global _bench
    _bench = Workbench(extractors, "cpu", spool, deferred, threads, specs)


def _end_with(sentinel: int) -> None:
    connection.wait([sentinel])
    os._exit(1)


def work(tasks: Sequence[Task]) -> list[Made]:
    """`Workbench.make` in a worker process."""
    if _bench is None:
        raise RuntimeError("a worker process got a task before it was started")
    return [_bench.make(task) for task in tasks]


_bench: Workbench | None = None


def passes(extractors: Mapping[str, Extractor]) -> list[Pass]:
    """The names in groups that share a forward pass, in their order."""
    groups: dict[Hashable, list[str]] = {}
    for name, extractor in extractors.items():
        shared = _together(extractor)
        key = name if shared is None else (type(extractor), shared, getattr(extractor, "window", None))
        groups.setdefault(key, []).append(name)
    return [tuple(group) for group in groups.values()]


def reason(error: Exception) -> str:
    """ValueError is the protocol's word for a waveform that cannot be used; others name themselves."""
    return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"


def out_of_memory(error: BaseException | None) -> bool:
    """Whether `error` says that memory ran out: Python's own, or one of torch's, which need not be imported here."""
    said = str(error).lower()
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or (
        isinstance(error, RuntimeError) and any(words in said for words in
                                                ("out of memory", "can't allocate memory", "alloc_failed")))


def too_large(device: str, seconds: float) -> str:
    """Why there are no frames of a piece that does not fit even alone."""
    instead = "with fewer --workers" if device == "cpu" else "on a larger device or with --device cpu"
    return (f"{device} has too little memory for a piece of {seconds:.1f} s alone: run it {instead}, or with a smaller "
            "model; where the extractor takes recordings whole, cut them (scan --slice)")


def with_last(blocks: Iterable[np.ndarray]) -> Iterator[tuple[np.ndarray, bool]]:
    """Each block, and whether it is the last."""
    held: np.ndarray | None = None
    for block in blocks:
        if held is not None:
            yield held, False
        held = block
    if held is not None:
        yield held, True


def _together(extractor: Extractor) -> Hashable:
    return getattr(extractor, "together", None)


@lru_cache(maxsize=256)
def _digest(path: str, size: int, mtime_ns: int) -> bytes:
    """Many cuts of one recording hash it once."""
    return audio.file_digest(path)
