"""Conversion of songs: memory and time by length, and what windows change.

    python benchmarks/conversion.py memory [--minutes 2 20] [--only NAME ...]
    python benchmarks/conversion.py windows [--only NAME ...] [--steps 300]

memory: peak resident memory of `featstore convert` for songs of these lengths, through small models and a small
    NSF-HiFiGAN, each in a process of its own: with the extraction of their features, and then again from the cache.
windows: models in a small size, trained for some steps on the recordings of examples/corpus, on a song of 33 s in
    windows and at once: the greatest and the mean difference of log-mels in dB (of VITS, of samples at full scale 1).
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import featstore as fs
from featstore_extractors import parse
from featstore_zoo import convert, training
from featstore_zoo import run as runs
from featstore_zoo.sources import jobs

ROOT = Path(__file__).resolve().parents[1]
CORPUS = ROOT / "examples" / "corpus"
SONG = CORPUS / "vocadito_S1" / "vocadito_1.flac"  # 33 s
MODELS = ("diffwavenet-svc", "transformer-svc", "como-svc", "vits-svc")
SIZES = {"diffwavenet-svc": {"channels": 64, "layers": 8, "sampling_steps": 20}, "como-svc": {"sampling_steps": 10}}
WINDOWS = (128, 256, 512, 1024)


def store_of(home: Path) -> fs.Store:
    """The recordings of examples/corpus; as content a log-mel of another frame rate, which needs no weights."""
    store = fs.create(home / "store.zarr")
    fs.extract(fs.corpus(CORPUS), store, parse("log-mel", "mel22=log-mel:22k-80", "f0:dio", "loudness", "wave"),
               workers=0)
    return fs.open(home / "store.zarr")


def trained(home: Path, store: fs.Store, name: str, steps: int) -> runs.Run:
    """A run of a small model after some steps."""
    fields = SIZES.get(name, {}) | {"steps": steps, "batch": 4, "frames": 128, "valid_utterances": 0,
                                    "validate_every": 10**6, "save_every": 10**6, "learning_rate": 1e-3}
    more: dict[str, Any] = {} if name == "nsf-hifigan" else {"content": ["mel22"]}
    training.prepare(home, store, name, smoke=True, fields=fields, **more)
    training.train(home, store.path, workers=0)
    return runs.load(home)


# --- memory


def memory(minutes: list[float], names: list[str]) -> None:
    print("featstore convert: peak resident memory, and x real time with extraction and without\n")
    print(f"{'':16} {'minutes':>8} {'MiB before':>11} {'at most':>8} {'first':>7} {'again':>7}")
    for name in names:
        for length in minutes:
            command = [sys.executable, __file__, "memory", "--alone", "--minutes", str(length), "--only", name]
            done = subprocess.run(command, text=True, capture_output=True)
            if done.returncode:
                raise SystemExit(done.stderr[-2000:])
            print(done.stdout.strip(), flush=True)


def memory_alone(minutes: float, name: str) -> None:
    import soundfile as sf

    with tempfile.TemporaryDirectory() as place:
        home = Path(place)
        os.environ["XDG_CACHE_HOME"] = str(home / "cache")
        voice, rate = sf.read(SONG, dtype="int16")
        with sf.SoundFile(home / "song.flac", "w", rate, 1) as file:
            left = int(minutes * 60 * rate)
            while left > 0:
                file.write(voice[:left])
                left -= len(voice)
        store = store_of(home)
        run = trained(home / "run", store, name, 1)
        voc = None if name == "vits-svc" else trained(home / "voc", store, "nsf-hifigan", 1).path
        before, took = peak(), []
        for _ in range(2):
            begin = time.monotonic()
            made = convert.file(home / "song.flac", to=next(iter(run.singers)), run=run.path, vocoder=voc,
                                out=home / "out.wav")
            took.append(time.monotonic() - begin)
        first, again = (made.seconds / seconds for seconds in took)
        print(f"{name:16} {minutes:8g} {before:11.0f} {peak():8.0f} {first:7.1f} {again:7.1f}")


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# --- windows


def windows(names: list[str], steps: int) -> None:
    print(f"windows against the whole, after {steps} steps: greatest and mean difference\n")
    print(f"{'':16} {'unit':>5} " + " ".join(f"{size:>16}" for size in WINDOWS))
    with tempfile.TemporaryDirectory() as place:
        home = Path(place)
        os.environ["XDG_CACHE_HOME"] = str(home / "cache")
        store = store_of(home)
        for name in names:
            run = trained(home / name, store, name, steps)
            made = {size: _made(run, size) for size in (*WINDOWS, 10**6)}
            whole = made.pop(10**6)
            wave = run.model.gives == "wave"  # type: ignore[union-attr]
            scale = 1.0 if wave else 20 / np.log(10)
            differences = [scale * np.abs(found - whole) for found in made.values()]
            print(f"{name:16} {'' if wave else 'dB':>5} "
                  + " ".join(f"{found.max():8.2g} {found.mean():7.1g}" for found in differences), flush=True)


def _made(run: runs.Run, size: int) -> np.ndarray:
    """A log-mel or a waveform of the song, in windows of that size."""
    conversion = convert.Conversion(run, next(iter(run.singers)), vocoder=None, key="auto", rounding="semitones",
                                    steps=None, sampler=None, seed=0, device="cpu", precision="32", window=size,
                                    how=None)
    (job,) = jobs([SONG], conversion.reads, "the run")
    song = conversion.song(job)
    with torch.inference_mode():
        made = conversion.model.song(conversion.features(song), song.frames, torch.Generator().manual_seed(0), size)
    return np.concatenate(list(made)) if conversion.model.gives == "wave" else made[0].numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["memory", "windows"])
    parser.add_argument("--only", nargs="+", metavar="NAME", default=list(MODELS))
    parser.add_argument("--minutes", type=float, nargs="+", default=[2, 20])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.what == "windows":
        windows(asked.only, asked.steps)
    elif asked.alone:
        memory_alone(asked.minutes[0], asked.only[0])
    else:
        memory(asked.minutes, asked.only)


if __name__ == "__main__":
    main()
