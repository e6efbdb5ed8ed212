"""Tasks to what is made of them: worker processes, devices, and what is done when a worker dies."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import TracebackType
from typing import Any

from . import memory
from .devices import Devices
from .spec import Extractor, Spec
from .work import Made, Task, Workbench, passes, start, work

AHEAD = 2       # bundles of tasks under way per worker
TICK_S = 1.0    # how often commits, progress and interruption are looked at while nothing is finished
KILLED = "a worker process died on it twice (out of memory, or a crash in a decoder or extractor)"

Bundles = Iterator["list[Task] | None"]  # None: there is nothing now, ask again


class Pipeline:
    """Extractors applied to tasks, as workers and devices get to them; in a `with` block, which loads what runs on
    devices.

    devices: their names; extractors that are `accelerated` run there unless it is the CPU.
    specs: see `Workbench`.
    idle: called now and then while nothing is finished, at least once a second.
    drained: called when nothing is under way, and there may be more tasks later.
    `stopping`: no more tasks are taken. `aborted`: what workers are at is not waited for.
    """

    def __init__(self, extractors: Mapping[str, Extractor], devices: Sequence[str], specs: Mapping[str, Spec],
                 spool: Path, idle: Callable[[], None], drained: Callable[[], None]) -> None:
        self.extractors, self.specs, self.spool, self.idle, self.drained = extractors, specs, spool, idle, drained
        self.deferred = {name: extractor for name, extractor in extractors.items()
                         if list(devices) != ["cpu"] and getattr(extractor, "accelerated", False)}
        self.devices = Devices(self.deferred, devices, spool, idle, specs) if self.deferred else None
        self.stopping = self.aborted = False

    def __enter__(self) -> Pipeline:
        if self.devices is not None:
            self.devices.__enter__()
            try:
                self.devices.load()  # before anything is written
            except BaseException as error:
                self.devices.__exit__(type(error))
                raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        if self.devices is not None:
            self.devices.__exit__(kind)
        if self.spool.is_dir():
            for path in self.spool.iterdir():
                path.unlink()
            self.spool.rmdir()
        with contextlib.suppress(OSError):
            self.spool.parent.rmdir()  # unless another run has its own in it

    def rounds(self, workers: int | None, tasks: int) -> list[memory.Round]:
        """Which features are made together by how many workers (None: as many as fit), for so many tasks."""
        weights = {names: 0 if names[0] in self.deferred else
                   max(getattr(self.extractors[name], "weights_bytes", 0) for name in names)
                   for names in passes(self.extractors)}
        return memory.rounds(weights, memory.cores(), memory.free() if any(weights.values()) else 0, workers, tasks)

    def run(self, one: memory.Round, bundles: Bundles) -> Iterator[Made]:
        """What is made of each task, in whatever order it is done."""
        for made in self._made(one, bundles):
            if self.devices is None:
                if made is not None:
                    yield made
                continue
            if made is not None:
                self.devices.add(made)
            yield from self.devices.finished()
        if self.devices is not None:
            yield from self.devices.rest()

    def _made(self, one: memory.Round, bundles: Bundles) -> Iterator[Made | None]:
        """Results of workers; None when devices have something."""
        extractors = {name: self.extractors[name] for name in one.names}
        if one.workers == 0:
            yield from self._here(Workbench(extractors, "cpu", self.spool, tuple(self.deferred), specs=self.specs),
                                  bundles)
            return
        begin = (extractors, self.spool, tuple(self.deferred), self.specs, one.threads)
        while True:
            suspects: list[Task] = []
            yield from self._through_pool(begin, one.workers, bundles, one.workers * AHEAD, suspects)
            if not suspects:
                return
            for task in suspects:  # a worker died: each task that was under way alone, to find the one that kills
                again: list[Task] = []
                yield from self._through_pool(begin, 1, iter([[task]]), 1, again)
                if again:
                    yield Made(task, failures={None: KILLED})

    def _here(self, bench: Workbench, bundles: Bundles) -> Iterator[Made | None]:
        for bundle in bundles:
            if bundle is None:
                yield from self._nothing()
            for task in bundle or ():
                if self.stopping:
                    return
                yield bench.make(task)
            if self.stopping:
                return

    def _nothing(self) -> Iterator[Made | None]:
        """Wait a while for more tasks; let devices do what was gathered for larger batches."""
        if self.devices is not None and self.devices.flush():
            wait(self.devices.pending, TICK_S, FIRST_COMPLETED)
            yield None
        else:
            self.drained()
            time.sleep(TICK_S / 4)
        self.idle()

    def _through_pool(self, begin: tuple[Any, ...], workers: int, bundles: Bundles, ahead: int,
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
                bundle: list[Task] | None = []
                while len(pending) < ahead and not self.stopping and (bundle := next(bundles, [])):
                    suspects[:] = bundle  # should the pool refuse it, it is not lost
                    with worker_environment(begin[-1]):
                        pending[pool.submit(work, bundle)] = bundle
                    suspects.clear()
                if not pending:
                    if bundle is not None or self.stopping:
                        return
                    yield from self._nothing()
                    continue
                on_devices: set[Future[Any]] = self.devices.pending if self.devices is not None else set()
                done, _ = wait(on_devices.union(pending), TICK_S, FIRST_COMPLETED)
                if not done:
                    self.idle()
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


@contextlib.contextmanager
def worker_environment(threads: int) -> Iterator[None]:
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
