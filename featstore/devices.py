"""Accelerators: a thread for each, fed from one queue of batches of like length, while others decode and write."""

from __future__ import annotations

import contextlib
import gc
import queue
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .errors import BadRequest, CannotLoad
from .spec import Extractor, Spec
from .work import (
    Collected,
    Cutter,
    Made,
    Pass,
    Piece,
    Workbench,
    out_of_memory,
    passes,
    reason,
    too_large,
    with_last,
)

BUDGET_S = 240.0  # padded seconds of a batch, until memory runs out
MOST = 64         # waveforms of a batch
PADDED = 0.25     # of a batch at most is padding
AHEAD = 2         # budgets per device and pass that are gathered before they are cut: more are sorted better
HELD = 6          # budgets per device and pass that may be under way, waveforms and results together
TICK_S = 1.0
PATIENCE = 8      # batches that must fit before the budget grows again

Outputs = list["list[np.ndarray] | str"]  # of each waveform: an array per name of the pass, or why there is none


def names_of(device: str) -> list[str]:
    """"cuda:0,1" -> cuda:0 and cuda:1, "cuda" -> cuda:0; "cpu" and "mps" as they are.

    Raises:
        BadRequest: for what is no device's name, or names one twice.
    """
    found: list[str] = []
    for part in device.split(","):
        kind, colon, number = part.strip().partition(":")
        if kind.isdigit() and not colon and found and ":" in found[-1]:
            kind, colon, number = found[-1].partition(":")[0], ":", kind
        if not kind.isidentifier() or bool(colon) != number.isdigit():
            raise BadRequest(f"device {device!r}: expected cpu, cuda, cuda:0, several as in cuda:0,1, or mps")
        found.append("cuda:0" if kind == "cuda" and not colon else kind + colon + number)
    if len(set(found)) < len(found) or ("cpu" in found and len(found) > 1):
        raise BadRequest(f"device {device!r}: {'cpu stands alone' if 'cpu' in found else 'a device is named twice'}; "
                         "expected cpu, cuda, cuda:0, several as in cuda:0,1, or mps")
    return found


class Budget:
    """Padded seconds that a batch of one pass may have: halved when memory runs out, then raised towards what failed.

    All devices share it, so that one learns from another.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._failed, self._fitted, self._patience = float("inf"), 0, PATIENCE
        self._lock = threading.Lock()

    def failed(self, cost: float) -> None:
        """A batch of `cost` padded seconds was too much."""
        with self._lock:
            self._failed = min(self._failed, cost)
            self.seconds = min(self.seconds, cost / 2)
            self._fitted, self._patience = 0, 2 * self._patience

    def fitted(self, cost: float) -> None:
        """A batch of `cost` padded seconds went through."""
        with self._lock:
            self._fitted += cost > 0.7 * self.seconds
            if self._fitted >= self._patience and self.seconds < 0.8 * self._failed < float("inf"):
                self._fitted, self.seconds = 0, min((self.seconds + self._failed) / 2, 0.8 * self._failed)


@dataclass(eq=False)
class _Utterance:
    """An utterance of which pieces are under way."""

    made: Made
    passes: list[Collected] = field(default_factory=list)
    open: int = 1  # pieces without result; and one until all are cut


class _Ordered:
    """Gives pieces to what collects them in their order, in whatever order devices are done with them."""

    def __init__(self, collected: Collected, utterance: _Utterance) -> None:
        self.collected, self.utterance = collected, utterance
        self.given = self._taken = 0
        self._early: dict[int, tuple[Piece, list[np.ndarray] | str]] = {}

    def put(self, number: int, piece: Piece, found: list[np.ndarray] | str) -> None:
        self._early[number] = piece, found
        while self._taken in self._early:
            self.collected.take(*self._early.pop(self._taken))
            self._taken += 1


@dataclass(frozen=True)
class _Waiting:
    """A piece that waits for a device, and where its result goes."""

    target: _Ordered
    number: int
    piece: Piece
    seconds: float


@dataclass(frozen=True, eq=False)
class _Batch:
    names: Pass
    waiting: list[_Waiting]
    future: Future[Outputs] = field(default_factory=Future)


class Devices:
    """Extractors on devices. Utterances go in by `add` with their waveforms, and come out of `finished` complete.

    A pass over a batch that fails is halved until what fails is alone. Where memory ran out, later batches are smaller,
    and the encoders are kept on the device one at a time if they do not fit together.

    idle: called now and then while `add` or `rest` wait, at least once a second. specs: see `Workbench`.
    """

    def __init__(self, extractors: Mapping[str, Extractor], devices: Sequence[str], spool: Path,
                 idle: Callable[[], None], specs: Mapping[str, Spec] | None = None) -> None:
        self.extractors, self._idle, self._count = extractors, idle, len(devices)
        self._bench = Workbench(extractors, "cpu", spool)  # never loaded: what passes there are, and where spools go
        self._budgets = {names: Budget(BUDGET_S) for names in passes(extractors)}
        self._queue: queue.SimpleQueue[_Batch | None] = queue.SimpleQueue()
        self._gathered: dict[Pass, list[_Waiting]] = {}
        self._gathered_s = self._held_s = 0.0
        self._complete: list[Made] = []
        self._batches: dict[Future[Outputs], _Batch] = {}
        self._ready: list[Future[None]] = [Future() for _ in devices]
        loading = threading.Lock()  # importing torch and transformers is for one thread at a time
        runners = [_Runner(Workbench(extractors, device, spool, specs=specs), self._budgets, loading)
                   for device in devices]
        self._threads = [threading.Thread(target=runner.serve, args=(self._queue, ready), daemon=True,
                                          name=f"featstore {runner.bench.device}")
                         for runner, ready in zip(runners, self._ready, strict=True)]

    def __enter__(self) -> Devices:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(at_once=kind is not None)

    @property
    def pending(self) -> set[Future[Outputs]]:
        """Batches that are under way: `concurrent.futures.wait` wakes when one is done."""
        return set(self._batches)

    def load(self) -> None:
        """Start the threads and wait until each has loaded what runs there. CannotLoad names what is missing."""
        for thread in self._threads:
            thread.start()
        for ready in self._ready:
            ready.result()

    def add(self, made: Made) -> None:
        """Take an utterance and cut its waveforms into pieces; waits while too much audio is under way."""
        utterance = _Utterance(made)
        for names in self._bench.passes(name for name in made.task.names if name in self.extractors):
            extractor = self.extractors[names[0]]
            if extractor.sample_rate not in made.waves:
                continue  # the recording could not be decoded
            target = _Ordered(Collected(self._bench, names, made), utterance)
            utterance.passes.append(target.collected)
            cutter = Cutter(extractor)
            for block, last in with_last(made.waves[extractor.sample_rate].blocks(keep=True)):
                for piece in cutter.push(block, last):
                    self._gather(names, target, piece, len(piece.wave) / extractor.sample_rate)
        for wave in made.waves.values():
            wave.drop()
        made.waves = {}
        self._close_one(utterance)

    def finished(self) -> list[Made]:
        """The utterances that are complete now."""
        for future in [future for future in self._batches if future.done()]:
            self._take(self._batches.pop(future))
        found, self._complete = self._complete, []
        return found

    def flush(self) -> bool:
        """Send off what is gathered for larger batches; whether anything is under way, or complete and not taken."""
        self._dispatch()
        return bool(self._batches or self._complete)

    def rest(self) -> Iterator[Made]:
        """All that is still under way, as it is done."""
        self._dispatch()
        yield from self.finished()
        while self._batches:
            self._wait()
            yield from self.finished()

    def close(self, at_once: bool = False) -> None:
        """End the threads. at_once: what is under way is not waited for."""
        with contextlib.suppress(queue.Empty):
            while (batch := self._queue.get_nowait()) is not None:
                batch.future.cancel()
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            if thread.is_alive() and not at_once:
                thread.join()

    def _gather(self, names: Pass, target: _Ordered, piece: Piece, seconds: float) -> None:
        self._gathered.setdefault(names, []).append(_Waiting(target, target.given, piece, seconds))
        target.given += 1
        target.utterance.open += 1
        self._gathered_s += seconds
        self._held_s += seconds
        unit_s = max(budget.seconds for budget in self._budgets.values()) * len(self._budgets)
        idle = len(self._batches) < self._count
        if self._gathered_s >= (unit_s / 4 if idle else unit_s * AHEAD * self._count):
            self._dispatch()
        while self._held_s >= unit_s * HELD * self._count:
            self._dispatch()
            self._wait()
            self._complete = self.finished()

    def _dispatch(self) -> None:
        """Cut what was gathered into batches: shortest first, within the budget, with little padding."""
        gathered, self._gathered, self._gathered_s = self._gathered, {}, 0.0
        for names, waiting in gathered.items():
            batch: list[_Waiting] = []
            taken = 0.0
            for one in sorted(waiting, key=lambda one: one.seconds):
                padded = one.seconds * (len(batch) + 1)
                if batch and (padded > self._budgets[names].seconds or len(batch) == MOST
                              or padded - taken - one.seconds > PADDED * padded):
                    self._send(_Batch(names, batch))
                    batch, taken = [], 0.0
                batch.append(one)
                taken += one.seconds
            self._send(_Batch(names, batch))

    def _send(self, batch: _Batch) -> None:
        self._batches[batch.future] = batch
        self._queue.put(batch)

    def _wait(self) -> None:
        wait(self._batches, TICK_S, FIRST_COMPLETED)
        self._idle()

    def _take(self, batch: _Batch) -> None:
        for one, found in zip(batch.waiting, batch.future.result(), strict=True):
            one.target.put(one.number, one.piece, found)
            self._held_s -= one.seconds
            self._close_one(one.target.utterance)

    def _close_one(self, utterance: _Utterance) -> None:
        utterance.open -= 1
        if not utterance.open:
            for collected in utterance.passes:
                collected.finish()
            self._complete.append(utterance.made)


class _Runner:
    """What one device does, in its thread."""

    def __init__(self, bench: Workbench, budgets: Mapping[Pass, Budget], loading: threading.Lock) -> None:
        self.bench, self.budgets, self.loading = bench, budgets, loading

    def serve(self, batches: queue.SimpleQueue[_Batch | None], ready: Future[None]) -> None:
        """Load, then run batches until there is None."""
        try:
            for names in self.budgets:
                self._load(names)
            ready.set_result(None)
        except BaseException as error:  # whatever it is, the thread that waits must see it
            ready.set_exception(error)
            return
        while (batch := batches.get()) is not None:
            if not batch.future.set_running_or_notify_cancel():
                continue
            try:
                batch.future.set_result(self._outputs(batch.names, [one.piece.wave for one in batch.waiting]))
            except BaseException as error:
                batch.future.set_exception(error)
            del batch  # its waveforms need not wait for the next

    def _outputs(self, names: Pass, waves: list[np.ndarray]) -> Outputs:
        """Of waveforms, shortest first: as many at once as the budget has since become."""
        found: Outputs = []
        rate = self.bench.extractors[names[0]].sample_rate
        while waves:
            count = len(waves)
            while count > 1 and len(waves[count - 1]) / rate * count > self.budgets[names].seconds:
                count -= 1
            found += self._halved(names, waves[:count])
            waves = waves[count:]
        return found

    def _halved(self, names: Pass, waves: list[np.ndarray]) -> Outputs:
        """What a batch gives; one that fails in halves, down to the waveforms that fail alone."""
        seconds = len(waves[-1]) / self.bench.extractors[names[0]].sample_rate
        try:
            self._load(names)
            arrays = self.bench.run(names, waves)
            found: Outputs = [list(of_one) for of_one in zip(*arrays, strict=True)]
            if len(found) != len(waves):
                raise TypeError(f"{len(waves)} waveforms gave {len(found)} arrays")
            self.budgets[names].fitted(seconds * len(waves))
            return found
        except CannotLoad:
            raise
        except Exception as error:
            why, full = reason(error), out_of_memory(error)
        # Here the exception is gone, and with it the tensors that its traceback held.
        if full:
            empty_cache(self.bench.device)
        if len(waves) == 1:
            if full and self.bench.unload(but=names):
                empty_cache(self.bench.device)
                return self._halved(names, waves)
            return [too_large(self.bench.device, seconds) if full else why]
        if full:
            self.budgets[names].failed(seconds * len(waves))
            return self._outputs(names, waves)
        middle = len(waves) // 2
        return self._outputs(names, waves[:middle]) + self._outputs(names, waves[middle:])

    def _load(self, names: Pass) -> None:
        """Make a pass ready, alone on the device if it does not fit beside others."""
        with self.loading:
            try:
                return self.bench.load(names)
            except CannotLoad as error:
                if (missing := _missing(self.bench.device, str(error))) is not None:
                    raise CannotLoad(f"{', '.join(names)} cannot be loaded: {missing}") from error
                if not out_of_memory(error.__cause__) or not self.bench.unload():
                    raise
            empty_cache(self.bench.device)
            self.bench.load(names)


def empty_cache(device: str) -> None:
    """Give back what torch keeps of a device's memory, if torch is there."""
    gc.collect()  # networks are full of cycles
    backend: Any = getattr(sys.modules.get("torch"), device.partition(":")[0], None)
    if hasattr(backend, "empty_cache"):
        backend.empty_cache()


def _missing(device: str, said: str) -> str | None:
    """What torch has instead, if it is loaded and has not that device. said: what came of using it."""
    torch: Any = sys.modules.get("torch")
    if torch is None:
        return None
    kind, _, number = device.partition(":")
    known, instead = f"torch {torch.__version__}", "Give one that is there, or --device cpu"
    if kind == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        there = f"only {', '.join(f'cuda:{i}' for i in range(count))}" if count else "no CUDA device"
        return f"there is no {device}; {known} sees {there}. {instead}" if int(number or 0) >= count else None
    if kind == "mps":
        return None if torch.backends.mps.is_available() else f"there is no mps; {known} sees none. {instead}"
    if "device string" in said:
        return f"{known} knows no device {device!r}: expected cpu, cuda, cuda:0, several as in cuda:0,1, or mps"
    return None
