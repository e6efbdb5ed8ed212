"""The engine beside its limits: overhead over the bare extractors, memory on long recordings, planning what is fresh.

    python benchmarks/engine.py overhead [--shared ../shared] [-f log-mel -f f0 -f energy] [--every 1]
    python benchmarks/engine.py memory   [--shared ../shared] [-f log-mel -f f0:dio -f energy] [--minutes 60 120]
    python benchmarks/engine.py plan     [--utterances 100000]

Ratios come from one interleaved run. Goals: overhead <= 1.15 x (bare time / workers); the peaks of 60 and 120 minutes
within 10 % of each other and below 1.5 GiB, all processes together; 100,000 fresh utterances planned in 3 s.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
os.environ |= dict.fromkeys(THREADS, "1")  # the bare extractors get what a worker gets: one core

import numpy as np  # noqa: E402
import psutil  # noqa: E402
import soundfile as sf  # noqa: E402

import featstore as fs  # noqa: E402
from featstore import audio  # noqa: E402
from featstore_extractors import parse  # noqa: E402


def overhead(shared: Path, requests: list[str], every: int, rounds: int) -> None:
    """Engine with two workers against the extractors alone, on waveforms that are decoded and resampled already."""
    with tempfile.TemporaryDirectory() as scratch:
        corpus = _part(shared, Path(scratch), every)
        extractors = parse(*requests)
        waves = {rate: [_decoded(corpus.path(u), rate) for u in corpus]
                 for rate in {e.sample_rate for e in extractors.values()}}
        runs = {name: extractor.load("cpu") for name, extractor in extractors.items()}
        seconds = sum(len(w) for w in next(iter(waves.values()))) / next(iter(waves))
        print(f"{len(corpus)} recordings, {seconds / 60:.1f} min; {' '.join(requests)}; {rounds} rounds, 2 workers")
        ratios, limits, cpu = [], [], []
        for number in range(rounds):
            bare = {name: _timed(lambda run=run, name=name: [run([w]) for w in waves[extractors[name].sample_rate]])
                    for name, run in runs.items()}
            both = _timed(lambda: _at_once(extractors, waves))
            store = fs.create(Path(scratch) / f"{number}.zarr")
            spent = _cpu_s()
            engine = _timed(lambda store=store: fs.extract(corpus, store, extractors, workers=2))
            cpu.append((_cpu_s() - spent) / sum(bare.values()))
            ratios.append(engine / (sum(bare.values()) / 2))
            limits.append(engine / both)
            parts = ", ".join(f"{name} {t:.2f}" for name, t in bare.items())
            print(f"  bare {sum(bare.values()):.2f} s ({parts}); in two processes at once {both:.2f} s; "
                  f"engine {engine:.2f} s; engine / (bare / 2) = {ratios[-1]:.3f}, / at once = {limits[-1]:.3f}")
        for name, found in (("bare / 2", ratios), ("two bare processes at once", limits),
                            ("bare, processor seconds of all processes", cpu)):
            middle = statistics.median(found)
            print(f"overhead over {name}: median {middle:.3f} ({min(found):.3f} to {max(found):.3f}); goal <= 1.15")


def _cpu_s() -> float:
    """Processor seconds of this process and of those it has waited for: steadier than the clock on a shared machine."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def _at_once(extractors: dict[str, fs.Extractor], waves: dict[int, list[np.ndarray]]) -> None:
    """The extractors alone in two processes, one half of the recordings each: what two cores can do."""
    context = multiprocessing.get_context("fork")  # the waveforms are there already
    halves = [context.Process(target=_bare, args=(extractors, waves, half)) for half in (0, 1)]
    for process in halves:
        process.start()
    for process in halves:
        process.join()


def _bare(extractors: dict[str, fs.Extractor], waves: dict[int, list[np.ndarray]], half: int) -> None:
    order = sorted(range(len(next(iter(waves.values())))), key=lambda i: -len(next(iter(waves.values()))[i]))
    for extractor in extractors.values():
        run = extractor.load("cpu")
        for i in order[half::2]:
            run([waves[extractor.sample_rate][i]])


def memory(shared: Path, requests: list[str], minutes: list[int]) -> None:
    """Peak memory of the whole process tree on one long recording each (proportional set size: shared pages once)."""
    peaks = []
    for length in minutes:
        with tempfile.TemporaryDirectory() as scratch:
            wav = Path(scratch) / "wavs" / f"{length}min.wav"
            wav.parent.mkdir()
            _long(shared, wav, length)
            command = [sys.executable, "-c", _EXTRACT, str(wav.parent), str(Path(scratch) / "s.zarr"), *requests]
            began = time.monotonic()
            peaks.append(_peak(command))
            print(f"  {length} min: peak {peaks[-1] / 2**20:.0f} MiB, {time.monotonic() - began:.0f} s")
    print(f"memory: {' '.join(requests)}: longest / shortest = {peaks[-1] / peaks[0]:.3f}; goal <= 1.10 and < 1536 MiB")


def planning(utterances: int) -> None:
    """Scan, open and plan a corpus of tiny files that is all fresh; the store is made first."""
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch) / "wavs"
        for number in range(100):
            folder = root / f"spk{number:02d}"
            folder.mkdir(parents=True)
            first = folder / "u00000.wav"
            sf.write(first, np.random.default_rng(number).uniform(-0.1, 0.1, 480), 24000)
            for other in range(1, utterances // 100):
                os.link(first, folder / f"u{other:05d}.wav")
        extractors, path = parse("energy"), Path(scratch) / "s.zarr"
        time.sleep(2.1)  # files younger than this are hashed again
        made = fs.extract(fs.corpus(root), fs.create(path), extractors)
        print(f"{made.done:,} utterances extracted in {made.elapsed_s:.0f} s")
        times = []
        for _ in range(5):
            began = time.monotonic()
            plan = fs.plan(fs.corpus(root), fs.open(path), extractors)
            times.append(time.monotonic() - began)
            if plan.todo.any():
                raise SystemExit("not everything was fresh")
        print(f"plan: {utterances:,} fresh utterances, scan and plan: median {statistics.median(times):.2f} s "
              f"({min(times):.2f} to {max(times):.2f}); goal < 3")


_EXTRACT = """
import sys
import featstore as fs
from featstore_extractors import parse
report = fs.extract(fs.corpus(sys.argv[1]), fs.create(sys.argv[2]), parse(*sys.argv[3:]), workers=2)
if report.failures:
    sys.exit(str(report.failures))
"""


def _part(shared: Path, scratch: Path, every: int) -> fs.Corpus:
    """Every n-th recording, by links."""
    whole = fs.corpus(shared / "audio")
    for utterance in list(whole)[::every]:
        link = scratch / "wavs" / utterance.audio
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(whole.path(utterance).resolve())
    return fs.corpus(scratch / "wavs")


def _decoded(path: Path, rate: int) -> np.ndarray:
    with audio.Reader(path) as reader:
        wave = np.concatenate(list(reader))
    return audio.Resampler(reader.sample_rate, rate).push(wave, last=True)


def _timed(job: Callable[[], object]) -> float:
    began = time.monotonic()
    job()
    return time.monotonic() - began


def _long(shared: Path, path: Path, minutes: int) -> None:
    """A recording of `minutes` at 44.1 kHz, stereo, from the songs at hand, again and again."""
    songs = sorted((shared / "audio").glob("csd_*/*.flac"))
    left, rate = minutes * 60 * 44100, 44100
    with sf.SoundFile(path, "w", rate, 2, "PCM_16") as out:
        for number in range(10**6):
            wave = _decoded(songs[number % len(songs)], rate)[:left]
            out.write(np.stack([wave, 0.8 * wave], axis=1))
            left -= len(wave)
            if left <= 0:
                return


def _peak(command: list[str]) -> int:
    process = psutil.Popen(command)
    highest = 0

    def watch() -> None:
        nonlocal highest
        while process.poll() is None:
            total = 0
            for one in [process, *_children(process)]:
                try:
                    total += one.memory_full_info().pss
                except psutil.Error:
                    continue
            highest = max(highest, total)
            time.sleep(0.2)

    watcher = threading.Thread(target=watch)
    watcher.start()
    code = process.wait()
    watcher.join()
    if code:
        raise subprocess.CalledProcessError(code, command)
    return highest


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        found: list[psutil.Process] = process.children(recursive=True)
        return found
    except psutil.Error:
        return []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("part", nargs="?", choices=["overhead", "memory", "plan", "all"], default="all")
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared")
    parser.add_argument("-f", dest="requests", action="append")
    parser.add_argument("--every", type=int, default=1, help="overhead: use every n-th recording")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--minutes", type=int, nargs="+", default=[60, 120])
    parser.add_argument("--utterances", type=int, default=100_000)
    args = parser.parse_args()
    if args.part in ("overhead", "all"):
        overhead(args.shared, args.requests or ["log-mel", "f0", "energy"], args.every, args.rounds)
    if args.part in ("memory", "all"):
        memory(args.shared, args.requests or ["log-mel", "f0:dio", "energy", "wave"], args.minutes)
    if args.part in ("plan", "all"):
        planning(args.utterances)


if __name__ == "__main__":
    main()
