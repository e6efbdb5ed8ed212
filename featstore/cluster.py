"""The same run on a Ray cluster: the driver plans, deals out and counts; actors make features and write them.

Each actor has a pipeline and a writer of its own, and commits its own segments into the store, which must be at the
same place for all machines: a shared file system or a URL. The recordings too. Ray starts the actors and tells when one
died; what it had not committed is given to others.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import memory, storage
from .corpus import Corpus, Utterance
from .errors import BadRequest, CannotLoad, MissingPackage
from .extract import Keeper, Outcome, provenance
from .pipeline import KILLED, TICK_S, Pipeline
from .plan import Failure
from .shares import Share
from .spec import Extractor, Spec
from .storage import Place
from .store import Store
from .work import Task, passes

QUEUED = 2      # bundles that wait in an actor, so that it need not wait for the driver
HOPELESS = 3    # times as many deaths as there are actors, without anything made in between, end the run
ENDING_S = 300.0  # what actors are given to fold their segments at the end: all is committed before

Errand = tuple[Task, Utterance]


@dataclass(frozen=True)
class Job:
    """What every actor needs to know."""

    store: Place
    root: Path
    extractors: Mapping[str, Extractor]
    weighty: Mapping[str, Spec]  # see `Workbench.specs`
    named: Mapping[str, Spec]
    replace: bool
    commit_every_s: float
    devices: Sequence[str]

    @property
    def accelerated(self) -> bool:
        """Whether there is anything for a device to do."""
        return list(self.devices) != ["cpu"] and any(getattr(e, "accelerated", False) for e in self.extractors.values())


@dataclass
class Reply:
    """What an actor has done since its last reply. `kept`: how many of all its outcomes are committed. `waiting`:
    bundles that it has not begun.
    """

    outcomes: list[Outcome]
    kept: int
    waiting: int


class Worker:
    """What an actor does: a thread works on what `give` brings."""

    def __init__(self, job: Job, processes: int) -> None:
        self._job, self._processes = job, processes
        self._errands: queue.SimpleQueue[list[Errand] | None] = queue.SimpleQueue()
        self._utterances: dict[str, Utterance] = {}
        self._outcomes: list[Outcome] = []
        self._made = self._kept = 0
        self._commit = self._loaded = self._ended = False
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, daemon=True)

    def begin(self) -> None:
        """Load what runs on devices, or say what is missing."""
        self._thread.start()
        self._wait(lambda: self._loaded, None)

    def give(self, errands: list[Errand]) -> Reply:
        """Take a bundle; come back when something is made, when another can be taken, or when a second is over."""
        full = self._errands.qsize() + bool(errands) >= QUEUED
        if errands:
            self._errands.put(errands)
        self._wait(lambda: bool(self._outcomes) or (self._errands.qsize() < QUEUED and (full or bool(errands))), TICK_S)
        return self._reply()

    def commit(self) -> Reply:
        """Make all that is made durable."""
        self._commit = True
        self._wait(lambda: not self._commit, None)
        return self._reply()

    def end(self) -> None:
        """Commit, fold small segments, and stop."""
        self._errands.put(None)
        self._wait(lambda: self._ended, None)

    def _reply(self) -> Reply:
        with self._changed:
            outcomes, self._outcomes = self._outcomes, []
            return Reply(outcomes, self._kept, self._errands.qsize())

    def _wait(self, done: Callable[[], bool], seconds: float | None) -> None:
        with self._changed:
            self._changed.wait_for(lambda: done() or self._error is not None, seconds)
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        try:
            self._make()
        except BaseException as error:  # whatever it is, the driver must see it
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _make(self) -> None:
        job, corpus = self._job, Corpus(self._job.root, "", ())
        pipeline = Pipeline(job.extractors, job.devices if job.accelerated else ["cpu"], job.weighty,
                            storage.spool(job.store), self._idle, self._idle)
        with pipeline, Store(job.store).writer(commit_every_s=job.commit_every_s,
                                               provenance=provenance()) as self._writer:
            with self._changed:
                self._loaded = True
                self._changed.notify_all()
            keeper = Keeper(self._writer, job.extractors, job.named, job.replace)
            one = memory.Round(tuple(job.extractors), self._processes, 1)
            for made in pipeline.run(one, self._bundles()):
                before = self._writer.commits
                outcome = keeper.keep(made, corpus, self._utterances.pop(made.task.key), first=True)
                with self._changed:
                    if self._writer.commits > before:
                        self._kept = self._made  # and perhaps a part of this one
                    self._made += 1
                    self._outcomes.append(outcome)
                    self._changed.notify_all()
                self._idle()
            self._writer.close(moved=False)
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _bundles(self) -> Iterator[list[Task] | None]:
        while True:
            try:
                errands = self._errands.get_nowait()
            except queue.Empty:
                yield None
                continue
            if errands is None:
                return
            with self._changed:
                self._changed.notify_all()  # there is room for another
            self._utterances |= {task.key: utterance for task, utterance in errands}
            yield [task for task, _ in errands]

    def _idle(self) -> None:
        """Commit what was written, if it is time to, or if the driver waits for it."""
        asked = self._commit
        if asked or self._writer.due:
            self._writer.commit()
            with self._changed:
                self._kept, self._commit = self._made, self._commit and not asked
                self._changed.notify_all()


@dataclass(eq=False)
class _Actor:
    """An actor as the driver sees it. `given`: under way; `made`: what is not known to be committed, in its order."""

    handle: Any
    call: Any                    # the reply that is waited for
    begun: bool = False
    given: dict[str, Errand] = field(default_factory=dict)
    made: deque[Errand] = field(default_factory=deque)
    kept: int = 0
    waiting: int = 0
    suspect: bool = False        # what is given is alone, to see whether it kills


class Cluster:
    """Actors on Ray, as many as there are cores, or GPUs; in a `with` block.

    workers: how many actors; None for all there is room for.
    idle: called once a second or more often.
    `stopping`: nothing more is given out. `aborted`: what actors are at is not waited for.
    """

    def __init__(self, job: Job, workers: int | None, share: Share, utterances: Mapping[str, Utterance],
                 idle: Callable[[], None], engine: str) -> None:
        self._job, self._asked, self._share, self._utterances, self._idle = job, workers, share, utterances, idle
        if workers == 0:
            raise BadRequest("workers 0: on Ray there is at least one")
        if job.accelerated and job.devices[0].startswith("cuda") and list(job.devices) != ["cuda:0"]:
            raise BadRequest("on Ray each worker has one GPU, whichever Ray gives it: give --device cuda, and "
                             "--workers for how many")
        self._engine, self._started = engine, False
        self._actors: list[_Actor] = []
        self._bundles = share.bundles(list(job.extractors), patient=True)
        self._again: deque[Errand] = deque()      # made by an actor that died before it committed
        self._suspects: deque[Errand] = deque()   # under way in an actor that died
        self._deaths: Counter[str] = Counter()
        self._counted: set[str] = set()
        self._in_vain = 0                         # deaths since something was made
        self._ended = False                       # there are no more bundles
        self._drew = -TICK_S                      # when there was none for now
        self.stopping = self.aborted = False

    def __enter__(self) -> Cluster:
        self._ray = _ray()
        if not self._ray.is_initialized():
            self._started = True
            _connect(self._ray, self._engine)
        try:
            options, self._processes, room = self._resources()
            self._remote = self._ray.remote(Worker).options(**options)
            for _ in range(min(room, len(self._utterances))):
                self._start()
        except BaseException:
            self._leave()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            if not self.aborted:
                self._close()
        finally:
            self._leave()

    def outcomes(self) -> Iterator[Outcome]:
        """What becomes of each task of the share, as it is made; all of it is committed when this ends."""
        while True:
            for actor in self._actors:
                if actor.call is None:
                    self._send(actor)
            yield from self._replies()
            self._idle()
            if self._drained() and not any(actor.made for actor in self._actors):
                if self._ended or self.stopping:
                    return
                self._share.settled()  # the rest is others' work, for now

    def _send(self, actor: _Actor) -> None:
        """Give an actor something to do, or ask what it has done."""
        errands = self._errands_for(actor)
        actor.given |= {task.key: (task, utterance) for task, utterance in errands}
        commit = not errands and actor.made and self._drained()
        actor.call = actor.handle.commit.remote() if commit else actor.handle.give.remote(errands)

    def _errands_for(self, actor: _Actor) -> list[Errand]:
        if self.stopping or actor.suspect or actor.waiting >= QUEUED:
            return []
        if self._suspects and not actor.given:
            actor.suspect = True
            return [self._suspects.popleft()]
        if self._again:
            return [self._again.popleft()]
        if self._ended or time.monotonic() - self._drew < TICK_S / 4:
            return []
        bundle = next(self._bundles, [])
        self._ended = bundle == []
        if bundle is None:
            self._drew = time.monotonic()
        return [(task, self._utterances[task.key]) for task in bundle or ()]

    def _drained(self) -> bool:
        """Whether nothing is under way, and nothing can be given out now."""
        left = self._again or self._suspects or not (self._ended or time.monotonic() - self._drew < 2 * TICK_S)
        return not any(actor.given for actor in self._actors) and (self.stopping or not left)

    def _replies(self) -> Iterator[Outcome]:
        calls = {actor.call: actor for actor in self._actors}
        if not calls:
            return
        self._ray.wait(list(calls), timeout=TICK_S)
        for call in self._ray.wait(list(calls), num_returns=len(calls), timeout=0)[0]:
            actor = calls[call]
            actor.call = None
            try:
                reply = self._ray.get(call)
            except self._ray.exceptions.RayActorError as error:
                yield from self._died(actor, error)
                continue
            except self._ray.exceptions.RayTaskError as error:
                raise error.cause from error
            if reply is None:
                actor.begun = True
                continue
            actor.waiting = reply.waiting
            for outcome in reply.outcomes:
                self._in_vain, actor.suspect = 0, False
                actor.made.append(actor.given.pop(outcome.key))
                yield self._once(outcome)
            for _ in range(reply.kept - actor.kept):
                actor.made.popleft()
            actor.kept = reply.kept

    def _once(self, outcome: Outcome) -> Outcome:
        outcome.again = outcome.key in self._counted
        self._counted.add(outcome.key)
        return outcome

    def _died(self, actor: _Actor, error: Exception) -> Iterator[Outcome]:
        """Put another in its place. What it had made goes to others, what it was at is tried alone, and what kills
        alone too is given up.
        """
        self._actors.remove(actor)
        self._in_vain += 1
        if self._in_vain > HOPELESS * (len(self._actors) + 1):
            raise CannotLoad(f"workers on Ray die before they make anything; the last one: {error}") from error
        self._again.extend(actor.made)
        for task, utterance in actor.given.values():
            self._deaths[task.key] += 1
            if actor.suspect and self._deaths[task.key] > 1:
                yield self._once(Outcome(task.key, failures=[Failure(task.key, None, task.path, KILLED,
                                                                     utterance.speaker)]))
            else:
                self._suspects.append((task, utterance))
        if not self.stopping:
            self._start()

    def _start(self) -> None:
        handle = self._remote.remote(self._job, self._processes)
        self._actors.append(_Actor(handle, handle.begin.remote()))

    def _close(self) -> None:
        """Let actors end in peace; what is not committed by now is so after this, if they can."""
        calls = [actor.handle.end.remote() for actor in self._actors if actor.begun]
        if calls:
            self._ray.wait(calls, num_returns=len(calls), timeout=ENDING_S)

    def _leave(self) -> None:
        for actor in self._actors:
            with contextlib.suppress(Exception):  # it may be gone already
                self._ray.kill(actor.handle)
        if self._started:
            self._ray.shutdown()

    def _resources(self) -> tuple[dict[str, Any], int, int]:
        """What each actor asks Ray for, how many processes decode for it, and how many actors there is room for."""
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        job, options = self._job, {"num_cpus": 1}
        processes = 1 if job.accelerated else 0
        if job.accelerated and job.devices[0].startswith("cuda"):
            shares = [node.get("CPU", 1) // node["GPU"] for node in nodes if node.get("GPU", 0) >= 1]
            processes = int(max(1, min(shares, default=1)))
            options = {"num_gpus": 1, "num_cpus": processes}
            room = sum(int(node.get("GPU", 0)) for node in nodes)
        else:
            deferred = [n for n, e in job.extractors.items() if job.accelerated and getattr(e, "accelerated", False)]
            here = {name: extractor for name, extractor in job.extractors.items() if name not in deferred}
            weights = sum(max(getattr(here[name], "weights_bytes", 0) for name in names) for names in passes(here))
            if weights:
                options["memory"] = memory.need(weights)
            room = sum(int(min(node.get("CPU", 0), node.get("memory", 0) // options.get("memory", 1)))
                       for node in nodes)
        if not room:
            wanted = ", ".join(f"{value} {name.removeprefix('num_')}" for name, value in options.items())
            there = [{name: node.get(name, 0) for name in ("CPU", "GPU", "memory")} for node in nodes]
            raise CannotLoad(f"no machine of the Ray cluster has room for a worker, which asks for {wanted}; there are "
                             f"{there}")
        return options, processes, min(room, self._asked or room)


def _ray() -> Any:
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise MissingPackage("--engine ray needs Ray: pip install 'featstore[ray]'") from error


def _connect(ray: Any, engine: str) -> None:
    """Join the cluster that is running, or begin one on this machine."""
    quiet = {"logging_level": logging.ERROR, "log_to_driver": False}
    if engine == "ray:local":
        ray.init(address="local", include_dashboard=False, **quiet)
        return
    address = os.environ.get("RAY_ADDRESS") or "auto"
    try:
        ray.init(address=address, **quiet)
    except (ConnectionError, RuntimeError) as error:  # none found; one that does not answer
        where = "here, and RAY_ADDRESS names none" if address == "auto" else f"at {address} (RAY_ADDRESS)"
        raise CannotLoad(f"no Ray cluster is running {where}. Start one: ray start --head, and on the other machines "
                         "ray start --address=HEAD:6379; or give --engine ray:local for this machine alone") from error
