"""ReTrans beside the reference's repetition and average, and beside a bare copy of the output; small crops.

    python benchmarks/align.py [--rounds 15] [--frames 500] [--dim 1024]

One thread, every way in turn in every round, medians with their range. Goals: <= 1.2 ms for 500 x 1024 float32 at 15:8
and at 441:256, in the memory of the output; < 30 us for a crop of 20 x 80.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
import tracemalloc
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from typing import Any

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[variable] = "1"

import numpy as np  # noqa: E402  # threads are counted on import

from featstore_align import align, align_f0, conversion, nearest, retrans, source_range  # noqa: E402

Job = Callable[[], object]
RATES = {"15:8": Fraction(24000, 256), "441:256": Fraction(44100, 512)}
MEL = RATES["15:8"]


def repetition(x: np.ndarray, rate: Fraction) -> np.ndarray:
    """What the paper's Algorithm 1 says, word for word."""
    s, t = (rate / 50).numerator, (rate / 50).denominator
    repeated = np.repeat(x, s, axis=0)
    return repeated[: len(repeated) // t * t].reshape(-1, t, x.shape[1]).mean(1)


def whole(rounds: int, frames: int, dim: int) -> None:
    """An utterance at both ratios, in float32 and float16: with numpy alone, with torch loaded, and compiled."""
    x = np.random.default_rng(0).standard_normal((frames, dim)).astype(np.float32)
    half = x.astype(np.float16)
    jobs: dict[str, Job] = {}
    for name, rate in RATES.items():
        y = retrans(x, 50, rate)
        jobs |= {f"{name} ReTrans": partial(retrans, x, 50, rate),
                 f"{name} ReTrans into out": partial(retrans, x, 50, rate, out=y.copy()),
                 f"{name} repetition and average": partial(repetition, x, rate),
                 f"{name} copy of the output": partial(np.copyto, y.copy(), y),
                 f"{name} ReTrans float16": partial(retrans, half, 50, rate)}
    table(f"{frames} x {dim}, 50 Hz, numpy alone", jobs, rounds, 1e3, "ms", memory=True)
    try:
        import torch
    except ImportError:
        print("missing: torch is not installed")
    else:
        torch.set_num_threads(1)
        jobs = {}
        for name, rate in RATES.items():
            jobs[f"{name} ReTrans float16"] = partial(retrans, half, 50, rate)
            jobs[f"{name} ReTrans of a tensor"] = partial(retrans, torch.from_numpy(x), 50, rate)
        table(f"{frames} x {dim}, 50 Hz, torch loaded", jobs, rounds, 1e3, "ms")
    if sys.modules["featstore_align.retrans"].compiled() is None:
        print("missing: numba is not installed")
        return
    jobs = {}
    for name, rate in RATES.items():
        jobs[f"{name} ReTrans"] = partial(retrans, x, 50, rate)
        jobs[f"{name} ReTrans float16"] = partial(retrans, half, 50, rate)
        jobs[f"{name} copy of the output"] = partial(np.copyto, retrans(x, 50, rate), retrans(x, 50, rate))
    table(f"{frames} x {dim}, 50 Hz, compiled", jobs, rounds, 1e3, "ms")


def crops(rounds: int) -> None:
    """What one call costs where the arithmetic is little: crops read in part from the middle of ten minutes."""
    jobs: dict[str, Job] = {}
    ways: dict[Any, Any] = {"continuous": retrans, "f0": align_f0, "discrete": nearest}
    for name, kind, rate, shape, frames in (("20 x 80", "continuous", 50, (80,), 20), ("20 of f0", "f0", 200, (), 20),
                                            ("20 labels", "discrete", 50, (), 20),
                                            ("188 x 1024", "continuous", 50, (1024,), 188)):
        crop = {"start": 1017, "stop": 1017 + frames, "source_length": 600 * rate}
        first, last = source_range(1017, 1017 + frames, rate, MEL, source_length=600 * rate, kind=kind)  # type: ignore
        x = np.random.default_rng(0).uniform(100, 200, (last - first, *shape)).astype(np.float32)
        grids = conversion(rate, MEL, "centres" if kind == "f0" else "edges")
        jobs[name] = partial(ways[kind], x, rate, MEL, source_start=first, **crop)
        jobs[f"{name}, grids prepared"] = partial(align, kind, x, grids, source_start=first, **crop)  # type: ignore
    table("one crop, float32", jobs, rounds, 1e6, "us", calls=200)


def table(title: str, jobs: dict[str, Job], rounds: int, scale: float, unit: str, calls: int = 1,
          memory: bool = False) -> None:
    """Print medians and ranges; `memory`: the most that was allocated at a time, output included."""
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for job in jobs.values():
        job()
    for _ in range(rounds):
        for name, job in jobs.items():
            begin = time.perf_counter()
            for _ in range(calls):
                job()
            times[name].append(scale * (time.perf_counter() - begin) / calls)
    print(title)
    for name, job in jobs.items():
        peak = ""
        if memory:
            tracemalloc.start()
            job()
            peak = f"  {tracemalloc.get_traced_memory()[1] / 1e6:7.1f} MB"
            tracemalloc.stop()
        low, high = min(times[name]), max(times[name])
        print(f"  {name:34s} {statistics.median(times[name]):8.2f} {unit}  ({low:.2f} to {high:.2f}){peak}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--frames", type=int, default=500)
    parser.add_argument("--dim", type=int, default=1024)
    given = parser.parse_args()
    crops(given.rounds)
    whole(given.rounds, given.frames, given.dim)
