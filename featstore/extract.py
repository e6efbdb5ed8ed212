"""The main job: plan -> decode -> extract -> write -> commit, each stage ahead of the next, resumed from any end."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from . import memory, shares, storage
from .corpus import Corpus, Utterance
from .devices import names_of
from .errors import BadRequest, DiskFull, FeatstoreError, RemoteError
from .pipeline import TICK_S, Pipeline
from .plan import Failure, Plan, plan, record_of, stamp
from .spec import Extractor, Spec
from .storage import Place
from .store import COMMIT_S, Store
from .work import Frames, Made
from .writer import Writer

if TYPE_CHECKING:
    from .cluster import Cluster

ENGINES = ("local", "ray", "ray:local")
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

    done: utterances that were gone through, those that failed among them.
    flags: what may be wrong with recordings that were stored (see `audio.Reader`).
    elsewhere: utterances that other processes did meanwhile.
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
    elsewhere: int = 0
    to_use: list[str] = field(default_factory=list)


def extract(corpus: Corpus, store: Store, extractors: Mapping[str, Extractor], *, replace: bool = False,
            device: str = "cpu", workers: int | None = None, commit_every_s: float = COMMIT_S,
            allow_failures: int | str = 0, strict: bool = False, rehash: bool = False,
            shard: tuple[int, int] | None = None, engine: str = "local",
            progress: Callable[[Progress], None] | None = None) -> Report:
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
    engine: "local" for this machine; "ray" for the Ray cluster that is running, "ray:local" for Ray on this machine
        alone (see `cluster`). `workers` are then actors, each with a core, or with a GPU if the device is "cuda".

    A recording that cannot be used costs one entry in `Report.failures`, also kept in `<store>.failures.jsonl`. Ctrl-C
    commits what is done and returns with `Report.interrupted`; a killed run loses at most one commit interval, and the
    same call goes on from there.

    Raises:
        IdentityMismatch: a name stands for other settings and `replace` is not given; before any work.
        DiskFull: the disk cannot suffice (before any work), or did not.
        CannotLoad: an extractor's package or weights are missing, or the device is.
    """
    devices = names_of(device)
    if engine not in ENGINES:
        raise BadRequest(f"engine {engine!r}: expected {', '.join(ENGINES)}")
    corpus = corpus if shard is None else shares.shard(corpus, *shard)
    allowed = allowance(allow_failures, len(corpus))
    store.refresh()
    known = failures(store)
    todo = plan(corpus, store, extractors, replace=replace, rehash=rehash, failures=known)
    if todo.bytes_needed and todo.bytes_free is not None and todo.bytes_needed + HEADROOM > todo.bytes_free:
        raise DiskFull(f"{store.path} needs about {todo.bytes_needed / 1e9:.2f} GB more and "
                       f"{todo.bytes_free / 1e9:.2f} GB are free. Nothing was written; free some room or put the store "
                       "on another disk.")
    run = Run(todo, store, extractors, commit_every_s, strict, shard, progress)
    try:
        report = run.go(devices, _workers(workers, extractors, engine), replace, engine)
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

    def first(self, key: str) -> bool:
        """Whether no round was counted yet of an utterance."""
        return self._left.get(key, 1) == self._rounds.get(key, 1)

    def count(self, key: str, failed: bool) -> tuple[float, bool]:
        """One round more of an utterance: what part of all it is, whether it is the last."""
        rounds, left = self._rounds.get(key, 1), self._left.get(key, 1)
        now = left if failed else 1
        self.done += now / rounds
        if rounds > 1:
            self._left[key] = left - now
        return now / rounds, left == now


@dataclass
class Outcome:
    """What became of a task: what failed, how long the recording is, what may be wrong with it.

    first: nothing else was made of the utterance in this run before.
    again: it was counted before; what was made of it then is lost.
    """

    key: str
    first: bool = True
    again: bool = False
    failures: list[Failure] = field(default_factory=list)
    seconds: float = 0.0
    flags: tuple[str, ...] = ()


class Keeper:
    """Writes what is made of recordings: an utterance's record, then its features.

    specs: what the features are; they are declared when the first of them is there, so that encoders that cannot be
        loaded leave no trace.
    """

    def __init__(self, writer: Writer, extractors: Mapping[str, Extractor], specs: Mapping[str, Spec],
                 replace: bool) -> None:
        self.writer, self.extractors, self.specs, self.replace = writer, extractors, specs, replace
        self._declared = False

    def declare(self) -> None:
        """Name what is made."""
        if not self._declared:
            self._declared = True
            for name, spec in self.specs.items():
                self.writer.declare(name, spec, replace=self.replace)

    def keep(self, made: Made, corpus: Corpus, utterance: Utterance, first: bool) -> Outcome:
        """Write what a worker made; the record of the utterance only with what is made of it `first`."""
        self.declare()
        key = utterance.key
        outcome = Outcome(key, first, failures=[Failure(key, name, made.task.path, why, utterance.speaker)
                                                for name, why in made.failures.items()])
        if None in made.failures:
            return outcome
        outcome.seconds, outcome.flags = made.facts["duration_s"], tuple(made.facts["flags"])
        mark = stamp(utterance, made.task.path, made.size, made.mtime_ns) if made.settled else 0
        held = self.writer.snapshot.utterances.index.find(key)
        if first and (held is None or held["source"].tobytes() != made.source or int(held["stamp"]) != mark):
            self.writer.utterance(record_of(corpus, utterance, made.facts), source=made.source, stamp=mark,
                                  seconds=outcome.seconds)
        for name, frames in made.frames.items():
            try:
                self._write(key, name, frames)
            except (DiskFull, RemoteError):  # of the store, not of this recording
                raise
            except (FeatstoreError, ValueError) as error:
                reason = str(error).removeprefix(f"{key}: ")
                outcome.failures.append(Failure(key, name, made.task.path, reason, utterance.speaker))
            finally:
                frames.drop()
        return outcome

    def _write(self, key: str, name: str, frames: Frames) -> None:
        extractor: Any = self.extractors[name]
        if not hasattr(extractor, "quantise"):
            blocks = (block[0] for block in frames.blocks()) if extractor.kind == "global" else frames.blocks()
            self.writer.write(key, name, blocks)
            return
        scale = float(extractor.scale_of(frames.peak))
        self.writer.write(key, name, (extractor.quantise(block, scale) for block in frames.blocks()), scale=scale)


class Run:
    """One extraction: its plan, its share of it, what makes the features (on this machine a pipeline), its writer."""

    def __init__(self, todo: Plan, store: Store, extractors: Mapping[str, Extractor], commit_every_s: float,
                 strict: bool, part: tuple[int, int] | None, progress: Callable[[Progress], None] | None) -> None:
        self.plan, self.store, self.strict, self.part, self.progress = todo, store, strict, part, progress
        self.extractors = {name: extractors[name] for name, item in todo.features.items() if item.todo}
        self.commit_every_s = commit_every_s
        self.share = shares.Share(todo, store, storage.new_id(), part)
        self.utterances = {utterance.key: utterance for utterance in todo.corpus.utterances}
        self.total = int(todo.todo.any(axis=1).sum())
        self.weighty = {name: item.spec for name, item in todo.features.items() if item.spec.weights}
        self.named = {item.name: item.spec for item in todo.features.values() if item.todo or item.moves}
        self.tally = _Tally(todo, [])
        self.report = Report(utterances=todo.utterances, fresh=todo.utterances - self.total)
        self.began = time.monotonic()
        self._told = -TICK_S

    def go(self, devices: list[str], workers: int | None, replace: bool, engine: str) -> Report:
        """Do it: on this machine, or with engine "ray" on a cluster."""
        for problem in self.plan.corpus.problems:
            self.report.failures.append(Failure(problem.path, None, problem.path, problem.reason))
        moves = [f"{item.name}@{item.spec.identity[:9]}" for item in self.plan.features.values() if item.moves]
        with contextlib.closing(self.share), self._engine(devices, workers, replace, engine) as self.engine, \
                self.store.writer(commit_every_s=self.commit_every_s, provenance=provenance()) as self.writer:
            keeper = Keeper(self.writer, self.extractors, self.named, replace)
            self._renew()
            with self._interruptible():
                for outcome in self._outcomes(keeper, workers) if self.total else ():
                    self._account(outcome)
            if not self.engine.stopping:
                keeper.declare()
            self.writer.close(moved=self.part is None and not self.engine.stopping)
        if not self.engine.stopping:
            self.report.elsewhere = self.total - self.report.done
        self.report.to_use = moves if self.part is not None else []
        self.report.elapsed_s = time.monotonic() - self.began
        self._tell(last=True)
        return self.report

    def _engine(self, devices: list[str], workers: int | None, replace: bool, name: str) -> Pipeline | Cluster:
        if name == "local" or not self.total:
            return Pipeline(self.extractors, devices, self.weighty, storage.spool(self.store.path), self._idle,
                            self._drained)
        from .cluster import Cluster, Job

        job = Job(self.store.path.resolve(), self.plan.corpus.root, self.extractors, self.weighty, self.named, replace,
                  self.commit_every_s, devices)
        return Cluster(job, workers, self.share, self.utterances, self._idle, name)

    def _outcomes(self, keeper: Keeper, workers: int | None) -> Iterator[Outcome]:
        """What becomes of each task. Where there are rounds, what others were at is looked for after the last."""
        if not isinstance(self.engine, Pipeline):
            yield from self.engine.outcomes()
            return
        rounds = self.engine.rounds(workers, self.total)
        self.tally = _Tally(self.plan, rounds)
        again = rounds if len(rounds) > 1 else []
        for number, one in enumerate([*rounds, *again]):
            patient = not again or number >= len(rounds)
            for made in self.engine.run(one, self.share.bundles(one.names, patient=patient)):
                key = made.task.key
                yield keeper.keep(made, self.plan.corpus, self.utterances[key], self.tally.first(key))

    def _account(self, outcome: Outcome) -> None:
        """Count a task, and tell how far the run is."""
        report, failed = self.report, {failure.feature for failure in outcome.failures}
        report.failures += [failure for failure in outcome.failures
                            if not outcome.again or failure not in report.failures]
        if not outcome.again:
            part, last = self.tally.count(outcome.key, failed=None in failed)
            report.done += last
            report.audio_s += outcome.seconds * part
            for flag in outcome.flags if outcome.first else ():
                report.flags.setdefault(flag, []).append(outcome.key)
        if failed:
            self.share.gave_up(outcome.key, failed)
        self.share.beat()
        self._tell()
        if self.strict and report.failures:
            self.engine.stopping = True

    def _renew(self) -> None:
        """Records of utterances whose text, speaker, place or time changed, but not their audio."""
        corpus = self.plan.corpus
        for position, (source, mark) in self.plan.renewed.items():
            utterance = corpus.utterances[position]
            old = self.store.utterances[utterance.key]
            facts = {name: getattr(old, name) for name in ("sample_rate", "channels", "flags", "duration_s")}
            self.writer.utterance(record_of(corpus, utterance, facts), source=source, stamp=mark,
                                  seconds=old.duration_s)

    def _idle(self) -> None:
        """While nothing is finished: progress is told, and what was written is committed in time."""
        self._tell()
        self.share.beat()
        if self.writer.due:
            self.writer.commit()

    def _drained(self) -> None:
        """What is left is others' work: let them see ours, for which they may wait in turn."""
        self.writer.commit()
        self.share.settled()

    def _tell(self, last: bool = False) -> None:
        now = time.monotonic() - self.began
        if self.progress is not None and (last or now - self._told >= TICK_S / 4):
            self._told = now
            self.progress(Progress(int(self.tally.done + 1e-6) + self.share.elsewhere, self.total, self.report.audio_s,
                                   float(self.plan.seconds.sum()) - self.share.elsewhere_s, len(self.report.failures),
                                   now, self.engine.stopping))

    @contextlib.contextmanager
    def _interruptible(self) -> Iterator[None]:
        """The first Ctrl-C ends the run after what is under way; a second raises KeyboardInterrupt."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def stop(number: int, frame: Any) -> None:
            if self.engine.stopping:
                self.engine.aborted = True  # what the workers are at is not waited for
                raise KeyboardInterrupt
            self.engine.stopping = self.report.interrupted = True

        before = signal.signal(signal.SIGINT, stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


def provenance() -> dict[str, str]:
    """Versions of what computes numbers; kept beside them, not part of their identity."""
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in ("featstore", *LIBRARIES):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _workers(asked: int | None, extractors: Mapping[str, Extractor], engine: str) -> int | None:
    """Worker processes import extractors by name, so those of a script or notebook run in this process; not on Ray."""
    if asked is not None and asked < 0:
        raise BadRequest(f"workers {asked}: expected 0 or more")
    if engine != "local":
        return asked
    return 0 if any(type(extractor).__module__ == "__main__" for extractor in extractors.values()) else asked


def _failures_path(store: Store) -> Place:
    return store.path.with_name(store.path.name + ".failures.jsonl")


def _stored_since(store: Store, failure: Failure) -> bool:
    if failure.feature is None:
        return failure.utterance in store.utterances
    feature = store.features.get(failure.feature)
    return feature is not None and failure.utterance in feature
