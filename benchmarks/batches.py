"""What the loader adds to reading: batches through featstore.torch with 0, 1 and 2 workers beside bare read_batch.

    python benchmarks/batches.py [--rounds 5] [--batches 40] [--batch 32] [--frames 188]

One store of float16 content (1024-d at 50 Hz), f0, energy, log-mel (100-d) and wave, warm, aligned to the log-mel.
Every way in turn in every round, medians with their range, as ratios to `read_batch` into arrays that are written over.
Workers are started before the clock is. A loop that does nothing with its batches waits for every one of them; one
that computes for twice as long as reading takes sees what training would see: the wait that is left.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[variable] = "1"

import numpy as np  # noqa: E402  # threads are counted on import

import featstore as fs  # noqa: E402
from featstore.torch import loader  # noqa: E402

MEL, HOP = Fraction(24000, 256), 256
NAMES = ["content", "f0", "energy", "log-mel", "wave"]


def make(path: Path, utterances: int = 60, seconds: float = 10) -> fs.Store:
    """Utterances of random numbers."""
    noise, store = np.random.default_rng(0), fs.create(path)
    with store.writer() as w:
        for name, rate, kind in (("content", 50, "continuous"), ("f0", 200, "f0"), ("energy", 200, "continuous"),
                                 ("log-mel", MEL, "continuous"), ("wave", 24000, "samples")):
            w.declare(name, fs.Spec(made_by="noise", version=1, frame_rate=Fraction(rate), kind=kind,
                                    settings={"of": name}))
        for number in range(utterances):
            key, frames = f"s{number % 6}/{number}", int(seconds * MEL)
            w.write(key, "content", noise.normal(size=(int(seconds * 50), 1024)).astype(np.float16))
            w.write(key, "f0", noise.uniform(100, 400, int(seconds * 200)).astype(np.float32))
            w.write(key, "energy", noise.uniform(0, 1, int(seconds * 200)).astype(np.float32))
            w.write(key, "log-mel", noise.normal(size=(frames, 100)).astype(np.float32))
            w.write(key, "wave", noise.normal(0, 0.1, frames * HOP).astype(np.float32))
    return fs.open(path)


def bare(crops: fs.Batches, count: int) -> Iterator[Any]:
    """What there is to read, and nothing else."""
    items = [crops.items(i) for i in range(count)]
    room = crops.view.room(len(items[0]), len(crops[0]["f0"][0]))
    for some in items:
        yield crops.view.read_batch(some, frames=room["f0"].shape[1], out=room)


def numpy_batches(crops: fs.Batches, count: int) -> Iterator[Any]:
    """New arrays for each batch, and the drawing of it."""
    return (crops[i] for i in range(count))


def timed(ways: dict[str, Callable[[], Iterator[Any]]], rounds: int, busy_s: float) -> dict[str, list[float]]:
    """Milliseconds that the loop waits for a batch, by way, a number for each round. The first batch does not count."""
    waits: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            batches = way()
            next(batches)
            waited, count = 0.0, 0
            while True:
                until = time.perf_counter() + busy_s
                while time.perf_counter() < until:
                    pass
                start = time.perf_counter()
                if next(batches, None) is None:
                    break
                waited += time.perf_counter() - start
                count += 1
            waits[name].append(waited / count * 1e3)
    return waits


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, default in (("rounds", 5), ("batches", 40), ("batch", 32), ("frames", 188)):
        parser.add_argument(f"--{name}", type=int, default=default)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        view = make(Path(folder) / "s.zarr").view(NAMES, like="log-mel")
        crops = fs.crops(view, frames=asked.frames, batch=asked.batch)
        size = sum(array.nbytes for array in crops[0].values())
        ways: dict[str, Callable[[], Iterator[Any]]] = {
            "read_batch(out=)": lambda: bare(crops, asked.batches),
            "crops[i]": lambda: numpy_batches(crops, asked.batches),
        } | {f"loader, {workers} workers": lambda workers=workers: loader(crops, workers=workers, stop=asked.batches)
             for workers in (0, 1, 2)}
        print(f"{asked.batch} crops of {asked.frames} frames x {len(NAMES)} features, {size / 1e6:.1f} MB a batch, "
              f"{asked.batches} batches, {asked.rounds} rounds, {os.cpu_count()} cores")
        idle = timed(ways, asked.rounds, 0.0)
        table("waited for, by a loop that does nothing", idle)
        busy_s = 2 * statistics.median(idle["read_batch(out=)"]) / 1e3
        table(f"waited for, by a loop that computes {busy_s * 1e3:.1f} ms", timed(ways, asked.rounds, busy_s))


def table(title: str, waits: dict[str, list[float]]) -> None:
    base = statistics.median(next(iter(waits.values())))
    print(f"\n{title:48}{'ms a batch':>12}{'range':>18}{'ratio':>8}")
    for name, values in waits.items():
        middle = statistics.median(values)
        print(f"  {name:46}{middle:12.2f}{min(values):10.2f} -{max(values):6.2f}{middle / base:8.2f}")


if __name__ == "__main__":
    main()
