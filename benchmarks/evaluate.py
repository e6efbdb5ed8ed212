"""Evaluation: pairs per second in one process and in several, and what memory they take.

    python benchmarks/evaluate.py [--pairs 1000] [--alone 250] [--seconds 5] [--workers 2] [--report]

Pairs are cuts of examples/corpus and the same with noise. All metrics that need no recogniser; every process measures
some pairs first, so that loading is not counted. One process measures --alone of them, half before and half after
several have measured all, so that a machine that slows down does not flatter either. Peak memory is that of the
largest process. --report: with pages.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import soundfile as sf
import soxr

from featstore.pipeline import worker_environment
from featstore_zoo import evaluate, measure, pairs

CORPUS = Path(__file__).resolve().parents[1] / "examples" / "corpus"
RATE = 24000


def make(home: Path, count: int, seconds: float) -> None:
    """reference/ and noisy/: `count` recordings each."""
    song = np.concatenate([np.asarray(soxr.resample(*sf.read(path, dtype="float32"), RATE))
                           for path in sorted(CORPUS.rglob("*.flac"))])
    length = round(seconds * RATE)
    rng = np.random.default_rng(0)
    for name in ("reference", "noisy"):
        (home / name).mkdir()
    for number in range(count):
        start = int(rng.integers(len(song) - length))
        wave = song[start:start + length]
        sf.write(home / "reference" / f"{number:05d}.flac", wave, RATE)
        sf.write(home / "noisy" / f"{number:05d}.flac", wave + 0.01 * rng.standard_normal(length), RATE)


def timed(jobs: list[measure.Job], settings: measure.Settings, workers: int) -> tuple[float, float]:
    """Seconds for all jobs in so many processes, and the memory of the largest, MB."""
    with worker_environment(1), ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), measure.start,
                                                    (settings,)) as pool:
        list(pool.map(measure.work, jobs[:4 * workers]))
        begin = time.monotonic()
        done = sum(len(rows) for rows in pool.map(measure.work, jobs))
        took = time.monotonic() - begin
        peak = max(_peak(process.pid) for process in multiprocessing.active_children())
    if done != len(jobs):
        raise SystemExit(f"{done} of {len(jobs)} were measured")
    return took, peak


def _peak(process: int | None) -> float:
    """The most memory a process has had, MB."""
    status = Path(f"/proc/{process}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=1000)
    parser.add_argument("--alone", type=int, default=250)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--report", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        make(home, given.pairs, given.seconds)
        settings = measure.Settings(RATE, measure.STANDARD)
        found = pairs.pair(pairs.recordings(home / "reference"), {"noisy": pairs.recordings(home / "noisy")})
        jobs = [measure.Job(one) for one in found]
        print(f"{given.pairs:,} pairs of {given.seconds:g} s at {RATE / 1000:g} kHz, {len(measure.STANDARD)} metrics")
        print("processes  pairs  pairs/s  x one   peak MB")
        half = max(1, min(given.alone, given.pairs) // 2)
        before = timed(jobs[:half], settings, 1)
        took, peak = timed(jobs, settings, given.workers)
        after = timed(jobs[-half:], settings, 1)
        alone = 2 * half / (before[0] + after[0])
        print(f"{1:9}  {2 * half:5,}  {alone:7.2f}  {1:5.2f}  {max(before[1], after[1]):8.0f}")
        rate = len(jobs) / took
        print(f"{given.workers:9}  {len(jobs):5,}  {rate:7.2f}  {rate / alone:5.2f}  {peak:8.0f}", flush=True)
        if given.report:
            begin = time.monotonic()
            evaluate.evaluate(home / "reference", {"noisy": home / "noisy"}, home / "report", workers=given.workers)
            size = sum(path.stat().st_size for path in (home / "report").rglob("*") if path.is_file())
            print(f"whole report, {given.workers} processes: {time.monotonic() - begin:.0f} s, {size / 1e6:.0f} MB, "
                  f"index.html {(home / 'report' / 'index.html').stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
