"""The main job: plan -> decode -> extract -> write -> commit, each stage ahead of the next, resumed from any end."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from . import memory, shares, storage
from .corpus import Corpus
from .devices import Devices, names_of
from .errors import BadRequest, DiskFull, FeatstoreError
from .plan import Failure, Plan, plan, record_of, stamp
from .spec import Extractor
from .storage import Place
from .store import COMMIT_S, Store
from .work import Frames, Made, Task, Workbench, passes, start, work
from .writer import Writer

AHEAD = 2           # bundles of tasks under way per worker
BUNDLE_S, BUNDLE = 8.0, 4  # audio and utterances that go to a worker at once: short ones cost more to send than to do
TICK_S = 1.0        # how often commits, progress and interruption are looked at while nothing is finished
HEADROOM = 64 << 20  # bytes beyond the estimate that must be free
LIBRARIES = ("numpy", "soundfile", "soxr", "librosa", "pyworld", "swift-f0", "onnxruntime", "torch", "transformers")


@dataclass(frozen=True)
class Progress:
    """How far an extraction is. `audio_s` counts utterances that are done; `stopping`: Ctrl-C was pressed once."""

    done: int
    total: int
    audio_s: float
    audio_total_s: float
    failures: int
    elapsed_s: float
    stopping: bool = False

    @property
    def real_time_factor(self) -> float:
        """Seconds of work per second of audio."""
        return self.elapsed_s / self.audio_s if self.audio_s else float("nan")

    @property
    def left_s(self) -> float:
        """Seconds left at the pace so far."""
        return max(0.0, self.audio_total_s - self.audio_s) * self.real_time_factor


@dataclass
class Report:
    """What an extraction did.

    flags: what may be wrong with recordings that were stored (see `audio.Reader`).
    to_use: NAME@IDENTITY of what `featstore use` is to move names to, once every shard is done.
    """

    utterances: int = 0
    done: int = 0
    fresh: int = 0
    failures: list[Failure] = field(default_factory=list)
    flags: dict[str, list[str]] = field(default_factory=dict)
    audio_s: float = 0.0
    elapsed_s: float = 0.0
    interrupted: bool = False
    ok: bool = True
    to_use: list[str] = field(default_factory=list)


def extract(corpus: Corpus, store: Store, extractors: Mapping[str, Extractor], *, replace: bool = False,
            device: str = "cpu", workers: int | None = None, commit_every_s: float = COMMIT_S,
            allow_failures: int | str = 0, strict: bool = False, rehash: bool = False,
            shard: tuple[int, int] | None = None, progress: Callable[[Progress], None] | None = None) -> Report:
    """Bring `extractors`' features of all utterances up to date; what is fresh is left alone.

    replace: give names that stand for other settings to these; the old ones are served until all is done.
    device: where extractors that gain from it run: "cpu", "cuda", "cuda:0,1", "mps".
    workers: processes that decode and extract; None for one per core, or as many as the encoders' weights leave room
        for; 0 for none beside this one.
    allow_failures: utterances (or a share such as "5%") that may fail with `Report.ok` still true.
    strict: stop at the first failure.
    rehash: do not trust files' sizes and times.
    shard: (i, n) does the i-th of n parts of the corpus (`shares.shard`), i from 1. With `replace` the names then stay
        where they are; `Report.to_use` says what they go to once all shards are done.

    A recording that cannot be used costs one entry in `Report.failures`, also kept in `<store>.failures.jsonl`. Ctrl-C
    commits what is done and returns with `Report.interrupted`; a killed run loses at most one commit interval, and the
    same call goes on from there.

    Raises:
        IdentityMismatch: a name stands for other settings and `replace` is not given; before any work.
        DiskFull: the disk cannot suffice (before any work), or did not.
        CannotLoad: an extractor's package or weights are missing, or the device is.
    """
    devices = names_of(device)
    corpus = corpus if shard is None else shares.shard(corpus, *shard)
    allowed = allowance(allow_failures, len(corpus))
    store.refresh()
    known = failures(store)
    todo = plan(corpus, store, extractors, replace=replace, rehash=rehash, failures=known)
    if todo.bytes_needed and todo.bytes_free is not None and todo.bytes_needed + HEADROOM > todo.bytes_free:
        raise DiskFull(f"{store.path} needs about {todo.bytes_needed / 1e9:.2f} GB more and "
                       f"{todo.bytes_free / 1e9:.2f} GB are free. Nothing was written; free some room or put the store "
                       "on another disk.")
    run = _Run(todo, store, extractors, devices, _workers(workers, extractors), commit_every_s, strict, progress)
    try:
        report = run.go(replace, moved=shard is None)
    finally:
        remember(store, known, run.report.failures)
    report.ok = len({failure.utterance for failure in report.failures}) <= allowed
    return report


def allowance(allow: int | str, utterances: int) -> int:
    """How many utterances may fail: a number, or a share such as "5%"."""
    text = str(allow)
    try:
        number = float(text[:-1]) / 100 * utterances if text.endswith("%") else int(text)
    except ValueError:
        number = -1
    if number < 0:
        raise BadRequest(f"allowed failures {allow!r}: expected a number of utterances or a share such as 5%")
    return int(number)


def failures(store: Store) -> list[Failure]:
    """What failed and was not stored since, from `<store>.failures.jsonl`."""
    found: dict[tuple[str, str | None], Failure] = {}
    path = _failures_path(store)
    for line in path.read_bytes().decode("utf-8", "replace").splitlines() if path.exists() else ():
        try:
            failure = Failure(**json.loads(line))
        except (ValueError, TypeError):
            continue  # the end of a killed run
        found[failure.utterance, failure.feature] = failure
    return [failure for failure in found.values() if not _stored_since(store, failure)]


def remember(store: Store, before: list[Failure], now: list[Failure]) -> None:
    """Append the failures that are not in `<store>.failures.jsonl` yet; several runs may, at once."""
    known = set(before)
    lines = [json.dumps(asdict(failure), ensure_ascii=True) + "\n" for failure in now if failure not in known]
    if lines:
        storage.append(_failures_path(store), "".join(lines).encode())


def forget(store: Store, utterances: Collection[str], speaker: str | None = None) -> int:
    """Take what `<store>.failures.jsonl` tells of some utterances, or of a speaker, out of it. Returns the lines.

    Where a line does not say whose recording it is (a file that is none), it goes if it has the speaker's name in it.
    """
    path = _failures_path(store)
    lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    kept = [line for line in lines if not _tells_of(line.decode("utf-8", "replace"), utterances, speaker)]
    if len(kept) < len(lines):
        storage.put(path, b"".join(kept))
    return len(lines) - len(kept)


def _tells_of(line: str, utterances: Collection[str], speaker: str | None) -> bool:
    try:
        record = dict(json.loads(line))
    except (ValueError, TypeError):  # the end of a killed run
        return speaker is None or json.dumps(speaker)[1:-1] in line
    known = record.get("speaker")
    if known is not None or speaker is None:
        return record.get("utterance") in utterances or (speaker is not None and known == speaker)
    return record.get("utterance") in utterances or any(speaker in str(value) for value in record.values())


class _Tally:
    """What part of an utterance each round does. `done`: utterances, with those of which some rounds are done."""

    def __init__(self, todo: Plan, rounds: Sequence[memory.Round]) -> None:
        self.done = 0.0
        self._rounds: dict[str, int] = {}
        if len(rounds) > 1:
            columns = [[list(todo.features).index(name) for name in one.names] for one in rounds]
            counts = np.sum([todo.todo[:, some].any(axis=1) for some in columns], axis=0)
            self._rounds = {todo.corpus.utterances[i].key: int(counts[i]) for i in np.flatnonzero(counts)}
        self._left = dict(self._rounds)

    def left(self, tasks: Iterator[Task]) -> Iterator[Task]:
        """The tasks of utterances whose recordings could be used so far."""
        return (task for task in tasks if self._left.get(task.key, 1))

    def count(self, key: str, failed: bool) -> tuple[bool, float, bool]:
        """One round more of an utterance: whether it is the first, what part of all, whether it is the last."""
        rounds, left = self._rounds.get(key, 1), self._left.get(key, 1)
        now = left if failed else 1
        self.done += now / rounds
        if rounds > 1:
            self._left[key] = left - now
        return left == rounds, now / rounds, left == now


class _Run:
    """One extraction: its plan, its rounds of workers, its devices, its writer."""

    def __init__(self, todo: Plan, store: Store, extractors: Mapping[str, Extractor], devices: list[str],
                 workers: int | None, commit_every_s: float, strict: bool,
                 progress: Callable[[Progress], None] | None) -> None:
        self.plan, self.store, self.strict, self.progress = todo, store, strict, progress
        self.extractors = {name: extractors[name] for name, item in todo.features.items() if item.todo}
        self.commit_every_s = commit_every_s
        self.spool = storage.spool(store.path)
        self.utterances = {utterance.key: utterance for utterance in todo.corpus.utterances}
        self.total = int(todo.todo.any(axis=1).sum())
        deferred = {name: extractor for name, extractor in self.extractors.items()
                    if devices != ["cpu"] and getattr(extractor, "accelerated", False)}
        self.specs = {name: item.spec for name, item in todo.features.items() if item.spec.weights}
        self.devices = Devices(deferred, devices, self.spool, self._idle, self.specs) if deferred else None
        self.rounds = _rounds(self.extractors, deferred, workers, self.total)
        self.tally = _Tally(todo, self.rounds)
        self.report = Report(utterances=todo.utterances, fresh=todo.utterances - self.total)
        self.began = time.monotonic()
        self.stopping = self.aborted = self._replace = self._declared = False
        self._told = -TICK_S

    def go(self, replace: bool, moved: bool) -> Report:
        for problem in self.plan.corpus.problems:
            self.report.failures.append(Failure(problem.path, None, problem.path, problem.reason))
        with self.devices or contextlib.nullcontext():
            if self.devices is not None:
                self.devices.load()  # before anything is written
            with self.store.writer(commit_every_s=self.commit_every_s, provenance=provenance()) as writer:
                self.writer, self._replace = writer, replace
                if not self.total:
                    self._declare(writer)
                self._renew(writer)
                with self._interruptible():
                    try:
                        for one in self.rounds:
                            self._go_round(writer, one)
                    finally:
                        self._clear_spool()
                writer.close(moved=moved and not self.stopping)
        if not moved:
            self.report.to_use = [f"{item.name}@{item.spec.identity[:9]}" for item in self.plan.features.values()
                                  if item.moves]
        self.report.elapsed_s = time.monotonic() - self.began
        self._tell(last=True)
        return self.report

    def _go_round(self, writer: Writer, one: memory.Round) -> None:
        for made in self._on_devices(self._made(one)):
            self._keep(writer, made)
            self._tell()
            if self.strict and self.report.failures:
                self.stopping = True

    def _renew(self, writer: Writer) -> None:
        """Records of utterances whose text, speaker, place or time changed, but not their audio."""
        corpus = self.plan.corpus
        for position, (source, mark) in self.plan.renewed.items():
            utterance = corpus.utterances[position]
            old = self.store.utterances[utterance.key]
            facts = {name: getattr(old, name) for name in ("sample_rate", "channels", "flags", "duration_s")}
            writer.utterance(record_of(corpus, utterance, facts), source=source, stamp=mark, seconds=old.duration_s)

    def _declare(self, writer: Writer) -> None:
        """Name what is made; when the first of it is there, so that encoders that cannot be loaded leave no trace."""
        if not self._declared:
            self._declared = True
            for item in self.plan.features.values():
                if item.todo or item.moves:
                    writer.declare(item.name, item.spec, replace=self._replace)

    def _fail(self, key: str, feature: str | None, path: str, reason: str) -> None:
        self.report.failures.append(Failure(key, feature, path, reason, self.utterances[key].speaker))

    def _keep(self, writer: Writer, made: Made) -> None:
        """Write what a worker made; count it."""
        self._declare(writer)
        key = made.task.key
        for name, reason in made.failures.items():
            self._fail(key, name, made.task.path, reason)
        first, share, last = self.tally.count(key, failed=None in made.failures)
        self.report.done += last
        if None in made.failures:
            return
        corpus, utterance = self.plan.corpus, self.utterances[key]
        seconds = made.facts["duration_s"]
        mark = stamp(utterance, made.task.path, made.size, made.mtime_ns) if made.settled else 0
        held = writer.snapshot.utterances.index.find(key)
        if first and (held is None or held["source"].tobytes() != made.source or int(held["stamp"]) != mark):
            writer.utterance(record_of(corpus, utterance, made.facts), source=made.source, stamp=mark, seconds=seconds)
        for name, frames in made.frames.items():
            try:
                self._write(writer, key, name, frames)
            except DiskFull:
                raise
            except (FeatstoreError, ValueError) as error:
                reason = str(error).removeprefix(f"{key}: ")
                self._fail(key, name, made.task.path, reason)
            finally:
                frames.drop()
        self.report.audio_s += seconds * share
        for flag in made.facts["flags"] if first else ():
            self.report.flags.setdefault(flag, []).append(key)

    def _write(self, writer: Writer, key: str, name: str, frames: Frames) -> None:
        extractor: Any = self.extractors[name]
        if not hasattr(extractor, "quantise"):
            blocks = (block[0] for block in frames.blocks()) if extractor.kind == "global" else frames.blocks()
            writer.write(key, name, blocks)
            return
        scale = float(extractor.scale_of(frames.peak))
        writer.write(key, name, (extractor.quantise(block, scale) for block in frames.blocks()), scale=scale)

    def _on_devices(self, results: Iterator[Made | None]) -> Iterator[Made]:
        """Run deferred extractors over what the workers decoded. None: nothing new from these."""
        for made in results:
            if self.devices is None:
                if made is not None:
                    yield made
                continue
            if made is not None:
                self.devices.add(made)
            yield from self.devices.finished()
        if self.devices is not None:
            yield from self.devices.rest()

    def _made(self, one: memory.Round) -> Iterator[Made | None]:
        if self.total == 0:
            return
        extractors = {name: self.extractors[name] for name in one.names}
        deferred = tuple(self.devices.extractors) if self.devices is not None else ()
        tasks = self.tally.left(self.plan.tasks(one.names))
        if one.workers == 0:
            bench = Workbench(extractors, "cpu", self.spool, deferred, specs=self.specs)
            for task in tasks:
                if self.stopping:
                    return
                yield bench.make(task)
            return
        bundles, begin = _bundles(tasks), (extractors, self.spool, deferred, self.specs, one.threads)
        while True:
            suspects: list[Task] = []
            yield from self._through_pool(begin, min(one.workers, self.total), bundles, one.workers * AHEAD, suspects)
            if not suspects:
                return
            for task in suspects:  # a worker died: each task that was under way alone, to find the one that kills
                again: list[Task] = []
                yield from self._through_pool(begin, 1, iter([[task]]), 1, again)
                if again:
                    yield Made(task, failures={None: "a worker process died on it twice (out of memory, or a crash "
                                                     "in a decoder or extractor)"})
    def _through_pool(self, begin: tuple[Any, ...], workers: int, bundles: Iterator[list[Task]], ahead: int,
                      suspects: list[Task]) -> Iterator[Made | None]:
        """Results as they come; None when devices have something. If a worker dies, what was under way is put in
        `suspects`.

        begin: arguments of `work.start`, of which the last is how many threads a worker has.
        """
        pending: dict[Future[list[Made]], list[Task]] = {}
        others = set(multiprocessing.active_children())
        pool = ProcessPoolExecutor(min(workers, ahead), multiprocessing.get_context("spawn"), start, begin)
        try:
            while True:
                while len(pending) < ahead and not self.stopping and (bundle := next(bundles, None)) is not None:
                    suspects[:] = bundle  # should the pool refuse it, it is not lost
                    with _worker_environment(begin[-1]):
                        pending[pool.submit(work, bundle)] = bundle
                    suspects.clear()
                if not pending:
                    return
                on_devices: set[Future[Any]] = self.devices.pending if self.devices is not None else set()
                done, _ = wait(on_devices.union(pending), TICK_S, FIRST_COMPLETED)
                if not done:
                    self._idle()
                for future in done & pending.keys():
                    finished = future.result()
                    del pending[future]
                    yield from finished
                if done & on_devices:
                    yield None
        except BrokenProcessPool:
            suspects.extend(task for bundle in pending.values() for task in bundle)
        finally:
            if self.aborted:
                for process in set(multiprocessing.active_children()) - others:
                    process.terminate()
            pool.shutdown(wait=True, cancel_futures=True)

    def _idle(self) -> None:
        """While nothing is finished: progress is told, and what was written is committed in time."""
        self._tell()
        if self.writer.due:
            self.writer.commit()

    def _tell(self, last: bool = False) -> None:
        now = time.monotonic() - self.began
        if self.progress is not None and (last or now - self._told >= TICK_S / 4):
            self._told = now
            self.progress(Progress(int(self.tally.done + 1e-6), self.total, self.report.audio_s,
                                   float(self.plan.seconds.sum()), len(self.report.failures), now, self.stopping))

    def _clear_spool(self) -> None:
        if self.spool.is_dir():
            for path in self.spool.iterdir():
                path.unlink()
            self.spool.rmdir()
        with contextlib.suppress(OSError):
            self.spool.parent.rmdir()  # unless another run has its own in it

    @contextlib.contextmanager
    def _interruptible(self) -> Iterator[None]:
        """The first Ctrl-C ends the run after what is under way; a second raises KeyboardInterrupt."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def stop(number: int, frame: Any) -> None:
            if self.stopping:
                self.aborted = True  # what the workers are at is not waited for
                raise KeyboardInterrupt
            self.stopping = self.report.interrupted = True

        before = signal.signal(signal.SIGINT, stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


def _bundles(tasks: Iterator[Task]) -> Iterator[list[Task]]:
    bundle: list[Task] = []
    for task in tasks:
        bundle.append(task)
        if len(bundle) == BUNDLE or sum(one.seconds for one in bundle) >= BUNDLE_S:
            yield bundle
            bundle = []
    if bundle:
        yield bundle


def provenance() -> dict[str, str]:
    """Versions of what computes numbers; kept beside them, not part of their identity."""
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in ("featstore", *LIBRARIES):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _workers(asked: int | None, extractors: Mapping[str, Extractor]) -> int | None:
    """Worker processes import extractors by name, so those of a script or notebook run in this process."""
    if asked is not None and asked < 0:
        raise BadRequest(f"workers {asked}: expected 0 or more")
    return 0 if any(type(extractor).__module__ == "__main__" for extractor in extractors.values()) else asked


def _rounds(extractors: Mapping[str, Extractor], deferred: Mapping[str, Extractor], workers: int | None,
            tasks: int) -> list[memory.Round]:
    weights = {names: 0 if names[0] in deferred else max(getattr(extractors[n], "weights_bytes", 0) for n in names)
               for names in passes(extractors)}
    return memory.rounds(weights, memory.cores(), memory.free() if any(weights.values()) else 0, workers, tasks)


@contextlib.contextmanager
def _worker_environment(threads: int) -> Iterator[None]:
    """For processes started meanwhile: so many threads each, and no second run of the caller's script.

    `multiprocessing` runs the main script again in every spawned process, to find classes defined in it. Ours need
    none, and a script without an `if __name__ == "__main__"` guard would extract from within its own workers.
    """
    main = sys.modules["__main__"]
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
    hidden = {name: getattr(main, name) for name in ("__file__", "__spec__") if hasattr(main, name)}
    before = {name: os.environ.get(name) for name in names}
    os.environ |= dict.fromkeys(names, str(threads))
    for name in hidden:
        setattr(main, name, None)
    try:
        yield
    finally:
        for name, value in hidden.items():
            setattr(main, name, value)
        for name, text in before.items():
            if text is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = text


def _failures_path(store: Store) -> Place:
    return store.path.with_name(store.path.name + ".failures.jsonl")


def _stored_since(store: Store, failure: Failure) -> bool:
    if failure.feature is None:
        return failure.utterance in store.utterances
    feature = store.features.get(failure.feature)
    return feature is not None and failure.utterance in feature
