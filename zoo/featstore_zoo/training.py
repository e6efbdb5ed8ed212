"""The loop that trains every model of the zoo: optimisers, precision, several devices, checkpoints, exact resume.

On Lightning Fabric: it gives devices, precision, gradient scaling and DDP, and leaves the loop to us. (accelerate wraps
the data loader as well and keeps its position itself; here a batch is a function of its number, and so a checkpoint
has one integer for it.) A step is a pure function of weights, optimisers and the number of the step: every random draw
is seeded by (seed, step, rank). A run that was killed and resumed has the weights of one that was not.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.multiprocessing import ProcessRaisedException
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import featstore as fs
from featstore import storage
from featstore.errors import BadRequest, CannotLoad, FeatstoreError
from featstore.torch import loader
from featstore.work import out_of_memory
from featstore_extractors import checkpoint

from . import run as runs
from .examples import Examples
from .preparation import WEIGHTS, Precision, Training, begin, prepare, training_of
from .run import Run

__all__ = ["BEST", "LAST", "Diverged", "Outcome", "Told", "Trainer", "Training", "prepare", "train", "training_of"]

MODEL, ADVERSARY = "model", "adversary"
FABRIC_PRECISION: dict[str, Any] = {"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}


class Diverged(FeatstoreError, ArithmeticError):
    """Gradients were not finite for many steps in a row."""


@dataclass(frozen=True)
class Told:
    """How far training is. `terms`: losses of the last step; `loader_share`: of the time since the first batch was
    there, how much was waiting for data."""

    step: int
    steps: int
    terms: Mapping[str, float]
    elapsed_s: float
    loader_share: float
    validated: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """How a training ended. `interrupted`: by Ctrl-C, everything kept; `early`: for want of a better validation.

    terms: losses of the last step; empty where there was nothing left to do.
    """

    step: int
    terms: Mapping[str, float]
    best: float
    interrupted: bool = False
    early: bool = False


def train(path: str | Path, store: str | storage.Place, *, device: str = "cpu", workers: int = 2, resume: bool = False,
          steps: int | None = None, progress: Callable[[Told], None] | None = None) -> Outcome:
    """Train the run in a folder on a store, to the end of its steps.

    device: "cpu", "cuda", "cuda:0,1" (data parallel), "mps"; "cpu:0,1" are two processes.
    workers: processes that read batches; 0 for none beside this one.
    resume: go on from checkpoints/last, or begin where a run ended before it kept one; without it, a run that has a
        checkpoint is refused.
    steps: where to end this time. More than the run says lengthens the run.

    Ctrl-C ends the step, keeps a checkpoint and returns with `Outcome.interrupted`.

    Raises:
        NotARun, CannotLoad: the run or its checkpoint cannot be read, or is there already.
        MissingFeature, IdentityMismatch: the store does not serve what the run reads.
        Diverged: gradients stayed infinite or NaN; the last checkpoint is whole.
    """
    opened = runs.load(path)
    if not resume and (opened.path / LAST).exists():
        raise runs.NotARun(f"{path} has been trained already: go on with --resume, or choose another folder (-o)")
    opened.check_store(fs.open(store))
    if steps is not None and steps > training_of(opened).steps:
        opened = runs.retrained(opened, steps=steps)
    fabric = _fabric(device, training_of(opened).precision)
    with _left_to_children() if fabric.world_size > 1 else contextlib.nullcontext():
        work = partial(_work, path=str(path), store=str(store), workers=workers, resume=resume, steps=steps,
                       progress=progress)
        try:
            return Outcome(**fabric.launch(work))
        except ProcessRaisedException as error:  # all that is left of an exception in a child is its traceback
            kind, _, said = str(error).strip().splitlines()[-1].partition(": ")
            if not kind.startswith("featstore"):
                raise
            raise CannotLoad(said) from error


@contextlib.contextmanager
def _left_to_children() -> Iterator[None]:
    """Ctrl-C reaches every process of a terminal; the one that only waits for the others must outlive them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _fabric(device: str, precision: Precision) -> Fabric:
    kind, _, numbers = device.partition(":")
    if kind not in ("cpu", "cuda", "mps") or not re.fullmatch(r"(\d+(,\d+)*)?", numbers):
        raise BadRequest(f"device {device!r}: expected cpu, cuda, cuda:0,1 or mps")
    ids = [int(number) for number in numbers.split(",")] if numbers else [0]
    if kind == "cuda" and not torch.cuda.is_available():
        raise CannotLoad("device cuda: this machine, or this build of torch, has no CUDA; use --device cpu")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise CannotLoad("device mps: this machine, or this build of torch, has no MPS; use --device cpu")
    if kind == "cpu" and precision == "16":
        raise BadRequest("precision 16 needs a GPU: on a CPU take bf16 (--precision bf16), or 32")
    devices: Any = len(ids) if kind == "cpu" else ids
    return Fabric(accelerator=kind, devices=devices, strategy="ddp_spawn" if len(ids) > 1 else "auto",
                  precision=FABRIC_PRECISION[precision])


def _work(fabric: Fabric, path: str, store: str, workers: int, resume: bool, steps: int | None,
          progress: Callable[[Told], None] | None) -> dict[str, Any]:
    """One process of a training. The fields of its Outcome: Fabric takes nothing frozen from another process."""
    run = runs.load(path)
    try:
        trainer = Trainer(fabric, run, fs.open(store), workers, steps)
        if resume and (run.path / LAST).exists():
            trainer.restore()
        elif (run.path / WEIGHTS).exists():
            raise CannotLoad(f"{path} has weights and no checkpoint to go on from ({LAST}): begin another run with "
                             f"them, featstore train ... --init {path} -o OTHER")
        else:
            trainer.begin()
        return vars(trainer.go(progress if fabric.global_rank == 0 else None))
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise CannotLoad(_too_large(training_of(run), fabric.device)) from error


def _too_large(training: Training, device: torch.device) -> str:
    """What is said where a step does not fit into memory. Steps of the same crops, in parts, learn the same."""
    part, parts = max(1, training.batch // 2), training.accumulate * min(2, training.batch)
    smaller = f"--set batch={part} --set accumulate={parts}" if training.batch > 1 else "--set frames=N, fewer"
    return (f"{device} has too little memory for batches of {training.batch} crops of {training.frames} frames. Begin "
            f"again in another folder with {smaller}, or --precision bf16; or free what else is in its memory")


class Trainee(nn.Module):
    """What is trained, as one module: a batch to its losses. Both sides in one forward, so that DDP sees them."""

    def __init__(self, package: ModuleType, model: nn.Module, adversary: nn.Module | None) -> None:
        super().__init__()
        self._losses = package.losses
        self.model, self.adversary = model, adversary

    def forward(self, batch: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        more = {} if self.adversary is None else {"adversary": self.adversary}
        terms: dict[str, Tensor] = self._losses(self.model, batch, generator, **more)
        return terms


class Trainer:
    """One training in one process: weights, optimisers, averages, batches."""

    def __init__(self, fabric: Fabric, run: Run, store: fs.Store, workers: int, steps: int | None) -> None:
        self.fabric, self.run, self.workers = fabric, run, workers
        self.training = training_of(run)
        self.steps = steps or self.training.steps
        self.package = run.settings.package
        torch.manual_seed(self.training.seed)
        self.model = run.network()
        adversary = self.package.Adversary(run.settings.config) if hasattr(self.package, "Adversary") else None
        if adversary is not None and not any(True for _ in adversary.parameters()):
            adversary = None
        self.average = averaged(self.model, self.training.ema)
        self.optimisers = {MODEL: self._optimiser(self.model)}
        if adversary is not None:
            self.optimisers[ADVERSARY] = self._optimiser(adversary)
        trainee: Any = Trainee(self.package, self.model, adversary)
        if self.training.compile:
            trainee = torch.compile(trainee)
        self.trainee, *optimisers = fabric.setup(trainee, *self.optimisers.values())
        self.optimisers = dict(zip(self.optimisers, optimisers, strict=True))
        self.adversary = adversary
        if self.average is not None:
            self.average.to(fabric.device)
        self.examples = Examples(run, store, self.training)
        self.step = self.skipped = self.unimproved = 0
        self.best = math.inf
        self._stopping = False

    def begin(self) -> None:
        """Take the weights of the run that this one is to start from, if there is one, and the range of log-mels."""
        begin(self.run, self.model)

    def restore(self) -> None:
        """Take up where checkpoints/last was written.

        Raises:
            CannotLoad: it cannot be read, or is of another model.
            PositionMismatch: the store's batches are no longer those it was trained on; what changed is named.
        """
        path = self.run.path / LAST
        try:
            state = checkpoint.read(path)
        except (OSError, ValueError) as error:
            raise CannotLoad(f"{error}. Or begin again from the weights: featstore train ... --init "
                             f"{self.run.path}") from error
        try:
            self.examples.crops.resume(state["position"])  # PositionMismatch where the store's batches are others now
            self._fill(state)
        except (KeyError, RuntimeError) as error:  # what torch raises for names and shapes
            raise CannotLoad(f"{path} is no checkpoint of this run ({error}): config.json or the file was changed. Put "
                             "back the one that belongs to it, or begin another run") from error

    def _fill(self, state: Mapping[str, Any]) -> None:
        self.model.load_state_dict(state[MODEL])
        if self.adversary is not None:
            self.adversary.load_state_dict(state[ADVERSARY])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        for name, optimiser in self.optimisers.items():
            optimiser.load_state_dict(state["optimisers"][name])
        if self._scaler is not None and state["scaler"]:
            self._scaler.load_state_dict(state["scaler"])
        self.step, self.best, self.unimproved = state["step"], state["best"], state["unimproved"]

    def go(self, progress: Callable[[Told], None] | None) -> Outcome:
        from .validation import Log

        since, waited = 0.0, 0.0
        terms: dict[str, float] = {}
        validated: dict[str, float] = {}
        log = Log(self.run.path) if self.fabric.global_rank == 0 else None
        batches = self._batches()
        try:
            with self._interruptible(), contextlib.closing(batches):
                while self.step < self.steps and not self._asked_to_stop():
                    tensors, waiting = next(batches)
                    if since:
                        waited += waiting
                    since = since or time.monotonic()  # the first batch waits for processes to start
                    terms = self._update(tensors)
                    self.step += 1
                    elapsed = time.monotonic() - since
                    if log is not None:
                        log.scalars(self.step, terms | {"learning rate": self._rate(self.step)})
                    if self.step % self.training.validate_every == 0 or self.step == self.steps:
                        validated = self._validate(log)
                    if self.step % self.training.save_every == 0 or self.step == self.steps:
                        self.save()
                    if progress is not None:
                        progress(Told(self.step, self.steps, terms, elapsed, waited / elapsed, validated))
                    if self.training.patience and self.unimproved >= self.training.patience:
                        self.save()
                        return Outcome(self.step, terms, self.best, early=True)
            if self._stopping:
                self.save()
            return Outcome(self.step, terms, self.best, interrupted=self._stopping)
        finally:
            if log is not None:
                log.close()

    @property
    def _scaler(self) -> Any:
        """What keeps the gradients of precision 16 within its range; None in others."""
        return getattr(self.fabric.strategy.precision, "scaler", None)

    def save(self) -> None:
        """Put a checkpoint and the weights to use in place, each in one step."""
        if self.fabric.global_rank:
            return
        position = self.examples.crops.position(self.step * self.training.accumulate)
        state = {MODEL: self.model.state_dict(), "optimisers": {n: o.state_dict() for n, o in self.optimisers.items()},
                 ADVERSARY: self.adversary.state_dict() if self.adversary is not None else {},
                 "average": self.average.state_dict() if self.average is not None else {},
                 "scaler": self._scaler.state_dict() if self._scaler is not None else {}, "position": position,
                 "step": self.step, "best": self.best, "unimproved": self.unimproved}
        runs.put_state(self.run.path / LAST, state)
        runs.save(self.run.path, self.run.settings, self.used.state_dict(), self.step)

    @property
    def used(self) -> nn.Module:
        """The model with the weights that are to be used: the averaged ones, where there are."""
        return self.average.module if self.average is not None else self.model

    def _optimiser(self, module: nn.Module) -> torch.optim.Optimizer:
        t = self.training
        tables = [part.weight for part in module.modules() if isinstance(part, nn.Embedding)]
        rest = [weight for weight in module.parameters() if not any(weight is table for table in tables)]
        groups: list[dict[str, Any]] = [{"params": rest}]
        if tables:  # rows of whom is not heard must not shrink
            groups.append({"params": tables, "weight_decay": 0.0})
        return torch.optim.AdamW(groups, t.learning_rate, (t.beta1, t.beta2), weight_decay=t.weight_decay)

    def _rate(self, step: int) -> float:
        return self.training.learning_rate * self.training.decay ** (step / self.training.decay_every)

    def _batches(self) -> Generator[tuple[list[dict[str, Tensor]], float]]:
        """The batches of one update after the other, and the seconds that were waited for them."""
        count, rank, world = self.training.accumulate, self.fabric.global_rank, self.fabric.world_size
        batches = loader(self.examples.crops, workers=self.workers, device=self.fabric.device, start=self.step * count,
                         rank=rank, world=world)
        with contextlib.closing(batches):  # type: ignore[type-var]  # it is a generator
            while True:
                begin = time.monotonic()
                some = [self.examples.by_role(next(batches)) for _ in range(count)]
                yield some, time.monotonic() - begin

    def _update(self, batches: list[dict[str, Tensor]]) -> dict[str, float]:
        """One step of the optimisers; the losses it began with."""
        self.trainee.train()
        for optimiser in self.optimisers.values():
            optimiser.zero_grad()
            for group in optimiser.param_groups:
                group["lr"] = self._rate(self.step)
        terms: dict[str, Any] = {}
        for number, batch in enumerate(batches):
            seed = _seed(self.training.seed, self.step, number, self.fabric.global_rank)
            torch.manual_seed(seed)
            last = number == len(batches) - 1
            with self.fabric.no_backward_sync(self.trainee, enabled=not last):
                found = self.trainee(batch, seed)
                self.fabric.backward(torch.stack([term.float() for term in found.values()]).sum() / len(batches))
            for name, term in found.items():
                terms[name] = terms.get(name, 0) + term.detach() / len(batches)
        self._step_optimisers()
        return {name: float(value) for name, value in terms.items()}

    def _step_optimisers(self) -> None:
        """Update weights and their average, unless a gradient is not finite: then all stay as they are.

        The scaler of precision 16 belongs to all optimisers and is updated once, after them: its own way for each would
        take the scale out of the gradients of the second one twice.
        """
        norms: list[Any] = [self.fabric.clip_gradients(self.trainee, optimiser, error_if_nonfinite=False,
                                                       max_norm=self.training.clip or math.inf)
                            for optimiser in self.optimisers.values()]
        finite = all(math.isfinite(float(norm)) for norm in norms if norm is not None)
        for optimiser in self.optimisers.values() if finite else ():
            if self._scaler is not None:
                self._scaler.step(_unwrapped(optimiser))
            else:
                optimiser.step()
        if self._scaler is not None:
            self._scaler.update()  # lower, where a gradient was infinite
        if finite:
            self.skipped = 0
            if self.average is not None:
                self.average.update_parameters(self.model)
            return
        self.skipped += 1
        if self.skipped >= self.training.skips:
            raise Diverged(f"{self.run.path}: gradients were NaN or infinite for {self.skipped} steps in a row, up to "
                           f"step {self.step}. checkpoints/last is whole: go on from it with a lower learning_rate, "
                           "with clip=1, or in precision=32")

    def _validate(self, log: Any) -> dict[str, float]:
        """Metrics on held-out utterances by the weights that are used; the best so far are kept."""
        found: dict[str, float] = {}
        if log is not None:
            from .validation import validate

            found = validate(self.run, self.used, self.examples, self.step, log)
            if found["score"] < self.best:
                runs.put_tensors(self.run.path / BEST, self.used.state_dict())
        score = float(self.fabric.broadcast(found.get("score", math.nan)))
        if math.isfinite(score):  # NaN where nothing is held out
            self.unimproved = 0 if score < self.best else self.unimproved + 1
            self.best = min(self.best, score)
        return found

    def _asked_to_stop(self) -> bool:
        """Whether any process was: all end after the same step, or those left would wait for the others for ever."""
        if self.fabric.world_size > 1:
            asked: Any = torch.tensor(float(self._stopping), device=self.fabric.device)
            self._stopping = float(self.fabric.all_reduce(asked, reduce_op="sum")) > 0  # type: ignore[arg-type]
        return self._stopping

    @contextlib.contextmanager
    def _interruptible(self) -> Iterator[None]:
        """The first Ctrl-C ends the training after its step; the second at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def stop(number: int, frame: Any) -> None:
            if self._stopping:
                raise KeyboardInterrupt
            self._stopping = True

        before = signal.signal(signal.SIGINT, stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


LAST, BEST = Path("checkpoints/last/state.pt"), Path("checkpoints/best/model.safetensors")


def averaged(model: nn.Module, ema: float) -> AveragedModel | None:
    """A copy of a model whose weights follow it as an exponential average; None for an ema of 0.

    The n-th update keeps min(ema, (1 + n) / (10 + n)) of the average: a short training is not held at random weights.
    """
    def follow(averages: Any, weights: Any, count: Any) -> None:
        n = float(count)
        get_ema_multi_avg_fn(min(ema, (1 + n) / (10 + n)))(averages, weights, count)

    return AveragedModel(model, multi_avg_fn=follow, use_buffers=True) if ema else None


def _unwrapped(optimiser: Any) -> torch.optim.Optimizer:
    """The optimiser that Fabric wrapped."""
    found: torch.optim.Optimizer = optimiser.optimizer
    return found


def _seed(*parts: int) -> int:
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint32)[0])
